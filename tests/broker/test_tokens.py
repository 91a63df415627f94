"""Tokens of attestation services through the keeper, in process: one that is accepted, and attacks by name, each of which gets no key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import pytest

from cloister.attestation import events as event_log
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.events import Workload
from cloister.attestation.roots import Roots
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.types import Event, Evidence
from cloister.broker import decide, wire
from cloister.broker.client import Trust
from cloister.contract.decide import endorsed
from cloister.contract.parse import parse
from cloister.errors import DeniedError, EvidenceError
from tests.attestation.test_authority import (
    ISSUERS,
    NOW,
    T,
    bundle,
    gpu,
    jwks,
    raw,
    rsa_jwk,
    rsa_key,
    sgx,
    signed,
    snp,
    space,
    tdx,
)
from tests.attestation.test_token import named, pin
from tests.broker.hardware import PLAIN, Bench, Exchange, Machine, Refused, Released, bench

LAUNCH, IMAGE, ENCLAVE, MRTD = b"\x05" * 48, b"\xab" * 32, b"\x01" * 32, b"\x01" * 48
"""What the tokens below say was launched."""
MINE = json.dumps({"keys": [rsa_jwk(rsa_key(7), "rsa")]}).encode()
"""A JWKS of the attacker, with the name of a genuine key."""
BODIES = {"sevsnpvm": snp, "tdxvm": tdx, "sgx": sgx, "gcp_intel_tdx": space}


def table(
    name: str = "azure",
    kind: Any = "maa",
    *,
    keys: bytes | None = None,
    issuer: str = "",
    audience: str = "https://broker.example",
) -> str:
    line = f'audience = "{audience}"\n' if kind == "confidential-space" else ""
    pinned = pin(jwks() if keys is None else keys)
    return f'[authority.{name}]\nkind = "{kind}"\nissuer = "{issuer or ISSUERS[kind]}"\njwks = ["{pinned}"]\n{line}'


ALL = table() + table("google", "confidential-space") + table("nvidia", "nras")
WORDS = {"sevsnpvm": "azure", "tdxvm": "azure", "sgx": "azure", "gcp_intel_tdx": "google"}


def place(word: str = "sevsnpvm", more: str = "") -> str:
    return f'kind = "tee", accept = ["authority:{WORDS[word]}/{word}"]{more}'


class TokenBench(Bench):
    """A bench whose contracts also have authorities: `place` is a place, a form feed, and the tables."""

    def contract(self, place: str) -> str:
        if "\f" not in place:
            place = f"{place}\f{ALL}"
        if place not in self._contracts:
            inner, tables = place.split("\f")
            text = self.world.contract(name=f"tokens-{len(self._contracts)}", extra=tables).decode()
            data = text.replace('kind = "tee", accept = ["simulated"]', inner).encode()
            status = self.run(self.keeper.submit(wire.ContractSubmit("tokens.toml", data)))
            for party in (self.world.hospital, self.world.vendor):
                status = self.run(
                    self.keeper.sign(
                        wire.SignatureSubmit(status.contract, party.sign(data, namespace="contract@cloister"))
                    )
                )
            assert status.state == "active"
            self._contracts[place] = status.contract
        return self._contracts[place]


@pytest.fixture(scope="module")
def broker() -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.broker.hardware.Bench", TokenBench)
        with bench() as made:
            yield made


@pytest.fixture(autouse=True)
def _believed(broker: Bench) -> None:
    broker.now = NOW
    broker.trusted = decide.Trusted(Roots(), Endorsements(), frozenset({LAUNCH, IMAGE, ENCLAVE, MRTD}))


def body(word: str, report_data: bytes, events: tuple[Event, ...], **changes: Any) -> dict[str, Any]:
    """What the service says about a node that runs its software and asked with `report_data`."""
    data = report_data if word == "tdxvm" else event_log.fold(report_data, events)
    kind: Any = "confidential-space" if word == "gcp_intel_tdx" else "maa"
    said = {"iss": ISSUERS[kind], "iat": T - 60, "nbf": T - 60, "exp": T + 3600, **BODIES[word](data)}
    if word == "tdxvm":
        said["tdx_rtmr3"] = event_log.replay(events).hex()
    return said | {name.replace("__", "-"): value for name, value in changes.items()}


def shown(
    token: str, name: str, events: tuple[Event, ...] = (), keys: bytes | None = None, devices: tuple[Evidence, ...] = ()
) -> Evidence:
    parts = MappingProxyType({"authority": name.encode(), "jwks": jwks() if keys is None else keys})
    return Evidence("token", token.encode(), events, parts, devices)


def node(
    exchange: Exchange, word: str = "sevsnpvm", *, name: str = "", keys: bytes | None = None, key: Any = None,
    bundles: tuple[str, ...] = (), workload: Workload = PLAIN, **changes: Any,
) -> Evidence:  # fmt: skip
    """The evidence of a node for this exchange; `changes` are those of the token's body."""
    events = (event_log.event(event_log.WORKLOAD, workload.encode()),)
    devices = tuple(shown(each, "nvidia") for each in bundles)
    said = body(word, exchange.binding.over(devices).report_data(), events, **changes)
    return shown(signed(said, key=key), name or WORDS[word], events, keys, devices)


