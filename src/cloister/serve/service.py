"""The query service: shows its evidence, opens questions, asks the jailed model, shapes, counts, answers.

Steps for one question; a refusal is sealed like an answer:

  1 open       the question opens under the attested key, and its id was not seen before (a copy is refused)
  2 session    the consumer's SSH key authorised the session key, for this service and contract; it signed the question
  3 model      the program in the jail gets the input and nothing else
  4 shape      the contract's answer form (`answer.shape`), outside the jail
  5 count      the broker spends one answer of this consumer's budget and logs it durably; only then
  6 reply      the answer leaves, encrypted to the question's reply key, always in the same size

The service keeps no question and no answer; it logs neither.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime
from typing import Final

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cloister.attestation import evidence as evidence_format
from cloister.attestation.binding import Binding
from cloister.attestation.edge.attester import Attester
from cloister.broker import session
from cloister.broker.client import BrokerClient, Release
from cloister.broker.wire import MEDIA_TYPE, STATUS, Authorisation, ErrorReply
from cloister.crypto import hpke
from cloister.errors import CloisterError, InputError, PeerError
from cloister.serve.answer import Rules, encode, shape
from cloister.serve.pool import Pool
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
    seal_outcome,
)

SEEN_MOST: Final = 1 << 20
"""Question ids remembered, 16 MiB: at 100 a second nearly three hours, and a session lives one hour at most."""


class Service:
    """One service of one contract. Thread-safe; sockets and clocks come from outside."""

    def __init__(
        self,
        release: Release,
        attester: Attester,
        broker: BrokerClient,
        pool: Pool,
        rules: Rules,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self.release = release
        self.attester = attester
        self.broker = broker
        self.pool = pool
        self.rules = rules
        self.clock = clock
        self.answered = 0
        self.refused = 0
        self._key_hash = hashlib.sha256(release.keypair.public).digest()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
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
        evidence = self.attester.evidence(binding.report_data())
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
            self.answered += 1
        except CloisterError as error:
            self.refused += 1
            outcome = Outcome(None, ErrorReply.of(error, denial_id=getattr(error, "denial_id", "")))
        return AskReply(seal_outcome(outcome, query.reply_key)).encode()

    def _answer(self, query: Query) -> Answered:
        with self._lock:
            if query.id in self._seen:
                raise InputError("this question was asked before: a copy is not answered again")
            self._seen[query.id] = None
            if len(self._seen) > SEEN_MOST:
                self._seen.popitem(last=False)
        digest = query_digest(query.id, query.input)
        self._check_session(query.authorisation, digest, query.signature)  # 2
        line = self.pool.ask(query.input)  # 3
        answer = encode(shape(line, self.rules), size=self.rules.size)  # 4
        salt = secrets.token_bytes(16)
        reply = self.broker.answer(  # 5
            self.release,
            query.authorisation,
            query=digest,
            query_signature=query.signature,
            answer=answer_digest(salt, answer),
        )
        return Answered(answer, salt, reply.receipt, reply.left, reply.left_today)  # 6

    def _check_session(self, authorisation: Authorisation, digest: bytes, signature: bytes) -> None:
        session.check(
            authorisation,
            contract=self.release.contract,
            service=self._key_hash,
            now=self.clock(),
            query=digest,
            query_signature=signature,
        )


def application(service: Service) -> Starlette:
    """Return the ASGI application: `POST /v1/service`, `POST /v1/ask`, `GET /v1/health`."""

    def endpoint(handle: Callable[[bytes], bytes], limit: int) -> Callable[[Request], object]:
        async def serve(request: Request) -> Response:
            body = b""
            async for block in request.stream():
                body += block
                if len(body) > limit:
                    error = PeerError(f"a message above {limit} bytes", code="protocol")
                    return Response(ErrorReply.of(error).encode(), 413, media_type=MEDIA_TYPE)
            try:
                return Response(await run_in_threadpool(handle, body), media_type=MEDIA_TYPE)
            except CloisterError as error:
                return Response(ErrorReply.of(error).encode(), STATUS[error.family], media_type=MEDIA_TYPE)

        return serve

    async def health(request: Request) -> Response:
        return Response(b"ok", media_type="text/plain")

    return Starlette(
        routes=[
            Route("/v1/service", endpoint(service.hello, 4096), methods=["POST"]),
            Route("/v1/ask", endpoint(service.ask, Ask.LIMIT), methods=["POST"]),
            Route("/v1/health", health),
        ]
    )
