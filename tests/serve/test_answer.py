"""Only the contract's form leaves, always at the same size, whatever the model's program prints."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, InputError, PeerError
from cloister.serve.answer import Rules, decode, encode, read_labels, shape

LABELS = ("normal", "pneumonia")
LINE = json.dumps({"scores": {"normal": 0.123456, "pneumonia": 0.876544}, "note": "secret"}).encode()


@pytest.mark.parametrize(
    ("form", "decimals", "expected"),
    [
        ("label", None, {"label": "pneumonia"}),
        ("score", 2, {"label": "pneumonia", "score": 0.88}),
        ("full", 1, {"label": "pneumonia", "scores": {"normal": 0.1, "pneumonia": 0.9}}),
    ],
)
def test_form(form, decimals, expected) -> None:  # type: ignore[no-untyped-def]
    rules = Rules(form, LABELS, decimals)
    answer = shape(LINE, rules)
    assert answer == expected
    assert decode(encode(answer, size=rules.size)) == expected


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"not json",
        b"[1]",
        b"{}",
        b'{"label": "leak"}',
        b'{"scores": {"leak of training row 17": 1}}',
        b'{"scores": {"normal": 1, "leak": 0}}',
        b'{"scores": {"normal": NaN}}',
        b'{"scores": {"normal": "0.5"}}',
        b'{"scores": {"normal": true}}',
        b'{"scores": {"normal": 1' + b"0" * 400 + b"}}",  # an uncounted sign to the consumer, if it were no PeerError
        b'{"scores": {}}',
        b"[" * 100_000,
        b'{"scores": {"normal": 1' + b" " * 70_000 + b"}}",
    ],
)
def test_a_program_cannot_say_anything_else(line: bytes) -> None:
    with pytest.raises(PeerError):
        shape(line, Rules("label", LABELS))


@given(
    st.sampled_from(["label", "score", "full"]),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2),
    st.integers(0, 300),
)
def test_every_answer_of_one_contract_has_the_same_size(form, values, pad) -> None:  # type: ignore[no-untyped-def]
    rules = Rules(form, LABELS, None, pad)
    line = json.dumps({"scores": dict(zip(LABELS, values, strict=True))}).encode()
    assert len(encode(shape(line, rules), size=rules.size)) == rules.size + 4


@given(st.binary(max_size=60))
def test_decode_any_bytes(data: bytes) -> None:
    with contextlib.suppress(CloisterError):
        decode(data)


def test_labels() -> None:
    assert read_labels(b'["a", "b"]') == ("a", "b")
    for bad in (b"", b"{}", b"[]", b'["a", "a"]', b'["' + b"x" * 65 + b'"]', b"[1]", b'[""]', b'["\\ud800"]'):
        with pytest.raises(InputError):
            read_labels(bad)
