"""Entries: every kind reads back, canonically, and one fault refuses it."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from cloister.broker.log import leaf as leaves
from cloister.broker.log.leaf import Leaf, clip, parse
from cloister.errors import Reason, TamperedError
from tests.broker.log.samples import CONTRACT, NOW, REASON, release, story

STORY = story()
IDS = [leaf.KIND for leaf in STORY]


def test_the_samples_hold_every_kind() -> None:
    assert set(IDS) == set(leaves.KINDS)


@pytest.mark.parametrize("leaf", STORY, ids=IDS)
def test_every_kind_reads_back_in_canonical_form(leaf: Leaf) -> None:
    data = leaf.encode()
    assert parse(data) == leaf
    assert leaves.parse_own(data) == leaf
    assert data == rfc8785.dumps(leaf.as_json())
    assert json.loads(data)["kind"] == leaf.KIND


texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp", "Co", "Cn", "Zs"]), max_size=300)


@given(st.lists(st.tuples(texts, texts, texts, texts), max_size=8))
def test_the_fast_encoder_is_rfc_8785_for_any_text(reasons: list[tuple[str, str, str, str]]) -> None:
    leaf = leaves.LeaseLost(time=NOW, lease="l-1", reasons=tuple(Reason(*r) for r in reasons))
    assert leaf.encode() == rfc8785.dumps(leaf.as_json())
    assert parse(leaf.encode()) == leaf


@given(st.lists(st.builds(Reason, *[st.text(max_size=700)] * 4), max_size=40))
def test_clipped_reasons_always_fit_an_entry(reasons: list[Reason]) -> None:
    leaf = leaves.LeaseLost(time=NOW, lease="l-1", reasons=clip(reasons))
    assert len(leaf.encode()) <= leaves.MAX_BYTES
    assert len(leaf.reasons) == min(len(reasons), leaves.MAX_REASONS)


def test_the_largest_denial_fits() -> None:
    widest = "\U0001f600" * 10_000
    leaf = leaves.LeaseLost(time=NOW, lease="l-1", reasons=clip([Reason(widest, widest, widest, widest)] * 99))
    assert len(leaf.encode()) <= leaves.MAX_BYTES
    assert leaf.reasons[-1].found == "68 more reasons"


@pytest.mark.parametrize("leaf", STORY, ids=IDS)
def test_unknown_missing_and_ill_formed_fields_are_refused(leaf: Leaf) -> None:
    good = leaf.as_json()
    ill_formed: list[Any] = [None, 1.5, [[]], {"a": 1}, "\n", "x" * 5000]
    bad: list[dict[str, Any]] = [
        {**good, "extra": ""},
        {**good, "v": 2},
        {**good, "v": True},
        {**good, "kind": "other"},
    ]
    for name in good:
        bad.append({key: value for key, value in good.items() if key != name})
        bad += [{**good, name: wrong} for wrong in ill_formed]
    for value in bad:
        with pytest.raises(TamperedError):
            parse(rfc8785.dumps(value))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b" ",
        lambda data: b" " + data,
        lambda data: data.replace(b":", b": ", 1),
        lambda data: data.replace(b'"v":1', b'"v":1.0'),
        lambda data: data.replace(b'"v":1', b'"v":1,"v":1'),
        lambda data: data.replace(b"release", b"\\u0072elease"),
        lambda data: data.replace(b"sha256:", b"SHA256:", 1),
        lambda data: data.replace(b"123456Z", b"123456z"),
        lambda data: data.replace(b"123456Z", b"123Z"),
        lambda data: data.replace(b"2026-11-20T", b"2026-13-20T"),
        lambda data: data[:-1],
        lambda _: b"",
        lambda _: b"[]",
        lambda _: b"1",
        lambda _: b"[" * 100_000,
        lambda _: b"\xff",
    ],
)
def test_another_spelling_is_refused(change: Any) -> None:
    data = release().encode()
    assert change(data) != data
    with pytest.raises(TamperedError) as refused:
        parse(change(data))
    assert refused.value.code == "log-tampered"


def test_building_an_entry_names_every_wrong_field() -> None:
    with pytest.raises(ValueError, match=r"contract wants .*; phase wants .*; count wants"):
        leaves.Answer(time=NOW, contract="c", phase="", party="p", count=-1, used=1, lease="", query="", answer="")


def test_times_are_utc_and_exact() -> None:
    east = NOW.astimezone(timezone(timedelta(hours=9)))
    assert leaves.format_time(east) == leaves.format_time(NOW) == "2026-11-20T09:30:00.123456Z"
    assert leaves.parse_time("2026-11-20T09:30:00.123456Z") == NOW
    with pytest.raises(ValueError):
        leaves.format_time(datetime(2026, 1, 1))  # noqa: DTZ001  (the mistake under test)


@given(st.datetimes(min_value=datetime(1000, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001
def test_times_read_back(moment: datetime) -> None:
    assert leaves.parse_time(leaves.format_time(moment)) == moment


def test_counters_are_strings_beyond_what_json_numbers_hold() -> None:
    leaf = leaves.Answer(
        time=NOW, contract=CONTRACT, phase="serve", party="p", count=1, used=2**53 + 1, lease="", query="", answer=""
    )
    assert json.loads(leaf.encode())["used"] == str(2**53 + 1)
    assert parse(leaf.encode()) == leaf
    with pytest.raises(ValueError):
        dataclasses.replace(leaf, used=10**18)


def test_software_evidence_says_so() -> None:
    assert release().soft
    assert not dataclasses.replace(release(), tee="tdx").soft
    assert not leaves.LeaseLost(time=NOW, lease="l-1", reasons=(REASON,)).soft


def test_the_format_page_lists_every_kind_and_field() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "format" / "log.md").read_text()
    for cls in leaves.KINDS.values():
        row = next((line for line in page.splitlines() if line.startswith(f"| `{cls.KIND}` |")), "")
        missing = [f.name for f in dataclasses.fields(cls) if f.name != "time" and f"`{f.name}`" not in row]
        assert row, f"{cls.KIND} is not on the page"
        assert not missing, f"{cls.KIND}: {missing}"
