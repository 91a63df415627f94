"""Every message of broker protocol 1: frozen types <-> canonical CBOR. Pure; docs/protocol.md has the tables.

A message is one canonical CBOR map (RFC 8949 section 4.2.1) with exactly the keys of its `FIELDS`: a missing key, an
unknown key, another type, a size or a range outside the field's limits, or another encoding of the same value is
refused. So the digest of a message is the digest of its meaning, and what signs or binds a message signs its bytes.

Rules of parsing, in this order:

  1 size      at most `LIMIT` bytes, before anything is decoded
  2 CBOR      canonical, one value, no trailing bytes
  3 shape     a map with exactly the keys of `FIELDS`
  4 fields    each value passes its field's type, size, range and pattern

All refusals are `PeerError` with code `protocol` and name the field. Building a message from Python runs step 4 too
and raises `ValueError`: an object that exists can be encoded, and decodes to itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, ClassVar, Final, Protocol, Self

from cloister.crypto import hpke
from cloister.crypto.canonical import cbor_decode, cbor_encode
from cloister.crypto.keys import Secret, derive
from cloister.errors import (
    CODES,
    CloisterError,
    DeniedError,
    EvidenceError,
    InputError,
    MachineError,
    PeerError,
    Reason,
    TamperedError,
    WaitingError,
)

MEDIA_TYPE: Final = "application/cbor"
PREFIX: Final = "/v1"

NONCE_BYTES: Final = 32
VOLUME_ID_BYTES: Final = 16
MAX_REQUEST: Final = 2 << 20
"""Largest request body, 2 MiB: a contract and evidence are at most 1 MiB each; everything else is far below."""
MAX_EVIDENCE: Final = 1 << 20
"""Evidence in a message: a quote, logs of 300 kB and eight GPUs fit twice. The format itself has room for 8 MiB
(`attestation.evidence.LIMITS`): that is for files, and strangers may send requests to a broker."""
MAX_VALUES: Final = 1 << 15
"""CBOR values in one message: a list of a thousand log lines has two thousand, and decoding a hundred thousand takes 0.3 s."""
MAX_REPLY: Final = 16 << 20
"""Largest answer, 16 MiB: only log entries come near it."""

# info strings of HPKE messages; what follows the zero byte is the transcript.
RELEASE_INFO: Final = b"cloister/release/1\x00"
KEY_INFO: Final = b"cloister/key/1\x00"
OPEN_INFO: Final = b"cloister/open/1\x00"
LISTEN_INFO: Final = b"cloister/listen/1\x00"

QUERY_TAG: Final = b"cloister/query/1\x00"
"""What a session key signs begins with this."""

# labels of HMACs under a lease secret
REGISTER_LABEL: Final = "cloister/register/1"
ANSWER_LABEL: Final = "cloister/answer/1"
WORDS_LABEL: Final = "cloister/words/1"

NAME: Final = r"[a-z][a-z0-9-]{0,39}"
DIGEST: Final = r"sha256:[0-9a-f]{64}"
FINGERPRINT: Final = r"SHA256:[A-Za-z0-9+/]{43}"
LEASE: Final = r"l-[0-9a-f]{32}"
ROOT: Final = r"[a-z][a-z0-9-]{0,31}:[0-9a-f]{64}"
DENIAL: Final = r"d-[0-9a-f]{12}"


_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)


def sha256(data: bytes) -> bytes:
    """Return the 32 bytes that bindings and statements name a longer byte string by."""
    return hashlib.sha256(data).digest()


def format_time(moment: datetime) -> str:
    """Return `moment` as RFC 3339 in UTC with microseconds, `2026-11-20T10:30:00.000000Z`.

    Raises:
        ValueError: `moment` has no time zone.
    """
    if moment.tzinfo is None:
        raise ValueError("a time without a time zone")
    return moment.astimezone(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def parse_time(text: str) -> datetime:
    """Inverse of `format_time`.

    Raises:
        ValueError: any other form.
    """
    if _TIME.fullmatch(text) is None:
        raise ValueError(f"not an RFC 3339 time in UTC with microseconds: {text[:40]!r}")
    return datetime.fromisoformat(text)


# --- fields -----------------------------------------------------------------------------------------------------------


class Field(Protocol):
    """One value: `dump` to what CBOR carries, `load` back, `check` a Python value; errors are ValueError with the place."""

    def dump(self, value: Any) -> Any: ...

    def load(self, value: Any, where: str) -> Any: ...

    def check(self, value: Any, where: str) -> None: ...


class _Plain:
    """Fields whose Python value is what CBOR carries."""

    __slots__ = ()

    def dump(self, value: Any) -> Any:
        return value

    def load(self, value: Any, where: str) -> Any:
        raise NotImplementedError

    def check(self, value: Any, where: str) -> None:
        self.load(value, where)


@dataclass(frozen=True, slots=True)
class Text(_Plain):
    """A string of at most `most` characters that matches `pattern` entirely."""

    most: int = 200
    pattern: str = ""

    def load(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or len(value) > self.most:
            raise ValueError(f"{where}: wants text of at most {self.most} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: wants Unicode text without lone surrogates") from None
        if self.pattern and re.fullmatch(self.pattern, value) is None:
            raise ValueError(f"{where}: wants text of the form {self.pattern}")
        return value


@dataclass(frozen=True, slots=True)
class Blob(_Plain):
    """A byte string of `least` to `most` bytes."""

    least: int
    most: int

    def load(self, value: Any, where: str) -> bytes:
        if not isinstance(value, bytes) or not self.least <= len(value) <= self.most:
            raise ValueError(f"{where}: wants {self.least} to {self.most} bytes")
        return value


@dataclass(frozen=True, slots=True)
class Uint(_Plain):
    """An integer from 0 to `most`; `bool` is no integer here."""

    most: int = (1 << 53) - 1

    def load(self, value: Any, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= self.most:
            raise ValueError(f"{where}: wants an integer from 0 to {self.most}")
        return value


@dataclass(frozen=True, slots=True)
class Flag(_Plain):
    """True or false."""

    def load(self, value: Any, where: str) -> bool:
        if value is not True and value is not False:
            raise ValueError(f"{where}: wants true or false")
        return bool(value)


@dataclass(frozen=True, slots=True)
class Time:
    """A point in time, UTC, microseconds; text on the wire (see `format_time`)."""

    def dump(self, value: Any) -> Any:
        return format_time(value) if isinstance(value, datetime) else value

    def load(self, value: Any, where: str) -> datetime:
        if not isinstance(value, str) or len(value) > 40:
            raise ValueError(f"{where}: wants an RFC 3339 time")
        try:
            return parse_time(value)
        except ValueError:
            raise ValueError(f"{where}: wants an RFC 3339 time in UTC with microseconds") from None

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, datetime) or value.tzinfo is None:
            raise ValueError(f"{where}: wants a time with a time zone")


@dataclass(frozen=True, slots=True)
class Key:
    """32 secret bytes; `Secret` in Python, so that no repr shows them."""

    def dump(self, value: Any) -> Any:
        return value.reveal() if isinstance(value, Secret) else None

    def load(self, value: Any, where: str) -> Secret:
        if not isinstance(value, bytes) or len(value) != 32:
            raise ValueError(f"{where}: wants a key of 32 bytes")
        return Secret(value)

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, Secret) or len(value) != 32:
            raise ValueError(f"{where}: wants a Secret of 32 bytes")


@dataclass(frozen=True, slots=True)
class Maybe:
    """`inner`, or null for None."""

    inner: Field

    def dump(self, value: Any) -> Any:
        return None if value is None else self.inner.dump(value)

    def load(self, value: Any, where: str) -> Any:
        return None if value is None else self.inner.load(value, where)

    def check(self, value: Any, where: str) -> None:
        if value is not None:
            self.inner.check(value, where)


@dataclass(frozen=True, slots=True)
class Many:
    """A list of at most `most`; a tuple in Python."""

    inner: Field
    most: int

    def dump(self, value: Any) -> Any:
        return [self.inner.dump(item) for item in value] if isinstance(value, tuple) else None

    def load(self, value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > self.most:
            raise ValueError(f"{where}: wants a list of at most {self.most}")
        return tuple(self.inner.load(item, f"{where}[{index}]") for index, item in enumerate(value))

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, tuple) or len(value) > self.most:
            raise ValueError(f"{where}: wants a tuple of at most {self.most}")
        for index, item in enumerate(value):
            self.inner.check(item, f"{where}[{index}]")


@dataclass(frozen=True, slots=True)
class Names:
    """A list of different asset names in ascending order: one encoding per set."""

    most: int = 256

    def dump(self, value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else None

    def load(self, value: Any, where: str) -> tuple[str, ...]:
        names = Many(Text(40, NAME), self.most).load(value, where)
        if list(names) != sorted(set(names)):
            raise ValueError(f"{where}: wants different names in ascending order")
        return names

    def check(self, value: Any, where: str) -> None:
        self.load(self.dump(value), where)


@dataclass(frozen=True, slots=True)
class Table:
    """A map of names to `inner`, at most `most`."""

    inner: Field
    most: int = 256

    def dump(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return None
        return {name: self.inner.dump(item) for name, item in value.items()}

    def load(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, dict) or len(value) > self.most:
            raise ValueError(f"{where}: wants a map of at most {self.most}")
        name_of = Text(40, NAME)
        return MappingProxyType(
            {name_of.load(name, where): self.inner.load(item, f"{where}.{name}") for name, item in value.items()}
        )

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping) or len(value) > self.most:
            raise ValueError(f"{where}: wants a mapping of at most {self.most}")
        for name, item in value.items():
            Text(40, NAME).check(name, where)
            self.inner.check(item, f"{where}.{name}")


@dataclass(frozen=True, slots=True)
class Nested:
    """Another message as a map."""

    message: type[Message]

    def dump(self, value: Any) -> Any:
        return value.as_map() if isinstance(value, self.message) else None

    def load(self, value: Any, where: str) -> Any:
        return self.message.from_map(value, where)

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, self.message):  # one that exists is valid
            raise ValueError(f"{where}: wants a {self.message.__name__}")  # noqa: TRY004  # one error type for all fields


class Message:
    """Base of all messages. Subclasses are frozen dataclasses whose fields are the keys of `FIELDS`, in any order."""

    __slots__ = ()
    FIELDS: ClassVar[Mapping[str, Field]]
    LIMIT: ClassVar[int] = MAX_REQUEST

    def __post_init__(self) -> None:
        for name, field in self.FIELDS.items():
            field.check(getattr(self, name), f"{type(self).__name__}.{name}")

    def as_map(self) -> dict[str, Any]:
        return {name: field.dump(getattr(self, name)) for name, field in self.FIELDS.items()}

    @classmethod
    def from_map(cls, value: Any, where: str) -> Self:
        """Return the message of a decoded map.

        Raises:
            ValueError: step 3 or 4 refuses; the text names the field, never its value.
        """
        if type(value) is not dict:
            raise ValueError(f"{where}: wants a map")
        missing = sorted(set(cls.FIELDS) - set(value))
        unknown = [name for name in value if name not in cls.FIELDS]
        if missing or unknown:
            found = [repr(name)[:60] for name in unknown[:8]]
            raise ValueError(f"{where}: missing keys {missing}, unknown keys {found}")
        message = object.__new__(cls)  # `load` checks what `__post_init__` would check again
        for name, field in cls.FIELDS.items():
            object.__setattr__(message, name, field.load(value[name], f"{where}.{name}"))
        return message

    def encode(self) -> bytes:
        return cbor_encode(self.as_map())

    def hashed(self) -> bytes:
        """SHA-256 of the encoding: what a binding carries as `request`."""
        return sha256(self.encode())

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Return the message of `data`.

        Raises:
            PeerError: code `protocol`; see the rules of parsing above.
        """
        try:
            return cls.from_map(cbor_decode(data, limit=cls.LIMIT, items=MAX_VALUES), cls.__name__)
        except ValueError as error:
            raise PeerError(
                f"the other side sent something else than a {cls.__name__}",
                code="protocol",
                reasons=(Reason("message", str(error)[:500], f"{cls.__name__} as docs/protocol.md has it"),),
                hint="both sides must speak broker protocol 1; compare their versions",
            ) from error


