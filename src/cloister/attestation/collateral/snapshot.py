"""Snapshots: collateral as one file that somebody signed, for a machine without a network.

    snapshot = canonical CBOR {"v": 1, "made": RFC 3339 text in UTC, "items": [{"kind", "subject", "data"}, ...]}
    file     = canonical CBOR {"v": 1, "snapshot": bytes, "signature": text}

Items are sorted by kind and subject, each pair once, so one set of collateral at one time has one snapshot, and its SHA-256 is
its name. The signature is an armoured SSHSIG over the snapshot's bytes in the namespace `collateral@cloister`; whoever
imports says whose count. It says who put this together, never that the vendor's collateral is genuine: verifiers find that out.

The signature is checked by the caller's `check`, because keys of people are not this room's business.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, Final

from cloister.attestation.collateral.read import LIMIT
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.crypto.canonical import cbor_decode, cbor_encode
from cloister.errors import EvidenceError, Reason

NAMESPACE: Final = "collateral@cloister"
FILE_LIMIT: Final = 16 * 1024 * 1024
"""Largest file, in bytes: a fleet of a hundred machine types with its revocation lists has about 3 MB."""
MOST: Final = 4096
"""Items of one snapshot."""
SIGNATURE_LIMIT: Final = 16 * 1024
WHERE: Final = "snapshot"

_KIND: Final = re.compile(r"[a-z][a-z0-9-]{0,31}", re.ASCII)
_SUBJECT: Final = re.compile(r"[!-~][ -~]{0,255}", re.ASCII)
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Collateral and when it was put together."""

    made: datetime
    items: tuple[Endorsement, ...]

    @property
    def endorsements(self) -> Endorsements:
        return Endorsements(self.items)


def name_of(snapshot: bytes) -> str:
    """Return the SHA-256 of a snapshot's bytes, hex."""
    return hashlib.sha256(snapshot).hexdigest()


def encode(snapshot: Snapshot) -> bytes:
    """Return the snapshot's only encoding.

    Raises:
        ValueError: `made` has no time zone, or the items break a limit (see `problem`).
    """
    if snapshot.made.tzinfo is None:
        raise ValueError("`made` has no time zone")
    items = sorted(snapshot.items, key=_key)
    wrong = problem(tuple(items))
    if wrong is not None:
        raise ValueError(str(wrong))
    return cbor_encode(
        {
            "v": 1,
            "made": snapshot.made.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "items": [{"kind": each.kind, "subject": each.subject, "data": each.data} for each in items],
        }
    )


def decode(data: bytes) -> Snapshot:
    """Return the snapshot whose encoding is exactly `data`.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    try:
        value: Any = cbor_decode(data, limit=FILE_LIMIT)
    except ValueError as error:
        raise _malformed(str(error), "canonical CBOR") from error
    match value:
        case {"v": int(version), "made": str(made), "items": list(entries), **rest} if not rest and _is_one(version):
            pass
        case _:
            raise _malformed("another shape", "a map of v (1), made and items")
    if len(entries) > MOST:
        raise _malformed(f"{len(entries)} items", f"at most {MOST}")
    items: list[Endorsement] = []
    for entry in entries:
        match entry:
            case {"kind": str(kind), "subject": str(subject), "data": bytes(body), **rest} if not rest:
                items.append(Endorsement(kind, subject, body))
            case _:
                raise _malformed("an item of another shape", "a map of kind, subject and data")
    wrong = problem(tuple(items))
    if wrong is not None:
        raise EvidenceError("the snapshot does not parse", code="evidence-malformed", reasons=[wrong])
    try:
        moment = datetime.fromisoformat(made) if _TIME.fullmatch(made) else None
    except ValueError:
        moment = None
    if moment is None:
        raise _malformed(f"made {made[:40]!r}", "a UTC time such as 2026-11-20T09:30:00Z")
    return Snapshot(moment, tuple(items))


def seal(snapshot: bytes, signature: str) -> bytes:
    """Return the file of `snapshot` and its armoured signature."""
    return cbor_encode({"v": 1, "snapshot": snapshot, "signature": signature})


def unseal(data: bytes) -> tuple[bytes, str]:
    """Return the snapshot's bytes and the armoured signature, which nobody checked yet.

    Raises:
        EvidenceError: `evidence-malformed`: no such file, or one without a signature.
    """
    try:
        value: Any = cbor_decode(data, limit=FILE_LIMIT)
    except ValueError as error:
        raise _malformed(str(error), "a signed snapshot") from error
    match value:
        case {"v": int(version), "snapshot": bytes(body), "signature": str(signature), **rest} if not rest and _is_one(
            version
        ):
            if not 0 < len(signature) <= SIGNATURE_LIMIT:
                raise _malformed("no signature", f"an armoured SSHSIG of at most {SIGNATURE_LIMIT} characters")
            return body, signature
        case {"v": 1, "items": _}:
            raise _malformed("a snapshot that nobody signed", "a signed snapshot", "`cloister collateral export` signs")
    raise _malformed("another shape", "a map of v (1), snapshot and signature")


def looks_like_one(data: bytes) -> bool:
    """Return whether `data` begins as a signed snapshot does: a CBOR map of three whose first key is `v`."""
    return data[:4] == b"\xa3\x61v\x01"


def open_signed(data: bytes, check: Callable[[str, bytes], str]) -> tuple[Snapshot, str]:
    """Return the snapshot in `data` and its signer.

    `check` takes the armoured signature and the signed bytes, and returns who signed; it raises for anybody who does not count.

    Raises:
        EvidenceError: `evidence-malformed`; and what `check` raises. Nothing is read before the signature holds.
    """
    body, signature = unseal(data)
    signer = check(signature, body)
    return decode(body), signer


def problem(items: tuple[Endorsement, ...]) -> Reason | None:
    """Return which limit sorted `items` break, or None."""
    if len(items) > MOST:
        return Reason(f"{WHERE}.items", f"{len(items)} items", f"at most {MOST}")
    for each in items:
        if not _KIND.fullmatch(each.kind):
            return Reason(f"{WHERE}.kind", repr(each.kind[:40]), "a lower-case name such as tdx")
        if not _SUBJECT.fullmatch(each.subject):
            return Reason(f"{WHERE}.subject", repr(each.subject[:80]), "1 to 256 printable ASCII characters")
        if not 0 < len(each.data) <= LIMIT:
            return Reason(f"{WHERE}.data", f"{len(each.data)} bytes for {each.subject}", f"1 to {LIMIT} bytes")
    keys = [_key(each) for each in items]
    if any(first >= second for first, second in pairwise(keys)):
        return Reason(f"{WHERE}.items", "items out of order, or one twice", "sorted by kind and subject, each once")
    return None


def _key(item: Endorsement) -> tuple[str, str]:
    return item.kind, item.subject


def _is_one(value: object) -> bool:
    return type(value) is int and value == 1


def _malformed(found: str, wanted: str, hint: str = "") -> EvidenceError:
    return EvidenceError(
        "the snapshot does not parse",
        code="evidence-malformed",
        reasons=[Reason(WHERE, found, wanted, hint)],
    )
