"""Say what a program prints to the parties that the contract names, through the broker, without ever holding it up.

The threads that read the program's pipes put lines into a short queue and go on; one thread of its own sends what is
there about once a second. Whatever does not fit, or meets a broker that is away, is dropped and counted: newest words
count most. Metrics are `Progress.text` (names and rounded numbers); raw lines leave only where `leaves` names logs.

    SPEAKING --broker away--> SPEAKING    tried again with growing pauses, the queue keeps the newest lines
    SPEAKING --refused-->     SILENT      the contract or the lease says no: nothing is tried again
    SPEAKING --finish-->      SILENT      the last batch says that the program ended
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Final, Protocol

from cloister.broker.client import BrokerClient, Release
from cloister.broker.relay import LOGS, METRICS, printable
from cloister.errors import CloisterError, PeerError
from cloister.node.progress import Progress

PERIOD_S: Final = 1.0
"""The broker takes four batches a second of one lease; two streams make two."""
PAUSE_MOST_S: Final = 8.0
MAX_LINES: Final = 256
MAX_LINE: Final = 2000
MAX_BYTES: Final = 64 << 10
"""Of one batch: wire.WordsBatch takes 256 lines of 2000 characters in 96 KiB."""
TIMEOUT_S: Final = 3.0
"""How long one request may take, and so how long the end of a run waits at most for a broker that hangs."""


class Post(Protocol):
    """Sends one batch; raises CloisterError."""

    def __call__(self, seq: int, stream: str, lines: Sequence[str], *, dropped: int, end: bool) -> None: ...


def readable(line: bytes) -> str:
    """Return a raw line as text of at most 2000 characters that steers no terminal."""
    clean = printable(line[: 4 * MAX_LINE].decode("utf-8", "replace").rstrip("\n"))
    return clean if len(clean) <= MAX_LINE else clean[: MAX_LINE - 1] + "…"


class _Queue:
    """The newest lines of one stream; what does not fit is counted."""

    def __init__(self) -> None:
        self._lines: deque[tuple[str, int]] = deque()
        self._bytes = 0
        self.dropped = 0

    def put(self, text: str) -> None:
        size = len(text.encode())
        self._lines.append((text, size))
        self._bytes += size
        while len(self._lines) > MAX_LINES or self._bytes > MAX_BYTES:
            self._bytes -= self._lines.popleft()[1]
            self.dropped += 1

    def take(self) -> tuple[str, ...]:
        lines = tuple(text for text, _ in self._lines)
        self._lines.clear()
        self._bytes = 0
        return lines


class Speaker:
    """Sends what `streams` lets leave; with no streams it does nothing at all. A context manager: leaving it waits for
    the last batch, at most `2 * TIMEOUT_S`.

    Lines may come from several threads. `post` runs in the speaker's thread only; `close` is called there at the end.
    """

    def __init__(
        self,
        post: Post,
        streams: Collection[str],
        *,
        period_s: float = PERIOD_S,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._post, self._period_s, self._close = post, period_s, close
        self._queues = {stream: _Queue() for stream in (METRICS, LOGS) if stream in streams}
        self._lock = threading.Lock()
        self._finish = threading.Event()
        self._seq = 0
        self._unsent = 0
        self._refused = False
        self._thread = threading.Thread(target=self._run, name="speaker", daemon=True)

    @classmethod
    def of(cls, broker: BrokerClient, release: Release, streams: Collection[str]) -> Speaker:
        """Return a speaker for a lease with a connection of its own, so that a renewal never waits for it."""
        own = broker.another(timeout_s=TIMEOUT_S)

        def post(seq: int, stream: str, lines: Sequence[str], *, dropped: int, end: bool) -> None:
            own.words(release, seq, stream, lines, dropped=dropped, end=end)

        return cls(post, streams, close=own.close)

    @property
    def dropped(self) -> int:
        """Lines that did not leave and will not."""
        with self._lock:
            return self._unsent + sum(queue.dropped for queue in self._queues.values())

    def hear(self, line: bytes, progress: Progress | None) -> None:
        """Take one line of the program and what it says of progress; returns at once."""
        for stream, queue in self._queues.items():
            if stream == LOGS:
                text = readable(line)
            elif progress is not None:
                text = progress.text
            else:
                continue
            with self._lock:
                queue.put(text)

    def finish(self) -> None:
        """Say that the program ended: the last batch leaves now. Does not wait."""
        self._finish.set()

    def __enter__(self) -> Speaker:
        if self._queues:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        if self._queues:
            self._thread.join(2 * TIMEOUT_S)

    def _run(self) -> None:
        pause = self._period_s
        self._say(first=True)
        while not self._finish.wait(pause):
            reached = self._say()
            pause = self._period_s if reached else min(2 * pause, PAUSE_MOST_S)
        self._say(end=True)
        self._close()

    def _say(self, *, first: bool = False, end: bool = False) -> bool:
        """Send what is there, an empty batch at the start and at the end; return whether the broker answers."""
        with self._lock:
            batches = [(stream, queue.take()) for stream, queue in self._queues.items()]
        full = [(stream, lines) for stream, lines in batches if lines]
        if not full and (first or end):
            full = batches[:1]
        reached = True
        for number, (stream, lines) in enumerate(full, 1):
            reached = reached and self._send(stream, lines, end=end and number == len(full))
            if not reached:
                with self._lock:
                    self._unsent += len(lines)
        return reached

    def _send(self, stream: str, lines: Sequence[str], *, end: bool) -> bool:
        if self._refused:
            return False
        self._seq += 1
        try:
            self._post(self._seq, stream, lines, dropped=self.dropped, end=end)
        except PeerError:
            return False
        except CloisterError as error:
            self._refused = error.code != "too-fast"
            return False
        return True
