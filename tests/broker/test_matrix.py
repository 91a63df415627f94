"""The soft matrix: every state of every kind of hardware, asked for keys through a real keeper.

A cell is one release: a machine, what is wrong with it, with its devices, its log or its request, and a place of a contract. Cells are
products of the tables below; what each must give comes from the tables too, never from the verifiers. Of each cell is checked

  - granted or refused, with which code, and *why*: evidence that is not authentic for no other reason than the cell's faults,
    evidence that is not acceptable for exactly the cell's faults, all of them;
  - that nothing left (`hardware.Bench.send`): one denial in the log that says the same, no lease, nothing sealed.

docs/attestation/matrix.md says what the matrix covers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, Final

import pytest

from cloister.attestation import events as event_log
from cloister.attestation.appraise import identities
from cloister.attestation.events import WORKLOAD
from cloister.attestation.types import Claims, Event, Evidence
from cloister.attestation.verify import verify
from cloister.broker.decide import NONCE_LIFE
from cloister.crypto import hpke
from cloister.crypto.keys import digest
from cloister.testkit.softtee import NOW
from tests.broker.hardware import (
    CPUS,
    DCAP,
    DEBUGGABLE,
    FIRMWARE,
    KINDS,
    PLAIN,
    REVOCABLE,
    SNP,
    WINDOWS,
    Bench,
    Exchange,
    Gpu,
    Machine,
    Outcome,
    Released,
    Tpm,
    bench,
)

OTHER: Final = hpke.KeyPair.generate().public
"""An HPKE key of the attacker's own."""
EVIL: Final = replace(PLAIN, code=digest(b"evil"))
SECOND: Final = "cloister/other/1"


# --- what a cell must give --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expected:
    """Faults by how they are told: `faults` (authenticity), of which at least one is named and nothing else; `rules`
    (acceptability), which are told all together; `stale`: the nonce is no good."""

    faults: frozenset[str] = frozenset()
    rules: frozenset[str] = frozenset()
    stale: bool = False
    malformed: str = ""

    @property
    def code(self) -> str:
        if self.stale:
            return "evidence-stale"
        if self.malformed:
            return "evidence-malformed"
        if self.faults:
            return "evidence-not-authentic"
        if any(rule.startswith(("binding.", "node.", "events.", "workload.")) for rule in self.rules):
            return "evidence-unacceptable"
        return "denied" if self.rules else ""

    def differs(self, outcome: Outcome) -> str:
        """Return what is not as expected; empty if it is."""
        if isinstance(outcome, Released):
            return f"released, wanted {self.code}" if self.code else ""
        found = set(outcome.wheres)
        if outcome.code != self.code:
            return f"{outcome.code} {sorted(found)}, wanted {self.code or 'a release'}"
        if self.stale:
            if "nonce" not in found:
                return f"{sorted(found)}, wanted nonce"
            found -= {"nonce"}
        if self.malformed:
            return "" if found == {self.malformed} else f"{sorted(found)}, wanted {self.malformed}"
        if self.faults:
            return "" if found and found <= self.faults else f"{sorted(found)}, wanted some of {sorted(self.faults)}"
        return "" if found == self.rules else f"{sorted(found)}, wanted {sorted(self.rules)}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One release and what it must give."""

    name: str
    act: Callable[[Bench], Outcome]
    expected: Expected


def attempt(
    machine: Machine, place: str, *, soft: bool = True, change: Callable[[Bench, Exchange], Evidence] | None = None
) -> Callable[[Bench], Outcome]:
    """Return a release by `machine` at `place`; `change` makes the evidence."""

    def act(broker: Bench) -> Outcome:
        exchange = broker.ask(place)
        evidence = machine.attest(exchange.binding, PLAIN) if change is None else change(broker, exchange)
        return broker.send(exchange, evidence, trusted=machine.trusted(soft=soft))

    return act


# --- the machine itself: firmware x debug x revoked x window x root x place -------------------------------------------

