"""Azure's confidential VMs: every link of the chain from the hardware to the vTPM's quote, broken one by one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attestation import evidence as wire
from cloister.attestation.appraise import appraise
from cloister.attestation.azure import format as hcl_format
from cloister.attestation.azure_snp import verify as azure_snp
from cloister.attestation.azure_tdx import verify as azure_tdx
from cloister.attestation.binding import Binding, check_binding
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.events import event
from cloister.attestation.files import Case
from cloister.attestation.files import azure as files_azure
from cloister.attestation.reference import of_claims
from cloister.attestation.roots import Roots
from cloister.attestation.snp.format import Tcb
from cloister.attestation.soft import azure as soft_azure
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.soft import tpm as soft_tpm
from cloister.attestation.tpm.verify import encode_pcrs
from cloister.attestation.types import NOT_RATED, Claims, Evidence, Policy
from cloister.attestation.verify import VERIFIERS, verify
from cloister.errors import EvidenceError
from tests.attestation.helpers import SHARED, refusal, value_or_malformed

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
ISSUED = NOW - timedelta(days=1)
SOFT = Roots(soft=True)
BINDING = Binding("release", bytes(range(32)), b"key")
DATA = BINDING.qualifying_data()
ENDORSED = Endorsements(soft_snp.endorsements(ISSUED) + soft_tdx.endorsements(ISSUED))
EVENTS = (event("cloister/config/1", b"data"),)
MAKERS: dict[str, Callable[..., Evidence]] = {
    "azure-snp": soft_azure.snp_evidence,
    "azure-tdx": soft_azure.tdx_evidence,
}
both = pytest.mark.parametrize("kind", MAKERS)


def good(kind: str, **rest: Any) -> Evidence:
    return MAKERS[kind](**{"report_data": DATA, "events": EVENTS, **rest})


def claims(evidence: Evidence, endorsements: Endorsements = ENDORSED) -> Claims:
    return verify(evidence, endorsements, SOFT, now=NOW)


def refused(
    evidence: Evidence,
    step: str,
    *,
    endorsements: Endorsements = ENDORSED,
    code: str = "evidence-not-authentic",
    roots: Roots = SOFT,
) -> EvidenceError:
    error = refusal(verify, evidence, endorsements, roots, now=NOW)
    assert (error.code, error.reasons[0].where) == (code, f"{evidence.kind}.{step}"), error.reasons
    return error


def with_parts(evidence: Evidence, **parts: bytes | None) -> Evidence:
    changed = {**evidence.parts, **{name.replace("_", "-"): part for name, part in parts.items()}}
    return replace(evidence, parts=MappingProxyType({n: part for n, part in changed.items() if part is not None}))


# --- what is accepted -------------------------------------------------------------------------------------------------


@both
def test_a_good_vm_gives_all_claims(kind: str) -> None:
    found = claims(good(kind))
    assert (found.kind, found.tee, found.debug, found.soft) == ("tee", f"soft-{kind}", False, True)
    assert found.tcb_status == (NOT_RATED if kind == "azure-snp" else "UpToDate")
    assert check_binding(found, BINDING) == ()
    assert (found.report_data, found.log_in, found.events) == (DATA, "register", EVENTS)
    assert {f"pcr{index}" for index in range(24)} < set(found.measurements)
    hardware = "measurement" if kind == "azure-snp" else "mrtd"
    assert found.measurements[hardware] == soft_azure.PARAVISOR
    boot = hashlib.sha256(b"".join(found.measurements[f"pcr{index}"] for index in range(10))).digest()
    assert (found.measurements["boot_aggregate"], found.boot) == (boot, f"sha256:{boot.hex()}")
    launch = hashlib.sha384(soft_azure.PARAVISOR + boot).digest()
    assert (found.launch, found.measurements[found.launch]) == ("azure_launch", launch)
    assert len(found.boot_log) > 10
    assert found.attributes["secure_boot"]
    assert not found.attributes["console_enabled"]
    assert found.platform["vm_unique_id"].startswith("soft-")
    assert ("chip_id" in found.platform) == (kind == "azure-snp")
    assert ("ppid" in found.platform) == (kind == "azure-tdx")
    assert found.valid_until is not None


@both
def test_it_works_without_a_boot_log_and_without_events(kind: str) -> None:
    found = claims(good(kind, events=(), boot_log=False))
    assert (found.events, found.boot_log) == ((), ())


@both
def test_a_vm_of_ones_own_quotes_any_pcrs_but_has_another_launch_measurement(kind: str) -> None:
    """Mallory owns genuine hardware: it vouches for whatever key its software names, and that key quotes the victim's PCRs."""
    hers = {"measurement" if kind == "azure-snp" else "mrtd": b"\x66" * 48}
    victim, forged = claims(good(kind)), claims(good(kind, tpm=soft_azure.vtpm("mallory"), report=hers))
    assert (forged.boot, forged.boot_log) == (victim.boot, victim.boot_log)
    assert forged.measurements["pcr4"] == victim.measurements["pcr4"]
    assert forged.measurements[forged.launch] != victim.measurements[victim.launch]
    ours = of_claims(victim, "ours")
    policy = Policy("p", "tee", accept=frozenset({"simulated"}), software=(ours,))
    assert appraise(victim, policy) == ()
    assert [reason.where for reason in appraise(forged, policy)] == ["p.software.ours.azure_launch"]


