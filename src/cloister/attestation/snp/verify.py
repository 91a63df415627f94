"""Verify SEV-SNP evidence: a pure function of (evidence, endorsements, roots, now).

Parts: `leaf` (DER of the VCEK or VLEK), or `table` (the host's certificate table, configfs-tsm `auxblob`), or neither. The quote
is the attestation report.

Steps; an error names the step that refused:
  1 format      the report and the certificates parse, reserved bytes are zero                     snp/format.py
  2 root        the chain's last certificate has a pinned SHA-256                                  snp/roots.py
  3 chain       leaf, ASK (of a VCEK) or ASVK (of a VLEK), and ARK are of the kind that the report names and of one product
                line, valid at `now`, each signed by the next                     AMD 57230; RFC 5280, 6
  4 revocation  the ARK's current revocation list is there and does not name the ASK or ASVK       AMD 57230, CRL
  5 tcb         the TCB in the leaf is the reported TCB: the key exists at this firmware level only AMD 57230, extensions
  6 chip        VCEK: HWID is CHIP_ID, the chip's key is not masked. VLEK: there is a CSP_ID. The CPU's family is the line's
  7 signature   the leaf's key signs the report, ECDSA P-384 with SHA-384                          AMD 56860, ATTESTATION_REPORT
  8 events      each event's data hashes to its digest; the log is bound in the report data        events.py, `fold`

Where certificates come from: the ASK and ARK from an endorsement whose subject begins with `<line>/vcek` or `<line>/vlek` and that
names the leaf's issuer, else from the table. The leaf from the evidence, else from the endorsement
`vcek/<chip id>/<reported TCB>` (hex; 8 bytes of chip id on Turin), else the first `vlek/..` whose key signed the report. For belief it
does not matter: the chain ends at a pinned root. The revocation list does matter, so it comes from endorsements only (subjects that begin
with `<line>/crl`; every list of the root counts), and without one nothing is accepted.

A leaf cannot be revoked: all have serial number 0, and ASK and ASVK publish no list. Deny a chip by `chip_id`, a cloud by `csp_id`,
old firmware by its numbers.

Claims: `svns` are the *lesser* of the reported and the committed TCB, number by number: reported is what the key was derived from
and what the host chose to show, committed is what the host cannot go back below. `abi` is the firmware's version, the
lesser of current and committed, as major * 256 + minor. AMD publishes no TCB levels, so the status is `NotRated`.

Not checked on purpose: DEBUG, MIGRATE_MA, VMPL and the other bits are claims, which `appraise` judges. CURRENT and LAUNCH TCB
are not compared: the attribute `provisional` says that current and committed differ. CHIP_ID in a report signed by a VLEK is the
firmware's word, often masked to zero, and then absent from the claims.
"""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from cloister.attestation import events as event_log
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.pki import certificate as pki
from cloister.attestation.pki import crl as pki_crl
from cloister.attestation.pki.certificate import Certificate
from cloister.attestation.pki.path import check_path, describe
from cloister.attestation.roots import Roots, choose
from cloister.attestation.snp import format as snp_format
from cloister.attestation.snp.roots import PINS
from cloister.attestation.types import NOT_RATED, Claims, Evidence
from cloister.errors import EvidenceError, Reason

KIND: Final = "sev-snp"

STEPS: Final = MappingProxyType(
    {
        "sev-snp.1-format": "the report and its certificates parse, and reserved bytes are zero",
        "sev-snp.2-root": "the chain ends at a root of AMD that is pinned here",
        "sev-snp.3-chain": "the endorsement key's certificate leads to that root, and all are valid now",
        "sev-snp.4-revocation": "AMD's current revocation list does not name the chain",
        "sev-snp.5-tcb": "the endorsement key belongs to the firmware level that the report states",
        "sev-snp.6-chip": "the endorsement key belongs to the chip or the cloud that the report states",
        "sev-snp.7-signature": "the endorsement key signed the report",
        "sev-snp.8-events": "the log of runtime events is whole",
    }
)
PARTS: Final = frozenset({"leaf", "table"})

_ROOT, _CHAIN, _REVOCATION, _TCB, _CHIP, _SIGNATURE, _EVENTS = tuple(STEPS)[1:]


