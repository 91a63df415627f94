"""Attacks on hardware evidence by name, through a real keeper. Each test says what the attacker does; he gets nothing.

`hardware.Bench.send` looks after every refusal: one denial in the log, no lease, nothing sealed. test_matrix.py has the same attacks as
cells of products, without the stories.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cloister.attestation import events as event_log
from cloister.attestation.appraise import identities
from cloister.attestation.binding import Binding
from cloister.attestation.collateral import marks
from cloister.attestation.edge.attester import SOFT_KINDS, Attester, find_attester
from cloister.attestation.edge.soft import SoftGpuAttester
from cloister.attestation.events import WORKLOAD
from cloister.attestation.roots import Roots
from cloister.attestation.soft import azure as soft_azure
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.soft import tpm as soft_tpm
from cloister.attestation.types import Claims, Evidence
from cloister.attestation.verify import verify
from cloister.broker import wire
from cloister.broker.client import BrokerClient, Trust, own_measurement
from cloister.broker.collateral import EVERY_S, Collateral
from cloister.broker.decide import Trusted
from cloister.crypto import hpke
from cloister.crypto.keys import digest
from cloister.errors import DeniedError, EvidenceError
from cloister.testkit.broker import running_broker
from cloister.testkit.softtee import MEASUREMENT, NOW
from tests.broker.hardware import (
    CPUS,
    ENDS,
    KINDS,
    PLAIN,
    Bench,
    Gpu,
    Machine,
    Outcome,
    Refused,
    Released,
    Tpm,
    bench,
)
from tests.broker.world import World

EVIL = replace(PLAIN, code=digest(b"evil"))
MALWARE = b"\x0e" * 48
"""The launch measurement of what an attacker starts in a TEE of his own."""
kinds = pytest.mark.parametrize("kind", KINDS)
cpus = pytest.mark.parametrize("kind", CPUS)


@pytest.fixture(scope="module")
def broker() -> Iterator[Bench]:
    with bench() as made:
        yield made


@pytest.fixture(autouse=True)
def _back_to_now(broker: Bench) -> Iterator[None]:
    yield
    broker.now = NOW


def genuine(kind: str, **fields: Any) -> Machine:
    """A machine that gets its keys: a host counts as hardware, because no place takes a soft one."""
    return Machine(kind, root="named" if kind == "tpm" else "soft", **fields)


def claims_of(machine: Machine) -> Claims:
    """What a verifier finds in evidence of `machine`."""
    trusted = machine.trusted()
    evidence = machine.attest(Binding("release", b"\x01" * 32, b"key"), PLAIN)
    return verify(evidence, trusted.endorsements, trusted.roots, now=NOW)


def release(broker: Bench, machine: Machine, place: str = "") -> Released:
    """A release that everybody wants."""
    exchange = broker.ask(place or machine.place())
    outcome = broker.send(exchange, machine.attest(exchange.binding, PLAIN), trusted=machine.trusted())
    assert isinstance(outcome, Released), outcome.wheres
    return outcome


def nothing(outcome: Outcome | wire.RenewReply) -> list[str]:
    """What the attacker got: a refusal, and why."""
    assert isinstance(outcome, Refused)
    return outcome.wheres


# --- relay, replay, diversion -----------------------------------------------------------------------------------------


@kinds
def test_relay(broker: Bench, kind: str) -> None:
    """He has a genuine TEE attest, and sends its evidence with an HPKE key of his own, to have the keys sealed to it."""
    machine = genuine(kind)
    exchange = broker.ask(machine.place())
    evidence = machine.attest(exchange.binding, PLAIN)
    outcome = broker.send(exchange, evidence, trusted=machine.trusted(), key=hpke.KeyPair.generate().public)
    assert nothing(outcome) == ["binding.report_data"]


@kinds
def test_replay(broker: Bench, kind: str) -> None:
    """He recorded a release that was granted, and sends it again: the same request, then its evidence with a fresh nonce."""
    machine = genuine(kind)
    exchange = broker.ask(machine.place())
    recorded = machine.attest(exchange.binding, PLAIN)
    assert isinstance(broker.send(exchange, recorded, trusted=machine.trusted()), Released)
    again = broker.send(exchange, recorded, trusted=machine.trusted())
    assert (again.code if isinstance(again, Refused) else "", nothing(again)) == ("evidence-stale", ["nonce"])
    fresh = broker.ask(machine.place())
    assert nothing(broker.send(fresh, recorded, trusted=machine.trusted())) == ["binding.report_data"]


@kinds
def test_diversion(broker: Bench, kind: str) -> None:
    """He sits between node and broker and ends TLS himself: the node attests for his key, and he passes its evidence on."""
    machine = genuine(kind)
    exchange = broker.ask(machine.place())
    his = replace(exchange.binding, peer_key=b"\x0e" * 32)
    assert nothing(broker.send(exchange, machine.attest(his, PLAIN), trusted=machine.trusted())) == [
        "binding.report_data"
    ]


@kinds
def test_evidence_of_one_purpose_for_another(broker: Bench, kind: str) -> None:
    """He has evidence that a node made for a client (service), for a renewal or a release, and uses it for what it was not made for."""
    machine = genuine(kind)
    released = release(broker, machine)
    renewal = broker.renewal(released)
    for purpose in ("release", "service", "broker"):
        other = replace(renewal, purpose=purpose)
        renewed = broker.renew(released, machine.attest(other, PLAIN), renewal.nonce)
        assert nothing(renewed) == ["binding.report_data"]
        renewal = broker.renewal(released)
    exchange = broker.ask(machine.place())
    for purpose in ("renew", "service", "broker"):
        other = replace(exchange.binding, purpose=purpose)
        outcome = broker.send(exchange, machine.attest(other, PLAIN), trusted=machine.trusted())
        assert nothing(outcome) == ["binding.report_data"]
        exchange = broker.ask(machine.place())
    # one nonce buys one thing, whatever for: what was released is not renewed with the same evidence
    evidence = machine.attest(exchange.binding, PLAIN)
    assert isinstance(granted := broker.send(exchange, evidence, trusted=machine.trusted()), Released)
    assert set(nothing(broker.renew(granted, evidence, exchange.nonce))) == {"nonce", "binding.report_data"}
    # and the honest one is renewed
    good = broker.renewal(released)
    assert isinstance(broker.renew(released, machine.attest(good, PLAIN), good.nonce), wire.RenewReply)


# --- collateral -------------------------------------------------------------------------------------------------------


def test_rollback_of_collateral(broker: Bench, tmp_path: Path) -> None:
    """He runs the broker and has a machine whose certificate Intel revoked: he puts back the file of before, while the
    broker runs and again before a restart."""
    machine = Machine("tdx", "stolen")
    pck = soft_tdx.platform("stolen")
    before = soft_tdx.collateral(NOW - timedelta(days=2), evaluation=17)
    after = soft_tdx.collateral(NOW - timedelta(days=1), evaluation=18, revoked=(pck.serial,))
    file, said, seconds = tmp_path / "tdx.json", list[str](), 0.0

    def put(data: bytes) -> None:
        file.with_suffix(".new").write_bytes(data)
        file.with_suffix(".new").replace(file)

    def start() -> Collateral:
        roots = Roots(soft=True)
        return Collateral((file,), broker.ledger, roots, now=NOW, say=said.append, monotonic=lambda: seconds)

    def ask(vendors: Collateral) -> Outcome:
        found = vendors.at(NOW)
        exchange = broker.ask(machine.place())
        trusted = Trusted(Roots(soft=True), found, frozenset({MEASUREMENT}))
        return broker.send(exchange, machine.attest(exchange.binding, PLAIN), trusted=trusted)

    put(before)
    running = start()
    assert isinstance(ask(running), Released)
    for data in (after, before):  # the second is the attack: it is not taken, and the newer stays
        put(data)
        seconds += EVERY_S
        running.at(NOW)  # the look enters the new marks, which nobody waits for
        _wait(lambda: 18 in broker.ledger.collateral_marks().values())
        assert "tdx.4-chain.revoked" in nothing(ask(running))
    assert any(marks.CODE in line for line in said)
    with pytest.raises(EvidenceError) as refused:
        start()
    assert refused.value.code == marks.CODE


def _wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cca"])
def test_attesters_bring_no_freshness(broker: Bench, kind: str) -> None:
    """His collateral ended. He waits for nobody's clock: neither he nor anybody in between can send a newer list along."""
    machine = genuine(kind, window="expired")
    exchange = broker.ask(machine.place())
    outcome = broker.send(exchange, machine.attest(exchange.binding, PLAIN), trusted=machine.trusted())
    assert isinstance(outcome, Refused)
    assert outcome.code == "evidence-not-authentic"
    evidence = machine.attest(exchange.binding, PLAIN)
    fresh = {"crl": genuine(kind).endorsements().items[-1].data}
    more = broker.send(exchange, replace(evidence, parts={**evidence.parts, **fresh}), trusted=machine.trusted())
    assert isinstance(more, Refused)


