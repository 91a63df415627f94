"""A broker's keeper in this process, and soft machines of every kind with every fault: what the matrix and the attacks are made of.

    with bench() as broker:
        machine = Machine("tdx")
        exchange = broker.ask(machine.place())                 # a nonce, and what evidence has to be bound to
        outcome = broker.send(exchange, machine.attest(exchange.binding, WORKLOAD), trusted=machine.trusted())

`send` looks after every answer whether the broker kept what it says: a refusal leaves one denial in the log, seals nothing
and begins no lease; a release is one entry, and its keys are the owners'.

The time is `softtee.NOW`. Nothing here protects anything: every key is derived from a published label.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import Encoding

from cloister.attestation import events as event_log
from cloister.attestation.azure import vtpm as azure_vtpm
from cloister.attestation.binding import Binding
from cloister.attestation.edge.attester import DeviceAttester, SoftTdxAttester, attest
from cloister.attestation.edge.soft import SoftAzureAttester
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.events import WORKLOAD, Workload
from cloister.attestation.evidence import encode as encode_evidence
from cloister.attestation.logs import ima
from cloister.attestation.roots import Roots
from cloister.attestation.snp.format import Tcb
from cloister.attestation.soft import azure as soft_azure
from cloister.attestation.soft import cca as soft_cca
from cloister.attestation.soft import intel as soft_intel
from cloister.attestation.soft import nitro as soft_nitro
from cloister.attestation.soft import nvidia as soft_nvidia
from cloister.attestation.soft import sgx as soft_sgx
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.soft import tpm as soft_tpm
from cloister.attestation.types import Event, Evidence
from cloister.broker import keeper as keeper_module
from cloister.broker import wire
from cloister.broker.decide import Trusted
from cloister.broker.keeper import Keeper
from cloister.broker.log import leaf as leaves
from cloister.broker.store.ledger import Ledger
from cloister.confine.profile import profile
from cloister.crypto import hpke
from cloister.crypto.keys import Secret, digest
from cloister.errors import CloisterError
from cloister.testkit.softtee import MEASUREMENT, NOW
from tests.broker.world import BACKBONE, TRAINER, VOLUME_ID, XRAYS, World

PLAIN: Final = Workload(TRAINER, "offline", profile("offline").digest(), "L1")
DAY: Final = timedelta(days=1)
ENDS: Final = timedelta(minutes=4)
"""When the window `ending` ends: before a lease would."""
NAMED: Final = "cloister matrix hardware root: named by the operator"
FOREIGN: Final = "cloister matrix foreign root: nobody pins it"
LABELS: Final = {"named": NAMED, "foreign": FOREIGN}
"""Roots of `Machine.root` besides `soft`, the published test root. Under `named` a machine counts as hardware."""


# --- the broker -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request that a node prepares: what it asks, with which nonce and key, and what its evidence must be bound to."""

    ask: wire.ReleaseAsk
    nonce: bytes
    pair: hpke.KeyPair
    binding: Binding

    def renewed(self, **changed: Any) -> Exchange:
        """Return the same with another binding: what a node was told that somebody misled."""
        return replace(self, binding=replace(self.binding, **changed))


@dataclass(frozen=True, slots=True)
class Refused:
    """The broker's no: what the asker got. Nothing else left."""

    error: CloisterError
    entry: leaves.Denial

    @property
    def code(self) -> str:
        return self.error.code

    @property
    def wheres(self) -> list[str]:
        return [reason.where for reason in self.error.reasons]


@dataclass(frozen=True, slots=True)
class Released:
    """The broker's yes: the keys, opened."""

    payload: wire.ReleasePayload
    entry: leaves.Release
    exchange: Exchange


Outcome = Refused | Released


