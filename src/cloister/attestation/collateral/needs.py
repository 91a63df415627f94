"""What must be fetched so that a piece of evidence can be verified? Pure: evidence -> what to ask which vendor for.

| evidence | needs |
| --- | --- |
| `tdx`, `sgx`, `azure-tdx` | Intel: TCB info and QE identity for the FMSPC, lists of the PCK's authority and of the root |
| `sev-snp`, `azure-snp` | AMD: chain and list of the product line; the VCEK of chip and TCB, unless it came along |
| `nvidia-gpu` | NVIDIA: manifests of driver and VBIOS; OCSP responses for the device's chain and the manifests' signers |
| `tpm`, `nitro`, `cca` | nothing that a service publishes |

Nothing in the evidence is authentic yet: it decides only what is asked for. Everything that goes into an address is made of hex digits or
of the characters that the verifiers' parsers let through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

from cloister.attestation.azure import format as azure_format
from cloister.attestation.dcap import collateral as dcap
from cloister.attestation.dcap import pck
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.nvidia import examine as nvidia
from cloister.attestation.nvidia import rim as nvidia_rim
from cloister.attestation.pki import asn1
from cloister.attestation.pki import certificate as certificates
from cloister.attestation.pki.certificate import Certificate
from cloister.attestation.sgx import format as sgx_format
from cloister.attestation.snp import format as snp_format
from cloister.attestation.snp.format import Line, Signer, Tcb
from cloister.attestation.tdx import format as tdx_format
from cloister.attestation.types import Evidence
from cloister.errors import EvidenceError, InputError, Reason

WHERE: Final = "collateral.needs"

LINES: Final[dict[str, Line]] = {"Milan": "Milan", "Genoa": "Genoa", "Turin": "Turin"}
"""AMD's product lines by name."""

Authority = Literal["processor", "platform"]


@dataclass(frozen=True, slots=True)
class IntelTcb:
    """Quote collateral for machines of one FMSPC (12 upper-case hex digits)."""

    tee: Literal["sgx", "tdx"]
    fmspc: str
    authority: Authority = "platform"
    """Who issued the machine's PCK certificate: servers with several packages have the platform CA."""


@dataclass(frozen=True, slots=True)
class AmdLine:
    """ASK or ASVK and ARK of a product line, and the ARK's revocation list."""

    line: Line
    signer: Signer


@dataclass(frozen=True, slots=True)
class AmdLeaf:
    """The VCEK of one chip (hex, as AMD's server names it) at one firmware level."""

    line: Line
    chip: str
    tcb: Tcb

    @property
    def subject(self) -> str:
        return f"vcek/{self.chip}/{self.tcb.encode().hex()}"


@dataclass(frozen=True, slots=True)
class NvidiaManifest:
    """A manifest by its id, and OCSP responses for its signers."""

    id: str


@dataclass(frozen=True, slots=True)
class NvidiaAnswer:
    """An OCSP response about `certificate`, which `issuer` issued."""

    certificate: Certificate
    issuer: Certificate


Need = IntelTcb | AmdLine | AmdLeaf | NvidiaManifest | NvidiaAnswer


def needs(evidence: Evidence, *, line: Line | None = None) -> tuple[Need, ...]:
    """Return what to fetch for `evidence` and its devices, each once.

    `line` is AMD's product line, for reports that do not say it (version 2 without a certificate).

    Raises:
        EvidenceError: `evidence-malformed`.
        InputError: the report does not say its product line, and `line` is None.
    """
    found: list[Need] = []
    for each in (evidence, *evidence.devices):
        found += _needs(each, line)
    return tuple(dict.fromkeys(found))


def renewal(endorsements: Endorsements) -> tuple[Need, ...]:
    """Return what to fetch so that `endorsements` are current again, each once: what ends, and whose certificates are there.

    OCSP responses are asked for where the certificate itself is there, too: signers of manifests, and authorities.
    """
    found: list[Need] = []
    pool = _pool(endorsements)
    for item in endorsements.items:
        parts = item.subject.split("/")
        try:
            if item.kind in ("tdx", "sgx"):
                chain = certificates.from_pem(
                    dcap.parse(item.data, where=WHERE).raw.pck_crl_issuer_chain.encode(), where=WHERE
                )
                found.append(
                    IntelTcb("tdx" if item.kind == "tdx" else "sgx", item.subject, _authority(chain[0].subject))
                )
            elif item.kind == "sev-snp" and len(parts) == 2 and parts[0] in LINES and parts[1] in ("vcek", "vlek"):
                found.append(AmdLine(LINES[parts[0]], "vcek" if parts[1] == "vcek" else "vlek"))
            elif item.kind == "nvidia-gpu" and parts[0] == "ocsp":
                found += [each for each in _pairs(pool) if f"{each.certificate.serial:x}" == parts[1]]
        except EvidenceError:  # what does not parse is renewed by nothing
            continue
    return tuple(dict.fromkeys(found))


