"""Evidence of Azure's confidential VMs in files: the JSON of Trustee's attesters `az-snp-vtpm` and `az-tdx-vtpm`.

Role: `evidence`. Two generations exist, and each member is read in any of their forms:

| member | also called | bytes as |
| --- | --- | --- |
| `hcl_report` | `report` | base64url, or a list of numbers |
| `tpm_quote` | `quote` | object of `message`, `signature`, `pcrs`: hex, or lists of numbers |
| `vcek` | | base64url DER, or PEM; absent on TDX |
| `td_quote` | | base64url, or a list of numbers; firmware's padding is cut off |

The signature is a bare RSASSA value or a TPMT_SIGNATURE. Chains, collateral and revocation lists come from the case, as in files/snp.py and
files/dcap.py. *Not done*, and said so: revocation without a list; the runtime log where PCR 15 was extended and nobody kept the log; on TDX
without collateral, the quote beyond its signatures (`signature`), and then nothing is authentic.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from cloister.attestation.azure import vtpm
from cloister.attestation.azure.format import SNP as HCL_SNP
from cloister.attestation.azure.format import TDX as HCL_TDX
from cloister.attestation.azure_snp import verify as azure_snp
from cloister.attestation.azure_tdx import verify as azure_tdx
from cloister.attestation.dcap import collateral as dcap_collateral
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.files import Case, Observation, Step, dcap, need, snp, trace
from cloister.attestation.snp import verify as snp_verify
from cloister.attestation.tdx import format as tdx_format
from cloister.attestation.tpm import format as tpm_format
from cloister.attestation.tpm import verify as tpm_verify
from cloister.attestation.types import Claims, Evidence
from cloister.crypto.canonical import json_decode
from cloister.errors import EvidenceError, Reason

KIND: Final = "azure"

LIMIT: Final = 1 << 20
_WHERE: Final = "1-format"
_REVOCATION: Final = "sev-snp.4-revocation"
_PEM: Final = "-----BEGIN"
_HEX: Final = re.compile(r"(?:[0-9A-Fa-f]{2})+")


def observe(case: Case) -> Observation:
    """Return what the evidence in `case` proves at `case.now`."""
    (data,) = need(case, "evidence")
    kind = azure_snp.KIND
    try:
        value = _object(data)
        kind = azure_tdx.KIND if "td_quote" in value else azure_snp.KIND
        evidence = assemble(value, kind)
        taken = _take(evidence)
    except EvidenceError as error:
        steps = azure_tdx.STEPS if kind == azure_tdx.KIND else azure_snp.STEPS
        return Observation({"authentic": False, "signature": False}, trace(steps, error), error=error)
    fields = _fields(taken)
    logged = taken.pcrs[vtpm.RUNTIME] == bytes(32)
    not_done = frozenset() if logged else frozenset({f"{kind}.6-events"})
    if kind == azure_snp.KIND:
        observed = _snp(case, evidence, not_done, logged=logged)
    else:
        observed = _tdx(case, evidence, taken, not_done, logged=logged)
    observed = replace(observed, fields=fields)
    stale = _stale(case.nonce, taken.attest, kind) if observed.error is None else None
    if stale is not None:
        facts = MappingProxyType({**observed.facts, "authentic": False})
        told = (*observed.steps, Step("freshness", "failed", str(stale.reasons[0])))
        observed = replace(observed, facts=facts, steps=told, claims=None, error=stale)
    return observed


def _stale(nonce: bytes | None, attest: bytes, kind: str) -> EvidenceError | None:
    found = tpm_format.parse_attest(attest, where=f"{kind}.{_WHERE}").extra_data
    if not nonce or found == nonce:
        return None
    return EvidenceError(
        "the quote is not fresh",
        code="evidence-stale",
        reasons=[Reason("freshness", found.hex(), nonce.hex(), "it was made for another nonce")],
    )


def _take(evidence: Evidence) -> vtpm.Taken:
    if evidence.kind == azure_snp.KIND:
        return vtpm.take(evidence, evidence.kind, HCL_SNP, snp_verify.PARTS)
    return vtpm.take(evidence, evidence.kind, HCL_TDX, azure_tdx.OWN)


def _snp(case: Case, evidence: Evidence, not_done: frozenset[str], *, logged: bool) -> Observation:
    found = snp.endorsements(case)
    listed = any(item.subject.partition("/")[2].startswith("crl") for item in found.items)
    claims, refused = None, None
    try:
        claims = azure_snp.examine(evidence, found, case.roots, now=case.now, revocation=listed, runtime_log=logged)
    except EvidenceError as error:
        refused = error
    steps = trace(azure_snp.STEPS, refused, not_done=not_done)
    if not listed:
        at = 1 + [step.name for step in steps].index("azure-snp.2-report")
        steps = (*steps[:at], Step(_REVOCATION, "not done", snp_verify.STEPS[_REVOCATION]), *steps[at:])
    return Observation(_facts(claims), steps, claims, refused)


def _tdx(case: Case, evidence: Evidence, taken: vtpm.Taken, not_done: frozenset[str], *, logged: bool) -> Observation:
    found = _collateral(case)
    claims, refused = None, None
    if found.items:
        try:
            claims = azure_tdx.examine(evidence, found, case.roots, now=case.now, runtime_log=logged)
        except EvidenceError as error:
            refused = error
        return Observation(_facts(claims), trace(azure_tdx.STEPS, refused, not_done=not_done), claims, refused)
    inner = dcap.observe(Case("dcap", {"quote": evidence.parts["td-quote"]}, case.now, roots=case.roots))
    refused = vtpm.inside(inner.error, "azure-tdx.2-report") if inner.error is not None else None
    if refused is None:
        try:
            report_data = tdx_format.parse(evidence.parts["td-quote"]).report_data
            vtpm.check(evidence, taken, report_data, azure_tdx.KIND, runtime_log=logged)
        except EvidenceError as error:
            refused = error
    facts = {"authentic": False, "signature": refused is None}
    if "debug" in inner.facts:
        facts["debug"] = bool(inner.facts["debug"])
    if refused is None:
        not_done |= {"azure-tdx.2-report"}
    return Observation(facts, trace(azure_tdx.STEPS, refused, not_done=not_done), None, refused)


def _collateral(case: Case) -> Endorsements:
    found = Endorsements()
    for data in case.collateral.values():
        try:
            read = dcap_collateral.parse(data)
        except EvidenceError:  # somebody else's
            continue
        found |= Endorsements((Endorsement(read.kind, read.fmspc, data),))
    return found


def _facts(claims: Claims | None) -> Mapping[str, object]:
    if claims is None:
        return MappingProxyType({"authentic": False, "signature": False})
    return MappingProxyType(
        {
            "authentic": True,
            "signature": True,
            "debug": claims.debug,
            "tcb": claims.tcb_status,
            "advisories": list(claims.advisories),
        }
    )


def assemble(value: Mapping[str, Any], kind: str) -> Evidence:
    """Return the evidence of `kind` in the JSON object `value`.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    where = f"{kind}.{_WHERE}"

    def member(of: Mapping[str, Any], *names: str) -> Any:
        for name in names:
            if name in of:
                return of[name]
        raise vtpm.malformed(where, f"no member {names[0]!r}", " or ".join(names))

    quote = member(value, "tpm_quote", "quote")
    if not isinstance(quote, dict):
        raise vtpm.malformed(where, "a quote of another shape", "an object of message, signature and pcrs")
    message, signature = (_bytes(member(quote, name), where, hexadecimal=True) for name in ("message", "signature"))
    pcrs = member(quote, "pcrs")
    if not isinstance(pcrs, list) or len(pcrs) != len(vtpm.PCRS):
        raise vtpm.malformed(where, "PCRs of another shape", f"a list of {len(vtpm.PCRS)}")
    try:
        values = {index: _bytes(each, where, hexadecimal=True) for index, each in enumerate(pcrs)}
        parts = {
            "tpm-quote": tpm_verify.join(message, signature),
            "pcrs": tpm_verify.encode_pcrs({vtpm.BANK: values}),
        }
    except ValueError as error:
        raise vtpm.malformed(where, str(error), "24 SHA-256 values and a quote") from error
    if kind == azure_tdx.KIND:
        parts["td-quote"] = tdx_format.without_padding(_bytes(value["td_quote"], where))
    elif "vcek" in value:
        vcek = value["vcek"]
        if isinstance(vcek, str) and vcek.lstrip().startswith(_PEM):
            parts["leaf"] = snp.der(vcek.encode("utf-8", "replace"))
        else:
            parts["leaf"] = _bytes(vcek, where)
    hcl = _bytes(member(value, "hcl_report", "report"), where)
    return Evidence(kind, hcl, (), MappingProxyType(parts))


