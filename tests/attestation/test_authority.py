"""Tokens of attestation services: own keys, one fault each. joserfc makes the tokens: it is the second implementation."""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey

from cloister.attestation import events as event_log
from cloister.attestation.appraise import appraise
from cloister.attestation.authority import ALGORITHMS, LIMIT, STEPS, Authority, Kind, nonce_text, verify_token
from cloister.attestation.binding import Binding, check_binding
from cloister.attestation.soft.nitro import derive_key
from cloister.attestation.types import NOT_RATED, Claims, Policy
from cloister.errors import EvidenceError
from tests.attestation.helpers import SHARED, refusal

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
T = int(NOW.timestamp())
BINDING = Binding(purpose="release", nonce=b"\x05" * 32, key=b"key")
DATA = BINDING.report_data()
SHORT = BINDING.qualifying_data()
FOLDED = event_log.fold(DATA, ())
"""What is signed by hardware without a register, with an empty log."""
WORKLOAD = event_log.event(event_log.WORKLOAD, b"\xa0")


@functools.cache
def rsa_key(index: int = 0, bits: int = 2048) -> rsa.RSAPrivateKey:
    del index  # several keys, made once per run
    return rsa.generate_private_key(65537, bits)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def rsa_jwk(key: rsa.RSAPrivateKey, kid: str, **rest: Any) -> dict[str, Any]:
    numbers = key.public_key().public_numbers()
    return {"kty": "RSA", "kid": kid, "n": number(numbers.n), "e": number(numbers.e), **rest}


def ec_jwk(key: ec.EllipticCurvePrivateKey, kid: str, **rest: Any) -> dict[str, Any]:
    point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    half = (len(point) - 1) // 2
    curve = {"secp256r1": "P-256", "secp384r1": "P-384"}[key.curve.name]
    return {"kty": "EC", "kid": kid, "crv": curve, "x": b64(point[1 : 1 + half]), "y": b64(point[1 + half :]), **rest}


