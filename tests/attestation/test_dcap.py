"""What SGX and TDX share, attacked: collateral, signers, quoting enclaves, machines, and the agreement of two implementations."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from cloister.attestation.appraise import appraise
from cloister.attestation.dcap import collateral as dcap_collateral
from cloister.attestation.dcap import format as dcap_format
from cloister.attestation.dcap import own, pck, qvl
from cloister.attestation.dcap.format import Quote, Tee
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.files import Case
from cloister.attestation.files.dcap import observe
from cloister.attestation.sgx import format as sgx_format
from cloister.attestation.sgx.format import SGX
from cloister.attestation.soft import intel
from cloister.attestation.soft import sgx as soft_sgx
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.tdx import format as tdx_format
from cloister.attestation.tdx.format import TDX
from cloister.attestation.types import Claims, Evidence
from cloister.attestation.verify import verify
from cloister.crypto.canonical import json_decode, json_encode
from cloister.errors import EvidenceError
from cloister.testkit.softtee import NOW, SOFT_ROOTS, soft_policy
from tests.attestation.helpers import refusal, value_or_malformed

DAY = timedelta(days=1)


@dataclass(frozen=True)
class Side:
    """One TEE and how its soft evidence is made."""

    tee: Tee
    parse: Callable[[bytes], Quote]
    signed: int
    """Bytes before the length of the signature data."""

    def platform(self, name: str = "soft", **options: Any) -> intel.Platform:
        return intel.machine(self.tee.kind, name, **options)

    def quote(self, machine: intel.Platform, report_data: bytes = bytes(64), **options: Any) -> bytes:
        if self.tee is SGX:
            return soft_sgx.quote(machine, mrenclave=bytes(32), report_data=report_data, **options)
        return soft_tdx.quote(machine, mrtd=bytes(48), report_data=report_data, **options)

    def collateral(self, **options: Any) -> bytes:
        return intel.collateral(self.tee, options.pop("issued", NOW - DAY), **options)

    def verify(self, quote: bytes, document: bytes) -> Claims:
        endorsements = Endorsements((Endorsement(self.tee.kind, soft_tdx.FMSPC, document),))
        return verify(Evidence(self.tee.kind, quote), endorsements, SOFT_ROOTS, now=NOW)

    def refused(self, quote: bytes, document: bytes, where: str) -> EvidenceError:
        """Return the refusal, which must come from step and fault `where`."""
        error = refusal(self.verify, quote, document)
        assert error.code == "evidence-not-authentic", error
        assert error.reasons[0].where.startswith(self.tee.step(where)), error
        return error

    def dcap_qvl(self, quote: bytes, document: bytes) -> dict[str, Any]:
        """Return what dcap-qvl alone says."""
        return qvl.run(self.tee, quote, self.parse(quote), dcap_collateral.parse(document), (), NOW)


SIDES = (Side(SGX, sgx_format.parse, 432), Side(TDX, tdx_format.parse, 632))
both = pytest.mark.parametrize("side", SIDES, ids=["sgx", "tdx"])


def other(side: Side) -> Side:
    return SIDES[1 - SIDES.index(side)]


def wheres(error: EvidenceError) -> set[str]:
    return {reason.where for reason in error.reasons}


@both
def test_the_ground_of_these_tests_is_good(side: Side) -> None:
    claims = side.verify(side.quote(side.platform()), side.collateral())
    assert claims.tee == f"soft-{side.tee.kind}"
    assert appraise(claims, soft_policy()) == ()


# --- collateral of somebody else --------------------------------------------------------------------------------------


@both
def test_collateral_of_the_other_tee_is_refused(side: Side) -> None:
    """Genuine, current, of the same machine: TCB levels of SGX say nothing about the TDX module, and the other way round."""
    error = side.refused(side.quote(side.platform()), other(side).collateral(), "3-collateral.kind")
    assert wheres(error) == {side.tee.step("3-collateral.kind")}
    assert len(error.reasons) == 2


@both
@pytest.mark.parametrize("part", ["tcb_info", "qe_identity"])
def test_one_document_of_the_other_tee_is_refused(side: Side, part: str) -> None:
    """The QE identity swapped for the other quoting enclave's, with its own good signature."""
    mixed = json_decode(side.collateral())
    theirs = json_decode(other(side).collateral())
    for key in (part, f"{part}_signature", f"{part}_issuer_chain"):
        mixed[key] = theirs[key]
    side.refused(side.quote(side.platform()), json_encode(mixed), "3-collateral.kind")


