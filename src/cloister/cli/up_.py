"""`cloister up`: start a broker."""

from __future__ import annotations

from pathlib import Path

import click

from cloister.cli.common import SOFT_NOTE, Pair, You, measurements, options, root_pins, write_file


@click.command("up", short_help="Start a broker: the attested key service of your contracts.")
@click.option("--state", type=click.Path(file_okay=False, path_type=Path), help="Its folder.  [default: HOME/broker]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="Port; 0 takes a free one.")
@click.option("--origin", default="cloister.local/broker", show_default=True, help="Name of its log.")
@click.option(
    "--lease", "lease_s", default=600, show_default=True, help="Seconds that a node may work without attesting again."
)
@click.option(
    "--node", "nodes", multiple=True, help="Accepted launch measurement of nodes, hex.  [default: this software's own]"
)
@click.option(
    "--collateral",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Vendor collateral: a file, a snapshot, or a store's folder. New content is noticed without a restart.",
)
@click.option(
    "--root",
    "own_roots",
    type=Pair("KIND=FILE"),
    multiple=True,
    help="Root certificate to believe, too, for one kind of evidence. Clients must believe it as well.",
)
@click.option("--kbs", is_flag=True, help="Also serve clients of Trustee's KBS protocol 0.4.0 (docs/kbs.md).")
@click.option("--ready-file", type=click.Path(path_type=Path), help="Write the address here when the broker answers.")
@options
def command(
    you: You,
    state: Path | None,
    host: str,
    port: int,
    origin: str,
    lease_s: int,
    nodes: tuple[str, ...],
    collateral: tuple[Path, ...],
    own_roots: tuple[tuple[str, str], ...],
    kbs: bool,
    ready_file: Path | None,
) -> None:
    """Start a broker on this machine and keep it running until stopped.

    A broker should run in a TEE of its own. Everybody who uses it attests it first: its software, its configuration and the
    key of its log are in its evidence. Its state is a folder; a restart finds everything again.

    \b
    Examples:
      cloister up --port 8443
      cloister up --insecure-soft-tee            (to try things out on a machine without a TEE)
    """
    from cloister.broker.main import Config, serve
    from cloister.crypto.memory import harden_process

    harden_process()
    if you.soft:
        you.ui.warn(f"this broker shows {SOFT_NOTE}")

    def ready(url: str, server: object) -> None:
        import json
        import os

        if ready_file is not None:
            write_file(ready_file, json.dumps({"url": url, "pid": os.getpid()}).encode())
        you.ui.result({"url": url, "pid": os.getpid()}, url)

    serve(
        state or you.home / "broker",
        host,
        port,
        Config(
            origin=origin,
            attester="soft-tdx" if you.soft else "auto",
            node_measurements=measurements(nodes, "--node"),
            allow_soft=you.soft,
            lease_s=lease_s,
            collateral=collateral,
            roots=root_pins(own_roots),
            kbs=kbs,
        ),
        say=you.ui.say,
        ready=ready,
    )
