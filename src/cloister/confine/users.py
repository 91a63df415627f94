"""One user id for each job of a root launcher, so that two jobs can never signal, trace or read each other.

Ids come from a range that no distribution hands out (systemd's UIDS-GIDS.md: 1879048192 and above is unused), or,
where the user namespace of a container maps only 65536 ids, from a gap in that. A job holds its id with a file lock
that the holder inherits: it is free again when both launcher and holder are gone.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

from cloister.errors import MachineError

RANGES: Final = (range(1_900_000_000, 1_900_004_096), range(60_578, 61_184))
_LOCKS: Final = Path("/run/cloister/jail-uids")


def parse_id_map(text: str) -> tuple[range, ...]:
    """Return the ids that exist here, from /proc/self/uid_map (user_namespaces(7))."""
    rows = [line.split() for line in text.splitlines()]
    return tuple(range(int(first), int(first) + int(count)) for first, _, count in rows)


def candidates(mapped: tuple[range, ...]) -> range:
    """Return the first of `RANGES` that is mapped completely; empty if none is."""
    for wanted in RANGES:
        if any(have.start <= wanted.start and wanted.stop <= have.stop for have in mapped):
            return wanted
    return range(0)


def separate() -> bool:
    """Whether this process can give each job a user id of its own: root where enough ids exist.

    Root of a user namespace that maps one id (an ordinary user who entered it to mount volumes) cannot, and starts jails
    as every ordinary user does.
    """
    return os.geteuid() == 0 and bool(candidates(parse_id_map(Path("/proc/self/uid_map").read_text())))


def allocate() -> tuple[int, int]:
    """Return (user id, descriptor that holds its lock).

    Raises:
        MachineError: code `no-sandbox`: no usable range of ids here, or all of them are in use.
    """
    ids = candidates(parse_id_map(Path("/proc/self/uid_map").read_text()))
    _LOCKS.mkdir(mode=0o700, parents=True, exist_ok=True)
    for uid in ids:
        lock = os.open(_LOCKS / str(uid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        return uid, lock
    raise MachineError(
        "no user id is left for another confined program" if ids else "no user ids for confined programs exist here",
        code="no-sandbox",
        hint="run it as an ordinary user, or in a container that maps at least 65536 user ids",
    )
