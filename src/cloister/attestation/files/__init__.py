"""Evidence as vendors and their tools write it to files: what `cloister verify` reads, besides our own format.

A *case* is one piece of evidence with everything that belongs to it, as files by role, at a time, with what is expected of
it: one entry of a `manifest.json`. Each kind of case is a module here with `KIND` and

    observe(case) -> Observation

which puts the files together, calls the very verifiers that a broker calls, and says what came out. Nothing here judges
by other rules than they do. Pure: files are bytes already.

Roles by kind (the layout of the manifest):
  dcap     quote, collateral?, ccel?
  snp      report, leaf (or vcek, vlek, table), crl?; or roles that are PEM chains by product
  azure    evidence
  tpm      q.msg/q.sig/q.pcrs/ak.pub/nonce/binary_runtime_measurements, or ak_pub/ak_cert/ak_issuer/sha1/sha256/sha384/eventlog,
           or evidence, or eventlog; crl?
  nvidia   report, chain, driver_rim?, vbios_rim?, ocsp_*?; or rim; or eat, jwks?
  nitro    doc, crl?
  cca      token, cpak
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Final, Literal

from cloister.attestation.endorsements import Endorsements, UnendorsedError
from cloister.attestation.events import fold
from cloister.attestation.roots import Roots
from cloister.attestation.types import Claims, Evidence
from cloister.attestation.verify import steps_of, verify
from cloister.errors import EvidenceError, InputError, Reason


@dataclass(frozen=True, slots=True)
class Case:
    """Files of one piece of evidence, by role, and what they are to be judged by."""

    kind: str
    files: Mapping[str, bytes]
    now: datetime
    name: str = ""
    nonce: bytes | None = None
    """What the verifier asked for; None: not known, so freshness is not judged."""
    chains: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    """Vendor certificate chains (PEM) that lie beside the evidence, by name (`milan`, `milan_vlek`, ...)."""
    chain: str = ""
    """Which of `chains` the case names."""
    roots: Roots = field(default_factory=Roots)
    collateral: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    """Further files that the caller offers as collateral, by file name."""
    vouched: frozenset[str] | None = None
    """Roles of files that the relying party itself stands for; None: all of them, as whoever writes a manifest does. A key
    that came with the evidence proves nothing about hardware."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a verifier, for people."""

    name: str
    state: Literal["passed", "failed", "not reached", "not done"]
    text: str


