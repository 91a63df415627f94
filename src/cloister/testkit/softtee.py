"""Soft TEEs for tests: evidence, collateral, claims and policies with one line each, at a fixed time.

    platform = SoftPlatform(status="OutOfDate")
    platform.run(workload(code=digest))
    claims = platform.claims(binding(nonce=nonce))          # through verify() and dcap-qvl, ~1 ms
    assert appraise(claims, soft_policy()) != ()

    claims = soft_claims(debug=True)                        # the same values in microseconds

Everything is deterministic. It protects nothing: the test root's private key is public.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from cloister.attestation import events as event_log
from cloister.attestation.binding import Binding
from cloister.attestation.edge.attester import SoftTdxAttester
from cloister.attestation.edge.collateral import soft_collateral
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.events import Workload
from cloister.attestation.roots import Roots
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.types import Claims, Event, Evidence, Policy
from cloister.attestation.verify import verify
from cloister.confine.profile import profile

__all__ = [
    "MEASUREMENT",
    "NOW",
    "SOFT_ROOTS",
    "STATUSES",
    "SoftPlatform",
    "binding",
    "soft_claims",
    "soft_collateral",
    "soft_policy",
    "workload",
]

NOW: Final = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
"""The clock of every builder here."""
SOFT_ROOTS: Final = Roots(soft=True)
MEASUREMENT: Final = hashlib.sha384(b"cloister testkit image").digest()
"""MRTD of every builder here, 48 bytes."""
STATUSES: Final = soft_tdx.STATUSES
"""Every TCB status that a soft platform can have; `Revoked` is refused by `verify` already."""


def workload(**fields: Any) -> Workload:
    """Return a workload that names code `sha256:11..`, sandbox `offline` at L1; `fields` override.

    The profile is this software's own of the sandbox named, unless `profile` is given.
    """
    values: dict[str, Any] = {"code": "sha256:" + "11" * 32, "sandbox": "offline", "level": "L1"} | fields
    values.setdefault("profile", profile(values["sandbox"]).digest())
    return Workload(**values)


def binding(**fields: Any) -> Binding:
    """Return a binding for purpose `release` with fixed nonce and key; `fields` override."""
    values = {"purpose": "release", "nonce": b"\x01" * 32, "key": b"\x02" * 1216, "peer_key": b"\x03" * 32}
    return Binding(**(values | fields))


def soft_policy(**fields: Any) -> Policy:
    """Return a policy at `place.enclave` that accepts up-to-date soft TEEs (`simulated`); `fields` override."""
    values = {"where": "place.enclave", "kind": "tee", "accept": frozenset({"simulated"})}
    return Policy(**(values | fields))


def soft_claims(*, events: tuple[Event, ...] | None = None, **fields: Any) -> Claims:
    """Return what `SoftPlatform().run(workload()).claims()` returns; `fields` override those of `Claims`.

    The evidence is verified once per process, so a call costs microseconds. With `events`, `rtmr3` follows them unless
    `measurements` are given.
    """
    base = _reference()
    if events is not None:
        measurements = {**base.measurements, "rtmr3": event_log.replay(events)}
        base = replace(base, events=events, measurements=MappingProxyType(measurements))
    return replace(base, **fields)


class SoftPlatform:
    """One soft TDX machine with one guest, and the collateral that endorses it.

    Args:
        name: another name is another machine (keys, PPID, serial number).
        status: TCB status that the collateral gives to this machine, one of `STATUSES`.
        debug: the guest is debuggable; `verify` refuses it.
        measurement: MRTD, 48 bytes.
        now: when `claims` verifies.
        issued, lifetime: window of the collateral; default: valid around `now`.
        tcb_date: date of every TCB level in the collateral.
        revoked: the collateral's CRL revokes this machine's PCK certificate.
        label: another label is another root, which nobody pins.
        machine: options of `soft.tdx.platform` for faults inside the quote (`qe_report_data`, `pce_svn`, `fmspc`, ...).
        endorsed_fmspc: FMSPC that the signed TCB info names, when it shall differ from the machine's.
    """

    def __init__(
        self,
        name: str = "soft",
        *,
        status: str = "UpToDate",
        debug: bool = False,
        measurement: bytes = MEASUREMENT,
        now: datetime = NOW,
        issued: datetime | None = None,
        lifetime: timedelta = soft_tdx.LIFETIME,
        tcb_date: datetime | None = None,
        revoked: bool = False,
        label: str = soft_tdx.LABEL,
        machine: Mapping[str, Any] | None = None,
        endorsed_fmspc: str | None = None,
    ) -> None:
        self.now = now
        self.roots = SOFT_ROOTS
        self.machine = soft_tdx.platform(name, status=status, label=label, **(machine or {}))
        self.attester = SoftTdxAttester(measurement, machine=self.machine, debug=debug)
        levels = None
        if tcb_date is not None:
            levels = tuple(replace(level, date=tcb_date.date()) for level in soft_tdx.levels(now.date()))
        document = soft_tdx.collateral(
            now - timedelta(days=1) if issued is None else issued,
            lifetime=lifetime,
            fmspc=self.machine.fmspc if endorsed_fmspc is None else endorsed_fmspc,
            tcb_levels=levels,
            revoked=(self.machine.serial,) if revoked else (),
            label=label,
        )
        self.endorsements = Endorsements((Endorsement("tdx", self.machine.fmspc, document),))

    def run(self, measured: Workload) -> SoftPlatform:
        """Extend the register with the workload event, as a node does before it asks for a key."""
        return self.extend(event_log.WORKLOAD, measured.encode())

    def extend(self, name: str, data: bytes) -> SoftPlatform:
        self.attester.extend(name, data)
        return self

    def evidence(self, bound: Binding | None = None) -> Evidence:
        """Return evidence over `bound` (default: `binding()`)."""
        return self.attester.evidence((binding() if bound is None else bound).report_data())

    def claims(self, bound: Binding | None = None) -> Claims:
        """Return what `verify` finds in `evidence(bound)` at `now`.

        Raises:
            EvidenceError: as `verify`.
        """
        return verify(self.evidence(bound), self.endorsements, self.roots, now=self.now)


@lru_cache(maxsize=1)
def _reference() -> Claims:
    return SoftPlatform().run(workload()).claims()
