"""SGX evidence end to end: every way to be wrong, through verify(), appraise() and check_binding(), on soft quotes.

The soft quotes are bit-exact, and dcap-qvl judges them as it judges Intel's; only the pinned root differs. What SGX shares with
TDX is attacked in test_dcap.py.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.attestation import events as event_log
from cloister.attestation.appraise import appraise
from cloister.attestation.binding import Binding, check_binding
from cloister.attestation.dcap import collateral as dcap_collateral
from cloister.attestation.dcap import format as dcap_format
from cloister.attestation.dcap import qvl
from cloister.attestation.dcap.roots import INTEL_SGX_ROOT_CA
from cloister.attestation.edge.collateral import load_collateral
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.events import workload_of
from cloister.attestation.roots import Roots
from cloister.attestation.sgx import format as sgx_format
from cloister.attestation.sgx.verify import STEPS
from cloister.attestation.sgx.verify import verify as verify_sgx
from cloister.attestation.soft import intel
from cloister.attestation.soft import sgx as soft_sgx
from cloister.attestation.soft.intel import Platform
from cloister.attestation.types import Claims, Event, Evidence, Policy, Software
from cloister.attestation.verify import VERIFIERS, verify
from cloister.errors import EvidenceError
from cloister.testkit.softtee import NOW, SOFT_ROOTS, binding, soft_collateral, soft_policy, workload
from tests.attestation.helpers import refusal, value_or_malformed

MRENCLAVE = hashlib.sha256(b"cloister testkit enclave").digest()
DAY = timedelta(days=1)
WORKLOAD = event_log.event(event_log.WORKLOAD, workload().encode())


@dataclass
class Enclave:
    """One soft enclave, its machine and the collateral that endorses it."""

    status: str = "UpToDate"
    revoked: bool = False
    issued: datetime = NOW - DAY
    now: datetime = NOW
    label: str = intel.LABEL
    events: tuple[Event, ...] = (WORKLOAD,)
    report: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def platform(self) -> Platform:
        return soft_sgx.platform(status=self.status, label=self.label, **self.machine)

    def quote(self, bound: Binding | None = None) -> bytes:
        wanted = (binding() if bound is None else bound).report_data()
        values = {"mrenclave": MRENCLAVE, "report_data": event_log.fold(wanted, self.events)} | self.report
        return soft_sgx.quote(self.platform, **values)

    def evidence(self) -> Evidence:
        return Evidence("sgx", self.quote(), self.events)

    def endorsements(self) -> Endorsements:
        revoked = (self.platform.serial,) if self.revoked else ()
        document = soft_sgx.collateral(self.issued, revoked=revoked, label=self.label)
        return Endorsements((Endorsement("sgx", self.platform.fmspc, document),))

    def claims(self) -> Claims:
        return verify(self.evidence(), self.endorsements(), SOFT_ROOTS, now=self.now)


def step(error: EvidenceError) -> str:
    return ".".join(error.reasons[0].where.split(".")[:2])


def refused(enclave: Enclave, where: str, *, code: str = "evidence-not-authentic") -> EvidenceError:
    error = refusal(enclave.claims)
    assert error.code == code, error
    assert where in (error.reasons[0].where, step(error)), error
    return error


def accepted(evidence: Evidence) -> Claims:
    return verify(evidence, Enclave().endorsements(), SOFT_ROOTS, now=NOW)


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_a_good_soft_enclave_gives_all_claims() -> None:
    enclave = Enclave(report={"isvprodid": 7, "isvsvn": 3, "configid": b"\x05" * 64, "configsvn": 2})
    claims = enclave.claims()
    assert (claims.kind, claims.tee, claims.soft, claims.debug) == ("tee", "soft-sgx", True, False)
    assert (claims.tcb_status, claims.tcb_date, claims.advisories) == ("UpToDate", date(2026, 11, 1), ())
    assert (claims.launch, claims.log_in) == ("mrenclave", "report-data")
    assert claims.measurements == {
        "cpusvn": intel.CPU_SVN,
        "miscselect": bytes(4),
        "isvextprodid": bytes(16),
        "attributes": bytes.fromhex("0500000000000000e700000000000000"),
        "mrenclave": MRENCLAVE,
        "mrsigner": soft_sgx.MRSIGNER,
        "configid": b"\x05" * 64,
        "isvfamilyid": bytes(16),
    }
    assert claims.svns == {
        "isvprodid": 7, "isvsvn": 3, "configsvn": 2, "pcesvn": 17, "qe_isvsvn": 6, "tcb_evaluation_data_number": 1,
    }  # fmt: skip
    assert claims.attributes == {
        "debug": False, "mode64bit": True, "provision_key": False, "einittoken_key": False, "cet": False, "kss": False,
        "aex_notify": False, "dynamic_platform": True, "cached_keys": True, "smt_enabled": True, "memory_integrity": False,
    }  # fmt: skip
    assert claims.platform["ppid"] == enclave.platform.ppid.hex()
    assert claims.platform["fmspc"] == soft_sgx.FMSPC.lower()
    assert claims.valid_until == NOW - DAY + soft_sgx.LIFETIME
    assert len(claims.chain) == 3
    assert workload_of(claims) == workload()
    assert check_binding(claims, binding()) == ()
    assert appraise(claims, soft_policy()) == ()


def test_the_soft_root_counts_only_when_it_is_named() -> None:
    error = refusal(verify, Enclave().evidence(), Enclave().endorsements(), Roots(), now=NOW)
    assert (error.code, error.reasons[0].where) == ("evidence-not-authentic", "sgx.2-root")
    assert INTEL_SGX_ROOT_CA in error.reasons[0].wanted


def test_soft_collateral_of_the_day_endorses_soft_enclaves() -> None:
    assert verify(Enclave().evidence(), soft_collateral(NOW), SOFT_ROOTS, now=NOW).tee == "soft-sgx"


def test_collateral_in_a_file_says_which_tee_it_is_for(tmp_path: Any) -> None:
    path = tmp_path / "collateral.json"
    path.write_bytes(soft_sgx.collateral(NOW))
    assert [(item.kind, item.subject) for item in load_collateral(path).items] == [("sgx", soft_sgx.FMSPC)]


def test_one_machine_has_one_identity_in_both_tees() -> None:
    from cloister.testkit.softtee import SoftPlatform

    assert SoftPlatform().claims().platform == Enclave().claims().platform


# --- the matrix: status x debug x revocation x time x binding ---------------------------------------------------------

_TIMES = {"valid": timedelta(0), "early": timedelta(days=-2), "late": timedelta(days=30)}


@pytest.mark.parametrize(
    ("status", "debug", "revoked", "time", "bound"),
    list(itertools.product(soft_sgx.STATUSES, (False, True), (False, True), _TIMES, (True, False))),
)
def test_matrix(status: str, debug: bool, revoked: bool, time: str, bound: bool) -> None:
    enclave = Enclave(status=status, revoked=revoked, now=NOW + _TIMES[time], report={"debug": debug})
    faults = {
        name
        for name, fault in (
            (f"sgx.3-collateral.{'future' if time == 'early' else 'expired'}", time != "valid"),
            ("sgx.4-chain.revoked", revoked),
            ("sgx.7-tcb", status == "Revoked"),
            ("sgx.8-attributes", debug),
        )
        if fault
    }
    if faults:
        error = refusal(enclave.claims)
        assert error.code == "evidence-not-authentic"
        assert {reason.where for reason in error.reasons} <= faults
        return
    claims = enclave.claims()
    refusals = [reason.where for reason in appraise(claims, soft_policy())]
    refusals += [
        reason.where for reason in check_binding(claims, binding(nonce=binding().nonce if bound else bytes(32)))
    ]
    assert refusals == [
        *([] if status in {"UpToDate", "SWHardeningNeeded"} else ["place.enclave.tcb_status"]),
        *([] if bound else ["binding.report_data"]),
    ]
    assert claims.tcb_status == status


# --- faults one by one, named after the attack ------------------------------------------------------------------------


def test_a_debug_enclave_is_refused_and_says_so() -> None:
    error = refused(Enclave(report={"debug": True}), "sgx.8-attributes")
    assert error.reasons[0].found == "Debug mode is enabled"
    assert "host can read" in error.reasons[0].hint


def test_the_debug_bit_is_read_again_by_our_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dcap-qvl that let debug pass would still give claims that every policy refuses."""
    enclave = Enclave(report={"debug": True})
    good = Enclave().quote()
    found = dcap_collateral.parse(Enclave().endorsements().items[0].data)
    report = qvl.run(sgx_format.SGX, good, sgx_format.parse(good), found, (), NOW)
    report["report"]["SgxEnclave"]["attributes"] = "0700000000000000e700000000000000"
    monkeypatch.setattr(qvl, "run", lambda *_: report)
    claims = enclave.claims()
    assert claims.debug
    assert [reason.where for reason in appraise(claims, soft_policy())] == ["place.enclave.debug"]


