"""Does this chain hold at this time, and where does it end? (RFC 5280, section 6, for chains whose order is given.)

Steps of `check_path`, for each certificate from leaf to root:
  1 time        not_before <= now <= not_after
  2 issuer      its issuer name is the subject name of the next one; the root is its own issuer
  3 authority   the next one is a CA, allowed to sign certificates, within its path length
  4 signature   the next one's key signed it (SHA-256 or better)
  5 critical    no critical extension that nobody here understands
  6 revocation  it is on no CRL of its issuer; with `revocation`, its issuer's current CRL must be there
All violations of all certificates are reported together. Which root it is, is `roots.choose`'s question: call both.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Final

from cloister.attestation.pki.certificate import Certificate
from cloister.attestation.pki.crl import RevocationList
from cloister.errors import EvidenceError, Reason

MOST: Final = 8

UNDERSTOOD: Final = frozenset(
    {"2.5.29.15", "2.5.29.19", "2.5.29.37", "2.5.29.17", "2.5.29.35", "2.5.29.14", "2.5.29.31"}
)
"""keyUsage, basicConstraints, extendedKeyUsage, subjectAltName, key identifiers, CRL distribution points."""


def check_path(
    chain: Sequence[Certificate],
    *,
    now: datetime,
    where: str,
    crls: Sequence[RevocationList] = (),
    revocation: bool = False,
    understood: frozenset[str] = frozenset(),
    anchored: bool = False,
) -> datetime:
    """Prove that `chain` (leaf first, self-signed root last) holds at `now`; return when its first part ends.

    Args:
        crls: revocation lists of any of the issuers; each is checked (signature, time) before it is believed.
        revocation: demand a current CRL for every certificate but the root.
        understood: dotted OIDs of further critical extensions that the caller reads.
        anchored: the caller believes the last certificate by its bytes (RFC 5280, 6.1.1 (d)): it need not be self-signed, so
            nobody else's key is looked for. Time, critical extensions and its authority over the one before still count.

    Raises:
        EvidenceError: `evidence-not-authentic`; `Reason.where` is `<where>.<fault>`.
        ValueError: `now` has no time zone.
    """
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    reasons: list[Reason] = []

    def refuse(fault: str, found: str, wanted: str, hint: str = "") -> None:
        reasons.append(Reason(f"{where}.{fault}", found, wanted, hint))

    if not 0 < len(chain) <= MOST:
        raise _refused([Reason(f"{where}.format", f"{len(chain)} certificates", f"1 to {MOST}")])
    for depth, certificate in enumerate(chain):
        name = certificate.subject or f"certificate {depth}"
        issuer = chain[min(depth + 1, len(chain) - 1)]
        # (1)
        if now < certificate.not_before:
            refuse(
                "future",
                f"{name}: valid from {certificate.not_before:%Y-%m-%d %H:%M}",
                f"valid at {now:%Y-%m-%d %H:%M}",
            )
        if now > certificate.not_after:
            refuse("expired", f"{name}: ended {certificate.not_after:%Y-%m-%d %H:%M}", f"valid at {now:%Y-%m-%d %H:%M}")
        trusted = anchored and depth == len(chain) - 1
        # (2)
        if not trusted and certificate.issuer_der != issuer.subject_der:
            refuse("issuer", f"{name}: issued by another name", issuer.subject)
        # (3)
        if not trusted and not issuer.authority:
            refuse("authority", f"{issuer.subject}: not a CA for certificates", "an authority")
        elif issuer.path_length is not None and depth > issuer.path_length and issuer is not certificate:
            refuse("authority", f"{issuer.subject}: {depth} authorities below it", f"at most {issuer.path_length}")
        # (4)
        if not trusted and not _signed(certificate, issuer):
            refuse("signature", f"{name}: not signed by {issuer.subject}", "a signature of its issuer")
        # (5)
        unknown = certificate.critical - UNDERSTOOD - understood
        if unknown:
            refuse(
                "format",
                f"{name}: critical extension {', '.join(sorted(unknown))}",
                "only critical extensions that are understood",
            )
        # (6)
        if depth == len(chain) - 1:
            continue
        mine = [each for each in crls if each.issuer_der == certificate.issuer_der]
        for each in mine:
            problem = each.problem(issuer, now)
            if problem is not None and revocation:
                refuse("revocation", problem, "a current revocation list", "fetch fresh collateral")
            if problem is None and certificate.serial in each.serials:
                refuse("revoked", f"{name}: serial {certificate.serial:x} is revoked", "an unrevoked certificate")
        if revocation and not mine:
            refuse("revocation", f"no revocation list of {issuer.subject}", "a current one", "fetch fresh collateral")
    if reasons:
        raise _refused(reasons)
    return min(certificate.not_after for certificate in chain)


@lru_cache(maxsize=512)
def _signed(certificate: Certificate, issuer: Certificate) -> bool:
    # a fact about bytes, whatever the time: a broker sees the same intermediate certificates all day
    return certificate.verify_issued_by(issuer)


def describe(chain: Sequence[Certificate]) -> tuple[str, ...]:
    """Return one sentence per certificate, for `Claims.chain`."""
    return tuple(
        f"{each.subject}, serial {each.serial:x}, {each.not_before:%Y-%m-%d} to {each.not_after:%Y-%m-%d}"
        for each in chain
    )


def _refused(reasons: list[Reason]) -> EvidenceError:
    return EvidenceError("the certificate chain does not hold", code="evidence-not-authentic", reasons=reasons)
