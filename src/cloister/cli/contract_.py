"""`cloister contract`: write, check, explain, compare, submit and end contracts."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cloister.cli.common import You, check_reference, keep_receipt, options, read_contract, write_file
from cloister.errors import InputError


@click.group("contract", short_help="Write, check, explain, compare and submit contracts.")
def command() -> None:
    """Write, check, explain, compare and submit contracts.

    A contract is one TOML file: parties, code, data, places, phases. `docs/contract.md` has every key.

    \b
    Examples:
      cloister contract new pneumonia.toml
      cloister contract check pneumonia.toml
      cloister contract readers pneumonia.toml scans
      cloister contract diff pneumonia-1.toml pneumonia-2.toml
    """


NEW = """#:schema ./contract.schema.json
contract = "{name}"
version  = 1
expires  = {expires}
[party]                     # fingerprints from `cloister key show`
owner    = "{me}"
consumer = "{me}"           # another key than the owner's: this line does not pass `contract check` as it is
[code]                      # digests from `cloister measure`
trainer = {{ owner = "owner", digest = "{digest}", sandbox = "offline" }}
server  = {{ owner = "owner", digest = "{digest}", sandbox = "offline" }}
[data]                      # digests from `cloister seal`
records = {{ owner = "owner", digest = "{digest}" }}
[place]
enclave = {{ kind = "tee", accept = ["tdx"], min_tcb = "{month}" }}
[phase.train]
run   = "trainer"
at    = "enclave"
read  = ["records"]
write = {{ model = "nobody" }}
metrics_to = ["owner"]
[phase.serve]
run    = "server"
at     = "enclave"
read   = ["model"]
answer = {{ to = ["consumer"], form = "label", budget = 10_000, per_day = 500 }}
[change]
default = ["owner"]
"""


@command.command()
@click.argument("file", type=click.Path(path_type=Path))
@options
def new(you: You, file: Path) -> None:
    """Write a commented contract to start from, and the JSON Schema beside it for your editor."""
    from datetime import timedelta

    from cloister.cli.common import now
    from cloister.contract.schema import schema

    if file.exists():
        raise InputError(f"{file} exists already", hint="name a new file")
    today = now().date()
    me = you.fingerprint() if you.key_file.exists() else "SHA256:" + "A" * 43
    text = NEW.format(
        name=file.stem,
        expires=today + timedelta(days=365),
        month=f"{today:%Y}-01",
        me=me,
        digest="sha256:" + "0" * 64,
    )
    write_file(file, text.encode())
    write_file(file.parent / "contract.schema.json", (json.dumps(schema(), indent=2) + "\n").encode())
    you.ui.result({"file": str(file)}, str(file))


@command.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--explain", "long", is_flag=True, help="Say everything: phases, readers, who could change what.")
@options
def check(you: You, file: Path, long: bool) -> None:
    """Parse FILE, apply every rule, list what is worth knowing before you sign."""
    from cloister.contract.analyse import explain, lint, summary

    _, contract = read_contract(file)
    notes = [{"where": n.where, "text": n.text, "warning": n.warning} for n in lint(contract)]
    you.ui.result(
        {
            "contract": contract.id,
            "name": contract.name,
            "version": contract.version,
            "signers": sorted(contract.signers),
            "notes": notes,
        },
        explain(contract) if long else f"{summary(contract)}\n{contract.id}",
    )


@command.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("asset", required=False)
@options
def readers(you: You, file: Path, asset: str | None) -> None:
    """Who can ever read ASSET (default: every asset) or something made from it, and who could change it."""
    from cloister.contract.analyse import assets, changers, changers_text, readers_text
    from cloister.contract.analyse import readers as read_by

    _, contract = read_contract(file)
    if asset is not None and asset not in assets(contract):
        raise InputError(
            f"contract '{contract.name}' has no asset '{asset}'", hint=f"it has: {', '.join(assets(contract))}"
        )
    chosen = assets(contract) if asset is None else (asset,)
    lines: list[str] = []
    for one in chosen:
        lines += [readers_text(contract, one), changers_text(contract, one)]
    you.ui.result(
        {
            one: {
                "readers": [
                    {"who": r.who, "what": r.what, "kind": r.kind, "path": [list(step) for step in r.path]}
                    for r in read_by(contract, one)
                ],
                "changers": [{"who": c.who, "what": c.what, "kind": c.kind} for c in changers(contract, one)],
            }
            for one in chosen
        },
        "\n".join(lines),
    )


@command.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new_file", metavar="NEW", type=click.Path(path_type=Path))
@options
def diff(you: You, old: Path, new_file: Path) -> None:
    """What changes from OLD to NEW, path by path."""
    from cloister.contract.change import diff as differences

    found = differences(read_contract(old)[1], read_contract(new_file)[1])
    you.ui.result(
        {"differences": [str(one) for one in found]}, "\n".join(str(one) for one in found) or "no differences"
    )


@command.command()
@click.argument("file", type=click.Path(path_type=Path))
@options
def submit(you: You, file: Path) -> None:
    """Hand FILE to the broker; it becomes active when everybody who must sign has signed."""
    data, _ = read_contract(file)
    status = you.broker().submit_contract(data, name=file.name)
    waiting = f"; waiting for {', '.join(status.waiting)}" if status.waiting else ""
    you.ui.result(status.as_map(), f"{status.contract}  {status.state}{waiting}")


@command.command()
@click.argument("contract")
@options
def revoke(you: You, contract: str) -> None:
    """End CONTRACT (id or name) as one of its signers: no key is released any more and leases are cut."""
    check_reference(contract)
    broker = you.broker()
    status = broker.contract_status(contract)
    receipt = broker.revoke(status.contract, you.signer())
    keep_receipt(you, receipt, f"revoke-{status.contract[7:19]}")
    you.ui.result({"contract": status.contract, "state": "revoked"}, f"{status.name} version {status.version}: revoked")
