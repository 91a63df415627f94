"""Edge: open a sealed volume, read it, verify it, take it out. Nothing unauthenticated leaves this module.

Steps of `Volume.open`; an error names the part that failed:
  1 head       4,096 bytes, strict, signed                                    format.decode_head
  2 key        a wrap opens under this volume key, and the data key is the one the head commits to
  3 manifest   length and SHA-256 are the head's; records open under the data key; the tree is valid
  4 sizes      every segment is there, a regular file, exactly as long as the head says
  5 name       the head's digest is the one the caller wants; if not, the volume is authentic but *stale*
Steps 1 to 4 fail with `volume-tampered`, step 5 with `volume-stale`. Each record is checked when it is read, from a private copy
(`stored`).

With `audit`, a record must also match its leaf: then not even somebody who knows the key can serve other bytes under
this name. Without it, reading is nearly twice as fast (bench/seal.py) and safe against everybody who does not know the key.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.crypto.keys import Secret
from cloister.errors import InputError, Reason, TamperedError
from cloister.volume import format as fmt
from cloister.volume import keys, layout, names
from cloister.volume.extract import extract
from cloister.volume.stored import MAX_REASONS, RUN, Leaves, Stored
from cloister.volume.types import CHUNK, Kind, Tree

Progress = Callable[[int, int], None]


def peek(path: Path) -> fmt.Head:
    """The head of the volume at `path`, without a key: signed by somebody, not yet known to be yours.

    Raises:
        InputError: there is no volume.
        TamperedError: code `volume-tampered`.
    """
    with Stored(path) as files:
        return files.head()


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


def _open_manifest(files: Stored, head: fmt.Head, data_key: Secret) -> tuple[bytes, bytes]:
    """The plaintext of the manifest and the nodes behind it."""
    stored = files.manifest(head)
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
            what, where = "its manifest is not what was sealed", f"manifest.record {record}"
            raise files.tampered(what, where, "does not authenticate", "sealed bytes") from error
    return b"".join(plain), stored[len(stored) - geometry.nodes_len :]


class _Scratch(threading.local):
    """Buffers of one thread, and the record whose plaintext is in `plain` (-1: none)."""

    def __init__(self) -> None:
        self.stored = memoryview(bytearray(RUN * layout.RECORD))
        self.plain = memoryview(bytearray(CHUNK))
        self.record = -1


class Volume:
    """An open volume (`types.Volume`). A context manager; reads may run in many threads and in forked processes."""

    def __init__(
        self, files: Stored, head: fmt.Head, data_key: Secret, tree: Tree, nodes: bytes, *, audit: bool
    ) -> None:
        """Use `Volume.open`."""
        self._files, self._head, self._tree = files, head, tree
        self._data_key, self._audit = data_key, audit
        self._layout, self._context = head.layout, head.context
        self._ciphers: dict[int, AESGCM] = {}
        self._leaves = Leaves(files, head.layout, nodes)
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
        files = Stored(path)
        try:
            head = files.head()
            data_key = unwrap(head, key, name=files.name)
            plain, nodes = _open_manifest(files, head, data_key)
            tree = fmt.decode_manifest(plain, data_len=head.data_len, name=files.name)
            files.open_segments(head.layout)
            if expect is not None and head.digest != expect:
                raise files.not_registered(head, expect, generation)
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
        plain = memoryview(bytearray(CHUNK))
        findings: list[Reason] = []
        for first, records in self._files.runs(self._layout, self._scratch.stored):
            for record, sealed in enumerate(records, first):
                try:
                    self._decrypt(record, sealed, plain, audit=audit)
                except TamperedError as error:
                    findings += error.reasons
            if len(findings) >= MAX_REASONS:
                break
            if progress:
                progress((first + len(records)) * CHUNK, self.data_len)
        if findings:
            raise self._files.broken(findings)

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
            count = min(wanted, RUN, layout.RECORDS_PER_SEGMENT - place)
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
        if audit and not self._leaves.fits(record, sealed):
            raise self._broken_record(record, "does not match its leaf")
        try:
            self._cipher(record // layout.RECORDS_PER_SEGMENT).decrypt_into(
                keys.record_nonce(record), sealed, self._context, into
            )
        except InvalidTag as error:
            raise self._broken_record(record, "does not authenticate") from error

    def _broken_record(self, record: int, found: str) -> TamperedError:
        segment, place = divmod(record, layout.RECORDS_PER_SEGMENT)
        what = f"record {place} of segment {segment} {found}"
        return self._files.tampered(what, layout.record_name(record), found, "the sealed bytes", self._affected(record))

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
