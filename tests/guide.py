"""Play docs/guide.md: every `name$ command` of its console blocks runs for real, in order, as that party.

    python -m tests.guide            play it and put the real output into the page
    python -m tests.guide --check    play it and say which blocks differ (tests/test_docs.py does this)

What a reader sees is what ran: the working folder is new, a party's name is its CLOISTER_HOME, `&` starts a process that
is stopped at the end, a ```toml block is written to the file that its first comment names, with digests and fingerprints of
this playing. Ports are exchanged for free ones while it plays. The line that warns of soft evidence is left out (the page
says so); `[exit N]` is a nonzero exit status; `[...]` in the page stands for lines that are left out there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parents[1]
PAGE: Final = HERE / "docs" / "guide.md"
WORKLOAD: Final = HERE / ".cloister" / "workload" / "bin" / "python"
DATASETS: Final = HERE / ".cloister" / "datasets"
PORTS: Final = ("8443", "8100")

_BLOCK: Final = re.compile(r"^```(console|toml)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_PROMPT: Final = re.compile(r"^(hospital|vendor|clinic|cloud)\$ (.*)$")
_NOISE: Final = re.compile(r"^warning: .*software evidence under a published test root.*\n", re.MULTILINE)
_LEFT_OUT: Final = "[...]"
_READY_S: Final = 60.0


def normal(text: str) -> str:
    """Return `text` without what differs from one playing to the next: digests, times, sizes that follow from them."""
    for pattern, word in (
        (r"sha256:[0-9a-f]{12,64}…?", "sha256:X"),
        (r"SHA256:[A-Za-z0-9+/]{43}", "SHA256:X"),
        (r"\b[0-9a-f]{16,96}\b…?", "HEX"),
        (r"\bd-[0-9a-f]{12}\b", "d-X"),
        (r"\bl-[0-9a-f]{6,32}\b", "l-X"),
        (r"\b\d\d:\d\d:\d\dZ", "CLOCK"),
        (r"\b(loss|accuracy) [\d.]+", r"\1 N"),
        (r"\d{4}-\d{2}-\d{2}( \d{2}:\d{2}:\d{2} UTC)?", "DATE"),
        (r"\b[\d.:,]+ (ms|s|min)\b", "TIME"),
        (r"\b[\d.,]+ (B|kB|MB|GB)\b", "SIZE"),
        (r"\+[0-9a-f]{8}\+[\w+/=]+", "+KEY"),
        (r"^(software|known answers|platform|sandbox|mount|memory|ssh-keygen) +(ok|note|missing).*$", r"\1 \2"),
        # what a machine may have or lack, with the line that says how to get it
        (r"^(gpu|swtpm) +(ok|note).*$(?:\n {15,}\S.*$)*", r"\1"),
        (r"(CPython|Python) [\d.]+", r"\1 N"),
        (r"\b\d+ modules compiled", "N modules compiled"),
        (r"[ \t]+", " "),
    ):
        text = re.sub(pattern, word, text, flags=re.MULTILINE)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


class Stage:
    """A working folder with homes, scripts, data and an environment to measure."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "PATH": f"{HERE / '.venv' / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "NO_COLOR": "1",
            "PYTHONPATH": str(folder / ".src"),
        }
        # A copy: the software that runs is measured, and must not change under the broker while somebody edits it.
        shutil.copytree(HERE / "src", folder / ".src", ignore=shutil.ignore_patterns("__pycache__"))
        # What a node measured and staged before is kept: an environment with torch is most of a gigabyte.
        (HERE / ".cloister" / "guide").mkdir(exist_ok=True)
        (folder / "cloud").mkdir()
        (folder / "cloud" / "node").symlink_to(HERE / ".cloister" / "guide")
        self.ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
        self.running: list[subprocess.Popen[str]] = []
        self.digests: dict[str, str] = {}
        (folder / "code").mkdir()
        for name in ("train.py", "predict.py"):
            shutil.copy(HERE / "examples" / "records" / name, folder / "code" / name)
        (folder / "venv").symlink_to(WORKLOAD.parents[1])
        data = folder / "data"
        subprocess.run([WORKLOAD, HERE / "demo" / "data.py", "records", "--to", data], check=True)
        (data / "train").rename(folder / "records")
        (data / "questions").rename(folder / "questions")
        shutil.rmtree(data)

    def toml(self, text: str) -> str:
        """Return a contract with the digests and fingerprints of this playing, and write it to the file it names."""
        lines = []
        for line in text.splitlines():
            if party := re.match(r'(hospital|vendor|clinic|cloud)\s*= "SHA256:', line):
                fingerprint = self._quiet(party[1], "cloister key show").strip()
                line = re.sub(r"SHA256:[^\"]+", fingerprint, line)
            elif asset := re.match(r"([a-z]+)\s*= \{.*digest = \"sha256:", line):
                line = re.sub(r"sha256:[0-9a-f]*", self.digests[asset[1]], line)
            elif line.startswith("expires"):
                line = f"expires  = {datetime.now(UTC).date() + timedelta(days=365)}"
            lines.append(line)
        name = lines[0].removeprefix("# ").split()[0]
        (self.folder / name).write_text("\n".join(lines) + "\n")
        return "\n".join(lines) + "\n"

    def console(self, text: str) -> str:
        """Run the commands of one block and return it with their output."""
        shown: list[str] = []
        commands: list[tuple[str, list[str], list[str]]] = []
        for line in text.splitlines():
            if match := _PROMPT.match(line):
                commands.append((match[1], [line], []))
            elif commands and commands[-1][1][-1].endswith("\\"):
                commands[-1][1].append(line)
            elif line.startswith("$ export "):
                name, _, value = line.removeprefix("$ export ").partition("=")
                self.environment[name] = self._ports(value)
                shown.append(line)
            elif commands:
                commands[-1][2].append(line)
        for who, lines, before in commands:
            command = " ".join(line.removesuffix("\\").strip() for line in lines).split("$ ", 1)[1]
            printed = self._run(who, self._filled(command))
            shown += [*[self._filled(line) for line in lines], *_cut(printed.splitlines(), before)]
        return "\n".join(shown) + "\n"

    def close(self) -> None:
        for process in reversed(self.running):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _filled(self, command: str) -> str:
        """Put in the last denial's id and the contract's id of this playing."""
        contract = self.folder / "records.toml"
        if contract.exists():
            command = re.sub(
                r"sha256:[0-9a-f]+", f"sha256:{hashlib.sha256(contract.read_bytes()).hexdigest()}", command
            )
        return re.sub(r"d-[0-9a-f]{12}", self.digests.get("denial", "d-0"), command)

    def _run(self, who: str, command: str) -> str:
        environment = {**self.environment, "CLOISTER_HOME": who}
        command = self._ports(command)
        if command.endswith("&"):
            return self._start(command.removesuffix("&"), environment)
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=120, check=False,
        )  # fmt: skip
        printed = self._back(done.stdout)
        for name, digest in re.findall(
            r"^([a-z]+) = \{ owner = \"…\", digest = \"(sha256:[0-9a-f]{64})\"", printed, re.M
        ):
            self.digests[name] = digest
        for denial in re.findall(r"d-[0-9a-f]{12}\b", printed):
            self.digests["denial"] = denial
        return printed + (f"[exit {done.returncode}]\n" if done.returncode else "")

    def _start(self, command: str, environment: dict[str, str]) -> str:
        log = self.folder / f".{len(self.running)}.log"
        with log.open("w") as file:
            self.running.append(
                subprocess.Popen(
                    f"exec {command}", shell=True, cwd=self.folder, env=environment, text=True, stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline and self.running[-1].poll() is None:
            if re.search(r"^https?://|Ctrl-C stops it", log.read_text(), re.M):
                time.sleep(0.5)
                break
            time.sleep(0.05)
        return self._back(log.read_text())

    def _quiet(self, who: str, command: str) -> str:
        return subprocess.run(
            command, shell=True, cwd=self.folder, env={**self.environment, "CLOISTER_HOME": who}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
        ).stdout  # fmt: skip

    def _ports(self, text: str) -> str:
        for shown, used in self.ports.items():
            text = re.sub(rf"\b{shown}\b", str(used), text)
        return text

    def _back(self, text: str) -> str:
        for shown, used in self.ports.items():
            text = text.replace(f":{used}", f":{shown}")
        return _NOISE.sub("", text.replace(f"{self.folder}/", ""))


def _cut(printed: list[str], before: list[str]) -> list[str]:
    """Leave out of `printed` what the page leaves out: `[...]` keeps as many lines before and after it as it has."""
    if _LEFT_OUT not in before:
        return printed
    at = before.index(_LEFT_OUT)
    after = len(before) - at - 1
    return [*printed[:at], _LEFT_OUT, *(printed[-after:] if after else [])]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def stage() -> Iterator[Stage]:
    """A stage in a folder of its own; what it started is stopped."""
    with tempfile.TemporaryDirectory(prefix="guide-") as folder:
        one = Stage(Path(folder))
        try:
            yield one
        finally:
            one.close()


def play(page: str) -> str:
    """Return `page` with the output of every block as it is now."""
    with stage() as here:
        parts, end = [], 0
        for block in _BLOCK.finditer(page):
            made = here.toml(block[2]) if block[1] == "toml" else here.console(block[2])
            parts += [page[end : block.start(2)], made]
            end = block.end(2)
        return "".join([*parts, page[end:]])


def differences(old: str, new: str) -> list[tuple[str, str]]:
    """Return the pairs of blocks that differ after `normal`."""
    pairs = zip(_BLOCK.findall(old), _BLOCK.findall(new), strict=True)
    return [(was[1], now[1]) for was, now in pairs if normal(was[1]) != normal(now[1])]


if __name__ == "__main__":
    text = PAGE.read_text()
    played = play(text)
    if "--check" in sys.argv:
        for was, now in differences(text, played):
            print(f"--- page\n{was}--- now\n{now}")
        sys.exit(bool(differences(text, played)))
    PAGE.write_text(played)
