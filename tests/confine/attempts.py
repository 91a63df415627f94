"""Hostile programs in small pieces: what code in a jail may try. Runs *inside* the jail, with nothing but Python.

Usage: attempts.py SETTINGS_FILE NAME...; without names all of them run. One JSON line per attempt: [name, result]. Each attempt is one function
in a forked child of its own with a time limit; its result is "done" where the thing tried worked, the name of an
errno where it was refused, "signal N" where the child was killed, or a few words.

Never run these as root without a jail: some would succeed (device nodes, mounts). Packets go to documentation
addresses (RFC 5737, RFC 3849) only, the vsock socket is never connected, and everything that fills or forks is
bounded in code. `HARMLESS` names those that a test may run outside as a control.
"""

# ruff: noqa: PTH115, PTH208
# Numbers and links as the kernel shows them are the point here, not paths.

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from cloister.confine.syscalls import NUMBERS, Arch

LIMIT_S = 25
HARMLESS = (
    "tcp_host_loopback",
    "abstract_out",
    "see_host",
    "identity",
    "environ",
    "locks",
    "inherited",
    "clocks",
    "meminfo",
)

ATTEMPTS: dict[str, Callable[[], str]] = {}
SETTINGS: dict[str, Any] = {}
_libc = ctypes.CDLL(None, use_errno=True)
_arch: Arch = "aarch64" if platform.machine() == "aarch64" else "x86_64"
PAGE = 4096


def attempt(function: Callable[[], str]) -> Callable[[], str]:
    ATTEMPTS[function.__name__] = function
    return function


def sys_call(name: str, *arguments: int | bytes | ctypes.Array[Any] | None) -> str:
    number = NUMBERS[_arch].get(name)
    if number is None:
        return "no such call"
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    ctypes.set_errno(0)
    answer = _libc.syscall(ctypes.c_long(number), *values)
    return "done" if answer >= 0 else errno.errorcode[ctypes.get_errno()]


def tried(function: Callable[..., object], *arguments: Any) -> str:
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return "done"


def summary(results: Iterable[str]) -> str:
    return " ".join(sorted(set(results)))


def touch(path: str, flags: int) -> None:
    os.close(os.open(path, flags | os.O_NONBLOCK))


def opened(paths: Iterable[str], flags: int = os.O_RDONLY) -> str:
    return summary(tried(touch, path, flags) for path in paths)


# --- net -------------------------------------------------------------------------------------------------------------


def connect(family: int, kind: int, address: Any) -> str:
    def run() -> None:
        with socket.socket(family, kind) as one:
            one.settimeout(2)
            one.connect(address)
            one.send(b"x")

    return tried(run)


@attempt
def tcp_public() -> str:
    return connect(socket.AF_INET, socket.SOCK_STREAM, ("192.0.2.1", 80))


@attempt
def udp_dns() -> str:
    return connect(socket.AF_INET, socket.SOCK_DGRAM, ("192.0.2.53", 53))


@attempt
def udp6() -> str:
    return connect(socket.AF_INET6, socket.SOCK_DGRAM, ("2001:db8::1", 53))


@attempt
def ping_socket() -> str:
    return tried(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP))


@attempt
def af_netlink() -> str:
    return tried(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))


@attempt
def all_families() -> str:
    return summary(
        tried(socket.socket, family, kind, protocol)
        for family in range(2, 47)
        for kind in (1, 2, 3, 5)
        for protocol in (0, 262)
    )


@attempt
def abstract_out() -> str:
    return connect(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + SETTINGS["abstract"])


@attempt
def socketpair_inet() -> str:
    pair = (ctypes.c_int * 2)()
    return summary(sys_call("socketpair", family, 1, 0, pair) for family in (2, 10, 16, 40))


@attempt
def tun() -> str:
    return opened(["/dev/net/tun"], os.O_RDWR)


@attempt
def inherited() -> str:
    # The listing itself holds a descriptor for a moment; what counts is what is still open afterwards.
    numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    return summary(str(n) for n in numbers if n > 2 and n not in KNOWN and tried(os.fstat, n) == "done") or "none"


