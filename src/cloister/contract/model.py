"""The words of contract language v1 as frozen types: what a TOML file may say, one class per table.

A class here checks the *form* of one table entry (types, patterns, ranges, unknown keys); `parse` checks what needs
the whole file (names, owners, boards). Durations, sizes, months and file rules become typed values here, so nothing
later reads free text. The JSON Schema for editors is generated from the same classes (`schema`).

Language reference: docs/contract.md.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError, PydanticKnownError

from cloister.attestation.types import AUTHORITY, AuthorityKind

NAME: Final = r"^[a-z][a-z0-9-]{0,39}$"
DIGEST: Final = r"^sha256:[0-9a-f]{64}$"
KEY: Final = r"^SHA256:[A-Za-z0-9+/]{43}$"
MONTH: Final = r"^[0-9]{4}-(0[1-9]|1[0-2])$"
SIZE: Final = r"^[1-9][0-9]{0,14} (B|KiB|MiB|GiB|TiB)$"
DURATION: Final = r"^(0|[1-9][0-9]{0,8})(ms|s|min|h|d)$"
HEX: Final = r"^([0-9a-f]{2}){1,64}$"
WORD: Final = r"^[a-z][a-z0-9_.-]{0,39}$"
LABEL: Final = r"^[a-z0-9][a-z0-9._-]{0,39}$"
ADVISORY: Final = r"^(INTEL|SOFT)(-[A-Z0-9]+)+$"
"""Only Intel's collateral (and the soft twin's) names advisories. A rule about another vendor's would never meet any."""
AGE: Final = r"^[1-9][0-9]{0,3}d$"
_GPU_ID: Final = r"(ueid|udid|device_key):[0-9a-f]{1,128}"
PLATFORM: Final = (
    r"^((ppid|platform_instance_id):[0-9a-f]{32}|fmspc:[0-9a-f]{12}|chip_id:[0-9a-f]{128}|(ak|ek|vtpm_ak):[0-9a-f]{2,128}"
    rf"|(csp_id|module_id|instance_id|vm_unique_id):[0-9A-Za-z][0-9A-Za-z=._-]{{0,127}}|{_GPU_ID})$"
)
GPU: Final = f"^{_GPU_ID}$"
ISSUER: Final = r"^https://[a-z0-9][a-z0-9.-]{0,199}(:[1-9][0-9]{0,4})?(/[A-Za-z0-9._~/-]{0,200})?$"
AUDIENCE: Final = r"^[A-Za-z0-9._~:/?&=@%+-]{1,200}$"
VOUCHED: Final = rf"^{AUTHORITY}[a-z][a-z0-9-]{{0,39}}/[a-z][a-z0-9_-]{{0,31}}$"
FILES: Final = r"^(signed-by:[a-z][a-z0-9-]{0,39}|sha256:[0-9a-f]{64})$"

MAX_COUNT: Final = 2**53 - 1
"""Largest budget or size in bytes: what JSON carries exactly (RFC 8785)."""
MAX_WORKERS: Final = 4096
MAX_SOFTWARE: Final = 32
"""Builds that one place accepts."""
MAX_RULES: Final = 32
"""Measurements, numbers, switches or log rules of one table."""
MAX_VALUES: Final = 256
"""Values, machines or advisories of one list."""
MAX_JWKS: Final = 16
"""JWKS documents of one authority."""
MAX_DURATION: Final = timedelta(days=3660)

NOBODY: Final = "nobody"
PHASES: Final = ("train", "refine", "serve")

