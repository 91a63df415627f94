"""SIGTERM, SIGINT and SIGHUP as an error that unwinds everything: jails are killed, mounts and keys go, nothing half remains.

    with stop_on_signals() as stops:
        ...                     # a signal raises StoppedError here
        with stops.held():
            ...                 # two steps that belong together: a signal waits until both are done

The first signal counts; later ones are ignored, so that they cannot interrupt the clean-up of the first. Blocks nest: the
innermost one raises. Outside the main thread, where Python delivers no signals, a block does nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from cloister.errors import MachineError

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_NAMES: Final = {signal.SIGINT: "Ctrl-C"}


class StoppedError(MachineError):
    """A signal asked us to stop; `by` names it for people."""

    def __init__(self, by: str, *, left: str = "") -> None:
        super().__init__(f"stopped by {by}; {left}" if left else f"stopped by {by}", code="interrupted")
        self.by = by


class Stops:
    """Signals of one block: raised at once, or held back for a moment."""

    def __init__(self, left: str) -> None:
        self._left = left
        self._held = 0
        self._waiting: str | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the block finish; a signal that came meanwhile is raised at its end."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._held == 0 and self._waiting is not None:
            by, self._waiting = self._waiting, None
            raise StoppedError(by, left=self._left)

    def handle(self, number: int, frame: FrameType | None) -> None:
        for one in SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        by = _NAMES.get(signal.Signals(number), signal.Signals(number).name)
        if self._held:
            self._waiting = by
        else:
            raise StoppedError(by, left=self._left)


@contextmanager
def stop_on_signals(left: str = "") -> Iterator[Stops]:
    """Turn the signals into `StoppedError` for the length of the block; yields what can hold them back.

    `left` says in the error what the block leaves when it is stopped, such as "nothing was sealed".
    A signal that the caller of this process ignores (nohup, a background job of a shell) stays ignored.
    """
    stops = Stops(left)
    if threading.current_thread() is not threading.main_thread():
        yield stops
        return
    old = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in old.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stops.handle)
    try:
        yield stops
    finally:
        for number, handler in old.items():
            # None: a handler that was not installed from Python; it cannot be put back, so the default has to do
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
