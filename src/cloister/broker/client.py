"""Talk to a broker: attest it first, then submit, deposit, release, renew, register, answer, open, audit.

The order of trust, on every TCP connection:

  1 TLS 1.3      any certificate: names and public authorities mean nothing to this protocol
  2 pin          SHA-256 of the certificate's SPKI is the one that was attested; if so, done
  3 evidence     else: a fresh nonce; the evidence is authentic (attestation.verify) and bound to nonce, HPKE key, this
                 SPKI and this request; so whoever ends this TLS connection is the TEE that holds the HPKE key
  4 software     the platform, its firmware and its launch measurement are what `Trust` wants
  5 config       one event, `cloister/config/1`, says what the broker accepts and which key signs its log; every node
                 software that it gives keys to, and every root that it believes besides the vendors', is one that `Trust`
                 wants: the operator chooses what he starts it with
  6 memory       the log key and the HPKE key are those seen before at this address (`broker-replaced`), and the log is a
                 consistent extension of the last checkpoint seen (`log-tampered`)

A broker that restarted has another certificate: the client reconnects and goes through 3 to 6 again. Every request
can be repeated safely (docs/protocol.md 2), so a lost connection is retried with back-off; a timeout is not.
Imports stay light (stdlib, `cryptography`, CBOR): nodes start quickly.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import secrets
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar
from urllib.parse import urlencode, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.attestation import evidence as evidence_format
from cloister.attestation.appraise import SIMULATED, appraise
from cloister.attestation.binding import Binding, check_binding
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.events import config_of
from cloister.attestation.roots import Roots
from cloister.attestation.token.format import only
from cloister.attestation.types import AUTHORITY, Claims, Policy
from cloister.attestation.verify import VERIFIERS, verify
from cloister.broker import wire
from cloister.broker.log import tree
from cloister.broker.log.checkpoint import open_checkpoint
from cloister.crypto import hpke
from cloister.crypto.keys import Secret, mac, wrap
from cloister.crypto.note import Verifier
from cloister.errors import CloisterError, EvidenceError, InputError, MachineError, PeerError, Reason, TamperedError

if TYPE_CHECKING:
    from cloister.attestation.edge.attester import Attester

BACK_OFF_S: Final = (0.1, 0.3, 0.8, 1.6, 3.0)
"""Pauses before each retry after a lost connection: 5.8 s in all; a broker restarts in about 2 s (bench/release.py)."""
SKEW: Final = timedelta(seconds=60)
"""Beyond this difference of clocks an error about time mentions it: a nonce lives 60 s."""
NONCE_KEPT_S: Final = 20.0
"""How long the nonce that came with the broker's evidence is used: a third of its life."""
_OTHER_SOFTWARE: Final = "it runs another version than you do: use the same one, or say --trust-broker if you know it"
OPEN_VALID: Final = timedelta(minutes=30)
LISTEN_VALID: Final = timedelta(minutes=50)
"""The broker takes an hour; its clock may be behind."""

T = TypeVar("T")


class Signer(Protocol):
    """Signs with somebody's SSH key: `contract.edge.sign` with its key file filled in. Returns armoured SSHSIG."""

    def __call__(self, message: bytes, *, namespace: str) -> str: ...


@cache
def own_measurement() -> bytes:
    """The package as it was when this process first asked: what runs here does not change with the files."""
    from cloister.attestation.edge.software import measure_package

    return measure_package()


