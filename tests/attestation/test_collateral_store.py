"""The store: what it takes and refuses, and that a power cut, a flipped byte or a second writer never leaves half of anything."""

from __future__ import annotations

import multiprocessing
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cloister.attestation.binding import Binding
from cloister.attestation.collateral import marks, snapshot
from cloister.attestation.collateral.snapshot import Snapshot
from cloister.attestation.edge import store as store_module
from cloister.attestation.edge.attester import attest, find_attester
from cloister.attestation.edge.collateral import load_all, signature_of
from cloister.attestation.edge.store import Store, replace_file
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.roots import Roots
from cloister.attestation.soft import nvidia as soft_nvidia
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.verify import verify
from cloister.errors import EvidenceError, InputError, MachineError, TamperedError

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
DAY = timedelta(days=1)
SOFT = Roots(soft=True)


def tdx(issued: datetime = NOW - DAY, **options: Any) -> Endorsement:
    return Endorsement("tdx", soft_tdx.FMSPC, soft_tdx.collateral(issued, **options))


def snp(issued: datetime = NOW - DAY, **options: Any) -> tuple[Endorsement, ...]:
    return soft_snp.endorsements(issued, **options)


def sign(message: bytes) -> str:
    return f"signed {snapshot.name_of(message)}"


def check(signature: str, message: bytes) -> str:
    if signature != sign(message):
        raise EvidenceError("the signature is another one", code="evidence-not-authentic")
    return "SHA256:me"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(store: Store, *items: Endorsement, now: datetime = NOW) -> None:
    store.add(items or (tdx(), *snp()), roots=SOFT, now=now)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_store_gives_back_what_was_added_and_remembers_its_numbers(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.endorsements() == Endorsements()
    assert store.marks() == {}
    assert not (tmp_path / "store").exists()  # looking makes nothing
    items = (tdx(), *snp())
    change = store.add(items, roots=SOFT, now=NOW)
    assert len(change.added) == len(items)
    assert set(store.endorsements().items) == set(items)
    assert store.marks() == marks.numbers_of_all(Endorsements(items), SOFT, now=NOW)
    again = store.add(items, roots=SOFT, now=NOW)
    assert (len(again.same), again.added) == (len(items), ())
    assert {path.name for path in (store.folder / "objects").iterdir()} == {
        snapshot.name_of(item.data) for item in items
    }


def test_newer_collateral_replaces_and_its_object_is_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, tdx(evaluation=17))
    fill(store, tdx(NOW, evaluation=18))
    assert store.endorsements().items == (tdx(NOW, evaluation=18),)
    assert len(list((tmp_path / "objects").iterdir())) == 1


def test_rollback_of_collateral_is_refused_with_found_and_wanted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, tdx(NOW - DAY, evaluation=18), *snp(NOW - DAY, number=5))
    before = contents(tmp_path)
    for old in (
        (tdx(NOW - 2 * DAY, evaluation=17),),
        snp(NOW - 2 * DAY, number=4),
        (tdx(NOW - 2 * DAY, evaluation=18),),
    ):
        with pytest.raises(EvidenceError) as refused:
            store.add(old, roots=SOFT, now=NOW)
        assert refused.value.code == "collateral-rolled-back"
        assert all(int(reason.found) < int(reason.wanted.removeprefix("at least ")) for reason in refused.value.reasons)
    assert contents(tmp_path) == before


def test_rollback_stays_refused_after_the_newer_file_is_removed_from_the_list(tmp_path: Path) -> None:
    """The mark outlives what set it: the index remembers numbers beside items."""
    store = Store(tmp_path)
    fill(store, tdx(NOW - DAY, evaluation=18))
    other = Endorsement("tdx", "00A06F050000", soft_tdx.collateral(NOW, fmspc="00A06F050000", evaluation=18))
    fill(store, other)
    index = store._index()
    store._write_index(store_module._Index({("tdx", other.subject): snapshot.name_of(other.data)}, index.marks))
    with pytest.raises(EvidenceError, match="must not replace") as refused:
        store.add([tdx(NOW - 2 * DAY, evaluation=17)], roots=SOFT, now=NOW)
    assert refused.value.code == "collateral-rolled-back"