class Bench:
    """A keeper over an own ledger. `now` is its clock; `trusted` is what it believes at the moment."""

    def __init__(self, folder: Path) -> None:
        self.now = NOW
        self.trusted = Trusted(Roots(), Endorsements(), frozenset())
        self.seals = 0
        self.world = World()
        self.spki = b"\x05" * 32
        self._keys = hpke.KeyPair.generate()
        self._pair = hpke.KeyPair.generate()
        self._contracts: dict[str, str] = {}
        self.ledger = Ledger.open(folder, Secret.random(), origin="test.example/matrix")
        self.ledger.begin_epoch(now=self.now).result()
        config = wire.BrokerConfig(
            version=1,
            origin=self.ledger.origin,
            log_key=str(self.ledger.log_key),
            node_measurements=(),
            roots=(),
            allow_soft=True,
            lease_s=600,
            kbs=False,
        )
        self.keeper = Keeper(
            ledger=self.ledger,
            keypair=self._keys,
            outputs=Secret.random(),
            spki=self.spki,
            config=config,
            attester=SoftTdxAttester(MEASUREMENT),
            trusted=lambda now: self.trusted,
            clock=lambda: self.now,
        )
        self._runner = asyncio.Runner()
        for volume, key, owner in (
            (XRAYS, self.world.xrays_key, self.world.hospital),
            (BACKBONE, self.world.backbone_key, self.world.vendor),
        ):
            sealed = hpke.seal(key.reveal(), to=self._keys.public, info=wire.key_info(volume, VOLUME_ID))
            statement = wire.KeyStatement(volume, VOLUME_ID, 1, wire.sha256(sealed), wire.sha256(self._keys.public))
            self.run(
                self.keeper.deposit(
                    wire.KeyDeposit(statement, sealed, owner.sign(statement.encode(), namespace="key@cloister"))
                )
            )

    def run(self, act: Any) -> Any:
        return self._runner.run(act)

    def close(self) -> None:
        self._runner.close()
        self.ledger.close()

    def contract(self, place: str) -> str:
        """Return the id of an active contract whose `place.enclave` is `place`; one for each text."""
        if place not in self._contracts:
            text = self.world.contract(name=f"matrix-{len(self._contracts)}").decode()
            tee = 'enclave = { kind = "tee", accept = ["simulated"] }'
            assert text.count(tee) == 1
            data = text.replace(tee, f"enclave = {{ {place} }}").encode()
            status = self.run(self.keeper.submit(wire.ContractSubmit("matrix.toml", data)))
            for party in (self.world.hospital, self.world.vendor):
                signature = party.sign(data, namespace="contract@cloister")
                status = self.run(self.keeper.sign(wire.SignatureSubmit(status.contract, signature)))
            assert status.state == "active"
            self._contracts[place] = status.contract
        return self._contracts[place]

    def nonce(self) -> bytes:
        return self.keeper.nonce().nonce

    def ask(self, place: str, *, nonce: bytes | None = None) -> Exchange:
        """Return an exchange about the train phase of the contract of `place`, with a fresh nonce unless given."""
        contract = self.contract(place)
        ask = wire.ReleaseAsk(contract, "train", ("backbone", "xrays"), ("detector",))
        fresh = self.nonce() if nonce is None else nonce
        binding = Binding("release", fresh, self._pair.public, self.spki, contract, "train", ask.hashed())
        return Exchange(ask, fresh, self._pair, binding)

    def send(
        self, exchange: Exchange, evidence: Evidence | bytes, *, trusted: Trusted | None = None, **sent: Any
    ) -> Outcome:
        """Send the release and look at everything that may have left; `sent` replaces members of the request."""
        self.trusted = self.trusted if trusted is None else trusted
        data = evidence if isinstance(evidence, bytes) else encode_evidence(evidence)
        request = replace(wire.ReleaseRequest(exchange.ask, exchange.nonce, exchange.pair.public, data), **sent)
        request = wire.ReleaseRequest.decode(request.encode())  # what the network would carry
        before = self._state()
        try:
            reply = self.run(self.keeper.release(request))
        except CloisterError as error:
            return Refused(error, self._kept(before, error, request.evidence, "release"))
        after = self._state()
        assert tuple(new - old for old, new in zip(before, after, strict=True)) == (1, 1, 1, 1)
        entry = self.ledger.leaf(before[0])
        assert isinstance(entry, leaves.Release)
        assert entry.evidence == digest(request.evidence)
        sealed_for = wire.RELEASE_INFO + self._binding(request).encode()
        payload = wire.ReleasePayload.decode(exchange.pair.open(reply.sealed, info=sealed_for))
        assert payload.keys["xrays"].key == self.world.xrays_key
        assert payload.keys["backbone"].key == self.world.backbone_key
        return Released(payload, entry, exchange)

    def renew(self, released: Released, evidence: Evidence, nonce: bytes) -> Refused | wire.RenewReply:
        """Send a renewal of the lease that `released` began."""
        data = encode_evidence(evidence)
        request = wire.RenewRequest(
            wire.RenewAsk(released.payload.lease.id), nonce, released.exchange.pair.public, data
        )
        before = self._state()
        try:
            reply = self.run(self.keeper.renew(request))
        except CloisterError as error:
            return Refused(error, self._kept(before, error, data, "renew"))
        assert isinstance(reply, wire.RenewReply)
        return reply

    def renewal(self, released: Released) -> Binding:
        """Return what evidence for a renewal is to be bound to, with a fresh nonce."""
        ask = wire.RenewAsk(released.payload.lease.id)
        return replace(released.exchange.binding, purpose="renew", nonce=self.nonce(), request=ask.hashed())

    def _binding(self, request: wire.ReleaseRequest) -> Binding:
        ask = request.ask
        return Binding("release", request.nonce, request.key, self.spki, ask.contract, ask.phase, ask.hashed())

    def _state(self) -> tuple[int, int, int, int]:
        """Everything that a key could leave by: entries, leases, leases in memory, sealed answers."""
        return self.ledger.size, len(self.ledger.leases()), len(self.keeper._held), self.seals

    def _kept(
        self, before: tuple[int, int, int, int], error: CloisterError, evidence: bytes, operation: str
    ) -> leaves.Denial:
        """No key left: one denial that says why, no lease, nothing sealed."""
        size, *rest = self._state()
        assert (size, *rest) == (before[0] + 1, *before[1:])
        entry = self.ledger.leaf(before[0])
        assert isinstance(entry, leaves.Denial)
        assert (entry.operation, entry.error, entry.evidence) == (operation, error.code, digest(evidence))
        assert [reason.where for reason in entry.reasons] == [
            reason.where for reason in error.reasons[: len(entry.reasons)]
        ]
        assert entry.reasons
        assert entry.id in error.hint
        return entry