def test_switches_of_an_enclave_are_claims_that_a_contract_can_demand_off() -> None:
    flags = soft_sgx.INIT | soft_sgx.MODE64BIT | soft_sgx.PROVISION_KEY | soft_sgx.KSS
    claims = Enclave(report={"flags": flags}).claims()
    assert (claims.attributes["provision_key"], claims.attributes["kss"]) == (True, True)
    policy = soft_policy(require={"sgx": {"provision_key": False}})
    assert [reason.where for reason in appraise(claims, policy)] == ["place.enclave.require.provision_key"]
    assert appraise(Enclave().claims(), policy) == ()


def test_a_signer_names_software_with_product_and_least_version() -> None:
    """An older release of the same signer, another product of it, and the same numbers of another signer are refused."""
    software = Software(
        "store",
        tee="sgx",
        measurements={"mrsigner": frozenset({soft_sgx.MRSIGNER})},
        svns_equal={"isvprodid": 7},
        svns_least={"isvsvn": 3},
    )
    policy = soft_policy(software=(software,))

    def broken(**report: Any) -> list[str]:
        claims = Enclave(report={"isvprodid": 7, "isvsvn": 3} | report).claims()
        return [reason.where for reason in appraise(claims, policy)]

    assert broken() == []
    assert broken(isvsvn=4, mrenclave=bytes(32)) == []
    assert broken(isvsvn=2) == ["place.enclave.software.store.isvsvn"]
    assert broken(isvprodid=8) == ["place.enclave.software.store.isvprodid"]
    assert broken(mrsigner=b"\x09" * 32) == ["place.enclave.software.store.mrsigner"]


