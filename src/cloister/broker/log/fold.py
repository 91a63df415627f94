"""What the entries of a log add up to: contracts, signatures, keys, roots, leases, answer counts. Pure.

The log is the truth; these rows are its fold: starting from nothing and applying every entry in order gives exactly the
rows. Each row type names the table of the store that mirrors it and the fields that are its key. `entry` is the index of
the log entry that a row rests on.

A lease may be forgotten, secrets first, a day after it expired by the latest time in the log: its row may then be absent.

An entry that contradicts the ones before it is refused before anything changes:
  epoch             numbers rise by one
  contract-*        signed, activated, revoked: only after it was submitted; revoked for good
  key-opened        the key is kept for this owner
  release           the contract is active, the lease is new (or its id is that of a forgettable one)
  lease-*           the lease exists and was not lost
  root-registered   the lease may write the asset; `previous` is the current version; the volume is nobody's yet
  answer            `used` is the sum so far and this count
  collateral-marks  every number is above the one before, and no mark is named twice
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import ClassVar, Final, TypeVar, cast

from cloister.broker.log.checkpoint import tampered
from cloister.broker.log.leaf import (
    Answer,
    AnswerRefused,
    CollateralMarks,
    ContractActive,
    ContractRevoked,
    ContractSigned,
    ContractSubmitted,
    Denial,
    Epoch,
    KeyDeposited,
    KeyOpened,
    Leaf,
    LeaseLost,
    LeaseRenewed,
    Release,
    RootRegistered,
    Witness,
)

FORGET_AFTER: Final = timedelta(days=1)
"""A lease is remembered this long after it expired, so that its node still hears why."""

Key = tuple[str | int, ...]
R = TypeVar("R", bound="Row")


@dataclass(frozen=True, slots=True)
class Row:
    """Base of the rows. `TABLE` is the table's name, `KEY` the fields that identify a row, `PAYLOAD` the name of the one
    column that is not in the log (checked by its digest or by its own authentication), or nothing."""

    TABLE: ClassVar[str] = ""
    KEY: ClassVar[tuple[str, ...]] = ()
    PAYLOAD: ClassVar[str] = ""

    @property
    def key(self) -> Key:
        return tuple(getattr(self, name) for name in self.KEY)


@dataclass(frozen=True, slots=True)
class ContractRow(Row):
    """A contract by its id; `state` is waiting, active, replaced or revoked; `toml` holds the exact file bytes."""

    TABLE: ClassVar[str] = "contracts"
    KEY: ClassVar[tuple[str, ...]] = ("contract",)
    PAYLOAD: ClassVar[str] = "toml"
    contract: str
    name: str
    version: int
    replaces: str
    state: str
    entry: int
    state_entry: int


@dataclass(frozen=True, slots=True)
class SignatureRow(Row):
    """One party's signature over a contract; `armoured` holds the SSHSIG text."""

    TABLE: ClassVar[str] = "signatures"
    KEY: ClassVar[tuple[str, ...]] = ("contract", "party")
    PAYLOAD: ClassVar[str] = "armoured"
    contract: str
    party: str
    signature: str
    entry: int


@dataclass(frozen=True, slots=True)
class KeyRow(Row):
    """The key of a volume, kept for one owner; `sealed_key` holds it wrapped under the owner's key-encryption key."""

    TABLE: ClassVar[str] = "deposited_keys"
    KEY: ClassVar[tuple[str, ...]] = ("volume", "owner")
    PAYLOAD: ClassVar[str] = "sealed_key"
    volume: str
    owner: str
    volume_id: bytes
    generation: int
    entry: int


@dataclass(frozen=True, slots=True)
class RootRow(Row):
    """The current version of a written asset; `name` is the contract's name."""

    TABLE: ClassVar[str] = "asset_roots"
    KEY: ClassVar[tuple[str, ...]] = ("name", "asset")
    name: str
    asset: str
    volume: str
    generation: int
    volume_id: bytes
    owner: str
    contract: str
    lease: str
    entry: int


