"""The soft TPM: bit-exact, deterministic, and it says everywhere that it protects nothing."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.attestation import evidence as wire
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.logs import ima, tcg
from cloister.attestation.roots import Roots
from cloister.attestation.soft import tpm as soft
from cloister.attestation.tpm import chain as chains
from cloister.attestation.tpm import enrol
from cloister.attestation.tpm import format as tpm_format
from cloister.attestation.tpm import verify as tpm_verify
from cloister.attestation.tpm.roots import PINS, SOFT_ROOT
from cloister.attestation.verify import verify
from cloister.testkit.softtee import NOW, SOFT_ROOTS
from tests.attestation.helpers import refusal

DATA = hashlib.sha256(b"binding").digest()


def test_equal_arguments_give_equal_bytes() -> None:
    soft.machine.cache_clear()
    soft.authority.cache_clear()
    first = wire.encode(soft.evidence(soft.machine(), report_data=DATA))
    soft.machine.cache_clear()
    soft.authority.cache_clear()
    assert wire.encode(soft.evidence(soft.machine(), report_data=DATA)) == first
    assert wire.encode(soft.evidence(soft.machine("other"), report_data=DATA)) != first
    assert soft.endorsements(NOW) == soft.endorsements(NOW)


def test_the_root_is_pinned_as_soft_only() -> None:
    root = soft.authority().root.public_bytes(Encoding.DER)
    assert hashlib.sha256(root).hexdigest() == SOFT_ROOT
    assert PINS.soft == {SOFT_ROOT}
    assert not PINS.vendor
    foreign = soft.authority("another label").root.public_bytes(Encoding.DER)
    assert hashlib.sha256(foreign).hexdigest() not in PINS.soft


def test_everything_says_that_it_protects_nothing() -> None:
    assert "protects nothing" in soft.NOTICE
    for certificate in (soft.authority().root, soft.authority().ca):
        assert "protects nothing" in certificate.subject.rfc4514_string()
    leaf, *rest = chains.split(soft.machine().ak_chain, where="x")
    assert "protects nothing" in leaf.subject
    assert len(rest) == 2
    ek = chains.split(soft.machine().ek_chain, where="x")[0]
    assert chains.tpm_names(ek)["manufacturer"] == "id:" + b"SOFT".hex().upper()
    assert soft.FIRMWARE.to_bytes(8, "big").startswith(b"SOFT")
    claims = verify(soft.evidence(soft.machine(), report_data=DATA), Endorsements(), SOFT_ROOTS, now=NOW)
    assert (claims.tee, claims.soft) == ("soft-tpm", True)
    assert all("protects nothing" in each for each in claims.chain)
    assert (
        refusal(verify, soft.evidence(soft.machine(), report_data=DATA), Endorsements(), Roots(), now=NOW)
        .reasons[0]
        .where
        == "tpm.5-root"
    )


def test_certificates_are_as_the_profile_wants_them() -> None:
    ek = x509.load_der_x509_certificate(chains.split(soft.machine().ek_chain, where="x")[0].der)
    assert ek.subject.rfc4514_string() == ""
    names = ek.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical
    usage = ek.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_agreement
    assert not usage.digital_signature
    ak = x509.load_der_x509_certificate(chains.split(soft.machine().ak_chain, where="x")[0].der)
    assert ak.extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature


def test_logs_and_registers_belong_together() -> None:
    event = soft.runtime("cloister/workload/1", b"x")
    host = soft.host()
    pcrs = host.pcrs((event,))
    log = tcg.parse(host.boot_log(), where="x")
    assert log.algorithms == ("sha1", "sha256")
    assert len(log.entries) == len(host.steps)
    for register, value in tcg.replay(log, "sha256").items():
        assert pcrs[register] == value
    entries = ima.parse(host.ima_log(), where="x")
    assert entries[0].digest == ima.boot_aggregate(pcrs[index] for index in range(10))
    assert ima.replay(entries, "sha256") == {10: pcrs[10]}
    assert pcrs[15] == hashlib.sha256(bytes(32) + hashlib.sha256(b"x").digest()).digest()
    assert pcrs[17] == b"\xff" * 32
    assert set(host.pcrs(algorithm="sha1")) == set(range(24))


def test_data_that_was_not_hashed_is_in_the_log_as_in_real_ones() -> None:
    events = tcg.events(tcg.parse(soft.host().boot_log(), where="x"), "sha256")
    missing = [event.type for event in events if event.data is None]
    assert missing == [
        "EV_EFI_PLATFORM_FIRMWARE_BLOB",
        "EV_EFI_BOOT_SERVICES_APPLICATION",
        "EV_EVENT_TAG",
        "EV_EVENT_TAG",
    ]
    options = next(event for event in events if event.label == "LOADED_IMAGE::LoadOptions")
    assert options.digest == hashlib.sha256(tcg.load_options(soft.COMMAND_LINE)).digest()


def test_keys_and_names() -> None:
    machine = soft.machine()
    ak, ek = (tpm_format.parse_public(each, where="x") for each in (machine.ak, machine.ek))
    assert machine.name == ak.name == b"\x00\x0b" + hashlib.sha256(machine.ak).digest()
    assert (ak.attributes, ek.attributes) == (0x50472, 0x300B2)  # those of real templates
    assert ek.policy == soft.EK_POLICY
    note = soft.note(machine, NOW)
    assert (note.ak, note.ek) == (ak.name, enrol.ek_id(ek))
    assert soft.note(machine, NOW, how="ek-pinned", root="", certificate="").how == "ek-pinned"


def test_parts_can_be_replaced_and_left_out() -> None:
    given = soft.evidence(soft.machine(), report_data=DATA, parts={"ima-log": None, "boot-log": b"x"})
    assert set(given.parts) == tpm_verify.PARTS - {"ima-log"}
    assert given.parts["boot-log"] == b"x"
    assert "ak-cert" not in soft.evidence(soft.machine(certified=False), report_data=DATA).parts


def test_revocation_lists_have_a_window() -> None:
    with pytest.raises(ValueError, match="time zone"):
        soft.endorsements(datetime(2026, 1, 1))  # noqa: DTZ001
    lists = [x509.load_der_x509_crl(each.data) for each in soft.endorsements(NOW, lifetime=timedelta(days=2))]
    assert [each.next_update_utc for each in lists] == [NOW + timedelta(days=2)] * 2
    assert {each.subject.partition("/")[0] for each in soft.endorsements(NOW)} == {"crl"}
