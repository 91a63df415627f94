"""What an NVIDIA device's certificates say about it. The chain authenticates this; nothing here is about a report.

A chain has five certificates: attestation key of the running firmware (made by the device itself, DICE), device key (burnt in),
two intermediate authorities, root. Sources: DMTF DSP0274 1.1.0, 10.6.1 (otherName 1.3.6.1.4.1.412.274.1,
`manufacturer:product:serial`); TCG DICE Attestation Architecture 1.1, 6.1 (DiceTcbInfo); NVIDIA's nvtrust for the two ways
in which the FWID stands in the leaf:

    2.23.133.5.4.1     Hopper, LS10: SEQUENCE { version 1, SubjectPublicKeyInfo, FWID }
    2.23.133.5.4.1.1   Blackwell: DiceTcbInfo, fwids [6] whose first is the FWID, flags [7]
    FWID               SEQUENCE { hashAlg OBJECT IDENTIFIER (SHA-384), digest OCTET STRING (48) }
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from asn1crypto import parser

from cloister.attestation.pki.certificate import Certificate
from cloister.errors import EvidenceError, Reason

FWID: Final = "2.23.133.5.4.1"
DICE_TCB_INFO: Final = "2.23.133.5.4.1.1"
SUBJECT_ALTERNATIVE_NAME: Final = "2.5.29.17"

_DEVICE_INFO: Final = bytes.fromhex("060a2b06010401831c821201")  # 1.3.6.1.4.1.412.274.1 with tag and length
_SHA384: Final = bytes.fromhex("0609608648016503040202")  # 2.16.840.1.101.3.4.2.2 with tag and length
INSECURE_FLAGS: Final = 0b0111_0000
"""DiceTcbInfo OperationalFlags notSecure, recovery and debug: bits 1 to 3 of a BIT STRING, from the left."""

ARCHITECTURES: Final = {"GH": "HOPPER", "GB": "BLACKWELL", "LS": "LS10"}
"""First two letters of the chip -> NVIDIA's name of the architecture. LS10 is an NVSwitch."""


@dataclass(frozen=True, slots=True)
class Device:
    """Who made the report, by its certificates."""

    chip: str
    """Such as `GH100`, `GB100`, `LS_10`."""
    arch: str
    """`HOPPER`, `BLACKWELL` or `LS10`."""
    udid: str
    """Serial number that the maker gave the device, hex; the same whatever firmware runs. Empty where it is not stated."""
    fwid: bytes
    """SHA-384 of the firmware that owns the attestation key."""
    debug: bool
    """The firmware says that it is in debug, recovery or insecure state (DiceTcbInfo flags)."""

    @property
    def is_switch(self) -> bool:
        return self.arch == "LS10"


@lru_cache(maxsize=256)
def read(leaf: Certificate, *, where: str) -> Device:
    """Return what `leaf` states.

    Raises:
        EvidenceError: `evidence-malformed`: an extension of another form, or a chip of an unknown architecture.
    """
    try:
        product, udid = _product(leaf)
        arch = ARCHITECTURES.get(product[:2])
        if arch is None:
            raise ValueError(f"chip {product[:32]!r}, of an architecture that this version does not know")
        # no authority says whether the first certificate is revoked, so it must be one that no authority issues: a revoked
        # device key that shows its own certificate as the first one would escape revocation otherwise
        if leaf.authority:
            raise ValueError(f"{leaf.subject}: the key of an authority, not of running firmware")
        fwid, debug = _fwid(leaf)
        if not fwid:
            raise ValueError(f"{leaf.subject}: no FWID")
        return Device(product, arch, udid, fwid, debug)
    except (ValueError, IndexError) as error:
        raise EvidenceError(
            "the device certificate does not parse",
            code="evidence-malformed",
            reasons=[
                Reason(f"{where}.format", str(error), "the attestation certificate of a Hopper, Blackwell or LS10")
            ],
        ) from error


def _product(leaf: Certificate) -> tuple[str, str]:
    names = leaf.extensions.get(SUBJECT_ALTERNATIVE_NAME)
    if names is None:  # then the subject says it: CN=GH100 A01 GSP FMC LF
        common = leaf.subject.removeprefix("CN=").split(",")[0]
        return common.split(" ")[0], ""
    for entry in _members(_contents(names, 0x30)):
        if entry[0] != 0xA0:
            continue
        inner = list(_members(_contents(entry, 0xA0)))
        if inner[0] != _DEVICE_INFO:
            continue
        text = _contents(_contents(inner[1], 0xA0), 0x0C).decode("ascii")
        maker, product, serial = text.split(":")
        if maker != "NVIDIA" or not serial.isalnum() or len(serial) > 64:
            raise ValueError(f"device information {text[:80]!r}")
        return product, serial.lower()
    raise ValueError("no device information in the subject's alternative names")


def _fwid(leaf: Certificate) -> tuple[bytes, bool]:
    composite, info = leaf.extensions.get(FWID), leaf.extensions.get(DICE_TCB_INFO)
    if composite is not None and info is not None:
        raise ValueError("two extensions with an FWID")
    if composite is not None:
        members = list(_members(_contents(composite, 0x30)))
        if len(members) != 3:
            raise ValueError(f"an FWID extension with {len(members)} members")
        return _digest(members[2]), False
    if info is None:
        return b"", False
    fwid, flags = b"", 0
    for member in _members(_contents(info, 0x30)):
        if member[0] == 0xA6:
            fwid = _digest(next(_members(_contents(member, 0xA6)), b""))
        elif member[0] == 0x87:
            bits = _contents(member, 0x87)
            flags = bits[1] if len(bits) > 1 else 0
    return fwid, bool(flags & INSECURE_FLAGS)


def _digest(data: bytes) -> bytes:
    algorithm, value = _members(_contents(data, 0x30))
    if algorithm != _SHA384:
        raise ValueError(f"an FWID of algorithm {algorithm.hex()[:40]}")
    digest = _contents(value, 0x04)
    if len(digest) != 48:
        raise ValueError(f"an FWID of {len(digest)} bytes")
    return digest


def _members(data: bytes) -> Iterator[bytes]:
    """Yield the DER elements of `data`, tag and length included."""
    at = 0
    while at < len(data):
        size = parser.peek(data[at:])
        yield data[at : at + size]
        at += size


def _contents(data: bytes, tag: int) -> bytes:
    """Return what is inside the one DER element `data`, which must have this tag."""
    if not data or data[0] != tag:
        raise ValueError(f"DER tag {data[:1].hex() or 'missing'}, wanted {tag:02x}")
    contents: bytes = parser.parse(data, strict=True)[4]
    return contents
