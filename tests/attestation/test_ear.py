"""EAR: what is written is read, only by the right key, for the right nonce, at the right time; soft is never hidden."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import OctKey, OKPKey

from cloister.attestation import ear
from cloister.attestation.appraise import appraise
from cloister.attestation.binding import check_binding
from cloister.attestation.types import Claims, LogRule, Software
from cloister.errors import Reason
from cloister.testkit.softtee import NOW, binding, soft_claims, soft_policy
from tests.attestation.helpers import refusal

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
P256 = ec.derive_private_key(7, ec.SECP256R1())
REAL_POLICY = soft_policy(accept=frozenset({"tdx"}))


def real_claims() -> Claims:
    return soft_claims(tee="tdx")


def issue(claims: Claims | None = None, **change: Any) -> str:
    arguments: dict[str, Any] = {"binding": binding(), "key": KEY, "now": NOW, **change}
    policy = arguments.pop("policy", REAL_POLICY)
    subject = real_claims() if claims is None else claims
    reasons = arguments.pop("reasons", appraise(subject, policy))
    return ear.issue(subject, policy, reasons, **arguments)


def read(token: str, **change: Any) -> ear.Result:
    arguments: dict[str, Any] = {"key": KEY.public_key(), "nonce": binding().nonce, "now": NOW, **change}
    return ear.read(token, **arguments)


def body(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    value: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return value


def sign(claims: dict[str, Any]) -> str:
    return jwt.encode({"alg": "Ed25519"}, claims, OKPKey.import_key(KEY), algorithms=["Ed25519"])


@pytest.mark.parametrize("key", [KEY, P256], ids=["Ed25519", "ES256"])
def test_round_trip(key: ear.SigningKey) -> None:
    result = read(issue(key=key), key=key.public_key())
    assert result == ear.Result(
        status="affirming",
        tee="tdx",
        soft=False,
        vector=dict.fromkeys(ear.VECTOR, 2),
        policy_id=ear.policy_id(REAL_POLICY),
        nonce=binding().nonce,
        key_sha256=hashlib.sha256(binding().key).digest(),
        issued=NOW,
        expires=NOW + timedelta(minutes=5),
        reasons=(),
    )


def test_the_claims_are_those_of_the_draft() -> None:
    claims = body(issue())
    assert claims["eat_profile"] == "tag:github.com,2023:veraison/ear"
    assert set(claims) == {"eat_profile", "iat", "exp", "eat_nonce", "ear.verifier-id", "cnf", "submods"}
    assert set(claims["ear.verifier-id"]) == {"developer", "build"}
    assert claims["submods"]["cpu0"]["ear.status"] == "affirming"
    assert claims["exp"] - claims["iat"] == 300


def test_soft_is_marked_and_never_affirming() -> None:
    token = issue(soft_claims(), policy=soft_policy())
    assert body(token)["cloister.insecure-simulated"] is True
    result = read(token)
    assert (result.status, result.tee, result.soft) == ("warning", "soft-tdx", True)
    assert result.vector["hardware"] == ear.WARNING
    refused = read(issue(soft_claims(), policy=REAL_POLICY))
    assert (refused.status, refused.vector["hardware"]) == ("contraindicated", ear.UNRECOGNISED_HARDWARE)


def test_a_soft_mark_cannot_be_dropped_or_added() -> None:
    soft = body(issue(soft_claims(), policy=soft_policy()))
    del soft["cloister.insecure-simulated"]
    real = body(issue()) | {"cloister.insecure-simulated": True}
    odd = body(issue()) | {"cloister.insecure-simulated": 0}
    for claims in (soft, real, odd):
        assert refusal(read, sign(claims)).code == "evidence-malformed"


def test_every_violation_is_in_the_result() -> None:
    claims = replace(real_claims(), debug=True, tcb_status="OutOfDate", report_data=bytes(64))
    reasons = (*appraise(claims, REAL_POLICY), *check_binding(claims, binding()))
    result = read(issue(claims, reasons=reasons))
    assert result.status == "contraindicated"
    assert result.reasons == reasons
    assert result.vector == {
        "instance-identity": 96,
        "configuration": 96,
        "executables": 2,
        "hardware": 96,
        "runtime-opaque": 2,
    }


def test_a_wrong_measurement_speaks_about_executables() -> None:
    policy = replace(REAL_POLICY, reference_values={"mrtd": frozenset({bytes(48)})})
    result = read(issue(policy=policy))
    assert (result.status, result.vector["executables"]) == ("contraindicated", 96)


@pytest.mark.parametrize(
    ("shift", "good"),
    [
        (timedelta(seconds=-31), False),
        (timedelta(seconds=-30), True),
        (timedelta(seconds=329), True),
        (timedelta(seconds=330), False),
        (timedelta(days=400), False),
    ],
)
def test_time_is_the_readers_argument(shift: timedelta, good: bool) -> None:
    token = issue()
    if good:
        assert read(token, now=NOW + shift).status == "affirming"
    else:
        error = refusal(read, token, now=NOW + shift)
        assert (error.code, error.reasons[0].where) == ("evidence-stale", "ear.4-time")


def test_no_result_lives_longer_than_five_minutes() -> None:
    for lifetime in (timedelta(minutes=5, seconds=1), timedelta(0), timedelta(seconds=-1)):
        with pytest.raises(ValueError, match="lives"):
            issue(lifetime=lifetime)
    long = body(issue()) | {"exp": int(NOW.timestamp()) + 301}
    assert refusal(read, sign(long)).code == "evidence-stale"


def test_another_nonce_is_a_replay() -> None:
    error = refusal(read, issue(), nonce=bytes(32))
    assert (error.code, error.reasons[0].where) == ("evidence-stale", "ear.5-nonce")


def test_another_key_or_algorithm_is_refused() -> None:
    """`alg` in the header is the sender's word: none, HMAC with the public key, and key type confusion all fail."""
    public = KEY.public_key().public_bytes_raw()
    claims = body(issue())
    header = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode()
    forged = [
        header + "." + issue().split(".")[1] + ".",
        jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(public), algorithms=["HS256"]),
        issue(key=P256),
        issue(key=Ed25519PrivateKey.from_private_bytes(bytes(32))),
        issue() + "A",
        issue()[:-4] + "AAAA",
        "",
        "a.b.c",
        "é" * 20,
    ]
    for token in forged:
        error = refusal(read, token)
        assert (error.code, error.reasons[0].where) == ("evidence-not-authentic", "ear.2-signature")


