"""The key of a boot: one for all processes of a user, gone with the memory, and nobody else's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import cloister.node.workload.edge.bootkey as keys
from cloister.node.workload.edge.bootkey import boot_key

NAME = f".cloister-stage-key-{os.geteuid()}"


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private folder that counts as one in memory, whatever the tests' disk is."""
    folder = tmp_path / "memory"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(keys, "_kind", lambda _descriptor: 0x01021994)
    return folder


def test_one_key_for_one_boot_and_another_for_the_next(memory: Path) -> None:
    first = boot_key((memory,))
    assert len(first) == 32
    assert boot_key((memory,)) == first
    assert [path.name for path in memory.iterdir()] == [NAME]
    assert (memory / NAME).stat().st_mode & 0o777 == 0o600
    (memory / NAME).unlink()  # the memory is gone
    assert boot_key((memory,)) != first


def test_disk_is_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_kind", lambda _descriptor: 0xEF53)  # EXT4_SUPER_MAGIC
    assert boot_key((tmp_path,)) != boot_key((tmp_path,))
    assert not list(tmp_path.iterdir())


def test_kind_of_a_real_file_system_is_read() -> None:
    descriptor = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert keys._kind(descriptor) == 0x9FA0  # PROC_SUPER_MAGIC
    finally:
        os.close(descriptor)


def test_folder_that_others_can_change_is_not_believed(memory: Path) -> None:
    memory.chmod(0o777)
    assert boot_key((memory,)) != boot_key((memory,))
    memory.chmod(0o1777)
    assert boot_key((memory,)) == boot_key((memory,))


@pytest.mark.parametrize("plant", ["a readable file", "a link", "a short file", "a folder", "a fifo"])
def test_planted_key_is_not_believed(memory: Path, tmp_path: Path, plant: str) -> None:
    known = tmp_path / "known"
    known.write_bytes(b"k" * 32)
    known.chmod(0o600)
    place = memory / NAME
    if plant == "a readable file":
        place.write_bytes(b"k" * 32)
        place.chmod(0o644)
    elif plant == "a link":
        place.symlink_to(known)
    elif plant == "a short file":
        place.touch(mode=0o600)
    elif plant == "a folder":
        place.mkdir(mode=0o700)
    else:
        os.mkfifo(place, 0o600)
    found = boot_key((memory,))
    assert found.reveal() != b"k" * 32
    assert boot_key((memory,)) != found
