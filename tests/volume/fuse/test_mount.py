"""Mounted volumes as programs see them: what is there, what it says, what is refused."""

from __future__ import annotations

import errno
import gc
import hashlib
import mmap
import multiprocessing
import os
import random
import sqlite3
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from cloister.errors import InputError, MachineError
from cloister.volume.fuse import Mount, linux, mount
from cloister.volume.types import CHUNK
from tests.volume.fuse.fake import FakeVolume, Node, directory, file, link, make_volume

pytestmark = pytest.mark.root

Mounter = Callable[..., Mount]
SIZES = (0, 1, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5, 2_500_001)


def blob(size: int, seed: int = 0) -> bytes:
    return random.Random(seed * 7919 + size).randbytes(size)


def small_tree() -> dict[bytes, Node]:
    return {
        b"a/x.bin": file(blob(300_000)),
        b"a/deep/er/y": file(b"y"),
        b"run.sh": file(b"#!/bin/sh\necho ran\n", mode=0o755),
        b"private": file(b"p", mode=0o600),
        b"before-1970": file(b"old", mtime_ns=-1),
        b"link": link(b"a/x.bin"),
        b"dangling": link(b"no/where"),
        b"loop": link(b"loop"),
        b"empty": directory(),
        **{b"sizes/%d" % size: file(blob(size)) for size in SIZES},
    }


def test_every_file_has_its_bytes(mounted: Mounter) -> None:
    nodes = small_tree()
    at = mounted(make_volume(nodes)).at
    for path, node in nodes.items():
        if node.data:
            assert (at / os.fsdecode(path)).read_bytes() == node.data
    assert (at / "sizes/0").read_bytes() == b""


def test_walk_shows_exactly_the_tree(mounted: Mounter) -> None:
    nodes = small_tree()
    at = mounted(make_volume(nodes)).at
    seen = {os.fsencode(path.relative_to(at)) for path in at.rglob("*")}
    assert seen == set(nodes) | {b"a", b"a/deep", b"a/deep/er", b"sizes"}


def test_stat_says_what_was_sealed(mounted: Mounter) -> None:
    at = mounted(make_volume(small_tree()), uid=1234, gid=5678).at
    info = (at / "a/x.bin").stat()
    assert stat.filemode(info.st_mode) == "-r--r--r--"
    assert (info.st_size, info.st_nlink, info.st_uid, info.st_gid) == (300_000, 1, 1234, 5678)
    assert info.st_mtime_ns == 1_700_000_000_123_456_789
    assert info.st_blocks == 586
    assert stat.filemode((at / "run.sh").stat().st_mode) == "-r-xr-xr-x"
    assert stat.filemode((at / "private").stat().st_mode) == "-r--r--r--"
    assert stat.filemode((at / "link").lstat().st_mode) == "lrwxrwxrwx"
    assert (at / "before-1970").stat().st_mtime_ns == -1
    assert stat.filemode(at.stat().st_mode) == "dr-xr-xr-x"
    assert at.stat().st_nlink == 2 + 3  # a, empty, sizes
    assert (at / "a").stat().st_nlink == 2 + 1
    assert (at / "empty").stat().st_nlink == 2


def test_executables_run(mounted: Mounter) -> None:
    at = mounted(make_volume(small_tree())).at
    reader, writer = os.pipe()
    pid = os.posix_spawn(at / "run.sh", ["run.sh"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)])
    os.close(writer)
    with os.fdopen(reader, "rb") as output:
        assert output.read() == b"ran\n"
    os.waitpid(pid, 0)


def test_links(mounted: Mounter) -> None:
    at = mounted(make_volume(small_tree())).at
    assert (at / "link").read_bytes() == blob(300_000)
    assert (at / "dangling").readlink() == Path("no/where")
    assert not (at / "dangling").exists()
    with pytest.raises(OSError) as caught:
        (at / "loop").read_bytes()
    assert caught.value.errno == errno.ELOOP


def test_nothing_can_be_written(mounted: Mounter) -> None:
    at = mounted(make_volume(small_tree())).at
    attempts: list[Callable[[], object]] = [
        lambda: os.open(at / "run.sh", os.O_WRONLY),
        lambda: os.open(at / "run.sh", os.O_RDWR),
        lambda: os.open(at / "run.sh", os.O_RDONLY | os.O_TRUNC),
        lambda: os.open(at / "new", os.O_WRONLY | os.O_CREAT),
        lambda: (at / "run.sh").unlink(),
        lambda: (at / "new").mkdir(),
        lambda: (at / "empty").rmdir(),
        lambda: (at / "run.sh").rename(at / "other"),
        lambda: (at / "run.sh").chmod(0o777),
        lambda: os.utime(at / "run.sh"),
        lambda: (at / "l").symlink_to("x"),
        lambda: os.link(at / "run.sh", at / "hard"),
        lambda: os.truncate(at / "run.sh", 0),
        lambda: os.setxattr(at / "run.sh", "user.x", b"1"),
    ]
    for attempt in attempts:
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EROFS


