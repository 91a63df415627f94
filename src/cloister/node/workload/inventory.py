"""What a person reads about a workload: packages, scripts, libraries, and how two workloads differ. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from posixpath import basename
from typing import Final

from cloister.node.workload.form import APP_ROOT, FIRST_PACKAGE, INTERPRETER, NATIVE, UNOWNED, VENV_ROOT, Row, Workload

SHOWN: Final = 12
"""How many names of a list a text shows before it only counts."""


@dataclass(frozen=True, slots=True)
class Group:
    """Files of one package, of the interpreter, or of one kind. `digest` covers paths, kinds and contents."""

    name: str
    version: str
    files: int
    size_bytes: int
    digest: str
    modified: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: jail path, size, SHA-256."""

    path: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything in a workload, grouped for reading. All of it follows from the bytes that the digest covers."""

    digest: str
    runtime_digest: str
    app_digest: str
    machine: str
    interpreter: Group
    packages: tuple[Group, ...]
    unowned: tuple[FileEntry, ...]
    natives: tuple[FileEntry, ...]
    missing_libraries: tuple[tuple[str, str], ...]
    absent: tuple[str, ...]
    script: str
    scripts: tuple[FileEntry, ...]
    args: tuple[str, ...]
    env: Mapping[str, str]

    @property
    def files(self) -> int:
        return (
            self.interpreter.files
            + sum(group.files for group in self.packages)
            + len(self.unowned)
            + len(self.natives)
            + len(self.scripts)
        )

    @property
    def size_bytes(self) -> int:
        groups = (self.interpreter, *self.packages)
        return sum(group.size_bytes for group in groups) + sum(
            entry.size_bytes for entry in (*self.unowned, *self.natives, *self.scripts)
        )


def inventory(workload: Workload) -> Inventory:
    """Group the rows of `workload`."""
    owned: dict[int, list[Row]] = {}
    for row in workload.runtime.rows():
        owned.setdefault(row.owner, []).append(row)
    python = workload.runtime.python
    return Inventory(
        digest=workload.digest,
        runtime_digest=workload.runtime.digest,
        app_digest=workload.app.digest,
        machine=workload.runtime.machine,
        interpreter=_group("python", python, owned.get(INTERPRETER, [])),
        packages=tuple(
            _group(name, version, owned.get(number, []))
            for number, (name, version) in enumerate(workload.runtime.packages, FIRST_PACKAGE)
        ),
        unowned=_entries(owned.get(UNOWNED, [])),
        natives=_entries(owned.get(NATIVE, [])),
        missing_libraries=workload.runtime.missing,
        absent=workload.runtime.absent,
        script=f"{APP_ROOT}/{workload.script}",
        scripts=_entries(workload.app.rows()),
        args=workload.args,
        env=workload.env,
    )


def render_inventory(found: Inventory) -> str:
    """Return `found` as text for a terminal or a review; ends with a newline."""
    python = found.interpreter
    lines = [
        f"workload     {found.digest}",
        f"command      python {found.script} {' '.join(map(repr, found.args))}".rstrip(),
        f"contents     {found.files:,} files, {_size(found.size_bytes)}",
        f"interpreter  CPython {python.version}, {found.machine}, {python.files:,} files, {_size(python.size_bytes)}, {_short(python.digest)}",
        "",
        f"{len(found.packages)} packages",
    ]
    width = max([len(f"{group.name} {group.version}") for group in found.packages], default=0)
    for group in found.packages:
        title = f"{group.name} {group.version}"
        lines.append(
            f"  {title:<{width}}  {group.files:>6,} files  {_size(group.size_bytes):>9}  {_short(group.digest)}"
        )
        lines += [f"    modified since install: {path}" for path in _some(group.modified)]
    if found.absent:
        lines += ["", f"{len(found.absent)} recorded files are absent", *[f"  {path}" for path in _some(found.absent)]]
    if found.unowned:
        lines += ["", f"{len(found.unowned)} files of no package", *_listed(found.unowned)]
    lines += [
        "",
        f"{len(found.natives)} native libraries",
        *[f"  {entry.path}  {_short(entry.digest)}" for entry in found.natives],
    ]
    if found.missing_libraries:
        lines += [
            "",
            f"{len(found.missing_libraries)} native libraries are not on this machine (what needs them cannot be imported)",
        ]
        lines += [f"  {name}  needed by {path}" for name, path in found.missing_libraries]
    lines += [
        "",
        f"{len(found.scripts)} {'script' if len(found.scripts) == 1 else 'scripts'}",
        *_listed(found.scripts, SHOWN * 4),
    ]
    if found.env:
        lines += ["", "environment", *[f"  {name}={text!r}" for name, text in found.env.items()]]
    return "\n".join(lines) + "\n"


def diff(a: Workload, b: Workload) -> tuple[str, ...]:
    """Return one line per difference from `a` to `b`; empty if and only if the digests are equal."""
    if a.digest == b.digest:
        return ()
    lines: list[str] = []
    if a.runtime != b.runtime:
        lines += _diff_runtime(a, b)
    if a.app != b.app:
        lines += _diff_files("script", a.app.rows(), b.app.rows(), APP_ROOT)
    if a.script != b.script:
        lines.append(f"script: {a.script} -> {b.script}")
    for index in range(max(len(a.args), len(b.args))):
        old = repr(a.args[index]) if index < len(a.args) else "none"
        new = repr(b.args[index]) if index < len(b.args) else "none"
        if old != new:
            lines.append(f"argument {index + 1}: {old} -> {new}")
    for name in sorted(a.env.keys() | b.env.keys()):
        if a.env.get(name) != b.env.get(name):
            before, after = (repr(env[name]) if name in env else "unset" for env in (a.env, b.env))
            lines.append(f"environment {name}: {before} -> {after}")
    return tuple(lines)


def _diff_runtime(a: Workload, b: Workload) -> list[str]:
    lines = []
    if a.runtime.machine != b.runtime.machine:
        lines.append(f"machine: {a.runtime.machine} -> {b.runtime.machine}")
    old, new = _by_owner(a), _by_owner(b)
    rows_old, rows_new = old.pop(("interpreter", "")), new.pop(("interpreter", ""))
    changed = _changed(rows_old, rows_new)
    if a.runtime.python != b.runtime.python:
        lines.append(f"interpreter {a.runtime.python} -> {b.runtime.python}, {_files(len(changed))}")
    elif changed:
        lines.append(f"interpreter {a.runtime.python} differs in {_files(len(changed))} ({_names(changed)})")
    for title in ("native", "unowned"):
        what = "native library" if title == "native" else "file of no package"
        lines += _diff_files(what, old.pop((title, "")), new.pop((title, "")), VENV_ROOT)
    names = sorted({name for name, _version in (*old, *new)})
    for name in names:
        before = {version: rows for (found, version), rows in old.items() if found == name}
        after = {version: rows for (found, version), rows in new.items() if found == name}
        changed = _changed(
            [row for rows in before.values() for row in rows], [row for rows in after.values() for row in rows]
        )
        was, now = ", ".join(sorted(before)), ", ".join(sorted(after))
        if not before:
            lines.append(f"{name} {now} added, {_files(len(changed))}")
        elif not after:
            lines.append(f"{name} {was} removed, {_files(len(changed))}")
        elif was != now:
            lines.append(f"{name} {was} -> {now}, {_files(len(changed))}")
        elif changed:
            lines.append(f"{name} {was} differs in {_files(len(changed))} ({_names(changed)})")
    for what, gone, come in (
        ("recorded file", a.runtime.absent, b.runtime.absent),
        ("native library", [name for name, _by in a.runtime.missing], [name for name, _by in b.runtime.missing]),
    ):
        lines += [f"{what} {name} is missing now" for name in sorted(set(come) - set(gone))]
        lines += [f"{what} {name} is no longer missing" for name in sorted(set(gone) - set(come))]
    if not lines:
        lines.append("the same files, described differently (owners, who needs a missing library)")
    return lines


def _by_owner(workload: Workload) -> dict[tuple[str, str], list[Row]]:
    result: dict[tuple[str, str], list[Row]] = {("unowned", ""): [], ("interpreter", ""): [], ("native", ""): []}
    keys = [*result, *workload.runtime.packages]
    result.update({package: [] for package in workload.runtime.packages})
    for row in workload.runtime.rows():
        result[keys[row.owner]].append(row)
    return result


def _diff_files(what: str, a: Iterable[Row], b: Iterable[Row], root: str) -> list[str]:
    old, new = {row.path: row for row in a}, {row.path: row for row in b}
    lines = []
    differing = [path for path in old if path in new and _content(old[path]) != _content(new[path])]
    for verb, paths in (
        ("differs", differing),
        ("added", new.keys() - old.keys()),
        ("removed", old.keys() - new.keys()),
    ):
        if paths:
            count = len(paths)
            plural = what if count == 1 else _plural(what)
            word = "differ" if verb == "differs" and count > 1 else verb
            lines.append(
                f"{count} {plural} {word} ({_names([path.removeprefix(root + '/') for path in sorted(paths)], full=True)})"
            )
    return lines


def _plural(what: str) -> str:
    return {"script": "scripts", "native library": "native libraries", "file of no package": "files of no package"}[
        what
    ]


def _changed(a: Iterable[Row], b: Iterable[Row]) -> list[str]:
    old = {(row.path, *_content(row)) for row in a}
    new = {(row.path, *_content(row)) for row in b}
    return sorted({item[0] for item in old ^ new})


def _content(row: Row) -> tuple[int, bytes]:
    return int(row.kind), row.digest


def _group(name: str, version: str, rows: list[Row]) -> Group:
    whole = hashlib.sha256()
    for row in rows:
        whole.update(f"{row.path}\x00{row.kind:d}".encode() + row.digest)
    modified = tuple(row.path for row in rows if row.modified)
    return Group(name, version, len(rows), sum(row.size_bytes for row in rows), "sha256:" + whole.hexdigest(), modified)


def _entries(rows: Iterable[Row]) -> tuple[FileEntry, ...]:
    return tuple(FileEntry(row.path, row.size_bytes, "sha256:" + row.digest.hex()) for row in rows)


def _listed(entries: tuple[FileEntry, ...], limit: int = SHOWN) -> list[str]:
    lines = [f"  {entry.path}  {_size(entry.size_bytes)}  {_short(entry.digest)}" for entry in entries[:limit]]
    return [*lines, f"  and {len(entries) - limit:,} more"] if len(entries) > limit else lines


def _some(names: tuple[str, ...]) -> list[str]:
    return [*names[:SHOWN], f"and {len(names) - SHOWN:,} more"] if len(names) > SHOWN else list(names)


def _names(paths: list[str], *, full: bool = False) -> str:
    shown = [path if full else basename(path) for path in paths[:3]]
    return ", ".join(shown) + (f", and {len(paths) - 3:,} more" if len(paths) > 3 else "")


def _files(count: int) -> str:
    return f"{count:,} file" if count == 1 else f"{count:,} files"


def _short(digest: str) -> str:
    return digest[: len("sha256:") + 12]


def _size(size_bytes: int) -> str:
    if size_bytes < 1000:
        return f"{size_bytes} B"
    value = float(size_bytes)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 1000 or unit == "GB":
            break
    return f"{value:.1f} {unit}"
