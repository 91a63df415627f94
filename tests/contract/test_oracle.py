"""A second opinion: contracts as Cedar policies, judged by cedarpy, against `decide` on requests around the border.

The translation below is written from docs/contract.md, not from `decide`. Cedar is a test dependency only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date, timedelta
from functools import cache

import cedarpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.contract import Contract, Decision, Request, State, decide
from cloister.contract.decide import Operation
from cloister.contract.model import FileList, HostPlace, SignedBy, TeePlace, key_bytes
from tests.contract.samples import NAMES, Case, allowed, changed, example
from tests.contract.steps import SINGLE_STEPS, Step, one_step_away

Decide = Callable[[Contract, Request, State], Decision]


def quoted(value: str) -> str:
    return json.dumps(value)


def a_set(values: object) -> str:
    assert isinstance(values, frozenset | tuple)
    return "[" + ", ".join(quoted(value) for value in sorted(values)) + "]"


def month(year: int, number: int) -> int:
    return year * 12 + number


def cedar_text(contract: Contract) -> str:
    """One `permit` for every grant of every phase; Cedar denies the rest."""
    policies = []
    for name, phase in contract.phase.items():
        code = contract.code[phase.run]
        place = contract.place[contract.key_place(name)]
        when = [
            f"context.phase == {quoted(name)}",
            f"context.today <= {contract.expires.toordinal()}",
            f"context.signed.containsAll({a_set(contract.signers)})",
            f"context.code == {quoted(code.digest)}",
            f"context.sandbox == {quoted(code.sandbox)}",
        ]
        if not place.debug:
            when.append("!context.debug")
        if isinstance(place, TeePlace):
            hardware = frozenset(place.accept) - {"simulated"}
            soft = "true" if "simulated" in place.accept else "false"
            when += [
                'context.kind == "tee"',
                f"(if context.soft then {soft} else {a_set(hardware)}.contains(context.tee))",
                '["UpToDate", "SWHardeningNeeded"].contains(context.tcb_status)',
            ]
            if place.min_tcb is not None:
                when.append(f"context.tcb_month >= {month(*place.min_tcb)}")
            if place.gpu == "confidential":
                when.append('context.gpu == "confidential"')
        else:
            assert isinstance(place, HostPlace)
            hardware = frozenset(place.accept) - {"simulated"}
            soft = "true" if "simulated" in place.accept else "false"
            when += [
                'context.kind == "attested-host"',
                f"(if context.soft then {soft} else {a_set(hardware)}.contains(context.tee))",
                f"{a_set(place.boot)}.contains(context.boot)",
            ]
            if isinstance(place.files, SignedBy):
                when.append(f"context.ima_signer == {quoted(key_bytes(contract.party[place.files.party]).hex())}")
            if isinstance(place.files, FileList):
                when.append(f"context.ima_list == {quoted(place.files.digest[7:])}")
        grants: list[tuple[str, str, list[str]]] = []
        grants += (("read", asset, []) for asset in phase.read)
        grants += (("write", asset, []) for asset in phase.write)
        if code.secret:
            grants.append(("read", phase.run, []))
        if phase.answer is not None:
            limits = [f"{a_set(phase.answer.to)}.contains(context.party)"]
            if phase.answer.budget is not None:
                limits.append(f"context.used < {phase.answer.budget}")
            if phase.answer.per_day is not None:
                limits.append(f"context.used_today < {phase.answer.per_day}")
            grants.append(("answer", "", limits))
        for op, asset, more in grants:
            conditions = " && ".join(when + more)
            head = f'principal, action == Action::"{op}", resource == Asset::{quoted(asset)}'
            policies.append(f"permit({head}) when {{ {conditions} }};")
    return "\n".join(policies)


def cedar_request(case: Case) -> dict[str, object]:
    request, state, claims = case.request, case.state, case.request.claims
    day = claims.tcb_date
    return {
        "principal": {"type": "Node", "id": "node"},
        "action": {"type": "Action", "id": request.op},
        "resource": {"type": "Asset", "id": "" if request.op == "answer" else request.asset},
        "context": {
            "phase": request.phase,
            "today": request.today.toordinal(),
            "signed": sorted(state.signed),
            "code": request.code,
            "sandbox": request.sandbox,
            "debug": claims.debug,
            "kind": claims.kind,
            "soft": claims.tee.startswith("soft-"),
            "tee": claims.tee,
            "tcb_status": claims.tcb_status,
            "tcb_month": month(day.year, day.month) if day is not None else -1,
            "gpu": claims.gpu,
            "boot": claims.boot or "",
            "ima_signer": claims.measurements.get("ima-signer", b"").hex(),
            "ima_list": claims.measurements.get("ima-list", b"").hex(),
            "party": request.party,
            "used": state.used,
            "used_today": state.used_today,
        },
    }


@cache
def policies(contract: Contract) -> cedarpy.PolicySet:
    return cedarpy.PolicySet.from_str(cedar_text(contract))


NO_ENTITIES = cedarpy.Entities.from_json_str("[]")


def cedar(contract: Contract, cases: list[Case]) -> list[bool]:
    results = cedarpy.is_authorized_batch([cedar_request(case) for case in cases], policies(contract), NO_ENTITIES)
    for result in results:
        assert not result.diagnostics.errors, result.diagnostics.errors
    return [bool(result.allowed) for result in results]


def differences(contract: Contract, cases: list[Case], judge: Decide) -> list[Case]:
    ours = [judge(contract, case.request, case.state).allowed for case in cases]
    return [case for case, mine, theirs in zip(cases, ours, cedar(contract, cases), strict=True) if mine != theirs]


CONTRACTS = [
    *(example(name) for name in NAMES),
    changed(
        NAMES[0], ('"tdx", "sev-snp", "sgx"', '"sgx", "simulated"'), ('files = "signed-by:vendor"', "debug = true")
    ),
    changed(NAMES[2], ('min_tcb = "2026-08"', 'debug = true, gpu = "confidential"')),
]
"""The examples, and variants with the values that they do not use."""


def directed(contract: Contract) -> list[Case]:
    """Every allowed case, every single step from it, and the good side of each border."""
    cases = []
    for case in allowed(contract):
        cases.append(case)
        cases += [worse for step in SINGLE_STEPS if (worse := one_step_away(contract, case, step)) is not None]
        cases.append(replace(case, request=replace(case.request, today=contract.expires), label="the last day"))
        answer = contract.phase[case.request.phase].answer
        if case.request.op == "answer" and answer is not None:
            state = replace(case.state, used=(answer.budget or 10) - 1, used_today=(answer.per_day or 10) - 1)
            cases.append(replace(case, state=state, label="the last answer"))
    return cases


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_cedar_agrees_on_every_single_step(contract: Contract) -> None:
    cases = directed(contract)
    assert [case.label for case in differences(contract, cases, decide)] == []
    verdicts = cedar(contract, cases)
    assert any(verdicts)
    assert not all(verdicts)


OPERATIONS: tuple[Operation, ...] = ("read", "write", "answer")
DAYS = st.sampled_from([date(2026, 7, 31), date(2026, 8, 1), date(2026, 8, 31), date(2025, 12, 1), date(2027, 1, 1)])


@st.composite
def near(draw: st.DrawFn, contract: Contract) -> Case:
    """An allowed case, then up to two steps, then values redrawn around their borders."""
    case = draw(st.sampled_from(list(allowed(contract))))
    steps: list[Step] = draw(st.lists(st.sampled_from(SINGLE_STEPS), max_size=2))
    for step in steps:
        case = one_step_away(contract, case, step) or case
    request, state = case.request, case.state
    match draw(st.integers(0, 7)):
        case 0:
            request = replace(request, today=contract.expires + timedelta(days=draw(st.integers(-1, 1))))
        case 1:
            state = replace(state, signed=draw(st.frozensets(st.sampled_from(sorted(contract.party)))))
        case 2 if request.claims.kind == "tee":
            request = replace(request, claims=replace(request.claims, tcb_date=draw(DAYS)))
        case 3:
            tee = draw(st.sampled_from(["sgx", "tdx", "sev-snp", "nitro", "soft-tdx", "soft-sgx", "simulated", ""]))
            request = replace(request, claims=replace(request.claims, tee=tee))
        case 4:
            answer = contract.phase[request.phase].answer if request.phase in contract.phase else None
            border = (answer and (answer.budget or answer.per_day)) or 5
            used, today = (
                draw(st.integers(border - 1, border + 1)),
                draw(st.integers(0, 3) | st.integers(border - 1, border + 1)),
            )
            state = replace(state, used=used, used_today=today)
        case 5:
            op = draw(st.sampled_from(OPERATIONS))
            request = replace(request, op=op, asset="" if op == "answer" else request.asset)
        case 6:
            names = sorted({*contract.data, *contract.stream, *contract.outputs, *contract.code})
            request = replace(request, asset="" if request.op == "answer" else draw(st.sampled_from(names)))
        case _:
            status = draw(st.sampled_from(["UpToDate", "SWHardeningNeeded", "OutOfDate", "Revoked", ""]))
            request = replace(request, claims=replace(request.claims, tcb_status=status))
    return Case(request, state, "drawn")


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_cedar_agrees_on_drawn_requests(contract: Contract, data: st.DataObject) -> None:
    cases = data.draw(st.lists(near(contract), min_size=10, max_size=14))
    assert differences(contract, cases, decide) == []


def forgetting(rule: str) -> Decide:
    """`decide` with one rule left out."""

    def judge(contract: Contract, request: Request, state: State) -> Decision:
        kept = tuple(reason for reason in decide(contract, request, state).reasons if not reason.where.endswith(rule))
        return Decision(not kept, kept)

    return judge


def off_by_one_budget(contract: Contract, request: Request, state: State) -> Decision:
    return decide(contract, request, replace(state, used=max(state.used - 1, 0)))


def off_by_one_day_budget(contract: Contract, request: Request, state: State) -> Decision:
    return decide(contract, request, replace(state, used_today=state.used_today + 1))


def off_by_one_expiry(contract: Contract, request: Request, state: State) -> Decision:
    return decide(contract, replace(request, today=request.today + timedelta(days=1)), state)


def off_by_one_month(contract: Contract, request: Request, state: State) -> Decision:
    day = request.claims.tcb_date
    earlier = day.replace(day=1) - timedelta(days=1) if day is not None else None
    return decide(contract, replace(request, claims=replace(request.claims, tcb_date=earlier)), state)


def soft_is_hard(contract: Contract, request: Request, state: State) -> Decision:
    return decide(
        contract, replace(request, claims=replace(request.claims, tee=request.claims.tee.removeprefix("soft-"))), state
    )


SEEDED: list[Decide] = [
    *(
        forgetting(rule)
        for rule in (
            "expires",
            "signatures",
            ".run",
            ".sandbox",
            ".read",
            ".write",
            ".debug",
            ".accept",
            ".tcb_status",
            ".min_tcb",
            ".boot",
            ".ima-signer",
            ".to",
            ".budget",
            ".per_day",
        )
    ),
    off_by_one_budget,
    off_by_one_day_budget,
    off_by_one_expiry,
    off_by_one_month,
    soft_is_hard,
]


@pytest.mark.parametrize("bug", SEEDED)
def test_the_oracle_catches_seeded_bugs(bug: Decide) -> None:
    assert any(differences(contract, directed(contract), bug) for contract in CONTRACTS)
