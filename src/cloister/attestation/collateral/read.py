"""Which machines is this collateral for? From a vendor's file to endorsements (subjects as in `endorsements`).

    JSON with tcb_info              SGX, TDX: quote collateral of dcap-qvl, by kind and FMSPC
    JSON with id and rim            NVIDIA: the answer of the RIM service, by its id
    JSON with kty                   Arm CCA: a platform's public key, by its `kid`
    XML                             NVIDIA: a manifest (RIM). A driver's says its id; a VBIOS's does not, so its file's name must
    PEM, AMD                        SEV-SNP: ASK or ASVK, then ARK; or a VCEK or VLEK
    DER or PEM revocation list      of AMD's ARK by product line; any other by its issuer's name, for TPMs
    DER or PEM certificates, other  authorities of TPMs; NVIDIA's, which say whose OCSP responses count
    DER OCSP response, or base64    NVIDIA, by serial number

Only form is read here. A wrong subject makes collateral unfindable, never trusted: every verifier checks what it finds.
"""

from __future__ import annotations

import base64
import hashlib
import re
from datetime import datetime
from typing import Any, Final

from cloister.attestation.dcap import collateral as dcap
from cloister.attestation.endorsements import Endorsement
from cloister.attestation.pki import certificate as certificates
from cloister.attestation.pki import crl as revocation
from cloister.attestation.pki import ocsp
from cloister.attestation.snp import format as snp_format
from cloister.crypto.canonical import json_decode
from cloister.errors import EvidenceError, Reason

WHERE: Final = "collateral"
LIMIT: Final = 4 * 1024 * 1024
"""Largest file of a vendor, in bytes: revocation lists may grow; everything else has at most 20 kB."""
_AMD: Final = re.compile(r"(?:SEV(?:-VLEK)?|ARK)-(Milan|Genoa|Turin)(?![A-Za-z])")
_RIM_ID: Final = re.compile(r"NV_[A-Z0-9]{2,16}(?:_[A-Za-z0-9.]{1,32}){2,8}")
_RIM_BOARD: Final = re.compile(r"[0-9A-Za-z]{4}_[0-9A-Za-z]{4}_[0-9A-Za-z]{3}_([0-9A-Fa-f]{10})")
_RIM_META: Final = re.compile(rb"<(?:[A-Za-z0-9]+:)?Meta\b([^<>]{1,4096})>")
_RIM_FIELD: Final = re.compile(rb'\b(product|colloquialVersion)="([0-9A-Za-z._-]{1,32})"')
_KID: Final = re.compile(r"[0-9a-f]{2,132}")


def recognise(data: bytes, *, name: str = "") -> tuple[Endorsement, ...]:
    """Return what `data` endorses. `name` is its file's, which counts only where the bytes do not say (a VBIOS's manifest).

    Raises:
        EvidenceError: `evidence-malformed`: collateral of no known form.
    """
    if not 0 < len(data) <= LIMIT:
        raise _malformed(f"{len(data)} bytes", f"1 to {LIMIT} bytes")
    head = data[:4096].lstrip()
    if head[:1] == b"{":
        return (_json(data),)
    if head[:1] == b"<":
        return (_rim(data, name),)
    if b"-----BEGIN" in head:
        if b"-----BEGIN X509 CRL-----" in head:
            return (_crl(_unarmour(data)),)
        return _chain(data)
    if data[:1] == b"\x30":
        return (_der(data),)
    try:
        return (_der(base64.b64decode(b"".join(data.split()), validate=True)),)
    except ValueError as error:
        raise _malformed("bytes of no known form") from error


def ends(item: Endorsement) -> datetime | None:
    """Return when the first part of `item` ends, as it says itself; None for what does not end or does not parse."""
    try:
        if item.kind in ("sgx", "tdx"):
            found = dcap.parse(item.data, where=WHERE)
            lists = (found.root_ca_crl.next_update, found.pck_crl.next_update)
            return min(found.tcb_info.ends, found.qe_identity.ends, *(each for each in lists if each is not None))
        if item.subject.startswith("ocsp/"):
            return ocsp.from_der_response(item.data, where=WHERE).next_update
        if "crl" in item.subject.split("/"):
            return revocation.from_der(item.data, where=WHERE).next_update
        if item.data.lstrip()[:5] == b"-----":
            return min(each.not_after for each in certificates.from_pem(item.data, where=WHERE))
        if item.subject.startswith(("ca/", "vcek/", "vlek/")):
            return certificates.from_der(item.data, where=WHERE).not_after
    except EvidenceError:
        pass
    return None


