"""Verify AWS Nitro Enclaves evidence: a pure function of (evidence, endorsements, roots, now).

Steps; an error names the step that refused:
  1 format     COSE_Sign1, ES384, with the document's fields and sizes; nothing follows it      nitro/format.py
  2 root       the first certificate of the bundle has a pinned SHA-256                         nitro/roots.py
  3 chain      leaf, then the bundle from its end: valid at `now` to the root; the leaf is no authority
  4 signature  the leaf's key signs the document
  5 time       the document was made within the leaf's validity, and not after `now` (30 s of skew)
  6 events     the runtime log replays to PCR 16 exactly, and its data hashes to its digests    events.py
Sources: AWS Nitro Enclaves NSM API, "Nitro Enclaves Attestation Process"; RFC 9052, RFC 5280.

The leaf lives about 3 hours, so evidence is verified when it arrives and the result is kept, not the evidence.

Report data: Cloister's attester puts the 64 bytes into `user_data` and leaves `nonce` empty. So `Claims.report_data` is
`user_data` when that has exactly 64 bytes, and empty otherwise, which no binding equals. `nonce` and `public_key` are other
protocols' fields: they are never report data.

Runtime events: PCR 16, extended with each event's SHA-384 digest (NSM ExtendPCR: value' = SHA-384(value || digest), from
zeros). A document holds *locked* registers only, so the attester locks PCR 16 first (LockPCR). Without PCR 16 in the
document, only an empty log is believed.

Debug: PCR 0 all zero. It is a claim (`appraise` refuses it), because the document itself is genuine.

Revocation: AWS says to leave CRLs out ("We do not use CRL"); its certificates live 3 hours to 20 days. Where the relying
party has lists all the same (`nitro`, `crl/...`), they count: a stale list of an issuer in the chain refuses, and so does
a certificate on one.

Parts of evidence: none. Not checked on purpose: the document's age within the leaf's life (the binding's nonce says that it
is fresh); PCR 3, 4 and 8 (role, instance, image signer), which are reference values for who wants them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from cloister.attestation import cose
from cloister.attestation import events as event_log
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.nitro import format as nitro_format
from cloister.attestation.nitro.roots import PINS
from cloister.attestation.pki import certificate, crl
from cloister.attestation.pki.path import check_path, describe
from cloister.attestation.roots import Roots, choose
from cloister.attestation.types import NOT_RATED, Claims, Evidence
from cloister.errors import EvidenceError, Reason

KIND: Final = "nitro"

STEPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "nitro.1-format": "the document is COSE_Sign1 with ES384 and has the fields and sizes that AWS states",
        "nitro.2-root": "its certificate bundle begins with a pinned root",
        "nitro.3-chain": "its certificates lead from the leaf to that root and are valid now",
        "nitro.4-signature": "the leaf's key signed the document",
        "nitro.5-time": "the document was made within the leaf's validity and not in the future",
        "nitro.6-events": "the runtime log explains PCR 16",
    }
)

RUNTIME_PCR: Final = 16
"""The first register that AWS leaves to the enclave's own program."""
REPORT_DATA_BYTES: Final = 64
SKEW: Final = timedelta(seconds=30)


