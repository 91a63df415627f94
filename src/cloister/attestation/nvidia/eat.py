"""What NVIDIA's attestation service (NRAS) says about devices: a detached EAT bundle (RFC 9711, section 5), as facts.

    [["JWT", token], {name: token, ...}]

The first token is the platform's; `submods` names every device's token by its digest:

    {"iss", "iat", "nbf", "exp", "eat_nonce": hex, "x-nvidia-overall-att-result": bool,
     "submods": {name: ["DIGEST", ["SHA-256", hex of the digest of the token's characters]]}, ...}

A service that somebody else runs is an authority, not hardware: it counts only for a relying party that names it, and this module
says what it said, under keys that are an argument. `read_bundle` believes nothing; `verify_bundle` checks, in this order:
  1 form       the bundle parses; every named device is there, and no other
  2 digest     each device's token is the one that the platform's token names
  3 signature  every token is signed with ES384 by a key of the given JWKS that its header names
  4 issuer     every token is of this issuer
  5 nonce      every token answers this nonce
  6 time       nbf <= now < exp, exp - nbf at most `LIFETIME`, of every token
Not checked on purpose: what the service concluded. `Result.overall` and the claims are for the relying party's policy.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from cloister.crypto.canonical import json_decode
from cloister.errors import EvidenceError, Reason

LIMIT: Final = 512 * 1024
"""Largest bundle, in bytes; one GPU makes 3.6 kB."""
JWKS_LIMIT: Final = 256 * 1024
DEVICES: Final = 64
LIFETIME: Final = timedelta(hours=24)
"""Longest life of a token that is believed; NRAS gives one hour."""
ISSUER: Final = "https://nras.attestation.nvidia.com"
STEPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "nras.1-form": "The bundle parses and holds the tokens of all devices that it names.",
        "nras.2-digest": "Each device's token is the one that the platform's token names.",
        "nras.3-signature": "Every token is signed by a key of the service.",
        "nras.4-issuer": "Every token was issued by the service.",
        "nras.5-nonce": "Every token answers the nonce that was asked for.",
        "nras.6-time": "Every token is valid now.",
    }
)
_HASHES: Final = {"SHA-256": "sha256", "SHA-384": "sha384", "SHA-512": "sha512"}


@dataclass(frozen=True, slots=True)
class Token:
    """One compact JWS, taken apart; nothing of it is believed."""

    text: str
    key_id: str
    algorithm: str
    body: Mapping[str, Any]
    signature: bytes


@dataclass(frozen=True, slots=True)
class Bundle:
    """One detached EAT bundle: the platform's token and, by name, those of the devices."""

    platform: Token
    devices: Mapping[str, Token]


@dataclass(frozen=True, slots=True)
class Result:
    """What the service said, after its signatures held."""

    overall: bool
    """`x-nvidia-overall-att-result`."""
    nonce: bytes
    devices: Mapping[str, Mapping[str, Any]]
    """Name -> claims, such as `measres`, `secboot`, `dbgstat`, `ueid`, `x-nvidia-gpu-driver-version`."""
    valid_until: datetime


def read_bundle(data: bytes) -> Bundle:
    """Return the bundle in `data`, whose digests bind the devices' tokens to the platform's. Steps 1 and 2.

    Raises:
        EvidenceError: `evidence-malformed`; `evidence-not-authentic` where a digest does not hold.
    """
    try:
        value: Any = json_decode(data, limit=LIMIT, canonical=False)
    except ValueError as error:
        raise _malformed(str(error), "JSON") from error
    # (1)
    match value:
        case [["JWT", str(text)], dict(tokens)] if len(tokens) <= DEVICES:
            pass
        case _:
            raise _malformed("another shape", '[["JWT", token], {name: token}]')
    platform = _token(text, "platform")
    devices: dict[str, Token] = {}
    for name, inner in tokens.items():
        if not isinstance(inner, str):
            raise _malformed(f"{name}: {type(inner).__name__}", "a token")
        devices[name] = _token(inner, name)
    named = platform.body.get("submods")
    if not isinstance(named, dict) or set(named) != set(devices) or not devices:
        found = ", ".join(sorted(named)) if isinstance(named, dict) else "no submods"
        raise _malformed(found[:200] or "no device", f"submods of {', '.join(sorted(devices))[:200] or 'devices'}")
    # (2)
    reasons: list[Reason] = []
    for name, token in devices.items():
        match named[name]:
            case ["DIGEST", [str(algorithm), str(digest)]] if algorithm in _HASHES:
                actual = hashlib.new(_HASHES[algorithm], token.text.encode("ascii")).hexdigest()
            case _:
                raise _malformed(f"submods.{name} of another shape", '["DIGEST", ["SHA-256", hex]]')
        if actual != digest.lower():
            reasons.append(Reason(f"nras.2-digest.{name}", actual, digest[:128], "the device's token was exchanged"))
    if reasons:
        raise _refused("the bundle was put together from parts of several", reasons)
    return Bundle(platform, MappingProxyType(devices))


