"""`cloister run`: run a phase of a contract on this machine."""

from __future__ import annotations

import time
from pathlib import Path

import click

from cloister.cli.common import You, keep_receipt, options, write_file
from cloister.cli.running import NodeOptions, enter, node_options
from cloister.errors import CloisterError


@click.command("run", short_help="Run a phase of a contract: attest, unlock, confine, run, seal.")
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("args", nargs=-1)
@click.option("--phase", default="train", show_default=True, help="Phase of the contract.")
@node_options
@options
def command(you: You, script: Path, args: tuple[str, ...], phase: str, node: NodeOptions) -> None:
    """Run SCRIPT with ARGS, unmodified, as a phase of a contract.

    The script and its whole environment are measured, this machine proves to the broker what it is, and only then keys
    come, sealed to this process. Inputs appear at /data/<asset>, outputs are written to /out/<asset> and sealed.

    \b
    Example:
      cloister run train.py --contract pneumonia-xray --python venv/bin/python \\
          --data scans=scans.sealed --out detector=detector.sealed -- --data /data/scans --out /out/detector
    """
    execute(you, script, args, phase, node)


def execute(you: You, script: Path, args: tuple[str, ...], phase: str, node: NodeOptions) -> None:
    """Run one phase to its end and print what it left."""
    from cloister.node.run import Audience, provenance, run

    begin = time.perf_counter()
    plan, admission, broker = enter(you, node, phase, script, args)
    wanted = plan.contract.phase[phase]
    listening = [party for party in wanted.metrics_to if you.holds_key_of(plan.contract.party[party])]
    audience = Audience(
        metrics=bool(listening) and "metrics" in wanted.streams_out,
        logs=bool(listening) and "logs" in wanted.streams_out,
    )
    result = run(plan, admission, broker, report=you.ui, audience=audience)
    document = provenance(plan, admission, result)
    try:
        for asset, written in result.outputs.items():
            keep_receipt(you, written.receipt, f"root-{asset}-{written.generation}")
            write_file(plan.writes[asset].with_name(plan.writes[asset].name + ".provenance.json"), document)
        keep_receipt(you, result.receipt, f"release-{admission.release.lease.id}")
    except CloisterError as error:  # the outputs are sealed and registered: this is no failure of the run
        you.ui.warn(f"{error.message}; the outputs are complete, receipts or provenance are not")
    total = time.perf_counter() - begin
    lines = [
        f"wrote {asset} ({plan.contract.outputs[asset]}), generation {written.generation}: {written.digest}"
        for asset, written in result.outputs.items()
    ]
    you.ui.result(
        {
            "outputs": {
                asset: {"digest": written.digest, "generation": written.generation}
                for asset, written in result.outputs.items()
            },
            "attester": admission.prepared.attester.name,
            "level": admission.prepared.level,
            "metrics": dict(result.metrics) if audience.metrics else {},
            "seconds": {**result.seconds, "total": total},
        },
        "\n".join(lines) or "done",
    )