Sandbox = Literal["none", "offline", "one-shot", "sealed"]
Cpu = Literal["sgx", "tdx", "sev-snp", "nitro", "cca", "azure-snp", "azure-tdx"]
Tee = Literal["sgx", "tdx", "sev-snp", "nitro", "cca", "azure-snp", "azure-tdx", "simulated"]
Hardware = Literal["sgx", "tdx", "sev-snp", "nitro", "cca", "azure-snp", "azure-tdx", "nvidia-gpu", "tpm"]
"""What a rule about numbers or switches can be for: a TEE type, or a device beside it. Or a `Vouched` type."""
CPUS: Final[tuple[str, ...]] = get_args(Cpu)
GPU_IDS: Final = frozenset({"ueid", "udid", "device_key"})
TcbStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "NotRated",
]
"""Intel's words (PCS API, TCB info v3) without `Revoked`, which nobody may accept; `NotRated`: the vendor has no such words."""
Scheme = Literal["ckks-128", "bgv-128"]
Form = Literal["label", "score", "full"]
Leaf = Literal["metrics", "logs"]
Same = Literal["owner", "sandbox", "phase"]

_SIZE_UNITS: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DURATION_UNITS: Final = {
    "ms": timedelta(milliseconds=1),
    "s": timedelta(seconds=1),
    "min": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
}


def refusal(wanted: str) -> PydanticCustomError:
    """An error whose message is only what the language wants; `parse` adds what was found."""
    return PydanticCustomError("wanted", "{wanted}", {"wanted": wanted})


def _pattern(pattern: str, wanted: str) -> Callable[[object], str]:
    # `$` matches before a final newline, so fullmatch
    matches = re.compile(pattern.removeprefix("^").removesuffix("$"), re.ASCII).fullmatch

    def check(value: object) -> str:
        if not isinstance(value, str) or not matches(value):
            raise refusal(wanted)
        return value

    return check


_age_text = _pattern(AGE, 'a number of days such as "180d"')
_size_text = _pattern(SIZE, 'a size such as "64 MiB" (B, KiB, MiB, GiB, TiB; one space)')
_duration_text = _pattern(DURATION, 'a duration such as "72h" or "50ms" (ms, s, min, h, d; no space)')
_month_text = _pattern(MONTH, 'a month as "YYYY-MM", 01 to 12')
_files_text = _pattern(FILES, '"signed-by:<party>" or the digest of a list of files, "sha256:<64 hex digits>"')
_vouched_text = _pattern(VOUCHED, '"authority:<name>/<type>" such as "authority:azure/sevsnpvm"')
_name_text = _pattern(NAME, "a name: a to z, then up to 39 of a to z, 0 to 9 and -")


def _size(value: object) -> int:
    number, unit = _size_text(value).split(" ")
    size = int(number) * _SIZE_UNITS[unit]
    if size > MAX_COUNT:
        raise refusal("a size below 8192 TiB")
    return size


def _duration(value: object) -> timedelta:
    match = re.fullmatch(r"(\d+)([a-z]+)", _duration_text(value), re.ASCII)
    if match is None:  # not reached: the pattern above is stricter
        raise refusal("a duration")
    duration = int(match[1]) * _DURATION_UNITS[match[2]]
    if duration > MAX_DURATION:
        raise refusal("a duration of at most 3660d")
    return duration


def _interval(value: object) -> timedelta:
    duration = _duration(value)
    if not duration:
        raise refusal("a duration above zero")
    return duration


def _age(value: object) -> timedelta:
    return timedelta(days=int(_age_text(value).removesuffix("d")))


def _month(value: object) -> tuple[int, int]:
    year, month = _month_text(value).split("-")
    return int(year), int(month)


def _day(value: object) -> date:
    if type(value) is not date:  # a TOML date-time is a subclass of date
        raise refusal("a TOML date such as 2027-06-30, without quotes and time")
    return value


def _array(value: object) -> tuple[object, ...]:
    if not isinstance(value, list):
        raise refusal("an array")
    seen: set[str] = set()
    for item in value:
        if isinstance(item, str) and item in seen:
            raise refusal(f"each entry once ({item[:40]!r} is there twice)")
        if isinstance(item, str):
            seen.add(item)
    return tuple(value)


def _some(value: object) -> tuple[object, ...]:
    array = _array(value)
    if not array:
        raise refusal("an array with at least one entry")
    return array


def _some_tables(value: object) -> tuple[object, ...]:
    if not isinstance(value, list) or not value:
        raise refusal("an array of tables with at least one")
    return tuple(value)


