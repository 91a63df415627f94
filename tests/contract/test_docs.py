"""The reference pages say what the code does: every key is there, the example parses, figures are right."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import get_args

import pytest

from cloister.contract import model, parse, sshsig
from cloister.contract.analyse import readers_text
from cloister.contract.parse import RESERVED, RESERVED_ASSETS
from tests.contract.test_sshsig import GOOD

DOCS = Path(__file__).resolve().parents[2] / "docs"
CONTRACT = (DOCS / "contract.md").read_text(encoding="utf-8")
IDENTITY = (DOCS / "identity.md").read_text(encoding="utf-8")
TABLES = [
    value for value in vars(model).values() if isinstance(value, type) and issubclass(value, model.Table) and value is not model.Table
]  # fmt: skip


@pytest.mark.parametrize("table", TABLES, ids=lambda table: str(table.__name__))
def test_every_key_is_in_the_reference(table: type[model.Table]) -> None:
    assert table.model_fields
    for key in table.model_fields:
        assert re.search(rf"`(\[?|[a-z.<>\[\]`, ]*\[phase\.){key}[\]`.]", CONTRACT), key


def test_every_word_of_the_language_is_in_the_reference() -> None:
    kinds = (model.Sandbox, model.Tee, model.Scheme, model.Form, model.Leaf, model.Same)
    for word in (*(word for kind in kinds for word in get_args(kind)), *RESERVED, *RESERVED_ASSETS):
        assert re.search(rf"`\"?{word}\"?`", CONTRACT), word
    for pattern in (model.NAME, model.DIGEST, model.KEY):
        assert f"`{pattern}`" in CONTRACT


def test_the_complete_example_parses_and_its_readers_are_the_printed_ones() -> None:
    (text,) = re.findall(r"```toml complete\n(.*?)```", CONTRACT, re.DOTALL)
    contract = parse(text.encode(), name="docs/contract.md")
    (printed,) = re.findall(r"```text\n(xrays ->.*?)\n```", CONTRACT, re.DOTALL)
    assert readers_text(contract, "xrays") == printed


def test_namespaces_key_types_and_sizes_of_the_identity_page() -> None:
    for namespace in sshsig.NAMESPACES:
        assert f"`{namespace}`" in IDENTITY
    for kind in ("ssh-ed25519", "ssh-rsa", "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com"):
        assert f"`{kind}`" in IDENTITY
    blob = base64.b64decode("".join(GOOD.splitlines()[1:-1]))
    assert f"decodes to {len(blob)} bytes" in IDENTITY
    assert f"has {len(GOOD)} letters" in IDENTITY
    assert str(sshsig.MIN_RSA_BITS) in IDENTITY
