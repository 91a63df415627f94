"""Root certificates of SGX and TDX evidence, pinned by SHA-256 of the DER certificate.

The vendor's certificate itself is not kept here: a quote carries its chain, root last, and the root is used only after
its hash equals a pin. So one rule serves production and test roots, and a rotation is one line.
"""

from __future__ import annotations

from typing import Final

from cloister.attestation.roots import Pins

INTEL_SGX_ROOT_CA: Final = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
"""CN=Intel SGX Root CA, valid 2018-05-21 to 2049-12-31; published at certificates.trustedservices.intel.com."""

SOFT_ROOT: Final = "9e7ac4f7be784b2f8b9f3d7bac8b2bafb7f57ab6592d13e8883333298fc5e803"
"""CN=Cloister SOFT test root - protects nothing: made by `soft.intel.authority`, its private key is public."""

PINS: Final = Pins(vendor=frozenset({INTEL_SGX_ROOT_CA}), soft=frozenset({SOFT_ROOT}))
