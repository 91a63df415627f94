"""The broker on the network: HTTPS routes over a `Keeper`. Edge; nothing here decides.

TLS 1.3 only, one self-signed P-256 certificate made in memory at every start: its names mean nothing, clients check
the SHA-256 of its SPKI against the broker's evidence. Key and certificate reach OpenSSL through a memfd, never a disk.

Each request: method and path -> size cap while reading -> strict parsing (wire.py) -> one method of the keeper ->
canonical CBOR. Every answer that is no success is a `wire.ErrorReply`. Routes are listed in docs/protocol.md 3.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from cloister.broker import wire
from cloister.broker.keeper import Keeper
from cloister.errors import CloisterError, MachineError, PeerError, Reason

KEEP_ALIVE_S: Final = 75
"""A node renews every five minutes and opens a new connection then; a query service asks far more often."""
GRACE_S: Final = 5
"""On SIGTERM, requests in flight get this long."""
SMALL: Final = 256 << 10
EVIDENCE: Final = wire.MAX_EVIDENCE + (64 << 10)
"""Body caps of one request: what a message of that route can need. Whoever reaches the port may send one, so this times the number of
connections is the memory that strangers can take."""
CERTIFICATE_LIFE: Final = timedelta(days=3650)
"""Nobody judges the certificate's dates; the key dies with the process."""


# --- TLS --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """A fresh key pair and self-signed certificate as PEM, and SHA-256 of the key's SPKI."""

    pem: bytes
    spki: bytes

    def __repr__(self) -> str:
        return f"TlsIdentity(spki={self.spki.hex()[:16]}…)"


