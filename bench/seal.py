"""How fast is sealing, compared with `cp` of the same files on the same core into the page cache?

    ./run bench seal [--rounds 5] [--size-mb 1024] [--files 20000] [--cores 1] [--folder /dev/shm] [--json]

A is `cp -r`, B `seal` without leaves, C `seal` with leaves (the default); they take turns, so that a noisy neighbour hits all of
them, and each figure is a ratio of medians, t(cp) / t(seal): 1 means as fast as `cp`. Sources are one file of random bytes, and a
tree of files in 200 folders with log-normal sizes (mean 32 KiB). Last, the sealed file is read into one buffer: without an audit, with it, and
checked without a key; t(read) / t(audited read) and t(read) / t(check), which have no target.

Everything lies in memory (tmpfs): no disk is measured. `seal` makes every file durable and `cp` none; in memory that costs neither of
them anything, on a disk (--folder) it costs `seal` only, so there the figures are no comparison. Caveat: the first use of a page of a
virtual machine is slow on some hosts, which flatters `seal`; a first, unmeasured round takes most of that away. On a busy machine
run it several times and take the rounds with the fastest `cp`. Needs about three times --size-mb of memory.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from bench.common import Figure
from cloister.crypto.keys import Secret
from cloister.volume.check import check
from cloister.volume.read import Volume
from cloister.volume.seal import seal

TARGET = 0.5
FOLDERS = 200
MEAN_BYTES = 32 * 1024
WINDOW = 1 << 20


def make_big(path: Path, size: int) -> None:
    path.mkdir()
    with open(path / "weights.bin", "wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))


def make_tree(path: Path, files: int) -> None:
    draw, blob = random.Random(1), os.urandom(1 << 22)
    path.mkdir()
    for index in range(files):
        folder = path / f"{index % FOLDERS:03d}"
        folder.mkdir(exist_ok=True)
        size = min(int(draw.lognormvariate(math.log(MEAN_BYTES) - 0.5, 1)), len(blob) - 4096)
        start = draw.randrange(4096)
        (folder / f"{index:06d}.bin").write_bytes(blob[start : start + size])


def seconds(run: Callable[[Path], object], target: Path) -> float:
    start = time.perf_counter()
    run(target)
    spent = time.perf_counter() - start
    shutil.rmtree(target)
    return spent


def take_turns(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each side over alternating rounds; the first round does not count."""
    spent: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, run in sides.items():
            once = run()
            if number:
                spent[side].append(once)
    return {side: statistics.median(times) for side, times in spent.items()}


def sealing(source: Path, target: Path, rounds: int) -> dict[str, float]:
    """Median seconds of `cp` and of both kinds of seal."""
    key = Secret.random()
    sides: dict[str, Callable[[Path], object]] = {
        "cp": lambda to: subprocess.run(["cp", "-r", str(source), str(to)], check=True),
        "plain": lambda to: seal(source, to, key=key, audited=False),
        "leaves": lambda to: seal(source, to, key=key, audited=True),
    }
    return take_turns({side: partial(seconds, run, target) for side, run in sides.items()}, rounds)


def reading(source: Path, target: Path, rounds: int) -> dict[str, float]:
    """Median seconds of reading all of the sealed `source`, of reading it audited, and of checking it without a key."""
    key = Secret.random()
    digest = seal(source, target, key=key).digest
    buffer = memoryview(bytearray(WINDOW))

    def read(*, audit: bool) -> float:
        start = time.perf_counter()
        with Volume.open(target, key, expect=digest, audit=audit) as volume:
            for offset in range(0, volume.data_len, WINDOW):
                volume.read_into(offset, buffer[: volume.data_len - offset])
        return time.perf_counter() - start

    def check_all() -> float:
        start = time.perf_counter()
        check(target, expect=digest)
        return time.perf_counter() - start

    sides: dict[str, Callable[[], float]] = {
        "read": partial(read, audit=False),
        "audit": partial(read, audit=True),
        "check": check_all,
    }
    median = take_turns(sides, rounds)
    shutil.rmtree(target)
    return median


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size-mb", type=int, default=1024)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))


def figures(options: argparse.Namespace) -> Iterator[Figure]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-options.cores :])
    try:
        yield from compare(options)
    finally:
        os.sched_setaffinity(0, before)


def compare(options: argparse.Namespace) -> Iterator[Figure]:
    def figure(name: str, median: Mapping[str, float], first: str, second: str, target: float | None) -> Figure:
        sides = {first: median[first], second: median[second]}
        value = median[first] / median[second]
        return Figure(f"{name}.{options.cores}core", value, "ratio", target, "higher", sides, "s")

    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        make_big(Path(place, "big"), options.size_mb << 20)
        make_tree(Path(place, "tree"), options.files)
        where = Path(place, "out")
        for source in ("big", "tree"):
            median = sealing(Path(place, source), where, options.rounds)
            for side in ("plain", "leaves"):
                yield figure(f"seal.{source}.{side}", median, "cp", side, TARGET)
        median = reading(Path(place, "big"), where, options.rounds)
        for side in ("audit", "check"):
            yield figure(f"read.big.{side}", median, "read", side, None)
