"""Bytes to `Contract`, or one `InputError` with everything that is wrong: a pure function of the bytes.

Steps, in this order; all findings of steps 2 to 5 are reported together, by line:
  1 size     at most 64 KiB, UTF-8
  2 text     what people read is what is parsed (`text`)
  3 toml     TOML 1.0, duplicate keys refused; without a document nothing below can run
  4 form     every entry against its class in `model`; unknown keys refused
  5 rules    what needs the whole file:
      names      owners (parties, boards) share one name space; code, data, streams and outputs another; reserved words
      parties    one fingerprint, one party
      owners     a party or a board; only outputs may belong to `nobody`
      authorities  tokens of Confidential Space are for an audience, those of NRAS for nobody in particular
      places     `refresh` is a tee place; `files` names a party; a rule for a TEE type is for one that is accepted;
                 an accepted authority is declared; `gpus` needs a GPU; accepted builds have labels of their own and at least one rule
      phases     every name is declared; an output has one owner, and overwritten data keeps its owner
      code       secret code is sealed; sealed code leaves nothing but outputs and answers of constant size
      boards     members are parties, `need` is reachable, `veto` is a subset
      change     authorities, `of` and `keeps` are declared
      version    1 replaces nothing; every later version says what it replaces
An entry that fails step 4 still counts as declared in step 5, so that one mistake gives one finding.
Whether a signature covers these bytes is `sshsig`'s question, whether the contract is wise is `analyse.lint`'s.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from cloister.attestation.types import AUTHORITY, VOUCHED
from cloister.contract import model
from cloister.contract.model import NOBODY, PHASES, Contract, ContractFile
from cloister.contract.text import Finding, line_index, line_of, long_key, text_findings
from cloister.errors import InputError

MAX_BYTES: Final = 64 * 1024
"""Largest contract; the three examples of the language reference have 2 to 3 KiB."""

MAX_FINDINGS: Final = 100
"""Findings listed in one error; a file with more is not a contract, and unknown names are no longer explained."""

MAX_NAMES: Final = 20
"""Names listed in one finding."""

MAX_COMPARED: Final = 256
"""Names that are compared for "did you mean": the comparison takes about 10 us each."""

RESERVED: Final = frozenset(
    {
        *("nobody", "none", "any", "anybody", "anyone", "all", "everybody", "everyone"),
        *("board", "boards", "owner", "owners", "party", "parties", "operator", "broker"),
    }
)
"""Words that mean somebody already: no party may be called so, and of boards only `board` itself."""

RESERVED_ASSETS: Final = frozenset({"nobody", "none", "all", "metrics", "logs", "answer", "answers"})

Path = tuple[str | int, ...]

_ENTRIES: Final[Mapping[str, TypeAdapter[Any]]] = MappingProxyType(
    {
        "party": TypeAdapter(model.Key),
        "code": TypeAdapter(model.Code),
        "data": TypeAdapter(model.Data),
        "stream": TypeAdapter(model.Stream),
        "authority": TypeAdapter(model.TokenAuthority),
        "place": TypeAdapter(model.Place),
        "phase": TypeAdapter(model.Phase),
        "board": TypeAdapter(model.Board),
    }
)
_SCALARS: Final[Mapping[str, TypeAdapter[Any]]] = MappingProxyType(
    {
        "contract": TypeAdapter(model.Name),
        "version": TypeAdapter(model.Count),
        "replaces": TypeAdapter(model.Digest),
        "expires": TypeAdapter(model.Day),
        "change": TypeAdapter(model.Change),
    }
)
_NAME: Final = TypeAdapter(model.Name)
_TOML_LINE: Final = re.compile(r"\(at line (\d+), column (\d+)\)")


def parse(data: bytes, *, name: str, places_only: bool = False) -> Contract:
    """Return the contract in `data`; `name` is what messages call the file.

    With `places_only`, a file of [place] tables (and the authorities that they accept) and nothing else is taken too, as a contract
    that nobody can sign: for those who judge evidence by a place without a contract around it.

    Raises:
        InputError: code `contract-invalid`; `reasons` holds every `Finding`, sorted by line.
    """
    if len(data) > MAX_BYTES:
        raise _invalid(name, [Finding("file", f"{len(data)} bytes", f"at most {MAX_BYTES}")])
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _invalid(name, [Finding("text", f"byte 0x{data[error.start]:02x}", "UTF-8", line=line)]) from None
    findings = list(text_findings(text))
    endless = long_key(text)
    if endless is not None:
        raise _invalid(name, [*findings, endless])
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(name, [*findings, _toml_finding(error)]) from None
    alone = isinstance(document, dict) and set(document) - {"authority"} == {"place"}
    if places_only and alone and document["place"]:
        first = next(iter(document["place"])) if isinstance(document["place"], dict) else ""
        phase = {"run": "nothing", "at": first, "read": ["nothing-else"]}
        document = {**_AROUND, "phase": {"train": phase}, **document}
    draft = _Draft(document, line_index(text))
    draft.check_form()
    draft.check_rules()
    findings += draft.findings
    if findings:
        raise _invalid(name, findings)
    return draft.contract(f"sha256:{hashlib.sha256(data).hexdigest()}")


_AROUND: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "contract": "policy",
        "version": 1,
        "expires": date(9999, 12, 31),
        "party": {"verifier": "SHA256:" + "A" * 43},
        "code": {"nothing": {"owner": "verifier", "digest": "sha256:" + "0" * 64}},
        "data": {"nothing-else": {"owner": "verifier", "digest": "sha256:" + "0" * 64}},
        "change": {"default": ["verifier"]},
    }
)
"""What makes a contract of [place] tables alone: a party whose key nobody has and code that nobody can write. Nobody can sign
it, so it allows nothing; it only carries policies."""


def _invalid(name: str, findings: list[Finding]) -> InputError:
    ordered = sorted(findings, key=lambda finding: finding.line or 1 << 30)
    count = f"{len(ordered)} mistake{'s' if len(ordered) > 1 else ''}"
    return InputError(
        f"contract `{name}` has {count}",
        code="contract-invalid",
        reasons=ordered[:MAX_FINDINGS],
        hint="the language is described in docs/contract.md",
    )


def _toml_finding(error: ValueError | RecursionError) -> Finding:
    if isinstance(error, RecursionError):
        return Finding("toml", "tables or arrays nested too deeply", "TOML 1.0")
    message = str(error)
    place = _TOML_LINE.search(message)
    what = _TOML_LINE.sub("", message).strip()[:200]
    return Finding("toml", what or "no TOML", "TOML 1.0", line=int(place[1]) if place else 0)


@dataclass(slots=True)
class _Draft:
    """One document on its way to a `Contract`: what has the right form so far, and every finding."""

    document: Mapping[str, Any]
    lines: Mapping[tuple[str, ...], int]
    findings: list[Finding] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    """Top-level scalars and `change` that have the right form."""
    tables: dict[str, dict[str, Any]] = field(default_factory=lambda: {section: {} for section in _ENTRIES})
    """Section -> entry name -> entry that has the right form."""
    declared: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Section -> every entry name of the file, whatever its form."""

    def refuse(self, path: Path, found: str, wanted: str, hint: str = "") -> None:
        where = ".".join(_short(str(part)) for part in path)
        self.findings.append(Finding(where, found, wanted, hint, line=line_of(self.lines, path)))

    # step 4

    def check_form(self) -> None:
        known = tuple(ContractFile.model_fields)
        for key in self.document:
            if key not in known:
                self.refuse((key,), "an unknown key", f"one of {_or(known)}", _did_you_mean(key, known))
        for key, adapter in _SCALARS.items():
            if key in self.document:
                checked = self._checked(adapter, (key,), self.document[key])
                if checked is not None:
                    self.values[key] = checked
            elif key != "replaces":
                self.refuse((key,), "nothing", _what_is_missing(key))
        for section in _ENTRIES:
            self._check_section(section)

    def _check_section(self, section: str) -> None:
        entries = self.document.get(section, {})
        if not isinstance(entries, dict):
            self.refuse((section,), _describe(entries), "a table")
            entries = {}
        elif not entries and section in ("party", "code", "place", "phase"):
            self.refuse((section,), "nothing", f"at least one {section}")
        self.declared[section] = tuple(entries)
        for name, entry in entries.items():
            path = (section, name)
            if section == "phase" and name not in PHASES:
                self.refuse(path, "an unknown phase", _or(PHASES), _did_you_mean(name, PHASES))
            elif section != "phase":
                self._checked(_NAME, path, name)
            checked = self._checked(_ENTRIES[section], path, entry)
            if checked is not None:
                self.tables[section][name] = checked

    def _checked(self, adapter: TypeAdapter[Any], path: Path, value: object) -> Any:
        try:
            return adapter.validate_python(value)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                self._form_finding(path, item)
            return None

    def _form_finding(self, path: Path, item: Mapping[str, Any]) -> None:
        kind, context, value = item["type"], item.get("ctx", {}), item["input"]
        # pydantic puts the tag of a place and "[key]" of a bad key into the path; the file has neither
        inner = [p for p in item["loc"] if p != "[key]"]
        if path[0] == "place" and inner and inner[0] in ("tee", "attested-host", "he"):
            inner = inner[1:]
        full: Path = (*path, *inner)
        hint = ""
        if kind == "extra_forbidden":
            known = _known_keys(path, full, self.document)
            self.refuse(full, "an unknown key", f"one of {_or(known)}", _did_you_mean(str(inner[-1]), known))
            return
        if kind == "missing":
            self.refuse(full, "nothing", _what_is_missing(str(inner[-1])))
            return
        wanted = _wanted(kind, context, str(item["msg"]))
        if kind in ("union_tag_invalid", "union_tag_not_found"):
            full = (*full, "kind")
            value = value.get("kind", "nothing") if isinstance(value, dict) else value
        if kind in ("literal_error", "union_tag_invalid"):
            hint = _did_you_mean(value, re.findall(r"'([^']*)'", context.get("expected") or context["expected_tags"]))
        self.refuse(full, "nothing" if kind == "union_tag_not_found" else _describe(value), wanted, hint)

    # step 5

    def check_rules(self) -> None:
        self._rule_names()
        self._rule_parties()
        self._rule_owners()
        self._rule_authorities()
        self._rule_places()
        for name, phase in self.tables["phase"].items():
            if name in PHASES:
                self._rule_phase(name, phase)
        self._rule_outputs()
        self._rule_code()
        self._rule_boards()
        self._rule_change()
        self._rule_version()

    def _rule_names(self) -> None:
        for section in ("party", "board"):
            for name in self.declared[section]:
                if name in RESERVED and (section, name) != ("board", "board"):
                    self.refuse((section, name), f"the reserved word {name!r}", "another name")
        for section in ("code", "data", "stream"):
            for name in self.declared[section]:
                if name in RESERVED_ASSETS:
                    self.refuse((section, name), f"the reserved word {name!r}", "another name")
        for first, second in (("party", "board"), ("code", "data"), ("code", "stream"), ("data", "stream")):
            for name in self.declared[second]:
                if name in self.declared[first]:
                    self.refuse((second, name), f"{name!r} is also a {first}", "one meaning for a name")

    def _rule_parties(self) -> None:
        owner_of: dict[bytes, str] = {}
        for name, fingerprint in self.tables["party"].items():
            key = model.key_bytes(fingerprint)
            if key in owner_of:
                self.refuse(("party", name), f"the key of {owner_of[key]!r}", "one key for each party")
            owner_of.setdefault(key, name)

    def _rule_owners(self) -> None:
        for section in ("code", "data", "stream"):
            for name, entry in self.tables[section].items():
                self._known((section, name, "owner"), entry.owner, self._owners(), "a party or a board")

    def _rule_authorities(self) -> None:
        for name, entry in self.tables["authority"].items():
            path = ("authority", name, "audience")
            if entry.kind == "confidential-space" and entry.audience is None:
                self.refuse(path, "nothing", "whom its tokens are for: it makes them for many")
            if entry.kind == "nras" and entry.audience is not None:
                self.refuse(path, repr(entry.audience), "nothing: NRAS makes its tokens for nobody in particular")

    def _rule_places(self) -> None:
        for name, place in self.tables["place"].items():
            if isinstance(place, model.HePlace):
                path = ("place", name, "refresh")
                self._known(path, place.refresh, self.declared["place"], "a place")
                target = self.tables["place"].get(place.refresh)
                if target is not None and not isinstance(target, model.TeePlace):
                    self.refuse(path, f"{place.refresh!r} of kind {target.kind}", "a place of kind tee: it decrypts")
            if isinstance(place, model.HostPlace) and isinstance(place.files, model.SignedBy):
                self._known(("place", name, "files"), place.files.party, self.declared["party"], "a party")
            if isinstance(place, model.TeePlace):
                self._rule_tee_place(("place", name), place)
            if isinstance(place, model.TeePlace | model.HostPlace) and place.platforms is not None:
                self._rule_platforms(("place", name, "platforms"), place.platforms)

    def _rule_tee_place(self, here: Path, place: model.TeePlace) -> None:
        # a soft TEE plays any hardware, so rules for each of them have a meaning there
        accepted = (*model.CPUS, *place.accept) if "simulated" in place.accept else place.accept
        devices = ("nvidia-gpu", "tpm") if place.gpu == "confidential" else ("tpm",)
        self._rule_vouched((*here, "accept"), place)
        for name in place.gpu_authorities or ():
            self._known((*here, "gpu_authorities"), name, self.declared["authority"], "an authority of kind nras")
            declared = self.tables["authority"].get(name)
            if declared is not None and declared.kind != "nras":
                self.refuse(
                    (*here, "gpu_authorities"), f"{name!r} of kind {declared.kind}", "an authority of kind nras"
                )
            devices = (*devices, model.vouched_gpu(name))
        if place.gpu_authorities is not None and place.gpu != "confidential":
            self.refuse((*here, "gpu_authorities"), f"gpu {place.gpu!r}", 'gpu = "confidential" too')
        for key, rules in (("min_svn", place.min_svn), ("require", place.require)):
            for tee in rules or ():
                self._known((*here, key, tee), tee, (*accepted, *devices), "a type that this place accepts")
        if place.gpus is not None and place.gpu != "confidential":
            self.refuse((*here, "gpus"), f"gpu {place.gpu!r}", 'gpu = "confidential" too')
        labels: set[str] = set()
        for index, build in enumerate(place.software):
            path = (*here, "software", index)
            if build.label in labels:
                self.refuse((*path, "label"), repr(build.label), "a label of its own for each build")
            labels.add(build.label)
            if build.tee is not None:
                self._known((*path, "tee"), build.tee, accepted, "a type that this place accepts")
            if not (build.measurements or build.svns_equal or build.svns_least or build.log):
                wanted = "measurements, svns_equal, svns_least or log: without a rule it would be any software"
                self.refuse(path, "no rule", wanted)

    def _rule_vouched(self, path: Path, place: model.TeePlace) -> None:
        known: list[str] = []
        for name in self.declared["authority"]:
            entry = self.tables["authority"].get(name)
            # a table with a mistake of its own may be of any kind
            kinds = [kind for kind in VOUCHED if kind != "nras"] if entry is None else [entry.kind]
            known += [f"{AUTHORITY}{name}/{word}" for kind in kinds for word in VOUCHED[kind] if kind != "nras"]
        for item in place.accept:
            if not item.startswith(AUTHORITY):
                continue
            entry = self.tables["authority"].get(item.removeprefix(AUTHORITY).split("/", 1)[0])
            if entry is not None and entry.kind == "nras":
                self.refuse(path, repr(item), "what vouches for a machine", "name it in `gpu_authorities`")
            else:
                self._known(path, item, known, "a type of an authority of this contract")

    def _rule_platforms(self, here: Path, platforms: model.Platforms) -> None:
        if platforms.allow is None and platforms.deny is None:
            self.refuse(here, "nothing", "`allow`, `deny` or both")
        for item in platforms.allow or ():
            if item in (platforms.deny or ()):
                self.refuse((*here, "deny"), repr(item), "no machine that is in `allow` too")
            if item.split(":", 1)[0] in model.GPU_IDS:
                self.refuse((*here, "allow"), repr(item), "machines", "GPUs are listed in `gpus.allow`")

    def _rule_phase(self, name: str, phase: model.Phase) -> None:
        here = ("phase", name)
        self._known((*here, "run"), phase.run, self.declared["code"], "a code")
        self._known((*here, "at"), phase.at, self.declared["place"], "a place")
        for asset in phase.read:
            if asset in self.declared["code"]:
                self.refuse((*here, "read"), f"the code {asset!r}", "assets; code is named by `run`")
            else:
                self._known((*here, "read"), asset, self._assets(), "data, a stream, or what a phase writes")
        for asset, owner in phase.write.items():
            self._known((*here, "write", asset), owner, (*self._owners(), NOBODY), "a party, a board or nobody")
            if asset in self.declared["code"] or asset in self.declared["stream"]:
                self.refuse((*here, "write", asset), "a code or a stream", "data, or a new name")
            elif asset in RESERVED_ASSETS:
                self.refuse((*here, "write", asset), f"the reserved word {asset!r}", "another name")
        for asset in phase.size:
            self._known((*here, "size", asset), asset, tuple(phase.write), "an asset that this phase writes")
        for party in phase.metrics_to:
            self._known((*here, "metrics_to"), party, self.declared["party"], "a party")
        if phase.leaves is not None and not phase.metrics_to:
            self.refuse((*here, "leaves"), "`leaves` without `metrics_to`", "`metrics_to` too: it says who receives")
        if phase.answer is not None:
            for party in phase.answer.to:
                self._known((*here, "answer", "to"), party, self.declared["party"], "a party")
            if phase.answer.decimals is not None and phase.answer.form != "score":
                self.refuse((*here, "answer", "decimals"), f"form {phase.answer.form!r}", 'form = "score"')

    def _rule_outputs(self) -> None:
        first: dict[str, tuple[str, str]] = {}
        for name in PHASES:
            phase = self.tables["phase"].get(name)
            for asset, owner in phase.write.items() if phase is not None else ():
                data = self.tables["data"].get(asset)
                path = ("phase", name, "write", asset)
                if data is not None and data.owner != owner:
                    self.refuse(
                        path, f"owner {owner!r}", f"owner {data.owner!r}, as in data.{asset}", "or write a new name"
                    )
                elif asset in first and first[asset][1] != owner:
                    other, theirs = first[asset]
                    self.refuse(path, f"owner {owner!r}", f"owner {theirs!r}, as in phase.{other}")
                first.setdefault(asset, (name, owner))

    def _rule_code(self) -> None:
        for name, code in self.tables["code"].items():
            if code.secret and code.sandbox != "sealed":
                self.refuse(("code", name, "sandbox"), repr(code.sandbox), "'sealed', because the code is secret")
        for name, phase in self.tables["phase"].items():
            code = self.tables["code"].get(phase.run)
            if code is None or code.sandbox != "sealed":
                continue
            for asset in phase.write:
                if asset not in phase.size:
                    wanted = "a fixed size: sealed code leaves outputs of constant size"
                    self.refuse(("phase", name, "size", asset), "nothing", wanted, f'size = {{ {asset} = "64 MiB" }}')
            if phase.metrics_to:
                self.refuse(
                    ("phase", name, "metrics_to"),
                    "metrics of sealed code",
                    "nothing: metrics are a way out of the jail",
                )

    def _rule_boards(self) -> None:
        for name, board in self.tables["board"].items():
            for key, people in (("members", board.members), ("veto", board.veto)):
                for party in people:
                    self._known(("board", name, key), party, self.declared["party"], "a party")
            for party in board.veto:
                if party in self.declared["party"] and party not in board.members:
                    self.refuse(("board", name, "veto"), repr(party), f"members ({_or(board.members)})")
            if board.need > len(board.members):
                self.refuse(("board", name, "need"), str(board.need), f"at most the {len(board.members)} members")

    def _rule_change(self) -> None:
        change = self.values.get("change")
        if change is None:
            return
        for key in ("default", "code", "place"):
            chosen = getattr(change, key)
            if isinstance(chosen, str):
                self._known(("change", key), chosen, self.declared["board"], "a board, or an array of parties")
            for party in chosen if isinstance(chosen, tuple) else ():
                self._known(("change", key), party, self.declared["party"], "a party")
        if change.successor is not None:
            for code in change.successor.of:
                self._known(("change", "successor", "of"), code, self.declared["code"], "a code")
            for asset in change.successor.keeps:
                self._known(("change", "successor", "keeps"), asset, self._assets(), "an asset")

    def _rule_version(self) -> None:
        version = self.values.get("version")
        if version is not None and version > 1 and "replaces" not in self.document:
            self.refuse(("replaces",), "nothing", f"the digest of version {version - 1}")
        if version == 1 and "replaces" in self.document:
            self.refuse(("replaces",), "a digest", "nothing in version 1")

    def _known(self, path: Path, name: str, declared: Iterable[str], what: str) -> None:
        names = tuple(dict.fromkeys(declared))
        if name not in names and len(self.findings) < MAX_FINDINGS:
            listed = f" ({_or(names)})" if names else ""
            self.refuse(path, repr(name), f"{what}{listed}", _did_you_mean(name, names))

    def _owners(self) -> tuple[str, ...]:
        return (*self.declared["party"], *self.declared["board"])

    def _assets(self) -> tuple[str, ...]:
        written: Iterator[str] = (asset for phase in self.tables["phase"].values() for asset in phase.write)
        return (*self.declared["data"], *self.declared["stream"], *written)

    def contract(self, identity: str) -> Contract:
        """Build the contract; only called when there is no finding."""
        tables = {section: MappingProxyType(entries) for section, entries in self.tables.items()}
        phases: dict[str, model.Phase] = {
            name: self.tables["phase"][name] for name in PHASES if name in self.tables["phase"]
        }
        outputs = {asset: owner for phase in phases.values() for asset, owner in phase.write.items()}
        owners = {entry.owner for section in ("code", "data", "stream") for entry in self.tables[section].values()}
        signers: set[str] = set()
        for owner in owners | set(outputs.values()):
            board = self.tables["board"].get(owner)
            signers.update(board.members if board is not None else {owner} - {NOBODY})
        expires: date = self.values["expires"]
        return Contract(
            id=identity,
            name=self.values["contract"],
            version=self.values["version"],
            replaces=self.values.get("replaces"),
            expires=expires,
            party=tables["party"],
            code=tables["code"],
            data=tables["data"],
            stream=tables["stream"],
            authorities=tables["authority"],
            place=tables["place"],
            phase=MappingProxyType(phases),
            board=tables["board"],
            change=self.values["change"],
            outputs=MappingProxyType(outputs),
            signers=frozenset(signers),
        )


