"""Parse /etc/ld.so.cache: which file a library name means on this machine. Pure, bounded.

Source: glibc `sysdeps/generic/dl-cache.h`, format "glibc-ld.so.cache1.1", alone or behind the older "ld.so-1.7.0" table.

    header   magic 20 bytes | entries u32 | string bytes u32 | flags u8, 3 zero | extension u32 | 3 x u32 unused
    entry    flags u32 | key u32 | value u32 | osversion u32 | hwcap u64      (offsets count from the header)

Entries for special CPUs (hwcap not 0) are skipped: the baseline library is the one that every machine can run.
"""

from __future__ import annotations

import struct
from typing import Final

MAX_BYTES: Final = 16 << 20
MAX_ENTRIES: Final = 100_000

_OLD: Final = b"ld.so-1.7.0\x00"
_NEW: Final = b"glibc-ld.so.cache1.1"
_ENTRY: Final = struct.Struct("<IIIIQ")
_FLAGS: Final = {"x86_64": 0x0303, "aarch64": 0x0A03}  # FLAG_ELF_LIBC6 | FLAG_X8664_LIB64 / FLAG_AARCH64_LIB64


def parse(data: bytes, machine: str) -> dict[str, str]:
    """Return library name -> absolute path; the first entry of a name wins, as in ld.so.

    Raises:
        ValueError: not a cache of a known format, or truncated.
    """
    start = 0
    if data.startswith(_OLD):
        if len(data) < 16:
            raise ValueError("ld.so.cache is truncated")
        (old,) = struct.unpack_from("<I", data, 12)
        start = (16 + 12 * old + 7) & ~7
    if len(data) > MAX_BYTES or not data.startswith(_NEW, start) or len(data) < start + 48:
        raise ValueError("ld.so.cache has an unknown format")
    entries, _strings = struct.unpack_from("<II", data, start + 20)
    if entries > MAX_ENTRIES or len(data) < start + 48 + entries * _ENTRY.size:
        raise ValueError("ld.so.cache is truncated")
    result: dict[str, str] = {}
    for index in range(entries):
        flags, key, value, _osversion, hwcap = _ENTRY.unpack_from(data, start + 48 + index * _ENTRY.size)
        if flags == _FLAGS[machine] and hwcap == 0:
            result.setdefault(_text(data, start + key), _text(data, start + value))
    return result


def _text(data: bytes, offset: int) -> str:
    end = data.find(b"\x00", offset, offset + 4096)
    if end < 0:
        raise ValueError("ld.so.cache is truncated")
    return data[offset:end].decode("utf-8", "surrogateescape")
