"""Nitro evidence: every way to be wrong, one fault each, on soft documents; and the real documents with their verdicts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attestation import cose
from cloister.attestation import events as event_log
from cloister.attestation.appraise import appraise
from cloister.attestation.binding import Binding, check_binding
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.files import Case
from cloister.attestation.files.nitro import observe
from cloister.attestation.nitro import format as nitro_format
from cloister.attestation.nitro.roots import AWS_NITRO_ROOT_G1
from cloister.attestation.nitro.verify import STEPS
from cloister.attestation.nitro.verify import verify as verify_nitro
from cloister.attestation.roots import Roots
from cloister.attestation.soft import nitro as soft
from cloister.attestation.types import NOT_RATED, Claims, Event, Evidence, Policy
from cloister.attestation.verify import VERIFIERS, verify
from cloister.errors import EvidenceError
from tests.attestation.helpers import SHARED, refusal, value_or_malformed

ISSUED = datetime(2026, 11, 20, 12, tzinfo=UTC)
NOW = ISSUED + timedelta(minutes=20)
PCR0 = hashlib.sha384(b"image").digest()
BINDING = Binding(purpose="release", nonce=b"\x05" * 32, key=b"key")
SOFT = Roots(soft=True)
ENCLAVE = soft.enclave(issued=ISSUED)
WORKLOAD = event_log.Workload("sha256:" + "ab" * 32, "offline", b"\x09" * 32, "L2")


def document(enclave: soft.Enclave = ENCLAVE, **rest: Any) -> bytes:
    options: dict[str, Any] = {"pcr0": PCR0, "made": NOW, "user_data": BINDING.report_data()} | rest
    return soft.document(enclave, **options)


def claims(
    data: bytes | None = None,
    *,
    events: tuple[Event, ...] = (),
    endorsements: Endorsements | None = None,
    now: datetime = NOW,
    roots: Roots = SOFT,
) -> Claims:
    evidence = Evidence("nitro", document() if data is None else data, events)
    return verify(evidence, Endorsements() if endorsements is None else endorsements, roots, now=now)


def refused(
    where: str, data: bytes | None = None, *, code: str = "evidence-not-authentic", **rest: Any
) -> EvidenceError:
    error = refusal(claims, data, **rest)
    assert (error.code, error.reasons[0].where) == (code, where), (error, error.reasons)
    assert any(error.reasons[0].where.startswith(step) for step in STEPS)
    return error


def malformed(data: bytes) -> EvidenceError:
    return refused("nitro.1-format", data, code="evidence-malformed")


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_a_good_document_gives_all_claims() -> None:
    log = (event_log.event(event_log.WORKLOAD, WORKLOAD.encode()),)
    found = claims(document(runtime=event_log.replay(log)), events=log)
    assert (found.kind, found.tee, found.soft, found.debug) == ("tee", "soft-nitro", True, False)
    assert (found.tcb_status, found.tcb_date, found.advisories) == (NOT_RATED, None, ())
    assert found.report_data == BINDING.report_data()
    assert check_binding(found, BINDING) == ()
    assert (found.launch, found.measurements["pcr0"], found.log_in) == ("pcr0", PCR0, "register")
    assert set(found.measurements) == {f"pcr{index}" for index in range(17)}
    assert event_log.workload_of(found) == WORKLOAD
    assert found.platform == {"module_id": ENCLAVE.module_id, "instance_id": ENCLAVE.module_id.split("-enc")[0]}
    assert found.valid_until == ISSUED + soft.LEAF_LIFETIME
    assert len(found.chain) == 5
    assert ENCLAVE.module_id in found.chain[0]


def test_the_kind_is_found_by_its_folder() -> None:
    assert VERIFIERS["nitro"] is verify_nitro


def test_tagged_and_untagged_are_the_same_document() -> None:
    assert claims(document(tagged=True)) == claims(document(tagged=False))


def test_optional_members_may_be_absent_or_null() -> None:
    for name in ("public_key", "nonce"):
        assert claims(document(changes={name: ...})) == claims()
    assert claims(document(user_data=None)).report_data == b""
    assert claims(document(changes={"user_data": ...})).report_data == b""


def test_a_policy_judges_it_like_every_tee() -> None:
    policy = Policy(
        where="place.enclave",
        kind="tee",
        accept=frozenset({"simulated"}),
        reference_values={"pcr0": frozenset({PCR0})},
    )
    assert appraise(claims(), policy) == ()
    (reason,) = appraise(claims(document(pcr0=bytes(47) + b"\x01")), policy)
    assert reason.where == "place.enclave.pcr0"
    (reason,) = appraise(claims(), replace(policy, accept=frozenset({"nitro"})))
    assert (reason.where, reason.found) == ("place.enclave.accept", "soft-nitro")


# --- report data: replay, relay, other fields -------------------------------------------------------------------------


def test_replay_of_a_document_for_another_nonce_is_not_bound() -> None:
    (reason,) = check_binding(claims(), replace(BINDING, nonce=b"\x06" * 32))
    assert reason.where == "binding.report_data"


def test_relay_of_a_document_for_another_key_is_not_bound() -> None:
    assert check_binding(claims(), replace(BINDING, key=b"mallory"))


@pytest.mark.parametrize(
    "fields",
    [
        {"user_data": None, "nonce": BINDING.report_data()},
        {"user_data": None, "public_key": BINDING.report_data()},
        {"user_data": BINDING.report_data()[:-1]},
        {"user_data": BINDING.report_data() + b"\x00"},
        {"user_data": BINDING.qualifying_data()},
        {"user_data": b""},
        {"user_data": None},
    ],
    ids=["nonce", "public key", "short", "long", "32 bytes", "empty", "null"],
)
def test_only_user_data_of_64_bytes_is_report_data(fields: dict[str, Any]) -> None:
    found = claims(document(**fields))
    assert found.report_data == b""
    assert check_binding(found, BINDING)


# --- debug ------------------------------------------------------------------------------------------------------------


def test_a_debug_enclave_is_authentic_and_no_policy_takes_it() -> None:
    found = claims(document(debug=True))
    assert found.debug
    assert found.measurements["pcr0"] == bytes(48)
    policy = Policy(where="place.enclave", kind="tee", accept=frozenset({"simulated"}))
    assert [reason.where for reason in appraise(found, policy)] == ["place.enclave.debug"]


def test_one_bit_of_pcr0_is_enough_to_not_be_debug() -> None:
    assert not claims(document(pcr0=bytes(47) + b"\x01")).debug
    assert claims(document(pcr0=bytes(48))).debug


# --- root and chain ---------------------------------------------------------------------------------------------------


def test_the_soft_root_counts_only_when_it_is_named() -> None:
    error = refused("nitro.2-root", roots=Roots())
    assert error.reasons[0].found == "the published test root"
    assert error.reasons[0].wanted == AWS_NITRO_ROOT_G1


def test_a_foreign_root_is_refused() -> None:
    foreign = soft.enclave(issued=ISSUED, label="mallory")
    error = refused("nitro.2-root", document(foreign))
    assert "vendor" in error.reasons[0].hint


def test_a_relying_party_may_pin_the_root_of_another_partition() -> None:
    foreign = soft.enclave(issued=ISSUED, label="another partition")
    root = hashlib.sha256(foreign.bundle[0]).hexdigest()
    assert claims(document(foreign), roots=Roots(also={"nitro": frozenset({root})})).tee == "nitro"
    refused("nitro.2-root", document(foreign), roots=Roots(also={"tdx": frozenset({root})}))


def test_a_pinned_root_before_a_foreign_chain_is_refused() -> None:
    """The hash of the first certificate is right, the chain does not lead to it."""
    foreign = soft.enclave(issued=ISSUED, label="mallory")
    error = refused("nitro.3-chain.signature", document(foreign, bundle=(ENCLAVE.bundle[0], *foreign.bundle[1:])))
    assert len(error.reasons) == 1


def test_the_bundle_is_root_first() -> None:
    refused("nitro.2-root", document(bundle=ENCLAVE.bundle[::-1]))
    root, region, zone, instance = ENCLAVE.bundle
    assert refusal(claims, document(bundle=(root, zone, region, instance))).reasons[0].where == "nitro.3-chain.issuer"
    assert refusal(claims, document(bundle=(root, region, zone))).reasons[0].where == "nitro.3-chain.issuer"
    assert refusal(claims, document(bundle=(root,))).reasons[0].where == "nitro.3-chain.issuer"
    malformed(document(bundle=(root, root, region, zone, instance)))


def test_the_leaf_has_exact_ends() -> None:
    end = ISSUED + soft.LEAF_LIFETIME
    for now, made, where in (
        (ISSUED, ISSUED, None),
        (end, end, None),
        (end + timedelta(seconds=1), end, "nitro.3-chain.expired"),
        (ISSUED - timedelta(seconds=1), ISSUED, "nitro.3-chain.future"),
    ):
        if where is None:
            assert claims(document(made=made), now=now).tee == "soft-nitro"
        else:
            refused(where, document(made=made), now=now)


def test_an_expired_authority_is_refused_even_under_a_long_leaf() -> None:
    forever = soft.enclave("forever", issued=ISSUED, lifetime=timedelta(days=365))
    later = ISSUED + timedelta(days=6)
    error = refused("nitro.3-chain.expired", document(forever, made=later), now=later)
    assert len(error.reasons) == 2  # instance and zone


def test_an_authority_does_not_sign_documents() -> None:
    refused("nitro.3-chain.authority", document(soft.enclave("ca", issued=ISSUED, leaf_is_authority=True)))


def test_a_leaf_does_not_issue_leaves() -> None:
    """An enclave's own certificate, put into the bundle as an authority."""
    root, *rest = ENCLAVE.bundle
    error = refusal(claims, document(bundle=(root, *rest, ENCLAVE.certificate)))
    assert "nitro.3-chain.authority" in {reason.where for reason in error.reasons}


