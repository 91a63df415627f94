"""The generator of soft Nitro documents: deterministic, bit-exact, and loud about what it is."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.attestation.endorsements import Endorsements
from cloister.attestation.nitro import format as nitro_format
from cloister.attestation.nitro.roots import AWS_NITRO_ROOT_G1, PINS, SOFT_ROOT
from cloister.attestation.nitro.verify import verify
from cloister.attestation.roots import Roots
from cloister.attestation.soft import nitro as soft
from cloister.attestation.types import Evidence

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
PCR0 = hashlib.sha384(b"image").digest()


def test_the_root_is_the_pinned_one() -> None:
    root = soft.authority(NOW).root
    assert hashlib.sha256(root.public_bytes(Encoding.DER)).hexdigest() == SOFT_ROOT
    assert PINS.soft == {SOFT_ROOT}
    assert PINS.vendor == {AWS_NITRO_ROOT_G1}


def test_the_same_arguments_give_the_same_bytes() -> None:
    def made() -> bytes:
        soft.authority.cache_clear()
        soft.enclave.cache_clear()
        return soft.document(soft.enclave(issued=NOW), pcr0=PCR0, made=NOW, user_data=bytes(64))

    assert made() == made()
    assert soft.endorsements(NOW) == soft.endorsements(NOW)


def test_everything_says_that_it_protects_nothing() -> None:
    enclave = soft.enclave(issued=NOW)
    for der in (*enclave.bundle, enclave.certificate):
        assert "SOFT - protects nothing" in x509.load_der_x509_certificate(der).subject.rfc4514_string()
    assert enclave.module_id.startswith("i-50f7")
    assert "protects nothing" in soft.NOTICE


def test_members_and_order_are_those_of_a_real_document() -> None:
    data = soft.document(soft.enclave(issued=NOW), pcr0=PCR0, made=NOW)
    body = cbor2.loads(cbor2.loads(data)[2])
    assert list(body) == [
        "module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle", "public_key", "user_data", "nonce",
    ]  # fmt: skip
    assert data[:9].hex() == "8444a1013822a0590e"  # as doc-2022 begins, but for the length
    assert list(body["pcrs"]) == list(range(16))


@pytest.mark.parametrize("hour", [0, 11, 22, 23])
def test_a_leaf_lives_its_three_hours_whatever_the_time_of_day(hour: int) -> None:
    issued = NOW.replace(hour=hour, minute=59, second=59)
    enclave = soft.enclave(issued=issued)
    made = issued + timedelta(hours=3)
    evidence = Evidence("nitro", soft.document(enclave, pcr0=PCR0, made=made, user_data=bytes(64)))
    claims = verify(evidence, soft.endorsements(issued), Roots(soft=True), now=made)
    assert claims.valid_until == issued + soft.LEAF_LIFETIME


def test_enclaves_differ_by_name() -> None:
    a, b = soft.enclave("a", issued=NOW), soft.enclave("b", issued=NOW)
    assert (a.module_id, a.serial, a.certificate) != (b.module_id, b.serial, b.certificate)
    assert nitro_format.parse(soft.document(a, pcr0=PCR0, made=NOW)).module_id == a.module_id


def test_endorsements_are_revocation_lists_of_two_authorities() -> None:
    found = soft.endorsements(NOW, revoked=(7,))
    assert isinstance(found, Endorsements)
    assert [(each.kind, each.subject) for each in found.items] == [("nitro", "crl/instance"), ("nitro", "crl/zone")]
    first, second = (x509.load_der_x509_crl(each.data) for each in found.items)
    assert [entry.serial_number for entry in first] == [7]
    assert len(second) == 0


def test_mistakes_of_a_caller() -> None:
    naive = datetime(2026, 11, 20)  # noqa: DTZ001 - that is the mistake
    enclave = soft.enclave(issued=NOW)
    for call in (
        lambda: soft.authority(naive),
        lambda: soft.enclave(issued=naive),
        lambda: soft.endorsements(naive),
        lambda: soft.document(enclave, pcr0=PCR0, made=naive),
        lambda: soft.document(enclave, pcr0=bytes(32), made=NOW),
        lambda: soft.document(enclave, pcr0=PCR0, made=NOW, runtime=bytes(32)),
    ):
        with pytest.raises(ValueError, match=r"time zone|48 bytes"):
            call()
