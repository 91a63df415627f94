"""What a contract means for people: who can read an asset, who could change it, what to think about. Pure.

`readers` follows an asset through the data flow: phase reads it -> code sees it in full -> outputs, metrics, logs and
answers leave -> outputs are assets again. It errs on the side of naming too many: whatever a phase reads is taken to be in
everything that the phase writes. Every asset-phase pair is walked once, so loops (refining) end.
`changers` walks the other way: which code writes it, what feeds that, who may exchange that code, who may exchange the rules.
`lint` never refuses: what it says is allowed, and worth knowing before signing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, assert_never

from cloister.attestation.types import AUTHORITY, FIRMWARE, below
from cloister.contract.change import show, show_size
from cloister.contract.model import (
    NOBODY,
    Answer,
    Board,
    Build,
    Code,
    Contract,
    HePlace,
    HostPlace,
    Phase,
    Platforms,
    TeePlace,
    key_bytes,
    vouched_gpu,
)

ReaderKind = Literal[
    "owner", "code", "refresh", "host", "authority", "unconfined", "output", "metrics", "logs", "answers"
]
ChangerKind = Literal["owner", "appends", "code", "feeds", "successor", "rules", "signatures"]

_FORMS = {"label": "labels", "score": "scores", "full": "full answers"}


@dataclass(frozen=True, slots=True)
class Reader:
    """Somebody or something that gets `asset` or a thing made from it.

    `path` is the way there: (asset, phase), (output, phase), ...; empty for the owner of the asset itself.
    `who` is a party, a board, a code or a place; `what` says what it gets.
    """

    asset: str
    path: tuple[tuple[str, str], ...]
    kind: ReaderKind
    who: str
    what: str

    def __str__(self) -> str:
        steps = " -> ".join(f"{asset} [{phase}]" for asset, phase in self.path) or self.asset
        return f"{steps} -> {self.text}"

    @property
    def text(self) -> str:
        return f"code {self.who!r} {self.what}" if self.kind == "code" else f"{self.who}: {self.what}"


@dataclass(frozen=True, slots=True)
class Changer:
    """Somebody or something that can change what `asset` holds, or the rules for it."""

    asset: str
    kind: ChangerKind
    who: str
    what: str

    def __str__(self) -> str:
        return f"{self.asset} <- {self.who}: {self.what}"


@dataclass(frozen=True, slots=True)
class Note:
    """One thing that is allowed and worth knowing; `warning` marks what most owners would not want."""

    where: str
    text: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def assets(contract: Contract) -> tuple[str, ...]:
    """Return every asset: data, streams, outputs, and secret code."""
    secret = (name for name, code in contract.code.items() if code.secret)
    return tuple(dict.fromkeys((*contract.data, *contract.stream, *contract.outputs, *secret)))


def readers(contract: Contract, asset: str) -> tuple[Reader, ...]:
    """Return everybody who could ever read `asset` or something made from it, in the order of the data flow.

    Raises:
        ValueError: the contract has no such asset.
    """
    owner = contract.owner(asset)
    found: list[Reader] = []
    if owner != NOBODY:
        found.append(Reader(asset, (), "owner", owner, _owner_gets(contract, owner, "it")))
    seen: set[tuple[str, str]] = set()
    queue: list[tuple[str, tuple[tuple[str, str], ...]]] = [(asset, ())]
    while queue:
        here, path = queue.pop(0)
        for name, phase in contract.phase.items():
            if not _reads(contract, phase, here) or (here, name) in seen:
                continue
            seen.add((here, name))
            steps = (*path, (here, name))
            found.extend(_readers_of_phase(contract, asset, steps, name, phase, is_code=here == phase.run))
            # secret code is in what it writes only as far as its author wants: outputs of a program do not hold it
            if here != phase.run:
                queue.extend((output, steps) for output in phase.write)
    return tuple(found)


def readers_text(contract: Contract, asset: str) -> str:
    """Return `readers` as text, one line per way through the data flow."""
    lines = []
    for path, group in groupby(readers(contract, asset), key=lambda reader: reader.path):
        steps = " -> ".join(f"{name} [{phase}]" for name, phase in path) or asset
        lines.append(f"{steps} -> {' | '.join(reader.text for reader in group)}")
    return "\n".join(lines)


def changers(contract: Contract, asset: str) -> tuple[Changer, ...]:
    """Return who could change what `asset` holds, and who could change the rules for it.

    Raises:
        ValueError: the contract has no such asset.
    """
    owner = contract.owner(asset)
    found: list[Changer] = []
    if asset in contract.data or asset in contract.code:
        found.append(Changer(asset, "owner", owner, "owns it; the contract names its digest"))
    if asset in contract.stream:
        found.append(Changer(asset, "appends", owner, "may append records"))
    writers = {name: phase for name, phase in contract.phase.items() if asset in phase.write}
    for name, phase in writers.items():
        code = contract.code[phase.run]
        found.append(Changer(asset, "code", phase.run, f"writes it in {name} {_where(contract, phase, code)}"))
        found.extend(
            Changer(asset, "feeds", contract.owner(source), f"owns {source}, which feeds {name}")
            for source in phase.read
            if source != asset
        )
    found.extend(_rule_changers(contract, asset, tuple(phase.run for phase in writers.values())))
    return tuple(dict.fromkeys(found))


def changers_text(contract: Contract, asset: str) -> str:
    """Return `changers` as text, one line each."""
    return "\n".join(str(changer) for changer in changers(contract, asset))


def lint(contract: Contract) -> tuple[Note, ...]:
    """Return what is allowed and worth knowing, warnings first."""
    notes = [*_lint_parties(contract), *_lint_places(contract)]
    for name, phase in contract.phase.items():
        notes += _lint_phase(contract, name, phase)
    notes += _lint_boards(contract)
    notes += _lint_unused(contract)
    return tuple(sorted(dict.fromkeys(notes), key=lambda note: not note.warning))


def explain(contract: Contract) -> str:
    """Return a contract in sentences: what each phase does, who reads and who could change each asset, and the notes."""
    lines = [
        f"{contract.name} version {contract.version}, {contract.id}",
        f"  until {contract.expires}; must sign: {', '.join(sorted(contract.signers))}",
    ]
    for name, phase in contract.phase.items():
        code = contract.code[phase.run]
        workers = f", {phase.workers} workers" if phase.workers > 1 else ""
        lines.append(
            f"{name}: {phase.run} of {code.owner} {_where(contract, phase, code)}{workers}, {phase.traffic} traffic"
        )
        lines.append(f"  reads   {', '.join(phase.read)}")
        for asset, owner in phase.write.items():
            size = f", always {show_size(phase.size[asset])}" if asset in phase.size else ""
            lines.append(f"  writes  {asset}, {_belongs(contract, owner)}{size}")
        lines.extend(f"  {stream:<7} {', '.join(phase.metrics_to)}" for stream in phase.streams_out)
        if phase.answer is not None:
            lines.append(f"  answers {', '.join(phase.answer.to)}: {_answers(phase.answer)}")
    lines.append("places")
    lines.extend(f"  {place_text(contract, name)}" for name in contract.place)
    lines.append("who can read")
    for asset in assets(contract):
        lines.extend(f"  {line}" for line in readers_text(contract, asset).splitlines())
    lines.append("who could change")
    everybody: dict[str, None] = {}
    for asset in assets(contract):
        for changer in changers(contract, asset):
            if changer.kind in ("rules", "signatures"):
                everybody[f"  the contract <- {changer.who}: {changer.what}"] = None
            else:
                lines.append(f"  {changer}")
    lines.extend(everybody)
    notes = lint(contract)
    lines.append(_count(len(notes)))
    lines.extend(f"  {'warning' if note.warning else 'note'}: {note}" for note in notes)
    return "\n".join(lines)


def place_text(contract: Contract, name: str) -> str:
    """Return in one sentence what `place` wants of a machine and of the software that runs there."""
    place = contract.place[name]
    match place:
        case HePlace():
            says = [f"any machine, {place.scheme}, keys at {place.refresh}"]
        case HostPlace():
            states = "1 boot state" if len(place.boot) == 1 else f"one of {len(place.boot)} boot states"
            says = [f"a host whose measured OS is trusted, {states}"]
            if "simulated" in place.accept:
                says.append("a soft TPM too" if "tpm" in place.accept else "a soft TPM")
            if place.files is not None:
                says.append(f"files {place.files}")
            says += _machines(place.platforms)
        case TeePlace():
            says = [" or ".join(_accepted(contract, tee) for tee in place.accept), *_wants(contract, place)]
        case never:
            assert_never(never)
    if place.debug:
        says.append("debug allowed")
    return f"{name}: {'; '.join(says)}"


def _accepted(contract: Contract, tee: str) -> str:
    if tee == "simulated":
        return "a soft TEE"
    if not tee.startswith(AUTHORITY):
        return tee
    name, word = _vouched(tee)
    return f"whatever {contract.authorities[name].issuer} says is {word}"


def _vouched(tee: str) -> tuple[str, str]:
    """Return name and type of `authority:<name>/<type>`."""
    name, _, word = tee.removeprefix(AUTHORITY).partition("/")
    return name, word


def _wants(contract: Contract, place: TeePlace) -> Iterator[str]:
    if place.min_tcb is not None:
        yield f"firmware of {show(place.min_tcb)} or newer"
    if place.tcb is not None:
        yield f"TCB {' or '.join(place.tcb)}"
    if place.max_tcb_age is not None:
        yield f"a TCB level at most {place.max_tcb_age.days} days old"
    if place.deny_advisories is not None:
        yield f"not affected by {_few(place.deny_advisories)}"
    for tee, numbers in (place.min_svn or {}).items():
        yield f"{tee} with {', '.join(f'{number} {least} or more' for number, least in numbers.items())}"
    for tee, switches in (place.require or {}).items():
        yield f"{tee} with {', '.join(f'{switch} {_on(on)}' for switch, on in switches.items())}"
    yield from _machines(place.platforms)
    if place.gpu == "confidential":
        yield "every GPU confidential" + (f" and one of {_few(place.gpus.allow)}" if place.gpus is not None else "")
        for name in place.gpu_authorities or ():
            yield f"a GPU is also whatever {contract.authorities[name].issuer} says is one"
    if place.software:
        yield f"software {' or '.join(_build(build) for build in place.software)}"


def _machines(platforms: Platforms | None) -> Iterator[str]:
    if platforms is not None and platforms.allow is not None:
        yield f"only {_few(platforms.allow)}"
    if platforms is not None and platforms.deny is not None:
        yield f"never {_few(platforms.deny)}"


def _build(build: Build) -> str:
    rules = [*(build.measurements or {}), *(build.svns_equal or {}), *(build.svns_least or {})]
    rules += [f"boot log {rule.index}" for rule in build.log]
    return f"{build.label} ({build.tee + ': ' if build.tee else ''}{', '.join(dict.fromkeys(rules))})"


def _few(items: tuple[str, ...]) -> str:
    """Name a few; ids of machines are long, and a contract may list hundreds."""
    named = ", ".join(item if len(item) <= 48 else f"{item[:47]}…" for item in items[:3])
    return named if len(items) <= 3 else f"{named} and {len(items) - 3} more"


def _on(on: bool) -> str:
    return "on" if on else "off"


def summary(contract: Contract) -> str:
    """Return what `cloister contract check` prints of a contract without mistakes: one line, then the notes."""
    notes = lint(contract)
    first = f"{contract.name} version {contract.version}: ok, {_count(len(notes))}; must sign: "
    return "\n".join((first + ", ".join(sorted(contract.signers)), *(f"  {note}" for note in notes)))


def _count(notes: int) -> str:
    return "no notes" if not notes else "1 note" if notes == 1 else f"{notes} notes"


# readers


def _reads(contract: Contract, phase: Phase, asset: str) -> bool:
    return asset in phase.read or (asset == phase.run and contract.code[asset].secret)


def _readers_of_phase(
    contract: Contract, asset: str, path: tuple[tuple[str, str], ...], name: str, phase: Phase, *, is_code: bool
) -> Iterator[Reader]:
    code, place = contract.code[phase.run], contract.place[phase.at]
    where = _where(contract, phase, code)
    if is_code:
        yield Reader(asset, path, "code", phase.run, f"{where}: runs it, inside")
    elif isinstance(place, HePlace):
        yield Reader(asset, path, "code", phase.run, f"{where}: as ciphertext")
        yield Reader(asset, path, "refresh", place.refresh, f"decrypts it to refresh ciphertext ({phase.run})")
    else:
        inside = "in full" if code.sandbox == "none" else "in full, inside"
        yield Reader(asset, path, "code", phase.run, f"{where}: {inside}")
    yield from _host_readers(contract, asset, path, contract.key_place(name))
    if code.sandbox == "none" and not is_code:
        yield Reader(asset, path, "unconfined", "anyone", f"whatever {phase.run} sends out: it has no sandbox")
    if is_code:
        return
    for output, owner in phase.write.items():
        if owner != NOBODY:
            yield Reader(asset, path, "output", owner, _owner_gets(contract, owner, output))
    for stream in phase.streams_out:
        kind: ReaderKind = "metrics" if stream == "metrics" else "logs"
        for party in phase.metrics_to:
            yield Reader(asset, path, kind, party, f"{_PHASE_WORD[name]} {stream}")
    if phase.answer is not None:
        for party in phase.answer.to:
            yield Reader(asset, path, "answers", party, _answers(phase.answer))


_PHASE_WORD = {"train": "training", "refine": "refining", "serve": "serving"}


def _host_readers(
    contract: Contract, asset: str, path: tuple[tuple[str, str], ...], place_name: str
) -> Iterator[Reader]:
    place = contract.place[place_name]
    if isinstance(place, HostPlace):
        who = f"whoever controls the measured OS of {place_name}"
        yield Reader(asset, path, "host", who, "in full")
    if isinstance(place, TeePlace | HostPlace) and "simulated" in place.accept:
        who = f"whoever runs a machine as {place_name}"
        what = "TEE" if isinstance(place, TeePlace) else "TPM"
        yield Reader(asset, path, "host", who, f"in full, because a soft {what} protects nothing")
    for name, what in _vouching(place):
        who = f"the operator of {contract.authorities[name].issuer}"
        yield Reader(asset, path, "authority", who, f"in full, for it can vouch for any {what} as one of {place_name}")
    if place.debug:
        yield Reader(asset, path, "host", f"whoever debugs {place_name}", "in full")


def _vouching(place: TeePlace | HostPlace | HePlace) -> Iterator[tuple[str, str]]:
    """Yield each authority whose word lets something in at `place`, with what it lets in."""
    if isinstance(place, TeePlace):
        names = (_vouched(tee)[0] for tee in place.accept if tee.startswith(AUTHORITY))
        yield from ((name, "machine") for name in dict.fromkeys(names))
        yield from ((name, "GPU") for name in place.gpu_authorities or ())


def _owner_gets(contract: Contract, owner: str, asset: str) -> str:
    board = contract.board.get(owner)
    if board is not None:
        return f"{asset}, when {board.need} of {', '.join(board.members)} agree"
    return f"{asset}, as its owner"


def _where(contract: Contract, phase: Phase, code: Code) -> str:
    at = contract.place[phase.at]
    he = f" (homomorphic, keys at {at.refresh})" if isinstance(at, HePlace) else ""
    sandbox = "no sandbox" if code.sandbox == "none" else code.sandbox
    return f"at {phase.at}{he}, {sandbox}"


def _belongs(contract: Contract, owner: str) -> str:
    if owner == NOBODY:
        return "which nobody can open"
    board = contract.board.get(owner)
    return f"which {board.need} of {', '.join(board.members)} can open" if board is not None else f"which {owner} owns"


def _answers(answer: Answer) -> str:
    form = _FORMS[answer.form]
    if answer.decimals is not None:
        form += f" with {answer.decimals} decimals"
    limits = []
    if answer.budget is not None:
        limits.append(f"{_number(answer.budget)} in total")
    if answer.per_day is not None:
        limits.append(f"{_number(answer.per_day)} a day")
    if answer.pad is not None:
        limits.append(f"padded to {show_size(answer.pad)}")
    if answer.every is not None:
        limits.append(f"one every {show(answer.every)}")
    if answer.budget is None and answer.per_day is None:
        limits.insert(0, "UNLIMITED")
    return ", ".join((form, *limits))


def _number(value: int) -> str:
    return f"{value:,}".replace(",", " ")


# changers


def _rule_changers(contract: Contract, asset: str, writers: tuple[str, ...]) -> Iterator[Changer]:
    rule = contract.change.successor
    if rule is not None:
        runs = {phase.run: name for name, phase in contract.phase.items()}
        for code in rule.of:
            phase = contract.phase.get(runs.get(code, ""))
            if phase is None or any(source not in rule.keeps for source in phase.read):
                continue
            if asset in phase.read or asset in phase.write:
                does = "reads" if asset in phase.read else "writes"
                same = f"; the same {', '.join(rule.same)}" if rule.same else ""
                what = f"may replace {code}, which {does} it, before the owners sign again{same}"
                yield Changer(asset, "successor", _authority(contract, contract.authority("code")), what)
    subject: Literal["code", "default"] = "code" if writers and contract.change.code is not None else "default"
    if subject == "code":
        yield Changer(asset, "rules", _authority(contract, contract.authority("code")), "agree to new code")
    yield Changer(asset, "rules", _authority(contract, contract.authority("default")), "agree to a new version")
    signers = " and ".join(sorted(contract.signers))
    yield Changer(asset, "signatures", signers, "must sign a new version before it moves any key")


def _authority(contract: Contract, authority: str | tuple[str, ...]) -> str:
    if isinstance(authority, tuple):
        return " and ".join(authority)
    board = contract.board[authority]
    veto = f", veto {', '.join(board.veto)}" if board.veto else ""
    wait = f", after {show(board.wait)}" if board.wait else ""
    return f"{authority} ({board.need} of {', '.join(board.members)}{veto}{wait})"


# lint


def _lint_parties(contract: Contract) -> Iterator[Note]:
    for name, fingerprint in contract.party.items():
        if not fingerprint.endswith(tuple("AEIMQUYcgkosw048")):
            yield Note(f"party.{name}", "no key has this fingerprint: its last letter is impossible", warning=True)
        elif not any(key_bytes(fingerprint)):
            yield Note(f"party.{name}", "no key has this fingerprint: it is all zeros", warning=True)


def _lint_places(contract: Contract) -> Iterator[Note]:
    for name, place in contract.place.items():
        here = f"place.{name}"
        if place.debug:
            yield Note(f"{here}.debug", "a debugger may read everything here", warning=True)
        if isinstance(place, TeePlace):
            if "simulated" in place.accept:
                yield Note(f"{here}.accept", "simulated: a soft TEE protects nothing", warning=True)
            yield from _lint_tcb(here, place)
            yield from _lint_authorities(contract, here, place)
        if isinstance(place, HostPlace) and "simulated" in place.accept:
            yield Note(f"{here}.accept", "simulated: a soft TPM protects nothing", warning=True)
        if isinstance(place, HostPlace) and place.files is None:
            yield Note(f"{here}.files", "not set: the boot state alone says what the host may run")


def _lint_authorities(contract: Contract, here: str, place: TeePlace) -> Iterator[Note]:
    for name, what in _vouching(place):
        key = "accept" if what == "machine" else "gpu_authorities"
        issuer = contract.authorities[name].issuer
        yield Note(f"{here}.{key}", f"{name}: whatever {issuer} says; its operator can vouch for any {what}")
    types = [tee for tee in place.accept if tee.startswith(AUTHORITY)]
    for tee in (*types, *map(vouched_gpu, place.gpu_authorities or ())):
        for key, rules in (("min_svn", place.min_svn or {}), ("require", place.require or {})):
            if below(tee) in rules and tee not in rules:
                yield Note(f"{here}.{key}", f"rules for {below(tee)} say nothing about {tee}: name it, too")
    for tee in types:
        name, word = _vouched(tee)
        if word.startswith("azurevm-"):
            text = f"{tee} says nothing about the guest's software: no broker takes it for a node"
            yield Note(f"{here}.accept", text, warning=True)
        pinned = _pinned(place, tee)
        if contract.authorities[name].kind == "maa" and "maa_policy_hash" not in pinned:
            text = f"{tee}: who owns the instance writes its policy; a build can pin maa_policy_hash"
            yield Note(f"{here}.software", text)
        overridden = (place.require or {}).get(tee, {}).get("overridden")
        if (
            contract.authorities[name].kind == "confidential-space"
            and overridden is not False
            and "arguments" not in pinned
        ):
            text = f"{tee}: whoever starts it chooses its arguments as far as its image lets him; overridden = false forbids it"
            yield Note(f"{here}.require", text)


def _pinned(place: TeePlace, tee: str) -> frozenset[str]:
    """Return the measurements that every build for `tee` pins."""
    builds = [frozenset(build.measurements or ()) for build in place.software if build.tee in (None, tee)]
    return frozenset.intersection(*builds) if builds else frozenset()


_UNRATED = ("sev-snp", "nitro", "cca", "azure-snp")
"""TEE types whose vendors publish no TCB levels: no status but `NotRated`, no date."""
_RATED = ("tdxvm", "azurevm-tdxvm")
"""Types of a service's word that have Intel's status."""


def _lint_tcb(here: str, place: TeePlace) -> Iterator[Note]:
    # a service's token has no TCB date either, and a status only where it speaks of Intel's hardware
    undated = [tee for tee in place.accept if tee in _UNRATED or tee.startswith(AUTHORITY)]
    unrated = [tee for tee in undated if tee in _UNRATED or _vouched(tee)[1] not in _RATED]
    never = [tee for tee in undated if tee.startswith(AUTHORITY) and below(tee) not in FIRMWARE]
    bare = [tee for tee in undated if tee not in never and tee not in (place.min_svn or {})]
    if place.min_tcb is None:
        yield Note(f"{here}.min_tcb", "not set: old firmware is accepted if its vendor still calls it up to date")
    elif bare:
        yield Note(f"{here}.min_tcb", f"{', '.join(bare)} has no TCB dates: refused until min_svn sets a floor for it")
    if place.min_tcb is not None and never:
        yield Note(
            f"{here}.min_tcb", f"{', '.join(never)} has no date and no numbers: always refused here", warning=True
        )
    if place.max_tcb_age is not None and undated:
        yield Note(f"{here}.max_tcb_age", f"{', '.join(undated)} has no TCB dates: always refused here", warning=True)
    if place.tcb is not None:
        weak = [status for status in place.tcb if status.startswith("OutOfDate")]
        if weak:
            text = f"{', '.join(weak)}: firmware with published holes is accepted"
            yield Note(f"{here}.tcb", text, warning=True)
        if unrated and "NotRated" not in place.tcb:
            yield Note(f"{here}.tcb", f"{', '.join(unrated)} is always NotRated: always refused here", warning=True)


def _lint_phase(contract: Contract, name: str, phase: Phase) -> Iterator[Note]:
    here = f"phase.{name}"
    code = contract.code[phase.run]
    foreign = [asset for asset in phase.read if contract.owner(asset) != code.owner]
    place = contract.place[phase.at]
    if isinstance(place, HostPlace):
        yield Note(here, f"whoever controls the measured OS of {phase.at} is trusted with {', '.join(phase.read)}")
    if isinstance(place, HePlace):
        yield Note(here, f"{place.refresh} holds the decryption keys of {', '.join(phase.read)}")
    if code.sandbox == "none" and foreign:
        yield Note(here, f"{phase.run} has no sandbox: it can send out {', '.join(foreign)}", warning=True)
    if code.owner in phase.metrics_to and foreign:
        yield Note(
            f"{here}.metrics_to", f"{code.owner} wrote {phase.run} and reads its metrics: a way out", warning=True
        )
    if "logs" in phase.streams_out:
        yield Note(f"{here}.leaves", f"logs hold whatever {phase.run} prints", warning=bool(foreign))
    answer = phase.answer
    if answer is not None:
        if answer.budget is None and answer.per_day is None:
            yield Note(f"{here}.answer", "no budget: the model can be copied through answers", warning=True)
        elif answer.budget is None:
            yield Note(
                f"{here}.answer", f"no total budget, only {_number(answer.per_day or 0)} a day until {contract.expires}"
            )
        elif answer.per_day is not None and answer.per_day >= answer.budget:
            yield Note(f"{here}.answer.per_day", f"never reached: the total budget is {_number(answer.budget)}")
        if code.sandbox == "sealed" and answer.pad is None:
            yield Note(
                f"{here}.answer.pad",
                f"not set: {phase.run} is sealed, but the size of its answers is free",
                warning=True,
            )
    elif name == "serve":
        yield Note(here, "no `answer`: nobody can ask")
    if not phase.write and answer is None and not phase.metrics_to:
        yield Note(here, "nothing comes out: no `write`, no `answer`, no `metrics_to`", warning=True)
    for asset in phase.write:
        if asset in contract.data:
            yield Note(f"{here}.write.{asset}", f"overwrites data: data.{asset}.digest names its first version only")


def _lint_boards(contract: Contract) -> Iterator[Note]:
    for output, owner in contract.outputs.items():
        board = contract.board.get(owner)
        if board is None:
            continue
        for party, asset in _origins(contract, output):
            if _can_be_outvoted(board, party):
                which = "is not on it" if party not in board.members else "can be outvoted"
                text = f"{owner} can open {output}, made from {asset} of {party}, who {which}"
                yield Note(f"board.{owner}", text, warning=True)
    rule, authority = contract.change.successor, contract.authority("code")
    if rule is not None:
        people: tuple[str, ...] = authority if isinstance(authority, tuple) else ()
        board = contract.board.get(authority) if isinstance(authority, str) else None
        for asset in rule.keeps:
            if contract.owner(asset) == authority:
                continue  # the board decides about what it owns
            for party in sorted(contract.people(contract.owner(asset))):
                safe = party in people if board is None else not _can_be_outvoted(board, party)
                if not safe:
                    text = f"{party} owns {asset}, but new code may get it against the vote of {party}"
                    yield Note(
                        "change.successor.keeps", text, warning=asset in contract.data or asset in contract.stream
                    )


def _can_be_outvoted(board: Board, party: str) -> bool:
    if party not in board.members:
        return True
    return party not in board.veto and board.need < len(board.members)


def _origins(contract: Contract, output: str) -> tuple[tuple[str, str], ...]:
    """Return (party, asset) for all data and streams that flow into `output`."""
    found: dict[tuple[str, str], None] = {}
    seen: set[str] = set()
    queue = [output]
    while queue:
        here = queue.pop()
        if here in seen:
            continue
        seen.add(here)
        if here in contract.data or here in contract.stream:
            found.update(((party, here), None) for party in sorted(contract.people(contract.owner(here))))
        queue += [source for phase in contract.phase.values() if here in phase.write for source in phase.read]
    return tuple(found)


def _lint_unused(contract: Contract) -> Iterator[Note]:
    phases = contract.phase.values()
    read = {asset for phase in phases for asset in phase.read}
    for section, names in (("data", contract.data), ("stream", contract.stream)):
        for name in names:
            if name not in read:
                yield Note(f"{section}.{name}", "no phase reads it")
    for name in contract.code:
        if all(phase.run != name for phase in phases):
            yield Note(f"code.{name}", "no phase runs it")
    places = {phase.at for phase in phases} | {contract.key_place(name) for name in contract.phase}
    for name in contract.place:
        if name not in places:
            yield Note(f"place.{name}", "no phase is there")
    vouching = {name for place in contract.place.values() for name, _ in _vouching(place)}
    for name in contract.authorities:
        if name not in vouching:
            yield Note(f"authority.{name}", "no place accepts its word")
    for output, owner in contract.outputs.items():
        if owner == NOBODY and output not in read:
            yield Note(f"phase.write.{output}", "owned by nobody and read by no phase: it is lost", warning=True)