@both
def test_a_bare_signature_is_the_same_signature(kind: str) -> None:
    assert claims(good(kind, bare=True)) == claims(good(kind))


@both
def test_evidence_travels(kind: str) -> None:
    assert claims(wire.decode(wire.encode(good(kind)))) == claims(good(kind))


def test_the_vtpm_s_signature_is_rsassa() -> None:
    """The generator's own padding, against `cryptography`."""
    from cryptography.hazmat.primitives.asymmetric import padding

    machine = soft_azure.vtpm()
    key = hcl_format.parse_runtime(soft_azure.runtime(machine), where="x").ak
    key.verify(machine.key.sign_pkcs1(b"message"), b"message", padding.PKCS1v15(), SHA256())


def test_the_verifiers_are_found() -> None:
    assert VERIFIERS["azure-snp"] is azure_snp.verify
    assert VERIFIERS["azure-tdx"] is azure_tdx.verify
    for module in (azure_snp, azure_tdx):
        assert list(module.STEPS) == sorted(module.STEPS)
        assert all(f"  {name.split('.')[1].replace('-', ' ')} " in (module.__doc__ or "") for name in module.STEPS)


# --- the chain, link by link ------------------------------------------------------------------------------------------


def test_the_soft_root_counts_only_when_it_is_named() -> None:
    refused(good("azure-snp"), "2-report.sev-snp.2-root", roots=Roots())
    refused(good("azure-tdx"), "2-report.tdx.2-root", roots=Roots())


def test_the_hardware_report_is_judged_by_every_step_of_its_verifier() -> None:
    machine = soft_snp.machine()
    for report, step in (
        ({"reported": Tcb(1, 0, 1, 1)}, "sev-snp.5-tcb"),
        ({"mask_chip_key": True}, "sev-snp.6-chip"),
        ({"signing_key": 1}, "sev-snp.3-chain.kind"),
    ):
        refused(good("azure-snp", machine=machine, report=report), f"2-report.{step}")
    revoked = Endorsements(soft_snp.endorsements(ISSUED, revoked=("ask",)))
    refused(good("azure-snp"), "2-report.sev-snp.4-revocation.revoked", endorsements=revoked)
    without = Endorsements(tuple(item for item in ENDORSED.items if "crl" not in item.subject))
    refused(good("azure-snp"), "2-report.sev-snp.4-revocation.revocation", endorsements=without)
    refused(good("azure-tdx"), "2-report.tdx.3-collateral", endorsements=Endorsements())
    refused(good("azure-tdx", report={"debug": True}), "2-report.tdx.8-attributes")
    platform = soft_tdx.platform()
    document = soft_tdx.collateral(ISSUED, revoked=(platform.serial,))
    endorsements = Endorsements((Endorsement("tdx", soft_tdx.FMSPC, document),))
    refused(good("azure-tdx"), "2-report.tdx.4-chain.revoked", endorsements=endorsements)


def test_a_debug_policy_is_a_claim() -> None:
    assert claims(good("azure-snp", report={"debug": True})).debug