_DIGEST: Final = Text(71, DIGEST)
_NAME: Final = Text(40, NAME)
_HASH: Final = Blob(32, 32)
_HPKE: Final = Blob(hpke.PUBLIC_BYTES, hpke.PUBLIC_BYTES)
_EVIDENCE: Final = Blob(1, MAX_EVIDENCE)
_ARMOUR: Final = Text(32 << 10)
_RECEIPT: Final = Blob(1, 256 << 10)
_SEALED: Final = Blob(hpke.OVERHEAD_BYTES, 1 << 20)


# --- the broker shows itself ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttestRequest(Message):
    """`POST attest`: the client's nonce."""

    nonce: bytes
    FIELDS: ClassVar = {"nonce": Blob(NONCE_BYTES, NONCE_BYTES)}


@dataclass(frozen=True, slots=True)
class AttestReply(Message):
    """Evidence over Binding("broker", nonce, `key`, SPKI hash of the broker's TLS key, "", "", digest of the request).

    `next_nonce` is one as `POST nonce` gives: a node that connects in order to ask saves a round trip.
    """

    evidence: bytes
    key: bytes
    time: datetime
    next_nonce: bytes
    FIELDS: ClassVar = {
        "evidence": _EVIDENCE,
        "key": _HPKE,
        "time": Time(),
        "next_nonce": Blob(NONCE_BYTES, NONCE_BYTES),
    }


