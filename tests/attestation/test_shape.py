"""The shape of the room: what judges is pure, the testkit is public, new hardware is new files."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import cloister.attestation
from cloister.attestation.appraise import appraise
from cloister.attestation.binding import check_binding
from cloister.attestation.verify import FOLDERS, VERIFIERS
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


def test_every_hardware_folder_is_listed_and_has_its_shape() -> None:
    folders = {path.parent.name for path in ROOM.glob("*/verify.py")}
    assert set(FOLDERS.values()) == folders
    assert set(VERIFIERS) == set(FOLDERS)
    for kind, folder in FOLDERS.items():
        module = importlib.import_module(f"cloister.attestation.{folder}.verify")
        assert kind == module.KIND
        assert VERIFIERS[kind] is module.verify
        steps = list(module.STEPS)
        assert [name.split(".")[0] for name in steps] == [kind] * len(steps), "a step begins with its kind"
        assert [int(name.split(".")[1].split("-")[0]) for name in steps] == list(range(1, len(steps) + 1))
        assert all(module.STEPS[name].strip() for name in steps)
        documented = re.findall(r"^ +(\d+) ", module.__doc__ or "", re.MULTILINE)
        assert [int(number) for number in documented] == list(range(1, len(steps) + 1)), (
            f"{kind}: the docstring has every step"
        )


def test_a_verifier_is_loaded_with_the_first_evidence_of_its_kind_and_no_network() -> None:
    # the socket module itself is there: `cryptography.x509` uses email.utils, which imports it
    code = (
        "import sys; from cloister.attestation.verify import VERIFIERS; before = set(sys.modules);"
        "assert not {f'cloister.attestation.{n}.verify' for n in ('snp', 'tpm', 'nvidia', 'tdx')} & before;"
        "[VERIFIERS[kind] for kind in VERIFIERS]; import cloister.attestation.files, cloister.attestation.ratls;"
        "bad = {'ssl', '_ssl', 'http.client', 'urllib.request', 'requests', 'asyncio', 'ftplib', 'smtplib'} & set(sys.modules);"
        "print(sorted(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


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


def test_what_ends_first_ends_the_whole() -> None:
    """The answer about a GPU lives for a day, a CPU's collateral for weeks: the claims of both end with the day."""
    alone, beside = softtee.SoftPlatform(kind="tdx").claims(), softtee.SoftPlatform(kind="tdx", gpus=("one",)).claims()
    ends = [device.valid_until for device in beside.devices]
    assert alone.valid_until is not None
    assert ends == [beside.valid_until]
    assert beside.valid_until is not None
    assert beside.valid_until < alone.valid_until
