"""TPM 2.0 structures: bytes to frozen types. Checks form only; nothing here is believed.

Source: TCG TPM 2.0 Library 1.59 part 2 (structures; sections in brackets). Big-endian; TPM2B is a u16 length and bytes.

    TPMS_ATTEST [10.12.12]      u32 magic FF544347 | u16 type (8018 quote, 8014 NV) | TPM2B qualified signer | TPM2B extra data |
                                u64 clock | u32 resetCount | u32 restartCount | u8 safe | u64 firmware version | attested
      quote [10.12.4]           TPML_PCR_SELECTION | TPM2B digest
      NV [10.12.8]              TPM2B name | u16 offset | TPM2B contents
    TPML_PCR_SELECTION [10.9.7] u32 n | n x (u16 hash | u8 size | bitmap, PCR i is bit i % 8 of byte i / 8)
    TPMT_PUBLIC [12.2.4]        u16 type (1 RSA, 23 ECC) | u16 name algorithm | u32 attributes | TPM2B policy |
                                symmetric: u16 algorithm [u16 bits, u16 mode] | scheme: u16 [u16 hash] |
                                RSA: u16 bits, u32 exponent, TPM2B modulus;  ECC: u16 curve, u16 KDF [u16 hash], TPM2B x, TPM2B y
    TPMT_SIGNATURE [11.3.4]     u16 scheme (14 RSASSA, 16 RSAPSS, 18 ECDSA) | u16 hash | RSA: TPM2B;  ECDSA: TPM2B r, TPM2B s

The name of a key [part 1, 16] is the u16 name algorithm and the hash of its TPMT_PUBLIC: attributes and policy are in it.
Bytes after the end are refused everywhere.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.attestation.form import FormError, Reader
from cloister.attestation.pki.certificate import PublicKey
from cloister.errors import EvidenceError, Reason

__all__ = [
    "GENERATED",
    "NV",
    "QUOTE",
    "Attest",
    "Public",
    "Selection",
    "Signature",
    "encode_public",
    "encode_selection",
    "parse_attest",
    "parse_public",
    "parse_selection",
    "parse_signature",
]

GENERATED: Final = 0xFF544347
"""TPM_GENERATED_VALUE: a restricted key signs nothing else that begins like this."""
QUOTE: Final = 0x8018
NV: Final = 0x8014

HASHES: Final[Mapping[int, str]] = MappingProxyType(
    {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
)
"""TPM_ALG_ID -> name."""
HASH_IDS: Final[Mapping[str, int]] = MappingProxyType({name: number for number, name in HASHES.items()})
HASH_SIZES: Final[Mapping[str, int]] = MappingProxyType({"sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64})

RSA: Final = 0x0001
ECC: Final = 0x0023
NULL: Final = 0x0010
RSASSA: Final = 0x0014
RSAPSS: Final = 0x0016
ECDSA: Final = 0x0018
SCHEMES: Final[Mapping[int, str]] = MappingProxyType({RSASSA: "rsassa", RSAPSS: "rsapss", ECDSA: "ecdsa"})
_WITH_HASH: Final = frozenset({0x14, 0x16, 0x17, 0x18, 0x19, 0x1B, 0x1C, 0x1D})
_CURVES: Final[Mapping[int, type[ec.SECP256R1] | type[ec.SECP384R1] | type[ec.SECP521R1]]] = MappingProxyType(
    {3: ec.SECP256R1, 4: ec.SECP384R1, 5: ec.SECP521R1}
)

# TPMA_OBJECT [8.3]
FIXED_TPM: Final = 1 << 1
FIXED_PARENT: Final = 1 << 4
SENSITIVE_DATA_ORIGIN: Final = 1 << 5
USER_WITH_AUTH: Final = 1 << 6
ADMIN_WITH_POLICY: Final = 1 << 7
NO_DA: Final = 1 << 10
RESTRICTED: Final = 1 << 16
DECRYPT: Final = 1 << 17
SIGN: Final = 1 << 18

LIMIT: Final = 4096
"""Largest structure accepted, in bytes; a quote has 145, an RSA key 280."""
BANKS: Final = 8
PCRS: Final = 24


@dataclass(frozen=True, slots=True)
class Selection:
    """PCRs of one bank, ascending. `algorithm` is `sha256` and so on, or `0x....` of a bank that nobody here knows."""

    algorithm: str
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Attest:
    """One TPMS_ATTEST. `data` is what the key signs."""

    data: bytes = field(repr=False)
    magic: int
    type: int
    """`QUOTE` or `NV`."""
    signer: bytes
    """Qualified name of the signing key."""
    extra_data: bytes
    """What the caller of TPM2_Quote passed as qualifyingData."""
    clock: int
    """Milliseconds."""
    reset_count: int
    """Starts of the TPM: another value is another boot."""
    restart_count: int
    """Suspends and resumes since."""
    safe: bool
    """No clock value that the TPM reported before can be greater."""
    firmware: int
    selection: tuple[Selection, ...] = ()
    digest: bytes = b""
    """Of a quote: over the selected PCRs, with the hash of the signature scheme."""
    nv_name: bytes = b""
    nv_offset: int = 0
    nv_contents: bytes = b""


@dataclass(frozen=True, slots=True)
class Public:
    """One TPMT_PUBLIC: a key, and what its TPM lets it do."""

    data: bytes = field(repr=False)
    """The TPMT_PUBLIC, without the length of a TPM2B_PUBLIC."""
    key: PublicKey = field(compare=False, repr=False)
    spki: bytes = field(compare=False, repr=False)
    """DER SubjectPublicKeyInfo of `key`."""
    name_algorithm: str
    name: bytes
    attributes: int
    policy: bytes
    scheme: str
    """`rsassa`, `rsapss`, `ecdsa`, or empty: chosen at each use."""
    scheme_hash: str
    symmetric: tuple[int, int, int] | None
    """Algorithm, bits, mode of a storage key; None without one."""

    def has(self, attributes: int) -> bool:
        """Return whether all of these TPMA_OBJECT bits are set."""
        return self.attributes & attributes == attributes


@dataclass(frozen=True, slots=True)
class Signature:
    """One TPMT_SIGNATURE. `value` is the RSA signature, or DER of r and s."""

    scheme: str
    hash: str
    value: bytes


class _Reader(Reader):
    """Numbers as the TPM writes them: big-endian (TPM 2.0 Library, part 2, section 4)."""

    __slots__ = ()

    def u8(self, what: str) -> int:
        return self.take(1, what)[0]

    def u16(self, what: str) -> int:
        return int.from_bytes(self.take(2, what), "big")

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "big")

    def sized(self, what: str) -> bytes:
        return self.take(self.u16(f"the length of {what}"), what)

    def end(self, what: str) -> None:
        if self.rest:
            raise FormError(f"{self.rest} bytes after the end of the {what}", "none")


def parse_attest(data: bytes, *, where: str) -> Attest:
    """Return the TPMS_ATTEST of type quote or NV in `data`, which holds nothing else. `magic` is not judged here.

    Raises:
        EvidenceError: `evidence-malformed`; `where` is `Reason.where`.
    """
    try:
        reader = _reader(data, "TPMS_ATTEST")
        magic, kind = reader.u32("magic"), reader.u16("type")
        signer, extra = reader.sized("qualified signer"), reader.sized("extra data")
        clock, reset, restart, safe, firmware = struct.unpack(">QIIBQ", reader.take(25, "clock and firmware version"))
        if safe > 1:
            raise FormError(f"safe {safe}", "0 or 1")
        selection: tuple[Selection, ...] = ()
        digest, name, offset, contents = b"", b"", 0, b""
        if kind == QUOTE:
            selection = _selection(reader)
            digest = reader.sized("PCR digest")
        elif kind == NV:
            name, offset, contents = reader.sized("NV name"), reader.u16("NV offset"), reader.sized("NV contents")
        else:
            raise FormError(f"attestation type {kind:#06x}", f"{QUOTE:#06x}, a quote, or {NV:#06x}, NV")
        reader.end("TPMS_ATTEST")
    except FormError as error:
        raise _malformed(where, error) from error
    return Attest(
        data, magic, kind, signer, extra, clock, reset, restart, bool(safe), firmware, selection, digest, name, offset, contents
    )  # fmt: skip


def parse_selection(data: bytes, *, where: str) -> tuple[Selection, ...]:
    """Return the TPML_PCR_SELECTION that is exactly `data`.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    try:
        reader = _reader(data, "TPML_PCR_SELECTION")
        found = _selection(reader)
        reader.end("TPML_PCR_SELECTION")
    except FormError as error:
        raise _malformed(where, error) from error
    return found


