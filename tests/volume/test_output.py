"""Outputs: one writer at a time, the registered version is the only one that is replaced, the old stays until the new is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.errors import InputError, MachineError, TamperedError
from cloister.volume.output import OutputVolume, publish
from cloister.volume.read import Volume, peek
from cloister.volume.seal import Sealed, Sealer, seal
from tests.volume.support import KEY, FailingDisk, outcome, write_tree

ID = bytes(16)


@pytest.fixture
def results(tmp_path: Path) -> tuple[Path, Path]:
    return write_tree(tmp_path / "r1", {"w": b"first"}), write_tree(tmp_path / "r2", {"w": b"second"})


def publish_as(directory: Path, target: Path, generation: int, previous: str | None) -> Sealed:
    return publish(directory, target, key=KEY, generation=generation, volume_id=ID, previous=previous)


def test_generations_follow_each_other(tmp_path: Path, results: tuple[Path, Path]) -> None:
    first = publish_as(results[0], tmp_path / "out", 1, None)
    assert outcome(tmp_path / "out", first.digest) == {b"w": b"first"}
    second = publish_as(results[1], tmp_path / "out", 2, first.digest)
    assert outcome(tmp_path / "out", second.digest) == {b"w": b"second"}
    assert outcome(tmp_path / "out", first.digest) == "volume-stale"
    assert (second.generation, second.volume_id) == (2, first.volume_id)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.lock", "r1", "r2"]


def test_two_runs_on_one_output_are_refused(tmp_path: Path, results: tuple[Path, Path]) -> None:
    with OutputVolume.claim(tmp_path / "out") as mine:
        with pytest.raises(MachineError) as caught:
            OutputVolume.claim(tmp_path / "out")
        assert caught.value.code == "busy"
        with OutputVolume.claim(tmp_path / "another"):
            pass
        mine.publish(results[0], key=KEY, generation=1, volume_id=ID, previous=None)
    OutputVolume.claim(tmp_path / "out").close()


def test_a_released_claim_publishes_nothing(tmp_path: Path, results: tuple[Path, Path]) -> None:
    output = OutputVolume.claim(tmp_path / "out")
    output.close()
    output.close()
    with pytest.raises(ValueError, match="closed"):
        output.publish(results[0], key=KEY, generation=1, volume_id=ID, previous=None)


def test_what_is_not_registered_is_never_replaced(tmp_path: Path, results: tuple[Path, Path]) -> None:
    first = publish_as(results[0], tmp_path / "out", 1, None)
    with pytest.raises(InputError, match="none is registered"):
        publish_as(results[1], tmp_path / "out", 1, None)
    with pytest.raises(TamperedError) as caught:
        publish_as(results[1], tmp_path / "out", 2, "sha256:" + "0" * 64)
    assert caught.value.code == "volume-stale"
    with pytest.raises(TamperedError) as caught:
        publish_as(results[1], tmp_path / "lost", 2, first.digest)
    assert caught.value.reasons[0].found == "nothing"
    assert peek(tmp_path / "out").digest == first.digest


def test_a_failed_publication_leaves_the_old_generation(tmp_path: Path, results: tuple[Path, Path]) -> None:
    first = publish_as(results[0], tmp_path / "out", 1, None)
    with (
        OutputVolume.claim(tmp_path / "out", sealer=Sealer(FailingDisk(4))) as output,
        pytest.raises(MachineError, match="nothing was changed"),
    ):
        output.publish(results[1], key=KEY, generation=2, volume_id=ID, previous=first.digest)
    assert outcome(tmp_path / "out", first.digest) == {b"w": b"first"}


def test_readers_of_the_old_generation_read_on(tmp_path: Path, results: tuple[Path, Path]) -> None:
    first = publish_as(results[0], tmp_path / "out", 1, None)
    with Volume.open(tmp_path / "out", KEY, expect=first.digest) as volume:
        publish_as(results[1], tmp_path / "out", 2, first.digest)
        assert volume.file("w") == b"first"


def test_an_output_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        OutputVolume.claim(tmp_path / "missing" / "out")


def test_a_file_in_place_of_the_output_is_left_alone(tmp_path: Path, results: tuple[Path, Path]) -> None:
    (tmp_path / "out").write_bytes(b"notes")
    with pytest.raises(InputError, match="no volume"):
        seal(results[0], tmp_path / "out", key=KEY, replace=True)
    assert (tmp_path / "out").read_bytes() == b"notes"
