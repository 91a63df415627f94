"""Enrolment: the relying party makes sure, once, that an attestation key (AK) lives in a TPM that it believes.

A TPM's identity is its endorsement key (EK), which only decrypts. So the proof has two halves:

    host                                             relying party
    EK certificate, EK public, AK public      ->     check_ek: the chain, or a pinned EK; the EK's attributes
                                                     check_ak: the AK's attributes
                                              <-     make_credential: a secret that only the TPM with this EK opens,
                                                     and only if the AK of this name is loaded in it
    TPM2_ActivateCredential: the secret       ->     check_activation; encode the note

The note is the relying party's own `Endorsement("tpm", "ak/<name of the AK, hex>")`: canonical CBOR, written by `encode`.
Nobody may hand one in with evidence. A host whose AK has a certificate of its own (clouds) needs no enrolment.

Source: TCG TPM 2.0 Library 1.59 part 1, sections 24 (credential protection), 11.4.10 (KDFa, KDFe), B.10.4 and C.6.4 (secret
sharing); TCG EK Credential Profile 2.4. Pure: what must be random is an argument.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, Literal, get_args

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES

from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.pki.certificate import Certificate
from cloister.attestation.roots import Roots
from cloister.attestation.tpm import chain as chains
from cloister.attestation.tpm.format import (
    DECRYPT,
    FIXED_PARENT,
    FIXED_TPM,
    HASH_SIZES,
    RESTRICTED,
    SENSITIVE_DATA_ORIGIN,
    SIGN,
    Public,
)
from cloister.crypto.canonical import cbor_decode, cbor_encode
from cloister.errors import EvidenceError, Reason

__all__ = [
    "RANDOMNESS",
    "Endorser",
    "Note",
    "check_activation",
    "check_ak",
    "check_ek",
    "decode",
    "ek_id",
    "encode",
    "endorsement",
    "make_credential",
]

How = Literal["ek-certificate", "ek-pinned"]
HOWS: Final = frozenset(get_args(How))

RANDOMNESS: Final = 128
"""Bytes that `make_credential` needs; used once and kept secret until the answer came."""
SECRET_LIMIT: Final = 32
NOTE_LIMIT: Final = 1024
_AES: Final = 0x0006
_CFB: Final = 0x0043

AK_SET: Final = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | RESTRICTED | SIGN
EK_SET: Final = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | RESTRICTED | DECRYPT
_WORDS: Final[Mapping[int, str]] = {
    FIXED_TPM: "fixedTPM",
    FIXED_PARENT: "fixedParent",
    SENSITIVE_DATA_ORIGIN: "sensitiveDataOrigin",
    RESTRICTED: "restricted",
    SIGN: "sign",
    DECRYPT: "decrypt",
}


@dataclass(frozen=True, slots=True)
class Endorser:
    """Whose EK it is: what `check_ek` found."""

    tee: str
    """`tpm` or `soft-tpm`."""
    ek: str
    """`ek_id` of the key."""
    how: How
    certificate: str = ""
    """SHA-256 (hex) of the EK certificate."""
    root: str = ""
    """SHA-256 (hex) of the certificate that ended its chain."""
    until: datetime | None = None
    names: Mapping[str, str] | None = None
    """`manufacturer`, `model`, `version` of the TPM, from the certificate."""
    chain: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Note:
    """What the relying party noted about one AK when it enrolled it.

    Raises:
        ValueError: a field that is not of the stated form.
    """

    ak: bytes
    """Name of the AK: u16 hash, digest."""
    ek: str
    """SHA-256 (hex) of the EK's SubjectPublicKeyInfo."""
    how: How
    when: datetime
    root: str = ""
    """SHA-256 (hex) of the root of the EK certificate; empty with `ek-pinned`."""
    certificate: str = ""
    """SHA-256 (hex) of the EK certificate; empty with `ek-pinned`."""
    until: datetime | None = None
    """When the enrolment ends, such as with the EK certificate; None: never."""

    def __post_init__(self) -> None:
        if len(self.ak) < 4 or self.how not in HOWS or not _is_hex(self.ek):
            raise ValueError(
                "a note needs the name of an AK, the digest of an EK, and how they were found to belong together"
            )
        certified = self.how == "ek-certificate"
        if certified != bool(self.root) or certified != bool(self.certificate):
            raise ValueError("an EK certificate and its root belong to `ek-certificate`, and only there")
        if any(each and not _is_hex(each) for each in (self.root, self.certificate)):
            raise ValueError("a digest is 64 hex digits")
        if self.when.tzinfo is None or (self.until is not None and self.until.tzinfo is None):
            raise ValueError("a time of a note has no time zone")


