"""The main job against the same job without any shield: training step, start-up, release, sealing, first answer.

    ./run bench job [--rounds 5] [--epochs 3] [--questions 200] [--only step,answer,release,seal] [--json]

Native and shielded take turns (A B A B ...). Both run the unmodified scripts of examples/images with the same interpreter,
data, seed and OMP_NUM_THREADS; shielded means everything that `cloister run` does for real: a broker process, evidence
(soft TDX), a sealed data set that is mounted, the jail, the sealed and registered output. Nothing is patched in: times
come from the programs' own progress lines and from the lines of `cloister run`, stamped as they arrive.

    step      seconds between two progress lines of one epoch / steps between them; all lines of all rounds
    start     from starting the command to the program's first own line, which it prints after ten steps
    answer    one question over a kept connection, in turns to the service and to a plain HTTP route (bench/_plain.py)
    release   bench/release.py; seal: bench/seal.py with smaller sources

What the node measured and staged before is kept in .cloister/bench, so start-up is warm; the data set's page cache is
cold in every shielded round, because every run mounts anew. One thread by default: more threads than free processors
wait for each other and measure the neighbours.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from demo.job import HERE, PYTHON, STATE, XRAYS

from bench import release, seal
from bench.common import Figure, added, in_turns, note, options_of, ratio, timed
from cloister.attestation.edge.software import measure_package
from cloister.contract.edge import Signer
from cloister.contract.parse import parse
from cloister.serve.client import ServiceClient
from cloister.testkit.broker import RunningBroker, running_broker

FOLDER: Final = STATE / "bench"
SCRIPTS: Final = HERE / "examples" / "images"
RELEASE_MS: Final = 5.0
"""Attest + appraise + release inside a job; bench/release.py aims lower."""
PARTS: Final = ("step", "answer", "release", "seal")

CONTRACT: Final = """\
contract = "bench"
version  = 1
expires  = 2099-01-01
[party]
hospital = "{owner}"
[code]
trainer = {{ owner = "hospital", digest = "{trainer}", sandbox = "offline" }}
server  = {{ owner = "hospital", digest = "{server}", sandbox = "offline" }}
[data]
scans = {{ owner = "hospital", digest = "{scans}" }}
[place]
enclave = {{ kind = "tee", accept = ["simulated"] }}
[phase.train]
run   = "trainer"
at    = "enclave"
read  = ["scans"]
write = {{ detector = "hospital" }}
metrics_to = ["hospital"]
leaves     = ["metrics", "logs"]   # the program's own lines are what is timed
[phase.serve]
run    = "server"
at     = "enclave"
read   = ["detector"]
answer = {{ to = ["hospital"], form = "label", budget = 1_000_000 }}
[change]
default = ["hospital"]
"""

STEP: Final = re.compile(r"epoch (\d+)/\d+ step (\d+)/\d+ ")
"""A progress line of the training script."""

STAGES: Final = (
    (re.compile(r"warning: the broker shows "), "start: interpreter, imports, broker attested"),
    (re.compile(r"warning: this node shows "), "start: contract fetched, plan"),
    (re.compile(r"\S+ measured "), "start: workload measured"),
    (re.compile(r"\S+ staged "), "start: staged copy checked"),
    (re.compile(r"\S+ attested "), "start: level, evidence, release"),
    (re.compile(r"\S+ mounted "), "start: volume opened and mounted"),
    (STEP, "start: jail, program's start"),
    (re.compile(r"\S+ ran "), ""),
    (re.compile(r"\S+ sealed "), "tail: sealed and registered"),
)
"""Lines of `cloister run` in their order, and what ends with each (the first match counts)."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training: seconds since its start. `steps` are seconds per step, `first` the program's first own line."""

    first: float
    total: float
    steps: tuple[float, ...]
    stages: Mapping[str, float]


