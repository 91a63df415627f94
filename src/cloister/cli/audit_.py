"""`cloister audit`: is the broker's log one history, and are your receipts in it?"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cloister.cli.common import You, count, options, read_file, write_file
from cloister.errors import InputError, Reason, TamperedError

if TYPE_CHECKING:
    from cloister.broker.client import BrokerClient, Seen
    from cloister.broker.log.receipt import Receipt
    from cloister.crypto.note import Verifier


@dataclass(frozen=True, slots=True)
class Copy:
    """A log as it was fetched: enough to check everything again without a network."""

    log_key: str
    checkpoint: bytes
    entries: tuple[bytes, ...]
    since_size: int
    since_root: str

    def encode(self) -> bytes:
        body = {
            "v": 1,
            "log_key": self.log_key,
            "checkpoint": self.checkpoint.decode(),
            "entries": [base64.b64encode(entry).decode() for entry in self.entries],
            "since": {"size": self.since_size, "root": self.since_root},
        }
        return (json.dumps(body, indent=1) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes) -> Copy:
        """Inverse of `encode`.

        Raises:
            InputError: not such a file.
        """
        try:
            body = json.loads(data)
            if body["v"] != 1:
                raise ValueError("another version")
            if int(body["since"]["size"]) and len(bytes.fromhex(body["since"]["root"])) != 32:
                raise ValueError("a root that is no SHA-256")
            return cls(
                str(body["log_key"]),
                str(body["checkpoint"]).encode(),
                tuple(base64.b64decode(entry, validate=True) for entry in body["entries"]),
                int(body["since"]["size"]),
                str(body["since"]["root"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a copy of a log: {error}", hint="`cloister audit` writes one to HOME/log") from error


def remembered(you: You) -> Seen:
    """Return what you remember of the broker at your address.

    Raises:
        InputError: you never attested it.
    """
    from cloister.broker.client import Memory

    seen = Memory(you.home / "brokers.json").find(you.broker_url.rstrip("/")) if you.broker_url else None
    if seen is None:
        raise InputError(
            f"nothing is remembered of a broker at '{you.broker_url}'",
            hint="attest it once (`cloister status`), or give the log's key with --log-key",
        )
    return seen


def read_receipt(path: Path) -> Receipt:
    """Return the receipt in a file; an error names the file.

    Raises:
        InputError: it cannot be read.
        TamperedError: it is no receipt.
    """
    from cloister.broker.log.receipt import parse_receipt

    try:
        return parse_receipt(read_file(path, "a receipt"))
    except TamperedError as error:
        raise TamperedError(
            f"{path}: {error.message}", code=error.code, reasons=error.reasons, hint="take another copy of this receipt"
        ) from error


def log_key_of(text: str) -> Verifier:
    """Return the verifier key of a log.

    Raises:
        InputError: `text` is none.
    """
    from cloister.crypto.note import NoteError, Verifier

    try:
        return Verifier.parse(text)
    except NoteError as error:
        raise InputError(
            f"'{text}' is not the key of a log",
            reasons=[Reason("log-key", str(error), "<name>+<8 hex digits>+<base64>")],
            hint="`cloister audit --json` names it in its copy of the log (HOME/log)",
        ) from error


def _is_of(receipt: Receipt, key: Verifier) -> bool:
    """Whether the receipt says to be of the log with this key; if it does and is not, the audit says so."""
    from cloister.crypto.note import NoteError, decode_base64, split

    try:
        _, lines = split(receipt.checkpoint)
        signatures = [line.split(" ") for line in lines]
        return any(
            words[1] == key.name and decode_base64(words[2])[:4] == key.key_id
            for words in signatures
            if len(words) == 3
        )
    except NoteError:
        return True


def fetch(broker: BrokerClient, log_key: str, since_size: int, since_root: str) -> Copy:
    """Fetch the checkpoint and every entry below it."""
    from cloister.broker.log.checkpoint import open_checkpoint
    from cloister.crypto.note import Verifier

    note = broker.checkpoint()
    size = open_checkpoint(note, Verifier.parse(log_key)).checkpoint.size
    entries: list[bytes] = []
    while len(entries) < size:
        got = broker.entries(len(entries), size)
        if not got:
            raise InputError("the broker gives no more entries than this", hint="try again; tell its operator")
        entries.extend(got)
    return Copy(log_key, note, tuple(entries), since_size, since_root)


NAMED = 8
"""Entries on new machines that are printed."""


@click.command("audit", short_help="Check the broker's log and your receipts, offline.")
@click.argument("receipts", nargs=-1, type=click.Path(path_type=Path))
@click.option("--offline", "copy_file", type=click.Path(path_type=Path), help="Check a kept copy; no network.")
@options
def command(you: You, receipts: tuple[Path, ...], copy_file: Path | None) -> None:
    """Fetch the whole log, then check it offline: signatures, one history since last time, all your receipts in it.

    RECEIPTS are receipt files (default: all of this log in HOME/receipts). The copy that was checked is kept in HOME/log.

    \b
    Examples:
      cloister audit
      cloister audit --offline HOME/log/1f2e.json receipts/*.json
    """
    from cloister.broker.log.audit import audit
    from cloister.broker.log.checkpoint import Checkpoint

    if copy_file is not None:
        copy = Copy.decode(read_file(copy_file, "a copy of a log"))
    else:
        # what was known before this connection, which itself moves the memory forward
        memory = you.home / "brokers.json"
        before = remembered(you) if memory.exists() else None
        broker = you.broker()
        copy = fetch(broker, broker.broker.config.log_key, before.size if before else 0, before.root if before else "")
        name = hashlib.sha256(copy.log_key.encode()).hexdigest()[:12]
        copy_file = you.home / "log" / f"{name}.json"
        write_file(copy_file, copy.encode())
    key = log_key_of(copy.log_key)
    known = Checkpoint(key.name, copy.since_size, bytes.fromhex(copy.since_root)) if copy.since_size else None
    folder = you.home / "receipts"
    kept = tuple(sorted(folder.glob("*.json"))) if folder.is_dir() else ()
    found = [read_receipt(path) for path in receipts or kept]
    # a home may know several brokers; a receipt that was named by hand has to be of this one
    mine = found if receipts else [one for one in found if _is_of(one, key)]
    report = audit(
        copy.entries,
        copy.checkpoint,
        key,
        remembered=known,
        receipts=mine,
    )
    since = f"extends {report.since}" if report.since else "first look"
    lines = [
        f"log {report.checkpoint.origin}: {report.checkpoint.size} entries, one history ({since}): ok",
        "  " + ", ".join(f"{count} {kind}" for kind, count in report.counts.items()),
        f"  your {report.receipts} receipts are all in it; inclusion and consistency verified offline",
    ]
    if others := len(found) - len(mine):
        lines.append(
            f"  {count(others, 'receipt')} of other logs in {folder} not looked at: name their broker with --broker"
        )
    if report.cosigned:
        lines.append("  cosigned by " + ", ".join(name for name, _ in report.cosigned))
    if report.soft:
        verb = "rests" if report.soft == 1 else "rest"
        lines.append(f"  {count(report.soft, 'entry', 'entries')} {verb} on software evidence, which protects nothing")
    lines += [f"  {one}" for one in report.new_machines[-NAMED:]]
    if len(report.new_machines) > NAMED:
        lines.append(
            f"  {len(report.new_machines) - NAMED} more entries on machines not seen before: --json lists them"
        )
    you.ui.result({**report.as_json(), "other_receipts": others, "copy": str(copy_file)}, "\n".join(lines))
