"""From a contract and what an operator brought to what will run: a pure check before anything is touched.

Steps; all findings are reported together:

  1 phase     the contract has the phase
  2 place     this version runs phases on a TEE or an attested host, on one worker, and no secret code
  3 inputs    every asset that the phase reads has a sealed volume, and nothing else was brought
  4 outputs   every asset that the phase writes has a target, and nothing else was named
  5 clashes   no two assets share a path; only an asset that is read and written may use one path for both

Whether the node may have the keys is the broker's question; this only finds the operator's slips early.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.contract.model import Contract, HePlace
from cloister.errors import InputError, Reason

DEFAULT_OUTPUT_BYTES: Final = 2 << 30
"""Room for one output whose size the contract leaves open, 2 GiB of memory-backed scratch."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One phase of one contract with the operator's paths. Asset names are keys of `reads`, `writes`, `sizes`."""

    contract: Contract
    phase: str
    code: str
    digest: str
    sandbox: str
    reads: Mapping[str, Path]
    writes: Mapping[str, Path]
    sizes: Mapping[str, int]
    """Most bytes of each output."""


def plan(contract: Contract, phase: str, *, data: Mapping[str, Path], out: Mapping[str, Path]) -> Plan:
    """Return the plan.

    Raises:
        InputError: with every finding of steps 1 to 5.
    """
    wanted = contract.phase.get(phase)
    if wanted is None:  # 1: nothing else can be judged
        names = ", ".join(contract.phase)
        raise InputError(
            f"contract '{contract.name}' has no phase '{phase}'",
            reasons=[Reason("phase", f"'{phase}'", f"one of: {names}", _close(phase, contract.phase))],
        )
    reasons: list[Reason] = []
    if isinstance(contract.place[wanted.at], HePlace):  # 2
        reasons.append(
            Reason(
                f"phase.{phase}.at",
                f"'{wanted.at}', homomorphic encryption",
                "a place of kind tee or attested-host",
                "this version refines inside TEEs only",
            )
        )
    if wanted.workers != 1:
        reasons.append(
            Reason(f"phase.{phase}.workers", str(wanted.workers), "1", "this version runs a phase on one worker")
        )
    if contract.code[wanted.run].secret:
        reasons.append(
            Reason(f"code.{wanted.run}.secret", "true", "false", "this version runs code that its operator may read")
        )
    if contract.code[wanted.run].sandbox == "sealed" and wanted.write:
        reasons.append(
            Reason(
                f"code.{wanted.run}.sandbox",
                "'sealed', for code that nobody trusts",
                "'offline' or 'one-shot' where a phase writes",
                "this version does not yet hide size and end of such a program's outputs from the operator",
            )
        )
    streams = sorted(set(wanted.read) & set(contract.stream))
    reasons += [
        Reason(f"phase.{phase}.read", f"stream '{name}'", "a data asset or an output", "this version reads no streams")
        for name in streams
    ]
    reasons += _compare("--data", set(wanted.read) - set(streams), data, f"phase.{phase}.read")  # 3
    reasons += _compare("--out", set(wanted.write), out, f"phase.{phase}.write")  # 4
    taken: dict[Path, str] = {}
    for name, path in [*data.items(), *out.items()]:  # 5
        other = taken.setdefault(path, name)
        if other != name:
            reasons.append(Reason(str(path), f"used for '{other}' and '{name}'", "one path for each asset"))
    if reasons:
        raise InputError(f"phase '{phase}' of contract '{contract.name}' cannot run like this", reasons=reasons)
    code = contract.code[wanted.run]
    return Plan(
        contract=contract,
        phase=phase,
        code=wanted.run,
        digest=code.digest,
        sandbox=code.sandbox,
        reads=dict(sorted(data.items())),
        writes=dict(sorted(out.items())),
        sizes={name: wanted.size.get(name, DEFAULT_OUTPUT_BYTES) for name in wanted.write},
    )


def _compare(option: str, wanted: set[str], given: Mapping[str, Path], where: str) -> list[Reason]:
    missing = [
        Reason(where, f"no path for '{name}'", f"{option} {name}=PATH", "name the sealed volume of this asset")
        for name in sorted(wanted - set(given))
    ]
    surplus = [
        Reason(option, f"'{name}'", f"one of: {', '.join(sorted(wanted)) or 'nothing'}", _close(name, wanted))
        for name in sorted(set(given) - wanted)
    ]
    return missing + surplus


def _close(name: str, names: Mapping[str, object] | set[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean '{close[0]}'?" if close else ""
