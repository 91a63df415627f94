"""Is this evidence authentic? One door for every kind of hardware.

A kind of hardware is a folder beside this file with a module `verify` that has `KIND: str` and

    verify(evidence, endorsements, roots, *, now) -> Claims

and `STEPS`, a mapping from the name of each step (as in `Reason.where`) to a sentence for people, in order. `FOLDERS` lists
them, never what a peer sends; a test finds a folder that is not listed. A folder is imported when the first evidence of
its kind comes: a node on one kind of hardware does not load eight others. docs/attestation.md says what a folder holds.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, Protocol

from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.roots import Roots
from cloister.attestation.types import Claims, Evidence
from cloister.errors import EvidenceError, Reason

__all__ = ["FOLDERS", "VERIFIERS", "Endorsement", "Endorsements", "Roots", "Verifier", "steps_of", "verify"]


class Verifier(Protocol):
    """The `verify` function of one hardware folder."""

    def __call__(self, evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims: ...


FOLDERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "azure-snp": "azure_snp",
        "azure-tdx": "azure_tdx",
        "cca": "cca",
        "nitro": "nitro",
        "nvidia-gpu": "nvidia",
        "sev-snp": "snp",
        "sgx": "sgx",
        "tdx": "tdx",
        "token": "token",
        "tpm": "tpm",
    }
)
"""Kind of evidence -> folder of its verifier."""


def _module(kind: str) -> Any:
    return importlib.import_module(f"cloister.attestation.{FOLDERS[kind]}.verify")


class _Verifiers(Mapping[str, Verifier]):
    """Kind -> `verify` of its folder, which is imported when it is first asked for."""

    def __getitem__(self, kind: str) -> Verifier:
        found: Verifier = _module(kind).verify
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(FOLDERS)

    def __len__(self) -> int:
        return len(FOLDERS)

    def __contains__(self, kind: object) -> bool:
        return kind in FOLDERS


VERIFIERS: Final[Mapping[str, Verifier]] = _Verifiers()
"""Kind of evidence -> its verifier."""


def steps_of(evidence: Evidence) -> dict[str, str]:
    """Return the steps that `verify` takes for `evidence`, in order: name -> sentence for people."""
    steps: dict[str, str] = {}
    for each in (evidence, *evidence.devices):
        if each.kind in FOLDERS:
            steps |= _module(each.kind).STEPS
    return steps


DEVICES: Final = frozenset({"nvidia-gpu", "token", "tpm"})
"""Kinds of evidence that may stand in `Evidence.devices`; of tokens those about a device."""
ONLY: Final = ("device_key", "ueid", "ak")
"""Names in `Claims.platform` that two devices of one machine never share."""


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
        found = _verify(device, endorsements, roots, now=now)
        if device.kind == "token" and found.kind != "device":
            raise EvidenceError(
                "a token about a machine is no evidence of a device",
                code="evidence-malformed",
                reasons=[Reason(f"evidence.devices.{index}", found.tee, "a token about a device")],
            )
        devices.append(replace(found, kind="device"))
    _refuse_twins(devices)
    gpus = [device.gpu for device in devices if device.tee.endswith("nvidia-gpu")]
    confidential = bool(gpus) and all(each == "confidential" for each in gpus)  # one open GPU opens the machine
    ends = [each.valid_until for each in (claims, *devices) if each.valid_until is not None]
    return replace(
        claims,
        devices=tuple(devices),
        gpu="confidential" if confidential else "none",
        valid_until=min(ends, default=None),  # what ends first ends the whole
    )


def _refuse_twins(devices: list[Claims]) -> None:
    """Refuse one device that stands there as two: each answers the same nonce as often as it is asked."""
    seen: dict[tuple[str, str], int] = {}
    for index, device in enumerate(devices):
        for name in ONLY:
            if name in device.platform:
                first = seen.setdefault((name, device.platform[name]), index)
                if first != index:
                    found = f"the same device as evidence.devices.{first}: {name} {device.platform[name]}"
                    raise EvidenceError(
                        "one device is there twice",
                        code="evidence-not-authentic",
                        reasons=[Reason(f"evidence.devices.{index}", found[:300], "each device once")],
                    )


def _verify(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims:
    verifier = VERIFIERS.get(evidence.kind)
    if verifier is None:
        raise EvidenceError(
            f"this version does not verify evidence of kind {evidence.kind!r}",
            code="evidence-malformed",
            reasons=[Reason("evidence.kind", repr(evidence.kind), " or ".join(sorted(VERIFIERS)))],
        )
    return verifier(evidence, endorsements, roots, now=now)