@dataclass(frozen=True, slots=True)
class Trust:
    """What a client believes of a broker.

    `broker_measurements` are accepted launch measurements (`mrtd`, `mrenclave`, `measurement`, `pcr0`, ...); None means the
    Cloister package that this client itself runs, and nothing else. `accept` are the TEE types of a broker. `allow_soft` admits a
    soft TEE, which protects nothing; it needs `roots.soft` too. `roots.also` are the only further roots that a broker may believe.
    `node_measurements` are accepted launch measurements of the nodes that the broker gives keys to; None means the same as
    for the broker. `endorsements` is vendor collateral for the broker's machine; for a soft TEE it is made here.
    """

    roots: Roots
    broker_measurements: frozenset[bytes] | None = None
    allow_soft: bool = False
    endorsements: Endorsements = field(default_factory=Endorsements)
    node_measurements: frozenset[bytes] | None = None
    accept: frozenset[str] = frozenset({"tdx"})

    def policy(self, launch: str) -> Policy:
        """Return the appraisal policy for a broker whose launch measurement is called `launch`; the only place where `Trust`
        becomes one. Hardware without a launch measurement (empty) is refused, and so is a service's word about hardware: authorities
        are named by contracts, and a broker serves them all."""
        hardware = frozenset(tee for tee in self.accept if not tee.startswith(AUTHORITY)) - {SIMULATED}
        return Policy(
            where="broker",
            kind="tee",
            accept=hardware | {SIMULATED} if self.allow_soft else hardware,
            reference_values={launch or "launch": self._software() if launch else frozenset()},
        )

    def nodes(self) -> frozenset[bytes]:
        """Return the accepted launch measurements of a node."""
        return self._software() if self.node_measurements is None else self.node_measurements

    def _software(self) -> frozenset[bytes]:
        return frozenset({own_measurement()}) if self.broker_measurements is None else self.broker_measurements

    def appraise_config(self, config: wire.BrokerConfig) -> tuple[Reason, ...]:
        """Return why a broker with `config` is not wanted: it gives keys to node software that is not trusted here, or
        believes a root that is not."""
        reasons = []
        wanted = self.nodes()
        foreign = [each for each in config.node_measurements if each not in wanted]
        if foreign:
            found = ", ".join(each.hex() for each in foreign)
            hint = "ask its operator which software that is; it gets every key that a contract releases"
            trusted = " or ".join(sorted(each.hex() for each in wanted)) or "nothing"
            reasons.append(Reason("broker.node_measurements", found, trusted, hint))
        pins = {f"{kind}:{pin}" for kind, known in self.roots.also.items() for pin in known}
        strange = [root for root in config.roots if root not in pins]
        if strange:
            hint = "whoever has the key of such a root makes nodes as he likes; name it with --trust-root if you believe it"
            trusted = " or ".join(sorted(pins)) or "the vendors' roots and no other"
            reasons.append(Reason("broker.roots", ", ".join(strange), trusted, hint))
        return tuple(reasons)

    def collateral(self, now: datetime, *kinds: str) -> Endorsements:
        """Return what endorses evidence of `kinds` (default: all): yours, and for soft TEEs what is made here. It never names an
        authority of tokens: contracts do."""
        hardware = only(self.endorsements, ())
        if not (self.allow_soft and self.roots.soft):
            return hardware
        from cloister.attestation.edge.collateral import soft_collateral

        return hardware | soft_collateral(now, *kinds)


def root_pins(pairs: Iterable[tuple[str, str]]) -> Mapping[str, frozenset[str]]:
    """Return `Roots.also` for (kind of evidence, file of one root certificate, PEM or DER; for `cca` of a platform key).

    Raises:
        InputError: an unknown kind, or a file that cannot be read or is not one certificate.
    """
    from cloister.attestation.pki import certificate

    pins: dict[str, set[str]] = {}
    for kind, name in pairs:
        if kind not in VERIFIERS or kind == "token":  # whose tokens count is said by contracts, never by roots
            known = " or ".join(each for each in VERIFIERS if each != "token")
            raise InputError(f"no root can be named for '{kind}'", reasons=(Reason("root.kind", kind, known),))
        try:
            data = Path(name).read_bytes()
            if kind == "cca":
                from cloister.attestation.cca.verify import spki_sha256

                pin = spki_sha256(data)
            elif data.startswith(b"-----"):
                (root,) = certificate.from_pem(data, where="root", most=1)
                pin = wire.sha256(root.der).hex()
            else:
                pin = wire.sha256(certificate.from_der(data, where="root").der).hex()
        except EvidenceError as error:
            what = "platform key (JWK or DER)" if kind == "cca" else "certificate (PEM or DER)"
            raise InputError(f"{name} is not one {what}", reasons=error.reasons) from error
        except OSError as error:
            raise InputError(f"cannot read the root certificate {name}: {error.strerror}") from error
        pins.setdefault(kind, set()).add(pin)
    return MappingProxyType({kind: frozenset(values) for kind, values in pins.items()})


@dataclass(frozen=True, slots=True)
class Broker:
    """A broker as its evidence shows it."""

    url: str
    key: bytes
    """HPKE public key that keys are deposited to."""
    spki: bytes
    """SHA-256 of its TLS key's SubjectPublicKeyInfo."""
    config: wire.BrokerConfig
    claims: Claims

    @property
    def soft(self) -> bool:
        return self.claims.soft