# --- other machines ---------------------------------------------------------------------------------------------------


@kinds
def test_cuckoo(broker: Bench, kind: str) -> None:
    """He owns a genuine machine of the same kind, runs the very same image on it, and looks into its memory with an attack
    of his lab. A place that lists its machines does not know his."""
    ours, his = genuine(kind), genuine(kind, name="his")
    (mark, *_) = sorted(set(identities(claims_of(ours))) - set(identities(claims_of(his))))
    place = ours.place(f'platforms = {{ allow = ["{mark}"] }}')
    release(broker, ours, place)
    exchange = broker.ask(place)
    outcome = broker.send(exchange, his.attest(exchange.binding, PLAIN), trusted=his.trusted())
    assert nothing(outcome) == ["place.enclave.platforms.allow"]


@kinds
def test_other_software_on_a_machine_of_ours(broker: Bench, kind: str) -> None:
    """He starts an image of his own on a genuine machine: it asks for a workload event that looks like ours."""
    machine = genuine(kind, measurement=MALWARE)
    exchange = broker.ask(machine.place())
    outcome = broker.send(exchange, machine.attest(exchange.binding, PLAIN), trusted=machine.trusted())
    wheres = nothing(outcome)
    assert any(where.startswith("node.") for where in wheres)


@pytest.mark.parametrize("kind", ["azure-snp", "azure-tdx"])
def test_a_guest_of_his_own_in_place_of_the_paravisor(broker: Bench, kind: str) -> None:
    """He owns a genuine CPU of the kind that Azure has, without Azure: his guest puts the key of a TPM in software into the
    report data, and with that key he quotes the PCRs of our kernel."""
    machine = genuine(kind)
    exchange = broker.ask(machine.place())
    honest = machine.attest(exchange.binding, PLAIN)
    make = soft_azure.snp_evidence if kind == "azure-snp" else soft_azure.tdx_evidence
    name = "measurement" if kind == "azure-snp" else "mrtd"
    forged = make(
        report_data=exchange.binding.over(()).qualifying_data(),
        host=soft_tpm.host(kernel=MEASUREMENT),
        events=honest.events,
        report={name: MALWARE},
    )
    wheres = nothing(broker.send(exchange, forged, trusted=machine.trusted()))
    assert any(where.startswith("node.") for where in wheres)


