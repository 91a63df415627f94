"""Every error that Cloister raises on purpose: one tree, stable codes, exit statuses, remedies.

Families say *who can fix it*::

    CloisterError
      InputError          you: a file, an argument, a folder               exit 2
      DeniedError         the contract says no                             exit 3
      EvidenceError       the evidence is not authentic or not acceptable  exit 4
      WaitingError        somebody still has to sign                       exit 5
      TamperedError       stored bytes are not what was sealed or logged   exit 1
      MachineError        this machine lacks something, or is full         exit 1
      PeerError           the other side is down, slow, or is not who it was  exit 1

A caller's mistake in Python is `ValueError`/`TypeError`, never part of this tree. Codes are listed in
`docs/errors.md` (a test compares both). Exit status 0 is success; statuses are never reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Reason:
    """One rule that was broken: where the rule stands, what it wants, what was found, what to do.

    `where` is a path such as `place.enclave.min_tcb` or a step of a verifier such as `tdx.chain`.
    """

    where: str
    found: str
    wanted: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: wants {self.wanted}, found {self.found}"
        return f"{text} ({self.hint})" if self.hint else text

    def as_json(self) -> dict[str, str]:
        return {"where": self.where, "found": self.found, "wanted": self.wanted, "hint": self.hint}


class CloisterError(Exception):
    """Root of all errors. `str(error)` is one sentence; `reasons` and `hint` carry the rest.

    `code` names the kind of failure for programs and for `docs/errors.md`.
    """

    family: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 1

    def __init__(
        self, message: str, *, code: str | None = None, reasons: Sequence[Reason] = (), hint: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.family
        if self.code not in CODES:
            raise ValueError(f"error code {self.code!r} is not listed in cloister.errors.CODES")
        self.reasons = tuple(reasons)
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def as_json(self) -> dict[str, Any]:
        return {
            "error": self.code,
            "family": self.family,
            "message": self.message,
            "reasons": [reason.as_json() for reason in self.reasons],
            "hint": self.hint,
            "exit_status": self.exit_status,
        }


class InputError(CloisterError):
    """You can fix it: a file, an argument or a folder that cannot be used as it is."""

    family = "input"
    exit_status = 2


class DeniedError(CloisterError):
    """The contract says no; `reasons` holds every rule that was broken. `denial_id` feeds `cloister why`."""

    family = "denied"
    exit_status = 3

    def __init__(self, message: str, *, denial_id: str = "", **rest: Any) -> None:
        super().__init__(message, **rest)
        self.denial_id = denial_id

    def as_json(self) -> dict[str, Any]:
        return {**super().as_json(), "denial_id": self.denial_id}


class EvidenceError(CloisterError):
    """Evidence that is malformed, not authentic, or not acceptable to the policy."""

    family = "evidence"
    exit_status = 4


class WaitingError(CloisterError):
    """Nothing is wrong; somebody still has to sign."""

    family = "waiting"
    exit_status = 5


class TamperedError(CloisterError):
    """Stored bytes are not what was sealed, registered or logged: changed, truncated, swapped or old."""

    family = "tampered"


class MachineError(CloisterError):
    """This machine lacks something or ran out of something (no FUSE, disk full, a lock is held)."""

    family = "machine"


class PeerError(CloisterError):
    """The other side is unreachable, too slow, speaks another version, or is not who it was."""

    family = "peer"


# code -> one sentence for docs/errors.md. A code is never reused for another meaning.
CODES: dict[str, str] = {
    "input": "A file, an argument or a folder cannot be used as it is.",
    "contract-invalid": "The contract does not parse or breaks a rule of the language; every finding is listed.",
    "signature-invalid": "A signature is malformed, made by another key, or made over other bytes.",
    "source-unsealable": "A folder holds something that cannot be sealed (socket, device, unreadable or changing file).",
    "workload-unmeasurable": "An environment or a script's folder holds something that cannot be measured; every finding is listed.",
    "workload-changed": "Files are no longer what was measured; measure again.",
    "denied": "The contract does not allow this; every broken rule is listed.",
    "budget-spent": "The contract's answer budget for this consumer is used up.",
    "lease-refused": "The lease is unknown, over or cut, or does not authenticate this message.",
    "too-fast": "More batches of metrics or logs in a second than the broker takes from one lease.",
    "evidence": "The evidence was refused.",
    "evidence-malformed": "The evidence does not parse.",
    "evidence-not-authentic": "The evidence parses, but the hardware vendor's chain or a signature does not hold.",
    "evidence-unacceptable": "The evidence is authentic, but the policy does not want this platform, firmware or code.",
    "evidence-stale": "The nonce in the evidence is unknown, used, or too old.",
    "collateral-rolled-back": "Vendor collateral is older than what was used before; its numbers never go back.",
    "waiting": "Signatures are missing.",
    "tampered": "Stored bytes are not what was written.",
    "volume-tampered": "A sealed volume fails authentication: changed, truncated, or sealed under another key.",
    "volume-stale": "A sealed volume is authentic but not the version that is registered: an old or a foreign one.",
    "log-tampered": "The audit log or a proof from it is not consistent with what was seen before.",
    "machine": "This machine cannot do this.",
    "no-sandbox": "No confinement level that the contract accepts is available on this machine.",
    "no-mount": "Sealed volumes cannot be mounted on this machine.",
    "disk-full": "The disk is full; nothing was changed.",
    "busy": "Another process is using this output or state folder.",
    "workload-failed": "The confined program ended with an error; nothing was sealed.",
    "lease-lost": "The broker no longer renews the lease; the program was stopped and its keys were dropped.",
    "interrupted": "Stopped by a signal; nothing was sealed.",
    "peer": "The other side could not be used.",
    "broker-unreachable": "The broker does not answer.",
    "broker-replaced": "The broker at this address is not the one that was attested before.",
    "protocol": "The other side sent something that this version does not understand.",
}
