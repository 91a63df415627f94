"""OCSP responses (RFC 6960): form here, belief in `check`. A response is signed and short-lived, so whoever brings it may.

Rules of `check`, for each certificate of a chain but the root:
  1 about    the answer is about this certificate: serial number, and hashes of its issuer's name and key (4.1.1)
  2 signer   the issuer itself signed it, or a responder whose certificate this very issuer signed, with the key purpose
             OCSPSigning (4.2.2.2); another authority's responder says nothing here
  3 revoked  any answer that passed 1 and 2 and says revoked refuses, however old: a revoked certificate stays revoked
  4 current  thisUpdate <= now <= nextUpdate, not older than `max_age`, and the responder's certificate valid at `now`
  5 good     there must be a current answer, and it must say good; `unknown` is not good
What the relying party fetched is asked before what the attester stapled: only where the first gives no current answer does
the second count. Neither can hide a revocation that the other shows.

Not checked on purpose: the nonce extension, because a response that is collected before it is needed has none of ours; the
revocation of the responder's own certificate, which vendors exclude (id-pkix-ocsp-nocheck, 4.2.2.2.1). SHA-1 is accepted where
it names the issuer (RFC 5019, 2.1.1): rule 2 compares the key itself. It signs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final, Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import ocsp

from cloister.attestation.pki import asn1
from cloister.attestation.pki.certificate import Certificate, PublicKey, check_signature, from_der
from cloister.attestation.pki.path import UNDERSTOOD
from cloister.errors import EvidenceError, Reason

__all__ = ["LIMIT", "Response", "check", "from_concatenated", "from_der_response"]

LIMIT: Final = 64 * 1024
"""Largest response accepted, in bytes; real ones have 0.9 to 2 kB."""
MOST: Final = 16
"""Most responses in one concatenation."""
OCSP_SIGNING: Final = "1.3.6.1.5.5.7.3.9"

Status = Literal["good", "revoked", "unknown"]


@dataclass(frozen=True, slots=True)
class Response:
    """One successful basic response with its single answer. Equal means: the same bytes."""

    der: bytes = field(repr=False)
    serial: int = field(compare=False)
    hash_name: str = field(compare=False)
    issuer_name_hash: bytes = field(compare=False, repr=False)
    issuer_key_hash: bytes = field(compare=False, repr=False)
    status: Status = field(compare=False)
    this_update: datetime = field(compare=False)
    next_update: datetime | None = field(compare=False)
    revoked_at: datetime | None = field(compare=False)
    certificates: tuple[Certificate, ...] = field(compare=False, repr=False)
    """What the responder sent along; one of them may have signed."""
    responder_key_hash: bytes | None = field(compare=False, repr=False)
    """SHA-1 of the responder's key, or None where it is named by `responder_name`."""
    responder_name: bytes | None = field(compare=False, repr=False)
    _signed: Any = field(compare=False, repr=False)

    def is_about(self, certificate: Certificate, issuer: Certificate) -> bool:
        """Rule 1."""
        return (
            self.serial == certificate.serial
            and self.issuer_name_hash == hashlib.new(self.hash_name, issuer.subject_der).digest()
            and self.issuer_key_hash == hashlib.new(self.hash_name, _key_bits(issuer.key)).digest()
        )

    def signer(self, issuer: Certificate) -> Certificate | None:
        """Return who signed this with the right to do so under `issuer`, or None. Rule 2, but for time."""
        return _signer(self, issuer)


def from_der_response(data: bytes, *, where: str) -> Response:
    """Return the response that is exactly `data`.

    Raises:
        EvidenceError: `evidence-malformed`: not one DER response, too large, not successful, or with more than one answer.
    """
    if not 0 < len(data) <= LIMIT:
        raise _malformed(where, f"{len(data)} bytes", f"a DER OCSP response of at most {LIMIT} bytes")
    try:
        return _read(bytes(data), where)
    except EvidenceError:
        raise
    except Exception as error:  # the library does not say all that it raises, see `certificate.from_der`
        raise _malformed(where, str(error)[:200] or "bytes", "one DER OCSP response") from error


