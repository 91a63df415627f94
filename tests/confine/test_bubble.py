"""bubblewrap's arguments and the shim's orders, as data."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.confine import bubble, landlock
from cloister.confine.bubble import UNLIMITED, Argument, Machine
from cloister.confine.job import Bind, Job
from cloister.confine.profile import Limits, profile

MACHINE = Machine(
    arch="x86_64",
    stage="/stage",
    proc=MappingProxyType({"kcore": False, "sys": True, "stat": False}),
    folders=(True, True, False),
    landlock_abi=7,
    hard_limits=MappingProxyType({}),
)
JOB = Job(
    (
        Bind(Path("/home/secret-name/inputs"), "/data/scans"),
        Bind(Path("/home/secret-name/runtime"), "/runtime"),
        Bind(Path("/home/secret-name/ld.so"), "/lib64/ld-linux-x86-64.so.2"),
    ),
    ("/runtime/python/bin/python3", "-m", "train"),
    env={"SEED": "1"},
    outputs={"weights": 1000, "log": 10},
)


def words(job: Job = JOB, machine: Machine = MACHINE) -> tuple[Argument, ...]:
    return bubble.arguments(job, profile("sealed"), machine, shim=b"ELF", info_fd=9)


def pairs_after(name: str, found: tuple[Argument, ...]) -> list[tuple[Argument, Argument]]:
    return [(found[i + 1], found[i + 2]) for i, word in enumerate(found) if word == name]


def test_namespaces_and_privileges() -> None:
    found = words()
    for word in (
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
    ):
        assert word in found
    assert found[found.index("--cap-drop") + 1] == "ALL"
    assert "--share-net" not in found


def test_no_path_of_this_machine_gets_into_the_arguments() -> None:
    assert not [word for word in words() if isinstance(word, str) and "secret-name" in word]


def test_inputs_are_read_only_and_only_outputs_are_not() -> None:
    found = words()
    assert {target for _, target in pairs_after("--bind", found)} == {"/out/log", "/out/weights"}
    assert {"/data/scans", "/runtime", "/lib64/ld-linux-x86-64.so.2"} <= {
        target for _, target in pairs_after("--ro-bind", found)
    }


def test_outer_binds_come_before_inner_ones() -> None:
    job = Job((Bind(Path("/b"), "/a/b/c"), Bind(Path("/a"), "/a"), Bind(Path("/c"), "/a/b")), ("/a/x",))
    found = [target for _, target in pairs_after("--ro-bind", words(job))]
    assert [target for target in found if str(target).startswith("/a")] == ["/a", "/a/b", "/a/b/c"]


def test_masks_cover_what_exists_and_nothing_else() -> None:
    masks = {
        (source, target) for source, target in pairs_after("--ro-bind", words()) if str(target).startswith("/proc/")
    }
    assert masks == {("/stage/blank", "/proc/kcore"), ("/stage/empty", "/proc/sys"), ("/stage/blank", "/proc/stat")}


def test_root_becomes_read_only_after_every_mount() -> None:
    found = words()
    last = max(
        i for i, word in enumerate(found) if word in ("--bind", "--ro-bind", "--tmpfs", "--ro-bind-data", "--dir")
    )
    assert found.index("/", last) > last
    assert found[found.index("/", last) - 1] == "--remount-ro"


def test_every_tmpfs_has_a_size() -> None:
    found = words()
    for index, word in enumerate(found):
        if word == "--tmpfs":
            assert found[index - 2] == "--size", found[index + 1]


def test_data_is_never_executable_and_runtime_never_writable() -> None:
    rights = {access.path: access.rights for access in bubble.accesses(JOB, MACHINE)}
    assert rights["/data/scans"] == landlock.READ
    assert rights["/runtime"] == landlock.RUN
    assert rights["/out/weights"] == landlock.WRITE
    assert rights["/"] == landlock.READ_DIR
    executable = {path for path, right in rights.items() if right & landlock.EXECUTE}
    writable = {path for path, right in rights.items() if right & landlock.WRITE_FILE and not path.startswith("/dev/")}
    assert executable & writable == {"/tmp"}


def test_environment_is_exactly_the_declared_one() -> None:
    orders = bubble.shim_orders(JOB, profile("sealed"), MACHINE, streams=(None, None, None), status_fd=20)
    assert set(orders.environment) == {"PATH", "HOME", "LANG", "TMPDIR", "SEED"}


@given(st.dictionaries(st.integers(0, 15), st.integers(0, UNLIMITED)))
def test_limits_never_exceed_what_the_launcher_has(hard: dict[int, int]) -> None:
    found = dict(bubble.rlimits(JOB, profile("offline"), hard))
    assert all(value <= hard.get(number, UNLIMITED) for number, value in found.items())
    assert found[4] == 0


def test_limits_follow_the_profile() -> None:
    limits = Limits(memory_bytes=1 << 30, pids=10, cpu_s=5, scratch_bytes=2000, shm_bytes=1, nofile=77)
    found = dict(bubble.rlimits(JOB, profile("offline", limits=limits), {}))
    assert (found[0], found[1], found[6], found[7], found[9]) == (5, 2000, 40, 77, 4 << 30)


@pytest.mark.parametrize("size", [1, 4095, 4096, 10_000_000])
def test_an_output_of_the_declared_size_always_fits(size: int) -> None:
    rules = profile("sealed")
    room, inodes = bubble.output_tmpfs(size, rules)
    assert inodes == rules.limits.output_files
    # worst case: as many files as there are inodes, each wasting almost a page
    assert room >= size + 4095 * inodes


def test_meminfo_is_constant_and_readable() -> None:
    text = bubble.meminfo(512 << 20).decode()
    rows = dict(line.split(":") for line in text.splitlines())
    assert {int(rows[name].removesuffix("kB")) for name in ("MemTotal", "MemFree", "MemAvailable")} == {512 << 10}
