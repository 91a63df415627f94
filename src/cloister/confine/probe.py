"""What this machine can do for a jail: facts that every start needs, and a report for people.

`facts()` is cheap and runs before each start. `probe()` also builds a real jail around a program of one system call,
which is the only honest answer to whether namespaces work here (sysctls, AppArmor and container filters all differ).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from cloister.confine import bubble, cgroup
from cloister.confine.syscalls import ARCHES, NUMBERS, Arch
from cloister.errors import MachineError, Reason

Level = Literal["L1", "L2", "L3"]

MIN_BWRAP: Final = (0, 8, 0)
"""First release with `--size`, `--disable-userns` and `--add-seccomp-fd` together."""
BWRAP_PATH: Final = "/usr/bin:/bin:/usr/local/bin"
_TEE_DEVICES: Final = ("/dev/tdx_guest", "/dev/sev-guest")
_LANDLOCK_VERSION: Final = 1  # LANDLOCK_CREATE_RULESET_VERSION
_SECCOMP_GET_ACTION_AVAIL: Final = 2


@dataclass(frozen=True, slots=True)
class Facts:
    """What a start must know. `bwrap` is "" and numbers are 0 where something is missing."""

    arch: Arch
    bwrap: str
    bwrap_version: tuple[int, ...]
    seccomp: bool
    landlock_abi: int
    cgroup_sites: tuple[cgroup.Site, ...]
    proc: Mapping[str, bool]
    tee_guest: bool


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The report of `probe`. `level` is the best that `launch` reaches here: L0 (none), L1, L2 or L3."""

    level: Literal["L0", "L1", "L2", "L3"]
    bwrap: str
    bwrap_version: str
    namespaces: bool
    seccomp: bool
    landlock_abi: int
    cgroups: tuple[str, ...]
    """Controllers with limits, such as `memory (v1)`; empty means rlimits only."""
    tee_guest: bool
    missing: tuple[Reason, ...]
    """Each missing layer with its remedy."""


def facts() -> Facts:
    """Return what this machine has, without starting a jail.

    Raises:
        MachineError: code `no-sandbox`: a processor architecture without tables here.
    """
    name = platform.machine()
    if name not in ARCHES:
        raise MachineError(
            f"programs cannot be confined on {name}",
            code="no-sandbox",
            hint=f"there are tables for {', '.join(ARCHES)}",
        )
    bwrap = shutil.which("bwrap", path=BWRAP_PATH) or ""
    return Facts(
        arch=name,
        bwrap=bwrap,
        bwrap_version=_bwrap_version(bwrap) if bwrap else (),
        seccomp=_has_seccomp(name),
        landlock_abi=_landlock_abi(name),
        cgroup_sites=cgroup.sites(),
        proc=MappingProxyType({entry: Path("/proc", entry).is_dir() for entry in _masked_here()}),
        tee_guest=any(Path(device).exists() for device in _TEE_DEVICES),
    )


def missing(found: Facts) -> tuple[Reason, ...]:
    """Return every layer of the full jail that `found` lacks, with what to do about it."""
    reasons = []
    wanted = ".".join(map(str, MIN_BWRAP))
    if not found.bwrap:
        hint = "install it: `apt install bubblewrap` or `dnf install bubblewrap`"
        reasons.append(Reason("confine.bubblewrap", "not installed", f"bubblewrap {wanted} or later", hint))
    elif found.bwrap_version < MIN_BWRAP:
        version = ".".join(map(str, found.bwrap_version))
        reasons.append(Reason("confine.bubblewrap", version, f"{wanted} or later", "install a newer bubblewrap"))
    if not found.seccomp:
        hint = "use a kernel with CONFIG_SECCOMP_FILTER"
        reasons.append(Reason("confine.seccomp", "not available", "seccomp filters with KILL_PROCESS", hint))
    if found.landlock_abi == 0:
        hint = "boot a kernel from 5.13 on with `lsm=landlock,...` on its command line"
        reasons.append(Reason("confine.landlock", "not available", "Landlock ABI 1 or later", hint))
    return tuple(reasons)


