"""Whoever runs the machine edits the database: every edit is found at the next start, and named."""

from __future__ import annotations

import dataclasses
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from cloister.broker.log.fold import ROWS
from cloister.broker.store.database import DATABASE
from cloister.broker.store.ledger import Ledger
from cloister.crypto.keys import Secret, digest
from cloister.errors import MachineError, TamperedError
from tests.broker.store.life import HOSPITAL, MASTER, NOW, ORIGIN, VENDOR, answer, live, release


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with a row in every table, closed."""
    folder = tmp_path_factory.mktemp("lived") / "state"
    with Ledger.open(folder, MASTER, origin=ORIGIN) as ledger:
        live(ledger)
        release(ledger, "l-" + "2" * 32)
        ledger.deposit_key(
            digest(b"other"), VENDOR, Secret(b"z" * 32), volume_id=b"w" * 16, generation=3, now=NOW
        ).result(30)
    return folder


@pytest.fixture
def copy(lived: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lived, tmp_path / "state"))


def edit(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / DATABASE)) as connection, connection:
        for statement in statements:
            assert connection.execute(statement).rowcount != 0, statement


def refused(folder: Path, *, master: Secret = MASTER) -> TamperedError:
    with pytest.raises(TamperedError) as error:
        Ledger.open(folder, master)
    assert error.value.code == "log-tampered"
    assert error.value.reasons
    with pytest.raises(TamperedError):  # the lock was given back, the state is as bad as before
        Ledger.open(folder, master)
    return error.value


def test_an_untouched_copy_opens(copy: Path) -> None:
    Ledger.open(copy, MASTER).close()


COLUMNS = [
    (cls.TABLE, name)
    for cls in ROWS
    for name in (*(field.name for field in dataclasses.fields(cls)), *([cls.PAYLOAD] if cls.PAYLOAD else []))
]


@pytest.mark.parametrize(("table", "column"), COLUMNS, ids=[f"{table}.{column}" for table, column in COLUMNS])
def test_a_changed_column_is_found(copy: Path, table: str, column: str) -> None:
    with closing(sqlite3.connect(copy / DATABASE)) as connection, connection:
        (value,) = connection.execute(f"SELECT {column} FROM {table} LIMIT 1").fetchone()
        other = {int: lambda: value + 1, str: lambda: value + "x", bytes: lambda: value[:-1] + bytes([value[-1] ^ 1])}
        changed = other[type(value)]()
        connection.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (changed, value))
    assert any(f"store.{table}" in reason.where for reason in refused(copy).reasons)


@pytest.mark.parametrize("table", [cls.TABLE for cls in ROWS])
def test_a_deleted_row_is_found(copy: Path, table: str) -> None:
    edit(copy, f"DELETE FROM {table}")
    assert all(reason.where.startswith(f"store.{table}") for reason in refused(copy).reasons)


@pytest.mark.parametrize("table", [cls.TABLE for cls in ROWS])
def test_an_added_row_is_found(copy: Path, table: str) -> None:
    with closing(sqlite3.connect(copy / DATABASE)) as connection, connection:
        row = list(connection.execute(f"SELECT * FROM {table} LIMIT 1").fetchone())
        row[0] = row[0] + 100 if isinstance(row[0], int) else row[0] + "x"
        connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)
    error = refused(copy)
    assert "no such row" in error.reasons[0].wanted


EDITS: dict[str, tuple[list[str], str]] = {
    "the last entry is taken away": (
        ["DELETE FROM log_entries WHERE entry = (SELECT max(entry) FROM log_entries)"],
        "entries, its signed head says",
    ),
    "an entry in the middle is taken away": (["DELETE FROM log_entries WHERE entry = 4"], "entry 4 is missing"),
    "all entries are taken away": (["DELETE FROM log_entries"], "the log holds 0 entries"),
    "an entry is added": (
        ["INSERT INTO log_entries SELECT max(entry) + 1, body FROM log_entries"],
        "entries, its signed head says",
    ),
    "an entry is edited": (
        ["UPDATE log_entries SET body = CAST(replace(CAST(body AS TEXT), 'trainer', 'evil') AS BLOB) WHERE entry >= 0"],
        "a log entry was changed",
    ),
    "two entries are exchanged": (
        [
            "UPDATE log_entries SET entry = -1 WHERE entry = 3",
            "UPDATE log_entries SET entry = 3 WHERE entry = 4",
            "UPDATE log_entries SET entry = 4 WHERE entry = -1",
        ],
        "a log entry was changed",
    ),
    "the head is edited": (
        ["UPDATE log_head SET checkpoint = CAST(replace(CAST(checkpoint AS TEXT), char(10), 'x') AS BLOB)"],
        "not authentic",
    ),
    "the head is taken away": (["DELETE FROM log_head"], "no head"),
    "the log's key is exchanged": (
        ["UPDATE log_head SET sealed_seed = (SELECT sealed_key FROM deposited_keys LIMIT 1)"],
        "key does not open",
    ),
    "the log's name is changed": (["UPDATE log_head SET origin = 'other.example'"], "name was changed"),
    "the log's public key is changed": (["UPDATE log_head SET log_key = log_key || 'x'"], "key does not open"),
    "the format is changed": (["PRAGMA user_version = 2"], "format 2"),
    "a table is dropped": (["DROP TABLE leases"], "other tables"),
    "a table is added": (["CREATE TABLE spare (x)"], "other tables"),
    "a trigger is added": (
        ["CREATE TRIGGER generous AFTER UPDATE ON answer_counts BEGIN UPDATE answer_counts SET used = 0; END"],
        "other tables",
    ),
    "a view is added": (["CREATE VIEW leak AS SELECT * FROM leases"], "other tables"),
    "a column is renamed": (["ALTER TABLE leases RENAME COLUMN phase TO stage"], "damaged or was changed"),
    "a key is moved to another owner": (
        [
            f"UPDATE deposited_keys SET sealed_key = (SELECT sealed_key FROM deposited_keys WHERE owner = '{HOSPITAL}')",
        ],
        "does not open under this row",
    ),
    "a lease gets another lease's secrets": (
        [
            "UPDATE leases SET sealed_secrets = (SELECT sealed_secrets FROM leases WHERE lease LIKE 'l-1%')",
        ],
        "does not open under this row",
    ),
    "a spent budget is given back": (["UPDATE answer_counts SET used = 0, used_that_day = 0"], "used 0"),
    "an old volume is made current": (
        [f"UPDATE asset_roots SET volume = '{digest(b'older')}'"],
        digest(b"older"),
    ),
    "a lost lease comes back": (["UPDATE leases SET lost = 1 WHERE lease LIKE 'l-1%'"], "lost True"),
    "a value of another kind": (["UPDATE leases SET lost = 7 WHERE lease LIKE 'l-1%'"], "KeyError"),
    "a time that is none": (["UPDATE leases SET expires = 'never' WHERE lease LIKE 'l-1%'"], "not a UTC time"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_refused_and_named(copy: Path, name: str) -> None:
    statements, word = EDITS[name]
    before = (copy / DATABASE).read_bytes()
    with closing(sqlite3.connect(copy / DATABASE, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)
    if (copy / DATABASE).read_bytes() == before and not (copy / f"{DATABASE}-wal").exists():
        pytest.fail("the edit changed nothing")
    error = refused(copy)
    assert word in f"{error} {[str(reason) for reason in error.reasons]}"


def test_a_key_of_an_earlier_deposit_cannot_come_back(copy: Path) -> None:
    with Ledger.open(copy, MASTER) as ledger:
        with closing(sqlite3.connect(copy / DATABASE)) as connection:
            (old,) = connection.execute("SELECT sealed_key FROM deposited_keys WHERE owner = ?", (VENDOR,)).fetchone()
        ledger.deposit_key(
            digest(b"other"), VENDOR, Secret(b"n" * 32), volume_id=b"w" * 16, generation=3, now=NOW
        ).result(30)
    with closing(sqlite3.connect(copy / DATABASE)) as connection, connection:
        connection.execute("UPDATE deposited_keys SET sealed_key = ? WHERE owner = ?", (old, VENDOR))
    assert "does not open" in str(refused(copy))


def test_another_master_key_opens_nothing(copy: Path) -> None:
    assert "master key" in refused(copy, master=Secret(b"X" * 32)).hint


def test_a_kept_secret_that_was_changed_does_not_open(copy: Path) -> None:
    with Ledger.open(copy, MASTER) as ledger:
        ledger.kept_secret("tls", Secret.random)
        ledger.kept_secret("hpke", Secret.random)
    edit(copy, "UPDATE kept_secrets SET sealed = (SELECT sealed FROM kept_secrets WHERE name = 'hpke')")
    with Ledger.open(copy, MASTER) as ledger:
        ledger.kept_secret("hpke", Secret.random)
        with pytest.raises(TamperedError, match="'tls' does not open"):
            ledger.kept_secret("tls", Secret.random)


def test_all_findings_are_reported_together(copy: Path) -> None:
    edit(copy, "UPDATE answer_counts SET used = 0", "DELETE FROM denials", "UPDATE contracts SET state = 'waiting'")
    wheres = {reason.where.split("[")[0] for reason in refused(copy).reasons}
    assert wheres == {"store.answer_counts", "store.denials", "store.contracts"}


def test_an_edit_while_the_broker_runs_is_not_believed(copy: Path) -> None:
    with Ledger.open(copy, MASTER) as ledger:
        edit(copy, "UPDATE answer_counts SET used = 0, used_that_day = 0")
        assert answer(ledger, 50).leaf.used == 2  # type: ignore[attr-defined]
        edit(copy, "UPDATE log_entries SET body = x'00' WHERE entry = 2")
        with pytest.raises(TamperedError, match="not what was logged"):
            ledger.leaf(2)
        edit(copy, "DELETE FROM leases WHERE lease LIKE 'l-1%'")
        with pytest.raises(TamperedError, match="while the broker was running"):
            ledger.lose_lease("l-" + "1" * 32, [], now=NOW).result(30)
        with pytest.raises(TamperedError):
            answer(ledger, 51)


@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_a_truncated_file_is_refused_with_an_explanation(copy: Path, where: str) -> None:
    path = copy / DATABASE
    data = path.read_bytes()
    path.write_bytes(data[: {"start": 100, "middle": len(data) // 2, "end": len(data) - 1}[where]])
    assert any(word in str(refused(copy)) for word in ("damaged", "was changed"))


def test_corrupted_bytes_are_refused_or_harmless(copy: Path, lived: Path) -> None:
    """Whatever byte changes: the log opens with exactly what it held, or is refused in our own words."""
    chance = random.Random(7)
    data = (lived / DATABASE).read_bytes()
    with Ledger.open(lived, MASTER) as ledger:
        wanted = ledger.root(), ledger.size
    outcomes: list[str] = []
    for _ in range(60):
        wrong = bytearray(data)
        for _ in range(4):
            wrong[chance.randrange(len(wrong))] ^= 1 << chance.randrange(8)
        for leftover in ("-wal", "-shm"):
            (copy / f"{DATABASE}{leftover}").unlink(missing_ok=True)
        (copy / DATABASE).write_bytes(wrong)
        try:
            with Ledger.open(copy, MASTER) as ledger:
                assert (ledger.root(), ledger.size) == wanted
            outcomes.append("harmless")
        except TamperedError as error:
            outcomes.append("refused" if error.reasons else "refused without a reason")
        except MachineError as error:
            outcomes.append("unusable" if error.reasons else "unusable without a reason")
    assert outcomes.count("refused") > 10
    assert set(outcomes) <= {"harmless", "refused", "unusable"}


def outcome(action: Callable[[], object]) -> str:
    try:
        action()
    except TamperedError as error:
        return str(error)
    return "opened"


def test_an_old_copy_of_everything_opens_because_only_a_witness_can_know(copy: Path, lived: Path) -> None:
    with Ledger.open(copy, MASTER) as ledger:
        answer(ledger, 60)
    assert outcome(lambda: Ledger.open(lived, MASTER).close()) == "opened"
