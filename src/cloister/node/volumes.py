"""Open and mount the sealed volumes of a phase, where only this process and its jail can see them.

Each volume is opened under the digest that the broker named with its key, so an old version, another volume or a
changed byte is refused before anything runs. Mounts live on a tmpfs in a private mount namespace: other processes
never see them, and they vanish with the last process in it, however that ends.

Volumes that fit into memory easily are read once from front to back while the program starts: training then runs at the
speed of the page cache, and the owner of the disk sees one sequential pass instead of the program's order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.broker.client import Release
from cloister.errors import MachineError, Reason
from cloister.node.outputs import current
from cloister.node.report import Report
from cloister.volume.fuse import Mount, enter_user_mount_namespace, linux, mount, private_mount_namespace
from cloister.volume.read import Volume

_PLACES: Final = (Path("/sys/dev"), Path("/boot"))
"""Folders that exist everywhere, hold nobody's data, and are not looked at while a phase runs."""
_MS_NOEXEC: Final = 8  # <linux/mount.h>

PRELOAD_SHARE: Final = 4
"""Volumes are read ahead of the program if together they need at most this part (1/4) of the available memory."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """Where each asset is: `paths` in this process, `mounts` to ask about faults."""

    paths: Mapping[str, Path]
    mounts: Mapping[str, Mount]

    def faults(self) -> list[str]:
        """What failed authentication while it was read, as sentences; each record once, however many files share it."""
        found = (f"{asset}: {fault}" for asset, one in self.mounts.items() for fault in one.faults())
        return list(dict.fromkeys(found))


def isolate() -> None:
    """Enter a user namespace, if this process is not root and so needs one to mount.

    Called before anything secret exists and before threads: entering it needs a moment in which the process can be dumped.
    Root gets its mount namespace when it mounts.

    Raises:
        MachineError: (code `no-mount`) namespaces are not permitted here.
    """
    if os.geteuid() != 0:
        enter_user_mount_namespace()


@contextmanager
def mounted(paths: Mapping[str, Path], release: Release, report: Report) -> Iterator[Mounted]:
    """Mount the volumes at `paths` (asset -> sealed volume) with the keys of `release` for the length of the block.

    The process has called `isolate`.

    Raises:
        TamperedError: a volume is not the one that the broker named (`volume-stale`) or was changed.
        MachineError: (code `no-mount`) this machine cannot mount.
    """
    with ExitStack() as stack:
        points: dict[str, Path] = {}
        mounts: dict[str, Mount] = {}
        size = 0
        if paths:
            root = _private_root(stack)
        for asset, path in paths.items():
            with report.step(f"mounting {asset}") as step:
                key = release.keys[asset]
                volume = Volume.open(current(path, key.digest), key.key, expect=key.digest)
                points[asset] = root / asset
                points[asset].mkdir()
                mounts[asset] = stack.enter_context(mount(volume, points[asset]))
                size += volume.data_len
                step.text = f"mounted {asset}, generation {key.generation}"
        if size <= _available_bytes() // PRELOAD_SHARE:
            stack.enter_context(_preloading(list(mounts.values())))
        yield Mounted(points, mounts)


@contextmanager
def _preloading(mounts: list[Mount]) -> Iterator[None]:
    """Fill the page cache from `mounts` in the background; nothing depends on it, and it ends with the block."""
    stopped = threading.Event()

    def read() -> None:
        for one in mounts:
            with suppress(MachineError):  # no longer served: the program hears of it itself
                one.preload(stop=stopped.is_set)

    reader = threading.Thread(target=read, name="preload", daemon=True)
    reader.start()
    try:
        yield
    finally:
        stopped.set()
        reader.join()


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _private_root(stack: ExitStack) -> Path:
    """Cover a folder that every Linux has with a tmpfs that only this mount namespace sees.

    A folder of our own would outlive `kill -9`; this leaves nothing, however the process ends.
    """
    private_mount_namespace()  # as root, be it of a user namespace
    root = next((place for place in _PLACES if place.is_dir()), None)
    if root is None:
        places = " or ".join(map(str, _PLACES))
        raise MachineError(
            "there is no place for a private tmpfs",
            code="no-mount",
            reasons=[Reason("mount.place", "no such folder", places)],
            hint="mount sysfs at /sys",
        )
    try:
        flags = linux.MS_NOSUID | linux.MS_NODEV | _MS_NOEXEC
        linux.mount(b"cloister", os.fsencode(root), b"tmpfs", flags, b"mode=0711,size=1m")
    except OSError as error:
        raise MachineError(
            f"cannot mount a private tmpfs: {error.strerror}",
            code="no-mount",
            reasons=[Reason(f"mount.{root}", error.strerror or str(error), "permission to mount")],
            hint="run as root, or allow user namespaces; in a container: --cap-add SYS_ADMIN",
        ) from error
    stack.callback(linux.umount, os.fsencode(root), linux.MNT_DETACH)
    return root
