"""Attacks on stored volumes, by name. Two outcomes are allowed: the right bytes, or a refusal that names what failed."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from cloister.crypto.keys import Secret
from cloister.errors import CloisterError, InputError, MachineError, TamperedError
from cloister.volume import format as fmt
from cloister.volume import keys, layout, types
from cloister.volume.read import Volume, peek, unwrap
from cloister.volume.rewrap import rewrap
from cloister.volume.seal import Sealed, seal
from cloister.volume.types import CHUNK
from tests.volume.support import KEY, OTHER_KEY, FailingDisk, KilledError, outcome, write_tree

FILES = {b"a": bytes(range(256)) * 600, b"d/b": b"bb" * 40_000, b"empty": b""}
ID = b"volume-id-16byte"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sealed]:
    place = tmp_path_factory.mktemp("read")
    source = write_tree(place / "s", {os.fsdecode(name): data for name, data in FILES.items()})
    return place / "v", seal(source, place / "v", key=KEY, generation=2, volume_id=ID)


@pytest.fixture
def copy(sealed: tuple[Path, Sealed], tmp_path: Path) -> Path:
    shutil.copytree(sealed[0], tmp_path / "v")
    return tmp_path / "v"


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory: pytest.TempPathFactory, sealed: tuple[Path, Sealed]) -> dict[str, Path]:
    """Volumes of the same tree that differ in one thing: what an attacker has at hand."""
    place, source = tmp_path_factory.mktemp("neighbours"), sealed[0].parent / "s"
    seal(source, place / "older", key=KEY, generation=1, volume_id=ID)
    seal(source, place / "twin", key=KEY, generation=2, volume_id=ID)
    seal(source, place / "other volume", key=KEY, generation=2)
    seal(source, place / "other key", key=OTHER_KEY, generation=2, volume_id=ID)
    seal(source, place / "no leaves", key=KEY, generation=2, volume_id=ID, audited=False)
    return {path.name: path for path in place.iterdir()}


@contextmanager
def flipped(path: Path, at: int, bit: int = 0) -> Iterator[None]:
    with open(path, "r+b", buffering=0) as file:
        original = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([original[0] ^ (1 << bit)]), at)
        try:
            yield
        finally:
            os.pwrite(file.fileno(), original, at)


def boundaries(size: int, step: int) -> list[int]:
    marks = {0, 1, CHUNK - 1, CHUNK, CHUNK + 15, layout.RECORD, size // 2, size - 33, size - 1, *range(7, size, step)}
    return sorted(mark for mark in marks if 0 <= mark < size)


def test_an_untouched_volume_opens(sealed: tuple[Path, Sealed]) -> None:
    assert outcome(sealed[0], sealed[1].digest) == FILES
    assert outcome(sealed[0], sealed[1].digest, audit=True) == FILES
    assert outcome(sealed[0], None) == FILES


def test_the_reader_is_what_servers_are_written_against(sealed: tuple[Path, Sealed]) -> None:
    with Volume.open(sealed[0], KEY, expect=sealed[1].digest) as volume:
        assert isinstance(volume, types.Volume)
        assert (volume.generation, volume.volume_id, volume.digest) == (2, ID, sealed[1].digest)
        assert KEY.reveal().hex() not in repr(volume) + repr(volume.head)


# --- changed bytes ---


@pytest.mark.parametrize(("part", "step"), [("head", 61), ("manifest", 1511), ("data/00000000", 4999)])
@pytest.mark.parametrize("expect", [True, False])
def test_no_flipped_byte_comes_out_as_another(
    copy: Path, sealed: tuple[Path, Sealed], part: str, step: int, expect: bool
) -> None:
    digest = sealed[1].digest if expect else None
    size = (copy / part).stat().st_size
    refused = 0
    for at in boundaries(size, step):
        with flipped(copy / part, at, at % 8):
            result = outcome(copy, digest)
            leaves = part.startswith("data") and at >= size // (layout.RECORD + layout.LEAF) * layout.RECORD
            assert result == (FILES if leaves else "volume-tampered"), f"byte {at} of {part}"
            assert outcome(copy, digest, audit=True) == "volume-tampered"
            refused += result != FILES
    assert refused > 10
    assert outcome(copy, digest) == FILES


def test_every_byte_of_the_meaningful_head_is_bound(copy: Path) -> None:
    for at in range(250 + 76):
        with flipped(copy / "head", at, at % 8):
            assert outcome(copy, None) == "volume-tampered", f"byte {at}"


def test_a_hole_in_the_data_is_no_file_of_zeros(copy: Path) -> None:
    """Zeroed blocks pass in gocryptfs and securefs lite; here they are a refusal."""
    data = copy / "data" / "00000000"
    with open(data, "r+b") as file:
        file.write(bytes(layout.RECORD))
    assert outcome(copy, None) == "volume-tampered"


def test_a_refusal_names_record_segment_and_files(copy: Path) -> None:
    with flipped(copy / "data" / "00000000", layout.RECORD + 9), Volume.open(copy, KEY, expect=None) as volume:
        with pytest.raises(TamperedError, match="record 1 of segment 0 does not authenticate") as caught:
            volume.file("a")
        assert caught.value.reasons[0].where == "data/00000000.record 1"
        assert caught.value.reasons[0].hint == "affected: a"
        assert volume.read(0, CHUNK) == FILES[b"a"][:CHUNK]
        with pytest.raises(TamperedError) as caught:
            volume.verify()
        assert [reason.where for reason in caught.value.reasons] == ["data/00000000.record 1"]


def test_a_failed_read_leaves_nothing_in_the_buffer(copy: Path) -> None:
    with flipped(copy / "data" / "00000000", layout.RECORD + 9), Volume.open(copy, KEY, expect=None) as volume:
        buffer = bytearray(b"\xee" * (3 * CHUNK))
        with pytest.raises(TamperedError):
            volume.read_into(0, memoryview(buffer))
        assert not any(buffer)


def test_verify_lists_all_broken_records_and_changed_leaves(copy: Path) -> None:
    data, size = copy / "data" / "00000000", (copy / "data" / "00000000").stat().st_size
    with Volume.open(copy, KEY, expect=None) as volume:
        volume.verify()
        with flipped(data, 3), flipped(data, 2 * layout.RECORD + 3), pytest.raises(TamperedError) as caught:
            volume.verify()
        assert [r.where for r in caught.value.reasons] == ["data/00000000.record 0", "data/00000000.record 2"]
        with flipped(data, size - 1), pytest.raises(TamperedError) as caught:
            Volume.open(copy, KEY, expect=None).verify()
        assert [r.where for r in caught.value.reasons] == ["data/00000000.leaves"]


# --- other lengths ---


@pytest.mark.parametrize("part", ["head", "manifest", "data/00000000"])
def test_truncation_at_any_byte_and_extension_are_refused(copy: Path, part: str) -> None:
    original = (copy / part).read_bytes()
    for size in [*boundaries(len(original), len(original) // 40), len(original) + 1, len(original) + layout.RECORD]:
        (copy / part).write_bytes(original.ljust(size, b"\x00")[:size])
        assert outcome(copy, None) == "volume-tampered", f"{part} cut to {size} bytes"
    (copy / part).write_bytes(original)
    assert outcome(copy, None) == FILES


def test_truncation_behind_our_back_is_an_error_and_no_signal(copy: Path) -> None:
    """With mmap the process would die of SIGBUS."""
    with Volume.open(copy, KEY, expect=None) as volume:
        os.truncate(copy / "data" / "00000000", CHUNK // 2)
        with pytest.raises(TamperedError, match="not what was sealed"):
            volume.read(0, 10)


@pytest.mark.parametrize("part", ["head", "manifest", "data/00000000", "data"])
@pytest.mark.parametrize("instead", ["nothing", "a pipe", "a link", "a folder"])
def test_missing_and_special_files_are_refused_at_once(copy: Path, part: str, instead: str) -> None:
    path = copy / part
    path.rename(copy / "aside")
    if instead == "a pipe":
        os.mkfifo(path)  # opening it for reading would block
    elif instead == "a link":
        path.symlink_to(copy / "aside")
    elif instead == "a folder":
        path.mkdir()
    assert outcome(copy, None) == "volume-tampered"


def test_a_mutator_that_runs_meanwhile_cannot_make_us_deliver_wrong_bytes(copy: Path) -> None:
    stop = threading.Event()
    data = copy / "data" / "00000000"
    original = data.read_bytes()

    def mutate() -> None:
        with open(data, "r+b", buffering=0) as file:
            while not stop.is_set():
                os.pwrite(file.fileno(), b"\xff" * 4096, 1000)
                os.pwrite(file.fileno(), original[1000:5096], 1000)

    right = wrong = 0
    thread = threading.Thread(target=mutate)
    with Volume.open(copy, KEY, expect=None) as volume:
        thread.start()
        try:
            for _ in range(300):
                try:
                    assert volume.read(0, 100_000) == FILES[b"a"][:100_000]
                    right += 1
                except TamperedError:
                    wrong += 1
        finally:
            stop.set()
            thread.join()
    assert right + wrong == 300


# --- swaps ---


def test_exchanged_records_are_refused(copy: Path) -> None:
    """Each tag is valid on its own: only the number of the record tells them apart."""
    data = copy / "data" / "00000000"
    original = data.read_bytes()
    first, second = original[: layout.RECORD], original[layout.RECORD : 2 * layout.RECORD]
    data.write_bytes(second + first + original[2 * layout.RECORD :])
    assert outcome(copy, None) == "volume-tampered"


@pytest.mark.parametrize("neighbour", ["older", "twin", "other volume", "other key", "no leaves"])
@pytest.mark.parametrize("part", ["head", "manifest", "data/00000000", "first record"])
def test_parts_of_another_volume_are_refused(
    copy: Path, sealed: tuple[Path, Sealed], neighbours: dict[str, Path], neighbour: str, part: str
) -> None:
    theirs = neighbours[neighbour]
    if part == "first record":
        data = copy / "data" / "00000000"
        foreign = (theirs / "data" / "00000000").read_bytes()[: layout.RECORD]
        data.write_bytes(foreign + data.read_bytes()[layout.RECORD :])
    else:
        shutil.copy(theirs / part, copy / part)
    assert outcome(copy, None) == "volume-tampered"
    assert outcome(copy, sealed[1].digest) == "volume-tampered"


@pytest.mark.slow
def test_exchanged_segments_are_refused(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "s", {"big": os.urandom(1 << 20) * 128})
    seal(source, tmp_path / "v", key=KEY, audited=False)
    data = tmp_path / "v" / "data"
    (data / "00000000").rename(data / "x")
    (data / "00000001").rename(data / "00000000")
    (data / "x").rename(data / "00000001")
    with Volume.open(tmp_path / "v", KEY, expect=None) as volume:
        for offset in (0, 64 << 20):
            with pytest.raises(TamperedError):
                volume.read(offset, 1)


@pytest.mark.parametrize("neighbour", ["older", "twin", "other volume", "no leaves"])
def test_rollback_to_an_authentic_volume_is_stale(
    sealed: tuple[Path, Sealed], neighbours: dict[str, Path], neighbour: str
) -> None:
    path = neighbours[neighbour]
    assert outcome(path, None) == FILES
    with pytest.raises(TamperedError, match="authentic, but not the version") as caught:
        Volume.open(path, KEY, expect=sealed[1].digest, generation=2)
    assert caught.value.code == "volume-stale"
    found, wanted = caught.value.reasons[0].found, caught.value.reasons[0].wanted
    assert found == f"generation {peek(path).generation}, {peek(path).digest}"
    assert wanted == f"generation 2, {sealed[1].digest}"


# --- keys ---


def test_another_key_does_not_open(sealed: tuple[Path, Sealed]) -> None:
    with pytest.raises(TamperedError, match="does not open under this key"):
        Volume.open(sealed[0], OTHER_KEY, expect=None)
    with pytest.raises(ValueError, match="32 bytes"):
        Volume.open(sealed[0], Secret(b"short"), expect=None)


def test_a_wrap_of_another_data_key_is_refused_by_the_commitment(copy: Path) -> None:
    """A holder of the volume key cannot make one head open two ways."""
    head = peek(copy)
    other = Secret(b"x" * 32)
    nonce = b"n" * 12
    wrapped = keys.wrap_data_key(KEY, other, nonce=nonce, salt=head.salt, identity=head.identity, context=head.context)
    (copy / "head").write_bytes(replace(head, wraps=(replace(head.wraps[0], nonce=nonce, wrapped=wrapped),)).encode())
    assert outcome(copy, None) == "volume-tampered"


def test_the_owner_cannot_serve_other_bytes_under_an_audited_name(copy: Path, sealed: tuple[Path, Sealed]) -> None:
    """Whoever has the key can make another record that authenticates. Its leaf, which the name binds, does not fit."""
    head = peek(copy)
    data_key = unwrap(head, KEY, name="v")
    cipher = keys.record_cipher(data_key, head.salt, keys.DATA, 0)
    forged = cipher.encrypt(keys.record_nonce(0), b"f" * CHUNK, head.context)
    data = copy / "data" / "00000000"
    data.write_bytes(forged + data.read_bytes()[layout.RECORD :])
    with Volume.open(copy, KEY, expect=sealed[1].digest) as volume:
        assert volume.read(0, 1) == b"f"  # without the audit GCM alone cannot tell: docs/volumes.md says so
        with pytest.raises(TamperedError, match="parts of it are not what was sealed"):
            volume.verify()
    with (
        Volume.open(copy, KEY, expect=sealed[1].digest, audit=True) as volume,
        pytest.raises(TamperedError, match="does not match its leaf"),
    ):
        volume.read(0, 1)


def test_a_resigned_head_with_another_signer_is_refused(copy: Path) -> None:
    """The host can sign a changed head with a key of its own; the manifest was sealed for the owner's signer."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    host = Ed25519PrivateKey.generate()
    head = replace(peek(copy), signer=host.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))
    (copy / "head").write_bytes(replace(head, signature=host.sign(head.signed)).encode())
    assert peek(copy).signer == head.signer
    assert outcome(copy, None) == "volume-tampered"


