"""Root certificates of Nitro evidence, pinned by SHA-256 of the DER certificate; a document carries its chain, root first."""

from __future__ import annotations

from typing import Final

from cloister.attestation.roots import Pins

AWS_NITRO_ROOT_G1: Final = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
"""CN=aws.nitro-enclaves, valid 2019-10-28 to 2049-10-28; published in AWS_NitroEnclaves_Root-G1.zip. The commercial AWS
partition; the roots of other partitions are the relying party's to pin (`Roots.also`)."""

SOFT_ROOT: Final = "0e4561731c830228cf1ebb71777c5cc87fcc1a8431445fac851f8063e7e48d78"
"""CN=soft.nitro-enclaves, Cloister SOFT - protects nothing: made by `soft.nitro.authority`, its private key is public."""

PINS: Final = Pins(vendor=frozenset({AWS_NITRO_ROOT_G1}), soft=frozenset({SOFT_ROOT}))