def test_root_that_makes_the_mount_writable_still_cannot_write(mounted: Mounter) -> None:
    made = mounted(make_volume(small_tree()))
    remount = 32  # MS_REMOUNT without MS_RDONLY
    linux.mount(b"cloister", os.fsencode(made.at), b"fuse.cloister", remount, b"")
    for attempt in (
        lambda: (made.at / "new").write_bytes(b"x"),
        lambda: (made.at / "private").write_bytes(b"x"),
        lambda: (made.at / "private").unlink(),
        lambda: (made.at / "private").chmod(0o777),
        lambda: (made.at / "d").mkdir(),
    ):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EROFS
    assert (made.at / "private").read_bytes() == b"p"


def test_missing_names_are_asked_for_once(mounted: Mounter) -> None:
    """The kernel remembers an absence: importing frameworks probe thousands of names that do not exist."""
    at = mounted(make_volume({b"x": file(b"1")})).at
    assert not (at / "nope").exists()
    start = time.perf_counter()
    for _ in range(200):
        assert not (at / "nope").exists()
    assert time.perf_counter() - start < 0.2
    with pytest.raises(OSError) as caught:
        (at / ("n" * 256)).stat()
    assert caught.value.errno == errno.ENAMETOOLONG


def test_names_of_every_kind(mounted: Mounter) -> None:
    names = [
        b"n" * 255,
        b"\xff\xfe\x80",
        b"-dash",
        b"!",
        b" ",
        b"...",
        b"..a",
        b"tab\there",
        b"new\nline",
        "Ä日本".encode(),
    ]
    nodes = {b"dir/" + name: file(name) for name in names}
    at = mounted(make_volume(nodes)).at
    folder = os.fsencode(at) + b"/dir"
    assert sorted(os.fsencode(path.name) for path in (at / "dir").iterdir()) == sorted(names)
    for name in names:
        with open(folder + b"/" + name, "rb") as opened:
            assert opened.read() == name


def test_dot_and_dot_dot(mounted: Mounter) -> None:
    at = mounted(make_volume({b"a/b/c": file(b"1")})).at
    assert (at / "a/b/../b/./c").read_bytes() == b"1"
    assert (at / "a/b/..").stat().st_ino == (at / "a").stat().st_ino
    assert (at / "..").stat().st_ino == at.parent.stat().st_ino
    listing = subprocess.check_output(["ls", "-ai", at / "a/b"], text=True).split()
    assert [listing[1], listing[3]] == [".", ".."]
    assert int(listing[2]) == (at / "a").stat().st_ino


@pytest.mark.slow
def test_a_directory_of_100_000_entries(mounted: Mounter) -> None:
    nodes = {b"big/%06d" % index: file(b"") for index in range(100_000)}
    at = mounted(make_volume(nodes)).at
    assert sorted(entry.name for entry in (at / "big").iterdir()) == [f"{index:06d}" for index in range(100_000)]
    with os.scandir(at / "big") as entries:
        assert sum(entry.is_file(follow_symlinks=False) for entry in entries) == 100_000
    assert (at / "big/077777").stat().st_size == 0
    assert not (at / "big/100000").exists()


def test_seek_in_a_directory(mounted: Mounter) -> None:
    """Two readers of one large directory, one that stops in the middle: offsets are stable cookies."""
    nodes = {b"big/%04d" % index: file(b"") for index in range(3000)}
    at = mounted(make_volume(nodes)).at
    half = os.scandir(at / "big")
    first = [next(half).name for _ in range(1500)]
    assert sum(1 for _ in (at / "big").iterdir()) == 3000
    assert sorted(first + [entry.name for entry in half]) == [f"{index:04d}" for index in range(3000)]


def test_statvfs(mounted: Mounter) -> None:
    volume = make_volume({b"a": file(blob(1_000_000))})
    info = os.statvfs(mounted(volume).at)
    assert info.f_blocks * info.f_frsize == volume.data_len
    assert (info.f_bfree, info.f_bavail, info.f_ffree, info.f_files, info.f_namemax) == (0, 0, 0, 2, 255)