def _json(data: bytes) -> Endorsement:
    try:
        value: Any = json_decode(data, limit=dcap.LIMIT, canonical=False)
    except ValueError as error:
        raise _malformed(f"JSON that does not parse: {error}"[:200]) from error
    match value:
        case {"kty": str(), "kid": str(kid)} if _KID.fullmatch(kid):
            return Endorsement("cca", f"cpak/{kid}", data)
        case {"id": str(rim), "rim": str(encoded)} if _RIM_ID.fullmatch(rim):
            try:
                return Endorsement("nvidia-gpu", rim, base64.b64decode(encoded, validate=True))
            except ValueError as error:
                raise _malformed("a manifest that is not base64") from error
        case {"tcb_info": _}:
            found = dcap.parse(data, where=WHERE)
            return Endorsement(found.kind, found.fmspc, data)
    raise _malformed("JSON of another shape")


def _chain(data: bytes) -> tuple[Endorsement, ...]:
    chain = certificates.from_pem(data, where=WHERE)
    product = _AMD.search(chain[0].subject)
    if product and chain[0].authority and len(chain) == 2:
        leaf = "vlek" if "VLEK" in chain[0].subject else "vcek"
        return (Endorsement("sev-snp", f"{product[1]}/{leaf}", data),)
    return tuple(_certificate(each) for each in chain)


def _der(data: bytes) -> Endorsement:
    for reader in (_der_certificate, _crl, _ocsp):
        try:
            return reader(data)
        except EvidenceError as error:
            if error.reasons[0].where != f"{WHERE}.format":  # it is one, but of nothing that is known
                raise
    raise _malformed("DER that is no certificate, revocation list or OCSP response")


def _der_certificate(data: bytes) -> Endorsement:
    return _certificate(certificates.from_der(data, where=WHERE))


def _certificate(found: certificates.Certificate) -> Endorsement:
    if not found.authority and snp_format.common_name(found) in ("SEV-VCEK", "SEV-VLEK"):
        return Endorsement("sev-snp", snp_format.leaf_subject(snp_format.leaf(found)), found.der)
    kind = "nvidia-gpu" if "NVIDIA" in found.subject.upper() else "tpm"
    return Endorsement(kind, f"ca/{hashlib.sha256(found.der).hexdigest()}", found.der)


def _crl(data: bytes) -> Endorsement:
    found = revocation.from_der(data, where=WHERE)
    product = _AMD.search(found.issuer_der.decode("latin-1"))
    if product is not None:
        return Endorsement("sev-snp", f"{product[1]}/crl", data)
    return Endorsement("tpm", f"crl/{hashlib.sha256(found.issuer_der).hexdigest()}", data)


def _ocsp(data: bytes) -> Endorsement:
    found = ocsp.from_der_response(data, where=WHERE)
    return Endorsement("nvidia-gpu", f"ocsp/{found.serial:x}", data)


def _rim(data: bytes, name: str) -> Endorsement:
    meta = _RIM_META.search(data[:8192])
    fields = dict(_RIM_FIELD.findall(meta[1])) if meta else {}
    if b"SoftwareIdentity" not in data[:4096] or set(fields) != {b"product", b"colloquialVersion"}:
        raise _malformed("XML that is no reference integrity manifest")
    product, version = fields[b"product"].decode(), fields[b"colloquialVersion"].decode()
    if version.count(".") < 4:  # 550.90.07; a VBIOS has five groups
        family = "NV_GPU_DRIVER" if product == "GH100" else "NV_GPU_CC_DRIVER"
        return Endorsement("nvidia-gpu", f"{family}_{product}_{version}", data)
    compact = version.replace(".", "").upper()
    named, board = _RIM_ID.search(name), _RIM_BOARD.search(name)
    if named is not None and named[0].upper().removesuffix(".XML").endswith(compact):
        return Endorsement("nvidia-gpu", named[0][: named[0].upper().rindex(compact)] + compact, data)
    if board is not None and board[1].upper() == compact:
        return Endorsement("nvidia-gpu", f"NV_GPU_VBIOS_{board[0][: -len(compact)]}{compact}", data)
    raise _malformed(
        f"a manifest of VBIOS {version}, which does not say for which board",
        "a file named by its RIM id",
        f"call the file NV_GPU_VBIOS_<project>_<project SKU>_<chip SKU>_{compact}.xml, or let `collateral fetch` get it",
    )


def _unarmour(data: bytes) -> bytes:
    found = re.search(rb"-----BEGIN X509 CRL-----([A-Za-z0-9+/=\s]+)-----END X509 CRL-----", data)
    try:
        return base64.b64decode(b"".join(found[1].split()), validate=True) if found else b""
    except ValueError as error:
        raise _malformed(str(error)) from error


def _malformed(
    found: str, wanted: str = "collateral of Intel, AMD, NVIDIA, Arm or a TPM vendor", hint: str = ""
) -> EvidenceError:
    return EvidenceError(
        "the collateral does not parse", code="evidence-malformed", reasons=[Reason(WHERE, found, wanted, hint)]
    )
