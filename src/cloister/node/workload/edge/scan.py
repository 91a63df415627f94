"""List the files of a tree with their stat signatures, as fast as the kernel answers.

Everything that is not a regular file, a folder or a harmless link is refused, all findings together. A signature is
(size, mtime, ctime, inode, device, mode); a file whose signature is unchanged is taken for unchanged (like git and borg
do). ctime cannot be set by a program, so only a kernel-level writer or a clock set back defeats it; staging hashes
every byte again, so what runs never rests on a signature.
"""

from __future__ import annotations

import os
import posixpath
import stat
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.errors import InputError, Reason
from cloister.node.workload.edge.locate import Tree

WIDTH: Final = 6
"""Numbers in one signature."""

MAX_FILES: Final = 1_000_000
MAX_REASONS: Final = 20

_U64: Final = (1 << 64) - 1

ARROW: Final = "\x01"
"""Joins a link and its target in a list of names; neither may hold it (form.py refuses control characters)."""

Signature = tuple[int, int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class Scan:
    """Files of one tree in the order of the file system; `names` are relative, links read `name\\x01target`.

    `signatures` holds WIDTH numbers for each name.
    """

    tree: Tree
    names: list[str]
    signatures: array[int]

    def signature(self, index: int) -> Signature:
        one = self.signatures[index * WIDTH : (index + 1) * WIDTH]
        return (one[0], one[1], one[2], one[3], one[4], one[5])


def signature_of(found: os.stat_result) -> Signature:
    return (
        found.st_size,
        found.st_mtime_ns & _U64,
        found.st_ctime_ns & _U64,
        found.st_ino,
        found.st_dev,
        found.st_mode,
    )


def scan(tree: Tree, *, max_files: int = MAX_FILES, max_bytes: int | None = None) -> Scan:
    """Return the files of `tree` that are not skipped.

    Raises:
        InputError: sockets, devices, pipes, links that lead out, unreadable folders, too many files or bytes.
    """
    names: list[str] = []
    signatures: array[int] = array("Q")
    links: list[tuple[str, str]] = []
    reasons: list[Reason] = []
    total = 0
    stack = [("", os.fspath(tree.host))]
    extend, skip, is_regular = signatures.extend, tree.skip, stat.S_ISREG
    while stack:
        prefix, folder = stack.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if skip(prefix, name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        stack.append((f"{prefix}{name}/", entry.path))
                        continue
                    found = entry.stat(follow_symlinks=False)
                    if entry.is_symlink():
                        links.append((prefix + name, entry.path))
                        continue
                    if not is_regular(found.st_mode):
                        reasons.append(Reason(entry.path, _kind(found.st_mode), "a regular file", "remove it"))
                        continue
                    names.append(prefix + name)
                    total += found.st_size
                    extend(
                        (
                            found.st_size,
                            found.st_mtime_ns & _U64,
                            found.st_ctime_ns & _U64,
                            found.st_ino,
                            found.st_dev,
                            found.st_mode,
                        )
                    )
        except OSError as error:
            reasons.append(Reason(folder, error.strerror or str(error), "a readable folder", "check its permissions"))
        if len(names) > max_files or (max_bytes is not None and total > max_bytes):
            raise _too_large(tree, len(names), total, max_files, max_bytes)
    for name, path in links:
        _link(tree, name, path, names, signatures, reasons)
    if reasons:
        raise refuse(os.fspath(tree.host), reasons)
    return Scan(tree, names, signatures)


def refuse(where: str, reasons: Sequence[Reason]) -> InputError:
    """Return the error that carries `reasons` (the first MAX_REASONS of them)."""
    count = len(reasons)
    return InputError(
        f"{where} holds {'something' if count == 1 else f'{count} things'} that cannot be measured",
        code="workload-unmeasurable",
        reasons=tuple(reasons[:MAX_REASONS]),
        hint=next((reason.hint for reason in reasons if reason.hint), ""),
    )


def _link(tree: Tree, name: str, path: str, names: list[str], signatures: array[int], reasons: list[Reason]) -> None:
    """Add one link: as a link if it is relative and stays in the tree, else as the file it leads to, else refuse."""
    try:
        target = os.readlink(path)  # noqa: PTH115 - Path would normalise the text
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        if (
            not target.startswith("/")
            and inside != ".."
            and not inside.startswith("../")
            and not _crosses(tree, name, target)
        ):
            names.append(f"{name}{ARROW}{target}")
            signatures.extend(signature_of(os.lstat(path)))
            return
        found = Path(path).stat()
    except OSError as error:
        reasons.append(Reason(path, f"a broken link ({error.strerror})", "a regular file", "remove it"))
        return
    if tree.outside and stat.S_ISREG(found.st_mode):
        names.append(name)
        signatures.extend(signature_of(found))
        return
    hint = "replace the link by a copy (uv: --link-mode=copy)"
    reasons.append(Reason(path, f"a link to {target}, which leads out of {tree.host}", "files inside the folder", hint))


def _crosses(tree: Tree, name: str, target: str) -> bool:
    """Does a relative target climb above the tree's root on its way (`a/../../tree/b`)? The jail's root is elsewhere."""
    place = posixpath.dirname(name)
    for component in target.split("/"):
        place = posixpath.normpath(posixpath.join(place, component))
        if place == ".." or place.startswith("../"):
            return True
    # A folder on the way that is itself a link could lead anywhere; the real path decides.
    real = os.path.realpath(tree.host / posixpath.dirname(name) / target)
    root = os.path.realpath(tree.host)
    return real != root and not real.startswith(root + "/")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFSOCK: "a socket", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "no regular file")


def _too_large(tree: Tree, files: int, size: int, max_files: int, max_bytes: int | None) -> InputError:
    limit = f"{max_files:,} files" + (f" and {max_bytes >> 20} MiB" if max_bytes is not None else "")
    hint = "move data, models and outputs out of the script's folder; data belongs into a sealed asset"
    return InputError(
        f"{tree.host} is too large to be measured as code",
        code="workload-unmeasurable",
        reasons=[Reason(str(tree.host), f"{files:,} files, {size >> 20} MiB and more", f"at most {limit}", hint)],
        hint=hint,
    )
