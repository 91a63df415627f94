"""The house stands: a room imports only from rooms below it, and what decides touches nothing.

Floors (DESIGN of the package, `cloister/__init__.py`): errors, crypto -> attestation -> contract, volume -> confine -> broker
-> node -> serve -> cli. Rooms on one floor do not know each other, and nothing that ships imports `testkit`.

Purity: evidence, contracts, releases, formats and wires are judged by functions of their arguments. A pure module imports
only what is listed here; a new import is a decision, so it is a new line with its reason.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

import pytest

import cloister

PACKAGE: Final = Path(cloister.__file__).parent
MODULES: Final = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

FLOORS: Final = (
    {"errors", "crypto"},
    {"attestation"},
    {"contract", "volume"},
    {"confine"},
    {"broker"},
    {"node"},
    {"serve"},
    {"cli"},
)
"""Bottom up. Rooms of one set do not import each other."""
BELOW: Final = {
    ("volume", "attestation"): "a volume is bytes on a disk: nobody's hardware matters to it",
}
"""Pairs that the order of the floors would allow and that are refused all the same."""
TOP: Final = {"__init__", "__main__"}
"""Modules beside the rooms: the package says what it is, `python -m cloister` calls the command line."""

PURE: Final = (
    "errors.py",
    "attestation/*",
    "contract/*",
    "volume/format.py",
    "volume/keys.py",
    "volume/layout.py",
    "volume/names.py",
    "volume/types.py",
    "volume/fuse/protocol.py",
    "confine/bubble.py",
    "confine/job.py",
    "confine/landlock.py",
    "confine/profile.py",
    "confine/seccomp.py",
    "confine/shim.py",
    "confine/syscalls.py",
    "broker/decide.py",
    "broker/kbs/session.py",
    "broker/kbs/wire.py",
    "broker/life.py",
    "broker/relay.py",
    "broker/session.py",
    "broker/wire.py",
    "broker/log/*",
    "node/plan.py",
    "node/progress.py",
    "node/report.py",
    "node/workload/elf.py",
    "node/workload/form.py",
    "node/workload/inventory.py",
    "node/workload/ldcache.py",
    "node/workload/native.py",
    "node/workload/packages.py",
    "serve/answer.py",
    "serve/wire.py",
)
"""Globs of modules that decide; `*` reaches into folders."""
EDGES: Final = ("attestation/edge/*", "contract/edge.py")
"""What in those rooms moves bytes."""

STANDARD: Final = {
    "__future__", "array", "ast", "base64", "binascii", "bisect", "collections", "contextlib", "csv", "dataclasses", "datetime",
    "difflib", "enum", "errno", "fnmatch", "functools", "hashlib", "heapq", "hmac", "itertools", "json", "math", "operator", "posixpath", "re",
    "string", "struct", "textwrap", "tomllib", "types", "typing", "unicodedata", "warnings", "zlib",
}  # fmt: skip
"""Modules of the standard library that touch no file, socket, clock, process or randomness."""
LIBRARIES: Final = {
    "asn1crypto": "DER structures from and to bytes",
    "lxml": "XML from bytes, without entities, network or files",
    "sevsnpmeasure": "launch digests of SEV-SNP guests from bytes",
    "signxml": "XML signatures; the verification time is its argument",
    "blake3": "a hash",
    "cryptography": "the primitives; keys are made in edges, and HPKE's own randomness is inside `cloister.crypto.hpke`",
    "dcap_qvl": "the quote verifier: root, collateral and time are its arguments",
    "joserfc": "JWTs from and to text",
    "pydantic": "strict parsing",
    "pydantic_core": "strict parsing: its error type",
}
ALLOWED: Final = {
    (
        "attestation/verify.py",
        "importlib",
    ): "finds the folders of hardware beside it, once, at import; a peer chooses none",
    ("attestation/files/__init__.py", "importlib"): "finds the kinds of evidence files beside it, once, at import",
    ("attestation/files/__init__.py", "pkgutil"): "as importlib",
    ("confine/job.py", "pathlib"): "holds the paths that the launcher will bind; opens none",
    (
        "serve/wire.py",
        "secrets",
    ): "the nonce of a sealed reply: AES-GCM needs a fresh one for each, and no caller may choose it",
    ("node/plan.py", "pathlib"): "compares paths that the operator gave; opens none",
    ("node/workload/form.py", "pathlib"): "a specification holds the paths that the edge will read",
    ("volume/format.py", "sys"): "byte order of this machine, for columns that are copied in one piece",
}
"""(module, import) -> why this pure module has it."""
CLOCKS: Final = {"now", "utcnow", "today", "monotonic", "perf_counter", "time_ns"}
OPENERS: Final = {"open", "exec", "eval", "__import__", "input", "print"}
DISK: Final = {
    "exists",
    "is_dir",
    "is_file",
    "iterdir",
    "mkdir",
    "read_bytes",
    "read_text",
    "stat",
    "unlink",
    "write_bytes",
}
"""Methods of `Path` that ask the disk."""


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text("utf-8"), module)


def imports(module: str, *, at_run_time: bool = False) -> set[str]:
    """Return every imported module, dotted; `from cloister.broker import life` counts as `cloister.broker.life`."""
    found: set[str] = set()
    skipped: set[ast.AST] = set()
    parsed = tree(module)
    if at_run_time:
        for node in ast.walk(parsed):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                skipped.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(parsed):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the floor"
            name = node.module or ""
            found |= {_named(name, alias.name) for alias in node.names}
    return found


def _named(package: str, name: str) -> str:
    inner = f"{package}.{name}".removeprefix("cloister.").replace(".", "/")
    is_module = package == "cloister" or f"{inner}.py" in MODULES or f"{inner}/__init__.py" in MODULES
    return f"{package}.{name}" if package.startswith("cloister") and is_module else package


def file_of(name: str) -> str:
    """`cloister.broker.log` -> `broker/log/__init__.py`."""
    path = name.removeprefix("cloister.").replace(".", "/")
    return f"{path}.py" if f"{path}.py" in MODULES else f"{path}/__init__.py"


def room(name: str) -> str:
    """`broker/log/tree.py` and `cloister.broker.log.tree` are both in `broker`."""
    if name.endswith(".py"):
        return Path(name).parts[0].removesuffix(".py")
    return name.split(".")[1]


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def matches(module: str, pattern: str) -> bool:
    return module.startswith(pattern[:-1]) if pattern.endswith("/*") else module == pattern


PURE_MODULES: Final = [
    module
    for module in MODULES
    if any(matches(module, pattern) for pattern in PURE) and not any(matches(module, edge) for edge in EDGES)
]


def test_every_room_has_a_floor() -> None:
    known = {name for rooms in FLOORS for name in rooms} | TOP | {"testkit"}
    assert {room(module) for module in MODULES} == known


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) not in TOP and room(m) != "testkit"])
def test_a_room_imports_only_from_rooms_below(module: str) -> None:
    own = room(module)
    for name in imports(module):
        if not name.startswith("cloister."):
            continue
        other = room(name)
        if other in (own, "__version__"):
            continue
        assert other != "testkit", f"{module}: tools for tests are no part of the product"
        assert floor(other) < floor(own), f"{module} imports {name}: {other} is not below {own}"
        assert (own, other) not in BELOW, f"{module} imports {name}: {BELOW[own, other]}"


def test_every_pattern_names_something() -> None:
    for pattern in (*PURE, *EDGES):
        assert any(matches(module, pattern) for module in MODULES), pattern
    assert len(PURE_MODULES) > 40


@pytest.mark.parametrize("module", PURE_MODULES)
def test_what_decides_imports_nothing_that_acts(module: str) -> None:
    for name in imports(module, at_run_time=True):
        top = name.split(".")[0]
        if top == "cloister":
            continue
        if (module, top) in ALLOWED:
            continue
        assert top in STANDARD or top in LIBRARIES, f"{module} imports {name}: is it a decision, or does it act?"


@pytest.mark.parametrize("module", PURE_MODULES)
def test_what_decides_reads_no_clock_and_opens_nothing(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute):
                assert called.attr not in CLOCKS | DISK, f"{module}:{node.lineno} calls {called.attr}"
            elif isinstance(called, ast.Name):
                assert called.id not in OPENERS, f"{module}:{node.lineno} calls {called.id}"


@pytest.mark.parametrize("module", PURE_MODULES)
def test_what_decides_rests_on_what_decides(module: str) -> None:
    """Purity would be a word if a pure module called an edge: all that it imports of the house is pure, or cryptography."""
    for name in imports(module, at_run_time=True):
        if name.startswith("cloister."):
            file = file_of(name)
            assert file in PURE_MODULES or room(name) == "crypto", f"{module} imports {name}, which acts"


def test_every_allowance_is_needed() -> None:
    for module, name in ALLOWED:
        assert module in PURE_MODULES, module
        assert name in {found.split(".")[0] for found in imports(module)}, f"{module} does not import {name} any more"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("from datetime import datetime\ndatetime.now()", "now"),
        ("import time\ntime.monotonic()", "monotonic"),
        ("from pathlib import Path\nPath('x').read_bytes()", "read_bytes"),
    ],
)
def test_the_search_finds_what_it_looks_for(text: str, wanted: str) -> None:
    calls = {
        n.func.attr for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    }
    assert wanted in calls & (CLOCKS | DISK)