@dataclass(frozen=True, slots=True)
class BrokerConfig(Message):
    """Data of the runtime event `cloister/config/1`: what this broker accepts, measured before it answers.

    `log_key` is the verifier key of the log (C2SP signed-note). Vendor roots are pinned in the measured software; `roots` are
    those that the operator adds, as `<kind of evidence>:<SHA-256 of the DER certificate>` in ascending order: whoever has the key of
    one of them makes nodes as he likes, so clients judge them. `allow_soft` says whether the published test root counts besides
    them, `kbs` whether clients of Trustee's protocol get keys too: what they prove is less (docs/kbs.md).
    """

    version: int
    origin: str
    log_key: str
    node_measurements: tuple[bytes, ...]
    roots: tuple[str, ...]
    allow_soft: bool
    lease_s: int
    kbs: bool
    FIELDS: ClassVar = {
        "version": Uint(1),
        "origin": Text(200, r"[a-z0-9][a-z0-9./-]*"),
        "log_key": Text(400, r"[!-~]+"),
        "node_measurements": Many(Blob(16, 64), 256),
        "roots": Many(Text(100, ROOT), 64),
        "allow_soft": Flag(),
        "lease_s": Uint(86_400),
        "kbs": Flag(),
    }


@dataclass(frozen=True, slots=True)
class NonceReply(Message):
    """`POST nonce`: good for one use within `seconds`."""

    nonce: bytes
    seconds: int
    FIELDS: ClassVar = {"nonce": Blob(NONCE_BYTES, NONCE_BYTES), "seconds": Uint(3600)}


