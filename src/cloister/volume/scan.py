"""Edge: look at a folder that is to be sealed, and say everything that cannot be sealed.

Order and columns are those of `types.Tree`. What can be sealed: files (hard links as separate files), folders, links that stay
inside. Owner, extended attributes, setuid, setgid and sticky bits are not kept. What is remembered beside the
tree (inode and change time) lets the sealer notice a file that changed while it was read.
"""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.errors import InputError, Reason
from cloister.volume import format as fmt
from cloister.volume import layout, names
from cloister.volume.types import Kind, Tree

_WANTED: Final = "a file, a folder, or a link that stays inside"
_SPECIAL: Final = {
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a named pipe",
}
_TIME_LIMIT: Final = 1 << 63


@dataclass(frozen=True, slots=True)
class Scan:
    """A folder as it was seen. `inode` and `ctime_ns` have one item per entry; `base` is the folder itself.

    With `single`, the source is one file: entry 1, and `base` is the folder that holds it.
    """

    tree: Tree
    inode: Sequence[int]
    ctime_ns: Sequence[int]
    base: Path
    single: bool


def unsealable(source: Path, reasons: Sequence[Reason]) -> InputError:
    """The error that lists everything in `source` that stands in the way."""
    one = len(reasons) == 1
    return InputError(
        f"{source} cannot be sealed: {len(reasons)} {'entry' if one else 'entries'} in the way; nothing was changed",
        code="source-unsealable",
        reasons=reasons,
        hint="remove or repair what is listed, and seal again",
    )


def scan(source: Path) -> Scan:
    """Everything below `source`, a folder or one file.

    Raises:
        InputError: code `source-unsealable`, with all findings.
    """
    # Never resolved: the source may be a folder of another mount namespace (/proc/PID/fd/N), whose path means
    # something else here. The kernel follows such a link to the folder itself.
    real = Path(os.path.abspath(source))  # noqa: PTH100  # resolve() would leave that folder
    try:
        status = real.stat()
    except OSError as error:
        raise unsealable(source, [Reason(str(source), os.strerror(error.errno or 0), "a folder or a file")]) from error
    rows = _Rows()
    single = stat.S_ISREG(status.st_mode)
    if single:
        rows.add(0, Kind.DIRECTORY, status, b"", 0, mode=0o755)
        rows.entry(0, os.fsencode(real.name), status, os.fsencode(real), os.fsencode(real.name), 0)
        real = real.parent
    elif stat.S_ISDIR(status.st_mode):
        rows.add(0, Kind.DIRECTORY, status, b"", 0)
        rows.walk(os.fsencode(real))
    else:
        raise unsealable(source, [Reason(str(source), _special(status.st_mode), "a folder or a file")])
    if not rows.problems and Kind.FILE not in rows.kind:
        rows.problems.append(Reason(str(source), "no file", "a folder with at least one file"))
    total = sum(layout.aligned(size) for size in rows.size)
    if total > layout.MAX_DATA or len(rows.kind) > fmt.MAX_ENTRIES:
        wanted = f"at most {layout.MAX_DATA} bytes and {fmt.MAX_ENTRIES} entries in one volume"
        rows.problems.append(Reason(str(source), f"{total} bytes, {len(rows.kind)} entries", wanted))
    if rows.problems:
        raise unsealable(source, rows.problems)
    return Scan(rows.tree(), rows.inode, rows.ctime_ns, real, single)


def _special(mode: int) -> str:
    return _SPECIAL.get(stat.S_IFMT(mode), "something unknown")


class _Rows:
    """Columns that grow while the folder is walked, and the problems met on the way."""

    def __init__(self) -> None:
        self.parent = array("I")
        self.kind = bytearray()
        self.mode = array("H")
        self.mtime_ns = array("q")
        self.size = array("Q")
        self.inode = array("Q")
        self.ctime_ns: list[int] = []
        self.names: list[bytes] = []
        self.targets: dict[int, bytes] = {}
        self.problems: list[Reason] = []
        self._check_access = os.geteuid() != 0

    def tree(self) -> Tree:
        return fmt.build_tree(
            parent=self.parent,
            kind=self.kind,
            mode=self.mode,
            mtime_ns=self.mtime_ns,
            size=self.size,
            entry_names=self.names,
            targets=self.targets,
        )

    def add(
        self, parent: int, kind: Kind, status: os.stat_result, name: bytes, size: int, *, mode: int | None = None
    ) -> int:
        """Append a row; its index."""
        self.parent.append(parent)
        self.kind.append(kind)
        self.mode.append(status.st_mode & 0o777 if mode is None else mode)
        self.mtime_ns.append(status.st_mtime_ns)
        self.size.append(size)
        self.inode.append(status.st_ino)
        self.ctime_ns.append(status.st_ctime_ns)
        self.names.append(name)
        return len(self.kind) - 1

    def problem(self, path: bytes, found: str, wanted: str = _WANTED) -> None:
        self.problems.append(Reason(names.shown(path), found, wanted))

    def walk(self, base: bytes) -> None:
        """Append everything below the folder `base`, folder by folder, as `types` orders it."""
        folders = [(0, base, 0)]
        for index, path, depth in folders:
            try:
                with os.scandir(path) as entries:
                    children = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                self.problem(path[len(base) + 1 :], f"a folder that cannot be read: {os.strerror(error.errno or 0)}")
                continue
            for child in children:
                shown_path = child.path[len(base) + 1 :]
                try:
                    status = child.stat(follow_symlinks=False)
                except OSError as error:
                    self.problem(shown_path, f"an entry that vanished: {os.strerror(error.errno or 0)}")
                    continue
                added = self.entry(index, child.name, status, child.path, shown_path, depth)
                if added is not None:
                    folders.append((added, child.path, depth + 1))

    def entry(
        self, parent: int, name: bytes, status: os.stat_result, path: bytes, shown_path: bytes, depth: int
    ) -> int | None:
        """Append one entry or say why not; the index if it is a folder."""
        if not -_TIME_LIMIT <= status.st_mtime_ns < _TIME_LIMIT:
            self.problem(shown_path, "a time of change outside the years 1677..2262", "a time that 64 bits can hold")
        elif len(shown_path) > names.PATH_MAX:
            self.problem(shown_path, f"a path of {len(shown_path)} bytes", f"at most {names.PATH_MAX}")
        elif stat.S_ISREG(status.st_mode):
            if self._check_access and not os.access(path, os.R_OK):
                self.problem(shown_path, "a file that cannot be read: Permission denied")
            self.add(parent, Kind.FILE, status, name, status.st_size)
        elif stat.S_ISDIR(status.st_mode):
            return self.add(parent, Kind.DIRECTORY, status, name, 0)
        elif stat.S_ISLNK(status.st_mode):
            self._link(parent, name, status, path, shown_path, depth)
        else:
            self.problem(shown_path, _special(status.st_mode))
        return None

    def _link(
        self, parent: int, name: bytes, status: os.stat_result, path: bytes, shown_path: bytes, depth: int
    ) -> None:
        try:
            target = os.readlink(path)  # noqa: PTH115  # bytes as they are; Path would tidy them
        except OSError as error:
            self.problem(shown_path, f"an entry that changed: {os.strerror(error.errno or 0)}")
            return
        fault = names.target_fault(target, depth)
        if fault:
            self.problem(shown_path, f"{fault}: {names.shown(target)}")
            return
        self.targets[self.add(parent, Kind.SYMLINK, status, name, len(target), mode=0o777)] = target
