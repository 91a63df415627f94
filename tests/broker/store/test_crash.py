"""Killed brokers, full disks, broken commits: what was acknowledged is there, what was not changed nothing."""

from __future__ import annotations

import os
import random
import resource
import select
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from cloister.broker.log.audit import audit
from cloister.broker.log.receipt import parse_receipt
from cloister.broker.store.database import Store
from cloister.broker.store.ledger import Ledger
from cloister.errors import MachineError
from tests.broker.store.life import CONTRACT, MASTER, NOW, ORIGIN, activate, answer

ROOT = Path(__file__).resolve().parents[3]

# Appends as fast as it can; writes a line for each acknowledged entry, to a pipe that the parent keeps.
WRITER = """
import sys
from pathlib import Path
from cloister.broker.store.ledger import Ledger
from tests.broker.store.life import CONTRACT, MASTER, NOW

ledger = Ledger.open(Path(sys.argv[1]), MASTER)
waiting = []
number = ledger.size
while True:
    for _ in range(8):
        number += 1
        waiting.append(ledger.answer(contract=CONTRACT, phase="serve", party="p", budget=None, per_day=None,
                                     now=NOW, denial=f"d-{number}"))
    for pending in waiting:
        result = pending.result(30)
        sys.stdout.write(f"{result.index} {result.spent.used} {result.receipt.encode().hex()}\\n")
    sys.stdout.flush()
    waiting.clear()
"""


@pytest.mark.slow
def test_kill_9_loses_no_acknowledged_entry(folder: Path) -> None:
    with Ledger.open(folder, MASTER, origin=ORIGIN) as ledger:
        activate(ledger)
        known = ledger.signed_checkpoint().checkpoint
    chance = random.Random(20261120)
    acknowledged: dict[int, tuple[int, bytes]] = {}
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": "src"},
        )
        assert child.stdout is not None
        assert select.select([child.stdout], [], [], 30)[0], "the writer never began"
        time.sleep(chance.uniform(0, 0.08))
        child.send_signal(signal.SIGKILL)
        out, _ = child.communicate(timeout=30)
        for line in out[: out.rfind(b"\n") + 1].splitlines():
            index, used, receipt = line.split()
            acknowledged[int(index)] = int(used), bytes.fromhex(receipt.decode())
        with Ledger.open(folder, MASTER) as ledger:
            assert ledger.size > max(acknowledged)
            bodies = ledger.entries(0, ledger.size)
            receipts = [parse_receipt(receipt) for _, receipt in acknowledged.values()]
            report = audit(bodies, ledger.checkpoint(), ledger.log_key, remembered=known, receipts=receipts)
            known = report.checkpoint
            spent = ledger.answers_spent(CONTRACT, "serve", "p", now=NOW).used
            assert spent == report.counts["answer"]
            assert spent >= max(used for used, _ in acknowledged.values())
    assert len(acknowledged) >= 6  # each writer was heard at least once


def fill(ledger: Ledger) -> tuple[int, MachineError]:
    """Append until it is refused; return how many went in."""
    toml, done = b"# " + b"x" * 20_000 + b"\n", 0
    while True:
        try:
            ledger.submit_contract(toml + b"%d" % done, name="filler", version=1, replaces="", now=NOW).result(30)
            done += 1
        except MachineError as error:
            return done, error


def test_a_full_disk_refuses_appends_and_changes_nothing(folder: Path) -> None:
    with Ledger.open(folder, MASTER) as ledger:
        activate(ledger)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, hard))
        try:
            before = ledger.size
            done, error = fill(ledger)
            assert error.code == "disk-full"
            assert done > 3
            assert ledger.size == before + done
            assert ledger.checkpoint() == ledger.signed_checkpoint().data
            spent = ledger.answers_spent(CONTRACT, "serve", "clinic", now=NOW)
            for number in range(3):
                with pytest.raises(MachineError):
                    ledger.submit_contract(
                        b"y" * 50_000 + b"%d" % number, name="filler", version=1, replaces="", now=NOW
                    ).result(30)
            assert ledger.size == before + done
            assert ledger.answers_spent(CONTRACT, "serve", "clinic", now=NOW) == spent
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        after = answer(ledger, 1)
        assert after.index == before + done
    with Ledger.open(folder, MASTER) as ledger:
        assert ledger.size == after.index + 1
        assert len(ledger.contracts()) == 1 + done


@pytest.mark.root
def test_a_full_file_system_refuses_appends_and_changes_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs root to mount a small tmpfs")
    try:
        with Ledger.open(small / "state", MASTER) as ledger:
            activate(ledger)
            before = ledger.size
            done, error = fill(ledger)
            assert (error.code, ledger.size) == ("disk-full", before + done)
        with Ledger.open(small / "state", MASTER) as ledger:
            assert ledger.size == before + done
    finally:
        subprocess.run(["umount", str(small)], check=True)


def failing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the next commit fail with SQLite's error `number`."""
    original = sqlite3.OperationalError("made up")
    original.sqlite_errorcode = number
    commit = Store._grouped
    calls: list[int] = []

    def broken(self: Store, *args: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise OperationalError("COMMIT", None, original)
        return commit(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "_grouped", broken)


def test_no_room_is_passing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    activate(ledger)
    failing(monkeypatch, sqlite3.SQLITE_FULL)
    before, root = ledger.size, ledger.root()
    with pytest.raises(MachineError) as full:
        answer(ledger, 1)
    assert full.value.code == "disk-full"
    assert (ledger.size, ledger.root()) == (before, root)
    assert answer(ledger, 2).index == before


@pytest.mark.parametrize("number", [sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR])
def test_an_unknown_outcome_halts_until_the_next_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with Ledger.open(folder, MASTER) as ledger:
        activate(ledger)
        before = ledger.size
        failing(monkeypatch, number)
        for _ in range(3):
            with pytest.raises(MachineError, match="made up"):
                answer(ledger, 1)
        assert ledger.size == before
    with Ledger.open(folder, MASTER) as ledger:
        assert answer(ledger, 2).index == before


def test_a_folder_that_cannot_be_used_is_a_machine_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MachineError, match="cannot use"):
        Ledger.open(tmp_path / "file", MASTER)