@dataclass(frozen=True, slots=True)
class StatusReply(Message):
    """`GET status`."""

    version: str
    origin: str
    time: datetime
    epoch: int
    entries: int
    contracts: int
    leases: int
    soft: bool
    FIELDS: ClassVar = {
        "version": Text(40),
        "origin": Text(200),
        "time": Time(),
        "epoch": Uint(),
        "entries": Uint(),
        "contracts": Uint(),
        "leases": Uint(),
        "soft": Flag(),
    }


# --- contracts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ContractSubmit(Message):
    """`POST contract`: the exact bytes of a contract file; `name` is its file name, for messages."""

    name: str
    toml: bytes
    FIELDS: ClassVar = {"name": Text(255), "toml": Blob(1, 1 << 20)}


@dataclass(frozen=True, slots=True)
class SignatureSubmit(Message):
    """`POST signature`: one party's SSHSIG (namespace `contract@cloister`) over the file bytes."""

    contract: str
    signature: str
    FIELDS: ClassVar = {"contract": _DIGEST, "signature": _ARMOUR}


@dataclass(frozen=True, slots=True)
class ContractStatus(Message):
    """`GET contracts/<id or name>`: where a contract stands. `required`, `signed`, `waiting` are names of parties."""

    contract: str
    name: str
    version: int
    replaces: str | None
    expires: str
    state: str
    required: tuple[str, ...]
    signed: tuple[str, ...]
    waiting: tuple[str, ...]
    FIELDS: ClassVar = {
        "contract": _DIGEST,
        "name": _NAME,
        "version": Uint(),
        "replaces": Maybe(_DIGEST),
        "expires": Text(10, r"[0-9]{4}-[0-9]{2}-[0-9]{2}"),
        "state": Text(10, r"waiting|active|replaced|revoked|expired"),
        "required": Many(Text(200), 1024),
        "signed": Many(Text(200), 1024),
        "waiting": Many(Text(200), 1024),
    }


@dataclass(frozen=True, slots=True)
class ContractList(Message):
    """`GET contracts`."""

    contracts: tuple[ContractStatus, ...]
    LIMIT: ClassVar[int] = MAX_REPLY
    FIELDS: ClassVar = {"contracts": Many(Nested(ContractStatus), 10_000)}


@dataclass(frozen=True, slots=True)
class RevokeStatement(Message):
    """What a required signer signs (namespace `contract@cloister`) to end a contract."""

    contract: str
    action: str = "revoke"
    FIELDS: ClassVar = {"contract": _DIGEST, "action": Text(6, "revoke")}


@dataclass(frozen=True, slots=True)
class RevokeRequest(Message):
    """`POST revoke`."""

    statement: RevokeStatement
    signature: str
    FIELDS: ClassVar = {"statement": Nested(RevokeStatement), "signature": _ARMOUR}


# --- keys -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeyStatement(Message):
    """What an owner signs (namespace `key@cloister`) to deposit the key of a volume with exactly one broker.

    `sealed` and `broker` are SHA-256 of the sealed key and of the broker's HPKE public key.
    """

    digest: str
    volume_id: bytes
    generation: int
    sealed: bytes
    broker: bytes
    FIELDS: ClassVar = {
        "digest": _DIGEST,
        "volume_id": Blob(VOLUME_ID_BYTES, VOLUME_ID_BYTES),
        "generation": Uint(1 << 48),  # versions that are written over it get the next ones
        "sealed": _HASH,
        "broker": _HASH,
    }


