"""From one version of a contract to the next: what differs, who must agree, what new code inherits. Pure.

A new version takes effect in two independent ways, and both are needed before any key moves:
  replacement   whoever the *old* version names in `change` agrees (`replacement`)
  signatures    every owner whom the *new* version touches signed its bytes (`decide`, rule 3)
The successor rule is the only exception to the second: for phases that read nothing outside `keeps`, new code runs before
the owners sign again. `successor` judges that, in this order, and reports everything that stands against it:
  1 lineage     same name, version + 1, `replaces` is the old digest
  2 rule        the old version has `change.successor`
  3 scope       besides digests and sandboxes of `of` codes nothing differs, except what `same` does not pin
  4 same        owner, sandbox and phase of each changed code, as far as `same` lists them
  5 agreement   the authority for code: all parties of a list, or `need` votes of a board, no veto, after `wait`
Then it says, phase by phase, what is inherited: all that the phase reads, or nothing.
Who voted was checked by the caller (SSHSIG over the bytes of the new version); votes of strangers do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from types import MappingProxyType
from typing import Final, Literal

from cloister.contract.model import Board, Contract, Table
from cloister.errors import Reason

Subject = Literal["default", "code", "place"]
_ABSENT: Final = "nothing"


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that is not the same in two versions; `nothing` stands for a key that one of them lacks."""

    path: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.path}: {self.old} -> {self.new}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a new version may do before its owners signed it.

    `reasons` empty means allowed. `phases` may run under the new version without new signatures, reading `inherits`;
    `not_inherited` says for every other phase with new code what it waits for.
    """

    reasons: tuple[Reason, ...]
    phases: frozenset[str] = frozenset()
    inherits: frozenset[str] = frozenset()
    not_inherited: tuple[Reason, ...] = ()

    @property
    def allowed(self) -> bool:
        return not self.reasons


def diff(old: Contract, new: Contract) -> tuple[Difference, ...]:
    """Return every value that differs, by path; formatting, comments and spelled-out defaults are no difference."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    paths = (*before, *(path for path in after if path not in before))
    return tuple(
        Difference(".".join(path), before.get(path, _ABSENT), after.get(path, _ABSENT))
        for path in paths
        if before.get(path) != after.get(path)
    )


def subjects(old: Contract, new: Contract) -> tuple[Subject, ...]:
    """Return which authorities of the old version a change needs, most general first; empty if nothing differs."""
    found: dict[Subject, None] = {}
    for difference in _beyond_lineage(old, new):
        table = difference.path.split(".", 1)[0]
        # an authority lets machines in like one more entry in `accept`
        found["code" if table == "code" else "place" if table in ("authority", "place") else "default"] = None
    order: tuple[Subject, ...] = ("default", "code", "place")
    return tuple(subject for subject in order if subject in found)


def replacement(
    old: Contract, new: Contract, votes: Mapping[str, bool], *, now: datetime, proposed_at: datetime
) -> Verdict:
    """Return whether `new` may replace `old`, as far as the rules in `change` of the old version go.

    `votes` maps a party to yes or no. Both times need a time zone.

    Raises:
        ValueError: a time has no time zone.
    """
    age = _age(now, proposed_at)
    reasons = [*_lineage(old, new)]
    for subject in subjects(old, new) or ("default",):
        reasons += _agreement(old, subject, votes, age)
    return Verdict(tuple(dict.fromkeys(reasons)))