def _at_most(most: int, what: str) -> Callable[[object], object]:
    def check(value: object) -> object:
        if isinstance(value, list | dict) and len(value) > most:
            raise refusal(f"at most {most} {what}")
        return value

    return check


def _filled(value: object) -> object:
    if isinstance(value, dict) and not value:
        raise refusal("a table with at least one entry")
    return value


_ANY: Final = (BeforeValidator(_array), Field(json_schema_extra={"uniqueItems": True}))
_SOME: Final = (BeforeValidator(_some), Field(json_schema_extra={"minItems": 1, "uniqueItems": True}))


def _authority(value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return _name_text(value)
    if not isinstance(value, list) or not value:
        raise refusal("an array of parties, or the name of one board")
    return tuple(_name_text(item) for item in _array(value))


def _or_vouched(words: tuple[str, ...]) -> Callable[[object], str]:
    """One of `words`, or what an authority says that a machine is."""

    def check(value: object) -> str:
        if isinstance(value, str) and value.startswith(AUTHORITY):
            return _vouched_text(value)
        if not isinstance(value, str) or value not in words:
            raise PydanticKnownError("literal_error", {"expected": " or ".join(repr(word) for word in words)})
        return value

    return check


def _or_vouched_schema(words: tuple[str, ...]) -> WithJsonSchema:
    vouched = {"type": "string", "pattern": VOUCHED, "description": "what an authority says that it is"}
    return WithJsonSchema({"anyOf": [{"type": "string", "enum": list(words)}, vouched]})


def vouched_gpu(authority: str) -> str:
    """Return the TEE type of a GPU that `authority` vouches for."""
    return f"{AUTHORITY}{authority}/nvidia-gpu"


def key_bytes(fingerprint: str) -> bytes:
    """Return the 32 bytes of a key fingerprint `SHA256:<43 letters>`; the two spare bits of the last letter are dropped."""
    return base64.b64decode(fingerprint.removeprefix("SHA256:") + "=")


@dataclass(frozen=True, slots=True)
class SignedBy:
    """`files = "signed-by:<party>"`: every file that the host ran was signed by this party's key."""

    party: str

    def __str__(self) -> str:
        return f"signed-by:{self.party}"


@dataclass(frozen=True, slots=True)
class FileList:
    """`files = "sha256:..."`: every file that the host ran is on the list with this digest."""

    digest: str

    def __str__(self) -> str:
        return self.digest


def _files(value: object) -> SignedBy | FileList:
    text = _files_text(value)
    return SignedBy(text.removeprefix("signed-by:")) if text.startswith("signed-by:") else FileList(text)


def _text_schema(pattern: str, description: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "description": description})


Name = Annotated[str, BeforeValidator(_name_text), WithJsonSchema({"type": "string", "pattern": NAME})]
Digest = Annotated[
    str,
    BeforeValidator(_pattern(DIGEST, "a digest: sha256: and 64 lower-case hex digits")),
    _text_schema(DIGEST, "sha256: and 64 lower-case hex digits"),
]
Key = Annotated[
    str,
    BeforeValidator(_pattern(KEY, "the fingerprint of an SSH key as `ssh-keygen -l` shows it: SHA256: and 43 letters")),
    _text_schema(KEY, "fingerprint of an SSH public key as `ssh-keygen -l` shows it"),
]
Size = Annotated[int, BeforeValidator(_size), _text_schema(SIZE, 'a size in bytes, such as "64 MiB"')]
Duration = Annotated[timedelta, BeforeValidator(_duration), _text_schema(DURATION, 'a duration, such as "72h"')]
Interval = Annotated[timedelta, BeforeValidator(_interval), _text_schema(DURATION, 'a duration, such as "50ms"')]
Month = Annotated[tuple[int, int], BeforeValidator(_month), _text_schema(MONTH, "year and month of the firmware")]
Files = Annotated[SignedBy | FileList, BeforeValidator(_files), _text_schema(FILES, "rule for the files of the host")]
Day = Annotated[date, BeforeValidator(_day)]
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT)]
Names = Annotated[tuple[Name, ...], *_ANY]
SomeNames = Annotated[tuple[Name, ...], *_SOME]
Authority = Annotated[
    str | tuple[str, ...],
    BeforeValidator(_authority),
    WithJsonSchema(
        {
            "description": "one board, or parties who must all agree",
            "anyOf": [
                {"type": "string", "pattern": NAME},
                {"type": "array", "items": {"type": "string", "pattern": NAME}, "minItems": 1, "uniqueItems": True},
            ],
        }
    ),
]


