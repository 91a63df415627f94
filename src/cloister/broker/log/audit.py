"""Audit a whole log: is it one history, does it hold everything that we were told, what does it say? Pure.

Steps; the findings of all of them are reported together:
  1 head        the checkpoint is signed by the log (and by which known witnesses)       C2SP tlog-checkpoint
  2 entries     the entries have the checkpoint's size and root; none is missing         RFC 6962 2.1
  3 remember    the log that we remember is the beginning of this one                    RFC 6962 2.1.2
  4 sense       every entry parses strictly and none contradicts the ones before it      fold.py
  5 receipts    each receipt is authentic, and its entry stands where it says, unchanged
Steps 2 to 5 need only bytes, so they run anywhere. Whether a release was right under its contract is a question to
`contract.decide` with the entry's own fields; this module says what was decided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from cloister.broker.log import leaf as leaves
from cloister.broker.log.checkpoint import Checkpoint, SignedCheckpoint, open_checkpoint
from cloister.broker.log.fold import EpochRow, Fold
from cloister.broker.log.leaf import Leaf
from cloister.broker.log.receipt import Receipt, check_receipt
from cloister.broker.log.tree import Tree, leaf_hash
from cloister.crypto.note import Verifier
from cloister.errors import Reason, TamperedError


@dataclass(frozen=True, slots=True)
class NewMachine:
    """Keys went to a machine (a CPU with just these devices) that had none of this contract and phase before."""

    entry: int
    contract: str
    phase: str
    machine: tuple[str, ...]

    def __str__(self) -> str:
        return f"entry {self.entry}: {self.phase} of {self.contract[:19]}… on a machine not seen there before: " + (
            ", ".join(name if len(name) <= 60 else f"{name[:59]}…" for name in self.machine) or "one that shows no id"
        )


@dataclass(frozen=True, slots=True)
class Report:
    """What a sound log says. `counts` has every kind, `new_counts` only entries after the remembered size.

    `soft` counts entries that rest on software evidence, which protects nothing. `clock_back_s` is the largest step
    backwards between the times of two neighbours, in seconds. `new_machines` are entries after the remembered size; the first
    machine of a contract and phase is none.
    """

    checkpoint: Checkpoint
    cosigned: tuple[tuple[str, int], ...]
    since: int
    counts: Mapping[str, int]
    new_counts: Mapping[str, int]
    soft: int
    epochs: int
    receipts: int
    first: datetime | None
    last: datetime | None
    clock_back_s: float
    new_machines: tuple[NewMachine, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "origin": self.checkpoint.origin,
            "size": self.checkpoint.size,
            "root": self.checkpoint.root.hex(),
            "cosigned": [{"witness": name, "time": time} for name, time in self.cosigned],
            "since": self.since,
            "counts": dict(self.counts),
            "new_counts": dict(self.new_counts),
            "soft": self.soft,
            "epochs": self.epochs,
            "receipts": self.receipts,
            "first": leaves.format_time(self.first) if self.first else "",
            "last": leaves.format_time(self.last) if self.last else "",
            "clock_back_s": self.clock_back_s,
            "new_machines": [
                {"entry": one.entry, "contract": one.contract, "phase": one.phase, "machine": list(one.machine)}
                for one in self.new_machines
            ],
        }


def audit(
    entries: Sequence[bytes],
    checkpoint: bytes,
    log_key: Verifier,
    *,
    remembered: Checkpoint | None = None,
    receipts: Sequence[Receipt] = (),
    witnesses: Sequence[Verifier] = (),
) -> Report:
    """Return what the log of all `entries` (canonical JSON, from index 0) under `checkpoint` (a signed note) says.

    Raises:
        TamperedError: (log-tampered) with every finding; see the module for the steps.
    """
    signed = open_checkpoint(checkpoint, log_key, witnesses=witnesses)
    tree = Tree(leaf_hash(body) for body in entries)
    reasons = _check_tree(tree, signed.checkpoint, remembered)
    fold, parsed, wrong = _fold(entries)
    reasons += wrong
    for number, receipt in enumerate(receipts):
        reasons += _check_receipt(number, receipt, tree, log_key)
    if reasons:
        raise TamperedError(
            f"the log does not hold: {reasons[0]}" + (f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""),
            code="log-tampered",
            reasons=reasons,
            hint="keep the receipts and both checkpoints: together they prove it to others",
        )
    return _report(signed, parsed, fold, remembered, len(receipts))


def _check_tree(tree: Tree, head: Checkpoint, remembered: Checkpoint | None) -> list[Reason]:
    """Steps 2 and 3."""
    reasons = []
    if tree.size != head.size:
        reasons.append(Reason("audit.entries", f"{tree.size} entries", f"{head.size}, as the checkpoint says"))
    elif tree.root() != head.root:
        reasons.append(Reason("audit.entries", f"root {tree.root().hex()}", f"root {head.root.hex()}"))
    if remembered is None:
        return reasons
    if remembered.origin != head.origin:
        reasons.append(Reason("audit.remembered", head.origin, remembered.origin, "this is another log"))
    elif remembered.size > tree.size:
        reasons.append(
            Reason("audit.remembered", f"{tree.size} entries", f"at least {remembered.size}", "entries were taken away")
        )
    elif tree.root(remembered.size) != remembered.root:
        found = f"root {tree.root(remembered.size).hex()} at size {remembered.size}"
        reasons.append(Reason("audit.remembered", found, f"root {remembered.root.hex()}", "history differs"))
    return reasons


def _fold(entries: Sequence[bytes]) -> tuple[Fold, list[Leaf], list[Reason]]:
    """Step 4. Entries after the first that makes no sense are still parsed, but not folded."""
    fold, parsed, reasons = Fold(), list[Leaf](), list[Reason]()
    for index, body in enumerate(entries):
        try:
            leaf = leaves.parse(body)
            parsed.append(leaf)
            if fold.size == index:
                fold.apply(leaf)
        except TamperedError as error:
            reasons += [Reason(f"audit.entry[{index}].{r.where}", r.found, r.wanted, r.hint) for r in error.reasons]
    return fold, parsed, reasons


def _check_receipt(number: int, receipt: Receipt, tree: Tree, log_key: Verifier) -> list[Reason]:
    """Step 5."""
    where = f"audit.receipt[{number}]"
    try:
        root = check_receipt(receipt, log_key).signed.checkpoint.root
    except TamperedError as error:
        return [Reason(f"{where}.{r.where}", r.found, r.wanted, r.hint) for r in error.reasons]
    if receipt.size > tree.size:
        return [Reason(where, f"{tree.size} entries", f"at least {receipt.size}", "entries were taken away")]
    if tree.leaf(receipt.index) != leaf_hash(receipt.data):
        return [Reason(where, f"another entry {receipt.index}", "the entry of the receipt", "history differs")]
    if tree.root(receipt.size) != root:
        found = f"root {tree.root(receipt.size).hex()} at size {receipt.size}"
        return [Reason(where, found, f"root {root.hex()}", "history differs")]
    return []


def _report(
    signed: SignedCheckpoint, parsed: Sequence[Leaf], fold: Fold, remembered: Checkpoint | None, receipts: int
) -> Report:
    since = remembered.size if remembered else 0
    steps = [(before.time - after.time).total_seconds() for before, after in pairwise(parsed)]
    return Report(
        checkpoint=signed.checkpoint,
        cosigned=signed.cosigned,
        since=since,
        counts=_count(parsed),
        new_counts=_count(parsed[since:]),
        soft=sum(leaf.soft for leaf in parsed),
        epochs=len(fold.rows[EpochRow]),
        receipts=receipts,
        first=parsed[0].time if parsed else None,
        last=parsed[-1].time if parsed else None,
        clock_back_s=max(0.0, *steps) if steps else 0.0,
        new_machines=tuple(one for one in _new_machines(parsed) if one.entry >= since),
    )


def _new_machines(parsed: Sequence[Leaf]) -> Iterator[NewMachine]:
    seen: dict[tuple[str, str], set[tuple[str, ...]]] = {}
    for entry, leaf in enumerate(parsed):
        if not isinstance(leaf, leaves.Release):
            continue  # a renewal is on the machine of its release, or refused
        known = seen.setdefault((leaf.contract, leaf.phase), set())
        if known and leaf.machine not in known:
            yield NewMachine(entry, leaf.contract, leaf.phase, leaf.machine)
        known.add(leaf.machine)


def _count(parsed: Sequence[Leaf]) -> Mapping[str, int]:
    found = Counter(leaf.KIND for leaf in parsed)
    return MappingProxyType({kind: found[kind] for kind in leaves.KINDS if found[kind]})
