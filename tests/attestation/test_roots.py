"""Roots: data, pinned by hash; a test root never counts unless it is named."""

from __future__ import annotations

import hashlib

from cloister.attestation.roots import Pins, Roots, choose
from tests.attestation.helpers import refusal

VENDOR, SOFT, OTHER = b"vendor root", b"soft root", b"other root"
PINS = Pins(vendor=frozenset({hashlib.sha256(VENDOR).hexdigest()}), soft=frozenset({hashlib.sha256(SOFT).hexdigest()}))


def test_the_root_decides_the_tee_type() -> None:
    assert choose("tdx", VENDOR, PINS, Roots(), where="w") == "tdx"
    assert choose("tdx", VENDOR, PINS, Roots(soft=True), where="w") == "tdx"
    assert choose("tdx", SOFT, PINS, Roots(soft=True), where="w") == "soft-tdx"


def test_what_is_not_pinned_is_refused() -> None:
    for root, roots in ((SOFT, Roots()), (OTHER, Roots()), (OTHER, Roots(soft=True)), (b"", Roots(soft=True))):
        error = refusal(choose, "tdx", root, PINS, roots, where="w")
        assert (error.code, error.reasons[0].where) == ("evidence-not-authentic", "w")


def test_a_test_root_stays_soft_whoever_lists_it() -> None:
    listed = {"tdx": frozenset({hashlib.sha256(SOFT).hexdigest()})}
    assert choose("tdx", SOFT, PINS, Roots(soft=True, also=listed), where="w") == "soft-tdx"
    refusal(choose, "tdx", SOFT, PINS, Roots(also=listed), where="w")
    assert (
        choose("tdx", OTHER, PINS, Roots(also={"tdx": frozenset({hashlib.sha256(OTHER).hexdigest()})}), where="w")
        == "tdx"
    )
    refusal(choose, "sgx", OTHER, PINS, Roots(also={"tdx": frozenset({hashlib.sha256(OTHER).hexdigest()})}), where="w")


def test_no_pins_believe_nobody() -> None:
    empty = Pins(frozenset(), frozenset())
    refusal(choose, "tdx", VENDOR, empty, Roots(soft=True), where="w")
