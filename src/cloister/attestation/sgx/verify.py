"""Verify SGX evidence: a pure function of (evidence, endorsements, roots, now).

Steps; an error names the step that refused:
  1 format      our parser takes the quote apart; bytes after its end and parts are refused             sgx/format.py
  2 root        the chain's last certificate has a pinned SHA-256                                       dcap/roots.py
  3 collateral  TCB info and QE identity: of this TEE, signed by the root's own signer, inside their windows at `now`; both
                CRLs current
  4 chain       PCK, TCB and QE identity certificates lead to the root, valid and unrevoked at `now`
  5 qe          the PCK key signs the QE report, the report names the attestation key and fits the QE identity
  6 signature   the attestation key signs header and enclave report
  7 tcb         FMSPC, PCE, TCB level and QE level match; no level is revoked
  8 attributes  debug is off
  9 agree       our parser and dcap-qvl read the same enclave report and the same PCK certificate
 10 events      the data of the runtime log hash to their digests                                       events.py
Steps 3 to 8 are dcap-qvl's (Intel DCAP quote verification, in its own order); it is given the root and the time, and it
applies no policy. Our own implementation of every signature, chain and window must agree (dcap/own.py). TCB status, dates
and advisories are claims: `appraise` judges them. The debug bit is refused here because dcap-qvl refuses it, and read
again by our parser, so `Policy.debug` cannot admit a debug enclave.

Evidence: `quote`, no parts. Endorsements: kind `sgx`, subject FMSPC in upper-case hex, data as for TDX.

An enclave has no runtime register. Its log is bound by the report data (`Claims.log_in`): the enclave reports
`events.fold(report_data, events)`, and `check_binding` folds what it wants in the same way. So step 10 proves that data belong
to digests, and `check_binding` that the digests are those that the enclave meant. The enclave's own code could rewrite its
log, where TDX hardware would not let it: MRENCLAVE must name code that does not.

Not checked on purpose: PROVISIONKEY, EINITTOKENKEY, KSS and CET are in `Claims.attributes`, where a contract can demand them.
MRENCLAVE says nothing about what an enclave loads later; Gramine puts its manifest into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Final

from cloister.attestation import events as event_log
from cloister.attestation.dcap.format import refuse_parts
from cloister.attestation.dcap.qvl import judge
from cloister.attestation.dcap.roots import PINS
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.roots import Roots, choose
from cloister.attestation.sgx import format as sgx_format
from cloister.attestation.sgx.format import SGX
from cloister.attestation.types import Claims, Evidence

KIND: Final = "sgx"

STEPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "sgx.1-format": "the quote has the form of version 3, and nothing follows it",
        "sgx.2-root": "the certificate chain ends at a pinned root",
        "sgx.3-collateral": "the vendor's collateral is for this TEE, signed, and valid at this time",
        "sgx.4-chain": "the certificates lead to the root, valid and unrevoked at this time",
        "sgx.5-qe": "the vendor's quoting enclave made the attestation key",
        "sgx.6-signature": "the attestation key signed this enclave report",
        "sgx.7-tcb": "the platform's TCB level is listed and not revoked",
        "sgx.8-attributes": "the enclave has no debugger",
        "sgx.9-agree": "two implementations read the same report and the same machine",
        "sgx.10-events": "the runtime log's data hash to its digests",
    }
)

PARTS: Final[frozenset[str]] = frozenset()


def verify(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims:
    """Return what a genuine SGX platform states in `evidence`.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`; `reasons[0].where` is the step.
        ValueError: `now` has no time zone, or `evidence` is of another kind (a caller's mistake).
    """
    if evidence.kind != KIND:
        raise ValueError(f"evidence of kind {evidence.kind!r}, this verifier takes {KIND!r}")
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    # (1)
    refuse_parts(evidence.parts, PARTS, SGX)
    quote = sgx_format.parse(evidence.quote)
    # (2)
    tee = choose(KIND, quote.certificates[-1], PINS, roots, where="sgx.2-root")
    # (3) - (9)
    found = judge(SGX, evidence.quote, quote, endorsements, now=now, read=_as_dcap_qvl(quote))
    # (10)
    event_log.check_log(evidence.events, None, where="sgx.10-events")
    return Claims(
        kind="tee",
        tee=tee,
        debug=quote.debug,
        tcb_status=found.tcb_status,
        tcb_date=found.tcb_date,
        advisories=found.advisories,
        report_data=quote.report_data,
        measurements=MappingProxyType(quote.measurements()),
        launch="mrenclave",
        svns=MappingProxyType({**found.svns, **quote.numbers()}),
        attributes=MappingProxyType({**quote.attributes(), **found.pck.attributes()}),
        events=evidence.events,
        log_in="report-data",
        platform=MappingProxyType(found.pck.platform()),
        chain=found.chain,
        valid_until=found.valid_until,
    )


def _as_dcap_qvl(quote: sgx_format.Quote) -> dict[str, object]:
    """Return all 384 bytes of the report under dcap-qvl's names; its `reserved` fields hold CONFIGID and others."""
    report, fields, numbers = quote.report, quote.measurements(), quote.numbers()
    return {
        "cpu_svn": fields["cpusvn"].hex(),
        "misc_select": int.from_bytes(fields["miscselect"], "little"),
        "reserved1": (report[20:32] + fields["isvextprodid"]).hex(),
        "attributes": fields["attributes"].hex(),
        "mr_enclave": fields["mrenclave"].hex(),
        "reserved2": report[96:128].hex(),
        "mr_signer": fields["mrsigner"].hex(),
        "reserved3": (report[160:192] + fields["configid"]).hex(),
        "isv_prod_id": numbers["isvprodid"],
        "isv_svn": numbers["isvsvn"],
        "reserved4": (report[260:304] + fields["isvfamilyid"]).hex(),
        "report_data": quote.report_data.hex(),
    }
