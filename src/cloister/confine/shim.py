"""The last steps before the job, compiled into a tiny static program: profile and job -> ELF bytes.

bubblewrap builds the room; what remains must happen inside it, after the mounts (Landlock forbids mounting) and
before the job. The usual tool is an interpreter running a script, but the only interpreter in the jail belongs to
the *workload*: an untrusted provider's Python could skip the steps. So the steps become a list of system calls
with constant arguments, and this module assembles them, for x86-64 and aarch64. The program needs no library, no
loader and no allocation, and starts in well under a millisecond. It runs, each step checked, the first failure final:

  1 limits       prlimit64 for each resource; umask
  2 dumps        /proc/self/coredump_filter := 0 (survives exec; crash handlers ignore RLIMIT_CORE)
  3 privileges   no_new_privs
  4 streams      0, 1, 2 from the launcher's descriptors or /dev/null; status pipe to 3, close-on-exec; all others closed
  5 files        Landlock rules, then restrict
  6 calls        seccomp filter, without SPEC_ALLOW: speculation mitigations stay on
  7 exec         one byte `READY` into the status pipe, then execve; status closes by itself

A failure writes 12 bytes (`fail`, step u32, errno u32, little-endian) into the status pipe and exits with 125.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cloister.confine.landlock import Ruleset
from cloister.confine.syscalls import NUMBERS, Arch

FAILED: Final = 125
STATUS_FD: Final = 3
READY: Final = b"r"
REPORT: Final = struct.Struct("<4sII")

_AT_FDCWD: Final = -100 & 0xFFFFFFFFFFFFFFFF
_O_WRONLY: Final = 1
_O_RDWR: Final = 2
_O_CLOEXEC: Final = 0o2000000
_O_PATH: Final = 0o10000000
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_SET_MODE_FILTER: Final = 1
_LANDLOCK_RULE_PATH_BENEATH: Final = 1

_CODE_AT: Final = 0x400000
_DATA_AT: Final = 0x10000000
_PAGE: Final = 0x10000  # largest page of aarch64; segments must not share one


@dataclass(frozen=True, slots=True)
class Saved:
    """An argument that is the kept result of an earlier call: slot 0 or 1."""

    slot: int


@dataclass(frozen=True, slots=True)
class Call:
    """One system call. `keep` puts its result into a slot; `store` writes its low 32 bits to an address."""

    what: str
    name: str
    arguments: tuple[int | Saved, ...]
    keep: int | None = None
    store: int | None = None


@dataclass(frozen=True, slots=True)
class Orders:
    """Everything the program does. `streams` are descriptor numbers for 0, 1, 2 (None: /dev/null); all > 3."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    streams: tuple[int | None, int | None, int | None]
    status_fd: int
    rlimits: tuple[tuple[int, int], ...]
    """(RLIMIT_* number, value for both the soft and the hard limit)."""
    landlock: Ruleset | None
    seccomp: bytes | None
    coredump_filter: bool = True

    def __post_init__(self) -> None:
        used = [fd for fd in (*self.streams, self.status_fd) if fd is not None]
        if any(fd <= STATUS_FD for fd in used):
            raise ValueError(f"descriptors of the shim must lie above {STATUS_FD}: {used}")


@dataclass(frozen=True, slots=True)
class Program:
    """`image` is the ELF file; `steps[n]` says in words what step n of a failure report was."""

    image: bytes
    steps: tuple[str, ...]


@dataclass(slots=True)
class _Data:
    """The writable segment while it grows; addresses are final at once."""

    content: bytearray = field(default_factory=bytearray)

    def add(self, data: bytes, align: int = 8) -> int:
        self.content += bytes(-len(self.content) % align)
        address = _DATA_AT + len(self.content)
        self.content += data
        return address

    def text(self, text: str) -> int:
        return self.add(text.encode() + b"\0", 1)

    def pointers(self, texts: Sequence[str]) -> int:
        addresses = [self.text(text) for text in texts]
        return self.add(struct.pack(f"<{len(addresses) + 1}Q", *addresses, 0))


def build(orders: Orders, arch: Arch) -> Program:
    """Return the program that carries out `orders` on `arch`.

    Raises:
        ValueError: an architecture without an assembler here.
    """
    data = _Data()
    report = data.add(REPORT.pack(b"fail", 0, 0))
    calls = _calls(orders, data)
    if arch == "x86_64":
        code = _assemble_x86_64(calls, report)
    elif arch == "aarch64":
        code = _assemble_aarch64(calls, report)
    else:
        raise ValueError(f"no assembler for {arch!r}")
    return Program(_elf(code, bytes(data.content), arch), tuple(call.what for call in calls))


def exit_program(arch: Arch) -> bytes:
    """Return an ELF program that ends with status 0 at once: the smallest job there is, for probing a machine.

    Raises:
        ValueError: an architecture without an assembler here.
    """
    if arch == "x86_64":
        return _elf(_x86_call("exit_group", (0,)), bytes(8), arch)
    if arch == "aarch64":
        return _elf(_arm_call("exit_group", (0,)), bytes(8), arch)
    raise ValueError(f"no assembler for {arch!r}")


