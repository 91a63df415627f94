"""`cloister verify`: check a sealed volume or a receipt."""

from __future__ import annotations

from pathlib import Path

import click

from cloister.cli.common import You, options
from cloister.cli.keyring import Keyring
from cloister.cli.ui import human_bytes, human_seconds
from cloister.errors import InputError, Reason


@click.command("verify", short_help="Check a sealed volume or a receipt.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--digest", default=None, help="The root digest that the volume must have.")
@click.option("--log-key", default="", help="Verifier key of the log.  [default: of the broker remembered in HOME]")
@options
def command(you: You, path: Path, digest: str | None, log_key: str) -> None:
    """Check every record of a sealed volume, or a receipt file, offline.

    With the key of the volume in your home, every record is opened and audited. Without it, whoever merely hosts the
    volume can still check every stored byte against its name: give the --digest that its contract or receipt states.

    \b
    Examples:
      cloister verify scans.sealed
      cloister verify scans.sealed --digest sha256:5f70…
      cloister verify HOME/receipts/answer-17.json
    """
    if path.is_dir():
        _volume(you, path, digest)
    else:
        _receipt(you, path, log_key)


def _volume(you: You, path: Path, digest: str | None) -> None:
    import time

    from cloister.volume.check import check
    from cloister.volume.read import Volume, peek

    head = peek(path)
    key = Keyring(you.home / "keys").find(head.volume_id)
    begin = time.perf_counter()
    if key is None:
        if digest is None:
            raise InputError(
                f"you have no key of {path}, so its name is needed",
                reasons=[Reason("--digest", "nothing", "sha256:… from the contract or a receipt")],
                hint="without key and name only accidents could be found, not an exchange of the whole volume",
            )
        with you.ui.bar("checking") as bar:
            head = check(path, expect=digest, progress=bar.update)
        took = time.perf_counter() - begin
        you.ui.result(
            {"digest": head.digest, "generation": head.generation, "seconds": took, "key": False},
            f"{head.digest}: every stored byte is what its name says (checked without a key) in {human_seconds(took)}",
        )
        return
    volume = Volume.open(path, key, expect=digest)
    with you.ui.bar("verifying") as bar:
        volume.verify(progress=bar.update)
    took = time.perf_counter() - begin
    you.ui.result(
        {
            "digest": volume.digest,
            "generation": volume.generation,
            "entries": len(volume.tree),
            "size_bytes": volume.data_len,
            "seconds": took,
            "key": True,
        },
        f"{volume.digest}: every record is authentic, {human_bytes(volume.data_len)} in {human_seconds(took)}",
    )


def _receipt(you: You, path: Path, log_key: str) -> None:
    from cloister.broker.log.receipt import check_receipt
    from cloister.cli.audit_ import log_key_of, read_receipt, remembered

    key = log_key or remembered(you).log_key
    verified = check_receipt(read_receipt(path), log_key_of(key))
    leaf = verified.leaf
    you.ui.result(
        {"index": verified.index, "size": verified.signed.checkpoint.size, "kind": leaf.KIND, "leaf": leaf.as_json()},
        f"entry {verified.index} of {verified.signed.checkpoint.origin}: {leaf.KIND} at {leaf.time:%Y-%m-%d %H:%M:%S} UTC; "
        "its place in the log is proven",
    )