@attempt
def tcp_host_loopback() -> str:
    return connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", SETTINGS["port"]))


@attempt
def dns_name() -> str:
    try:
        socket.getaddrinfo("cloister.example", 80)
    except socket.gaierror:
        return "fails"
    return "done"


@attempt
def raw_icmp() -> str:
    return tried(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))


@attempt
def af_packet() -> str:
    return tried(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0300))


@attempt
def af_vsock() -> str:
    return tried(lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))


@attempt
def af_alg() -> str:
    return tried(lambda: socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET))


@attempt
def unix_path() -> str:
    paths = ["/run/dbus/system_bus_socket", "/var/run/docker.sock", "/dev/log", "/run/nscd/socket", SETTINGS["unix"]]
    return summary(connect(socket.AF_UNIX, kind, path) for path in paths for kind in (1, 2))


@attempt
def io_uring() -> str:
    return sys_call("io_uring_setup", 1, (ctypes.c_char * 120)())


@attempt
def proc_net() -> str:
    text = Path("/proc/net/dev").read_text()
    return summary(line.split(":")[0].strip() for line in text.splitlines() if ":" in line)


# --- proc ------------------------------------------------------------------------------------------------------------


@attempt
def see_host() -> str:
    numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return "only own" if len(numbers) <= 6 and max(numbers) < 100 else f"{len(numbers)} processes"


@attempt
def proc_mem() -> str:
    return opened(["/proc/1/mem"], os.O_RDWR)


@attempt
def pvm() -> str:
    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    space = ctypes.create_string_buffer(8)
    vector = (Vector * 1)(Vector(ctypes.addressof(space), 8))
    results = [
        sys_call(name, os.getpid(), vector, 1, vector, 1, 0) for name in ("process_vm_readv", "process_vm_writev")
    ]
    results += [sys_call("pidfd_open", 1, 0), sys_call("pidfd_getfd", 0, 0, 0)]
    results += [sys_call("kcmp", os.getpid(), os.getpid(), 0, 0, 0), sys_call("process_madvise", 0, vector, 1, 4, 0)]
    return summary(results)


@attempt
def become_root() -> str:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
    results = [sys_call("setuid", 0), sys_call("setresuid", 0, 0, 0), sys_call("setgid", 0)]
    results += [sys_call("setgroups", 0, None), sys_call("setreuid", 0, 0), sys_call("capset", header, data)]
    return summary(results)


@attempt
def caps() -> str:
    status = Path("/proc/self/status").read_text()
    rows = dict(line.split(":", 1) for line in status.splitlines() if line.startswith("Cap"))
    return "none" if all(int(value, 16) == 0 for value in rows.values()) else str(rows)


@attempt
def sched() -> str:
    parameter = (ctypes.c_int * 1)(1)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    results = [sys_call("sched_setscheduler", 0, 1, parameter), sys_call("ioprio_set", 1, 0, 1 << 13)]
    os.setpriority(os.PRIO_PROCESS, 0, before) if SETTINGS["strict"] else None
    sys_call("setpriority", 0, 0, -10)
    return summary([*results, "nice unchanged" if os.getpriority(os.PRIO_PROCESS, 0) >= before else "nice lowered"])


@attempt
def rlimits() -> str:
    results = []
    for number in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_AS, 12):
        hard = resource.getrlimit(number)[1]
        if hard == resource.RLIM_INFINITY:
            results.append(f"{number} unlimited")
            continue
        limit = (ctypes.c_ulong * 2)(hard + 1, hard + 1)
        results.append(sys_call("prlimit64", 0, number, limit, None))
    return summary(results)


@attempt
def uid_map() -> str:
    return opened(["/proc/self/uid_map", "/proc/self/gid_map", "/proc/self/setgroups"], os.O_WRONLY)


@attempt
def ptrace() -> str:
    results = []
    for request, of_child in ((16, True), (0x4206, True), (0, False)):  # ATTACH, SEIZE, TRACEME
        child = os.fork()
        if child == 0:
            if not of_child:
                os._exit(0 if sys_call("ptrace", request, 0, 0, 0) == "done" else 1)
            time.sleep(5)
            os._exit(1)
        if of_child:
            results.append(sys_call("ptrace", request, child, 0, 0))
            os.kill(child, signal.SIGKILL)
        while True:
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                break
        if not of_child:
            results.append("done" if os.waitstatus_to_exitcode(status) == 0 else "EPERM")
    return summary(results)


