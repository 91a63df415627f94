"""Reference values (RFC 9334): what good software measures, stated by whoever made it, and signed.

A document is canonical JSON (RFC 8785), at most 1 MiB, signed with SSHSIG over its exact bytes (namespace `reference@cloister`,
checked by the caller, who knows which key to believe):

    {"v": 1, "name": "node-image", "serial": 7, "issued": "2026-11-20T12:00:00Z", "until": "2027-02-20T12:00:00Z",
     "software": [{"label": "node-image-7", "tee": "sev-snp", "measurements": {"measurement": ["<hex>"]},
                   "svns_equal": {}, "svns_least": {}, "log": [{"register": 0, "type": "", "only": true, "digests": ["<hex>"]}]}],
     "workloads": [{"label": "train.py", "code": "sha256:<hex>"}]}

`serial` grows with every document of one name; a reader keeps the highest one it has seen and takes no older document, so
that a vulnerable build cannot be brought back while its document is still valid. An entry without any rule is refused: it
would accept everything.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Final

from cloister.attestation.types import Claims, LogRule, Software
from cloister.crypto.canonical import json_decode, json_encode
from cloister.errors import EvidenceError, Reason

LIMIT: Final = 1 << 20
NAMESPACE: Final = "reference@cloister"
MOST: Final = 1024
"""Entries of a document, values of a measurement, rules of a log."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_FIELD: Final = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_CODE: Final = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Workload:
    """A measured program: what `code.<name>.digest` of a contract names."""

    label: str
    code: str


@dataclass(frozen=True, slots=True)
class Document:
    """Reference values of one maker. Construction checks nothing; `decode` does."""

    name: str
    serial: int
    issued: datetime
    until: datetime
    software: tuple[Software, ...] = ()
    workloads: tuple[Workload, ...] = ()

    def encode(self) -> bytes:
        """Return the bytes that are signed; `decode(encode())` is equal."""
        return json_encode(
            {
                "v": 1,
                "name": self.name,
                "serial": self.serial,
                "issued": _text(self.issued),
                "until": _text(self.until),
                "software": [_software(each) for each in self.software],
                "workloads": [{"label": each.label, "code": each.code} for each in self.workloads],
            }
        )

    def problem(self, *, now: datetime, least: int = 0) -> Reason | None:
        """Return why this document does not count at `now` for a reader who has seen serial `least`, or None."""
        where = f"reference.{self.name}"
        if now < self.issued or now > self.until:
            wanted = f"valid at {_text(now)}"
            return Reason(
                f"{where}.until", f"{_text(self.issued)} to {_text(self.until)}", wanted, "ask its maker for a new one"
            )
        if self.serial < least:
            hint = "somebody gives you reference values that were replaced"
            return Reason(f"{where}.serial", str(self.serial), f"{least} or higher, which was seen before", hint)
        return None


