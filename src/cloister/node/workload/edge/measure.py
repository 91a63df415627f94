"""Measure an environment and a script. Executes nothing of what it measures.

1 locate   interpreter, standard library, packages                                  locate.py
2 scan     every file with its signature; what cannot be measured is refused        scan.py
3 reuse    the cached runtime layer, if every name, signature and condition is as it was    cache.py
4 hash     what is new or changed                                                   hashing.py
5 resolve  native libraries outside the environment, recording every path that was looked at    native.py
6 own      attribute files to packages by RECORD; refuse editable installs          packages.py
7 app      the script's folder, always hashed anew (it is small and changes often)
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from array import array
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cloister.crypto.keys import Secret
from cloister.errors import InputError, Reason
from cloister.node.workload import ldcache, native, packages
from cloister.node.workload.edge import cache
from cloister.node.workload.edge.hashing import (
    BLOCK_BYTES,
    ChangedError,
    Hashed,
    elf_of,
    hash_file,
    in_batches,
    opened,
    reader,
)
from cloister.node.workload.edge.locate import Environment, Tree, locate
from cloister.node.workload.edge.scan import ARROW, WIDTH, Scan, Signature, refuse, scan, signature_of
from cloister.node.workload.elf import Elf, ElfError, read_symbol
from cloister.node.workload.form import (
    APP_ROOT,
    DIGEST_BYTES,
    INTERPRETER,
    NATIVE,
    PYTHON_ROOT,
    UNOWNED,
    Kind,
    Layer,
    Part,
    Progress,
    Row,
    Workload,
    WorkloadSpec,
    interpreter_path,
)

MAX_APP_FILES: Final = 20_000
MAX_APP_BYTES: Final = 256 << 20
"""Code, not data: 256 MiB are hashed in about 0.2 s; whoever has more has data beside the script."""

MAX_NOTE_BYTES: Final = 16 << 20
"""RECORD of torch 2.13 has 1.6 MB."""

RACY_NS: Final = 50_000_000
"""A file changed this recently may change again within one tick of the file system's clock (4-10 ms) and keep its
signature, so its hash is not cached (git's "racily clean" entries)."""

LABEL: Final = "cloister/measure-cache/1"

LD_CACHE: Final = "/etc/ld.so.cache"


def measure(
    spec: WorkloadSpec, *, cache_dir: Path, progress: Progress | None = None, mac_key: Secret | None = None
) -> Workload:
    """Return the workload of `spec`. Equal packages, scripts, arguments and libraries give an equal digest anywhere.

    `cache_dir` is made if it is missing; with `mac_key` only caches authenticated by that key are used.
    `progress` is called with (bytes hashed, bytes to hash) of the runtime layer.

    Raises:
        InputError: (`workload-unmeasurable`) the environment or the script's folder cannot be measured; every finding
            is listed. Also an unreadable or changing file.
    """
    environment = locate(spec.python)  # (1)
    runtime = _runtime(environment, cache_dir, progress, mac_key)
    return Workload(runtime, _app(spec.script), spec.script.name, spec.args, spec.env)


def app_tree(script: Path) -> Tree:
    """Return the tree of a script's folder: hidden names, bytecode and environments are left out.

    Raises:
        InputError: the script is not a visible regular file.
    """
    path = Path(os.path.abspath(script))  # noqa: PTH100 - the folder as named, not where a link leads
    regular = os.path.isfile(path)  # noqa: PTH113 - False, not an error, for a folder that cannot be entered
    if path.name.startswith(".") or not regular or path.is_symlink():
        found = "no readable regular file" if not regular else "a link" if path.is_symlink() else "a hidden name"
        raise InputError(
            f"the script {path} cannot be measured: {found}",
            code="workload-unmeasurable",
            reasons=[Reason(str(path), found, "a regular file with a visible name", "")],
            hint="check the path",
        )
    folder = path.parent

    def skip(prefix: str, name: str) -> bool:
        return name.startswith(".") or name == "__pycache__" or (folder / prefix / name / "pyvenv.cfg").exists()

    return Tree(folder, APP_ROOT, skip)


def _app(script: Path) -> Layer:
    """(7)"""
    found = scan(app_tree(script), max_files=MAX_APP_FILES, max_bytes=MAX_APP_BYTES)
    hashed = _hash([(found, index) for index in range(len(found.names))], (), None)
    return Layer.of(Part.APP, [_row(found, index, hashed[index], UNOWNED) for index in range(len(found.names))])


def _runtime(environment: Environment, cache_dir: Path, progress: Progress | None, mac_key: Secret | None) -> Layer:
    scans = [scan(tree) for tree in environment.trees]  # (2)
    name = hashlib.sha256(str(environment.python).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    path = cache_dir / f"{name}.measured"
    known = cache.load(path, label=LABEL, mac_key=mac_key)
    if known is not None and known.get("facts") == environment.facts.encode("utf-8", "surrogateescape"):
        layer = _reuse(known, scans)  # (3)
        if layer is not None:
            if progress is not None:
                progress(layer.size_bytes, layer.size_bytes)
            return layer
    else:
        known = None
    started = time.time_ns()
    work = _Runtime(environment, scans, known)
    layer = work.layer(progress)
    body = {
        "facts": environment.facts.encode("utf-8", "surrogateescape"),
        "layer": layer.encoded,
        **work.memory(started),
    }
    with suppress(OSError):  # a full or read-only disk costs the next measurement its cache, not this one its result
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        cache.save(path, body, label=LABEL, mac_key=mac_key)
    return layer


def _reuse(known: dict[str, Any], scans: list[Scan]) -> Layer | None:
    """(3) Return the cached layer if nothing that it rests on has changed."""
    if known.get("names") != _names(scans) or known.get("signatures") != _signatures(scans):
        return None
    for path, signature in zip(_split(known["looked"]), _unflatten(known["conditions"]), strict=True):
        if _signature_at(path) != signature:
            return None
    return Layer.from_bytes(known["layer"])


@dataclass(slots=True)
class _Runtime:
    """One measurement of a runtime layer: what is known from before, what was looked at, what came out."""

    environment: Environment
    scans: list[Scan]
    known: dict[str, Any] | None
    looked: dict[str, Signature | None] = field(default_factory=dict)
    outside: dict[str, Hashed] = field(default_factory=dict)
    elves: dict[str, Elf | None] = field(default_factory=dict)
    hashed: list[Hashed | None] = field(default_factory=list)

    def layer(self, progress: Progress | None) -> Layer:
        files = [(found, index) for found in self.scans for index in range(len(found.names))]
        jails = [_jail(found, index) for found, index in files]
        site = packages.site_folder(self.environment.version)
        notes = [packages.is_note(jail, site) for jail in jails]
        old = self._remembered()
        self.hashed = [
            None if note else old.get(_key(found, index)) for (found, index), note in zip(files, notes, strict=True)
        ]
        todo = [
            index
            for index, (done, note) in enumerate(zip(self.hashed, notes, strict=True))
            if done is None and not note
        ]
        for index, result in zip(
            todo, _hash([files[index] for index in todo], self.environment.prefixes, progress), strict=True
        ):  # (4)
            self.hashed[index] = result
        executable = self._outside(str(self.environment.executable))
        version = self._version(executable)
        rows = [
            _row(found, index, result, INTERPRETER if jail.startswith(PYTHON_ROOT + "/") else UNOWNED)
            for (found, index), jail, result in zip(files, jails, self.hashed, strict=True)
            if result is not None
        ]
        interpreter = interpreter_path(self.environment.version)
        rows.append(Row(interpreter, Kind.EXECUTABLE, executable.size_bytes, executable.digest, INTERPRETER))
        closure = self._closure(interpreter, executable, files, jails)  # (5)
        for jail, host in closure.libraries.items():
            library = self._outside(host)
            kind = Kind.EXECUTABLE if jail in native.LOADERS.values() else Kind.FILE
            rows.append(Row(jail, kind, library.size_bytes, library.digest, NATIVE))
        records = self._packages(files, jails, notes, site)  # (6)
        owned, names, absent = packages.attribute(rows, records.values())
        for path, (content, owner) in packages.generated(version, names, owned, records).items():
            owned.append(Row(path, Kind.FILE, len(content), hashlib.sha256(content).digest(), owner))
        taken = {row.path for row in owned}
        for path, target in packages.links(version):
            if path not in taken:
                text = target.encode()
                owned.append(Row(path, Kind.LINK, len(text), hashlib.sha256(text).digest(), INTERPRETER, target=target))
        machine = executable.elf.machine if executable.elf is not None else ""
        return Layer.of(
            Part.RUNTIME, owned, python=version, machine=machine, packages=names, absent=absent, missing=closure.missing
        )

    def memory(self, started_ns: int) -> dict[str, Any]:
        """Return what `_reuse` and `_remembered` read: columns beside the names of the scans."""
        signatures = array("Q")
        for found in self.scans:
            signatures.extend(found.signatures)
        for index in range(0, len(signatures), WIDTH):
            if signatures[index + 2] > started_ns - RACY_NS:
                signatures[index + 2] = 0  # a ctime that no file has: hashed again next time
        elves = [
            [
                index,
                result.elf.machine,
                result.elf.soname,
                list(result.elf.needed),
                list(result.elf.rpath),
                list(result.elf.runpath),
                result.elf.interpreter,
            ]
            for index, result in enumerate(self.hashed)
            if result is not None and result.elf is not None
        ]
        conditions = array("Q")
        for signature in self.looked.values():
            fresh = signature is not None and signature[2] > started_ns - RACY_NS
            conditions.extend(
                (0,) * WIDTH if signature is None else (*signature[:2], 0, *signature[3:]) if fresh else signature
            )
        return {
            "names": _names(self.scans),
            "signatures": signatures.tobytes(),
            "digests": b"".join([bytes(DIGEST_BYTES) if result is None else result.digest for result in self.hashed]),
            "sizes": array("Q", [0 if result is None else result.size_bytes for result in self.hashed]).tobytes(),
            "elves": elves,
            "looked": "\x00".join(self.looked).encode("utf-8", "surrogateescape"),
            "conditions": conditions.tobytes(),
        }

    def _remembered(self) -> dict[tuple[str, Signature], Hashed]:
        """Return the hashes of the cached measurement by (jail path, signature)."""
        if self.known is None:
            return {}
        digests, sizes = self.known["digests"], array("Q", self.known["sizes"])
        elves = {
            entry[0]: Elf(entry[1], entry[2], tuple(entry[3]), tuple(entry[4]), tuple(entry[5]), entry[6])
            for entry in self.known["elves"]
        }  # fmt: skip
        result = {}
        names, signatures = _split(self.known["names"]), _unflatten(self.known["signatures"])
        for index, (name, signature) in enumerate(zip(names, signatures, strict=True)):
            digest = digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
            if signature is not None and any(digest):  # no digest: an installer's note, which is read but not hashed
                result[(name, signature)] = Hashed(digest, sizes[index], elves.get(index))
        return result

    def _outside(self, path: str) -> Hashed:
        """Hash a file outside the scanned trees (interpreter, native library); links are followed, it must stay the same.

        Raises:
            InputError: unreadable or changing.
        """
        if path not in self.outside:
            self._note(path)
            try:
                self.outside[path] = hash_file(os.path.realpath(path))
            except (OSError, ChangedError) as error:
                found = error.strerror if isinstance(error, OSError) and error.strerror else "a file that changes"
                raise refuse(
                    path, [Reason(path, found, "a readable file that stays", "check its permissions")]
                ) from error
        return self.outside[path]

    def _note(self, path: str) -> None:
        self.looked.setdefault(path, _signature_at(path))

    def _version(self, executable: Hashed) -> str:
        """Return "3.11.7" as the interpreter's exported `Py_Version` says, "3.10" for one that does not export it."""
        places = [str(self.environment.executable)]
        if executable.elf is not None:
            places += [
                str(self.environment.base / "lib" / name)
                for name in executable.elf.needed
                if name.startswith("libpython")
            ]
        for place in places:
            try:
                with opened(os.path.realpath(place)) as (descriptor, _signature):
                    word = read_symbol(reader(descriptor), "Py_Version", 8)
            except (OSError, ElfError, ChangedError):
                continue
            if word is None:
                continue
            value = int.from_bytes(word[:4], "little")  # PY_VERSION_HEX: major, minor, micro, level and serial
            level = {0xA: "a", 0xB: "b", 0xC: "rc"}.get(value >> 4 & 0xF)
            text = f"{value >> 24}.{value >> 16 & 0xFF}.{value >> 8 & 0xFF}" + (
                f"{level}{value & 0xF}" if level else ""
            )
            if text.startswith(self.environment.version + "."):
                return text
        return self.environment.version

    def _closure(
        self, interpreter: str, executable: Hashed, files: list[tuple[Scan, int]], jails: list[str]
    ) -> native.Closure:
        if executable.elf is None:
            raise InputError(
                f"{self.environment.executable} is not a well-formed ELF program", code="workload-unmeasurable"
            )
        elves = {interpreter: (str(self.environment.executable), executable.elf)}
        machine = executable.elf.machine
        for (found, index), jail, result in zip(files, jails, self.hashed, strict=True):
            if result is not None and result.elf is not None and result.elf.machine == machine:
                elves[jail] = (_host(found, index), result.elf)
                self.elves[_host(found, index)] = result.elf
        folders = {str(tree.host): tree.jail for tree in self.environment.trees} | {
            str(self.environment.base): PYTHON_ROOT
        }
        known: dict[str, str] = {}
        self._note(LD_CACHE)
        try:
            known = ldcache.parse(Path(LD_CACHE).read_bytes(), machine)
        except (OSError, ValueError):
            known = {}  # as ld.so: without a readable cache only the default folders count
        return native.resolve(interpreter, elves, folders, known, self)

    def elf(self, path: str) -> Elf | None:
        """`native.Look`: what ld.so would find at a host path."""
        if path not in self.elves:
            self._note(path)
            try:
                with opened(os.path.realpath(path)) as (descriptor, _signature):
                    self.elves[path] = elf_of(reader(descriptor))
            except (OSError, ChangedError):
                self.elves[path] = None
        return self.elves[path]

    def same(self, a: str, b: str) -> bool:
        """`native.Look`: are two host paths one file, or files of equal content?"""
        return os.path.realpath(a) == os.path.realpath(b) or self._outside(a).digest == self._outside(b).digest

    def _packages(
        self, files: list[tuple[Scan, int]], jails: list[str], notes: list[bool], site: str
    ) -> dict[str, packages.Record]:
        """(6) Return dist-info folder -> its RECORD; refuse what leads out of the environment."""
        records: dict[str, packages.Record] = {}
        reasons: list[Reason] = []
        for (found, index), jail, note in zip(files, jails, notes, strict=True):
            name = jail.rpartition("/")[2]
            if not jail.startswith(site + "/"):
                continue
            beside = jail.count("/") == site.count("/") + 1
            if note and name == "RECORD":
                folder = jail.removeprefix(site + "/").split("/")[0]
                records[folder] = packages.parse_record(_text(found, index), folder, site)
            elif note and name == "direct_url.json":
                reasons += packages.direct_url_reasons(_host(found, index), _text(found, index).encode())
            elif beside and name.endswith(".pth"):
                reasons += packages.pth_reasons(_host(found, index), _text(found, index), site)
            elif beside and name.endswith(".egg-link"):
                reasons.append(
                    Reason(
                        _host(found, index),
                        "an editable install",
                        "a copy inside the environment",
                        "install it without -e: pip install .",
                    )
                )
        if reasons:
            raise refuse(str(self.environment.site), reasons)
        return records


def _hash(files: list[tuple[Scan, int]], prefixes: Iterable[str], progress: Progress | None) -> list[Hashed]:
    """(4) Hash scanned files on threads.

    Raises:
        InputError: unreadable files and files that change, all together.
    """

    def size(item: tuple[Scan, int]) -> int:
        found, index = item
        return found.signatures[index * WIDTH]

    def work(item: tuple[Scan, int]) -> Hashed:
        found, index = item
        _name, arrow, target = found.names[index].partition(ARROW)
        if arrow:
            text = target.encode("utf-8", "surrogateescape")
            return Hashed(hashlib.sha256(text).digest(), len(text))
        signature = found.signature(index)
        if packages.is_sysconfig(_jail(found, index)):
            content = packages.sysconfig_text(content_of(_host(found, index), signature), prefixes)
            return Hashed(hashlib.sha256(content).digest(), len(content))
        return hash_file(
            os.path.realpath(_host(found, index)) if found.tree.outside else _host(found, index), signature
        )

    results, reasons = in_batches(files, size, work, lambda item: _host(*item), progress)
    if reasons:
        raise refuse(str(files[0][0].tree.host), reasons)
    return [result for result in results if result is not None]


def content_of(path: str, expect: Signature | None = None) -> bytes:
    """Return a small file whole. Raises ChangedError and OSError as `opened`, ChangedError for more than 16 MiB."""
    with opened(os.path.realpath(path), expect=expect) as (descriptor, signature):
        if signature[0] > MAX_NOTE_BYTES:
            raise ChangedError
        parts = []
        while part := os.read(descriptor, BLOCK_BYTES):
            parts.append(part)
        return b"".join(parts)


def _text(found: Scan, index: int) -> str:
    path = _host(found, index)
    try:
        return content_of(path, found.signature(index)).decode("utf-8", "replace")
    except (OSError, ChangedError) as error:
        raise refuse(
            path,
            [
                Reason(
                    path,
                    "an unreadable, changing or oversized file",
                    "at most 16 MiB of text",
                    "install the package again",
                )
            ],
        ) from error


def _row(found: Scan, index: int, hashed: Hashed, owner: int) -> Row:
    target = found.names[index].partition(ARROW)[2]
    mode = found.signatures[index * WIDTH + 5]
    kind = Kind.LINK if target else Kind.EXECUTABLE if mode & stat.S_IXUSR else Kind.FILE
    return Row(_jail(found, index), kind, hashed.size_bytes, hashed.digest, owner, target=target)


def _jail(found: Scan, index: int) -> str:
    return f"{found.tree.jail}/{found.names[index].partition(ARROW)[0]}"


def _host(found: Scan, index: int) -> str:
    return f"{found.tree.host}/{found.names[index].partition(ARROW)[0]}"


def _key(found: Scan, index: int) -> tuple[str, Signature]:
    return f"{found.tree.jail}/{found.names[index]}", found.signature(index)


def _names(scans: list[Scan]) -> bytes:
    return "\x00".join([f"{found.tree.jail}/{name}" for found in scans for name in found.names]).encode(
        "utf-8", "surrogateescape"
    )


def _signatures(scans: list[Scan]) -> bytes:
    return b"".join([found.signatures.tobytes() for found in scans])


def _split(blob: bytes) -> list[str]:
    return blob.decode("utf-8", "surrogateescape").split("\x00")


def _unflatten(data: bytes) -> list[Signature | None]:
    """Return signatures of a column; six zeros stand for an absent file."""
    column = array("Q", data)
    found = [tuple(column[index : index + WIDTH]) for index in range(0, len(column), WIDTH)]
    return [(one[0], one[1], one[2], one[3], one[4], one[5]) if any(one) else None for one in found]


def _signature_at(path: str) -> Signature | None:
    try:
        return signature_of(Path(path).stat())
    except OSError:
        return None
