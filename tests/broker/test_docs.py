"""docs/protocol.md says what wire.py does: every message, field, limit and route. `python -m tests.broker.test_docs`
prints the tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.broker import wire
from cloister.broker.life import NEXT
from tests.broker.test_wire import MESSAGES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
_PATTERNS = {
    wire.NAME: "name",
    wire.DIGEST: "digest",
    f"({wire.DIGEST})?": "digest or empty",
    f"({wire.NAME})?": "name or empty",
    wire.LEASE: "`l-` + 32 hex digits",
    wire.DENIAL: "`d-` + 12 hex digits",
    f"({wire.DENIAL})?": "`d-` + 12 hex digits, or empty",
}


def words(field: wire.Field) -> str:
    match field:
        case wire.Text(most=most, pattern=pattern):
            if pattern in _PATTERNS:
                return _PATTERNS[pattern]
            return f"text, at most {most}" + (", `" + pattern.replace("|", "\\|") + "`" if pattern else "")
        case wire.Blob(least=least, most=most):
            return f"bytes, {least}" if least == most else f"bytes, {least} to {most}"
        case wire.Uint(most=most):
            return "integer" if most == (1 << 53) - 1 else f"integer, at most {most}"
        case wire.Flag():
            return "true or false"
        case wire.Time():
            return "time"
        case wire.Key():
            return "bytes, 32 (secret)"
        case wire.Maybe(inner=inner):
            return f"{words(inner)}, or null"
        case wire.Many(inner=inner, most=most):
            return f"list, at most {most}: {words(inner)}"
        case wire.Names(most=most):
            return f"list, at most {most}, ascending: name"
        case wire.Table(inner=inner, most=most):
            return f"map, at most {most}: name -> {words(inner)}"
        case wire.Nested(message=message):
            return message.__name__
    raise AssertionError(field)


def table(message: type[wire.Message]) -> str:
    rows = [f"| `{name}` | {words(field)} |" for name, field in message.FIELDS.items()]
    return "\n".join([f"**{message.__name__}**", "", "| key | value |", "| --- | --- |", *rows])


@pytest.mark.parametrize("message", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_is_on_the_protocol_page(message: type[wire.Message]) -> None:
    assert table(message) in PAGE.read_text()


def test_the_life_of_a_contract_is_on_the_protocol_page() -> None:
    text = PAGE.read_text()
    for (state, event), after in NEXT.items():
        assert f"| {state} | {event} | {after} |" in text


if __name__ == "__main__":
    print("\n\n".join(table(message) for message in MESSAGES))