def _object(data: bytes) -> dict[str, Any]:
    try:
        value: Any = json_decode(data, limit=LIMIT, canonical=False)
    except ValueError as error:
        raise vtpm.malformed("azure-snp.1-format", str(error)[:120], "a JSON object") from error
    if not isinstance(value, dict):
        raise vtpm.malformed("azure-snp.1-format", type(value).__name__, "a JSON object")
    return value


def _bytes(value: Any, where: str, *, hexadecimal: bool = False) -> bytes:
    """Return the bytes of a list of numbers, of hex, or of base64 in either alphabet, padded or not."""
    try:
        if isinstance(value, list):
            return bytes(value)
        if isinstance(value, str) and hexadecimal and _HEX.fullmatch(value):
            return bytes.fromhex(value)
        if isinstance(value, str) and not hexadecimal:
            text = value.rstrip("=").replace("+", "-").replace("/", "_")
            return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    except (ValueError, TypeError) as error:
        raise vtpm.malformed(where, str(error)[:120], "bytes") from error
    raise vtpm.malformed(
        where, f"a {type(value).__name__}", "hex, or numbers" if hexadecimal else "base64url, or numbers"
    )


def _fields(taken: vtpm.Taken) -> Mapping[str, str]:
    runtime = taken.hcl.runtime
    fields = {"vTPM key": runtime.ak_digest, "VM": runtime.vm_id, "user data": runtime.user_data.hex()}
    fields |= {name: str(value).lower() for name, value in runtime.switches.items()}
    fields |= {f"pcr{index}": value.hex() for index, value in sorted(taken.pcrs.items())}
    return MappingProxyType(fields)
