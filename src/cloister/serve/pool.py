"""Keep the model's program warm in jails and pass it one question at a time.

The program is an ordinary filter: it reads one JSON object a line on stdin and prints one a line on stdout. How long a
process lives is the sandbox's promise:

    offline    one process answers question after question; it is replaced when it ends or overruns
    one-shot   every question meets a fresh process that has seen no other; spares are started ahead
    sealed     as one-shot

A process that overruns `timeout_s`, prints too much, or ends, is killed with everything it started.
"""

from __future__ import annotations

import base64
import json
import queue
import select
import threading
from collections.abc import Callable
from time import monotonic
from typing import Final, Protocol

from cloister.confine.launch import Running
from cloister.errors import CloisterError, MachineError, PeerError, Reason
from cloister.serve.answer import MAX_LINE_BYTES

FRESH: Final = frozenset({"one-shot", "sealed"})
"""Sandboxes whose processes answer one question only."""


class _Model(Protocol):
    """One warm process: `ask` returns its line, `close` kills it."""

    def ask(self, line: bytes, timeout_s: float) -> bytes: ...

    def close(self) -> None: ...


def encode_question(data: bytes) -> bytes:
    """Return the line that the program reads: `{"input": "<base64>"}`."""
    return json.dumps({"input": base64.b64encode(data).decode("ascii")}).encode() + b"\n"


class JailedModel:
    """A running program with pipes; not thread-safe, the pool hands it to one question at a time."""

    def __init__(self, running: Running) -> None:
        self._running = running
        if running.stdin is None or running.stdout is None:
            raise ValueError("the program needs pipes on stdin and stdout")
        self._stdin, self._stdout = running.stdin, running.stdout
        self._rest = b""
        self._closing = threading.Lock()
        self._closed = False

    def ask(self, line: bytes, timeout_s: float) -> bytes:
        deadline = monotonic() + timeout_s
        try:
            self._stdin.write(line)
            self._stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise _ended() from error
        while b"\n" not in self._rest:
            if len(self._rest) > MAX_LINE_BYTES:
                raise PeerError("the model printed more than one short line", code="protocol")
            if not select.select([self._stdout], [], [], max(deadline - monotonic(), 0))[0]:
                raise MachineError(f"the model did not answer within {timeout_s:g} s", code="workload-failed")
            block = self._stdout.read1(MAX_LINE_BYTES)  # type: ignore[attr-defined]  # a BufferedReader has it
            if not block:
                raise _ended()
            self._rest += block
        answer, _, self._rest = self._rest.partition(b"\n")
        if self._rest:
            raise PeerError("the model printed more than one line for one question", code="protocol")
        return answer

    def close(self) -> None:
        """Kill the program and everything it started; a second call does nothing."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._running.close()


def _ended() -> MachineError:
    return MachineError(
        "the model's program ended instead of answering",
        code="workload-failed",
        reasons=[Reason("workload", "end of output", "one line for each question")],
        hint="try the program by hand: it must read JSON lines on stdin and print JSON lines on stdout",
    )


class Pool:
    """Warm processes made by `start`. `ask` may be called from many threads.

    `spares` processes wait ready; each one costs the memory of the model.
    """

    def __init__(self, start: Callable[[], _Model], *, fresh: bool, spares: int = 1, timeout_s: float = 30.0) -> None:
        self._start = start
        self._fresh = fresh
        self._timeout_s = timeout_s
        self._ready: queue.Queue[_Model | CloisterError] = queue.Queue()
        self._closed = threading.Event()
        self._all: set[_Model] = set()
        self._lock = threading.Lock()
        for _ in range(max(spares, 1)):
            self._put(self._new())

    def ask(self, data: bytes) -> bytes:
        """Return the line that the program prints for `data`.

        Raises:
            MachineError: (`workload-failed`) it ended or took too long.
            PeerError: (`protocol`) it printed something else than one line.
        """
        model = self._take()
        keep = False
        try:
            answer = model.ask(encode_question(data), self._timeout_s)
            keep = not self._fresh
            return answer
        finally:
            if keep:
                self._put(model)
            else:
                # the replacement starts after the answer is on its way, not in front of it
                threading.Thread(target=self._replace, args=(model,), name="spare", daemon=True).start()

    def close(self) -> None:
        """Kill every process; later questions are refused."""
        self._closed.set()
        with self._lock:
            models, self._all = list(self._all), set()
        for model in models:
            model.close()

    def _take(self) -> _Model:
        while not self._closed.is_set():
            try:
                got = self._ready.get(timeout=self._timeout_s)
            except queue.Empty:
                raise MachineError("no model process became ready in time", code="workload-failed") from None
            if isinstance(got, CloisterError):
                raise got
            return got
        raise MachineError("the service is stopping", code="interrupted")

    def _put(self, model: _Model | CloisterError) -> None:
        self._ready.put(model)

    def _new(self) -> _Model:
        model = self._start()
        with self._lock:
            if not self._closed.is_set():
                self._all.add(model)
                return model
        model.close()
        raise MachineError("the service is stopping", code="interrupted")

    def _replace(self, old: _Model) -> None:
        old.close()
        with self._lock:
            self._all.discard(old)
        try:
            self._put(self._new())
        except CloisterError as error:
            self._put(error)
