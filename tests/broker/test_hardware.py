"""What a broker wants of any hardware: its launch measurement, its devices, its machine, how long its evidence lasts, its roots."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cloister.attestation.appraise import appraise
from cloister.attestation.binding import Binding
from cloister.attestation.edge.attester import attest
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.roots import Roots
from cloister.attestation.soft import cca as soft_cca
from cloister.attestation.soft import intel
from cloister.attestation.types import Claims, Evidence
from cloister.broker import decide, wire
from cloister.broker.client import Trust, root_pins
from cloister.broker.log import leaf as leaves
from cloister.contract.parse import parse
from cloister.errors import DeniedError, EvidenceError, InputError
from cloister.testkit.softtee import KINDS, MEASUREMENT, NOW, SOFT_ROOTS, SoftPlatform, soft_claims
from tests.broker.test_decide import ASK, BINDING, CONTRACT, HOLDINGS, KNOWN, PAIR, WORKLOAD, WORLD, judged, refused
from tests.broker.world import TRAINER

GPU = Claims(
    "device",
    "nvidia-gpu",
    debug=False,
    tcb_status="NotRated",
    gpu="confidential",
    platform={"ueid": "a1", "arch": "HOPPER"},
)
MACHINE = replace(soft_claims(), tee="tdx", platform={"ppid": "0a" * 16, "sgx_type": "1"}, devices=(GPU,))


def node_rules(claims: Claims, accepted: frozenset[bytes] = frozenset({MEASUREMENT})) -> list[str]:
    trusted = decide.Trusted(Roots(), SoftPlatform().endorsements, accepted)
    return [reason.where for reason in appraise(claims, decide.software_policy(claims, trusted))]


@pytest.mark.parametrize("launch", ["mrtd", "mrenclave", "measurement", "pcr0", "rim"])
def test_the_launch_measurement_of_any_hardware_is_judged(launch: str) -> None:
    claims = replace(MACHINE, launch=launch, measurements={launch: MEASUREMENT, "other": b"\x09" * 48})
    assert node_rules(claims) == []
    assert node_rules(replace(claims, measurements={launch: b"\x09" * 48})) == [f"node.{launch}"]
    assert node_rules(claims, frozenset()) == [f"node.{launch}"]
    # another measurement of that value is not what was started
    assert node_rules(replace(claims, measurements={launch: b"\x09" * 48, "mrconfigid": MEASUREMENT})) == [
        f"node.{launch}"
    ]


def test_hardware_without_a_launch_measurement_is_refused() -> None:
    assert node_rules(replace(MACHINE, launch="")) == ["node.launch"]
    assert node_rules(replace(MACHINE, launch="", measurements={"launch": MEASUREMENT})) == ["node.launch"]


def test_a_device_alone_is_no_node() -> None:
    assert node_rules(replace(GPU, launch="vbios", measurements={"vbios": MEASUREMENT})) == ["node.kind"]


def test_a_lease_ends_with_the_evidence_under_it() -> None:
    now = NOW
    early = now + timedelta(minutes=4)
    assert decide.valid_until(replace(MACHINE, valid_until=None)) is None
    assert decide.valid_until(replace(MACHINE, valid_until=early, devices=())) == early
    both = replace(MACHINE, valid_until=now + timedelta(days=1), devices=(replace(GPU, valid_until=early),))
    assert decide.valid_until(both) == early


def test_a_release_near_the_end_of_collateral_is_shorter() -> None:
    """Its lease is never longer than what vouches for the machine."""
    platform = SoftPlatform(issued=NOW - timedelta(days=30) + timedelta(minutes=4), lifetime=timedelta(days=30))
    grant = judged(platform)
    assert isinstance(grant, decide.Grant)
    if grant.claims.valid_until is None:
        pytest.skip("this verifier does not say when its collateral ends")
    assert grant.expires == grant.claims.valid_until <= NOW + timedelta(minutes=4)
    assert grant.renew_after - NOW == (grant.expires - NOW) / 2


def test_a_renewal_from_another_machine_is_refused() -> None:
    """Whoever shows the key of a lease on another machine has a copy of a key that should not leave its TEE."""
    machine, twin = SoftPlatform().run(WORKLOAD), SoftPlatform("twin").run(WORKLOAD)
    ask = wire.RenewAsk("l-" + "0" * 32)
    binding = replace(BINDING, purpose="renew", request=ask.hashed())
    held = decide.LeaseFacts(
        CONTRACT.id, "train", ("xrays",), (), wire.sha256(PAIR.public), TRAINER, "offline", "L1",
        NOW + timedelta(minutes=1), WORKLOAD.profile, machine.claims(),
    )  # fmt: skip

    def renewed(platform: SoftPlatform, facts: decide.LeaseFacts = held) -> Any:
        return decide.renew(
            facts,
            attest(platform.attester, binding),
            binding,
            nonce_issued=NOW,
            known=KNOWN,
            holdings=HOLDINGS,
            trusted=decide.Trusted(SOFT_ROOTS, platform.endorsements, frozenset({MEASUREMENT})),
            lease=timedelta(minutes=10),
            now=NOW,
        )

    assert isinstance(renewed(machine), decide.Grant)
    refusal = renewed(twin)
    assert isinstance(refusal.error, DeniedError)
    assert refusal.error.code == "lease-refused"
    assert [reason.where for reason in refusal.error.reasons] == ["lease.machine"]
    # after a restart the broker knows the lease but not the machine, once
    assert isinstance(renewed(twin, replace(held, claims=None)), decide.Grant)


def test_a_contracts_software_comes_in_addition_to_the_brokers_list() -> None:
    error = refused(trusted=decide.Trusted(SOFT_ROOTS, SoftPlatform().endorsements, frozenset({b"\x09" * 48})))
    assert isinstance(error, EvidenceError)
    assert [reason.where for reason in error.reasons] == ["node.mrtd"]


# --- every kind of hardware, end to end through the decision ----------------------------------------------------------

HOST_KINDS = ("tpm",)


def place_of(platform: SoftPlatform) -> str:
    """A place that wants this very kind of hardware, played by software."""
    claims = platform.claims()
    if claims.kind == "attested-host":
        return f'kind = "attested-host", boot = ["{claims.boot}"]'
    gpu = ', gpu = "confidential"' if claims.devices else ""
    return f'kind = "tee", accept = ["simulated"]{gpu}'


def released(
    platform: SoftPlatform, *, evidence: Evidence | None = None, more: Endorsements | None = None, **changed: Any
) -> Any:
    """Judge a release by `platform` under a contract with `place_of` it."""
    text = WORLD.contract(accept='"simulated"').decode()
    assert text.count('kind = "tee", accept = ["simulated"]') == 1
    contract = parse(
        text.replace('kind = "tee", accept = ["simulated"]', changed.pop("place", place_of(platform))).encode(),
        name="t",
    )
    ask = wire.ReleaseAsk(contract.id, "train", ("xrays",), ("detector",))
    binding = replace(BINDING, contract=contract.id, request=ask.hashed())
    return decide.release(
        ask,
        attest(platform.attester, changed.pop("bound", binding)) if evidence is None else evidence,
        binding,
        nonce_issued=NOW,
        known=replace(KNOWN, contract=contract),
        holdings=HOLDINGS,
        trusted=decide.Trusted(
            SOFT_ROOTS,
            platform.endorsements | (more or Endorsements()),
            changed.pop("software", frozenset({platform.launch})),
        ),
        lease=timedelta(minutes=10),
        now=NOW,
    )


def asked_for(platform: SoftPlatform) -> Binding:
    """The binding of `released`."""
    text = WORLD.contract(accept='"simulated"').decode()
    contract = parse(text.replace('kind = "tee", accept = ["simulated"]', place_of(platform)).encode(), name="t")
    ask = wire.ReleaseAsk(contract.id, "train", ("xrays",), ("detector",))
    return replace(BINDING, contract=contract.id, request=ask.hashed())


def wheres_of(verdict: Any) -> list[str]:
    """What was refused: the attacker got nothing else."""
    assert isinstance(verdict, decide.Refusal)
    return [reason.where for reason in verdict.error.reasons]


def node(kind: str, *gpus: str, **options: Any) -> SoftPlatform:
    """A soft node of `kind` that has measured its workload."""
    return SoftPlatform(kind=kind, gpus=gpus, **options).run(WORKLOAD)


@pytest.mark.parametrize("gpus", [(), ("one", "two")], ids=["cpu", "cpu+2gpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gets_its_keys(kind: str, gpus: tuple[str, ...]) -> None:
    platform = node(kind, *gpus)
    if kind in HOST_KINDS:  # a contract never takes a soft host: nothing there could name it
        assert wheres_of(released(platform)) == ["place.enclave.kind"]
        return
    grant = released(platform)
    assert isinstance(grant, decide.Grant)
    assert grant.claims.valid_until is None or grant.expires <= grant.claims.valid_until


@pytest.mark.parametrize("kind", KINDS)
def test_other_software_on_any_kind_gets_nothing(kind: str) -> None:
    platform = node(kind)
    launch = platform.claims().launch
    assert f"node.{launch}" in wheres_of(released(platform, software=frozenset({bytes(48), bytes(32)})))
    assert f"node.{launch}" in wheres_of(
        released(node(kind, measurement=b"\x0e" * 48), software=frozenset({platform.launch}))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_mix_and_match_of_any_kind_gets_nothing(kind: str) -> None:
    """The CPU of one machine with the GPU of another, one GPU more, one less, or the same one twice."""
    mine, theirs = node(kind, "one"), node(kind, "theirs")
    bound = asked_for(mine)
    own, other = attest(mine.attester, bound), attest(theirs.attester, bound)
    for devices in (other.devices, (), own.devices + other.devices):
        verdict = released(mine, evidence=replace(own, devices=devices), more=theirs.endorsements)
        assert {where for where in wheres_of(verdict) if where.startswith("binding.")}
        assert verdict.error.code == "evidence-unacceptable"
    twice = released(mine, evidence=replace(own, devices=own.devices * 2))
    assert wheres_of(twice)[0].startswith("evidence.devices"), "one device is no two"


@pytest.mark.parametrize("kind", KINDS)
def test_replay_relay_and_diversion_of_any_kind_get_nothing(kind: str) -> None:
    platform = node(kind, "one")
    bound = asked_for(platform)
    for other in (
        replace(bound, nonce=b"\x0e" * 32),  # evidence of another exchange
        replace(bound, key=b"\x0e" * 1216),  # a genuine TEE attests for somebody else
        replace(bound, peer_key=b"\x0e" * 32),  # it talks to somebody in between
        replace(bound, contract="sha256:" + "0e" * 32),
        replace(bound, phase="serve"),
        replace(bound, request=b"\x0e" * 32),
        replace(bound, purpose="service"),
    ):
        wheres = wheres_of(released(platform, bound=other))
        assert wheres[:2] == ["binding.report_data", "binding.devices.0"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in HOST_KINDS])
def test_a_cuckoo_of_any_kind_gets_nothing(kind: str) -> None:
    """A place that lists its machines is not touched by a genuine machine of somebody else."""
    platform = node(kind)
    listed = 'kind = "tee", accept = ["simulated"], platforms = { allow = ["csp_id:CN=ours"] }'
    bound = attest_under(platform, listed)
    assert wheres_of(bound) == ["place.enclave.platforms.allow"]


def attest_under(platform: SoftPlatform, place: str) -> Any:
    """Judge a release under a contract with this place, bound to it."""
    text = WORLD.contract(accept='"simulated"').decode().replace('kind = "tee", accept = ["simulated"]', place)
    contract = parse(text.encode(), name="t")
    ask = wire.ReleaseAsk(contract.id, "train", ("xrays",), ("detector",))
    binding = replace(BINDING, contract=contract.id, request=ask.hashed())
    return released(platform, place=place, evidence=attest(platform.attester, binding))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in HOST_KINDS])
def test_a_contracts_build_list_holds_for_any_kind(kind: str) -> None:
    platform = node(kind)
    launch = platform.claims().launch
    place = 'kind = "tee", accept = ["simulated"], software = [{{ label = "ours", measurements = {{ {} = ["{}"] }} }}]'
    assert isinstance(attest_under(platform, place.format(launch, platform.launch.hex())), decide.Grant)
    refused = wheres_of(attest_under(platform, place.format(launch, "0e" * 48)))
    assert refused == [f"place.enclave.software.ours.{launch}"]


def test_a_renewal_after_a_reset_is_refused() -> None:
    """The TPM counts it, and the key that the lease was given to was in memory."""
    before = soft_claims(svns={"reset_count": 1, "restart_count": 0})
    for after in ({"reset_count": 2, "restart_count": 0}, {"reset_count": 1, "restart_count": 1}):
        assert decide._machine(before) != decide._machine(replace(before, svns=after))
    assert decide._machine(before) == decide._machine(replace(before, svns={**before.svns, "firmware": 9}))


# --- what the log says ------------------------------------------------------------------------------------------------


def test_entries_name_type_launch_and_machine() -> None:
    from cloister.broker.keeper import _who

    who = _who(MACHINE)
    assert who == {
        "tee": "tdx",
        "launch": f"mrtd={MACHINE.measurements['mrtd'].hex()}",
        "machine": (f"ppid:{'0a' * 16}", "ueid:a1"),
    }
    mixed = _who(replace(MACHINE, devices=(replace(GPU, tee="soft-nvidia-gpu"),)))
    assert mixed["tee"] == "soft-tdx"  # whatever is soft of it makes all of it soft
    assert _who(None) == {"tee": "", "launch": "", "machine": ()}


def test_what_hardware_says_always_fits_an_entry() -> None:
    from cloister.broker.keeper import _who

    odd = replace(
        MACHINE,
        launch="rim",
        measurements={"rim": b"\x01" * 64},
        platform={"ppid": "0a" * 16, "module_id": "i-0 \u202e\n" + "x" * 500, "csp_id": "CN=a, O=\u00e9"},
        devices=tuple(
            replace(GPU, platform={"ueid": f"{n:x}", "udid": "b" * 300, "device_key": "c"}) for n in range(40)
        ),
    )
    entry = leaves.LeaseRenewed(
        time=datetime(2026, 1, 1, tzinfo=UTC),
        lease="l-1",
        evidence="sha256:" + "00" * 32,
        expires=datetime(2026, 1, 1, tzinfo=UTC),
        **_who(odd),
    )
    assert leaves.parse(entry.encode()) == entry
    assert len(entry.machine) == leaves.MAX_IDENTITIES
    assert len(entry.encode()) < 16 * 1024


# --- roots ------------------------------------------------------------------------------------------------------------


def config(*roots: str) -> wire.BrokerConfig:
    """A broker's configuration that believes `roots`."""
    values: dict[str, Any] = {
        "version": 1,
        "origin": "a",
        "log_key": "k",
        "node_measurements": (MEASUREMENT,),
        "roots": roots,
        "allow_soft": False,
        "lease_s": 600,
    }
    values |= {name: False for name in wire.BrokerConfig.FIELDS if name not in values}
    return wire.BrokerConfig(**values)


