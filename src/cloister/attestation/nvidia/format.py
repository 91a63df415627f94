"""NVIDIA attestation reports: bytes to frozen types. Checks form only; nothing here is believed.

A report is an SPDM 1.1 request and its answer, one after the other (DMTF DSP0274 1.1.0, section 10.11; opaque fields as in
NVIDIA's nvtrust, local_gpu_verifier, spdm_msrt_resp_msg). Little-endian unless said:

    GET_MEASUREMENTS 37   0x11 | 0xE0 | u8 attributes (bit 0: signature wanted) | u8 operation (0xFF: all) |
                          requester nonce 32 | u8 slot
    MEASUREMENTS          0x11 | 0x60 | u8 | u8 | u8 number of records | u24 length of all records
      record              u8 index (from 1) | u8 specification (1, DMTF) | u16 size | u8 type | u16 length | value
    responder nonce 32
    u16 opaque length     fields: u16 type | u16 size | value
    signature 96          ECDSA P-384/SHA-384, r || s big-endian, over everything before it
    one zero byte         appended by some drivers (580); not signed, carries nothing

SPDM counts measurements from 1, NVIDIA's manifests and `msr` names from 0: record 1 is `msr0`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Final

from cloister.attestation.form import FormError, Reader
from cloister.errors import EvidenceError, Reason

WHERE: Final = "nvidia-gpu.1-format"

LIMIT: Final = 16 * 1024
"""Largest report accepted, in bytes; real ones have 2,168 (switch) to 4,262."""
REQUEST_BYTES: Final = 37
NONCE_BYTES: Final = 32
SIGNATURE_BYTES: Final = 96
SPDM_11: Final = 0x11
GET_MEASUREMENTS: Final = 0xE0
MEASUREMENTS: Final = 0x60
SIGNATURE_WANTED: Final = 0x01
ALL_MEASUREMENTS: Final = 0xFF
DMTF: Final = 1
VALUE_LIMIT: Final = 64
"""Longest measurement, in bytes: SHA-512. Real ones are SHA-384, 48."""
TYPE_DIGEST: Final = 1
"""DMTFSpecMeasurementValueType of all of NVIDIA's records: mutable firmware, as a digest."""

ENABLED: Final = 0xAA
DISABLED: Final = 0x55
"""How one-byte status fields say yes and no."""


_NAME: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


class Field(IntEnum):
    """Types of opaque fields that are read here; the others are kept as bytes."""

    DRIVER_VERSION = 3
    GPU_INFO = 4
    VBIOS_VERSION = 6
    NVDEC0_STATUS = 11
    CHIP_SKU = 15
    PROJECT = 17
    PROJECT_SKU = 18
    FWID = 20
    PROTECTED_PCIE_STATUS = 21
    SWITCH_PDI = 22
    CHIP_INFO = 35
    FEATURE_FLAG = 36


@dataclass(frozen=True, slots=True)
class Report:
    """One report, taken apart. `signed` is what the device key signs."""

    signed: bytes
    signature: bytes
    """r || s, 48 bytes each, big-endian."""
    nonce: bytes
    """What the requester asked with, 32 bytes."""
    responder_nonce: bytes
    measurements: tuple[bytes, ...]
    """By index from 0, as in NVIDIA's manifests."""
    fields: Mapping[int, bytes]
    """Opaque fields by type."""

    def text(self, field: Field) -> str:
        """Return an ASCII field without the zero bytes at its end; empty where it is absent.

        Raises:
            EvidenceError: `evidence-malformed`: it is longer than 32 or has other characters than letters, digits, `.`, `_` and `-`.
        """
        value = self.fields.get(field, b"").rstrip(b"\x00")
        # ids of manifests are made of these, before anything is authentic, and whoever fetches one makes a path of the id
        if len(value) > 32 or not set(value) <= _NAME or value.startswith(b"."):
            raise _malformed(
                FormError(f"field {field.name} with bytes {value[:16].hex()}", "letters, digits, full stops, _ and -")
            )
        return value.decode("ascii")

    def byte(self, field: Field) -> int | None:
        """Return the only byte of a status field, or None where the field is absent.

        Raises:
            EvidenceError: `evidence-malformed`: it has another size.
        """
        value = self.fields.get(field)
        if value is None:
            return None
        if len(value) != 1:
            raise _malformed(FormError(f"field {field.name} of {len(value)} bytes", "1 byte"))
        return value[0]

    def number(self, field: Field) -> int | None:
        """Return a field as a little-endian number of at most 8 bytes, or None where it is absent.

        Raises:
            EvidenceError: `evidence-malformed`: it has another size.
        """
        value = self.fields.get(field)
        if value is None:
            return None
        if not 0 < len(value) <= 8:
            raise _malformed(FormError(f"field {field.name} of {len(value)} bytes", "1 to 8 bytes"))
        return int.from_bytes(value, "little")

    def vbios(self) -> str:
        """Return the VBIOS version as people and manifests write it, such as `96.00.9F.00.01`.

        GPUs report it as u32 and u8, little-endian, in 8 bytes; switches as ASCII.

        Raises:
            EvidenceError: `evidence-malformed`: it is absent or of another form.
        """
        value = self.fields.get(Field.VBIOS_VERSION, b"")
        if len(value) == 8:
            return ".".join(f"{byte:02X}" for byte in (*value[3::-1], value[4]))
        text = self.text(Field.VBIOS_VERSION).upper()
        parts = text.split(".")
        if len(parts) != 5 or not all(len(part) == 2 and set(part) <= set("0123456789ABCDEF") for part in parts):
            raise _malformed(FormError(f"VBIOS version {value[:16].hex() or 'absent'}", "five bytes in hex, dotted"))
        return text