def refused(outcome: Any, code: str, *wheres: str) -> Refused:
    assert isinstance(outcome, Refused), outcome
    assert (outcome.code, tuple(outcome.wheres)) == (code, wheres), outcome.error.reasons
    return outcome


def bundle_for(exchange: Exchange, **changes: Any) -> str:
    nonce = exchange.binding.for_devices().qualifying_data().hex()
    return bundle(gpu(eat_nonce=nonce, **changes), eat_nonce=nonce)


# --- the honest twin --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", BODIES)
def test_a_node_that_a_service_vouches_for_gets_its_keys(broker: Bench, word: str) -> None:
    exchange = broker.ask(place(word))
    released = broker.send(exchange, node(exchange, word))
    assert isinstance(released, Released)
    assert released.entry.tee == f"authority:{WORDS[word]}/{word}"
    assert released.entry.launch
    again = broker.renewal(released)
    renewed = broker.renew(released, node(replace(exchange, binding=again), word), again.nonce)
    assert isinstance(renewed, wire.RenewReply)


def test_a_lease_ends_with_its_token(broker: Bench) -> None:
    exchange = broker.ask(place())
    released = broker.send(exchange, node(exchange, exp=T + 120))
    assert isinstance(released, Released)
    assert released.payload.lease.expires == NOW + timedelta(seconds=120)


def test_a_gpu_that_a_service_vouches_for(broker: Bench) -> None:
    wanted = broker.ask(place(more=', gpu = "confidential", gpu_authorities = ["nvidia"]'))
    assert isinstance(broker.send(wanted, node(wanted, bundles=(bundle_for(wanted),))), Released)
    mixed = broker.ask('kind = "tee", accept = ["simulated"], gpu = "confidential", gpu_authorities = ["nvidia"]')
    machine = Machine("tdx")
    device = shown(bundle_for(mixed), "nvidia")
    quote = machine.cpu(mixed.binding.over((device,)).report_data(), PLAIN)
    assert isinstance(broker.send(mixed, replace(quote, devices=(device,)), trusted=machine.trusted()), Released)


# --- attacks ----------------------------------------------------------------------------------------------------------


def test_attack_an_authority_that_the_contract_does_not_name(broker: Bench) -> None:
    """The attacker runs a service of his own, and says so."""
    exchange = broker.ask(place())
    evidence = node(exchange, name="mallory", keys=MINE, key=rsa_key(7), iss="https://mallory.invalid")
    refused(broker.send(exchange, evidence), "evidence-not-authentic", "token.2-authority")


def test_attack_a_contract_without_authorities_takes_no_token(broker: Bench) -> None:
    exchange = broker.ask('kind = "tee", accept = ["tdx", "sev-snp", "simulated"]\f')
    refused(broker.send(exchange, node(exchange)), "evidence-not-authentic", "token.2-authority")


def test_attack_an_authority_that_no_place_accepts(broker: Bench) -> None:
    """It is named for GPUs, or for another place: what it says about a machine opens nothing here."""
    exchange = broker.ask('kind = "tee", accept = ["sev-snp", "authority:azure/tdxvm"]')
    outcome = refused(broker.send(exchange, node(exchange)), "denied", "place.enclave.accept")
    assert isinstance(outcome.error, DeniedError)
    assert outcome.entry.tee == "authority:azure/sevsnpvm"


