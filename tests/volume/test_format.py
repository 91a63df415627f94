"""Head and manifest: what decodes encodes to the same bytes, every fault is refused by name, nothing else is raised."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import TamperedError
from cloister.volume import format as fmt
from cloister.volume import keys, layout
from cloister.volume.types import CHUNK, Kind, Tree
from tests.volume.support import KEY


def signed_head(**changes: Any) -> fmt.Head:
    """A head with these fields and a signature that holds: what a hostile *owner* could write."""
    volume_id = bytes(range(16))
    geometry = layout.Layout(CHUNK, leaves=True)
    head = fmt.Head(
        suite=fmt.SUITE_LEAVES,
        volume_id=volume_id,
        generation=3,
        salt=b"s" * 32,
        commitment=b"c" * 32,
        data_len=CHUNK,
        manifest_len=geometry.manifest_len(100),
        manifest_sha256=b"m" * 32,
        signer=keys.signer(KEY, volume_id).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw),
        signature=bytes(64),
        wraps=(fmt.Wrap(b"k" * 16, b"n" * 12, b"w" * 48),),
    )
    head = replace(head, **changes)
    return replace(head, signature=keys.signer(KEY, volume_id).sign(head.signed))


def resigned(data: bytes) -> bytes:
    signature = keys.signer(KEY, bytes(range(16))).sign(data[: fmt.SIGNED])
    return data[: fmt.SIGNED] + signature + data[fmt.NAMED :]


# --- head ---


@given(
    st.sampled_from([fmt.SUITE_PLAIN, fmt.SUITE_LEAVES]),
    st.integers(min_value=1, max_value=(1 << 64) - 1),
    st.integers(min_value=0, max_value=1 << 20),
    st.integers(min_value=1, max_value=1 << 14),
    st.integers(min_value=1, max_value=fmt.MAX_WRAPS),
)
def test_a_head_comes_back_as_it_was(suite: int, generation: int, chunks: int, manifest: int, wraps: int) -> None:
    geometry = layout.Layout(layout.padme(chunks) * CHUNK, leaves=suite == fmt.SUITE_LEAVES)
    head = signed_head(
        suite=suite,
        generation=generation,
        data_len=geometry.data_len,
        manifest_len=geometry.manifest_len(manifest * CHUNK),
        wraps=tuple(fmt.Wrap(bytes([i]) * 16, b"n" * 12, b"w" * 48) for i in range(wraps)),
    )
    data = head.encode()
    assert len(data) == layout.HEAD
    assert fmt.decode_head(data) == head
    assert fmt.decode_head(data).encode() == data
    assert head.layout == geometry


def test_every_changed_byte_of_a_head_is_refused_or_changes_only_the_wraps() -> None:
    head = signed_head()
    data = head.encode()
    wraps = range(250, 250 + 76)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        if at in wraps:
            assert replace(fmt.decode_head(bytes(changed)), wraps=head.wraps) == head
        else:
            with pytest.raises(TamperedError) as caught:
                fmt.decode_head(bytes(changed))
            assert caught.value.code == "volume-tampered"
            assert caught.value.reasons


@pytest.mark.parametrize("size", [0, 1, 249, 250, 4095, 4097, 8192])
def test_a_head_of_another_size_is_refused(size: int) -> None:
    data = signed_head().encode()
    with pytest.raises(TamperedError, match="not a head"):
        fmt.decode_head((data + data)[:size])


@pytest.mark.parametrize(
    ("at", "value", "where"),
    [
        (8, struct.pack("<H", 2), "head.version"),
        (10, struct.pack("<H", 0), "head.suite"),
        (10, struct.pack("<H", 3), "head.suite"),
        (12, b"\x0c", "head.log2_chunk"),
        (13, b"\x0b", "head.log2_chunks_per_segment"),
        (14, struct.pack("<H", 1), "head.flags"),
        (32, struct.pack("<Q", 0), "head.generation"),
        (104, struct.pack("<Q", 1), "head.data_len"),
        (104, struct.pack("<Q", (1 << 64) - CHUNK), "head.data_len"),
        (104, struct.pack("<Q", CHUNK * 33), "head.data_len"),
        (112, struct.pack("<Q", 0), "head.manifest_len"),
        (112, struct.pack("<Q", layout.RECORD), "head.manifest_len"),
        (112, struct.pack("<Q", (1 << 64) - 1), "head.manifest_len"),
        (152, bytes(32), "head.signature"),
        (248, struct.pack("<H", 0), "head.n_wraps"),
        (248, struct.pack("<H", 51), "head.n_wraps"),
        (4095, b"\x01", "head.rest"),
    ],
)
def test_a_field_that_no_writer_makes_is_named_even_if_it_is_signed(at: int, value: bytes, where: str) -> None:
    data = bytearray(signed_head().encode())
    data[at : at + len(value)] = value
    with pytest.raises(TamperedError) as caught:
        fmt.decode_head(resigned(bytes(data)))
    assert where in [reason.where for reason in caught.value.reasons]


def test_all_faults_of_a_head_are_reported_together() -> None:
    data = bytearray(signed_head().encode())
    data[8], data[14], data[4095] = 9, 9, 9
    with pytest.raises(TamperedError) as caught:
        fmt.decode_head(bytes(data))
    assert {"head.version", "head.flags", "head.rest", "head.signature"} <= {r.where for r in caught.value.reasons}


# --- manifest ---


@dataclass
class Rows:
    """Columns of a manifest, to be spoiled one at a time."""

    parent: list[int]
    kind: list[int]
    mode: list[int]
    mtime_ns: list[int]
    size: list[int]
    names: list[bytes]
    targets: bytes
    data_len: int
    count: int = 0

    def encode(self, *, pad: bool = True) -> bytes:
        n = len(self.parent)
        blob = b"".join(self.names)
        plain = struct.pack("<8sIIQQ", b"CLSTRMAN", self.count or n, 0, len(blob), len(self.targets))
        plain += struct.pack(f"<{n}q", *self.mtime_ns) + struct.pack(f"<{n}Q", *self.size)
        plain += struct.pack(f"<{n}I", *self.parent) + struct.pack(f"<{n}H", *self.mode)
        plain += bytes(self.kind) + bytes(len(name) for name in self.names) + blob + self.targets
        return plain.ljust(layout.padded(len(plain)), b"\x00") if pad else plain


def rows() -> Rows:
    """root { a (5,000 bytes), b/ { c (1 byte), l -> ../a }, d (empty) }"""
    file, folder, link = int(Kind.FILE), int(Kind.DIRECTORY), int(Kind.SYMLINK)
    return Rows(
        parent=[0, 0, 0, 0, 2, 2],
        kind=[folder, file, folder, file, file, link],
        mode=[0o755, 0o644, 0o755, 0o644, 0o600, 0o777],
        mtime_ns=[0, -1, 1, 2, 3, 4],
        size=[0, 5000, 0, 0, 1, 4],
        names=[b"", b"a", b"b", b"d", b"c", b"l"],
        targets=b"../a",
        data_len=CHUNK,
    )


def decode(spoiled: Rows) -> Tree:
    return fmt.decode_manifest(spoiled.encode(), data_len=spoiled.data_len)


def test_an_unspoiled_manifest_decodes_and_encodes_to_the_same_bytes() -> None:
    tree = decode(rows())
    assert fmt.encode_manifest(tree) == rows().encode()
    assert [tree.path(i) for i in range(len(tree))] == [b"", b"a", b"b", b"d", b"b/c", b"b/l"]
    assert list(tree.data_off) == [0, 0, 0, 0, 8192, 0]
    assert tree.target(5) == b"../a"
    assert tree.find("b/c") == 4
    assert tree.find("b/x") is None
    assert list(tree.children(2)) == [4, 5]
    assert not tree.children(4)
    assert tree.entry(1).size == 5000


def spoil(change: Callable[[Rows], None]) -> Rows:
    spoiled = rows()
    change(spoiled)
    return spoiled


def setting(column: str, index: int, value: int | bytes) -> Callable[[Rows], None]:
    def change(spoiled: Rows) -> None:
        getattr(spoiled, column)[index] = value

    return change


def adding(size: int) -> Callable[[Rows], None]:
    def change(spoiled: Rows) -> None:
        for column, value in (
            ("parent", 2),
            ("kind", 1),
            ("mode", 0),
            ("mtime_ns", 0),
            ("size", size),
            ("names", b"z"),
        ):
            getattr(spoiled, column).append(value)

    return change


def field(name: str, value: object) -> Callable[[Rows], None]:
    def change(spoiled: Rows) -> None:
        setattr(spoiled, name, value)

    return change


def both(*changes: Callable[[Rows], None]) -> Callable[[Rows], None]:
    def change(spoiled: Rows) -> None:
        for each in changes:
            each(spoiled)

    return change


def nesting(spoiled: Rows) -> None:
    """Seventeen folders with long names in each other: a path of more than 4,095 bytes."""
    for level in range(17):
        adding(0)(spoiled)
        spoiled.parent[-1] = 5 + level if level else 2
        spoiled.kind[-1], spoiled.names[-1] = int(Kind.DIRECTORY), b"z" * 255


# fault -> (how to make it, what the refusal says was wanted)
FAULTS: dict[str, tuple[Callable[[Rows], None], str]] = {
    "a parent that comes later": (setting("parent", 1, 2), "an earlier entry"),
    "an entry that is its own parent": (setting("parent", 2, 2), "an earlier entry"),
    "a parent that does not exist": (setting("parent", 5, 4_000_000_000), "an earlier entry"),
    "a parent that is a file": (setting("parent", 4, 1), "an earlier entry that is a folder"),
    "a parent that is a link": (both(adding(0), setting("parent", 6, 5)), "an earlier entry that is a folder"),
    "parents that decrease": (setting("parent", 5, 0), "never decrease"),
    "a root that is a file": (setting("kind", 0, 1), "the root"),
    "a root with a size": (setting("size", 0, 1), "the root"),
    "a root with a name": (setting("names", 0, b"r"), "the root"),
    "a root with setuid": (setting("mode", 0, 0o4755), "the root"),
    "two entries of one name": (setting("names", 2, b"a"), "sorted after"),
    "names out of order": (setting("names", 1, b"c"), "sorted after"),
    "an empty name": (setting("names", 4, b""), "a name that is allowed"),
    "a slash in a name": (setting("names", 1, b"a/x"), "a name that is allowed"),
    "a name that is a path upwards": (setting("names", 1, b".."), "a name that is allowed"),
    "a name that is the folder itself": (setting("names", 1, b"."), "a name that is allowed"),
    "a NUL in a name": (setting("names", 1, b"a\x00"), "a name that is allowed"),
    "an unknown kind": (setting("kind", 1, 3), "file, folder or link"),
    "kind zero": (setting("kind", 1, 0), "file, folder or link"),
    "setuid": (setting("mode", 1, 0o4755), "nine permission bits"),
    "a folder with a size": (setting("size", 2, 1), "size 0"),
    "a size of 2^64 - 1": (setting("size", 1, (1 << 64) - 1), "in all files"),
    "sizes whose sum overflows 64 bits": (
        both(setting("size", 1, (1 << 64) - 1), setting("size", 4, 8192)),
        "in all files",
    ),
    "a file beyond the data": (setting("size", 4, CHUNK), "fill the head's"),
    "a link with a longer target than there is": (setting("size", 5, 5), "a target that stays inside"),
    "a link with a target of 2^63 bytes": (setting("size", 5, 1 << 63), "a target that stays inside"),
    "a link with a shorter target than there is": (setting("size", 5, 3), "the sum of their lengths"),
    "a link without a target": (both(setting("size", 5, 0), field("targets", b"")), "a target that stays inside"),
    "a link that leaves the volume": (
        both(field("targets", b"../../x"), setting("size", 5, 7)),
        "a target that stays inside",
    ),
    "an absolute link": (field("targets", b"/etc"), "a target that stays inside"),
    "a link with permission bits": (setting("mode", 5, 0o755), "mode 777"),
    "a head with more data than files": (field("data_len", 2 * CHUNK), "fill the head's"),
    "a head with less data than files": (field("data_len", 0), "fill the head's"),
    "more entries than there are": (field("count", 7), ""),
    "2^32 - 1 entries": (field("count", (1 << 32) - 1), "exactly the padded length"),
    "a path longer than the kernel takes": (nesting, "at most 4095"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hostile_manifest_is_refused(fault: str) -> None:
    change, wanted = FAULTS[fault]
    with pytest.raises(TamperedError) as caught:
        decode(spoil(change))
    assert caught.value.code == "volume-tampered"
    assert all(reason.where.startswith("manifest.") for reason in caught.value.reasons)
    assert any(wanted in reason.wanted for reason in caught.value.reasons), caught.value.reasons


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, b"X"), (12, b"\x01"), (16, struct.pack("<Q", 1 << 63)), (24, struct.pack("<Q", (1 << 64) - 1)), (-1, b"\x01")],
)
def test_a_manifest_with_another_frame_is_refused(at: int, value: bytes) -> None:
    plain = bytearray(rows().encode())
    plain[at : at + len(value) or None] = value
    with pytest.raises(TamperedError):
        fmt.decode_manifest(bytes(plain), data_len=CHUNK)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 100, CHUNK - 1, CHUNK + 1, 2 * CHUNK])
def test_a_manifest_of_another_length_is_refused(size: int) -> None:
    plain = rows().encode()
    with pytest.raises(TamperedError):
        fmt.decode_manifest(plain.ljust(size, b"\x00")[:size], data_len=CHUNK)


def test_findings_are_reported_together_but_not_without_end() -> None:
    spoiled = rows()
    for _ in range(500):
        adding(1)(spoiled)
    spoiled.mode[1] = 0o7777
    with pytest.raises(TamperedError) as caught:
        decode(spoiled)
    assert 2 <= len(caught.value.reasons) <= 20


@given(st.data())
def test_no_byte_of_a_manifest_has_two_meanings(data: st.DataObject) -> None:
    """What decodes after a change encodes to the changed bytes; everything else is refused, never another exception."""
    plain = bytearray(rows().encode())
    used = len(rows().encode(pad=False))
    for _ in range(data.draw(st.integers(1, 3))):
        plain[data.draw(st.integers(0, used))] = data.draw(st.integers(0, 255))
    try:
        tree = fmt.decode_manifest(bytes(plain), data_len=CHUNK)
    except TamperedError:
        return
    assert fmt.encode_manifest(tree) == plain


@given(st.binary(min_size=0, max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(TamperedError):
        fmt.decode_manifest(noise, data_len=0)
    with pytest.raises(TamperedError):
        fmt.decode_manifest((b"CLSTRMAN" + noise).ljust(CHUNK, b"\x00"), data_len=0)
