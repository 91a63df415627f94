"""High-water marks: numbers of vendors that never go back, so that nobody can take a revocation or a TCB recovery back.

A mark is a name and the highest number seen under it:

| name | number | source |
| --- | --- | --- |
| `tcb/<TDX or SGX>/<FMSPC>/<root>` | tcbEvaluationDataNumber of the TCB info | Intel PCS API v4, TCB info v3 |
| `qe/<QE or TD_QE>/<root>` | tcbEvaluationDataNumber of the QE's identity | Intel PCS API v4, enclave identity v2 |
| `crl/<issuer>` | cRLNumber, where the list has one that fits | RFC 5280, 5.2.3 |
| `ocsp/<issuer>/<serial>` | thisUpdate, seconds since 1970 | RFC 6960, 4.2.2.1 |
| `<any of these but ocsp>/time` | issueDate or thisUpdate, seconds since 1970 | |

`<root>` and `<issuer>` are the first 128 bits of the SHA-256 of public key and name (DER) of who answers for the number, so authorities
do not share marks: whoever holds a published test key moves test marks only. Manifests (RIM), certificates and keys have no number.

Rules of `numbers`, because a forged high number must not lock genuine collateral out for ever:
  1 root        the chain ends at a pinned root (or at one that the relying party pins) and holds at `now`
  2 signature   the number stands in bytes that this chain's key signed
  3 now         what is issued after `now` does not count yet
Whether collateral has ended does not matter: a number that was once signed stays signed. What breaks a rule has no numbers; it
moves no mark and is behind none, and verifiers refuse it anyway.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from cloister.attestation.dcap import collateral as dcap
from cloister.attestation.dcap.roots import PINS as INTEL
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.nitro.roots import PINS as AWS
from cloister.attestation.nvidia import rim as nvidia_rim
from cloister.attestation.nvidia.roots import PINS as NVIDIA_DEVICE
from cloister.attestation.nvidia.roots import RIM_KIND, RIM_PINS
from cloister.attestation.pki import certificate as certificates
from cloister.attestation.pki import crl as revocation
from cloister.attestation.pki import ocsp
from cloister.attestation.pki.certificate import Certificate, check_signature
from cloister.attestation.pki.path import MOST, check_path
from cloister.attestation.roots import Pins, Roots, choose
from cloister.attestation.snp.roots import PINS as AMD
from cloister.attestation.tpm.roots import PINS as TPM
from cloister.errors import EvidenceError, Reason

WHERE: Final = "collateral"
CODE: Final = "collateral-rolled-back"
HIGHEST: Final = 10**18 - 1
"""Larger numbers make no mark (the broker's log has no room for them); the time beside them does."""

_PINS: Final[Mapping[str, tuple[tuple[str, Pins], ...]]] = MappingProxyType(
    {
        "sgx": (("sgx", INTEL),),
        "tdx": (("tdx", INTEL),),
        "sev-snp": (("sev-snp", AMD),),
        "tpm": (("tpm", TPM),),
        "nitro": (("nitro", AWS),),
        "nvidia-gpu": (("nvidia-gpu", NVIDIA_DEVICE), (RIM_KIND, RIM_PINS)),
    }
)
"""Kind of evidence -> the roots that may answer for its collateral."""


def numbers(item: Endorsement, among: Endorsements, roots: Roots, *, now: datetime) -> Mapping[str, int]:
    """Return the numbers in `item` that a believed authority signed; `among` holds the certificates that lead to it.

    Empty for what has none, does not parse, or was signed by nobody who counts.

    Raises:
        ValueError: `now` has no time zone.
    """
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    try:
        if item.kind in ("sgx", "tdx"):
            found = dict(_intel(item, roots, now))
        elif item.subject.startswith("ocsp/"):
            found = dict(_answer(item, among, roots, now))
        elif "crl" in item.subject.split("/"):
            found = dict(
                _list(revocation.from_der(item.data, where=WHERE), _authorities(item.kind, among, roots, now), now)
            )
        else:
            found = {}
    except EvidenceError:  # malformed, or under a root that nobody here believes
        found = {}
    return MappingProxyType(found)


def numbers_of_all(endorsements: Endorsements, roots: Roots, *, now: datetime) -> Mapping[str, int]:
    """Return the highest of each of the numbers in `endorsements`; what else as `numbers`."""
    found: dict[str, int] = {}
    for item in endorsements.items:
        for name, value in numbers(item, endorsements, roots, now=now).items():
            found[name] = max(value, found.get(name, value))
    return MappingProxyType(found)


def genuine(item: Endorsement, among: Endorsements, roots: Roots, *, now: datetime) -> bool:
    """Return whether a believed authority answers for `item`: for its numbers, its certificates, or the manifest that it is.

    A bare public key (`cca`, `tpm` AK) has nobody who answers for it.

    Raises:
        ValueError: `now` has no time zone.
    """
    if numbers(item, among, roots, now=now):
        return True
    own = Endorsements((item,))
    try:
        if item.kind == "nvidia-gpu" and item.data.lstrip()[:1] == b"<":
            nvidia_rim.check(nvidia_rim.read(item.data, where=WHERE), roots, now=now, where=WHERE)
            return True
        if item.kind == "sev-snp" and item.subject.startswith(("vcek/", "vlek/")):
            found = [certificates.from_der(item.data, where=WHERE)]
        else:
            found = list(_certificates(item.kind, own))
    except EvidenceError:
        return False
    pool = list(dict.fromkeys([*found, *_certificates(item.kind, among)]))
    return bool(found) and all(_leads(each, pool, item.kind, roots, now) for each in found)


def behind(marks: Mapping[str, int], found: Mapping[str, int]) -> tuple[Reason, ...]:
    """Return which numbers of `found` are below their marks."""
    hint = "this is older than what was used before: fetch fresh collateral"
    return tuple(
        Reason(f"{WHERE}.{name}", str(value), f"at least {marks[name]}", hint)
        for name, value in sorted(found.items())
        if value < marks.get(name, value)
    )


def advance(marks: Mapping[str, int], found: Mapping[str, int]) -> Mapping[str, int]:
    """Return `marks` with the numbers `found`, none of which may be lower.

    Raises:
        EvidenceError: `collateral-rolled-back`, with every number found and the one that is wanted.
    """
    reasons = behind(marks, found)
    if reasons:
        raise EvidenceError("the collateral is older than what was used before", code=CODE, reasons=reasons)
    return MappingProxyType({**marks, **found})


# Intel ---------------------------------------------------------------------------------------------------------


def _intel(item: Endorsement, roots: Roots, now: datetime) -> Iterator[tuple[str, int]]:
    found = dcap.parse(item.data, where=WHERE)
    root = found.tcb_info.chain[-1]
    _believed(root, item.kind, roots)
    for document, name in (
        (found.tcb_info, f"tcb/{found.tcb_info.id}/{found.fmspc}/{_key(root)}"),
        (found.qe_identity, f"qe/{found.qe_identity.id[:16]}/{_key(root)}"),
    ):
        if document.issued <= now and _signs(document, root, now) and 0 <= document.evaluation <= HIGHEST:
            yield name, document.evaluation
            yield f"{name}/time", _seconds(document.issued)
    authority = certificates.from_pem(found.raw.pck_crl_issuer_chain.encode(), where=WHERE)
    issuers = [root]
    if authority[-1] == root and _holds(authority, now):
        issuers.append(authority[0])
    yield from _list(found.root_ca_crl, [root], now)
    yield from _list(found.pck_crl, issuers, now)


def _signs(document: dcap.Document, root: Certificate, now: datetime) -> bool:
    """Return whether a certificate that the root itself issued, and that is no authority, signed `document`."""
    signer = document.chain[0]
    if document.chain[1:] != (root,) or signer.authority or len(document.signature) != 64:
        return False
    r, s = (int.from_bytes(half, "big") for half in (document.signature[:32], document.signature[32:]))
    signature = encode_dss_signature(r, s)
    return _holds(document.chain, now) and check_signature(
        signer.key, signature, document.signed, SHA256(), ec.ECDSA(SHA256())
    )


# Revocation lists ----------------------------------------------------------------------------------------------


def _list(found: revocation.RevocationList, issuers: Iterable[Certificate], now: datetime) -> Iterator[tuple[str, int]]:
    for issuer in issuers:
        # asked about the time of its issue: whether it has ended since is not the question
        if found.this_update <= now and found.problem(issuer, found.this_update) is None:
            name = f"crl/{_key(issuer)}"
            if found.number is not None and 0 <= found.number <= HIGHEST:
                yield name, found.number
            yield f"{name}/time", _seconds(found.this_update)
            return


def _answer(item: Endorsement, among: Endorsements, roots: Roots, now: datetime) -> Iterator[tuple[str, int]]:
    response = ocsp.from_der_response(item.data, where=WHERE)
    if response.this_update > now:
        return
    for issuer in _authorities(item.kind, among, roots, now):
        signer = response.signer(issuer)
        if signer is not None and signer.not_before <= now <= signer.not_after:
            yield f"ocsp/{_key(issuer)}/{response.serial:x}", _seconds(response.this_update)
            return


def _authorities(kind: str, among: Endorsements, roots: Roots, now: datetime) -> list[Certificate]:
    """Return the authorities in `among` that lead to a believed root at `now`."""
    pool = list(dict.fromkeys(_certificates(kind, among)))
    return [each for each in pool if each.authority and _leads(each, pool, kind, roots, now)]


def _certificates(kind: str, among: Endorsements) -> Iterator[Certificate]:
    for item in among.items:
        if item.kind != kind:
            continue
        try:
            if item.subject.startswith("ca/"):
                yield certificates.from_der(item.data, where=WHERE)
            elif kind == "sev-snp" and item.data.lstrip()[:5] == b"-----":
                yield from certificates.from_pem(item.data, where=WHERE)
            elif kind == "nvidia-gpu" and item.data.lstrip()[:1] == b"<":
                yield from nvidia_rim.read(item.data, where=WHERE).chain
        except EvidenceError:  # what does not parse answers for nothing
            continue


def _leads(certificate: Certificate, pool: list[Certificate], kind: str, roots: Roots, now: datetime) -> bool:
    chain = [certificate]
    while len(chain) < MOST:
        last = chain[-1]
        try:
            _believed(last, kind, roots)
        except EvidenceError:
            pass
        else:
            return _holds(tuple(chain), now, anchored=True)
        above = next(
            (e for e in pool if e.subject_der == last.issuer_der and e not in chain and last.verify_issued_by(e)), None
        )
        if above is None:
            return False
        chain.append(above)
    return False


def _believed(root: Certificate, kind: str, roots: Roots) -> None:
    refused: EvidenceError | None = None
    for name, pins in _PINS.get(kind, ()):
        try:
            choose(name, root.der, pins, roots, where=WHERE)
        except EvidenceError as error:
            refused = error
        else:
            return
    raise refused or EvidenceError("no root answers for this", code="evidence-not-authentic")


def _holds(chain: tuple[Certificate, ...], now: datetime, *, anchored: bool = False) -> bool:
    try:
        check_path(chain, now=now, where=WHERE, anchored=anchored)
    except EvidenceError:
        return False
    return True


def _key(authority: Certificate) -> str:
    return hashlib.sha256(authority.spki + authority.subject_der).hexdigest()[:32]


def _seconds(moment: datetime) -> int:
    return max(0, int(moment.timestamp()))
