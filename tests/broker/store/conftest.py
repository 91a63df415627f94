"""A ledger in a fresh folder, and what a broker does with one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.broker.store.ledger import Ledger
from tests.broker.store.life import MASTER, ORIGIN


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def ledger(folder: Path) -> Iterator[Ledger]:
    with Ledger.open(folder, MASTER, origin=ORIGIN) as opened:
        yield opened
