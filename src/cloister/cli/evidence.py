"""What `cloister verify` does with evidence: files become a case, verifiers judge it, and every step is told.

Files, clock and terminal are here; what is decided is decided in `cloister.attestation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from cloister.cli.common import You, count, now, read_file
from cloister.errors import CloisterError, EvidenceError, InputError, Reason

if TYPE_CHECKING:
    from cloister.attestation.files import Observation, Step
    from cloister.attestation.files.manifest import Entry
    from cloister.attestation.types import Claims, Evidence, Policy
    from cloister.contract.model import Contract

LIMIT: Final = 16 * 1024 * 1024
_MARKS: Final = {"passed": ("✓", "ok"), "failed": ("✗", "bad"), "not reached": ("·", "dim"), "not done": ("-", "warn")}


def read(path: Path, what: str) -> bytes:
    """Return the content of `path`.

    Raises:
        InputError: it cannot be read, or no evidence is that large.
    """
    if path.is_file() and path.stat().st_size > LIMIT:
        found = f"{path.stat().st_size} bytes"
        raise InputError(f"{path} is too large", reasons=[Reason(str(path), found, f"at most {LIMIT} bytes")])
    return read_file(path, what)


def read_policy(path: Path, place: str) -> tuple[Policy, Contract]:
    """Return the appraisal policy of `place` in `path`, a contract or its [place] tables (the only place if `place` is empty),
    and the contract, whose authorities may vouch.

    Raises:
        InputError: the file is neither, or has no such place, or has several and none was named.
    """
    from cloister.contract.decide import compile_place
    from cloister.contract.parse import parse

    contract = parse(read_file(path, "the policy"), name=path.name, places_only=True)
    names = sorted(contract.place)
    if not place and len(names) == 1:
        place = names[0]
    if place not in contract.place:
        found = repr(place) if place else f"{len(names)} places"
        raise InputError(
            "which place?",
            reasons=[Reason("--place", found, " or ".join(names))],
            hint="name one of the contract's places",
        )
    return compile_place(contract, place), contract


def verify_files(
    you: You,
    arguments: Sequence[str],
    *,
    at: datetime | None,
    collateral: Sequence[Path],
    policy: Policy | None,
    nonce: bytes | None,
    contract: Contract | None = None,
) -> None:
    """Verify one piece of evidence and print every step; raises `EvidenceError` unless all of it held."""
    from cloister.attestation.appraise import appraise

    time = at or now()
    observed = observe_files(you, arguments, at=time, collateral=collateral, nonce=nonce, contract=contract)
    reasons: tuple[Reason, ...] = ()
    if policy is not None and observed.claims is not None:
        reasons = appraise(observed.claims, policy, today=time.date())
    _tell(you, observed, reasons, time, policy, asked=nonce is not None)


def observe_files(
    you: You,
    arguments: Sequence[str],
    *,
    at: datetime,
    collateral: Sequence[Path],
    nonce: bytes | None,
    contract: Contract | None = None,
) -> Observation:
    """Return what came out of one piece of evidence in files: ours or a vendor's. Tokens count under `contract` only.

    Raises:
        InputError: a file cannot be read, or is nothing that is known.
    """
    from cloister.attestation.files import Case, observe
    from cloister.attestation.files.sniff import assemble, sniff
    from cloister.attestation.roots import Roots

    named = [(argument, read(Path(argument.partition("=")[2] or argument), "the evidence")) for argument in arguments]
    own = _own(named[0][1]) if len(named) == 1 else None
    if own is not None:
        return _observe_own(own, collateral, at, you, nonce, contract)
    offered = _offered(named, collateral)
    case = assemble([*named, *offered])
    return observe(
        Case(
            case.kind,
            case.files,
            at,
            nonce=nonce,
            chains=case.chains,
            chain=case.chain,
            roots=Roots(soft=you.soft),
            collateral=dict(offered),
            vouched=frozenset(guess[1] for _, data in offered if (guess := sniff(data)) is not None),
        )
    )


def _offered(named: Sequence[tuple[str, bytes]], collateral: Sequence[Path]) -> list[tuple[str, bytes]]:
    """Return the collateral as files; of stores and snapshots, what is for the evidence `named`."""
    from cloister.attestation.collateral.snapshot import looks_like_one
    from cloister.attestation.edge.collateral import load_all
    from cloister.cli.collateral_ import pick

    found: list[tuple[str, bytes]] = []
    for path in collateral:
        data = b"" if path.is_dir() else read(path, "the collateral")
        if path.is_dir() or looks_like_one(data):
            found += pick(named, load_all([path]))
        else:
            found.append((str(path), data))
    return found


def _own(data: bytes) -> Evidence | None:
    """Return evidence in our own wire format, or None for a vendor's file."""
    from cloister.attestation import evidence as wire

    try:
        return wire.decode(data)
    except EvidenceError:
        return None


