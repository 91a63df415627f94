"""The FUSE kernel protocol as bytes: struct layouts, opcodes, flags. Pure; no file is opened here.

Source: Linux `include/uapi/linux/fuse.h`, protocol 7.23 (first with 64-byte INIT reply) to 7.45. All integers are
little-endian here: Cloister's TEEs are, and the kernel speaks its own byte order.

A conversation, in this order:
  1 INIT      the kernel's first message; `negotiate` picks flags from what it offers, `init_reply` answers
  2 requests  `in_header` + a body per opcode; `out_header` + a body answers, with the same `unique`
  3 silence   FORGET, BATCH_FORGET and INTERRUPT are never answered
  4 ENODEV    from read(2) on the device: the file system was unmounted
A request that does not parse raises `MalformedRequestError`; nothing is guessed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from cloister.errors import MachineError, Reason

Buffer = bytes | bytearray | memoryview

ROOT_NODEID: Final = 1  # FUSE_ROOT_ID
MAJOR: Final = 7
OLDEST_MINOR: Final = 31  # Linux 5.4: FUSE_NO_OPENDIR_SUPPORT, CACHE_SYMLINKS, MAX_PAGES are all there
NEWEST_MINOR: Final = 40  # what this server implements; the kernel adapts to the smaller of both
MAX_PAGES: Final = 256  # fs.fuse.max_pages_limit default: requests of at most 1 MiB
PAGE: Final = 4096
MAX_READ: Final = MAX_PAGES * PAGE
MAX_WRITE: Final = 4096  # smallest value the kernel accepts; nothing is ever written here
REQUEST_BUFFER: Final = 64 * 1024  # >= FUSE_MIN_READ_BUFFER (8192) and >= MAX_WRITE + headers; names are <= 1 KiB
MAX_NAME: Final = 255  # NAME_MAX

CLONE_IOCTL: Final = 0x8004E500  # FUSE_DEV_IOC_CLONE = _IOR(229, 0, u32)
NOTIFY_RESEND: Final = 7  # FUSE_NOTIFY_RESEND, Linux 6.9
UNIQUE_RESEND: Final = 1 << 63  # set in `unique` of a request that is delivered again


class Opcode(IntEnum):
    """Opcodes that a read-only server answers with more than ENOSYS (fuse.h `enum fuse_opcode`)."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READLINK = 5
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    BATCH_FORGET = 42
    READDIRPLUS = 44


class Init(IntFlag):
    """INIT capability bits; bits 32 and up travel in `flags2`."""

    ASYNC_READ = 1 << 0
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    INIT_EXT = 1 << 30
    HAS_RESEND = 1 << 39


REQUIRED: Final = Init.NO_OPEN_SUPPORT | Init.NO_OPENDIR_SUPPORT | Init.MAX_PAGES
WANTED: Final = (
    REQUIRED
    | Init.ASYNC_READ
    | Init.DO_READDIRPLUS
    | Init.READDIRPLUS_AUTO
    | Init.ASYNC_DIO
    | Init.PARALLEL_DIROPS
    | Init.CACHE_SYMLINKS
    | Init.EXPLICIT_INVAL_DATA
    | Init.INIT_EXT
    | Init.HAS_RESEND
)

# Names are those of fuse.h; the format strings are public so that the server can pack into preallocated buffers.
IN_HEADER: Final = struct.Struct("<IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER: Final = struct.Struct("<IiQ")  # len, error (-errno), unique
READ_IN: Final = struct.Struct("<QQI")  # fh, offset, size (first 20 of 40 bytes); also READDIR and READDIRPLUS
READ_IN_BYTES: Final = 40
INIT_IN: Final = struct.Struct("<IIIII")  # major, minor, max_readahead, flags, flags2 (first 20 of 64 bytes)
INIT_OUT: Final = struct.Struct("<IIIIHHIIHHI28x")
ATTR: Final = struct.Struct(
    "<6Q10I"
)  # ino size blocks atime mtime ctime | 3 nsec, mode nlink uid gid rdev blksize flags
ATTR_OUT: Final = struct.Struct("<QII6Q10I")  # attr_valid, attr_valid_nsec, dummy, attr
ENTRY_OUT: Final = struct.Struct("<4QII6Q10I")  # nodeid generation entry_valid attr_valid | 2 nsec | attr
DIRENT: Final = struct.Struct("<QQII")  # ino, off (where the next one starts), namelen, type; then the name
STATFS_OUT: Final = struct.Struct("<5Q4I24x")  # blocks bfree bavail files ffree | bsize namelen frsize padding

DT_DIR: Final = 4  # dirent types, stat.S_IFMT >> 12
DT_REG: Final = 8
DT_LNK: Final = 10

FOREVER_S: Final = 86_400 * 365  # entry and attribute lifetime: the volume cannot change under a mount


class MalformedRequestError(ValueError):
    """Bytes from the device that are no FUSE request: the protocol is out of step and cannot go on."""


@dataclass(frozen=True, slots=True)
class Request:
    """`in_header` of a request; `body` is what follows it, extensions included."""

    opcode: int
    unique: int
    nodeid: int
    body: memoryview


def parse_request(data: Buffer) -> Request:
    """Split one read(2) from the device.

    Raises:
        MalformedRequestError: shorter than a header, or the header's length is not the message's.
    """
    if len(data) < IN_HEADER.size:
        raise MalformedRequestError(f"{len(data)} bytes from the FUSE device, a header has {IN_HEADER.size}")
    length, opcode, unique, nodeid, *_ = IN_HEADER.unpack_from(data)
    if length != len(data):
        raise MalformedRequestError(f"a FUSE request says {length} bytes and has {len(data)}")
    return Request(opcode, unique, nodeid, memoryview(data)[IN_HEADER.size :])


def parse_name(body: Buffer) -> bytes:
    """The one NUL-terminated name in the body of LOOKUP; what follows the NUL is an extension and ignored.

    Raises:
        MalformedRequestError: no NUL, or an empty name.
    """
    name, end, _ = bytes(body).partition(b"\0")
    if not end or not name:
        raise MalformedRequestError("a FUSE request carries no name")
    return name


def parse_read(body: Buffer) -> tuple[int, int]:
    """`offset, size` of READ, READDIR or READDIRPLUS.

    Raises:
        MalformedRequestError: the body is shorter than `struct fuse_read_in`.
    """
    if len(body) < READ_IN_BYTES:
        raise MalformedRequestError(f"a FUSE read request of {len(body)} bytes, wants {READ_IN_BYTES}")
    _, offset, size = READ_IN.unpack_from(body)
    return offset, size


def reply(unique: int, *parts: Buffer) -> bytes:
    """A successful answer in one piece. The server's read path uses writev with slices instead."""
    body = b"".join(parts)
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def error_reply(unique: int, errno: int) -> bytes:
    """An answer that makes the system call fail with `errno` (positive)."""
    if not 0 < errno < 1000:
        raise ValueError(f"errno {errno} cannot be sent")
    return OUT_HEADER.pack(OUT_HEADER.size, -errno, unique)


def resend_notice() -> bytes:
    """Asks the kernel to deliver again every request that was read from the device and not answered."""
    return OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0)


