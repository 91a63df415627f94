"""Run one phase to its end: mount, confine, run unmodified, seal, register.

    PREPARED -> ADMITTED -> RUNNING -> SEALED -> REGISTERED
        any of them, on a signal, a refusal, out of memory, a full disk, a lost lease -> STOPPED

In STOPPED every process of the jail is dead, mounts are gone, keys are dropped, and the sealed outputs on disk are
exactly what they were before. Every output is checked and sealed before the first one is registered; between SEALED and
REGISTERED the new generations exist on disk but are not the current ones, and if registering is refused they are dropped.
A signal waits while outputs are registered and swapped in, which takes one round trip to the broker for each.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from cloister.broker.client import BrokerClient, Release
from cloister.confine.job import Bind, Job
from cloister.confine.launch import Exit, Running, launch
from cloister.errors import CloisterError, MachineError, PeerError, Reason, TamperedError
from cloister.node.admission import Admission
from cloister.node.lease import LeaseKeeper
from cloister.node.outputs import Target, claimed
from cloister.node.plan import Plan
from cloister.node.progress import read_line
from cloister.node.report import BarLine, Report
from cloister.node.signals import Stops, stop_on_signals
from cloister.node.volumes import mounted
from cloister.node.words import Speaker, readable
from cloister.volume.seal import Sealed

LEASE_LOOK_S: Final = 0.5
"""A lost lease ends the program within this time."""
KEPT_LINES: Final = 40
"""Lines of the program's own words that are kept in memory to explain a failure to who may see its logs."""


@dataclass(frozen=True, slots=True)
class Written:
    """One sealed output: its new name and the receipt (JSON bytes) that makes it the current version."""

    digest: str
    generation: int
    receipt: bytes


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a finished phase left: outputs by asset, the release receipt, seconds by part."""

    outputs: Mapping[str, Written]
    receipt: bytes
    seconds: Mapping[str, float]
    renewals: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Audience:
    """What of the program's words may be shown to whoever sits at this node.

    `metrics`: numbers and counters (see `progress`); `logs`: every line. Both come from the contract's `metrics_to`
    and `leaves`, and only for a party whose key is here.
    """

    metrics: bool = False
    logs: bool = False


def run(
    plan: Plan,
    admission: Admission,
    broker: BrokerClient,
    *,
    report: Report,
    audience: Audience = Audience(),
) -> RunResult:
    """Run the phase and return what it left.

    Raises:
        MachineError: `workload-failed`, `lease-lost`, `interrupted`, `busy`, `disk-full`, `no-mount`, `no-sandbox`.
        TamperedError: an input is not the one that was sealed, before the start or while it was read.
    """
    release = admission.release
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        stops = stack.enter_context(stop_on_signals("nothing was sealed"))
        # locks: a second run on one output is refused before it starts
        targets = {
            asset: stack.enter_context(claimed(path, release.outputs[asset])) for asset, path in plan.writes.items()
        }
        begin = time.perf_counter()
        volumes = stack.enter_context(mounted(plan.reads, release, report))
        seconds["mount"] = time.perf_counter() - begin
        job = job_of(plan, admission, volumes.paths, stdout="pipe", stderr="pipe")
        begin = time.perf_counter()
        running = stack.enter_context(launch(job, admission.prepared.profile, level=admission.prepared.level))
        seconds["jail"] = time.perf_counter() - begin
        keeper = stack.enter_context(
            LeaseKeeper(
                release.lease,
                lambda: broker.renew(release, admission.prepared.attester).lease,
                asked=admission.asked,
                on_lost=lambda error: None,  # `_watch` looks, and kills from the thread that waits
            )
        )
        speaker = stack.enter_context(Speaker.of(broker, release, plan.contract.phase[plan.phase].streams_out))
        begin = time.perf_counter()
        with report.step(f"running {plan.code}") as step:
            ended, metrics, words = _watch(running, keeper, report, audience, plan, speaker)
            speaker.finish()  # its last batch leaves while outputs are sealed
            keeper.check()
            _check_inputs(volumes.faults())
            _check_exit(ended, words, audience, admission)
            seconds["run"] = time.perf_counter() - begin
            step.text = f"ran {plan.code} in sandbox '{plan.sandbox}' at {admission.prepared.level}"
        begin = time.perf_counter()
        outputs = _publish(targets, running, broker, release, report, stops, audience)
        seconds["seal"] = time.perf_counter() - begin
        return RunResult(outputs, release.receipt, seconds, keeper.renewals, metrics)


def job_of(
    plan: Plan, admission: Admission, paths: Mapping[str, Path], *, stdin: Any = "null", stdout: Any, stderr: Any
) -> Job:
    """Return the jail's job: staged files, mounted assets under /data, empty outputs under /out."""
    workload = admission.prepared.workload
    binds = [Bind(source, target) for source, target in admission.prepared.staged.binds]
    binds += [Bind(path, f"/data/{asset}") for asset, path in paths.items()]
    return Job(
        binds=tuple(binds),
        argv=workload.argv,
        env=dict(workload.env),
        cwd=workload.cwd,
        outputs=dict(plan.sizes),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
    )


