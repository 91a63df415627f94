"""Rollback of collateral: whoever runs the broker puts back what was true yesterday, and gets two numbers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cloister.attestation.collateral import marks
from cloister.attestation.edge.attester import SoftTdxAttester
from cloister.attestation.edge.sealing import SoftSealer
from cloister.attestation.edge.store import Store
from cloister.attestation.endorsements import Endorsement
from cloister.attestation.roots import Roots
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.soft import tdx as soft_tdx
from cloister.broker.client import own_measurement
from cloister.broker.collateral import EVERY_S, Collateral
from cloister.broker.main import PLATFORM, serve
from cloister.broker.store.ledger import Ledger
from cloister.crypto.keys import Secret
from cloister.errors import EvidenceError, InputError, TamperedError
from cloister.testkit.broker import running_broker

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
DAY = timedelta(days=1)
MASTER = Secret(b"M" * 32)
SOFT = Roots(soft=True)


def tdx(issued: datetime = NOW - DAY, **options: Any) -> bytes:
    return soft_tdx.collateral(issued, **options)


class Broker:
    """The part of a broker that minds collateral, with a clock that a test winds."""

    def __init__(self, ledger: Ledger, *paths: Path, roots: Roots = SOFT) -> None:
        self.said: list[str] = []
        self.seconds = 0.0
        self.ledger = ledger
        self.minds = Collateral(paths, ledger, roots, now=NOW, say=self.said.append, monotonic=lambda: self.seconds)

    def later(self, kind: str = "tdx") -> bytes | None:
        self.seconds += EVERY_S
        items = [item.data for item in self.minds.at(NOW).items if item.kind == kind]
        return items[0] if items else None


@contextmanager
def broker(state: Path, *paths: Path, roots: Roots = SOFT) -> Iterator[Broker]:
    with Ledger.open(state, MASTER, origin="broker.example/log") as ledger:
        yield Broker(ledger, *paths, roots=roots)


def write(path: Path, data: bytes) -> None:
    """Replace as an editor does, so that the inode changes even within one tick of the clock."""
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)


def test_rollback_of_collateral_before_a_restart_is_refused_and_the_newer_stays(tmp_path: Path) -> None:
    file = tmp_path / "tdx.json"
    write(file, tdx(evaluation=18))
    with broker(tmp_path / "state", file) as running:
        write(file, tdx(NOW - 2 * DAY, evaluation=17))
        assert running.later() == tdx(evaluation=18)
        (said,) = running.said
        assert "collateral-rolled-back" in said
        assert "found 17" in said
        assert "at least 18" in said
        assert running.later() == tdx(evaluation=18)
        assert len(running.said) == 1  # once for each change, not every five seconds


@pytest.mark.parametrize("kind", ["TCB info", "revocation list"])
def test_rollback_of_collateral_across_a_restart_is_refused_with_found_and_wanted(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "store"

    def put(number: int, issued: datetime) -> None:
        shutil.rmtree(file, ignore_errors=True)  # an old backup of the whole store, its own marks included
        items: tuple[Endorsement, ...]
        if kind == "TCB info":
            items = (Endorsement("tdx", soft_tdx.FMSPC, tdx(issued, evaluation=number)),)
        else:
            items = soft_snp.endorsements(issued, number=number)
        Store(file).add(items, roots=SOFT, now=NOW)

    put(18, NOW - DAY)
    with broker(tmp_path / "state", file):
        pass
    put(17, NOW - 2 * DAY)
    with Ledger.open(tmp_path / "state", MASTER) as ledger:
        size = ledger.size
        with pytest.raises(EvidenceError) as refused:
            Broker(ledger, file)
        assert refused.value.code == "collateral-rolled-back"
        assert ("17", "at least 18") in {(reason.found, reason.wanted) for reason in refused.value.reasons}
        assert ledger.size == size
    put(18, NOW - DAY)
    with broker(tmp_path / "state", file) as again:
        assert again.said == []


def test_the_same_number_issued_earlier_is_a_rollback_too(tmp_path: Path) -> None:
    file = tmp_path / "tdx.json"
    write(file, tdx(NOW - DAY, evaluation=18))
    with broker(tmp_path / "state", file):
        pass
    write(file, tdx(NOW - 2 * DAY, evaluation=18))
    with pytest.raises(EvidenceError) as refused, broker(tmp_path / "state", file):
        pass
    assert all(reason.where.endswith("/time") for reason in refused.value.reasons)


def test_new_collateral_is_noticed_without_a_restart_and_its_numbers_are_in_the_log(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.add([Endorsement("tdx", soft_tdx.FMSPC, tdx(evaluation=17))], roots=SOFT, now=NOW)
    with broker(tmp_path / "state", store.folder) as running:
        first = running.ledger.collateral_marks()
        store.add([Endorsement("tdx", soft_tdx.FMSPC, tdx(NOW, evaluation=18))], roots=SOFT, now=NOW)
        assert [item.data for item in running.minds.at(NOW).items] == [tdx(evaluation=17)]  # not yet time to look
        assert running.later() == tdx(NOW, evaluation=18)
        assert "renewed" in running.said[0]
        running.ledger.begin_epoch(now=NOW).result(
            30
        )  # what is entered later is answered later, so the marks are durable now
        after = running.ledger.collateral_marks()
        assert after == marks.numbers_of_all(store.endorsements(), SOFT, now=NOW)
        assert all(after[name] >= number for name, number in first.items())
        assert [leaf.KIND for leaf in map(running.ledger.leaf, range(running.ledger.size))] == [
            "collateral-marks"
        ] * 2 + ["epoch"]
    with broker(tmp_path / "state", store.folder) as again:
        assert again.ledger.collateral_marks() == after
        assert again.ledger.size == 3  # nothing new, nothing entered


def test_attack_poisoned_mark_forged_collateral_locks_the_broker_out_of_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tdx.json"
    write(file, tdx(evaluation=10**9, label="attacker"))
    with broker(tmp_path / "state", file) as running:
        assert running.ledger.collateral_marks() == {}
        write(file, tdx(evaluation=18))
        assert running.later() == tdx(evaluation=18)
    with broker(tmp_path / "real", file, roots=Roots()) as real:  # a broker that believes no test root
        assert real.ledger.collateral_marks() == {}


def test_collateral_that_is_gone_or_damaged_leaves_the_old_one(tmp_path: Path) -> None:
    store, file = Store(tmp_path / "store"), tmp_path / "snp"
    store.add([Endorsement("tdx", soft_tdx.FMSPC, tdx())], roots=SOFT, now=NOW)
    file.write_bytes(soft_snp.endorsements(NOW - DAY)[0].data)
    with broker(tmp_path / "state", store.folder, file) as running:
        file.unlink()
        assert running.later("sev-snp") is not None
        (store.folder / "index").write_bytes(b"x" * 64)
        assert running.later() == tdx()
        assert len(running.said) == 2
    for path, error in ((file, InputError), (store.folder, TamperedError)):
        with pytest.raises(error), broker(tmp_path / "state", path):
            pass


def test_a_look_costs_one_stat_for_each_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tdx.json"
    write(file, tdx())
    with broker(tmp_path / "state", file) as running:
        calls: list[object] = []
        real = os.stat

        def counted(*args: Any, **rest: Any) -> os.stat_result:
            calls.append(args)
            return real(*args, **rest)

        monkeypatch.setattr(os, "stat", counted)
        for _ in range(1000):
            running.minds.at(NOW)
        assert calls == []
        running.later()
        assert 1 <= len(calls) <= 3


def test_more_numbers_than_one_entry_holds(tmp_path: Path) -> None:
    paths = []
    for number in range(80):
        path = tmp_path / f"{number}.json"
        path.write_bytes(tdx(fmspc=f"{number:012X}"))
        paths.append(path)
    paths.append(tmp_path / "snp")
    with Ledger.open(tmp_path / "state", MASTER, origin="broker.example/log") as ledger:
        found = {f"crl/{number:032x}": number for number in range(300)}
        with pytest.raises(ValueError, match="300 marks"):
            ledger.raise_marks(found, now=NOW)
        for path in paths[:-1]:
            assert path.exists()
        Broker(ledger, *paths[:-1])
        assert len(ledger.collateral_marks()) == 80 * 2 + 2 + 4
        with pytest.raises(ValueError, match="0 marks"):
            ledger.raise_marks({}, now=NOW)


def test_a_mark_is_raised_once_whoever_asks(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "state", MASTER, origin="broker.example/log") as ledger:
        asked = [ledger.raise_marks({"crl/1": number}, now=NOW) for number in (5, 5, 4, 6)]
        assert [each.result(30).new for each in asked] == [True, False, False, True]
        assert ledger.collateral_marks() == {"crl/1": 6}


def test_a_broker_does_not_start_on_collateral_that_was_rolled_back(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    file = tmp_path / "tdx.json"
    write(file, tdx(now - DAY, evaluation=18))
    with running_broker(tmp_path / "broker", process=False) as running:
        running.stop()
        running.config = replace(running.config, collateral=(file,))
        running.start()
        running.stop()
        write(file, tdx(now - 2 * DAY, evaluation=17))
        attester, sealer = (
            SoftTdxAttester(own_measurement()),
            SoftSealer(running.folder / PLATFORM, measurement=own_measurement()),
        )
        with pytest.raises(EvidenceError) as refused:
            serve(
                running.folder, "127.0.0.1", 0, running.config, attester=attester, sealer=sealer, say=lambda line: None
            )
        assert refused.value.code == "collateral-rolled-back"
        write(file, tdx(now - DAY, evaluation=18))
        running.start()
