"""Budgets: exactly what the contract grants, however many ask at once."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest

from cloister.broker.log import leaf as leaves
from cloister.broker.log.fold import Spent
from cloister.broker.store.ledger import Granted, Ledger, Pending
from cloister.errors import CloisterError, DeniedError
from tests.broker.store.life import CONTRACT, NOW, activate


def ask(
    ledger: Ledger,
    number: int,
    *,
    budget: int | None = None,
    per_day: int | None = None,
    now: datetime = NOW,
    count: int = 1,
    party: str = "clinic",
) -> Pending[Granted]:
    return ledger.answer(
        contract=CONTRACT,
        phase="serve",
        party=party,
        budget=budget,
        per_day=per_day,
        now=now,
        denial=f"d-{number}",
        count=count,
    )


def test_a_raced_budget_of_500_gives_exactly_500(ledger: Ledger) -> None:
    activate(ledger)
    granted: list[int] = []
    refused: list[CloisterError] = []
    start = threading.Barrier(8)

    def consumer(number: int) -> None:
        start.wait()
        for step in range(100):
            try:
                granted.append(ask(ledger, number * 1000 + step, budget=500).result(60).spent.used)
            except DeniedError as error:
                refused.append(error)

    threads = [threading.Thread(target=consumer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(granted) == list(range(1, 501))
    assert {error.code for error in refused} == {"budget-spent"}
    assert len(refused) == 300
    kinds = [leaf.KIND for leaf in map(ledger.leaf, range(ledger.size))]
    assert (kinds.count("answer"), kinds.count("answer-refused")) == (500, 300)
    assert ledger.answers_spent(CONTRACT, "serve", "clinic", now=NOW) == Spent(500, 500)


@pytest.mark.parametrize(("count", "fits"), [(1, True), (2, True), (3, False)])
def test_the_last_answers_fit_exactly(ledger: Ledger, count: int, fits: bool) -> None:
    activate(ledger)
    ask(ledger, 0, budget=10, count=8).result(30)
    if fits:
        assert ask(ledger, 1, budget=10, count=count).result(30).spent.used == 8 + count
    else:
        with pytest.raises(DeniedError):
            ask(ledger, 1, budget=10, count=count).result(30)
        assert ledger.answers_spent(CONTRACT, "serve", "clinic", now=NOW).used == 8


def test_a_refusal_names_every_limit_and_is_logged_under_its_id(ledger: Ledger) -> None:
    activate(ledger)
    ask(ledger, 0, count=5).result(30)
    with pytest.raises(DeniedError) as refused:
        ask(ledger, 77, budget=5, per_day=3).result(30)
    assert [(reason.where, reason.found, reason.wanted) for reason in refused.value.reasons] == [
        ("phase.serve.answer.budget", "5 used, 1 asked for", "at most 5"),
        ("phase.serve.answer.per_day", "5 used, 1 asked for", "at most 3"),
    ]
    assert refused.value.denial_id == "d-77"
    found = ledger.denial("d-77")
    assert found is not None
    assert isinstance(found[1], leaves.AnswerRefused)
    assert found[1].reasons == refused.value.reasons


def test_a_day_is_a_utc_day_and_never_begins_twice(ledger: Ledger) -> None:
    activate(ledger)
    midnight = datetime(2026, 11, 21, tzinfo=UTC)
    late = midnight - timedelta(microseconds=1)
    for number in range(3):
        ask(ledger, number, per_day=3, now=late).result(30)
    with pytest.raises(DeniedError):
        ask(ledger, 3, per_day=3, now=late).result(30)
    assert ask(ledger, 4, per_day=3, now=midnight).result(30).spent == Spent(4, 1)
    with pytest.raises(DeniedError):
        ask(ledger, 5, per_day=1, now=late).result(30)
    assert ledger.answers_spent(CONTRACT, "serve", "clinic", now=late).used_today == 1


def test_parties_have_their_own_counts(ledger: Ledger) -> None:
    activate(ledger)
    ask(ledger, 0, budget=1).result(30)
    assert ask(ledger, 1, budget=1, party="other").result(30).spent.used == 1
    with pytest.raises(DeniedError):
        ask(ledger, 2, budget=1).result(30)