def _observe_own(
    evidence: Evidence,
    collateral: Sequence[Path],
    time: datetime,
    you: You,
    nonce: bytes | None,
    contract: Contract | None,
) -> Observation:
    from cloister.attestation.edge.collateral import load_all, soft_collateral
    from cloister.attestation.files import observe_evidence
    from cloister.attestation.roots import Roots
    from cloister.contract.decide import endorsed

    endorsements = load_all(collateral)
    if you.soft:
        endorsements = soft_collateral(time) | endorsements
    endorsements = endorsed(endorsements, contract)  # nobody else's authorities
    return observe_evidence(evidence, endorsements, Roots(soft=you.soft), now=time, nonce=nonce)


def _is_freshness(name: str) -> bool:
    return name == "freshness" or name.endswith("-nonce")


def _tell(
    you: You,
    observed: Observation,
    reasons: tuple[Reason, ...],
    time: datetime,
    policy: Policy | None,
    *,
    asked: bool,
) -> None:
    # whether it is fresh is another question than whether it is genuine, and without --nonce nobody asked it
    undone = [s for s in observed.steps if s.state == "not done" and (asked or not _is_freshness(s.name))]
    missing = _missing(observed, undone, policy)
    good = observed.error is None and not missing and not reasons
    style = you.ui.style
    lines: list[str] = []
    for step in observed.steps:
        mark, colour = _MARKS[step.state]
        lines.append(f"{style(mark, colour)} {step.name}  {_line(step.text)}{_note(step)}")
    lines += [_line(f"{style('✗', 'bad')} {each.where}  wants {each.wanted}, found {each.found}") for each in reasons]
    if policy is not None and observed.claims is not None and not reasons:
        lines.append(f"{style('✓', 'ok')} {policy.where}  every rule of the policy holds")
    fields = dict(observed.fields) or (_claims(observed.claims) if observed.claims else {})
    if observed.claims is not None and observed.fields:
        fields |= {f"certificate {index}": each for index, each in enumerate(observed.claims.chain)}
    if fields:
        width = max(map(len, fields))
        lines += ["", *(_line(f"{name.ljust(width)}  {value}") for name, value in fields.items())]
    verdict = _verdict(observed, missing, reasons, time)
    if good and not asked:
        verdict += "; whether it is fresh was not asked (--nonce)"
    lines += ["", _line(verdict)]
    data: dict[str, Any] = {
        "verdict": "good" if good else "refused",
        "at": time.isoformat(),
        "steps": [{"name": s.name, "state": s.state, "text": s.text} for s in observed.steps],
        "facts": dict(observed.facts),
        "fields": fields,
        "reasons": [each.as_json() for each in (*(observed.error.reasons if observed.error else ()), *reasons)],
        "policy": None if policy is None else policy.where,
        "freshness": "judged" if asked else "not asked",
    }
    you.ui.result(data, "\n".join(lines))
    if not good:
        raise click.exceptions.Exit(EvidenceError.exit_status)


def _line(text: str) -> str:
    # names and claims are the attester's words: a line break in them would write a verdict of its own
    return "\\n".join(text.splitlines())


def _note(step: Step) -> str:
    return {"not reached": "  (not reached)", "not done": "  (NOT DONE: what it needs was not given)"}.get(
        step.state, ""
    )


def _missing(observed: Observation, undone: Sequence[Step], policy: Policy | None) -> str:
    """Return why a verdict without errors is none, or nothing: no sign of a fault is not a proof."""
    if undone:
        return f"{', '.join(step.name for step in undone)} could not be checked"
    if observed.facts.get("authentic") is not True:  # a log alone, which nobody signed
        return "nobody vouches for what these files say"
    if policy is not None and observed.claims is None:
        return f"{policy.where} could not be judged: these files say nothing about a machine"
    return ""


def _verdict(observed: Observation, missing: str, reasons: Sequence[Reason], time: datetime) -> str:
    at = f"at {time:%Y-%m-%d %H:%M:%S} UTC"
    if observed.error is not None:
        code = observed.error.code
        hint = (
            f"; next: {observed.error.reasons[0].hint}"
            if observed.error.reasons and observed.error.reasons[0].hint
            else ""
        )
        return f"REFUSED {at}: {observed.error.message} ({code}{hint})"
    soft = observed.soft or (observed.claims is not None and observed.claims.soft)
    warning = " - software evidence: it protects NOTHING" if soft else ""
    if reasons:
        return f"authentic {at}, but NOT ACCEPTABLE to the policy: {count(len(reasons), 'rule')} broken{warning}"
    if missing:
        return f"NOT ENOUGH {at}: nothing is wrong so far, but {missing}{warning}"
    return f"authentic {at}{warning}"