@both
def test_a_document_relabelled_for_this_tee_is_refused(side: Side) -> None:
    forged = json_decode(other(side).collateral())
    for key, wanted in (("tcb_info", side.tee.tcb_info), ("qe_identity", side.tee.qe_identity)):
        forged[key] = json_encode(json_decode(forged[key].encode()) | {"id": wanted}).decode()
    error = refusal(side.verify, side.quote(side.platform()), json_encode(forged))
    assert side.tee.step("3-collateral.signature") in wheres(error)


@both
def test_signatures_of_documents_do_not_change_places(side: Side) -> None:
    swapped = json_decode(side.collateral())
    swapped["tcb_info_signature"], swapped["qe_identity_signature"] = (
        swapped["qe_identity_signature"],
        swapped["tcb_info_signature"],
    )
    side.refused(side.quote(side.platform()), json_encode(swapped), "3-collateral.signature")


@both
def test_collateral_rolled_back_is_refused_by_its_age_or_its_number(side: Side) -> None:
    """Inside its window, old collateral still verifies: the floor of the contract is what refuses it."""
    quote = side.quote(side.platform())
    side.refused(quote, side.collateral(issued=NOW - timedelta(days=31)), "3-collateral.expired")
    policy = soft_policy(min_svn={side.tee.kind: {"tcb_evaluation_data_number": 18}})
    assert appraise(side.verify(quote, side.collateral(evaluation=18)), policy) == ()
    rolled_back = side.verify(quote, side.collateral(evaluation=17))
    assert [each.where for each in appraise(rolled_back, policy)] == [
        "place.enclave.min_svn.tcb_evaluation_data_number"
    ]


@both
def test_the_lower_evaluation_number_of_two_documents_counts(side: Side) -> None:
    mixed, old = json_decode(side.collateral(evaluation=20)), json_decode(side.collateral(evaluation=3))
    for key in ("qe_identity", "qe_identity_signature"):
        mixed[key] = old[key]
    claims = side.verify(side.quote(side.platform()), json_encode(mixed))
    assert claims.svns["tcb_evaluation_data_number"] == 3


@both
def test_collateral_from_the_future_is_refused(side: Side) -> None:
    error = side.refused(side.quote(side.platform()), side.collateral(issued=NOW + DAY), "3-collateral.future")
    assert "in the future" in error.message
    assert len(error.reasons) == 4  # both documents and both lists, each by its name


@both
def test_crls_of_another_issuer_are_refused(side: Side) -> None:
    mixed, mallory = json_decode(side.collateral()), json_decode(side.collateral(label="mallory"))
    for key in ("pck_crl", "root_ca_crl"):
        forged = {**mixed, key: mallory[key]}
        error = refusal(side.verify, side.quote(side.platform()), json_encode(forged))
        assert error.code == "evidence-not-authentic"
        assert error.reasons[0].where.endswith(".revocation")


@both
def test_the_two_crls_do_not_stand_for_each_other(side: Side) -> None:
    mixed = json_decode(side.collateral())
    error = refusal(side.verify, side.quote(side.platform()), json_encode({**mixed, "pck_crl": mixed["root_ca_crl"]}))
    assert error.reasons[0].where.endswith(".revocation")


# --- who may sign collateral ------------------------------------------------------------------------------------------


@both
def test_a_stolen_pck_key_cannot_write_collateral(side: Side) -> None:
    """A PCK key read out of one machine (WireTap) signs TCB info in which a machine below every level is up to date.

    dcap-qvl takes any chain below the root for the signer's; our own check demands the root's own signer.
    """
    stolen, issuer = side.platform("victim"), intel.authority()
    machine = side.platform(pce_svn=0)
    level = intel.Level("UpToDate", 0, NOW.date())
    signer = (stolen.pck_key, (stolen.pck, issuer.ca, issuer.root))
    forged = side.collateral(tcb_levels=(level,), signer=signer)
    quote = side.quote(machine)
    assert side.dcap_qvl(quote, forged)["tcb"]["status"] == "UpToDate"
    error = side.refused(quote, forged, "3-collateral.signer")
    assert "PCK certificate" in error.reasons[0].found
    side.refused(quote, side.collateral(), "7-tcb")


