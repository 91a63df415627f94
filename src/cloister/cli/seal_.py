"""`cloister seal`: a folder becomes a sealed volume."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

import click

from cloister.cli.common import You, count, keep_receipt, options, real
from cloister.cli.keyring import Keyring
from cloister.cli.ui import human_bytes, human_seconds
from cloister.errors import CloisterError, InputError


@click.command("seal", short_help="Turn a folder into a sealed volume and hand its key to the broker.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, type=click.Path(path_type=Path), help="Where the sealed volume goes.")
@click.option("--as", "name", default="", help="Name for messages, as in your contract.  [default: the folder's]")
@click.option(
    "--no-deposit", is_flag=True, help="Keep the key to yourself; `cloister key deposit` hands it over later."
)
@click.option(
    "--replace", is_flag=True, help="Replace an existing volume; the old one stays until the new is complete."
)
@options
def command(you: You, folder: Path, target: Path, name: str, no_deposit: bool, replace: bool) -> None:
    """Turn FOLDER into a sealed volume: encrypted, integrity-protected, names and sizes hidden.

    Its root digest is its name in a contract. The key stays in your home (HOME/keys) and goes to the broker, sealed to
    the broker's attested key. FOLDER is not changed.

    \b
    Examples:
      cloister seal scans --to scans.sealed --as scans
      cloister seal scans --to scans.sealed --no-deposit --json
    """
    from cloister.crypto.keys import Secret
    from cloister.crypto.memory import harden_process
    from cloister.volume.seal import seal

    harden_process()
    if os.path.lexists(target) and not replace:
        raise InputError(f"{target} exists already", hint="name a new place, or add --replace")
    name = name or real(folder).name
    # The broker is attested before the work, so that a wrong address costs nothing.
    broker = None if no_deposit else you.broker()
    signer = None if broker is None else you.signer()
    ring = Keyring(you.home / "keys")
    key, volume_id = Secret.random(), secrets.token_bytes(16)
    ring.keep(volume_id, key)
    begin = time.perf_counter()
    try:
        with you.ui.bar(f"sealing {name}") as bar:
            sealed = seal(folder, target, key=key, volume_id=volume_id, replace=replace, progress=bar.update)
    except BaseException:
        if not _is(target, volume_id):
            ring.forget(volume_id)
        raise
    took = time.perf_counter() - begin
    you.ui.say(
        f"sealed {count(sealed.files, 'file')}, {human_bytes(sealed.size_bytes)} in {human_seconds(took)}: {target}"
    )
    if broker is not None and signer is not None:
        receipt = broker.deposit_key(
            sealed.digest, volume_id=sealed.volume_id, key=key, sign=signer, generation=sealed.generation
        )
        keep_receipt(you, receipt, f"key-{sealed.digest[7:19]}")
        you.ui.say("key deposited with the broker, sealed to its attested key; your copy is in HOME/keys")
    you.ui.result(
        {
            "name": name,
            "digest": sealed.digest,
            "generation": sealed.generation,
            "volume_id": sealed.volume_id.hex(),
            "files": sealed.files,
            "size_bytes": sealed.size_bytes,
            "seconds": took,
            "deposited": broker is not None,
        },
        f'{name} = {{ owner = "…", digest = "{sealed.digest}" }}',
    )


def _is(target: Path, volume_id: bytes) -> bool:
    """Whether the volume with this id stands at `target`: then its key is kept, whatever else went wrong."""
    from cloister.volume.read import peek

    try:
        return peek(target).volume_id == volume_id
    except CloisterError:
        return False
