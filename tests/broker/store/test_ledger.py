"""The ledger's promises, one by one: what is kept, what is refused, what survives a restart."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from cloister.broker.log import leaf as leaves
from cloister.broker.log.audit import audit
from cloister.broker.log.fold import Spent
from cloister.broker.log.receipt import parse_receipt, verify_receipt
from cloister.broker.store import ledger as module
from cloister.broker.store.database import Store
from cloister.broker.store.ledger import Appended, Ledger, Pending
from cloister.crypto.keys import Secret, digest
from cloister.errors import DeniedError, InputError, MachineError, Reason, TamperedError
from tests.broker.store.life import (
    CODE,
    CONTRACT,
    DATA,
    HOSPITAL,
    LEASE,
    LEASE_SECRET,
    MASTER,
    NOW,
    ORIGIN,
    OUTPUT_KEY,
    TOML,
    VENDOR,
    VOLUME_KEY,
    activate,
    answer,
    live,
    release,
)

OUT = digest(b"out 1")


def everything(ledger: Ledger) -> dict[str, object]:
    """What readers see."""
    denial = ledger.denial("d-0000000000ff")
    assert denial is not None
    return {
        "size": ledger.size,
        "epoch": ledger.epoch,
        "log_key": ledger.log_key,
        "root": ledger.root(),
        "contracts": ledger.contracts(),
        "text": ledger.contract_text(CONTRACT),
        "active": ledger.active_contract("xray"),
        "signatures": ledger.signatures(CONTRACT),
        "key": ledger.deposited_key(DATA, HOSPITAL),
        "output key": ledger.deposited_key(OUT, "hospital"),
        "keys": sorted(ledger.deposited_keys(), key=lambda row: row.volume),
        "root of detector": ledger.asset_root("xray", "detector"),
        "roots": ledger.asset_roots("xray"),
        "lease": ledger.lease(LEASE),
        "leases": ledger.leases(),
        "secrets": ledger.lease_secrets(LEASE),
        "spent": ledger.answers_spent(CONTRACT, "serve", "clinic", now=NOW),
        "denial": denial,
    }


def test_a_restart_finds_everything_again(folder: Path) -> None:
    with Ledger.open(folder, MASTER, origin=ORIGIN) as ledger:
        live(ledger)
        before = everything(ledger)
    assert before["text"] == TOML
    assert before["signatures"] == {party: f"signature of {party}" for party in (HOSPITAL, VENDOR)}
    assert before["spent"] == Spent(1, 1)
    for _ in range(2):
        with Ledger.open(folder, MASTER) as ledger:
            assert everything(ledger) == before
            key = ledger.deposited_key(DATA, HOSPITAL)
            output = ledger.deposited_key(OUT, "hospital")
            assert key is not None
            assert output is not None
            assert (key.key, output.key) == (VOLUME_KEY, OUTPUT_KEY)
            assert ledger.lease_secrets(LEASE).secret == LEASE_SECRET


def test_every_receipt_verifies_and_the_log_is_sound(ledger: Ledger) -> None:
    live(ledger)
    receipts = [ledger.receipt(index) for index in range(ledger.size)]
    for index, receipt in enumerate(receipts):
        assert verify_receipt(parse_receipt(receipt.encode()), ledger.log_key) == ledger.leaf(index)
    report = audit(ledger.entries(0, ledger.size), ledger.checkpoint(), ledger.log_key, receipts=receipts)
    assert report.checkpoint.size == ledger.size == len(receipts)
    known = ledger.signed_checkpoint().checkpoint
    newer = answer(ledger, 2).receipt
    proof = ledger.consistency(known.size)
    verify_receipt(newer, ledger.log_key, known=known, consistency=proof)


def test_the_entry_is_on_disk_before_anybody_hears_of_it(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    activate(ledger)
    entered, go = threading.Event(), threading.Event()
    commit = Store.commit

    def slow(self: Store, *args: object) -> None:
        entered.set()
        assert go.wait(30)
        commit(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "commit", slow)
    size = ledger.size
    pending = ledger.deposit_key(DATA, HOSPITAL, VOLUME_KEY, volume_id=b"v" * 16, generation=1, now=NOW)
    assert entered.wait(30)
    with pytest.raises(TimeoutError):
        pending.result(0.02)
    assert (ledger.size, ledger.deposited_key(DATA, HOSPITAL)) == (size, None)
    go.set()
    assert pending.result(30).index == size
    assert ledger.deposited_key(DATA, HOSPITAL) is not None


def test_what_waits_together_is_one_group(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    activate(ledger)
    groups: list[int] = []
    entered, go = threading.Event(), threading.Event()
    commit = Store.commit

    def counting(self: Store, first: int, bodies: list[bytes], *rest: object) -> None:
        groups.append(len(bodies))
        entered.set()
        assert go.wait(30)
        commit(self, first, bodies, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "commit", counting)

    def spend(number: int) -> Pending[module.Granted]:
        return ledger.answer(
            contract=CONTRACT, phase="serve", party="p", budget=None, per_day=None, now=NOW, denial=f"d-{number}"
        )

    first = spend(0)
    assert entered.wait(30)
    most = module.MAX_GROUP
    waiting = [spend(number) for number in range(1, 2 * most + 11)]
    go.set()
    results = [first.result(30), *(pending.result(30) for pending in waiting)]
    assert groups == [1, most, most, 10]
    assert [result.spent.used for result in results] == list(range(1, 2 * most + 12))
    assert {result.receipt.size for result in results[1 : most + 1]} == {results[most].index + 1}
    assert len({result.receipt.checkpoint for result in results}) == 4
    for result in (results[0], results[most], results[-1]):
        verify_receipt(result.receipt, ledger.log_key)


def test_asyncio_awaits_and_a_cancelled_wait_loses_nothing(ledger: Ledger) -> None:
    activate(ledger)

    async def main() -> list[Appended]:
        loop = asyncio.get_running_loop()
        assert loop.time() > 0

        async def one(number: int) -> Appended:
            return await ledger.answer(
                contract=CONTRACT, phase="serve", party="p", budget=None, per_day=None, now=NOW, denial=f"d-{number}"
            )

        tasks = [asyncio.create_task(one(number)) for number in range(50)]
        await asyncio.sleep(0)
        tasks[7].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[7], asyncio.CancelledError)
        return [item for item in done if isinstance(item, Appended)]

    results = asyncio.run(main())
    assert len(results) == 49
    # The request whose asker left was written or never began: the counts say which, and add up.
    assert ledger.answers_spent(CONTRACT, "serve", "p", now=NOW).used in (49, 50)
    assert len({result.index for result in results}) == 49


# --- the same thing again ---------------------------------------------------------------------------------------------


def test_the_same_request_again_gives_the_first_entry(ledger: Ledger) -> None:
    live(ledger)
    size = ledger.size
    again: list[Callable[[], Pending[Appended]]] = [
        lambda: ledger.submit_contract(TOML, name="xray", version=1, replaces="", now=NOW),
        lambda: ledger.add_signature(CONTRACT, VENDOR, f"signature of {VENDOR}", now=NOW),
        lambda: ledger.activate_contract(CONTRACT, [HOSPITAL], now=NOW),
        lambda: ledger.register_root(LEASE, "detector", OUT, generation=1, now=NOW),
    ]
    for request in again:
        result = request().result(30)
        assert not result.new
        assert result.index < size
        assert verify_receipt(result.receipt, ledger.log_key) == result.leaf
    assert ledger.size == size


def test_a_second_deposit_by_the_owner_replaces_the_first_and_others_cannot_squat(ledger: Ledger) -> None:
    for owner, key in ((HOSPITAL, VOLUME_KEY), (VENDOR, OUTPUT_KEY), (HOSPITAL, LEASE_SECRET)):
        ledger.deposit_key(DATA, owner, key, volume_id=b"v" * 16, generation=1, now=NOW).result(30)
    mine, theirs = ledger.deposited_key(DATA, HOSPITAL), ledger.deposited_key(DATA, VENDOR)
    assert mine is not None
    assert theirs is not None
    assert (mine.key, theirs.key) == (LEASE_SECRET, OUTPUT_KEY)


# --- contracts --------------------------------------------------------------------------------------------------------


def test_a_contract_needs_its_signatures_and_its_predecessor(ledger: Ledger) -> None:
    with pytest.raises(InputError, match="does not know"):
        ledger.add_signature(CONTRACT, HOSPITAL, "s", now=NOW).result(30)
    ledger.submit_contract(TOML, name="xray", version=1, replaces="", now=NOW).result(30)
    ledger.add_signature(CONTRACT, HOSPITAL, "s", now=NOW).result(30)
    with pytest.raises(InputError) as refused:
        ledger.activate_contract(CONTRACT, [HOSPITAL, VENDOR], now=NOW).result(30)
    assert [reason.wanted for reason in refused.value.reasons] == [VENDOR]
    ledger.activate_contract(CONTRACT, [HOSPITAL], now=NOW).result(30)
    with pytest.raises(InputError, match="does not replace"):
        activate(ledger, b"another", version=2)
    successor = activate(ledger, b"next", version=2, replaces=CONTRACT)
    states = {row.contract: row.state for row in ledger.contracts()}
    assert states == {CONTRACT: "replaced", digest(b"another"): "waiting", successor: "active"}
    active = ledger.active_contract("xray")
    assert active is not None
    assert active.contract == successor
    with pytest.raises(InputError, match="replaced"):
        ledger.add_signature(CONTRACT, VENDOR, "late", now=NOW).result(30)


def test_nothing_is_granted_under_a_revoked_contract(ledger: Ledger) -> None:
    live(ledger)
    done = ledger.revoke_contract(CONTRACT, HOSPITAL, "signed statement", now=NOW).result(30)
    assert not ledger.revoke_contract(CONTRACT, VENDOR, "another", now=NOW).result(30).new
    size = ledger.size
    assert size == done.index + 1
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: release(ledger, "l-" + "2" * 32), "denied"),
        (lambda: answer(ledger, 9), "denied"),
        (lambda: ledger.renew_lease(LEASE, evidence=CODE, tee="", expires=NOW, now=NOW).result(30), "lease-lost"),
        (
            lambda: ledger.register_root(LEASE, "detector", digest(b"2"), generation=2, now=NOW).result(30),
            "lease-lost",
        ),
    ]
    for request, code in refusals:
        with pytest.raises(DeniedError) as refused:
            request()
        assert refused.value.code == code
    assert ledger.size == size


# --- leases and roots -------------------------------------------------------------------------------------------------


def test_a_lease_counts_until_it_expires_or_is_lost(ledger: Ledger) -> None:
    live(ledger)

    def renew(lease: str, minutes: int) -> None:
        at = NOW + timedelta(minutes=minutes)
        ledger.renew_lease(lease, evidence=CODE, tee="soft-tdx", expires=at + timedelta(minutes=10), now=at).result(30)

    renew(LEASE, 19)
    with pytest.raises(DeniedError, match="does not count") as expired:
        renew(LEASE, 29)
    assert expired.value.code == "lease-lost"
    assert "expired" in expired.value.reasons[0].found
    with pytest.raises(DeniedError) as unknown:
        renew("l-unknown", 1)
    assert unknown.value.reasons[0].found == "unknown"
    renew(LEASE, 20)
    ledger.lose_lease(LEASE, [Reason("evidence", "debug", "production")], now=NOW).result(30)
    for request in (
        lambda: renew(LEASE, 21),
        lambda: ledger.lose_lease(LEASE, [], now=NOW).result(30),
        lambda: answer_with(ledger, LEASE),
    ):
        with pytest.raises(DeniedError) as lost:
            request()
        assert lost.value.code == "lease-lost"


def answer_with(ledger: Ledger, lease: str) -> Appended:
    return ledger.answer(
        contract=CONTRACT,
        phase="serve",
        party="clinic",
        budget=None,
        per_day=None,
        now=NOW,
        denial="d-1",
        lease=lease,
    ).result(30)


def test_only_the_first_of_two_writers_registers_a_generation(ledger: Ledger) -> None:
    live(ledger)
    other = "l-" + "2" * 32
    release(ledger, other)
    with pytest.raises(DeniedError, match="registered first"):
        ledger.register_root(other, "detector", digest(b"fork"), generation=1, now=NOW).result(30)
    ledger.register_root(other, "detector", digest(b"out 2"), generation=2, now=NOW).result(30)
    root = ledger.asset_root("xray", "detector")
    assert root is not None
    assert (root.volume, root.generation, root.lease) == (digest(b"out 2"), 2, other)
    entry = ledger.leaf(root.entry)
    assert isinstance(entry, leaves.RootRegistered)
    assert entry.previous == OUT


def test_a_lease_registers_only_what_it_writes(ledger: Ledger) -> None:
    live(ledger)
    with pytest.raises(DeniedError, match="does not write"):
        ledger.register_root(LEASE, "xrays", OUT, generation=1, now=NOW).result(30)


def test_a_release_of_an_old_version_is_refused_although_it_was_decided_before(ledger: Ledger) -> None:
    live(ledger)
    base = ledger.leaf(7)
    assert isinstance(base, leaves.Release)
    stale = dataclasses.replace(base, lease="l-" + "3" * 32, reads=(leaves.AssetRef("detector", digest(b"older")),))
    size = ledger.size
    with pytest.raises(DeniedError, match="changed while") as refused:
        ledger.release(stale, module.LeaseSecrets(LEASE_SECRET)).result(30)
    assert (refused.value.reasons[0].found, refused.value.reasons[0].wanted) == (digest(b"older"), OUT)
    fresh = dataclasses.replace(stale, reads=(leaves.AssetRef("detector", OUT),))
    assert ledger.release(fresh, module.LeaseSecrets(LEASE_SECRET)).result(30).index == size


def test_leases_that_expired_a_day_ago_are_forgotten_with_their_secrets(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger.open(folder, MASTER) as ledger:
        live(ledger)
        ledger.begin_epoch(now=NOW + timedelta(days=2)).result(30)
    monkeypatch.setattr(module, "FORGET_EVERY", 2)
    with Ledger.open(folder, MASTER) as ledger:
        assert ledger.lease(LEASE) is not None
        ledger.begin_epoch(now=NOW + timedelta(days=2)).result(30)
        ledger.begin_epoch(now=NOW + timedelta(days=2)).result(30)
        assert ledger.lease(LEASE) is None
        with pytest.raises(KeyError):
            ledger.lease_secrets(LEASE)
    with Ledger.open(folder, MASTER) as ledger:
        assert ledger.lease(LEASE) is None
        with pytest.raises(DeniedError, match="does not count"):
            ledger.lose_lease(LEASE, [], now=NOW).result(30)


# --- opened keys, denials, the rest -------------------------------------------------------------------------------------


def test_a_key_is_opened_only_where_it_is_kept(ledger: Ledger) -> None:
    live(ledger)
    leaf = leaves.KeyOpened(
        time=NOW,
        volume=OUT,
        owner="hospital",
        parties=(HOSPITAL,),
        contract=CONTRACT,
        asset="detector",
        hpke_key=digest(b"k"),
    )
    assert ledger.open_key(leaf).result(30).leaf == leaf
    with pytest.raises(InputError, match="does not keep"):
        ledger.open_key(dataclasses.replace(leaf, owner="vendor")).result(30)


def test_a_denial_is_found_by_its_id_word_for_word(ledger: Ledger) -> None:
    live(ledger)
    found = ledger.denial("d-0000000000ff")
    assert found is not None
    assert found[1].reasons == (Reason("phase.train.run", "evil", "trainer"),)
    assert ledger.leaf(found[0]) == found[1]
    assert ledger.denial("d-unknown") is None


def test_an_entry_that_contradicts_the_log_is_refused_and_the_group_goes_on(ledger: Ledger) -> None:
    live(ledger)
    size = ledger.size
    with pytest.raises(TamperedError, match="contradicts"):
        ledger.append(leaves.LeaseLost(time=NOW, lease="l-none", reasons=())).result(30)
    with pytest.raises(TamperedError, match="contradicts"):
        ledger.append(
            leaves.Epoch(time=NOW, number=7, software="", evidence="", tee="", hpke_key="", tls_key="")
        ).result(30)
    assert answer(ledger, 5).index == size


def test_secrets_outside_the_log_are_kept_once(folder: Path) -> None:
    with Ledger.open(folder, MASTER) as ledger:
        first = ledger.kept_secret("tls", lambda: Secret(b"T" * 40))
        assert ledger.kept_secret("tls", Secret.random) == first
        assert ledger.kept_secret("other", Secret.random) != first
    with Ledger.open(folder, MASTER) as ledger:
        assert ledger.kept_secret("tls", Secret.random) == Secret(b"T" * 40)


def test_no_secret_is_in_the_folder_in_clear_or_in_a_repr(folder: Path) -> None:
    with Ledger.open(folder, MASTER) as ledger:
        live(ledger)
        ledger.kept_secret("tls", lambda: Secret(b"planted-tls-key"))
        shown = (
            repr(everything(ledger)) + repr(ledger.deposited_key(DATA, HOSPITAL)) + repr(ledger.lease_secrets(LEASE))
        )
        stored = b"".join(path.read_bytes() for path in folder.iterdir())
    stored += b"".join(path.read_bytes() for path in folder.iterdir())
    assert b"planted" not in stored
    assert MASTER.reveal() not in stored
    assert "planted" not in shown


def test_the_folder_is_for_its_owner_only(folder: Path) -> None:
    with Ledger.open(folder, MASTER) as ledger:
        ledger.begin_epoch(now=NOW).result(30)
        assert folder.stat().st_mode & 0o077 == 0
        assert [path.name for path in folder.iterdir() if path.stat().st_mode & 0o077] == []


def test_two_brokers_cannot_use_one_folder(folder: Path) -> None:
    with Ledger.open(folder, MASTER):
        with pytest.raises(MachineError, match="another broker") as refused:
            Ledger.open(folder, MASTER)
        assert refused.value.code == "busy"
    Ledger.open(folder, MASTER).close()


def test_a_closed_ledger_says_so(folder: Path) -> None:
    ledger = Ledger.open(folder, MASTER)
    ledger.close()
    ledger.close()
    with pytest.raises(MachineError, match="closed"):
        answer(ledger, 1)


def test_a_bug_in_the_writer_leaves_nobody_waiting(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Store, "commit", broken)
    with pytest.raises(MachineError, match="stopped"):
        ledger.begin_epoch(now=NOW).result(30)
    with pytest.raises(MachineError):
        ledger.begin_epoch(now=NOW)


def test_a_callers_mistakes_are_value_errors(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        Ledger.open(tmp_path / "x", Secret(b"short"))
    with pytest.raises(TypeError, match="method of their own"):
        ledger.append(leaves.KeyDeposited(time=NOW, volume=DATA, owner=HOSPITAL, volume_id=b"v", generation=1))
    with pytest.raises(ValueError):
        ledger.submit_contract(TOML, name="not a name", version=1, replaces="", now=NOW)
    with pytest.raises(ValueError):
        ledger.answer(contract=CONTRACT, phase="s", party="p", budget=1, per_day=1, now=NOW, denial="d", count=0)
    for call in (lambda: ledger.root(99), lambda: ledger.consistency(99), lambda: ledger.inclusion(0, 99)):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(IndexError):
        ledger.leaf(0)
    with pytest.raises(IndexError):
        ledger.receipt(-1)
    assert ledger.entries(0, 10) == []
