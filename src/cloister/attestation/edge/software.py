"""The measurement of our own software: which Cloister is this?

A soft TEE reports it as MRTD. On hardware the launch measurement covers the whole image and is made by the vendor's
firmware; this value is then only a convenience for people who compare installations.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import cloister

TAG = b"cloister/software/1\x00"


def measure_package(root: Path | None = None) -> bytes:
    """Return 48 bytes: SHA-384 over every `.py` file below `root` (default: the installed package `cloister`).

    Hashed are the tag, then per file, sorted by its relative POSIX path as bytes: u32 path length, path, u64 content
    length, content (big-endian). So no two trees have the same bytes, and time stamps, byte code and folders do not count.

    Raises:
        ValueError: there is no `.py` file below `root`.
    """
    base = Path(cloister.__file__).parent if root is None else root
    names = sorted(path.relative_to(base).as_posix().encode() for path in base.rglob("*.py") if path.is_file())
    if not names:
        raise ValueError(f"no Python file below {base}")
    state = hashlib.sha384(TAG)
    for name in names:
        content = (base / name.decode()).read_bytes()
        state.update(struct.pack(">I", len(name)) + name + struct.pack(">Q", len(content)) + content)
    return state.digest()
