"""What holds for every command: exit statuses, one JSON object, one line for Ctrl-C, no secret and no traceback."""

from __future__ import annotations

import base64
import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.cli import VERBS, main
from cloister.cli.common import system_error
from cloister.cli.ui import printable
from cloister.errors import InputError, MachineError
from tests.e2e_support import Person, Said, World, other_broker

pytestmark = pytest.mark.slow

BAD = {
    "usage": (["seal"], 2),
    "no such verb": (["rnu"], 2),
    "no such option": (["status", "--nope"], 2),
    "a file that is not there": (["contract", "check", "missing.toml"], 2),
    "a folder that is not there": (["seal", "missing", "--to", "x"], 2),
    "a volume that is not there": (["open", "missing", "--to", "x"], 2),
    "no broker": (["status", "--broker", "https://127.0.0.1:9"], 1),
    "no address": (["status", "--broker", "https://[::1"], 2),
    "no key": (["key", "show", "--home", "nowhere"], 2),
    "no receipt": (["verify", "missing"], 2),
    "no log": (["audit", "--offline", "missing"], 2),
    "no denial": (["why", "d-000000000000"], 2),
    "no service": (["ask", "x.toml", "x", "--service", "http://127.0.0.1:9"], 2),
}


# --- statuses and JSON ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(BAD))
def test_every_failure_is_one_json_object_with_its_status(
    world: World, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, status = BAD[name]
    error = world.hospital.call(*words).expect(status).data
    assert set(error) >= {"error", "family", "message", "reasons", "hint", "exit_status"}
    assert error["exit_status"] == status
    assert error["message"]


def test_every_verb_has_help_with_an_example_and_json() -> None:
    for verb in VERBS:
        done = subprocess.run(
            [sys.executable, "-m", "cloister", verb, "--help"], capture_output=True, text=True, timeout=30, check=True
        )
        assert "Example" in done.stdout, verb
        if verb not in ("key", "contract", "reference", "collateral"):  # groups: their commands have it
            assert "--json" in done.stdout, verb


def test_good_commands_print_one_json_object(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("x")
    deal = world.deal()
    for words in (
        ["seal", "data", "--to", "v"],
        ["verify", "v"],
        ["open", "v", "--to", "again"],
        ["contract", "new", "c.toml"],
        ["contract", "check", str(deal.file)],
        ["contract", "readers", str(deal.file)],
        ["contract", "diff", str(deal.file), str(deal.file)],
        ["contract", "submit", str(deal.file)],
        ["status"],
        ["status", deal.name],
        ["audit"],
        ["key", "show"],
        ["witness", "--home", str(tmp_path / "w")],
        ["measure", str(world.scripts / "puppet.py"), "--python", str(world.python)],
    ):
        said = world.hospital.call(*words).expect(0)
        assert said.data, words


def test_a_soft_broker_that_nobody_named_is_refused_with_status_4(world: World) -> None:
    plain = world.person("hospital", CLOISTER_INSECURE_SOFT_TEE="")
    said = plain.call("status", as_json=False).expect(4)
    assert "code: evidence" in said.err


def test_a_denial_is_status_3_and_can_be_read_again(world: World) -> None:
    deal = world.deal(trainer="sha256:" + "5" * 64)
    said = world.cloud.run(*deal.run()).expect(3).data
    assert said["error"] == "denied"
    assert said["reasons"][0]["where"] == "phase.train.run"
    again = world.cloud.call("why", said["denial_id"]).expect(0).data
    assert [reason["where"] for reason in again["reasons"]] == [reason["where"] for reason in said["reasons"]]


def test_a_contract_that_waits_is_status_5(world: World) -> None:
    deal = world.deal(signers=["vendor"])
    assert world.cloud.run(*deal.run()).expect(5).error == "waiting"
    world.cloud.call("status", deal.name).expect(5)


def test_receipts_of_another_broker_are_no_proof_against_this_one(world: World) -> None:
    """A home may know several brokers: their receipts lie together, and none of them accuses another broker."""
    world.deal()
    with other_broker(world) as (second, _):
        second.deal()
        report = second.hospital.call("audit").expect(0).data
        assert report["other_receipts"] > 0
        receipts = sorted((world.hospital.home / "receipts").glob("*.json"), key=lambda path: path.stat().st_mtime)
        named = second.hospital.call("audit", str(receipts[0])).expect(1)
        assert named.error == "log-tampered", "one that is named by hand has to be of this log"
    text = world.hospital.call("audit", as_json=False).expect(0)
    assert "of other logs" in text.out


@pytest.mark.parametrize(
    ("change", "value"),
    [("log_key", "rubbish"), ("since", {"size": 3, "root": "zz"}), ("entries", ["%"]), ("checkpoint", 7), ("v", 2)],
)
def test_a_bent_copy_of_a_log_is_refused(world: World, tmp_path: Path, change: str, value: object) -> None:
    copy = Path(world.lab.call("audit").expect(0).data["copy"])
    bent = tmp_path / "copy.json"
    bent.write_text(json.dumps(json.loads(copy.read_text()) | {change: value}))
    said = world.lab.call("audit", "--offline", str(bent))
    assert said.status in (1, 2)
    assert said.data["error"] in ("input", "log-tampered")


def test_a_log_key_that_is_none_is_named(world: World) -> None:
    world.deal()
    receipt = next((world.hospital.home / "receipts").glob("*.json"))
    said = world.hospital.call("verify", str(receipt), "--log-key", "rubbish", as_json=False).expect(2)
    assert "'rubbish' is not the key of a log" in said.err


# --- the terminal -----------------------------------------------------------------------------------------------------


def _on_a_terminal(words: list[str], **environment: str) -> bytes:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "cloister", *words],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "TERM": "xterm",
            **environment,
        },
    )
    os.close(theirs)
    data = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                block = os.read(ours, 65536)
            except OSError:  # EIO: the other side is closed
                break
            data += block
    child.wait(10)
    os.close(ours)
    return data


