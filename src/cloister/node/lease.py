"""Keep a lease alive while a program runs, and cut the program off when the broker no longer agrees.

    HELD --renewed--> HELD        at half life, with fresh evidence over a fresh nonce
    HELD --unreachable--> HELD    until the lease ends; tried again with growing pauses
    HELD --refused--> LOST        the contract was revoked or the evidence is no longer acceptable
    HELD --expired--> LOST        the broker stayed silent for the rest of the lease

LOST is final: `on_lost` runs once, in a thread of the keeper, with the error that says why. The end of the lease is
watched by a thread of its own: a broker that accepts a renewal and never answers it gains no second.

Time is CLOCK_BOOTTIME, which nobody can set and which goes on through a suspend. How long a lease lives is the broker's
statement (twice the time from `renew_after` to `expires`), counted from the moment its request was sent: an operator
who sets this machine's clock back and starves renewals gains nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Final, Protocol

from cloister.errors import CloisterError, MachineError, PeerError, Reason

_RETRY_FIRST_S: Final = 1.0
_RETRY_MOST_S: Final = 30.0
_LOOK_S: Final = 1.0


def boot_time() -> float:
    """Seconds since boot, suspends included; no clock setting moves it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Renewable(Protocol):
    """The two times of a lease, both with a time zone and both of the broker's clock: only their difference counts."""

    @property
    def expires(self) -> datetime: ...

    @property
    def renew_after(self) -> datetime: ...


class LeaseKeeper:
    """Renews through `renew` (which returns the lease with its new times) until `stop`.

    `asked` is the `boot_time()` at which the lease was asked for; `boot` is that clock. `on_lost(error)` is called at most
    once.
    """

    def __init__(
        self,
        lease: Renewable,
        renew: Callable[[], Renewable],
        *,
        asked: float,
        on_lost: Callable[[CloisterError], None],
        boot: Callable[[], float] = boot_time,
    ) -> None:
        self._renew = renew
        self._boot = boot
        self._on_lost = on_lost
        self._half, self._ends = 0.0, 0.0
        self._take(lease, asked)
        self._stop = threading.Event()
        self._losing = threading.Lock()
        self._failed: CloisterError | None = None
        self._threads = [
            threading.Thread(target=self._run, name="lease", daemon=True),
            threading.Thread(target=self._watch, name="lease-end", daemon=True),
        ]
        self.lost: CloisterError | None = None
        self.renewals = 0

    def _take(self, lease: Renewable, asked: float) -> None:
        half_s = max((lease.expires - lease.renew_after).total_seconds(), 0.0)
        self._half, self._ends = asked + half_s, asked + 2 * half_s

    def __enter__(self) -> LeaseKeeper:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the threads; a renewal under way is awaited for at most ten seconds, and not at all when all is lost."""
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive() and threading.current_thread() is not thread:
                thread.join(timeout=10 if self.lost is None else 0.1)

    def check(self) -> None:
        """Raise the error that ended the lease, if it has ended."""
        if self.lost is not None:
            raise self.lost

    def _run(self) -> None:
        pause = _RETRY_FIRST_S
        wake = self._half
        while not self._stop.wait(max(wake - self._boot(), 0.0)) and self.lost is None:
            asked = self._boot()
            try:
                lease = self._renew()
            except PeerError as error:
                self._failed = error
                wake = self._boot() + min(pause, max(self._ends - self._boot(), 0.1) / 2)
                pause = min(pause * 2, _RETRY_MOST_S)
            except CloisterError as error:
                self._lose(error, "the broker refused to renew the lease")
                return
            else:
                self._take(lease, asked)
                self.renewals += 1
                self._failed = None
                pause = _RETRY_FIRST_S
                wake = self._half

    def _watch(self) -> None:
        """Wait for the end of the lease, which every renewal moves."""
        while (left := self._ends - self._boot()) > 0:
            if self._stop.wait(min(left, _LOOK_S)):  # looked at again now and then: a renewal moves the end
                return
        silent = PeerError(
            "no renewal came in time",
            code="broker-unreachable",
            reasons=[Reason("lease", "it ended", "a renewal before its end")],
            hint="is the broker reachable? nothing was sealed",
        )
        self._lose(self._failed or silent, "the broker did not answer until the lease ended")

    def _lose(self, cause: CloisterError, what: str) -> None:
        with self._losing:
            if self.lost is not None or self._stop.is_set():
                return
            self.lost = MachineError(
                f"{what}; the program is stopped and its keys are dropped",
                code="lease-lost",
                reasons=cause.reasons or (Reason("lease", cause.message, "a renewal"),),
                hint=cause.hint or "`cloister status` shows what changed; nothing was sealed",
            )
        self._on_lost(self.lost)
