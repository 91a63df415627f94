"""Is this evidence authentic? One door for every kind of hardware.

A kind of hardware is a folder beside this file with a module `verify` that has `KIND: str` and

    verify(evidence, endorsements, roots, *, now) -> Claims

and with `STEPS`, a mapping from the name of each step (as in `Reason.where`) to a sentence for people, in order. `VERIFIERS` is read from those folders when this module is imported, never from what a peer sends, so new hardware is
new files only. docs/attestation.md says what a folder holds.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, Protocol

import cloister.attestation as room
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.roots import Roots
from cloister.attestation.types import Claims, Evidence
from cloister.errors import EvidenceError, Reason

__all__ = ["VERIFIERS", "Endorsement", "Endorsements", "Roots", "Verifier", "steps_of", "verify"]


class Verifier(Protocol):
    """The `verify` function of one hardware folder."""

    def __call__(self, evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims: ...


def _modules() -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for entry in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
        # asked of the folder, not of the import system: that would import folders that import this module
        folders = [f"{path}/{entry.name.rpartition('.')[2]}" for path in room.__path__]
        if entry.ispkg and "verify" in {inner.name for inner in pkgutil.iter_modules(folders)}:
            module = importlib.import_module(f"{entry.name}.verify")
            found[module.KIND] = module
    return MappingProxyType(found)


_MODULES: Final = _modules()
VERIFIERS: Final[Mapping[str, Verifier]] = MappingProxyType({kind: module.verify for kind, module in _MODULES.items()})
"""Kind of evidence -> its verifier."""


def steps_of(evidence: Evidence) -> dict[str, str]:
    """Return the steps that `verify` takes for `evidence`, in order: name -> sentence for people."""
    steps: dict[str, str] = {}
    for each in (evidence, *evidence.devices):
        module = _MODULES.get(each.kind)
        steps |= getattr(module, "STEPS", {})
    return steps


DEVICES: Final = frozenset({"nvidia-gpu", "tpm"})
"""Kinds of evidence that may stand in `Evidence.devices`."""


def verify(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims:
    """Return what `evidence` proves at `now`; a test root gives `Claims.tee` the prefix `soft-`.

    Raises:
        EvidenceError: `evidence-malformed`, or `evidence-not-authentic`; `reasons[0].where` names the step that refused.
        ValueError: `now` has no time zone (a caller's mistake).
    """
    claims = _verify(evidence, endorsements, roots, now=now)
    if not evidence.devices:
        return claims
    devices: list[Claims] = []
    for index, device in enumerate(evidence.devices):
        if device.devices or device.kind not in DEVICES:
            raise EvidenceError(
                f"evidence of kind {device.kind!r} is not of a device",
                code="evidence-malformed",
                reasons=[Reason(f"evidence.devices.{index}", repr(device.kind), " or ".join(sorted(DEVICES)))],
            )
        devices.append(replace(_verify(device, endorsements, roots, now=now), kind="device"))
    gpus = [device.gpu for device in devices if device.tee.endswith("nvidia-gpu")]
    confidential = bool(gpus) and all(each == "confidential" for each in gpus)  # one open GPU opens the machine
    return replace(claims, devices=tuple(devices), gpu="confidential" if confidential else "none")


def _verify(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims:
    verifier = VERIFIERS.get(evidence.kind)
    if verifier is None:
        raise EvidenceError(
            f"this version does not verify evidence of kind {evidence.kind!r}",
            code="evidence-malformed",
            reasons=[Reason("evidence.kind", repr(evidence.kind), " or ".join(sorted(VERIFIERS)))],
        )
    return verifier(evidence, endorsements, roots, now=now)