ROOTS: Final = ("soft", "named", "foreign", "unbelieved")
"""The test root where it is believed, a root that the operator named, one that nobody pins, the test root at a broker without soft."""
ACCEPTED: Final = frozenset({"", "UpToDate", "SWHardeningNeeded", "new"})
FLOORS: Final = {
    **dict.fromkeys(("sev-snp-vcek", "sev-snp-vlek"), "min_svn = { sev-snp = { microcode = 219 } }"),
    "sev-snp-turin": "min_svn = { sev-snp = { microcode = 75 } }",
    "azure-snp": "min_svn = { azure-snp = { microcode = 219 } }",
}
"""What old firmware breaks where the vendor has no word for it."""
LENIENT: Final = (
    'debug = true, tcb = ["UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded", '
    '"OutOfDate", "OutOfDateConfigurationNeeded", "NotRated"]'
)
_Wheres = dict[str, tuple[str, ...]]
_DCAP: Final[_Wheres] = {
    "root": ("2-root",),
    "debug": ("8-attributes",),  # dcap-qvl refuses it, so no place can accept it
    "revoked": ("4-chain.revoked",),
    "Revoked": ("7-tcb",),
    "expired": ("3-collateral.expired",),
    "future": ("3-collateral.future",),
    "missing": ("3-collateral",),
    "others": ("3-collateral", "7-tcb"),
}
_AMD: Final[_Wheres] = {
    "root": ("2-root",),
    "revoked": ("4-revocation.revoked",),
    "expired": ("4-revocation.revocation",),
    "future": ("4-revocation.revocation",),
    "missing": ("4-revocation.revocation",),
    "leaf-expired": ("3-chain.expired",),
    "leaf-future": ("3-chain.future",),
    "no-chain": ("3-chain",),
}
FAULTS: Final[dict[str, tuple[str, _Wheres]]] = {
    "tdx": ("tdx", _DCAP),
    "sgx": ("sgx", _DCAP),
    "azure-tdx": ("azure-tdx.2-report.tdx", _DCAP),
    **dict.fromkeys(SNP, ("sev-snp", _AMD)),
    "azure-snp": ("azure-snp.2-report.sev-snp", _AMD),
    "nitro": (
        "nitro",
        {
            "root": ("2-root",),
            "revoked": ("3-chain.revoked",),
            "expired": ("3-chain.revocation",),
            "future": ("3-chain.revocation",),
            "leaf-expired": ("3-chain.expired",),
            "leaf-future": ("3-chain.future",),
            "made-later": ("5-time.future",),
        },
    ),
    "cca": ("cca", {"root": ("2-cpak",), "missing": ("2-cpak",), "decommissioned": ("6-lifecycle",)}),
    "tpm": (
        "tpm",
        {
            "root": ("5-root",),
            "revoked": ("4-chain.revoked",),
            "expired": ("4-chain.revocation",),
            "future": ("4-chain.revocation",),
            "leaf-expired": ("4-chain.expired",),
            "leaf-future": ("4-chain.future",),
            "unknown": ("3-identity",),
        },
    ),
}
"""Kind -> (prefix of its steps, fault -> where it is found)."""


def unauthentic(machine: Machine, *, believed: bool = True) -> frozenset[str]:
    """Return where the faults of `machine` may be found that make its evidence no evidence."""
    prefix, table = FAULTS[machine.kind]
    present = [machine.firmware, machine.window]
    present += ["root"] if machine.root == "foreign" or not believed else []
    present += ["debug"] if machine.debug else []
    present += ["revoked"] if machine.revoked else []
    return frozenset(f"{prefix}.{where}" for fault in present for where in table.get(fault, ()))


def unacceptable(machine: Machine, place: str) -> frozenset[str]:
    """Return the rules that a genuine `machine` breaks at a place `soft`, `hardware` or `lenient`."""
    soft = machine.root == "soft" or any(each.root == "soft" for each in machine.devices)
    if machine.kind == "tpm":
        return frozenset({"place.enclave.kind"} if soft else ())
    rules = {"place.enclave.accept"} if soft != (place != "hardware") else set()
    if place != "lenient":
        rules |= {"place.enclave.debug"} if machine.debug else set()
        if machine.firmware not in ACCEPTED:
            number = machine.kind in FLOORS
            rules.add("place.enclave.min_svn.microcode" if number else "place.enclave.tcb_status")
    if machine.kind == "nitro" and machine.debug:
        rules.add("node.pcr0")  # a debug enclave has no measurement
    return frozenset(rules)


def place_of(machine: Machine, place: str) -> str:
    if machine.kind == "tpm":
        return machine.place()
    if place == "lenient":
        return machine.place(LENIENT)
    accept = "simulated" if place == "soft" else machine.evidence_kind
    return machine.place(FLOORS.get(machine.kind, ""), accept=accept)