@dataclass(frozen=True, slots=True)
class LeaseRow(Row):
    """A lease; `sealed_secrets` holds its secret and the keys of outputs that are not registered yet."""

    TABLE: ClassVar[str] = "leases"
    KEY: ClassVar[tuple[str, ...]] = ("lease",)
    PAYLOAD: ClassVar[str] = "sealed_secrets"
    lease: str
    contract: str
    phase: str
    code: str
    writes: tuple[str, ...]
    hpke_key: str
    tee: str
    expires: datetime
    lost: bool
    entry: int
    renewed_entry: int


@dataclass(frozen=True, slots=True)
class AnswerCountRow(Row):
    """Answers granted to a party: ever, and on the latest day (UTC) on which it asked."""

    TABLE: ClassVar[str] = "answer_counts"
    KEY: ClassVar[tuple[str, ...]] = ("contract", "phase", "party")
    contract: str
    phase: str
    party: str
    used: int
    day: str
    used_that_day: int
    entry: int


@dataclass(frozen=True, slots=True)
class DenialRow(Row):
    """Where the reasons of a denial (or of a refused answer) stand in the log."""

    TABLE: ClassVar[str] = "denials"
    KEY: ClassVar[tuple[str, ...]] = ("id",)
    id: str
    entry: int


@dataclass(frozen=True, slots=True)
class EpochRow(Row):
    """A start of the broker."""

    TABLE: ClassVar[str] = "epochs"
    KEY: ClassVar[tuple[str, ...]] = ("number",)
    number: int
    entry: int


@dataclass(frozen=True, slots=True)
class WitnessRow(Row):
    """A witness that watches this log; `verifier` is its verifier key string."""

    TABLE: ClassVar[str] = "witnesses"
    KEY: ClassVar[tuple[str, ...]] = ("name",)
    name: str
    verifier: str
    entry: int


@dataclass(frozen=True, slots=True)
class MarkRow(Row):
    """How far a vendor's number is that never goes back; `mark` is its name."""

    TABLE: ClassVar[str] = "collateral_marks"
    KEY: ClassVar[tuple[str, ...]] = ("mark",)
    mark: str
    number: int
    entry: int


ROWS: Final[tuple[type[Row], ...]] = (
    ContractRow,
    SignatureRow,
    KeyRow,
    RootRow,
    LeaseRow,
    AnswerCountRow,
    DenialRow,
    EpochRow,
    WitnessRow,
    MarkRow,
)


@dataclass(frozen=True, slots=True)
class Change:
    """One row before (None: it was not there) and after an entry."""

    before: Row | None
    after: Row


@dataclass(frozen=True, slots=True)
class Spent:
    """Answers granted so far: ever, and on the day that the question is about."""

    used: int
    used_today: int


def spent(row: AnswerCountRow | None, today: date) -> Spent:
    """Return what `row` says about `today` (UTC). A clock that was set back does not open a new day: the latest day on
    which anything was granted goes on."""
    if row is None:
        return Spent(0, 0)
    return Spent(row.used, row.used_that_day if today.isoformat() <= row.day else 0)


def _contradicts(leaf: Leaf, found: str, wanted: str) -> Exception:
    return tampered(
        f"the log contradicts itself: {leaf.KIND}: wants {wanted}, found {found}",
        where=f"fold.{leaf.KIND}",
        found=found,
        wanted=wanted,
    )


class Fold:
    """The rows after `size` entries. `apply` and `undo` are the only writers."""

    __slots__ = ("latest", "rows", "size")

    def __init__(self) -> None:
        self.size: int = 0
        self.latest: datetime = datetime(1970, 1, 1, tzinfo=UTC)
        """The latest time that any entry bears."""
        self.rows: dict[type[Row], dict[Key, Row]] = {cls: {} for cls in ROWS}

    def get(self, cls: type[R], *key: str | int) -> R | None:
        """Return the row of type `cls` under `key`, or None."""
        return cast("R | None", self.rows[cls].get(key))

    def active(self, name: str) -> ContractRow | None:
        """Return the active contract called `name`."""
        for row in self.rows[ContractRow].values():
            if isinstance(row, ContractRow) and row.name == name and row.state == "active":
                return row
        return None

    def apply(self, leaf: Leaf) -> tuple[Change, ...]:
        """Take in the next entry; return what it changed. Nothing changes if it raises.

        Raises:
            TamperedError: (log-tampered) the entry contradicts the ones before it.
        """
        changes = tuple(Change(self.rows[type(row)].get(row.key), row) for row in _rows_of(self, leaf, self.size))
        for change in changes:
            self.rows[type(change.after)][change.after.key] = change.after
        self.size += 1
        self.latest = max(self.latest, leaf.time)
        return changes

    def undo(self, changes: Iterable[Change], *, size: int, latest: datetime) -> None:
        """Take back `changes` (given in the order in which they were made), down to `size` entries."""
        for change in reversed(tuple(changes)):
            table = self.rows[type(change.after)]
            if change.before is None:
                del table[change.after.key]
            else:
                table[change.after.key] = change.before
        self.size, self.latest = size, latest


