"""Arm CCA (experimental): every way to be wrong, one fault each, on soft tokens; the public token with its verdict."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attestation import cose
from cloister.attestation import events as event_log
from cloister.attestation.appraise import appraise
from cloister.attestation.binding import Binding, check_binding
from cloister.attestation.cca import format as cca_format
from cloister.attestation.cca.roots import ARM_TEST_CPAK, PINS, SOFT_CPAK
from cloister.attestation.cca.verify import STEPS, spki_sha256
from cloister.attestation.cca.verify import verify as verify_cca
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.files import Case
from cloister.attestation.files.cca import observe
from cloister.attestation.roots import Roots
from cloister.attestation.soft import cca as soft
from cloister.attestation.types import NOT_RATED, Claims, Event, Evidence, Policy
from cloister.attestation.verify import VERIFIERS, verify
from cloister.errors import EvidenceError
from tests.attestation.helpers import SHARED, refusal, value_or_malformed

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
RIM = hashlib.sha512(b"realm").digest()
BINDING = Binding(purpose="release", nonce=b"\x05" * 32, key=b"key")
CHALLENGE = event_log.fold(BINDING.report_data(), ())
"""What an attester with an empty log signs: the log is folded in, empty or not."""
SOFT = Roots(soft=True)
MACHINE = soft.platform()
GOOD = soft.endorsements(NOW)
WORKLOAD = event_log.Workload("sha256:" + "ab" * 32, "offline", b"\x09" * 32, "L2")
PROFILES = (soft.LEGACY, soft.PROFILE_1, soft.PROFILE_2)


def token(machine: soft.Platform = MACHINE, **rest: Any) -> bytes:
    options: dict[str, Any] = {"rim": RIM, "challenge": CHALLENGE} | rest
    return soft.token(machine, **options)


def claims(
    data: bytes | None = None,
    *,
    events: tuple[Event, ...] = (),
    endorsements: Endorsements = GOOD,
    roots: Roots = SOFT,
) -> Claims:
    return verify(Evidence("cca", token() if data is None else data, events), endorsements, roots, now=NOW)


def refused(
    where: str, data: bytes | None = None, *, code: str = "evidence-not-authentic", **rest: Any
) -> EvidenceError:
    error = refusal(claims, data, **rest)
    assert (error.code, error.reasons[0].where) == (code, where), (error, error.reasons)
    assert any(error.reasons[0].where.startswith(step) for step in STEPS)
    return error


def malformed(data: bytes) -> EvidenceError:
    return refused("cca.1-format", data, code="evidence-malformed")


def endorsed(key: bytes, *, subject: bytes = MACHINE.instance_id) -> Endorsements:
    return Endorsements((Endorsement("cca", f"cpak/{subject.hex()}", key),))


# --- what is accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("tag", cca_format.TAGS)
def test_a_good_token_gives_all_claims(profile: str, tag: int) -> None:
    found = claims(token(profile=profile, tag=tag))
    assert (found.kind, found.tee, found.soft, found.debug) == ("tee", "soft-cca", True, False)
    assert (found.tcb_status, found.launch, found.log_in) == (NOT_RATED, "rim", "report-data")
    assert found.measurements["rim"] == RIM
    assert set(found.measurements) == {
        "rim", "rpv", "rem0", "rem1", "rem2", "rem3", "configuration",
        "component.rse_bl1_2", "component.ap_bl31", "component.rmm",
        "signer.rse_bl1_2", "signer.ap_bl31", "signer.rmm",
    }  # fmt: skip
    assert found.platform["instance_id"] == MACHINE.instance_id.hex()
    assert found.platform["implementation_id"] == MACHINE.implementation_id.hex()
    assert found.attributes["secured"]
    assert ("private_memory_encryption" in found.attributes) is (profile == soft.PROFILE_2)
    assert ("realm_instance_id" in found.platform) is (profile == soft.PROFILE_2)
    assert check_binding(found, BINDING) == ()
    policy = Policy("place.enclave", "tee", frozenset({"simulated"}), reference_values={"rim": frozenset({RIM})})
    assert appraise(found, policy) == ()


def test_the_kind_is_found_by_its_folder_and_says_that_it_is_experimental() -> None:
    assert VERIFIERS["cca"] is verify_cca
    assert "experimental" in next(iter(STEPS.values()))


def test_a_log_is_bound_by_the_challenge() -> None:
    log = (event_log.event(event_log.WORKLOAD, WORKLOAD.encode()),)
    data = token(challenge=event_log.fold(BINDING.report_data(), log))
    found = claims(data, events=log)
    assert event_log.workload_of(found) == WORKLOAD
    assert check_binding(found, BINDING) == ()
    assert check_binding(claims(data), BINDING)  # the log was hidden
    assert check_binding(claims(data, events=log * 2), BINDING)
    refused("cca.7-events.0.data", data, events=(replace(log[0], data=b"other"),))


def test_replay_and_relay_are_not_bound() -> None:
    for other in (replace(BINDING, nonce=b"\x06" * 32), replace(BINDING, key=b"mallory")):
        (reason,) = check_binding(claims(), other)
        assert reason.where == "binding.report_data"


@pytest.mark.parametrize("rak_hash", list(cca_format.HASHES))
def test_every_hash_of_the_realm_key_is_known(rak_hash: str) -> None:
    assert claims(token(rak_hash=rak_hash)).tee == "soft-cca"


@pytest.mark.parametrize("size", [32, 48, 64])
def test_every_size_of_measurement_is_known(size: int) -> None:
    assert claims(token(rim=RIM[:size])).measurements["rim"] == RIM[:size]


def test_unknown_claims_are_ignored_and_optional_ones_may_be_absent() -> None:
    assert claims(token(platform_changes={99999: "x", "text": 1}, realm_changes={99999: "x"})) == claims()
    assert claims(token(platform_changes={2400: ...})) == claims()


def test_components_of_one_type_do_not_hide_one_another() -> None:
    component = {1: "RMM", 2: bytes(32), 5: bytes(32)}
    components = [component, component | {2: b"\x01" * 32}, {2: b"\x02" * 32, 5: bytes(32)}, component | {1: "rmm.2"}]
    found = claims(token(platform_changes={2399: components})).measurements
    assert found["component.rmm"] == bytes(32)
    assert found["component.rmm.2"] == b"\x01" * 32
    assert found["component.untyped"] == b"\x02" * 32
    assert len([name for name in found if name.startswith("component.")]) == 4


# --- the platform's key -----------------------------------------------------------------------------------------------


def test_the_soft_key_is_the_pinned_one() -> None:
    assert hashlib.sha256(MACHINE.spki()).hexdigest() == SOFT_CPAK
    assert spki_sha256(MACHINE.spki()) == SOFT_CPAK
    assert PINS.soft == {SOFT_CPAK, ARM_TEST_CPAK}
    assert PINS.vendor == frozenset()


def test_the_soft_key_counts_only_when_it_is_named() -> None:
    error = refused("cca.2-cpak", roots=Roots())
    assert error.reasons[0].found == "the published test root"


def test_a_public_key_stays_soft_even_where_somebody_pins_it() -> None:
    pinned = frozenset({SOFT_CPAK, ARM_TEST_CPAK})
    refused("cca.2-cpak", roots=Roots(also={"cca": pinned}))
    assert claims(roots=Roots(soft=True, also={"cca": pinned})).tee == "soft-cca"


def test_a_relying_party_pins_the_keys_of_its_own_platforms() -> None:
    real = soft.platform("real", label="a vendor's key")
    endorsements = endorsed(real.spki(), subject=real.instance_id)
    pin = frozenset({spki_sha256(real.spki())})
    found = claims(token(real), endorsements=endorsements, roots=Roots(also={"cca": pin}))
    assert (found.tee, found.soft) == ("cca", False)
    # an endorsement alone is not believed: it may have come from anywhere
    refused("cca.2-cpak", token(real), endorsements=endorsements)
    refused("cca.2-cpak", token(real), endorsements=endorsements, roots=Roots(also={"nitro": pin}))


def test_the_key_is_found_by_instance_or_by_implementation() -> None:
    assert claims(endorsements=endorsed(MACHINE.spki(), subject=MACHINE.implementation_id)) == claims()
    error = refused("cca.2-cpak", endorsements=Endorsements())
    assert MACHINE.instance_id.hex() in error.reasons[0].wanted
    # the machine's own entry counts before that of its kind
    both = endorsed(soft.platform(label="mallory").spki()) | endorsed(MACHINE.spki(), subject=MACHINE.implementation_id)
    refused("cca.2-cpak", endorsements=both)


def test_the_evidence_of_another_machine_is_not_endorsed_by_this_ones_entry() -> None:
    refused("cca.2-cpak", token(soft.platform("cuckoo")))


def test_a_key_may_be_a_jwk_or_der() -> None:
    numbers = MACHINE.cpak.public_key().public_numbers()

    def text(value: int) -> str:
        return base64.urlsafe_b64encode(value.to_bytes(48, "big")).rstrip(b"=").decode()

    jwk = json.dumps({"kty": "EC", "crv": "P-384", "x": text(numbers.x), "y": text(numbers.y), "kid": "1"}).encode()
    assert claims(endorsements=endorsed(jwk)) == claims()
    assert spki_sha256(jwk) == SOFT_CPAK


@pytest.mark.parametrize(
    "key",
    [
        b"{}",
        b"[]",
        b"not a key",
        b"\x30\x00",
        b"\xff" * 10,
        b" " * 5000,
        b'{"kty":"EC","crv":"P-384","x":"AA","y":"AA"}',
        b'{"kty":"EC","crv":"P-384","x":"' + b"A" * 3000 + b'","y":"AA"}',
        b'{"kty":"EC","crv":"secp256k1","x":"AA","y":"AA"}',
        b'{"kty":"EC","crv":"P-384","x":"\xc3\xa9","y":"AA"}',
        b"[" * 4000,
        ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
        .public_key()
        .public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
    ],
    ids=range(12),
)
def test_keys_that_do_not_parse_are_malformed(key: bytes) -> None:
    refused("cca.2-cpak.format", endorsements=endorsed(key), code="evidence-malformed")


# --- signatures and binding -------------------------------------------------------------------------------------------


def test_a_platform_token_of_another_key_is_refused() -> None:
    refused("cca.3-platform", token(cpak=soft.derive_key("mallory")))


def test_the_realm_key_cannot_sign_the_platform_token() -> None:
    refused("cca.3-platform", token(cpak=MACHINE.rak))


def test_a_realm_token_of_another_key_is_refused() -> None:
    refused("cca.5-realm", token(rak=soft.derive_key("mallory")))
    refused("cca.5-realm", token(rak=MACHINE.cpak))


def test_the_realm_token_of_another_platform_is_refused() -> None:
    """Mix and match: a genuine platform token beside the realm token of somebody who has another realm key."""
    mallory = soft.platform("mallory", label="mallory")
    ours, theirs = (cose.loads(each, limit=1 << 14).value for each in (token(), token(mallory)))
    mixed = cose.dumps(cose.Tagged(907, {44234: ours[44234], 44241: theirs[44241]}))
    error = refused("cca.4-binding", mixed)
    assert "another platform token" in error.reasons[0].hint


def test_a_platform_that_names_another_realm_key_is_refused() -> None:
    refused("cca.4-binding", token(platform_changes={10: bytes(32)}))


def test_a_realm_that_names_another_hash_is_refused() -> None:
    refused("cca.4-binding", token(realm_changes={44240: "sha-512"}))


# --- life cycle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lifecycle", [0x3000, 0x3003, 0x30FF])
def test_a_secured_platform_is_not_debuggable(lifecycle: int) -> None:
    found = claims(token(lifecycle=lifecycle))
    assert (found.debug, found.attributes["secured"]) == (False, True)


@pytest.mark.parametrize("lifecycle", [0x4000, 0x40FF, 0x5000, 0x50FF])
def test_a_platform_in_debug_is_authentic_and_no_policy_takes_it(lifecycle: int) -> None:
    found = claims(token(lifecycle=lifecycle))
    assert (found.debug, found.attributes["secured"]) == (True, False)
    policy = Policy("place.enclave", "tee", frozenset({"simulated"}))
    assert [reason.where for reason in appraise(found, policy)] == ["place.enclave.debug"]


@pytest.mark.parametrize("lifecycle", [0, 0x00FF, 0x1000, 0x2000, 0x2FFF, 0x3100, 0x4100, 0x6000, 0xFFFF])
def test_in_other_states_the_platform_says_nothing(lifecycle: int) -> None:
    error = refused("cca.6-lifecycle", token(lifecycle=lifecycle))
    assert f"{lifecycle:#06x}" in error.reasons[0].found


# --- form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {265: ...},
        {265: "http://arm.com/CCA-SSD/2.0.0"},
        {265: soft.LEGACY},
        {265: 5},
        {10: bytes(31)},
        {10: ...},
        {2396: bytes(31)},
        {256: bytes(33)},
        {256: b"\x01" * 32},
        {2401: b""},
        {2401: bytes(1025)},
        {2395: -1},
        {2395: 0x10000},
        {2395: True},
        {2395: "secured"},
        {2402: "sha-1"},
        {2402: ...},
        {2399: []},
        {2399: [{}] * 65},
        {2399: [[]]},
        {2399: [{1: "x", 5: bytes(32)}]},
        {2399: [{1: "x", 2: bytes(32)}]},
        {2399: [{1: 7, 2: bytes(32), 5: bytes(32)}]},
        {2399: [{1: "x", 2: bytes(20), 5: bytes(32)}]},
        {2399: [{1: "x", 2: bytes(32), 5: bytes(32), 6: "md5"}]},
        {2399: [{1: "x\n", 2: bytes(32), 5: bytes(32)}]},
        {2400: 1},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_one_fault_of_the_platform_token_each(changes: dict[Any, Any]) -> None:
    malformed(token(platform_changes=changes))


@pytest.mark.parametrize(
    "changes",
    [
        {265: ...},
        {265: "tag:arm.com,2024:realm#2.0.0"},
        {10: bytes(32)},
        {10: [bytes(64)]},
        {44235: bytes(32)},
        {44236: "sha-224"},
        {44237: b""},
        {44237: bytes(97)},
        {44237: cose.dumps({1: 2, -1: 2, -2: bytes(48), -3: bytes(48)})},
        {44237: cose.dumps({1: 2, -1: 2, -2: bytes(47), -3: bytes(48)})},
        {44237: cose.dumps({1: 2, -1: 9, -2: bytes(48), -3: bytes(48)})},
        {44237: cose.dumps({1: 2, -1: 2, -2: bytes(48), -3: True})},
        {44237: cose.dumps({1: 1, -1: 6, -2: bytes(32)})},
        {44238: bytes(20)},
        {44239: [bytes(64)] * 3},
        {44239: [bytes(64)] * 5},
        {44239: [bytes(64)] * 3 + [bytes(63)]},
        {44239: {}},
        {44240: "SHA256"},
        {44240: ...},
        {44243: 2},
        {44243: True},
        {256: bytes(33)},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_one_fault_of_the_realm_token_each(changes: dict[Any, Any]) -> None:
    malformed(token(realm_changes=changes))


def test_the_profile_of_2024_needs_its_claims() -> None:
    for missing in (256, 44243):
        malformed(token(profile=soft.PROFILE_2, realm_changes={missing: ...}))


def test_a_realm_key_that_is_a_point_belongs_to_the_legacy_profile_only() -> None:
    point = MACHINE.rak.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    malformed(token(realm_changes={44237: point}))
    malformed(token(profile=soft.LEGACY, realm_changes={44237: b"\x03" + point[1:]}))
    malformed(token(profile=soft.LEGACY, realm_changes={44237: point[:96] + bytes([point[96] ^ 1])}))


def test_other_collections_are_refused() -> None:
    good = cose.loads(token(), limit=1 << 14).value
    platform, realm = good[44234], good[44241]
    assert claims(cose.dumps(cose.Tagged(907, {"__cmwc_t": "tag:example", 44234: platform, 44241: realm})))
    for other in (
        good,
        cose.Tagged(18, good),
        cose.Tagged(907, [platform, realm]),
        cose.Tagged(907, {44234: platform}),
        cose.Tagged(907, {44241: realm}),
        cose.Tagged(907, {**good, 44242: realm}),
        cose.Tagged(907, {44234: realm, 44241: platform}),
        cose.Tagged(907, {44234: platform, 44241: [60, realm[1]]}),
        cose.Tagged(907, {44234: platform, 44241: [263, realm[1], 1]}),
        cose.Tagged(907, {44234: platform, 44241: "text"}),
    ):
        malformed(cose.dumps(other))


def test_parts_trailing_bytes_and_size_are_refused() -> None:
    error = refusal(verify, Evidence("cca", token(), parts={"cpak": MACHINE.spki()}), GOOD, SOFT, now=NOW)
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", "cca.1-format")
    malformed(token() + b"\x00")
    malformed(bytes(cca_format.LIMIT + 1))
    malformed(b"")


def test_mistakes_of_a_caller() -> None:
    naive = datetime(2026, 11, 20)  # noqa: DTZ001 - that is the mistake
    with pytest.raises(ValueError, match="time zone"):
        verify(Evidence("cca", token()), GOOD, SOFT, now=naive)
    with pytest.raises(ValueError, match="kind"):
        verify_cca(Evidence("tdx", b""), GOOD, SOFT, now=NOW)
    with pytest.raises(ValueError, match="time zone"):
        soft.endorsements(naive)
    wrongs: tuple[dict[str, Any], ...] = ({"rim": bytes(20)}, {"challenge": bytes(32)})
    for wrong in wrongs:
        with pytest.raises(ValueError, match="bytes"):
            token(**wrong)


def test_no_flipped_byte_gives_other_claims() -> None:
    """Tags and the unprotected header are outside of what is signed; nothing else is. Every second byte is tried."""
    good, expected = token(), claims()
    for position in range(0, len(good), 2):
        changed = bytearray(good)
        changed[position] ^= 1 << position % 8
        try:
            found = claims(bytes(changed))
        except EvidenceError:
            continue
        assert found == expected, position


def test_no_truncation_is_accepted() -> None:
    good = token()
    for size in range(0, len(good), 3):
        malformed(good[:size])


@settings(max_examples=150)
@given(st.data())
def test_no_splice_gives_another_exception(data: st.DataObject) -> None:
    good = token()
    start, end = sorted((data.draw(st.integers(0, len(good))), data.draw(st.integers(0, len(good)))))
    changed = good[:start] + data.draw(st.binary(max_size=12)) + good[end:]
    value_or_malformed(lambda: cca_format.parse(changed))
    with contextlib.suppress(EvidenceError):
        assert claims(changed) == claims()


@settings(max_examples=100)
@given(
    st.sampled_from([10, 256, 265, 2395, 2396, 2399, 2401, 2402, 44235, 44236, 44237, 44238, 44239, 44240, 44243]),
    st.none() | st.binary() | st.integers(-(2**64), 2**64 - 1) | st.text("ab") | st.lists(st.binary(), max_size=4),
)
def test_no_value_of_another_type_gives_another_exception(claim: int, value: Any) -> None:
    for data in (token(platform_changes={claim: value}), token(realm_changes={claim: value})):
        value_or_malformed(functools.partial(cca_format.parse, data))
        with contextlib.suppress(EvidenceError):
            claims(data)


def test_the_generator_is_deterministic_and_says_what_it_is() -> None:
    assert token() == token()
    assert soft.endorsements(NOW) == soft.endorsements(NOW)
    assert b"protects nothing" in MACHINE.implementation_id
    assert b"protects-nothing" in token()
    assert "protects nothing" in soft.NOTICE


def test_a_second_reader_sees_the_same_token() -> None:
    data = token(tag=399)
    ours = cca_format.parse(data)
    collection = cbor2.loads(data)
    assert collection.tag == 399
    theirs = cbor2.loads(cbor2.loads(collection.value[44241]).value[2])
    assert (ours.realm.challenge, ours.realm.initial) == (theirs[10], theirs[44238])


# --- files, and the public token --------------------------------------------------------------------------------------


def test_a_case_says_what_came_out() -> None:
    files = {"token": token(), "cpak": MACHINE.spki()}
    found = observe(Case("cca", files, NOW))
    assert found.facts == {"authentic": True, "debug": False}
    assert [step.state for step in found.steps] == ["passed"] * 7 + ["not done"]
    assert found.fields["support"] == "experimental"
    assert "protects nothing" in found.fields["platform key"]
    other = observe(Case("cca", {**files, "cpak": soft.platform(label="mallory").spki()}, NOW))
    assert other.facts == {"authentic": False, "debug": False}
    assert other.error is not None
    assert other.error.reasons[0].where == "cca.3-platform"
    for broken in ({"token": b"\x00", "cpak": b""}, {}, {"token": token()}, {"token": token(), "cpak": b"x"}):
        assert observe(Case("cca", broken, NOW)).facts["authentic"] is False


def test_a_case_pins_the_key_that_it_names() -> None:
    real = soft.platform("real", label="a vendor's key")
    found = observe(Case("cca", {"token": token(real), "cpak": real.spki()}, NOW))
    assert found.claims is not None
    assert found.claims.tee == "cca"
    assert "platform key" not in found.fields


@pytest.mark.parametrize(
    ("nonce", "good"),
    [(CHALLENGE, True), (CHALLENGE[:32], False), (b"", False), (bytes(65), False)],
)
def test_a_case_with_a_nonce_is_judged_by_it(nonce: bytes, good: bool) -> None:
    found = observe(Case("cca", {"token": token(), "cpak": MACHINE.spki()}, NOW, nonce=nonce))
    assert found.facts["authentic"] is good
    assert found.steps[-1].state == ("passed" if good else "failed")


def test_a_short_nonce_is_padded_with_zeros() -> None:
    data = token(challenge=b"\x07" * 32 + bytes(32))
    case = Case("cca", {"token": data, "cpak": MACHINE.spki()}, NOW, nonce=b"\x07" * 32)
    assert observe(case).facts["authentic"] is True


FOLDER = SHARED / "vectors" / "attestation"
MANIFEST = FOLDER / "manifest.json"
ENTRIES: list[dict[str, Any]] = (
    [entry for entry in json.loads(MANIFEST.read_text()) if entry["kind"] == "cca"] if MANIFEST.exists() else []
)
real = pytest.mark.skipif(not ENTRIES, reason="third-party vectors are not beside the repository")


def case_of(entry: dict[str, Any]) -> Case:
    files = {role: (FOLDER / path).read_bytes() for role, path in entry["files"].items()}
    return Case("cca", files, datetime(2025, 6, 1, tzinfo=UTC), entry["name"])


@real
@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["name"] for entry in ENTRIES])
def test_the_expected_outcome_of_every_public_token(entry: dict[str, Any]) -> None:
    found = observe(case_of(entry))
    assert {name: found.facts[name] for name in entry["expect"]} == entry["expect"]
    assert found.claims is not None
    assert found.claims.tee == "soft-cca"
    assert spki_sha256(case_of(entry).files["cpak"]) == ARM_TEST_CPAK


@real
def test_a_flipped_bit_of_the_realm_measurement_is_refused() -> None:
    case = case_of(ENTRIES[0])
    good = case.files["token"]
    rim = cca_format.parse(good).realm.initial
    at = good.index(rim)
    for bit in range(0, 8 * len(rim), 37):
        changed = bytearray(good)
        changed[at + bit // 8] ^= 1 << bit % 8
        found = observe(replace(case, files={**case.files, "token": bytes(changed)}))
        assert found.error is not None
        assert found.error.reasons[0].where == "cca.5-realm"


@real
def test_flips_in_a_public_token_never_change_what_is_accepted() -> None:
    case = case_of(ENTRIES[0])
    expected = observe(case).claims
    good = case.files["token"]
    for position in range(0, len(good), 13):
        changed = bytearray(good)
        changed[position] ^= 1 << position % 8
        assert observe(replace(case, files={**case.files, "token": bytes(changed)})).claims in (None, expected)


def test_another_curve_of_the_platform_key_fits_its_algorithm_only() -> None:
    key = ec.derive_private_key(7, ec.SECP256R1())
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    pin = Roots(also={"cca": frozenset({spki_sha256(spki)})})
    refused("cca.3-platform", endorsements=endorsed(spki), roots=pin)
    entries = cose.loads(token(), limit=1 << 14).value
    payload = cose.sign1(entries[44234][1], limit=1 << 14).payload
    es256 = cose.sign(key, payload, algorithm=-7)
    data = cose.dumps(cose.Tagged(907, {44234: [263, es256], 44241: entries[44241]}))
    assert claims(data, endorsements=endorsed(spki), roots=pin).tee == "cca"


def test_the_page_has_a_row_for_every_step() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "attestation" / "cca.md").read_text()
    assert re.findall(r"^\| `(cca\.\d+-\w+)` \|", page, re.MULTILINE) == list(STEPS)
    assert ARM_TEST_CPAK in page
    assert all(profile in page for profile in cca_format.PROFILES)
    assert "(experimental)" in page.splitlines()[0]