def test_a_report_that_the_guest_asked_for_is_refused() -> None:
    """The guest runs above the paravisor; a report of its own would vouch for a key of its own."""
    for vmpl in (1, 2, 3):
        refused(good("azure-snp", report={"vmpl": vmpl}), "2-report.vmpl")


@both
def test_a_vtpm_that_the_hardware_does_not_vouch_for_is_refused(kind: str) -> None:
    """The attacker's own vTPM beside a genuine report: the runtime JSON changes, and its hash with it."""
    mallory = soft_azure.vtpm("mallory")
    genuine = soft_azure.runtime(soft_azure.vtpm())
    vouched = hashlib.sha256(genuine).digest().ljust(64, b"\x00")
    refused(good(kind, tpm=mallory, vouched=vouched), "3-runtime")
    # the JSON is genuine, the quote is another vTPM's
    refused(good(kind, tpm=mallory, named=soft_azure.vtpm()), "4-quote.signature")


@both
def test_report_data_is_the_hash_and_zeros(kind: str) -> None:
    digest = hashlib.sha256(soft_azure.runtime(soft_azure.vtpm())).digest()
    for vouched in (digest + b"\x01" + bytes(31), digest * 2, bytes(64), bytes(32) + digest):
        refused(good(kind, vouched=vouched), "3-runtime")


@both
def test_the_quote_of_another_vm_is_refused(kind: str) -> None:
    """Mix and match: two genuine VMs, the report of one and the quote of the other."""
    a, b = good(kind, tpm=soft_azure.vtpm("a")), good(kind, tpm=soft_azure.vtpm("b"))
    refused(with_parts(a, tpm_quote=b.parts["tpm-quote"]), "4-quote.signature")
    refused(replace(a, quote=b.quote), "3-runtime" if kind == "azure-tdx" else "4-quote.signature")


@both
def test_the_nonce_of_another_request_is_not_bound(kind: str) -> None:
    found = claims(good(kind, report_data=bytes(32)))
    assert [reason.where for reason in check_binding(found, BINDING)] == ["binding.report_data"]


@both
def test_changed_registers_are_refused(kind: str) -> None:
    evidence = good(kind)
    pcrs = soft_tpm.host().pcrs(EVENTS)
    for index in range(24):
        changed = {**pcrs, index: hashlib.sha256(pcrs[index]).digest()}
        refused(with_parts(evidence, pcrs=encode_pcrs({"sha256": changed})), "4-quote.pcrs")


@both
def test_all_registers_and_no_others(kind: str) -> None:
    pcrs = soft_tpm.host().pcrs(EVENTS)
    fewer = {index: pcrs[index] for index in range(23)}
    for banks in ({"sha256": fewer}, {"sha256": pcrs, "sha1": {0: bytes(20)}}):
        refused(with_parts(good(kind), pcrs=encode_pcrs(banks)), "1-format", code="evidence-malformed")
    quote = soft_azure.quote(soft_azure.vtpm(), fewer, report_data=DATA)
    refused(with_parts(good(kind), tpm_quote=quote), "4-quote.selection")


@both
def test_what_is_no_quote_of_a_tpm_is_refused(kind: str) -> None:
    refused(good(kind, magic=0x12345678), "4-quote.generated")
    pcrs = soft_tpm.host().pcrs(EVENTS)
    certified = soft_azure.quote(soft_azure.vtpm(), pcrs, report_data=DATA, kind=0x8017)
    refused(with_parts(good(kind), tpm_quote=certified), "4-quote.format", code="evidence-malformed")


@both
def test_a_log_that_the_register_does_not_explain_is_refused(kind: str) -> None:
    evidence = good(kind)
    for events in ((), (event("cloister/config/1", b"other"),), EVENTS * 2):
        refused(replace(evidence, events=events), "6-events.replay")
    other = soft_tpm.host(kernel=b"another")
    reasons = refused(with_parts(evidence, boot_log=other.boot_log()), "5-boot.pcr4").reasons
    assert len(reasons) == 1


@both
def test_another_kernel_is_another_boot_state(kind: str) -> None:
    other = claims(good(kind, host=soft_tpm.host(kernel=b"another")))
    assert other.boot != claims(good(kind)).boot
    hardware = "measurement" if kind == "azure-snp" else "mrtd"
    assert other.measurements[hardware] == claims(good(kind)).measurements[hardware]


