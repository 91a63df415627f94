"""NVIDIA evidence in files: a report with its chain, and what belongs to it; a manifest alone; what NVIDIA's service said.

Roles: `report` (binary, or hex text as NVIDIA's tools write it) with `chain` (PEM), and, where they are there, `driver_rim`, `vbios_rim` and
`ocsp` or `ocsp_*` (DER or base64); or `rim`; or `eat` (with `jwks`, where the service's keys of that day are known). The caller's
collateral may hold manifests and OCSP responses too.

Few people keep OCSP responses beside old reports, so what is missing is *not done*, and the trace says so. `verify` would refuse it: a case
like this is looked at, not accepted, and its claims never say `confidential`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from types import MappingProxyType
from typing import Final

from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.files import Case, Observation, trace
from cloister.attestation.nvidia import device as nvidia_device
from cloister.attestation.nvidia import eat as nvidia_eat
from cloister.attestation.nvidia import format as nvidia_format
from cloister.attestation.nvidia import rim as nvidia_rim
from cloister.attestation.nvidia.examine import (
    CHAIN,
    OCSP_AGE,
    REVOCATION,
    RIM,
    SIGNERS,
    driver_rim,
    examine,
    missing,
    vbios_rim,
)
from cloister.attestation.nvidia.verify import KIND as EVIDENCE_KIND
from cloister.attestation.nvidia.verify import STEPS
from cloister.attestation.pki import ocsp
from cloister.attestation.pki.certificate import from_pem
from cloister.attestation.types import Evidence
from cloister.errors import EvidenceError, InputError, Reason

KIND: Final = "nvidia"

RIM_STEPS: Final = MappingProxyType(
    {RIM: "The manifest is signed by NVIDIA, and its certificates are valid now.", SIGNERS: STEPS[SIGNERS]}
)
NONCE: Final = "nvidia-gpu.6-nonce"
REPORT_STEPS: Final = MappingProxyType({**STEPS, NONCE: "The report answers the nonce that was asked for."})
_ASKED: Final = "nras.5-nonce"
FOUND: Final = "nras.7-result"
EAT_STEPS: Final = MappingProxyType({**nvidia_eat.STEPS, FOUND: "The service found the devices good."})
_MANIFESTS: Final = ("rim", "driver_rim", "vbios_rim")
_HEX: Final = re.compile(rb"\s*(?:[0-9A-Fa-f]{2}\s*)+")
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/=\s]+")


def observe(case: Case) -> Observation:
    """Return what the files in `case` prove at `case.now`."""
    if "eat" in case.files:
        beside = sorted(set(case.files) & {"report", *_MANIFESTS})
        if beside:  # a service's word about one device would stand for a report that nobody looked at
            raise InputError(
                "a token of NVIDIA's service is evidence of its own",
                reasons=[Reason("files", f"eat and {', '.join(beside)}", "one of them at a time")],
            )
        return _eat(case)
    if "report" in case.files:
        return _report(case)
    return _manifest(case)


def _report(case: Case) -> Observation:
    try:
        evidence = Evidence(EVIDENCE_KIND, unhex(case.files["report"]), parts=_parts(case))
        found = endorsements(case)
        fields = _fields(evidence)
        not_done = missing(evidence, found)
    except EvidenceError as error:
        return Observation({"authentic": False}, trace(REPORT_STEPS, error), error=error)
    try:
        complete = not not_done
        if not case.nonce:
            not_done |= {NONCE}
        outcome = examine(evidence, found, case.roots, now=case.now, complete=complete, nonce=case.nonce or None)
    except EvidenceError as error:
        return Observation(
            {"authentic": False}, trace(REPORT_STEPS, error, not_done=not_done), error=error, fields=fields
        )
    facts: dict[str, object] = {"authentic": True, "signature": True, "debug": outcome.claims.debug}
    if outcome.golden:
        facts["golden"] = outcome.golden
    return Observation(facts, trace(REPORT_STEPS, None, not_done=not_done), outcome.claims, fields=fields)


def _manifest(case: Case) -> Observation:
    data = case.files.get("rim", case.files.get("driver_rim", case.files.get("vbios_rim", b"")))
    reasons: list[Reason] = []
    kind = ""
    try:
        rim = nvidia_rim.read(data, where=RIM)
        responses = _responses(case)
        try:
            kind, _ = nvidia_rim.check(rim, case.roots, now=case.now, where=RIM)
        except EvidenceError as error:
            reasons += error.reasons
        if responses:
            try:
                ocsp.check(rim.chain, responses, now=case.now, where=SIGNERS, max_age=OCSP_AGE)
            except EvidenceError as error:
                reasons += error.reasons
        if reasons:
            raise EvidenceError(
                "the reference manifest is not authentic", code="evidence-not-authentic", reasons=reasons
            )
    except EvidenceError as error:
        return Observation({"authentic": False}, trace(RIM_STEPS, error), error=error)
    fields = {
        "product": rim.product,
        "version": rim.version,
        "measurements": str(len(rim.golden)),
        "signer": rim.chain[0].subject,
    }
    not_done = frozenset() if responses else frozenset({SIGNERS})
    return Observation(
        {"authentic": True},
        trace(RIM_STEPS, None, not_done=not_done),
        fields=MappingProxyType(fields),
        soft=kind.startswith("soft-"),
    )


def _eat(case: Case) -> Observation:
    signed = {"nras.3-signature", "nras.4-issuer"}
    try:
        bundle = nvidia_eat.read_bundle(case.files["eat"])
    except EvidenceError as error:
        facts = {"parse": error.code != "evidence-malformed", "authentic": False}
        return Observation(facts, trace(EAT_STEPS, error), error=error)
    fields = {
        f"{name}.{claim}": str(value)
        for name, token in bundle.devices.items()
        for claim, value in token.body.items()
        if isinstance(value, (str, int))
    }
    body = bundle.platform.body
    if "jwks" not in case.files:
        # without keys nobody said anything; only that the parts belong together is known
        not_done = frozenset(signed | {_ASKED, "nras.6-time", FOUND})
        fields |= {"kid": bundle.platform.key_id, "nonce": str(body.get("eat_nonce"))}
        return Observation({"parse": True}, trace(EAT_STEPS, None, not_done=not_done), fields=MappingProxyType(fields))
    text = body.get("eat_nonce")
    try:
        nonce = case.nonce if case.nonce else bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        nonce = b""
    # without a nonce the tokens are compared with each other only
    not_done = frozenset() if case.nonce else frozenset({_ASKED})
    try:
        result = nvidia_eat.verify_bundle(bundle, case.files["jwks"], now=case.now, nonce=nonce)
        if not result.overall:
            raise EvidenceError(
                "the service did not find the devices good",
                code="evidence-not-authentic",
                reasons=[Reason(FOUND, "x-nvidia-overall-att-result false", "true")],
            )
    except EvidenceError as error:
        return Observation({"parse": True, "authentic": False}, trace(EAT_STEPS, error, not_done=not_done), error=error)
    facts = {"parse": True, "authentic": True}
    return Observation(facts, trace(EAT_STEPS, None, not_done=not_done), fields=MappingProxyType(fields))


def unhex(data: bytes) -> bytes:
    """Return `data`, decoded where it is hex text: NVIDIA's tools write reports in both forms."""
    if len(data) <= 4 * nvidia_format.LIMIT and _HEX.fullmatch(data):
        return bytes.fromhex(data.decode("ascii"))
    return data