def test_certificates_that_do_not_parse_are_malformed() -> None:
    for data in (document(certificate=b"\x30\x00"), document(bundle=(*ENCLAVE.bundle[:-1], b"\x00"))):
        refused("nitro.3-chain.format", data, code="evidence-malformed")


# --- revocation: AWS has no lists, a relying party may ----------------------------------------------------------------


def test_a_revoked_leaf_and_a_revoked_instance_are_refused() -> None:
    good = soft.endorsements(ISSUED, revoked=(ENCLAVE.serial + 2,))
    assert claims(endorsements=good) == claims()
    error = refused("nitro.3-chain.revoked", endorsements=soft.endorsements(ISSUED, revoked=(ENCLAVE.serial,)))
    assert f"{ENCLAVE.serial:x}" in error.reasons[0].found
    refused("nitro.3-chain.revoked", endorsements=soft.endorsements(ISSUED, revoked_instances=(4,)))


def test_stale_lists_cannot_hide_a_revocation() -> None:
    for issued in (ISSUED - timedelta(days=31), ISSUED + timedelta(days=1)):
        refused("nitro.3-chain.revocation", endorsements=soft.endorsements(issued))


def test_a_list_that_its_issuer_did_not_sign_is_refused() -> None:
    refused("nitro.3-chain.revocation", endorsements=soft.endorsements(ISSUED, label="mallory"))
    broken = Endorsements((Endorsement("nitro", "crl/x", b"\x30\x00"),))
    refused("nitro.3-chain.format", endorsements=broken, code="evidence-malformed")


