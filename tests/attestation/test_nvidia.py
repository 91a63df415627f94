"""NVIDIA device evidence end to end: every way to be wrong, through verify(), on soft devices; then real reports.

Soft reports are bit-exact, and the same code judges them as NVIDIA's; only the two pinned roots differ.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import struct
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificates
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attestation.binding import check_binding
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.files import Case, Observation
from cloister.attestation.files import nvidia as files
from cloister.attestation.nvidia import device as nvidia_device
from cloister.attestation.nvidia import format as nvidia_format
from cloister.attestation.nvidia.examine import wanted
from cloister.attestation.nvidia.format import Field
from cloister.attestation.nvidia.roots import DEVICE_IDENTITY_CA
from cloister.attestation.nvidia.verify import KIND, STEPS, verify
from cloister.attestation.pki import certificate as pki
from cloister.attestation.roots import Roots
from cloister.attestation.soft import nvidia as soft
from cloister.attestation.types import Claims, Event, Evidence
from cloister.attestation.verify import VERIFIERS
from cloister.attestation.verify import verify as verify_any
from cloister.errors import EvidenceError
from cloister.testkit.softtee import NOW, SOFT_ROOTS, SoftPlatform, binding
from tests.attestation.helpers import SHARED, refusal, value_or_malformed

NONCE = binding().for_devices().qualifying_data()
ISSUED = NOW - timedelta(hours=1)
GPU = soft.gpu()
ENDORSED = soft.endorsements(ISSUED)
REPORT = soft.report(GPU, NONCE)
SIGNED = len(REPORT) - nvidia_format.SIGNATURE_BYTES
OPAQUE = SIGNED - 2 - sum(4 + len(value) for value in nvidia_format.parse(REPORT).fields.values())
"""Where the length of the opaque fields stands."""
ARCHS: tuple[soft.Arch, ...] = ("HOPPER", "BLACKWELL", "LS10")


def judge(
    quote: bytes = REPORT,
    *,
    device: soft.Gpu = GPU,
    endorsements: Endorsements = ENDORSED,
    roots: Roots = SOFT_ROOTS,
    now: datetime = NOW,
    chain: bytes | None = None,
    ocsp: bytes | None = None,
) -> Claims:
    parts = {"chain": device.chain if chain is None else chain}
    if ocsp is not None:
        parts["ocsp"] = ocsp
    return verify(Evidence(KIND, quote, parts=MappingProxyType(parts)), endorsements, roots, now=now)


def steps(error: EvidenceError) -> list[str]:
    return list(dict.fromkeys(".".join(reason.where.split(".")[:2]) for reason in error.reasons))


def refused(*wanted: str, code: str = "evidence-not-authentic", **rest: Any) -> EvidenceError:
    error = refusal(judge, **rest)
    assert (error.code, steps(error)) == (code, [f"nvidia-gpu.{step}" for step in wanted]), error.reasons
    assert set(steps(error)) <= set(STEPS)
    assert error.exit_status == 4
    return error


def faults(error: EvidenceError) -> list[str]:
    return [reason.where for reason in error.reasons]


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_a_good_gpu_gives_all_claims() -> None:
    claims = judge()
    assert (claims.kind, claims.tee, claims.soft, claims.debug) == ("device", "soft-nvidia-gpu", True, False)
    assert (claims.gpu, claims.tcb_status, claims.report_data) == ("confidential", "NotRated", NONCE)
    assert claims.measurements["msr7"] == soft.golden("driver", soft.DRIVER, 7)
    assert set(claims.measurements) == {f"msr{index}" for index in range(64)} | {"fwid"}
    assert claims.svns == {"driver": 999_010_007, "driver_major": 999, "vbios": 0xF50F700001}
    assert claims.attributes == {"spt": True, "mpt": False, "ppcie": False, "nvdec0_disabled": True}
    assert claims.platform == {
        "ueid": f"{GPU.leaf.certificate.serial_number:x}",
        "device_key": f"{GPU.device.certificate.serial_number:x}",
        "udid": GPU.udid,
        "fwid": GPU.fwid.hex(),
        "chip": "GH100",
        "arch": "HOPPER",
        "driver": soft.DRIVER,
        "vbios": soft.VBIOS,
        "sku": "000",
        "project": "SOFT",
        "project_sku": "0000",
    }
    assert claims.valid_until == ISSUED + soft.LIFETIME
    assert len(claims.chain) == 5 + 4 + 4
    assert all("SOFT" in line for line in claims.chain)
    assert claims.events == ()


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_is_verified(arch: soft.Arch) -> None:
    device = soft.gpu(arch=arch)
    claims = judge(soft.report(device, NONCE), device=device, endorsements=soft.endorsements(ISSUED, (device,)))
    assert claims.platform["arch"] == arch
    assert claims.tee == ("soft-nvidia-switch" if arch == "LS10" else "soft-nvidia-gpu")
    assert claims.gpu == ("none" if arch == "LS10" else "confidential")  # a switch is no GPU
    assert ("driver" in claims.svns) == (arch != "LS10")


def test_the_soft_roots_count_only_when_they_are_named() -> None:
    error = refused("2-chain", roots=Roots())
    assert faults(error) == ["nvidia-gpu.2-chain.root"]
    assert error.reasons[0].found == "the published test root"
    assert DEVICE_IDENTITY_CA in error.reasons[0].wanted


def test_one_zero_byte_may_follow_and_is_no_second_evidence() -> None:
    assert judge(REPORT + b"\x00") == judge()
    for more in (b"\x01", b"\x00\x00", b"\x00" * 7):
        refused("1-format", code="evidence-malformed", quote=REPORT + more)


def test_stapled_answers_are_enough_for_the_device_but_manifests_come_from_the_relying_party() -> None:
    serials = {issuer.certificate.serial_number for issuer in GPU.issuers[1:-1]}
    without = soft.endorsements(ISSUED, missing=serials)
    refused("3-revocation", endorsements=without)
    assert judge(endorsements=without, ocsp=soft.staples(GPU, ISSUED)) == judge()


def test_manifests_filed_by_what_stands_in_them_are_found() -> None:
    """Whoever has only a file knows product and version, not the board's id; the report decides all the same."""
    driver, vbios = soft.rim_ids()
    names = {driver: f"rim/GH100/{soft.DRIVER}", vbios: f"rim/GH100/{soft.VBIOS}"}
    filed = Endorsements(tuple(replace(item, subject=names.get(item.subject, item.subject)) for item in ENDORSED.items))
    assert judge(endorsements=filed) == judge()
    wrong = Endorsements((Endorsement(KIND, f"rim/GH100/{soft.DRIVER}", soft.driver_rim("999.09.99")),))
    error = refusal(judge, endorsements=filed | wrong)
    assert faults(error)[0] == "nvidia-gpu.7-rim.version"


