"""The few ASN.1 structures that are read from extensions and names (RFC 5280), on asn1crypto's core.

`asn1crypto.x509` has them too, among much that nobody here needs, the socket module for its address types included.
Every function raises ValueError, TypeError or KeyError for what does not parse, and nothing else.
"""

from __future__ import annotations

from asn1crypto import core, parser

COMMON_NAME = "2.5.4.3"


class _Purposes(core.SequenceOf):  # type: ignore[misc]  # asn1crypto has no types
    _child_spec = core.ObjectIdentifier


class _Pair(core.Sequence):  # type: ignore[misc]  # asn1crypto has no types
    _fields = [("type", core.ObjectIdentifier), ("value", core.Any)]  # noqa: RUF012 - asn1crypto's way


class _Relative(core.SetOf):  # type: ignore[misc]  # asn1crypto has no types
    _child_spec = _Pair


class _Name(core.SequenceOf):  # type: ignore[misc]  # asn1crypto has no types
    _child_spec = _Relative


class _Anything(core.SequenceOf):  # type: ignore[misc]  # asn1crypto has no types
    _child_spec = core.Any


def purposes(value: bytes) -> frozenset[str]:
    """Return the dotted OIDs of an extendedKeyUsage extension."""
    return frozenset(each.dotted for each in _Purposes.load(value, strict=True))


def name(value: bytes) -> tuple[tuple[str, str], ...]:
    """Return (dotted OID, text) of each attribute of a Name, in order; what is no text is left out."""
    found = []
    for relative in _Name.load(value, strict=True):
        for pair in relative:
            # types such as ObjectDescriptor have no `native`
            text = getattr(pair["value"], "native", None)
            if isinstance(text, str):
                found.append((pair["type"].dotted, text))
    return tuple(found)


def directory_names(value: bytes) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Return every directoryName of a subjectAltName extension as `name` does."""
    found = []
    for general in _Anything.load(value, strict=True):
        class_, _, tag, _, content, _ = parser.parse(general.dump(), strict=True)
        if (class_, tag) == (2, 4):  # GeneralName ::= CHOICE { ..., directoryName [4] EXPLICIT Name }
            found.append(name(content))
    return tuple(found)
