"""`cloister sign`: agree to a contract."""

from __future__ import annotations

from pathlib import Path

import click

from cloister.cli.common import You, options, read_contract, read_file, write_file
from cloister.errors import InputError


@click.command("sign", short_help="Sign a contract with your SSH key.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--offline", is_flag=True, help="Only write the signature file; `--hand-in` gives it to the broker later."
)
@click.option("--hand-in", "made", type=click.Path(path_type=Path), help="Hand in this signature file; signs nothing.")
@options
def command(you: You, file: Path, offline: bool, made: Path | None) -> None:
    """Sign the exact bytes of contract FILE and hand the signature to the broker.

    The signature is an ordinary SSH signature in FILE.<party>.sig; `ssh-keygen -Y verify -n contract@cloister` checks it.

    \b
    Examples:
      cloister sign pneumonia.toml --home hospital
      cloister sign pneumonia.toml --key ~/.ssh/id_ed25519_sk.pub
      cloister sign pneumonia.toml --offline
      cloister sign pneumonia.toml --hand-in pneumonia.toml.hospital.sig
    """
    from cloister.contract.analyse import summary
    from cloister.contract.sshsig import signer

    if offline and made is not None:
        raise InputError("--offline keeps a signature here, --hand-in gives one to the broker: choose one of both")
    data, contract = read_contract(file)
    if made is not None:
        signature = read_file(made, "a signature").decode("utf-8", "replace")
        party, kept = signer(contract, data, signature), made
    else:
        party = you.party_in(contract)
        you.ui.say(summary(contract))
        signature = you.signer()(data, namespace="contract@cloister")
        kept = file.with_name(f"{file.name}.{party}.sig")
        write_file(kept, signature.encode())
    result = {"contract": contract.id, "party": party, "signature": str(kept)}
    if offline:
        you.ui.result(result, f"signed as {party}: {kept}")
        return
    broker = you.broker()
    broker.submit_contract(data, name=file.name)
    status = broker.add_signature(contract.id, signature)
    given = len(set(status.signed) & set(status.required))
    waiting = f"waiting for {', '.join(status.waiting)}" if status.waiting else "contract active"
    you.ui.result(
        {**result, "state": status.state, "signed": list(status.signed), "waiting": list(status.waiting)},
        f"signed as {party}: {given} of {len(status.required)} signatures that it needs, {waiting}",
    )
