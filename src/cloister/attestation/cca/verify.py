"""Verify Arm CCA evidence: a pure function of (evidence, endorsements, roots, now). Experimental.

Experimental means: no hardware with a vendor's root is public, so this was run on tokens under Arm's public TEST key and on
soft tokens only, and the profile of 2024 on soft tokens only.

Steps; an error names the step that refused:
  1 format     a collection of a platform token and a realm token of one profile; nothing follows it     cca/format.py
  2 cpak       the relying party knows the platform's key, and pins it                                   cca/roots.py
  3 platform   that key signs the platform token
  4 binding    the platform token's challenge is the hash of the realm's key (RAK)
  5 realm      the realm's key signs the realm token
  6 lifecycle  the platform is secured, or says that it is being debugged
  7 events     the runtime log is well formed; no register holds it, so report data binds it             events.py
Sources: Arm RMM specification (DEN0137), A7; draft-ffm-rats-cca-token; RFC 9052.

Endorsements: (`cca`, `cpak/<instance id, hex>`), or else (`cca`, `cpak/<implementation id, hex>`): the platform's public key
as a JWK or as DER SubjectPublicKeyInfo. It is believed only if its SHA-256 (of the DER form) is in `Roots.also["cca"]`, or,
with `Roots.soft`, is a public test key: then the TEE type is `soft-cca`.

Report data: the realm's challenge, 64 bytes. CCA has extensible measurements (REM 0 to 3), but they belong to the realm's
boot chain, so `Claims.log_in` is `report-data` and the attester signs `events.fold`.

Life cycle (RMM specification, A7.2.3): 0x30xx secured; 0x40xx and 0x50xx debugging of the platform's other parts or of its
root of trust, which is `Claims.debug`; in every other state the platform's keys say nothing, and the evidence is refused.

Parts of evidence: none. `now` is not used beyond its form: nothing in a token has a validity. Not checked on purpose: the
firmware components, which are measurements (`component.<type>`, `signer.<type>`) for reference values; claims that the
profile does not have.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from cloister.attestation import cose
from cloister.attestation import events as event_log
from cloister.attestation.cca import format as cca_format
from cloister.attestation.cca.roots import PINS
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.roots import Roots, choose
from cloister.attestation.types import NOT_RATED, Claims, Evidence
from cloister.crypto.canonical import json_decode
from cloister.errors import EvidenceError, Reason

KIND: Final = "cca"

STEPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "cca.1-format": "the token is a collection of a platform and a realm token of one profile (experimental)",
        "cca.2-cpak": "the relying party knows and pins the platform's key",
        "cca.3-platform": "the platform's key signed the platform token",
        "cca.4-binding": "the platform token names the realm's key",
        "cca.5-realm": "the realm's key signed the realm token",
        "cca.6-lifecycle": "the platform is secured, or says that it is being debugged",
        "cca.7-events": "the runtime log is well formed; report data binds it",
    }
)

CPAK_LIMIT: Final = 4096

SECURED: Final = 0x30
DEBUGGED: Final = frozenset({0x40, 0x50})
"""First byte of the life cycle: non-CCA-platform debug, recoverable CCA platform debug."""
_STATES: Final = {
    0x00: "unknown",
    0x10: "assembly and test",
    0x20: "provisioning of the root of trust",
    SECURED: "secured",
    0x40: "debugging outside of the root of trust",
    0x50: "recoverable debugging of the root of trust",
    0x60: "decommissioned",
}


def verify(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims:
    """Return what a CCA realm states in `evidence`. Experimental.

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
        raise EvidenceError(
            "the CCA evidence does not parse",
            code="evidence-malformed",
            reasons=[Reason(cca_format.WHERE, ", ".join(sorted(evidence.parts))[:200], "no parts")],
        )
    token = cca_format.parse(evidence.quote)
    platform, realm = token.platform, token.realm
    # (2)
    cpak, spki = _cpak(_endorsed(endorsements, platform))
    tee = choose(KIND, spki, PINS, roots, where="cca.2-cpak")
    # (3)
    if not cose.verify(platform.message, cpak):
        raise _refused("cca.3-platform", "a signature of another key or over other bytes", "the CPAK's signature")
    # (4) before the realm's key is used: only the platform says that it is a realm's
    named = hashlib.new(realm.public_key_hash, realm.public_key).digest()
    if not hmac.compare_digest(named, platform.challenge):
        raise _refused(
            "cca.4-binding",
            f"a realm key with hash {named.hex()}",
            platform.challenge.hex(),
            "the realm token belongs to another platform token",
        )
    # (5)
    if not cose.verify(realm.message, realm.key):
        raise _refused("cca.5-realm", "a signature of another key or over other bytes", "the realm key's signature")
    # (6)
    if platform.lifecycle >> 8 != SECURED and platform.lifecycle >> 8 not in DEBUGGED:
        raise _refused("cca.6-lifecycle", lifecycle(platform.lifecycle), "secured (0x3000 to 0x30ff)")
    # (7)
    event_log.check_log(evidence.events, None, where="cca.7-events")
    return Claims(
        kind="tee",
        tee=tee,
        debug=platform.lifecycle >> 8 != SECURED,
        tcb_status=NOT_RATED,
        report_data=realm.challenge,
        measurements=MappingProxyType(_measurements(token)),
        launch="rim",
        attributes=MappingProxyType(_attributes(token)),
        events=evidence.events,
        log_in="report-data",
        platform=MappingProxyType(_identity(token)),
        chain=(f"CPAK with SHA-256 {hashlib.sha256(spki).hexdigest()}, RAK with hash {named.hex()}",),
    )


