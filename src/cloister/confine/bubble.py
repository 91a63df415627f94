"""Job + profile -> everything that starts the jail, as data: bubblewrap's arguments and the shim's orders.

Pure: what must be known about the machine (which /proc entries exist, which bind is a folder, Landlock's ABI, hard
resource limits) comes in as `Machine`. The layout of a jail:

    /            tmpfs, read-only at the end
    binds        the measured runtime, code and inputs, read-only; below /data nothing executes
    /etc         passwd, group and nsswitch.conf, generated; nothing of the host
    /proc        own pid namespace; kernel-wide entries masked, meminfo constant
    /dev         null zero full random urandom, shm (sized tmpfs); no tty, no pts
    /sys         devices/system/cpu, read-only: thread counts must equal those outside
    /tmp         sized tmpfs, HOME is /tmp/home
    /out/<name>  one sized tmpfs for each declared output

bubblewrap sees its arguments through `--args FD`: a command line would show this machine's paths in the jail.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cloister.confine import landlock, seccomp
from cloister.confine.job import ENVIRONMENT, GID, HOME, HOSTNAME, UID, Job
from cloister.confine.landlock import Access
from cloister.confine.profile import KIB, MIB, Profile
from cloister.confine.shim import Orders
from cloister.confine.syscalls import Arch

SHIM: Final = "/.cloister/shim"
LAYERS: Final = frozenset({"seccomp", "landlock", "rlimits"})
"""Layers that a test of the layers may leave out; namespaces cannot be left out here."""

_MASKED: Final = """
    acpi asound bus crypto driver dynamic_debug fs irq key-users keys kcore kmsg kallsyms kpagecount kpageflags
    kpagecgroup latency_stats loadavg locks mdstat misc modules pressure sched_debug schedstat scsi slabinfo softirqs
    interrupts stat swaps sysrq-trigger sysvipc sys timer_list timer_stats tty uptime vmallocinfo vmstat zoneinfo
    buddyinfo pagetypeinfo diskstats partitions consoles cmdline config.gz devices dma execdomains iomem ioports fb
    allocinfo mtrr version_signature bootconfig
"""
MASKED: Final = tuple(_MASKED.split())
"""Entries of /proc that tell about the machine or other jobs, or that change it."""

DEVICES: Final = ("null", "zero", "full", "random", "urandom")

# RLIMIT_* numbers, equal on x86-64 and aarch64 (asm-generic/resource.h)
_CPU, _FSIZE, _CORE, _NPROC, _NOFILE, _MEMLOCK, _AS, _MSGQUEUE, _NICE, _RTPRIO = 0, 1, 4, 6, 7, 8, 9, 12, 13, 14
UNLIMITED: Final = (1 << 64) - 1

_PASSWD: Final = f"job:x:{UID}:{GID}::{HOME}:/bin/sh\n".encode()
_GROUP: Final = f"job:x:{GID}:\n".encode()
_NSSWITCH: Final = b"passwd: files\ngroup: files\nhosts: files\n"
ETC: Final = {"/etc/passwd": _PASSWD, "/etc/group": _GROUP, "/etc/nsswitch.conf": _NSSWITCH}


@dataclass(frozen=True, slots=True)
class Machine:
    """What the edge found out about this machine for one start."""

    arch: Arch
    stage: str
    """Folder that the holder covers with a private tmpfs; see `staged`."""
    proc: Mapping[str, bool]
    """Entry of /proc -> is a folder."""
    folders: tuple[bool, ...]
    """For each bind of the job, whether its source is a folder."""
    landlock_abi: int
    hard_limits: Mapping[int, int]
    """RLIMIT_* -> hard limit of the launcher (`UNLIMITED` for none): a job's limits cannot be higher."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Paths that the holder makes below `stage`, visible to nobody else."""

    stage: str

    def bind(self, index: int) -> str:
        return f"{self.stage}/bind/{index}"

    def output(self, name: str) -> str:
        return f"{self.stage}/out/{name}"

    @property
    def empty(self) -> str:
        return f"{self.stage}/empty"

    @property
    def blank(self) -> str:
        return f"{self.stage}/blank"


Argument = str | bytes
"""One argument of bubblewrap; bytes stand for the number of a descriptor from which these bytes can be read."""