@functools.cache
def certificate_of(index: int) -> str:
    """Return the self-signed certificate of a key, base64 of DER, as MAA publishes its keys; expired since 2021."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "https://test.attest.invalid")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(rsa_key(index).public_key())
        .serial_number(1)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2021, 1, 1, tzinfo=UTC))
    )
    der = builder.sign(rsa_key(index), hashes.SHA256()).public_bytes(Encoding.DER)
    return base64.b64encode(der).decode()


EC_KEY = derive_key("authority")


@functools.cache
def jwks() -> bytes:
    keys = [
        rsa_jwk(rsa_key(), "rsa"),
        ec_jwk(EC_KEY, "ec"),
        {"kty": "RSA", "kid": "x5c", "x5c": [certificate_of(1)]},
        rsa_jwk(rsa_key(), "rs256-only", alg="RS256", use="sig"),
        rsa_jwk(rsa_key(), "encryption", use="enc"),
        ec_jwk(derive_key("p256", ec.SECP256R1()), "p256"),
        {"kty": "oct", "kid": "oct", "k": b64(bytes(32))},
    ]
    return json.dumps({"keys": keys}).encode()


ISSUERS: Mapping[Kind, str] = {
    "maa": "https://test.attest.invalid",
    "confidential-space": "https://confidentialcomputing.googleapis.com",
    "nras": "https://nras.attestation.nvidia.com",
}


def authority(kind: Kind = "maa", **rest: Any) -> Authority:
    options: dict[str, Any] = {
        "name": "azure",
        "kind": kind,
        "issuer": ISSUERS.get(kind, "https://test.attest.invalid"),
        "jwks": jwks(),
        "audience": "https://broker.example" if kind == "confidential-space" else None,
    } | rest
    return Authority(**options)


def signed(body: Mapping[str, Any], *, alg: str = "RS256", kid: str = "rsa", key: Any = None, **header: Any) -> str:
    if key is None:
        key = {"ec": EC_KEY, "x5c": rsa_key(1)}.get(kid, rsa_key())
    jwk = (ECKey if isinstance(key, ec.EllipticCurvePrivateKey) else RSAKey).import_key(key)
    return jwt.encode({"alg": alg, "kid": kid, "typ": "JWT", **header}, dict(body), jwk, algorithms=[alg])


def raw(header: Any, body: Any, signature: bytes = b"") -> str:
    return ".".join([b64(json.dumps(header).encode()), b64(json.dumps(body).encode()), b64(signature)])


TIMES: Mapping[str, Any] = {"iat": T - 60, "nbf": T - 60, "exp": T + 3600}


def hexed(fill: int, size: int) -> str:
    return (bytes([fill]) * size).hex()


def snp(report_data: bytes = FOLDED) -> dict[str, Any]:
    """As in "Examples of an attestation token"; the values are ours."""
    return {
        "x-ms-attestation-type": "sevsnpvm",
        "x-ms-compliance-status": "azure-compliant-cvm",
        "x-ms-policy-hash": b64(b"\x0a" * 32),
        "x-ms-runtime": {"vm-configuration": {"vmUniqueId": "AE5CBB2A-DC95-4870-A74A-EE4FB33B1A9C"}},
        "x-ms-sevsnpvm-authorkeydigest": hexed(0, 48),
        "x-ms-sevsnpvm-bootloader-svn": 4,
        "x-ms-sevsnpvm-familyId": hexed(1, 16),
        "x-ms-sevsnpvm-guestsvn": 7,
        "x-ms-sevsnpvm-hostdata": hexed(2, 32),
        "x-ms-sevsnpvm-idkeydigest": hexed(3, 48),
        "x-ms-sevsnpvm-imageId": hexed(4, 16),
        "x-ms-sevsnpvm-is-debuggable": False,
        "x-ms-sevsnpvm-launchmeasurement": hexed(5, 48),
        "x-ms-sevsnpvm-microcode-svn": 211,
        "x-ms-sevsnpvm-migration-allowed": False,
        "x-ms-sevsnpvm-reportdata": report_data.ljust(64, b"\x00").hex(),
        "x-ms-sevsnpvm-reportid": hexed(6, 32),
        "x-ms-sevsnpvm-smt-allowed": True,
        "x-ms-sevsnpvm-snpfw-svn": 22,
        "x-ms-sevsnpvm-tee-svn": 0,
        "x-ms-sevsnpvm-vmpl": 0,
        "x-ms-ver": "1.0",
    }


def tdx(report_data: bytes = DATA) -> dict[str, Any]:
    return {
        "attester_tcb_status": "UpToDate",
        "dbgstat": "disabled",
        "eat_profile": "https://aka.ms/maa-eat-profile-tdxvm",
        "tdx_mrtd": hexed(1, 48),
        "tdx_mrseam": hexed(2, 48),
        "tdx_report_data": report_data.ljust(64, b"\x00").hex(),
        **{f"tdx_rtmr{index}": hexed(0, 48) for index in range(4)},
        "tdx_seamsvn": 3,
        "tdx_td_attributes": "0000001000000000",
        "tdx_td_attributes_debug": False,
        "tdx_td_attributes_septve_disable": True,
        "tdx_tee_tcb_svn": "03000600000000000000000000000000",
        "tdx_xfam": "e718060000000000",
        "x-ms-attestation-type": "tdxvm",
        "x-ms-compliance-status": "azure-compliant-cvm",
    }


def sgx(held: bytes = FOLDED) -> dict[str, Any]:
    return {
        "x-ms-attestation-type": "sgx",
        "x-ms-sgx-ehd": b64(held),
        "x-ms-sgx-is-debuggable": False,
        "x-ms-sgx-mrenclave": hexed(1, 32),
        "x-ms-sgx-mrsigner": hexed(2, 32),
        "x-ms-sgx-product-id": 1,
        "x-ms-sgx-svn": 9,
    }


def azurevm(nonce: bytes = FOLDED) -> dict[str, Any]:
    below = {name: value for name, value in snp(b"\x09" * 32).items() if name != "x-ms-policy-hash"}
    return {
        "secureboot": True,
        "x-ms-attestation-type": "azurevm",
        "x-ms-azurevm-bootdebug-enabled": False,
        "x-ms-azurevm-kerneldebug-enabled": False,
        "x-ms-azurevm-hypervisordebug-enabled": False,
        "x-ms-azurevm-dbvalidated": True,
        "x-ms-isolation-tee": below,
        "x-ms-policy-hash": b64(b"\x0a" * 32),
        "x-ms-runtime": {
            "client-payload": {"nonce": base64.b64encode(nonce_text(nonce).encode()).decode()},
            "keys": [],
        },
    }


def space(nonce: bytes = FOLDED) -> dict[str, Any]:
    return {
        "aud": "https://broker.example",
        "sub": "https://www.googleapis.com/compute/v1/projects/p/zones/z/instances/i",
        "eat_nonce": nonce_text(nonce),
        "secboot": True,
        "oemid": 11129,
        "hwmodel": "GCP_INTEL_TDX",
        "swname": "CONFIDENTIAL_SPACE",
        "swversion": ["250301"],
        "dbgstat": "disabled-since-boot",
        "submods": {
            "confidential_space": {"support_attributes": ["LATEST", "STABLE", "USABLE"]},
            "container": {
                "image_reference": "registry.invalid/workload:latest",
                "image_digest": "sha256:" + "ab" * 32,
                "image_id": "sha256:" + "cd" * 32,
                "restart_policy": "Never",
                "args": ["/run", "--phase", "1"],
                "env": {"HOSTNAME": "i"},
                "env_override": None,
                "cmd_override": None,
            },
            "gce": {"zone": "z", "project_id": "p", "project_number": "1", "instance_name": "i", "instance_id": "42"},
        },
    }


@dataclass(frozen=True)
class Service:
    """One kind of token with everything that makes it good."""

    kind: Kind
    body: Callable[[bytes], dict[str, Any]]
    nonce: bytes
    tee: str
    launch: str


SERVICES = {
    "sevsnpvm": Service("maa", snp, FOLDED, "sevsnpvm", "measurement"),
    "tdxvm": Service("maa", tdx, DATA, "tdxvm", "mrtd"),
    "sgx": Service("maa", sgx, FOLDED, "sgx", "mrenclave"),
    "azurevm": Service("maa", azurevm, FOLDED, "azurevm-sevsnpvm", ""),
    "confidential-space": Service("confidential-space", space, FOLDED, "gcp_intel_tdx", "image_digest"),
}
every_service = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)


def body_of(service: Service, **changes: Any) -> dict[str, Any]:
    body = {"iss": ISSUERS[service.kind], "jti": "1", **TIMES, **service.body(service.nonce)}
    for name, value in changes.items():
        body[name.replace("__", "-")] = value
    return body


def claims(
    service: Service | None = None,
    token: str | bytes | None = None,
    *,
    now: datetime = NOW,
    nonce: bytes | None = None,
    believed: Authority | None = None,
    **changes: Any,
) -> Claims:
    service = SERVICES["sevsnpvm"] if service is None else service
    return verify_token(
        signed(body_of(service, **changes)) if token is None else token,
        authority(service.kind) if believed is None else believed,
        now=now,
        nonce=service.nonce if nonce is None else nonce,
    )


def refused(where: str, *args: Any, code: str = "evidence-not-authentic", **rest: Any) -> EvidenceError:
    error = refusal(claims, *args, **rest)
    assert (error.code, error.reasons[0].where) == (code, where), (error, error.reasons)
    return error


def malformed(where: str, *args: Any, **rest: Any) -> EvidenceError:
    return refused(where, *args, code="evidence-malformed", **rest)


# --- what is accepted -------------------------------------------------------------------------------------------------


@every_service
def test_a_good_token_gives_claims_that_name_the_authority(service: Service) -> None:
    found = claims(service)
    assert found.tee == f"authority:azure/{service.tee}"
    assert (found.kind, found.debug, found.launch, found.soft) == ("tee", False, service.launch, False)
    assert found.launch in found.measurements or service.body is azurevm
    assert found.valid_until == datetime.fromtimestamp(T + 3600, UTC)
    assert found.report_data == service.nonce
    assert check_binding(found, BINDING) == ()
    assert check_binding(found, replace(BINDING, key=b"mallory"))


@every_service
def test_a_service_is_no_hardware(service: Service) -> None:
    """A policy that accepts the hardware does not accept somebody's word about it, and another name is another authority."""
    found = claims(service)
    policy = Policy("place.enclave", "tee", frozenset({found.tee}))
    assert appraise(found, policy) == ()
    for accept in (
        {"sev-snp", "tdx", "sgx", "nitro", "simulated"},
        {f"authority:other/{service.tee}"},
        {"authority:azure"},
    ):
        (reason,) = appraise(found, replace(policy, accept=frozenset(accept)))
        assert reason.where == "place.enclave.accept"