MEMORY: Final = Path("/dev/shm")  # where it exists: thousands of refusals wait for a disk otherwise


@contextmanager
def bench() -> Iterator[Bench]:
    """Yield a bench whose sealed answers are counted."""
    real = keeper_module._seal
    with TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        yield from _bench(Path(folder) / "ledger", real)


def _bench(folder: Path, real: Callable[..., bytes]) -> Iterator[Bench]:
    broker = Bench(folder)

    def counted(payload: bytes, *, to: bytes, info: bytes) -> bytes:
        broker.seals += 1
        return real(payload, to=to, info=info)

    keeper_module._seal = counted
    try:
        yield broker
    finally:
        keeper_module._seal = real
        broker.close()


# --- machines ---------------------------------------------------------------------------------------------------------

Make = Callable[[bytes, tuple[Event, ...]], Evidence]


@dataclass(frozen=True, slots=True)
class _Played:
    """An attester whose CPU evidence is made by a function of (what is bound, events)."""

    name: str
    report_data_bytes: int
    devices: tuple[DeviceAttester, ...]
    make: Make
    events: tuple[Event, ...] = ()

    def extend(self, name: str, data: bytes) -> None:
        raise NotImplementedError

    def evidence(self, report_data: bytes) -> Evidence:
        return self.make(report_data, self.events)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A soft GPU. `window`: valid, expired, future, missing (no OCSP answers), unsigned (no manifests)."""

    name: str = "one"
    root: str = "soft"
    debug: bool = False
    revoked: bool = False
    window: str = "valid"
    drift: bool = False
    """A golden measurement has another value."""

    name_of_kind = "soft-nvidia-gpu"

    @property
    def label(self) -> str:
        return LABELS.get(self.root, soft_nvidia.LABEL)

    @property
    def device(self) -> soft_nvidia.Gpu:
        # of these only a Blackwell's certificate says that it is open
        return soft_nvidia.gpu(
            self.name,
            arch="BLACKWELL" if self.debug else "HOPPER",
            debug=self.debug,
            label=self.label,
        )

    def evidence(self, qualifying_data: bytes) -> Evidence:
        drift = {21: b"\x0e" * 48} if self.drift else {}
        return soft_nvidia.evidence(
            self.device, qualifying_data, quote=soft_nvidia.report(self.device, qualifying_data, drift=drift)
        )

    def endorsements(self) -> Endorsements:
        return _gpu_endorsements(self)

    def pins(self) -> dict[str, str]:
        vendor = soft_nvidia.authority(self.label)
        return {"nvidia-gpu": _pin(vendor.root.certificate), "nvidia-rim": _pin(vendor.rim_root.certificate)}


@dataclass(frozen=True, slots=True)
class Tpm:
    """A soft TPM beside a CPU."""

    name: str = "own"
    root: str = "soft"

    name_of_kind = "soft-tpm"

    @property
    def label(self) -> str:
        return LABELS.get(self.root, soft_tpm.LABEL)

    def evidence(self, qualifying_data: bytes) -> Evidence:
        return soft_tpm.evidence(soft_tpm.machine(self.name, label=self.label), report_data=qualifying_data)

    def endorsements(self) -> Endorsements:
        return Endorsements(soft_tpm.endorsements(NOW - DAY, label=self.label))

    def pins(self) -> dict[str, str]:
        return {"tpm": _pin(soft_tpm.authority(self.label).root)}


@dataclass(frozen=True, slots=True)
class _Device:
    """`Gpu` and `Tpm` as `attest` wants them."""

    device: Gpu | Tpm

    @property
    def name(self) -> str:
        return self.device.name_of_kind

    def evidence(self, qualifying_data: bytes) -> Evidence:
        return self.device.evidence(qualifying_data)


DCAP: Final = ("tdx", "sgx")
SNP: Final = ("sev-snp-vcek", "sev-snp-vlek", "sev-snp-turin")
CPUS: Final = (*DCAP, *SNP, "nitro", "cca", "azure-snp", "azure-tdx")
KINDS: Final = (*CPUS, "tpm")
"""What the matrix calls its kinds; `kind` of their evidence is `EVIDENCE`."""
EVIDENCE: Final = {name: "sev-snp" if name in SNP else name for name in KINDS}

FIRMWARE: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys((*DCAP, "azure-tdx"), soft_tdx.STATUSES),
    **dict.fromkeys((*SNP, "azure-snp"), ("new", "old")),
    **dict.fromkeys(("nitro", "tpm"), ("new",)),
    "cca": ("new", "decommissioned"),
}
"""States of a machine's firmware: Intel's statuses, new or old where the vendor has none, an unsafe life cycle."""
_AMD: Final = ("valid", "expired", "future", "missing", "leaf-expired", "leaf-future", "no-chain")
WINDOWS: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys((*DCAP, "azure-tdx"), ("valid", "expired", "future", "missing", "others")),
    **dict.fromkeys((*SNP, "azure-snp"), _AMD),
    "nitro": ("valid", "expired", "future", "leaf-expired", "leaf-future", "made-later"),
    "cca": ("valid", "missing"),
    "tpm": ("valid", "expired", "future", "leaf-expired", "leaf-future", "unknown"),
}
"""States of collateral and certificates: what is expired, of the future, missing, or another machine's."""
REVOCABLE: Final = frozenset({*DCAP, *SNP, "nitro", "azure-snp", "azure-tdx", "tpm"})
DEBUGGABLE: Final = frozenset(CPUS)
OLD_SNP: Final = Tcb(bootloader=4, tee=0, snp=20, microcode=200)
OLD_TURIN: Final = Tcb(bootloader=1, tee=1, snp=3, microcode=70, fmc=1)