@dataclass(frozen=True, slots=True)
class KeyDeposit(Message):
    """`POST key`: `sealed` is the volume key, HPKE-sealed to the broker under KEY_INFO || digest || volume id."""

    statement: KeyStatement
    sealed: bytes
    signature: str
    FIELDS: ClassVar = {
        "statement": Nested(KeyStatement),
        "sealed": Blob(hpke.OVERHEAD_BYTES + 32, hpke.OVERHEAD_BYTES + 32),
        "signature": _ARMOUR,
    }


def key_info(digest: str, volume_id: bytes) -> bytes:
    """Return the HPKE `info` of a deposited key."""
    return KEY_INFO + cbor_encode({"digest": digest, "volume_id": volume_id})


@dataclass(frozen=True, slots=True)
class Receipted(Message):
    """An answer that carries nothing but the receipt of its log entry (bytes of receipt JSON)."""

    receipt: bytes
    FIELDS: ClassVar = {"receipt": _RECEIPT}


@dataclass(frozen=True, slots=True)
class ReleasedKey(Message):
    """The key of one sealed volume and which version of it is the current one."""

    key: Secret
    digest: str
    generation: int
    volume_id: bytes
    FIELDS: ClassVar = {
        "key": Key(),
        "digest": _DIGEST,
        "generation": Uint(),
        "volume_id": Blob(VOLUME_ID_BYTES, VOLUME_ID_BYTES),
    }


@dataclass(frozen=True, slots=True)
class OutputKey(Message):
    """The key under which an output is sealed; `generation` is the one to write, `previous` the root it follows."""

    key: Secret
    volume_id: bytes
    generation: int
    previous: str | None
    owner: str
    FIELDS: ClassVar = {
        "key": Key(),
        "volume_id": Blob(VOLUME_ID_BYTES, VOLUME_ID_BYTES),
        "generation": Uint(),
        "previous": Maybe(_DIGEST),
        "owner": _NAME,
    }


@dataclass(frozen=True, slots=True)
class Lease(Message):
    """The right to go on: `secret` authenticates register and answer, `renew_after` is half life."""

    id: str
    secret: Secret
    expires: datetime
    renew_after: datetime
    FIELDS: ClassVar = {"id": Text(34, LEASE), "secret": Key(), "expires": Time(), "renew_after": Time()}


@dataclass(frozen=True, slots=True)
class ReleaseAsk(Message):
    """What a node asks for. Its digest is the `request` of the binding."""

    contract: str
    phase: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    FIELDS: ClassVar = {"contract": _DIGEST, "phase": _NAME, "reads": Names(), "writes": Names()}


@dataclass(frozen=True, slots=True)
class ReleaseRequest(Message):
    """`POST release`: evidence over Binding("release", nonce, key, broker's SPKI hash, contract, phase, ask digest)."""

    ask: ReleaseAsk
    nonce: bytes
    key: bytes
    evidence: bytes
    FIELDS: ClassVar = {
        "ask": Nested(ReleaseAsk),
        "nonce": Blob(NONCE_BYTES, NONCE_BYTES),
        "key": _HPKE,
        "evidence": _EVIDENCE,
    }


@dataclass(frozen=True, slots=True)
class ReleaseReply(Message):
    """`sealed` opens to a `ReleasePayload` with the attested key under RELEASE_INFO || binding."""

    sealed: bytes
    receipt: bytes
    FIELDS: ClassVar = {"sealed": _SEALED, "receipt": _RECEIPT}


@dataclass(frozen=True, slots=True)
class ReleasePayload(Message):
    """What only the attested node reads."""

    keys: Mapping[str, ReleasedKey]
    outputs: Mapping[str, OutputKey]
    lease: Lease
    FIELDS: ClassVar = {
        "keys": Table(Nested(ReleasedKey)),
        "outputs": Table(Nested(OutputKey)),
        "lease": Nested(Lease),
    }


@dataclass(frozen=True, slots=True)
class RenewAsk(Message):
    """Which lease to renew. Its digest is the `request` of the binding."""

    lease: str
    FIELDS: ClassVar = {"lease": Text(34, LEASE)}


@dataclass(frozen=True, slots=True)
class RenewRequest(Message):
    """`POST renew`: evidence over Binding("renew", nonce, key, SPKI hash, contract, phase, ask digest)."""

    ask: RenewAsk
    nonce: bytes
    key: bytes
    evidence: bytes
    FIELDS: ClassVar = {
        "ask": Nested(RenewAsk),
        "nonce": Blob(NONCE_BYTES, NONCE_BYTES),
        "key": _HPKE,
        "evidence": _EVIDENCE,
    }


@dataclass(frozen=True, slots=True)
class RenewReply(Message):
    """The lease's new times."""

    expires: datetime
    renew_after: datetime
    receipt: bytes
    FIELDS: ClassVar = {"expires": Time(), "renew_after": Time(), "receipt": _RECEIPT}


