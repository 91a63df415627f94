"""The steps of `nvidia.verify`, for it and for files of vendors' tools, which come with less than a verdict needs.

`complete` is what `verify` always says: manifests and revocation must be there. Without it, what is there is judged all the same,
and what was not done is said; `gpu` stays `none` then. Nothing that a peer sends chooses between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from cloister.attestation.endorsements import Endorsements
from cloister.attestation.nvidia import device as nvidia_device
from cloister.attestation.nvidia import format as nvidia_format
from cloister.attestation.nvidia import rim as nvidia_rim
from cloister.attestation.nvidia.device import Device
from cloister.attestation.nvidia.format import Field, Report
from cloister.attestation.nvidia.rim import Rim
from cloister.attestation.nvidia.roots import PINS
from cloister.attestation.pki import ocsp
from cloister.attestation.pki.certificate import Certificate, from_pem
from cloister.attestation.pki.path import check_path, describe
from cloister.attestation.roots import Roots, choose
from cloister.attestation.types import NOT_RATED, Claims, Evidence
from cloister.errors import EvidenceError, Reason

KIND: Final[str] = "nvidia-gpu"
GPU: Final = "nvidia-gpu"
SWITCH: Final = "nvidia-switch"
PARTS: Final = ("chain", "ocsp")

OCSP_AGE: Final = timedelta(hours=24)
"""NVIDIA's responders answer for 24 hours; an older answer is refused even if it claims to live longer."""
NVDEC0_INDEX: Final = 35
"""The measurement of the video decoder's firmware, absent where the decoder is disabled (nvtrust, verifier.py)."""
SINGLE_PASSTHROUGH: Final = 0
MULTI_PASSTHROUGH: Final = 1
PROTECTED_PCIE: Final = 2
"""Values of the opaque field FEATURE_FLAG (attestation-sdk, gpu_opaque_data)."""
SWITCH_PROJECT: Final = "5612_0002_890"
"""LS10 reports carry no project fields; NVIDIA's verifiers use these constants (nv_switch_verifier, config)."""

CHAIN: Final = "nvidia-gpu.2-chain"
REVOCATION: Final = "nvidia-gpu.3-revocation"
# the last two words are what manifests of test vectors call these refusals
FWID: Final = "nvidia-gpu.4-fwid.gpu.fwid"
SIGNATURE: Final = "nvidia-gpu.5-signature.gpu.signature"
NONCE: Final = "nvidia-gpu.6-nonce.gpu.nonce"
RIM: Final = "nvidia-gpu.7-rim"
SIGNERS: Final = "nvidia-gpu.8-signers"
MEASUREMENTS: Final = "nvidia-gpu.9-measurements"
MEASUREMENT: Final = f"{MEASUREMENTS}.gpu.measurement"


@dataclass(frozen=True, slots=True)
class Examination:
    """What came out."""

    claims: Claims
    report: Report
    device: Device
    golden: int
    """Golden measurements that the report matches."""


def driver_rim(report: Report, device: Device) -> str:
    """Return the id of the driver's manifest; empty for a switch, which has no driver of its own.

    Raises:
        EvidenceError: `evidence-malformed`: a GPU that does not name its driver.
    """
    if device.is_switch:
        return ""
    version = report.text(Field.DRIVER_VERSION)
    if not version:
        raise _malformed("no driver version", "opaque field 3")
    if device.arch == "HOPPER":
        return f"NV_GPU_DRIVER_GH100_{version}"
    return f"NV_GPU_CC_DRIVER_{_chip(report, device)}_{version}"


def vbios_rim(report: Report, device: Device) -> str:
    """Return the id of the VBIOS's manifest.

    Raises:
        EvidenceError: `evidence-malformed`: a GPU that does not name its board, or a VBIOS version of another form.
    """
    version = report.vbios().replace(".", "")
    if device.is_switch:
        return f"NV_SWITCH_BIOS_{SWITCH_PROJECT}_{version}"
    parts = [report.text(field) for field in (Field.PROJECT, Field.PROJECT_SKU, Field.CHIP_SKU)]
    if not all(parts):
        raise _malformed("no project, project SKU or chip SKU", "opaque fields 15, 17 and 18")
    return f"NV_GPU_VBIOS_{'_'.join(parts)}_{version}"