def _pool(endorsements: Endorsements) -> tuple[Certificate, ...]:
    found: list[Certificate] = []
    for item in endorsements.items:
        if item.kind != "nvidia-gpu":
            continue
        try:
            if item.subject.startswith("ca/"):
                found.append(certificates.from_der(item.data, where=WHERE))
            elif item.data.lstrip()[:1] == b"<":
                found += nvidia_rim.read(item.data, where=WHERE).chain
        except EvidenceError:
            continue
    return tuple(dict.fromkeys(found))


def _pairs(pool: tuple[Certificate, ...]) -> Iterator[NvidiaAnswer]:
    for certificate in pool:
        for issuer in pool:
            if (
                certificate != issuer
                and certificate.issuer_der == issuer.subject_der
                and certificate.verify_issued_by(issuer)
            ):
                yield NvidiaAnswer(certificate, issuer)


def _authority(name: str) -> Authority:
    return "processor" if "Processor" in name else "platform"


def _needs(evidence: Evidence, line: Line | None) -> Iterator[Need]:
    match evidence.kind:
        case "tdx" | "sgx":
            yield _intel(evidence.kind, evidence.quote)
        case "azure-tdx":
            yield _intel("tdx", evidence.parts.get("td-quote", b""))
        case "sev-snp":
            yield from _amd(evidence.quote, evidence, line)
        case "azure-snp":
            yield from _amd(azure_format.parse(evidence.quote, where=WHERE).report, evidence, line)
        case "nvidia-gpu":
            names, chain = nvidia.wanted(evidence)
            yield from (NvidiaManifest(name) for name in names)
            yield from answers(chain[1:])  # the first one is the device's own, which no authority knows
        case _:
            return


def answers(chain: tuple[Certificate, ...]) -> Iterator[NvidiaAnswer]:
    """Return what to ask about the certificates of `chain` below its root."""
    for certificate, issuer in pairwise(chain):
        yield NvidiaAnswer(certificate, issuer)


def _intel(tee: Literal["sgx", "tdx"], quote: bytes) -> IntelTcb:
    parsed = sgx_format.parse(quote) if tee == "sgx" else tdx_format.parse(quote)
    leaf = pck.load(parsed.certificates, where=WHERE)[0]
    issuer = dict(asn1.name(leaf.issuer_der)).get(asn1.COMMON_NAME, "")
    return IntelTcb(tee, pck.read(leaf, where=WHERE).fmspc.hex().upper(), _authority(issuer))


def _amd(data: bytes, evidence: Evidence, line: Line | None) -> Iterator[Need]:
    report = snp_format.parse(data)
    der = evidence.parts.get("leaf")
    if der is None and "table" in evidence.parts:
        der = snp_format.parse_table(evidence.parts["table"]).get(report.signer)
    if der is not None:
        line = snp_format.leaf(certificates.from_der(der, where=WHERE)).line
    line = line or line_of(report)
    if line is None:
        raise InputError(
            "the report does not say which processor it is of",
            reasons=[
                Reason(f"{WHERE}.product", f"a report of version {report.version} alone", "Milan, Genoa or Turin")
            ],
            hint="`--product` says it",
        )
    yield AmdLine(line, report.signer)
    if der is None and report.signer == "vcek":
        chip = report.chip_id if line != "Turin" else report.chip_id[:8]
        yield AmdLeaf(line, chip.hex(), report.tcb("reported", turin=line == "Turin"))


def line_of(report: snp_format.Report) -> Line | None:
    """Return the product line of the CPUID family and model in `report` (version 3 and later), or None.

    Source: AMD 57230, table of products; family 19h has Milan below model 10h and Genoa, Bergamo and Siena from there on.
    """
    if report.family is None or report.model is None:
        return None
    if report.family == snp_format.FAMILIES["Turin"]:
        return "Turin"
    if report.family != snp_format.FAMILIES["Milan"]:
        return None
    return "Milan" if report.model < 0x10 else "Genoa"