def from_concatenated(data: bytes, *, where: str) -> tuple[Response, ...]:
    """Return the responses in `data`, which holds one after another and nothing else.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    found: list[Response] = []
    at = 0
    while at < len(data):
        if len(found) == MOST:
            raise _malformed(where, f"more than {MOST} responses", f"at most {MOST}")
        size = _element(data, at)
        if size is None:
            raise _malformed(where, f"no DER element at byte {at}", "DER OCSP responses, one after another")
        found.append(from_der_response(data[at : at + size], where=where))
        at += size
    return tuple(found)


def check(
    chain: Sequence[Certificate],
    responses: Sequence[Response],
    *,
    stapled: Sequence[Response] = (),
    now: datetime,
    where: str,
    max_age: timedelta,
    first: int = 0,
) -> datetime | None:
    """Prove that no certificate of `chain` is revoked, from `chain[first]` to the one below the root.

    Args:
        responses: what the relying party has.
        stapled: what came with the evidence; asked second.
        max_age: oldest `thisUpdate` that is still believed.

    Returns: when the first of the answers ends; None for a chain without any certificate to ask about.

    Raises:
        EvidenceError: `evidence-not-authentic`; `Reason.where` is `<where>.revoked` or `<where>.revocation`.
        ValueError: `now` has no time zone.
    """
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    reasons: list[Reason] = []
    ends: list[datetime] = []
    for certificate, issuer in zip(chain[first:-1], chain[first + 1 :], strict=True):
        problems: list[str] = []
        current: Response | None = None
        for response in (*responses, *stapled):
            # (1) (2)
            if not response.is_about(certificate, issuer):
                continue
            signer = response.signer(issuer)
            if signer is None:
                problems.append("a response that nobody signed who may")
                continue
            # (3) before any question of time
            if response.status == "revoked":
                since = f" since {response.revoked_at:%Y-%m-%d}" if response.revoked_at else ""
                reasons.append(
                    Reason(
                        f"{where}.revoked",
                        f"{certificate.subject}: serial {certificate.serial:x} is revoked{since}",
                        "an unrevoked certificate",
                    )
                )
                break
            # (4)
            problem = _stale(response, signer, now, max_age)
            if problem is not None:
                problems.append(problem)
            elif current is None:
                current = response
        else:
            # (5)
            if current is None:
                found = "; ".join(problems) or "no OCSP response"
            elif current.status != "good":
                found = f"the responder says {current.status}"
            else:
                ends.append(current.next_update or now)
                continue
            reasons.append(
                Reason(
                    f"{where}.revocation",
                    f"{certificate.subject}, serial {certificate.serial:x}: {found}",
                    f"a current OCSP response that says good at {now:%Y-%m-%d %H:%M}",
                    "fetch a fresh response from the vendor's responder",
                )
            )
    if reasons:
        raise EvidenceError(
            "it is not known that the certificates are unrevoked", code="evidence-not-authentic", reasons=reasons
        )
    return min(ends, default=None)


def _stale(response: Response, signer: Certificate, now: datetime, max_age: timedelta) -> str | None:
    if now < response.this_update:
        return f"a response valid from {response.this_update:%Y-%m-%d %H:%M}"
    if response.next_update is None:
        return "a response without an end"
    if now > response.next_update:
        return f"a response that ended {response.next_update:%Y-%m-%d %H:%M}"
    if now - response.this_update > max_age:
        return f"a response of {response.this_update:%Y-%m-%d %H:%M}, older than {max_age}"
    if not signer.not_before <= now <= signer.not_after:
        return f"a responder whose certificate ended {signer.not_after:%Y-%m-%d %H:%M}"
    return None


@lru_cache(maxsize=512)
def _signer(response: Response, issuer: Certificate) -> Certificate | None:
    # a fact about bytes, whatever the time
    if _named(response, issuer) and response._signed(issuer.key):
        return issuer
    for certificate in response.certificates:
        if (
            _named(response, certificate)
            and certificate.issuer_der == issuer.subject_der
            and OCSP_SIGNING in _purposes(certificate)
            and not certificate.critical - UNDERSTOOD
            and certificate.verify_issued_by(issuer)
            and response._signed(certificate.key)
        ):
            return certificate
    return None


def _named(response: Response, certificate: Certificate) -> bool:
    if response.responder_key_hash is not None:
        named = hashlib.sha1(_key_bits(certificate.key), usedforsecurity=False).digest()
        return response.responder_key_hash == named
    return response.responder_name == certificate.subject_der


def _purposes(certificate: Certificate) -> frozenset[str]:
    value = certificate.extensions.get("2.5.29.37")
    if value is None:
        return frozenset()
    try:
        return asn1.purposes(value)
    except (ValueError, TypeError, KeyError):
        return frozenset()


def _key_bits(key: PublicKey) -> bytes:
    """Return the content of subjectPublicKey, without tag, length and unused bits (RFC 6960, 4.1.1)."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return key.public_bytes(Encoding.DER, PublicFormat.PKCS1)