def trust(**fields: Any) -> Trust:
    return Trust(fields.pop("roots", Roots()), frozenset({MEASUREMENT}), **fields)


def test_a_broker_that_believes_a_strange_root_is_refused() -> None:
    """Its operator could make any machine with it."""
    pin = "ab" * 32
    assert trust().appraise_config(config()) == ()
    (reason,) = trust().appraise_config(config(f"tpm:{pin}"))
    assert (reason.where, reason.found) == ("broker.roots", f"tpm:{pin}")
    known = trust(roots=Roots(also={"tpm": frozenset({pin})}))
    assert known.appraise_config(config(f"tpm:{pin}")) == ()
    assert known.appraise_config(config(f"sev-snp:{pin}")) != ()  # believed for one kind is not believed for another
    assert known.appraise_config(config(f"tpm:{pin}", f"tpm:{'cd' * 32}")) != ()


def test_both_faults_of_a_configuration_are_told() -> None:
    strange = replace(config(f"tpm:{'ab' * 32}"), node_measurements=(b"\x09" * 48,))
    assert [reason.where for reason in trust().appraise_config(strange)] == ["broker.node_measurements", "broker.roots"]


def test_a_client_names_the_hardware_it_wants_of_a_broker() -> None:
    policy = trust().policy("mrtd")
    assert (policy.accept, policy.reference_values) == (frozenset({"tdx"}), {"mrtd": frozenset({MEASUREMENT})})
    snp = trust(accept=frozenset({"sev-snp"}))
    assert snp.policy("measurement").accept == frozenset({"sev-snp"})
    assert snp.policy("measurement").reference_values == {"measurement": frozenset({MEASUREMENT})}
    assert snp.policy("").reference_values == {"launch": frozenset()}
    # soft needs its own word, also when somebody lists it
    assert "simulated" not in trust(accept=frozenset({"tdx", "simulated"})).policy("mrtd").accept
    assert "simulated" in trust(allow_soft=True).policy("mrtd").accept


