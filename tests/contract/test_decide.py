"""Decisions: what the examples allow, every reason for a no, and what can never turn a no into a yes."""

from __future__ import annotations

import ast
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cloister.contract
from cloister.attestation.appraise import appraise
from cloister.attestation.types import Claims
from cloister.contract import Contract, Request, State, compile_place, decide
from tests.contract.samples import NAMES, Case, allowed, changed, claims, example
from tests.contract.steps import SINGLE_STEPS, Step, one_step_away

XRAY, BANKS, ACME = NAMES
CASES = [(name, case) for name in NAMES for case in allowed(example(name))]


def wheres(contract: Contract, case: Case) -> list[str]:
    return [reason.where for reason in decide(contract, case.request, case.state).reasons]


def find(name: str, phase: str, op: str, asset: str = "") -> Case:
    return next(
        case
        for case in allowed(example(name))
        if (case.request.phase, case.request.op, case.request.asset) == (phase, op, asset)
    )


@pytest.mark.parametrize(("name", "case"), CASES)
def test_examples_allow_what_they_list(name: str, case: Case) -> None:
    assert decide(example(name), case.request, case.state).reasons == ()


def test_the_denial_of_the_language_reference() -> None:
    contract = example(XRAY)
    case = find(XRAY, "serve", "read", "detector")
    request = replace(
        case.request,
        asset="xrays",
        code=contract.code["trainer"].digest,
        sandbox="offline",
        claims=replace(case.request.claims, tcb_date=date(2026, 3, 31)),
    )
    decision = decide(contract, request, State(frozenset({"hospital"})))
    assert not decision.allowed
    assert [str(reason) for reason in decision.reasons] == [
        "signatures: wants hospital, vendor, found hospital (waiting for vendor)",
        (
            f"phase.serve.run: wants 'server' {contract.code['server'].digest}, found {contract.code['trainer'].digest} "
            "(that is 'trainer', allowed in another phase only)"
        ),
        "code.server.sandbox: wants 'one-shot', found 'offline'",
        "phase.serve.read: wants detector, found 'xrays'",
        (
            "place.enclave.min_tcb: wants firmware of 2026-08 or newer, found firmware of 2026-03 "
            "(update the platform's firmware and microcode, then attest again)"
        ),
    ]


def test_all_reasons_come_in_the_order_of_the_rules() -> None:
    contract = example(BANKS)
    request = Request(
        "serve",
        "answer",
        "",
        "sha256:" + "0" * 64,
        "none",
        Claims(kind="attested-host", tee=""),
        "eve",
        date(2028, 1, 1),
    )
    decision = decide(contract, request, State(used=10**9, used_today=10**9))
    assert [reason.where for reason in decision.reasons] == [
        "expires",
        "signatures",
        "phase.serve.run",
        "code.scorer.sandbox",
        "place.enclave.debug",
        "place.enclave.kind",
        "place.enclave.accept",
        "place.enclave.tcb_status",
        "place.enclave.min_tcb",
        "phase.serve.answer.to",
        "phase.serve.answer.per_day",
    ]


def test_a_phase_that_does_not_exist_is_refused_with_the_rest() -> None:
    contract, case = example(ACME), find(ACME, "serve", "read", "model")
    late = replace(case.request, phase="refine", today=date(2027, 4, 1))
    assert wheres(contract, Case(late, State())) == ["phase", "expires", "signatures"]


def test_nothing_is_allowed_by_default() -> None:
    contract = example(XRAY)
    request = Request("serve", "read", "detector", "", "", Claims(kind="tee", tee=""))
    assert not decide(contract, request, State()).allowed
    assert "expires" in wheres(contract, Case(request, State()))


@pytest.mark.parametrize(("days", "ok"), [(0, True), (1, False)])
def test_the_last_day_counts(days: int, ok: bool) -> None:
    contract, case = example(XRAY), find(XRAY, "serve", "read", "detector")
    request = replace(case.request, today=contract.expires + timedelta(days=days))
    assert decide(contract, request, case.state).allowed is ok


