"""Tokens as evidence: who may name an authority, whose keys count, which nonce, one fault each; and GPUs that a service vouches for."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attestation import events as event_log
from cloister.attestation.authority import Kind
from cloister.attestation.binding import check_binding
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.roots import Roots
from cloister.attestation.token.format import KIND, Named, read
from cloister.attestation.token.verify import STEPS
from cloister.attestation.types import VOUCHED, Claims, Evidence, below
from cloister.attestation.verify import verify
from cloister.crypto.canonical import json_encode
from cloister.errors import EvidenceError
from tests.attestation.helpers import refusal
from tests.attestation.test_authority import (
    BINDING,
    DATA,
    EC_KEY,
    FOLDED,
    ISSUERS,
    NOW,
    SERVICES,
    SHORT,
    TIMES,
    WORKLOAD,
    Service,
    body_of,
    bundle,
    ec_jwk,
    every_service,
    gpu,
    jwks,
    raw,
    rsa_jwk,
    rsa_key,
    signed,
    snp,
    tdx,
)  # fmt: skip

AUDIENCES: dict[Kind, str | None] = {"maa": None, "confidential-space": "https://broker.example", "nras": None}


def pin(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def named(kind: Kind = "maa", keys: tuple[bytes, ...] | None = None, **changes: Any) -> Named:
    pins = frozenset(map(pin, (jwks(),) if keys is None else keys))
    return replace(Named(kind, ISSUERS[kind], pins, AUDIENCES[kind]), **changes)


def believed(**authorities: Named) -> Endorsements:
    return Endorsements(tuple(entry.endorsement(name) for name, entry in authorities.items()))


def evidence(token: str, name: str = "azure", keys: bytes | None = None, **changes: Any) -> Evidence:
    parts = MappingProxyType({"authority": name.encode(), "jwks": jwks() if keys is None else keys})
    return replace(Evidence(KIND, token.encode(), parts=parts), **changes)


def judged(
    shown: Evidence | None = None, service: Service = SERVICES["sevsnpvm"], *, now: datetime = NOW, **authorities: Named
) -> Claims:
    shown = evidence(signed(body_of(service))) if shown is None else shown
    return verify(shown, believed(**authorities or {"azure": named(service.kind)}), Roots(), now=now)


def refused(where: str, *args: Any, code: str = "evidence-not-authentic", **rest: Any) -> EvidenceError:
    error = refusal(judged, *args, **rest)
    assert (error.code, error.reasons[0].where) == (code, where), (error, error.reasons)
    return error


def malformed(where: str, *args: Any, **rest: Any) -> EvidenceError:
    return refused(where, *args, code="evidence-malformed", **rest)


# --- what is accepted -------------------------------------------------------------------------------------------------


@every_service
def test_a_token_is_found_bound_to_what_it_was_made_for(service: Service) -> None:
    found = judged(service=service)
    assert found.tee == f"authority:azure/{service.tee}"
    assert found.report_data == service.nonce
    assert check_binding(found, BINDING) == ()
    for other in (
        replace(BINDING, nonce=b"\x06" * 32),
        replace(BINDING, key=b"mallory"),
        replace(BINDING, peer_key=b"\x06" * 32),
        replace(BINDING, contract="sha256:" + "0a" * 32),
    ):
        assert [reason.where for reason in check_binding(found, other)] == ["binding.report_data"]


@every_service
def test_32_bytes_are_enough_without_a_log_and_never_with_one(service: Service) -> None:
    short = replace(service, nonce=SHORT)
    found = judged(service=short)
    assert found.report_data == SHORT
    assert check_binding(found, BINDING) == ()
    refused("token.4-nonce", evidence(signed(body_of(short)), events=(WORKLOAD,)), short)


def test_the_log_is_bound_by_the_nonce_or_by_rtmr_3() -> None:
    folded = event_log.fold(DATA, (WORKLOAD,))
    in_register = tdx() | {"tdx_rtmr3": event_log.replay((WORKLOAD,)).hex()}
    for body, log_in in ((snp(folded), "report-data"), (in_register, "register")):
        token = signed(body_of(replace(SERVICES["sevsnpvm"], body=lambda _, body=body: body)))  # type: ignore[misc]
        found = judged(evidence(token, events=(WORKLOAD,)))
        assert (found.log_in, found.events) == (log_in, (WORKLOAD,))
        assert check_binding(found, BINDING) == ()
        other = event_log.event(event_log.WORKLOAD, b"\xa1")
        changed = evidence(token, events=(other,))
        if log_in == "register":
            refused("token.5-token.authority.6-nonce.events.replay", changed)
        else:
            assert check_binding(judged(changed), BINDING)


def test_a_register_is_no_place_for_the_folded_form() -> None:
    """One of both binds the log, the one that the type has; a token cannot choose."""
    body = tdx(FOLDED)
    token = signed(body_of(replace(SERVICES["tdxvm"], body=lambda _: body)))
    assert check_binding(judged(evidence(token)), BINDING)


def test_any_of_several_pinned_documents_counts_byte_for_byte() -> None:
    both = named(keys=(b'{"keys":[]}', jwks()))
    assert judged(azure=both).tee.startswith("authority:azure/")
    for keys in (jwks() + b"\n", jwks()[:-1] + b" }"):
        refused("token.3-keys", evidence(signed(body_of(SERVICES["sevsnpvm"])), keys=keys), azure=both)


# --- who is believed --------------------------------------------------------------------------------------------------


def test_an_authority_that_nobody_names_is_nobody() -> None:
    error = refused("token.2-authority", azur=named())
    assert "azur" in error.reasons[0].wanted
    error = refusal(verify, evidence(signed(body_of(SERVICES["sevsnpvm"]))), Endorsements(), Roots(soft=True), now=NOW)
    assert error.reasons[0].where == "token.2-authority"


def test_the_keys_of_the_sender_are_not_the_authoritys() -> None:
    """The JWKS is exchanged, and the token is signed by the new key under the old name."""
    mine = json.dumps({"keys": [rsa_jwk(rsa_key(7), "rsa")]}).encode()
    forged = signed(body_of(SERVICES["sevsnpvm"]), key=rsa_key(7))
    refused("token.3-keys", evidence(forged, keys=mine))
    refused("token.5-token.authority.3-signature", evidence(forged))


def test_one_name_means_what_the_relying_party_says() -> None:
    """Two relying parties with the same name for two services: each believes its own."""
    theirs = json.dumps({"keys": [rsa_jwk(rsa_key(7), "rsa")]}).encode()
    other = named(keys=(theirs,))
    token = signed(body_of(SERVICES["sevsnpvm"]), key=rsa_key(7))
    assert judged(evidence(token, keys=theirs), azure=other).tee == "authority:azure/sevsnpvm"
    refused("token.3-keys", evidence(token, keys=theirs), azure=named())
    refused("token.3-keys", evidence(signed(body_of(SERVICES["sevsnpvm"]))), azure=other)


def test_a_token_under_another_named_authority_is_refused() -> None:
    """Both are named and have the same keys (regions of one service do); the issuer says which one it is."""
    both: dict[str, Any] = {"azure": named(), "east": named(issuer="https://east.attest.invalid")}
    token = signed(body_of(SERVICES["sevsnpvm"]))
    assert judged(evidence(token, "azure"), **both).tee == "authority:azure/sevsnpvm"
    refused("token.5-token.authority.4-issuer", evidence(token, "east"), **both)


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        ("authority.4-issuer", {"iss": "https://mallory.invalid"}),
        ("authority.5-time.expired", {"exp": TIMES["iat"] + 1}),
        ("authority.5-time.future", {"iat": TIMES["exp"], "nbf": TIMES["exp"], "exp": TIMES["exp"] + 60}),
        ("authority.5-time.lifetime", {"exp": TIMES["iat"] + 7 * 86_400}),
    ],
)
@every_service
def test_every_step_of_the_token_is_taken(service: Service, step: str, changes: dict[str, Any]) -> None:
    refused(f"token.5-token.{step}", evidence(signed(body_of(service, **changes))), service)


def test_another_audience_is_refused() -> None:
    service = SERVICES["confidential-space"]
    refused(
        "token.5-token.authority.4-issuer.audience",
        evidence(signed(body_of(service, aud="https://other.example"))),
        service,
    )


@every_service
def test_confusion_of_algorithms_is_refused(service: Service) -> None:
    for alg in ("none", "HS256"):
        refused("token.5-token.authority.2-key", evidence(raw({"alg": alg, "kid": "rsa"}, body_of(service))), service)


@pytest.mark.parametrize("name", ["sevsnpvm", "tdxvm", "sgx"])
def test_a_captured_quote_with_a_fresh_nonce_claim_answers_the_old_question(name: str) -> None:
    """Anybody can send a captured quote with any `nonce` to MAA; what counts is in the quote."""
    service = SERVICES[name]
    fresh = replace(BINDING, nonce=b"\x06" * 32)
    token = signed(body_of(service, nonce=fresh.report_data().hex()))
    found = judged(evidence(token), service)
    assert found.report_data == service.nonce
    assert check_binding(found, fresh)


@every_service
def test_a_token_without_its_nonce_is_malformed(service: Service) -> None:
    where = {"sevsnpvm": "x-ms-sevsnpvm-reportdata", "tdxvm": "tdx_report_data", "sgx": "x-ms-sgx-ehd"}
    claim = where.get(service.tee, "x-ms-runtime" if service.kind == "maa" else "eat_nonce")
    body = {name: value for name, value in body_of(service).items() if name != claim}
    error = refusal(judged, evidence(signed(body)), service)
    assert error.code == "evidence-malformed"
    assert error.reasons[0].where.startswith("token.4-nonce.authority.")


@pytest.mark.parametrize("value", [[], ["a", "b"], 7, None, "", "é", "ab", "=" * 43, {"a": 1}])
def test_a_nonce_of_another_form_is_malformed(value: Any) -> None:
    service = SERVICES["confidential-space"]
    error = refusal(judged, evidence(signed(body_of(service, eat_nonce=value))), service)
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", "token.4-nonce.authority.6-nonce")
    guest = SERVICES["azurevm"]
    runtime = {"client-payload": {"nonce": value}}
    assert refusal(judged, evidence(signed(body_of(guest, x__ms__runtime=runtime))), guest).code == "evidence-malformed"


# --- form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"authority": b"azure"},
        {"jwks": b"{}"},
        {"authority": b"azure", "jwks": b"{}", "issuer": b"https://mallory.invalid"},
        {"authority": b"\xff", "jwks": b"{}"},
    ],
)
def test_other_parts_are_malformed(parts: dict[str, bytes]) -> None:
    malformed("token.1-form", evidence(signed(body_of(SERVICES["sevsnpvm"])), parts=MappingProxyType(parts)))


@pytest.mark.parametrize("keys", [b"", b"{}", b'{"keys":[]}', b"[" * 10_000, b" " * 300_000, jwks()[:-2]])
def test_a_pinned_document_without_keys_is_malformed(keys: bytes) -> None:
    malformed("token.3-keys", evidence(signed(body_of(SERVICES["sevsnpvm"])), keys=keys), azure=named(keys=(keys,)))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"[]",
        json_encode({"audience": None, "issuer": "https://a.invalid", "jwks": [], "kind": "veraison"}),
        json_encode({"audience": None, "issuer": "https://a.invalid", "jwks": [7], "kind": "maa"}),
        json_encode({"audience": None, "issuer": "https://a.invalid", "jwks": [], "kind": "maa", "x": 1}),
        b' {"audience":null,"issuer":"https://a.invalid","jwks":[],"kind":"maa"}',
    ],
)  # fmt: skip
def test_an_authority_of_another_form_is_malformed(data: bytes) -> None:
    error = refusal(read, data)
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", "token.2-authority")
    planted = Endorsements((Endorsement(KIND, "authority/azure", data),))
    assert refusal(verify, evidence("a.b.c"), planted, Roots(), now=NOW).code == "evidence-malformed"


def test_an_authority_comes_back_from_its_bytes() -> None:
    for kind in VOUCHED:
        made = named(kind).endorsement("a")
        assert (made.kind, made.subject, read(made.data)) == (KIND, "authority/a", named(kind))


@settings(max_examples=150)
@given(st.binary(max_size=200), st.sampled_from(sorted(ISSUERS)), st.binary(max_size=60))
def test_no_bytes_give_another_exception(quote: bytes, kind: Kind, log: bytes) -> None:
    shown = evidence("x", quote=quote, events=(event_log.event("x", log),))
    assert refusal(judged, shown, azure=named(kind)).code in ("evidence-malformed", "evidence-not-authentic")


@settings(max_examples=150)
@given(st.sampled_from(sorted(SERVICES)), st.data())
def test_no_flipped_character_is_accepted(name: str, data: st.DataObject) -> None:
    service = SERVICES[name]
    token = signed_once(name)
    at = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.characters(codec="ascii").filter(lambda c: c != token[at]))
    assert refusal(judged, evidence(token[:at] + other + token[at + 1 :]), service)


_SIGNED: dict[str, str] = {}


def signed_once(name: str) -> str:
    return _SIGNED.setdefault(name, signed(body_of(SERVICES[name])))


def test_a_naive_time_is_a_callers_mistake() -> None:
    with pytest.raises(ValueError, match="time zone"):
        judged(now=NOW.replace(tzinfo=None))


# --- devices ----------------------------------------------------------------------------------------------------------

INNER = BINDING.for_devices()


def machine(*bundles: str, service: Service = SERVICES["sevsnpvm"]) -> tuple[Evidence, Any]:
    devices = tuple(evidence(text, "nvidia") for text in bundles)
    bound = BINDING.over(devices)
    nonce = bound.report_data() if service.tee == "tdxvm" else event_log.fold(bound.report_data(), ())
    return evidence(signed(body_of(replace(service, nonce=nonce))), devices=devices), bound


def both(shown: Evidence, now: datetime = NOW) -> Claims:
    return judged(shown, azure=named(), nvidia=named("nras"), now=now)


@pytest.mark.parametrize("name", ["sevsnpvm", "tdxvm"])
def test_a_gpu_that_a_service_vouches_for_is_a_device(name: str) -> None:
    shown, bound = machine(bundle(gpu()), bundle(gpu(ueid="2")), service=SERVICES[name])
    found = both(shown)
    assert check_binding(found, bound) == ()
    assert found.gpu == "confidential"
    assert [(one.kind, one.tee, one.gpu) for one in found.devices] == [
        ("device", "authority:nvidia/nvidia-gpu", "confidential")
    ] * 2
    assert found.devices[1].platform["ueid"] == "2"
    assert check_binding(both(replace(shown, devices=shown.devices[:1])), bound)
    assert {below(found.tee), below(found.devices[0].tee)} <= {"sev-snp", "tdx", "nvidia-gpu"}


def test_one_open_gpu_opens_the_machine() -> None:
    shown, _ = machine(bundle(gpu()), bundle(gpu(ueid="2", secboot=False)))
    assert both(shown).gpu == "none"


def test_a_gpu_is_one_device_however_often_it_is_shown() -> None:
    shown, _ = machine(bundle(gpu()), bundle(gpu(hwmodel="other")))
    error = refusal(both, shown)
    assert (error.code, error.reasons[0].where) == ("evidence-not-authentic", "evidence.devices.1")


def test_the_gpu_of_another_exchange_is_not_bound() -> None:
    shown, bound = machine(bundle(gpu(eat_nonce="0a" * 32), eat_nonce="0a" * 32))
    assert [reason.where for reason in check_binding(both(shown), bound)] == ["binding.devices.0"]


def test_a_bundle_is_about_one_gpu_and_takes_no_log() -> None:
    shown, _ = machine(bundle(gpu(), gpu(ueid="2")))
    error = refusal(both, shown)
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", "token.5-token")
    logged = evidence(bundle(gpu()), "nvidia", events=(WORKLOAD,))
    refused("token.4-nonce", logged, nvidia=named("nras"))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (lambda: bundle(gpu(), x__nvidia__overall__att__result=False), "token.5-token.authority.7-claims"),
        (lambda: bundle(gpu(iss="https://mallory.invalid")), "token.5-token.nras.4-issuer.GPU-0"),
        (lambda: bundle(gpu(eat_nonce="00" * 32)), "token.5-token.nras.5-nonce.GPU-0"),
        (lambda: bundle(gpu(exp=TIMES["iat"])), "token.5-token.nras.6-time.GPU-0"),
    ],
)
def test_every_step_of_the_bundle_is_taken(text: Any, where: str) -> None:
    refused(where, evidence(text(), "nvidia"), nvidia=named("nras"))


def test_a_token_about_a_machine_is_no_device() -> None:
    """A second machine as the device of the first: what it says is about a TEE and not about a GPU."""
    inner = evidence(signed(body_of(replace(SERVICES["sevsnpvm"], nonce=SHORT))))
    shown = evidence(signed(body_of(SERVICES["sevsnpvm"])), devices=(inner,))
    error = refusal(judged, shown)
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", "evidence.devices.0")


def test_claims_end_with_the_token() -> None:
    assert judged().valid_until == datetime.fromtimestamp(TIMES["exp"], NOW.tzinfo)
    end = datetime.fromtimestamp(TIMES["exp"], NOW.tzinfo)
    assert judged(now=end + timedelta(seconds=29)).tee
    refused("token.5-token.authority.5-time.expired", now=end + timedelta(seconds=30))


def test_the_other_algorithm_of_a_pinned_key_set_counts_too() -> None:
    keys = json.dumps({"keys": [ec_jwk(EC_KEY, "ec")]}).encode()
    token = signed(body_of(SERVICES["sevsnpvm"]), alg="ES384", kid="ec")
    assert judged(evidence(token, keys=keys), azure=named(keys=(keys,))).tee == "authority:azure/sevsnpvm"


def test_the_page_has_a_row_for_every_step() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "attestation" / "authorities.md").read_text()
    assert re.findall(r"^\| `(token\.\d+-\w+)` \|", page, re.MULTILINE) == list(STEPS)
    for kind, types in VOUCHED.items():
        assert f"`{kind}`" in page
        assert all(f"`{word}`" in page for word in types), kind
