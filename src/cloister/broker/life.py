"""How contracts live: data first. docs/protocol.md 4 shows the same table.

    waiting --signed--> active --replaced--> replaced
       \\--revoked--------\\--revoked--> revoked

A contract is `signed` when every required signer signed its exact bytes and, for a version above 1, everybody who has
to agree to the change did. A day after `expires` an active contract is `expired`: a fact of the calendar, not an event.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class State(StrEnum):
    WAITING = "waiting"
    ACTIVE = "active"
    REPLACED = "replaced"
    REVOKED = "revoked"
    EXPIRED = "expired"


class Event(StrEnum):
    SIGNED = "signed"
    REPLACED = "replaced"
    REVOKED = "revoked"


# (state, event) -> state. An absent pair is refused.
NEXT: Final[Mapping[tuple[State, Event], State]] = MappingProxyType(
    {
        (State.WAITING, Event.SIGNED): State.ACTIVE,
        (State.WAITING, Event.REVOKED): State.REVOKED,
        (State.ACTIVE, Event.REPLACED): State.REPLACED,
        (State.ACTIVE, Event.REVOKED): State.REVOKED,
    }
)


def after(state: State, event: Event) -> State:
    """Return the state after `event`.

    Raises:
        ValueError: the table has no such pair.
    """
    try:
        return NEXT[state, event]
    except KeyError:
        raise ValueError(f"a {state} contract cannot be {event}") from None


def on(state: State, *, expires: date, today: date) -> State:
    """Return the state that counts on the UTC day `today`."""
    return State.EXPIRED if state is State.ACTIVE and today > expires else state
