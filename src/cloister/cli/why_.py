"""`cloister why`: explain a denial."""

from __future__ import annotations

import click

from cloister.cli.common import You, options
from cloister.errors import DeniedError


@click.command("why", short_help="Explain a denial.")
@click.argument("denial")
@options
def command(you: You, denial: str) -> None:
    """Show every reason behind DENIAL (d-...), as the broker logged it.

    \b
    Example:
      cloister why d-81c2aa03b7f1
    """
    record = you.broker().denial(denial)
    error = record.error.as_error()
    lines = [
        f"{denial}: {record.operation} refused at {record.time:%Y-%m-%d %H:%M:%S} UTC, log entry {record.entry}",
        f"  {error.message}",
    ]
    lines += [f"  {reason}" for reason in error.reasons]
    if error.hint:
        lines.append(f"  next: {error.hint}")
    if isinstance(error, DeniedError):
        lines.append(
            "  the contract decides this: its owners can change it (`cloister contract diff`, `cloister sign`)"
        )
    you.ui.result(
        {
            "denial": denial,
            "operation": record.operation,
            "time": record.time.isoformat(),
            "entry": record.entry,
            "contract": record.contract,
            "phase": record.phase,
            "error": error.as_json(),
        },
        "\n".join(lines),
    )
