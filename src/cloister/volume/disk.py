"""Edge: the few changes that a volume makes to a disk, each atomic or harmless, and errors in Cloister's words.

A new volume grows in `<target>.sealing-<random>` beside its target (an extracted one in `.opening-`), under an exclusive lock
(flock) of that folder. Nothing looks there; only when all of it is on the disk is it given its name in one step (renameat2: NOREPLACE for a new
volume, EXCHANGE for a successor). A killed process drops its lock, so `leftovers` can tell dead folders from growing ones.

Every change goes through one method of `Disk`: tests fail or stop each of them in turn.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from cloister.errors import InputError, MachineError

SEALING: Final = ".sealing-"
OPENING: Final = ".opening-"
_AT_FDCWD: Final = -100  # <fcntl.h>
_RENAME_NOREPLACE: Final = 1  # <linux/fs.h>
_RENAME_EXCHANGE: Final = 2
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_YOURS: Final = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EROFS,
        errno.ENAMETOOLONG,
        errno.EEXIST,
        errno.ENOTEMPTY,
        errno.EISDIR,
        errno.ELOOP,
    }
)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Translate the OSErrors of making `target`.

    Raises:
        MachineError: code `disk-full`, or `machine` for what the disk could not do.
        InputError: `target` cannot be made there at all (no such folder, no permission, exists).
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _FULL:
            raise MachineError(
                f"{target}: the disk is full; nothing was changed",
                code="disk-full",
                hint="free some space, or write to another disk",
            ) from error
        if error.errno in _YOURS:
            raise InputError(f"{target} cannot be written: {reason}; nothing was changed") from error
        raise MachineError(f"{target} cannot be written: {reason}; nothing was changed") from error


def _renameat2(old: Path, new: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(old), None, str(new))


class Disk:
    """Changes to a disk. Methods raise OSError; `writing` translates."""

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def create(self, path: Path) -> int:
        """A descriptor of a new file."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)

    def write(self, descriptor: int, data: memoryview | bytes) -> None:
        """Write all of `data`."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def write_file(self, path: Path, data: bytes) -> None:
        """A new, durable file."""
        descriptor = self.create(path)
        try:
            self.write(descriptor, data)
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def name(self, temporary: Path, target: Path) -> None:
        """Give a finished folder its name; FileExistsError if the name is taken."""
        try:
            _renameat2(temporary, target, _RENAME_NOREPLACE)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
            # A file system without RENAME_NOREPLACE. rename(2) replaces an empty folder at most: nothing can be lost.
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
            temporary.rename(target)

    def exchange(self, temporary: Path, target: Path) -> None:
        """Swap two folders in one step: every reader sees the old volume or the new one."""
        try:
            _renameat2(temporary, target, _RENAME_EXCHANGE)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
            raise MachineError(
                f"{target}: this file system cannot swap two folders in one step; nothing was changed",
                hint="write the new generation to a new name, or use ext4, xfs, btrfs or tmpfs",
            ) from error

    def replace_file(self, temporary: Path, target: Path) -> None:
        temporary.replace(target)

    def remove(self, path: Path) -> None:
        """Remove a folder and everything in it."""
        shutil.rmtree(path)

    def remove_file(self, path: Path) -> None:
        path.unlink()


def _lock(path: Path) -> int | None:
    """A descriptor that holds the exclusive lock of a folder, or None if another process holds it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def leftovers(target: Path, mark: str = SEALING) -> list[Path]:
    """Folders in which a process that is gone was making `target`."""
    found = []
    with os.scandir(target.parent) as siblings:
        for sibling in siblings:
            if sibling.name.startswith(target.name + mark) and sibling.is_dir(follow_symlinks=False):
                path = target.parent / sibling.name
                descriptor = _lock(path)
                if descriptor is not None:
                    os.close(descriptor)
                    found.append(path)
    return found


@contextmanager
def growing(target: Path, disk: Disk, mark: str = SEALING) -> Iterator[Path]:
    """A locked, empty folder beside `target`; removed at the end unless it was given a name by then.

    Folders left by killed processes go first.
    """
    for dead in leftovers(target, mark):
        disk.remove(dead)
    temporary = target.with_name(f"{target.name}{mark}{secrets.token_hex(8)}")
    disk.make_folder(temporary)
    descriptor = None
    try:
        descriptor = _lock(temporary)
        yield temporary
    finally:
        # After an exchange the old volume is here; after a failure the unfinished one. A failure to remove it is
        # no failure of the seal: the next one tries again.
        try:
            with suppress(OSError):
                if temporary.exists():
                    disk.remove(temporary)
        finally:
            if descriptor is not None:
                os.close(descriptor)
