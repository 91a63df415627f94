"""Words over real TLS: a node says them, the parties of the contract hear them, nobody else does. Attacks by name."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cloister.broker import relay, wire
from cloister.broker.client import BrokerClient, Listener, Release
from cloister.contract.edge import Signer
from cloister.crypto import hpke
from cloister.crypto.keys import Secret, mac, wrap
from cloister.errors import DeniedError, InputError, PeerError
from cloister.testkit.broker import RunningBroker, running_broker
from tests.broker.conftest import Clock
from tests.broker.world import World, server_node, signer, trainer_node

_names = (f"words-{number}" for number in itertools.count())


@dataclass
class Scene:
    """A phase that runs under a contract that lets metrics leave to hospital and clinic."""

    world: World
    client: BrokerClient
    contract: str
    release: Release

    def listener(self, party: Signer, **changed: Any) -> Listener:
        return self.client.listener(self.contract, party.sign, **changed)

    def hears(self, party: Signer) -> list[str]:
        return [line.text for line in self.listener(party).hear().lines]


def started(client: BrokerClient, leaves: str = 'metrics_to = ["hospital", "clinic"]') -> Scene:
    world = World()
    contract = world.ready(client, world.contract(name=next(_names), leaves=leaves))
    release = client.release(contract, "train", reads=("xrays",), attester=trainer_node())
    return Scene(world, client, contract, release)


@pytest.fixture
def scene(broker: RunningBroker) -> Scene:
    return started(broker.client())


def wheres(error: Any) -> list[str]:
    return [reason.where for reason in error.reasons]


def test_a_remote_party_hears_what_the_contract_gives_it(scene: Scene) -> None:
    ear = scene.listener(scene.world.hospital)
    assert ear.hear() == wire.ListenPayload(ear._epoch, 0, False, (), ())
    scene.client.words(scene.release, 1, "metrics", ["epoch 1/2 loss 0.5", "epoch 2/2 loss 0.25"])
    heard = ear.hear()
    assert [line.text for line in heard.lines] == ["epoch 1/2 loss 0.5", "epoch 2/2 loss 0.25"]
    (lease,) = heard.leases
    assert (lease.lease, lease.phase, lease.live, lease.dropped) == (scene.release.lease.id, "train", True, 0)
    assert ear.hear().lines == ()
    scene.client.words(scene.release, 2, "metrics", ["loss 0.125"], dropped=3, end=True)
    heard = ear.hear()
    assert [line.text for line in heard.lines] == ["loss 0.125"]
    assert (heard.leases[0].live, heard.leases[0].dropped) == (False, 3)
    assert len(scene.hears(scene.world.clinic)) == 3


def test_another_partys_key(scene: Scene) -> None:
    scene.client.words(scene.release, 1, "metrics", ["loss 0.5"])
    for stranger in (scene.world.vendor, signer()):  # of the contract, but not named; of no contract
        with pytest.raises(DeniedError) as refused:
            scene.hears(stranger)
        assert wheres(refused.value) == ["phase.train.metrics_to", "phase.serve.metrics_to"]
        assert stranger.key.fingerprint in refused.value.reasons[0].found


def test_a_party_of_another_contract(scene: Scene, broker: RunningBroker) -> None:
    other = started(broker.client())
    scene.client.words(scene.release, 1, "metrics", ["loss 0.5"])
    assert other.hears(other.world.hospital) == []
    with pytest.raises(DeniedError):
        scene.hears(other.world.hospital)


def ask(scene: Scene, by: Signer, *, pair: hpke.KeyPair | None = None, namespace: str = "listen@cloister",
        signed: dict[str, Any] | None = None, **sent: Any) -> bytes:  # fmt: skip
    """Send a listen request by hand; `signed` changes the statement, `sent` the request around it."""
    pair = pair or hpke.KeyPair.generate()
    broker = scene.client.broker
    statement = scene.client.listener(scene.contract, by.sign)._statement()[0]
    statement = replace(statement, key=wire.sha256(pair.public), broker=wire.sha256(broker.key), **(signed or {}))
    request = wire.ListenRequest(statement, pair.public, by.sign(statement.encode(), namespace=namespace), 0, 0)
    request = replace(request, **sent)
    reply = wire.ListenReply.decode(scene.client._post("listen", request.encode()))
    return pair.open(reply.sealed, info=wire.LISTEN_INFO + request.hashed())


def test_a_statement_that_leaked_opens_for_its_key_only(scene: Scene) -> None:
    scene.client.words(scene.release, 1, "metrics", ["loss 0.5"])
    assert b"loss 0.5" in ask(scene, scene.world.hospital)
    with pytest.raises(DeniedError) as refused:
        ask(scene, scene.world.hospital, key=hpke.KeyPair.generate().public)
    assert wheres(refused.value) == ["listen.key"]


def test_a_signature_for_another_purpose(scene: Scene) -> None:
    with pytest.raises(InputError) as refused:
        ask(scene, scene.world.hospital, namespace="open@cloister")
    assert refused.value.code == "signature-invalid"


def test_a_statement_of_yesterday(scene: Scene, clock: Clock) -> None:
    expires = clock() + timedelta(minutes=10)
    clock.ahead = timedelta(minutes=11)
    with pytest.raises(DeniedError) as refused:
        ask(scene, scene.world.hospital, signed={"expires": expires})
    assert "listen.expires" in wheres(refused.value)


def test_a_listener_signs_again_when_its_statement_ends(scene: Scene, clock: Clock) -> None:
    ear = scene.listener(scene.world.hospital)
    ear.hear()
    clock.ahead = timedelta(hours=2)
    assert ear.hear().lines == ()


# --- nodes ------------------------------------------------------------------------------------------------------------


def forged(scene: Scene, *, secret: Secret | None = None, batch: wire.WordsBatch | None = None, **changed: Any) -> None:
    """Send one metrics batch by hand, HMAC and seal under `secret`, with fields of the statement `changed`."""
    lease, key = scene.release.lease, secret or scene.release.lease.secret
    fields: dict[str, Any] = {
        "lease": lease.id,
        "peer_key": scene.client.broker.spki,
        "seq": 1,
        "stream": "metrics",
    } | changed
    content = (batch or wire.WordsBatch(("loss 6.66",), 0, False)).encode()
    context = wire.words_context(fields["lease"], fields["seq"], fields["stream"])
    statement = wire.WordsStatement(**({"sealed": wrap(wire.words_key(key), content, context=context)} | fields))
    tag = mac(key, wire.WORDS_LABEL, statement.encode())
    scene.client._exchange("POST", "words", wire.WordsRequest(statement, tag).encode())


def test_honest_twin_of_every_forged_batch(scene: Scene) -> None:
    forged(scene)
    assert scene.hears(scene.world.hospital) == ["loss 6.66"]


def test_another_leases_mac(scene: Scene, broker: RunningBroker) -> None:
    other = started(broker.client())
    with pytest.raises(DeniedError) as refused:
        forged(scene, secret=other.release.lease.secret)
    with pytest.raises(DeniedError) as unknown:
        forged(scene, lease="l-" + "0" * 32)
    assert refused.value.as_json() == unknown.value.as_json()
    assert refused.value.code == "lease-refused"
    assert scene.hears(scene.world.hospital) == []


def test_a_mac_for_another_message(scene: Scene) -> None:
    lease = scene.release.lease
    statement = wire.WordsStatement(lease.id, scene.client.broker.spki, 1, "metrics", bytes(40))
    tag = mac(lease.secret, wire.REGISTER_LABEL, statement.encode())
    with pytest.raises(DeniedError) as refused:
        scene.client._post("words", wire.WordsRequest(statement, tag).encode())
    assert refused.value.code == "lease-refused"


def test_replayed_seq(scene: Scene) -> None:
    forged(scene, seq=5)
    for seq in (5, 4, 0):
        with pytest.raises(DeniedError) as refused:
            forged(scene, seq=seq)
        assert wheres(refused.value) == ["words.seq"]
    assert scene.hears(scene.world.hospital) == ["loss 6.66"]


def test_the_same_batch_twice_is_kept_once(scene: Scene) -> None:
    lease = scene.release.lease
    context = wire.words_context(lease.id, 1, "metrics")
    sealed = wrap(wire.words_key(lease.secret), wire.WordsBatch(("loss 1",), 0, False).encode(), context=context)
    for _ in range(20):  # a lost answer costs nothing of the rate either
        forged(scene, sealed=sealed)
    assert scene.hears(scene.world.hospital) == ["loss 1"]


def test_a_batch_of_another_run_of_the_broker(scene: Scene) -> None:
    with pytest.raises(DeniedError) as refused:
        forged(scene, peer_key=bytes(32))
    assert wheres(refused.value) == ["words.peer_key"]


def test_a_batch_moved_to_another_stream_or_number(broker: RunningBroker) -> None:
    scene = started(broker.client(), 'metrics_to = ["hospital"]\nleaves = ["metrics", "logs"]')
    lease = scene.release.lease
    sealed = wrap(
        wire.words_key(lease.secret),
        wire.WordsBatch(("loss 1",), 0, False).encode(),
        context=wire.words_context(lease.id, 1, "metrics"),
    )
    for changed in ({"stream": "logs"}, {"seq": 2}):
        with pytest.raises(PeerError) as refused:
            forged(scene, sealed=sealed, **changed)
        assert refused.value.code == "protocol"


def test_logs_where_only_metrics_leave(scene: Scene) -> None:
    with pytest.raises(DeniedError) as refused:
        scene.client.words(scene.release, 1, "logs", ["patient Ada Lovelace"])
    assert (refused.value.code, wheres(refused.value)) == ("denied", ["phase.train.leaves"])
    assert scene.hears(scene.world.hospital) == []


def test_text_dressed_as_metrics(scene: Scene) -> None:
    for number, line in enumerate(("patient Ada Lovelace", "loss 0.123456789", "name ada 1", "\x1b[2J 1")):
        with pytest.raises(DeniedError, match="names and rounded numbers"):
            scene.client.words(scene.release, number, "metrics", [line])
    assert scene.hears(scene.world.hospital) == []


def test_metrics_where_nothing_leaves(broker: RunningBroker) -> None:
    scene = started(broker.client(), "")
    with pytest.raises(DeniedError) as refused:
        scene.client.words(scene.release, 1, "metrics", ["loss 0.5"])
    assert wheres(refused.value) == ["phase.train.leaves"]
    with pytest.raises(DeniedError):
        scene.hears(scene.world.hospital)


def test_a_phase_that_lets_nothing_leave_beside_one_that_does(scene: Scene) -> None:
    scene.world.trained(scene.client, scene.contract)
    release = scene.client.release(scene.contract, "serve", reads=("detector",), attester=server_node())
    with pytest.raises(DeniedError) as refused:
        scene.client.words(release, 1, "metrics", ["loss 0.5"])
    assert wheres(refused.value) == ["phase.serve.leaves"]


def test_oversized_batch(scene: Scene) -> None:
    with pytest.raises(ValueError, match=r"WordsBatch\.lines"):
        wire.WordsBatch(("loss 1",) * 257, 0, False)
    with pytest.raises(ValueError, match=r"WordsStatement\.sealed"):
        replace(wire.WordsStatement("l-" + "0" * 32, bytes(32), 1, "metrics", bytes(40)), sealed=bytes((96 << 10) + 1))
    many = object.__new__(wire.WordsBatch)  # as a node that ignores its own limits
    for name, value in {"lines": ("loss 1",) * 5000, "dropped": 0, "end": False}.items():
        object.__setattr__(many, name, value)
    with pytest.raises(PeerError) as refused:
        forged(scene, batch=many)
    assert refused.value.code == "protocol"
    assert scene.hears(scene.world.hospital) == []


def test_flood(scene: Scene) -> None:
    taken, code = 0, ""
    for number in range(40):
        try:
            scene.client.words(scene.release, number, "metrics", [f"loss {number}"])
            taken += 1
        except DeniedError as error:
            code = error.code
    assert code == "too-fast"
    assert relay.BURST <= taken < 40
    assert len(scene.hears(scene.world.hospital)) == taken


def test_refused_words_make_no_log_entries(scene: Scene) -> None:
    before = scene.client.status().entries
    for number in range(12):
        with pytest.raises(DeniedError):
            scene.client.words(scene.release, number, "logs", ["said"])
        with pytest.raises(DeniedError):
            scene.hears(scene.world.vendor)
    assert scene.client.status().entries == before


def test_words_of_a_lease_that_is_over(scene: Scene, clock: Clock) -> None:
    scene.client.words(scene.release, 1, "metrics", ["loss 0.5"])
    clock.ahead = timedelta(minutes=11)
    with pytest.raises(DeniedError) as refused:
        scene.client.words(scene.release, 2, "metrics", ["loss 0.25"])
    assert wheres(refused.value) == ["lease.expires"]
    heard = scene.listener(scene.world.hospital).hear()
    assert [line.text for line in heard.lines] == ["loss 0.5"]  # what was said stays for a day
    assert not heard.leases[0].live


def test_words_under_a_revoked_contract(scene: Scene) -> None:
    scene.client.words(scene.release, 1, "metrics", ["loss 0.5"])
    scene.client.revoke(scene.contract, scene.world.hospital.sign)
    with pytest.raises(DeniedError) as refused:
        scene.client.words(scene.release, 2, "metrics", ["loss 0.25"])
    assert refused.value.code == "lease-refused"
    with pytest.raises(DeniedError) as silent:
        scene.hears(scene.world.hospital)
    assert wheres(silent.value) == ["contract"]


def test_another_client_neither_attests_nor_waits(scene: Scene) -> None:
    with scene.client.another(timeout_s=2) as second:
        with scene.client._lock:  # a request of the first one is under way
            sent = threading.Thread(target=second.words, args=(scene.release, 1, "metrics", ["loss 0.5"]), daemon=True)
            sent.start()
            sent.join(10)
        assert not sent.is_alive()
        assert second.broker is scene.client.broker
    assert scene.hears(scene.world.hospital) == ["loss 0.5"]


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RunningBroker]:
    with running_broker(tmp_path / "state", process=False) as broker:
        yield broker


def test_a_restart_loses_the_words_and_nothing_of_them_is_on_disk(own: RunningBroker) -> None:
    leaves = 'metrics_to = ["hospital"]\nleaves = ["metrics", "logs"]'
    client = own.client()
    scene = started(client, leaves)
    ear = scene.listener(scene.world.hospital)
    client.words(scene.release, 1, "metrics", [f"planted {number}" for number in range(100)])
    client.words(scene.release, 2, "logs", ["the planted word"])
    assert len(ear.hear().lines) == 101
    own.stop()
    for folder, _, files in os.walk(own.folder):
        for name in files:
            assert b"planted" not in (Path(folder) / name).read_bytes()
    own.start()
    assert ear.hear().lines == ()
    client.words(scene.release, 3, "metrics", ["loss 0.5"])  # the lease goes on, and so does listening
    assert [line.text for line in ear.hear().lines] == ["loss 0.5"]