@cpus
def test_gpu_of_another_machine(broker: Bench, kind: str) -> None:
    """He replaces the GPU's report by one of a GPU in a machine of his, which answers the same nonce."""
    ours, his = genuine(kind, devices=(Gpu("ours"),)), genuine(kind, name="his", devices=(Gpu("his"),))
    exchange = broker.ask(ours.place())
    evidence = ours.attest(exchange.binding, PLAIN)
    stolen = his.attest(exchange.binding, PLAIN).devices
    trusted = replace(ours.trusted(), endorsements=ours.endorsements() | his.endorsements())
    assert nothing(broker.send(exchange, replace(evidence, devices=stolen), trusted=trusted)) == ["binding.report_data"]


@cpus
def test_gpu_of_another_machine_that_the_cpu_vouches_for(broker: Bench, kind: str) -> None:
    """His GPU is put into the machine, or tunnelled to it, before anything is measured, so the CPU vouches for it: the binding
    cannot tell it from ours. A place that lists its GPUs does not know it."""
    ours = genuine(kind, devices=(Gpu("ours"),))
    ueid = claims_of(ours).devices[0].platform["ueid"]
    place = ours.place(f'gpus = {{ allow = ["ueid:{ueid}"] }}')
    release(broker, ours, place)
    his = replace(ours, devices=(Gpu("his"),))
    both = replace(ours, devices=(Gpu("ours"), Gpu("his")))
    for machine, where in ((his, "gpu0"), (both, "gpu1")):
        exchange = broker.ask(place)
        outcome = broker.send(exchange, machine.attest(exchange.binding, PLAIN), trusted=machine.trusted())
        assert nothing(outcome) == [f"place.enclave.{where}.gpus.allow"]