@dataclass(frozen=True, slots=True)
class Offer:
    """What the kernel can do: its INIT request."""

    unique: int
    major: int
    minor: int
    max_readahead: int  # bytes
    flags: Init


@dataclass(frozen=True, slots=True)
class Session:
    """What both sides agreed on."""

    minor: int
    max_readahead: int  # bytes
    flags: Init

    @property
    def can_resend(self) -> bool:
        """True if a worker that died can be replaced without a reader noticing."""
        return Init.HAS_RESEND in self.flags


def parse_init(data: Buffer) -> Offer:
    """Read the kernel's first message.

    Raises:
        MalformedRequestError: not an INIT request of protocol 7.
    """
    request = parse_request(data)
    if request.opcode != Opcode.INIT or len(request.body) < 16:
        raise MalformedRequestError(f"the first FUSE request has opcode {request.opcode}, wants INIT")
    head = bytes(request.body[: INIT_IN.size]).ljust(INIT_IN.size, b"\0")
    major, minor, max_readahead, low, high = INIT_IN.unpack(head)
    if not low & Init.INIT_EXT:
        high = 0  # before 7.36 the word is not defined
    return Offer(request.unique, major, minor, max_readahead, Init(low | high << 32))


def negotiate(offer: Offer) -> Session:
    """Choose flags: everything we want and the kernel offers, and nothing that it does not.

    Raises:
        MachineError: no-mount, the kernel is too old for message-free opens (before Linux 5.4).
    """
    missing = REQUIRED & ~offer.flags
    if offer.major != MAJOR or offer.minor < OLDEST_MINOR or missing:
        names = ", ".join(flag.name or "" for flag in missing)
        raise MachineError(
            "the kernel's FUSE is too old to mount sealed volumes",
            code="no-mount",
            reasons=[
                Reason(
                    "fuse.init",
                    found=f"protocol {offer.major}.{offer.minor}" + (f" without {names}" if names else ""),
                    wanted=f"protocol {MAJOR}.{OLDEST_MINOR} or later",
                    hint="Linux 5.4 or later",
                )
            ],
            hint="use a newer kernel, or extract the volume into memory (docs/mount.md)",
        )
    return Session(min(offer.minor, NEWEST_MINOR), max(offer.max_readahead, MAX_READ), WANTED & offer.flags)


def init_reply(offer: Offer, session: Session) -> bytes:
    """The 80 bytes that answer INIT."""
    flags = int(session.flags)
    body = INIT_OUT.pack(
        MAJOR,
        session.minor,
        session.max_readahead,
        flags & 0xFFFFFFFF,
        64,  # max_background: read-ahead requests in flight; 12 by default
        48,  # congestion_threshold: 3/4 of it, as the kernel's own default ratio
        MAX_WRITE,
        1,  # time_gran: nanoseconds
        MAX_PAGES,
        0,
        flags >> 32,
    )
    return reply(offer.unique, body)


def dirent_size(name_bytes: int) -> int:
    """Bytes of one READDIR record with a name of that length: FUSE_DIRENT_SIZE."""
    return (DIRENT.size + name_bytes + 7) & ~7


def dirent(ino: int, next_offset: int, kind: int, name: bytes) -> bytes:
    """One READDIR record; READDIRPLUS puts an `ENTRY_OUT` before it."""
    return (DIRENT.pack(ino, next_offset, len(name), kind) + name).ljust(dirent_size(len(name)), b"\0")


def statfs(*, data_bytes: int, files: int) -> bytes:
    """A full, read-only file system: no free blocks, no free inodes."""
    return STATFS_OUT.pack(-(-data_bytes // PAGE), 0, 0, files, 0, PAGE, MAX_NAME, PAGE, 0)