@both
@pytest.mark.parametrize("who", ["ca", "root"])
def test_no_authority_signs_collateral_itself(side: Side, who: str) -> None:
    issuer = intel.authority()
    signer = {"ca": (issuer.ca_key, (issuer.ca, issuer.root)), "root": (issuer.root_key, (issuer.root,))}[who]
    error = refusal(side.verify, side.quote(side.platform()), side.collateral(signer=signer))
    assert error.code == "evidence-not-authentic"
    assert side.tee.step("3-collateral.signer") in wheres(error)


@both
def test_a_signer_of_another_root_is_refused(side: Side) -> None:
    mallory = intel.authority("mallory")
    for root in (mallory.root, intel.authority().root):
        forged = side.collateral(signer=(mallory.signer_key, (mallory.signer, root)))
        error = refusal(side.verify, side.quote(side.platform()), forged)
        assert error.code == "evidence-not-authentic"
        assert error.reasons[0].where.startswith(side.tee.step("3-collateral"))


@both
def test_collateral_of_another_pce_is_refused(side: Side) -> None:
    """dcap-qvl compares the FMSPC only; TCB levels are of one PCE."""
    quote = side.quote(side.platform(pce_id=b"\x01\x00"))
    assert side.dcap_qvl(quote, side.collateral())["tcb"]["status"] == "UpToDate"
    error = side.refused(quote, side.collateral(), "7-tcb.pceid")
    assert (error.reasons[0].found, error.reasons[0].wanted) == ("collateral for PCE 0000", "0100")


# --- machines and quoting enclaves of somebody else -------------------------------------------------------------------


@both
def test_a_cuckoo_is_genuine_and_not_on_the_list(side: Side) -> None:
    """Evidence of the attacker's own machine: authentic, and refused by the contract's list of machines."""
    mine = soft_policy(platform_allow=frozenset({("ppid", side.platform().ppid.hex())}))
    assert appraise(side.verify(side.quote(side.platform()), side.collateral()), mine) == ()
    cuckoo = side.verify(side.quote(side.platform("cuckoo")), side.collateral())
    assert [each.where for each in appraise(cuckoo, mine)] == ["place.enclave.platforms.allow"]
    banned = soft_policy(platform_deny=frozenset({("ppid", side.platform("cuckoo").ppid.hex())}))
    assert [each.where for each in appraise(cuckoo, banned)] == ["place.enclave.platforms.deny"]


@both
def test_the_attestation_key_of_another_machine_does_not_sign_for_this_one(side: Side) -> None:
    a, b = side.platform("a"), side.platform("b")
    forged = side.quote(replace(a, attestation_key=b.attestation_key))
    error = side.refused(forged, side.collateral(), "6-signature")
    assert wheres(error) == {side.tee.step("6-signature")}


@both
def test_the_qe_report_of_another_machine_does_not_vouch_for_this_key(side: Side) -> None:
    """Key of A, then QE report, signature and chain of B: everything is genuine, nothing belongs together."""
    a, b = side.platform("a"), side.platform("b")
    forged = side.quote(replace(a, tail=a.tail[:64] + b.tail[64:]))
    side.refused(forged, side.collateral(), "5-qe")


@both
def test_the_quoting_enclave_of_the_other_tee_is_refused(side: Side) -> None:
    """The SGX quoting enclave of the same machine, same keys, signs something that looks like a TD, or the other way."""
    machine, foreign = side.platform(), other(side).platform()
    inner = foreign.tail[64:]
    if side.tee is SGX:
        inner = inner[6:]
    else:
        inner = struct.pack("<HI", dcap_format.CERTIFICATION_QE_REPORT, len(inner)) + inner
    forged = side.quote(replace(machine, tail=foreign.tail[:64] + inner))
    error = side.refused(forged, side.collateral(), "5-qe")
    assert "ISVPRODID" in error.message


