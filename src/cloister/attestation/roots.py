"""Roots of trust are data: which hardware vendor's certificate may end a chain, and whether a test root may.

A root is pinned by the SHA-256 of its DER certificate. Each hardware folder has its own `Pins`; `Roots` says whether the
published test roots count. Their private keys are public, so evidence under them protects nothing, and `choose` marks
it: the TEE type becomes `soft-<type>`, which a policy accepts only by the word `simulated`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cloister.errors import EvidenceError, Reason


@dataclass(frozen=True, slots=True)
class Roots:
    """Which roots a verifier believes. The default believes hardware vendors only."""

    soft: bool = False
    """Believe the published test roots too. Tests, demonstrations and CI set it; nothing is protected then."""
    also: Mapping[str, frozenset[str]] = field(default_factory=lambda: MappingProxyType({}))
    """Kind of evidence -> SHA-256 (lower-case hex) of further DER roots that the relying party believes: TPM vendors have no
    common root, and clouds have their own."""


@dataclass(frozen=True, slots=True)
class Pins:
    """SHA-256 (lower-case hex) of the DER root certificates of one kind of evidence."""

    vendor: frozenset[str]
    soft: frozenset[str]


def choose(kind: str, root_der: bytes, pins: Pins, roots: Roots, *, where: str) -> str:
    """Return the TEE type that a chain ending in `root_der` proves: `kind`, or `soft-<kind>` under a test root.

    Raises:
        EvidenceError: `evidence-not-authentic`: the root is not pinned, or is a test root and `roots.soft` is not set.
    """
    digest = hashlib.sha256(root_der).hexdigest()
    # before `also`: a key that everybody has stays soft, even where somebody lists it as their own
    if digest in pins.soft:
        if roots.soft:
            return f"soft-{kind}"
        found, hint = "the published test root", "software evidence protects nothing and must be allowed by name"
    elif digest in pins.vendor or digest in roots.also.get(kind, frozenset()):
        return kind
    else:
        found, hint = f"root {digest}", "the chain does not end at the hardware vendor"
    raise EvidenceError(
        "the evidence was not signed under the hardware vendor's root",
        code="evidence-not-authentic",
        reasons=[Reason(where, found, " or ".join(sorted(pins.vendor)) or "a root that the relying party pins", hint)],
    )
