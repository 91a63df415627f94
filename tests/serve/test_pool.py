"""The pool's promises with models that are no processes, and the moments at which answers may leave."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import MachineError
from cloister.serve.pool import ModelFaultError, Pool
from cloister.serve.service import until_multiple
from cloister.serve.wire import RECEIPT_ROOM, REPLY_STEP, reply_size


class Fake:
    """Counts its questions; ends when told to."""

    made = 0

    def __init__(self) -> None:
        Fake.made += 1
        self.number = Fake.made
        self.asked = 0
        self.closed = 0

    def ask(self, line: bytes, timeout_s: float) -> bytes:
        self.asked += 1
        if b"ZGll" in line:  # base64 of "die"
            raise ModelFaultError("it ended instead of answering")
        return f"{self.number}.{self.asked}".encode()

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def _from_one() -> None:
    Fake.made = 0


def test_a_fresh_process_for_every_question_or_one_for_all() -> None:
    one_shot = Pool(Fake, fresh=True, timeout_s=2)
    assert [one_shot.ask(b"?").split(b".")[1] for _ in range(4)] == [b"1"] * 4
    one_shot.close()
    Fake.made = 0
    kept = Pool(Fake, fresh=False, timeout_s=2)
    assert [kept.ask(b"?") for _ in range(3)] == [b"1.1", b"1.2", b"1.3"]
    kept.close()


def test_a_faulty_process_is_replaced() -> None:
    pool = Pool(Fake, fresh=False, timeout_s=2)
    with pytest.raises(ModelFaultError):
        pool.ask(b"die")
    assert pool.ask(b"?") == b"2.1"
    pool.close()


def test_a_start_that_fails_is_tried_again_for_the_next_question() -> None:
    """One full disk or busy moment must not silence a service for good."""
    troubles = [MachineError("no room", code="no-sandbox"), MachineError("no room", code="no-sandbox")]

    def start() -> Fake:
        if Fake.made == 1 and troubles:
            raise troubles.pop()
        return Fake()

    pool = Pool(start, fresh=True, timeout_s=2)
    assert pool.ask(b"?") == b"1.1"
    for _ in range(2):
        with pytest.raises(MachineError, match="no room"):
            pool.ask(b"?")
    assert pool.ask(b"?") == b"2.1"
    pool.close()


def test_who_waits_for_a_process_learns_at_once_that_the_service_stops() -> None:
    class Busy(Fake):
        def ask(self, line: bytes, timeout_s: float) -> bytes:
            time.sleep(0.6)
            return b"late"

    pool = Pool(Busy, fresh=False, timeout_s=30)
    first = threading.Thread(target=pool.ask, args=(b"?",))
    first.start()
    time.sleep(0.1)
    got: list[str] = []

    def waiting() -> None:
        try:
            pool.ask(b"?")
        except MachineError as error:
            got.append(error.code)

    second = threading.Thread(target=waiting)
    second.start()
    pool.close()
    second.join(0.45)
    assert got == ["interrupted"]
    first.join()


def test_a_question_that_finds_every_process_busy_is_told_so() -> None:
    class Busy(Fake):
        def ask(self, line: bytes, timeout_s: float) -> bytes:
            time.sleep(0.8)
            return b"late"

    pool = Pool(Busy, fresh=False, timeout_s=0.2)
    first = threading.Thread(target=pool.ask, args=(b"?",))
    first.start()
    time.sleep(0.05)
    with pytest.raises(MachineError, match="became free in time; this question was not counted"):
        pool.ask(b"?")
    first.join()
    pool.close()


@given(
    now=st.integers(min_value=1_600_000_000_000, max_value=4_000_000_000_000),
    every=st.timedeltas(min_value=timedelta(milliseconds=1), max_value=timedelta(days=1)),
)
def test_an_answer_waits_for_the_next_multiple_and_no_longer(now: int, every: timedelta) -> None:
    here = datetime.fromtimestamp(now / 1000, UTC)
    pause = until_multiple(here, every)
    assert timedelta() <= pause < every
    assert (here + pause - datetime(1970, 1, 1, tzinfo=UTC)) % every == timedelta()


def test_an_interval_is_positive() -> None:
    with pytest.raises(ValueError, match="not an interval"):
        until_multiple(datetime.now(UTC), timedelta())


@given(st.integers(min_value=1, max_value=1 << 22))
def test_a_reply_has_room_for_answer_and_receipt_in_whole_steps(answer: int) -> None:
    size = reply_size(answer)
    assert size % REPLY_STEP == 0
    assert answer + RECEIPT_ROOM <= size < answer + RECEIPT_ROOM + REPLY_STEP
