"""Start, watch and end one jail. This is the edge: processes, descriptors, control groups.

    with launch(job, profile("offline")) as running:
        for line in running.stdout: ...
        ended = running.wait()
        output = running.output("weights")

`launch` returns when the program runs, and raises if any layer could not be put in place: there is no state in which
a job runs with less than its level. Levels: L3 the full jail in a machine that is a TEE guest, L2 the full jail, L1
the jail without Landlock on a kernel that has none (only if the caller names it). A jail without namespaces is not
offered: the measured runtime could not stand at its own paths.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import marshal
import os
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Literal

from cloister.confine import bubble, cgroup, outputs, probe, shim, users
from cloister.confine.bubble import UNLIMITED, Machine
from cloister.confine.job import Job
from cloister.confine.outputs import Output
from cloister.confine.profile import Profile
from cloister.errors import InputError, MachineError

Level = Literal["L1", "L2", "L3"]

_HOLDER: Final = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import holder; holder.main()"
"""Imported rather than run as a file, so that its bytecode is cached: compiling it would cost 6 ms of every start."""
_STAGES: Final = ("/sys/kernel", "/mnt", "/media", "/srv", "/opt")
"""Folders that exist everywhere; the holder covers one of them in its own mount namespace, nobody else sees it."""
_FIRST_FD: Final = 10
_START_TIMEOUT_S: Final = 30.0
_LARGEST_MESSAGE: Final = 8192
_RLIMITS: Final = (
    resource.RLIMIT_CPU,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_CORE,
    resource.RLIMIT_NPROC,
    resource.RLIMIT_NOFILE,
    resource.RLIMIT_MEMLOCK,
    resource.RLIMIT_AS,
    resource.RLIMIT_MSGQUEUE,
    resource.RLIMIT_NICE,
    resource.RLIMIT_RTPRIO,
)


@dataclass(frozen=True, slots=True)
class Exit:
    """How a job ended. `code` is its exit status, `signal` what ended it; exactly one of both is None.

    A program that itself ends with status 128 + n looks like one that signal n ended: bubblewrap reports both alike.
    """

    code: int | None
    signal: int | None
    oom: bool
    """The kernel ended a process of the job because the memory limit was reached (control groups only)."""
    timed_out: bool
    """The wall clock of the profile was over."""
    note: str = ""
    """One sentence for people where the numbers alone say too little."""

    @property
    def ok(self) -> bool:
        return self.code == 0


class Running:
    """A program in its jail. Use as a context manager: leaving the block kills what still runs.

    `stdin`, `stdout`, `stderr` are binary files for streams that the job declared as "pipe", else None.
    Not thread-safe: one thread calls `wait`, `kill` and `close`; the streams are independent of it.
    """

    def __init__(
        self,
        *,
        level: Level,
        job: Job,
        profile: Profile,
        holder: subprocess.Popen[bytes],
        control: socket.socket,
        status: int,
        steps: tuple[str, ...],
        streams: tuple[BinaryIO | None, BinaryIO | None, BinaryIO | None],
        folders: Mapping[str, int],
    ) -> None:
        self.level: Final = level
        self.stdin, self.stdout, self.stderr = streams
        self._job = job
        self._profile = profile
        self._holder = holder
        self._control = control
        self._status = status
        self._steps = steps
        self._folders = dict(folders)
        self._exit: Exit | None = None

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def poll(self) -> Exit | None:
        """Return how the job ended, or None while it runs."""
        try:
            return self.wait(0)
        except TimeoutError:
            return None

    def wait(self, timeout_s: float | None = None) -> Exit:
        """Wait until every process of the job is gone and return how it ended.

        Raises:
            TimeoutError: it still runs after `timeout_s` seconds.
        """
        if self._exit is None:
            message = _receive(self._control, timeout_s)[0]
            self._exit = self._conclude(message)
            self._holder.wait()
        return self._exit

    def kill(self) -> Exit:
        """End every process of the job, daemons included, and return when they are gone. Harmless when it ended."""
        if self._exit is None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._control.send(b"kill")
        return self.wait()

    def output_dir(self, name: str) -> Path:
        """Return a path to the output folder for this process; it stays valid until `close`.

        The job may still write there, and what lies there is hostile: `output` is the checked way to read it.

        Raises:
            ValueError: the job declared no such output.
        """
        if name not in self._folders:
            raise ValueError(f"the job declared no output {name!r}")
        return Path(f"/proc/{os.getpid()}/fd/{self._folders[name]}/.")

    def output(self, name: str, *, names: bool = False) -> Output:
        """Return the checked content of an output; the descriptor in it is valid until `close`.

        `names`: whoever sees the refusal may see the program's own words, such as names of files.

        Raises:
            InputError: code `source-unsealable`: links, devices, too much, ...; every finding is a reason.
            RuntimeError: the job still runs.
            ValueError: the job declared no such output.
        """
        if name not in self._folders:
            raise ValueError(f"the job declared no output {name!r}")
        if self._exit is None:
            raise RuntimeError("outputs are read after the job ended: call wait() first")
        return outputs.check(
            name,
            self._folders[name],
            size_bytes=self._job.outputs[name],
            max_files=self._profile.limits.output_files,
            names=names,
        )

    def close(self) -> None:
        """Kill what runs, drop the outputs (they exist in memory only) and release all descriptors."""
        try:
            self.kill()
        finally:
            for stream in (self.stdin, self.stdout, self.stderr):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
            for descriptor in (*self._folders.values(), *([self._status] if self._status >= 0 else [])):
                os.close(descriptor)
            self._folders.clear()
            self._status = -1
            self._control.close()

    def _conclude(self, message: list[bytes]) -> Exit:
        if message[0] != b"exit":
            reason = message[1].decode(errors="replace") if len(message) > 1 else "its holder was killed"
            return Exit(None, signal.SIGKILL, oom=False, timed_out=False, note=f"the jail broke down: {reason}")
        number, why, oom = int(message[1]), message[2], message[3] == b"1"
        failure = _read_now(self._status)
        if number == shim.FAILED and len(failure) >= shim.REPORT.size:
            return Exit(number, None, oom, timed_out=False, note=_shim_failure(failure, self._steps))
        ended_by = -number if number < 0 else number - 128 if 128 < number < 128 + signal.NSIG else None
        if why == b"time":
            note = f"the wall clock limit of {self._profile.limits.wall_s} s was over"
        elif oom:
            note = f"out of memory: the limit is {self._profile.limits.memory_bytes} bytes"
        elif ended_by in (signal.SIGXCPU, signal.SIGKILL) and self._profile.limits.cpu_s and why == b"ended":
            note = f"killed, perhaps at the limit of {self._profile.limits.cpu_s} CPU seconds"
        elif ended_by == signal.SIGSYS:
            note = "killed for a system call of a foreign architecture"
        else:
            note = ""
        if ended_by is not None:
            return Exit(None, ended_by, oom, why == b"time", note)
        return Exit(number, None, oom, why == b"time", note)


def launch(
    job: Job,
    profile: Profile,
    *,
    level: Level | None = None,
    insecure_without: frozenset[str] = frozenset(),
) -> Running:
    """Start `job` under `profile` and return when the program runs.

    `level` is the lowest level that the caller accepts to be told: None means the best full jail here. `insecure_without`
    leaves layers out (names in `bubble.LAYERS`); it exists so that tests can show what each layer stops.

    Raises:
        MachineError: code `no-sandbox`: a layer is missing or failed; the hint says what to install or change.
        InputError: a bind's source does not exist, or argv[0] cannot be executed.
        ValueError: an unknown level or layer, or a job that the profile does not allow.
    """
    _check_request(job, profile, level, insecure_without)
    facts = probe.facts()
    reached = probe.require(facts, level)
    streams = _Streams(job)
    keep = _Descriptors()
    try:
        return _start(job, profile, facts, reached, streams, keep, insecure_without)
    except BaseException:
        streams.close_ours()
        raise
    finally:
        streams.close_theirs()
        keep.close()


def _check_request(job: Job, profile: Profile, level: Level | None, without: frozenset[str]) -> None:
    if level not in (None, "L1", "L2", "L3"):
        raise ValueError(f"no confinement level {level!r} to run at; there are L1, L2 and L3")
    if unknown := without - bubble.LAYERS:
        raise ValueError(f"no layers {sorted(unknown)}; there are {sorted(bubble.LAYERS)}")
    if profile.strict:
        if any(bind.writable for bind in job.binds):
            raise ValueError("profile 'sealed' has no writable binds: declare an output")
        if "inherit" in (job.stdin, job.stdout, job.stderr):
            raise ValueError("profile 'sealed' does not hand on the launcher's own streams")


def _start(
    job: Job,
    profile: Profile,
    facts: probe.Facts,
    level: Level,
    streams: _Streams,
    keep: _Descriptors,
    without: frozenset[str],
) -> Running:
    root = users.separate()
    uid, gid = os.getuid(), os.getgid()
    locks: list[int] = []
    if root:
        uid, lock = users.allocate()
        gid = uid
        locks.append(keep.add(lock))
    machine = Machine(
        arch=facts.arch,
        stage=_stage_for(job),
        proc=facts.proc,
        folders=_folders(job),
        landlock_abi=facts.landlock_abi,
        hard_limits=_hard_limits(),
    )
    status_read, status_write = keep.pipe()
    info_read, info_write = keep.pipe()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            if facts.landlock_abi == 0:
                without |= {"landlock"}
            orders = bubble.shim_orders(
                job, profile, machine, streams=streams.theirs, status_fd=status_write, without=without
            )
            program = shim.build(orders, facts.arch)
            words = bubble.arguments(job, profile, machine, shim=program.image, info_fd=info_write)
            texts = [str(keep.memory(word)) if isinstance(word, bytes) else word for word in words]
            arguments_fd = keep.memory("".join(text + "\0" for text in texts).encode())
            inside = [*keep.memories, status_write, *(fd for fd in streams.theirs if fd is not None)]
            try:
                group = cgroup.create(facts.cgroup_sites, profile.limits)
            except OSError as error:
                raise MachineError(
                    f"the control group of the job cannot be made: {error.strerror}", code="no-sandbox"
                ) from error
            locks += [keep.add(lock) for lock in group.locks]
            holder_orders = {
                "root": root,
                "uid": uid,
                "gid": gid,
                "launcher": os.getpid(),
                "stage": machine.stage,
                "binds": [
                    (str(bind.source), folder, bind.executes)
                    for bind, folder in zip(job.binds, machine.folders, strict=True)
                ],
                "outputs": [(name, *bubble.output_tmpfs(size, profile)) for name, size in sorted(job.outputs.items())],
                "bwrap": facts.bwrap,
                "args_fd": arguments_fd,
                "shim": bubble.SHIM,
                "control": theirs.fileno(),
                "info": (info_read, info_write),
                "keep": inside,
                "locks": locks,
                "wall_s": profile.limits.wall_s,
                "cgroups": [str(folder) for folder in group.folders],
                "cgroup_join": [str(file) for file in group.join],
                "oom_file": str(group.oom_file) if group.oom_file else "",
            }
            orders_fd = keep.memory(marshal.dumps(holder_orders))
            holder = subprocess.Popen(  # noqa: S603 -- our own file under our own interpreter
                [sys.executable, "-I", "-S", "-c", _HOLDER, str(orders_fd)],
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
                pass_fds=[orders_fd, theirs.fileno(), info_read, info_write, *inside, *locks],
            )
        except BaseException:
            ours.close()
            raise
    keep.close_except(status_read)
    streams.close_theirs()
    try:
        folders = _await_start(ours, status_read, job, program.steps)
    except BaseException:
        ours.close()  # the holder sees it and ends everything
        holder.wait()
        raise
    return Running(
        level=level,
        job=job,
        profile=profile,
        holder=holder,
        control=ours,
        status=keep.release(status_read),
        steps=program.steps,
        streams=streams.ours,
        folders=folders,
    )


def _await_start(control: socket.socket, status: int, job: Job, steps: tuple[str, ...]) -> dict[str, int]:
    """Wait for the outputs' descriptors and for the shim's last word before exec."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    words, descriptors = _receive(control, _START_TIMEOUT_S)
    folders = dict(zip(sorted(job.outputs), descriptors, strict=False))
    try:
        if words[0] != b"outputs" or len(descriptors) != len(job.outputs):
            raise _start_failure(words, b"", steps)
        poller = select.poll()
        poller.register(status, select.POLLIN)
        poller.register(control, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(max(0.0, deadline - time.monotonic()) * 1000)}
        first = _read_now(status, 1) if status in ready else b""
        if first == shim.READY:
            return folders
        report = first + _read_now(status)
        if not ready:
            raise MachineError("the jail did not start within 30 s", code="no-sandbox")
        words, _ = _receive(control, max(0.1, deadline - time.monotonic()))
        raise _start_failure(words, report, steps)
    except BaseException:
        for descriptor in folders.values():
            os.close(descriptor)
        raise


