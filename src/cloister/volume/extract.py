"""Edge: write the tree of a volume as ordinary files.

The tree is valid, yet its owner may be hostile: every entry is made new (O_EXCL) below a folder that we opened without
following links, so nothing outside `target` can be touched. Contents, names, links, the nine permission bits and times of change
come back; owners are whoever extracts. `target` appears when all of it is there, or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cloister.errors import InputError
from cloister.volume.disk import OPENING, Disk, growing, writing
from cloister.volume.types import CHUNK, Kind, Volume

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_WINDOW: Final = 16 * CHUNK

Progress = Callable[[int, int], None]


def extract(volume: Volume, target: Path, *, progress: Progress | None = None, disk: Disk | None = None) -> None:
    """Write the tree of `volume` as the new folder `target`; it is not synced to the disk.

    Raises:
        TamperedError: code `volume-tampered`.
        InputError: `target` exists or cannot be made.
        MachineError: code `disk-full`, or `machine`.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100  # resolve() would follow a link at the target itself
    if os.path.lexists(target):
        raise InputError(f"{target} exists", hint="choose a new folder")
    disk = disk or Disk()
    with writing(target), growing(target, disk, OPENING) as temporary:
        root = os.open(temporary, _FOLDER)
        try:
            _Extraction(volume, root, disk, progress).run()
        finally:
            os.close(root)
        disk.name(temporary, target)


class _Extraction:
    def __init__(self, volume: Volume, root: int, disk: Disk, progress: Progress | None) -> None:
        self._volume, self._root, self._disk, self._progress = volume, root, disk, progress
        self._window = memoryview(bytearray(_WINDOW))
        self._start = self._end = 0  # what part of the linear space the window holds

    def run(self) -> None:
        tree = self._volume.tree
        folders = [index for index in range(len(tree)) if tree.kind[index] == Kind.DIRECTORY]
        for folder in folders:
            descriptor = self._open(folder)
            try:
                for child in tree.children(folder):
                    self._entry(descriptor, child)
            finally:
                os.close(descriptor)
        for folder in reversed(
            folders
        ):  # last, because a folder's time changes while it is filled, and it may be read-only
            descriptor = self._open(folder)
            try:
                self._dress(descriptor, folder)
            finally:
                os.close(descriptor)

    def _open(self, folder: int) -> int:
        return os.open(self._volume.tree.path(folder) or b".", _FOLDER, dir_fd=self._root)

    def _dress(self, descriptor: int, index: int) -> None:
        tree = self._volume.tree
        os.fchmod(descriptor, tree.mode[index])
        os.utime(descriptor, ns=(tree.mtime_ns[index], tree.mtime_ns[index]))

    def _entry(self, folder: int, index: int) -> None:
        tree = self._volume.tree
        name = tree.name(index)
        if tree.kind[index] == Kind.DIRECTORY:
            os.mkdir(name, 0o700, dir_fd=folder)
        elif tree.kind[index] == Kind.SYMLINK:
            os.symlink(tree.target(index), name, dir_fd=folder)
            time = tree.mtime_ns[index]
            os.utime(name, ns=(time, time), dir_fd=folder, follow_symlinks=False)
        else:
            descriptor = os.open(name, _NEW_FILE, 0o600, dir_fd=folder)
            try:
                self._data(descriptor, tree.data_off[index], tree.size[index])
                self._dress(descriptor, index)
            finally:
                os.close(descriptor)

    def _data(self, descriptor: int, offset: int, size: int) -> None:
        end = offset + size
        while offset < end:
            if not self._start <= offset < self._end:
                self._load(offset)
            part = self._window[offset - self._start : min(end, self._end) - self._start]
            self._disk.write(descriptor, part)
            offset += len(part)

    def _load(self, offset: int) -> None:
        start = offset // CHUNK * CHUNK
        self._start = self._end = 0
        end = min(start + _WINDOW, self._volume.data_len)
        self._volume.read_into(start, self._window[: end - start])
        self._start, self._end = start, end
        if self._progress:
            self._progress(end, self._volume.data_len)