def forgettable(row: Row, latest: datetime) -> bool:
    """Return whether `row` may be absent once the log's latest time is `latest`: a lease that expired a day before."""
    return isinstance(row, LeaseRow) and row.expires + FORGET_AFTER < latest


def _rows_of(fold: Fold, leaf: Leaf, entry: int) -> tuple[Row, ...]:
    """Return the rows that `leaf`, standing at index `entry`, makes or replaces."""
    match leaf:
        case Epoch():
            last = len(fold.rows[EpochRow])
            if leaf.number != last + 1:
                raise _contradicts(leaf, str(leaf.number), f"epoch {last + 1}")
            return (EpochRow(leaf.number, entry),)
        case Witness():
            return (WitnessRow(leaf.name, leaf.key, entry),)
        case ContractSubmitted():
            if fold.get(ContractRow, leaf.contract) is not None:
                raise _contradicts(leaf, leaf.contract, "a contract that was not submitted before")
            return (ContractRow(leaf.contract, leaf.name, leaf.version, leaf.replaces, "waiting", entry, entry),)
        case ContractSigned():
            _contract(fold, leaf, leaf.contract, ("waiting", "active"))
            return (SignatureRow(leaf.contract, leaf.party, leaf.signature, entry),)
        case ContractActive():
            return _activated(fold, leaf, entry)
        case ContractRevoked():
            row = _contract(fold, leaf, leaf.contract, ("waiting", "active", "replaced"))
            return (replace(row, state="revoked", state_entry=entry),)
        case KeyDeposited():
            return (KeyRow(leaf.volume, leaf.owner, leaf.volume_id, leaf.generation, entry),)
        case KeyOpened():
            if fold.get(KeyRow, leaf.volume, leaf.owner) is None:
                raise _contradicts(leaf, leaf.volume, "a volume whose key is kept for this owner")
            return ()
        case Release():
            return _released(fold, leaf, entry)
        case LeaseRenewed():
            return (replace(_lease(fold, leaf, leaf.lease), expires=leaf.expires, renewed_entry=entry),)
        case LeaseLost():
            return (replace(_lease(fold, leaf, leaf.lease), lost=True, renewed_entry=entry),)
        case RootRegistered():
            return _registered(fold, leaf, entry)
        case Answer():
            return _answered(fold, leaf, entry)
        case Denial() | AnswerRefused():
            if fold.get(DenialRow, leaf.id) is not None:
                raise _contradicts(leaf, leaf.id, "an id that was not used before")
            return (DenialRow(leaf.id, entry),)
        case CollateralMarks():
            return _raised(fold, leaf, entry)
        case _:
            raise TypeError(f"{type(leaf).__name__} is no kind of log entry")


def _contract(fold: Fold, leaf: Leaf, contract: str, states: tuple[str, ...]) -> ContractRow:
    row = fold.get(ContractRow, contract)
    if row is None or row.state not in states:
        raise _contradicts(
            leaf, f"{contract} {row.state if row else 'unknown'}", f"a contract that is {' or '.join(states)}"
        )
    return row


def _lease(fold: Fold, leaf: Leaf, lease: str) -> LeaseRow:
    row = fold.get(LeaseRow, lease)
    if row is None or row.lost:
        raise _contradicts(leaf, f"lease {lease} {'lost' if row else 'unknown'}", "a lease that was not lost")
    return row


