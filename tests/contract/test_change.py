"""New versions: what differs, who must agree, and what new code inherits before the owners sign again."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.contract import Contract, State, decide, parse
from cloister.contract.change import Verdict, diff, replacement, subjects, successor
from cloister.errors import Reason
from tests.contract.samples import NAMES, allowed, changed, edited, example

XRAY, BANKS, ACME = NAMES
PROPOSED = datetime(2027, 1, 10, 8, 0, tzinfo=UTC)
THREE: Mapping[str, bool] = {"north": True, "south": True, "vendor": True}
SCORER = ("11223344556677889900aabbccddeeff11223344556677889900aabbccddeeff", "22" * 32)
REFINER = ("aa3d5b6f0e2a4c6d8e0f1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6f", "33" * 32)
TRAINER = ("8c3d5b6f0e2a4c6d8e0f1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6f", "44" * 32)
OLD_ID = "sha256:9b74c9897bac770ffc029102a200c5de9b74c9897bac770ffc029102a200c5de"


def following(old: Contract, *replacements: tuple[str, str], version: int = 5) -> Contract:
    """Version 5 of the two banks' contract."""
    lineage = (("version  = 4", f"version  = {version}"), (OLD_ID, old.id))
    return parse(edited(BANKS, *lineage, *replacements), name="next.toml")


def judged(
    *replacements: tuple[str, str], votes: Mapping[str, bool] = THREE, hours: float = 73, old: Contract | None = None
) -> Verdict:
    old = old or example(BANKS)
    return successor(
        old, following(old, *replacements), votes, now=PROPOSED + timedelta(hours=hours), proposed_at=PROPOSED
    )


def only(reasons: tuple[Reason, ...]) -> Reason:
    assert len(reasons) == 1, [str(reason) for reason in reasons]
    return reasons[0]


def test_a_new_scorer_inherits_the_model() -> None:
    verdict = judged(SCORER)
    assert verdict.allowed
    assert verdict.phases == {"serve"}
    assert verdict.inherits == {"fraud-net"}
    assert verdict.not_inherited == ()


def test_a_new_refiner_inherits_model_and_stream() -> None:
    verdict = judged(REFINER, SCORER)
    assert verdict.phases == {"refine", "serve"}
    assert verdict.inherits == {"fraud-net", "north-new"}


def test_a_new_trainer_inherits_nothing_until_the_banks_sign() -> None:
    verdict = judged(TRAINER)
    assert verdict.allowed
    assert verdict.phases == verdict.inherits == frozenset()
    reason = only(verdict.not_inherited)
    assert reason.found == "phase train reads north-tx, south-tx"
    assert reason.hint == "waiting for new signatures of north, south"


def test_two_votes_are_not_three() -> None:
    reason = only(judged(SCORER, votes={"north": True, "vendor": True}).reasons)
    assert (reason.where, reason.found) == ("board", "2 of 3 votes (north, vendor)")


def test_a_veto_ends_it() -> None:
    verdict = judged(SCORER, votes={"north": True, "south": False, "vendor": True, "auditor": True})
    assert only(verdict.reasons) == Reason("board.veto", "south", "no veto")


def test_the_no_of_a_member_without_veto_is_one_vote_less() -> None:
    assert judged(SCORER, votes={**THREE, "auditor": False}).allowed


def test_votes_of_strangers_do_not_count() -> None:
    verdict = judged(SCORER, votes={"north": True, "vendor": True, "eve": True, "clinic": True})
    assert only(verdict.reasons).where == "board"


@pytest.mark.parametrize(("hours", "ok"), [(71.999, False), (72, True), (0, False), (-1, False)])
def test_the_wait_is_over_to_the_second(hours: float, ok: bool) -> None:
    verdict = judged(SCORER, hours=hours)
    assert verdict.allowed is ok
    if not ok:
        assert only(verdict.reasons).where == "board.wait"


