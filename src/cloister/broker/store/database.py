"""The database edge of the broker: one SQLite file behind SQLAlchemy Core; nothing here decides.

The database is not trusted: whoever runs the machine can change it. So `Store.open` gives back what it holds only after
  1 lock       this process alone uses the folder                              MachineError busy
  2 database   SQLite finds its own structures intact, the format is known     TamperedError log-tampered
  3 head       the log's key opens under `master`, it signed the checkpoint    TamperedError log-tampered
  4 entries    indices run from 0 without gaps, their tree is the checkpoint's TamperedError log-tampered
  5 tables     every row is what the log folds to, none is missing or extra    TamperedError log-tampered
  6 payloads   texts have their digest, secrets open under their row           TamperedError log-tampered
An older copy of the whole file passes all six: only a witness notices (`cloister.broker.log.witness`).

Secrets are AES-256-GCM under a key-encryption key of their owner (HKDF from `master`); the additional data are the
table, the row's key and the log entry it rests on, so a ciphertext in another row, or of an earlier entry, does not open.

SQLite runs with WAL and `synchronous=FULL`: a commit that returned survives a crash of process, kernel and power, as
far as the disk keeps what it acknowledged. Only `Store` holds SQL; PostgreSQL needs another engine and lock, no more.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    Connection,
    Dialect,
    Engine,
    RowMapping,
    bindparam,
    create_engine,
    delete,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from cloister.broker.log import leaf as leaves
from cloister.broker.log.checkpoint import Checkpoint, open_checkpoint, sign, tampered
from cloister.broker.log.fold import ROWS, ContractRow, Fold, Key, KeyRow, LeaseRow, Row, SignatureRow, forgettable
from cloister.broker.log.tree import EMPTY_ROOT, Tree, leaf_hash
from cloister.broker.store.tables import (
    FORMAT,
    KEPT_SECRETS,
    LOG_ENTRIES,
    LOG_HEAD,
    METADATA,
    TABLES,
    from_columns,
    to_columns,
)
from cloister.crypto.canonical import json_encode
from cloister.crypto.keys import Secret, UnwrapError, derive, digest, unwrap, wrap
from cloister.crypto.note import NoteError, Signer, Verifier
from cloister.errors import CloisterError, MachineError, Reason, TamperedError

DATABASE: Final = "broker.db"
LOCK: Final = "lock"

_PRAGMAS: Final = (
    "journal_mode=wal",
    "synchronous=FULL",
    "foreign_keys=on",
    "busy_timeout=30000",
    "trusted_schema=off",
    "cell_size_check=on",
    "temp_store=memory",
)
_FULL: Final = frozenset(
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR_WRITE,
        sqlite3.SQLITE_IOERR_SHMSIZE,
        sqlite3.SQLITE_IOERR_TRUNCATE,
    }
)
"""SQLite's words for "no room": ENOSPC is SQLITE_FULL; EDQUOT and EFBIG (a limit on file size) come as write errors."""
_DAMAGED: Final = frozenset(
    {
        0,  # the driver's own: a text that is not UTF-8, a value of another type
        sqlite3.SQLITE_ERROR,  # our statements are right, so a table or column is not the one we made
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_FORMAT,
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH,
    }
)
"""SQLite's words for a database that is not what this broker wrote."""