def _start_failure(words: list[bytes], report: bytes, steps: tuple[str, ...]) -> MachineError:
    if len(report) >= shim.REPORT.size:
        text = _shim_failure(report, steps)
    elif words[0] == b"exit" and len(words) > 4:
        text = words[4].decode(errors="replace").strip() or f"bubblewrap ended with status {words[1].decode()}"
    else:
        text = words[1].decode(errors="replace") if len(words) > 1 else "its holder ended"
    return MachineError(
        f"the jail could not be built: {text}", code="no-sandbox", hint="`cloister doctor` says which layers work here"
    )


def _shim_failure(report: bytes, steps: tuple[str, ...]) -> str:
    _, step, number = shim.REPORT.unpack_from(report)
    what = steps[step] if step < len(steps) else f"step {step}"
    return f"cannot {what}: {os.strerror(number)}"


def _receive(control: socket.socket, timeout_s: float | None) -> tuple[list[bytes], list[int]]:
    """Return (words, descriptors) of one message; no words at all when the holder is gone.

    Raises:
        TimeoutError: nothing came within `timeout_s` seconds.
    """
    poller = select.poll()
    poller.register(control, select.POLLIN)
    if not poller.poll(None if timeout_s is None else timeout_s * 1000):
        raise TimeoutError("the job still runs")
    descriptors = array.array("i")
    try:
        data, ancillary, _, _ = control.recvmsg(
            _LARGEST_MESSAGE, socket.CMSG_SPACE(253 * descriptors.itemsize), socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionResetError:
        return [b""], []
    for kind, what, content in ancillary:
        if kind == socket.SOL_SOCKET and what == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return data.split(b"\0"), list(descriptors)


def _read_now(descriptor: int, size: int = 64) -> bytes:
    """Return what a pipe holds at this moment, at most `size` bytes."""
    os.set_blocking(descriptor, False)
    try:
        return os.read(descriptor, size)
    except BlockingIOError:
        return b""


def _stage_for(job: Job) -> str:
    sources = [str(bind.source.resolve()) for bind in job.binds]
    for stage in _STAGES:
        covers = any(source == stage or source.startswith(stage + "/") for source in sources)
        if not covers and Path(stage).is_dir():
            return stage
    raise MachineError(
        f"no folder is free to prepare the jail in: tried {', '.join(_STAGES)}",
        code="no-sandbox",
        hint="mount /sys, or create an empty folder /mnt",
    )


def _folders(job: Job) -> tuple[bool, ...]:
    found = []
    for bind in job.binds:
        try:
            mode = bind.source.stat().st_mode
        except OSError as error:
            raise InputError(f"cannot bind {bind.source} to {bind.target}: {error.strerror}") from error
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
            raise InputError(f"cannot bind {bind.source} to {bind.target}: it is no folder, file or socket")
        found.append(stat.S_ISDIR(mode))
    return tuple(found)


def _hard_limits() -> dict[int, int]:
    limits = {number: resource.getrlimit(number)[1] for number in _RLIMITS}
    return {number: UNLIMITED if value == resource.RLIM_INFINITY else value for number, value in limits.items()}


class _Descriptors:
    """Descriptors of one start, all numbered from 10 up and closed together, whatever happens."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self.memories: list[int] = []

    def add(self, descriptor: int) -> int:
        """Take over `descriptor`; return its new number."""
        moved = _high(descriptor)
        self._open.add(moved)
        return moved

    def pipe(self) -> tuple[int, int]:
        read, write = os.pipe()
        return self.add(read), self.add(write)

    def memory(self, content: bytes) -> int:
        """Return a descriptor at the start of an in-memory file with `content`."""
        number = self.add(os.memfd_create("cloister", os.MFD_CLOEXEC))
        view = memoryview(content)
        while view:
            view = view[os.write(number, view) :]
        os.lseek(number, 0, os.SEEK_SET)
        self.memories.append(number)
        return number

    def release(self, descriptor: int) -> int:
        """Hand `descriptor` over to the caller."""
        self._open.discard(descriptor)
        return descriptor

    def close_except(self, *kept: int) -> None:
        for descriptor in self._open - set(kept):
            os.close(descriptor)
        self._open &= set(kept)

    def close(self) -> None:
        self.close_except()


class _Streams:
    """Both ends of the job's three streams: `theirs` are numbers for the shim (None: /dev/null in the jail)."""

    def __init__(self, job: Job) -> None:
        theirs: list[int | None] = []
        ours: list[BinaryIO | None] = []
        for number, kind in enumerate((job.stdin, job.stdout, job.stderr)):
            if kind == "null":
                theirs.append(None)
                ours.append(None)
            elif kind == "inherit":
                theirs.append(_high(os.dup(number)))
                ours.append(None)
            else:
                read, write = os.pipe()
                theirs.append(_high(read if number == 0 else write))
                ours.append(os.fdopen(write, "wb") if number == 0 else os.fdopen(read, "rb"))
        self.theirs = (theirs[0], theirs[1], theirs[2])
        self.ours = (ours[0], ours[1], ours[2])
        self._closed = False

    def close_theirs(self) -> None:
        if not self._closed:
            self._closed = True
            for descriptor in self.theirs:
                if descriptor is not None:
                    os.close(descriptor)

    def close_ours(self) -> None:
        for stream in self.ours:
            if stream is not None:
                stream.close()


def _high(descriptor: int) -> int:
    """Move a descriptor to a number of 10 or more, where neither streams nor the shim's status pipe get in its way."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD)
    os.close(descriptor)
    return moved
