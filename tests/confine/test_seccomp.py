"""The seccomp program, run by a small interpreter of classic BPF for every system call number, against the tables."""

from __future__ import annotations

import errno
import hashlib
import re
import struct
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.confine import seccomp
from cloister.confine.profile import Profile, profile
from cloister.confine.seccomp import ALLOW, ERRNO, KILL_PROCESS, SUCCESS
from cloister.confine.syscalls import ARCHES, NUMBERS, Arch

SEALED: Final = profile("sealed")
OFFLINE: Final = profile("offline")
LOOPBACK: Final = profile("offline", loopback=True)
PROFILES: Final = (SEALED, OFFLINE, LOOPBACK)
LAST: Final = 600


def run(program: bytes, arch_word: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """Interpret the filter as the kernel does: struct seccomp_data, 32-bit loads, forward jumps only."""
    words = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("<IIQ6Q", number, arch_word, 0, *words)
    instructions = list(struct.iter_unpack("<HBBI", program))
    position, accumulator = 0, 0
    while True:
        code, true, false, k = instructions[position]
        position += 1
        if code == 0x20:
            assert k % 4 == 0
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif code == 0x06:
            return int(k)
        else:
            holds = {
                0x15: accumulator == k,
                0x25: accumulator > k,
                0x35: accumulator >= k,
                0x45: bool(accumulator & k),
            }[code]
            position += true if holds else false


def answer(rules: Profile, arch: Arch, name: str, *arguments: int) -> int:
    return run(seccomp.compile(rules, arch), seccomp.AUDIT_ARCH[arch], NUMBERS[arch][name], arguments)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("rules", PROFILES, ids=lambda rules: rules.name + "+loopback" * rules.loopback)
def test_every_number_gets_what_the_tables_say(rules: Profile, arch: Arch) -> None:
    program = seccomp.compile(rules, arch)
    names = {number: name for name, number in NUMBERS[arch].items()}
    judged = {rule.call for rule in seccomp.rules(rules)}
    for number in range(LAST):
        name = names.get(number)
        got = run(program, seccomp.AUDIT_ARCH[arch], number, (0xFFFFFFFF,) * 6)
        if name in judged:
            assert got & 0xFFFF0000 == ERRNO, name  # no rule knows the value 0xFFFFFFFF
        elif name in seccomp.constants(rules):
            assert got == seccomp.constants(rules)[name], name
        elif name in seccomp.allowed(rules):
            assert got == ALLOW, name
        else:
            assert got == seccomp.default_action(rules), name


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("rules", PROFILES, ids=lambda rules: rules.name + "+loopback" * rules.loopback)
def test_foreign_architectures_and_x32_are_killed(rules: Profile, arch: Arch) -> None:
    program = seccomp.compile(rules, arch)
    for word in (0x40000003, 0xC00000B7, 0xC000003E, 0x40000028, 0):
        if word != seccomp.AUDIT_ARCH[arch]:
            assert run(program, word, 0) == KILL_PROCESS
    for number in (0x40000000, 0x40000000 + 39, 0x80000000, 0xFFFFFFFF):
        assert run(program, seccomp.AUDIT_ARCH[arch], number) == KILL_PROCESS


@pytest.mark.parametrize("arch", ARCHES)
def test_size_is_what_it_was(arch: Arch) -> None:
    """Golden sizes and digests of the compiled filters: a change must be meant, and reviewed as a change of policy."""
    found = {
        rules.name + "+loopback" * rules.loopback: (
            len(seccomp.compile(rules, arch)) // 8,
            hashlib.sha256(seccomp.compile(rules, arch)).hexdigest()[:16],
        )
        for rules in PROFILES
    }
    assert found == GOLDEN[arch]


GOLDEN: Final[dict[str, dict[str, tuple[int, str]]]] = {
    "x86_64": {
        "sealed": (251, "2325f8f3482b8311"),
        "offline": (321, "9bc3d18d2e004a70"),
        "offline+loopback": (327, "754f3ed295ed4978"),
    },
    "aarch64": {
        "sealed": (236, "f99f3f97cc715cc3"),
        "offline": (303, "971c2d99ddd0dfab"),
        "offline+loopback": (309, "324c2e49574ee1cd"),
    },
}


@pytest.mark.parametrize("arch", ARCHES)
def test_one_shot_has_the_filter_of_offline(arch: Arch) -> None:
    assert seccomp.compile(profile("one-shot"), arch) == seccomp.compile(OFFLINE, arch)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("rules", PROFILES, ids=lambda rules: rules.name + "+loopback" * rules.loopback)
def test_nothing_dangerous_is_allowed(rules: Profile, arch: Arch) -> None:
    dangerous = [
        "bpf",
        "perf_event_open",
        "userfaultfd",
        "add_key",
        "request_key",
        "keyctl",
        "kexec_load",
        "reboot",
        "init_module",
        "finit_module",
        "mount",
        "umount2",
        "pivot_root",
        "chroot",
        "fsopen",
        "open_tree",
        "move_mount",
        "io_uring_setup",
        "io_uring_enter",
        "io_uring_register",
        "ptrace",
        "process_vm_readv",
        "process_vm_writev",
        "pidfd_open",
        "pidfd_getfd",
        "process_madvise",
        "setns",
        "unshare",
        "setuid",
        "setgid",
        "setresuid",
        "setgroups",
        "capset",
        "chown",
        "fchownat",
        "mknodat",
        "syslog",
        "clock_settime",
        "settimeofday",
        "adjtimex",
        "sethostname",
        "swapon",
        "acct",
        "quotactl",
        "open_by_handle_at",
        "name_to_handle_at",
        "fanotify_init",
        "landlock_create_ruleset",
        "seccomp",
        "personality",
        "pkey_alloc",
        "io_setup",
        "mq_open",
        "msgget",
        "semget",
        "memfd_secret",
        "vmsplice",
        "migrate_pages",
        "move_pages",
        "cachestat",
        "statmount",
        "listmount",
        "setxattr",
        "sched_setscheduler",
        "ioprio_set",
        "kcmp",
    ]
    for name in dangerous:
        if name in NUMBERS[arch]:
            assert answer(rules, arch, name) & 0xFFFF0000 == ERRNO, name
            assert answer(rules, arch, name) != SUCCESS, name


@pytest.mark.parametrize("arch", ARCHES)
@given(flags=st.integers(0, (1 << 64) - 1))
def test_clone_never_makes_a_namespace(arch: Arch, flags: int) -> None:
    forbidden = flags & 0xFFFFFFFF & 0x7E020080
    assert answer(SEALED, arch, "clone", flags) == (ERRNO | errno.EPERM if forbidden else ALLOW)


@pytest.mark.parametrize("arch", ARCHES)
@given(high=st.integers(0, 0xFFFFFFFF))
def test_high_halves_cannot_disguise_a_family_or_command(arch: Arch, high: int) -> None:
    """The kernel takes an int: upper garbage must neither open nor close anything."""
    assert answer(SEALED, arch, "socket", high << 32 | 40) == ERRNO | errno.EACCES
    assert answer(SEALED, arch, "socket", high << 32 | 1) == ALLOW
    assert answer(SEALED, arch, "ioctl", 0, high << 32 | 0x5412) == ERRNO | errno.ENOTTY


@pytest.mark.parametrize("arch", ARCHES)
def test_argument_rules_by_value(arch: Arch) -> None:
    for family in range(64):
        allowed = {SEALED: {1}, OFFLINE: {1}, LOOPBACK: {1, 2, 10, 16}}
        for rules, families in allowed.items():
            wanted = ALLOW if family in families else ERRNO | errno.EACCES
            assert answer(rules, arch, "socket", family) == wanted
            assert answer(rules, arch, "socketpair", family) == (ALLOW if family == 1 else ERRNO | errno.EPERM)
    for command in (5, 6, 7, 36, 37, 38):
        assert answer(SEALED, arch, "fcntl", 0, command) == SUCCESS
        assert answer(OFFLINE, arch, "fcntl", 0, command) == ALLOW
    for command in (8, 1024, 1026, 9):
        assert answer(OFFLINE, arch, "fcntl", 0, command) == ERRNO | errno.EPERM
    assert answer(SEALED, arch, "prctl", 15) == SUCCESS
    assert answer(SEALED, arch, "prctl", 22) == ERRNO | errno.EINVAL
    assert answer(OFFLINE, arch, "clone3") == ERRNO | errno.ENOSYS


@pytest.mark.parametrize("arch", ARCHES)
def test_strict_differs_from_relaxed_exactly_where_it_says(arch: Arch) -> None:
    strict, relaxed = (seccomp.compile(rules, arch) for rules in (SEALED, OFFLINE))
    differing = set()
    for name, number in NUMBERS[arch].items():
        one, other = (run(program, seccomp.AUDIT_ARCH[arch], number, (0, 6)) for program in (strict, relaxed))
        if one != other and ALLOW in (one, other):
            differing.add(name)
            assert other == ALLOW, f"{name} is open to a sealed job but not to an ordinary one"
    assert differing == {name for name in seccomp.RELAXED if name in NUMBERS[arch]} | {"fcntl"}


def test_every_name_of_the_policy_exists() -> None:
    everywhere = set(NUMBERS["x86_64"]) | set(NUMBERS["aarch64"])
    for rules in PROFILES:
        named = seccomp.allowed(rules) | set(seccomp.constants(rules)) | {rule.call for rule in seccomp.rules(rules)}
        assert named - everywhere == set()


def test_no_name_has_two_answers() -> None:
    for rules in PROFILES:
        judged = {rule.call for rule in seccomp.rules(rules)}
        constant = set(seccomp.constants(rules))
        assert judged & constant == judged & seccomp.allowed(rules) == constant & seccomp.allowed(rules) == set()


@pytest.mark.parametrize(
    ("arch", "header", "pattern"),
    [
        ("x86_64", "x86_64-linux-gnu/asm/unistd_64.h", r"#define __NR_(\w+) (\d+)"),
        ("aarch64", "asm-generic/unistd.h", r"#define __NR_(\w+)\s+(\d+)"),
    ],
)
def test_numbers_agree_with_this_machines_headers(arch: Arch, header: str, pattern: str) -> None:
    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip(f"no {path} here (package linux-libc-dev)")
    pairs = {name: int(number) for name, number in re.findall(pattern, path.read_text())}
    compared = {name for name in pairs if name in NUMBERS[arch]}
    assert len(compared) > 250
    assert {name: pairs[name] for name in compared} == {name: NUMBERS[arch][name] for name in compared}


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="riscv64"):
        seccomp.compile(SEALED, "riscv64")