# --- signature and time -----------------------------------------------------------------------------------------------


def test_another_enclave_cannot_sign_for_this_one() -> None:
    other = soft.enclave("other", issued=ISSUED)
    refused("nitro.4-signature", document(other, certificate=ENCLAVE.certificate))


def test_a_leaf_on_another_curve_is_refused() -> None:
    leaf = soft.enclave("p256", issued=ISSUED, curve=ec.SECP256R1())
    refused("nitro.4-signature", document(leaf))


@pytest.mark.parametrize("algorithm", [-7, -36])
def test_another_algorithm_is_refused(algorithm: int) -> None:
    curve = {-7: ec.SECP256R1(), -36: ec.SECP521R1()}[algorithm]
    malformed(document(soft.enclave("other", issued=ISSUED, curve=curve), algorithm=algorithm))


def test_a_document_from_the_future_is_refused() -> None:
    assert claims(document(made=NOW + timedelta(seconds=30))).tee == "soft-nitro"
    refused("nitro.5-time.future", document(made=NOW + timedelta(seconds=31)))


def test_a_document_from_before_or_after_its_leaf_is_refused() -> None:
    refused("nitro.5-time.leaf", document(made=ISSUED - timedelta(seconds=1)))
    refused("nitro.5-time.leaf", document(made=ISSUED + soft.LEAF_LIFETIME + timedelta(seconds=1)))