def test_who_calls_it_wrong_is_told_so() -> None:
    with pytest.raises(ValueError, match="time zone"):
        judge(now=datetime(2026, 11, 20))  # noqa: DTZ001
    with pytest.raises(ValueError, match="evidence of kind"):
        verify(Evidence("tdx", REPORT), ENDORSED, SOFT_ROOTS, now=NOW)


def test_the_kind_is_registered_and_steps_are_those_of_the_docstring() -> None:
    import re

    from cloister.attestation.nvidia import verify as module

    assert VERIFIERS[KIND] is verify
    named = re.findall(r"^ +(\d+) (\w+) ", module.__doc__ or "", re.MULTILINE)
    assert [f"nvidia-gpu.{number}-{name}" for number, name in named] == list(STEPS)


# --- the matrix -------------------------------------------------------------------------------------------------------

_TIMES = {"valid": timedelta(0), "early": timedelta(hours=-2), "late": timedelta(hours=24)}


@pytest.mark.parametrize(
    ("arch", "status", "time", "bound", "drift"),
    list(itertools.product(ARCHS, ("good", "revoked", "unknown", "missing"), _TIMES, (True, False), (False, True))),
)
def test_matrix(arch: soft.Arch, status: str, time: str, bound: bool, drift: bool) -> None:
    device = soft.gpu(arch=arch)
    serial = (device.issuers[1].certificate.serial_number,)
    endorsements = soft.endorsements(
        ISSUED,
        (device,),
        revoked=serial if status == "revoked" else (),
        unknown=serial if status == "unknown" else (),
        missing=serial if status == "missing" else (),
    )
    nonce = NONCE if bound else bytes(32)
    quote = soft.report(device, nonce, drift={3: bytes(48)} if drift else {})
    now = NOW + _TIMES[time]
    if status == "good" and time == "valid" and not drift:
        claims = judge(quote, device=device, endorsements=endorsements, now=now)
        assert (claims.report_data == NONCE) == bound
        return
    error = refusal(judge, quote, device=device, endorsements=endorsements, now=now)
    assert error.code == "evidence-not-authentic"
    if status != "good" or time != "valid":
        assert steps(error) == ["nvidia-gpu.3-revocation"]
    else:
        assert faults(error) == ["nvidia-gpu.9-measurements.gpu.measurement.3"]


# --- faults one by one, named after the attack ------------------------------------------------------------------------


def test_a_changed_report_is_refused() -> None:
    changed = bytearray(REPORT)
    changed[60] ^= 1
    error = refused("5-signature", quote=bytes(changed))
    assert "gpu.signature" in error.reasons[0].where


def test_no_flipped_bit_of_the_signed_report_is_accepted() -> None:
    for position in range(0, SIGNED, 17):
        changed = bytearray(REPORT)
        changed[position] ^= 1 << (position % 8)
        refusal(judge, bytes(changed))


def test_no_flipped_bit_of_the_signature_is_accepted() -> None:
    for position in range(SIGNED, len(REPORT), 7):
        changed = bytearray(REPORT)
        changed[position] ^= 1 << (position % 8)
        refused("5-signature", quote=bytes(changed))
    for odd in (bytes(96), b"\xff" * 96):
        refused("5-signature", quote=REPORT[:SIGNED] + odd)


def test_the_chain_of_another_gpu_does_not_sign_for_this_one() -> None:
    other = soft.gpu("other")
    refused("5-signature", chain=other.chain, endorsements=soft.endorsements(ISSUED, (GPU, other)))
    blackwell = soft.gpu(arch="BLACKWELL")
    error = refusal(judge, chain=blackwell.chain, endorsements=soft.endorsements(ISSUED, (GPU, blackwell)))
    assert steps(error) == ["nvidia-gpu.4-fwid", "nvidia-gpu.5-signature"]


def test_a_foreign_device_root_is_refused() -> None:
    mallory = soft.gpu(label="mallory")
    refused(
        "2-chain",
        quote=soft.report(mallory, NONCE),
        chain=mallory.chain,
        endorsements=soft.endorsements(ISSUED, (mallory,), label="mallory"),
    )


