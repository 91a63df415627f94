"""SSHSIG: check a signature that `ssh-keygen -Y sign` (or an agent, or a security key) made. Pure, no files.

Source: OpenSSH PROTOCOL.sshsig, PROTOCOL.u2f, RFC 4251 section 5 (string, mpint), RFC 8332 (rsa-sha2-*).

Steps, in this order; an error names the step that refused:
  1 armour     BEGIN and END lines, base64 without other characters, at most 64 KiB
  2 envelope   magic, version 1, public key, namespace, empty reserved field, hash, signature; nothing after it
  3 namespace  the one that the caller wants: a signature for one purpose is none for another
  4 key        ssh-ed25519, ecdsa-sha2-nistp256/384/521, ssh-rsa of 3072 to 16384 bits, and the two security key types
  5 signature  its algorithm fits the key; ssh-rsa signatures (SHA-1) are refused
  6 touch      a security key says that somebody touched it, and verified the user where the caller wants that
  7 verify     over `SSHSIG` || namespace || reserved || hash || H(message)
Whose key it is, is the caller's question: compare `SshKey.fingerprint` with the contract (`signer`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cloister.contract.model import Contract
from cloister.errors import InputError, Reason

CONTRACT: Final = "contract@cloister"
"""Namespace of a signature over the bytes of a contract."""
KEY: Final = "key@cloister"
"""Namespace of an owner's request about keys."""
ASK: Final = "ask@cloister"
"""Namespace of a consumer's query."""
OPEN: Final = "open@cloister"
"""Namespace of an owner's request to open an output."""
LISTEN: Final = "listen@cloister"
"""A party's request for the metrics and logs that a contract lets leave to it."""
NAMESPACES: Final = (CONTRACT, KEY, ASK, OPEN, LISTEN)

MAX_ARMOURED: Final = 64 * 1024
MIN_RSA_BITS: Final = 3072
MAX_RSA_BITS: Final = 16384
TOUCHED: Final = 0x01
"""PROTOCOL.u2f: user presence."""
USER_VERIFIED: Final = 0x04
"""PROTOCOL.u2f: PIN or fingerprint."""

_MAGIC: Final = b"SSHSIG"
_BEGIN: Final = "-----BEGIN SSH SIGNATURE-----"
_END: Final = "-----END SSH SIGNATURE-----"
_ARMOUR: Final = re.compile(rf"{_BEGIN}\r?\n([A-Za-z0-9+/=\r\n]+)\r?\n{_END}\s*", re.ASCII)
_HASHES: Final[dict[str, Callable[[bytes], bytes]]] = {
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "sha512": lambda data: hashlib.sha512(data).digest(),
}
_CURVES: Final[dict[str, tuple[ec.EllipticCurve, hashes.HashAlgorithm]]] = {
    # RFC 5656 section 6.2.1: the hash follows from the size of the curve
    "nistp256": (ec.SECP256R1(), hashes.SHA256()),
    "nistp384": (ec.SECP384R1(), hashes.SHA384()),
    "nistp521": (ec.SECP521R1(), hashes.SHA512()),
}
_SK_ED25519: Final = "sk-ssh-ed25519@openssh.com"
_SK_ECDSA: Final = "sk-ecdsa-sha2-nistp256@openssh.com"


class _RefusedError(Exception):
    """Where a step refused, what it found and what it wants; becomes an `InputError` at the border."""

    def __init__(self, step: str, found: str, wanted: str, hint: str = "") -> None:
        super().__init__(step)
        self.reason = Reason(f"signature.{step}", found, wanted, hint)