def test_random_reads_equal_the_source(mounted: Mounter) -> None:
    data = blob(5_000_003)
    at = mounted(make_volume({b"pad": file(b"1" * 5000), b"x": file(data)})).at
    chance = random.Random(1)
    with (at / "x").open("rb", buffering=0) as opened:
        for _ in range(300):
            offset, size = chance.randrange(5_100_000), chance.choice([1, 100, 4096, 70_000, 1_500_000])
            assert os.pread(opened.fileno(), size, offset) == data[offset : offset + size]


def test_direct_io(mounted: Mounter) -> None:
    data = blob(3_000_000)
    at = mounted(make_volume({b"x": file(data)})).at
    fd = os.open(at / "x", os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 1 << 20)
    got = b""
    while size := os.preadv(fd, [buffer], len(got)):
        got += buffer[:size]
    os.close(fd)
    assert got == data


def test_mmap_and_numpy_memmap(mounted: Mounter) -> None:
    data = blob(2_000_000)
    at = mounted(make_volume({b"x": file(data)})).at
    array = np.memmap(at / "x", dtype=np.uint8, mode="r")
    assert hashlib.sha256(array.tobytes()).digest() == hashlib.sha256(data).digest()
    with (
        (at / "x").open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as view,
    ):
        assert view[1_999_990:] == data[1_999_990:]


def test_shared_writable_mapping_is_refused(mounted: Mounter) -> None:
    at = mounted(make_volume({b"x": file(b"data")})).at
    fd = os.open(at / "x", os.O_RDONLY)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 4, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(fd)


def test_sendfile(mounted: Mounter, tmp_path: Path) -> None:
    data = blob(1_234_567)
    at = mounted(make_volume({b"x": file(data)})).at
    with (at / "x").open("rb") as source, (tmp_path / "copy").open("wb") as target:
        done = 0
        while done < len(data):
            done += os.sendfile(target.fileno(), source.fileno(), done, 1 << 20)
    assert (tmp_path / "copy").read_bytes() == data


def test_sqlite_reads_an_immutable_database(mounted: Mounter, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "db") as database:
        database.execute("create table t (k integer primary key, v blob)")
        database.executemany("insert into t values (?, ?)", [(k, blob(500, k)) for k in range(2000)])
    database.close()
    at = mounted(make_volume({b"db": file((tmp_path / "db").read_bytes())})).at
    for uri in (f"file:{at}/db?mode=ro&immutable=1", f"file:{at}/db?mode=ro"):
        connection = sqlite3.connect(uri, uri=True)
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
        assert connection.execute("select v from t where k = 1500").fetchone() == (blob(500, 1500),)
        connection.close()


def read_some(arguments: tuple[str, int, int]) -> str:
    path, seed, count = arguments
    names = sorted(Path(path).iterdir())
    random.Random(seed).shuffle(names)
    return hashlib.sha256(b"".join(name.read_bytes() for name in names[:count])).hexdigest()


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_like_those_of_a_data_loader(mounted: Mounter, workers: int) -> None:
    nodes = {b"d/%04d" % index: file(blob(index * 37 % 40_000, index)) for index in range(300)}
    at = mounted(make_volume(nodes), workers=workers).at
    expected = []
    for seed in range(4):
        names = sorted(nodes)
        random.Random(seed).shuffle(names)
        expected.append(hashlib.sha256(b"".join(nodes[name].data for name in names[:200])).hexdigest())
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(read_some, [(str(at / "d"), seed, 200) for seed in range(4)]) == expected


