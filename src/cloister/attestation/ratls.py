"""Interoperable RA-TLS: evidence inside an X.509 certificate, bound to the certificate's own key. Pure.

Sources: CCC Attestation SIG, "Interoperable RA-TLS" (the specification page of interoperable-ra-tls: extension, claims, key binding);
TCG DICE Attestation Architecture 1.1 (OID 2.23.133.5.4.9); IANA "Named Information Hash Algorithm Registry" (hash numbers);
Gramine's `tools/sgx/ra-tls` (what is on the wire since Gramine 1.8, and the form before it). The byte table is in
docs/attestation/ra-tls.md.

    dice     extension 2.23.133.5.4.9 = CBOR tag 60000 [quote, claims]; REPORT_DATA = SHA-256(claims) || 0^32;
             claims = map: "pubkey-hash": bstr(CBOR [algorithm, hash of the DER SubjectPublicKeyInfo]), "nonce"?: bstr
    legacy   extension 0.6.9.42.840.113741.1337.6 (Gramine) or 1.2.840.113741.1337.6 = quote;
             REPORT_DATA = SHA-256(DER SubjectPublicKeyInfo) || 0^32

Steps of `check`; an error names the step that refused:
  1 certificate  one DER X.509 v3 certificate of at most 16 KiB
  2 key-type     its key is EC P-256 or P-384
  3 extension    an evidence extension, not critical (`no-evidence`: none). The DICE form decides where both are: what is wrong
                 there is never made good by the legacy form
  4 evidence     tag 60000 and two byte strings, nothing behind them; tag 60001 (a TEE report that only the same machine can
                 verify) is recognised and refused
  5 claims       one map with text keys, shortest definite lengths, no key twice (`no-pubkey-hash`, `hash-algorithm`,
                 `hash-length`: SHA-256, SHA-384 or SHA-512)
  6 quote        an SGX quote v3 or a TDX quote v4/v5, exactly as long as it says
  7 report-data  REPORT_DATA[:32] is the hash (`report-data-tail`: the other 32 bytes are zero)
  8 pubkey-hash  the hash is that of this certificate's key
  9 self-signature  the key signed the certificate
 10 nonce        where the caller sent one: the claim is it
`verify` goes on: 11 dates (the certificate is inside its own window), 12 the quote through `attestation.verify`, with its own
steps, and 13 agree (the verifier read the REPORT_DATA that was checked here).

Stricter than Gramine's verifier, which takes claims without `pubkey-hash`, a tail that is not zero, repeated keys, bytes behind
claims or evidence, a signature length that disagrees with the quote, a foreign self-signature and any dates.

Not checked on purpose: names, serial numbers and key usage, which a self-signed certificate says about itself; and that the peer
has the private key, which the TLS handshake proves. Without a nonce the evidence is as old as the key may be: `verify` proves
that this key was made in that TEE, not when.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric import ec

from cloister.attestation import cose
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.evidence import LIMITS
from cloister.attestation.pki import certificate as x509
from cloister.attestation.roots import Roots
from cloister.attestation.types import Claims, Event, Evidence
from cloister.attestation.verify import verify as verify_evidence
from cloister.crypto.canonical import cbor_encode
from cloister.errors import EvidenceError, Reason

OID: Final = "2.23.133.5.4.9"
"""tcg-dice 9, "tagged evidence"."""
LEGACY_OIDS: Final = ("0.6.9.42.840.113741.1337.6", "1.2.840.113741.1337.6")
"""Gramine before 1.8, and beside the DICE form since. The first is Intel's 1.2.840.113741.1337.6 with its DER header inside
itself: Gramine searches for bytes, so both are met."""
TAG_EVIDENCE: Final = 60000
"""`[quote, claims]`: IANA CBOR tags, "DICE tagged evidence"."""
TAG_REPORT: Final = 60001
"""`[report, claims]`: only a party on the same machine can verify it."""
HASHES: Final[dict[int, Callable[[bytes], Any]]] = {1: hashlib.sha256, 7: hashlib.sha384, 8: hashlib.sha512}
"""IANA Named Information Hash Algorithm Registry: id -> hash."""
EVENTS: Final = "cloister.events"
"""Our own claim beside the standard's two, bound like them: the runtime event log, which a quote with a runtime register needs.
Canonical CBOR `[[register, name, digest, data], ...]`; verifiers of others pass over it."""
NONCE_BYTES: Final = range(1, 65)
MAX_CLAIMS: Final = 64 * 1024
_CURVES: Final = ("secp256r1", "secp384r1")

STEPS: Final = {
    "ratls.1-certificate": "one X.509 certificate in DER",
    "ratls.2-key-type": "its key is EC P-256 or P-384",
    "ratls.3-extension": "it carries evidence, in an extension that is not critical; the DICE form decides if there are two",
    "ratls.4-evidence": "CBOR tag 60000 with a quote and claims, nothing else",
    "ratls.5-claims": "claims parse in one way only and name the hash of a key",
    "ratls.6-quote": "an SGX v3 or TDX v4/v5 quote, as long as it says",
    "ratls.7-report-data": "the quote signs the hash of the claims, and zeros",
    "ratls.8-pubkey-hash": "the claims name the key of this certificate",
    "ratls.9-self-signature": "this key signed the certificate",
    "ratls.10-nonce": "the nonce is the one that we sent",
    "ratls.11-dates": "the certificate is inside its own dates",
    "ratls.13-agree": "the verifier of the quote read the same REPORT_DATA",
}
"""Step -> what it says; step 12 is the quote's verifier with its own steps."""