def test_evidence_of_one_kind_is_not_of_the_other() -> None:
    for kind, other in (("azure-snp", "azure-tdx"), ("azure-tdx", "azure-snp")):
        moved = replace(good(kind), kind=other)
        refused(moved, "1-format", code="evidence-malformed")


# --- form -------------------------------------------------------------------------------------------------------------

KEY: dict[str, Any] = json.loads(soft_azure.runtime(soft_azure.vtpm()))["keys"][0]


@pytest.mark.parametrize(
    "runtime",
    [
        b"{}",
        b"[]",
        b"null",
        b'{"keys":{}}',
        b'{"keys":[]}',
        b'{"keys":[{"kid":"HCLAkPub"}]}',
        b'{"keys":[],"keys":[]}',
        b"[" * 5000,
        b"\xff\xfe",
        json.dumps({"keys": [KEY, KEY]}).encode(),
        json.dumps({"keys": [KEY] + [{}] * 16}).encode(),
        json.dumps({"keys": [{**KEY, "kty": "EC"}]}).encode(),
        json.dumps({"keys": [{**KEY, "e": "AQ"}]}).encode(),
        json.dumps({"keys": [{**KEY, "n": "AQAB"}]}).encode(),
        json.dumps({"keys": [{**KEY, "n": "!" + KEY["n"]}]}).encode(),
        json.dumps({"keys": [{**KEY, "n": "é"}]}).encode(),
        json.dumps({"keys": [{**KEY, "n": 5}]}).encode(),
        json.dumps({"keys": [{**KEY, "n": KEY["n"][:-2] + "AA"}]}).encode(),  # even
        json.dumps({"keys": [KEY], "user-data": "zz"}).encode(),
    ],
)
def test_runtime_data_of_another_shape_is_malformed(runtime: bytes) -> None:
    error = refusal(claims, good("azure-snp", runtime_json=runtime))
    # a modulus that no vTPM makes may still be a number that verifies nothing
    assert error.reasons[0].where in {"azure-snp.1-format", "azure-snp.4-quote.signature"}


def test_what_is_absent_from_the_runtime_data_is_no_claim() -> None:
    found = claims(good("azure-snp", runtime_json=json.dumps({"keys": [KEY], "vm-configuration": 5}).encode()))
    assert "secure_boot" not in found.attributes
    assert "vm_unique_id" not in found.platform


@pytest.mark.parametrize(
    "edit",
    [
        lambda hcl: b"",
        lambda hcl: hcl[: hcl_format.RUNTIME_AT],
        lambda hcl: b"XCLA" + hcl[4:],
        lambda hcl: hcl[:1224] + struct.pack("<I", 3) + hcl[1228:],  # report type
        lambda hcl: hcl[:1228] + struct.pack("<I", 4) + hcl[1232:],  # hash
        lambda hcl: hcl[:1232] + struct.pack("<I", 0) + hcl[1236:],
        lambda hcl: hcl[:1232] + struct.pack("<I", 0xFFFFFFFF) + hcl[1236:],
        lambda hcl: hcl + b"\x01",
        lambda hcl: hcl + bytes(hcl_format.LIMIT),
    ],
)
@both
def test_hcl_reports_of_another_form_are_malformed(kind: str, edit: Callable[[bytes], bytes]) -> None:
    evidence = good(kind)
    refused(replace(evidence, quote=edit(evidence.quote)), "1-format", code="evidence-malformed")


@both
def test_parts_are_named(kind: str) -> None:
    evidence = good(kind)
    own = "td_quote" if kind == "azure-tdx" else "pcrs"
    for parts in ({"other": b"x"}, {"tpm_quote": None}, {"pcrs": None}, {own: None}, {"tpm_quote": b"\x00"}):
        refused(with_parts(evidence, **parts), "1-format", code="evidence-malformed")
    refused(with_parts(evidence, pcrs=b"\xa0"), "1-format", code="evidence-malformed")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=2700), st.binary(max_size=600))