@pytest.mark.parametrize("workers", [1, 3])
def test_concurrent_threads(mounted: Mounter, workers: int) -> None:
    data = {b"%d" % index: file(blob(1_500_000, index)) for index in range(6)}
    at = mounted(make_volume(data), workers=workers).at
    wrong: list[bytes] = []

    def read(name: bytes) -> None:
        if (at / os.fsdecode(name)).read_bytes() != data[name].data:
            wrong.append(name)

    threads = [threading.Thread(target=read, args=(name,)) for name in data for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_warm_reads_do_not_reach_the_worker(mounted: Mounter) -> None:
    """The page cache answers: with the worker stopped, a second read still returns."""
    data = blob(1_000_000)
    made = mounted(make_volume({b"x": file(data)}))
    assert (made.at / "x").read_bytes() == data
    (worker,) = made.workers()
    os.kill(worker, 19)  # SIGSTOP
    try:
        fd = os.open(made.at / "x", os.O_RDONLY)
        assert os.pread(fd, len(data), 0) == data
    finally:
        os.kill(worker, 18)  # SIGCONT
    os.close(fd)


class Watched(FakeVolume):
    """Writes the offset of every read to a file, as the owner of the disk would see it."""

    log: int = -1

    def descriptors(self) -> tuple[int, ...]:
        return (self.log,)

    def read_into(self, offset: int, into: memoryview) -> None:
        os.write(self.log, b"%d\n" % offset)
        super().read_into(offset, into)


def test_preload_is_one_pass_and_then_the_disk_is_silent(mounted: Mounter, tmp_path: Path) -> None:
    nodes = {b"%d/%d/f%03d" % (k % 7, k % 3, k): file(blob(k * 1231 % 90_000, k)) for k in range(150)}
    plain = make_volume({**nodes, b"z": link(b"0/0/f000"), b"big": file(blob(3_000_000))})
    volume = Watched(plain.tree, plain.space)
    with (tmp_path / "log").open("wb") as log:
        volume.log = log.fileno()
        made = mounted(volume)
    assert made.preload() == sum(len(node.data) for node in nodes.values()) + 3_000_000
    seen = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert seen == sorted(seen)
    names = list(nodes)
    random.Random(4).shuffle(names)
    for name in names:
        assert (made.at / os.fsdecode(name)).read_bytes() == nodes[name].data
    assert len((tmp_path / "log").read_text().split()) == len(seen)


def test_preload_stops_inside_a_file_when_it_is_told_to(mounted: Mounter) -> None:
    made = mounted(make_volume({b"a": file(b"1"), b"big": file(blob(3_000_000)), b"z": file(b"2")}))
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 5  # a: file, block, end; big: file, first block

    assert 1 < made.preload(stop=stop) < 3_000_000


def test_preload_of_a_dead_mount_says_so(mounted: Mounter) -> None:
    made = mounted(make_volume({b"x": file(b"1")}))
    made.close()
    with pytest.raises(MachineError, match="is no longer served"):
        made.preload()
    volume = make_volume({b"x": file(blob(200_000)), b"y": file(b"2")})
    volume.poison = 0
    dead = mounted(volume)
    with pytest.raises(MachineError, match="is no longer served") as caught:
        dead.preload()
    assert caught.value.code == "no-mount"


def test_preload_leaves_out_what_cannot_be_read(mounted: Mounter) -> None:
    volume = make_volume({b"x": file(blob(CHUNK)), b"y": file(blob(CHUNK))})
    volume.bad = {0: OSError(errno.EIO, "disk")}
    made = mounted(volume)
    assert made.preload() == CHUNK
    assert [fault.path for fault in made.faults()] == ["x"]


def test_another_user_reads_unless_told_otherwise(mounted: Mounter, tmp_path: Path) -> None:
    volume = make_volume({b"x": file(b"open")})
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):  # pytest makes them 0700
        folder.chmod(0o755)
    shared, own = mounted(volume).at, mounted(volume, allow_other=False).at
    assert as_nobody(lambda: (shared / "x").read_bytes()) == 0
    assert as_nobody(lambda: (own / "x").read_bytes()) == errno.EACCES
    assert (own / "x").read_bytes() == b"open"


