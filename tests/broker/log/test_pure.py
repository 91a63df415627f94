"""The log judges without files, sockets, clocks, randomness."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cloister.broker.log

ROOM = Path(cloister.broker.log.__file__).parent
EDGES = {
    "os",
    "io",
    "pathlib",
    "socket",
    "ssl",
    "time",
    "secrets",
    "random",
    "subprocess",
    "asyncio",
    "threading",
    "sqlite3",
}


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.py")), ids=lambda path: path.name)
def test_no_module_touches_the_world(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not imported & EDGES
    assert not called & {"now", "utcnow", "today"}
