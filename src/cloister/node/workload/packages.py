"""What an environment says about its packages: RECORD files, .pth lines, editable installs, generated texts. Pure.

Sources: PyPA "Recording installed projects" (RECORD, INSTALLER, REQUESTED, direct_url.json), Python's `site` module
(.pth files, pyvenv.cfg), PEP 610 and PEP 660 (editable installs).

Four kinds of files differ between two machines with the same packages; each gets a canonical form here:
  RECORD               lists console scripts, whose hash covers the environment's path -> rewritten from the measured rows
  pyvenv.cfg           names the host's interpreter -> rewritten for the jail
  _sysconfigdata*.py   names the interpreter's folder, wrapped by its length -> prefix replaced, one entry a line
  INSTALLER, REQUESTED, direct_url.json and installers' own notes -> left out; nothing imports them
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import json
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cloister.errors import Reason
from cloister.node.workload.form import FIRST_PACKAGE, INTERPRETER, PYTHON_ROOT, VENV_ROOT, Kind, Row, minor

NOTES: Final = frozenset(
    {
        "RECORD",
        "RECORD.jws",
        "RECORD.p7s",
        "INSTALLER",
        "REQUESTED",
        "direct_url.json",
        "uv_cache.json",
        "uv_build.json",
    }
)
"""Files of a dist-info folder that are read but not measured as they are."""

_DIST_INFO: Final = re.compile(r"(?P<name>[^/]+)-(?P<version>[^-/]+)\.dist-info\Z")
_HASH: Final = re.compile(r"sha256=([A-Za-z0-9_-]{43})\Z")
_CONSTANTS: Final = (str, int, float, type(None))


@dataclass(frozen=True, slots=True)
class Record:
    """One package's claims: jail path -> SHA-256 as recorded, None where the RECORD gives no hash."""

    name: str
    version: str
    files: dict[str, bytes | None]


def site_folder(python: str) -> str:
    """Return the jail path of the packages, e.g. `/runtime/venv/lib/python3.11/site-packages`."""
    return f"{VENV_ROOT}/lib/python{minor(python)}/site-packages"


def is_note(path: str, site: str) -> bool:
    """Is this an installer's note on a package of the environment (not one that a wheel carries in a subfolder)?"""
    folder, _, name = path.removeprefix(site + "/").partition("/")
    return name in NOTES and path.startswith(site + "/") and folder.endswith(".dist-info")


def split_dist_info(folder: str) -> tuple[str, str] | None:
    """Return (normalised name, version) of `numpy-2.1.0.dist-info`, None for other names (PEP 503 normalisation)."""
    match = _DIST_INFO.match(folder)
    return (re.sub(r"[-_.]+", "-", match["name"]).lower(), match["version"]) if match else None


def parse_record(text: str, folder: str, site: str) -> Record:
    """Parse the RECORD of dist-info folder `folder`; lines that are no RECORD lines claim nothing.

    Bytecode and console scripts are not claimed: neither is part of a workload.
    """
    name, version = split_dist_info(folder) or (folder, "")
    files: dict[str, bytes | None] = {}
    for line in csv.reader(text.splitlines()):
        if not line or not line[0]:
            continue
        path = posixpath.normpath(posixpath.join(site, line[0]))
        if "/__pycache__/" in path or path.startswith((VENV_ROOT + "/bin/", VENV_ROOT + "/include/")):
            continue
        if not path.startswith(VENV_ROOT + "/") or is_note(path, site):
            continue
        match = _HASH.match(line[1]) if len(line) > 1 else None
        try:
            files[path] = base64.urlsafe_b64decode(match[1] + "=") if match else None
        except binascii.Error:
            files[path] = None
    return Record(name, version, files)


