"""`cloister reference`: made, signed, shown, imported; an old, foreign, changed or expired document is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cloister.attestation import evidence as wire
from cloister.attestation.edge.attester import find_attester
from cloister.attestation.reference import decode
from cloister.attestation.types import LogRule, Software
from cloister.cli import main, reference_
from cloister.cli.common import now, write_file
from cloister.contract.decide import compile_place
from cloister.contract.parse import parse
from cloister.errors import InputError


@dataclass
class Said:
    status: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLOISTER_INSECURE_SOFT_TEE", raising=False)

    def call(*words: object, home: str = "vendor", verb: str = "reference") -> Said:
        capsys.readouterr()
        status = main([verb, *map(str, words), "--home", str(tmp_path / home)])
        captured = capsys.readouterr()
        return Said(status, captured.out, captured.err)

    assert call("new", verb="key").status == 0
    assert call("new", verb="key", home="other").status == 0
    return call


def signer(run: Run, home: str = "vendor") -> str:
    return str(run("show", verb="key", home=home).out.split("SHA256:")[1].split()[0].join(["SHA256:", ""]))


def test_made_shown_imported_and_what_is_printed_is_a_place(run: Run, tmp_path: Path) -> None:
    made = run("make", "--name", "node", "--software", "--to", "node.json", "--json")
    assert made.status == 0, made.err
    assert made.data["serial"] == 1
    assert run("show", "node.json", home="clinic").status == 0
    imported = run("import", "node.json", "--signer", signer(run), home="clinic")
    assert imported.status == 0, imported.err
    place = '[place.enclave]\nkind = "tee"\naccept = ["tdx"]\n' + imported.out
    policy = compile_place(parse(place.encode(), name="place.toml", places_only=True), "enclave")
    assert policy.software == decode((tmp_path / "node.json").read_bytes()).software
    assert (tmp_path / "clinic" / "references").is_dir()


def test_every_kind_of_rule_prints_as_a_contract_takes_it() -> None:
    values = Software(
        "Enclave 7",
        "sgx",
        {"mrsigner": frozenset({bytes(32), bytes(31) + b"\1"})},
        {"isvprodid": 3},
        {"isvsvn": 7},
        (LogRule(1, frozenset({bytes(48)}), "", True),),
    )
    place = '[place.enclave]\nkind = "tee"\naccept = ["sgx"]\n' + "\n".join(reference_.toml(values))
    (found,) = compile_place(parse(place.encode(), name="place.toml", places_only=True), "enclave").software
    assert (found.label, found.tee) == ("enclave-7", "sgx")
    assert (found.measurements, found.svns_equal, found.svns_least, found.log) == (
        values.measurements,
        values.svns_equal,
        values.svns_least,
        values.log,
    )


def test_attack_an_old_document_comes_back(run: Run) -> None:
    """The operator gives the clinic version 1, which has a hole, after it has seen version 2."""
    for name in ("one.json", "two.json"):
        assert run("make", "--name", "node", "--software", "--to", name).status == 0
    key = signer(run)
    assert run("import", "two.json", "--signer", key, home="clinic").status == 0
    old = run("import", "one.json", "--signer", key, "--json", home="clinic")
    assert old.status == 4
    assert old.data["reasons"][0]["where"] == "reference.node.serial"
    assert run("import", "two.json", "--signer", key, home="clinic").status == 0, "the same one again"
    assert run("make", "--name", "node", "--serial", 2, "--software", "--to", "x.json").status == 2


def test_attack_changed_foreign_and_unsigned_documents(run: Run, tmp_path: Path) -> None:
    assert run("make", "--name", "node", "--software", "--to", "node.json").status == 0
    key = signer(run)
    good = (tmp_path / "node.json").read_bytes()
    (tmp_path / "node.json").write_bytes(good.replace(b'"name":"node"', b'"name":"nodf"'))
    assert run("import", "node.json", "--signer", key, home="clinic").status == 2
    (tmp_path / "node.json").write_bytes(good)
    assert run("import", "node.json", "--signer", signer(run, "other"), home="clinic").status == 2
    (tmp_path / "node.json.sig").unlink()
    assert run("import", "node.json", "--signer", key, home="clinic").status == 2
    assert not (tmp_path / "clinic" / "references.json").exists()


def test_a_document_that_is_over(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("make", "--name", "node", "--software", "--days", 1, "--to", "node.json").status == 0
    later = now() + timedelta(days=2)
    monkeypatch.setattr(reference_, "now", lambda: later)
    assert run("import", "node.json", "--signer", signer(run), home="clinic").status == 4


def test_values_of_a_machine_need_verified_evidence(run: Run, tmp_path: Path) -> None:
    attester = find_attester("soft-sev-snp", measurement=b"\7" * 48)
    (tmp_path / "golden").write_bytes(wire.encode(attester.evidence(bytes(64))))
    refused = run("make", "--name", "node", "--evidence", "golden", "--to", "node.json")
    assert refused.status == 4
    assert not (tmp_path / "node.json").exists()
    made = run("make", "--name", "node", "--evidence", "golden", "--insecure-soft-tee", "--to", "node.json")
    assert made.status == 0, made.err
    assert "worth nothing on hardware" in made.err
    (values,) = decode((tmp_path / "node.json").read_bytes()).software
    assert (values.tee, values.measurements) == ("sev-snp", {"measurement": frozenset({b"\7" * 48})})


def test_nothing_to_say_and_damaged_memory(run: Run, tmp_path: Path) -> None:
    assert run("make", "--name", "node", "--to", "node.json").status == 2
    assert run("make", "--name", "a b", "--software", "--to", "node.json").status == 2
    assert run("show", "missing.json").status == 2
    (tmp_path / "vendor" / "references.json").write_text("{")
    damaged = run("make", "--name", "node", "--software", "--to", "node.json")
    assert damaged.status == 2
    assert "damaged" in damaged.err


def test_a_measured_script_can_be_signed_at_once(run: Run, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "Train It.py").write_text("print('x')")
    words = ("code/Train It.py", "--python", "venv/bin/python", "--reference", "train.json", "--json")
    said = run(*words, verb="measure")
    assert said.status == 0, said.out
    (program,) = decode((tmp_path / "train.json").read_bytes()).workloads
    assert (program.label, program.code) == ("train-it", said.data["digest"])


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_file(pipe, b"values")
        assert os.read(reader, 100) == b"values"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    with pytest.raises(InputError):
        write_file(tmp_path, b"a folder")


def test_two_writers_forget_nobody_s_serial(run: Run, tmp_path: Path) -> None:
    """Each command reads the memory, adds its serial and writes it back: without a lock one would lose the other's."""
    words = [sys.executable, "-m", "cloister", "reference", "make", "--software", "--home", str(tmp_path / "vendor")]
    names = [f"build-{number}" for number in range(6)]
    started = [
        subprocess.Popen(
            [*words, "--name", name, "--to", str(tmp_path / f"{name}.json")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name in names
    ]
    assert [process.wait(60) for process in started] == [0] * len(names)
    seen = json.loads((tmp_path / "vendor" / "references.json").read_text())
    assert sorted(key.split()[1] for key in seen) == names
