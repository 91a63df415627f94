"""From a script on this machine to keys in this process: measure, extend, attest, get the release.

The order is the security argument; nothing secret exists before the last step:

  1 measure   interpreter, packages, native libraries, scripts, arguments, environment -> one digest
  2 stage     a private copy of exactly these files, which is all that the jail will see
  3 confine   the sandbox profile that the contract names, at the best level of this machine
  4 extend    digest, profile and level go into the platform's runtime register: no way back on this TEE
  5 attest    HPKE key pair in memory, nonce, evidence over the binding, release sealed to that key

Files, clock and sockets are behind the arguments; what is decided here is only the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloister.attestation.edge.attester import Attester
from cloister.attestation.events import WORKLOAD
from cloister.attestation.events import Workload as WorkloadEvent
from cloister.broker.client import BrokerClient, Release
from cloister.confine.launch import Level
from cloister.confine.probe import probe
from cloister.confine.profile import NAMES as PROFILES
from cloister.confine.profile import Profile, profile
from cloister.crypto.keys import Secret
from cloister.errors import InputError, MachineError, Reason
from cloister.node.lease import boot_time
from cloister.node.plan import Plan
from cloister.node.report import Report
from cloister.node.workload import Staged, Workload, WorkloadSpec, measure, stage
from cloister.node.workload.edge.bootkey import in_memory


@dataclass(frozen=True, slots=True)
class Store:
    """Where a node keeps what it measured and staged, and the key that authenticates it."""

    root: Path
    mac_key: Secret | None = None
    """None means a key that lives as long as this boot (`workload.edge.bootkey`)."""

    @property
    def cache(self) -> Path:
        return self.root / "measured"

    @property
    def staged(self) -> Path:
        return self.root / "staged"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A measured, staged and registered workload: steps 1 to 4."""

    workload: Workload
    staged: Staged
    profile: Profile
    level: Level
    attester: Attester


@dataclass(frozen=True, slots=True)
class Admission:
    """Everything that a phase needs to start: step 5 on top of `prepared`."""

    prepared: Prepared
    release: Release
    asked: float
    """`lease.boot_time()` when the release was asked for: its lease counts from here."""


def prepare(
    plan: Plan,
    spec: WorkloadSpec,
    attester: Attester,
    *,
    store: Store,
    report: Report,
    level: Level | None = None,
    expected: Workload | None = None,
) -> Prepared:
    """Run steps 1 to 4 and return what may be attested.

    `level` names a confinement level that the caller insists on or accepts (default: the best of this machine).
    `expected` is the workload that the contract's author measured; it only serves to explain a difference.

    Raises:
        InputError: the environment or the script cannot be measured, or the sandbox name is not one that runs here.
        MachineError: no confinement level that is acceptable (code `no-sandbox`).
    """
    if not attester.name.startswith("soft") and not in_memory(store.root):
        raise MachineError(
            "the node's store lies on a disk that the machine's operator can change while a program runs from it",
            reasons=[Reason("node.store", str(store.root), "a folder on a tmpfs, which is memory of the TEE")],
            hint=f"mount one: mount -t tmpfs -o mode=0700,size=4g cloister {store.root}",
        )
    with report.step("measuring the workload") as step, report.bar("measuring") as bar:  # 1
        workload = measure(spec, cache_dir=store.cache, mac_key=store.mac_key, progress=bar.update)
        step.text = f"measured {spec.script.name}: {workload.digest[:19]}…"
    if workload.digest != plan.digest:
        _explain_difference(plan, workload, expected, report)
    with report.step("staging the workload") as step, report.bar("staging") as bar:  # 2
        staged = stage(workload, spec, store=store.staged, mac_key=store.mac_key, progress=bar.update)
        step.text = f"staged exactly what was measured, {staged.compiled} modules compiled"
    if plan.sandbox not in PROFILES:  # 3
        raise InputError(
            f"code '{plan.code}' wants sandbox '{plan.sandbox}', which this node does not run",
            reasons=[Reason(f"code.{plan.code}.sandbox", plan.sandbox, " or ".join(PROFILES))],
            hint="ask the contract's parties for a sandbox that confines the code",
        )
    chosen = profile(plan.sandbox)
    reached = level or _best_level()
    event = WorkloadEvent(workload.digest, plan.sandbox, chosen.digest(), reached)
    attester.extend(WORKLOAD, event.encode())  # 4
    return Prepared(workload, staged, chosen, reached, attester)


def admit(plan: Plan, prepared: Prepared, broker: BrokerClient, report: Report) -> Admission:
    """Step 5: prove it to the broker and return the keys.

    Raises:
        DeniedError, EvidenceError: the broker's reasons.
        PeerError: the broker is unreachable or was replaced.
    """
    with report.step("attesting") as step:
        asked = boot_time()
        release = broker.release(
            plan.contract.id,
            plan.phase,
            attester=prepared.attester,
            reads=sorted(plan.reads),
            writes=sorted(plan.writes),
        )
        names = ", ".join([*plan.reads, *plan.writes]) or "no assets"
        step.text = f"attested as {prepared.attester.name} at {prepared.level}; keys of {names} released"
    return Admission(prepared, release, asked)


def _best_level() -> Level:
    """Return the best confinement level of this machine, or say what is missing for one."""
    seen = probe()
    if seen.level == "L0":
        raise MachineError(
            "this machine cannot confine a program",
            code="no-sandbox",
            reasons=seen.missing or [Reason("sandbox.level", "L0", "L2, or L1 where the data owners accept it")],
            hint="`cloister doctor` shows the whole machine",
        )
    return seen.level


def _explain_difference(plan: Plan, workload: Workload, expected: Workload | None, report: Report) -> None:
    """Say early what the broker will refuse; the broker decides, so this does not stop anything."""
    report.warn(
        f"phase.{plan.phase}.run: the contract wants '{plan.code}' {plan.digest[:19]}…, this is {workload.digest[:19]}…"
    )
    if expected is not None and expected.digest == plan.digest:
        from cloister.node.workload import diff

        for line in diff(expected, workload):
            report.say(f"  {line}")
    elif expected is None:
        report.say("  `--expected FILE` (from the contract's author) shows what differs")
