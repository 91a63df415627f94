"""Vendor collateral of a running broker: files that may change, and numbers that only go up. Edge.

  1 look      every few seconds at most, one `stat` for each path; nothing changed: nothing is done
  2 load      files, snapshots and stores (`attestation.edge.collateral.load_all`)
  3 compare   each number that a believed authority signed with the broker's own marks           `collateral-rolled-back`
  4 enter     higher numbers become a log entry, ahead of every release that rests on them
  5 use       only now
A start refuses what fails; a running broker says so and goes on with what it has, which its verifiers refuse once it has ended. So an
operator who puts back an old revocation list or a whole old store gets the number found and the number wanted, before a
restart and after it: the marks are in the log, which is not theirs to roll back (broker/log, witnesses).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Final

from cloister.attestation.collateral import marks
from cloister.attestation.edge.collateral import load_all, signature_of
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.roots import Roots
from cloister.broker.log.leaf import MAX_MARKS
from cloister.broker.store.ledger import Appended, Ledger, Pending
from cloister.errors import CloisterError

EVERY_S: Final = 5.0
"""Seconds between two looks at the files."""


class Collateral:
    """What `paths` endorse, as far as it is not older than what this broker used before. For one thread."""

    def __init__(
        self,
        paths: Sequence[Path],
        ledger: Ledger,
        roots: Roots,
        *,
        now: datetime,
        say: Callable[[str], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load `paths` and wait until their numbers are in the log.

        Raises:
            EvidenceError: `collateral-rolled-back`, with each number found and wanted.
            InputError, TamperedError, MachineError: as `load_all`; MachineError too if the log cannot be written.
        """
        self._paths, self._ledger, self._roots, self._say = tuple(paths), ledger, roots, say
        self._monotonic = monotonic
        self._marks: Mapping[str, int] = ledger.collateral_marks()
        self._looked = monotonic()
        self._seen = signature_of(self._paths)
        self._endorsements, pending = self._load(now)
        for each in pending:
            each.result()

    def at(self, now: datetime) -> Endorsements:
        """Return the collateral that counts at `now`."""
        if self._paths and self._monotonic() - self._looked >= EVERY_S:
            self._looked = self._monotonic()
            seen = signature_of(self._paths)
            if seen != self._seen:
                self._seen = seen
                self._renew(now)
        return self._endorsements

    def _renew(self, now: datetime) -> None:
        try:
            # nobody waits for the entry: whatever rests on it is entered later, and so answered later
            self._endorsements, _ = self._load(now)
        except CloisterError as error:
            what = "; ".join(map(str, error.reasons[:3]))
            self._say(f"new collateral is refused, the old one stays: {error.message} ({error.code}) {what}".rstrip())
        else:
            self._say(f"collateral was renewed: {len(self._endorsements.items)} items")

    def _load(self, now: datetime) -> tuple[Endorsements, list[Pending[Appended]]]:
        found = load_all(self._paths)
        numbers = marks.numbers_of_all(found, self._roots, now=now)
        after = marks.advance(self._marks, numbers)
        held = self._ledger.collateral_marks()  # what is on the disk: an entry that failed is tried again
        higher = {name: value for name, value in numbers.items() if name not in held or held[name] < value}
        pending = [self._ledger.raise_marks(part, now=now) for part in _parts(higher)]
        self._marks = after
        return found, pending


def _parts(numbers: Mapping[str, int]) -> Iterator[dict[str, int]]:
    rest = iter(sorted(numbers.items()))
    while part := dict(islice(rest, MAX_MARKS)):
        yield part