@cpus
def test_gpu_dropped(broker: Bench, kind: str) -> None:
    """His GPU is open. He leaves its report out, so that the machine looks like one without any: after the CPU signed, and
    by having the CPU attest alone."""
    machine = genuine(kind, devices=(Gpu(),))
    exchange = broker.ask(machine.place())
    evidence = replace(machine.attest(exchange.binding, PLAIN), devices=())
    assert nothing(broker.send(exchange, evidence, trusted=machine.trusted())) == [
        "binding.report_data",
        "place.enclave.gpu",
    ]
    exchange = broker.ask(machine.place())
    alone = replace(machine, devices=()).attest(exchange.binding, PLAIN)
    assert nothing(broker.send(exchange, alone, trusted=machine.trusted())) == ["place.enclave.gpu"]


def test_gpu_in_software_beside_genuine_hardware(broker: Bench) -> None:
    """Genuine TDX vouches for a GPU whose key everybody has: one soft device makes everything soft."""
    machine = Machine("tdx", root="named", devices=(Gpu(root="soft"),))
    exchange = broker.ask(machine.place(accept="tdx"))
    outcome = broker.send(exchange, machine.attest(exchange.binding, PLAIN), trusted=machine.trusted())
    assert nothing(outcome) == ["place.enclave.accept"]
    hardware = replace(machine, devices=(Gpu(root="named"),))
    release(broker, hardware, hardware.place(accept="tdx"))


def test_tpm_of_another_host(broker: Bench) -> None:
    """His host runs what it likes. A good host's TPM quotes for him; a place that lists its hosts does not know it. Then he
    sends his own TPM's quote with the good host's key, certificate and logs."""
    good, his = genuine("tpm"), genuine("tpm", name="his", measurement=MALWARE)
    place = good.place(f'platforms = {{ allow = ["ak:{claims_of(good).platform["ak"]}"] }}')
    other = genuine("tpm", name="another good one")
    exchange = broker.ask(place)
    outcome = broker.send(exchange, other.attest(exchange.binding, PLAIN), trusted=other.trusted())
    assert nothing(outcome) == ["place.enclave.platforms.allow"]

    exchange = broker.ask(place)
    evidence, bad = good.attest(exchange.binding, PLAIN), his.attest(exchange.binding, PLAIN)
    trusted = good.trusted()
    key = replace(bad, parts={**bad.parts, "ak": evidence.parts["ak"], "ak-cert": evidence.parts["ak-cert"]})
    assert nothing(broker.send(exchange, key, trusted=trusted)) == ["tpm.6-quote.signature"]
    exchange = broker.ask(place)
    evidence, bad = good.attest(exchange.binding, PLAIN), his.attest(exchange.binding, PLAIN)
    registers = replace(bad, parts={**bad.parts, "pcrs": evidence.parts["pcrs"]})
    (where, *_) = nothing(broker.send(exchange, registers, trusted=trusted))
    assert where.startswith("tpm.6-quote")
    exchange = broker.ask(place)
    evidence, bad = good.attest(exchange.binding, PLAIN), his.attest(exchange.binding, PLAIN)
    logs = replace(bad, parts={**bad.parts, "boot-log": evidence.parts["boot-log"]})
    (where, *_) = nothing(broker.send(exchange, logs, trusted=trusted))
    assert where.startswith("tpm.7-boot.")


