"""The form of a measured workload: frozen columns, one canonical byte string, one digest. Pure.

A workload is two layers and a head. A *layer* is a sorted table of files as the jail sees them; the runtime layer
holds interpreter, packages and native libraries, the app layer the scripts. The *head* names both layers by digest
and holds script, arguments and environment; SHA-256 of the head is the workload's digest, so arguments can change
without touching a layer. Byte tables: docs/workload.md 3.

What a reader refuses, in this order; one fault is enough:
  1 frame     canonical CBOR of exactly the documented keys and types
  2 columns   every column has one entry per path; kinds, owners and link counts are in range
  3 names     paths are UTF-8, sorted, unique, normalised, below the layer's roots, free of control characters, and not
              in a __pycache__
  4 tree      no file is the folder of another; links are relative and stay below their root
  5 links     size and digest of a link are those of its target text
  6 head      both layer digests match; argument and environment strings hold no NUL; the script is in the app layer
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from itertools import pairwise
from operator import lt
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from cloister.crypto.canonical import cbor_decode, cbor_encode
from cloister.errors import InputError

FORMAT: Final = "cloister/workload/1"
LAYER_FORMAT: Final = "cloister/layer/1"

PYTHON_ROOT: Final = "/runtime/python"
VENV_ROOT: Final = "/runtime/venv"
APP_ROOT: Final = "/app"

MAX_BYTES: Final = 256 << 20
"""Largest serialised workload accepted: 2 million files at about 120 bytes a row."""

DIGEST_BYTES: Final = 32

# Control characters, and the Unicode controls that make a name read differently from what it is (bidi overrides).
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_VERSION: Final = re.compile(r"3\.[0-9]{1,3}(\.[0-9]{1,3})?((a|b|rc)[0-9]{1,3})?\Z")
_RUNTIME_ROOTS: Final = ("/runtime/", "/lib/", "/lib64/", "/usr/lib/", "/usr/lib64/")

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total); may raise to stop the work."""


class Kind(IntEnum):
    """What a row is. Only the owner's execute bit of a mode is kept: the rest depends on the umask of the installer."""

    FILE = 0
    EXECUTABLE = 1
    LINK = 2


MODIFIED: Final = 0x80
"""Flag in the kinds column: the file's hash is not the one its package's RECORD states."""

UNOWNED: Final = 0
INTERPRETER: Final = 1
NATIVE: Final = 2
FIRST_PACKAGE: Final = 3
MAX_PACKAGES: Final = 0xFFFF - FIRST_PACKAGE


