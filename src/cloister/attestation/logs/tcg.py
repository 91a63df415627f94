"""Firmware event logs: TCG2 crypto-agile, its TDX form CCEL, and the TPM 1.2 form. Parse, replay, read.

Source: TCG PC Client Platform Firmware Profile 1.06, section 10 (event logging); UEFI 2.10, section 38.4 (CC event log). Little-endian:

    first event      u32 register | u32 type | 20 bytes digest | u32 size | data          (TPM 1.2 form)
      its data       "Spec ID Event03" 00 | u32 class | u8 minor, major, errata, uintn | u32 n | n x (u16 algorithm, u16 size) |
                     u8 size | vendor's                                                   (then the log is crypto-agile)
    later events     u32 register | u32 type | u32 n | n x (u16 algorithm, digest) | u32 size | data
    end              end of bytes, or FF .. FF or 00 .. 00 to the end of the buffer       (CCEL tables, firmware buffers)

Without that first event every event has the TPM 1.2 form, with SHA-1 only. A log that is empty or that stops inside an event
is refused; one that stops between events parses, and its replay gives other registers.

A replay authenticates digests and their order, nothing else: neither the type of an event nor its data is measured. `events`
gives data only where it hashes to the digest. The 1-based registers of a CCEL stay as the log has them: n is RTMR n - 1.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from cloister.attestation.form import FormError
from cloister.attestation.types import BootEvent
from cloister.errors import EvidenceError, Reason

__all__ = [
    "ALGORITHMS",
    "EVENT_TYPES",
    "LIMIT",
    "NO_ACTION",
    "Entry",
    "Log",
    "events",
    "initial",
    "load_options",
    "parse",
    "replay",
    "type_name",
]

LIMIT: Final = 4 * 1024 * 1024
"""Largest log accepted, in bytes; real ones have 2 to 100 kB (firmware reserves 64 kB to 1 MB)."""
MOST_EVENTS: Final = 16_384
REGISTERS: Final = 24

ALGORITHMS: Final[Mapping[int, str]] = MappingProxyType(
    {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512", 0x0012: "sm3_256"}
)
"""TCG algorithm registry, section 6.10: TPM_ALG_ID -> name."""
SIZES: Final[Mapping[str, int]] = MappingProxyType(
    {"sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64, "sm3_256": 32}
)
"""Bytes of a digest and of a register of its bank."""
HASHES: Final = frozenset({"sha1", "sha256", "sha384", "sha512"})
"""Banks that can be replayed; another one in a log is skipped."""

NO_ACTION: Final = 0x00000003
EVENT_TAG: Final = 0x00000006
IPL: Final = 0x0000000D
VARIABLES: Final = frozenset({0x80000001, 0x80000002, 0x8000000C, 0x800000E0})

EVENT_TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {
        0x00000000: "EV_PREBOOT_CERT",
        0x00000001: "EV_POST_CODE",
        0x00000002: "EV_UNUSED",
        0x00000003: "EV_NO_ACTION",
        0x00000004: "EV_SEPARATOR",
        0x00000005: "EV_ACTION",
        0x00000006: "EV_EVENT_TAG",
        0x00000007: "EV_S_CRTM_CONTENTS",
        0x00000008: "EV_S_CRTM_VERSION",
        0x00000009: "EV_CPU_MICROCODE",
        0x0000000A: "EV_PLATFORM_CONFIG_FLAGS",
        0x0000000B: "EV_TABLE_OF_DEVICES",
        0x0000000C: "EV_COMPACT_HASH",
        0x0000000D: "EV_IPL",
        0x0000000E: "EV_IPL_PARTITION_DATA",
        0x0000000F: "EV_NONHOST_CODE",
        0x00000010: "EV_NONHOST_CONFIG",
        0x00000011: "EV_NONHOST_INFO",
        0x00000012: "EV_OMIT_BOOT_DEVICE_EVENTS",
        0x00000013: "EV_POST_CODE2",
        0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
        0x80000002: "EV_EFI_VARIABLE_BOOT",
        0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
        0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
        0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
        0x80000006: "EV_EFI_GPT_EVENT",
        0x80000007: "EV_EFI_ACTION",
        0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
        0x80000009: "EV_EFI_HANDOFF_TABLES",
        0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
        0x8000000B: "EV_EFI_HANDOFF_TABLES2",
        0x8000000C: "EV_EFI_VARIABLE_BOOT2",
        0x8000000D: "EV_EFI_GPT_EVENT2",
        0x80000010: "EV_EFI_HCRTM_EVENT",
        0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
        0x800000E1: "EV_EFI_SPDM_FIRMWARE_BLOB",
        0x800000E2: "EV_EFI_SPDM_FIRMWARE_CONFIG",
        0x800000E3: "EV_EFI_SPDM_DEVICE_POLICY",
        0x800000E4: "EV_EFI_SPDM_DEVICE_AUTHORITY",
    }
)
"""Platform Firmware Profile 1.06, table 27: number -> name."""

_SPEC_ID_2: Final = b"Spec ID Event03\x00"
_LOCALITY: Final = b"StartupLocality\x00"
_HEADER_12: Final = struct.Struct("<II20sI")
_HEADER_20: Final = struct.Struct("<III")
_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")
_LABEL: Final = 128


@dataclass(frozen=True, slots=True)
class Entry:
    """One event as the log has it: `digests` by algorithm extended `register`; `data` is only what firmware wrote beside them."""

    register: int
    type: int
    digests: Mapping[str, bytes]
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Log:
    """One log, taken apart. `entries` do not contain the first event of a crypto-agile log, which names `algorithms`."""

    algorithms: tuple[str, ...]
    entries: tuple[Entry, ...]


def parse(data: bytes, *, where: str) -> Log:
    """Return the log in `data`, with or without padding after it.

    Raises:
        EvidenceError: `evidence-malformed`: empty, truncated, too large, or another form; `where` is `Reason.where`.
    """
    try:
        return _parse(data)
    except FormError as error:
        raise EvidenceError(
            "the firmware event log does not parse",
            code="evidence-malformed",
            reasons=[Reason(where, error.found, error.wanted)],
        ) from error


def replay(log: Log, algorithm: str) -> dict[int, bytes]:
    """Return the registers that `log` leads to in the bank `algorithm`, by number: those that an event extended.

    EV_NO_ACTION extends nothing; a `StartupLocality` event says where register 0 starts. Any other register is at `initial`.

    Raises:
        EvidenceError: `evidence-malformed`, at `replay`: the log has no such bank.
    """
    _need(log, algorithm)
    new = getattr(hashlib, algorithm)
    values: dict[int, bytes] = {}
    start0 = initial(0, algorithm)
    for entry in log.entries:
        register = entry.register
        if entry.type == NO_ACTION:
            locality = entry.data
            if register == 0 and len(locality) == len(_LOCALITY) + 1 and locality.startswith(_LOCALITY):
                start0 = bytes(SIZES[algorithm] - 1) + locality[-1:]
            continue
        value = values.get(register)
        if value is None:
            value = start0 if register == 0 else initial(register, algorithm)
        values[register] = new(value + entry.digests[algorithm]).digest()
    return values


def initial(register: int, algorithm: str) -> bytes:
    """Return what `register` of the bank holds after a start: zeros, or FF for 17 to 22 (PC Client Platform TPM Profile, 4.6.2)."""
    return (b"\xff" if 17 <= register <= 22 else b"\x00") * SIZES[algorithm]


def events(log: Log, algorithm: str) -> tuple[BootEvent, ...]:
    """Return the events that extended a register, in order, for a reader.

    `data` is what hashes to the digest: the event's data, or the part of it that firmware measured (a variable's value, a boot
    loader's command without its prefix), or None. Call only after `replay` gave the signed registers. `label` comes from `data`,
    and where that is None from what the log says, which nothing vouches for. `type` is never measured.

    Raises:
        EvidenceError: `evidence-malformed`, at `replay`: the log has no such bank.
    """
    _need(log, algorithm)
    new = getattr(hashlib, algorithm)
    found: list[BootEvent] = []
    for entry in log.entries:
        if entry.type == NO_ACTION:
            continue
        digest = entry.digests[algorithm]
        data = None
        for candidate in _measured(entry):
            if new(candidate).digest() == digest:
                data = candidate
                break
        label = _label(entry.type, entry.data if data is None else data, whole=data is None or data == entry.data)
        found.append(BootEvent(entry.register, type_name(entry.type), digest, data, label))
    return tuple(found)


def type_name(number: int) -> str:
    """Return the TCG name of an event type, or `EV_0x....` for one that is not in the profile."""
    return EVENT_TYPES.get(number) or f"EV_{number:#010x}"


def load_options(text: str) -> bytes:
    """Return the bytes that Linux's EFI stub measures for its command line: UTF-16LE with the terminating NUL.

    Its EV_EVENT_TAG event `LOADED_IMAGE::LoadOptions` in PCR 9 (RTMR 2) has the hash of these bytes as its digest, and the log
    does not hold them: a policy that knows the command line computes the digest. (Linux, efi_load_initrd and
    efi_measure_tagged_event; the event `Linux initrd` is the hash of the file.)
    """
    return text.encode("utf-16-le", "surrogatepass") + b"\x00\x00"


def _parse(data: bytes) -> Log:
    size = len(data)
    if not 0 < size <= LIMIT:
        raise FormError(f"a log of {size} bytes", f"1 to {LIMIT}")
    # where nothing but padding follows; once, because a check at every event would be quadratic
    end = min(len(data.rstrip(b"\x00")), len(data.rstrip(b"\xff")))
    if end == 0:
        raise FormError("padding only", "events")
    first, at = _event_12(data, 0)
    if first.type == NO_ACTION and first.data.startswith(_SPEC_ID_2):
        sizes = _algorithms(first.data)
        entries = []
        while at < end:
            entry, at = _event_20(data, at, sizes)
            entries.append(entry)
            if len(entries) > MOST_EVENTS:
                raise FormError(f"more than {MOST_EVENTS} events", f"at most {MOST_EVENTS}")
        names = tuple(ALGORITHMS.get(each, f"{each:#06x}") for each in sizes)
    else:
        names, entries = ("sha1",), [first]
        while at < end:
            entry, at = _event_12(data, at)
            entries.append(entry)
            if len(entries) > MOST_EVENTS:
                raise FormError(f"more than {MOST_EVENTS} events", f"at most {MOST_EVENTS}")
    if not any(entry.type != NO_ACTION for entry in entries):
        raise FormError("no event that extends a register", "at least one")
    return Log(names, tuple(entries))


def _algorithms(data: bytes) -> dict[int, int]:
    """Return algorithm -> digest size, as the first event names them."""
    if len(data) < 28:
        raise FormError(f"a first event of {len(data)} bytes", "at least 28")
    (count,) = _U32.unpack_from(data, 24)
    if not 0 < count <= 8 or len(data) < 28 + 4 * count:
        raise FormError(f"{count} algorithms in a first event of {len(data)} bytes", "1 to 8 that fit")
    sizes: dict[int, int] = {}
    for index in range(count):
        algorithm, size = struct.unpack_from("<HH", data, 28 + 4 * index)
        name = ALGORITHMS.get(algorithm)
        if algorithm in sizes or not 0 < size <= 64 or (name is not None and size != SIZES[name]):
            raise FormError(f"algorithm {algorithm:#06x} with digests of {size} bytes", "each once, with its size")
        sizes[algorithm] = size
    return sizes


def _event_12(data: bytes, at: int) -> tuple[Entry, int]:
    if len(data) - at < _HEADER_12.size:
        raise FormError(f"{len(data) - at} bytes left at {at}", f"an event header of {_HEADER_12.size} bytes")
    register, kind, digest, size = _HEADER_12.unpack_from(data, at)
    at += _HEADER_12.size
    if size > len(data) - at:
        raise FormError(f"event data of {size} bytes, {len(data) - at} left", "a whole event")
    _check_register(register, kind)
    return Entry(register, kind, {"sha1": digest}, data[at : at + size]), at + size


def _event_20(data: bytes, at: int, sizes: Mapping[int, int]) -> tuple[Entry, int]:
    if len(data) - at < _HEADER_20.size:
        raise FormError(f"{len(data) - at} bytes left at {at}", f"an event header of {_HEADER_20.size} bytes")
    register, kind, count = _HEADER_20.unpack_from(data, at)
    _check_register(register, kind)
    at += _HEADER_20.size
    if count != len(sizes):
        raise FormError(f"an event with {count} digests", f"{len(sizes)}, one per algorithm of the first event")
    digests: dict[str, bytes] = {}
    for _ in range(count):
        if len(data) - at < 2:
            raise FormError(f"{len(data) - at} bytes left at {at}", "a digest")
        (algorithm,) = _U16.unpack_from(data, at)
        width = sizes.get(algorithm)
        name = ALGORITHMS.get(algorithm, "")
        if width is None or name in digests:
            raise FormError(f"a digest of algorithm {algorithm:#06x}", "each algorithm of the first event once")
        at += 2
        if width > len(data) - at:
            raise FormError(f"{len(data) - at} bytes left at {at}", f"a digest of {width} bytes")
        digests[name or f"{algorithm:#06x}"] = data[at : at + width]
        at += width
    if len(digests) != count:
        raise FormError("an algorithm twice in one event", "each once")
    if len(data) - at < 4:
        raise FormError(f"{len(data) - at} bytes left at {at}", "the size of the event data")
    (size,) = _U32.unpack_from(data, at)
    at += 4
    if size > len(data) - at:
        raise FormError(f"event data of {size} bytes, {len(data) - at} left", "a whole event")
    return Entry(register, kind, digests, data[at : at + size]), at + size


def _check_register(register: int, kind: int) -> None:
    # EV_NO_ACTION may name 0xFFFFFFFF or an NV index: it extends nothing
    if register >= REGISTERS and kind != NO_ACTION:
        raise FormError(f"register {register}", f"0 to {REGISTERS - 1}")


def _need(log: Log, algorithm: str) -> None:
    if algorithm not in log.algorithms or algorithm not in HASHES:
        raise EvidenceError(
            f"the firmware event log has no {algorithm} digests",
            code="evidence-malformed",
            reasons=[Reason("replay", ", ".join(log.algorithms), algorithm)],
        )


def _measured(entry: Entry) -> Iterator[bytes]:
    """Yield what firmware may have hashed for this event; the digest decides, so a wrong guess exposes nothing."""
    yield entry.data
    if entry.type in VARIABLES:
        variable = _variable(entry.data)
        if variable is not None:  # EDK2 before 2022 and shim hash the value without the name
            yield variable[1]
    elif entry.type == IPL:
        text = entry.data.removesuffix(b"\x00")
        yield text
        _, colon, rest = text.partition(b": ")  # GRUB: "grub_cmd: ", "kernel_cmdline: ", "module_cmdline: "
        if colon:
            yield rest
    elif entry.type == EVENT_TAG and len(entry.data) >= 8:
        yield entry.data[8:]


def _variable(data: bytes) -> tuple[str, bytes] | None:
    """Return name and value of a UEFI_VARIABLE_DATA (profile, 10.2.6), or None if it is not one."""
    if len(data) < 32:
        return None
    characters, size = struct.unpack_from("<QQ", data, 16)
    at = 32 + 2 * characters
    if at + size != len(data):
        return None
    return data[32:at].decode("utf-16-le", "replace"), data[at:]


def _label(kind: int, data: bytes, *, whole: bool) -> str:
    """Return a printable name of at most 128 characters, or nothing."""
    if kind in VARIABLES:
        variable = _variable(data) if whole else None
        return _printable(variable[0]) if variable is not None else ""
    if kind == EVENT_TAG:
        return _printable(data[8:].rstrip(b"\x00").decode("ascii", "replace")) if whole and len(data) > 8 else ""
    if data and all(32 <= each < 127 for each in data[:_LABEL].rstrip(b"\x00")):
        return _printable(data[:_LABEL].rstrip(b"\x00").decode("ascii", "replace"))
    return ""


def _printable(text: str) -> str:
    return "".join(each if each.isascii() and each.isprintable() else "?" for each in text.rstrip("\x00")[:_LABEL])
