"""Which system calls a job may make: an allow-list compiled to classic BPF (Linux seccomp_filter.rst).

A pure function of (profile, architecture). The program decides in this order:

  1 another architecture, or an x32 number (>= 0x40000000)   kill the process
  2 calls whose arguments are judged (`_rules`)              by value: allow, an errno, or success without effect
  3 calls allowed by name (`ALLOWED`, plus `RELAXED`)        allow
  4 everything else                                          EPERM (strict) or ENOSYS (so that libraries fall back)

Only low 32 bits of an argument are compared where the kernel itself uses only those. Pointers are never judged:
a filter cannot follow them, which is why `clone3` does not exist for a job (glibc then uses `clone`).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cloister.confine.profile import Profile
from cloister.confine.syscalls import NUMBERS, Arch

# linux/audit.h
AUDIT_ARCH: Final[dict[Arch, int]] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT: Final = 0x40000000
# linux/seccomp.h: actions
KILL_PROCESS: Final = 0x80000000
ALLOW: Final = 0x7FFF0000
ERRNO: Final = 0x00050000
SUCCESS: Final = ERRNO  # errno 0: the call returns 0 and nothing happens
# linux/filter.h
LD_WORD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
JEQ: Final = 0x15
JGT: Final = 0x25
JGE: Final = 0x35
JSET: Final = 0x45
RET: Final = 0x06
# struct seccomp_data
OFFSET_NR: Final = 0
OFFSET_ARCH: Final = 4
OFFSET_ARGS: Final = 16
MAX_INSTRUCTIONS: Final = 4096

_ALLOWED: Final = """
    read write open close stat fstat lstat poll lseek pread64 pwrite64 readv writev preadv pwritev preadv2 pwritev2
    access faccessat faccessat2 pipe pipe2 select pselect6 ppoll dup dup2 dup3 close_range fsync fdatasync truncate
    ftruncate fallocate sync_file_range getdents getdents64 getcwd chdir fchdir rename renameat renameat2 mkdir mkdirat
    rmdir creat openat openat2 link linkat unlink unlinkat symlink symlinkat readlink readlinkat chmod fchmod fchmodat
    fchmodat2 umask utime utimes futimesat utimensat newfstatat statx statfs fstatfs sendfile splice tee
    copy_file_range

    mmap mprotect munmap brk mremap msync mincore madvise mlock mlock2 munlock mlockall munlockall mseal
    map_shadow_stack membarrier mbind set_mempolicy get_mempolicy set_mempolicy_home_node

    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_tgsigqueueinfo
    rt_sigsuspend sigaltstack kill tkill tgkill pause restart_syscall signalfd signalfd4

    nanosleep getitimer alarm setitimer gettimeofday time times timer_create timer_settime timer_gettime
    timer_getoverrun timer_delete clock_gettime clock_getres clock_nanosleep timerfd_create timerfd_settime
    timerfd_gettime

    futex futex_waitv futex_wake futex_wait futex_requeue set_robust_list get_robust_list set_tid_address rseq
    epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2

    getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid setsid
    setpgid getrusage getrlimit setrlimit prlimit64 uname getcpu getrandom capget getpriority fork vfork execve execveat
    exit exit_group wait4 waitid arch_prctl uretprobe sched_yield sched_getparam sched_getscheduler sched_getattr
    sched_get_priority_max sched_get_priority_min sched_rr_get_interval sched_setaffinity sched_getaffinity

    connect accept accept4 sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg shutdown bind listen getsockname
    getpeername setsockopt getsockopt
"""
ALLOWED: Final = frozenset(_ALLOWED.split())
"""Calls that are allowed whatever their arguments are, in every profile."""

_RELAXED: Final = """
    sysinfo memfd_create inotify_init inotify_init1 inotify_add_watch inotify_rm_watch shmget shmat shmctl shmdt
    flock fadvise64 readahead sync syncfs
"""
RELAXED: Final = frozenset(_RELAXED.split())
"""What ordinary programs also use. Each can signal between jails or tell about the machine, so `sealed` lacks them."""

_PRIVILEGED: Final = """
chown fchown lchown fchownat setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capset
mknod mknodat setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr removexattrat chroot mount
umount2 ptrace unshare setns sethostname setdomainname sched_setscheduler sched_setparam sched_setattr ioprio_set
"""
PRIVILEGED: Final = frozenset(_PRIVILEGED.split())
"""Calls that ordinary programs try and expect EPERM from (`cp -p`, `tar`, `nice`); ENOSYS would break their fallback."""

CLONE_FORBIDDEN: Final = 0x7E020080
"""CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET (linux/sched.h)."""

_IOCTLS: Final = (0x541B, 0x5421, 0x5450, 0x5451)
"""FIONREAD, FIONBIO, FIONCLEX, FIOCLEX (asm-generic/ioctls.h). Not TCGETS: a job has no terminal, and Python asks at
every open(); answered here it costs nothing, on a mounted volume it would be a message to the volume's server."""
_PRCTLS: Final = (1, 2, 3, 4, 16, 23, 38, 39, 40, 41, 42, 0x53564D41)
"""PDEATHSIG, DUMPABLE, GET_NAME, CAPBSET_READ, NO_NEW_PRIVS, TID_ADDRESS, THP and PR_SET_VMA (linux/prctl.h)."""
_PR_SET_NAME: Final = 15
_FCNTLS: Final = (0, 1, 2, 3, 4, 1030, 1031, 1032, 1033, 1034)
"""DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC, SETPIPE_SZ, GETPIPE_SZ, ADD_SEALS, GET_SEALS (linux/fcntl.h)."""
_FCNTL_LOCKS: Final = (5, 6, 7, 36, 37, 38)
_AF_UNIX: Final = 1
_AF_LOOPBACK: Final = (2, 10, 16)
"""AF_INET, AF_INET6, AF_NETLINK (glibc's getaddrinfo and gloo ask netlink for interfaces)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A call judged by one argument: `values` maps its low word to an action; any other value gets `otherwise`.

    With `mask` instead of values: a word with any bit of `mask` gets `otherwise`, a word with none is allowed.
    """

    call: str
    argument: int
    values: tuple[tuple[int, int], ...] = ()
    otherwise: int = KILL_PROCESS
    mask: int = 0


