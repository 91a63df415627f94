"""Outputs at every cut: whatever is interrupted, the registered volume is on disk and the next run goes on from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cloister.broker.wire import OutputKey
from cloister.crypto.keys import Secret
from cloister.errors import InputError, TamperedError
from cloister.node.outputs import claimed, current, finished
from cloister.volume.seal import seal
from tests.e2e_support import Deal, World

DONE = {"records.sealed", "model.sealed", "model.sealed.provenance.json"}

_CUT = """
import os
from cloister.broker.client import BrokerClient
from cloister.errors import PeerError
from cloister.node.outputs import Target
from cloister.volume.disk import Disk

def die(*args, **kwargs):
    os._exit(99)

def then_die(whole):
    def cut(*args, **kwargs):
        whole(*args, **kwargs)
        os._exit(99)
    return cut

def at_the_swap(whole):
    def cut(disk, new, target):
        whole(disk, new, target)
        if ".next-" not in target.name:  # sealing names its own folder in the same way
            os._exit(99)
    return cut

def unheard(whole):
    def cut(*args, **kwargs):
        whole(*args, **kwargs)
        raise PeerError("the line went dead", code="broker-unreachable")
    return cut

"""

# where it is cut -> (how, is the new generation registered then)
CUTS = {
    "while sealing": ("from cloister.volume.seal import Sealer\nDisk.sync = die", False),
    "sealed, nobody told": ("Target.offer = die", False),
    "registered, answer not read": ("BrokerClient.register_root = then_die(BrokerClient.register_root)", True),
    "registered, answer lost": ("BrokerClient.register_root = unheard(BrokerClient.register_root)", True),
    "registered, not swapped": ("Target.commit = die", True),
    "swapped, the old one still there": (
        "Disk.exchange = at_the_swap(Disk.exchange)\nDisk.name = at_the_swap(Disk.name)",
        True,
    ),
    "swapped and cleaned": ("Target.commit = then_die(Target.commit)", True),
}


def owner_opens(world: World, deal: Deal) -> tuple[int, str]:
    back = world.fresh("back") / "files"
    said = world.hospital.call(
        "open", str(deal.model), "--to", str(back), "--contract", str(deal.file), "--asset", "model"
    )
    return said.status, said.data["digest"] if said.status == 0 else said.error


@pytest.mark.slow
@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("cut", list(CUTS))
def test_the_registered_volume_is_found_after_a_cut(world: World, cut: str, generation: int) -> None:
    how, registered = CUTS[cut]
    deal = world.deal()
    before = ""
    if generation == 2:
        before = world.cloud.run(*deal.run()).expect(0).data["outputs"]["model"]["digest"]
    said = world.cloud.run(*deal.run(), before=_CUT + how)
    if cut.endswith("sealing"):
        assert said.status == 99  # the first write of all is cut: volumes are written before anything else is synced
    elif cut == "registered, answer lost":
        assert said.status == 1
        assert said.error == "broker-unreachable"
        assert "both generations are kept" in said.data["hint"]
    else:
        assert said.status == 99
    status, found = owner_opens(world, deal)
    if registered:
        assert status == 0, found
        assert found != before
    elif generation == 2:
        assert (status, found) == (0, before)
    else:
        assert status != 0
    after = world.cloud.run(*deal.run()).expect(0)
    assert after.data["outputs"]["model"]["generation"] == generation + registered
    assert deal.left() == DONE, "nothing unfinished is left"
    assert owner_opens(world, deal) == (0, after.data["outputs"]["model"]["digest"])


@pytest.mark.slow
def test_a_generation_that_waits_is_served(world: World) -> None:
    deal = world.deal(model={})
    world.cloud.run(*deal.run(), before=_CUT + "Target.commit = die")
    assert deal.left() == {"records.sealed", "model.sealed.next-1"}
    question = world.fresh("question") / "q"
    question.write_text("?")
    with world.service(deal, train=False) as (url, _):
        world.clinic.call("ask", str(deal.file), str(question), "--service", url).expect(0)


@pytest.mark.slow
def test_an_old_generation_put_back_is_refused_with_both_digests(world: World) -> None:
    deal = world.deal()
    old = world.cloud.run(*deal.run()).expect(0).data["outputs"]["model"]["digest"]
    kept = deal.folder / "kept"
    shutil.copytree(deal.model, kept)
    new = world.cloud.run(*deal.run()).expect(0).data["outputs"]["model"]["digest"]
    shutil.rmtree(deal.model)
    kept.rename(deal.model)
    error = world.cloud.run(*deal.run()).expect(1).data
    assert error["error"] == "volume-stale"
    assert (error["reasons"][0]["found"], error["reasons"][0]["wanted"]) == (old, new)
    assert owner_opens(world, deal) == (1, "volume-stale")


# --- the rules, without a broker --------------------------------------------------------------------------------------


def volume(at: Path, generation: int, key: Secret) -> str:
    source = at.with_name(f"source-{generation}")
    source.mkdir(exist_ok=True)
    (source / "file").write_text(str(generation))
    return seal(source, at, key=key, generation=generation, volume_id=b"\x05" * 16).digest


def output(key: Secret, generation: int, previous: str | None) -> OutputKey:
    return OutputKey(key=key, volume_id=b"\x05" * 16, generation=generation, previous=previous, owner="hospital")


def test_only_numbered_generations_are_looked_at_or_dropped(tmp_path: Path) -> None:
    """A neighbour that is named alike belongs to somebody else: it is never swapped in and never removed."""
    key = Secret.random()
    target = tmp_path / "model[1].sealed"
    first = volume(target, 1, key)
    neighbour = tmp_path / "model[1].sealed.next-week"
    volume(neighbour, 7, key)
    waiting = tmp_path / "model[1].sealed.next-2"
    second = volume(waiting, 2, key)
    assert current(target, second) == waiting, "brackets in a name are no pattern"
    with claimed(target, output(key, 3, second)):
        assert current(target, second) == target
    assert neighbour.is_dir()
    assert not waiting.exists()
    assert first != second


def test_the_newest_waiting_generation_is_found_by_number(tmp_path: Path) -> None:
    key = Secret.random()
    target = tmp_path / "m"
    for generation in (9, 10):
        volume(tmp_path / f"m.next-{generation}", generation, key)
    assert finished(target) == tmp_path / "m.next-10"


def test_a_failed_run_keeps_the_old_generation_and_drops_its_own(tmp_path: Path) -> None:
    key = Secret.random()
    target = tmp_path / "m"
    first = volume(target, 1, key)

    def fails() -> None:
        with claimed(target, output(key, 2, first)) as one:
            one.write(tmp_path / "source-1")
            assert (tmp_path / "m.next-2").is_dir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert current(target, first) == target
    assert not (tmp_path / "m.next-2").exists()


@pytest.mark.parametrize("what", ["folder", "file", "link", "volume"])
def test_the_first_output_replaces_nothing(tmp_path: Path, what: str) -> None:
    key = Secret.random()
    target = tmp_path / "m"
    if what == "folder":
        target.mkdir()
    elif what == "file":
        target.write_text("mine")
    elif what == "link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        volume(target, 1, key)
    with pytest.raises(InputError, match="knows no version"), claimed(target, output(key, 1, None)):
        pass
    assert target.is_symlink() or target.exists()


def test_a_foreign_volume_in_the_place_is_kept_and_refused(tmp_path: Path) -> None:
    key = Secret.random()
    target = tmp_path / "m"
    volume(target, 4, key)
    with pytest.raises(TamperedError) as caught, claimed(target, output(key, 5, "sha256:" + "0" * 64)):
        pass
    assert caught.value.code == "volume-stale"
    assert target.is_dir()
