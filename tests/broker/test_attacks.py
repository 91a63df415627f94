"""Attacks on the broker by name. Each is refused with the reason that names it, and the honest twin is accepted."""

from __future__ import annotations

import itertools
import ssl
import threading
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest

from cloister.attestation.binding import Binding
from cloister.attestation.edge.attester import SoftTdxAttester
from cloister.attestation.events import WORKLOAD, Workload
from cloister.attestation.evidence import encode as encode_evidence
from cloister.attestation.roots import Roots
from cloister.broker import wire
from cloister.broker.client import BrokerClient, Release, Trust, own_measurement
from cloister.confine.profile import profile
from cloister.crypto import hpke
from cloister.crypto.keys import Secret, digest, mac
from cloister.errors import DeniedError, EvidenceError, InputError, PeerError, WaitingError
from cloister.testkit.broker import RunningBroker, running_broker
from tests.broker.conftest import Clock
from tests.broker.world import TRAINER, VOLUME_ID, XRAYS, Asker, World, detector, node, server_node, trainer_node

_names = (f"attack-{number}" for number in itertools.count())


@dataclass
class Scene:
    """An active contract and one client."""

    world: World
    client: BrokerClient
    contract: str


@pytest.fixture
def scene(broker: RunningBroker) -> Scene:
    world = World()
    client = broker.client()
    return Scene(world, client, world.ready(client, world.contract(name=next(_names))))


def forge(
    scene: Scene, *, attester: SoftTdxAttester | None = None, bound: dict[str, Any] | None = None, **sent: Any
) -> Release | None:
    """Send a release whose evidence is over a binding with `bound` changed, and whose request has `sent` changed."""
    client = scene.client
    pair = hpke.KeyPair.generate()
    ask = wire.ReleaseAsk(scene.contract, "train", ("backbone", "xrays"), ("detector",))
    nonce = sent.pop("nonce", None) or fresh_nonce(client)
    binding = Binding("release", nonce, pair.public, client.broker.spki, ask.contract, ask.phase, ask.hashed())
    binding = replace(binding, **(bound or {}))
    evidence = encode_evidence((attester or trainer_node()).evidence(binding.report_data()))
    request = replace(wire.ReleaseRequest(ask, nonce, pair.public, evidence), **sent)
    reply = wire.ReleaseReply.decode(client._post("release", request.encode()))
    payload = wire.ReleasePayload.decode(pair.open(reply.sealed, info=wire.RELEASE_INFO + binding.encode()))
    return Release(ask.contract, ask.phase, payload.keys, payload.outputs, payload.lease, reply.receipt, pair)


def fresh_nonce(client: BrokerClient) -> bytes:
    return wire.NonceReply.decode(client._post("nonce", b"")).nonce


def wheres(error: Any) -> list[str]:
    return [reason.where for reason in error.reasons]


def test_honest_twin_of_every_forgery(scene: Scene) -> None:
    release = forge(scene)
    assert release is not None
    assert release.keys["xrays"].key == scene.world.xrays_key


# --- evidence ---------------------------------------------------------------------------------------------------------


def test_replayed_nonce(scene: Scene) -> None:
    nonce = fresh_nonce(scene.client)
    forge(scene, nonce=nonce)
    with pytest.raises(EvidenceError) as refused:
        forge(scene, nonce=nonce)
    assert (refused.value.code, wheres(refused.value)) == ("evidence-stale", ["nonce"])


def test_nonce_of_the_attackers_own(scene: Scene) -> None:
    with pytest.raises(EvidenceError) as refused:
        forge(scene, nonce=b"\x01" * 32)
    assert refused.value.code == "evidence-stale"


def test_stale_nonce(scene: Scene, clock: Clock) -> None:
    nonce = fresh_nonce(scene.client)
    clock.ahead = timedelta(seconds=61)
    with pytest.raises(EvidenceError, match="not fresh") as refused:
        forge(scene, nonce=nonce)
    assert refused.value.code == "evidence-stale"


def test_nonce_from_before_the_clock_was_set_back(scene: Scene, clock: Clock) -> None:
    nonce = fresh_nonce(scene.client)
    clock.ahead = timedelta(seconds=-30)
    with pytest.raises(EvidenceError) as refused:
        forge(scene, nonce=nonce)
    assert refused.value.code == "evidence-stale"