def test_any_bytes_parse_or_are_malformed(data: bytes, runtime: bytes) -> None:
    value_or_malformed(lambda: hcl_format.parse(data, where="x"))
    value_or_malformed(lambda: hcl_format.parse(b"HCLA" + data, where="x"))
    value_or_malformed(lambda: hcl_format.parse_runtime(runtime, where="x"))
    value_or_malformed(lambda: hcl_format.parse(hcl_format.build(2, bytes(1184), runtime), where="x"))


def claims_or_refusal(evidence: Evidence) -> Claims | EvidenceError:
    try:
        return claims(evidence)
    except EvidenceError as error:
        return error


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_changed_evidence_is_refused_or_says_the_same(data: st.DataObject) -> None:
    evidence = good(data.draw(st.sampled_from(sorted(MAKERS))), bare=data.draw(st.booleans()))
    name = data.draw(st.sampled_from(["quote", *sorted(set(evidence.parts) - {"boot-log"})]))
    blob = bytearray(evidence.quote if name == "quote" else evidence.parts[name])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(blob) - 1))
        match data.draw(st.sampled_from(["flip", "set", "cut", "insert"])):
            case "flip":
                blob[at] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                blob[at : at + 4] = data.draw(st.sampled_from([b"\xff\xff\xff\xff", bytes(4)]))
            case "cut":
                del blob[at : at + data.draw(st.integers(1, 32))]
            case _:
                blob[at:at] = data.draw(st.binary(max_size=8))
        blob = blob or bytearray(1)
    changed = replace(evidence, quote=bytes(blob)) if name == "quote" else with_parts(evidence, **{name: bytes(blob)})
    found = claims_or_refusal(changed)
    if isinstance(found, EvidenceError):
        assert found.reasons
        assert found.code in {"evidence-malformed", "evidence-not-authentic"}
    else:
        assert found == claims(evidence)


@both
def test_every_byte_that_is_signed_counts(kind: str) -> None:
    evidence = good(kind, boot_log=False)
    signed: list[tuple[str, range]] = [("tpm-quote", range(2, len(evidence.parts["tpm-quote"])))]
    signed.append(("pcrs", range(len(evidence.parts["pcrs"]))))
    end = hcl_format.RUNTIME_AT + len(evidence.quote[hcl_format.RUNTIME_AT :].rstrip(b"\x00"))
    signed.append(("quote", range(hcl_format.RUNTIME_AT, end)))
    if kind == "azure-snp":
        signed.append(("quote", range(hcl_format.HEADER_BYTES, hcl_format.HEADER_BYTES + hcl_format.REPORT_BYTES)))
    for name, positions in signed:
        for position in positions[::7]:
            blob = bytearray(evidence.quote if name == "quote" else evidence.parts[name])
            blob[position] ^= 1 << (position % 8)
            changed = (
                replace(evidence, quote=bytes(blob)) if name == "quote" else with_parts(evidence, **{name: bytes(blob)})
            )
            refusal(claims, changed)


@both
def test_times_without_a_zone_and_other_kinds_are_a_caller_s_mistake(kind: str) -> None:
    module = azure_snp if kind == "azure-snp" else azure_tdx
    with pytest.raises(ValueError, match="time zone"):
        module.verify(good(kind), ENDORSED, SOFT, now=datetime(2026, 11, 20))  # noqa: DTZ001 - the point
    with pytest.raises(ValueError, match="kind"):
        module.verify(replace(good(kind), kind="tdx"), ENDORSED, SOFT, now=NOW)


# --- files ------------------------------------------------------------------------------------------------------------


def _url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode()


def document(evidence: Evidence, form: str) -> bytes:
    """Return `evidence` as an agent writes it: `new` (hex and base64url) or `old` (lists of numbers, PEM)."""
    new = form == "new"
    quoted = evidence.parts["tpm-quote"]
    size = int.from_bytes(quoted[:2], "big")
    banks = soft_tpm.host().pcrs(evidence.events)

    def small(data: bytes) -> Any:
        return data.hex() if new else list(data)

    def large(data: bytes) -> Any:
        return _url(data) if new else list(data)

    quote = {
        "message": small(quoted[2 : 2 + size]),
        "signature": small(quoted[2 + size :]),
        "pcrs": [small(banks[index]) for index in range(24)],
    }
    value: dict[str, Any] = {"version": 1} if new else {}
    if evidence.kind == "azure-tdx":
        padded = evidence.parts["td-quote"] + bytes(70)
        value |= {"tpm_quote": quote, "hcl_report": large(evidence.quote), "td_quote": large(padded)}
    else:
        leaf = evidence.parts["leaf"]
        pem = "-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(leaf).decode() + "-----END CERTIFICATE-----\n"
        value |= {
            "tpm_quote" if new else "quote": quote,
            "hcl_report" if new else "report": large(evidence.quote),
            "vcek": _url(leaf) if new else pem,
        }
    return json.dumps(value).encode()


