"""Compile measured sources with the measured interpreter, inside a jail of its own.

The interpreter and the sources belong to the workload, so they are as untrusted as the workload: compiling happens in
namespaces without network, devices or any file but the staged ones, and all that comes back are length-prefixed byte
strings. What a worker returns is loaded only by programs whose whole runtime layer and sources it came from (`stage` keeps the
bytecode of the same scripts under another runtime apart).

  request   jail path of a source, newline                      to the worker's stdin
  answer    u32 big-endian length | bytecode; length 0xFFFFFFFF: cannot be compiled (a test file with a syntax error)

Bytecode carries the jail path and the "unchecked hash" flag (PEP 552): the interpreter loads it without looking at
the source's time or content, which is sound because the tree that holds both is read-only and verified as a whole.

Without bubblewrap, the node's own interpreter compiles if it has the same version; else the program starts without
bytecode, slower and with the same result.
"""

from __future__ import annotations

import os
import platform
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Protocol

from cloister.confine import seccomp
from cloister.confine.probe import BWRAP_PATH
from cloister.confine.profile import profile
from cloister.confine.syscalls import ARCHES
from cloister.node.workload.form import minor

WORKERS: Final = 2
BATCH: Final = 15
"""Requests on the wire at once: 15 paths of PATH_MAX (4096 bytes) fit a pipe (64 KiB), so both ends never wait for each
other."""

MAX_BYTECODE_BYTES: Final = 64 << 20
MAX_CRASHES: Final = 16
TIMEOUT_S: Final = 900.0
POLL_MS: Final = 200

_NONE: Final = 0xFFFFFFFF
_HEADER: Final = 16  # magic, flags, source hash (PEP 552)
_UNCHECKED: Final = 0b01

# argv[1] is put before each path when reading; "" inside the jail, where the tree is the root.
WORKER: Final = """
import importlib.util, marshal, struct, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, OSError, ValueError):
    pass
out = sys.stdout.buffer
for line in sys.stdin.buffer:
    path = line[:-1].decode()
    try:
        with open(sys.argv[1] + path, "rb") as file:
            source = file.read()
        code = compile(source, path, "exec", dont_inherit=True)
        data = importlib.util.MAGIC_NUMBER + struct.pack("<I", 1) + importlib.util.source_hash(source) + marshal.dumps(code)
        out.write(struct.pack(">I", len(data)) + data)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError, UnicodeError, OSError):
        out.write(b"\\xff\\xff\\xff\\xff")
    out.flush()
"""

Bind = tuple[Path, str]


class WorkerError(Exception):
    """A worker does not start, ended early, or answered what is no answer."""


class Jail(Protocol):
    """Start `argv` with nothing but `binds` (host path, jail path; read-only), stdin and stdout as pipes.

    The process must have no network and no other file system. The node can pass one with more layers than the default.
    """

    def __call__(self, argv: Sequence[str], binds: Sequence[Bind]) -> subprocess.Popen[bytes]: ...


def bubblewrap(argv: Sequence[str], binds: Sequence[Bind]) -> subprocess.Popen[bytes]:
    """Start `argv` under bubblewrap: all namespaces, no capabilities, empty environment, the system calls of `sealed` jobs.

    The interpreter is no more trusted here than when the job runs: without the filter, all that is closed there would be
    open here. Raises OSError where bubblewrap is not installed or there is no table of system calls.
    """
    program, machine = shutil.which("bwrap", path=BWRAP_PATH), platform.machine()
    arch = next((known for known in ARCHES if known == machine), None)
    if program is None or arch is None:
        raise FileNotFoundError("bwrap" if program is None else machine)
    options = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    options += ["--cap-drop", "ALL", "--clearenv"]
    for source, target in binds:
        options += ["--ro-bind", os.fspath(source), target]
    options += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/"]  # noqa: S108 - inside the jail
    with os.fdopen(os.memfd_create("cloister"), "w+b") as calls:
        calls.write(seccomp.compile(profile("sealed"), arch))
        calls.seek(0)
        return _start([program, *options, "--seccomp", str(calls.fileno()), "--", *argv], calls.fileno())


def compile_sources(
    sources: Sequence[str],
    *,
    python: str,
    root: Path,
    binds: Sequence[Bind],
    interpreter: str,
    jail: Jail | None,
    accept: Callable[[str, bytes], None],
    progress: Callable[[int], None],
) -> int:
    """Compile the files at jail paths `sources`; `accept(path, bytecode)` is called for each that compiles.

    `root` is the staged layer on this host. Returns how many were compiled; 0 where nothing here can compile them.
    """
    if not sources:
        return 0

    def inside() -> subprocess.Popen[bytes]:
        return (jail or bubblewrap)([interpreter, *_FLAGS, "-c", WORKER, ""], binds)

    def ours() -> subprocess.Popen[bytes]:
        return _start([sys.executable, *_FLAGS, "-c", WORKER, os.fspath(root)])

    for start in (inside, ours):
        if start is ours and (
            sys.implementation.name != "cpython"
            or minor(python) != f"{sys.version_info.major}.{sys.version_info.minor}"
        ):
            continue
        pool = _Pool(start, sources, accept, progress)
        if pool.works():
            pool.run()
            return pool.compiled
    return 0


