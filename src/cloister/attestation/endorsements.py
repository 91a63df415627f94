"""Endorsements (RFC 9334): what the vendor says about its hardware. Collateral, as bytes, for a verifier to judge.

Nothing is believed because it is here: a verifier checks signatures, chains and validity windows at `now`. Where they
come from (a file, a cache, a generator of test collateral) is the edge's business; evidence never brings its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloister.errors import EvidenceError, Reason


@dataclass(frozen=True, slots=True)
class Endorsement:
    """Collateral for one family of machines."""

    kind: str
    """Kind of evidence it is for, such as `tdx`."""
    subject: str
    """Which machines: FMSPC in upper-case hex for TDX."""
    data: bytes
    """In the vendor's format; for TDX the JSON object that dcap-qvl calls quote collateral v3."""


@dataclass(frozen=True, slots=True)
class Endorsements:
    """All collateral that a verifier has. Empty endorses nothing."""

    items: tuple[Endorsement, ...] = ()

    def __or__(self, other: Endorsements) -> Endorsements:
        """Return both; for the same machines, `other` counts."""
        newer = {(item.kind, item.subject) for item in other.items}
        kept = tuple(item for item in self.items if (item.kind, item.subject) not in newer)
        return Endorsements(kept + other.items)

    def find(self, kind: str, subject: str, *, where: str) -> bytes:
        """Return the collateral for `kind` of evidence from the machines `subject`.

        Raises:
            EvidenceError: `evidence-not-authentic`: there is none.
        """
        for item in self.items:
            if item.kind == kind and item.subject == subject:
                return item.data
        have = ", ".join(sorted(item.subject for item in self.items if item.kind == kind)) or "none"
        raise EvidenceError(
            "no collateral endorses this machine",
            code="evidence-not-authentic",
            reasons=[
                Reason(where, f"collateral for {have}", subject, f"fetch the vendor's {kind} collateral for {subject}")
            ],
        )
