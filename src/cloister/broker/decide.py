"""Shall this node get these keys? Pure functions of the request, its evidence, and what the broker knows.

Steps of `release`, in this order; the code of the error is that of the first step that refused, its reasons are those
of all steps that could be judged:

  1 nonce      issued by this broker, not used before, at most 60 s old            `evidence-stale`
  2 authentic  attestation.verify: vendor's chain, signature, event log            stops: nothing else is known then
               (a token of an attestation service: under the authorities of this very contract, and no others)
  3 bound      report data == Binding(purpose, nonce, key, our TLS key, contract, phase, digest of the request, devices),
               and each device is bound to the same without devices
  4 software   the launch measurement of this hardware (`mrtd`, `mrenclave`, `measurement`, `pcr0`, ...) is an accepted
               node measurement; an empty list accepts nothing, and so does hardware without a launch measurement
  5 workload   exactly one workload event: code digest, sandbox, profile, level; the profile is this software's own of
               that name, and the level is one that the sandbox needs
  6 lease      (renew only) known, live, same key, same workload, same machine
  7 contract   known and active; contract.decide for every asset to read and to write: expiry, signatures, code,
               sandbox, asset, place
  8 keys       every asset to read has a key, deposited by its owner or made for an earlier phase
  9 fresh      a written asset is read at its registered root, never at an older one, and gets the next generation

Steps 1 to 5 are `EvidenceError`; 6 to 9 are `DeniedError`, with code `lease-refused` if step 6 refused; if nothing but
signatures is missing, `WaitingError`.
A lease ends when its evidence does, if that is earlier: when the first certificate or piece of collateral under it ends.
`answer` and `opened` judge the two requests that need no evidence of their own.
Budgets are judged here and spent by the store, which re-checks the number in its transaction.

Not checked on purpose: two live leases may write one asset; whoever registers second is refused (store), because
whether the first node still lives cannot be known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from cloister.attestation.appraise import appraise, identities
from cloister.attestation.binding import Binding, check_binding
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.events import Workload, workload_of
from cloister.attestation.roots import Roots
from cloister.attestation.types import Claims, Evidence, Policy
from cloister.attestation.verify import verify
from cloister.broker import wire
from cloister.broker.life import State as Life
from cloister.broker.life import on as state_on
from cloister.confine.profile import NAMES as PROFILES
from cloister.confine.profile import profile
from cloister.contract.decide import Request, State, endorsed
from cloister.contract.decide import decide as decide_contract
from cloister.contract.model import NOBODY, Contract
from cloister.errors import CloisterError, DeniedError, EvidenceError, Reason, WaitingError

NONCE_LIFE: Final = timedelta(seconds=60)
"""notes of RFC 9334 section 10.2: short enough that evidence is of now, long enough for a slow quote (TDX: < 1 s)."""
OPEN_LIFE: Final = timedelta(hours=24)
"""Longest validity of an owner's open statement: members of a board need a day to sign the same one."""


# --- what the broker knows --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trusted:
    """What this broker accepts of nodes: roots, collateral, launch measurements of node software on any hardware."""

    roots: Roots
    endorsements: Endorsements
    node_measurements: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class Known:
    """A contract that the broker holds: who signed its bytes, where it stands, phases a successor verdict lets run."""

    contract: Contract
    signed: frozenset[str]
    state: Life
    inherited: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Deposit:
    """A volume key that somebody deposited: his fingerprint, and the version it is for. The key itself is elsewhere."""

    owner: str
    generation: int
    volume_id: bytes


@dataclass(frozen=True, slots=True)
class Root:
    """The registered current version of a written asset."""

    digest: str
    generation: int


@dataclass(frozen=True, slots=True)
class Holdings:
    """Volume digest -> deposits, and asset -> root of the contract's written assets."""

    deposits: Mapping[str, tuple[Deposit, ...]]
    roots: Mapping[str, Root]


@dataclass(frozen=True, slots=True)
class LeaseFacts:
    """A lease: who holds it (SHA-256 of its HPKE key), for what, and the newest evidence seen of it.

    `profile` and `claims` are None after the broker restarted, until the lease is renewed.
    """

    contract: str
    phase: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    key_hash: bytes
    code: str
    sandbox: str
    level: str
    expires: datetime
    profile: bytes | None = None
    claims: Claims | None = None


