"""Mount a volume: open /dev/fuse, mount(2), answer INIT, fork the processes that serve, unmount.

`mount` leaves nothing behind when it fails; `Mount.close` leaves nothing behind in any case: no mount point, no process,
no key outside the caller. What readers see in every failure is in docs/mount.md.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import signal
import socket
import stat
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self, runtime_checkable

from cloister.errors import InputError, MachineError, Reason
from cloister.volume.fuse import linux
from cloister.volume.fuse import protocol as p
from cloister.volume.fuse.server import Fault, Server
from cloister.volume.fuse.worker import Post, end_process, supervise
from cloister.volume.types import Volume

DEVICE: Final = Path("/dev/fuse")
READ_AHEAD_KB: Final = 1024  # the kernel's 128 KiB costs a fifth of sequential throughput (docs/mount.md)
BUSY_PATIENCE_S: Final = 1.0  # how long `close` hopes that readers let go
_OTHER_DOOR: Final = "or extract the volume into memory with Volume.extract (docs/mount.md)"


class Mount:
    """A mounted volume; made by `mount`, closed by `close` or at the end of a `with` block.

    Owned by the process that made it: in a forked child `close` does nothing.
    """

    def __init__(
        self, at: Path, supervisor: int, reports: socket.socket, session: p.Session, read_ahead_kb: int
    ) -> None:
        self.at: Final = at
        """Where the files are (absolute)."""
        self.read_ahead_kb: Final = read_ahead_kb
        """Sequential read-ahead that the kernel granted."""
        self.can_restart: Final = session.can_resend
        """True if a worker that dies is replaced without a reader noticing (Linux 6.9 and later)."""
        self._owner = os.getpid()
        self._pid = supervisor
        self._pidfd = os.pidfd_open(supervisor)
        self._reports = reports
        self._faults: list[Fault] = []
        self._deaths: list[int] = []
        self._workers: list[int] = []
        self._errors: list[str] = []
        self._closed = False

    @property
    def alive(self) -> bool:
        """True while the volume is served; False after `close` and after a death that could not be repaired."""
        return not self._closed and not _ended(self._pidfd)

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._closed

    def faults(self) -> tuple[Fault, ...]:
        """Records that failed so far, each file and record once, in the order they were met."""
        self._drain()
        return tuple(self._faults)

    def deaths(self) -> tuple[int, ...]:
        """Exit statuses of workers that died so far (negative: the signal)."""
        self._drain()
        return tuple(self._deaths)

    def errors(self) -> tuple[str, ...]:
        """Names of the error types that ended workers."""
        self._drain()
        return tuple(self._errors)

    def workers(self) -> tuple[int, ...]:
        """Process ids of the workers that have reported for duty and not been reported dead."""
        self._drain()
        return tuple(self._workers)

    def preload(self, *, stop: Callable[[], bool] = lambda: False) -> int:
        """Read every file once, front to back as they are stored, into the page cache; returns the bytes read.

        Ends early when `stop`, which is asked before each file and each MiB of it, returns True.

        For volumes that fit in memory: later reads of any order run at the speed of the page cache, and the owner of the disk sees one
        sequential pass instead of which record is read when. Files that cannot be read are left out (`faults` names them).

        Raises:
            MachineError: no-mount, the volume is no longer served.
        """
        if not self.alive:
            raise MachineError(f"{self.at} is no longer served", code="no-mount")
        buffer, total, folders = bytearray(p.MAX_READ), 0, [os.fsencode(self.at)]
        for folder in folders:  # grows: breadth first, children sorted, the order of types.Tree and hence of the data
            try:
                with os.scandir(folder) as entries:
                    children = sorted(entries, key=lambda entry: entry.name)
                for entry in children:
                    if stop():
                        return total
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        total += _read_through(entry.path, buffer, stop)
            except OSError as error:
                raise MachineError(f"{self.at} is no longer served: {error.strerror}", code="no-mount") from error
        return total

    def close(self, patience_s: float = BUSY_PATIENCE_S) -> None:
        """Unmount and end the serving processes. Idempotent.

        A busy mount is retried for `patience_s` seconds, then detached: the path is free at once, and readers that still hold a
        file open get ENOTCONN for what is not in the page cache.
        """
        if self._closed or os.getpid() != self._owner:
            return
        deadline = time.monotonic() + patience_s
        while True:
            try:
                linux.umount(os.fsencode(self.at), linux.UMOUNT_NOFOLLOW)
            except OSError as error:
                if error.errno == errno.EBUSY and time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                if error.errno == errno.EBUSY:
                    linux.umount(os.fsencode(self.at), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
                elif error.errno not in (errno.EINVAL, errno.ENOENT):  # already unmounted by somebody else
                    raise
            break
        with suppress(OSError):  # it has ended already
            self._reports.shutdown(socket.SHUT_WR)
        if not _ended(self._pidfd, 1.0):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        _reap(self._pidfd)
        self._drain()
        self._closed = True
        self._workers.clear()
        self._reports.close()
        os.close(self._pidfd)

    def _drain(self) -> None:
        while not self._closed:
            try:
                packet = self._reports.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if not packet:
                return
            message = json.loads(packet)
            if "fault" in message:
                self._faults.append(Fault(**message["fault"]))
            elif "worker" in message:
                self._workers.append(message["worker"])
            elif "died" in message:
                self._deaths.append(message["status"])
                self._workers = [pid for pid in self._workers if pid != message["died"]]
            elif "error" in message:
                self._errors.append(message["error"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "alive" if self.alive else "dead"
        return f"Mount(at={str(self.at)!r}, {state})"


@runtime_checkable
class NamesDescriptors(Protocol):
    """A volume that says which descriptors it reads from; the workers close all others."""

    def descriptors(self) -> Collection[int]:
        """Descriptors that must stay open as long as the volume is read."""
        ...


def mount(
    volume: Volume,
    at: Path,
    *,
    uid: int | None = None,
    gid: int | None = None,
    allow_other: bool = True,
    workers: int = 1,
    device: Path = DEVICE,
) -> Mount:
    """Mount `volume` read-only at the directory `at`, in the current mount namespace.

    `uid` and `gid` own every file (default: the caller). `allow_other`: processes of other users may read, too. `workers`: serving
    processes. `device`: the FUSE device.

    The workers inherit the opened volume, keys included; the caller may drop its own afterwards.

    Raises:
        InputError: `at` is no directory.
        MachineError: no-mount; no FUSE in the kernel, no permission, a kernel that is too old.
        ValueError: `workers` is less than 1.
    """
    if workers < 1:
        raise ValueError(f"{workers} workers")
    at = at.resolve()
    if not at.is_dir():
        raise InputError(f"{at} is not a directory, so nothing can be mounted there", hint=f"mkdir -p {at}")
    uid = os.geteuid() if uid is None else uid
    gid = os.getegid() if gid is None else gid
    fd = _open_device(device)
    try:
        _mount_device(fd, at, allow_other=allow_other)
        try:
            offer = p.parse_init(os.read(fd, p.REQUEST_BUFFER))
            session = p.negotiate(offer)
            os.write(fd, p.init_reply(offer, session))
            mount_device = linux.device_of_mount(at)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            theirs.setblocking(False)
            try:
                post = Post(fd, device, theirs.fileno(), os.getpid(), at, mount_device, workers, session.can_resend)
                pid = _fork_supervisor(
                    post, lambda report: Server(volume, uid=uid, gid=gid, report=report), _descriptors(volume)
                )
            finally:
                theirs.close()
        except BaseException:
            linux.umount(os.fsencode(at), linux.MNT_DETACH)
            raise
    finally:
        os.close(fd)
    return Mount(at, pid, ours, session, _raise_read_ahead(mount_device))


def _descriptors(volume: Volume) -> set[int]:
    """What the volume reads from, if it says so; else every regular file and folder that is open for reading only."""
    if isinstance(volume, NamesDescriptors):
        return set(volume.descriptors())
    found = set()
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        with suppress(OSError):  # the descriptor of the listing itself
            mode = os.fstat(fd).st_mode
            reads_only = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            if reads_only and (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                found.add(fd)
    return found


def _fork_supervisor(post: Post, server_for: Callable[[Callable[[Fault], None]], Server], keep: Collection[int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = supervise(post, server_for, keep)
    finally:
        # Whatever happened, the child must not return into the caller's program; Mount.alive and Mount.errors tell.
        end_process(post.reports, status)


def _open_device(device: Path) -> int:
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise _no_mount(
            str(device), "missing", "the FUSE device", "modprobe fuse; in a container: --device /dev/fuse"
        ) from error
    except PermissionError as error:
        raise _no_mount(
            str(device),
            f"not readable and writable for uid {os.geteuid()}",
            "read and write permission",
            "run as root, or chmod 666 /dev/fuse (as most distributions have it)",
        ) from error
    except OSError as error:  # ENODEV, ENXIO: a node without a driver behind it
        raise _no_mount(
            str(device), error.strerror or str(error), "the kernel's FUSE driver", "modprobe fuse (CONFIG_FUSE_FS)"
        ) from error
    if not stat.S_ISCHR(os.fstat(fd).st_mode):
        os.close(fd)
        raise _no_mount(str(device), "not a character device", "the FUSE device", "mknod /dev/fuse c 10 229")
    return fd


def _mount_device(fd: int, at: Path, *, allow_other: bool) -> None:
    options = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},default_permissions,max_read={p.MAX_READ}"
    if allow_other:
        options += ",allow_other"
    flags = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
    try:
        linux.mount(b"cloister", os.fsencode(at), b"fuse.cloister", flags, options.encode("ascii"))
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise _no_mount(
                "mount(2)",
                f"not permitted for uid {os.geteuid()}",
                "CAP_SYS_ADMIN in this user namespace",
                "run as root, or enter a user namespace first (enter_user_mount_namespace)",
            ) from error
        if error.errno == errno.ENODEV:
            raise _no_mount(
                "mount(2)", "file system type fuse is unknown", "FUSE in the kernel", "modprobe fuse (CONFIG_FUSE_FS)"
            ) from error
        raise _no_mount("mount(2)", error.strerror or str(error), "a FUSE mount", "") from error


def _no_mount(where: str, found: str, wanted: str, hint: str) -> MachineError:
    return MachineError(
        f"sealed volumes cannot be mounted here: {where}: {found}",
        code="no-mount",
        reasons=[Reason(where, found=found, wanted=wanted, hint=hint)],
        hint=f"{hint}; {_OTHER_DOOR}" if hint else _OTHER_DOOR,
    )


def _raise_read_ahead(mount_device: str | None) -> int:
    """Set the read-ahead of the mount to READ_AHEAD_KB where sysfs may be written (root); returns what holds now, 0 if unknown."""
    setting = Path(f"/sys/class/bdi/{mount_device}/read_ahead_kb")
    with suppress(OSError):  # a user namespace, or no sysfs: slower, not wrong
        setting.write_text(str(READ_AHEAD_KB), encoding="ascii")
    try:
        return int(setting.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _read_through(path: bytes, buffer: bytearray, stop: Callable[[], bool]) -> int:
    total = 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while not stop() and (count := os.readv(fd, [buffer])):
            total += count
    except OSError as error:
        if error.errno != errno.EIO:
            raise
    finally:
        os.close(fd)
    return total


def _ended(pidfd: int, timeout_s: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _reap(pidfd: int) -> None:
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        return  # the caller ignores SIGCHLD, or waits for all children itself