def read_run(begin: float, lines: Sequence[tuple[float, str]], end: float) -> Run:
    """Return what stamped lines say.

    Raises:
        ValueError: the program printed no progress.
    """
    own = [(at, match) for at, line in lines if (match := STEP.search(line))]
    if not own:
        raise ValueError("the program printed no progress line:\n" + "\n".join(line for _, line in lines[-10:]))
    steps = []
    for (before, one), (at, two) in pairwise(own):
        count = int(two[2]) - int(one[2])
        if one[1] == two[1] and count >= 10:  # one epoch; its last, shorter stretch is left out
            steps.append((at - before) / count)
    stages: dict[str, float] = {}
    last = begin
    for pattern, name in STAGES:
        found = next((at for at, line in lines if pattern.search(line)), None)
        if found is not None:
            if name:
                stages[name] = found - last
            last = found
    stages["tail: unmount, receipts, exit"] = end - last
    return Run(own[0][0] - begin, end - begin, tuple(steps), stages)


def stamped(command: Sequence[str], *, environment: Mapping[str, str], stream: str, cwd: Path) -> Run:
    """Run `command`, stamp each line of `stream` ("stdout" or "stderr") as it arrives.

    Raises:
        RuntimeError: it failed.
    """
    lines: list[tuple[float, str]] = []
    begin = time.perf_counter()
    with subprocess.Popen(
        command,
        env=dict(environment),
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE if stream == "stdout" else subprocess.DEVNULL,
        stderr=subprocess.PIPE if stream == "stderr" else subprocess.DEVNULL,
    ) as child:
        pipe = child.stdout if stream == "stdout" else child.stderr
        for line in pipe or ():
            lines.append((time.perf_counter(), line.rstrip("\n")))  # noqa: PERF401  # stamped as it arrives
        status = child.wait()
    end = time.perf_counter()
    if status:
        raise RuntimeError(f"{command[:4]} ended with status {status}:\n" + "\n".join(line for _, line in lines[-20:]))
    return read_run(begin, lines, end)