def test_relayed_evidence_with_the_attackers_hpke_key(scene: Scene) -> None:
    with pytest.raises(EvidenceError) as refused:
        forge(scene, key=hpke.KeyPair.generate().public)
    assert wheres(refused.value) == ["binding.report_data"]


@pytest.mark.parametrize(
    "bound",
    [
        {"contract": "sha256:" + "00" * 32},
        {"phase": "serve"},
        {"request": b"\x00" * 32},
        {"purpose": "renew"},
        {"purpose": "service"},
        {"peer_key": b"\x55" * 32},
        {"peer_key": bytes(32)},
        {"devices": (b"\x01" * 32,)},
    ],
    ids=["contract", "phase", "request", "renew", "service", "another-brokers-tls-key", "no-tls-key", "devices"],
)
def test_evidence_made_for_something_else(scene: Scene, bound: dict[str, Any]) -> None:
    with pytest.raises(EvidenceError) as refused:
        forge(scene, bound=bound)
    assert (refused.value.code, wheres(refused.value)) == ("evidence-unacceptable", ["binding.report_data"])


def test_request_changed_after_the_evidence(scene: Scene) -> None:
    with pytest.raises(EvidenceError) as refused:
        forge(scene, ask=wire.ReleaseAsk(scene.contract, "train", ("xrays",), ()))
    assert wheres(refused.value) == ["binding.report_data"]


def test_debug_td(scene: Scene) -> None:
    attester = SoftTdxAttester(own_measurement(), debug=True)
    attester.extend(WORKLOAD, Workload(TRAINER, "offline", profile("offline").digest(), "L1").encode())
    with pytest.raises(EvidenceError) as refused:
        forge(scene, attester=attester)
    assert any("debug" in str(reason) for reason in refused.value.reasons)


def test_unknown_node_software(scene: Scene) -> None:
    with pytest.raises(EvidenceError) as refused:
        forge(scene, attester=node(measurement=b"\x99" * 48))
    assert wheres(refused.value) == ["node.mrtd"]


def test_two_workload_events(scene: Scene) -> None:
    attester = trainer_node()
    attester.extend(WORKLOAD, Workload(digest(b"evil"), "none", bytes(32), "L1").encode())
    with pytest.raises(EvidenceError) as refused:
        forge(scene, attester=attester)
    assert wheres(refused.value) == ["events.cloister/workload/1"]


def test_no_workload_event(scene: Scene) -> None:
    with pytest.raises(EvidenceError) as refused:
        forge(scene, attester=SoftTdxAttester(own_measurement()))
    assert wheres(refused.value) == ["events.cloister/workload/1"]


def test_workload_event_that_was_not_extended(scene: Scene) -> None:
    attester = SoftTdxAttester(own_measurement())
    attester.extend(WORKLOAD, Workload(digest(b"evil"), "none", bytes(32), "L1").encode())
    attester._events = trainer_node()._events
    with pytest.raises(EvidenceError) as refused:
        forge(scene, attester=attester)
    assert refused.value.code == "evidence-not-authentic"


