"""HCL reports: bytes to frozen types. Checks form only; nothing here is believed.

An HCL report is what Azure's paravisor (the *host compatibility layer*) leaves in NV index 0x01400001 of a VM's vTPM. Source:
Microsoft, "Guest attestation for confidential VMs"; OpenHCL, `openhcl/attestation_protocol/src/igvm_attest`. Little-endian:

    header 32     "HCLA" | u32 version | u32 size | u32 request type | u32 status | reserved 12
    report 1184   SNP: ATTESTATION_REPORT;  TDX: a TDREPORT of 1024 bytes, which only its own CPU can check
    data 20       u32 size | u32 version | u32 report type (2 SNP, 4 TDX) | u32 hash (1 SHA-256, 2 SHA-384, 3 SHA-512) | u32 length
    runtime       JSON of that length, whose hash is the hardware report's report data, zeros after it

Only the hardware report and the runtime JSON are under a signature; of the rest, just what is needed to find and hash the two is read. The NV
index has 2,600 bytes, so zeros may follow.

Runtime JSON: `keys`, JSON web keys (RFC 7517) of the vTPM: `HCLAkPub` signs quotes; `vm-configuration`; `user-data`, hex.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.crypto.canonical import json_decode
from cloister.errors import EvidenceError, Reason

HEADER_BYTES: Final = 32
REPORT_BYTES: Final = 1184
DATA_BYTES: Final = 20
RUNTIME_AT: Final = HEADER_BYTES + REPORT_BYTES + DATA_BYTES
LIMIT: Final = 16 * 1024
"""Largest HCL report accepted, in bytes; the NV index has 2,600."""
SNP: Final = 2
TDX: Final = 4
HASHES: Final[Mapping[int, str]] = MappingProxyType({1: "sha256", 2: "sha384", 3: "sha512"})
AK: Final = "HCLAkPub"
MOST_KEYS: Final = 16
RSA_BITS: Final = (2048, 3072, 4096)

# vm-configuration -> `Claims.attributes`
SWITCHES: Final[Mapping[str, str]] = MappingProxyType(
    {"secure-boot": "secure_boot", "tpm-enabled": "tpm_enabled", "console-enabled": "console_enabled"}
)


@dataclass(frozen=True, slots=True)
class Runtime:
    """What the paravisor says about the VM."""

    ak: rsa.RSAPublicKey = field(compare=False, repr=False)
    """Attestation key of the vTPM."""
    ak_digest: str
    """SHA-256 of its DER SubjectPublicKeyInfo, hex."""
    switches: Mapping[str, bool]
    vm_id: str
    """`vmUniqueId`, or empty."""
    user_data: bytes
    """What the VM wrote into NV index 0x01400002 before the report was made; often 64 zero bytes."""


@dataclass(frozen=True, slots=True)
class Hcl:
    """One HCL report, taken apart."""

    type: int
    """`SNP` or `TDX`."""
    report: bytes
    """The hardware report, 1184 bytes."""
    hash: str
    runtime_json: bytes
    runtime: Runtime

    def wanted_report_data(self) -> bytes:
        """Return the 64 bytes of report data that vouch for this runtime JSON."""
        return hashlib.new(self.hash, self.runtime_json).digest().ljust(64, b"\x00")


def parse(data: bytes, *, where: str) -> Hcl:
    """Return the HCL report in `data`; only zeros may follow it.

    Raises:
        EvidenceError: `evidence-malformed`; `where` is `Reason.where`.
    """
    if not RUNTIME_AT < len(data) <= LIMIT:
        raise _malformed(where, f"{len(data)} bytes", f"an HCL report of {RUNTIME_AT + 1} to {LIMIT} bytes")
    if data[:4] != b"HCLA":
        raise _malformed(where, f"a header {data[:4].hex()}", "HCLA")
    kind, hash_, length = struct.unpack_from("<III", data, HEADER_BYTES + REPORT_BYTES + 8)
    if kind not in (SNP, TDX):
        raise _malformed(where, f"report type {kind}", f"{SNP}, SNP, or {TDX}, TDX")
    if hash_ not in HASHES:
        raise _malformed(where, f"hash {hash_}", "1, 2 or 3: SHA-256, SHA-384 or SHA-512")
    runtime = data[RUNTIME_AT : RUNTIME_AT + length]
    if length == 0 or len(runtime) != length:
        raise _malformed(where, f"runtime data of {length} bytes", f"1 to {len(data) - RUNTIME_AT}")
    if data[RUNTIME_AT + length :].strip(b"\x00"):
        raise _malformed(where, "bytes other than zero after the runtime data", "zeros, or nothing")
    report = data[HEADER_BYTES : HEADER_BYTES + REPORT_BYTES]
    return Hcl(kind, report, HASHES[hash_], runtime, parse_runtime(runtime, where=where))


@lru_cache(maxsize=64)
def parse_runtime(data: bytes, *, where: str) -> Runtime:
    """Return what the runtime JSON `data` says.

    Raises:
        EvidenceError: `evidence-malformed`: no JSON object, or not exactly one RSA key `HCLAkPub`.
    """
    try:
        value: Any = json_decode(data, limit=LIMIT, canonical=False)
    except ValueError as error:
        raise _malformed(where, str(error)[:120], "runtime data in JSON") from error
    if not isinstance(value, dict) or not isinstance(value.get("keys"), list) or len(value["keys"]) > MOST_KEYS:
        raise _malformed(where, "runtime data of another shape", f"an object with at most {MOST_KEYS} keys")
    keys = [key for key in value["keys"] if isinstance(key, dict) and key.get("kid") == AK]
    if len(keys) != 1:
        raise _malformed(where, f"{len(keys)} keys {AK}", "one")
    ak = _rsa(keys[0], where)
    configuration = value.get("vm-configuration")
    if not isinstance(configuration, dict):
        configuration = {}
    switches = {
        ours: configuration[name] for name, ours in SWITCHES.items() if isinstance(configuration.get(name), bool)
    }
    vm_id, user_data = configuration.get("vmUniqueId"), value.get("user-data", "")
    try:
        user = bytes.fromhex(user_data) if isinstance(user_data, str) else b""
    except ValueError as error:
        raise _malformed(where, "user data that is not hexadecimal", "hex digits") from error
    spki = ak.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    named = (
        vm_id.lower() if isinstance(vm_id, str) and vm_id.isascii() and vm_id.isprintable() and len(vm_id) <= 64 else ""
    )
    return Runtime(ak, hashlib.sha256(spki).hexdigest(), MappingProxyType(switches), named, user)


def _rsa(key: dict[str, Any], where: str) -> rsa.RSAPublicKey:
    """RFC 7518, 6.3.1."""
    exponent, modulus = key.get("e"), key.get("n")
    if key.get("kty") != "RSA" or not isinstance(exponent, str) or not isinstance(modulus, str):
        raise _malformed(where, f"a key {AK} of another type", "RSA, with e and n")
    try:
        numbers = [
            int.from_bytes(base64.b64decode(each + "=" * (-len(each) % 4), b"-_", validate=True), "big")
            for each in (exponent, modulus)
        ]
    except ValueError as error:
        raise _malformed(where, f"a key {AK} that is not base64url", "RFC 7518") from error
    if numbers[0] != 65537 or numbers[1].bit_length() not in RSA_BITS:
        found = f"{numbers[1].bit_length()} bits, exponent {numbers[0] if numbers[0] < 1 << 32 else 'too large'}"
        raise _malformed(where, found, f"{', '.join(map(str, RSA_BITS))} bits, exponent 65537")
    try:
        return rsa.RSAPublicNumbers(*numbers).public_key()
    except ValueError as error:
        raise _malformed(where, f"a key {AK} that is none", "an RSA key") from error


def build(kind: int, report: bytes, runtime: bytes, *, size: int = 2600) -> bytes:
    """Return an HCL report in a buffer of at least `size` bytes, as the NV index has it.

    Raises:
        ValueError: a hardware report of another size.
    """
    if len(report) != REPORT_BYTES:
        raise ValueError(f"a hardware report of {len(report)} bytes, wanted {REPORT_BYTES}")
    header = b"HCLA" + struct.pack("<IIII", 1, RUNTIME_AT + len(runtime), 2, 0) + bytes(12)
    data = struct.pack("<IIIII", DATA_BYTES + len(runtime), 1, kind, 1, len(runtime))
    return (header + report + data + runtime).ljust(size, b"\x00")


def _malformed(where: str, found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "the HCL report does not parse", code="evidence-malformed", reasons=[Reason(where, found, wanted)]
    )
