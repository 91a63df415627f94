"""Find interpreter, standard library and packages of an environment. Reads names and pyvenv.cfg; executes nothing.

The interpreter belongs to the workload: running it to ask for its folders would run unmeasured code next to the node.
So this module follows the rules that CPython itself follows (`Modules/getpath.py`, `Lib/site.py`):

  1 pyvenv.cfg   in the folder above the interpreter's; `home` names the folder of the base interpreter
  2 version      from the environment's only lib/python3.X (a venv) or from the interpreter's name
  3 base         the folder above `home`, or above the interpreter that it links to, that has lib/python3.X/os.py
  4 packages     lib/python3.X/site-packages of the venv; of a base interpreter used directly, its one package folder
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.errors import InputError, Reason
from cloister.node.workload.elf import MAGIC
from cloister.node.workload.form import PYTHON_ROOT, VENV_ROOT

UNUSED: Final = frozenset({"test", "idlelib", "turtledemo", "ensurepip", "site-packages", "dist-packages"})
"""Folders of the standard library that are not part of a workload: its own tests, editors, pip's installer (and the
base interpreter's packages, which a venv does not see). `config-*` (static library, Makefile) is left out as well."""

_VERSION: Final = re.compile(r"python(3\.[0-9]+)\Z")


@dataclass(frozen=True, slots=True)
class Tree:
    """One folder of this host that is measured: where it stands in the jail and what is left out.

    `outside` says whether a link may lead out of the tree to a file (then its content counts): only in the standard
    library, where distributions link into /etc.
    """

    host: Path
    jail: str
    skip: Callable[[str, str], bool]
    outside: bool = False


@dataclass(frozen=True, slots=True)
class Environment:
    """What `locate` found. `version` is "3.11"; `base` the folder that stands for /runtime/python."""

    python: Path
    executable: Path
    version: str
    base: Path
    library: Path
    trees: tuple[Tree, ...]
    site: Path

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Host folders that the interpreter's build description may name; a system prefix is the same everywhere."""
        found = {str(self.base), str(self.executable.parent.parent)} - {"/", "/usr", "/usr/local"}
        return tuple(sorted(found, key=len, reverse=True))

    @property
    def facts(self) -> str:
        """Everything that this module concluded, as one string: a cache made under other conclusions is not used."""
        lines = [self.python, self.executable, self.version, self.base, self.library, self.site]
        return "\n".join([*map(str, lines), *[f"{tree.host} {tree.jail}" for tree in self.trees]])


def locate(python: Path) -> Environment:
    """Return the environment of interpreter `python` (not resolved: the link in a venv's bin is what names the venv).

    Raises:
        InputError: no interpreter, no CPython layout, or an environment that sees packages of the system.
    """
    path = Path(os.path.abspath(python))  # noqa: PTH100 - resolve() would lose the venv
    if not path.is_file() or not os.access(path, os.X_OK):
        raise _refuse(
            path, "no executable file", "the interpreter of an environment", "give the path of its bin/python"
        )
    _check_elf(path)
    config = path.parent.parent / "pyvenv.cfg"
    if config.is_file():  # (1)
        return _virtual(path, config)
    return _direct(path)


def _virtual(path: Path, config: Path) -> Environment:
    prefix = config.parent
    settings = _settings(config)
    if settings.get("include-system-site-packages", "false").lower() == "true":
        raise _refuse(
            config,
            "include-system-site-packages = true",
            "an environment of its own",
            "make one without --system-site-packages and install there",
        )
    if "home" not in settings:
        raise _refuse(
            config, "no line `home = ...`", "the folder of the base interpreter", "make the environment again"
        )
    home = Path(settings["home"]).resolve()
    versions = sorted(
        {match[1] for entry in (prefix / "lib").glob("python3.*") if (match := _VERSION.match(entry.name))}
    )
    if len(versions) != 1:  # (2)
        raise _refuse(
            prefix / "lib",
            f"{len(versions)} folders python3.X",
            "exactly one",
            "make the environment again with one interpreter",
        )
    version = versions[0]
    executable = (home / f"python{version}").resolve()
    _check_elf(executable)
    if path.is_symlink() and path.resolve() != executable:
        raise _refuse(
            path,
            f"a link to {path.resolve()}",
            f"{executable}, as `home` in pyvenv.cfg says",
            "make the environment again",
        )
    base, library = _base(home, executable, version)  # (3)
    site = prefix / "lib" / f"python{version}" / "site-packages"  # (4)
    trees = [_standard_library(library, base, version), Tree(prefix / "lib", f"{VENV_ROOT}/lib", _bytecode)]
    if (prefix / "lib64").is_dir() and not (prefix / "lib64").is_symlink():
        raise _refuse(
            prefix / "lib64", "a folder of its own", "a link to lib", "make the environment with `python -m venv`"
        )
    if (prefix / "share").is_dir():
        trees.append(Tree(prefix / "share", f"{VENV_ROOT}/share", _bytecode))
    return Environment(path, executable, version, base, library, tuple(trees), site)


