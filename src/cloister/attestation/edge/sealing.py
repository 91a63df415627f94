"""Sealing: bytes that only this software on this machine can open again.

Hardware derives the key from the platform and the measurement (SGX EGETKEY, a TPM policy, SNP derived keys). `SoftSealer`
has the same behaviour, bound to a random file and a software measurement, but whoever can read the file can derive the
key: it protects nothing, and it is there so that the code around it is the same with and without hardware.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from cloister.attestation.edge.software import measure_package
from cloister.crypto.keys import Secret, UnwrapError, derive, unwrap, wrap
from cloister.errors import MachineError, TamperedError

NOTICE: Final = "soft sealing: the key is derived from a file beside the data, so this protects nothing"
FILE: Final = "soft-seal.insecure"
_LABEL: Final = "cloister/soft-seal/1"
_SALT_BYTES: Final = 32


class Sealer(Protocol):
    """Seals bytes to this machine and this software."""

    def seal(self, data: bytes) -> bytes: ...

    def unseal(self, sealed: bytes) -> bytes:
        """Return what was sealed.

        Raises:
            TamperedError: sealed by other software, on another machine, or changed.
        """
        ...


class SoftSealer:
    """AES-256-GCM under HKDF(random file in `folder`, public label, software measurement). Protects nothing.

    Args:
        folder: the platform folder; the random file is made there on first use, mode 0600.
        measurement: 48 bytes; default: `measure_package()`.

    Raises:
        ValueError: a measurement of another size.
        MachineError: the folder cannot be written, or the random file has another size.
    """

    notice: Final = NOTICE

    def __init__(self, folder: Path, *, measurement: bytes | None = None) -> None:
        value = measure_package() if measurement is None else measurement
        if len(value) != 48:
            raise ValueError(f"measurement of {len(value)} bytes, wanted 48")
        self._key = Secret(derive(_machine_secret(folder), _LABEL, context=value))

    def seal(self, data: bytes) -> bytes:
        """Return `data` sealed: 28 bytes longer, another value on every call."""
        return wrap(self._key, data, context=_LABEL.encode())

    def unseal(self, sealed: bytes) -> bytes:
        """Return what was sealed.

        Raises:
            TamperedError: sealed by other software, on another machine, or changed.
        """
        try:
            return unwrap(self._key, sealed, context=_LABEL.encode())
        except UnwrapError as error:
            raise TamperedError(
                "the sealed state does not open: it was sealed by other software or on another machine, or was changed",
                hint="after an upgrade, restore the state from the parties' recovery shares",
            ) from error

    def __repr__(self) -> str:
        return f"SoftSealer({NOTICE})"


def _machine_secret(folder: Path) -> bytes:
    """Return the random bytes of this soft machine, made once: the first writer wins, a crash leaves all or nothing."""
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            temporary = folder / f".{FILE}.{secrets.token_hex(8)}"
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(secrets.token_bytes(_SALT_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
                with suppress(FileExistsError):  # another process was first: its file counts
                    os.link(temporary, path)
            finally:
                temporary.unlink()
        value = path.read_bytes()
    except OSError as error:
        raise MachineError(f"the platform folder {folder} cannot be used: {error.strerror}") from error
    if len(value) != _SALT_BYTES:
        raise MachineError(
            f"{path} has {len(value)} bytes, wanted {_SALT_BYTES}", hint="delete it: sealed state is lost"
        )
    return value