# --- what comes out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read:
    """An asset to read: `depositor` is the fingerprint under which its key lies; None: the key of an output."""

    asset: str
    digest: str
    generation: int
    depositor: str | None


@dataclass(frozen=True, slots=True)
class Write:
    """An asset to write: the next generation, and the root that it follows."""

    asset: str
    owner: str
    generation: int
    previous: str | None


@dataclass(frozen=True, slots=True)
class Grant:
    """Everything holds. `expires` and `renew_after` are the lease's times."""

    claims: Claims
    workload: Workload
    reads: tuple[Read, ...]
    writes: tuple[Write, ...]
    expires: datetime
    renew_after: datetime


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something does not hold: the error for the node, and what of the evidence was authentic, for the log."""

    error: CloisterError
    claims: Claims | None = None
    workload: Workload | None = None


# --- release and renew ------------------------------------------------------------------------------------------------


def release(
    ask: wire.ReleaseAsk,
    evidence: Evidence,
    binding: Binding,
    *,
    nonce_issued: datetime | None,
    known: Known | None,
    holdings: Holdings,
    trusted: Trusted,
    lease: timedelta,
    now: datetime,
) -> Grant | Refusal:
    """Judge a release; `nonce_issued` is None for a nonce that was never issued or was used before.

    Raises:
        ValueError: `now` has no time zone (a caller's mistake).
    """
    extra = () if ask.reads or ask.writes else (Reason("request", "no assets", "at least one asset to read or write"),)
    return _judge(
        ask.contract, ask.phase, ask.reads, ask.writes, evidence, binding, nonce_issued, known, holdings, trusted, lease, now,
        held=None, asked=extra,
    )  # fmt: skip


def release_to(
    ask: wire.ReleaseAsk,
    claims: Claims,
    bound: Sequence[Reason],
    *,
    stale: tuple[Reason, ...],
    known: Known | None,
    holdings: Holdings,
    trusted: Trusted,
    lease: timedelta,
    now: datetime,
) -> Grant | Refusal:
    """Judge a release for `claims` that another door took (kbs/): it did steps 1 to 3 in its own protocol, and `stale` and
    `bound` are why they do not hold. Steps 4 to 9 are those of `release`."""
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    asked = () if ask.reads or ask.writes else (Reason("request", "no assets", "at least one asset to read or write"),)
    return _judge_claims(
        ask.contract, ask.phase, ask.reads, ask.writes, claims, bound, stale, known, holdings, trusted, lease, now,
        held=None, key=b"", asked=asked,
    )  # fmt: skip


def renew(
    held: LeaseFacts | None,
    evidence: Evidence,
    binding: Binding,
    *,
    nonce_issued: datetime | None,
    known: Known | None,
    holdings: Holdings,
    trusted: Trusted,
    lease: timedelta,
    now: datetime,
) -> Grant | Refusal:
    """Judge the renewal of `held`: every step of `release` again, and step 6."""
    if held is None:
        return Refusal(lease_unknown())
    return _judge(
        held.contract, held.phase, held.reads, held.writes, evidence, binding, nonce_issued, known, holdings, trusted, lease, now,
        held=held, asked=(),
    )  # fmt: skip


def _judge(
    contract_id: str,
    phase: str,
    reads: Sequence[str],
    writes: Sequence[str],
    evidence: Evidence,
    binding: Binding,
    nonce_issued: datetime | None,
    known: Known | None,
    holdings: Holdings,
    trusted: Trusted,
    lease: timedelta,
    now: datetime,
    *,
    held: LeaseFacts | None,
    asked: tuple[Reason, ...],
) -> Grant | Refusal:
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    stale = nonce_reasons(nonce_issued, now)  # 1
    try:
        collateral = endorsed(trusted.endorsements, None if known is None else known.contract)
        claims = verify(evidence, collateral, trusted.roots, now=now)  # 2
    except EvidenceError as error:
        code = "evidence-stale" if stale else error.code
        return Refusal(EvidenceError(error.message, code=code, reasons=(*stale, *error.reasons), hint=error.hint))

    bound = check_binding(claims, binding.over(evidence.devices))  # 3
    return _judge_claims(
        contract_id, phase, reads, writes, claims, bound, stale, known, holdings, trusted, lease, now,
        held=held, key=binding.key, asked=asked,
    )  # fmt: skip


def _judge_claims(
    contract_id: str,
    phase: str,
    reads: Sequence[str],
    writes: Sequence[str],
    claims: Claims,
    bound: Sequence[Reason],
    stale: tuple[Reason, ...],
    known: Known | None,
    holdings: Holdings,
    trusted: Trusted,
    lease: timedelta,
    now: datetime,
    *,
    held: LeaseFacts | None,
    key: bytes,
    asked: tuple[Reason, ...],
) -> Grant | Refusal:
    unacceptable = list(bound)
    unacceptable += appraise(claims, software_policy(claims, trusted))  # 4
    until = valid_until(claims)
    expires = now + lease if until is None else min(now + lease, until)
    if expires <= now:  # `verify` refuses what is over; this holds whatever a verifier forgets
        unacceptable.append(Reason("evidence.valid_until", wire.format_time(expires), f"after {wire.format_time(now)}"))
    workload: Workload | None = None
    try:
        workload = workload_of(claims)  # 5
        unacceptable += confinement(workload, claims)
    except EvidenceError as error:
        unacceptable += error.reasons
    denied = list(asked)
    if held is not None:
        denied += _same_lease(held, key, workload, claims, now)  # 6
    got: tuple[Read, ...] = ()
    made: tuple[Write, ...] = ()
    if known is None:  # 7
        denied.append(
            Reason(
                "contract", f"no contract {contract_id}", "a contract that was submitted", "`cloister contract submit`"
            )
        )
    else:
        denied += life_reasons(known, now)
        if workload is not None:
            denied += _contract(known, phase, reads, writes, workload, claims, now)
        got, read_reasons = _reads(known.contract, reads, holdings)  # 8, 9
        made, write_reasons = _writes(known.contract, writes, holdings)
        denied += read_reasons + write_reasons

    refused = _error(stale, _once(unacceptable), _once(denied))
    if refused is not None or workload is None:
        return Refusal(refused or _lease_error(Reason("workload", "none", "one")), claims, workload)
    return Grant(claims, workload, got, made, expires, now + (expires - now) / 2)


def valid_until(claims: Claims) -> datetime | None:
    """Return when the first certificate or piece of collateral under `claims` or a device of it ends; None: never."""
    ends = [one.valid_until for one in (claims, *claims.devices) if one.valid_until is not None]
    return min(ends, default=None)


def nonce_reasons(issued: datetime | None, now: datetime) -> tuple[Reason, ...]:
    """Step 1."""
    if issued is None:
        return (Reason("nonce", "unknown, or used before", "a nonce of this broker, used once", "get a new nonce"),)
    if not timedelta(0) <= now - issued <= NONCE_LIFE:
        age = (now - issued).total_seconds()
        return (Reason("nonce", f"{age:.0f} s old", f"at most {NONCE_LIFE.seconds} s", "get a new nonce"),)
    return ()


def software_policy(claims: Claims, trusted: Trusted) -> Policy:
    """Return step 4 as a policy: which software may be a node at all."""
    # only the launch measurement is meant here; the contract's place judges the platform and its software (step 7)
    statuses = {claims.tcb_status, *(device.tcb_status for device in claims.devices)}
    return Policy(
        where="node",
        kind="tee" if claims.kind == "device" else claims.kind,  # a device alone is no node
        # which services count for a GPU is the place's business, too
        accept=frozenset({"simulated" if claims.soft else claims.tee, *(device.tee for device in claims.devices)}),
        debug=True,
        gpu="none",
        boot=frozenset() if claims.boot is None else frozenset({claims.boot}),
        scheme=claims.scheme,
        tcb_statuses=frozenset(statuses) - {""},
        reference_values={claims.launch or "launch": trusted.node_measurements if claims.launch else frozenset()},
    )


_LEAST_LEVEL: Final = {"offline": "L1", "one-shot": "L2", "sealed": "L3"}
"""The weakest jail for each sandbox: L1 lacks Landlock, L2 is the full jail on a plain host, L3 inside a VM TEE."""


def confinement(workload: Workload, claims: Claims) -> list[Reason]:
    """Return why the jail that the node measured is not the one that its sandbox name promises (part of step 5).

    A profile with other limits or rules has another digest, so a weaker one is refused however it calls itself. A soft
    TEE has no L3: where a contract names it, it may run `sealed` code at L2, which protects as little as the rest.
    """
    if workload.sandbox == "none":  # the contract's parties agreed to no confinement (contract.decide compares names)
        return []
    if workload.sandbox not in PROFILES:
        return [Reason("workload.sandbox", workload.sandbox, " or ".join(PROFILES))]
    reasons = []
    wanted = profile(workload.sandbox).digest()
    if workload.profile != wanted:
        hint = "the node runs another version of the software, or a weaker jail under this name"
        reasons.append(Reason("workload.profile", workload.profile.hex(), wanted.hex(), hint))
    least = _LEAST_LEVEL[workload.sandbox]
    if claims.soft and least == "L3":
        least = "L2"
    if workload.level < least:  # L1 < L2 < L3 as text
        hint = "`cloister doctor` on the node says what is missing for a better level"
        reasons.append(Reason("workload.level", workload.level, f"{least} or better for '{workload.sandbox}'", hint))
    return reasons


def _same_lease(held: LeaseFacts, key: bytes, workload: Workload | None, claims: Claims, now: datetime) -> list[Reason]:
    reasons = []
    if now >= held.expires:
        reasons.append(
            Reason("lease.expires", f"over since {wire.format_time(held.expires)}", "a live lease", "release again")
        )
    if wire.sha256(key) != held.key_hash:
        reasons.append(Reason("lease.key", "another HPKE key", "the key that the lease was given to"))
    if workload is not None:
        for name in ("code", "sandbox", "level", "profile"):
            found, wanted = getattr(workload, name), getattr(held, name)
            if wanted is not None and found != wanted:
                reasons.append(Reason(f"lease.{name}", _show(found), _show(wanted), "start a fresh node"))
    if held.claims is not None and (before := _machine(held.claims)) != (after := _machine(claims)):
        # the key never leaves its TEE: on another machine it is a copy
        reasons.append(Reason("lease.machine", after, before, "start a fresh node there"))
    return reasons


def _machine(claims: Claims) -> str:
    # a TPM counts resets and resumes: after one the memory that held the key was in somebody's hands
    counts = (f"{name}:{claims.svns[name]}" for name in ("reset_count", "restart_count") if name in claims.svns)
    return ", ".join((claims.tee, *identities(claims), *counts))


def _show(value: str | bytes) -> str:
    return value.hex() if isinstance(value, bytes) else value


def life_reasons(known: Known, now: datetime) -> list[Reason]:
    """Return why a contract is over, or not in force yet; an empty list for an active one."""
    today = now.astimezone(UTC).date()
    match state_on(known.state, expires=known.contract.expires, today=today):
        case Life.EXPIRED:  # in the words of contract.decide, so that it is said once
            return [Reason("expires", f"today {today}", f"a day up to {known.contract.expires}")]
        case Life.REPLACED:
            return [Reason("contract", "replaced by a newer version", "the active version", "use the newer version")]
        case Life.REVOKED:
            return [Reason("contract", "revoked", "an active contract", "its signers have to sign a new version")]
        case Life.WAITING if known.contract.signers <= known.signed:
            # signed by its own parties; the version before still has to agree, so contract.decide has nothing to say
            return [Reason("signatures", "no consent of the version before", "everybody who agrees to changes of it")]
        case _:
            return []


def _contract(
    known: Known,
    phase: str,
    reads: Sequence[str],
    writes: Sequence[str],
    workload: Workload,
    claims: Claims,
    now: datetime,
) -> list[Reason]:
    state = State(signed=known.signed, inherited=known.inherited)
    today = now.astimezone(UTC).date()
    reasons: list[Reason] = []
    for asset in reads:
        request = Request(phase, "read", asset, workload.code, workload.sandbox, claims, today=today)
        reasons += decide_contract(known.contract, request, state).reasons
    for asset in writes:
        request = Request(phase, "write", asset, workload.code, workload.sandbox, claims, today=today)
        reasons += decide_contract(known.contract, request, state).reasons
    return reasons


def _reads(contract: Contract, assets: Sequence[str], holdings: Holdings) -> tuple[tuple[Read, ...], list[Reason]]:
    found: list[Read] = []
    reasons: list[Reason] = []
    for asset in assets:
        root = holdings.roots.get(asset) if asset in contract.outputs else None
        if root is not None:  # 9: whatever was sealed first, the newest registered version counts
            found.append(Read(asset, root.digest, root.generation, None))
            continue
        entry = contract.data.get(asset) or contract.code.get(asset)
        if entry is not None:
            read, problem = _deposited(contract, asset, entry.owner, entry.digest, holdings)
            found += [read] if read is not None else []
            reasons += [problem] if problem is not None else []
        elif asset in contract.outputs:
            hint = "run the phase that writes it first"
            reasons.append(Reason(f"root.{asset}", "no registered version", "one that a phase wrote", hint))
        elif asset in contract.stream:
            reasons.append(Reason(f"root.{asset}", "no appended volume", "a volume that its owner appended"))
        # an asset that the contract does not have is a reason of contract.decide
    return tuple(found), reasons


def _deposited(
    contract: Contract, asset: str, owner: str, digest: str, holdings: Holdings
) -> tuple[Read | None, Reason | None]:
    owners = {contract.party[name]: name for name in sorted(contract.people(owner))}
    deposits = holdings.deposits.get(digest, ())
    for deposit in deposits:
        if deposit.owner in owners:
            return Read(asset, digest, deposit.generation, deposit.owner), None
    wanted = f"a key deposited by {owner!r} ({', '.join(sorted(owners)) or 'nobody has a key for it'})"
    if deposits:
        hint = "the contract names another owner than the one who sealed it: nothing was released"
        return None, Reason(f"key.{asset}", "a key that somebody else deposited for this volume", wanted, hint)
    return None, Reason(f"key.{asset}", f"no key for {digest}", wanted, f"{owner} deposits it with `cloister seal`")


def _writes(contract: Contract, assets: Sequence[str], holdings: Holdings) -> tuple[tuple[Write, ...], list[Reason]]:
    made: list[Write] = []
    reasons: list[Reason] = []
    for asset in assets:
        owner = contract.outputs.get(asset)
        if owner is None:
            continue  # a reason of contract.decide
        root = holdings.roots.get(asset)
        data = contract.data.get(asset)
        if root is not None:
            made.append(Write(asset, owner, root.generation + 1, root.digest))
        elif data is not None:
            read, problem = _deposited(contract, asset, data.owner, data.digest, holdings)
            if read is not None:
                made.append(Write(asset, owner, read.generation + 1, read.digest))
            elif problem is not None:
                reasons.append(problem)
        else:
            made.append(Write(asset, owner, 1, None))
    return tuple(made), reasons


def _once(reasons: Sequence[Reason]) -> tuple[Reason, ...]:
    return tuple(dict.fromkeys(reasons))


def _error(
    stale: tuple[Reason, ...], unacceptable: tuple[Reason, ...], denied: tuple[Reason, ...]
) -> CloisterError | None:
    reasons = stale + unacceptable + denied
    if stale:
        return EvidenceError("the evidence is not fresh", code="evidence-stale", reasons=reasons, hint=stale[0].hint)
    if unacceptable:
        return EvidenceError(
            f"the evidence was refused: {_count(reasons)}", code="evidence-unacceptable", reasons=reasons
        )
    if denied and all(reason.where == "signatures" for reason in denied):
        return WaitingError(f"the contract is not signed by everybody: {denied[0].hint or denied[0]}", reasons=reasons)
    if denied and denied[0].where.startswith("lease."):
        return _lease_error(*denied)
    if denied:
        return DeniedError(f"the contract does not allow this: {_count(reasons)}", reasons=reasons)
    return None


def _count(reasons: Sequence[Reason]) -> str:
    return "1 rule is broken" if len(reasons) == 1 else f"{len(reasons)} rules are broken"


def _lease_error(*reasons: Reason) -> DeniedError:
    return DeniedError("the lease is not good for this", code="lease-refused", reasons=reasons, hint="release again")


# --- answers ----------------------------------------------------------------------------------------------------------


def lease_unknown() -> DeniedError:
    """The same for a lease that never was and for a message that its secret does not authenticate."""
    wanted = "a lease of this broker, and a message authenticated by its secret"
    return _lease_error(Reason("lease", "an unknown lease, or another secret", wanted))


def live_lease(held: LeaseFacts, known: Known | None, now: datetime) -> CloisterError | None:
    """Return why the lease cannot be used to register or answer; None if it can."""
    reasons = []
    if now >= held.expires:
        reasons.append(Reason("lease.expires", f"over since {wire.format_time(held.expires)}", "a live lease"))
    if known is None:
        reasons.append(Reason("contract", f"no contract {held.contract}", "the lease's contract"))
    else:
        reasons += life_reasons(known, now)
    return _lease_error(*reasons) if reasons else None


def answer(
    held: LeaseFacts, known: Known, fingerprint: str, *, used: int, used_today: int, now: datetime
) -> tuple[str, CloisterError | None]:
    """Return the name of the party with `fingerprint`, and why it gets no answer (None: it gets one).

    `used` and `used_today` count what this consumer got from this phase in this version of the contract.
    """
    contract = known.contract
    party = next((name for name, key in contract.party.items() if key == fingerprint), "")
    if held.claims is None:
        found = "no evidence since the broker restarted"
        hint = "renew the lease, then ask for the answer again"
        return party, _lease_error(Reason("lease.evidence", found, "evidence in this run of the broker", hint))
    today = now.astimezone(UTC).date()
    request = Request(held.phase, "answer", "", held.code, held.sandbox, held.claims, party=party, today=today)
    state = State(signed=known.signed, used=used, used_today=used_today, inherited=known.inherited)
    decision = decide_contract(contract, request, state)
    if decision.allowed:
        return party, None
    spent = all(reason.where.endswith((".budget", ".per_day")) for reason in decision.reasons)
    code = "budget-spent" if spent else "denied"
    message = "the budget of answers is used up" if spent else "the contract does not allow this answer"
    return party, DeniedError(message, code=code, reasons=decision.reasons)


# --- owners open what is theirs ---------------------------------------------------------------------------------------


def opened(
    statement: wire.OpenStatement,
    signers: Sequence[str],
    *,
    broker: bytes,
    key: bytes,
    known: Known | None,
    holdings: Holdings,
    now: datetime,
) -> Read | CloisterError:
    """Judge an owner's request for a key; `signers` are fingerprints whose signatures over `statement` verified.

    A party's asset needs that party. A board's needs `need` members and every member with a veto; a board with a
    waiting time opens nothing here, because a wait cannot be shown to have passed. `nobody`'s asset opens to nobody.
    """
    reasons: list[Reason] = []
    if statement.broker != wire.sha256(broker):
        reasons.append(Reason("open.broker", "another broker's key", "this broker's", "attest it again"))
    if statement.key != wire.sha256(key):
        reasons.append(Reason("open.key", "another key than the signed one", "the key that the owner signed for"))
    if not now < statement.expires <= now + OPEN_LIFE:
        until = wire.format_time(statement.expires)
        reasons.append(Reason("open.expires", until, "a time within the next 24 hours", "sign a new statement"))
    if known is None:
        reasons.append(Reason("contract", f"no contract {statement.contract}", "a contract that was submitted"))
        return DeniedError("the key is not opened", reasons=reasons)
    contract = known.contract
    reasons += life_reasons(known, now)
    if not contract.signers <= known.signed:
        missing = ", ".join(sorted(contract.signers - known.signed))
        reasons.append(Reason("signatures", f"missing {missing}", "all required signers"))
    try:
        owner = contract.outputs.get(statement.asset) or contract.owner(statement.asset)
    except ValueError:
        reasons.append(Reason("open.asset", repr(statement.asset), "an asset of the contract"))
        return DeniedError("the key is not opened", reasons=reasons)
    reasons += _owner_signed(contract, statement.asset, owner, frozenset(signers))
    got, missing_keys = _reads(contract, (statement.asset,), holdings)
    reasons += missing_keys
    if reasons or not got:
        return DeniedError(f"the key of {statement.asset!r} is not opened", reasons=_once(reasons))
    return got[0]


def _owner_signed(contract: Contract, asset: str, owner: str, signers: frozenset[str]) -> list[Reason]:
    where = f"open.{asset}.owner"
    if owner == NOBODY:
        return [Reason(where, "a request to see it", "nobody", "the contract says that only a later phase may use it")]
    names = {name for name in contract.people(owner) if contract.party[name] in signers}
    board = contract.board.get(owner)
    if board is None:
        if names:
            return []
        return [Reason(where, "a signature of somebody else", f"{owner} ({contract.party[owner]})")]
    reasons = []
    if len(names) < board.need:
        found = ", ".join(sorted(names)) or "nobody"
        reasons.append(Reason(where, f"{len(names)} votes ({found})", f"{board.need} of {', '.join(board.members)}"))
    silent = sorted(set(board.veto) - names)
    if silent:
        reasons.append(Reason(f"{where}.veto", f"no vote of {', '.join(silent)}", "every member with a veto"))
    if board.wait:
        reasons.append(Reason(f"{where}.wait", "a board with a waiting time", "a board without one"))
    return reasons