def successor(
    old: Contract, new: Contract, votes: Mapping[str, bool], *, now: datetime, proposed_at: datetime
) -> Verdict:
    """Return what new code inherits from `old` before the owners signed `new` (the steps above).

    Raises:
        ValueError: a time has no time zone.
    """
    age = _age(now, proposed_at)
    reasons = [*_lineage(old, new)]  # (1)
    rule = old.change.successor
    if rule is None:  # (2)
        reasons.append(Reason("change.successor", "no such rule", "a rule that lets new code inherit"))
        return Verdict(tuple(reasons))

    changed = _changed_codes(old, new)
    reasons += _scope(old, new)  # (3)
    reasons += _same(old, new, changed)  # (4)
    reasons += _agreement(old, "code", votes, age)  # (5)
    if not changed:
        reasons.append(Reason("change.successor.of", "no code differs", "a new digest of one of " + ", ".join(rule.of)))
    if reasons:
        return Verdict(tuple(dict.fromkeys(reasons)))

    phases: set[str] = set()
    inherits: set[str] = set()
    waiting: list[Reason] = []
    for name, phase in new.phase.items():
        if phase.run not in changed and old.phase[name].run == phase.run:
            continue  # the old version, which its owners signed, stays in force for this phase
        outside = tuple(asset for asset in phase.read if asset not in rule.keeps)
        if outside:
            people = sorted({party for asset in outside for party in new.people(new.owner(asset))})
            waiting.append(
                Reason(
                    "change.successor.keeps",
                    f"phase {name} reads {', '.join(outside)}",
                    f"only {', '.join(rule.keeps) or 'nothing'}",
                    f"waiting for new signatures of {', '.join(people)}",
                )
            )
        else:
            phases.add(name)
            inherits.update(phase.read)
    return Verdict((), frozenset(phases), frozenset(inherits), tuple(waiting))


def _age(now: datetime, proposed_at: datetime) -> timedelta:
    if now.tzinfo is None or proposed_at.tzinfo is None:
        raise ValueError("times need a time zone")
    return now - proposed_at


def _lineage(old: Contract, new: Contract) -> Iterator[Reason]:
    if new.name != old.name:
        yield Reason("contract", repr(new.name), repr(old.name))
    if new.version != old.version + 1:
        yield Reason("version", str(new.version), str(old.version + 1))
    if new.replaces != old.id:
        yield Reason("replaces", new.replaces or _ABSENT, old.id)


def _beyond_lineage(old: Contract, new: Contract) -> Iterator[Difference]:
    return (difference for difference in diff(old, new) if difference.path not in ("contract", "version", "replaces"))


def _changed_codes(old: Contract, new: Contract) -> frozenset[str]:
    return frozenset(name for name in new.code if name not in old.code or new.code[name] != old.code[name])


def _scope(old: Contract, new: Contract) -> Iterator[Reason]:
    rule = old.change.successor
    if rule is None:
        return
    for difference in _beyond_lineage(old, new):
        parts = difference.path.split(".")
        if (
            parts[0] == "code"
            and parts[-1] in ("digest", "sandbox", "owner")
            and parts[1] in old.code.keys() & new.code.keys()
        ):
            if parts[1] not in rule.of:
                yield Reason("change.successor.of", f"{parts[1]!r} differs", ", ".join(rule.of))
            continue
        moves = parts[0] == "phase" and parts[-1] == "run" and len(parts) == 3
        if moves and "phase" not in rule.same and difference.old in rule.of and difference.new in rule.of:
            continue
        if moves:
            continue  # step 4 reports it as `same`
        if difference.path == "expires" and new.expires <= old.expires:
            continue
        hint = "such a change needs the signatures of all owners"
        yield Reason("change.successor", f"{difference} differs", "new code and nothing else", hint)


def _same(old: Contract, new: Contract, changed: frozenset[str]) -> Iterator[Reason]:
    rule = old.change.successor
    if rule is None:
        return
    where = "change.successor.same"
    for name in sorted(changed & old.code.keys()):
        before, after = old.code[name], new.code[name]
        if "owner" in rule.same and before.owner != after.owner:
            yield Reason(where, f"owner of {name} differs ({before.owner} -> {after.owner})", "the same owner")
        if "sandbox" in rule.same and before.sandbox != after.sandbox:
            yield Reason(where, f"sandbox of {name} differs ({before.sandbox} -> {after.sandbox})", "the same sandbox")
    for name, phase in new.phase.items():
        was = old.phase.get(name)
        if was is None or was.run == phase.run:
            continue
        if "phase" in rule.same or was.run not in rule.of or phase.run not in rule.of:
            yield Reason(where, f"phase {name} runs {phase.run}, was {was.run}", "the same phase")


