"""Read what a dead job left in an output folder: regular files only, nothing followed, nothing larger than declared.

Every entry is opened relative to the folder's descriptor, which the holder passed when the job had not yet started,
with O_NOFOLLOW | O_NONBLOCK | O_NOCTTY. All violations are reported together. Nobody changes the folder meanwhile:
the kernel has ended every process of the jail before anything is read.

Names, numbers and sizes are words of the program: a refusal that repeats them is a way out for data. It says only which rules were
broken, unless the caller asks for `names` because whoever reads the refusal may read the program's words.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from cloister.errors import InputError, Reason

MAX_DEPTH: Final = 32
PATH_MAX: Final = 4095
"""Longest path below an output in bytes, as in a sealed volume."""
_TIME_LIMIT: Final = 1 << 63  # nanoseconds, as in a sealed volume
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_KINDS: Final = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One regular file: its path relative to the output folder, its size, and whether its owner may execute it."""

    path: str
    size_bytes: int
    executable: bool


@dataclass(frozen=True, slots=True)
class Output:
    """A folder that passed: `files` and `folders` sorted by path (relative, `/` between the parts)."""

    name: str
    descriptor: int
    files: tuple[OutputFile, ...]
    folders: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def open(self, path: str) -> BinaryIO:
        """Open one of `files` for reading, without following any link on the way.

        Raises:
            ValueError: `path` is none of `files`.
        """
        if all(file.path != path for file in self.files):
            raise ValueError(f"output {self.name} has no file {path!r}")
        *folders, last = path.split("/")
        folder = os.dup(self.descriptor)
        try:
            for part in folders:
                inner = os.open(part, _OPEN | os.O_DIRECTORY, dir_fd=folder)
                os.close(folder)
                folder = inner
            return os.fdopen(os.open(last, _OPEN, dir_fd=folder), "rb")
        finally:
            os.close(folder)

    def copy_to(self, target: Path) -> None:
        """Copy everything into the existing folder `target`: data and the execute bit, nothing else."""
        for folder in self.folders:
            (target / folder).mkdir()
        for file in self.files:
            with self.open(file.path) as source, (target / file.path).open("xb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
                os.fchmod(copy.fileno(), 0o755 if file.executable else 0o644)


def check(name: str, descriptor: int, *, size_bytes: int, max_files: int, names: bool = False) -> Output:
    """Return what lies in the output folder behind `descriptor`.

    Raises:
        InputError: code `source-unsealable`, one reason for each kind of entry (with `names`: each entry) that is no
            regular file or folder, has a second name, cannot be read, is named in bytes that are not UTF-8, lies too deep,
            or has a path or a time that no volume holds; and for too much in total.
    """
    reasons: list[Reason] = []
    files: list[OutputFile] = []
    folders: list[str] = []
    total = 0
    for path, info in _walk(descriptor, "", 1, reasons):
        if stat.S_ISDIR(info.st_mode):
            folders.append(path)
        else:
            files.append(OutputFile(path, info.st_size, bool(info.st_mode & stat.S_IXUSR)))
            total += info.st_size
    where, entries = f"/out/{name}", len(files) + len(folders)
    if not names:
        reasons = list(dict.fromkeys(Reason(where, reason.found, reason.wanted) for reason in reasons))
    if total > size_bytes:
        found = f"{total} bytes" if names else "more"
        reasons.append(Reason(where, found, f"at most {size_bytes} bytes", "see the contract"))
    if entries > max_files:
        reasons.append(Reason(where, f"{entries} entries" if names else "more", f"at most {max_files} entries"))
    if reasons:
        raise InputError(
            f"output {name!r} of the confined program cannot be taken over",
            code="source-unsealable",
            reasons=reasons,
        )
    return Output(name, descriptor, tuple(sorted(files, key=lambda file: file.path)), tuple(sorted(folders)))


def _walk(folder: int, prefix: str, depth: int, reasons: list[Reason]) -> Iterator[tuple[str, os.stat_result]]:
    for name in sorted(os.listdir(folder)):
        path = prefix + name
        shown = repr(path)
        try:
            name.encode()
        except UnicodeEncodeError:
            reasons.append(Reason(shown, "a name that is not UTF-8", "a name in UTF-8"))
            continue
        info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if len(path.encode()) > PATH_MAX:
            reasons.append(Reason(shown, "a path of too many bytes", f"at most {PATH_MAX} bytes"))
            continue
        if not -_TIME_LIMIT <= info.st_mtime_ns < _TIME_LIMIT:
            reasons.append(
                Reason(shown, "a time of change outside the years 1677..2262", "a time that 64 bits can hold")
            )
            continue
        if stat.S_ISDIR(info.st_mode):
            if depth >= MAX_DEPTH:
                reasons.append(Reason(shown, "a folder too deep", f"at most {MAX_DEPTH} levels"))
                continue
            try:
                inner = os.open(name, _OPEN | os.O_DIRECTORY, dir_fd=folder)
            except PermissionError:
                reasons.append(Reason(shown, "a folder without read permission", "a readable folder"))
                continue
            try:
                yield path, info
                yield from _walk(inner, path + "/", depth + 1, reasons)
            finally:
                os.close(inner)
        elif not stat.S_ISREG(info.st_mode):
            reasons.append(Reason(shown, _KINDS[stat.S_IFMT(info.st_mode)], "a regular file"))
        elif info.st_nlink != 1:
            reasons.append(Reason(shown, "a file with 2 names or more (hard links)", "a file with one name"))
        else:
            try:
                os.close(os.open(name, _OPEN, dir_fd=folder))
            except PermissionError:
                reasons.append(Reason(shown, "a file without read permission", "a readable file"))
                continue
            yield path, info
