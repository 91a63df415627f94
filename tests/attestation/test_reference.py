"""Reference values: what is written reads back, one fault each, and an entry without rules accepts nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.attestation import reference
from cloister.attestation.appraise import appraise
from cloister.attestation.reference import Document, Workload, decode, of_claims
from cloister.attestation.types import LogRule, Software
from cloister.crypto.canonical import json_decode, json_encode
from cloister.testkit.softtee import MEASUREMENT, NOW, soft_claims, soft_policy

from .helpers import refusal, value_or_malformed

EXACT = Software("image-7", "tdx", {"mrtd": frozenset({MEASUREMENT, bytes(48)})})
SIGNER = Software("enclave", "sgx", {"mrsigner": frozenset({bytes(32)})}, {"isvprodid": 3}, {"isvsvn": 7})
LOG = Software(
    "boot", "", {}, {}, {}, (LogRule(1, frozenset({bytes(48)}), "", True), LogRule(2, frozenset({b"d" * 48}), "EV_IPL"))
)
GOOD = Document(
    "node-image",
    7,
    NOW - timedelta(days=1),
    NOW + timedelta(days=90),
    (EXACT, SIGNER, LOG),
    (Workload("train.py", "sha256:" + "1" * 64),),
)


def test_what_is_written_reads_back_and_has_one_encoding() -> None:
    assert decode(GOOD.encode()) == GOOD
    assert decode(GOOD.encode()).encode() == GOOD.encode()
    assert reference.digest(GOOD.encode()).startswith("sha256:")


def _changed(**change: Any) -> bytes:
    value = json_decode(GOOD.encode())
    return json_encode({name: each for name, each in (value | change).items() if each != "<absent>"})


def _software(**change: Any) -> bytes:
    value = json_decode(GOOD.encode())
    first = value["software"][0] | change
    return _changed(software=[{name: each for name, each in first.items() if each != "<absent>"}])


RULE = {"register": 1, "type": "", "only": False, "digests": ["00" * 48]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[" * 5000,
        GOOD.encode() + b" ",
        _changed(v=2),
        _changed(v="<absent>"),
        _changed(extra=1),
        _changed(name=""),
        _changed(name="a b"),
        _changed(name=7),
        _changed(serial=0),
        _changed(serial=True),
        _changed(serial=1.5),
        _changed(issued="2026-11-20"),
        _changed(issued=5),
        _changed(until="2026-11-01T00:00:00Z"),
        _changed(until="2126-11-01T00:00:00Z"),
        _changed(software={}),
        _changed(software=[], workloads=[]),
        _changed(software=[1]),
        _changed(workloads=[{"label": "x", "code": "sha256:1"}]),
        _changed(workloads=[{"label": "x", "code": "sha256:" + "1" * 64, "more": 1}]),
        _software(label="<absent>"),
        _software(label=""),
        _software(tee="TDX"),
        _software(measurements={}),
        _software(measurements={"mrtd": []}),
        _software(measurements={"mrtd": ["zz"]}),
        _software(measurements={"mrtd": ["00" * 15]}),
        _software(measurements={"mrtd": ["00" * 65]}),
        _software(measurements={"mrtd": ["AA" * 48]}),
        _software(measurements={"MRTD": ["00" * 48]}),
        _software(measurements={"mrtd": "00" * 48}),
        _software(svns_equal={"isvprodid": -1}),
        _software(svns_least={"isvsvn": True}),
        _software(log=[RULE | {"register": 24}]),
        _software(log=[RULE | {"register": True}]),
        _software(log=[RULE | {"digests": []}]),
        _software(log=[RULE | {"only": 1}]),
        _software(log=[RULE | {"only": True, "type": "EV_IPL"}]),
        _software(log=[RULE | {"type": "\x1b"}]),
        _software(log=[RULE | {"more": 1}]),
    ],
)
def test_one_fault_is_malformed(data: bytes) -> None:
    error = refusal(decode, data)
    assert error.code == "evidence-malformed"
    assert error.reasons


@given(st.recursive(st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=4), max_leaves=12))  # fmt: skip
def test_any_json_is_a_document_or_malformed(value: Any) -> None:
    assert value_or_malformed(lambda: decode(json_encode(value))) is None
    assert value_or_malformed(lambda: decode(_changed(software=[value]))) is None


def test_time_and_serial() -> None:
    assert GOOD.problem(now=NOW) is None
    assert GOOD.problem(now=NOW, least=7) is None
    late = GOOD.problem(now=NOW + timedelta(days=91))
    assert late is not None
    assert late.where == "reference.node-image.until"
    early = GOOD.problem(now=NOW - timedelta(days=2))
    assert early is not None


def test_attack_an_old_document_is_given_while_it_is_still_valid() -> None:
    """The operator keeps version 7, which has a hole, and hides version 8."""
    back = GOOD.problem(now=NOW, least=8)
    assert back is not None
    assert (back.where, back.found) == ("reference.node-image.serial", "7")


def test_values_of_a_machine_accept_its_software_and_no_other() -> None:
    claims = soft_claims()
    values = of_claims(claims, "golden")
    assert values.measurements == {"mrtd": frozenset({MEASUREMENT})}
    assert appraise(claims, soft_policy(software=(values,))) == ()
    other = soft_claims(measurements={**claims.measurements, "mrtd": bytes(48)})
    reasons = appraise(other, soft_policy(software=(values,)))
    assert reasons
    assert bytes(48).hex() in str(reasons[0])
    with pytest.raises(ValueError, match="launch"):
        of_claims(soft_claims(launch=""), "golden")


def test_an_unknown_value_refuses() -> None:
    unknown = Software("other", "tdx", {"mrtd": frozenset({b"x" * 48})})
    assert appraise(soft_claims(), soft_policy(software=(unknown, SIGNER)))
    assert appraise(soft_claims(), soft_policy(software=(Software("nothing"),)))


def test_the_wall_clock_is_never_asked() -> None:
    then = datetime(2031, 1, 1, tzinfo=UTC)
    old = Document("a", 1, then, then + timedelta(days=1), (EXACT,))
    assert decode(old.encode()).problem(now=then) is None