def endorsements(case: Case) -> Endorsements:
    """Return manifests and OCSP responses of `case` and of its caller, filed as `verify` looks for them.

    The roles say which manifest a file is meant to be; `verify` finds out whether it is.

    Raises:
        EvidenceError: `evidence-malformed`: a response or a manifest of the case does not parse.
    """
    report = nvidia_format.parse(unhex(case.files["report"]))
    device = nvidia_device.read(from_pem(case.files.get("chain", b""), where=CHAIN)[0], where=CHAIN)
    names = {"driver_rim": driver_rim(report, device), "vbios_rim": vbios_rim(report, device)}
    items = [Endorsement(EVIDENCE_KIND, name, case.files[role]) for role, name in names.items() if role in case.files]
    taken = {item.subject for item in items}
    versions = {report.text(nvidia_format.Field.DRIVER_VERSION).upper(): "driver_rim", report.vbios(): "vbios_rim"}
    for data in (*case.collateral.values(), *(case.files[role] for role in ("rim",) if role in case.files)):
        if b"SoftwareIdentity" not in data[:4096]:
            continue
        role = versions.get(nvidia_rim.read(data, where=RIM).version)
        if role is not None and names[role] not in taken:
            items.append(Endorsement(EVIDENCE_KIND, names[role], data))
            taken.add(names[role])
    items += [Endorsement(EVIDENCE_KIND, f"ocsp/{each.serial:x}", each.der) for each in _responses(case)]
    return Endorsements(tuple(items))


def _responses(case: Case) -> tuple[ocsp.Response, ...]:
    found: list[ocsp.Response] = []
    for name, data in case.files.items():
        if name == "ocsp" or name.startswith("ocsp_"):
            found += ocsp.from_concatenated(_unbase64(data), where=REVOCATION)
    for data in case.collateral.values():
        try:
            found += ocsp.from_concatenated(_unbase64(data), where=REVOCATION)
        except EvidenceError:
            continue  # collateral is offered for everything that is verified; what is no response is for something else
    return tuple(found)


def _unbase64(data: bytes) -> bytes:
    if len(data) <= 2 * ocsp.LIMIT and _BASE64.fullmatch(data):
        try:
            return base64.b64decode(b"".join(data.split()), validate=True)
        except ValueError:
            return data
    return data


def _parts(case: Case) -> MappingProxyType[str, bytes]:
    return MappingProxyType({"chain": case.files["chain"]} if "chain" in case.files else {})


def _fields(evidence: Evidence) -> MappingProxyType[str, str]:
    return MappingProxyType(dict(_lines(evidence)))


def _lines(evidence: Evidence) -> Iterator[tuple[str, str]]:
    report = nvidia_format.parse(evidence.quote)
    device = nvidia_device.read(from_pem(evidence.parts["chain"], where=CHAIN)[0], where=CHAIN)
    yield "device", f"{device.chip} ({device.arch}) {device.udid}"
    yield "driver", report.text(nvidia_format.Field.DRIVER_VERSION) or "none"
    yield "vbios", report.vbios()
    yield "nonce", report.nonce.hex()
    yield "fwid", report.fields.get(nvidia_format.Field.FWID, b"").hex() or "none"
    yield "measurements", str(len(report.measurements))
    for kind, value in sorted(report.fields.items()):
        known = kind in {int(each) for each in nvidia_format.Field}
        yield f"field.{nvidia_format.Field(kind).name.lower() if known else kind}", value.hex()
