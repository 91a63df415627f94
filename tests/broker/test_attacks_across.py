"""Attacks that need two contracts, two versions, or a broker of the attacker's own: what one may do must not reach another."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cloister.broker import keeper
from cloister.broker.client import BrokerClient, Release
from cloister.broker.decide import LeaseFacts
from cloister.broker.store.ledger import LeaseSecrets
from cloister.contract.edge import Signer
from cloister.crypto.keys import Secret, digest
from cloister.errors import DeniedError, EvidenceError, InputError
from cloister.testkit.broker import RunningBroker, running_broker
from tests.broker.conftest import Clock
from tests.broker.world import VOLUME_ID, XRAYS, World, signer, trainer_node

_names = (f"across-{number}" for number in itertools.count())


def started(world: World, client: BrokerClient) -> tuple[str, Release]:
    """A contract of `world` and a lease that writes its `detector`."""
    contract = world.ready(client, world.contract(name=next(_names)))
    lease = client.release(
        contract, "train", reads=("backbone", "xrays"), writes=("detector",), attester=trainer_node()
    )
    return contract, lease


# --- two contracts ----------------------------------------------------------------------------------------------------


def test_thief_registers_the_victims_new_volume_first_and_opens_it(broker: RunningBroker) -> None:
    # The operator sees the sealed volume on his disk and holds its registration back. Under a contract of his own, on a
    # node that he can read, he registers the same digest: the victim's registration must not put its key beside his root.
    victim, thief, client = World(), World(), broker.client()
    contract, lease = started(victim, client)
    own, own_lease = started(thief, client)
    volume = digest(b"the victim's new volume")
    client.register_root(own_lease, "detector", volume, generation=1)
    with pytest.raises(DeniedError) as refused:
        client.register_root(lease, "detector", volume, generation=1)
    assert [reason.where for reason in refused.value.reasons] == ["register.digest"]
    assert refused.value.denial_id
    stolen = client.open_key(own, "detector", [thief.hospital.sign])
    assert stolen.key.key == own_lease.outputs["detector"].key
    assert stolen.key.key != lease.outputs["detector"].key
    # nothing else is lost: a volume that only the victim registers is his
    client.register_root(lease, "detector", digest(b"sealed again"), generation=1)
    opened = client.open_key(contract, "detector", [victim.hospital.sign])
    assert opened.key.key == lease.outputs["detector"].key


def test_thief_registers_the_victims_volume_afterwards_and_spoils_its_key(broker: RunningBroker) -> None:
    victim, thief, client = World(), World(), broker.client()
    contract, lease = started(victim, client)
    _, own_lease = started(thief, client)
    volume = digest(b"a volume that everybody reads about in the log")
    client.register_root(lease, "detector", volume, generation=1)
    with pytest.raises(DeniedError) as refused:
        client.register_root(own_lease, "detector", volume, generation=1)
    assert [reason.where for reason in refused.value.reasons] == ["register.digest"]
    opened = client.open_key(contract, "detector", [victim.hospital.sign])
    assert opened.key.key == lease.outputs["detector"].key


# --- two versions -----------------------------------------------------------------------------------------------------


def _version(world: World, client: BrokerClient, data: bytes, *signers: Signer) -> str:
    status = client.submit_contract(data, name="next.toml")
    for party in signers:
        status = client.add_signature(status.contract, party.sign(data, namespace="contract@cloister"))
    assert status.state == "active"
    return status.contract


def test_output_of_a_party_that_left_is_taken_by_a_later_version(broker: RunningBroker) -> None:
    # Version 1 gives the detector to the hospital. It agrees to leave with version 2, which has no detector. Version 3 is
    # signed by the vendor alone and writes a `detector` of its own: its name must not lead to the hospital's volume.
    world, client, name = World(), broker.client(), next(_names)
    first = world.ready(client, world.contract(name=name))
    world.trained(client, first)
    alone = World(hospital=world.vendor, vendor=signer(), clinic=world.clinic)

    def later(version: int, replaces: str, output: str) -> bytes:
        data = alone.contract(name=name, version=version, replaces=replaces).decode()
        return data.replace("detector", output).encode()

    two = later(2, first, "other")
    second = _version(world, client, two, world.hospital, world.vendor, alone.vendor)
    with pytest.raises(InputError) as refused:
        client.submit_contract(later(3, second, "detector"), name="third.toml")
    assert [reason.where for reason in refused.value.reasons] == ["phase.write.detector"]
    third = _version(world, client, later(3, second, "fresh"), world.vendor, alone.vendor)
    assert client.contract_status(third).state == "active"


def test_output_that_every_version_has_stays_readable(broker: RunningBroker) -> None:
    world, client, name = World(), broker.client(), next(_names)
    first = world.ready(client, world.contract(name=name))
    train = world.trained(client, first)
    second = world.ready(client, world.contract(name=name, version=2, replaces=first))
    assert client.open_key(second, "detector", [world.hospital.sign]).key.key == train.outputs["detector"].key


BOARD = """[board]
council = { members = ["hospital", "vendor", "clinic"], need = 2, veto = ["clinic"] }
"""


def test_change_that_a_member_with_a_veto_did_not_agree_to(broker: RunningBroker) -> None:
    # a no cannot be sent to a broker, so silence of a member with a veto must not count as consent
    world, client, name = World(), broker.client(), next(_names)

    def version(**values: object) -> bytes:
        text = world.contract(name=name, extra=BOARD, **values).decode()  # type: ignore[arg-type]
        return text.replace('default = ["hospital", "vendor"]', 'default = "council"').encode()

    first = world.ready(client, version())
    data = version(version=2, replaces=first, expires="2098-01-01")
    second = world.signed(client, data)
    assert client.contract_status(second).state == "waiting"
    assert client.contract_status(first).state == "active"
    status = client.add_signature(second, world.clinic.sign(data, namespace="contract@cloister"))
    assert status.state == "active"


# --- time -------------------------------------------------------------------------------------------------------------


def test_nothing_is_opened_or_registered_after_the_last_day(broker: RunningBroker, clock: Clock) -> None:
    world, client = World(), broker.client()
    data = world.contract(name=next(_names), expires=str(clock().date()))
    contract = world.ready(client, data)
    world.trained(client, contract)
    client.open_key(contract, "detector", [world.hospital.sign])
    clock.ahead = timedelta(days=1)
    with pytest.raises(DeniedError) as refused:
        client.open_key(contract, "detector", [world.hospital.sign])
    assert [reason.where for reason in refused.value.reasons] == ["expires"]


# --- strangers --------------------------------------------------------------------------------------------------------


def test_contracts_of_strangers_do_not_keep_a_signed_one_from_counting(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, client = World(), broker.client()
    data = world.contract(name=next(_names))
    contract = client.submit_contract(data, name="c.toml").contract
    client.submit_contract(World().contract(name=next(_names)), name="stranger.toml")
    monkeypatch.setattr(keeper, "MAX_UNSIGNED", 1)
    with pytest.raises(InputError):
        client.submit_contract(World().contract(name=next(_names)), name="one more.toml")
    assert world.signed(client, data) == contract
    assert client.contract_status(contract).state == "active"


def test_contract_with_more_signers_than_a_status_holds(broker: RunningBroker) -> None:
    # 1,030 short names fit into 64 KiB; one such contract of a stranger must not end every later list of contracts
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["".join(pair) for pair in itertools.product(letters, letters + "0123456789")]
    names = [*names, *(f"a{number:02d}" for number in range(1030 - len(names)))]
    keys = {each: "SHA256:" + base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()[:43] for each in names}
    parties = "\n".join(f'{each}="{key}"' for each, key in keys.items())
    members = ",".join(f'"{each}"' for each in names)
    data = f"""contract="{next(_names)}"
