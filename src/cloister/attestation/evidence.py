"""Evidence on the wire: canonical CBOR, one encoding per value, small caps.

Byte table in docs/attestation.md. A map with three keys, and two more where they are not empty:

    {"kind": text, "quote": bytes, "events": [[register, name, digest, data], ...],
     "parts": {name: bytes}, "devices": [{"kind", "quote", "events", "parts"}, ...]}

Decoding checks form only. Nothing decoded here is believed before `verify`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from cloister.attestation.types import Event, Evidence
from cloister.crypto.canonical import cbor_decode, cbor_encode
from cloister.errors import EvidenceError, Reason


@dataclass(frozen=True, slots=True)
class Limits:
    """What one piece of evidence may hold; sizes in bytes. Real TDX quotes are 5,006 and 8,000 bytes, boot logs 10 to 100 kB,
    an IMA log of a host that has imported torch 170 kB more."""

    total: int = 8 * 1024 * 1024
    kind: int = 32
    quote: int = 64 * 1024
    events: int = 64
    event_name: int = 128
    event_data: int = 64 * 1024
    parts: int = 16
    part: int = 4 * 1024 * 1024
    devices: int = 16
    items: int = 16_384
    """CBOR values: with every list at its limit, 17 pieces of evidence hold 6,600."""


LIMITS: Final = Limits()
_KIND: Final = re.compile(r"[a-z][a-z0-9-]*")
_PART: Final = re.compile(r"[a-z][a-z0-9_.-]*")


def encode(evidence: Evidence) -> bytes:
    """Return the canonical CBOR of `evidence`.

    Raises:
        ValueError: `evidence` is larger than `LIMITS`, so no verifier would take it.
    """
    problem = _problem(evidence)
    if problem is not None:
        raise ValueError(f"{problem.where}: found {problem.found}, wanted {problem.wanted}")
    data = cbor_encode(_value(evidence))
    if len(data) > LIMITS.total:
        raise ValueError(f"evidence of {len(data)} bytes, at most {LIMITS.total} are accepted")
    return data


def _value(evidence: Evidence) -> dict[str, Any]:
    value: dict[str, Any] = {
        "kind": evidence.kind,
        "quote": evidence.quote,
        "events": [[entry.register, entry.name, entry.digest, entry.data] for entry in evidence.events],
    }
    if evidence.parts:
        value["parts"] = dict(evidence.parts)
    if evidence.devices:
        value["devices"] = [_value(device) for device in evidence.devices]
    return value


def decode(data: bytes) -> Evidence:
    """Return the evidence in `data`; `encode(decode(data)) == data`.

    Raises:
        EvidenceError: `evidence-malformed`: not canonical CBOR, another shape, or above a limit.
    """
    try:
        value: Any = cbor_decode(data, limit=LIMITS.total, items=LIMITS.items)
    except ValueError as error:
        raise _malformed(Reason("evidence", str(error), f"canonical CBOR of at most {LIMITS.total} bytes")) from error
    evidence = _read(value, "evidence", devices=True)
    problem = _problem(evidence)
    if problem is not None:
        raise _malformed(problem)
    return evidence


def _read(value: Any, where: str, *, devices: bool) -> Evidence:
    match value:
        case {"kind": str(kind), "quote": bytes(quote), "events": list(entries), **rest} if set(rest) <= {
            "parts",
            "devices",
        }:
            pass
        case _:
            wanted = "a map of kind, quote, events, and at most parts and devices"
            raise _malformed(Reason(where, "another shape", wanted))
    if len(entries) > LIMITS.events:
        raise _malformed(Reason(f"{where}.events", f"{len(entries)} events", f"at most {LIMITS.events}"))
    events: list[Event] = []
    for index, entry in enumerate(entries):
        match entry:
            case [int(register), str(name), bytes(digest), bytes(payload)] if not isinstance(register, bool):
                events.append(Event(register, name, digest, payload))
            case _:
                raise _malformed(Reason(f"{where}.events.{index}", "another shape", "[register, name, digest, data]"))
    parts: dict[str, bytes] = {}
    if "parts" in rest:
        if not isinstance(rest["parts"], dict) or not rest["parts"]:
            raise _malformed(Reason(f"{where}.parts", "another shape", "a map that is not empty, or nothing"))
        for name, part in rest["parts"].items():
            if not isinstance(name, str) or not isinstance(part, bytes):
                raise _malformed(Reason(f"{where}.parts", "another shape", "name -> bytes"))
            parts[name] = part
    inner: tuple[Evidence, ...] = ()
    if "devices" in rest:
        found = rest["devices"]
        if not devices or not isinstance(found, list) or not 0 < len(found) <= LIMITS.devices:
            wanted = f"1 to {LIMITS.devices} devices, and none inside a device"
            raise _malformed(Reason(f"{where}.devices", "another shape", wanted))
        inner = tuple(_read(each, f"{where}.devices.{index}", devices=False) for index, each in enumerate(found))
    return Evidence(kind, quote, tuple(events), MappingProxyType(parts), inner)


def _problem(evidence: Evidence) -> Reason | None:
    if len(evidence.parts) > LIMITS.parts:
        return Reason("evidence.parts", f"{len(evidence.parts)} parts", f"at most {LIMITS.parts}")
    for name, part in evidence.parts.items():
        if len(name) > LIMITS.kind or not _PART.fullmatch(name):
            return Reason("evidence.parts", repr(name[:64]), "lower-case names")
        if len(part) > LIMITS.part:
            return Reason(f"evidence.parts.{name}", f"{len(part)} bytes", f"at most {LIMITS.part} bytes")
    if len(evidence.devices) > LIMITS.devices:
        return Reason("evidence.devices", f"{len(evidence.devices)} devices", f"at most {LIMITS.devices}")
    for device in evidence.devices:
        if device.devices:
            return Reason("evidence.devices", "devices inside a device", "one level")
        problem = _problem(device)
        if problem is not None:
            return problem
    if len(evidence.kind) > LIMITS.kind or not _KIND.fullmatch(evidence.kind):
        return Reason("evidence.kind", repr(evidence.kind[:64]), "a lower-case name such as tdx")
    if not 0 < len(evidence.quote) <= LIMITS.quote:
        return Reason("evidence.quote", f"{len(evidence.quote)} bytes", f"1 to {LIMITS.quote} bytes")
    if len(evidence.events) > LIMITS.events:
        return Reason("evidence.events", f"{len(evidence.events)} events", f"at most {LIMITS.events}")
    for index, entry in enumerate(evidence.events):
        where = f"evidence.events.{index}"
        if not 0 <= entry.register <= 23:  # 24 PCRs is the longest register file of any platform
            return Reason(f"{where}.register", str(entry.register), "0 to 23")
        if not 0 < len(entry.name) <= LIMITS.event_name:
            return Reason(f"{where}.name", f"{len(entry.name)} characters", f"1 to {LIMITS.event_name}")
        if not entry.name.isascii() or not entry.name.isprintable():
            return Reason(f"{where}.name", "characters that do not print", "printable ASCII")
        if len(entry.digest) != 48:
            return Reason(f"{where}.digest", f"{len(entry.digest)} bytes", "48 bytes, SHA-384")
        if len(entry.data) > LIMITS.event_data:
            return Reason(f"{where}.data", f"{len(entry.data)} bytes", f"at most {LIMITS.event_data}")
    return None


def _malformed(reason: Reason) -> EvidenceError:
    return EvidenceError("the evidence does not parse", code="evidence-malformed", reasons=[reason])