@every_service
@pytest.mark.parametrize(("alg", "kid"), [("RS256", "rsa"), ("PS256", "rsa"), ("ES384", "ec"), ("RS256", "x5c")])
def test_every_algorithm_and_form_of_key(service: Service, alg: str, kid: str) -> None:
    assert claims(service, signed(body_of(service), alg=alg, kid=kid)).tee.endswith(service.tee)


@every_service
def test_32_bytes_are_enough_where_there_is_no_log(service: Service) -> None:
    found = claims(replace(service, nonce=SHORT))
    assert found.report_data == SHORT
    assert check_binding(found, BINDING) == ()


def test_claims_of_snp_have_the_names_of_the_verifier_for_snp() -> None:
    found = claims()
    assert found.measurements["measurement"] == b"\x05" * 48
    assert found.measurements["host_data"] == b"\x02" * 32
    assert found.measurements["maa_policy_hash"] == b"\x0a" * 32
    assert found.svns == {"bootloader": 4, "tee": 0, "snp": 22, "microcode": 211, "guest_svn": 7}
    assert found.attributes == {"migrate_ma": False, "policy_smt": True, "vmpl0": True, "azure_compliant_cvm": True}
    assert found.platform == {"vm_unique_id": "ae5cbb2a-dc95-4870-a74a-ee4fb33b1a9c", "vmpl": "0"}
    assert found.tcb_status == NOT_RATED


def test_claims_of_tdx_have_the_names_of_the_verifier_for_tdx() -> None:
    found = claims(SERVICES["tdxvm"])
    assert found.tcb_status == "UpToDate"
    assert {"mrtd", "rtmr0", "rtmr3", "mrseam", "tdattributes", "xfam", "teetcbsvn"} <= found.measurements.keys()
    assert found.attributes == {"sept_ve_disable": True, "migratable": False, "azure_compliant_cvm": True}
    movable = claims(SERVICES["tdxvm"], tdx_td_attributes="0000003000000000")
    assert movable.attributes["migratable"]
    (reason,) = appraise(movable, Policy("place.enclave", "tee", frozenset({movable.tee})))
    assert reason.where == "place.enclave.require.migratable"
    old = claims(SERVICES["tdxvm"], attester_tcb_status="OutOfDate")
    (reason,) = appraise(old, Policy("place.enclave", "tee", frozenset({old.tee})))
    assert reason.where == "place.enclave.tcb_status"


def test_claims_of_sgx_have_the_names_of_the_verifier_for_sgx() -> None:
    found = claims(SERVICES["sgx"])
    assert set(found.measurements) == {"mrenclave", "mrsigner"}
    assert found.svns == {"isvsvn": 9, "isvprodid": 1}


def test_claims_of_a_guest_that_asked_through_its_tpm() -> None:
    found = claims(SERVICES["azurevm"])
    assert found.attributes["secureboot"]
    assert found.attributes["dbvalidated"]
    assert found.measurements["measurement"] == b"\x05" * 48
    assert found.log_in == "report-data"


def test_claims_of_confidential_space() -> None:
    found = claims(SERVICES["confidential-space"])
    assert found.measurements["image_digest"] == b"\xab" * 32
    assert found.attributes == {
        "secboot": True, "overridden": False, "latest": True, "stable": True, "usable": True, "experimental": False,
    }  # fmt: skip
    assert found.svns == {"swversion": 250301}
    assert found.platform["instance_id"] == "42"