@pytest.mark.parametrize(
    ("used", "used_today", "where"),
    [
        (99_999, 4_999, None),
        (100_000, 0, "phase.serve.answer.budget"),
        (0, 5_000, "phase.serve.answer.per_day"),
        (100_001, 0, "phase.serve.answer.budget"),
    ],
)
def test_the_last_answer_of_a_budget(used: int, used_today: int, where: str | None) -> None:
    case = find(ACME, "serve", "answer")
    state = replace(case.state, used=used, used_today=used_today)
    assert wheres(example(ACME), Case(case.request, state)) == ([where] if where else [])


@pytest.mark.parametrize(("day", "ok"), [(date(2026, 7, 31), False), (date(2026, 8, 1), True)])
def test_the_month_of_the_firmware(day: date, ok: bool) -> None:
    case = find(XRAY, "serve", "read", "detector")
    request = replace(case.request, claims=replace(case.request.claims, tcb_date=day))
    assert decide(example(XRAY), request, case.state).allowed is ok


def test_a_signature_of_a_stranger_does_not_count() -> None:
    case = find(XRAY, "serve", "read", "detector")
    state = State(frozenset({"hospital", "clinic", "eve"}))
    assert wheres(example(XRAY), Case(case.request, state)) == ["signatures"]


def test_secret_code_is_read_by_its_own_phase_only() -> None:
    contract = example(ACME)
    train, serve = find(ACME, "train", "read", "automl"), find(ACME, "serve", "read", "model")
    assert decide(contract, train.request, train.state).allowed
    assert wheres(contract, Case(replace(serve.request, asset="automl"), serve.state)) == ["phase.serve.read"]
    # code that is not secret has no key
    assert wheres(contract, Case(replace(serve.request, asset="query"), serve.state)) == ["phase.serve.read"]


def test_an_he_place_never_gets_a_key() -> None:
    contract, case = example(BANKS), find(BANKS, "refine", "read", "fraud-net")
    assert contract.key_place("refine") == "enclave"
    worker = Claims(kind="he", tee="", debug=False, scheme="ckks-128")
    assert appraise(worker, compile_place(contract, "cipher")) == ()  # the worker itself is what the contract wants
    for op in ("read", "write"):
        found = decide(contract, replace(case.request, op=op, claims=worker), case.state)
        assert found.reasons[0].where == "place.cipher"
        assert not found.allowed


@pytest.mark.parametrize("accept", ["sgx", "tdx", "sev-snp", "nitro"])
def test_no_hardware_entry_admits_a_soft_tee(accept: str) -> None:
    contract = changed(XRAY, ('["tdx", "sev-snp", "sgx"]', f'["{accept}"]'))
    case = find(XRAY, "serve", "read", "detector")
    soft = replace(case.request.claims, tee=f"soft-{accept}")
    assert wheres(contract, Case(replace(case.request, claims=soft), case.state)) == ["place.enclave.accept"]


def test_simulated_admits_soft_tees_and_nothing_else() -> None:
    contract = changed(XRAY, ('["tdx", "sev-snp", "sgx"]', '["simulated"]'))
    case = find(XRAY, "serve", "read", "detector")
    for tee, ok in (("soft-tdx", True), ("soft-sgx", True), ("tdx", False), ("simulated", False), ("", False)):
        request = replace(case.request, claims=replace(case.request.claims, tee=tee))
        assert decide(contract, request, case.state).allowed is ok, tee


def test_an_attested_host_is_never_soft() -> None:
    case = find(XRAY, "train", "read", "xrays")
    soft = replace(case.request.claims, tee="soft-tpm")
    assert wheres(example(XRAY), Case(replace(case.request, claims=soft), case.state)) == ["place.gpu-host.kind"]


