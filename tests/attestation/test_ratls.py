"""RA-TLS certificates: the vectors of Gramine's own library, every refusal, and real TLS 1.3 connections.

Attacks by name: evidence copied into another key's certificate, a relayed certificate without its key, a fallback to the older
form, an old answer to a new nonce, an event log that somebody changed.
"""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from cloister.attestation import ratls
from cloister.attestation.appraise import appraise
from cloister.attestation.edge.attester import SoftTdxAttester
from cloister.attestation.edge.collateral import soft_collateral
from cloister.attestation.edge.ratls import (
    Identity,
    client_context,
    make_identity,
    peer_certificate,
    server_context,
)
from cloister.attestation.events import WORKLOAD, event, workload_of
from cloister.attestation.roots import Roots
from cloister.attestation.soft import sgx as soft_sgx
from cloister.attestation.types import Evidence, Policy
from cloister.errors import EvidenceError, MachineError, PeerError
from cloister.testkit.softtee import workload
from tests.attestation.helpers import SHARED, refusal, value_or_malformed

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
SOFT = Roots(soft=True)
VECTORS = SHARED / "vectors" / "gramine-ratls"


def vectors() -> list[dict[str, Any]]:
    manifest = VECTORS / "manifest.json"
    return json.loads(manifest.read_text()) if manifest.exists() else []


def spki(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def certificate(
    key: Any,
    *extensions: tuple[str, bytes],
    critical: bool = False,
    signer: Any = None,
) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 7, NOW - timedelta(days=1), NOW + timedelta(days=1))
    for oid, value in extensions:
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical)
    return builder.sign(signer or key, SHA256()).public_bytes(Encoding.DER)


@lru_cache(maxsize=1)
def own_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def attester(measured: bool = True) -> SoftTdxAttester:
    made = SoftTdxAttester(b"\x11" * 48)
    if measured:
        made.extend(WORKLOAD, workload().encode())
    return made


@lru_cache(maxsize=1)
def identity() -> Identity:
    return make_identity(attester(), now=NOW)


def quoted(claims: bytes, *, tail: bytes = bytes(32)) -> bytes:
    """A genuine soft quote over `claims`."""
    return attester(measured=False).evidence(ratls.report_data(claims)[:32] + tail).quote


def own(claims: bytes, quote: bytes | None = None, **rest: Any) -> bytes:
    value = ratls.evidence_extension(quoted(claims) if quote is None else quote, claims)
    return certificate(own_key(), (ratls.OID, value), **rest)


def code_of(error: EvidenceError) -> str:
    """`ratls.8-pubkey-hash` -> `pubkey-hash`."""
    return error.reasons[0].where.partition("-")[2]


# --- Gramine's certificates -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not vectors(), reason="the RA-TLS vectors are not beside this repository")
@pytest.mark.parametrize("entry", vectors(), ids=lambda entry: str(entry["name"]))
def test_vectors(entry: dict[str, Any]) -> None:
    der = (VECTORS / entry["file"]).read_bytes()
    expect = entry["expect"]
    if expect["binding"] != "ok":  # `either` is refused here too: a length that disagrees, a critical extension
        assert code_of(refusal(ratls.check, der)) == expect["reason"]
        return
    found = ratls.check(der)
    assert found.form == expect["form"]
    assert found.kind == "sgx"
    assert sgx_policy(found.quote, entry["policy"]) == expect["policy"]
    # the quote's signature is zeros, and the complete verifier says so, whatever the binding says
    refusal(ratls.verify, der, soft_collateral(NOW), SOFT, now=found.certificate.not_before)


def sgx_policy(quote: bytes, policy: dict[str, Any]) -> str:
    """What a relying party would say about the body if the signature were genuine: the test double of the quote verifier."""
    body = quote[48:432]
    flags = int.from_bytes(body[48:56], "little")
    if flags & 2 and not policy["debug"]:
        return "debug"
    if flags & 0b101 != 0b101:  # INIT and MODE64BIT
        return "attributes"
    if policy["mrenclave"] and body[64:96].hex() != policy["mrenclave"]:
        return "mrenclave"
    return "ok"


@pytest.mark.skipif(not vectors(), reason="the RA-TLS vectors are not beside this repository")
@pytest.mark.parametrize("entry", [e for e in vectors() if e["made_by"] == "gramine-1.9"], ids=lambda e: str(e["name"]))
def test_our_extension_is_gramines_byte_for_byte(entry: dict[str, Any]) -> None:
    found = ratls.parse((VECTORS / entry["file"]).read_bytes())
    assert ratls.claims(found.certificate.spki) == found.claims
    assert ratls.report_data(found.claims) == found.report_data
    assert ratls.evidence_extension(found.quote, found.claims) == found.certificate.extensions[ratls.OID]


