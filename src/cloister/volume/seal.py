"""Edge: a folder becomes a sealed volume, in one pass and with bounded memory.

Steps; until the last one the target is untouched, whatever happens:
  1 look      `scan` lists everything that cannot be sealed
  2 draw      a new data key and salt: an interrupted seal is never continued, so no key meets a nonce twice
  3 data      read files into the linear space, encrypt, leave, write; a file that differs from step 1 ends it
  4 manifest  the same records under another key; then the head, which binds both and is signed
  5 durable   every file and folder is on the disk
  6 name      one rename: NOREPLACE for a new volume, EXCHANGE for a successor (`disk`)

Speed: half a MiB of plaintext at a time stays in the second-level cache between read, AES, BLAKE3 and write. Of a big file in memory,
reading and writing take three fifths of the time, BLAKE3 a fifth, AES-GCM a seventh, Python 3 % (bench/seal.py). One thread does all of it: a second one
that hashes or writes gained nothing on two busy cores.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.crypto.keys import KEY_BYTES, Secret
from cloister.errors import InputError, MachineError, Reason
from cloister.volume import format as fmt
from cloister.volume import keys, layout, names
from cloister.volume.disk import Disk, growing, writing
from cloister.volume.read import peek
from cloister.volume.scan import Scan, scan, unsealable
from cloister.volume.types import BLOCK, CHUNK, Kind

_BATCH: Final = 8
"""Chunks per step: 2 x 512 KiB fit the second-level cache (1 MiB); 1,024 is a multiple, so a step stays in its segment."""

_UNSYNCED: Final = 64
"""Segments written before they are made durable together: 4 GiB, so that the disk works while we encrypt."""

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
# A named pipe that took the place of a file must not make us wait.
_FILE: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_ZEROS: Final = bytes(_BATCH * CHUNK)

Progress = Callable[[int, int], None]
"""Called with (bytes of the linear space done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A finished volume. `digest` is its name: contracts and the broker know it by this."""

    digest: str
    generation: int
    volume_id: bytes
    files: int
    size_bytes: int
    """Bytes of the files as they were, before padding."""


def seal(
    source: Path,
    target: Path,
    *,
    key: Secret,
    generation: int = 1,
    volume_id: bytes | None = None,
    audited: bool = True,
    replace: bool = False,
    progress: Progress | None = None,
) -> Sealed:
    """Seal `source` (a folder, or one file) as the volume `target`, a folder that is made.

    `key` is the volume key; the data are encrypted under a random key that it wraps. `audited` adds a BLAKE3 leaf per
    record, so that the name binds the bytes even against holders of the key (docs/volumes.md 3). With `replace` a
    volume at `target` gives way in one step; without it `target` must not exist.

    Raises:
        InputError: code `source-unsealable` with all findings; code `input` if `target` cannot be made or is in the way.
        MachineError: code `disk-full`, or `machine`.
        ValueError: a key or id of the wrong length, a generation below 1.
    """
    return Sealer().seal(
        source,
        target,
        key=key,
        generation=generation,
        volume_id=volume_id,
        audited=audited,
        replace=replace,
        progress=progress,
    )


@dataclass(frozen=True, slots=True)
class Sealer:
    """`seal` with its edges named. `insecure_random` makes keys: only test vectors may repeat it."""

    disk: Disk = field(default_factory=Disk)
    insecure_random: Callable[[int], bytes] = secrets.token_bytes

    def seal(
        self,
        source: Path,
        target: Path,
        *,
        key: Secret,
        generation: int = 1,
        volume_id: bytes | None = None,
        audited: bool = True,
        replace: bool = False,
        progress: Progress | None = None,
    ) -> Sealed:
        """As the function `seal`."""
        keys.check_volume_key(key)
        if not 1 <= generation < 1 << 63:
            raise ValueError(f"generation {generation}, wanted 1 or more")
        if volume_id is not None and len(volume_id) != 16:
            raise ValueError(f"a volume id has 16 bytes, this one {len(volume_id)}")
        target = Path(os.path.abspath(target))  # noqa: PTH100  # resolve() would follow a link at the target itself
        _check_target(source, target, replace=replace)
        seen = scan(source)
        draft = _Draft.draw(self.insecure_random, seen, key, generation, volume_id, leaves=audited)
        with writing(target), growing(target, self.disk) as folder:
            nodes = _write_data(self.disk, folder / "data", seen, draft, source, progress)
            head = _write_rest(self.disk, folder, seen, draft, nodes)
            self.disk.sync_folder(folder / "data")
            self.disk.sync_folder(folder)
            if replace and target.exists():
                self.disk.exchange(folder, target)
            else:
                self.disk.name(folder, target)
            self._confirm(target)
        files = [size for kind, size in zip(seen.tree.kind, seen.tree.size, strict=True) if kind == Kind.FILE]
        return Sealed(head.digest, generation, head.volume_id, len(files), sum(files))

    def _confirm(self, target: Path) -> None:
        """Make the new name durable. It is visible by now, so a failure here must not say that nothing was changed."""
        try:
            self.disk.sync_folder(target.parent)
        except OSError as error:
            raise MachineError(
                f"{target} is complete, but the disk did not confirm its name: {os.strerror(error.errno or 0)}",
                hint="look after the disk, then verify the volume",
            ) from error


def _check_target(source: Path, target: Path, *, replace: bool) -> None:
    # By identity, not by name: the source may be a folder that is open in another mount namespace (/proc/PID/fd/N).
    here = Path(os.path.realpath(target.parent))
    with writing(target):
        inside = source.is_dir() and any(
            os.path.samestat(source.stat(), folder.stat()) for folder in (here, *here.parents)
        )
    if inside:
        raise InputError(f"{target} lies in {source}: a volume cannot be sealed into its own source")
    if os.path.lexists(target):
        if not replace:
            raise InputError(f"{target} exists", hint="choose another name, or say that it is to be replaced")
        if target.is_symlink():
            raise InputError(f"{target} is a link; name the volume itself")
        peek(target)  # what is not a volume is never replaced


@dataclass(frozen=True, slots=True)
class _Draft:
    """A head whose manifest digest and signature are still missing, and the keys to go on with."""

    head: fmt.Head
    key: Secret
    data_key: Secret

    @classmethod
    def draw(
        cls,
        random: Callable[[int], bytes],
        seen: Scan,
        key: Secret,
        generation: int,
        volume_id: bytes | None,
        *,
        leaves: bool,
    ) -> _Draft:
        """Draw data key, salt and (unless given) volume id."""
        data_key, salt = Secret(random(KEY_BYTES)), random(32)
        volume_id = random(16) if volume_id is None else volume_id
        data_len = layout.padded(fmt.content_len(seen.tree))
        signer = keys.signer(key, volume_id).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        head = fmt.Head(
            suite=fmt.SUITE_LEAVES if leaves else fmt.SUITE_PLAIN,
            volume_id=volume_id,
            generation=generation,
            salt=salt,
            commitment=keys.commitment(data_key, salt),
            data_len=data_len,
            manifest_len=0,
            manifest_sha256=bytes(32),
            signer=signer,
            signature=bytes(64),
            wraps=(),
        )
        nonce = random(keys.NONCE)
        wrapped = keys.wrap_data_key(
            key, data_key, nonce=nonce, salt=salt, identity=head.identity, context=head.context
        )
        wrap = fmt.Wrap(keys.kek_id(key, salt=salt, identity=head.identity), nonce, wrapped)
        return cls(replace(head, wraps=(wrap,)), key, data_key)


def _write_rest(disk: Disk, folder: Path, seen: Scan, draft: _Draft, nodes: bytes) -> fmt.Head:
    """Write `manifest` and `head`; the finished head."""
    plain = fmt.encode_manifest(seen.tree)
    stored_len = len(plain) // CHUNK * layout.RECORD + len(nodes)
    if stored_len > layout.MAX_MANIFEST:
        raise InputError(f"too many entries for one volume: a manifest of {stored_len} bytes")
    head = replace(draft.head, manifest_len=stored_len)
    stored = encrypt_manifest(plain, head, draft.data_key) + nodes
    head = replace(head, manifest_sha256=hashlib.sha256(stored).digest())
    head = replace(head, signature=keys.signer(draft.key, head.volume_id).sign(head.signed))
    disk.write_file(folder / "manifest", stored)
    disk.write_file(folder / "head", head.encode())
    return head


def encrypt_manifest(plain: bytes, head: fmt.Head, data_key: Secret) -> bytes:
    """The records of a padded manifest; `head` needs its lengths and signer, not yet its digest and signature."""
    context = head.manifest_context
    records = []
    for record, at in enumerate(range(0, len(plain), CHUNK)):
        if record % layout.RECORDS_PER_SEGMENT == 0:
            segment = record // layout.RECORDS_PER_SEGMENT
            cipher = keys.record_cipher(data_key, head.salt, keys.MANIFEST, segment)
        records.append(cipher.encrypt(keys.record_nonce(record), plain[at : at + CHUNK], context))
    return b"".join(records)


def _write_data(disk: Disk, folder: Path, seen: Scan, draft: _Draft, source: Path, progress: Progress | None) -> bytes:
    """Write all segments; the nodes of their leaves (empty without leaves)."""
    disk.make_folder(folder)
    with _DataWriter(disk, folder, draft, progress) as writer:
        _Reader(seen, source, writer).run()
        return writer.finish()


class _DataWriter:
    """The linear space, filled from the front: give bytes into `space`, tell `filled`."""

    def __init__(self, disk: Disk, folder: Path, draft: _Draft, progress: Progress | None) -> None:
        self._disk, self._folder, self._progress = disk, folder, progress
        self._data_key, self._salt = draft.data_key, draft.head.salt
        self._context, self._layout = draft.head.context, draft.head.layout
        self._plain = memoryview(mmap.mmap(-1, _BATCH * CHUNK))
        self._stored = memoryview(mmap.mmap(-1, _BATCH * layout.RECORD))
        self._slots = [
            (self._plain[i * CHUNK : (i + 1) * CHUNK], self._stored[i * layout.RECORD : (i + 1) * layout.RECORD])
            for i in range(_BATCH)
        ]
        self._at = 0  # bytes of the current batch that are filled
        self._record = 0
        self._leaves: list[bytes] = []
        self._nodes: list[bytes] = []
        self._segment = -1
        self._unsynced: list[int] = []

    def __enter__(self) -> _DataWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        while self._unsynced:
            os.close(self._unsynced.pop())

    @property
    def space(self) -> memoryview:
        """Where the next bytes of the linear space go; never empty."""
        return self._plain[self._at :]

    def filled(self, count: int) -> None:
        """The first `count` bytes of `space` are data now."""
        self._at += count
        if self._at == len(self._plain):
            self._flush()

    def align(self) -> None:
        """Zeros up to the next multiple of 4 KiB."""
        gap = -self._at % BLOCK
        if gap:
            self._plain[self._at : self._at + gap] = _ZEROS[:gap]
            self.filled(gap)

    def finish(self) -> bytes:
        """Zeros up to the padded length; then everything is durable. The nodes."""
        while rest := self._layout.data_len - self._record * CHUNK:
            self._plain[self._at :] = _ZEROS[self._at :]
            self._at = min(len(self._plain), rest)
            self._flush()
        if self._segment >= 0:
            self._end_segment()
        self._sync()
        return b"".join(self._nodes)

    def _flush(self) -> None:
        """Encrypt, hash and write the whole chunks of the batch."""
        count, first = self._at // CHUNK, self._record
        if first % layout.RECORDS_PER_SEGMENT == 0:
            self._start_segment()
        context, encrypt_into, leaves = self._context, self._encrypt_into, self._leaves
        for record, (plain, stored) in enumerate(self._slots[:count], first):
            encrypt_into(keys.record_nonce(record), plain, context, stored)
            if self._layout.leaves:
                leaves.append(fmt.leaf(stored))  # while it is in the cache
        self._disk.write(self._unsynced[-1], self._stored[: count * layout.RECORD])
        self._record += count
        self._at = 0
        if self._progress:
            self._progress(self._record * CHUNK, self._layout.data_len)

    def _start_segment(self) -> None:
        if self._segment >= 0:
            self._end_segment()
        if len(self._unsynced) >= _UNSYNCED:
            self._sync()
        self._segment += 1
        self._encrypt_into = keys.record_cipher(self._data_key, self._salt, keys.DATA, self._segment).encrypt_into
        self._unsynced.append(self._disk.create(self._folder / layout.segment_name(self._segment)))

    def _end_segment(self) -> None:
        if self._layout.leaves:
            leaves = b"".join(self._leaves)
            self._leaves.clear()
            self._nodes.append(fmt.leaves_node(leaves))
            self._disk.write(self._unsynced[-1], leaves)

    def _sync(self) -> None:
        for descriptor in self._unsynced:
            self._disk.sync(descriptor)
        while self._unsynced:
            os.close(self._unsynced.pop())


class _Reader:
    """Reads the files of a scan, in order, into a `_DataWriter`, and compares each with what the scan saw."""

    def __init__(self, seen: Scan, source: Path, writer: _DataWriter) -> None:
        self._seen, self._source, self._writer = seen, source, writer
        self._problems: list[Reason] = []

    def run(self) -> None:
        """Read everything.

        Raises:
            InputError: code `source-unsealable` with all files that changed or cannot be read.
        """
        base = os.open(self._seen.base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._files(base)
            if not self._seen.single:
                self._folders(base)
        finally:
            os.close(base)
        if self._problems:
            raise unsealable(self._source, self._problems)

    def _problem(self, index: int, found: str, wanted: str) -> None:
        self._problems.append(Reason(names.shown(self._seen.tree.path(index)), found, wanted))

    def _files(self, base: int) -> None:
        tree = self._seen.tree
        for directory, kind in enumerate(tree.kind):
            if kind != Kind.DIRECTORY:
                continue
            files = [child for child in tree.children(directory) if tree.kind[child] == Kind.FILE]
            if not files:
                continue
            try:
                folder = os.open(tree.path(directory) or b".", _FOLDER, dir_fd=base)
            except OSError as error:
                self._unreadable(directory, error)
                continue
            try:
                for index in files:
                    self._file(folder, index)
            finally:
                os.close(folder)

    def _file(self, folder: int, index: int) -> None:
        try:
            descriptor = os.open(self._seen.tree.name(index), _FILE, dir_fd=folder)
        except OSError as error:
            self._unreadable(index, error)
            return
        try:
            # After the first problem nothing more is copied, but everything is still looked at: all are reported.
            rest = 0 if self._problems else self._copy(index, descriptor)
            self._compare(index, os.fstat(descriptor), rest)
        finally:
            os.close(descriptor)

    def _copy(self, index: int, descriptor: int) -> int:
        """Read a file into the linear space; how many bytes were missing (negative: too many)."""
        writer = self._writer
        rest = size = self._seen.tree.size[index]
        while rest:
            try:
                count = os.readv(descriptor, (writer.space[:rest],))
            except OSError as error:
                self._unreadable(index, error)
                return 0
            if not count:
                return rest
            rest -= count
            writer.filled(count)
        writer.align()
        # Files of /proc and /sys say size 0 and are not empty.
        return 0 if size else -len(os.read(descriptor, 1))

    def _compare(self, index: int, status: os.stat_result, rest: int) -> None:
        seen = self._seen
        if (
            rest
            or status.st_ino != seen.inode[index]
            or status.st_mtime_ns != seen.tree.mtime_ns[index]
            or status.st_ctime_ns != seen.ctime_ns[index]
            or (seen.tree.kind[index] == Kind.FILE and status.st_size != seen.tree.size[index])
        ):
            what = "file" if seen.tree.kind[index] == Kind.FILE else "folder"
            self._problem(index, f"a {what} that changed while it was read", "as it was when the seal began")

    def _folders(self, base: int) -> None:
        """A file that was added or removed meanwhile shows in its folder."""
        tree = self._seen.tree
        for index, kind in enumerate(tree.kind):
            if kind == Kind.DIRECTORY:
                try:
                    status = os.stat(tree.path(index) or b".", dir_fd=base, follow_symlinks=False)
                except OSError as error:
                    self._unreadable(index, error)
                else:
                    self._compare(index, status, 0)

    def _unreadable(self, index: int, error: OSError) -> None:
        self._problem(index, f"cannot be read: {os.strerror(error.errno or 0)}", "as it was when the seal began")
