"""Landlock rules of a jail (Linux userspace-api/landlock.rst): pure; the shim turns them into system calls.

Landlock is the second lock on the file system: mounts decide what exists, Landlock decides what may be done with
it, and it still holds should a mount be wrong. It also forbids TCP (ABI 4) and signals or abstract sockets that
leave the jail (ABI 6).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# linux/landlock.h, LANDLOCK_ACCESS_FS_*
EXECUTE: Final = 1 << 0
WRITE_FILE: Final = 1 << 1
READ_FILE: Final = 1 << 2
READ_DIR: Final = 1 << 3
REMOVE_DIR: Final = 1 << 4
REMOVE_FILE: Final = 1 << 5
MAKE_DIR: Final = 1 << 7
MAKE_REG: Final = 1 << 8
MAKE_SOCK: Final = 1 << 9
MAKE_FIFO: Final = 1 << 10
MAKE_SYM: Final = 1 << 12
REFER: Final = 1 << 13
TRUNCATE: Final = 1 << 14
IOCTL_DEV: Final = 1 << 15

ON_FILES: Final = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""The kernel refuses any other right in a rule about a single file."""

NET_TCP: Final = 3
"""LANDLOCK_ACCESS_NET_BIND_TCP | CONNECT_TCP, from ABI 4."""
SCOPED: Final = 3
"""LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | SIGNAL, from ABI 6."""

READ: Final = READ_FILE | READ_DIR
RUN: Final = READ | EXECUTE
WRITE: Final = READ | WRITE_FILE | TRUNCATE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER
SCRATCH: Final = WRITE | EXECUTE | MAKE_SOCK | MAKE_FIFO
DEVICE: Final = READ_FILE | WRITE_FILE | IOCTL_DEV


@dataclass(frozen=True, slots=True)
class Access:
    """What may be done below `path` (a folder) or with it (a file)."""

    path: str
    rights: int
    folder: bool = True


@dataclass(frozen=True, slots=True)
class Ruleset:
    """`attributes` is `struct landlock_ruleset_attr` as this ABI knows it; `rules` are (path, allowed rights)."""

    attributes: bytes
    rules: tuple[tuple[str, int], ...]


def handled(abi: int) -> int:
    """Return all file system rights that `abi` knows: each is forbidden where no rule allows it."""
    bits = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)
    return (1 << bits) - 1


def ruleset(abi: int, accesses: Sequence[Access], *, network: bool) -> Ruleset:
    """Return the rules for a kernel with Landlock `abi` >= 1; `network` leaves TCP to the network namespace.

    Raises:
        ValueError: no Landlock (`abi` < 1).
    """
    if abi < 1:
        raise ValueError("this kernel has no Landlock")
    known = handled(abi)
    words = [known]
    if abi >= 4:
        words.append(0 if network else NET_TCP)
    if abi >= 6:
        words.append(SCOPED)
    rules = []
    for access in accesses:
        rights = access.rights & known & (-1 if access.folder else ON_FILES)
        rules.append((access.path, rights))
    return Ruleset(struct.pack(f"<{len(words)}Q", *words), tuple(rules))
