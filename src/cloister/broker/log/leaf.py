"""What the log holds: one frozen type for each kind of entry <-> its canonical JSON (RFC 8785) bytes.

Every entry has `v` (1), `kind`, `time` (RFC 3339, UTC, microseconds) and the fields of its kind, all of them, always;
an empty string says "none". Values are strings, small integers and lists of such; counters that may pass 2^53 are
decimal strings. No entry holds a secret. `tee` names the evidence's hardware as the verifier found it; a name that
begins with `soft` is software evidence and protects nothing.

`parse` is strict: unknown, missing or ill-formed fields and any other spelling of the same JSON are refused, so the
hash of the bytes is the hash of the value. Byte tables: docs/format/log.md.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, ClassVar, Final

from cloister.broker.log.checkpoint import tampered
from cloister.crypto.canonical import json_decode
from cloister.errors import Reason

MAX_BYTES: Final = 192 * 1024
"""Largest entry: a denial with 32 clipped reasons of 4 texts, 300 characters each, 4 bytes a character, stays below."""
MAX_REASONS: Final = 32
MAX_MARKS: Final = 256
"""Numbers of vendors in one entry."""
MAX_TEXT: Final = 300
"""Characters kept of each text of a reason: reasons quote what others sent."""

_Check = Callable[[Any], bool]


def _matches(pattern: str) -> _Check:
    compiled = re.compile(pattern, re.ASCII)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


_DIGEST: Final = _matches(r"sha256:[0-9a-f]{64}")
_DIGEST_OR_NONE: Final = _matches(r"(sha256:[0-9a-f]{64})?")
_WORD: Final = _matches(r"[A-Za-z0-9][A-Za-z0-9+/=:._-]{0,126}")
_WORD_OR_NONE: Final = _matches(r"([A-Za-z0-9][A-Za-z0-9+/=:._-]{0,126})?")
_HEX_OR_NONE: Final = _matches(r"([0-9a-f]{2}){0,64}")
_LAUNCH_OR_NONE: Final = _matches(r"([a-z][a-z0-9_.-]{0,39}=([0-9a-f]{2}){1,64})?")
_IDENTITY: Final = _matches(r"[a-z][a-z0-9_]{0,31}:[!-~]{1,160}")
MAX_IDENTITIES: Final = 64
"""Ids of one machine: 16 devices with three each, and its own."""
_COUNTER: Final = _matches(r"0|[1-9][0-9]{0,17}")
_LINE: Final[_Check] = lambda value: isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()  # noqa: E731
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)


def format_time(value: datetime) -> str:
    """Return RFC 3339 in UTC with microseconds; ValueError without a time zone."""
    if value.tzinfo is None:
        raise ValueError("a time needs a time zone")
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_time(text: str) -> datetime:
    """Inverse of `format_time`; ValueError for any other spelling."""
    if not isinstance(text, str) or not _TIME.fullmatch(text):
        raise ValueError(f"{str(text)[:40]!r} is not a UTC time with microseconds")
    return datetime.fromisoformat(text)


@dataclass(frozen=True, slots=True)
class _Codec:
    """How one field of Python becomes JSON and comes back; `check` judges the JSON value."""

    check: _Check
    wanted: str
    to_json: Callable[[Any], Any] = lambda value: value
    from_json: Callable[[Any], Any] = lambda value: value


def _list_of(check: _Check, most: int = 256) -> _Check:
    return lambda value: isinstance(value, list) and len(value) <= most and all(check(item) for item in value)


def _is_small_int(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_reason(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"where", "found", "wanted", "hint"}
        and all(_LINE(text) for text in value.values())
    )


def _is_asset(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"asset", "volume"}
        and _WORD(value["asset"])
        and _DIGEST(value["volume"])
    )


def _is_mark(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"mark", "number"}
        and _WORD(value["mark"])
        and _COUNTER(value["number"])
    )


def _is_time(value: object) -> bool:
    return isinstance(value, str) and _TIME.fullmatch(value) is not None


def _coded(codec: _Codec, default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(metadata={"codec": codec}, default=default)


def _digest() -> Any:
    return _coded(_Codec(_DIGEST, "sha256:<64 hex digits>"))


def _digest_or_none() -> Any:
    return _coded(_Codec(_DIGEST_OR_NONE, "sha256:<64 hex digits> or nothing"))


def _word() -> Any:
    return _coded(_Codec(_WORD, "a name"))


def _word_or_none() -> Any:
    return _coded(_Codec(_WORD_OR_NONE, "a name or nothing"))


def _line() -> Any:
    return _coded(_Codec(_LINE, f"at most {MAX_TEXT} printable characters"))


def _hex() -> Any:
    return _coded(_Codec(_HEX_OR_NONE, "hex digits"))


def _small() -> Any:
    return _coded(_Codec(_is_small_int, "an integer from 0 to 2^53 - 1"))


def _counter() -> Any:
    return _coded(_Codec(_COUNTER, "a decimal string below 10^18", str, int))


def _bytes() -> Any:
    return _coded(_Codec(_HEX_OR_NONE, "hex digits", bytes.hex, bytes.fromhex))


def _moment() -> Any:
    return _coded(_Codec(_is_time, "a UTC time with microseconds", format_time, parse_time))


def _words() -> Any:
    return _coded(_Codec(_list_of(_WORD), "a list of names", list, tuple))


def _launch() -> Any:
    return _coded(_Codec(_LAUNCH_OR_NONE, "a measurement and its value in hex, or nothing"), "")


def _machine() -> Any:
    codec = _Codec(_list_of(_IDENTITY, MAX_IDENTITIES), f"at most {MAX_IDENTITIES} of name:value", list, tuple)
    return _coded(codec, ())


def identities(names: Iterable[str]) -> tuple[str, ...]:
    """Return ids of a machine as an entry can hold them: hardware says them, and a vendor may write what he likes."""
    clean = ("".join(c if "!" <= c <= "~" else "?" for c in name)[:190] for name in names)
    return tuple(name for name in clean if _IDENTITY(name))[:MAX_IDENTITIES]


def _assets() -> Any:
    return _coded(
        _Codec(
            _list_of(_is_asset),
            "a list of {asset, volume}",
            lambda value: [{"asset": item.asset, "volume": item.volume} for item in value],
            lambda value: tuple(AssetRef(**item) for item in value),
        )
    )


def _marks() -> Any:
    return _coded(
        _Codec(
            _list_of(_is_mark, MAX_MARKS),
            "a list of {mark, number}",
            lambda value: [{"mark": item.mark, "number": str(item.number)} for item in value],
            lambda value: tuple(Mark(item["mark"], int(item["number"])) for item in value),
        )
    )


def _reasons() -> Any:
    return _coded(
        _Codec(
            _list_of(_is_reason),
            "a list of {where, found, wanted, hint}",
            lambda value: [reason.as_json() for reason in value],
            lambda value: tuple(Reason(**item) for item in value),
        )
    )


@dataclass(frozen=True, slots=True)
class AssetRef:
    """A volume in the role of an asset: its name in the contract and the digest of its head."""

    asset: str
    volume: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A number of a vendor that never goes back: its name (`attestation.collateral.marks`) and how far it is."""

    mark: str
    number: int