@dataclass(frozen=True, slots=True)
class Machine:
    """A soft machine of `kind` with what is wrong with it; `name` says which one it is."""

    kind: str
    name: str = "a"
    root: str = "soft"
    firmware: str = ""
    """One of `FIRMWARE`; empty is the first."""
    debug: bool = False
    revoked: bool = False
    window: str = "valid"
    devices: tuple[Gpu | Tpm, ...] = ()
    measurement: bytes = MEASUREMENT
    reset_count: int = 1
    """Of a TPM."""

    @property
    def evidence_kind(self) -> str:
        return EVIDENCE[self.kind]

    @property
    def label(self) -> Mapping[str, str]:
        return {} if self.root == "soft" else {"label": LABELS[self.root]}

    @property
    def launch(self) -> bytes:
        """The launch measurement that a verifier finds."""
        match self.kind:
            case "sgx":
                return self.measurement[:32]
            case "nitro" if self.debug:
                return bytes(48)
            case "azure-snp" | "azure-tdx":
                kind: Any = self.kind
                return SoftAzureAttester(self.measurement, kind=kind).launch
            case "tpm":
                pcrs = _host(self.measurement).pcrs(())
                boot = ima.boot_aggregate(pcrs[index] for index in range(10))
                return boot if self.kind == "tpm" else azure_vtpm.launch(soft_azure.PARAVISOR, boot)
        return self.measurement

    @property
    def report_bytes(self) -> int:
        """How much this hardware signs for us."""
        return 32 if self.kind in ("tpm", "azure-snp", "azure-tdx") else 64

    def place(self, more: str = "", *, accept: str = "simulated", gpu: bool | None = None) -> str:
        """Return the text of a place for this kind that accepts `accept`; `more` is further keys of it."""
        more = f", {more}" if more else ""
        if self.kind == "tpm":
            return (
                f'kind = "attested-host", boot = ["sha256:{replace(self, measurement=MEASUREMENT).launch.hex()}"]{more}'
            )
        wanted = any(isinstance(each, Gpu) for each in self.devices) if gpu is None else gpu
        return f'kind = "tee", accept = ["{accept}"]{more}' + (', gpu = "confidential"' if wanted else "")

    def attest(self, binding: Binding, *workloads: Workload, events: tuple[Event, ...] | None = None) -> Evidence:
        """Return evidence of the whole machine over `binding`, with `events`, or one event for each workload."""
        if events is None:
            events = tuple(event_log.event(WORKLOAD, each.encode()) for each in workloads)
        devices = tuple(_Device(each) for each in self.devices)
        return attest(_Played(f"soft-{self.evidence_kind}", self.report_bytes, devices, self._make(), events), binding)

    def cpu(self, report_data: bytes, *workloads: Workload) -> Evidence:
        """Return evidence of the CPU alone over whatever somebody wants it to sign."""
        return self._make()(report_data, tuple(event_log.event(WORKLOAD, each.encode()) for each in workloads))

    def endorsements(self) -> Endorsements:
        """Return what the relying party has about this machine."""
        # of all that, only these matter to what vendors say
        window = "valid" if self.window.startswith("leaf") and self.kind != "tpm" else self.window
        known = Machine(self.kind, self.name, root=self.root, revoked=self.revoked, window=window)
        found = _endorsements(known)
        for each in self.devices:
            found = found | each.endorsements()
        return found

    def pins(self) -> dict[str, str]:
        """Return kind of evidence -> SHA-256 of the root that this machine and its devices end at."""
        found = _pins(self.kind, self.root)
        for each in self.devices:
            found = found | each.pins()
        return found

    def trusted(self, *, soft: bool = True, software: frozenset[bytes] | None = None) -> Trusted:
        """Return what a broker believes that takes this machine's software and, under `named`, its root."""
        named = [self] if self.root == "named" else []
        also = {kind: frozenset({pin}) for each in named for kind, pin in _pins(each.kind, "named").items()}
        for device in self.devices:
            if device.root == "named":
                also |= {kind: frozenset({pin}) for kind, pin in device.pins().items()}
        own = frozenset({replace(self, measurement=MEASUREMENT, debug=False).launch})
        return Trusted(Roots(soft=soft, also=also), self.endorsements(), own if software is None else software)

    def _make(self) -> Make:
        return _maker(replace(self, devices=()))


