"""The ld.so.cache parser, against caches made here and the one of this machine."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.node.workload.ldcache import parse

ENTRIES = [
    ("libfast.so", "/usr/lib/hwcaps/libfast.so", 0x0303, 1 << 62),
    ("liba.so.1", "/usr/lib/liba.so.1", 0x0303, 0),
    ("liba.so.1", "/opt/second/liba.so.1", 0x0303, 0),
    ("lib32.so", "/usr/lib32/lib32.so", 0x0003, 0),
    ("libarm.so", "/usr/lib/libarm.so", 0x0A03, 0),
]


def cache(old_entries: int | None = None) -> bytes:
    strings, entries = b"", b""
    base = 48 + 24 * len(ENTRIES)
    for name, path, flags, hwcap in ENTRIES:
        key = base + len(strings)
        strings += name.encode() + b"\x00"
        entries += struct.pack("<IIIIQ", flags, key, base + len(strings), 0, hwcap)
        strings += path.encode() + b"\x00"
    new = b"glibc-ld.so.cache1.1" + struct.pack("<II", len(ENTRIES), len(strings)) + bytes(20) + entries + strings
    if old_entries is None:
        return new
    old = b"ld.so-1.7.0\x00" + struct.pack("<I", old_entries) + bytes(12 * old_entries)
    return old + bytes(-len(old) % 8) + new


@pytest.mark.parametrize("old_entries", [None, 0, 3])
def test_first_baseline_entry_of_the_machine_wins(old_entries: int | None) -> None:
    assert parse(cache(old_entries), "x86_64") == {"liba.so.1": "/usr/lib/liba.so.1"}
    assert parse(cache(old_entries), "aarch64") == {"libarm.so": "/usr/lib/libarm.so"}


@pytest.mark.parametrize("data", [b"", b"ld.so-1.7.0\x00", b"glibc-ld.so.cache1.1", b"x" * 100, cache()[:100]])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"ld\.so\.cache"):
        parse(data, "x86_64")


@given(st.integers(0, len(cache()) - 1), st.integers(0, 255), st.integers(0, len(cache())))
def test_damage_is_refused_or_read_never_worse(offset: int, value: int, length: int) -> None:
    data = bytearray(cache())
    data[offset] = value
    with contextlib.suppress(ValueError):
        parse(bytes(data[:length]), "x86_64")


def test_this_machine() -> None:
    path = Path("/etc/ld.so.cache")
    if not path.exists():
        pytest.skip("this machine has no ld.so.cache")
    found = parse(path.read_bytes(), "x86_64")
    assert Path(found["libc.so.6"]).exists()
