"""Soft TDX: deterministic, marked, and never mistaken for hardware."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.attestation.dcap.roots import INTEL_SGX_ROOT_CA, PINS, SOFT_ROOT
from cloister.attestation.roots import Roots
from cloister.attestation.soft import intel
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.tdx import format as tdx_format
from cloister.testkit.softtee import MEASUREMENT, NOW, SoftPlatform


def test_the_pinned_soft_root_is_the_one_that_is_made() -> None:
    der = soft_tdx.authority().root.public_bytes(Encoding.DER)
    assert hashlib.sha256(der).hexdigest() == SOFT_ROOT


def test_vendor_and_soft_roots_are_disjoint() -> None:
    assert PINS.vendor == {INTEL_SGX_ROOT_CA}
    assert PINS.vendor.isdisjoint(PINS.soft)
    assert Roots().soft is False


def test_equal_arguments_give_equal_bytes() -> None:
    soft_tdx.authority.cache_clear()
    intel.machine.cache_clear()
    first = (SoftPlatform().evidence(), SoftPlatform().endorsements)
    soft_tdx.authority.cache_clear()
    intel.machine.cache_clear()
    assert (SoftPlatform().evidence(), SoftPlatform().endorsements) == first


def test_other_machines_have_other_identities() -> None:
    a, b = soft_tdx.platform("a"), soft_tdx.platform("b")
    assert a.ppid != b.ppid
    assert a.serial != b.serial
    assert a.tail[:64] != b.tail[:64]


def test_every_certificate_says_that_it_protects_nothing() -> None:
    quote = tdx_format.parse(SoftPlatform().evidence().quote)
    certificates = [x509.load_der_x509_certificate(der) for der in quote.certificates]
    certificates.append(soft_tdx.authority().signer)
    for each in certificates:
        for name in (each.subject, each.issuer):
            assert "SOFT" in name.rfc4514_string()
            assert "protects nothing" in name.rfc4514_string()


def test_the_bytes_are_those_of_a_real_quote_v4() -> None:
    quote = SoftPlatform().evidence().quote
    assert quote[:2] == b"\x04\x00"
    assert quote[12:28] == tdx_format.INTEL_QE
    assert quote[48 + 136 : 48 + 184] == MEASUREMENT
    assert int.from_bytes(quote[632:636], "little") == len(quote) - 636
    assert quote.endswith(b"-----END CERTIFICATE-----\n\x00")


def test_collateral_names_no_real_machine() -> None:
    text = soft_tdx.collateral(NOW).decode()
    assert soft_tdx.FMSPC in text
    assert not re.search(r"INTEL-SA", text)


@pytest.mark.parametrize(
    "wrong",
    [{"mrtd": bytes(47)}, {"rtmr3": bytes(49)}, {"report_data": bytes(32)}, {"tee_tcb_svn": bytes(15)}],
)
def test_a_register_of_another_size_is_a_callers_mistake(wrong: dict[str, bytes]) -> None:
    values = {"mrtd": bytes(48), "report_data": bytes(64), **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        soft_tdx.quote(soft_tdx.platform(), **values)  # type: ignore[arg-type]


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="status"):
        soft_tdx.platform(status="Fine")
    with pytest.raises(ValueError, match="FMSPC"):
        soft_tdx.platform(fmspc="00")
    with pytest.raises(ValueError, match="time zone"):
        soft_tdx.collateral(datetime(2026, 1, 1))  # noqa: DTZ001 - the mistake that is tested


def test_february_has_no_day_that_levels_cannot_name() -> None:
    for day in (datetime(2028, 2, 29, tzinfo=UTC), datetime(2026, 12, 31, tzinfo=UTC)):
        assert SoftPlatform(issued=day, now=day + timedelta(hours=1)).claims().tcb_status == "UpToDate"
        old = SoftPlatform(status="OutOfDate", issued=day, now=day + timedelta(hours=1)).claims()
        assert old.tcb_date is not None
        assert old.tcb_date.year == day.year - 2
