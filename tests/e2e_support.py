"""The whole product for tests: a real broker, five people with homes, small programs, one contract per test.

Programs know no framework: `puppet.py` does what `orders.json` in its sealed data says, so one measured workload behaves in
every way that a test needs; `filter.py` is a model that answers as its sealed `model.json` says. Verbs that must be
processes of their own (`run`, `serve`) are; the others run in this one, which is ten times as fast.

    deal = world.deal({"do": "sleep"})
    done = world.cloud.run(*deal.run())
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from cloister.cli import main as cloister

TIMEOUT_S: Final = 60.0
"""No command of these tests may take longer, however busy the machine is."""
PARTIES: Final = ("hospital", "vendor", "clinic", "cloud", "lab")

_STARTED: Final[list[Child]] = []
"""Every command that a test started; none outlives the session."""

PUPPET: Final = '''\
"""A program that obeys: `orders.json` in its data says what it does, then it writes its output."""
import json, os, sys, time

DATA, OUT = "/data/records", "/out/model"


def main():
    with open(DATA + "/orders.json") as file:
        orders = json.load(file)
    do = orders.get("do", "write")
    if do == "read":
        with open(DATA + "/" + orders["file"], "rb") as file:
            while file.read(1 << 16):
                pass
    if do == "memory":
        kept = [bytearray(b"x" * (1 << 20)) for _ in range(orders["mib"])]
        print(len(kept))
    if do == "line":
        block = "x" * 65536
        for _ in range(400):
            sys.stdout.write(block)
    if do == "bytes":
        sys.stdout.buffer.write(bytes(range(256)) * 64 + b"\\x1b]0;owned\\x07\\n")
        print("loss 0.25 \\u202e evil")
    if do == "link":
        os.symlink("/etc/passwd", OUT + "/link")
    if do == "fifo":
        os.mkfifo(OUT + "/pipe")
    if do == "many":
        for number in range(5000):
            open(OUT + "/%d" % number, "w").close()
    if do == "much":
        with open(OUT + "/much", "wb") as file:
            for _ in range(orders["mib"]):
                file.write(bytes(1 << 20))
    if do != "nothing":
        for name, text in orders.get("give", {"model.json": "{}", "labels.json": '["a", "b"]'}).items():
            with open(OUT + "/" + name, "w") as file:
                file.write(text)
        if "mib" in orders and do == "big":
            with open(OUT + "/big", "wb") as file:
                for _ in range(orders["mib"]):
                    file.write(os.urandom(1 << 20))
    print("epoch 1/2 loss 0.5", flush=True)
    if do == "sleep":
        time.sleep(orders.get("seconds", 120))
    if do == "exit":
        print("secret: the patient is called Bob", file=sys.stderr)
        sys.exit(orders["status"])


main()
'''

FILTER: Final = '''\
"""A model that answers as `model.json` beside its labels says."""
import base64, json, os, sys, time

with open("/data/model/model.json") as file:
    MODEL = json.load(file)


def say(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def main():
    count = 0
    do = MODEL.get("do", "answer")
    if do == "die at start":
        sys.exit(3)
    if do == "deaf":
        time.sleep(120)
    for line in sys.stdin:
        count += 1
        data = base64.b64decode(json.loads(line)["input"])
        word = data.decode("utf-8", "replace").strip()
        if do == "ask":
            do_now = word
        else:
            do_now = do
        if do_now == "garbage":
            say("no JSON\\n")
        elif do_now == "two lines":
            say('{"label": "a"}\\n{"label": "b"}\\n')
        elif do_now == "unknown label":
            say('{"scores": {"Bob": 1.0}}\\n')
        elif do_now == "not a number":
            say('{"scores": {"a": NaN}}\\n')
        elif do_now == "hang":
            time.sleep(120)
        elif do_now == "die":
            os._exit(1)
        elif do_now == "endless":
            while True:
                say("x" * 65536)
        elif do_now == "slow":
            time.sleep(0.7)
            say('{"scores": {"a": 0.25, "b": 0.75}}\\n')
        elif do_now == "count":
            say('{"scores": {"a": %d, "b": 0}}\\n' % count)
        else:
            say('{"scores": {"a": 0.123456789, "b": 0.876543211}}\\n')


main()
'''

CONTRACT: Final = """\
contract = "{name}"
version = 1
expires = 2099-06-30
[party]
hospital = "{hospital}"
vendor = "{vendor}"
clinic = "{clinic}"
cloud = "{cloud}"
lab = "{lab}"
[code]
trainer = {{ owner = "vendor", digest = "{trainer}", sandbox = "{sandbox}" }}
server = {{ owner = "vendor", digest = "{server}", sandbox = "{serve_sandbox}" }}
[data]
records = {{ owner = "hospital", digest = "{records}" }}
{data}[place]
enclave = {{ kind = "tee", accept = {accept} }}
[phase.train]
run = "trainer"
at = "enclave"
read = ["records"]
write = {{ {output} = "hospital" }}
{train}[phase.serve]
run = "server"
at = "enclave"
read = ["model"]
answer = {{ to = ["clinic"], {answer} }}
[change]
default = ["hospital", "vendor"]
"""


@dataclass(frozen=True, slots=True)
class Said:
    """What one command printed and returned."""

    status: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        value = json.loads(self.out)
        assert isinstance(value, dict), self.out
        return value

    @property
    def error(self) -> str:
        """The code of the error in the JSON answer."""
        return str(self.data["error"])

    def expect(self, status: int) -> Said:
        assert self.status == status, f"exit status {self.status}, wanted {status}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err + self.out, self.err
        return self


class Child:
    """A running `cloister` command."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self.popen = popen
        self.pid = popen.pid

    def send(self, number: int) -> None:
        self.popen.send_signal(number)

    def end(self, timeout_s: float = TIMEOUT_S) -> Said:
        """Wait for the end."""
        out, err = self.popen.communicate(timeout=timeout_s)
        return Said(self.popen.returncode, out, err)

    def program(self, word: str = "/app/puppet.py", timeout_s: float = 30.0) -> int:
        """Wait until the program in the jail runs; return its process id here."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for pid in descendants(self.pid):
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                    if len(words) > 2 and words[0] == b"/runtime/venv/bin/python" and word.encode() in words:
                        return pid
            if self.popen.poll() is not None:
                out, err = self.popen.communicate()
                raise AssertionError(f"the command ended with {self.popen.returncode}\n{out}\n{err}")
            time.sleep(0.02)
        raise AssertionError(f"no process runs {word}")


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody with a home."""

    name: str
    home: Path
    environment: Mapping[str, str]

    def call(self, *words: str, as_json: bool = True) -> Said:
        """`cloister WORDS` in this process."""
        out, err = io.StringIO(), io.StringIO()
        with environment(self.environment), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cloister(self._arguments(words, as_json))
        return Said(status, out.getvalue(), err.getvalue())

    def run(self, *words: str, as_json: bool = True, before: str = "", timeout_s: float = TIMEOUT_S) -> Said:
        """`cloister WORDS` as a process; `before` is Python that runs first in it."""
        return self.start(*words, as_json=as_json, before=before).end(timeout_s)

    def start(self, *words: str, as_json: bool = True, before: str = "") -> Child:
        """Start `cloister WORDS` and do not wait for it."""
        program = ["-c", f"{before}\nfrom cloister.cli import entry\nentry()"] if before else ["-m", "cloister"]
        child = Child(
            subprocess.Popen(
                [sys.executable, *program, *self._arguments(words, as_json)],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        _STARTED.append(child)
        return child

    def fingerprint(self) -> str:
        return str(self.call("key", "show").expect(0).data["fingerprint"])

    def _arguments(self, words: Sequence[str], as_json: bool) -> list[str]:
        if not as_json:
            return list(words)
        at = words.index("--") if "--" in words else len(words)
        return [*words[:at], "--json", *words[at:]]


@dataclass(frozen=True, slots=True)
class Deal:
    """One contract with its sealed data; `folder` is the operator's."""

    world: World
    name: str
    file: Path
    folder: Path
    records: Path

    @property
    def model(self) -> Path:
        return self.folder / "model.sealed"

    def run(self, *extra: str, out: Path | None = None, records: Path | None = None) -> list[str]:
        """Arguments of `cloister run` for the train phase."""
        return [
            "run", str(self.world.scripts / "puppet.py"), "--contract", str(self.file),
            "--python", str(self.world.python), "--data", f"records={records or self.records}",
            "--out", f"model={out or self.model}", *extra,
        ]  # fmt: skip

    def serve(self, *extra: str, model: Path | None = None) -> list[str]:
        """Arguments of `cloister serve`."""
        return [
            "serve", str(self.world.scripts / "filter.py"), "--contract", str(self.file),
            "--python", str(self.world.python), "--data", f"model={model or self.model}", *extra,
        ]  # fmt: skip

    def left(self) -> set[str]:
        """Names in the operator's folder, locks left out."""
        return {path.name for path in self.folder.iterdir() if path.suffix != ".lock"}


@dataclass
class World:
    """One broker, five people, two measured programs."""

    folder: Path
    python: Path
    url: str = ""
    digests: dict[str, str] = field(default_factory=dict)
    people: dict[str, Person] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    _count: int = 0

    @property
    def scripts(self) -> Path:
        return self.folder / "scripts"

    @property
    def temporary(self) -> Path:
        """TMPDIR of everybody."""
        return self.folder / "tmp"

    def __getattr__(self, name: str) -> Person:
        if name in PARTIES or name == "stranger":
            return self.people[name]
        raise AttributeError(name)

    def person(self, name: str, **environment: str) -> Person:
        """A person of this world with other settings."""
        one = self.people[name]
        return dataclasses.replace(one, environment={**one.environment, **environment})

    def fresh(self, name: str) -> Path:
        """A new folder."""
        self._count += 1
        path = self.folder / f"{self._count:03d}-{name}"
        path.mkdir()
        return path

    def deal(
        self,
        orders: Mapping[str, Any] | None = None,
        *,
        files: Mapping[str, bytes] | None = None,
        model: Mapping[str, Any] | None = None,
        labels: str | None = '["a", "b"]',
        signers: Sequence[str] = ("hospital", "vendor"),
        **contract: str,
    ) -> Deal:
        """Seal `orders`, write a contract about it and let `signers` sign it.

        `model` is what the trained model will be told to do; `contract` overrides fields of CONTRACT.
        """
        told = dict(orders or {})
        if model is not None:
            told["give"] = {"model.json": json.dumps(dict(model))} | ({} if labels is None else {"labels.json": labels})
        place = self.fresh("deal")
        name = f"deal-{place.name[:3]}"
        source = place / "records"
        source.mkdir()
        (source / "orders.json").write_text(json.dumps(told))
        for path, data in (files or {}).items():
            (source / path).write_bytes(data)
        operator = place / "cloud"
        operator.mkdir()
        sealed = operator / "records.sealed"
        said = self.hospital.call("seal", str(source), "--to", str(sealed), "--as", "records").expect(0)
        fields = {
            "name": name, "sandbox": "offline", "serve_sandbox": "offline", "data": "", "accept": '["simulated"]',
            "output": "model", "train": "", "answer": 'form = "label", budget = 100', **self.fingerprints,
            **self.digests, "records": said.data["digest"], **contract,
        }  # fmt: skip
        file = place / f"{name}.toml"
        file.write_text(CONTRACT.format(**fields))
        for signer in signers:
            self.people[signer].call("sign", str(file)).expect(0)
        return Deal(self, name, file, operator, sealed)

    @contextlib.contextmanager
    def service(self, deal: Deal, *extra: str, before: str = "", train: bool = True) -> Iterator[tuple[str, Child]]:
        """Train the model of `deal`, serve it, yield (address, process); it is stopped with SIGTERM."""
        if train and not deal.model.exists():
            self.cloud.run(*deal.run()).expect(0)
        ready = self.fresh("service") / "ready.json"
        child = self.cloud.start(*deal.serve("--ready-file", str(ready), *extra), before=before)
        try:
            deadline = time.monotonic() + 30
            while not ready.exists():
                if child.popen.poll() is not None or time.monotonic() > deadline:
                    child.popen.kill()
                    raise AssertionError(f"the service did not start: {child.end()}")
                time.sleep(0.02)
            yield json.loads(ready.read_text())["url"], child
        finally:
            if child.popen.poll() is None:
                child.send(signal.SIGTERM)
                try:
                    child.popen.communicate(timeout=20)
                except subprocess.TimeoutExpired:
                    child.popen.kill()
                    child.popen.communicate()
                    raise


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def parents() -> dict[int, int]:
    """Process id -> its parent's, for every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                found[int(entry.name)] = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
    return found


def descendants(pid: int) -> list[int]:
    """Processes below `pid`."""
    table = parents()
    found = [pid]
    for one in found:
        found += [child for child, parent in table.items() if parent == one]
    return found[1:]


def gone(pids: Sequence[int], timeout_s: float = 10.0) -> bool:
    """Whether all of `pids` end within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while any(_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Traces:
    """What a command may not leave behind: mounts of this namespace, entries of its temporary folder."""

    mounts: frozenset[str]
    temporary: frozenset[str]

    def __le__(self, other: Traces) -> bool:
        """Nothing is here that was not there."""
        return self.mounts <= other.mounts and self.temporary <= other.temporary

    @classmethod
    def look(cls, world: World) -> Traces:
        mounts = frozenset(
            line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if "cloister" in line
        )
        return cls(mounts, frozenset(path.name for path in world.temporary.iterdir()))


@contextlib.contextmanager
def no_traces(deal: Deal, expected: set[str]) -> Iterator[None]:
    """Nothing of a run is left: no mount, no temporary folder, and `expected` is all that the operator has."""
    before = Traces.look(deal.world)
    yield
    deadline = time.monotonic() + 10
    while not Traces.look(deal.world) <= before and time.monotonic() < deadline:
        time.sleep(0.05)  # a killed command's helpers notice within moments
    assert Traces.look(deal.world) <= before
    assert deal.left() == expected


def ready_for_runs() -> str:
    """Why runs cannot be tested here, or nothing."""
    from cloister.confine.probe import probe

    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no /dev/fuse"
    level = probe().level
    return "" if level in ("L2", "L3") else f"no full jail here ({level})"


class Broker:
    """`cloister up` as a process that a test can stop, freeze, kill and start again at the same address."""

    def __init__(self, folder: Path, settings: Mapping[str, str], *, lease_s: int = 600) -> None:
        self.folder, self.url = folder, ""
        self._person = Person("broker", folder, {**settings, "CLOISTER_HOME": str(folder)})
        self._lease_s = lease_s
        self._child: Child | None = None

    def start(self, state: str = "state") -> None:
        """Start it with the state folder `state`, at the address it had before."""
        ready = self.folder / "ready.json"
        ready.unlink(missing_ok=True)
        port = self.url.rpartition(":")[2] or "0"
        words = ["--state", str(self.folder / state), "--ready-file", str(ready), "--port", port]
        self._child = self._person.start("up", *words, "--lease", str(self._lease_s))
        deadline = time.monotonic() + 30
        while not ready.exists():
            assert self._child.popen.poll() is None, self._child.end()
            assert time.monotonic() < deadline, "the broker does not start"
            time.sleep(0.02)
        self.url = json.loads(ready.read_text())["url"]

    def send(self, number: int) -> None:
        assert self._child is not None
        self._child.popen.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it with a signal; harmless when it has ended."""
        child, self._child = self._child, None
        if child is not None:
            child.popen.send_signal(signal.SIGCONT)
            child.popen.send_signal(number)
            child.end(20)


@contextlib.contextmanager
def other_broker(world: World, **options: int) -> Iterator[tuple[World, Broker]]:
    """The same people and programs with a broker of their own."""
    folder = world.fresh("broker")
    settings = {name: world.cloud.environment[name] for name in _SETTINGS}
    broker = Broker(folder, settings, **options)
    broker.start()
    people = {
        name: dataclasses.replace(one, environment={**one.environment, "CLOISTER_BROKER": broker.url})
        for name, one in world.people.items()
    }
    try:
        yield (
            dataclasses.replace(world, url=broker.url, people=people, _count=world._count + 1000 * len(_STARTED)),
            broker,
        )
    finally:
        broker.stop()


_SETTINGS: Final = ("CLOISTER_INSECURE_SOFT_TEE", "NO_COLOR", "TMPDIR")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A broker process (`cloister up`), keys, and the two programs measured in a minimal environment."""
    why = ready_for_runs()
    if why:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("world")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    one = World(folder, folder / "venv" / "bin" / "python")
    one.scripts.mkdir()
    one.temporary.mkdir()
    (one.scripts / "puppet.py").write_text(PUPPET)
    (one.scripts / "filter.py").write_text(FILTER)
    settings = dict(zip(_SETTINGS, ("1", "1", str(one.temporary)), strict=True))
    broker = Broker(folder / "broker", settings)
    broker.folder.mkdir()
    try:
        broker.start()
        one.url = broker.url
        for name in (*PARTIES, "stranger"):
            home = folder / name
            one.people[name] = Person(name, home, {**settings, "CLOISTER_HOME": str(home), "CLOISTER_BROKER": one.url})
            said = one.people[name].call("key", "new").expect(0)
            if name in PARTIES:
                one.fingerprints[name] = said.data["fingerprint"]
        for code, script in (("trainer", "puppet.py"), ("server", "filter.py")):
            said = one.vendor.call("measure", str(one.scripts / script), "--python", str(one.python)).expect(0)
            one.digests[code] = said.data["digest"]
        yield one
    finally:
        broker.stop()
        for started in _STARTED:
            started.popen.kill()
            started.popen.communicate()
        shutil.rmtree(folder, ignore_errors=True)