def test_size_is_bounded() -> None:
    assert refusal(read, "a" * (ear.LIMIT + 1)).reasons[0].where == "ear.1-size"


def _cpu(**change: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda claims: claims | {"submods": {"cpu0": claims["submods"]["cpu0"] | change}}


@pytest.mark.parametrize(
    "fault",
    [
        lambda claims: {},
        lambda claims: claims | {"eat_profile": "tag:other"},
        lambda claims: claims | {"iat": "now"},
        lambda claims: claims | {"exp": 1.5},
        lambda claims: claims | {"exp": 10**30},
        lambda claims: claims | {"eat_nonce": "***"},
        lambda claims: claims | {"eat_nonce": claims["eat_nonce"] + "="},
        lambda claims: claims | {"cnf": {}},
        lambda claims: claims | {"submods": {}},
        lambda claims: claims | {"submods": []},
        _cpu(**{"ear.status": "fine"}),
        _cpu(**{"ear.trustworthiness-vector": {"hardware": "2"}}),
        _cpu(**{"cloister.reasons": [1]}),
        _cpu(**{"cloister.tee": None}),
    ],
)
def test_one_fault_in_a_signed_result_is_malformed(fault: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    error = refusal(read, sign(fault(body(issue()))))
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", "ear.3-form")


@given(st.text(alphabet="eyJABC._-019", max_size=80))
def test_arbitrary_text_is_refused(token: str) -> None:
    assert refusal(read, token).code == "evidence-not-authentic"


def test_the_policy_id_changes_with_every_field() -> None:
    changes: list[dict[str, Any]] = [
        {"where": "place.other"},
        {"kind": "attested-host"},
        {"accept": frozenset({"tdx", "sev-snp"})},
        {"min_tcb": (2026, 8)},
        {"debug": True},
        {"gpu": "confidential"},
        {"boot": frozenset({"sha256:a"})},
        {"scheme": "ckks-128"},
        {"tcb_statuses": frozenset({"UpToDate"})},
        {"deny_advisories": frozenset({"INTEL-SA-1"})},
        {"reference_values": {"mrtd": frozenset({bytes(48)})}},
        {
            "software": (
                Software("a", measurements={"mrtd": frozenset({bytes(48)})}, log=(LogRule(1, frozenset({b"d"})),)),
            )
        },
        {"min_svn": {"sev-snp": {"snp": 22}}},
        {"require": {"sev-snp": {"smt": False}}},
        {"max_tcb_age": timedelta(days=180)},
        {"platform_allow": frozenset({("ppid", "aa")})},
        {"platform_deny": frozenset({("ppid", "aa")})},
        {"gpu_allow": frozenset({("ueid", "aa")})},
        {"require_attested_boot": True},
    ]
    assert {next(iter(change)) for change in changes} == set(REAL_POLICY.__dataclass_fields__)
    ids = {ear.policy_id(replace(REAL_POLICY, **change)) for change in changes}
    assert len(ids | {ear.policy_id(REAL_POLICY)}) == len(changes) + 1


def test_callers_mistakes() -> None:
    naive = datetime(2026, 11, 20)  # noqa: DTZ001 - the mistake that is tested
    with pytest.raises(ValueError, match="time zone"):
        issue(now=naive)
    with pytest.raises(ValueError, match="time zone"):
        read(issue(), now=naive)
    with pytest.raises(ValueError, match="P-256"):
        issue(key=ec.derive_private_key(7, ec.SECP384R1()))


def test_the_wall_clock_is_never_asked() -> None:
    """A result of long ago reads well at its own time, which no clock of this machine shows."""
    then = datetime(2031, 1, 1, tzinfo=UTC)
    assert read(issue(now=then), now=then).issued == then
    past = datetime(2001, 1, 1, tzinfo=UTC)
    assert read(issue(now=past), now=past).issued == past


# --- composite evidence: one submodule for each part --------------------------------------------------------------------

GPU = Claims(
    "device",
    "nvidia-gpu",
    debug=False,
    tcb_status="NotRated",
    report_data=binding().qualifying_data(),
    gpu="confidential",
)
TPM = replace(GPU, tee="tpm", gpu="none")
BOUND = binding(devices=(b"\x0a" * 32, b"\x0b" * 32, b"\x0c" * 32))


def machine(*devices: Claims) -> Claims:
    return replace(
        real_claims(),
        devices=devices,
        gpu="confidential" if devices else "none",
        report_data=binding(devices=BOUND.devices[: len(devices)]).report_data(),
    )


def judged(claims: Claims, policy: Any = REAL_POLICY, bound: Any = BOUND) -> ear.Result:
    return read(issue(claims, policy=policy, reasons=(*appraise(claims, policy), *check_binding(claims, bound))))


def test_each_device_has_its_own_vector_and_status() -> None:
    claims = machine(GPU, TPM, GPU)
    result = judged(claims)
    assert result.status == "affirming"
    assert {name: part.tee for name, part in result.devices.items()} == {
        "gpu0": "nvidia-gpu",
        "tpm0": "tpm",
        "gpu1": "nvidia-gpu",
    }
    assert result.devices["gpu1"].vector == dict.fromkeys(ear.VECTOR, 2)
    assert result.devices["tpm0"].vector["runtime-opaque"] == ear.NO_CLAIM


def test_the_worst_part_is_the_status_of_the_whole() -> None:
    result = judged(machine(GPU, TPM, replace(GPU, debug=True)))
    assert result.status == "contraindicated"
    assert result.vector == dict.fromkeys(ear.VECTOR, 2)
    assert [part.status for part in result.devices.values()] == ["affirming", "affirming", "contraindicated"]
    assert result.devices["gpu1"].vector["configuration"] == ear.CONTRAINDICATED
    assert [reason.where for reason in result.devices["gpu1"].reasons] == ["place.enclave.gpu1.debug"]


def test_a_device_that_is_not_bound_is_another_machines() -> None:
    result = judged(machine(GPU, replace(TPM, report_data=bytes(32)), GPU))
    assert result.devices["tpm0"].vector["instance-identity"] == ear.CONTRAINDICATED
    assert result.devices["gpu0"].status == "affirming"


def test_a_soft_device_marks_the_result() -> None:
    mixed = machine(replace(GPU, tee="soft-nvidia-gpu"), TPM, GPU)
    token = issue(mixed, policy=soft_policy(accept=frozenset({"tdx", "simulated"})), reasons=())
    assert body(token)["cloister.insecure-simulated"] is True
    result = read(token)
    assert (result.soft, result.status, result.tee) == (True, "warning", "tdx")
    unwanted = judged(mixed)
    assert unwanted.status == "contraindicated"
    assert unwanted.devices["gpu0"].vector["hardware"] == ear.UNRECOGNISED_HARDWARE


def test_the_memory_of_an_attested_host_is_open_to_its_operator() -> None:
    host = replace(real_claims(), kind="attested-host", tee="tpm", boot="sha256:a")
    policy = replace(REAL_POLICY, kind="attested-host", accept=frozenset({"tpm"}), boot=frozenset({"sha256:a"}))
    result = judged(host, policy, binding())
    assert (result.status, result.vector["runtime-opaque"]) == ("warning", ear.WARNING)


@pytest.mark.parametrize(
    ("rule", "claim"),
    [
        ("min_svn.snp", "hardware"),
        ("max_tcb_age", "hardware"),
        ("require.smt", "configuration"),
        ("platforms.allow", "instance-identity"),
        ("platforms.deny", "instance-identity"),
        ("gpus.allow", "instance-identity"),
        ("boot_log", "executables"),
        ("software.a.mrtd", "executables"),
        ("software.a.debug", "executables"),
    ],
)
def test_every_rule_speaks_about_one_claim(rule: str, claim: str) -> None:
    result = read(issue(reasons=(Reason(f"place.enclave.{rule}", "x", "y"),)))
    assert {name for name, value in result.vector.items() if value == ear.CONTRAINDICATED} == {claim}


def test_many_long_reasons_still_fit() -> None:
    devices = tuple(replace(GPU, tcb_status="x" * 5000) for _ in range(16))
    reasons = tuple(Reason(f"place.enclave.gpu{n % 16}.tcb_status", "x" * 5000, "y" * 5000) for n in range(2000))
    result = read(issue(replace(real_claims(), devices=devices), reasons=reasons))
    assert sum(len(part.reasons) for part in result.devices.values()) == ear.MAX_REASONS
    assert all(part.status == "contraindicated" for part in result.devices.values())  # also of those left out


@pytest.mark.parametrize(
    "others",
    [
        {"gpu0": {}},
        {"gpu": None},
        {"gpu0": []},
        {f"gpu{n}": None for n in range(17)},
        {"../x": None},
    ],
)
def test_other_submodules_are_malformed(others: dict[str, Any]) -> None:
    claims = body(issue())
    cpu = claims["submods"]["cpu0"]
    submods = {"cpu0": cpu} | {name: cpu if value is None else value for name, value in others.items()}
    assert refusal(read, sign(claims | {"submods": submods})).code == "evidence-malformed"


def test_parts_of_different_policies_are_no_result() -> None:
    claims = body(issue())
    other = claims["submods"]["cpu0"] | {"ear.appraisal-policy-id": "sha256:0"}
    assert refusal(read, sign(claims | {"submods": claims["submods"] | {"gpu0": other}})).code == "evidence-malformed"