Hex = Annotated[
    str,
    BeforeValidator(_pattern(HEX, "2 to 128 lower-case hex digits")),
    _text_schema(HEX, "a measurement in hex"),
]
Word = Annotated[
    str,
    BeforeValidator(_pattern(WORD, "a name as the evidence has it, such as mrtd, pcr7 or isvsvn")),
    WithJsonSchema({"type": "string", "pattern": WORD}),
]
Advisory = Annotated[
    str,
    BeforeValidator(
        _pattern(
            ADVISORY,
            'the id of an advisory of Intel such as "INTEL-SA-00837"; other vendors\' evidence names none: set min_svn',
        )
    ),
    _text_schema(ADVISORY, "id of an advisory of Intel"),
]
Age = Annotated[timedelta, BeforeValidator(_age), _text_schema(AGE, 'a number of days, such as "180d"')]
PlatformId = Annotated[
    str,
    BeforeValidator(
        _pattern(PLATFORM, 'the id of a machine such as "ppid:0a1b…" or "chip_id:…" (`cloister verify` shows it)')
    ),
    _text_schema(PLATFORM, "name and value of an id in evidence"),
]
GpuId = Annotated[
    str,
    BeforeValidator(_pattern(GPU, 'the id of a GPU such as "ueid:48f2…", "udid:…" or "device_key:…"')),
    _text_schema(GPU, "name and value of an id in a GPU's evidence"),
]
Accepted = Annotated[str, BeforeValidator(_or_vouched(get_args(Tee))), _or_vouched_schema(get_args(Tee))]
BuiltFor = Annotated[str, BeforeValidator(_or_vouched(CPUS)), _or_vouched_schema(CPUS)]
RULED: Final = rf"^({'|'.join(get_args(Hardware))}|{VOUCHED.strip('^$')})$"
RuledType = Annotated[
    str,
    BeforeValidator(_or_vouched(get_args(Hardware))),
    WithJsonSchema({"type": "string", "pattern": RULED}),
]
Issuer = Annotated[
    str,
    BeforeValidator(
        _pattern(ISSUER, 'the exact issuer of its tokens, such as "https://sharedeus2.eus2.attest.azure.net"')
    ),
    _text_schema(ISSUER, "exactly the `iss` of its tokens"),
]
Audience = Annotated[
    str,
    BeforeValidator(_pattern(AUDIENCE, "the exact audience of its tokens, at most 200 letters, as a URL has them")),
    _text_schema(AUDIENCE, "exactly the `aud` of its tokens"),
]
Number = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT)]
Label = Annotated[
    str,
    BeforeValidator(_pattern(LABEL, "a label of at most 40 of a to z, 0 to 9, - _ and .")),
    WithJsonSchema({"type": "string", "pattern": LABEL}),
]


def _frozen_map(value: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(value))


def _empty() -> Mapping[str, Any]:
    return MappingProxyType({})