@cpus
def test_tpm_of_another_host_beside_a_cpu(broker: Bench, kind: str) -> None:
    """He exchanges the quote of the TPM beside our CPU for that of a TPM whose host he owns, over the same nonce."""
    ours, his = genuine(kind, devices=(Tpm("ours"),)), genuine(kind, name="his", devices=(Tpm("his"),))
    exchange = broker.ask(ours.place())
    stolen = his.attest(exchange.binding, PLAIN).devices
    evidence = replace(ours.attest(exchange.binding, PLAIN), devices=stolen)
    trusted = replace(ours.trusted(), endorsements=ours.endorsements() | his.endorsements())
    assert nothing(broker.send(exchange, evidence, trusted=trusted)) == ["binding.report_data"]


# --- twins of our machines --------------------------------------------------------------------------------------------


@cpus
def test_debug_twin(broker: Bench, kind: str) -> None:
    """He starts the same image on a machine of ours, with the debugger's switch on: the measurement is the same."""
    twin = genuine(kind, debug=True)
    exchange = broker.ask(twin.place())
    outcome = broker.send(exchange, twin.attest(exchange.binding, PLAIN), trusted=twin.trusted())
    assert any("debug" in where or where.endswith(("8-attributes", ".pcr0")) for where in nothing(outcome))


@pytest.mark.parametrize("kind", ["sev-snp-vcek", "sev-snp-vlek", "sev-snp-turin", "azure-snp"])
def test_old_firmware_twin(broker: Bench, kind: str) -> None:
    """He goes back to firmware with a known hole, whose endorsement key AMD's servers still certify."""
    tee = "azure-snp" if kind == "azure-snp" else "sev-snp"
    numbers = claims_of(genuine(kind)).svns
    place = genuine(kind).place(
        f"min_svn = {{ {tee} = {{ snp = {numbers['snp']}, microcode = {numbers['microcode']} }} }}"
    )
    release(broker, genuine(kind), place)
    old = genuine(kind, firmware="old")
    exchange = broker.ask(place)
    outcome = broker.send(exchange, old.attest(exchange.binding, PLAIN), trusted=old.trusted())
    assert nothing(outcome) == ["place.enclave.min_svn.microcode", "place.enclave.min_svn.snp"]


def test_firmware_that_can_go_back(broker: Bench) -> None:
    """His host reports the newest firmware but has not committed it, so he can go back to the old one under the same guest."""
    machine = Machine("sev-snp-vcek")
    place = machine.place("min_svn = { sev-snp = { microcode = 219 } }")
    exchange = broker.ask(place)
    amd = soft_snp.machine("a")
    evidence = soft_snp.evidence(
        amd,
        report_data=exchange.binding.report_data(),
        measurement=MEASUREMENT,
        events=machine.attest(exchange.binding, PLAIN).events,
        committed=replace(soft_snp.TCB, microcode=200),
    )
    assert nothing(broker.send(exchange, evidence, trusted=machine.trusted())) == ["place.enclave.min_svn.microcode"]