class Part(StrEnum):
    """Which layer."""

    RUNTIME = "runtime"
    APP = "app"


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What to run: a (venv) interpreter, a script, its arguments and the environment variables it may see.

    `env` is everything the program gets beside what the jail itself sets; it is part of the digest.

    Raises:
        InputError: a NUL or another control byte where the kernel allows none, or a malformed variable name.
    """

    python: Path
    script: Path
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.args, str):
            raise TypeError("args is a tuple of strings, not one string")
        object.__setattr__(self, "args", tuple(self.args))
        object.__setattr__(self, "env", MappingProxyType(dict(sorted(self.env.items()))))
        _check_strings(self.args, self.env)


@dataclass(frozen=True, slots=True)
class Row:
    """One file of a layer, for readers that want objects instead of columns.

    `digest` is the SHA-256 of the content, or of the target text of a link; `owner` indexes `Layer.packages` from
    FIRST_PACKAGE on, below it are UNOWNED, INTERPRETER and NATIVE.
    """

    path: str
    kind: Kind
    size_bytes: int
    digest: bytes
    owner: int = UNOWNED
    modified: bool = False
    target: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """One table of files, column by column (20,000 row objects would cost more than the whole warm measurement).

    `encoded` is the canonical byte string; two layers are equal if and only if it is.
    `packages` are (name, version); `absent` lists files that a RECORD names but the environment lacks;
    `missing` lists (library, first file that needs it) of native libraries that this machine does not have.
    """

    part: Part = field(compare=False)
    python: str = field(compare=False)
    machine: str = field(compare=False)
    packages: tuple[tuple[str, str], ...] = field(compare=False, repr=False)
    paths: tuple[str, ...] = field(compare=False, repr=False)
    kinds: bytes = field(compare=False, repr=False)
    sizes: tuple[int, ...] = field(compare=False, repr=False)
    digests: bytes = field(compare=False, repr=False)
    owners: tuple[int, ...] = field(compare=False, repr=False)
    links: tuple[str, ...] = field(compare=False, repr=False)
    absent: tuple[str, ...] = field(compare=False, repr=False)
    missing: tuple[tuple[str, str], ...] = field(compare=False, repr=False)
    encoded: bytes = field(repr=False)

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.encoded).hexdigest()

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes)

    def rows(self) -> tuple[Row, ...]:
        targets = iter(self.links)
        result = []
        for index, path in enumerate(self.paths):
            kind = Kind(self.kinds[index] & ~MODIFIED)
            result.append(
                Row(
                    path,
                    kind,
                    self.sizes[index],
                    self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES],
                    self.owners[index],
                    bool(self.kinds[index] & MODIFIED),
                    next(targets) if kind is Kind.LINK else "",
                )
            )
        return tuple(result)

    @classmethod
    def of(
        cls,
        part: Part,
        rows: Iterable[Row],
        *,
        python: str = "",
        machine: str = "",
        packages: Sequence[tuple[str, str]] = (),
        absent: Iterable[str] = (),
        missing: Iterable[tuple[str, str]] = (),
    ) -> Layer:
        """Return the layer of `rows` in any order.

        Raises:
            InputError: what the rows say cannot be written down (see the module's list), with the path.
        """
        table = sorted(rows, key=lambda row: row.path)
        try:
            paths = "\x00".join([row.path for row in table]).encode()
            encoded = cbor_encode(
                {
                    "format": LAYER_FORMAT,
                    "part": str(part),
                    "python": python,
                    "machine": machine,
                    "packages": [list(package) for package in packages],
                    "paths": paths,
                    "kinds": bytes([row.kind | (MODIFIED if row.modified else 0) for row in table]),
                    "sizes": struct.pack(f">{len(table)}Q", *[row.size_bytes for row in table]),
                    "digests": b"".join([row.digest for row in table]),
                    "owners": struct.pack(f">{len(table)}H", *[row.owner for row in table]),
                    "links": [row.target for row in table if row.kind is Kind.LINK],
                    "absent": sorted(absent),
                    "missing": [list(pair) for pair in sorted(missing)],
                }
            )
        except UnicodeEncodeError as error:
            raise InputError(
                f"file name {str(error.object)[error.start - 20 : error.end]!r} is not UTF-8",
                code="workload-unmeasurable",
                hint="rename the file",
            ) from error
        return cls.from_bytes(encoded)

    @classmethod
    def from_bytes(cls, data: bytes) -> Layer:
        """Parse strictly.

        Raises:
            InputError: not the canonical form of a layer; the message names the first fault.
        """
        value = _frame(data, _LAYER_KEYS, "layer")  # (1)
        if value["format"] != LAYER_FORMAT:
            raise _malformed("layer", f"format {value['format']!r}, {LAYER_FORMAT!r} is understood")
        if value["part"] not in set(Part):
            raise _malformed("layer", f"part {value['part']!r}")
        part = Part(value["part"])
        try:
            blob: str = value["paths"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _malformed("layer", "a path is not UTF-8") from error
        paths = tuple(blob.split("\x00"))
        count = len(paths)
        kinds, digests = value["kinds"], value["digests"]
        packages = _pairs(value["packages"], "packages")
        missing = _pairs(value["missing"], "missing")
        absent, links = _texts(value["absent"], "absent"), _texts(value["links"], "links")
        if not (len(kinds) == count == len(digests) // DIGEST_BYTES and len(digests) % DIGEST_BYTES == 0):  # (2)
            raise _malformed("layer", f"{count} paths, {len(kinds)} kinds, {len(digests)} bytes of digests")
        if len(value["sizes"]) != 8 * count or len(value["owners"]) != 2 * count:
            raise _malformed(
                "layer", f"{count} paths, {len(value['sizes'])} bytes of sizes, {len(value['owners'])} of owners"
            )
        if set(kinds) - {kind | flag for kind in Kind for flag in (0, MODIFIED)}:
            raise _malformed("layer", "an unknown kind of file")
        sizes = struct.unpack(f">{count}Q", value["sizes"])
        owners = struct.unpack(f">{count}H", value["owners"])
        if max(owners) >= FIRST_PACKAGE + len(packages):
            raise _malformed("layer", "an owner that is not in the package list")
        if list(packages) != sorted(set(packages)) or list(missing) != sorted(set(missing)):
            raise _malformed("layer", "packages and missing libraries are sorted and unique")
        if list(absent) != sorted(set(absent)):
            raise _malformed("layer", "absent files are sorted and unique")
        if part is Part.RUNTIME:
            if not _VERSION.match(value["python"]) or not value["machine"]:
                raise _malformed("layer", f"python {value['python']!r} on {value['machine']!r}")
        elif (
            value["python"]
            or value["machine"]
            or packages
            or absent
            or missing
            or any(owners)
            or max(kinds) >= MODIFIED
        ):
            raise _malformed("layer", "an app layer has no interpreter, packages or owners")
        names = [*absent, *[text for pair in (*packages, *missing) for text in pair], value["machine"]]
        if any(_CONTROL.search(name) for name in names):
            raise _malformed("layer", "a name with control characters")
        _check_paths(paths, blob, part)  # (3)
        link_rows = [index for index, kind in enumerate(kinds) if kind & ~MODIFIED == Kind.LINK]
        if len(link_rows) != len(links):
            raise _malformed("layer", f"{len(link_rows)} links, {len(links)} targets")
        for index, target in zip(link_rows, links, strict=True):
            _check_link(paths[index], target)  # (4)
            text = target.encode()
            if (
                sizes[index] != len(text) or digests[index * 32 : index * 32 + 32] != hashlib.sha256(text).digest()
            ):  # (5)
                raise _malformed("layer", f"link {paths[index]} has another size or digest than its target text")
        return cls(
            part, value["python"], value["machine"], packages, paths, kinds, sizes, digests, owners, links, absent, missing, data
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Workload:
    """A measured program. `digest` is what contracts name, what nodes extend into their runtime register."""

    runtime: Layer
    app: Layer
    script: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", tuple(self.args))
        object.__setattr__(self, "env", MappingProxyType(dict(sorted(self.env.items()))))
        _check_strings(self.args, self.env)
        if self.runtime.part is not Part.RUNTIME or self.app.part is not Part.APP:
            raise _malformed("workload", "the layers are exchanged")
        if f"{APP_ROOT}/{self.script}" not in self.app.paths:  # (6)
            raise _malformed("workload", f"script {self.script!r} is not in the app layer")
        if interpreter_path(self.runtime.python) not in self.runtime.paths:
            raise _malformed("workload", "the runtime layer has no interpreter")

    @property
    def head(self) -> bytes:
        """The canonical bytes whose SHA-256 is the digest."""
        return cbor_encode(
            {
                "format": FORMAT,
                "runtime": hashlib.sha256(self.runtime.encoded).digest(),
                "app": hashlib.sha256(self.app.encoded).digest(),
                "script": self.script,
                "args": list(self.args),
                "env": dict(self.env),
            }
        )

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.head).hexdigest()

    @property
    def argv(self) -> tuple[str, ...]:
        """The command inside the jail."""
        return (f"{VENV_ROOT}/bin/python", f"{APP_ROOT}/{self.script}", *self.args)

    @property
    def cwd(self) -> str:
        """The folder inside the jail in which the command starts."""
        return APP_ROOT

    def to_bytes(self) -> bytes:
        return cbor_encode({"head": self.head, "runtime": self.runtime.encoded, "app": self.app.encoded})

    @classmethod
    def from_bytes(cls, data: bytes) -> Workload:
        """Parse strictly: what is accepted re-encodes to the same bytes.

        Raises:
            InputError: not the canonical form of a workload; the message names the first fault.
        """
        outer = _frame(data, {"head": bytes, "runtime": bytes, "app": bytes}, "workload")
        head = _frame(outer["head"], _HEAD_KEYS, "workload head")
        if head["format"] != FORMAT:
            raise _malformed("workload", f"format {head['format']!r}, {FORMAT!r} is understood")
        for part in Part:
            if hashlib.sha256(outer[part]).digest() != head[part]:  # (6)
                raise _malformed("workload", f"the {part} layer is not the one that the head names")
        args = _texts(head["args"], "args")
        env = head["env"]
        if not all(isinstance(name, str) and isinstance(text, str) for name, text in env.items()):
            raise _malformed("workload", "env maps strings to strings")
        return cls(Layer.from_bytes(outer["runtime"]), Layer.from_bytes(outer["app"]), head["script"], args, env)


def interpreter_path(python: str) -> str:
    """Return the jail path of interpreter version `python`, e.g. `/runtime/python/bin/python3.11`."""
    return f"{PYTHON_ROOT}/bin/python{minor(python)}"


def minor(python: str) -> str:
    """Return "3.11" of "3.11.7"."""
    return ".".join(re.split(r"a|b|rc", python)[0].split(".")[:2])


_LAYER_KEYS: Final[dict[str, type]] = {
    "format": str, "part": str, "python": str, "machine": str, "packages": list, "paths": bytes, "kinds": bytes,
    "sizes": bytes, "digests": bytes, "owners": bytes, "links": list, "absent": list, "missing": list,
}  # fmt: skip
_HEAD_KEYS: Final[dict[str, type]] = {
    "format": str, "runtime": bytes, "app": bytes, "script": str, "args": list, "env": dict,
}  # fmt: skip


def _malformed(what: str, fault: str) -> InputError:
    return InputError(f"malformed {what}: {fault}")


def _frame(data: bytes, keys: Mapping[str, type], what: str) -> dict[str, Any]:
    try:
        value = cbor_decode(data, limit=MAX_BYTES)
    except ValueError as error:
        raise _malformed(what, str(error)) from error
    if not isinstance(value, dict) or value.keys() != keys.keys():
        raise _malformed(what, f"the keys are not {', '.join(sorted(keys))}")
    for name, wanted in keys.items():
        if type(value[name]) is not wanted:
            raise _malformed(what, f"{name} is not a {wanted.__name__}")
    return value


def _texts(value: list[Any], name: str) -> tuple[str, ...]:
    if not all(isinstance(item, str) for item in value):
        raise _malformed("workload", f"{name} is not a list of strings")
    return tuple(value)


def _pairs(value: list[Any], name: str) -> tuple[tuple[str, str], ...]:
    if not all(
        isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item) for item in value
    ):
        raise _malformed("workload", f"{name} is not a list of pairs of strings")
    return tuple((item[0], item[1]) for item in value)


def _check_strings(args: Sequence[str], env: Mapping[str, str]) -> None:
    """Refuse what execve(2) cannot carry or a reader could not see."""
    for index, text in enumerate(args, 1):
        if "\x00" in text or _lone_surrogate(text):
            raise InputError(f"argument {index} holds a NUL or is not UTF-8")
    for name, text in env.items():
        if not _ENV_NAME.match(name):
            raise InputError(f"environment variable name {name!r} is not letters, digits and underscores")
        if "\x00" in text or _lone_surrogate(text):
            raise InputError(f"environment variable {name} holds a NUL or is not UTF-8")


def _lone_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _check_paths(paths: tuple[str, ...], blob: str, part: Part) -> None:
    """(3) and the first half of (4). Works on the joined names: a loop over 20,000 paths would take 30 ms."""
    roots = _RUNTIME_ROOTS if part is Part.RUNTIME else (APP_ROOT + "/",)
    if _CONTROL.search(blob.replace("\x00", "")):
        bad = next(path for path in paths if _CONTROL.search(path))
        raise InputError(
            f"file name {bad!r} holds control characters", code="workload-unmeasurable", hint="rename the file"
        )
    ended = blob + "\x00"
    if "/__pycache__/" in ended:
        raise _malformed("layer", "bytecode is made from sources when staging, never measured")
    if any(piece in ended for piece in ("//", "/./", "/../", "/\x00", "/.\x00", "/..\x00")):
        raise _malformed("layer", "a path is not normalised")
    if not all(path.startswith(roots) for path in paths):
        raise _malformed("layer", f"a path is not below {', '.join(roots)}")
    if not all(map(lt, paths, paths[1:])):
        unsorted = next(b for a, b in pairwise(paths) if a >= b)
        raise _malformed("layer", f"paths are not sorted and unique at {unsorted}")
    folders = {path.rpartition("/")[0] for path in paths}
    for folder in tuple(folders):
        while (folder := folder.rpartition("/")[0]) and folder not in folders:
            folders.add(folder)
    if both := folders.intersection(paths):
        raise _malformed("layer", f"{min(both)} is a file and a folder")


def _check_link(path: str, target: str) -> None:
    """(4) Links are relative and end below the same first folder (`/runtime`, `/app`)."""
    root = "/" + path.split("/", 2)[1] + "/"
    if not target or target.startswith("/") or _CONTROL.search(target):
        raise _malformed("layer", f"link {path} has target {target!r}; wanted is a relative path")
    # Normalising text is only sound without links on the way: each prefix that climbs must stay below the root too.
    place = posixpath.dirname(path)
    for component in target.split("/"):
        place = posixpath.normpath(f"{place}/{component}")
        if not (place + "/").startswith(root):
            raise _malformed("layer", f"link {path} leads out of {root}")