@dataclass(frozen=True, slots=True)
class Release:
    """What a node got: keys of the assets it reads, keys of the outputs it writes, a lease, a receipt (JSON bytes)."""

    contract: str
    phase: str
    keys: Mapping[str, wire.ReleasedKey]
    outputs: Mapping[str, wire.OutputKey]
    lease: wire.Lease
    receipt: bytes
    keypair: hpke.KeyPair


@dataclass(frozen=True, slots=True)
class Opened:
    """A key that its owner fetched, and the receipt of the log entry that says so."""

    key: wire.ReleasedKey
    receipt: bytes


class _DroppedError(PeerError):
    """The connection ended before a whole answer came; the request may be sent again."""


class BrokerClient:
    """One keep-alive connection to one broker. Use `connect`; methods may be called from several threads.

    Every method raises the error that the broker raised (same class, code and reasons), or `PeerError`:
    `broker-unreachable` (down, or slower than `timeout_s`), `broker-replaced`, `protocol`; `EvidenceError` when the
    broker's own evidence is refused; `TamperedError` `log-tampered` when its log went back or forked.
    """

    def __init__(
        self, url: str, trust: Trust, memory: Path | None, clock: Callable[[], datetime], timeout_s: float
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/") or parts.query:
            raise InputError(
                f"{url!r} is not the address of a broker",
                reasons=(Reason("broker.url", url, "https://<host>:<port>"),),
                hint="`cloister up` prints the address",
            )
        self.url = f"https://{parts.netloc}"
        self._host, self._port = parts.hostname, parts.port or 443
        self._trust, self._clock, self._timeout_s = trust, clock, timeout_s
        self._memory = None if memory is None else Memory(memory)
        self._lock = threading.RLock()
        self._connection: http.client.HTTPSConnection | None = None
        self._skew: timedelta | None = None
        self._nonce: tuple[bytes, float] | None = None
        self._broker: Broker | None = None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # step 1: the pin of step 2 decides, and it comes from evidence
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._tls = context

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        trust: Trust,
        memory: Path | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        timeout_s: float = 10.0,
    ) -> BrokerClient:
        """Return a client of the broker at `url` after attesting it.

        `memory` is a file that remembers brokers and their logs between runs; it is made if absent.
        """
        client = cls(url, trust, memory, clock, timeout_s)
        with client._lock:
            client._connected()
        return client

    @property
    def broker(self) -> Broker:
        """The broker as last attested."""
        if self._broker is None:
            raise RuntimeError("connect first")
        return self._broker

    def close(self) -> None:
        """Hang up. A request that another thread has under way is waited for a second, no more: it has its own timeout."""
        if self._lock.acquire(timeout=1.0):
            try:
                self._drop()
            finally:
                self._lock.release()

    def __enter__(self) -> BrokerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- contracts ----------------------------------------------------------------------------------------------------

    def submit_contract(self, data: bytes, *, name: str) -> wire.ContractStatus:
        """Hand in the exact bytes of a contract file; `name` appears in messages about it."""
        body = wire.ContractSubmit(name, data).encode()
        return wire.ContractStatus.decode(self._post("contract", body))

    def add_signature(self, contract: str, signature: str) -> wire.ContractStatus:
        """Add one party's SSHSIG (namespace `contract@cloister`) over the contract's bytes."""
        body = wire.SignatureSubmit(contract, signature).encode()
        return wire.ContractStatus.decode(self._post("signature", body))

    def contract_status(self, reference: str) -> wire.ContractStatus:
        """Return where the contract with this id stands, or the newest signed one of this name."""
        return wire.ContractStatus.decode(self._get(f"contracts/{reference}"))

    def contracts(self) -> tuple[wire.ContractStatus, ...]:
        return wire.ContractList.decode(self._get("contracts")).contracts

    def contract_bytes(self, contract: str) -> bytes:
        """Return the file with this id; the bytes are checked against it."""
        data = self._get(f"contracts/{contract}/bytes")
        found = "sha256:" + wire.sha256(data).hex()
        if found != contract:
            raise TamperedError(
                "the broker answered with another contract",
                reasons=(Reason("contract.id", found, contract),),
                hint="do not use this broker",
            )
        return data

    def revoke(self, contract: str, sign: Signer) -> bytes:
        """End a contract as one of its required signers: its leases are cut. Return the receipt."""
        statement = wire.RevokeStatement(contract)
        request = wire.RevokeRequest(statement, sign(statement.encode(), namespace="contract@cloister"))
        return wire.Receipted.decode(self._post("revoke", request.encode())).receipt

    # --- owners -------------------------------------------------------------------------------------------------------

    def deposit_key(self, digest: str, *, volume_id: bytes, key: Secret, sign: Signer, generation: int = 1) -> bytes:
        """Seal the key of a volume to the attested broker and sign for it as the owner. Return the receipt."""
        to = self.broker.key
        sealed = hpke.seal(key.reveal(), to=to, info=wire.key_info(digest, volume_id))
        statement = wire.KeyStatement(digest, volume_id, generation, wire.sha256(sealed), wire.sha256(to))
        deposit = wire.KeyDeposit(statement, sealed, sign(statement.encode(), namespace="key@cloister"))
        return wire.Receipted.decode(self._post("key", deposit.encode())).receipt

    def open_key(self, contract: str, asset: str, signers: Sequence[Signer]) -> Opened:
        """Fetch the key of an asset that the signers own: one signer for a party, the members for a board."""
        pair = hpke.KeyPair.generate()
        statement = self.open_statement(contract, asset, pair.public)
        signatures = tuple(sign(statement.encode(), namespace="open@cloister") for sign in signers)
        return self.open_signed(statement, signatures, pair)

    def open_statement(
        self, contract: str, asset: str, public: bytes, *, valid: timedelta = OPEN_VALID
    ) -> wire.OpenStatement:
        """Return what the owners sign to get a key sealed to the HPKE key `public`: members of a board pass it round."""
        expires = self._clock() + valid
        return wire.OpenStatement(contract, asset, wire.sha256(public), wire.sha256(self.broker.key), expires)

    def open_signed(self, statement: wire.OpenStatement, signatures: Sequence[str], pair: hpke.KeyPair) -> Opened:
        """Fetch a key with signatures that were collected over `statement`."""
        request = wire.OpenRequest(statement, pair.public, tuple(signatures))
        reply = wire.OpenReply.decode(self._post("open", request.encode()))
        payload = _unseal(pair, reply.sealed, wire.OPEN_INFO + statement.encode())
        return Opened(wire.ReleasedKey.decode(payload), reply.receipt)

    # --- nodes --------------------------------------------------------------------------------------------------------

    def release(
        self,
        contract: str,
        phase: str,
        *,
        attester: Attester,
        reads: Sequence[str] = (),
        writes: Sequence[str] = (),
        keypair: hpke.KeyPair | None = None,
    ) -> Release:
        """Attest this node and get the keys of `reads` and `writes` in `phase` of `contract`.

        The node has extended its workload event before. `keypair` is made here if none is given; it must live in the
        TEE only.
        """
        pair = keypair or hpke.KeyPair.generate()
        ask = wire.ReleaseAsk(contract, phase, tuple(sorted(set(reads))), tuple(sorted(set(writes))))

        def attempt() -> Release:
            binding = self._binding("release", pair.public, contract, phase, ask.hashed())
            evidence = _evidence(attester, binding)
            request = wire.ReleaseRequest(ask, binding.nonce, pair.public, evidence)
            reply = wire.ReleaseReply.decode(self._exchange("POST", "release", request.encode(), pin=binding.peer_key))
            opened = _unseal(pair, reply.sealed, wire.RELEASE_INFO + binding.encode())
            payload = wire.ReleasePayload.decode(opened)
            return Release(contract, phase, payload.keys, payload.outputs, payload.lease, reply.receipt, pair)

        return self._retry(attempt)

    def renew(self, release: Release, attester: Attester) -> Release:
        """Attest again and return `release` with new lease times. Refusals mean: stop and drop the keys."""
        ask = wire.RenewAsk(release.lease.id)

        def attempt() -> Release:
            binding = self._binding("renew", release.keypair.public, release.contract, release.phase, ask.hashed())
            evidence = _evidence(attester, binding)
            request = wire.RenewRequest(ask, binding.nonce, release.keypair.public, evidence)
            reply = wire.RenewReply.decode(self._exchange("POST", "renew", request.encode(), pin=binding.peer_key))
            lease = replace(release.lease, expires=reply.expires, renew_after=reply.renew_after)
            return replace(release, lease=lease, receipt=reply.receipt)

        return self._retry(attempt)

    def register_root(self, release: Release, asset: str, digest: str, *, generation: int) -> bytes:
        """Make `digest` the current version of an output of `release`. Return the receipt."""
        statement = wire.RegisterStatement(release.lease.id, asset, digest, generation)
        tag = mac(release.lease.secret, wire.REGISTER_LABEL, statement.encode())
        reply = self._post("register", wire.RegisterRequest(statement, tag).encode())
        return wire.Receipted.decode(reply).receipt

    def answer(
        self,
        release: Release,
        authorisation: wire.Authorisation,
        *,
        query: bytes,
        query_signature: bytes,
        answer: bytes,
    ) -> wire.AnswerReply:
        """Spend one answer of the consumer's budget before it leaves the service; `query`, `answer` are SHA-256."""
        statement = wire.AnswerStatement(release.lease.id, authorisation, query, query_signature, answer)
        tag = mac(release.lease.secret, wire.ANSWER_LABEL, statement.encode())
        return wire.AnswerReply.decode(self._post("answer", wire.AnswerRequest(statement, tag).encode()))

    def words(
        self, release: Release, seq: int, stream: str, lines: Sequence[str], *, dropped: int = 0, end: bool = False
    ) -> None:
        """Send lines of `stream` ("metrics" or "logs") for the parties whom the contract lets hear them.

        `seq` grows with every batch. A lost connection is tried once more at once and never waited for.
        """
        batch = wire.WordsBatch(tuple(lines), dropped, end)
        context = wire.words_context(release.lease.id, seq, stream)
        sealed = wrap(wire.words_key(release.lease.secret), batch.encode(), context=context)

        def attempt() -> bytes:
            with self._lock:
                self._connected()
                pin = self.broker.spki
            statement = wire.WordsStatement(release.lease.id, pin, seq, stream, sealed)
            tag = mac(release.lease.secret, wire.WORDS_LABEL, statement.encode())
            return self._exchange("POST", "words", wire.WordsRequest(statement, tag).encode(), pin=pin)

        try:
            reply = attempt()
        except _DroppedError:  # a broker closes an idle connection, and may have restarted
            reply = attempt()
        wire.WordsReply.decode(reply)

    def another(self, *, timeout_s: float) -> BrokerClient:
        """Return a client with a connection of its own to the same broker, so that neither waits for the other."""
        with self._lock:
            client = BrokerClient(self.url, self._trust, None, self._clock, timeout_s)
            client._memory, client._broker = self._memory, self._broker
        return client

    # --- parties who hear ---------------------------------------------------------------------------------------------

    def listener(self, contract: str, sign: Signer, *, phase: str = "") -> Listener:
        """Return what hears the metrics (and logs, if they leave) of a contract's phases as the party that signs."""
        return Listener(self, contract, sign, phase)

    # --- anybody ------------------------------------------------------------------------------------------------------

    def denial(self, denial_id: str) -> wire.DenialRecord:
        """Return why something was refused."""
        return wire.DenialRecord.decode(self._get(f"denial/{denial_id}"))

    def status(self) -> wire.StatusReply:
        return wire.StatusReply.decode(self._get("status"))

    def checkpoint(self) -> bytes:
        """Return the log's signed checkpoint (C2SP tlog-checkpoint); with a memory, checked against what was seen."""
        note = self._get("log/checkpoint")
        if self._memory is not None:
            with self._lock:
                self._check_log(self.broker, note)
        return note

    def entries(self, start: int, end: int) -> tuple[bytes, ...]:
        """Return leaves `start` to `end` - 1; fewer when the answer would be too large."""
        reply = wire.LogEntries.decode(self._get("log/entries", start=start, end=end))
        if reply.start != start or len(reply.entries) > end - start:
            raise PeerError("the broker answered with other log entries", code="protocol")
        return reply.entries

    def inclusion(self, index: int, size: int) -> tuple[bytes, ...]:
        """Return the hashes that prove leaf `index` in the tree of `size` leaves (RFC 6962 section 2.1.1)."""
        return wire.LogProof.decode(self._get("log/inclusion", index=index, size=size)).hashes

    def consistency(self, old: int, new: int) -> tuple[bytes, ...]:
        """Return the hashes that prove that `new` leaves extend `old` (RFC 6962 section 2.1.2)."""
        return wire.LogProof.decode(self._get("log/consistency", old=old, new=new)).hashes

    # --- transport ----------------------------------------------------------------------------------------------------

    def _get(self, path: str, **query: int) -> bytes:
        full = f"{path}?{urlencode(query)}" if query else path
        return self._retry(lambda: self._exchange("GET", full, None))

    def _post(self, path: str, body: bytes) -> bytes:
        return self._retry(lambda: self._exchange("POST", path, body))

    def _retry(self, attempt: Callable[[], T]) -> T:
        for pause in BACK_OFF_S:
            try:
                return attempt()
            except _DroppedError:
                time.sleep(pause)
        return attempt()

    def _binding(self, purpose: str, key: bytes, contract: str, phase: str, request: bytes) -> Binding:
        with self._lock:
            self._connected()
            kept, self._nonce = self._nonce, None
        if kept is not None and _since_boot_s() < kept[1]:
            nonce = kept[0]  # came with the broker's evidence: one round trip less for a node that just connected
        else:
            nonce = wire.NonceReply.decode(self._exchange("POST", "nonce", b"")).nonce
        return Binding(purpose, nonce, key, self.broker.spki, contract, phase, request)

    def _exchange(self, method: str, path: str, body: bytes | None, *, pin: bytes | None = None) -> bytes:
        """One request and its answer; with `pin`, only to the broker that evidence in `body` was made for."""
        with self._lock:
            connection = self._connected()
            if pin is not None and self.broker.spki != pin:
                raise _DroppedError("the broker restarted in between", code="broker-unreachable")
            return self._send(connection, method, path, body)

    def _send(self, connection: http.client.HTTPSConnection, method: str, path: str, body: bytes | None) -> bytes:
        headers = {"Content-Type": wire.MEDIA_TYPE} if body is not None else {}
        try:
            connection.request(method, f"{wire.PREFIX}/{path}", body=body, headers=headers)
            response = connection.getresponse()
            data = response.read(wire.MAX_REPLY + 1)
            if (
                response.length and len(data) <= wire.MAX_REPLY
            ):  # read(n) says nothing when the other side dies half-way
                raise http.client.IncompleteRead(data, response.length)
        except TimeoutError as error:
            self._drop()
            raise self._slow() from error
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            raise self._unreachable(error) from error
        if len(data) > wire.MAX_REPLY:
            self._drop()
            raise PeerError("the broker's answer is too large", code="protocol")
        self._note_date(response.headers.get("Date"))
        if response.status == 200:
            return data
        raise self._with_skew(wire.ErrorReply.decode(data).as_error())

    def _connected(self) -> http.client.HTTPSConnection:
        """Return the open connection, or a new one that passed steps 1 to 6."""
        if self._connection is not None:
            return self._connection
        connection = http.client.HTTPSConnection(self._host, self._port, context=self._tls, timeout=self._timeout_s)
        try:
            connection.connect()
            # one small request, one small answer: never wait for a full segment
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            certificate = connection.sock.getpeercert(binary_form=True)
            spki = _spki_hash(certificate or b"")
        except TimeoutError as error:
            connection.close()
            raise self._slow() from error
        except (OSError, ValueError) as error:
            connection.close()
            raise self._unreachable(error) from error
        self._connection = connection
        if self._broker is not None and self._broker.spki == spki:  # 2
            return connection
        try:
            broker = self._attest(connection, spki)
            self._remember(connection, broker)
        except CloisterError:
            self._drop()
            raise
        self._broker = broker
        return connection

    def _attest(self, connection: http.client.HTTPSConnection, spki: bytes) -> Broker:
        """Steps 3 to 5."""
        request = wire.AttestRequest(secrets.token_bytes(wire.NONCE_BYTES))
        reply = wire.AttestReply.decode(self._send(connection, "POST", "attest", request.encode()))
        now = self._clock()
        binding = Binding("broker", request.nonce, reply.key, spki, request=request.hashed())
        try:
            evidence = evidence_format.decode(reply.evidence)
            kinds = (evidence.kind, *(device.kind for device in evidence.devices))
            claims = verify(evidence, self._trust.collateral(now, *kinds), self._trust.roots, now=now)
        except EvidenceError as error:
            raise self._with_skew(error) from error
        reasons = check_binding(claims, binding.over(evidence.devices)) + tuple(  # 3, 4
            replace(one, hint=_OTHER_SOFTWARE) if one.where == f"broker.{claims.launch}" else one
            for one in appraise(claims, self._trust.policy(claims.launch), today=now.astimezone(UTC).date())
        )
        config: wire.BrokerConfig | None = None
        try:
            config = wire.BrokerConfig.decode(config_of(claims))  # 5
            reasons += self._trust.appraise_config(config)
        except (EvidenceError, PeerError) as error:
            reasons += error.reasons
        if reasons or config is None:
            raise self._with_skew(
                EvidenceError(
                    f"the broker at {self.url} is not one that you trust",
                    code="evidence-unacceptable",
                    reasons=reasons,
                    hint="nothing was sent to it; ask who runs it which software version it should be",
                )
            )
        self._nonce = (reply.next_nonce, _since_boot_s() + NONCE_KEPT_S)
        return Broker(self.url, reply.key, spki, config, claims)

    def _remember(self, connection: http.client.HTTPSConnection, broker: Broker) -> None:
        """Step 6."""
        known = self._broker
        if known is not None:
            _same_broker(self.url, known.config.log_key, known.key, broker)
        if self._memory is None:
            return
        seen = self._memory.find(self.url)
        if seen is not None:
            _same_broker(self.url, seen.log_key, None, broker)
            if seen.key_hash != wire.sha256(broker.key).hex():
                raise _replaced(self.url, "HPKE key", seen.key_hash, wire.sha256(broker.key).hex())
        note = self._send(connection, "GET", "log/checkpoint", None)
        self._check_log(broker, note, connection)

    def _check_log(self, broker: Broker, note: bytes, connection: http.client.HTTPSConnection | None = None) -> None:
        """Check that the signed checkpoint extends the remembered one, then remember it."""
        if self._memory is None:
            return
        signed = open_checkpoint(note, Verifier.parse(broker.config.log_key)).checkpoint
        seen = self._memory.find(self.url)
        if seen is not None:
            hashes: tuple[bytes, ...] = ()
            if 0 < seen.size < signed.size:
                path = f"log/consistency?{urlencode({'old': seen.size, 'new': signed.size})}"
                with self._lock:
                    channel = connection or self._connected()
                    hashes = wire.LogProof.decode(self._send(channel, "GET", path, None)).hashes
            tree.verify_consistency(
                seen.size, bytes.fromhex(seen.root), signed.size, signed.root, hashes, who="the remembered checkpoint"
            )
        self._memory.keep(
            self.url,
            Seen(broker.config.log_key, wire.sha256(broker.key).hex(), signed.size, signed.root.hex()),
        )

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _unreachable(self, error: Exception) -> _DroppedError:
        return _DroppedError(
            f"the broker at {self.url} does not answer",
            code="broker-unreachable",
            reasons=(Reason("broker.connection", str(error) or type(error).__name__, "an answer"),),
            hint="start it with `cloister up`, or check the address and the network",
        )

    def _slow(self) -> PeerError:
        return PeerError(
            f"the broker at {self.url} did not answer within {self._timeout_s:g} s",
            code="broker-unreachable",
            reasons=(Reason("broker.time", f"nothing after {self._timeout_s:g} s", "an answer"),),
            hint="it is overloaded or the network is slow: try again, or allow more time",
        )

    def _note_date(self, header: str | None) -> None:
        with contextlib.suppress(ValueError, TypeError):
            if header:
                self._skew = self._clock() - parsedate_to_datetime(header)

    def _with_skew(self, error: CloisterError) -> CloisterError:
        """Say it when an error about evidence comes with clocks that differ: the remedy is another one then."""
        if not isinstance(error, EvidenceError) or self._skew is None or abs(self._skew) <= SKEW:
            return error
        seconds = round(abs(self._skew.total_seconds()))
        side = "ahead of" if self._skew > timedelta(0) else "behind"
        reason = Reason(
            "clock", f"this machine's clock is {seconds} s {side} the broker's", f"at most {SKEW.seconds} s apart"
        )
        return EvidenceError(
            error.message,
            code=error.code,
            reasons=(*error.reasons, reason),
            hint="set the clocks (evidence and collateral are valid for a time), then try again",
        )