def _errno(number: int) -> int:
    return ERRNO | number


def rules(profile: Profile) -> tuple[Rule, ...]:
    """Return the argument rules of `profile`, most frequent calls first."""
    locks = SUCCESS if profile.strict else ALLOW
    families = (_AF_UNIX, *(_AF_LOOPBACK if profile.loopback else ()))
    return (
        Rule(
            "fcntl",
            1,
            (*((value, ALLOW) for value in _FCNTLS), *((value, locks) for value in _FCNTL_LOCKS)),
            _errno(errno.EPERM),
        ),
        Rule("ioctl", 1, tuple((value, ALLOW) for value in _IOCTLS), _errno(errno.ENOTTY)),
        Rule("clone", 0, otherwise=_errno(errno.EPERM), mask=CLONE_FORBIDDEN),
        Rule("prctl", 0, (*((v, ALLOW) for v in _PRCTLS), (_PR_SET_NAME, SUCCESS)), _errno(errno.EINVAL)),
        Rule("socket", 0, tuple((value, ALLOW) for value in families), _errno(errno.EACCES)),
        Rule("socketpair", 0, ((_AF_UNIX, ALLOW),), _errno(errno.EPERM)),
    )


def constants(profile: Profile) -> dict[str, int]:
    """Return the calls with one fixed answer other than the default: name -> action."""
    fixed = {"clone3": _errno(errno.ENOSYS), "setpriority": SUCCESS}
    # Queries of extended attributes say "not supported here": Python's shutil.copy2 accepts that, but no EPERM.
    for call in ("getxattr", "lgetxattr", "fgetxattr", "listxattr", "llistxattr", "flistxattr"):
        fixed[call] = _errno(errno.EOPNOTSUPP)
    if profile.strict:
        fixed |= {"flock": SUCCESS, "fadvise64": SUCCESS}
    else:
        fixed |= dict.fromkeys(PRIVILEGED, _errno(errno.EPERM))
    return fixed


def allowed(profile: Profile) -> frozenset[str]:
    """Return the names that are allowed without looking at arguments."""
    return ALLOWED if profile.strict else ALLOWED | RELAXED


def default_action(profile: Profile) -> int:
    """Return what every other call gets."""
    return _errno(errno.EPERM) if profile.strict else _errno(errno.ENOSYS)


@lru_cache(maxsize=16)
def compile(profile: Profile, arch: Arch) -> bytes:  # noqa: A001 -- seccomp.compile reads as what it does
    """Return the filter as an array of `struct sock_filter` (8 bytes each, little-endian).

    Raises:
        ValueError: an architecture that there is no table for.
    """
    if arch not in NUMBERS:
        raise ValueError(f"no system call table for {arch!r}")
    numbers = NUMBERS[arch]
    code: list[bytes] = [_op(LD_WORD, OFFSET_ARCH), _op(JEQ, AUDIT_ARCH[arch], 1, 0), _op(RET, KILL_PROCESS)]
    code += [_op(LD_WORD, OFFSET_NR), _op(JGE, X32_BIT, 0, 1), _op(RET, KILL_PROCESS)]
    for rule in rules(profile):
        if rule.call in numbers:
            body = _body(rule)
            code += [_op(JEQ, numbers[rule.call], 0, len(body)), *body]
    for name, action in sorted(constants(profile).items()):
        if name in numbers:
            code += [_op(JEQ, numbers[name], 0, 1), _op(RET, action)]
    for low, high in _ranges(numbers[name] for name in allowed(profile) if name in numbers):
        if low == high:
            code += [_op(JEQ, low, 0, 1), _op(RET, ALLOW)]
        else:
            code += [_op(JGE, low, 0, 2), _op(JGT, high, 1, 0), _op(RET, ALLOW)]
    code.append(_op(RET, default_action(profile)))
    return b"".join(code)


def _op(code: int, k: int, true: int = 0, false: int = 0) -> bytes:
    """One instruction; jumps count instructions and fit one byte, `struct` refuses longer ones."""
    return struct.pack("<HBBI", code, true, false, k)


def _body(rule: Rule) -> Sequence[bytes]:
    """Every path through a body returns, so the system call number need not be loaded again."""
    load = _op(LD_WORD, OFFSET_ARGS + 8 * rule.argument)
    if rule.mask:
        return (load, _op(JSET, rule.mask, 0, 1), _op(RET, rule.otherwise), _op(RET, ALLOW))
    tests = [part for value, action in rule.values for part in (_op(JEQ, value, 0, 1), _op(RET, action))]
    return (load, *tests, _op(RET, rule.otherwise))


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted numbers as inclusive runs: about 90 runs instead of 200 single tests."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
