"""Chapter 6 of the story: what must fail, fails, and says why. Every attack is tried for real on the running broker.

The first half uses the command line, as a careless or curious operator would; the second half is an attacker who writes
his own programs: he speaks the broker's protocol and makes his own (soft) evidence.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister.attestation.edge.attester import SoftTdxAttester
from cloister.attestation.edge.software import measure_package
from cloister.attestation.events import WORKLOAD, Workload
from cloister.attestation.evidence import encode as encode_evidence
from cloister.attestation.roots import Roots
from cloister.broker import wire
from cloister.broker.client import BrokerClient, Trust
from cloister.cli.ui import human_bytes
from cloister.confine.profile import profile
from cloister.crypto import hpke
from cloister.errors import CloisterError
from demo.story import BrokenStoryError

if TYPE_CHECKING:
    from demo.job import Job


@contextlib.contextmanager
def second_generation(job: Job, file: Path) -> Iterator[Callable[[], object]]:
    """Keep the first model and train again beside what follows; yields a function that waits for generation 2."""
    shutil.copytree(job.volume("detector"), _first(job))
    with job.party("cloud").beside(
        *job.train_command(file), show=["run", "… once more, beside what follows: generation 2, for chapter 6"]
    ) as trained:
        yield trained


def play(job: Job, file: Path, trained: Callable[[], object]) -> None:
    """Try everything; a single success ends the story. `trained` waits for `second_generation`."""
    with missing_signature(job, file) as refused:
        changed_script(job, file)
        own_programs(job)
        refused()
    trained()
    with flipped_byte(job, file) as refused:
        old_model(job, file)
        refused()
    operators_view(job)


def _first(job: Job) -> Path:
    return job.folder / "cloud" / "first.sealed"


def changed_script(job: Job, file: Path) -> None:
    """The operator adds one line to the vendor's script."""
    folder = job.folder / "cloud" / "changed"
    shutil.copytree(job.scripts, folder, ignore=shutil.ignore_patterns("__pycache__"))
    script = folder / "train.py"
    script.write_text(script.read_text() + "\nprint(open('/data/scans').read())\n")
    said = job.party("cloud").run(
        *job.train_command(file, script=script), status=3, show=["run", "changed/train.py", "…"]
    )
    _show(job, "a changed script", said.data)
    why = job.party("cloud").call("why", said.data["denial_id"], as_json=False)
    for line in why.out.splitlines()[:3]:
        job.story.line("    " + line)


@contextlib.contextmanager
def missing_signature(job: Job, file: Path) -> Iterator[Callable[[], None]]:
    """A second contract, signed by the vendor alone, about the hospital's data; yields a function that waits."""
    other = job.folder / "alone.toml"
    other.write_text(file.read_text().replace(f'contract = "{job.which}"', 'contract = "alone"'))
    job.party("vendor").call("sign", str(other))
    command = job.train_command(other, out=job.folder / "cloud" / "alone.sealed")
    with job.party("cloud").beside(
        *command, status=5, show=["run", "train.py", "--contract", "alone.toml", "…"]
    ) as ended:
        yield lambda: _show(job, "a contract that its data owner never signed", ended().data)


def own_programs(job: Job) -> None:
    """An attacker with his own evidence and his own client."""
    client = BrokerClient.connect(
        job.environment["CLOISTER_BROKER"], trust=Trust(roots=Roots(soft=True), allow_soft=True), memory=None
    )
    contract = client.contract_status(job.which).contract
    genuine = measure_package()

    def attester(measurement: bytes = genuine, code: str = "server", *, debug: bool = False) -> SoftTdxAttester:
        one = SoftTdxAttester(measurement, debug=debug)
        one.extend(WORKLOAD, Workload(job.digests[code], "offline", profile("offline").digest(), "L2").encode())
        return one

    def ask(phase: str, asset: str, tee: SoftTdxAttester) -> Callable[[], object]:
        return lambda: client.release(contract, phase, attester=tee, reads=[asset])

    _refused(job, "a serve worker that asks for the training data", ask("serve", "scans", attester()))
    _refused(job, "node software that nobody vouched for", ask("serve", "detector", attester(b"\x13" * 48)))
    _refused(job, "a debuggable TEE", ask("serve", "detector", attester(debug=True)))
    _refused(job, "a recorded request, sent again", _replayed(client, contract, attester(code="trainer")))
    client.close()


def _replayed(client: BrokerClient, contract: str, tee: SoftTdxAttester) -> Callable[[], object]:
    """A genuine release, and the same bytes once more: the nonce was used."""
    pair = hpke.KeyPair.generate()
    ask = wire.ReleaseAsk(contract, "train", ("scans",), ())
    binding = client._binding("release", pair.public, contract, "train", ask.hashed())
    evidence = encode_evidence(tee.evidence(binding.report_data()))
    body = wire.ReleaseRequest(ask, binding.nonce, pair.public, evidence).encode()
    client._exchange("POST", "release", body)
    return lambda: client._exchange("POST", "release", body)


