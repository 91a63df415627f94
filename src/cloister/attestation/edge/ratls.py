"""RA-TLS identities: a key made in memory, evidence about it, a certificate that carries both. TLS contexts for them. Edge.

    identity = make_identity(attester, now=now)
    server = server_context(identity)                          the peer shows nothing
    client = client_context(identity)                          any server is let in by TLS ...
    peer = ratls.verify(peer_certificate(socket), ...)         ... and judged here, before a byte is sent

The standard library's `ssl` cannot ask a client for a certificate and leave the judgement to us: it refuses what does not
chain to a trusted one. So mutual RA-TLS takes `server_context(identity, peers=[...])` with the certificates that were verified
before (a peer introduces itself over a connection without a client certificate, or a broker handed its certificate out), and
the caller verifies again after the handshake, at the time of that connection.

TLS 1.3 only, in which the handshake signature covers the whole transcript: who finishes it has the certificate's private key.
Keys reach OpenSSL through a memfd, never a disk.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from cloister.attestation import ratls
from cloister.attestation.edge.attester import Attester
from cloister.attestation.evidence import LIMITS
from cloister.errors import EvidenceError, MachineError, PeerError, Reason

LIFETIME: Final = timedelta(hours=24)
"""Evidence without a nonce is as old as its key: a short life makes it younger. `ratls.verify` refuses after it."""
BACKDATED: Final = timedelta(minutes=5)
"""For peers whose clock is behind."""
CURVES: Final[dict[str, tuple[type[ec.EllipticCurve], type[SHA256] | type[SHA384]]]] = {
    "P-256": (ec.SECP256R1, SHA256),
    "P-384": (ec.SECP384R1, SHA384),
}


@dataclass(frozen=True, slots=True)
class Identity:
    """A key that exists in this object only, and its certificate (DER)."""

    certificate: bytes = field(repr=False)
    spki: bytes = field(repr=False)
    """DER SubjectPublicKeyInfo."""
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    def pem(self) -> bytes:
        """Return key and certificate, for OpenSSL."""
        key = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return key + ssl.DER_cert_to_PEM_cert(self.certificate).encode()


def make_identity(
    attester: Attester,
    *,
    now: datetime,
    curve: Literal["P-256", "P-384"] = "P-384",
    nonce: bytes | None = None,
    lifetime: timedelta = LIFETIME,
    name: str = "cloister",
) -> Identity:
    """Return a fresh key with a self-signed certificate that carries evidence about it.

    P-384 is what Gramine uses. `nonce` is what a verifier sent, 1 to 64 bytes.

    Raises:
        MachineError: the attester does not answer, or its evidence is not one quote: TEEs whose evidence needs further
            parts, and devices, have no form in an RA-TLS certificate.
        ValueError: `now` has no time zone, or a nonce of another size.
    """
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    make, algorithm = CURVES[curve]
    key = ec.generate_private_key(make())
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    # the log is claimed before it is quoted: what the quote's register says must be what the claims say
    events = attester.evidence(bytes(64)).events
    claims = ratls.claims(spki, nonce=nonce, events=events)
    evidence = attester.evidence(ratls.report_data(claims))
    if evidence.parts or evidence.devices or attester.devices or len(evidence.quote) > LIMITS.quote:
        raise MachineError(
            f"evidence of {attester.name} has no form in an RA-TLS certificate",
            reasons=[Reason("ratls.4-evidence", "parts or devices beside the quote", "one SGX or TDX quote")],
            hint="use the broker's own protocol, which carries all of it",
        )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    value = ratls.evidence_extension(evidence.quote, claims)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(ratls.OID), value), critical=False)
        .sign(key, algorithm())
    )
    identity = Identity(certificate.public_bytes(Encoding.DER), spki, key)
    try:
        ratls.check(identity.certificate, nonce=nonce)
    except EvidenceError as error:  # an attester that folds something into REPORT_DATA, or quotes what it was not asked
        raise MachineError("the attester's evidence does not fit RA-TLS", reasons=error.reasons) from error
    return identity


def server_context(identity: Identity, *, peers: Sequence[bytes] = ()) -> ssl.SSLContext:
    """Return a context for servers. With `peers` (DER, verified by the caller), a client must show one of these certificates
    and prove its key; without, clients show none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, identity)
    if peers:
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # a certificate that is trusted is its own authority
        for der in peers:
            context.load_verify_locations(cadata=der)
    return context


def client_context(identity: Identity | None = None) -> ssl.SSLContext:
    """Return a context for clients, which show `identity` if they are asked.

    TLS accepts every server with it: nothing may be sent before `ratls.verify` took `peer_certificate`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if identity is not None:
        _load(context, identity)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def peer_certificate(socket: ssl.SSLSocket) -> bytes:
    """Return the certificate (DER) whose key the peer proved to have.

    Raises:
        PeerError: it showed none.
    """
    der = socket.getpeercert(binary_form=True)
    if not der:
        raise PeerError("the peer showed no certificate", code="protocol")
    return der


def _load(context: ssl.SSLContext, identity: Identity) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with _in_memory(identity.pem()) as path:
        context.load_cert_chain(path)


@contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    descriptor = os.memfd_create("cloister-ratls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
