"""A run whose broker is down, slow, restarted, replaced, or says no while it runs; and clocks that do not agree."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.e2e_support import Broker, World, descendants, gone, no_traces, other_broker

pytestmark = pytest.mark.slow

SEALED = {"records.sealed"}
LEASE_S = 3


@pytest.fixture
def short(world: World) -> Iterator[tuple[World, Broker]]:
    """A broker of short leases that only this test uses."""
    with other_broker(world, lease_s=LEASE_S) as pair:
        yield pair


def test_a_revoked_contract_stops_the_program_and_seals_nothing(short: tuple[World, Broker]) -> None:
    world, _ = short
    deal = world.deal({"do": "sleep"})
    with no_traces(deal, SEALED):
        child = world.cloud.start(*deal.run(), as_json=False)
        child.program()
        family = descendants(child.pid)
        begin = time.monotonic()
        world.hospital.call("contract", "revoke", deal.name).expect(0)
        said = child.end(LEASE_S + 10).expect(1)
        assert time.monotonic() - begin < LEASE_S + 3
        assert gone(family)
    assert "refused to renew the lease; the program is stopped and its keys are dropped" in said.err
    assert "revoked" in said.err
    assert "code: lease-lost" in said.err


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_broker_that_is_silent_until_the_lease_ends_stops_the_program(
    short: tuple[World, Broker], how: signal.Signals
) -> None:
    """SIGSTOP is the worse one: connections are accepted and nothing ever comes back."""
    world, broker = short
    deal = world.deal({"do": "sleep"})
    with no_traces(deal, SEALED):
        child = world.cloud.start(*deal.run())
        child.program()
        family = descendants(child.pid)
        begin = time.monotonic()
        broker.send(how)
        said = child.end(LEASE_S + 20)
        assert time.monotonic() - begin < LEASE_S + 5, "the end of the lease counts, not the patience of a connection"
        assert gone(family)
    error = said.expect(1).data
    assert error["error"] == "lease-lost"
    assert "did not answer until the lease ended" in error["message"]
    assert error["reasons"]


def test_a_program_outlives_a_restart_of_the_broker(short: tuple[World, Broker]) -> None:
    world, broker = short
    deal = world.deal({"do": "sleep", "seconds": 2 * LEASE_S})
    child = world.cloud.start(*deal.run())
    child.program()
    broker.stop(signal.SIGKILL)
    broker.start()
    assert child.end(40).expect(0).data["outputs"]["model"]["generation"] == 1


def test_another_broker_at_the_same_address_is_not_the_same(short: tuple[World, Broker]) -> None:
    world, broker = short
    deal = world.deal({"do": "sleep"})
    child = world.cloud.start(*deal.run())
    child.program()
    broker.stop(signal.SIGKILL)
    broker.start("another-state")
    said = child.end(40).expect(1)
    assert said.error == "lease-lost"
    again = world.cloud.run(*deal.run()).expect(1).data
    assert again["error"] == "broker-replaced"
    assert again["reasons"]
    assert again["hint"]


def test_a_broker_that_is_down_is_named_with_its_address(short: tuple[World, Broker]) -> None:
    world, broker = short
    deal = world.deal()
    broker.stop()
    with no_traces(deal, SEALED):
        said = world.cloud.run(*deal.run(), as_json=False).expect(1)
    assert broker.url in said.err
    assert "hint:" in said.err
    assert "code: broker-unreachable" in said.err


def test_a_broker_that_never_answers_is_given_up(short: tuple[World, Broker]) -> None:
    world, broker = short
    deal = world.deal()
    broker.send(signal.SIGSTOP)
    hasty = (
        "from cloister.broker.client import BrokerClient\n"
        "BrokerClient.connect.__func__.__kwdefaults__['timeout_s'] = 1.5"
    )
    error = world.cloud.run(*deal.run(), before=hasty).expect(1).data
    assert error["error"] == "broker-unreachable"


@pytest.mark.parametrize("ahead", ["30", "3600", "-3600"])
def test_a_wall_clock_that_is_wrong_ends_no_lease(short: tuple[World, Broker], ahead: str) -> None:
    """A lease is a span of time: renewals come in time and none is lost, whatever the clock on the wall says."""
    world, _ = short
    deal = world.deal({"do": "sleep", "seconds": 1.5 * LEASE_S})
    skewed = (
        "from datetime import UTC, datetime, timedelta\nimport cloister.cli.common as common\n"
        f"common.now = lambda: datetime.now(UTC) + timedelta(seconds={ahead})\n"
        "import cloister.cli.run_ as run\nrun.now = common.now"
    )
    world.cloud.run(*deal.run(), before=skewed).expect(0)


def test_a_contract_that_waits_says_for_whom(world: World) -> None:
    deal = world.deal(signers=["vendor"])
    with no_traces(deal, SEALED):
        said = world.cloud.run(*deal.run(), as_json=False).expect(5)
    assert "hospital" in said.err
    assert "code: waiting" in said.err
