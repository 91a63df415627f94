"""Is this evidence authentic? One door for every kind of hardware.

A kind of hardware is a folder beside this file with a module `verify` that has `KIND: str` and

    verify(evidence, endorsements, roots, *, now) -> Claims

`VERIFIERS` is read from those folders when this module is imported, never from what a peer sends, so new hardware is
new files only. docs/attestation.md says what a folder holds.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Final, Protocol

import cloister.attestation as room
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.roots import Roots
from cloister.attestation.types import Claims, Evidence
from cloister.errors import EvidenceError, Reason

__all__ = ["VERIFIERS", "Endorsement", "Endorsements", "Roots", "Verifier", "verify"]


class Verifier(Protocol):
    """The `verify` function of one hardware folder."""

    def __call__(self, evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims: ...


def _verifiers() -> Mapping[str, Verifier]:
    found: dict[str, Verifier] = {}
    for entry in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
        if entry.ispkg and importlib.util.find_spec(f"{entry.name}.verify") is not None:
            module = importlib.import_module(f"{entry.name}.verify")
            found[module.KIND] = module.verify
    return MappingProxyType(found)


VERIFIERS: Final[Mapping[str, Verifier]] = _verifiers()
"""Kind of evidence -> its verifier."""


def verify(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims:
    """Return what `evidence` proves at `now`; a test root gives `Claims.tee` the prefix `soft-`.

    Raises:
        EvidenceError: `evidence-malformed`, or `evidence-not-authentic`; `reasons[0].where` names the step that refused.
        ValueError: `now` has no time zone (a caller's mistake).
    """
    verifier = VERIFIERS.get(evidence.kind)
    if verifier is None:
        raise EvidenceError(
            f"this version does not verify evidence of kind {evidence.kind!r}",
            code="evidence-malformed",
            reasons=[Reason("evidence.kind", repr(evidence.kind), " or ".join(sorted(VERIFIERS)))],
        )
    return verifier(evidence, endorsements, roots, now=now)