def _claims(claims: Claims) -> dict[str, str]:
    """Return what people want to read of `claims`, in reading order."""
    found = {"tee": claims.tee, "debug": "YES: its host can read all of it" if claims.debug else "off"}
    found["tcb status"] = claims.tcb_status
    if claims.tcb_date:
        found["tcb date"] = claims.tcb_date.isoformat()
    if claims.advisories:
        found["advisories"] = ", ".join(claims.advisories)
    found["report data"] = claims.report_data.hex()
    found |= {name: value.hex() for name, value in claims.measurements.items() if any(value) or name == claims.launch}
    found |= {f"svn {name}": str(value) for name, value in claims.svns.items()}
    found |= {f"is {name}": "yes" if value else "no" for name, value in claims.attributes.items()}
    found |= {f"platform {name}": value for name, value in claims.platform.items()}
    found |= {f"event {index}": f"{each.name} {each.data[:64].hex()}" for index, each in enumerate(claims.events)}
    if claims.boot_log:
        known = sum(each.data is not None for each in claims.boot_log)
        found["boot log"] = f"{len(claims.boot_log)} events replay; the data of {known} is what was measured"
    found |= {f"certificate {index}": each for index, each in enumerate(claims.chain)}
    if claims.valid_until:
        found["holds until"] = f"{claims.valid_until:%Y-%m-%d %H:%M:%S} UTC"
    for index, device in enumerate(claims.devices):
        found |= {f"device {index} {name}": value for name, value in _claims(device).items()}
    return {name: value for name, value in found.items() if value}


# Manifests -----------------------------------------------------------------------------------------------------


def verify_manifest(you: You, path: Path, *, at: datetime | None) -> None:
    """Run every entry of a manifest and print one line each; exit status 1 if one is not as expected."""
    from cloister.attestation.files import manifest

    entries = manifest.parse(read(path, "the manifest"))
    chains = chains_of(path.parent, entries)
    wrong = 0
    results = []
    for entry in entries:
        expected, got = dict(entry.expect), _run(you, path.parent, entry, chains, at)
        if isinstance(got, str):
            differing: Mapping[str, object] = {"error": got}
        else:
            differing = manifest.differences(entry.expect, got)
        wrong += bool(differing)
        line = f"{entry.name}: ok"
        if differing:
            wanted = {name: value for name, value in expected.items() if name in differing} or expected
            line = f"{entry.name}: MISMATCH expected {_short(wanted)} got {_short(differing)}"
        if not you.ui.as_json:
            you.ui.record({}, line)
        results.append(
            {
                "name": entry.name,
                "kind": entry.kind,
                "ok": not differing,
                "expected": expected,
                "differs": dict(differing),
            }
        )
    if you.ui.as_json:
        you.ui.result({"results": results, "mismatches": wrong})
    you.ui.say(f"{len(entries) - wrong} of {len(entries)} as expected")
    if wrong:
        raise click.exceptions.Exit(1)


def _run(you: You, folder: Path, entry: Entry, chains: Mapping[str, bytes], at: datetime | None) -> Observation | str:
    from cloister.attestation.files import Case, observe
    from cloister.attestation.roots import Roots

    try:
        files = {role: read(folder / name, f"the {role}") for role, name in entry.files.items()}
        return observe(
            Case(
                entry.kind,
                files,
                at or entry.at or now(),
                name=entry.name,
                nonce=entry.nonce,
                chains=chains,
                chain=entry.chain,
                roots=Roots(soft=you.soft),
            )
        )
    except CloisterError as error:  # a missing file, a kind that nobody knows: this line, and on to the next
        return "; ".join([error.message, *map(str, error.reasons)])


def chains_of(folder: Path, entries: Sequence[Entry]) -> dict[str, bytes]:
    """Return the vendor chains that entries may name: roles of an entry whose files are chains, and `chain-<name>.pem`."""
    wanted = {entry.chain for entry in entries if entry.chain}
    found: dict[str, bytes] = {}
    for entry in entries:
        for role, name in entry.files.items():
            if role in wanted and (folder / name).is_file():
                found.setdefault(role, read(folder / name, "a vendor chain"))
        for beside in {Path(name).parent for name in entry.files.values()}:
            path = folder / beside / f"chain-{entry.chain}.pem"
            if entry.chain and path.is_file():
                found.setdefault(entry.chain, read(path, "a vendor chain"))
    return found


def _short(value: Mapping[str, object]) -> str:
    import json

    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return text if len(text) <= 400 else text[:399] + "…"
