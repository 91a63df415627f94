"""Edge: give a volume to another volume key without touching its data or its name.

The wraps lie outside the name, the signature and every record: one block is rewritten, in one step. Whoever has seen the data
key keeps it; only a new seal takes it away.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path

from cloister.crypto.keys import Secret
from cloister.errors import InputError
from cloister.volume import format as fmt
from cloister.volume import keys
from cloister.volume.disk import Disk, writing
from cloister.volume.read import peek, unwrap


def rewrap(path: Path, key: Secret, new_key: Secret, *, keep: bool = False, disk: Disk | None = None) -> fmt.Head:
    """Make the volume at `path` open under `new_key`; with `keep`, under `key` too. The new head; its digest is the old one.

    Raises:
        TamperedError: code `volume-tampered`: the head was changed, or `key` does not open it.
        InputError: no volume, not writable, or already 50 wraps.
        MachineError: code `disk-full`, or `machine`.
    """
    keys.check_volume_key(key)
    keys.check_volume_key(new_key)
    disk = disk or Disk()
    head = peek(path)
    data_key = unwrap(head, key, name=str(path))
    salt, identity = head.salt, head.identity
    new_id, old_id = (keys.kek_id(each, salt=salt, identity=identity) for each in (new_key, key))
    nonce = secrets.token_bytes(keys.NONCE)
    wrapped = keys.wrap_data_key(new_key, data_key, nonce=nonce, salt=salt, identity=identity, context=head.context)
    dropped = {new_id} if keep else {new_id, old_id}
    wraps = (*(wrap for wrap in head.wraps if wrap.kek_id not in dropped), fmt.Wrap(new_id, nonce, wrapped))
    if len(wraps) > fmt.MAX_WRAPS:
        raise InputError(f"{path} already has {fmt.MAX_WRAPS} wraps", hint="drop one before you add another")
    new_head = replace(head, wraps=wraps)
    temporary = path / f"head.{secrets.token_hex(8)}"
    with writing(path):
        try:
            disk.write_file(temporary, new_head.encode())
            disk.replace_file(temporary, path / "head")
            disk.sync_folder(path)
        finally:
            if temporary.exists():
                disk.remove_file(temporary)
    return new_head