def test_colour_is_for_terminals_that_want_it() -> None:
    words = ["contract", "check", "missing.toml"]
    assert b"\x1b[" in _on_a_terminal(words)
    assert b"\x1b" not in _on_a_terminal(words, NO_COLOR="1")
    assert b"\x1b" not in _on_a_terminal(words, TERM="dumb")


@pytest.mark.parametrize("colour", ["", "1"])
def test_a_name_cannot_steer_the_terminal(tmp_path: Path, colour: str) -> None:
    evil = tmp_path / "x\x1b]0;owned\x07\x1b[8m\u202egnp.toml"
    evil.write_text("contract = 1")
    environment = {"NO_COLOR": "1"} if colour else {}
    said = _on_a_terminal(["contract", "check", str(evil)], **environment)
    assert b"\x1b]" not in said
    assert b"\x1b[8m" not in said
    assert "\u202e".encode() not in said
    assert b"\\x1b]0;owned\\x07\\x1b[8m\\u202egnp.toml" in said


def test_printable_keeps_what_people_write() -> None:
    text = "Ärztin 名前 naïve – “quoted” … ✓ 🙂\n\ttab"
    assert printable(text) == text
    assert printable("a\x1b[0mb\u200b\udcff\x85") == "a\\x1b[0mb\\u200b\\udcff\\x85"


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_a_terminal_without_unicode_gets_escapes_not_a_traceback(world: World, tmp_path: Path, locale: str) -> None:
    folder = tmp_path / "dätä"
    folder.mkdir()
    (folder / "f").write_text("x")
    person = world.person("hospital", LC_ALL=locale, PYTHONIOENCODING="ascii", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    said = person.run("seal", str(folder), "--to", str(tmp_path / "v"), as_json=False).expect(0)
    assert (said.out + said.err).isascii()
    assert "\\u2026" in said.out


def test_a_reader_who_leaves_is_no_traceback(world: World) -> None:
    child = world.hospital.start("status", as_json=False)
    assert child.popen.stdout is not None
    child.popen.stdout.close()
    child.popen.stdout = None
    assert child.popen.stderr is not None
    said = child.popen.stderr.read()
    child.popen.wait(20)
    assert "Traceback" not in said
    assert child.popen.returncode in (0, 1)


# --- stopped ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mute() -> Iterator[str]:
    """Address of a server that accepts and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
        yield f"https://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_while_waiting_is_one_line(world: World, mute: str, number: signal.Signals, as_json: bool) -> None:
    child = world.hospital.start("status", "--broker", mute, as_json=as_json)
    time.sleep(1.5)
    child.send(number)
    said = child.end(10).expect(1)
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    if as_json:
        assert said.data["message"] == f"stopped by {name}"
        assert not said.err
    else:
        assert said.err.splitlines() == [f"stopped by {name}"]


def test_ctrl_c_while_sealing_leaves_neither_volume_nor_key(world: World, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "big").write_bytes(bytes(64 << 20))
    home = tmp_path / "home"
    person = Person("someone", home, {**world.hospital.environment, "CLOISTER_HOME": str(home)})
    person.call("key", "new").expect(0)
    slow = """
import time
from cloister.volume.disk import Disk
whole = Disk.write
def slowly(self, descriptor, data):
    time.sleep(0.05)
    whole(self, descriptor, data)
Disk.write = slowly
"""
    child = person.start("seal", str(data), "--to", str(tmp_path / "v"), before=slow, as_json=False)
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("v.sealing-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send(signal.SIGINT)
    said = child.end(20).expect(1)
    assert said.err.splitlines()[-1] == "stopped by Ctrl-C"
    assert {path.name for path in tmp_path.iterdir()} == {"data", "home"}
    assert not list((home / "keys").glob("*.key"))


def test_a_signal_that_the_caller_ignores_stays_ignored(world: World, mute: str) -> None:
    """nohup: a closed terminal does not end the command."""
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    child = world.hospital.start("status", "--broker", mute, before=ignore)
    time.sleep(1.5)
    child.send(signal.SIGHUP)
    time.sleep(0.3)
    assert child.popen.poll() is None
    child.send(signal.SIGTERM)
    child.end(10).expect(1)


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_no_output_holds_a_key(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("x")
    home = tmp_path / "home"
    one = Person("someone", home, {**world.hospital.environment, "CLOISTER_HOME": str(home)})
    outputs: list[Said] = [one.call("key", "new"), one.call("seal", "data", "--to", "v")]
    key_file = next((home / "keys").glob("*.key"))
    key = bytes.fromhex(json.loads(key_file.read_text())["key"])
    private = (home / "id_ed25519").read_text().splitlines()[2]
    for as_json in (True, False):
        outputs += [
            one.call(*words, as_json=as_json)
            for words in (
                ["verify", "v"],
                ["open", "v", "--to", f"again-{as_json}"],
                ["key", "show"],
                ["status"],
                ["audit"],
                ["doctor"],
            )
        ]
    shutil.copytree("v", "bad")
    (tmp_path / "bad" / "data" / "00000000").write_bytes(bytes(65584))
    outputs += [one.call("open", "bad", "--to", "x"), one.call("verify", "bad", as_json=False)]
    whole = key_file.read_text()
    for broken in (whole[:-10], whole.replace('"v":1', '"v":2'), whole.replace(key.hex(), key.hex()[:-2] + "zz")):
        key_file.write_text(broken)
        outputs += [one.call("open", "v", "--to", "x").expect(2), one.call("open", "v", "--to", "x", as_json=False)]
    words = [key.hex(), key.hex()[:32], base64.b64encode(key).decode()[:20], private[:40]]
    for said in outputs:
        assert "Traceback" not in said.err
        for word in words:
            assert word not in said.out + said.err
    assert key.hex() in whole, "the search finds it where it is"


def test_keys_are_readable_by_their_owner_only(world: World) -> None:
    keys = world.hospital.home / "keys"
    world.deal()
    assert keys.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in [*keys.iterdir(), world.hospital.home / "id_ed25519"])


# --- a system that says no --------------------------------------------------------------------------------------------

_SETPRIV = shutil.which("setpriv")


def _without_privilege(person: Person, *words: str) -> Said:
    """The command as root without the right to ignore permissions: what an ordinary owner of these files meets."""
    drop = [str(_SETPRIV), "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*drop, sys.executable, "-m", "cloister", *words],
        env={**os.environ, **person.environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.mark.skipif(_SETPRIV is None and os.geteuid() == 0, reason="no setpriv")
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["seal", "closed", "--to", "v", "--no-deposit"], "secret.txt"),
        (["seal", "open", "--to", "locked/v", "--no-deposit"], "locked/v"),
        (["seal", "open", "--to", "v", "--no-deposit", "--home", "locked/home"], "locked/home"),
        (["contract", "check", "closed/secret.txt"], "closed/secret.txt"),
        (["contract", "new", "locked/c.toml"], "locked/c.toml"),
        (["key", "new", "--home", "locked/home"], "locked/home"),
        (["key", "show", "--home", "sealed-home"], "sealed-home"),
        (["verify", "closed/secret.txt"], "closed/secret.txt"),
        (["status", "--home", "locked/home"], "locked/home"),
        (["measure", "open/f", "--to", "locked/w", "--python", "{python}"], "locked/w"),
        (["witness", "--home", "locked/home"], "locked/home"),
        (["up", "--state", "locked/state"], "locked/state"),
    ],
)
def test_a_path_without_permission_is_named_and_no_traceback(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("closed", "open", "locked", "sealed-home"):
        (tmp_path / folder).mkdir()
    (tmp_path / "open" / "f").write_text("x")
    (tmp_path / "closed" / "secret.txt").write_text("x")
    (tmp_path / "closed" / "secret.txt").chmod(0)
    (tmp_path / "sealed-home" / "id_ed25519").write_text("x")
    (tmp_path / "sealed-home").chmod(0)
    (tmp_path / "locked").chmod(0o500)
    try:
        said = _without_privilege(world.hospital, *(word.format(python=world.python) for word in words))
    finally:
        for folder in ("sealed-home", "locked"):
            (tmp_path / folder).chmod(0o700)
    assert said.status in (1, 2), said
    assert "Traceback" not in said.err, said.err
    assert named in said.err
    assert "ermission" in said.err or "is not readable" in said.err


def test_what_the_system_says_becomes_an_error_of_the_tree() -> None:
    assert isinstance(system_error(PermissionError(13, "Permission denied", "/x")), InputError)
    assert str(system_error(PermissionError(13, "Permission denied", "/x"))) == "cannot use /x: Permission denied"
    full = system_error(OSError(28, "No space left on device", b"/x"))
    assert (type(full), full.code) == (MachineError, "disk-full")
    assert system_error(OSError("odd")).message == "the system refused: odd"


def test_an_unforeseen_system_error_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cloister.cli.contract_ as verbs

    def torn(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(verbs, "read_contract", torn)
    assert main(["contract", "check", "x.toml"]) == 1
    assert "error: cannot use x.toml: Input/output error" in capsys.readouterr().err