class World:
    """A broker, one party who owns everything, sealed data, an active contract: what both halves need."""

    def __init__(self, broker: RunningBroker, folder: Path, threads: int, epochs: int) -> None:
        self.broker = broker
        self.folder = folder
        self.threads = threads
        self.home = folder / "home"
        self.data = folder / "files"
        self.native_model = folder / "native"
        self.environment = {
            **os.environ,
            "CLOISTER_HOME": str(self.home),
            "CLOISTER_BROKER": broker.url,
            "CLOISTER_INSECURE_SOFT_TEE": "1",
            "NO_COLOR": "1",
        }
        self.train_args = ["--epochs", str(epochs), "--seed", "7"]
        self.contract = folder / "bench.toml"

    def cloister(self, *words: str) -> dict[str, Any]:
        """Run one command of the command line and return its JSON.

        Raises:
            RuntimeError: it failed.
        """
        at = words.index("--") if "--" in words else len(words)
        command = [sys.executable, "-m", "cloister", *words[:at], "--json", *words[at:]]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"cloister {words[0]} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
        found = json.loads(done.stdout)
        return found if isinstance(found, dict) else {}

    @property
    def jail_args(self) -> list[str]:
        return ["--data", "/data/scans", "--out", "/out/detector", *self.train_args]

    @property
    def node_options(self) -> list[str]:
        return ["--python", str(PYTHON), "--env", f"OMP_NUM_THREADS={self.threads}"]

    def prepare(self) -> None:
        """Keys, data, contract: once, unmeasured."""
        self.home.mkdir(parents=True, exist_ok=True)
        which = "xrays" if XRAYS.is_file() else "digits"
        subprocess.run([PYTHON, HERE / "demo" / "data.py", which, "--to", self.data], check=True)
        owner = self.cloister("key", "new")["fingerprint"]
        volume = self.folder / "scans.sealed"
        scans = self.cloister("seal", str(self.data / "train"), "--to", str(volume), "--as", "scans")["digest"]
        trainer = self._measure("train.py", self.jail_args)
        server = self._measure("predict.py", ["--model", "/data/detector"])
        self.contract.write_text(CONTRACT.format(owner=owner, scans=scans, trainer=trainer, server=server))
        self.cloister("sign", str(self.contract))

    def _measure(self, script: str, arguments: list[str]) -> str:
        return str(self.cloister("measure", str(SCRIPTS / script), *self.node_options, "--", *arguments)["digest"])

    def native(self) -> Run:
        shutil.rmtree(self.native_model, ignore_errors=True)
        command = [str(PYTHON), str(SCRIPTS / "train.py"), "--data", str(self.data / "train")]
        command += ["--out", str(self.native_model), *self.train_args]
        return stamped(command, environment=self._plain_environment(), stream="stdout", cwd=self.folder)

    def shielded(self) -> Run:
        command = [sys.executable, "-m", "cloister", "run", str(SCRIPTS / "train.py"), "--contract", str(self.contract)]
        command += [*self.node_options, "--data", f"scans={self.folder / 'scans.sealed'}"]
        command += ["--out", f"detector={self.folder / 'detector.sealed'}", "--", *self.jail_args]
        return stamped(command, environment=self.environment, stream="stderr", cwd=HERE)

    def _plain_environment(self) -> dict[str, str]:
        return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "OMP_NUM_THREADS": str(self.threads)}

    @contextmanager
    def service(self) -> Iterator[Callable[[bytes], str]]:
        """Serve the sealed model; yields a consumer's question (input -> label) over a kept connection."""
        ready = self.folder / "service.json"
        command = [sys.executable, "-m", "cloister", "serve", str(SCRIPTS / "predict.py"), "--contract"]
        command += [str(self.contract), *self.node_options, "--data", f"detector={self.folder / 'detector.sealed'}"]
        command += ["--ready-file", str(ready), "--", "--model", "/data/detector"]
        with _process(command, self.environment, ready, cwd=HERE):
            contract = parse(self.contract.read_bytes(), name=self.contract.name)
            with ServiceClient.connect(
                json.loads(ready.read_text())["url"],
                contract,
                party="hospital",
                sign=Signer.load(self.home / "id_ed25519").sign,
                trust=self.broker.trust(),
                broker=self.broker.client(),
            ) as client:
                yield lambda data: str(client.ask(data).said["label"])

    @contextmanager
    def plain(self) -> Iterator[Callable[[bytes], str]]:
        """Serve the same model without a shield; yields a question (input -> label) over a kept connection."""
        port = self.folder / "plain.port"
        command = [sys.executable, "-m", "bench._plain", str(port)]
        command += [str(PYTHON), str(SCRIPTS / "predict.py"), "--model", str(self.native_model)]
        environment = {**os.environ, **self._plain_environment()}
        with _process(command, environment, port, cwd=HERE):
            connection = http.client.HTTPConnection("127.0.0.1", int(port.read_text()), timeout=60)
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def ask(data: bytes) -> str:
                connection.request("POST", "/ask", body=data)
                scores: dict[str, float] = json.loads(connection.getresponse().read())["scores"]
                return max(scores, key=scores.__getitem__)

            try:
                yield ask
            finally:
                connection.close()