def test_attack_poisoned_mark_a_forged_item_neither_moves_a_mark_nor_takes_the_place(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, tdx(evaluation=18))
    held = store.marks()
    forged = tdx(NOW, evaluation=10**9, label="attacker")
    with pytest.raises(EvidenceError) as refused:
        store.add([forged], roots=SOFT, now=NOW)
    assert refused.value.code == "evidence-not-authentic"
    empty = Store(tmp_path / "empty")
    empty.add([forged], roots=SOFT, now=NOW)  # where nothing genuine is, it is kept, and believed by no verifier
    assert empty.marks() == {}
    empty.add([tdx(evaluation=18)], roots=SOFT, now=NOW)  # and genuine collateral takes its place
    assert empty.marks() == held


@pytest.mark.parametrize("what", ["chain", "list", "leaf", "manifest"])
def test_forged_collateral_of_any_form_does_not_take_the_place_of_genuine(what: str, tmp_path: Path) -> None:
    if what == "manifest":
        pytest.importorskip("signxml")
        subject = soft_nvidia.rim_ids()[0]
        good = Endorsement("nvidia-gpu", subject, soft_nvidia.driver_rim())
        bad = Endorsement("nvidia-gpu", subject, soft_nvidia.driver_rim(label="attacker"))
        rest: tuple[Endorsement, ...] = ()
    elif what == "leaf":
        rest = snp()
        good = soft_snp.leaf_endorsement(soft_snp.machine("a"))
        bad = Endorsement(
            good.kind, good.subject, soft_snp.leaf_endorsement(soft_snp.machine("a", label="attacker")).data
        )
    else:
        wanted = "Milan/vcek" if what == "chain" else "Milan/crl"
        rest = snp()
        good = next(item for item in rest if item.subject.startswith(wanted))
        bad = next(item for item in snp(label="attacker") if item.subject == good.subject)
    store = Store(tmp_path)
    fill(store, *rest, good)
    assert bad.data != good.data
    with pytest.raises(EvidenceError) as refused:
        fill(store, bad)
    assert refused.value.code == "evidence-not-authentic"
    assert store.endorsements().get(*(good.kind, good.subject)) == good.data


def test_all_or_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, tdx(NOW - DAY, evaluation=18))
    with pytest.raises(EvidenceError):
        store.add([*snp(), tdx(NOW - 2 * DAY, evaluation=17)], roots=SOFT, now=NOW)
    assert store.endorsements().items == (tdx(NOW - DAY, evaluation=18),)


def test_files_of_vendors_are_taken_in(tmp_path: Path) -> None:
    for number, item in enumerate((tdx(), *snp(lines=("Milan",)))):
        (tmp_path / f"{number}.bin").write_bytes(item.data)
    store = Store(tmp_path / "store")
    store.add_files(sorted(tmp_path.glob("*.bin")), roots=SOFT, now=NOW)
    assert {item.subject for item in store.endorsements().items} >= {
        soft_tdx.FMSPC,
        "Milan/vcek",
        "Milan/vlek",
        "Milan/crl",
    }
    (tmp_path / "junk").write_bytes(b"junk")
    for path in (tmp_path / "junk", tmp_path / "absent", tmp_path):
        with pytest.raises(InputError):
            store.add_files([path], roots=SOFT, now=NOW)


def test_a_folder_that_is_something_else_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="other things"):
        fill(Store(tmp_path))
    with pytest.raises(InputError, match="is a file"):
        Store(tmp_path / "thesis.txt").endorsements()
    with pytest.raises(InputError):
        fill(Store(tmp_path / "thesis.txt"))


def test_items_that_break_a_limit_are_refused(tmp_path: Path) -> None:
    for item in (Endorsement("../x", "a", b"x"), Endorsement("tdx", "a\n", b"x"), Endorsement("tdx", "a", b"")):
        with pytest.raises(InputError):
            Store(tmp_path / "store").add([item], roots=SOFT, now=NOW)


