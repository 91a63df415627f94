"""Decide one request under one contract: a pure function that returns every reason for a no.

Rules, in this order; all broken ones are reported:
   1 phase       the contract has it; without it rules 4 to 9 have nothing to compare with
   2 expires     `today` is not after the last day
   3 signatures  every owner touched by the contract signed these bytes, or the phase runs on a successor verdict
   4 run         the measured code is the one that the phase runs
   5 sandbox     its confinement is the one that the code entry demands
   6 asset       `read` or `write` lists it (secret code is read by the phase that runs it); `answer` exists
   7 debug       first rule of the appraisal
   8 place       the rest of `cloister.attestation.appraise`: kind, type, TCB, switches, machines, GPUs, boot, scheme,
                 reference values, software
   9 answer      the consumer is listed; `budget` and `per_day` are not used up
Default deny: whatever no rule lists is refused. There is one policy engine: `compile_place` turns a place into the
attestation policy, and rules 7 and 8 are that engine's. Keys of a phase at an `he` place are released to evidence of its
`refresh` place only; evidence of kind `he` never gets a key.
Signatures, evidence and counters were checked by the caller; `State` is what came out of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from types import MappingProxyType
from typing import Final, Literal, TypeVar, assert_never

from cloister.attestation.appraise import appraise
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.token.format import Named, only
from cloister.attestation.types import Claims, LogRule, Policy, Software
from cloister.contract.model import (
    Build,
    Contract,
    FileList,
    HePlace,
    HostPlace,
    Phase,
    Platforms,
    SignedBy,
    TeePlace,
    key_bytes,
    vouched_gpu,
)
from cloister.errors import Reason

Operation = Literal["read", "write", "answer"]

T = TypeVar("T", int, bool)

IMA_SIGNER: Final = "ima-signer"
"""Measurement of an attested host: SHA-256 fingerprint (32 bytes) of the SSH key that signed every file that ran."""
IMA_LIST: Final = "ima-list"
"""Measurement of an attested host: SHA-256 (32 bytes) of the list that holds every file that ran."""

NO_REFERENCE_VALUES: Final[Mapping[str, frozenset[bytes]]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Request:
    """What a node or a query service asks for. Everything but `asset` and `party` comes from evidence."""

    phase: str
    op: Operation
    asset: str
    """The asset to read or write; empty for `answer`."""
    code: str
    """Digest of the measured workload."""
    sandbox: str
    claims: Claims
    party: str = ""
    """The consumer of an answer; empty otherwise."""
    today: date = date.max
    """UTC day of the decision; the default is after every contract."""


@dataclass(frozen=True, slots=True)
class State:
    """What the broker knows: who signed these contract bytes, and how many answers this consumer got."""

    signed: frozenset[str] = frozenset()
    """Names of parties whose signature over the contract bytes was verified."""
    used: int = 0
    """Answers that the consumer got in total, in this contract."""
    used_today: int = 0
    inherited: frozenset[str] = frozenset()
    """Phases that a successor verdict lets run before everybody signed (`change.Verdict.phases`)."""


@dataclass(frozen=True, slots=True)
class Decision:
    allowed: bool
    reasons: tuple[Reason, ...]


def decide(
    contract: Contract,
    request: Request,
    state: State,
    *,
    reference_values: Mapping[str, frozenset[bytes]] = NO_REFERENCE_VALUES,
) -> Decision:
    """Return whether `contract` allows `request`, with every broken rule.

    `reference_values` are measurements that the relying party wants of every node besides what the place says, such as
    the launch measurement of its own node software.
    """
    reasons: list[Reason] = []
    phase = contract.phase.get(request.phase)

    if phase is None:  # (1)
        reasons.append(Reason("phase", repr(request.phase), " or ".join(contract.phase)))

    if request.today > contract.expires:  # (2)
        reasons.append(Reason("expires", f"today {request.today}", f"a day up to {contract.expires}"))

    if not contract.signers <= state.signed and request.phase not in state.inherited:  # (3)
        missing = ", ".join(sorted(contract.signers - state.signed))
        signed = ", ".join(sorted(contract.signers & state.signed)) or "nobody"
        wanted = ", ".join(sorted(contract.signers))
        reasons.append(Reason("signatures", signed, wanted, f"waiting for {missing}"))

    if phase is not None:
        _code(contract, phase, request, reasons)
        _asset(contract, phase, request, reasons)
        _place(contract, phase, request, reference_values, reasons)
        if request.op == "answer":
            _answer(phase, request, state, reasons)
    return Decision(not reasons, tuple(reasons))


def _code(contract: Contract, phase: Phase, request: Request, reasons: list[Reason]) -> None:
    code = contract.code[phase.run]
    if request.code != code.digest:  # (4)
        known = next((name for name, other in contract.code.items() if other.digest == request.code), None)
        if known is None:
            hint = "if this code is yours, propose it in a new version of the contract"
        elif any(other.run == known for other in contract.phase.values()):
            hint = f"that is {known!r}, allowed in another phase only"
        else:
            hint = f"that is {known!r}, which no phase runs"
        reasons.append(
            Reason(f"phase.{request.phase}.run", request.code or "no code", f"{phase.run!r} {code.digest}", hint)
        )
    if request.sandbox != code.sandbox:  # (5)
        reasons.append(Reason(f"code.{phase.run}.sandbox", repr(request.sandbox), repr(code.sandbox)))


def _asset(contract: Contract, phase: Phase, request: Request, reasons: list[Reason]) -> None:
    # (6)
    here = f"phase.{request.phase}"
    match request.op:
        case "read":
            own_code = request.asset == phase.run and contract.code[phase.run].secret
            if request.asset not in phase.read and not own_code:
                reasons.append(Reason(f"{here}.read", repr(request.asset), ", ".join(phase.read)))
        case "write":
            if request.asset not in phase.write:
                reasons.append(Reason(f"{here}.write", repr(request.asset), ", ".join(phase.write) or "nothing"))
        case "answer":
            if phase.answer is None:
                reasons.append(Reason(f"{here}.answer", "a request for an answer", "no answers: the phase gives none"))
        case never:
            assert_never(never)


def _place(
    contract: Contract,
    phase: Phase,
    request: Request,
    reference_values: Mapping[str, frozenset[bytes]],
    reasons: list[Reason],
) -> None:
    # (7) (8)
    name = contract.key_place(request.phase)
    if request.claims.kind == "he":
        hint = "an he place computes on ciphertext; it never gets a key"
        reasons.append(Reason(f"place.{phase.at}", "evidence of kind he", f"evidence of place {name!r}", hint))
    policy = compile_place(contract, name)
    if reference_values:
        policy = replace(policy, reference_values=_both(policy.reference_values, reference_values))
    found = appraise(request.claims, policy, today=request.today)
    # an he place has no `accept` list, so nothing there can name `simulated`
    if policy.kind == "he" and request.claims.soft:
        reasons.append(Reason(f"{policy.where}.kind", request.claims.tee, "hardware: soft evidence protects nothing"))
    reasons.extend(found)


def _answer(phase: Phase, request: Request, state: State, reasons: list[Reason]) -> None:
    # (9)
    answer = phase.answer
    if answer is None:
        return
    here = f"phase.{request.phase}.answer"
    if request.party not in answer.to:
        reasons.append(Reason(f"{here}.to", repr(request.party), " or ".join(answer.to)))
    if answer.budget is not None and state.used >= answer.budget:
        reasons.append(Reason(f"{here}.budget", f"{state.used} answers given", f"at most {answer.budget}"))
    if answer.per_day is not None and state.used_today >= answer.per_day:
        wanted = f"at most {answer.per_day} a day"
        reasons.append(
            Reason(f"{here}.per_day", f"{state.used_today} answers today", wanted, "ask again tomorrow (UTC)")
        )


def _both(
    first: Mapping[str, frozenset[bytes]], second: Mapping[str, frozenset[bytes]]
) -> Mapping[str, frozenset[bytes]]:
    names = (*first, *(name for name in second if name not in first))
    return {
        name: first.get(name, second.get(name, frozenset())) & second.get(name, first.get(name, frozenset()))
        for name in names
    }


@lru_cache(maxsize=1024)
def compile_place(contract: Contract, place: str) -> Policy:
    """Return the appraisal policy of `place`; pure, and cached by contract id.

    `files` of an attested host becomes a reference value, so a verifier that does not measure files cannot satisfy it.

    Raises:
        ValueError: the contract has no such place.
    """
    if place not in contract.place:
        raise ValueError(f"contract {contract.name} has no place {place!r}")
    where = f"place.{place}"
    match contract.place[place]:
        case TeePlace() as tee:
            policy = Policy(
                where,
                kind="tee",
                accept=frozenset((*tee.accept, *map(vouched_gpu, tee.gpu_authorities or ()))),
                min_tcb=tee.min_tcb,
                max_tcb_age=tee.max_tcb_age,
                deny_advisories=frozenset(tee.deny_advisories or ()),
                min_svn=_by_name(tee.min_svn),
                require=_by_name(tee.require),
                gpu=tee.gpu,
                gpu_allow=None if tee.gpus is None else _pairs(tee.gpus.allow),
                software=tuple(_build(build) for build in tee.software),
                debug=tee.debug,
            )
            if tee.tcb is not None:
                policy = replace(policy, tcb_statuses=frozenset(tee.tcb))
            return _machines(policy, tee.platforms)
        case HostPlace() as host:
            policy = Policy(
                where,
                kind="attested-host",
                accept=frozenset(host.accept),
                boot=frozenset(host.boot),
                debug=host.debug,
                reference_values=_file_rule(contract, host),
            )
            return _machines(policy, host.platforms)
        case HePlace() as he:
            return Policy(where, kind="he", scheme=he.scheme, debug=he.debug)
        case never:
            assert_never(never)


def endorsed(endorsements: Endorsements, contract: Contract | None) -> Endorsements:
    """Return `endorsements` with the authorities of `contract` and no others: whose tokens count is said by the parties of a
    contract, never by whoever keeps the collateral. None: no authority at all."""
    return only(endorsements, () if contract is None else _authorities(contract))


@lru_cache(maxsize=1024)
def _authorities(contract: Contract) -> tuple[Endorsement, ...]:
    return tuple(
        Named(entry.kind, entry.issuer, frozenset(entry.jwks), entry.audience).endorsement(name)
        for name, entry in contract.authorities.items()
    )


def _machines(policy: Policy, platforms: Platforms | None) -> Policy:
    if platforms is None:
        return policy
    allow = None if platforms.allow is None else _pairs(platforms.allow)
    return replace(policy, platform_allow=allow, platform_deny=_pairs(platforms.deny or ()))


_SERIALS: Final = frozenset({"ueid", "device_key"})
"""Ids that are serial numbers: evidence has them without zeros in front, and other tools write whole bytes."""


def _pairs(ids: Iterable[str]) -> frozenset[tuple[str, str]]:
    pairs = ((name, value) for name, _, value in (each.partition(":") for each in ids))
    return frozenset((name, value.lstrip("0") or "0" if name in _SERIALS else value) for name, value in pairs)


def _by_name(rules: Mapping[str, Mapping[str, T]] | None) -> Mapping[str, Mapping[str, T]]:
    return MappingProxyType(dict(rules or {}))


def _build(build: Build) -> Software:
    return Software(
        label=build.label,
        tee=build.tee or "",
        measurements=MappingProxyType(
            {name: frozenset(map(bytes.fromhex, values)) for name, values in (build.measurements or {}).items()}
        ),
        svns_equal=build.svns_equal or MappingProxyType({}),
        svns_least=build.svns_least or MappingProxyType({}),
        log=tuple(
            LogRule(rule.index, frozenset(map(bytes.fromhex, rule.digests)), only=rule.only) for rule in build.log
        ),
    )


def _file_rule(contract: Contract, host: HostPlace) -> Mapping[str, frozenset[bytes]]:
    match host.files:
        case None:
            return NO_REFERENCE_VALUES
        case SignedBy(party):
            return MappingProxyType({IMA_SIGNER: frozenset({key_bytes(contract.party[party])})})
        case FileList(digest):
            return MappingProxyType({IMA_LIST: frozenset({bytes.fromhex(digest.removeprefix("sha256:"))})})
        case never:
            assert_never(never)