def encode_selection(selection: tuple[Selection, ...]) -> bytes:
    """Return `selection` as a TPML_PCR_SELECTION with three bytes of bits per bank.

    Raises:
        ValueError: an unknown bank, or a PCR that is not 0 to 23.
    """
    parts = [struct.pack(">I", len(selection))]
    for bank in selection:
        if bank.algorithm not in HASH_IDS or any(not 0 <= index < PCRS for index in bank.indices):
            raise ValueError(f"{bank} is not a selection of PCRs")
        bits = sum(1 << index for index in set(bank.indices))
        parts.append(struct.pack(">HB", HASH_IDS[bank.algorithm], 3) + bits.to_bytes(3, "little"))
    return b"".join(parts)


def parse_public(data: bytes, *, where: str) -> Public:
    """Return the key in `data`: a TPMT_PUBLIC, or a TPM2B_PUBLIC (the same after its u16 length), and nothing else.

    Raises:
        EvidenceError: `evidence-malformed`: also a point that is not on its curve, or an algorithm that signs no quote.
    """
    try:
        return _public(bytes(data))
    except FormError as error:
        raise _malformed(where, error) from error


def parse_signature(data: bytes, *, where: str, bare: bool = False) -> Signature:
    """Return the TPMT_SIGNATURE that is exactly `data`.

    `bare` takes 256, 384 or 512 bytes as an RSASSA/SHA-256 value without its header, as some clouds' agents send it.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    if bare and len(data) in (256, 384, 512):
        return Signature("rsassa", "sha256", bytes(data))
    try:
        reader = _reader(data, "TPMT_SIGNATURE")
        scheme, number = reader.u16("scheme"), reader.u16("hash")
        if scheme not in SCHEMES:
            raise FormError(f"signature scheme {scheme:#06x}", "RSASSA, RSAPSS or ECDSA")
        hash_ = _hash(number)
        if scheme == ECDSA:
            value = _der_signature(reader.sized("r"), reader.sized("s"))
        else:
            value = reader.sized("RSA signature")
        reader.end("TPMT_SIGNATURE")
    except FormError as error:
        raise _malformed(where, error) from error
    return Signature(SCHEMES[scheme], hash_, value)


def encode_public(
    key: PublicKey,
    *,
    attributes: int,
    policy: bytes = b"",
    scheme: int = NULL,
    scheme_hash: str = "sha256",
    symmetric: tuple[int, int, int] | None = None,
    name_algorithm: str = "sha256",
) -> bytes:
    """Return the TPMT_PUBLIC of `key`.

    Raises:
        ValueError: a curve without TPM number.
    """
    kind = RSA if isinstance(key, rsa.RSAPublicKey) else ECC
    out = struct.pack(">HHIH", kind, HASH_IDS[name_algorithm], attributes, len(policy)) + policy
    out += struct.pack(">H", NULL) if symmetric is None else struct.pack(">HHH", *symmetric)
    out += struct.pack(">H", scheme) + (struct.pack(">H", HASH_IDS[scheme_hash]) if scheme in _WITH_HASH else b"")
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        exponent = 0 if numbers.e == 65537 else numbers.e
        size = key.key_size // 8
        return out + struct.pack(">HIH", key.key_size, exponent, size) + numbers.n.to_bytes(size, "big")
    curves = [number for number, curve in _CURVES.items() if isinstance(key.curve, curve)]
    if not curves:
        raise ValueError(f"curve {key.curve.name} has no TPM number here")
    point = key.public_numbers()
    size = (key.key_size + 7) // 8
    out += struct.pack(">HH", curves[0], NULL)
    return out + b"".join(struct.pack(">H", size) + each.to_bytes(size, "big") for each in (point.x, point.y))


@lru_cache(maxsize=256)
def _public(data: bytes) -> Public:
    reader = _reader(data, "TPMT_PUBLIC")
    # a TPMT_PUBLIC begins with 0001 or 0023, which as a length would be 1 or 35 bytes: too short for any key
    if len(data) >= 2 and int.from_bytes(data[:2], "big") == len(data) - 2:
        reader.u16("length")
        data = data[2:]
    kind, name_number, attributes = reader.u16("type"), reader.u16("name algorithm"), reader.u32("attributes")
    name_algorithm = _hash(name_number)
    policy = reader.sized("policy")
    if len(policy) not in (0, HASH_SIZES[name_algorithm]):
        raise FormError(f"a policy of {len(policy)} bytes", f"none or {HASH_SIZES[name_algorithm]}")
    if kind not in (RSA, ECC):
        raise FormError(f"a key of type {kind:#06x}", "RSA or ECC")
    symmetric = None
    algorithm = reader.u16("symmetric algorithm")
    if algorithm != NULL:
        symmetric = (algorithm, reader.u16("key bits"), reader.u16("mode"))
    scheme, scheme_hash = reader.u16("scheme"), ""
    if scheme in _WITH_HASH:
        scheme_hash = _hash(reader.u16("hash of the scheme"))
    elif scheme not in (NULL, 0x15):  # RSAES has no hash; ECDAA needs more than a signature of one key
        raise FormError(f"scheme {scheme:#06x}", "RSASSA, RSAPSS, ECDSA or none")
    try:
        key = _rsa(reader) if kind == RSA else _ecc(reader)
        reader.end("TPMT_PUBLIC")
        spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except FormError:
        raise
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FormError(f"a public key that is none: {str(error)[:100]}", "a key") from error
    name = struct.pack(">H", name_number) + hashlib.new(name_algorithm, data).digest()
    return Public(
        data, key, spki, name_algorithm, name, attributes, policy, SCHEMES.get(scheme, ""), scheme_hash, symmetric
    )


def _rsa(reader: _Reader) -> PublicKey:
    bits, exponent = reader.u16("key bits"), reader.u32("exponent") or 65537
    modulus = reader.sized("modulus")
    if bits not in (1024, 2048, 3072, 4096) or len(modulus) * 8 != bits:
        raise FormError(f"a modulus of {len(modulus)} bytes for {bits} bits", "2,048, 3,072 or 4,096 bits")
    number = int.from_bytes(modulus, "big")
    if number.bit_length() != bits or exponent != 65537:
        raise FormError(f"{number.bit_length()} bits, exponent {exponent}", f"{bits} bits, exponent 65537")
    return rsa.RSAPublicNumbers(exponent, number).public_key()


def _ecc(reader: _Reader) -> PublicKey:
    curve, kdf = reader.u16("curve"), reader.u16("KDF")
    if kdf != NULL:
        reader.u16("hash of the KDF")
    x, y = reader.sized("x"), reader.sized("y")
    if curve not in _CURVES:
        raise FormError(f"curve {curve:#06x}", "P-256, P-384 or P-521")
    size = (_CURVES[curve].key_size + 7) // 8
    if len(x) > size or len(y) > size:
        raise FormError(f"coordinates of {len(x)} and {len(y)} bytes", f"at most {size}")
    return ec.EllipticCurvePublicNumbers(
        int.from_bytes(x, "big"), int.from_bytes(y, "big"), _CURVES[curve]()
    ).public_key()


def _selection(reader: _Reader) -> tuple[Selection, ...]:
    count = reader.u32("number of banks")
    if count > BANKS:
        raise FormError(f"{count} banks", f"at most {BANKS}")
    found: list[Selection] = []
    for _ in range(count):
        number = reader.u16("hash of a bank")
        bitmap = reader.take(reader.u8("size of a selection"), "selected PCRs")
        bits = int.from_bytes(bitmap, "little")
        if bits >> PCRS:
            raise FormError("a PCR above 23", "0 to 23")
        indices = tuple(index for index in range(PCRS) if bits >> index & 1)
        found.append(Selection(HASHES.get(number, f"{number:#06x}"), indices))
    return tuple(found)


def _hash(number: int) -> str:
    if number not in HASHES:
        raise FormError(f"hash {number:#06x}", "SHA-1, SHA-256, SHA-384 or SHA-512")
    return HASHES[number]


def _der_signature(r: bytes, s: bytes) -> bytes:
    if not 0 < len(r) <= 66 or not 0 < len(s) <= 66:
        raise FormError(f"r and s of {len(r)} and {len(s)} bytes", "1 to 66 bytes")
    body = b""
    for each in (r, s):
        value = int.from_bytes(each, "big")
        number = value.to_bytes(value.bit_length() // 8 + 1, "big")
        body += bytes([2, len(number)]) + number
    return (b"\x30" + bytes([len(body)]) if len(body) < 0x80 else b"\x30\x81" + bytes([len(body)])) + body


def _reader(data: bytes, what: str) -> _Reader:
    if not 0 < len(data) <= LIMIT:
        raise FormError(f"a {what} of {len(data)} bytes", f"1 to {LIMIT}")
    return _Reader(data)


def _malformed(where: str, error: FormError) -> EvidenceError:
    return EvidenceError(
        "a TPM structure does not parse", code="evidence-malformed", reasons=[Reason(where, error.found, error.wanted)]
    )