# --- snapshots --------------------------------------------------------------------------------------------------------


def test_air_gapped_round_trip_evidence_is_verified_on_the_other_side(tmp_path: Path) -> None:
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    fill(here)
    data = here.export(made=NOW, sign=sign)
    change, found, signer = there.import_(data, check=check, roots=SOFT, now=NOW)
    assert (len(change.added), found.made, signer) == (len(here.endorsements().items), NOW, "SHA256:me")
    assert there.marks() == here.marks()
    binding = Binding("broker", b"n" * 32, b"key", bytes(32))
    evidence = attest(find_attester("soft-tdx", measurement=b"m" * 48), binding)
    assert verify(evidence, there.endorsements(), SOFT, now=NOW).tee == "soft-tdx"
    (tmp_path / "snapshot").write_bytes(data)
    assert verify(evidence, load_all([tmp_path / "snapshot"]), SOFT, now=NOW).tee == "soft-tdx"


def test_an_unsigned_snapshot_and_an_unknown_signer_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    body = snapshot.encode(Snapshot(NOW, (tdx(),)))
    for data, code in ((body, "evidence-malformed"), (snapshot.seal(body, ""), "evidence-malformed"), (snapshot.seal(body, "stranger"), "evidence-not-authentic")):  # fmt: skip
        with pytest.raises(EvidenceError) as refused:
            store.import_(data, check=check, roots=SOFT, now=NOW)
        assert refused.value.code == code
    assert not store.folder.exists()


def test_an_import_keeps_what_is_newer_here_and_takes_the_rest(tmp_path: Path) -> None:
    old, new = Store(tmp_path / "old"), Store(tmp_path / "new")
    fill(old, tdx(NOW - 2 * DAY, evaluation=17), *snp(NOW - 2 * DAY, number=4))
    fill(new, tdx(NOW - DAY, evaluation=18))
    change, _, _ = new.import_(old.export(made=NOW, sign=sign), check=check, roots=SOFT, now=NOW)
    assert new.endorsements().get("tdx", soft_tdx.FMSPC) == tdx(NOW - DAY, evaluation=18).data
    assert {kind for kind, _ in change.added} == {"sev-snp"}
    assert {reason.wanted for reason in change.kept} >= {"at least 18"}


def test_nothing_to_export_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no collateral"):
        Store(tmp_path).export(made=NOW, sign=sign)


# --- faults of the disk -----------------------------------------------------------------------------------------------


def test_a_corrupted_object_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, tdx())
    (path,) = (tmp_path / "objects").iterdir()
    for damage in (
        path.read_bytes()[:-1],
        path.read_bytes() + b"x",
        b"",
        path.read_bytes().replace(b"e", b"f", 1),
        None,
    ):
        good = path.read_bytes()
        path.unlink() if damage is None else path.write_bytes(damage)
        for use in (store.endorsements, lambda: load_all([tmp_path]), lambda: fill(store, *snp())):
            with pytest.raises(TamperedError):
                use()
        path.write_bytes(good)
    assert store.endorsements().items


def test_every_flipped_byte_of_the_index_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, tdx())
    path = tmp_path / "index"
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(TamperedError):
            store.marks()
    for damage in (b"", good[:31], good[:-1], good + b"x", b"\x00" * 32 + b"\xff"):
        path.write_bytes(damage)
        with pytest.raises(TamperedError):
            store.marks()


class PowerCutError(BaseException):
    pass


