"""Turn what a confined program prints into a progress bar, and nothing more.

A line such as `epoch 2/5 step 30/60 loss 0.4312 accuracy 0.81` becomes counters and metrics. Only numbers under short
lower-case names pass, rounded to four significant digits; all other text stays inside. This is what a contract means by
`leaves = ["metrics"]`. Pure: the caller owns clock and screen.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Final

MAX_LINE_BYTES: Final = 4096
MAX_METRICS: Final = 8

# Bounded spaces: a search that takes long keeps every thread waiting, and the program chooses the line.
_COUNTER = re.compile(
    r"\b(epoch|step|batch|iteration|iter|round)\s{0,8}[:=]?\s{0,8}\[?(\d{1,9})\s{0,8}/\s{0,8}(\d{1,9})\]?",
    re.IGNORECASE,
)
_METRIC = re.compile(
    r"\b([A-Za-z][A-Za-z_]{0,15})\s{0,8}[:= ]\s{0,8}(-?\d{1,9}(?:\.\d{1,9})?(?:[eE][-+]?\d{1,2})?)(?![\w/.])"
)


@dataclass(frozen=True, slots=True)
class Counter:
    """`done` of `total`; `0 <= done <= total` and `total >= 1`."""

    name: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Progress:
    """What one line says. `counters` from the outermost in (epoch before step), `metrics` in order of appearance."""

    counters: tuple[Counter, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def fraction(self) -> float | None:
        """Share of the whole work that is done, 0 to 1, from nested counters; None without a counter."""
        if not self.counters:
            return None
        # `epoch 2/5 step 30/60` means: one epoch is complete, the second is half done. A lone `epoch 2/5` is complete.
        low, width = 0.0, 1.0
        for position, counter in enumerate(self.counters):
            last = position == len(self.counters) - 1
            width /= counter.total
            low += width * (counter.done if last else max(counter.done - 1, 0))
        return min(low, 1.0)

    @property
    def text(self) -> str:
        """The line that leaves: `epoch 2/5 step 30/60 loss 0.4312`."""
        counters = [f"{counter.name} {counter.done}/{counter.total}" for counter in self.counters]
        return " ".join(counters + [f"{name} {value:.4g}" for name, value in self.metrics.items()])


def read_line(line: bytes) -> Progress | None:
    """Return the progress that `line` states, or None when it states none. Never raises."""
    if len(line) > MAX_LINE_BYTES:
        return None
    text = line.decode("ascii", errors="replace")
    counters: list[Counter] = []
    for match in _COUNTER.finditer(text):
        done, total = int(match[2]), int(match[3])
        if 0 <= done <= total and total >= 1 and len(counters) < 2:
            counters.append(Counter(match[1].lower(), done, total))
    metrics: dict[str, float] = {}
    for match in _METRIC.finditer(_COUNTER.sub(" ; ", text)):
        value = float(match[2])
        if math.isfinite(value) and len(metrics) < MAX_METRICS:
            metrics.setdefault(match[1].lower(), float(f"{value:.4g}"))
    if not counters and not metrics:
        return None
    return Progress(tuple(counters), metrics)
