"""Hostile outputs: whatever a program leaves behind, only plain files of the declared size are taken over."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloister.confine import outputs
from cloister.errors import InputError
from tests.confine.jails import PYTHON, needs_jail, shell, start


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield tmp_path, descriptor
    os.close(descriptor)


def reasons(descriptor: int, *, names: bool = True) -> str:
    with pytest.raises(InputError) as caught:
        outputs.check("one", descriptor, size_bytes=1000, max_files=10, names=names)
    assert caught.value.code == "source-unsealable"
    return "\n".join(map(str, caught.value.reasons))


def test_plain_files_and_folders_pass_and_can_be_copied(
    folder: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, descriptor = folder
    (path / "a" / "b").mkdir(parents=True)
    (path / "a" / "b" / "weights").write_bytes(b"12345")
    (path / "tool").write_bytes(b"#!")
    (path / "tool").chmod(0o6755)
    found = outputs.check("one", descriptor, size_bytes=7, max_files=4)
    assert [(file.path, file.size_bytes, file.executable) for file in found.files] == [
        ("a/b/weights", 5, False),
        ("tool", 2, True),
    ]
    assert found.folders == ("a", "a/b")
    assert found.size_bytes == 7
    target = tmp_path_factory.mktemp("copy")
    found.copy_to(target)
    assert (target / "a" / "b" / "weights").read_bytes() == b"12345"
    assert (target / "tool").stat().st_mode & 0o7777 == 0o755
    with pytest.raises(ValueError, match="no file"):
        found.open("../secret")


def _symlink(path: Path) -> None:
    (path / "x").symlink_to("/etc/shadow")


def _folder_link(path: Path) -> None:
    (path / "x").symlink_to("/etc")


def _fifo(path: Path) -> None:
    os.mkfifo(path / "x")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path / "x"))


def _hard_link(path: Path) -> None:
    (path / "x").write_text("x")
    (path / "y").hardlink_to(path / "x")


def _too_large(path: Path) -> None:
    (path / "x").write_bytes(bytes(1001))


def _too_large_together(path: Path) -> None:
    (path / "x").write_bytes(bytes(501))
    (path / "y").write_bytes(bytes(500))


def _sparse(path: Path) -> None:
    with (path / "x").open("wb") as file:
        file.truncate(1 << 40)


def _too_many(path: Path) -> None:
    for number in range(11):
        (path / str(number)).touch()


def _too_deep(path: Path) -> None:
    (path / "/".join("d" * (outputs.MAX_DEPTH + 1))).mkdir(parents=True)


def _path_too_long(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(17):
        os.mkdir("d" * 250, dir_fd=folder)
        inner = os.open("d" * 250, os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)


def _time_that_no_volume_holds(path: Path) -> None:
    (path / "x").touch()
    os.utime(path / "x", (1 << 34, 1 << 34))
    if (path / "x").stat().st_mtime != 1 << 34:
        pytest.skip("this file system keeps no such time")


def _name_that_is_no_text(path: Path) -> None:
    os.close(os.open(os.fsencode(path) + b"/\xff", os.O_CREAT))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_symlink, "symbolic link"),
        (_folder_link, "symbolic link"),
        (_fifo, "a fifo"),
        (_socket, "a socket"),
        (_hard_link, "2 names"),
        (_too_large, "1001 bytes"),
        (_too_large_together, "1001 bytes"),
        (_sparse, "1099511627776 bytes"),
        (_too_many, "11 entries"),
        (_too_deep, "too deep"),
        (_path_too_long, "a path of"),
        (_time_that_no_volume_holds, "a time of change"),
        (_name_that_is_no_text, "not UTF-8"),
    ],
)
def test_each_kind_of_hostile_output_is_refused(
    folder: tuple[Path, int], make: Callable[[Path], None], said: str
) -> None:
    path, descriptor = folder
    make(path)
    assert said in reasons(descriptor)


@pytest.mark.parametrize(
    "kind", [_symlink, _fifo, _socket, _hard_link, _too_large, _too_many, _too_deep, _path_too_long]
)
def test_data_in_names_and_sizes_do_not_leave_through_the_refusal(
    folder: tuple[Path, int], kind: Callable[[Path], None]
) -> None:
    """The refusal is shown to whoever runs the node, and that is nobody whom the contract lets see anything."""
    path, descriptor = folder
    (path / "patient").mkdir()
    kind(path / "patient")
    for number in range(3):
        (path / f"{number} patient 4711 has pneumonia").symlink_to("diagnosis")
    (path / "\N{COMBINING ACUTE ACCENT}").write_bytes(bytes(4711))
    said = reasons(descriptor, names=False)
    assert "a symbolic link" in said
    for secret in ("patient", "4711", "pneumonia", "diagnosis", "3", "5711", "COMBINING", "\N{COMBINING ACUTE ACCENT}"):
        assert secret not in said.replace(f"at most {outputs.MAX_DEPTH} levels", "")


@pytest.mark.root
def test_device_is_refused(folder: tuple[Path, int]) -> None:
    if os.getuid() != 0:
        pytest.skip("only root makes device nodes")
    path, descriptor = folder
    os.mknod(path / "x", 0o600 | 0o020000, os.makedev(1, 3))
    assert "a device" in reasons(descriptor)


def test_all_findings_are_reported_together(folder: tuple[Path, int]) -> None:
    path, descriptor = folder
    _symlink(path)
    (path / "big").write_bytes(bytes(2000))
    os.mkfifo(path / "queue")
    found = reasons(descriptor)
    assert "symbolic link" in found
    assert "a fifo" in found
    assert "2000 bytes" in found


def test_a_file_swapped_for_a_link_after_the_check_is_not_followed(folder: tuple[Path, int]) -> None:
    path, descriptor = folder
    (path / "x").write_text("fine")
    found = outputs.check("one", descriptor, size_bytes=10, max_files=1)
    (path / "x").unlink()
    (path / "x").symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="symbolic"):
        found.open("x")


@needs_jail
def test_outputs_of_a_jail_are_read_after_everything_is_dead() -> None:
    """A daemon that goes on writing must be gone, and its last state final, before anything is read."""
    script = "(while :; do date +%N > /out/one/x; done) & sleep 0.2; echo keep > /out/one/keep"
    with start("/bin/sh", "-c", script, outputs={"one": 1000}) as running:
        assert running.wait(60).ok
        first = (running.output_dir("one") / "x").read_bytes()
        with running.output("one").open("keep") as file:
            assert file.read() == b"keep\n"
        assert (running.output_dir("one") / "x").read_bytes() == first


@needs_jail
def test_a_jail_can_leave_a_link_but_nobody_follows_it() -> None:
    with start("/bin/sh", "-c", "ln -s /etc/shadow /out/one/x", outputs={"one": 1000}) as running:
        assert running.wait(60).ok
        with pytest.raises(InputError, match="cannot be taken over") as caught:
            running.output("one")
    assert "symbolic link" in str(caught.value.reasons[0])


@needs_jail
def test_output_cannot_be_replaced_or_removed_by_the_job() -> None:
    ran = shell("mv /out/one /out/two; rmdir /out/one; ln -s /etc /out/two; echo x > /out/new", outputs={"one": 1000})
    assert ran.exit.code != 0
    assert ran.stderr.count("\n") >= 4


@needs_jail
def test_one_output_cannot_use_the_room_of_another() -> None:
    script = "head -c 3000000 /dev/zero > /out/small/x; echo $?; head -c 3000000 /dev/zero > /out/large/x; echo $?"
    assert shell(script, outputs={"small": 1 << 20, "large": 4 << 20}).stdout.split() == ["1", "0"]


@needs_jail
def test_reading_before_the_end_and_unknown_names_are_mistakes() -> None:
    with start(PYTHON, "-c", "input()", stdin="pipe", outputs={"one": 10}) as running:
        with pytest.raises(RuntimeError, match="call wait"):
            running.output("one")
        with pytest.raises(ValueError, match="no output 'two'"):
            running.output("two")
        with pytest.raises(ValueError, match="no output 'two'"):
            running.output_dir("two")