@contextmanager
def _process(command: Sequence[str], environment: Mapping[str, str], ready: Path, *, cwd: Path) -> Iterator[None]:
    ready.unlink(missing_ok=True)
    log = ready.with_suffix(".log")
    with log.open("wb") as sink:
        child = subprocess.Popen(command, env=dict(environment), cwd=cwd, stdout=sink, stderr=sink)
    try:
        deadline = time.monotonic() + 120
        while not ready.exists() or not ready.read_text():
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[2:5]} did not start:\n{log.read_text()}")
            time.sleep(0.02)
        yield
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def training(world: World, rounds: int) -> Iterator[Figure]:
    """Steps and start-up of `rounds` trainings on each side, after one of each that is not counted."""
    runs: dict[str, list[Run]] = {"native": [], "shielded": []}
    for number in range(rounds + 1):
        for side, run in (("native", world.native), ("shielded", world.shielded)):
            found = run()
            note(f"round {number}: {side} {found.total:.2f} s, first line after {found.first:.2f} s")
            if number:
                runs[side].append(found)
    steps = {side: [step * 1e3 for run in found for step in run.steps] for side, found in runs.items()}
    yield ratio("training step, shielded / native", steps, "ms", target=1.02)
    quiet = {side: [sorted(values)[len(values) // 10]] for side, values in steps.items()}
    yield ratio("training step, fastest tenth of the lines", quiet, "ms")
    firsts = {side: [run.first for run in found] for side, found in runs.items()}
    yield added("start-up added, warm measurement", firsts, "s", target=1.5)
    native_start = statistics.median(firsts["native"])
    for _, name in STAGES:
        values = [run.stages[name] for run in runs["shielded"] if name in run.stages]
        if name and values:
            value = statistics.median(values)
            if name.endswith("program's start"):
                yield Figure(f"  {name} beyond native", value - native_start, "s")
            else:
                yield Figure(f"  {name}", value, "s")
    tail = [run.stages["tail: unmount, receipts, exit"] for run in runs["shielded"]]
    yield Figure("  tail: unmount, receipts, exit", statistics.median(tail), "s")
    totals = {side: [run.total for run in found] for side, found in runs.items()}
    yield ratio("whole job", totals, "s")


def answers(world: World, count: int) -> Iterator[Figure]:
    """One question at a time, in turns, over a kept connection on both sides."""
    questions = [path.read_bytes() for path in sorted((world.data / "questions").iterdir())]
    with ExitStack() as stack:
        plain, shielded = stack.enter_context(world.plain()), stack.enter_context(world.service())
        for question in questions[:20]:
            said = plain(question), shielded(question)
            if said[0] != said[1]:
                raise RuntimeError(f"the two sides answer differently: {said}")
        turn = {"native": iter(range(count + 1)), "shielded": iter(range(count + 1))}
        found = in_turns(
            count,
            {
                "native": lambda: timed(lambda: plain(questions[next(turn["native"]) % len(questions)])),
                "shielded": lambda: timed(lambda: shielded(questions[next(turn["shielded"]) % len(questions)])),
            },
        )
    yield added("answer latency added, p50", found, "ms", target=5.0)
    yield Figure("answer latency, shielded, p99", sorted(found["shielded"])[int(count * 0.99)], "ms")


def fresh_folder() -> Path:
    """Return a fresh folder; only what the node measured and staged is kept."""
    kept, aside = FOLDER / "home", STATE / "bench-kept"
    shutil.rmtree(aside, ignore_errors=True)
    for name in ("node", "measured"):
        if (kept / name).is_dir():
            aside.mkdir(parents=True, exist_ok=True)
            (kept / name).rename(aside / name)
    shutil.rmtree(FOLDER, ignore_errors=True)
    kept.mkdir(parents=True)
    if aside.is_dir():
        for path in aside.iterdir():
            path.rename(kept / path.name)
        aside.rmdir()
    return FOLDER


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="measured trainings on each side")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of both sides")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")


def figures(options: argparse.Namespace) -> Iterator[Figure]:
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"no parts {sorted(unknown)}; there are {', '.join(PARTS)}")
    if {"step", "answer"} & set(parts):
        folder = fresh_folder()
        measure_package()
        with running_broker(folder / "broker") as broker:
            world = World(broker, folder, options.threads, options.epochs)
            world.prepare()
            if "step" in parts:
                yield from training(world, options.rounds)
            if "answer" in parts:
                if "step" not in parts:
                    world.native()
                    world.shielded()
                yield from answers(world, options.questions)
    if "release" in parts:
        for figure in release.figures(options_of(release)):
            yield replace(figure, target=RELEASE_MS if figure.name == "release warm p50" else None)
    if "seal" in parts:
        yield from seal.figures(options_of(seal, size_mb=256, files=5000, rounds=3))