def ek_id(ek: Public) -> str:
    """Return SHA-256 (hex) of the EK's DER SubjectPublicKeyInfo: what is pinned, and `Claims.platform["ek"]`."""
    return hashlib.sha256(ek.spki).hexdigest()


def check_ek(
    ek: Public,
    certificate: bytes,
    endorsements: Endorsements,
    roots: Roots,
    *,
    now: datetime,
    pinned: frozenset[str] = frozenset(),
    where: str = "tpm.enrol-ek",
) -> Endorser:
    """Prove whose EK this is.

    Args:
        certificate: the EK certificate and perhaps its authorities, DER one after the other; empty where the TPM has none.
        pinned: `ek_id` of keys that the relying party knows by other means; they need no certificate.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`; `Reason.where` is `<where>.<fault>`.
    """
    _attributes(ek, EK_SET, SIGN, f"{where}.key")
    if (
        ek.symmetric is None
        or ek.symmetric[0] != _AES
        or ek.symmetric[2] != _CFB
        or ek.symmetric[1] not in (128, 192, 256)
    ):
        raise _refused(f"{where}.key", "an EK without AES-CFB", "a storage key of the EK templates")
    own = ek_id(ek)
    if not certificate:
        if own in pinned:
            return Endorser("tpm", own, "ek-pinned")
        raise _refused(
            f"{where}.identity",
            f"EK {own} without a certificate",
            "an EK certificate, or a pinned EK",
            "pin the EK if you know it",
        )
    chain = chains.split(certificate, where=f"{where}.format")
    leaf = chain[0]
    if leaf.spki != ek.spki:
        raise _refused(f"{where}.key", "a certificate of another key", "the EK's certificate")
    names = _ek_certificate(leaf, where)
    identity = chains.check(chain, endorsements, roots, now=now, chain_at=f"{where}.chain", root_at=f"{where}.root")
    return Endorser(
        identity.tee,
        own,
        "ek-certificate",
        hashlib.sha256(leaf.der).hexdigest(),
        identity.root,
        identity.until,
        names,
        identity.chain,
    )


def check_ak(ak: Public, *, where: str) -> None:
    """Refuse a key that could sign a quote which no TPM made, or whose private half may leave its TPM.

    Raises:
        EvidenceError: `evidence-not-authentic`: not restricted, fixedTPM, fixedParent, sensitiveDataOrigin and sign, or decrypt.
    """
    _attributes(ak, AK_SET, DECRYPT, where)


