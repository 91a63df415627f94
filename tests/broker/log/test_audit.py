"""Audits: what a sound log says, and each way in which one does not hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta

import pytest

from cloister.broker.log import leaf as leaves
from cloister.broker.log.audit import Report, audit
from cloister.broker.log.checkpoint import Checkpoint, add_lines
from cloister.broker.log.leaf import Leaf
from cloister.broker.log.receipt import Receipt
from cloister.broker.log.tree import Tree, leaf_hash
from cloister.errors import TamperedError
from tests.broker.log.samples import (
    LOG,
    NOW,
    OTHER,
    WITNESS,
    checkpoint_of,
    receipt_of,
    release,
    story,
    tree_of,
)

STORY = story()
TREE = tree_of(STORY)


def audited(
    entries: Sequence[Leaf],
    *,
    remembered: int | None = None,
    receipts: Sequence[Receipt] = (),
    of: Sequence[Leaf] = STORY,
) -> Report:
    """Audit `entries` under their own checkpoint, remembering the first `remembered` entries of `of`."""
    tree = tree_of(of)
    known = None if remembered is None else Checkpoint(LOG.name, remembered, tree.root(remembered))
    note = checkpoint_of(tree_of(entries))
    return audit([e.encode() for e in entries], note, LOG.verifier, remembered=known, receipts=receipts)


def test_a_sound_log_says_what_happened() -> None:
    note = add_lines(checkpoint_of(TREE), [WITNESS.line(Checkpoint(LOG.name, TREE.size, TREE.root()).body(), time=99)])
    receipts = [receipt_of(STORY, index, size) for index, size in ((0, 1), (7, 9), (7, 16), (15, 16))]
    report = audit(
        [entry.encode() for entry in STORY],
        note,
        LOG.verifier,
        remembered=Checkpoint(LOG.name, 8, TREE.root(8)),
        receipts=receipts,
        witnesses=[WITNESS.verifier],
    )
    assert report.checkpoint.size == len(STORY)
    assert report.counts["contract-signed"] == 2
    assert sum(report.counts.values()) == len(STORY)
    assert sum(report.new_counts.values()) == len(STORY) - 8
    assert "release" not in report.new_counts
    assert report.cosigned == ((WITNESS.name, 99),)
    assert report.soft == 4
    assert (report.epochs, report.receipts, report.since) == (1, 4, 8)
    assert (report.first, report.last) == (NOW, NOW + timedelta(seconds=1))
    assert report.as_json()["counts"]["release"] == 1


def test_an_empty_log_is_sound() -> None:
    report = audited([])
    assert (report.counts, report.first, report.clock_back_s) == ({}, None, 0.0)


def refused(*args: object, **rest: object) -> TamperedError:
    with pytest.raises(TamperedError) as error:
        audited(*args, **rest)  # type: ignore[arg-type]
    assert error.value.code == "log-tampered"
    return error.value


def test_an_edited_entry_is_another_history() -> None:
    edited = [*STORY[:9], dataclasses.replace(STORY[9], message="all is well"), *STORY[10:]]  # type: ignore[call-arg]
    audited(edited, remembered=9)
    error = refused(edited, remembered=12, receipts=[receipt_of(STORY, 3, 10), receipt_of(STORY, 9)])
    assert [reason.where for reason in error.reasons] == ["audit.remembered", "audit.receipt[0]", "audit.receipt[1]"]
    assert all(reason.hint == "history differs" for reason in error.reasons)


def test_entries_taken_away_are_missed() -> None:
    error = refused(STORY[:10], remembered=12, receipts=[receipt_of(STORY, 12, 13)])
    assert [reason.hint for reason in error.reasons] == ["entries were taken away"] * 2
    assert "10 entries" in error.reasons[0].found


def test_entries_that_are_not_the_checkpoints_are_refused() -> None:
    bodies = [entry.encode() for entry in STORY]
    for wrong in (bodies[:-1], [*bodies, bodies[0]], [*bodies[:4], bodies[3], *bodies[5:]]):
        with pytest.raises(TamperedError) as error:
            audit(wrong, checkpoint_of(TREE), LOG.verifier)
        assert "audit.entries" in {reason.where for reason in error.value.reasons}


def test_a_log_that_contradicts_itself_is_refused_with_the_entry() -> None:
    error = refused([*STORY[:7], release(), release(), *STORY[8:]])
    assert error.reasons[0].where == "audit.entry[8].fold.release"


def test_every_entry_that_does_not_parse_is_named() -> None:
    bodies = [entry.encode() for entry in STORY]
    bodies[2], bodies[5] = b"{}", b"\xff"
    tree = Tree(leaf_hash(body) for body in bodies)
    with pytest.raises(TamperedError) as error:
        audit(bodies, checkpoint_of(tree), LOG.verifier)
    wheres = {reason.where.split(".")[1] for reason in error.value.reasons}
    assert {"entry[2]", "entry[5]"} <= wheres


def test_a_receipt_of_another_log_is_refused() -> None:
    foreign = dataclasses.replace(receipt_of(STORY, 4), checkpoint=checkpoint_of(TREE, signer=OTHER))
    assert "audit.receipt[0]" in refused(STORY, receipts=[foreign]).reasons[0].where


def test_another_key_or_another_log_is_refused() -> None:
    with pytest.raises(TamperedError, match="not authentic"):
        audit([], checkpoint_of(tree_of([])), OTHER.verifier)
    known = Checkpoint("other.example", 1, TREE.root(1))
    with pytest.raises(TamperedError) as error:
        audit([e.encode() for e in STORY], checkpoint_of(TREE), LOG.verifier, remembered=known)
    assert error.value.reasons[0].hint == "this is another log"


def test_a_clock_that_goes_back_is_reported() -> None:
    back = leaves.LeaseRenewed(
        time=NOW - timedelta(seconds=90), lease="l-1", evidence=release().evidence, tee="tdx", expires=NOW
    )
    assert audited([*STORY[:8], back]).clock_back_s == 90.0


def test_keys_on_another_machine_than_before_are_named() -> None:
    """A GPU that moved to another CPU is another machine, too."""
    index = next(number for number, entry in enumerate(STORY) if isinstance(entry, leaves.Release))
    first = STORY[index]
    assert isinstance(first, leaves.Release)
    home, away, mixed = ("ppid:0a", "ueid:1"), ("ppid:0b", "ueid:2"), ("ppid:0a", "ueid:2")

    def again(number: int, machine: tuple[str, ...]) -> leaves.Release:
        return dataclasses.replace(first, lease=f"l-again-{number}", machine=machine)

    log: list[Leaf] = [*STORY[:index], dataclasses.replace(first, machine=home), again(1, home), again(2, away)]
    log += [again(3, away), again(4, mixed), again(5, ())]
    report = audited(log, of=log)
    assert [(one.entry - index, one.machine) for one in report.new_machines] == [(2, away), (4, mixed), (5, ())]
    assert report.as_json()["new_machines"][0]["machine"] == list(away)
    assert "ppid:0b, ueid:2" in str(report.new_machines[0])
    assert "no id" in str(report.new_machines[2])
    # what was seen at the last audit is not told again
    assert [one.entry for one in audited(log, of=log, remembered=index + 5).new_machines] == [index + 5]
    assert [one.entry - index for one in audited(log, of=log, remembered=index + 3).new_machines] == [4, 5]
