"""Verify NVIDIA device evidence: a pure function of (evidence, endorsements, roots, now).

Steps; an error names the step that refused:
  1 format        our parser takes the report apart; the parts are `chain` and, if there, `ocsp`         nvidia/format.py
  2 chain         the device's certificates lead to a pinned root and hold at `now`                      pki/path.py
  3 revocation    each certificate below the root that an authority issued has a current OCSP answer, good  pki/ocsp.py
  4 fwid          the firmware digest in the report is the one in the certificate of its key             nvidia/device.py
  5 signature     the device's key signs request and response
  6 nonce         the requester's nonce becomes the report data: what asked for this report is bound by it
  7 rim           the manifests of this driver and this VBIOS are NVIDIA's, signature and chain, and they are for the
                  versions that the signed report names                                                  nvidia/rim.py
  8 signers       the certificates of the manifests' signers have current OCSP answers, good             pki/ocsp.py
  9 measurements  every active golden measurement of both manifests is in the report, with an accepted value
 10 mode          debug, multi-GPU and decoder state become claims; a device in debug state is never confidential
Sources: DMTF DSP0274 1.1.0 (SPDM), TCG DICE 1.1, RFC 5280, RFC 6960, ISO/IEC 19770-2, NVIDIA's nvtrust and attestation-sdk for
what no standard says. 2 to 6 are judged together, and so are 7 to 9: all violations are reported.

Evidence: `quote` is the report; part `chain` the certificates as PEM, attestation key first, root last; part `ocsp` DER OCSP
responses, one after another. No events: a device has no log. NVSwitches (LS10) write the same format and are the same kind of
evidence; their `tee` is `nvidia-switch`, so none of them counts as a GPU.

Endorsements (`nvidia-gpu`): manifests by their id, or as `rim/<product>/<version>`; OCSP responses by `ocsp/<serial, lower-case hex>`, of the device's certificates
and of the manifests' signers. Without both the verifier refuses. OCSP answers may be stapled as well, because they are signed and
live for a day; what the relying party has counts first, and whichever of the two says revoked counts always.

Not checked on purpose: revocation of the first certificate. The device itself makes it, for the key of the firmware that runs; no
authority knows its serial number, and NVIDIA's verifiers skip it too. Its issuer, the device key, is checked, and the first one must
be of that sort: no authority's, with an FWID. Nor does this say whether a GPU is plugged into the machine that sends its report: the
machine's measured software must hold the session with the GPU and ask it for its own binding (docs/attestation/nvidia.md).

MSR 35 (NVDEC0) is not compared where the report says that the decoder is disabled, as NVIDIA prescribes. Development mode of Hopper
shows in no field of a report: it shows as measurements that no production manifest has.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Final

from cloister.attestation.endorsements import Endorsements
from cloister.attestation.nvidia.examine import KIND as _KIND
from cloister.attestation.nvidia.examine import examine
from cloister.attestation.roots import Roots
from cloister.attestation.types import Claims, Evidence

KIND: Final[str] = _KIND

STEPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "nvidia-gpu.1-format": "The report and its parts parse.",
        "nvidia-gpu.2-chain": "The device's certificates lead to NVIDIA's root and are valid now.",
        "nvidia-gpu.3-revocation": "A current OCSP answer says good for every certificate that an authority issued.",
        "nvidia-gpu.4-fwid": "The firmware named in the report is the firmware that owns the key.",
        "nvidia-gpu.5-signature": "The device's key signed the request and the response.",
        "nvidia-gpu.6-nonce": "The nonce that the report answers is read; the binding says whether it was ours.",
        "nvidia-gpu.7-rim": "The manifests of this driver and this VBIOS are signed by NVIDIA and current.",
        "nvidia-gpu.8-signers": "A current OCSP answer says good for every signer of the manifests.",
        "nvidia-gpu.9-measurements": "Every golden measurement is in the report with an accepted value.",
        "nvidia-gpu.10-mode": "Debug, multi-GPU and decoder state are read.",
    }
)


def verify(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims:
    """Return what a genuine NVIDIA device with NVIDIA's firmware states in `evidence`.

    `gpu` of the claims is `confidential` for a GPU that passed all steps outside of debug state.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`; `reasons[0].where` is the step.
        ValueError: `now` has no time zone, or `evidence` is of another kind (a caller's mistake).
    """
    return examine(evidence, endorsements, roots, now=now, complete=True).claims