def test_a_pinned_root_appended_to_a_foreign_chain_is_refused() -> None:
    mallory = soft.gpu(label="mallory")
    chain = b"".join(
        each.certificate.public_bytes(Encoding.PEM) for each in (*mallory.issuers[:4], soft.authority().root)
    )
    error = refusal(judge, soft.report(mallory, NONCE), chain=chain)
    assert "nvidia-gpu.2-chain.signature" in faults(error)


def test_a_manifest_root_vouches_for_no_device() -> None:
    chain = b"".join(
        each.certificate.public_bytes(Encoding.PEM) for each in (*GPU.issuers[:4], soft.authority().rim_root)
    )
    error = refusal(judge, chain=chain)
    assert "nvidia-gpu.2-chain.root" in faults(error)


def test_foreign_manifests_are_refused() -> None:
    foreign = soft.endorsements(ISSUED, (GPU,), label="mallory")
    rims = Endorsements(tuple(item for item in foreign.items if item.subject.startswith("NV_")))
    error = refusal(judge, endorsements=ENDORSED | rims)
    assert faults(error).count("nvidia-gpu.7-rim.chain.root") == 2
    assert "nvidia-gpu.7-rim" in steps(error)


def test_the_windows_of_certificates_are_judged() -> None:
    endorsements = soft.endorsements(soft.LAST, lifetime=timedelta(days=2))
    error = refusal(judge, endorsements=endorsements, now=soft.LAST + timedelta(hours=1))
    assert set(faults(error)) == {"nvidia-gpu.2-chain.expired", "nvidia-gpu.3-revocation.revocation"}


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_revoked_certificate_of_the_device_is_refused(depth: int) -> None:
    serial = GPU.issuers[depth].certificate.serial_number
    error = refused("3-revocation", endorsements=soft.endorsements(ISSUED, revoked=(serial,)))
    assert faults(error) == ["nvidia-gpu.3-revocation.revoked"]
    assert f"{serial:x} is revoked" in error.reasons[0].found
    refused("3-revocation", endorsements=soft.endorsements(ISSUED, missing=(serial,)))
    refused("3-revocation", endorsements=soft.endorsements(ISSUED, unknown=(serial,)))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_every_revoked_signer_of_a_manifest_is_refused(depth: int) -> None:
    serial = soft.authority().rim_chain[depth].certificate.serial_number
    error = refused("8-signers", endorsements=soft.endorsements(ISSUED, revoked=(serial,)))
    assert set(faults(error)) == {"nvidia-gpu.8-signers.revoked"}
    refused("8-signers", endorsements=soft.endorsements(ISSUED, missing=(serial,)))


def test_a_revoked_device_key_cannot_pose_as_the_first_certificate() -> None:
    """Nobody answers for the first certificate, so a chain that begins with the device key would skip its revocation."""
    shorter = b"".join(each.certificate.public_bytes(Encoding.PEM) for each in GPU.issuers[1:])
    quote = soft.report(GPU, NONCE, signer=GPU.device.key)
    serial = GPU.device.certificate.serial_number
    refused("2-chain", code="evidence-malformed", quote=quote, chain=shorter)
    endorsements = soft.endorsements(ISSUED, revoked=(serial,))
    refused("2-chain", code="evidence-malformed", quote=quote, chain=shorter, endorsements=endorsements)


def test_ocsp_for_another_gpu_does_not_help() -> None:
    """A revoked GPU staples the good answers of another one, under its own serial numbers or not."""
    other = soft.gpu("other")
    serial = GPU.device.certificate.serial_number
    without = soft.endorsements(ISSUED, missing=(serial,))
    refused("3-revocation", endorsements=without, ocsp=soft.staples(other, ISSUED))
    answer = soft.ocsp_response(other.issuers[1], other.issuers[2], ISSUED)
    filed = Endorsements((Endorsement(KIND, f"ocsp/{serial:x}", answer),))
    refused("3-revocation", endorsements=without | filed)


def test_replay_of_an_ocsp_answer_after_its_end_is_refused() -> None:
    without = soft.endorsements(NOW, missing={each.certificate.serial_number for each in GPU.issuers})
    old = soft.staples(GPU, NOW - timedelta(hours=25))
    error = refused("3-revocation", endorsements=without, ocsp=old)
    assert "ended" in error.reasons[0].found
    long = soft.staples(GPU, NOW - timedelta(hours=25), lifetime=timedelta(days=365))
    error = refused("3-revocation", endorsements=without, ocsp=long)
    assert "older than" in error.reasons[0].found


def test_a_staple_cannot_hide_a_revocation() -> None:
    serial = GPU.device.certificate.serial_number
    known = soft.endorsements(ISSUED, revoked=(serial,))
    error = refused("3-revocation", endorsements=known, ocsp=soft.staples(GPU, ISSUED))
    assert faults(error) == ["nvidia-gpu.3-revocation.revoked"]


def test_a_firmware_digest_that_the_key_does_not_own_is_refused() -> None:
    error = refused("4-fwid", quote=soft.report(GPU, NONCE, fwid=bytes(48)))
    assert (error.reasons[0].found, error.reasons[0].wanted) == ("00" * 48, GPU.fwid.hex())


def test_an_old_driver_that_reports_no_fwid_is_read() -> None:
    report = nvidia_format.parse(REPORT)
    assert Field.FWID in report.fields
    quote = _resigned(_opaque(report, {kind: value for kind, value in report.fields.items() if kind != Field.FWID}))
    assert judge(quote).platform["fwid"] == GPU.fwid.hex()


