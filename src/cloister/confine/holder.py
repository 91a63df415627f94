"""The trusted parent of one jail: a process of its own, started by `launch` with the number of its orders' descriptor.

It imports nothing of the package and little of the standard library, because its start is part of every job's start
(json, socket, signal and typing alone would cost 20 ms). It does, in this order:

  1 orders    read from a descriptor (marshal, written by the same interpreter a moment ago)
  2 room      private mount namespace (plus user namespace without root); everything private, nothing propagates out
  3 stage     tmpfs over an existing folder: inputs bound into it, data without code, one sized tmpfs for each output
  4 hand over descriptors of the outputs go to the launcher; they outlive the mounts
  5 start     child: control group, job's uid, death signal, bubblewrap
  6 watch     until the job ends, the wall clock is over, the launcher says kill, or the launcher is gone
  7 kill      pid 1 of the jail by pidfd, and wait: the kernel then has ended every process in it.
              bubblewrap's own exit says less: it goes when the main program goes, daemons stay
  8 report    exit status, out of memory, out of time

The launcher's death is seen as the end of the control socket and, in case a fork of it still holds that, by a pidfd.
PDEATHSIG would be wrong here: it fires when the *thread* that started us ends. Our own death kills bubblewrap and the
jail's pid 1 by PDEATHSIG, for both have a single thread as parent.
"""

from __future__ import annotations

import _socket
import ctypes
import marshal
import os
import select
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from typing import Any
else:
    import _signal as signal  # the same functions and numbers without enum

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
SYS_MOUNT_SETATTR = 442  # the same number on x86-64 and aarch64
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
KEPT_DIAGNOSTICS = 4096

_libc = ctypes.CDLL(None, use_errno=True)


class RefusedError(Exception):
    """A step that did not work; the text goes to the launcher."""


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise RefusedError(f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            kind.encode() if kind else None,
            ctypes.c_ulong(flags),
            options.encode() or None,
        ),
        f"mount on {target}",
    )


