"""Mounts in tests: made with a fixture, gone after the test, whatever happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloister.volume.fuse import Mount, linux, mount
from cloister.volume.types import Volume

Mounter = Callable[..., Mount]


def need_fuse() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: mount(2)")
    if not Path("/dev/fuse").exists():
        pytest.skip("needs /dev/fuse (modprobe fuse)")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mounter]:
    """`mounted(volume, **options) -> Mount`; every mount is closed at the end and must have left nothing."""
    need_fuse()
    open_mounts: list[Mount] = []

    def make(volume: Volume, **options: Any) -> Mount:
        at = tmp_path / f"mnt{len(open_mounts)}"
        at.mkdir()
        made = mount(volume, at, **options)
        open_mounts.append(made)
        return made

    yield make
    for made in open_mounts:
        made.close()
    left = [made.at for made in open_mounts if linux.device_of_mount(made.at) is not None]
    for at in left:
        linux.umount(os.fsencode(at), linux.MNT_DETACH)
    assert not left, "mounts were left behind"
