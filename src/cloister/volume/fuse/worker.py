"""The processes behind a mount: a supervisor that starts workers, and workers that answer the kernel.

    mounting process --fork--> supervisor --fork--> worker, worker ...
      Mount (pidfd, reports)     keeps the device,     die with the supervisor,
                                 restarts, tidies up   no capability, no other descriptor

Supervisor, in this order:
  1 new session (a Ctrl-C in the terminal is not for us), default signals, no dumps, all other descriptors closed
  2 start the workers, then wait for a worker or the mounting process to end
  3 a worker ended with status 0: the file system was unmounted; end when all have
  4 a worker died: start another and let the kernel deliver the unanswered requests again (Linux 6.9 and later, and not
    more often than `RESTARTS` allows); otherwise end, which aborts the connection: readers get ENOTCONN
  5 the mounting process says stop (it shuts its end of the report socket) or died: kill the workers, detach what is still
    mounted, and end

Reports travel as JSON, one per packet, on a SOCK_SEQPACKET socket. They carry paths and numbers, never content or keys.
A full socket drops reports rather than hold up a reader.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from cloister.volume.fuse import linux
from cloister.volume.fuse import protocol as p
from cloister.volume.fuse.server import Fault, Server


@dataclass(frozen=True, slots=True)
class RestartBudget:
    """At most `burst` restarts at once, and `per_second` more in the long run: a request that kills every worker
    uses the budget up in well under a second, then the mount fails closed."""

    burst: int = 32
    per_second: float = 8.0


RESTARTS: Final = RestartBudget()


@dataclass(frozen=True, slots=True)
class Post:
    """What the supervisor needs to know."""

    device: int  # descriptor of /dev/fuse, INIT already answered
    device_path: Path
    reports: int  # descriptor of the packet socket to the mounting process
    parent: int  # process id of the mounting process
    at: Path  # mount point, absolute
    mount_device: str | None  # MAJOR:MINOR of the mount
    workers: int
    can_resend: bool


def supervise(post: Post, server_for: Callable[[Callable[[Fault], None]], Server], keep: Collection[int]) -> int:
    """Run in a fresh child of the mounting process; returns its exit status. `keep`: descriptors that the volume reads from."""
    os.setsid()
    # No collection from here on: a dead object of the mounting process could close a descriptor number that is ours now.
    gc.disable()
    _default_signals()
    linux.name_process(b"cloister-mount")
    linux.forbid_dumps()
    _silence_stdio()
    linux.close_other_fds({0, 1, 2, post.device, post.reports, *keep})
    linux.lock_private_memory()
    parent = os.pidfd_open(post.parent)
    if os.getppid() != post.parent:
        return _stop(post, ())

    server = server_for(lambda fault: _send(post.reports, {"fault": asdict(fault)}))
    crew = {_start(post, server, number, keep): number for number in range(post.workers)}
    tokens, last = float(RESTARTS.burst), time.monotonic()
    while crew:
        poll = select.poll()
        poll.register(parent, select.POLLIN)
        poll.register(post.reports, select.POLLIN)
        watched = {os.pidfd_open(pid): pid for pid in crew}
        for fd in watched:
            poll.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll()]
        for fd in watched:
            os.close(fd)
        if parent in ready or post.reports in ready:  # nothing is ever sent to us: readable means the other end is shut
            return _stop(post, crew)
        for pid in [watched[fd] for fd in ready]:
            number = crew.pop(pid)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if status == 0:
                continue
            now = time.monotonic()
            tokens, last = min(RESTARTS.burst, tokens + (now - last) * RESTARTS.per_second), now
            restart = post.can_resend and tokens >= 1
            _send(post.reports, {"died": pid, "status": status, "restarted": restart})
            if not restart:
                return 1
            tokens -= 1
            crew[_start(post, server, number, keep)] = number
            os.write(post.device, p.resend_notice())
    return 0


def _start(post: Post, server: Server, number: int, keep: Collection[int]) -> int:
    """Fork one worker; the first reads the supervisor's descriptor, each other one a clone of it."""
    supervisor = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        linux.die_with_parent(supervisor)
        linux.name_process(b"cloister-fuse")
        # again: libraries of the mounting process may open descriptors in every child (libuv makes itself a pipe)
        linux.close_other_fds({0, 1, 2, post.device, post.reports, *keep})
        device = post.device
        if number:
            device = os.open(post.device_path, os.O_RDWR | os.O_CLOEXEC)
            fcntl.ioctl(device, p.CLONE_IOCTL, post.device.to_bytes(4, "little"))
        locked = linux.lock_private_memory()  # locks are not inherited
        linux.drop_privileges()
        linux.forbid_dumps()
        _send(post.reports, {"worker": os.getpid(), "locked": locked})
        server.serve(device)
        status = 0
    finally:
        end_process(post.reports, status)


def _stop(post: Post, crew: Collection[int]) -> int:
    """End the workers, and unmount what is still mounted: if the mounting process is gone, nobody else will."""
    for pid in crew:
        os.kill(pid, signal.SIGKILL)
    for pid in crew:
        os.waitpid(pid, 0)
    if post.mount_device is not None and linux.device_of_mount(post.at) == post.mount_device:
        linux.umount(os.fsencode(post.at), linux.MNT_DETACH)
    return 0


def end_process(reports: int, status: int) -> NoReturn:
    """End a forked child from a `finally` block: it must never unwind into the code that forked it.

    An error in flight is reported by its type, which says enough and holds no content.
    """
    error = sys.exc_info()[0]
    if error is not None:
        _send(reports, {"error": error.__name__})
        status = status or 1
    os._exit(status)


def _send(reports: int, message: dict[str, Any]) -> None:
    """One packet; dropped if the socket is full or the mounting process is gone (the descriptor does not block)."""
    with suppress(OSError):
        os.write(reports, json.dumps(message).encode("ascii"))


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _silence_stdio() -> None:
    """Nobody waits for the end of our output, and nothing is ever printed."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)