@dataclass(frozen=True, slots=True)
class RegisterStatement(Message):
    """A new version of an output: authenticated by HMAC under the lease secret, label REGISTER_LABEL."""

    lease: str
    asset: str
    digest: str
    generation: int
    FIELDS: ClassVar = {"lease": Text(34, LEASE), "asset": _NAME, "digest": _DIGEST, "generation": Uint()}


@dataclass(frozen=True, slots=True)
class RegisterRequest(Message):
    """`POST register`."""

    statement: RegisterStatement
    mac: bytes
    FIELDS: ClassVar = {"statement": Nested(RegisterStatement), "mac": _HASH}


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionStatement(Message):
    """What a consumer signs once an hour (namespace `ask@cloister`): `session`, an Ed25519 public key, asks for him.

    `service` is SHA-256 of the HPKE key of the service that he attested.
    """

    service: bytes
    contract: str
    session: bytes
    expires: datetime
    FIELDS: ClassVar = {"service": _HASH, "contract": _DIGEST, "session": _HASH, "expires": Time()}


@dataclass(frozen=True, slots=True)
class Authorisation(Message):
    """A session statement and the SSHSIG over its encoding."""

    statement: SessionStatement
    signature: str
    FIELDS: ClassVar = {"statement": Nested(SessionStatement), "signature": _ARMOUR}


def query_message(*, contract: str, service: bytes, query: bytes) -> bytes:
    """Return the bytes that the session key signs for one query; `service` and `query` are SHA-256 digests."""
    return QUERY_TAG + cbor_encode({"contract": contract, "service": service, "query": query})


@dataclass(frozen=True, slots=True)
class AnswerStatement(Message):
    """One query that a service is about to answer: HMAC under the lease secret, label ANSWER_LABEL.

    `query` and `answer` are SHA-256; a query holds a random value, so no two are equal. `query_signature` is the
    session key's Ed25519 signature over `query_message(...)`.
    """

    lease: str
    authorisation: Authorisation
    query: bytes
    query_signature: bytes
    answer: bytes
    FIELDS: ClassVar = {
        "lease": Text(34, LEASE),
        "authorisation": Nested(Authorisation),
        "query": _HASH,
        "query_signature": Blob(64, 64),
        "answer": _HASH,
    }


@dataclass(frozen=True, slots=True)
class AnswerRequest(Message):
    """`POST answer`."""

    statement: AnswerStatement
    mac: bytes
    FIELDS: ClassVar = {"statement": Nested(AnswerStatement), "mac": _HASH}


@dataclass(frozen=True, slots=True)
class AnswerReply(Message):
    """One answer was spent; `left` of the whole budget, `left_today` of the day's (None: no such limit)."""

    receipt: bytes
    left: int | None
    left_today: int | None
    FIELDS: ClassVar = {"receipt": _RECEIPT, "left": Maybe(Uint()), "left_today": Maybe(Uint())}


# --- owners open what is theirs ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenStatement(Message):
    """What an owner signs (namespace `open@cloister`) to get a key: `key` and `broker` are SHA-256 of HPKE keys."""

    contract: str
    asset: str
    key: bytes
    broker: bytes
    expires: datetime
    FIELDS: ClassVar = {"contract": _DIGEST, "asset": _NAME, "key": _HASH, "broker": _HASH, "expires": Time()}


@dataclass(frozen=True, slots=True)
class OpenRequest(Message):
    """`POST open`: one signature for a party's asset, the members' signatures for a board's."""

    statement: OpenStatement
    key: bytes
    signatures: tuple[str, ...]
    FIELDS: ClassVar = {"statement": Nested(OpenStatement), "key": _HPKE, "signatures": Many(_ARMOUR, 64)}


@dataclass(frozen=True, slots=True)
class OpenReply(Message):
    """`sealed` opens to a `ReleasedKey` with the owner's ephemeral key under OPEN_INFO || statement."""

    sealed: bytes
    receipt: bytes
    FIELDS: ClassVar = {"sealed": _SEALED, "receipt": _RECEIPT}


# --- words that leave while a phase runs ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WordsBatch(Message):
    """Lines of one stream in their order. `dropped`: lines that never left the node so far; `end`: its program is over."""

    lines: tuple[str, ...]
    dropped: int
    end: bool
    FIELDS: ClassVar = {"lines": Many(Text(2000), 256), "dropped": Uint(), "end": Flag()}


@dataclass(frozen=True, slots=True)
class WordsStatement(Message):
    """One batch of a lease: HMAC under the lease secret, label WORDS_LABEL.

    `peer_key` is SHA-256 of the TLS key that the broker shows in this run, `seq` grows with every batch of the lease, and
    `sealed` is a `WordsBatch` (nonce, AES-256-GCM) under a key of the lease secret (docs/protocol.md 7).
    """

    lease: str
    peer_key: bytes
    seq: int
    stream: str
    sealed: bytes
    FIELDS: ClassVar = {
        "lease": Text(34, LEASE),
        "peer_key": _HASH,
        "seq": Uint(),
        "stream": Text(7, r"metrics|logs"),
        "sealed": Blob(28, 96 << 10),
    }


