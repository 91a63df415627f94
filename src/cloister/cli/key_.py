"""`cloister key`: the SSH key that a party signs with."""

from __future__ import annotations

import click

from cloister.cli.common import You, options


@click.group("key", short_help="Make and show the SSH key that you sign with.")
def command() -> None:
    """Make and show the SSH key that you sign with.

    Any SSH key works: a file, ssh-agent, or a security key (`--key token.pub`). A contract names it by its fingerprint.

    \b
    Examples:
      cloister key new --home hospital
      cloister key show --home hospital
      cloister key show --key ~/.ssh/id_ed25519_sk.pub
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
