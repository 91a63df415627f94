"""Symmetric keys: derivation (HKDF-SHA256, RFC 5869), key wrapping (AES-256-GCM), digests.

Every derivation has a label of the form `cloister/<what>/<version>`, so no two uses share a key.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.crypto.memory import ARENA

KEY_BYTES: Final = 32


class Secret:
    """Bytes that must not be printed: `repr`, `str`, `format` and pickling never show them.

    They live in the protected pages of `cloister.crypto.memory` and are overwritten when the object goes.
    `reveal()` returns a copy; search for it to see every place that uses a key.
    """

    __slots__ = ("_size", "_slot")

    def __init__(self, value: bytes) -> None:
        self._size = len(value)
        self._slot = ARENA.put(value)

    @classmethod
    def random(cls, size: int = KEY_BYTES) -> Secret:
        return cls(secrets.token_bytes(size))

    def reveal(self) -> bytes:
        return ARENA.get(self._slot, self._size)

    def __len__(self) -> int:
        return self._size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self.reveal(), other.reveal())

    __hash__ = None  # type: ignore[assignment]  # a secret is no dictionary key

    def __del__(self) -> None:
        if hasattr(self, "_slot"):
            ARENA.wipe(self._slot, self._size)

    def __repr__(self) -> str:
        return f"Secret(<{self._size} bytes>)"

    def __reduce__(self) -> str:
        raise TypeError("a Secret is never pickled")


def derive(key: Secret | bytes, label: str, *, salt: bytes = b"", context: bytes = b"", size: int = KEY_BYTES) -> bytes:
    """Return `size` bytes of HKDF-SHA256(key, salt, label || 0x00 || context)."""
    material = key.reveal() if isinstance(key, Secret) else key
    info = label.encode("ascii") + b"\x00" + context
    return HKDF(algorithm=SHA256(), length=size, salt=salt or None, info=info).derive(material)


class UnwrapError(ValueError):
    """The wrapped key was not made under this key and context."""


def wrap(key: Secret, payload: bytes, *, context: bytes) -> bytes:
    """Return `nonce (12) || AES-256-GCM(payload)`; `context` is authenticated and must be given again to unwrap."""
    nonce = secrets.token_bytes(12)
    return nonce + AESGCM(key.reveal()).encrypt(nonce, payload, context)


def unwrap(key: Secret, wrapped: bytes, *, context: bytes) -> bytes:
    """Inverse of `wrap`.

    Raises:
        UnwrapError: another key, another context, or changed bytes.
    """
    if len(wrapped) < 28:
        raise UnwrapError("wrapped key is too short")
    try:
        return AESGCM(key.reveal()).decrypt(wrapped[:12], wrapped[12:], context)
    except InvalidTag as error:
        raise UnwrapError("wrapped key does not open under this key and context") from error


def mac(key: Secret, label: str, message: bytes) -> bytes:
    """Return HMAC-SHA256 of `label || 0x00 || message`."""
    return hmac.digest(key.reveal(), label.encode("ascii") + b"\x00" + message, hashlib.sha256)


def mac_equal(a: bytes, b: bytes) -> bool:
    """Constant-time comparison."""
    return hmac.compare_digest(a, b)


def digest(data: bytes) -> str:
    """Return the name of `data` as contracts write it: `sha256:` and 64 lower-case hex digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