def test_root_files_become_pins(tmp_path: Path) -> None:
    authority = intel.authority()
    der, pem = authority.root.public_bytes(_der()), authority.root.public_bytes(_pem())
    (tmp_path / "root.der").write_bytes(der)
    (tmp_path / "root.pem").write_bytes(pem)
    pin = wire.sha256(der).hex()
    found = root_pins([("tdx", str(tmp_path / "root.der")), ("tdx", str(tmp_path / "root.pem"))])
    assert found == {"tdx": frozenset({pin})}
    platform = soft_cca.platform()
    (tmp_path / "cpak.der").write_bytes(platform.spki())
    assert root_pins([("cca", str(tmp_path / "cpak.der"))]) == {"cca": frozenset({wire.sha256(platform.spki()).hex()})}
    (tmp_path / "two.pem").write_bytes(pem * 2)
    (tmp_path / "none").write_bytes(b"x")
    for kind, name in (
        ("tdx", "two.pem"),
        ("tdx", "none"),
        ("tdx", "absent"),
        ("tdy", "root.der"),
        ("cca", "root.pem"),
    ):
        with pytest.raises(InputError):
            root_pins([(kind, str(tmp_path / name))])


def _der() -> Any:
    from cryptography.hazmat.primitives.serialization import Encoding

    return Encoding.DER


def _pem() -> Any:
    from cryptography.hazmat.primitives.serialization import Encoding

    return Encoding.PEM


def test_evidence_above_the_cap_of_a_message_is_no_message() -> None:
    request: dict[str, Any] = {"ask": ASK, "nonce": bytes(32), "key": PAIR.public}
    assert len(wire.ReleaseRequest(**request, evidence=bytes(wire.MAX_EVIDENCE)).encode()) < wire.MAX_REQUEST
    with pytest.raises(ValueError, match="evidence"):
        wire.ReleaseRequest(**request, evidence=bytes(wire.MAX_EVIDENCE + 1))