def _agreement(old: Contract, subject: Subject, votes: Mapping[str, bool], age: timedelta) -> Iterator[Reason]:
    authority = old.authority(subject)
    if isinstance(authority, str):
        yield from _board(authority, old.board[authority], votes, age)
        return
    missing = [party for party in authority if votes.get(party) is not True]
    if missing:
        agreed = ", ".join(party for party in authority if party not in missing) or "nobody"
        where = f"change.{subject}" if subject == "default" or getattr(old.change, subject) else "change.default"
        yield Reason(where, f"{agreed} agreed", " and ".join(authority), f"waiting for {', '.join(missing)}")


def _board(name: str, board: Board, votes: Mapping[str, bool], age: timedelta) -> Iterator[Reason]:
    vetoes = [party for party in board.veto if votes.get(party) is False]
    if vetoes:
        yield Reason(f"{name}.veto", ", ".join(vetoes), "no veto")
    yes = [party for party in board.members if votes.get(party) is True]
    if len(yes) < board.need:
        yield Reason(name, f"{len(yes)} of {board.need} votes ({', '.join(yes) or 'nobody'})", f"{board.need} votes")
    if age < board.wait:
        yield Reason(f"{name}.wait", f"{show(max(age, timedelta(0)))} since the proposal", show(board.wait))


def _leaves(contract: Contract) -> Iterator[tuple[tuple[str, ...], str]]:
    yield ("contract",), contract.name
    yield ("version",), str(contract.version)
    if contract.replaces is not None:
        yield ("replaces",), contract.replaces
    yield ("expires",), str(contract.expires)
    tables: dict[str, Mapping[str, Table | str]] = {
        "party": contract.party,
        "code": contract.code,
        "data": contract.data,
        "stream": contract.stream,
        "authority": contract.authorities,
        "place": contract.place,
        "phase": contract.phase,
        "board": contract.board,
    }
    for section, entries in tables.items():
        for name, entry in entries.items():
            yield from _walk((section, name), entry)
    yield from _walk(("change",), contract.change)


def _walk(path: tuple[str, ...], value: object) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, Table):
        for key in type(value).model_fields:
            yield from _walk((*path, key), getattr(value, key))
    elif isinstance(value, Mapping | MappingProxyType):
        for key, entry in value.items():
            yield from _walk((*path, key), entry)
    elif isinstance(value, tuple) and value and isinstance(value[0], Table):
        for number, entry in enumerate(value):  # accepted builds go by their labels: their order means nothing
            yield from _walk((*path, getattr(entry, "label", str(number))), entry)
    elif value is not None and not (isinstance(value, tuple) and not value and path[-1] in ("software", "log")):
        yield path, show_size(value) if isinstance(value, int) and _is_size(path) else show(value)


def _is_size(path: tuple[str, ...]) -> bool:
    return path[-1] == "pad" or (path[0] == "phase" and path[2] == "size")


def show(value: object) -> str:
    """Return a typed value of a contract as the language writes it (sizes: `show_size`)."""
    match value:
        case bool():
            return "true" if value else "false"
        case timedelta():
            return _show_duration(value)
        case (int() as year, int() as month):  # the only pair of numbers in the language
            return f"{year:04d}-{month:02d}"
        case tuple():
            return ", ".join(str(item) for item in value) or _ABSENT
        case date():
            return value.isoformat()
        case _:
            return str(value)


def show_size(size: int) -> str:
    """Return `size` bytes in the largest unit that shows it exactly."""
    for unit, step in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if not size % step:
            return f"{size // step} {unit}"
    return f"{size} B"


def _show_duration(value: timedelta) -> str:
    for unit, step in (("h", timedelta(hours=1)), ("min", timedelta(minutes=1)), ("s", timedelta(seconds=1))):
        if value >= step and (not value % step or unit == "h"):
            return f"{value // step}{unit}"
    return f"{value // timedelta(milliseconds=1)}ms" if value else "0h"