def words_key(secret: Secret) -> Secret:
    """Return the key that batches of a lease are sealed under (`crypto.keys.wrap`)."""
    return Secret(derive(secret, "cloister/words-key/1"))


def words_context(lease: str, seq: int, stream: str) -> bytes:
    """Return what a sealed batch is bound to: its place in one stream of one lease."""
    return cbor_encode({"lease": lease, "seq": seq, "stream": stream})


@dataclass(frozen=True, slots=True)
class WordsRequest(Message):
    """`POST words`."""

    statement: WordsStatement
    mac: bytes
    FIELDS: ClassVar = {"statement": Nested(WordsStatement), "mac": _HASH}


@dataclass(frozen=True, slots=True)
class WordsReply(Message):
    """The batch `seq` is kept."""

    seq: int
    FIELDS: ClassVar = {"seq": Uint()}


@dataclass(frozen=True, slots=True)
class ListenStatement(Message):
    """What a party signs (namespace `listen@cloister`) to hear a phase, or with an empty `phase` all that name it.

    `key` and `broker` are SHA-256 of HPKE keys.
    """

    contract: str
    phase: str
    key: bytes
    broker: bytes
    expires: datetime
    FIELDS: ClassVar = {
        "contract": _DIGEST,
        "phase": Text(40, rf"({NAME})?"),
        "key": _HASH,
        "broker": _HASH,
        "expires": Time(),
    }


@dataclass(frozen=True, slots=True)
class ListenRequest(Message):
    """`POST listen`: what came after the cursor `after` of the broker's run `epoch`; both 0 for everything."""

    statement: ListenStatement
    key: bytes
    signature: str
    epoch: int
    after: int
    FIELDS: ClassVar = {
        "statement": Nested(ListenStatement),
        "key": _HPKE,
        "signature": _ARMOUR,
        "epoch": Uint(),
        "after": Uint(),
    }


@dataclass(frozen=True, slots=True)
class ListenReply(Message):
    """`sealed` opens to a `ListenPayload` with the party's ephemeral key under LISTEN_INFO || SHA-256(request)."""

    sealed: bytes
    FIELDS: ClassVar = {"sealed": _SEALED}


@dataclass(frozen=True, slots=True)
class WordsLease(Message):
    """A lease that spoke: from when to when (the broker's clock), whether it still may, and how many lines are missing."""

    lease: str
    phase: str
    first: datetime
    last: datetime
    live: bool
    dropped: int
    FIELDS: ClassVar = {
        "lease": Text(34, LEASE),
        "phase": _NAME,
        "first": Time(),
        "last": Time(),
        "live": Flag(),
        "dropped": Uint(),
    }


@dataclass(frozen=True, slots=True)
class WordsLine(Message):
    """One line: whose, of which stream, when it reached the broker."""

    lease: str
    stream: str
    time: datetime
    text: str
    FIELDS: ClassVar = {
        "lease": Text(34, LEASE),
        "stream": Text(7, r"metrics|logs"),
        "time": Time(),
        "text": Text(2000),
    }


@dataclass(frozen=True, slots=True)
class ListenPayload(Message):
    """What only the party reads. `epoch` and `next` are the next request's cursor; `more`: ask again at once."""

    epoch: int
    next: int
    more: bool
    leases: tuple[WordsLease, ...]
    lines: tuple[WordsLine, ...]
    FIELDS: ClassVar = {
        "epoch": Uint(),
        "next": Uint(),
        "more": Flag(),
        "leases": Many(Nested(WordsLease), 256),
        "lines": Many(Nested(WordsLine), 2000),
    }


# --- the log ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogEntries(Message):
    """`GET log/entries?start=&end=`: leaves `start` to `end` - 1, possibly fewer."""

    start: int
    entries: tuple[bytes, ...]
    LIMIT: ClassVar[int] = MAX_REPLY
    FIELDS: ClassVar = {"start": Uint(), "entries": Many(Blob(0, 1 << 20), 4096)}


@dataclass(frozen=True, slots=True)
class LogProof(Message):
    """`GET log/inclusion?index=&size=` and `GET log/consistency?old=&new=`: hashes as RFC 6962 section 2.1 orders them."""

    hashes: tuple[bytes, ...]
    FIELDS: ClassVar = {"hashes": Many(_HASH, 128)}


# --- errors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WireReason(Message):
    """One `errors.Reason`."""

    where: str
    found: str
    wanted: str
    hint: str
    FIELDS: ClassVar = {"where": Text(500), "found": Text(2000), "wanted": Text(2000), "hint": Text(2000)}