@lru_cache(maxsize=256)
def _read(data: bytes, where: str) -> Response:
    loaded = ocsp.load_der_ocsp_response(data)
    if loaded.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
        raise ValueError(f"response status {loaded.response_status.name}")
    answers = list(loaded.responses)
    if len(answers) != 1:
        raise ValueError(f"{len(answers)} answers in one response")
    for extension in (*loaded.extensions, *loaded.single_extensions):
        if extension.critical:
            raise ValueError(f"critical extension {extension.oid.dotted_string}")
    answer = answers[0]
    status: Status
    match answer.certificate_status:
        case ocsp.OCSPCertStatus.GOOD:
            status = "good"
        case ocsp.OCSPCertStatus.REVOKED:
            status = "revoked"
        case _:
            status = "unknown"
    hash_, tbs, signature = loaded.signature_hash_algorithm, loaded.tbs_response_bytes, loaded.signature
    encoded = [each.public_bytes(Encoding.DER) for each in loaded.certificates]

    def signed(key: PublicKey) -> bool:
        if not isinstance(hash_, hashes.HashAlgorithm):
            return False
        parameters = ec.ECDSA(hash_) if isinstance(key, ec.EllipticCurvePublicKey) else padding.PKCS1v15()
        return check_signature(key, signature, tbs, hash_, parameters)

    name = loaded.responder_name
    return Response(
        der=data,
        serial=answer.serial_number,
        hash_name=answer.hash_algorithm.name,
        issuer_name_hash=answer.issuer_name_hash,
        issuer_key_hash=answer.issuer_key_hash,
        status=status,
        this_update=answer.this_update_utc,
        next_update=answer.next_update_utc,
        revoked_at=answer.revocation_time_utc,
        certificates=tuple(from_der(each, where=where) for each in encoded[:4]),
        responder_key_hash=loaded.responder_key_hash,
        responder_name=name.public_bytes() if name is not None else None,
        _signed=signed,
    )


def _element(data: bytes, at: int) -> int | None:
    """Return the size of the DER SEQUENCE that begins at `at`, or None."""
    if len(data) - at < 2 or data[at] != 0x30:
        return None
    first = data[at + 1]
    if first < 0x80:
        size = 2 + first
    else:
        count = first & 0x7F
        if not 1 <= count <= 3 or at + 2 + count > len(data):
            return None
        size = 2 + count + int.from_bytes(data[at + 2 : at + 2 + count], "big")
    return size if at + size <= len(data) else None


def _malformed(where: str, found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "an OCSP response does not parse",
        code="evidence-malformed",
        reasons=[Reason(f"{where}.format", found, wanted)],
    )
