"""Appraisal: every rule refuses alone, all refuse together in order, and absence never accepts."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, datetime, timedelta
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.attestation.appraise import appraise
from cloister.attestation.types import BootEvent, Claims, LogRule, Policy, Software

TODAY = date(2026, 11, 20)
SHIM, KERNEL, EVIL = b"\x05" * 48, b"\x06" * 48, b"\x66" * 48
GPU = Claims(
    kind="device",
    tee="nvidia-gpu",
    debug=False,
    tcb_status="NotRated",
    svns=MappingProxyType({"driver": 550}),
    attributes=MappingProxyType({"devtools": False}),
    platform=MappingProxyType({"ueid": "aa01"}),
    gpu="confidential",
)
TPM = Claims(kind="device", tee="tpm", debug=False, tcb_status="NotRated", platform=MappingProxyType({"ak": "0b"}))
GOOD = Claims(
    kind="tee",
    tee="tdx",
    debug=False,
    tcb_status="UpToDate",
    tcb_date=date(2026, 8, 12),
    advisories=("INTEL-SA-00001",),
    measurements=MappingProxyType({"mrtd": b"\x01" * 48, "rtmr1": b"\x02" * 48}),
    svns=MappingProxyType({"tcb_evaluation_data_number": 18, "isvprodid": 7}),
    attributes=MappingProxyType({"smt": False, "sept_ve_disable": True}),
    platform=MappingProxyType({"ppid": "0a", "fmspc": "50", "sgx_type": "1"}),
    boot_log=(BootEvent(2, "EV_IPL", SHIM), BootEvent(2, "EV_IPL", KERNEL), BootEvent(1, "EV_SEPARATOR", EVIL)),
    gpu="confidential",
    devices=(GPU, TPM),
)
BUILD = Software(
    "release-2",
    tee="tdx",
    measurements=MappingProxyType({"mrtd": frozenset({b"\x01" * 48})}),
    svns_equal=MappingProxyType({"isvprodid": 7}),
    svns_least=MappingProxyType({"tcb_evaluation_data_number": 17}),
    log=(LogRule(2, frozenset({SHIM}), type="EV_IPL"), LogRule(2, frozenset({SHIM, KERNEL}), only=True)),
)
OLD_BUILD = Software("release-1", tee="tdx", measurements=MappingProxyType({"mrtd": frozenset({b"\x09" * 48})}))
WANTED = Policy(
    where="place.enclave",
    kind="tee",
    accept=frozenset({"tdx", "sev-snp"}),
    min_tcb=(2026, 8),
    gpu="confidential",
    deny_advisories=frozenset({"INTEL-SA-00002"}),
    reference_values=MappingProxyType({"mrtd": frozenset({b"\x01" * 48})}),
    software=(BUILD,),
    min_svn=MappingProxyType({"tdx": {"tcb_evaluation_data_number": 18}, "nvidia-gpu": {"driver": 550}}),
    require=MappingProxyType({"tdx": {"smt": False, "sept_ve_disable": True}, "nvidia-gpu": {"devtools": False}}),
    max_tcb_age=timedelta(days=100),
    platform_allow=frozenset({("ppid", "0a"), ("ppid", "0b")}),
    platform_deny=frozenset({("ppid", "0c"), ("ueid", "aa02")}),
    gpu_allow=frozenset({("ueid", "aa01")}),
    require_attested_boot=True,
)
"""Every rule that a policy can have; `GOOD` keeps them all."""


def rules(claims: Claims, policy: Policy, today: date | None = TODAY) -> list[str]:
    reasons = appraise(claims, policy, today=today)
    assert all(reason.found and reason.wanted for reason in reasons)
    return [reason.where for reason in reasons]


def gpu(**change: Any) -> dict[str, Any]:
    """Claims of a machine whose GPU differs."""
    return {"devices": (replace(GPU, **change), TPM)}


def log(*events: BootEvent) -> dict[str, Any]:
    return {"boot_log": events}


NONE: MappingProxyType[str, Any] = MappingProxyType({})
BUILD_2 = "software.release-2"


def test_what_keeps_every_rule_is_accepted() -> None:
    assert appraise(GOOD, WANTED, today=TODAY) == ()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"debug": True}, "debug"),
        ({"tee": "sgx"}, f"accept {BUILD_2}.tee"),
        ({"tee": ""}, f"accept {BUILD_2}.tee"),
        ({"tcb_status": "OutOfDate"}, "tcb_status"),
        ({"tcb_status": ""}, "tcb_status"),
        ({"tcb_status": "NewWordOfTheVendor"}, "tcb_status"),
        ({"tcb_date": date(2026, 7, 31)}, "min_tcb max_tcb_age"),
        ({"tcb_date": date(2025, 12, 1)}, "min_tcb max_tcb_age"),
        ({"tcb_date": None}, "min_tcb max_tcb_age"),
        ({"advisories": ("INTEL-SA-00002",)}, "deny_advisories"),
        ({"gpu": "none"}, "gpu"),
        ({"tcb_date": date(2026, 8, 11)}, "max_tcb_age"),
        (
            {"svns": MappingProxyType({"tcb_evaluation_data_number": 17, "isvprodid": 7})},
            "min_svn.tcb_evaluation_data_number",
        ),
        ({"attributes": MappingProxyType({"smt": True, "sept_ve_disable": True})}, "require.smt"),
        ({"attributes": MappingProxyType({"smt": False, "sept_ve_disable": False})}, "require.sept_ve_disable"),
        ({"attributes": MappingProxyType({"sept_ve_disable": True})}, "require.smt"),
        ({"attributes": MappingProxyType({"smt": 0, "sept_ve_disable": 1})}, "require.sept_ve_disable require.smt"),
        ({"platform": MappingProxyType({"ppid": "0d"})}, "platforms.allow"),
        ({"platform": MappingProxyType({"ppid": "0c"})}, "platforms.allow platforms.deny"),
        ({"platform": MappingProxyType({"fmspc": "0a"})}, "platforms.allow platforms.deny"),
        ({"platform": NONE}, "platforms.allow platforms.deny"),
        ({"devices": ()}, "gpu gpus.allow"),
        ({"devices": (TPM,)}, "gpu gpus.allow"),
        (gpu(gpu="none"), "gpu"),
        (gpu(debug=True), "gpu0.debug"),
        (gpu(tcb_status=""), "gpu0.tcb_status"),
        (gpu(tcb_status="Revoked"), "gpu0.tcb_status"),
        (gpu(advisories=("INTEL-SA-00002",)), "gpu0.deny_advisories"),
        (gpu(svns=MappingProxyType({"driver": 535})), "gpu0.min_svn.driver"),
        (gpu(svns=NONE), "gpu0.min_svn.driver"),
        (gpu(attributes=NONE), "gpu0.require.devtools"),
        (gpu(platform=MappingProxyType({"ueid": "aa02"})), "gpu0.platforms.deny gpu0.gpus.allow"),
        (gpu(platform=MappingProxyType({"ueid": "aa03"})), "gpu0.gpus.allow"),
        (gpu(platform=NONE), "gpu0.platforms.deny gpu0.gpus.allow"),
        (gpu(tee="soft-nvidia-gpu"), "accept"),
        ({"devices": (GPU, TPM, replace(GPU, gpu="none"))}, "gpu"),
        ({"devices": (GPU, TPM, replace(GPU, debug=True))}, "gpu1.debug"),
        ({"devices": (GPU, replace(TPM, debug=True))}, "tpm0.debug"),
        ({"devices": (GPU, replace(TPM, tee="soft-tpm"))}, "accept"),
        (log(), f"boot_log {BUILD_2}.log.2.EV_IPL {BUILD_2}.log.2"),
        (log(BootEvent(2, "EV_IPL", SHIM), BootEvent(2, "EV_IPL", EVIL)), f"{BUILD_2}.log.2"),
        # the attacker renames the type of what was not wanted: it counts all the same
        (log(BootEvent(2, "EV_IPL", SHIM), BootEvent(2, "EV_ACTION", EVIL)), f"{BUILD_2}.log.2"),
        (log(BootEvent(1, "EV_IPL", SHIM)), f"{BUILD_2}.log.2.EV_IPL {BUILD_2}.log.2"),
        ({"measurements": MappingProxyType({"mrtd": b"\x02" * 48})}, f"mrtd {BUILD_2}.mrtd"),
        ({"measurements": MappingProxyType({})}, f"mrtd {BUILD_2}.mrtd"),
        ({"svns": MappingProxyType({"tcb_evaluation_data_number": 18})}, f"{BUILD_2}.isvprodid"),
        ({"svns": MappingProxyType({"tcb_evaluation_data_number": 18, "isvprodid": 8})}, f"{BUILD_2}.isvprodid"),
    ],
)
def test_each_rule_refuses_alone(change: dict[str, Any], rule: str) -> None:
    assert rules(replace(GOOD, **change), WANTED) == [f"place.enclave.{each}" for each in rule.split()]


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
    bad = replace(bad, devices=(replace(GPU, debug=True, platform=MappingProxyType({"ueid": "aa02"})),))
    policy = replace(WANTED, boot=frozenset({"sha256:state"}), scheme="ckks-128")
    assert [where.removeprefix("place.enclave.") for where in rules(bad, policy)] == [
        "debug",
        "gpu0.debug",
        "kind",
        "accept",
        "tcb_status",
        "min_tcb",
        "max_tcb_age",
        "min_svn.tcb_evaluation_data_number",
        "deny_advisories",
        "require.sept_ve_disable",
        "require.smt",
        "platforms.allow",
        "gpu0.platforms.deny",
        "platforms.deny",
        "gpu",
        "gpu0.gpus.allow",
        "boot",
        "boot_log",
        "scheme",
        "mrtd",
        "software.release-2.mrtd",
        "software.release-2.isvprodid",
        "software.release-2.tcb_evaluation_data_number",
        "software.release-2.log.2.EV_IPL",
        "software.release-2.log.2",
    ]


def test_hardware_without_tcb_dates_needs_a_floor_instead() -> None:
    snp = Claims(kind="tee", tee="sev-snp", debug=False, tcb_status="NotRated", svns=MappingProxyType({"snp": 22}))
    policy = Policy("p", "tee", frozenset({"sev-snp"}), min_tcb=(2026, 8))
    assert rules(snp, policy) == ["p.min_tcb"]
    assert rules(snp, replace(policy, min_svn={"sev-snp": {}})) == ["p.min_tcb"]
    assert rules(snp, replace(policy, min_svn={"tdx": {"snp": 1}})) == ["p.min_tcb"]  # somebody else's floor
    assert rules(snp, replace(policy, min_svn={"sev-snp": {"snp": 22}})) == []
    assert rules(snp, replace(policy, min_svn={"sev-snp": {"snp": 23}})) == ["p.min_svn.snp"]
    assert rules(snp, replace(policy, min_svn={"sev-snp": {"ucode": 1}})) == ["p.min_tcb", "p.min_svn.ucode"]
    # a vendor with dates is not excused by a floor, and an age is not met by a number
    assert "p.min_tcb" in rules(replace(snp, tcb_status="UpToDate"), replace(policy, min_svn={"sev-snp": {"snp": 1}}))
    aged = replace(policy, min_svn={"sev-snp": {"snp": 1}}, max_tcb_age=timedelta(days=9999))
    assert rules(snp, aged) == ["p.max_tcb_age"]


@pytest.mark.parametrize("floor", [{"snp": 0}, {"guest_svn": 1}, {"reset_count": 0}, {"guest_svn": 1, "microcode": 0}])
@pytest.mark.parametrize("tee", ["sev-snp", "azure-snp", "soft-sev-snp"])
def test_a_floor_that_says_nothing_about_firmware_stands_for_no_date(tee: str, floor: dict[str, int]) -> None:
    """`min_tcb` would look strict and let the oldest firmware in."""
    svns = MappingProxyType({"snp": 0, "microcode": 0, "guest_svn": 9, "reset_count": 9})
    old = Claims(kind="tee", tee=tee, debug=False, tcb_status="NotRated", svns=svns)
    policy = Policy("p", "tee", frozenset({tee, "simulated"}), min_tcb=(2026, 8))
    kind = tee.removeprefix("soft-")
    assert rules(old, replace(policy, min_svn={kind: floor})) == ["p.min_tcb"]
    assert rules(old, replace(policy, min_svn={kind: floor | {"snp": 1}})) == ["p.min_svn.snp"]


def test_a_device_that_is_left_out_meets_no_rule_for_it() -> None:
    policy = Policy("p", "tee", frozenset({"tdx"}), require={"tpm": {"safe": True}}, min_svn={"tpm": {"firmware": 2}})
    good = replace(TPM, attributes=MappingProxyType({"safe": True}), svns=MappingProxyType({"firmware": 2}))
    assert rules(replace(GOOD, devices=(good,)), policy) == []
    assert rules(replace(GOOD, devices=()), policy) == ["p.min_svn", "p.require"]
    assert rules(replace(GOOD, devices=(GPU,)), policy) == ["p.min_svn", "p.require"]
    gpus = replace(policy, require={"nvidia-gpu": {"devtools": False}}, min_svn={})
    assert rules(replace(GOOD, devices=()), gpus) == ["p.require"]
    assert rules(replace(GOOD, devices=()), replace(gpus, gpu="confidential")) == ["p.gpu"]


def test_a_deny_list_in_capitals_denies() -> None:
    """OpenSSL and clouds write ids in capitals; the machine is the same."""
    machine = replace(GOOD, platform=MappingProxyType({"ppid": "0a", "vm_unique_id": "fe25e2b5-0001"}))
    for denied in (("ppid", "0A"), ("vm_unique_id", "FE25E2B5-0001")):
        policy = Policy("p", "tee", frozenset({"tdx"}), platform_deny=frozenset({denied}))
        assert "p.platforms.deny" in rules(machine, policy)


def test_an_age_needs_a_day() -> None:
    policy = Policy("p", "tee", frozenset({"tdx"}), max_tcb_age=timedelta(days=100))
    assert rules(GOOD, policy) == []
    assert rules(GOOD, policy, None) == ["p.max_tcb_age"]
    assert rules(GOOD, policy, TODAY + timedelta(days=1)) == ["p.max_tcb_age"]
    assert rules(GOOD, policy, date(2020, 1, 1)) == []  # a level dated after today is no older than wanted
    assert rules(GOOD, policy, date.max) == ["p.max_tcb_age"]
    with pytest.raises(ValueError, match="a day"):
        appraise(GOOD, policy, today=datetime(2026, 11, 20))  # noqa: DTZ001


def test_rules_for_a_type_hold_for_its_soft_twin_too() -> None:
    soft = replace(GOOD, tee="soft-tdx", devices=())
    policy = Policy("p", "tee", frozenset({"simulated"}), min_svn={"tdx": {"tcb_evaluation_data_number": 19}})
    assert rules(soft, policy) == ["p.min_svn.tcb_evaluation_data_number"]
    assert rules(soft, Policy("p", "tee", frozenset({"simulated"}), require={"tdx": {"smt": True}})) == [
        "p.require.smt"
    ]
    assert rules(soft, Policy("p", "tee", frozenset({"simulated"}), software=(BUILD,))) == []


def test_a_soft_device_makes_the_machine_soft() -> None:
    mixed = replace(GOOD, devices=(replace(GPU, tee="soft-nvidia-gpu"),))
    hardware = Policy("p", "tee", frozenset({"tdx", "nvidia-gpu", "soft-nvidia-gpu"}))
    (reason,) = appraise(mixed, hardware)
    assert (reason.where, reason.found) == ("p.accept", "tdx with soft-nvidia-gpu")
    assert rules(mixed, replace(hardware, accept=frozenset({"simulated"}))) == []


def test_empty_lists_of_machines_accept_no_machine() -> None:
    policy = Policy("p", "tee", frozenset({"tdx"}))
    assert rules(GOOD, replace(policy, platform_allow=frozenset())) == ["p.platforms.allow"]
    assert rules(GOOD, replace(policy, gpu_allow=frozenset())) == ["p.gpu0.gpus.allow"]


def test_a_deny_list_is_not_escaped_by_hiding_the_id() -> None:
    """AMD lets a host mask CHIP_ID; a machine with a VLEK may show none."""
    snp = Claims(kind="tee", tee="sev-snp", debug=False, tcb_status="NotRated")
    policy = Policy("p", "tee", frozenset({"sev-snp", "tdx"}), platform_deny=frozenset({("chip_id", "ab" * 64)}))
    assert rules(snp, policy) == ["p.platforms.deny"]
    assert rules(replace(snp, platform=MappingProxyType({"chip_id": "ab" * 64})), policy) == ["p.platforms.deny"]
    assert rules(replace(snp, platform=MappingProxyType({"chip_id": "ac" * 64})), policy) == []
    assert rules(GOOD, policy) == []  # Intel has no CHIP_ID to hide
    assert rules(GOOD, replace(policy, platform_deny=frozenset({("ppid_", "0c")}))) == [
        "p.platforms.deny"
    ]  # a name of nothing


def test_an_id_counts_under_its_own_name_only() -> None:
    policy = Policy("p", "tee", frozenset({"tdx"}), platform_allow=frozenset({("chip_id", "0a")}))
    assert rules(GOOD, policy) == ["p.platforms.allow"]
    assert rules(replace(GOOD, platform=MappingProxyType({"ppid": "0A"})), WANTED)[0].endswith("platforms.allow")


def test_any_accepted_build_is_enough_and_the_closest_one_explains_a_refusal() -> None:
    policy = Policy("p", "tee", frozenset({"tdx"}))
    assert rules(GOOD, replace(policy, software=(OLD_BUILD, BUILD))) == []
    assert rules(GOOD, replace(policy, software=(OLD_BUILD,))) == ["p.software.release-1.mrtd"]
    far = replace(BUILD, measurements={name: frozenset({b"z"}) for name in ("mrtd", "rtmr1", "rtmr2")})
    assert rules(GOOD, replace(policy, software=(far, OLD_BUILD))) == ["p.software.release-1.mrtd"]
    # other hardware is never the closest, however little it says
    snp = Software("snp", tee="sev-snp", measurements={"mrtd": frozenset({b"\x01" * 48})})
    assert rules(GOOD, replace(policy, software=(snp, far)))[0] == "p.software.release-2.mrtd"
    assert rules(GOOD, replace(policy, software=(snp,))) == ["p.software.snp.tee"]


def test_software_without_a_rule_is_no_software() -> None:
    for empty in (Software("any"), Software("any", tee="tdx")):
        assert rules(GOOD, Policy("p", "tee", frozenset({"tdx"}), software=(empty,))) == ["p.software.any.rules"]


@pytest.mark.parametrize(
    "rule",
    [
        {"measurements": {"mrtd": frozenset()}},
        {"measurements": {"mrenclave": frozenset({b"\x01" * 48})}},
        {"svns_equal": {"isvsvn": 0}},
        {"svns_least": {"isvsvn": 0}},
        {"log": (LogRule(2, frozenset()),)},
        {"log": (LogRule(9, frozenset({SHIM})),)},
        {"log": (LogRule(9, frozenset({SHIM}), only=True),)},
        {"log": (LogRule(2, frozenset({SHIM}), type="EV_ACTION"),)},
        {"log": (LogRule(2, frozenset({SHIM}), only=True),)},
    ],
)
def test_what_is_absent_is_never_the_accepted_build(rule: dict[str, Any]) -> None:
    found = rules(GOOD, Policy("p", "tee", frozenset({"tdx"}), software=(Software("x", **rule),)))
    assert found
    assert all(where.startswith("p.software.x.") for where in found)


def test_only_takes_no_type_because_none_is_measured() -> None:
    with pytest.raises(ValueError, match="not measured"):
        LogRule(2, frozenset({SHIM}), type="EV_IPL", only=True)


def test_a_type_that_a_host_policy_names_is_judged() -> None:
    host = Claims(kind="attested-host", tee="tpm", debug=False, boot="sha256:a")
    policy = Policy("p", "attested-host", frozenset({"azure-snp"}), boot=frozenset({"sha256:a"}))
    assert rules(host, policy) == ["p.accept"]
    assert rules(host, replace(policy, accept=frozenset({"tpm"}))) == []
    assert rules(host, replace(policy, accept=frozenset())) == ["p.accept"], "an empty list accepts nothing"
    tpm = replace(policy, accept=frozenset({"tpm"}))
    assert rules(host, replace(tpm, min_svn={"tpm": {"x": 1}})) == ["p.min_svn.x"]
    assert rules(host, replace(tpm, platform_allow=frozenset())) == ["p.platforms.allow"]


def test_a_reason_names_a_few_of_many_accepted_values() -> None:
    many = frozenset(("ppid", f"{number:04x}") for number in range(100, 400))
    (reason,) = appraise(GOOD, Policy("p", "tee", frozenset({"tdx"}), platform_allow=many))
    assert reason.wanted.endswith("or one of 292 more")
    assert reason.found == "fmspc:50, ppid:0a"


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
    policy = Policy("place.gpu-host", "attested-host", frozenset({"tpm"}), boot=frozenset({"sha256:a"}))
    assert rules(host, policy) == []
    assert rules(replace(host, boot="sha256:b"), policy) == ["place.gpu-host.boot"]
    assert rules(replace(host, boot=None), policy) == ["place.gpu-host.boot"]
    assert rules(host, Policy("place.gpu-host", "attested-host")) == ["place.gpu-host.accept", "place.gpu-host.boot"]
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


_NAMES = st.sampled_from(["a", "b"])
_IDS = st.tuples(st.sampled_from(["ppid", "chip_id", "ueid", "other"]), st.sampled_from(["01", "02"]))
_PLATFORM = st.dictionaries(st.sampled_from(["ppid", "chip_id", "ueid", "other"]), st.sampled_from(["01", "02"]))
_DIGESTS = st.sampled_from([b"x", b"y"])
_DEVICES = st.lists(
    st.builds(
        Claims,
        kind=st.just("device"),
        tee=st.sampled_from(["nvidia-gpu", "tpm", "soft-nvidia-gpu"]),
        debug=st.booleans(),
        tcb_status=st.sampled_from(["NotRated", ""]),
        gpu=st.sampled_from(["none", "confidential"]),
        platform=_PLATFORM,
        svns=st.dictionaries(_NAMES, st.integers(0, 2)),
        attributes=st.dictionaries(_NAMES, st.booleans()),
    ),
    max_size=2,
).map(tuple)
_CLAIMS = st.builds(
    Claims,
    devices=_DEVICES,
    platform=_PLATFORM,
    svns=st.dictionaries(_NAMES, st.integers(0, 2)),
    attributes=st.dictionaries(_NAMES, st.booleans()),
    measurements=st.dictionaries(_NAMES, _DIGESTS),
    boot_log=st.lists(st.builds(BootEvent, st.integers(0, 1), st.sampled_from(["t", "u"]), _DIGESTS), max_size=3).map(
        tuple
    ),
    kind=st.sampled_from(["tee", "attested-host", "he"]),
    tee=st.sampled_from(["tdx", "sev-snp", "soft-tdx", "soft-tpm", "simulated", ""]),
    debug=st.booleans(),
    tcb_status=st.sampled_from(["UpToDate", "SWHardeningNeeded", "OutOfDate", "Revoked", "NotRated", ""]),
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
    assert claims.tcb_status in {"UpToDate", "SWHardeningNeeded", "NotRated"}
    assert not any(device.debug for device in claims.devices)
    assert not claims.soft or "simulated" in policy.accept
    assert claims.soft or claims.tee in policy.accept - {"simulated"}
    assert policy.accept


@given(_CLAIMS, _POLICIES)
def test_no_place_with_hardware_takes_soft_evidence_unasked(claims: Claims, policy: Policy) -> None:
    if claims.soft and policy.kind != "he" and "simulated" not in policy.accept:
        assert {"p.accept", "p.kind"} & {reason.where for reason in appraise(claims, policy)}


_VALUES = st.dictionaries(_NAMES, st.frozensets(_DIGESTS))
_NUMBERS = st.dictionaries(_NAMES, st.integers(0, 2))
_LOG_RULES = st.one_of(
    st.builds(LogRule, st.integers(0, 1), st.frozensets(_DIGESTS), st.sampled_from(["", "t"])),
    st.builds(LogRule, st.integers(0, 1), st.frozensets(_DIGESTS), only=st.just(True)),
)
_SOFTWARE = st.builds(
    Software,
    label=st.sampled_from(["one", "two"]),
    tee=st.sampled_from(["", "tdx", "sev-snp"]),
    measurements=_VALUES,
    svns_equal=_NUMBERS,
    svns_least=_NUMBERS,
    log=st.lists(_LOG_RULES, max_size=2).map(tuple),
)
_TYPES = st.sampled_from(["tdx", "sev-snp", "nvidia-gpu", "tpm"])
_RULES: dict[str, st.SearchStrategy[Any]] = {
    "min_tcb": st.tuples(st.integers(2020, 2030), st.integers(1, 12)),
    "gpu": st.just("confidential"),
    "boot": st.just(frozenset({"sha256:a"})),
    "scheme": st.just("ckks-128"),
    "deny_advisories": st.just(frozenset({"a"})),
    "reference_values": _VALUES,
    "software": st.lists(_SOFTWARE, min_size=1, max_size=3).map(tuple),
    "min_svn": st.dictionaries(_TYPES, _NUMBERS),
    "require": st.dictionaries(_TYPES, st.dictionaries(_NAMES, st.booleans())),
    "max_tcb_age": st.integers(0, 4000).map(lambda days: timedelta(days=days)),
    "platform_allow": st.frozensets(_IDS),
    "platform_deny": st.frozensets(_IDS),
    "gpu_allow": st.frozensets(_IDS),
    "require_attested_boot": st.just(True),
}
"""Every field of a policy that is a rule and is empty by default."""


@given(_CLAIMS, _POLICIES, st.data())
def test_one_more_rule_never_turns_a_refusal_into_an_acceptance(
    claims: Claims, policy: Policy, data: st.DataObject
) -> None:
    """`min_svn` completes `min_tcb` where there are no dates, so it is the one rule that may stand for another."""
    field = data.draw(st.sampled_from(sorted(_RULES)))
    base = replace(policy, min_tcb=None) if field == "min_svn" else policy
    unset: dict[str, Any] = {"gpu": "none", "scheme": None, "min_tcb": None}
    base = replace(base, **{name: value for name, value in unset.items() if name == field})
    if (policy.kind, field) in (("he", "scheme"), ("attested-host", "boot")):
        return  # the place is that list: without it nothing is accepted
    before = set(rules(claims, base))
    after = set(rules(claims, replace(base, **{field: data.draw(_RULES[field])})))
    assert before <= after


def test_every_field_of_a_policy_is_a_rule_of_these_tests() -> None:
    """A new field that nobody judges would be a promise to the author of a contract."""
    assert set(Policy.__dataclass_fields__) == {*_RULES, "where", "kind", "accept", "debug", "tcb_statuses"}
