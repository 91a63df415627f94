"""`cloister status CONTRACT --metrics`: what a remote party hears, as people and as programs read it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cloister.broker.client import BrokerClient, Release
from cloister.cli import main as cloister
from cloister.contract.edge import Signer, generate_key
from cloister.testkit.broker import RunningBroker, running_broker
from tests import e2e_support as e2e
from tests.broker.world import World, trainer_node

LEAVES = 'metrics_to = ["hospital", "clinic"]\nleaves = ["metrics", "logs"]'


@dataclass
class Home:
    """One broker, a phase that runs, and homes of parties."""

    folder: Path
    url: str
    client: BrokerClient
    release: Release

    def status(self, party: str, *words: str) -> e2e.Said:
        out, err = io.StringIO(), io.StringIO()
        values = {
            "CLOISTER_HOME": str(self.folder / party),
            "CLOISTER_BROKER": self.url,
            "CLOISTER_INSECURE_SOFT_TEE": "1",
        }
        with e2e.environment(values), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cloister(["status", *words])
        return e2e.Said(code, out.getvalue(), err.getvalue())


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running_broker(tmp_path / "state", process=False) as running:
        yield running


@pytest.fixture
def home(broker: RunningBroker, tmp_path: Path) -> Home:
    signers: dict[str, Any] = {}
    for party in ("hospital", "vendor", "clinic"):
        (tmp_path / party).mkdir()
        generate_key(tmp_path / party / "id_ed25519")
        signers[party] = Signer.load(tmp_path / party / "id_ed25519")
    world, client = World(**signers), broker.client()
    contract = world.ready(client, world.contract(leaves=LEAVES))
    release = client.release(contract, "train", reads=("xrays",), attester=trainer_node())
    return Home(tmp_path, broker.url, client, release)


def test_lines_for_people(home: Home) -> None:
    home.client.words(home.release, 1, "metrics", ["epoch 1/2 loss 0.5"])
    home.client.words(home.release, 2, "logs", ["a \x1b[2J word"])
    said = home.status("hospital", "pneumonia-xray", "--metrics").expect(0)
    lease = home.release.lease.id[:8]
    assert [line.split(" ", 1)[1] for line in said.out.splitlines()] == [
        f"train {lease} epoch 1/2 loss 0.5",
        f"train {lease} │ a �[2J word",
    ]


def test_json_lines_for_programs(home: Home) -> None:
    home.client.words(home.release, 1, "metrics", ["epoch 1/2 loss 0.5"], dropped=4)
    home.client.words(home.release, 2, "logs", ["a word\x1b"], end=True)
    said = home.status("clinic", "pneumonia-xray", "--metrics", "--phase", "train", "--json").expect(0)
    first, second, end = [json.loads(line) for line in said.out.splitlines()]
    assert (first["phase"], first["lease"], first["stream"]) == ("train", home.release.lease.id, "metrics")
    assert (first["metrics"], first["counters"]) == ({"loss": 0.5}, {"epoch": [1, 2]})
    assert (second["stream"], second["text"]) == ("logs", "a word�")
    assert "metrics" not in second
    (lease,) = end["leases"]
    assert (lease["live"], lease["dropped"], lease["phase"]) == (False, 4, "train")


def test_a_party_that_the_contract_gives_nothing_gets_reasons_and_exit_status_3(home: Home) -> None:
    home.client.words(home.release, 1, "metrics", ["loss 0.5"])
    said = home.status("vendor", "pneumonia-xray", "--metrics").expect(3)
    assert said.out == ""
    assert "phase.train.metrics_to: wants hospital or clinic, found vendor" in said.err
    error = json.loads(home.status("vendor", "pneumonia-xray", "--metrics", "--json").expect(3).out)
    assert [reason["where"] for reason in error["reasons"]] == ["phase.train.metrics_to", "phase.serve.metrics_to"]


def test_nothing_said_yet(home: Home) -> None:
    said = home.status("hospital", "pneumonia-xray", "--metrics").expect(0)
    assert said.out == ""
    assert "nothing was said yet" in said.err


def test_missing_lines_are_told(home: Home) -> None:
    home.client.words(home.release, 1, "metrics", ["loss 0.5"], dropped=12)
    assert "12 lines are missing" in home.status("hospital", "pneumonia-xray", "--metrics").expect(0).err


@pytest.mark.parametrize("words", [["--metrics"], ["x", "--follow"], ["x", "--phase", "train"]])
def test_options_that_do_not_go_together(home: Home, words: list[str]) -> None:
    home.status("hospital", *words).expect(2)


def test_follow_ends_with_the_program(home: Home) -> None:
    def speak() -> None:
        home.client.words(home.release, 1, "metrics", ["epoch 1/2 loss 0.5"])
        time.sleep(0.5)
        home.client.words(home.release, 2, "metrics", ["epoch 2/2 loss 0.25"], end=True)

    speaker = threading.Thread(target=speak)
    speaker.start()
    said = home.status("hospital", "pneumonia-xray", "--metrics", "--follow").expect(0)
    speaker.join()
    assert [line.split(" ", 3)[3] for line in said.out.splitlines()] == ["epoch 1/2 loss 0.5", "epoch 2/2 loss 0.25"]


def test_follow_on_a_terminal_draws_a_bar_and_ends_with_the_last_line(home: Home) -> None:
    home.client.words(home.release, 1, "metrics", ["epoch 1/2 loss 0.5", "epoch 2/2 loss 0.25"], end=True)
    ours, theirs = pty.openpty()
    values = {"CLOISTER_HOME": str(home.folder / "hospital"), "CLOISTER_BROKER": home.url, "TERM": "xterm"}
    child = subprocess.Popen(
        [sys.executable, "-m", "cloister", "status", "pneumonia-xray", "--metrics", "--follow", "--insecure-soft-tee"],
        env={**os.environ, **values}, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: the other side closed
        while part := os.read(ours, 65536):
            seen += part
    os.close(ours)
    assert child.wait(20) == 0, seen
    assert seen.count(b"epoch 2/2 loss 0.25") == 1
    assert b"epoch 1/2 loss 0.5" not in seen
    assert b"loss 0.25" in seen.split(b"epoch 2/2")[0]  # the bar's note came before


# --- with real nodes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_run_is_heard_by_the_hospital_while_it_runs_and_by_nobody_else(world: e2e.World) -> None:
    deal = world.deal({"do": "sleep", "seconds": 3}, train='metrics_to = ["hospital"]\n')
    running = world.cloud.start(*deal.run())
    running.program()
    followed = world.hospital.start("status", str(deal.file), "--metrics", "--follow")
    ended = running.end().expect(0)
    assert ended.data["metrics"] == {}  # the cloud sees none of it
    heard = followed.end().expect(0)
    *lines, last = [json.loads(line) for line in heard.out.splitlines()]
    assert [(line["phase"], line["text"]) for line in lines] == [("train", "epoch 1/2 loss 0.5")]
    assert [lease["live"] for lease in last["leases"]] == [False]
    for party in ("cloud", "vendor", "clinic"):
        world.people[party].call("status", str(deal.file), "--metrics").expect(3)


@pytest.mark.slow
def test_the_last_words_of_a_program_that_failed_are_heard(world: e2e.World) -> None:
    leaves = 'metrics_to = ["hospital"]\nleaves = ["metrics", "logs"]\n'
    deal = world.deal({"do": "exit", "status": 3}, train=leaves)
    assert world.cloud.run(*deal.run()).error == "workload-failed"
    heard = world.hospital.call("status", str(deal.file), "--metrics", as_json=False).expect(0)
    assert "│ secret: the patient is called Bob" in heard.out