def examine(
    evidence: Evidence,
    endorsements: Endorsements,
    roots: Roots,
    *,
    now: datetime,
    complete: bool,
    nonce: bytes | None = None,
) -> Examination:
    """Judge `evidence` by every step whose material is there; with `complete`, all of it must be.

    `nonce`, where it is known already, is compared in step 6; `verify` leaves that to the binding.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`, with all violations of the steps that refused.
        ValueError: `now` has no time zone, or `evidence` is of another kind (a caller's mistake).
    """
    if evidence.kind != KIND:
        raise ValueError(f"evidence of kind {evidence.kind!r}, this verifier takes {KIND!r}")
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    # (1)
    report, device, chain = _read(evidence)
    stapled = ocsp.from_concatenated(evidence.parts.get("ocsp", b""), where=REVOCATION)
    _named(report, device)  # a report that names no manifests is malformed, whoever signed it
    reasons: list[Reason] = []
    ends: list[datetime] = []
    tee = SWITCH if device.is_switch else GPU
    # (2)
    try:
        tee = choose(tee, chain[-1].der, PINS, roots, where=f"{CHAIN}.root")
    except EvidenceError as error:
        reasons.extend(error.reasons)
    try:
        ends.append(check_path(chain, now=now, where=CHAIN))
    except EvidenceError as error:
        reasons.extend(error.reasons)
    # (3) from the device key upward
    own = _responses(chain[1:-1], endorsements)
    if complete or own or stapled:
        _revocation(chain, own, stapled, now, REVOCATION, 1, reasons, ends)
    # (4) old drivers (535) and switches report none; what they report must fit
    reported = report.fields.get(Field.FWID)
    if reported is not None and reported != device.fwid:
        reasons.append(
            Reason(
                FWID,
                reported.hex(),
                device.fwid.hex(),
                "the chain is of other firmware",
            )
        )
    # (5)
    if not _signed(report, chain[0]):
        reasons.append(
            Reason(
                SIGNATURE,
                f"a signature that the key of {chain[0].subject} did not make",
                "ECDSA P-384 over request and response",
                "the report was changed, or the chain is of another device",
            )
        )
    # (6)
    if nonce is not None and report.nonce != nonce:
        reasons.append(
            Reason(NONCE, report.nonce.hex(), nonce.hex(), "the report was made for somebody else: a replay")
        )
    if reasons:
        raise _refused("the report is not that of a genuine NVIDIA device", reasons)
    # (7) (8) (9)
    rims: list[Rim] = []
    golden: dict[int, frozenset[bytes]] = {}
    for name, version in _named(report, device):
        data = _find(endorsements, name, version, report, device)
        if data is None:
            if not complete:
                continue
            try:
                endorsements.find(KIND, name, where=RIM)
            except EvidenceError as error:
                reasons.extend(error.reasons)
            continue
        rim = nvidia_rim.read(data, where=RIM)
        soft, until = _manifest(rim, roots, now, reasons)
        ends.append(until)
        if soft and not tee.startswith("soft-"):
            tee = f"soft-{tee}"  # a test manifest vouches for nothing, whoever made the device
        rim_responses = _responses(rim.chain[:-1], endorsements)
        if complete or rim_responses:
            _revocation(rim.chain, rim_responses, stapled, now, SIGNERS, 0, reasons, ends)
        _same(rim, name, version, report, device, reasons)
        for index, values in rim.golden.items():
            if index in golden:
                reasons.append(
                    Reason(
                        f"{MEASUREMENT}.{index}", "a golden value in both manifests", "each measurement in one of them"
                    )
                )
            golden[index] = values
        rims.append(rim)
    matched = _measurements(report, golden, reasons)
    if reasons:
        raise _refused("the device does not run what NVIDIA's manifests describe", reasons)
    # (10)
    confidential = complete and not device.is_switch and not device.debug
    return Examination(
        claims=Claims(
            kind="device",
            tee=tee,
            debug=device.debug,
            tcb_status=NOT_RATED,
            report_data=report.nonce,
            measurements=MappingProxyType(
                {f"msr{index}": value for index, value in enumerate(report.measurements)} | {"fwid": device.fwid}
            ),
            svns=MappingProxyType(_svns(report)),
            attributes=MappingProxyType(_attributes(report)),
            platform=MappingProxyType(_platform(report, device, chain)),
            gpu="confidential" if confidential else "none",
            chain=describe(chain) + tuple(line for rim in rims for line in describe(rim.chain)),
            valid_until=min(ends),
        ),
        report=report,
        device=device,
        golden=matched,
    )