def test_attack_an_authority_of_another_contract(broker: Bench) -> None:
    """The operator's own contract names his service; it says nothing in the contract of the hospital."""
    theirs = broker.ask(
        f'kind = "tee", accept = ["authority:mallory/sevsnpvm"]\f{table("mallory", keys=MINE, issuer="https://mallory.invalid")}'
    )
    forged: dict[str, Any] = {"name": "mallory", "keys": MINE, "key": rsa_key(7), "iss": "https://mallory.invalid"}
    assert isinstance(broker.send(theirs, node(theirs, **forged)), Released)
    ours = broker.ask(place())
    refused(broker.send(ours, node(ours, **forged)), "evidence-not-authentic", "token.2-authority")


def test_attack_one_name_in_two_contracts_with_different_keys(broker: Bench) -> None:
    tables = table(keys=MINE)
    theirs, ours = broker.ask(f"{place()}\f{tables}"), broker.ask(place())
    assert isinstance(broker.send(theirs, node(theirs, keys=MINE, key=rsa_key(7))), Released)
    refused(broker.send(ours, node(ours, keys=MINE, key=rsa_key(7))), "evidence-not-authentic", "token.3-keys")
    theirs = broker.ask(f"{place()}\f{tables}")
    refused(broker.send(theirs, node(theirs)), "evidence-not-authentic", "token.3-keys")


def test_attack_the_operator_plants_an_authority_among_the_collateral(broker: Bench) -> None:
    plant = named(keys=(MINE,), issuer="https://mallory.invalid").endorsement("azure")
    believing = replace(broker.trusted, endorsements=Endorsements((plant, replace(plant, subject="authority/mallory"))))
    exchange = broker.ask(place())
    forged: dict[str, Any] = {"keys": MINE, "key": rsa_key(7), "iss": "https://mallory.invalid"}
    refused(
        broker.send(exchange, node(exchange, **forged), trusted=believing), "evidence-not-authentic", "token.3-keys"
    )
    exchange = broker.ask(place())
    refused(
        broker.send(exchange, node(exchange, name="mallory", **forged), trusted=believing),
        "evidence-not-authentic",
        "token.2-authority",
    )
    exchange = broker.ask(place())
    assert isinstance(broker.send(exchange, node(exchange), trusted=believing), Released)


def test_attack_another_issuer_under_the_same_keys(broker: Bench) -> None:
    exchange = broker.ask(place())
    evidence = node(exchange, iss="https://mallory.invalid")
    refused(broker.send(exchange, evidence), "evidence-not-authentic", "token.5-token.authority.4-issuer")


def test_attack_a_token_for_another_audience(broker: Bench) -> None:
    exchange = broker.ask(place("gcp_intel_tdx"))
    evidence = node(exchange, "gcp_intel_tdx", aud="https://other.example")
    refused(broker.send(exchange, evidence), "evidence-not-authentic", "token.5-token.authority.4-issuer.audience")


def test_attack_the_keys_are_exchanged(broker: Bench) -> None:
    exchange = broker.ask(place())
    refused(broker.send(exchange, node(exchange, keys=MINE, key=rsa_key(7))), "evidence-not-authentic", "token.3-keys")
    exchange = broker.ask(place())
    refused(
        broker.send(exchange, node(exchange, key=rsa_key(7))),
        "evidence-not-authentic",
        "token.5-token.authority.3-signature",
    )


@pytest.mark.parametrize("alg", ["none", "HS256", "ES384", "RS512"])
def test_attack_confusion_of_algorithms(broker: Bench, alg: str) -> None:
    exchange = broker.ask(place())
    good = node(exchange)
    said = body("sevsnpvm", exchange.binding.over(()).report_data(), good.events)
    evidence = replace(good, quote=raw({"alg": alg, "kid": "rsa"}, said, b"\x01" * 256).encode())
    refused(broker.send(exchange, evidence), "evidence-not-authentic", "token.5-token.authority.2-key")


def test_attack_an_expired_token(broker: Bench) -> None:
    exchange = broker.ask(place())
    refused(
        broker.send(exchange, node(exchange, exp=T - 31)),
        "evidence-not-authentic",
        "token.5-token.authority.5-time.expired",
    )


