"""How fast are reads from a mounted volume, compared with the same files on the plain disk below?

    ./run bench mount [--rounds 5] [--size-mb 1024] [--files 20000] [--workers 1] [--folder /var/tmp] [--json]

A is the source folder, B the mounted volume sealed from it; they take turns (A B A B ...), and every figure is a median. Files:
one of random bytes, and a tree in 200 folders with log-normal sizes (mean 32 KiB). Workloads, one reader process each:

    seq       read(2) of the big file, 1 MiB at a time        GB/s
    mmap      every page of the big file through a mapping    GB/s
    random    4 KiB at 4,000 random places of the big file    reads/s
    small     walk the tree in order, open and read each file files/s
    shuffled  the same files in random order                  files/s

"cold": the page cache, dentries and inodes of the whole machine were dropped before (needs root; neighbours notice); "warm": the
run right after it. Each figure comes as an absolute number of B and as the ratio B / A: above 1 the mount is faster.
"cpu" is the processor time of reader and worker together, in seconds per GB or microseconds per file.
"""

from __future__ import annotations

import argparse
import math
import mmap
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.common import Figure
from cloister.crypto.keys import Secret
from cloister.volume.fuse import Mount, mount
from cloister.volume.read import Volume
from cloister.volume.seal import seal

FOLDERS = 200
MEAN_BYTES = 32 * 1024
RANDOM_READS = 4000
MIB = 1 << 20

# Absolute targets of this door (docs/mount.md), and ratios to the plain disk (docs/mount.md says which door meets them).
TARGETS = {
    "seq.cold": 1.5,
    "small.cold": 12_000,
    "seq.cold.ratio": 0.9,
    "seq.warm.ratio": 0.8,
    "small.cold.ratio": 1.5,
}


def make_source(path: Path, size: int, files: int) -> None:
    draw, blob = random.Random(1), os.urandom(4 * MIB)
    path.mkdir()
    with open(path / "big.bin", "wb") as big:
        for _ in range(size // MIB):
            big.write(os.urandom(MIB))
    for index in range(files):
        folder = path / "small" / f"{index % FOLDERS:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        length = min(int(draw.lognormvariate(math.log(MEAN_BYTES) - 0.5, 1)), len(blob) - 4096)
        start = draw.randrange(4096)
        (folder / f"{index:06d}.bin").write_bytes(blob[start : start + length])
    os.sync()


def seq(root: Path) -> int:
    buffer = bytearray(MIB)
    total = 0
    with open(root / "big.bin", "rb", buffering=0) as big:
        while count := big.readinto(buffer):
            total += count
    return total


def mapped(root: Path) -> int:
    with open(root / "big.bin", "rb") as big, mmap.mmap(big.fileno(), 0, prot=mmap.PROT_READ) as view:
        for offset in range(0, len(view), 4096):
            view[offset]
        return len(view)


def scattered(root: Path) -> int:
    draw = random.Random(2)
    with open(root / "big.bin", "rb", buffering=0) as big:
        pages = os.fstat(big.fileno()).st_size // 4096
        for _ in range(RANDOM_READS):
            os.pread(big.fileno(), 4096, draw.randrange(pages) * 4096)
    return RANDOM_READS


def small(root: Path) -> int:
    count = 0
    for folder, _, names in os.walk(root / "small"):
        for name in names:
            with open(f"{folder}/{name}", "rb") as file:
                file.read()
            count += 1
    return count


def shuffled(root: Path, names: list[str]) -> int:
    for name in names:
        with open(root / name, "rb") as file:
            file.read()
    return len(names)


@dataclass(frozen=True)
class Sample:
    """One run: units per second, and processor seconds per unit (reader + worker)."""

    rate: float
    cpu: float


def cpu_seconds(pids: tuple[int, ...]) -> float:
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])  # utime, stime
    return total / os.sysconf("SC_CLK_TCK")


def measure(run: Callable[[Path], int], root: Path, pids: tuple[int, ...], unit: float) -> Sample:
    cpu, own = cpu_seconds(pids), time.process_time()
    start = time.perf_counter()
    done = run(root) / unit
    wall = time.perf_counter() - start
    return Sample(done / wall, (cpu_seconds(pids) - cpu + time.process_time() - own) / done)


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")


def compare(plain: Path, mounted: Mount, rounds: int, only: str) -> dict[str, dict[str, list[Sample]]]:
    names = [str(path.relative_to(plain)) for path in sorted((plain / "small").rglob("*.bin"))]
    random.Random(3).shuffle(names)
    workloads: dict[str, tuple[Callable[[Path], int], float]] = {
        "seq": (seq, 1e9),
        "mmap": (mapped, 1e9),
        "random": (scattered, 1),
        "small": (small, 1),
        "shuffled": (lambda root: shuffled(root, names), 1),
    }
    results: dict[str, dict[str, list[Sample]]] = {}
    for workload, (run, unit) in workloads.items():
        if only and workload not in only.split(","):
            continue
        for _ in range(rounds):
            for side, root, pids in (("plain", plain, ()), ("mount", mounted.at, mounted.workers())):
                drop_caches()
                for state in ("cold", "warm"):
                    if workload == "random" and state == "warm":
                        continue
                    sample = measure(run, root, pids, unit)
                    results.setdefault(f"{workload}.{state}", {}).setdefault(side, []).append(sample)
    return results


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size-mb", type=int, default=1024)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", default="", help="workloads, with commas between them")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the disk to compare with")


def figures(options: argparse.Namespace) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        source, sealed, at = Path(place, "source"), Path(place, "volume"), Path(place, "mnt")
        make_source(source, options.size_mb * MIB, options.files)
        key = Secret.random()
        digest = seal(source, sealed, key=key).digest
        at.mkdir()
        with (
            Volume.open(sealed, key, expect=digest) as volume,
            mount(volume, at, workers=options.workers) as mounted,
        ):
            (at / "big.bin").stat()
            results = compare(source, mounted, options.rounds, options.only)
    for name, sides in results.items():
        plain = statistics.median(sample.rate for sample in sides["plain"])
        rate = statistics.median(sample.rate for sample in sides["mount"])
        by_size = name.startswith(("seq", "mmap"))
        unit = "GB/s" if by_size else "1/s"
        yield Figure(f"mount.{name}", rate, unit, TARGETS.get(name), "higher")
        yield Figure(f"mount.{name}.best", max(sample.rate for sample in sides["mount"]), unit)
        cpu = min(sample.cpu for sample in sides["mount"])
        yield Figure(f"mount.{name}.cpu", cpu if by_size else cpu * 1e6, "s/GB" if by_size else "us")
        ratio = f"{name}.ratio"
        medians = {"plain": plain, "mount": rate}
        yield Figure(f"mount.{ratio}", rate / plain, "ratio", TARGETS.get(ratio), "higher", medians, unit)