@pytest.mark.parametrize(
    ("replacements", "where", "found"),
    [
        (
            [('eeff", sandbox = "one-shot"', 'eeff", sandbox = "none"')],
            "change.successor.same",
            "sandbox of scorer differs (one-shot -> none)",
        ),
        (
            [('scorer  = { owner = "vendor"', 'scorer  = { owner = "north"')],
            "change.successor.same",
            "owner of scorer differs (vendor -> north)",
        ),
        (
            [('run    = "scorer"', 'run    = "refiner"'), SCORER],
            "change.successor.same",
            "phase serve runs refiner, was scorer",
        ),
        (
            [SCORER, ("per_day = 50_000", "per_day = 50_001")],
            "change.successor",
            "phase.serve.answer.per_day: 50000 -> 50001 differs",
        ),
        (
            [SCORER, ("decimals = 2, ", "")],
            "change.successor",
            "phase.serve.answer.decimals: 2 -> nothing differs",
        ),
        (
            [SCORER, ('min_tcb = "2026-08"', 'min_tcb = "2026-07"')],
            "change.successor",
            "place.enclave.min_tcb: 2026-08 -> 2026-07 differs",
        ),
        ([SCORER, ("2027-12-31", "2028-01-01")], "change.successor", "expires: 2027-12-31 -> 2028-01-01 differs"),
        ([SCORER, ("need = 3", "need = 2")], "change.successor", "board.board.need: 3 -> 2 differs"),
        ([SCORER, ('wait = "72h"', 'wait = "1h"')], "change.successor", "board.board.wait: 72h -> 1h differs"),
        (
            [SCORER, ('keeps = ["fraud-net", "north-new"] ', 'keeps = ["fraud-net", "north-new", "north-tx"]')],
            "change.successor",
            "change.successor.keeps: fraud-net, north-new -> fraud-net, north-new, north-tx differs",
        ),
        ([], "change.successor.of", "no code differs"),
    ],
)
def test_a_change_beyond_new_code_needs_everybody(replacements: list[tuple[str, str]], where: str, found: str) -> None:
    verdict = judged(*replacements)
    assert (where, found) in [(reason.where, reason.found) for reason in verdict.reasons]
    assert verdict.phases == verdict.inherits == frozenset()


def test_a_shorter_life_is_no_obstacle() -> None:
    assert judged(SCORER, ("2027-12-31", "2027-12-30")).allowed


def test_what_same_does_not_pin_may_differ() -> None:
    loose = ('same  = ["owner", "sandbox", "phase"]', "same  = []")
    old = changed(BANKS, loose)
    sandbox = ('eeff", sandbox = "one-shot"', 'eeff", sandbox = "offline"')
    assert judged(loose, sandbox, old=old).allowed
    moved = judged(loose, ('run    = "scorer"', 'run    = "refiner"'), SCORER, old=old)
    assert moved.allowed
    assert moved.phases == {"serve"}


def test_code_outside_of_is_no_successor() -> None:
    narrow = ('of    = ["trainer", "refiner", "scorer"]', 'of    = ["refiner"]')
    verdict = judged(narrow, SCORER, old=changed(BANKS, narrow))
    assert only(verdict.reasons).where == "change.successor.of"


def test_new_and_removed_code_is_beyond_the_rule() -> None:
    extra = ("[data]\n", f'spare = {{ owner = "vendor", digest = "sha256:{"5" * 64}" }}\n[data]\n')
    for old, more in ((example(BANKS), (extra,)), (changed(BANKS, extra), ())):
        new = parse(edited(BANKS, ("version  = 4", "version  = 5"), (OLD_ID, old.id), SCORER, *more), name="n.toml")
        verdict = successor(old, new, THREE, now=PROPOSED + timedelta(days=9), proposed_at=PROPOSED)
        assert {reason.where for reason in verdict.reasons} == {"change.successor"}


def test_without_a_rule_nothing_is_inherited() -> None:
    old = example(XRAY)
    new = parse(
        edited(XRAY, ("version  = 1", f'version  = 2\nreplaces = "{old.id}"'), (SCORER[0], SCORER[1])), name="n.toml"
    )
    verdict = successor(old, new, {"hospital": True, "vendor": True}, now=PROPOSED, proposed_at=PROPOSED)
    assert not verdict.allowed
    assert verdict.reasons[-1].found == "no such rule"


def test_lineage_is_strict() -> None:
    old = example(BANKS)
    now = PROPOSED + timedelta(days=9)
    for new, where in (
        (following(old, SCORER, version=4), "version"),
        (following(old, SCORER, version=6), "version"),
        (changed(BANKS, ("version  = 4", "version  = 5"), SCORER), "replaces"),
        (following(old, SCORER, ('contract = "fraud-two-banks"', 'contract = "fraud-three-banks"')), "contract"),
    ):
        for judge in (successor, replacement):
            assert where in {reason.where for reason in judge(old, new, THREE, now=now, proposed_at=PROPOSED).reasons}


def test_times_need_a_zone() -> None:
    naive = datetime(2027, 1, 1)  # noqa: DTZ001  # what must be refused
    for judge in (successor, replacement):
        with pytest.raises(ValueError, match="time zone"):
            judge(example(BANKS), example(BANKS), {}, now=naive, proposed_at=PROPOSED)


