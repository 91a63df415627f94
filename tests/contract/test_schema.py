"""The JSON Schema in docs is the one of the models, and it says the same as the parser about form."""

from __future__ import annotations

import json
import re
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from cloister.contract.schema import schema, schema_text
from tests.contract.samples import NAMES, edited, source

PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "contract.schema.json"


def test_the_published_schema_is_current() -> None:
    # to renew it: python -c "from cloister.contract.schema import schema_text as s; print(s(), end='')" > docs/contract.schema.json
    assert PUBLISHED.read_text(encoding="utf-8") == schema_text()


def fits(value: Any, node: dict[str, Any], root: dict[str, Any]) -> bool:
    """The part of JSON Schema 2020-12 that the contract schema uses."""
    if "$ref" in node:
        return fits(value, root["$defs"][node["$ref"].rsplit("/", 1)[1]], root)
    if "oneOf" in node:
        return sum(fits(value, each, root) for each in node["oneOf"]) == 1
    if "anyOf" in node and not any(fits(value, each, root) for each in node["anyOf"]):
        return False
    if "enum" in node and value not in node["enum"]:
        return False
    if "const" in node and value != node["const"]:
        return False
    match node.get("type"):
        case "string":
            if isinstance(value, date):
                return node.get("format") == "date"
            return isinstance(value, str) and re.search(node.get("pattern", ""), value) is not None
        case "integer":
            return type(value) is int and node.get("minimum", value) <= value <= node.get("maximum", value)
        case "boolean":
            return isinstance(value, bool)
        case "array":
            return (
                isinstance(value, list)
                and len(value) >= node.get("minItems", 0)
                and (not node.get("uniqueItems") or len(set(value)) == len(value))
                and all(fits(item, node["items"], root) for item in value)
            )
        case "object":
            if not isinstance(value, dict) or len(value) < node.get("minProperties", 0):
                return False
            for key, item in value.items():
                inner = node.get("properties", {}).get(key)
                if inner is None:
                    patterns = node.get("patternProperties", {}).items()
                    inner = next((found for pattern, found in patterns if re.search(pattern, key)), None)
                if inner is None or not fits(item, inner, root):
                    return False
            return all(key in value for key in node.get("required", ()))
        case _:
            return True


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_fit(name: str) -> None:
    assert fits(tomllib.loads(source(name)), schema(), schema())


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (NAMES[0], 'sandbox = "one-shot"', 'sandbox = "oneshot"'),
        (NAMES[0], 'sandbox = "one-shot"', 'sandbx = "one-shot"'),
        (NAMES[0], "per_day = 2_000", "per_day = 0"),
        (NAMES[0], "clinic   =", "Clinic   ="),
        (NAMES[0], 'kind = "tee", ', ""),
        (NAMES[0], 'min_tcb = "2026-08"', 'min_tcb = "2026-99"'),
        (NAMES[0], 'read  = ["xrays", "backbone"]', "read  = []"),
        (NAMES[0], "[phase.train]", "[phase.trian]"),
        (NAMES[1], 'wait = "72h"', 'wait = "soon"'),
        (NAMES[2], 'pad = "1 KiB"', 'pad = "1KiB"'),
    ],
)
def test_an_editor_underlines_mistakes_of_form(name: str, old: str, new: str) -> None:
    assert not fits(tomllib.loads(edited(name, (old, new)).decode()), schema(), schema())


def test_the_schema_is_plain_json_schema() -> None:
    text = json.dumps(schema())
    assert '"null"' not in text
    assert "PT0S" not in text
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