@dataclass(frozen=True, slots=True)
class RaTls:
    """An RA-TLS certificate whose key is bound to its quote. The quote itself is not verified yet."""

    certificate: x509.Certificate
    form: Literal["dice", "legacy"]
    """The extension that decided."""
    kind: str
    """Kind of evidence that the quote is: `sgx` or `tdx`."""
    quote: bytes = field(repr=False)
    report_data: bytes = field(repr=False)
    """64 bytes, as this parser reads them from the quote."""
    claims: bytes = field(default=b"", repr=False)
    """The CBOR claims exactly as hashed; empty in the legacy form."""
    nonce: bytes | None = None
    events: tuple[Event, ...] = ()

    @property
    def evidence(self) -> Evidence:
        """The evidence for `attestation.verify`."""
        return Evidence(self.kind, self.quote, self.events)


# --- making -----------------------------------------------------------------------------------------------------------


def claims(spki: bytes, *, nonce: bytes | None = None, events: Sequence[Event] = ()) -> bytes:
    """Return the claims for the key `spki` (DER SubjectPublicKeyInfo), hashed with SHA-256 as Gramine does.

    Raises:
        ValueError: a nonce that is not 1 to 64 bytes.
    """
    value: dict[str, Any] = {"pubkey-hash": cbor_encode([1, hashlib.sha256(spki).digest()])}
    if nonce is not None:
        if len(nonce) not in NONCE_BYTES:
            raise ValueError(f"a nonce of {len(nonce)} bytes, wanted 1 to 64")
        value["nonce"] = nonce
    if events:
        value[EVENTS] = cbor_encode([[each.register, each.name, each.digest, each.data] for each in events])
    return cbor_encode(value)


def report_data(claims_cbor: bytes) -> bytes:
    """Return the 64 bytes that the TEE signs for `claims_cbor`."""
    return hashlib.sha256(claims_cbor).digest() + bytes(32)


def evidence_extension(quote: bytes, claims_cbor: bytes) -> bytes:
    """Return the value of extension `OID`: tag 60000 `[quote, claims]`.

    Raises:
        ValueError: larger than a reader takes.
    """
    if len(quote) > LIMITS.quote or len(claims_cbor) > MAX_CLAIMS:
        raise ValueError(f"a quote of {len(quote)} and claims of {len(claims_cbor)} bytes: larger than a reader takes")
    return b"\xd9" + TAG_EVIDENCE.to_bytes(2, "big") + cbor_encode([quote, claims_cbor])


