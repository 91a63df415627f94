"""Where a mount is visible: the choice is made once, by a process, before it mounts anything.

private_mount_namespace      root: mounts are seen by this process and its children only, and vanish with them
enter_user_mount_namespace   anybody: the same, and the process is root of a new user namespace in which FUSE may be mounted

Both change the calling process for good. Neither can be undone, and other threads would stay behind, so both refuse a
process that has more than one thread.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from cloister.errors import MachineError, Reason
from cloister.volume.fuse import linux


def private_mount_namespace() -> None:
    """Give this process its own mount namespace from which nothing propagates (unshare(CLONE_NEWNS), make-rprivate).

    Raises:
        MachineError: no-mount, not permitted.
        RuntimeError: the process has several threads.
    """
    _single_threaded()
    try:
        linux.unshare(linux.CLONE_NEWNS)
        linux.make_mounts_private()
    except OSError as error:
        raise _refused("mount namespace", error) from error


def enter_user_mount_namespace() -> None:
    """Become root of a new user namespace, with a mount namespace of its own (`unshare --user --map-root-user --mount`).

    The current user is the only one that is mapped; files of everybody else appear as owned by nobody. Call it before there are
    secrets: a process that forbids dumps allows them while its map is written.

    Raises:
        MachineError: no-mount, this kernel or its policy does not let this user create user namespaces.
        RuntimeError: the process has several threads.
    """
    _single_threaded()
    uid, gid = os.geteuid(), os.getegid()
    try:
        linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNS)
        with linux.dumpable():
            Path("/proc/self/setgroups").write_text("deny", encoding="ascii")  # user_namespaces(7): before gid_map
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1", encoding="ascii")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1", encoding="ascii")
        linux.make_mounts_private()
    except OSError as error:
        raise _refused("user namespace", error) from error


def _single_threaded() -> None:
    threads = sum(1 for _ in Path("/proc/self/task").iterdir())
    if threads != 1:
        raise RuntimeError(f"namespaces are entered before threads are started; this process has {threads}")


def _refused(what: str, error: OSError) -> MachineError:
    settings = (
        "user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns"
    )
    hint = f"allow it ({settings})" if what == "user namespace" else "run as root, or in a user namespace"
    if error.errno == errno.ENOSPC:
        found = "the limit of namespaces is reached (ENOSPC)"
    else:
        found = error.strerror or str(error)
    return MachineError(
        f"this process cannot get its own {what}",
        code="no-mount",
        reasons=[Reason(f"unshare.{what.split()[0]}", found=found, wanted="permission to create it", hint=hint)],
        hint="or extract the volume into memory (docs/mount.md)",
    )