def test_flipped_quote_byte(scene: Scene) -> None:
    evidence = bytearray(encode_evidence(trainer_node().evidence(bytes(64))))
    evidence[len(evidence) // 2] ^= 1
    with pytest.raises(EvidenceError):
        forge(scene, evidence=bytes(evidence))


def test_soft_node_where_soft_is_not_allowed(tmp_path: Any) -> None:
    world = World()
    with running_broker(tmp_path / "state", process=False, allow_soft=False) as broker:
        client = broker.client()
        contract = world.ready(client)
        with pytest.raises(EvidenceError) as refused:
            client.release(contract, "train", reads=("xrays",), attester=trainer_node())
        assert refused.value.code == "evidence-not-authentic"


def test_soft_node_under_a_contract_that_does_not_name_simulated(broker: RunningBroker) -> None:
    world, client = World(), broker.client()
    contract = world.ready(client, world.contract(name=next(_names), accept='"tdx"'))
    with pytest.raises(DeniedError) as denied:
        client.release(contract, "train", reads=("xrays",), attester=trainer_node())
    assert wheres(denied.value) == ["place.enclave.accept"]


def test_all_reasons_at_once_and_again_by_id(scene: Scene) -> None:
    wrong = node(digest(b"evil"), "none", "L1")
    with pytest.raises(DeniedError) as denied:
        scene.client.release(scene.contract, "train", reads=("detector", "xrays"), writes=("backbone",), attester=wrong)
    assert wheres(denied.value) == [
        "phase.train.run",
        "code.trainer.sandbox",
        "phase.train.read",
        "phase.train.write",
        "root.detector",
    ]
    record = scene.client.denial(denied.value.denial_id)
    assert [reason.where for reason in record.reasons] == wheres(denied.value)
    assert record.code == digest(b"evil")
    assert record.tee == "soft-tdx"
    assert isinstance(again := record.as_error(), DeniedError)
    assert (again.reasons, again.denial_id) == (denied.value.reasons, denied.value.denial_id)
    assert denied.value.denial_id in denied.value.hint


def test_release_that_asks_for_nothing(scene: Scene) -> None:
    with pytest.raises(DeniedError) as denied:
        scene.client.release(scene.contract, "train", attester=trainer_node())
    assert wheres(denied.value) == ["request"]


def test_other_phases_code_gets_nothing(scene: Scene) -> None:
    with pytest.raises(DeniedError) as denied:
        scene.client.release(scene.contract, "train", reads=("xrays",), attester=server_node())
    assert wheres(denied.value) == ["phase.train.run", "code.trainer.sandbox"]


# --- contracts --------------------------------------------------------------------------------------------------------


def test_missing_signature(broker: RunningBroker) -> None:
    world, client = World(), broker.client()
    world.deposit(client)
    data = world.contract(name=next(_names))
    contract = client.submit_contract(data, name="c.toml").contract
    client.add_signature(contract, world.hospital.sign(data, namespace="contract@cloister"))
    with pytest.raises(WaitingError) as waiting:
        client.release(contract, "train", reads=("xrays",), attester=trainer_node())
    assert [reason.hint for reason in waiting.value.reasons] == ["waiting for vendor"]


def test_signature_of_a_stranger(broker: RunningBroker) -> None:
    world, client = World(), broker.client()
    data = world.contract(name=next(_names))
    contract = client.submit_contract(data, name="c.toml").contract
    with pytest.raises(InputError) as refused:
        client.add_signature(contract, World().hospital.sign(data, namespace="contract@cloister"))
    assert refused.value.code == "signature-invalid"


def test_signature_over_other_bytes_or_for_another_purpose(broker: RunningBroker) -> None:
    world, client = World(), broker.client()
    data = world.contract(name=next(_names))
    contract = client.submit_contract(data, name="c.toml").contract
    for message, namespace in ((data + b" ", "contract@cloister"), (data, "key@cloister")):
        with pytest.raises(InputError) as refused:
            client.add_signature(contract, world.hospital.sign(message, namespace=namespace))
        assert refused.value.code == "signature-invalid"
    assert client.contract_status(contract).signed == ()


def test_other_owners_digest_under_a_contract_of_the_thief(broker: RunningBroker) -> None:
    # the thief owns a contract that names the hospital's volume as its own
    world, thief, client = World(), World(), broker.client()
    world.deposit(client)
    contract = thief.signed(client, thief.contract(name=next(_names)))
    with pytest.raises(DeniedError) as denied:
        client.release(contract, "train", reads=("xrays",), attester=trainer_node())
    (reason,) = denied.value.reasons
    assert reason.where == "key.xrays"
    assert "somebody else deposited" in reason.found
    assert world.hospital.key.fingerprint not in str(reason)
    # a deposit of his own for the same digest gives him his own key, never the hospital's
    own = Secret.random()
    client.deposit_key(XRAYS, volume_id=VOLUME_ID, key=own, sign=thief.hospital.sign)
    release = client.release(contract, "train", reads=("xrays",), attester=trainer_node())
    assert release.keys["xrays"].key == own


def test_second_contract_of_the_same_name_gets_nothing_of_the_first(scene: Scene, broker: RunningBroker) -> None:
    name = scene.client.contract_status(scene.contract).name
    thief = World()
    with pytest.raises(InputError) as refused:
        thief.signed(scene.client, thief.contract(name=name))
    assert wheres(refused.value) == ["contract"]
    # also when the first one was revoked
    scene.client.revoke(scene.contract, scene.world.vendor.sign)
    with pytest.raises(InputError):
        thief.signed(scene.client, thief.contract(name=name))


def test_two_first_versions_wait_and_only_one_becomes_active(broker: RunningBroker) -> None:
    world, other, client, name = World(), World(), broker.client(), next(_names)
    data, second = world.contract(name=name), other.contract(name=name)
    client.submit_contract(second, name="second.toml")
    world.signed(client, data)
    with pytest.raises(InputError) as refused:
        other.signed(client, second)
    assert wheres(refused.value) == ["contract"]
    assert client.contract_status(digest(second)).state == "waiting"


def test_next_version_by_new_parties_alone_never_counts(scene: Scene) -> None:
    # version 2 names keys of the thief as `hospital`; without the old hospital's signature nothing changes
    world, client = scene.world, scene.client
    name = client.contract_status(scene.contract).name
    thief = World(vendor=world.vendor)
    data = thief.contract(name=name, version=2, replaces=scene.contract, hospital=thief.hospital)
    second = thief.signed(client, data)
    status = client.contract_status(second)
    assert status.state == "waiting"
    assert status.waiting == ("hospital (of version 1)",)
    with pytest.raises(WaitingError):
        client.release(second, "train", reads=("backbone",), attester=trainer_node())
    assert client.contract_status(scene.contract).state == "active"
    # with it, version 2 counts and version 1 is over
    status = client.add_signature(second, world.hospital.sign(data, namespace="contract@cloister"))
    assert status.state == "active"
    with pytest.raises(DeniedError) as denied:
        client.release(scene.contract, "train", reads=("xrays",), attester=trainer_node())
    assert denied.value.reasons[0].found == "replaced by a newer version"


@pytest.mark.parametrize(("version", "replaces"), [(3, None), (2, "sha256:" + "00" * 32)])
def test_version_that_does_not_follow(scene: Scene, version: int, replaces: str | None) -> None:
    name = scene.client.contract_status(scene.contract).name
    data = scene.world.contract(name=name, version=version, replaces=replaces or scene.contract)
    with pytest.raises(InputError) as refused:
        scene.client.submit_contract(data, name="v.toml")
    assert refused.value.code == "contract-invalid"


def test_revocation_by_somebody_who_need_not_sign(scene: Scene) -> None:
    with pytest.raises(InputError) as refused:
        scene.client.revoke(scene.contract, scene.world.clinic.sign)
    assert refused.value.code == "signature-invalid"
    assert scene.client.contract_status(scene.contract).state == "active"


def test_expired_contract(broker: RunningBroker, clock: Clock) -> None:
    world, client = World(), broker.client()
    contract = world.ready(client, world.contract(name=next(_names), expires=str((clock() + timedelta(days=1)).date())))
    clock.ahead = timedelta(days=2)
    with pytest.raises(DeniedError) as denied:
        broker.client().release(contract, "train", reads=("xrays",), attester=trainer_node())
    assert wheres(denied.value) == ["expires"]
    assert client.contract_status(contract).state == "expired"


# --- keys -------------------------------------------------------------------------------------------------------------


def test_deposit_sealed_to_another_broker(scene: Scene) -> None:
    other = hpke.KeyPair.generate().public
    sealed = hpke.seal(bytes(32), to=other, info=wire.key_info(XRAYS, VOLUME_ID))
    statement = wire.KeyStatement(XRAYS, VOLUME_ID, 1, wire.sha256(sealed), wire.sha256(other))
    signature = scene.world.hospital.sign(statement.encode(), namespace="key@cloister")
    with pytest.raises(InputError) as refused:
        scene.client._post("key", wire.KeyDeposit(statement, sealed, signature).encode())
    assert wheres(refused.value) == ["key.broker"]


def test_deposit_whose_sealed_key_was_exchanged(scene: Scene) -> None:
    key = scene.client.broker.key
    sealed, other = (hpke.seal(bytes([n]) * 32, to=key, info=wire.key_info(XRAYS, VOLUME_ID)) for n in (1, 2))
    statement = wire.KeyStatement(XRAYS, VOLUME_ID, 1, wire.sha256(sealed), wire.sha256(key))
    signature = scene.world.hospital.sign(statement.encode(), namespace="key@cloister")
    with pytest.raises(InputError) as refused:
        scene.client._post("key", wire.KeyDeposit(statement, other, signature).encode())
    assert wheres(refused.value) == ["key.sealed"]


def test_output_of_nobody_is_opened_to_nobody(broker: RunningBroker) -> None:
    world, client = World(), broker.client()
    contract = world.ready(client, world.contract(name=next(_names), detector_owner="nobody"))
    world.trained(client, contract)
    for party in (world.hospital, world.vendor, world.clinic):
        with pytest.raises(DeniedError) as denied:
            client.open_key(contract, "detector", [party.sign])
        assert denied.value.reasons[0].wanted == "nobody"
    serve = client.release(contract, "serve", reads=("detector",), attester=server_node())
    assert serve.keys["detector"].digest == detector(contract)


def test_board_opens_with_its_votes_only(broker: RunningBroker) -> None:
    world, client = World(), broker.client()
    board = '[board]\ncouncil = { members = ["hospital", "vendor", "clinic"], need = 2, veto = ["clinic"] }\n'
    data = world.contract(name=next(_names), detector_owner="council", extra=board)
    world.deposit(client)
    status = client.submit_contract(data, name="board.toml")
    for party in (world.hospital, world.vendor, world.clinic):
        status = client.add_signature(status.contract, party.sign(data, namespace="contract@cloister"))
    contract = status.contract
    train = world.trained(client, contract)
    with pytest.raises(DeniedError) as one:
        client.open_key(contract, "detector", [world.hospital.sign])
    assert wheres(one.value) == ["open.detector.owner", "open.detector.owner.veto"]
    with pytest.raises(DeniedError) as twice:
        client.open_key(contract, "detector", [world.hospital.sign, world.hospital.sign])
    assert "open.detector.owner" in wheres(twice.value)
    opened = client.open_key(contract, "detector", [world.hospital.sign, world.clinic.sign])
    assert opened.key.key == train.outputs["detector"].key


def test_open_statement_used_for_another_key_or_too_late(scene: Scene, clock: Clock) -> None:
    client, world = scene.client, scene.world
    pair, thief = hpke.KeyPair.generate(), hpke.KeyPair.generate()
    statement = client.open_statement(scene.contract, "xrays", pair.public)
    signature = world.hospital.sign(statement.encode(), namespace="open@cloister")
    with pytest.raises(DeniedError) as denied:
        client.open_signed(statement, [signature], thief)
    assert wheres(denied.value) == ["open.key"]
    assert client.open_signed(statement, [signature], pair).key.key == world.xrays_key
    clock.ahead = timedelta(minutes=31)
    with pytest.raises(DeniedError) as late:
        client.open_signed(statement, [signature], pair)
    assert wheres(late.value) == ["open.expires"]


# --- leases -----------------------------------------------------------------------------------------------------------


def test_mac_under_another_lease(scene: Scene) -> None:
    one = scene.client.release(scene.contract, "train", reads=("xrays",), writes=("detector",), attester=trainer_node())
    two = scene.client.release(scene.contract, "train", reads=("xrays",), writes=("detector",), attester=trainer_node())
    statement = wire.RegisterStatement(one.lease.id, "detector", digest(b"evil"), 1)
    for tag in (
        mac(two.lease.secret, wire.REGISTER_LABEL, statement.encode()),
        mac(one.lease.secret, wire.ANSWER_LABEL, statement.encode()),
        bytes(32),
    ):
        with pytest.raises(DeniedError) as refused:
            scene.client._post("register", wire.RegisterRequest(statement, tag).encode())
        assert refused.value.code == "lease-refused"
    with pytest.raises(DeniedError) as unknown:
        scene.client.register_root(
            replace(one, lease=replace(one.lease, id="l-" + "0" * 32)), "detector", digest(b"evil"), generation=1
        )
    assert str(unknown.value) == str(refused.value)  # an unknown lease and a wrong secret look the same


def test_expired_lease(scene: Scene, clock: Clock) -> None:
    attester = trainer_node()
    release = scene.client.release(scene.contract, "train", reads=("xrays",), writes=("detector",), attester=attester)
    clock.ahead = timedelta(minutes=10, seconds=1)
    with pytest.raises(DeniedError) as refused:
        scene.client.renew(release, attester)
    assert (refused.value.code, wheres(refused.value)) == ("lease-refused", ["lease.expires"])
    with pytest.raises(DeniedError) as registered:
        scene.client.register_root(release, "detector", digest(b"late"), generation=1)
    assert wheres(registered.value) == ["lease.expires"]


def test_renewed_at_half_life_a_lease_goes_on(scene: Scene, clock: Clock) -> None:
    attester = trainer_node()
    release = scene.client.release(scene.contract, "train", reads=("xrays",), writes=("detector",), attester=attester)
    for minutes in (5, 10, 15):
        clock.ahead = timedelta(minutes=minutes)
        assert clock() >= release.lease.renew_after - timedelta(seconds=5)
        release = scene.client.renew(release, attester)
    assert scene.client.register_root(release, "detector", digest(b"in time"), generation=1)


def test_renewal_by_another_key_or_for_another_workload(scene: Scene) -> None:
    release = scene.client.release(scene.contract, "train", reads=("xrays",), attester=trainer_node())
    with pytest.raises(DeniedError) as key:
        scene.client.renew(replace(release, keypair=hpke.KeyPair.generate()), trainer_node())
    assert wheres(key.value) == ["lease.key"]
    with pytest.raises(DeniedError) as workload:
        scene.client.renew(release, node(digest(b"evil"), "offline"))
    assert wheres(workload.value)[0] == "lease.code"
    with pytest.raises(DeniedError) as level:
        scene.client.renew(release, node(level="L2"))
    assert wheres(level.value) == ["lease.level"]


@pytest.mark.parametrize("generation", [0, 1, 3])
def test_rolled_back_or_skipped_generation(scene: Scene, generation: int) -> None:
    release = scene.world.trained(scene.client, scene.contract)
    with pytest.raises(DeniedError) as refused:
        scene.client.register_root(release, "detector", digest(b"other"), generation=generation)
    assert wheres(refused.value) == ["register.generation"]
    serve = scene.client.release(scene.contract, "serve", reads=("detector",), attester=server_node())
    assert serve.keys["detector"].digest == detector(scene.contract)


def test_only_the_declared_output_can_be_registered(scene: Scene) -> None:
    release = scene.client.release(scene.contract, "train", reads=("xrays",), attester=trainer_node())
    with pytest.raises(DeniedError) as refused:
        scene.client.register_root(release, "detector", digest(b"x"), generation=1)
    assert wheres(refused.value) == ["register.asset"]


def test_two_nodes_write_and_the_second_is_refused(scene: Scene) -> None:
    releases = [
        scene.client.release(scene.contract, "train", reads=("xrays",), writes=("detector",), attester=trainer_node())
        for _ in range(2)
    ]
    scene.client.register_root(releases[0], "detector", digest(b"first"), generation=1)
    with pytest.raises(DeniedError):
        scene.client.register_root(releases[1], "detector", digest(b"second"), generation=1)


# --- answers ----------------------------------------------------------------------------------------------------------


def serving(scene: Scene) -> Release:
    scene.world.trained(scene.client, scene.contract)
    return scene.client.release(scene.contract, "serve", reads=("detector",), attester=server_node())


def test_budget_race_is_exact(broker: RunningBroker) -> None:
    world = World()
    client = broker.client()
    data = world.contract(name=next(_names), answer='to = ["clinic"], form = "label", budget = 25')
    scene = Scene(world, client, world.ready(client, data))
    serve = serving(scene)
    asker = Asker.of(world.clinic, serve)
    granted, refused = [], []

    def ask(worker: int) -> None:
        own = broker.client()
        for number in range(10):
            try:
                granted.append(asker.ask(own, serve, b"%d-%d" % (worker, number)))
            except DeniedError as error:
                refused.append(error.code)

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(granted) == 25
    assert refused == ["budget-spent"] * 15
    assert sorted(reply.left for reply in granted if reply.left is not None) == list(range(25))


def test_service_cannot_ask_in_the_consumers_name(scene: Scene) -> None:
    serve = serving(scene)
    honest = Asker.of(scene.world.clinic, serve)
    query = wire.sha256(b"query")
    with pytest.raises(InputError) as refused:
        scene.client.answer(serve, honest.authorisation, query=query, query_signature=bytes(64), answer=query)
    assert wheres(refused.value) == ["session.query"]


def test_session_for_another_service_or_signed_by_a_stranger(scene: Scene) -> None:
    serve = serving(scene)
    other = replace(serve, keypair=hpke.KeyPair.generate())
    with pytest.raises(InputError) as refused:
        Asker.of(scene.world.clinic, other).ask(scene.client, serve, b"query")
    assert "session.service" in wheres(refused.value)
    with pytest.raises(DeniedError) as stranger:
        Asker.of(World().clinic, serve).ask(scene.client, serve, b"query")
    assert wheres(stranger.value) == ["phase.serve.answer.to"]


def test_session_that_is_over_or_too_long(scene: Scene, clock: Clock) -> None:
    serve = serving(scene)
    for lasts in (timedelta(seconds=-1), timedelta(hours=2)):
        with pytest.raises(InputError) as refused:
            Asker.of(scene.world.clinic, serve, lasts=lasts).ask(scene.client, serve, b"query")
        assert wheres(refused.value) == ["session.expires"]


def test_one_query_gets_one_answer(scene: Scene) -> None:
    serve = serving(scene)
    asker = Asker.of(scene.world.clinic, serve)
    asker.ask(scene.client, serve, b"query", b"answer 1")
    with pytest.raises(DeniedError, match="answered already"):
        asker.ask(scene.client, serve, b"query", b"answer 2")


def test_a_phase_without_answers_gives_none(scene: Scene) -> None:
    train = scene.client.release(scene.contract, "train", reads=("xrays",), attester=trainer_node())
    with pytest.raises(DeniedError) as refused:
        Asker.of(scene.world.clinic, train).ask(scene.client, train, b"query")
    assert wheres(refused.value) == ["phase.train.answer"]


def test_a_new_day_gives_new_answers_until_the_budget_is_used_up(scene: Scene, clock: Clock) -> None:
    attester = server_node()
    scene.world.trained(scene.client, scene.contract)
    serve = scene.client.release(scene.contract, "serve", reads=("detector",), attester=attester)
    asker = Asker.of(scene.world.clinic, serve)
    for number in range(4):
        asker.ask(scene.client, serve, b"%d" % number)
    with pytest.raises(DeniedError) as day:
        asker.ask(scene.client, serve, b"4")
    assert wheres(day.value) == ["phase.serve.answer.per_day"]
    clock.ahead = timedelta(days=1)
    serve = scene.client.release(scene.contract, "serve", reads=("detector",), attester=attester)
    asker = Asker.of(scene.world.clinic, serve, now=clock())
    assert asker.ask(scene.client, serve, b"5").left == 0
    with pytest.raises(DeniedError) as spent:
        asker.ask(scene.client, serve, b"6")
    assert wheres(spent.value) == ["phase.serve.answer.budget"]


# --- the broker itself ------------------------------------------------------------------------------------------------


def test_client_refuses_a_broker_with_other_software(broker: RunningBroker) -> None:
    trust = Trust(Roots(soft=True), frozenset({b"\x11" * 48}), allow_soft=True)
    with pytest.raises(EvidenceError) as refused:
        BrokerClient.connect(broker.url, trust=trust)
    assert wheres(refused.value) == ["broker.mrtd", "broker.node_measurements"]


def test_client_refuses_a_soft_broker_unless_told(broker: RunningBroker) -> None:
    with pytest.raises(EvidenceError) as refused:
        BrokerClient.connect(broker.url, trust=Trust(Roots()))
    assert refused.value.code == "evidence-not-authentic"
    with pytest.raises(EvidenceError) as named:
        BrokerClient.connect(broker.url, trust=replace(broker.trust(), roots=Roots(soft=True), allow_soft=False))
    assert named.value.code in ("evidence-not-authentic", "evidence-unacceptable")


def test_man_in_the_middle_with_the_brokers_own_evidence(broker: RunningBroker, tls_relay: Any) -> None:
    # he relays every byte to the real broker, but ends TLS with his own certificate
    with tls_relay(broker.url) as url, pytest.raises(EvidenceError) as refused:
        BrokerClient.connect(url, trust=broker.trust())
    assert "binding.report_data" in wheres(refused.value)


def test_only_tls_1_3(broker: RunningBroker) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    client = broker.client()
    client.close()
    client._tls = context
    client._connection = None
    with pytest.raises(PeerError):
        client._connected()
