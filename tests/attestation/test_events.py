"""Runtime events: the log explains the register exactly, or it explains nothing."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.attestation import events as log
from cloister.attestation.types import Event
from cloister.crypto.canonical import cbor_encode
from cloister.errors import EvidenceError
from cloister.testkit.softtee import soft_claims, workload
from tests.attestation.helpers import value_or_malformed

ONE = log.event("cloister/config/1", b"one")
TWO = log.event(log.WORKLOAD, workload().encode())


def test_known_answer() -> None:
    digest = hashlib.sha384(b"one").digest()
    assert log.replay(()) == bytes(48)
    assert log.replay((ONE,)) == hashlib.sha384(bytes(48) + digest).digest()
    assert Event(3, "cloister/config/1", digest, b"one") == ONE


def test_an_honest_log_passes() -> None:
    log.check_log((), bytes(48), where="w")
    log.check_log((ONE, TWO), log.replay((ONE, TWO)), where="w")


@pytest.mark.parametrize(
    ("attack", "where"),
    [
        ((TWO,), "w.replay"),
        ((ONE, TWO, TWO), "w.replay"),
        ((TWO, ONE), "w.replay"),
        ((), "w.replay"),
        ((replace(ONE, data=b"other"), TWO), "w.0.data"),
        ((ONE, replace(TWO, register=2)), "w.1.register"),
        ((ONE, replace(TWO, digest=TWO.digest[:47])), "w.1.data"),
    ],
    ids=["event removed", "event added", "reordered", "empty log", "data changed", "other register", "short digest"],
)
def test_a_log_that_was_changed_is_not_authentic(attack: tuple[Event, ...], where: str) -> None:
    with pytest.raises(EvidenceError) as caught:
        log.check_log(attack, log.replay((ONE, TWO)), where="w")
    assert caught.value.code == "evidence-not-authentic"
    assert where in [reason.where for reason in caught.value.reasons]


def test_replay_alone_does_not_authenticate_data() -> None:
    """The digests replay, the data does not hash to them: all violations are reported."""
    forged = (replace(ONE, data=b"x"), replace(TWO, data=b"y"))
    assert log.replay(forged) == log.replay((ONE, TWO))
    with pytest.raises(EvidenceError) as caught:
        log.check_log(forged, log.replay((ONE, TWO)), where="w")
    assert [reason.where for reason in caught.value.reasons] == ["w.0.data", "w.1.data"]


@given(st.lists(st.binary(max_size=20), max_size=5), st.lists(st.binary(max_size=20), max_size=5))
def test_two_logs_share_a_register_only_if_they_are_equal(a: list[bytes], b: list[bytes]) -> None:
    first, second = (tuple(log.event("n", data) for data in each) for each in (a, b))
    assert (log.replay(first) == log.replay(second)) == (a == b)


def test_workload_round_trip() -> None:
    assert log.workload_of(soft_claims()) == workload()
    assert log.workload_of(soft_claims(events=(ONE, TWO))) == workload()


def test_no_workload_is_refused() -> None:
    with pytest.raises(EvidenceError) as caught:
        log.workload_of(soft_claims(events=(ONE,)))
    assert caught.value.code == "evidence-unacceptable"


def test_a_second_workload_is_refused_under_any_name() -> None:
    """A register measures data, not names: renaming one of two workloads must not hide it."""
    second = log.event(log.WORKLOAD, workload(code="sha256:" + "99" * 32).encode())
    for hidden in (second, replace(second, name="cloister/note/1")):
        for order in ((TWO, hidden), (hidden, TWO)):
            with pytest.raises(EvidenceError) as caught:
                log.workload_of(soft_claims(events=order))
            assert caught.value.code == "evidence-unacceptable"
    with pytest.raises(EvidenceError):
        log.workload_of(soft_claims(events=(replace(TWO, name="cloister/note/1"),)))


def test_a_broker_has_exactly_one_event() -> None:
    assert log.config_of(soft_claims(events=(ONE,))) == b"one"
    for other in ((), (TWO,), (ONE, ONE), (ONE, TWO)):
        with pytest.raises(EvidenceError) as caught:
            log.config_of(soft_claims(events=other))
        assert caught.value.code == "evidence-unacceptable"


_FIELDS: dict[str, Any] = {"code": "sha256:" + "11" * 32, "sandbox": "offline", "profile": bytes(32), "level": "L1"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        cbor_encode([]),
        cbor_encode({}),
        cbor_encode({**_FIELDS, "more": 1}),
        cbor_encode({**_FIELDS, "code": b"bytes"}),
        cbor_encode({**_FIELDS, "code": "sha256:" + "11" * 31}),
        cbor_encode({**_FIELDS, "code": "sha256:" + "11" * 32 + "\n"}),
        cbor_encode({**_FIELDS, "sandbox": "../offline"}),
        cbor_encode({**_FIELDS, "sandbox": ""}),
        cbor_encode({**_FIELDS, "profile": bytes(31)}),
        cbor_encode({**_FIELDS, "level": "L0"}),
        cbor_encode({**_FIELDS, "level": "L4"}),
        cbor_encode(_FIELDS) + b"\x00",
        cbor_encode({**_FIELDS, "sandbox": "x" * 5000}),
    ],
)
def test_a_workload_event_with_one_fault_is_malformed(data: bytes) -> None:
    with pytest.raises(EvidenceError) as caught:
        log.workload_of(soft_claims(events=(log.event(log.WORKLOAD, data),)))
    assert caught.value.code == "evidence-malformed"


@given(st.binary(max_size=120))
def test_arbitrary_event_data_is_a_workload_or_malformed(data: bytes) -> None:
    value = value_or_malformed(lambda: log.decode_workload(data))
    assert value is None or value.encode() == data


def test_extend_takes_48_bytes_only() -> None:
    with pytest.raises(ValueError):
        log.extend(bytes(48), bytes(32))
    with pytest.raises(ValueError):
        log.extend(bytes(32), bytes(48))
