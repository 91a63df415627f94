"""Ask a service of a contract: attest it first, authorise a session, then send questions.

Before the first question leaves, in this order:

  1 evidence   authentic, and bound to a fresh nonce, the service's HPKE key, this contract and phase `serve`
  2 contract   the measured workload, its jail and the platform are what the contract wants, and the contract lets
               this consumer ask (`contract.decide`, the engine that the broker uses)
  3 receipt    the broker, which was attested too, logged a release for exactly this key, contract and code
  4 session    the consumer's SSH key signs once: this session key may ask this service until then

Then questions are encrypted to the attested key. Every answer carries a receipt, which is checked: it names this
question and this answer.
"""

from __future__ import annotations

import hashlib
import http.client
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.attestation import evidence as evidence_format
from cloister.attestation.binding import Binding, check_binding
from cloister.attestation.events import workload_of
from cloister.attestation.types import Claims
from cloister.attestation.verify import verify
from cloister.broker.client import BrokerClient, Signer, Trust
from cloister.broker.decide import confinement
from cloister.broker.log.leaf import Answer as AnswerLeaf
from cloister.broker.log.leaf import Leaf
from cloister.broker.log.leaf import Release as ReleaseLeaf
from cloister.broker.log.receipt import check_receipt, parse_receipt
from cloister.broker.session import LONGEST
from cloister.broker.wire import (
    MEDIA_TYPE,
    NONCE_BYTES,
    Authorisation,
    ErrorReply,
    SessionStatement,
    query_message,
)
from cloister.contract.decide import Request, State, decide, endorsed
from cloister.contract.model import Contract
from cloister.crypto import hpke
from cloister.crypto.keys import Secret
from cloister.crypto.note import Verifier
from cloister.errors import DeniedError, EvidenceError, InputError, PeerError, Reason, TamperedError
from cloister.serve import answer as answers
from cloister.serve.wire import (
    ASK_STEP,
    Ask,
    AskReply,
    Hello,
    HelloReply,
    Query,
    answer_digest,
    ask_info,
    open_outcome,
    query_digest,
)

_EARLY: Final = timedelta(minutes=1)
"""A session is made anew this long before it ends."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: `said` in the contract's form, the receipt (JSON bytes), what is left of the budget (None: no limit)."""

    said: dict[str, Any]
    receipt: bytes
    index: int
    left: int | None
    left_today: int | None


