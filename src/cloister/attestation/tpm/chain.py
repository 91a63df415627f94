"""Certificate chains of TPM keys: put together, checked, and read. Used for attestation keys and endorsement keys.

A host sends its leaf certificate and perhaps some authorities; the relying party has authorities of its own (`Endorsements`,
kind `tpm`, subject `ca/<SHA-256 hex>`). Which of them end a chain, only `Roots` says. Revocation lists are the relying party's too
(subject `crl/<SHA-256 of the issuer's certificate, hex>`): none is demanded, but where there is one for an issuer, it must be current.
Source: TCG EK Credential Profile 2.4, section 3 (certificate fields); RFC 5280.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from typing import Final

from cloister.attestation.endorsements import Endorsements
from cloister.attestation.pki import asn1, crl
from cloister.attestation.pki import certificate as certificates
from cloister.attestation.pki.certificate import Certificate
from cloister.attestation.pki.crl import RevocationList
from cloister.attestation.pki.path import check_path, describe
from cloister.attestation.roots import Roots, choose
from cloister.attestation.tpm.roots import PINS
from cloister.errors import EvidenceError, Reason

KIND: Final = "tpm"
EK_USAGE: Final = "2.23.133.8.1"
"""tcg-kp-EKCertificate. Google's and swtpm's authorities also put it on certificates of attestation keys."""
AK_USAGE: Final = "2.23.133.8.3"
"""tcg-kp-AIKCertificate."""
MANUFACTURER: Final = "2.23.133.2.1"
MODEL: Final = "2.23.133.2.2"
VERSION: Final = "2.23.133.2.3"
"""Attributes of the directory name in subjectAltName (TCG EK Credential Profile, 3.2.9)."""
MOST: Final = 8


@dataclass(frozen=True, slots=True)
class Identity:
    """What a chain says about a key. `tee` is `tpm`, or `soft-tpm` under a test root."""

    tee: str
    root: str
    """SHA-256 (hex) of the certificate that the relying party believes."""
    until: datetime
    """When the first certificate ends."""
    chain: tuple[str, ...]
    """For people: `Claims.chain`."""
    listed_until: datetime | None = None
    """When the first revocation list that counted ends; None: there was none."""


def split(data: bytes, *, where: str) -> tuple[Certificate, ...]:
    """Return the certificates of `data`: DER, one after the other, leaf first.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    return _split(bytes(data), where)


def check(
    chain: Sequence[Certificate],
    endorsements: Endorsements,
    roots: Roots,
    *,
    now: datetime,
    chain_at: str,
    root_at: str,
) -> Identity:
    """Prove that the leaf's chain ends at a certificate that the relying party believes.

    Args:
        chain: what the host sent, leaf first; authorities of `endorsements` complete it.
        chain_at: `Reason.where` of faults of the chain, with the fault after it.
        root_at: `Reason.where` of a root that nobody believes.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`.
    """
    found = _completed(tuple(chain), endorsements, roots, chain_at)
    root = found[-1]
    tee = choose(KIND, root.der, PINS, roots, where=root_at)
    crls = _lists(endorsements.all(KIND, "crl/"), chain_at)
    until = check_path(found, now=now, where=chain_at, crls=crls, anchored=True)
    listed_until = _current(found, crls, now, chain_at)
    _in_order(chain, chain_at)
    return Identity(tee, sha256(root.der).hexdigest(), until, describe(found), listed_until)


def usages(certificate: Certificate) -> frozenset[str]:
    """Return the dotted OIDs of extendedKeyUsage; empty if there is none or it does not parse."""
    value = certificate.extensions.get("2.5.29.37")
    if value is None:
        return frozenset()
    try:
        return asn1.purposes(value)
    except (ValueError, TypeError, KeyError):
        return frozenset()


def signs(certificate: Certificate) -> bool:
    """Return whether keyUsage, where there is one, lets the key sign (RFC 5280, 4.2.1.3); an EK's lets it decrypt only."""
    value = certificate.extensions.get("2.5.29.15")
    return value is None or (value[:1] == b"\x03" and len(value) > 3 and bool(value[3] & 0x80))


def tpm_names(certificate: Certificate) -> dict[str, str]:
    """Return `manufacturer`, `model` and `version` of the TPM from subjectAltName, as far as they are there."""
    names = {MANUFACTURER: "manufacturer", MODEL: "model", VERSION: "version"}
    value = certificate.extensions.get("2.5.29.17")
    found: dict[str, str] = {}
    if value is None:
        return found
    try:
        for pairs in asn1.directory_names(value):
            for oid, text in pairs:
                if oid in names:
                    found[names[oid]] = "".join(
                        each if each.isascii() and each.isprintable() else "?" for each in text[:64]
                    )
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
    return found