class Table(BaseModel):
    """One table entry: unknown keys refused, no coercion, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Code(Table):
    """A measured workload and the sandbox it runs in."""

    owner: Name
    digest: Digest
    """From `cloister measure`."""
    sandbox: Sandbox = "offline"
    secret: bool = False
    """The code itself is sealed: its key is released only to phases that run it."""


class Data(Table):
    """A sealed, read-only asset, named by its root digest."""

    owner: Name
    digest: Digest
    """From `cloister seal`."""


class Stream(Table):
    """A growing asset: its owner may append sealed records."""

    owner: Name


_RULES: Final = (
    BeforeValidator(_filled),
    BeforeValidator(_at_most(MAX_RULES, "entries")),
    AfterValidator(_frozen_map),
    Field(json_schema_extra={"minProperties": 1}),
)
_VALUES: Final = (BeforeValidator(_some), BeforeValidator(_at_most(MAX_VALUES, "entries")))
_VALUES_SCHEMA: Final = Field(json_schema_extra={"minItems": 1, "uniqueItems": True})

Advisories = Annotated[tuple[Advisory, ...], *_VALUES, _VALUES_SCHEMA]
PlatformIds = Annotated[tuple[PlatformId, ...], *_VALUES, _VALUES_SCHEMA]
GpuIds = Annotated[tuple[GpuId, ...], *_VALUES, _VALUES_SCHEMA]
HexValues = Annotated[tuple[Hex, ...], *_VALUES, _VALUES_SCHEMA]
Measurements = Annotated[Mapping[Word, HexValues], *_RULES]
Numbers = Annotated[Mapping[Word, Number], *_RULES]
Switches = Annotated[Mapping[Word, Annotated[bool, Field(strict=True)]], *_RULES]
MinSvn = Annotated[Mapping[RuledType, Numbers], *_RULES]
Require = Annotated[Mapping[RuledType, Switches], *_RULES]


class TokenAuthority(Table):
    """An attestation service: whatever it says, if a place accepts its word. Its operator can vouch for any machine."""

    kind: AuthorityKind
    """`maa`: Microsoft Azure Attestation; `confidential-space`: Google's; `nras`: NVIDIA's, of GPUs."""
    issuer: Issuer
    jwks: Annotated[
        tuple[Digest, ...],
        BeforeValidator(_some),
        BeforeValidator(_at_most(MAX_JWKS, "documents")),
        Field(json_schema_extra={"minItems": 1, "uniqueItems": True}),
    ]
    """SHA-256 of each JWKS document whose keys count, exactly as the service published it."""
    audience: Audience | None = None
    """Whom its tokens are for; Confidential Space always says."""


class Platforms(Table):
    """Which machines: by an id that their evidence shows."""

    allow: PlatformIds | None = None
    """At least one of them must be the machine's. Without it every genuine machine is accepted."""
    deny: PlatformIds | None = None
    """None of them may be the machine's or a device's."""


class Gpus(Table):
    """Which GPUs, besides their machine."""

    allow: GpuIds
    """Every GPU of the machine must be one of them."""


class BootRule(Table):
    """What a boot log that replays to the signed registers must hold."""

    index: Annotated[int, Field(strict=True, ge=0, le=23)]
    """Number of the register: a PCR or an RTMR."""
    digests: HexValues
    """Digests of accepted events."""
    only: bool = False
    """No other event may be in this register; otherwise one of them must be."""


class Build(Table):
    """Software that may run here: every rule of it must hold."""

    label: Label
    """Its name in messages."""
    tee: BuiltFor | None = None
    """The TEE type that it is for."""
    measurements: Measurements | None = None
    """Measurement -> accepted values."""
    svns_equal: Numbers | None = None
    """Number -> its value, such as a product id."""
    svns_least: Numbers | None = None
    """Number -> its least value, such as a security version."""
    log: Annotated[
        tuple[BootRule, ...],
        BeforeValidator(_some_tables),
        BeforeValidator(_at_most(MAX_RULES, "rules")),
        Field(json_schema_extra={"minItems": 1}),
    ] = ()
    """Rules for the boot log, where registers differ from boot to boot."""


