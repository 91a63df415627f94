"""kill -9 while nodes get keys: what was acknowledged is in the log, the state opens again, nothing is lost."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cloister.broker import client as client_module
from cloister.broker.log import leaf as leaves
from cloister.broker.log.receipt import parse_receipt
from cloister.crypto.keys import digest
from cloister.errors import PeerError
from cloister.testkit.broker import running_broker
from tests.broker.world import World, trainer_node


@pytest.mark.slow
def test_kill_9_during_releases_loses_no_acknowledged_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACK_OFF_S", ())
    world = World()
    memory = tmp_path / "brokers.json"
    with running_broker(tmp_path / "state", process=True) as broker:
        contract = world.ready(broker.client(memory=memory))
        for round_ in range(3):
            receipts: list[bytes] = []
            ends: list[str] = []

            def work(into: list[bytes] = receipts, ends: list[str] = ends) -> None:
                try:
                    client = broker.client()
                    while True:
                        into.append(
                            client.release(contract, "train", reads=("xrays",), attester=trainer_node()).receipt
                        )
                except PeerError as error:
                    ends.append(error.code)

            workers = [threading.Thread(target=work) for _ in range(3)]
            for worker in workers:
                worker.start()
            while len(receipts) < 10 * (round_ + 1):
                workers[0].join(0.01)
            broker.kill()
            for worker in workers:
                worker.join(20)
            assert ends == ["broker-unreachable"] * 3
            broker.start()
            client = broker.client(memory=memory)  # its log extends the remembered one
            size = client.status().entries
            for receipt in map(parse_receipt, receipts):
                assert receipt.index < size
                assert client.entries(receipt.index, receipt.index + 1) == (receipt.data,)
        # and the broker works on: the last release before the kill can still register
        release = client.release(contract, "train", reads=("xrays",), writes=("detector",), attester=trainer_node())
        broker.kill()
        broker.start()
        client = broker.client(memory=memory)
        entry = leaves.parse(parse_receipt(client.register_root(release, "detector", digest(b"1"), generation=1)).data)
        assert isinstance(entry, leaves.RootRegistered)
