"""Words that leave while a phase runs: may this node say them, may this party hear them, what is kept. Pure.

A contract's `metrics_to` names who hears, `leaves` names what. A node sends batches under its lease; a party asks for
what it has not heard yet. Both are judged here; every step that fails is a reason, the code is that of the first.

`accept`, for a batch whose HMAC under the lease secret the caller has checked:

  1 lease      live, and its contract active                                              `lease-refused`
  2 run        sent to this run of the broker (SHA-256 of its TLS key), not to another    `lease-refused`
  3 stream     metrics or logs, as the lease's phase lets it leave                        `denied`
  4 order      a number above the last one; exactly the last batch again is not kept twice  `lease-refused`
  5 rate       at most RATE batches a second, BURST at once                               `too-fast`
  6 lines      (`unseal`) metrics are names and rounded numbers, nothing else             `denied`

`listen`, for a statement whose SSHSIG the caller has checked:

  1 addressed  this broker's key, the party's ephemeral key, a time within LISTEN_LIFE
  2 contract   known, active, signed by everybody
  3 party      the signing key is a party's; each phase asked for names that party in `metrics_to`

`Shelves` keeps the words: in memory, bounded, the oldest dropped and counted. Nothing of it is ever on a disk, so a
restart of the broker loses it. No log entries: words change nothing, and a log of them would be larger than they are.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from heapq import merge
from itertools import islice
from typing import Final

from cloister.broker import wire
from cloister.broker.decide import Known, LeaseFacts, life_reasons, live_lease
from cloister.crypto.keys import Secret, UnwrapError, unwrap
from cloister.errors import CloisterError, DeniedError, PeerError, Reason

METRICS: Final = "metrics"
LOGS: Final = "logs"

RATE: Final = 4.0
"""Batches a second and lease: a node sends each of two streams once a second."""
BURST: Final = 8.0
MAX_METRIC_LINES: Final = 10_000
"""Per lease; at one line a second nearly three hours."""
MAX_LOG_BYTES: Final = 1 << 20
"""Per lease, UTF-8."""
MAX_TOTAL_BYTES: Final = 64 << 20
"""Of all leases; beyond it the contract that holds most loses what it heard from first."""
LINE_COST: Final = 200
"""What a line is counted with besides its text: the object, its number, its place in a list."""
KEPT: Final = timedelta(hours=24)
"""A lease's words go this long after its last one."""
LISTEN_LIFE: Final = timedelta(hours=1)
"""Longest validity of a listen statement: a security key is touched once an hour."""
REPLY_LINES: Final = 2000
REPLY_BYTES: Final = 256 << 10
"""Text in one answer; the listener asks again for the rest."""

_NAME: Final = re.compile(r"[a-z][a-z_]{0,15}", re.ASCII)
_COUNT: Final = re.compile(r"\d{1,9}/\d{1,9}", re.ASCII)
_NUMBER: Final = re.compile(r"-?\d{1,12}(?:\.\d{1,9})?(?:e[+-]\d{2,3})?", re.ASCII)
MOST_PAIRS: Final = 10
"""Two counters and eight metrics, as node.progress reads them from one line."""


# --- node -> broker ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flow:
    """How a lease has spoken so far: last number, SHA-256 of the last statement, batches it may send at `at`."""

    seq: int = -1
    last: bytes = b""
    tokens: float = BURST
    at: datetime | None = None


def accept(
    statement: wire.WordsStatement, held: LeaseFacts, known: Known | None, flow: Flow, *, spki: bytes, now: datetime
) -> Flow | CloisterError:
    """Return the flow after this batch, `flow` itself if it is the last batch again, or why it is refused (steps 1 to 5).

    Raises:
        ValueError: `now` has no time zone (a caller's mistake).
    """
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    refused = live_lease(held, known, now)
    lease = [] if refused is None else list(refused.reasons)  # 1
    if statement.peer_key != spki:  # 2
        lease.append(Reason("words.peer_key", "another run of a broker", "this run", "connect again"))
    denied: list[Reason] = []
    if known is not None:  # 3
        phase = known.contract.phase.get(held.phase)
        out = () if phase is None else phase.streams_out
        if statement.stream not in out:
            hint = "`metrics_to` and `leaves` of the contract say what leaves"
            denied.append(Reason(f"phase.{held.phase}.leaves", statement.stream, " or ".join(out) or "nothing", hint))
    hashed = statement.hashed()
    again = statement.seq == flow.seq and hashed == flow.last
    if statement.seq <= flow.seq and not again:  # 4
        lease.append(Reason("words.seq", str(statement.seq), f"above {flow.seq}", "each batch has the next number"))
    tokens = flow.tokens
    if flow.at is not None:
        tokens = min(BURST, tokens + RATE * max((now - flow.at).total_seconds(), 0.0))
    fast: list[Reason] = []
    if tokens < 1.0 and not again:  # 5
        fast.append(Reason("words.rate", "a batch too soon", f"at most {RATE:g} a second", "put more into one batch"))
    reasons = lease + denied + fast
    if reasons:
        code = "lease-refused" if lease else "denied" if denied else "too-fast"
        return DeniedError("these words were not taken", code=code, reasons=reasons)
    return flow if again else replace(flow, seq=statement.seq, last=hashed, tokens=tokens - 1.0, at=now)