def as_nobody(action: Callable[[], object]) -> int:
    """errno of `action` in a child with uid 65534, 0 if it worked."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            action()
            status = 0
        except OSError as error:
            status = error.errno or 98
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_close_ends_everything(mounted: Mounter) -> None:
    made = mounted(make_volume({b"x": file(b"1")}))
    (made.at / "x").read_bytes()
    assert made.alive
    (worker,) = made.workers()
    assert repr(made) == f"Mount(at='{made.at}', alive)"
    made.close()
    made.close()
    assert not made.alive
    assert made.closed
    assert list(made.at.iterdir()) == []
    assert wait_until(lambda: not Path(f"/proc/{worker}").exists())


def test_close_of_a_busy_mount_detaches_it(mounted: Mounter) -> None:
    made = mounted(make_volume({b"x": file(blob(3_000_000))}))
    fd = os.open(made.at / "x", os.O_RDONLY)
    assert len(os.pread(fd, 100, 0)) == 100
    (worker,) = made.workers()
    made.close(patience_s=0.1)
    assert list(made.at.iterdir()) == []
    assert wait_until(lambda: not Path(f"/proc/{worker}").exists())
    with pytest.raises(OSError) as caught:
        os.pread(fd, 100, 2_900_000)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
    with suppress(OSError):  # close(2) reports the lost connection, too
        os.close(fd)


def test_close_waits_for_a_reader_that_finishes(mounted: Mounter) -> None:
    made = mounted(make_volume({b"x": file(b"1")}))
    fd = os.open(made.at / "x", os.O_RDONLY)
    threading.Timer(0.1, os.close, [fd]).start()
    start = time.monotonic()
    made.close(patience_s=5)
    assert 0.05 < time.monotonic() - start < 4


def test_unmounted_by_somebody_else(mounted: Mounter) -> None:
    made = mounted(make_volume({b"x": file(b"1")}))
    assert made.alive
    linux.umount(os.fsencode(made.at))
    assert wait_until(lambda: not made.alive)
    made.close()


def test_a_forked_child_does_not_unmount(mounted: Mounter) -> None:
    made = mounted(make_volume({b"x": file(b"1")}))
    pid = os.fork()
    if pid == 0:
        made.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert (made.at / "x").read_bytes() == b"1"


def test_mount_point_must_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    for at in (tmp_path / "f", tmp_path / "missing"):
        with pytest.raises(InputError, match="is not a directory"):
            mount(make_volume({}), at)


def test_worker_count_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 workers"):
        mount(make_volume({}), tmp_path, workers=0)


def test_a_machine_without_fuse_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        mount(make_volume({}), tmp_path, device=tmp_path / "fuse")
    assert caught.value.code == "no-mount"
    assert caught.value.reasons[0].found == "missing"
    assert "modprobe fuse" in caught.value.hint
    assert "Volume.extract" in caught.value.hint
    (tmp_path / "plain").touch()
    with pytest.raises(MachineError) as caught:
        mount(make_volume({}), tmp_path, device=tmp_path / "plain")
    assert caught.value.reasons[0].found == "not a character device"


def devices_or_skip(folder: Path) -> None:
    if os.statvfs(folder).f_flag & os.ST_NODEV:
        pytest.skip(f"device nodes do not work on the file system of {folder}: it is mounted nodev")


def test_a_device_without_a_driver_is_reported(tmp_path: Path) -> None:
    devices_or_skip(tmp_path)
    node = tmp_path / "fuse"
    os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(10, 254))
    with pytest.raises(MachineError) as caught:
        mount(make_volume({}), tmp_path, device=node)
    assert caught.value.reasons[0].wanted == "the kernel's FUSE driver"


def test_a_user_without_permission_is_told(tmp_path: Path) -> None:
    node = tmp_path / "fuse"
    node.touch(0o600)
    volume = make_volume({})
    tmp_path.chmod(0o755)

    def attempt() -> None:
        try:
            mount(volume, Path("/tmp"), device=Path("/dev/fuse"))
        except MachineError as error:
            os._exit(77 if error.code == "no-mount" and "for uid 65534" in error.reasons[0].found else 1)

    assert as_nobody(attempt) == 77


def test_fifty_mounts_leak_no_descriptor(tmp_path: Path) -> None:
    volume = make_volume({b"x": file(b"1")})
    with mount(volume, tmp_path):
        pass
    gc.collect()
    before = sorted(Path("/proc/self/fd").iterdir())
    for _ in range(50):
        with mount(volume, tmp_path) as made:
            assert (made.at / "x").read_bytes() == b"1"
    gc.collect()
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    assert linux.device_of_mount(tmp_path) is None


def test_the_worker_holds_nothing_but_its_own(mounted: Mounter, tmp_path: Path) -> None:
    """Descriptors of the mounting process, capabilities and dumps: all gone."""
    with (tmp_path / "secret of the parent").open("wb"):
        made = mounted(make_volume({b"x": file(b"1")}))
        (made.at / "x").read_bytes()
        (worker,) = made.workers()
        held = {str(fd.readlink()) for fd in Path(f"/proc/{worker}/fd").iterdir()}
    held = {name for name in held if not name.startswith(("socket:", "anon_inode:[pidfd]"))}
    held.discard("/secretmem (deleted)")  # the worker's own copy of the pages that hold its keys (crypto.memory)
    assert held == {"/dev/null", "/dev/fuse"}
    status = dict(line.split(":", 1) for line in Path(f"/proc/{worker}/status").read_text().splitlines())
    for name in ("CapEff", "CapPrm", "CapInh"):
        assert int(status[name], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"
    assert "Max core file size        0                    0" in Path(f"/proc/{worker}/limits").read_text()


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def test_fake_volume_is_a_volume() -> None:
    from cloister.volume.types import Volume

    assert isinstance(make_volume({}), Volume)
    assert isinstance(make_volume({}), FakeVolume)
