"""What the jail costs: start of a Python program, and the speed of one that computes. Native and jailed in turn (ABAB).

    python bench/jail.py [--rounds 15] [--profile sealed] [--json]

Start is the wall time of `python -I -S -c pass` from call to end. Two loops are CPU seconds inside the program:
`compute` is arithmetic, which nothing of the jail should touch; `files` opens, reads and closes a small file, where
every call passes seccomp and each open Landlock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

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


def measure(rounds: int, name: str) -> dict[str, object]:
    starts: dict[str, list[float]] = {"native": [], "jail": []}
    loops: dict[str, list[tuple[float, float]]] = {"native": [], "jail": []}
    for _ in range(rounds):
        for side in ("native", "jail"):
            run = native if side == "native" else lambda code: jailed(code, name)
            began = time.perf_counter()
            run("pass")
            starts[side].append((time.perf_counter() - began) * 1000)
            compute, files = run(LOOP).split()
            loops[side].append((float(compute), float(files)))
    start = {side: round(statistics.median(values), 1) for side, values in starts.items()}
    found: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Linux {platform.release()}",
        "profile": name,
        "rounds": rounds,
        "start_ms": {**start, "added": round(start["jail"] - start["native"], 1)},
        "start_min_ms": {side: round(min(values), 1) for side, values in starts.items()},
    }
    for index, kind in enumerate(("compute", "files")):
        pairs = zip(loops["jail"], loops["native"], strict=True)
        found[f"{kind}_cpu_s"] = {side: round(statistics.median(v[index] for v in loops[side]), 4) for side in loops}
        found[f"{kind}_ratio"] = round(statistics.median(jail[index] / plain[index] for jail, plain in pairs), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="cost of the jail, native and jailed in turn")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", default="sealed", choices=("offline", "one-shot", "sealed"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.rounds, options.profile)
    if options.json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:14} {value}")


if __name__ == "__main__":
    main()
