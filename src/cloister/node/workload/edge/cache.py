"""Sealed small files: written atomically, believed only whole. Used for the measurement cache and staging indexes.

    magic 24 bytes | mode 1 byte (0 checksum, 1 MAC) | tag 32 bytes | canonical CBOR body

The tag is SHA-256 of the body, or HMAC-SHA256 under a key that only the node has; a reader with a key does not accept a
file without one, nor the other way round. A file that fails any check is treated as absent: what it would have saved
is done again, and the result does not depend on it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import Any, Final

from cloister.crypto.canonical import cbor_decode, cbor_encode
from cloister.crypto.keys import Secret, mac, mac_equal

MAGIC: Final = b"cloister/sealed-file/1\x00\x00"
LIMIT: Final = 256 << 20
_HEADER: Final = len(MAGIC) + 1 + 32


def load(path: Path, *, label: str, mac_key: Secret | None) -> dict[str, Any] | None:
    """Return the body of a sealed file; None if it is absent, damaged, or sealed in another way."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        # Without a key only the owner of the file vouches for it: nobody else may have been able to write it.
        if mac_key is None and (found.st_uid != os.geteuid() or found.st_mode & 0o022):
            return None
        if not _HEADER < found.st_size <= LIMIT:
            return None
        data = file.read(LIMIT + 1)
    mode, tag, body = data[len(MAGIC) : len(MAGIC) + 1], data[len(MAGIC) + 1 : _HEADER], data[_HEADER:]
    if not data.startswith(MAGIC) or mode != _mode(mac_key) or not mac_equal(tag, _tag(body, label, mac_key)):
        return None
    try:
        value = cbor_decode(body, limit=LIMIT)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def save(path: Path, body: dict[str, Any], *, label: str, mac_key: Secret | None) -> None:
    """Replace a sealed file in one step. The folder must exist.

    Raises:
        OSError: it cannot be written; nothing half-written is left.
    """
    data = cbor_encode(body)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(MAGIC + _mode(mac_key) + _tag(data, label, mac_key))
            file.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _mode(mac_key: Secret | None) -> bytes:
    return b"\x00" if mac_key is None else b"\x01"


def _tag(body: bytes, label: str, mac_key: Secret | None) -> bytes:
    if mac_key is not None:
        return mac(mac_key, label, body)
    return hashlib.sha256(label.encode("ascii") + b"\x00" + body).digest()