def make_identity(now: datetime) -> TlsIdentity:
    """Return a new TLS identity; the private key exists in this object only."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cloister broker")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + CERTIFICATE_LIFE)
        .sign(key, SHA256())
    )
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return TlsIdentity(private + certificate.public_bytes(Encoding.PEM), wire.sha256(spki))


@contextmanager
def in_memory(data: bytes) -> Iterator[str]:
    """Yield a path under /proc from which OpenSSL reads `data`; it exists in memory, inside the block only."""
    descriptor = os.memfd_create("cloister-tls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


# --- routes -----------------------------------------------------------------------------------------------------------

Handler = Callable[[Request], Awaitable[Response]]


def application(keeper: Keeper, more: Sequence[Route] = ()) -> Starlette:
    """Return the ASGI application that serves `keeper`; `more` are routes of other doors (kbs/)."""

    def post(path: str, act: Callable[[bytes], Awaitable[wire.Message]], most: int = SMALL) -> Route:
        async def endpoint(request: Request) -> Response:
            return _reply(await act(await _body(request, most)))

        return _route(path, "POST", endpoint)

    def get(path: str, act: Callable[[Request], Awaitable[Response]]) -> Route:
        return _route(path, "GET", act)

    async def attest(body: bytes) -> wire.Message:
        return await keeper.attest(wire.AttestRequest.decode(body))

    async def nonce(body: bytes) -> wire.Message:
        if body:
            raise PeerError("a request for a nonce has no body", code="protocol")
        return keeper.nonce()

    async def submit(body: bytes) -> wire.Message:
        return await keeper.submit(wire.ContractSubmit.decode(body))

    async def sign(body: bytes) -> wire.Message:
        return await keeper.sign(wire.SignatureSubmit.decode(body))

    async def revoke(body: bytes) -> wire.Message:
        return await keeper.revoke(wire.RevokeRequest.decode(body))

    async def deposit(body: bytes) -> wire.Message:
        return await keeper.deposit(wire.KeyDeposit.decode(body))

    async def release(body: bytes) -> wire.Message:
        return await keeper.release(wire.ReleaseRequest.decode(body))

    async def renew(body: bytes) -> wire.Message:
        return await keeper.renew(wire.RenewRequest.decode(body))

    async def register(body: bytes) -> wire.Message:
        return await keeper.register(wire.RegisterRequest.decode(body))

    async def answer(body: bytes) -> wire.Message:
        return await keeper.answer(wire.AnswerRequest.decode(body))

    async def open_key(body: bytes) -> wire.Message:
        return await keeper.open(wire.OpenRequest.decode(body))

    async def words(body: bytes) -> wire.Message:
        return await keeper.words(wire.WordsRequest.decode(body))

    async def listen(body: bytes) -> wire.Message:
        return await keeper.listen(wire.ListenRequest.decode(body))

    async def contracts(_: Request) -> Response:
        return _reply(keeper.contracts())

    async def contract(request: Request) -> Response:
        return _reply(keeper.contract(_text(request, "reference", rf"{wire.DIGEST}|{wire.NAME}")))

    async def contract_bytes(request: Request) -> Response:
        data = keeper.contract_bytes(_text(request, "reference", wire.DIGEST))
        return Response(data, media_type="application/toml")

    async def denial(request: Request) -> Response:
        return _reply(await keeper.denial(_text(request, "id", wire.DENIAL)))

    async def status(_: Request) -> Response:
        return _reply(keeper.status())

    async def checkpoint(_: Request) -> Response:
        return Response(keeper.checkpoint(), media_type="text/plain")

    async def entries(request: Request) -> Response:
        return _reply(await keeper.entries(_number(request, "start"), _number(request, "end")))

    async def inclusion(request: Request) -> Response:
        return _reply(keeper.inclusion(_number(request, "index"), _number(request, "size")))

    async def consistency(request: Request) -> Response:
        return _reply(keeper.consistency(_number(request, "old"), _number(request, "new")))

    return Starlette(
        routes=[  # searched in this order
            post("nonce", nonce),
            post("release", release, EVIDENCE),
            post("answer", answer),
            post("renew", renew, EVIDENCE),
            post("attest", attest),
            post("register", register),
            post("contract", submit, wire.MAX_REQUEST),
            post("signature", sign),
            post("revoke", revoke),
            post("key", deposit),
            post("open", open_key, wire.MAX_REQUEST),  # up to 64 signatures
            post("words", words),
            post("listen", listen),
            get("contracts", contracts),
            get("contracts/{reference}", contract),
            get("contracts/{reference}/bytes", contract_bytes),
            get("denial/{id}", denial),
            get("status", status),
            get("log/checkpoint", checkpoint),
            get("log/entries", entries),
            get("log/inclusion", inclusion),
            get("log/consistency", consistency),
            *more,
        ],
        exception_handlers={HTTPException: _refuse_path, 500: _refuse_bug},
    )


def _route(path: str, method: str, act: Handler) -> Route:
    async def endpoint(request: Request) -> Response:
        try:
            return await act(request)
        except CloisterError as error:
            return _error(error)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it

    return Route(f"{wire.PREFIX}/{path}", endpoint, methods=[method])


async def _body(request: Request, most: int) -> bytes:
    """Return the body, refusing it as soon as it grows beyond the cap."""
    media = request.headers.get("content-type", "")
    if media != wire.MEDIA_TYPE:
        raise PeerError(
            "the request has another content type",
            code="protocol",
            reasons=(Reason("http.content-type", media[:100] or "none", wire.MEDIA_TYPE),),
        )
    parts = bytearray()
    async for part in request.stream():
        parts += part
        if len(parts) > most:
            raise _too_large(most)
    return bytes(parts)


class _TooLargeError(PeerError):
    """Carries its own HTTP status."""


def _too_large(most: int) -> _TooLargeError:
    found, wanted = f"more than {most} bytes", f"at most {most} bytes"
    return _TooLargeError("the request is too large", code="protocol", reasons=(Reason("http.body", found, wanted),))


def _text(request: Request, name: str, pattern: str) -> str:
    try:
        return wire.Text(200, pattern).load(request.path_params[name], name)
    except ValueError as error:
        raise PeerError(
            "the path names nothing", code="protocol", reasons=(Reason("http.path", str(error), pattern),)
        ) from error


def _number(request: Request, name: str) -> int:
    values = request.query_params.getlist(name)
    if len(values) != 1 or not values[0].isascii() or not values[0].isdigit() or len(values[0]) > 15:
        reason = Reason(f"http.query.{name}", repr(",".join(values)[:60]), "one decimal number")
        raise PeerError("the query is not understood", code="protocol", reasons=(reason,))
    return int(values[0])


def _reply(message: wire.Message) -> Response:
    return Response(message.encode(), media_type=wire.MEDIA_TYPE)


def _error(error: CloisterError, status: int | None = None) -> Response:
    if status is None:
        status = 413 if isinstance(error, _TooLargeError) else wire.STATUS[error.family]
    headers = {"connection": "close"} if status == 413 else None
    return Response(wire.ErrorReply.of(error).encode(), status, headers, wire.MEDIA_TYPE)


async def _refuse_path(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 400
    found = f"{request.method} {request.url.path[:200]}"
    reason = Reason("http.path", found, "a route of broker protocol 1", "compare the versions of both sides")
    return _error(PeerError("this broker has no such route", code="protocol", reasons=(reason,)), status)


async def _refuse_bug(_: Request, __: Exception) -> Response:
    # the traceback goes to the broker's own log; the other side learns nothing of it
    return _error(MachineError("the broker failed; its log says why"), 500)


# --- server -----------------------------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """uvicorn that says when it answers, and leaves the process alive after a signal so that the state is closed."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # an idle connection is cut, not asked: the TLS goodbye of a client that sleeps would take the whole grace time
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            transport = getattr(connection, "transport", None)
            if transport is not None and (cycle is None or cycle.response_complete):
                transport.abort()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        try:
            for number in numbers:
                loop.add_signal_handler(number, self.handle_exit, number, None)
        except (ValueError, RuntimeError):  # not the main thread: whoever runs us there stops us there
            yield
            return
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


def make_server(app: Starlette, identity: TlsIdentity, ready: Callable[[], None]) -> Server:
    """Return a server for `app`; run it with `await server.serve(sockets=[...])`."""
    with in_memory(identity.pem) as path:
        config = uvicorn.Config(
            app,
            loop="none",
            http="httptools",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACE_S,
            ssl_certfile=path,
            ssl_keyfile=path,
        )
        config.load()
    if config.ssl is None:
        raise RuntimeError("uvicorn made no TLS context")
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    return Server(config, ready)