def machine_cells(kind: str, root: str) -> Iterator[Cell]:
    states = itertools.product(
        FIRMWARE[kind],
        (False, True) if kind in DEBUGGABLE else (False,),
        (False, True) if kind in REVOCABLE else (False,),
        WINDOWS[kind],
    )
    for firmware, debug, revoked, window in states:
        machine = Machine(
            kind,
            root="soft" if root == "unbelieved" else root,
            firmware=firmware,
            debug=debug,
            revoked=revoked,
            window=window,
        )
        believed = root != "unbelieved"
        faults = unauthentic(machine, believed=believed)
        # what is not authentic never meets a place
        for place in ("soft",) if faults or kind == "tpm" else ("soft", "hardware", "lenient"):
            name = f"{kind} {root} {firmware} debug={debug} revoked={revoked} {window} at {place}"
            rules = frozenset() if faults else unacceptable(machine, place)
            yield Cell(name, attempt(machine, place_of(machine, place), soft=believed), Expected(faults, rules))


# --- the exchange: wrong binding, replay, relay, diversion ------------------------------------------------------------

BINDINGS: Final[dict[str, dict[str, Any]]] = {
    "nonce of another exchange": {"nonce": b"\x0e" * 32},
    "key of somebody else": {"key": OTHER},
    "another broker": {"peer_key": b"\x0e" * 32},
    "no peer": {"peer_key": bytes(32)},
    "another contract": {"contract": "sha256:" + "0e" * 32},
    "no contract": {"contract": ""},
    "another phase": {"phase": "serve"},
    "another request": {"request": b"\x0e" * 32},
    "renew": {"purpose": "renew"},
    "service": {"purpose": "service"},
    "broker": {"purpose": "broker"},
}
"""What genuine evidence was made for instead."""
DEVICES: Final[dict[str, tuple[Gpu | Tpm, ...]]] = {
    "alone": (),
    "a GPU": (Gpu(),),
    "two GPUs": (Gpu(), Gpu("two")),
    "a TPM": (Tpm(),),
    "a GPU and a TPM": (Gpu(), Tpm()),
}


def bound_to(machine: Machine, *, devices: bool = True) -> frozenset[str]:
    found = {f"binding.devices.{index}" for index in range(len(machine.devices))} if devices else set()
    return frozenset({"binding.report_data"} | found)


def exchange_cells(kind: str, named: str) -> Iterator[Cell]:
    bad = [each for each in FIRMWARE[kind] if each not in ACCEPTED and not unauthentic(Machine(kind, firmware=each))]
    states: list[dict[str, Any]] = [
        {},
        *([{"firmware": bad[0]}] if bad else []),
        *([{"debug": True}] if kind in DEBUGGABLE else []),
    ]
    devices = DEVICES[named]
    for state in states[:1] if devices else states:  # a machine's own state and its devices are other products
        machine = Machine(kind, root="named" if kind == "tpm" else "soft", devices=devices, **state)
        faults, own = unauthentic(machine), unacceptable(machine, "soft")
        what = f"{kind} {named} {state or ''}"
        place = place_of(machine, "soft")

        def expect(
            rules: frozenset[str] = frozenset(),
            *,
            stale: bool = False,
            faults: frozenset[str] = faults,
            own: frozenset[str] = own,
        ) -> Expected:
            return Expected(faults, frozenset() if faults else own | rules, stale=stale)

        yield Cell(f"{what} as asked", attempt(machine, place), expect())
        for name, changed in BINDINGS.items():
            act = _bound(machine, place, changed)
            yield Cell(f"{what}, made for {name}", act, expect(bound_to(machine)))
        for name, sent in (("key", {"key": OTHER}), ("ask", {"ask": None})):
            rules = bound_to(machine)
            yield Cell(f"{what}, {name} of the request replaced", _sent(machine, place, sent), expect(rules))
        for name, act in (
            ("sent twice", _twice(machine, place)),
            ("nonce too old", _aged(machine, place, NONCE_LIFE + timedelta(seconds=1))),
            ("nonce from later", _aged(machine, place, -timedelta(seconds=1))),
            ("nonce never issued", _invented(machine, place)),
            ("an old answer with a new nonce", _old_evidence(machine, place)),
        ):
            stale = name != "an old answer with a new nonce"
            rules = frozenset() if stale else bound_to(machine)
            yield Cell(f"{what}, {name}", act, expect(rules, stale=stale))
        yield Cell(f"{what}, nothing bound", _unbound(machine, place), expect(bound_to(machine, devices=False)))


