"""Verify TDX evidence: a pure function of (evidence, endorsements, roots, now).

Steps; an error names the step that refused:
  1 format      our parser takes the quote apart; bytes after its end are refused       tdx/format.py
  2 root        the chain's last certificate has a pinned SHA-256                       tdx/roots.py
  3 collateral  TCB info and QE identity: signed, inside their windows at `now`; both CRLs current
  4 chain       PCK, TCB and QE identity certificates lead to the root, valid and unrevoked at `now`
  5 qe          the PCK key signs the QE report, the report names the attestation key and fits the QE identity
  6 signature   the attestation key signs header and TD report
  7 tcb         FMSPC, TCB level, TDX module identity and QE level match; no level is revoked
  8 attributes  debug, profiling and migration are off, SEPT_VE_DISABLE is set, reserved bits are zero, no service TD
  9 agree       our parser and dcap-qvl read the same TD report
 10 events      the runtime log replays to RTMR 3 exactly, and its data hashes to its digests     events.py
Steps 3 to 8 are dcap-qvl's (Intel DCAP quote verification, in its own order); it is given the root and the time, and it
applies no policy. TCB status, dates and advisories are claims: `appraise` judges them. The debug bit is refused here
because dcap-qvl refuses it, and read again by our parser, so `Policy.debug` cannot admit a debug TD.

Collateral comes from the relying party, by FMSPC. A PCK chain inside collateral would replace the quote's own, so the
collateral parser refuses every key beyond the nine that Intel's PCS delivers.

Not checked on purpose: TDATTRIBUTES.PERFMON and PKS (bits 63 and 30), which dcap-qvl lets pass: they change what the guest
may do, not who can read it. A contract that minds pins `tdattributes` as a reference value.
"""

from __future__ import annotations

import json
from datetime import date, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from dcap_qvl import QuoteCollateralV3, QuotePolicy, QuoteVerifier

from cloister.attestation import events as event_log
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.roots import Roots, choose
from cloister.attestation.tdx import chain
from cloister.attestation.tdx import format as tdx_format
from cloister.attestation.tdx.collateral import parse as parse_collateral
from cloister.attestation.tdx.roots import PINS
from cloister.attestation.types import Claims, Evidence
from cloister.errors import EvidenceError, Reason

KIND: Final = "tdx"

