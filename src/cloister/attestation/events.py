"""Runtime events: what a program wrote into a register after launch, and how the log explains the register.

Format: value' = SHA-384(value || digest), digest = SHA-384(data), starting from 48 zero bytes (TDX RTMR, Intel TDX module
specification, TDG.MR.RTMR.EXTEND). All our events go to register 3. An event's name is not measured: a reader relies on data only.

Steps of `check_log`; an error names the step that refused:
  1 register   every event belongs to register 3
  2 data       SHA-384(data) == digest; replay alone does not authenticate data
  3 replay     the digests, in order, give exactly the signed register
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from cloister.attestation.types import Claims, Event
from cloister.crypto.canonical import cbor_decode, cbor_encode
from cloister.errors import EvidenceError, Reason

Algorithm = Literal["sha384", "sha256"]

RUNTIME_REGISTER: Final = 3
"""In every log, whatever the platform calls its register: RTMR 3, NSM PCR 16, TPM PCR 15, or none (`fold`)."""
REGISTER_BYTES: Final = 48
INITIAL: Final = bytes(REGISTER_BYTES)

CONFIG: Final = "cloister/config/1"
"""A broker's event: canonical CBOR of its configuration."""
WORKLOAD: Final = "cloister/workload/1"
"""A node's event: what it is going to run, and how confined."""

LEVELS: Final = frozenset({"L1", "L2", "L3"})
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_SANDBOX: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class Workload:
    """The measured program and its confinement, as one `cloister/workload/1` event states them.

    Raises:
        ValueError: a field that is not of the stated form.
    """

    code: str
    """Digest of the workload manifest, `sha256:` and 64 hex digits."""
    sandbox: str
    """Profile name, such as `offline`."""
    profile: bytes
    """SHA-256 of the serialised sandbox profile, 32 bytes."""
    level: str
    """Confinement level that the node established: `L1`, `L2` or `L3`."""

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.code):
            raise ValueError(f"code {self.code!r} is not of the form sha256:<64 hex digits>")
        if not _SANDBOX.fullmatch(self.sandbox):
            raise ValueError(f"sandbox {self.sandbox!r} is not a profile name")
        if len(self.profile) != 32:
            raise ValueError(f"profile digest of {len(self.profile)} bytes, wanted 32")
        if self.level not in LEVELS:
            raise ValueError(f"level {self.level!r} is not one of {', '.join(sorted(LEVELS))}")

    def encode(self) -> bytes:
        """Return the event data: a canonical CBOR map."""
        return cbor_encode({"code": self.code, "sandbox": self.sandbox, "profile": self.profile, "level": self.level})


def event(name: str, data: bytes) -> Event:
    """Return the event that `extend` of an attester records: register 3, digest SHA-384(data)."""
    return Event(RUNTIME_REGISTER, name, hashlib.sha384(data).digest(), data)


def extend(value: bytes, digest: bytes) -> bytes:
    """Return the register after one extension.

    Raises:
        ValueError: `value` or `digest` is not 48 bytes.
    """
    if len(value) != REGISTER_BYTES or len(digest) != REGISTER_BYTES:
        raise ValueError(f"a register and a digest have {REGISTER_BYTES} bytes")
    return hashlib.sha384(value + digest).digest()


def replay(events: Iterable[Event], algorithm: Algorithm = "sha384") -> bytes:
    """Return the register that `events` lead to, from zero bytes.

    A SHA-256 register (TPM) is extended with SHA-256(data) instead of `digest`; the first steps of `check_log` are the same.
    """
    if algorithm == "sha256":
        value = bytes(32)
        for entry in events:
            value = hashlib.sha256(value + hashlib.sha256(entry.data).digest()).digest()
        return value
    value = INITIAL
    for entry in events:
        value = extend(value, entry.digest)
    return value


_FOLD: Final = b"cloister/report-data-with-log/1\x00"


def fold(report_data: bytes, events: Iterable[Event]) -> bytes:
    """Return the 64 bytes that hardware without a runtime register signs instead of `report_data` (64 bytes).

    SHA-512(tag || replay(events), 48 bytes || report_data). The launch measurement covers the software that keeps the log, and
    this covers the log; unlike a register, that software could rewrite it (docs/attestation.md).

    Raises:
        ValueError: `report_data` is not 64 bytes.
    """
    if len(report_data) != 64:
        raise ValueError(f"report data of {len(report_data)} bytes, wanted 64")
    return hashlib.sha512(_FOLD + replay(events) + report_data).digest()


