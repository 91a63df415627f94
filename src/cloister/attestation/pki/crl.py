"""Certificate revocation lists (RFC 5280, section 5): form here, belief in `problem`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from cloister.attestation.pki.certificate import Certificate, check_signature
from cloister.errors import EvidenceError, Reason

LIMIT: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class RevocationList:
    """One CRL. Equal means: the same bytes."""

    der: bytes
    issuer_der: bytes = field(compare=False)
    number: int | None = field(compare=False)
    """cRLNumber, which never goes back."""
    this_update: datetime = field(compare=False)
    next_update: datetime | None = field(compare=False)
    serials: frozenset[int] = field(compare=False, repr=False)
    _loaded: Any = field(compare=False, repr=False)

    def problem(self, issuer: Certificate, now: datetime) -> str | None:
        """Return why this list is not to be believed at `now` under `issuer`, or None."""
        if self.issuer_der != issuer.subject_der:
            return "a list of another issuer"
        if now < self.this_update:
            return f"a list valid from {self.this_update:%Y-%m-%d %H:%M}"
        if self.next_update is None or now > self.next_update:
            return (
                f"a list that ended {self.next_update:%Y-%m-%d %H:%M}" if self.next_update else "a list without an end"
            )
        return None if _signed(self, issuer) else "a list that its issuer did not sign"


@lru_cache(maxsize=64)
def _signed(found: RevocationList, issuer: Certificate) -> bool:
    loaded = found._loaded
    try:
        hash_, parameters = loaded.signature_hash_algorithm, loaded.signature_algorithm_parameters
    except (UnsupportedAlgorithm, ValueError, TypeError):
        return False
    return check_signature(issuer.key, loaded.signature, loaded.tbs_certlist_bytes, hash_, parameters)


def from_der(data: bytes, *, where: str) -> RevocationList:
    """Return the revocation list that is exactly `data`.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    if not 0 < len(data) <= LIMIT:
        raise _malformed(where, f"{len(data)} bytes", f"a DER revocation list of at most {LIMIT} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names and numbers with odd values; the issuer's must be equal anyway
            return _read(data)
    except Exception as error:  # the library does not say all that it raises, see `certificate.from_der`
        raise _malformed(where, str(error)[:200] or "bytes", "one DER revocation list") from error


def _read(data: bytes) -> RevocationList:
    loaded = x509.load_der_x509_crl(data)
    number = None
    for extension in loaded.extensions:
        if isinstance(extension.value, x509.CRLNumber):
            number = extension.value.crl_number
        elif extension.critical:  # a delta or indirect list says less than it seems
            raise ValueError(f"critical extension {extension.oid.dotted_string}")
    return RevocationList(
        der=data,
        issuer_der=loaded.issuer.public_bytes(),
        number=number,
        this_update=loaded.last_update_utc,
        next_update=loaded.next_update_utc,
        serials=frozenset(entry.serial_number for entry in loaded),
        _loaded=loaded,
    )


def _malformed(where: str, found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "a revocation list does not parse",
        code="evidence-malformed",
        reasons=[Reason(f"{where}.format", found, wanted)],
    )
