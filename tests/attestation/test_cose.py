"""The CBOR reader and COSE_Sign1: what is refused, and that nothing but `FormError` ever leaves."""

from __future__ import annotations

import contextlib
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from cloister.attestation import cose
from cloister.attestation.soft.nitro import derive_key

KEYS = {
    -7: derive_key("es256", ec.SECP256R1()),
    -35: derive_key("es384", ec.SECP384R1()),
    -36: derive_key("es512", ec.SECP521R1()),
}

TEXT = st.characters(exclude_categories=["Cs"])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=40) | st.text(TEXT, max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.integers(0, 99) | st.text(TEXT, max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


def refused(data: bytes, *, limit: int = 4096) -> cose.FormError:
    with pytest.raises(cose.FormError) as caught:
        cose.loads(data, limit=limit)
    return caught.value


def message_refused(value: Any) -> cose.FormError:
    with pytest.raises(cose.FormError) as caught:
        cose.sign1(cose.dumps(value), limit=4096)
    return caught.value


# --- CBOR -------------------------------------------------------------------------------------------------------------


@given(VALUES)
def test_what_we_write_we_read(value: Any) -> None:
    assert cose.loads(cose.dumps(value), limit=1 << 16) == value


@given(VALUES)
def test_another_implementation_agrees(value: Any) -> None:
    assert cose.dumps(value) == cbor2.dumps(value)
    assert cose.loads(cbor2.dumps(value), limit=1 << 16) == cbor2.loads(cose.dumps(value))


@given(st.binary(max_size=200))
def test_no_bytes_give_another_exception(data: bytes) -> None:
    for function in (cose.loads, cose.sign1):
        with contextlib.suppress(cose.FormError):
            function(data, limit=150)


def test_examples_of_rfc_8949_appendix_a() -> None:
    for text, value in (
        ("1bffffffffffffffff", 2**64 - 1),
        ("3bffffffffffffffff", -(2**64)),
        ("20", -1),
        ("62c3bc", "\u00fc"),
        ("83010203", [1, 2, 3]),
        ("a201020304", {1: 2, 3: 4}),
        ("f4", False),
        ("c11a514b67b0", cose.Tagged(1, 1363896240)),
    ):
        assert cose.loads(bytes.fromhex(text), limit=64) == value
    # valid, though not the shortest: a vendor's bytes are signed as they are
    assert cose.loads(bytes.fromhex("1800"), limit=64) == 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "0 bytes"),
        ("0000", "1 bytes after the end"),
        ("5f42010243030405ff", "an indefinite or reserved length"),
        ("9f0102ff", "an indefinite or reserved length"),
        ("bf0102ff", "an indefinite or reserved length"),
        ("7f6161ff", "an indefinite or reserved length"),
        ("1c", "an indefinite or reserved length"),
        ("ff", "CBOR type 7, value 31"),
        ("f93c00", "CBOR type 7, value 25"),
        ("fb3ff199999999999a", "CBOR type 7, value 27"),
        ("f7", "CBOR type 7, value 23"),
        ("f820", "CBOR type 7, value 24"),
        ("62c328", "text that is not UTF-8"),
        ("a2010201 03", "map key 1 twice"),
        ("a2010218 0103", "map key 1 twice"),  # the same key in a longer encoding
        ("a1f501", "a map key of type bool"),
        ("a1f601", "a map key of type NoneType"),
        ("a1800 1", "a map key of type list"),
        ("a1c10001", "a map key of type Tagged"),
        ("19", "0 bytes left"),
    ],
)
def test_one_fault_each(text: str, found: str) -> None:
    assert refused(bytes.fromhex(text.replace(" ", ""))).found == found


@pytest.mark.parametrize("head", ["5b", "7b", "9b", "bb", "db"])
def test_huge_lengths_allocate_nothing(head: str) -> None:
    for size in ("ffffffffffffffff", "7fffffffffffffff", "0000000100000000"):
        refused(bytes.fromhex(head + size))
        refused(bytes.fromhex(head + size) + bytes(100))


def test_depth_and_items_have_a_limit() -> None:
    assert cose.loads(b"\x81" * (cose.DEPTH - 1) + b"\x00", limit=4096)
    assert "deeper" in refused(b"\x81" * cose.DEPTH + b"\x00").found
    assert "deeper" in refused(b"\xc1" * 4000 + b"\x00").found
    wide = b"\x99" + cose.ITEMS.to_bytes(2, "big") + bytes(cose.ITEMS)
    assert "longer" in refused(wide, limit=1 << 20).found
    assert refused(bytes(5), limit=4).wanted == "1 to 4 bytes of CBOR"


