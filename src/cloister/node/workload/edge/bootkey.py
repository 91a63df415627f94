"""A key that lives as long as this boot of the machine: whoever has the disk, but not this memory, does not have it.

    folder on a tmpfs, this user's alone or sticky -> file of 32 random bytes, 0600, made once -> Secret
    no such folder                                 -> a key of this process: what it vouches for is made anew next time

In a confidential VM the tmpfs is memory of the VM. What the operator writes to its disk, running or not, has no valid MAC.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from cloister.crypto.keys import KEY_BYTES, Secret

_MEMORY: Final = frozenset({0x01021994, 0x858458F6})  # TMPFS_MAGIC, RAMFS_MAGIC (linux/magic.h)
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_libc: Final = ctypes.CDLL(None, use_errno=True)


def places() -> tuple[Path, ...]:
    """Return the folders to try, best first."""
    own = [Path("/run")] if os.geteuid() == 0 else [Path(f"/run/user/{os.geteuid()}")]
    return (*own, Path("/dev/shm"))  # noqa: S108 -- sticky, and only a file of this user is believed


def boot_key(folders: tuple[Path, ...] | None = None) -> Secret:
    """Return this user's key of this boot; makes it at first use. `folders`: see `places`."""
    for folder in places() if folders is None else folders:
        with suppress(OSError, ValueError):
            descriptor = os.open(folder, _FOLDER)
            try:
                _check_folder(descriptor)
                return _key(descriptor)
            finally:
                os.close(descriptor)
    return Secret.random()


def in_memory(folder: Path) -> bool:
    """Whether `folder` (or the nearest folder above it that exists) is on a tmpfs or ramfs."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    descriptor = os.open(there, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _kind(descriptor) in _MEMORY
    finally:
        os.close(descriptor)


def _check_folder(descriptor: int) -> None:
    """Raise ValueError unless the folder is in memory and nobody else can exchange our files in it."""
    found = os.fstat(descriptor)
    mine = found.st_uid in (0, os.geteuid()) and (not found.st_mode & 0o022 or found.st_mode & stat.S_ISVTX)
    if not mine or _kind(descriptor) not in _MEMORY:
        raise ValueError("no private folder in memory")


def _kind(descriptor: int) -> int:
    """`f_type` of fstatfs(2), the first word of its answer."""
    answer = (ctypes.c_ulong * 64)()
    if _libc.fstatfs(descriptor, answer) != 0:
        raise OSError(ctypes.get_errno(), "fstatfs")
    return int(answer[0]) & 0xFFFFFFFF


def _key(folder: int) -> Secret:
    name = f".cloister-stage-key-{os.geteuid()}"
    with suppress(FileNotFoundError):
        return _read(folder, name)
    temporary = f"{name}.{secrets.token_hex(8)}"
    descriptor = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder
    )
    try:
        os.write(descriptor, secrets.token_bytes(KEY_BYTES))
        with suppress(FileExistsError):  # another process was first: its key counts
            os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    finally:
        os.close(descriptor)
        os.unlink(temporary, dir_fd=folder)
    return _read(folder, name)


def _read(folder: int, name: str) -> Secret:
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        found = os.fstat(descriptor)
        private = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
        if not private or found.st_size != KEY_BYTES:
            raise ValueError("not our key")
        return Secret(os.read(descriptor, KEY_BYTES))
    finally:
        os.close(descriptor)
