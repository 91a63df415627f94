"""C2SP signed notes (c2sp.org/signed-note): text that anybody can read, signed by named Ed25519 keys.

    <text, ends with a newline>
    <empty line>
    — <key name> base64(key id (4) || signature)

    key id = SHA-256(key name || 0x0A || type || public key (32))[:4]

Two signature types exist here: 0x01, plain Ed25519 over the text, and 0x04, the timestamped cosignature of a witness
(c2sp.org/tlog-cosignature): its signature is `u64 big-endian time || Ed25519 (64)` over
`cosignature/v1\\ntime <time>\\n<text>`.

`open_note` in this order:
  1 form     UTF-8, no control characters, text and signatures parted by the last empty line, at most 64 KiB
  2 lines    every signature line parses; lines of unknown keys are ignored, as the specification demands
  3 verify   every line of a known key verifies; one that does not refuses the whole note
  4 enough   at least one known key signed
Which keys must have signed is for the caller to decide: `Note.signed_by` names them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cloister.crypto.keys import Secret

ED25519: Final = 0x01
"""Signature type byte: Ed25519 over the note text (signed-note, "Signature types")."""
COSIGNATURE: Final = 0x04
"""Signature type byte: timestamped witness cosignature (tlog-cosignature)."""

MAX_NOTE_BYTES: Final = 64 * 1024
MAX_SIGNATURES: Final = 64
"""The specification wants at least 16 accepted."""

_DASH: Final = "\u2014"


class NoteError(ValueError):
    """The note is malformed, or a signature by a known key does not verify."""


def check_name(name: str) -> str:
    """Return `name` if it can name a key: 1 to 255 printable characters, no space, no plus.

    Raises:
        ValueError: it cannot.
    """
    if not name or len(name) > 255 or not name.isprintable() or "+" in name or any(c.isspace() for c in name):
        raise ValueError(f"{name!r} cannot name a key: 1 to 255 printable characters without space and plus")
    return name


def decode_base64(text: str) -> bytes:
    """Return the bytes of standard, padded base64; any other spelling of the same bytes is a NoteError."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise NoteError("not base64") from error
    if base64.b64encode(data).decode() != text:
        raise NoteError("not the standard base64 spelling")
    return data


def _key_id(name: str, kind: int, public: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + public).digest()[:4]


def _signed_bytes(kind: int, text: str, time: int) -> bytes:
    return f"cosignature/v1\ntime {time}\n{text}".encode() if kind == COSIGNATURE else text.encode()


@dataclass(frozen=True, slots=True)
class Verifier:
    """The public half of a note key: `name`, signature type, 32-byte Ed25519 public key.

    `str(verifier)` is the usual one-line form `name+<key id, 8 hex digits>+<base64(type || public key)>`.
    """

    name: str
    public: bytes
    kind: int = ED25519

    def __post_init__(self) -> None:
        check_name(self.name)
        if len(self.public) != 32:
            raise ValueError(f"Ed25519 public key of {len(self.public)} bytes, wanted 32")
        if self.kind not in (ED25519, COSIGNATURE):
            raise ValueError(f"note signature type {self.kind:#04x} is not known")

    @property
    def key_id(self) -> bytes:
        return _key_id(self.name, self.kind, self.public)

    def __str__(self) -> str:
        blob = base64.b64encode(bytes([self.kind]) + self.public).decode()
        return f"{self.name}+{self.key_id.hex()}+{blob}"

    @classmethod
    def parse(cls, text: str) -> Verifier:
        """Inverse of `str`.

        Raises:
            NoteError: another form, an unknown signature type, or a key id that does not belong to the key.
        """
        name, plus, rest = text.partition("+")
        key_id, plus_2, blob = rest.partition("+")
        if not plus or not plus_2:
            raise NoteError("a verifier key has the form name+<8 hex digits>+<base64>")
        data = decode_base64(blob)
        if not data:
            raise NoteError("the verifier key is empty")
        try:
            verifier = cls(name, data[1:], data[0])
        except ValueError as error:
            raise NoteError(str(error)) from error
        if verifier.key_id.hex() != key_id:
            raise NoteError(f"key id {key_id!r} does not belong to this key, wanted {verifier.key_id.hex()}")
        return verifier

    def check(self, text: str, signature: bytes) -> int:
        """Verify the bytes after the key id over `text`; return the time of a cosignature (POSIX seconds), else 0.

        Raises:
            NoteError: the signature does not verify.
        """
        time = 0
        if self.kind == COSIGNATURE:
            if len(signature) != 72:
                raise NoteError(f"the cosignature of {self.name} has {len(signature)} bytes, wanted 72")
            time, signature = int.from_bytes(signature[:8], "big"), signature[8:]
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, _signed_bytes(self.kind, text, time))
        except InvalidSignature as error:
            raise NoteError(f"the signature of {self.name} does not verify") from error
        return time


