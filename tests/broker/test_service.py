"""The whole path over real TLS against a real process: submit, sign, deposit, release, register, answer, open, audit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.broker import wire
from cloister.broker.log import leaf as leaves
from cloister.broker.log.checkpoint import open_checkpoint
from cloister.broker.log.receipt import parse_receipt, verify_receipt
from cloister.broker.log.tree import leaf_hash, verify_consistency, verify_inclusion
from cloister.crypto.keys import digest
from cloister.crypto.note import Verifier
from cloister.errors import DeniedError, WaitingError
from cloister.testkit.broker import RunningBroker, running_broker
from tests.broker.world import BACKBONE, XRAYS, Asker, World, server_node, trainer_node


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    with running_broker(tmp_path_factory.mktemp("broker"), process=True) as running:
        yield running


def test_the_whole_path_from_contract_to_audit(broker: RunningBroker) -> None:
    world = World()
    client = broker.client()
    assert client.broker.soft
    log_key = Verifier.parse(client.broker.config.log_key)

    # submit and sign: waiting until the last required signer
    data = world.contract(name="whole-path")
    status = client.submit_contract(data, name="whole.toml")
    assert (status.state, status.waiting) == ("waiting", ("hospital", "vendor"))
    assert client.contract_bytes(status.contract) == data
    status = client.add_signature(status.contract, world.hospital.sign(data, namespace="contract@cloister"))
    assert (status.state, status.waiting) == ("waiting", ("vendor",))
    world.deposit(client)
    with pytest.raises(WaitingError, match="vendor"):
        client.release(status.contract, "train", reads=("xrays", "backbone"), attester=trainer_node())
    status = client.add_signature(status.contract, world.vendor.sign(data, namespace="contract@cloister"))
    assert (status.state, status.waiting) == ("active", ())
    assert client.contract_status("whole-path") == status
    contract = status.contract

    # train: two keys in, one key out
    train = client.release(
        contract, "train", reads=("xrays", "backbone"), writes=("detector",), attester=trainer_node()
    )
    assert train.keys["xrays"].key == world.xrays_key
    assert (train.keys["xrays"].digest, train.keys["backbone"].digest) == (XRAYS, BACKBONE)
    output = train.outputs["detector"]
    assert (output.generation, output.previous, output.owner) == (1, None, "hospital")
    leaf = verify_receipt(parse_receipt(train.receipt), log_key)
    assert isinstance(leaf, leaves.Release)
    assert leaf.contract == contract
    assert leaf.soft

    # before anything is registered, the next phase has nothing to read
    with pytest.raises(DeniedError) as denied:
        client.release(contract, "serve", reads=("detector",), attester=server_node())
    assert [reason.where for reason in denied.value.reasons] == ["root.detector"]

    # register, renew
    first = digest(b"detector 1")
    receipt = client.register_root(train, "detector", first, generation=1)
    assert isinstance(verify_receipt(parse_receipt(receipt), log_key), leaves.RootRegistered)
    assert client.register_root(train, "detector", first, generation=1)  # the same again is fine

    # serve: the newest version, under the key that was made for it
    node = server_node()
    serve = client.release(contract, "serve", reads=("detector",), attester=node)
    assert serve.keys["detector"].key == output.key
    assert (serve.keys["detector"].digest, serve.keys["detector"].generation) == (first, 1)
    renewed = client.renew(serve, node)
    assert renewed.lease.expires > serve.lease.expires
    assert renewed.lease.secret == serve.lease.secret

    # answers: four a day
    asker = Asker.of(world.clinic, serve)
    reply = asker.ask(client, renewed, b"query 0")
    assert (reply.left, reply.left_today) == (4, 3)
    assert asker.ask(client, renewed, b"query 0") == reply  # a repeated query is not counted again
    for number in (1, 2, 3):
        reply = asker.ask(client, renewed, b"query %d" % number)
    assert (reply.left, reply.left_today) == (1, 0)
    with pytest.raises(DeniedError) as spent:
        asker.ask(client, renewed, b"query 4")
    assert spent.value.code == "budget-spent"
    record = client.denial(spent.value.denial_id)
    assert record.operation == "answer"
    assert record.contract == contract

    # the owner opens what is his
    opened = client.open_key(contract, "detector", [world.hospital.sign])
    assert opened.key.key == output.key
    with pytest.raises(DeniedError, match="not opened"):
        client.open_key(contract, "detector", [world.vendor.sign])

    # audit: everything is in the log, nothing secret is
    signed = open_checkpoint(client.checkpoint(), log_key).checkpoint
    entries: list[bytes] = []
    while len(entries) < signed.size:
        entries += client.entries(len(entries), signed.size)
    for index in (0, signed.size // 2, signed.size - 1):
        proof = client.inclusion(index, signed.size)
        verify_inclusion(leaf_hash(entries[index]), index, signed.size, proof, signed.root)
    kinds = [leaves.parse(entry).KIND for entry in entries]
    for kind in ("epoch", "contract-active", "key-deposited", "release", "denial", "root-registered", "answer", "key-opened", "lease-renewed"):  # fmt: skip
        assert kind in kinds
    text = b"".join(entries)
    for secret in (world.xrays_key, output.key, train.lease.secret):
        assert secret.reveal().hex().encode() not in text

    # revoke: leases are cut
    revoked = client.revoke(contract, world.hospital.sign)
    assert isinstance(verify_receipt(parse_receipt(revoked), log_key), leaves.ContractRevoked)
    with pytest.raises(DeniedError) as cut:
        client.renew(renewed, node)
    assert "contract" in [reason.where for reason in cut.value.reasons]
    later = open_checkpoint(client.checkpoint(), log_key).checkpoint
    verify_consistency(signed.size, signed.root, later.size, later.root, client.consistency(signed.size, later.size))


def test_status_says_that_a_soft_broker_protects_nothing(broker: RunningBroker) -> None:
    status = broker.client().status()
    assert status.soft
    assert status.origin == "test.example/broker"
    assert status.epoch == 1


def test_the_client_does_not_import_the_servers_libraries() -> None:
    heavy = "pydantic", "starlette", "sqlalchemy", "uvicorn", "joserfc"
    program = f"import sys, cloister.broker.client; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_state_survives_a_stop_and_a_new_start(tmp_path: Path) -> None:
    world = World()
    with running_broker(tmp_path / "state", process=True) as broker:
        client = broker.client(memory=tmp_path / "brokers.json")
        contract = world.ready(client)
        train = world.trained(client, contract)
        before = client.broker
        assert broker.stop() == 0
        broker.start()
        # the same client notices the new TLS key, attests again, and finds the same broker
        status = client.status()
        assert status.epoch == 2
        assert client.broker.spki != before.spki
        assert client.broker.key == before.key
        again = client.release(contract, "serve", reads=("detector",), attester=server_node())
        assert again.keys["detector"].key == train.outputs["detector"].key
        # a lease of the run before still registers, and goes on
        second = client.register_root(train, "detector", digest(b"detector 2"), generation=2)
        assert parse_receipt(second).index > 0
        assert isinstance(client.renew(train, trainer_node()).lease, wire.Lease)