@pytest.mark.parametrize("word", BODIES)
@pytest.mark.parametrize(
    "misled",
    [{"nonce": b"\x0e" * 32}, {"key": b"\x0e" * 1216}, {"peer_key": b"\x0e" * 32}, {"phase": "serve"}, {"purpose": "service"}],
    ids=lambda misled: next(iter(misled)),
)  # fmt: skip
def test_attack_relay(broker: Bench, word: str, misled: dict[str, Any]) -> None:
    """A genuine node asked its service for somebody else: another nonce, key, broker, phase or purpose."""
    exchange = broker.ask(place(word))
    evidence = node(exchange.renewed(**misled), word)
    refused(broker.send(exchange, evidence), "evidence-unacceptable", "binding.report_data")


@pytest.mark.parametrize("word", BODIES)
def test_attack_replay(broker: Bench, word: str) -> None:
    exchange = broker.ask(place(word))
    evidence = node(exchange, word)
    assert isinstance(broker.send(exchange, evidence), Released)
    refused(broker.send(exchange, evidence), "evidence-stale", "nonce")
    fresh = broker.ask(place(word))
    refused(broker.send(fresh, evidence), "evidence-unacceptable", "binding.report_data")


@pytest.mark.parametrize("word", ["sevsnpvm", "tdxvm", "sgx"])
def test_attack_a_captured_quote_with_a_fresh_nonce(broker: Bench, word: str) -> None:
    """The attacker has a quote of a genuine node, and has MAA make a new token about it with the nonce of his own exchange."""
    captured = broker.ask(place(word))
    fresh = broker.ask(place(word))
    events = (event_log.event(event_log.WORKLOAD, PLAIN.encode()),)
    wanted = fresh.binding.report_data()
    for text in (wanted.hex(), event_log.fold(wanted, events).hex(), fresh.nonce.hex()):
        evidence = node(captured, word, nonce=text, x__ms__nonce=text)
        refused(broker.send(fresh, evidence), "evidence-unacceptable", "binding.report_data")
        fresh = replace(fresh, nonce=(nonce := broker.nonce()), binding=replace(fresh.binding, nonce=nonce))


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("sevsnpvm", {"x__ms__sevsnpvm__is__debuggable": True}),
        ("tdxvm", {"tdx_td_attributes_debug": True}),
        ("tdxvm", {"dbgstat": "enabled"}),
        ("sgx", {"x__ms__sgx__is__debuggable": True}),
        ("gcp_intel_tdx", {"dbgstat": "enabled"}),
    ],
)
def test_attack_a_machine_that_can_be_debugged(broker: Bench, word: str, change: dict[str, Any]) -> None:
    exchange = broker.ask(place(word))
    refused(broker.send(exchange, node(exchange, word, **change)), "denied", "place.enclave.debug")


@pytest.mark.parametrize("word", BODIES)
def test_attack_other_software(broker: Bench, word: str) -> None:
    """The service vouches for a genuine machine that runs something else."""
    exchange = broker.ask(place(word))
    nothing = replace(broker.trusted, node_measurements=frozenset({b"\x0e" * 48}))
    outcome = broker.send(exchange, node(exchange, word), trusted=nothing)
    assert isinstance(outcome, Refused)
    assert outcome.wheres in ([f"node.{launch}"] for launch in ("measurement", "mrtd", "mrenclave", "image_digest"))


def test_attack_a_guest_that_nobody_measured(broker: Bench) -> None:
    """An azurevm token states Azure's firmware only; a broker that listed that would take any guest."""
    from tests.attestation.test_authority import azurevm

    exchange = broker.ask('kind = "tee", accept = ["authority:azure/azurevm-sevsnpvm"]')
    events = (event_log.event(event_log.WORKLOAD, PLAIN.encode()),)
    nonce = event_log.fold(exchange.binding.report_data(), events)
    said = {"iss": ISSUERS["maa"], "iat": T - 60, "exp": T + 60, **azurevm(nonce)}
    refused(broker.send(exchange, shown(signed(said), "azure", events)), "evidence-unacceptable", "node.launch")


def test_attack_another_workload_in_the_log(broker: Bench) -> None:
    exchange = broker.ask(place())
    good = node(exchange)
    other = event_log.event(event_log.WORKLOAD, replace(PLAIN, code="sha256:" + "0e" * 32).encode())
    for events in ((other,), (), (*good.events, other)):
        outcome = broker.send(exchange, replace(good, events=events))
        assert isinstance(outcome, Refused)
        assert "binding.report_data" in outcome.wheres
        exchange = broker.ask(place())
        good = node(exchange)


