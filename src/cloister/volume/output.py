"""Edge: the place where runs leave their results: one writer at a time, the old generation stays until the new one is complete.

    claim ── lock held ──> publish ──> new generation in place (or the old one, whatever happened) ── release

The lock is a file `<target>.lock` beside the volume. It stays there: removing it would let two processes hold two locks.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from cloister.crypto.keys import Secret
from cloister.errors import InputError, MachineError, Reason, TamperedError
from cloister.volume.disk import writing
from cloister.volume.read import peek
from cloister.volume.seal import Progress, Sealed, Sealer


class OutputVolume:
    """The exclusive right to publish at one target. A context manager; `claim` before the run, `publish` after it."""

    def __init__(self, target: Path, descriptor: int, sealer: Sealer) -> None:
        """Use `OutputVolume.claim`."""
        self.target = target
        self._descriptor, self._sealer = descriptor, sealer

    @classmethod
    def claim(cls, target: Path, *, sealer: Sealer | None = None) -> OutputVolume:
        """Take the right to publish at `target`.

        Raises:
            MachineError: code `busy`: another run holds it.
            InputError: nothing can be written there.
        """
        target = Path(os.path.abspath(target))  # noqa: PTH100  # resolve() would follow a link at the target itself
        lock = target.with_name(f"{target.name}.lock")
        with writing(target):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise MachineError(
                f"{target}: another run is writing this output",
                code="busy",
                hint="wait until it has ended, or give this run another output",
            ) from error
        return cls(target, descriptor, sealer or Sealer())

    def __enter__(self) -> OutputVolume:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the right back; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def publish(
        self,
        directory: Path,
        *,
        key: Secret,
        generation: int,
        volume_id: bytes,
        previous: str | None,
        audited: bool = True,
        progress: Progress | None = None,
    ) -> Sealed:
        """Seal `directory` as the next generation. `previous` is the digest that is registered now, None for the first.

        Raises:
            TamperedError: code `volume-stale`: what lies there is not `previous` (the registered volume was exchanged or lost).
            InputError, MachineError: as `seal`.
            ValueError: the claim is closed.
        """
        if self._descriptor < 0:
            raise ValueError("the claim on this output is closed")
        found = peek(self.target) if os.path.lexists(self.target) else None
        if previous is None and found is not None:
            raise InputError(
                f"{self.target} holds generation {found.generation}, but none is registered",
                hint="move it away, or name its digest as the previous one",
            )
        if previous is not None and (found is None or found.digest != previous):
            text = "nothing" if found is None else f"generation {found.generation}, {found.digest}"
            raise TamperedError(
                f"{self.target}: not the version that is registered; it was left as it is",
                code="volume-stale",
                reasons=[Reason("head.digest", text, previous)],
                hint="put the registered version back, or register what is there",
            )
        return self._sealer.seal(
            directory,
            self.target,
            key=key,
            generation=generation,
            volume_id=volume_id,
            audited=audited,
            replace=found is not None,
            progress=progress,
        )


def publish(
    directory: Path,
    target: Path,
    *,
    key: Secret,
    generation: int,
    volume_id: bytes,
    previous: str | None,
    audited: bool = True,
    progress: Progress | None = None,
) -> Sealed:
    """`OutputVolume.claim` and `publish` in one: for results that are made before anybody waits for the output."""
    with OutputVolume.claim(target) as output:
        return output.publish(
            directory,
            key=key,
            generation=generation,
            volume_id=volume_id,
            previous=previous,
            audited=audited,
            progress=progress,
        )