def test_drifted_measurements_are_all_named() -> None:
    drift = {7: bytes(48), 21: b"\x01" * 48, 12: b"\x02" * 48, 50: b"\x03" * 48}  # nobody states a value for 50
    error = refused("9-measurements", quote=soft.report(GPU, NONCE, drift=drift))
    assert faults(error) == [f"nvidia-gpu.9-measurements.gpu.measurement.{index}" for index in (7, 12, 21)]
    assert error.reasons[0].found == "00" * 48
    assert error.reasons[0].wanted == soft.golden("driver", soft.DRIVER, 7).hex()


def test_a_truncated_digest_is_not_a_golden_value() -> None:
    value = soft.golden("driver", soft.DRIVER, 7)[:32]
    refused("9-measurements", quote=soft.report(GPU, NONCE, drift={7: value}))


def test_the_decoder_is_not_compared_only_where_it_is_disabled() -> None:
    drift = {35: bytes(48)}
    assert judge(soft.report(GPU, NONCE, drift=drift)).attributes["nvdec0_disabled"]
    error = refused("9-measurements", quote=soft.report(GPU, NONCE, drift=drift, nvdec0_disabled=False))
    assert faults(error) == ["nvidia-gpu.9-measurements.gpu.measurement.35"]
    assert not judge(soft.report(GPU, NONCE, nvdec0_disabled=False)).attributes["nvdec0_disabled"]


def test_a_report_with_fewer_records_than_golden_values_is_refused() -> None:
    report = nvidia_format.parse(REPORT)
    quote = _resigned(_records(report, report.measurements[:30]))
    error = refused("9-measurements", quote=quote)
    assert error.reasons[0].found == "no such measurement"


def test_rim_rollback_an_older_driver_manifest_does_not_stand_for_a_newer_driver() -> None:
    """The attacker's collateral files a genuine older manifest under the id that the report asks for."""
    driver, _ = soft.rim_ids()
    old = Endorsements((Endorsement(KIND, driver, soft.driver_rim("999.09.99")),))
    error = refused("7-rim", "9-measurements", endorsements=ENDORSED | old)
    assert faults(error)[0] == "nvidia-gpu.7-rim.version"
    assert len(error.reasons) == 1 + 20  # all of the driver's golden values but the disabled decoder's


def test_driver_rollback_an_older_driver_needs_its_own_manifest_and_shows_its_version() -> None:
    quote = soft.report(GPU, NONCE, driver="999.09.99")
    refused("7-rim", quote=quote)
    own = Endorsements((Endorsement(KIND, "NV_GPU_DRIVER_GH100_999.09.99", soft.driver_rim("999.09.99")),))
    assert judge(quote, endorsements=ENDORSED | own).svns["driver"] < judge().svns["driver"]


def test_the_manifest_of_another_vbios_is_refused() -> None:
    _, vbios = soft.rim_ids()
    other = Endorsements((Endorsement(KIND, vbios, soft.vbios_rim("F5.0F.71.00.01")),))
    error = refused("7-rim", "9-measurements", endorsements=ENDORSED | other)
    assert any("gpu.measurement" in fault for fault in faults(error))


def test_the_manifest_of_another_chip_is_refused() -> None:
    driver, _ = soft.rim_ids()
    other = Endorsements((Endorsement(KIND, driver, soft.driver_rim(arch="BLACKWELL")),))
    error = refused("7-rim", endorsements=ENDORSED | other)
    assert faults(error) == ["nvidia-gpu.7-rim.product"]


def test_a_vbios_manifest_twice_is_no_driver_manifest() -> None:
    driver, vbios = soft.rim_ids()
    data = ENDORSED.find(KIND, vbios, where="x")
    error = refusal(judge, endorsements=ENDORSED | Endorsements((Endorsement(KIND, driver, data),)))
    assert "nvidia-gpu.7-rim.version" in faults(error)
    assert "both manifests" in " ".join(reason.found for reason in error.reasons)


def test_an_edited_manifest_is_refused() -> None:
    driver, _ = soft.rim_ids()
    golden = soft.golden("driver", soft.DRIVER, 7).hex().encode()
    edited = soft.driver_rim().replace(golden, b"ab" * 48)
    error = refused(
        "7-rim",
        quote=soft.report(GPU, NONCE, drift={7: b"\xab" * 48}),
        endorsements=ENDORSED | Endorsements((Endorsement(KIND, driver, edited),)),
    )
    assert faults(error) == ["nvidia-gpu.7-rim.signature"]


def test_without_manifests_or_answers_nothing_is_confidential() -> None:
    error = refused("3-revocation", endorsements=Endorsements())
    assert len(error.reasons) == 3
    answers = Endorsements(tuple(item for item in ENDORSED.items if item.subject.startswith("ocsp/")))
    error = refused("7-rim", endorsements=answers)
    assert len(error.reasons) == 2


def test_evidence_brings_no_manifests() -> None:
    """RIMs come from the relying party; a part with one is another part than the format has."""
    evidence = soft.evidence(GPU, NONCE)
    for name, data in (("driver_rim", soft.driver_rim()), ("root", b"x")):
        more = replace(evidence, parts=MappingProxyType(dict(evidence.parts) | {name: data}))
        error = refusal(verify, more, ENDORSED, SOFT_ROOTS, now=NOW)
        assert (error.code, faults(error)) == ("evidence-malformed", ["nvidia-gpu.1-format"])


def test_a_device_has_no_log() -> None:
    logged = replace(soft.evidence(GPU, NONCE), events=(Event(3, "x", bytes(48), b""),))
    error = refusal(verify, logged, ENDORSED, SOFT_ROOTS, now=NOW)
    assert faults(error) == ["nvidia-gpu.1-format"]


