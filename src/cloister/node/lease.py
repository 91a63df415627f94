"""Keep a lease alive while a program runs, and cut the program off when the broker no longer agrees.

    HELD --renewed--> HELD        at half life, with fresh evidence over a fresh nonce
    HELD --unreachable--> HELD    until the lease ends; tried again with growing pauses
    HELD --refused--> LOST        the contract was revoked or the evidence is no longer acceptable
    HELD --expired--> LOST        the broker stayed silent for the rest of the lease

LOST is final: `on_lost` runs once, in the keeper's thread, with the error that says why.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final, Protocol

from cloister.errors import CloisterError, MachineError, PeerError, Reason

_RETRY_FIRST_S: Final = 1.0
_RETRY_MOST_S: Final = 30.0


class Renewable(Protocol):
    """The two times of a lease, both with a time zone."""

    @property
    def expires(self) -> datetime: ...

    @property
    def renew_after(self) -> datetime: ...


class LeaseKeeper:
    """Renews through `renew` (which returns the lease with its new times) until `stop`.

    `clock` gives the time, `on_lost(error)` is called at most once.
    """

    def __init__(
        self,
        lease: Renewable,
        renew: Callable[[], Renewable],
        *,
        clock: Callable[[], datetime],
        on_lost: Callable[[CloisterError], None],
    ) -> None:
        self._lease = lease
        self._renew = renew
        self._clock = clock
        self._on_lost = on_lost
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self.lost: CloisterError | None = None
        self.renewals = 0

    def __enter__(self) -> LeaseKeeper:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the thread; a renewal under way is awaited for at most ten seconds."""
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)

    def check(self) -> None:
        """Raise the error that ended the lease, if it has ended."""
        if self.lost is not None:
            raise self.lost

    def _run(self) -> None:
        pause = _RETRY_FIRST_S
        wake = self._lease.renew_after
        while not self._stop.wait(max((wake - self._clock()).total_seconds(), 0.0)):
            try:
                self._lease = self._renew()
            except PeerError as error:
                now = self._clock()
                if now >= self._lease.expires:
                    self._lose(error, "the broker did not answer until the lease ended")
                    return
                wake = min(now + timedelta(seconds=pause), self._lease.expires)
                pause = min(pause * 2, _RETRY_MOST_S)
            except CloisterError as error:
                self._lose(error, "the broker refused to renew the lease")
                return
            else:
                self.renewals += 1
                pause = _RETRY_FIRST_S
                wake = self._lease.renew_after

    def _lose(self, cause: CloisterError, what: str) -> None:
        self.lost = MachineError(
            f"{what}; the program is stopped and its keys are dropped",
            code="lease-lost",
            reasons=cause.reasons or (Reason("lease", cause.message, "a renewal"),),
            hint=cause.hint or "`cloister status` shows what changed; nothing was sealed",
        )
        self._on_lost(self.lost)
