"""`cloister key`: the SSH key that a party signs with."""

from __future__ import annotations

from pathlib import Path

import click

from cloister.cli.common import You, keep_receipt, options
from cloister.cli.keyring import Keyring
from cloister.errors import InputError


@click.group("key", short_help="Make and show the SSH key that you sign with.")
def command() -> None:
    """Make and show the SSH key that you sign with.

    Any SSH key works: a file, ssh-agent, or a security key (`--key token.pub`). A contract names it by its fingerprint.

    \b
    Examples:
      cloister key new --home hospital
      cloister key show --home hospital
      cloister key show --key ~/.ssh/id_ed25519_sk.pub
      cloister key deposit scans.sealed --home hospital
    """


@command.command()
@options
def new(you: You) -> None:
    """Make an ed25519 key in your home; never overwrites one."""
    from cloister.contract import edge

    you.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = edge.generate_key(you.key_file, comment=f"cloister {you.home.name}")
    you.ui.say(f"new key {you.key_file}")
    you.ui.result({"fingerprint": key.fingerprint, "file": str(you.key_file)}, key.fingerprint)


@command.command()
@options
def show(you: You) -> None:
    """Print the fingerprint that goes into a contract's [party] table."""
    fingerprint = you.fingerprint()
    you.ui.result({"fingerprint": fingerprint, "file": str(you.key_file)}, fingerprint)


@command.command()
@click.argument("volume", type=click.Path(path_type=Path))
@options
def deposit(you: You, volume: Path) -> None:
    """Hand the key of a VOLUME that you sealed with --no-deposit to the broker, sealed to its attested key."""
    from cloister.crypto.memory import harden_process
    from cloister.volume.read import Volume, peek

    harden_process()
    head = peek(volume)
    key = Keyring(you.home / "keys").find(head.volume_id)
    if key is None:
        raise InputError(f"you have no key of {volume}", hint="its key is in the home that sealed it (HOME/keys)")
    with Volume.open(volume, key, expect=None) as opened:  # proves that this is the key, before anybody relies on it
        digest, generation = opened.digest, opened.generation
    receipt = you.broker().deposit_key(
        digest, volume_id=head.volume_id, key=key, sign=you.signer(), generation=generation
    )
    keep_receipt(you, receipt, f"key-{digest[7:19]}")
    you.ui.result({"digest": digest, "deposited": True}, f"key of {digest} deposited with the broker")