def lifecycle(value: int) -> str:
    """Return the platform's life cycle for people."""
    return f"{value:#06x}, {_STATES.get(value >> 8, 'no state that Arm defines')}"


def spki_sha256(data: bytes) -> str:
    """Return the pin of a platform key (JWK or DER SubjectPublicKeyInfo): what belongs into `Roots.also["cca"]`.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    return hashlib.sha256(_cpak(data)[1]).hexdigest()


def _endorsed(endorsements: Endorsements, platform: cca_format.Platform) -> bytes:
    instance = f"cpak/{platform.instance_id.hex()}"
    found = endorsements.get(KIND, instance) or endorsements.get(KIND, f"cpak/{platform.implementation_id.hex()}")
    return found if found is not None else endorsements.find(KIND, instance, where="cca.2-cpak")


@lru_cache(maxsize=64)
def _cpak(data: bytes) -> tuple[ec.EllipticCurvePublicKey, bytes]:
    """Return the platform's key and its DER SubjectPublicKeyInfo."""
    try:
        if len(data) > CPAK_LIMIT:
            raise ValueError(f"{len(data)} bytes")
        key = load_der_public_key(data) if data[:1] == b"\x30" else _jwk(json_decode(data, canonical=False))
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise TypeError(f"a key of type {type(key).__name__}")
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise EvidenceError(
            "the platform's key does not parse",
            code="evidence-malformed",
            reasons=[Reason("cca.2-cpak.format", str(error)[:200], "an EC key as JWK or DER SubjectPublicKeyInfo")],
        ) from error
    return key, key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


_JWK_CURVES: Final[Mapping[str, int]] = MappingProxyType({"P-256": 1, "P-384": 2, "P-521": 3})


def _jwk(value: Any) -> ec.EllipticCurvePublicKey:
    match value:
        case {"kty": "EC", "crv": str(curve), "x": str(x), "y": str(y)} if curve in _JWK_CURVES:
            kind, _ = cca_format.CURVES[_JWK_CURVES[curve]]
            return ec.EllipticCurvePublicNumbers(_number(x), _number(y), kind()).public_key()
        case _:
            raise ValueError("another shape")


def _number(text: str) -> int:
    return int.from_bytes(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), "big")


def _measurements(token: cca_format.Token) -> dict[str, bytes]:
    found = {"rim": token.realm.initial, "rpv": token.realm.personalization}
    found |= {f"rem{index}": value for index, value in enumerate(token.realm.extensible)}
    found["configuration"] = token.platform.configuration
    for component in token.platform.components:
        label = name = component.type.lower() or "untyped"
        count = 1
        while f"component.{name}" in found:  # no value hides another: the second of a type is `<type>.2`
            count += 1
            name = f"{label}.{count}"
        found[f"component.{name}"] = component.measurement
        found[f"signer.{name}"] = component.signer
    return found


def _attributes(token: cca_format.Token) -> dict[str, bool]:
    found = {"secured": token.platform.lifecycle >> 8 == SECURED}
    if token.realm.private_memory_encryption is not None:
        found["private_memory_encryption"] = token.realm.private_memory_encryption
    return found


def _identity(token: cca_format.Token) -> dict[str, str]:
    found = {
        "instance_id": token.platform.instance_id.hex(),
        "implementation_id": token.platform.implementation_id.hex(),
    }
    if token.realm.instance_id is not None:
        found["realm_instance_id"] = token.realm.instance_id.hex()
    return found


def _refused(where: str, found: str, wanted: str, hint: str = "") -> EvidenceError:
    return EvidenceError(
        "the CCA token is not authentic", code="evidence-not-authentic", reasons=[Reason(where, found, wanted, hint)]
    )
