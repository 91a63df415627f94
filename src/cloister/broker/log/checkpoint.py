"""Checkpoints: the signed head of a log (c2sp.org/tlog-checkpoint) and the cosignatures of witnesses on it.

    <origin>\\n<size, decimal>\\n<base64(root, 32 bytes)>\\n
    \\n
    — <origin> base64(key id (4) || Ed25519 (64))               the log, signature type 0x01
    — <witness> base64(key id (4) || time u64 || Ed25519 (64))  each witness, signature type 0x04

The key name of the log is its origin. Extension lines are refused: no auditor could check them. Pure.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cloister.broker.log.tree import HASH_BYTES
from cloister.crypto import note
from cloister.errors import Reason, TamperedError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log says about itself: its name, how many entries it has, the root of their tree."""

    origin: str
    size: int
    root: bytes

    def __post_init__(self) -> None:
        note.check_name(self.origin)
        if self.size < 0 or len(self.root) != HASH_BYTES:
            raise ValueError("a checkpoint has a size >= 0 and a root of 32 bytes")

    def body(self) -> str:
        """Return the three lines that are signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


@dataclass(frozen=True, slots=True)
class SignedCheckpoint:
    """A checkpoint whose log signature verified. `cosigned` holds (witness name, POSIX time) of known witnesses;
    `data` is the note as it was read."""

    checkpoint: Checkpoint
    cosigned: tuple[tuple[str, int], ...]
    data: bytes


def tampered(message: str, *, where: str, found: str, wanted: str, hint: str = "") -> TamperedError:
    """Return the error that this room raises for everything that is not as it was logged."""
    reason = Reason(where=where, found=found, wanted=wanted, hint=hint)
    return TamperedError(message, code="log-tampered", reasons=[reason], hint=hint)


def parse_body(text: str) -> Checkpoint:
    """Inverse of `Checkpoint.body`.

    Raises:
        TamperedError: (log-tampered) another form, an extension line, a size with leading zeros.
    """
    lines = text.split("\n")
    if len(lines) != 4 or lines[3]:
        raise tampered(
            "the checkpoint does not have three lines",
            where="checkpoint.body",
            found=f"{len(lines) - 1} lines",
            wanted="3 lines",
        )
    origin, size, root = lines[:3]
    try:
        if not (size.isascii() and size.isdigit() and str(int(size[:20])) == size):
            raise ValueError(f"{size[:24]!r} is not a size")
        return Checkpoint(origin, int(size), note.decode_base64(root))
    except ValueError as error:
        raise tampered(
            "the checkpoint does not parse", where="checkpoint.body", found=str(error), wanted="origin, size, root"
        ) from error


def sign(checkpoint: Checkpoint, signer: note.Signer) -> bytes:
    """Return the signed checkpoint; the signer carries the origin's name."""
    if signer.name != checkpoint.origin or signer.verifier.kind != note.ED25519:
        raise ValueError(f"the key of {signer.name!r} does not sign for the log {checkpoint.origin!r}")
    return signer.sign(checkpoint.body())


def open_checkpoint(
    data: bytes, log_key: note.Verifier, *, witnesses: Sequence[note.Verifier] = ()
) -> SignedCheckpoint:
    """Return the checkpoint if the log signed it; steps: note form, log signature, cosignatures, body, origin.

    Raises:
        TamperedError: (log-tampered) the note or body is malformed, the log did not sign, a known signature is wrong.
    """
    try:
        opened = note.open_note(data, [log_key, *witnesses])
    except note.NoteError as error:
        raise tampered(
            f"the checkpoint is not authentic: {error}",
            where="checkpoint.signature",
            found=str(error),
            wanted=f"a signature by {log_key}",
        ) from error
    if not any(verifier == log_key for verifier, _ in opened.signed_by):
        raise tampered(
            "the checkpoint is not signed by the log",
            where="checkpoint.signature",
            found="only witnesses signed",
            wanted=f"a signature by {log_key}",
        )
    checkpoint = parse_body(opened.text)
    if checkpoint.origin != log_key.name:
        raise tampered(
            "the checkpoint belongs to another log",
            where="checkpoint.origin",
            found=checkpoint.origin,
            wanted=log_key.name,
        )
    cosigned = tuple((v.name, time) for v, time in opened.signed_by if v.kind == note.COSIGNATURE)
    return SignedCheckpoint(checkpoint, cosigned, data)


def add_lines(data: bytes, lines: Iterable[str]) -> bytes:
    """Return the note `data` with further signature lines (each ends with a newline)."""
    return data + "".join(lines).encode()