def require(found: Facts, level: Level | None) -> Level:
    """Return the level at which a jail starts with `found` when the caller asks for `level` (None: the best full jail).

    Raises:
        MachineError: code `no-sandbox`, one reason for each missing layer.
    """
    lacking = missing(found)
    if level == "L1":
        lacking = tuple(reason for reason in lacking if reason.where != "confine.landlock")
    if level == "L3" and not found.tee_guest:
        hint = "run in a TDX or SEV-SNP guest, or let the contract name L2"
        lacking += (Reason("confine.tee", "not a TEE guest", "a VM TEE around the full jail", hint),)
    if lacking:
        raise MachineError(
            "programs cannot be confined on this machine" + (f" at level {level}" if level else ""),
            code="no-sandbox",
            reasons=lacking,
            hint=lacking[0].hint,
        )
    if level is not None:
        return level
    return "L3" if found.tee_guest else "L2"


def probe() -> Capabilities:
    """Build a jail around a program that ends at once and report what was reached."""
    found = facts()
    lacking = missing(found)
    trial = _trial(found) if not [reason for reason in lacking if reason.where != "confine.landlock"] else None
    if isinstance(trial, Reason):
        lacking += (trial,)
    works = trial is True
    level: Literal["L0", "L1", "L2", "L3"] = "L0"
    if works:
        level = "L1" if found.landlock_abi == 0 else "L3" if found.tee_guest else "L2"
    return Capabilities(
        level=level,
        bwrap=found.bwrap,
        bwrap_version=".".join(map(str, found.bwrap_version)),
        namespaces=works,
        seccomp=found.seccomp,
        landlock_abi=found.landlock_abi,
        cgroups=tuple(f"{name} (v{site.version})" for site in found.cgroup_sites for name in sorted(site.controllers)),
        tee_guest=found.tee_guest,
        missing=lacking,
    )


def best_level() -> Literal["L0", "L1", "L2", "L3"]:
    """Return the best level that `launch` reaches here."""
    return probe().level


def _trial(found: Facts) -> Reason | Literal[True]:
    from cloister.confine import shim
    from cloister.confine.job import Bind, Job
    from cloister.confine.launch import launch
    from cloister.confine.profile import profile

    with tempfile.TemporaryDirectory(prefix="cloister-probe-") as folder:
        Path(folder).chmod(0o755)
        program = Path(folder, "true")
        program.write_bytes(shim.exit_program(found.arch))
        program.chmod(0o755)
        job = Job((Bind(program, "/true"),), ("/true",))
        try:
            with launch(job, profile("sealed"), level="L1" if found.landlock_abi == 0 else None) as running:
                ended = running.wait(30)
        except (MachineError, TimeoutError) as error:
            hint = (
                "allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone, "
                "kernel.apparmor_restrict_unprivileged_userns, the container's seccomp profile)"
            )
            return Reason("confine.namespaces", str(error), "a jail that starts", hint)
    if not ended.ok:
        return Reason("confine.namespaces", f"a trial program ended with {ended.code or ended.signal}", "status 0")
    return True


@lru_cache(maxsize=4)
def _bwrap_version(path: str) -> tuple[int, ...]:
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"(\d+)\.(\d+)\.(\d+)", answer.stdout)
    return tuple(int(part) for part in match.groups()) if match else ()


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@lru_cache(maxsize=1)
def _landlock_abi(arch: Arch) -> int:
    number = NUMBERS[arch]["landlock_create_ruleset"]
    answer = _libc().syscall(ctypes.c_long(number), None, ctypes.c_size_t(0), ctypes.c_uint(_LANDLOCK_VERSION))
    return max(0, int(answer))


@lru_cache(maxsize=1)
def _has_seccomp(arch: Arch) -> bool:
    action = ctypes.c_uint(0x80000000)  # SECCOMP_RET_KILL_PROCESS
    number = NUMBERS[arch]["seccomp"]
    answer = _libc().syscall(ctypes.c_long(number), _SECCOMP_GET_ACTION_AVAIL, 0, ctypes.byref(action))
    return answer == 0 or ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@lru_cache(maxsize=1)
def _masked_here() -> tuple[str, ...]:
    return tuple(name for name in bubble.MASKED if os.path.lexists(f"/proc/{name}"))