class Listener:
    """One party's ear: signs once an hour, remembers what it heard. Not for several threads."""

    def __init__(self, client: BrokerClient, contract: str, sign: Signer, phase: str) -> None:
        self._client, self._contract, self._sign, self._phase = client, contract, sign, phase
        self._pair = hpke.KeyPair.generate()
        self._signed: tuple[wire.ListenStatement, str] | None = None
        self._epoch = self._after = 0

    def hear(self) -> wire.ListenPayload:
        """Return what came since the last call, the first time everything that is kept.

        Raises:
            DeniedError: the contract does not let it leave to whoever signs; all reasons.
        """
        statement, signature = self._statement()
        request = wire.ListenRequest(statement, self._pair.public, signature, self._epoch, self._after)
        reply = wire.ListenReply.decode(self._client._post("listen", request.encode()))
        opened = _unseal(self._pair, reply.sealed, wire.LISTEN_INFO + request.hashed())
        payload = wire.ListenPayload.decode(opened)
        self._epoch, self._after = payload.epoch, payload.next
        return payload

    def _statement(self) -> tuple[wire.ListenStatement, str]:
        now, broker = self._client._clock(), wire.sha256(self._client.broker.key)
        if self._signed is None or now >= self._signed[0].expires - SKEW or self._signed[0].broker != broker:
            expires = now + LISTEN_VALID
            statement = wire.ListenStatement(
                self._contract, self._phase, wire.sha256(self._pair.public), broker, expires
            )
            self._signed = statement, self._sign(statement.encode(), namespace="listen@cloister")
        return self._signed