# --- ours -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", ["P-256", "P-384"])
def test_a_made_certificate_verifies_and_appraises(curve: Any) -> None:
    made = make_identity(attester(), now=NOW, curve=curve, nonce=b"\x05" * 32)
    claims = ratls.verify(made.certificate, soft_collateral(NOW), SOFT, now=NOW, nonce=b"\x05" * 32)
    assert claims.tee == "soft-tdx"
    assert claims.measurements["mrtd"] == b"\x11" * 48
    assert workload_of(claims) == workload()
    assert claims.valid_until is not None
    assert claims.valid_until <= NOW + timedelta(hours=24)
    accepts = Policy("place.enclave", "tee", accept=frozenset({"simulated"}))
    assert appraise(claims, accepts) == ()
    assert [reason.where for reason in appraise(claims, Policy("place.enclave", "tee", accept=frozenset({"tdx"})))] == [
        "place.enclave.accept"
    ]
    assert "PrivateKey" not in repr(made)


def test_the_claims_are_canonical_and_readable_by_another_implementation() -> None:
    made = ratls.claims(spki(own_key().public_key()), nonce=b"n", events=(event(WORKLOAD, workload().encode()),))
    value = cbor2.loads(made)
    assert set(value) == {"pubkey-hash", "nonce", "cloister.events"}
    assert cbor2.loads(value["pubkey-hash"])[0] == 1
    assert cbor2.loads(ratls.evidence_extension(b"q", made)) == cbor2.CBORTag(60000, (b"q", made))


def test_an_sgx_quote_as_gramine_has_it_in_both_forms() -> None:
    """Gramine's enclave with a genuine signature under the test root, through every step."""
    machine = soft_sgx.platform()
    own_spki = spki(own_key().public_key())
    claims = ratls.claims(own_spki)
    for oid, value in (
        (ratls.OID, ratls.evidence_extension(enclave(machine, ratls.report_data(claims)), claims)),
        (ratls.LEGACY_OIDS[0], enclave(machine, ratls.report_data(own_spki))),
    ):
        found = ratls.verify(certificate(own_key(), (oid, value)), soft_collateral(NOW), SOFT, now=NOW)
        assert found.tee == "soft-sgx"
        assert found.measurements["mrenclave"] == b"\x22" * 32


def enclave(machine: soft_sgx.Platform, data: bytes) -> bytes:
    return soft_sgx.quote(machine, mrenclave=b"\x22" * 32, report_data=data)


def test_without_collateral_or_roots_nothing_is_believed() -> None:
    der = identity().certificate
    assert refusal(ratls.verify, der, soft_collateral(NOW), Roots(), now=NOW).reasons[0].where.endswith("-root")
    refusal(ratls.verify, der, soft_collateral(NOW - timedelta(days=60)), SOFT, now=NOW)  # stale collateral
    with pytest.raises(ValueError, match="time zone"):
        ratls.verify(der, soft_collateral(NOW), SOFT, now=NOW.replace(tzinfo=None))
    with pytest.raises(ValueError, match="time zone"):
        make_identity(attester(), now=NOW.replace(tzinfo=None))


def test_sizes_are_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="nonce"):
        ratls.claims(b"spki", nonce=b"")
    with pytest.raises(ValueError, match="larger"):
        ratls.evidence_extension(bytes(70_000), b"c")


# --- attacks ----------------------------------------------------------------------------------------------------------


def test_evidence_copied_into_another_keys_certificate_is_refused() -> None:
    stolen = ratls.parse(identity().certificate)
    value = ratls.evidence_extension(stolen.quote, stolen.claims)
    error = refusal(ratls.check, certificate(own_key(), (ratls.OID, value)))
    assert (error.code, code_of(error)) == ("evidence-not-authentic", "pubkey-hash")


def test_stolen_evidence_with_new_claims_is_refused() -> None:
    stolen = ratls.parse(identity().certificate)
    value = ratls.evidence_extension(stolen.quote, ratls.claims(spki(own_key().public_key())))
    assert code_of(refusal(ratls.check, certificate(own_key(), (ratls.OID, value)))) == "report-data"


def test_what_is_wrong_in_the_new_form_is_not_made_good_by_the_old_one() -> None:
    stolen = ratls.parse(identity().certificate)
    legacy = attester(measured=False).evidence(ratls.report_data(spki(own_key().public_key()))).quote
    assert ratls.check(certificate(own_key(), (ratls.LEGACY_OIDS[1], legacy))).form == "legacy"
    both = certificate(
        own_key(),
        (ratls.OID, ratls.evidence_extension(stolen.quote, stolen.claims)),
        (ratls.LEGACY_OIDS[1], legacy),
    )
    assert code_of(refusal(ratls.check, both)) == "pubkey-hash"


