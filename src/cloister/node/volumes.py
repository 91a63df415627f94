"""Open and mount the sealed volumes of a phase, where only this process and its jail can see them.

Each volume is opened under the digest that the broker named with its key, so an old version, another volume or a
changed byte is refused before anything runs. Mounts live on a tmpfs in a private mount namespace: other processes
never see them, and they vanish with the last process in it, however that ends.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from cloister.broker.client import Release
from cloister.errors import MachineError
from cloister.node.outputs import current
from cloister.node.report import Report
from cloister.volume.fuse import Mount, enter_user_mount_namespace, mount, private_mount_namespace
from cloister.volume.read import Volume


@dataclass(frozen=True, slots=True)
class Mounted:
    """Where each asset is: `paths` in this process, `mounts` to ask about faults."""

    paths: Mapping[str, Path]
    mounts: Mapping[str, Mount]

    def faults(self) -> list[str]:
        """What failed authentication while it was read, as sentences."""
        return [f"{asset}: {fault}" for asset, one in self.mounts.items() for fault in one.faults()]


@contextmanager
def mounted(paths: Mapping[str, Path], release: Release, report: Report) -> Iterator[Mounted]:
    """Mount the volumes at `paths` (asset -> sealed volume) with the keys of `release` for the length of the block.

    Raises:
        TamperedError: a volume is not the one that the broker named (`volume-stale`) or was changed.
        MachineError: (code `no-mount`) this machine cannot mount.
    """
    with ExitStack() as stack:
        points: dict[str, Path] = {}
        mounts: dict[str, Mount] = {}
        if paths:
            root = _private_root(stack)
        for asset, path in paths.items():
            with report.step(f"mounted {asset}") as step:
                key = release.keys[asset]
                volume = Volume.open(current(path, key.digest), key.key, expect=key.digest)
                points[asset] = root / asset
                points[asset].mkdir()
                mounts[asset] = stack.enter_context(mount(volume, points[asset]))
                step.text = f"mounted {asset}, generation {key.generation}, {len(volume.tree) - 1} entries"
        yield Mounted(points, mounts)


def _private_root(stack: ExitStack) -> Path:
    if os.geteuid() == 0:
        private_mount_namespace()
    else:
        enter_user_mount_namespace()
    root = Path(mkdtemp(prefix="cloister-"))
    stack.callback(_remove, root)
    libc = ctypes.CDLL(None, use_errno=True)
    flags = 2 | 4 | 8  # MS_NOSUID | MS_NODEV | MS_NOEXEC
    if libc.mount(b"cloister", os.fsencode(root), b"tmpfs", flags, b"mode=0711,size=1m") != 0:
        number = ctypes.get_errno()
        raise MachineError(f"cannot mount a private tmpfs: {os.strerror(number)}", code="no-mount")
    stack.callback(libc.umount2, os.fsencode(root), 2)  # MNT_DETACH
    return root


def _remove(root: Path) -> None:
    # The folder under the tmpfs is empty; if the tmpfs is still busy, the namespace takes both with it.
    try:
        root.rmdir()
    except OSError:
        return
