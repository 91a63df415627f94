"""JSON Schema of contract files for editors (taplo, VS Code "Even Better TOML"), generated from the models.

The schema knows form only: names that do not exist and rules between tables are found by `cloister contract check`.
`docs/contract.schema.json` holds `schema_text()`; a test compares both.
"""

from __future__ import annotations

import json
from typing import Any, Final, get_args

from cloister.contract.model import RULED, VOUCHED, ContractFile, Hardware

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_NULL: Final = {"type": "null"}


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a contract file."""
    body: dict[str, Any] = _for_toml(ContractFile.model_json_schema())
    return {"$schema": _DIALECT, "title": "Cloister contract, language version 1", **body}


def schema_text() -> str:
    """Return the schema as the text of `docs/contract.schema.json`."""
    return json.dumps(schema(), indent=2) + "\n"


def _for_toml(node: Any) -> Any:
    """Drop what TOML cannot say: null, and defaults in pydantic's own notation; and titles that repeat the key; close open tables."""
    if isinstance(node, list):
        return [_for_toml(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = dict(node)
    if _NULL in node.get("anyOf", ()):
        kinds = [kind for kind in node.pop("anyOf") if kind != _NULL]
        outer = {key: value for key, value in node.items() if value is not None}
        node = {**kinds[0], **outer} if len(kinds) == 1 else {"anyOf": kinds, **outer}
    if isinstance(node.get("title"), str):  # a property called `title` would be a schema, not a text
        del node["title"]
    if node.get("default") is None or "pattern" in node or (node["default"] == [] and node.get("minItems")):
        node.pop("default", None)
    if "enum" in node.get("propertyNames", {}):  # a closed set of names: editors complete `properties`
        node["properties"] = dict.fromkeys(node.pop("propertyNames")["enum"], node["additionalProperties"])
        node["additionalProperties"] = False
    if RULED in node.get("patternProperties", {}):  # such a set, and names of another form
        entry = node["patternProperties"][RULED]
        node["properties"] = dict.fromkeys(get_args(Hardware), entry)
        node["patternProperties"] = {VOUCHED: entry}
    if "patternProperties" in node:  # names of another form are unknown keys
        node["additionalProperties"] = False
    return {key: _for_toml(value) for key, value in node.items()}
