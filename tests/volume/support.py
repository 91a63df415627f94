"""What several tests of volumes share: small trees, repeatable randomness, disks that fail, and the reader's only two outcomes."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from cloister.crypto.keys import Secret
from cloister.errors import TamperedError
from cloister.volume.disk import Disk
from cloister.volume.read import Volume
from cloister.volume.types import Kind

KEY = Secret(bytes(range(32)))
OTHER_KEY = Secret(bytes(range(1, 33)))


def repeatable(label: str) -> Callable[[int], bytes]:
    """A source of "random" bytes that is the same each time; protects nothing."""
    state = [hashlib.sha256(label.encode()).digest()]

    def draw(size: int) -> bytes:
        data = b""
        while len(data) < size:
            state[0] = hashlib.sha256(state[0]).digest()
            data += state[0]
        return data[:size]

    return draw


def write_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    """Make a folder with these files; times and modes are fixed, so that two runs seal the same manifest."""
    root.mkdir()
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    fix_times(root)
    return root


def fix_times(root: Path) -> None:
    for folder, folders, names in os.walk(root, topdown=False):
        for name in [*names, *folders]:
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() else 0o644)
            os.utime(path, ns=(10**18, 10**18), follow_symlinks=False)
    root.chmod(0o755)
    os.utime(root, ns=(10**18, 10**18))


def contents(root: Path) -> dict[bytes, tuple[object, ...]]:
    """Everything below a folder that a volume keeps."""
    found: dict[bytes, tuple[object, ...]] = {}
    for folder, folders, names in os.walk(root):
        for name in [*folders, *names]:
            path = Path(folder, name)
            status = path.lstat()
            if path.is_symlink():
                what: tuple[object, ...] = ("link", path.readlink())
            elif path.is_dir():
                what = ("folder", status.st_mode & 0o777)
            else:
                what = ("file", status.st_mode & 0o777, path.read_bytes())
            found[os.fsencode(path.relative_to(root))] = (*what, status.st_mtime_ns)
    return found


def volume_files(volume: Volume) -> dict[bytes, bytes]:
    tree = volume.tree
    return {
        tree.path(i): volume.read(tree.data_off[i], tree.size[i]) for i in range(len(tree)) if tree.kind[i] == Kind.FILE
    }


def outcome(path: Path, digest: str | None, *, key: Secret = KEY, audit: bool = False) -> dict[bytes, bytes] | str:
    """All files of the volume at `path`, or the code of the refusal. There is no third outcome."""
    try:
        with Volume.open(path, key, expect=digest, audit=audit) as volume:
            return volume_files(volume)
    except TamperedError as error:
        if not error.reasons:
            raise AssertionError("a refusal must name what failed") from error
        return error.code


class KilledError(BaseException):
    """Stands for SIGKILL: nothing after it may change the disk."""


class FailingDisk(Disk):
    """A disk whose change number `at` goes wrong: `full` (once), `interrupted` (Ctrl-C), or `killed` (this and all later ones)."""

    def __init__(self, at: int = -1, how: str = "full") -> None:
        self.at, self.how, self.changes = at, how, 0

    def _change(self) -> bool:
        """Count; True if this change is to be torn in the middle."""
        self.changes += 1
        if self.how == "killed" and self.changes > self.at >= 0:
            if self.changes - 1 == self.at:
                return True
            raise KilledError
        if self.changes - 1 == self.at:
            if self.how == "interrupted":
                raise KeyboardInterrupt
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return False

    def make_folder(self, path: Path) -> None:
        if self._change():
            raise KilledError
        super().make_folder(path)

    def create(self, path: Path) -> int:
        if self._change():
            raise KilledError
        return super().create(path)

    def write(self, descriptor: int, data: memoryview | bytes) -> None:
        if self._change():
            super().write(descriptor, memoryview(data)[: len(data) // 2])
            raise KilledError
        super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        if self._change():
            raise KilledError
        super().sync(descriptor)

    def sync_folder(self, path: Path) -> None:
        if self._change():
            raise KilledError
        super().sync_folder(path)

    def name(self, temporary: Path, target: Path) -> None:
        if self._change():
            raise KilledError
        super().name(temporary, target)

    def exchange(self, temporary: Path, target: Path) -> None:
        if self._change():
            raise KilledError
        super().exchange(temporary, target)

    def replace_file(self, temporary: Path, target: Path) -> None:
        if self._change():
            raise KilledError
        super().replace_file(temporary, target)

    def remove(self, path: Path) -> None:
        if self._change():
            raise KilledError
        super().remove(path)

    def remove_file(self, path: Path) -> None:
        if self._change():
            raise KilledError
        super().remove_file(path)
