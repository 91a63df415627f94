"""Which attester is found, the soft ones by name, and evidence of a whole machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cloister.attestation import events as event_log
from cloister.attestation.binding import check_binding
from cloister.attestation.edge import attester, nsm
from cloister.attestation.edge.attester import HARDWARE, SoftTdxAttester, attest, find_attester
from cloister.attestation.edge.gramine import GramineAttester
from cloister.attestation.edge.nsm import NitroAttester
from cloister.attestation.edge.tsm import SnpAttester, TdxAttester
from cloister.attestation.types import Evidence
from cloister.attestation.verify import verify
from cloister.errors import InputError, MachineError, Reason
from cloister.testkit.softtee import MEASUREMENT, NOW, SOFT_ROOTS, binding, soft_collateral, workload
from tests.attestation.fakes import Kernel, Nsm

REPORT_DATA = bytes(range(64))


def test_the_soft_attester_is_named_and_says_so() -> None:
    soft = find_attester("soft-tdx", measurement=MEASUREMENT)
    assert soft.name == "soft-tdx"
    assert "protects nothing" in repr(soft)
    soft.extend(event_log.WORKLOAD, workload().encode())
    claims = verify(soft.evidence(REPORT_DATA), soft_collateral(NOW), SOFT_ROOTS, now=NOW)
    assert claims.report_data == REPORT_DATA
    with pytest.raises(ValueError, match="64"):
        soft.evidence(bytes(32))
    with pytest.raises(ValueError, match="48"):
        find_attester("soft-tdx", measurement=bytes(32))


def test_auto_never_falls_back_to_software() -> None:
    """On a machine without a TEE, `auto` is an error that says what each kind lacks, not a soft TEE."""
    for kind in ("auto", *HARDWARE):
        lacking: tuple[Reason, ...] = ()
        try:
            assert find_attester(kind, measurement=MEASUREMENT).name in HARDWARE
        except MachineError as error:
            lacking = error.reasons
        if lacking:
            assert {each.where.split(".")[0] for each in lacking} == (set(HARDWARE) if kind == "auto" else {kind})
            assert all(each.found and each.wanted for each in lacking)
    with pytest.raises(InputError, match="unknown"):
        find_attester("soft", measurement=MEASUREMENT)


def test_auto_takes_the_first_that_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    amd, intel = Kernel(tmp_path / "amd", "sev_guest"), Kernel(tmp_path / "intel")
    found: dict[str, attester.Find] = {
        "sgx": lambda: GramineAttester(folder=tmp_path),
        "nitro": lambda: NitroAttester(device=nsm.Device(tmp_path / "no")),
        "tdx": lambda: TdxAttester(reports=amd.reports, register=intel.register, files=amd),
        "sev-snp": lambda: SnpAttester(reports=amd.reports, files=amd),
    }
    monkeypatch.setattr(attester, "HARDWARE", found)
    assert find_attester(measurement=MEASUREMENT).name == "sev-snp"
    with pytest.raises(MachineError, match="kind tdx") as caught:
        find_attester("tdx", measurement=MEASUREMENT)
    assert [(reason.where, reason.found) for reason in caught.value.reasons] == [("tdx.tee.provider", "sev_guest")]
    found["nitro"] = lambda: NitroAttester(device=Nsm())
    assert find_attester(measurement=MEASUREMENT).name == "nitro"
    assert find_attester("sev-snp", measurement=MEASUREMENT).name == "sev-snp"


def test_what_is_here_is_seen_whether_or_not_it_can_attest(tmp_path: Path) -> None:
    amd = Kernel(tmp_path / "amd", "sev_guest")
    hardware: dict[str, attester.Find] = {
        "sgx": lambda: GramineAttester(folder=tmp_path),
        "nitro": lambda: NitroAttester(device=Nsm()),
        "tdx": lambda: TdxAttester(reports=amd.reports, register=amd.register, files=amd),
        "sev-snp": lambda: SnpAttester(reports=amd.reports, files=amd),
    }
    (tmp_path / "sgx_enclave").touch()
    seen = attester.look(hardware=hardware, traces={"sgx": (tmp_path / "sgx_enclave", tmp_path / "no")})
    assert [(each.kind, bool(each.missing)) for each in seen] == [("sgx", True), ("nitro", False), ("sev-snp", False)]
    assert seen[0].traces == (tmp_path / "sgx_enclave",)
    assert "gramine" in seen[0].missing[0].where
    assert set(attester.TRACES) | {"azure-snp", "azure-tdx"} == set(HARDWARE)


# --- the whole machine ------------------------------------------------------------------------------------------------


class Device:
    name = "tpm"

    def __init__(self, mark: bytes) -> None:
        self.mark = mark
        self.asked: list[bytes] = []

    def evidence(self, qualifying_data: bytes) -> Evidence:
        self.asked.append(qualifying_data)
        return Evidence("tpm", self.mark + qualifying_data)


def test_the_cpu_attests_what_the_devices_said() -> None:
    devices = (Device(b"a"), Device(b"b"))
    machine = SoftTdxAttester(MEASUREMENT, devices=devices)
    bound = binding()
    evidence = attest(machine, bound)
    assert [each.quote[:1] for each in evidence.devices] == [b"a", b"b"]
    assert devices[0].asked == devices[1].asked == [bound.qualifying_data()]
    alone = verify(replace(evidence, devices=()), soft_collateral(NOW), SOFT_ROOTS, now=NOW)
    assert alone.report_data == bound.over(evidence.devices).report_data()
    assert alone.report_data != bound.report_data()
    with pytest.raises(ValueError, match="already"):
        attest(machine, bound.over(evidence.devices))


def test_a_cpu_without_devices_attests_the_binding_itself() -> None:
    evidence = attest(SoftTdxAttester(MEASUREMENT), binding())
    claims = verify(evidence, soft_collateral(NOW), SOFT_ROOTS, now=NOW)
    assert evidence.devices == ()
    assert check_binding(claims, binding()) == ()