def test_devtools_a_gpu_in_debug_state_is_never_confidential() -> None:
    device = soft.gpu(arch="BLACKWELL", debug=True)
    claims = judge(soft.report(device, NONCE), device=device, endorsements=soft.endorsements(ISSUED, (device,)))
    assert (claims.debug, claims.gpu) == (True, "none")
    # on Hopper no certificate says so; development firmware has measurements that no manifest lists
    refused("9-measurements", quote=soft.report(GPU, NONCE, drift={22: bytes(48)}))


def test_modes_are_claims_and_what_is_not_said_is_absent() -> None:
    def attributes(**rest: Any) -> Mapping[str, bool]:
        return judge(soft.report(GPU, NONCE, **rest)).attributes

    assert attributes(ppcie=True, feature_flag=2)["ppcie"]
    assert attributes(feature_flag=1) == {"spt": False, "mpt": True, "ppcie": False, "nvdec0_disabled": True}
    assert "spt" not in attributes(feature_flag=None)


def test_a_soft_manifest_makes_a_genuine_device_soft() -> None:
    """The device's root is pinned as a vendor's, the manifests' only as a test's."""
    device = soft.gpu(label="vendor")
    digest = hashlib.sha256(pki.from_pem(device.chain, where="test")[-1].der).hexdigest()
    also = Roots(soft=True, also=MappingProxyType({"nvidia-gpu": frozenset({digest})}))
    given: dict[str, Any] = {
        "quote": soft.report(device, NONCE),
        "device": device,
        "endorsements": soft.endorsements(ISSUED, (device,)),
    }
    assert judge(**given, roots=also).tee == "soft-nvidia-gpu"
    error = refusal(judge, **given, roots=replace(also, soft=False))
    assert set(faults(error)) == {"nvidia-gpu.7-rim.chain.root"}


# --- together with a machine ------------------------------------------------------------------------------------------


def _machine(device: soft.Gpu = GPU, **bound: Any) -> tuple[Evidence, Endorsements, Any]:
    inner = binding(**bound)
    gpu = soft.evidence(device, inner.for_devices().qualifying_data())
    whole = inner.over((gpu,))
    platform = SoftPlatform()
    evidence = replace(platform.attester.evidence(whole.report_data()), devices=(gpu,))
    return evidence, platform.endorsements | soft.endorsements(ISSUED, (device,)), whole


def test_a_machine_with_its_gpu_is_bound_to_both() -> None:
    evidence, endorsements, bound = _machine()
    claims = verify_any(evidence, endorsements, SOFT_ROOTS, now=NOW)
    assert (claims.gpu, claims.devices[0].tee) == ("confidential", "soft-nvidia-gpu")
    assert check_binding(claims, bound) == ()


def test_a_gpu_of_another_machine_is_refused() -> None:
    """Its report answers the nonce of that machine's binding (another key), not of this one's."""
    evidence, endorsements, bound = _machine()
    theirs, _, _ = _machine(key=b"the key of another machine")
    mixed = replace(evidence, devices=theirs.devices)
    claims = verify_any(mixed, endorsements, SOFT_ROOTS, now=NOW)
    relabelled = binding().over(mixed.devices)
    assert [reason.where for reason in check_binding(claims, bound)] == ["binding.devices.0"]
    # even if the CPU had signed over that GPU's evidence, the GPU answered somebody else
    assert {reason.where for reason in check_binding(claims, relabelled)} == {
        "binding.report_data",
        "binding.devices.0",
    }


def test_a_replayed_gpu_report_is_refused() -> None:
    old, endorsements, _ = _machine(nonce=b"\x01" * 32)
    evidence, _, bound = _machine(nonce=b"\x02" * 32)
    claims = verify_any(replace(evidence, devices=old.devices), endorsements, SOFT_ROOTS, now=NOW)
    assert "binding.devices.0" in [reason.where for reason in check_binding(claims, bound)]


def test_one_gpu_that_answers_twice_is_not_two_gpus() -> None:
    """A GPU signs as often as it is asked, with a nonce of its own each time: the reports differ, the device does not."""
    evidence, endorsements, bound = _machine()
    nonce = bound.for_devices().qualifying_data()
    again = soft.evidence(GPU, nonce, quote=soft.report(GPU, nonce, responder_nonce=b"\x01" * 32))
    other = soft.evidence(soft.gpu("another"), nonce)
    endorsements |= soft.endorsements(ISSUED, (GPU, soft.gpu("another")))
    first = evidence.devices[0]
    both = verify_any(replace(evidence, devices=(first, other)), endorsements, SOFT_ROOTS, now=NOW)
    assert [device.gpu for device in both.devices] == ["confidential"] * 2
    for twins in ((first, first), (first, again), (first, other, again)):
        error = refusal(verify_any, replace(evidence, devices=twins), endorsements, SOFT_ROOTS, now=NOW)
        assert (error.code, faults(error)) == ("evidence-not-authentic", [f"evidence.devices.{len(twins) - 1}"])


def test_a_switch_does_not_make_a_machine_confidential() -> None:
    evidence, endorsements, bound = _machine(soft.gpu(arch="LS10"))
    claims = verify_any(evidence, endorsements, SOFT_ROOTS, now=NOW)
    assert (claims.gpu, claims.devices[0].tee) == ("none", "soft-nvidia-switch")
    assert check_binding(claims, bound) == ()


# --- form -------------------------------------------------------------------------------------------------------------