def test_attack_a_gpu_token_as_the_machine(broker: Bench) -> None:
    exchange = broker.ask(place())
    nonce = exchange.binding.qualifying_data().hex()
    evidence = shown(bundle(gpu(eat_nonce=nonce), eat_nonce=nonce), "nvidia")
    outcome = broker.send(exchange, evidence)
    assert isinstance(outcome, Refused)
    assert {"node.kind", "node.launch"} <= set(outcome.wheres)


def test_attack_a_gpu_that_nobody_accepts_a_word_about(broker: Bench) -> None:
    more = ', gpu = "confidential"'
    exchange = broker.ask(place(more=more))
    evidence = node(exchange, bundles=(bundle_for(exchange),))
    refused(broker.send(exchange, evidence), "denied", "place.enclave.gpu0.accept", "place.enclave.gpu")


def test_attack_the_gpu_of_another_exchange(broker: Bench) -> None:
    more = ', gpu = "confidential", gpu_authorities = ["nvidia"]'
    exchange, other = broker.ask(place(more=more)), broker.ask(place(more=more))
    evidence = node(exchange, bundles=(bundle_for(other),))
    refused(broker.send(exchange, evidence), "evidence-unacceptable", "binding.devices.0")


def test_attack_a_gpu_in_the_open(broker: Bench) -> None:
    more = ', gpu = "confidential", gpu_authorities = ["nvidia"]'
    for change, wheres in (
        ({"measres": "fail"}, ("place.enclave.gpu",)),
        ({"secboot": False}, ("place.enclave.gpu",)),
        ({"dbgstat": "enabled"}, ("place.enclave.gpu0.debug", "place.enclave.gpu")),
    ):
        exchange = broker.ask(place(more=more))
        refused(broker.send(exchange, node(exchange, bundles=(bundle_for(exchange, **change),))), "denied", *wheres)


def test_attack_a_machine_on_the_deny_list_comes_through_a_service(broker: Bench) -> None:
    exchange = broker.ask(place(more=f', platforms = {{ deny = ["chip_id:{"ab" * 64}"] }}'))
    refused(broker.send(exchange, node(exchange)), "denied", "place.enclave.platforms.deny")


def test_attack_renewal_from_another_vm(broker: Bench) -> None:
    exchange = broker.ask(place())
    released = broker.send(exchange, node(exchange))
    assert isinstance(released, Released)
    again = broker.renewal(released)
    elsewhere = {"vm-configuration": {"vmUniqueId": "0E5CBB2A-DC95-4870-A74A-EE4FB33B1A9C"}}
    evidence = node(replace(exchange, binding=again), x__ms__runtime=elsewhere)
    refused(broker.renew(released, evidence, again.nonce), "lease-refused", "lease.machine")


# --- the broker itself ------------------------------------------------------------------------------------------------


def test_a_broker_is_never_attested_by_a_token() -> None:
    """Whoever trusts a broker trusts it for every contract, and an authority belongs to one."""
    accepting = Trust(Roots(), frozenset({LAUNCH}), accept=frozenset({"tdx", "authority:azure/sevsnpvm"}))
    assert accepting.policy("measurement").accept == frozenset({"tdx"})
    planted = Endorsements((named().endorsement("azure"), Endorsement("tdx", soft_tdx.FMSPC, b"{}")))
    for trust in (
        replace(accepting, endorsements=planted),
        replace(accepting, endorsements=planted, allow_soft=True, roots=Roots(soft=True)),
    ):
        assert trust.collateral(NOW).get("token", "authority/azure") is None
        assert trust.collateral(NOW).get("tdx", soft_tdx.FMSPC) is not None


def test_a_consumer_judges_a_service_under_the_authorities_of_the_contract() -> None:
    """What the broker takes, a consumer of the same contract takes; nothing else of his counts."""
    from tests.broker.world import World

    contract = parse(World().contract(extra=ALL), name="t")
    mine = Endorsements((named(keys=(MINE,)).endorsement("azure"),))
    assert endorsed(mine, contract) == endorsed(Endorsements(), contract)
    assert hashlib.sha256(jwks()).hexdigest().encode() in (
        endorsed(mine, contract).get("token", "authority/azure") or b""
    )
    with pytest.raises(EvidenceError):
        endorsed(mine, None).find("token", "authority/azure", where="x")
