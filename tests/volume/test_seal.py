"""Sealing: what goes in comes out, what cannot go in is listed, and an accident leaves the old state or the new one."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister.errors import CloisterError, InputError, MachineError
from cloister.volume import keys, layout
from cloister.volume.check import check
from cloister.volume.disk import SEALING
from cloister.volume.read import Volume
from cloister.volume.rewrap import rewrap
from cloister.volume.seal import Sealer, seal
from cloister.volume.types import CHUNK, Kind
from tests.volume.support import (
    KEY,
    OTHER_KEY,
    FailingDisk,
    KilledError,
    contents,
    fix_times,
    outcome,
    repeatable,
    write_tree,
)

OLD = {b"a": b"old " * 30, b"sub/b": b"old"}
NEW = {b"a": b"new!" * 90_000, b"c": b"new"}


def tree_of(path: Path, files: dict[bytes, bytes]) -> Path:
    return write_tree(path, {os.fsdecode(name): data for name, data in files.items()})


# --- round trips ---

NAMES = st.binary(min_size=1, max_size=12).filter(
    lambda n: b"/" not in n and b"\x00" not in n and n not in (b".", b"..")
)
SIZES = st.sampled_from([0, 1, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 300_000])
TREES = st.recursive(
    st.dictionaries(NAMES, SIZES, min_size=1, max_size=4),
    lambda children: st.dictionaries(NAMES, st.one_of(SIZES, children), min_size=1, max_size=4),
    max_leaves=6,
)


def build(root: Path, tree: dict[bytes, Any], draw: Callable[[int], bytes]) -> None:
    root.mkdir()
    for name, what in tree.items():
        path = root / os.fsdecode(name)
        if isinstance(what, dict):
            build(path, what, draw)
        else:
            path.write_bytes(draw(what))
            path.chmod(0o400 + what % 0o377)


@given(TREES, st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_sealed_comes_out_again(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[bytes, Any], audited: bool
) -> None:
    place = tmp_path_factory.mktemp("round")
    build(place / "source", tree, repeatable("round"))
    before = contents(place / "source")
    sealed = seal(place / "source", place / "volume", key=KEY, audited=audited)
    assert contents(place / "source") == before
    with Volume.open(place / "volume", KEY, expect=sealed.digest, audit=audited) as volume:
        volume.verify()
        volume.extract(place / "out")
        files = {name: what for name, what in before.items() if what[0] == "file"}
        assert {name: volume.file(name) for name in files} == {name: what[2] for name, what in files.items()}
        assert sealed.files == len(files)
        assert sealed.size_bytes == sum(len(volume.file(name)) for name in files)
    assert contents(place / "out") == before


def test_links_and_hard_links_and_strange_names_come_out_again(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "s", {"a": b"1", "d/b": b"2", "-dash": b"3", "new\nline": b"4"})
    (source / "d" / "up").symlink_to("../a")
    (source / "loop").symlink_to("loop")
    (source / "dangling").symlink_to("nowhere/./x//y")
    os.link(source / "a", source / "d" / "same")
    (source / os.fsdecode(b"\xff\xfe")).write_bytes(b"5")
    (source / "empty").mkdir()
    (source / "d").chmod(0o500)
    seal(source, tmp_path / "v", key=KEY)
    with Volume.open(tmp_path / "v", KEY, expect=None) as volume:
        volume.extract(tmp_path / "out")
        assert volume.tree.target(volume.tree.find("dangling") or 0) == b"nowhere/./x//y"
    assert contents(tmp_path / "out") == contents(source)
    assert (tmp_path / "out" / "d" / "same").stat().st_nlink == 1


def test_one_file_is_a_volume_too(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"w" * 70_000)
    sealed = seal(tmp_path / "weights", tmp_path / "v", key=KEY)
    assert outcome(tmp_path / "v", sealed.digest) == {b"weights": b"w" * 70_000}


def test_data_lie_in_the_order_of_entries(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "s", {"b/x": b"x" * 5000, "a/y": b"y", "a/c/z": b"z", "c": b"c" * 4096})
    seal(source, tmp_path / "v", key=KEY)
    with Volume.open(tmp_path / "v", KEY, expect=None) as volume:
        tree = volume.tree
        files = [i for i in range(len(tree)) if tree.kind[i] == Kind.FILE]
        assert [tree.path(i) for i in files] == [b"c", b"a/y", b"b/x", b"a/c/z"]
        assert [tree.data_off[i] for i in files] == [0, 4096, 8192, 16384]
        assert volume.read(4096, 2) == b"y\x00"


def test_setuid_is_not_sealed(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "s", {"a": b"1"})
    (source / "a").chmod(0o6755)
    seal(source, tmp_path / "v", key=KEY)
    with Volume.open(tmp_path / "v", KEY, expect=None) as volume:
        assert volume.tree.mode[1] == 0o755


def test_names_sizes_and_counts_are_hidden(tmp_path: Path) -> None:
    """Two trees of the same padded length have the same files of the same lengths, and no name is in any of them."""
    first = write_tree(tmp_path / "s1", {"secret-name": b"plaintext-marker" * 10, "other": b""})
    second = write_tree(tmp_path / "s2", {f"{i:03d}": b"x" * (i + 1) for i in range(14)})
    for source in (first, second):
        seal(source, Path(f"{source}.v"), key=KEY)
    stored = [
        {p.relative_to(v): p.stat().st_size for p in v.rglob("*")} for v in (Path(f"{first}.v"), Path(f"{second}.v"))
    ]
    assert {k: v for k, v in stored[0].items() if k.name != "data"} == {
        k: v for k, v in stored[1].items() if k.name != "data"
    }
    everything = b"".join(p.read_bytes() for p in Path(f"{first}.v").rglob("*") if p.is_file())
    assert b"secret-name" not in everything
    assert b"plaintext-marker" not in everything
    assert KEY.reveal() not in everything


def test_progress_ends_at_the_length_of_the_linear_space(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "s", {"a": b"1" * 1_000_000})
    calls: list[tuple[int, int]] = []
    seal(source, tmp_path / "v", key=KEY, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] == layout.padded(1_000_000)


@pytest.mark.slow
def test_more_than_one_segment(tmp_path: Path) -> None:
    big = os.urandom(1 << 20) * 70
    sealed = seal(write_tree(tmp_path / "s", {"big": big, "small": b"s"}), tmp_path / "v", key=KEY)
    with Volume.open(tmp_path / "v", KEY, expect=sealed.digest, audit=True) as volume:
        assert volume.head.layout.segments == 2
        assert volume.file("big") == big
        assert volume.file("small") == b"s"
    assert check(tmp_path / "v", expect=sealed.digest).digest == sealed.digest


# --- what cannot be sealed ---


def test_everything_that_cannot_be_sealed_is_listed_together(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "s", {"good": b"1", "d/good": b"2"})
    os.mkfifo(source / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "d" / "socket"))
    (source / "d" / "out").symlink_to("../../x")
    (source / "abs").symlink_to("/etc/passwd")
    with pytest.raises(InputError) as caught:
        seal(source, tmp_path / "v", key=KEY)
    assert caught.value.code == "source-unsealable"
    assert {reason.where: reason.found for reason in caught.value.reasons} == {
        "pipe": "a named pipe",
        "d/socket": "a socket",
        "d/out": "a link that leads out of the folder: ../../x",
        "abs": "a link to an absolute path: /etc/passwd",
    }
    assert not (tmp_path / "v").exists()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a device node")
def test_a_device_cannot_be_sealed(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "s", {"good": b"1"})
    os.mknod(source / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with pytest.raises(InputError) as caught:
        seal(source, tmp_path / "v", key=KEY)
    assert [(r.where, r.found) for r in caught.value.reasons] == [("null", "a character device")]


def test_unreadable_entries_are_listed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root can read everything, so the system's answer is played."""
    source = write_tree(tmp_path / "s", {"good": b"1", "hidden": b"2", "also": b"3"})
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "access", lambda path, mode: path.endswith(b"good"))
    with pytest.raises(InputError) as caught:
        seal(source, tmp_path / "v", key=KEY)
    assert [r.where for r in caught.value.reasons] == ["also", "hidden"]