class TeePlace(Table):
    """A trusted execution environment."""

    kind: Literal["tee"]
    accept: Annotated[tuple[Accepted, ...], *_SOME]
    """TEE types; `simulated` stands for every soft TEE, which protects nothing; `authority:<name>/<type>` for the word of an
    authority, whose operator can vouch for any machine."""
    min_tcb: Month | None = None
    """Oldest firmware accepted."""
    tcb: Annotated[tuple[TcbStatus, ...], *_SOME] | None = None
    """TCB statuses accepted; without it UpToDate, SWHardeningNeeded and NotRated."""
    max_tcb_age: Age | None = None
    """Oldest date of the platform's TCB level, in days before the decision."""
    deny_advisories: Advisories | None = None
    """Advisories that the platform may not be affected by."""
    min_svn: MinSvn | None = None
    """TEE type -> security version number -> least value."""
    require: Require | None = None
    """TEE type -> switch of the platform -> on or off."""
    platforms: Platforms | None = None
    """Which machines; without it every genuine one."""
    gpu: Literal["none", "confidential"] = "none"
    gpu_authorities: SomeNames | None = None
    """Authorities of kind nras whose word about a GPU counts like its own evidence; needs `gpu = "confidential"`."""
    gpus: Gpus | None = None
    """Which GPUs; needs `gpu = "confidential"`."""
    software: Annotated[
        tuple[Build, ...],
        BeforeValidator(_some_tables),
        BeforeValidator(_at_most(MAX_SOFTWARE, "builds")),
        Field(json_schema_extra={"minItems": 1}),
    ] = ()
    """Accepted builds, any one of them; without it the broker's list alone counts."""
    debug: bool = False


class HostPlace(Table):
    """A host whose measured operating system is trusted (TPM and IMA)."""

    kind: Literal["attested-host"]
    accept: Annotated[tuple[Literal["tpm", "simulated"], ...], *_SOME] = ("tpm",)
    """`tpm`, and `simulated` for a soft TPM, which protects nothing."""
    boot: Annotated[tuple[Digest, ...], *_SOME]
    """Accepted boot states."""
    files: Files | None = None
    """What the host may run."""
    platforms: Platforms | None = None
    """Which machines; without it every genuine one."""
    debug: bool = False


class HePlace(Table):
    """Homomorphic encryption: an untrusted machine that computes on ciphertext and never gets a decryption key."""

    kind: Literal["he"]
    scheme: Scheme
    refresh: Name
    """The TEE place that holds the decryption keys of phases running here."""
    debug: bool = False


Place = Annotated[TeePlace | HostPlace | HePlace, Field(discriminator="kind")]


class Answer(Table):
    """Answers that leave a phase; the limits count for each consumer on its own."""

    to: SomeNames
    form: Form
    decimals: Annotated[int, Field(strict=True, ge=0, le=17)] | None = None
    """Digits after the point of a score."""
    budget: Count | None = None
    """Answers in total."""
    per_day: Count | None = None
    """Answers in one UTC day."""
    pad: Size | None = None
    """Every answer has exactly this size."""
    every: Interval | None = None
    """Answers leave only at multiples of this time."""


class Phase(Table):
    """What one phase runs, where, what it reads and writes, and what leaves."""

    run: Name
    at: Name
    read: SomeNames
    write: Annotated[Mapping[Name, Name], AfterValidator(_frozen_map)] = Field(default_factory=_empty)
    """Asset -> owner: a party, a board, or nobody."""
    workers: Annotated[int, Field(strict=True, ge=1, le=MAX_WORKERS)] = 1
    traffic: Literal["encrypted", "fixed-rate"] = "encrypted"
    size: Annotated[Mapping[Name, Size], AfterValidator(_frozen_map)] = Field(default_factory=_empty)
    """Written asset -> its exact size after padding."""
    leaves: Annotated[tuple[Leaf, ...], *_SOME] | None = None
    """Which streams the parties of `metrics_to` get; only metrics unless it says more."""
    metrics_to: Names = ()
    """The parties who get metrics (and what else `leaves` names) while the phase runs."""
    answer: Answer | None = None

    @property
    def streams_out(self) -> tuple[Leaf, ...]:
        """What leaves to `metrics_to`: nothing without receivers, metrics unless `leaves` says otherwise."""
        if not self.metrics_to:
            return ()
        return ("metrics",) if self.leaves is None else self.leaves


