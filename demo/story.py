"""A story that runs real commands: a tree of steps with times, and what each command said.

Light verbs run in this process through `cloister.cli.main`, which is what the console script calls; the broker, nodes and
services are processes of their own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cloister.cli import main as cloister
from cloister.cli.ui import human_seconds

SOFT: Final = {"CLOISTER_INSECURE_SOFT_TEE": "1"}
COLOUR: Final = sys.stdout.isatty() and "NO_COLOR" not in os.environ


def paint(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if COLOUR else text


class BrokenStoryError(Exception):
    """A step did not end as the story says; the text holds the command and what it printed."""


@dataclass(frozen=True, slots=True)
class Said:
    """What one command printed and returned."""

    status: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        value = json.loads(self.out)
        if not isinstance(value, dict):
            raise BrokenStoryError(f"no JSON object: {self.out[:200]}")
        return value


@dataclass(slots=True)
class Story:
    """Prints the tree; collects times for the table at the end."""

    times: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def chapter(self, title: str) -> Iterator[None]:
        print(paint(title, "1"), flush=True)
        begin = time.perf_counter()
        yield
        self.times[title] = time.perf_counter() - begin
        print(paint(f"└ {human_seconds(self.times[title])}", "2"), flush=True)

    def line(self, text: str, *, mark: str = "│ ") -> None:
        print(f"{mark} {text}", flush=True)

    def good(self, text: str, seconds: float | None = None) -> None:
        tail = "" if seconds is None else "  " + paint(human_seconds(seconds), "2")
        self.line(f"{paint('✓', '32')} {text}{tail}", mark="├ ")

    def refused(self, text: str) -> None:
        self.line(f"{paint('✗', '32')} refused, as it must be: {text}", mark="├ ")


@dataclass(frozen=True, slots=True)
class Party:
    """Somebody with a home folder; `call` is the command line in their name."""

    name: str
    home: Path
    story: Story
    environment: Mapping[str, str]

    def call(self, *words: str, status: int = 0, show: Sequence[str] | None = None, as_json: bool = True) -> Said:
        """Run `cloister WORDS` in this process. Anything but exit status `status` ends the story."""
        self._show(show or words)
        out, err = io.StringIO(), io.StringIO()
        arguments = self._arguments(words, as_json)
        begin = time.perf_counter()
        with _environment(self.environment), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cloister(arguments)
        said = Said(code, out.getvalue(), err.getvalue())
        self._check(words, said, status)
        self.story.times[f"{self.name}: {words[0]}"] = time.perf_counter() - begin
        return said

    def run(self, *words: str, status: int = 0, show: Sequence[str] | None = None, as_json: bool = True) -> Said:
        """Run `cloister WORDS` as a process; its talk (a live progress bar included) goes to the terminal."""
        with self.beside(*words, status=status, show=show, as_json=as_json) as ended:
            return ended()

    @contextlib.contextmanager
    def beside(
        self, *words: str, status: int = 0, show: Sequence[str] | None = None, as_json: bool = True
    ) -> Iterator[Callable[[], Said]]:
        """Run `cloister WORDS` as a process during the block; yields a function that waits for its end."""
        self._show(show or words)
        live = not as_json
        with subprocess.Popen(
            [sys.executable, "-m", "cloister", *self._arguments(words, as_json)],
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=None if live else subprocess.PIPE,
            text=True,
        ) as child:

            def ended() -> Said:
                out, err = child.communicate()
                said = Said(child.returncode, out, err or "")
                self._check(words, said, status)
                return said

            try:
                yield ended
            finally:
                if child.poll() is None:
                    child.terminate()

    @contextlib.contextmanager
    def process(self, *words: str, ready: Path, timeout_s: float = 60) -> Iterator[dict[str, Any]]:
        """Run a long-lived `cloister WORDS`; yields what it wrote to the `ready` file, stops it with SIGTERM."""
        self._show([word for word in words if word != str(ready)])
        log = ready.with_suffix(".log")
        with log.open("wb") as sink:
            child = subprocess.Popen(
                [sys.executable, "-m", "cloister", *self._arguments(words, False)],
                env={**os.environ, **self.environment},
                stdout=sink,
                stderr=sink,
            )
        try:
            deadline = time.monotonic() + timeout_s
            while not ready.exists() or not ready.read_text():
                if child.poll() is not None or time.monotonic() > deadline:
                    raise BrokenStoryError(f"cloister {words[0]} did not start:\n{log.read_text()}")
                time.sleep(0.02)
            yield json.loads(ready.read_text())
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
                try:
                    child.wait(20)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()

    def _arguments(self, words: Sequence[str], as_json: bool) -> list[str]:
        if not as_json:
            return list(words)
        at = words.index("--") if "--" in words else len(words)
        return [*words[:at], "--json", *words[at:]]

    def _show(self, words: Sequence[str]) -> None:
        # paths of this machine as they look from the story's folder or the project's; paths in the jail stay whole
        roots = (f"{self.home.parent}/", f"{Path(__file__).resolve().parent.parent}/")
        shown = []
        for word in words:
            for root in roots:
                word = word.replace(root, "")
            shown.append(word)
        self.story.line(paint(f"{self.name}$ cloister {shlex.join(shown)}", "36"), mark="│ ")

    def _check(self, words: Sequence[str], said: Said, status: int) -> None:
        if said.status != status:
            raise BrokenStoryError(
                f"{self.name}$ cloister {shlex.join(words)}\nexit status {said.status}, wanted {status}\n{said.out}{said.err}"
            )


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
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
