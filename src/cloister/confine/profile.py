"""What a jail allows, as data: a name, how strict it is, and its limits. The broker sees the digest.

    offline    no network, declared outputs; ordinary programs run (real locks, memfd, inotify, System V memory)
    one-shot   as offline, for a process that answers one request and is then thrown away with all its state
    sealed     for code that nobody trusts: strict system call list, locks and names without effect

`none` is no profile: a program without a jail is the node's decision, never this room's.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, fields
from typing import Final

from cloister.crypto.canonical import cbor_decode, cbor_encode

VERSION: Final = 1
"""Changes whenever the same profile would be compiled into another policy by intention."""

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds of one job. Bytes, counts and seconds; 0 means "no limit" for `cpu_s` and `wall_s` only."""

    memory_bytes: int = 6 * GIB
    """Resident memory of all processes together (control group); address space of one process is 4 times this."""
    pids: int = 256
    cpu_s: int = 0
    """CPU seconds of one process (RLIMIT_CPU)."""
    scratch_bytes: int = GIB
    """`/tmp`, which holds HOME too; in memory."""
    shm_bytes: int = GIB
    """`/dev/shm`: batches of DataLoader workers travel through it."""
    nofile: int = 4096
    wall_s: int = 0
    """After this many seconds everything in the jail is killed."""
    output_files: int = 4096
    """Inodes of each declared output, its own folder included."""

    def __post_init__(self) -> None:
        optional = {"cpu_s", "wall_s"}
        for one in fields(self):
            value = getattr(self, one.name)
            if type(value) is not int:
                raise TypeError(f"limit {one.name} must be an int, not {type(value).__name__}")
            if not (0 if one.name in optional else 1) <= value < 1 << 62:
                raise ValueError(f"limit {one.name} is out of range: {value}")


@dataclass(frozen=True, slots=True)
class Profile:
    """One named set of rules. `encode()` is canonical CBOR; its SHA-256 stands in the workload event."""

    name: str
    strict: bool
    """The narrow system call list: locks, advice and process names have no effect, unknown calls give EPERM."""
    one_request: bool
    """The process is meant to end after one request; the node starts a fresh jail for the next."""
    loopback: bool = False
    """A private loopback with TCP and UDP inside the jail's own, otherwise empty network namespace."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if _SHAPES.get(self.name) != (self.strict, self.one_request):
            raise ValueError(f"no profile {self.name!r} with strict={self.strict}, one_request={self.one_request}")
        if self.strict and self.loopback:
            raise ValueError("profile 'sealed' has no network at all, not even a loopback")

    def encode(self) -> bytes:
        """Return canonical CBOR of the profile (RFC 8949 section 4.2.1)."""
        return cbor_encode({"v": VERSION, **asdict(self)})

    def digest(self) -> bytes:
        """Return the SHA-256 (32 bytes) of `encode()`."""
        return hashlib.sha256(self.encode()).digest()

    @classmethod
    def decode(cls, data: bytes) -> Profile:
        """Inverse of `encode`.

        Raises:
            ValueError: not canonical CBOR, another version, an unknown or missing field, or a bad value.
        """
        value = cbor_decode(data)
        if not isinstance(value, dict) or value.pop("v", None) != VERSION:
            raise ValueError("not a sandbox profile of version 1")
        limits = value.pop("limits", None)
        wanted = {one.name for one in fields(cls)} - {"limits"}
        if set(value) != wanted or not isinstance(limits, dict) or set(limits) != {one.name for one in fields(Limits)}:
            raise ValueError("not a sandbox profile: other fields than version 1 has")
        if type(value["name"]) is not str or any(type(value[key]) is not bool for key in wanted - {"name"}):
            raise ValueError("not a sandbox profile: a field has another type")
        try:
            return cls(**value, limits=Limits(**limits))
        except TypeError as error:
            raise ValueError(f"not a sandbox profile: {error}") from error


# name -> (strict, one_request)
_SHAPES: Final = {"offline": (False, False), "one-shot": (False, True), "sealed": (True, False)}
NAMES: Final = tuple(_SHAPES)


def profile(name: str, *, limits: Limits | None = None, loopback: bool = False) -> Profile:
    """Return the profile `name`: `offline`, `one-shot` or `sealed`.

    Raises:
        ValueError: any other name (`none` included), or a loopback for `sealed`.
    """
    if name == "none":
        raise ValueError("'none' is not a jail: whoever starts a program without one must do so by itself")
    if name not in _SHAPES:
        raise ValueError(f"no sandbox profile {name!r}; there are: {', '.join(NAMES)}")
    strict, one_request = _SHAPES[name]
    if limits is None:
        # A sealed job's output is one artefact; few inodes leave little room to hide bits in names.
        limits = Limits(output_files=64) if strict else Limits()
    return Profile(name, strict, one_request, loopback, limits)
