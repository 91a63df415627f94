"""What a log entry costs: one append at a time, many at once, an fsync of this disk beside it, a restart.

    ./run bench log [--json] [--count 1000] [--folder DIR]

A "single" append is one answer spent from one thread: decided, hashed, folded, signed, committed with one fsync, and its
receipt made. "fsync" is fdatasync of 8 KiB appended to a plain file in the same folder, measured in turns with the
appends (A B A B ...), so other disk traffic meets both; "over fsync" is the difference of the two medians. "group" is
what 2,000 coroutines get that ask at once. Two processors, a busy disk and a quiet one differ by a factor of ten: quote
the ratio and the minimum.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import rfc8785

from bench.common import Figure, timed
from cloister.broker.log.leaf import parse_own
from cloister.broker.log.receipt import verify_receipt
from cloister.broker.log.tree import Tree, leaf_hash, verify_inclusion
from cloister.broker.store.ledger import Granted, Ledger, Pending
from cloister.crypto.keys import Secret, digest

MASTER, TOML, NOW = Secret(b"bench-master-key-bench-master-ke"), b"contract", datetime(2026, 11, 20, 9, 30, tzinfo=UTC)


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


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=None)


def figures(options: argparse.Namespace) -> Iterator[Figure]:
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
            yield Figure("log.single.min", min(appends), "ms")
            yield Figure("log.single.p50", statistics.median(appends), "ms", 2.0)
            yield Figure("log.single.p99", sorted(appends)[int(len(appends) * 0.99)], "ms")
            yield Figure("log.fsync.p50", statistics.median(syncs), "ms")
            yield Figure("log.single.over_fsync.p50", over, "ms", 0.3)
            yield Figure("log.single.over_fsync.min", min(appends) - min(syncs), "ms", 0.3)
            rates = [asyncio.run(together(ledger, 2000)) for _ in range(5)]
            yield Figure("log.group.rate", statistics.median(rates), "entries/s", 1000, "higher")
            receipt = spend(ledger, 0).result(60).receipt
            leaf = parse_own(receipt.data)
            yield Figure("log.receipt.verify", best_us(lambda: verify_receipt(receipt, ledger.log_key)), "us")
            yield Figure("log.receipt.encode", best_us(receipt.encode), "us")
            fast, general = best_us(leaf.encode), best_us(lambda: rfc8785.dumps(leaf.as_json()))
            yield Figure("log.leaf.encode", fast, "us")
            yield Figure("log.leaf.encode.ratio", general / fast, "x faster")
            size = ledger.size
        start = time.perf_counter()
        with Ledger.open(state, MASTER) as ledger:
            yield Figure("log.open.rate", size / (time.perf_counter() - start), "entries/s")
            yield Figure("log.open.bytes_per_entry", (state / "broker.db").stat().st_size / ledger.size, "bytes")

    hashes = [leaf_hash(b"%d" % number) for number in range(200_000)]
    tree = Tree()
    start = time.perf_counter()
    for value in hashes:
        tree.append(value)
    yield Figure("log.tree.append", (time.perf_counter() - start) / len(hashes) * 1e6, "us")
    proof, root = tree.inclusion(123_456), tree.root()
    yield Figure("log.tree.prove", best_us(lambda: tree.inclusion(123_456)), "us")
    yield Figure(
        "log.tree.verify",
        best_us(lambda: verify_inclusion(hashes[123_456], 123_456, tree.size, proof, root)),
        "us",
    )