def check_log(
    events: tuple[Event, ...], register: bytes | None, *, where: str, algorithm: Algorithm = "sha384"
) -> None:
    """Prove that `events` explain the signed `register` exactly; None: there is no register, and `fold` binds the log.

    Raises:
        EvidenceError: `evidence-not-authentic` with all violations; `where` prefixes them.
    """
    reasons: list[Reason] = []
    for index, entry in enumerate(events):
        # (1) no other register is ours to extend, so a log that claims one explains nothing
        if entry.register != RUNTIME_REGISTER:
            reasons.append(Reason(f"{where}.{index}.register", str(entry.register), str(RUNTIME_REGISTER)))
        # (2) before anybody reads the data
        actual = hashlib.sha384(entry.data).digest()
        if not hmac.compare_digest(actual, entry.digest):
            reasons.append(
                Reason(
                    f"{where}.{index}.data",
                    found=f"data with digest {actual.hex()}",
                    wanted=entry.digest.hex(),
                    hint="the event data was changed after it was measured",
                )
            )
    # (3) exactly: a missing, added or reordered event gives another value
    if any(len(entry.digest) != REGISTER_BYTES for entry in events):
        reasons.append(Reason(where, "an event digest of another size", f"{REGISTER_BYTES} bytes"))
    elif register is not None and (value := replay(events, algorithm)) != register:
        reasons.append(
            Reason(
                f"{where}.replay",
                found=value.hex(),
                wanted=register.hex(),
                hint="the log is not the one that the hardware recorded: an event is missing, added or in another place",
            )
        )
    if reasons:
        raise EvidenceError(
            "the runtime event log does not explain the signed register",
            code="evidence-not-authentic",
            reasons=reasons,
        )


def workload_of(claims: Claims) -> Workload:
    """Return the workload of the single `cloister/workload/1` event in `claims`.

    The register measures data, not names, so whoever carries a log could give a second workload another name. Every
    event counts whose name or whose data is a workload's.

    Raises:
        EvidenceError: `evidence-unacceptable` if there is no such event or more than one; `evidence-malformed` if its
            data is not a workload.
    """
    found = [entry for entry in claims.events if entry.name == WORKLOAD or _is_workload(entry.data)]
    if len(found) != 1 or found[0].name != WORKLOAD:
        raise EvidenceError(
            f"the event log holds {len(found)} workload events, wanted exactly one",
            code="evidence-unacceptable",
            reasons=[
                Reason(
                    f"events.{WORKLOAD}",
                    ", ".join(entry.name for entry in found) or "no workload event",
                    f"exactly one {WORKLOAD}",
                    "a node measures one workload after it starts; start a fresh node for another workload",
                )
            ],
        )
    return decode_workload(found[0].data)


def config_of(claims: Claims) -> bytes:
    """Return the data of the `cloister/config/1` event, which must be the only event in `claims`.

    Raises:
        EvidenceError: `evidence-unacceptable` if the log is anything else.
    """
    if [entry.name for entry in claims.events] != [CONFIG]:
        raise EvidenceError(
            "the event log does not hold exactly one configuration",
            code="evidence-unacceptable",
            reasons=[
                Reason(
                    f"events.{CONFIG}",
                    ", ".join(entry.name for entry in claims.events) or "no event",
                    f"exactly one event, {CONFIG}",
                    "a broker measures its configuration once, when it starts",
                )
            ],
        )
    return claims.events[0].data


def _is_workload(data: bytes) -> bool:
    try:
        decode_workload(data)
    except EvidenceError:
        return False
    return True


def decode_workload(data: bytes) -> Workload:
    """Return the workload that event `data` states.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    try:
        value: Any = cbor_decode(data, limit=4096)
        match value:
            case {
                "code": str(code),
                "sandbox": str(sandbox),
                "profile": bytes(profile),
                "level": str(level),
                **rest,
            } if not rest:
                return Workload(code, sandbox, profile, level)
            case _:
                raise ValueError("another shape")
    except ValueError as error:
        raise EvidenceError(
            "the workload event does not parse",
            code="evidence-malformed",
            reasons=[Reason(f"events.{WORKLOAD}", str(error), "canonical CBOR {code, sandbox, profile, level}")],
        ) from error