class Signer:
    """A note key with its private half, in memory only; `repr` shows the public half."""

    __slots__ = ("_private", "verifier")

    def __init__(self, name: str, seed: Secret, kind: int = ED25519) -> None:
        """`seed` is the 32-byte Ed25519 private key (RFC 8032)."""
        if len(seed) != 32:
            raise ValueError(f"Ed25519 seed of {len(seed)} bytes, wanted 32")
        self._private = Ed25519PrivateKey.from_private_bytes(seed.reveal())
        self.verifier: Final = Verifier(name, self._private.public_key().public_bytes_raw(), kind)

    @property
    def name(self) -> str:
        return self.verifier.name

    def line(self, text: str, *, time: int = 0) -> str:
        """Return the signature line (with its newline) over `text`; `time` (POSIX seconds) counts for cosignatures only."""
        signature = self._private.sign(_signed_bytes(self.verifier.kind, text, time))
        if self.verifier.kind == COSIGNATURE:
            signature = time.to_bytes(8, "big") + signature
        return f"{_DASH} {self.name} {base64.b64encode(self.verifier.key_id + signature).decode()}\n"

    def sign(self, text: str) -> bytes:
        """Return the note: `text` (ends with a newline), an empty line, one signature line.

        Raises:
            ValueError: the text cannot be signed (no final newline, control characters).
        """
        _check_text(text)
        return f"{text}\n{self.line(text)}".encode()

    def __repr__(self) -> str:
        return f"Signer({self.verifier})"

    def __reduce__(self) -> str:
        raise TypeError("a Signer is never pickled")


@dataclass(frozen=True, slots=True)
class Note:
    """A note whose known signatures verified: `signed_by` holds (verifier, time) in the order of the lines."""

    text: str
    signed_by: tuple[tuple[Verifier, int], ...]


def _check_text(text: str) -> None:
    if not text.endswith("\n"):
        raise NoteError("the text does not end with a newline")
    if any(ord(c) < 0x20 and c != "\n" for c in text):
        raise NoteError("the note holds control characters")


def split(data: bytes) -> tuple[str, tuple[str, ...]]:
    """Return (text, signature lines without newline) of a note; nothing is verified.

    Raises:
        NoteError: not a note.
    """
    if len(data) > MAX_NOTE_BYTES:
        raise NoteError(f"note of {len(data)} bytes, at most {MAX_NOTE_BYTES} are accepted")
    try:
        whole = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NoteError("the note is not UTF-8") from error
    at = whole.rfind("\n\n")
    if at < 0:
        raise NoteError("the note has no empty line before its signatures")
    text, tail = whole[: at + 1], whole[at + 2 :]
    _check_text(text)
    if not tail:
        raise NoteError("the note has no signatures")
    _check_text(tail)
    return text, tuple(tail[:-1].split("\n"))


def _parse_line(line: str) -> tuple[str, bytes, bytes]:
    """Return (name, key id, signature)."""
    parts = line.split(" ")
    if len(parts) != 3 or parts[0] != _DASH:
        raise NoteError("a signature line is not of the form — <name> <base64>")
    blob = decode_base64(parts[2])
    if len(blob) < 5:
        raise NoteError("a signature line is too short")
    try:
        check_name(parts[1])
    except ValueError as error:
        raise NoteError(str(error)) from error
    return parts[1], blob[:4], blob[4:]


def open_note(data: bytes, verifiers: Iterable[Verifier]) -> Note:
    """Return the note if known keys signed it; see the module for the order of checks.

    Raises:
        NoteError: malformed, not signed by a known key, or a known key's signature does not verify.
    """
    text, lines = split(data)
    if len(lines) > MAX_SIGNATURES:
        raise NoteError(f"{len(lines)} signatures, at most {MAX_SIGNATURES} are accepted")
    known = {(verifier.name, verifier.key_id): verifier for verifier in verifiers}
    signed: dict[Verifier, int] = {}
    for line in lines:
        name, key_id, signature = _parse_line(line)
        verifier = known.get((name, key_id))
        if verifier is None:
            continue
        if verifier in signed:
            raise NoteError(f"{name} signed twice")
        signed[verifier] = verifier.check(text, signature)
    if not signed:
        raise NoteError("no known key signed this note")
    return Note(text, tuple(signed.items()))
