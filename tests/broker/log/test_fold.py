"""The fold: what entries add up to, what contradicts, and that undoing is exact."""

from __future__ import annotations

import copy
import dataclasses
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.broker.log import leaf as leaves
from cloister.broker.log.fold import AnswerCountRow, ContractRow, Fold, KeyRow, LeaseRow, RootRow, Spent, spent
from cloister.broker.log.leaf import Leaf
from cloister.crypto.keys import digest
from cloister.errors import TamperedError
from tests.broker.log.samples import CONTRACT, DATA, HOSPITAL, NEXT, NOW, OUT, VENDOR, release, story

STORY = story()
KINDS = [leaf.KIND for leaf in STORY]


def folded(*entries: Leaf) -> Fold:
    fold = Fold()
    for leaf in entries:
        fold.apply(leaf)
    return fold


def until(kind: str) -> list[Leaf]:
    """The story before the first entry of `kind`."""
    return STORY[: KINDS.index(kind)]


def test_the_story_adds_up() -> None:
    fold = folded(*until("lease-lost"))
    contract = fold.get(ContractRow, CONTRACT)
    assert contract is not None
    assert (contract.state, contract.entry, contract.state_entry) == ("active", 2, 5)
    root = fold.get(RootRow, "xray", "detector")
    assert root is not None
    assert (root.volume, root.generation, root.owner, root.lease) == (OUT, 1, "hospital", "l-1")
    assert fold.get(KeyRow, OUT, "hospital") is not None
    assert fold.get(KeyRow, DATA, HOSPITAL) is not None
    lease = fold.get(LeaseRow, "l-1")
    assert lease is not None
    assert (lease.entry, lease.renewed_entry, lease.lost) == (7, 8, False)
    assert fold.size == len(until("lease-lost"))
    assert fold.latest == NOW + timedelta(seconds=1)
    ended = folded(*STORY)
    assert ended.rows[LeaseRow]["l-1",].lost  # type: ignore[attr-defined]
    assert ended.active("xray") is None


def change(kind: str, **fields: object) -> Leaf:
    return dataclasses.replace(STORY[KINDS.index(kind)], **fields)  # type: ignore[arg-type]


