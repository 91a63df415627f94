"""What the jail costs: start of a Python program, and the speed of one that computes. Native and jailed in turn (ABAB).

    ./run bench jail [--rounds 15] [--profile sealed] [--json]

Start is the wall time of `python -I -S -c pass` from call to end. Two loops are CPU seconds inside the program:
`compute` is arithmetic, which nothing of the jail should touch; `files` opens, reads and closes a small file, where
every call passes seccomp and each open Landlock.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.common import Figure, added, timed
from cloister.confine.job import Bind, Job
from cloister.confine.launch import launch
from cloister.confine.profile import profile

PYTHON = "/usr/bin/python3"
LOOP = """
import time
start = time.process_time()
total = 0
for number in range(1_500_000):
    total += number * number % 7
middle = time.process_time()
for _ in range(4_000):
    with open("/usr/bin/env", "rb") as file:
        file.read(4096)
print(middle - start, time.process_time() - middle)
"""


def native(code: str) -> str:
    return subprocess.run([PYTHON, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout


def jailed(code: str, name: str) -> str:
    paths = [Path(path) for path in ("/usr", "/lib", "/lib64", "/bin") if Path(path).exists()]
    binds = tuple(Bind(path.resolve(), str(path)) for path in paths)
    with launch(Job(binds, (PYTHON, "-I", "-S", "-c", code), stdout="pipe"), profile(name)) as running:
        if running.stdout is None:
            raise RuntimeError("the job has no stdout")
        text = running.stdout.read().decode()
        if not running.wait(120).ok:
            raise RuntimeError("the program failed in the jail")
    return text


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", default="sealed", choices=("offline", "one-shot", "sealed"))


def figures(options: argparse.Namespace) -> Iterator[Figure]:
    starts: dict[str, list[float]] = {"native": [], "jail": []}
    loops: dict[str, list[tuple[float, float]]] = {"native": [], "jail": []}
    for _ in range(options.rounds):
        for side in ("native", "jail"):
            run = native if side == "native" else partial(jailed, name=options.profile)
            starts[side].append(timed(partial(run, "pass")))
            compute, files = run(LOOP).split()
            loops[side].append((float(compute), float(files)))
    name = f"jail.{options.profile}"
    yield added(f"{name}.start.added", starts, "ms")
    for side, values in starts.items():
        yield Figure(f"{name}.start.{side}.min", min(values), "ms")
    for index, kind in enumerate(("compute", "files")):
        medians = {side: statistics.median(pair[index] for pair in pairs) for side, pairs in loops.items()}
        ratios = [jail[index] / plain[index] for jail, plain in zip(loops["jail"], loops["native"], strict=True)]
        yield Figure(f"{name}.{kind}.cpu", statistics.median(ratios), "ratio", sides=medians, side_unit="s")