def verify_bundle(bundle: Bundle, jwks: bytes, *, now: datetime, nonce: bytes, issuer: str = ISSUER) -> Result:
    """Return what the service whose keys are `jwks` (RFC 7517, JSON) said in `bundle` for `nonce` (32 bytes), valid at `now`.

    Raises:
        EvidenceError: `evidence-not-authentic` with all violations; `evidence-malformed` for a token or a key of another form.
        ValueError: `now` has no time zone.
    """
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    keys = _keys(jwks)
    reasons: list[Reason] = []
    ends: list[datetime] = []
    for name, token in (("platform", bundle.platform), *bundle.devices.items()):
        body = token.body
        # (3) the algorithm is ours to choose; the header only has to agree
        key = keys.get(token.key_id)
        if token.algorithm != "ES384":
            reasons.append(Reason(f"nras.3-signature.{name}", f"algorithm {token.algorithm[:40]}", "ES384"))
        elif key is None:
            found = f"key {token.key_id[:80]!r}"
            reasons.append(
                Reason(
                    f"nras.3-signature.{name}", found, "a key of the service's JWKS", "the JWKS may be of another day"
                )
            )
        elif not _holds(key, token):
            reasons.append(Reason(f"nras.3-signature.{name}", "a signature that this key did not make", token.key_id))
        # (4)
        if body.get("iss") != issuer:
            reasons.append(Reason(f"nras.4-issuer.{name}", repr(body.get("iss"))[:120], issuer))
        # (5)
        if body.get("eat_nonce") != nonce.hex():
            reasons.append(Reason(f"nras.5-nonce.{name}", repr(body.get("eat_nonce"))[:140], nonce.hex()))
        # (6)
        start, end = _time(body, "nbf", name), _time(body, "exp", name)
        if not start <= now < end or end - start > LIFETIME:
            reasons.append(
                Reason(
                    f"nras.6-time.{name}",
                    f"valid {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M}",
                    f"valid at {now.astimezone(UTC):%Y-%m-%d %H:%M}, for at most {LIFETIME}",
                )
            )
        ends.append(end)
    overall = bundle.platform.body.get("x-nvidia-overall-att-result")
    if not isinstance(overall, bool):
        raise _malformed(repr(overall)[:80], "x-nvidia-overall-att-result, true or false")
    if reasons:
        raise _refused("NVIDIA's attestation service did not say this, or not now, or not to us", reasons)
    return Result(
        overall=overall,
        nonce=nonce,
        devices=MappingProxyType({name: token.body for name, token in bundle.devices.items()}),
        valid_until=min(ends),
    )


def _token(text: str, name: str) -> Token:
    parts = text.split(".")
    if len(parts) != 3:
        raise _malformed(f"{name}: {len(parts)} parts", "a compact JWS of three")
    try:
        header, body, signature = (_decode(part) for part in parts)
        head: Any = json_decode(header, limit=4096, canonical=False)
        claims: Any = json_decode(body, limit=LIMIT, canonical=False)
    except ValueError as error:
        raise _malformed(f"{name}: {error}"[:200], "a compact JWS over a JSON object") from error
    match head:
        case {"kid": str(key_id), "alg": str(algorithm)} if "crit" not in head:
            pass
        case _:
            raise _malformed(f"{name}: a header of another shape", "kid and alg, and nothing critical")
    if not isinstance(claims, dict):
        raise _malformed(f"{name}: {type(claims).__name__}", "a JSON object")
    return Token(text, key_id, algorithm, MappingProxyType(claims), signature)


def _decode(part: str) -> bytes:
    if "=" in part:
        raise ValueError("base64url with padding")
    data = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
    if base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii") != part:
        raise ValueError("base64url with bits that mean nothing")
    return data


def _keys(jwks: bytes) -> dict[str, ec.EllipticCurvePublicKey]:
    try:
        value: Any = json_decode(jwks, limit=JWKS_LIMIT, canonical=False)
        match value:
            case {"keys": [*entries]}:
                pass
            case _:
                raise ValueError("no list of keys")
        keys: dict[str, ec.EllipticCurvePublicKey] = {}
        for entry in entries:
            match entry:
                case {"kty": "EC", "crv": "P-384", "kid": str(key_id), "x": str(x), "y": str(y)}:
                    point = [int.from_bytes(_decode(part), "big") for part in (x, y)]
                    if key_id in keys:
                        raise ValueError(f"key {key_id[:80]!r} twice")
                    keys[key_id] = ec.EllipticCurvePublicNumbers(point[0], point[1], ec.SECP384R1()).public_key()
                case _:
                    continue  # keys of other kinds are not of these tokens
    except ValueError as error:
        raise _malformed(f"JWKS: {error}"[:200], "a JWKS with P-384 keys") from error
    return keys


def _holds(key: ec.EllipticCurvePublicKey, token: Token) -> bool:
    if len(token.signature) != 96:
        return False
    r, s = int.from_bytes(token.signature[:48], "big"), int.from_bytes(token.signature[48:], "big")
    try:
        key.verify(encode_dss_signature(r, s), token.text.rpartition(".")[0].encode("ascii"), ec.ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True


def _time(body: Mapping[str, Any], claim: str, name: str) -> datetime:
    value = body.get(claim)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 253_402_300_800:  # year 10000
        raise _malformed(f"{name}: {claim} {value!r}"[:120], "seconds since 1970")
    return datetime.fromtimestamp(value, UTC)


def _malformed(found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "the EAT bundle does not parse",
        code="evidence-malformed",
        reasons=[Reason("nras.1-form", found, wanted)],
    )


def _refused(message: str, reasons: list[Reason]) -> EvidenceError:
    return EvidenceError(message, code="evidence-not-authentic", reasons=reasons)
