"""The text of a contract before TOML: which characters it may hold, and on which line a path stands.

People sign what they read, so what they read must be what is parsed:
  1 UTF-8, lines end with LF (a CR changes the digest that people sign)
  2 no control, bidirectional, zero-width, private or unassigned characters anywhere, comments included
  3 outside comments only ASCII, and no backslash: nothing is written as an escape

Step 3 takes the first `#` of a line as the start of its comment. That is exact for every contract that is accepted:
no accepted name or value holds a `#`, so a `#` inside a string is refused later for its own sake.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from cloister.errors import Reason

_REFUSED: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode general categories that show as nothing, or change how neighbours show (UTS #55)."""

_KEY: Final = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_DOTTED: Final = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_HEADER: Final = re.compile(rf"\s*\[\s*({_DOTTED})\s*\]\s*$")
_ELEMENT: Final = re.compile(rf"\s*\[\[\s*({_DOTTED})\s*\]\]\s*$")
_ASSIGNMENT: Final = re.compile(rf"\s*({_DOTTED})\s*=")
_INLINE: Final = re.compile(rf"[{{,]\s*({_KEY})\s*=")
_PART: Final = re.compile(_KEY)


MAX_DOTS: Final = 64
"""Dots outside comments on one line. `tomllib` takes quadratic time for long dotted keys (22 s for 64 KiB of `a.`); the
language nests five tables deep, and of its values only names of clouds hold dots."""


@dataclass(frozen=True, slots=True)
class Finding(Reason):
    """A `Reason` in a file: `line` counts from 1, 0 if unknown."""

    line: int = 0

    def __str__(self) -> str:
        text = Reason.__str__(self)
        return f"line {self.line}: {text}" if self.line else text

    def as_json(self) -> dict[str, Any]:
        return {**Reason.as_json(self), "line": self.line}


def text_findings(text: str) -> Iterator[Finding]:
    """Yield what breaks steps 1 to 3, one finding per line and rule."""
    for number, line in enumerate(text.split("\n"), start=1):
        if "\r" in line:
            yield Finding(
                "text", "a carriage return", "lines that end with LF only", "convert with `dos2unix`", line=number
            )
        odd = next((c for c in line if c not in "\t\r" and unicodedata.category(c) in _REFUSED), None)
        if odd is not None:
            name = unicodedata.name(odd, "unnamed")
            yield Finding("text", f"U+{ord(odd):04X} {name}", "visible characters only", line=number)
        code, _, _ = line.partition("#")
        foreign = next((c for c in code if ord(c) > 126 and c != odd), None)
        if foreign is not None:
            found = f"U+{ord(foreign):04X} {unicodedata.name(foreign, 'unnamed')}"
            yield Finding("text", found, "ASCII outside comments", line=number)
        if "\\" in code:
            yield Finding("text", "a backslash", "plain characters, no escapes", line=number)


def long_key(text: str) -> Finding | None:
    """Return a finding for the first line with more dots than a contract can have; such a text is not parsed at all."""
    for number, line in enumerate(text.split("\n"), start=1):
        dots = line.partition("#")[0].count(".")
        if dots > MAX_DOTS:
            return Finding("toml", f"a key of {dots + 1} parts", "tables nested at most five deep", line=number)
    return None


def line_index(text: str) -> Mapping[tuple[str, ...], int]:
    """Return path -> line number for tables, keys and keys of inline tables; best effort, for messages only."""
    index: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    elements: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        code = line.partition("#")[0]
        header = _HEADER.match(code)
        if header:
            table = _parts(header[1])
            index.setdefault(table, number)
            continue
        element = _ELEMENT.match(code)
        if element:
            array = _parts(element[1])
            table = (*array, str(elements.get(array, 0)))
            elements[array] = elements.get(array, 0) + 1
            index.setdefault(array, number)
            index.setdefault(table, number)
            continue
        assignment = _ASSIGNMENT.match(code)
        if assignment:
            path = table + _parts(assignment[1])
            index.setdefault(path, number)
            for inline in _INLINE.finditer(code, assignment.end()):
                index.setdefault(path + _parts(inline[1]), number)
    return MappingProxyType(index)


def line_of(index: Mapping[tuple[str, ...], int], path: Sequence[str | int]) -> int:
    """Return the line of the longest known beginning of `path`, 0 if there is none."""
    words = tuple(str(part) for part in path)
    return next((index[words[:n]] for n in range(len(words), 0, -1) if words[:n] in index), 0)


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _PART.findall(dotted))