def _short(text: str) -> str:
    """A key as it may stand in a message: at most 60 printable ASCII characters."""
    return ascii(text)[1:61] if not text.isascii() or not text.isprintable() else text[:60]


def _describe(value: object) -> str:
    """What was found, in few words; tables and arrays are never walked, they may be deep."""
    if isinstance(value, str):
        return ascii(value) if len(value) <= 80 else f"{value[:60]!a} and {len(value) - 60} more letters"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "a huge number"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list | tuple):
        return "an array" if value else "an empty array"
    return f"{type(value).__name__} {value}"


def _plain(expected: str) -> str:
    return expected.replace("'", '"')


def _or(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - MAX_NAMES} more" if len(every) > MAX_NAMES else ""
    return ", ".join(every[:MAX_NAMES]) + more or "nothing"


def _did_you_mean(found: object, names: Iterable[str]) -> str:
    if not isinstance(found, str) or len(found) > 60:
        return ""
    close = get_close_matches(found, list(names)[:MAX_COMPARED], n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


_MEANING: Final = {
    "contract": "the name of the contract",
    "version": "a whole number, 1 or more",
    "expires": "the last day, such as 2027-06-30",
    "change": "a table [change] with `default`: who agrees to a new version",
    "owner": "a party or a board",
    "digest": "a digest from `cloister measure` or `cloister seal`",
    "run": "the code that runs",
    "at": "the place where it runs",
    "read": "the assets that it reads",
    "boot": "the digests of accepted boot states",
    "accept": "the TEE types that are accepted",
    "issuer": "the issuer of its tokens, https://...",
    "jwks": "the SHA-256 of each JWKS document whose keys count",
}


_TABLE_TYPES: Final = frozenset({"model_type", "model_attributes_type", "dict_type", "mapping_type"})


def _wanted(kind: str, context: Mapping[str, Any], message: str) -> str:
    """Return what the language wants where pydantic reports `kind`."""
    match kind:
        case "wanted":
            return str(context["wanted"])
        case "literal_error":
            return _plain(context["expected"])
        case "union_tag_invalid":
            return f"kind {_plain(context['expected_tags'])}"
        case "union_tag_not_found":
            return 'kind = "tee", "attested-host" or "he"'
        case "bool_type":
            return "true or false"
        case "int_type":
            return "a whole number"
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "less_than_equal":
            return f"at most {context['le']}"
        case "too_short":
            return f"at least {context['min_length']} entry"
        case _ if kind in _TABLE_TYPES:
            return "a table"
        case _:
            return message


def _what_is_missing(key: str) -> str:
    return _MEANING.get(key, f"the key {key!r}")


def _known_keys(path: Path, full: Path, document: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that the table around the unknown key `full` has."""
    section = path[0]
    if section == "change":
        return tuple((model.Successor if len(full) > 2 else model.Change).model_fields)
    if section == "place":
        kind = document["place"][path[1]].get("kind")
        places: dict[str, type[model.Table]] = {
            "tee": model.TeePlace,
            "attested-host": model.HostPlace,
            "he": model.HePlace,
        }
        inner = str(full[2]) if len(full) > 3 else ""
        nested: dict[str, type[model.Table]] = {
            "platforms": model.Platforms,
            "gpus": model.Gpus,
            "software": model.BootRule if "log" in full[4:-1] else model.Build,
        }
        return tuple(nested.get(inner, places[kind]).model_fields)
    if section == "phase" and len(full) > 3:
        return tuple(model.Answer.model_fields)
    classes: dict[str, type[model.Table]] = {
        "code": model.Code,
        "data": model.Data,
        "stream": model.Stream,
        "phase": model.Phase,
        "board": model.Board,
        "authority": model.TokenAuthority,
    }
    return tuple(classes[str(section)].model_fields)