def clip_text(text: str) -> str:
    """Return `text` as an entry can hold it: printable, at most 300 characters."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def clip(reasons: Iterable[Reason]) -> tuple[Reason, ...]:
    """Return at most 32 reasons, each text clipped: what an entry can hold. The last one counts those left out."""
    clipped = [Reason(*map(clip_text, (r.where, r.found, r.wanted, r.hint))) for r in reasons]
    if len(clipped) > MAX_REASONS:
        rest = len(clipped) - MAX_REASONS + 1
        clipped[MAX_REASONS - 1 :] = [Reason("log.reasons", f"{rest} more reasons", f"at most {MAX_REASONS}")]
    return tuple(clipped)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One entry. Construction validates; ValueError names every field that is wrong."""

    KIND: ClassVar[str] = ""
    time: datetime = _moment()  # noqa: RUF009  (a field specifier)

    def __post_init__(self) -> None:
        _check(type(self), self._fields_as_json())

    def _fields_as_json(self) -> dict[str, Any]:
        return {name: codec.to_json(getattr(self, name)) for name, codec in _codecs(type(self))}

    def as_json(self) -> dict[str, Any]:
        return {"v": 1, "kind": self.KIND, **self._fields_as_json()}

    def encode(self) -> bytes:
        """Return the canonical JSON bytes that are hashed into the tree."""
        return encode_json(self.as_json())

    @property
    def soft(self) -> bool:
        """True if this entry rests on software evidence, which protects nothing."""
        return str(getattr(self, "tee", "")).startswith("soft")


