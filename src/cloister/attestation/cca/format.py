"""Arm CCA attestation tokens: bytes to frozen types. Experimental. Checks form only; nothing here is believed.

Sources: Arm Realm Management Monitor specification (DEN0137), A7 "Realm measurement and attestation";
draft-ffm-rats-cca-token. Claim keys in decimal; a claim that is not listed is ignored (RFC 8392, section 3).

    CBOR tag 399 (2021 to 2024) or 907 (CMW collection), a map of
      44234  platform token     bytes, or [263, bytes] (263: application/eat+cwt)
      44241  realm token        the same
      "__cmwc_t"                text; the collection's type, not signed, not believed
    each token is COSE_Sign1 over a map:

      platform token                                     realm token
        265   profile             text, see PROFILES       265    profile           text or absent, see PROFILES
        10    challenge           32, 48, 64: H(RAK)       10     challenge         64
        2396  implementation id   32                       44235  personalization   64
        256   instance id         33, the first 01         44236  hash algorithm    of the measurements
        2401  configuration       1 to 1,024               44237  public key        RAK
        2395  life cycle          0 to 0xffff              44240  hash algorithm    of H(RAK)
        2402  hash algorithm      default of components    44238  initial           32, 48 or 64
        2399  components          1 to 64 maps             44239  extensible        4 of 32, 48 or 64
        2400  verification        text or absent           256    instance id       33 (profile of 2024)
                                                           44243  MEC policy        0 or 1 (profile of 2024)
      a component: 1 type (text or absent), 2 measurement, 4 version (text or absent), 5 signer, 6 hash algorithm or absent

The RAK is the bytes of a COSE_Key, or, where the realm token has no profile, a P-384 point of 97 bytes. H(RAK) is over the
claim's bytes either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from cloister.attestation import cose
from cloister.errors import EvidenceError, Reason

WHERE: Final = "cca.1-format"

LIMIT: Final = 16_384
"""Largest token accepted, in bytes; the public one has 2,234."""
TAGS: Final = (399, 907)
EAT_CWT: Final = 263
"""CoAP content format application/eat+cwt, RFC 9782."""
PLATFORM, REALM, COLLECTION_TYPE = 44234, 44241, "__cmwc_t"
COMPONENTS: Final = 64
EXTENSIBLE: Final = 4
REPORT_DATA_BYTES: Final = 64

PROFILES: Final[Mapping[str, str | None]] = MappingProxyType(
    {
        "http://arm.com/CCA-SSD/1.0.0": None,
        "tag:arm.com,2023:cca_platform#1.0.0": "tag:arm.com,2023:realm#1.0.0",
        "tag:arm.com,2024:cca_platform#2.0.0": "tag:arm.com,2024:realm#2.0.0",
    }
)
"""Profile of the platform token -> profile of the realm token that goes with it; None: it has none."""
PROFILE_2: Final = "tag:arm.com,2024:cca_platform#2.0.0"

HASHES: Final[Mapping[str, str]] = MappingProxyType({"sha-256": "sha256", "sha-384": "sha384", "sha-512": "sha512"})
"""IANA named information hash -> hashlib's name."""

CURVES: Final[Mapping[int, tuple[type[ec.EllipticCurve], int]]] = MappingProxyType(
    {1: (ec.SECP256R1, 32), 2: (ec.SECP384R1, 48), 3: (ec.SECP521R1, 66)}
)
"""COSE elliptic curve -> curve and size of a coordinate, RFC 9053, table 18."""


@dataclass(frozen=True, slots=True)
class Component:
    """One piece of firmware that the platform measured."""

    type: str
    measurement: bytes
    signer: bytes
    version: str


@dataclass(frozen=True, slots=True)
class Platform:
    """The platform token, taken apart."""

    message: cose.Sign1 = field(repr=False)
    profile: str
    challenge: bytes
    implementation_id: bytes
    instance_id: bytes
    configuration: bytes
    lifecycle: int
    components: tuple[Component, ...]


