"""X.509 certificates as a frozen type, from DER or PEM. Form only; `path` decides what they prove.

`cryptography` announced that it will refuse certificates with serial number 0, which every AMD VCEK and VLEK has. Where it
refuses one, the certificate is read with asn1crypto and checked with the same primitives (`_Plain`); both ways are tested
to agree.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from cloister.errors import EvidenceError, Reason

__all__ = ["LIMIT", "Certificate", "PublicKey", "check_signature", "from_der", "from_pem"]

LIMIT: Final = 16 * 1024
"""Largest DER certificate accepted, in bytes; real ones have 0.6 to 2 kB."""
PEM_LIMIT: Final = 128 * 1024

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

_PEM: Final = re.compile(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----")
_HASHES: Final[dict[str, hashes.HashAlgorithm]] = {
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}


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
            warnings.simplefilter("ignore")  # serial 0; `_plain` is there for the day on which it raises
            return _with_cryptography(_load(data))
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion) as error:
        try:
            return _plain(data)
        except (ValueError, TypeError, KeyError, UnsupportedAlgorithm):
            raise _malformed(where, str(error)[:200] or "bytes", "one DER certificate") from error


def from_pem(data: bytes, *, where: str, most: int = 8) -> tuple[Certificate, ...]:
    """Return the certificates of a PEM file, in their order.

    Raises:
        EvidenceError: `evidence-malformed`: none, more than `most`, or one that does not parse.
    """
    import base64

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


def _with_cryptography(loaded: x509.Certificate) -> Certificate:
    der = loaded.public_bytes(Encoding.DER)
    if der[-1 - len(loaded.signature)] != 0:  # nothing signs that byte, so one certificate would have two forms
        raise ValueError("unused bits in the signature")
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
        return check_signature(issuer.key, loaded.signature, loaded.tbs_certificate_bytes, hash_, parameters)

    return Certificate(
        der=der,
        subject=loaded.subject.rfc4514_string(),
        subject_der=loaded.subject.public_bytes(),
        issuer_der=loaded.issuer.public_bytes(),
        serial=loaded.serial_number,
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


def _plain(data: bytes) -> Certificate:
    """The same from asn1crypto; only for certificates with serial 0, which `cryptography` may refuse."""
    # here, because only certificates that `cryptography` refuses need it
    from asn1crypto import x509 as asn1_x509

    loaded = asn1_x509.Certificate.load(data, strict=True)
    body = loaded["tbs_certificate"]
    serial = body["serial_number"].native
    if serial != 0:
        raise ValueError("only a certificate with serial 0 is read this way")
    key = load_der_public_key(body["subject_public_key_info"].dump())
    if not isinstance(key, (ec.EllipticCurvePublicKey, rsa.RSAPublicKey)):
        raise TypeError(f"a public key of type {type(key).__name__}")
    values = {entry["extn_id"].dotted: entry["extn_value"].contents for entry in body["extensions"]}
    if len(values) != len(body["extensions"]):
        raise ValueError("an extension is there twice")
    constraints, usage = loaded.basic_constraints_value, loaded.key_usage_value
    authority = bool(constraints and constraints["ca"].native)
    length = constraints["path_len_constraint"].native if constraints is not None else None
    allows = usage is None or "key_cert_sign" in usage.native
    algorithm = loaded["signature_algorithm"]
    # nobody signs this one, so it must be what is signed (RFC 5280, 4.1.1.2)
    if algorithm.dump() != body["signature"].dump():
        raise ValueError("two signature algorithms")
    name = algorithm.signature_algo
    hash_name = algorithm.hash_algo
    parameters: Any = padding.PKCS1v15()
    if name == "rsassa_pss":
        # the salt of AMD's certificates is as long as the hash; any other length is refused by the check itself
        salt = algorithm["parameters"]["salt_length"].native
        parameters = padding.PSS(mgf=padding.MGF1(_HASHES[hash_name]), salt_length=salt)
    elif name == "ecdsa":
        parameters = ec.ECDSA(_HASHES[hash_name])
    elif name != "rsassa_pkcs1v15":
        raise ValueError(f"signature algorithm {name}")

    # asn1crypto parses late: now, while its exceptions are caught
    signature, body_der, hash_ = loaded.signature, body.dump(), _HASHES[hash_name]

    def signed(issuer: Certificate) -> bool:
        return check_signature(issuer.key, signature, body_der, hash_, parameters)

    return Certificate(
        der=data,
        subject=loaded.subject.human_friendly,
        subject_der=loaded.subject.dump(),
        issuer_der=loaded.issuer.dump(),
        serial=serial,
        not_before=loaded.not_valid_before.astimezone(UTC),
        not_after=loaded.not_valid_after.astimezone(UTC),
        key=key,
        spki=key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        authority=authority and allows,
        path_length=length,
        extensions=values,
        critical=frozenset(entry["extn_id"].dotted for entry in body["extensions"] if entry["critical"].native),
        _signed=signed,
    )


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
