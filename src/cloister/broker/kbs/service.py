"""The KBS protocol over the keeper: three routes and a key set. Edge: draws randomness, has the clock.

    POST /kbs/v0/auth                                   -> challenge, cookie
    POST /kbs/v0/attest                                 -> attestation result token (EAR)
    GET  /kbs/v0/resource/<contract>/<phase>/<asset>    -> the asset's key, as a JWE to the attested key
    GET  /kbs/v0/jwks                                   -> the key that signs tokens (ours, not of the protocol)

`attest` does steps 1 to 3 of a release (nonce, authentic, bound) with the broker's own verifier; each resource is one release
of the keeper with its steps 4 to 9: software, workload, contract, keys. Nothing here decides, and nothing is released by a
token's content: a token or a cookie finds a session, and the session holds what was verified.

Errors are Trustee's: `{"type", "detail"}` with 401 (protocol, evidence, no session), 403 (the contract says no), 404 (no such
contract or path), 413, 500. Details name every broken rule and the denial's id, as the broker's own protocol does.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Final
from weakref import WeakValueDictionary

from cryptography.hazmat.primitives.asymmetric import ec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from cloister.attestation import ear
from cloister.attestation.appraise import appraise
from cloister.attestation.binding import Binding
from cloister.attestation.verify import verify
from cloister.broker import decide
from cloister.broker import wire as native
from cloister.broker.kbs import jwe, session, wire
from cloister.broker.keeper import Keeper
from cloister.crypto.keys import digest
from cloister.errors import CloisterError, EvidenceError, InputError, PeerError, Reason

PREFIX: Final = "/kbs/v0"
JSON: Final = "application/json"
RECEIPT: Final = "cloister-receipt"
"""Header with the log's receipt of a release, base64. Clients of the protocol pass over it."""
_HTTP_DATE: Final = "%a, %d %b %Y %H:%M:%S GMT"
_REPOSITORY: Final = re.compile(rf"(?P<name>{native.NAME})|sha256[:-](?P<digest>[0-9a-f]{{64}})")
_NAME: Final = re.compile(native.NAME)


class _NoSessionError(PeerError):
    """No cookie or token of a session that lives."""


class _NothingThereError(InputError):
    """The path names nothing."""


class _TooLargeError(PeerError):
    """The body is too large."""