_FLAGS: Final = ("-I", "-S", "-B", "-W", "ignore")


def _start(argv: Sequence[str], *keep: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - a command line of this module, no shell
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        bufsize=0,
        pass_fds=keep,
    )


class _Pool:
    """Two workers that draw batches from one list. A worker that dies costs the file it died on, not the others."""

    def __init__(
        self,
        start: Callable[[], subprocess.Popen[bytes]],
        sources: Sequence[str],
        accept: Callable[[str, bytes], None],
        progress: Callable[[int], None],
    ) -> None:
        self._start = start
        self._todo = [list(sources[index : index + BATCH]) for index in range(0, len(sources), BATCH)]
        self._accept = accept
        self._progress = progress
        self._lock = threading.Lock()
        self._crashes = 0
        self._deadline = time.monotonic() + TIMEOUT_S
        self.compiled = 0

    def works(self) -> bool:
        """Does a worker start and answer at all?"""
        try:
            with self._worker() as worker:
                return worker.ask(["/no/such/source.py"]) == [None]
        except WorkerError:
            return False

    def run(self) -> None:
        """Compile everything; an exception of `accept` or an interrupt stops all workers and comes back here."""
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="cloister-compile") as threads:
            try:
                for future in [threads.submit(self._work) for _ in range(min(WORKERS, len(self._todo)))]:
                    future.result()
            except BaseException:
                with self._lock:
                    self._todo.clear()
                self._deadline = 0.0
                raise

    def _work(self) -> None:
        batch = self._next()
        while batch:
            try:
                with self._worker() as worker:
                    while batch:
                        answers = worker.ask(batch)
                        self._deliver(batch, answers)
                        batch = self._next()
            except WorkerError:
                self._crashed(batch)
                batch = self._next()

    def _next(self) -> list[str]:
        with self._lock:
            late = time.monotonic() > self._deadline or self._crashes >= MAX_CRASHES
            return self._todo.pop() if self._todo and not late else []

    def _crashed(self, batch: list[str]) -> None:
        """Try a batch that killed its worker file by file; a single file that did is left without bytecode."""
        with self._lock:
            self._crashes += 1
            if len(batch) > 1:
                self._todo += [[path] for path in batch]

    def _deliver(self, batch: list[str], answers: list[bytes | None]) -> None:
        for path, data in zip(batch, answers, strict=True):
            if data is not None:
                self._accept(path, data)
        with self._lock:
            self.compiled += sum(data is not None for data in answers)
        self._progress(len(batch))

    @contextmanager
    def _worker(self) -> Iterator[_Worker]:
        try:
            process = self._start()
        except OSError as error:
            raise WorkerError from error
        try:
            yield _Worker(process, lambda: self._deadline)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a worker: ask by closing its input, kill it after a second.

    Only in that order: bubblewrap killed before it has tied its child to itself would leave the child behind, and the
    child our pipe open. A worker that is still starting sees the closed input and ends.
    """
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


class _Worker:
    """One compiler process: sends requests, reads answers, gives up at the deadline."""

    def __init__(self, process: subprocess.Popen[bytes], deadline: Callable[[], float]) -> None:
        if process.stdin is None or process.stdout is None:
            raise ValueError("a worker needs pipes")
        self._stdin, self._stdout = process.stdin.fileno(), process.stdout.fileno()
        self._deadline = deadline
        self._poll = select.poll()
        self._poll.register(self._stdout, select.POLLIN)
        self._buffer = bytearray()

    def ask(self, batch: list[str]) -> list[bytes | None]:
        """Send a batch, read its answers.

        Raises:
            WorkerError: the worker ended, is too late, or answered what is no answer.
        """
        try:
            request = "".join([path + "\n" for path in batch]).encode()
            if os.write(self._stdin, request) != len(request):
                raise WorkerError
            return [self._answer() for _ in batch]
        except OSError as error:
            raise WorkerError from error

    def _answer(self) -> bytes | None:
        (length,) = struct.unpack(">I", self._exactly(4))
        if length == _NONE:
            return None
        if not _HEADER < length <= MAX_BYTECODE_BYTES:
            raise WorkerError
        data = self._exactly(length)
        if int.from_bytes(data[4:8], "little") != _UNCHECKED:
            raise WorkerError
        return data

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            if time.monotonic() > self._deadline():
                raise WorkerError
            if self._poll.poll(POLL_MS):
                part = os.read(self._stdout, 1 << 20)
                if not part:
                    raise WorkerError
                self._buffer += part
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data
