"""Every key of a volume, what it is for, and why no pair of key and nonce is used twice. Pure but for its arguments.

    volume key (the owner's, 32 bytes)
      kek-id     16 bytes, finds the right wrap; looks random to others (salt: the head's salt)
      wrap       AES-256-GCM key around the data key; random nonce; re-wrapping keeps the data key
      signer     Ed25519 seed per volume id: the same holder made two generations
    data key (random for each sealing) + salt (random for each sealing)
      commit     32 bytes in the head: one head opens under one data key only
      data       AES-256-GCM key of one segment of data
      manifest   AES-256-GCM key of 1,024 records of the manifest

All derivations are HKDF-SHA256 (RFC 5869). A record's nonce is 4 zero bytes and its number (u64): a number is encrypted
once per sealing, and each sealing has its own data key and salt, so a pair seals exactly one plaintext, ever.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.crypto.keys import KEY_BYTES, Secret, derive

NONCE: Final = 12
KEK_ID: Final = 16
DATA: Final = "cloister/volume/data/1"
MANIFEST: Final = "cloister/volume/manifest/1"


def check_volume_key(key: Secret) -> None:
    """Raise ValueError unless `key` has the size of a volume key."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a volume key has {KEY_BYTES} bytes, this one {len(key)}")


def kek_id(key: Secret, *, salt: bytes, identity: bytes) -> bytes:
    """16 bytes that mark the wrap of `key`; `identity` is volume id and generation as in the head."""
    return derive(key, "cloister/volume/kek-id/1", salt=salt, context=identity, size=KEK_ID)


def _wrap_cipher(key: Secret, salt: bytes, identity: bytes) -> AESGCM:
    return AESGCM(derive(key, "cloister/volume/wrap/1", salt=salt, context=identity))


def wrap_data_key(
    key: Secret, data_key: Secret, *, nonce: bytes, salt: bytes, identity: bytes, context: bytes
) -> bytes:
    """48 bytes: `data_key` encrypted under the volume key. `context` is authenticated (the head's first 72 bytes)."""
    return _wrap_cipher(key, salt, identity).encrypt(nonce, data_key.reveal(), context)


def unwrap_data_key(
    key: Secret, wrapped: bytes, *, nonce: bytes, salt: bytes, identity: bytes, context: bytes
) -> Secret | None:
    """Inverse of `wrap_data_key`; None if it does not open. The caller refuses: he knows what else was tried."""
    try:
        return Secret(_wrap_cipher(key, salt, identity).decrypt(nonce, wrapped, context))
    except InvalidTag:
        return None


def commitment(data_key: Secret, salt: bytes) -> bytes:
    """32 bytes that fix the data key: two data keys with one commitment would be a collision of HMAC-SHA256."""
    return derive(data_key, "cloister/volume/commit/1", salt=salt)


def signer(key: Secret, volume_id: bytes) -> Ed25519PrivateKey:
    """The key that signs heads of this volume id under this volume key."""
    return Ed25519PrivateKey.from_private_bytes(derive(key, "cloister/volume/signer/1", context=volume_id))


def record_cipher(data_key: Secret, salt: bytes, stream: str, segment: int) -> AESGCM:
    """The cipher of one segment of `stream` (`DATA` or `MANIFEST`)."""
    return AESGCM(derive(data_key, stream, salt=salt, context=segment.to_bytes(4, "little")))


def record_nonce(record: int) -> bytes:
    """12 bytes: four zeros, then the number of the record in its stream."""
    return b"\x00\x00\x00\x00" + record.to_bytes(8, "little")
