"""Soft NVIDIA devices: deterministic, marked, and never mistaken for hardware."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp as library

from cloister.attestation.evidence import decode, encode
from cloister.attestation.nvidia import device as nvidia_device
from cloister.attestation.nvidia import format as nvidia_format
from cloister.attestation.nvidia.roots import PINS, RIM_PINS, SOFT_DEVICE_ROOT, SOFT_RIM_ROOT
from cloister.attestation.pki import certificate as pki
from cloister.attestation.soft import nvidia as soft
from tests.attestation.helpers import SHARED

ISSUED = datetime(2026, 11, 20, 11, tzinfo=UTC)
NONCE = bytes(range(32))
ARCHS: tuple[soft.Arch, ...] = ("HOPPER", "BLACKWELL", "LS10")


def der(issuer: soft.Issuer) -> bytes:
    return issuer.certificate.public_bytes(Encoding.DER)


def test_the_pinned_soft_roots_are_those_that_are_made() -> None:
    made = soft.authority()
    assert hashlib.sha256(der(made.root)).hexdigest() == SOFT_DEVICE_ROOT
    assert hashlib.sha256(der(made.rim_root)).hexdigest() == SOFT_RIM_ROOT
    assert PINS.soft == {SOFT_DEVICE_ROOT}
    assert RIM_PINS.soft == {SOFT_RIM_ROOT}
    assert len({*PINS.soft, *PINS.vendor, *RIM_PINS.soft, *RIM_PINS.vendor}) == 4


def _everything() -> tuple[object, ...]:
    device = soft.gpu()
    return (
        soft.evidence(device, NONCE, ocsp_responses=soft.staples(device, ISSUED)),
        soft.endorsements(ISSUED, [soft.gpu(arch=arch) for arch in ARCHS]),
    )


def test_equal_arguments_give_equal_bytes() -> None:
    first = _everything()
    for cached in (soft.authority, soft.gpu, soft._responder):
        cached.cache_clear()
    assert _everything() == first


def test_other_devices_have_other_identities() -> None:
    a, b = soft.gpu("a"), soft.gpu("b")
    assert len({a.udid, b.udid, soft.gpu("a", label="mallory").udid}) == 3
    serials = {each.certificate.serial_number for gpu in (a, b) for each in gpu.issuers[:2]}
    assert len(serials) == 4
    assert a.issuers[2:] == b.issuers[2:]


@pytest.mark.parametrize("arch", ARCHS)
def test_everything_says_that_it_protects_nothing(arch: soft.Arch) -> None:
    device = soft.gpu(arch=arch)
    for issuer in (*device.issuers, *soft.authority().rim_chain, soft._responder(device.device)):
        for name in (issuer.certificate.subject, issuer.certificate.issuer):
            assert "SOFT" in name.rfc4514_string()
            assert "protects nothing" in name.rfc4514_string()
    assert b"protects nothing" in soft.driver_rim(arch=arch)
    assert b"protects nothing" in soft.vbios_rim(arch=arch)
    if arch != "LS10":
        assert b"SOFT" in soft.report(device, NONCE)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_bytes_are_those_of_a_real_report(arch: soft.Arch) -> None:
    device = soft.gpu(arch=arch)
    data = soft.report(device, NONCE)
    report = nvidia_format.parse(data)
    assert (data[:4], data[4:36], data[37:39]) == (b"\x11\xe0\x01\xff", NONCE, b"\x11\x60")
    assert len(report.measurements) == soft.RECORDS[arch]
    assert {len(value) for value in report.measurements} == {48}
    assert report.vbios() == soft.VBIOS
    leaf = nvidia_device.read(pki.from_der(der(device.leaf), where="x"), where="x")
    assert (leaf.chip, leaf.arch, leaf.udid, leaf.fwid) == (soft.CHIPS[arch], arch, device.udid, device.fwid)
    assert leaf.debug is False
    decoded = decode(encode(soft.evidence(device, NONCE, ocsp_responses=soft.staples(device, ISSUED))))
    assert decoded.quote == data


def test_a_debug_device_says_so() -> None:
    leaf = soft.gpu(arch="BLACKWELL", debug=True).leaf
    assert nvidia_device.read(pki.from_der(der(leaf), where="x"), where="x").debug
    with pytest.raises(ValueError, match="Blackwell"):
        soft.gpu(debug=True)


def test_golden_measurements_are_those_of_a_real_gpu() -> None:
    assert len(soft.DRIVER_INDEXES) == 21
    assert len(soft.VBIOS_INDEXES) == 12
    assert set(soft.DRIVER_INDEXES).isdisjoint(soft.VBIOS_INDEXES)
    assert soft.golden("driver", "1", 7) != soft.golden("driver", "2", 7) != soft.golden("vbios", "2", 7)


def test_the_library_reads_our_ocsp_responses_as_we_meant_them() -> None:
    for subject, issuer in pairwise(soft.gpu().issuers[1:]):
        for status in ("good", "revoked", "unknown"):
            data = soft.ocsp_response(subject, issuer, ISSUED, status=status)
            loaded = library.load_der_ocsp_response(data)
            assert loaded.certificate_status is library.OCSPCertStatus[status.upper()]
            assert loaded.serial_number == subject.certificate.serial_number
            assert (loaded.this_update_utc, loaded.next_update_utc) == (ISSUED, ISSUED + soft.LIFETIME)
            assert loaded.produced_at_utc == ISSUED  # never the clock
            assert (loaded.revocation_time_utc == ISSUED) == (status == "revoked")


def test_what_cannot_be_made_is_a_callers_mistake() -> None:
    device = soft.gpu()
    with pytest.raises(ValueError, match="32 bytes"):
        soft.report(device, bytes(31))
    with pytest.raises(ValueError, match="time zone"):
        soft.endorsements(datetime(2026, 11, 20))  # noqa: DTZ001


def test_endorsements_name_what_the_verifier_asks_for() -> None:
    device = soft.gpu()
    names = {item.subject for item in soft.endorsements(ISSUED, (device,)).items}
    serials = [each.certificate.serial_number for each in (*device.issuers[1:-1], *soft.authority().rim_chain[:-1])]
    assert names == {*soft.rim_ids(), *(f"ocsp/{serial:x}" for serial in serials)}
    assert {item.kind for item in soft.endorsements(ISSUED).items} == {"nvidia-gpu"}


FOLDER = SHARED / "vectors" / "attestation" / "nvidia"


@pytest.mark.skipif(not FOLDER.exists(), reason="third-party vectors are not beside the repository")
@pytest.mark.parametrize(
    ("arch", "name"), [("HOPPER", "h100-580.95.05-coco"), ("BLACKWELL", "gb100-575.32"), ("LS10", "ls10-switch")]
)
def test_a_real_device_has_the_same_shape(arch: soft.Arch, name: str) -> None:
    real = nvidia_format.parse((FOLDER / f"{name}.bin").read_bytes())
    ours = nvidia_format.parse(soft.report(soft.gpu(arch=arch), NONCE))
    assert len(real.measurements) == len(ours.measurements)
    newer = {nvidia_format.Field.CHIP_INFO, nvidia_format.Field.FEATURE_FLAG, nvidia_format.Field.PROTECTED_PCIE_STATUS}
    assert set(ours.fields) - newer <= set(real.fields)
    for kind in set(ours.fields) & set(real.fields) - {nvidia_format.Field.DRIVER_VERSION}:
        assert len(ours.fields[kind]) == len(real.fields[kind])
    chain = x509.load_pem_x509_certificates((FOLDER / f"{name}-chain.pem").read_bytes())
    soft_chain = [each.certificate for each in soft.gpu(arch=arch).issuers]
    assert len(chain) == len(soft_chain)

    def extension(certificate: x509.Certificate) -> set[str]:
        return {each.oid.dotted_string for each in certificate.extensions if each.oid.dotted_string.startswith("2.23.")}

    assert [extension(each) for each in chain] == [extension(each) for each in soft_chain]


def test_windows_move_with_the_clock() -> None:
    later = soft.endorsements(ISSUED + timedelta(days=400))
    assert {item.subject for item in later.items} == {item.subject for item in soft.endorsements(ISSUED).items}
    assert later != soft.endorsements(ISSUED)
