"""Appraise claims: does a relying party want what a verifier found authentic? A pure function of (claims, policy).

Rules, in this order; every violation is reported, each under `<policy.where>.<rule>`:
  1 debug             a debuggable TEE is never acceptable, unless the policy says so
  2 kind              tee, attested-host or he
  3 accept            the TEE type; `simulated` stands for every soft TEE, and nothing else does
  4 TCB               `tcb_status`, `min_tcb` (year and month of the matched TCB level), `deny_advisories`
  5 gpu               `confidential` where the policy wants it
  6 boot              the boot state of an attested host
  7 scheme            the parameters of homomorphic encryption
  8 reference_values  each named measurement is among the accepted values
Place kinds differ in what they have: `tee` has no rule 6 unless the policy lists boot values; `attested-host` has boot
values instead of a TEE type and a TCB, and refuses soft evidence without `simulated` like every place; of `he` only kind and scheme are judged, because it holds no key and no
hardware is trusted.
Authenticity (signatures, chains, revocation, time) is `verify`'s job, freshness and identity are `check_binding`'s.

Not checked on purpose: a TCB date in the future of `min_tcb` is fine; FMSPC or PPID lists are reference values once a
contract can name platforms.
"""

from __future__ import annotations

from typing import Final, Protocol

from cloister.attestation.types import Claims, Policy
from cloister.errors import Reason

SIMULATED: Final = "simulated"
"""The word in `Policy.accept` that admits every soft TEE."""

_UPDATE: Final = "update the platform's firmware and microcode, then attest again"

_SOFT: Final = "software evidence protects nothing: use real hardware"


class _Refuse(Protocol):
    def __call__(self, rule: str, found: str, wanted: str, hint: str = "") -> None: ...


def appraise(claims: Claims, policy: Policy) -> tuple[Reason, ...]:
    """Return every rule of `policy` that `claims` break, in rule order; empty means acceptable."""
    reasons: list[Reason] = []

    def refuse(rule: str, found: str, wanted: str, hint: str = "") -> None:
        reasons.append(Reason(f"{policy.where}.{rule}", found, wanted, hint))

    on_hardware = policy.kind != "he"

    # (1) before everything else: a debugger reads whatever the rest protects
    if on_hardware and claims.debug and not policy.debug:
        refuse("debug", "a debuggable TEE", "debug off", "rebuild or restart the TEE without debug")

    # (2)
    if claims.kind != policy.kind:
        refuse("kind", claims.kind, policy.kind)
    elif policy.kind == "attested-host" and claims.soft and SIMULATED not in policy.accept:
        # a host has no list of types, and still software is let in by its word only
        refuse("kind", claims.tee, "hardware", _SOFT)

    if policy.kind == "tee":
        _tee_type(claims, policy, refuse)
        _tcb(claims, policy, refuse)

    # (5)
    if on_hardware and policy.gpu == "confidential" and claims.gpu != "confidential":
        refuse("gpu", f"gpu {claims.gpu}", "confidential", "the evidence of the GPU is missing or its mode is off")

    # (6) an attested host is its boot state, so an empty list accepts nothing there
    if (policy.boot or policy.kind == "attested-host") and on_hardware and claims.boot not in policy.boot:
        refuse(
            "boot", claims.boot or "no boot state", _list(policy.boot), "measure the host again, or propose its state"
        )

    # (7)
    if (policy.kind == "he" or policy.scheme is not None) and (policy.scheme is None or claims.scheme != policy.scheme):
        refuse("scheme", claims.scheme or "no scheme", policy.scheme or "nothing (the policy names no scheme)")

    # (8) a measurement that is absent never equals an accepted value
    if on_hardware:
        for name in sorted(policy.reference_values):
            accepted = policy.reference_values[name]
            value = claims.measurements.get(name)
            if value is None or value not in accepted:
                refuse(
                    name,
                    value.hex() if value is not None else "no such measurement",
                    _list(frozenset(each.hex() for each in accepted)),
                    "if this build is yours, add its measurement to the contract",
                )
    return tuple(reasons)


def _tee_type(claims: Claims, policy: Policy, refuse: _Refuse) -> None:
    # (3) soft and real never stand for each other, whatever the list says
    accepted = SIMULATED in policy.accept if claims.soft else claims.tee in policy.accept - {SIMULATED}
    if not accepted or not claims.tee:
        refuse("accept", claims.tee or "no TEE", _list(policy.accept), _SOFT if claims.soft else "")


def _tcb(claims: Claims, policy: Policy, refuse: _Refuse) -> None:
    # (4) status, date, advisories
    if not claims.tcb_status or claims.tcb_status not in policy.tcb_statuses:
        refuse("tcb_status", claims.tcb_status or "no status", _list(policy.tcb_statuses), _UPDATE)
    if policy.min_tcb is not None:
        year, month = policy.min_tcb
        wanted = f"firmware of {year:04d}-{month:02d} or newer"
        if claims.tcb_date is None:
            refuse("min_tcb", "no TCB date", wanted, _UPDATE)
        elif (claims.tcb_date.year, claims.tcb_date.month) < policy.min_tcb:
            refuse("min_tcb", f"firmware of {claims.tcb_date:%Y-%m}", wanted, _UPDATE)
    for advisory in sorted(policy.deny_advisories.intersection(claims.advisories)):
        refuse("deny_advisories", advisory, f"a platform without {advisory}", _UPDATE)


def _list(values: frozenset[str]) -> str:
    return " or ".join(sorted(values)) if values else "nothing (the list is empty)"
