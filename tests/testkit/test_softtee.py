"""Every soft platform: its evidence is authentic, bound, accepted where soft is wanted, and never elsewhere; each option is a fault."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from cloister.attestation.appraise import appraise
from cloister.attestation.binding import check_binding
from cloister.attestation.events import workload_of
from cloister.attestation.types import IDENTITIES, Claims, Policy, base
from cloister.attestation.verify import verify
from cloister.errors import EvidenceError
from cloister.testkit.softtee import KINDS, NOW, STATUSES, SoftPlatform, binding, soft_policy, workload

RATED = ("tdx", "sgx")


def policy_of(claims: Claims, **fields: Any) -> Policy:
    boot = frozenset({claims.boot}) if claims.kind == "attested-host" and claims.boot else frozenset()
    return soft_policy(kind=claims.kind, boot=boot, **fields)


@pytest.mark.parametrize("gpus", [(), ("one", "two")], ids=["cpu", "cpu+2gpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_authentic_bound_and_soft(kind: str, gpus: tuple[str, ...]) -> None:
    platform = SoftPlatform(kind=kind, gpus=gpus).run(workload())
    evidence = platform.evidence()
    claims = verify(evidence, platform.endorsements, platform.roots, now=platform.now)
    assert claims.tee == f"soft-{kind}"
    assert check_binding(claims, binding().over(evidence.devices)) == ()
    assert claims.measurements[claims.launch] == platform.launch
    assert workload_of(claims) == workload()
    assert appraise(claims, policy_of(claims, gpu="confidential" if gpus else "none"), today=NOW.date()) == ()
    assert len({device.platform["ueid"] for device in claims.devices}) == len(gpus)
    # and no policy for hardware takes it
    assert appraise(claims, policy_of(claims, accept=frozenset({kind}))) != ()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_it_is_believed_without_the_word(kind: str) -> None:
    platform = SoftPlatform(kind=kind)
    with pytest.raises(EvidenceError):
        verify(platform.evidence(), platform.endorsements, replace(platform.roots, soft=False), now=NOW)


@pytest.mark.parametrize("kind", KINDS)
def test_what_always_says_which_machine_it_is_says_so(kind: str) -> None:
    """`IDENTITIES` is what a deny list relies on."""
    claims = SoftPlatform(kind=kind, gpus=("one",)).claims()
    for one in (claims, *claims.devices):
        for name, tees in IDENTITIES.items():
            if base(one.tee) in tees:
                assert one.platform.get(name), f"{one.tee} shows no {name}"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("azure")])
def test_another_name_is_another_machine(kind: str) -> None:
    one, two = SoftPlatform(kind=kind).claims(), SoftPlatform("two", kind=kind).claims()
    ids = {name for name in IDENTITIES if name in one.platform} - {"fmspc"}
    assert ids
    assert all(one.platform[name] != two.platform[name] for name in ids)
    deny = frozenset((name, one.platform[name]) for name in ids)
    assert appraise(one, policy_of(one, platform_deny=deny)) != ()
    assert appraise(two, policy_of(two, platform_deny=deny)) == ()
    assert appraise(two, policy_of(two, platform_allow=deny)) != ()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tpm"])
def test_debug_is_refused_by_the_verifier_or_by_every_policy(kind: str) -> None:
    try:
        claims = SoftPlatform(kind=kind, debug=True).claims()
    except EvidenceError:
        return
    assert next(reason.where for reason in appraise(claims, policy_of(claims))) == "place.enclave.debug"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cca" and not kind.startswith("azure")])
def test_revoked_is_not_authentic(kind: str) -> None:
    with pytest.raises(EvidenceError) as refused:
        SoftPlatform(kind=kind, revoked=True).claims()
    assert "revoked" in str(refused.value.reasons) + refused.value.message or kind in RATED


@pytest.mark.parametrize("kind", ["tdx", "sgx", "sev-snp", "tpm", "nitro"])
def test_collateral_of_last_year_endorses_nothing_now(kind: str) -> None:
    with pytest.raises(EvidenceError):
        SoftPlatform(kind=kind, issued=NOW - timedelta(days=400)).claims()


@pytest.mark.parametrize("kind", RATED)
@pytest.mark.parametrize("status", STATUSES)
def test_each_tcb_status_reaches_the_policy(kind: str, status: str) -> None:
    if status == "Revoked":
        with pytest.raises(EvidenceError):
            SoftPlatform(kind=kind, status=status).claims()
        return
    claims = SoftPlatform(kind=kind, status=status).claims()
    accepted = appraise(claims, policy_of(claims)) == ()
    assert accepted == (status in ("UpToDate", "SWHardeningNeeded"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_open_gpu_opens_the_machine(kind: str) -> None:
    claims = SoftPlatform(kind=kind, gpus=("one",), debug_gpu=True).claims()
    wheres = [reason.where for reason in appraise(claims, policy_of(claims, gpu="confidential"))]
    assert "place.enclave.gpu0.debug" in wheres
    assert "place.enclave.gpu" in wheres


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_of_another_machine_is_not_bound(kind: str) -> None:
    """Mix and match: each piece is genuine and fresh, and they are not of one machine."""
    mine, theirs = SoftPlatform(kind=kind, gpus=("one",)), SoftPlatform(kind=kind, gpus=("theirs",))
    own, other = mine.evidence(), theirs.evidence()
    endorsements = mine.endorsements | theirs.endorsements
    for devices in (other.devices, (), (*own.devices, *other.devices)):
        mixed = replace(own, devices=devices)
        claims = verify(mixed, endorsements, mine.roots, now=NOW)
        assert check_binding(claims, binding().over(devices)) != (), len(devices)
    with pytest.raises(EvidenceError):  # one device is no two
        verify(replace(own, devices=own.devices * 2), endorsements, mine.roots, now=NOW)
    # a GPU whose nonce is of another exchange
    stale = replace(own, devices=SoftPlatform(kind=kind, gpus=("one",)).evidence(binding(nonce=b"\x09" * 32)).devices)
    claims = verify(stale, endorsements, mine.roots, now=NOW)
    assert "binding.devices.0" in [reason.where for reason in check_binding(claims, binding().over(stale.devices))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "other", [{"nonce": b"\x09" * 32}, {"key": b"\x09" * 1216}, {"peer_key": b"\x09" * 32}, {"purpose": "renew"}]
)
def test_replay_relay_and_diversion_are_unbound(kind: str, other: dict[str, Any]) -> None:
    platform = SoftPlatform(kind=kind, gpus=("one",)).run(workload())
    evidence = platform.evidence(binding(**other))
    claims = verify(evidence, platform.endorsements, platform.roots, now=NOW)
    wheres = [reason.where for reason in check_binding(claims, binding().over(evidence.devices))]
    assert wheres == ["binding.report_data", "binding.devices.0"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "tdy"},
        {"kind": "sev-snp", "status": "OutOfDate"},
        {"kind": "nitro", "label": "x"},
        {"kind": "cca", "revoked": True},
        {"kind": "tpm", "debug": True},
        {"name": "two", "kind": "azure-snp"},
    ],
)
def test_an_option_that_a_kind_does_not_have_is_a_callers_mistake(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        SoftPlatform(**wrong)