@both
@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"qe_report_data": bytes(64)}, "5-qe"),
        ({"qe_debug": True}, "5-qe"),
        ({"qe_isvsvn": intel.QE_ISVSVN - 1}, "5-qe"),
        ({"pce_svn": 1}, "7-tcb"),
        ({"label": "mallory"}, "2-root"),
        ({"status": "Revoked"}, "7-tcb"),
        ({"fmspc": "00906EA10000"}, "3-collateral"),
    ],
    ids=["exchanged key", "debug QE", "old QE", "below every level", "foreign root", "revoked level", "other family"],
)
def test_a_faulty_machine_is_refused(side: Side, options: dict[str, Any], where: str) -> None:
    side.refused(side.quote(side.platform(**options)), side.collateral(), where)


@both
def test_a_revoked_machine_or_ca_is_refused(side: Side) -> None:
    machine = side.platform()
    quote = side.quote(machine)
    error = side.refused(quote, side.collateral(revoked=(machine.serial,)), "4-chain.revoked")
    assert f"{machine.serial:x}" in error.reasons[0].found
    side.refused(quote, side.collateral(revoke_ca=True), "4-chain.revoked")
    assert side.verify(quote, side.collateral(revoked=(side.platform("other").serial,))).tee


@both
def test_one_evidence_under_the_kind_of_the_other_is_malformed(side: Side) -> None:
    quote = side.quote(side.platform())
    error = refusal(other(side).verify, quote, other(side).collateral())
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", other(side).tee.step("1-format"))


@both
def test_faults_are_reported_together(side: Side) -> None:
    machine = side.platform()
    document = side.collateral(issued=NOW - timedelta(days=31), revoked=(machine.serial,))
    found = wheres(refusal(side.verify, side.quote(replace(machine, attestation_key=machine.pck_key)), document))
    assert found == {side.tee.step(each) for each in ("3-collateral.expired", "6-signature")}
    # a list that is not current says nothing, neither good nor bad


# --- two implementations ----------------------------------------------------------------------------------------------