def _activated(fold: Fold, leaf: ContractActive, entry: int) -> tuple[Row, ...]:
    row = _contract(fold, leaf, leaf.contract, ("waiting",))
    unsigned = [party for party in leaf.signers if fold.get(SignatureRow, leaf.contract, party) is None]
    if unsigned:
        raise _contradicts(leaf, f"no signature of {', '.join(unsigned)}", "signatures of all signers")
    before = fold.active(row.name)
    if (before.contract if before else "") != leaf.replaces or row.name != leaf.name:
        raise _contradicts(
            leaf, f"{leaf.name} replaces {leaf.replaces or 'nothing'}", "the active contract of this name"
        )
    rows = [replace(row, state="active", state_entry=entry)]
    if before is not None:
        rows.append(replace(before, state="replaced", state_entry=entry))
    return tuple(rows)


def _released(fold: Fold, leaf: Release, entry: int) -> tuple[Row, ...]:
    _contract(fold, leaf, leaf.contract, ("active",))
    before = fold.get(LeaseRow, leaf.lease)
    if before is not None and not forgettable(before, fold.latest):
        raise _contradicts(leaf, f"lease {leaf.lease}", "a lease that did not exist before")
    return (
        LeaseRow(
            leaf.lease,
            leaf.contract,
            leaf.phase,
            leaf.code,
            leaf.writes,
            leaf.hpke_key,
            leaf.tee,
            leaf.expires,
            False,
            entry,
            entry,
        ),
    )


def _registered(fold: Fold, leaf: RootRegistered, entry: int) -> tuple[Row, ...]:
    lease = _lease(fold, leaf, leaf.lease)
    contract = _contract(fold, leaf, leaf.contract, ("active",))
    if lease.contract != leaf.contract or contract.name != leaf.name or leaf.asset not in lease.writes:
        raise _contradicts(leaf, f"asset {leaf.asset} of {leaf.name}", f"an asset that lease {leaf.lease} writes")
    before = fold.get(RootRow, leaf.name, leaf.asset)
    if (before.volume if before else "") != leaf.previous or (before and before.generation >= leaf.generation):
        raise _contradicts(
            leaf,
            f"generation {leaf.generation} after {leaf.previous or 'nothing'}",
            f"a generation above {before.generation}, after {before.volume}" if before else "a first version",
        )
    if fold.get(KeyRow, leaf.volume, leaf.owner) is not None:  # else this entry would put another key in its place
        raise _contradicts(leaf, leaf.volume, "a volume that was never registered")
    return (
        RootRow(
            leaf.name,
            leaf.asset,
            leaf.volume,
            leaf.generation,
            leaf.volume_id,
            leaf.owner,
            leaf.contract,
            leaf.lease,
            entry,
        ),
        KeyRow(leaf.volume, leaf.owner, leaf.volume_id, leaf.generation, entry),
    )


def _answered(fold: Fold, leaf: Answer, entry: int) -> tuple[Row, ...]:
    _contract(fold, leaf, leaf.contract, ("active",))
    before = fold.get(AnswerCountRow, leaf.contract, leaf.phase, leaf.party)
    today = leaf.time.astimezone(UTC).date()
    sums = spent(before, today)
    if leaf.used != sums.used + leaf.count:
        raise _contradicts(leaf, f"{leaf.used} used", f"{sums.used + leaf.count}")
    day = max(today.isoformat(), before.day) if before else today.isoformat()
    return (AnswerCountRow(leaf.contract, leaf.phase, leaf.party, leaf.used, day, sums.used_today + leaf.count, entry),)


def _raised(fold: Fold, leaf: CollateralMarks, entry: int) -> tuple[Row, ...]:
    if len({each.mark for each in leaf.marks}) != len(leaf.marks):
        raise _contradicts(leaf, "a mark twice", "each mark once")
    for each in leaf.marks:
        before = fold.get(MarkRow, each.mark)
        if before is not None and each.number <= before.number:
            raise _contradicts(leaf, f"{each.mark} {each.number}", f"a number above {before.number}")
    return tuple(MarkRow(each.mark, each.number, entry) for each in leaf.marks)
