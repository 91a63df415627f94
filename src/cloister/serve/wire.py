"""Messages between a consumer and a query service: frozen types <-> canonical CBOR. Pure; tables in docs/serving.md.

    POST /v1/service  Hello        -> HelloReply   evidence over Binding("service", nonce, key, -, contract, "serve", hash of Hello)
    POST /v1/ask      Ask          -> AskReply     both sealed end to end; whoever carries them sees sizes in steps only

`Ask.sealed` opens with the service's attested HPKE key under ASK_INFO || contract. `AskReply.sealed` is
`nonce (12) || AES-256-GCM` under the reply key in the query, padded to a multiple of `REPLY_STEP`; success and
refusal look alike outside.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import ClassVar, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.broker.wire import (
    DIGEST,
    MAX_EVIDENCE,
    NONCE_BYTES,
    Authorisation,
    Blob,
    ErrorReply,
    Key,
    Maybe,
    Message,
    Nested,
    Text,
    Uint,
)
from cloister.crypto import hpke
from cloister.crypto.canonical import cbor_encode
from cloister.crypto.keys import Secret
from cloister.errors import PeerError

MAX_INPUT: Final = 16 << 20
"""Largest question, 16 MiB."""
ASK_STEP: Final = 1024
"""Questions are padded to multiples of this."""
REPLY_STEP: Final = 4096
"""Replies are padded to multiples of this."""
RECEIPT_ROOM: Final = 3584
"""What a reply needs besides the answer: the receipt is below this until the log has 2^40 entries."""

ASK_INFO: Final = b"cloister/ask/1\x00"
_QUERY_TAG: Final = b"cloister/ask-query/1\x00"
_ANSWER_TAG: Final = b"cloister/ask-answer/1\x00"
_REPLY_AAD: Final = b"cloister/ask-reply/1"

_HASH: Final = Blob(32, 32)
_HPKE: Final = Blob(hpke.PUBLIC_BYTES, hpke.PUBLIC_BYTES)
_RECEIPT: Final = Blob(1, 256 << 10)


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """A consumer's nonce for fresh evidence."""

    nonce: bytes
    FIELDS: ClassVar = {"nonce": Blob(NONCE_BYTES, NONCE_BYTES)}


@dataclass(frozen=True, slots=True)
class HelloReply(Message):
    """What the service shows: evidence, its HPKE key, the contract it serves, the broker's receipt of its release."""

    evidence: bytes
    endorsements: bytes
    key: bytes
    contract: str
    receipt: bytes
    FIELDS: ClassVar = {
        "evidence": Blob(1, MAX_EVIDENCE),
        "endorsements": Blob(0, 1 << 20),
        "key": _HPKE,
        "contract": Text(71, DIGEST),
        "receipt": _RECEIPT,
    }


@dataclass(frozen=True, slots=True)
class Query(Message):
    """One question, readable only inside the service.

    `id` is random, so equal questions have different digests and a copy is recognised; `reply_key` encrypts the
    reply; `signature` is the session key's over `session.query_message(contract, service, digest())`.
    """

    authorisation: Authorisation
    id: bytes
    input: bytes
    reply_key: Secret
    signature: bytes
    pad: bytes
    LIMIT: ClassVar[int] = MAX_INPUT + (64 << 10)
    FIELDS: ClassVar = {
        "authorisation": Nested(Authorisation),
        "id": Blob(16, 16),
        "input": Blob(0, MAX_INPUT),
        "reply_key": Key(),
        "signature": Blob(64, 64),
        "pad": Blob(0, ASK_STEP),
    }


def query_digest(identifier: bytes, data: bytes) -> bytes:
    """Return the SHA-256 that names a question in the log; the random `identifier` hides guessable questions."""
    return hashlib.sha256(_QUERY_TAG + cbor_encode({"id": identifier, "input": data})).digest()


def answer_digest(salt: bytes, answer: bytes) -> bytes:
    """Return the SHA-256 that names an answer in the log; the consumer gets `salt` (16 bytes) and can show both."""
    return hashlib.sha256(_ANSWER_TAG + cbor_encode({"salt": salt, "answer": answer})).digest()


@dataclass(frozen=True, slots=True)
class Ask(Message):
    """A sealed `Query`."""

    sealed: bytes
    LIMIT: ClassVar[int] = MAX_INPUT + (128 << 10)
    FIELDS: ClassVar = {"sealed": Blob(hpke.OVERHEAD_BYTES, MAX_INPUT + (96 << 10))}


@dataclass(frozen=True, slots=True)
class Answered(Message):
    """An answer: `answer` in the fixed size of `answer.encode`, the broker's receipt, what is left of the budget."""

    answer: bytes
    salt: bytes
    receipt: bytes
    left: int | None
    left_today: int | None
    FIELDS: ClassVar = {
        "answer": Blob(4, 4 << 20),
        "salt": Blob(16, 16),
        "receipt": _RECEIPT,
        "left": Maybe(Uint()),
        "left_today": Maybe(Uint()),
    }


@dataclass(frozen=True, slots=True)
class Outcome(Message):
    """Exactly one of both is set."""

    answered: Answered | None
    refused: ErrorReply | None
    FIELDS: ClassVar = {"answered": Maybe(Nested(Answered)), "refused": Maybe(Nested(ErrorReply))}


@dataclass(frozen=True, slots=True)
class AskReply(Message):
    """A sealed `Outcome`."""

    sealed: bytes
    FIELDS: ClassVar = {"sealed": Blob(28, 8 << 20)}


def ask_info(contract: str) -> bytes:
    """Return the HPKE `info` of a question to a service of `contract`."""
    return ASK_INFO + contract.encode("ascii")


def reply_size(answer_bytes: int) -> int:
    """Return the plaintext size that every reply gets when answers encode to `answer_bytes`: refusals look the same."""
    return -(-(answer_bytes + RECEIPT_ROOM) // REPLY_STEP) * REPLY_STEP


def seal_outcome(outcome: Outcome, key: Secret, *, size: int = REPLY_STEP) -> bytes:
    """Return the reply: `outcome` padded to `size` bytes (or the next multiple of it) and encrypted.

    One key seals one reply.
    """
    body = outcome.encode()
    body = len(body).to_bytes(4, "big") + body
    body = body.ljust(-(-len(body) // size) * size, b"\x00")
    nonce = secrets.token_bytes(12)
    return nonce + AESGCM(key.reveal()).encrypt(nonce, body, _REPLY_AAD)


def open_outcome(sealed: bytes, key: Secret) -> Outcome:
    """Inverse of `seal_outcome`.

    Raises:
        PeerError: (code `protocol`) the reply was changed, or is not for this question.
    """
    try:
        body = AESGCM(key.reveal()).decrypt(sealed[:12], sealed[12:], _REPLY_AAD)
    except InvalidTag as error:
        raise PeerError("the reply was changed on its way, or belongs to another question", code="protocol") from error
    size = int.from_bytes(body[:4], "big")
    outcome = Outcome.decode(body[4 : 4 + size])
    if (outcome.answered is None) == (outcome.refused is None):
        raise PeerError("the reply is neither an answer nor a refusal", code="protocol")
    return outcome
