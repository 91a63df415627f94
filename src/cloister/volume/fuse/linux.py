"""The system calls that Python does not have, through ctypes: mount(2), umount2(2), unshare(2), prctl(2), capset(2), mlock2(2).

Each function raises `OSError` with the kernel's errno, or says in its docstring that it is best effort.
Numbers are from the kernel's uapi headers (`linux/mount.h`, `sched.h`, `prctl.h`, `capability.h`), the same on every architecture.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUSER: Final = 0x10000000

_PR_SET_PDEATHSIG: Final = 1
_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_SET_NO_NEW_PRIVS: Final = 38
_CAPABILITY_VERSION_3: Final = 0x20080522
_MLOCK_ONFAULT: Final = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.unshare.argtypes = [ctypes.c_int]
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_libc.mlock2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount(source: bytes, target: bytes, kind: bytes, flags: int, data: bytes) -> None:
    """mount(2)."""
    _check(_libc.mount(source, target, kind, flags, data), "mount")


def umount(target: bytes, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(target, flags), "umount")


def unshare(flags: int) -> None:
    """unshare(2); concerns the calling thread only."""
    _check(_libc.unshare(flags), "unshare")


def make_mounts_private() -> None:
    """`mount --make-rprivate /`: mounts made here do not propagate out, and none propagate in."""
    _check(_libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "mount")


def name_process(name: bytes) -> None:
    """Set what `ps` shows (15 bytes). Best effort."""
    text = ctypes.create_string_buffer(name[:15])
    _libc.prctl(_PR_SET_NAME, ctypes.addressof(text), 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Be killed when the thread that forked us ends. Returns normally only if that process is still `parent`."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parent:  # it ended before the prctl
        os._exit(1)


def forbid_dumps() -> None:
    """No core dump, no ptrace by the same user, /proc/PID/mem for root only."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")


@contextmanager
def dumpable() -> Iterator[None]:
    """Own /proc/self for a moment: a process that forbids dumps may not write its own uid_map (proc(5))."""
    before = _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0)
    _check(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")
    try:
        yield
    finally:
        if before != 1:
            _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")


def drop_privileges() -> None:
    """No capability is left and none can come back; the user id stays."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, nothing), "capset")


def lock_private_memory() -> bool:
    """Keep writable private pages (heap, stacks, buffers) out of swap; best effort, True if every mapping was locked.

    Not mlockall(2): that would also pin the page cache of a mapped ciphertext, all of it.
    """
    complete = True
    with Path("/proc/self/maps").open("rb") as maps:
        lines = maps.read().splitlines()
    for line in lines:
        addresses, permissions, *_ = line.split(None, 2)
        if not (permissions.startswith(b"rw") and permissions.endswith(b"p")):
            continue
        start, stop = (int(part, 16) for part in addresses.split(b"-"))
        complete &= _libc.mlock2(start, stop - start, _MLOCK_ONFAULT) == 0
    return complete


def close_other_fds(keep: set[int]) -> None:
    """Close every descriptor except `keep`."""
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if fd not in keep:
            with suppress(OSError):  # the descriptor of the listing itself is closed by now
                os.close(fd)


def device_of_mount(path: Path) -> str | None:
    """`MAJOR:MINOR` of the file system mounted on top at exactly `path` (absolute), or None. Touches no file system but proc."""
    wanted = os.fsencode(path)
    found = None
    with Path("/proc/self/mountinfo").open("rb") as mounts:
        for line in mounts:
            fields = line.split()
            if _unescape(fields[4]) == wanted:
                found = fields[2].decode("ascii")
    return found


def _unescape(field: bytes) -> bytes:
    """proc(5): space, tab, newline and backslash are written as three octal digits."""
    for code, byte in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\043", b"#"), (b"\\134", b"\\")):
        field = field.replace(code, byte)
    return field