@contextlib.contextmanager
def flipped_byte(job: Job, file: Path) -> Iterator[Callable[[], None]]:
    """One bit of the sealed scans changes on the cloud's disk; yields a function that waits for the refusal."""
    copy, out = job.folder / "cloud" / "flipped.sealed", job.folder / "cloud" / "flipped-out.sealed"
    shutil.copytree(job.volume("scans"), copy)
    shutil.copytree(job.volume("detector"), out)
    segment = copy / "data" / "00000000"
    with segment.open("r+b") as data:
        data.seek(70_000)
        byte = data.read(1)[0]
        data.seek(70_000)
        data.write(bytes([byte ^ 1]))
    command = job.train_command(file, scans=copy, out=out)
    with job.party("cloud").beside(*command, status=1, show=["run", "… with one bit flipped"]) as ended:
        yield lambda: _show(job, "a flipped bit in the sealed scans", ended().data)


def old_model(job: Job, file: Path) -> None:
    """The cloud kept the first model when it trained again, and puts it back."""
    place = job.volume("detector")
    shutil.rmtree(place)
    _first(job).rename(place)
    said = job.party("cloud").run(
        "serve", str(job.scripts / "predict.py"), "--contract", str(file), *job.runtime,
        "--data", f"detector={place}", "--", *job.serve_args,
        status=1, show=["serve", "… with the first model put back"],
    )  # fmt: skip
    _show(job, "an old version of the model", said.data)


def operators_view(job: Job) -> None:
    """Search everything the cloud can read for anything that it must not know."""
    places = [job.folder / "cloud", job.folder / "broker"]
    secrets = list(_secrets(job))
    found, files, size = _search(places, secrets)
    if found:
        raise BrokenStoryError(f"the operator found plaintext: {found[:5]}")
    control, _, _ = _search([job.folder / "hospital", job.folder / "native"], secrets)
    if len({name for name, _ in control}) < len(secrets):
        raise BrokenStoryError("the search itself is broken: it does not find everything where it is")
    job.story.good(
        f"operator's view: searched {files} files, {human_bytes(size)}, environments and command lines of all processes for "
        f"{len(secrets)} samples (images, file names, weights, keys): 0 found; the same search at the hospital finds all"
    )


def _secrets(job: Job) -> Iterable[tuple[str, bytes]]:
    """Samples of what only the hospital may have: pieces of its files, names, the model, its keys."""
    training = sorted(path for path in (job.data / "train").rglob("*") if path.is_file())
    for path in training[:: max(len(training) // 40, 1)]:
        data = path.read_bytes()
        middle = len(data) // 2
        yield f"content of {path.name}", data[middle - 24 : middle + 24]
    model = (job.folder / "native" / "model.safetensors").read_bytes()
    for offset in range(len(model) // 4, len(model), len(model) // 4):
        yield f"weights at {offset}", model[offset : offset + 32]
    for path in sorted((job.folder / "hospital" / "keys").glob("*.key")):
        yield f"volume key {path.name[:8]}", path.read_bytes()[path.read_bytes().index(b'"key":"') + 7 :][:64]


def _search(places: list[Path], secrets: list[tuple[str, bytes]]) -> tuple[list[tuple[str, str]], int, int]:
    found: list[tuple[str, str]] = []
    files = size = 0
    for path in _readable(places):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        files += 1
        size += len(data)
        found += [(name, str(path)) for name, sample in secrets if sample in data]
    return found, files, size


def _readable(places: list[Path]) -> Iterable[Path]:
    skip = {"node"}  # the measured runtime: a gigabyte of public packages, the same files as in any environment
    for place in places:
        for folder, names, files in os.walk(place):
            names[:] = [name for name in names if name not in skip]
            yield from (Path(folder) / name for name in files)
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            yield from (process / "cmdline", process / "environ")


def _show(job: Job, what: str, error: dict[str, Any]) -> None:
    reasons = error["reasons"]
    text = error["message"]
    if reasons:
        first = reasons[0]
        text = f"{first['where']}: wants {_short(first['wanted'])}, found {_short(first['found'])}"
        if len(reasons) > 1:
            text += f" (and {len(reasons) - 1} more)"
    job.story.refused(f"{what}: {error['error']}")
    job.story.line("    " + text)


def _refused(job: Job, what: str, attempt: Callable[[], object]) -> None:
    job.story.line(f"attacker$ {what}", mark="│ ")
    try:
        attempt()
    except CloisterError as error:
        _show(job, what, error.as_json())
        return
    raise BrokenStoryError(f"{what} was not refused")


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:99] + "…"
