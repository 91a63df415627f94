"""One byte string per value: canonical CBOR (RFC 8949 section 4.2.1) and canonical JSON (RFC 8785).

CBOR is for what machines exchange (bindings, evidence, requests); JSON for what people read later (log leaves,
receipts). Both decoders refuse anything that does not re-encode to the same bytes, so a digest of the bytes is a
digest of the value. Integers in JSON beyond 2^53 are refused by RFC 8785: large counters travel as strings.
"""

from __future__ import annotations

import io
import json
from typing import Any

import cbor2
import rfc8785

MAX_BYTES = 1 << 24
"""Largest message accepted, 16 MiB: evidence, collateral and contracts are far below; keys are tiny."""
MAX_ITEMS = 1 << 18
"""Most values in one message, map keys included. A message of empty lists costs more than a microsecond per byte to decode and to
encode again, so its size alone says little about its cost."""


def cbor_encode(value: Any) -> bytes:
    """Return the canonical CBOR encoding of `value` (None, bool, int, str, bytes, list, dict)."""
    return cbor2.dumps(value, canonical=True)


def cbor_decode(data: bytes, *, limit: int = MAX_BYTES, items: int = MAX_ITEMS) -> Any:
    """Return the value of canonical CBOR `data`.

    Raises:
        ValueError: not CBOR, too long, more than `items` values, a tag, trailing bytes, or not the canonical encoding.
    """
    if len(data) > limit:
        raise ValueError(f"message of {len(data)} bytes, at most {limit} are accepted")
    _count(data, items)
    stream = io.BytesIO(data)
    try:
        value = cbor2.CBORDecoder(stream).decode()
        canonical = cbor_encode(value)
    except (cbor2.CBORError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"not canonical CBOR: {type(error).__name__}") from error
    if canonical != data:
        raise ValueError("not canonical CBOR: another encoding of the same value, or trailing bytes")
    return value


def _count(data: bytes, most: int) -> None:
    """Refuse tags, and more than `most` values, before anything is made of them: one walk over the heads (RFC 8949, section 3)."""
    at, found, size = 0, 0, len(data)
    while at < size:
        found += 1
        if found > most:
            raise ValueError(f"message of more than {most} values")
        major, info = data[at] >> 5, data[at] & 31
        at += 1
        if info > 23:
            width = 1 << (info - 24) if info < 28 else 0  # anything else is not canonical, and refused for that
            info = int.from_bytes(data[at : at + width], "big")
            at += width
        if major in (2, 3):
            at += info
        elif major == 6:  # dates, big numbers, fractions, patterns: values of types that no message here has
            raise ValueError(f"a value with tag {info}")


def json_encode(value: Any) -> bytes:
    """Return the RFC 8785 encoding of `value`."""
    return rfc8785.dumps(value)


def json_decode(data: bytes, *, limit: int = MAX_BYTES, canonical: bool = True) -> Any:
    """Return the value of JSON `data`; with `canonical`, refuse other encodings of the same value.

    Raises:
        ValueError: not JSON, too long, a duplicate key, or (with `canonical`) not the RFC 8785 encoding.
    """
    if len(data) > limit:
        raise ValueError(f"message of {len(data)} bytes, at most {limit} are accepted")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("duplicate key")
        return result

    try:
        value = json.loads(data, object_pairs_hook=no_duplicates)
        if canonical and rfc8785.dumps(value) != data:
            raise ValueError("not in RFC 8785 form")
    except (ValueError, RecursionError, rfc8785.CanonicalizationError) as error:
        raise ValueError(f"not canonical JSON: {error}") from error
    return value
