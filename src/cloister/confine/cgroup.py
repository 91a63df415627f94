"""Control groups of one job, version 1 or 2: the exact bound on memory and processes where they are writable.

Everything that a group needs is found at run time: which controllers this process is in, whether its own groups can
have children, which files exist. Where nothing is writable (the usual case without root) a job has its rlimits only,
and `Capabilities` says so. The folder is locked with flock while its job lives; unlocked ones are leftovers of a
killed holder and are removed by the next launcher.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.confine.profile import Limits

PREFIX: Final = "cloister-"
_CONTROLLERS: Final = ("memory", "pids")


@dataclass(frozen=True, slots=True)
class Site:
    """A folder in which groups for jobs can be made. `version` is 1 or 2; in version 2 one site has all controllers."""

    version: int
    controllers: frozenset[str]
    folder: Path


@dataclass(frozen=True, slots=True)
class Group:
    """The groups of one job. `join` are files into which the job's first process writes 0."""

    folders: tuple[Path, ...]
    join: tuple[Path, ...]
    oom_file: Path | None
    locks: tuple[int, ...]


def parse_membership(text: str) -> dict[str, str]:
    """Return controller -> path from /proc/<pid>/cgroup (cgroups(7)); version 2 has the name ''."""
    found = {}
    for line in text.splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            found[name] = path
    return found


def parse_mounts(text: str) -> dict[str, str]:
    """Return controller -> mount point from /proc/<pid>/mountinfo (proc(5)); version 2 has the name ''."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        point = left.split(" ")[4]
        if kind == "cgroup2":
            found.setdefault("", point)
        elif kind == "cgroup":
            for name in options.split(","):
                found.setdefault(name, point)
    return found


def sites() -> tuple[Site, ...]:
    """Return where groups can be made now, at most one site for each of memory and pids; empty when nowhere."""
    membership = parse_membership(Path("/proc/self/cgroup").read_text())
    mounts = parse_mounts(Path("/proc/self/mountinfo").read_text())
    found = []
    if "" in mounts and "" in membership:
        own = Path(mounts[""] + membership[""])
        # A group with processes cannot hand controllers down, so a sibling under a delegated parent is tried too.
        for folder in (own, own.parent):
            with contextlib.suppress(OSError):
                enabled = frozenset((folder / "cgroup.subtree_control").read_text().split()) & set(_CONTROLLERS)
                if enabled and os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK):
                    found.append(Site(2, enabled, folder))
                    break
    covered = frozenset(name for site in found for name in site.controllers)
    for name in _CONTROLLERS:
        if name in mounts and name in membership and name not in covered:
            folder = Path(mounts[name] + membership[name])
            if not folder.is_dir():
                folder = Path(mounts[name])  # in a container the path is one of the host's, the mount is its root
            if os.access(folder, os.W_OK):
                found.append(Site(1, frozenset({name}), folder))
    return tuple(found)


def create(places: tuple[Site, ...], limits: Limits) -> Group:
    """Make one group per site with the limits written, and remove leftovers there.

    Raises:
        OSError: a group could not be made or a limit could not be written.
    """
    folders: list[Path] = []
    locks: list[int] = []
    oom_file: Path | None = None
    name = PREFIX + secrets.token_hex(8)
    try:
        for site in places:
            _sweep(site.folder)
            folder = site.folder / name
            folder.mkdir()
            folders.append(folder)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            locks.append(lock)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if "memory" in site.controllers:
                oom_file = _limit_memory(site.version, folder, limits.memory_bytes)
            if "pids" in site.controllers:
                (folder / "pids.max").write_text(str(limits.pids))
    except OSError:
        for lock in locks:
            os.close(lock)
        for folder in folders:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return Group(tuple(folders), tuple(folder / "cgroup.procs" for folder in folders), oom_file, tuple(locks))


def _limit_memory(version: int, folder: Path, size: int) -> Path:
    if version == 2:
        (folder / "memory.max").write_text(str(size))
        for name, value in (("memory.swap.max", "0"), ("memory.oom.group", "1")):
            with contextlib.suppress(FileNotFoundError):
                (folder / name).write_text(value)
        return folder / "memory.events"
    (folder / "memory.limit_in_bytes").write_text(str(size))
    for name, value in (("memory.memsw.limit_in_bytes", str(size)), ("memory.swappiness", "0")):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).write_text(value)
    return folder / "memory.oom_control"


def _sweep(site: Path) -> None:
    for folder in site.glob(PREFIX + "*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder.rmdir()
        except OSError:
            continue  # in use, or just removed by its own holder
        finally:
            os.close(lock)
