"""Steps from an allowed request to a refused one: each makes one thing worse, boundaries included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date, timedelta

from cloister.attestation.types import Claims
from cloister.contract import Contract
from tests.contract.samples import Case

Change = Callable[[Contract, Case], Case | None]


@dataclass(frozen=True)
class Step:
    """`change` returns the worse case, or None where the contract has no such rule for this request."""

    field: str
    label: str
    change: Change


def _claims(change: Callable[[Contract, Case], Claims | None]) -> Change:
    def apply(contract: Contract, case: Case) -> Case | None:
        claims = change(contract, case)
        return None if claims is None else replace(case, request=replace(case.request, claims=claims))

    return apply


def _place(contract: Contract, case: Case) -> object:
    return contract.place[contract.key_place(case.request.phase)]


def _kind(case: Case) -> str:
    return case.request.claims.kind


def _on_tee(change: Callable[[Claims], Claims]) -> Change:
    return _claims(lambda contract, case: change(case.request.claims) if _kind(case) == "tee" else None)


def _on_host(change: Callable[[Claims], Claims]) -> Change:
    return _claims(lambda contract, case: change(case.request.claims) if _kind(case) == "attested-host" else None)


def _other_code(contract: Contract, case: Case) -> Case | None:
    others = [code.digest for code in contract.code.values() if code.digest != case.request.code]
    return replace(case, request=replace(case.request, code=others[0])) if others else None


def _unknown_code(contract: Contract, case: Case) -> Case:
    last = "0" if case.request.code[-1] != "0" else "1"
    return replace(case, request=replace(case.request, code=case.request.code[:-1] + last))


def _sandbox(contract: Contract, case: Case) -> Case:
    other = "offline" if case.request.sandbox != "offline" else "none"
    return replace(case, request=replace(case.request, sandbox=other))


def _no_signature(contract: Contract, case: Case) -> Case:
    return replace(case, state=replace(case.state, signed=case.state.signed - {min(contract.signers)}))


def _expired(contract: Contract, case: Case) -> Case:
    return replace(case, request=replace(case.request, today=contract.expires + timedelta(days=1)))


def _other_asset(contract: Contract, case: Case) -> Case | None:
    phase = contract.phase[case.request.phase]
    listed = {"read": set(phase.read), "write": set(phase.write), "answer": set()}[case.request.op]
    others = sorted({*contract.data, *contract.stream, *contract.outputs} - listed)
    if case.request.op == "answer" or not others:
        return None
    return replace(case, request=replace(case.request, asset=others[0]))


def _unknown_asset(contract: Contract, case: Case) -> Case | None:
    return None if case.request.op == "answer" else replace(case, request=replace(case.request, asset="x"))


def _unknown_phase(contract: Contract, case: Case) -> Case:
    other = next((name for name in ("train", "refine", "serve") if name not in contract.phase), "deploy")
    return replace(case, request=replace(case.request, phase=other))


def _stranger(contract: Contract, case: Case) -> Case | None:
    return replace(case, request=replace(case.request, party="eve")) if case.request.op == "answer" else None


def _budget(contract: Contract, case: Case) -> Case | None:
    answer = contract.phase[case.request.phase].answer
    if case.request.op != "answer" or answer is None or answer.budget is None:
        return None
    return replace(case, state=replace(case.state, used=answer.budget))


def _per_day(contract: Contract, case: Case) -> Case | None:
    answer = contract.phase[case.request.phase].answer
    if case.request.op != "answer" or answer is None or answer.per_day is None:
        return None
    return replace(case, state=replace(case.state, used_today=answer.per_day))


SINGLE_STEPS = (
    Step("phase", "a phase that is not there", _unknown_phase),
    Step("today", "the day after the last", _expired),
    Step("signed", "one signature is missing", _no_signature),
    Step("code", "code of another phase", _other_code),
    Step("code", "code with another last digit", _unknown_code),
    Step("sandbox", "another sandbox", _sandbox),
    Step("asset", "an asset that is not listed", _other_asset),
    Step("asset", "an asset that does not exist", _unknown_asset),
    Step("debug", "debug on", _claims(lambda contract, case: replace(case.request.claims, debug=True))),
    Step("kind", "another kind of place", _on_tee(lambda claims: replace(claims, kind="attested-host"))),
    Step("kind", "a TEE for a host", _on_host(lambda claims: replace(claims, kind="tee"))),
    Step("kind", "evidence of kind he", _claims(lambda contract, case: replace(case.request.claims, kind="he"))),
    Step("tee", "a TEE that is not listed", _on_tee(lambda claims: replace(claims, tee="nitro"))),
    Step("tee", "a soft TEE", _on_tee(lambda claims: replace(claims, tee=f"soft-{claims.tee}"))),
    Step("tee", "a soft TPM", _on_host(lambda claims: replace(claims, tee="soft-tpm"))),
    Step("tee", "no TEE", _on_tee(lambda claims: replace(claims, tee=""))),
    Step(
        "tcb_date", "firmware of the month before", _on_tee(lambda claims: replace(claims, tcb_date=date(2026, 7, 31)))
    ),
    Step("tcb_date", "firmware of no known date", _on_tee(lambda claims: replace(claims, tcb_date=None))),
    Step("tcb_status", "firmware out of date", _on_tee(lambda claims: replace(claims, tcb_status="OutOfDate"))),
    Step("boot", "another boot state", _on_host(lambda claims: replace(claims, boot="sha256:" + "0" * 64))),
    Step("boot", "no boot state", _on_host(lambda claims: replace(claims, boot=None))),
    Step(
        "files", "files of another signer", _on_host(lambda claims: replace(claims, measurements={"ima-signer": b"x"}))
    ),
    Step("files", "files not measured", _on_host(lambda claims: replace(claims, measurements={}))),
    Step("party", "a consumer who is not listed", _stranger),
    Step("used", "the budget is used up", _budget),
    Step("used_today", "the day's budget is used up", _per_day),
)


def one_step_away(contract: Contract, case: Case, step: Step) -> Case | None:
    """Apply `step`; None where it does not apply (also when an earlier step took the phase away)."""
    if case.request.phase not in contract.phase:
        return None
    worse = step.change(contract, case)
    return None if worse is None else replace(worse, label=step.label)
