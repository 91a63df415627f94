"""SEV-SNP evidence in files: a report with its VCEK or VLEK, or vendor chains.

Roles: `report` (1184 bytes, or longer with zeros after it, as tools write it), `leaf` (DER or PEM), or `table` instead
(certificate table). Chains come from the case's vendor chains; a revocation list from the role `crl` or the caller's collateral. Nobody
keeps revocation lists beside old reports, so without one that step is *not done*, and the trace says so: what `verify` would
refuse is looked at here, not accepted.

A case of chains only (`milan`, `milan_vlek`, ...: PEM, ASK or ASVK and then ARK) gives `roots_sha256`: the roots that hold at the time, in
the order Milan, Genoa, Turin.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Final

from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.files import Case, Observation, Step, trace
from cloister.attestation.pki import certificate as pki
from cloister.attestation.pki import crl as pki_crl
from cloister.attestation.pki.path import check_path
from cloister.attestation.roots import choose
from cloister.attestation.snp import format as snp_format
from cloister.attestation.snp.roots import PINS
from cloister.attestation.snp.verify import KIND as EVIDENCE_KIND
from cloister.attestation.snp.verify import STEPS, examine
from cloister.attestation.types import Evidence
from cloister.errors import EvidenceError, Reason

KIND: Final = "snp"

CHAIN_STEPS: Final = MappingProxyType(
    {
        "sev-snp.2-root": STEPS["sev-snp.2-root"],
        "sev-snp.3-chain": "both certificates lead to that root and are valid now",
    }
)
_ORDER: Final = ("Milan", "Genoa", "Turin")
_PEM: Final = re.compile(rb"-----BEGIN CERTIFICATE-----")


def observe(case: Case) -> Observation:
    """Return what the report or the chains in `case` prove at `case.now`."""
    if "report" not in case.files:
        return _chains(case)
    try:
        evidence = Evidence(EVIDENCE_KIND, without_padding(case.files["report"]), (), MappingProxyType(_parts(case)))
    except EvidenceError as error:
        return Observation({"authentic": False}, trace(STEPS, error), error=error)
    return judge(case, evidence, endorsements(case))


def judge(case: Case, evidence: Evidence, found: Endorsements) -> Observation:
    """Return what `evidence` proves under `found`; the revocation list is judged where there is one."""
    listed = any(item.subject.partition("/")[2].startswith("crl") for item in found.items)
    not_done = frozenset() if listed else frozenset({"sev-snp.4-revocation"})
    fields = _fields(evidence.quote)
    try:
        claims = examine(evidence, found, case.roots, now=case.now, revocation=listed)
    except EvidenceError as error:
        return Observation({"authentic": False}, trace(STEPS, error, not_done=not_done), error=error, fields=fields)
    facts = {"authentic": True, "debug": claims.debug, "tcb": claims.tcb_status, "signature": True}
    steps = trace(STEPS, None, not_done=not_done)
    stale = freshness(case.nonce, claims.report_data)
    if stale is not None:
        steps += (Step("freshness", "failed", "; ".join(map(str, stale.reasons))),)
        return Observation(facts | {"authentic": False}, steps, error=stale, fields=fields)
    return Observation(facts, steps, claims, fields=fields)


def freshness(nonce: bytes | None, report_data: bytes) -> EvidenceError | None:
    """Return why `report_data` does not hold `nonce` (alone, or with zeros after it), or None; no nonce is not judged."""
    if not nonce or report_data == nonce.ljust(64, b"\x00"):
        return None
    return EvidenceError(
        "the report is not fresh",
        code="evidence-stale",
        reasons=[Reason("freshness", report_data.hex(), nonce.hex(), "the report was made for another nonce")],
    )


def without_padding(data: bytes) -> bytes:
    """Return `data` without zeros after the report: tools write the 4,000 bytes of the firmware's response.

    Raises:
        EvidenceError: `evidence-malformed`: something else follows.
    """
    rest = data[snp_format.REPORT_BYTES :]
    if rest.strip(b"\x00"):
        raise EvidenceError(
            "the SEV-SNP evidence does not parse",
            code="evidence-malformed",
            reasons=[Reason(snp_format.WHERE, f"{len(rest)} bytes after the report", "nothing, or zeros")],
        )
    return data[: snp_format.REPORT_BYTES]


def _parts(case: Case) -> dict[str, bytes]:
    for role in ("leaf", "vcek", "vlek"):
        if role in case.files:
            return {"leaf": der(case.files[role])}
    return {"table": case.files["table"]} if "table" in case.files else {}


def der(data: bytes) -> bytes:
    """Return the DER certificate in `data`, which may be PEM.

    Raises:
        EvidenceError: `evidence-malformed`: PEM with anything but one certificate.
    """
    if _PEM.search(data[:4096]):
        return pki.from_pem(data, where="sev-snp.3-chain", most=1)[0].der
    return data


def endorsements(case: Case) -> Endorsements:
    """Return the vendor chains and revocation lists that lie beside the evidence, under the subjects of `endorsements.py`.

    File names decide nothing: certificates are put together by the names in them, lists by their issuer's. The chain that
    the case names comes first, and the first certificate of a name counts.
    """
    chains = dict(case.chains)
    if case.chain in chains:
        chains = {case.chain: chains[case.chain], **chains}
    named: dict[str, bytes] = {}
    for pem in chains.values():
        try:
            found = pki.from_pem(pem, where="sev-snp.3-chain", most=32)
        except EvidenceError:  # somebody else's chain
            continue
        for certificate in found:
            named.setdefault(snp_format.common_name(certificate), certificate.der)
    items = [
        Endorsement(EVIDENCE_KIND, f"{line}/{signer}", _armour(named[middle], named[f"ARK-{line}"]))
        for line in _ORDER
        for signer, middle in (("vcek", f"SEV-{line}"), ("vlek", f"SEV-VLEK-{line}"))
        if middle in named and f"ARK-{line}" in named
    ]
    offered = {name: data for name, data in case.files.items() if name == "crl"} | dict(case.collateral)
    for name, data in offered.items():
        of = _line_of_list(data)
        if of is not None:
            items.append(Endorsement(EVIDENCE_KIND, f"{of}/crl/{name}", data))
    return Endorsements(tuple(items))


def _armour(*certificates: bytes) -> bytes:
    return b"".join(
        b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(each) + b"-----END CERTIFICATE-----\n"
        for each in certificates
    )


def _line_of_list(data: bytes) -> str | None:
    try:
        issuer = pki_crl.from_der(data, where="sev-snp.4-revocation").issuer_der
    except EvidenceError:
        return None
    return next((line for line in _ORDER if f"ARK-{line}".encode() in issuer), None)


def _chains(case: Case) -> Observation:
    found: dict[str, str] = {}
    for role, pem in case.files.items():
        try:
            line, digest = _chain(role, pem, case)
        except EvidenceError as error:
            return Observation({"authentic": False}, trace(CHAIN_STEPS, error), error=error)
        found[digest] = line
    roots = sorted(found, key=lambda digest: (_ORDER.index(found[digest]), digest))
    fields = {f"ARK-{found[digest]}": digest for digest in roots}
    facts = {"authentic": True, "roots_sha256": roots}
    return Observation(facts, trace(CHAIN_STEPS, None), fields=MappingProxyType(fields))


def _chain(role: str, pem: bytes, case: Case) -> tuple[str, str]:
    """Return the product line of a vendor chain and the SHA-256 of its root."""
    where = "sev-snp.3-chain"
    chain = pki.from_pem(pem, where=where)
    choose(EVIDENCE_KIND, chain[-1].der, PINS, case.roots, where="sev-snp.2-root")
    check_path(chain, now=_now(case.now), where=where)
    names = tuple(snp_format.common_name(each) for each in chain)
    for line in _ORDER:
        if names in ((f"SEV-{line}", f"ARK-{line}"), (f"SEV-VLEK-{line}", f"ARK-{line}")):
            return line, hashlib.sha256(chain[-1].der).hexdigest()
    raise EvidenceError(
        "this is no chain of AMD",
        code="evidence-not-authentic",
        reasons=[Reason(f"{where}.kind", f"{role}: {', '.join(names)[:200]}", "ASK or ASVK, then ARK, of one line")],
    )


def _now(now: datetime) -> datetime:
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    return now


def _fields(quote: bytes) -> Mapping[str, str]:
    try:
        report = snp_format.parse(quote)
    except EvidenceError:
        return MappingProxyType({})
    fields = {
        "version": str(report.version),
        "guest_svn": str(report.guest_svn),
        "policy": f"{report.policy:#x}",
        "debug": str(report.debug).lower(),
        "vmpl": str(report.vmpl),
        "signed by": report.signer.upper(),
        "firmware": str(report.current),
        "committed firmware": str(report.committed),
        "platform_info": f"{report.platform_info:#x}",
        "report_data": report.report_data.hex(),
    }
    fields |= {f"{name}_tcb": report.tcb_bytes(name).hex() for name in snp_format.TCBS}
    fields |= {name: value.hex() for name, value in report.measurements().items()}
    fields["chip_id"] = report.chip_id.hex()
    if report.family is not None:
        fields["cpuid"] = f"{report.family:02x}-{report.model:02x}-{report.stepping:02x}"
    return MappingProxyType(fields)