def parse(data: bytes) -> Report:
    """Return the report in `data`; after it, one zero byte may follow.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    try:
        if len(data) > LIMIT:
            raise FormError(f"{len(data)} bytes", f"at most {LIMIT}")
        return _report(Reader(bytes(data)), bytes(data))
    except FormError as error:
        raise _malformed(error) from error


def _report(reader: Reader, data: bytes) -> Report:
    request = reader.take(REQUEST_BYTES, "GET_MEASUREMENTS request")
    if request[:2] != bytes((SPDM_11, GET_MEASUREMENTS)):
        raise FormError(f"request {request[:2].hex()}", "11e0, an SPDM 1.1 GET_MEASUREMENTS")
    if not request[2] & SIGNATURE_WANTED or request[3] != ALL_MEASUREMENTS:
        raise FormError(f"request attributes {request[2:4].hex()}", "a request for all measurements, signed")
    head = reader.take(8, "MEASUREMENTS response")
    if head[:2] != bytes((SPDM_11, MEASUREMENTS)):
        raise FormError(f"response {head[:2].hex()}", "1160, an SPDM 1.1 MEASUREMENTS")
    records = Reader(reader.take(int.from_bytes(head[5:8], "little"), "measurement records"))
    measurements = tuple(_record(records, index) for index in range(1, head[4] + 1))
    if records.rest:
        raise FormError(f"{records.rest} bytes after {head[4]} measurement records", "none")
    if not measurements:
        raise FormError("no measurement", "at least one")
    responder_nonce = reader.take(NONCE_BYTES, "responder nonce")
    (size,) = struct.unpack("<H", reader.take(2, "opaque length"))
    fields = _opaque(Reader(reader.take(size, "opaque data")))
    signed = data[: reader.at]
    signature = reader.take(SIGNATURE_BYTES, "signature")
    if reader.rest and reader.take(reader.rest, "padding") != b"\x00":
        raise FormError("bytes after the signature", "nothing, or one zero byte")
    return Report(
        signed=signed,
        signature=signature,
        nonce=request[4:36],
        responder_nonce=responder_nonce,
        measurements=measurements,
        fields=MappingProxyType(fields),
    )


def _record(reader: Reader, wanted: int) -> bytes:
    index, specification, size = struct.unpack("<BBH", reader.take(4, "measurement header"))
    if index != wanted:
        raise FormError(f"measurement index {index}", str(wanted))
    if specification != DMTF:
        raise FormError(f"measurement specification {specification}", f"{DMTF}, DMTF")
    kind, length = struct.unpack("<BH", reader.take(3, "measurement value header"))
    if kind != TYPE_DIGEST:
        raise FormError(f"measurement value type {kind}", f"{TYPE_DIGEST}, a digest")
    if length + 3 != size or not 0 < length <= VALUE_LIMIT:
        raise FormError(f"a measurement of {length} bytes in {size}", f"1 to {VALUE_LIMIT} bytes, and 3 more")
    return reader.take(length, "measurement value")


def _opaque(reader: Reader) -> dict[int, bytes]:
    fields: dict[int, bytes] = {}
    while reader.rest:
        kind, size = struct.unpack("<HH", reader.take(4, "opaque field header"))
        if kind in fields:
            raise FormError(f"opaque field {kind} twice", "each at most once")
        fields[kind] = reader.take(size, f"opaque field {kind}")
    return fields


def _malformed(error: FormError) -> EvidenceError:
    return EvidenceError(
        "the NVIDIA report does not parse",
        code="evidence-malformed",
        reasons=[Reason(WHERE, error.found, error.wanted)],
    )