def _evidence(attester: Attester, binding: Binding) -> bytes:
    """Return evidence of this machine and its devices as a message carries it.

    Raises:
        MachineError: it does not answer, or shows more than a broker takes.
    """
    from cloister.attestation.edge.attester import attest  # a client that is no node needs no attester

    evidence = evidence_format.encode(attest(attester, binding))
    if len(evidence) > wire.MAX_EVIDENCE:
        raise MachineError(
            f"the evidence of this machine has {len(evidence)} bytes",
            reasons=(Reason("evidence.size", f"{len(evidence)} bytes", f"at most {wire.MAX_EVIDENCE}"),),
            hint="a long boot or IMA log: restart the machine, or measure fewer files",
        )
    return evidence


def _since_boot_s() -> float:
    """A clock that also runs while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _spki_hash(certificate: bytes) -> bytes:
    public = x509.load_der_x509_certificate(certificate).public_key()
    return wire.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _unseal(pair: hpke.KeyPair, sealed: bytes, info: bytes) -> bytes:
    try:
        return pair.open(sealed, info=info)
    except hpke.OpenError as error:
        raise PeerError(
            "the broker's answer was not sealed for this request",
            code="protocol",
            reasons=(Reason("answer.sealed", "bytes that do not open", "HPKE to this key under this transcript"),),
            hint="somebody between this machine and the broker changed it, or both speak other versions",
        ) from error


def _replaced(url: str, what: str, found: str, wanted: str) -> PeerError:
    return PeerError(
        f"the broker at {url} is another one than before",
        code="broker-replaced",
        reasons=(Reason(f"broker.{what}", found, wanted),),
        hint="ask its operator; if it was set up anew on purpose, remove its entry from the file that remembers brokers",
    )


def _same_broker(url: str, log_key: str, key: bytes | None, broker: Broker) -> None:
    if broker.config.log_key != log_key:
        raise _replaced(url, "log key", broker.config.log_key, log_key)
    if key is not None and broker.key != key:
        raise _replaced(url, "HPKE key", wire.sha256(broker.key).hex(), wire.sha256(key).hex())


# --- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """What is remembered of one broker: its keys and the newest checkpoint of its log."""

    log_key: str
    key_hash: str
    size: int
    root: str


class Memory:
    """A JSON file {"brokers": {url: {...}}}, replaced atomically, shared by processes through a lock beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def find(self, url: str) -> Seen | None:
        entry = self._load().get(url)
        if entry is None:
            return None
        match entry:
            case {"log_key": str(log_key), "key": str(key), "size": int(size), "root": str(root), **rest} if not rest:
                return Seen(log_key, key, size, root)
        raise self._broken("an entry of another shape")

    def keep(self, url: str, seen: Seen) -> None:
        """Remember `seen` durably; a checkpoint that another process saw meanwhile and that is newer stays."""
        with self._locked():
            brokers = self._load()
            old = brokers.get(url)
            if isinstance(old, dict) and old.get("log_key") == seen.log_key and old.get("size", 0) > seen.size:
                return
            brokers[url] = {"log_key": seen.log_key, "key": seen.key_hash, "size": seen.size, "root": seen.root}
            text = json.dumps({"brokers": brokers}, indent=1, sort_keys=True).encode()
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(self._path)
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_name(self._path.name + ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _load(self) -> dict[str, Any]:
        try:
            value = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise self._broken("no JSON") from error
        if not isinstance(value, dict) or not isinstance(value.get("brokers"), dict):
            raise self._broken("JSON of another shape")
        return dict(value["brokers"])

    def _broken(self, found: str) -> TamperedError:
        return TamperedError(
            f"{self._path} does not hold what was remembered of brokers",
            reasons=(Reason("memory", found, "brokers and their checkpoints"),),
            hint="restore the file; without it a replaced or rolled back broker goes unnoticed",
        )
