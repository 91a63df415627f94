"""A named authority as collateral: what a relying party says about a service, as bytes <-> a frozen type.

Canonical JSON (RFC 8785) `{"audience": text or null, "issuer": text, "jwks": ["sha256:..."], "kind": text}`; `jwks` is sorted. It is
made from a contract (`contract.decide.authorities`) and by nobody else, under the subject `authority/<name>`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.types import AuthorityKind
from cloister.crypto.canonical import json_decode, json_encode
from cloister.errors import EvidenceError, Reason

KIND: Final = "token"
SUBJECT: Final = "authority/"
LIMIT: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Named:
    """An authority without its keys; they come with the evidence, and count by their digest."""

    kind: AuthorityKind
    issuer: str
    jwks: frozenset[str]
    """`sha256:` and 64 hex digits, of the exact bytes of each accepted JWKS document."""
    audience: str | None = None

    def endorsement(self, name: str) -> Endorsement:
        """Return the collateral that makes this the authority `name`."""
        value = {"kind": self.kind, "issuer": self.issuer, "jwks": sorted(self.jwks), "audience": self.audience}
        return Endorsement(KIND, SUBJECT + name, json_encode(value))


def read(data: bytes) -> Named:
    """Return the authority in an endorsement.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    try:
        value: Any = json_decode(data, limit=LIMIT)
    except ValueError as error:
        raise _malformed(str(error)[:200]) from error
    match value:
        case {
            "kind": "maa" | "confidential-space" | "nras" as kind,
            "issuer": str(issuer),
            "jwks": [*digests],
            "audience": None | str() as audience,
            **rest,
        } if not rest and all(isinstance(each, str) for each in digests):
            return Named(kind, issuer, frozenset(digests), audience)
        case _:
            raise _malformed("another shape")


def only(endorsements: Endorsements, named: Iterable[Endorsement]) -> Endorsements:
    """Return `endorsements` with the authorities `named` and no others, whoever put some among the collateral."""
    hardware = tuple(item for item in endorsements.items if item.kind != KIND)
    return Endorsements((*hardware, *named))


def _malformed(found: str) -> EvidenceError:
    wanted = "canonical JSON {audience, issuer, jwks, kind}"
    return EvidenceError(
        "the authority does not parse", code="evidence-malformed", reasons=[Reason("token.2-authority", found, wanted)]
    )