def encode_json(value: Mapping[str, Any]) -> bytes:
    """Return RFC 8785 bytes of an entry's JSON.

    Keys are ASCII and numbers are integers, so sorted `json.dumps` is that form (a test compares both) at less than half the
    time of the general encoder (bench/log.py).
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch(Leaf):
    """A broker started and took over the log. `software` is its measurement (hex), `hpke_key` the digest of the key that
    owners seal to, `tls_key` the digest of its TLS SPKI; `number` rises by one with every start."""

    KIND: ClassVar[str] = "epoch"
    number: int = _counter()
    software: str = _hex()
    evidence: str = _digest_or_none()
    tee: str = _word_or_none()
    hpke_key: str = _digest_or_none()
    tls_key: str = _digest_or_none()


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness(Leaf):
    """A witness watches this log from here on; `key` is its verifier key string (signature type 4)."""

    KIND: ClassVar[str] = "witness"
    name: str = _word()
    key: str = _line()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractSubmitted(Leaf):
    """Somebody handed in a contract: `contract` is the SHA-256 of the file's bytes."""

    KIND: ClassVar[str] = "contract-submitted"
    contract: str = _digest()
    name: str = _word()
    version: int = _small()
    replaces: str = _digest_or_none()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractSigned(Leaf):
    """`party` (an SSH fingerprint) signed the contract; `signature` is the SHA-256 of the armoured signature file."""

    KIND: ClassVar[str] = "contract-signed"
    contract: str = _digest()
    party: str = _word()
    signature: str = _digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractActive(Leaf):
    """The contract counts from here on; `signers` are the fingerprints whose signatures were there."""

    KIND: ClassVar[str] = "contract-active"
    contract: str = _digest()
    name: str = _word()
    replaces: str = _digest_or_none()
    signers: tuple[str, ...] = _words()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractRevoked(Leaf):
    """`party` ended the contract: nothing is released under it any more. `signature` is the SHA-256 of the signed
    statement's armoured signature."""

    KIND: ClassVar[str] = "contract-revoked"
    contract: str = _digest()
    name: str = _word()
    party: str = _word()
    signature: str = _digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyDeposited(Leaf):
    """The broker keeps the key of a volume for `owner` (an SSH fingerprint, a board's name or `nobody`)."""

    KIND: ClassVar[str] = "key-deposited"
    volume: str = _digest()
    owner: str = _word()
    volume_id: bytes = _bytes()
    generation: int = _counter()


@dataclass(frozen=True, slots=True, kw_only=True)
class Release(Leaf):
    """Keys went to a node: which volumes it reads, which assets it may write, for which code, on which evidence.

    `launch` is the launch measurement, `machine` the ids of the machine and its devices: a key that goes to another machine
    than before shows here.
    """

    KIND: ClassVar[str] = "release"
    lease: str = _word()
    contract: str = _digest()
    phase: str = _word()
    reads: tuple[AssetRef, ...] = _assets()
    writes: tuple[str, ...] = _words()
    code: str = _digest()
    sandbox: str = _word()
    level: str = _word_or_none()
    evidence: str = _digest()
    tee: str = _word_or_none()
    launch: str = _launch()
    machine: tuple[str, ...] = _machine()
    hpke_key: str = _digest()
    request: str = _digest_or_none()
    expires: datetime = _moment()  # noqa: RUF009  (a field specifier)


@dataclass(frozen=True, slots=True, kw_only=True)
class Denial(Leaf):
    """A request was refused; `reasons` holds every rule that was broken, `id` feeds `cloister why`. `operation` is what
    was asked for (release, renew, register, answer, open), `error` the code of the error that answered."""

    KIND: ClassVar[str] = "denial"
    id: str = _word()
    operation: str = _word()
    error: str = _word()
    message: str = _line()
    contract: str = _digest_or_none()
    phase: str = _word_or_none()
    assets: tuple[str, ...] = _words()
    code: str = _digest_or_none()
    evidence: str = _digest_or_none()
    tee: str = _word_or_none()
    launch: str = _launch()
    machine: tuple[str, ...] = _machine()
    hpke_key: str = _digest_or_none()
    reasons: tuple[Reason, ...] = _reasons()


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRenewed(Leaf):
    """A node attested again and keeps its lease until `expires`."""

    KIND: ClassVar[str] = "lease-renewed"
    lease: str = _word()
    evidence: str = _digest()
    tee: str = _word_or_none()
    launch: str = _launch()
    machine: tuple[str, ...] = _machine()
    expires: datetime = _moment()  # noqa: RUF009  (a field specifier)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseLost(Leaf):
    """A lease ended before its time: it is never renewed again."""

    KIND: ClassVar[str] = "lease-lost"
    lease: str = _word()
    reasons: tuple[Reason, ...] = _reasons()


