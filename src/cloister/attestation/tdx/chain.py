"""Why a certificate chain was refused, for people. dcap-qvl says only that it was; this decides nothing.

Looked for, certificate by certificate: a validity that does not include `now`, and a serial number on either CRL. A chain
that was refused for another reason (a signature, a wrong issuer) gives no finding.
"""

from __future__ import annotations

from datetime import datetime

from cryptography import x509


def findings(certificates: tuple[bytes, ...], crls: tuple[bytes, ...], *, now: datetime) -> tuple[str, ...]:
    """Return one sentence per certificate (DER) that is expired, not yet valid, or revoked by a CRL (DER) of its issuer."""
    found: list[str] = []
    try:
        lists = [x509.load_der_x509_crl(each) for each in crls]
        loaded = [x509.load_der_x509_certificate(each) for each in certificates]
        for each in loaded:
            subject = each.subject.rfc4514_string()
            if now < each.not_valid_before_utc:
                found.append(f"{subject} is valid only from {each.not_valid_before_utc:%Y-%m-%d}")
            if now > each.not_valid_after_utc:
                found.append(f"{subject} expired on {each.not_valid_after_utc:%Y-%m-%d}")
            found.extend(
                f"{subject} with serial {each.serial_number:x} is revoked"
                for revocations in lists
                if revocations.issuer == each.issuer
                and revocations.get_revoked_certificate_by_serial_number(each.serial_number) is not None
            )
    except ValueError:  # not X.509: dcap-qvl's own sentence has to do
        return ()
    return tuple(found)