def test_events_are_bound_by_the_nonce_or_by_rtmr_3() -> None:
    folded = event_log.fold(DATA, (WORKLOAD,))
    for name, body, nonce in (
        ("sevsnpvm", snp(folded), folded),
        ("confidential-space", space(folded), folded),
        ("tdxvm", tdx() | {"tdx_rtmr3": event_log.replay((WORKLOAD,)).hex()}, DATA),
    ):
        service = replace(SERVICES[name], body=lambda _, body=body: body, nonce=nonce)  # type: ignore[misc]
        token, believed = signed(body_of(service)), authority(service.kind)
        found = verify_token(token, believed, now=NOW, nonce=nonce, events=(WORKLOAD,))
        assert found.events == (WORKLOAD,)
        assert check_binding(found, BINDING) == ()
        hidden = refusal(verify_token, token, believed, now=NOW, nonce=nonce) if name == "tdxvm" else None
        if hidden is None:
            assert check_binding(verify_token(token, believed, now=NOW, nonce=nonce), BINDING)
        else:
            assert hidden.reasons[0].where == "authority.6-nonce.events.replay"


# --- keys: confusion of algorithms, foreign keys ----------------------------------------------------------------------


@every_service
def test_alg_none_is_refused(service: Service) -> None:
    for alg in ("none", "None", "NONE", ""):
        refused("authority.2-key", service, raw({"alg": alg, "kid": "rsa"}, body_of(service)))


@every_service
def test_hs256_with_the_public_key_as_secret_is_refused(service: Service) -> None:
    """CVE-2015-9235 of a neighbour: the verifier uses the public key that everybody has as a shared secret."""
    public = rsa_key().public_key()
    forms = (
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        jwks(),
    )
    for secret in forms:
        for kid in ("rsa", "oct"):
            text = raw({"alg": "HS256", "kid": kid}, body_of(service)).rpartition(".")[0]
            mac = hmac.new(secret, text.encode(), "sha256").digest()
            refused("authority.2-key", service, f"{text}.{b64(mac)}")


@pytest.mark.parametrize(("alg", "kid"), [("ES384", "rsa"), ("RS256", "ec"), ("PS256", "rs256-only"), ("PS256", "ec")])
def test_an_algorithm_of_another_key_type_is_refused(alg: str, kid: str) -> None:
    refused("authority.2-key", token=raw({"alg": alg, "kid": kid}, body_of(SERVICES["sevsnpvm"]), bytes(96)))


@pytest.mark.parametrize("alg", ["RS384", "RS512", "PS512", "ES256", "EdDSA", "HS384"])
def test_algorithms_beyond_the_list_are_refused(alg: str) -> None:
    refused("authority.2-key", token=raw({"alg": alg, "kid": "rsa"}, body_of(SERVICES["sevsnpvm"]), bytes(256)))


@pytest.mark.parametrize("kid", ["other", "encryption", "p256", "oct", "RSA", "rsa "])
def test_a_key_that_is_not_pinned_is_refused(kid: str) -> None:
    error = refused("authority.2-key", token=signed(body_of(SERVICES["sevsnpvm"]), kid=kid))
    assert "pin" in error.reasons[0].hint


def test_a_key_of_the_tokens_own_header_is_never_used() -> None:
    """`jwk`, `jku`, `x5c` and `x5u` let a token bring its own key; the pinned one decides."""
    mallory = rsa_key(2)
    body = body_of(SERVICES["sevsnpvm"])
    for kid, where in (("mallory", "authority.2-key"), ("rsa", "authority.3-signature")):
        header: dict[str, Any] = {
            "jwk": rsa_jwk(mallory, kid),
            "jku": "https://mallory.invalid/keys",
            "x5c": [certificate_of(2)],
        }
        refused(where, token=signed(body, kid=kid, key=mallory, **header))


def test_a_signature_of_another_pinned_key_is_refused() -> None:
    refused("authority.3-signature", token=signed(body_of(SERVICES["sevsnpvm"]), kid="rsa", key=rsa_key(1)))


def test_a_pss_signature_is_no_pkcs1_signature() -> None:
    body = body_of(SERVICES["sevsnpvm"])
    pss = signed(body, alg="PS256").split(".")
    pkcs1 = signed(body, alg="RS256").split(".")
    refused("authority.3-signature", token=".".join([*pkcs1[:2], pss[2]]))
    refused("authority.3-signature", token=".".join([*pss[:2], pkcs1[2]]))


def test_impossible_signatures_are_refused_quietly() -> None:
    body = body_of(SERVICES["sevsnpvm"])
    for signature in (b"", bytes(96), b"\xff" * 96, bytes(95)):
        refused("authority.3-signature", token=raw({"alg": "ES384", "kid": "ec"}, body, signature))
        refused("authority.3-signature", token=raw({"alg": "RS256", "kid": "rsa"}, body, signature))


# --- issuer, audience, time -------------------------------------------------------------------------------------------


@every_service
def test_another_issuer_is_refused(service: Service) -> None:
    for issuer in ("https://mallory.invalid", ISSUERS[service.kind] + "/", "", None, [ISSUERS[service.kind]]):
        refused("authority.4-issuer", service, iss=issuer)