def _bound(machine: Machine, place: str, changed: dict[str, Any]) -> Callable[[Bench], Outcome]:
    return attempt(machine, place, change=lambda _, ex: machine.attest(replace(ex.binding, **changed), PLAIN))


def _sent(machine: Machine, place: str, sent: dict[str, Any]) -> Callable[[Bench], Outcome]:
    def act(broker: Bench) -> Outcome:
        exchange = broker.ask(place)
        changed = {"ask": replace(exchange.ask, reads=("xrays",))} if "ask" in sent else sent
        evidence = machine.attest(exchange.binding, PLAIN)
        return broker.send(exchange, evidence, trusted=machine.trusted(), **changed)

    return act


def _twice(machine: Machine, place: str) -> Callable[[Bench], Outcome]:
    def act(broker: Bench) -> Outcome:
        exchange = broker.ask(place)
        evidence = machine.attest(exchange.binding, PLAIN)
        broker.send(exchange, evidence, trusted=machine.trusted())
        return broker.send(exchange, evidence, trusted=machine.trusted())

    return act


def _aged(machine: Machine, place: str, age: timedelta) -> Callable[[Bench], Outcome]:
    def act(broker: Bench) -> Outcome:
        broker.now = NOW - age
        try:
            nonce = broker.nonce()
        finally:
            broker.now = NOW
        exchange = broker.ask(place, nonce=nonce)
        return broker.send(exchange, machine.attest(exchange.binding, PLAIN), trusted=machine.trusted())

    return act


def _invented(machine: Machine, place: str) -> Callable[[Bench], Outcome]:
    def act(broker: Bench) -> Outcome:
        exchange = broker.ask(place, nonce=b"\x0e" * 32)
        return broker.send(exchange, machine.attest(exchange.binding, PLAIN), trusted=machine.trusted())

    return act


def _old_evidence(machine: Machine, place: str) -> Callable[[Bench], Outcome]:
    def act(broker: Bench) -> Outcome:
        old = machine.attest(broker.ask(place).binding, PLAIN)
        return broker.send(broker.ask(place), old, trusted=machine.trusted())

    return act


def _unbound(machine: Machine, place: str) -> Callable[[Bench], Outcome]:
    def change(_: Bench, exchange: Exchange) -> Evidence:
        whole = machine.attest(exchange.binding, PLAIN)
        return replace(machine.cpu(bytes(machine.report_bytes), PLAIN), devices=whole.devices)

    return attempt(machine, place, change=change)


# --- GPUs beside a CPU: their state -----------------------------------------------------------------------------------

_NO_ANSWER: Final = ("3-revocation.revocation", "8-signers.revocation")
_GPU: Final[_Wheres] = {
    "root": ("2-chain.root",),
    "revoked": ("3-revocation.revoked",),
    "expired": _NO_ANSWER,
    "future": _NO_ANSWER,
    "missing": _NO_ANSWER,
    "unsigned": ("7-rim", "9-measurements"),
    "drift": ("9-measurements.gpu.measurement.21",),
}
GPU_ROOTS: Final = ("soft", "named", "foreign")
GPU_WINDOWS: Final = ("valid", "expired", "future", "missing", "unsigned")


def gpu_faults(gpu: Gpu) -> frozenset[str]:
    present = [gpu.window, "root" if gpu.root == "foreign" else "", "revoked" if gpu.revoked else ""]
    present.append("drift" if gpu.drift else "")
    return frozenset(f"nvidia-gpu.{where}" for fault in present for where in _GPU.get(fault, ()))


def gpu_states(root: str) -> Iterator[Gpu]:
    for debug, revoked, window, drift in itertools.product((False, True), (False, True), GPU_WINDOWS, (False, True)):
        yield Gpu(root=root, debug=debug, revoked=revoked, window=window, drift=drift)


