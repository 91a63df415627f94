"""Canonical encodings refuse second encodings; HPKE and wrapping refuse other contexts."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.crypto import hpke, keys
from cloister.crypto.canonical import cbor_decode, cbor_encode, json_decode, json_encode

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_cbor_round_trip(value: object) -> None:
    assert cbor_decode(cbor_encode(value)) == value


@given(values)
def test_json_round_trip(value: object) -> None:
    assert json_decode(json_encode(value)) == value


@given(st.binary(max_size=200))
def test_any_bytes_decode_to_their_own_encoding_or_value_error(data: bytes) -> None:
    for decode, encode in ((cbor_decode, cbor_encode), (json_decode, json_encode)):
        try:
            value = decode(data)
        except ValueError:
            continue
        assert encode(value) == data


@pytest.mark.parametrize(
    "data",
    [b"\x18\x01", b"\xa2\x61b\x01\x61a\x02", b"\x9f\x01\xff", b"\x01\x00", b"\xa2\x01\x02\x01\x03"],
    ids=["long integer", "unsorted keys", "indefinite length", "trailing byte", "duplicate key"],
)
def test_other_cbor_encodings_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="canonical CBOR"):
        cbor_decode(data)


@pytest.mark.parametrize("data", [b'{"a": 1}', b'{"b":1,"a":2}', b'{"a":1,"a":1}', b"1.0", b'"\\u0061"'])
def test_other_json_encodings_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="canonical JSON"):
        json_decode(data)


def test_messages_over_the_limit_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 10"):
        cbor_decode(cbor_encode("x" * 11), limit=10)


def test_hpke_opens_only_under_the_same_key_and_info() -> None:
    pair = hpke.KeyPair.generate()
    message = hpke.seal(b"key", to=pair.public, info=b"release")
    assert len(message) == len(b"key") + hpke.OVERHEAD_BYTES
    assert pair.open(message, info=b"release") == b"key"
    with pytest.raises(hpke.OpenError):
        pair.open(message, info=b"renew")
    with pytest.raises(hpke.OpenError):
        hpke.KeyPair.generate().open(message, info=b"release")
    for position in (0, 1087, 1088, 1119, 1120, len(message) - 1):
        changed = bytearray(message)
        changed[position] ^= 1
        with pytest.raises(hpke.OpenError):
            pair.open(bytes(changed), info=b"release")
    with pytest.raises(hpke.OpenError):
        pair.open(message[:100], info=b"release")


def test_hpke_keys_are_rebuilt_from_their_private_bytes() -> None:
    pair = hpke.KeyPair.from_private_bytes(bytes(range(96)))
    assert pair.public == hpke.KeyPair.from_private_bytes(bytes(range(96))).public
    assert bytes(range(32)).hex() not in repr(pair)


def test_wrap_binds_its_context() -> None:
    key = keys.Secret.random()
    wrapped = keys.wrap(key, b"payload", context=b"row 1")
    assert keys.unwrap(key, wrapped, context=b"row 1") == b"payload"
    for other, context in ((keys.Secret.random(), b"row 1"), (key, b"row 2")):
        with pytest.raises(keys.UnwrapError):
            keys.unwrap(other, wrapped, context=context)


def test_derivations_differ_by_label_salt_and_context() -> None:
    key = keys.Secret(bytes(32))
    outputs = {
        keys.derive(key, "cloister/a/1"),
        keys.derive(key, "cloister/b/1"),
        keys.derive(key, "cloister/a/1", salt=b"s"),
        keys.derive(key, "cloister/a/1", context=b"c"),
    }
    assert len(outputs) == 4


def test_attack_maps_within_keys_cost_no_time() -> None:
    """165 bytes whose decoding takes minutes: a decoder hashes a map within a key again for each level (found by fuzzing)."""
    bomb = b"\xa2" * 15 + b"\x23" + bytes(5) + b"\xa2" * 30 + bytes(100)
    nested = b"\xa1" * 24 + b"\x00" * 30
    begin = time.process_time()
    for data in (bomb, nested, b"\xa1\xa0\x00", b"\xa1\x80\x00", b"\xa1\xf6\x00", b"\xa1\xf9\x00\x00\x00"):
        with pytest.raises(ValueError, match=r"key|CBOR|level"):
            cbor_decode(data)
    assert time.process_time() - begin < 1


def test_levels_are_bounded_and_real_keys_pass() -> None:
    assert cbor_decode(cbor_encode({1: {"a": [b"x", {b"k": None}]}})) == {1: {"a": [b"x", {b"k": None}]}}
    deep: object = 0
    for _ in range(31):
        deep = [deep]
    assert cbor_decode(cbor_encode(deep)) == deep
    with pytest.raises(ValueError, match="levels"):
        cbor_decode(cbor_encode([[deep]]))