def test_an_audit_needs_leaves(neighbours: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="without leaves"):
        Volume.open(neighbours["no leaves"], KEY, expect=None, audit=True)


def test_two_generations_under_one_key_have_one_signer_and_unlinkable_wraps(
    sealed: tuple[Path, Sealed], neighbours: dict[str, Path]
) -> None:
    new, old, foreign = peek(sealed[0]), peek(neighbours["older"]), peek(neighbours["other key"])
    assert new.signer == old.signer != foreign.signer
    assert new.wraps[0].kek_id != old.wraps[0].kek_id


# --- reading ---


def test_any_range_reads_as_the_linear_space(sealed: tuple[Path, Sealed]) -> None:
    with Volume.open(sealed[0], KEY, expect=None) as volume:
        whole = volume.read(0, volume.data_len)
        assert whole.startswith(FILES[b"a"])
        for offset in (0, 1, 4095, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK):
            for size in (0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK):
                if offset + size <= volume.data_len:
                    assert volume.read(offset, size) == whole[offset : offset + size]


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, -1), (1 << 40, 1), (1, 10_000_000)])
def test_a_range_outside_is_a_callers_mistake(sealed: tuple[Path, Sealed], offset: int, size: int) -> None:
    with Volume.open(sealed[0], KEY, expect=None) as volume, pytest.raises(ValueError, match=r"size|bytes"):
        volume.read(offset, size)


