"""Soft TEEs for tests: evidence, collateral, claims and policies with one line each, at a fixed time.

    platform = SoftPlatform(kind="sev-snp", gpus=("gpu0",))
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
from cloister.attestation.edge import soft as soft_edge
from cloister.attestation.edge.attester import Attester, SoftTdxAttester, attest
from cloister.attestation.edge.collateral import soft_collateral
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.events import Workload
from cloister.attestation.roots import Roots
from cloister.attestation.soft import cca as soft_cca
from cloister.attestation.soft import nitro as soft_nitro
from cloister.attestation.soft import nvidia as soft_nvidia
from cloister.attestation.soft import sgx as soft_sgx
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.soft import tpm as soft_tpm
from cloister.attestation.types import Claims, Event, Evidence, Policy
from cloister.attestation.verify import verify
from cloister.confine.profile import profile

__all__ = [
    "KINDS",
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
"""What every builder here measures, 48 bytes: MRTD of `tdx`, and `SoftPlatform.launch` of the others."""
KINDS: Final = ("tdx", "sgx", "sev-snp", "nitro", "cca", "tpm", "azure-snp", "azure-tdx")
"""Every hardware that a soft platform plays."""
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
    """One soft machine with one guest, perhaps with GPUs, and the collateral that endorses it.

    Args:
        name: another name is another machine (keys, ids).
        kind: one of `KINDS`.
        status: TCB status that the collateral gives to this machine, one of `STATUSES`; `tdx` and `sgx` only.
        debug: the guest is debuggable; a TPM has no such mode.
        measurement: 48 bytes; `launch` is what a verifier finds of it.
        now: when `claims` verifies.
        issued, lifetime: window of the collateral; default: valid around `now`.
        tcb_date: date of every TCB level in the collateral; `tdx` and `sgx` only.
        revoked: the collateral revokes what it can of this machine: its PCK certificate, AMD's ASK, the enclave's leaf, the AK.
        label: another label is another root, which nobody pins. Each kind has one of its own.
        machine: options of the generator in `attestation.soft` for faults inside the evidence.
        endorsed_fmspc: FMSPC that the signed TCB info names, when it shall differ from the machine's; `tdx` and `sgx` only.
        gpus: GPUs beside the CPU, by name; with collateral for each.
        debug_gpu: those GPUs are open for debugging.

    Raises:
        ValueError: an option that this kind does not have.
    """

    def __init__(
        self,
        name: str = "soft",
        *,
        kind: str = "tdx",
        status: str = "UpToDate",
        debug: bool = False,
        measurement: bytes = MEASUREMENT,
        now: datetime = NOW,
        issued: datetime | None = None,
        lifetime: timedelta | None = None,
        tcb_date: datetime | None = None,
        revoked: bool = False,
        label: str | None = None,
        machine: Mapping[str, Any] | None = None,
        endorsed_fmspc: str | None = None,
        gpus: tuple[str, ...] = (),
        debug_gpu: bool = False,
    ) -> None:
        self.kind, self.now, self.roots = kind, now, SOFT_ROOTS
        made = now - timedelta(days=1) if issued is None else issued
        window: dict[str, Any] = {} if lifetime is None else {"lifetime": lifetime}
        root: dict[str, Any] = {} if label is None else {"label": label}
        options = {**root, **(machine or {})}
        intel_only = {"status": status != "UpToDate", "tcb_date": tcb_date, "endorsed_fmspc": endorsed_fmspc}
        if kind not in ("tdx", "sgx") and any(intel_only.values()):
            raise ValueError(f"{kind} has no {', '.join(name for name, given in intel_only.items() if given)}")
        # of these only a Blackwell's certificate says that it is open
        cards = tuple(
            soft_nvidia.gpu(each, arch="BLACKWELL" if debug_gpu else "HOPPER", debug=debug_gpu) for each in gpus
        )
        beside = tuple(soft_edge.SoftGpuAttester(machine=card) for card in cards)
        self.machine: Any = None
        self.attester: Attester
        endorsements = Endorsements()
        match kind:
            case "tdx" | "sgx":
                intel = soft_tdx if kind == "tdx" else soft_sgx
                self.machine = intel.platform(name, status=status, **options)
                attester = SoftTdxAttester if kind == "tdx" else soft_edge.SoftSgxAttester
                self.attester = attester(measurement, machine=self.machine, debug=debug, devices=beside)
                levels = None
                if tcb_date is not None:
                    levels = tuple(replace(level, date=tcb_date.date()) for level in soft_tdx.levels(now.date()))
                document = intel.collateral(
                    made,
                    fmspc=self.machine.fmspc if endorsed_fmspc is None else endorsed_fmspc,
                    tcb_levels=levels,
                    revoked=(self.machine.serial,) if revoked else (),
                    **window,
                    **root,
                )
                endorsements = Endorsements((Endorsement(kind, self.machine.fmspc, document),))
            case "sev-snp":
                self.machine = soft_snp.machine(name, **options)
                self.attester = soft_edge.SoftSnpAttester(
                    measurement, machine=self.machine, debug=debug, devices=beside
                )
                endorsements = _all(soft_snp.endorsements(made, revoked=("ask",) if revoked else (), **window, **root))
            case "nitro":
                if label is not None or machine:
                    raise ValueError("nitro has no label and no machine here; `soft.nitro` has")
                leaf = soft_nitro.enclave(
                    name, issued=now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=1)
                )
                self.attester = soft_edge.SoftNitroAttester(
                    measurement, machine=name, debug=debug, clock=lambda: now, devices=beside
                )
                serials = (leaf.serial,) if revoked else ()
                endorsements = soft_nitro.endorsements(made, revoked=serials, **window)
            case "cca":
                if revoked:
                    raise ValueError("cca has nothing to revoke")
                self.machine = soft_cca.platform(name, **options)
                self.attester = soft_edge.SoftCcaAttester(
                    measurement, machine=self.machine, debug=debug, devices=beside
                )
                endorsements = soft_cca.endorsements(made, name=name, **root)
            case "tpm":
                if debug:
                    raise ValueError("a TPM has no debug mode")
                self.machine = soft_tpm.machine(name, **options)
                self.attester = soft_edge.SoftTpmAttester(measurement, machine=self.machine, devices=beside)
                serials = (self.machine.serial,) if revoked else ()
                endorsements = _all(soft_tpm.endorsements(made, revoked=serials, **window, **root))
            case "azure-snp" | "azure-tdx":
                if name != "soft" or options or revoked or issued or lifetime:
                    raise ValueError(f"{kind} is one soft machine here; `soft.azure` makes others")
                which: Any = kind
                self.attester = soft_edge.SoftAzureAttester(measurement, kind=which, debug=debug, devices=beside)
                endorsements = soft_collateral(now, "sev-snp", "tdx")
            case _:
                raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
        if cards:
            endorsements = endorsements | soft_nvidia.endorsements(now - timedelta(hours=1), cards)
        self.endorsements = endorsements

    @property
    def launch(self) -> bytes:
        """The launch measurement that a verifier finds."""
        return bytes(getattr(self.attester, "launch"))  # noqa: B009  # of soft attesters, not of the protocol

    def run(self, measured: Workload) -> SoftPlatform:
        """Extend the register with the workload event, as a node does before it asks for a key."""
        return self.extend(event_log.WORKLOAD, measured.encode())

    def extend(self, name: str, data: bytes) -> SoftPlatform:
        self.attester.extend(name, data)
        return self

    def evidence(self, bound: Binding | None = None) -> Evidence:
        """Return evidence of the CPU and its GPUs over `bound` (default: `binding()`)."""
        return attest(self.attester, binding() if bound is None else bound)

    def claims(self, bound: Binding | None = None) -> Claims:
        """Return what `verify` finds in `evidence(bound)` at `now`.

        Raises:
            EvidenceError: as `verify`.
        """
        return verify(self.evidence(bound), self.endorsements, self.roots, now=self.now)


def _all(items: tuple[Endorsement, ...] | Endorsements) -> Endorsements:
    return items if isinstance(items, Endorsements) else Endorsements(items)


@lru_cache(maxsize=1)
def _reference() -> Claims:
    return SoftPlatform().run(workload()).claims()
