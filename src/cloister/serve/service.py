"""The query service: shows its evidence, opens questions, asks the jailed model, shapes, counts, answers.

Steps for one question; a refusal is sealed like an answer and has the same size:

  1 open       the question opens under the attested key
  2 session    the consumer's SSH key authorised the session key, for this service and contract; it signed the question;
               the key is that of a consumer whom the contract answers, and his budget is not known to be spent
  3 once       its id was not seen before: a copy is refused
  4 model      the program in the jail gets the input and nothing else
  5 shape      the contract's answer form (`answer.shape`), outside the jail
  6 count      the broker spends one answer of this consumer's budget and logs it durably; only then
  7 reply      the answer leaves, encrypted to the question's reply key; with `every`, at a multiple of that time

A model that gives no usable answer says something by that, so this is counted like an answer, and the consumer learns only
that it happened. The service keeps no question and no answer; it logs neither.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Final

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cloister.attestation import evidence as evidence_format
from cloister.attestation.binding import Binding
from cloister.attestation.edge.attester import Attester, attest
from cloister.broker import session
from cloister.broker.client import BrokerClient, Release
from cloister.broker.wire import MEDIA_TYPE, STATUS, Authorisation, ErrorReply
from cloister.crypto import hpke
from cloister.errors import CloisterError, DeniedError, InputError, MachineError, PeerError, Reason
from cloister.serve.answer import Rules, encode, shape
from cloister.serve.pool import ModelFaultError, Pool
from cloister.serve.wire import (
    Answered,
    Ask,
    AskReply,
    Hello,
    HelloReply,
    Outcome,
    Query,
    answer_digest,
    ask_info,
    query_digest,
    reply_size,
    seal_outcome,
)

SEEN_MOST: Final = 1 << 20
"""Question ids remembered, 16 MiB: at 100 a second nearly three hours, and a session lives one hour at most."""


FAULT: Final = b"no usable answer"
"""What is counted and logged in place of an answer when the model gave none (step 6)."""


def until_multiple(now: datetime, every: timedelta) -> timedelta:
    """Return how long from `now` until the next multiple of `every` since 1970-01-01 UTC; zero at a multiple.

    Raises:
        ValueError: `every` is not positive.
    """
    if every <= timedelta():
        raise ValueError(f"not an interval: {every}")
    return (_EPOCH - now) % every


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Service:
    """One service of one contract. Thread-safe; sockets and clocks come from outside.

    `consumers` maps fingerprints (`SHA256:...`) to the names of those whom the contract answers.
    """

    def __init__(
        self,
        release: Release,
        attester: Attester,
        broker: BrokerClient,
        pool: Pool,
        rules: Rules,
        *,
        consumers: Mapping[str, str],
        clock: Callable[[], datetime],
    ) -> None:
        self.release = release
        self.attester = attester
        self.broker = broker
        self.pool = pool
        self.rules = rules
        self.consumers = dict(consumers)
        self.clock = clock
        self.answered = 0
        self.refused = 0
        self._key_hash = hashlib.sha256(release.keypair.public).digest()
        self._reply_size = reply_size(rules.size)
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._spent: dict[str, tuple[date, DeniedError]] = {}
        self._lock = threading.Lock()

    def hello(self, body: bytes) -> bytes:
        """Fresh evidence for a consumer's nonce, with the broker's receipt of this service's release."""
        request = Hello.decode(body)
        binding = Binding(
            "service",
            request.nonce,
            self.release.keypair.public,
            contract=self.release.contract,
            phase=self.release.phase,
            request=request.hashed(),
        )
        evidence = attest(self.attester, binding)
        return HelloReply(
            evidence=evidence_format.encode(evidence),
            endorsements=b"",
            key=self.release.keypair.public,
            contract=self.release.contract,
            receipt=self.release.receipt,
        ).encode()

    def ask(self, body: bytes) -> bytes:
        """Answer one sealed question; see the module for the steps.

        Raises:
            PeerError: the question does not open; nothing can be encrypted to whoever sent it.
        """
        request = Ask.decode(body)
        try:  # 1
            query = Query.decode(self.release.keypair.open(request.sealed, info=ask_info(self.release.contract)))
        except hpke.OpenError as error:
            raise PeerError("the question was not sealed to this service; attest it again", code="protocol") from error
        try:
            outcome = Outcome(self._answer(query), None)
        except CloisterError as error:
            outcome = Outcome(None, ErrorReply.of(error, denial_id=getattr(error, "denial_id", "")))
        with self._lock:
            self.answered += outcome.answered is not None
            self.refused += outcome.refused is not None
        return AskReply(seal_outcome(outcome, query.reply_key, size=self._reply_size)).encode()

    def _answer(self, query: Query) -> Answered:
        digest = query_digest(query.id, query.input)
        consumer = self._consumer(query.authorisation, digest, query.signature)  # 2
        self._once(query.id)  # 3
        fault: CloisterError | None = None
        try:
            line = self.pool.ask(query.input)  # 4
            answer = encode(shape(line, self.rules), size=self.rules.size)  # 5
        except (ModelFaultError, PeerError) as error:
            fault, answer = error, FAULT
        salt = secrets.token_bytes(16)
        try:
            reply = self.broker.answer(  # 6
                self.release,
                query.authorisation,
                query=digest,
                query_signature=query.signature,
                answer=answer_digest(salt, answer),
            )
        except DeniedError as error:
            if error.code == "budget-spent":
                with self._lock:
                    self._spent[consumer] = (self.clock().astimezone(UTC).date(), error)
            raise
        if fault is not None:
            raise MachineError(
                "the model gave no usable answer; this counted as one, because it says something, too",
                code="workload-failed",
                reasons=[Reason("model", "no usable answer", f"one line in the form '{self.rules.form}'")],
                hint="tell the owner of the model's program; nobody outside learns more than this",
            ) from fault
        return Answered(answer, salt, reply.receipt, reply.left, reply.left_today)  # 7

    def _consumer(self, authorisation: Authorisation, digest: bytes, signature: bytes) -> str:
        """Step 2; returns the fingerprint of the consumer."""
        asker = session.check(
            authorisation,
            contract=self.release.contract,
            service=self._key_hash,
            now=self.clock(),
            query=digest,
            query_signature=signature,
        )
        if asker.fingerprint not in self.consumers:
            raise DeniedError(
                "this contract does not answer you; the question was not looked at",
                reasons=[
                    Reason(
                        "answer.to",
                        asker.fingerprint,
                        " or ".join(f"{name} {fingerprint}" for fingerprint, name in self.consumers.items()),
                    )
                ],
                hint="ask with the key of a consumer, or ask the contract's owners to name you in a new version",
            )
        with self._lock:
            day, spent = self._spent.get(asker.fingerprint, (None, None))
        # The model is not even asked: how long it takes would be one more answer. A new day may bring new ones.
        if spent is not None and day == self.clock().astimezone(UTC).date():
            raise spent
        return asker.fingerprint

    def _once(self, identifier: bytes) -> None:
        with self._lock:
            if identifier in self._seen:
                raise InputError(
                    "this question was asked before: a copy is not answered again",
                    reasons=[Reason("question.id", "seen before", "a new one for every question")],
                    hint="ask again with a new question; the client makes a new id each time",
                )
            self._seen[identifier] = None
            if len(self._seen) > SEEN_MOST:
                self._seen.popitem(last=False)