def test_an_inherited_phase_runs_before_the_owners_sign_and_no_other_does() -> None:
    old = example(BANKS)
    new = following(old, SCORER)
    state = State(signed=frozenset({"vendor"}), inherited=judged(SCORER).phases)
    for case in allowed(new):
        decision = decide(new, case.request, state)
        if case.request.phase == "serve":
            assert decision.allowed
        else:
            assert [reason.where for reason in decision.reasons] == ["signatures"]


def test_more_yes_votes_never_hurt_and_a_veto_never_helps() -> None:
    people = ("north", "south", "vendor", "auditor")

    @given(st.dictionaries(st.sampled_from(people), st.booleans()), st.sampled_from(people))
    def check(votes: dict[str, bool], party: str) -> None:
        before = judged(SCORER, votes=votes).allowed
        assert judged(SCORER, votes={**votes, party: True}).allowed >= before
        assert judged(SCORER, votes={**votes, party: False}).allowed <= before
        expected = sum(votes.values()) >= 3 and votes.get("north") is not False and votes.get("south") is not False
        assert before is expected

    check()


# replacement: who the old version names in `change`


@pytest.mark.parametrize(
    ("replacements", "expected"),
    [
        ([SCORER], ("code",)),
        ([('min_tcb = "2026-08"', 'min_tcb = "2026-09"')], ("place",)),
        ([("workers = 4", "workers = 5")], ("default",)),
        (
            [SCORER, ('min_tcb = "2026-08"', 'min_tcb = "2026-09"'), ("workers = 4", "workers = 5")],
            ("default", "code", "place"),
        ),
        ([], ()),
    ],
)
def test_each_kind_of_change_asks_its_authority(replacements: list[tuple[str, str]], expected: tuple[str, ...]) -> None:
    old = example(BANKS)
    assert subjects(old, following(old, *replacements)) == expected


def test_replacement_asks_parties_board_or_both() -> None:
    old, now = example(BANKS), PROPOSED + timedelta(hours=73)

    def reasons(*replacements: tuple[str, str], votes: Mapping[str, bool]) -> list[str]:
        verdict = replacement(old, following(old, *replacements), votes, now=now, proposed_at=PROPOSED)
        assert verdict.phases == frozenset()
        return [str(reason) for reason in verdict.reasons]

    assert reasons(SCORER, votes=THREE) == []
    assert reasons(("workers = 4", "workers = 5"), votes={"north": True, "south": True}) == []
    place = ('min_tcb = "2026-08"', 'min_tcb = "2026-09"')
    assert reasons(place, votes={"north": True}) == [
        "change.default: wants north and south, found north agreed (waiting for south)"
    ]
    assert reasons(SCORER, place, votes={"north": True, "vendor": True, "auditor": True}) == [
        "change.default: wants north and south, found north agreed (waiting for south)",
    ]
    assert reasons(votes={}) == [
        "change.default: wants north and south, found nobody agreed (waiting for north, south)"
    ]


# diff


def test_formatting_comments_and_spelled_out_defaults_are_no_difference() -> None:
    old = example(XRAY)
    new = changed(XRAY, ("version  = 1", "version = 1   # one"), ('kind = "tee",', 'kind = "tee", debug = false,'))
    assert old.id != new.id
    assert diff(old, new) == ()


def test_differences_have_paths_and_values_as_the_language_writes_them() -> None:
    old = example(ACME)
    new = changed(
        ACME,
        ('size    = { model = "64 MiB" }', 'size    = { model = "1536 KiB" }'),
        ('every = "50ms"', 'every = "1500ms"'),
        ('pad = "1 KiB"', 'pad = "1000 B"'),
        ("secret = true", "secret = false"),
        ('accept = ["tdx", "sev-snp", "sgx"]', 'accept = ["tdx"]'),
        (', min_tcb = "2026-08"', ""),
    )
    assert [str(difference) for difference in diff(old, new)] == [
        "code.automl.secret: true -> false",
        "place.enclave.accept: tdx, sev-snp, sgx -> tdx",
        "place.enclave.min_tcb: 2026-08 -> nothing",
        "phase.train.size.model: 64 MiB -> 1536 KiB",
        "phase.serve.answer.pad: 1 KiB -> 1000 B",
        "phase.serve.answer.every: 50ms -> 1500ms",
    ]
    assert {(back.path, back.new, back.old) for back in diff(new, old)} == {
        (there.path, there.old, there.new) for there in diff(old, new)
    }
