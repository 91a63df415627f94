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
    """A signal asked us to stop; what `stop_on_signals` turns it into for whoever is outside of the block."""

    def __init__(self, by: str, *, left: str = "") -> None:
        super().__init__(f"stopped by {by}; {left}" if left else f"stopped by {by}", code="interrupted")


class _Signalled(BaseException):  # like KeyboardInterrupt: no handler of ordinary errors may swallow it
    """Unwinds the block that a signal stops."""


class Stops:
    """Signals of one block: raised at once, or held back for a moment. `left` says what the block leaves so far."""

    def __init__(self, left: str) -> None:
        self.left = left
        self.by = ""
        self._held = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the block finish; a signal that came meanwhile is raised at its end."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._held == 0 and self.by:
            raise _Signalled

    def handle(self, number: int, frame: FrameType | None) -> None:
        for one in SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        self.by = _NAMES.get(signal.Signals(number), signal.Signals(number).name)
        if not self._held:
            raise _Signalled


@contextmanager
def stop_on_signals(left: str = "") -> Iterator[Stops]:
    """Turn the signals into `StoppedError` for the length of the block; yields what can hold them back.

    `left` says in the error what the block leaves when it is stopped, such as "nothing was sealed". A signal that the
    caller of this process ignores (nohup, a background job of a shell) stays ignored.

    Raises:
        StoppedError: a signal came. Inside the block it is no `Exception`, so that nothing there can mistake it for a
            failure of its own.
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
    except _Signalled:
        if not stops.by:  # an outer block's signal
            raise
        raise StoppedError(stops.by, left=stops.left) from None
    finally:
        for number, handler in old.items():
            # None: a handler that was not installed from Python; it cannot be put back, so the default has to do
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
