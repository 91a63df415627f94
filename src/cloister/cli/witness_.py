"""`cloister witness`: remember the head of a log, and co-sign only what extends it."""

from __future__ import annotations

import time

import click

from cloister.cli.common import You, now, options, real, write_file


@click.command("witness", short_help="Co-sign the log's checkpoints so that it cannot be rolled back or forked.")
@click.option("--name", default="", help="Name of a new witness key.  [default: the home folder's name]")
@click.option("--watch", "every_s", type=click.FloatRange(min=1), help="Go on, looking every so many seconds.")
@options
def command(you: You, name: str, every_s: float | None) -> None:
    """Attest the broker, check that its log extends what this witness saw last, remember and co-sign it.

    The witness's key and memory are in HOME/witness. A log that went back or has another history is refused with both
    sizes named, and nothing is signed.

    \b
    Examples:
      cloister witness --home auditor
      cloister witness --home auditor --watch 60
    """
    from cloister.broker.log.checkpoint import add_lines, open_checkpoint
    from cloister.broker.log.witness import Behind
    from cloister.broker.store.witnesses import WitnessFolder
    from cloister.crypto.note import Verifier
    from cloister.errors import PeerError

    folder = you.home / "witness"
    if (folder / "key").exists():
        witness = WitnessFolder(folder, clock=now)
    else:
        witness = WitnessFolder.create(folder, name or real(you.home).name, clock=now)
        you.ui.say(f"new witness {witness.verifier}")
    broker = you.broker()
    key = Verifier.parse(broker.broker.config.log_key)
    witness.add_log(key)
    while True:
        note = broker.checkpoint()
        head = open_checkpoint(note, key).checkpoint
        seen = witness.seen(key.name)
        if seen is None:
            raise PeerError("the witness forgot the log that it just added")
        old = seen.checkpoint.size
        proof = broker.consistency(old, head.size) if 0 < old < head.size else ()
        line = witness.cosign(epoch=seen.epoch, old_size=old, proof=proof, checkpoint=note)
        if isinstance(line, Behind):
            continue  # another process of this witness was faster: look again
        path = folder / "latest.checkpoint"
        write_file(path, add_lines(note, [line]))
        you.ui.result(
            {
                "origin": head.origin,
                "size": head.size,
                "since": old,
                "witness": str(witness.verifier),
                "file": str(path),
            },
            f"{head.origin}: {head.size} entries extend {old}: co-signed as {witness.verifier.name} ({path})",
        )
        if every_s is None:
            return
        time.sleep(every_s)
