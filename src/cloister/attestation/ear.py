"""Attestation results as EAR: a signed JWT that says what was found and whether the policy wanted it.

Format: draft-ietf-rats-ear (EAT profile `tag:github.com,2023:veraison/ear`, RFC 9711) with the trustworthiness vector of
draft-ietf-rats-ar4si, signed as JWS with Ed25519 (RFC 9864) or ES256:

    eat_profile, iat, exp (at most 5 minutes later), eat_nonce, ear.verifier-id
    cnf       {"cloister.key-sha256": SHA-256 of the attested HPKE key, base64url}
    submods   cpu0, and one for each device (gpu0, gpu1, tpm0, ...): ear.status, ear.trustworthiness-vector,
              ear.appraisal-policy-id, cloister.tee, cloister.reasons
    cloister.insecure-simulated   true, present only if any of it is soft, which is never `affirming`

A result is a statement about one appraisal. It is no bearer token: the key in `cnf` is what can use it, and only until `exp`.

Steps of `read`; an error names the step that refused:
  1 size       at most 128 KiB
  2 signature  by the key given, with the algorithm of that key's type; `alg` in the header is not a choice
  3 form       profile, types and ranges of every member that we read
  4 time       iat <= now < exp, both with `SKEW`, exp - iat <= 5 minutes
  5 nonce      the one that the reader expects
The status of the whole is the worst of its parts: a GPU that is not wanted makes the machine unwanted. Reasons beyond 64 are
left out and long ones cut; vectors and status speak about all.
Reading does not decide: whether `affirming` is enough for a soft TEE is the caller's rule.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, OKPKey

from cloister.attestation.appraise import SIMULATED, device_names
from cloister.attestation.binding import Binding
from cloister.attestation.evidence import LIMITS
from cloister.attestation.types import Claims, Policy, base
from cloister.crypto.canonical import cbor_encode
from cloister.errors import EvidenceError, Reason

PROFILE: Final = "tag:github.com,2023:veraison/ear"
LIFETIME: Final = timedelta(minutes=5)
SKEW: Final = timedelta(seconds=30)
"""How far the clocks of issuer and reader may differ."""
LIMIT: Final = 128 * 1024
MAX_REASONS: Final = 64
"""Reasons in one result, the CPU's first; each has four texts of at most 300 characters."""
_TEXT: Final = 300
MAX_DEVICES: Final = LIMITS.devices
CPU: Final = "cpu0"
DEVELOPER: Final = "cloister"

Status = Literal["none", "affirming", "warning", "contraindicated"]

# draft-ietf-rats-ar4si, section 2.3: values of a trustworthiness claim
NO_CLAIM: Final = 0
AFFIRMING: Final = 2
WARNING: Final = 32
CONTRAINDICATED: Final = 96
UNRECOGNISED_HARDWARE: Final = 97
VECTOR: Final = ("instance-identity", "configuration", "executables", "hardware", "runtime-opaque")

SigningKey = Ed25519PrivateKey | EllipticCurvePrivateKey
PublicKey = Ed25519PublicKey | EllipticCurvePublicKey

# rule of `appraise` -> the trustworthiness claim that it speaks about; a reference value speaks about executables
_RULES: Final[dict[str, str]] = {
    "debug": "configuration",
    "kind": "hardware",
    "accept": "hardware",
    "tcb_status": "hardware",
    "min_tcb": "hardware",
    "max_tcb_age": "hardware",
    "min_svn": "hardware",
    "deny_advisories": "hardware",
    "require": "configuration",
    "platforms": "instance-identity",
    "gpu": "configuration",
    "gpus": "instance-identity",
    "boot": "executables",
    "boot_log": "executables",
    "software": "executables",
    "scheme": "configuration",
    "report_data": "instance-identity",
    "devices": "instance-identity",
}
_SUBMODULE: Final = re.compile(r"[a-z]+[0-9]{1,2}")


@dataclass(frozen=True, slots=True)
class Part:
    """What a reader learns about one part of the machine."""

    status: Status
    tee: str
    vector: dict[str, int]
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """What a reader learns from an attestation result."""

    status: Status
    """The worst of CPU and devices."""
    tee: str
    soft: bool
    """True: software evidence, nothing is protected."""
    vector: dict[str, int]
    """Of the CPU; those of the devices are in `devices`."""
    policy_id: str
    nonce: bytes
    key_sha256: bytes
    """SHA-256 of the attested HPKE key."""
    issued: datetime
    expires: datetime
    reasons: tuple[Reason, ...]
    """Of the CPU and of the machine as a whole."""
    devices: Mapping[str, Part] = field(default_factory=lambda: MappingProxyType({}))
    """`gpu0`, `tpm0`, ... in order."""


def policy_id(policy: Policy) -> str:
    """Return the name of `policy`: `sha256:` and 64 hex digits over the canonical CBOR of all its fields."""
    return "sha256:" + hashlib.sha256(b"cloister/policy/2\x00" + cbor_encode(_plain(policy))).hexdigest()


