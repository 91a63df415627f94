"""Witness folders, and what they do to old copies, edits and twins."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloister.broker.log.checkpoint import open_checkpoint
from cloister.broker.log.receipt import check_receipt
from cloister.broker.log.witness import Behind
from cloister.broker.store.ledger import Ledger
from cloister.broker.store.witnesses import WitnessFolder
from cloister.crypto.keys import Secret
from cloister.crypto.note import Signer, Verifier
from cloister.errors import InputError, MachineError, PeerError, TamperedError
from tests.broker.store.life import MASTER, NOW, ORIGIN, activate, answer


def clock() -> datetime:
    return datetime(2026, 11, 20, 9, 30, tzinfo=UTC)


@pytest.fixture
def witnesses(tmp_path: Path) -> list[WitnessFolder]:
    return [WitnessFolder.create(tmp_path / f"w{n}", f"witness.example/w{n}", clock=clock) for n in range(3)]


def opened(folder: Path, witnesses: Sequence[WitnessFolder], quorum: int = 2) -> Ledger:
    ledger = Ledger.open(folder, MASTER, origin=ORIGIN)
    try:
        for witness in witnesses:
            witness.add_log(ledger.log_key)
        ledger.watch(witnesses, quorum=quorum)
    except BaseException:
        ledger.close()
        raise
    return ledger


def test_every_answer_carries_the_cosignatures(folder: Path, witnesses: list[WitnessFolder]) -> None:
    with opened(folder, witnesses) as ledger:
        activate(ledger)
        done = answer(ledger, 1)
        keys = [witness.verifier for witness in witnesses]
        verified = check_receipt(done.receipt, ledger.log_key, witnesses=keys)
        assert verified.signed.cosigned == tuple((key.name, int(clock().timestamp())) for key in keys)
        for witness in witnesses:
            seen = witness.seen(ORIGIN)
            assert seen is not None
            assert seen.checkpoint == open_checkpoint(done.receipt.checkpoint, ledger.log_key).checkpoint
            assert witness.logs() == [(ledger.log_key, seen)]


def test_an_old_copy_is_refused_with_both_sizes(folder: Path, witnesses: list[WitnessFolder]) -> None:
    with opened(folder, witnesses) as ledger:
        activate(ledger)
        small = ledger.size
    old = Path(shutil.copytree(folder, folder.with_name("old")))
    with opened(folder, witnesses) as ledger:
        for number in range(5):
            answer(ledger, number)
        large = ledger.size
    with Ledger.open(old, MASTER) as ledger:
        with pytest.raises(TamperedError, match=f"my log has {small} entries, witness .* saw {large}"):
            ledger.watch(witnesses, quorum=2)
        with pytest.raises(TamperedError, match="my log has"):
            answer(ledger, 9)
    opened(folder, witnesses).close()


def test_a_forked_history_is_refused(folder: Path, witnesses: list[WitnessFolder]) -> None:
    with opened(folder, witnesses) as ledger:
        activate(ledger)
    fork = Path(shutil.copytree(folder, folder.with_name("fork")))
    with opened(folder, witnesses) as ledger:
        answer(ledger, 1)
    with Ledger.open(fork, MASTER) as ledger:
        ledger.begin_epoch(now=NOW).result(30)
        for number in range(5):
            answer(ledger, number)
        with pytest.raises(TamperedError, match="history differs"):
            ledger.watch(witnesses, quorum=2)


def test_the_earlier_of_two_twins_is_halted(folder: Path, witnesses: list[WitnessFolder]) -> None:
    with opened(folder, witnesses) as first:
        activate(first)
        twin = Path(shutil.copytree(folder, folder.with_name("twin")))
        (twin / "lock").unlink()
        with opened(twin, witnesses) as second:
            answer(second, 1)
            for _ in range(2):
                with pytest.raises(TamperedError, match="another instance"):
                    answer(first, 2)
            answer(second, 3)


class Unreliable:
    """A witness whose line drops before or after it heard us."""

    def __init__(self, witness: WitnessFolder) -> None:
        self.witness = witness
        self.mode = ""

    @property
    def verifier(self) -> Verifier:
        return self.witness.verifier

    def _call(self, action: Callable[[], str | Behind]) -> str | Behind:
        if self.mode == "before":
            raise PeerError("the line dropped")
        result = action()
        if self.mode == "after":
            raise PeerError("the line dropped")
        if self.mode == "lies" and isinstance(result, str):
            return Signer("witness.example/w0", Secret(b"?" * 32), 4).line("another\n", time=1)
        if self.mode == "two lines" and isinstance(result, str):
            return result + result
        return result

    def open_epoch(self, request: bytes) -> bytes:
        if self.mode:
            raise PeerError("the line dropped")
        return self.witness.open_epoch(request)

    def cosign(self, *, epoch: int, old_size: int, proof: Sequence[bytes], checkpoint: bytes) -> str | Behind:
        return self._call(
            lambda: self.witness.cosign(epoch=epoch, old_size=old_size, proof=proof, checkpoint=checkpoint)
        )


@pytest.mark.parametrize("mode", ["before", "after", "lies", "two lines"])
def test_a_witness_that_fails_is_one_too_few_and_catches_up(
    folder: Path, witnesses: list[WitnessFolder], mode: str
) -> None:
    with Ledger.open(folder, MASTER, origin=ORIGIN) as ledger:
        activate(ledger)
        links = [Unreliable(witness) for witness in witnesses]
        for witness in witnesses:
            witness.add_log(ledger.log_key)
        ledger.watch(links, quorum=2)
        links[0].mode = mode
        assert len(check(answer(ledger, 1).receipt.checkpoint, ledger, witnesses)) == 2
        links[1].mode = mode
        size = ledger.size
        with pytest.raises(PeerError, match="1 of 3 witnesses cosigned, 2 must"):
            answer(ledger, 2)
        assert ledger.size == size + 1
        links[0].mode = links[1].mode = ""
        assert len(check(answer(ledger, 3).receipt.checkpoint, ledger, witnesses)) == 3


def check(note: bytes, ledger: Ledger, witnesses: Sequence[WitnessFolder]) -> tuple[tuple[str, int], ...]:
    return open_checkpoint(note, ledger.log_key, witnesses=[witness.verifier for witness in witnesses]).cosigned


def test_a_quorum_must_be_reachable_and_more_than_half(folder: Path, witnesses: list[WitnessFolder]) -> None:
    with Ledger.open(folder, MASTER, origin=ORIGIN) as ledger:
        for quorum in (0, 1, 4):
            with pytest.raises(ValueError):
                ledger.watch(witnesses, quorum=quorum)
        links = [Unreliable(witness) for witness in witnesses]
        for witness in witnesses:
            witness.add_log(ledger.log_key)
        links[0].mode = links[1].mode = "before"
        with pytest.raises(PeerError, match="1 of 3 witnesses answered"):
            ledger.watch(links, quorum=2)
        with pytest.raises(InputError, match="does not watch"):
            ledger.watch([WitnessFolder.create(folder.with_name("new"), "new.example")], quorum=1)


def test_a_witness_remembers_across_restarts(folder: Path, witnesses: list[WitnessFolder], tmp_path: Path) -> None:
    with opened(folder, witnesses) as ledger:
        activate(ledger)
        again = WitnessFolder(tmp_path / "w0")
        assert again.verifier == witnesses[0].verifier
        assert again.seen(ORIGIN) == witnesses[0].seen(ORIGIN)
        assert again.seen("unknown.example") is None
        again.add_log(ledger.log_key)
        assert again.seen(ORIGIN) == witnesses[0].seen(ORIGIN)
        with pytest.raises(InputError, match="another key"):
            again.add_log(Signer(ORIGIN, Secret(b"?" * 32)).verifier)
    with pytest.raises(InputError, match="a witness already"):
        WitnessFolder.create(tmp_path / "w0", "another")


def test_a_damaged_memory_is_an_error_never_an_empty_one(
    folder: Path, witnesses: list[WitnessFolder], tmp_path: Path
) -> None:
    with opened(folder, witnesses) as ledger:
        activate(ledger)
        key = ledger.log_key
    (path,) = (tmp_path / "w0" / "logs").glob("*.json")
    good = path.read_bytes()
    for wrong in (b"", b"{}", good[:-9], good.replace(b'"v": 1', b'"v": 2'), good.replace(ORIGIN.encode(), b"x", 1)):
        path.write_bytes(wrong)
        with pytest.raises(TamperedError, match="does not know what it saw"):
            witnesses[0].seen(ORIGIN)
        with pytest.raises(TamperedError):
            witnesses[0].add_log(key)
    (tmp_path / "w1" / "key").write_bytes(b"{}")
    with pytest.raises(TamperedError, match="key file"):
        WitnessFolder(tmp_path / "w1")
    with pytest.raises(MachineError, match="cannot use"):
        WitnessFolder(tmp_path / "nowhere")


def test_the_old_or_the_new_memory_is_there_when_writing_fails(
    folder: Path, witnesses: list[WitnessFolder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with opened(folder, witnesses) as ledger:
        activate(ledger)
        before = witnesses[0].seen(ORIGIN)

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", full)
            with pytest.raises(MachineError, match="No space") as error:
                witnesses[0].cosign(
                    epoch=before.epoch if before else 0,
                    old_size=ledger.size,
                    proof=(),
                    checkpoint=ledger.checkpoint(),
                )
        assert error.value.code == "disk-full"
        assert witnesses[0].seen(ORIGIN) == before
        assert not list((tmp_path / "w0" / "logs").glob(".new-*"))


def test_two_requests_at_once_do_not_roll_a_witness_back(folder: Path, witnesses: list[WitnessFolder]) -> None:
    with Ledger.open(folder, MASTER, origin=ORIGIN) as ledger:
        witness = witnesses[0]
        witness.add_log(ledger.log_key)
        activate(ledger)
        notes = []
        for number in range(8):
            answer(ledger, number)
            notes.append((ledger.size, ledger.checkpoint()))
        lines: list[str | Behind | TamperedError] = []

        def ask(size: int, note: bytes) -> None:
            try:
                lines.append(witness.cosign(epoch=0, old_size=0, proof=(), checkpoint=note))
            except TamperedError as error:
                lines.append(error)

        threads = [threading.Thread(target=ask, args=item) for item in notes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cosigned = [line for line in lines if isinstance(line, str)]
        assert len(cosigned) == 1
        assert all(isinstance(line, Behind) for line in lines if not isinstance(line, str))
