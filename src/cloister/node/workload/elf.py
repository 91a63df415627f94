"""Read what the dynamic linker would read from an ELF file: names it needs and where it looks. Pure, bounded.

Source: System V gABI chapters 4 and 5 (headers, program loading, dynamic linking), ld.so(8), glibc `dl-lookup.c` for the
GNU hash table. Only 64-bit little-endian files are understood; that is every platform with a TEE that Cloister knows.

`read` returns None for a file that is no ELF file or one of another class (a 32-bit test file in a wheel is data), and
raises ElfError for one that claims to be ours and is broken. Who asks decides: a broken file inside a package is
measured as data (ld.so could not load it either); a broken interpreter or system library is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

ReadAt = Callable[[int, int], bytes]
"""(offset, size) -> at most `size` bytes, fewer only at the end of the file; like os.pread on an open file."""

MAGIC: Final = b"\x7fELF\x02\x01\x01"
"""EI_MAG, ELFCLASS64, ELFDATA2LSB, EV_CURRENT."""

MACHINES: Final = {0x3E: "x86_64", 0xB7: "aarch64"}

MAX_SEGMENTS: Final = 256
MAX_DYNAMIC_BYTES: Final = 64 << 10
MAX_NAMES: Final = 1024
MAX_NAME_BYTES: Final = 4096

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_DYNAMIC: Final = struct.Struct("<qQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")

_EXEC, _DYN = 2, 3
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 1, 5, 6, 10, 14, 15, 29
_DT_GNU_HASH: Final = 0x6FFFFEF5


class ElfError(ValueError):
    """The file starts like a 64-bit little-endian ELF file and does not hold together."""


@dataclass(frozen=True, slots=True)
class Elf:
    """The dynamic section. `rpath` and `runpath` are split at colons and not expanded ($ORIGIN is still in them)."""

    machine: str
    soname: str = ""
    needed: tuple[str, ...] = ()
    rpath: tuple[str, ...] = ()
    runpath: tuple[str, ...] = ()
    interpreter: str = ""


@dataclass(frozen=True, slots=True)
class _Image:
    """Segments of one file and its dynamic entries."""

    read_at: ReadAt
    machine: str
    loads: tuple[tuple[int, int, int], ...]  # (virtual address, file offset, bytes in the file)
    entries: tuple[tuple[int, int], ...]  # (tag, value)
    interpreter: str

    def first(self, tag: int) -> int | None:
        return next((value for found, value in self.entries if found == tag), None)

    def at(self, address: int, size: int) -> bytes:
        """Return `size` bytes of the image at a virtual address.

        Raises:
            ElfError: the range is not backed by the file.
        """
        for start, offset, length in self.loads:
            if start <= address and address + size <= start + length:
                data = self.read_at(offset + address - start, size)
                if len(data) != size:
                    raise ElfError("a segment is longer than the file")
                return data
        raise ElfError(f"address {address:#x} is in no segment")

    def text(self, index: int) -> str:
        """Return the string at `index` of the dynamic string table."""
        table, size = self.first(_DT_STRTAB), self.first(_DT_STRSZ)
        if table is None or size is None or not 0 <= index < size:
            raise ElfError("a name lies outside the string table")
        data = self.at(table + index, min(MAX_NAME_BYTES, size - index))
        end = data.find(b"\x00")
        if end < 0:
            raise ElfError("a name does not end")
        try:
            return data[:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ElfError("a name is not UTF-8") from error


def read(read_at: ReadAt) -> Elf | None:
    """Return the dynamic section of an ELF file, None if it is not a 64-bit little-endian one.

    Raises:
        ElfError: truncated, oversized or inconsistent.
    """
    image = _image(read_at)
    if image is None:
        return None
    names = [value for tag, value in image.entries if tag == _DT_NEEDED]
    if len(names) > MAX_NAMES:
        raise ElfError(f"{len(names)} needed libraries, at most {MAX_NAMES} are accepted")
    soname, rpath, runpath = image.first(_DT_SONAME), image.first(_DT_RPATH), image.first(_DT_RUNPATH)
    return Elf(
        machine=image.machine,
        soname=image.text(soname) if soname is not None else "",
        needed=tuple([image.text(name) for name in names]),
        rpath=_folders(image, rpath),
        runpath=_folders(image, runpath),
        interpreter=image.interpreter,
    )


def read_symbol(read_at: ReadAt, name: str, size: int) -> bytes | None:
    """Return the `size` bytes of the exported object `name`, None if the file does not export it.

    Raises:
        ElfError: truncated, oversized or inconsistent.
    """
    image = _image(read_at)
    if image is None:
        return None
    table, symbols = image.first(_DT_GNU_HASH), image.first(_DT_SYMTAB)
    if table is None or symbols is None:
        return None
    buckets, first, bloom, _shift = struct.unpack("<IIII", image.at(table, 16))
    if buckets == 0:
        return None
    value = 5381
    for byte in name.encode():
        value = (value * 33 + byte) & 0xFFFFFFFF
    chains = table + 16 + 8 * bloom + 4 * buckets
    (index,) = struct.unpack("<I", image.at(table + 16 + 8 * bloom + 4 * (value % buckets), 4))
    while index >= first:
        (found,) = struct.unpack("<I", image.at(chains + 4 * (index - first), 4))
        if found | 1 == value | 1:
            text, _info, _other, section, address, length = _SYMBOL.unpack(image.at(symbols + 24 * index, 24))
            if section != 0 and image.text(text) == name:
                return image.at(address, size) if length >= size else None
        if found & 1:
            break
        index += 1
    return None


def _image(read_at: ReadAt) -> _Image | None:
    header = read_at(0, _HEADER.size)
    if not header.startswith(MAGIC):
        return None
    if len(header) < _HEADER.size:
        raise ElfError("shorter than its header")
    _ident, kind, machine, _version, _entry, offset, _sections, _flags, _size, entry_size, count, *_rest = (
        _HEADER.unpack(header)
    )
    if machine not in MACHINES:
        return None
    if kind not in (_EXEC, _DYN):  # an object or core file: nothing loads it
        return _Image(read_at, MACHINES[machine], (), (), "")
    if count > MAX_SEGMENTS or (count and entry_size != _SEGMENT.size):
        raise ElfError(f"{count} program headers of {entry_size} bytes")
    table = read_at(offset, count * _SEGMENT.size)
    if len(table) != count * _SEGMENT.size:
        raise ElfError("the program headers lie outside the file")
    loads, dynamic, interpreter = [], b"", ""
    for kind, _flags, start, address, _physical, length, _memory, _align in _SEGMENT.iter_unpack(table):
        if kind == _PT_LOAD:
            loads.append((address, start, length))
        elif kind == _PT_DYNAMIC:
            if length > MAX_DYNAMIC_BYTES:
                raise ElfError(f"a dynamic section of {length} bytes")
            dynamic = read_at(start, length - length % _DYNAMIC.size)
        elif kind == _PT_INTERP:
            text = read_at(start, min(length, MAX_NAME_BYTES))
            if not text.endswith(b"\x00"):
                raise ElfError("the interpreter's name does not end")
            interpreter = text[:-1].decode("ascii", "replace")
    entries = []
    for tag, value in _DYNAMIC.iter_unpack(dynamic[: len(dynamic) - len(dynamic) % _DYNAMIC.size]):
        if tag == 0:
            break
        entries.append((tag, value))
    return _Image(read_at, MACHINES[machine], tuple(loads), tuple(entries), interpreter)


def _folders(image: _Image, index: int | None) -> tuple[str, ...]:
    return () if index is None else tuple([folder for folder in image.text(index).split(":") if folder])