@dataclass(frozen=True, slots=True)
class Realm:
    """The realm token, taken apart."""

    message: cose.Sign1 = field(repr=False)
    profile: str | None
    challenge: bytes
    personalization: bytes
    public_key: bytes
    """RAK as the token writes it, which is what the platform hashed."""
    key: ec.EllipticCurvePublicKey = field(repr=False, compare=False)
    public_key_hash: str
    """hashlib's name."""
    initial: bytes
    extensible: tuple[bytes, ...]
    instance_id: bytes | None
    private_memory_encryption: bool | None
    """MEC policy; None where the profile does not state it."""


@dataclass(frozen=True, slots=True)
class Token:
    """One CCA attestation token."""

    platform: Platform
    realm: Realm


def parse(data: bytes) -> Token:
    """Return the token that is exactly `data`.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    try:
        return _token(data)
    except cose.FormError as error:
        raise EvidenceError(
            "the CCA token does not parse",
            code="evidence-malformed",
            reasons=[Reason(WHERE, error.found, error.wanted)],
        ) from error


def _token(data: bytes) -> Token:
    collection = cose.loads(data, limit=LIMIT)
    if not isinstance(collection, cose.Tagged) or collection.tag not in TAGS or not isinstance(collection.value, dict):
        raise cose.FormError("another shape", f"a map with CBOR tag {' or '.join(map(str, TAGS))}")
    entries = collection.value
    if not {PLATFORM, REALM} <= entries.keys() <= {PLATFORM, REALM, COLLECTION_TYPE}:
        raise cose.FormError("a collection of other tokens", f"a platform token {PLATFORM} and a realm token {REALM}")
    platform = _platform(cose.sign1(_entry(entries[PLATFORM]), limit=LIMIT))
    realm = _realm(cose.sign1(_entry(entries[REALM]), limit=LIMIT))
    if realm.profile != PROFILES[platform.profile]:
        raise cose.FormError(
            f"realm profile {realm.profile!r} beside platform profile {platform.profile!r}"[:300],
            repr(PROFILES[platform.profile]),
        )
    if platform.profile == PROFILE_2 and (realm.instance_id is None or realm.private_memory_encryption is None):
        raise cose.FormError("a realm token without instance id or MEC policy", "both, in the profile of 2024")
    return Token(platform, realm)


def _entry(value: Any) -> bytes:
    match value:
        case bytes(token) | [int(263), bytes(token)]:
            return token
        case _:
            raise cose.FormError("a collection entry of another shape", f"bytes or [{EAT_CWT}, bytes]")


def _platform(message: cose.Sign1) -> Platform:
    claims = _claims(message, "platform")
    profile = claims.text(265)
    if profile not in PROFILES:
        raise cose.FormError(f"platform profile {profile!r}"[:200], " or ".join(PROFILES))
    claims.hash(2402)
    lifecycle = claims.value.get(2395)
    if isinstance(lifecycle, bool) or not isinstance(lifecycle, int) or not 0 <= lifecycle <= 0xFFFF:
        raise cose.FormError(f"platform life cycle {lifecycle!r}"[:80], "0 to 0xffff")
    found = claims.value.get(2399)
    if not isinstance(found, list) or not 0 < len(found) <= COMPONENTS:
        raise cose.FormError("platform components of another shape", f"1 to {COMPONENTS}")
    if 2400 in claims.value:
        claims.text(2400)
    return Platform(
        message=message,
        profile=profile,
        challenge=claims.octets(10, 32, 48, 64),
        implementation_id=claims.octets(2396, 32),
        instance_id=claims.ueid(256),
        configuration=claims.octets(2401, *range(1, 1025)),
        lifecycle=lifecycle,
        components=tuple(_component(each) for each in found),
    )


def _component(value: Any) -> Component:
    if not isinstance(value, dict):
        raise cose.FormError("a platform component of another shape", "a map")
    claims = _Claims(value, "component")
    if 6 in value:
        claims.hash(6)
    return Component(
        type=claims.text(1) if 1 in value else "",
        measurement=claims.octets(2, 32, 48, 64),
        signer=claims.octets(5, 32, 48, 64),
        version=claims.text(4) if 4 in value else "",
    )


def _realm(message: cose.Sign1) -> Realm:
    claims = _claims(message, "realm")
    profile = claims.text(265) if 265 in claims.value else None
    claims.hash(44236)
    extensible = claims.value.get(44239)
    if not isinstance(extensible, list) or len(extensible) != EXTENSIBLE:
        raise cose.FormError("realm extensible measurements of another shape", f"{EXTENSIBLE} measurements")
    measurements = _Claims(dict(enumerate(extensible)), "realm extensible measurement")
    public_key = claims.octets(44237, *range(1, 257))
    policy = claims.value.get(44243)
    if policy is not None and (isinstance(policy, bool) or policy not in (0, 1)):
        raise cose.FormError(f"realm MEC policy {policy!r}"[:80], "0 (shared) or 1 (private)")
    return Realm(
        message=message,
        profile=profile,
        challenge=claims.octets(10, REPORT_DATA_BYTES),
        personalization=claims.octets(44235, 64),
        public_key=public_key,
        key=_point(public_key) if profile is None else _cose_key(public_key),
        public_key_hash=claims.hash(44240),
        initial=claims.octets(44238, 32, 48, 64),
        extensible=tuple(measurements.octets(index, 32, 48, 64) for index in range(EXTENSIBLE)),
        instance_id=claims.ueid(256) if 256 in claims.value else None,
        private_memory_encryption=None if policy is None else policy == 1,
    )


def _point(data: bytes) -> ec.EllipticCurvePublicKey:
    if len(data) != 97 or data[0] != 4:
        raise cose.FormError(f"a realm public key of {len(data)} bytes", "an uncompressed P-384 point of 97 bytes")
    return _key(2, data[1:49], data[49:])


def _cose_key(data: bytes) -> ec.EllipticCurvePublicKey:
    # RFC 9053, section 7.1.1: 1 kty (2: EC2), -1 curve, -2 x, -3 y
    match cose.loads(data, limit=256):
        case {1: 2, -1: int(curve), -2: bytes(x), -3: bytes(y)} if curve in CURVES:
            return _key(curve, x, y)
        case _:
            raise cose.FormError("a realm public key of another shape", "a COSE_Key EC2 with x and y")


def _key(curve: int, x: bytes, y: bytes) -> ec.EllipticCurvePublicKey:
    kind, size = CURVES[curve]
    if len(x) != size or len(y) != size:
        raise cose.FormError("a realm public key with coordinates of another size", f"{size} bytes each")
    numbers = ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), kind())
    try:
        return numbers.public_key()
    except ValueError as error:
        raise cose.FormError("a realm public key that is not on its curve", "a point of the curve") from error


def _claims(message: cose.Sign1, what: str) -> _Claims:
    value = cose.loads(message.payload, limit=LIMIT)
    if not isinstance(value, dict):
        raise cose.FormError(f"a {what} token that is not a map", "a map of claims")
    return _Claims(value, what)


@dataclass(frozen=True, slots=True)
class _Claims:
    value: Mapping[Any, Any]
    what: str

    def octets(self, key: int, *sizes: int) -> bytes:
        found = self.value.get(key)
        if not isinstance(found, bytes) or len(found) not in sizes:
            size = f"of {len(found)} bytes" if isinstance(found, bytes) else "that is not bytes"
            wanted = " or ".join(map(str, sizes)) if len(sizes) < 4 else f"{sizes[0]} to {sizes[-1]}"
            raise cose.FormError(f"{self.what} claim {key} {size}", f"{wanted} bytes")
        return found

    def text(self, key: int) -> str:
        found = self.value.get(key)
        if not isinstance(found, str) or not 0 < len(found) <= 256 or not (found.isascii() and found.isprintable()):
            raise cose.FormError(f"{self.what} claim {key} {found!r}"[:200], "1 to 256 printable characters")
        return found

    def hash(self, key: int) -> str:
        found = self.value.get(key)
        if not isinstance(found, str) or found not in HASHES:
            raise cose.FormError(f"{self.what} hash algorithm {found!r}"[:80], " or ".join(HASHES))
        return HASHES[found]

    def ueid(self, key: int) -> bytes:
        found = self.octets(key, 33)
        if found[0] != 1:
            raise cose.FormError(f"{self.what} instance id of type {found[0]}", "type 1, RAND (RFC 9711, 4.2.1)")
        return found
