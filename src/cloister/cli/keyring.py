"""An owner's own copies of volume keys: one file each, readable by the owner only, named by volume id.

The copy is written before sealing begins, so an interrupted seal never leaves a volume without its key. The broker gets
its own copy sealed to its attested key; losing the broker does not lose the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloister.cli.common import read_file, write_file
from cloister.crypto.canonical import json_decode, json_encode
from cloister.crypto.keys import Secret
from cloister.errors import InputError


@dataclass(frozen=True, slots=True)
class Keyring:
    """The folder `HOME/keys`."""

    folder: Path

    def path(self, volume_id: bytes) -> Path:
        return self.folder / f"{volume_id.hex()}.key"

    def keep(self, volume_id: bytes, key: Secret) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        body = json_encode({"v": 1, "volume_id": volume_id.hex(), "key": key.reveal().hex()})
        write_file(self.path(volume_id), body, mode=0o600)

    def forget(self, volume_id: bytes) -> None:
        self.path(volume_id).unlink(missing_ok=True)

    def find(self, volume_id: bytes) -> Secret | None:
        """Return your key of a volume, or None.

        Raises:
            InputError: the file is there and is not a key.
        """
        path = self.path(volume_id)
        if not path.exists():
            return None
        try:
            body = json_decode(read_file(path, "a volume key"))
            if body["v"] != 1 or body["volume_id"] != volume_id.hex() or len(body["key"]) != 64:
                raise ValueError("another form")
            return Secret(bytes.fromhex(body["key"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a volume key of this version") from error
