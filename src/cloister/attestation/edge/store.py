"""A folder of collateral that only moves forward.

    STORE/index             the list of what counts, and the high-water marks: one file, so that both change at once
    STORE/objects/<sha256>  collateral in the vendor's format, named by its digest

`index` is SHA-256 of the rest, then canonical CBOR {"v": 1, "items": [[kind, subject, digest], ...], "marks": {name: number}}.

Order of a change, under an exclusive lock of the folder: objects are written and on the disk, then `index` is replaced by a rename,
then objects that nothing names are removed. A power cut leaves the old collateral or the new one. Readers take a shared lock;
a folder on a read-only disk works.

What comes in replaces what is there for the same machines, unless
  rolled back   a number that a believed authority signed is below its mark                   EvidenceError `collateral-rolled-back`
  unsigned      no believed authority signed it, though one signed what is there               EvidenceError `evidence-not-authentic`
An import skips such items, and says so; everything else refuses as a whole. Marks are judged as `collateral.marks` says, under
the roots that the caller believes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from cloister.attestation.collateral import marks, snapshot
from cloister.attestation.collateral.read import LIMIT, recognise
from cloister.attestation.collateral.snapshot import Snapshot
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.roots import Roots
from cloister.crypto.canonical import cbor_decode, cbor_encode
from cloister.errors import EvidenceError, InputError, MachineError, Reason, TamperedError

INDEX: Final = "index"
OBJECTS: Final = "objects"
INDEX_LIMIT: Final = 4 * 1024 * 1024
MOST_MARKS: Final = 65_536
_DIGEST: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_MARK: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9+/=:._-]{0,126}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Change:
    """What a change did: (kind, subject) of each."""

    added: tuple[tuple[str, str], ...] = ()
    """New, or newer than what was there."""
    same: tuple[tuple[str, str], ...] = ()
    kept: tuple[Reason, ...] = ()
    """Items of an import that are older than ours, or unsigned where ours is signed: ours stayed."""


@dataclass(frozen=True, slots=True)
class _Index:
    items: Mapping[tuple[str, str], str] = field(default_factory=dict)
    marks: Mapping[str, int] = field(default_factory=dict)


class Store:
    """Collateral in a folder. Every method opens, locks, and closes it; any number of processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder: Final = folder

    @staticmethod
    def is_one(folder: Path) -> bool:
        """Return whether `folder` is a store (maybe a damaged one)."""
        return (folder / INDEX).is_file()

    # Reading ---------------------------------------------------------------------------------------------------

    def endorsements(self) -> Endorsements:
        """Return all collateral; empty if there is no store yet.

        Raises:
            TamperedError: index or an object is not what was written.
            MachineError, InputError: the folder cannot be read.
        """
        with self._locked(fcntl.LOCK_SH) as there:
            return self._load(self._index()) if there else Endorsements()

    def marks(self) -> Mapping[str, int]:
        """Return the high-water marks; empty if there is no store yet. Errors as `endorsements`."""
        with self._locked(fcntl.LOCK_SH) as there:
            return MappingProxyType(dict(self._index().marks)) if there else MappingProxyType({})

    def export(self, *, made: datetime, sign: Callable[[bytes], str]) -> bytes:
        """Return all collateral as a signed snapshot file. `sign` gets the snapshot's bytes and returns an armoured SSHSIG.

        Raises:
            InputError: there is nothing to export, or more than a snapshot holds.
            TamperedError, MachineError: as `endorsements`.
            ValueError: `made` has no time zone.
        """
        items = self.endorsements().items
        if not items:
            raise InputError(f"{self.folder} holds no collateral", hint="`cloister collateral add` or `fetch` first")
        size = sum(len(item.data) + 512 for item in items)
        wrong = snapshot.problem(tuple(sorted(items, key=lambda item: (item.kind, item.subject))))
        if wrong is None and size > snapshot.FILE_LIMIT:
            wrong = Reason("snapshot", f"{size} bytes", f"at most {snapshot.FILE_LIMIT} bytes")
        if wrong is not None:
            raise InputError("the collateral does not fit into a snapshot", reasons=[wrong])
        body = snapshot.encode(Snapshot(made, items))
        return snapshot.seal(body, sign(body))

    # Changing --------------------------------------------------------------------------------------------------

    def add(self, items: Sequence[Endorsement], *, roots: Roots, now: datetime) -> Change:
        """Take in `items`, all or nothing.

        Raises:
            EvidenceError: `collateral-rolled-back` or `evidence-not-authentic`, with every item that is refused.
            InputError: an item breaks a limit (`collateral.snapshot.problem`).
            TamperedError, MachineError: as `endorsements`; nothing was changed.
            ValueError: `now` has no time zone.
        """
        return self._merge(items, roots, now, strict=True)

    def add_files(self, files: Sequence[Path], *, roots: Roots, now: datetime) -> Change:
        """Take in files of vendors.

        Raises:
            InputError: a file cannot be read, is too large, or is no collateral; all such files are named.
            EvidenceError, TamperedError, MachineError: as `add`.
        """
        return self.add([item for path in files for item in read_file(path)], roots=roots, now=now)

    def import_(
        self, data: bytes, *, check: Callable[[str, bytes], str], roots: Roots, now: datetime
    ) -> tuple[Change, Snapshot, str]:
        """Take in a signed snapshot; return what changed, the snapshot, and its signer. What is newer here stays.

        `check` returns who signed (armoured signature, signed bytes) and raises for anybody who does not count.

        Raises:
            EvidenceError: `evidence-malformed`: no snapshot, or one that nobody signed. And what `check` raises.
            TamperedError, MachineError: as `endorsements`; nothing was changed.
            ValueError: `now` has no time zone.
        """
        found, signer = snapshot.open_signed(data, check)
        return self._merge(found.items, roots, now, strict=False), found, signer

    def _merge(self, items: Sequence[Endorsement], roots: Roots, now: datetime, *, strict: bool) -> Change:
        incoming = {(item.kind, item.subject): item for item in items}  # the last one of the same subject counts
        wrong = snapshot.problem(tuple(incoming[key] for key in sorted(incoming)))
        if wrong is not None:
            raise InputError("this does not fit into a store of collateral", reasons=[wrong])
        self._make()
        with self._locked(fcntl.LOCK_EX):
            index = self._index()
            old = self._load(index)
            everything = old | Endorsements(tuple(incoming.values()))
            raised = dict(index.marks)
            added, same, refused = [], [], list[Reason]()
            rolled_back = False
            for key, item in incoming.items():
                if index.items.get(key) == _name(item.data):
                    same.append(key)
                    continue
                found = marks.numbers(item, everything, roots, now=now)
                reasons = marks.behind(raised, found)
                rolled_back |= bool(reasons)
                before = old.get(*key)
                if (
                    before is not None
                    and not reasons
                    and not marks.genuine(item, everything, roots, now=now)
                    and marks.genuine(Endorsement(*key, before), old, roots, now=now)
                ):
                    hint = "only what a pinned root leads to may replace it"
                    wanted = "what a believed authority signed, as that which is here"
                    reasons = (Reason(f"{marks.WHERE}.{key[1]}", "no such signature", wanted, hint),)
                if reasons:
                    refused += reasons
                    continue
                raised.update(found)
                added.append(key)
            if refused and strict:
                code = marks.CODE if rolled_back else "evidence-not-authentic"
                raise EvidenceError("the collateral must not replace what is there", code=code, reasons=refused)
            if len(index.items.keys() | incoming.keys()) > snapshot.MOST or len(raised) > MOST_MARKS:
                raise InputError(
                    "the store is full",
                    reasons=[Reason(str(self.folder), f"{len(incoming)} more items", f"at most {snapshot.MOST} items")],
                )
            if added:
                names = {key: _name(incoming[key].data) for key in added}
                self._write_objects({names[key]: incoming[key].data for key in added})
                index = _Index({**index.items, **names}, raised)
                self._write_index(index)
            self._sweep(index.items.values())
            return Change(tuple(added), tuple(same), tuple(refused))

    # The disk --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[bool]:
        """Hold the folder's lock; yields whether there is a folder."""
        try:
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            yield False
            return
        except NotADirectoryError as error:
            raise InputError(f"{self.folder} is a file; a store of collateral is a folder") from error
        except OSError as error:
            raise MachineError(f"cannot open {self.folder}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, how)
            yield True
        finally:
            os.close(descriptor)

    def _make(self) -> None:
        # what begins with a dot is what a power cut left of a first change
        if (
            self.folder.is_dir()
            and not self.is_one(self.folder)
            and not all(path.name == OBJECTS or path.name.startswith(".") for path in self.folder.iterdir())
        ):
            raise InputError(f"{self.folder} holds other things than collateral", hint="name a new folder, or a store")
        try:
            (self.folder / OBJECTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make {self.folder}: {error.strerror}", hint="name another place") from error

    def _index(self) -> _Index:
        path = self.folder / INDEX
        try:
            with path.open("rb") as file:
                data = file.read(INDEX_LIMIT + 1)
        except FileNotFoundError:
            return _Index()
        except OSError as error:
            raise MachineError(f"cannot read {path}: {error.strerror}") from error
        if len(data) > INDEX_LIMIT or hashlib.sha256(data[32:]).digest() != data[:32]:
            raise _damaged(path, "other bytes than were written")
        try:
            value: Any = cbor_decode(data[32:])
        except ValueError as error:
            raise _damaged(path, str(error)) from error
        match value:
            case {"v": 1, "items": list(entries), "marks": dict(found), **rest} if not rest and all(
                isinstance(name, str) and _MARK.fullmatch(name) and type(number) is int and number >= 0
                for name, number in found.items()
            ):
                pass
            case _:
                raise _damaged(path, "another shape")
        items: dict[tuple[str, str], str] = {}
        for entry in entries:
            match entry:
                case [str(kind), str(subject), str(digest)] if _DIGEST.fullmatch(digest):
                    items[kind, subject] = digest
                case _:
                    raise _damaged(path, "an item of another shape")
        return _Index(items, found)

    def _load(self, index: _Index) -> Endorsements:
        items = []
        for (kind, subject), digest in index.items.items():
            path = self.folder / OBJECTS / digest
            try:
                with path.open("rb") as file:
                    data = file.read(LIMIT + 1)
            except FileNotFoundError as error:
                raise _damaged(path, "nothing") from error
            except OSError as error:
                raise MachineError(f"cannot read {path}: {error.strerror}") from error
            if _name(data) != digest:
                raise _damaged(path, f"{len(data)} bytes of SHA-256 {_name(data)}")
            items.append(Endorsement(kind, subject, data))
        return Endorsements(tuple(items))

    def _write_objects(self, objects: Mapping[str, bytes]) -> None:
        folder = self.folder / OBJECTS
        for name, data in objects.items():
            replace_file(folder / name, data)
        _sync(folder)
        _sync(self.folder)

    def _write_index(self, index: _Index) -> None:
        items = [[kind, subject, digest] for (kind, subject), digest in sorted(index.items.items())]
        body = cbor_encode({"v": 1, "items": items, "marks": dict(index.marks)})
        replace_file(self.folder / INDEX, hashlib.sha256(body).digest() + body)
        _sync(self.folder)

    def _sweep(self, named: Iterable[str]) -> None:
        wanted = set(named)
        spare = [path for path in (self.folder / OBJECTS).iterdir() if path.name not in wanted]
        for path in (*spare, *self.folder.glob(f".{INDEX}.*")):
            with contextlib.suppress(OSError):  # a leftover costs room, nothing else
                path.unlink()


def read_file(path: Path) -> tuple[Endorsement, ...]:
    """Return what the vendor's file `path` endorses.

    Raises:
        InputError: it cannot be read, is too large, or is no collateral.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT + 1)
    except OSError as error:
        raise InputError(f"the collateral file {path} cannot be read: {error.strerror}") from error
    if len(data) > LIMIT:
        raise InputError(f"the collateral file {path} has more than {LIMIT} bytes")
    try:
        return recognise(data, name=path.name)
    except EvidenceError as error:
        raise InputError(f"the file {path} holds no collateral", reasons=error.reasons) from error


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path`, old or new and never half. The folder's entry is not on the disk before it is synced, too.

    Raises:
        MachineError: `disk-full`, or what else the system says; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise MachineError(f"cannot write {path}: {error.strerror}", code="disk-full" if full else "machine") from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _damaged(path: Path, found: str) -> TamperedError:
    return TamperedError(
        f"{path} is not what was written",
        reasons=[Reason("collateral.store", found, "the bytes that its name or its first line says")],
        hint="remove the folder and fetch or import the collateral again; nothing in it is secret",
    )