def _watch(
    running: Running, keeper: LeaseKeeper, report: Report, audience: Audience, plan: Plan, speaker: Speaker
) -> tuple[Exit, dict[str, float], list[str]]:
    """Wait for the end; show what the audience may see. Returns the exit, last metrics, last lines."""
    metrics: dict[str, float] = {}
    words: list[str] = []
    lock = threading.Lock()
    with report.bar(plan.phase, unit="share") as bar:
        readers = [
            threading.Thread(
                target=_listen,
                args=(stream, bar, report, audience, metrics, words, lock, speaker),
                daemon=True,
                name="words",
            )
            for stream in (running.stdout, running.stderr)
            if stream is not None
        ]
        for reader in readers:
            reader.start()
        ended = _ended(running, keeper)
        for reader in readers:
            reader.join(timeout=5)
    return ended, metrics, words


def _ended(running: Running, keeper: LeaseKeeper) -> Exit:
    """Wait for the end of the program, or end it when the lease is lost."""
    while True:
        try:
            return running.wait(LEASE_LOOK_S)
        except TimeoutError:
            if keeper.lost is not None:
                return running.kill()


def _listen(
    stream: IO[bytes],
    bar: BarLine,
    report: Report,
    audience: Audience,
    metrics: dict[str, float],
    words: list[str],
    lock: threading.Lock,
    speaker: Speaker,
) -> None:
    begin = time.monotonic()
    # readline with a limit: a program that prints one endless line fills no memory
    while line := stream.readline(64 * 1024):
        progress = read_line(line)
        with lock:
            words.append(line.decode("utf-8", "replace").rstrip("\n"))
            del words[:-KEPT_LINES]
            if progress is not None:
                metrics.update(progress.metrics)
        speaker.hear(line, progress)
        if audience.logs:
            report.say("│ " + readable(line))
        if progress is not None and audience.metrics and progress.fraction is not None:
            note = " ".join(f"{name} {value:g}" for name, value in progress.metrics.items())
            bar.update(progress.fraction, 1.0, note)
        elif not audience.metrics:
            bar.update(0.0, None, f"{time.monotonic() - begin:.0f} s")


def _check_inputs(faults: list[str]) -> None:
    if faults:
        raise TamperedError(
            "an input failed authentication while the program read it; nothing was sealed",
            code="volume-tampered",
            reasons=[Reason("input", fault, "the bytes that were sealed") for fault in faults],
            hint="get the volume again from its owner; `cloister verify` finds every broken record",
        )


