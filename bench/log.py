"""What a log entry costs: one append at a time, many at once, an fsync of this disk beside it, a restart.

    python bench/log.py [--json] [--count 1000] [--folder DIR]

A "single" append is one answer spent from one thread: decided, hashed, folded, signed, committed with one fsync, and its
receipt made. "fsync" is fdatasync of 8 KiB appended to a plain file in the same folder, measured in turns with the
appends (A B A B ...), so other disk traffic meets both; "over fsync" is the difference of the two medians. "group" is
what 2,000 coroutines get that ask at once. Two processors, a busy disk and a quiet one differ by a factor of ten: quote
the ratio and the minimum. `--json` prints one line per figure: figure, value, unit, target (or null).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import rfc8785

from cloister.broker.log.leaf import parse_own
from cloister.broker.log.receipt import verify_receipt
from cloister.broker.log.tree import Tree, leaf_hash, verify_inclusion
from cloister.broker.store.ledger import Granted, Ledger, Pending
from cloister.crypto.keys import Secret, digest

MASTER, TOML, NOW = Secret(b"bench-master-key-bench-master-ke"), b"contract", datetime(2026, 11, 20, 9, 30, tzinfo=UTC)


def figure(name: str, value: float, unit: str, *, target: float | None = None, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"figure": name, "value": round(value, 4), "target": target, "unit": unit}))
    else:
        print(f"{name:34} {value:12.4f} {unit:12} {f'target {target:g}' if target is not None else ''}".rstrip())


def spend(ledger: Ledger, number: int) -> Pending[Granted]:
    return ledger.answer(
        contract=digest(TOML),
        phase="serve",
        party="clinic",
        budget=10**9,
        per_day=None,
        now=NOW,
        denial=f"d-{number}",
    )


def timed(action: Callable[[], object]) -> float:
    """Return milliseconds."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def single(ledger: Ledger, count: int, plain: int) -> tuple[list[float], list[float]]:
    """Return milliseconds of appends and of bare fsyncs, in turns."""
    appends, syncs = list[float](), list[float]()
    for number in range(count):
        appends.append(timed(lambda number=number: spend(ledger, number).result(60)))  # type: ignore[misc]
        os.pwrite(plain, b"x" * 8192, 8192 * number)
        syncs.append(timed(lambda: os.fdatasync(plain)))
    return appends, syncs


async def together(ledger: Ledger, count: int) -> float:
    """Return appends a second when `count` coroutines ask at once."""

    async def one(number: int) -> Granted:
        return await spend(ledger, number)

    start = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(count)))
    return count / (time.perf_counter() - start)


def best_us(action: Callable[[], object]) -> float:
    """Return the best microseconds of one call."""
    return min(timeit.repeat(action, number=200, repeat=7)) / 200 * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()

    def show(name: str, value: float, unit: str, target: float | None = None) -> None:
        figure(name, value, unit, target=target, as_json=options.json)

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        state = Path(folder) / "state"
        plain = os.open(Path(folder) / "plain", os.O_RDWR | os.O_CREAT, 0o600)
        with Ledger.open(state, MASTER) as ledger:
            ledger.submit_contract(TOML, name="bench", version=1, replaces="", now=NOW).result(60)
            ledger.activate_contract(digest(TOML), (), now=NOW).result(60)
            single(ledger, 50, plain)
            appends, syncs = single(ledger, options.count, plain)
            os.close(plain)
            over = statistics.median(appends) - statistics.median(syncs)
            show("log.single.min", min(appends), "ms")
            show("log.single.p50", statistics.median(appends), "ms", 2.0)
            show("log.single.p99", sorted(appends)[int(len(appends) * 0.99)], "ms")
            show("log.fsync.p50", statistics.median(syncs), "ms")
            show("log.single.over_fsync.p50", over, "ms", 0.3)
            show("log.single.over_fsync.min", min(appends) - min(syncs), "ms", 0.3)
            rates = [asyncio.run(together(ledger, 2000)) for _ in range(5)]
            show("log.group.rate", statistics.median(rates), "entries/s", 1000)
            receipt = spend(ledger, 0).result(60).receipt
            leaf = parse_own(receipt.data)
            show("log.receipt.verify", best_us(lambda: verify_receipt(receipt, ledger.log_key)), "us")
            show("log.receipt.encode", best_us(receipt.encode), "us")
            fast, general = best_us(leaf.encode), best_us(lambda: rfc8785.dumps(leaf.as_json()))
            show("log.leaf.encode", fast, "us")
            show("log.leaf.encode.ratio", general / fast, "x faster")
            size = ledger.size
        start = time.perf_counter()
        with Ledger.open(state, MASTER) as ledger:
            show("log.open.rate", size / (time.perf_counter() - start), "entries/s")
            show("log.open.bytes_per_entry", (state / "broker.db").stat().st_size / ledger.size, "bytes")

    hashes = [leaf_hash(b"%d" % number) for number in range(200_000)]
    tree = Tree()
    start = time.perf_counter()
    for value in hashes:
        tree.append(value)
    show("log.tree.append", (time.perf_counter() - start) / len(hashes) * 1e6, "us")
    proof, root = tree.inclusion(123_456), tree.root()
    show("log.tree.prove", best_us(lambda: tree.inclusion(123_456)), "us")
    show(
        "log.tree.verify",
        best_us(lambda: verify_inclusion(hashes[123_456], 123_456, tree.size, proof, root)),
        "us",
    )


if __name__ == "__main__":
    main()
