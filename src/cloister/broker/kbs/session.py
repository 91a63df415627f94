"""Sessions of the KBS protocol: who was asked, who answered, until when. Pure: ids, nonces and times are arguments.

A session is one walk through this table; an absent pair refuses. What is not here does not exist: after a restart of the broker
clients attest again, as the protocol has them do.

    CHALLENGED --evidence ok--> ATTESTED --resource--> ATTESTED
    CHALLENGED --evidence bad--> ENDED        one challenge takes one answer: nobody tries evidence until it fits
    any --time--> ENDED

Both stores are bounded. A flood of challenges pushes out the oldest challenges, never an attested session; attested sessions
need genuine evidence and push out the oldest attested ones.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from cloister.attestation.types import Claims
from cloister.broker.decide import NONCE_LIFE
from cloister.broker.kbs.wire import TeeKey
from cloister.errors import Reason

COOKIE: Final = "kbs-session-id"
ID: Final = r"[0-9a-f]{32}"
"""128 random bits; Trustee writes a UUID without dashes."""
CHALLENGE_LIFE: Final = NONCE_LIFE
SESSION_LIFE: Final = timedelta(minutes=5)
"""Trustee's default, and the longest life of an attestation result. Evidence is at most this old when a key leaves."""
MAX_CHALLENGES: Final = 50_000
"""833 new sessions a second for a minute; each takes less than 1 kB."""
MAX_SESSIONS: Final = 4096
"""Attested at one time; each may keep answers of 64 kB."""
MAX_RESOURCES: Final = 64
"""Different resources of one session. The same one again is the same answer, without another release."""


class State(StrEnum):
    """Where a session stands."""

    CHALLENGED = "challenged"
    ATTESTED = "attested"
    ENDED = "ended"


class Event(StrEnum):
    """What happens to it."""

    EVIDENCE_OK = "evidence-ok"
    EVIDENCE_BAD = "evidence-bad"
    RESOURCE = "resource"
    TIME = "time"


NEXT: Final = MappingProxyType(
    {
        (State.CHALLENGED, Event.EVIDENCE_OK): State.ATTESTED,
        (State.CHALLENGED, Event.EVIDENCE_BAD): State.ENDED,
        (State.CHALLENGED, Event.TIME): State.ENDED,
        (State.ATTESTED, Event.RESOURCE): State.ATTESTED,
        (State.ATTESTED, Event.TIME): State.ENDED,
    }
)


@dataclass(frozen=True, slots=True)
class Attested:
    """What a client proved, once."""

    key: TeeKey
    claims: Claims
    """With the workload event of its init-data, where that counts."""
    bound: tuple[Reason, ...]
    """Why no workload is bound to it: it is attested, and gets nothing that needs one."""
    evidence: str
    """Digest of the answer that proved it, for the log."""
    token: str = field(repr=False)


@dataclass(slots=True)
class Session:
    """One client."""

    id: str
    nonce: str
    """Base64 as sent: clients hash the text."""
    kind: str
    issued: datetime
    expires: datetime
    state: State = State.CHALLENGED
    attested: Attested | None = None
    replies: dict[str, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)
    """Path of a resource -> answer and receipt."""


class Sessions:
    """All sessions of one run of the broker."""

    def __init__(self, *, challenges: int = MAX_CHALLENGES, sessions: int = MAX_SESSIONS) -> None:
        self._most = (challenges, sessions)
        self._challenged: OrderedDict[str, Session] = OrderedDict()
        self._attested: OrderedDict[str, Session] = OrderedDict()
        self._tokens: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._challenged) + len(self._attested)

    def challenge(self, identity: str, nonce: str, kind: str, now: datetime) -> Session:
        """Begin a session. `identity` and `nonce` are fresh and random."""
        self._forget(now)
        while len(self._challenged) >= self._most[0]:
            self._challenged.popitem(last=False)
        session = Session(identity, nonce, kind, now, now + CHALLENGE_LIFE)
        self._challenged[identity] = session
        return session

    def answer(self, identity: str, now: datetime) -> Session | None:
        """Take the challenge `identity` to judge its answer: it is gone, whatever comes of it. None: there is none."""
        session = self._challenged.pop(identity, None)
        if session is None or not session.issued <= now < session.expires:
            return None
        return session

    def refuse(self, session: Session) -> None:
        """The evidence was bad."""
        self._move(session, Event.EVIDENCE_BAD)

    def accept(self, session: Session, attested: Attested, now: datetime) -> None:
        """The evidence was good: the session lives from now."""
        self._move(session, Event.EVIDENCE_OK)
        self._forget(now)
        while len(self._attested) >= self._most[1]:
            self._drop(next(iter(self._attested.values())))
        session.attested, session.issued, session.expires = attested, now, now + SESSION_LIFE
        self._attested[session.id] = session
        self._tokens[attested.token] = session.id

    def of_cookie(self, identity: str, now: datetime) -> Session | None:
        """Return the attested session `identity`, if it lives."""
        session = self._attested.get(identity)
        if session is None:
            return None
        if not session.issued <= now < session.expires:
            self._drop(session)
            return None
        return session

    def of_token(self, token: str, now: datetime) -> Session | None:
        """Return the attested session whose token is exactly `token`: nothing in a token is believed, it is looked up."""
        return self.of_cookie(self._tokens.get(token, ""), now)

    def keep(self, session: Session, path: str, reply: tuple[bytes, bytes]) -> None:
        """Remember the answer for `path`."""
        self._move(session, Event.RESOURCE)
        session.replies[path] = reply

    def _forget(self, now: datetime) -> None:
        for store in (self._challenged, self._attested):
            while store and not (first := next(iter(store.values()))).issued <= now < first.expires:
                self._drop(first)

    def _drop(self, session: Session) -> None:
        self._move(session, Event.TIME)
        self._challenged.pop(session.id, None)
        self._attested.pop(session.id, None)
        if session.attested is not None:
            self._tokens.pop(session.attested.token, None)

    @staticmethod
    def _move(session: Session, event: Event) -> None:
        following = NEXT.get((session.state, event))
        if following is None:
            raise RuntimeError(f"a session that is {session.state} cannot take {event}")
        session.state = following
