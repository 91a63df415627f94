"""Appraisal: every rule refuses alone, all refuse together in order, and absence never accepts."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.attestation.appraise import appraise
from cloister.attestation.types import Claims, Policy

GOOD = Claims(
    kind="tee",
    tee="tdx",
    debug=False,
    tcb_status="UpToDate",
    tcb_date=date(2026, 8, 12),
    advisories=("INTEL-SA-00001",),
    measurements=MappingProxyType({"mrtd": b"\x01" * 48}),
    gpu="confidential",
)
WANTED = Policy(
    where="place.enclave",
    kind="tee",
    accept=frozenset({"tdx", "sev-snp"}),
    min_tcb=(2026, 8),
    gpu="confidential",
    deny_advisories=frozenset({"INTEL-SA-00002"}),
    reference_values=MappingProxyType({"mrtd": frozenset({b"\x01" * 48})}),
)


def rules(claims: Claims, policy: Policy) -> list[str]:
    reasons = appraise(claims, policy)
    assert all(reason.found and reason.wanted for reason in reasons)
    return [reason.where for reason in reasons]


def test_what_keeps_every_rule_is_accepted() -> None:
    assert appraise(GOOD, WANTED) == ()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"debug": True}, "debug"),
        ({"tee": "sgx"}, "accept"),
        ({"tee": ""}, "accept"),
        ({"tcb_status": "OutOfDate"}, "tcb_status"),
        ({"tcb_status": ""}, "tcb_status"),
        ({"tcb_status": "NewWordOfTheVendor"}, "tcb_status"),
        ({"tcb_date": date(2026, 7, 31)}, "min_tcb"),
        ({"tcb_date": date(2025, 12, 1)}, "min_tcb"),
        ({"tcb_date": None}, "min_tcb"),
        ({"advisories": ("INTEL-SA-00002",)}, "deny_advisories"),
        ({"gpu": "none"}, "gpu"),
        ({"measurements": MappingProxyType({"mrtd": b"\x02" * 48})}, "mrtd"),
        ({"measurements": MappingProxyType({})}, "mrtd"),
    ],
)
def test_each_rule_refuses_alone(change: dict[str, Any], rule: str) -> None:
    assert rules(replace(GOOD, **change), WANTED) == [f"place.enclave.{rule}"]


def test_all_violations_come_together_in_rule_order() -> None:
    bad = Claims(
        kind="attested-host",
        tee="soft-tdx",
        debug=True,
        tcb_status="Revoked",
        tcb_date=None,
        advisories=("INTEL-SA-00002",),
        boot="sha256:other",
    )
    policy = replace(WANTED, boot=frozenset({"sha256:state"}), scheme="ckks-128")
    assert [where.removeprefix("place.enclave.") for where in rules(bad, policy)] == [
        "debug",
        "kind",
        "accept",
        "tcb_status",
        "min_tcb",
        "deny_advisories",
        "gpu",
        "boot",
        "scheme",
        "mrtd",
    ]


def test_claims_by_default_are_refused() -> None:
    """What a verifier does not know must refuse: debug is assumed, the status is empty."""
    found = rules(Claims(kind="tee", tee="tdx"), Policy("p", "tee", frozenset({"tdx"})))
    assert found == ["p.debug", "p.tcb_status"]


def test_empty_accept_accepts_nothing() -> None:
    for tee in ("tdx", "sev-snp", "soft-tdx", ""):
        assert "p.accept" in rules(replace(GOOD, tee=tee), Policy("p", "tee"))


def test_simulated_accepts_soft_tees_and_nothing_else_does() -> None:
    simulated = Policy("p", "tee", frozenset({"simulated"}))
    assert rules(replace(GOOD, tee="soft-tdx"), simulated) == []
    assert rules(replace(GOOD, tee="soft-sev-snp"), simulated) == []
    assert rules(GOOD, simulated) == ["p.accept"]
    # neither the hardware's word nor the soft word itself lets software in
    assert rules(replace(GOOD, tee="soft-tdx"), Policy("p", "tee", frozenset({"tdx", "soft-tdx"}))) == ["p.accept"]
    # and no hardware can call itself "simulated"
    assert rules(replace(GOOD, tee="simulated"), simulated) == ["p.accept"]


def test_debug_needs_the_policy_to_say_so() -> None:
    policy = Policy("p", "tee", frozenset({"tdx"}))
    assert rules(replace(GOOD, debug=True), policy) == ["p.debug"]
    assert rules(replace(GOOD, debug=True), replace(policy, debug=True)) == []


def test_min_tcb_compares_year_then_month() -> None:
    policy = Policy("p", "tee", frozenset({"tdx"}), min_tcb=(2026, 2))
    assert rules(replace(GOOD, tcb_date=date(2026, 2, 1)), policy) == []
    assert rules(replace(GOOD, tcb_date=date(2025, 12, 31)), policy) == ["p.min_tcb"]
    assert rules(replace(GOOD, tcb_date=date(2027, 1, 1)), policy) == []


def test_a_reference_value_with_an_empty_list_accepts_nothing() -> None:
    policy = replace(WANTED, reference_values=MappingProxyType({"mrtd": frozenset[bytes]()}))
    assert rules(GOOD, policy) == ["place.enclave.mrtd"]


def test_attested_host_is_judged_by_its_boot_state() -> None:
    host = Claims(kind="attested-host", tee="tpm", debug=False, boot="sha256:a")
    policy = Policy("place.gpu-host", "attested-host", boot=frozenset({"sha256:a"}))
    assert rules(host, policy) == []
    assert rules(replace(host, boot="sha256:b"), policy) == ["place.gpu-host.boot"]
    assert rules(replace(host, boot=None), policy) == ["place.gpu-host.boot"]
    assert rules(host, Policy("place.gpu-host", "attested-host")) == ["place.gpu-host.boot"]
    assert rules(replace(host, debug=True), policy) == ["place.gpu-host.debug"]
    assert "place.gpu-host.kind" in rules(GOOD, policy)


def test_a_soft_host_is_refused_unless_simulated_is_named() -> None:
    soft = Claims(kind="attested-host", tee="soft-tpm", debug=False, boot="sha256:a")
    policy = Policy("place.gpu-host", "attested-host", boot=frozenset({"sha256:a"}))
    assert rules(soft, policy) == ["place.gpu-host.kind"]
    assert rules(soft, replace(policy, accept=frozenset({"tpm", "soft-tpm"}))) == ["place.gpu-host.kind"]
    assert rules(soft, replace(policy, accept=frozenset({"simulated"}))) == []


def test_he_place_judges_only_kind_and_scheme() -> None:
    outside = Claims(kind="he", tee="", scheme="ckks-128")  # debug is True, status is empty: nobody trusts the machine
    policy = Policy("place.cipher", "he", scheme="ckks-128", gpu="confidential", min_tcb=(2026, 8))
    assert rules(outside, policy) == []
    assert rules(replace(outside, scheme="bgv-128"), policy) == ["place.cipher.scheme"]
    assert rules(replace(outside, scheme=None), policy) == ["place.cipher.scheme"]
    assert rules(replace(outside, kind="tee"), policy) == ["place.cipher.kind"]
    assert rules(replace(outside, scheme=None), Policy("place.cipher", "he")) == ["place.cipher.scheme"]


def test_a_he_place_never_passes_for_a_tee() -> None:
    outside = Claims(kind="he", tee="tdx", debug=False, tcb_status="UpToDate", scheme="ckks-128")
    assert rules(outside, Policy("p", "tee", frozenset({"tdx"}))) == ["p.kind"]


_CLAIMS = st.builds(
    Claims,
    kind=st.sampled_from(["tee", "attested-host", "he"]),
    tee=st.sampled_from(["tdx", "sev-snp", "soft-tdx", "soft-tpm", "simulated", ""]),
    debug=st.booleans(),
    tcb_status=st.sampled_from(["UpToDate", "SWHardeningNeeded", "OutOfDate", "Revoked", ""]),
    tcb_date=st.one_of(st.none(), st.dates(date(2020, 1, 1), date(2030, 12, 31))),
    gpu=st.sampled_from(["none", "confidential"]),
    boot=st.sampled_from([None, "sha256:a"]),
    scheme=st.sampled_from([None, "ckks-128"]),
)
_POLICIES = st.builds(
    Policy,
    where=st.just("p"),
    kind=st.sampled_from(["tee", "attested-host", "he"]),
    accept=st.frozensets(st.sampled_from(["tdx", "sev-snp", "simulated", "soft-tdx"])),
    min_tcb=st.one_of(st.none(), st.tuples(st.integers(2020, 2030), st.integers(1, 12))),
    gpu=st.sampled_from(["none", "confidential"]),
    scheme=st.sampled_from([None, "ckks-128"]),
)


@given(_CLAIMS, _POLICIES)
def test_what_is_accepted_in_a_tee_is_never_debug_never_soft_unasked_never_of_unknown_tcb(
    claims: Claims, policy: Policy
) -> None:
    if appraise(claims, policy) or policy.kind != "tee":
        return
    assert claims.kind == "tee"
    assert not claims.debug
    assert claims.tcb_status in {"UpToDate", "SWHardeningNeeded"}
    assert claims.soft == ("simulated" in policy.accept and claims.tee not in policy.accept - {"soft-tdx"})
    assert policy.accept


@given(_CLAIMS, _POLICIES)
def test_no_place_with_hardware_takes_soft_evidence_unasked(claims: Claims, policy: Policy) -> None:
    if claims.soft and policy.kind != "he" and "simulated" not in policy.accept:
        assert {"p.accept", "p.kind"} & {reason.where for reason in appraise(claims, policy)}
