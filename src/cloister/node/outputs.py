"""Outputs of a phase: the disk and the broker change together, whatever is cut off in between.

The broker's registered root decides which generation is the current one. A new generation is sealed beside the old as
`<target>.next-<generation>`, registered, and only then swapped into place:

    seal .next ── cut ──> the old one is registered and in place; .next is dropped by the next run
    register   ── cut ──> the new one is registered and complete in .next; `current` finds it, `settle` swaps it in
    swap       ── cut ──> the new one is in place

So there is always exactly one volume on disk with the registered digest, and a run that fails leaves the old one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cloister.broker.wire import OutputKey
from cloister.errors import CloisterError, InputError, Reason, TamperedError
from cloister.volume.disk import Disk, writing
from cloister.volume.output import OutputVolume
from cloister.volume.read import peek
from cloister.volume.seal import Sealed, seal


def _digest(path: Path) -> str | None:
    """Return the digest that a volume claims, None where there is none."""
    if not os.path.lexists(path):
        return None
    try:
        return peek(path).digest
    except CloisterError:
        return None


def _waiting(target: Path) -> list[Path]:
    """New generations beside `target`: folders `<target>.next-<number>`, and nothing else that is named alike."""
    name = re.compile(re.escape(target.name) + r"\.next-[0-9]+", re.ASCII)
    try:
        found = [
            path
            for path in target.parent.iterdir()
            if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        ]
    except OSError:
        return []  # opening the target itself says what is wrong there
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def current(target: Path, digest: str) -> Path:
    """Return where the volume with the registered `digest` lies: `target`, or a finished one that waits beside it.

    Without a match it is `target`: opening it then says what is wrong with it.
    """
    if _digest(target) == digest:
        return target
    return next((path for path in _waiting(target) if _digest(path) == digest), target)


def finished(target: Path) -> Path:
    """Return the newest complete generation that waits for the place `target`, or `target` where none does."""
    return next((path for path in reversed(_waiting(target)) if _digest(path) is not None), target)


class Target:
    """The exclusive right to write the next generation at one place; use `claimed`."""

    def __init__(self, target: Path, key: OutputKey, disk: Disk) -> None:
        self._target = target
        self._key = key
        self._disk = disk
        self._next = target.with_name(f"{target.name}.next-{key.generation}")
        self._offered = False

    def write(self, directory: Path, *, progress: Callable[[int, int], None] | None = None) -> Sealed:
        """Seal `directory` beside the target.

        Raises:
            InputError, MachineError: as `volume.seal.seal`; the target is unchanged.
        """
        return seal(
            directory,
            self._next,
            key=self._key.key,
            generation=self._key.generation,
            volume_id=self._key.volume_id,
            progress=progress,
        )

    def offer(self) -> None:
        """Say that the broker is about to be told: from here on only its answer may drop the new generation.

        A lost answer leaves both generations on disk; the next run asks the broker and keeps the registered one.
        """
        self._offered = True

    def commit(self) -> None:
        """Put the registered new generation in place and drop the old one."""
        _swap(self._next, self._target, self._disk)

    def refused(self) -> None:
        """The broker said no: forget the new generation."""
        self._offered = False
        self.drop()

    def drop(self) -> None:
        """Forget a new generation that nobody was told of."""
        if self._offered:
            return
        with suppress(OSError):
            if self._next.exists():
                self._disk.remove(self._next)


def _swap(new: Path, target: Path, disk: Disk) -> None:
    with writing(target):
        if os.path.lexists(target):
            disk.exchange(new, target)
            disk.sync_folder(target.parent)
            disk.remove(new)
        else:
            disk.name(new, target)
            disk.sync_folder(target.parent)


@contextmanager
def claimed(target: Path, key: OutputKey) -> Iterator[Target]:
    """Hold the right to write `target` for the block; finishes or drops what an interrupted run left.

    Raises:
        MachineError: (`busy`) another run writes it.
        TamperedError: (`volume-stale`) what lies there is not the registered version: an old one, or a foreign one.
        InputError: something lies there although nothing is registered.
    """
    disk = Disk()
    with OutputVolume.claim(target):
        for path in _waiting(target):
            if key.previous is not None and _digest(path) == key.previous and _digest(target) != key.previous:
                _swap(path, target, disk)
            else:
                disk.remove(path)
        found = _digest(target)
        if key.previous is None and os.path.lexists(target):
            raise InputError(
                f"{target} holds something, but the broker knows no version of '{key.owner}'s output yet",
                reasons=[Reason("out", found or "something else than a volume", "nothing")],
                hint="move it away, or name another path with --out",
            )
        if key.previous is not None and found != key.previous:
            raise TamperedError(
                f"{target} is not the registered version; it was left as it is",
                code="volume-stale",
                reasons=[Reason("out", found or "no volume", key.previous)],
                hint="put the registered version back: the next generation replaces exactly that one",
            )
        one = Target(target, key, disk)
        try:
            yield one
        except BaseException:
            one.drop()
            raise
