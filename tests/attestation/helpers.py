"""Small helpers of the attestation tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cloister.errors import EvidenceError

T = TypeVar("T")

SHARED = Path(__file__).resolve().parents[3] / "shared"
"""Third-party test data beside the repository; tests that need it skip when it is absent."""


def refusal(function: Callable[..., object], *args: object, **rest: object) -> EvidenceError:
    """Return the refusal of `function(*args, **rest)`; a value instead of a refusal fails the test."""
    try:
        value = function(*args, **rest)
    except EvidenceError as error:
        return error
    raise AssertionError(f"accepted: {value!r}")


def value_or_malformed(function: Callable[[], T]) -> T | None:
    """Return the value of `function()`, or None if it says `evidence-malformed` with reasons; nothing else may be raised."""
    try:
        return function()
    except EvidenceError as error:
        if error.code != "evidence-malformed" or not error.reasons:
            raise
        return None
