"""Sealed files: whole and from the right hand, or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.crypto.keys import Secret
from cloister.node.workload.edge.cache import load, save

BODY = {"names": b"abc", "count": 3}
KEY = Secret(b"k" * 32)


@pytest.mark.parametrize("key", [None, KEY])
def test_round_trip(tmp_path: Path, key: Secret | None) -> None:
    path = tmp_path / "x"
    save(path, BODY, label="a", mac_key=key)
    assert load(path, label="a", mac_key=key) == BODY
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("key", [None, KEY])
def test_every_changed_byte_and_every_length_is_refused(tmp_path: Path, key: Secret | None) -> None:
    path = tmp_path / "x"
    save(path, BODY, label="a", mac_key=key)
    good = path.read_bytes()
    for offset in range(len(good)):
        path.write_bytes(good[:offset] + bytes([good[offset] ^ 1]) + good[offset + 1 :])
        assert load(path, label="a", mac_key=key) is None, f"byte {offset}"
        path.write_bytes(good[:offset])
        assert load(path, label="a", mac_key=key) is None, f"length {offset}"
    path.write_bytes(good + b"\x00")
    assert load(path, label="a", mac_key=key) is None


@pytest.mark.parametrize(("made", "used"), [(None, KEY), (KEY, None), (KEY, Secret(b"z" * 32))])
def test_file_of_another_key_is_refused(tmp_path: Path, made: Secret | None, used: Secret | None) -> None:
    save(tmp_path / "x", BODY, label="a", mac_key=made)
    assert load(tmp_path / "x", label="a", mac_key=used) is None


def test_file_for_another_use_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "x", BODY, label="a", mac_key=KEY)
    assert load(tmp_path / "x", label="b", mac_key=KEY) is None


def test_absent_linked_and_writable_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert load(path, label="a", mac_key=None) is None
    save(path, BODY, label="a", mac_key=None)
    (tmp_path / "link").symlink_to(path)
    assert load(tmp_path / "link", label="a", mac_key=None) is None
    path.chmod(0o660)
    assert load(path, label="a", mac_key=None) is None


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    save(path, BODY, label="a", mac_key=None)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save(path, {"names": b"new"}, label="a", mac_key=None)
    assert load(path, label="a", mac_key=None) == BODY
    assert list(tmp_path.iterdir()) == [path]