def test_what_has_no_encoding_is_a_callers_mistake() -> None:
    for value in (1.5, {1, 2}, 2**64, object()):
        with pytest.raises(TypeError):
            cose.dumps(value)


# --- COSE_Sign1 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", list(cose.ALGORITHMS))
@pytest.mark.parametrize("tagged", [True, False])
def test_every_algorithm_round_trips(algorithm: int, tagged: bool) -> None:
    data = cose.sign(KEYS[algorithm], b"payload", algorithm=algorithm, tagged=tagged)
    message = cose.sign1(data, limit=4096)
    assert (message.algorithm, message.payload, data[0] == 0xD2) == (algorithm, b"payload", tagged)
    assert cose.verify(message, KEYS[algorithm].public_key())


def test_the_signature_structure_is_that_of_rfc_9052() -> None:
    """Section 4.4, written out with another encoder."""
    message = cose.sign1(cose.sign(KEYS[-7], b"payload", algorithm=-7), limit=4096)
    assert message.signed() == cbor2.dumps(["Signature1", cbor2.dumps({1: -7}), b"", b"payload"])


@pytest.mark.parametrize("algorithm", list(cose.ALGORITHMS))
def test_no_flipped_byte_is_accepted(algorithm: int) -> None:
    good = cose.sign(KEYS[algorithm], b"payload", algorithm=algorithm)
    for position in range(len(good)):
        changed = bytearray(good)
        changed[position] ^= 1 << position % 8
        try:
            message = cose.sign1(bytes(changed), limit=4096)
        except cose.FormError:
            continue
        assert not cose.verify(message, KEYS[algorithm].public_key()), position


def test_keys_of_another_kind_never_verify() -> None:
    message = cose.sign1(cose.sign(KEYS[-35], b"payload", algorithm=-35), limit=4096)
    others = (KEYS[-7], KEYS[-36], derive_key("another"), ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)))
    for key in others:
        assert not cose.verify(message, key.public_key())
    assert not cose.verify(message, None)


@pytest.mark.parametrize("r_s", [(0, 0), (0, 1), (1, 0), (2**384 - 1, 2**384 - 1)])
def test_impossible_signatures_are_refused_quietly(r_s: tuple[int, int]) -> None:
    """The "psychic signature" of r = s = 0, and numbers beyond the order."""
    signature = b"".join(each.to_bytes(48, "big") for each in r_s)
    message = cose.sign1(cose.dumps([cose.dumps({1: -35}), {}, b"payload", signature]), limit=4096)
    assert not cose.verify(message, KEYS[-35].public_key())


def test_headers_that_could_change_the_meaning_are_refused() -> None:
    signature = bytes(96)

    def header(protected: Any, unprotected: Any = None) -> list[Any]:
        encoded = protected if isinstance(protected, bytes) else cose.dumps(protected)
        return [encoded, unprotected if unprotected is not None else {}, b"payload", signature]

    cose.sign1(cose.dumps(header({1: -35, 3: 60, 4: b"kid"}, {4: b"kid"})), limit=4096)
    for bad in (
        header({}),
        header(b""),
        header({1: -35, 2: [3]}),
        header({1: -35, 33: b"x5chain"}),
        header([1, -35]),
        header({1: -35}, {1: -7}),
        header({1: -35}, {2: []}),
        header({3: 60}, {1: -35}),
        header({1: "ES384"}),
        header({1: -37}),
        header({1: True}),
        header({1: -8}),
        header({1: 5}),
    ):
        message_refused(bad)


def test_other_shapes_are_refused() -> None:
    protected = cose.dumps({1: -35})
    good: list[Any] = [protected, {}, b"payload", bytes(96)]
    cose.sign1(cose.dumps(good), limit=4096)
    others: tuple[Any, ...] = (
        cose.Tagged(98, good),
        cose.Tagged(18, cose.Tagged(18, good)),
        good[:3],
        [*good, b""],
        [{1: -35}, {}, b"payload", bytes(96)],
        [protected, [], b"payload", bytes(96)],
        [protected, {}, None, bytes(96)],
        [protected, {}, b"", bytes(96)],
        [protected, {}, "payload", bytes(96)],
        [protected, {}, b"payload", bytes(95)],
        [protected, {}, b"payload", bytes(64)],
        {0: good},
        0,
    )
    for bad in others:
        message_refused(bad)
