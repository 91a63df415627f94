"""The speaker: what leaves, what is dropped and counted, and that nobody who prints ever waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cloister.broker.client import Listener
from cloister.broker.wire import WordsBatch
from cloister.errors import CloisterError, DeniedError, PeerError
from cloister.node import words
from cloister.node.progress import read_line
from cloister.node.words import Speaker, readable
from cloister.testkit.broker import RunningBroker, running_broker
from tests.broker.world import World, trainer_node


@dataclass
class Sent:
    """A broker that remembers batches, and fails while `error` is set."""

    batches: list[tuple[int, str, tuple[str, ...], int, bool]] = field(default_factory=list)
    error: CloisterError | None = None
    tries: int = 0
    hang: threading.Event | None = None

    def __call__(self, seq: int, stream: str, lines: Sequence[str], *, dropped: int, end: bool) -> None:
        self.tries += 1
        if self.hang is not None:
            self.hang.wait(10)
        if self.error is not None:
            raise self.error
        WordsBatch(tuple(lines), dropped, end)  # what the wire takes
        self.batches.append((seq, stream, tuple(lines), dropped, end))

    def lines(self, stream: str = "metrics") -> list[str]:
        return [line for _, of, lines, _, _ in self.batches if of == stream for line in lines]


def hear(speaker: Speaker, line: bytes) -> None:
    speaker.hear(line, read_line(line))


def eventually(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_metrics_leave_in_order_and_text_does_not() -> None:
    sent = Sent()
    with Speaker(sent, ("metrics",), period_s=0.01) as speaker:
        hear(speaker, b"epoch 1/2 loss 0.51234 of patient Ada\n")
        hear(speaker, b"patient Ada Lovelace\n")
        eventually(lambda: len(sent.lines()) == 1)
        hear(speaker, b"epoch 2/2 loss=0.25\n")
    assert sent.lines() == ["epoch 1/2 loss 0.5123", "epoch 2/2 loss 0.25"]
    assert [seq for seq, *_ in sent.batches] == list(range(1, len(sent.batches) + 1))
    assert sent.batches[0][2] == ()  # it says that it is there
    assert [end for *_, end in sent.batches] == [False] * (len(sent.batches) - 1) + [True]


def test_logs_leave_where_the_contract_names_them() -> None:
    sent = Sent()
    with Speaker(sent, ("logs",), period_s=10) as speaker:
        hear(speaker, b"loss 0.5 \x1b[31mAda\xff\n")
    assert (sent.lines(), sent.lines("logs")) == ([], ["loss 0.5 �[31mAda�"])
    sent = Sent()
    with Speaker(sent, ("logs", "metrics"), period_s=10) as speaker:
        hear(speaker, b"loss 0.5 Ada\n")
    assert (sent.lines(), sent.lines("logs")) == (["loss 0.5"], ["loss 0.5 Ada"])
    assert [end for *_, end in sent.batches] == [False, False, True]


def test_nothing_is_started_where_nothing_leaves() -> None:
    sent = Sent()
    with Speaker(sent, (), period_s=0.01) as speaker:
        hear(speaker, b"loss 0.5\n")
        assert not speaker._thread.is_alive()
        time.sleep(0.05)
    assert sent.tries == 0


def test_a_broker_that_hangs_holds_nobody_up() -> None:
    sent = Sent(hang=threading.Event())
    speaker = Speaker(sent, ("metrics", "logs"), period_s=0.01)
    with speaker:
        eventually(lambda: sent.tries == 1)
        begin = time.perf_counter()
        for number in range(5000):
            hear(speaker, b"loss %d\n" % number)
        assert time.perf_counter() - begin < 2
        speaker.finish()
        assert sent.hang is not None
        sent.hang.set()
    assert sent.lines()[-1] == "loss 4999"
    assert len(sent.lines()) == words.MAX_LINES
    assert speaker.dropped == 2 * (5000 - words.MAX_LINES)
    assert sent.batches[-1][3] == speaker.dropped


def test_what_meets_an_absent_broker_is_dropped_and_counted_and_the_newest_arrives() -> None:
    sent = Sent(error=PeerError("away", code="broker-unreachable"))
    with Speaker(sent, ("metrics",), period_s=0.01) as speaker:
        hear(speaker, b"loss 1\n")
        eventually(lambda: speaker.dropped == 1)
        sent.error = None
        hear(speaker, b"loss 2\n")
    assert sent.lines() == ["loss 2"]
    assert sent.batches[-1][3] == 1


def test_an_absent_broker_is_asked_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Sent(error=PeerError("away", code="broker-unreachable"))
    monkeypatch.setattr(words, "PAUSE_MOST_S", 0.2)
    stop = threading.Event()
    with Speaker(sent, ("metrics",), period_s=0.01) as speaker:

        def chatter() -> None:
            while not stop.wait(0.001):
                hear(speaker, b"loss 1\n")

        thread = threading.Thread(target=chatter)
        thread.start()
        time.sleep(0.6)
        stop.set()
        thread.join()
    assert 3 <= sent.tries <= 12


@pytest.mark.parametrize("code", ["denied", "lease-refused"])
def test_a_refusal_is_final(code: str) -> None:
    sent = Sent(error=DeniedError("no", code=code))
    with Speaker(sent, ("metrics",), period_s=0.01) as speaker:
        eventually(lambda: sent.tries == 1)
        sent.error = None
        for _ in range(5):
            hear(speaker, b"loss 1\n")
            time.sleep(0.02)
    assert sent.tries == 1
    assert speaker.dropped == 5


def test_too_fast_costs_a_batch_only() -> None:
    sent = Sent(error=DeniedError("slower", code="too-fast"))
    with Speaker(sent, ("metrics",), period_s=0.01) as speaker:
        eventually(lambda: sent.tries == 1)
        sent.error = None
        hear(speaker, b"loss 1\n")
    assert sent.lines() == ["loss 1"]


def test_every_batch_fits_the_wire() -> None:
    sent = Sent()
    with Speaker(sent, ("logs",), period_s=10) as speaker:
        for _ in range(300):
            hear(speaker, "ü".encode() * 3000 + b"\n")
    (batch,) = [batch for batch in sent.batches if batch[2]]
    assert sum(len(line.encode()) for line in batch[2]) <= words.MAX_BYTES
    assert len(WordsBatch(batch[2], batch[3], True).encode()) + 28 <= 96 << 10
    widest = b"epoch 123456789/123456789 step 123456789/123456789 " + b" ".join(
        b"abcdefghijklmno%c -1.234e-99" % letter for letter in b"abcdefgh"
    )
    sent = Sent()
    with Speaker(sent, ("metrics",), period_s=10) as speaker:
        for _ in range(300):
            hear(speaker, widest)
    assert len(sent.lines()) == words.MAX_BYTES // len(sent.lines()[0])
    assert len(WordsBatch(tuple(sent.lines()), 44, True).encode()) + 28 <= 96 << 10


def test_long_lines_are_cut() -> None:
    assert len(readable(b"x" * 100_000)) == words.MAX_LINE
    assert readable("ü".encode() * 100_000).endswith("…")


# --- against a broker -------------------------------------------------------------------------------------------------


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running_broker(tmp_path / "state", process=False) as running:
        yield running


def test_the_last_words_reach_a_remote_party_also_over_a_restart(broker: RunningBroker) -> None:
    world, client = World(), broker.client()
    contract = world.ready(client, world.contract(leaves='metrics_to = ["hospital"]'))
    release = client.release(contract, "train", reads=("xrays",), attester=trainer_node())
    ear: Listener = broker.client().listener(contract, world.hospital.sign)
    with Speaker.of(client, release, ("metrics",)) as speaker:
        hear(speaker, b"loss 0.5\n")
        eventually(lambda: [line.text for line in ear.hear().lines] == ["loss 0.5"])
        broker.stop()
        broker.start()
        hear(speaker, b"loss 0.25\n")
    heard = ear.hear()
    assert [line.text for line in heard.lines] == ["loss 0.25"]
    assert [lease.live for lease in heard.leases] == [False]


def test_a_run_does_not_wait_for_a_broker_that_is_gone(broker: RunningBroker) -> None:
    world, client = World(), broker.client()
    contract = world.ready(client, world.contract(leaves='metrics_to = ["hospital"]'))
    release = client.release(contract, "train", reads=("xrays",), attester=trainer_node())
    speaker = Speaker.of(client, release, ("metrics",))
    with speaker:
        broker.stop()
        begin = time.perf_counter()
        for _ in range(1000):
            hear(speaker, b"loss 0.5\n")
        assert time.perf_counter() - begin < 1
    assert time.perf_counter() - begin < 3
    assert speaker.dropped == 1000
    broker.start()