@dataclass(frozen=True, slots=True)
class SshKey:
    """An SSH public key. Two keys are equal when their wire encodings are."""

    blob: bytes
    """Wire encoding, RFC 4253 section 6.6."""

    @property
    def type(self) -> str:
        return _Reader(self.blob, "key").text()

    @property
    def fingerprint(self) -> str:
        """`SHA256:` and 43 letters, as `ssh-keygen -l` prints it and contracts name parties."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")

    @property
    def public_line(self) -> str:
        """`<type> <base64>`, as in `authorized_keys`."""
        return f"{self.type} {base64.b64encode(self.blob).decode()}"


class _Reader:
    """RFC 4251 section 5 fields, front to back; every length is checked before it is used."""

    def __init__(self, data: bytes, step: str) -> None:
        self._data, self._at, self._step = data, 0, step

    def take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        if len(piece) != size:
            raise _RefusedError(self._step, "an end in the middle of a field", "a complete structure")
        self._at += size
        return piece

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        return int.from_bytes(self.take(4))

    def string(self) -> bytes:
        return self.take(self.number())

    def text(self) -> str:
        value = self.string()
        if not value.isascii():
            raise _RefusedError(self._step, "other bytes", "ASCII text")
        return value.decode("ascii")

    def mpint(self) -> int:
        value = self.string()
        if not value or value[0] & 0x80 or (value[0] == 0 and (len(value) == 1 or not value[1] & 0x80)):
            raise _RefusedError(self._step, "a number that is zero, negative or padded", "a positive mpint")
        return int.from_bytes(value)

    def end(self) -> None:
        if self._at != len(self._data):
            raise _RefusedError(
                self._step, f"{len(self._data) - self._at} bytes too many", "nothing after the last field"
            )


def signed_bytes(message: bytes, *, namespace: str, hash_name: str = "sha512") -> bytes:
    """Return the bytes that a key signs for `message` (PROTOCOL.sshsig section 3)."""
    digest = _HASHES[hash_name](message)
    return _MAGIC + b"".join(string(part) for part in (namespace.encode(), b"", hash_name.encode(), digest))


def string(value: bytes) -> bytes:
    """RFC 4251: length as u32 big-endian, then the bytes."""
    return len(value).to_bytes(4) + value


def mpint(value: int) -> bytes:
    """RFC 4251: a positive integer, minimal, with a zero byte in front of a set top bit."""
    return string(value.to_bytes(value.bit_length() // 8 + 1))


def armour(public_key: bytes, signature: bytes, *, namespace: str, hash_name: str = "sha512") -> str:
    """Return the armoured SSHSIG of a raw `signature` field (PROTOCOL.sshsig section 2, 70 columns)."""
    fields = (public_key, namespace.encode(), b"", hash_name.encode(), signature)
    blob = _MAGIC + (1).to_bytes(4) + b"".join(string(part) for part in fields)
    text = base64.b64encode(blob).decode()
    lines = [text[at : at + 70] for at in range(0, len(text), 70)]
    return "\n".join((_BEGIN, *lines, _END, ""))


def verify(
    signature_armored: bytes | str, message: bytes, *, namespace: str, require_user_verified: bool = False
) -> SshKey:
    """Return the key that signed `message` under `namespace`.

    `require_user_verified` accepts only security keys that checked a PIN or a fingerprint.

    Raises:
        InputError: code `signature-invalid`; its reason names the step.
    """
    try:
        return _verify(signature_armored, message, namespace, require_user_verified)
    except _RefusedError as refused:
        raise InputError(
            "the signature does not hold", code="signature-invalid", reasons=(refused.reason,), hint=refused.reason.hint
        ) from None


def signer(contract: Contract, data: bytes, signature_armored: bytes | str) -> str:
    """Return the party whose key signed the contract bytes `data`.

    Raises:
        InputError: code `signature-invalid`: broken, over other bytes, or by a key that the contract does not name.
        ValueError: `data` is not the file of `contract`.
    """
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != contract.id:
        raise ValueError("these are not the bytes of this contract")
    key = verify(signature_armored, data, namespace=CONTRACT)
    for party, fingerprint in contract.party.items():
        if fingerprint == key.fingerprint:
            return party
    named = ", ".join(f"{party} {fingerprint}" for party, fingerprint in contract.party.items())
    reason = Reason("signature.party", key.fingerprint, f"the key of a party: {named}")
    raise InputError("the signature is by nobody of this contract", code="signature-invalid", reasons=(reason,))


def public_key(line: str) -> SshKey:
    """Return the key of an OpenSSH public key line `<type> <base64> [comment]`.

    Raises:
        InputError: code `signature-invalid`: not such a line, or a key type that is not accepted.
    """
    try:
        words = line.split()
        if len(words) < 2:
            raise _RefusedError("key", "no public key", "`<type> <base64> [comment]`")
        blob = _base64(words[1], "key")
        if _parse_key(blob).type != words[0]:
            raise _RefusedError(
                "key", f"a key of another type than {words[0][:60]!a}", "the type that the line begins with"
            )
        return SshKey(blob)
    except _RefusedError as refused:
        raise InputError("not an SSH public key", code="signature-invalid", reasons=(refused.reason,)) from None


def _verify(armoured: bytes | str, message: bytes, namespace: str, require_user_verified: bool) -> SshKey:
    # (1)
    if len(armoured) > MAX_ARMOURED:
        raise _RefusedError("armour", f"{len(armoured)} bytes", f"at most {MAX_ARMOURED}")
    text = armoured if isinstance(armoured, str) else armoured.decode("latin-1")
    match = _ARMOUR.fullmatch(text)
    if match is None:
        raise _RefusedError("armour", "something else", f"{_BEGIN}, base64, {_END}")
    blob = _base64("".join(match[1].split()), "armour")

    # (2)
    reader = _Reader(blob, "envelope")
    if reader.take(len(_MAGIC)) != _MAGIC:
        raise _RefusedError("envelope", "another magic", "SSHSIG")
    version = reader.number()
    if version != 1:
        raise _RefusedError("envelope", f"version {version}", "version 1")
    key_blob, found_namespace, reserved = reader.string(), reader.string(), reader.string()
    hash_name, signature = reader.text(), reader.string()
    reader.end()
    if reserved:
        raise _RefusedError("envelope", f"{len(reserved)} reserved bytes", "none")
    if hash_name not in _HASHES:
        raise _RefusedError("envelope", f"hash {hash_name[:40]!a}", "sha256 or sha512")

    # (3)
    if found_namespace != namespace.encode():
        found = ascii(found_namespace[:60].decode("latin-1"))
        raise _RefusedError("namespace", found, repr(namespace), f"sign with `ssh-keygen -Y sign -n {namespace}`")

    # (4) to (7)
    key = _parse_key(key_blob)
    key.check(signature, signed_bytes(message, namespace=namespace, hash_name=hash_name), require_user_verified)
    return SshKey(key_blob)


def _base64(text: str, step: str) -> bytes:
    try:
        value = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _RefusedError(step, "characters that are no base64", "base64") from None
    if base64.b64encode(value).decode() != text:
        raise _RefusedError(step, "a second encoding of the same bytes", "canonical base64")
    return value


@dataclass(frozen=True, slots=True)
class _Key:
    """A parsed public key: its type, the signature algorithms that fit, and the raw check."""

    type: str
    algorithms: tuple[str, ...]
    raw_check: Callable[[str, bytes, bytes], None]
    """(algorithm, raw signature, signed bytes) -> None, or InvalidSignature."""
    application: bytes | None = None
    """Set for security keys: what the token was enrolled for."""

    def check(self, signature: bytes, signed: bytes, require_user_verified: bool) -> None:
        # (5)
        reader = _Reader(signature, "signature")
        algorithm, raw = reader.text(), reader.string()
        if algorithm not in self.algorithms:
            raise _RefusedError("signature", f"algorithm {algorithm[:60]!a}", " or ".join(self.algorithms))
        # (6)
        if self.application is not None:
            flags, counter = reader.byte(), reader.take(4)
            if not flags & TOUCHED:
                raise _RefusedError(
                    "touch", "a security key that nobody touched", "a touch", "sign again and touch the key"
                )
            if require_user_verified and not flags & USER_VERIFIED:
                raise _RefusedError(
                    "touch", "a touch only", "PIN or fingerprint", "sign with a key made `-O verify-required`"
                )
            # PROTOCOL.u2f: what the token signs
            signed = (
                hashlib.sha256(self.application).digest() + bytes([flags]) + counter + hashlib.sha256(signed).digest()
            )
        elif require_user_verified:
            raise _RefusedError("touch", f"a key of type {self.type}", "a security key with PIN or fingerprint")
        reader.end()
        # (7)
        try:
            self.raw_check(algorithm, raw, signed)
        except InvalidSignature:
            raise _RefusedError("verify", "a signature over other bytes", "a signature over these bytes") from None


def _parse_key(blob: bytes) -> _Key:
    # (4)
    reader = _Reader(blob, "key")
    kind = reader.text()
    try:
        match kind:
            case "ssh-ed25519":
                key = _Key(kind, (kind,), _ed25519(reader.string()))
            case "ssh-rsa":
                key = _Key(
                    kind, ("rsa-sha2-512", "rsa-sha2-256"), _rsa(exponent=reader.mpint(), modulus=reader.mpint())
                )
            case "ecdsa-sha2-nistp256" | "ecdsa-sha2-nistp384" | "ecdsa-sha2-nistp521":
                curve = _curve(reader, kind.removeprefix("ecdsa-sha2-"))
                key = _Key(kind, (kind,), _ecdsa(curve, reader.string()))
            case "sk-ssh-ed25519@openssh.com":
                check = _ed25519(reader.string())
                key = _Key(kind, (kind,), check, application=reader.string())
            case "sk-ecdsa-sha2-nistp256@openssh.com":
                check = _ecdsa(_curve(reader, "nistp256"), reader.string())
                key = _Key(kind, (kind,), check, application=reader.string())
            case _:
                accepted = f"ssh-ed25519, ecdsa-sha2-nistp256/384/521, ssh-rsa, {_SK_ED25519} or {_SK_ECDSA}"
                raise _RefusedError("key", f"type {kind[:60]!a}", accepted)
    except (ValueError, UnsupportedAlgorithm):
        raise _RefusedError("key", "numbers that are no public key", f"a key of type {kind}") from None
    reader.end()
    return key


def _curve(reader: _Reader, wanted: str) -> str:
    curve = reader.text()
    if curve != wanted:
        raise _RefusedError("key", f"curve {curve[:20]!a}", wanted)
    return curve


def _ed25519(point: bytes) -> Callable[[str, bytes, bytes], None]:
    key = Ed25519PublicKey.from_public_bytes(point)
    return lambda _algorithm, raw, signed: key.verify(raw, signed)


def _ecdsa(curve_name: str, point: bytes) -> Callable[[str, bytes, bytes], None]:
    curve, digest = _CURVES[curve_name]
    if point[:1] != b"\x04":  # RFC 5656 section 3.1: compression is optional, and OpenSSH refuses it
        raise ValueError("compressed point")
    key = ec.EllipticCurvePublicKey.from_encoded_point(curve, point)

    def check(_algorithm: str, raw: bytes, signed: bytes) -> None:
        reader = _Reader(raw, "signature")
        r, s = reader.mpint(), reader.mpint()
        reader.end()
        key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(digest))

    return check


def _rsa(*, exponent: int, modulus: int) -> Callable[[str, bytes, bytes], None]:
    bits = modulus.bit_length()
    if not MIN_RSA_BITS <= bits <= MAX_RSA_BITS:
        raise _RefusedError("key", f"RSA of {bits} bits", f"{MIN_RSA_BITS} to {MAX_RSA_BITS} bits")
    # a large exponent makes one check take minutes; every tool writes 65537
    if exponent.bit_length() > 32:
        raise _RefusedError("key", f"an RSA exponent of {exponent.bit_length()} bits", "at most 32 bits")
    key = RSAPublicNumbers(exponent, modulus).public_key()
    digests: dict[str, hashes.HashAlgorithm] = {"rsa-sha2-256": hashes.SHA256(), "rsa-sha2-512": hashes.SHA512()}
    return lambda algorithm, raw, signed: key.verify(raw, signed, padding.PKCS1v15(), digests[algorithm])
