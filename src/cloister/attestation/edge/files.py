"""The few file operations that kernel interfaces need, as an object so that tests can play the kernel over a real tree."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

READ_LIMIT: Final = 1 << 20
"""Largest file that is read, in bytes; TSM blobs end at 32 kB, an AMD certificate table at a few pages."""


class Files:
    """File operations; one write is one write(2), because each write to a TSM attribute is an operation of its own."""

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def rmdir(self, path: Path) -> None:
        path.rmdir()

    def exists(self, path: Path) -> bool:
        return path.exists()

    def read(self, path: Path, *, limit: int = READ_LIMIT) -> bytes:
        """Return the whole content.

        Raises:
            OSError: as open(2) and read(2); EFBIG beyond `limit` bytes.
        """
        with path.open("rb", buffering=0) as file:
            found = bytearray()
            while True:  # pseudo files have no size and may answer in pieces
                piece = file.read(64 * 1024)
                if not piece:
                    return bytes(found)
                found += piece
                if len(found) > limit:
                    raise OSError(errno.EFBIG, f"more than {limit} bytes")

    def write(self, path: Path, data: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written != len(data):
            raise OSError(errno.EIO, f"{written} of {len(data)} bytes were taken")