def test_the_time_zone_of_now_does_not_matter() -> None:
    assert claims(now=NOW.astimezone(timezone(timedelta(hours=9)))) == claims()


# --- events -----------------------------------------------------------------------------------------------------------


def test_a_log_needs_pcr_16_in_the_document() -> None:
    """The trap of an attester that extends PCR 16 and forgets to lock it: the register is not signed."""
    log = (event_log.event(event_log.WORKLOAD, WORKLOAD.encode()),)
    error = refused("nitro.6-events.register", document(), events=log)
    assert "lock" in error.reasons[0].hint
    assert claims(document(runtime=bytes(48))) != claims()
    assert claims(document(runtime=bytes(48))).events == ()


def test_a_log_that_hides_or_adds_an_event_is_refused() -> None:
    log = tuple(event_log.event("cloister/config/1", bytes([index])) for index in range(2))
    data = document(runtime=event_log.replay(log))
    assert claims(data, events=log).events == log
    for forged in ((), log[:1], log[::-1], (*log, log[0])):
        refused("nitro.6-events.replay", data, events=forged)
    changed = replace(log[0], data=b"other")
    refused("nitro.6-events.0.data", data, events=(changed, log[1]))
    refused("nitro.6-events.0.register", data, events=(replace(log[0], register=4), log[1]))


def test_events_fit_what_the_nsm_does() -> None:
    """ExtendPCR: value' = SHA-384(value || data), here with the event's digest as data."""
    entry = event_log.event("cloister/config/1", b"data")
    register = hashlib.sha384(bytes(48) + hashlib.sha384(b"data").digest()).digest()
    assert claims(document(runtime=register), events=(entry,)).events == (entry,)


# --- form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"module_id": ...},
        {"pcrs": ...},
        {"cabundle": ...},
        {"extra": 1},
        {"module_id": ""},
        {"module_id": "x" * 129},
        {"module_id": "i-\n"},
        {"module_id": "i-\u00e9"},
        {"module_id": b"i-0"},
        {"digest": "SHA256"},
        {"digest": None},
        {"timestamp": 0},
        {"timestamp": -1},
        {"timestamp": 2**63},
        {"timestamp": True},
        {"timestamp": "1"},
        {"pcrs": {}},
        {"pcrs": []},
        {"pcrs": {1: bytes(48)}},
        {"pcrs": {0: bytes(32)}},
        {"pcrs": {0: bytes(64)}},
        {"pcrs": {0: "0" * 48}},
        {"pcrs": {0: bytes(48), 32: bytes(48)}},
        {"pcrs": {0: bytes(48), -1: bytes(48)}},
        {"pcrs": {0: bytes(48), "1": bytes(48)}},
        {"certificate": b""},
        {"certificate": bytes(1025)},
        {"certificate": None},
        {"cabundle": []},
        {"cabundle": [b"\x30"] * 8},
        {"cabundle": b"\x30"},
        {"cabundle": [""]},
        {"cabundle": [bytes(1025)]},
        {"public_key": b""},
        {"public_key": bytes(1025)},
        {"user_data": bytes(1025)},
        {"user_data": "text"},
        {"nonce": bytes(1025)},
        {"nonce": 7},
    ],
    ids=str,
)
def test_one_fault_of_form_each(changes: dict[str, Any]) -> None:
    malformed(document(changes=changes))