def _direct(path: Path) -> Environment:
    executable = path.resolve()
    match = _VERSION.match(executable.name)
    if match is None:  # (2)
        raise _refuse(
            path,
            f"a program called {executable.name}",
            "CPython, called python3.X",
            "give the path of a venv's bin/python",
        )
    version = match[1]
    base, library = _base(executable.parent, executable, version)  # (3)
    candidates = [library / "site-packages"]
    if base == Path("/usr"):
        candidates += [Path(f"/usr/local/lib/python{version}/dist-packages"), Path("/usr/lib/python3/dist-packages")]
    filled = [folder for folder in candidates if folder.is_dir() and any(folder.iterdir())]
    if len(filled) > 1:  # (4)
        raise _refuse(
            path,
            f"{len(filled)} package folders: {', '.join(map(str, filled))}",
            "one",
            "make a venv and install the packages there",
        )
    site = filled[0] if filled else candidates[0]
    trees = [_standard_library(library, base, version)]
    if site.is_dir():
        trees.append(Tree(site, f"{VENV_ROOT}/lib/python{version}/site-packages", _bytecode))
    return Environment(path, executable, version, base, library, tuple(trees), site)


def _base(home: Path, executable: Path, version: str) -> tuple[Path, Path]:
    """Return (base folder, standard library): getpath.py's landmark os.py, without its climb up to the root."""
    for folder in dict.fromkeys((home.parent, executable.parent.parent)):
        for name in ("lib", "lib64"):
            if (folder / name / f"python{version}" / "os.py").is_file():
                zipped = folder / name / f"python{version.replace('.', '')}.zip"
                if zipped.exists():
                    raise _refuse(
                        zipped,
                        "a standard library in a zip file",
                        "one in a folder",
                        "use an interpreter that is installed normally",
                    )
                return folder, folder / name / f"python{version}"
    raise _refuse(
        home, f"no lib/python{version}/os.py beside it", "a CPython installation", "make the environment again"
    )


def _standard_library(library: Path, base: Path, version: str) -> Tree:
    jail = f"{PYTHON_ROOT}/{library.relative_to(base).parts[0]}/python{version}"
    return Tree(library, jail, _unused, outside=True)


def _bytecode(_folder: str, name: str) -> bool:
    return name == "__pycache__"


def _unused(folder: str, name: str) -> bool:
    return name == "__pycache__" or (folder == "" and (name in UNUSED or name.startswith("config-")))


def _check_elf(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start != MAGIC:
        found = "a script" if start.startswith(b"#!") else "no 64-bit ELF program"
        raise _refuse(
            path,
            found,
            "the interpreter itself",
            "version managers put shims on PATH; give the path of a venv's bin/python",
        )


def _settings(config: Path) -> dict[str, str]:
    """Read pyvenv.cfg as site.py does: `key = value` lines, keys in lower case."""
    settings = {}
    for line in config.read_text("utf-8", "replace").splitlines():
        name, equals, value = line.partition("=")
        if equals:
            settings[name.strip().lower()] = value.strip()
    return settings


def _refuse(path: Path, found: str, wanted: str, hint: str) -> InputError:
    return InputError(
        f"the environment of {path} cannot be measured: {found}",
        code="workload-unmeasurable",
        reasons=[Reason(str(path), found, wanted, hint)],
        hint=hint,
    )