class Board(Table):
    """k of n parties decide together."""

    members: SomeNames
    need: Count
    veto: Names = ()
    """Members whose no ends the matter."""
    wait: Duration = timedelta(0)
    """Time between a proposal and its effect."""


class Successor(Table):
    """What new code inherits without new signatures of the data owners, if `change.code` agrees."""

    of: SomeNames
    same: Annotated[tuple[Same, ...], *_ANY]
    """What of the code may not change."""
    keeps: Names
    """Assets that stay readable."""


class Change(Table):
    """Who agrees to a new version of the contract."""

    default: Authority
    code: Authority | None = None
    """For changes of code tables only; `default` if absent."""
    place: Authority | None = None
    """For changes of place tables only; `default` if absent."""
    successor: Successor | None = None


class Phases(Table):
    """The three phases; at least one."""

    train: Phase | None = None
    refine: Phase | None = None
    serve: Phase | None = None


class ContractFile(Table):
    """A contract: who may use what, with which code, where, and who sees the results."""

    contract: Name
    version: Count
    replaces: Digest | None = None
    """Digest of the version before; must be there when `version` is above 1."""
    expires: Day
    """Last day on which anything is released (UTC)."""
    party: Annotated[Mapping[Name, Key], Field(min_length=1)]
    code: Annotated[Mapping[Name, Code], Field(min_length=1)]
    data: Mapping[Name, Data] = Field(default_factory=_empty)
    stream: Mapping[Name, Stream] = Field(default_factory=_empty)
    authority: Mapping[Name, TokenAuthority] = Field(default_factory=_empty)
    place: Annotated[Mapping[Name, Place], Field(min_length=1)]
    phase: Phases
    board: Mapping[Name, Board] = Field(default_factory=_empty)
    change: Change


@dataclass(frozen=True, slots=True, eq=False)
class Contract:
    """A contract that parsed and broke no rule; made by `parse.parse` only. Equal means: the same file bytes."""

    id: str
    """`sha256:` digest of the exact file bytes; this is what parties sign."""
    name: str
    version: int
    replaces: str | None
    expires: date
    party: Mapping[str, str]
    """Name -> key fingerprint."""
    code: Mapping[str, Code]
    data: Mapping[str, Data]
    stream: Mapping[str, Stream]
    authorities: Mapping[str, TokenAuthority]
    """The tables `[authority.<name>]`. (`authority` says who agrees to changes.)"""
    place: Mapping[str, TeePlace | HostPlace | HePlace]
    phase: Mapping[str, Phase]
    """In the order train, refine, serve; only those that the file has."""
    board: Mapping[str, Board]
    change: Change
    outputs: Mapping[str, str]
    """Written asset -> owner (a party, a board, or `nobody`), a `data` asset that a phase overwrites included."""
    signers: frozenset[str]
    """Every party whose signature the contract needs before any key moves."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Contract) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def owner(self, asset: str) -> str:
        """Return who owns `asset` (data, stream, code or output).

        Raises:
            ValueError: the contract has no such asset.
        """
        for table in (self.data, self.stream, self.code):
            entry = table.get(asset)
            if entry is not None:
                return entry.owner
        if asset in self.outputs:
            return self.outputs[asset]
        raise ValueError(f"contract {self.name} has no asset {asset!r}")

    def people(self, owner: str) -> frozenset[str]:
        """Return the parties behind an owner: itself, the members of a board, or nobody at all."""
        if owner == NOBODY:
            return frozenset()
        board = self.board.get(owner)
        return frozenset(board.members) if board is not None else frozenset({owner})

    def key_place(self, phase: str) -> str:
        """Return the place whose evidence releases keys for `phase`: where it runs, or the `refresh` place of HE."""
        at = self.phase[phase].at
        place = self.place[at]
        return place.refresh if isinstance(place, HePlace) else at

    def authority(self, subject: Literal["default", "code", "place"]) -> str | tuple[str, ...]:
        """Return who agrees to a change: a board's name, or parties who must all agree."""
        chosen = {"default": None, "code": self.change.code, "place": self.change.place}[subject]
        return self.change.default if chosen is None else chosen
