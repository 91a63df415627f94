"""A token of an attestation service as evidence: is it the word of an authority that the relying party names?

Evidence of kind `token`: `quote` is the token (compact JWS; of NRAS the JSON of the bundle), and the parts are

    authority   name of the authority, as the contract has it
    jwks        the service's JWKS document, exactly as it published it

The sender chooses which authority to ask for and brings its keys; neither is believed. The relying party's endorsement
`authority/<name>` (`format.Named`) says which service that is, and the SHA-256 of each JWKS document that counts. Without
that endorsement a token is nobody's word.

Steps; an error names the step that refused:
  1 form        the parts are `authority` and `jwks`, and nothing else
  2 authority   the relying party names an authority by this name
  3 keys        SHA-256 of `jwks` is one that it pinned for it, and the document is a JWKS with usable keys
  4 nonce       the token holds a nonce where its service binds one: 64 bytes, or 32 without a runtime log
  5 token       every step of `authority.verify_token` for that nonce, such as `token.5-token.authority.3-signature`

A verifier of evidence is given no nonce, so step 4 takes the token's, and `Claims.report_data` is that nonce: `check_binding`
compares it. `Claims.log_in` says what it must be: report data where RTMR 3 carries the runtime log (`tdxvm`), report data folded
with the log elsewhere, 32 bytes of qualifying data where there is no log.

NRAS: a device. The bundle is about one GPU: each has its own evidence in `Evidence.devices`, as GPUs that answer for themselves
have, so that rules about GPUs and their ids mean the same.

Sources: `authority.py`, `nvidia/eat.py`. Not checked on purpose: revocation, which no service has; a token lasts until `exp`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType
from typing import Final

from cloister.attestation.authority import JWKS_LIMIT, Authority, nonce_in, verify_token
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.roots import Roots
from cloister.attestation.token import format as token_format
from cloister.attestation.types import Claims, Evidence
from cloister.errors import EvidenceError, Reason

KIND: Final[str] = token_format.KIND
STEPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "token.1-form": "The evidence is a token, the name of an authority and a JWKS, and nothing else.",
        "token.2-authority": "The relying party names an authority by this name.",
        "token.3-keys": "The JWKS is a document that the relying party pinned for it.",
        "token.4-nonce": "The token holds a nonce where its service binds it.",
        "token.5-token": "The authority said it: signature, issuer, audience, time, nonce, claims.",
    }
)
PARTS: Final = ("authority", "jwks")


def verify(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims:
    """Return what the authority says, bound to the nonce of its token. `roots` say nothing about services.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`; `reasons[0].where` names the step that refused.
        ValueError: `now` has no time zone (a caller's mistake).
    """
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    # (1)
    if sorted(evidence.parts) != sorted(PARTS):
        raise _malformed("token.1-form", ", ".join(sorted(evidence.parts)) or "no parts", " and ".join(PARTS))
    try:
        name = evidence.parts["authority"].decode("ascii")
    except UnicodeDecodeError as error:
        raise _malformed("token.1-form", "a name that is not ASCII", "the name of an authority") from error
    # (2)
    named = _named(name, endorsements)
    # (3)
    authority = _with_keys(name, named, evidence.parts["jwks"])
    # (4)
    try:
        nonce = nonce_in(evidence.quote, authority.kind)
    except EvidenceError as error:
        raise _at("token.4-nonce", error) from error
    if evidence.events and len(nonce) != 64:
        raise _refused(
            "the token says nothing about the runtime log",
            Reason("token.4-nonce", f"{len(evidence.events)} events under {len(nonce)} bytes", "a nonce of 64 bytes"),
        )
    # (5)
    try:
        claims = verify_token(evidence.quote, authority, now=now, nonce=nonce, events=evidence.events)
    except EvidenceError as error:
        raise _at("token.5-token", error) from error
    return claims if authority.kind != "nras" else _one(claims)


def _named(name: str, endorsements: Endorsements) -> token_format.Named:
    data = endorsements.get(KIND, token_format.SUBJECT + name)
    if data is None:
        subjects = (item.subject for item in endorsements.items if item.kind == KIND)
        known = ", ".join(sorted(each.removeprefix(token_format.SUBJECT) for each in subjects))
        raise _refused(
            "nobody here believes this authority",
            Reason(
                "token.2-authority",
                f"authority {name[:60]!r}",
                known or "no token: no authority is named",
                "a token counts only from an authority that the contract names",
            ),
        )
    return token_format.read(data)


def _with_keys(name: str, named: token_format.Named, jwks: bytes) -> Authority:
    digest = f"sha256:{hashlib.sha256(jwks).hexdigest()}"
    if digest not in named.jwks:
        raise _refused(
            "these are not the authority's keys",
            Reason(
                "token.3-keys",
                digest,
                " or ".join(sorted(named.jwks)[:4]) or "no JWKS",
                "if the service has new keys, the parties decide whether to pin them",
            ),
        )
    if len(jwks) > JWKS_LIMIT:
        raise _malformed("token.3-keys", f"{len(jwks)} bytes", f"at most {JWKS_LIMIT}")
    try:
        return Authority(name, named.kind, named.issuer, jwks, named.audience)
    except ValueError as error:
        raise _malformed(
            "token.3-keys", str(error)[:200], "a JWKS of the service, and an authority of its form"
        ) from error


def _one(bundle: Claims) -> Claims:
    """Return the claims about the GPU of a bundle."""
    if len(bundle.devices) != 1:
        found, wanted = f"a bundle about {len(bundle.devices)} devices", "a bundle about one: each has its own evidence"
        raise _malformed("token.5-token", found, wanted)
    return bundle.devices[0]


def _at(step: str, error: EvidenceError) -> EvidenceError:
    reasons = [replace(reason, where=f"{step}.{reason.where}") for reason in error.reasons]
    return EvidenceError(error.message, code=error.code, reasons=reasons, hint=error.hint)


def _malformed(where: str, found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "the token's evidence does not parse", code="evidence-malformed", reasons=[Reason(where, found, wanted)]
    )


def _refused(message: str, reason: Reason) -> EvidenceError:
    return EvidenceError(message, code="evidence-not-authentic", reasons=[reason])