def gpu_cells(kind: str, root: str) -> Iterator[Cell]:
    every = list(gpu_states(root))
    # the whole product beside one CPU; beside the others each single fault: devices are verified on their own
    chosen = every if kind == "tdx" else [each for each in every if _many(each) <= 1]
    for gpu, place, cpu in itertools.product(chosen, ("soft", "hardware"), ("soft", "named")):
        machine = Machine(kind, root=cpu, devices=(gpu,))
        faults = gpu_faults(gpu)
        if faults and (place, cpu) != ("soft", "soft"):
            continue
        rules = set(unacceptable(machine, place))
        rules |= {"place.enclave.gpu0.debug", "place.enclave.gpu"} if gpu.debug else set()
        name = f"{kind} {cpu} with {gpu} at {place}"
        expected = Expected(faults, frozenset() if faults else frozenset(rules))
        yield Cell(name, attempt(machine, place_of(machine, place)), expected)


def _many(gpu: Gpu) -> int:
    return sum((gpu.root != "soft", gpu.debug, gpu.revoked, gpu.window != "valid", gpu.drift))


# --- mix and match ----------------------------------------------------------------------------------------------------

GPU_A, GPU_B, TPM_A, TPM_C = Gpu("of a"), Gpu("of b"), Tpm("of a"), Tpm("of c")
Devices = tuple[Evidence, ...]
MIXES: Final[dict[str, tuple[Callable[[Devices, Devices], Devices], frozenset[str]]]] = {
    "as it is": (lambda own, other: own, frozenset()),
    "GPU of machine B": (lambda own, other: (other[0], *own[1:]), frozenset({"binding.report_data"})),
    "TPM of machine C": (lambda own, other: (*own[:-1], other[-1]), frozenset({"binding.report_data"})),
    "all devices of B": (lambda own, other: other, frozenset({"binding.report_data"})),
    "swapped": (lambda own, other: own[::-1], frozenset({"binding.report_data"})),
    "GPU of B added": (lambda own, other: (*own, other[0]), frozenset({"binding.report_data"})),
    "TPM dropped": (lambda own, other: own[:-1], frozenset({"binding.report_data"})),
    "GPU dropped": (lambda own, other: own[1:], frozenset({"binding.report_data", "place.enclave.gpu"})),
    "all dropped": (lambda own, other: (), frozenset({"binding.report_data", "place.enclave.gpu"})),
}


def mix_cells(kind: str) -> Iterator[Cell]:
    mine, theirs = Machine(kind, devices=(GPU_A, TPM_A)), Machine(kind, "b", devices=(GPU_B, TPM_C))
    place = mine.place()

    def whole(change: Callable[[Bench, Exchange], Evidence]) -> Callable[[Bench], Outcome]:
        def act(broker: Bench) -> Outcome:
            exchange = broker.ask(place)
            ours = mine.trusted()
            trusted = replace(ours, endorsements=ours.endorsements | theirs.endorsements())
            return broker.send(exchange, change(broker, exchange), trusted=trusted)

        return act

    for name, (mixed, rules) in MIXES.items():

        def change(_: Bench, exchange: Exchange, mixed: Any = mixed) -> Evidence:
            own, other = mine.attest(exchange.binding, PLAIN), theirs.attest(exchange.binding, PLAIN)
            return replace(own, devices=mixed(own.devices, other.devices))

        yield Cell(f"{kind} {name}", whole(change), Expected(rules=rules))

    def stale_gpu(broker: Bench, exchange: Exchange) -> Evidence:
        own = mine.attest(exchange.binding, PLAIN)
        old = mine.attest(broker.ask(place).binding, PLAIN)
        return replace(own, devices=(old.devices[0], *own.devices[1:]))

    def late(_: Bench, exchange: Exchange) -> Evidence:
        alone = replace(mine, devices=()).attest(exchange.binding, PLAIN)
        return replace(alone, devices=mine.attest(exchange.binding, PLAIN).devices)

    def vouched_stale(broker: Bench, exchange: Exchange) -> Evidence:
        """The CPU vouches for a GPU's report of an earlier exchange."""
        old = mine.attest(broker.ask(place).binding, PLAIN).devices
        bound = exchange.binding.over(old)
        data = bound.report_data() if mine.report_bytes == 64 else bound.qualifying_data()
        return replace(mine.cpu(data, PLAIN), devices=old)

    def twice(_: Bench, exchange: Exchange) -> Evidence:
        own = mine.attest(exchange.binding, PLAIN)
        return replace(own, devices=(own.devices[0], *own.devices))

    def cpu_as_device(_: Bench, exchange: Exchange) -> Evidence:
        own = mine.attest(exchange.binding, PLAIN)
        return replace(own, devices=(replace(own, devices=()), *own.devices))

    yield Cell(
        f"{kind} GPU's report of an earlier exchange",
        whole(stale_gpu),
        Expected(rules=frozenset({"binding.report_data", "binding.devices.0"})),
    )
    yield Cell(f"{kind} devices put beside later", whole(late), Expected(rules=frozenset({"binding.report_data"})))
    yield Cell(
        f"{kind} devices of an earlier exchange that the CPU vouches for",
        whole(vouched_stale),
        Expected(rules=frozenset({"binding.devices.0", "binding.devices.1"})),
    )
    yield Cell(f"{kind} GPU twice", whole(twice), Expected(frozenset({"evidence.devices.1"})))
    yield Cell(f"{kind} a CPU as a device", whole(cpu_as_device), Expected(malformed="evidence.devices.0"))


