"""98 attempts from inside, each with the answer that the jail must give: one table, two profiles, one control group.

An answer that differs is a failure even if it is another refusal: a changed errno means that another layer said no.
The attempts marked OPEN get through by design and are listed in docs/confinement.md as open.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

import cloister
from cloister.confine.job import Bind
from cloister.confine.probe import facts
from cloister.confine.profile import profile
from tests.confine import attempts
from tests.confine.jails import PYTHON, SMALL, finish, needs_jail, start

ATTEMPTS: Final = Path(attempts.__file__)

# name -> answer in `sealed`, answer in `offline` (`=` the same)
EXPECTED: Final = """
tcp_public           EACCES               =
udp_dns              EACCES               =
udp6                 EACCES               =
ping_socket          EACCES               =
af_netlink           EACCES               =
all_families         EACCES               =
abstract_out         ECONNREFUSED         =
socketpair_inet      EPERM                =
tun                  ENOENT               =
inherited            none                 =
tcp_host_loopback    EACCES               =
dns_name             fails                =
raw_icmp             EACCES               =
af_packet            EACCES               =
af_vsock             EACCES               =
af_alg               EACCES               =
unix_path            ENOENT               =
io_uring             EPERM                ENOSYS
proc_net             lo                   =
see_host             only_own             =
proc_mem             EACCES               =
pvm                  EPERM                ENOSYS
become_root          EPERM                =
caps                 none                 =
sched                EPERM_nice_unchanged =
rlimits              EPERM                =
uid_map              EACCES               =
ptrace               EPERM                =
proc_1               EACCES               =
kill_init            EPERM_ESRCH          =
setuid_bins          no_effect            =
namespaces           EPERM_clone3_ENOSYS  =
personality          EPERM                ENOSYS
oom                  EACCES               =
sys_bpf              EPERM                ENOSYS
sys_perf_event_open  EPERM                ENOSYS
sys_userfaultfd      EPERM                ENOSYS
sys_keyrings         EPERM                ENOSYS
sys_kexec_reboot     EPERM                ENOSYS
sys_modules          EPERM                ENOSYS
sys_mounts           EPERM                EPERM_ENOSYS
sys_new_mount_api    EPERM                ENOSYS
sys_mount_info_calls EPERM                ENOSYS
sys_swap_quota_acct  EPERM                ENOSYS
sys_ports            EPERM                ENOSYS
sys_file_handles     EPERM                ENOSYS
sys_memfd            EPERM                ENOSYS_done
sys_ldt_vm86         EPERM                ENOSYS
sys_vmsplice         EPERM                ENOSYS
sys_notify           EPERM                ENOSYS_done
sys_seccomp_listener EPERM                ENOSYS
sys_sysv_ipc         EPERM                ENOSYS_done
sys_posix_mq         EPERM                ENOSYS
sys_kernel_log       EPERM                ENOSYS
sys_clock_set        EPERM                ENOSYS
sys_uname_set        EPERM                =
sys_numa_move        EPERM                ENOSYS
sys_misc_old         EPERM                ENOSYS
sys_pkeys            EPERM                ENOSYS
sys_xattr            EPERM                =
sys_landlock_own     EPERM                ENOSYS
sys_chown            EPERM                =
sys_async_io         EPERM                ENOSYS
x32                  signal_31            =
int80                signal_31            =
ioctls               ENOTTY               =
prctls               EINVAL               =
write_else           refused              =
devices              ENOENT               =
cgroupfs             ENOENT               =
kmem                 nothing              =
sparse               EFBIG                =
self_exe             EACCES               =
leftovers            none                 =
read_host            none                 =
mknod                EPERM                =
proc_sys             refused              =
hardlink             EXDEV                =
inodes               ENOSPC               =
suid_file            unchanged            =
exec_out             EACCES               =
host_stats           sysinfo_EPERM        sysinfo_done
identity             none                 =
pipe_ino             counter_visible      =
mincore              all_alike            =
clocks               finer_than_1_us      =
cmdlines             none                 =
meminfo              constant             =
locks                no_effect            EAGAIN
ns_ino               visible              =
cachestat            EPERM                ENOSYS
environ              clean                =
forkbomb             EAGAIN               =
threadbomb           EAGAIN               =
fill                 stops                =
core                 no_dump              =
fds                  EMFILE               =
mlock                ENOMEM               =
"""
OPEN: Final = ("pipe_ino", "clocks", "ns_ino")
SEPARATE: Final = ("leftovers",)
"""Run in a second jail of its own, after the others have made a mess in the first."""


def expected(name: str) -> Mapping[str, str]:
    column = {"sealed": 1, "offline": 2}[name]
    table = {}
    for line in EXPECTED.strip().splitlines():
        row = line.split()
        answer = row[1] if row[column] == "=" else row[column]
        table[row[0]] = " ".join(sorted(answer.replace("_", " ").split()))
    return table


@dataclass(frozen=True, slots=True)
class Outside:
    """What the attempts may reach for, made by the test outside the jail."""

    folder: Path
    settings: Mapping[str, object]
    tcp: socket.socket
    abstract: socket.socket
    unix: socket.socket

    def disturbed(self) -> bool:
        """Whether anything inside got through to one of the listeners."""
        for listener in (self.tcp, self.abstract, self.unix):
            listener.settimeout(0)
            try:
                listener.accept()[0].close()
            except BlockingIOError:
                continue
            return True
        return False


@pytest.fixture
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    folder = tmp_path_factory.mktemp("outside")
    for path in (folder, *folder.parents):
        if path.owner() == "root" and path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
    (folder / "input").write_text("an input")
    (folder / "secret").write_text("a secret of the host")
    tcp, abstract, unix = (socket.socket(family) for family in (socket.AF_INET, socket.AF_UNIX, socket.AF_UNIX))
    with tcp, abstract, unix:
        tcp.bind(("127.0.0.1", 0))
        name = f"cloister-test-{os.getpid()}"
        abstract.bind("\0" + name)
        unix.bind(str(folder / "socket"))
        for listener in (tcp, abstract, unix):
            listener.listen()
        by_cgroup = any("pids" in site.controllers for site in facts().cgroup_sites)
        settings = {
            "abstract": name,
            "port": tcp.getsockname()[1],
            "unix": str(folder / "socket"),
            "secret": str(folder / "secret"),
            "outer": str(folder),
            "input": "/data/input",
            "host_pid": os.getpid(),
            "inodes": SMALL.output_files,
            "processes": SMALL.pids if by_cgroup else 4 * SMALL.pids,
            "fill_mib": 32,
            "nofile": SMALL.nofile,
        }
        yield Outside(folder, settings, tcp, abstract, unix)


def run_inside(outside: Outside, name: str, *names: str, without: frozenset[str] = frozenset()) -> dict[str, str]:
    settings = outside.folder / "settings.json"
    settings.write_text(json.dumps({**outside.settings, "strict": name == "sealed"}))
    binds = (
        Bind(Path(cloister.__file__).parent, "/app/cloister"),
        Bind(ATTEMPTS, "/app/attempts.py"),
        Bind(outside.folder / "input", "/data/input"),
        Bind(settings, "/data/settings.json"),
    )
    with start(
        PYTHON,
        "-s",
        "/app/attempts.py",
        "/data/settings.json",
        *names,
        rules=profile(name, limits=SMALL),
        binds=binds,
        outputs={"one": 1 << 20},
        without=without,
    ) as running:
        ran = finish(running)
    assert ran.exit.ok, (ran.exit, ran.stdout[-300:], ran.stderr)
    return dict(map(json.loads, ran.stdout.splitlines()))


def sorted_words(answers: Mapping[str, str]) -> dict[str, str]:
    return {name: " ".join(sorted(answer.split())) for name, answer in answers.items()}


@needs_jail
@pytest.mark.parametrize("name", ["sealed", "offline"])
def test_every_attempt_gets_exactly_the_expected_answer(outside: Outside, name: str) -> None:
    wanted = expected(name)
    assert len(wanted) == 98
    assert set(wanted) == set(attempts.ATTEMPTS)
    found = run_inside(outside, name, *(attempt for attempt in attempts.ATTEMPTS if attempt not in SEPARATE))
    found |= run_inside(outside, name, *SEPARATE)
    assert sorted_words(found) == dict(wanted)
    assert not outside.disturbed()


def test_what_is_known_to_be_open_is_documented() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "confinement.md").read_text()
    assert all(f"`{name}`" in page for name in OPEN)


def test_attempts_find_something_outside_the_jail(outside: Outside) -> None:
    """The control: outside, the same harmless probes do reach what they reach for, so their refusals mean something."""
    settings = outside.folder / "settings.json"
    settings.write_text(json.dumps({**outside.settings, "input": str(outside.folder / "input"), "strict": False}))
    answer = subprocess.run(
        [sys.executable, str(ATTEMPTS), str(settings), *attempts.HARMLESS],
        env={"PYTHONPATH": str(Path(cloister.__file__).parents[1]), "EXTRA": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = dict(map(json.loads, answer.stdout.splitlines()))
    assert found["tcp_host_loopback"] == "done"
    assert found["abstract_out"] == "done"
    assert found["see_host"] != "only own"
    assert found["identity"] != "none"
    assert "EXTRA" in found["environ"]
    assert found["meminfo"] == "of the host"
    assert found["locks"] == "EAGAIN"
    assert outside.disturbed()


def test_attempts_refuse_to_run_as_root_without_a_jail(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("the guard is about root")
    settings = tmp_path / "settings.json"
    settings.write_text("{}")
    answer = subprocess.run(
        [sys.executable, str(ATTEMPTS), str(settings), "caps"],
        env={"PYTHONPATH": str(Path(cloister.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.returncode != 0
    assert "never as root" in answer.stderr


# layer left out -> attempts that then work
GAPS: Final = {
    "seccomp": (
        "af_vsock",
        "af_netlink",
        "io_uring",
        "ptrace",
        "sys_keyrings",
        "sys_memfd",
        "sys_landlock_own",
        "int80",
    ),
    "landlock": ("proc_mem", "proc_1", "kill_init", "oom"),
    "rlimits": ("sparse", "rlimits", "fds"),
}
WORKED: Final = {"rlimits": "unlimited", "fds": " at "}
"""How an answer that is not "done" shows that the attempt got further than it may."""


@needs_jail
@pytest.mark.parametrize("layer", GAPS)
def test_each_layer_stops_something_that_the_others_let_through(outside: Outside, layer: str) -> None:
    names = GAPS[layer]
    whole = run_inside(outside, "sealed", *names)
    without = run_inside(outside, "sealed", *names, without=frozenset({layer}))
    for name in names:
        worked = WORKED.get(name, "done")
        assert worked not in whole[name]
        assert worked in without[name], f"{name} is stopped without {layer} too"