def test_another_program_has_another_mrenclave() -> None:
    wanted = soft_policy(reference_values={"mrenclave": frozenset({MRENCLAVE})})
    assert appraise(Enclave().claims(), wanted) == ()
    (reason,) = appraise(Enclave(report={"mrenclave": b"\x07" * 32}).claims(), wanted)
    assert (reason.where, reason.found) == ("place.enclave.mrenclave", "07" * 32)


def test_soft_and_real_enclaves_never_stand_for_each_other() -> None:
    claims = Enclave().claims()
    assert appraise(claims, Policy("p", "tee", accept=frozenset({"sgx"})))[0].where == "p.accept"
    real = replace(claims, tee="sgx")
    assert appraise(real, soft_policy())[0].where == "place.enclave.accept"


# --- the log of an enclave: bound by the report data ------------------------------------------------------------------


def _bound(events: Iterable[Event], signed: Iterable[Event] = (WORKLOAD,)) -> list[str]:
    quote = Enclave(events=tuple(signed)).quote()
    claims = accepted(Evidence("sgx", quote, tuple(events)))
    return [reason.where for reason in check_binding(claims, binding())]


def test_a_log_that_was_changed_on_the_way_is_not_bound() -> None:
    other = event_log.event("cloister/note/1", b"x")
    assert _bound((WORKLOAD, other), (WORKLOAD, other)) == []
    for events in ((), (WORKLOAD,), (other, WORKLOAD), (WORKLOAD, other, other)):
        assert _bound(events, (WORKLOAD, other)) == ["binding.report_data"]
    assert _bound((), ()) == []
    assert _bound((WORKLOAD,), ()) == ["binding.report_data"]


def test_event_data_that_does_not_hash_to_its_digest_is_refused() -> None:
    forged = replace(WORKLOAD, data=workload(code="sha256:" + "22" * 32).encode())
    error = refusal(accepted, Evidence("sgx", Enclave().quote(), (forged,)))
    assert (error.code, error.reasons[0].where) == ("evidence-not-authentic", "sgx.10-events.0.data")


def test_a_quote_over_the_bare_report_data_does_not_vouch_for_a_log() -> None:
    """An enclave that ignores the log signs the binding itself; then no log, not even an empty one, is believed for it."""
    quote = Enclave(report={"report_data": binding().report_data()}).quote()
    for events in ((), (WORKLOAD,)):
        claims = accepted(Evidence("sgx", quote, events))
        assert [reason.where for reason in check_binding(claims, binding())] == ["binding.report_data"]