@dataclass(frozen=True, slots=True)
class Put:
    """A row to write. `payload` None keeps the payload that the row has."""

    row: Row
    payload: bytes | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a state folder holds, checked: see the module for the steps."""

    signer: Signer
    checkpoint: bytes
    tree: Tree
    fold: Fold
    payloads: dict[tuple[type[Row], Key], bytes]


def _translate(error: SQLAlchemyError | sqlite3.Error | UnicodeDecodeError, path: Path, doing: str) -> CloisterError:
    """Return the error of our tree for one of the database."""
    original = error.orig if isinstance(error, DBAPIError) else error
    number = getattr(original, "sqlite_errorcode", 0)
    if number in _FULL:
        return MachineError(
            f"no room to write {path.name}: nothing was changed",
            code="disk-full",
            reasons=[Reason("store.commit", str(original), "room for a few pages")],
            hint=f"free space on the disk that holds {path.parent}",
        )
    if number & 0xFF in _DAMAGED:
        return tampered(
            f"{path.name} is damaged or was changed: {original}",
            where="store.database",
            found=str(original),
            wanted="the database that this broker wrote",
            hint="restore the state folder from a replica or a backup; witnesses will say if it is too old",
        )
    if number & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return MachineError(
            f"another process uses {path.name}",
            code="busy",
            reasons=[Reason("store.lock", str(original), "one broker for each state folder")],
        )
    return MachineError(
        f"cannot use {path} while {doing}: {original}",
        reasons=[Reason("store.database", str(original), "a file that can be read and written")],
    )


@contextmanager
def _translated(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, UnicodeDecodeError) as error:  # the last: SQLite quotes damaged names
        raise _translate(error, path, doing) from error


def context_of(row: Row) -> bytes:
    """Return the additional data of the secrets in `row`: its table, key and log entry."""
    return json_encode(["cloister/store/1", row.TABLE, *(str(part) for part in row.key), str(getattr(row, "entry", 0))])


class Vault:
    """Wraps secrets under `master`: one key-encryption key for each owner."""

    __slots__ = ("_keks", "_master")

    def __init__(self, master: Secret) -> None:
        self._master = master
        self._keks: dict[str, Secret] = {}

    def _kek(self, owner: str) -> Secret:
        kek = self._keks.get(owner)
        if kek is None:
            kek = self._keks[owner] = Secret(derive(self._master, "cloister/store/kek/1", context=owner.encode()))
        return kek

    def seal(self, owner: str, payload: bytes, context: bytes) -> bytes:
        return wrap(self._kek(owner), payload, context=context)

    def open(self, owner: str, sealed: bytes, context: bytes) -> bytes:
        """Return the payload; UnwrapError if it was not sealed here, for this owner and context."""
        return unwrap(self._kek(owner), sealed, context=context)

    def seal_row(self, row: Row, payload: bytes) -> bytes:
        return self.seal(_owner(row), payload, context_of(row))

    def open_row(self, row: Row, sealed: bytes) -> bytes:
        return self.open(_owner(row), sealed, context_of(row))


def _owner(row: Row) -> str:
    return f"owner:{row.owner}" if isinstance(row, KeyRow) else "broker"


def check_payload(vault: Vault, row: Row, payload: bytes) -> str:
    """Return what is wrong with the payload of `row`, or nothing."""
    match row:
        case ContractRow():
            return "" if digest(payload) == row.contract else "the text has another digest"
        case SignatureRow():
            return "" if digest(payload) == row.signature else "the signature has another digest"
        case KeyRow() | LeaseRow():
            try:
                vault.open_row(row, payload)
            except UnwrapError:
                return "the secret does not open under this row"
            return ""
        case _:
            raise TypeError(f"{row.TABLE} has no payload")


def _lock(folder: Path) -> int:
    """Return a descriptor that holds the folder's lock until it is closed.

    Raises:
        MachineError: (busy) another process, or another store in this one, holds it.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise MachineError(
            f"another broker uses {folder}",
            code="busy",
            reasons=[Reason("store.lock", "the lock is held", "one broker for each state folder")],
            hint="stop the other broker first; two brokers on one state would fork its log",
        ) from error
    return descriptor


