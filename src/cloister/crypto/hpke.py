"""HPKE (RFC 9180) base mode with one suite: MLKEM768-X25519 hybrid KEM, HKDF-SHA256, AES-256-GCM.

Public keys are `ML-KEM-768 encapsulation key (1184 bytes) || X25519 public key (32 bytes)`. A sealed message is
`enc || ciphertext || tag`, 1136 bytes longer than the plaintext. `info` binds a message to its protocol and
transcript: opening under another `info` fails.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

PUBLIC_BYTES: Final = 1184 + 32
PRIVATE_BYTES: Final = 64 + 32
OVERHEAD_BYTES: Final = 1088 + 32 + 16
"""ML-KEM-768 ciphertext, X25519 share, AES-GCM tag."""

_SUITE: Final = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


class OpenError(ValueError):
    """The message was not sealed to this key under this `info`, or it was changed."""


class KeyPair:
    """An HPKE key pair that lives in memory; its `repr` shows the public half only."""

    __slots__ = ("_private", "public")

    def __init__(self, kem: MLKEM768PrivateKey, curve: X25519PrivateKey) -> None:
        self._private = hpke.MLKEM768X25519PrivateKey(kem, curve)
        self.public: Final[bytes] = kem.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> KeyPair:
        return cls(MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())

    @classmethod
    def from_private_bytes(cls, data: bytes) -> KeyPair:
        """Rebuild a key pair from the 96 bytes `ML-KEM seed || X25519 private key`."""
        if len(data) != PRIVATE_BYTES:
            raise ValueError(f"HPKE private key of {len(data)} bytes, wanted {PRIVATE_BYTES}")
        return cls(MLKEM768PrivateKey.from_seed_bytes(data[:64]), X25519PrivateKey.from_private_bytes(data[64:]))

    def open(self, message: bytes, *, info: bytes) -> bytes:
        """Return the plaintext of `message`.

        Raises:
            OpenError: not for this key, not under this `info`, or changed.
        """
        if len(message) < OVERHEAD_BYTES:
            raise OpenError("HPKE message is too short")
        try:
            return _SUITE.decrypt(message, self._private, info)
        except (InvalidTag, ValueError) as error:
            raise OpenError("HPKE message does not open under this key and context") from error

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public[-32:].hex()[:16]}…)"


def seal(plaintext: bytes, *, to: bytes, info: bytes) -> bytes:
    """Return `plaintext` sealed to the public key `to` (1216 bytes) under `info`.

    Raises:
        ValueError: `to` is not a public key of this suite.
    """
    if len(to) != PUBLIC_BYTES:
        raise ValueError(f"HPKE public key of {len(to)} bytes, wanted {PUBLIC_BYTES}")
    public = hpke.MLKEM768X25519PublicKey(
        MLKEM768PublicKey.from_public_bytes(to[:1184]), X25519PublicKey.from_public_bytes(to[1184:])
    )
    return _SUITE.encrypt(plaintext, public, info)
