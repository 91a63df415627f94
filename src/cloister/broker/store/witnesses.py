"""The state folder of a witness (`cloister witness`): its key, and for each log the last checkpoint and epoch.

    key                    name and Ed25519 seed, mode 0600
    lock                   one process at a time changes the folder
    logs/<sha256>.json     one for each log, named by the SHA-256 of its origin; written to a new file, then renamed

What is judged is in `cloister.broker.log.witness`; this module only remembers, and remembers *before* it signs: a
signature that leaves this machine is never newer than what the folder holds.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cloister.broker.log.checkpoint import parse_body, tampered
from cloister.broker.log.witness import Behind, Seen, check_extension, open_epoch
from cloister.crypto.keys import Secret
from cloister.crypto.note import COSIGNATURE, ED25519, NoteError, Signer, Verifier, check_name
from cloister.errors import InputError, MachineError, Reason

_MODE: Final = 0o600
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class WitnessFolder:
    """A witness with its state on disk. It is also a `WitnessLink`, so a broker in the same process can use it."""

    def __init__(self, folder: Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Open a folder that `create` made; `clock` gives the time in cosignatures.

        Raises:
            MachineError: the folder cannot be read.
            TamperedError: (log-tampered) the key file is not what `create` wrote.
        """
        self._folder = folder
        self._clock = clock
        data = _read(folder / "key")
        try:
            value = json.loads(data)
            seed = Secret(base64.b64decode(value["seed"], validate=True))
            self._cosigner = Signer(value["name"], seed, COSIGNATURE)
            self._signer = Signer(value["name"], seed, ED25519)
        except (ValueError, KeyError, TypeError) as error:
            raise tampered(
                "the witness's key file does not parse",
                where="witness.key",
                found=type(error).__name__,
                wanted="the file that `create` wrote",
            ) from error

    @classmethod
    def create(
        cls, folder: Path, name: str, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> WitnessFolder:
        """Make a witness called `name` with a new key in `folder`.

        Raises:
            InputError: there is one already.
            MachineError: the folder cannot be written.
            ValueError: `name` cannot name a key.
        """
        check_name(name)
        seed = base64.b64encode(Secret.random().reveal()).decode()
        try:
            (folder / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
            if (folder / "key").exists():
                raise InputError(
                    f"{folder} holds a witness already",
                    reasons=[Reason("witness.folder", "a key", "an empty folder")],
                    hint="open it, or choose another folder: a witness must not forget",
                )
        except OSError as error:
            raise _unusable(folder, error) from error
        _replace(folder / "key", json.dumps({"name": name, "seed": seed}).encode())
        return cls(folder, clock=clock)

    @property
    def verifier(self) -> Verifier:
        """The key of this witness's cosignatures (type 4): what others configure."""
        return self._cosigner.verifier

    def add_log(self, log_key: Verifier) -> None:
        """Watch a log from here on; a log that is watched already keeps what was seen.

        Raises:
            InputError: another key is known for this origin.
        """
        with self._locked():
            known = self._load(log_key.name)
            if known is None:
                self._save(log_key, Seen.nothing(log_key.name))
            elif known[0] != log_key:
                raise InputError(
                    f"another key is known for {log_key.name}",
                    reasons=[Reason("witness.log", str(log_key), str(known[0]))],
                    hint="a log that changed its key is another log: give it another name",
                )

    def seen(self, origin: str) -> Seen | None:
        """Return what was seen of a log, None if it is not watched."""
        known = self._load(origin)
        return known[1] if known else None

    def logs(self) -> list[tuple[Verifier, Seen]]:
        """Return every watched log and what was seen of it."""
        try:
            paths = sorted((self._folder / "logs").glob("*.json"))
        except OSError as error:
            raise _unusable(self._folder, error) from error
        return [_parse(_read(path), path) for path in paths]

    def open_epoch(self, request: bytes) -> bytes:
        """Begin an epoch and return the signed statement; errors as `log.witness.open_epoch`."""
        with self._locked():
            log_key, seen = self._watched(_origin_of(request))
            statement = open_epoch(seen, request, log_key)
            self._save(log_key, statement.seen)
        return self._signer.sign(statement.body())

    def cosign(self, *, epoch: int, old_size: int, proof: Sequence[bytes], checkpoint: bytes) -> str | Behind:
        """Remember and cosign a consistent extension; errors as `log.witness.check_extension`."""
        with self._locked():
            log_key, seen = self._watched(_origin_of(checkpoint, line=0))
            new = check_extension(
                seen, epoch=epoch, old_size=old_size, proof=proof, checkpoint=checkpoint, log_key=log_key
            )
            if isinstance(new, Behind):
                return new
            self._save(log_key, new)
        return self._cosigner.line(new.checkpoint.body(), time=int(self._clock().timestamp()))

    def _watched(self, origin: str) -> tuple[Verifier, Seen]:
        known = self._load(origin)
        if known is None:
            raise InputError(
                f"this witness does not watch {origin!r}",
                reasons=[Reason("witness.log", origin, "a log that was added")],
                hint="add its verifier key first",
            )
        return known

    def _path(self, origin: str) -> Path:
        return self._folder / "logs" / f"{hashlib.sha256(origin.encode()).hexdigest()}.json"

    def _load(self, origin: str) -> tuple[Verifier, Seen] | None:
        path = self._path(origin)
        return _parse(_read(path), path) if path.exists() else None

    def _save(self, log_key: Verifier, seen: Seen) -> None:
        value = {"v": 1, "log_key": str(log_key), "epoch": str(seen.epoch), "checkpoint": seen.checkpoint.body()}
        _replace(self._path(log_key.name), json.dumps(value, indent=1).encode() + b"\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
        except OSError as error:
            raise _unusable(self._folder, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _origin_of(data: bytes, *, line: int = 1) -> str:
    """Return the origin that a note claims, to find its key; nothing is believed yet."""
    lines = data.split(b"\n", line + 1)
    return lines[line].decode("utf-8", "replace") if len(lines) > line else ""


def _parse(data: bytes, path: Path) -> tuple[Verifier, Seen]:
    try:
        value = json.loads(data)
        if value["v"] != 1:
            raise ValueError(f"version {value['v']!r}")
        log_key, checkpoint = Verifier.parse(value["log_key"]), parse_body(value["checkpoint"])
        if log_key.name != checkpoint.origin:
            raise ValueError("the key and the checkpoint belong to two logs")
        return log_key, Seen(checkpoint, int(value["epoch"]))
    except (ValueError, KeyError, TypeError, NoteError) as error:
        raise tampered(
            f"{path.name} is damaged: the witness does not know what it saw",
            where="witness.logs",
            found=str(error),
            wanted="what this witness wrote",
            hint="do not delete it: a witness that forgets lets a log go back",
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unusable(path, error) from error


def _replace(path: Path, data: bytes) -> None:
    """Replace a file: its old or its new content is there after a crash, never a mixture."""
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), _MODE)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            with suppress(FileNotFoundError):
                Path(name).unlink()
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"cannot use {path}: {error.strerror}",
        code="disk-full" if error.errno in _NO_ROOM else None,
        reasons=[Reason("witness.folder", str(error.strerror), "a folder that can be read and written")],
    )
