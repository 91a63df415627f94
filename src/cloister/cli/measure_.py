"""`cloister measure`: a script with its whole environment becomes one digest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloister.cli.common import Pair, You, options, read_workload, real, write_file
from cloister.cli.ui import human_seconds
from cloister.errors import InputError, Reason

if TYPE_CHECKING:
    from cloister.node.workload import WorkloadSpec


def default_python() -> Path:
    """The interpreter of the active virtual environment, or the one on PATH."""
    import os

    active = os.environ.get("VIRTUAL_ENV")
    found = Path(active) / "bin" / "python" if active else Path(shutil.which("python3") or "")
    if not found.is_file():
        raise InputError("which Python?", hint="activate a virtual environment, or name one with --python")
    return found


def workload_spec(
    you: You, python: Path | None, script: Path, args: tuple[str, ...], env: dict[str, str]
) -> WorkloadSpec:
    """Return what is measured and run.

    Raises:
        InputError: your keys lie in the script's folder, all of which would be measured, staged and shown to the program.
    """
    from cloister.node.workload import WorkloadSpec

    folder, home = real(script).parent, real(you.home)
    # hidden folders are not measured, so a script in ~ and keys in ~/.config go together
    if home.is_relative_to(folder) and not any(part.startswith(".") for part in home.relative_to(folder).parts):
        raise InputError(
            f"{you.home} lies in {folder}, the script's folder: your keys would become part of the program",
            reasons=[Reason("script", str(script), "a folder with the program's own files only")],
            hint="move the script into a folder of its own, or use another --home",
        )
    return WorkloadSpec(python=python or default_python(), script=script, args=args, env=env)


@click.command("measure", short_help="Measure a script with its whole environment: one digest, readable.")
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("args", nargs=-1)
@click.option(
    "--python", type=click.Path(path_type=Path), help="Interpreter of the environment.  [default: the active one]"
)
@click.option(
    "--env", "env", type=Pair("NAME=VALUE"), multiple=True, help="Environment variable that the program gets."
)
@click.option("--to", "target", type=click.Path(path_type=Path), help="Write the measured workload to this file.")
@click.option(
    "--reference",
    "document",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write signed reference values to this file, and their signature beside it (`cloister reference`).",
)
@click.option("--diff", "old", type=click.Path(path_type=Path), help="Show what differs from an earlier workload file.")
@click.option("--software", is_flag=True, help="Also print the measurement of this Cloister installation.")
@options
def command(
    you: You,
    script: Path,
    args: tuple[str, ...],
    python: Path | None,
    env: tuple[tuple[str, str], ...],
    target: Path | None,
    document: Path | None,
    old: Path | None,
    software: bool,
) -> None:
    """Measure SCRIPT with interpreter, packages, native libraries, ARGS and environment.

    The digest goes into a contract; another machine with the same packages gets the same digest. Inside, inputs are at
    /data/<asset> and outputs at /out/<asset>, so ARGS use those paths.

    \b
    Examples:
      cloister measure train.py --python venv/bin/python --to trainer.workload -- --data /data/scans --out /out/detector
      cloister measure train.py --diff trainer.workload -- --data /data/scans --out /out/detector
      cloister measure train.py --reference trainer.json -- --data /data/scans --out /out/detector
    """
    import time

    from cloister.node.workload import diff, inventory, measure, render_inventory

    earlier = None if old is None else read_workload(old)
    spec = workload_spec(you, python, script, args, dict(env))
    begin = time.perf_counter()
    with you.ui.bar("measuring") as bar:
        workload = measure(spec, cache_dir=you.home / "measured", progress=bar.update)
    took = time.perf_counter() - begin
    result: dict[str, Any] = {"digest": workload.digest, "seconds": took}
    you.ui.say(render_inventory(inventory(workload)))
    you.ui.say(f"measured in {human_seconds(took)}")
    if earlier is not None:
        lines = diff(earlier, workload)
        result["differences"] = list(lines)
        you.ui.say("differences: " + ("none" if not lines else ""))
        for line in lines:
            you.ui.say(f"  {line}")
    if target is not None:
        write_file(target, workload.to_bytes())
    if document is not None:
        from cloister.attestation.reference import Workload
        from cloister.cli.reference_ import label, write

        name = label(script.stem)
        written, digest = write(you, document, name, None, 90, (), (Workload(name, workload.digest),))
        result["reference"] = {"digest": digest, "serial": written.serial, "file": str(document)}
        you.ui.say(f"signed reference values {name} {written.serial} in {document} and {document}.sig")
    if software:
        from cloister.attestation.edge.software import measure_package

        result["software"] = measure_package().hex()
        you.ui.say(f"this Cloister installation measures {result['software']}")
    you.ui.result(result, f'{script.stem} = {{ owner = "…", digest = "{workload.digest}" }}')
