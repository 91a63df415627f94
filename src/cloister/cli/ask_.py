"""`cloister ask`: attest a service, then ask it."""

from __future__ import annotations

import time
from pathlib import Path

import click

from cloister.cli.common import You, find_contract, keep_receipt, note_contract, now, options, read_file, table
from cloister.cli.ui import human_seconds
from cloister.errors import CloisterError


@click.command("ask", short_help="Attest a service, then ask it a question.")
@click.argument("reference", metavar="CONTRACT")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--service", "url", required=True, envvar="CLOISTER_SERVICE", help="Address of the service.")
@options
def command(you: You, reference: str, files: tuple[Path, ...], url: str) -> None:
    """Ask the service of CONTRACT about FILES, after checking what it is.

    Its evidence, its code, its platform and the broker's receipt are verified first; nothing leaves before. Every answer
    comes with a receipt, which is kept for `cloister audit`.

    \b
    Examples:
      cloister ask pneumonia-xray scan.png --service http://127.0.0.1:8100
      cloister ask pneumonia.toml *.png --service http://127.0.0.1:8100 --json
    """
    from cloister.crypto.memory import harden_process
    from cloister.serve.client import ServiceClient

    harden_process()

    inputs = [(path, read_file(path, "a question")) for path in files]
    broker = you.broker()
    contract = find_contract(reference, broker)
    party = you.party_in(contract)
    note_contract(you, contract)
    rows: list[dict[str, str]] = []
    answers: list[dict[str, object]] = []
    with (
        ServiceClient.connect(
            url, contract, party=party, sign=you.signer(), trust=you.trust(), broker=broker, clock=now
        ) as service,
    ):
        if service.claims is not None and service.claims.soft:
            you.ui.warn("the service runs in a soft TEE, as its contract allows: nothing is protected")
        you.ui.say(
            f"attested the service as party {party}: code, sandbox, platform and receipt are what the contract wants"
        )
        try:
            for path, data in inputs:
                begin = time.perf_counter()
                reply = service.ask(data)
                took = time.perf_counter() - begin
                left = "unlimited" if reply.left is None else str(reply.left)
                today = "" if reply.left_today is None else str(reply.left_today)
                said = reply.said
                row = {"file": path.name, "answer": said["label"], "score": str(said.get("score", ""))}
                row |= {"left": left, "left today": today, "receipt": str(reply.index), "time": human_seconds(took)}
                rows.append(
                    {name: value for name, value in row.items() if value or name not in ("score", "left today")}
                )
                answers.append(
                    {
                        "file": str(path),
                        **said,
                        "left": reply.left,
                        "left_today": reply.left_today,
                        "receipt": reply.index,
                        "seconds": took,
                    }
                )
                try:
                    keep_receipt(you, reply.receipt, f"answer-{reply.index}")
                except CloisterError as error:  # the answer is paid for: it is shown in any case
                    you.ui.warn(f"{error.message}; the receipt of answer {reply.index} is lost")
        finally:
            # what was answered before a refusal is paid for: show it in any case
            you.ui.partial["answers"] = answers
            if rows and not (you.ui.as_json and len(rows) < len(inputs)):
                you.ui.result({"answers": answers}, table(rows))