def make_credential(ek: Public, ak_name: bytes, secret: bytes, *, randomness: bytes) -> tuple[bytes, bytes]:
    """Return (contents of TPM2B_ID_OBJECT, contents of TPM2B_ENCRYPTED_SECRET) for TPM2_ActivateCredential.

    Only the TPM that has `ek` gets `secret` out, and only while an object named `ak_name` is loaded.

    Args:
        secret: 16 to 32 random bytes, fresh for each enrolment.
        randomness: `RANDOMNESS` random bytes, fresh for each call.

    Raises:
        ValueError: a size, or a key that is no RSA-2048 or larger, P-256 or P-384 storage key.
    """
    if not 16 <= len(secret) <= SECRET_LIMIT or len(randomness) != RANDOMNESS:
        raise ValueError(f"16 to {SECRET_LIMIT} bytes of secret and {RANDOMNESS} of randomness")
    if ek.symmetric is None or ek.symmetric[0] != _AES or ek.symmetric[2] != _CFB:
        raise ValueError("an EK without AES-CFB")
    if ek.name_algorithm == "sha1":
        raise ValueError("an EK whose name is a SHA-1")
    algorithm, size = ek.name_algorithm, HASH_SIZES[ek.name_algorithm]
    if isinstance(ek.key, rsa.RSAPublicKey):
        seed = randomness[:size]
        encrypted = _oaep(ek.key, algorithm, seed, randomness[size : 2 * size])
    else:
        seed, encrypted = _ecdh(ek.key, algorithm, randomness)
    key = _kdfa(algorithm, seed, b"STORAGE", ak_name, ek.symmetric[1])
    cipher = Cipher(AES(key), CFB(bytes(16))).encryptor()
    identity = cipher.update(struct.pack(">H", len(secret)) + secret) + cipher.finalize()
    mac = hmac.new(_kdfa(algorithm, seed, b"INTEGRITY", b"", size * 8), identity + ak_name, algorithm).digest()
    return struct.pack(">H", size) + mac + identity, encrypted


def check_activation(secret: bytes, answer: bytes, *, where: str = "tpm.enrol-activation") -> None:
    """Compare what the host got out of the credential with `secret`.

    Raises:
        EvidenceError: `evidence-not-authentic`.
    """
    if not hmac.compare_digest(secret, answer):
        raise _refused(
            where, "another secret", "the one in the credential", "the AK is not in the TPM that has this EK"
        )


def encode(note: Note) -> bytes:
    """Return the canonical CBOR of `note`."""
    value: dict[str, Any] = {
        "ak": note.ak,
        "ek": note.ek,
        "how": note.how,
        "when": int(note.when.timestamp()),
        "root": note.root,
        "certificate": note.certificate,
        "until": None if note.until is None else int(note.until.timestamp()),
    }
    return cbor_encode(value)