def verify(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims:
    """Return what a genuine SEV-SNP platform states in `evidence`.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`; `reasons[0].where` is the step.
        ValueError: `now` has no time zone, or `evidence` is of another kind (a caller's mistake).
    """
    return examine(evidence, endorsements, roots, now=now, revocation=True)


def examine(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime, revocation: bool) -> Claims:
    """The same; without `revocation`, step 4 is left out: for looking at files, whose list nobody kept. Never for a decision.

    Raises:
        EvidenceError, ValueError: as `verify`.
    """
    if evidence.kind != KIND:
        raise ValueError(f"evidence of kind {evidence.kind!r}, this verifier takes {KIND!r}")
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    # (1)
    report = snp_format.parse(evidence.quote)
    leaf, table = _leaf(evidence, report, endorsements)
    about = snp_format.leaf(leaf)
    turin = about.line == "Turin"
    tcbs = {name: report.tcb(name, turin=turin) for name in snp_format.TCBS}
    # (2)
    intermediate, root = _authorities(leaf, about, table, endorsements)
    tee = choose(KIND, root.der, PINS, roots, where=_ROOT)
    # (3)
    chain = (leaf, intermediate, root)
    _check_kinds(report, about, chain)
    valid_until = check_path(chain, now=now, where=_CHAIN)
    # (4)
    if revocation:
        valid_until = min(valid_until, _check_revocation(about.line, chain, endorsements, now))
    # (5)
    if about.tcb != tcbs["reported"]:
        raise _refused(
            "the endorsement key is of another firmware level",
            Reason(_TCB, f"a certificate for {_numbers(about.tcb)}", _numbers(tcbs["reported"])),
        )
    # (6)
    _check_chip(report, about)
    # (7)
    if not _signed_by(report, leaf):
        raise _refused(
            "the SEV-SNP report is not authentic",
            Reason(_SIGNATURE, "another signature", "a signature of the endorsement key", "the report was changed"),
        )
    # (8)
    event_log.check_log(evidence.events, None, where=_EVENTS)
    return Claims(
        kind="tee",
        tee=tee,
        debug=report.debug,
        tcb_status=NOT_RATED,
        report_data=report.report_data,
        measurements=MappingProxyType(report.measurements()),
        launch="measurement",
        svns=MappingProxyType(_svns(report, tcbs["reported"], tcbs["committed"])),
        attributes=MappingProxyType(_attributes(report)),
        events=evidence.events,
        log_in="report-data",
        platform=MappingProxyType(_platform(report, about)),
        chain=describe(chain),
        valid_until=valid_until,
    )


def _leaf(
    evidence: Evidence, report: snp_format.Report, endorsements: Endorsements
) -> tuple[Certificate, MappingProxyType[str, bytes]]:
    """Return the leaf certificate, and the host's certificate table (empty without one)."""
    if not PARTS.issuperset(evidence.parts) or len(evidence.parts) > 1:
        raise EvidenceError(
            "the SEV-SNP evidence does not parse",
            code="evidence-malformed",
            reasons=[Reason("sev-snp.1-format", ", ".join(sorted(evidence.parts)), "leaf, or table, or neither")],
        )
    table: MappingProxyType[str, bytes] = MappingProxyType({})
    der = evidence.parts.get("leaf")
    if "table" in evidence.parts:
        table = snp_format.parse_table(evidence.parts["table"])
        der = table.get(report.signer)
    if der is not None:
        return _certificate(der), table
    if report.signer == "vlek":
        # the report does not say which cloud's key signed it, so look; whether to believe that key is decided later
        for each in endorsements.all(KIND, "vlek/"):
            found = _certificate(each)
            if _signed_by(report, found):
                return found, table
    wanted = snp_format.wanted_subject(report) if report.signer == "vcek" else "vlek/<csp id>"
    return _certificate(endorsements.find(KIND, wanted, where=_CHAIN)), table


@lru_cache(maxsize=256)
def _certificate(der: bytes) -> Certificate:
    return pki.from_der(der, where=_CHAIN)


@lru_cache(maxsize=16)
def _pair(pem: bytes) -> tuple[Certificate, ...]:
    return pki.from_pem(pem, where=_CHAIN)


@lru_cache(maxsize=16)
def _list(der: bytes) -> pki_crl.RevocationList:
    return pki_crl.from_der(der, where=_REVOCATION)


def _authorities(
    leaf: Certificate, about: snp_format.Leaf, table: MappingProxyType[str, bytes], endorsements: Endorsements
) -> tuple[Certificate, Certificate]:
    """Return ASK or ASVK, and ARK: the endorsed pair that issues such leaves by name, or the table's."""
    subject = f"{about.line}/{about.signer}"
    pairs = [_pair(each) for each in endorsements.all(KIND, subject)]
    pairs.sort(key=lambda pair: pair[0].subject_der != leaf.issuer_der)
    named = bool(pairs) and pairs[0][0].subject_der == leaf.issuer_der
    if not named and {"ask", "ark"} <= set(table):
        return _certificate(table["ask"]), _certificate(table["ark"])
    pair = pairs[0] if pairs else _pair(endorsements.find(KIND, subject, where=_CHAIN))
    if len(pair) != 2:
        raise EvidenceError(
            "the vendor's chain does not parse",
            code="evidence-malformed",
            reasons=[Reason(f"{_CHAIN}.format", f"{len(pair)} certificates in {subject}", "ASK or ASVK, then ARK")],
        )
    return pair[0], pair[1]


def _check_kinds(report: snp_format.Report, about: snp_format.Leaf, chain: tuple[Certificate, ...]) -> None:
    reasons = []
    if about.signer != report.signer:
        reasons.append(Reason(f"{_CHAIN}.kind", f"a {about.signer.upper()} certificate", report.signer.upper()))
    middle = f"SEV-{about.line}" if about.signer == "vcek" else f"SEV-VLEK-{about.line}"
    for certificate, wanted in zip(chain[1:], (middle, f"ARK-{about.line}"), strict=True):
        found = snp_format.common_name(certificate)
        if found != wanted:
            reasons.append(Reason(f"{_CHAIN}.kind", f"an issuer named {found[:80]!r}", wanted))
    if reasons:
        raise _refused("the certificate chain is of another kind", *reasons)


def _check_revocation(line: str, chain: tuple[Certificate, ...], endorsements: Endorsements, now: datetime) -> datetime:
    lists = (_list(each) for each in endorsements.all(KIND, f"{line}/crl"))
    crls = tuple(each for each in lists if each.issuer_der == chain[-1].subject_der)
    check_path(chain[1:], now=now, where=_REVOCATION, crls=crls, revocation=True)
    return min(each.next_update for each in crls if each.next_update is not None)


def _check_chip(report: snp_format.Report, about: snp_format.Leaf) -> None:
    reasons = []
    if report.family is not None and report.family != snp_format.FAMILIES[about.line]:
        wanted = f"{snp_format.FAMILIES[about.line]:#x}, as {about.line} has"
        reasons.append(Reason(_CHIP, f"CPU family {report.family:#x}", wanted))
    if about.signer == "vcek":
        if report.mask_chip_key:
            reasons.append(Reason(_CHIP, "MASK_CHIP_KEY set", "not with a VCEK, which is the chip's key"))
        if about.hwid.ljust(64, b"\x00") != report.chip_id:
            found = report.chip_id.hex() if any(report.chip_id) else "a masked CHIP_ID"
            hint = "the certificate is another chip's, or the host masks the chip"
            reasons.append(Reason(_CHIP, found, about.hwid.hex(), hint))
    if reasons:
        raise _refused("the endorsement key is another platform's", *reasons)


def _signed_by(report: snp_format.Report, leaf: Certificate) -> bool:
    if not isinstance(leaf.key, ec.EllipticCurvePublicKey):
        return False
    try:
        leaf.key.verify(encode_dss_signature(report.r, report.s), report.signed, ec.ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True


def _svns(report: snp_format.Report, reported: snp_format.Tcb, committed: snp_format.Tcb) -> dict[str, int]:
    floor = committed.components()
    svns = {name: min(value, floor[name]) for name, value in reported.components().items()}
    versions = (report.current, report.committed)
    return svns | {
        "guest_svn": report.guest_svn,
        "abi": min(each.major * 256 + each.minor for each in versions),
    }


def _attributes(report: snp_format.Report) -> dict[str, bool]:
    provisional = report.current != report.committed or report.tcb_bytes("current") != report.tcb_bytes("committed")
    return report.attributes() | {
        "author_key": report.author_key,
        "vmpl0": report.vmpl == 0,
        "provisional": provisional,
    }


def _platform(report: snp_format.Report, about: snp_format.Leaf) -> dict[str, str]:
    platform = {
        "product": about.product,
        "vmpl": str(report.vmpl),
        "endorsed_by": about.signer,
        "firmware": str(report.current),
        "committed_firmware": str(report.committed),
    }
    platform |= {f"{name}_tcb": report.tcb_bytes(name).hex() for name in snp_format.TCBS}
    platform["guest_policy"] = f"{report.policy:016x}"
    platform["platform_info"] = f"{report.platform_info:016x}"
    if any(report.chip_id):
        platform["chip_id"] = report.chip_id.hex()
    if about.csp_id:
        platform["csp_id"] = about.csp_id
    if report.family is not None:
        platform["cpuid"] = f"{report.family:02x}-{report.model:02x}-{report.stepping:02x}"
    if report.current_mit_vector is not None:
        platform["current_mit_vector"] = f"{report.current_mit_vector:016x}"
        platform["launch_mit_vector"] = f"{report.launch_mit_vector:016x}"
    return platform


def _numbers(tcb: snp_format.Tcb) -> str:
    return ", ".join(f"{name} {value}" for name, value in tcb.components().items())


def _refused(message: str, *reasons: Reason) -> EvidenceError:
    return EvidenceError(message, code="evidence-not-authentic", reasons=reasons)
