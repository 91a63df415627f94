"""What `run`, `refine` and `serve` share: options of a node, and the way from a script to an admitted phase."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cloister.cli.common import SOFT_NOTE, Pair, You, find_contract, paths, read_workload
from cloister.cli.measure_ import workload_spec

if TYPE_CHECKING:
    from cloister.attestation.edge.attester import Attester
    from cloister.broker.client import BrokerClient
    from cloister.confine.launch import Level
    from cloister.node.admission import Admission
    from cloister.node.plan import Plan

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """The options of a node as the user gave them."""

    reference: str
    data: Mapping[str, Path]
    out: Mapping[str, Path]
    python: Path | None
    env: Mapping[str, str]
    expected: Path | None
    level: Level | None


def node_options(function: Callable[..., R]) -> Callable[..., R]:
    """`--contract`, `--data`, `--out`, `--python`, `--env`, `--expected`, `--level`; given as one `NodeOptions`."""

    @click.option("--contract", "reference", required=True, help="Contract: a file, an id, or a name at the broker.")
    @click.option(
        "--data", type=Pair("ASSET=PATH"), multiple=True, help="Sealed volume of an asset that the phase reads."
    )
    @click.option("--out", type=Pair("ASSET=PATH"), multiple=True, help="Where the sealed volume of an output goes.")
    @click.option(
        "--python", type=click.Path(path_type=Path), help="Interpreter of the environment.  [default: the active one]"
    )
    @click.option("--env", type=Pair("NAME=VALUE"), multiple=True, help="Environment variable that was measured too.")
    @click.option(
        "--expected", type=click.Path(path_type=Path), help="The author's workload file: explains what differs."
    )
    @click.option(
        "--level", type=click.Choice(["L1", "L2", "L3"]), help="Confinement level to use.  [default: the best here]"
    )
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        reference: str,
        data: tuple[tuple[str, str], ...],
        out: tuple[tuple[str, str], ...],
        python: Path | None,
        env: tuple[tuple[str, str], ...],
        expected: Path | None,
        level: Level | None,
        **rest: Any,
    ) -> R:
        chosen = NodeOptions(reference, paths(data, "--data"), paths(out, "--out"), python, dict(env), expected, level)
        return function(*args, node=chosen, **rest)

    return wrapper


def attester(you: You) -> Attester:
    """Return this machine's attester: hardware, or the soft one if the user named it."""
    from cloister.attestation.edge.attester import find_attester
    from cloister.attestation.edge.software import measure_package

    if you.soft:
        you.ui.warn(f"this node shows {SOFT_NOTE}")
    return find_attester("soft-tdx" if you.soft else "auto", measurement=measure_package())


def enter(
    you: You, options: NodeOptions, phase: str, script: Path, args: tuple[str, ...]
) -> tuple[Plan, Admission, BrokerClient]:
    """Plan, measure, stage, extend, attest: everything before the first secret is used."""
    from cloister.crypto.memory import harden_process
    from cloister.node.admission import Store, admit, prepare
    from cloister.node.plan import plan
    from cloister.node.volumes import isolate

    expected = None if options.expected is None else read_workload(options.expected)
    broker = you.broker()
    contract = find_contract(options.reference, broker)
    chosen = plan(contract, phase, data=options.data, out=options.out)
    spec = workload_spec(you, options.python, script, args, dict(options.env))
    prepared = prepare(
        chosen,
        spec,
        attester(you),
        store=Store(you.home / "node"),
        report=you.ui,
        level=options.level,
        expected=expected,
    )
    # From here on there are secrets.
    isolate()
    harden_process()
    return chosen, admit(chosen, prepared, broker, you.ui), broker
