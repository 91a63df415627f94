"""Hash files that must not change while they are read; read their ELF headers in the same breath.

A file counts only if descriptor and name agree before and after: the signature of the open descriptor equals the one
that the scan saw, and it is still the same after the last byte. Links are never followed at the last component.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

from cloister.errors import Reason
from cloister.node.workload.edge.scan import Signature, signature_of
from cloister.node.workload.elf import Elf, ElfError, ReadAt, read
from cloister.node.workload.form import Progress

BLOCK_BYTES: Final = 1 << 20
"""Read size; below 256 KiB the interpreter lock costs more than the hash (2 cores, SHA-NI 1.8 GB/s)."""

BATCH_BYTES: Final = 16 << 20
BATCH_FILES: Final = 256
THREADS: Final = min(8, os.cpu_count() or 1)

FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


class ChangedError(Exception):
    """The file is not the one that was listed, or it changed while it was read."""


@dataclass(frozen=True, slots=True)
class Hashed:
    """SHA-256 of a file, its size, and what the dynamic linker would read from it (None: not an ELF file)."""

    digest: bytes
    size_bytes: int
    elf: Elf | None = None


@contextmanager
def opened(path: str, *, follow: bool = False, expect: Signature | None = None) -> Iterator[tuple[int, Signature]]:
    """Open a regular file and check on leaving that it is still the same one.

    Raises:
        ChangedError: it is not a regular file with signature `expect`, or changed before the block ended.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, FLAGS | (0 if follow else os.O_NOFOLLOW))
    try:
        before = os.fstat(descriptor)
        found = signature_of(before)
        if not stat.S_ISREG(before.st_mode) or (expect is not None and found != expect):
            raise ChangedError
        yield descriptor, found
        if signature_of(os.fstat(descriptor)) != found:
            raise ChangedError
    finally:
        os.close(descriptor)


def hash_file(path: str, expect: Signature | None = None, *, follow: bool = False) -> Hashed:
    """Return digest and ELF facts of one file. Raises as `opened`."""
    with opened(path, follow=follow, expect=expect) as (descriptor, signature):
        size = signature[0]
        block = os.read(descriptor, min(BLOCK_BYTES, size + 1))
        whole, done = hashlib.sha256(block), len(block)
        if done < size:
            buffer = memoryview(bytearray(min(BLOCK_BYTES, size)))
            while count := os.readv(descriptor, [buffer]):
                whole.update(buffer[:count])
                done += count
        if done != size:
            raise ChangedError
        elf = elf_of(reader(descriptor)) if block.startswith(b"\x7fELF") else None
        return Hashed(whole.digest(), size, elf)


def reader(descriptor: int) -> ReadAt:
    """Return the function through which elf.py reads an open file."""
    return lambda offset, size: os.pread(descriptor, size, offset) if 0 <= offset < 1 << 62 else b""


def elf_of(read_at: ReadAt) -> Elf | None:
    """Return the ELF facts of a file, None if it has none or is broken (then ld.so cannot load it either)."""
    try:
        return read(read_at)
    except ElfError:
        return None


Item = TypeVar("Item")
Result = TypeVar("Result")


def in_batches(
    items: Sequence[Item],
    size: Callable[[Item], int],
    work: Callable[[Item], Result],
    describe: Callable[[Item], str],
    progress: Progress | None,
) -> tuple[list[Result | None], list[Reason]]:
    """Run `work` over `items` on threads; return results in order and a Reason for each item that failed.

    Items go out in batches of some megabytes: one future for each of 20,000 small files would cost a second.
    """
    batches = list(_batches(items, size))
    total, done = sum(map(size, items)), 0
    results: list[Result | None] = [None] * len(items)
    reasons: list[Reason] = []

    def run(batch: range) -> tuple[range, list[Reason]]:
        failed = []
        for index in batch:
            try:
                results[index] = work(items[index])
            except ChangedError:
                failed.append(
                    Reason(
                        describe(items[index]),
                        "a file that changes",
                        "one that stays",
                        "stop what writes to it, then try again",
                    )
                )
            except OSError as error:
                failed.append(
                    Reason(
                        describe(items[index]), error.strerror or str(error), "a readable file", "check its permissions"
                    )
                )
        return batch, failed

    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="cloister-hash")
    try:
        pending: set[Future[tuple[range, list[Reason]]]] = {pool.submit(run, batch) for batch in batches}
        while pending:
            ready, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in ready:
                batch, failed = future.result()
                reasons += failed
                done += sum(size(items[index]) for index in batch)
            if progress is not None:
                progress(done, total)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return results, sorted(reasons, key=lambda reason: reason.where)


def _batches(items: Sequence[Item], size: Callable[[Item], int]) -> Iterable[range]:
    start, weight = 0, 0
    for index, item in enumerate(items):
        weight += size(item)
        if weight >= BATCH_BYTES or index - start + 1 >= BATCH_FILES:
            yield range(start, index + 1)
            start, weight = index + 1, 0
    if start < len(items):
        yield range(start, len(items))