def test_a_token_of_another_authority_with_the_same_keys_is_refused() -> None:
    """All tenants of a region may share keys: the issuer tells them apart."""
    refused("authority.4-issuer", believed=authority(issuer="https://tenant.attest.invalid"))


def test_a_token_for_another_audience_is_refused() -> None:
    service = SERVICES["confidential-space"]
    assert claims(service, aud=["https://broker.example"])
    for audience in ("https://sts.googleapis.com", ["https://broker.example", "https://other.example"], None, ""):
        refused("authority.4-issuer.audience", service, aud=audience)
    refused("authority.4-issuer.audience", believed=authority(audience="https://broker.example"))


@every_service
def test_times_have_exact_ends(service: Service) -> None:
    cases: tuple[tuple[int, dict[str, Any], str | None], ...] = (
        (0, {"exp": T + 1}, None),
        (0, {"exp": T - 29}, None),
        (0, {"exp": T - 30}, "expired"),
        (0, {"iat": T + 30, "nbf": T + 30}, None),
        (0, {"iat": T + 31, "nbf": T}, "future"),
        (0, {"iat": T, "nbf": T + 31}, "future"),
        (0, {"iat": T - 100, "exp": T - 100 + 86400}, None),
        (0, {"iat": T - 100, "exp": T - 100 + 86401}, "lifetime"),
        (0, {"iat": T + 10, "exp": T + 10}, "lifetime"),
        (3600 + 29, {}, None),
        (3600 + 30, {}, "expired"),
        (-60 - 31, {}, "future"),
    )
    for seconds, changes, where in cases:
        now = NOW + timedelta(seconds=seconds)
        if where is None:
            assert claims(service, now=now, **changes)
        else:
            refused(f"authority.5-time.{where}", service, now=now, **changes)


def test_nbf_is_optional_and_the_other_times_are_not() -> None:
    body = body_of(SERVICES["sevsnpvm"])
    del body["nbf"]
    assert claims(token=signed(body))
    for name in ("iat", "exp"):
        less = {key: value for key, value in body.items() if key != name}
        malformed("authority.5-time", token=raw_signed(less))
    for value in ("1", 1.5, True, -1, 253_402_300_800, 10**400, None):
        malformed("authority.5-time", token=raw_signed(body | {"exp": value}))


def raw_signed(body: Any, header: Any = None) -> str:
    """Return a token with a good signature over what joserfc would refuse to write."""
    from cryptography.hazmat.primitives.asymmetric import padding

    header = {"alg": "RS256", "kid": "rsa"} if header is None else header
    text = raw(header, body).rpartition(".")[0]
    return f"{text}.{b64(rsa_key().sign(text.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


# --- nonce: replay, capture, two questions ----------------------------------------------------------------------------


@every_service
def test_replay_of_a_token_for_another_nonce_is_refused(service: Service) -> None:
    for nonce in (bytes(64), bytes(32), service.nonce[::-1], service.nonce[:32]):
        refused("authority.6-nonce", service, nonce=nonce)


def test_a_captured_quote_with_a_fresh_nonce_claim_is_refused() -> None:
    """Anybody can send somebody's old quote to MAA, with the nonce that we asked for: only the quote's own data counts."""
    fresh = nonce_text(FOLDED)
    for service, name in ((SERVICES["sevsnpvm"], "x-ms-sevsnpvm-reportdata"), (SERVICES["tdxvm"], "tdx_report_data")):
        body = body_of(service) | {
            name: bytes(64).hex(),
            "nonce": fresh,
            "eat_nonce": fresh,
            "x-ms-runtime": {"client-payload": {"nonce": fresh}, "nonce": fresh},
        }
        refused("authority.6-nonce", service, signed(body))


def test_a_guests_nonce_stands_in_one_place_and_form() -> None:
    service = SERVICES["azurevm"]
    text = nonce_text(FOLDED)
    runtimes: tuple[Any, ...] = (
        None,
        {},
        {"client-payload": {}},
        {"client-payload": {"nonce": text}},
        {"client-payload": {"nonce": base64.b64encode(FOLDED).decode()}},
        {"nonce": base64.b64encode(text.encode()).decode()},
        {"client-payload": {"nonce": "\u00e9\ud800"}},
    )
    for runtime in runtimes:
        refused("authority.6-nonce", service, token=raw_signed(body_of(service) | {"x-ms-runtime": runtime}))
    # the hardware's own report data names the vTPM there, not us
    body = body_of(service)
    below = body["x-ms-isolation-tee"] | {"x-ms-sevsnpvm-reportdata": FOLDED.hex()}
    refused("authority.6-nonce", service, signed(body | {"x-ms-isolation-tee": below, "x-ms-runtime": {}}))


def test_a_token_that_answers_two_questions_is_refused() -> None:
    service = SERVICES["confidential-space"]
    text = nonce_text(FOLDED)
    assert claims(service, eat_nonce=[text])
    for nonces in ([text, "another nonce"], [text, text], [], [[text]], None, 7, text + "=", FOLDED.hex(), {"0": text}):
        refused("authority.6-nonce", service, eat_nonce=nonces)


