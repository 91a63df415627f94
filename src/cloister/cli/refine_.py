"""`cloister refine`: run a contract's refine phase."""

from __future__ import annotations

from pathlib import Path

import click

from cloister.cli.common import You, options
from cloister.cli.run_ import execute
from cloister.cli.running import NodeOptions, node_options


@click.command("refine", short_help="Run the refine phase: improve a sealed model with sealed data.")
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("args", nargs=-1)
@node_options
@options
def command(you: You, script: Path, args: tuple[str, ...], node: NodeOptions) -> None:
    """Run SCRIPT as the refine phase of a contract, inside a TEE.

    A refine phase usually reads the current model and writes its next generation; both may use one path. The old
    generation stays until the new one is sealed and registered, and is refused afterwards.

    \b
    Example:
      cloister refine refine.py --contract fraud --data new=new.sealed --data model=model.sealed --out model=model.sealed \\
          -- --data /data/new --model /data/model --out /out/model
    """
    execute(you, script, args, "refine", node)
