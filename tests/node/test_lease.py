"""The lease keeper walks its table: renew, retry while the broker is away, lose on refusal or silence."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from cloister.errors import CloisterError, DeniedError, MachineError, PeerError
from cloister.node.lease import LeaseKeeper, boot_time


@dataclass(frozen=True)
class Times:
    expires: datetime
    renew_after: datetime


def now() -> datetime:
    return datetime.now(UTC)


def lease(life_s: float) -> Times:
    return Times(now() + timedelta(seconds=life_s), now() + timedelta(seconds=life_s / 2))


def keep(renew: Callable[[], Times], life_s: float, wait_s: float = 5.0) -> tuple[LeaseKeeper, list[CloisterError]]:
    lost: list[CloisterError] = []
    ended = threading.Event()

    def on_lost(error: CloisterError) -> None:
        lost.append(error)
        ended.set()

    with LeaseKeeper(lease(life_s), renew, asked=boot_time(), on_lost=on_lost) as keeper:
        ended.wait(wait_s)
    return keeper, lost


def test_it_renews_at_half_life_again_and_again() -> None:
    calls = []

    def renew() -> Times:
        calls.append(now())
        return lease(0.1)

    keeper, lost = keep(renew, 0.1, wait_s=0.4)
    assert not lost
    assert keeper.renewals == len(calls) >= 3
    keeper.check()


def test_a_refusal_ends_it_at_once_and_says_why() -> None:
    def renew() -> Times:
        raise DeniedError("the contract was revoked by hospital")

    keeper, lost = keep(renew, 0.1)
    assert [error.code for error in lost] == ["lease-lost"]
    assert "revoked by hospital" in lost[0].reasons[0].found
    with pytest.raises(MachineError, match="refused to renew"):
        keeper.check()


def test_a_silent_broker_is_tried_again_until_the_lease_ends() -> None:
    calls = []

    def renew() -> Times:
        calls.append(now())
        raise PeerError("no answer", code="broker-unreachable")

    begin = now()
    _, lost = keep(renew, 1.6)
    assert len(calls) >= 2
    assert len(lost) == 1
    assert (now() - begin).total_seconds() >= 1.5


def test_a_broker_that_comes_back_in_time_is_forgiven() -> None:
    answers: list[Times | None] = [None, lease(60)]

    def renew() -> Times:
        answer = answers.pop(0)
        if answer is None:
            raise PeerError("restarting", code="broker-unreachable")
        return answer

    keeper, lost = keep(renew, 3.0, wait_s=3.5)
    assert not lost
    assert keeper.renewals == 1


def test_a_clock_set_back_on_the_node_gains_no_time() -> None:
    """The broker's times say 'tomorrow' on this machine's clock; only the length of the lease counts."""
    lost = threading.Event()
    tomorrow = now() + timedelta(days=1)

    def starved() -> Times:
        raise PeerError("the operator drops renewals", code="broker-unreachable")

    begin = boot_time()
    times = Times(expires=tomorrow + timedelta(seconds=1), renew_after=tomorrow + timedelta(seconds=0.5))
    with LeaseKeeper(times, starved, asked=begin, on_lost=lambda error: lost.set()):
        assert lost.wait(5)
    assert 0.9 <= boot_time() - begin < 4


def test_the_time_that_the_release_took_counts() -> None:
    lost = threading.Event()

    def starved() -> Times:
        raise PeerError("away", code="broker-unreachable")

    with LeaseKeeper(lease(60), starved, asked=boot_time() - 61, on_lost=lambda error: lost.set()):
        assert lost.wait(2)
