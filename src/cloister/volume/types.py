"""What a reader of a sealed volume sees: a frozen tree and one linear space of plaintext.

These types know nothing of bytes on disk (`format`), keys or files. A server (FUSE, EROFS, `extract`) is written against
`Tree` and the protocol `Volume` only.

Order of entries, on which every server may rely:
  1  entry 0 is the root directory, its own parent, with an empty name;
  2  the children of one directory are neighbours, sorted by the bytes of their names (unsigned, shorter first);
  3  groups of children come in the order of their directories, so `parent` never decreases and a parent is always
     earlier than its children;
  4  the data of files lie in the order of entries, each file from a multiple of 4,096 bytes on; there are no overlaps.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol, runtime_checkable

CHUNK: Final = 64 * 1024
"""Bytes of plaintext per record. 4 KiB loses a factor of 2.7 in AES speed, 1 MiB gains 8 % and makes a random read slow."""

BLOCK: Final = 4096
"""Files start at multiples of this: the block of EROFS and the page of the kernel."""

NAME_MAX: Final = 255
"""Longest name of an entry in bytes (Linux NAME_MAX, EROFS_NAME_LEN)."""

TARGET_MAX: Final = 4095
"""Longest target of a symbolic link in bytes (Linux PATH_MAX without the NUL)."""


class Kind(IntEnum):
    """What an entry is; the numbers are EROFS file types (erofs_fs.h, EROFS_FT_*)."""

    FILE = 1
    DIRECTORY = 2
    SYMLINK = 7


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a `Tree`. `data_off` and `size` are bytes of the linear space; `target` is set for links only."""

    index: int
    parent: int
    kind: Kind
    mode: int
    mtime_ns: int
    size: int
    data_off: int
    name: bytes
    target: bytes


@dataclass(frozen=True, slots=True)
class Tree:
    """All entries of a volume in columns of equal length; see the module for their order.

    `kind` holds `Kind` numbers, `mode` the nine permission bits, `mtime_ns` nanoseconds since 1970 (may be negative), `size` bytes (a
    link: length of its target; a directory: 0), `data_off` the first byte in the linear space (0 for what has no data).
    The name of entry i is `names[name_off[i]:name_off[i + 1]]`. An existing `Tree` is valid: `format.decode_manifest` is the judge.
    """

    parent: Sequence[int]  # (N,) u32
    kind: Sequence[int]  # (N,) u8
    mode: Sequence[int]  # (N,) u16
    mtime_ns: Sequence[int]  # (N,) i64
    size: Sequence[int]  # (N,) u64
    data_off: Sequence[int]  # (N,) u64
    name_off: Sequence[int]  # (N + 1,) u64
    names: bytes
    targets: Mapping[int, bytes]

    def __len__(self) -> int:
        return len(self.parent)

    def name(self, index: int) -> bytes:
        """Name of one entry; empty for the root."""
        return self.names[self.name_off[index] : self.name_off[index + 1]]

    def target(self, index: int) -> bytes:
        """Target of a symbolic link, empty for everything else."""
        return self.targets.get(index, b"")

    def entry(self, index: int) -> Entry:
        """One row."""
        return Entry(
            index=index,
            parent=self.parent[index],
            kind=Kind(self.kind[index]),
            mode=self.mode[index],
            mtime_ns=self.mtime_ns[index],
            size=self.size[index],
            data_off=self.data_off[index],
            name=self.name(index),
            target=self.target(index),
        )

    def path(self, index: int) -> bytes:
        """Path of one entry below the root, without a leading slash; empty for the root."""
        parts = []
        while index:
            parts.append(self.name(index))
            index = self.parent[index]
        return b"/".join(reversed(parts))

    def children(self, index: int) -> range:
        """Entries in directory `index`, sorted by name; empty for a file."""
        # Entry 0 is its own parent, hence the search starts at 1.
        first = bisect_left(self.parent, index, 1)
        return range(first, bisect_right(self.parent, index, first))

    def lookup(self, directory: int, name: bytes) -> int | None:
        """Index of the child `name` of `directory`, or None."""
        children = self.children(directory)
        at = bisect_left(children, name, key=self.name)
        if at < len(children) and self.name(children[at]) == name:
            return children[at]
        return None

    def find(self, path: str | bytes) -> int | None:
        """Index of the entry at `path` below the root (no links followed, no `..`), or None. Text is UTF-8 with surrogate escapes."""
        data = path.encode("utf-8", "surrogateescape") if isinstance(path, str) else path
        index: int | None = 0
        for part in data.split(b"/"):
            if part in (b"", b"."):
                continue
            if index is None:
                return None
            index = self.lookup(index, part)
        return index


@runtime_checkable
class Volume(Protocol):
    """An open, authenticated volume. Reads may run in many threads, and in processes forked after opening."""

    @property
    def tree(self) -> Tree:
        """The validated tree."""
        ...

    @property
    def data_len(self) -> int:
        """Bytes of the linear plaintext space, a multiple of `chunk`; 0 if no file has data."""
        ...

    @property
    def chunk(self) -> int:
        """Bytes of plaintext per record: reads of whole aligned chunks are the cheapest."""
        ...

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill `into` (writable, contiguous, bytes) from `offset` of the linear space.

        Raises:
            TamperedError: code `volume-tampered`; `into` then holds nothing that may be used.
            ValueError: the range does not lie within 0..data_len.
        """
        ...

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; errors as in `read_into`."""
        ...