@lru_cache(maxsize=8)
def _host(kernel: bytes) -> soft_tpm.Host:
    return soft_tpm.host(kernel=kernel)


def _snp_machine(machine: Machine) -> soft_snp.Machine:
    options: dict[str, Any] = dict(machine.label)
    turin = machine.kind == "sev-snp-turin"
    if machine.firmware == "old":
        options["tcb"] = OLD_TURIN if turin else OLD_SNP
    if machine.window == "leaf-expired":
        options["not_after"] = NOW - timedelta(seconds=1)
    if machine.window == "leaf-future":
        options["not_before"] = NOW + timedelta(seconds=1)
    if machine.kind == "sev-snp-vlek":
        options["csp_id"] = f"CN={machine.name}.soft.cloister.invalid"
    signer: Any = "vlek" if machine.kind == "sev-snp-vlek" else "vcek"
    return soft_snp.machine(machine.name, line="Turin" if turin else "Milan", signer=signer, **options)


def _dcap_machine(machine: Machine, tee: str) -> soft_intel.Platform:
    return soft_intel.machine(tee, machine.name, status=machine.firmware or "UpToDate", **machine.label)


def _tpm_machine(machine: Machine) -> soft_tpm.Machine:
    options: dict[str, Any] = dict(machine.label)
    if machine.window == "leaf-expired":
        options["not_after"] = NOW - timedelta(seconds=1)
    if machine.window == "leaf-future":
        options["not_before"] = NOW + timedelta(seconds=1)
    return soft_tpm.machine(machine.name, certified=machine.window != "unknown", **options)


