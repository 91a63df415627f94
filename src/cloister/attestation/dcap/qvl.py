"""Is this quote authentic under this collateral? dcap-qvl judges, `own` must agree, and both must read the same bytes.

dcap-qvl (Intel's DCAP quote verification in Rust) is given the root and the time and applies no policy. It raises ValueError
for everything and its messages carry no step, so a table maps its sentences to steps; a sentence in no row is a refusal
all the same (step `<kind>.dcap-qvl`). Its sentence is in every error, beside the certificates and documents that `own`
can name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from types import MappingProxyType
from typing import Any, Final

from dcap_qvl import QuotePolicy, QuoteVerifier

from cloister.attestation.dcap import collateral as collateral_format
from cloister.attestation.dcap import own, pck
from cloister.attestation.dcap.collateral import Collateral
from cloister.attestation.dcap.format import Quote, Tee
from cloister.attestation.dcap.pck import Pck
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.pki.path import describe
from cloister.errors import EvidenceError, Reason

# what dcap-qvl 0.7.0 says -> (step, what we say we want, hint). The first row that occurs in the message wins.
SENTENCES: Final[tuple[tuple[str, str, str, str], ...]] = (
    ("root ca", "2-root", "a root certificate that parses", ""),
    ("QE report validation failed", "5-qe", "a quoting enclave without debug", ""),
    ("TCB levels found in QE Identity", "5-qe", "a quoting enclave that the vendor lists", ""),
    ("Debug mode is enabled", "8-attributes", "debug off", "this TEE is debuggable: its host can read all of its memory"),
    ("SEPT_VE_DISABLE", "8-attributes", "SEPT_VE_DISABLE set", ""),
    ("migration", "8-attributes", "a TD that cannot be migrated", ""),
    ("TD profiling", "8-attributes", "a TD that is not profiled", ""),
    ("SERVTD_EXT", "8-attributes", "no service TD", ""),
    ("TD attributes", "8-attributes", "reserved attribute bits zero", ""),
    ("service TD", "8-attributes", "no service TD (MRSERVICETD zero)", ""),
    ("TCB status is invalid", "7-tcb", "a TCB level that is not revoked", "this platform's keys are compromised"),
    ("No matching TCB level", "7-tcb", "a TCB level that the vendor lists", "firmware older than any listed, or a pre-production CPU"),
    ("Fmspc mismatch", "7-tcb", "collateral for this FMSPC", ""),
    ("tcbDate", "7-tcb", "TCB levels with dates", ""),
    ("TDX module", "7-tcb", "a TDX module that the vendor lists", ""),
    ("component count", "7-tcb", "16 TCB components", ""),
    ("TCB info in the collateral", "3-collateral", "TCB info for this TEE", ""),
    ("Unsupported QE Identity", "3-collateral", "the identity of this TEE's quoting enclave", ""),
    ("ISV enclave report signature", "6-signature", "a signature of the attestation key", "the quote was changed"),
    ("qe_report", "5-qe", "a QE report signed by the PCK key", "the quote was changed"),
    ("QE report hash mismatch", "5-qe", "the attestation key named in the QE report", "the attestation key was exchanged"),
    ("QE auth data", "5-qe", "32 bytes of QE authentication data", ""),
    ("ISVSVN", "5-qe", "a quoting enclave that the vendor lists", ""),
    ("MRSIGNER", "5-qe", "the vendor's quoting enclave", ""),
    ("ISVPRODID", "5-qe", "the vendor's quoting enclave", ""),
    ("ATTRIBUTES", "5-qe", "the vendor's quoting enclave", ""),
    ("MISCSELECT", "5-qe", "the vendor's quoting enclave", ""),
    ("CRL", "3-collateral", "a current CRL", "fetch fresh collateral"),
    ("Crl", "3-collateral", "a current CRL", "fetch fresh collateral"),
    ("TCBInfo", "3-collateral", "TCB info that is valid now", "fetch fresh collateral"),
    ("TCB Info", "3-collateral", "TCB info signed by the vendor", ""),
    ("TcbInfo", "3-collateral", "TCB info that parses", ""),
    ("tcb_info", "3-collateral", "TCB info signed by the vendor", ""),
    ("QE Identity", "3-collateral", "a QE identity that is valid now", "fetch fresh collateral"),
    ("QeIdentity", "3-collateral", "a QE identity that parses", ""),
    ("qe_identity", "3-collateral", "a QE identity signed by the vendor", ""),
    ("Cert", "4-chain", "certificates that are valid and unrevoked now", ""),
    ("certificate", "4-chain", "certificates that are valid and unrevoked now", ""),
    ("certs", "4-chain", "certificates that parse", ""),
    ("PCK", "4-chain", "a PCK certificate with the SGX extension", ""),
    ("Svn", "4-chain", "a PCK certificate with the SGX extension", ""),
    ("Fmspc", "4-chain", "a PCK certificate with the SGX extension", ""),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Judgement:
    """What both implementations found, besides the TEE's own report."""

    tcb_status: str
    tcb_date: date
    advisories: tuple[str, ...]
    pck: Pck
    svns: Mapping[str, int]
    valid_until: datetime | None
    chain: tuple[str, ...]