def application(
    service: Service,
    *,
    every: timedelta | None = None,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> Starlette:
    """Return the ASGI application: `POST /v1/service`, `POST /v1/ask`, `GET /v1/health`.

    With `every`, what a question gets, answer or refusal, leaves at a multiple of that time by the service's clock, so
    how long the model took is known in these steps only. `sleep` takes seconds.
    """

    def endpoint(
        handle: Callable[[bytes], bytes], limit: int, hold: timedelta | None = None
    ) -> Callable[[Request], object]:
        async def serve(request: Request) -> Response:
            body = bytearray()
            async for block in request.stream():
                body += block
                if len(body) > limit:
                    error = PeerError(f"a message above {limit} bytes", code="protocol")
                    return Response(ErrorReply.of(error).encode(), 413, media_type=MEDIA_TYPE)
            try:
                response = Response(await run_in_threadpool(handle, bytes(body)), media_type=MEDIA_TYPE)
            except CloisterError as error:
                response = Response(ErrorReply.of(error).encode(), STATUS[error.family], media_type=MEDIA_TYPE)
            if hold is not None:
                await sleep(until_multiple(service.clock(), hold).total_seconds())
            return response

        return serve

    async def health(request: Request) -> Response:
        return Response(b"ok", media_type="text/plain")

    return Starlette(
        routes=[
            Route("/v1/service", endpoint(service.hello, 4096), methods=["POST"]),
            Route("/v1/ask", endpoint(service.ask, Ask.LIMIT, every), methods=["POST"]),
            Route("/v1/health", health),
        ]
    )
