"""A volume in memory: the tree and linear space that a server sees, with records that can be made to fail."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cloister.errors import TamperedError
from cloister.volume.types import BLOCK, CHUNK, Kind, Tree


@dataclass(frozen=True, slots=True)
class Node:
    """What one path is: a file with `data`, a link with `target`, or a directory."""

    kind: Kind = Kind.FILE
    data: bytes = b""
    mode: int = 0o644
    mtime_ns: int = 1_700_000_000_123_456_789
    target: bytes = b""


def directory(mode: int = 0o755) -> Node:
    return Node(kind=Kind.DIRECTORY, mode=mode)


def link(target: bytes) -> Node:
    return Node(kind=Kind.SYMLINK, target=target, mode=0o777)


def file(data: bytes, *, mode: int = 0o644, mtime_ns: int = 1_700_000_000_123_456_789) -> Node:
    return Node(data=data, mode=mode, mtime_ns=mtime_ns)


@dataclass(slots=True)
class FakeVolume:
    """Satisfies the `Volume` protocol. `bad` holds numbers of chunks that fail, with the error to raise."""

    tree: Tree
    space: bytes | bytearray | memoryview
    chunk: int = CHUNK
    bad: dict[int, Exception] = field(default_factory=dict)
    poison: int | None = None
    reads: list[tuple[int, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def data_len(self) -> int:
        return len(self.space)

    def read_into(self, offset: int, into: memoryview) -> None:
        size = len(into)
        if offset < 0 or offset + size > len(self.space):
            raise ValueError(f"{offset}+{size} is outside of {len(self.space)}")
        self.reads.append((offset, size))
        for number in range(offset // self.chunk, (offset + size - 1) // self.chunk + 1):
            if number == self.poison:
                raise RuntimeError("a bug below the server")
            if number in self.bad:
                into[:] = b"\xee" * size
                raise self.bad[number]
        into[:] = memoryview(self.space)[offset : offset + size]

    def descriptors(self) -> tuple[int, ...]:
        return ()

    def read(self, offset: int, size: int) -> bytes:
        data = bytearray(size)
        self.read_into(offset, memoryview(data))
        return bytes(data)


def tampered() -> TamperedError:
    return TamperedError("record fails authentication", code="volume-tampered")


def make_volume(nodes: Mapping[bytes, Node], *, chunk: int = CHUNK) -> FakeVolume:
    """Paths below the root -> a volume; parents that are not named are made."""
    every = dict(nodes)
    for path in list(nodes):
        parts = path.split(b"/")
        for depth in range(1, len(parts)):
            every.setdefault(b"/".join(parts[:depth]), directory())
    children: dict[bytes, list[bytes]] = {b"": []}
    for path in every:
        parent, _, name = path.rpartition(b"/")
        children.setdefault(parent, []).append(name)
    rows: list[tuple[int, bytes, Node]] = [(0, b"", directory())]
    paths = [b""]
    at = 0
    while at < len(rows):  # breadth first, children sorted: the order that types.Tree promises
        for name in sorted(children.get(paths[at], ())):
            path = paths[at] + b"/" + name if at else name
            rows.append((at, name, every[path]))
            paths.append(path)
        at += 1
    space = bytearray()
    offsets: list[int] = []
    for _, _, node in rows:
        offsets.append(len(space) if node.data else 0)
        space += node.data
        space += bytes(-len(space) % BLOCK)
    space += bytes(-len(space) % chunk)
    return FakeVolume(_columns(rows, offsets), space, chunk=chunk)


def _columns(rows: Iterable[tuple[int, bytes, Node]], offsets: list[int]) -> Tree:
    parents, names, nodes = zip(*rows, strict=True)
    name_off = [0]
    for name in names:
        name_off.append(name_off[-1] + len(name))
    return Tree(
        parent=array("I", parents),
        kind=array("B", [node.kind for node in nodes]),
        mode=array("H", [node.mode for node in nodes]),
        mtime_ns=array("q", [node.mtime_ns for node in nodes]),
        size=array("Q", [len(node.target) if node.kind == Kind.SYMLINK else len(node.data) for node in nodes]),
        data_off=array("Q", offsets),
        name_off=array("Q", name_off),
        names=b"".join(names),
        targets={index: node.target for index, node in enumerate(nodes) if node.kind == Kind.SYMLINK},
    )