# what dcap-qvl 0.7.0 says -> (step, what we say we want). Its messages carry no step; the first row that occurs in the
# message wins, and a message in no row is a refusal all the same (step `tdx.dcap-qvl`).
_STEPS: Final[tuple[tuple[str, str, str, str], ...]] = (
    ("root ca", "tdx.2-root", "a root certificate that parses", ""),
    ("QE report validation failed", "tdx.5-qe", "a quoting enclave without debug", ""),
    ("TCB levels found in QE Identity", "tdx.5-qe", "a quoting enclave that the vendor lists", ""),
    ("Debug mode is enabled", "tdx.8-attributes", "debug off", "this TD is debuggable: its host can read all of its memory"),
    ("SEPT_VE_DISABLE", "tdx.8-attributes", "SEPT_VE_DISABLE set", ""),
    ("migration", "tdx.8-attributes", "a TD that cannot be migrated", ""),
    ("TD profiling", "tdx.8-attributes", "a TD that is not profiled", ""),
    ("SERVTD_EXT", "tdx.8-attributes", "no service TD", ""),
    ("TD attributes", "tdx.8-attributes", "reserved attribute bits zero", ""),
    ("service TD", "tdx.8-attributes", "no service TD (MRSERVICETD zero)", ""),
    ("TCB status is invalid", "tdx.7-tcb", "a TCB level that is not revoked", "this platform's keys are compromised"),
    ("No matching TCB level", "tdx.7-tcb", "a TCB level that the vendor lists", "firmware older than any listed, or a pre-production CPU"),
    ("Fmspc mismatch", "tdx.7-tcb", "collateral for this FMSPC", ""),
    ("tcbDate", "tdx.7-tcb", "TCB levels with dates", ""),
    ("TDX module", "tdx.7-tcb", "a TDX module that the vendor lists", ""),
    ("component count", "tdx.7-tcb", "16 TCB components", ""),
    ("TCB info in the collateral", "tdx.7-tcb", "TCB info for TDX", ""),
    ("ISV enclave report signature", "tdx.6-signature", "a signature of the attestation key", "the quote was changed"),
    ("qe_report", "tdx.5-qe", "a QE report signed by the PCK key", "the quote was changed"),
    ("QE report hash mismatch", "tdx.5-qe", "the attestation key named in the QE report", "the attestation key was exchanged"),
    ("QE auth data", "tdx.5-qe", "32 bytes of QE authentication data", ""),
    ("ISVSVN", "tdx.5-qe", "a quoting enclave that the vendor lists", ""),
    ("MRSIGNER", "tdx.5-qe", "the vendor's quoting enclave", ""),
    ("ISVPRODID", "tdx.5-qe", "the vendor's quoting enclave", ""),
    ("ATTRIBUTES", "tdx.5-qe", "the vendor's quoting enclave", ""),
    ("MISCSELECT", "tdx.5-qe", "the vendor's quoting enclave", ""),
    ("CRL", "tdx.3-collateral", "a current CRL", "fetch fresh collateral"),
    ("Crl", "tdx.3-collateral", "a current CRL", "fetch fresh collateral"),
    ("TCBInfo", "tdx.3-collateral", "TCB info that is valid now", "fetch fresh collateral"),
    ("TCB Info", "tdx.3-collateral", "TCB info signed by the vendor", ""),
    ("TcbInfo", "tdx.3-collateral", "TCB info that parses", ""),
    ("tcb_info", "tdx.3-collateral", "TCB info signed by the vendor", ""),
    ("QE Identity", "tdx.3-collateral", "a QE identity that is valid now", "fetch fresh collateral"),
    ("QeIdentity", "tdx.3-collateral", "a QE identity that parses", ""),
    ("qe_identity", "tdx.3-collateral", "a QE identity signed by the vendor", ""),
    ("Cert", "tdx.4-chain", "certificates that are valid and unrevoked now", ""),
    ("certificate", "tdx.4-chain", "certificates that are valid and unrevoked now", ""),
    ("certs", "tdx.4-chain", "certificates that parse", ""),
    ("PCK", "tdx.4-chain", "a PCK certificate with the SGX extension", ""),
    ("Svn", "tdx.4-chain", "a PCK certificate with the SGX extension", ""),
    ("Fmspc", "tdx.4-chain", "a PCK certificate with the SGX extension", ""),
)  # fmt: skip

_AGREE: Final = {
    "teetcbsvn": "tee_tcb_svn", "mrseam": "mr_seam", "mrsignerseam": "mr_signer_seam",
    "seamattributes": "seam_attributes", "tdattributes": "td_attributes", "xfam": "xfam", "mrtd": "mr_td",
    "mrconfigid": "mr_config_id", "mrowner": "mr_owner", "mrownerconfig": "mr_owner_config",
    "rtmr0": "rt_mr0", "rtmr1": "rt_mr1", "rtmr2": "rt_mr2", "rtmr3": "rt_mr3",
}  # fmt: skip
"""Our name -> dcap-qvl's name of the same TD report field."""