def _in_order(chain: Sequence[Certificate], where: str) -> None:
    """Refuse certificates that belong to nothing, also above the one that is believed: evidence holds no spare bytes."""
    for certificate, issuer in pairwise(chain):
        if certificate.issuer_der != issuer.subject_der or certificate.issuer_der == certificate.subject_der:
            raise EvidenceError(
                "the certificates of a TPM key are no chain",
                code="evidence-not-authentic",
                reasons=[
                    Reason(
                        f"{where}.issuer",
                        f"{certificate.subject or 'a leaf'}, then {issuer.subject or 'another leaf'}",
                        "each certificate followed by its issuer's, and nothing after a root",
                    )
                ],
            )


def _completed(
    chain: tuple[Certificate, ...], endorsements: Endorsements, roots: Roots, where: str
) -> tuple[Certificate, ...]:
    """Return `chain` up to the first certificate that the relying party believes, with its own authorities where one is missing."""
    believed = roots.also.get(KIND, frozenset()) | PINS.vendor | (PINS.soft if roots.soft else frozenset())
    found: list[Certificate] = []
    own = _authorities(endorsements.all(KIND, "ca/"), where)
    for certificate in chain:
        found.append(certificate)
        if sha256(certificate.der).hexdigest() in believed:
            return tuple(found)
    while len(found) < MOST:
        last = found[-1]
        issuer = next(
            (
                each
                for each in own
                if each.subject_der == last.issuer_der and each not in found and last.verify_issued_by(each)
            ),
            None,
        )
        if issuer is None:
            break
        found.append(issuer)
        if sha256(issuer.der).hexdigest() in believed:
            break
    return tuple(found)


@lru_cache(maxsize=64)
def _authorities(data: tuple[bytes, ...], where: str) -> tuple[Certificate, ...]:
    return tuple(certificates.from_der(each, where=where) for each in data)


@lru_cache(maxsize=16)
def _lists(data: tuple[bytes, ...], where: str) -> tuple[RevocationList, ...]:
    return tuple(crl.from_der(each, where=where) for each in data)


def _current(
    chain: tuple[Certificate, ...], crls: tuple[RevocationList, ...], now: datetime, where: str
) -> datetime | None:
    """Refuse a chain whose issuer has a list here that is not current: an old list must not pass for none. Return when the
    first of them ends, None without lists; of one issuer's, the last counts."""
    ends: list[datetime] = []
    for index, certificate in enumerate(chain[:-1]):
        lists = [each for each in crls if each.issuer_der == certificate.issuer_der]
        problems = [each.problem(chain[index + 1], now) for each in lists]
        if problems and None not in problems:
            raise EvidenceError(
                "a revocation list of a TPM key's issuer is not current",
                code="evidence-not-authentic",
                reasons=[Reason(f"{where}.revocation", str(problems[0]), "a current one", "fetch fresh collateral")],
            )
        current = [
            each.next_update
            for each, problem in zip(lists, problems, strict=True)
            if problem is None and each.next_update is not None
        ]
        ends += [max(current)] if current else []
    return min(ends, default=None)


@lru_cache(maxsize=256)
def _split(data: bytes, where: str) -> tuple[Certificate, ...]:
    found: list[Certificate] = []
    at = 0
    while at < len(data):
        if len(found) == MOST:
            raise _malformed(where, f"more than {MOST} certificates", f"at most {MOST}")
        header = data[at : at + 4]
        # X.690, 8.1.3: a SEQUENCE of 256 to 65,535 bytes; no certificate is smaller
        size = 4 + int.from_bytes(header[2:4], "big")
        if len(header) < 4 or header[:2] != b"\x30\x82" or at + size > len(data):
            raise _malformed(
                where,
                f"{len(data) - at} bytes at {at} that are no certificate",
                "DER certificates, one after the other",
            )
        found.append(certificates.from_der(data[at : at + size], where=where))
        at += size
    if not found:
        raise _malformed(where, "no certificate", f"1 to {MOST}")
    return tuple(found)


def _malformed(where: str, found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "the certificates of a TPM key do not parse", code="evidence-malformed", reasons=[Reason(where, found, wanted)]
    )
