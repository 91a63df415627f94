"""The command line explains itself: every verb has help and an example, a typo gets a suggestion, nothing is loaded early."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import click
import pytest

import cloister
from cloister.cli import VERBS, main
from tests.pages import commands, common

COMMANDS = dict(commands())
EMPTY_HOME = {"CLOISTER_BROKER": "", "CLOISTER_SERVICE": "", "CLOISTER_INSECURE_SOFT_TEE": "", "NO_COLOR": "1"}


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path_factory.mktemp("home")))
    for name in EMPTY_HOME:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_exits_0_and_says_what_the_index_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"Usage: cloister {name}")
    assert said.err == ""
    words = said.out.split("\n\n", 1)[1]
    assert len(words.split("\n\n")[0].split()) >= 4, "the first paragraph says what the command does"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example_of_itself(verb: str) -> None:
    text = COMMANDS[verb].help or ""
    examples = re.findall(rf"^\s+cloister {verb}\b.*$", text, re.MULTILINE)
    assert examples, "no example"


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_parse(verb: str) -> None:
    """An example that the parser refuses teaches a mistake. Nothing runs: only the arguments are parsed."""
    text = (COMMANDS[verb].help or "").replace("\\\n", " ")
    for line in re.findall(rf"^\s+cloister ({verb}\b.*)$", text, re.MULTILINE):
        words = re.sub(r"\s{3,}\(.*\)$", "", line).split()
        command: click.Command = COMMANDS[verb]
        words = words[1:]
        if isinstance(command, click.Group):
            command, words = COMMANDS[f"{verb} {words[0]}"], words[1:]
        command.make_context(verb, list(words), resilient_parsing=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name: str) -> None:
    for option in COMMANDS[name].params:
        if isinstance(option, click.Option) and option.name != "help":
            assert option.help, f"{name} {option.opts}"
            assert option.help[-1] in ".]", f"{name} {option.opts}: a sentence ends with a full stop"


def test_what_every_verb_has() -> None:
    assert [one.opts[0] for one in common()] == [
        "--home",
        "--key",
        "--broker",
        "--insecure-soft-tee",
        "--trust-broker",
        "--trust-node",
        "--trust-tee",
        "--trust-root",
        "--json",
    ]


def test_the_list_of_verbs_is_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = re.findall(r"^  ([a-z]+)  ", capsys.readouterr().out.split("Commands:")[1], re.MULTILINE)
    assert listed == list(VERBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cloister, version {cloister.__version__}\n"


@pytest.mark.parametrize(("typed", "meant"), [("seel", "seal"), ("contrat", "contract"), ("mesure", "measure")])
def test_a_typo_gets_a_suggestion(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed]) == 2
    said = capsys.readouterr()
    assert f"Did you mean '{meant}'?" in said.err
    assert said.out == ""


def test_nonsense_gets_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xyzzy"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["seal"],
        ["run", "train.py"],
        ["ask", "contract", "file"],
        ["seal", "folder", "--to", "x", "--no-such-option"],
        ["run", "train.py", "--contract", "c", "--data", "no-equals-sign"],
        ["run", "train.py", "--contract", "c", "--level", "L9"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2_and_no_traceback(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert "Usage:" in said.err
    assert "Traceback" not in said.err


def test_json_errors_are_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json"]) == 2
    said = capsys.readouterr()
    body = json.loads(said.out)
    assert (body["error"], body["family"], body["exit_status"]) == ("input", "input", 2)
    assert body["hint"]
    assert said.err == ""


def test_an_option_of_the_script_is_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` behind `--` belongs to the script: errors stay text."""
    assert main(["run", "train.py", "--contract", "c", "--", "--json"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_help_loads_no_server_no_database_and_no_cryptography() -> None:
    """`cloister --help` starts in a blink because it loads click and the list of verbs, nothing else."""
    program = "import sys; from cloister.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert not loaded & {"sqlalchemy", "starlette", "uvicorn", "cryptography", "pydantic", "rich", "dcap_qvl"}


def test_python_m_cloister_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "cloister", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"cloister, version {cloister.__version__}\n"