@dataclass(frozen=True, slots=True)
class Observation:
    """What came out of a case.

    `facts` are what a manifest's `expect` can name: `authentic` (bool), `debug` (bool), `tcb`, `advisories` (sorted list),
    `signature` (bool: the quote's signature and its chain to a pinned root, where there is no collateral for more),
    `rtmr_replay` (list of RTMR indexes), `eventlog`, `ima`, `parse` (bool), `golden` (number of matched golden
    measurements), `roots_sha256` (list).
    """

    facts: Mapping[str, object]
    steps: tuple[Step, ...] = ()
    claims: Claims | None = None
    error: EvidenceError | None = None
    fields: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Decoded fields for people, in reading order."""
    soft: bool = False
    """A published test root vouches for it, where there are no claims to say so."""


def trace(
    steps: Mapping[str, str], error: EvidenceError | None, *, not_done: frozenset[str] = frozenset()
) -> tuple[Step, ...]:
    """Return `steps` (a verifier's `STEPS`) with their states: those before the first refusing one passed.

    A reason belongs to the step whose name is the longest prefix of its `where`. Verifiers read certificates, lists and manifests
    before they judge anything, and look for collateral when they need it: after a refusal because something does not parse or is
    not there, no step is said to have passed.
    """
    failed: dict[str, str] = {}
    for reason in error.reasons if error is not None else ():
        names = [name for name in steps if reason.where == name or reason.where.startswith(f"{name}.")]
        if names:
            name = max(names, key=len)
            failed[name] = f"{failed[name]}; {reason}" if name in failed else str(reason)
    found: list[Step] = []
    over = isinstance(error, UnendorsedError) or (error is not None and error.code == "evidence-malformed")
    for name, text in steps.items():
        if name in failed:
            found.append(Step(name, "failed", f"{text}: {failed[name]}"))
            over = True
        elif name in not_done:
            found.append(Step(name, "not done", text))
        else:
            found.append(Step(name, "not reached" if over else "passed", text))
    if error is not None and not failed:
        reasons = "; ".join(str(reason) for reason in error.reasons)
        found = [Step(step.name, "not reached", step.text) for step in found]
        found.insert(0, Step("evidence", "failed", f"{error.message}{': ' if reasons else ''}{reasons}"))
    return tuple(found)


def observe(case: Case) -> Observation:
    """Return what came out of `case`.

    Raises:
        InputError: no such kind of case, or a role is missing.
        ValueError: `case.now` has no time zone.
    """
    if case.now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    observer = _OBSERVERS.get(case.kind)
    if observer is None:
        raise InputError(
            f"evidence files of kind {case.kind!r} are not known",
            reasons=[Reason("kind", repr(case.kind), " or ".join(sorted(_OBSERVERS)))],
        )
    return observer(case)


FRESHNESS: Final = "freshness"


def observe_evidence(
    evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime, nonce: bytes | None = None
) -> Observation:
    """Return what came out of evidence in our own format: `verify`, told step by step.

    `nonce` is what the CPU's evidence must be over, alone or with zeros after it, and with its log where the hardware has no
    register for that. Devices are over something else that only their binding says, so with devices that step is *not done*.
    """
    steps = steps_of(evidence)
    try:
        claims = verify(evidence, endorsements, roots, now=now)
    except EvidenceError as error:
        return Observation({"authentic": False}, trace(steps, error), error=error)
    facts = {"authentic": True, "debug": claims.debug, "tcb": claims.tcb_status}
    told = trace(steps, None)
    if nonce is None:
        return Observation(facts, told, claims)
    wanted = nonce.ljust(len(claims.report_data), b"\x00")
    if claims.log_in == "report-data" and len(wanted) == 64:
        wanted = fold(wanted, claims.events)
    if not nonce or claims.report_data != wanted:
        reason = Reason(FRESHNESS, claims.report_data.hex() or "nothing", wanted.hex() or "a nonce")
        stale = EvidenceError("the evidence is not fresh", code="evidence-stale", reasons=[reason])
        told += (Step(FRESHNESS, "failed", str(reason)),)
        return Observation(facts | {"authentic": False}, told, error=stale)
    if evidence.devices:
        told += (
            Step(
                FRESHNESS, "not done", "the devices answer the nonce, too: `check_binding` can say it, a nonce cannot"
            ),
        )
    else:
        told += (Step(FRESHNESS, "passed", "the evidence is over the nonce that was asked for"),)
    return Observation(facts, told, claims)


def need(case: Case, *roles: str) -> tuple[bytes, ...]:
    """Return the files of `roles`.

    Raises:
        InputError: one is missing.
    """
    missing = [role for role in roles if role not in case.files]
    if missing:
        raise InputError(
            f"{case.kind} evidence needs {', '.join(missing)}",
            reasons=[Reason(f"files.{role}", "nothing", f"a file of role {role}") for role in missing],
        )
    return tuple(case.files[role] for role in roles)


def _observers() -> Mapping[str, Callable[[Case], Observation]]:
    found: dict[str, Callable[[Case], Observation]] = {}
    for entry in pkgutil.iter_modules(__path__, f"{__name__}."):
        if entry.name.rpartition(".")[2] in {"manifest", "sniff"}:
            continue
        module = importlib.import_module(entry.name)
        found[module.KIND] = module.observe
    return MappingProxyType(found)


_OBSERVERS: Final = _observers()
