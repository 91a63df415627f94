"""The shape of the room: what judges is pure, the testkit is public, new hardware is new files."""

from __future__ import annotations

import ast
from datetime import timedelta
from pathlib import Path

import cloister.attestation
from cloister.attestation.appraise import appraise
from cloister.attestation.binding import check_binding
from cloister.attestation.verify import VERIFIERS
from cloister.testkit import softtee

ROOM = Path(cloister.attestation.__file__).parent
CORE = sorted(path for path in ROOM.rglob("*.py") if "edge" not in path.relative_to(ROOM).parts)
FORBIDDEN = {
    "asyncio", "ctypes", "http", "logging", "multiprocessing", "os", "pathlib", "random", "secrets", "select", "shutil",
    "signal", "socket", "ssl", "subprocess", "sys", "tempfile", "threading", "time", "urllib", "uuid",
}  # fmt: skip
CLOCKS = {"now", "today", "utcnow"}


def _imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_the_core_imports_no_file_socket_clock_or_randomness() -> None:
    assert len(CORE) > 10
    for path in CORE:
        tree = ast.parse(path.read_text())
        imports = _imports(tree)
        assert {name.split(".")[0] for name in imports} & FORBIDDEN == set(), path
        assert not any("attestation.edge" in name or "testkit" in name for name in imports), path
        calls = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not any(isinstance(call, ast.Name) and call.id == "open" for call in calls), path
        assert not any(isinstance(call, ast.Attribute) and call.attr in CLOCKS for call in calls), path


def test_the_room_imports_only_from_below() -> None:
    allowed = ("cloister.attestation", "cloister.crypto", "cloister.errors")
    for path in ROOM.rglob("*.py"):
        for name in _imports(ast.parse(path.read_text())):
            assert not name.startswith("cloister.") or name.startswith(allowed), (path, name)


def test_every_hardware_folder_is_found() -> None:
    folders = {path.parent.name for path in ROOM.glob("*/verify.py")}
    assert {module.__module__.split(".")[-2] for module in VERIFIERS.values()} == folders
    assert "tdx" in VERIFIERS


def test_the_testkit_says_what_is_public() -> None:
    assert softtee.__all__ == sorted(softtee.__all__, key=lambda name: (not name.isupper(), name))
    for name in softtee.__all__:
        assert hasattr(softtee, name)


def test_soft_claims_are_those_of_a_verified_platform() -> None:
    platform = softtee.SoftPlatform().run(softtee.workload())
    assert softtee.soft_claims() == platform.claims()
    assert appraise(softtee.soft_claims(), softtee.soft_policy()) == ()
    assert check_binding(softtee.soft_claims(), softtee.binding()) == ()


def test_soft_platforms_move_with_their_clock() -> None:
    later = softtee.NOW + timedelta(days=400)
    assert softtee.SoftPlatform(now=later).claims().tcb_status == "UpToDate"
