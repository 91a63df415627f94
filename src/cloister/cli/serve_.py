"""`cloister serve`: answer the consumers of a contract."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import click

from cloister.cli.common import You, keep_receipt, now, options, write_file
from cloister.cli.running import NodeOptions, enter, node_options


@click.command("serve", short_help="Answer a contract's consumers from a sealed model.")
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("args", nargs=-1)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="Port; 0 takes a free one.")
@click.option(
    "--spares",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Warm processes; one-shot sandboxes need some.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds that one answer may take.",
)
@click.option(
    "--ready-file", type=click.Path(path_type=Path), help="Write the address here when questions are welcome."
)
@node_options
@options
def command(
    you: You,
    script: Path,
    args: tuple[str, ...],
    host: str,
    port: int,
    spares: int,
    timeout_s: float,
    ready_file: Path | None,
    node: NodeOptions,
) -> None:
    """Run SCRIPT as the serve phase of a contract and answer questions until stopped.

    SCRIPT is an ordinary filter: it reads `{"input": "<base64>"}` a line on stdin and prints `{"scores": {...}}` a line on
    stdout. The contract's answer form is enforced outside its jail. Questions and answers are encrypted end to end.

    \b
    Example:
      cloister serve predict.py --contract pneumonia-xray --data detector=detector.sealed -- --model /data/detector
    """
    from cloister.serve.host import serve

    def ready(url: str) -> None:
        if ready_file is not None:
            write_file(ready_file, json.dumps({"url": url, "contract": plan.contract.id}).encode())

    plan, admission, broker = enter(you, node, "serve", script, args)
    keep_receipt(you, admission.release.receipt, f"release-{admission.release.lease.id}")
    with ExitStack() as stack:
        counts = serve(
            plan,
            admission,
            broker,
            host=host,
            port=port,
            spares=spares,
            timeout_s=timeout_s,
            ready=ready,
            report=you.ui,
            clock=now,
            stack=stack,
        )
    you.ui.result(
        {"answered": counts.answered, "refused": counts.refused},
        f"answered {counts.answered}, refused {counts.refused}",
    )
