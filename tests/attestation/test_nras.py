"""NVIDIA's attestation service as an authority: what it said, that it said it, to whom and when."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attestation.files import Case
from cloister.attestation.files import nvidia as files
from cloister.attestation.nvidia import eat
from cloister.attestation.soft import nvidia as soft
from cloister.errors import EvidenceError
from tests.attestation.helpers import SHARED, refusal, value_or_malformed

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
NONCE = bytes(range(32))
KEY = soft.derive_key("a service that nobody runs")


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jwks(key: Any = KEY, **change: Any) -> bytes:
    point = soft._point(key)[1:]
    entry = {"kty": "EC", "crv": "P-384", "kid": "k1", "x": b64(point[:48]), "y": b64(point[48:]), "alg": "ES384"}
    return json.dumps({"keys": [{"kty": "RSA", "kid": "other", "n": "AQ", "e": "AQAB"}, entry | change]}).encode()


def token(body: dict[str, Any], *, key: Any = KEY, **header: Any) -> str:
    head = {"kid": "k1", "alg": "ES384"} | header
    signed = f"{b64(json.dumps(head).encode())}.{b64(json.dumps(body).encode())}"
    return f"{signed}.{b64(soft._sign(key, signed.encode()))}"


def body(**change: Any) -> dict[str, Any]:
    start = int(NOW.timestamp()) - 60
    return {"iss": eat.ISSUER, "iat": start, "nbf": start, "exp": start + 3600, "eat_nonce": NONCE.hex()} | change


def bundle(
    platform: dict[str, Any] | None = None, devices: dict[str, dict[str, Any]] | None = None, **rest: Any
) -> bytes:
    inner = {
        name: token(each, **rest)
        for name, each in ({"GPU-0": body(measres="success")} if devices is None else devices).items()
    }
    named = {name: ["DIGEST", ["SHA-256", hashlib.sha256(text.encode()).hexdigest()]] for name, text in inner.items()}
    whole = body(submods=named, **{"x-nvidia-overall-att-result": True}) | (platform or {})
    return json.dumps([["JWT", token(whole, **rest)], inner]).encode()


def verify(data: bytes, *, keys: bytes | None = None, now: datetime = NOW, nonce: bytes = NONCE) -> eat.Result:
    return eat.verify_bundle(eat.read_bundle(data), jwks() if keys is None else keys, now=now, nonce=nonce)


def refused(step: str, data: bytes, **rest: Any) -> EvidenceError:
    error = refusal(verify, data, **rest)
    assert error.code == "evidence-not-authentic"
    assert {".".join(reason.where.split(".")[:2]) for reason in error.reasons} == {f"nras.{step}"}
    return error


def test_what_the_service_said() -> None:
    result = verify(bundle())
    assert (result.overall, result.nonce) == (True, NONCE)
    assert result.devices["GPU-0"]["measres"] == "success"
    assert result.valid_until == datetime(2026, 11, 20, 12, 59, tzinfo=UTC)


def test_a_verdict_of_no_is_passed_on() -> None:
    assert verify(bundle({"x-nvidia-overall-att-result": False})).overall is False


def test_a_token_of_another_bundle_is_refused() -> None:
    """Mix and match: the good token of another GPU in this platform's bundle."""
    ours, theirs = json.loads(bundle()), json.loads(bundle(devices={"GPU-0": body(ueid="other")}))
    mixed = json.dumps([ours[0], theirs[1]]).encode()
    error = refusal(eat.read_bundle, mixed)
    assert (error.code, error.reasons[0].where) == ("evidence-not-authentic", "nras.2-digest.GPU-0")


def test_every_token_is_judged() -> None:
    """The platform's token is good; a device's is signed, named, and old, of another issuer, for another nonce."""
    for change, step in (
        ({"exp": 1}, "6-time"),
        ({"nbf": int(NOW.timestamp()) + 60}, "6-time"),
        ({"exp": int(NOW.timestamp()) + 86_400 * 30}, "6-time"),
        ({"iss": "https://example.org"}, "4-issuer"),
        ({"iss": None}, "4-issuer"),
        ({"eat_nonce": "00" * 32}, "5-nonce"),
        ({"eat_nonce": [NONCE.hex()]}, "5-nonce"),
    ):
        assert len(refused(step, bundle(devices={"GPU-0": body(**change)})).reasons) == 1
        assert len(refused(step, bundle(change)).reasons) == 1


def test_keys_of_nobody_are_refused() -> None:
    mallory = soft.derive_key("mallory")
    refused("3-signature", bundle(key=mallory))
    refused("3-signature", bundle(), keys=jwks(mallory))
    refused("3-signature", bundle(), keys=jwks(kid="k2"))
    refused("3-signature", bundle(), keys=b'{"keys": []}')


def test_the_algorithm_is_not_a_choice_of_the_token() -> None:
    for algorithm in ("none", "HS384", "ES256", ""):
        refused("3-signature", bundle(alg=algorithm))


def test_the_window_has_exact_ends() -> None:
    start = NOW - timedelta(minutes=1)
    assert verify(bundle(), now=start).overall
    assert verify(bundle(), now=start + timedelta(seconds=3599)).overall
    refused("6-time", bundle(), now=start - timedelta(seconds=1))
    refused("6-time", bundle(), now=start + timedelta(seconds=3600))
    with pytest.raises(ValueError, match="time zone"):
        verify(bundle(), now=datetime(2026, 11, 20))  # noqa: DTZ001


