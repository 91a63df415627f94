"""`cloister status`: where contracts and the broker stand."""

from __future__ import annotations

import click

from cloister.cli.common import You, options, table


@click.command("status", short_help="Where contracts and the broker stand.")
@click.argument("contract", required=False)
@options
def command(you: You, contract: str | None) -> None:
    """Show the attested broker and its contracts, or one CONTRACT (id or name).

    Exit status 5 if the one contract still waits for signatures.

    \b
    Examples:
      cloister status
      cloister status pneumonia-xray --json
    """
    broker = you.broker()
    if contract is not None:
        one = broker.contract_status(contract)
        lines = [
            f"{one.name} version {one.version}: {one.state}, until {one.expires}",
            f"  id       {one.contract}",
            f"  signed   {', '.join(one.signed) or 'nobody'}",
            f"  waiting  {', '.join(one.waiting) or 'nobody'}",
        ]
        you.ui.result(one.as_map(), "\n".join(lines))
        if one.state == "waiting":
            raise click.exceptions.Exit(5)
        return
    status, contracts = broker.status(), broker.contracts()
    seen = broker.broker
    rows = [
        {
            "contract": one.name,
            "version": str(one.version),
            "state": one.state,
            "waiting": ", ".join(one.waiting),
            "id": one.contract[:19] + "…",
        }
        for one in contracts
    ]
    text = "\n".join(
        [
            f"broker {seen.url}, attested as {seen.claims.tee}, version {status.version}",
            f"  log {status.origin}: {status.entries} entries, epoch {status.epoch}; {status.leases} leases",
            table(rows) or "  no contracts",
        ]
    )
    you.ui.result(
        {
            "broker": {
                "url": seen.url,
                "tee": seen.claims.tee,
                "version": status.version,
                "origin": status.origin,
                "entries": status.entries,
                "epoch": status.epoch,
                "leases": status.leases,
            },
            "contracts": [one.as_map() for one in contracts],
        },
        text,
    )