def _check_exit(ended: Exit, words: list[str], audience: Audience, admission: Admission) -> None:
    if ended.ok:
        return
    limits = admission.prepared.profile.limits
    if ended.oom:
        found, hint = "killed: out of memory", f"the sandbox allows {limits.memory_bytes >> 20} MiB"
    elif ended.timed_out:
        found, hint = "killed: out of time", f"the sandbox allows {limits.wall_s} s"
    elif ended.note:
        found, hint = ended.note, ""
    elif ended.signal:
        found, hint = f"killed by signal {ended.signal}", ""
    else:
        found, hint = f"exit status {ended.code}", ""
    if not hint:
        hint = (
            "its last words are above"
            if audience.logs
            else "its words stay inside; a party whom the contract gives logs can read them"
        )
    reasons = [Reason("workload", found, "exit status 0", hint)]
    if audience.logs:
        reasons += [Reason("workload.words", word, "no error") for word in words[-3:] if word.strip()]
    raise MachineError("the program did not succeed; nothing was sealed", code="workload-failed", reasons=reasons)


def _publish(
    targets: Mapping[str, Target],
    running: Running,
    broker: BrokerClient,
    release: Release,
    report: Report,
    stops: Stops,
    audience: Audience,
) -> dict[str, Written]:
    """Check all outputs, seal all of them, then register and swap in one after the other."""
    for asset in targets:
        _check_output(running, asset, audience)
    sealed: dict[str, Sealed] = {}
    for asset, target in targets.items():
        with report.step(f"sealing {asset}") as step, report.bar(f"sealing {asset}") as bar:
            one = sealed[asset] = target.write(running.output_dir(asset), progress=bar.update)
            step.text = f"sealed {asset}, generation {one.generation}: {one.digest[:19]}…"
    outputs: dict[str, Written] = {}
    try:
        with stops.held():
            for asset, target in targets.items():
                outputs[asset] = _register(target, broker, release, asset, sealed[asset])
                stops.left = f"{', '.join(outputs)} had just been sealed and registered"
    except CloisterError as error:
        if outputs:
            error.hint = f"{', '.join(outputs)} had been sealed and registered before; {error.hint}".removesuffix("; ")
        raise
    return outputs


def _check_output(running: Running, asset: str, audience: Audience) -> None:
    # refuses links, devices and too much, before anything is read; details only for who may hear the program's words
    checked = running.output(asset, names=audience.logs)
    if not checked.files:
        raise MachineError(
            f"the program wrote nothing to /out/{asset}; nothing was sealed",
            code="workload-failed",
            reasons=[Reason(f"out.{asset}", "no files", "at least one file")],
            hint=f"pass `/out/{asset}` to the program as its output folder (after `--`)",
        )


def _register(target: Target, broker: BrokerClient, release: Release, asset: str, sealed: Sealed) -> Written:
    target.offer()
    try:
        receipt = broker.register_root(release, asset, sealed.digest, generation=sealed.generation)
    except PeerError as error:  # it may be registered or not: both generations stay until the broker can be asked
        raise PeerError(
            f"the broker did not confirm generation {sealed.generation} of {asset}: {error.message}",
            code=error.code,
            reasons=error.reasons,
            hint="both generations are kept on disk; the next run or `cloister serve` asks the broker which one counts",
        ) from error
    except CloisterError:
        target.refused()
        raise
    target.commit()
    return Written(sealed.digest, sealed.generation, receipt)


def provenance(plan: Plan, admission: Admission, result: RunResult) -> bytes:
    """Return the provenance of the outputs as JSON: outputs <- code, data, parameters, evidence.

    Both receipts in it can be checked offline (`cloister verify`); the text around them is only a reading aid.
    """
    workload = admission.prepared.workload
    document = {
        "outputs": {
            asset: {
                "digest": written.digest,
                "generation": written.generation,
                "receipt": json.loads(written.receipt),
            }
            for asset, written in result.outputs.items()
        },
        "inputs": {asset: admission.release.keys[asset].digest for asset in plan.reads},
        "contract": plan.contract.id,
        "phase": plan.phase,
        "code": {"name": plan.code, "digest": workload.digest, "argv": list(workload.argv)},
        "attester": admission.prepared.attester.name,
        "sandbox": {"profile": plan.sandbox, "level": admission.prepared.level},
        "release": json.loads(result.receipt),
    }
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