def _prepare(folder: Path) -> None:
    """Make the database file, if there is none, for its owner only, and make its name durable (SQLite syncs the folder for
    its journals only)."""
    try:
        os.close(os.open(folder / DATABASE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise MachineError(f"cannot use {folder / DATABASE}: {error.strerror}") from error


class _Statement:
    """A statement compiled once and run by the driver's cursor: a quarter of the time that `Connection.execute` takes for
    a statement this small (bench/log.py)."""

    __slots__ = ("_names", "_text")

    def __init__(self, statement: Any, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        self._text = str(compiled)
        self._names = tuple(compiled.positiontup)

    def run(self, cursor: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run it once for each of `rows`.

        Raises:
            TamperedError: (log-tampered) it did not write every row: somebody else changed the database.
        """
        cursor.executemany(self._text, [[row[name] for name in self._names] for row in rows])
        if cursor.rowcount != len(rows):
            raise tampered(
                "the database was changed while the broker was running",
                where="store.database",
                found=f"{cursor.rowcount} rows written",
                wanted=f"{len(rows)}",
            )


def _engine(path: Path, begin: str) -> Engine:
    engine = create_engine(
        f"sqlite+pysqlite:///{path}",
        poolclass=NullPool,
        hide_parameters=True,
        connect_args={"check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say so, and lock at once
        with closing(connection.cursor()) as cursor:
            for pragma in _PRAGMAS:
                cursor.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


class Store:
    """The open state folder: `loaded` is what it held when it was opened; `commit` is the only way to change it."""

    def __init__(self, folder: Path, vault: Vault, descriptor: int) -> None:
        self._path = folder / DATABASE
        self._vault = vault
        self._descriptor = descriptor
        self._engines = _engine(self._path, "BEGIN IMMEDIATE"), _engine(self._path, "BEGIN")
        self._writer, self._reader = (engine.connect() for engine in self._engines)
        self._reading, self._writing = threading.Lock(), threading.Lock()
        dialect = self._engines[0].dialect
        self._add_entries = _Statement(insert(LOG_ENTRIES), dialect)
        self._set_head = _Statement(
            update(LOG_HEAD).values(checkpoint=bindparam("note")).where(LOG_HEAD.c.only == 1), dialect
        )
        self._puts = {cls: _Statement(_put_statement(cls), dialect) for cls in ROWS}
        self._touches = {cls: _Statement(_touch_statement(cls), dialect) for cls in ROWS if cls.PAYLOAD}

    @property
    def path(self) -> Path:
        return self._path

    @property
    def vault(self) -> Vault:
        return self._vault

    @classmethod
    def open(cls, folder: Path, master: Secret, *, origin: str = "") -> tuple[Store, Loaded]:
        """Open the state folder, making it if it does not exist; `origin` names a new log (default: made from its key).

        Raises:
            TamperedError: (log-tampered) steps 2 to 6 of the module; all findings of steps 5 and 6 together.
            MachineError: (busy) another broker uses the folder; (disk-full, machine) it cannot be used.
            ValueError: `origin` cannot name a log, or `master` is not 32 bytes.
        """
        if len(master) != 32:
            raise ValueError(f"master of {len(master)} bytes, wanted 32")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = _lock(folder)
        except OSError as error:
            raise MachineError(f"cannot use the state folder {folder}: {error.strerror}") from error
        try:
            _prepare(folder)
            with _translated(folder / DATABASE, "opening it"):
                store = cls(folder, Vault(master), descriptor)
                try:
                    return store, store._load(origin)
                except BaseException:
                    store._disconnect()
                    raise
        except BaseException:
            os.close(descriptor)
            raise

    def _disconnect(self) -> None:
        self._writer.close()
        self._reader.close()
        for engine in self._engines:
            engine.dispose()

    def close(self) -> None:
        """Close the database and give the lock back."""
        with self._reading, self._writing:
            self._disconnect()
        os.close(self._descriptor)

    # --- opening ------------------------------------------------------------------------------------------------------

    def _load(self, origin: str) -> Loaded:
        connection = self._writer
        with connection.begin():
            version = connection.execute(text("PRAGMA user_version")).scalar_one()
            empty = connection.execute(text("SELECT count(*) FROM sqlite_master")).scalar_one() == 0
            if version == 0 and empty:
                self._create(connection, origin)
            elif version != FORMAT:
                raise tampered(
                    f"{self._path.name} has format {version}",
                    where="store.format",
                    found=str(version),
                    wanted=str(FORMAT),
                    hint="a newer version of Cloister wrote it, or it was changed",
                )
            else:
                self._check_database(connection)
            signer, note, checkpoint = self._head(connection)
            tree, fold = self._entries(connection, checkpoint)
            payloads = self._tables(connection, fold)
        return Loaded(signer, note, tree, fold, payloads)

    def _check_database(self, connection: Connection) -> None:
        """Step 2."""
        damage = connection.execute(text("PRAGMA integrity_check(3)")).scalars().all()
        if damage != ["ok"]:
            raise tampered(
                f"{self._path.name} is damaged or was changed: {damage[0]}",
                where="store.database",
                found="; ".join(map(str, damage)),
                wanted="an intact database",
                hint="restore the state folder from a replica or a backup",
            )
        objects = connection.execute(
            text("SELECT type, name FROM sqlite_schema WHERE name NOT LIKE 'sqlite!_%' ESCAPE '!'")
        )
        found, wanted = {tuple(row) for row in objects}, {("table", name) for name in METADATA.tables}
        if found != wanted:
            raise tampered(
                f"{self._path.name} has other tables than this broker made",
                where="store.database",
                found=", ".join(sorted(f"{kind} {name}" for kind, name in found - wanted)) or "all of ours",
                wanted=", ".join(sorted(name for _, name in wanted - found)) or "nothing else: no trigger, no view",
            )

    def _create(self, connection: Connection, origin: str) -> None:
        seed = Secret.random()
        name = origin or f"cloister.invalid/{Signer('new', seed).verifier.public.hex()[:16]}"
        signer = Signer(name, seed)
        METADATA.create_all(connection)
        connection.execute(text(f"PRAGMA user_version={FORMAT}"))
        connection.execute(
            insert(LOG_HEAD),
            {
                "only": 1,
                "origin": name,
                "log_key": str(signer.verifier),
                "checkpoint": sign(Checkpoint(name, 0, EMPTY_ROOT), signer),
                "sealed_seed": self._vault.seal("broker", seed.reveal(), _head_context(str(signer.verifier))),
            },
        )

    def _head(self, connection: Connection) -> tuple[Signer, bytes, Checkpoint]:
        """Step 3."""
        rows = connection.execute(select(LOG_HEAD)).all()
        if len(rows) != 1:
            raise tampered("the log has no head", where="store.log_head", found=f"{len(rows)} rows", wanted="1 row")
        head = rows[0]
        try:
            seed = Secret(self._vault.open("broker", head.sealed_seed, _head_context(head.log_key)))
            signer = Signer(head.origin, seed)
            wanted = Verifier.parse(head.log_key)
        except (UnwrapError, NoteError, ValueError) as error:
            raise tampered(
                "the log's key does not open: another master key, or the row was changed",
                where="store.log_head",
                found=str(error),
                wanted="the key that this broker sealed",
                hint="the master key must be the one this state folder was made under",
            ) from error
        if signer.verifier != wanted:
            raise tampered(
                "the log's name was changed", where="store.log_head", found=str(wanted), wanted=str(signer.verifier)
            )
        return signer, head.checkpoint, open_checkpoint(head.checkpoint, signer.verifier).checkpoint

    def _entries(self, connection: Connection, checkpoint: Checkpoint) -> tuple[Tree, Fold]:
        """Step 4, and the fold."""
        tree = Tree()
        bodies: list[bytes] = []
        rows = connection.execute(select(LOG_ENTRIES.c.entry, LOG_ENTRIES.c.body).order_by(LOG_ENTRIES.c.entry))
        for index, body in rows:
            if index != tree.size:
                raise tampered(
                    f"log entry {tree.size} is missing",
                    where="store.log_entries",
                    found=f"entry {index} after {tree.size - 1}",
                    wanted=f"entry {tree.size}",
                )
            tree.append(leaf_hash(body))
            bodies.append(body)
        if tree.size != checkpoint.size:
            raise tampered(
                f"the log holds {tree.size} entries, its signed head says {checkpoint.size}",
                where="store.log_entries",
                found=f"{tree.size} entries",
                wanted=f"{checkpoint.size} entries",
            )
        if tree.root() != checkpoint.root:
            raise tampered(
                "a log entry was changed: the entries do not have the root of the signed head",
                where="store.log_entries",
                found=f"root {tree.root().hex()}",
                wanted=f"root {checkpoint.root.hex()}",
            )
        fold = Fold()
        for body in bodies:
            fold.apply(leaves.parse_own(body))
        return tree, fold

    def _tables(self, connection: Connection, fold: Fold) -> dict[tuple[type[Row], Key], bytes]:
        """Steps 5 and 6: all findings together."""
        reasons: list[Reason] = []
        payloads: dict[tuple[type[Row], Key], bytes] = {}
        for cls in ROWS:
            found = connection.execute(select(TABLES[cls])).mappings().all()
            reasons += self._compare(cls, found, fold.rows[cls], payloads, fold)
        if reasons:
            raise TamperedError(
                f"the tables are not what the log says: {reasons[0]}"
                + (f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""),
                code="log-tampered",
                reasons=reasons[:100],
                hint="somebody changed the database; restore the state folder from a replica or a backup",
            )
        return payloads

    def _compare(
        self,
        cls: type[Row],
        found: Iterable[RowMapping],
        wanted: dict[Key, Row],
        payloads: dict[tuple[type[Row], Key], bytes],
        fold: Fold,
    ) -> Iterator[Reason]:
        seen: set[Key] = set()
        for columns in found:
            try:
                row = from_columns(cls, columns)
            except ValueError as error:
                yield Reason(f"store.{cls.TABLE}", str(error), "values that the log folds to")
                continue
            seen.add(row.key)
            where = f"store.{cls.TABLE}[{', '.join(map(str, row.key))}]"
            expected = wanted.get(row.key)
            if expected is None:
                yield Reason(where, "a row", "no such row: no log entry made it")
            elif expected != row:
                differ = [
                    name for name in columns if name != cls.PAYLOAD and getattr(row, name) != getattr(expected, name)
                ]
                yield Reason(
                    where,
                    ", ".join(f"{name} {getattr(row, name)}" for name in differ),
                    ", ".join(f"{name} {getattr(expected, name)}" for name in differ),
                )
            elif cls.PAYLOAD:
                wrong = check_payload(self._vault, row, columns[cls.PAYLOAD])
                if wrong:
                    yield Reason(f"{where}.{cls.PAYLOAD}", wrong, "the bytes that were stored")
                payloads[cls, row.key] = columns[cls.PAYLOAD]
        for key in [key for key in wanted if key not in seen]:
            if forgettable(wanted[key], fold.latest):
                del wanted[key]
            else:
                yield Reason(f"store.{cls.TABLE}[{', '.join(map(str, key))}]", "no row", "the row that the log made")

    # --- running ------------------------------------------------------------------------------------------------------

    def commit(self, first: int, bodies: Sequence[bytes], puts: Sequence[Put], checkpoint: bytes) -> None:
        """Write log entries `first`.. and the rows they made, set the signed head; durable when it returns.

        Raises:
            MachineError: (disk-full, machine) nothing was written.
            TamperedError: (log-tampered) the database was changed underneath.
        """
        connection = self._writer
        with (
            self._writing,
            _translated(self._path, "writing"),
            connection.begin(),
            closing(connection.connection.cursor()) as cursor,
        ):
            self._add_entries.run(cursor, [{"entry": first + at, "body": body} for at, body in enumerate(bodies)])
            for statement, rows in self._grouped(puts):
                statement.run(cursor, rows)
            self._set_head.run(cursor, [{"note": checkpoint, "only_1": 1}])

    def _grouped(self, puts: Sequence[Put]) -> Iterator[tuple[_Statement, list[dict[str, Any]]]]:
        """Yield each statement once, with all rows that go through it."""
        groups: dict[_Statement, list[dict[str, Any]]] = {}
        for put in puts:
            cls = type(put.row)
            values = to_columns(put.row)
            if cls.PAYLOAD and put.payload is None:
                statement, values = self._touches[cls], {f"_{name}": value for name, value in values.items()}
            else:
                statement = self._puts[cls]
                if cls.PAYLOAD:
                    values[cls.PAYLOAD] = put.payload
            groups.setdefault(statement, []).append(values)
        yield from groups.items()

    def size_on_disk(self) -> int:
        """Return the number of entries that are in the database."""
        with self._writing, _translated(self._path, "reading"), self._writer.begin():
            last = self._writer.execute(
                select(LOG_ENTRIES.c.entry).order_by(LOG_ENTRIES.c.entry.desc()).limit(1)
            ).scalar_one_or_none()
        return 0 if last is None else int(last) + 1

    def bodies(self, start: int, end: int) -> list[bytes]:
        """Return the bodies of entries `start` to `end` - 1; the caller checks them against its tree."""
        query = (
            select(LOG_ENTRIES.c.body)
            .where(LOG_ENTRIES.c.entry >= start, LOG_ENTRIES.c.entry < end)
            .order_by(LOG_ENTRIES.c.entry)
        )
        with self._reading, _translated(self._path, "reading"), self._reader.begin():
            return list(self._reader.execute(query).scalars())

    def forget_leases(self, keys: Sequence[str]) -> None:
        """Delete the rows of these leases, secrets included."""
        table = TABLES[LeaseRow]
        with self._writing, _translated(self._path, "writing"), self._writer.begin():
            self._writer.execute(
                delete(table).where(table.c.lease == bindparam("_lease")), [{"_lease": k} for k in keys]
            )

    def kept_secret(self, name: str, make: Callable[[], Secret]) -> Secret:
        """Return the secret kept under `name`; the first time, keep what `make` returns.

        These are not in the log: who runs the machine can delete one (a new one is made) or bring an old one back.

        Raises:
            TamperedError: (log-tampered) it does not open.
        """
        context = json_encode(["cloister/store/1", "kept_secrets", name])
        with self._writing, _translated(self._path, "reading"), self._writer.begin():
            sealed = self._writer.execute(
                select(KEPT_SECRETS.c.sealed).where(KEPT_SECRETS.c.name == name)
            ).scalar_one_or_none()
            if sealed is None:
                secret = make()
                self._writer.execute(
                    insert(KEPT_SECRETS),
                    {"name": name, "sealed": self._vault.seal("broker", secret.reveal(), context)},
                )
                return secret
        try:
            return Secret(self._vault.open("broker", sealed, context))
        except UnwrapError as error:
            raise tampered(
                f"the secret {name!r} does not open",
                where=f"store.kept_secrets[{name}]",
                found="other bytes",
                wanted="what this broker sealed",
            ) from error


def _head_context(log_key: str) -> bytes:
    return json_encode(["cloister/store/1", "log_head", log_key])


def _put_statement(cls: type[Row]) -> Any:
    table = TABLES[cls]
    statement = upsert(table)
    others = {column.name: statement.excluded[column.name] for column in table.columns if not column.primary_key}
    return statement.on_conflict_do_update(index_elements=list(cls.KEY), set_=others)


def _touch_statement(cls: type[Row]) -> Any:
    table = TABLES[cls]
    statement = update(table)
    for name in cls.KEY:
        statement = statement.where(table.c[name] == bindparam(f"_{name}"))
    others = [c.name for c in table.columns if not c.primary_key and c.name != cls.PAYLOAD]
    return statement.values({name: bindparam(f"_{name}") for name in others})
