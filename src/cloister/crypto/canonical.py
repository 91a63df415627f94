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


MAX_DEPTH = 32
"""Most levels of lists and maps within each other; the deepest message has 6."""


def cbor_encode(value: Any) -> bytes:
    """Return the canonical CBOR encoding of `value` (None, bool, int, str, bytes, list, dict)."""
    return cbor2.dumps(value, canonical=True)


def cbor_decode(data: bytes, *, limit: int = MAX_BYTES, items: int = MAX_ITEMS) -> Any:
    """Return the value of canonical CBOR `data`.

    Raises:
        ValueError: not CBOR, too long, more than `items` values or `MAX_DEPTH` levels, a tag, a map key that is no number, bytes
            or text, trailing bytes, or not the canonical encoding.
    """
    if len(data) > limit:
        raise ValueError(f"message of {len(data)} bytes, at most {limit} are accepted")
    _walk(data, items)
    stream = io.BytesIO(data)
    try:
        value = cbor2.CBORDecoder(stream).decode()
        canonical = cbor_encode(value)
    except (cbor2.CBORError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"not canonical CBOR: {type(error).__name__}") from error
    if canonical != data:
        raise ValueError("not canonical CBOR: another encoding of the same value, or trailing bytes")
    return value


def _walk(data: bytes, most: int) -> None:
    """Refuse what costs more than it is long, before anything is made of it: one walk over the heads (RFC 8949, section 3).

    Refused are tags (dates, big numbers, fractions: values of types that no message here has), more than `most` values, more
    than `MAX_DEPTH` levels, and map keys that are no number, bytes or text: a decoder hashes a map within a key once more for
    each level, so that 165 bytes of maps within keys cost it minutes.
    """
    at, found, size = 0, 0, len(data)
    left, maps = [1], [False]  # of each open container: values to come, and whether every second one is a key
    while left:
        if not left[-1]:
            left.pop()
            maps.pop()
            continue
        if at >= size:
            return  # cut off: the decoder says so
        key = maps[-1] and not left[-1] % 2
        left[-1] -= 1
        found += 1
        if found > most:
            raise ValueError(f"message of more than {most} values")
        major, info = data[at] >> 5, data[at] & 31
        at += 1
        if info > 23:
            width = 1 << (info - 24) if info < 28 else 0  # anything else is not canonical, and refused for that
            info = int.from_bytes(data[at : at + width], "big")
            at += width
        if key and major > 3:
            raise ValueError("a map key that is no number, bytes or text")
        if major in (2, 3):
            at += info
        elif major in (4, 5):
            left.append(info if major == 4 else 2 * info)
            maps.append(major == 5)
            if len(left) > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} levels")
        elif major == 6:
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
