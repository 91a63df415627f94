"""Soft attesters of every kind: what they send is verified, bound, and explained by their log, as hardware's is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from cloister.attestation import events as event_log
from cloister.attestation.binding import check_binding
from cloister.attestation.edge import soft
from cloister.attestation.edge.attester import SOFT_KINDS, SoftTdxAttester, attest, find_attester
from cloister.attestation.edge.soft import SoftGpuAttester, SoftTpmDevice
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.evidence import decode, encode
from cloister.attestation.roots import Roots
from cloister.attestation.soft import cca as soft_cca
from cloister.attestation.soft import nvidia as soft_nvidia
from cloister.attestation.types import Claims, Evidence
from cloister.attestation.verify import verify
from cloister.errors import EvidenceError, MachineError
from cloister.testkit.softtee import MEASUREMENT, NOW, SOFT_ROOTS, binding, soft_collateral, workload

MADE: dict[str, Callable[..., Any]] = {
    "soft-tdx": SoftTdxAttester,
    "soft-sev-snp": soft.SoftSnpAttester,
    "soft-sgx": soft.SoftSgxAttester,
    "soft-nitro": lambda *given, **options: soft.SoftNitroAttester(*given, clock=lambda: NOW, **options),
    "soft-tpm": soft.SoftTpmAttester,
    "soft-cca": soft.SoftCcaAttester,
    "soft-azure-snp": soft.SOFT["soft-azure-snp"],
    "soft-azure-tdx": soft.SOFT["soft-azure-tdx"],
}
DEBUGGED = [kind for kind in SOFT_KINDS if kind not in ("soft-tpm",)]


def endorsements() -> Endorsements:
    found = soft_collateral(NOW)
    return found | soft_nvidia.endorsements(NOW - timedelta(hours=1)) | soft_cca.endorsements(NOW)


def judged(evidence: Evidence) -> Claims:
    return verify(decode(encode(evidence)), endorsements(), SOFT_ROOTS, now=NOW)


def test_every_soft_kind_is_here() -> None:
    assert set(SOFT_KINDS) == set(MADE) == {"soft-tdx", *soft.SOFT}


@pytest.mark.parametrize("kind", SOFT_KINDS)
def test_evidence_is_verified_bound_and_explained(kind: str) -> None:
    attester = MADE[kind](MEASUREMENT)
    attester.extend(event_log.WORKLOAD, workload().encode())
    evidence = attest(attester, binding())
    claims = judged(evidence)
    assert claims.tee == attester.name == kind
    assert claims.soft
    assert not claims.debug
    assert check_binding(claims, binding()) == ()
    assert [entry.data for entry in claims.events] == [workload().encode()]
    assert claims.measurements[claims.launch] == attester.launch
    assert "protects nothing" in repr(attester)
    other = binding(nonce=bytes(32))
    assert [reason.where for reason in check_binding(claims, other)] == ["binding.report_data"]


@pytest.mark.parametrize("kind", SOFT_KINDS)
def test_no_verifier_of_hardware_takes_it(kind: str) -> None:
    with pytest.raises(EvidenceError):
        verify(attest(MADE[kind](MEASUREMENT), binding()), endorsements(), Roots(), now=NOW)


@pytest.mark.parametrize("kind", SOFT_KINDS)
def test_a_log_that_was_changed_is_noticed(kind: str) -> None:
    """By the verifier where a register keeps the log, by the binding where the report data does."""
    attester = MADE[kind](MEASUREMENT)
    attester.extend(event_log.WORKLOAD, workload().encode())
    evidence = attest(attester, binding())
    for log in ((), (event_log.event(event_log.WORKLOAD, b"another"),), evidence.events * 2):
        try:
            noticed = bool(check_binding(judged(replace(evidence, events=log)), binding()))
        except EvidenceError:
            noticed = True
        assert noticed, log


@pytest.mark.parametrize("kind", SOFT_KINDS)
def test_another_measurement_shows(kind: str) -> None:
    other = MADE[kind](bytes(48))
    claims = judged(attest(other, binding()))
    assert claims.measurements[claims.launch] == other.launch != MADE[kind](MEASUREMENT).launch


@pytest.mark.parametrize("kind", DEBUGGED)
def test_a_debugged_machine_shows_or_is_refused(kind: str) -> None:
    try:
        shows = judged(attest(MADE[kind](MEASUREMENT, debug=True), binding())).debug
    except EvidenceError as error:
        shows = "debug" in str([str(reason) for reason in error.reasons]).lower()
    assert shows


@pytest.mark.parametrize("kind", SOFT_KINDS)
def test_devices_stand_beside_every_kind(kind: str) -> None:
    attester = MADE[kind](MEASUREMENT, devices=(SoftGpuAttester(), SoftTpmDevice()))
    evidence = attest(attester, binding())
    claims = judged(evidence)
    assert [each.tee for each in claims.devices] == ["soft-nvidia-gpu", "soft-tpm"]
    assert claims.gpu == "confidential"
    assert check_binding(claims, binding().over(evidence.devices)) == ()


@pytest.mark.parametrize("kind", SOFT_KINDS)
def test_a_gpu_of_another_machine_is_noticed(kind: str) -> None:
    """Mix and match: the CPU's evidence covers what its own devices said, and theirs covers the same nonce."""
    ours = attest(MADE[kind](MEASUREMENT, devices=(SoftGpuAttester(),)), binding())
    theirs = SoftGpuAttester(machine=soft_nvidia.gpu("other"))
    stolen = replace(ours, devices=(theirs.evidence(binding().qualifying_data()),))
    collateral = endorsements() | soft_nvidia.endorsements(NOW - timedelta(hours=1), (soft_nvidia.gpu("other"),))
    claims = verify(stolen, collateral, SOFT_ROOTS, now=NOW)
    reasons = check_binding(claims, binding().over(stolen.devices))
    assert [reason.where for reason in reasons] == ["binding.report_data"]


