"""The command line as its users see it: whole sessions with full output and exit status, as text.

A session in `sessions/*.txt` is commands and what they print::

    hospital$ contract check bad.toml      the command of a person, in a folder with the files of `_prepare`
    = 2                                    exit status
    > text                                 a line on stdout
    ! text                                 a line on stderr

What differs from run to run stands as `<...>` (see `_PLACEHOLDERS`). To write the expected lines anew, look at the
difference, and keep it: `CLOISTER_WRITE_SESSIONS=1 pytest tests/cli/test_sessions.py`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
from pathlib import Path

import pytest

from tests.e2e_support import Deal, Said, World

SESSIONS = sorted((Path(__file__).parent / "sessions").glob("*.txt"))
_PLACEHOLDERS = (
    (r"sha256:[0-9a-f]{64}", "sha256:<64 hex>"),
    (r"sha256:[0-9a-f]{12}(?![0-9a-f])", "sha256:<12 hex>"),
    (r"sha256:[0-9a-f]{12}…", "sha256:<12 hex>…"),
    (r"d-[0-9a-f]{12}", "d-<12 hex>"),
    (r"(?<![0-9a-f])[0-9a-f]{96}(?![0-9a-f])", "<96 hex>"),
    (r"(?<![0-9a-f])[0-9a-f]{16}…", "<16 hex>…"),
    (r"[0-9a-f]{12}\.json", "<12 hex>.json"),
    (r"\b\d+(\.\d+)? (ms|s)\b", "<time>"),
    (r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\b", "<moment>"),
    (r"\b[0-9]+ entries\b", "<n> entries"),
    (r"\bentry [0-9]+", "entry <n>"),
    (r"extends? \d+", "extends <n>"),
    (r"https?://127\.0\.0\.1:[1-9]\d{3,}", "<address>"),
    (r"SHA256:[A-Za-z0-9+/]{43}", "SHA256:<43 base64>"),
    (r"exactly what was measured(, [0-9,]+ modules compiled)?", "exactly what was measured"),
    (r"\+[0-9a-f]{8}\+[A-Za-z0-9+/=]+", "+<log key>"),
)
_SOFT = re.compile(r"warning: (the broker|this node|this broker|the service) (shows|runs in) .*")
_COMMAND = re.compile(r"([a-z]+)\$ (.*)")


@pytest.fixture(scope="module")
def deal(world: World) -> Deal:
    return world.deal({"do": "exit", "status": 7})


def _prepare(here: Path, deal: Deal) -> None:
    """The files that sessions may name."""
    (here / "scans").mkdir()
    (here / "scans" / "one.txt").write_text("one")
    (here / "scans" / "two.txt").write_text("two")
    (here / "empty").mkdir()
    (here / "note.txt").write_text("hello")
    for name, make in (("pipe", os.mkfifo), ("socket", _socket)):
        (here / f"with-{name}").mkdir()
        make(str(here / f"with-{name}" / name))
    (here / "away").mkdir()
    (here / "away" / "link").symlink_to("/etc/passwd")
    (here / "loop").symlink_to("loop")
    text = deal.file.read_text()
    (here / "deal.toml").write_text(text)
    (here / "broken.toml").write_text("contract = [[[")
    (here / "binary.toml").write_bytes(b"\xff\xfe")
    (here / "typo.toml").write_text(
        text.replace("sandbox", "sandbx").replace('read = ["records"]', 'read = ["recrods"]')
    )
    (here / "second.toml").write_text(text.replace("budget = 100", "budget = 7").replace(deal.name, "second"))
    (here / "waiting.toml").write_text(text.replace(deal.name, "alone"))
    shutil.copytree(deal.records, here / "records.sealed")
    for name in ("truncated", "headless", "flipped"):
        shutil.copytree(deal.records, here / f"{name}.sealed")
    segment = here / "truncated.sealed" / "data" / "00000000"
    segment.write_bytes(segment.read_bytes()[:-10])
    (here / "headless.sealed" / "head").unlink()
    segment = here / "flipped.sealed" / "data" / "00000000"
    data = bytearray(segment.read_bytes())
    data[100] ^= 1
    segment.write_bytes(data)
    evil = here / "evil\u202egnp.\x1b]0;owned\x07"
    evil.mkdir()
    (evil / "ünïcode.txt").write_text("x")
    (here / "evil").symlink_to(evil)


def _socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path)


def _show(said: Said, here: Path, world: World, deal: Deal) -> list[str]:
    lines = [f"= {said.status}"]
    for mark, text in ((">", said.out), ("!", said.err)):
        for name, path in (("<here>", here), ("<world>", world.folder)):
            text = text.replace(str(path.resolve()), name).replace(str(path), name)
        for name, fingerprint in world.fingerprints.items():
            text = text.replace(fingerprint, f"<{name}'s key>")
        text = text.replace(deal.name, "<deal>")
        for pattern, placeholder in _PLACEHOLDERS:
            text = re.sub(pattern, placeholder, text)
        lines += [f"{mark} {line}".rstrip() for line in text.splitlines() if not _SOFT.fullmatch(line)]
    return lines


@pytest.mark.parametrize("session", SESSIONS, ids=lambda path: path.stem)
def test_session(session: Path, world: World, deal: Deal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    _prepare(here, deal)
    monkeypatch.chdir(here)
    wanted = session.read_text().splitlines()
    variables = {"python": str(world.python), "puppet": str(world.scripts / "puppet.py"), "deal": deal.name}
    got: list[str] = []
    for line in wanted:
        match = _COMMAND.fullmatch(line)
        if match is None:
            if not line or line.startswith("#"):
                got.append(line)
            continue
        person, words = match.groups()
        arguments = [word.format(**variables) for word in shlex.split(words)]
        got.append(line)
        got += _show(world.people[person].call(*arguments, as_json=False), here, world, deal)
    if os.environ.get("CLOISTER_WRITE_SESSIONS"):
        session.write_text("\n".join(got) + "\n")
    assert got == wanted


def test_there_are_sessions_and_each_has_commands() -> None:
    assert len(SESSIONS) >= 6
    for session in SESSIONS:
        assert any(_COMMAND.fullmatch(line) for line in session.read_text().splitlines()), session