def _forbid_code(target: str) -> None:
    """No program or library comes from the mount at `target` or from one below it.

    Landlock's right to execute is about execve(2) alone: the dynamic loader and dlopen(3) map files as code, which only
    the mount itself can refuse.
    """
    attributes = struct.pack("4Q", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0, 0, 0)  # MOUNT_ATTR_* have the same numbers
    result = _libc.syscall(
        ctypes.c_long(SYS_MOUNT_SETATTR),
        ctypes.c_int(AT_FDCWD),
        os.fsencode(target),
        ctypes.c_uint(AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(len(attributes)),
    )
    _check(result, f"forbid code on {target} (Linux 5.12 or later)")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _own_namespaces(root: bool) -> None:
    uid, gid = os.getuid(), os.getgid()
    _check(_libc.unshare(CLONE_NEWNS if root else CLONE_NEWNS | CLONE_NEWUSER), "unshare namespaces")
    if not root:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
    _mount("none", "/", None, MS_REC | MS_PRIVATE)


def _stage(orders: dict[str, Any]) -> list[int]:
    """Fill the private tmpfs; return descriptors of the outputs in the order of the orders."""
    stage = orders["stage"]
    _mount("cloister", stage, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
    os.umask(0o022)
    for name in ("bind", "out", "empty"):
        os.mkdir(f"{stage}/{name}")  # noqa: PTH102 -- pathlib would cost 5 ms of every start
    os.close(os.open(f"{stage}/blank", os.O_CREAT | os.O_WRONLY, 0o444))
    for index, (source, folder, executes) in enumerate(orders["binds"]):
        target = f"{stage}/bind/{index}"
        if folder:
            os.mkdir(target)  # noqa: PTH102 -- as above
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(source, target, None, MS_BIND | MS_REC)
        if not executes:
            _forbid_code(target)
    found = []
    for name, size, inodes in orders["outputs"]:
        target = f"{stage}/out/{name}"
        os.mkdir(target)  # noqa: PTH102 -- as above
        options = f"mode=0700,size={size},nr_inodes={inodes},uid={orders['uid']},gid={orders['gid']}"
        _mount("cloister", target, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
        found.append(os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    return found


def _send(control: _socket.socket, words: list[bytes], descriptors: list[int]) -> None:
    rights = struct.pack(f"{len(descriptors)}i", *descriptors)
    ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)] if descriptors else []
    try:  # noqa: SIM105 -- contextlib is not worth its import here
        control.sendmsg([b"\0".join(words)], ancillary)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the launcher is gone; there is nobody left to tell, and what remains is to clean up


def _become_bubblewrap(orders: dict[str, Any], root: bool, holder: int, diagnostics: int) -> None:
    """In the child; never returns."""
    try:
        for path in orders["cgroup_join"]:
            _write(path, "0")
        if root:
            os.setgroups([])
            os.setresgid(orders["gid"], orders["gid"], orders["gid"])
            os.setresuid(orders["uid"], orders["uid"], orders["uid"])
        _libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != holder:
            os._exit(1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # Python ignores them and exec would pass that on
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(diagnostics, 1)
        os.dup2(diagnostics, 2)
        os.execve(orders["bwrap"], ["bwrap", "--args", str(orders["args_fd"]), "--", orders["shim"]], {})  # noqa: S606 -- fixed program
    except (OSError, RefusedError) as error:
        os.write(diagnostics, f"start bubblewrap: {error}".encode())
    os._exit(1)


def _child_pid(info: int) -> int:
    """The host's number of the jail's pid 1 from bubblewrap's JSON, or 0 if it never got so far."""
    text = b""
    while chunk := os.read(info, 4096):
        text += chunk
    _, found, rest = text.partition(b'"child-pid":')
    digits = rest.strip().split(b",")[0].split(b"}")[0].strip() if found else b"0"
    return int(digits)


def _open_init(pid: int, parents: tuple[int, ...]) -> int:
    """A pidfd of the jail's pid 1, or -1 if it is gone: then the kernel has ended everything in the jail.

    It may end before it is opened here, and its number may by then belong to somebody else, whom nobody must kill.
    """
    try:
        found = os.pidfd_open(pid) if pid else -1
    except ProcessLookupError:
        found = -1
    if found < 0:
        return -1
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            if int(file.read().rpartition(b")")[2].split()[1]) in parents:
                return found
    except (ProcessLookupError, FileNotFoundError):
        pass
    os.close(found)
    return -1


def _watch(orders: dict[str, Any], control: _socket.socket, bwrap: int, diagnostics: int) -> tuple[bytes, bytes]:
    """Wait for one of the ends; return (why, what bubblewrap said)."""
    launcher = os.pidfd_open(orders["launcher"])
    ended = os.pidfd_open(bwrap)
    poller = select.poll()
    for descriptor in (control.fileno(), launcher, ended, diagnostics):
        poller.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + orders["wall_s"] if orders["wall_s"] else None
    said = b""
    while True:
        left = None if deadline is None else max(0, (deadline - time.monotonic()) * 1000)
        ready = {descriptor for descriptor, _ in poller.poll(left)}
        if diagnostics in ready:
            chunk = os.read(diagnostics, KEPT_DIAGNOSTICS)
            said = (said + chunk)[:KEPT_DIAGNOSTICS]
            if not chunk:
                poller.unregister(diagnostics)
        if ended in ready:
            return b"ended", said
        if control.fileno() in ready or launcher in ready:
            return b"killed", said
        if deadline is not None and time.monotonic() >= deadline:
            return b"time", said


def _kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.poll()


def _out_of_memory(path: str) -> bool:
    """Whether the control group counts a kill (`oom_kill N` in v1's oom_control and v2's events)."""
    if not path:
        return False
    with open(path, encoding="ascii") as file:
        for line in file:
            name, _, count = line.partition(" ")
            if name == "oom_kill" and int(count) > 0:
                return True
    return False


def _remove(cgroups: list[str]) -> None:
    """The groups are empty, but the kernel takes a moment to see it; the next launcher removes what stays."""
    for path in cgroups:
        for _ in range(50):
            try:
                os.rmdir(path)  # noqa: PTH106 -- as in _stage
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.002)
            else:
                break


def _hold(orders: dict[str, Any], control: _socket.socket) -> None:
    root = orders["root"]
    info, info_write = orders["info"]
    for descriptor in (orders["control"], info, *orders["locks"]):
        os.set_inheritable(descriptor, False)
    if os.getppid() != orders["launcher"]:
        raise RefusedError("the launcher ended")
    _libc.prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0)
    _own_namespaces(root)
    outputs = _stage(orders)
    _send(control, [b"outputs"], outputs)
    for descriptor in outputs:
        os.close(descriptor)
    diagnostics, diagnostics_write = os.pipe()
    holder = os.getpid()
    bwrap = os.fork()
    if bwrap == 0:
        _become_bubblewrap(orders, root, holder, diagnostics_write)
    for descriptor in (*orders["keep"], info_write, diagnostics_write):
        os.close(descriptor)
    pid = _child_pid(info)
    init = _open_init(pid, (bwrap, holder))  # ours as subreaper if bubblewrap is gone already
    why, said = _watch(orders, control, bwrap, diagnostics)
    if init >= 0:
        _kill(init)
    os.kill(bwrap, signal.SIGKILL)  # not reaped yet, so the number is still its own
    _, status = os.waitpid(bwrap, 0)
    while True:
        try:
            os.waitpid(-1, 0)  # the jail's pid 1 comes to us as subreaper
        except ChildProcessError:
            break
    oom = _out_of_memory(orders["oom_file"])
    code = os.waitstatus_to_exitcode(status)
    _remove(orders["cgroups"])
    _send(control, [b"exit", str(code).encode(), why, b"1" if oom else b"0", said], [])


def main() -> None:
    orders_fd = int(sys.argv[1])
    with open(orders_fd, "rb") as file:
        orders = marshal.loads(file.read())  # noqa: S302 -- from our launcher's pipe, same interpreter, no other writer
    control = _socket.socket(fileno=orders["control"])
    try:
        _hold(orders, control)
    except (OSError, RefusedError) as error:
        _remove(orders["cgroups"])
        _send(control, [b"failed", str(error).encode()], [])
