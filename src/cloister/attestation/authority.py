"""What other verifiers say: tokens of attestation services, believed only from authorities that a relying party names.

A token is not evidence. Its signer looked at evidence and tells us a result; we check who said it, to whom, and when, and
have to believe the rest. So nothing here is found by a peer's word: an `Authority` (name, issuer, pinned keys) comes from the
relying party's contract, `Claims.tee` says whose word it is (`authority:<name>/<what it attested>`), and that is no name of
hardware: a policy that accepts `sev-snp` does not accept a service's token about SEV-SNP.

Steps of `verify_token`; an error names the step that refused:
  1 form       a compact JWS of three base64url parts; header and body are JSON objects without a key twice
  2 key        `alg` is RS256, PS256 or ES384, `kid` names a pinned key of that type; nothing critical in the header
  3 signature  that key signed header and body
  4 issuer     `iss` is the authority's, and `aud` the audience, where the authority has one
  5 time       nbf and iat are not in the future, exp is not past (30 s of skew); at most 24 h from iat to exp
  6 nonce      what the service vouches for is bound to the nonce, exactly and only
  7 claims     the members that the service's documentation states, of their types
Kind `nras` is a bundle of tokens: `nvidia/eat.py` does steps 1 to 6 (`nras.<n>-<word>`), without skew.

Keys: a JWKS (RFC 7517) as pinned bytes. `jku`, `jwk`, `x5u` and `x5c` of a token's header are never looked at. MAA publishes its
keys as certificates (`x5c`): the first one's key is the pin, and its chain and validity are not judged.

Where each service binds the nonce (`nonce`: 32 or 64 bytes; text means base64url without padding):

    maa, type sevsnpvm   hardware report data: `x-ms-sevsnpvm-reportdata` (32 bytes: followed by 32 zeros)
    maa, type tdxvm      hardware report data: `tdx_report_data`, the same
    maa, type sgx        enclave held data: `x-ms-sgx-ehd`, which MAA compares with the quote's report data
    maa, type azurevm    `x-ms-runtime.client-payload.nonce`: base64 of the text
    confidential-space   `eat_nonce`: the text, and no second nonce
    nras                 `eat_nonce`: 64 hex digits, in every token of the bundle

MAA's own `nonce` claim is *not* enough: anybody can send somebody else's captured quote with a fresh nonce to MAA. Report data is
in the quote; the client payload of `azurevm` reaches the relying party only through the guest, because MAA encrypts that token
to a key of the guest's TPM.

Events: SNP, SGX, Confidential Space and azurevm have no register for them, so the nonce is `events.fold(report_data, events)`
(64 bytes); `tdxvm` states RTMR 3. With 32 bytes there is no log. `Claims.report_data` is the nonce. `nonce_in` reads which nonce a
token answers; `token/verify.py`, which has no nonce to compare with, leaves the comparison to `check_binding`.

Launch: `azurevm` states the firmware that Azure put below the guest and nothing of the guest, so there is no `Claims.launch`.

Sources: RFC 7515, 7517, 7519; learn.microsoft.com/azure/attestation: claim-sets, attestation-token-examples,
trust-domain-extensions-eat-profile; docs.cloud.google.com/confidential-computing/confidential-space/docs/reference/token-claims;
docs.nvidia.com/attestation: gpu_claims.

Not checked on purpose: which attestation policy an MAA instance has. Who runs the instance writes it, so a contract that
names an instance of somebody else pins `measurements["maa_policy_hash"]`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384

from cloister.attestation import events as event_log
from cloister.attestation.nvidia import eat
from cloister.attestation.pki import certificate
from cloister.attestation.types import AUTHORITY, NOT_RATED, AuthorityKind, Claims, Event
from cloister.crypto.canonical import json_decode, json_encode
from cloister.errors import EvidenceError, Reason

__all__ = ["ALGORITHMS", "PREFIX", "STEPS", "Authority", "Kind", "nonce_in", "nonce_text", "verify_token"]

Kind = AuthorityKind
KINDS: Final[frozenset[str]] = frozenset(get_args(Kind))

PREFIX: Final = AUTHORITY
"""Of `Claims.tee`: no hardware's name has it."""

ALGORITHMS: Final = frozenset({"RS256", "PS256", "ES384"})
SKEW: Final = timedelta(seconds=30)
LIFETIME: Final = timedelta(hours=24)
"""Longest life of a token that is believed: MAA gives 8 h, Google 1 h, NVIDIA 1 h."""
LIMIT: Final = 64 * 1024
"""Largest token, in characters; one of MAA has about 6,000."""
JWKS_LIMIT: Final = 256 * 1024
RSA_BITS: Final = 2048
NONCE_BYTES: Final = (32, 64)

STEPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "authority.1-form": "the token is a compact JWS over JSON objects",
        "authority.2-key": "its header names a pinned key of the authority and an algorithm that is allowed",
        "authority.3-signature": "that key signed the token",
        "authority.4-issuer": "the authority issued it, for this audience",
        "authority.5-time": "it is valid now",
        "authority.6-nonce": "what it says is bound to the nonce that was asked for",
        "authority.7-claims": "it has the claims that the service documents",
    }
)

_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,39}")
_DECIMAL: Final = re.compile(r"[0-9]{1,128}")
_HEX: Final = re.compile(r"(?:[0-9a-fA-F]{2})+")
_SHA256: Final = re.compile(r"sha256:[0-9a-f]{64}")
_END_OF_TIME: Final = 253_402_300_800  # year 10000: beyond it there is no date

_Key = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True, slots=True)
class Authority:
    """One attestation service that a relying party believes, as its contract names it.

    Raises:
        ValueError: a name, issuer or kind of another form, a JWKS without a usable key, or a missing audience.
    """

    name: str
    """As in `Claims.tee`: lower-case letters, digits and `-`, at most 40."""
    kind: Kind
    issuer: str
    """Exactly `iss`, such as `https://sharedeus2.eus2.attest.azure.net`."""
    jwks: bytes = field(repr=False)
    """RFC 7517, pinned. The services rotate keys, so a new one is a decision of the relying party."""
    audience: str | None = None
    """Exactly `aud`. Confidential Space mints tokens for many relying parties, so there it must be set."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"authority name {self.name!r} is not of lower-case letters, digits and -")
        if self.kind not in KINDS:
            raise ValueError(f"authority kind {self.kind!r} is not one of {', '.join(sorted(KINDS))}")
        if not self.issuer.startswith("https://"):
            raise ValueError(f"issuer {self.issuer!r} does not begin with https://")
        if self.kind == "confidential-space" and not self.audience:
            raise ValueError("an authority of kind confidential-space needs an audience")
        if self.kind == "nras" and self.audience is not None:
            raise ValueError("tokens of kind nras are for nobody in particular: an audience would not be checked")
        _keys(self.jwks)


@dataclass(frozen=True, slots=True)
class _Token:
    """One compact JWS, taken apart; nothing of it is believed."""

    algorithm: str
    key_id: str
    signed: bytes
    signature: bytes
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Said:
    """What the body of a token says, before the common claims are added."""

    tee: str
    debug: bool
    bound: bool
    """Whether the nonce is where this service binds it."""
    found: str
    """What was there instead, for people."""
    launch: str
    measurements: dict[str, bytes]
    kind: Literal["tee", "attested-host"] = "tee"
    tcb_status: str = NOT_RATED
    svns: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, bool] = field(default_factory=dict)
    platform: dict[str, str] = field(default_factory=dict)


def nonce_text(nonce: bytes) -> str:
    """Return `nonce` as an attester gives it to a service that takes text: base64url without padding, 43 or 86 characters."""
    return base64.urlsafe_b64encode(nonce).rstrip(b"=").decode("ascii")


def nonce_in(token: str | bytes, kind: Kind) -> bytes:
    """Return the nonce that `token` answers, from the one place where its service binds it. Nothing of it is believed yet.

    32 or 64 bytes; report data that ends with 32 zeros holds 32.

    Raises:
        EvidenceError: `evidence-malformed`; `reasons[0].where` begins with the step of `verify_token` that would refuse.
    """
    if kind == "nras":
        text = eat.read_bundle(token.encode() if isinstance(token, str) else token).platform.body.get("eat_nonce")
        if not isinstance(text, str) or len(text) != 64 or not _HEX.fullmatch(text):
            raise _malformed("authority.6-nonce", repr(text)[:200], "64 hex digits in eat_nonce")
        return bytes.fromhex(text)
    body = _read(token).body
    try:
        nonce = _held(body) if kind == "maa" else _unb64(_only(body.get("eat_nonce")))
    except ValueError as error:
        raise _malformed("authority.6-nonce", "a nonce of another form", "base64url without padding") from error
    if len(nonce) not in NONCE_BYTES:
        raise _malformed("authority.6-nonce", f"a nonce of {len(nonce)} bytes", "32 or 64 bytes")
    return nonce


def _only(value: object) -> str:
    """Raises: ValueError: a second nonce would make one token the answer to two questions."""
    match value:
        case str(text) | [str(text)] if text.isascii():
            return text
        case _:
            raise ValueError("not one nonce")


def _held(body: Mapping[str, Any]) -> bytes:
    """Raises: ValueError or EvidenceError for another form."""
    match _text(body, "x-ms-attestation-type"):
        case "sevsnpvm":
            data = _hex(body, "x-ms-sevsnpvm-reportdata", 64)
        case "tdxvm":
            data = _hex(body, "tdx_report_data", 64)
        case "sgx":
            return _unb64(_text(body, "x-ms-sgx-ehd"))
        case "azurevm":
            match body.get("x-ms-runtime"):
                case {"client-payload": {"nonce": str(text)}}:
                    return _unb64(base64.b64decode(text, validate=True).decode("ascii"))
                case _:
                    raise ValueError("no client payload with a nonce")
        case kind:
            raise _claims(f"x-ms-attestation-type {kind!r}", " or ".join(sorted((*_MAA, "azurevm"))))
    return data.removesuffix(bytes(32))


def verify_token(
    token: str | bytes, authority: Authority, *, now: datetime, nonce: bytes, events: tuple[Event, ...] = ()
) -> Claims:
    """Return what `authority` says in `token`, bound to `nonce`; `Claims.tee` begins with `authority:<name>/`.

    Args:
        token: a compact JWS; for `nras` the JSON of the bundle.
        nonce: 32 or 64 bytes, see the module; `nras` takes 32.
        events: the runtime log that the nonce (or RTMR 3) covers.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`; `reasons[0].where` begins with the step.
        ValueError: `now` has no time zone, or the nonce has another size (a caller's mistake).
    """
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    if len(nonce) not in NONCE_BYTES or (authority.kind == "nras" and len(nonce) != 32):
        raise ValueError(f"a nonce of {len(nonce)} bytes")
    if events and len(nonce) == 32:
        raise ValueError("32 bytes have no room for a log")
    if authority.kind == "nras":
        return _nras(token.encode() if isinstance(token, str) else token, authority, now=now, nonce=nonce)
    # (1) - (3)
    read = _read(token)
    _check_signature(read, authority)
    # (4) - (5)
    issued, expires = _times(read.body)
    _check_issuer_and_time(read.body, authority, issued, expires, now)
    # (7) before (6), because the place of the nonce is among the claims
    said = {"maa": _maa, "confidential-space": _confidential_space}[authority.kind](read.body, nonce)
    # (6)
    if not said.bound:
        raise _refused(
            "the token was made for another nonce",
            [
                Reason(
                    "authority.6-nonce",
                    said.found[:200],
                    nonce.hex(),
                    "the token was made for another nonce, key, peer, contract, phase or request: attest again",
                )
            ],
        )
    register = said.measurements.get("rtmr3")
    event_log.check_log(events, register, where="authority.6-nonce.events")
    return Claims(
        kind=said.kind,
        tee=f"{PREFIX}{authority.name}/{said.tee}",
        debug=said.debug,
        tcb_status=said.tcb_status,
        report_data=nonce,
        measurements=MappingProxyType(said.measurements),
        launch=said.launch,
        svns=MappingProxyType(said.svns),
        attributes=MappingProxyType(said.attributes),
        events=events,
        log_in="register" if register is not None or len(nonce) == 32 else "report-data",
        platform=MappingProxyType(said.platform),
        chain=(f"token of {authority.issuer}, key {read.key_id}, issued {issued:%Y-%m-%d %H:%M:%S} UTC",),
        valid_until=expires,
    )


# --- JWS --------------------------------------------------------------------------------------------------------------


def _read(token: str | bytes) -> _Token:
    """Step 1."""
    if len(token) > LIMIT:
        raise _malformed("authority.1-form", f"{len(token)} characters", f"at most {LIMIT}")
    try:
        text = token if isinstance(token, str) else token.decode("ascii")
        parts = text.split(".")
        if len(parts) != 3:
            raise ValueError(f"{len(parts)} parts")
        header, body = (json_decode(_unb64(part), limit=LIMIT, canonical=False) for part in parts[:2])
        signature = _unb64(parts[2])
        signed = f"{parts[0]}.{parts[1]}".encode("ascii")
    except ValueError as error:
        raise _malformed("authority.1-form", str(error)[:200], "a compact JWS: three parts of base64url") from error
    if not isinstance(header, dict) or not isinstance(body, dict):
        raise _malformed("authority.1-form", "a header or body that is not an object", "JSON objects")
    # RFC 7515, 4.1.11: what is critical changes the rules, and `b64` changes what is signed
    if {"crit", "b64"} & header.keys() or str(header.get("typ", "JWT")).upper() != "JWT":
        raise _malformed("authority.1-form", "crit, b64 or another typ in the header", "a plain JWT")
    algorithm, key_id = header.get("alg"), header.get("kid")
    if not isinstance(algorithm, str) or not isinstance(key_id, str) or not 0 < len(key_id) <= 256:
        raise _malformed("authority.1-form", "a header without alg or kid", "alg and kid")
    return _Token(algorithm, key_id, signed, signature, MappingProxyType(body))


def _check_signature(token: _Token, authority: Authority) -> None:
    """Steps 2 and 3. The key says which algorithms it is for; the header only picks among those."""
    if token.algorithm not in ALGORITHMS:
        raise _refused(
            "the token's algorithm is not allowed",
            [Reason("authority.2-key", f"alg {token.algorithm[:40]!r}", " or ".join(sorted(ALGORITHMS)))],
        )
    known = _keys(authority.jwks).get(token.key_id)
    if known is None:
        raise _refused(
            "the token was not signed by a pinned key",
            [
                Reason(
                    "authority.2-key",
                    f"kid {token.key_id[:80]!r}",
                    f"a key of authority {authority.name}",
                    "if the service has new keys, decide whether to pin them",
                )
            ],
        )
    key, algorithms = known
    if token.algorithm not in algorithms:
        raise _refused(
            "the token's key is for another algorithm",
            [Reason("authority.2-key", f"alg {token.algorithm}", " or ".join(sorted(algorithms)))],
        )
    if not _holds(key, token):
        raise _refused(
            "the token's signature does not hold",
            [Reason("authority.3-signature", "a signature of another key or over other bytes", token.key_id[:80])],
        )


def _holds(key: _Key, token: _Token) -> bool:
    try:
        if isinstance(key, rsa.RSAPublicKey):
            scheme = (
                padding.PSS(mgf=padding.MGF1(SHA256()), salt_length=SHA256.digest_size)
                if token.algorithm == "PS256"
                else padding.PKCS1v15()
            )
            key.verify(token.signature, token.signed, scheme, SHA256())
        else:
            if len(token.signature) != 96:
                return False
            r, s = (int.from_bytes(half, "big") for half in (token.signature[:48], token.signature[48:]))
            key.verify(encode_dss_signature(r, s), token.signed, ec.ECDSA(SHA384()))
    except (InvalidSignature, ValueError):
        return False
    return True


@lru_cache(maxsize=16)
def _keys(jwks: bytes) -> Mapping[str, tuple[_Key, frozenset[str]]]:
    """Return the usable keys of a JWKS by their id, with the algorithms that each is for.

    Raises:
        ValueError: not a JWKS, a key that does not parse, an id twice, or no usable key.
    """
    value: Any = json_decode(jwks, limit=JWKS_LIMIT, canonical=False)
    match value:
        case {"keys": [*entries]}:
            pass
        case _:
            raise ValueError("a JWKS has a list `keys`")
    found: dict[str, tuple[_Key, frozenset[str]]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str) or entry.get("use", "sig") != "sig":
            continue
        key = _jwk(entry)
        if key is None:
            continue
        algorithms = frozenset({"ES384"} if isinstance(key, ec.EllipticCurvePublicKey) else {"RS256", "PS256"})
        if "alg" in entry:
            algorithms &= {entry["alg"]} if isinstance(entry["alg"], str) else frozenset()
        if entry["kid"] in found:
            raise ValueError(f"key {entry['kid'][:80]!r} is in the JWKS twice")
        if algorithms:
            found[entry["kid"]] = key, algorithms
    if not found:
        raise ValueError(f"the JWKS has no key for {', '.join(sorted(ALGORITHMS))}")
    return MappingProxyType(found)


def _jwk(entry: Mapping[str, Any]) -> _Key | None:
    """Return the key of one JWK, None for a type that signs nothing here."""
    stated: list[_Key] = []
    match entry:
        case {"kty": "RSA", "n": str(n), "e": str(e)}:
            stated.append(rsa.RSAPublicNumbers(_number(e), _number(n)).public_key())
        case {"kty": "EC", "crv": "P-384", "x": str(x), "y": str(y)}:
            stated.append(ec.EllipticCurvePublicNumbers(_number(x), _number(y), ec.SECP384R1()).public_key())
        case {"kty": "RSA" | "EC"}:
            pass
        case _:
            return None
    match entry.get("x5c"):
        case [str(first), *_]:
            try:
                leaf = certificate.from_der(base64.b64decode(first, validate=True), where="authority.2-key")
            except EvidenceError as error:
                raise ValueError("an x5c of the JWKS does not parse") from error
            stated.append(leaf.key)
        case None:
            pass
        case _:
            raise ValueError("an x5c of the JWKS has another shape")
    if not stated:
        return None
    if len(stated) == 2 and stated[0] != stated[1]:
        raise ValueError("a JWK and its x5c are different keys")
    key = stated[0]
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < RSA_BITS:
            raise ValueError(f"an RSA key of {key.key_size} bits, wanted {RSA_BITS}")
        return key
    return key if key.curve.name == "secp384r1" else None


def _check_issuer_and_time(
    body: Mapping[str, Any], authority: Authority, issued: datetime, expires: datetime, now: datetime
) -> None:
    reasons: list[Reason] = []
    # (4)
    if body.get("iss") != authority.issuer:
        reasons.append(Reason("authority.4-issuer", repr(body.get("iss"))[:200], authority.issuer))
    audience = body.get("aud")
    if authority.audience is not None and audience not in (authority.audience, [authority.audience]):
        reasons.append(Reason("authority.4-issuer.audience", repr(audience)[:200], authority.audience))
    # (5)
    start = max(issued, _seconds(body, "nbf")) if "nbf" in body else issued
    text = f"valid from {start:%Y-%m-%d %H:%M:%S} to {expires:%Y-%m-%d %H:%M:%S} UTC"
    wanted = f"valid at {now.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    if now < start - SKEW:
        reasons.append(Reason("authority.5-time.future", text, wanted))
    if now >= expires + SKEW:
        reasons.append(Reason("authority.5-time.expired", text, wanted))
    if not timedelta(0) < expires - issued <= LIFETIME:
        reasons.append(Reason("authority.5-time.lifetime", str(expires - issued), f"at most {LIFETIME}"))
    if reasons:
        raise _refused("the authority did not say this, or not to us, or not now", reasons)


def _times(body: Mapping[str, Any]) -> tuple[datetime, datetime]:
    return _seconds(body, "iat"), _seconds(body, "exp")


def _seconds(body: Mapping[str, Any], name: str) -> datetime:
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _END_OF_TIME:
        raise _malformed("authority.5-time", f"{name} {value!r}"[:120], "whole seconds since 1970")
    return datetime.fromtimestamp(value, UTC)


# --- Microsoft Azure Attestation --------------------------------------------------------------------------------------


def _maa(body: Mapping[str, Any], nonce: bytes) -> _Said:
    kind = _text(body, "x-ms-attestation-type")
    if kind == "azurevm":
        said = _azurevm(body, nonce)
    elif kind in _MAA:
        said = _MAA[kind](body, nonce)
    else:
        raise _claims(f"x-ms-attestation-type {kind!r}", " or ".join(sorted((*_MAA, "azurevm"))))
    if "x-ms-policy-hash" in body:
        try:
            said.measurements["maa_policy_hash"] = _unb64(_text(body, "x-ms-policy-hash"))
        except ValueError as error:
            raise _claims("an x-ms-policy-hash of another form", "base64url") from error
    return said


def _azurevm(body: Mapping[str, Any], nonce: bytes) -> _Said:
    """A confidential VM whose guest asked through its vTPM; `x-ms-isolation-tee` is about the hardware below it."""
    below = body.get("x-ms-isolation-tee")
    kind = below.get("x-ms-attestation-type") if isinstance(below, dict) else None
    if not isinstance(below, dict) or not isinstance(kind, str) or kind not in ("sevsnpvm", "tdxvm"):
        raise _claims("an azurevm without x-ms-isolation-tee", "a confidential VM: sevsnpvm or tdxvm")
    said = _MAA[kind](below, nonce)
    prefix = "x-ms-azurevm-"
    switches = {
        name.removeprefix(prefix).replace("-", "_"): value
        for name, value in body.items()
        if name.startswith(prefix) and isinstance(value, bool)
    }
    if isinstance(body.get("secureboot"), bool):
        switches["secureboot"] = body["secureboot"]
    match body.get("x-ms-runtime"):
        case {"client-payload": {"nonce": str(found)}}:
            bound = _same(found, base64.b64encode(nonce_text(nonce).encode("ascii")).decode("ascii"))
        case _:
            found, bound = "no client payload with a nonce", False
    # RTMRs are those of the paravisor's TD: the guest's own log is not in them
    measurements = {name: value for name, value in said.measurements.items() if not name.startswith("rtmr")}
    return _Said(
        tee=f"azurevm-{kind}",
        debug=said.debug or any(switches.get(name, True) for name in _AZUREVM_DEBUG),
        bound=bound,
        found=found,
        launch="",
        measurements=measurements,
        tcb_status=said.tcb_status,
        svns=said.svns,
        attributes=said.attributes | switches,
        platform=said.platform,
    )


_AZUREVM_DEBUG: Final = ("bootdebug_enabled", "kerneldebug_enabled", "hypervisordebug_enabled")


def _sevsnpvm(body: Mapping[str, Any], nonce: bytes) -> _Said:
    prefix = "x-ms-sevsnpvm-"
    measurements = {"measurement": _hex(body, f"{prefix}launchmeasurement", 48)}
    for name, claim, size in _SNP_MEASUREMENTS:
        if prefix + claim in body:
            measurements[name] = _hex(body, prefix + claim, size)
    report_data = _hex(body, f"{prefix}reportdata", 64)
    attributes = {
        name: _flag(body, prefix + claim)
        for name, claim in (("migrate_ma", "migration-allowed"), ("policy_smt", "smt-allowed"))
        if prefix + claim in body
    }
    platform = _vm(body)
    if f"{prefix}vmpl" in body:
        level = _count(body, f"{prefix}vmpl")
        platform["vmpl"] = str(level)
        attributes["vmpl0"] = level == 0
    return _Said(
        tee="sevsnpvm",
        debug=_flag(body, f"{prefix}is-debuggable"),
        bound=_bound(report_data, nonce),
        found=report_data.hex(),
        launch="measurement",
        measurements=measurements,
        svns={name: _count(body, prefix + claim) for name, claim in _SNP_SVNS.items() if prefix + claim in body},
        attributes=attributes | _compliance(body),
        platform=platform,
    )


# our name (that of `snp`) -> MAA's
_SNP_MEASUREMENTS: Final = (
    ("host_data", "hostdata", 32),
    ("id_key_digest", "idkeydigest", 48),
    ("author_key_digest", "authorkeydigest", 48),
    ("family_id", "familyId", 16),
    ("image_id", "imageId", 16),
    ("report_id", "reportid", 32),
)
_SNP_SVNS: Final = {
    "bootloader": "bootloader-svn",
    "tee": "tee-svn",
    "snp": "snpfw-svn",
    "microcode": "microcode-svn",
    "guest_svn": "guestsvn",
}


def _tdxvm(body: Mapping[str, Any], nonce: bytes) -> _Said:
    measurements = {name: _hex(body, f"tdx_{name}", 48) for name in ("mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3")}
    for name, claim, size in _TDX_MEASUREMENTS:
        if claim in body:
            measurements[name] = _hex(body, claim, size)
    report_data = _hex(body, "tdx_report_data", 64)
    # bit 29 of TDATTRIBUTES (little-endian); MAA has no claim of its own for it
    bits = measurements.get("tdattributes")
    migratable = {} if bits is None else {"migratable": bool(bits[3] & 0x20)}
    # two claims about debugging: the TD's attribute and the EAT one; either is enough
    debug = _flag(body, "tdx_td_attributes_debug") or body.get("dbgstat", "disabled") != "disabled"
    return _Said(
        tee="tdxvm",
        debug=debug,
        bound=_bound(report_data, nonce),
        found=report_data.hex(),
        launch="mrtd",
        measurements=measurements,
        tcb_status=_text(body, "attester_tcb_status"),
        svns={"seamsvn": _count(body, "tdx_seamsvn")} if "tdx_seamsvn" in body else {},
        attributes={name: _flag(body, claim) for name, claim in _TDX_ATTRIBUTES.items() if claim in body}
        | migratable
        | _compliance(body),
        platform=_vm(body),
    )


_TDX_MEASUREMENTS: Final = (
    ("mrseam", "tdx_mrseam", 48),
    ("mrsignerseam", "tdx_mrsignerseam", 48),
    ("mrconfigid", "tdx_mrconfigid", 48),
    ("mrowner", "tdx_mrowner", 48),
    ("mrownerconfig", "tdx_mrownerconfig", 48),
    ("seamattributes", "tdx_seam_attributes", 8),
    ("tdattributes", "tdx_td_attributes", 8),
    ("xfam", "tdx_xfam", 8),
    ("teetcbsvn", "tdx_tee_tcb_svn", 16),
)
_TDX_ATTRIBUTES: Final = {
    "sept_ve_disable": "tdx_td_attributes_septve_disable",
    "perfmon": "tdx_td_attributes_perfmon",
    "pks": "tdx_td_attributes_protection_keys",
    "kl": "tdx_td_attributes_key_locker",
}


def _sgx(body: Mapping[str, Any], nonce: bytes) -> _Said:
    prefix = "x-ms-sgx-"
    try:
        held = _unb64(_text(body, f"{prefix}ehd"))
    except ValueError as error:
        raise _claims("an x-ms-sgx-ehd of another form", "base64url") from error
    return _Said(
        tee="sgx",
        debug=_flag(body, f"{prefix}is-debuggable"),
        bound=hmac.compare_digest(held, nonce),
        found=held.hex(),
        launch="mrenclave",
        measurements={
            "mrenclave": _hex(body, f"{prefix}mrenclave", 32),
            "mrsigner": _hex(body, f"{prefix}mrsigner", 32),
        },
        svns={"isvsvn": _count(body, f"{prefix}svn"), "isvprodid": _count(body, f"{prefix}product-id")},
    )


_MAA: Final[Mapping[str, Callable[[Mapping[str, Any], bytes], _Said]]] = MappingProxyType(
    {"sevsnpvm": _sevsnpvm, "tdxvm": _tdxvm, "sgx": _sgx}
)


def _bound(report_data: bytes, nonce: bytes) -> bool:
    return hmac.compare_digest(report_data, nonce.ljust(64, b"\x00"))


def _compliance(body: Mapping[str, Any]) -> dict[str, bool]:
    return {"azure_compliant_cvm": body.get("x-ms-compliance-status") == "azure-compliant-cvm"}


def _vm(body: Mapping[str, Any]) -> dict[str, str]:
    match body.get("x-ms-runtime"):
        case {"vm-configuration": {"vmUniqueId": str(identity)}} if re.fullmatch(r"[0-9A-Fa-f-]{36}", identity):
            return {"vm_unique_id": identity.lower()}
        case _:
            return {}


# --- Google Confidential Space ----------------------------------------------------------------------------------------

_TEES: Final = frozenset({"GCP_AMD_SEV", "GCP_AMD_SEV_ES", "GCP_AMD_SEV_SNP", "GCP_INTEL_TDX"})
_NO_TEE: Final = "GCP_SHIELDED_VM"
"""A VM whose host reads its memory: at most an attested host."""


def _confidential_space(body: Mapping[str, Any], nonce: bytes) -> _Said:
    if body.get("swname") != "CONFIDENTIAL_SPACE":
        raise _claims(f"swname {body.get('swname')!r}", "CONFIDENTIAL_SPACE: only there the workload is attested")
    model = _text(body, "hwmodel")
    if model not in _TEES | {_NO_TEE}:
        raise _claims(f"hwmodel {model!r}", " or ".join(sorted(_TEES | {_NO_TEE})))
    match body.get("submods"):
        case {"container": dict(container), **rest}:
            pass
        case _:
            raise _claims("no submods.container", "the attested container")
    measurements = {"image_digest": _digest(container, "image_digest"), "arguments": _arguments(container)}
    if "image_id" in container:
        measurements["image_id"] = _digest(container, "image_id")
    attributes = {
        "secboot": body.get("secboot") is True,
        "overridden": bool(container.get("cmd_override") or container.get("env_override")),
    }
    match rest.get("confidential_space"):
        case {"support_attributes": [*support]}:
            attributes |= {name.lower(): name in support for name in ("LATEST", "STABLE", "USABLE", "EXPERIMENTAL")}
        case _:
            pass  # debug images have none
    match rest.get("gce"):
        case dict(gce):
            platform = {
                name: value
                for name in ("instance_id", "instance_name", "project_id", "project_number", "zone")
                if isinstance(value := gce.get(name), str) and 0 < len(value) <= 128 and value.isprintable()
            }
        case _:
            platform = {}
    nonces = body.get("eat_nonce")
    if isinstance(nonces, list) and len(nonces) == 1:
        nonces = nonces[0]
    # a second nonce would make one token the answer to two questions
    bound = isinstance(nonces, str) and _same(nonces, nonce_text(nonce))
    return _Said(
        tee=model.lower(),
        kind="tee" if model in _TEES else "attested-host",
        debug=body.get("dbgstat") != "disabled-since-boot",
        bound=bound,
        found=repr(nonces),
        launch="image_digest",
        measurements=measurements,
        svns=_version(body.get("swversion")),
        attributes=attributes,
        platform=platform,
    )


def _digest(container: Mapping[str, Any], name: str) -> bytes:
    value = container.get(name)
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise _claims(f"container.{name} {value!r}", "sha256: and 64 hex digits")
    return bytes.fromhex(value.removeprefix("sha256:"))


def _arguments(container: Mapping[str, Any]) -> bytes:
    """Return SHA-256 of the canonical JSON of what the operator set: the same image does other things with other arguments."""
    stated: dict[str, object] = {}
    for name, kind in (("args", list), ("cmd_override", list), ("env_override", dict)):
        value = container.get(name)
        entries = [] if value is None else [*value, *value.values()] if isinstance(value, dict) else value
        if value is not None and not isinstance(value, kind):
            raise _claims(f"container.{name} of another type", kind.__name__)
        if not all(isinstance(entry, str) for entry in entries):
            raise _claims(f"container.{name} with other entries", "text")
        stated[name] = value or None
    try:
        return hashlib.sha256(json_encode(stated)).digest()
    except ValueError as error:  # half of a surrogate pair is JSON and no text
        raise _claims("container arguments that are no text", "text") from error


def _version(value: object) -> dict[str, int]:
    match value:
        case [str(text)] | str(text) if text.isascii() and text.isdecimal() and len(text) <= 12:
            return {"swversion": int(text)}
        case _:
            return {}


# --- NVIDIA Remote Attestation Service --------------------------------------------------------------------------------


def _nras(data: bytes, authority: Authority, *, now: datetime, nonce: bytes) -> Claims:
    """GPUs: one device in `Claims.devices` each, and together, as the service's overall word."""
    result = eat.verify_bundle(eat.read_bundle(data), authority.jwks, now=now, nonce=nonce, issuer=authority.issuer)
    if not result.overall:
        raise _refused(
            "the service did not find the devices good",
            [Reason("authority.7-claims", "x-nvidia-overall-att-result false", "true")],
        )
    devices = tuple(
        _gpu(name, body, authority, nonce, result.valid_until) for name, body in sorted(result.devices.items())
    )
    good = all(device.gpu == "confidential" for device in devices)
    return Claims(
        kind="device",
        tee=devices[0].tee,
        debug=any(device.debug for device in devices),
        tcb_status=NOT_RATED,
        report_data=nonce,
        gpu="confidential" if good else "none",
        devices=devices,
        platform=devices[0].platform if len(devices) == 1 else MappingProxyType({}),
        attributes=MappingProxyType({"secboot": all(device.attributes["secboot"] for device in devices)}),
        chain=(f"tokens of {authority.issuer} about {len(devices)} devices",),
        valid_until=result.valid_until,
    )


def _gpu(name: str, body: Mapping[str, Any], authority: Authority, nonce: bytes, end: datetime) -> Claims:
    kind = "nvidia-switch" if any(claim.startswith("x-nvidia-switch-") for claim in body) else "nvidia-gpu"
    prefix = "x-nvidia-switch" if kind == "nvidia-switch" else "x-nvidia-gpu"
    # the service compares the report's nonce with `eat_nonce`; without its yes, the nonce is the token's only
    if body.get(f"{prefix}-attestation-report-nonce-match") is not True:
        raise _refused(
            "the device's report was made for another nonce",
            [Reason("authority.6-nonce", f"{name}: no nonce match", f"{prefix}-attestation-report-nonce-match true")],
        )
    debug = body.get("dbgstat") != "disabled"
    good = body.get("measres") == "success" and body.get("secboot") is True and not debug
    ueid = body.get("ueid")
    # the service writes the number in decimal; ours is in hex (`nvidia/examine.py`), and a contract lists hex
    platform = {"ueid": f"{int(ueid):x}"} if isinstance(ueid, str) and _DECIMAL.fullmatch(ueid) else {}
    for ours, theirs in (
        ("hwmodel", "hwmodel"),
        ("driver", f"{prefix}-driver-version"),
        ("vbios", f"{prefix}-vbios-version"),
    ):
        if isinstance(body.get(theirs), str):
            platform[ours] = body[theirs][:128]
    return Claims(
        kind="device",
        tee=f"{PREFIX}{authority.name}/{kind}",
        debug=debug,
        tcb_status=NOT_RATED,
        report_data=nonce,
        attributes=MappingProxyType({"secboot": body.get("secboot") is True}),
        platform=MappingProxyType(platform),
        gpu="confidential" if good and kind == "nvidia-gpu" else "none",
        chain=(f"token of {authority.issuer} about {name[:80]}",),
        valid_until=end,
    )


# --- members of a body ------------------------------------------------------------------------------------------------


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 4096 or not (value.isascii() and value.isprintable()):
        raise _claims(f"{name} {value!r}", "text")
    return value


def _hex(body: Mapping[str, Any], name: str, size: int) -> bytes:
    value = body.get(name)
    if not isinstance(value, str) or len(value) != 2 * size or not _HEX.fullmatch(value):
        raise _claims(f"{name} {value!r}", f"{size} bytes in hex")
    return bytes.fromhex(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, bool):
        raise _claims(f"{name} {value!r}", "true or false")
    return value


def _count(body: Mapping[str, Any], name: str) -> int:
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise _claims(f"{name} {value!r}", "a number")
    return value


def _same(a: str, b: str) -> bool:
    return hmac.compare_digest(a.encode("utf-8", "surrogatepass"), b.encode("ascii"))


def _number(text: str) -> int:
    return int.from_bytes(_unb64(text), "big")


def _unb64(text: str) -> bytes:
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii") != text:
        raise ValueError("base64url of another form")
    return data


def _claims(found: str, wanted: str) -> EvidenceError:
    return _malformed("authority.7-claims", found[:200], wanted)


def _malformed(where: str, found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "the authority's token does not parse", code="evidence-malformed", reasons=[Reason(where, found, wanted)]
    )


def _refused(message: str, reasons: list[Reason]) -> EvidenceError:
    return EvidenceError(message, code="evidence-not-authentic", reasons=reasons)