def test_power_cut_between_any_two_steps_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies before its n-th call of the system; then it starts again. n grows until it lives."""
    old, new = (tdx(evaluation=17),), (tdx(NOW, evaluation=18), *snp())
    seen = set()
    for cut in range(200):
        folder = tmp_path / str(cut)
        store = Store(folder)
        fill(store, *old)
        steps = 0

        def counted(real: Any, limit: int = cut) -> Any:
            def call(*args: Any, **rest: Any) -> Any:
                nonlocal steps
                if steps == limit:
                    raise PowerCutError
                steps += 1
                return real(*args, **rest)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", counted(os.fsync))
            patch.setattr(Path, "replace", counted(Path.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            try:
                fill(store, *new)
                lived = True
            except PowerCutError:
                lived = False
        found = set(store.endorsements().items)
        assert found in (set(old), set(new)), cut
        seen.add(frozenset(found) == frozenset(new))
        evaluation = max(
            value for name, value in store.marks().items() if name.startswith("tcb") and not name.endswith("time")
        )
        assert evaluation == (18 if found == set(new) else 17)  # marks move with the collateral, never without
        fill(store, *new)
        assert set(store.endorsements().items) == set(new)
        assert set(contents(folder)) == {"index", *(f"objects/{snapshot.name_of(item.data)}" for item in new)}
        if lived:
            break
    else:
        pytest.fail("it never lived")
    assert seen == {True, False}


def test_power_cut_in_the_very_first_change_leaves_a_folder_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dies)
        with pytest.raises(PowerCutError):
            fill(Store(tmp_path / "store"), tdx())
    (tmp_path / "store" / ".index.0123").write_bytes(b"half")
    assert Store(tmp_path / "store").endorsements() == Endorsements()
    fill(Store(tmp_path / "store"), tdx())
    assert not (tmp_path / "store" / ".index.0123").exists()


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    fill(store, tdx(evaluation=17))
    before = contents(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(MachineError) as refused:
            fill(store, tdx(NOW, evaluation=18))
    assert refused.value.code == "disk-full"
    assert contents(tmp_path) == before
    with pytest.raises(MachineError):
        replace_file(tmp_path / "absent" / "file", b"x")


def _writer(folder: str, first: int) -> None:
    for number in range(first, first + 6):
        fmspc = f"{number:012X}"
        data = soft_tdx.collateral(NOW - DAY, fmspc=fmspc)
        Store(Path(folder)).add([Endorsement("tdx", fmspc, data)], roots=SOFT, now=NOW)


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_writer, args=(str(tmp_path), first)) for first in (0, 100)]
    for each in writers:
        each.start()
    for each in writers:
        each.join(60)
    assert [each.exitcode for each in writers] == [0, 0]
    subjects = {item.subject for item in Store(tmp_path).endorsements().items}
    assert subjects == {f"{number:012X}" for number in (*range(6), *range(100, 106))}


def test_a_store_on_a_read_only_disk_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    fill(store, tdx())
    for path in (store.folder, store.folder / "objects"):
        path.chmod(0o555)
    assert store.endorsements().items == (tdx(),)
    for path in (store.folder, store.folder / "objects"):
        path.chmod(0o755)


# --- everything that can be named -------------------------------------------------------------------------------------


def test_load_all_takes_files_snapshots_and_stores_and_the_last_counts(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    fill(store, tdx(NOW, evaluation=18), *snp())
    (tmp_path / "file").write_bytes(tdx(evaluation=17).data)
    (tmp_path / "snapshot").write_bytes(store.export(made=NOW, sign=sign))
    everything = [tmp_path / "file", tmp_path / "store"]
    assert load_all(everything).get("tdx", soft_tdx.FMSPC) == tdx(NOW, evaluation=18).data
    assert set(load_all([tmp_path / "snapshot"]).items) == set(store.endorsements().items)
    assert load_all([*everything, tmp_path / "file"]).get("tdx", soft_tdx.FMSPC) == tdx(evaluation=17).data
    (tmp_path / "bad").write_bytes((tmp_path / "snapshot").read_bytes()[:-1])
    for path in (tmp_path / "bad", tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError):
            load_all([path])


def test_a_change_is_seen_by_its_signature(tmp_path: Path) -> None:
    store, file = Store(tmp_path / "store"), tmp_path / "file"
    fill(store, tdx(evaluation=17))
    file.write_bytes(b"x")
    paths = [file, store.folder, tmp_path / "absent"]
    first = signature_of(paths)
    assert first == signature_of(paths)
    fill(store, tdx(NOW, evaluation=18))
    second = signature_of(paths)
    assert second != first
    file.unlink()
    assert signature_of(paths) not in (first, second)
