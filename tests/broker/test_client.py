"""What a client says when the broker is down, slow, restarted, replaced, rolled back, or lives in another time."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cloister.attestation.roots import Roots
from cloister.broker import client as client_module
from cloister.broker.client import BrokerClient, Trust
from cloister.crypto.keys import digest
from cloister.errors import DeniedError, EvidenceError, InputError, PeerError, TamperedError
from cloister.testkit.broker import RunningBroker, running_broker
from tests.broker.conftest import Clock
from tests.broker.world import Asker, World, server_node, trainer_node


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACK_OFF_S", (0.01, 0.02))


def test_broker_that_is_down(impatient: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(PeerError) as down:
        BrokerClient.connect(f"https://127.0.0.1:{port}", trust=Trust.__new__(Trust))
    assert down.value.code == "broker-unreachable"
    assert "cloister up" in down.value.hint


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://", "ftp://x", "https://host/path"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InputError, match="not the address"):
        BrokerClient.connect(url, trust=Trust.__new__(Trust))


def test_broker_that_is_slow() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"https://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(PeerError, match=r"within 0\.2 s") as slow:
            BrokerClient.connect(url, trust=Trust.__new__(Trust), timeout_s=0.2)
    assert slow.value.code == "broker-unreachable"


def test_something_that_is_no_broker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(PeerError) as refused:
            BrokerClient.connect(f"https://127.0.0.1:{server.getsockname()[1]}", trust=Trust.__new__(Trust))
        thread.join()
    assert refused.value.code == "broker-unreachable"


def test_restart_in_the_middle_of_a_session(tmp_path: Path) -> None:
    world = World()
    with running_broker(tmp_path / "state", process=False) as broker:
        client = broker.client()
        contract = world.ready(client)
        before = client.broker.spki
        broker.stop()
        again = threading.Timer(0.3, broker.start)
        again.start()
        release = client.release(contract, "train", reads=("xrays",), writes=("detector",), attester=trainer_node())
        again.join()
        assert client.broker.spki != before
        assert client.register_root(release, "detector", digest(b"1"), generation=1)


def test_answers_after_a_restart_need_fresh_evidence(tmp_path: Path) -> None:
    world = World()
    with running_broker(tmp_path / "state", process=False) as broker:
        client = broker.client()
        contract = world.ready(client)
        world.trained(client, contract)
        attester = server_node()
        serve = client.release(contract, "serve", reads=("detector",), attester=attester)
        asker = Asker.of(world.clinic, serve)
        assert asker.ask(client, serve, b"1").left == 4
        broker.stop()
        broker.start()
        with pytest.raises(DeniedError) as refused:
            asker.ask(client, serve, b"2")
        assert [reason.where for reason in refused.value.reasons] == ["lease.evidence"]
        serve = client.renew(serve, attester)
        assert asker.ask(client, serve, b"2").left == 3  # what was spent before stays spent


def test_another_broker_at_the_same_address(tmp_path: Path, impatient: None) -> None:
    memory = tmp_path / "brokers.json"
    with running_broker(tmp_path / "state", process=False) as broker:
        client = broker.client(memory=memory)
        broker.stop()
        shutil.rmtree(tmp_path / "state")
        broker.start()
        with pytest.raises(PeerError) as running:  # the client that knew it
            client.status()
        with pytest.raises(PeerError) as later:  # and one that remembers
            broker.client(memory=memory)
        for error in (running.value, later.value):
            assert error.code == "broker-replaced"
            assert error.reasons[0].where == "broker.log key"
        assert broker.client().status().epoch == 1  # without a memory nobody can know


def test_broker_with_a_rolled_back_log(tmp_path: Path) -> None:
    memory = tmp_path / "brokers.json"
    with running_broker(tmp_path / "state", process=False) as broker:
        broker.stop()
        shutil.copytree(tmp_path / "state", tmp_path / "old")
        broker.start()
        client = broker.client(memory=memory)
        World().ready(client)
        client.checkpoint()
        client.close()
        broker.stop()
        shutil.rmtree(tmp_path / "state")
        shutil.move(tmp_path / "old", tmp_path / "state")
        broker.start()
        with pytest.raises(TamperedError) as refused:
            broker.client(memory=memory)
        assert refused.value.code == "log-tampered"


def test_broker_with_another_history(tmp_path: Path) -> None:
    memory = tmp_path / "brokers.json"
    with running_broker(tmp_path / "state", process=False) as broker:
        broker.stop()
        shutil.copytree(tmp_path / "state", tmp_path / "twin")
        broker.start()
        broker.client(memory=memory).checkpoint()
        broker.close_clients()
        broker.stop()
        shutil.rmtree(tmp_path / "state")
        shutil.move(tmp_path / "twin", tmp_path / "state")
        broker.start()  # the twin has its own second epoch, and goes further
        World().ready(broker.client())
        with pytest.raises(TamperedError) as refused:
            broker.client(memory=memory)
        assert refused.value.code == "log-tampered"


def test_memory_is_kept_and_a_broken_one_is_no_empty_one(tmp_path: Path, broker: RunningBroker) -> None:
    memory = tmp_path / "deep" / "brokers.json"
    client = broker.client(memory=memory)
    seen = json.loads(memory.read_text())["brokers"][broker.url]
    assert seen["log_key"] == client.broker.config.log_key
    assert seen["size"] > 0
    client.checkpoint()
    assert json.loads(memory.read_text())["brokers"][broker.url]["size"] >= seen["size"]
    for text in ("", "[]", '{"brokers": []}', json.dumps({"brokers": {broker.url: {"log_key": "x"}}})):
        memory.write_text(text)
        with pytest.raises(TamperedError, match=r"brokers\.json"):
            broker.client(memory=memory)


@pytest.mark.parametrize("days", [-400, 400])
def test_clock_of_another_time_is_named(broker: RunningBroker, clock: Clock, days: int) -> None:
    # the soft collateral is made by the client for its own day, so a plain future works; a node's evidence does not
    skewed = broker.client(clock=lambda: clock() + timedelta(days=days))
    world = World()
    contract = world.ready(skewed, world.contract(name=f"clock{days}"))
    with pytest.raises(EvidenceError) as refused:
        _release_with_old_nonce(skewed, contract, clock)
    assert refused.value.reasons[-1].where == "clock"
    assert ("ahead of" if days > 0 else "behind") in refused.value.reasons[-1].found
    assert "set the clocks" in refused.value.hint


def _release_with_old_nonce(client: BrokerClient, contract: str, clock: Clock) -> None:
    class Late:
        devices = ()
        report_data_bytes = 64

        def evidence(self, report_data: bytes) -> object:
            clock.ahead = timedelta(seconds=90)
            return trainer_node().evidence(report_data)

    client.release(contract, "train", reads=("xrays",), attester=Late())  # type: ignore[arg-type]


class _Cut:
    """A connection whose other side dies half-way through its answer: `read(n)` returns what came, without a word."""

    status = 200
    length = 7
    headers: dict[str, str] = {}  # noqa: RUF012 - like http.client's

    def request(self, *_: Any, **__: Any) -> None:
        pass

    def getresponse(self) -> _Cut:
        return self

    def read(self, _: int) -> bytes:
        return b"\xa1half"

    def close(self) -> None:
        pass


def test_an_answer_that_was_cut_off_is_a_lost_connection_and_may_be_asked_for_again() -> None:
    client = BrokerClient("https://127.0.0.1:9", Trust(roots=Roots()), None, lambda: datetime.now(UTC), 1.0)
    with pytest.raises(PeerError) as caught:
        client._send(_Cut(), "GET", "status", None)  # type: ignore[arg-type]  # a double
    assert caught.value.code == "broker-unreachable"