def judge(
    tee: Tee, evidence: bytes, quote: Quote, endorsements: Endorsements, *, now: datetime, read: Mapping[str, object]
) -> Judgement:
    """Return what holds of `quote`, which is `evidence` taken apart and ends in a pinned root (steps 3 to 9).

    `read` is what our parser read of the report: dcap-qvl's name of each field -> value as dcap-qvl writes it.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`; `reasons[0].where` is the step.
    """
    chain = pck.load(quote.certificates, where=tee.step("4-chain"))
    machine = pck.read(chain[0], where=tee.step("4-chain"))
    where = tee.step("3-collateral")
    found = endorsements.find(tee.kind, machine.fmspc.hex().upper(), where=where)
    collateral = collateral_format.parse(found, where=where)
    ours = own.check(tee, quote, chain, machine, collateral, now=now)
    theirs = run(tee, evidence, quote, collateral, ours.reasons, now)
    if ours.reasons:
        raise EvidenceError(
            f"the {tee.title} quote is not authentic", code="evidence-not-authentic", reasons=ours.reasons
        )
    body = _body(theirs)
    _agree(tee, machine, body, theirs, read)
    level, qe_level = theirs["platform"]["tcb_level"], theirs["qe"]["tcb_level"]
    return Judgement(
        tcb_status=theirs["tcb"]["status"],
        tcb_date=_tcb_date(tee, level["tcbDate"], qe_level["tcbDate"]),
        advisories=tuple(sorted(theirs["tcb"]["advisory_ids"])),
        pck=machine,
        svns=MappingProxyType(
            {
                "pcesvn": machine.pcesvn,
                # the lower one: a floor holds for both documents
                "tcb_evaluation_data_number": min(
                    collateral.tcb_info.evaluation, collateral.qe_identity.evaluation, theirs["tcb"]["eval_data_number"]
                ),
                "qe_isvsvn": theirs["qe"]["report"]["isv_svn"],
            }
        ),
        valid_until=_earliest(ours.valid_until, theirs),
        chain=describe(chain),
    )


def run(
    tee: Tee, evidence: bytes, quote: Quote, collateral: Collateral, ours: tuple[Reason, ...], now: datetime
) -> dict[str, Any]:
    """Return dcap-qvl's claims about `evidence`, whose chain ends in a root that we believe.

    Raises:
        EvidenceError: `evidence-not-authentic`, with the step; `ours` names certificates and documents where it can.
    """
    seconds = int(now.timestamp())
    try:
        verifier = QuoteVerifier(quote.certificates[-1])
        claims = verifier.verify_with_policy(evidence, collateral.raw, seconds, QuotePolicy.claims_only(seconds))
        report: dict[str, Any] = json.loads(claims.to_json())
    except (ValueError, OverflowError) as error:  # all refusals are ValueErrors; a time before 1970 overflows
        raise _refused(tee, str(error), ours) from error
    return report


def _refused(tee: Tee, message: str, ours: tuple[Reason, ...]) -> EvidenceError:
    text = message.removeprefix("Verification failed: ")
    step, wanted, hint = "dcap-qvl", "evidence that dcap-qvl verifies", ""
    for part, *answer in SENTENCES:
        if part in text:
            step, wanted, hint = answer
            break
    reasons = [Reason(tee.step(step), text, wanted, hint)]
    # of certificates and windows it says only that; we say which. What else is wrong is said after its finding.
    named = [each for each in ours if each.where.startswith((tee.step("3-"), tee.step("4-")))]
    if named and step in {"3-collateral", "4-chain"}:
        reasons = list(ours)
    else:
        reasons += [each for each in ours if not each.where.startswith(tee.step(step))]
    return EvidenceError(
        f"the {tee.title} quote is not authentic: {text}", code="evidence-not-authentic", reasons=reasons
    )


def _body(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return the report as dcap-qvl read it: the newer TD reports hold the older one as `base`."""
    body: dict[str, Any] = {}
    inner: Any = next(iter(theirs["report"].values()), {})
    while isinstance(inner, dict):
        body = {**{key: value for key, value in inner.items() if key != "base"}, **body}
        inner = inner.get("base")
    return body


def _agree(tee: Tee, machine: Pck, body: dict[str, Any], theirs: dict[str, Any], read: Mapping[str, object]) -> None:
    """Refuse where two parsers read one quote differently: there an attacker lives."""
    pairs = [(name, str(ours), str(body.get(name))) for name, ours in read.items()]
    facts = theirs["platform"]["pck"]
    instance = machine.platform_instance_id
    pairs += [
        ("ppid", machine.ppid.hex(), bytes(facts["ppid"]).hex()),
        ("fmspc", machine.fmspc.hex(), bytes(facts["fmspc"]).hex()),
        ("pceid", machine.pceid.hex(), bytes(facts["pce_id"]).hex()),
        ("cpusvn", machine.cpusvn.hex(), bytes(facts["cpu_svn"]).hex()),
        ("pcesvn", str(machine.pcesvn), str(facts["pce_svn"])),
        ("sgx_type", str(machine.sgx_type), str(facts["sgx_type"])),
        (
            "platform_instance_id",
            instance.hex() if instance is not None else "",
            bytes(facts["platform_instance_id"] or b"").hex(),
        ),
    ]
    pairs += [(name, str(value), str(facts[name])) for name, value in machine.flags]
    differing = [Reason(tee.step("9-agree"), f"{name} {other}", ours) for name, ours, other in pairs if ours != other]
    if differing:
        raise EvidenceError(
            f"two parsers read this {tee.title} quote differently", code="evidence-malformed", reasons=differing
        )


def _tcb_date(tee: Tee, *texts: str) -> date:
    """Return the earlier date of the matched platform level and QE level: a floor holds for both."""
    try:
        return min(date.fromisoformat(text[:10]) for text in texts)
    except ValueError as error:
        raise EvidenceError(
            "the TCB level has no date",
            code="evidence-not-authentic",
            reasons=[Reason(tee.step("7-tcb"), " / ".join(texts), "a date")],
        ) from error


def _earliest(ours: datetime | None, theirs: dict[str, Any]) -> datetime:
    ends = [datetime.fromtimestamp(theirs["earliest_expiration_date"], UTC)]  # pck_crl_issuer_chain is only in theirs
    return min(ends if ours is None else [*ends, ours])
