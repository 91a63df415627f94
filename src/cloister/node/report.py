"""How a node tells its operator what it is doing, without knowing a screen: the command line and tests implement it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class StepText(Protocol):
    """The text of a running step; the block may sharpen it with what it found."""

    text: str


class BarLine(Protocol):
    """A progress bar: `done` of `total` (None while unknown), with a short note."""

    def update(self, done: float, total: float | None, note: str = "") -> None: ...


class Report(Protocol):
    """Steps with times, one bar at a time, plain lines and warnings."""

    def step(self, doing: str) -> AbstractContextManager[StepText]: ...

    def bar(self, title: str, *, unit: str = "bytes") -> AbstractContextManager[BarLine]: ...

    def say(self, text: str = "") -> None: ...

    def warn(self, text: str) -> None: ...


class _Text:
    def __init__(self, text: str) -> None:
        self.text = text

    def update(self, done: float, total: float | None, note: str = "") -> None:
        """Nobody looks."""


class Silent:
    """A report that nobody reads; keeps the finished steps for tests and benchmarks."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.lines: list[str] = []

    @contextmanager
    def step(self, doing: str) -> Iterator[StepText]:
        text = _Text(doing)
        yield text
        self.steps.append(text.text)

    @contextmanager
    def bar(self, title: str, *, unit: str = "bytes") -> Iterator[BarLine]:
        yield _Text(title)

    def say(self, text: str = "") -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)
