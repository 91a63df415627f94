"""The documents say what the code does: commands, codes, messages, links and paths are compared, and the guide is played."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import pytest

import cloister.errors
from cloister.attestation import evidence
from cloister.broker.wire import Message
from cloister.cli import VERBS, main
from cloister.confine.probe import probe
from cloister.errors import CODES, CloisterError
from cloister.serve import wire as serve_wire
from cloister.serve.answer import AnswerForm, Rules, encode
from cloister.testkit import softtee
from tests import guide, pages
from tests.broker.test_docs import table

HERE: Final = Path(__file__).resolve().parents[1]
DOCS: Final = HERE / "docs"
SOURCE: Final = HERE / "src" / "cloister"
PAGES: Final = sorted([*HERE.glob("*.md"), *DOCS.rglob("*.md")])
FAMILIES: Final = {
    name: kind
    for name, kind in vars(cloister.errors).items()
    if isinstance(kind, type) and issubclass(kind, CloisterError) and kind is not CloisterError
}


def tracked() -> list[Path]:
    """Every file of the repository: what git tracks, and what it would (a new page counts at once)."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed, so nobody says which files belong to the repository")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=HERE,
        capture_output=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [HERE / name for name in listed.stdout.decode().split("\0") if name and (HERE / name).is_file()]