@pytest.mark.parametrize(
    "other",
    [
        {"nonce": b"\x07" * 32},
        {"key": b"\x07" * 1216},
        {"peer_key": b"\x07" * 32},
        {"purpose": "renew"},
        {"contract": "sha256:" + "77" * 32},
        {"request": b"\x07" * 32},
    ],
    ids=["replay", "relay", "man in the middle", "another purpose", "another contract", "another request"],
)
def test_evidence_for_something_else_is_not_bound(other: dict[str, Any]) -> None:
    claims = Enclave().claims()
    assert [reason.where for reason in check_binding(claims, binding(**other))] == ["binding.report_data"]


# --- arguments --------------------------------------------------------------------------------------------------------


def test_callers_mistakes_are_value_errors() -> None:
    enclave = Enclave()
    with pytest.raises(ValueError, match="time zone"):
        verify_sgx(enclave.evidence(), enclave.endorsements(), SOFT_ROOTS, now=NOW.replace(tzinfo=None))
    with pytest.raises(ValueError, match="kind"):
        verify_sgx(Evidence("tdx", b"x"), enclave.endorsements(), SOFT_ROOTS, now=NOW)
    assert VERIFIERS["sgx"] is verify_sgx


@pytest.mark.parametrize("year", [1, 1969, 9999])
def test_a_time_far_away_is_refused_not_a_crash(year: int) -> None:
    error = refusal(
        verify, Enclave().evidence(), Enclave().endorsements(), SOFT_ROOTS, now=datetime(year, 6, 1, tzinfo=UTC)
    )
    assert error.code == "evidence-not-authentic"
    assert error.reasons


def test_parts_that_nobody_reads_are_refused() -> None:
    error = refusal(accepted, replace(Enclave().evidence(), parts={"ccel": b"x"}))
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", "sgx.1-format")


def test_no_collateral_for_this_machine_is_refused() -> None:
    error = refusal(verify, Enclave().evidence(), Endorsements(), SOFT_ROOTS, now=NOW)
    assert (error.reasons[0].where, error.reasons[0].wanted) == ("sgx.3-collateral", soft_sgx.FMSPC)


# --- bytes ------------------------------------------------------------------------------------------------------------

_GOOD = Enclave().evidence()


def test_no_flipped_bit_of_the_signed_region_is_accepted() -> None:
    """Every byte of header and report once, one bit each: 432 quotes."""
    generator = random.Random(20261120)
    for position in range(432):
        changed = bytearray(_GOOD.quote)
        changed[position] ^= 1 << generator.randrange(8)
        error = refusal(accepted, replace(_GOOD, quote=bytes(changed)))
        assert error.code in {"evidence-malformed", "evidence-not-authentic"}


def test_no_flipped_bit_of_keys_signatures_and_qe_report_is_accepted() -> None:
    pem = _GOOD.quote.index(b"-----BEGIN")
    generator = random.Random(7)
    for position in sorted(generator.sample(range(432, pem), 300)):
        changed = bytearray(_GOOD.quote)
        changed[position] ^= 1 << generator.randrange(8)
        refusal(accepted, replace(_GOOD, quote=bytes(changed)))


def test_a_flipped_bit_of_the_chain_changes_no_claim() -> None:
    wanted = accepted(_GOOD)
    pem = _GOOD.quote.index(b"-----BEGIN")
    generator = random.Random(8)
    for position in sorted(generator.sample(range(pem, len(_GOOD.quote)), 150)):
        changed = bytearray(_GOOD.quote)
        changed[position] ^= 1 << generator.randrange(8)
        try:
            claims: Claims | None = accepted(replace(_GOOD, quote=bytes(changed)))
        except EvidenceError:
            claims = None
        assert claims is None or claims == wanted


@pytest.mark.parametrize("tail", [b"\x00", b"\x00" * 70, b"x", b"\n", _GOOD.quote])
def test_bytes_after_a_quote_are_refused(tail: bytes) -> None:
    error = refusal(accepted, replace(_GOOD, quote=_GOOD.quote + tail))
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", "sgx.1-format")


def test_the_attester_may_cut_zero_padding_and_nothing_else() -> None:
    quote = _GOOD.quote
    assert sgx_format.without_padding(quote + bytes(70)) == quote
    assert refusal(sgx_format.without_padding, quote + b"\x00x").code == "evidence-malformed"


def test_every_truncation_is_malformed() -> None:
    for size in (*range(1100), *range(1100, len(_GOOD.quote), 97)):
        assert refusal(sgx_format.parse, _GOOD.quote[:size]).code == "evidence-malformed"