def _opaque(report: nvidia_format.Report, fields: Mapping[int, bytes]) -> bytes:
    old = b"".join(struct.pack("<HH", kind, len(value)) + value for kind, value in report.fields.items())
    new = b"".join(struct.pack("<HH", kind, len(value)) + value for kind, value in fields.items())
    return report.signed[: -len(old) - 2] + struct.pack("<H", len(new)) + new


def _records(report: nvidia_format.Report, values: tuple[bytes, ...]) -> bytes:
    records = b"".join(
        struct.pack("<BBHBH", index + 1, 1, len(value) + 3, 1, len(value)) + value for index, value in enumerate(values)
    )
    size = int.from_bytes(report.signed[42:45], "little")
    return (
        report.signed[:41]
        + bytes((len(values),))
        + len(records).to_bytes(3, "little")
        + records
        + report.signed[45 + size :]
    )


def _resigned(signed: bytes) -> bytes:
    return signed + soft._sign(GPU.leaf.key, signed)


def test_the_parts_of_a_report_come_back() -> None:
    report = nvidia_format.parse(REPORT)
    assert report.nonce == NONCE
    assert report.signed + report.signature == REPORT
    assert (len(report.measurements), report.responder_nonce) == (64, bytes(32))
    assert _opaque(report, report.fields) == report.signed
    assert _records(report, report.measurements) == report.signed


def _edit(at: int, value: bytes) -> bytes:
    return REPORT[:at] + value + REPORT[at + len(value) :]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        REPORT[:36],
        REPORT[:-1],
        bytes(nvidia_format.LIMIT + 1),
        _edit(0, b"\x12"),  # SPDM 1.2
        _edit(1, b"\x60"),
        _edit(2, b"\x00"),  # no signature wanted
        _edit(3, b"\x01"),  # one measurement only
        _edit(37, b"\x12"),
        _edit(38, b"\x7f"),  # ERROR
        _edit(41, b"\x3f"),  # one record fewer than there are
        _edit(41, b"\x41"),
        _edit(41, b"\x00"),
        _edit(42, b"\xff\xff\xff"),
        _edit(42, b"\x00\x00\x00"),
        _edit(45, b"\x02"),  # index 2 first
        _edit(46, b"\x02"),  # specification
        _edit(47, b"\xff\xff"),
        _edit(49, b"\x81"),  # a raw value, not a digest
        _edit(50, b"\x00\x00"),
        _edit(OPAQUE, b"\xff\xff"),
        _edit(OPAQUE, b"\x00\x00"),
        _edit(OPAQUE + 4, b"\xff\xff"),  # size of the first field
    ],
)
def test_a_report_with_one_fault_is_malformed(data: bytes) -> None:
    error = refusal(judge, data)
    assert (error.code, faults(error)) == ("evidence-malformed", ["nvidia-gpu.1-format"])


@pytest.mark.parametrize(
    "change",
    [
        {Field.DRIVER_VERSION: b""},
        {Field.DRIVER_VERSION: b"999 1\x00"},
        {Field.DRIVER_VERSION: b"\xff\xfe"},
        {Field.DRIVER_VERSION: b"../../ids"},
        {Field.DRIVER_VERSION: b"..\x00"},
        {Field.PROJECT: b"a?b#c"},
        {Field.PROJECT_SKU: b"9" * 33},
        {Field.VBIOS_VERSION: b""},
        {Field.VBIOS_VERSION: b"1.2.3"},
        {Field.PROJECT: b"\x00"},
        {Field.NVDEC0_STATUS: b"\x55\x55"},
        {Field.PROTECTED_PCIE_STATUS: b""},
        {Field.FEATURE_FLAG: bytes(9)},
        {Field.FEATURE_FLAG: b""},
    ],
)
def test_a_signed_field_of_another_form_is_malformed(change: dict[int, bytes]) -> None:
    report = nvidia_format.parse(REPORT)
    error = refusal(judge, _resigned(_opaque(report, {**report.fields, **change})))
    assert (error.code, faults(error)) == ("evidence-malformed", ["nvidia-gpu.1-format"])


def test_who_collects_endorsements_learns_what_is_wanted() -> None:
    names, chain = wanted(soft.evidence(GPU, NONCE))
    assert names == soft.rim_ids()
    assert [each.serial for each in chain] == [each.certificate.serial_number for each in GPU.issuers]
    switch = soft.gpu(arch="LS10")
    assert wanted(soft.evidence(switch, NONCE))[0] == soft.rim_ids("LS10")[1:]


def test_an_opaque_field_twice_is_malformed() -> None:
    report = nvidia_format.parse(REPORT)
    driver = struct.pack("<HH", Field.DRIVER_VERSION, 1) + b"9"
    size = SIGNED - OPAQUE - 2
    quote = _resigned(
        report.signed[:OPAQUE] + struct.pack("<H", size + len(driver)) + report.signed[OPAQUE + 2 :] + driver
    )
    assert "twice" in refused("1-format", code="evidence-malformed", quote=quote).reasons[0].found


@pytest.mark.parametrize(
    "chain",
    [
        b"",
        b"x" * 200_000,
        GPU.chain[:-40],
        GPU.chain * 2,
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        b"".join(each.certificate.public_bytes(Encoding.PEM) for each in GPU.issuers[:2]),
        b"".join(each.certificate.public_bytes(Encoding.PEM) for each in reversed(GPU.issuers)),
        b"".join(each.certificate.public_bytes(Encoding.PEM) for each in soft.authority().rim_chain),
    ],
)
def test_a_chain_of_another_form_is_refused(chain: bytes) -> None:
    error = refusal(judge, chain=chain)
    assert error.reasons[0].where.startswith(("nvidia-gpu.2-chain", "nvidia-gpu.1-format"))


