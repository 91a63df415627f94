"""What the command line shows: steps with times and progress on stderr, data on stdout, `--json` instead of both.

Talk goes to stderr, results to stdout; nothing needs colour to be understood; `NO_COLOR`, a pipe or a log file get
plain lines. rich is imported only when a bar is drawn on a terminal.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TextIO

from cloister.errors import CloisterError, DeniedError

_STYLES = {"ok": "32", "bad": "31", "dim": "2", "bold": "1", "warn": "33"}
_OURS: Final = re.compile(r"(\x1b\[(?:0|1|2|31|32|33)(?:;(?:1|2|31|32|33))*m)")
"""The only escape sequences that leave this module."""


def printable(text: str) -> str:
    """Return `text` with everything that steers a terminal, or reorders what is read, written out as an escape.

    File names, labels of a model and reasons of a peer may hold control characters (Unicode category Cc), direction
    marks and other invisible ones (Cf), lone surrogates (Cs). Line feeds and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def human_bytes(count: float) -> str:
    """1234567 -> `1.2 MB` (decimal units, as disks and networks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """0.0123 -> `12 ms`, 3.2 -> `3.2 s`, 75 -> `1:15 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)}:{int(seconds % 60):02d} min"


class Ui:
    """One command's voice. With `as_json`, `result` prints one JSON object on stdout and steps stay silent."""

    def __init__(self, *, as_json: bool = False, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.as_json = as_json
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._colour = self._err.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self.partial: dict[str, Any] = {}
        """What a command had got when it failed; stands beside the error in the JSON object."""

    # Talk ------------------------------------------------------------------------------------------------------

    def style(self, text: str, *names: str) -> str:
        if not self._colour:
            return text
        return f"\x1b[{';'.join(_STYLES[name] for name in names)}m{text}\x1b[0m"

    def say(self, text: str = "") -> None:
        """One line of talk."""
        if not self.as_json:
            self._print(text, self._err)

    def warn(self, text: str) -> None:
        """A warning is shown in every mode: it is about safety."""
        self._print(self.style("warning: ", "warn") + text, self._err)

    @contextmanager
    def step(self, doing: str) -> Iterator[Step]:
        """Run a block as one step; prints `done` and the time when it ends, `failed` when it raises."""
        step = Step(doing)
        begin = time.perf_counter()
        try:
            yield step
        except BaseException:
            self.say(
                f"{self.style('✗', 'bad')} {step.text}: failed  {self.style(human_seconds(time.perf_counter() - begin), 'dim')}"
            )
            raise
        took = human_seconds(time.perf_counter() - begin)
        self.say(f"{self.style('✓', 'ok')} {step.text}  {self.style(took, 'dim')}")

    @contextmanager
    def bar(self, title: str, *, unit: str = "bytes") -> Iterator[Bar]:
        """A progress bar on a terminal; off a terminal, nothing but the step lines."""
        bar = Bar(title, unit, self._err if self._draws else None, colour=self._colour)
        try:
            yield bar
        finally:
            bar.close()

    # Data ------------------------------------------------------------------------------------------------------

    def result(self, data: Mapping[str, Any], text: str | None = None) -> None:
        """The command's answer: `text` for people, `data` for programs."""
        if self.as_json:
            self._print(json.dumps(data, indent=2, sort_keys=True), self._out)
        elif text is not None:
            self._print(text, self._out)

    def record(self, data: Mapping[str, Any], text: str) -> None:
        """One line of an answer that has many: with `as_json` one JSON object on one line (JSON lines)."""
        line = json.dumps(data, sort_keys=True, ensure_ascii=False) if self.as_json else text
        print(line, file=self._out, flush=True)

    @property
    def live(self) -> bool:
        """Whether bars are drawn and nobody but a person reads what is printed."""
        return self._draws and self._out.isatty()

    @property
    def _draws(self) -> bool:
        return not self.as_json and self._err.isatty() and os.environ.get("TERM") != "dumb"

    def error(self, error: CloisterError) -> None:
        """Print an error as found / wanted / next step."""
        if self.as_json:
            self._print(json.dumps({**self.partial, **error.as_json()}, indent=2, sort_keys=True), self._out)
            return
        if error.code == "interrupted":
            self._print(error.message, self._err)
            return
        lines = [f"{self.style('error:', 'bad')} {error.message}"]
        for reason in error.reasons:
            lines.append(f"  {self.style(reason.where, 'bold')}: wants {reason.wanted}, found {reason.found}")
            if reason.hint:
                lines.append(f"    {self.style(reason.hint, 'dim')}")
        if error.hint:
            lines.append(f"hint: {error.hint}")
        if isinstance(error, DeniedError) and error.denial_id and error.denial_id not in error.hint:
            lines.append(f"why: `cloister why {error.denial_id}` shows this again, as the broker logged it")
        lines.append(self.style(f"code: {error.code} (docs/errors.md)", "dim"))
        self._print("\n".join(lines), self._err)

    def _print(self, text: str, stream: TextIO) -> None:
        if self._colour:
            parts = _OURS.split(text)  # every second part is a style
            parts[::2] = [printable(part) for part in parts[::2]]
            text = "".join(parts)
        else:
            text = printable(text)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


class Step:
    """The text of a running step; the block may sharpen it with what it found."""

    def __init__(self, text: str) -> None:
        self.text = text


class Bar:
    """A bar that draws with rich on a terminal and does nothing elsewhere. Cheap to update often."""

    def __init__(self, title: str, unit: str, stream: TextIO | None, *, colour: bool) -> None:
        self._progress: Any = None
        self._last = 0.0
        if stream is None:
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns: list[Any] = [TextColumn("  {task.description}", markup=False), BarColumn(bar_width=30)]
        if unit == "bytes":
            columns += [DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
        else:
            columns += [
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[note]}", markup=False),
                TimeRemainingColumn(),
            ]
        console = Console(file=stream, no_color=not colour)
        self._progress = Progress(*columns, console=console, transient=True, refresh_per_second=8)
        self._task = self._progress.add_task(printable(title), total=None, note="")
        self._progress.start()

    def update(self, done: float, total: float | None, note: str = "") -> None:
        """Show `done` of `total`; at most 20 times a second reach the screen."""
        now = time.monotonic()
        if self._progress is None or (now - self._last < 0.05 and done != total):
            return
        self._last = now
        self._progress.update(self._task, completed=done, total=total, note=note)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