def wanted(evidence: Evidence) -> tuple[tuple[str, ...], tuple[Certificate, ...]]:
    """Return the ids of the manifests that `evidence` needs, and its chain, whose middle needs OCSP answers.

    For whoever collects endorsements. Nothing is authentic yet; ids are made of letters, digits, `.`, `_` and `-`.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    report, device, chain = _read(evidence)
    return tuple(name for name, _ in _named(report, device)), chain


def missing(evidence: Evidence, endorsements: Endorsements) -> frozenset[str]:
    """Return the steps that `examine` leaves out without `complete`, because nothing is there for them.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    report, device, chain = _read(evidence)
    found: set[str] = set()
    if not evidence.parts.get("ocsp") and not _responses(chain[1:-1], endorsements):
        found.add(REVOCATION)
    for name, version in _named(report, device):
        data = _find(endorsements, name, version, report, device)
        if data is None:
            found |= {RIM, SIGNERS, MEASUREMENTS}
        elif not _responses(nvidia_rim.read(data, where=RIM).chain[:-1], endorsements):
            found.add(SIGNERS)
    return frozenset(found)


def _read(evidence: Evidence) -> tuple[Report, Device, tuple[Certificate, ...]]:
    report = nvidia_format.parse(evidence.quote)
    _parts(evidence)
    chain = _chain(evidence.parts["chain"])
    if len(chain) < 3:
        raise _malformed(f"{len(chain)} certificates", "attestation key, device key, authorities and root")
    return report, nvidia_device.read(chain[0], where=CHAIN), chain


def _named(report: Report, device: Device) -> tuple[tuple[str, str], ...]:
    """Return (id, version) of every manifest that judges `report`."""
    found = (
        (driver_rim(report, device), report.text(Field.DRIVER_VERSION)),
        (vbios_rim(report, device), report.vbios()),
    )
    return tuple((name, version) for name, version in found if name)


def _find(endorsements: Endorsements, name: str, version: str, report: Report, device: Device) -> bytes | None:
    """Return a manifest by its id, or by what stands in it: a file beside evidence does not say its id."""
    data = endorsements.get(KIND, name)
    return data if data is not None else endorsements.get(KIND, f"rim/{_chip(report, device)}/{version}")


@lru_cache(maxsize=64)
def _chain(pem: bytes) -> tuple[Certificate, ...]:
    # a fact about bytes: a device shows the same chain until its firmware changes
    return from_pem(pem, where=CHAIN)


def _parts(evidence: Evidence) -> None:
    unknown = sorted(set(evidence.parts) - set(PARTS))
    if unknown:
        raise _malformed(f"parts {', '.join(unknown)[:200]}", "at most chain and ocsp")
    if "chain" not in evidence.parts:
        raise _malformed("no part chain", "the device's certificates, PEM")
    if evidence.events:
        raise _malformed(f"{len(evidence.events)} events", "none: a device has no log")


def _responses(certificates: Sequence[Certificate], endorsements: Endorsements) -> tuple[ocsp.Response, ...]:
    found = (endorsements.get(KIND, f"ocsp/{certificate.serial:x}") for certificate in certificates)
    return tuple(ocsp.from_der_response(data, where=REVOCATION) for data in found if data is not None)


def _revocation(
    chain: Sequence[Certificate],
    own: Sequence[ocsp.Response],
    stapled: Sequence[ocsp.Response],
    now: datetime,
    where: str,
    first: int,
    reasons: list[Reason],
    ends: list[datetime],
) -> None:
    try:
        until = ocsp.check(chain, own, stapled=stapled, now=now, where=where, max_age=OCSP_AGE, first=first)
    except EvidenceError as error:
        reasons.extend(error.reasons)
    else:
        ends.extend([until] if until is not None else [])