# --- the log of events ------------------------------------------------------------------------------------------------

EVENTS_STEP: Final = {
    **dict.fromkeys(SNP, "sev-snp.8-events"),
    "tdx": "tdx.10-events",
    "sgx": "sgx.10-events",
    "nitro": "nitro.6-events",
    "cca": "cca.7-events",
    "tpm": "tpm.9-events",
    "azure-snp": "azure-snp.6-events",
    "azure-tdx": "azure-tdx.6-events",
}
VIRTUAL: Final = frozenset({*SNP, "sgx", "cca"})
"""Hardware without a register: report data is folded with the log."""
_HONEST: Final = event_log.event(WORKLOAD, PLAIN.encode())
_EVIL: Final = event_log.event(WORKLOAD, EVIL.encode())
_NOTE: Final = event_log.event("cloister/note/1", b"a note")
_ONE_WORKLOAD: Final = frozenset({"events.cloister/workload/1"})
MEASURED: Final[dict[str, tuple[tuple[Event, ...], frozenset[str]]]] = {
    "a note before": ((_NOTE, _HONEST), frozenset()),
    "a second workload": ((_HONEST, _EVIL), _ONE_WORKLOAD),
    "the same workload twice": ((_HONEST, _HONEST), _ONE_WORKLOAD),
    "a second workload under another name": ((_HONEST, replace(_EVIL, name=SECOND)), _ONE_WORKLOAD),
    "the workload under another name": ((replace(_HONEST, name=SECOND),), _ONE_WORKLOAD),
    "no workload": ((_NOTE,), _ONE_WORKLOAD),
    "no event": ((), _ONE_WORKLOAD),
    "other code": ((_EVIL,), frozenset({"phase.train.run"})),
    "no sandbox": (
        (event_log.event(WORKLOAD, replace(PLAIN, sandbox="none", profile=bytes(32)).encode()),),
        frozenset({"code.trainer.sandbox"}),
    ),
    "a weaker jail": (
        (event_log.event(WORKLOAD, replace(PLAIN, profile=b"\x0e" * 32).encode()),),
        frozenset({"workload.profile"}),
    ),
}
"""What the machine really measured."""
SHOWN: Final[dict[str, tuple[tuple[Event, ...], tuple[Event, ...], frozenset[str]]]] = {
    "other code, shown as ours": ((_EVIL,), (_HONEST,), frozenset()),
    "ours, shown as other code": ((_HONEST,), (_EVIL,), frozenset({"phase.train.run"})),
    "the log left out": ((_HONEST,), (), _ONE_WORKLOAD),
    "an event left out": ((_EVIL, _HONEST), (_HONEST,), frozenset()),
    "an event that was never measured": ((), (_HONEST,), frozenset()),
    "an event added": ((_HONEST,), (_NOTE, _HONEST), frozenset()),
    "another order": ((_NOTE, _HONEST), (_HONEST, _NOTE), frozenset()),
}
"""What it measured, what the evidence shows instead, and what the log that is shown breaks besides."""
CHANGED: Final[dict[str, Callable[[Event], Event]]] = {
    "data of an event changed": lambda each: replace(each, data=EVIL.encode()),
    "digest of an event changed": lambda each: replace(each, digest=_EVIL.digest),
    "an event of another register": lambda each: replace(each, register=2),
}


