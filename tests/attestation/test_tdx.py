"""TDX evidence end to end: every way to be wrong, through verify() and appraise(), on soft quotes.

The soft quotes are bit-exact, and dcap-qvl judges them as it judges Intel's; only the pinned root differs.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.attestation.appraise import appraise
from cloister.attestation.binding import check_binding
from cloister.attestation.dcap import collateral as dcap_collateral
from cloister.attestation.dcap import qvl
from cloister.attestation.dcap.roots import INTEL_SGX_ROOT_CA, SOFT_ROOT
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.events import workload_of
from cloister.attestation.roots import Roots
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.tdx import format as tdx_format
from cloister.attestation.types import Claims, Evidence
from cloister.attestation.verify import VERIFIERS, verify
from cloister.crypto.canonical import json_decode, json_encode
from cloister.errors import EvidenceError
from cloister.testkit.softtee import (
    MEASUREMENT,
    NOW,
    SOFT_ROOTS,
    STATUSES,
    SoftPlatform,
    binding,
    soft_collateral,
    soft_policy,
    workload,
)
from tests.attestation.helpers import refusal, value_or_malformed
from tests.attestation.oracle import signatures_hold


def step(error: EvidenceError) -> str:
    """Return the step that refused, without the fault behind it."""
    return ".".join(error.reasons[0].where.split(".")[:2])


def refused(platform: SoftPlatform, where: str, *, code: str = "evidence-not-authentic") -> EvidenceError:
    """Return the refusal of `platform`, which must come from `where`: a step, or a step and its fault."""
    error = refusal(platform.claims)
    assert error.code == code, error
    assert where in (error.reasons[0].where, step(error)), error
    assert error.exit_status == 4
    return error


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_a_good_soft_platform_gives_all_claims() -> None:
    platform = SoftPlatform().run(workload())
    claims = platform.claims()
    assert (claims.kind, claims.tee, claims.soft, claims.debug) == ("tee", "soft-tdx", True, False)
    assert (claims.tcb_status, claims.tcb_date, claims.advisories) == ("UpToDate", date(2026, 11, 1), ())
    assert claims.report_data == binding().report_data()
    assert claims.measurements["mrtd"] == MEASUREMENT
    assert set(claims.measurements) == {
        "teetcbsvn", "mrseam", "mrsignerseam", "seamattributes", "tdattributes", "xfam", "mrtd", "mrconfigid",
        "mrowner", "mrownerconfig", "rtmr0", "rtmr1", "rtmr2", "rtmr3",
    }  # fmt: skip
    assert claims.platform["ppid"] == platform.machine.ppid.hex()
    assert claims.platform["fmspc"] == soft_tdx.FMSPC.lower()
    assert claims.platform["sgx_type"] == "1"
    assert claims.launch == "mrtd"
    assert claims.svns == {"pcesvn": 17, "tcb_evaluation_data_number": 1, "qe_isvsvn": 6, "tdx_module_svn": 5}
    assert claims.attributes == {
        "debug": False, "icssd": False, "lass": False, "sept_ve_disable": True, "migratable": False, "pks": False, "kl": False, "tpa": False, "perfmon": False,
        "dynamic_platform": True, "cached_keys": True, "smt_enabled": True, "memory_integrity": False,
    }  # fmt: skip
    assert claims.valid_until == NOW - timedelta(days=1) + soft_tdx.LIFETIME
    assert [line.split(",")[0] for line in claims.chain] == ["O=Cloister SOFT - protects nothing" for _ in range(3)]
    assert workload_of(claims) == workload()
    assert check_binding(claims, binding()) == ()
    assert appraise(claims, soft_policy()) == ()


def test_the_soft_root_counts_only_when_it_is_named() -> None:
    platform = SoftPlatform()
    error = refusal(verify, platform.evidence(), platform.endorsements, Roots(), now=NOW)
    assert (error.code, error.reasons[0].where) == ("evidence-not-authentic", "tdx.2-root")
    assert error.reasons[0].found == "the published test root"
    assert INTEL_SGX_ROOT_CA in error.reasons[0].wanted


def test_the_second_implementation_agrees() -> None:
    quote = tdx_format.parse(SoftPlatform().evidence().quote)
    assert signatures_hold(quote, root_sha256=SOFT_ROOT, at=NOW)
    assert not signatures_hold(replace(quote, signed=quote.signed[:-1] + b"\x00"), root_sha256=SOFT_ROOT, at=NOW)
    assert not signatures_hold(quote, root_sha256=INTEL_SGX_ROOT_CA, at=NOW)


# --- the matrix: status x debug x revocation x time x binding ---------------------------------------------------------

_TIMES = {"valid": timedelta(0), "early": timedelta(days=-2), "late": timedelta(days=30)}


@pytest.mark.parametrize(
    ("status", "debug", "revoked", "time", "bound"),
    list(itertools.product(STATUSES, (False, True), (False, True), _TIMES, (True, False))),
)
def test_matrix(status: str, debug: bool, revoked: bool, time: str, bound: bool) -> None:
    platform = SoftPlatform(
        status=status, debug=debug, revoked=revoked, now=NOW + _TIMES[time], issued=NOW - timedelta(days=1)
    )
    authentic = status != "Revoked" and not debug and not revoked and time == "valid"
    if not authentic:
        error = refusal(platform.claims)
        assert error.code == "evidence-not-authentic"
        faults = {
            name
            for name, fault in (
                (f"tdx.3-collateral.{'future' if time == 'early' else 'expired'}", time != "valid"),
                ("tdx.4-chain.revoked", revoked),
                ("tdx.7-tcb", status == "Revoked"),
                ("tdx.8-attributes", debug),
            )
            if fault
        }
        assert {reason.where for reason in error.reasons} <= faults
        return
    claims = platform.claims()
    refusals = [reason.where for reason in appraise(claims, soft_policy())]
    refusals += [
        reason.where for reason in check_binding(claims, binding(nonce=binding().nonce if bound else bytes(32)))
    ]
    accepted_status = status in {"UpToDate", "SWHardeningNeeded"}
    assert refusals == [
        *([] if accepted_status else ["place.enclave.tcb_status"]),
        *([] if bound else ["binding.report_data"]),
    ]
    assert claims.tcb_status == status


# --- faults one by one, named after the attack ------------------------------------------------------------------------


def test_debug_is_refused_and_says_so() -> None:
    error = refused(SoftPlatform(debug=True), "tdx.8-attributes")
    assert "Debug" in error.reasons[0].found
    assert error.reasons[0].wanted == "debug off"
    assert "host can read" in error.reasons[0].hint


def test_policy_debug_cannot_admit_a_debug_td() -> None:
    """Only the policy is asked after verify, so a debug TD never reaches it."""
    assert appraise(SoftPlatform().claims(), soft_policy(debug=True)) == ()
    refused(SoftPlatform(debug=True), "tdx.8-attributes")


def test_revoked_pck_is_refused() -> None:
    error = refused(SoftPlatform(revoked=True), "tdx.4-chain.revoked")
    serial = f"{SoftPlatform().machine.serial:x}"
    assert f"serial {serial} is revoked" in error.reasons[0].found


def test_revoking_another_machine_changes_nothing() -> None:
    other = SoftPlatform("other").machine.serial
    platform = SoftPlatform()
    document = soft_tdx.collateral(NOW - timedelta(days=1), revoked=(other,))
    endorsements = Endorsements((Endorsement("tdx", soft_tdx.FMSPC, document),))
    assert verify(platform.evidence(), endorsements, SOFT_ROOTS, now=NOW).tee == "soft-tdx"


def test_a_revoked_platform_ca_is_refused() -> None:
    platform = SoftPlatform()
    document = soft_tdx.collateral(NOW - timedelta(days=1), revoke_ca=True)
    platform.endorsements = Endorsements((Endorsement("tdx", soft_tdx.FMSPC, document),))
    refused(platform, "tdx.4-chain.revoked")


def test_expired_collateral_cannot_hide_a_revocation() -> None:
    """Old collateral, from before the revocation, is refused by its age: it is no way around the CRL."""
    old = SoftPlatform(issued=NOW - timedelta(days=31))
    error = refused(old, "tdx.3-collateral.expired")
    assert error.reasons[0].hint == "fetch fresh collateral"


def test_the_window_of_collateral_has_exact_ends() -> None:
    issued = NOW - timedelta(days=1)
    for now, good in (
        (issued, True),
        (issued - timedelta(seconds=1), False),
        (issued + soft_tdx.LIFETIME - timedelta(seconds=1), True),
        (issued + soft_tdx.LIFETIME + timedelta(seconds=1), False),
    ):
        platform = SoftPlatform(issued=issued, now=now)
        if good:
            assert platform.claims().tcb_status == "UpToDate"
        else:
            refused(platform, "tdx.3-collateral")


def test_a_foreign_root_is_refused() -> None:
    error = refused(SoftPlatform(label="mallory"), "tdx.2-root")
    assert "vendor" in error.reasons[0].hint


def test_a_foreign_quote_under_our_collateral_is_refused() -> None:
    platform = SoftPlatform(label="mallory")
    platform.endorsements = SoftPlatform().endorsements
    refused(platform, "tdx.2-root")


def test_collateral_of_a_foreign_authority_is_refused() -> None:
    platform = SoftPlatform()
    platform.endorsements = SoftPlatform(label="mallory").endorsements
    error = refusal(platform.claims)
    assert error.code == "evidence-not-authentic"
    assert step(error) == "tdx.3-collateral"


def test_a_pinned_root_appended_to_a_foreign_chain_is_refused() -> None:
    """The hash of the last certificate is right, the chain does not lead to it."""
    mallory, good = SoftPlatform(label="mallory"), SoftPlatform()
    theirs, ours = (tdx_format.parse(each.evidence().quote) for each in (mallory, good))
    forged = _with_chain(mallory.evidence().quote, (*theirs.certificates[:2], ours.certificates[2]))
    error = refusal(verify, Evidence("tdx", forged), good.endorsements, SOFT_ROOTS, now=NOW)
    assert "tdx.4-chain.signature" in {reason.where for reason in error.reasons}
    assert step(error) == "tdx.4-chain"


def test_the_pck_of_another_machine_does_not_sign_for_this_one() -> None:
    a, b = SoftPlatform("a"), SoftPlatform("b")
    chain = tdx_format.parse(b.evidence().quote).certificates
    forged = _with_chain(a.evidence().quote, chain)
    error = refusal(verify, Evidence("tdx", forged), a.endorsements, SOFT_ROOTS, now=NOW)
    assert error.reasons[0].where == "tdx.5-qe"


def test_no_collateral_for_this_fmspc_is_refused() -> None:
    platform = SoftPlatform()
    platform.endorsements = Endorsements()
    error = refused(platform, "tdx.3-collateral")
    assert error.reasons[0].wanted == soft_tdx.FMSPC


def test_collateral_for_another_fmspc_is_refused() -> None:
    error = refused(SoftPlatform(endorsed_fmspc="00906EA10000"), "tdx.7-tcb")
    assert "Fmspc" in error.message


def test_an_exchanged_attestation_key_is_refused() -> None:
    refused(SoftPlatform(machine={"qe_report_data": bytes(64)}), "tdx.5-qe")


def test_a_debug_quoting_enclave_is_refused() -> None:
    refused(SoftPlatform(machine={"qe_debug": True}), "tdx.5-qe")


def test_an_old_quoting_enclave_is_refused() -> None:
    refused(SoftPlatform(machine={"qe_isvsvn": soft_tdx.QE_ISVSVN - 1}), "tdx.5-qe")


def test_a_machine_below_every_tcb_level_is_refused() -> None:
    refused(SoftPlatform(machine={"pce_svn": 1}), "tdx.7-tcb")


@pytest.mark.parametrize(
    "attributes",
    [
        0,
        soft_tdx.SEPT_VE_DISABLE | 1 << 29,
        soft_tdx.SEPT_VE_DISABLE | 1 << 4,
        soft_tdx.SEPT_VE_DISABLE | 1 << 1,
        soft_tdx.SEPT_VE_DISABLE | 1 << 40,
    ],
    ids=["no SEPT_VE_DISABLE", "migratable", "profiling", "reserved TUD bit", "reserved bit"],
)
def test_td_attributes_that_weaken_the_td_are_refused(attributes: int) -> None:
    platform = SoftPlatform()
    quote = soft_tdx.quote(platform.machine, mrtd=MEASUREMENT, report_data=bytes(64), td_attributes=attributes)
    error = refusal(verify, Evidence("tdx", quote), platform.endorsements, SOFT_ROOTS, now=NOW)
    assert error.reasons[0].where == "tdx.8-attributes"


def test_an_old_tdx_module_is_refused() -> None:
    platform = SoftPlatform()
    old = bytes([5 - 1, 1]) + bytes(14)
    quote = soft_tdx.quote(platform.machine, mrtd=MEASUREMENT, report_data=bytes(64), tee_tcb_svn=old)
    error = refusal(verify, Evidence("tdx", quote), platform.endorsements, SOFT_ROOTS, now=NOW)
    assert error.reasons[0].where == "tdx.7-tcb"


def test_another_program_has_another_mrtd() -> None:
    wanted = soft_policy(reference_values={"mrtd": frozenset({MEASUREMENT})})
    assert appraise(SoftPlatform().claims(), wanted) == ()
    (reason,) = appraise(SoftPlatform(measurement=b"\x07" * 48).claims(), wanted)
    assert (reason.where, reason.found) == ("place.enclave.mrtd", "07" * 48)


def test_tcb_date_is_the_earlier_of_platform_and_quoting_enclave() -> None:
    old = SoftPlatform(tcb_date=datetime(2025, 3, 12, tzinfo=UTC))
    assert old.claims().tcb_date == date(2025, 3, 12)
    (reason,) = appraise(old.claims(), soft_policy(min_tcb=(2026, 8)))
    assert (reason.where, reason.found) == ("place.enclave.min_tcb", "firmware of 2025-03")
    newer = SoftPlatform(tcb_date=datetime(2026, 12, 1, tzinfo=UTC))
    assert newer.claims().tcb_date == (NOW - timedelta(days=1)).date()


def test_every_status_but_revoked_is_a_claim_with_its_advisories() -> None:
    for status in set(STATUSES) - {"Revoked"}:
        claims = SoftPlatform(status=status).claims()
        assert claims.tcb_status == status
        assert bool(claims.advisories) == (status != "UpToDate")
        for advisory in claims.advisories:
            found = appraise(claims, soft_policy(deny_advisories=frozenset({advisory})))
            assert "place.enclave.deny_advisories" in [reason.where for reason in found]


# --- what would hold if dcap-qvl or our parser failed ------------------------------------------------------------------


def test_two_parsers_that_disagree_are_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our parser reads another MRTD and other report data than dcap-qvl: nothing of it becomes a claim."""
    real = tdx_format.parse
    for field in (tdx_format.FIELDS["mrtd"][0], tdx_format.FIELDS["tdattributes"][0] + 7, 520):

        def differs(data: bytes, field: int = field) -> tdx_format.Quote:
            quote = real(data)
            report = bytearray(quote.report)
            report[field] ^= 0x80
            return replace(quote, report=bytes(report))

        monkeypatch.setattr(tdx_format, "parse", differs)
        refused(SoftPlatform(), "tdx.9-agree", code="evidence-malformed")


