"""Fixtures of more than one room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from cloister.crypto import memory
from tests.e2e_support import world as world

# the first text that Hypothesis draws on a machine builds a table of all characters, which takes seconds
settings.register_profile("house", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("house")


@pytest.fixture(autouse=True, scope="session")
def this_process_stays_ordinary() -> Iterator[None]:
    """Commands that tests call in this process must not lock its gigabyte of pages or hide its /proc for all that follow.

    Processes of their own are hardened; `tests/crypto/test_memory.py` looks at one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "harden_process", lambda: memory.Hardening("the memory of tests", False, False))
        yield
