"""Messages: what parses re-encodes to the same bytes, everything else is refused by field; errors keep their class."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.broker import wire
from cloister.crypto import hpke
from cloister.crypto.keys import Secret
from cloister.errors import (
    CloisterError,
    DeniedError,
    EvidenceError,
    InputError,
    MachineError,
    PeerError,
    Reason,
    TamperedError,
    WaitingError,
)

DIGEST = "sha256:" + "ab" * 32
NOW = datetime(2026, 11, 20, 12, 0, 0, 1, UTC)
MESSAGES = sorted(
    (kind for kind in vars(wire).values() if isinstance(kind, type) and issubclass(kind, wire.Message) and kind is not wire.Message),
    key=lambda kind: kind.__name__,
)  # fmt: skip


def example(field: wire.Field) -> Any:
    """A value that `field` takes."""
    match field:
        case wire.Text(pattern=pattern) if pattern:
            known = {
                wire.DIGEST: DIGEST,
                f"({wire.DIGEST})?": "",
                wire.NAME: "train",
                f"({wire.NAME})?": "train",
                wire.LEASE: "l-" + "0" * 32,
                wire.DENIAL: "d-" + "0" * 12,
                wire.ROOT: "tpm:" + "ab" * 32,
                f"({wire.DENIAL})?": "",
                "[0-9]{4}-[0-9]{2}-[0-9]{2}": "2027-01-01",
                "[a-z]+": "denied",
                "[a-z-]+": "denied",
                "[!-~]+": "log+key",
                "[a-z0-9][a-z0-9./-]*": "log",
            }
            return known[pattern] if pattern in known else pattern.split("|")[0]
        case wire.Text():
            return "text ü"
        case wire.Blob(least=least):
            return b"\x01" * max(least, 1)
        case wire.Uint(most=most):
            return min(7, most)
        case wire.Flag():
            return True
        case wire.Time():
            return NOW
        case wire.Key():
            return Secret(b"\x02" * 32)
        case wire.Maybe(inner=inner):
            return example(inner)
        case wire.Many(inner=inner):
            return (example(inner), example(inner))
        case wire.Names():
            return ("a", "b")
        case wire.Table(inner=inner):
            return {"a": example(inner)}
        case wire.Nested(message=message):
            return build(message)
    raise AssertionError(field)


def build(message: type[wire.Message]) -> wire.Message:
    return message(**{name: example(field) for name, field in message.FIELDS.items()})


@pytest.mark.parametrize("message", MESSAGES, ids=lambda kind: kind.__name__)
def test_round_trip_and_refusals(message: type[wire.Message]) -> None:
    data = build(message).encode()
    again = message.decode(data)
    assert again.encode() == data
    assert {field.name for field in dataclasses.fields(message)} == set(message.FIELDS)  # type: ignore[arg-type]
    value = cbor2.loads(data)
    for name in message.FIELDS:
        without = {key: item for key, item in value.items() if key != name}
        for wrong in (without, {**value, name: {"another": "type"}}, {**value, name: 1.5}):
            with pytest.raises(PeerError) as refused:
                message.decode(cbor2.dumps(wrong, canonical=True))
            assert refused.value.code == "protocol"
            assert name in str(refused.value.reasons[0])
    with pytest.raises(PeerError):
        message.decode(cbor2.dumps({**value, "extra": 1}, canonical=True))
    with pytest.raises(PeerError):
        message.decode(data + b"\x00")


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_canonical(data: bytes) -> None:
    with suppress(PeerError):
        assert wire.ReleaseAsk.decode(data).encode() == data


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=4))
def test_asset_names_have_one_order(names: list[str]) -> None:
    data = cbor2.dumps({"contract": DIGEST, "phase": "train", "reads": names, "writes": []}, canonical=True)
    if names == sorted(set(names)):
        assert wire.ReleaseAsk.decode(data).reads == tuple(names)
    else:
        with pytest.raises(PeerError, match="ReleaseAsk"):
            wire.ReleaseAsk.decode(data)


def test_a_message_that_cannot_be_encoded_cannot_be_made() -> None:
    for wrong in ({"contract": "x"}, {"phase": "Train"}, {"reads": ("b", "a")}, {"reads": ["a"]}):
        with pytest.raises(ValueError, match="ReleaseAsk"):
            wire.ReleaseAsk(**{"contract": DIGEST, "phase": "train", "reads": (), "writes": (), **wrong})  # type: ignore[arg-type]


def test_a_size_is_refused_before_anything_is_decoded() -> None:
    with pytest.raises(PeerError) as refused:
        wire.AttestRequest.decode(b"\xff" * (wire.MAX_REQUEST + 1))
    assert str(wire.MAX_REQUEST) in refused.value.reasons[0].found


def test_secrets_do_not_print() -> None:
    secret = b"planted secret of 32 bytes......"
    lease = wire.Lease("l-" + "0" * 32, Secret(secret), NOW, NOW)
    key = wire.ReleasedKey(Secret(secret), DIGEST, 1, bytes(16))
    payload = wire.ReleasePayload({"xrays": key}, {}, lease)
    assert "planted" not in repr(payload)
    assert secret.hex() not in repr(payload)
    broken = cbor2.dumps(
        {"key": secret + b"!", "digest": DIGEST, "generation": 1, "volume_id": bytes(16)}, canonical=True
    )
    with pytest.raises(PeerError) as refused:
        wire.ReleasedKey.decode(broken)
    assert "planted" not in str(refused.value.as_json())


def test_sizes_of_the_protocol_page() -> None:
    assert hpke.PUBLIC_BYTES == 1216
    assert wire.KeyDeposit.FIELDS["sealed"] == wire.Blob(1168, 1168)


@pytest.mark.parametrize(
    "kind", [InputError, DeniedError, EvidenceError, WaitingError, TamperedError, MachineError, PeerError]
)
def test_errors_arrive_as_the_class_that_was_raised(kind: type[CloisterError]) -> None:
    error = kind("it is so", reasons=[Reason("a.b", "x", "y", "z")], hint="do this")
    reply = wire.ErrorReply.decode(wire.ErrorReply.of(error, denial_id="d-0123456789ab").encode())
    again = reply.as_error()
    assert type(again) is kind
    assert (again.code, again.message, again.reasons, again.hint) == (
        error.code,
        error.message,
        error.reasons,
        error.hint,
    )
    assert wire.STATUS[kind.family] >= 400
    if isinstance(again, DeniedError):
        assert again.denial_id == "d-0123456789ab"


def test_long_errors_are_cut_and_counted() -> None:
    error = InputError("m" * 5000, reasons=[Reason("w", "f\ud800" * 3000, "w", "h")] * 1000)
    reply = wire.ErrorReply.decode(wire.ErrorReply.of(error).encode())
    assert len(reply.reasons) == 256
    assert reply.reasons[-1].found == "745 more reasons"
    assert len(reply.reasons[0].found) == 2000


def test_errors_of_a_newer_broker_are_still_errors() -> None:
    reply = dataclasses.replace(wire.ErrorReply.of(InputError("new")), error="no-such-code")
    assert (type(reply.as_error()), reply.as_error().code) == (PeerError, "protocol")


@given(st.datetimes(min_value=datetime(1000, 1, 1), max_value=datetime(9000, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001
def test_times_round_trip(moment: datetime) -> None:
    assert wire.parse_time(wire.format_time(moment)) == moment
    with pytest.raises(ValueError, match="time zone"):
        wire.format_time(moment.replace(tzinfo=None))