@attempt
def proc_1() -> str:
    links = summary(tried(os.readlink, f"/proc/1/{name}") for name in ("cwd", "root", "exe"))
    files = opened(f"/proc/1/{name}" for name in ("environ", "maps", "auxv"))
    return summary((links + " " + files).split())


@attempt
def kill_init() -> str:
    return summary(tried(os.kill, pid, signal.SIGTERM) for pid in (1, SETTINGS["host_pid"]))


@attempt
def setuid_bins() -> str:
    results = []
    for words in (
        ["/usr/bin/su", "-c", "id -u"],
        ["/usr/bin/mount", "-t", "tmpfs", "x", "/mnt"],
        ["/usr/bin/passwd", "-l", "root"],
    ):
        if not Path(words[0]).exists():
            continue
        answer = subprocess.run(words, capture_output=True, timeout=10, check=False, stdin=subprocess.DEVNULL)
        results.append("no effect" if answer.returncode != 0 and b"0\n" not in answer.stdout else "effect")
    return summary(results or ["no effect"])


@attempt
def namespaces() -> str:
    results = [sys_call("unshare", flag) for flag in (0x10000000, 0x20000, 0x40000000, 0x80)]
    for flag in (0x10000000, 0x20000, 0x20000000):
        number = NUMBERS[_arch]["clone"]
        ctypes.set_errno(0)
        pid = _libc.syscall(ctypes.c_long(number), ctypes.c_long(flag | signal.SIGCHLD), None, None, None, None)
        if pid == 0:
            os._exit(0)
        results.append("done" if pid > 0 else errno.errorcode[ctypes.get_errno()])
    clone3 = (ctypes.c_ulong * 8)(0x10000000, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    number = NUMBERS[_arch]["clone3"]
    pid = _libc.syscall(ctypes.c_long(number), clone3, ctypes.c_long(64))
    if pid == 0:
        os._exit(0)
    results.append("clone3 " + ("done" if pid > 0 else errno.errorcode[ctypes.get_errno()]))
    results.append(sys_call("setns", 0, 0))
    return summary(results)


@attempt
def personality() -> str:
    return summary(sys_call("personality", value) for value in (0x0400000, 0x0040000))


@attempt
def oom() -> str:
    return opened(["/proc/self/oom_score_adj"], os.O_WRONLY)


# --- kernel: one attempt for each family of calls --------------------------------------------------------------------

_space = ctypes.create_string_buffer(4096)
_CALLS: dict[str, tuple[tuple[str, tuple[int | bytes | ctypes.Array[Any] | None, ...]], ...]] = {
    "sys_bpf": (("bpf", (0, _space, 4)),),
    "sys_perf_event_open": (("perf_event_open", (_space, 0, -1, -1, 0)),),
    "sys_userfaultfd": (("userfaultfd", (1,)), ("userfaultfd", (0,))),
    "sys_keyrings": (
        ("add_key", (b"user", b"cloister", b"x", 1, -3)),
        ("request_key", (b"user", b"cloister", None, 0)),
        ("keyctl", (0, -3, 1)),
    ),
    "sys_kexec_reboot": (
        ("kexec_load", (0, 0, None, 1 << 31)),
        ("kexec_file_load", (-1, -1, 0, None, 0)),
        ("reboot", (0, 0, 0)),
    ),
    "sys_modules": (("init_module", (_space, 0, b"")), ("finit_module", (-1, b"", 0)), ("delete_module", (b"none", 0))),
    "sys_mounts": (
        ("mount", (b"x", b"/tmp", b"tmpfs", 0, None)),
        ("umount2", (b"/tmp", 2)),
        ("pivot_root", (b"/tmp", b"/tmp")),
        ("chroot", (b"/tmp",)),
    ),
    "sys_new_mount_api": (
        ("fsopen", (b"tmpfs", 0)),
        ("open_tree", (-100, b"/tmp", 1)),
        ("move_mount", (-1, b"", -1, b"", 0)),
        ("mount_setattr", (-1, b"", 0, _space, 32)),
        ("fspick", (-100, b"/tmp", 0)),
        ("open_tree_attr", (-100, b"/tmp", 0, _space, 32)),
    ),
    "sys_mount_info_calls": (("statmount", (_space, _space, 4096, 0)), ("listmount", (_space, _space, 8, 0))),
    "sys_swap_quota_acct": (
        ("swapon", (b"/tmp/none", 0)),
        ("swapoff", (b"/tmp/none",)),
        ("quotactl", (0, b"none", 0, None)),
        ("acct", (b"/tmp/none",)),
    ),
    "sys_ports": (("iopl", (3,)), ("ioperm", (0x80, 1, 1))),
    "sys_file_handles": (
        ("name_to_handle_at", (-100, b"/tmp", _space, _space, 0)),
        ("open_by_handle_at", (-100, _space, 0)),
    ),
    "sys_memfd": (("memfd_create", (b"x", 0)), ("memfd_secret", (0,))),
    "sys_ldt_vm86": (("modify_ldt", (0, _space, 16)),),
    "sys_vmsplice": (("vmsplice", (-1, None, 0, 0)),),
    "sys_notify": (("inotify_init1", (0,)), ("fanotify_init", (0, 0))),
    "sys_seccomp_listener": (("seccomp", (1, 8, _space)),),
    "sys_sysv_ipc": (("shmget", (0, 4096, 0o1600)), ("msgget", (0, 0o1600)), ("semget", (0, 1, 0o1600))),
    "sys_posix_mq": (("mq_open", (b"cloister", 0o102, 0o600, None)),),
    "sys_kernel_log": (("syslog", (10, None, 0)), ("syslog", (3, _space, 4096))),
    "sys_clock_set": (
        ("clock_settime", (9, _space)),
        ("settimeofday", (None, None)),
        ("adjtimex", (_space,)),
        ("clock_adjtime", (0, _space)),
    ),
    "sys_uname_set": (("sethostname", (b"x", 1)), ("setdomainname", (b"x", 1))),
    "sys_numa_move": (("migrate_pages", (0, 0, None, None)), ("move_pages", (0, 0, None, None, None, 0))),
    "sys_misc_old": (
        ("ustat", (0, _space)),
        ("sysfs", (3,)),
        ("uselib", (b"none",)),
        ("vhangup", ()),
        ("lookup_dcookie", (0, _space, 1)),
        ("remap_file_pages", (0, 0, 0, 0, 0)),
    ),
    "sys_pkeys": (("pkey_alloc", (0, 0)), ("pkey_mprotect", (0, 0, 0, -1))),
    "sys_xattr": (
        ("setxattr", (b"/tmp", b"user.x", b"x", 1, 0)),
        ("setxattrat", (-100, b"/tmp", 0, b"user.x", _space, 16)),
    ),
    "sys_landlock_own": (("landlock_create_ruleset", (None, 0, 1)),),
    "sys_chown": (("fchownat", (-100, b"/tmp", 1000, 1000, 0)), ("chown", (b"/tmp", 1000, 1000))),
    "sys_async_io": (("io_setup", (1, _space)),),
}


def _family(name: str) -> Callable[[], str]:
    calls = _CALLS[name]
    return lambda: summary(
        result for call, arguments in calls if (result := sys_call(call, *arguments)) != "no such call"
    )


for _name in _CALLS:
    ATTEMPTS[_name] = _family(_name)


def _machine_code(code: bytes) -> int:
    space = mmap.mmap(-1, PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    space.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(space))
    return int(ctypes.CFUNCTYPE(ctypes.c_long)(address)())


@attempt
def x32() -> str:
    if _arch != "x86_64":
        return "signal 31"
    return "done" if _libc.syscall(ctypes.c_long(0x40000000 + 39)) > 0 else errno.errorcode[ctypes.get_errno()]


@attempt
def int80() -> str:
    if _arch != "x86_64":
        return "signal 31"
    return "done" if _machine_code(bytes.fromhex("b814000000cd80c3")) > 0 else "refused"  # mov eax, 20; int 0x80; ret


@attempt
def ioctls() -> str:
    number = os.open("/tmp/ioctl", os.O_CREAT | os.O_RDWR)
    return summary(sys_call("ioctl", number, request, _space) for request in (0x5412, 0x541C, 0x40049409, 0xC020660B))


@attempt
def prctls() -> str:
    return summary(sys_call("prctl", option, 0, 0, 0, 0) for option in (35, 22, 26, 59, 62, 0x59616D61))


# --- file ------------------------------------------------------------------------------------------------------------


@attempt
def write_else() -> str:
    places = ["/", "/usr", "/usr/bin", "/etc", "/proc", "/sys", "/dev", "/data", "/app", "/out", "/lib64", "/.cloister"]
    results = [tried(Path(place, "new").write_text, "x") for place in places]
    existing = [SETTINGS["input"], "/usr/bin/python3", "/etc/passwd", "/app/attempts.py", "/.cloister/shim"]
    results += [tried(touch, path, os.O_WRONLY) for path in existing]
    return "refused" if set(results) <= {"EROFS", "EACCES", "ENOENT", "EPERM"} else summary(results)


@attempt
def devices() -> str:
    names = """vda sda kvm fuse mem kmsg console ttyS0 tty tty0 userfaultfd vsock loop0 loop-control nvidia0 nvidiactl
    nvidia-uvm dri/card0 kfd sgx_enclave tpm0 sev-guest tdx_guest ptmx pts/ptmx"""
    return opened([f"/dev/{name}" for name in names.split()], os.O_RDWR)


@attempt
def cgroupfs() -> str:
    return opened(["/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/memory/release_agent", "/sys/fs/cgroup"])


@attempt
def kmem() -> str:
    results = []
    for name in [
        "kcore",
        "kallsyms",
        "iomem",
        "kpageflags",
        "timer_list",
        "slabinfo",
        "vmallocinfo",
        "keys",
        "config.gz",
        "modules",
    ]:
        try:
            content = Path("/proc", name).read_bytes()[:64]
        except OSError:
            content = b""
        results.append("content" if content else "nothing")
    return summary(results)


@attempt
def sparse() -> str:
    number = os.open("/out/one/sparse", os.O_CREAT | os.O_RDWR)
    Path("/out/one/sparse").unlink()
    return tried(lambda: os.ftruncate(number, 1 << 40))


@attempt
def self_exe() -> str:
    return opened(["/proc/self/exe"], os.O_RDWR)


@attempt
def leftovers() -> str:
    found = [name for place in ("/tmp", "/dev/shm", "/out/one") for name in os.listdir(place)]
    return summary(name for name in found if name != "home") or "none"


@attempt
def read_host() -> str:
    paths = [
        "/etc/shadow",
        "/etc/machine-id",
        "/etc/hostname",
        "/etc/ssh/ssh_host_ed25519_key",
        "/root/.ssh/id_ed25519",
        "/root",
        "/home",
        "/var/log",
        "/boot",
        "/run",
        "/var/run",
        "/mnt",
        "/srv",
        "/proc/1/root/etc/shadow",
        "/proc/self/root/etc/shadow",
    ]
    result = opened([*paths, SETTINGS["secret"]])
    return "none" if set(result.split()) <= {"ENOENT", "EACCES"} else result


@attempt
def mknod() -> str:
    return summary(
        tried(os.mknod, "/tmp/node", 0o600 | kind, os.makedev(1, 3)) for kind in (stat.S_IFCHR, stat.S_IFBLK)
    )


@attempt
def proc_sys() -> str:
    names = ("sys/kernel/core_pattern", "sys/kernel/modprobe", "sysrq-trigger", "sys/kernel/randomize_va_space")
    return "refused" if "done" not in opened((f"/proc/{name}" for name in names), os.O_WRONLY) else "done"


@attempt
def hardlink() -> str:
    return tried(lambda: os.link(SETTINGS["input"], "/out/one/linked"))


@attempt
def inodes() -> str:
    for count in range(100_000):
        result = tried(touch, f"/out/one/{count}", os.O_CREAT | os.O_WRONLY)
        if result != "done":
            break
    for number in range(count):
        Path(f"/out/one/{number}").unlink()
    return result if count <= SETTINGS["inodes"] else f"{result} at {count}"


@attempt
def suid_file() -> str:
    Path("/tmp/id").write_bytes(Path("/usr/bin/id").read_bytes())
    result = tried(lambda: Path("/tmp/id").chmod(0o6755))
    answer = subprocess.run(["/tmp/id", "-u"], capture_output=True, timeout=10, check=False)
    return "unchanged" if answer.stdout.strip() in (b"1000", b"") else f"{result} {answer.stdout!r}"


@attempt
def exec_out() -> str:
    path = Path("/out/one/id")
    path.write_bytes(Path("/usr/bin/id").read_bytes())
    path.chmod(0o755)
    result = tried(lambda: subprocess.run([str(path)], timeout=10, check=False, stdout=subprocess.DEVNULL))
    path.unlink()
    return result


# --- info ------------------------------------------------------------------------------------------------------------


@attempt
def host_stats() -> str:
    names = [
        "loadavg",
        "stat",
        "uptime",
        "vmstat",
        "interrupts",
        "softirqs",
        "schedstat",
        "locks",
        "diskstats",
        "swaps",
        "zoneinfo",
        "buddyinfo",
    ]
    names += [
        "pressure/cpu",
        "sys/kernel/ns_last_pid",
        "sys/fs/file-nr",
        "sys/kernel/random/entropy_avail",
        "timer_list",
    ]
    shown = []
    for name in names:
        try:
            content = Path("/proc", name).read_bytes()
        except OSError:
            content = b""
        if content:
            shown.append(name)
    return summary([*shown, "sysinfo " + sys_call("sysinfo", _space)])


@attempt
def identity() -> str:
    paths = ["/proc/sys/kernel/random/boot_id", "/etc/machine-id", "/proc/cmdline", "/sys/class/dmi/id/product_uuid"]
    paths += ["/sys/class/net/eth0/address", "/etc/hostname"]
    found = []
    for path in paths:
        try:
            content = Path(path).read_bytes()
        except OSError:
            content = b""
        if content:
            found.append(path)
    return summary(found) or "none"


def _pipe_inode() -> int:
    read, write = os.pipe()
    try:
        return os.fstat(read).st_ino
    finally:
        os.close(read)
        os.close(write)


@attempt
def pipe_ino() -> str:
    return "counter visible" if 0 < _pipe_inode() - _pipe_inode() + 10 < 10 else "not visible"


@attempt
def mincore() -> str:
    with Path("/usr/bin/python3").open("rb") as file:
        size = os.fstat(file.fileno()).st_size // PAGE * PAGE
        space = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
    address = _libc.mmap
    address.restype = ctypes.c_void_p
    with Path("/usr/bin/python3").open("rb") as file:
        where = address(None, ctypes.c_size_t(size), 1, 1, file.fileno(), ctypes.c_long(0))
    flags = (ctypes.c_ubyte * (size // PAGE))()
    result = _libc.mincore(ctypes.c_void_p(where), ctypes.c_size_t(size), flags)
    space.close()
    return (
        errno.errorcode[ctypes.get_errno()]
        if result
        else ("all alike" if len({flag & 1 for flag in flags}) == 1 else "shown")
    )


@attempt
def clocks() -> str:
    steps = [time.perf_counter_ns() for _ in range(2000)]
    return "finer than 1 us" if min(b - a for a, b in pairwise(steps) if b > a) < 1000 else "coarse"


@attempt
def cmdlines() -> str:
    text = b" ".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in os.listdir("/proc") if pid.isdigit())
    return "outer paths" if SETTINGS["outer"].encode() in text else "none"


@attempt
def meminfo() -> str:
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    constant = rows["MemTotal"].split() == rows["MemFree"].split() == rows["MemAvailable"].split()
    return "constant" if constant else "of the host"


@attempt
def locks() -> str:
    first = os.open(SETTINGS["input"], os.O_RDONLY)
    second = os.open(SETTINGS["input"], os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    return tried(lambda: fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)).replace("done", "no effect")


@attempt
def ns_ino() -> str:
    return "visible" if os.readlink("/proc/self/ns/mnt").startswith("mnt:[") else "hidden"


@attempt
def cachestat() -> str:
    with Path("/usr/bin/python3").open("rb") as file:
        return sys_call("cachestat", file.fileno(), (ctypes.c_ulong * 2)(0, PAGE), _space, 0)


@attempt
def environ() -> str:
    usual = {"PATH", "HOME", "LANG", "TMPDIR", "LC_CTYPE"}
    return summary(set(os.environ) - usual) or "clean"


# --- res -------------------------------------------------------------------------------------------------------------


@attempt
def forkbomb() -> str:
    children = []
    result = "done"
    for _ in range(2000):
        try:
            pid = os.fork()
        except OSError as error:
            result = errno.errorcode[error.errno or 0]
            break
        if pid == 0:
            signal.pause()
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return result if len(children) <= SETTINGS["processes"] else f"{result} at {len(children)}"


@attempt
def threadbomb() -> str:
    stop = threading.Event()
    started: list[threading.Thread] = []
    threading.stack_size(64 * 1024)
    result = "done"
    for _ in range(3000):
        thread = threading.Thread(target=stop.wait, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            result = "EAGAIN"
            break
        started.append(thread)
    stop.set()
    return result if len(started) <= SETTINGS["processes"] else f"{result} at {len(started)}"


@attempt
def fill() -> str:
    results = []
    for place in ("/out/one", "/dev/shm", "/tmp"):
        target = os.open(f"{place}/fill", os.O_CREAT | os.O_WRONLY)
        block = bytes(1 << 20)
        result = "done"
        for _ in range(SETTINGS["fill_mib"]):
            result = tried(os.write, target, block)
            if result != "done":
                break
        os.close(target)
        Path(place, "fill").unlink()
        # A file may end at RLIMIT_FSIZE a moment before its tmpfs is full.
        results.append("stops" if result in ("ENOSPC", "EFBIG") else result)
    return summary(results)


@attempt
def core() -> str:
    child = os.fork()
    if child == 0:
        os.chdir("/tmp")
        os.abort()
    _, status = os.waitpid(child, 0)
    return "dumped" if os.WCOREDUMP(status) or Path("/tmp/core").exists() else "no dump"


@attempt
def fds() -> str:
    opened_now = 0
    result = "done"
    while opened_now < 20_000:
        result = tried(lambda: os.dup(0))
        if result != "done":
            break
        opened_now += 1
    return result if opened_now <= SETTINGS["nofile"] else f"{result} at {opened_now}"


@attempt
def mlock() -> str:
    space = mmap.mmap(-1, 1 << 30)
    address = ctypes.addressof(ctypes.c_char.from_buffer(space))
    result = _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(1 << 30))
    return "done" if result == 0 else errno.errorcode[ctypes.get_errno()]


KNOWN: set[int] = set()


def run_one(name: str) -> str:
    """Run one attempt in a child of its own; its result comes through a pipe, or is the signal that ended it."""
    read, write = os.pipe()
    KNOWN.update((read, write))
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S)
        os.close(read)
        try:
            text = ATTEMPTS[name]()
        except (OSError, ValueError, MemoryError) as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode()[:4000])
        os._exit(0)
    os.close(write)
    data = b""
    while chunk := os.read(read, 4096):
        data += chunk
    os.close(read)
    _, status = os.waitpid(child, 0)
    KNOWN.clear()
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else data.decode()


def main() -> None:
    names = sys.argv[2:] or list(ATTEMPTS)
    SETTINGS.update(json.loads(Path(sys.argv[1]).read_text()))
    if os.getuid() == 0 and not set(names) <= set(HARMLESS):
        raise SystemExit("never as root without a jail")
    for name in names:
        print(json.dumps([name, run_one(name)]), flush=True)


if __name__ == "__main__":
    main()
