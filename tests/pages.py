"""Pages that are made: docs/cli.md from the commands themselves, the lines of a run in README.md from its output.

python -m tests.pages                     writes docs/cli.md
./run job > LOG && python -m tests.pages job LOG
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from cloister.cli import VERBS, cli

HERE: Final = Path(__file__).resolve().parents[1]
PAGE: Final = HERE / "docs" / "cli.md"
README: Final = HERE / "README.md"
JOB: Final = re.compile(r"(<!-- job: .*? -->\n```text\n).*?(```\n<!-- end of job -->)", re.DOTALL)

OPENING: Final = """\
# The command line

<!-- Made by `python -m tests.pages` from the commands themselves; a test compares. -->

`cloister VERB ...`; in this repository `./run cloister VERB ...`. Talk goes to stderr, data to stdout. A whole round with real output is in
[guide.md](guide.md); every error code in [errors.md](errors.md).

| exit status | |
| --- | --- |
| 0 | success |
| 1 | this machine, a peer, or stored bytes that were changed |
| 2 | usage or input |
| 3 | denied by a contract |
| 4 | evidence refused |
| 5 | waiting for signatures |

Everything after `--` belongs to the script.

## Common options

Every verb has them. `HOME` below is the folder that `--home` names.

"""
ENVIRONMENT: Final = """
`NO_COLOR` switches colour off.

"""


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every command with its full name: `seal`, `contract`, `contract check`."""
    context = click.Context(cli)
    for verb in VERBS:
        command = cli.get_command(context, verb)
        if command is None:
            raise ValueError(f"the verb {verb!r} has no command")
        yield verb, command
        if isinstance(command, click.Group):
            yield from ((f"{verb} {name}", command.commands[name]) for name in command.commands)


def options(command: click.Command) -> list[click.Option]:
    return [one for one in command.params if isinstance(one, click.Option)]


def common() -> list[click.Option]:
    """The options that every command has, in the order of the first one."""
    leaves = [command for _, command in commands() if not isinstance(command, click.Group)]
    names = set.intersection(*({one.name or "" for one in options(command)} for command in leaves))
    return [one for one in options(leaves[0]) if one.name in names]


def node() -> list[click.Option]:
    """The options that `run`, `refine` and `serve` share beyond the common ones."""
    run, refine, serve = (dict(commands())[name] for name in ("run", "refine", "serve"))
    names = {one.name for one in options(refine)} & {one.name for one in options(serve)} - {
        one.name for one in common()
    }
    return [one for one in options(run) if one.name in names]


def row(option: click.Option, context: click.Context) -> str:
    """`| --port INTEGER | Port; 0 takes a free one. | 0 |`."""
    metavar = "" if option.is_flag else " " + option.make_metavar(context).removesuffix(" RANGE")
    help_text, default = option.help or "", ""
    if match := re.search(r"\s+\[default: (.*)\]$", help_text):
        help_text, default = help_text[: match.start()], match[1]
    elif option.required:
        default = "required"
    elif option.show_default and option.default not in (None, ""):
        default = f"`{option.default}`"
    if option.multiple:
        help_text += " May be given several times."
    if isinstance(option.type, click.IntRange | click.FloatRange):
        low, high = option.type.min, option.type.max
        bounds = [
            *([f"{'above' if option.type.min_open else 'at least'} {low:g}"] if low is not None else []),
            *([f"at most {high:g}"] if high is not None else []),
        ]
        help_text += f" {' and '.join(bounds).capitalize()}."
    if option.envvar:
        help_text += f" Environment: `{option.envvar}`."
    name = f"{', '.join(option.opts)}{metavar}".replace("|", "\\|")
    return f"| `{name}` | {help_text} | {default} |"


def options_table(chosen: list[click.Option], context: click.Context) -> str:
    lines = ["| option | meaning | default |", "| --- | --- | --- |", *(row(one, context) for one in chosen)]
    return "\n".join(lines) + "\n"


def help_text(command: click.Command) -> str:
    """The command's own words; its examples become a code block."""
    text = inspect.cleandoc(command.help or "").replace("\b\n", "\n")
    words, _, examples = re.sub(r"\n{2,}", "\n\n", text).partition("\n\nExample")
    # Angle brackets outside code would be taken for HTML.
    pieces = words.split("`")
    pieces[::2] = [re.sub(r"[\w./-]*<\w+>(?:[\w./-]*\w)?", r"`\g<0>`", piece) for piece in pieces[::2]]
    words = "`".join(pieces)
    if not examples:
        return words + "\n"
    lines = textwrap.dedent(examples.split(":\n", 1)[1]).strip()
    return f"{words}\n\n```console\n{lines}\n```\n"


def section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name, parent=click.Context(cli, info_name="cloister"))
    shared = {one.name for one in common()} | (
        {one.name for one in node()} if name in ("run", "refine", "serve") else set()
    )
    own = [one for one in options(command) if one.name not in shared]
    level = "##" if " " not in name else "###"
    usage = " ".join(piece for piece in command.collect_usage_pieces(context))
    if isinstance(command, click.Group):
        usage = usage.replace("COMMAND [ARGS]...", "VERB ...")
    parts = [f"{level} {name}\n", f"`cloister {name} {usage}`\n", help_text(command)]
    if name in ("run", "refine", "serve"):
        parts.append("The [options of a node](#options-of-a-node) apply.\n")
    if own:
        parts.append(options_table(own, context))
    return "\n".join(parts)


def page() -> str:
    """Return docs/cli.md."""
    context = click.Context(cli)
    index = "\n".join(f"| [`{verb}`](#{verb}) | {about} |" for verb, about in VERBS.items())
    sections = "\n".join(section(name, command) for name, command in commands())
    shared = (
        options_table(common(), context) + ENVIRONMENT + "## Options of a node\n\n" + options_table(node(), context)
    )
    return OPENING + shared + f"\n## Verbs\n\n| verb | |\n| --- | --- |\n{index}\n\n" + sections


def job_lines(log: str) -> str:
    """Return the steps, refusals, times and figures of a run: its output without command lines and what commands printed."""
    begin = re.search(r"^1  ", log, re.MULTILINE)
    if begin is None or "protects nothing" not in log:
        raise ValueError("not the output of a whole `./run job`")
    lines = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", log[begin.start() :]).splitlines():
        if line.startswith(("rc=", "real")):
            break
        if not line.startswith("│"):
            lines.append(line.rstrip())
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str]) -> None:
    match arguments:
        case []:
            PAGE.write_text(page())
        case ["job", log]:
            lines = job_lines(Path(log).read_text())
            README.write_text(JOB.sub(lambda found: found[1] + lines + found[2], README.read_text()))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
