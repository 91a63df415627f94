"""SGX and TDX evidence in files: a quote, the vendor's collateral, a CC event log.

Roles: `quote` (what follows it in its file is cut off and named: firmware pads), `collateral` (JSON of dcap-qvl; or the
caller's), `ccel` (TDX). The quote's header says which TEE it is.

Without collateral nothing is authentic; what is signed is looked at all the same (`signature`: the chain to a pinned root, the
quoting enclave's report, the quote), and every other step is *not done*. Nobody keeps runtime logs beside old quotes, so
step 10 is not done where RTMR 3 was extended.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Final

from cloister.attestation.dcap import collateral as dcap_collateral
from cloister.attestation.dcap import format as dcap_format
from cloister.attestation.dcap import own, pck
from cloister.attestation.dcap.format import Quote, Tee
from cloister.attestation.dcap.roots import PINS
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.files import Case, Observation, Step, need, trace
from cloister.attestation.roots import Roots, choose
from cloister.attestation.sgx import format as sgx_format
from cloister.attestation.sgx import verify as sgx_verify
from cloister.attestation.sgx.format import SGX
from cloister.attestation.tdx import ccel
from cloister.attestation.tdx import format as tdx_format
from cloister.attestation.tdx import verify as tdx_verify
from cloister.attestation.tdx.format import TDX
from cloister.attestation.types import Claims, Evidence
from cloister.errors import EvidenceError, Reason

KIND: Final = "dcap"

_OFFLINE: Final = ("3-collateral", "7-tcb", "8-attributes", "9-agree")
"""Steps that need collateral."""


def observe(case: Case) -> Observation:
    """Return what the quote in `case` proves at `case.now`."""
    (data,) = need(case, "quote")
    # the type stands at the same place in every version; what is neither is refused by the TDX parser
    is_sgx = data[4:8] == SGX.tee_type.to_bytes(4, "little")
    tee, steps = (SGX, sgx_verify.STEPS) if is_sgx else (TDX, tdx_verify.STEPS)
    make: type[Quote] = sgx_format.Quote if is_sgx else tdx_format.Quote
    try:
        end = dcap_format.extent(data, tee, make)
        quote = dcap_format.parse(data[:end], tee, make)
    except EvidenceError as error:
        return Observation({"authentic": False, "signature": False}, trace(steps, error), error=error)
    parts = {"ccel": case.files["ccel"]} if case.files.get("ccel") else {}
    evidence = Evidence(tee.kind, data[:end], parts=MappingProxyType(parts))
    unsigned = _unsigned(tee, quote, case.roots, case.now)
    facts: dict[str, object] = {"authentic": False, "signature": unsigned is None, "debug": quote.debug}
    facts |= _replay(quote, parts)
    not_done = frozenset() if _logged(quote) else frozenset({tee.step("10-events")})
    found = _endorsements(case, tee, quote)
    claims: Claims | None = None
    refused = unsigned
    if found.items:
        try:
            claims, refused = _examine(evidence, found, case.roots, case.now, logged=_logged(quote)), None
        except EvidenceError as error:
            refused = error
    else:
        refused = refused or _offline(tee, quote, parts)
        failed = {reason.where for reason in refused.reasons} if refused is not None else set()
        not_done |= {tee.step(each) for each in _OFFLINE} - failed
    fields = _fields(quote, claims, len(data) - end, case.now)
    if claims is not None:
        facts |= {"authentic": True, "tcb": claims.tcb_status, "advisories": list(claims.advisories)}
    told = trace(steps, refused, not_done=not_done)
    if refused is None and case.nonce and quote.report_data != case.nonce.ljust(64, b"\x00"):
        refused = _stale(case.nonce, quote.report_data)
        told += (Step("freshness", "failed", "; ".join(map(str, refused.reasons))),)
        facts["authentic"], claims = False, None
    return Observation(MappingProxyType(facts), told, claims, refused, MappingProxyType(fields))


def _examine(evidence: Evidence, found: Endorsements, roots: Roots, now: datetime, *, logged: bool) -> Claims:
    if evidence.kind == sgx_verify.KIND:
        return sgx_verify.verify(evidence, found, roots, now=now)
    return tdx_verify.examine(evidence, found, roots, now=now, runtime_log=logged)


def _unsigned(tee: Tee, quote: Quote, roots: Roots, now: datetime) -> EvidenceError | None:
    """Return why the signatures of `quote` do not reach a pinned root, or None."""
    try:
        choose(tee.kind, quote.certificates[-1], PINS, roots, where=tee.step("2-root"))
        chain = pck.load(quote.certificates, where=tee.step("4-chain"))
    except EvidenceError as error:
        return error
    reasons = own.signatures(tee, quote, chain, now=now)
    if not reasons:
        return None
    return EvidenceError(
        f"the signatures of the {tee.title} quote do not hold", code="evidence-not-authentic", reasons=reasons
    )


def _endorsements(case: Case, tee: Tee, quote: Quote) -> Endorsements:
    """Return the collateral of `case`: its own is offered for this quote, whatever machine it says it is for."""
    try:
        chain = pck.load(quote.certificates, where=tee.step("4-chain"))
        fmspc = pck.read(chain[0], where=tee.step("4-chain")).fmspc.hex().upper()
    except EvidenceError:
        fmspc = ""
    found = Endorsements()
    for data in case.collateral.values():
        try:
            other = dcap_collateral.parse(data)
        except EvidenceError:  # somebody else's collateral
            continue
        if (other.kind, other.fmspc) == (tee.kind, fmspc):
            found |= Endorsements((Endorsement(tee.kind, fmspc, data),))
    if "collateral" in case.files:
        found |= Endorsements((Endorsement(tee.kind, fmspc, case.files["collateral"]),))
    return found


def _logged(quote: Quote) -> bool:
    """Return whether an empty runtime log explains the quote."""
    return not quote.measurements().get("rtmr3", b"").strip(b"\x00")


def _replay(quote: Quote, parts: Mapping[str, bytes]) -> dict[str, object]:
    if "ccel" not in parts or not isinstance(quote, tdx_format.Quote):
        return {}
    try:
        log = ccel.parse(parts["ccel"], where=TDX.step("11-boot"))
    except EvidenceError:
        return {"rtmr_replay": []}
    return {"rtmr_replay": list(ccel.replayed(log, quote.measurements()))}


def _offline(tee: Tee, quote: Quote, parts: Mapping[str, bytes]) -> EvidenceError | None:
    """Return what refuses a signed quote that has no collateral."""
    if quote.debug:
        return EvidenceError(
            f"the {tee.title} quote is of a debuggable TEE",
            code="evidence-not-authentic",
            reasons=[Reason(tee.step("8-attributes"), "Debug mode is enabled", "debug off")],
        )
    try:
        if tee is TDX and "ccel" in parts:
            ccel.events(parts["ccel"], quote.measurements(), where=tee.step("11-boot"))
        elif tee is SGX:
            dcap_format.refuse_parts(parts, sgx_verify.PARTS, tee)
    except EvidenceError as error:
        return error
    return None


def _stale(nonce: bytes, report_data: bytes) -> EvidenceError:
    return EvidenceError(
        "the quote is not fresh",
        code="evidence-not-authentic",
        reasons=[Reason("freshness", report_data.hex(), f"{nonce.hex()}, with zeros after it")],
    )


def _fields(quote: Quote, claims: Claims | None, after: int, now: datetime) -> dict[str, str]:
    """Return what the quote says, for people; believed only where the steps say so."""
    fields = {
        "quote": f"version {quote.version}, {type(quote).__module__.split('.')[-2].upper()}"
        + (f"; {after} bytes after it were not looked at" if after else ""),
        "debug": "on: the host can read all of its memory" if quote.debug else "off",
    }
    on = [name for name, value in quote.attributes().items() if value and name != "debug"]
    fields["switches"] = ", ".join(on) or "none"
    fields |= {name: value.hex() for name, value in quote.measurements().items()}
    if isinstance(quote, sgx_format.Quote):
        fields |= {name: str(value) for name, value in quote.numbers().items()}
    fields["report_data"] = quote.report_data.hex()
    try:
        chain = pck.load(quote.certificates, where="chain")
        machine = pck.read(chain[0], where="chain")
    except EvidenceError:
        return fields
    platform = machine.platform()
    fields["pck_cpusvn"] = platform.pop("cpusvn")  # the report of an enclave has one too
    fields |= platform
    fields["pcesvn"] = str(machine.pcesvn)
    fields |= {name: "yes" if value else "no" for name, value in machine.flags}
    if claims is not None:
        fields["tcb_status"] = claims.tcb_status
        fields["tcb_date"] = f"{claims.tcb_date}"
        fields["advisories"] = ", ".join(claims.advisories) or "none"
        fields["tcb_evaluation_data_number"] = str(claims.svns["tcb_evaluation_data_number"])
        if claims.valid_until is not None:
            fields["valid_until"] = f"{claims.valid_until:%Y-%m-%d %H:%M}, {(claims.valid_until - now).days} days later"
    return fields