def _signed(report: Report, leaf: Certificate) -> bool:
    key = leaf.key
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        return False
    r, s = (int.from_bytes(part, "big") for part in (report.signature[:48], report.signature[48:]))
    try:
        key.verify(encode_dss_signature(r, s), report.signed, ec.ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True


def _manifest(rim: Rim, roots: Roots, now: datetime, reasons: list[Reason]) -> tuple[bool, datetime]:
    try:
        kind, until = nvidia_rim.check(rim, roots, now=now, where=RIM)
    except EvidenceError as error:
        reasons.extend(error.reasons)
        return False, now
    return kind.startswith("soft-"), until


def _same(rim: Rim, name: str, version: str, report: Report, device: Device, reasons: list[Reason]) -> None:
    """The manifest is for what the report names, whatever name it was filed under."""
    if rim.version != version.upper():
        reasons.append(
            Reason(
                f"{RIM}.version",
                f"a manifest of {rim.version} as {name}",
                version,
                "an older or newer manifest cannot stand for this one",
            )
        )
    # manifests of switches name their board in a form that no public document gives
    if not device.is_switch and rim.product != _chip(report, device):
        reasons.append(Reason(f"{RIM}.product", f"a manifest for {rim.product}", _chip(report, device)))


def _measurements(report: Report, golden: dict[int, frozenset[bytes]], reasons: list[Reason]) -> int:
    matched = 0
    no_decoder = report.byte(Field.NVDEC0_STATUS) == nvidia_format.DISABLED
    for index, values in sorted(golden.items()):
        value = report.measurements[index] if index < len(report.measurements) else None
        if value in values:
            matched += 1
        elif not (index == NVDEC0_INDEX and no_decoder):
            reasons.append(
                Reason(
                    f"{MEASUREMENT}.{index}",
                    value.hex() if value is not None else "no such measurement",
                    " or ".join(sorted(each.hex() for each in values)),
                    "firmware that the manifests do not know, or development mode",
                )
            )
    return matched


def _chip(report: Report, device: Device) -> str:
    if device.arch == "BLACKWELL":  # attestation-sdk, gpu_spdm: GB100 where the report does not say
        return report.text(Field.CHIP_INFO) or "GB100"
    return "GH100" if device.arch == "HOPPER" else device.chip


def _svns(report: Report) -> dict[str, int]:
    """Return versions as numbers that grow: `driver` is major * 10**6 + minor * 10**3 + patch, `vbios` its five bytes."""
    svns = {"vbios": int(report.vbios().replace(".", ""), 16)}
    numbers = report.text(Field.DRIVER_VERSION).split(".")
    if 1 <= len(numbers) <= 3 and all(part.isdigit() and len(part) <= 3 for part in numbers):
        major, minor, patch = (*(int(part) for part in numbers), 0, 0)[:3]
        svns |= {"driver": (major * 1000 + minor) * 1000 + patch, "driver_major": major}
    return svns


def _attributes(report: Report) -> dict[str, bool]:
    """Return what the report says; what it leaves out is absent, and a policy that asks for it refuses."""
    attributes: dict[str, bool] = {}
    flag = report.number(Field.FEATURE_FLAG)
    if flag is not None:
        attributes |= {"spt": flag == SINGLE_PASSTHROUGH, "mpt": flag == MULTI_PASSTHROUGH}
    protected = report.byte(Field.PROTECTED_PCIE_STATUS)
    if protected in (nvidia_format.ENABLED, nvidia_format.DISABLED):
        attributes["ppcie"] = protected == nvidia_format.ENABLED
    elif flag is not None:
        attributes["ppcie"] = flag == PROTECTED_PCIE
    decoder = report.byte(Field.NVDEC0_STATUS)
    if decoder in (nvidia_format.ENABLED, nvidia_format.DISABLED):
        attributes["nvdec0_disabled"] = decoder == nvidia_format.DISABLED
    return attributes


def _platform(report: Report, device: Device, chain: Sequence[Certificate]) -> dict[str, str]:
    """Return who the device is. `udid` and `device_key` last as long as the chip; `ueid` changes with its firmware."""
    platform = {
        "ueid": f"{chain[0].serial:x}",  # NVIDIA's verifiers print the same number in decimal
        "device_key": f"{chain[1].serial:x}",
        "udid": device.udid,
        "fwid": device.fwid.hex(),
        "chip": device.chip,
        "arch": device.arch,
        "vbios": report.vbios(),
        "driver": report.text(Field.DRIVER_VERSION),
        "sku": report.text(Field.CHIP_SKU),
        "project": report.text(Field.PROJECT),
        "project_sku": report.text(Field.PROJECT_SKU),
    }
    switches = report.fields.get(Field.SWITCH_PDI, b"")
    if switches and len(switches) % 8 == 0:
        each = {switches[at : at + 8].hex() for at in range(0, len(switches), 8)}
        platform["switch_pdi"] = ",".join(sorted(each))
    return {name: value for name, value in platform.items() if value}


def _malformed(found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "the NVIDIA evidence does not parse",
        code="evidence-malformed",
        reasons=[Reason(nvidia_format.WHERE, found, wanted)],
    )


def _refused(message: str, reasons: list[Reason]) -> EvidenceError:
    return EvidenceError(message, code="evidence-not-authentic", reasons=reasons)
