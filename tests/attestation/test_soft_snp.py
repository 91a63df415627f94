"""Soft SEV-SNP: deterministic, marked, bit-exact, and never mistaken for hardware."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from asn1crypto import x509 as asn1_x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attestation.pki import certificate as pki
from cloister.attestation.pki import crl
from cloister.attestation.snp import format as snp_format
from cloister.attestation.snp import roots as snp_roots
from cloister.attestation.soft import snp as soft_snp
from tests.attestation.helpers import SHARED

ISSUED = datetime(2026, 11, 19, tzinfo=UTC)
MEASUREMENT = bytes(48)


def report(machine: soft_snp.Machine, **rest: int) -> bytes:
    return soft_snp.report(machine, report_data=bytes(64), measurement=MEASUREMENT, **rest)  # type: ignore[arg-type]


def test_equal_arguments_give_equal_bytes() -> None:
    def made() -> tuple[object, ...]:
        machine = soft_snp.machine(line="Turin", signer="vlek")
        return machine.leaf, report(machine), soft_snp.endorsements(ISSUED)

    first = made()
    for cached in (soft_snp.authority, soft_snp.machine, soft_snp.derive_rsa_key):
        cached.cache_clear()
    assert made() == first


def test_vendor_and_soft_roots_are_disjoint() -> None:
    assert snp_roots.PINS.vendor == {snp_roots.ARK_MILAN, snp_roots.ARK_GENOA, snp_roots.ARK_TURIN}
    assert len(snp_roots.PINS.soft) == 3
    assert snp_roots.PINS.vendor.isdisjoint(snp_roots.PINS.soft)


def test_every_certificate_and_list_says_that_it_protects_nothing() -> None:
    for line in ("Milan", "Genoa", "Turin"):
        issuer = soft_snp.authority(line)
        for der in (issuer.ark, issuer.ask, issuer.asvk, soft_snp.machine(line=line).leaf):
            assert "protects nothing" in pki.from_der(der, where="x").subject
    for item in soft_snp.endorsements(ISSUED):
        assert item.subject.endswith("/soft")
        if "/crl" in item.subject:
            assert b"protects nothing" in crl.from_der(item.data, where="x").issuer_der
    assert soft_snp.CSP_ID.endswith(".invalid")
    assert "protects nothing" in soft_snp.NOTICE


def test_other_machines_lines_levels_and_labels_have_other_keys() -> None:
    machines = [
        soft_snp.machine("a"),
        soft_snp.machine("b"),
        soft_snp.machine("a", line="Genoa"),
        soft_snp.machine("a", signer="vlek"),
        soft_snp.machine("a", tcb=soft_snp.TURIN_TCB, line="Turin"),
        soft_snp.machine("a", label="mallory"),
        soft_snp.machine("a", tcb=snp_format.Tcb(1, 0, 1, 1)),
    ]
    assert len({each.key.private_numbers().private_value for each in machines}) == len(machines)
    assert machines[0].chip_id != machines[1].chip_id


def test_certificates_are_like_amd_s() -> None:
    """Serial 0, RSASSA-PSS with SHA-384 and a salt of 48 bytes, RSA of 4096 bits, P-384."""
    issuer, machine = soft_snp.authority(), soft_snp.machine()
    leaf = asn1_x509.Certificate.load(machine.leaf, strict=True)
    assert leaf.serial_number == 0
    for der in (machine.leaf, issuer.ask, issuer.asvk, issuer.ark):
        loaded = asn1_x509.Certificate.load(der, strict=True)
        algorithm = loaded["signature_algorithm"]
        assert (algorithm.signature_algo, algorithm.hash_algo) == ("rsassa_pss", "sha384")
        assert algorithm["parameters"]["salt_length"].native == 48
        assert algorithm.dump() == loaded["tbs_certificate"]["signature"].dump()
    for key in (issuer.ark_key, issuer.ask_key, issuer.asvk_key):
        assert (key.modulus.bit_length(), key.size) == (4096, 512)
    chain = [pki.from_der(each, where="x") for each in (machine.leaf, issuer.ask, issuer.ark)]
    assert chain[0].verify_issued_by(chain[1])
    assert chain[1].verify_issued_by(chain[2])
    assert chain[2].verify_issued_by(chain[2])
    assert not chain[0].verify_issued_by(chain[2])


@settings(max_examples=20, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([2048, 4096]))
def test_signatures_are_those_of_rsa(message: bytes, bits: int) -> None:
    """Many-prime keys and our own padding, against `cryptography`."""
    key = soft_snp.derive_rsa_key("test", bits)
    public = rsa.RSAPublicNumbers(65537, key.modulus).public_key()
    public.verify(
        key.sign(message), message, padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48), hashes.SHA384()
    )
    public.verify(key.sign_pkcs1(message), message, padding.PKCS1v15(), hashes.SHA256())
    with pytest.raises(InvalidSignature):
        public.verify(key.sign_pkcs1(message), message + b"x", padding.PKCS1v15(), hashes.SHA256())


def test_lists_hold_what_is_revoked() -> None:
    issuer = soft_snp.authority()
    listed = soft_snp.revocation_list(issuer, (2, 3), ISSUED, ISSUED + timedelta(days=1), number=7)
    found = crl.from_der(listed, where="x")
    assert (set(found.serials), found.number) == ({2, 3}, 7)
    assert (found.this_update, found.next_update) == (ISSUED, ISSUED + timedelta(days=1))
    root = pki.from_der(issuer.ark, where="x")
    assert found.problem(root, ISSUED) is None
    assert found.problem(pki.from_der(issuer.ask, where="x"), ISSUED) is not None


@pytest.mark.parametrize("version", snp_format.VERSIONS)
@pytest.mark.parametrize("line", ["Milan", "Turin"])
def test_reports_round_trip(version: int, line: snp_format.Line) -> None:
    machine = soft_snp.machine(line=line)
    found = snp_format.parse(report(machine, version=version, guest_svn=5, vmpl=2))
    assert (found.version, found.guest_svn, found.vmpl, found.signer) == (version, 5, 2, "vcek")
    assert found.tcb("reported", turin=line == "Turin") == machine.tcb
    assert found.chip_id == machine.chip_id
    assert str(found.current) == "1.55.40"
    assert found.abi == (0, 0)
    assert found.family == (None if version == 2 else snp_format.FAMILIES[line])
    assert found.current_mit_vector == (1 if version == 5 else None)


@given(
    st.integers(0, 255), st.integers(0, 255), st.integers(0, 255), st.integers(0, 255), st.none() | st.integers(0, 255)
)
def test_tcb_versions_round_trip(bootloader: int, tee: int, snp: int, microcode: int, fmc: int | None) -> None:
    tcb = snp_format.Tcb(bootloader, tee, snp, microcode, fmc)
    assert snp_format.tcb(tcb.encode(), turin=fmc is not None, what="x") == tcb


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="wanted 48"):
        soft_snp.report(soft_snp.machine(), report_data=bytes(64), measurement=bytes(47))
    with pytest.raises(ValueError, match="time zone"):
        soft_snp.endorsements(datetime(2026, 11, 19))  # noqa: DTZ001 - the point


def test_the_layout_is_that_of_a_real_report() -> None:
    """Byte by byte where the values are the same: a real report, taken apart and put together again."""
    path = SHARED / "vectors" / "attestation" / "snp" / "report-trustee-vlek-aws.bin"
    if not path.exists():
        pytest.skip("third-party vectors are not beside the repository")
    data = path.read_bytes()
    real = snp_format.parse(data)
    names = real.measurements()
    machine = soft_snp.machine(signer="vlek", tcb=real.tcb("reported", turin=False))
    made = soft_snp.report(
        machine,
        report_data=real.report_data,
        measurement=names["measurement"],
        version=real.version,
        guest_svn=real.guest_svn,
        policy=real.policy,
        vmpl=real.vmpl,
        platform_info=real.platform_info,
        host_data=names["host_data"],
        committed=real.tcb("committed", turin=False),
        current=real.tcb("current", turin=False),
        firmware=(real.current.major, real.current.minor, real.current.build),
        committed_firmware=(real.committed.major, real.committed.minor, real.committed.build),
        edit=((0x140, names["report_id"]), (0x1F0, real.tcb_bytes("launch"))),
    )
    assert made[: snp_format.SIGNED_BYTES] == data[: snp_format.SIGNED_BYTES]


@pytest.mark.slow
def test_a_process_pays_little_for_its_authority() -> None:
    """Bound: 1 s on a busy machine; docs/attestation/sev-snp.md has the measured time."""
    code = (
        "import time; from datetime import datetime, UTC; from cloister.attestation.soft import snp; t = time.perf_counter();"
        "snp.endorsements(datetime(2026, 11, 19, tzinfo=UTC)); snp.machine(); print(time.perf_counter() - t)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert float(run.stdout) < 1


def test_pins_are_lower_case_sha256() -> None:
    for pin in snp_roots.PINS.vendor | snp_roots.PINS.soft:
        assert len(bytes.fromhex(pin)) == hashlib.sha256().digest_size
        assert pin == pin.lower()