@pytest.mark.parametrize("files", [{}, {"folder": None}])
def test_a_folder_without_files_is_not_sealed(tmp_path: Path, files: dict[str, None]) -> None:
    (tmp_path / "s").mkdir()
    for name in files:
        (tmp_path / "s" / name).mkdir()
    with pytest.raises(InputError, match="1 entry in the way") as caught:
        seal(tmp_path / "s", tmp_path / "v", key=KEY)
    assert caught.value.code == "source-unsealable"


def test_a_source_that_is_not_there_or_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("nothing", "pipe"):
        with pytest.raises(InputError) as caught:
            seal(tmp_path / name, tmp_path / "v", key=KEY)
        assert caught.value.code == "source-unsealable"


def test_a_hostile_name_is_shown_escaped(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "s", {"good": b"1"})
    os.mkfifo(source / "x\n\u202e\x1b[2J")
    with pytest.raises(InputError) as caught:
        seal(source, tmp_path / "v", key=KEY)
    assert caught.value.reasons[0].where == "x\\n\\u202e\\x1b[2J"


def test_a_file_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    """Files of /proc have size 0 and are not empty: sealing them as empty would be wrong bytes."""
    with pytest.raises(InputError) as caught:
        seal(Path("/proc/self/status"), tmp_path / "v", key=KEY)
    assert caught.value.code == "source-unsealable"
    assert list(tmp_path.iterdir()) == []


