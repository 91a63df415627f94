"""Parties, a contract and nodes for tests of the broker: the pneumonia example of docs/contract.md, small."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.attestation.edge.attester import SoftTdxAttester
from cloister.attestation.events import WORKLOAD, Workload
from cloister.broker import wire
from cloister.broker.client import BrokerClient, Release, own_measurement
from cloister.confine.profile import profile
from cloister.contract.edge import Signer
from cloister.crypto.keys import Secret, digest

TRAINER = digest(b"trainer")
SERVER = digest(b"server")
XRAYS = digest(b"xrays")
BACKBONE = digest(b"backbone")
VOLUME_ID = b"\x07" * 16


def detector(contract: str) -> str:
    """Digest of the volume that `World.trained` registers: no two contracts have the same one."""
    return digest(b"detector 1 of " + contract.encode())


def signer() -> Signer:
    return Signer(Ed25519PrivateKey.generate())


@dataclass
class World:
    """Three parties and what they know. `extra` is appended to the contract file, `leaves` to its train phase."""

    hospital: Signer = field(default_factory=signer)
    vendor: Signer = field(default_factory=signer)
    clinic: Signer = field(default_factory=signer)
    xrays_key: Secret = field(default_factory=Secret.random)
    backbone_key: Secret = field(default_factory=Secret.random)

    def contract(
        self,
        *,
        name: str = "pneumonia-xray",
        version: int = 1,
        replaces: str = "",
        expires: str = "2099-06-30",
        detector_owner: str = "hospital",
        answer: str = 'to = ["clinic"], form = "label", budget = 5, per_day = 4',
        xrays_owner: str = "hospital",
        accept: str = '"simulated"',
        extra: str = "",
        leaves: str = "",
        hospital: Signer | None = None,
    ) -> bytes:
        replace_line = f'replaces = "{replaces}"\n' if replaces else ""
        return f"""contract = "{name}"
version = {version}
{replace_line}expires = {expires}
[party]
hospital = "{(hospital or self.hospital).key.fingerprint}"
vendor = "{self.vendor.key.fingerprint}"
clinic = "{self.clinic.key.fingerprint}"
[code]
trainer = {{ owner = "vendor", digest = "{TRAINER}", sandbox = "offline" }}
server = {{ owner = "vendor", digest = "{SERVER}", sandbox = "one-shot" }}
[data]
xrays = {{ owner = "{xrays_owner}", digest = "{XRAYS}" }}
backbone = {{ owner = "vendor", digest = "{BACKBONE}" }}
[place]
enclave = {{ kind = "tee", accept = [{accept}] }}
[phase.train]
run = "trainer"
at = "enclave"
read = ["xrays", "backbone"]
write = {{ detector = "{detector_owner}" }}
{leaves}
[phase.serve]
run = "server"
at = "enclave"
read = ["detector"]
answer = {{ {answer} }}
[change]
default = ["hospital", "vendor"]
{extra}""".encode()

    def deposit(self, client: BrokerClient) -> None:
        client.deposit_key(XRAYS, volume_id=VOLUME_ID, key=self.xrays_key, sign=self.hospital.sign)
        client.deposit_key(BACKBONE, volume_id=VOLUME_ID, key=self.backbone_key, sign=self.vendor.sign)

    def signed(self, client: BrokerClient, data: bytes | None = None) -> str:
        """Submit a contract, let hospital and vendor sign it, return its id."""
        data = self.contract() if data is None else data
        status = client.submit_contract(data, name="test.toml")
        for party in (self.hospital, self.vendor):
            status = client.add_signature(status.contract, party.sign(data, namespace="contract@cloister"))
        return status.contract

    def ready(self, client: BrokerClient, data: bytes | None = None) -> str:
        """`signed` and deposited: the id of an active contract."""
        self.deposit(client)
        contract = self.signed(client, data)
        assert client.contract_status(contract).state == "active"
        return contract

    def trained(self, client: BrokerClient, contract: str) -> Release:
        """Run the train phase as far as the broker sees it: release and register."""
        release = client.release(
            contract, "train", reads=("xrays", "backbone"), writes=("detector",), attester=trainer_node()
        )
        generation = release.outputs["detector"].generation
        client.register_root(release, "detector", detector(contract), generation=generation)
        return release


def node(
    code: str = TRAINER, sandbox: str = "offline", level: str = "L1", *, measurement: bytes | None = None
) -> SoftTdxAttester:
    """A soft node that has measured its workload."""
    attester = SoftTdxAttester(own_measurement() if measurement is None else measurement)
    attester.extend(
        WORKLOAD, Workload(code, sandbox, bytes(32) if sandbox == "none" else profile(sandbox).digest(), level).encode()
    )
    return attester


def trainer_node() -> SoftTdxAttester:
    return node()


def server_node() -> SoftTdxAttester:
    return node(SERVER, "one-shot", "L2")


@dataclass
class Asker:
    """A consumer with an authorised session."""

    authorisation: wire.Authorisation
    session: Ed25519PrivateKey

    @classmethod
    def of(
        cls,
        consumer: Signer,
        release: Release,
        *,
        now: datetime | None = None,
        lasts: timedelta = timedelta(minutes=59),
    ) -> Asker:
        session = Ed25519PrivateKey.generate()
        statement = wire.SessionStatement(
            wire.sha256(release.keypair.public),
            release.contract,
            session.public_key().public_bytes_raw(),
            (now or datetime.now(UTC)) + lasts,
        )
        return cls(wire.Authorisation(statement, consumer.sign(statement.encode(), namespace="ask@cloister")), session)

    def ask(self, client: BrokerClient, release: Release, query: bytes, answer: bytes = b"answer") -> wire.AnswerReply:
        digest_of_query = wire.sha256(query)
        message = wire.query_message(
            contract=self.authorisation.statement.contract,
            service=self.authorisation.statement.service,
            query=digest_of_query,
        )
        return client.answer(
            release,
            self.authorisation,
            query=digest_of_query,
            query_signature=self.session.sign(message),
            answer=wire.sha256(answer),
        )