def log_cells(kind: str) -> Iterator[Cell]:
    machine = Machine(kind, root="named" if kind == "tpm" else "soft")
    place = machine.place()
    step = EVENTS_STEP[kind]
    for name, (measured, rules) in MEASURED.items():
        act = attempt(machine, place, change=_logged(machine, measured, measured))
        yield Cell(f"{kind} measured {name}", act, Expected(rules=rules))
    for name, (measured, shown, also) in SHOWN.items():
        act = attempt(machine, place, change=_logged(machine, measured, shown))
        if kind in VIRTUAL:
            yield Cell(f"{kind} {name}", act, Expected(rules=also | {"binding.report_data"}))
        else:
            yield Cell(f"{kind} {name}", act, Expected(frozenset({step, f"{step}.replay", f"{step}.register"})))
    for name, changed in CHANGED.items():
        act = attempt(machine, place, change=_logged(machine, (_HONEST,), (changed(_HONEST),)))
        wheres = {step, f"{step}.replay", f"{step}.0.data", f"{step}.0.register"}
        yield Cell(f"{kind} {name}", act, Expected(frozenset(wheres)))


def _logged(
    machine: Machine, measured: tuple[Event, ...], shown: tuple[Event, ...]
) -> Callable[[Bench, Exchange], Evidence]:
    return lambda _, exchange: replace(machine.attest(exchange.binding, events=measured), events=shown)


# --- what a place demands ---------------------------------------------------------------------------------------------


def claims_of(machine: Machine) -> Claims:
    from cloister.testkit.softtee import binding

    trusted = machine.trusted()
    return verify(machine.attest(binding(), PLAIN), trusted.endorsements, trusted.roots, now=NOW)


def place_cells(kind: str) -> Iterator[Cell]:
    """Each rule of a place: the machine that keeps it gets its keys, the one that breaks it gets nothing."""
    machine = Machine(kind, root="named" if kind == "tpm" else "soft")
    other = replace(machine, name="b")
    mine, theirs = claims_of(machine), claims_of(other)
    own = [each for each in identities(mine) if each not in identities(theirs)]
    foreign = [each for each in identities(theirs) if each not in identities(mine)]
    assert own
    assert foreign

    def cell(name: str, more: str, *rules: str, by: Machine = machine, **place: Any) -> Cell:
        text = machine.place(more, **place)
        return Cell(f"{kind} {name}", attempt(by, text), Expected(rules=frozenset(f"place.enclave.{r}" for r in rules)))

    for mark in own:
        yield cell(f"{mark} allowed", f'platforms = {{ allow = ["{mark}"] }}')
        yield cell(f"{mark} denied", f'platforms = {{ deny = ["{mark}"] }}', "platforms.deny")
        yield cell(f"cuckoo at {mark}", f'platforms = {{ allow = ["{mark}"] }}', "platforms.allow", by=other)
    for mark in foreign:
        yield cell(f"{mark} denied, which is another", f'platforms = {{ deny = ["{mark}"] }}')
    evil = replace(machine, measurement=b"\x0e" * 48)
    launched = Expected(rules=frozenset({f"node.{mine.launch}"} | ({"place.enclave.boot"} if kind == "tpm" else set())))
    yield Cell(f"{kind} other software", attempt(evil, machine.place()), launched)
    if kind == "tpm":
        yield Cell(
            "tpm at a tee place",
            attempt(machine, 'kind = "tee", accept = ["tdx"]'),
            Expected(rules=frozenset({"place.enclave.kind", "place.enclave.accept"})),
        )
        return
    tee = machine.evidence_kind
    host = f'kind = "attested-host", boot = ["sha256:{"0e" * 32}"]'
    wanted = frozenset({"place.enclave.kind", "place.enclave.boot"})
    yield Cell(f"{kind} at a host's place", attempt(machine, host), Expected(rules=wanted))
    for name, found in sorted(mine.svns.items()):
        floor = "min_svn = {{ {} = {{ {} = {} }} }}"
        yield cell(f"{name} at the floor", floor.format(tee, name, found))
        yield cell(f"{name} below the floor", floor.format(tee, name, found + 1), f"min_svn.{name}")
    yield cell("a number that it has not", f"min_svn = {{ {tee} = {{ nothing = 0 }} }}", "min_svn.nothing")
    for name, on in sorted(mine.attributes.items()):
        rule = "require = {{ {} = {{ {} = {} }} }}"
        yield cell(f"{name} as it is", rule.format(tee, name, str(on).lower()))
        yield cell(f"{name} the other way", rule.format(tee, name, str(not on).lower()), f"require.{name}")
    yield cell("a switch that it has not", f"require = {{ {tee} = {{ nothing = true }} }}", "require.nothing")
    build = 'software = [{{ label = "ours", measurements = {{ {} = ["{}"] }} }}]'
    yield cell("our build", build.format(mine.launch, machine.launch.hex()))
    size = len(machine.launch)
    yield cell("another build", build.format(mine.launch, "0e" * size), f"software.ours.{mine.launch}")
    rated = kind in (*DCAP, "azure-tdx")
    yield cell("firmware of last year", 'min_tcb = "2025-01"', *(() if rated else ("min_tcb",)))
    yield cell("firmware of next year", 'min_tcb = "2027-01"', "min_tcb")
    yield cell("firmware of a year", 'max_tcb_age = "365d"', *(() if rated else ("max_tcb_age",)))
    yield cell("rated hardware only", 'tcb = ["UpToDate"]', *(() if rated else ("tcb_status",)))
    yield cell("unrated hardware only", 'tcb = ["NotRated"]', *(("tcb_status",) if rated else ()))
    if rated:
        hardened = replace(machine, firmware="SWHardeningNeeded")
        advisory = 'deny_advisories = ["SOFT-SA-00016"]'
        yield cell("an advisory of another machine", advisory)
        yield cell("an advisory", advisory, "deny_advisories", by=hardened)
        yield cell("hardening not accepted", 'tcb = ["UpToDate"]', "tcb_status", by=hardened)
    yield cell("a GPU wanted, none here", "", "gpu", gpu=True)
    for gpu, rules in ((GPU_A, ()), (GPU_B, ("gpu0.gpus.allow",))):
        with_gpu = replace(machine, devices=(gpu,))
        mark = claims_of(replace(machine, devices=(GPU_A,))).devices[0].platform["ueid"]
        yield cell(f"its GPU is {gpu.name}", f'gpus = {{ allow = ["ueid:{mark}"] }}', *rules, by=with_gpu, gpu=True)
        denied = ("gpu0.platforms.deny",) if gpu is GPU_A else ()
        yield cell(
            f"denied GPU, {gpu.name}", f'platforms = {{ deny = ["ueid:{mark}"] }}', *denied, by=with_gpu, gpu=True
        )