# --- debug ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sevsnpvm", {"x__ms__sevsnpvm__is__debuggable": True}),
        ("tdxvm", {"tdx_td_attributes_debug": True}),
        ("tdxvm", {"dbgstat": "enabled"}),
        ("tdxvm", {"dbgstat": None}),
        ("sgx", {"x__ms__sgx__is__debuggable": True}),
        ("azurevm", {"x__ms__azurevm__bootdebug__enabled": True}),
        ("azurevm", {"x__ms__azurevm__kerneldebug__enabled": True}),
        ("azurevm", {"x__ms__azurevm__hypervisordebug__enabled": True}),
        ("azurevm", {"x__ms__azurevm__bootdebug__enabled": None}),  # what is not said is not off
        ("confidential-space", {"dbgstat": "enabled"}),
        ("confidential-space", {"dbgstat": "disabled"}),
        ("confidential-space", {"dbgstat": None}),
    ],
)
def test_debug_is_a_claim_that_no_policy_takes(name: str, changes: dict[str, Any]) -> None:
    found = claims(SERVICES[name], **changes)
    assert found.debug
    reasons = appraise(found, Policy("place.enclave", "tee", frozenset({found.tee})))
    assert [reason.where for reason in reasons] == ["place.enclave.debug"]


def test_debug_below_a_guest_counts() -> None:
    body = body_of(SERVICES["azurevm"])
    below = body["x-ms-isolation-tee"] | {"x-ms-sevsnpvm-is-debuggable": True}
    assert claims(SERVICES["azurevm"], signed(body | {"x-ms-isolation-tee": below})).debug


# --- claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sevsnpvm", {"x__ms__attestation__type": "tpm"}),
        ("sevsnpvm", {"x__ms__attestation__type": None}),
        ("sevsnpvm", {"x__ms__sevsnpvm__launchmeasurement": None}),
        ("sevsnpvm", {"x__ms__sevsnpvm__launchmeasurement": "zz" * 48}),
        ("sevsnpvm", {"x__ms__sevsnpvm__launchmeasurement": "00" * 47}),
        ("sevsnpvm", {"x__ms__sevsnpvm__is__debuggable": None}),
        ("sevsnpvm", {"x__ms__sevsnpvm__is__debuggable": "false"}),
        ("sevsnpvm", {"x__ms__sevsnpvm__is__debuggable": 0}),
        ("sevsnpvm", {"x__ms__sevsnpvm__reportdata": "00" * 32}),
        ("sevsnpvm", {"x__ms__sevsnpvm__microcode__svn": "211"}),
        ("sevsnpvm", {"x__ms__sevsnpvm__microcode__svn": -1}),
        ("sevsnpvm", {"x__ms__sevsnpvm__smt__allowed": 1}),
        ("sevsnpvm", {"x__ms__policy__hash": "a"}),
        ("tdxvm", {"tdx_mrtd": None}),
        ("tdxvm", {"tdx_rtmr3": None}),
        ("tdxvm", {"tdx_td_attributes_debug": None}),
        ("tdxvm", {"attester_tcb_status": None}),
        ("sgx", {"x__ms__sgx__ehd": "=="}),
        ("sgx", {"x__ms__sgx__mrenclave": "00"}),
        ("sgx", {"x__ms__sgx__svn": True}),
        ("azurevm", {"x__ms__isolation__tee": None}),
        ("azurevm", {"x__ms__isolation__tee": {}}),
        ("azurevm", {"x__ms__isolation__tee": {"x-ms-attestation-type": "azurevm"}}),
        ("azurevm", {"x__ms__isolation__tee": {"x-ms-attestation-type": ["sevsnpvm"]}}),
        ("confidential-space", {"swname": "GCE"}),
        ("confidential-space", {"swname": None}),
        ("confidential-space", {"hwmodel": "GCP_NEW_THING"}),
        ("confidential-space", {"hwmodel": None}),
        ("confidential-space", {"submods": {}}),
        ("confidential-space", {"submods": {"container": {}}}),
        ("confidential-space", {"submods": {"container": {"image_digest": "md5:" + "00" * 16}}}),
        ("confidential-space", {"submods": {"container": {"image_digest": "sha256:" + "ab" * 32, "args": "x"}}}),
        ("confidential-space", {"submods": {"container": {"image_digest": "sha256:" + "ab" * 32, "args": [1]}}}),
        (
            "confidential-space",
            {"submods": {"container": {"image_digest": "sha256:" + "ab" * 32, "env_override": {"A": 1}}}},
        ),
        ("confidential-space", {"submods": {"container": {"image_digest": "sha256:" + "ab" * 32, "cmd_override": 3}}}),
    ],
    ids=str,
)
def test_claims_of_another_type_are_malformed(name: str, changes: dict[str, Any]) -> None:
    service = SERVICES[name]
    malformed("authority.7-claims", service, token=raw_signed(body_of(service, **changes)))


def test_an_image_started_with_other_arguments_is_another_workload() -> None:
    service = SERVICES["confidential-space"]
    plain = claims(service).measurements["arguments"]
    for change in ({"args": ["/run", "--leak"]}, {"cmd_override": ["/bin/sh"]}, {"env_override": {"DEBUG": "1"}}):
        body = body_of(service)
        body["submods"]["container"] |= change
        found = claims(service, signed(body))
        assert found.measurements["arguments"] != plain
        assert found.measurements["image_digest"] == b"\xab" * 32
        assert found.attributes["overridden"] is ("args" not in change)
    body = body_of(service)
    body["submods"]["container"]["args"] = ["\ud800"]
    malformed("authority.7-claims", service, token=raw_signed(body))


def test_a_shielded_vm_is_no_tee() -> None:
    found = claims(SERVICES["confidential-space"], hwmodel="GCP_SHIELDED_VM")
    assert found.kind == "attested-host"
    assert appraise(found, Policy("place.enclave", "tee", frozenset({found.tee})))