# --- reading ----------------------------------------------------------------------------------------------------------


def parse(der: bytes) -> RaTls:
    """Return what an RA-TLS certificate carries: steps 1 to 6, form only. `check` is what proves something.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    return _parse(der)[0]


def check(der: bytes, *, nonce: bytes | None = None) -> RaTls:
    """Return the certificate if its quote speaks about its key: steps 1 to 10. The quote's signature is `verify`'s.

    Raises:
        EvidenceError: `evidence-malformed`, `evidence-not-authentic` (steps 7 to 9) or `evidence-stale` (step 10).
    """
    found, algorithm, named = _parse(der)
    # (7)
    wanted = hashlib.sha256(found.claims).digest() if found.form == "dice" else named
    if found.form == "dice" and not hmac.compare_digest(found.report_data[:32], wanted):
        raise _no(
            "ratls.7-report-data", found.report_data[:32].hex(), f"SHA-256 of the claims, {wanted.hex()}", _COPIED
        )
    if found.report_data[32:] != bytes(32):
        raise _no("ratls.7-report-data-tail", found.report_data[32:].hex(), "32 zero bytes")
    # (8)
    actual = HASHES[algorithm](found.certificate.spki).digest()
    if not hmac.compare_digest(actual, named):
        raise _no("ratls.8-pubkey-hash", f"evidence for the key {named.hex()}", actual.hex(), _COPIED)
    # (9) proves nothing about the TEE, but who changes dates or names of somebody's certificate should not pass
    if not found.certificate.verify_issued_by(found.certificate):
        raise _no("ratls.9-self-signature", "a signature that does not verify", "a certificate signed by its own key")
    # (10)
    if nonce is not None and (found.nonce is None or not hmac.compare_digest(found.nonce, nonce)):
        raise EvidenceError(
            "the certificate was made for another question",
            code="evidence-stale",
            reasons=[Reason("ratls.10-nonce", "none" if found.nonce is None else found.nonce.hex(), nonce.hex())],
        )
    return found


def verify(
    der: bytes, endorsements: Endorsements, roots: Roots, *, now: datetime, nonce: bytes | None = None
) -> Claims:
    """Return what the TEE that made this certificate's key is: every step. The caller appraises the claims.

    Raises:
        EvidenceError: as `check`, `evidence-stale` outside the certificate's dates, and as `attestation.verify`.
        ValueError: `now` has no time zone (a caller's mistake).
    """
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    found = check(der, nonce=nonce)
    # (11) the dates are the attester's own word: they can only shorten the key's life
    if not found.certificate.not_before <= now <= found.certificate.not_after:
        window = f"valid {found.certificate.not_before:%Y-%m-%dT%H:%M:%SZ} to {found.certificate.not_after:%Y-%m-%dT%H:%M:%SZ}"
        raise EvidenceError(
            "the certificate is outside its own dates",
            code="evidence-stale",
            reasons=[Reason("ratls.11-dates", window, f"{now:%Y-%m-%dT%H:%M:%SZ}", "make a new key and certificate")],
        )
    # (12)
    result = verify_evidence(found.evidence, endorsements, roots, now=now)
    # (13) a difference between two parsers is where an attacker lives
    if not hmac.compare_digest(result.report_data, found.report_data):
        raise _no("ratls.13-agree", result.report_data.hex(), found.report_data.hex())
    ends = min(filter(None, (result.valid_until, found.certificate.not_after)))
    return replace(result, valid_until=ends)


_COPIED: Final = "the evidence belongs to another certificate"


def _parse(der: bytes) -> tuple[RaTls, int, bytes]:
    """Return the certificate, and algorithm and value of the hash that names a key."""
    # (1)
    certificate = x509.from_der(der, where="ratls.1-certificate")
    # (2)
    key = certificate.key
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        what = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else "RSA"
        raise _malformed("ratls.2-key-type", f"a key of type {what}", "P-256 or P-384")
    # (3)
    present = [oid for oid in (OID, *LEGACY_OIDS) if oid in certificate.extensions]
    if not present:
        wanted = f"extension {OID}, or Gramine's older one"
        raise _malformed("ratls.3-no-evidence", "no extension with evidence", wanted)
    oid = present[0]
    if certificate.critical.intersection(present):
        raise _malformed("ratls.3-extension", f"{oid} is critical", "not critical: TLS stacks must pass over it")
    if len(present) == 3:
        raise _malformed("ratls.3-extension", "both spellings of the legacy extension", "one")
    value = certificate.extensions[oid]
    if oid != OID:
        kind, signed = _quote(value)
        return RaTls(certificate, "legacy", kind, value, signed), 1, signed[:32]
    # (4)
    quote, claims_cbor = _tagged(value)
    # (5)
    algorithm, named, nonce, events = _claims(claims_cbor)
    # (6)
    kind, signed = _quote(quote)
    return RaTls(certificate, "dice", kind, quote, signed, claims_cbor, nonce, events), algorithm, named


def _tagged(data: bytes) -> tuple[bytes, bytes]:
    where, wanted = "ratls.4-evidence", "CBOR tag 60000 with [quote, claims], two byte strings"
    match _cbor(data, where, wanted):
        case cose.Tagged(tag=60001):
            hint = "a TEE report is for the same machine: the peer has to have it quoted"
            raise _malformed(where, "tag 60001, a TEE report", wanted, hint)
        case cose.Tagged(tag=60000, value=[bytes(quote), bytes(claims_cbor)]):
            return quote, claims_cbor
        case cose.Tagged(tag=tag) if tag != TAG_EVIDENCE:
            raise _malformed(where, f"tag {tag}", wanted)
    raise _malformed(where, "another shape", wanted)


def _claims(data: bytes) -> tuple[int, bytes, bytes | None, tuple[Event, ...]]:
    where = "ratls.5-claims"
    value = _cbor(data, where, "one CBOR map with text keys, in shortest form")
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _malformed(where, "another shape", "one map with text keys")
    if "pubkey-hash" not in value:
        hint = "evidence that names no key can be copied into anybody's certificate"
        raise _malformed("ratls.5-no-pubkey-hash", "no pubkey-hash", "the hash of the certificate's key", hint)
    entry = value["pubkey-hash"]
    if not isinstance(entry, bytes):
        raise _malformed(where, "pubkey-hash that is no byte string", "a byte string with [algorithm, hash]")
    match _cbor(entry, where, "pubkey-hash: [algorithm, hash]"):
        case [int(algorithm), bytes(named)] if not isinstance(algorithm, bool):
            pass
        case _:
            raise _malformed(where, "pubkey-hash of another shape", "[algorithm, hash]")
    if algorithm not in HASHES:
        wanted = "1 (SHA-256), 7 (SHA-384) or 8 (SHA-512)"
        raise _malformed("ratls.5-hash-algorithm", f"hash algorithm {algorithm}", wanted)
    size = HASHES[algorithm](b"").digest_size
    if len(named) != size:
        raise _malformed("ratls.5-hash-length", f"{len(named)} bytes", f"{size} bytes")
    nonce = value.get("nonce")
    if "nonce" in value and (not isinstance(nonce, bytes) or len(nonce) not in NONCE_BYTES):
        raise _malformed(where, "a nonce of another form", "1 to 64 bytes")
    return algorithm, named, nonce, _events(value[EVENTS]) if EVENTS in value else ()


def _events(data: Any) -> tuple[Event, ...]:
    where = "ratls.5-claims"
    if not isinstance(data, bytes):
        raise _malformed(where, f"{EVENTS} that is no byte string", "a byte string with the event log")
    value = _cbor(data, where, f"{EVENTS}: [[register, name, digest, data], ...]")
    if not isinstance(value, list) or not 0 < len(value) <= LIMITS.events:
        raise _malformed(where, "an event log of another shape", f"1 to {LIMITS.events} events")
    events = []
    for entry in value:
        match entry:
            case [int(register), str(name), bytes(digest), bytes(payload)] if (
                not isinstance(register, bool) and 0 <= register <= 23 and 0 < len(name) <= LIMITS.event_name
                and name.isascii() and name.isprintable() and len(digest) == 48 and len(payload) <= LIMITS.event_data
            ):  # fmt: skip
                events.append(Event(register, name, digest, payload))
            case _:
                raise _malformed(where, "an event of another shape", "[register, name, digest, data]")
    return tuple(events)


def _cbor(data: bytes, where: str, wanted: str) -> Any:
    """Return the one value in `data`, in its shortest form; the order of keys is the sender's, as the standard has it."""
    try:
        value = cose.loads(data, limit=LIMITS.quote + MAX_CLAIMS + 16)
        shortest = cose.dumps(value)
    except cose.FormError as error:
        raise _malformed(where, error.found, wanted) from error
    if shortest != data:
        raise _malformed(where, "a length or number that is not in its shortest form", wanted)
    return value


# header 48: u16 version, u16 key type, u32 TEE type in v4 and v5; Intel SGX and TDX DCAP quoting library API, appendix A
_SGX_BODY: Final = 48
_SGX_REPORT_DATA: Final = _SGX_BODY + 320
_TDX: Final = {4: 48, 5: 54}  # version -> where the TD report begins
_TDX_REPORT_DATA: Final = 520
_TDX_BODIES: Final = {2: 584, 3: 648}  # v5 body type -> size
_TEE_TDX: Final = 0x81


def _quote(quote: bytes) -> tuple[str, bytes]:
    """Return the kind of `quote` and its REPORT_DATA; its verifier parses it again, completely."""
    where = "ratls.6-quote"
    if not 436 <= len(quote) <= LIMITS.quote:
        raise _malformed(where, f"{len(quote)} bytes", f"a quote of 436 to {LIMITS.quote} bytes")
    version, tee = int.from_bytes(quote[:2], "little"), int.from_bytes(quote[4:8], "little")
    if version == 3:
        kind, at, end = "sgx", _SGX_REPORT_DATA, _SGX_BODY + 384
    elif version == 4 and tee == _TEE_TDX:
        kind, at, end = "tdx", _TDX[4] + _TDX_REPORT_DATA, _TDX[4] + 584
    elif version == 5 and tee == _TEE_TDX and int.from_bytes(quote[48:50], "little") in _TDX_BODIES:
        size = _TDX_BODIES[int.from_bytes(quote[48:50], "little")]
        kind, at, end = "tdx", _TDX[5] + _TDX_REPORT_DATA, _TDX[5] + size
    else:
        raise _malformed(where, f"version {version}, TEE type {tee:#x}", "SGX v3, TDX v4 or TDX v5")
    signed = int.from_bytes(quote[end : end + 4], "little")
    if len(quote) != end + 4 + signed:
        raise _malformed(where, f"{len(quote)} bytes", f"{end + 4 + signed} bytes, as the quote says")
    return kind, quote[at : at + 64]


def _malformed(where: str, found: str, wanted: str, hint: str = "") -> EvidenceError:
    return EvidenceError(
        "the RA-TLS certificate does not parse",
        code="evidence-malformed",
        reasons=[Reason(where, found, wanted, hint)],
    )


def _no(where: str, found: str, wanted: str, hint: str = "") -> EvidenceError:
    return EvidenceError(
        "the evidence does not speak about this certificate's key",
        code="evidence-not-authentic",
        reasons=[Reason(where, found, wanted, hint)],
    )