def test_an_unprotected_header_is_refused() -> None:
    malformed(document(unprotected={4: b"kid"}))


def test_parts_and_trailing_bytes_are_refused() -> None:
    evidence = Evidence("nitro", document(), parts={"chain": b"x"})
    error = refusal(verify, evidence, Endorsements(), SOFT, now=NOW)
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", "nitro.1-format")
    malformed(document() + b"\x00")
    malformed(document() + document())
    malformed(b"")


def test_a_document_larger_than_the_limit_is_refused_unread() -> None:
    error = malformed(bytes(nitro_format.LIMIT + 1))
    assert error.reasons[0].found == f"{nitro_format.LIMIT + 1} bytes"


def test_mistakes_of_a_caller() -> None:
    with pytest.raises(ValueError, match="time zone"):
        claims(now=datetime(2026, 11, 20))  # noqa: DTZ001 - that is the mistake
    with pytest.raises(ValueError, match="kind"):
        verify_nitro(Evidence("tdx", b""), Endorsements(), SOFT, now=NOW)


def test_no_flipped_byte_is_accepted() -> None:
    """Every byte of an untagged document is signed, or says where the signed bytes are; every fifth is tried."""
    good = document()
    for position in range(0, len(good), 5):
        changed = bytearray(good)
        changed[position] ^= 1 << position % 8
        refusal(claims, bytes(changed))


def test_no_truncation_is_accepted() -> None:
    good = document()
    for size in range(0, len(good), 3):
        malformed(good[:size])


@settings(max_examples=150)
@given(st.data())
def test_no_splice_gives_another_exception(data: st.DataObject) -> None:
    good = document()
    start, end = sorted((data.draw(st.integers(0, len(good))), data.draw(st.integers(0, len(good)))))
    changed = good[:start] + data.draw(st.binary(max_size=12)) + good[end:]
    parsed = value_or_malformed(lambda: nitro_format.parse(changed))
    if parsed is not None and changed != good:
        refusal(claims, changed)


@settings(max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(sorted(nitro_format.MANDATORY | nitro_format.OPTIONAL)),
        st.binary() | st.integers(-(2**64), 2**64 - 1),
    )
)
def test_no_value_of_another_type_gives_another_exception(changes: dict[str, Any]) -> None:
    data = document(changes=changes)
    value_or_malformed(lambda: nitro_format.parse(data))
    with contextlib.suppress(EvidenceError):
        claims(data)


def test_a_second_reader_sees_the_same_document() -> None:
    data = document(nonce=b"n", public_key=b"k")
    ours = nitro_format.parse(data)
    theirs = cbor2.loads(cbor2.loads(data)[2])
    assert ours.pcrs == theirs["pcrs"]
    assert (ours.module_id, ours.timestamp, ours.nonce, ours.public_key, ours.user_data) == tuple(
        theirs[name] for name in ("module_id", "timestamp", "nonce", "public_key", "user_data")
    )
    assert list(ours.cabundle) == theirs["cabundle"]


# --- files, and the real documents ------------------------------------------------------------------------------------


def test_a_case_says_what_came_out() -> None:
    found = observe(Case("nitro", {"doc": document()}, NOW, roots=SOFT))
    assert found.facts == {"authentic": True, "debug": False}
    assert [step.state for step in found.steps] == ["passed"] * 6 + ["not done"]
    assert found.claims is not None
    assert found.fields["pcr0"] == PCR0.hex()
    late = observe(Case("nitro", {"doc": document()}, NOW + timedelta(hours=4), roots=SOFT))
    assert late.facts == {"authentic": False, "debug": False}
    assert [step.state for step in late.steps][:4] == ["passed", "passed", "failed", "not reached"]
    for files in ({"doc": b"\x00"}, {}, {"document": document()}):
        broken = observe(Case("nitro", files, NOW, roots=SOFT))
        assert broken.facts == {"authentic": False}
        assert broken.error is not None
        assert broken.error.code == "evidence-malformed"