def metrics_line(text: str) -> bool:
    """Whether `text` is `name value name value ...`: short lower-case names, numbers of four digits or `done/total`."""
    parts = text.split(" ")
    if len(parts) % 2 or not 0 < len(parts) <= 2 * MOST_PAIRS:
        return False
    for name, value in zip(parts[::2], parts[1::2], strict=True):
        if _NAME.fullmatch(name) is None:
            return False
        if _COUNT.fullmatch(value) is None and (_NUMBER.fullmatch(value) is None or f"{float(value):.4g}" != value):
            return False
    return True


def printable(text: str) -> str:
    """Return `text` with everything that steers a terminal replaced: the words are of code that nobody need trust."""
    return "".join(char if char.isprintable() or char == "\t" else "�" for char in text)


def unseal(secret: Secret, statement: wire.WordsStatement) -> wire.WordsBatch:
    """Return the batch of a statement that `accept` took.

    Raises:
        PeerError: code `protocol`: it does not open, or is no WordsBatch.
        DeniedError: step 6: a metrics batch holds something else than names and numbers.
    """
    context = wire.words_context(statement.lease, statement.seq, statement.stream)
    try:
        data = unwrap(wire.words_key(secret), statement.sealed, context=context)
    except UnwrapError as error:
        reason = Reason("words.sealed", "bytes that do not open", "a batch under the lease secret")
        raise PeerError("the words were not sealed for this lease", code="protocol", reasons=(reason,)) from error
    batch = wire.WordsBatch.decode(data)
    if statement.stream == METRICS:
        # the text stays out of the reason: it is exactly what must not leave
        wrong = [number for number, line in enumerate(batch.lines) if not metrics_line(line)]
        if wrong:
            raise DeniedError(
                "metrics are names and rounded numbers only",
                reasons=[Reason(f"words.lines[{n}]", "something else", "name value ...") for n in wrong[:8]],
            )
    return batch


# --- broker -> party --------------------------------------------------------------------------------------------------


def listen(
    statement: wire.ListenStatement, fingerprint: str, *, broker: bytes, key: bytes, known: Known | None, now: datetime
) -> Mapping[str, tuple[str, ...]] | DeniedError:
    """Return phase -> streams that the holder of `fingerprint` hears, or why it hears nothing.

    A statement without a phase asks for every phase that names the party. `broker` and `key` are HPKE public keys.

    Raises:
        ValueError: `now` has no time zone (a caller's mistake).
    """
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    reasons: list[Reason] = []
    if statement.broker != wire.sha256(broker):  # 1
        reasons.append(Reason("listen.broker", "another broker's key", "this broker's", "attest it again"))
    if statement.key != wire.sha256(key):
        reasons.append(Reason("listen.key", "another key than the signed one", "the key that the party signed for"))
    if not now < statement.expires <= now + LISTEN_LIFE:
        until = wire.format_time(statement.expires)
        reasons.append(Reason("listen.expires", until, "a time within the next hour", "sign a new statement"))
    if known is None:  # 2
        reasons.append(Reason("contract", f"no contract {statement.contract}", "a contract that was submitted"))
        return DeniedError("nothing of this leaves to you", reasons=reasons)
    contract = known.contract
    reasons += life_reasons(known, now)
    if not contract.signers <= known.signed:
        missing = ", ".join(sorted(contract.signers - known.signed))
        reasons.append(Reason("signatures", f"missing {missing}", "all required signers"))
    party = next((name for name, holder in contract.party.items() if holder == fingerprint), "")  # 3
    found = f"{party} ({fingerprint})" if party else fingerprint
    allowed: dict[str, tuple[str, ...]] = {}
    silent: list[Reason] = []
    for name, phase in contract.phase.items():
        if statement.phase not in ("", name):
            continue
        if party and party in phase.metrics_to:
            allowed[name] = phase.streams_out
        else:
            wanted = " or ".join(phase.metrics_to) or "nobody"
            silent.append(Reason(f"phase.{name}.metrics_to", found, wanted, "the contract says who hears what"))
    if not allowed:
        asked = Reason("listen.phase", repr(statement.phase), " or ".join(contract.phase))
        reasons += silent or [asked]
    if reasons:
        return DeniedError(f"contract '{contract.name}' lets nothing of this leave to you", reasons=reasons)
    return allowed


# --- what is kept -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """One line as a node said it. `serial` orders the lines of one contract in this run, `time` is the broker's."""

    serial: int
    time: datetime
    lease: str
    stream: str
    text: str


