"""Receipts: one log entry with everything that proves, offline, that it is in the log.

`receipt.json`: {"v": 1, "leaf": {...}, "index": n, "size": n, "proof": [base64, ...], "checkpoint": "<signed note>"}

`verify_receipt`, in this order; an error names the step that refused:
  1 parse       the JSON has exactly these fields, the leaf is a known kind                docs/format/log.md
  2 checkpoint  signed by the log's key, and its size is the receipt's                     C2SP tlog-checkpoint
  3 inclusion   the leaf's canonical bytes stand at `index` in the tree                    RFC 6962 2.1.1
  4 remember    the checkpoint and the remembered one are one history                      RFC 6962 2.1.2
Whether the decision that the leaf records was right is not judged here. Pure.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cloister.broker.log import leaf as leaves
from cloister.broker.log.checkpoint import Checkpoint, SignedCheckpoint, open_checkpoint, tampered
from cloister.broker.log.leaf import Leaf
from cloister.broker.log.tree import HASH_BYTES, leaf_hash, verify_consistency, verify_inclusion
from cloister.crypto.canonical import json_decode
from cloister.crypto.note import NoteError, Verifier, decode_base64

MAX_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class Receipt:
    """An entry and its proof. `data` is the leaf's canonical JSON, `checkpoint` a signed note; unverified."""

    data: bytes
    index: int
    size: int
    proof: tuple[bytes, ...]
    checkpoint: bytes = field(repr=False)

    def encode(self) -> bytes:
        """Return the bytes of `receipt.json` (RFC 8785)."""
        proof = ",".join(f'"{base64.b64encode(value).decode()}"' for value in self.proof)
        note = leaves.encode_json({"checkpoint": self.checkpoint.decode()})[:-1]
        return b'%b,"index":%d,"leaf":%b,"proof":[%b],"size":%d,"v":1}' % (
            note,
            self.index,
            self.data,
            proof.encode(),
            self.size,
        )


def _refuse(found: str, wanted: str) -> Any:
    raise tampered(f"the receipt does not parse: {found}", where="receipt.json", found=found, wanted=wanted)


def _size(value: object, name: str) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        return int(_refuse(f"{name} is no size", "an integer from 0 to 2^53 - 1"))
    return value


def parse_receipt(data: bytes) -> Receipt:
    """Return the receipt of `receipt.json`; any JSON spelling is fine, the leaf is put into canonical form.

    Raises:
        TamperedError: (log-tampered) not JSON, other fields, an unknown kind of leaf.
    """
    try:
        value = json_decode(data, limit=MAX_BYTES, canonical=False)
    except ValueError as error:
        _refuse(str(error), "JSON")
    if not isinstance(value, dict) or value.keys() != {"v", "leaf", "index", "size", "proof", "checkpoint"}:
        _refuse("other fields", "v, leaf, index, size, proof, checkpoint")
    if value["v"] != 1 or type(value["v"]) is not int:
        _refuse(f"version {value['v']!r:.20}", "version 1")
    proof, note = value["proof"], value["checkpoint"]
    if not isinstance(proof, list) or len(proof) > 64 or not all(isinstance(item, str) for item in proof):
        _refuse("the proof is no list of hashes", "at most 64 base64 strings")
    if not isinstance(note, str):
        _refuse("the checkpoint is no text", "a signed note")
    try:
        hashes = tuple(decode_base64(item) for item in proof)
        checkpoint = note.encode()
    except (NoteError, UnicodeEncodeError) as error:
        _refuse(str(error), "base64 hashes and a note in Unicode")
    if any(len(item) != HASH_BYTES for item in hashes):
        _refuse("a hash of another length", "32 bytes each")
    encoded = leaves.from_json(value["leaf"]).encode()
    return Receipt(encoded, _size(value["index"], "index"), _size(value["size"], "size"), hashes, checkpoint)


@dataclass(frozen=True, slots=True)
class Verified:
    """What a receipt proves: this entry at this index, under this checkpoint (remember it)."""

    leaf: Leaf
    index: int
    signed: SignedCheckpoint


def check_receipt(receipt: Receipt, log_key: Verifier, *, witnesses: Sequence[Verifier] = ()) -> Verified:
    """Steps 2 and 3: return what the receipt proves by itself.

    Raises:
        TamperedError: (log-tampered) see the module.
    """
    signed = open_checkpoint(receipt.checkpoint, log_key, witnesses=witnesses)
    if signed.checkpoint.size != receipt.size:
        raise tampered(
            "the receipt and its checkpoint have different sizes",
            where="receipt.size",
            found=str(receipt.size),
            wanted=str(signed.checkpoint.size),
        )
    verify_inclusion(leaf_hash(receipt.data), receipt.index, receipt.size, receipt.proof, signed.checkpoint.root)
    return Verified(leaves.parse(receipt.data), receipt.index, signed)


def verify_receipt(
    receipt: Receipt,
    log_key: Verifier,
    *,
    known: Checkpoint | None = None,
    consistency: Sequence[bytes] = (),
    witnesses: Sequence[Verifier] = (),
) -> Leaf:
    """Return the entry that `receipt` proves; see the module for the order of checks.

    `known` is a checkpoint that the caller remembers, `consistency` the proof from the smaller to the larger of the two
    sizes (empty if they are equal).

    Raises:
        TamperedError: (log-tampered) not proven, or the log's history is not the one that was seen before.
    """
    verified = check_receipt(receipt, log_key, witnesses=witnesses)
    if known is not None:
        verify_same_history(known, verified.signed.checkpoint, consistency)
    return verified.leaf


def verify_same_history(known: Checkpoint, other: Checkpoint, consistency: Sequence[bytes]) -> None:
    """Step 4: the smaller of two checkpoints is a prefix of the larger.

    Raises:
        TamperedError: (log-tampered) another log, or the history differs.
    """
    if known.origin != other.origin:
        raise tampered(
            "the receipt comes from another log", where="receipt.origin", found=other.origin, wanted=known.origin
        )
    old, new = (known, other) if known.size <= other.size else (other, known)
    verify_consistency(old.size, old.root, new.size, new.root, consistency, who="the remembered checkpoint")
