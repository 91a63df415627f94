"""Real TDX evidence, third-party vectors beside the repository: the expected outcome of every entry.

What `expect.signature` asks (no public collateral exists) is outside of `verify`, which never accepts a quote without
collateral; the second implementation in `oracle.py` checks those signatures over our parser. CC event logs (`rtmr_replay`)
are of another format and are not read here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cloister.attestation.appraise import appraise
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.roots import Roots
from cloister.attestation.tdx import collateral as tdx_collateral
from cloister.attestation.tdx import format as tdx_format
from cloister.attestation.tdx.roots import INTEL_SGX_ROOT_CA
from cloister.attestation.types import Claims, Evidence, Policy
from cloister.attestation.verify import verify
from cloister.errors import EvidenceError
from tests.attestation.helpers import SHARED, refusal
from tests.attestation.oracle import signatures_hold

FOLDER = SHARED / "vectors" / "attestation"
MANIFEST = FOLDER / "manifest.json"


def _entries() -> list[dict[str, Any]]:
    if not MANIFEST.exists():
        return []
    entries: list[dict[str, Any]] = json.loads(MANIFEST.read_text())
    return [entry for entry in entries if entry["kind"] == "dcap" and entry["name"].startswith("tdx")]


ENTRIES = _entries()
pytestmark = pytest.mark.skipif(not ENTRIES, reason="third-party vectors are not beside the repository")

# what the manifest calls the reason -> the step of our verifier that must refuse
STEPS = {
    "expired": "tdx.3-collateral",
    "future": "tdx.3-collateral",
    "No matching TCB level": "tdx.7-tcb",
    "Debug": "tdx.8-attributes",
}


def _file(entry: dict[str, Any], role: str) -> bytes:
    path: Path = FOLDER / entry["files"][role]
    return path.read_bytes()


def _quote(entry: dict[str, Any]) -> bytes:
    """Return the quote without what follows it in the file: buffers are padded, one file carries a remark."""
    data = _file(entry, "quote")
    try:
        return tdx_format.without_padding(data)
    except EvidenceError:
        prefix = 54 if data[:2] == b"\x05\x00" else 48
        size = prefix + (648 if data[48:50] == b"\x03\x00" and prefix == 54 else 584)
        return data[: size + 4 + int.from_bytes(data[size : size + 4], "little")]


def _endorsements(entry: dict[str, Any]) -> Endorsements:
    data = _file(entry, "collateral")
    return Endorsements((Endorsement("tdx", tdx_collateral.fmspc(data), data),))


def _verify(entry: dict[str, Any], quote: bytes) -> Claims:
    return verify(Evidence("tdx", quote), _endorsements(entry), Roots(), now=datetime.fromisoformat(entry["at"]))


def _named(kind: str) -> list[Any]:
    return [pytest.param(entry, id=entry["name"]) for entry in ENTRIES if kind in entry["expect"]]


def test_every_tdx_entry_is_covered() -> None:
    assert len(ENTRIES) == 11
    assert all("authentic" in entry["expect"] or "signature" in entry["expect"] for entry in ENTRIES)


@pytest.mark.parametrize("entry", _named("authentic"))
def test_outcome(entry: dict[str, Any]) -> None:
    expect = entry["expect"]
    if not expect["authentic"]:
        error = refusal(_verify, entry, _quote(entry))
        assert error.code == "evidence-not-authentic"
        assert error.reasons[0].where == STEPS[expect["reason"]]
        return
    claims = _verify(entry, _quote(entry))
    assert (claims.tee, claims.soft, claims.debug) == ("tdx", False, False)
    assert claims.tcb_status == expect["tcb"]
    assert claims.tcb_date is not None
    assert len(claims.platform["ppid"]) == 32
    assert len(claims.measurements) in (14, 16)
    policy = Policy("place.enclave", "tee", accept=frozenset({"tdx"}))
    assert appraise(claims, policy) == ()
    # hardware never passes where only simulation is named, and an old machine not where a newer one is
    assert [each.where for each in appraise(claims, replace(policy, accept=frozenset({"simulated"})))] == [
        "place.enclave.accept"
    ]
    assert [each.where for each in appraise(claims, replace(policy, min_tcb=(2099, 1)))] == ["place.enclave.min_tcb"]


@pytest.mark.parametrize("entry", _named("authentic"))
def test_a_padded_quote_is_refused_as_it_lies_there(entry: dict[str, Any]) -> None:
    data = _file(entry, "quote")
    if data == _quote(entry):
        data += b"\x00"
    error = refusal(_verify, entry, data)
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", "tdx.1-format")


@pytest.mark.parametrize("entry", _named("authentic"))
def test_no_flipped_bit_of_real_evidence_is_accepted(entry: dict[str, Any]) -> None:
    good = _quote(entry)
    signed = len(tdx_format.parse(good).signed)
    for position in range(0, signed, 7):
        changed = bytearray(good)
        changed[position] ^= 1 << (position % 8)
        refusal(_verify, entry, bytes(changed))


@pytest.mark.parametrize("entry", _named("signature"))
def test_signature_without_collateral(entry: dict[str, Any]) -> None:
    at = datetime.fromisoformat(entry["at"])
    if not entry["expect"]["signature"]:
        # Intel's sample quote under Intel's test keys: refused, whatever step sees it first
        refusal(verify, Evidence("tdx", _quote(entry)), Endorsements(), Roots(), now=at)
        return
    quote = tdx_format.parse(_quote(entry))
    assert signatures_hold(quote, root_sha256=INTEL_SGX_ROOT_CA, at=at)
    assert quote.debug == entry["expect"].get("debug", False)
    # and without collateral nothing is accepted
    error = refusal(verify, Evidence("tdx", _quote(entry)), Endorsements(), Roots(), now=at)
    assert (error.code, error.reasons[0].where) == ("evidence-not-authentic", "tdx.3-collateral")


@pytest.mark.parametrize("entry", _named("authentic"))
def test_two_implementations_agree_on_signatures(entry: dict[str, Any]) -> None:
    quote = tdx_format.parse(_quote(entry))
    assert signatures_hold(quote, root_sha256=INTEL_SGX_ROOT_CA, at=datetime.fromisoformat(entry["at"]))


def test_the_real_debug_td_says_debug() -> None:
    (entry,) = [entry for entry in ENTRIES if entry["name"] == "tdx4-debug"]
    assert tdx_format.parse(_quote(entry)).debug
    error = refusal(_verify, entry, _quote(entry))
    assert (error.reasons[0].found, error.reasons[0].wanted) == ("Debug mode is enabled", "debug off")
