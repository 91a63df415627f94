"""The binding: one byte string per meaning, and evidence for one use is worth nothing for another."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.attestation.binding import PURPOSES, TAG, Binding, check_binding
from cloister.crypto.canonical import cbor_decode
from cloister.testkit.softtee import binding, soft_claims

CONTRACT = "sha256:" + "ab" * 32

OTHER: list[dict[str, Any]] = [
    {"purpose": "renew"},
    {"nonce": b"\x09" * 32},
    {"key": b"\x09" * 1216},
    {"peer_key": b"\x09" * 32},
    {"contract": CONTRACT},
    {"phase": "train"},
    {"request": b"\x09" * 32},
    {"devices": (b"\x09" * 32,)},
]


def test_known_answer() -> None:
    """Bytes of docs/attestation.md: another implementation must get the same."""
    bound = Binding("broker", b"\x01" * 32, b"\x02\x03")
    assert bound.encode() == (
        b"cloister/binding/1\x00"
        + bytes.fromhex("a8")  # map of 8; keys by length, then bytes (RFC 8949 4.2.1)
        + b"\x63key\x42\x02\x03"
        + b"\x65nonce\x58\x20"
        + b"\x01" * 32
        + b"\x65phase\x60"
        + b"\x67devices\x80"
        + b"\x67purpose\x66broker"
        + b"\x67request\x58\x20"
        + bytes(32)
        + b"\x68contract\x60"
        + b"\x68peer_key\x58\x20"
        + bytes(32)
    )
    assert bound.report_data().hex() == hashlib.sha512(bound.encode()).hexdigest()
    assert bound.qualifying_data().hex() == hashlib.sha256(bound.encode()).hexdigest()


@pytest.mark.parametrize("change", OTHER, ids=lambda change: next(iter(change)))
def test_evidence_for_one_use_is_refused_for_another(change: dict[str, Any]) -> None:
    claims = soft_claims()
    assert check_binding(claims, binding()) == ()
    *_, reason = check_binding(claims, binding(**change))
    assert reason.where == "binding.report_data"
    assert reason.found == claims.report_data.hex()
    assert binding(**change).report_data().hex() in reason.wanted


def test_short_hardware_is_bound_by_the_32_byte_form() -> None:
    bound = binding()
    assert check_binding(soft_claims(report_data=bound.qualifying_data()), bound) == ()


@pytest.mark.parametrize("size", [0, 31, 33, 63, 65])
def test_other_lengths_of_report_data_are_never_bound(size: int) -> None:
    bound = binding()
    assert check_binding(soft_claims(report_data=(bound.report_data() * 2)[:size]), bound) != ()
    assert check_binding(soft_claims(report_data=bound.report_data()[:32]), bound) != ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"purpose": "transfer"},
        {"purpose": ""},
        {"nonce": b"\x01" * 31},
        {"key": b""},
        {"peer_key": b""},
        {"request": b"\x00" * 33},
        {"contract": "ab" * 32},
        {"contract": "sha256:" + "AB" * 32},
        {"contract": CONTRACT + "0"},
        {"devices": (b"short",)},
    ],
)
def test_a_binding_that_binds_nothing_cannot_be_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        binding(**wrong)


_BINDINGS = st.builds(
    Binding,
    purpose=st.sampled_from(sorted(PURPOSES)),
    nonce=st.binary(min_size=32, max_size=32),
    key=st.binary(min_size=1, max_size=40),
    peer_key=st.binary(min_size=32, max_size=32),
    contract=st.sampled_from(["", CONTRACT]),
    phase=st.text(max_size=8),
    request=st.binary(min_size=32, max_size=32),
    devices=st.lists(st.binary(min_size=32, max_size=32), max_size=2).map(tuple),
)


@given(_BINDINGS, _BINDINGS)
def test_different_bindings_have_different_bytes(a: Binding, b: Binding) -> None:
    assert (a.encode() == b.encode()) == (a == b)


@given(_BINDINGS)
def test_the_encoding_holds_every_field(bound: Binding) -> None:
    fields = cbor_decode(bound.encode().removeprefix(TAG))
    assert replace(bound, **{**fields, "devices": tuple(fields["devices"])}) == bound
    assert set(fields) == set(Binding.__dataclass_fields__)