def test_a_changed_character_is_refused() -> None:
    text = json.loads(bundle())
    platform, device = text[0][1], text[1]["GPU-0"]
    for source, put in ((platform, 0), (device, 1)):
        for position in range(0, len(source), 13):
            other = "A" if source[position] != "A" else "B"
            changed = copy.deepcopy(text)
            forged = source[:position] + other + source[position + 1 :]
            if put == 0:
                changed[0][1] = forged
            else:
                changed[1]["GPU-0"] = forged
            error = refusal(verify, json.dumps(changed).encode())
            assert error.code in {"evidence-malformed", "evidence-not-authentic"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'[["JWT", 7], {}]',
        b'[["CWT", "a.b.c"], {}]',
        b'[["JWT", "a.b.c"], {}]',
        b'[["JWT", "a.b"], {"GPU-0": "x"}]',
        bundle(devices={}),
        bundle({"submods": None}),
        bundle({"submods": {"GPU-0": ["DIGEST", ["MD5", "00"]]}}),
        bundle({"submods": {"GPU-1": ["DIGEST", ["SHA-256", "00"]]}}),
        bundle({"submods": {"GPU-0": "eyJ"}}),
        bundle(crit=["x"]),
        bundle(kid=7),
        json.dumps([["JWT", token(body())], {"GPU-0": 7}]).encode(),
        json.dumps([["JWT", token(body())], {str(index): token(body()) for index in range(65)}]).encode(),
        b" " * (eat.LIMIT + 1),
    ],
)
def test_a_bundle_with_one_fault_is_malformed(data: bytes) -> None:
    assert refusal(eat.read_bundle, data).code == "evidence-malformed"


@pytest.mark.parametrize(
    "change",
    [
        {"nbf": "1"},
        {"exp": None},
        {"exp": 1e300},
        {"exp": 10**30},
        {"exp": True},
        {"x-nvidia-overall-att-result": "true"},
    ],
)
def test_claims_of_another_type_are_malformed(change: dict[str, Any]) -> None:
    assert refusal(verify, bundle(change)).code == "evidence-malformed"


@pytest.mark.parametrize(
    "keys",
    [
        b"",
        b"[]",
        b'{"keys": 7}',
        jwks(x="AA"),
        jwks(x="!"),
        jwks(y=b64(b"\xff" * 48)),
        json.dumps({"keys": json.loads(jwks())["keys"] * 2}).encode(),
        b" " * (eat.JWKS_LIMIT + 1),
    ],
)
def test_keys_of_another_form_are_malformed(keys: bytes) -> None:
    assert refusal(verify, bundle(), keys=keys).code == "evidence-malformed"


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_bundle(data: bytes) -> None:
    assert value_or_malformed(lambda: eat.read_bundle(data)) is None


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda x: st.lists(x) | st.dictionaries(st.text(max_size=8), x),
        max_leaves=10,
    )
)
def test_arbitrary_json_is_no_bundle(value: Any) -> None:
    assert value_or_malformed(lambda: eat.read_bundle(json.dumps(value).encode())) is None
    assert (
        value_or_malformed(
            lambda: eat.read_bundle(
                json.dumps([["JWT", token(body(submods=value))], {"GPU-0": token(body())}]).encode()
            )
        )
        is None
    )


def test_files_tell_what_is_known_without_keys_and_with_them() -> None:
    case = Case("nvidia", {"eat": bundle()}, NOW, nonce=NONCE)
    found = files.observe(case)
    assert found.facts == {"parse": True}
    assert {step.name for step in found.steps if step.state == "passed"} == {"nras.1-form", "nras.2-digest"}
    assert {step.state for step in found.steps} == {"passed", "not done"}
    found = files.observe(Case("nvidia", {"eat": bundle(), "jwks": jwks()}, NOW, nonce=NONCE))
    assert found.facts == {"parse": True, "authentic": True}
    assert {step.state for step in found.steps} == {"passed"}
    found = files.observe(Case("nvidia", {"eat": bundle(), "jwks": jwks()}, NOW, nonce=bytes(32)))
    assert found.facts == {"parse": True, "authentic": False}
    found = files.observe(Case("nvidia", {"eat": bundle({"submods": None})}, NOW))
    # the service's no is a refusal, and a nonce that nobody gave was not compared
    no = bundle({"x-nvidia-overall-att-result": False})
    found = files.observe(Case("nvidia", {"eat": no, "jwks": jwks()}, NOW, nonce=NONCE))
    assert found.error is not None
    assert [step.name for step in found.steps if step.state == "failed"] == ["nras.7-result"]
    found = files.observe(Case("nvidia", {"eat": bundle(), "jwks": jwks()}, NOW))
    assert {step.name for step in found.steps if step.state == "not done"} == {"nras.5-nonce"}
    found = files.observe(Case("nvidia", {"eat": bundle({"submods": None})}, NOW))
    assert found.facts == {"parse": False, "authentic": False}


FOLDER = SHARED / "vectors" / "attestation" / "nvidia"


@pytest.mark.skipif(not FOLDER.exists(), reason="third-party vectors are not beside the repository")
def test_a_real_bundle() -> None:
    """The service's keys of that day are gone, so only the digests and the unsigned facts can be looked at."""
    found = eat.read_bundle((FOLDER / "nras-hopper-eat-v3.json").read_bytes())
    decoded = json.loads((FOLDER / "nras-hopper-eat-v3-decoded.json").read_text())
    assert {name: dict(each.body) for name, each in found.devices.items()} == decoded
    assert (found.platform.algorithm, found.platform.body["iss"]) == ("ES384", eat.ISSUER)
    assert len(found.platform.signature) == 96
    at = datetime(2025, 6, 11, 0, 45, tzinfo=UTC)
    nonce = bytes.fromhex(found.platform.body["eat_nonce"])
    error = refusal(eat.verify_bundle, found, jwks(), now=at, nonce=nonce)
    assert {reason.where for reason in error.reasons} == {"nras.3-signature.platform", "nras.3-signature.GPU-0"}
