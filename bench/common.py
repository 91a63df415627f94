"""What every benchmark shares: figures with targets, turns (A B A B ...), one table, one JSON line.

A benchmark is a module of this folder with a docstring, `arguments(parser)` and `figures(options) -> Iterable[Figure]`;
`main` runs it. Both sides of a comparison run in one process tree on one machine and take turns, so a noisy neighbour
meets both; what is compared is their medians.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

PACKAGES: Final = ("cryptography", "dcap-qvl", "pydantic", "sqlalchemy", "starlette", "uvicorn")
"""Packages whose version can change a figure."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number.

    `sides` are the medians that were compared, in `side_unit`, the yardstick first. `better` says on which side of
    `target` the value has to be.
    """

    name: str
    value: float
    unit: str
    target: float | None = None
    better: Literal["lower", "higher"] = "lower"
    sides: Mapping[str, float] = field(default_factory=dict)
    side_unit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "lower" else self.value >= self.target

    @property
    def ratio(self) -> float | None:
        """Second side / yardstick; None without two sides."""
        if len(self.sides) != 2:
            return None
        first, second = self.sides.values()
        return second / first if first else None

    def as_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"name": self.name, "value": _round(self.value), "unit": self.unit}
        data |= {"target": self.target, "better": self.better, "met": self.met}
        if self.sides:
            data["sides"] = {side: _round(value) for side, value in self.sides.items()}
            data |= {"side_unit": self.side_unit, "ratio": None if self.ratio is None else _round(self.ratio)}
        return data


def ratio(name: str, sides: Mapping[str, Sequence[float]], unit: str, **target: Any) -> Figure:
    """Return the figure `median of the second side / median of the first`."""
    medians = {side: statistics.median(values) for side, values in sides.items()}
    first, second = medians.values()
    return Figure(name, second / first, "ratio", sides=medians, side_unit=unit, **target)


def added(name: str, sides: Mapping[str, Sequence[float]], unit: str, **target: Any) -> Figure:
    """Return the figure `median of the second side - median of the first`."""
    medians = {side: statistics.median(values) for side, values in sides.items()}
    first, second = medians.values()
    return Figure(name, second - first, unit, sides=medians, side_unit=unit, **target)


def in_turns(rounds: int, sides: Mapping[str, Callable[[], float]], *, unmeasured: int = 1) -> dict[str, list[float]]:
    """Call the sides in turns and return what they returned, without the first `unmeasured` rounds.

    Raises:
        ValueError: no round is measured.
    """
    if rounds < 1:
        raise ValueError(f"{rounds} rounds")
    found: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + unmeasured):
        for side, run in sides.items():
            value = run()
            if number >= unmeasured:
                found[side].append(value)
    return found


def timed(act: Callable[[], object], *, scale: float = 1e3) -> float:
    """Return how long one call took, in milliseconds (`scale` 1: seconds)."""
    begin = time.perf_counter()
    act()
    return (time.perf_counter() - begin) * scale


def machine() -> str:
    """Return processor, memory, kernel and how busy it is: the last tells whether figures are to be believed."""
    cpu = platform.machine()
    memory = 0
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal"):
            memory = round(int(line.split()[1]) / (1 << 20))
    busy = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    cores = len(os.sched_getaffinity(0))
    return f"{cores} x {cpu}, {memory} GiB, Linux {platform.release()}, load {busy}"


def versions() -> dict[str, str]:
    """Return the versions of Cloister, Python and what does its work."""
    from cloister import __version__

    found = {"cloister": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    if bwrap := shutil.which("bwrap"):
        said = subprocess.run([bwrap, "--version"], capture_output=True, text=True, check=False).stdout.split()
        found["bubblewrap"] = said[-1] if said else "unknown"
    return found


def table(figures: Sequence[Figure]) -> str:
    """Return figures as aligned columns: name, value, both medians, their ratio, target, met or not."""
    header = ("figure", "value", "medians", "ratio", "target", "")
    rows = [header, *(_row(figure) for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for row in rows:
        # names and medians are read from the left, numbers from the right
        cells = [
            cell.rjust(width) if column in (1, 3, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def document(name: str, figures: Sequence[Figure], versions: Mapping[str, str], machine: str) -> str:
    """Return one line of JSON with everything that `table` shows, and where it was measured."""
    body = {
        "bench": name,
        "figures": [figure.as_json() for figure in figures],
        "versions": dict(versions),
        "machine": machine,
    }
    return json.dumps(body, ensure_ascii=False)


def options_of(module: ModuleType, **changes: Any) -> argparse.Namespace:
    """Return the options of the benchmark `module` as they are by default, except for `changes`."""
    parser = argparse.ArgumentParser()
    module.arguments(parser)
    options = parser.parse_args([])
    if unknown := set(changes) - set(vars(options)):
        raise ValueError(f"{module.__name__} has no options {sorted(unknown)}")
    return argparse.Namespace(**{**vars(options), **changes})


def main(module: ModuleType, argv: Sequence[str] | None = None) -> int:
    """Run the benchmark `module` with its own options and `--json`; exit status 1 when a target is missed."""
    name = module.__name__.rpartition(".")[2]
    parser = argparse.ArgumentParser(
        prog=f"./run bench {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    module.arguments(parser)
    options = parser.parse_args(argv)
    before = machine()
    figures = list(module.figures(options))
    if options.json:
        print(document(name, figures, versions(), before))
    else:
        print(table(figures))
        print("\n" + ", ".join(f"{package} {version}" for package, version in versions().items()))
        print(before)
    return 1 if any(figure.met is False for figure in figures) else 0


def modules() -> dict[str, str]:
    """Return the benchmarks of this folder with the first line of their docstrings; nothing is imported."""
    import ast

    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        if path.stem != "common":
            text = ast.get_docstring(ast.parse(path.read_bytes())) or ""
            found[path.stem] = text.partition("\n")[0]
    return found


def note(text: str) -> None:
    """Say what happens while nothing is printed yet; stdout belongs to the result."""
    print(f"  {text}", file=sys.stderr, flush=True)


def _row(figure: Figure) -> tuple[str, str, str, str, str, str]:
    sign = "<=" if figure.better == "lower" else ">="
    sides = " | ".join(f"{side} {_number(value)} {figure.side_unit}".rstrip() for side, value in figure.sides.items())
    return (
        figure.name,
        f"{_number(figure.value)} {figure.unit}",
        sides,
        "" if figure.ratio is None else f"{figure.ratio:.3f}",
        "" if figure.target is None else f"{sign} {figure.target:,g}",
        "" if figure.met is None else "met" if figure.met else "missed",
    )


def _number(value: float) -> str:
    """Four significant digits, but no digit of a whole number is dropped: 12345.6 -> 12,346; 0.01234567 -> 0.01235."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _round(value: float) -> float:
    return float(f"{value:.6g}")


def _lines(path: str) -> Iterable[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