def outside_code(text: str) -> str:
    """Markdown without code blocks and code spans."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have where Markdown is shown (GitHub's rule)."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", "-") for heading in headings]
    return set(plain)


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_page_of_the_command_line_is_what_the_commands_say() -> None:
    assert (DOCS / "cli.md").read_text() == pages.page(), "python -m tests.pages writes it"


def test_every_verb_and_option_is_on_it() -> None:
    """Said once more without the generator, so that a generator that forgets is noticed."""
    text = (DOCS / "cli.md").read_text()
    for name, command in pages.commands():
        assert re.search(rf"^##+ {re.escape(name)}$", text, re.MULTILINE), name
        for option in pages.options(command):
            assert f"`{option.opts[0]}" in text, f"{name} {option.opts[0]}"
    assert len(VERBS) > 10


def test_words_of_readme_and_changelog_about_verbs() -> None:
    assert f"with {len(VERBS)} verbs" in (HERE / "CHANGELOG.md").read_text()


def test_commands_in_documents_are_commands() -> None:
    """`cloister VERB` in any document names a verb that exists, with options that it has."""
    known = dict(pages.commands())
    for page in PAGES:
        for line in re.findall(r"`(cloister [^`]*)`|^\S*\$ (cloister .*)$", page.read_text(), re.MULTILINE):
            words = (line[0] or line[1]).split()[1:]
            if not words or not re.fullmatch(r"[a-z]+", words[0]):
                continue
            verb = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
            assert verb in known, f"{page.name}: cloister {' '.join(words)}"
            has = {name for option in pages.options(known[verb]) for name in option.opts} | {"--help"}
            own = words[: words.index("--")] if "--" in words else words
            for option in (word for word in own if word.startswith("--")):
                assert option.split("=")[0] in has, f"{page.name}: cloister {' '.join(words)}"


def test_commands_of_run_exist() -> None:
    known = set(re.findall(r"^([a-z]+)\)", (HERE / "run").read_text(), re.MULTILINE))
    used = {word for page in PAGES for word in re.findall(r"\./run ([a-z]+)", page.read_text())}
    assert {"job", "test"} <= used
    assert used <= known
    benches = {path.stem for path in (HERE / "bench").glob("*.py")}
    for page in PAGES:
        assert set(re.findall(r"\./run bench ([a-z]+)", page.read_text())) <= benches, page.name


# --- errors -----------------------------------------------------------------------------------------------------------


def documented() -> dict[str, str]:
    """Code -> the section that lists it."""
    found: dict[str, str] = {}
    section = ""
    for line in (DOCS / "errors.md").read_text().splitlines():
        if line.startswith("## "):
            section = line
        elif match := re.match(r"\| `([a-z-]+)` \| .{20,} \| .{10,} \|$", line):
            assert match[1] not in found, match[1]
            if section:
                found[match[1]] = section
    return found


def test_every_error_code_is_documented_and_no_other() -> None:
    assert set(documented()) == set(CODES)


def test_codes_stand_under_their_family_and_exit_status() -> None:
    sections = {section: section for section in documented().values()}
    for section in sections:
        family, status = re.fullmatch(r"## (\w+): exit status (\d)", section).groups()  # type: ignore[union-attr]
        (kind,) = (kind for kind in FAMILIES.values() if kind.family == family.lower())
        assert kind.exit_status == int(status)


def test_the_source_raises_codes_of_the_documented_family() -> None:
    """Where a code is raised with another family, its row says so by naming that exit status."""
    text = (DOCS / "errors.md").read_text()
    where = documented()
    seen = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FAMILIES):
                continue
            kind = FAMILIES[node.func.id]
            for keyword in node.keywords:
                if keyword.arg != "code":
                    continue
                for code in (c.value for c in ast.walk(keyword.value) if isinstance(c, ast.Constant)):
                    if code in CODES:
                        seen.add(code)
                        row = next(line for line in text.splitlines() if line.startswith(f"| `{code}` |"))
                        own = where[str(code)].startswith(f"## {kind.family.capitalize()}:")
                        assert own or f"xit status {kind.exit_status}" in row, f"{path.name}: {kind.__name__} {code}"
    assert len(seen) > 15


def test_exit_statuses_of_the_table() -> None:
    text = (DOCS / "errors.md").read_text()
    for kind in FAMILIES.values():
        (row,) = re.findall(rf"^\| (\d) \|[^|]*`{kind.family}`", text, re.MULTILINE)
        assert int(row) == kind.exit_status


# --- serving ----------------------------------------------------------------------------------------------------------

MESSAGES: Final = [
    kind
    for kind in vars(serve_wire).values()
    if isinstance(kind, type) and kind.__module__ == serve_wire.__name__ and "FIELDS" in vars(kind)
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_is_on_the_serving_page(message: type[Message]) -> None:
    assert table(message) in (DOCS / "serving.md").read_text()


def test_figures_of_the_serving_page() -> None:
    text = (DOCS / "serving.md").read_text()
    labels = ("normal", "pneumonia")
    meanings: dict[AnswerForm, str] = {"label": "the best label", "score": "the best label and", "full": "every label"}
    for form, meaning in meanings.items():
        size = Rules(form, labels).size + 4
        assert re.search(rf"^\| `{form}` \| {meaning}.* \| {size} \|$", text, re.MULTILINE), form
    worked = "".join(
        re.findall(
            r"`([0-9a-f]{6,})`", text.split("Worked:")[1].splitlines()[0] + text.split("Worked:")[1].splitlines()[1]
        )
    )
    assert bytes.fromhex(worked) == encode({"label": "normal"}, size=Rules("label", labels).size)
    for number in (serve_wire.ASK_STEP, serve_wire.REPLY_STEP, serve_wire.RECEIPT_ROOM):
        assert f"{number:,}" in text


# --- links, paths, figures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(HERE).as_posix())
def test_every_relative_link_resolves(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", outside_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def test_every_page_is_reached_from_the_index() -> None:
    linked = {
        (DOCS / target.split("#")[0]).resolve()
        for target in re.findall(r"\]\(([^)\s:]+)\)", (DOCS / "index.md").read_text())
    }
    missing = [page for page in DOCS.rglob("*.md") if page.resolve() not in linked and page.name != "index.md"]
    assert missing == []


def test_paths_of_documents_named_in_the_source_exist() -> None:
    for folder in ("src", "demo", "bench", "examples", "tests"):
        for path in (HERE / folder).rglob("*.py"):
            for name in re.findall(r"(?<![\w/])docs/[\w./-]*\w", path.read_text()):
                assert (HERE / name).exists(), f"{path.relative_to(HERE)}: {name}"


def test_paths_of_sources_and_tests_named_in_documents_exist() -> None:
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"`((?:src|tests|bench|demo|examples)/[\w./-]*\w)", text):
            assert (HERE / name).exists(), f"{page.name}: {name}"
        for name in re.findall(r"`((?:attestation|contract|volume|confine|broker|node|serve|cli)/[\w/]+\.py)`", text):
            assert (SOURCE / name).exists(), f"{page.name}: {name}"


def test_tests_named_in_the_threat_model_exist() -> None:
    defined = {
        name
        for path in (HERE / "tests").rglob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    named = set(re.findall(r"`(test_\w+)`", (DOCS / "threat-model.md").read_text()))
    assert len(named) > 15
    assert named <= defined


def test_open_points_of_the_jail_are_in_the_threat_model() -> None:
    open_points = set(re.findall(r"^- `(\w+)`:", (DOCS / "confinement.md").read_text(), re.MULTILINE))
    assert open_points
    assert open_points == set(re.findall(r"^- `(\w+)`:", (DOCS / "threat-model.md").read_text(), re.MULTILINE))


def test_figures_have_words_and_are_well_formed() -> None:
    shown = set()
    for page in PAGES:
        for words, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text()):
            assert len(words.split()) >= 5, f"{page.name}: {target} has no description"
            shown.add((page.parent / target).resolve())
    for figure in DOCS.rglob("*.svg"):
        assert figure.resolve() in shown, f"{figure.name} is shown nowhere"
        root = ElementTree.parse(figure).getroot()
        assert root.find("{http://www.w3.org/2000/svg}title") is not None
        assert "prefers-color-scheme: dark" in figure.read_text()


# --- nothing of one machine -------------------------------------------------------------------------------------------

MACHINE: Final = re.compile(r"(?<![\w>}-])/(?:" + "|".join(("wo" + "rk/", "ro" + "ot/", "tmp/sn" + "ap")) + ")")
HOSTS: Final = re.compile(r"pythonhosted|pypi\.org|artifact|/simple/|index-url[= ]https?:|extra-index-url[= ]https?:")


FOREIGN_FILES: Final = {"tests/confine/attempts.py": "tries to read what every Linux may have: it must not get it"}


def test_no_file_knows_one_machine() -> None:
    for path in tracked():
        if path.relative_to(HERE).as_posix() in FOREIGN_FILES:
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        found = MACHINE.search(text)
        assert found is None, f"{path.relative_to(HERE)}: {found[0] if found else ''}"


def test_no_file_names_a_package_registry() -> None:
    """The lock file holds hashes and the index it was resolved from; nothing else names one."""
    for path in tracked():
        if path.name == "uv.lock" or path == Path(__file__).resolve():
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        found = HOSTS.search(text)
        assert found is None, f"{path.relative_to(HERE)}: {found[0] if found else ''}"


def test_documents_are_plain() -> None:
    """No notes to ourselves, no placeholders, and the docs describe the present."""
    for page in PAGES:
        text = outside_code(page.read_text())
        found = re.search(r"\b(TODO|FIXME|TBD|XXX|WIRE|BENCH[A-Z]+|BIG[PL]|TREE[PL])\b", text)
        assert found is None, f"{page.name}: {found[0] if found else ''}"


def test_readme_shows_a_whole_run() -> None:
    shown = pages.JOB.search((HERE / "README.md").read_text())
    assert shown is not None
    for words in ("bit-identical model", "refused, as it must be", "0 found", "it protects nothing", "└"):
        assert words in shown[0]


def test_what_verify_says_in_the_readme_is_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = re.search(
        r"<!-- verify: .*? -->\n```console\n\$ cloister (.*?)\n(.*?)```", (HERE / "README.md").read_text(), re.S
    )
    assert shown is not None
    machine = softtee.SoftPlatform(status="OutOfDate").run(softtee.workload())
    (tmp_path / "evidence.cbor").write_bytes(evidence.encode(machine.evidence(softtee.binding())))
    (tmp_path / "mine.toml").write_text('[place.enclave]\nkind = "tee"\naccept = ["simulated"]\nmin_tcb = "2026-08"\n')
    monkeypatch.chdir(tmp_path)
    assert main(shown[1].split()) == 4
    printed = capsys.readouterr().out.splitlines()
    lines = shown[2].splitlines()
    assert len(lines) == 5
    assert [line for line in printed if line in lines] == lines


# --- the guide --------------------------------------------------------------------------------------------------------


def test_every_command_of_the_guide_has_a_party_and_blocks_are_whole() -> None:
    text = guide.PAGE.read_text()
    assert text.count("```console") >= 10
    assert "error: the broker" not in text
    for who in ("hospital", "vendor", "clinic", "cloud"):
        assert f"\n{who}$ cloister " in text


@pytest.mark.slow
def test_the_guide_plays() -> None:
    """Every command of docs/guide.md runs for real, in order, and prints what the page says (but for digests and times)."""
    if not guide.WORKLOAD.exists() or not guide.DATASETS.exists():
        pytest.skip("no environment for workloads: ./run setup makes it")
    if probe().level not in ("L2", "L3") or not Path("/dev/fuse").exists():
        pytest.skip("this machine cannot confine or mount; `cloister doctor` says why")
    text = guide.PAGE.read_text()
    for was, now in guide.differences(text, guide.play(text)):
        assert guide.normal(now) == guide.normal(was)