@pytest.mark.parametrize("kind", ["tdx", "sgx", "azure-tdx"])
@pytest.mark.parametrize("status", ["OutOfDate", "OutOfDateConfigurationNeeded", "ConfigurationNeeded", "Revoked"])
def test_out_of_date_twin(broker: Bench, kind: str, status: str) -> None:
    """The same with Intel's, which says so itself."""
    old = genuine(kind, firmware=status)
    exchange = broker.ask(old.place())
    (where, *_) = nothing(broker.send(exchange, old.attest(exchange.binding, PLAIN), trusted=old.trusted()))
    assert where.endswith("7-tcb") if status == "Revoked" else where == "place.enclave.tcb_status"


@kinds
def test_deny_listed_machine(broker: Bench, kind: str) -> None:
    """He has one machine that everybody knows to be broken, and it is genuine."""
    stolen = genuine(kind, name="stolen")
    ours = set(identities(claims_of(genuine(kind))))
    for mark in set(identities(claims_of(stolen))) - ours:
        place = stolen.place(f'platforms = {{ deny = ["{mark}"] }}')
        release(broker, genuine(kind), place)
        exchange = broker.ask(place)
        outcome = broker.send(exchange, stolen.attest(exchange.binding, PLAIN), trusted=stolen.trusted())
        assert nothing(outcome) == ["place.enclave.platforms.deny"]


def test_a_deny_listed_chip_hides_its_id(broker: Bench) -> None:
    """The host masks the chip's id, as a host with a VLEK may: a machine without its name is not another one."""
    machine = Machine("sev-snp-vlek")
    place = machine.place(f'platforms = {{ deny = ["chip_id:{"ab" * 64}"] }}')
    exchange = broker.ask(place)
    outcome = broker.send(exchange, machine.attest(exchange.binding, PLAIN), trusted=machine.trusted())
    assert nothing(outcome) == ["place.enclave.platforms.deny"]
    # with a VCEK the id is what the key belongs to, so masking it makes evidence of nobody
    exchange = broker.ask(place)
    amd, events = soft_snp.machine("a"), machine.attest(exchange.binding, PLAIN).events
    masked = soft_snp.evidence(
        amd,
        report_data=exchange.binding.report_data(),
        measurement=MEASUREMENT,
        events=events,
        chip_id=bytes(64),
    )
    (where, *_) = nothing(broker.send(exchange, masked, trusted=Machine("sev-snp-vcek").trusted()))
    assert where == "sev-snp.6-chip"


# --- the log ----------------------------------------------------------------------------------------------------------


@kinds
def test_second_workload(broker: Bench, kind: str) -> None:
    """His node measures our workload, gets nothing yet, then measures and starts his; and the other way round."""
    machine = genuine(kind)
    for workloads in ((PLAIN, EVIL), (EVIL, PLAIN), (PLAIN, PLAIN)):
        exchange = broker.ask(machine.place())
        evidence = machine.attest(exchange.binding, *workloads)
        assert nothing(broker.send(exchange, evidence, trusted=machine.trusted())) == ["events.cloister/workload/1"]


@kinds
def test_workload_under_another_name(broker: Bench, kind: str) -> None:
    """Names of events are not measured: he gives the event of his second workload another one."""
    machine = genuine(kind)
    ours, his = (event_log.event(WORKLOAD, each.encode()) for each in (PLAIN, EVIL))
    for name in ("cloister/config/1", "cloister/workload/2", "x"):
        exchange = broker.ask(machine.place())
        evidence = machine.attest(exchange.binding, events=(ours, replace(his, name=name)))
        assert nothing(broker.send(exchange, evidence, trusted=machine.trusted())) == ["events.cloister/workload/1"]


