"""A manifest of evidence files: what lies in a directory, at which time it is judged, and what must come out.

Format, one JSON array; further keys of an entry (`source`, `note`, ...) are for people:

    [{"kind": "snp", "name": "milan", "files": {"report": "snp/report.bin", "leaf": "snp/vcek.der"}, "chain": "milan",
      "at": "2025-11-01T00:00:00Z", "nonce": null, "expect": {"authentic": true, "debug": false}}, ...]

`files` are paths below the manifest's directory, by role (`files/__init__`). `at` is RFC 3339, or empty: judged now. `nonce`
is hex, empty for evidence that was asked for without a nonce, or null when nobody knows it. `chain` names a vendor chain:
a role of an entry whose files are chains, or a file `chain-<name>.pem` beside the evidence.

`expect` names facts of an `Observation`. All must hold: equal values, lists as sets, and `reason` (only of a refusal) must
occur in what refused: its steps, findings or sentence, without regard to case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from cloister.attestation.files import Observation
from cloister.crypto.canonical import json_decode
from cloister.errors import EvidenceError, InputError, Reason

LIMIT: Final = 4 * 1024 * 1024
MOST: Final = 10_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a manifest, checked for form."""

    kind: str
    name: str
    files: Mapping[str, str]
    """Role -> path below the directory of the manifest."""
    at: datetime | None
    nonce: bytes | None
    chain: str
    expect: Mapping[str, object]


def parse(data: bytes) -> tuple[Entry, ...]:
    """Return the entries of the manifest `data`, in order.

    Raises:
        InputError: it is not a manifest; every finding is listed.
    """
    try:
        value: Any = json_decode(data, limit=LIMIT, canonical=False)
    except ValueError as error:
        raise _refused([Reason("manifest", str(error), "a JSON array of entries")]) from error
    if not isinstance(value, list) or len(value) > MOST:
        raise _refused([Reason("manifest", "another shape", f"a JSON array of at most {MOST} entries")])
    entries: list[Entry] = []
    reasons: list[Reason] = []
    for index, item in enumerate(value):
        found = _entry(item, f"manifest.{index}", reasons)
        if found is not None:
            entries.append(found)
    names = [entry.name for entry in entries]
    reasons += [
        Reason(f"manifest.{name}", "two entries of this name", "one")
        for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if reasons:
        raise _refused(reasons)
    return tuple(entries)


def _entry(item: Any, where: str, reasons: list[Reason]) -> Entry | None:
    before = len(reasons)

    def refuse(key: str, found: object, wanted: str) -> None:
        reasons.append(Reason(f"{where}.{key}", repr(found)[:120], wanted))

    if not isinstance(item, dict):
        reasons.append(Reason(where, type(item).__name__, "an object"))
        return None
    kind, name, files, expect = item.get("kind"), item.get("name"), item.get("files"), item.get("expect")
    if not isinstance(kind, str) or not kind:
        refuse("kind", kind, "a kind of evidence")
    if not isinstance(name, str) or not 0 < len(name) <= 200 or not name.isprintable():
        refuse("name", name, "a name of 1 to 200 characters")
    if not isinstance(files, dict) or not files or not all(_is_path(path) for path in files.values()):
        refuse("files", files, "role -> path below the manifest's directory")
    if not isinstance(expect, dict) or not expect:
        refuse("expect", expect, "at least one fact")
    at = item.get("at") or ""
    time: datetime | None = None
    if at != "":
        try:
            time = parse_time(at)
        except ValueError:
            refuse("at", at, "a time such as 2025-11-01T00:00:00Z, or nothing")
    nonce, chain = item.get("nonce"), item.get("chain") or ""
    asked: bytes | None = None
    if nonce is not None:
        try:
            asked = bytes.fromhex(nonce)
        except (TypeError, ValueError):
            refuse("nonce", nonce, "hex digits, or null")
    if not isinstance(chain, str):
        refuse("chain", chain, "the name of a vendor chain")
    if len(reasons) > before:
        return None
    return Entry(str(kind), str(name), dict(files or {}), time, asked, str(chain), dict(expect or {}))


def parse_time(text: str) -> datetime:
    """Return the time of RFC 3339 `text`, which must have a zone.

    Raises:
        ValueError: it is not one.
    """
    if not isinstance(text, str):
        raise ValueError("not text")  # noqa: TRY004 - a file's content, not a caller's mistake
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError("a time without a zone")
    return time.astimezone(UTC)


def differences(expect: Mapping[str, object], observed: Observation) -> dict[str, object]:
    """Return the facts of `expect` that do not hold, with what was observed instead; empty means: as expected."""
    found: dict[str, object] = {}
    for name, wanted in expect.items():
        if name == "reason":
            if observed.error is None:
                found[name] = None
            elif not isinstance(wanted, str) or not wanted or not _occurs(wanted, observed.error):
                found[name] = said(observed.error)
        elif name not in observed.facts or not _same(wanted, observed.facts[name]):
            found[name] = observed.facts.get(name)
    return found


def said(error: EvidenceError) -> str:
    """Return what refused, in one line."""
    return "; ".join([error.message, *(f"{reason.where}: found {reason.found}" for reason in error.reasons)])


_ALSO_SAID: Final = {"future": ("not yet valid", "notyetvalid", "in the future", ".future")}
"""Words of manifests that verifiers say otherwise."""


def _occurs(wanted: str, error: EvidenceError) -> bool:
    text = " ".join([error.message, *(f"{reason.where} {reason.found}" for reason in error.reasons)]).lower()
    return any(each in text for each in (wanted.lower(), *_ALSO_SAID.get(wanted.lower(), ())))


def _same(wanted: object, found: object) -> bool:
    if isinstance(wanted, bool) or isinstance(found, bool):
        return wanted is found
    if isinstance(wanted, list) and isinstance(found, (list, tuple)):
        return sorted(map(repr, wanted)) == sorted(map(repr, found))
    return wanted == found


def _is_path(path: object) -> bool:
    return (
        isinstance(path, str)
        and 0 < len(path) <= 1024
        and path.isprintable()
        and not path.startswith("/")
        and not {"", ".", ".."} & set(path.split("/"))
    )


def _refused(reasons: list[Reason]) -> InputError:
    return InputError("this is not a manifest of evidence", reasons=reasons[:50])
