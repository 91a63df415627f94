"""The deciding modules of the room touch no file, clock, socket or randomness: they import none."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cloister.volume.types

ROOM = Path(cloister.volume.types.__file__).parent
ALLOWED = {
    "__future__", "array", "bisect", "collections.abc", "dataclasses", "enum", "hashlib", "itertools", "struct", "sys", "typing",
    "unicodedata", "blake3", "cryptography.exceptions", "cryptography.hazmat.primitives.asymmetric.ed25519",
    "cryptography.hazmat.primitives.ciphers.aead", "cloister.crypto.keys", "cloister.errors", "cloister.volume",
    "cloister.volume.types",
}  # fmt: skip


@pytest.mark.parametrize("module", ["types", "layout", "names", "format", "keys"])
def test_a_pure_module_imports_nothing_that_acts(module: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse((ROOM / f"{module}.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
            if node.module == "cloister.volume":
                assert {alias.name for alias in node.names} <= {"types", "layout", "names", "format", "keys"}
    assert imported <= ALLOWED


def test_the_room_imports_only_from_the_floors_below() -> None:
    for path in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cloister."):
                assert (node.module or "").split(".")[1] in {"errors", "crypto", "volume"}, path.name
