"""Soft CCA: bit-exact attestation tokens under a test platform key. It protects nothing. Experimental, as `cca` is.

Every key here is derived from a published label, so everybody can make the same evidence about any realm. That is the
point: demonstrations, tests and CI walk the path of real evidence, and each fault can be made at will. Whatever is
emitted says so: implementation id, verification service, TEE type (`soft-cca`).

Pure: keys come from labels, signatures are deterministic (RFC 6979), so equal arguments give equal bytes. The hash of the
platform key is the constant `cca.roots.SOFT_CPAK`.

    platform(...)      one machine: its platform key, ids and realm key
    token(...)         two signatures
    endorsements(...)  the platform key, as the relying party of real hardware would have it from the vendor

Formats: cca/format.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.attestation import cose
from cloister.attestation.endorsements import Endorsement, Endorsements

NOTICE: Final = "soft TEE: the test platform key is public, so this protects nothing"
LABEL: Final = "cloister soft cca platform key 1: everybody knows this key"
"""The published label. Another label gives a key that nobody pins: the case of a foreign platform."""

LEGACY: Final = "http://arm.com/CCA-SSD/1.0.0"
PROFILE_1: Final = "tag:arm.com,2023:cca_platform#1.0.0"
PROFILE_2: Final = "tag:arm.com,2024:cca_platform#2.0.0"
REALM_PROFILES: Final = {
    PROFILE_1: "tag:arm.com,2023:realm#1.0.0",
    PROFILE_2: "tag:arm.com,2024:realm#2.0.0",
}
SECURED: Final = 0x3000
ES384: Final = -35

_ORDER: Final = int(  # of P-384, NIST SP 800-186, 3.2.1.4
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16
)


def derive_key(label: str) -> ec.EllipticCurvePrivateKey:
    """Return the P-384 key of a published `label`. Nobody owns it."""
    digest = hashlib.shake_256(b"cloister/soft-cca/key/1\x00" + label.encode()).digest(64)
    return ec.derive_private_key(int.from_bytes(digest, "big") % (_ORDER - 1) + 1, ec.SECP384R1())


@dataclass(frozen=True, slots=True)
class Platform:
    """One soft machine. All soft machines share one platform key, as machines of one batch may."""

    cpak: ec.EllipticCurvePrivateKey
    instance_id: bytes
    implementation_id: bytes
    rak: ec.EllipticCurvePrivateKey

    def spki(self) -> bytes:
        """Return the platform's public key, DER."""
        return self.cpak.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@lru_cache(maxsize=64)
def platform(name: str = "soft", *, label: str = LABEL) -> Platform:
    """Return the soft machine `name`."""
    identity = hashlib.sha256(f"{label}/{name}".encode()).digest()
    return Platform(
        cpak=derive_key(label),
        instance_id=b"\x01" + identity,
        implementation_id=b"SOFT: protects nothing".ljust(32, b"\x00"),
        rak=derive_key(f"{label}/{name}/rak"),
    )


def token(
    machine: Platform,
    *,
    rim: bytes,
    challenge: bytes,
    profile: str = PROFILE_1,
    lifecycle: int = SECURED,
    personalization: bytes = bytes(64),
    rak_hash: str = "sha-256",
    tag: int = 907,
    cpak: ec.EllipticCurvePrivateKey | None = None,
    rak: ec.EllipticCurvePrivateKey | None = None,
    platform_changes: Mapping[Any, Any] | None = None,
    realm_changes: Mapping[Any, Any] | None = None,
) -> bytes:
    """Return a token of a realm on `machine`.

    Args:
        rim: realm initial measurement, 32, 48 or 64 bytes.
        challenge: what the realm bound, 64 bytes.
        tag: 907 with entries `[263, token]`, or 399 with bare tokens.
        cpak, rak: keys that sign instead of the machine's, while the claims stay as they are.
        platform_changes, realm_changes: claims to replace before they are signed; a value `...` leaves the claim out.

    Raises:
        ValueError: a measurement or challenge of another size.
    """
    if len(challenge) != 64 or len(rim) not in (32, 48, 64):
        raise ValueError("a challenge has 64 bytes, a measurement 32, 48 or 64")
    public_key = _public_key(machine.rak, profile)
    realm: dict[Any, Any] = {
        10: challenge,
        44235: personalization,
        44236: f"sha-{8 * len(rim)}",
        44237: public_key,
        44238: rim,
        44239: [bytes(len(rim))] * 4,
        44240: rak_hash,
    }
    if profile in REALM_PROFILES:
        realm = {265: REALM_PROFILES[profile], **realm}
    if profile == PROFILE_2:
        realm |= {256: b"\x01" + hashlib.sha256(public_key).digest(), 44243: 1}
    claims: dict[Any, Any] = {
        265: profile,
        10: hashlib.new(rak_hash.replace("-", ""), public_key).digest(),
        2396: machine.implementation_id,
        256: machine.instance_id,
        2401: bytes.fromhex("cfcfcfcf"),
        2395: lifecycle,
        2402: "sha-256",
        2400: "https://soft.invalid/protects-nothing",
        2399: [
            {1: name, 2: _digest(name), 4: "1.0", 5: _digest("signer"), 6: "sha-256"}
            for name in ("RSE_BL1_2", "AP_BL31", "RMM")
        ],
    }
    tokens = (
        _signed(machine.cpak if cpak is None else cpak, claims, platform_changes),
        _signed(machine.rak if rak is None else rak, realm, realm_changes),
    )
    entries: list[Any] = [[263, each] if tag == 907 else each for each in tokens]
    return cose.dumps(cose.Tagged(tag, dict(zip((44234, 44241), entries, strict=True))))


def endorsements(issued: datetime, *, name: str = "soft", label: str = LABEL) -> Endorsements:
    """Return the platform key of the machine `name`. A key has no validity: `issued` is there because every kind has it.

    Raises:
        ValueError: `issued` has no time zone.
    """
    if issued.tzinfo is None:
        raise ValueError("`issued` has no time zone")
    machine = platform(name, label=label)
    return Endorsements((Endorsement("cca", f"cpak/{machine.instance_id.hex()}", machine.spki()),))


def _public_key(rak: ec.EllipticCurvePrivateKey, profile: str) -> bytes:
    point = rak.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    if profile not in REALM_PROFILES:
        return point
    return cose.dumps({1: 2, -1: 2, -2: point[1:49], -3: point[49:]})


def _signed(key: ec.EllipticCurvePrivateKey, claims: dict[Any, Any], changes: Mapping[Any, Any] | None) -> bytes:
    final = {name: value for name, value in (claims | dict(changes or {})).items() if value is not ...}
    return cose.sign(key, cose.dumps(final), algorithm=ES384)


def _digest(what: str) -> bytes:
    return hashlib.sha256(f"cloister soft cca {what} - protects nothing".encode()).digest()
