"""May this session key ask for this consumer? A pure check, used by the broker before it counts an answer and by a
service before it works on one.

A consumer signs once with his SSH key (namespace `ask@cloister`): "until `expires` the Ed25519 key `session` asks the
service `service` about `contract` in my name". Every query is then signed by the session key alone, so a security key
is touched once an hour, and the service, which sees both, can prove to the broker that the consumer asked.

Steps, in this order; every one that fails is a reason, and all are reported together:

  1 service    the statement names this service's HPKE key, so another service cannot use it   docs/protocol.md 7
  2 contract   the statement names this contract by its id
  3 time       `now` < expires <= `now` + 1 hour
  4 consumer   the SSHSIG over the statement's bytes verifies in namespace `ask@cloister`
  5 query      the session key signs contract, service and the digest of the query

Whether that consumer may ask at all, in what form and how often, is the contract's question (decide.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloister.broker.wire import Authorisation, format_time, query_message
from cloister.contract import sshsig
from cloister.errors import InputError, Reason

NAMESPACE: Final = sshsig.ASK
LONGEST: Final = timedelta(hours=1)
SESSIONS: Final = 1024
"""Sessions whose SSHSIG is remembered as valid: it is the same with every question of an hour (bench/job.py, answer)."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks: the fingerprint (`SHA256:...`) of the SSH key behind the session."""

    fingerprint: str


def check(
    authorisation: Authorisation,
    *,
    contract: str,
    service: bytes,
    now: datetime,
    query: bytes | None = None,
    query_signature: bytes = b"",
) -> Asker:
    """Return who asks, if the five steps hold (step 5 only when `query` is given).

    `service` is SHA-256 of the HPKE key that the consumer's client attested; `query` the digest of one query.

    Raises:
        InputError: code `signature-invalid`, with every step that failed as a reason.
        ValueError: `now` has no time zone (a caller's mistake).
    """
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    statement = authorisation.statement
    reasons: list[Reason] = []
    fingerprint = ""
    if statement.service != service:  # 1
        reasons.append(
            Reason("session.service", statement.service.hex()[:16] + "…", service.hex()[:16] + "…", "attest it again")
        )
    if statement.contract != contract:  # 2
        reasons.append(Reason("session.contract", statement.contract, contract))
    if not now < statement.expires <= now + LONGEST:  # 3
        reasons.append(
            Reason(
                "session.expires",
                format_time(statement.expires),
                f"after {format_time(now)} and at most one hour later",
                "authorise a new session; compare the clocks if this one is new",
            )
        )
    try:  # 4
        fingerprint = _consumer(authorisation.signature, statement.encode())
    except InputError as error:
        reasons.extend(error.reasons or (Reason("session.signature", error.message, "a valid SSHSIG"),))
    if query is not None:  # 5
        message = query_message(contract=contract, service=service, query=query)
        try:
            Ed25519PublicKey.from_public_bytes(statement.session).verify(query_signature, message)
        except (InvalidSignature, ValueError):
            reasons.append(Reason("session.query", "a signature that does not verify", "the session key's signature"))
    if reasons:
        raise InputError(
            "the session may not ask for this consumer",
            code="signature-invalid",
            reasons=reasons,
            hint="the consumer's client has to authorise a new session",
        )
    return Asker(fingerprint)


@lru_cache(maxsize=SESSIONS)
def _consumer(signature: str, statement: bytes) -> str:
    """Return the fingerprint of the key that signed: a function of nothing but these bytes. Errors are not remembered."""
    return sshsig.verify(signature, statement, namespace=NAMESPACE).fingerprint