def test_an_old_certificate_does_not_answer_a_new_nonce() -> None:
    made = make_identity(attester(), now=NOW, nonce=b"old nonce")
    error = refusal(ratls.check, made.certificate, nonce=b"new nonce")
    assert (error.code, code_of(error)) == ("evidence-stale", "nonce")
    assert code_of(refusal(ratls.check, identity().certificate, nonce=b"any")) == "nonce"


def test_an_expired_certificate_is_refused_by_the_complete_check_only() -> None:
    later = NOW + timedelta(hours=25)
    assert ratls.check(identity().certificate).kind == "tdx"
    error = refusal(ratls.verify, identity().certificate, soft_collateral(later), SOFT, now=later)
    assert (error.code, code_of(error)) == ("evidence-stale", "dates")
    early = NOW - timedelta(hours=1)
    assert code_of(refusal(ratls.verify, identity().certificate, soft_collateral(early), SOFT, now=early)) == "dates"


def test_an_event_log_that_somebody_changed_is_refused() -> None:
    """The claims are hashed into the quote, and the log has to replay to the quote's register besides."""
    genuine = ratls.parse(identity().certificate)
    other = (event(WORKLOAD, workload(code="sha256:" + "22" * 32).encode()),)
    claims = ratls.claims(genuine.certificate.spki, events=other)
    assert code_of(refusal(ratls.check, own(claims, genuine.quote))) == "report-data"
    # an attester that claims another log than its register has: bound, and still refused by the quote's verifier
    made = attester()
    claims = ratls.claims(spki(own_key().public_key()), events=other)
    der = own(claims, made.evidence(ratls.report_data(claims)).quote)
    assert ratls.check(der).events == other
    error = refusal(ratls.verify, der, soft_collateral(NOW), SOFT, now=NOW)
    assert ".replay" in error.reasons[0].where
    # and a log that is left out explains nothing
    claims = ratls.claims(spki(own_key().public_key()))
    silent = own(claims, made.evidence(ratls.report_data(claims)).quote)
    assert ".replay" in refusal(ratls.verify, silent, soft_collateral(NOW), SOFT, now=NOW).reasons[0].where


# --- one fault each ---------------------------------------------------------------------------------------------------


def faults() -> dict[str, tuple[str, Callable[[], bytes]]]:
    def good() -> bytes:
        return ratls.claims(spki(own_key().public_key()))

    def entry(value: Any) -> bytes:
        return cbor2.dumps({"pubkey-hash": value})

    def extension(value: bytes) -> bytes:
        return certificate(own_key(), (ratls.OID, value))

    def report(tail: bytes) -> bytes:
        return own(good(), quoted(good(), tail=tail))

    other = ec.generate_private_key(ec.SECP256R1())
    rsa_key = rsa.generate_private_key(65537, 2048)
    return {
        "not a certificate": ("certificate.format", lambda: b"\x30\x03\x02\x01\x00"),
        "RSA": ("key-type", lambda: certificate(rsa_key, (ratls.OID, b""))),
        "no extension": ("no-evidence", lambda: certificate(own_key())),
        "critical": ("extension", lambda: own(good(), critical=True)),
        "two legacy spellings": (
            "extension",
            lambda: certificate(own_key(), *[(oid, b"") for oid in (ratls.OID, *ratls.LEGACY_OIDS)]),
        ),
        "empty extension": ("evidence", lambda: extension(b"")),
        "a TEE report": ("evidence", lambda: extension(cbor2.dumps(cbor2.CBORTag(60001, [b"r", b"c"])))),
        "no tag": ("evidence", lambda: extension(cbor2.dumps([b"q", b"c"]))),
        "three in the array": ("evidence", lambda: extension(cbor2.dumps(cbor2.CBORTag(60000, [b"q", b"c", b""])))),
        "text for a quote": ("evidence", lambda: extension(cbor2.dumps(cbor2.CBORTag(60000, ["q", b"c"])))),
        "trailing": ("evidence", lambda: extension(ratls.evidence_extension(quoted(good()), good()) + b"\x00")),
        "empty claims": ("claims", lambda: extension(ratls.evidence_extension(b"q", b""))),
        "claims that are a list": ("claims", lambda: own(cbor2.dumps([1]))),
        "a key that is no text": ("claims", lambda: own(cbor2.dumps({1: 2}))),
        "a long length": ("claims", lambda: own(b"\xb8\x01" + good()[1:])),
        "a long number": ("claims", lambda: own(entry(b"\x82\x18\x01\x58\x20" + bytes(32)))),
        "pubkey-hash as an array": ("claims", lambda: own(entry([1, bytes(32)]))),
        "pubkey-hash of three": ("claims", lambda: own(entry(cbor2.dumps([1, bytes(32), 0])))),
        "algorithm true": ("claims", lambda: own(entry(cbor2.dumps([True, bytes(32)])))),
        "algorithm 6": ("hash-algorithm", lambda: own(entry(cbor2.dumps([6, bytes(4)])))),
        "a short hash": ("hash-length", lambda: own(entry(cbor2.dumps([1, bytes(31)])))),
        "no pubkey-hash": ("no-pubkey-hash", lambda: own(cbor2.dumps({"nonce": b"n"}))),
        "a nonce of text": ("claims", lambda: own(good()[:0] + b"\xa2" + good()[1:] + b"\x65nonce\x61n")),
        "null for a nonce": ("claims", lambda: own(b"\xa2" + good()[1:] + b"\x65nonce\xf6")),
        "events of another shape": (
            "claims",
            lambda: own(b"\xa2" + good()[1:] + cbor2.dumps("cloister.events") + cbor2.dumps(cbor2.dumps([[3, "x"]]))),
        ),
        "quote too short": ("quote", lambda: own(good(), quoted(good())[:435])),
        "quote cut": ("quote", lambda: own(good(), quoted(good())[:-1])),
        "quote longer": ("quote", lambda: own(good(), quoted(good()) + b"\x00")),
        "quote v2": ("quote", lambda: own(good(), b"\x02" + quoted(good())[1:])),
        "report data tail": ("report-data-tail", lambda: report(b"\x01" + bytes(31))),
        "self-signature": ("self-signature", lambda: own(good(), signer=other)),
    }