def append(source: Path) -> None:
    with open(source / "z", "ab") as file:
        file.write(b"more")


def twin(source: Path) -> None:
    (source / "t").write_bytes(b"z" * 400_000)
    (source / "t").replace(source / "z")


def pipe(source: Path) -> None:
    (source / "z").unlink()
    os.mkfifo(source / "z")


def link(source: Path) -> None:
    (source / "z").unlink()
    (source / "z").symlink_to("a")


CHANGES: dict[str, Callable[[Path], object]] = {
    "grows": append,
    "shrinks": lambda s: os.truncate(s / "z", 10),
    "is rewritten with the same size": lambda s: (s / "z").write_bytes(b"Z" * 400_000),
    "is replaced by its twin": twin,
    "vanishes": lambda s: (s / "z").unlink(),
    "becomes a pipe": pipe,
    "becomes a link": link,
    "gets a neighbour": lambda s: (s / "new").write_bytes(b"n"),
    "loses a neighbour that was read": lambda s: (s / "a").unlink(),
    "changes its mode": lambda s: (s / "z").chmod(0o600),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path, change: str) -> None:
    source = write_tree(tmp_path / "s", {"a": b"a" * 600_000, "z": b"z" * 400_000})
    pending = [CHANGES[change]]

    def progress(done: int, total: int) -> None:
        while pending:
            pending.pop()(source)

    with pytest.raises(InputError) as caught:
        seal(source, tmp_path / "v", key=KEY, progress=progress)
    assert caught.value.code == "source-unsealable"
    assert caught.value.reasons
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_all_changed_files_are_listed(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "s", {"a": b"a" * 600_000, "x": b"x", "y": b"y", "z": b"z"})

    def progress(done: int, total: int) -> None:
        for name in "xz":
            (source / name).write_bytes(b"changed")

    with pytest.raises(InputError) as caught:
        seal(source, tmp_path / "v", key=KEY, progress=progress)
    assert [reason.where for reason in caught.value.reasons] == ["x", "z"]


# --- targets ---


def test_a_target_that_exists_or_lies_in_the_source_is_refused(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "s", {"a": b"1"})
    (tmp_path / "v").mkdir()
    with pytest.raises(InputError, match="exists"):
        seal(source, tmp_path / "v", key=KEY)
    with pytest.raises(InputError, match="its own source"):
        seal(source, source / "v", key=KEY)
    with pytest.raises(InputError, match="cannot be written"):
        seal(source, tmp_path / "missing" / "v", key=KEY)


def test_only_a_volume_is_ever_replaced(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "s", {"a": b"1"})
    holiday = write_tree(tmp_path / "photos", {"beach": b"sand"})
    with pytest.raises(CloisterError):
        seal(source, holiday, key=KEY, replace=True)
    assert (holiday / "beach").read_bytes() == b"sand"


def test_a_target_made_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "s", {"a": b"1"})
    with pytest.raises(InputError, match="cannot be written"):
        seal(source, tmp_path / "v", key=KEY, progress=lambda done, total: (tmp_path / "v").mkdir())
    assert list((tmp_path / "v").iterdir()) == []


@pytest.mark.parametrize("wrong", [{"key": KEY, "generation": 0}, {"key": KEY, "volume_id": b"short"}])
def test_a_callers_mistake_is_no_error_of_the_tree(tmp_path: Path, wrong: dict[str, Any]) -> None:
    source = write_tree(tmp_path / "s", {"a": b"1"})
    with pytest.raises(ValueError, match=r"wanted|16 bytes"):
        seal(source, tmp_path / "v", **wrong)


# --- accidents: after each change to the disk, one after the other ---


