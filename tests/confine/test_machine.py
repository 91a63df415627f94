"""Parsers of what the kernel says, and the choice of users and groups."""

from __future__ import annotations

import os

import pytest

from cloister.confine import cgroup, users
from cloister.confine.profile import Limits

MOUNTINFO = """\
30 24 0:26 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate
31 24 0:27 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory
32 24 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 24 0:29 / /data rw - ext4 /dev/vda rw
"""
MEMBERSHIP = "5:memory:/user.slice/a:b\n4:cpu,cpuacct:/\n1:name=systemd:/x\n0::/user.slice\n"


def test_mountinfo_and_membership() -> None:
    mounts = cgroup.parse_mounts(MOUNTINFO)
    assert mounts[""] == "/sys/fs/cgroup/unified"
    assert mounts["memory"] == "/sys/fs/cgroup/memory"
    assert mounts["cpuacct"] == "/sys/fs/cgroup/cpu,cpuacct"
    assert cgroup.parse_membership(MEMBERSHIP) == {
        "memory": "/user.slice/a:b",
        "cpu": "/",
        "cpuacct": "/",
        "name=systemd": "/x",
        "": "/user.slice",
    }


def test_user_range_is_unused_by_others_and_mapped_here() -> None:
    assert users.candidates(users.parse_id_map("         0          0 4294967295\n")) == users.RANGES[0]
    assert users.candidates(users.parse_id_map("0 100000 65536\n")) == users.RANGES[1]
    assert users.candidates(users.parse_id_map("0 100000 1000\n1000 0 1\n")) == range(0)


@pytest.mark.root
def test_users_are_locked_until_released() -> None:
    if os.geteuid() != 0:
        pytest.skip("without root there are no users to hand out")
    first, lock = users.allocate()
    second, other = users.allocate()
    os.close(lock)
    third, last = users.allocate()
    os.close(other)
    os.close(last)
    assert first != second
    assert third == first


@pytest.mark.root
def test_leftover_groups_are_removed_and_live_ones_kept() -> None:
    places = cgroup.sites()
    if not places:
        pytest.skip("no writable control groups here")
    dead = places[0].folder / (cgroup.PREFIX + "leftover-of-a-test")
    dead.mkdir()
    live = cgroup.create(places, Limits())
    assert not dead.exists()
    other = cgroup.create(places, Limits())
    assert all(folder.is_dir() for folder in (*live.folders, *other.folders))
    for group in (live, other):
        for lock in group.locks:
            os.close(lock)
        for folder in group.folders:
            folder.rmdir()