def verify(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims:
    """Return what a genuine Nitro enclave states in `evidence`.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`; `reasons[0].where` begins with the step.
        ValueError: `now` has no time zone, or `evidence` is of another kind (a caller's mistake).
    """
    if evidence.kind != KIND:
        raise ValueError(f"evidence of kind {evidence.kind!r}, this verifier takes {KIND!r}")
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    # (1)
    if evidence.parts:
        raise _malformed(", ".join(sorted(evidence.parts))[:200], "no parts: a document carries its chain")
    document = nitro_format.parse(evidence.quote)
    leaf = _certificate(document.certificate)
    bundle = tuple(_certificate(each) for each in document.cabundle)
    lists = tuple(_list(each) for each in endorsements.all(KIND, "crl/"))
    # (2)
    tee = choose(KIND, bundle[0].der, PINS, roots, where="nitro.2-root")
    # (3) the bundle is root first, a path is leaf first
    chain = (leaf, *reversed(bundle))
    valid_until = check_path(chain, now=now, where="nitro.3-chain", crls=lists)
    _check_leaf(leaf)
    valid_until = min((valid_until, *_check_lists(chain, lists, now)))
    # (4)
    if not cose.verify(document.message, leaf.key):
        raise _refused("nitro.4-signature", "a signature of another key or over other bytes", "the leaf's signature")
    # (5)
    _check_time(document, leaf, now)
    # (6)
    if evidence.events or RUNTIME_PCR in document.pcrs:
        register = document.pcrs.get(RUNTIME_PCR)
        if register is None:
            raise _refused(
                "nitro.6-events.register",
                "a log, but no PCR 16",
                "PCR 16 in the document",
                "a document holds locked registers only: the attester locks PCR 16 before it asks for one",
            )
        event_log.check_log(evidence.events, register, where="nitro.6-events")
    return Claims(
        kind="tee",
        tee=tee,
        debug=document.debug,
        tcb_status=NOT_RATED,
        report_data=report_data(document),
        measurements=MappingProxyType({f"pcr{index}": value for index, value in document.pcrs.items()}),
        launch="pcr0",
        events=evidence.events,
        platform=MappingProxyType(_platform(document)),
        chain=describe(chain),
        valid_until=valid_until,
    )


def report_data(document: nitro_format.Document) -> bytes:
    """Return `user_data` when it has exactly 64 bytes; nothing else is report data."""
    data = document.user_data
    return data if data is not None and len(data) == REPORT_DATA_BYTES else b""


@lru_cache(maxsize=128)
def _certificate(der: bytes) -> certificate.Certificate:
    """Parsed once: the authorities of a region are the same all day, and a leaf serves for three hours."""
    return certificate.from_der(der, where="nitro.3-chain")


@lru_cache(maxsize=16)
def _list(der: bytes) -> crl.RevocationList:
    return crl.from_der(der, where="nitro.3-chain")


def _check_leaf(leaf: certificate.Certificate) -> None:
    # an authority that signed documents itself would escape the leaf's three hours
    if leaf.authority:
        raise _refused("nitro.3-chain.authority", f"{leaf.subject}: an authority", "a leaf certificate")


def _check_lists(
    chain: tuple[certificate.Certificate, ...], lists: tuple[crl.RevocationList, ...], now: datetime
) -> tuple[datetime, ...]:
    """Refuse a list of an issuer in the chain that is not current; return when they end."""
    # `check_path` demands lists of every issuer or of none; AWS has none, so only those that are here must be current
    mine = [(each, issuer) for each in lists for issuer in chain[1:] if each.issuer_der == issuer.subject_der]
    reasons = [
        Reason("nitro.3-chain.revocation", problem, "a current revocation list", "fetch fresh collateral")
        for each, issuer in mine
        if (problem := each.problem(issuer, now)) is not None
    ]
    if reasons:
        raise EvidenceError("the certificate chain does not hold", code="evidence-not-authentic", reasons=reasons)
    return tuple(each.next_update for each, _ in mine if each.next_update is not None)


def _check_time(document: nitro_format.Document, leaf: certificate.Certificate, now: datetime) -> None:
    made = datetime.fromtimestamp(document.timestamp // 1000, UTC) + timedelta(milliseconds=document.timestamp % 1000)
    text = f"made {made:%Y-%m-%d %H:%M:%S} UTC"
    if not leaf.not_before <= made <= leaf.not_after:
        raise _refused(
            "nitro.5-time.leaf",
            text,
            f"within {leaf.not_before:%Y-%m-%d %H:%M:%S} to {leaf.not_after:%Y-%m-%d %H:%M:%S}",
        )
    if made > now + SKEW:
        raise _refused("nitro.5-time.future", text, f"at most {SKEW.seconds} s after {now:%Y-%m-%d %H:%M:%S}")


def _platform(document: nitro_format.Document) -> dict[str, str]:
    """Return who the enclave is: `module_id`, and `instance_id`, the part of it that outlives the enclave."""
    platform = {"module_id": document.module_id}
    instance, separator, _ = document.module_id.partition("-enc")
    if separator and instance:
        platform["instance_id"] = instance
    return platform


def _malformed(found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "the Nitro evidence does not parse",
        code="evidence-malformed",
        reasons=[Reason(nitro_format.WHERE, found, wanted)],
    )


def _refused(where: str, found: str, wanted: str, hint: str = "") -> EvidenceError:
    return EvidenceError(
        "the Nitro document is not authentic",
        code="evidence-not-authentic",
        reasons=[Reason(where, found, wanted, hint)],
    )