def test_many_threads_and_forked_processes_read_the_same(sealed: tuple[Path, Sealed]) -> None:
    with Volume.open(sealed[0], KEY, expect=None) as volume:
        whole = volume.read(0, volume.data_len)
        wrong: list[int] = []

        def work(seed: int) -> None:
            for i in range(60):
                at = (seed * 7919 + i * 104_729) % (volume.data_len - 5000)
                if volume.read(at, 5000) != whole[at : at + 5000]:
                    wrong.append(at)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        child = os.fork()
        if child == 0:
            os._exit(0 if volume.read(0, volume.data_len) == whole else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_closed_volume_does_not_read(sealed: tuple[Path, Sealed]) -> None:
    volume = Volume.open(sealed[0], KEY, expect=None)
    volume.read(0, 1)
    volume.close()
    volume.close()
    with pytest.raises(ValueError, match="closed"):
        volume.read(0, 1)


def test_a_file_that_is_not_there(sealed: tuple[Path, Sealed]) -> None:
    with Volume.open(sealed[0], KEY, expect=None) as volume:
        for path in ("nothing", "d", "a/b", "../s/a"):
            with pytest.raises(InputError, match="no file"):
                volume.file(path)


def test_what_is_no_volume_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in ("nothing", "file"):
        with pytest.raises(InputError, match="is no volume"):
            Volume.open(tmp_path / name, KEY, expect=None)


def test_more_segments_than_descriptors_are_kept_are_read_too(
    sealed: tuple[Path, Sealed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister.volume.stored._KEEP_OPEN", 0)
    assert outcome(sealed[0], sealed[1].digest, audit=True) == FILES


def test_no_descriptor_is_left_open(copy: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    outcome(copy, None)
    with flipped(copy / "manifest", 5):
        outcome(copy, None)
    with pytest.raises(TamperedError):
        Volume.open(copy, KEY, expect="sha256:" + "0" * 64)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- extract ---


def test_extract_leaves_nothing_behind_when_a_record_is_broken(copy: Path, tmp_path: Path) -> None:
    with (
        flipped(copy / "data" / "00000000", 2 * layout.RECORD + 9),
        Volume.open(copy, KEY, expect=None) as volume,
        pytest.raises(TamperedError),
    ):
        volume.extract(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def test_extract_takes_only_a_new_folder(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with Volume.open(copy, KEY, expect=None) as volume, pytest.raises(InputError, match="exists"):
        volume.extract(tmp_path / "out")


def test_extract_to_a_full_disk_changes_nothing(copy: Path, tmp_path: Path) -> None:
    from cloister.volume.extract import extract

    with Volume.open(copy, KEY, expect=None) as volume:
        for at in range(4):
            with pytest.raises(MachineError) as caught:
                extract(volume, tmp_path / "out", disk=FailingDisk(at))
            assert caught.value.code == "disk-full"
            assert [path.name for path in tmp_path.iterdir()] == ["v"]


# --- re-wrap ---


def test_a_rewrapped_volume_keeps_its_name_and_changes_its_key(copy: Path, sealed: tuple[Path, Sealed]) -> None:
    assert rewrap(copy, KEY, OTHER_KEY, keep=True).digest == sealed[1].digest
    assert outcome(copy, sealed[1].digest) == outcome(copy, sealed[1].digest, key=OTHER_KEY) == FILES
    rewrap(copy, KEY, OTHER_KEY)
    assert len(peek(copy).wraps) == 1
    assert outcome(copy, sealed[1].digest) == "volume-tampered"
    assert outcome(copy, sealed[1].digest, key=OTHER_KEY) == FILES
    rewrap(copy, OTHER_KEY, KEY)
    assert outcome(copy, sealed[1].digest) == FILES


def test_a_rewrap_needs_the_key_and_room(copy: Path) -> None:
    with pytest.raises(TamperedError, match="does not open"):
        rewrap(copy, OTHER_KEY, KEY)
    for number in range(49):
        rewrap(copy, KEY, Secret(bytes([100 + number]) * 32), keep=True)
    with pytest.raises(InputError, match="50 wraps"):
        rewrap(copy, KEY, OTHER_KEY, keep=True)
    assert outcome(copy, None) == FILES


@pytest.mark.parametrize("how", ["full", "interrupted", "killed"])
def test_an_accident_while_rewrapping_leaves_one_head_or_the_other(copy: Path, how: str) -> None:
    for at in range(5):
        with suppress(CloisterError, KeyboardInterrupt, KilledError):
            rewrap(copy, KEY, OTHER_KEY, keep=True, disk=FailingDisk(at, how))
        assert outcome(copy, None) == FILES
        peek(copy)
    assert fmt.decode_head((copy / "head").read_bytes()).wraps