def digest(data: bytes) -> str:
    """Return the name of the document with the exact bytes `data`: `sha256:` and 64 hex digits."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def of_claims(claims: Claims, label: str) -> Software:
    """Return reference values that accept exactly the software of `claims`: its launch measurement.

    What a machine says of itself is worth what its verification was worth; who signs the document vouches for the machine.

    Raises:
        ValueError: the claims name no launch measurement.
    """
    value = claims.measurements.get(claims.launch) if claims.launch else None
    if value is None:
        raise ValueError(f"{claims.tee} has no launch measurement")
    tee = claims.tee.removeprefix("soft-")
    return Software(label, tee, MappingProxyType({claims.launch: frozenset({value})}))


def decode(data: bytes) -> Document:
    """Return the document in `data`.

    Raises:
        EvidenceError: `evidence-malformed`, with every finding.
    """
    try:
        value: Any = json_decode(data, limit=LIMIT)
    except ValueError as error:
        raise _malformed([Reason("reference", str(error), "canonical JSON")]) from error
    reasons: list[Reason] = []
    names = {"v", "name", "serial", "issued", "until", "software", "workloads"}
    if not isinstance(value, dict) or set(value) != names or value["v"] != 1 or value["v"] is True:
        raise _malformed([Reason("reference", "another shape", f"exactly {', '.join(sorted(names))}, v = 1")])
    if not _matches(_NAME, value["name"]):
        reasons.append(Reason("reference.name", repr(value["name"])[:80], "a name of letters, digits, . _ + -"))
    if not _counts(value["serial"]) or value["serial"] < 1:
        reasons.append(Reason("reference.serial", repr(value["serial"])[:40], "a whole number from 1"))
    issued, until = (_time(value[key], f"reference.{key}", reasons) for key in ("issued", "until"))
    if issued and until and not timedelta(0) < until - issued <= timedelta(days=3660):
        reasons.append(Reason("reference.until", value["until"], "after issued, at most ten years"))
    software = [
        _read_software(each, f"reference.software.{index}", reasons)
        for index, each in enumerate(_list(value["software"], "reference.software", reasons))
    ]
    workloads = []
    for index, each in enumerate(_list(value["workloads"], "reference.workloads", reasons)):
        match each:
            case {"label": str(label), "code": str(code), **rest} if (
                not rest and _matches(_NAME, label) and _matches(_CODE, code)
            ):
                workloads.append(Workload(label, code))
            case _:
                reasons.append(
                    Reason(f"reference.workloads.{index}", "another shape", "label, and code sha256:<64 hex digits>")
                )
    if not reasons and not software and not workloads:
        reasons.append(Reason("reference", "no values", "at least one"))
    if reasons or issued is None or until is None:
        raise _malformed(reasons)
    found = tuple(each for each in software if each is not None)
    return Document(value["name"], value["serial"], issued, until, found, tuple(workloads))


def _software(value: Software) -> dict[str, Any]:
    return {
        "label": value.label,
        "tee": value.tee,
        "measurements": {name: sorted(each.hex() for each in values) for name, values in value.measurements.items()},
        "svns_equal": dict(value.svns_equal),
        "svns_least": dict(value.svns_least),
        "log": [
            {
                "register": rule.register,
                "type": rule.type,
                "only": rule.only,
                "digests": sorted(each.hex() for each in rule.digests),
            }
            for rule in value.log
        ],
    }


def _read_software(value: Any, where: str, reasons: list[Reason]) -> Software | None:
    match value:
        case {
            "label": str(label),
            "tee": str(tee),
            "measurements": dict(measurements),
            "svns_equal": dict(equal),
            "svns_least": dict(least),
            "log": list(log),
            **rest,
        } if not rest:
            pass
        case _:
            wanted = "label, tee, measurements, svns_equal, svns_least, log"
            reasons.append(Reason(where, "another shape", wanted))
            return None
    before = len(reasons)
    if not _matches(_NAME, label):
        reasons.append(Reason(f"{where}.label", repr(label)[:80], "a name"))
    if tee and not _matches(_FIELD, tee):
        reasons.append(Reason(f"{where}.tee", repr(tee)[:80], "a TEE type, or nothing for any"))
    found: dict[str, frozenset[bytes]] = {}
    for name, values in measurements.items():
        found[name] = _digests(values, f"{where}.measurements.{name[:40]}", reasons)
        if not _matches(_FIELD, name):
            reasons.append(Reason(f"{where}.measurements", repr(name)[:80], "names of measurements"))
    for key, numbers in (("svns_equal", equal), ("svns_least", least)):
        if len(numbers) > MOST or not all(
            _matches(_FIELD, name) and _counts(number) for name, number in numbers.items()
        ):
            reasons.append(Reason(f"{where}.{key}", "another shape", "name -> whole number from 0"))
    rules = [
        rule
        for index, each in enumerate(_list(log, f"{where}.log", reasons))
        if (rule := _read_rule(each, f"{where}.log.{index}", reasons)) is not None
    ]
    if not (found or equal or least or rules):
        reasons.append(Reason(where, "no rule", "at least one: an entry without rules would accept everything"))
    if len(reasons) > before:
        return None
    frozen: Mapping[str, frozenset[bytes]] = MappingProxyType(found)
    return Software(label, tee, frozen, MappingProxyType(equal), MappingProxyType(least), tuple(rules))


def _read_rule(value: Any, where: str, reasons: list[Reason]) -> LogRule | None:
    match value:
        case {"register": int(register), "type": str(kind), "only": bool(only), "digests": list(digests), **rest} if (
            not rest
        ):
            pass
        case _:
            reasons.append(Reason(where, "another shape", "register, type, only, digests"))
            return None
    before = len(reasons)
    if isinstance(register, bool) or not 0 <= register <= 23:
        reasons.append(Reason(f"{where}.register", repr(register)[:40], "0 to 23"))
    if len(kind) > 64 or not kind.isascii() or (kind and not kind.isprintable()) or (only and kind):
        reasons.append(
            Reason(f"{where}.type", repr(kind)[:80], "the name of an event type, or nothing; nothing with only")
        )
    found = _digests(digests, f"{where}.digests", reasons)
    return LogRule(register, found, kind, only) if len(reasons) == before else None


def _digests(values: Any, where: str, reasons: list[Reason]) -> frozenset[bytes]:
    found = set()
    for text in _list(values, where, reasons):
        if not isinstance(text, str) or not re.fullmatch(r"(?:[0-9a-f]{2}){16,64}", text):
            reasons.append(Reason(where, repr(text)[:140], "16 to 64 bytes in lower-case hex"))
        else:
            found.add(bytes.fromhex(text))
    if not found:
        reasons.append(Reason(where, "no value", "at least one"))
    return frozenset(found)


def _list(value: Any, where: str, reasons: list[Reason]) -> list[Any]:
    if not isinstance(value, list) or len(value) > MOST:
        reasons.append(Reason(where, "another shape", f"an array of at most {MOST}"))
        return []
    return value


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _time(value: Any, where: str, reasons: list[Reason]) -> datetime | None:
    try:
        return datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except (TypeError, ValueError):
        reasons.append(Reason(where, repr(value)[:60], "a time such as 2026-11-20T12:00:00Z"))
        return None


def _text(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _malformed(reasons: list[Reason]) -> EvidenceError:
    return EvidenceError("the reference values do not parse", code="evidence-malformed", reasons=reasons[:50])