def test_no_chain_is_malformed() -> None:
    error = refusal(verify, Evidence(KIND, REPORT), ENDORSED, SOFT_ROOTS, now=NOW)
    assert (error.code, faults(error)) == ("evidence-malformed", ["nvidia-gpu.1-format"])


@pytest.mark.parametrize("staple", [b"x", b"\x30\x84\xff\xff\xff\xff", soft.staples(GPU, ISSUED)[:-1]])
def test_a_staple_of_another_form_is_malformed(staple: bytes) -> None:
    error = refusal(judge, ocsp=staple)
    assert (error.code, faults(error)) == ("evidence-malformed", ["nvidia-gpu.3-revocation.format"])


def test_truncation_and_duplication_are_malformed() -> None:
    for cut in range(0, len(REPORT), 61):
        assert refusal(judge, REPORT[:cut]).code == "evidence-malformed"
    assert refusal(judge, REPORT + REPORT).code == "evidence-malformed"


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_no_report(data: bytes) -> None:
    assert value_or_malformed(lambda: nvidia_format.parse(data)) is None


@settings(deadline=None)  # the first one imports signxml
@given(st.lists(st.tuples(st.integers(0, len(REPORT) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=30))
def test_mutated_reports_raise_nothing_foreign(changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(REPORT)
    for position, value in changes:
        data[position : position + len(value)] = value
    try:
        claims: Claims | None = judge(bytes(data))
    except EvidenceError as error:
        claims = None
        assert error.reasons  # noqa: PT017 - a refusal must always name its step
    assert claims is None or claims.measurements == judge().measurements


def test_mutated_extensions_of_the_leaf_raise_nothing_foreign() -> None:
    leaf = pki.from_der(soft.gpu(arch="BLACKWELL").leaf.certificate.public_bytes(Encoding.DER), where="x")
    random_ = random.Random(7)
    for name in (nvidia_device.DICE_TCB_INFO, nvidia_device.SUBJECT_ALTERNATIVE_NAME):
        value = leaf.extensions[name]
        for _ in range(600):
            data = bytearray(value)
            for _ in range(random_.randint(1, 4)):
                data[random_.randrange(len(data))] = random_.randrange(256)
            changed = replace(leaf, der=bytes(data), extensions={**leaf.extensions, name: bytes(data)})
            value_or_malformed(lambda changed=changed: nvidia_device.read(changed, where="x"))  # type: ignore[misc]


@pytest.mark.parametrize("composite", [b"", b"\x30\x00", b"\x30\x03\x02\x01\x01", b"\x04\x01x", b"\x30\x80\x00\x00"])
def test_an_fwid_extension_of_another_form_is_malformed(composite: bytes) -> None:
    leaf = pki.from_der(GPU.leaf.certificate.public_bytes(Encoding.DER), where="x")
    changed = replace(leaf, der=composite, extensions={**leaf.extensions, nvidia_device.FWID: composite})
    assert refusal(nvidia_device.read, changed, where="x").code == "evidence-malformed"
    both = replace(leaf, der=b"both", extensions={**leaf.extensions, nvidia_device.DICE_TCB_INFO: b"\x30\x00"})
    assert refusal(nvidia_device.read, both, where="x").code == "evidence-malformed"


# --- files, and real evidence -----------------------------------------------------------------------------------------

FOLDER = SHARED / "vectors" / "attestation"
MANIFEST = FOLDER / "manifest.json"


def _entries() -> list[dict[str, Any]]:
    if not MANIFEST.exists():
        return []
    return [entry for entry in json.loads(MANIFEST.read_text()) if entry["kind"] == "nvidia"]


ENTRIES = _entries()
real = pytest.mark.skipif(not ENTRIES, reason="third-party vectors are not beside the repository")


def _case(entry: Mapping[str, Any], **change: Any) -> Case:
    found = {role: (FOLDER / path).read_bytes() for role, path in entry["files"].items()}
    nonce = bytes.fromhex(entry["nonce"]) if entry["nonce"] else None
    return replace(Case("nvidia", found, datetime.fromisoformat(entry["at"]), nonce=nonce), **change)


def _entry(name: str) -> dict[str, Any]:
    return next(entry for entry in ENTRIES if entry["name"] == name)


def _matches(expect: Mapping[str, Any], found: Observation) -> bool:
    text = f"{found.error.message} {' '.join(map(str, found.error.reasons))}".lower() if found.error else ""
    reason = expect.get("reason", "")
    facts = {name: value for name, value in expect.items() if name != "reason"}
    return all(found.facts.get(name) == value for name, value in facts.items()) and reason.lower() in text


@real
@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry["name"]) for entry in ENTRIES])
def test_every_vector_gives_its_verdict(entry: dict[str, Any]) -> None:
    found = files.observe(_case(entry))
    assert _matches(entry["expect"], found), (found.facts, found.error and found.error.reasons)
    assert found.steps
    assert (found.claims is None) == ("report" not in entry["files"] or not entry["expect"]["authentic"])


@real
def test_a_complete_h100_says_what_was_not_done() -> None:
    found = files.observe(_case(_entry("h100-full")))
    assert found.claims is not None
    assert (found.claims.tee, found.claims.debug, found.claims.gpu) == ("nvidia-gpu", False, "none")
    assert found.claims.platform["udid"] == "48b02d92494badf4"
    assert (
        int(found.claims.platform["ueid"], 16) == 478176379286082186618948445787393647364802107249
    )  # as NRAS prints it
    assert found.claims.svns == {"driver": 550_090_007, "driver_major": 550, "vbios": 0x96009F0001}
    assert [step.name for step in found.steps if step.state == "not done"] == ["nvidia-gpu.8-signers"]