def _plain(value: Any) -> Any:
    """Return `value` as CBOR can carry it; sets in one order, so that equal policies have one encoding."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, frozenset):
        return sorted((_plain(each) for each in value), key=cbor_encode)
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    if isinstance(value, timedelta):
        return value // timedelta(microseconds=1)
    return value


def issue(
    claims: Claims,
    policy: Policy,
    reasons: Sequence[Reason],
    *,
    binding: Binding,
    key: SigningKey,
    now: datetime,
    lifetime: timedelta = LIFETIME,
    build: str = "cloister/1",
) -> str:
    """Return the signed result of appraising `claims` under `policy`, where `reasons` are all violations found.

    Raises:
        ValueError: no time zone, a lifetime above 5 minutes, or an EC key on another curve than P-256.
    """
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    if not timedelta(0) < lifetime <= LIFETIME:
        raise ValueError(f"a result lives for at most {LIFETIME}, not {lifetime}")
    algorithm, jwk = _jose(key)
    issued = int(now.timestamp())
    name = policy_id(policy)
    room = MAX_REASONS
    submodules: dict[str, Any] = {}
    for part, subject, about in _parts(claims, policy, reasons):
        vector = _vector(part, subject, policy, about)
        submodules[part] = {
            "ear.status": _status(vector),
            "ear.trustworthiness-vector": vector,
            "ear.appraisal-policy-id": name,
            "cloister.tee": subject.tee,
            "cloister.reasons": [_short(reason) for reason in about[:room]],
        }
        room -= min(room, len(about))
    body: dict[str, Any] = {
        "eat_profile": PROFILE,
        "iat": issued,
        "exp": issued + int(lifetime.total_seconds()),
        "eat_nonce": _b64(binding.nonce),
        "ear.verifier-id": {"developer": DEVELOPER, "build": build},
        "cnf": {"cloister.key-sha256": _b64(hashlib.sha256(binding.key).digest())},
        "submods": submodules,
    }
    if claims.soft:
        body["cloister.insecure-simulated"] = True
    return jwt.encode({"alg": algorithm, "typ": "JWT"}, body, jwk, algorithms=[algorithm])


def read(token: str, *, key: PublicKey, nonce: bytes, now: datetime) -> Result:
    """Return the result in `token`, signed by `key` for `nonce`, valid at `now`.

    Raises:
        EvidenceError: `evidence-malformed`, `evidence-not-authentic` (signature) or `evidence-stale` (time, nonce).
        ValueError: no time zone, or an EC key on another curve than P-256.
    """
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    algorithm, jwk = _jose(key)
    # (1)
    if len(token) > LIMIT:
        raise _refused("ear.1-size", f"{len(token)} characters", f"at most {LIMIT}", code="evidence-malformed")
    # (2) joserfc checks the signature only: it never reads a clock unless asked to validate claims
    try:
        body = jwt.decode(token, jwk, algorithms=[algorithm]).claims
    except (JoseError, ValueError) as error:
        raise _refused(
            "ear.2-signature", type(error).__name__, f"a JWT signed by the key given, {algorithm}"
        ) from error
    # (3)
    result = _result(body)
    # (4)
    if result.expires - result.issued > LIFETIME:
        raise _refused("ear.4-time", str(result.expires - result.issued), f"at most {LIFETIME}", code="evidence-stale")
    if not result.issued - SKEW <= now < result.expires + SKEW:
        found = f"valid {result.issued:%Y-%m-%dT%H:%M:%SZ} to {result.expires:%Y-%m-%dT%H:%M:%SZ}"
        raise _refused("ear.4-time", found, f"{now.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}", code="evidence-stale")
    # (5)
    if result.nonce != nonce:
        raise _refused("ear.5-nonce", result.nonce.hex(), nonce.hex(), code="evidence-stale")
    return result


def _parts(
    claims: Claims, policy: Policy, reasons: Sequence[Reason]
) -> Iterator[tuple[str, Claims, tuple[Reason, ...]]]:
    """Yield (name, claims, reasons) of the CPU, then of each device; each reason belongs to one of them."""
    names = device_names(claims)
    about: dict[str, list[Reason]] = {name: [] for name in (CPU, *names)}
    prefixes = {f"{policy.where}.{name}.": name for name in names}
    prefixes |= {f"binding.devices.{index}.": name for index, name in enumerate(names)}
    for reason in reasons:
        owner = next((name for prefix, name in prefixes.items() if f"{reason.where}.".startswith(prefix)), CPU)
        about[owner].append(reason)
    yield CPU, claims, tuple(about[CPU])
    for name, device in zip(names, claims.devices, strict=True):
        yield name, device, tuple(about[name])


def _short(reason: Reason) -> dict[str, Any]:
    texts = (reason.where, reason.found, reason.wanted, reason.hint)
    return Reason(*(text if len(text) <= _TEXT else text[: _TEXT - 1] + "…" for text in texts)).as_json()


def _vector(part: str, claims: Claims, policy: Policy, reasons: Sequence[Reason]) -> dict[str, int]:
    vector = dict.fromkeys(VECTOR, AFFIRMING)
    if claims.kind == "attested-host":
        vector["runtime-opaque"] = WARNING  # its operating system reads all memory, and so does who holds the machine
    elif base(claims.tee) == "tpm":
        vector["runtime-opaque"] = NO_CLAIM  # it runs nothing
    for reason in reasons:
        rule = reason.where.removeprefix(f"{policy.where}.").removeprefix(f"{part}.").removeprefix("binding.")
        vector[_RULES.get(rule.split(".", 1)[0], "executables")] = CONTRAINDICATED
    if claims.tee.startswith("soft-"):
        # no policy makes software hardware: where it is wanted (`simulated`) the result is a warning, never affirming
        wanted = SIMULATED in policy.accept
        vector["hardware"] = max(vector["hardware"], WARNING if wanted else UNRECOGNISED_HARDWARE)
        vector["runtime-opaque"] = WARNING if wanted else CONTRAINDICATED
    return vector


_WORSE: Final[tuple[Status, ...]] = ("affirming", "none", "warning", "contraindicated")


def _status(vector: dict[str, int]) -> Status:
    worst = max(vector.values())
    if worst >= CONTRAINDICATED:
        return "contraindicated"
    return "warning" if worst >= WARNING else "affirming"


def _result(body: dict[str, Any]) -> Result:
    match body:
        case {
            "eat_profile": str(profile),
            "iat": int(issued),
            "exp": int(expires),
            "eat_nonce": str(nonce),
            "cnf": {"cloister.key-sha256": str(key_sha256)},
            "submods": {"cpu0": _, **others} as submodules,
        } if profile == PROFILE and len(others) <= MAX_DEVICES and all(map(_is_device, others)):
            pass
        case _:
            raise _malformed("another shape")
    parts = {name: _part(value) for name, value in submodules.items()}
    cpu, policy = parts.pop(CPU)
    if any(other != policy for _, other in parts.values()):
        raise _malformed("parts that were appraised under different policies")
    devices = {name: part for name, (part, _) in parts.items()}
    soft = body.get("cloister.insecure-simulated", False)
    if soft is not any(part.tee.startswith("soft-") for part in (cpu, *devices.values())):
        raise _malformed(f"TEE {cpu.tee!r} with insecure-simulated {soft!r}")
    try:
        return Result(
            status=max((cpu.status, *(part.status for part in devices.values())), key=_WORSE.index),
            tee=cpu.tee,
            soft=soft,
            vector=cpu.vector,
            policy_id=policy,
            nonce=_unb64(nonce),
            key_sha256=_unb64(key_sha256),
            issued=datetime.fromtimestamp(issued, UTC),
            expires=datetime.fromtimestamp(expires, UTC),
            reasons=cpu.reasons,
            devices=MappingProxyType(devices),
        )
    except (ValueError, OverflowError, OSError) as error:
        raise _malformed(str(error)) from error


def _is_device(name: object) -> bool:
    return isinstance(name, str) and _SUBMODULE.fullmatch(name) is not None


def _part(value: object) -> tuple[Part, str]:
    """Return what one submodule says, and the policy that it names."""
    match value:
        case {
            "ear.status": ("none" | "affirming" | "warning" | "contraindicated") as status,
            "ear.trustworthiness-vector": dict(vector),
            "ear.appraisal-policy-id": str(policy),
            "cloister.tee": str(tee),
            "cloister.reasons": list(reasons),
        } if all(type(each) is int for each in vector.values()):
            return Part(status, tee, vector, tuple(_reason(each) for each in reasons)), policy
        case _:
            raise _malformed("a submodule of another shape")


def _reason(value: object) -> Reason:
    match value:
        case {"where": str(where), "found": str(found), "wanted": str(wanted), "hint": str(hint)}:
            return Reason(where, found, wanted, hint)
        case _:
            raise _malformed("a reason of another shape")


def _jose(key: SigningKey | PublicKey) -> tuple[str, ECKey | OKPKey]:
    if isinstance(key, Ed25519PrivateKey | Ed25519PublicKey):
        return "Ed25519", OKPKey.import_key(key)
    if key.curve.name != "secp256r1":
        raise ValueError(f"an EC key on {key.curve.name}, wanted P-256")
    return "ES256", ECKey.import_key(key)


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unb64(text: str) -> bytes:
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if _b64(data) != text:
        raise ValueError("base64url of another form")
    return data


def _malformed(found: str) -> EvidenceError:
    return _refused("ear.3-form", found, f"an EAR of profile {PROFILE}", code="evidence-malformed")


def _refused(where: str, found: str, wanted: str, *, code: str = "evidence-not-authentic") -> EvidenceError:
    return EvidenceError("the attestation result is refused", code=code, reasons=[Reason(where, found, wanted)])