version=1
expires=2099-01-01
[party]
{parties}
[code]
c={{owner="zzz",digest="{XRAYS}"}}
[data]
d={{owner="zzz",digest="{XRAYS}"}}
[place]
p={{kind="tee",accept=["simulated"]}}
[phase.train]
run="c"
at="p"
read=["d"]
[board]
zzz={{members=[{members}],need=1}}
[change]
default="zzz"
""".encode()
    client = broker.client()
    with pytest.raises(InputError) as refused:
        client.submit_contract(data, name="crowd.toml")
    assert [reason.where for reason in refused.value.reasons] == ["party"]
    assert client.contracts() is not None


def test_deposit_of_a_generation_that_has_no_next(broker: RunningBroker) -> None:
    world, client = World(), broker.client()
    with pytest.raises(ValueError, match="generation"):
        client.deposit_key(
            XRAYS, volume_id=VOLUME_ID, key=world.xrays_key, sign=world.hospital.sign, generation=(1 << 53) - 1
        )


def test_more_contracts_than_a_list_holds(broker: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    world, client = World(), broker.client()
    monkeypatch.setattr(keeper, "MAX_LISTED", 2)
    newest = [client.submit_contract(world.contract(name=next(_names)), name="c.toml").contract for _ in range(3)]
    assert [status.contract for status in client.contracts()] == newest[1:]


def test_long_leases_do_not_keep_the_secrets_of_ended_ones_in_memory() -> None:
    # eight leases that are renewed for ever used to be all that was ever looked at
    now = datetime(2026, 11, 20, tzinfo=UTC)

    def held(expires: datetime) -> keeper._Held:
        facts = LeaseFacts("", "train", (), (), bytes(32), "", "offline", "L2", expires)
        return keeper._Held(facts, LeaseSecrets(Secret.random()))

    one = keeper.Keeper.__new__(keeper.Keeper)
    one._held = {f"long-{number}": held(now + timedelta(hours=1)) for number in range(8)}
    one._held |= {f"ended-{number}": held(now - timedelta(hours=1)) for number in range(100)}
    for _ in range(14):
        one._forget(now)
    assert sorted(one._held) == [f"long-{number}" for number in range(8)]


# --- a genuine broker, set up by the attacker -------------------------------------------------------------------------


def test_genuine_broker_that_gives_keys_to_the_operators_own_node_software(tmp_path: Path) -> None:
    # same software, same TEE, but configured to accept a node that sends its keys home: nobody deposits a key there
    evil = b"\xee" * 48
    with running_broker(tmp_path / "state", process=False, node_measurements=frozenset({evil})) as broker:
        assert broker.client()  # who trusts that software may use it
        with pytest.raises(EvidenceError) as refused:
            BrokerClient.connect(broker.url, trust=replace(broker.trust(), node_measurements=None))
        assert [reason.where for reason in refused.value.reasons] == ["broker.node_measurements"]
        assert evil.hex() in refused.value.reasons[0].found


def test_evidence_of_a_broker_with_a_second_event_under_another_name(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # names are not measured: a log with anything besides the one configuration says nothing about it
    from cloister.attestation.edge.attester import SoftTdxAttester

    plain: Callable[..., object] = SoftTdxAttester.evidence

    def two(self: SoftTdxAttester, report_data: bytes) -> object:
        twin = SoftTdxAttester(self._measurement)
        for entry in self._events:
            twin.extend(entry.name, entry.data)
        twin.extend("cloister/other/1", b"a second configuration")
        return plain(twin, report_data)

    monkeypatch.setattr(SoftTdxAttester, "evidence", two)
    with pytest.raises(EvidenceError) as refused:
        BrokerClient.connect(broker.url, trust=broker.trust())
    assert [reason.where for reason in refused.value.reasons] == ["events.cloister/config/1"]