def attribute(
    rows: Iterable[Row], records: Iterable[Record]
) -> tuple[list[Row], tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Return (rows with owners and modified flags, packages, absent files).

    A file that several packages claim belongs to the first by name; it counts as modified only if no claim holds.
    """
    ordered = sorted(records, key=lambda record: (record.name, record.version))
    packages = tuple(dict.fromkeys((record.name, record.version) for record in ordered))
    index = {package: FIRST_PACKAGE + number for number, package in enumerate(packages)}
    claims: dict[str, tuple[int, list[bytes | None]]] = {}
    for record in ordered:
        owner = index[(record.name, record.version)]
        for path, digest in record.files.items():
            claims.setdefault(path, (owner, []))[1].append(digest)
    result = []
    for row in rows:
        claim = claims.pop(row.path, None)
        if claim is None:
            result.append(row)
            continue
        owner, digests = claim
        changed = row.kind is not Kind.LINK and None not in digests and row.digest not in digests
        result.append(Row(row.path, row.kind, row.size_bytes, row.digest, owner, changed, row.target))
    return result, packages, tuple(sorted(claims))


def record_text(name: str, rows: Iterable[Row], site: str) -> bytes:
    """Return the canonical RECORD of a package: its measured files in path order, then itself without a hash."""
    lines = []
    for row in rows:
        digest = base64.urlsafe_b64encode(row.digest).rstrip(b"=").decode()
        lines.append(f"{_quoted(posixpath.relpath(row.path, site))},sha256={digest},{row.size_bytes}\n")
    return "".join([*lines, f"{_quoted(name)}/RECORD,,\n"]).encode()


def pyvenv_text(python: str) -> bytes:
    """Return the jail's pyvenv.cfg."""
    return f"home = {PYTHON_ROOT}/bin\ninclude-system-site-packages = false\nversion = {python}\n".encode()


def generated(
    python: str, packages: tuple[tuple[str, str], ...], rows: Iterable[Row], folders: Iterable[str]
) -> dict[str, tuple[bytes, int]]:
    """Return jail path -> (content, owner) of the files that are written for the jail instead of copied.

    `folders` are the names of the dist-info folders that have a RECORD. A pure function of the measured rows, so that
    staging on another machine writes the same bytes.
    """
    site = site_folder(python)
    owned: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.path):
        if row.owner >= FIRST_PACKAGE and row.kind is not Kind.LINK and not is_note(row.path, site):
            owned.setdefault(row.owner, []).append(row)
    result = {f"{VENV_ROOT}/pyvenv.cfg": (pyvenv_text(python), INTERPRETER)}
    for folder in sorted(folders):
        package = split_dist_info(folder)
        if package in packages:
            owner = FIRST_PACKAGE + packages.index(package)
            result[f"{site}/{folder}/RECORD"] = (record_text(folder, owned.get(owner, ()), site), owner)
    return result


def links(python: str) -> tuple[tuple[str, str], ...]:
    """Return (jail path, target) of the links that make the jail's environment."""
    return (
        (f"{VENV_ROOT}/bin/python", f"../../python/bin/python{minor(python)}"),
        (f"{VENV_ROOT}/bin/python3", "python"),
        (f"{VENV_ROOT}/bin/python{minor(python)}", "python"),
        (f"{VENV_ROOT}/lib64", "lib"),
    )


def is_sysconfig(path: str) -> bool:
    """Does this file of the standard library describe the interpreter's build, with its folder in it?"""
    return (
        path.startswith(PYTHON_ROOT + "/lib")
        and posixpath.basename(path).startswith("_sysconfigdata_")
        and path.endswith(".py")
    )


def sysconfig_text(content: bytes, prefixes: Iterable[str]) -> bytes:
    """Return the canonical form of a `_sysconfigdata*.py`: `prefixes` become the jail's, one entry a line, sorted.

    A file of another shape than `build_time_vars = {...}` is returned as it is: it is then measured as it is.
    """
    try:
        tree = ast.parse(content)
        (statement,) = [
            node for node in tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        ]
        if not isinstance(statement, ast.Assign) or [ast.unparse(target) for target in statement.targets] != [
            "build_time_vars"
        ]:
            return content
        value = ast.literal_eval(statement.value)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return content
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(entry, _CONSTANTS) for name, entry in value.items()
    ):
        return content
    lines = ["build_time_vars = {\n"]
    for name in sorted(value):
        entry = value[name]
        if isinstance(entry, str):
            for prefix in prefixes:
                entry = entry.replace(prefix, PYTHON_ROOT)
        lines.append(f"    {name!r}: {entry!r},\n")
    return "".join([*lines, "}\n"]).encode()


def pth_reasons(path: str, text: str, site: str) -> list[Reason]:
    """Return what is wrong with a .pth file: lines that lead out of the environment. `import` lines are measured code."""
    reasons = []
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith(("#", "import ", "import\t")):
            continue
        target = posixpath.normpath(posixpath.join(site, line))
        if not (target + "/").startswith(site + "/"):
            reasons.append(
                Reason(
                    path,
                    f"a line that adds {line} to sys.path",
                    "packages inside the environment",
                    "install it without -e (pip install .), or remove the line",
                )
            )
    return reasons


def direct_url_reasons(path: str, content: bytes) -> list[Reason]:
    """Return a reason if a package says that it is installed as editable (PEP 610 `dir_info.editable`)."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return [Reason(path, "no JSON", "JSON as in PEP 610", "install the package again")]
    info = value.get("dir_info") if isinstance(value, dict) else None
    if isinstance(info, dict) and info.get("editable"):
        return [
            Reason(
                path,
                f"an editable install of {value.get('url', 'a folder')}",
                "a copy inside the environment",
                "install it without -e: pip install .",
            )
        ]
    return []


def _quoted(path: str) -> str:
    return '"' + path.replace('"', '""') + '"' if any(character in path for character in ',"') else path
