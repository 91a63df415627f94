"""The ledger: every decision of the broker becomes a durable log entry before anybody hears of it.

One writer thread takes what waits, in the order in which it came, and makes one group of it:
  1 decide   each request is judged against the rows as all earlier requests, also of this group, leave them
  2 enter    its entry goes into the tree, its rows are folded, its secrets are sealed
  3 sign     one checkpoint over the whole group
  4 commit   entries, rows and checkpoint in one transaction, one fsync
  5 cosign   witnesses, if there are any, sign the checkpoint as an extension of what they saw
  6 answer   every request gets its receipt; only now do readers of the ledger see its rows
If step 4 fails, nothing of the group happened: tree and rows go back, all its requests fail with the same error. If the
outcome is unknown or a witness refuses, the ledger halts: every later request fails until it is opened again.

So checking and spending is one step: a budget of 500 gives exactly 500 however many ask at once. What stays with the
caller: whether a request is allowed (`contract.decide`), who signed it, nonces, clocks. Times are arguments.

Methods that append return `Pending`: `await` it in asyncio, or `.result()` in a thread. Methods that read return what is
durable. All are safe to call from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import secrets
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, cast

from cloister.broker.log import leaf as leaves
from cloister.broker.log.checkpoint import Checkpoint, SignedCheckpoint, add_lines, open_checkpoint, sign, tampered
from cloister.broker.log.fold import (
    AnswerCountRow,
    Change,
    ContractRow,
    DenialRow,
    EpochRow,
    Fold,
    Key,
    KeyRow,
    LeaseRow,
    MarkRow,
    RootRow,
    Row,
    SignatureRow,
    Spent,
    forgettable,
    spent,
)
from cloister.broker.log.leaf import Leaf
from cloister.broker.log.receipt import Receipt
from cloister.broker.log.tree import Tree, leaf_hash
from cloister.broker.log.witness import (
    NONCE_BYTES,
    WitnessLink,
    check_seen,
    epoch_request,
    open_statement,
)
from cloister.broker.store.database import Put, Store
from cloister.crypto.canonical import cbor_decode, cbor_encode
from cloister.crypto.keys import Secret, digest
from cloister.crypto.note import NoteError, Signer, Verifier, open_note
from cloister.errors import CloisterError, DeniedError, InputError, MachineError, PeerError, Reason, TamperedError

MAX_GROUP: Final = 128
"""Entries in one commit: at 0.1 ms of work each (bench/log.py) nobody waits longer than 13 ms for others of the group."""
FORGET_EVERY: Final = 4096
"""Groups between two rounds of deleting expired leases."""

PLAIN: Final = (
    leaves.Epoch,
    leaves.Witness,
    leaves.ContractActive,
    leaves.ContractRevoked,
    leaves.KeyOpened,
    leaves.Denial,
    leaves.AnswerRefused,
    leaves.LeaseRenewed,
    leaves.LeaseLost,
)
"""Kinds that `Ledger.append` takes."""

T = TypeVar("T")
R = TypeVar("R", bound=Row)


class Pending(Generic[T]):
    """The answer to an append: comes when the entry is durable. Await it, or call `result`."""

    __slots__ = ("_future",)

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self._future).__await__()

    def result(self, timeout_s: float | None = None) -> T:
        """Wait in this thread; raises what the append raised, TimeoutError after `timeout_s`."""
        return self._future.result(timeout_s)


@dataclass(frozen=True, slots=True)
class Appended:
    """An entry of the log and its receipt. `new` is False if the same thing had been entered before."""

    leaf: Leaf
    receipt: Receipt
    new: bool = True

    @property
    def index(self) -> int:
        return self.receipt.index


@dataclass(frozen=True, slots=True)
class Granted(Appended):
    """Granted answers and what `party` has used now, these included."""

    spent: Spent = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class DepositedKey:
    """The key of a volume and whose it is."""

    volume: str
    owner: str
    volume_id: bytes
    generation: int
    key: Secret


@dataclass(frozen=True, slots=True)
class PendingOutput:
    """The key that a lease got for an asset it writes: becomes a deposited key when its root is registered."""

    asset: str
    owner: str
    volume_id: bytes
    generation: int
    key: Secret


@dataclass(frozen=True, slots=True)
class LeaseSecrets:
    """What the broker keeps for a lease, sealed: its secret and the keys of its outputs."""

    secret: Secret
    outputs: tuple[PendingOutput, ...] = ()

    def encode(self) -> bytes:
        outputs = [[o.asset, o.owner, o.volume_id, o.generation, o.key.reveal()] for o in self.outputs]
        return cbor_encode([self.secret.reveal(), outputs])

    @classmethod
    def decode(cls, data: bytes) -> LeaseSecrets:
        secret, outputs = cbor_decode(data)
        return cls(
            Secret(secret),
            tuple(
                PendingOutput(asset, owner, vid, generation, Secret(key))
                for asset, owner, vid, generation, key in outputs
            ),
        )


@dataclass(frozen=True, slots=True)
class _Entry:
    """What step 1 decided: the entry, payloads of its rows (each `Secret` is sealed in step 2), and the error that the
    request ends with although it was logged."""

    leaf: Leaf
    payloads: Mapping[type[Row], bytes | Secret] = field(default_factory=dict)
    error: CloisterError | None = None
    spent: Spent | None = None


@dataclass(frozen=True, slots=True)
class _Existing:
    """The same thing was entered before, at `entry`."""

    entry: int


@dataclass(slots=True)
class _Job:
    decide: Callable[[Fold], _Entry | _Existing]
    future: Future[Any]
    outcome: _Entry | _Existing | BaseException | None = None
    index: int = -1
    body: bytes = b""


@dataclass(slots=True)
class _Watcher:
    """A witness and where it stands."""

    link: WitnessLink
    epoch: int = 0
    size: int = 0

    def begin(self, signer: Signer, size: int, tree: Tree) -> None:
        """Open an epoch and compare; errors as `Ledger.watch`."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        data = self.link.open_epoch(epoch_request(signer, nonce))
        seen = open_statement(data, self.link.verifier, origin=signer.name, nonce=nonce)
        check_seen(seen, size=size, root_at=tree.root, who=self.link.verifier.name)
        self.epoch, self.size = seen.epoch, seen.checkpoint.size

    def cosign(self, tree: Tree, checkpoint: bytes) -> str | CloisterError:
        """Return the verified signature line for the whole tree, or why there is none."""
        try:
            for _ in range(2):  # once more if the last answer got lost and the witness stands further on
                proof = tree.consistency(self.size)
                line = self.link.cosign(epoch=self.epoch, old_size=self.size, proof=proof, checkpoint=checkpoint)
                if isinstance(line, str):
                    if line.count("\n") != 1:
                        raise NoteError("it is not one line")
                    open_note(add_lines(checkpoint, [line]), [self.link.verifier])
                    self.size = tree.size
                    return line
                if line.size > tree.size:
                    break
                self.size = line.size
        except CloisterError as error:
            return error
        except NoteError as error:
            return PeerError(
                f"the cosignature of {self.link.verifier.name} does not count: {error}",
                code="protocol",
                reasons=[Reason(f"witness.{self.link.verifier.name}", str(error), "its cosignature")],
            )
        return tampered(
            f"my log has {tree.size} entries, witness {self.link.verifier.name} saw more",
            where=f"witness.{self.link.verifier.name}",
            found=f"{tree.size} entries",
            wanted="what the witness saw",
        )


