"""The CC event log of a TD (ACPI table CCEL, UEFI 2.10 section 38.4): what firmware and boot loader did before our software.

Its form is the TCG2 log's; its register number i + 1 is RTMR i (0 is MRTD, which no event extends). Digests are SHA-384.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from cloister.attestation.logs import tcg
from cloister.attestation.types import BootEvent
from cloister.errors import EvidenceError, Reason

ALGORITHM: Final = "sha384"
BOOT_REGISTERS: Final = (0, 1, 2)
"""RTMRs that firmware, boot loader and kernel extend; 3 is for software that runs."""


def parse(data: bytes, *, where: str) -> tcg.Log:
    """Return the log in `data`.

    Raises:
        EvidenceError: `evidence-malformed`, also for a log without SHA-384.
    """
    log = tcg.parse(data, where=where)
    if ALGORITHM not in log.algorithms:
        raise EvidenceError(
            "the CC event log does not parse",
            code="evidence-malformed",
            reasons=[Reason(where, f"digests of {', '.join(log.algorithms)}"[:200], ALGORITHM)],
        )
    return log


def registers(log: tcg.Log) -> dict[int, bytes]:
    """Return RTMR 0 to 2 as `log` leads to them; zeros where no event extends one."""
    values = tcg.replay(log, ALGORITHM)
    return {index: values.get(index + 1, bytes(48)) for index in BOOT_REGISTERS}


def replayed(log: tcg.Log, measurements: Mapping[str, bytes]) -> tuple[int, ...]:
    """Return those of RTMR 0 to 2 that `log` explains exactly."""
    return tuple(index for index, value in registers(log).items() if value == measurements[f"rtmr{index}"])


def events(data: bytes, measurements: Mapping[str, bytes], *, where: str) -> tuple[BootEvent, ...]:
    """Return the events of RTMR 0 to 2, after all three replayed to `measurements`; `register` is the RTMR.

    Raises:
        EvidenceError: `evidence-malformed`, or `evidence-not-authentic` naming each register that differs.
    """
    log = parse(data, where=where)
    reasons = [
        Reason(
            f"{where}.rtmr{index}",
            value.hex(),
            measurements[f"rtmr{index}"].hex(),
            "the log is not the one that firmware kept: an event is missing, added, changed or in another place",
        )
        for index, value in registers(log).items()
        if value != measurements[f"rtmr{index}"]
    ]
    if reasons:
        raise EvidenceError(
            "the CC event log does not explain the signed registers", code="evidence-not-authentic", reasons=reasons
        )
    return tuple(
        replace(event, register=event.register - 1)
        for event in tcg.events(log, ALGORITHM)
        if event.register - 1 in BOOT_REGISTERS
    )