def test_files_of_a_host_must_be_measured() -> None:
    case = find(XRAY, "train", "read", "xrays")
    for measurements in ({}, {"ima-signer": b"\0" * 32}):
        request = replace(case.request, claims=replace(case.request.claims, measurements=measurements))
        assert wheres(example(XRAY), Case(request, case.state)) == ["place.gpu-host.ima-signer"]


def test_reference_values_of_the_relying_party_add_to_the_place() -> None:
    contract, case = example(XRAY), find(XRAY, "train", "read", "xrays")
    signer = case.request.claims.measurements["ima-signer"]
    for wanted, refused in (
        ({"mrtd": frozenset({b"m"})}, ["place.gpu-host.mrtd"]),
        ({"ima-signer": frozenset({signer})}, []),
        ({"ima-signer": frozenset({b"other"})}, ["place.gpu-host.ima-signer"]),  # both lists, so nothing is left
    ):
        decision = decide(contract, case.request, case.state, reference_values=wanted)
        assert [reason.where for reason in decision.reasons] == refused


def test_a_confidential_gpu_is_demanded() -> None:
    contract = changed(XRAY, ('min_tcb = "2026-08"', 'min_tcb = "2026-08", gpu = "confidential"'))
    case = find(XRAY, "serve", "read", "detector")
    assert wheres(contract, case) == ["place.enclave.gpu"]
    request = replace(case.request, claims=claims(contract, "serve"))
    assert wheres(contract, Case(request, case.state)) == []


def test_places_compile_once_and_unknown_ones_are_a_callers_mistake() -> None:
    contract = example(XRAY)
    assert compile_place(contract, "enclave") is compile_place(contract, "enclave")
    with pytest.raises(ValueError, match="no place"):
        compile_place(contract, "cellar")


@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.parametrize("step", SINGLE_STEPS, ids=lambda step: step.label)
def test_a_step_to_the_worse_is_refused(name: str, case: Case, step: Step) -> None:
    worse = one_step_away(example(name), case, step)
    if worse is not None:
        assert not decide(example(name), worse.request, worse.state).allowed


# without the phase nothing else can be compared, so that step hides the others
FIELD_STEPS = [step for step in SINGLE_STEPS if step.field != "phase"]


@given(st.sampled_from(CASES), st.lists(st.sampled_from(FIELD_STEPS), min_size=1, max_size=4))
def test_reasons_only_grow_when_more_is_wrong(start: tuple[str, Case], steps: list[Step]) -> None:
    name, case = start
    contract = example(name)
    before = 0
    seen: set[str] = set()
    for step in steps:
        worse = one_step_away(contract, case, step)
        if worse is None or step.field in seen:
            continue
        seen.add(step.field)
        case = worse
        now = len(decide(contract, case.request, case.state).reasons)
        assert now >= before
        before = now


@given(
    st.sampled_from(CASES), st.frozensets(st.sampled_from(["hospital", "vendor", "north", "south", "auditor", "acme"]))
)
def test_more_signatures_never_take_away_a_yes(start: tuple[str, Case], signed: frozenset[str]) -> None:
    name, case = start
    some = decide(example(name), case.request, replace(case.state, signed=signed))
    more = decide(example(name), case.request, replace(case.state, signed=signed | case.state.signed))
    assert len(more.reasons) <= len(some.reasons)
    assert more.allowed


def test_the_deciding_modules_touch_no_file_clock_network_or_randomness() -> None:
    forbidden = {
        "os",
        "pathlib",
        "socket",
        "ssl",
        "time",
        "random",
        "secrets",
        "subprocess",
        "http",
        "urllib",
        "tempfile",
        "io",
    }
    folder = Path(cloister.contract.__file__).parent
    checked = 0
    for path in sorted(folder.glob("*.py")):
        if path.name == "edge.py":
            continue
        checked += 1
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            for name in names:
                assert name.split(".")[0] not in forbidden, f"{path.name} imports {name}"
                assert not name.startswith("cloister.contract.edge"), path.name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"open", "date.today", "datetime.now", "datetime.utcnow"}, f"{path.name}: {called}"
    assert checked >= 8