class ServiceClient:
    """A connection to one service; use `connect`. Methods may be called from several threads."""

    def __init__(
        self,
        url: str,
        contract: Contract,
        *,
        party: str,
        sign: Signer,
        trust: Trust,
        broker: BrokerClient,
        clock: Callable[[], datetime],
        timeout_s: float,
    ) -> None:
        host, port = _address(url)
        if not host:
            raise InputError(
                f"{url!r} is not the address of a service",
                reasons=[Reason("service.url", url, "http://<host>:<port>")],
                hint="`cloister serve` prints the address; questions are encrypted end to end, whatever carries them",
            )
        self._host, self._port = host, port
        self.url = url
        self._contract = contract
        self._party = party
        self._sign = sign
        self._trust = trust
        self._broker = broker
        self._clock = clock
        answer = contract.phase["serve"].answer if "serve" in contract.phase else None
        # an answer may wait for the next multiple of `every` before it leaves
        self._timeout_s = timeout_s + (answer.every.total_seconds() if answer and answer.every else 0.0)
        self._lock = threading.RLock()
        self._connection: http.client.HTTPConnection | None = None
        self._log_key = Verifier.parse(broker.broker.config.log_key)
        self._key = b""
        self._session = Ed25519PrivateKey.generate()
        self._authorisation: Authorisation | None = None
        self.claims: Claims | None = None

    @classmethod
    def connect(
        cls,
        url: str,
        contract: Contract,
        *,
        party: str,
        sign: Signer,
        trust: Trust,
        broker: BrokerClient,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        timeout_s: float = 60.0,
    ) -> ServiceClient:
        """Return a client of the service at `url` after steps 1 to 3; `party` is the consumer's name in the contract.

        Raises:
            EvidenceError, DeniedError: the service is not what the contract wants; nothing was sent to it.
            TamperedError: its receipt does not hold.
            PeerError: it does not answer.
        """
        client = cls(
            url, contract, party=party, sign=sign, trust=trust, broker=broker, clock=clock, timeout_s=timeout_s
        )
        try:
            client._attest()
        except BaseException:
            client.close()
            raise
        return client

    def ask(self, data: bytes) -> Reply:
        """Send one question and return the checked answer.

        Raises:
            DeniedError: the contract or its budget says no.
            PeerError, MachineError: the service or its model failed.
            TamperedError: the receipt is not about this question and answer.
        """
        authorisation = self._authorised()
        identifier, reply_key = secrets.token_bytes(16), Secret.random()
        digest = query_digest(identifier, data)
        service = hashlib.sha256(self._key).digest()
        message = query_message(contract=self._contract.id, service=service, query=digest)
        query = Query(
            authorisation=authorisation,
            id=identifier,
            input=data,
            reply_key=reply_key,
            signature=self._session.sign(message),
            pad=bytes(-len(data) % ASK_STEP),
        )
        sealed = hpke.seal(query.encode(), to=self._key, info=ask_info(self._contract.id))
        reply = AskReply.decode(self._post("ask", Ask(sealed).encode()))
        outcome = open_outcome(reply.sealed, reply_key)
        if outcome.refused is not None:
            raise outcome.refused.as_error()
        answered = outcome.answered
        if answered is None:  # open_outcome has checked it; said again for the reader
            raise PeerError("the reply is empty", code="protocol")
        leaf, index = self._receipt(answered.receipt)
        wanted = _hex(digest), _hex(answer_digest(answered.salt, answered.answer)), self._contract.id
        if not isinstance(leaf, AnswerLeaf) or (leaf.query, leaf.answer, leaf.contract) != wanted:
            raise TamperedError("the receipt is about another question or answer", code="log-tampered")
        return Reply(answers.decode(answered.answer), answered.receipt, index, answered.left, answered.left_today)

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- trust --------------------------------------------------------------------------------------------------------

    def _attest(self) -> None:
        request = Hello(secrets.token_bytes(NONCE_BYTES))
        reply = HelloReply.decode(self._post("service", request.encode()))
        now = self._clock()
        evidence = evidence_format.decode(reply.evidence)
        kinds = (evidence.kind, *(device.kind for device in evidence.devices))
        # the service may be at a place that takes tokens: of this contract's authorities
        collateral = endorsed(self._trust.collateral(now, *kinds), self._contract)
        claims = verify(evidence, collateral, self._trust.roots, now=now)  # 1
        binding = Binding(
            "service",
            request.nonce,
            reply.key,
            contract=self._contract.id,
            phase="serve",
            request=request.hashed(),
        )
        reasons = check_binding(claims, binding.over(evidence.devices))
        if reasons:
            raise EvidenceError(
                "the service's evidence is not about this contract, key and moment; nothing was sent to it",
                code="evidence-unacceptable",
                reasons=reasons,
            )
        workload = workload_of(claims)  # 2
        decision = decide(
            self._contract,
            Request(
                phase="serve",
                op="answer",
                asset="",
                code=workload.code,
                sandbox=workload.sandbox,
                claims=claims,
                party=self._party,
                today=now.astimezone(UTC).date(),
            ),
            # Step 3 proves that the broker saw the signatures: it releases nothing without them.
            State(signed=self._contract.signers),
            reference_values={claims.launch or "launch": self._trust.nodes() if claims.launch else frozenset()},
        )
        reasons = (*confinement(workload, claims), *decision.reasons)
        if reasons:
            raise DeniedError(
                f"the service at {self.url} is not what the contract wants; nothing was sent to it",
                reasons=reasons,
            )
        leaf, _ = self._receipt(reply.receipt)  # 3
        found = (leaf.contract, leaf.phase, leaf.code, leaf.hpke_key) if isinstance(leaf, ReleaseLeaf) else type(leaf)
        wanted = (self._contract.id, "serve", workload.code, _hex(hashlib.sha256(reply.key).digest()))
        if found != wanted:
            raise TamperedError(
                "the service shows a receipt that is not about it; nothing was sent to it",
                code="log-tampered",
                reasons=[Reason("service.receipt", str(found), str(wanted))],
            )
        self._key = reply.key
        self.claims = claims

    def _receipt(self, data: bytes) -> tuple[Leaf, int]:
        verified = check_receipt(parse_receipt(data), self._log_key)
        return verified.leaf, verified.index

    def _authorised(self) -> Authorisation:
        with self._lock:
            now = self._clock()
            current = self._authorisation
            if current is None or current.statement.expires - now < _EARLY:  # 4
                statement = SessionStatement(
                    service=hashlib.sha256(self._key).digest(),
                    contract=self._contract.id,
                    session=self._session.public_key().public_bytes_raw(),
                    # a minute less than allowed, so that a clock that is slightly ahead does no harm
                    expires=now + LONGEST - timedelta(minutes=1),
                )
                current = Authorisation(statement, self._sign(statement.encode(), namespace="ask@cloister"))
                self._authorisation = current
            return current

    # --- transport ----------------------------------------------------------------------------------------------------

    def _post(self, path: str, body: bytes) -> bytes:
        """One request on the kept connection. It is not repeated: a question that was counted stays counted."""
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
                    self._connection.connect()
                    self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connection.request("POST", f"/v1/{path}", body=body, headers={"Content-Type": MEDIA_TYPE})
                response = self._connection.getresponse()
                data = response.read(AskReply.LIMIT + 1)
                if (
                    response.length and len(data) <= AskReply.LIMIT
                ):  # read(n) says nothing of an answer that was cut off
                    raise http.client.IncompleteRead(data, response.length)
            except TimeoutError as error:
                self.close()
                raise PeerError(
                    f"the service at {self.url} did not answer within {self._timeout_s:g} s",
                    hint="it is busy or the network is slow; try again",
                ) from error
            except (OSError, http.client.HTTPException) as error:
                self.close()
                raise PeerError(
                    f"the service at {self.url} does not answer",
                    reasons=[Reason("service.connection", str(error) or type(error).__name__, "an answer")],
                    hint="start it with `cloister serve`, or check the address",
                ) from error
        if response.status != 200:
            raise ErrorReply.decode(data).as_error()
        return data


def _address(url: str) -> tuple[str, int]:
    """Host and port of `http://<host>:<port>`; an empty host for everything else."""
    try:
        parts = urlsplit(url)
        port = 80 if parts.port is None else parts.port
    except ValueError:
        return "", 0
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or port == 0:
        return "", 0
    return parts.hostname, port


def _hex(digest: bytes) -> str:
    return "sha256:" + digest.hex()
