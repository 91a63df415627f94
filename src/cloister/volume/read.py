"""Edge: open a sealed volume, read it, verify it, take it out. Nothing unauthenticated leaves this module.

Steps of `Volume.open`; an error names the part that failed:
  1 head       4,096 bytes, strict, signed                                    format.decode_head
  2 key        a wrap opens under this volume key, and the data key is the one the head commits to
  3 manifest   length and SHA-256 are the head's; records open under the data key; the tree is valid
  4 sizes      every segment is there, a regular file, exactly as long as the head says
  5 name       the head's digest is the one the caller wants; if not, the volume is authentic but *stale*
Steps 1 to 4 fail with `volume-tampered`, step 5 with `volume-stale`. Each record is checked when it is read, into a buffer of
ours: stored bytes may change at any time, and a file that shrinks is an error, never a signal (no mmap).

With `audit`, a record must also match its leaf: then not even somebody who knows the key can serve other bytes under
this name. Without it, reading is 3x faster and safe against everybody who does not know the key.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.crypto.keys import Secret
from cloister.errors import InputError, MachineError, Reason, TamperedError
from cloister.volume import format as fmt
from cloister.volume import keys, layout, names
from cloister.volume.extract import extract
from cloister.volume.types import CHUNK, Kind, Tree

_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_RUN: Final = 16
"""Records per read of the disk: 1 MiB, the largest request of FUSE."""
_KEEP_OPEN: Final = 512
"""Segments (32 GiB) whose files stay open; RLIMIT_NOFILE is 1,024 by default. Others are opened for each read."""
_MAX_REASONS: Final = 100

Progress = Callable[[int, int], None]


def peek(path: Path) -> fmt.Head:
    """The head of the volume at `path`, without a key: signed by somebody, not yet known to be yours.

    Raises:
        InputError: there is no volume.
        TamperedError: code `volume-tampered`.
    """
    with _Files(path) as files:
        return files.head()


class _Files:
    """The files of one volume. Sizes are known beforehand: what is shorter, longer, missing or special is refused."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._folder = _open_folder(path)
        self._data: int | None = None
        self._kept: dict[int, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close everything; a second call does nothing."""
        descriptors = [*self._kept.values()]
        if self._data is not None:
            descriptors.append(self._data)
        if self._folder >= 0:
            descriptors.append(self._folder)
        self._kept, self._data, self._folder = {}, None, -1
        for descriptor in descriptors:
            os.close(descriptor)

    def tampered(self, what: str, where: str, found: str, wanted: str, hint: str = "") -> TamperedError:
        """The error for one finding."""
        return fmt.tampered(self.name, what, [Reason(where, found, wanted, hint)])

    @contextmanager
    def _reading(self, where: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
                raise self.tampered(f"its {where} is missing", where, reason, "a regular file") from error
            raise MachineError(f"{self.name}: its {where} cannot be read: {reason}") from error

    def _open(self, file_name: str, folder: int, where: str, size: int) -> int:
        with self._reading(where):
            descriptor = os.open(file_name, _READ, dir_fd=folder)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            os.close(descriptor)
            found = f"{status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "something else"
            raise self.tampered(
                f"its {where} is not what was sealed", f"{where}.size", found, f"a file of {size} bytes"
            )
        return descriptor

    def _whole(self, file_name: str, size: int) -> bytes:
        descriptor = self._open(file_name, self._folder, file_name, size)
        try:
            data = bytearray(size)
            self._fill(descriptor, memoryview(data), 0, file_name)
            return bytes(data)
        finally:
            os.close(descriptor)

    def _fill(self, descriptor: int, into: memoryview, offset: int, where: str) -> None:
        while into:
            with self._reading(where):
                count = os.preadv(descriptor, (into,), offset)
            if not count:
                raise self.tampered(f"its {where} is not what was sealed", where, "shorter than before", "all of it")
            into, offset = into[count:], offset + count

    def head(self) -> fmt.Head:
        return fmt.decode_head(self._whole("head", layout.HEAD), name=self.name)

    def manifest(self, size: int) -> bytes:
        return self._whole("manifest", size)

    def open_segments(self, geometry: layout.Layout) -> None:
        """Check the size of every segment, and keep the first ones open."""
        with self._reading("data"):
            self._data = os.open("data", _FOLDER | os.O_NOFOLLOW, dir_fd=self._folder)
        for segment in range(geometry.segments):
            descriptor = self._open_segment(segment, geometry)
            if segment < _KEEP_OPEN:
                self._kept[segment] = descriptor
            else:
                os.close(descriptor)

    def _open_segment(self, segment: int, geometry: layout.Layout) -> int:
        if self._data is None:
            raise ValueError("the volume is closed")
        file_name = layout.segment_name(segment)
        return self._open(file_name, self._data, f"data/{file_name}", geometry.segment_size(segment))

    def read_segment(self, segment: int, offset: int, into: memoryview, geometry: layout.Layout) -> None:
        """Fill `into` from `offset` of the file of one segment."""
        where = f"data/{layout.segment_name(segment)}"
        kept = self._kept.get(segment)
        if kept is not None:
            self._fill(kept, into, offset, where)
            return
        descriptor = self._open_segment(segment, geometry)
        try:
            self._fill(descriptor, into, offset, where)
        finally:
            os.close(descriptor)


def _open_folder(path: Path) -> int:
    try:
        return os.open(path, _FOLDER)
    except OSError as error:
        raise InputError(
            f"{path} is no volume: {os.strerror(error.errno or 0)}", hint="a volume is a folder made by `cloister seal`"
        ) from error


def unwrap(head: fmt.Head, key: Secret, *, name: str) -> Secret:
    """The data key in `head`, opened with the volume key.

    Raises:
        TamperedError: no wrap opens, or it holds another data key than the head commits to.
    """
    marked = keys.kek_id(key, salt=head.salt, identity=head.identity)
    wraps = [wrap for wrap in head.wraps if wrap.kek_id == marked]
    for wrap in wraps:
        data_key = keys.unwrap_data_key(
            key, wrap.wrapped, nonce=wrap.nonce, salt=head.salt, identity=head.identity, context=head.context
        )
        if data_key is not None and keys.commitment(data_key, head.salt) == head.commitment:
            return data_key
    found = "a damaged wrap of this key" if wraps else f"{len(head.wraps)} wraps of other keys"
    finding = Reason("head.wraps", found, "a wrap that opens under this volume key")
    raise fmt.tampered(
        name,
        "it does not open under this key",
        [finding],
        hint="give the key it was sealed or re-wrapped under; if it is that key, the head was changed",
    )


def _open_manifest(files: _Files, head: fmt.Head, data_key: Secret, stored: bytes) -> tuple[bytes, bytes]:
    """The plaintext of the manifest and the nodes behind it."""
    what = "its manifest is not what was sealed"
    if hashlib.sha256(stored).digest() != head.manifest_sha256:
        raise files.tampered(what, "manifest", "other bytes", f"SHA-256 {head.manifest_sha256.hex()}")
    geometry, context = head.layout, head.manifest_context
    view, plain = memoryview(stored), []
    for record in range(geometry.manifest_records(head.manifest_len)):
        segment, place = divmod(record, layout.RECORDS_PER_SEGMENT)
        if place == 0:
            cipher = keys.record_cipher(data_key, head.salt, keys.MANIFEST, segment)
        sealed = view[record * layout.RECORD : (record + 1) * layout.RECORD]
        try:
            plain.append(cipher.decrypt(keys.record_nonce(record), sealed, context))
        except InvalidTag as error:
            raise files.tampered(what, f"manifest.record {record}", "does not authenticate", "sealed bytes") from error
    return b"".join(plain), stored[len(stored) - geometry.nodes_len :]


def _stale(name: str, head: fmt.Head, expect: str, generation: int | None) -> TamperedError:
    wanted = expect if generation is None else f"generation {generation}, {expect}"
    return TamperedError(
        f"{name}: authentic, but not the version that is registered",
        code="volume-stale",
        reasons=[Reason("head.digest", f"generation {head.generation}, {head.digest}", wanted)],
        hint="somebody put an old or a foreign version in its place; take the registered one",
    )


class _Scratch(threading.local):
    """Buffers of one thread, and the record whose plaintext is in `plain` (-1: none)."""

    def __init__(self) -> None:
        self.stored = memoryview(bytearray(_RUN * layout.RECORD))
        self.plain = memoryview(bytearray(CHUNK))
        self.record = -1


class Volume:
    """An open volume (`types.Volume`). A context manager; reads may run in many threads and in forked processes."""

    def __init__(
        self, files: _Files, head: fmt.Head, data_key: Secret, tree: Tree, nodes: bytes, *, audit: bool
    ) -> None:
        """Use `Volume.open`."""
        self._files, self._head, self._tree = files, head, tree
        self._data_key, self._nodes, self._audit = data_key, nodes, audit
        self._layout, self._context = head.layout, head.context
        self._ciphers: dict[int, AESGCM] = {}
        self._leaves: dict[int, bytes] = {}
        self._scratch = _Scratch()

    @classmethod
    def open(
        cls, path: Path, key: Secret, *, expect: str | None, generation: int | None = None, audit: bool = False
    ) -> Volume:
        """Open the volume at `path` under the volume key `key`.

        `expect` is the digest that a contract or the broker names; None takes any authentic version and must not be used
        where rollback matters. `generation` only makes the message about a stale volume clearer.

        Raises:
            InputError: there is no volume at `path`, or `audit` of a volume that was sealed without leaves.
            TamperedError: code `volume-tampered` or `volume-stale`.
            ValueError: a key of the wrong length.
        """
        keys.check_volume_key(key)
        files = _Files(path)
        try:
            head = files.head()
            data_key = unwrap(head, key, name=files.name)
            stored = files.manifest(head.manifest_len)
            plain, nodes = _open_manifest(files, head, data_key, stored)
            tree = fmt.decode_manifest(plain, data_len=head.data_len, name=files.name)
            files.open_segments(head.layout)
            if expect is not None and head.digest != expect:
                raise _stale(files.name, head, expect, generation)
            if audit and head.suite != fmt.SUITE_LEAVES:
                raise InputError(f"{path} was sealed without leaves: it cannot be audited", hint="seal it with leaves")
            return cls(files, head, data_key, tree, nodes, audit=audit)
        except BaseException:
            files.close()
            raise

    def __enter__(self) -> Volume:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Volume({self._files.name!r}, {self.digest}, generation {self.generation})"

    def close(self) -> None:
        """Close the files; reads fail afterwards."""
        self._files.close()
        self._ciphers.clear()
        self._scratch = _Scratch()

    @property
    def head(self) -> fmt.Head:
        return self._head

    @property
    def digest(self) -> str:
        """The name of the volume."""
        return self._head.digest

    @property
    def generation(self) -> int:
        return self._head.generation

    @property
    def volume_id(self) -> bytes:
        return self._head.volume_id

    @property
    def tree(self) -> Tree:
        return self._tree

    @property
    def data_len(self) -> int:
        return self._head.data_len

    @property
    def chunk(self) -> int:
        return CHUNK

    # --- whole things ---

    def file(self, path: str | bytes) -> bytes:
        """The bytes of one file.

        Raises:
            InputError: there is no such file (links are not followed).
            TamperedError, MachineError: as `read_into`.
        """
        index = self._tree.find(path)
        if index is None or self._tree.kind[index] != Kind.FILE:
            shown = path if isinstance(path, str) else names.shown(path)
            raise InputError(f"{self._files.name} holds no file {shown}")
        return self.read(self._tree.data_off[index], self._tree.size[index])

    def extract(self, target: Path, *, progress: Progress | None = None) -> None:
        """Write the tree as the new folder `target`; see `extract.extract`."""
        extract(self, target, progress=progress)

    def verify(self, progress: Progress | None = None) -> None:
        """Read every record, and with leaves compare each: the volume holds what its name says, against everybody.

        Raises:
            TamperedError: code `volume-tampered`, with all broken records (the first hundred).
            MachineError: the disk does not answer.
        """
        audit = self._head.suite == fmt.SUITE_LEAVES
        scratch, plain = self._scratch, memoryview(bytearray(CHUNK))
        findings: list[Reason] = []
        for segment in range(self._layout.segments):
            first, count = segment * layout.RECORDS_PER_SEGMENT, self._layout.records_in(segment)
            for place in range(0, count, _RUN):
                run = min(_RUN, count - place)
                stored = scratch.stored[: run * layout.RECORD]
                self._files.read_segment(segment, place * layout.RECORD, stored, self._layout)
                for i in range(run):
                    sealed = stored[i * layout.RECORD : (i + 1) * layout.RECORD]
                    try:
                        self._decrypt(first + place + i, sealed, plain, audit=audit)
                    except TamperedError as error:
                        findings += error.reasons
                if len(findings) >= _MAX_REASONS:
                    break
                if progress:
                    progress((first + place + run) * CHUNK, self.data_len)
        if findings:
            findings = list(dict.fromkeys(findings))[:_MAX_REASONS]
            raise TamperedError(
                f"{self._files.name}: {len(findings)} parts of it are not what was sealed",
                code="volume-tampered",
                reasons=findings,
                hint="take another copy of the volume",
            )

    # --- reading ---

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` of the linear space; errors as `read_into`."""
        if size < 0:
            raise ValueError(f"size {size}")
        data = bytearray(size)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset` of the linear space. On any failure `into` is zeroed.

        Raises:
            TamperedError: code `volume-tampered`: the record, its segment, and the file it belongs to.
            MachineError: the disk does not answer.
            ValueError: out of range, not writable, or closed.
        """
        target = into.cast("B") if into.format != "B" or into.ndim != 1 else into
        if offset < 0 or offset + len(target) > self.data_len:
            raise ValueError(f"bytes {offset}..{offset + len(target)} of a linear space of {self.data_len}")
        done = False
        try:
            self._fill(offset, target)
            done = True
        finally:
            if not done:  # decrypt_into writes before it checks the tag
                target[:] = bytes(len(target))

    def _fill(self, offset: int, into: memoryview) -> None:
        scratch = self._scratch
        while into:
            record, within = divmod(offset, CHUNK)
            if record == scratch.record:
                count = min(CHUNK - within, len(into))
                into[:count] = scratch.plain[within : within + count]
                into, offset = into[count:], offset + count
                continue
            place = record % layout.RECORDS_PER_SEGMENT
            wanted = -(-(within + len(into)) // CHUNK)
            count = min(wanted, _RUN, layout.RECORDS_PER_SEGMENT - place)
            stored = scratch.stored[: count * layout.RECORD]
            segment = record // layout.RECORDS_PER_SEGMENT
            self._files.read_segment(segment, place * layout.RECORD, stored, self._layout)
            for i in range(count):
                sealed = stored[i * layout.RECORD : (i + 1) * layout.RECORD]
                if within == 0 and len(into) >= CHUNK:
                    self._decrypt(record + i, sealed, into[:CHUNK], audit=self._audit)
                    into, offset = into[CHUNK:], offset + CHUNK
                else:
                    scratch.record = -1
                    self._decrypt(record + i, sealed, scratch.plain, audit=self._audit)
                    scratch.record = record + i
                    part = min(CHUNK - within, len(into))
                    into[:part] = scratch.plain[within : within + part]
                    into, offset, within = into[part:], offset + part, 0

    def _cipher(self, segment: int) -> AESGCM:
        cipher = self._ciphers.get(segment)
        if cipher is None:
            cipher = keys.record_cipher(self._data_key, self._head.salt, keys.DATA, segment)
            self._ciphers[segment] = cipher
        return cipher

    def _decrypt(self, record: int, sealed: memoryview, into: memoryview, *, audit: bool) -> None:
        segment, place = divmod(record, layout.RECORDS_PER_SEGMENT)
        if audit and not self._leaf_fits(segment, place, sealed):
            raise self._broken_record(record, "does not match its leaf")
        try:
            self._cipher(segment).decrypt_into(keys.record_nonce(record), sealed, self._context, into)
        except InvalidTag as error:
            raise self._broken_record(record, "does not authenticate") from error

    def _leaf_fits(self, segment: int, place: int, sealed: memoryview) -> bool:
        leaves = self._leaves.get(segment)
        if leaves is None:
            count = self._layout.records_in(segment)
            data = bytearray(count * layout.LEAF)
            self._files.read_segment(segment, count * layout.RECORD, memoryview(data), self._layout)
            leaves = bytes(data)
            if fmt.leaves_node(leaves) != self._nodes[segment * layout.LEAF : (segment + 1) * layout.LEAF]:
                where = f"data/{layout.segment_name(segment)}.leaves"
                raise self._files.tampered(
                    "its leaves are not what was sealed", where, "other bytes", "the sealed ones"
                )
            self._leaves[segment] = leaves
        return fmt.leaf(sealed) == leaves[place * layout.LEAF : (place + 1) * layout.LEAF]

    def _broken_record(self, record: int, found: str) -> TamperedError:
        segment, place = divmod(record, layout.RECORDS_PER_SEGMENT)
        where = f"data/{layout.segment_name(segment)}.record {place}"
        return self._files.tampered(
            f"record {place} of segment {segment} {found}", where, found, "the sealed bytes", self._affected(record)
        )

    def _affected(self, record: int) -> str:
        """Which files have data in a record."""
        tree, start = self._tree, record * CHUNK
        with_data = [i for i in range(len(tree)) if tree.kind[i] == Kind.FILE and tree.size[i]]
        at = max(bisect_right(with_data, start, key=tree.data_off.__getitem__) - 1, 0)
        paths = []
        for index in with_data[at:]:
            if tree.data_off[index] >= start + CHUNK:
                break
            if tree.data_off[index] + tree.size[index] > start:
                paths.append(names.shown(tree.path(index)))
        if not paths:
            return "no file lies there, only padding"
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        return f"affected: {', '.join(paths[:3])}{more}"