# --- form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "a.b",
        "a.b.c.d",
        "\u00e9.b.c",
        b"\xff.b.c",
        "a" * 70_000,
        raw([], {}),
        raw({}, []),
        raw({"alg": "RS256"}, {}),
        raw({"kid": "rsa"}, {}),
        raw({"alg": "RS256", "kid": ""}, {}),
        raw({"alg": "RS256", "kid": 1}, {}),
        raw({"alg": ["RS256"], "kid": "rsa"}, {}),
        raw({"alg": "RS256", "kid": "rsa", "crit": []}, {}),
        raw({"alg": "RS256", "kid": "rsa", "b64": False}, {}),
        raw({"alg": "RS256", "kid": "rsa", "typ": "JWE"}, {}),
        b64(b'{"alg":"RS256","alg":"none","kid":"rsa"}') + ".e30.",
        b64(b'{"alg":"RS256","kid":"rsa"}') + "." + b64(b"[" * 5000) + ".",
        b64(b'{"alg":"RS256","kid":"rsa"}') + "." + b64(b'{"a":' + b"9" * 5000 + b"}") + ".",
    ],
    ids=range(21),
)
def test_other_bytes_are_malformed(token: str | bytes) -> None:
    malformed("authority.1-form", token=token)


def test_another_encoding_of_the_same_token_is_refused() -> None:
    good = signed(body_of(SERVICES["sevsnpvm"]))
    assert claims(token=good.encode()) == claims(token=good)
    for changed in (good + "=", good + "\n", " " + good, good.replace(".", ".\n", 1), good + "A"):
        error = refusal(claims, token=changed)
        assert error.reasons[0].where in ("authority.1-form", "authority.3-signature")


def test_no_flipped_character_is_accepted() -> None:
    good = signed(body_of(SERVICES["sgx"]))
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for position in range(0, len(good), 3):
        if good[position] != ".":
            other = alphabet[alphabet.index(good[position]) ^ (1 << position % 6)]
            refusal(claims, SERVICES["sgx"], token=good[:position] + other + good[position + 1 :])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150)
@given(st.sampled_from(sorted(SERVICES)), st.data())
def test_no_value_gives_another_exception(name: str, data: st.DataObject) -> None:
    service = SERVICES[name]
    body = body_of(service)
    for claim in data.draw(st.lists(st.sampled_from(sorted(body)), max_size=3)):
        body[claim] = data.draw(JSON)
    try:
        claims(service, raw_signed(body))
    except EvidenceError as error:
        if not error.reasons:
            raise


@settings(max_examples=150)
@given(st.text() | st.binary())
def test_no_text_gives_another_exception(token: str | bytes) -> None:
    refusal(claims, token=token)
    refusal(verify_token, token, authority("nras"), now=NOW, nonce=SHORT)


# --- authorities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Azure"},
        {"name": ""},
        {"name": "a/b"},
        {"name": "a" * 41},
        {"kind": "nras", "audience": "https://broker.example"},
        {"kind": "veraison"},
        {"issuer": "test.attest.invalid"},
        {"issuer": "http://test.attest.invalid"},
        {"kind": "confidential-space", "audience": None},
        {"jwks": b""},
        {"jwks": b"{}"},
        {"jwks": b'{"keys":[]}'},
        {"jwks": b'{"keys":[7,{}]}'},
        {"jwks": b'{"keys":[{"kty":"oct","kid":"a","k":"AA"}]}'},
        {"jwks": b'{"keys":[{"kty":"RSA","kid":"a","n":"AA","e":"AQAB"}]}'},
        {"jwks": b'{"keys":[{"kty":"RSA","kid":"a","x5c":["AA=="]}]}'},
        {"jwks": b'{"keys":[{"kty":"RSA","kid":"a","x5c":"AA=="}]}'},
        {"jwks": b'{"keys":[{"kty":"EC","crv":"P-384","kid":"a","x":"AA","y":"AA"}]}'},
        {"jwks": b"[" * 100_000},
    ],
    ids=lambda change: str(change)[:60],
)
def test_an_authority_of_another_form_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        authority(**change)


def test_keys_that_contradict_themselves_cannot_be_pinned() -> None:
    weak = rsa_key(bits=1024)
    twice = [rsa_jwk(rsa_key(), "a"), rsa_jwk(rsa_key(1), "a")]
    both = [rsa_jwk(rsa_key(), "a", x5c=[certificate_of(1)])]
    for keys, words in (([rsa_jwk(weak, "a")], "1024 bits"), (twice, "twice"), (both, "different keys")):
        with pytest.raises(ValueError, match=words):
            authority(jwks=json.dumps({"keys": keys}).encode())
    assert authority(jwks=json.dumps({"keys": [rsa_jwk(rsa_key(1), "a", x5c=[certificate_of(1)])]}).encode())


def test_an_authority_does_not_print_its_keys() -> None:
    assert "jwks" not in repr(authority())