@dataclass(frozen=True, slots=True, kw_only=True)
class RootRegistered(Leaf):
    """A node wrote an asset: from here on `volume` is its only current version. `lease` leads to the release, so to the
    code, inputs and evidence it came from; `name` is the contract's name, which outlives its versions."""

    KIND: ClassVar[str] = "root-registered"
    contract: str = _digest()
    name: str = _word()
    asset: str = _word()
    volume: str = _digest()
    generation: int = _counter()
    volume_id: bytes = _bytes()
    owner: str = _word()
    previous: str = _digest_or_none()
    lease: str = _word()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Leaf):
    """`count` answers were granted to `party`; `used` is the sum since the beginning, these included. `query` and
    `answer` are digests that whoever asked can recompute, or nothing for answers that are granted in blocks."""

    KIND: ClassVar[str] = "answer"
    contract: str = _digest()
    phase: str = _word()
    party: str = _word()
    count: int = _small()
    used: int = _counter()
    lease: str = _word_or_none()
    query: str = _digest_or_none()
    answer: str = _digest_or_none()


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRefused(Leaf):
    """`count` answers were asked for and refused; nothing was spent."""

    KIND: ClassVar[str] = "answer-refused"
    id: str = _word()
    contract: str = _digest()
    phase: str = _word()
    party: str = _word()
    count: int = _small()
    lease: str = _word_or_none()
    reasons: tuple[Reason, ...] = _reasons()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyOpened(Leaf):
    """The key of a volume left the broker towards its owner; `parties` are the fingerprints that signed for it,
    `hpke_key` is the digest of the key it was sealed to."""

    KIND: ClassVar[str] = "key-opened"
    volume: str = _digest()
    owner: str = _word()
    parties: tuple[str, ...] = _words()
    contract: str = _digest_or_none()
    asset: str = _word_or_none()
    hpke_key: str = _digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CollateralMarks(Leaf):
    """Genuine collateral of vendors with these numbers is in use: from here on nothing below them is."""

    KIND: ClassVar[str] = "collateral-marks"
    marks: tuple[Mark, ...] = _marks()


KINDS: Final[Mapping[str, type[Leaf]]] = MappingProxyType(
    {
        cls.KIND: cls
        for cls in (
            Epoch,
            Witness,
            ContractSubmitted,
            ContractSigned,
            ContractActive,
            ContractRevoked,
            KeyDeposited,
            Release,
            Denial,
            LeaseRenewed,
            LeaseLost,
            RootRegistered,
            Answer,
            AnswerRefused,
            KeyOpened,
            CollateralMarks,
        )
    }
)
"""Every kind of entry, by the name it has in the log."""


def _fields_of(cls: type[Leaf]) -> tuple[tuple[str, _Codec], ...]:
    return tuple((field.name, field.metadata["codec"]) for field in dataclasses.fields(cls))


_CODECS: Final[dict[type[Leaf], tuple[tuple[str, _Codec], ...]]] = {cls: _fields_of(cls) for cls in KINDS.values()}


def _codecs(cls: type[Leaf]) -> tuple[tuple[str, _Codec], ...]:
    return _CODECS[cls]


def _check(cls: type[Leaf], fields: Mapping[str, Any]) -> None:
    bad = [f"{name} wants {codec.wanted}" for name, codec in _codecs(cls) if not codec.check(fields[name])]
    if bad:
        raise ValueError(f"{cls.KIND}: {'; '.join(bad)}")


def from_json(value: Any) -> Leaf:
    """Return the entry of its JSON value.

    Raises:
        TamperedError: (log-tampered) another version, an unknown kind, unknown, missing or ill-formed fields.
    """
    kind = value.get("kind") if isinstance(value, dict) else None
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None or value.get("v") != 1 or type(value["v"]) is not int:
        raise tampered(
            "the log entry is of no known kind",
            where="leaf.kind",
            found=f"version {value.get('v')!r:.20}, kind {kind!r:.40}"
            if isinstance(value, dict)
            else type(value).__name__,
            wanted="version 1 and a kind that docs/format/log.md lists",
        )
    codecs = _codecs(cls)
    wanted = {"v", "kind", *(name for name, _ in codecs)}
    if value.keys() != wanted:
        extra, missing = sorted(map(str, value.keys() - wanted)), sorted(wanted - value.keys())
        raise tampered(
            f"the {kind} entry has other fields",
            where=f"leaf.{kind}",
            found=f"unknown {extra}, missing {missing}",
            wanted="exactly the fields of its kind",
        )
    try:
        _check(cls, value)
        return cls(**{name: codec.from_json(value[name]) for name, codec in codecs})
    except ValueError as error:
        raise tampered(
            f"the {kind} entry is ill-formed", where=f"leaf.{kind}", found=str(error), wanted="well-formed fields"
        ) from error


def parse(data: bytes) -> Leaf:
    """Return the entry whose canonical bytes are `data`; `parse(leaf.encode()) == leaf`.

    Raises:
        TamperedError: (log-tampered) not canonical JSON, or not an entry (see `from_json`).
    """
    try:
        value = json_decode(data, limit=MAX_BYTES)
    except ValueError as error:
        raise tampered(
            "the log entry does not parse", where="leaf.json", found=str(error), wanted="canonical JSON (RFC 8785)"
        ) from error
    return from_json(value)


def parse_own(data: bytes) -> Leaf:
    """Like `parse`, for bytes whose hash is already authenticated: only the spelling is not checked again."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise tampered("the log entry does not parse", where="leaf.json", found=str(error), wanted="JSON") from error
    return from_json(value)
