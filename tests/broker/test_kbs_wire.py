"""Messages of the KBS protocol, evidence in its forms, init-data and sessions: pure functions, one fault each."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from cloister.attestation.edge.collateral import soft_collateral
from cloister.attestation.roots import Roots
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.types import Claims
from cloister.attestation.verify import verify
from cloister.broker.kbs import session, wire
from cloister.errors import CloisterError, EvidenceError, PeerError
from cloister.testkit.softtee import soft_claims, workload
from tests.attestation.helpers import SHARED
from tests.broker.kbs_client import Guest, KbsClient, init_data, register, snp_json

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
KEY = ec.derive_private_key(5, ec.SECP256R1())


def client(**changes: Any) -> KbsClient:
    values: dict[str, Any] = {"measurement": b"\x11" * 48, "document": init_data(workload())}
    return KbsClient("https://x", Guest(**(values | changes)), KEY, nonce=base64.b64encode(bytes(32)).decode())


def attestation(**changes: Any) -> wire.Attestation:
    return wire.attestation(json.dumps(client(**changes).attestation()).encode())


def bound_claims(**changes: Any) -> tuple[Claims, wire.Attestation]:
    found = attestation(**changes)
    kind = wire.TEES[changes.get("tee", "tdx")]
    claims = verify(wire.evidence(kind, found), soft_collateral(NOW), Roots(soft=True), now=NOW)
    return claims, found


# --- messages ---------------------------------------------------------------------------------------------------------


def test_golden_messages() -> None:
    assert wire.request(b'{"version":"0.4.0","tee":"snp","extra-params":""}') == wire.Request("snp")
    assert wire.request(b'{"version":"0.4.0","tee":"tdx","extra-params":{"x":1},"later":true}').kind == "tdx"
    assert wire.challenge("QUFB") == b'{"nonce":"QUFB","extra-params":""}'
    assert wire.token_reply("a.b.c") == b'{"token":"a.b.c"}'
    assert json.loads(wire.problem("PolicyDeny", 'a "quoted" \ud800 word')) == {
        "type": "https://github.com/confidential-containers/kbs/errors/PolicyDeny",
        "detail": 'a "quoted" ? word',
    }


def test_members_of_an_attestation_are_exactly_these() -> None:
    good = client().attestation()
    assert wire.attestation(json.dumps(good).encode()).key.jwk["crv"] == "P-256"
    changes: list[Callable[[Any], Any]] = [
        lambda v: v.pop("runtime-data"),
        lambda v: v.pop("tee-evidence"),
        lambda v: v.update(more=1),
        lambda v: v["runtime-data"].update(more=1),
        lambda v: v["runtime-data"].pop("nonce"),
        lambda v: v["runtime-data"].update(nonce=1),
        lambda v: v["tee-evidence"].update(more=1),
        lambda v: v["tee-evidence"].update(additional_evidence={}),
        lambda v: v["tee-evidence"].update(primary_evidence="x"),
        lambda v: v["init-data"].update(format="json"),
        lambda v: v["init-data"].update(more=1),
        lambda v: v.update({"init-data": "x"}),
    ]
    for change in changes:
        value = copy.deepcopy(good)
        change(value)
        with pytest.raises(PeerError):
            wire.attestation(json.dumps(value).encode())
    without = dict(good)
    del without["init-data"]
    assert wire.attestation(json.dumps(without).encode()).init_data is None
    assert wire.attestation(json.dumps(without | {"init-data": None}).encode()).init_data is None


def test_every_member_of_the_runtime_data_is_bound() -> None:
    claims, found = bound_claims()
    assert wire.bound(claims, found) == ()
    other = ec.derive_private_key(6, ec.SECP256R1())
    for changed in (
        replace(found, nonce="other"),
        replace(found, additional="{}"),
        replace(found, key=wire.tee_key(KbsClient("", client().guest, other).runtime_data()["tee-pubkey"])),
    ):
        assert [reason.where for reason in wire.bound(claims, changed)] == ["kbs.report_data"]
    assert wire.bound(replace(claims, report_data=b""), found)
    assert wire.bound(replace(claims, report_data=found.report_data()[:32]), found)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)


LAUNCHED = replace(soft_claims(), events=(), measurements={"mrconfigid": register(init_data(workload()), 48)})


@given(st.binary(max_size=400))
def test_any_bytes_are_refused_in_the_tree(data: bytes) -> None:
    for parse in (wire.request, wire.attestation):
        with pytest.raises(CloisterError):
            parse(data)


@given(st.sampled_from(["tdx", "snp", "sgx"]), st.data())
def test_any_member_may_be_anything(tee: str, data: st.DataObject) -> None:
    """Somewhere in a good message another value: parsed or refused, never another exception."""
    value = client(tee=tee).attestation()
    at: Any = value
    while True:
        name = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[name], (dict, list)) or not at[name] or data.draw(st.booleans()):
            break
        at = at[name]
    at[name] = data.draw(JSON_VALUES)
    try:
        text = json.dumps(value).encode()
    except ValueError:
        return
    with contextlib.suppress(PeerError, EvidenceError):
        found = wire.attestation(text)
        wire.with_workload(LAUNCHED, found.init_data)
        wire.evidence(wire.TEES[tee], found)


# --- evidence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tee", ["tdx", "snp", "sgx"])
def test_every_form_reaches_the_broker_s_own_verifier(tee: str) -> None:
    claims, found = bound_claims(tee=tee)
    assert claims.tee == f"soft-{wire.TEES[tee]}"
    assert wire.bound(claims, found) == ()
    with_event, reasons = wire.with_workload(claims, found.init_data)
    assert reasons == ()
    assert with_event.events[0].data == workload().encode()
    signed = claims.measurements[wire.REGISTERS[wire.TEES[tee]]]
    assert signed == register(found.init_data or "", len(signed))


def old_form(new: dict[str, Any], report: bytes) -> dict[str, Any]:
    """The serde form of virtee/sev 1 to 4."""
    made = {name: value for name, value in new.items() if name not in wire._SNP_NEW and name not in wire._SNP_VERSIONS}
    for name in wire._SNP_TCBS:
        made[name] = {key: value for key, value in new[name].items() if key != "fmc"} | {"_reserved": [0, 0, 0, 0]}
    for name, (at, size) in wire._SNP_OLD.items():
        made[name] = int.from_bytes(report[at : at + size], "little")
    for name, (at, size) in wire._SNP_OLD_ARRAYS.items():
        made[name] = list(report[at : at + size])
    made["signature"] = new["signature"] | {"_reserved": list(report[0x330:])}
    return made


def snp_report(**options: Any) -> bytes:
    machine = soft_snp.machine()
    return soft_snp.report(machine, measurement=b"\x11" * 48, report_data=b"\x22" * 64, **options)


def test_both_serde_forms_of_an_snp_report_give_its_bytes() -> None:
    report = snp_report(host_data=b"\x33" * 32)
    new = snp_json(report, None)["attestation_report"]
    assert wire._snp_report(new) == report
    assert wire._snp_report(old_form(new, report)) == report
    absent = {name: value for name, value in new.items() if not name.endswith("mit_vector")}  # sev 5
    assert wire._snp_report(absent)[:0x1F8] == report[:0x1F8]


def test_the_tcb_of_a_chip_with_an_fmc_is_laid_out_its_way() -> None:
    turin = {"fmc": 1, "bootloader": 2, "tee": 3, "snp": 4, "microcode": 5}
    assert wire._snp_tcb(turin, "x") == bytes([1, 2, 3, 4, 0, 0, 0, 5])
    assert wire._snp_tcb(turin | {"fmc": None}, "x") == bytes([2, 3, 0, 0, 0, 0, 4, 5])


def test_real_reports_survive_their_serde_form() -> None:
    files = sorted((SHARED / "vectors" / "attestation").rglob("*.bin")) if SHARED.exists() else []
    reports = [path.read_bytes() for path in files if path.stat().st_size == 0x4A0]
    if not reports:
        pytest.skip("no real SNP reports beside this repository")
    for report in reports:
        assert wire._snp_report(old_form(snp_json(report, None)["attestation_report"], report)) == report


def snp_faults() -> dict[str, Callable[[dict[str, Any]], Any]]:
    return {
        "no report": lambda v: v.pop("attestation_report"),
        "more": lambda v: v.update(more=1),
        "a field is missing": lambda v: v["attestation_report"].pop("chip_id"),
        "an unknown field": lambda v: v["attestation_report"].update(x=1),
        "a text for a number": lambda v: v["attestation_report"].update(vmpl="0"),
        "a boolean for a number": lambda v: v["attestation_report"].update(vmpl=True),
        "too large": lambda v: v["attestation_report"].update(vmpl=1 << 32),
        "negative": lambda v: v["attestation_report"].update(vmpl=-1),
        "a short array": lambda v: v["attestation_report"].update(chip_id=[0] * 63),
        "an array of large numbers": lambda v: v["attestation_report"].update(chip_id=[256] * 64),
        "hex for an array": lambda v: v["attestation_report"].update(chip_id="00" * 64),
        "a TCB without snp": lambda v: v["attestation_report"]["current_tcb"].pop("snp"),
        "a version of four": lambda v: v["attestation_report"]["current"].update(x=1),
        "no signature": lambda v: v["attestation_report"].update(signature=None),
        "two leaves": lambda v: v.update(cert_chain=[{"cert_type": "VCEK", "data": [1]}] * 2),
        "a certificate of another form": lambda v: v.update(cert_chain=["x"]),
        "certificates of another form": lambda v: v.update(cert_chain=[{"cert_type": "VCEK", "data": "AAAA"}]),
    }


@pytest.mark.parametrize("name", snp_faults())
def test_snp_evidence_of_another_form(name: str) -> None:
    value = snp_json(snp_report(), b"leaf")
    snp_faults()[name](value)
    found = replace(attestation(), primary=value)
    with pytest.raises(EvidenceError) as caught:
        wire.evidence("sev-snp", found)
    assert caught.value.code == "evidence-malformed"
    assert caught.value.reasons[0].where.startswith("kbs.primary_evidence")


@pytest.mark.parametrize(
    "chain", [None, [], [{"cert_type": "ARK", "data": [1, 2]}], [{"cert_type": {"OTHER": "x"}, "data": []}]]
)
def test_a_host_may_send_no_leaf_or_more_than_it(chain: Any) -> None:
    found = replace(attestation(), primary=snp_json(snp_report(), None) | {"cert_chain": chain})
    assert dict(wire.evidence("sev-snp", found).parts) == {}


def test_the_boot_log_travels_as_a_part() -> None:
    found = attestation()
    with_log = replace(found, primary=dict(found.primary) | {"cc_eventlog": base64.b64encode(b"log").decode()})
    assert dict(wire.evidence("tdx", with_log).parts) == {"ccel": b"log"}


# --- init-data --------------------------------------------------------------------------------------------------------


def test_claims_with_events_of_their_own_get_no_second_workload() -> None:
    document = init_data(workload())
    claims = soft_claims()
    assert claims.events
    same, reasons = wire.with_workload(claims, document)
    assert (same, len(reasons)) == (claims, 1)


def test_hardware_without_a_launch_register_binds_no_workload() -> None:
    claims = replace(soft_claims(), events=(), tee="nitro")
    assert "without a launch register" in wire.with_workload(claims, init_data(workload()))[1][0].found
    claims = replace(claims, tee="tdx", measurements={})
    assert wire.with_workload(claims, init_data(workload()))[1]


@pytest.mark.parametrize("at", range(48))
def test_every_bit_of_the_register_counts(at: int) -> None:
    document = init_data(workload())
    value = bytearray(register(document, 48))
    claims = replace(soft_claims(), events=(), measurements={"mrconfigid": bytes(value)})
    assert wire.with_workload(claims, document)[1] == ()
    value[at] ^= 1
    claims = replace(claims, measurements={"mrconfigid": bytes(value)})
    assert [reason.where for reason in wire.with_workload(claims, document)[1]] == ["kbs.init-data.mrconfigid"]


@given(st.text(max_size=200))
def test_any_document_is_refused_with_a_reason(text: str) -> None:
    claims = replace(soft_claims(), events=(), measurements={"mrconfigid": bytes(48)})
    same, reasons = wire.with_workload(claims, text)
    assert same == claims
    assert reasons


# --- sessions ---------------------------------------------------------------------------------------------------------


def attested(token: str = "t") -> session.Attested:
    found = attestation()
    return session.Attested(found.key, soft_claims(), (), "sha256:" + "0" * 64, token)


def test_the_table_is_what_sessions_do() -> None:
    sessions = session.Sessions()
    made = sessions.challenge("a", "n", "tdx", NOW)
    assert sessions.of_cookie("a", NOW) is None
    taken = sessions.answer("a", NOW)
    assert taken is made
    assert sessions.answer("a", NOW) is None
    sessions.accept(made, attested(), NOW)
    assert sessions.of_cookie("a", NOW) is made
    assert sessions.of_token("t", NOW) is made
    sessions.keep(made, "p", (b"reply", b"receipt"))
    later = NOW + session.SESSION_LIFE
    assert sessions.of_cookie("a", later) is None
    assert made.state is session.State.ENDED
    assert (sessions.of_token("t", NOW), sessions.of_cookie("a", NOW), len(sessions)) == (None, None, 0)
    for state in session.State:
        for event in session.Event:
            if (state, event) not in session.NEXT:
                made.state = state
                with pytest.raises(RuntimeError):
                    sessions._move(made, event)


def test_refused_evidence_ends_the_session() -> None:
    sessions = session.Sessions()
    sessions.challenge("a", "n", "tdx", NOW)
    taken = sessions.answer("a", NOW)
    assert taken is not None
    sessions.refuse(taken)
    assert (taken.state, len(sessions)) == (session.State.ENDED, 0)
    with pytest.raises(RuntimeError):
        sessions.accept(taken, attested(), NOW)


def test_a_challenge_ends_and_a_clock_that_goes_back_ends_it_too() -> None:
    for moment in (NOW + session.CHALLENGE_LIFE, NOW - timedelta(seconds=1)):
        sessions = session.Sessions()
        sessions.challenge("a", "n", "tdx", NOW)
        assert sessions.answer("a", moment) is None


def test_a_flood_of_challenges_touches_no_attested_session() -> None:
    sessions = session.Sessions(challenges=3, sessions=2)
    for name in ("a", "b"):
        made = sessions.challenge(name, "n", "tdx", NOW)
        assert sessions.answer(name, NOW) is made
        sessions.accept(made, attested(name), NOW)
    for number in range(100):
        sessions.challenge(f"flood-{number}", "n", "tdx", NOW)
    assert len(sessions) == 5
    assert sessions.of_cookie("a", NOW)
    assert sessions.answer("flood-96", NOW) is None
    assert sessions.answer("flood-97", NOW) is not None
    third = sessions.challenge("c", "n", "tdx", NOW)
    assert sessions.answer("c", NOW)
    sessions.accept(third, attested("c"), NOW)
    assert sessions.of_cookie("a", NOW) is None  # the oldest went
    assert sessions.of_token("a", NOW) is None
    assert sessions.of_token("b", NOW)
    assert sessions.of_token("", NOW) is None


def test_old_sessions_leave_memory() -> None:
    sessions = session.Sessions()
    for number in range(50):
        made = sessions.challenge(str(number), "n", "tdx", NOW)
        if number % 2:
            assert sessions.answer(str(number), NOW)
            sessions.accept(made, attested(str(number)), NOW)
    sessions.challenge("last", "n", "tdx", NOW + timedelta(minutes=6))
    assert len(sessions) == 1
    assert sessions._tokens == {}