def test_the_debug_bit_is_read_again_by_our_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dcap-qvl that let debug pass would still give claims that every policy refuses."""
    report = qvl.run(
        tdx_format.TDX,
        SoftPlatform().evidence().quote,
        tdx_format.parse(SoftPlatform().evidence().quote),
        dcap_collateral.parse(SoftPlatform().endorsements.items[0].data),
        (),
        NOW,
    )
    report["report"]["TD10"]["td_attributes"] = "0100001000000000"
    monkeypatch.setattr(qvl, "run", lambda *_: report)
    claims = SoftPlatform(debug=True).claims()
    assert claims.debug
    assert [reason.where for reason in appraise(claims, soft_policy())] == ["place.enclave.debug"]


def test_a_sentence_that_dcap_qvl_never_said_is_still_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        def __init__(self, root: bytes) -> None: ...

        def verify_with_policy(self, *_: object) -> object:
            raise ValueError("Verification failed: something new")

    monkeypatch.setattr(qvl, "QuoteVerifier", Odd)
    error = refused(SoftPlatform(), "tdx.dcap-qvl")
    assert error.reasons[0].found == "something new"


# --- events -----------------------------------------------------------------------------------------------------------


def test_a_log_that_was_changed_on_the_way_is_refused() -> None:
    platform = SoftPlatform().run(workload()).extend("cloister/note/1", b"x")
    good = platform.evidence()
    first, second = good.events
    for events in ((), (first,), (second, first), (first, second, second), (replace(first, data=b"y"), second)):
        error = refusal(verify, replace(good, events=events), platform.endorsements, SOFT_ROOTS, now=NOW)
        assert error.code == "evidence-not-authentic"
        assert error.reasons[0].where.startswith("tdx.10-events")


def test_claims_hold_the_log_only_after_it_was_proved() -> None:
    claims = SoftPlatform().run(workload()).claims()
    assert claims.events == SoftPlatform().run(workload()).evidence().events


# --- the boot log -----------------------------------------------------------------------------------------------------


def _ccel(*entries: tuple[int, int, bytes, bytes]) -> bytes:
    """Return a CC event log of (register, type, what was hashed, event data), SHA-384 alone."""
    first = b"Spec ID Event03\x00" + struct.pack("<IBBBBIHHB", 0, 0, 2, 0, 2, 1, 0x000C, 48, 0)
    log = struct.pack("<II20sI", 1, 3, bytes(20), len(first)) + first
    for register, kind, hashed, data in entries:
        digest = hashlib.sha384(hashed).digest()
        log += struct.pack("<III", register, kind, 1) + struct.pack("<H", 0x000C) + digest
        log += struct.pack("<I", len(data)) + data
    return log


_SEPARATOR = (0x00000004, bytes(4), bytes(4))
_BOOT = (
    (1, 0x00000001, b"firmware volume", b"not what was hashed"),
    (1, *_SEPARATOR),
    (2, 0x80000003, b"boot loader", b"not what was hashed"),
    (2, *_SEPARATOR),
    (3, 0x0000000D, b"linux /vmlinuz", b"grub_cmd: linux /vmlinuz\x00"),
    (3, *_SEPARATOR),
)


def _registers(entries: tuple[tuple[int, int, bytes, bytes], ...]) -> tuple[bytes, bytes, bytes]:
    values = [bytes(48)] * 3
    for register, _, hashed, _ in entries:
        values[register - 1] = hashlib.sha384(values[register - 1] + hashlib.sha384(hashed).digest()).digest()
    return values[0], values[1], values[2]


def _booted(log: bytes | None) -> Claims:
    platform = SoftPlatform()
    quote = soft_tdx.quote(platform.machine, mrtd=MEASUREMENT, report_data=bytes(64), boot=_registers(_BOOT))
    parts = {} if log is None else {"ccel": log}
    return verify(Evidence("tdx", quote, parts=parts), platform.endorsements, SOFT_ROOTS, now=NOW)


def test_a_boot_log_explains_its_registers_and_only_hashed_data_is_shown() -> None:
    claims = _booted(_ccel(*_BOOT))
    assert [event.register for event in claims.boot_log] == [0, 0, 1, 1, 2, 2]
    assert [event.data for event in claims.boot_log] == [
        None, bytes(4), None, bytes(4), b"linux /vmlinuz", bytes(4),
    ]  # fmt: skip
    assert claims.boot_log[0].digest == hashlib.sha384(b"firmware volume").digest()
    assert claims.boot_log[4].type == "EV_IPL"
    # the table is longer than the log, and so is the buffer that it is read from
    assert _booted(_ccel(*_BOOT) + b"\xff" * 64).boot_log == claims.boot_log


def test_without_a_boot_log_nothing_is_known_of_the_boot() -> None:
    assert _booted(None).boot_log == ()
    assert [each.where for each in appraise(_booted(None), soft_policy(require_attested_boot=True))] == [
        "place.enclave.boot_log"
    ]
    assert appraise(_booted(_ccel(*_BOOT)), soft_policy(require_attested_boot=True)) == ()


@pytest.mark.parametrize(
    ("entries", "registers"),
    [
        (_BOOT[1:], [0]),
        ((*_BOOT, _BOOT[3]), [1]),
        ((_BOOT[1], _BOOT[0], *_BOOT[2:]), [0]),
        ((*_BOOT[:4], (3, 0x0000000D, b"linux /evil", b"linux /evil"), _BOOT[5]), [2]),
        (_BOOT[:2], [1, 2]),
        (((2, *_BOOT[0][1:]), *_BOOT[1:]), [0, 1]),
        (((5, 0x00000004, b"x", b"x"),), [0, 1, 2]),
    ],
    ids=["missing", "twice", "reordered", "another kernel", "cut short", "moved", "another log"],
)
def test_a_boot_log_that_was_changed_is_refused(
    entries: tuple[tuple[int, int, bytes, bytes], ...], registers: list[int]
) -> None:
    error = refusal(_booted, _ccel(*entries))
    assert error.code == "evidence-not-authentic"
    assert [reason.where for reason in error.reasons] == [f"tdx.11-boot.rtmr{index}" for index in registers]


def test_changed_data_of_a_boot_event_is_not_shown() -> None:
    """Replay does not notice it; the reader must."""
    claims = _booted(_ccel(*_BOOT[:4], (3, 0x0000000D, b"linux /vmlinuz", b"grub_cmd: linux /evil"), _BOOT[5]))
    assert claims.boot_log[4].data is None


@pytest.mark.parametrize(
    "log",
    [b"", b"x", bytes(100), b"\xff" * 100, _ccel(*_BOOT)[:-1], _ccel(*_BOOT)[:40], _ccel(*_BOOT) + b"x"],
    ids=["empty", "a byte", "zeros", "padding", "cut", "cut in the first event", "a byte more"],
)
def test_a_boot_log_of_another_form_is_malformed(log: bytes) -> None:
    error = refusal(_booted, log)
    assert (error.code, step(error)) == ("evidence-malformed", "tdx.11-boot")


def test_a_boot_log_of_sha256_is_malformed() -> None:
    first = b"Spec ID Event03\x00" + struct.pack("<IBBBBIHHB", 0, 0, 2, 0, 2, 1, 0x000B, 32, 0)
    log = struct.pack("<II20sI", 1, 3, bytes(20), len(first)) + first
    log += struct.pack("<IIIH", 1, 4, 1, 0x000B) + bytes(32) + struct.pack("<I", 0)
    error = refusal(_booted, log)
    assert (error.code, error.reasons[0].where, error.reasons[0].wanted) == (
        "evidence-malformed", "tdx.11-boot", "sha384",
    )  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, len(_ccel(*_BOOT)) - 1), st.integers(1, 255)), min_size=1, max_size=6))
def test_mutated_boot_logs_raise_nothing_foreign(changes: list[tuple[int, int]]) -> None:
    changed = bytearray(_ccel(*_BOOT))
    for position, mask in changes:
        changed[position] ^= mask
    try:
        claims: Claims | None = _booted(bytes(changed))
    except EvidenceError as error:
        claims = None
        assert error.reasons  # noqa: PT017 - a refusal must always name its step
    if claims is not None:  # the digests and their order are those that were signed
        digests = [event.digest for event in claims.boot_log]
        assert digests == [event.digest for event in _booted(_ccel(*_BOOT)).boot_log]


def test_parts_that_nobody_reads_are_refused() -> None:
    platform = SoftPlatform()
    evidence = replace(platform.evidence(), parts={"pck": b"x"})
    error = refusal(verify, evidence, platform.endorsements, SOFT_ROOTS, now=NOW)
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", "tdx.1-format")


@pytest.mark.parametrize(
    ("name", "bit"), [("icssd", 16), ("lass", 27), ("pks", 30), ("kl", 31), ("tpa", 62), ("perfmon", 63)]
)
def test_switches_of_a_td_are_claims_that_a_contract_can_demand_off(name: str, bit: int) -> None:
    platform = SoftPlatform()
    attributes = soft_tdx.SEPT_VE_DISABLE | 1 << bit
    quote = soft_tdx.quote(platform.machine, mrtd=MEASUREMENT, report_data=bytes(64), td_attributes=attributes)
    claims = verify(Evidence("tdx", quote), platform.endorsements, SOFT_ROOTS, now=NOW)
    assert claims.attributes[name]
    policy = soft_policy(require={"tdx": {name: False}})
    assert [reason.where for reason in appraise(claims, policy)] == [f"place.enclave.require.{name}"]


# --- TD report 1.5 ----------------------------------------------------------------------------------------------------


def test_a_version_5_quote_gives_the_newer_fields() -> None:
    platform = SoftPlatform()
    quote = soft_tdx.quote(platform.machine, mrtd=MEASUREMENT, report_data=bytes(64), mrservicetd=bytes(48))
    claims = verify(Evidence("tdx", quote), platform.endorsements, SOFT_ROOTS, now=NOW)
    assert claims.measurements["mrservicetd"] == bytes(48)
    assert claims.measurements["teetcbsvn2"] == soft_tdx.TEE_TCB_SVN
    assert len(claims.measurements) == 16


def test_a_service_td_is_refused() -> None:
    """A service TD may migrate the guest to a machine that nobody attested."""
    platform = SoftPlatform()
    quote = soft_tdx.quote(platform.machine, mrtd=MEASUREMENT, report_data=bytes(64), mrservicetd=b"\x01" * 48)
    error = refusal(verify, Evidence("tdx", quote), platform.endorsements, SOFT_ROOTS, now=NOW)
    assert error.reasons[0].where == "tdx.8-attributes"


@pytest.mark.parametrize(("body", "size"), [(2, 648), (3, 584), (1, 384), (4, 648), (0, 0), (3, 0xFFFFFFFF)])
def test_a_version_5_body_of_another_type_or_size_is_malformed(body: int, size: int) -> None:
    quote = bytearray(
        soft_tdx.quote(soft_tdx.platform(), mrtd=MEASUREMENT, report_data=bytes(64), mrservicetd=bytes(48))
    )
    quote[48:54] = struct.pack("<HI", body, size)
    error = refusal(tdx_format.parse, bytes(quote))
    assert f"body type {body}" in error.reasons[0].found


def test_no_flipped_bit_of_a_version_5_quote_is_accepted() -> None:
    platform = SoftPlatform()
    good = soft_tdx.quote(platform.machine, mrtd=MEASUREMENT, report_data=bytes(64), mrservicetd=bytes(48))
    for position in range(0, 54 + 648, 3):
        changed = bytearray(good)
        changed[position] ^= 1 << position % 8
        refusal(verify, Evidence("tdx", bytes(changed)), platform.endorsements, SOFT_ROOTS, now=NOW)


# --- time and arguments -----------------------------------------------------------------------------------------------


def test_now_without_a_time_zone_is_a_callers_mistake() -> None:
    platform = SoftPlatform()
    with pytest.raises(ValueError, match="time zone"):
        verify(platform.evidence(), platform.endorsements, SOFT_ROOTS, now=NOW.replace(tzinfo=None))


def test_the_zone_of_now_does_not_matter() -> None:
    platform = SoftPlatform()
    tokyo = NOW.astimezone(timezone(timedelta(hours=9)))
    assert verify(platform.evidence(), platform.endorsements, SOFT_ROOTS, now=tokyo).tee == "soft-tdx"


def test_a_time_before_1970_is_refused_not_a_crash() -> None:
    platform = SoftPlatform()
    refusal(verify, platform.evidence(), platform.endorsements, SOFT_ROOTS, now=datetime(1969, 1, 1, tzinfo=UTC))


def test_an_unknown_kind_is_malformed() -> None:
    error = refusal(verify, Evidence("sgx-9", b"q"), Endorsements(), SOFT_ROOTS, now=NOW)
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", "evidence.kind")
    assert "tdx" in VERIFIERS


def test_later_endorsements_replace_earlier_ones() -> None:
    platform = SoftPlatform()
    old = SoftPlatform(issued=NOW - timedelta(days=40)).endorsements
    evidence = platform.evidence()
    assert verify(evidence, old | platform.endorsements, SOFT_ROOTS, now=NOW).tcb_status == "UpToDate"
    refusal(verify, evidence, platform.endorsements | old, SOFT_ROOTS, now=NOW)
    assert [item.kind for item in (old | soft_collateral(NOW)).items if item.subject == soft_tdx.FMSPC].count(
        "tdx"
    ) == 1


# --- bytes ------------------------------------------------------------------------------------------------------------


def _with_chain(quote: bytes, certificates: tuple[bytes, ...]) -> bytes:
    """Return `quote` with another certificate chain and right lengths."""
    import base64

    pem = b"".join(
        b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
        for der in certificates
    )
    at = quote.index(b"-----BEGIN")
    head = quote[632 + 4 : at - 4]  # signature .. certification data type
    inner_at = 64 + 64 + 6
    rest = head[: 64 + 64 + 2] + struct.pack("<I", len(head) - inner_at + 4 + len(pem)) + head[inner_at:]
    rest += struct.pack("<I", len(pem)) + pem
    return quote[:632] + struct.pack("<I", len(rest)) + rest


def test_the_chain_surgery_of_these_tests_is_faithful() -> None:
    quote = SoftPlatform().evidence().quote
    rebuilt = _with_chain(quote, tdx_format.parse(quote).certificates)
    assert tdx_format.parse(rebuilt) == tdx_format.parse(quote)


def test_no_flipped_bit_in_the_signed_region_is_accepted() -> None:
    """Every byte of header and TD report once, one bit each: 632 quotes."""
    platform = SoftPlatform().run(workload())
    good = platform.evidence()
    generator = random.Random(20261120)
    for position in range(632):
        changed = bytearray(good.quote)
        changed[position] ^= 1 << generator.randrange(8)
        error = refusal(
            verify,
            replace(good, quote=bytes(changed)),
            platform.endorsements,
            SOFT_ROOTS,
            now=NOW,
        )
        assert error.code in {"evidence-malformed", "evidence-not-authentic"}


def test_no_flipped_bit_in_keys_signatures_and_qe_report_is_accepted() -> None:
    platform = SoftPlatform()
    good = platform.evidence()
    pem = good.quote.index(b"-----BEGIN")
    generator = random.Random(7)
    for position in sorted(generator.sample(range(632, pem), 200)):
        changed = bytearray(good.quote)
        changed[position] ^= 1 << generator.randrange(8)
        refusal(
            verify,
            replace(good, quote=bytes(changed)),
            platform.endorsements,
            SOFT_ROOTS,
            now=NOW,
        )


def test_a_flipped_bit_in_the_chain_changes_no_claim() -> None:
    """White space in PEM is not signed, so a flip may pass; then every claim is the same."""
    platform = SoftPlatform()
    good = platform.evidence()
    wanted = platform.claims()
    pem = good.quote.index(b"-----BEGIN")
    generator = random.Random(8)
    for position in sorted(generator.sample(range(pem, len(good.quote)), 120)):
        changed = bytearray(good.quote)
        changed[position] ^= 1 << generator.randrange(8)
        evidence = replace(good, quote=bytes(changed))
        try:
            claims: Claims | None = verify(evidence, platform.endorsements, SOFT_ROOTS, now=NOW)
        except EvidenceError:
            claims = None
        assert claims is None or claims == wanted


@pytest.mark.parametrize("tail", [b"\x00", b"\x00" * 70, b"x", b"\n"])
def test_bytes_after_a_quote_are_refused(tail: bytes) -> None:
    platform = SoftPlatform()
    good = platform.evidence()
    error = refusal(verify, replace(good, quote=good.quote + tail), platform.endorsements, SOFT_ROOTS, now=NOW)
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", "tdx.1-format")


def test_the_attester_may_cut_zero_padding_and_nothing_else() -> None:
    quote = SoftPlatform().evidence().quote
    assert tdx_format.without_padding(quote) == quote
    assert tdx_format.without_padding(quote + bytes(70)) == quote
    assert refusal(tdx_format.without_padding, quote + b"\x00x").code == "evidence-malformed"
    assert refusal(tdx_format.without_padding, quote[:-1]).code == "evidence-malformed"


def test_every_truncation_is_malformed() -> None:
    quote = SoftPlatform().evidence().quote
    for size in (*range(1300), *range(1300, len(quote), 97)):
        assert refusal(tdx_format.parse, quote[:size]).code == "evidence-malformed"


@pytest.mark.parametrize(
    ("offset", "value", "found"),
    [
        (0, b"\x03\x00", "version 3"),
        (0, b"\x06\x00", "version 6"),
        (2, b"\x03\x00", "key type 3"),
        (4, b"\x00\x00\x00\x00", "TEE type 0x0"),
        (12, bytes(16), "QE vendor"),
        (632, b"\xff\xff\xff\xff", "bytes left"),
        (636 + 128, b"\x05\x00", "certification data type 5"),
        (636 + 130, b"\x01\x00\x00\x00", "bytes after certification data"),
        (636 + 134 + 384 + 64, b"\xff\xff", "bytes left"),
    ],
)
def test_a_quote_with_one_wrong_field_names_it(offset: int, value: bytes, found: str) -> None:
    quote = bytearray(SoftPlatform().evidence().quote)
    quote[offset : offset + len(value)] = value
    error = refusal(tdx_format.parse, bytes(quote))
    assert error.code == "evidence-malformed"
    assert found in error.reasons[0].found


def test_a_chain_of_two_or_four_certificates_is_malformed() -> None:
    quote = SoftPlatform().evidence().quote
    chain = tdx_format.parse(quote).certificates
    for other in (chain[:2], (*chain, chain[2]), ()):
        assert refusal(tdx_format.parse, _with_chain(quote + b"", other)).code == "evidence-malformed"
    assert refusal(tdx_format.parse, _with_chain(quote, (chain[0], chain[1], bytes(9000)))).code == (
        "evidence-malformed"
    )


def test_a_pck_certificate_without_fmspc_is_malformed() -> None:
    quote = SoftPlatform().evidence().quote
    chain = tdx_format.parse(quote).certificates
    platform = SoftPlatform()
    forged = _with_chain(quote, (chain[1], chain[1], chain[2]))
    error = refusal(verify, Evidence("tdx", forged), platform.endorsements, SOFT_ROOTS, now=NOW)
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", "tdx.4-chain.format")


@given(st.binary(max_size=2000))
def test_arbitrary_bytes_are_a_quote_or_malformed(data: bytes) -> None:
    assert value_or_malformed(lambda: tdx_format.parse(data)) is None


_QUOTE = SoftPlatform().evidence().quote


@given(st.lists(st.tuples(st.integers(0, len(_QUOTE) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=40))
def test_mutated_quotes_raise_nothing_foreign(changes: list[tuple[int, bytes]]) -> None:
    changed = bytearray(_QUOTE)
    for position, value in changes:
        changed[position : position + len(value)] = value
    platform = SoftPlatform()
    try:
        claims: Claims | None = verify(Evidence("tdx", bytes(changed)), platform.endorsements, SOFT_ROOTS, now=NOW)
    except EvidenceError as error:
        claims = None
        assert error.reasons  # noqa: PT017 - a refusal must always name its step
    assert claims is None or claims.measurements["mrtd"] == MEASUREMENT


# --- collateral -------------------------------------------------------------------------------------------------------

_COLLATERAL = json_decode(soft_tdx.collateral(NOW))


def _collateral(**change: Any) -> bytes:
    return json_encode({key: value for key, value in (_COLLATERAL | change).items() if value is not None})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        _collateral(tcb_info=None),
        _collateral(extra=""),
        _collateral(pck_crl=7),
        _collateral(pck_crl="zz"),
        _collateral(tcb_info=[]),
        b'{"tcb_info":"a","tcb_info":"b"}',
        b"[" * 100_000,
        b" " * (dcap_collateral.LIMIT + 1),
    ],
)
def test_collateral_with_one_fault_is_malformed(data: bytes) -> None:
    assert refusal(dcap_collateral.parse, data).code == "evidence-malformed"


@pytest.mark.parametrize(
    "info",
    [
        "",
        "[]",
        '{"id":"TDX","fmspc":"00906ED50000"}',
        json_encode(json_decode(_COLLATERAL["tcb_info"].encode()) | {"id": "XXX"}).decode(),
        json_encode(json_decode(_COLLATERAL["tcb_info"].encode()) | {"fmspc": "x"}).decode(),
        json_encode(json_decode(_COLLATERAL["tcb_info"].encode()) | {"issueDate": "yesterday"}).decode(),
        json_encode(json_decode(_COLLATERAL["tcb_info"].encode()) | {"nextUpdate": "2026-12-19T12:00:00"}).decode(),
        json_encode(json_decode(_COLLATERAL["tcb_info"].encode()) | {"tcbEvaluationDataNumber": True}).decode(),
    ],
)
def test_collateral_whose_tcb_info_has_another_form_is_malformed(info: str) -> None:
    assert refusal(dcap_collateral.parse, _collateral(tcb_info=info)).code == "evidence-malformed"


def test_collateral_cannot_bring_its_own_pck_chain() -> None:
    """dcap-qvl would prefer a chain in the collateral to the one in the quote, whose root we compared: it never sees it."""
    platform, other = SoftPlatform(), SoftPlatform("other")
    quote = platform.evidence().quote
    theirs = other.evidence().quote
    chains = {
        "another machine": theirs[theirs.index(b"-----BEGIN") :].rstrip(b"\x00").decode(),
        "its own": quote[quote.index(b"-----BEGIN") :].rstrip(b"\x00").decode(),
        "nothing": None,
        "no chain": "x",
    }
    platform.now = NOW + timedelta(hours=1)
    for chain in chains.values():
        data = json_encode(_COLLATERAL | {"pck_certificate_chain": chain})
        platform.endorsements = Endorsements((Endorsement("tdx", soft_tdx.FMSPC, data),))
        assert platform.claims().platform["ppid"] == platform.machine.ppid.hex()


@pytest.mark.parametrize(
    "field",
    sorted(_COLLATERAL),
)
def test_no_changed_collateral_field_is_accepted(field: str) -> None:
    """One character in the first quarter of each of the nine fields: in chains, that is the leaf certificate."""
    text = _COLLATERAL[field]
    middle = len(text) // 4
    changed = text[:middle] + ("0" if text[middle] != "0" else "1") + text[middle + 1 :]
    platform = SoftPlatform()
    wanted = platform.claims()
    platform.endorsements = Endorsements(
        (Endorsement("tdx", soft_tdx.FMSPC, json_encode({**_COLLATERAL, field: changed})),)
    )
    platform.now = NOW + timedelta(days=1)
    if field == "pck_crl_issuer_chain":  # dcap-qvl reads it for dates only; the CRL is checked under the PCK chain
        try:
            claims: Claims | None = platform.claims()
        except EvidenceError:
            claims = None
        assert claims is None or claims.measurements == wanted.measurements
    else:
        refusal(platform.claims)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_collateral_or_malformed(data: bytes) -> None:
    assert value_or_malformed(lambda: dcap_collateral.parse(data)) is None


@given(
    st.dictionaries(
        st.sampled_from(sorted(_COLLATERAL)),
        st.one_of(
            st.text(max_size=40), st.just(b"".hex()), st.sampled_from(["{}", "[]", "00", "-----BEGIN CERTIFICATE-----"])
        ),
        min_size=1,
    )
)
def test_odd_collateral_raises_nothing_foreign(change: dict[str, str]) -> None:
    platform = SoftPlatform()
    platform.endorsements = Endorsements((Endorsement("tdx", soft_tdx.FMSPC, json_encode({**_COLLATERAL, **change})),))
    platform.now = NOW + timedelta(days=1)
    error = refusal(platform.claims) if "pck_crl_issuer_chain" not in change else None
    assert error is None or error.code in {"evidence-malformed", "evidence-not-authentic"}