def arguments(job: Job, profile: Profile, machine: Machine, *, shim: bytes, info_fd: int) -> tuple[Argument, ...]:
    """Return bubblewrap's arguments in the order in which it carries them out; its command is `SHIM`."""
    limits = profile.limits
    staged = Staged(machine.stage)
    words: list[Argument] = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"]
    words += ["--new-session", "--cap-drop", "ALL", "--clearenv", "--hostname", HOSTNAME]
    words += ["--uid", str(UID), "--gid", str(GID), "--info-fd", str(info_fd)]
    for index in sorted(range(len(job.binds)), key=lambda i: job.binds[i].target):
        bind = job.binds[index]
        words += ["--bind" if bind.writable else "--ro-bind", staged.bind(index), bind.target]
    for path, content in ETC.items():
        words += ["--perms", "0444", "--ro-bind-data", content, path]
    words += ["--proc", "/proc"]
    for name in MASKED:
        if name in machine.proc:
            words += ["--ro-bind", staged.empty if machine.proc[name] else staged.blank, f"/proc/{name}"]
    words += ["--perms", "0444", "--ro-bind-data", meminfo(limits.memory_bytes), "/proc/meminfo"]
    words += ["--perms", "0755", "--size", str(64 * KIB), "--tmpfs", "/dev"]
    for device in DEVICES:
        words += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    words += ["--symlink", "/proc/self/fd", "/dev/fd"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        words += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
    words += ["--perms", "1777", "--size", str(limits.shm_bytes), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]  # noqa: S108 -- in the jail
    words += ["--ro-bind", "/sys/devices/system/cpu", "/sys/devices/system/cpu"]
    words += ["--perms", "1777", "--size", str(limits.scratch_bytes), "--tmpfs", "/tmp", "--dir", HOME]  # noqa: S108 -- in the jail
    words += ["--perms", "0755", "--dir", "/out"]
    for name in sorted(job.outputs):
        words += ["--bind", staged.output(name), f"/out/{name}"]
    words += ["--perms", "0555", "--ro-bind-data", shim, SHIM, "--remount-ro", "/"]
    words += ["--chdir", job.cwd]
    return tuple(words)


def shim_orders(
    job: Job,
    profile: Profile,
    machine: Machine,
    *,
    streams: tuple[int | None, int | None, int | None],
    status_fd: int,
    without: frozenset[str] = frozenset(),
) -> Orders:
    """Return what the shim does before the job. `without` names layers to leave out (`LAYERS`; tests only)."""
    return Orders(
        argv=job.argv,
        environment={**ENVIRONMENT, **job.env},
        streams=streams,
        status_fd=status_fd,
        rlimits=() if "rlimits" in without else rlimits(job, profile, machine.hard_limits),
        landlock=None
        if "landlock" in without
        else landlock.ruleset(machine.landlock_abi, accesses(job, machine), network=profile.loopback),
        seccomp=None if "seccomp" in without else seccomp.compile(profile, machine.arch),
        coredump_filter="rlimits" not in without,
    )


def accesses(job: Job, machine: Machine) -> tuple[Access, ...]:
    """Return who may do what where, for Landlock."""
    found = []
    for bind, folder in zip(job.binds, machine.folders, strict=True):
        rights = landlock.WRITE if bind.writable else landlock.READ if bind.data else landlock.RUN
        found.append(Access(bind.target, rights, folder))
    found += [Access(path, landlock.READ) for path in ("/etc", "/proc", "/sys")]
    found += [Access(f"/dev/{device}", landlock.DEVICE, folder=False) for device in DEVICES]
    # Listing is allowed everywhere: Python's importer lists the parents of what is bound, and only the job's own
    # files exist here.
    found.append(Access("/", landlock.READ_DIR))
    found += [Access("/dev/shm", landlock.WRITE), Access("/tmp", landlock.SCRATCH)]  # noqa: S108 -- in the jail
    found += [Access(f"/out/{name}", landlock.WRITE) for name in sorted(job.outputs)]
    return tuple(found)


def rlimits(job: Job, profile: Profile, hard: Mapping[int, int]) -> tuple[tuple[int, int], ...]:
    """Return (RLIMIT_* number, value); never above what the launcher itself has."""
    limits = profile.limits
    biggest_file = max(limits.scratch_bytes, limits.shm_bytes, *job.outputs.values(), 0)
    wanted = {
        _CORE: 0,
        _MSGQUEUE: 0,
        _RTPRIO: 0,
        _NICE: 0,
        _AS: 4 * limits.memory_bytes,  # torch and CUDA reserve far more address space than they touch
        _FSIZE: biggest_file,
        _NPROC: 4 * limits.pids,  # the control group is the exact bound; this one holds where there is none
        _NOFILE: limits.nofile,
        _MEMLOCK: 8 * MIB,  # the kernel's own default
        _CPU: limits.cpu_s or UNLIMITED,
    }
    return tuple((resource, min(value, hard.get(resource, UNLIMITED))) for resource, value in sorted(wanted.items()))


def output_tmpfs(size_bytes: int, profile: Profile) -> tuple[int, int]:
    """Return (size in bytes, inodes) of an output's tmpfs: room for rounding each file up to a page, no more.

    The exact sum is judged when the output is read.
    """
    files = profile.limits.output_files
    return size_bytes + 4 * KIB * files, files


def meminfo(memory_bytes: int) -> bytes:
    """Return a constant /proc/meminfo that says what the job may use, not what the machine has left."""
    size = memory_bytes // KIB
    rows = {"MemTotal": size, "MemFree": size, "MemAvailable": size}
    rows |= dict.fromkeys(("Buffers", "Cached", "SwapCached", "SwapTotal", "SwapFree", "Shmem", "SReclaimable"), 0)
    return "".join(f"{name + ':':<15} {value:>9} kB\n" for name, value in rows.items()).encode()
