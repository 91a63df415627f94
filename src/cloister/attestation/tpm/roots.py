"""Roots of TPM identities. TPM vendors and clouds have no common root, so none is believed by default.

A relying party names those that it believes in `Roots.also["tpm"]`, as the SHA-256 of a DER certificate. It need not be
self-signed: a cloud's intermediate authority that signs attestation keys is a root to somebody who believes just that one.
"""

from __future__ import annotations

from typing import Final

from cloister.attestation.roots import Pins

SOFT_ROOT: Final = "de18d7060dac4e184d2aeb5c6ffbc93d1e0671a9b74d680dc10104dc2560cca5"
"""CN=Cloister SOFT TPM test root - protects nothing: made by `soft.tpm.authority`, its private key is public."""

PINS: Final = Pins(vendor=frozenset(), soft=frozenset({SOFT_ROOT}))