def _case(evidence: Evidence, form: str, **rest: Any) -> Case:
    chains = {item.subject: item.data for item in ENDORSED.items if item.subject.endswith(("/vcek/soft", "/vlek/soft"))}
    collateral = {
        f"{n}": item.data for n, item in enumerate(ENDORSED.items) if "crl" in item.subject or item.kind == "tdx"
    }
    values = {"chains": chains, "collateral": collateral, "roots": SOFT, "nonce": DATA, **rest}
    return Case("azure", {"evidence": document(evidence, form)}, NOW, **values)


@both
@pytest.mark.parametrize("form", ["new", "old"])
@pytest.mark.parametrize("bare", [False, True])
def test_both_forms_of_the_json(kind: str, form: str, bare: bool) -> None:
    evidence = good(kind, events=(), boot_log=False, bare=bare)
    observed = files_azure.observe(_case(evidence, form))
    assert observed.error is None
    assert observed.claims == claims(evidence)
    assert observed.facts["authentic"] is True
    assert {step.state for step in observed.steps} == {"passed"}
    assert observed.fields["pcr0"] == claims(evidence).measurements["pcr0"].hex()


@both
def test_files_say_what_was_not_done(kind: str) -> None:
    observed = files_azure.observe(_case(good(kind, boot_log=False), "new", collateral={}))
    states = {step.name: step.state for step in observed.steps}
    assert states[f"{kind}.6-events"] == "not done"  # PCR 15 was extended, and nobody kept the log
    assert observed.facts["signature"] is True
    assert observed.error is None
    if kind == "azure-snp":
        assert states["sev-snp.4-revocation"] == "not done"
        assert observed.claims is not None
        assert observed.claims.events == ()
    else:
        assert states["azure-tdx.2-report"] == "not done"
        assert (observed.claims, observed.facts["authentic"], observed.facts["debug"]) == (None, False, False)


@both
def test_files_are_compared_with_their_nonce(kind: str) -> None:
    observed = files_azure.observe(_case(good(kind, events=()), "new", nonce=b"another"))
    assert observed.error is not None
    assert (observed.error.code, observed.facts["authentic"], observed.claims) == ("evidence-stale", False, None)
    assert observed.steps[-1].name == "freshness"


@both
def test_bad_files_are_observed_too(kind: str) -> None:
    mallory = good(kind, tpm=soft_azure.vtpm("mallory"), named=soft_azure.vtpm(), events=())
    cases = (_case(mallory, "new"), _case(mallory, "new", collateral={}))
    for one in cases:
        observed = files_azure.observe(one)
        assert observed.error is not None
        assert observed.error.reasons[0].where == f"{kind}.4-quote.signature"
        assert (observed.facts["authentic"], observed.facts["signature"]) == (False, False)
    foreign = files_azure.observe(_case(good(kind, events=()), "new", roots=Roots(), collateral={}))
    assert foreign.error is not None
    assert foreign.error.reasons[0].where.startswith(f"{kind}.2-report.")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"td_quote":5}',
        b'{"tpm_quote":[],"hcl_report":""}',
        b'{"tpm_quote":{"message":"00","signature":"00","pcrs":[]},"hcl_report":""}',
        json.dumps({"tpm_quote": {"message": "0", "signature": "00", "pcrs": ["00" * 32] * 24}}).encode(),
        json.dumps({"tpm_quote": {"message": "00", "signature": "00", "pcrs": ["00" * 31] * 24}}).encode(),
        json.dumps({"tpm_quote": {"message": [256], "signature": [], "pcrs": [[0] * 32] * 24}}).encode(),
        json.dumps({"tpm_quote": {"message": "00", "signature": "00", "pcrs": ["00" * 32] * 24}, "vcek": "é"}).encode(),
        b"[" * 100_000,
    ],
)
def test_json_of_another_shape_is_malformed(data: bytes) -> None:
    observed = files_azure.observe(Case("azure", {"evidence": data}, NOW))
    assert observed.facts["authentic"] is False
    assert observed.error is not None
    assert observed.error.code == "evidence-malformed"
    assert observed.steps[0].state == "failed"