def test_a_case_with_a_nonce_is_judged_by_it() -> None:
    for nonce, data, good in (
        (b"asked", document(nonce=b"asked"), True),
        (BINDING.report_data(), document(), True),
        (b"asked", document(), False),
        (b"", document(nonce=None, user_data=None), True),
    ):
        found = observe(Case("nitro", {"doc": data}, NOW, nonce=nonce, roots=SOFT))
        assert found.facts["authentic"] is good
        assert found.steps[-1].state == ("passed" if good else "failed")


def test_a_case_takes_revocation_lists_as_collateral() -> None:
    lists = soft.endorsements(ISSUED, revoked=(ENCLAVE.serial,))
    collateral = {f"{each.subject[4:]}.crl": each.data for each in lists.items}
    found = observe(Case("nitro", {"doc": document()}, NOW, roots=SOFT, collateral=collateral))
    assert found.error is not None
    assert found.error.reasons[0].where == "nitro.3-chain.revoked"


FOLDER = SHARED / "vectors" / "attestation"
MANIFEST = FOLDER / "manifest.json"
ENTRIES: list[dict[str, Any]] = (
    [entry for entry in json.loads(MANIFEST.read_text()) if entry["kind"] == "nitro"] if MANIFEST.exists() else []
)
real = pytest.mark.skipif(not ENTRIES, reason="third-party vectors are not beside the repository")


def case_of(entry: dict[str, Any]) -> Case:
    files = {role: (FOLDER / path).read_bytes() for role, path in entry["files"].items()}
    return Case("nitro", files, datetime.fromisoformat(entry["at"]), entry["name"])


@real
@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["name"] for entry in ENTRIES])
def test_the_expected_outcome_of_every_real_document(entry: dict[str, Any]) -> None:
    found = observe(case_of(entry))
    expect = dict(entry["expect"])
    reason = expect.pop("reason", None)
    assert {name: found.facts[name] for name in expect} == expect
    if reason is not None:
        assert found.error is not None
        assert any(reason in each.where for each in found.error.reasons)


@real
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry["expect"]["authentic"]], ids=lambda e: e["name"])
def test_flips_in_real_documents_are_never_accepted(entry: dict[str, Any]) -> None:
    case = case_of(entry)
    good = case.files["doc"]
    for position in range(0, len(good), 29):
        changed = bytearray(good)
        changed[position] ^= 1 << position % 8
        assert observe(replace(case, files={"doc": bytes(changed)})).facts["authentic"] is False, position


@real
def test_the_real_root_is_the_pinned_one_and_documents_do_not_mix() -> None:
    by_name = {entry["name"]: case_of(entry) for entry in ENTRIES}
    good, debug = by_name["ok-2022"].files["doc"], by_name["debug-2022"].files["doc"]
    first, second = nitro_format.parse(good), nitro_format.parse(debug)
    assert hashlib.sha256(first.cabundle[0]).hexdigest() == AWS_NITRO_ROOT_G1
    # the debug enclave's document with the signature of the other, and the other way round
    for payload, signature in (
        (first.message.payload, second.message.signature),
        (second.message.payload, first.message.signature),
    ):
        mixed = cose.dumps([first.message.protected, {}, payload, signature])
        outcomes = [observe(replace(case, files={"doc": mixed})).facts["authentic"] for case in by_name.values()]
        assert not any(outcomes)


def test_the_page_has_a_row_for_every_step() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "attestation" / "nitro.md").read_text()
    assert re.findall(r"^\| `(nitro\.\d+-\w+)` \|", page, re.MULTILINE) == list(STEPS)
    assert AWS_NITRO_ROOT_G1 in page
    assert f"{nitro_format.LIMIT:,}" in page
    assert f"{nitro_format.PAYLOAD_LIMIT:,}" in page
