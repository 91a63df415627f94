"""Our own check of everything that is signed, beside dcap-qvl: two implementations must agree before a quote counts.

On `cryptography` alone. Steps, named as those of the verifiers:
  3 collateral  each document is of this TEE, inside its window, signed by a certificate that the root itself issued and that
                is no authority; both CRLs are inside theirs
  4 chain       PCK certificate, PCK CA, root: `pki.path.check_path` with revocation
  5 qe          the PCK key signs the QE report, and that names the attestation key
  6 signature   the attestation key signs header and report
  7 tcb         the collateral is for the PCE that certified the machine
Step 3 is stricter than dcap-qvl, which takes any chain below the root for a document's signer: a stolen PCK key could
write collateral. Step 7 names what dcap-qvl leaves out. TCB levels and the QE's identity are dcap-qvl's alone.

Steps 4 to 6 are all that can be said of a quote without collateral: `signatures`, revocation aside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from cloister.attestation.dcap.collateral import Collateral, Document
from cloister.attestation.dcap.format import SGX_REPORT_DATA, Quote, Tee
from cloister.attestation.dcap.pck import Pck
from cloister.attestation.pki.certificate import Certificate
from cloister.attestation.pki.crl import RevocationList
from cloister.attestation.pki.path import check_path
from cloister.errors import EvidenceError, Reason

_ECDSA: Final = ec.ECDSA(SHA256())
_FRESH: Final = "fetch fresh collateral"


@dataclass(frozen=True, slots=True)
class Found:
    """What the check found. No reasons: all of it holds until `valid_until`."""

    reasons: tuple[Reason, ...]
    valid_until: datetime | None


def check(
    tee: Tee, quote: Quote, chain: tuple[Certificate, ...], pck: Pck, collateral: Collateral, *, now: datetime
) -> Found:
    """Return all that steps 3 to 7 find in `quote` under `collateral` at `now`.

    `chain` and `pck` are of the quote's certificates, whose last one is pinned.
    """
    reasons: list[Reason] = []
    ends: list[datetime] = []
    # (3)
    where = tee.step("3-collateral")
    documents = ((collateral.tcb_info, tee.tcb_info), (collateral.qe_identity, tee.qe_identity))
    for document, wanted in documents:
        if document.id != wanted:
            reasons.append(Reason(f"{where}.kind", f"{document.name} of {document.id}", f"{document.name} of {wanted}"))
        reasons.extend(_window(where, document.name, document.issued, document.ends, now))
        reasons.extend(_signed(where, document, chain[-1]))
        ends.append(document.ends)
    for name, crl in (("root CA CRL", collateral.root_ca_crl), ("PCK CRL", collateral.pck_crl)):
        reasons.extend(_window(where, name, crl.this_update, crl.next_update, now))
        if crl.next_update is not None:
            ends.append(crl.next_update)
    current = not any(each.where.endswith((".expired", ".future")) for each in reasons)
    crls = (collateral.root_ca_crl, collateral.pck_crl)
    paths: list[Reason] = []
    for signer in dict.fromkeys(document.chain for document, _ in documents):  # one, unless the vendor changes it
        _path(signer, where, now, crls, paths, ends)
    # (4)
    _path(chain, tee.step("4-chain"), now, crls, paths, ends)
    # a list outside its window is said above already
    reasons += [each for each in paths if current or not each.where.endswith(".revocation")]
    # (5), (6)
    reasons += _quote(tee, quote, chain[0])
    # (7)
    if pck.pceid.hex().upper() != collateral.pceid:
        found, wanted = f"collateral for PCE {collateral.pceid}", pck.pceid.hex().upper()
        reasons.append(Reason(f"{tee.step('7-tcb')}.pceid", found, wanted))
    return Found(tuple(reasons), min(ends) if not reasons else None)


def signatures(tee: Tee, quote: Quote, chain: tuple[Certificate, ...], *, now: datetime) -> tuple[Reason, ...]:
    """Return what steps 4 to 6 find without collateral, so without revocation: what is signed, not whether it still counts."""
    reasons: list[Reason] = []
    _path(chain, tee.step("4-chain"), now, None, reasons, [])
    return (*reasons, *_quote(tee, quote, chain[0]))


def _path(
    chain: tuple[Certificate, ...],
    where: str,
    now: datetime,
    crls: tuple[RevocationList, ...] | None,
    reasons: list[Reason],
    ends: list[datetime],
) -> None:
    try:
        ends.append(check_path(chain, now=now, where=where, crls=crls or (), revocation=crls is not None))
    except EvidenceError as error:
        reasons.extend(error.reasons)


def _window(where: str, name: str, start: datetime, end: datetime | None, now: datetime) -> Iterator[Reason]:
    wanted = f"valid at {now:%Y-%m-%d %H:%M}"
    if now < start:
        yield Reason(f"{where}.future", f"{name} issued in the future, {start:%Y-%m-%d %H:%M}", wanted, _FRESH)
    if end is None or now > end:
        when = f", {end:%Y-%m-%d %H:%M}" if end is not None else ": it never says when it ends"
        yield Reason(f"{where}.expired", f"{name} expired{when}", wanted, _FRESH)


def _signed(where: str, document: Document, root: Certificate) -> Iterator[Reason]:
    signer = document.chain[0]
    # a PCK certificate is below the PCK CA; only the vendor's signer is the root's own
    if document.chain[1:] != (root,) or signer.authority or signer == root:
        yield Reason(
            f"{where}.signer",
            f"{document.name} signed under {' < '.join(each.subject for each in document.chain)}"[:400],
            "a signer that the root of the quote issued itself",
        )
    if not _holds(signer, document.signature, document.signed):
        yield Reason(f"{where}.signature", f"{document.name} not signed by {signer.subject}", "the vendor's signature")


def _quote(tee: Tee, quote: Quote, leaf: Certificate) -> list[Reason]:
    reasons = []
    where = tee.step("5-qe")
    if not _holds(leaf, quote.qe_report_signature, quote.qe_report):
        reasons.append(Reason(f"{where}.signature", "a QE report that the PCK key did not sign", "its signature"))
    named = hashlib.sha256(quote.attestation_key + quote.qe_auth_data).digest() + bytes(32)
    if quote.qe_report[SGX_REPORT_DATA] != named:
        reasons.append(Reason(f"{where}.key", "a QE report for another attestation key", named.hex()))
    if not _ecdsa(_key(quote.attestation_key), quote.signature, quote.signed):
        found, wanted = "a report that the attestation key did not sign", "its signature"
        reasons.append(Reason(tee.step("6-signature"), found, wanted, "the quote was changed"))
    return reasons


@lru_cache(maxsize=512)
def _holds(signer: Certificate, signature: bytes, message: bytes) -> bool:
    # a fact about bytes that comes back: a machine's QE report, a day's collateral
    return isinstance(signer.key, ec.EllipticCurvePublicKey) and _ecdsa(signer.key, signature, message)


def _key(point: bytes) -> ec.EllipticCurvePublicKey | None:
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + point)
    except ValueError:  # not on the curve
        return None


def _ecdsa(key: ec.EllipticCurvePublicKey | None, signature: bytes, message: bytes) -> bool:
    if key is None or not isinstance(key.curve, ec.SECP256R1) or len(signature) != 64:
        return False
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        key.verify(encode_dss_signature(r, s), message, _ECDSA)
    except InvalidSignature:
        return False
    return True