@pytest.mark.parametrize("name", faults())
def test_one_fault(name: str) -> None:
    wanted, make = faults()[name]
    error = refusal(ratls.check, make())
    assert code_of(error) == wanted
    assert error.code in ("evidence-malformed", "evidence-not-authentic")


def test_every_byte_flip_in_the_extension_is_refused() -> None:
    """The quote's signed part, the claims and their frame: no flip is accepted as this key's evidence by the complete check.

    The rest of the quote (signature, certificates) is the quote verifier's and tested there.
    """
    der = identity().certificate
    found = ratls.parse(der)
    start = der.index(found.certificate.extensions[ratls.OID])
    signed = [
        *range(start, start + 8 + 632 + 8),
        *range(der.index(found.claims) - 4, der.index(found.claims) + len(found.claims)),
    ]
    for at in signed:
        changed = bytearray(der)
        changed[at] ^= 0x40
        refusal(ratls.verify, bytes(changed), soft_collateral(NOW), SOFT, now=NOW)


def test_every_truncation_is_malformed() -> None:
    value = ratls.parse(identity().certificate).certificate.extensions[ratls.OID]
    claims = ratls.parse(identity().certificate).claims
    for end in [*range(40), *range(len(value) - 80, len(value))]:
        error = refusal(ratls.check, certificate(own_key(), (ratls.OID, value[:end])))
        assert error.code == "evidence-malformed"
    for end in range(1, len(claims), 7):
        assert refusal(ratls.parse, own(claims[:end], b"q" * 436)).code == "evidence-malformed"


@given(st.binary(max_size=300))
def test_any_extension_is_malformed_or_refused_and_never_another_exception(value: bytes) -> None:
    for oid in (ratls.OID, ratls.LEGACY_OIDS[0]):
        value_or_malformed(lambda oid=oid: ratls.parse(certificate(own_key(), (oid, value))))  # type: ignore[misc]


@given(st.binary(max_size=200))
def test_any_claims_are_malformed_and_never_another_exception(value: bytes) -> None:
    quote = quoted(b"x")
    framed = cbor2.dumps(cbor2.CBORTag(60000, [quote, value]))
    value_or_malformed(lambda: ratls.parse(certificate(own_key(), (ratls.OID, framed))))


@given(st.binary(max_size=2000))
def test_any_bytes_for_a_certificate(data: bytes) -> None:
    value_or_malformed(lambda: ratls.parse(data))


# --- attesters that do not fit ----------------------------------------------------------------------------------------


class _Folding(SoftTdxAttester):
    """Binds its log in the report data, as hardware without a register does."""

    def evidence(self, report_data: bytes) -> Evidence:
        return super().evidence(b"\x01" * 64)


