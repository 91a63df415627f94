"""Which machines is this collateral for? From a vendor's file to endorsements (subjects as in `endorsements`).

Only form is read here. A wrong subject makes collateral unfindable, never trusted: every verifier checks what it finds.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any, Final

from cryptography.x509 import ocsp

from cloister.attestation.endorsements import Endorsement
from cloister.attestation.pki import certificate as certificates
from cloister.attestation.pki import crl as revocation
from cloister.attestation.snp import format as snp_format
from cloister.crypto.canonical import json_decode
from cloister.errors import EvidenceError, Reason

WHERE: Final = "collateral"
_AMD: Final = re.compile(r"(?:SEV(?:-VLEK)?|ARK)-([A-Z][a-z]+)")
_RIM_VERSION: Final = re.compile(rb'colloquialVersion="([0-9A-Za-z.]{3,32})"')


def recognise(data: bytes) -> tuple[Endorsement, ...]:
    """Return what `data` endorses.

    Raises:
        EvidenceError: `evidence-malformed`: collateral of no known form.
    """
    head = data.lstrip()[:1]
    if head == b"{":
        return (_json(data),)
    if head == b"<":
        return (_rim(data),)
    if b"-----BEGIN" in data[:4096]:
        if b"-----BEGIN X509 CRL-----" in data[:4096]:
            return (_crl(_unarmour(data, b"X509 CRL")),)
        return _chain(data)
    if head == b"0":
        return (_der(data),)
    try:
        return (_der(base64.b64decode(b"".join(data.split()), validate=True)),)
    except ValueError as error:
        raise _malformed("bytes of no known form") from error


def _json(data: bytes) -> Endorsement:
    try:
        value: Any = json_decode(data, limit=1 << 20, canonical=False)
        if isinstance(value, dict) and "kty" in value:
            return Endorsement("cca", f"cpak/{value.get('kid', '')}", data)
        info: Any = json_decode(value["tcb_info"].encode(), limit=1 << 20, canonical=False)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _malformed("JSON without tcb_info") from error
    match info:
        case {"id": "TDX" | "SGX" as tee, "fmspc": str(fmspc)} if re.fullmatch("[0-9A-Fa-f]{12}", fmspc):
            return Endorsement(tee.lower(), fmspc.upper(), data)
        case {"version": 2, "fmspc": str(fmspc)} if re.fullmatch("[0-9A-Fa-f]{12}", fmspc):
            return Endorsement("sgx", fmspc.upper(), data)
    raise _malformed("tcb_info without id and FMSPC")


def _chain(data: bytes) -> tuple[Endorsement, ...]:
    chain = certificates.from_pem(data, where=WHERE)
    first = chain[0]
    product = _AMD.search(first.subject)
    if product and first.authority and len(chain) >= 2:
        leaf = "vlek" if "VLEK" in first.subject else "vcek"
        return (Endorsement("sev-snp", f"{product[1]}/{leaf}", data),)
    return tuple(_certificate(each) for each in chain)


def _der(data: bytes) -> Endorsement:
    for reader in (_der_certificate, _crl):
        try:
            return reader(data)
        except EvidenceError:
            pass
    try:
        response = ocsp.load_der_ocsp_response(data)
        return Endorsement("nvidia-gpu", f"ocsp/{response.serial_number:x}", data)
    except ValueError as error:
        raise _malformed("DER that is no certificate, revocation list or OCSP response") from error


def _der_certificate(data: bytes) -> Endorsement:
    return _certificate(certificates.from_der(data, where=WHERE))


def _certificate(found: certificates.Certificate) -> Endorsement:
    if "Advanced Micro Devices" in found.subject and not found.authority:
        return Endorsement("sev-snp", snp_format.leaf_subject(snp_format.leaf(found)), found.der)
    return Endorsement("tpm", f"ca/{hashlib.sha256(found.der).hexdigest()}", found.der)


def _crl(data: bytes) -> Endorsement:
    found = revocation.from_der(data, where=WHERE)
    product = _AMD.search(found.issuer_der.decode("latin-1"))
    if product is None:
        raise _malformed("a revocation list of no vendor that publishes one by itself")
    return Endorsement("sev-snp", f"{product[1]}/crl", data)


def _rim(data: bytes) -> Endorsement:
    name = re.search(rb'name="([A-Za-z0-9_-]{2,64})"', data[:4096])
    version = _RIM_VERSION.search(data[:4096])
    if b"SoftwareIdentity" not in data[:4096] or name is None or version is None:
        raise _malformed("XML that is no reference integrity manifest")
    return Endorsement("nvidia-gpu", f"rim/{name[1].decode()}/{version[1].decode()}", data)


def _unarmour(data: bytes, label: bytes) -> bytes:
    found = re.search(rb"-----BEGIN " + label + rb"-----([A-Za-z0-9+/=\s]+)-----END " + label + rb"-----", data)
    try:
        return base64.b64decode(b"".join(found[1].split()), validate=True) if found else b""
    except ValueError as error:
        raise _malformed(str(error)) from error


def _malformed(found: str) -> EvidenceError:
    wanted = "collateral of Intel, AMD, NVIDIA, Arm or a TPM vendor"
    return EvidenceError(
        "the collateral does not parse", code="evidence-malformed", reasons=[Reason(WHERE, found, wanted)]
    )