class Kbs:
    """The adapter. All methods run on the keeper's event loop.

    Args:
        keeper: decides and releases.
        trusted: what the broker accepts of nodes at a given time.
        clock: the time, with a time zone.
        key: signs tokens, P-256; default: one that lives as long as this object.
    """

    def __init__(
        self,
        keeper: Keeper,
        *,
        trusted: Callable[[datetime], decide.Trusted],
        clock: Callable[[], datetime],
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> None:
        self._keeper, self._trusted, self._clock = keeper, trusted, clock
        self._key = ec.generate_private_key(ec.SECP256R1()) if key is None else key
        self._sessions = session.Sessions()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def routes(self) -> list[Route]:
        """Return the routes, for `service.application`."""
        return [
            _route("/auth", "POST", self._auth),
            _route("/attest", "POST", self._attest),
            _route("/resource/{repository}/{type}/{tag}", "GET", self._resource),
            _route("/jwks", "GET", self._jwks),
            Route("/kbs/{rest:path}", _nothing, methods=["GET", "POST", "PUT", "DELETE", "PATCH"]),
        ]

    # --- the three steps ----------------------------------------------------------------------------------------------

    async def _auth(self, request: Request) -> Response:
        asked = wire.request(await _body(request))
        nonce = base64.b64encode(secrets.token_bytes(wire.NONCE_BYTES)).decode()
        made = self._sessions.challenge(secrets.token_hex(16), nonce, asked.kind, self._clock())
        return _answer(wire.challenge(nonce), made)

    async def _attest(self, request: Request) -> Response:
        identity = request.cookies.get(session.COOKIE, "")
        body = await _body(request)
        now = self._clock()
        done = self._sessions.of_cookie(identity, now)
        if done is not None and done.attested is not None and done.attested.evidence == digest(body):
            return _answer(wire.token_reply(done.attested.token), done)  # the answer was lost, and is asked for again
        taken = self._sessions.answer(identity, now)
        if taken is None:
            raise _no_session()
        try:
            attested = await self._judge(taken, body, now)
        except CloisterError:
            self._sessions.refuse(taken)
            raise
        self._sessions.accept(taken, attested, self._clock())
        return _answer(wire.token_reply(attested.token), taken)

    async def _judge(self, taken: session.Session, body: bytes, now: datetime) -> session.Attested:
        found = wire.attestation(body)
        evidence_digest = digest(body)
        name = found.key.encode()
        trusted = self._trusted(now)
        tee = ""
        try:
            if not secrets.compare_digest(found.nonce.encode("utf-8", "replace"), taken.nonce.encode()):
                raise _stale(found.nonce, taken.nonce)
            evidence = wire.evidence(taken.kind, found)
            claims = verify(evidence, trusted.endorsements, trusted.roots, now=now)
            tee = claims.tee
            reasons = wire.bound(claims, found)
            if reasons:
                raise EvidenceError(
                    "the evidence is not bound to this session", code="evidence-unacceptable", reasons=reasons
                )
        except EvidenceError as error:
            await self._keeper.refuse_evidence(error, key=name, evidence=evidence_digest, tee=tee)
        claims, unbound = wire.with_workload(claims, found.init_data)
        policy = decide.software_policy(claims, trusted)
        token = ear.issue(
            claims,
            policy,
            (*unbound, *appraise(claims, policy)),
            binding=Binding("release", base64.b64decode(taken.nonce), name),
            key=self._key,
            now=now,
            lifetime=session.SESSION_LIFE,
        )
        return session.Attested(found.key, claims, unbound, evidence_digest, token)

    async def _resource(self, request: Request) -> Response:
        found = self._session(request)
        path = request.url.path
        async with self._locks.setdefault(found.id, asyncio.Lock()):
            reply = found.replies.get(path)
            if reply is None:
                reply = await self._release(found, request)
                self._sessions.keep(found, path, reply)
        return _answer(reply[0], found, {RECEIPT: base64.b64encode(reply[1]).decode()})

    async def _release(self, found: session.Session, request: Request) -> tuple[bytes, bytes]:
        attested = found.attested
        if attested is None:
            raise RuntimeError("a session that is attested has what was attested")
        if len(found.replies) >= session.MAX_RESOURCES:
            reason = Reason("kbs.resource", f"{len(found.replies)} resources", f"at most {session.MAX_RESOURCES}")
            raise PeerError("this session asked for too much: attest again", code="protocol", reasons=(reason,))
        ask = self._ask(request)
        (asset,) = ask.reads
        return await self._keeper.release_to(
            ask,
            attested.claims,
            stale=(),
            bound=attested.bound,
            key=attested.key.encode(),
            evidence=attested.evidence,
            seal=lambda payload: jwe.encrypt(payload.keys[asset].key.reveal(), attested.key),
        )

    def _ask(self, request: Request) -> native.ReleaseAsk:
        repository, phase, asset = (str(request.path_params[name]) for name in ("repository", "type", "tag"))
        named = _REPOSITORY.fullmatch(repository)
        if named is None or not _NAME.fullmatch(phase) or not _NAME.fullmatch(asset):
            raise _nothing_there(request, "<contract name or sha256-…>/<phase>/<asset>")
        reference = named["name"] or f"sha256:{named['digest']}"
        try:
            contract = self._keeper.contract(reference).contract
        except InputError as error:
            raise _nothing_there(request, "a contract of this broker") from error
        return native.ReleaseAsk(contract, phase, (asset,), ())

    async def _jwks(self, _: Request) -> Response:
        point = self._key.public_key().public_numbers()
        x, y = (wire.b64url(each.to_bytes(32, "big")) for each in (point.x, point.y))
        key = {"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "x": x, "y": y}
        return Response(json.dumps({"keys": [key]}), media_type=JSON)

    def _session(self, request: Request) -> session.Session:
        now = self._clock()
        bearer = request.headers.get("authorization")
        if bearer is not None:
            scheme, _, token = bearer.partition(" ")
            found = self._sessions.of_token(token, now) if scheme.lower() == "bearer" else None
        else:
            found = self._sessions.of_cookie(request.cookies.get(session.COOKIE, ""), now)
        if found is None:
            raise _no_session()
        return found


# --- HTTP -------------------------------------------------------------------------------------------------------------


def _route(path: str, method: str, act: Callable[[Request], Awaitable[Response]]) -> Route:
    async def endpoint(request: Request) -> Response:
        try:
            return await act(request)
        except CloisterError as error:
            return _error(error, attesting=path == "/attest")
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it

    return Route(PREFIX + path, endpoint, methods=[method])


async def _nothing(request: Request) -> Response:
    return _error(_nothing_there(request, "a route of KBS protocol 0.4.0: auth, attest or resource"))


async def _body(request: Request) -> bytes:
    parts = bytearray()
    async for part in request.stream():
        parts += part
        if len(parts) > wire.LIMIT:
            reason = Reason("http.body", f"more than {wire.LIMIT} bytes", f"at most {wire.LIMIT} bytes")
            raise _TooLargeError("the request is too large", code="protocol", reasons=(reason,))
    return bytes(parts)


def _answer(body: bytes, found: session.Session, headers: dict[str, str] | None = None) -> Response:
    expires = found.expires.astimezone(UTC).strftime(_HTTP_DATE)
    cookie = {"set-cookie": f"{session.COOKIE}={found.id}; Expires={expires}"}
    return Response(body, headers=cookie | (headers or {}), media_type=JSON)


def _error(error: CloisterError, *, attesting: bool = False) -> Response:
    status, kind = _status(error, attesting)
    lines = [error.message, *(str(reason) for reason in error.reasons[:32])]
    if error.hint:
        lines.append(error.hint)
    headers = {"connection": "close"} if status == 413 else None
    return Response(wire.problem(kind, "; ".join(lines)), status, headers, JSON)


def _status(error: CloisterError, attesting: bool) -> tuple[int, str]:
    """HTTP status, and the last part of `type`: Trustee's names where it has one."""
    if isinstance(error, _TooLargeError):
        return 413, "InvalidRequest"
    if isinstance(error, _NothingThereError):
        return 404, "InvalidRequestPath"
    if isinstance(error, _NoSessionError):
        return 401, "TokenNotFound"
    if error.family in ("denied", "waiting") or (error.family == "evidence" and not attesting):
        return 403, "PolicyDeny"
    if error.family in ("evidence", "peer", "input"):
        return 401, "AttestationError"
    return 500, "InternalError"


def _no_session() -> _NoSessionError:
    reason = Reason("kbs.session", "no session that lives", "a cookie or token of this broker", "attest again")
    return _NoSessionError("attest first", code="protocol", reasons=(reason,))


def _nothing_there(request: Request, wanted: str) -> _NothingThereError:
    found = f"{request.method} {request.url.path[:200]}"
    return _NothingThereError("there is nothing here", reasons=(Reason("http.path", found, wanted),))


def _stale(found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "the evidence was made for another session",
        code="evidence-stale",
        reasons=(Reason("kbs.nonce", found[:64], wanted, "answer the challenge of this session"),),
    )
