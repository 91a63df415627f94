"""Keep the model's program warm in jails and pass it one question at a time.

The program is an ordinary filter: it reads one JSON object a line on stdin and prints one a line on stdout. How long a
process lives is the sandbox's promise:

    offline    one process answers question after question; it is replaced when it ends or overruns
    one-shot   every question meets a fresh process that has seen no other; spares are started ahead
    sealed     as one-shot

A process that overruns `timeout_s`, prints too much or unasked, does not read, or ends, is killed with everything it
started. What it did wrong is a `ModelFaultError`; failures that happened before it saw the question are others.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import select
import threading
from collections.abc import Callable
from time import monotonic
from typing import Final, Protocol

from cloister.confine.launch import Running
from cloister.errors import CloisterError, MachineError, Reason
from cloister.serve.answer import MAX_LINE_BYTES

FRESH: Final = frozenset({"one-shot", "sealed"})
"""Sandboxes whose processes answer one question only."""
_LOOK_S: Final = 0.2
"""Whoever waits for a process learns within this time that the service stops."""


class ModelFaultError(MachineError):
    """The model's program saw a question and gave no usable answer. It counts as an answer: it says something, too."""

    def __init__(self, found: str) -> None:
        super().__init__(
            "the model's program did not answer",
            code="workload-failed",
            reasons=[Reason("workload", found, "one line for each question")],
            hint="try the program by hand: it must read JSON lines on stdin and print JSON lines on stdout",
        )


class _Model(Protocol):
    """One warm process: `ask` returns its line or raises `ModelFaultError`, `close` kills it."""

    def ask(self, line: bytes, timeout_s: float) -> bytes: ...

    def close(self) -> None: ...


def encode_question(data: bytes) -> bytes:
    """Return the line that the program reads: `{"input": "<base64>"}`."""
    return json.dumps({"input": base64.b64encode(data).decode("ascii")}).encode() + b"\n"


class _SpoiledError(Exception):
    """A process that spoke or ended before the question; it has not seen it."""


class JailedModel:
    """A running program with pipes. One thread asks at a time (the pool sees to it); any thread may close."""

    def __init__(self, running: Running) -> None:
        self._running = running
        if running.stdin is None or running.stdout is None:
            raise ValueError("the program needs pipes on stdin and stdout")
        self._stdin, self._stdout = running.stdin.fileno(), running.stdout.fileno()
        os.set_blocking(self._stdin, False)
        self._asking = threading.Lock()
        self._closing = threading.Lock()
        self._closed = False

    def ask(self, line: bytes, timeout_s: float) -> bytes:
        with self._asking:
            if self._closed:
                raise ModelFaultError("it was stopped")
            return self._exchange(memoryview(line), monotonic() + timeout_s, timeout_s)

    def _exchange(self, rest: memoryview, deadline: float, timeout_s: float) -> bytes:
        said = b""
        if select.select([self._stdout], [], [], 0)[0]:
            raise _SpoiledError("it printed something, or ended, before it was asked")
        while rest or b"\n" not in said:
            left = max(deadline - monotonic(), 0)
            readable, writable, _ = select.select([self._stdout], [self._stdin] if rest else [], [], left)
            if not readable and not writable:
                raise ModelFaultError(f"no answer within {timeout_s:g} s")
            if writable:
                rest = rest[self._write(rest) :]
            if readable:
                block = self._read()
                said += block
                if rest and said:
                    raise ModelFaultError("it printed something before it had read the question")
                if len(said) > MAX_LINE_BYTES:
                    raise ModelFaultError("more than one short line")
        answer, _, more = said.partition(b"\n")
        if more:
            raise ModelFaultError("more than one line")
        return answer

    def _read(self) -> bytes:
        block = os.read(self._stdout, MAX_LINE_BYTES)
        if not block:
            raise ModelFaultError("it ended instead of answering")
        return block

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._stdin, data[:MAX_LINE_BYTES])
        except BlockingIOError:
            return 0
        except BrokenPipeError as error:
            raise ModelFaultError("it ended instead of answering") from error

    def close(self) -> None:
        """Kill the program and everything it started; a second call does nothing."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._running.kill()  # whoever asks sees the end of its output
                with self._asking:  # no descriptor is closed, and its number used again, under a reader
                    self._running.close()


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
            ModelFaultError: the program saw the question, and ended, took too long, or printed something else than one line.
            MachineError: (`workload-failed`, `no-sandbox`, `interrupted`) no program was there to ask.
        """
        deadline = monotonic() + self._timeout_s
        while True:
            model = self._take()
            keep = False
            try:
                answer = model.ask(encode_question(data), self._timeout_s)
                keep = not self._fresh
                return answer
            except _SpoiledError as error:
                # what an earlier question left behind is not this consumer's fault: ask a fresh process
                if monotonic() >= deadline:
                    raise MachineError(
                        f"no process of the model waits for its question: {error}; this question was not counted",
                        code="workload-failed",
                        hint="the program must print nothing before it is asked, and must not end",
                    ) from error
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
        deadline = monotonic() + self._timeout_s
        while not self._closed.is_set():
            try:
                got = self._ready.get(timeout=_LOOK_S)
            except queue.Empty:
                if monotonic() < deadline:
                    continue
                raise MachineError(
                    "no process of the model became free in time; this question was not counted",
                    code="workload-failed",
                    hint="ask again; more `--spares` answer more questions at a time",
                ) from None
            if isinstance(got, CloisterError):
                # one question learns why; another start is tried for the next one
                threading.Thread(target=self._replace, args=(None,), name="spare", daemon=True).start()
                raise got
            return got
        raise MachineError("the service is stopping; this question was not counted", code="interrupted")

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

    def _replace(self, old: _Model | None) -> None:
        if old is not None:
            old.close()
            with self._lock:
                self._all.discard(old)
        try:
            self._put(self._new())
        except CloisterError as error:
            self._put(error)
