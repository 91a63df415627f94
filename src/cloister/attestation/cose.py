"""CBOR as vendors write it, and COSE_Sign1 over it (RFC 8949; RFC 9052, section 4.2). Bytes <-> frozen types, one signature.

`crypto.canonical` reads our own messages, where one value has one encoding. A vendor's tokens are signed as the bytes that
they are, in whatever order the vendor chose, so this reader does not ask for the canonical form. What it asks for:

  1 size      the whole item, before anything is read
  2 form      definite lengths only; lengths that fit what is left, before anything is allocated; no floating point, no
              simple values but false, true and null; UTF-8 text
  3 depth     16 levels, counting tags, and a number of items
  4 keys      integers, text or bytes, none twice: two readers that keep different ones of two would see different claims
  5 end       nothing after the item

COSE_Sign1 is `[protected, unprotected, payload, signature]`, with CBOR tag 18 or without. The protected header is a map of
`alg` and, at most, content type and key id; `crit` and everything else is refused, because it could change what the
signature means. The unprotected header is not signed: nothing in it is believed, and `alg` or `crit` there is refused.

    signed bytes = CBOR ["Signature1", protected, external_aad, payload]              RFC 9052, section 4.4
    signature    = r || s, each as long as the curve's order, big-endian              RFC 9053, section 2.1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from cloister.attestation.form import FormError

__all__ = ["ALGORITHMS", "FormError", "Sign1", "Tagged", "dumps", "loads", "sign", "sign1", "verify"]

DEPTH: Final = 16
ITEMS: Final = 4096
"""Values in one item, map keys included; a real CCA token has about 120."""

SIGN1_TAG: Final = 18
"""CBOR tag of COSE_Sign1, RFC 9052, table 1."""

_ALG, _CRIT, _CONTENT_TYPE, _KID = 1, 2, 3, 4  # RFC 9052, section 3.1


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One ECDSA algorithm of COSE, with the one curve that it is used with here."""

    name: str
    curve: str
    hash: hashes.HashAlgorithm
    size: int
    """Bytes of r, and of s."""


ALGORITHMS: Final[Mapping[int, Algorithm]] = MappingProxyType(
    {
        -7: Algorithm("ES256", "secp256r1", hashes.SHA256(), 32),
        -35: Algorithm("ES384", "secp384r1", hashes.SHA384(), 48),
        -36: Algorithm("ES512", "secp521r1", hashes.SHA512(), 66),
    }
)
"""RFC 9053, table 1. A key on another curve than the algorithm's is refused: the pair is part of what the verifier knows."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """A CBOR item with a tag."""

    tag: int
    value: Any


@dataclass(frozen=True, slots=True)
class Sign1:
    """One COSE_Sign1 message, taken apart; nothing is checked but its form."""

    protected: bytes
    """As signed."""
    algorithm: int
    payload: bytes
    signature: bytes
    unprotected: Mapping[Any, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Not signed, so never believed."""

    def signed(self) -> bytes:
        """Return what the key signs, with empty external data."""
        return dumps(["Signature1", self.protected, b"", self.payload])


# --- CBOR -------------------------------------------------------------------------------------------------------------


def loads(data: bytes, *, limit: int, items: int = ITEMS) -> Any:
    """Return the one value in `data`: None, bool, int, str, bytes, list, dict or `Tagged`.

    Raises:
        FormError: another form, see the module's rules.
    """
    # (1)
    if not 0 < len(data) <= limit:
        raise FormError(f"{len(data)} bytes", f"1 to {limit} bytes of CBOR")
    reader = _Reader(data, items)
    value = reader.value(DEPTH)
    # (5)
    if reader.at != len(data):
        raise FormError(f"{len(data) - reader.at} bytes after the end", "none")
    return value


class _Reader:
    __slots__ = ("at", "data", "left")

    def __init__(self, data: bytes, items: int) -> None:
        self.data = data
        self.at = 0
        self.left = items

    def value(self, depth: int) -> Any:
        # (3)
        self.left -= 1
        if depth == 0 or self.left < 0:
            raise FormError("CBOR that is deeper or longer than any token", f"{DEPTH} levels and {ITEMS} items")
        first = self.take(1)[0]
        major, info = first >> 5, first & 31
        # (2)
        if major == 7:
            if info not in (20, 21, 22):
                raise FormError(f"CBOR type 7, value {info}", "false, true or null")
            return {20: False, 21: True, 22: None}[info]
        number = self.argument(info)
        if major == 0:
            return number
        if major == 1:
            return -1 - number
        if major == 2:
            return self.take(number)
        if major == 3:
            try:
                return self.take(number).decode()
            except UnicodeDecodeError as error:
                raise FormError("text that is not UTF-8", "UTF-8") from error
        if major == 6:
            return Tagged(number, self.value(depth - 1))
        # every entry of an array needs a byte, every entry of a map two
        least = number if major == 4 else 2 * number
        if least > len(self.data) - self.at:
            raise FormError(f"{number} entries in {len(self.data) - self.at} bytes", "entries that are there")
        if major == 4:
            return [self.value(depth - 1) for _ in range(number)]
        found: dict[Any, Any] = {}
        for _ in range(number):
            key = self.value(depth - 1)
            # (4) True would be the same key as 1
            if isinstance(key, bool) or not isinstance(key, (int, str, bytes)):
                raise FormError(f"a map key of type {type(key).__name__}", "an integer, text or bytes")
            if key in found:
                raise FormError(f"map key {key!r} twice"[:80], "each key once")
            found[key] = self.value(depth - 1)
        return found

    def argument(self, info: int) -> int:
        if info < 24:
            return info
        if info > 27:
            raise FormError("an indefinite or reserved length", "a definite length")
        return int.from_bytes(self.take(1 << (info - 24)), "big")

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise FormError(f"{len(self.data) - self.at} bytes left", f"{size} bytes")
        self.at += size
        return self.data[self.at - size : self.at]