def _calls(orders: Orders, data: _Data) -> list[Call]:
    calls: list[Call] = []

    def call(what: str, name: str, *arguments: int | Saved, keep: int | None = None, store: int | None = None) -> None:
        calls.append(Call(what, name, arguments, keep, store))

    for resource, value in orders.rlimits:  # 1
        limit = data.add(struct.pack("<QQ", value, value))
        call(f"set resource limit {resource}", "prlimit64", 0, resource, limit, 0)
    call("set umask", "umask", 0o022)
    if orders.coredump_filter:  # 2
        path = data.text("/proc/self/coredump_filter")
        call("open coredump_filter", "openat", _AT_FDCWD, path, _O_WRONLY, 0, keep=0)
        call("write coredump_filter", "write", Saved(0), data.text("0"), 1)
    call("set no_new_privs", "prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # 3
    null = data.text("/dev/null")  # 4
    for number, source in enumerate(orders.streams):
        if source is None:
            call("open /dev/null", "openat", _AT_FDCWD, null, _O_RDWR | _O_CLOEXEC, 0, keep=0)
            call(f"connect stream {number}", "dup3", Saved(0), number, 0)
        else:
            call(f"connect stream {number}", "dup3", source, number, 0)
    call("keep the status pipe", "dup3", orders.status_fd, STATUS_FD, _O_CLOEXEC)
    call("close other descriptors", "close_range", STATUS_FD + 1, 0xFFFFFFFF, 0)
    if orders.landlock is not None:  # 5
        attributes = data.add(orders.landlock.attributes)
        call(
            "create a Landlock ruleset",
            "landlock_create_ruleset",
            attributes,
            len(orders.landlock.attributes),
            0,
            keep=1,
        )
        for path_text, rights in orders.landlock.rules:
            rule = data.add(struct.pack("<Qi", rights, -1))
            path = data.text(path_text)
            call(
                f"open {path_text} for Landlock",
                "openat",
                _AT_FDCWD,
                path,
                _O_PATH | _O_CLOEXEC,
                0,
                keep=0,
                store=rule + 8,
            )
            call(
                f"allow {path_text} in Landlock",
                "landlock_add_rule",
                Saved(1),
                _LANDLOCK_RULE_PATH_BENEATH,
                rule,
                0,
            )
            call("close a path", "close", Saved(0))
        call("enforce Landlock", "landlock_restrict_self", Saved(1), 0)
        call("close the Landlock ruleset", "close", Saved(1))
    argv = data.pointers(orders.argv)
    environment = data.pointers([f"{name}={value}" for name, value in orders.environment.items()])
    ready = data.add(READY, 1)
    if orders.seccomp is not None:  # 6
        program = data.add(orders.seccomp)
        header = data.add(struct.pack("<HxxxxxxQ", len(orders.seccomp) // 8, program))
        call("install the seccomp filter", "seccomp", _SECCOMP_SET_MODE_FILTER, 0, header)
    call("report", "write", STATUS_FD, ready, 1)  # 7
    call(f"execute {orders.argv[0]}", "execve", data.text(orders.argv[0]), argv, environment)
    return calls


# --- x86-64: System V AMD64 ABI appendix A.2.1; rbp holds the step, r12 and r13 the kept results -------------------

_X86_ARGUMENTS: Final = (7, 6, 2, 10, 8, 9)  # rdi rsi rdx r10 r8 r9
_X86_SLOTS: Final = (12, 13)


def _x86_set(register: int, value: int) -> bytes:
    """mov r64, imm64, or the shorter mov r32, imm32 (zero-extends) where the value fits."""
    if value < 1 << 32:
        return (b"\x41" if register > 7 else b"") + bytes([0xB8 + (register & 7)]) + struct.pack("<I", value)
    return bytes([0x49 if register > 7 else 0x48, 0xB8 + (register & 7)]) + struct.pack("<Q", value)


def _x86_move(target: int, source: int) -> bytes:
    return bytes([0x48 | (source >> 3) << 2 | target >> 3, 0x89, 0xC0 | (source & 7) << 3 | (target & 7)])


def _x86_call(name: str, arguments: Sequence[int | Saved]) -> bytes:
    parts = [
        _x86_move(register, _X86_SLOTS[value.slot]) if isinstance(value, Saved) else _x86_set(register, value)
        for register, value in zip(_X86_ARGUMENTS, arguments, strict=False)
    ]
    return b"".join(parts) + _x86_set(0, NUMBERS["x86_64"][name]) + b"\x0f\x05"


def _assemble_x86_64(calls: Sequence[Call], report: int) -> bytes:
    # On failure: mov [report + 4], ebp; mov [report + 8], eax (as -errno); write it; exit_group.
    tail = b"\x89\x2c\x25" + struct.pack("<I", report + 4) + b"\xf7\xd8\x89\x04\x25" + struct.pack("<I", report + 8)
    # The report goes wherever the status pipe stands: its original number until step 4, then 3. Both are tried.
    status = _status_fd(calls)
    for fd in (status, STATUS_FD):
        tail += _x86_call("write", (fd, report, REPORT.size))
    tail += _x86_call("exit_group", (FAILED,))
    blocks = []
    for number, call in enumerate(calls):
        block = _x86_set(5, number) + _x86_call(call.name, call.arguments)
        after = b""
        if call.keep is not None:
            after += _x86_move(_X86_SLOTS[call.keep], 0)
        if call.store is not None:
            after += b"\x89\x04\x25" + struct.pack("<I", call.store)
        blocks.append((block + b"\x48\x3d" + struct.pack("<i", -4095), after))  # cmp rax, -4095
    end = sum(len(block) + 6 + len(after) for block, after in blocks)
    code = b""
    for block, after in blocks:
        here = len(code) + len(block) + 6
        code += block + b"\x0f\x83" + struct.pack("<i", end - here) + after  # jae failure
    return code + tail


# --- aarch64: AAPCS64 and the Linux convention: x8 number, x0-x5 arguments; x28 step, x19 and x20 kept results ------

_ARM_SLOTS: Final = (19, 20)


def _arm_set(register: int, value: int) -> bytes:
    """movz, then movk for each further non-zero half word."""
    halves = [(shift, value >> 16 * shift & 0xFFFF) for shift in range(4)]
    words = [0xD2800000 | halves[0][1] << 5 | register]
    words += [0xF2800000 | shift << 21 | half << 5 | register for shift, half in halves[1:] if half]
    return struct.pack(f"<{len(words)}I", *words)


def _arm_move(target: int, source: int) -> bytes:
    return struct.pack("<I", 0xAA0003E0 | source << 16 | target)


def _arm_store(source: int, address: int) -> bytes:
    """str wN, [x9]"""
    return _arm_set(9, address) + struct.pack("<I", 0xB9000120 | source)


def _arm_call(name: str, arguments: Sequence[int | Saved]) -> bytes:
    parts = [
        _arm_move(register, _ARM_SLOTS[value.slot]) if isinstance(value, Saved) else _arm_set(register, value)
        for register, value in enumerate(arguments)
    ]
    return b"".join(parts) + _arm_set(8, NUMBERS["aarch64"][name]) + struct.pack("<I", 0xD4000001)


def _assemble_aarch64(calls: Sequence[Call], report: int) -> bytes:
    tail = _arm_store(28, report + 4) + struct.pack("<I", 0x4B0003E0) + _arm_store(0, report + 8)  # neg w0, w0
    status = _status_fd(calls)
    for fd in (status, STATUS_FD):
        tail += _arm_call("write", (fd, report, REPORT.size))
    tail += _arm_call("exit_group", (FAILED,))
    blocks = []
    for number, call in enumerate(calls):
        block = _arm_set(28, number) + _arm_call(call.name, call.arguments)
        after = b""
        if call.keep is not None:
            after += _arm_move(_ARM_SLOTS[call.keep], 0)
        if call.store is not None:
            after += _arm_store(0, call.store)
        blocks.append((block + struct.pack("<I", 0xB13FFC1F), after))  # cmn x0, #4095
    end = sum(len(block) + 4 + len(after) for block, after in blocks)
    code = b""
    for block, after in blocks:
        distance = (end - len(code) - len(block)) // 4
        code += block + struct.pack("<I", 0x54000002 | distance << 5) + after  # b.hs failure
    return code + tail


def _status_fd(calls: Sequence[Call]) -> int:
    for call in calls:
        if call.name == "dup3" and call.arguments[1] == STATUS_FD and isinstance(call.arguments[0], int):
            return call.arguments[0]
    raise ValueError("a program without a status pipe could not report its failure")


def _elf(code: bytes, data: bytes, arch: Arch) -> bytes:
    """A static ELF-64 executable with two segments, code R-X and data RW-, and a non-executable stack."""
    machine = {"x86_64": 62, "aarch64": 183}[arch]
    headers = 64 + 3 * 56
    code_offset = headers
    data_offset = code_offset + len(code) + (-(code_offset + len(code)) % _PAGE)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, _CODE_AT + code_offset, 64, 0, 0, 64, 56, 3, 0, 0, 0)
    segments = struct.pack(
        "<IIQQQQQQ", 1, 5, 0, _CODE_AT, _CODE_AT, code_offset + len(code), code_offset + len(code), _PAGE
    )
    segments += struct.pack("<IIQQQQQQ", 1, 6, data_offset, _DATA_AT, _DATA_AT, len(data), len(data), _PAGE)
    segments += struct.pack("<IIQQQQQQ", 0x6474E551, 6, 0, 0, 0, 0, 0, 16)  # PT_GNU_STACK
    image = header + segments + code
    return image + bytes(data_offset - len(image)) + data
