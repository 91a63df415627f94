"""Makes every file in this folder but the README: `python -m tests.volume.vectors.generate [folder]`.

Randomness is a fixed hash chain, times and modes are fixed, so the result is the same everywhere; a test compares.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cloister.volume import layout
from cloister.volume.seal import Sealer
from cloister.volume.types import CHUNK
from tests.volume.support import KEY, repeatable, write_tree
from tests.volume.test_format import FAULTS, rows, spoil

HERE = Path(__file__).parent
ID = bytes.fromhex("000102030405060708090a0b0c0d0e0f")
SMALL = {"a": b"hello\n", "empty": b"", "folder/b": b"x"}
LARGE = {"a": bytes(range(256)) * 256 + b"tail", "b": b"second file\n"}
DATA = "data/00000000"
RECORD = layout.RECORD


@dataclass(frozen=True)
class Vector:
    """One change to a base volume. `steps` are lines as the README explains them; `released` is a number of whole records."""

    name: str
    base: str
    steps: tuple[str, ...]
    expect: str
    released: int
    comment: str
    digest_of: str = ""


def make_bases(place: Path) -> dict[str, str]:
    """Seal the base volumes below `place`; name -> digest."""
    digests = {}
    with tempfile.TemporaryDirectory() as scratch:
        small = write_tree(Path(scratch, "small"), SMALL)
        (small / "folder" / "link").symlink_to("../a")
        os.utime(small / "folder" / "link", ns=(10**18, 10**18), follow_symlinks=False)
        os.utime(small / "folder", ns=(10**18, 10**18))
        large = write_tree(Path(scratch, "large"), LARGE)
        for name, source, generation, audited in (
            ("plain", small, 1, False),
            ("leaves-1", large, 1, True),
            ("leaves-2", large, 2, True),
        ):
            sealer = Sealer(insecure_random=repeatable(name))
            sealed = sealer.seal(
                source, place / name, key=KEY, generation=generation, volume_id=ID, audited=audited, replace=True
            )
            digests[name] = sealed.digest
    return digests


def flip(place: Path, base: str, file: str, at: int) -> str:
    """A step that changes one bit."""
    byte = (place / base / file).read_bytes()[at] ^ 1
    return f"set {file} {at} {byte:02x}"


def volume_vectors(place: Path) -> list[Vector]:
    base = "leaves-2"
    manifest_size = (place / base / "manifest").stat().st_size
    head_fields = {
        "magic": 0, "version": 8, "suite": 10, "chunk": 12, "segment": 13, "flags": 14, "id": 16, "generation": 32,
        "salt": 40, "commitment": 72, "data-len": 104, "manifest-len": 112, "manifest-digest": 120, "signer": 152,
        "signature": 184, "wrap-count": 248, "wrap-id": 250, "wrap-nonce": 266, "wrap-key": 278, "rest": 4095,
    }  # fmt: skip
    vectors = [
        Vector("intact-plain", "plain", (), "opens", 1, "suite 1: a file, an empty file, a folder, a link"),
        Vector("intact-leaves-1", "leaves-1", (), "opens", 2, "suite 2, generation 1"),
        Vector("intact-leaves-2", "leaves-2", (), "opens", 2, "suite 2, generation 2 of the same tree and id"),
        Vector("rollback", "leaves-1", (), "stale", 0, "authentic, but generation 2 is registered", "leaves-2"),
    ]
    vectors += [
        Vector(f"head-{field}", base, (flip(place, base, "head", at),), "tampered", 0, f"one bit of the head: {field}")
        for field, at in head_fields.items()
    ]

    def tampered(name: str, released: int, comment: str, *steps: str) -> None:
        vectors.append(Vector(name, base, steps, "tampered", released, comment))

    tampered("manifest-ciphertext", 0, "one bit of the manifest", flip(place, base, "manifest", 100))
    tampered("manifest-tag", 0, "one bit of its tag", flip(place, base, "manifest", CHUNK))
    tampered("manifest-node", 0, "one bit of a node behind it", flip(place, base, "manifest", manifest_size - 1))
    tampered("manifest-cut", 0, "one byte short", f"truncate manifest {manifest_size - 1}")
    tampered("manifest-longer", 0, "one byte more", "append manifest 00")
    tampered("manifest-missing", 0, "no manifest", "remove manifest")
    tampered("manifest-of-older", 0, "the manifest of generation 1", "copy manifest leaves-1")
    tampered("head-of-older", 0, "the head of generation 1 before the data of 2", "copy head leaves-1")
    tampered("head-cut", 0, "one byte short", "truncate head 4095")
    tampered("record-0", 0, "one bit of the first record", flip(place, base, DATA, 0))
    tampered("record-1", 1, "one bit of the second record: the first may come out", flip(place, base, DATA, RECORD))
    tampered("record-1-tag", 1, "one bit of its tag", flip(place, base, DATA, 2 * RECORD - 1))
    tampered("record-zeroed", 1, "a hole in place of the second record", f"zero {DATA} {RECORD} {RECORD}")
    tampered("records-exchanged", 0, "each tag is valid on its own", f"exchange {DATA} 0 {RECORD} {RECORD}")
    tampered("record-of-older", 1, "record 1 of generation 1", f"splice {DATA} {RECORD} {RECORD} leaves-1")
    tampered("segment-of-older", 0, "all data of generation 1 under the head of 2", f"copy {DATA} leaves-1")
    tampered("segment-cut", 0, "one byte short", f"truncate {DATA} {2 * RECORD + 63}")
    tampered("segment-without-leaves", 0, "leaves cut off", f"truncate {DATA} {2 * RECORD}")
    tampered("segment-longer", 0, "one byte more", f"append {DATA} 00")
    tampered("segment-missing", 0, "no data", f"remove {DATA}")
    return vectors


def write_vectors(place: Path, digests: dict[str, str]) -> None:
    plain = {"plain": linear(SMALL), "leaves-1": linear(LARGE), "leaves-2": linear(LARGE)}
    for vector in volume_vectors(place):
        released = plain[vector.base][: vector.released * CHUNK]
        lines = [
            f"base: {vector.base}",
            f"key: {KEY.reveal().hex()}",
            f"digest: {digests[vector.digest_of or vector.base]}",
            *(f"step: {step}" for step in vector.steps),
            f"expect: {vector.expect}",
            f"released-sha256: {hashlib.sha256(released).hexdigest()}",
            f"comment: {vector.comment}",
        ]
        (place / f"volume-{vector.name}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    for fault, (change, _) in {"intact": (lambda _: None, ""), **FAULTS}.items():
        spoiled = spoil(change) if fault != "intact" else rows()
        lines = [
            f"manifest: {spoiled.encode(pad=False).hex()}",
            f"data-len: {spoiled.data_len}",
            f"expect: {'opens' if fault == 'intact' else 'tampered'}",
            f"comment: {fault}",
        ]
        slug = "".join(letter if letter.isalnum() else "-" for letter in fault)
        (place / f"manifest-{slug}.txt").write_text("\n".join(lines) + "\n", "utf-8")


def linear(files: dict[str, bytes]) -> bytes:
    """The linear space of a tree whose folders come after its files, as in the bases."""
    data = b"".join(content.ljust(layout.aligned(len(content)), b"\x00") for content in files.values())
    return data.ljust(layout.padded(len(data)), b"\x00")


def generate(place: Path) -> None:
    write_vectors(place, make_bases(place))


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
