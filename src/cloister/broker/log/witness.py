"""Witnesses: who remembers the log's head so that nobody can bring back an old one or keep two. Pure on both sides.

A witness keeps, for each log, the last checkpoint it cosigned and an epoch number. It cosigns a checkpoint after
  1 the log signed it                                                           C2SP tlog-checkpoint
  2 the epoch is the current one: no other instance of the broker took over
  3 the request starts from the size that was cosigned last (else it says which: `Behind`)      C2SP tlog-witness
  4 the checkpoint extends that one                                             RFC 6962 2.1.2
A broker that starts opens a new epoch at its witnesses (the request is signed by the log's key over a fresh nonce) and
gets back, signed, what the witness saw last. With that it refuses to run
  on an old copy of its log     "my log has 150 entries, witness w saw 401"
  on an edited log              "history differs: ..."
The epoch only stops an idle twin early. That two instances cannot both go on rests on step 4 and a quorum above half.

Texts, each a signed note (c2sp.org/signed-note):
  request     cloister/open-epoch/1 | origin | base64(nonce, 32)                                   signed by the log
  statement   cloister/witness-epoch/1 | origin | epoch | size | base64(root) | base64(nonce)      signed by the witness
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from cloister.broker.log.checkpoint import Checkpoint, open_checkpoint, tampered
from cloister.broker.log.tree import EMPTY_ROOT, verify_consistency
from cloister.crypto import note
from cloister.crypto.note import NoteError, Signer, Verifier

NONCE_BYTES: Final = 32
_REQUEST: Final = "cloister/open-epoch/1"
_STATEMENT: Final = "cloister/witness-epoch/1"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a witness remembers of one log: its last cosigned checkpoint and the current epoch."""

    checkpoint: Checkpoint
    epoch: int = 0

    @classmethod
    def nothing(cls, origin: str) -> Seen:
        return cls(Checkpoint(origin, 0, EMPTY_ROOT))


@dataclass(frozen=True, slots=True)
class Statement:
    """What a witness says about a log when an epoch begins."""

    seen: Seen
    nonce: bytes

    def body(self) -> str:
        at = self.seen.checkpoint
        root, nonce = base64.b64encode(at.root).decode(), base64.b64encode(self.nonce).decode()
        return f"{_STATEMENT}\n{at.origin}\n{self.seen.epoch}\n{at.size}\n{root}\n{nonce}\n"


@dataclass(frozen=True, slots=True)
class Behind:
    """The witness was not asked from where it stands: ask again from `size`."""

    size: int


class WitnessLink(Protocol):
    """A witness as a broker reaches it: in this process, or over the network.

    Both methods raise PeerError if the witness cannot be reached, TamperedError if it refuses for good.
    """

    @property
    def verifier(self) -> Verifier:
        """The key of its cosignatures (type 4)."""
        ...

    def open_epoch(self, request: bytes) -> bytes:
        """Return the signed statement."""
        ...

    def cosign(self, *, epoch: int, old_size: int, proof: Sequence[bytes], checkpoint: bytes) -> str | Behind:
        """Return the signature line, or where the witness stands."""
        ...


def statement_key(witness: Verifier) -> Verifier:
    """Return the key that signs statements: the witness's key and name with signature type 1."""
    return Verifier(witness.name, witness.public, note.ED25519)


def epoch_request(signer: Signer, nonce: bytes) -> bytes:
    """Return the signed request of the log to open an epoch; `nonce` is 32 fresh random bytes."""
    if len(nonce) != NONCE_BYTES:
        raise ValueError(f"nonce of {len(nonce)} bytes, wanted {NONCE_BYTES}")
    return signer.sign(f"{_REQUEST}\n{signer.name}\n{base64.b64encode(nonce).decode()}\n")


def open_epoch(seen: Seen, request: bytes, log_key: Verifier) -> Statement:
    """Return what to sign and, in `.seen`, what to remember: the next epoch.

    Raises:
        TamperedError: (log-tampered) the log did not sign this request.
    """
    try:
        lines = note.open_note(request, [log_key]).text.split("\n")
        if len(lines) != 4 or lines[:2] != [_REQUEST, log_key.name] or lines[3]:
            raise NoteError("it is no request to open an epoch")
        nonce = note.decode_base64(lines[2])
        if len(nonce) != NONCE_BYTES:
            raise NoteError(f"a nonce of {len(nonce)} bytes")
    except NoteError as error:
        raise tampered(
            f"the request for a new epoch is not authentic: {error}",
            where="witness.request",
            found=str(error),
            wanted=f"a request signed by {log_key}",
        ) from error
    return Statement(Seen(seen.checkpoint, seen.epoch + 1), nonce)


def open_statement(data: bytes, witness: Verifier, *, origin: str, nonce: bytes) -> Seen:
    """Return what `witness` said in answer to the request with `nonce`.

    Raises:
        TamperedError: (log-tampered) not signed by this witness, for another log or another nonce, or malformed.
    """
    try:
        text = note.open_note(data, [statement_key(witness)]).text
        lines = text.split("\n")
        if len(lines) != 7:
            raise NoteError(f"{len(lines) - 1} lines")
        said = Seen(Checkpoint(lines[1], int(lines[3]), note.decode_base64(lines[4])), int(lines[2]))
        if Statement(said, nonce).body() != text or said.checkpoint.origin != origin:
            raise NoteError("it answers another request")
    except ValueError as error:
        raise tampered(
            f"the statement of witness {witness.name} does not count: {error}",
            where=f"witness.{witness.name}",
            found=str(error),
            wanted=f"a fresh statement about {origin}",
        ) from error
    return said


def check_seen(seen: Seen, *, size: int, root_at: Callable[[int], bytes], who: str) -> None:
    """Check my own log of `size` entries against what witness `who` saw; `root_at(n)` is my root of n entries.

    Raises:
        TamperedError: (log-tampered) my log is an old copy, or its history differs.
    """
    saw = seen.checkpoint
    if saw.size > size:
        raise tampered(
            f"my log has {size} entries, witness {who} saw {saw.size}",
            where=f"witness.{who}",
            found=f"{size} entries",
            wanted=f"at least {saw.size}",
            hint="this is an old copy of the state folder: find the newest one",
        )
    if root_at(saw.size) != saw.root:
        raise tampered(
            f"history differs: witness {who} saw another log of {saw.size} entries",
            where=f"witness.{who}",
            found=f"root {root_at(saw.size).hex()}",
            wanted=f"root {saw.root.hex()}",
            hint="the log was edited, or another broker went on with it",
        )


def check_extension(
    seen: Seen, *, epoch: int, old_size: int, proof: Sequence[bytes], checkpoint: bytes, log_key: Verifier
) -> Seen | Behind:
    """Return what to remember before cosigning `checkpoint` (a note), or where this witness stands.

    Raises:
        TamperedError: (log-tampered) step 1, 2 or 4 of the module refused; nothing may be cosigned.
    """
    new = open_checkpoint(checkpoint, log_key).checkpoint
    if epoch != seen.epoch:
        raise tampered(
            f"another instance of the broker took over: epoch {seen.epoch} began",
            where="witness.epoch",
            found=str(epoch),
            wanted=str(seen.epoch),
            hint="only one broker may go on with a log: stop this one",
        )
    if old_size != seen.checkpoint.size:
        return Behind(seen.checkpoint.size)
    verify_consistency(
        old_size, seen.checkpoint.root, new.size, new.root, proof, who="the checkpoint that was cosigned last"
    )
    return Seen(new, epoch)