@both
def test_what_dcap_qvl_would_let_pass_our_own_check_refuses(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """dcap-qvl replaced by one that accepts everything: each fault of the signature path is refused all the same."""
    machine = side.platform()
    good, document = side.quote(machine), side.collateral()
    report = side.dcap_qvl(good, document)
    monkeypatch.setattr(qvl, "run", lambda *_: report)
    assert side.verify(good, document).tee
    flipped = bytearray(good)
    flipped[side.signed - 1] ^= 1
    faults = {
        "6-signature": bytes(flipped),
        "5-qe.key": side.quote(side.platform(qe_report_data=bytes(64))),
        "5-qe.signature": side.quote(replace(machine, tail=_flip(machine.tail, machine.tail.index(b"\x11\0\0\0")))),
    }
    if side.tee is SGX:
        faults.pop("5-qe.signature")
        faults["5-qe.signature"] = side.quote(replace(machine, tail=_flip(machine.tail, 64)))
    for where, quote in faults.items():
        side.refused(quote, document, where)
    for where, forged in {
        "4-chain.revoked": side.collateral(revoked=(machine.serial,)),
        "3-collateral.expired": side.collateral(issued=NOW - timedelta(days=31)),
        "3-collateral.future": side.collateral(issued=NOW + DAY),
        "3-collateral.kind": other(side).collateral(),
    }.items():
        side.refused(good, forged, where)


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@both
@pytest.mark.parametrize("fact", ["ppid", "fmspc", "pce_id", "cpu_svn", "pce_svn", "sgx_type", "smt_enabled"])
def test_a_pck_certificate_that_is_read_differently_is_refused(
    side: Side, fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, document = side.quote(side.platform()), side.collateral()
    report = side.dcap_qvl(good, document)
    value = report["platform"]["pck"][fact]
    report["platform"]["pck"][fact] = {list: [9, 9], int: 99, str: "False"}[type(value)]
    monkeypatch.setattr(qvl, "run", lambda *_: report)
    error = refusal(side.verify, good, document)
    assert (error.code, wheres(error)) == ("evidence-malformed", {side.tee.step("9-agree")})


@both
def test_every_field_of_the_report_is_compared(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    good, document = side.quote(side.platform()), side.collateral()
    fields = next(iter(side.dcap_qvl(good, document)["report"].values()))
    assert len(fields) >= 12
    for name, value in fields.items():
        report = side.dcap_qvl(good, document)
        next(iter(report["report"].values()))[name] = value + 1 if isinstance(value, int) else "ff" + value[2:]
        monkeypatch.setattr(qvl, "run", lambda *_, report=report: report)
        error = refusal(side.verify, good, document)
        monkeypatch.undo()
        assert error.reasons[0].where == side.tee.step("9-agree"), name


@both
def test_a_sentence_that_dcap_qvl_never_said_is_still_a_refusal(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        def __init__(self, root: bytes) -> None: ...

        def verify_with_policy(self, *_: object) -> object:
            raise ValueError("Verification failed: something new")

    monkeypatch.setattr(qvl, "QuoteVerifier", Odd)
    error = side.refused(side.quote(side.platform()), side.collateral(), "dcap-qvl")
    assert error.reasons[0].found == "something new"


# Sentences of dcap-qvl 0.7.0 that collateral or a quote of the right form can cause -> step. A new version that words one of
# them anew still refuses (step dcap-qvl); this table then says which row to change.
_SAID = {
    "CrlExpired { time: UnixTime(1), next_update: UnixTime(0) }": "3-collateral",
    "Failed to verify certificate chain: UnknownRevocationStatus": "4-chain",
    "Failed to verify certificate chain: CertRevoked": "4-chain",
    "Failed to parse PCK certificate": "4-chain",
    "TCBInfo expired": "3-collateral",
    "TCBInfo issue date is in the future": "3-collateral",
    "QE Identity expired": "3-collateral",
    "QE Identity issue date is in the future": "3-collateral",
    "Unsupported QE Identity id/version for the quote TEE type: QE version 2": "3-collateral",
    "SGX quote with non-SGX TCB info in the collateral": "3-collateral",
    "TDX quote with non-TDX TCB info in the collateral": "3-collateral",
    "Signature is invalid for tcb_info in quote_collateral": "3-collateral",
    "Signature is invalid for qe_identity in quote_collateral": "3-collateral",
    "Signature is invalid for qe_report in quote": "5-qe",
    "QE report hash mismatch": "5-qe",
    "QE report validation failed: Debug mode is enabled": "5-qe",
    "QE MRSIGNER mismatch: expected 00, got 01": "5-qe",
    "QE ISVPRODID mismatch: expected 1, got 2": "5-qe",
    "QE MISCSELECT mismatch: expected 0, got 1": "5-qe",
    "QE ATTRIBUTES mismatch at byte 0: expected 0, got 1": "5-qe",
    "QE ISVSVN 5 is below minimum required 6 from QE Identity": "5-qe",
    "No TCB levels found in QE Identity": "5-qe",
    "ISV enclave report signature is invalid": "6-signature",
    "Fmspc mismatch": "7-tcb",
    "No matching TCB level found": "7-tcb",
    "TCB status is invalid: Revoked": "7-tcb",
    "TDX module identity check: no identity": "7-tcb",
    "TDX module ISVSVN 4 is below minimum required 5 from TDX module TCB levels": "7-tcb",
    "Debug mode is enabled": "8-attributes",
    "SEPT_VE_DISABLE is not enabled": "8-attributes",
    "TD migration is enabled": "8-attributes",
    "TD profiling is enabled": "8-attributes",
    "SERVTD_EXT is enabled": "8-attributes",
    "Reserved bits in TD attributes are set": "8-attributes",
    "Invalid MR service TD": "8-attributes",
}


@pytest.mark.parametrize(("sentence", "step"), _SAID.items(), ids=list(_SAID))
def test_every_sentence_has_its_step(sentence: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Says:
        def __init__(self, root: bytes) -> None: ...

        def verify_with_policy(self, *_: object) -> object:
            raise ValueError(f"Verification failed: {sentence}")

    monkeypatch.setattr(qvl, "QuoteVerifier", Says)
    error = refusal(SIDES[1].verify, SIDES[1].quote(SIDES[1].platform()), SIDES[1].collateral())
    assert error.reasons[0].where == f"tdx.{step}"
    assert sentence in error.message


# --- form -------------------------------------------------------------------------------------------------------------


def _leaf(**options: Any) -> Any:
    machine = intel.machine("sgx", **options)
    (found,) = pck.load((machine.pck.public_bytes(Encoding.DER),), where="x")
    return found


def test_a_pck_certificate_is_read() -> None:
    found = pck.read(_leaf(name="read", status="OutOfDate"), where="x")
    assert (found.pcesvn, found.pceid, found.sgx_type) == (13, bytes(2), 1)
    assert found.fmspc.hex().upper() == intel.FMSPC
    assert found.cpusvn == intel.CPU_SVN
    assert dict(found.flags) == {"dynamic_platform": True, "cached_keys": True, "smt_enabled": True}


_EXTENSION = _leaf().extensions[pck.SGX_EXTENSION]


@given(st.lists(st.tuples(st.integers(0, len(_EXTENSION) - 1), st.binary(min_size=1, max_size=4)), max_size=8))
def test_a_mutated_sgx_extension_raises_nothing_foreign(changes: list[tuple[int, bytes]]) -> None:
    changed = bytearray(_EXTENSION)
    for position, value in changes:
        changed[position : position + len(value)] = value
    leaf = replace(_leaf(), extensions={pck.SGX_EXTENSION: bytes(changed)})
    found = value_or_malformed(lambda: pck.read.__wrapped__(leaf, where="x"))
    assert found is None or len(found.ppid) == 16


@given(st.binary(max_size=200))
def test_arbitrary_extensions_are_malformed(data: bytes) -> None:
    leaf = replace(_leaf(), extensions={pck.SGX_EXTENSION: data})
    assert value_or_malformed(lambda: pck.read.__wrapped__(leaf, where="x")) is None


def test_every_truncated_extension_is_malformed() -> None:
    for size in range(len(_EXTENSION)):
        leaf = replace(_leaf(), extensions={pck.SGX_EXTENSION: _EXTENSION[:size]})
        assert refusal(pck.read.__wrapped__, leaf, where="x").code == "evidence-malformed"


def test_a_member_twice_is_malformed() -> None:
    body = _EXTENSION[4:] if _EXTENSION[1] == 0x82 else _EXTENSION[3:]
    twice = body + body
    leaf = replace(_leaf(), extensions={pck.SGX_EXTENSION: b"\x30\x82" + len(twice).to_bytes(2, "big") + twice})
    assert refusal(pck.read.__wrapped__, leaf, where="x").code == "evidence-malformed"


@both
@pytest.mark.parametrize("size", [1, 100, 0x7FFFFFFF, 0xFFFFFFFF])
def test_lengths_that_do_not_fit_are_malformed_at_once(side: Side, size: int) -> None:
    good = side.quote(side.platform())
    inner = side.signed + 4 + 128 + (2 if side.tee is TDX else 384 + 64 + 2 + 32 + 2)
    for at in (side.signed, inner):
        changed = good[:at] + struct.pack("<I", size) + good[at + 4 :]
        assert refusal(side.parse, changed).code == "evidence-malformed"


@both
def test_a_quote_twice_is_malformed(side: Side) -> None:
    good = side.quote(side.platform())
    assert refusal(side.parse, good + good).code == "evidence-malformed"
    assert dcap_format.extent(good + good, side.tee, type(side.parse(good))) == len(good)


@both
def test_an_attestation_key_off_the_curve_is_refused(side: Side) -> None:
    machine = side.platform()
    quote = side.quote(replace(machine, tail=bytes(64) + machine.tail[64:]))
    error = refusal(side.verify, quote, side.collateral())
    assert side.tee.step("6-signature") in wheres(error)


@both
@pytest.mark.parametrize("signature", [bytes(64), b"\xff" * 64])
def test_signatures_of_no_number_are_refused(side: Side, signature: bytes) -> None:
    good = side.quote(side.platform())
    changed = good[: side.signed + 4] + signature + good[side.signed + 68 :]
    side.refused(changed, side.collateral(), "6-signature")


def test_collateral_may_be_of_either_tee_and_says_so() -> None:
    for side in SIDES:
        found = dcap_collateral.parse(side.collateral())
        assert (found.kind, found.fmspc, found.pceid) == (side.tee.kind, intel.FMSPC, "0000")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda each: st.lists(each)))
def test_odd_json_in_documents_is_malformed(value: Any) -> None:
    document = json_decode(SIDES[0].collateral())
    for key in ("tcb_info", "qe_identity"):
        changed = json.dumps({**document, key: json.dumps(value)}).encode()
        assert value_or_malformed(partial(dcap_collateral.parse, changed)) is None


@pytest.mark.parametrize("version", [2, 0x41])
def test_a_revocation_list_of_no_version_is_malformed(version: int) -> None:
    document = json_decode(SIDES[0].collateral())
    der = bytearray.fromhex(document["pck_crl"])
    der[der.index(b"\x02\x01\x01") + 2] = version
    assert refusal(dcap_collateral.parse, json_encode({**document, "pck_crl": der.hex()})).code == "evidence-malformed"


def test_a_chain_of_white_space_costs_no_time() -> None:
    """One pattern over 128 kB: what backtracks here would take minutes."""
    document = json_decode(SIDES[0].collateral())
    begin = "-----BEGIN CERTIFICATE-----"
    for chain in (begin + " " * 130_000, begin * 4_000, (begin + "\n" * 20) * 2_500):
        data = json_encode({**document, "tcb_info_issuer_chain": chain})
        assert refusal(dcap_collateral.parse, data).code == "evidence-malformed"


# --- files ------------------------------------------------------------------------------------------------------------


@both
def test_files_are_judged_by_the_same_verifier(side: Side) -> None:
    files = {"quote": side.quote(side.platform()) + bytes(70), "collateral": side.collateral()}
    observed = observe(Case("dcap", files, NOW, roots=SOFT_ROOTS))
    assert observed.facts["authentic"] is True
    assert observed.facts["tcb"] == "UpToDate"
    assert {step.state for step in observed.steps} == {"passed"}
    assert "70 bytes after it" in observed.fields["quote"]
    assert observed.claims == side.verify(files["quote"][:-70], files["collateral"])
    # the test root counts only when the caller says so
    real = observe(Case("dcap", files, NOW))
    assert (real.facts["authentic"], real.facts["signature"]) == (False, False)


@both
@pytest.mark.parametrize("data", [b"", b"x", b"\x03\x00", bytes(5000), b"\xff" * 5000])
def test_files_of_no_quote_are_observed_as_refused(side: Side, data: bytes) -> None:
    observed = observe(Case("dcap", {"quote": data, "collateral": side.collateral()}, NOW))
    assert observed.facts["authentic"] is False
    assert observed.error is not None
    assert observed.error.code == "evidence-malformed"


@both
@given(flips=st.lists(st.integers(0, 5000), min_size=1, max_size=4))
def test_observing_mutated_files_raises_nothing(side: Side, flips: list[int]) -> None:
    files = {"quote": side.quote(side.platform()), "collateral": side.collateral()}
    for flip in flips:
        name = "quote" if flip % 2 else "collateral"
        at = flip % len(files[name])
        files[name] = _flip(files[name], at)
    observed = observe(Case("dcap", files, NOW, roots=SOFT_ROOTS))
    assert observed.facts["authentic"] in (True, False)
    assert (observed.error is None) == observed.facts["authentic"]


def test_the_own_check_says_nothing_of_revocation_without_collateral() -> None:
    side = SIDES[0]
    quote = side.parse(side.quote(side.platform()))
    chain = pck.load(quote.certificates, where="x")
    assert own.signatures(side.tee, quote, chain, now=NOW) == ()
    late = NOW.replace(year=2060)
    assert {reason.where for reason in own.signatures(side.tee, quote, chain, now=late)} == {"sgx.4-chain.expired"}


@pytest.mark.parametrize(("sgx_type", "bound"), [(0, True), (1, False), (2, True)])
def test_a_policy_can_demand_bound_memory(sgx_type: int, bound: bool) -> None:
    machine = pck.Pck(bytes(16), bytes(16), 11, bytes(2), bytes(6), sgx_type, None, (("smt_enabled", True),))
    assert machine.attributes() == {"smt_enabled": True, "memory_integrity": bound}