def test_mistakes_of_a_caller() -> None:
    naive = datetime(2026, 11, 20)  # noqa: DTZ001 - that is the mistake
    good = signed(body_of(SERVICES["sevsnpvm"]))
    with pytest.raises(ValueError, match="time zone"):
        verify_token(good, authority(), now=naive, nonce=FOLDED)
    for nonce in (b"", bytes(31), bytes(48), bytes(65)):
        with pytest.raises(ValueError, match="nonce"):
            verify_token(good, authority(), now=NOW, nonce=nonce)
    with pytest.raises(ValueError, match="nonce"):
        verify_token(good, authority("nras"), now=NOW, nonce=FOLDED)
    with pytest.raises(ValueError, match="log"):
        verify_token(good, authority(), now=NOW, nonce=SHORT, events=(WORKLOAD,))


# --- NVIDIA -----------------------------------------------------------------------------------------------------------


def gpu(**changes: Any) -> dict[str, Any]:
    return {
        "iss": ISSUERS["nras"],
        **TIMES,
        "eat_nonce": SHORT.hex(),
        "x-nvidia-gpu-attestation-report-nonce-match": True,
        "x-nvidia-gpu-driver-version": "550.90.07",
        "x-nvidia-gpu-vbios-version": "96.00.9F.00.01",
        "hwmodel": "GH100 A01 GSP BROM",
        "ueid": "478176379286082186618948445787393647364802107249",
        "measres": "success",
        "dbgstat": "disabled",
        "secboot": True,
    } | {name.replace("__", "-"): value for name, value in changes.items()}


def bundle(*devices: dict[str, Any], **changes: Any) -> str:
    tokens = {f"GPU-{index}": signed(body, alg="ES384", kid="ec") for index, body in enumerate(devices)}
    body = {
        "iss": ISSUERS["nras"],
        **TIMES,
        "eat_nonce": SHORT.hex(),
        "x-nvidia-overall-att-result": True,
        "submods": {
            name: ["DIGEST", ["SHA-256", hashlib.sha256(token.encode()).hexdigest()]] for name, token in tokens.items()
        },
    } | {name.replace("__", "-"): value for name, value in changes.items()}
    return json.dumps([["JWT", signed(body, alg="ES384", kid="ec")], tokens])


def nras(text: str, nonce: bytes = SHORT) -> Claims:
    return verify_token(text, authority("nras", name="nvidia"), now=NOW, nonce=nonce)


def test_a_good_bundle_gives_a_device_for_each_gpu() -> None:
    found = nras(bundle(gpu(), gpu(ueid="2")))
    assert (found.kind, found.tee, found.gpu, found.debug) == (
        "device",
        "authority:nvidia/nvidia-gpu",
        "confidential",
        False,
    )
    # in hex, as evidence of the GPU itself has it
    assert [device.platform["ueid"] for device in found.devices] == [f"{int(gpu()['ueid']):x}", "2"]
    assert all(device.tee == found.tee and device.report_data == SHORT for device in found.devices)
    single = nras(bundle(gpu()))
    assert single.platform["driver"] == "550.90.07"


def test_one_open_gpu_opens_the_machine() -> None:
    for change in ({"dbgstat": "enabled"}, {"secboot": False}, {"measres": "fail"}, {"measres": None}):
        found = nras(bundle(gpu(), gpu(**change)))
        assert found.gpu == "none"
        assert found.debug is ("dbgstat" in change)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (lambda: bundle(gpu(), x__nvidia__overall__att__result=False), "authority.7-claims"),
        (lambda: bundle(gpu(x__nvidia__gpu__attestation__report__nonce__match=False)), "authority.6-nonce"),
        (lambda: bundle(gpu(), eat_nonce="00" * 32), "nras.5-nonce.platform"),
        (lambda: bundle(gpu(eat_nonce="00" * 32)), "nras.5-nonce.GPU-0"),
        (lambda: bundle(gpu(iss="https://mallory.invalid")), "nras.4-issuer.GPU-0"),
        (lambda: bundle(gpu(exp=T - 1)), "nras.6-time.GPU-0"),
    ],
)
def test_a_bundle_with_one_fault_is_refused(text: Callable[[], str], where: str) -> None:
    error = refusal(nras, text())
    assert (error.code, error.reasons[0].where) == ("evidence-not-authentic", where)


def test_the_gpu_of_another_bundle_is_refused() -> None:
    ours, theirs = (json.loads(bundle(gpu(ueid=str(index)))) for index in range(2))
    error = refusal(nras, json.dumps([ours[0], theirs[1]]))
    assert error.reasons[0].where == "nras.2-digest.GPU-0"


REAL = SHARED / "vectors" / "attestation" / "nvidia" / "nras-hopper-eat-v3.json"


@pytest.mark.skipif(not REAL.exists(), reason="third-party vectors are not beside the repository")
def test_a_real_bundle_is_refused_under_other_keys() -> None:
    """The service's keys of that day are not public any more; everything else of it is good."""
    nonce = bytes.fromhex("931d8dd0add203ac3d8b4fbde75e115278eefcdceac5b87671a748f32364dfcb")
    error = refusal(
        verify_token,
        REAL.read_bytes(),
        authority("nras"),
        now=datetime(2025, 6, 11, 0, 40, tzinfo=UTC),
        nonce=nonce,
    )
    assert {reason.where for reason in error.reasons} == {"nras.3-signature.platform", "nras.3-signature.GPU-0"}


def test_the_page_has_a_row_for_every_step() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "attestation" / "authorities.md").read_text()
    assert re.findall(r"^\| `(authority\.\d+-\w+)` \|", page, re.MULTILINE) == list(STEPS)
    assert f"{LIMIT:,}" in page
    assert all(algorithm in page for algorithm in ALGORITHMS)