@real
def test_the_public_verifier_wants_what_the_files_do_not_have() -> None:
    """Nobody kept OCSP answers for the manifests' signers, so a broker would refuse what the files show."""
    case = _case(_entry("h100-full"))
    evidence = Evidence(KIND, case.files["report"], parts=MappingProxyType({"chain": case.files["chain"]}))
    error = refusal(verify, evidence, files.endorsements(case), Roots(), now=case.now)
    assert steps(error) == ["nvidia-gpu.8-signers"]


@real
def test_another_nonce_is_a_replay() -> None:
    found = files.observe(_case(_entry("blackwell"), nonce=bytes(32)))
    assert found.facts["authentic"] is False
    assert found.error is not None
    assert faults(found.error) == ["nvidia-gpu.6-nonce.gpu.nonce"]


@real
def test_real_ocsp_answers_end() -> None:
    case = _case(_entry("h100-full"))
    found = files.observe(replace(case, now=case.now + timedelta(days=1)))
    assert found.error is not None
    assert steps(found.error) == ["nvidia-gpu.3-revocation"]


@real
@pytest.mark.parametrize("name", ["h100-full", "blackwell", "nvswitch", "h100-coco-580"])
def test_no_flipped_bit_of_a_real_report_is_accepted(name: str) -> None:
    case = _case(_entry(name))
    good = nvidia_format.parse(case.files["report"])
    for position in range(0, len(good.signed) + 96, 61):
        data = bytearray(case.files["report"])
        data[position] ^= 1 << (position % 8)
        found = files.observe(replace(case, files={**case.files, "report": bytes(data)}))
        assert found.facts["authentic"] is False


@real
@pytest.mark.parametrize("name", ["h100-full", "blackwell", "nvswitch", "h100-coco-580"])
def test_a_second_implementation_agrees_on_real_signatures(name: str) -> None:
    case = _case(_entry(name))
    leaf = load_pem_x509_certificates(case.files["chain"])[0].public_key()
    data = case.files["report"]
    end = len(data) - (97 if name == "h100-coco-580" else 96)
    r, s = (int.from_bytes(data[at : at + 48], "big") for at in (end, end + 48))
    assert isinstance(leaf, ec.EllipticCurvePublicKey)
    leaf.verify(encode_dss_signature(r, s), data[:end], ec.ECDSA(SHA384()))
    assert nvidia_format.parse(data).signed == data[:end]


@real
def test_hex_text_and_collateral_beside_the_case_are_taken() -> None:
    case = _case(_entry("h100-full"))
    assert "nvidia-gpu.6-nonce" in {
        step.name for step in files.observe(replace(case, nonce=None)).steps if step.state == "not done"
    }
    roles = {"report": case.files["report"].hex().encode(), "chain": case.files["chain"]}
    others = {role: data for role, data in case.files.items() if role not in roles}
    found = files.observe(replace(case, files=roles, collateral=others | {"notes.txt": b"not collateral"}))
    assert found.facts["authentic"] is True
    assert found.facts["golden"] == 33


def test_soft_files_are_judged_completely() -> None:
    endorsed = {item.subject: item.data for item in ENDORSED.items}
    driver, vbios = soft.rim_ids()
    roles = {"report": REPORT, "chain": GPU.chain, "driver_rim": endorsed[driver], "vbios_rim": endorsed[vbios]}
    answers = {f"ocsp_{index}": item.data for index, item in enumerate(ENDORSED.items) if "ocsp/" in item.subject}
    found = files.observe(Case("nvidia", roles | answers, NOW, nonce=NONCE, roots=SOFT_ROOTS))
    assert {step.state for step in found.steps} == {"passed"}
    assert found.claims is not None
    assert found.claims.gpu == "confidential"
    assert found.facts["golden"] == 33
    assert found.fields["vbios"] == soft.VBIOS


def test_odd_files_give_observations() -> None:
    for roles in (
        {"report": b""},
        {"report": REPORT},
        {"report": REPORT, "chain": b"x"},
        {"report": REPORT, "chain": GPU.chain, "ocsp_l2": b"x"},
        {"report": REPORT, "chain": GPU.chain, "driver_rim": b"x"},
        {"report": b"0" * 99, "chain": GPU.chain},
        {"rim": b""},
        {"rim": soft.driver_rim(), "ocsp": b"x"},
        {},
        {"eat": b""},
        {"eat": b"[]"},
    ):
        found = files.observe(Case("nvidia", roles, NOW, roots=SOFT_ROOTS))
        assert found.facts["authentic"] is False
        assert found.error is not None
        assert any(step.state == "failed" for step in found.steps)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_code_does() -> None:
    from pathlib import Path

    from cloister.attestation.nvidia.roots import RIM_ROOT_CA
    from cloister.attestation.pki import ocsp as pki_ocsp

    page = (Path(__file__).resolve().parents[2] / "docs" / "attestation" / "nvidia.md").read_text()
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `nvidia-gpu.")]
    assert rows == list(STEPS)
    assert DEVICE_IDENTITY_CA in page
    assert RIM_ROOT_CA in page
    assert f"at most {pki_ocsp.MOST}" in page
    claims = judge()
    for name in (*claims.platform, *claims.svns, *claims.attributes):
        assert f"`{name}`" in page
