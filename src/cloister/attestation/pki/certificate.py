"""X.509 certificates as a frozen type, from DER or PEM. Form only; `path` decides what they prove.

`cryptography` announced that it will refuse certificates with serial number 0, which every AMD VCEK and VLEK has. Where it
refuses one, it reads the same bytes with another serial number (`_with_serial_0`), and the signature is checked over the
bytes as they are; both ways are tested to agree.
"""

from __future__ import annotations

import base64
import re
import warnings
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.errors import EvidenceError, Reason

__all__ = ["LIMIT", "Certificate", "PublicKey", "check_signature", "from_der", "from_pem"]

LIMIT: Final = 16 * 1024
"""Largest DER certificate accepted, in bytes; real ones have 0.6 to 2 kB."""
PEM_LIMIT: Final = 128 * 1024

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

_PEM: Final = re.compile(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----")


@dataclass(frozen=True, slots=True)
class Certificate:
    """One X.509 v3 certificate, taken apart. Equal means: the same bytes."""

    der: bytes = field(repr=False)
    subject: str = field(compare=False)
    """RFC 4514, for people."""
    subject_der: bytes = field(compare=False, repr=False)
    issuer_der: bytes = field(compare=False, repr=False)
    serial: int = field(compare=False)
    not_before: datetime = field(compare=False)
    not_after: datetime = field(compare=False)
    key: PublicKey = field(compare=False, repr=False)
    spki: bytes = field(compare=False, repr=False)
    """DER SubjectPublicKeyInfo."""
    authority: bool = field(compare=False)
    """basicConstraints says CA, and keyUsage, where present, allows signing certificates."""
    path_length: int | None = field(compare=False)
    extensions: dict[str, bytes] = field(compare=False, repr=False)
    """Dotted OID -> DER value."""
    critical: frozenset[str] = field(compare=False)
    _signed: Any = field(compare=False, repr=False)

    def verify_issued_by(self, issuer: Certificate) -> bool:
        """Return whether `issuer`'s key signed this certificate; names and time are `path`'s to check."""
        return bool(self._signed(issuer))


def from_der(data: bytes, *, where: str) -> Certificate:
    """Return the certificate that is exactly `data`.

    Raises:
        EvidenceError: `evidence-malformed`: not one DER certificate, too large, or a key that no vendor uses.
    """
    if not 0 < len(data) <= LIMIT:
        raise _malformed(where, f"{len(data)} bytes", f"a DER certificate of at most {LIMIT} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # serial 0; `_with_serial_0` is there for the day on which it raises
            return _with_cryptography(_load(data))
    except Exception as error:  # noqa: BLE001  # the library does not say all that it raises: UnsupportedGeneralNameType is no ValueError
        try:
            return _with_serial_0(data)
        except Exception:  # noqa: BLE001  # as above: whatever it is, it is no certificate
            raise _malformed(where, str(error)[:200] or "bytes", "one DER certificate") from error


def from_pem(data: bytes, *, where: str, most: int = 8) -> tuple[Certificate, ...]:
    """Return the certificates of a PEM file, in their order.

    Raises:
        EvidenceError: `evidence-malformed`: none, more than `most`, or one that does not parse.
    """
    if len(data) > PEM_LIMIT:
        raise _malformed(where, f"{len(data)} bytes", f"at most {PEM_LIMIT} bytes of PEM")
    bodies = _PEM.findall(data)
    if not 0 < len(bodies) <= most:
        raise _malformed(where, f"{len(bodies)} PEM certificates", f"1 to {most}")
    found = []
    for body in bodies:
        try:
            der = base64.b64decode(b"".join(body.split()), validate=True)
        except ValueError as error:
            raise _malformed(where, str(error), "base64 between the PEM lines") from error
        found.append(from_der(der, where=where))
    return tuple(found)


def _load(data: bytes) -> x509.Certificate:
    # a function of its own so that a test can make it refuse serial 0
    return x509.load_der_x509_certificate(data)


def _with_cryptography(loaded: x509.Certificate, serial_0: bytes | None = None) -> Certificate:
    """Take `loaded` apart; `serial_0` are the bytes that it was before its serial number, 0, was replaced."""
    der, body, serial = loaded.public_bytes(Encoding.DER), loaded.tbs_certificate_bytes, loaded.serial_number
    if der[-1 - len(loaded.signature)] != 0:  # nothing signs that byte, so one certificate would have two forms
        raise ValueError("unused bits in the signature")
    if _algorithms_differ(der, body):
        raise ValueError("two signature algorithms")
    if serial_0 is not None:
        der, body, serial = serial_0, serial_0[_inside(der, 0) :][: len(body)], 0
    key = loaded.public_key()
    if not isinstance(key, (ec.EllipticCurvePublicKey, rsa.RSAPublicKey)):
        raise TypeError(f"a public key of type {type(key).__name__}")
    authority, length = False, None
    critical = set()
    values = {}
    usage_allows = True
    for extension in loaded.extensions:
        oid = extension.oid.dotted_string
        value = extension.value
        if extension.critical:
            critical.add(oid)
        if isinstance(value, x509.UnrecognizedExtension):
            values[oid] = value.value
        else:
            values[oid] = value.public_bytes()
        if isinstance(value, x509.BasicConstraints):
            authority, length = value.ca, value.path_length
        elif isinstance(value, x509.KeyUsage):
            usage_allows = value.key_cert_sign

    def signed(issuer: Certificate) -> bool:
        try:
            hash_, parameters = loaded.signature_hash_algorithm, loaded.signature_algorithm_parameters
        except (UnsupportedAlgorithm, ValueError, TypeError):
            return False  # an algorithm that nobody here knows proves nothing
        return check_signature(issuer.key, loaded.signature, body, hash_, parameters)

    return Certificate(
        der=der,
        subject=loaded.subject.rfc4514_string(),
        subject_der=loaded.subject.public_bytes(),
        issuer_der=loaded.issuer.public_bytes(),
        serial=serial,
        not_before=loaded.not_valid_before_utc,
        not_after=loaded.not_valid_after_utc,
        key=key,
        spki=key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        authority=authority and usage_allows,
        path_length=length,
        extensions=values,
        critical=frozenset(critical),
        _signed=signed,
    )


_SERIAL_0: Final = bytes.fromhex("a003020102020100")
"""What a v3 certificate with serial number 0 has first in its TBSCertificate (RFC 5280, 4.1)."""


def _with_serial_0(data: bytes) -> Certificate:
    """The same for a certificate that the library may refuse: with another serial number it must take the very same bytes.

    No second parser: one that is more lenient would read what the first refuses, and somebody would find a use for that.
    """
    at = _inside(data, _inside(data, 0))
    if data[at : at + 8] != _SERIAL_0:
        raise ValueError("not a certificate with serial 0")
    return _with_cryptography(_load(data[: at + 7] + b"\x01" + data[at + 8 :]), data)


def _inside(data: bytes, at: int) -> int:
    """Return where the contents of the DER element at `at` begin."""
    return at + 2 + (data[at + 1] & 0x7F if data[at + 1] & 0x80 else 0)


def _algorithms_differ(der: bytes, body: bytes) -> bool:
    # the outer one is what is used, and nobody signs it (RFC 5280, 4.1.1.2)
    outer = der.partition(body)[2]
    size = 2 + outer[1] if outer[:1] == b"\x30" and outer[1] < 0x80 else 0
    at = _inside(body, 0)
    at += 5 if body[at] == 0xA0 else 0
    at += 2 + body[at + 1]
    return size == 0 or body[at : at + size] != outer[:size]


def check_signature(key: PublicKey, signature: bytes, signed: bytes, hash_: Any, parameters: Any) -> bool:
    """Return whether `key` signed `signed`, with SHA-256 or better; `parameters` are the padding or `ec.ECDSA`."""
    if not isinstance(hash_, (hashes.SHA256, hashes.SHA384, hashes.SHA512)):
        return False  # SHA-1 and older sign nothing here
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            if not isinstance(parameters, ec.ECDSA):
                return False
            key.verify(signature, signed, parameters)
        else:
            if not isinstance(parameters, (padding.PSS, padding.PKCS1v15)):
                return False
            key.verify(signature, signed, parameters, hash_)
    except (InvalidSignature, ValueError, UnsupportedAlgorithm):
        return False
    return True


def _malformed(where: str, found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "a certificate does not parse", code="evidence-malformed", reasons=[Reason(f"{where}.format", found, wanted)]
    )