@pytest.fixture(scope="module")
def accident(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    place = tmp_path_factory.mktemp("accident")
    return place, tree_of(place / "old", OLD), tree_of(place / "new", NEW)


def count_changes(source: Path, target: Path, *, replace: bool) -> int:
    disk = FailingDisk()
    Sealer(disk).seal(source, target, key=KEY, replace=replace)
    return disk.changes


def attempt(disk: FailingDisk, source: Path, target: Path, *, replace: bool) -> list[dict[bytes, bytes] | None]:
    """Seal; which states the target may be in afterwards, according to what the user was told."""
    old = OLD if replace else None
    try:
        Sealer(disk).seal(source, target, key=KEY, replace=replace)
    except MachineError as error:
        return [old] if error.code == "disk-full" else [NEW]
    except (KeyboardInterrupt, KilledError):
        return [old, NEW]
    return [NEW]


@pytest.mark.parametrize("how", ["full", "interrupted", "killed"])
@pytest.mark.parametrize("replace", [False, True])
def test_an_accident_at_any_change_leaves_the_old_state_or_the_new(
    accident: tuple[Path, Path, Path], how: str, replace: bool
) -> None:
    place, old, new = accident
    target = place / f"v-{how}-{replace}"

    def restore() -> None:
        if target.exists() or not replace:
            with suppress(FileNotFoundError):
                FailingDisk().remove(target)
        if replace:
            seal(old, target, key=KEY)

    restore()
    total = count_changes(new, target, replace=replace)
    assert total > 10
    for at in range(total):
        restore()
        allowed = attempt(FailingDisk(at, how), new, target, replace=replace)
        state = outcome(target, None) if target.exists() else None
        assert state in allowed, f"torn at change {at}"
        left = [path.name for path in place.iterdir() if SEALING in path.name]
        if how != "killed":
            assert not left or at == total - 1, f"left behind at change {at}: {left}"
    restore()
    seal(new, target, key=KEY, replace=replace)
    assert not [path for path in place.iterdir() if path.name.startswith(target.name + SEALING)]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "s", {"a": b"1" * 300_000})
    (tmp_path / f"v{SEALING}dead").mkdir()
    seen: list[list[str]] = []

    def progress(done: int, total: int) -> None:
        if not seen:
            seen.append([])
            seen.append(sorted(path.name for path in tmp_path.iterdir() if SEALING in path.name))
            seal(source, tmp_path / "v", key=KEY)  # a second sealer of the same target must not disturb the first

    with pytest.raises(InputError, match="cannot be written"):
        seal(source, tmp_path / "v", key=KEY, progress=progress)
    assert len(seen[1]) == 1
    assert "dead" not in seen[1][0]
    assert outcome(tmp_path / "v", None) == {b"a": b"1" * 300_000}


def test_a_pair_of_key_and_nonce_is_never_used_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over finished, interrupted and killed seals of the same tree, both suites, and re-wraps."""
    used: dict[tuple[bytes, bytes], int] = {}

    class Audited:
        def __init__(self, key: bytes) -> None:
            self._key, self._cipher = key, AESGCM(key)
            self.decrypt, self.decrypt_into = self._cipher.decrypt, self._cipher.decrypt_into

        def _use(self, nonce: bytes) -> None:
            used[self._key, nonce] = used.get((self._key, nonce), 0) + 1

        def encrypt(self, nonce: bytes, data: bytes, context: bytes) -> bytes:
            self._use(nonce)
            return self._cipher.encrypt(nonce, data, context)

        def encrypt_into(self, nonce: bytes, data: memoryview, context: bytes, into: memoryview) -> int:
            self._use(nonce)
            return self._cipher.encrypt_into(nonce, data, context, into)

    monkeypatch.setattr(keys, "AESGCM", Audited)
    source = tree_of(tmp_path / "s", NEW)
    volume_id = bytes(16)
    for audited in (False, True):
        for at in range(0, 16, 3):
            for how in ("interrupted", "killed"):
                with suppress(KeyboardInterrupt, KilledError):
                    Sealer(FailingDisk(at, how)).seal(
                        source, tmp_path / "x", key=KEY, volume_id=volume_id, audited=audited
                    )
                with suppress(FileNotFoundError):
                    FailingDisk().remove(tmp_path / "x")
        seal(source, tmp_path / "v", key=KEY, volume_id=volume_id, audited=audited, replace=audited)
        rewrap(tmp_path / "v", KEY, OTHER_KEY, keep=True)
        rewrap(tmp_path / "v", OTHER_KEY, KEY)
    assert len(used) > 100
    assert set(used.values()) == {1}


def test_two_seals_of_one_tree_have_nothing_in_common(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "s", {"a": b"1" * 100_000})
    fix_times(source)
    digests = {seal(source, tmp_path / f"v{i}", key=KEY).digest for i in range(2)}
    assert len(digests) == 2
    first, second = ((tmp_path / f"v{i}" / "data" / "00000000").read_bytes() for i in range(2))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < len(first) // 100
