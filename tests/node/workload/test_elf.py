"""The ELF reader: what it says about good files, and that no file makes it fail in another way than ElfError."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.node.workload.elf import MAX_DYNAMIC_BYTES, Elf, ElfError, ReadAt, read, read_symbol
from tests.node.workload.elves import AARCH64, I386, LOADER, elf

GOOD = elf(
    ["liba.so.1", "libb.so"],
    soname="libgood.so.3",
    rpath="/opt/x:$ORIGIN",
    runpath="$ORIGIN/../lib",
    interpreter=LOADER,
    version=0x030B07F0,
)


def reading(data: bytes) -> ReadAt:
    return lambda offset, size: data[offset : offset + size]


def test_reads_names_and_folders() -> None:
    assert read(reading(GOOD)) == Elf(
        machine="x86_64",
        soname="libgood.so.3",
        needed=("liba.so.1", "libb.so"),
        rpath=("/opt/x", "$ORIGIN"),
        runpath=("$ORIGIN/../lib",),
        interpreter=LOADER,
    )


def test_reads_an_exported_object() -> None:
    assert read_symbol(reading(GOOD), "Py_Version", 4) == struct.pack("<I", 0x030B07F0)
    assert read_symbol(reading(GOOD), "Py_Other", 4) is None
    assert read_symbol(reading(GOOD), "Py_Version", 16) is None
    assert read_symbol(reading(elf()), "Py_Version", 4) is None


def test_reads_the_running_interpreter() -> None:
    path = Path(os.path.realpath(sys.executable))
    found = read(reading(path.read_bytes()))
    assert found is not None
    assert any(name.startswith("libc.so") for name in found.needed)
    assert found.interpreter.startswith("/lib")


@pytest.mark.parametrize(
    "data",
    [b"", b"#!/bin/sh\n", b"\x7fELF\x01\x01\x01" + bytes(80), b"\x7fELF\x02\x02\x01" + bytes(80), elf(machine=I386)],
    ids=["empty", "script", "32-bit", "big-endian", "i386"],
)
def test_other_files_are_not_ours(data: bytes) -> None:
    assert read(reading(data)) is None


def test_an_object_file_needs_nothing() -> None:
    assert read(reading(elf(["liba.so"], kind=1, machine=AARCH64))) == Elf(machine="aarch64")


def patched(offset: int, form: str, value: int) -> bytes:
    data = bytearray(GOOD)
    struct.pack_into(form, data, offset, value)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GOOD[:40], "shorter than its header"),
        (patched(56, "<H", 60_000), "60000 program headers"),
        (patched(54, "<H", 57), "program headers of 57 bytes"),
        (patched(32, "<Q", len(GOOD)), "outside the file"),
        (patched(64 + 56 + 32, "<Q", MAX_DYNAMIC_BYTES + 16), "a dynamic section of"),
        (patched(64 + 112 + 32, "<Q", 3), "interpreter's name does not end"),
        (elf(["liba.so"], strings_size=1), "outside the string table"),
        (elf(["a" * 5000]), "a name does not end"),
        (patched(64 + 32, "<Q", 100), "in no segment"),
        (patched(64 + 8, "<Q", len(GOOD) - 1), "longer than the file"),
        (elf([f"lib{number}.so" for number in range(1100)]), "1100 needed libraries"),
        (elf(["liba.so"]).replace(b"liba.so", b"lib\xff.so"), "not UTF-8"),
    ],
)
def test_one_fault_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ElfError, match=message):
        read(reading(data))


def test_truncated_anywhere_is_refused_or_read_never_worse() -> None:
    for length in range(len(GOOD)):
        try:
            read(reading(GOOD[:length]))
            read_symbol(reading(GOOD[:length]), "Py_Version", 4)
        except ElfError:
            continue


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes_are_refused_or_read_never_worse(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for offset, value in changes:
        data[offset] = value
    try:
        read(reading(bytes(data)))
        read_symbol(reading(bytes(data)), "Py_Version", 4)
    except ElfError:
        pass
