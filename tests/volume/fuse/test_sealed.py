"""A folder, sealed, mounted: equal to the folder. A sealed volume, attacked while it is mounted: right bytes or EIO."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister.crypto.keys import Secret
from cloister.volume.fuse import Mount, mount
from cloister.volume.read import Volume
from cloister.volume.seal import seal
from cloister.volume.types import CHUNK
from tests.volume.fuse.conftest import need_fuse
from tests.volume.fuse.test_faults import readable_pages
from tests.volume.fuse.test_mount import blob, wait_until

pytestmark = pytest.mark.root

Mounter = Callable[..., Mount]
KEY = Secret(b"volume key of these tests".ljust(32, b"."))
RECORD = CHUNK + 16


def snapshot(root: Path) -> dict[bytes, tuple[object, ...]]:
    """Everything that a reader can tell about a folder."""
    seen: dict[bytes, tuple[object, ...]] = {}
    for path in root.rglob("*"):
        name = os.fsencode(path.relative_to(root))
        info = path.lstat()
        if path.is_symlink():
            seen[name] = ("link", os.fsencode(path.readlink()))
        elif path.is_dir():
            seen[name] = ("directory", info.st_mtime_ns)
        else:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            seen[name] = ("file", digest, info.st_size, info.st_mtime_ns, bool(info.st_mode & 0o111))
    return seen


def build(root: Path) -> None:
    (root / "deep/er").mkdir(parents=True)
    (root / "empty").mkdir()
    for size in (0, 1, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 1_500_000):
        (root / f"deep/{size}").write_bytes(blob(size))
    for index in range(200):
        (root / f"deep/er/{index:03d}").write_bytes(blob(index * 97, index))
    (root / "run").write_bytes(b"#!/bin/sh\n")
    (root / "run").chmod(0o755)
    (root / "link").symlink_to("deep/1500000")
    (root / "dangling").symlink_to("no/where")
    os.utime(root / "deep/1", ns=(1, 12_345_678_901_234_567))


def test_mounted_equals_source(mounted: Mounter, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    build(source)
    digest = seal(source, tmp_path / "volume", key=KEY).digest
    with Volume.open(tmp_path / "volume", KEY, expect=digest) as volume:
        for workers in (1, 2):
            assert snapshot(mounted(volume, workers=workers).at) == snapshot(source)


def test_the_mounting_process_may_close_its_volume(mounted: Mounter, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/x").write_bytes(blob(500_000))
    digest = seal(tmp_path / "source", tmp_path / "volume", key=KEY).digest
    with Volume.open(tmp_path / "volume", KEY, expect=digest) as volume:
        made = mounted(volume)
    assert (made.at / "x").read_bytes() == blob(500_000)


NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: name not in (b".", b"..") and not set(name) & {0, 47})


@given(files=st.dictionaries(NAMES, st.integers(0, 200_000), min_size=1, max_size=8), folder=NAMES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_folder_comes_back(
    files: dict[bytes, int], folder: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    need_fuse()
    place = tmp_path_factory.mktemp("any")
    source, at = place / "source", place / "mnt"
    at.mkdir()
    inner = source / os.fsdecode(folder)
    inner.mkdir(parents=True)
    for name, size in files.items():
        (inner / os.fsdecode(name)).write_bytes(blob(size))
    seal(source, place / "volume", key=KEY)
    with Volume.open(place / "volume", KEY, expect=None) as volume, mount(volume, at):
        assert snapshot(at) == snapshot(source)


def test_ciphertext_changed_under_a_mount(mounted: Mounter, tmp_path: Path) -> None:
    data = blob(40 * CHUNK)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/x").write_bytes(data)
    digest = seal(tmp_path / "source", tmp_path / "volume", key=KEY).digest
    with Volume.open(tmp_path / "volume", KEY, expect=digest) as volume:
        made = mounted(volume)
        start = volume.tree.data_off[1]
    with (tmp_path / "volume/data/00000000").open("r+b") as segment:
        for record, at in ((3, 17), (30, RECORD - 1)):  # a byte of ciphertext, a byte of the tag
            segment.seek(record * RECORD + at)
            byte = segment.read(1)[0]
            segment.seek(-1, os.SEEK_CUR)
            segment.write(bytes([byte ^ 1]))
    first = start // 4096
    lost = {page - first for record in (3, 30) for page in range(record * 16, record * 16 + 16)}
    assert readable_pages(made.at / "x", data) == set(range(640)) - lost
    assert [(fault.path, fault.record, fault.kind) for fault in made.faults()] == [
        ("x", 3, "tampered"),
        ("x", 30, "tampered"),
    ]


@pytest.mark.parametrize("attack", ["swap", "zero", "truncate"])
def test_records_that_moved_or_vanished(mounted: Mounter, tmp_path: Path, attack: str) -> None:
    data = blob(20 * CHUNK)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/x").write_bytes(data)
    digest = seal(tmp_path / "source", tmp_path / "volume", key=KEY).digest
    with Volume.open(tmp_path / "volume", KEY, expect=digest) as volume:
        made = mounted(volume)
    segment = tmp_path / "volume/data/00000000"
    stored = bytearray(segment.read_bytes())
    if attack == "swap":
        stored[:RECORD], stored[RECORD : 2 * RECORD] = stored[RECORD : 2 * RECORD], stored[:RECORD]
    elif attack == "zero":
        stored[: 2 * RECORD] = bytes(2 * RECORD)
    with segment.open("r+b") as opened:
        opened.write(stored)
        if attack == "truncate":
            opened.truncate(10 * RECORD)
    good = readable_pages(made.at / "x", data)
    expected = set(range(160)) if attack == "truncate" else set(range(32, 320))
    assert good == expected
    assert made.alive
    assert {fault.kind for fault in made.faults()} == {"tampered"}


@pytest.mark.slow
def test_a_mutator_that_never_stops(mounted: Mounter, tmp_path: Path) -> None:
    """The host writes into the ciphertext while it is read: every read gives right bytes or EIO."""
    data = blob(16 * CHUNK)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/x").write_bytes(data)
    digest = seal(tmp_path / "source", tmp_path / "volume", key=KEY).digest
    stored = (tmp_path / "volume/data/00000000").read_bytes()
    writer = os.fork()
    if writer == 0:
        chance = random.Random(5)
        fd = os.open(tmp_path / "volume/data/00000000", os.O_RDWR)
        while True:
            at = chance.randrange(16 * RECORD)
            os.pwrite(fd, bytes([stored[at] ^ 0x40]), at)
            os.pwrite(fd, stored[at : at + 1], at)
    try:
        results = {"right": 0, "refused": 0}
        for _ in range(40):  # a new mount forgets which records failed
            with Volume.open(tmp_path / "volume", KEY, expect=digest) as volume:
                made = mounted(volume)
            fd = os.open(made.at / "x", os.O_RDONLY)
            for chunk in range(16):
                try:
                    got = os.pread(fd, CHUNK, chunk * CHUNK)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    results["refused"] += 1
                else:
                    assert data[chunk * CHUNK :].startswith(got)
                    assert got
                    results["right"] += 1
            os.close(fd)
            made.close()
    finally:
        os.kill(writer, 9)
        os.waitpid(writer, 0)
    assert results["right"] > 100


def test_a_reader_like_safetensors(mounted: Mounter, tmp_path: Path) -> None:
    """Header length, JSON header, tensors through one mapping: what model loaders do."""
    tensors = {
        f"layer{index}.weight": np.random.default_rng(index).standard_normal((64, 100 + index)) for index in range(20)
    }
    header, body = {}, b""
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F64", "shape": tensor.shape, "data_offsets": [len(body), len(body) + tensor.nbytes]}
        body += tensor.tobytes()
    text = json.dumps(header).encode()
    (tmp_path / "source").mkdir()
    (tmp_path / "source/model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    digest = seal(tmp_path / "source", tmp_path / "volume", key=KEY).digest
    with Volume.open(tmp_path / "volume", KEY, expect=digest) as volume:
        made = mounted(volume)
    with (
        (made.at / "model.safetensors").open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as view,
    ):
        (size,) = struct.unpack_from("<Q", view)
        for name, entry in json.loads(view[8 : 8 + size]).items():
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            loaded = np.frombuffer(view[start:stop]).reshape(entry["shape"])
            assert np.array_equal(loaded, tensors[name])


def test_the_key_is_only_where_it_must_be(mounted: Mounter, tmp_path: Path) -> None:
    """Neither arguments nor environment nor reports of the worker carry key or content."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source/x").write_bytes(b"plaintext marker " * 1000)
    digest = seal(tmp_path / "source", tmp_path / "volume", key=KEY).digest
    with Volume.open(tmp_path / "volume", KEY, expect=digest) as volume:
        made = mounted(volume)
    (made.at / "x").read_bytes()
    assert wait_until(lambda: len(made.workers()) == 1)
    (worker,) = made.workers()
    for name in ("cmdline", "environ"):
        text = Path(f"/proc/{worker}/{name}").read_bytes()
        assert KEY.reveal() not in text
        assert KEY.reveal().hex().encode() not in text
        assert b"plaintext marker" not in text
