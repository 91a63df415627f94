"""The metrics relay without a network: who may say what, who may hear it, what is kept. One fault each."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.broker import decide, relay, wire
from cloister.broker.life import State
from cloister.contract.parse import parse
from cloister.crypto import hpke
from cloister.crypto.keys import Secret, wrap
from cloister.errors import DeniedError, PeerError
from cloister.node.progress import read_line
from cloister.testkit.softtee import NOW
from tests.broker.world import TRAINER, World

WORLD = World()
LEAVES = 'metrics_to = ["hospital", "clinic"]'
CONTRACT = parse(WORLD.contract(leaves=LEAVES), name="test.toml")
WORDY = parse(WORLD.contract(leaves=LEAVES + '\nleaves = ["metrics", "logs"]'), name="test.toml")
SILENT = parse(WORLD.contract(), name="test.toml")
BOTH = frozenset({"hospital", "vendor"})
KNOWN = decide.Known(CONTRACT, BOTH, State.ACTIVE)
SPKI = b"\x02" * 32
LEASE = "l-" + "0" * 32
SECRET = Secret(b"\x07" * 32)
HELD = decide.LeaseFacts(
    CONTRACT.id, "train", ("xrays",), (), bytes(32), TRAINER, "offline", "L1", NOW + timedelta(minutes=10)
)


def sealed(*lines: str, seq: int = 0, stream: str = "metrics", dropped: int = 0, end: bool = False) -> bytes:
    batch = wire.WordsBatch(lines, dropped, end)
    return wrap(wire.words_key(SECRET), batch.encode(), context=wire.words_context(LEASE, seq, stream))


def said(seq: int = 0, stream: str = "metrics", *lines: str, **changed: Any) -> wire.WordsStatement:
    return replace(wire.WordsStatement(LEASE, SPKI, seq, stream, sealed(*lines, seq=seq, stream=stream)), **changed)


def judged(statement: wire.WordsStatement, **changed: Any) -> Any:
    facts: dict[str, Any] = {"held": HELD, "known": KNOWN, "flow": relay.Flow(), "now": NOW, "spki": SPKI}
    facts |= changed
    held, known, flow = (facts.pop(name) for name in ("held", "known", "flow"))
    return relay.accept(statement, held, known, flow, **facts)


# --- node -> broker ---------------------------------------------------------------------------------------------------


def test_an_accepted_batch_moves_the_flow() -> None:
    statement = said(5)
    flow = judged(statement)
    assert flow == relay.Flow(5, statement.hashed(), relay.BURST - 1, NOW)
    assert isinstance(judged(said(6), flow=flow), relay.Flow)
    assert isinstance(judged(said(900), flow=flow), relay.Flow)


@pytest.mark.parametrize(
    ("statement", "changed", "code", "where"),
    [
        (said(), {"now": HELD.expires}, "lease-refused", "lease.expires"),
        (said(), {"known": None}, "lease-refused", "contract"),
        (said(), {"known": replace(KNOWN, state=State.REVOKED)}, "lease-refused", "contract"),
        (said(), {"known": replace(KNOWN, state=State.REPLACED)}, "lease-refused", "contract"),
        (said(), {"spki": b"\x03" * 32}, "lease-refused", "words.peer_key"),
        (said(0, "logs"), {}, "denied", "phase.train.leaves"),
        (said(), {"known": replace(KNOWN, contract=SILENT)}, "denied", "phase.train.leaves"),
        (said(), {"held": replace(HELD, phase="serve")}, "denied", "phase.serve.leaves"),
        (said(), {"held": replace(HELD, phase="refine")}, "denied", "phase.refine.leaves"),
        (said(3), {"flow": relay.Flow(seq=3, last=b"\x01" * 32)}, "lease-refused", "words.seq"),
        (said(2), {"flow": relay.Flow(seq=3)}, "lease-refused", "words.seq"),
        (said(), {"flow": relay.Flow(tokens=0.99, at=NOW)}, "too-fast", "words.rate"),
        (said(), {"flow": relay.Flow(tokens=0.0, at=NOW + timedelta(hours=1))}, "too-fast", "words.rate"),
    ],
)
def test_a_batch_with_one_fault(statement: wire.WordsStatement, changed: Any, code: str, where: str) -> None:
    error = judged(statement, **changed)
    assert isinstance(error, DeniedError)
    assert (error.code, [reason.where for reason in error.reasons]) == (code, [where])


def test_all_faults_are_reported_and_the_first_gives_the_code() -> None:
    flow = relay.Flow(seq=9, tokens=0.0, at=NOW)
    error = judged(said(9, "logs"), spki=bytes(32), flow=flow)
    wheres = [reason.where for reason in error.reasons]
    assert wheres == ["words.peer_key", "words.seq", "phase.train.leaves", "words.rate"]
    assert error.code == "lease-refused"


def test_logs_leave_where_the_contract_names_them() -> None:
    assert isinstance(judged(said(0, "logs"), known=replace(KNOWN, contract=WORDY)), relay.Flow)


def test_the_last_batch_again_is_the_same_batch() -> None:
    statement = said(4)
    flow = judged(statement)
    assert judged(statement, flow=flow) is flow
    assert judged(statement, flow=replace(flow, tokens=0.0)) == replace(flow, tokens=0.0)
    other = judged(said(4, "metrics", "loss 1"), flow=flow)
    assert [reason.where for reason in other.reasons] == ["words.seq"]


def test_a_second_gives_four_batches_and_eight_may_come_at_once() -> None:
    flow, taken = relay.Flow(), 0
    for number in range(1000):
        now = NOW + timedelta(milliseconds=10 * number)
        verdict = judged(said(number), flow=flow, now=now)
        if isinstance(verdict, relay.Flow):
            flow, taken = verdict, taken + 1
    assert taken == int(relay.BURST + 9.99 * relay.RATE)


def test_naive_times_are_the_callers_mistake() -> None:
    naive = NOW.replace(tzinfo=None)
    with pytest.raises(ValueError, match="time zone"):
        judged(said(), now=naive)
    with pytest.raises(ValueError, match="time zone"):
        heard(now=naive)


# --- what metrics are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["loss 0.4312", "epoch 2/5 step 30/60 loss 0.4312 lr 1e-05", "a -0", "x_y 1.235e+107"])
def test_metrics(text: str) -> None:
    assert relay.metrics_line(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "loss",
        "patient ada",
        "loss 0.43125",
        "loss  0.4",
        "loss 0.4 ",
        "Loss 0.4",
        "loss nan",
        "loss inf",
        "loss 1e999",
        "loss ٣",
        "a_name_of_seventeen 1",
        "loss 0.4\n",
        "loss 1/2/3",
        " ".join(["a 1"] * 11),
    ],
)
def test_no_metrics(text: str) -> None:
    assert not relay.metrics_line(text)


@given(st.lists(st.sampled_from([" ", ":", "=", "/", "loss", "epoch", "E", "e-5", "1", "99", "0.4", "-", "[", "\x1b", "é"]))
       | st.text(max_size=60).map(list))  # fmt: skip
def test_whatever_progress_lets_through_is_metrics(parts: list[str]) -> None:
    progress = read_line("".join(parts).encode())
    assert progress is None or relay.metrics_line(progress.text)


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_every_rounded_number_is_metrics(value: float) -> None:
    assert relay.metrics_line(f"loss {value:.4g}")


def test_text_in_a_metrics_batch_does_not_pass_and_is_not_repeated() -> None:
    with pytest.raises(DeniedError) as refused:
        relay.unseal(SECRET, said(0, "metrics", "loss 0.4", "patient ada"))
    assert [reason.where for reason in refused.value.reasons] == ["words.lines[1]"]
    assert "ada" not in str(refused.value.as_json())
    assert relay.unseal(SECRET, said(0, "logs", "patient ada")).lines == ("patient ada",)


@pytest.mark.parametrize("changed", [{"seq": 1}, {"stream": "logs"}, {"lease": "l-" + "1" * 32}, {"sealed": bytes(40)}])
def test_a_batch_opens_in_its_place_only(changed: Any) -> None:
    with pytest.raises(PeerError):
        relay.unseal(SECRET, replace(said(0, "metrics", "loss 0.4"), **changed))
    with pytest.raises(PeerError):
        relay.unseal(Secret(b"\x08" * 32), said(0, "metrics", "loss 0.4"))


def test_nothing_steers_a_terminal() -> None:
    assert relay.printable("a\x1b[2Jb\r\u202ec\td\u2028") == "a�[2Jb��c\td�"


# --- broker -> party --------------------------------------------------------------------------------------------------

PAIR = hpke.KeyPair.generate()
BROKER = hpke.KeyPair.generate()
ASKED = wire.ListenStatement(
    CONTRACT.id, "", wire.sha256(PAIR.public), wire.sha256(BROKER.public), NOW + timedelta(hours=1)
)
HOSPITAL = WORLD.hospital.key.fingerprint


def heard(
    statement: wire.ListenStatement = ASKED, by: str = HOSPITAL, known: decide.Known | None = KNOWN, now: datetime = NOW
) -> Any:
    return relay.listen(statement, by, broker=BROKER.public, key=PAIR.public, known=known, now=now)


def test_who_is_named_hears_what_leaves() -> None:
    assert heard() == {"train": ("metrics",)}
    assert heard(replace(ASKED, phase="train")) == {"train": ("metrics",)}
    assert heard(by=WORLD.clinic.key.fingerprint) == {"train": ("metrics",)}
    assert heard(known=replace(KNOWN, contract=WORDY)) == {"train": ("metrics", "logs")}


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"statement": replace(ASKED, broker=bytes(32))}, ["listen.broker"]),
        ({"statement": replace(ASKED, key=bytes(32))}, ["listen.key"]),
        ({"statement": replace(ASKED, expires=NOW)}, ["listen.expires"]),
        ({"statement": replace(ASKED, expires=NOW + timedelta(hours=1, microseconds=1))}, ["listen.expires"]),
        ({"statement": replace(ASKED, phase="serve")}, ["phase.serve.metrics_to"]),
        ({"statement": replace(ASKED, phase="refine")}, ["listen.phase"]),
        ({"known": None}, ["contract"]),
        ({"known": replace(KNOWN, state=State.REVOKED)}, ["contract"]),
        ({"known": replace(KNOWN, signed=frozenset({"vendor"}))}, ["signatures"]),
        ({"known": replace(KNOWN, contract=SILENT)}, ["phase.train.metrics_to", "phase.serve.metrics_to"]),
        ({"by": WORLD.vendor.key.fingerprint}, ["phase.train.metrics_to", "phase.serve.metrics_to"]),
        ({"by": "SHA256:" + "A" * 43}, ["phase.train.metrics_to", "phase.serve.metrics_to"]),
        ({"now": NOW + timedelta(days=40000)}, ["listen.expires", "expires"]),
    ],
)
def test_a_listener_with_one_fault(changed: Any, where: list[str]) -> None:
    error = heard(**changed)
    assert isinstance(error, DeniedError)
    assert error.exit_status == 3
    assert [reason.where for reason in error.reasons] == where


# --- what is kept -----------------------------------------------------------------------------------------------------

ALL = {"train": ("metrics", "logs")}


def keep(shelves: relay.Shelves, *lines: str, stream: str = "metrics", lease: str = LEASE, contract: str = CONTRACT.id,
         now: datetime = NOW, dropped: int = 0, end: bool = False) -> None:  # fmt: skip
    shelves.heard(lease, replace(HELD, contract=contract), relay.Flow(), now=now)
    shelves.keep(lease, stream, wire.WordsBatch(lines, dropped, end), now=now)


def texts(got: relay.Heard) -> list[str]:
    return [line.text for line in got.lines]


def test_lines_of_all_leases_and_streams_come_in_their_order_and_once() -> None:
    shelves = relay.Shelves()
    keep(shelves, "a 1", "a 2")
    keep(shelves, "said", stream="logs", lease="l-" + "1" * 32)
    keep(shelves, "a 3")
    first = shelves.since(CONTRACT.id, ALL, 0)
    assert texts(first) == ["a 1", "a 2", "said", "a 3"]
    assert texts(shelves.since(CONTRACT.id, {"train": ("metrics",)}, 0)) == ["a 1", "a 2", "a 3"]
    assert shelves.since(CONTRACT.id, ALL, first.next) == relay.Heard((), first.next, False)
    keep(shelves, "a 4")
    assert texts(shelves.since(CONTRACT.id, ALL, first.next)) == ["a 4"]
    assert shelves.since(CONTRACT.id, {"serve": ("metrics",)}, 0).lines == ()
    assert shelves.since("sha256:" + "0" * 64, ALL, 0).lines == ()


def test_the_cursor_tells_nothing_of_other_contracts() -> None:
    shelves = relay.Shelves()
    other = "sha256:" + "0" * 64
    keep(shelves, *["a 1"] * 200, contract=other, lease="l-" + "1" * 32)
    keep(shelves, "b 1")
    assert shelves.since(CONTRACT.id, ALL, 0).next == 1


def test_one_answer_is_bounded_and_the_rest_comes_next() -> None:
    shelves = relay.Shelves()
    for batch in range(20):
        keep(shelves, *[f"a {batch * 200 + line}" for line in range(200)])
    got, after = [], 0
    for _ in range(3):
        page = shelves.since(CONTRACT.id, ALL, after)
        got += texts(page)
        after = page.next
    assert (len(got), page.more, got) == (4000, False, [f"a {n}" for n in range(4000)])
    shelves = relay.Shelves()
    for _ in range(10):
        keep(shelves, *["x" * 2000] * 32, stream="logs")
    page = shelves.since(CONTRACT.id, ALL, 0)
    assert page.more
    assert sum(len(text) for text in texts(page)) <= relay.REPLY_BYTES


def test_old_lines_go_first_and_are_counted() -> None:
    shelves = relay.Shelves()
    for number in range(60):
        keep(shelves, *["a 1"] * 199, f"b {number}")
    keep(shelves, *["ü" * 1000] * 100, stream="logs", dropped=5)
    for _ in range(6):
        keep(shelves, *["ü" * 1000] * 100, stream="logs", dropped=7, end=True)
    (shelf,) = shelves.of(CONTRACT.id, ALL)
    assert len(shelf.lines["metrics"]) == relay.MAX_METRIC_LINES
    assert shelf.lines["metrics"][-1].text == "b 59"
    assert shelf.log_bytes == sum(2000 for _ in shelf.lines["logs"]) <= relay.MAX_LOG_BYTES
    assert shelf.dropped == 2000 + 700 - len(shelf.lines["logs"])
    assert (shelf.unsent, shelf.ended) == (7, True)
    assert shelf.size == shelves.size


def test_a_contract_that_says_too_much_loses_its_own_words() -> None:
    shelves = relay.Shelves()
    keep(shelves, "mine 1")
    other = "sha256:" + "0" * 64
    for lease in range(1, 71):
        for _ in range(12):
            keep(shelves, *["x" * 2000] * 40, stream="logs", lease=f"l-{lease:032x}", contract=other)
    assert shelves.size <= relay.MAX_TOTAL_BYTES
    assert texts(shelves.since(CONTRACT.id, ALL, 0)) == ["mine 1"]
    assert len(shelves.of(other, ALL)) < 70


def test_words_are_kept_for_a_day() -> None:
    shelves = relay.Shelves()
    keep(shelves, "a 1")
    other = "l-" + "1" * 32
    keep(shelves, "b 1", lease=other, now=NOW + relay.KEPT)
    assert len(shelves.of(CONTRACT.id, ALL)) == 2
    keep(shelves, "b 2", lease=other, now=NOW + relay.KEPT + timedelta(seconds=1))
    assert texts(shelves.since(CONTRACT.id, ALL, 0)) == ["b 1", "b 2"]
