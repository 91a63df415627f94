"""Evidence on the wire: what decodes re-encodes to the same bytes; everything else is malformed, never a crash."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.attestation import evidence as wire
from cloister.attestation.events import event
from cloister.attestation.types import Event, Evidence
from cloister.crypto.canonical import cbor_encode
from cloister.errors import EvidenceError
from cloister.testkit.softtee import SoftPlatform, workload
from tests.attestation.helpers import refusal, value_or_malformed

_EVENTS = st.builds(
    Event,
    register=st.integers(0, 23),
    name=st.from_regex(r"[a-z/0-9]{1,20}", fullmatch=True),
    digest=st.binary(min_size=48, max_size=48),
    data=st.binary(max_size=64),
)
_EVIDENCE = st.builds(
    Evidence,
    kind=st.sampled_from(["tdx", "sev-snp", "a"]),
    quote=st.binary(min_size=1, max_size=200),
    events=st.lists(_EVENTS, max_size=4).map(tuple),
)


@given(_EVIDENCE)
def test_round_trip(evidence: Evidence) -> None:
    data = wire.encode(evidence)
    assert wire.decode(data) == evidence
    assert wire.encode(wire.decode(data)) == data


def test_real_sized_evidence_fits() -> None:
    evidence = SoftPlatform().run(workload()).evidence()
    data = wire.encode(evidence)
    assert wire.decode(data) == evidence
    assert len(data) < 6000


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_evidence_or_malformed(data: bytes) -> None:
    evidence = value_or_malformed(lambda: wire.decode(data))
    assert evidence is None or wire.encode(evidence) == data


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=60) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["kind", "quote", "events"]), inner),
    max_leaves=12,
)


@given(_VALUES)
def test_any_canonical_cbor_is_evidence_or_malformed(value: object) -> None:
    data = cbor_encode(value)
    evidence = value_or_malformed(lambda: wire.decode(data))
    assert evidence is None or wire.encode(evidence) == data


def _wire(**change: object) -> bytes:
    good = event("cloister/config/1", b"x")
    base: dict[str, object] = {
        "kind": "tdx",
        "quote": b"q",
        "events": [[good.register, good.name, good.digest, good.data]],
    }
    return cbor_encode({key: value for key, value in (base | change).items() if value is not None})


def test_the_base_of_the_faults_below_is_good() -> None:
    assert wire.decode(_wire()).kind == "tdx"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        _wire() + b"\x00",
        _wire(kind=None),
        _wire(extra=1),
        _wire(kind="TDX"),
        _wire(kind="../tdx"),
        _wire(kind="t" * 33),
        _wire(kind=7),
        _wire(quote=b""),
        _wire(quote="text"),
        _wire(quote=bytes(64 * 1024 + 1)),
        _wire(events={}),
        _wire(events=[[3, "n", bytes(48), b""]] * 65),
        _wire(events=[[3, "n", bytes(48)]]),
        _wire(events=[[True, "n", bytes(48), b""]]),
        _wire(events=[[-1, "n", bytes(48), b""]]),
        _wire(events=[[24, "n", bytes(48), b""]]),
        _wire(events=[[3, "", bytes(48), b""]]),
        _wire(events=[[3, "n" * 129, bytes(48), b""]]),
        _wire(events=[[3, "n\x1b[2J", bytes(48), b""]]),
        _wire(events=[[3, "n", bytes(47), b""]]),
        _wire(events=[[3, "n", bytes(48), bytes(64 * 1024 + 1)]]),
        _wire(parts={"a": bytes(4 << 20), "b": bytes(4 << 20)}),
        _wire(parts={}),
        _wire(parts={"A": b""}),
        _wire(parts={"a": "text"}),
        _wire(parts={"a": bytes((4 << 20) + 1)}),
        _wire(parts={f"a{i}": b"" for i in range(17)}),
        _wire(devices=[]),
        _wire(devices=[1]),
        _wire(
            devices=[
                {"kind": "tpm", "quote": b"q", "events": [], "devices": [{"kind": "tpm", "quote": b"q", "events": []}]}
            ]
        ),
        _wire(devices=[{"kind": "tpm", "quote": b"q", "events": []}] * 17),
        _wire(devices=[{"kind": "tpm", "quote": b"", "events": []}]),
        bytes([0xA3, 0x64]) + b"kind" + b"\x63tdx" * 3,
        b"\x81" * 1000,  # nesting bomb
        b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff",  # an array of 2^64 - 1 elements
        b"\x5b\x00\x00\x00\xff\xff\xff\xff\xff" + b"x",  # a byte string of a terabyte
    ],
)
def test_each_fault_is_malformed(data: bytes) -> None:
    with pytest.raises(EvidenceError) as caught:
        wire.decode(data)
    assert caught.value.code == "evidence-malformed"


def test_evidence_that_no_verifier_would_take_is_not_sent() -> None:
    with pytest.raises(ValueError, match="quote"):
        wire.encode(Evidence("tdx", b""))
    with pytest.raises(ValueError, match="at most"):
        wire.encode(Evidence("tdx", b"q", parts={"a": bytes(4 << 20), "b": bytes(4 << 20)}))


def test_a_register_of_five_thousand_digits_is_malformed() -> None:
    """CBOR has such numbers, and Python refuses to write them into a reason, with an exception of its own."""
    value = {"kind": "tdx", "quote": b"x", "events": [[1 << 20_000, "a", bytes(48), b""]]}
    assert refusal(wire.decode, cbor_encode(value)).reasons[0].where == "evidence"


def test_a_million_empty_lists_are_refused_before_they_are_made() -> None:
    """8 MiB of them took twelve seconds."""
    data = b"\x9a\x00\x0f\x00\x00" + b"\x80" * 0xF0000
    start = time.perf_counter()
    assert "values" in refusal(wire.decode, data).reasons[0].found
    assert time.perf_counter() - start < 0.5


def test_the_largest_evidence_has_fewer_values_than_are_accepted() -> None:
    event = Event(3, "a", bytes(48), b"")
    parts = {f"p{index}": b"x" for index in range(wire.LIMITS.parts)}
    device = Evidence("tpm", b"x", (event,) * wire.LIMITS.events, parts)
    most = Evidence("tdx", b"x", device.events, parts, (device,) * wire.LIMITS.devices)
    assert wire.decode(wire.encode(most)) == most
