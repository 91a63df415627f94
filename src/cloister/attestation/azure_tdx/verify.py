"""Verify evidence of an Azure confidential VM on TDX: a pure function of (evidence, endorsements, roots, now).

The chain: Intel's root > TD quote > hash of the runtime JSON > vTPM key (AK) > quote > nonce and PCRs.

Steps; an error names the step that refused:
  1 format   HCL report, runtime JSON, quote and PCR values parse; no part has an unknown name      azure/format.py
  2 report   the TD quote holds by every step of `tdx` but that of RTMR 3                           tdx/verify.py
  3 runtime  its report data is the hash of the runtime JSON, and zeros
  4 quote    the AK in the JSON signed, the TPM generated it, it is a quote over exactly PCR 0 - 23 tpm/quote.py
  5 boot     a firmware log, where there is one, leads to PCR 0 - 9                                 logs/tcg.py
  6 events   the runtime log replays to PCR 15 exactly, and its data hashes to its digests          events.py
A refusal in step 2 names the inner step too: `azure-tdx.2-report.tdx.7-tcb`.

`Evidence.quote` is the HCL report (NV index 0x01400001). Its TDREPORT can be checked only by the CPU that made it, so it is not
looked at: the part `td-quote` is the same statement, signed (Azure's metadata service turns one into the other). Parts:

| part | bytes |
| --- | --- |
| `td-quote` | TDX quote, version 4 or 5, without padding |
| `tpm-quote` | TPM2B_ATTEST, then TPMT_SIGNATURE (or 256 bytes alone: RSASSA with SHA-256, as some agents send it) |
| `pcrs` | canonical CBOR {"sha256": {0: 32 bytes, ... 23: 32 bytes}} |
| `boot-log` | optional: `binary_bios_measurements` |

Endorsements and roots are those of `tdx`.

What is trusted: Microsoft's paravisor, which runs as the L1 TD below the guest, holds the vTPM and makes the runtime JSON; see
azure_snp/verify.py. MRTD and the RTMRs measure it, the PCRs measure the guest.

Not checked on purpose: RTMR 3, whose log is the paravisor's; it is a measurement that a policy can pin.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Final

from cloister.attestation.azure import vtpm
from cloister.attestation.azure.format import TDX
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.roots import Roots
from cloister.attestation.tdx import verify as tdx_verify
from cloister.attestation.types import Claims, Evidence
from cloister.errors import EvidenceError

KIND: Final = "azure-tdx"

STEPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "azure-tdx.1-format": "the HCL report, its runtime data, the quotes and the PCR values parse",
        "azure-tdx.2-report": "Intel's hardware made the TD quote",
        "azure-tdx.3-runtime": "the TD quote vouches for the runtime data, which names the vTPM's key",
        "azure-tdx.4-quote": "the vTPM's key signed a quote over exactly these PCR values",
        "azure-tdx.5-boot": "the firmware log, where there is one, leads to the quoted boot registers",
        "azure-tdx.6-events": "the runtime log leads to the quoted PCR 15",
    }
)
OWN: Final = frozenset({"td-quote"})
PARTS: Final = vtpm.PARTS | OWN


def verify(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims:
    """Return what a genuine Azure VM on TDX states in `evidence`.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`; `reasons[0].where` is the step.
        ValueError: `now` has no time zone, or `evidence` is of another kind (a caller's mistake).
    """
    return examine(evidence, endorsements, roots, now=now, runtime_log=True)


def examine(
    evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime, runtime_log: bool
) -> Claims:
    """The same; without `runtime_log`, step 6 is left out and the claims have no events: for looking at files, whose logs
    nobody kept. Never for a decision.

    Raises:
        EvidenceError, ValueError: as `verify`.
    """
    if evidence.kind != KIND:
        raise ValueError(f"evidence of kind {evidence.kind!r}, this verifier takes {KIND!r}")
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    # (1)
    taken = vtpm.take(evidence, KIND, TDX, OWN)
    if "td-quote" not in evidence.parts:
        raise vtpm.malformed("azure-tdx.1-format", "no part 'td-quote'", "a TD quote")
    # (2)
    quote = Evidence(tdx_verify.KIND, evidence.parts["td-quote"])
    try:
        hardware = tdx_verify.examine(quote, endorsements, roots, now=now, runtime_log=False)
    except EvidenceError as error:
        raise vtpm.inside(error, "azure-tdx.2-report") from error
    # (3) - (6)
    attest, boot = vtpm.check(evidence, taken, hardware.report_data, KIND, runtime_log=runtime_log)
    return vtpm.claims(hardware, evidence.events if runtime_log else (), taken, attest, boot)
