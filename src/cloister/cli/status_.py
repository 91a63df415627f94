"""`cloister status`: where contracts and the broker stand."""

from __future__ import annotations

import click

from cloister.cli.common import You, check_reference, options, table
from cloister.errors import InputError


@click.command("status", short_help="Where contracts and the broker stand.")
@click.argument("contract", required=False)
@click.option(
    "--metrics", is_flag=True, help="What leaves to you while phases of CONTRACT run, signed for with your key."
)
@click.option("--phase", default="", help="With --metrics: one phase only.  [default: every phase that names you]")
@click.option("--follow", is_flag=True, help="With --metrics: go on until what runs has ended.")
@options
def command(you: You, contract: str | None, metrics: bool, phase: str, follow: bool) -> None:
    """Show the attested broker and its contracts, or one CONTRACT (id or name).

    Exit status 5 if the one contract still waits for signatures.

    With --metrics, show what the contract's `metrics_to` gives you, wherever you are: one line per line of the program,
    logs too where `leaves` names them. With --json each is a JSON object of its own on one line, the last one says how
    complete it is. Exit status 3 if the contract gives you nothing.

    \b
    Examples:
      cloister status
      cloister status pneumonia-xray --json
      cloister status pneumonia-xray --metrics --follow
    """
    if contract is None and metrics:
        raise InputError("`--metrics` wants the file, name or id of a contract", hint="`cloister status` lists them")
    if (follow or phase) and not metrics:
        raise InputError("`--follow` and `--phase` go with `--metrics`")
    broker = you.broker()
    if contract is not None and metrics:
        from cloister.cli.listening import show

        show(you, broker, contract, phase=phase, follow=follow)
        return
    if contract is not None:
        one = broker.contract_status(check_reference(contract))
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
