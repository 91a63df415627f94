"""A second implementation of the signature path of an SGX or TDX quote, for tests: it must agree with dcap-qvl.

It checks what needs no collateral: the certificate chain (signatures and validity at `at`), the QE report under the PCK
key, the attestation key under the QE report, and the quote under the attestation key.
"""

from __future__ import annotations

import hashlib
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from cloister.attestation.dcap.format import Quote


def signatures_hold(quote: Quote, *, root_sha256: str, at: datetime) -> bool:
    """Return whether every signature from the root with that hash down to the TD report holds."""
    leaf, ca, root = (x509.load_der_x509_certificate(der) for der in quote.certificates)
    if hashlib.sha256(quote.certificates[-1]).hexdigest() != root_sha256:
        return False
    if not all(each.not_valid_before_utc <= at <= each.not_valid_after_utc for each in (leaf, ca, root)):
        return False
    pck = leaf.public_key()
    assert isinstance(pck, ec.EllipticCurvePublicKey)
    try:
        leaf.verify_directly_issued_by(ca)
        ca.verify_directly_issued_by(root)
        root.verify_directly_issued_by(root)
        pck.verify(_der(quote.qe_report_signature), quote.qe_report, ec.ECDSA(SHA256()))
        named = hashlib.sha256(quote.attestation_key + quote.qe_auth_data).digest() + bytes(32)
        if quote.qe_report[320:384] != named:
            return False
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + quote.attestation_key)
        key.verify(_der(quote.signature), quote.signed, ec.ECDSA(SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True


def _der(signature: bytes) -> bytes:
    return encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
