"""Small ELF files with exactly the dynamic section that a test wants: one segment, mapped at its own offset."""

from __future__ import annotations

import struct
from collections.abc import Sequence

X86_64, AARCH64, I386 = 0x3E, 0xB7, 0x03
LOADER = "/lib64/ld-linux-x86-64.so.2"


def elf(
    needed: Sequence[str] = (),
    *,
    soname: str = "",
    rpath: str = "",
    runpath: str = "",
    interpreter: str = "",
    machine: int = X86_64,
    kind: int = 3,
    version: int | None = None,
    strings_size: int | None = None,
    padding: bytes = b"",
) -> bytes:
    """Return an ELF file. `version` exports `Py_Version` with that value; `strings_size` overrides DT_STRSZ."""
    strings = bytearray(b"\x00")

    def text(value: str) -> int:
        index = len(strings)
        strings.extend(value.encode() + b"\x00")
        return index

    entries = [(1, text(name)) for name in needed]
    entries += [(tag, text(value)) for tag, value in ((14, soname), (15, rpath), (29, runpath)) if value]
    symbol = text("Py_Version") if version is not None else 0
    segments = 3 if interpreter else 2
    start = 64 + 56 * segments
    name = interpreter.encode() + b"\x00" if interpreter else b""
    strings_at = start + len(name)
    tables_at = strings_at + len(strings)
    tables = b""
    if version is not None:
        hashed = 5381
        for byte in b"Py_Version":
            hashed = (hashed * 33 + byte) & 0xFFFFFFFF
        table = struct.pack("<IIIIQII", 1, 1, 1, 0, 2**64 - 1, 1, hashed | 1)
        symbols_at = tables_at + len(table)
        value_at = symbols_at + 48
        tables = (
            table + bytes(24) + struct.pack("<IBBHQQ", symbol, 0x11, 0, 1, value_at, 8) + struct.pack("<Q", version)
        )
        entries += [(0x6FFFFEF5, tables_at), (6, symbols_at)]
    entries += [(5, strings_at), (10, len(strings) if strings_size is None else strings_size), (0, 0)]
    dynamic_at = tables_at + len(tables)
    dynamic = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    size = dynamic_at + len(dynamic) + len(padding)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01" + bytes(9), kind, machine, 1, 0, 64, 0, 0, 64, 56, segments, 0, 0, 0
    )
    table = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, size, size, 4096)
    table += struct.pack("<IIQQQQQQ", 2, 4, dynamic_at, dynamic_at, 0, len(dynamic), len(dynamic), 8)
    if interpreter:
        table += struct.pack("<IIQQQQQQ", 3, 4, start, start, 0, len(name), len(name), 1)
    return header + table + name + bytes(strings) + tables + dynamic + padding