@pytest.mark.parametrize("kind", ["sev-snp-vcek", "sev-snp-vlek", "sev-snp-turin", "sgx", "cca"])
def test_virtual_log_rewritten_after_the_quote(broker: Bench, kind: str) -> None:
    """Hardware without a register: he lets his workload be measured, and writes our workload into the log when the quote is
    made. Then he leaves the log out and binds the bare report data, as hardware with a register does."""
    machine = genuine(kind)
    exchange = broker.ask(machine.place())
    evidence = machine.attest(exchange.binding, EVIL)
    ours = machine.attest(exchange.binding, PLAIN).events
    outcome = broker.send(exchange, replace(evidence, events=ours), trusted=machine.trusted())
    assert nothing(outcome) == ["binding.report_data"]

    exchange = broker.ask(machine.place())
    without = machine.attest(exchange.binding, events=())
    outcome = broker.send(exchange, replace(without, events=ours), trusted=machine.trusted())
    assert nothing(outcome) == ["binding.report_data"]

    if machine.evidence_kind == "sev-snp":
        exchange = broker.ask(machine.place())
        amd = soft_snp.machine("a")
        bare = soft_snp.report(amd, report_data=exchange.binding.report_data(), measurement=MEASUREMENT)
        evidence = Evidence("sev-snp", bare, ours, {"leaf": amd.leaf})
        trusted = Machine("sev-snp-vcek").trusted()
        assert nothing(broker.send(exchange, evidence, trusted=trusted)) == ["binding.report_data"]


# --- leases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cca"])
def test_a_lease_never_outlives_its_evidence(broker: Bench, kind: str) -> None:
    """What vouches for his machine ends in four minutes, and he asks for ten; then he renews as if nothing had ended."""
    machine = genuine(kind, window="ending")
    released = release(broker, machine)
    assert released.payload.lease.expires == NOW + ENDS
    assert released.entry.expires == NOW + ENDS
    assert released.payload.lease.renew_after == NOW + ENDS / 2
    broker.now = NOW + ENDS / 2
    renewal = broker.renewal(released)
    renewed = broker.renew(released, machine.attest(renewal, PLAIN), renewal.nonce)
    assert isinstance(renewed, wire.RenewReply)
    assert renewed.expires == NOW + ENDS
    broker.now = NOW + ENDS + timedelta(seconds=1)
    renewal = broker.renewal(released)
    outcome = broker.renew(released, machine.attest(renewal, PLAIN), renewal.nonce)
    assert isinstance(outcome, Refused)
    assert outcome.code == "evidence-not-authentic"


def test_a_lease_never_outlives_a_devices_evidence(broker: Bench) -> None:
    """The same with the GPU's OCSP answers, beside a CPU whose collateral lasts for weeks."""
    released = release(broker, Machine("tdx", devices=(Gpu(window="ending"),)))
    assert released.payload.lease.expires == NOW + ENDS


@kinds
def test_a_lease_on_another_machine(broker: Bench, kind: str) -> None:
    """He has a copy of the node's HPKE key, which should not leave its TEE, and renews its lease on a twin that he owns."""
    machine, twin = genuine(kind), genuine(kind, name="twin")
    released = release(broker, machine)
    renewal = broker.renewal(released)
    broker.trusted = twin.trusted()
    assert nothing(broker.renew(released, twin.attest(renewal, PLAIN), renewal.nonce)) == ["lease.machine"]


def test_a_lease_after_a_reset(broker: Bench) -> None:
    """He resets the host, reads its memory as it was, starts the same system, and renews with the key that he found."""
    released = release(broker, genuine("tpm"))
    again = genuine("tpm", reset_count=2)
    renewal = broker.renewal(released)
    assert nothing(broker.renew(released, again.attest(renewal, PLAIN), renewal.nonce)) == ["lease.machine"]


# --- software that plays hardware -------------------------------------------------------------------------------------


@kinds
def test_software_at_a_place_for_hardware(broker: Bench, kind: str) -> None:
    """He makes evidence with the published keys: at a place that does not say `simulated`, and at a broker that does not
    believe the test roots."""
    soft = Machine(kind)
    place = soft.place(accept=soft.evidence_kind)
    exchange = broker.ask(place)
    outcome = broker.send(exchange, soft.attest(exchange.binding, PLAIN), trusted=soft.trusted())
    assert nothing(outcome) == ["place.enclave.kind" if kind == "tpm" else "place.enclave.accept"]
    exchange = broker.ask(place)
    outcome = broker.send(exchange, soft.attest(exchange.binding, PLAIN), trusted=soft.trusted(soft=False))
    assert isinstance(outcome, Refused)
    assert outcome.code == "evidence-not-authentic"
    hardware = Machine(kind, root="named")
    release(broker, hardware, hardware.place(accept=hardware.evidence_kind))