class _InParts(SoftTdxAttester):
    def evidence(self, report_data: bytes) -> Evidence:
        return replace(super().evidence(report_data), parts={"leaf": b"x"})


@pytest.mark.parametrize("kind", [_Folding, _InParts])
def test_evidence_that_is_not_one_quote_over_the_claims_makes_no_certificate(kind: type[SoftTdxAttester]) -> None:
    with pytest.raises(MachineError) as caught:
        make_identity(kind(b"\x11" * 48), now=NOW)
    assert caught.value.reasons


# --- real TLS ---------------------------------------------------------------------------------------------------------

REAL_NOW = datetime.now(UTC)  # OpenSSL looks at the clock of the machine


@lru_cache(maxsize=2)
def living(name: str) -> Identity:
    return make_identity(attester(), now=REAL_NOW, name=name, curve="P-256")


def connect(
    server: ssl.SSLContext,
    client: ssl.SSLContext,
    *,
    judge: Callable[[bytes], object] = lambda der: None,
    send: bytes = b"secret",
) -> tuple[list[Any], list[Any]]:
    """Run one connection; return what server and client saw: the peer's certificate, the bytes, or the exception."""
    left, right = socket.socketpair()
    server_saw: list[Any] = []
    client_saw: list[Any] = []

    def serve() -> None:
        try:
            with server.wrap_socket(left, server_side=True) as tls:
                server_saw.append(tls.getpeercert(binary_form=True))
                server_saw.append(tls.recv(100))
                tls.sendall(b"done")
        except OSError as error:
            server_saw.append(error)
        finally:
            left.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(right) as tls:
            client_saw.append(tls.version())
            judge(peer_certificate(tls))
            tls.sendall(send)
            client_saw.append(tls.recv(100))
    except (OSError, EvidenceError) as error:
        client_saw.append(error)
    finally:
        right.close()
        thread.join(10)
    return server_saw, client_saw


def judge(der: bytes) -> None:
    claims = ratls.verify(der, soft_collateral(REAL_NOW), SOFT, now=REAL_NOW)
    assert workload_of(claims) == workload()


def test_mutual_ra_tls_over_tls_1_3() -> None:
    server, client = living("server"), living("client")
    judge(client.certificate)  # the introduction: the server verifies the certificate before it admits it
    server_saw, client_saw = connect(
        server_context(server, peers=[client.certificate]), client_context(client), judge=judge
    )
    assert client_saw == ["TLSv1.3", b"done"]
    assert server_saw == [client.certificate, b"secret"]
    judge(server_saw[0])  # and again, at the time of the connection


def test_a_client_that_was_not_introduced_is_refused() -> None:
    server, client = living("server"), living("client")
    stranger = make_identity(attester(), now=REAL_NOW, curve="P-256")
    server_saw, _ = connect(server_context(server, peers=[client.certificate]), client_context(stranger))
    assert isinstance(server_saw[0], ssl.SSLError)
    server_saw, _ = connect(server_context(server, peers=[client.certificate]), client_context())
    assert isinstance(server_saw[0], ssl.SSLError)


def test_a_relay_without_the_key_cannot_finish_the_handshake() -> None:
    """The relay has the genuine server's certificate, which is public, and a key of its own."""
    genuine = living("server")
    relay = Identity(genuine.certificate, genuine.spki, ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ssl.SSLError, match="KEY_VALUES_MISMATCH"):
        server_context(relay)


def test_a_relay_with_its_own_certificate_gets_no_byte_of_the_secret() -> None:
    """It terminates TLS with its own key, and copies the genuine evidence into that certificate."""
    genuine = ratls.parse(living("server").certificate)
    key = ec.generate_private_key(ec.SECP256R1())
    value = ratls.evidence_extension(genuine.quote, genuine.claims)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "relay")])
    forged = (
        x509.CertificateBuilder(name, name, key.public_key(), 7, REAL_NOW - timedelta(1), REAL_NOW + timedelta(1))
        .add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(ratls.OID), value), critical=False)
        .sign(key, SHA256())
        .public_bytes(Encoding.DER)
    )
    server_saw, client_saw = connect(server_context(Identity(forged, b"", key)), client_context(), judge=judge)
    assert isinstance(client_saw[1], EvidenceError)
    assert code_of(client_saw[1]) == "pubkey-hash"
    assert b"secret" not in server_saw


def test_a_peer_without_a_certificate_is_named() -> None:
    class Nobody:
        def getpeercert(self, binary_form: bool) -> None:
            return None

    with pytest.raises(PeerError, match="no certificate"):
        peer_certificate(Nobody())  # type: ignore[arg-type]