@pytest.mark.parametrize("kind", SOFT_KINDS)
def test_it_is_found_by_name_only(kind: str) -> None:
    attester = find_attester(kind, measurement=MEASUREMENT)
    assert attester.name == kind
    assert attester.devices == ()
    with pytest.raises(ValueError, match="48"):
        find_attester(kind, measurement=bytes(32))
    with pytest.raises(ValueError, match=str(attester.report_data_bytes)):
        attester.evidence(bytes(96 - attester.report_data_bytes))


@pytest.mark.parametrize("device", [SoftGpuAttester(), SoftTpmDevice()])
def test_soft_devices_say_what_they_are(device: Any) -> None:
    assert "protects nothing" in repr(device)
    assert device.name.startswith("soft-")
    with pytest.raises(ValueError, match="32"):
        device.evidence(bytes(64))


def test_a_soft_enclave_locks_its_register_as_a_real_one() -> None:
    attester = MADE["soft-nitro"](MEASUREMENT)
    assert "pcr16" not in judged(attester.evidence(bytes(64))).measurements
    attester.extend(event_log.CONFIG, b"one")
    attester.extend(event_log.WORKLOAD, b"two")
    assert len(judged(attester.evidence(bytes(64))).events) == 2
    with pytest.raises(MachineError, match="locked"):
        attester.extend(event_log.WORKLOAD, b"three")


def test_a_soft_enclave_lives_longer_than_its_leaf() -> None:
    now = NOW
    attester = soft.SoftNitroAttester(MEASUREMENT, clock=lambda: now)
    for hours in (0, 2.99, 3.01, 30):
        now = NOW + timedelta(hours=hours)
        assert verify(attester.evidence(bytes(64)), Endorsements(), SOFT_ROOTS, now=now).tee == "soft-nitro"