CONTRADICTIONS: dict[str, tuple[list[Leaf], Leaf]] = {
    "epoch skipped": ([], change("epoch", number=2)),
    "epoch again": (STORY[:1], change("epoch", number=1)),
    "submitted twice": (until("contract-signed"), STORY[KINDS.index("contract-submitted")]),
    "signature for no contract": ([], change("contract-signed")),
    "signature after revocation": (STORY, change("contract-signed")),
    "active without submission": ([], change("contract-active")),
    "active without a signature": (until("contract-signed"), change("contract-active")),
    "active twice": (until("key-deposited"), change("contract-active")),
    "active under another name": (until("contract-active"), change("contract-active", name="other")),
    "active replaces what is not active": (until("contract-active"), change("contract-active", replaces=NEXT)),
    "revoked twice": (STORY, change("contract-revoked")),
    "release without a contract": ([], release()),
    "release before it is active": (until("contract-active"), release()),
    "release after revocation": (STORY, release("l-2")),
    "lease id twice": (until("denial"), release()),
    "renewal of no lease": (until("release"), change("lease-renewed")),
    "renewal of a lost lease": (STORY[:-1], change("lease-renewed")),
    "lost twice": (STORY[:-1], change("lease-lost")),
    "root without a lease": (until("release"), change("root-registered")),
    "root of an asset that is not written": (until("root-registered"), change("root-registered", asset="xrays")),
    "root of another contract": (until("root-registered"), change("root-registered", name="other")),
    "root over nothing that is there": (until("root-registered"), change("root-registered", previous=DATA)),
    "root that forgets the current one": (until("answer"), change("root-registered", volume=DATA, generation=2)),
    "root of the same generation": (until("answer"), change("root-registered", volume=DATA, previous=OUT)),
    "answers counted wrong": (until("answer"), change("answer", used=3)),
    "answers counted from nothing again": (until("answer-refused"), change("answer")),
    "answer without a contract": ([], change("answer")),
    "denial id twice": (until("root-registered"), change("denial")),
    "refusal under the id of a denial": (until("answer-refused"), change("answer-refused", id="d-0123456789ab")),
    "mark that stays": (STORY, change("collateral-marks")),
    "mark that goes back": (STORY, change("collateral-marks", marks=(leaves.Mark("crl/45", 6),))),
    "mark twice": ([], change("collateral-marks", marks=(leaves.Mark("crl/45", 6), leaves.Mark("crl/45", 7)))),
    "key opened that is not kept": (until("root-registered"), change("key-opened")),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_refused_and_changes_nothing(name: str) -> None:
    before, leaf = CONTRADICTIONS[name]
    fold = folded(*before)
    rows = copy.deepcopy(fold.rows)
    with pytest.raises(TamperedError) as refused:
        fold.apply(leaf)
    assert refused.value.code == "log-tampered"
    assert refused.value.reasons[0].where == f"fold.{leaf.KIND}"
    assert (fold.rows, fold.size) == (rows, len(before))


@given(st.integers(0, len(STORY)), st.integers(0, len(STORY)))
def test_undo_is_exact(kept: int, added: int) -> None:
    fold = folded(*STORY[:kept])
    size, latest, rows = fold.size, fold.latest, copy.deepcopy(fold.rows)
    changes = [change for leaf in STORY[kept : kept + added] for change in fold.apply(leaf)]
    fold.undo(changes, size=size, latest=latest)
    assert (fold.rows, fold.size, fold.latest) == (rows, size, latest)


def test_a_successor_replaces_the_active_contract() -> None:
    fold = folded(
        *until("key-deposited"),
        leaves.ContractSubmitted(time=NOW, contract=NEXT, name="xray", version=2, replaces=CONTRACT),
        leaves.ContractSigned(time=NOW, contract=NEXT, party=VENDOR, signature=digest(b"s")),
        leaves.ContractActive(time=NOW, contract=NEXT, name="xray", replaces=CONTRACT, signers=(VENDOR,)),
    )
    active, old = fold.active("xray"), fold.get(ContractRow, CONTRACT)
    assert active is not None
    assert active.contract == NEXT
    assert old is not None
    assert old.state == "replaced"
    with pytest.raises(TamperedError):
        fold.apply(release())


def test_the_id_of_a_forgotten_lease_may_come_again() -> None:
    for after, again in ((timedelta(hours=23), False), (timedelta(days=1, seconds=1), True)):
        fold = folded(*until("lease-renewed"))
        later = release().expires + after
        fold.apply(leaves.Epoch(time=later, number=2, software="", evidence="", tee="", hpke_key="", tls_key=""))
        if again:
            fold.apply(release(at=later))
        else:
            with pytest.raises(TamperedError):
                fold.apply(release(at=later))


def counted(day: str, used: int = 9, that_day: int = 4) -> AnswerCountRow:
    return AnswerCountRow(CONTRACT, "serve", "clinic", used, day, that_day, 0)


@pytest.mark.parametrize(
    ("today", "expected"),
    [
        (date(2026, 11, 20), Spent(9, 4)),
        (date(2026, 11, 21), Spent(9, 0)),
        (date(2026, 11, 19), Spent(9, 4)),
        (date(2025, 1, 1), Spent(9, 4)),
    ],
)
def test_a_clock_that_was_set_back_opens_no_new_day(today: date, expected: Spent) -> None:
    assert spent(counted("2026-11-20"), today) == expected
    assert spent(None, today) == Spent(0, 0)


def test_days_are_utc_days() -> None:
    fold = folded(*until("answer"))

    def answer(at: datetime, used: int) -> AnswerCountRow:
        fold.apply(change("answer", time=at, count=1, used=used))
        row = fold.get(AnswerCountRow, CONTRACT, "serve", "clinic")
        assert row is not None
        return row

    assert answer(datetime(2026, 11, 20, 23, 59, 59, tzinfo=UTC), 1).used_that_day == 1
    assert answer(datetime(2026, 11, 21, 0, 0, 0, tzinfo=UTC), 2).used_that_day == 1
    back = answer(datetime(2026, 11, 20, 0, 0, 0, tzinfo=UTC), 3)
    assert (back.day, back.used_that_day, back.used) == ("2026-11-21", 2, 3)
