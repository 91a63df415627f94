"""Where mounts are visible. Each test acts in a child, because a namespace cannot be left."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloister.errors import MachineError
from cloister.volume.fuse import enter_user_mount_namespace, linux, mount, private_mount_namespace
from tests.volume.fuse.conftest import need_fuse
from tests.volume.fuse.fake import file, make_volume

DATA = os.urandom(300_000)


def in_child(action: Callable[[], str]) -> str:
    """Run `action` in a fork; its result, or the error it raised, as text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "nothing"
        try:
            text = action()
        finally:
            error = sys.exc_info()[1]
            os.write(writer, (text if error is None else repr(error)).encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as source:
        text = source.read().decode()
    os.waitpid(pid, 0)
    return text


@pytest.fixture
def shared_dir() -> Iterator[Path]:
    """A directory that other users may enter (pytest's own are 0700)."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.root
def test_a_private_mount_is_invisible_outside_and_vanishes(tmp_path: Path) -> None:
    need_fuse()
    to_child, from_child = os.pipe(), os.pipe()

    def action() -> str:
        private_mount_namespace()
        made = mount(make_volume({b"x": file(DATA)}), tmp_path)
        same = (made.at / "x").read_bytes() == DATA
        os.write(from_child[1], b"mounted")
        os.read(to_child[0], 1)
        return f"{same} {made.alive}"  # and leaves without closing

    pid = os.fork()
    if pid == 0:
        try:
            text = action()
            os.write(from_child[1], text.encode())
        finally:
            os._exit(0)
    assert os.read(from_child[0], 100) == b"mounted"
    assert linux.device_of_mount(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    os.write(to_child[1], b"!")
    assert os.read(from_child[0], 100) == b"True True"
    os.waitpid(pid, 0)
    for fd in (*to_child, *from_child):
        os.close(fd)


def user_namespaces_or_skip() -> None:
    def enter() -> str:
        enter_user_mount_namespace()
        return "entered"

    result = in_child(enter)
    if result != "entered":
        pytest.skip(f"no user namespaces here: {result}")


def mount_as_user(at: Path, device: Path) -> str:
    enter_user_mount_namespace()
    with mount(make_volume({b"d/x": file(DATA), b"run": file(b"r", mode=0o755)}), at, device=device) as made:
        info = (made.at / "run").stat()
        same = (made.at / "d/x").read_bytes() == DATA
        return f"{same} {os.geteuid()} {info.st_uid} {stat.filemode(info.st_mode)} {made.alive}"


EXPECTED = "True 0 0 -r-xr-xr-x True"


@pytest.mark.root
def test_mount_in_a_user_namespace_as_root(tmp_path: Path) -> None:
    need_fuse()
    user_namespaces_or_skip()
    assert in_child(lambda: mount_as_user(tmp_path, Path("/dev/fuse"))) == EXPECTED
    assert linux.device_of_mount(tmp_path) is None


@pytest.mark.root
def test_mount_as_an_ordinary_user(shared_dir: Path) -> None:
    """uid 65534 without any capability, with a FUSE device as distributions have it (mode 0666)."""
    need_fuse()
    user_namespaces_or_skip()
    at = shared_dir / "mnt"
    at.mkdir()
    os.chown(at, 65534, 65534)
    device = Path("/dev/fuse")
    if not device.stat().st_mode & 0o006:
        device = shared_dir / "fuse"
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(10, 229))
        device.chmod(0o666)
        try:
            os.close(os.open(device, os.O_RDWR))
        except OSError as error:
            pytest.skip(f"/dev/fuse is for root only, and a copy of the node cannot be used: {error}")

    def action() -> str:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        return mount_as_user(at, device)

    assert in_child(action) == EXPECTED
    assert linux.device_of_mount(at) is None


@pytest.mark.root
def test_an_ordinary_user_without_a_namespace_is_told_which_door_to_take(shared_dir: Path) -> None:
    need_fuse()
    if os.statvfs(shared_dir).f_flag & os.ST_NODEV:
        pytest.skip("device nodes do not work in the folder of this test: it is mounted nodev")
    device = shared_dir / "fuse"
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(10, 229))
    device.chmod(0o666)

    def action() -> str:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        try:
            mount(make_volume({}), shared_dir, device=device)
        except MachineError as error:
            return f"{error.code} {error.reasons[0].where} {error.hint}"
        return "mounted"

    told = in_child(action)
    assert told.startswith("no-mount mount(2) run as root, or enter a user namespace first")


@pytest.mark.parametrize("enter", [private_mount_namespace, enter_user_mount_namespace])
def test_threads_are_refused(enter: Callable[[], None]) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="before threads are started; this process has"):
            enter()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("number", "found"), [(28, "limit of namespaces"), (1, "Operation not permitted")], ids=["ENOSPC", "EPERM"]
)
@pytest.mark.parametrize("enter", [private_mount_namespace, enter_user_mount_namespace])
def test_refusals_name_the_setting(
    monkeypatch: pytest.MonkeyPatch, enter: Callable[[], None], number: int, found: str
) -> None:
    def refuse(flags: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(linux, "unshare", refuse)
    with pytest.raises(MachineError) as caught:
        enter()
    assert caught.value.code == "no-mount"
    assert found in caught.value.reasons[0].found
    assert caught.value.reasons[0].hint
