"""Verify TDX evidence: a pure function of (evidence, endorsements, roots, now).

Steps; an error names the step that refused:
  1 format      our parser takes the quote apart; bytes after its end and unknown parts are refused     tdx/format.py
  2 root        the chain's last certificate has a pinned SHA-256                                       dcap/roots.py
  3 collateral  TCB info and QE identity: of this TEE, signed by the root's own signer, inside their windows at `now`; both
                CRLs current
  4 chain       PCK, TCB and QE identity certificates lead to the root, valid and unrevoked at `now`
  5 qe          the PCK key signs the QE report, the report names the attestation key and fits the QE identity
  6 signature   the attestation key signs header and TD report
  7 tcb         FMSPC, PCE, TCB level, TDX module identity and QE level match; no level is revoked
  8 attributes  debug, profiling and migration are off, SEPT_VE_DISABLE is set, reserved bits are zero, no service TD
  9 agree       our parser and dcap-qvl read the same TD report and the same PCK certificate
 10 events      the runtime log replays to RTMR 3 exactly, and its data hashes to its digests           events.py
 11 boot        a CC event log, where there is one, replays to RTMR 0, 1 and 2 exactly                  tdx/ccel.py
Steps 3 to 8 are dcap-qvl's (Intel DCAP quote verification, in its own order); it is given the root and the time, and it
applies no policy. Our own implementation of every signature, chain and window must agree (dcap/own.py). TCB status, dates
and advisories are claims: `appraise` judges them. The debug bit is refused here because dcap-qvl refuses it, and read
again by our parser, so `Policy.debug` cannot admit a debug TD.

Evidence: `quote`; part `ccel` (the raw CC event log), optional. Endorsements: kind `tdx`, subject FMSPC in upper-case hex,
data the collateral of dcap/collateral.py. A PCK chain inside collateral would replace the quote's own, so dcap-qvl never
gets it.

Not checked on purpose: TDATTRIBUTES.PERFMON, PKS, KL and TPA, which dcap-qvl lets pass: they change what the guest may do, not
who can read it. They are in `Claims.attributes`, where a contract can demand them off.
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
from cloister.attestation.tdx import ccel
from cloister.attestation.tdx import format as tdx_format
from cloister.attestation.tdx.format import TDX
from cloister.attestation.types import BootEvent, Claims, Evidence

KIND: Final = "tdx"

STEPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "tdx.1-format": "the quote has the form of version 4 or 5, and nothing follows it",
        "tdx.2-root": "the certificate chain ends at a pinned root",
        "tdx.3-collateral": "the vendor's collateral is for this TEE, signed, and valid at this time",
        "tdx.4-chain": "the certificates lead to the root, valid and unrevoked at this time",
        "tdx.5-qe": "the vendor's quoting enclave made the attestation key",
        "tdx.6-signature": "the attestation key signed this TD report",
        "tdx.7-tcb": "the platform's TCB level is listed and not revoked",
        "tdx.8-attributes": "the TD has no debugger, profiler, migration or service TD",
        "tdx.9-agree": "two implementations read the same report and the same machine",
        "tdx.10-events": "the runtime log explains RTMR 3",
        "tdx.11-boot": "the boot log, where there is one, explains RTMR 0, 1 and 2",
    }
)

PARTS: Final = frozenset({"ccel"})

DCAP_QVL: Final[Mapping[str, str]] = MappingProxyType(
    {
        "teetcbsvn": "tee_tcb_svn", "mrseam": "mr_seam", "mrsignerseam": "mr_signer_seam",
        "seamattributes": "seam_attributes", "tdattributes": "td_attributes", "xfam": "xfam", "mrtd": "mr_td",
        "mrconfigid": "mr_config_id", "mrowner": "mr_owner", "mrownerconfig": "mr_owner_config",
        "rtmr0": "rt_mr0", "rtmr1": "rt_mr1", "rtmr2": "rt_mr2", "rtmr3": "rt_mr3",
        "teetcbsvn2": "tee_tcb_svn2", "mrservicetd": "mr_service_td",
    }
)  # fmt: skip
"""Our name -> dcap-qvl's name of the same TD report field."""


def verify(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims:
    """Return what a genuine TDX platform states in `evidence`.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`; `reasons[0].where` is the step.
        ValueError: `now` has no time zone, or `evidence` is of another kind (a caller's mistake).
    """
    return examine(evidence, endorsements, roots, now=now, runtime_log=True)


def examine(
    evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime, runtime_log: bool
) -> Claims:
    """The same; without `runtime_log`, step 10 is left out and the claims have no events: where another register holds
    the log (a cloud's vTPM), and to look at a quote in a file whose log nobody kept.

    Raises:
        EvidenceError, ValueError: as `verify`.
    """
    if evidence.kind != KIND:
        raise ValueError(f"evidence of kind {evidence.kind!r}, this verifier takes {KIND!r}")
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    # (1)
    refuse_parts(evidence.parts, PARTS, TDX)
    quote = tdx_format.parse(evidence.quote)
    # (2)
    tee = choose(KIND, quote.certificates[-1], PINS, roots, where="tdx.2-root")
    # (3) - (9)
    measurements = quote.measurements()
    read: dict[str, object] = {DCAP_QVL[name]: value.hex() for name, value in measurements.items()}
    read["report_data"] = quote.report_data.hex()
    found = judge(TDX, evidence.quote, quote, endorsements, now=now, read=read)
    # (10)
    if runtime_log:
        event_log.check_log(evidence.events, measurements["rtmr3"], where="tdx.10-events")
    # (11)
    boot: tuple[BootEvent, ...] = ()
    if "ccel" in evidence.parts:
        boot = ccel.events(evidence.parts["ccel"], measurements, where="tdx.11-boot")
    return Claims(
        kind="tee",
        tee=tee,
        debug=quote.debug,
        tcb_status=found.tcb_status,
        tcb_date=found.tcb_date,
        advisories=found.advisories,
        report_data=quote.report_data,
        measurements=MappingProxyType(measurements),
        launch="mrtd",
        svns=MappingProxyType({**found.svns, "tdx_module_svn": measurements["teetcbsvn"][0]}),
        attributes=MappingProxyType({**quote.attributes(), **found.pck.attributes()}),
        events=evidence.events if runtime_log else (),
        boot_log=boot,
        platform=MappingProxyType(found.pck.platform()),
        chain=found.chain,
        valid_until=found.valid_until,
    )
