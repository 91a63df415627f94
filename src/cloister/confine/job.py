"""One program to confine: what is bound where, what is run, what it may leave behind.

Construction validates, so that no field can carry a NUL, a newline, or a path that climbs: the fields end up in
bubblewrap's argument list, in Landlock rules and in mount points.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Final, Literal

Stream = Literal["null", "pipe", "inherit"]

HOME: Final = "/tmp/home"  # noqa: S108 -- a path inside the jail, on its own tmpfs
ENVIRONMENT: Final = MappingProxyType(
    {
        "PATH": "/runtime/venv/bin:/runtime/python/bin:/usr/local/bin:/usr/bin:/bin",
        "HOME": HOME,
        "LANG": "C.UTF-8",
        "TMPDIR": "/tmp",  # noqa: S108 -- as HOME
    }
)
"""What every job has; a job's own declarations override it. Nothing of the launcher's environment gets in."""

RESERVED: Final = (
    "/proc",
    "/dev",
    "/sys",
    "/out",
    "/tmp",  # noqa: S108 -- as HOME
    "/.cloister",
    "/etc/passwd",
    "/etc/group",
    "/etc/nsswitch.conf",
)
"""Places that the jail itself fills; a bind may not cover them or lie below them."""

_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}", re.ASCII)
_OUTPUT_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)
_HOSTNAME: Final = "jail"
HOSTNAME: Final = _HOSTNAME
UID: Final = 1000
GID: Final = 1000
"""User and group inside; outside it is the caller's own or, for root, one that no other job uses."""


def _check_text(what: str, text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be str, not {type(text).__name__}")
    if "\0" in text or "\n" in text:
        raise ValueError(f"{what} contains a NUL or a newline: {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not UTF-8 text: {text!r}") from error


def _check_inner_path(what: str, text: str) -> None:
    _check_text(what, text)
    if not text.startswith("/") or text == "/" or str(PurePosixPath(text)) != text or text.startswith("//"):
        raise ValueError(f"{what} must be an absolute, normal path below /: {text!r}")
    if ".." in PurePosixPath(text).parts:
        raise ValueError(f"{what} climbs with '..': {text!r}")


@dataclass(frozen=True, slots=True)
class Bind:
    """A file or folder of this machine at a path in the jail; read-only unless `writable`.

    Below `/data` nothing can be executed; everywhere else read-only binds can be. Writable binds never can.
    """

    source: Path
    target: str
    writable: bool = False

    def __post_init__(self) -> None:
        _check_text("bind source", str(self.source))
        if not self.source.is_absolute():
            raise ValueError(f"bind source must be absolute: {self.source}")
        _check_inner_path("bind target", self.target)
        if self.target == "/etc":
            raise ValueError("bind target '/etc' would bring this machine's identity in; bind single entries of it")
        for place in RESERVED:
            if self.target == place or self.target.startswith(place + "/"):
                raise ValueError(f"bind target {self.target!r} lies in {place}, which the jail fills itself")

    @property
    def data(self) -> bool:
        """Whether it lies below `/data`."""
        return self.target == "/data" or self.target.startswith("/data/")

    @property
    def executes(self) -> bool:
        """Whether anything in it may be executed or mapped as code."""
        return not self.writable and not self.data


@dataclass(frozen=True, slots=True)
class Job:
    """What to run. `argv[0]` is an absolute path in the jail; `outputs` maps a name to its size limit in bytes.

    The program finds each output as the empty folder `/out/<name>` on a tmpfs of its own.
    """

    binds: tuple[Bind, ...]
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    cwd: str = "/tmp"  # noqa: S108 -- as HOME
    outputs: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    stdin: Stream = "null"
    stdout: Stream = "null"
    stderr: Stream = "null"

    def __post_init__(self) -> None:
        object.__setattr__(self, "binds", tuple(self.binds))
        object.__setattr__(self, "argv", tuple(self.argv))
        object.__setattr__(self, "env", MappingProxyType(dict(self.env)))
        object.__setattr__(self, "outputs", MappingProxyType(dict(self.outputs)))
        if not self.argv:
            raise ValueError("argv is empty")
        for word in self.argv:
            _check_argument("argument", word)
        _check_inner_path("argv[0]", self.argv[0])
        _check_inner_path("cwd", self.cwd)
        for name, value in self.env.items():
            if not isinstance(name, str) or not _ENV_NAME.fullmatch(name):
                raise ValueError(f"not a name of an environment variable: {name!r}")
            _check_argument(f"environment variable {name}", value)
        for name, size in self.outputs.items():
            if not isinstance(name, str) or not _OUTPUT_NAME.fullmatch(name):
                raise ValueError(f"not a name of an output: {name!r}")
            if type(size) is not int or not 0 < size < 1 << 62:
                raise ValueError(f"output {name}: size must be a positive number of bytes, not {size!r}")
        seen: set[str] = set()
        for bind in self.binds:
            if bind.target in seen:
                raise ValueError(f"two binds at {bind.target!r}")
            seen.add(bind.target)
        for stream, value in (("stdin", self.stdin), ("stdout", self.stdout), ("stderr", self.stderr)):
            if value not in ("null", "pipe", "inherit"):
                raise ValueError(f"{stream} must be 'null', 'pipe' or 'inherit', not {value!r}")


def _check_argument(what: str, text: str) -> None:
    """Arguments and values travel as data, not as lines: a newline is fine in them, a NUL is not."""
    if not isinstance(text, str):
        raise TypeError(f"{what} must be str, not {type(text).__name__}")
    if "\0" in text:
        raise ValueError(f"{what} contains a NUL: {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not UTF-8 text: {text!r}") from error
