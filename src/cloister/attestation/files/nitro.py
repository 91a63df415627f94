"""Nitro attestation documents in files (role `doc`), judged by the very verifier of `nitro`.

Facts: `authentic`, `debug`. A case that states its nonce is also fresh: the document has it as `nonce` or as `user_data`.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.files import Case, Observation, trace
from cloister.attestation.nitro import format as nitro_format
from cloister.attestation.nitro import verify as nitro
from cloister.attestation.types import Claims, Evidence
from cloister.errors import EvidenceError, Reason

KIND: Final = "nitro"

ROLE: Final = "doc"
CRL: Final = "crl"

_FRESH: Final = "nitro.7-nonce"
STEPS: Final[Mapping[str, str]] = {**nitro.STEPS, _FRESH: "the document has the nonce that was asked for"}


def observe(case: Case) -> Observation:
    """Return what came out of the document in `case`, at its time."""
    document: nitro_format.Document | None = None
    claims: Claims | None = None
    error: EvidenceError | None = None
    try:
        data = _document(case)
        document = nitro_format.parse(data)
        offered = Endorsements(
            tuple(
                Endorsement(KIND, f"crl/{name}", content)
                for name, content in (*case.collateral.items(), *case.files.items())
                if name.endswith(".crl") or name == CRL
            )
        )
        claims = nitro.verify(Evidence(KIND, data), offered, case.roots, now=case.now)
        _check_nonce(document, case.nonce)
    except EvidenceError as refusal:
        claims, error = None, refusal
    facts: dict[str, object] = {"authentic": claims is not None}
    if document is not None:
        facts["debug"] = document.debug
    return Observation(
        facts=facts,
        steps=trace(STEPS, error, not_done=frozenset() if case.nonce is not None else frozenset({_FRESH})),
        claims=claims,
        error=error,
        fields=_fields(document) if document is not None else {},
    )


def _document(case: Case) -> bytes:
    data = case.files.get(ROLE)
    if data is None:
        raise EvidenceError(
            "there is no attestation document",
            code="evidence-malformed",
            reasons=[Reason(nitro_format.WHERE, ", ".join(sorted(case.files)) or "no file", f"a file {ROLE!r}")],
        )
    return data


def _check_nonce(document: nitro_format.Document, nonce: bytes | None) -> None:
    if nonce is None or any(hmac.compare_digest(nonce, each or b"") for each in (document.nonce, document.user_data)):
        return
    raise EvidenceError(
        "the document was made for another nonce",
        code="evidence-not-authentic",
        reasons=[Reason(_FRESH, (document.nonce or b"").hex() or "no nonce", nonce.hex() or "no nonce")],
    )


def _fields(document: nitro_format.Document) -> dict[str, str]:
    fields = {
        "module_id": document.module_id,
        "timestamp": f"{datetime.fromtimestamp(document.timestamp / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC",
        "debug": "yes: PCR 0 is zero, the parent instance can read the enclave" if document.debug else "no",
    }
    fields |= {f"pcr{index}": value.hex() for index, value in document.pcrs.items() if any(value)}
    for name, value in (
        ("user_data", document.user_data),
        ("nonce", document.nonce),
        ("public_key", document.public_key),
    ):
        if value is not None:
            fields[name] = value.hex()
    return fields
