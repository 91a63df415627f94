"""Arm CCA tokens in files (roles `token`, `cpak`), judged by the very verifier of `cca`. Experimental.

Facts: `authentic`, `debug`. The case itself names the platform's key: that key, and no other, is pinned for it. A key whose
private half is public (Arm's TEST key) makes the claims soft, and the fields say so. A case that states its nonce is also
fresh: the realm's challenge is the nonce, padded with zeros to 64 bytes.

A key that came with the token (`Case.vouched`) pins nothing, because everybody can make such a pair: that step is *not done*, and there
are no claims to appraise.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Final

from cloister.attestation.cca import format as cca_format
from cloister.attestation.cca import verify as cca
from cloister.attestation.cca.roots import PINS
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.files import Case, Observation, trace
from cloister.attestation.roots import Roots
from cloister.attestation.types import Claims, Evidence
from cloister.errors import EvidenceError, Reason

KIND: Final = "cca"

TOKEN, CPAK = "token", "cpak"

_CPAK: Final = "cca.2-cpak"
_FRESH: Final = "cca.8-nonce"
STEPS: Final[Mapping[str, str]] = {**cca.STEPS, _FRESH: "the realm's challenge is the nonce that was asked for"}


def observe(case: Case) -> Observation:
    """Return what came out of the token in `case`."""
    token: cca_format.Token | None = None
    claims: Claims | None = None
    error: EvidenceError | None = None
    try:
        data = case.files.get(TOKEN)
        if data is None:
            raise EvidenceError(
                "there is no CCA token",
                code="evidence-malformed",
                reasons=[Reason(cca_format.WHERE, ", ".join(sorted(case.files)) or "no file", f"a file {TOKEN!r}")],
            )
        token = cca_format.parse(data)
        offered, roots = _trusted(case, token)
        claims = cca.verify(Evidence(KIND, data), offered, roots, now=case.now)
        if case.nonce is not None and not hmac.compare_digest(case.nonce.ljust(64, b"\x00"), token.realm.challenge):
            raise EvidenceError(
                "the token was made for another nonce",
                code="evidence-not-authentic",
                reasons=[Reason(_FRESH, token.realm.challenge.hex(), case.nonce.hex())],
            )
    except EvidenceError as refusal:
        claims, error = None, refusal
    facts: dict[str, object] = {"authentic": claims is not None}
    if token is not None:
        facts["debug"] = token.platform.lifecycle >> 8 != cca.SECURED
    not_done = frozenset() if case.nonce is not None else frozenset({_FRESH})
    believed = case.vouched is None or CPAK in case.vouched
    if not believed:
        not_done |= {_CPAK}
    return Observation(
        facts=facts,
        steps=trace(STEPS, error, not_done=not_done),
        claims=claims if believed else None,
        error=error,
        fields=_fields(token, claims) if token is not None else {},
        soft=claims is not None and claims.soft,
    )


def _trusted(case: Case, token: cca_format.Token) -> tuple[Endorsements, Roots]:
    key = case.files.get(CPAK)
    if key is None:
        return Endorsements(), case.roots
    offered = Endorsements((Endorsement(KIND, f"cpak/{token.platform.instance_id.hex()}", key),))
    pin = cca.spki_sha256(key)
    if pin in PINS.soft:
        return offered, Roots(soft=True)
    return offered, Roots(also={KIND: frozenset({pin})})


def _fields(token: cca_format.Token, claims: Claims | None) -> dict[str, str]:
    platform, realm = token.platform, token.realm
    fields = {
        "support": "experimental",
        "profile": platform.profile,
        "life cycle": cca.lifecycle(platform.lifecycle),
        "implementation id": platform.implementation_id.hex(),
        "instance id": platform.instance_id.hex(),
        "challenge": realm.challenge.hex(),
        "personalization": realm.personalization.hex(),
        "rim": realm.initial.hex(),
    }
    fields |= {f"rem{index}": value.hex() for index, value in enumerate(realm.extensible)}
    for component in platform.components:
        fields[f"component {component.type or '(no type)'} {component.version}".strip()] = component.measurement.hex()
    if claims is not None and claims.soft:
        fields["platform key"] = "a public test key: everybody can make this token, it protects nothing"
    return fields