@kinds
def test_an_operator_names_a_root_of_his_own(kind: str) -> None:
    """He runs the broker and makes it believe a root whose key he has, the published one among them: its measured
    configuration says so, and clients who did not name it refuse the broker."""
    for root in ("soft", "named"):
        for evidence_kind, pin in Machine(kind, root=root).pins().items():
            config = wire.BrokerConfig(
                version=1,
                origin="a",
                log_key="k",
                node_measurements=(MEASUREMENT,),
                roots=(f"{evidence_kind}:{pin}",),
                allow_soft=False,
                lease_s=600,
                kbs=False,
            )
            trust = Trust(Roots(), frozenset({MEASUREMENT}))
            assert [reason.where for reason in trust.appraise_config(config)] == ["broker.roots"]


# --- over the network -------------------------------------------------------------------------------------------------

NODES = SOFT_KINDS
BROKERS = tuple(kind for kind in SOFT_KINDS if kind != "soft-tpm")
"""What a broker can run in: its clients want a TEE, not a host."""


def launch(attester: Any) -> bytes:
    found: bytes = attester.launch
    return found


def soft_node(kind: str, *gpus: SoftGpuAttester) -> Attester:
    attester: Any = find_attester(kind, measurement=own_measurement())
    attester.devices = gpus
    attester.extend(WORKLOAD, PLAIN.encode())
    found: Attester = attester
    return found


def ready(client: BrokerClient, name: str, *, gpu: bool = False) -> str:
    world = World()
    text = world.contract(name=name).decode()
    if gpu:
        text = text.replace('accept = ["simulated"]', 'accept = ["simulated"], gpu = "confidential"')
    return world.ready(client, text.encode())


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKERS)
def test_a_broker_in_every_kind_of_hardware_and_every_kind_of_node(tmp_path: Path, kind: str) -> None:
    """No attack: over a real socket, a broker in `kind` is attested by its client, and gives keys to nodes of every kind."""
    nodes = {each: soft_node(each) for each in NODES}
    launches = frozenset(launch(each) for each in nodes.values())
    with running_broker(tmp_path / "state", process=False, attester=kind, node_measurements=launches) as running:
        client = running.client()
        assert client.broker.claims.tee == kind
        assert client.broker.soft
        contract = ready(client, "everybody")
        for name, node in nodes.items():
            if name == "soft-tpm":
                with pytest.raises(DeniedError) as refused:
                    client.release(contract, "train", reads=("xrays",), attester=node)
                assert [reason.where for reason in refused.value.reasons] == ["place.enclave.kind"]
                continue
            got = client.release(contract, "train", reads=("xrays",), writes=("detector",), attester=node)
            assert set(got.keys) == {"xrays"}
            again = client.renew(got, node)
            assert again.lease.expires >= got.lease.expires
        if kind == "soft-tdx":
            with_gpu = ready(client, "gpus", gpu=True)
            for name in NODES:
                if name != "soft-tpm":
                    node = soft_node(name, SoftGpuAttester())
                    assert client.release(with_gpu, "train", reads=("xrays",), attester=node).keys


def test_a_broker_on_a_measured_host_is_refused_by_its_clients(tmp_path: Path) -> None:
    """An operator runs the broker beside a TPM only: whoever owns the host reads its memory."""
    with (
        running_broker(
            tmp_path / "state", process=False, attester="soft-tpm", node_measurements=frozenset()
        ) as running,
        pytest.raises(EvidenceError) as refused,
    ):
        running.client()
    assert "broker.kind" in [reason.where for reason in refused.value.reasons]
