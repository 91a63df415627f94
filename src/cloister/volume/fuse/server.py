"""Answer the kernel: a validated tree and a linear plaintext space become a read-only file system.

`Server.answer` maps one request to one answer and touches no file descriptor; `Server.serve` moves the bytes.

Rules:
  1 nodeid = index in the tree + 1, so FORGET has nothing to forget and a restarted worker knows every node;
  2 names, attributes, links and data are cached by the kernel without end: a volume never changes under a mount;
  3 OPEN and OPENDIR answer ENOSYS once, then opening costs no message; whatever would write gets EROFS;
  4 a READ decrypts whole chunks into one buffer and sends a slice of it: no copy, no allocation of payload;
  5 a chunk that fails authentication makes the READ fail with EIO and nothing else. Never a short answer: the kernel would
    take it for the end of the file. The kernel then asks again page by page, so exactly the pages that overlap a
    failing chunk stay unreadable. A chunk that failed authentication once is not tried again before the next mount;
  6 bytes that are no request end the worker (`MalformedRequestError`); a body that does not fit its opcode gets EINVAL.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cloister.errors import CloisterError, TamperedError
from cloister.volume.fuse import protocol as p
from cloister.volume.types import Kind, Tree, Volume

_TYPE: Final[dict[int, int]] = {Kind.FILE: stat.S_IFREG, Kind.DIRECTORY: stat.S_IFDIR, Kind.SYMLINK: stat.S_IFLNK}
_READ: Final = int(p.Opcode.READ)
_IOCTL: Final = int(p.Opcode.IOCTL)
_SILENT: Final = frozenset({p.Opcode.FORGET, p.Opcode.BATCH_FORGET, p.Opcode.INTERRUPT})
_DONE: Final = frozenset({p.Opcode.RELEASE, p.Opcode.RELEASEDIR, p.Opcode.DESTROY})
# SETATTR SYMLINK MKNOD MKDIR UNLINK RMDIR RENAME LINK WRITE SETXATTR REMOVEXATTR CREATE FALLOCATE RENAME2 TMPFILE:
# the kernel refuses them itself on a read-only mount; this is for a mount that root made writable.
_WRITING: Final = frozenset({4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 51})
_RETRY: Final = frozenset({errno.EINTR, errno.ENOENT, errno.EAGAIN})  # of read(2): the request went away
_MAX_FAULTS: Final = 4096  # distinct faults one worker reports
_PLUS: Final = p.ENTRY_OUT.size

Parts = Sequence[p.Buffer]


@dataclass(frozen=True, slots=True)
class Fault:
    """A stored record that could not be used while a file was read.

    `path` is below the mount point (surrogateescape), `offset` and `size` the bytes of that file that cannot be read,
    `record` the number of the chunk in the volume, `kind` is `tampered` (fails authentication) or `unreadable`
    (the storage below failed). `str` names the record only: paths and sizes are part of what is sealed, and a message may
    reach whoever stores the volume and broke the record to see them.
    """

    path: str
    offset: int
    size: int
    record: int
    kind: str

    def __str__(self) -> str:
        return f"record {self.record} is {self.kind}"


class Server:
    """Answers for one volume. Not thread-safe: one per worker process.

    `uid` and `gid` own everything; `report` is called once per fault.
    """

    def __init__(
        self, volume: Volume, *, uid: int = 0, gid: int = 0, report: Callable[[Fault], None] | None = None
    ) -> None:
        self._read_into = volume.read_into
        self._tree: Tree = volume.tree
        self._size, self._data_off, self._kind = self._tree.size, self._tree.data_off, self._tree.kind
        self._nodes = len(self._tree)
        self._data_len = volume.data_len
        self._chunk = volume.chunk
        self._uid, self._gid = uid, gid
        self._report = report
        self._reported: set[tuple[int, int]] = set()
        self._tampered: set[int] = set()  # numbers of chunks
        self._subdirs = _count_subdirectories(self._tree)
        self._children = lru_cache(maxsize=1024)(self._tree.children)
        # Whole chunks of the plaintext [_from, _to) lie at the start of _window. Two chunks more than the longest READ.
        self._window = memoryview(_private_pages(p.MAX_READ + 2 * self._chunk))
        self._from = self._to = 0
        self._header = bytearray(p.OUT_HEADER.size)

    def serve(self, fd: int) -> None:
        """Answer requests from the FUSE device `fd` until the file system is unmounted or the connection is aborted.

        Raises:
            MalformedRequestError: the device delivered something that is no request.
            OSError: the device failed in a way that is not an end.
        """
        request = memoryview(_private_pages(p.REQUEST_BUFFER))
        readv, writev, answer, parts_in = os.readv, os.writev, self.answer, [request]
        while True:
            try:
                size = readv(fd, parts_in)
            except OSError as error:
                if error.errno in _RETRY:
                    continue
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    return
                raise
            if size == 0:
                return
            parts = answer(request[:size])
            if parts is None:
                continue
            try:
                writev(fd, parts)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno != errno.ENOENT:  # ENOENT: the reader was killed, or another worker answered
                    raise

    def answer(self, data: memoryview) -> Parts | None:
        """The answer to one message from the kernel, or None if it gets none.

        The parts stay valid until the next call.

        Raises:
            MalformedRequestError: `data` is no FUSE request at all.
        """
        # Two requests are worth a shortcut: READ (header 40 + body 40), and the IOCTL of isatty(), which Python sends at every open().
        if len(data) >= 72:
            length, opcode, unique, nodeid, *_ = p.IN_HEADER.unpack_from(data)
            if length == len(data):
                if opcode == _READ and length >= 80:
                    _, offset, size = p.READ_IN.unpack_from(data, 40)
                    return self._answer_read(unique, nodeid - 1, offset, size)
                if opcode == _IOCTL:
                    p.OUT_HEADER.pack_into(self._header, 0, 16, -errno.ENOTTY, unique)
                    return (self._header,)
        request = p.parse_request(data)
        opcode, unique = request.opcode, request.unique
        if opcode in _SILENT:
            return None
        try:
            body = self._dispatch(opcode, request.nodeid - 1, request.body)
        except OSError as error:
            return (p.error_reply(unique, error.errno or errno.EIO),)
        except p.MalformedRequestError:
            return (p.error_reply(unique, errno.EINVAL),)
        return (p.reply(unique, body),)

    def _dispatch(self, opcode: int, index: int, body: memoryview) -> bytes:
        """The body of an answer. Raises OSError with the errno to send."""
        if opcode == p.Opcode.STATFS:
            return p.statfs(data_bytes=self._data_len, files=self._nodes)
        if opcode == p.Opcode.IOCTL:
            raise OSError(errno.ENOTTY, "")
        if opcode in _DONE:
            return b""
        if opcode in _WRITING:
            raise OSError(errno.EROFS, "")
        if opcode not in (
            p.Opcode.LOOKUP,
            p.Opcode.GETATTR,
            p.Opcode.READLINK,
            p.Opcode.READ,
            p.Opcode.READDIR,
            p.Opcode.READDIRPLUS,
        ):
            raise OSError(errno.ENOSYS, "")  # OPEN, OPENDIR, FLUSH, xattrs, locks ...: the kernel does not ask again
        if not 0 <= index < self._nodes:
            raise OSError(errno.ESTALE, "")
        if opcode == p.Opcode.GETATTR:
            return p.ATTR_OUT.pack(p.FOREVER_S, 0, 0, *self._attr(index))
        if opcode == p.Opcode.READLINK:
            if self._kind[index] != Kind.SYMLINK:
                raise OSError(errno.EINVAL, "")
            return self._tree.target(index)
        if opcode == p.Opcode.READ:
            raise p.MalformedRequestError("a READ request that is too short")
        if self._kind[index] != Kind.DIRECTORY:
            raise OSError(errno.ENOTDIR, "")
        if opcode == p.Opcode.LOOKUP:
            return self._lookup(index, p.parse_name(body))
        offset, size = p.parse_read(body)
        return self._readdir(index, offset, min(size, p.MAX_READ), plus=opcode == p.Opcode.READDIRPLUS)

    def _attr(self, index: int) -> tuple[int, ...]:
        """`struct fuse_attr` of one node. Readable by all, executable if the owner said so, writable by nobody."""
        tree = self._tree
        kind = tree.kind[index]
        size = tree.size[index]
        if kind == Kind.FILE:
            mode, nlink = 0o555 if tree.mode[index] & 0o111 else 0o444, 1
        elif kind == Kind.DIRECTORY:
            mode, nlink, size = 0o555, 2 + self._subdirs.get(index, 0), p.PAGE
        else:
            mode, nlink, size = 0o777, 1, len(tree.target(index))
        seconds, nanoseconds = divmod(tree.mtime_ns[index], 1_000_000_000)
        seconds &= 0xFFFFFFFFFFFFFFFF  # two's complement: before 1970
        return (
            *(index + 1, size, -(-size // 512), seconds, seconds, seconds, nanoseconds, nanoseconds, nanoseconds),
            *(mode | _TYPE[kind], nlink, self._uid, self._gid, 0, p.PAGE, 0),
        )

    def _entry(self, index: int) -> bytes:
        return p.ENTRY_OUT.pack(index + 1, 0, p.FOREVER_S, p.FOREVER_S, 0, 0, *self._attr(index))

    def _lookup(self, directory: int, name: bytes) -> bytes:
        """An entry; nodeid 0 with a lifetime for a name that is not there, so that the kernel remembers the absence."""
        if len(name) > p.MAX_NAME:
            raise OSError(errno.ENAMETOOLONG, "")
        children, tree = self._children(directory), self._tree
        low, high = children.start, children.stop
        while low < high:
            middle = (low + high) // 2
            if tree.name(middle) < name:
                low = middle + 1
            else:
                high = middle
        if low < children.stop and tree.name(low) == name:
            return self._entry(low)
        return p.ENTRY_OUT.pack(0, 0, p.FOREVER_S, 0, 0, 0, *(0,) * 16)

    def _readdir(self, directory: int, offset: int, size: int, *, plus: bool) -> bytes:
        """Directory records from cookie `offset` on: 0 is `.`, 1 is `..`, 2 + k the k-th child by name."""
        children, tree = self._children(directory), self._tree
        extra = _PLUS if plus else 0
        parts: list[bytes] = []
        left = size
        for cookie in range(min(offset, len(children) + 2), len(children) + 2):
            if cookie < 2:
                index, name = (directory, b".") if cookie == 0 else (tree.parent[directory], b"..")
            else:
                index = children[cookie - 2]
                name = tree.name(index)
            left -= p.dirent_size(len(name)) + extra
            if left < 0:
                break
            if plus:  # `.` and `..` carry no entry: nodeid 0 tells the kernel to look nothing up
                parts.append(self._entry(index) if cookie >= 2 else bytes(_PLUS))
            parts.append(p.dirent(index + 1, cookie + 1, _TYPE[tree.kind[index]] >> 12, name))
        return b"".join(parts)

    def _answer_read(self, unique: int, index: int, offset: int, size: int) -> Parts:
        if not 0 <= index < self._nodes:
            return (p.error_reply(unique, errno.ESTALE),)
        if self._kind[index] != Kind.FILE or size > p.MAX_READ:
            return (p.error_reply(unique, errno.EINVAL),)
        size = min(size, self._size[index] - offset)
        if size <= 0:
            return (p.reply(unique),)
        start = self._data_off[index] + offset
        stop = start + size
        if start < self._from or stop > self._to:
            chunk = self._chunk
            first, last = start - start % chunk, stop + -stop % chunk
            if self._tampered and not self._tampered.isdisjoint(range(first // chunk, last // chunk)):
                self._explain(index, first, last)
                return (p.error_reply(unique, errno.EIO),)
            # Sequential readers come back for the chunk in which they stopped: it is moved, not decrypted again.
            window, kept = self._window, 0
            if self._from <= first < self._to < last:
                kept = self._to - first
                window[:kept] = window[first - self._from : self._to - self._from]
            self._from = self._to = 0  # the window holds nothing until it is whole
            try:
                self._read_into(first + kept, window[kept : last - first])
            except (CloisterError, OSError):
                self._explain(index, first, last)
                return (p.error_reply(unique, errno.EIO),)
            self._from, self._to = first, last
        begin = start - self._from
        p.OUT_HEADER.pack_into(self._header, 0, 16 + size, 0, unique)
        return (self._header, self._window[begin : begin + size])

    def _explain(self, index: int, first: int, last: int) -> None:
        """Find which chunks of a failed read are at fault, and report each once per file."""
        for start in range(first, last, self._chunk):
            number = start // self._chunk
            if (index, number) in self._reported or len(self._reported) >= _MAX_FAULTS:
                continue
            kind = self._fault_of(number)
            if not kind:
                continue
            self._reported.add((index, number))
            if self._report is not None:
                begin = max(start - self._data_off[index], 0)
                end = min(start + self._chunk - self._data_off[index], self._size[index])
                path = self._tree.path(index).decode("utf-8", "surrogateescape")
                self._report(Fault(path, begin, end - begin, number, kind))

    def _fault_of(self, number: int) -> str:
        """`tampered`, `unreadable`, or nothing if the chunk can be read (now)."""
        if number in self._tampered:
            return "tampered"
        self._from = self._to = 0
        try:
            self._read_into(number * self._chunk, self._window[: self._chunk])
        except TamperedError:
            self._tampered.add(number)
            return "tampered"
        except (CloisterError, OSError):
            return "unreadable"
        return ""


def _private_pages(size: int) -> mmap.mmap:
    """Page-aligned memory that a fork copies (mmap's default would be shared between workers)."""
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _count_subdirectories(tree: Tree) -> dict[int, int]:
    counts: dict[int, int] = {}
    for index, kind in enumerate(tree.kind):
        if kind == Kind.DIRECTORY and index:
            parent = tree.parent[index]
            counts[parent] = counts.get(parent, 0) + 1
    return counts