_FAMILIES: Final[Mapping[str, type[CloisterError]]] = MappingProxyType(
    {
        error.family: error
        for error in (InputError, DeniedError, EvidenceError, WaitingError, TamperedError, MachineError, PeerError)
    }
)
STATUS: Final[Mapping[str, int]] = MappingProxyType(
    {"input": 400, "peer": 400, "denied": 403, "evidence": 403, "waiting": 409, "tampered": 500, "machine": 503}
)
"""Family of an error -> HTTP status. A body that is too large is 413, an unknown path 404, a wrong method 405."""

_MOST_REASONS: Final = 256


def _cut(text: str, most: int) -> str:
    clean = text.encode("utf-8", "replace").decode()
    return clean if len(clean) <= most else clean[: most - 1] + "…"


@dataclass(frozen=True, slots=True)
class ErrorReply(Message):
    """Every answer that is no success: `CloisterError.as_json()` and the id under which a denial can be read again."""

    error: str
    family: str
    message: str
    reasons: tuple[WireReason, ...]
    hint: str
    exit_status: int
    denial_id: str
    FIELDS: ClassVar = {
        "error": Text(40, r"[a-z-]+"),
        "family": Text(20, r"[a-z]+"),
        "message": Text(2000),
        "reasons": Many(Nested(WireReason), _MOST_REASONS),
        "hint": Text(2000),
        "exit_status": Uint(255),
        "denial_id": Text(14, rf"({DENIAL})?"),
    }

    @classmethod
    def of(cls, error: CloisterError, *, denial_id: str = "") -> ErrorReply:
        """Return `error` as a message; long texts are cut, reasons beyond 255 become one that counts them."""
        reasons = error.reasons
        if len(reasons) > _MOST_REASONS:
            rest = len(reasons) - (_MOST_REASONS - 1)
            reasons = (*reasons[: _MOST_REASONS - 1], Reason("more", f"{rest} more reasons", "none"))
        return cls(
            error=error.code,
            family=error.family,
            message=_cut(error.message, 2000),
            reasons=tuple(
                WireReason(_cut(r.where, 500), _cut(r.found, 2000), _cut(r.wanted, 2000), _cut(r.hint, 2000))
                for r in reasons
            ),
            hint=_cut(error.hint, 2000),
            exit_status=error.exit_status,
            denial_id=denial_id or (error.denial_id if isinstance(error, DeniedError) else ""),
        )

    def as_error(self) -> CloisterError:
        """Return the error as the same class that the broker raised; an unknown one becomes PeerError `protocol`."""
        kind = _FAMILIES.get(self.family)
        reasons = tuple(Reason(r.where, r.found, r.wanted, r.hint) for r in self.reasons)
        if kind is None or self.error not in CODES:
            return PeerError(self.message, code="protocol", reasons=reasons, hint="the broker speaks a newer protocol")
        if kind is DeniedError:
            return DeniedError(self.message, code=self.error, reasons=reasons, hint=self.hint, denial_id=self.denial_id)
        return kind(self.message, code=self.error, reasons=reasons, hint=self.hint)


@dataclass(frozen=True, slots=True)
class DenialRecord(Message):
    """`GET denial/<id>`: why something was refused, in the words of log entry `entry`."""

    id: str
    time: datetime
    operation: str
    error: str
    message: str
    contract: str
    phase: str
    assets: tuple[str, ...]
    code: str
    tee: str
    entry: int
    reasons: tuple[WireReason, ...]
    FIELDS: ClassVar = {
        "id": Text(14, DENIAL),
        "time": Time(),
        "operation": Text(20, r"release|renew|register|answer|open"),
        "error": Text(40, r"[a-z-]+"),
        "message": Text(2000),
        "contract": Text(71, rf"({DIGEST})?"),
        "phase": Text(40, rf"({NAME})?"),
        "assets": Many(Text(40, NAME), 512),
        "code": Text(71, rf"({DIGEST})?"),
        "tee": Text(40),
        "entry": Uint(),
        "reasons": Many(Nested(WireReason), _MOST_REASONS),
    }

    def as_error(self) -> CloisterError:
        """Return the refusal as the error that was raised then."""
        reasons = tuple(Reason(r.where, r.found, r.wanted, r.hint) for r in self.reasons)
        if self.error.startswith("evidence") and self.error in CODES:
            return EvidenceError(self.message, code=self.error, reasons=reasons)
        if self.error == "waiting":
            return WaitingError(self.message, reasons=reasons)
        if self.error in ("input", "signature-invalid"):
            return InputError(self.message, code=self.error, reasons=reasons)
        code = self.error if self.error in CODES else "denied"
        return DeniedError(self.message, code=code, reasons=reasons, denial_id=self.id)
