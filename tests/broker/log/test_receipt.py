"""Receipts: offline proof, one fault each."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.broker.log.checkpoint import Checkpoint
from cloister.broker.log.receipt import Receipt, parse_receipt, verify_receipt
from cloister.errors import TamperedError
from tests.broker.log.samples import LOG, NOW, OTHER, checkpoint_of, receipt_of, release, story, tree_of

STORY = story()
TREE = tree_of(STORY)
SIZE = len(STORY)


@pytest.mark.parametrize("size", range(1, SIZE + 1))
def test_every_receipt_proves_its_entry(size: int) -> None:
    for index in range(size):
        receipt = receipt_of(STORY, index, size)
        assert parse_receipt(receipt.encode()) == receipt
        assert verify_receipt(receipt, LOG.verifier) == STORY[index]


def test_any_spelling_of_the_json_is_read() -> None:
    receipt = receipt_of(STORY, 3)
    pretty = json.dumps(json.loads(receipt.encode()), indent=2).encode()
    assert parse_receipt(pretty) == receipt


PAGE = Path(__file__).resolve().parents[3] / "docs" / "format" / "log.md"


def third_party(data: bytes, vkey: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the verifier that docs/format/log.md prints: only the standard library and Ed25519."""
    program = PAGE.read_text().split("```python\n")[1].split("```")[0]
    path = folder / "receipt.json"
    path.write_bytes(data)
    monkeypatch.setattr("sys.argv", ["verify.py", str(path), vkey])
    exec(compile(program, "verify.py", "exec"), {})


def test_a_third_party_verifies_with_the_lines_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(SIZE):
        third_party(receipt_of(STORY, index).encode(), str(LOG.verifier), tmp_path, monkeypatch)
        assert json.loads(capsys.readouterr().out) == STORY[index].as_json()


@pytest.mark.parametrize(
    ("change", "key", "word"),
    [
        ((b'"v":1', b'"v":1'), str(OTHER.verifier), "not signed"),
        ((b'"index":2', b'"index":3'), str(LOG.verifier), "not in the log"),
        ((b'"version":1', b'"version":2'), str(LOG.verifier), "not in the log"),
        ((b'"size":17', b'"size":18'), str(LOG.verifier), "not in the log"),
    ],
)
def test_the_lines_of_the_page_refuse(
    change: tuple[bytes, bytes], key: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = receipt_of(STORY, 2).encode()
    assert change[0] in data
    with pytest.raises(SystemExit, match=word):
        third_party(data.replace(*change), key, tmp_path, monkeypatch)


GOOD = receipt_of(STORY, 7)
FAULTS: dict[str, tuple[Receipt, str]] = {
    "another entry": (dataclasses.replace(GOOD, data=release("l-2").encode()), "inclusion"),
    "another index": (dataclasses.replace(GOOD, index=6), "inclusion"),
    "index beyond the size": (dataclasses.replace(GOOD, index=SIZE), "inclusion"),
    "another size": (dataclasses.replace(GOOD, size=SIZE - 1), "sizes"),
    "proof too short": (dataclasses.replace(GOOD, proof=GOOD.proof[:-1]), "inclusion"),
    "proof too long": (dataclasses.replace(GOOD, proof=(*GOOD.proof, bytes(32))), "inclusion"),
    "proof of another entry": (dataclasses.replace(GOOD, proof=TREE.inclusion(6)), "inclusion"),
    "proof exchanged": (dataclasses.replace(GOOD, proof=GOOD.proof[::-1]), "inclusion"),
    "checkpoint of another size": (dataclasses.replace(GOOD, checkpoint=checkpoint_of(TREE, 8)), "sizes"),
    "checkpoint of another log": (
        dataclasses.replace(GOOD, checkpoint=checkpoint_of(TREE, signer=OTHER)),
        "not authentic",
    ),
    "checkpoint not signed": (
        dataclasses.replace(GOOD, checkpoint=GOOD.checkpoint.replace(b"\n\n", b"\n\n\n")),
        "not authentic",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_refuses_a_receipt(fault: str) -> None:
    receipt, word = FAULTS[fault]
    with pytest.raises(TamperedError, match=word) as refused:
        verify_receipt(receipt, LOG.verifier)
    assert refused.value.code == "log-tampered"
    assert refused.value.reasons


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(GOOD.encode()).items() if key != name}


CHANGES: list[dict[str, Any]] = [
    {"extra": 1},
    {"v": 2},
    {"index": -1},
    {"index": 1.0},
    {"index": True},
    {"size": "16"},
    {"size": 2**60},
    {"proof": "x"},
    {"proof": ["x"]},
    {"proof": ["AAAA"]},
    {"proof": [1]},
    {"proof": [""] * 65},
    {"checkpoint": 1},
    {"checkpoint": "\ud800"},
    {"leaf": "text"},
    {"leaf": {}},
]


@pytest.mark.parametrize(
    "value",
    [
        *[without(name) for name in ("v", "leaf", "index", "size", "proof", "checkpoint")],
        *[{**json.loads(GOOD.encode()), **change} for change in CHANGES],
        [],
        None,
    ],
)
def test_one_fault_refuses_the_json(value: Any) -> None:
    with pytest.raises(TamperedError) as refused:
        parse_receipt(json.dumps(value).encode())
    assert refused.value.code == "log-tampered"


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(TamperedError):
        parse_receipt(data)


def known(size: int) -> Checkpoint:
    return Checkpoint(LOG.name, size, TREE.root(size))


@pytest.mark.parametrize("size", range(1, SIZE + 1))
def test_a_remembered_checkpoint_before_or_after_the_receipt_is_one_history(size: int) -> None:
    for remembered in range(SIZE + 1):
        receipt = receipt_of(STORY, 0, size)
        proof = TREE.consistency(min(remembered, size), max(remembered, size))
        verify_receipt(receipt, LOG.verifier, known=known(remembered), consistency=proof)


def test_a_fork_is_refused_although_both_logs_are_signed() -> None:
    forked = [*STORY[:5], release("l-9", at=NOW), *STORY[6:]]
    receipt = receipt_of(forked, 0)
    verify_receipt(receipt, LOG.verifier)
    for size in range(6, SIZE):
        proof = tree_of(forked).consistency(size)
        with pytest.raises(TamperedError, match="history differs"):
            verify_receipt(receipt, LOG.verifier, known=known(size), consistency=proof)
    verify_receipt(receipt, LOG.verifier, known=known(5), consistency=tree_of(forked).consistency(5))


def test_a_missing_proof_and_another_log_are_refused() -> None:
    with pytest.raises(TamperedError, match="hashes"):
        verify_receipt(GOOD, LOG.verifier, known=known(5))
    with pytest.raises(TamperedError, match="another log"):
        verify_receipt(GOOD, LOG.verifier, known=Checkpoint("other.example", SIZE, TREE.root()))