def test_the_page_says_what_the_code_does() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "attestation" / "azure.md").read_text()
    steps = re.findall(r"^\| `<kind>\.(\d-\w+)` \|", page, re.MULTILINE)
    for module in (azure_snp, azure_tdx):
        assert [f"{module.KIND}.{step}" for step in steps] == list(module.STEPS)
        assert all(f"`{part}`" in page for part in module.PARTS)
    for kind in MAKERS:
        found = claims(good(kind))
        for name in ("reset_count", "restart_count", "secure_boot", "console_enabled", "vtpm_ak", "vm_unique_id"):
            assert f"`{name}`" in page
            assert name in {**found.svns, **found.attributes, **found.platform}


# --- real evidence ----------------------------------------------------------------------------------------------------

FOLDER = SHARED / "vectors" / "attestation"


def _entries() -> list[dict[str, Any]]:
    manifest = FOLDER / "manifest.json"
    if not manifest.exists():
        return []
    return [entry for entry in json.loads(manifest.read_text()) if entry["kind"] == "azure"]


ENTRIES = _entries()
real = pytest.mark.skipif(not ENTRIES, reason="third-party vectors are not beside the repository")


def case(entry: dict[str, Any]) -> Case:
    chains = {path.stem.removeprefix("chain-"): path.read_bytes() for path in (FOLDER / "snp").glob("chain-*.pem")}
    return Case(
        "azure",
        {role: (FOLDER / path).read_bytes() for role, path in entry["files"].items()},
        datetime.fromisoformat(entry["at"]),
        entry["name"],
        nonce=bytes.fromhex(entry["nonce"]),
        chains=chains,
        chain=entry.get("chain", ""),
    )


@real
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_every_vector_gives_its_verdict(entry: dict[str, Any]) -> None:
    observed = files_azure.observe(case(entry))
    assert {name: observed.facts[name] for name in entry["expect"]} == entry["expect"]
    assert observed.claims is not None
    assert (observed.claims.tee, observed.claims.report_data) == ("azure-snp", bytes.fromhex(entry["nonce"]))
    states = {step.name: step.state for step in observed.steps}
    assert states.pop("sev-snp.4-revocation") == "not done"
    assert set(states.values()) == {"passed"}


@real
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_real_evidence_has_no_byte_to_spare(entry: dict[str, Any]) -> None:
    one = case(entry)
    value = json.loads(one.files["evidence"])

    def observed(changed: dict[str, Any]) -> object:
        return files_azure.observe(replace(one, files={"evidence": json.dumps(changed).encode()})).facts["authentic"]

    assert observed(value) is True
    for name in ("message", "signature"):
        data = bytes.fromhex(value["tpm_quote"][name])
        for position in range(0, len(data), 23):
            blob = bytearray(data)
            blob[position] ^= 1 << (position % 8)
            assert observed({**value, "tpm_quote": {**value["tpm_quote"], name: blob.hex()}}) is False
    hcl = base64.urlsafe_b64decode(value["hcl_report"] + "==")
    end = hcl_format.RUNTIME_AT + len(hcl[hcl_format.RUNTIME_AT :].rstrip(b"\x00"))
    for position in (*range(hcl_format.HEADER_BYTES, 1216, 29), *range(hcl_format.RUNTIME_AT, end, 29)):
        blob = bytearray(hcl)
        blob[position] ^= 1 << (position % 8)
        assert observed({**value, "hcl_report": _url(bytes(blob))}) is False
    for index in range(24):
        pcrs = list(value["tpm_quote"]["pcrs"])
        pcrs[index] = hashlib.sha256(bytes([index])).hexdigest()
        assert observed({**value, "tpm_quote": {**value["tpm_quote"], "pcrs": pcrs}}) is False
    stale = files_azure.observe(replace(one, nonce=b"another"))
    assert (stale.facts["authentic"], stale.error and stale.error.code) == (False, "evidence-stale")
