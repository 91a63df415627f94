"""Real SGX and TDX evidence, third-party vectors beside the repository: the expected outcome of every entry.

Every entry runs through `files.dcap.observe`, as `cloister verify --manifest` runs it; the rest looks at what the manifest does
not state. `oracle.py` is a third implementation of the signatures, beside `dcap.own` and dcap-qvl.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cloister.attestation.appraise import appraise
from cloister.attestation.dcap import collateral as dcap_collateral
from cloister.attestation.dcap import format as dcap_format
from cloister.attestation.dcap.format import Quote
from cloister.attestation.dcap.roots import INTEL_SGX_ROOT_CA
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.files import Case, Observation
from cloister.attestation.files.dcap import observe
from cloister.attestation.files.manifest import differences
from cloister.attestation.roots import Roots
from cloister.attestation.sgx import format as sgx_format
from cloister.attestation.sgx.format import SGX
from cloister.attestation.tdx import format as tdx_format
from cloister.attestation.tdx.format import TDX
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
    return [entry for entry in entries if entry["kind"] == "dcap"]


ENTRIES = _entries()
pytestmark = pytest.mark.skipif(not ENTRIES, reason="third-party vectors are not beside the repository")

# what the manifest calls the reason -> the step of our verifier that must refuse
STEPS = {
    "expired": "tdx.3-collateral.expired",
    "future": "tdx.3-collateral.future",
    "No matching TCB level": "tdx.7-tcb",
    "Debug": "tdx.8-attributes",
}


def _file(entry: dict[str, Any], role: str) -> bytes:
    path: Path = FOLDER / entry["files"][role]
    return path.read_bytes()


def _case(entry: dict[str, Any]) -> Case:
    files = {role: _file(entry, role) for role in entry["files"]}
    return Case("dcap", files, datetime.fromisoformat(entry["at"]), entry["name"])


def _parsed(entry: dict[str, Any]) -> tuple[str, bytes, Quote]:
    """Return kind, exact bytes and quote: buffers are padded, one file carries a remark."""
    data = _file(entry, "quote")
    if data[4:8] == bytes(4):
        end = dcap_format.extent(data, SGX, sgx_format.Quote)
        return "sgx", data[:end], sgx_format.parse(data[:end])
    end = dcap_format.extent(data, TDX, tdx_format.Quote)
    return "tdx", data[:end], tdx_format.parse(data[:end])


def _endorsements(entry: dict[str, Any]) -> Endorsements:
    data = _file(entry, "collateral")
    found = dcap_collateral.parse(data)
    return Endorsements((Endorsement(found.kind, found.fmspc, data),))


def _verify(entry: dict[str, Any], quote: bytes) -> Claims:
    kind = "sgx" if quote[4:8] == bytes(4) else "tdx"
    return verify(Evidence(kind, quote), _endorsements(entry), Roots(), now=datetime.fromisoformat(entry["at"]))


def _named(fact: str) -> list[Any]:
    return [pytest.param(entry, id=entry["name"]) for entry in ENTRIES if fact in entry["expect"]]


def _one(name: str) -> dict[str, Any]:
    (entry,) = [entry for entry in ENTRIES if entry["name"] == name]
    return entry


def _states(observed: Observation) -> dict[str, str]:
    return {step.name.split(".", 1)[1]: step.state for step in observed.steps}


def test_every_entry_is_covered() -> None:
    assert len(ENTRIES) == 13
    assert all("authentic" in entry["expect"] or "signature" in entry["expect"] for entry in ENTRIES)


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry["name"]) for entry in ENTRIES])
def test_every_expected_fact_is_observed(entry: dict[str, Any]) -> None:
    observed = observe(_case(entry))
    assert differences(entry["expect"], observed) == {}
    assert observed.facts["authentic"] is entry["expect"].get("authentic", False)
    assert (observed.claims is not None) == observed.facts["authentic"]


@pytest.mark.parametrize("entry", _named("authentic"))
def test_outcome(entry: dict[str, Any]) -> None:
    expect = entry["expect"]
    kind, data, _ = _parsed(entry)
    if not expect["authentic"]:
        error = refusal(_verify, entry, data)
        assert error.code == "evidence-not-authentic"
        assert error.reasons[0].where == STEPS[expect["reason"]]
        return
    claims = _verify(entry, data)
    assert (claims.tee, claims.soft, claims.debug) == (kind, False, False)
    assert claims.tcb_status == expect["tcb"]
    assert claims.tcb_date is not None
    assert claims.valid_until is not None
    assert claims.valid_until > datetime.fromisoformat(entry["at"])
    assert len(claims.platform["ppid"]) == 32
    assert len(claims.chain) == 3
    assert claims.launch in claims.measurements
    assert claims.svns["tcb_evaluation_data_number"] >= 17
    policy = Policy("place.enclave", "tee", accept=frozenset({kind}), tcb_statuses=frozenset({expect["tcb"]}))
    assert appraise(claims, policy) == ()
    # hardware never passes where only simulation is named, and an old machine not where a newer one is
    assert [each.where for each in appraise(claims, replace(policy, accept=frozenset({"simulated"})))] == [
        "place.enclave.accept"
    ]
    assert [each.where for each in appraise(claims, replace(policy, min_tcb=(2099, 1)))] == ["place.enclave.min_tcb"]


def test_the_real_enclave_needs_hardening_that_the_default_policy_refuses() -> None:
    entry = _one("sgx3-processor-swhardening")
    claims = _verify(entry, _parsed(entry)[1])
    assert claims.report_data.rstrip(b"\x00") == b"Hello, world!"
    assert claims.log_in == "report-data"
    assert claims.platform["sgx_type"] == "0"
    assert "dynamic_platform" not in claims.attributes  # a Processor CA certificate does not say, so a demand refuses
    refused = appraise(claims, Policy("place.enclave", "tee", accept=frozenset({"sgx"})))
    assert [each.where for each in refused] == ["place.enclave.tcb_status"]


@pytest.mark.parametrize("entry", _named("authentic"))
def test_a_padded_quote_is_refused_as_it_lies_there(entry: dict[str, Any]) -> None:
    data = _file(entry, "quote")
    kind, exact, _ = _parsed(entry)
    if data == exact:
        data += b"\x00"
    error = refusal(_verify, entry, data)
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", f"{kind}.1-format")


@pytest.mark.parametrize("entry", _named("authentic"))
def test_no_flipped_bit_of_real_evidence_is_accepted(entry: dict[str, Any]) -> None:
    _, good, quote = _parsed(entry)
    for position in range(0, len(quote.signed), 7):
        changed = bytearray(good)
        changed[position] ^= 1 << (position % 8)
        refusal(_verify, entry, bytes(changed))


@pytest.mark.parametrize("entry", _named("signature"))
def test_signature_without_collateral(entry: dict[str, Any]) -> None:
    at = datetime.fromisoformat(entry["at"])
    observed = observe(_case(entry))
    if not entry["expect"]["signature"]:
        # Intel's sample quote under Intel's test keys, without a chain: refused, whatever step sees it first
        assert observed.error is not None
        return
    kind, data, quote = _parsed(entry)
    assert signatures_hold(quote, root_sha256=INTEL_SGX_ROOT_CA, at=at)
    states = _states(observed)
    assert {states[each] for each in ("1-format", "2-root", "4-chain", "5-qe", "6-signature")} == {"passed"}
    assert {states[each] for each in ("3-collateral", "7-tcb", "9-agree")} == {"not done"}
    # and without collateral nothing is accepted
    error = refusal(verify, Evidence(kind, data), Endorsements(), Roots(), now=at)
    assert (error.code, error.reasons[0].where) == ("evidence-not-authentic", f"{kind}.3-collateral")


@pytest.mark.parametrize("entry", _named("signature"))
def test_no_flipped_bit_holds_a_signature(entry: dict[str, Any]) -> None:
    if not entry["expect"]["signature"]:
        return
    _, good, quote = _parsed(entry)
    case = _case(entry)
    for position in range(0, len(quote.signed) + 4 + 128 + 448, 31):
        changed = bytearray(good)
        changed[position] ^= 1 << (position % 8)
        observed = observe(replace(case, files={**case.files, "quote": bytes(changed)}))
        assert observed.facts["signature"] is False
        assert observed.error is not None


@pytest.mark.parametrize("entry", _named("authentic"))
def test_three_implementations_agree_on_signatures(entry: dict[str, Any]) -> None:
    _, _, quote = _parsed(entry)
    assert signatures_hold(quote, root_sha256=INTEL_SGX_ROOT_CA, at=datetime.fromisoformat(entry["at"]))
    assert observe(_case(entry)).facts["signature"] is True


def test_the_real_debug_td_says_debug() -> None:
    entry = _one("tdx4-debug")
    _, data, quote = _parsed(entry)
    assert quote.debug
    error = refusal(_verify, entry, data)
    assert (error.reasons[0].found, error.reasons[0].wanted) == ("Debug mode is enabled", "debug off")


def test_the_real_debug_enclave_is_refused_without_collateral_already() -> None:
    observed = observe(_case(_one("sgx3-debug-nocollateral")))
    assert observed.error is not None
    assert observed.error.reasons[0].where == "sgx.8-attributes"
    assert _states(observed)["8-attributes"] == "failed"
    assert observed.fields["debug"].startswith("on")


def test_the_real_boot_log_explains_its_registers() -> None:
    observed = observe(_case(_one("tdx4-gcp-ccel")))
    assert observed.facts["rtmr_replay"] == [0, 1, 2]
    assert _states(observed)["11-boot"] == "passed"


def test_a_boot_log_with_a_separator_twice_is_refused() -> None:
    observed = observe(_case(_one("tdx4-gcp-ccel-tampered")))
    assert observed.error is not None
    assert [reason.where for reason in observed.error.reasons] == ["tdx.11-boot.rtmr0", "tdx.11-boot.rtmr1"]


def test_real_collateral_of_another_machine_is_refused() -> None:
    """Collateral of FMSPC 90C06F for a quote of B0C06F: found only because the caller offers it by name."""
    case, other = _case(_one("tdx4-uptodate")), _case(_one("tdx5-uptodate"))
    changed = {**case.files, "collateral": other.files["collateral"]}
    observed = observe(replace(case, files=changed, now=other.now))
    assert observed.error is not None
    assert "Fmspc mismatch" in observed.error.message
    assert observed.error.reasons[0].where == "tdx.7-tcb"


def test_real_sgx_collateral_is_refused_for_a_td() -> None:
    case, other = _case(_one("tdx4-uptodate")), _case(_one("sgx3-processor-swhardening"))
    observed = observe(replace(case, files={**case.files, "collateral": other.files["collateral"]}))
    assert observed.error is not None
    assert {reason.where for reason in observed.error.reasons} >= {"tdx.3-collateral.kind", "tdx.4-chain.revocation"}


def test_a_caller_may_offer_collateral_among_other_files() -> None:
    case = _case(_one("tdx4-uptodate"))
    files = {"quote": case.files["quote"]}
    offered = {"a": b"something else", "b": case.files["collateral"]}
    assert observe(replace(case, files=files, collateral=offered)).facts["authentic"] is True
    assert observe(replace(case, files=files, collateral={"a": b"{}"})).facts["authentic"] is False


def test_a_nonce_that_is_not_in_the_quote_is_refused() -> None:
    case = _case(_one("sgx3-processor-swhardening"))
    assert observe(replace(case, nonce=b"Hello, world!")).error is None
    observed = observe(replace(case, nonce=b"Hello, world?"))
    assert observed.facts["authentic"] is False
    assert isinstance(observed.error, EvidenceError)
    assert (observed.steps[-1].name, observed.steps[-1].state) == ("freshness", "failed")


def test_a_quote_whose_runtime_log_nobody_kept_is_looked_at_all_the_same() -> None:
    """dstack and others extend RTMR 3; their quotes come without our log, so step 10 is not done, and nothing decides by it."""
    from cloister.attestation.soft import tdx as soft_tdx
    from cloister.testkit.softtee import MEASUREMENT, NOW, SOFT_ROOTS

    quote = soft_tdx.quote(soft_tdx.platform(), mrtd=MEASUREMENT, report_data=bytes(64), rtmr3=b"\x07" * 48)
    files = {"quote": quote, "collateral": soft_tdx.collateral(NOW)}
    observed = observe(Case("dcap", files, NOW, roots=SOFT_ROOTS))
    assert observed.facts["authentic"] is True
    assert _states(observed)["10-events"] == "not done"
    assert observed.claims is not None
    assert observed.claims.events == ()
    endorsements = Endorsements(soft_tdx.endorsements(NOW))
    error = refusal(verify, Evidence("tdx", quote), endorsements, SOFT_ROOTS, now=NOW)
    assert error.reasons[0].where == "tdx.10-events.replay"