@lru_cache(maxsize=4096)
def _maker(machine: Machine) -> Make:
    """Return what makes CPU evidence of `machine`."""
    measurement, debug = machine.measurement, machine.debug
    match machine.kind:
        case "tdx":
            intel = _dcap_machine(machine, "tdx")

            def tdx(data: bytes, events: tuple[Event, ...]) -> Evidence:
                register = event_log.replay(events)
                quote = soft_tdx.quote(intel, mrtd=measurement, rtmr3=register, report_data=data, debug=debug)
                return Evidence("tdx", quote, events)

            return tdx
        case "sgx":
            intel = _dcap_machine(machine, "sgx")

            def sgx(data: bytes, events: tuple[Event, ...]) -> Evidence:
                signed = event_log.fold(data, events)
                quote = soft_sgx.quote(intel, mrenclave=measurement[:32], report_data=signed, debug=debug)
                return Evidence("sgx", quote, events)

            return sgx
        case "sev-snp-vcek" | "sev-snp-vlek" | "sev-snp-turin":
            amd = _snp_machine(machine)

            def snp(data: bytes, events: tuple[Event, ...]) -> Evidence:
                return soft_snp.evidence(amd, report_data=data, measurement=measurement, events=events, debug=debug)

            return snp
        case "nitro":
            # AWS's leaves live three hours
            issued = {
                "leaf-expired": NOW - timedelta(hours=4),
                "leaf-future": NOW + timedelta(minutes=10),
                "ending": NOW + ENDS - soft_nitro.LEAF_LIFETIME,
            }
            made = NOW + timedelta(minutes=5) if machine.window == "made-later" else NOW
            start = issued.get(machine.window, NOW - timedelta(hours=1))
            enclave = soft_nitro.enclave(machine.name, issued=start, **machine.label)

            def nitro(data: bytes, events: tuple[Event, ...]) -> Evidence:
                runtime = event_log.replay(events) if events else None
                document = soft_nitro.document(
                    enclave, pcr0=measurement, made=made, user_data=data, runtime=runtime, debug=debug
                )
                return Evidence("nitro", document, events)

            return nitro
        case "cca":
            realm = soft_cca.platform(machine.name, **machine.label)
            life = 0x6000 if machine.firmware == "decommissioned" else 0x4000 if debug else soft_cca.SECURED

            def cca(data: bytes, events: tuple[Event, ...]) -> Evidence:
                signed = event_log.fold(data, events)
                return Evidence("cca", soft_cca.token(realm, rim=measurement, challenge=signed, lifecycle=life), events)

            return cca
        case "azure-snp" | "azure-tdx":
            host, vtpm = _host(measurement), soft_azure.vtpm(machine.name)
            report = {"debug": debug}
            make: Callable[..., Evidence]
            if machine.kind == "azure-snp":
                make = partial(soft_azure.snp_evidence, _snp_machine(machine))
            else:
                make = partial(soft_azure.tdx_evidence, _dcap_machine(machine, "tdx"))

            def azure(data: bytes, events: tuple[Event, ...]) -> Evidence:
                return make(report_data=data, host=host, events=events, tpm=vtpm, report=report)

            return azure
        case "tpm":
            ak, host = _tpm_machine(machine), _host(measurement)

            def tpm(data: bytes, events: tuple[Event, ...]) -> Evidence:
                return soft_tpm.evidence(
                    ak, report_data=data, host=host, events=events, reset_count=machine.reset_count
                )

            return tpm
    raise ValueError(machine.kind)