def dumps(value: Any) -> bytes:
    """Return the CBOR encoding of `value`: shortest lengths, maps in their own order.

    Raises:
        TypeError: a value that `loads` never returns.
    """
    if value is None:
        return b"\xf6"
    if isinstance(value, bool):
        return b"\xf5" if value else b"\xf4"
    if isinstance(value, int):
        return _head(0, value) if value >= 0 else _head(1, -1 - value)
    if isinstance(value, bytes):
        return _head(2, len(value)) + value
    if isinstance(value, str):
        text = value.encode()
        return _head(3, len(text)) + text
    if isinstance(value, Tagged):
        return _head(6, value.tag) + dumps(value.value)
    if isinstance(value, Mapping):
        return _head(5, len(value)) + b"".join(dumps(key) + dumps(each) for key, each in value.items())
    if isinstance(value, Sequence):
        return _head(4, len(value)) + b"".join(dumps(each) for each in value)
    raise TypeError(f"no CBOR for {type(value).__name__}")


def _head(major: int, number: int) -> bytes:
    if number < 24:
        return bytes([major << 5 | number])
    for info, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if number < 1 << (8 * size):
            return bytes([major << 5 | info]) + number.to_bytes(size, "big")
    raise TypeError("no CBOR for integers beyond 64 bits")


# --- COSE_Sign1 -------------------------------------------------------------------------------------------------------


def sign1(data: bytes, *, limit: int) -> Sign1:
    """Return the COSE_Sign1 message that is exactly `data`, tagged or not.

    Raises:
        FormError: another form, an algorithm that is not in `ALGORITHMS`, or a signature of another size.
    """
    value = loads(data, limit=limit)
    if isinstance(value, Tagged):
        if value.tag != SIGN1_TAG:
            raise FormError(f"CBOR tag {value.tag}", f"{SIGN1_TAG}, COSE_Sign1")
        value = value.value
    match value:
        case [bytes(protected), dict(unprotected), bytes(payload), bytes(signature)]:
            pass
        case _:
            raise FormError("another shape", "COSE_Sign1 [protected, unprotected, payload, signature]")
    header = loads(protected, limit=256)
    if not isinstance(header, dict) or not {_ALG} <= header.keys() <= {_ALG, _CONTENT_TYPE, _KID}:
        raise FormError("a protected header of another shape", "alg, and at most content type and key id")
    algorithm = header[_ALG]
    if isinstance(algorithm, bool) or not isinstance(algorithm, int) or algorithm not in ALGORITHMS:
        raise FormError(
            f"algorithm {algorithm!r}"[:80], " or ".join(f"{each} ({ALGORITHMS[each].name})" for each in ALGORITHMS)
        )
    if {_ALG, _CRIT} & unprotected.keys():
        raise FormError("alg or crit in the unprotected header", "both protected or absent")
    if not payload:
        raise FormError("no payload", "a payload")
    if len(signature) != 2 * ALGORITHMS[algorithm].size:
        raise FormError(f"a signature of {len(signature)} bytes", f"{2 * ALGORITHMS[algorithm].size}")
    return Sign1(protected, algorithm, payload, signature, MappingProxyType(unprotected))


def verify(message: Sign1, key: object) -> bool:
    """Return whether `key` signed `message`; an answer, never an exception, for keys of every type."""
    algorithm = ALGORITHMS[message.algorithm]
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != algorithm.curve:
        return False
    r = int.from_bytes(message.signature[: algorithm.size], "big")
    s = int.from_bytes(message.signature[algorithm.size :], "big")
    try:
        key.verify(encode_dss_signature(r, s), message.signed(), ec.ECDSA(algorithm.hash))
    except InvalidSignature:
        return False
    return True


def sign(
    key: ec.EllipticCurvePrivateKey,
    payload: bytes,
    *,
    algorithm: int,
    tagged: bool = True,
    unprotected: Mapping[Any, Any] = MappingProxyType({}),
) -> bytes:
    """Return a COSE_Sign1 message, with a deterministic signature (RFC 6979). For soft TEEs: evidence never needs it.

    Raises:
        KeyError: an algorithm that is not in `ALGORITHMS`.
    """
    known = ALGORITHMS[algorithm]
    protected = dumps({_ALG: algorithm})
    message = Sign1(protected, algorithm, payload, b"")
    # a soft TEE may sign with a key of another curve than the algorithm's: the fault that `verify` must see
    size = max(known.size, (key.curve.key_size + 7) // 8)
    r, s = decode_dss_signature(key.sign(message.signed(), ec.ECDSA(known.hash, deterministic_signing=True)))
    signature = r.to_bytes(size, "big") + s.to_bytes(size, "big")
    value: Any = [protected, dict(unprotected), payload, signature]
    return dumps(Tagged(SIGN1_TAG, value) if tagged else value)