def verify(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims:
    """Return what a genuine TDX platform states in `evidence`.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`; `reasons[0].where` is the step.
        ValueError: `now` has no time zone, or `evidence` is of another kind (a caller's mistake).
    """
    if evidence.kind != KIND:
        raise ValueError(f"evidence of kind {evidence.kind!r}, this verifier takes {KIND!r}")
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    # (1)
    quote = tdx_format.parse(evidence.quote)
    # (2)
    tee = choose(KIND, quote.certificates[-1], PINS, roots, where="tdx.2-root")
    # (3) - (8)
    collateral = _collateral(endorsements.find(KIND, quote.fmspc(), where="tdx.3-collateral"))
    report = _dcap(evidence.quote, quote, collateral, now)
    # (9) a difference between two parsers is where an attacker lives
    measurements = quote.measurements()
    _agree(quote, measurements, report)
    # (10)
    event_log.check_log(evidence.events, measurements["rtmr3"], where="tdx.10-events")
    platform = report["platform"]
    return Claims(
        kind="tee",
        tee=tee,
        debug=quote.debug,
        tcb_status=report["tcb"]["status"],
        tcb_date=_tcb_date(report),
        advisories=tuple(sorted(report["tcb"]["advisory_ids"])),
        report_data=quote.report_data,
        measurements=MappingProxyType(measurements),
        events=evidence.events,
        platform=MappingProxyType(_platform(platform["pck"], report["tcb"])),
    )


@lru_cache(maxsize=16)
def _collateral(data: bytes) -> QuoteCollateralV3:
    """Parsed once per collateral: a broker verifies thousands of quotes under one."""
    return parse_collateral(data)


def _dcap(evidence: bytes, quote: tdx_format.Quote, collateral: QuoteCollateralV3, now: datetime) -> dict[str, Any]:
    """Return dcap-qvl's claims about `evidence`, whose chain ends in a root that we believe."""
    seconds = int(now.timestamp())
    try:
        verifier = QuoteVerifier(quote.certificates[-1])
        claims = verifier.verify_with_policy(evidence, collateral, seconds, QuotePolicy.claims_only(seconds))
        report: dict[str, Any] = json.loads(claims.to_json())
    except (ValueError, OverflowError) as error:  # all refusals are ValueErrors; a time before 1970 overflows
        raise _refused(str(error), quote, collateral, now) from error
    return report


def _refused(message: str, quote: tdx_format.Quote, collateral: QuoteCollateralV3, now: datetime) -> EvidenceError:
    text = message.removeprefix("Verification failed: ")
    where, wanted, hint = "tdx.dcap-qvl", "evidence that dcap-qvl verifies", ""
    for part, *answer in _STEPS:
        if part in text:
            where, wanted, hint = answer
            break
    found: tuple[str, ...] = (text,)
    if where == "tdx.4-chain":
        crls = (collateral.root_ca_crl, collateral.pck_crl)
        found = chain.findings(quote.certificates, crls, now=now) or found
    return EvidenceError(
        f"the TDX quote is not authentic: {text}",
        code="evidence-not-authentic",
        reasons=[Reason(where, each, wanted, hint) for each in found],
    )


def _agree(quote: tdx_format.Quote, ours: dict[str, bytes], report: dict[str, Any]) -> None:
    body = report["report"].get("TD10") or report["report"].get("TD15") or {}
    theirs = body.get("base", body)
    differing = [
        Reason("tdx.9-agree", f"{name} {theirs.get(other)}", ours[name].hex())
        for name, other in _AGREE.items()
        if theirs.get(other) != ours[name].hex()
    ]
    if theirs.get("report_data") != quote.report_data.hex():
        differing.append(Reason("tdx.9-agree", f"report_data {theirs.get('report_data')}", quote.report_data.hex()))
    if differing:
        raise EvidenceError("two parsers read this TDX quote differently", code="evidence-malformed", reasons=differing)


def _tcb_date(report: dict[str, Any]) -> date:
    """Return the earlier date of the matched platform level and QE level: a floor holds for both."""
    dates = (report["platform"]["tcb_level"]["tcbDate"], report["qe"]["tcb_level"]["tcbDate"])
    try:
        return min(date.fromisoformat(text[:10]) for text in dates)
    except ValueError as error:
        raise EvidenceError(
            "the TCB level has no date",
            code="evidence-not-authentic",
            reasons=[Reason("tdx.7-tcb", " / ".join(dates), "a date")],
        ) from error


def _platform(pck: dict[str, Any], tcb: dict[str, Any]) -> dict[str, str]:
    """Return who the machine is and how it is set up, from the PCK certificate: bytes in hex, flags as words."""
    platform = {
        "ppid": bytes(pck["ppid"]).hex(),
        "fmspc": bytes(pck["fmspc"]).hex(),
        "pceid": bytes(pck["pce_id"]).hex(),
        "pcesvn": str(pck["pce_svn"]),
        "cpusvn": bytes(pck["cpu_svn"]).hex(),
        "sgx_type": str(pck["sgx_type"]),
        "dynamic_platform": str(pck["dynamic_platform"]),
        "cached_keys": str(pck["cached_keys"]),
        "smt_enabled": str(pck["smt_enabled"]),
        "tcb_evaluation_data_number": str(tcb["eval_data_number"]),
    }
    if pck["platform_instance_id"] is not None:
        platform["platform_instance_id"] = bytes(pck["platform_instance_id"]).hex()
    return platform
