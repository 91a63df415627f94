"""Fixtures of more than one room."""

from __future__ import annotations

from tests.e2e_support import world as world