class Ledger:
    """The broker's state: the signed log and its fold. Open one for each state folder."""

    def __init__(
        self,
        store: Store,
        signer: Signer,
        checkpoint: bytes,
        tree: Tree,
        fold: Fold,
        payloads: dict[tuple[type[Row], Key], bytes],
    ) -> None:
        self._store = store
        self._signer = signer
        self._tree = tree  # the writer's; readers stay below `self._size`
        self._fold = fold  # the writer's
        self._checkpoint = checkpoint
        self._size = tree.size
        self._rows = {cls: dict(rows) for cls, rows in fold.rows.items()}
        self._payloads = payloads
        self._publishing = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._halted: CloisterError | None = None
        self._closed = self._stopped = False
        self._watching = threading.Lock()
        self._watchers: tuple[_Watcher, ...] = ()
        self._quorum = 0
        self._pool: ThreadPoolExecutor | None = None
        self._groups = 0
        self._group: Sequence[_Job] = ()
        self._sealing: Mapping[tuple[type[Row], Key], Put] = {}
        self._thread = threading.Thread(target=self._write, name="ledger", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, folder: Path, master: Secret, *, origin: str = "") -> Ledger:
        """Open the state folder, making it if it does not exist; see `Store.open` for the checks and errors."""
        store, loaded = Store.open(folder, master, origin=origin)
        return cls(store, loaded.signer, loaded.checkpoint, loaded.tree, loaded.fold, loaded.payloads)

    def close(self) -> None:
        """Finish what waits, stop the writer, give the folder back. Later appends raise MachineError."""
        if self._closed:
            return
        self._closed = True
        self._jobs.put(None)
        self._thread.join()
        if self._pool is not None:
            self._pool.shutdown()
        self._store.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the log ------------------------------------------------------------------------------------------------------

    @property
    def log_key(self) -> Verifier:
        """The key that everybody who reads receipts needs; its name is the log's origin."""
        return self._signer.verifier

    @property
    def origin(self) -> str:
        return self._signer.name

    @property
    def size(self) -> int:
        """Durable entries."""
        return self._size

    def checkpoint(self) -> bytes:
        """Return the latest signed checkpoint (with cosignatures, if there are witnesses)."""
        return self._checkpoint

    def signed_checkpoint(self) -> SignedCheckpoint:
        """Return the latest checkpoint, read."""
        return open_checkpoint(self._checkpoint, self.log_key)

    def root(self, size: int | None = None) -> bytes:
        """Return the root of the first `size` entries (default: all); ValueError beyond the log."""
        return self._tree.root(self._within(size))

    def inclusion(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """Return the inclusion proof of entry `index` in the first `size` entries; ValueError beyond the log."""
        return self._tree.inclusion(index, self._within(size))

    def consistency(self, old: int, size: int | None = None) -> tuple[bytes, ...]:
        """Return the consistency proof from `old` to `size` entries; ValueError beyond the log."""
        return self._tree.consistency(old, self._within(size))

    def _within(self, size: int | None) -> int:
        most = self._size
        if size is not None and not 0 <= size <= most:
            raise ValueError(f"size {size} of a log with {most} entries")
        return most if size is None else size

    def entries(self, start: int, end: int) -> list[bytes]:
        """Return the canonical JSON of entries `start` to `end` - 1 (cut to what exists), checked against the tree.

        Raises:
            TamperedError: (log-tampered) the database was changed since it was opened.
        """
        end = min(end, self._size)
        start = max(start, 0)
        if start >= end:
            return []
        bodies = self._store.bodies(start, end)
        if [leaf_hash(body) for body in bodies] != [self._tree.leaf(index) for index in range(start, end)]:
            raise tampered(
                f"log entries {start} to {end - 1} are not what was logged",
                where="store.log_entries",
                found="other bytes in the database",
                wanted="the entries that this broker wrote",
            )
        return bodies

    def leaf(self, index: int) -> Leaf:
        """Return entry `index`; IndexError beyond the log, TamperedError as `entries`."""
        bodies = self.entries(index, index + 1) if index >= 0 else []
        if not bodies:
            raise IndexError(f"entry {index} of {self._size}")
        return leaves.parse_own(bodies[0])

    def receipt(self, index: int) -> Receipt:
        """Return a receipt of entry `index` under the latest checkpoint; errors as `leaf`."""
        with self._publishing:
            checkpoint, size = self._checkpoint, self._size
        bodies = self.entries(index, index + 1) if index >= 0 else []
        if not bodies:
            raise IndexError(f"entry {index} of {size}")
        return Receipt(bodies[0], index, size, self._tree.inclusion(index, size), checkpoint)

    def watch(self, witnesses: Sequence[WitnessLink], *, quorum: int) -> None:
        """Open an epoch at every witness and let them cosign every group from here on; blocks.

        Requests are answered only after `quorum` witnesses cosigned. A witness that refuses halts the ledger; one that
        cannot be reached is asked again with the next group.

        Raises:
            TamperedError: (log-tampered) a witness saw more entries than this log has, or another history; halted.
            PeerError: fewer than `quorum` witnesses answered.
            ValueError: `quorum` is not more than half of the witnesses, or more than all.
        """
        if not len(witnesses) < 2 * quorum <= 2 * len(witnesses):
            raise ValueError(f"a quorum of {quorum} of {len(witnesses)} witnesses lets a log fork or never answers")
        with self._watching:
            watchers, reasons = [], list[Reason]()
            for link in witnesses:
                watcher = _Watcher(link)
                try:
                    watcher.begin(self._signer, self._size, self._tree)
                except PeerError as error:
                    reasons += error.reasons
                    continue
                except TamperedError as error:
                    self._halted = error
                    raise
                watchers.append(watcher)
            if len(watchers) < quorum:
                raise PeerError(
                    f"{len(watchers)} of {len(witnesses)} witnesses answered, {quorum} must", reasons=reasons
                )
            if self._pool is not None:
                self._pool.shutdown()
            self._pool = ThreadPoolExecutor(len(watchers), thread_name_prefix="cosign")
            self._watchers, self._quorum = tuple(watchers), quorum

    # --- reading ------------------------------------------------------------------------------------------------------

    def _get(self, cls: type[R], *key: str | int) -> R | None:
        return cast("R | None", self._rows[cls].get(key))

    def _all(self, cls: type[R]) -> list[R]:
        with self._publishing:
            return cast("list[R]", list(self._rows[cls].values()))

    def _open(self, row: Row) -> Secret:
        return Secret(self._store.vault.open_row(row, self._payloads[type(row), row.key]))

    def contract(self, contract: str) -> ContractRow | None:
        """Return what is known of the contract with this id."""
        return self._get(ContractRow, contract)

    def contract_text(self, contract: str) -> bytes:
        """Return the exact file bytes of a submitted contract; KeyError if it is unknown."""
        return self._payloads[ContractRow, (contract,)]

    def contracts(self) -> list[ContractRow]:
        """Return all contracts, in the order in which they were submitted."""
        return sorted(self._all(ContractRow), key=lambda row: row.entry)

    def active_contract(self, name: str) -> ContractRow | None:
        """Return the active contract called `name`."""
        return next((row for row in self._all(ContractRow) if row.name == name and row.state == "active"), None)

    def signatures(self, contract: str) -> dict[str, str]:
        """Return fingerprint -> armoured SSHSIG of everybody who signed this contract."""
        rows = [row for row in self._all(SignatureRow) if row.contract == contract]
        return {row.party: self._payloads[SignatureRow, row.key].decode() for row in rows}

    def deposited_key(self, volume: str, owner: str) -> DepositedKey | None:
        """Return the key of the volume with digest `volume` that is kept for `owner`."""
        row = self._get(KeyRow, volume, owner)
        if row is None:
            return None
        return DepositedKey(row.volume, row.owner, row.volume_id, row.generation, self._open(row))

    def deposited_keys(self) -> list[KeyRow]:
        """Return whose keys of which volumes are kept; without the keys."""
        return self._all(KeyRow)

    def asset_root(self, name: str, asset: str) -> RootRow | None:
        """Return the current version of `asset`, written under the contract called `name`."""
        return self._get(RootRow, name, asset)

    def asset_roots(self, name: str) -> list[RootRow]:
        """Return the current versions of all assets written under the contract called `name`."""
        return [row for row in self._all(RootRow) if row.name == name]

    def lease(self, lease: str) -> LeaseRow | None:
        """Return a lease, lost and expired ones too (for a day)."""
        return self._get(LeaseRow, lease)

    def leases(self) -> list[LeaseRow]:
        """Return all leases that are remembered, expired and lost ones too."""
        return self._all(LeaseRow)

    def lease_secrets(self, lease: str) -> LeaseSecrets:
        """Return the secrets of a lease; KeyError if it is unknown."""
        row = self._get(LeaseRow, lease)
        if row is None:
            raise KeyError(lease)
        return LeaseSecrets.decode(self._open(row).reveal())

    def answers_spent(self, contract: str, phase: str, party: str, *, now: datetime) -> Spent:
        """Return the answers granted to `party`: ever, and on the UTC day of `now`."""
        return spent(self._get(AnswerCountRow, contract, phase, party), now.astimezone(UTC).date())

    def denial(self, denial: str) -> tuple[int, leaves.Denial | leaves.AnswerRefused] | None:
        """Return (index, entry) of the denial with this id; TamperedError as `entries`."""
        row = self._get(DenialRow, denial)
        if row is None:
            return None
        return row.entry, cast("leaves.Denial | leaves.AnswerRefused", self.leaf(row.entry))

    def collateral_marks(self) -> dict[str, int]:
        """Return the vendors' numbers that never go back, by name."""
        return {row.mark: row.number for row in self._all(MarkRow)}

    @property
    def epoch(self) -> int:
        """How often a broker began on this log."""
        return len(self._rows[EpochRow])

    def kept_secret(self, name: str, make: Callable[[], Secret]) -> Secret:
        """Return the secret kept under `name` outside the log; see `Store.kept_secret`. For start-up: it blocks."""
        return self._store.kept_secret(name, make)

    # --- appending ----------------------------------------------------------------------------------------------------

    def append(self, leaf: Leaf) -> Pending[Appended]:
        """Append an entry of `PLAIN`: its rows have no payload, and nothing is checked beyond what the fold checks.

        Raises:
            TypeError: an entry of another kind: use its own method.
        Raises (from the Pending):
            TamperedError: (log-tampered) the entry contradicts the log; nothing was appended.
            MachineError: (disk-full, machine) nothing was appended.
        """
        if not isinstance(leaf, PLAIN):
            raise TypeError(f"{leaf.KIND} entries have a method of their own")
        return self._submit(lambda _: _Entry(leaf))

    def begin_epoch(
        self,
        *,
        now: datetime,
        software: str = "",
        evidence: str = "",
        tee: str = "",
        hpke_key: str = "",
        tls_key: str = "",
    ) -> Pending[Appended]:
        """Append the entry of a broker's start; the number is the next one."""

        def decide(fold: Fold) -> _Entry:
            number = len(fold.rows[EpochRow]) + 1
            return _Entry(
                leaves.Epoch(
                    time=now,
                    number=number,
                    software=software,
                    evidence=evidence,
                    tee=tee,
                    hpke_key=hpke_key,
                    tls_key=tls_key,
                )
            )

        return self._submit(decide)

    def raise_marks(self, found: Mapping[str, int], *, now: datetime) -> Pending[Appended]:
        """Log the numbers of `found` that are above their marks; if none is, give the latest such entry again (`new` False).

        Raises:
            ValueError: `found` is empty, has more than `leaf.MAX_MARKS`, or a name or number that no entry holds.
        """
        if not 0 < len(found) <= leaves.MAX_MARKS:
            raise ValueError(f"{len(found)} marks, 1 to {leaves.MAX_MARKS} fit one entry")
        leaves.CollateralMarks(time=now, marks=tuple(leaves.Mark(*each) for each in found.items()))  # well-formed?

        def decide(fold: Fold) -> _Entry | _Existing:
            rows = {name: fold.get(MarkRow, name) for name in found}
            higher = {name: found[name] for name, row in rows.items() if row is None or row.number < found[name]}
            if not higher:
                return _Existing(max(row.entry for row in rows.values() if row is not None))
            marks = tuple(leaves.Mark(name, higher[name]) for name in sorted(higher))
            return _Entry(leaves.CollateralMarks(time=now, marks=marks))

        return self._submit(decide)

    def submit_contract(
        self, toml: bytes, *, name: str, version: int, replaces: str, now: datetime
    ) -> Pending[Appended]:
        """Keep a contract file; the same bytes again give the first entry again (`new` False).

        `replaces` is the id of the contract it replaces, or "".
        """
        contract = digest(toml)
        leaf = leaves.ContractSubmitted(time=now, contract=contract, name=name, version=version, replaces=replaces)

        def decide(fold: Fold) -> _Entry | _Existing:
            row = fold.get(ContractRow, contract)
            return _Existing(row.entry) if row else _Entry(leaf, {ContractRow: toml})

        return self._submit(decide)

    def add_signature(self, contract: str, party: str, armoured: str, *, now: datetime) -> Pending[Appended]:
        """Keep the verified signature of `party` (fingerprint); the same text again gives the first entry again.

        Raises (from the Pending):
            InputError: the contract is unknown, or revoked or replaced.
        """
        text = armoured.encode()
        leaf = leaves.ContractSigned(time=now, contract=contract, party=party, signature=digest(text))

        def decide(fold: Fold) -> _Entry | _Existing:
            _wanted_contract(fold, contract, ("waiting", "active"))
            row = fold.get(SignatureRow, contract, party)
            if row is not None and row.signature == leaf.signature:
                return _Existing(row.entry)
            return _Entry(leaf, {SignatureRow: text})

        return self._submit(decide)

    def activate_contract(self, contract: str, signers: Sequence[str], *, now: datetime) -> Pending[Appended]:
        """Make a contract count from here on; the active contract of the same name becomes `replaced`.

        `signers` are the fingerprints whose signatures were required. Active already: its entry again.

        Raises (from the Pending):
            InputError: the contract is unknown, revoked or replaced, a signature is missing, or it does not replace the
                contract of this name that is active now.
        """

        def decide(fold: Fold) -> _Entry | _Existing:
            row = _wanted_contract(fold, contract, ("waiting", "active"))
            if row.state == "active":
                return _Existing(row.state_entry)
            active = fold.active(row.name)
            replaces = active.contract if active else ""
            if replaces != row.replaces:
                raise InputError(
                    f"{row.name} version {row.version} does not replace the active contract of this name",
                    reasons=[Reason("contract.replaces", row.replaces or "nothing", replaces or "nothing")],
                    hint="write the id of the active contract into `replaces` and sign again",
                )
            missing = [party for party in signers if fold.get(SignatureRow, contract, party) is None]
            if missing:
                raise InputError(
                    f"{row.name} is not signed by everybody",
                    reasons=[Reason("contract.signatures", "missing", party) for party in missing],
                )
            return _Entry(
                leaves.ContractActive(
                    time=now, contract=contract, name=row.name, replaces=replaces, signers=tuple(signers)
                )
            )

        return self._submit(decide)

    def revoke_contract(self, contract: str, party: str, armoured: str, *, now: datetime) -> Pending[Appended]:
        """End a contract for good. `armoured` is the verified signature of `party` over the statement that says so.

        Raises (from the Pending):
            InputError: the contract is unknown.
        """

        def decide(fold: Fold) -> _Entry | _Existing:
            row = _wanted_contract(fold, contract, ("waiting", "active", "replaced", "revoked"))
            if row.state == "revoked":
                return _Existing(row.state_entry)
            signature = digest(armoured.encode())
            return _Entry(
                leaves.ContractRevoked(time=now, contract=contract, name=row.name, party=party, signature=signature)
            )

        return self._submit(decide)

    def deposit_key(
        self, volume: str, owner: str, key: Secret, *, volume_id: bytes, generation: int, now: datetime
    ) -> Pending[Appended]:
        """Keep the key of a volume for `owner`; a second deposit by the same owner replaces the first."""
        leaf = leaves.KeyDeposited(time=now, volume=volume, owner=owner, volume_id=volume_id, generation=generation)
        return self._submit(lambda _: _Entry(leaf, {KeyRow: key}))

    def open_key(self, leaf: leaves.KeyOpened) -> Pending[Appended]:
        """Log that a key leaves towards its owner; send it only after this.

        Raises (from the Pending):
            InputError: no key of this volume is kept for this owner.
            DeniedError: meanwhile the contract that it is opened under is not active.
        """

        def decide(fold: Fold) -> _Entry:
            row = fold.get(ContractRow, leaf.contract) if leaf.contract else None
            if leaf.contract and (row is None or row.state != "active"):
                raise _not_active(row, leaf.contract)
            if fold.get(KeyRow, leaf.volume, leaf.owner) is None:
                raise InputError(
                    "the broker does not keep this key",
                    reasons=[Reason("open.volume", leaf.volume, f"a volume whose key is kept for {leaf.owner}")],
                )
            return _Entry(leaf)

        return self._submit(decide)

    def release(self, leaf: leaves.Release, kept: LeaseSecrets) -> Pending[Appended]:
        """Log a release and begin its lease; send keys only after this.

        Raises (from the Pending):
            DeniedError: meanwhile the contract is not active, a written asset that is read has a newer version, or a key
                that is read was taken back.
        """

        def decide(fold: Fold) -> _Entry:
            row = fold.get(ContractRow, leaf.contract)
            if row is None or row.state != "active":
                raise _not_active(row, leaf.contract)
            stale = [
                Reason(
                    f"release.reads.{ref.asset}", ref.volume, root.volume, "a newer version was registered meanwhile"
                )
                for ref in leaf.reads
                if (root := fold.get(RootRow, row.name, ref.asset)) is not None and root.volume != ref.volume
            ]
            if stale:
                raise DeniedError("an asset changed while the release was decided", reasons=stale, hint="ask again")
            return _Entry(leaf, {LeaseRow: Secret(kept.encode())})

        return self._submit(decide)

    def deny(
        self,
        denial: str,
        *,
        operation: str,
        error: CloisterError,
        now: datetime,
        contract: str = "",
        phase: str = "",
        assets: Sequence[str] = (),
        code: str = "",
        evidence: str = "",
        tee: str = "",
        launch: str = "",
        machine: Sequence[str] = (),
        hpke_key: str = "",
    ) -> Pending[Appended]:
        """Log a refusal under the id `denial`. Reasons that do not fit an entry are cut (`leaf.clip`).

        Raises:
            ValueError: a field is ill-formed: pass on only what was checked.
        """
        leaf = leaves.Denial(
            time=now,
            id=denial,
            operation=operation,
            error=error.code,
            message=leaves.clip_text(error.message),
            contract=contract,
            phase=phase,
            assets=tuple(assets),
            code=code,
            evidence=evidence,
            tee=tee,
            launch=launch,
            machine=tuple(machine),
            hpke_key=hpke_key,
            reasons=leaves.clip(error.reasons),
        )
        return self._submit(lambda _: _Entry(leaf))

    def renew_lease(
        self,
        lease: str,
        *,
        evidence: str,
        tee: str,
        expires: datetime,
        now: datetime,
        launch: str = "",
        machine: Sequence[str] = (),
    ) -> Pending[Appended]:
        """Extend a lease whose node attested again.

        Raises (from the Pending):
            DeniedError: (lease-lost) it is unknown, was lost, is expired, or its contract is not active.
        """
        leaf = leaves.LeaseRenewed(
            time=now,
            lease=lease,
            evidence=evidence,
            tee=tee,
            launch=launch,
            machine=tuple(machine),
            expires=expires,
        )

        def decide(fold: Fold) -> _Entry:
            _wanted_lease(fold, lease, now)
            return _Entry(leaf)

        return self._submit(decide)

    def lose_lease(self, lease: str, reasons: Sequence[Reason], *, now: datetime) -> Pending[Appended]:
        """End a lease before its time.

        Raises (from the Pending):
            DeniedError: (lease-lost) it is unknown or lost already.
        """
        leaf = leaves.LeaseLost(time=now, lease=lease, reasons=leaves.clip(reasons))

        def decide(fold: Fold) -> _Entry:
            row = fold.get(LeaseRow, lease)
            if row is None or row.lost:
                raise _lease_lost(lease, "lost before" if row else "unknown", "a lease that was not lost")
            return _Entry(leaf)

        return self._submit(decide)

    def register_root(
        self, lease: str, asset: str, volume: str, *, generation: int, now: datetime
    ) -> Pending[Appended]:
        """Make `volume` the only current version of `asset` and keep the key that the lease got for it, for its owner.

        The same registration again gives the first entry again.

        Raises (from the Pending):
            DeniedError: the lease does not write this asset, another version came first (contract's other lease), or the
                volume is registered already: its key would be exchanged; (lease-lost) as `renew_lease`.
        """

        def decide(fold: Fold) -> _Entry | _Existing:
            row = _wanted_lease(fold, lease, now)
            contract = fold.get(ContractRow, row.contract)
            kept = LeaseSecrets.decode(self._store.vault.open_row(row, self._sealed(row)))
            output = next((item for item in kept.outputs if item.asset == asset), None)
            if contract is None or output is None or asset not in row.writes:
                raise DeniedError(
                    f"lease {lease} does not write {asset!r}",
                    reasons=[Reason("register.asset", asset, ", ".join(row.writes) or "nothing")],
                )
            root = fold.get(RootRow, contract.name, asset)
            if root is not None and root.volume == volume and root.lease == lease:
                return _Existing(root.entry)
            if root is not None and root.generation >= generation:
                raise DeniedError(
                    f"another version of {asset!r} was registered first",
                    reasons=[Reason("register.generation", str(generation), f"above {root.generation}")],
                    hint="the current version stays; run again to build on it",
                )
            if fold.get(KeyRow, volume, output.owner) is not None:
                raise DeniedError(
                    f"{volume} is a version of another asset, perhaps of another contract",
                    reasons=[Reason("register.digest", volume, "a volume that was never registered")],
                    hint="run again: what is sealed again has another digest",
                )
            leaf = leaves.RootRegistered(
                time=now,
                contract=row.contract,
                name=contract.name,
                asset=asset,
                volume=volume,
                generation=generation,
                volume_id=output.volume_id,
                owner=output.owner,
                previous=root.volume if root else "",
                lease=lease,
            )
            return _Entry(leaf, {KeyRow: output.key})

        return self._submit(decide)

    def answer(
        self,
        *,
        contract: str,
        phase: str,
        party: str,
        budget: int | None,
        per_day: int | None,
        now: datetime,
        denial: str,
        count: int = 1,
        lease: str = "",
        query: str = "",
        answer: str = "",
    ) -> Pending[Granted]:
        """Spend `count` answers of `party` if budget and day allow it, and log that; otherwise log the refusal under the
        id `denial`. Checking and spending is one step. `budget` or `per_day` None: no such limit. The day is UTC.

        Raises (from the Pending):
            DeniedError: (budget-spent) refused, logged, nothing spent; (denied) the contract is not active;
                (lease-lost) `lease` is named and unknown, lost or expired.
        """
        if count < 1:
            raise ValueError(f"{count} answers cannot be granted")

        def decide(fold: Fold) -> _Entry:
            row = fold.get(ContractRow, contract)
            if row is None or row.state != "active":
                raise _not_active(row, contract)
            if lease:
                _wanted_lease(fold, lease, now)
            sums = spent(fold.get(AnswerCountRow, contract, phase, party), now.astimezone(UTC).date())
            reasons = [
                Reason(f"phase.{phase}.answer.{name}", f"{used} used, {count} asked for", f"at most {limit}")
                for name, used, limit in (("budget", sums.used, budget), ("per_day", sums.used_today, per_day))
                if limit is not None and used + count > limit
            ]
            if reasons:
                refused = leaves.AnswerRefused(
                    time=now,
                    id=denial,
                    contract=contract,
                    phase=phase,
                    party=party,
                    count=count,
                    lease=lease,
                    reasons=tuple(reasons),
                )
                error = DeniedError(
                    "the answer budget is used up", code="budget-spent", reasons=reasons, denial_id=denial
                )
                return _Entry(refused, error=error)
            leaf = leaves.Answer(
                time=now,
                contract=contract,
                phase=phase,
                party=party,
                count=count,
                used=sums.used + count,
                lease=lease,
                query=query,
                answer=answer,
            )
            return _Entry(leaf, spent=Spent(sums.used + count, sums.used_today + count))

        return cast("Pending[Granted]", self._submit(decide))

    # --- the writer ---------------------------------------------------------------------------------------------------

    def _submit(self, decide: Callable[[Fold], _Entry | _Existing]) -> Pending[Appended]:
        if self._closed or self._stopped:
            raise MachineError("the ledger is closed")
        future: Future[Any] = Future()
        self._jobs.put(_Job(decide, future))
        if self._stopped:  # the writer ended between the two lines above: nobody else would answer
            self._abandon()
        return Pending(future)

    def _write(self) -> None:
        """The writer thread: groups until it is told to stop; nobody is left waiting, whatever happens."""
        try:
            while self._write_group():
                pass
        finally:
            self._stopped = True
            self._abandon()

    def _abandon(self) -> None:
        stopped = MachineError("the ledger stopped before this was written")
        waiting: list[_Job | None] = list(self._group)
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.append(self._jobs.get_nowait())
        for job in waiting:
            if job is not None:
                with contextlib.suppress(InvalidStateError):  # answered, or cancelled by who asked
                    job.future.set_exception(stopped)

    def _write_group(self) -> bool:
        """Take what waits and answer it; return whether to go on."""
        job = self._jobs.get()
        jobs: list[_Job] = []
        while job is not None:
            if job.future.set_running_or_notify_cancel():
                jobs.append(job)
            if len(jobs) == MAX_GROUP or self._jobs.empty():
                break
            job = self._jobs.get()
        self._group = jobs
        if jobs:
            try:
                self._append_group(jobs)
            except CloisterError as error:
                for waiting in jobs:
                    waiting.future.set_exception(error)
            else:
                self._answer(jobs)
            self._groups += 1
            if self._groups % FORGET_EVERY == 1:
                self._forget_leases()
        return job is not None

    def _append_group(self, jobs: Sequence[_Job]) -> None:
        """Steps 1 to 5. Raises what all requests of the group end with; the ledger is as before then."""
        if self._halted is not None:
            raise self._halted
        first, latest = self._tree.size, self._fold.latest
        changes: list[Change] = []
        puts: dict[tuple[type[Row], Key], Put] = {}
        self._sealing = puts
        for job in jobs:
            try:
                job.outcome = job.decide(self._fold)
                if isinstance(job.outcome, _Entry):
                    changes += self._enter(job, job.outcome, puts)
            except (CloisterError, ValueError) as error:
                job.outcome = error
        bodies = [job.body for job in jobs if job.index >= 0]
        if not bodies:
            return
        checkpoint = sign(Checkpoint(self.origin, self._tree.size, self._tree.root()), self._signer)
        try:
            self._store.commit(first, bodies, tuple(puts.values()), checkpoint)
        except CloisterError as error:
            self._fold.undo(changes, size=first, latest=latest)
            self._tree.truncate(first)
            self._check_rolled_back(first, error)
            raise
        checkpoint, trouble = self._cosign(checkpoint)
        self._publish(changes, puts, checkpoint)
        if trouble is not None:
            raise trouble

    def _cosign(self, checkpoint: bytes) -> tuple[bytes, CloisterError | None]:
        """Step 5: return the note with the cosignatures, and why the group must not be answered, if so."""
        with self._watching:
            if self._pool is None:
                return checkpoint, None
            results = list(self._pool.map(lambda w: w.cosign(self._tree, checkpoint), self._watchers))
            lines = [result for result in results if isinstance(result, str)]
            reasons = [reason for result in results if isinstance(result, CloisterError) for reason in result.reasons]
            cosigned = add_lines(checkpoint, lines)
            refused = next((result for result in results if isinstance(result, TamperedError)), None)
            if refused is not None:
                self._halted = refused
                return cosigned, refused
            if len(lines) < self._quorum:
                return cosigned, PeerError(
                    f"{len(lines)} of {len(self._watchers)} witnesses cosigned, {self._quorum} must: logged, not granted",
                    reasons=reasons,
                    hint="start the witnesses; the entry stays in the log, ask again",
                )
            return cosigned, None

    def _enter(self, job: _Job, entry: _Entry, puts: dict[tuple[type[Row], Key], Put]) -> tuple[Change, ...]:
        """Step 2."""
        body = entry.leaf.encode()
        if len(body) > leaves.MAX_BYTES:
            raise ValueError(f"log entry of {len(body)} bytes, at most {leaves.MAX_BYTES} are accepted")
        changes = self._fold.apply(entry.leaf)
        for change in changes:
            row = change.after
            payload = entry.payloads.get(type(row))
            if isinstance(payload, Secret):
                payload = self._store.vault.seal_row(row, payload.reveal())
            before = puts.get((type(row), row.key))
            puts[type(row), row.key] = Put(row, before.payload if before and payload is None else payload)
        job.body = body
        job.index = self._tree.append(leaf_hash(body))
        return changes

    def _sealed(self, row: Row) -> bytes:
        """Return the payload of a row as the writer sees it: one of this group before a durable one."""
        put = self._sealing.get((type(row), row.key))
        return put.payload if put and put.payload is not None else self._payloads[type(row), row.key]

    def _check_rolled_back(self, size: int, cause: CloisterError) -> None:
        """Halt unless a commit that failed for lack of room left exactly what was there before it."""
        if cause.code not in ("disk-full", "busy"):
            self._halted = cause  # after a failed fsync nobody knows what the disk holds: only a new start reads it
            return
        try:
            found = self._store.size_on_disk()
        except CloisterError as error:
            self._halted = error
            return
        if found != size:
            self._halted = MachineError(
                "a commit failed and it is not known what was written: start the broker again",
                reasons=[Reason("store.commit", f"{found} entries on disk", f"{size}"), *cause.reasons],
            )

    def _publish(self, changes: Sequence[Change], puts: Mapping[tuple[type[Row], Key], Put], checkpoint: bytes) -> None:
        with self._publishing:
            for change in changes:
                self._rows[type(change.after)][change.after.key] = change.after
            for key, put in puts.items():
                if put.payload is not None:
                    self._payloads[key] = put.payload
            self._checkpoint, self._size = checkpoint, self._tree.size

    def _answer(self, jobs: Sequence[_Job]) -> None:
        """Step 6."""
        for job in jobs:
            match job.outcome:
                case _Entry(error=CloisterError() as error):
                    job.future.set_exception(error)
                case _Entry(leaf=leaf, spent=sums):
                    proof = self._tree.inclusion(job.index, self._size)
                    receipt = Receipt(job.body, job.index, self._size, proof, self._checkpoint)
                    job.future.set_result(Granted(leaf, receipt, spent=sums) if sums else Appended(leaf, receipt))
                case _Existing(entry=entry):
                    try:
                        receipt = self.receipt(entry)
                        job.future.set_result(Appended(leaves.parse_own(receipt.data), receipt, new=False))
                    except CloisterError as error:
                        job.future.set_exception(error)
                case BaseException() as error:
                    job.future.set_exception(error)

    def _forget_leases(self) -> None:
        """Delete leases that expired a day ago, secrets first; a full disk only postpones it."""
        old = [row.key for row in self._fold.rows[LeaseRow].values() if forgettable(row, self._fold.latest)]
        if not old:
            return
        try:
            self._store.forget_leases([str(key[0]) for key in old])
        except CloisterError as error:
            if error.code not in ("disk-full", "busy"):
                self._halted = error
            return
        with self._publishing:
            for key in old:
                del self._fold.rows[LeaseRow][key], self._rows[LeaseRow][key], self._payloads[LeaseRow, key]


def _wanted_contract(fold: Fold, contract: str, states: Sequence[str]) -> ContractRow:
    row = fold.get(ContractRow, contract)
    if row is None:
        raise InputError(
            "the broker does not know this contract",
            reasons=[Reason("contract", contract, "the id of a contract that was submitted")],
            hint="submit the file first: `cloister sign <file>`",
        )
    if row.state not in states:
        raise InputError(
            f"{row.name} version {row.version} is {row.state}",
            reasons=[Reason("contract.state", row.state, " or ".join(states))],
        )
    return row


def _not_active(row: ContractRow | None, contract: str) -> DeniedError:
    found = f"{row.name} version {row.version} is {row.state}" if row else f"{contract} is unknown"
    return DeniedError("the contract is not active", reasons=[Reason("contract.state", found, "active")])


def _lease_lost(lease: str, found: str, wanted: str) -> DeniedError:
    return DeniedError(
        f"lease {lease} does not count any more", code="lease-lost", reasons=[Reason("lease", found, wanted)]
    )


def _wanted_lease(fold: Fold, lease: str, now: datetime) -> LeaseRow:
    """Return a lease that counts at `now`, under an active contract."""
    row = fold.get(LeaseRow, lease)
    if row is None:
        raise _lease_lost(lease, "unknown", "a lease of this broker")
    if row.lost or row.expires <= now:
        raise _lease_lost(
            lease, "lost" if row.lost else f"expired at {leaves.format_time(row.expires)}", "a live lease"
        )
    contract = fold.get(ContractRow, row.contract)
    if contract is None or contract.state != "active":
        raise _lease_lost(lease, f"its contract is {contract.state if contract else 'unknown'}", "an active contract")
    return row
