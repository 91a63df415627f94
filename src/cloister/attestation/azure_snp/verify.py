"""Verify evidence of an Azure confidential VM on SEV-SNP: a pure function of (evidence, endorsements, roots, now).

The chain: AMD's root > SNP report > hash of the runtime JSON > vTPM key (AK) > quote > nonce and PCRs.

Steps; an error names the step that refused:
  1 format   HCL report, runtime JSON, quote and PCR values parse; no part has an unknown name      azure/format.py
  2 report   the SNP report holds by every step of `sev-snp`, and VMPL 0 asked for it               snp/verify.py
  3 runtime  its report data is the hash of the runtime JSON, and zeros
  4 quote    the AK in the JSON signed, the TPM generated it, it is a quote over exactly PCR 0 - 23 tpm/quote.py
  5 boot     a firmware log, where there is one, leads to PCR 0 - 9                                 logs/tcg.py
  6 events   the runtime log replays to PCR 15 exactly, and its data hashes to its digests          events.py
A refusal in step 2 names the inner step too: `azure-snp.2-report.sev-snp.4-revocation.revoked`.

`Evidence.quote` is the HCL report (NV index 0x01400001). Parts:

| part | bytes |
| --- | --- |
| `tpm-quote` | TPM2B_ATTEST, then TPMT_SIGNATURE (or 256 bytes alone: RSASSA with SHA-256, as some agents send it) |
| `pcrs` | canonical CBOR {"sha256": {0: 32 bytes, ... 23: 32 bytes}} |
| `leaf` or `table` | optional: as for `sev-snp`; Azure's metadata service has the VCEK |
| `boot-log` | optional: `binary_bios_measurements` |

Endorsements and roots are those of `sev-snp`.

What is trusted: Microsoft's paravisor. It runs at VMPL 0 below the guest, holds the vTPM and its keys, and makes the runtime JSON. The
hardware measures the paravisor (`measurement`, the same for every VM of a release), and the paravisor measures the guest (PCRs).
Nothing says that the machine is Microsoft's: on any SEV-SNP machine its owner can start software of his own at VMPL 0, let the
report vouch for a key of his own, and quote any PCRs with it. So `launch` is `azure_launch`, made of both measurements
(`vtpm.launch`), and a policy that pins only PCRs or `boot` accepts such a forgery.

Not checked on purpose: the request type, versions and sizes in the header, which nobody signs; `user-data`, in which newer agents repeat
the nonce: the quote is what is fresh. A report that VMPL 1 or higher asked for is refused: a guest could have put a key of its own there.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Final

from cloister.attestation.azure import vtpm
from cloister.attestation.azure.format import SNP
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.roots import Roots
from cloister.attestation.snp import verify as snp_verify
from cloister.attestation.types import Claims, Evidence
from cloister.errors import EvidenceError

KIND: Final = "azure-snp"

STEPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "azure-snp.1-format": "the HCL report, its runtime data, the quote and the PCR values parse",
        "azure-snp.2-report": "AMD's hardware made the report inside, for the paravisor",
        "azure-snp.3-runtime": "the report vouches for the runtime data, which names the vTPM's key",
        "azure-snp.4-quote": "the vTPM's key signed a quote over exactly these PCR values",
        "azure-snp.5-boot": "the firmware log, where there is one, leads to the quoted boot registers",
        "azure-snp.6-events": "the runtime log leads to the quoted PCR 15",
    }
)
PARTS: Final = vtpm.PARTS | snp_verify.PARTS


def verify(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims:
    """Return what a genuine Azure VM on SEV-SNP states in `evidence`.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`; `reasons[0].where` is the step.
        ValueError: `now` has no time zone, or `evidence` is of another kind (a caller's mistake).
    """
    return examine(evidence, endorsements, roots, now=now, revocation=True, runtime_log=True)


def examine(
    evidence: Evidence,
    endorsements: Endorsements,
    roots: Roots,
    *,
    now: datetime,
    revocation: bool,
    runtime_log: bool,
) -> Claims:
    """The same; without `revocation`, that step of `sev-snp` is left out; without `runtime_log`, step 6, and the claims have no
    events: for looking at files, whose lists and logs nobody kept. Never for a decision.

    Raises:
        EvidenceError, ValueError: as `verify`.
    """
    if evidence.kind != KIND:
        raise ValueError(f"evidence of kind {evidence.kind!r}, this verifier takes {KIND!r}")
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    # (1)
    taken = vtpm.take(evidence, KIND, SNP, snp_verify.PARTS)
    # (2)
    parts = {name: data for name, data in evidence.parts.items() if name in snp_verify.PARTS}
    report = Evidence(snp_verify.KIND, taken.hcl.report, (), MappingProxyType(parts))
    try:
        hardware = snp_verify.examine(report, endorsements, roots, now=now, revocation=revocation)
    except EvidenceError as error:
        raise vtpm.inside(error, "azure-snp.2-report") from error
    if not hardware.attributes["vmpl0"]:
        raise vtpm.refused(
            "azure-snp.2-report.vmpl",
            f"VMPL {hardware.platform['vmpl']}",
            "0, the paravisor",
            "a guest made this report",
        )
    # (3) - (6)
    attest, boot = vtpm.check(evidence, taken, hardware.report_data, KIND, runtime_log=runtime_log)
    return vtpm.claims(hardware, evidence.events if runtime_log else (), taken, attest, boot)