@dataclass(slots=True)
class Shelf:
    """The words of one lease. `dropped` were too many for the broker, `unsent` never left the node."""

    lease: str
    contract: str
    phase: str
    first: datetime
    last: datetime
    flow: Flow = field(default_factory=Flow)
    lines: dict[str, list[Line]] = field(default_factory=lambda: {METRICS: [], LOGS: []})
    size: int = LINE_COST
    log_bytes: int = 0
    dropped: int = 0
    unsent: int = 0
    ended: bool = False

    def add(self, line: Line) -> None:
        self.lines[line.stream].append(line)
        cost = len(line.text.encode())
        self.size += cost + LINE_COST
        if line.stream == LOGS:
            self.log_bytes += cost

    def trim(self) -> None:
        """Drop the oldest lines beyond the bounds of one lease, and count them."""
        metrics, logs = self.lines[METRICS], self.lines[LOGS]
        self._drop(metrics, len(metrics) - MAX_METRIC_LINES)
        surplus, count = self.log_bytes - MAX_LOG_BYTES, 0
        while surplus > 0:
            surplus -= len(logs[count].text.encode())
            count += 1
        self._drop(logs, count)

    def _drop(self, lines: list[Line], count: int) -> None:
        if count <= 0:
            return
        for line in lines[:count]:
            cost = len(line.text.encode())
            self.size -= cost + LINE_COST
            if line.stream == LOGS:
                self.log_bytes -= cost
        del lines[:count]
        self.dropped += count


@dataclass(frozen=True, slots=True)
class Heard:
    """Lines after a cursor in the order in which they came, the next cursor, and whether there are more."""

    lines: tuple[Line, ...]
    next: int
    more: bool


class Shelves:
    """The words of all leases, least recently spoken first. Not thread-safe: the broker has one event loop."""

    def __init__(self) -> None:
        self._shelves: OrderedDict[str, Shelf] = OrderedDict()
        self._serials: dict[str, int] = {}  # per contract: nobody learns how much another one says
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes in use, as the bounds count them."""
        return self._size

    def flow(self, lease: str) -> Flow:
        shelf = self._shelves.get(lease)
        return Flow() if shelf is None else shelf.flow

    def heard(self, lease: str, held: LeaseFacts, flow: Flow, *, now: datetime) -> None:
        """Note that a lease spoke, before what it said is looked at: what is refused then counts against its rate."""
        shelf = self._shelves.get(lease)
        if shelf is None:
            shelf = self._shelves[lease] = Shelf(lease, held.contract, held.phase, now, now)
            self._size += shelf.size
        shelf.flow, shelf.last = flow, now
        self._shelves.move_to_end(lease)

    def keep(self, lease: str, stream: str, batch: wire.WordsBatch, *, now: datetime) -> None:
        """Keep the lines of a batch of a lease that was `heard`, within the bounds."""
        shelf = self._shelves[lease]
        before = shelf.size
        serial = self._serials.get(shelf.contract, 0)
        for number, text in enumerate(batch.lines, serial + 1):
            shelf.add(Line(number, now, lease, stream, text))
        self._serials[shelf.contract] = serial + len(batch.lines)
        shelf.trim()
        shelf.unsent = max(shelf.unsent, batch.dropped)
        shelf.ended = shelf.ended or batch.end
        self._size += shelf.size - before
        self._forget(now)

    def of(self, contract: str, phases: Mapping[str, Sequence[str]]) -> tuple[Shelf, ...]:
        """Return the shelves of a contract's phases, least recently spoken first."""
        return tuple(shelf for shelf in self._shelves.values() if shelf.contract == contract and shelf.phase in phases)

    def since(self, contract: str, phases: Mapping[str, Sequence[str]], after: int) -> Heard:
        """Return what `phases` (phase -> streams) of a contract said after the cursor `after`; one answer's worth."""
        parts = []
        for shelf in self.of(contract, phases):
            for stream in phases[shelf.phase]:
                lines = shelf.lines[stream]
                start = bisect_right(lines, after, key=lambda line: line.serial)
                parts.append(islice(lines, start, start + REPLY_LINES + 1))
        got: list[Line] = []
        size = 0
        for line in merge(*parts, key=lambda line: line.serial):
            size += len(line.text.encode())
            if got and (len(got) == REPLY_LINES or size > REPLY_BYTES):
                return Heard(tuple(got), got[-1].serial, True)
            got.append(line)
        return Heard(tuple(got), got[-1].serial if got else after, False)

    def _forget(self, now: datetime) -> None:
        while self._shelves:
            shelf = next(iter(self._shelves.values()))
            if now - shelf.last <= KEPT:
                break
            self._remove(shelf)
        while self._size > MAX_TOTAL_BYTES and len(self._shelves) > 1:
            held: dict[str, int] = {}
            for shelf in self._shelves.values():
                held[shelf.contract] = held.get(shelf.contract, 0) + shelf.size
            most = max(held, key=lambda contract: held[contract])
            self._remove(next(shelf for shelf in self._shelves.values() if shelf.contract == most))

    def _remove(self, shelf: Shelf) -> None:
        del self._shelves[shelf.lease]
        self._size -= shelf.size
