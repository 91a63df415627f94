"""The command `cloister`.

Exit status: 0 ok, 1 anything else, 2 usage or input, 3 denied by a contract, 4 evidence refused, 5 waiting for
signatures. Each verb is one module, imported only when it is called, so `cloister --help` starts in a blink.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

import click

from cloister import __version__
from cloister.cli.ui import Ui
from cloister.errors import CloisterError, InputError
from cloister.node.signals import StoppedError, stop_on_signals

VERBS: Final = {
    "doctor": "What this machine can do, what is missing, how to get it.",
    "up": "Start a broker: the attested key service of your contracts.",
    "key": "Make and show the SSH key that you sign with.",
    "seal": "Turn a folder into a sealed volume and hand its key to the broker.",
    "open": "Open a sealed volume that you own.",
    "measure": "Measure a script with its whole environment: one digest, readable.",
    "reference": "Make, show and import signed reference values.",
    "contract": "Write, check, explain, compare and submit contracts.",
    "sign": "Sign a contract with your SSH key.",
    "run": "Run a phase of a contract: attest, unlock, confine, run, seal.",
    "refine": "Run the refine phase: improve a sealed model with sealed data.",
    "serve": "Answer a contract's consumers from a sealed model.",
    "ask": "Attest a service, then ask it a question.",
    "status": "Where contracts and the broker stand.",
    "why": "Explain a denial.",
    "audit": "Check the broker's log and your receipts, offline.",
    "witness": "Co-sign the log's checkpoints so that it cannot be rolled back or forked.",
    "verify": "Check hardware evidence, a sealed volume or a receipt.",
    "collateral": "Keep, fetch and carry what hardware vendors publish.",
}


class _Verbs(click.Group):
    """Loads `cloister.cli.<verb>` when the verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"cloister.cli.{cmd_name}_").command
        return command if isinstance(command, click.Command) else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = click.utils.make_str(args[0])
        if name not in VERBS and not name.startswith("-"):
            import difflib

            close = difflib.get_close_matches(name, VERBS, n=1)
            ctx.fail(f"no command '{name}'." + (f" Did you mean '{close[0]}'?" if close else ""))
        return super().resolve_command(ctx, args)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="cloister")
def cli() -> None:
    """Confidential machine learning on machines nobody has to trust.

    \b
    A first round on one machine:
      cloister key new --home hospital            a key to sign with
      cloister seal scans --as scans --to scans.sealed
      cloister measure train.py --python venv/bin/python -- --data /data/scans --out /out/model
      cloister contract check pneumonia.toml
      cloister sign pneumonia.toml
      cloister run train.py --contract pneumonia.toml --phase train ...

    Settings come from options or from the environment: CLOISTER_HOME (your keys and memory), CLOISTER_BROKER (its
    address), CLOISTER_INSECURE_SOFT_TEE=1 (accept software evidence that protects nothing), NO_COLOR.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    ui = Ui(as_json="--json" in own)
    try:
        with stop_on_signals():
            result = cli.main(args=arguments, prog_name="cloister", standalone_mode=False, obj=ui)
        return result if isinstance(result, int) else 0
    except CloisterError as error:
        ui.error(error)
        return error.exit_status
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        if ui.as_json:
            ui.error(_usage(error))
        else:
            error.show()
        return InputError.exit_status
    except (KeyboardInterrupt, click.exceptions.Abort):
        stopped = StoppedError("Ctrl-C")
        ui.error(stopped)
        return stopped.exit_status
    except BrokenPipeError:
        # Nobody reads any more. Python would say so once more at exit.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 1
    except OSError as error:
        from cloister.cli.common import system_error

        refused = system_error(error)
        ui.error(refused)
        return refused.exit_status


def _usage(error: click.ClickException) -> InputError:
    """A slip on the command line as an error of the tree."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    return InputError(error.format_message(), hint=f"`{context.command_path} --help` shows how" if context else "")


def entry() -> None:
    """Console script."""
    sys.exit(main())
