"""`cloister open`: the owner of a sealed volume gets its files back."""

from __future__ import annotations

from pathlib import Path

import click

from cloister.cli.common import You, find_contract, keep_receipt, options
from cloister.cli.keyring import Keyring
from cloister.cli.ui import human_bytes
from cloister.errors import InputError


@click.command("open", short_help="Open a sealed volume that you own.")
@click.argument("volume", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, type=click.Path(path_type=Path), help="A new folder for the files.")
@click.option("--contract", "reference", default="", help="Contract (file, id or name) whose output this is.")
@click.option("--asset", default="", help="Name of the output in that contract.")
@options
def command(you: You, volume: Path, target: Path, reference: str, asset: str) -> None:
    """Write the files of a sealed VOLUME to a new folder.

    The key is your own copy, or comes from the broker if you own the output that a contract's phase wrote.

    \b
    Examples:
      cloister open scans.sealed --to scans-again
      cloister open detector.sealed --to detector --contract pneumonia-xray --asset detector
    """
    from cloister.crypto.memory import harden_process
    from cloister.node.outputs import current, finished
    from cloister.volume.read import Volume, peek

    harden_process()
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists already", hint="name a new folder")
    if not volume.exists():
        volume = finished(volume)  # of a run that was cut off after it had registered its first output
    head = peek(volume)
    expect: str | None = None
    key = Keyring(you.home / "keys").find(head.volume_id)
    if key is None:
        if not reference or not asset:
            raise InputError(
                f"you have no key of {volume}",
                hint="if a contract's phase wrote it and you own it, add --contract and --asset: the broker has the key",
            )
        broker = you.broker()
        contract = find_contract(reference, broker)
        opened = broker.open_key(contract.id, asset, [you.signer()])
        keep_receipt(you, opened.receipt, f"open-{opened.key.digest[7:19]}")
        key, expect = opened.key.key, opened.key.digest
        volume = current(volume, expect)
    with you.ui.step(f"opened {volume.name}") as step, you.ui.bar("opening") as bar:
        opened_volume = Volume.open(volume, key, expect=expect)
        opened_volume.extract(target, progress=bar.update)
        count = len(opened_volume.tree) - 1
        step.text = f"opened {volume.name}: {count} entries, {human_bytes(opened_volume.data_len)}"
    you.ui.result({"digest": opened_volume.digest, "folder": str(target), "entries": count}, str(target))