def _window(machine: Machine) -> dict[str, Any]:
    """Return when a piece of collateral was issued, and for how long."""
    life = timedelta(days=30)
    start = {
        "expired": NOW - life - timedelta(seconds=1),
        "future": NOW + timedelta(seconds=1),
        "ending": NOW + ENDS - life,
    }
    return {"issued": start.get(machine.window, NOW - DAY), "lifetime": life}


@lru_cache(maxsize=1024)
def _endorsements(machine: Machine) -> Endorsements:
    options: dict[str, Any] = {**_window(machine), **machine.label}
    match machine.kind:
        case "tdx" | "sgx" | "azure-tdx":
            tee: Any = "sgx" if machine.kind == "sgx" else "tdx"
            if machine.window == "missing":
                return Endorsements()
            intel, soft = _dcap_machine(machine, tee), soft_sgx if tee == "sgx" else soft_tdx
            if machine.window == "others":
                options["fmspc"] = "50F7AAAAAAAA"
            document = soft.collateral(revoked=(intel.serial,) if machine.revoked else (), **options)
            return Endorsements((Endorsement(tee, intel.fmspc, document),))
        case "sev-snp-vcek" | "sev-snp-vlek" | "sev-snp-turin" | "azure-snp":
            middle = "asvk" if machine.kind == "sev-snp-vlek" else "ask"
            line: Any = "Turin" if machine.kind == "sev-snp-turin" else "Milan"
            found = soft_snp.endorsements(revoked=(middle,) if machine.revoked else (), lines=(line,), **options)
            left_out = {"missing": "/crl/", "no-chain": "/v"}.get(machine.window)
            return Endorsements(tuple(each for each in found if left_out is None or left_out not in each.subject))
        case "nitro":
            leaf = soft_nitro.enclave(machine.name, issued=NOW - timedelta(hours=1), **machine.label)
            return soft_nitro.endorsements(revoked=(leaf.serial,) if machine.revoked else (), **options)
        case "cca":
            if machine.window == "missing":
                return Endorsements()
            return soft_cca.endorsements(NOW - DAY, name=machine.name, **machine.label)
        case "tpm":
            serial = _tpm_machine(machine).serial
            return Endorsements(soft_tpm.endorsements(revoked=(serial,) if machine.revoked else (), **options))
    raise ValueError(machine.kind)


@lru_cache(maxsize=256)
def _gpu_endorsements(gpu: Gpu) -> Endorsements:
    life, second = soft_nvidia.LIFETIME, timedelta(seconds=1)
    start = {"expired": NOW - life - second, "future": NOW + second, "ending": NOW + ENDS - life}
    issued = start.get(gpu.window, NOW - timedelta(hours=1))
    serial = gpu.device.device.certificate.serial_number
    found = soft_nvidia.endorsements(
        issued, (gpu.device,), lifetime=life, revoked=(serial,) if gpu.revoked else (), label=gpu.label
    )
    left_out = {"missing": "ocsp/", "unsigned": "NV_"}.get(gpu.window)
    return Endorsements(
        tuple(each for each in found.items if left_out is None or not each.subject.startswith(left_out))
    )


def _pins(kind: str, root: str) -> dict[str, str]:
    label = {} if root == "soft" else {"label": LABELS[root]}
    match kind:
        case "tdx" | "sgx":
            return {kind: _pin(soft_intel.authority(**label).root)}
        case "azure-tdx":
            return {"tdx": _pin(soft_intel.authority(**label).root)}
        case "sev-snp-vcek" | "sev-snp-vlek" | "sev-snp-turin" | "azure-snp":
            line: Any = "Turin" if kind == "sev-snp-turin" else "Milan"
            return {"sev-snp": hashlib.sha256(soft_snp.authority(line, **label).ark).hexdigest()}
        case "nitro":
            return {"nitro": _pin(soft_nitro.authority(NOW, **label).root)}
        case "cca":
            return {"cca": hashlib.sha256(soft_cca.platform("a", **label).spki()).hexdigest()}
        case "tpm":
            return {"tpm": _pin(soft_tpm.authority(**label).root)}
    raise ValueError(kind)


def _pin(certificate: Any) -> str:
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