# --- the run ----------------------------------------------------------------------------------------------------------

GROUPS: Final[dict[str, Callable[[], Iterator[Cell]]]] = {
    **{f"machine {kind} {root}": partial(machine_cells, kind, root) for kind in KINDS for root in ROOTS},
    **{f"exchange {kind} {named}": partial(exchange_cells, kind, named) for kind in CPUS for named in DEVICES},
    "exchange tpm alone": partial(exchange_cells, "tpm", "alone"),
    **{f"gpu {kind} {root}": partial(gpu_cells, kind, root) for kind in CPUS for root in GPU_ROOTS},
    **{f"mix {kind}": partial(mix_cells, kind) for kind in CPUS},
    **{f"log {kind}": partial(log_cells, kind) for kind in KINDS},
    **{f"place {kind}": partial(place_cells, kind) for kind in KINDS},
}


@pytest.fixture(scope="module")
def broker() -> Iterator[Bench]:
    with bench() as made:
        yield made


@pytest.mark.parametrize("group", GROUPS)
def test_matrix(broker: Bench, group: str) -> None:
    wrong = [
        f"{cell.name}: {difference}"
        for cell in GROUPS[group]()
        if (difference := cell.expected.differs(cell.act(broker)))
    ]
    assert wrong == []


def test_the_matrix_is_whole() -> None:
    """No table lost a row: every kind has its cells, each once, and most of them are refusals."""
    cells = [cell for group in GROUPS.values() for cell in group()]
    assert len({cell.name for cell in cells}) == len(cells)
    for kind in KINDS:
        assert any(cell.name.startswith(f"{kind} ") and not cell.expected.code for cell in cells)
    granted = sum(not cell.expected.code for cell in cells)
    assert len(cells) > 5000
    assert 100 < granted < len(cells) / 4
