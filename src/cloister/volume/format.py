"""Bytes <-> frozen head and tree. Pure and strict: what decodes encodes to the same bytes again.

Format: docs/format/volume-v1.md 3 (head) and 4 (manifest). `decode_head` says that bytes are a head that somebody
signed, `decode_manifest` that bytes are a valid tree; whether they are the *wanted* ones is the reader's question.

Steps of `decode_head`, all findings together:
  1 size, magic, version, fields that are fixed in version 1        3.1
  2 suite known, lengths possible (`layout`)                        3.2
  3 number of wraps, zeros behind them                              3.3
  4 the Ed25519 signature over bytes 0..184 holds                   3.4

Steps of `decode_manifest` (a hostile owner wrote it; nothing of it is used before all of them passed):
  1 magic, lengths of columns, names and targets, zero padding of the Padmé length    4.1
  2 root first; parents earlier, folders, never decreasing; names allowed and sorted  4.2, 4.3
  3 kinds, modes, sizes; targets that stay inside; path lengths                       4.3
  4 the offsets that follow from the sizes fill exactly the head's `data_len`         4.4
Offsets are not stored: data lie in the order of entries, so overlaps and misalignment cannot be written down.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Literal

from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloister.errors import Reason, TamperedError
from cloister.volume import layout, names
from cloister.volume.types import CHUNK, Kind, Tree

MAGIC: Final = b"CLSTRVOL"
MANIFEST_MAGIC: Final = b"CLSTRMAN"
VERSION: Final = 1
SUITE_PLAIN: Final = 1
"""AES-256-GCM, HKDF-SHA256, Ed25519; no leaves."""
SUITE_LEAVES: Final = 2
"""Suite 1 and a BLAKE3 leaf per record, bound by the name of the volume."""

NAMED: Final = 248
"""The name of a volume is SHA-256 of this many first bytes; the wraps behind them may change."""
SIGNED: Final = 184
CONTEXT: Final = 72
"""The first bytes of the head, up to and with the salt: associated data of every record and wrap."""

_FIXED: Final = struct.Struct("<8sHHBBH16sQ32s32sQQ32s32s64sH")
_WRAP: Final = struct.Struct("<16s12s48s")
MAX_WRAPS: Final = 50
_MANIFEST: Final = struct.Struct("<8sIIQQ")
_ROW_BYTES: Final = 8 + 8 + 4 + 2 + 1 + 1
MAX_ENTRIES: Final = layout.MAX_MANIFEST // _ROW_BYTES
_MAX_REASONS: Final = 20


@dataclass(frozen=True, slots=True)
class Wrap:
    """The data key, encrypted under one volume key (`keys.wrap_data_key`)."""

    kek_id: bytes  # (16,)
    nonce: bytes  # (12,)
    wrapped: bytes  # (48,)


@dataclass(frozen=True, slots=True)
class Head:
    """The 4,096 bytes that name a volume. `peek` shows it without a key."""

    suite: int
    volume_id: bytes  # (16,)
    generation: int
    salt: bytes  # (32,)
    commitment: bytes  # (32,) of the data key
    data_len: int
    manifest_len: int
    manifest_sha256: bytes  # (32,) of the file `manifest`: ciphertext and, in suite 2, the nodes of the leaves
    signer: bytes  # (32,) Ed25519
    signature: bytes  # (64,) over bytes 0..184
    wraps: tuple[Wrap, ...]

    @property
    def layout(self) -> layout.Layout:
        return layout.Layout(self.data_len, leaves=self.suite == SUITE_LEAVES)

    @property
    def identity(self) -> bytes:
        """Volume id and generation as stored: bytes 16..40."""
        return self.encode()[16:40]

    @property
    def context(self) -> bytes:
        """Associated data of every data record and wrap: bytes 0..72."""
        return self.encode()[:CONTEXT]

    @property
    def manifest_context(self) -> bytes:
        """Associated data of manifest records: bytes 0..120 and the signer, so that the data key vouches for both."""
        return self.encode()[:120] + self.signer

    @property
    def signed(self) -> bytes:
        """What the signature covers: bytes 0..184."""
        return self.encode()[:SIGNED]

    @property
    def digest(self) -> str:
        """The name of the volume: `sha256:` of bytes 0..248."""
        return "sha256:" + hashlib.sha256(self.encode()[:NAMED]).hexdigest()

    def encode(self) -> bytes:
        """The 4,096 bytes of the file `head`."""
        fixed = _FIXED.pack(
            MAGIC,
            VERSION,
            self.suite,
            CHUNK.bit_length() - 1,
            layout.RECORDS_PER_SEGMENT.bit_length() - 1,
            0,
            self.volume_id,
            self.generation,
            self.salt,
            self.commitment,
            self.data_len,
            self.manifest_len,
            self.manifest_sha256,
            self.signer,
            self.signature,
            len(self.wraps),
        )
        wraps = b"".join(_WRAP.pack(wrap.kek_id, wrap.nonce, wrap.wrapped) for wrap in self.wraps)
        return (fixed + wraps).ljust(layout.HEAD, b"\x00")


def tampered(name: str, what: str, reasons: Iterable[Reason], *, hint: str = "") -> TamperedError:
    """The error for a volume `name` of which `what` is not what was sealed."""
    return TamperedError(
        f"{name}: {what}",
        code="volume-tampered",
        reasons=tuple(reasons)[:_MAX_REASONS],
        hint=hint or "take another copy of the volume; nothing of this one was used",
    )


def decode_head(data: bytes, *, name: str = "volume") -> Head:
    """The head in `data`, if somebody signed it.

    Raises:
        TamperedError: code `volume-tampered`, with every finding.
    """
    if len(data) != layout.HEAD:
        finding = Reason("head.size", f"{len(data)} bytes", f"{layout.HEAD} bytes")
        raise tampered(name, "its head is not a head", [finding])
    (
        magic,
        version,
        suite,
        log2_chunk,
        log2_segment,
        flags,
        volume_id,
        generation,
        salt,
        commitment,
        data_len,
        manifest_len,
        manifest_sha256,
        signer,
        signature,
        wrap_count,
    ) = _FIXED.unpack_from(data)
    if magic != MAGIC:
        finding = Reason("head.magic", magic.hex(), MAGIC.hex())
        raise tampered(name, "its head is not a head", [finding])
    findings = []
    for field, found, wanted in (
        ("version", version, VERSION),
        ("log2_chunk", log2_chunk, CHUNK.bit_length() - 1),
        ("log2_chunks_per_segment", log2_segment, layout.RECORDS_PER_SEGMENT.bit_length() - 1),
        ("flags", flags, 0),
    ):
        if found != wanted:
            findings.append(Reason(f"head.{field}", str(found), str(wanted), "a later version of Cloister may know it"))
    if suite not in (SUITE_PLAIN, SUITE_LEAVES):
        findings.append(Reason("head.suite", str(suite), f"{SUITE_PLAIN} or {SUITE_LEAVES}"))
    if generation < 1:
        findings.append(Reason("head.generation", str(generation), "1 or more"))
    try:
        geometry = layout.Layout(data_len, leaves=suite == SUITE_LEAVES)
    except ValueError as error:
        findings.append(Reason("head.data_len", str(data_len), f"a padded length: {error}"))
    else:
        try:
            geometry.manifest_records(manifest_len)
        except ValueError as error:
            findings.append(Reason("head.manifest_len", str(manifest_len), f"a padded length: {error}"))
    if not 1 <= wrap_count <= MAX_WRAPS:
        findings.append(Reason("head.n_wraps", str(wrap_count), f"1..{MAX_WRAPS}"))
        wrap_count = 0
    end = _FIXED.size + wrap_count * _WRAP.size
    if any(data[end:]):
        findings.append(Reason("head.rest", "other bytes", f"zeros from byte {end} on"))
    try:
        Ed25519PublicKey.from_public_bytes(signer).verify(signature, data[:SIGNED])
    except (InvalidSignature, ValueError):
        findings.append(Reason("head.signature", "does not hold", "a signature of `signer` over bytes 0..184"))
    if findings:
        raise tampered(name, "its head is not what was sealed", findings)
    return Head(
        suite=suite,
        volume_id=volume_id,
        generation=generation,
        salt=salt,
        commitment=commitment,
        data_len=data_len,
        manifest_len=manifest_len,
        manifest_sha256=manifest_sha256,
        signer=signer,
        signature=signature,
        wraps=tuple(Wrap(*fields) for fields in _WRAP.iter_unpack(data[_FIXED.size : end])),
    )


def leaf(record: bytes | memoryview) -> bytes:
    """Leaf of one record as it is stored, 32 bytes: BLAKE3 (O'Connor et al., 2020, default mode)."""
    return blake3(record).digest()


def leaves_node(leaves: bytes) -> bytes:
    """Node of one segment: BLAKE3 of a label and its leaves (32 bytes each, in the order of records)."""
    return blake3(b"cloister/volume/leaves/1\x00" + leaves).digest()


# --- manifest ---


def _column(data: memoryview | array[int], code: Literal["q", "Q", "I", "H", "B"]) -> Sequence[int]:
    """A read-only column; stored little-endian, whatever this machine is."""
    column = array(code, bytes(data))
    if sys.byteorder == "big":
        column.byteswap()
    return memoryview(column.tobytes()).cast(code)


def _stored(values: Sequence[int], code: Literal["q", "Q", "I", "H", "B"]) -> bytes:
    column = array(code, values)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def _frozen(column: array[int], code: Literal["q", "Q", "I", "H", "B"]) -> Sequence[int]:
    return memoryview(column.tobytes()).cast(code)


def build_tree(
    *,
    parent: Sequence[int],
    kind: Sequence[int],
    mode: Sequence[int],
    mtime_ns: Sequence[int],
    size: Sequence[int],
    entry_names: Sequence[bytes],
    targets: Mapping[int, bytes],
) -> Tree:
    """A `Tree` of these columns with the offsets that follow from them. It does not judge: `decode_manifest` does."""
    data_off = array("Q")
    end = 0
    for entry_kind, entry_size in zip(kind, size, strict=True):
        if entry_kind == Kind.FILE and entry_size:
            data_off.append(end)
            end += layout.aligned(entry_size)
        else:
            data_off.append(0)
    return Tree(
        parent=_frozen(array("I", parent), "I"),
        kind=_frozen(array("B", kind), "B"),
        mode=_frozen(array("H", mode), "H"),
        mtime_ns=_frozen(array("q", mtime_ns), "q"),
        size=_frozen(array("Q", size), "Q"),
        data_off=_frozen(data_off, "Q"),
        name_off=_frozen(array("Q", accumulate(map(len, entry_names), initial=0)), "Q"),
        names=b"".join(entry_names),
        targets=dict(targets),
    )


def content_len(tree: Tree) -> int:
    """Bytes of the linear space before padding: the end of the last file, rounded up to 4 KiB."""
    return sum(
        layout.aligned(size) for kind, size in zip(tree.kind, tree.size, strict=True) if kind == Kind.FILE and size
    )


def encode_manifest(tree: Tree) -> bytes:
    """The plaintext of the manifest of a valid tree, padded to a Padmé number of chunks."""
    name_len = [tree.name_off[i + 1] - tree.name_off[i] for i in range(len(tree))]
    targets = b"".join(tree.targets[index] for index in sorted(tree.targets))
    plain = b"".join(
        (
            _MANIFEST.pack(MANIFEST_MAGIC, len(tree), 0, len(tree.names), len(targets)),
            _stored(tree.mtime_ns, "q"),
            _stored(tree.size, "Q"),
            _stored(tree.parent, "I"),
            _stored(tree.mode, "H"),
            _stored(tree.kind, "B"),
            _stored(name_len, "B"),
            tree.names,
            targets,
        )
    )
    return plain.ljust(layout.padded(len(plain)), b"\x00")


class _Findings(list[Reason]):
    """Reasons so far; `full` ends the search, because a hostile manifest can break a rule in every entry."""

    def say(self, where: str, found: str, wanted: str) -> None:
        self.append(Reason(f"manifest.{where}", found, wanted))

    @property
    def full(self) -> bool:
        return len(self) >= _MAX_REASONS


def decode_manifest(plain: bytes, *, data_len: int, name: str = "volume") -> Tree:
    """The tree in the plaintext of a manifest whose head says `data_len`.

    Raises:
        TamperedError: code `volume-tampered`, with the findings (the first twenty).
    """
    what = "its manifest is not a valid tree"
    findings = _Findings()
    if len(plain) < _MANIFEST.size:
        findings.say("size", f"{len(plain)} bytes", f"{_MANIFEST.size} bytes or more")
        raise tampered(name, what, findings)
    magic, count, zero, names_len, targets_len = _MANIFEST.unpack_from(plain)
    if magic != MANIFEST_MAGIC or zero:
        findings.say("magic", plain[:16].hex(), "the magic of a manifest and a reserved zero")
        raise tampered(name, what, findings)
    end = _MANIFEST.size + count * _ROW_BYTES + names_len + targets_len
    if not 1 <= count <= MAX_ENTRIES or len(plain) != layout.padded(end):
        lengths = f"{count} entries, {names_len} bytes of names, {targets_len} of targets in {len(plain)} bytes"
        findings.say("size", lengths, "at least the root, and exactly the padded length")
        raise tampered(name, what, findings)
    if plain.count(0, end) != len(plain) - end:
        findings.say("padding", "other bytes", f"zeros from byte {end} on")
    view = memoryview(plain)
    at = _MANIFEST.size

    def take(code: Literal["q", "Q", "I", "H", "B"], item_size: int) -> Sequence[int]:
        nonlocal at
        at += count * item_size
        return _column(view[at - count * item_size : at], code)

    mtime_ns, size = take("q", 8), take("Q", 8)
    parent, mode = take("I", 4), take("H", 2)
    kind, name_len = take("B", 1), take("B", 1)
    name_off = _frozen(array("Q", accumulate(name_len, initial=0)), "Q")
    if name_off[count] != names_len:
        findings.say("names", f"{names_len} bytes", f"the sum of their lengths, {name_off[count]}")
        raise tampered(name, what, findings)
    names_blob = bytes(view[at : at + names_len])
    targets_blob = bytes(view[at + names_len : end])

    data_off, targets = _judge_entries(
        findings, parent, kind, mode, size, name_off, names_blob, targets_blob, data_len=data_len
    )
    if findings:
        raise tampered(name, what, findings)
    return Tree(
        parent=parent,
        kind=kind,
        mode=mode,
        mtime_ns=mtime_ns,
        size=size,
        data_off=data_off,
        name_off=name_off,
        names=names_blob,
        targets=targets,
    )


def _judge_entries(
    findings: _Findings,
    parent: Sequence[int],
    kind: Sequence[int],
    mode: Sequence[int],
    size: Sequence[int],
    name_off: Sequence[int],
    names_blob: bytes,
    targets_blob: bytes,
    *,
    data_len: int,
) -> tuple[Sequence[int], dict[int, bytes]]:
    """Steps 2 to 4: append what is wrong to `findings`; return the offsets of data and the targets of links."""
    if parent[0] != 0 or kind[0] != Kind.DIRECTORY or name_off[1] != 0 or size[0] != 0 or mode[0] > 0o777:
        findings.say("entry 0", "something else", "the root: an empty folder name, its own parent")
        return (), {}
    count = len(parent)
    data_off = array("Q", bytes(8 * count))
    targets: dict[int, bytes] = {}
    depth, path_len = {0: 0}, {0: -1}  # of folders; the path of an entry below the root has no leading slash
    data_end = target_end = 0
    group, last_name = 0, b""
    for i in range(1, count):
        if findings.full:
            break
        where = f"entry {i}"
        up, entry_name = parent[i], names_blob[name_off[i] : name_off[i + 1]]
        if up != group:
            if up < group:
                findings.say(where, f"parent {up} after parent {group}", "parents that never decrease")
            group, last_name = up, b""
        if up not in depth:
            findings.say(where, f"parent {up}", "an earlier entry that is a folder")
            continue
        fault = names.name_fault(entry_name)
        if fault:
            findings.say(where, fault, "a name that is allowed")
        if entry_name <= last_name:
            findings.say(where, names.shown(entry_name), f"a name sorted after {names.shown(last_name)!r}")
        last_name = entry_name
        path = path_len[up] + 1 + len(entry_name)
        if path > names.PATH_MAX:
            findings.say(where, f"a path of {path} bytes", f"at most {names.PATH_MAX}")
        entry_kind, entry_size = kind[i], size[i]
        if mode[i] > 0o777:
            findings.say(where, f"mode {mode[i]:o}", "nine permission bits")
        if entry_kind == Kind.FILE:
            if entry_size:
                data_off[i] = data_end
                data_end += layout.aligned(entry_size)
                if data_end > layout.MAX_DATA:
                    findings.say(where, f"{entry_size} bytes", f"at most {layout.MAX_DATA} bytes in all files")
                    break
        elif entry_kind == Kind.DIRECTORY:
            depth[i], path_len[i] = depth[up] + 1, path
            if entry_size:
                findings.say(where, f"a folder of {entry_size} bytes", "size 0")
        elif entry_kind == Kind.SYMLINK:
            target = targets_blob[target_end : target_end + entry_size]
            target_end += entry_size
            fault = names.target_fault(target, depth[up]) if target_end <= len(targets_blob) else "no target"
            if fault:
                findings.say(where, fault, "a target that stays inside")
            if mode[i] != 0o777:
                findings.say(where, f"a link with mode {mode[i]:o}", "mode 777")
            targets[i] = target
        else:
            findings.say(where, f"kind {entry_kind}", "file, folder or link")
    if not findings:
        if target_end != len(targets_blob):
            findings.say("targets", f"{len(targets_blob)} bytes", f"the sum of their lengths, {target_end}")
        if layout.padded(data_end) != data_len:
            findings.say("data", f"files of {data_end} bytes", f"files that fill the head's {data_len} bytes")
    return _frozen(data_off, "Q"), targets
