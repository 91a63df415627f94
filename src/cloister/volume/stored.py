"""Edge: the files of one volume as they are stored, for whoever reads them with a key (`read`) or without (`check`).

Sizes are known beforehand: what is shorter, longer, missing or special is refused. Stored bytes may change at any time, so they are
copied into buffers of ours before anybody judges them, and a file that shrinks is an error, never a signal (no mmap).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cloister.errors import InputError, MachineError, Reason, TamperedError
from cloister.volume import format as fmt
from cloister.volume import layout

_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
RUN: Final = 16
"""Records per read of the disk: 1 MiB, the largest request of FUSE."""
_KEEP_OPEN: Final = 512
"""Segments (32 GiB) whose files stay open; RLIMIT_NOFILE is 1,024 by default. Others are opened for each read."""
MAX_REASONS: Final = 100
"""Broken parts that one refusal names."""


class Stored:
    """The files of one volume. A context manager."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._folder = _open_folder(path)
        self._data: int | None = None
        self._kept: dict[int, int] = {}

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close everything; a second call does nothing."""
        descriptors = [*self._kept.values()]
        if self._data is not None:
            descriptors.append(self._data)
        if self._folder >= 0:
            descriptors.append(self._folder)
        self._kept, self._data, self._folder = {}, None, -1
        for descriptor in descriptors:
            os.close(descriptor)

    def tampered(self, what: str, where: str, found: str, wanted: str, hint: str = "") -> TamperedError:
        """The error for one finding."""
        return fmt.tampered(self.name, what, [Reason(where, found, wanted, hint)])

    @contextmanager
    def _reading(self, where: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
                raise self.tampered(f"its {where} is missing", where, reason, "a regular file") from error
            raise MachineError(f"{self.name}: its {where} cannot be read: {reason}") from error

    def _open(self, file_name: str, folder: int, where: str, size: int) -> int:
        with self._reading(where):
            descriptor = os.open(file_name, _READ, dir_fd=folder)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            os.close(descriptor)
            found = f"{status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "something else"
            raise self.tampered(
                f"its {where} is not what was sealed", f"{where}.size", found, f"a file of {size} bytes"
            )
        return descriptor

    def _whole(self, file_name: str, size: int) -> bytes:
        descriptor = self._open(file_name, self._folder, file_name, size)
        try:
            data = bytearray(size)
            self._fill(descriptor, memoryview(data), 0, file_name)
            return bytes(data)
        finally:
            os.close(descriptor)

    def _fill(self, descriptor: int, into: memoryview, offset: int, where: str) -> None:
        while into:
            with self._reading(where):
                count = os.preadv(descriptor, (into,), offset)
            if not count:
                raise self.tampered(f"its {where} is not what was sealed", where, "shorter than before", "all of it")
            into, offset = into[count:], offset + count

    def head(self) -> fmt.Head:
        """The head: strict and signed by somebody."""
        return fmt.decode_head(self._whole("head", layout.HEAD), name=self.name)

    def manifest(self, head: fmt.Head) -> bytes:
        """The file `manifest`, compared with the digest in the head."""
        stored = self._whole("manifest", head.manifest_len)
        if hashlib.sha256(stored).digest() != head.manifest_sha256:
            raise self.tampered(
                "its manifest is not what was sealed",
                "manifest",
                "other bytes",
                f"SHA-256 {head.manifest_sha256.hex()}",
            )
        return stored

    def open_segments(self, geometry: layout.Layout) -> None:
        """Check the size of every segment, and keep the first ones open."""
        with self._reading("data"):
            self._data = os.open("data", _FOLDER | os.O_NOFOLLOW, dir_fd=self._folder)
        for segment in range(geometry.segments):
            descriptor = self._open_segment(segment, geometry)
            if segment < _KEEP_OPEN:
                self._kept[segment] = descriptor
            else:
                os.close(descriptor)

    def _open_segment(self, segment: int, geometry: layout.Layout) -> int:
        if self._data is None:
            raise ValueError("the volume is closed")
        file_name = layout.segment_name(segment)
        return self._open(file_name, self._data, f"data/{file_name}", geometry.segment_size(segment))

    def read_segment(self, segment: int, offset: int, into: memoryview, geometry: layout.Layout) -> None:
        """Fill `into` from `offset` of the file of one segment."""
        where = f"data/{layout.segment_name(segment)}"
        kept = self._kept.get(segment)
        if kept is not None:
            self._fill(kept, into, offset, where)
            return
        descriptor = self._open_segment(segment, geometry)
        try:
            self._fill(descriptor, into, offset, where)
        finally:
            os.close(descriptor)

    def runs(self, geometry: layout.Layout, into: memoryview) -> Iterator[tuple[int, list[memoryview]]]:
        """Every record in order, at most `RUN` at a time: the number of the first, and the records, which lie in `into` until the next run."""
        for segment in range(geometry.segments):
            count = geometry.records_in(segment)
            for place in range(0, count, RUN):
                run = into[: min(RUN, count - place) * layout.RECORD]
                self.read_segment(segment, place * layout.RECORD, run, geometry)
                records = [run[at : at + layout.RECORD] for at in range(0, len(run), layout.RECORD)]
                yield segment * layout.RECORDS_PER_SEGMENT + place, records

    def not_registered(self, head: fmt.Head, expect: str, generation: int | None = None) -> TamperedError:
        """The error for an authentic volume that is not `expect`."""
        wanted = expect if generation is None else f"generation {generation}, {expect}"
        return TamperedError(
            f"{self.name}: authentic, but not the version that is registered",
            code="volume-stale",
            reasons=[Reason("head.digest", f"generation {head.generation}, {head.digest}", wanted)],
            hint="somebody put an old or a foreign version in its place; take the registered one",
        )

    def broken(self, findings: Iterable[Reason]) -> TamperedError:
        """The error for all broken parts that a full pass found."""
        reasons = list(dict.fromkeys(findings))[:MAX_REASONS]
        return TamperedError(
            f"{self.name}: {len(reasons)} parts of it are not what was sealed",
            code="volume-tampered",
            reasons=reasons,
            hint="take another copy of the volume",
        )


class Leaves:
    """The leaves of one volume; those of a segment are compared with its node when they are first needed."""

    def __init__(self, files: Stored, geometry: layout.Layout, nodes: bytes) -> None:
        """`nodes` is the end of the authentic manifest: `layout.Layout.nodes_len` bytes."""
        self._files, self._layout, self._nodes = files, geometry, nodes
        self._segments: dict[int, bytes] = {}

    def fits(self, record: int, sealed: memoryview) -> bool:
        """Whether the stored bytes of a record are the ones that the name of the volume binds.

        Raises:
            TamperedError: the leaves of its segment are not.
        """
        segment, place = divmod(record, layout.RECORDS_PER_SEGMENT)
        leaves = self._segments.get(segment)
        if leaves is None:
            leaves = self._segments[segment] = self._read(segment)
        return fmt.leaf(sealed) == leaves[place * layout.LEAF : (place + 1) * layout.LEAF]

    def _read(self, segment: int) -> bytes:
        count = self._layout.records_in(segment)
        data = bytearray(count * layout.LEAF)
        self._files.read_segment(segment, count * layout.RECORD, memoryview(data), self._layout)
        leaves = bytes(data)
        if fmt.leaves_node(leaves) != self._nodes[segment * layout.LEAF : (segment + 1) * layout.LEAF]:
            where = f"data/{layout.segment_name(segment)}.leaves"
            raise self._files.tampered("its leaves are not what was sealed", where, "other bytes", "the sealed ones")
        return leaves


def _open_folder(path: Path) -> int:
    try:
        return os.open(path, _FOLDER)
    except OSError as error:
        raise InputError(
            f"{path} is no volume: {os.strerror(error.errno or 0)}", hint="a volume is a folder made by `cloister seal`"
        ) from error