@lru_cache(maxsize=1024)
def decode(data: bytes, *, where: str) -> Note:
    """Return the note in `data`.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    try:
        value: Any = cbor_decode(data, limit=NOTE_LIMIT)
        match value:
            case {
                "ak": bytes(ak),
                "ek": str(ek),
                "how": "ek-certificate" | "ek-pinned" as how,
                "when": int(when),
                "root": str(root),
                "certificate": str(certificate),
                "until": None | int() as until,
                **rest,
            } if not rest and not isinstance(when, bool) and not isinstance(until, bool):
                return Note(ak, ek, how, _time(when), root, certificate, None if until is None else _time(until))
            case _:
                raise ValueError("another shape")
    except (ValueError, OverflowError, OSError) as error:
        raise EvidenceError(
            "an enrolment note does not parse",
            code="evidence-malformed",
            reasons=[Reason(where, str(error)[:200], "canonical CBOR as `encode` writes it")],
        ) from error


def endorsement(note: Note) -> Endorsement:
    """Return `note` as the relying party keeps it."""
    return Endorsement(chains.KIND, f"ak/{note.ak.hex()}", encode(note))


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _is_hex(text: str) -> bool:
    return len(text) == 64 and all(each in "0123456789abcdef" for each in text)


def _attributes(key: Public, wanted: int, unwanted: int, where: str) -> None:
    missing = [word for bit, word in _WORDS.items() if wanted & bit and not key.attributes & bit]
    extra = [word for bit, word in _WORDS.items() if unwanted & bit and key.attributes & bit]
    if missing or extra:
        found = ", ".join([f"not {word}" for word in missing] + extra)
        text = ", ".join(word for bit, word in _WORDS.items() if wanted & bit)
        raise _refused(
            where, f"a key that is {found}", text, "another key could sign what no TPM says, or leave its TPM"
        )


def _ek_certificate(leaf: Certificate, where: str) -> Mapping[str, str]:
    if chains.EK_USAGE not in chains.usages(leaf):
        found = ", ".join(sorted(chains.usages(leaf))) or "no extended key usage"
        raise _refused(f"{where}.certificate", found, f"{chains.EK_USAGE}, an EK certificate")
    if leaf.authority:
        raise _refused(f"{where}.certificate", "a certificate of an authority", "a certificate of a TPM")
    names = chains.tpm_names(leaf)
    missing = [name for name in ("manufacturer", "model", "version") if name not in names]
    if missing:
        raise _refused(f"{where}.certificate", f"no {', '.join(missing)} in subjectAltName", "the names of a TPM")
    return names


def _kdfa(algorithm: str, key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    # part 1, 11.4.10.2; one or two rounds are enough for every key here
    out = b""
    counter = 1
    while len(out) * 8 < bits:
        message = struct.pack(">I", counter) + label + b"\x00" + context + struct.pack(">I", bits)
        out += hmac.new(key, message, algorithm).digest()
        counter += 1
    return out[: bits // 8]


def _oaep(key: rsa.RSAPublicKey, algorithm: str, message: bytes, seed: bytes) -> bytes:
    """Return RSAES-OAEP of `message` (RFC 8017, 7.1.1) with the given seed; the library's own takes none."""
    numbers = key.public_numbers()
    size, width = key.key_size // 8, HASH_SIZES[algorithm]
    if key.key_size < 2048:
        raise ValueError(f"an RSA key of {key.key_size} bits")
    label = hashlib.new(algorithm, b"IDENTITY\x00").digest()
    block = label + bytes(size - len(message) - 2 * width - 2) + b"\x01" + message
    masked = _xor(block, _mgf1(algorithm, seed, len(block)))
    header = _xor(seed, _mgf1(algorithm, masked, width))
    return pow(int.from_bytes(b"\x00" + header + masked, "big"), numbers.e, numbers.n).to_bytes(size, "big")


def _mgf1(algorithm: str, seed: bytes, size: int) -> bytes:
    count = -(-size // HASH_SIZES[algorithm])
    return b"".join(hashlib.new(algorithm, seed + struct.pack(">I", each)).digest() for each in range(count))[:size]


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


_ORDERS: Final = {
    "secp256r1": 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    "secp384r1": 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973,
}
"""NIST SP 800-186, 3.2.1."""


def _ecdh(key: ec.EllipticCurvePublicKey, algorithm: str, randomness: bytes) -> tuple[bytes, bytes]:
    """Return (seed, TPMS_ECC_POINT of the ephemeral key): part 1, C.6.4 and 11.4.10.3 (KDFe)."""
    order = _ORDERS.get(key.curve.name)
    if order is None:
        raise ValueError(f"curve {key.curve.name}, wanted P-256 or P-384")
    # 1,024 bits over an order of at most 384: no bias that matters
    ephemeral = ec.derive_private_key(int.from_bytes(randomness, "big") % (order - 1) + 1, key.curve)
    shared = ephemeral.exchange(ec.ECDH(), key)
    size = (key.key_size + 7) // 8
    mine, theirs = ephemeral.public_key().public_numbers(), key.public_numbers()
    x, y = mine.x.to_bytes(size, "big"), mine.y.to_bytes(size, "big")
    message = struct.pack(">I", 1) + shared + b"IDENTITY\x00" + x + theirs.x.to_bytes(size, "big")
    seed = hashlib.new(algorithm, message).digest()
    return seed, b"".join(struct.pack(">H", size) + each for each in (x, y))


def _refused(where: str, found: str, wanted: str, hint: str = "") -> EvidenceError:
    return EvidenceError(
        "the TPM is not enrolled", code="evidence-not-authentic", reasons=[Reason(where, found, wanted, hint)]
    )