@pytest.mark.parametrize(
    ("offset", "value", "found"),
    [
        (0, b"\x02\x00", "version 2"),
        (0, b"\x04\x00", "version 4"),
        (0, b"\x05\x00", "version 5"),
        (2, b"\x03\x00", "key type 3"),
        (4, b"\x81\x00\x00\x00", "TEE type 0x81"),
        (12, bytes(16), "QE vendor"),
        (432, b"\xff\xff\xff\xff", "bytes left"),
        (432, b"\x00\x00\x00\x00", "0 bytes left"),
        (436 + 128 + 384 + 64, b"\xff\xff", "bytes left"),
        (436 + 128 + 384 + 64 + 34, b"\x06\x00", "certification data type 6"),
        (436 + 128 + 384 + 64 + 36, b"\x01\x00\x00\x00", "bytes after certification data"),
    ],
)
def test_a_quote_with_one_wrong_field_names_it(offset: int, value: bytes, found: str) -> None:
    quote = bytearray(_GOOD.quote)
    quote[offset : offset + len(value)] = value
    error = refusal(sgx_format.parse, bytes(quote))
    assert error.code == "evidence-malformed"
    assert found in error.reasons[0].found


@given(st.binary(max_size=1500))
def test_arbitrary_bytes_are_a_quote_or_malformed(data: bytes) -> None:
    assert value_or_malformed(lambda: sgx_format.parse(data)) is None


@given(
    st.lists(
        st.tuples(st.integers(0, len(_GOOD.quote) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=40
    )
)
def test_mutated_quotes_raise_nothing_foreign(changes: list[tuple[int, bytes]]) -> None:
    changed = bytearray(_GOOD.quote)
    for position, value in changes:
        changed[position : position + len(value)] = value
    try:
        claims: Claims | None = accepted(replace(_GOOD, quote=bytes(changed)))
    except EvidenceError as error:
        claims = None
        assert error.reasons[0].where.partition(".")[0] == "sgx"  # noqa: PT017 - a refusal must name its step
    assert claims is None or claims.measurements["mrenclave"] == MRENCLAVE


# --- soft SGX itself --------------------------------------------------------------------------------------------------


def test_equal_arguments_give_equal_bytes() -> None:
    first = (Enclave().quote(), soft_sgx.collateral(NOW))
    intel.machine.cache_clear()
    intel.authority.cache_clear()
    assert (Enclave().quote(), soft_sgx.collateral(NOW)) == first


def test_the_bytes_are_those_of_a_real_quote_v3() -> None:
    quote = Enclave().quote()
    assert quote[:8] == b"\x03\x00\x02\x00\x00\x00\x00\x00"
    assert quote[12:28] == dcap_format.INTEL_QE
    assert quote[48 + 64 : 48 + 96] == MRENCLAVE
    assert int.from_bytes(quote[432:436], "little") == len(quote) - 436
    assert quote[436 + 128 + 384 + 64 + 34 :][:2] == b"\x05\x00"


def test_collateral_names_no_real_machine() -> None:
    text = soft_sgx.collateral(NOW).decode()
    assert soft_sgx.FMSPC in text
    assert "INTEL-SA" not in text
    assert "tdx" not in text.lower()
    assert "protects nothing" in soft_sgx.NOTICE


@pytest.mark.parametrize(
    "wrong",
    [
        {"mrenclave": bytes(31)},
        {"mrsigner": bytes(33)},
        {"report_data": bytes(32)},
        {"configid": bytes(63)},
        {"isvextprodid": bytes(15)},
        {"isvfamilyid": bytes(17)},
        {"isvsvn": 1 << 16},
        {"isvprodid": -1},
        {"configsvn": 1 << 16},
    ],
)
def test_a_field_of_another_size_is_a_callers_mistake(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        soft_sgx.quote(soft_sgx.platform(), **{"mrenclave": MRENCLAVE, "report_data": bytes(64), **wrong})


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="TEE"):
        intel.machine("sev")
    with pytest.raises(ValueError, match="time zone"):
        soft_sgx.collateral(datetime(2026, 1, 1))  # noqa: DTZ001 - the mistake that is tested


def test_steps_name_every_refusal_of_the_matrix() -> None:
    faults = (
        Enclave(report={"debug": True}),
        Enclave(revoked=True),
        Enclave(status="Revoked"),
        Enclave(now=NOW + timedelta(days=40)),
        Enclave(label="mallory"),
    )
    assert {step(refusal(each.claims)) for each in faults} <= set(STEPS)
