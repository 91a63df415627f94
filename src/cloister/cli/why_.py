"""`cloister why`: explain a denial."""

from __future__ import annotations

import re

import click

from cloister.cli.common import You, options
from cloister.errors import InputError, Reason


@click.command("why", short_help="Explain a denial.")
@click.argument("denial")
@options
def command(you: You, denial: str) -> None:
    """Show every reason behind DENIAL (d-...), as the broker logged it.

    \b
    Example:
      cloister why d-81c2aa03b7f1
    """
    if not re.fullmatch(r"d-[0-9a-f]{12}", denial, re.ASCII):
        raise InputError(
            f"'{denial}' is not the id of a denial",
            reasons=[Reason("denial", denial, "d- and 12 hex digits")],
            hint="the error that you were shown names it, and so does its --json form",
        )
    record = you.broker().denial(denial)
    lines = [
        f"{denial}: {record.operation} refused at {record.time:%Y-%m-%d %H:%M:%S} UTC, log entry {record.entry}",
        f"  {record.message}",
    ]
    for one in record.reasons:
        lines.append(f"  {one.where}: wants {one.wanted}, found {one.found}")
        if one.hint:
            lines.append(f"    next: {one.hint}")
    if record.error in ("denied", "budget-spent"):
        lines.append(
            "  the contract decides this: its owners can change it (`cloister contract diff`, `cloister sign`)"
        )
    you.ui.result({**record.as_map(), "time": record.time.isoformat()}, "\n".join(lines))
