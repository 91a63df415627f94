"""What a PCK certificate says about its machine: the SGX extension 1.2.840.113741.1.13.1.

Source: Intel SGX PCK Certificate and CRL Profile Specification 1.5, section 1.3.5. Members of the extension, by the last
part of their OID; each is SEQUENCE { OID, value }:

    1 PPID 16 | 2 TCB { 1..16 component SVNs, 17 PCESVN, 18 CPUSVN 16 } | 3 PCE-ID 2 | 4 FMSPC 6 | 5 SGX type |
    6 platform instance id 16 | 7 configuration { 1 dynamic platform, 2 cached keys, 3 SMT enabled }

6 and 7 are in certificates of the Platform CA only. Form only: the chain says whether to believe it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cloister.attestation.pki import certificate
from cloister.attestation.pki.certificate import Certificate
from cloister.errors import EvidenceError, Reason

SGX_EXTENSION: Final = "1.2.840.113741.1.13.1"
_PREFIX: Final = bytes.fromhex("2a864886f84d010d01")  # the same, DER
_SEQUENCE, _OID, _INTEGER, _OCTETS, _ENUMERATED, _BOOLEAN = 0x30, 0x06, 0x02, 0x04, 0x0A, 0x01


@dataclass(frozen=True, slots=True)
class Pck:
    """One machine, as the vendor certified it."""

    ppid: bytes
    """Platform provisioning id, 16 bytes: the machine."""
    cpusvn: bytes
    pcesvn: int
    pceid: bytes
    fmspc: bytes
    """Family, model, stepping, platform, custom SKU, 6 bytes: selects collateral."""
    sgx_type: int
    """0 standard, 1 scalable, 2 scalable with integrity."""
    platform_instance_id: bytes | None
    flags: tuple[tuple[str, bool], ...]
    """Of `dynamic_platform`, `cached_keys`, `smt_enabled`: those that the certificate states."""

    def attributes(self) -> dict[str, bool]:
        """Return the switches that a policy may demand. `memory_integrity`: memory is bound cryptographically and not only
        encrypted (type scalable lacks it, and interposers on the memory bus have broken such machines)."""
        return {**dict(self.flags), "memory_integrity": self.sgx_type in (0, 2)}

    def platform(self) -> dict[str, str]:
        """Return who the machine is, for allow and deny lists: bytes in lower-case hex."""
        found = {
            "ppid": self.ppid.hex(),
            "fmspc": self.fmspc.hex(),
            "pceid": self.pceid.hex(),
            "cpusvn": self.cpusvn.hex(),
            "sgx_type": str(self.sgx_type),
        }
        if self.platform_instance_id is not None:
            found["platform_instance_id"] = self.platform_instance_id.hex()
        return found


def load(certificates: tuple[bytes, ...], *, where: str) -> tuple[Certificate, ...]:
    """Return the certificates (DER) of a quote.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    return tuple(_certificate(der, where) for der in certificates)


@lru_cache(maxsize=256)
def _certificate(der: bytes, where: str) -> Certificate:
    return certificate.from_der(der, where=where)  # a machine sends the same chain with every quote


@lru_cache(maxsize=256)
def read(leaf: Certificate, *, where: str) -> Pck:
    """Return what the PCK certificate `leaf` says.

    Raises:
        EvidenceError: `evidence-malformed`: no SGX extension, or one of another form; `where` gets the suffix `.format`.
    """
    try:
        return _read(leaf.extensions[SGX_EXTENSION])
    except (KeyError, ValueError, IndexError) as error:
        raise EvidenceError(
            "the PCK certificate does not name a machine",
            code="evidence-malformed",
            reasons=[Reason(f"{where}.format", f"{leaf.subject}: {error}"[:300], f"the SGX extension {SGX_EXTENSION}")],
        ) from error


def _read(extension: bytes) -> Pck:
    top = _members(extension, b"")
    tcb = _members(_value(top[2], _SEQUENCE, None), b"\x02")
    flags: dict[int, tuple[int, bytes]] = {}
    if 7 in top:
        flags = _members(_value(top[7], _SEQUENCE, None), b"\x07")
    names = {1: "dynamic_platform", 2: "cached_keys", 3: "smt_enabled"}
    return Pck(
        ppid=_value(top[1], _OCTETS, 16),
        cpusvn=_value(tcb[18], _OCTETS, 16),
        pcesvn=int.from_bytes(_value(tcb[17], _INTEGER, None), "big"),
        pceid=_value(top[3], _OCTETS, 2),
        fmspc=_value(top[4], _OCTETS, 6),
        sgx_type=_value(top[5], _ENUMERATED, 1)[0],
        platform_instance_id=_value(top[6], _OCTETS, 16) if 6 in top else None,
        flags=tuple((names[key], _value(flags[key], _BOOLEAN, 1) != b"\x00") for key in sorted(flags) if key in names),
    )


def _value(element: tuple[int, bytes], tag: int, size: int | None) -> bytes:
    if element[0] != tag or (size is not None and len(element[1]) != size):
        raise ValueError(f"tag {element[0]:#x} of {len(element[1])} bytes where {tag:#x} of {size or 'some'} belongs")
    # a sequence is walked again, with its own header
    return _element(tag, element[1]) if tag == _SEQUENCE else element[1]


def _element(tag: int, value: bytes) -> bytes:
    return bytes([tag, 0x82]) + len(value).to_bytes(2, "big") + value


def _members(data: bytes, path: bytes) -> dict[int, tuple[int, bytes]]:
    """Return last OID arc -> (tag, value) of a SEQUENCE of SEQUENCE { OID below `path`, value }."""
    tag, body, end = _next(data, 0)
    if tag != _SEQUENCE or end != len(data):
        raise ValueError("not one SEQUENCE")
    found: dict[int, tuple[int, bytes]] = {}
    at = 0
    while at < len(body):
        tag, member, at = _next(body, at)
        oid_tag, oid, middle = _next(member, 0)
        value_tag, value, end = _next(member, middle)
        prefix = _PREFIX + path
        if tag != _SEQUENCE or oid_tag != _OID or end != len(member) or oid[:-1] != prefix or oid[-1] in found:
            raise ValueError("a member of another form")
        found[oid[-1]] = (value_tag, value)
    return found


def _next(data: bytes, at: int) -> tuple[int, bytes, int]:
    """Return tag, value and end of the DER element at `at`; at most 65,535 bytes (X.690, 8.1)."""
    tag, size = data[at], data[at + 1]
    start = at + 2
    if size >= 0x80:
        count = size & 0x7F
        if not 1 <= count <= 2:
            raise ValueError("a length that no certificate has")
        size = int.from_bytes(data[start : start + count], "big")
        start += count
    if start + size > len(data):
        raise ValueError("an element that ends after its parent")
    return tag, data[start : start + size], start + size
