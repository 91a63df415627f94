"""OCSP responses: who may answer, about what, for how long; and which attacks an answer must not help.

Responses are made by the soft NVIDIA authority, byte by byte; what reads them is another implementation.
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp as library
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from cloister.attestation.pki import certificate as pki
from cloister.attestation.pki import ocsp
from cloister.attestation.soft import nvidia as soft
from cloister.errors import EvidenceError
from tests.attestation.helpers import SHARED, refusal, value_or_malformed

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
ISSUED = NOW - timedelta(hours=1)
DAY = timedelta(hours=24)
WHERE = "x.3-revocation"

ISSUERS = soft.gpu().issuers
CHAIN = tuple(pki.from_der(each.certificate.public_bytes(Encoding.DER), where="x") for each in ISSUERS)
SUBJECT, ISSUER = ISSUERS[2], ISSUERS[3]
"""Provisioner and identity: the pair that most tests ask about, `CHAIN[2:4]`."""


def answer(data: bytes) -> ocsp.Response:
    return ocsp.from_der_response(data, where=WHERE)


def respond(**rest: object) -> ocsp.Response:
    return answer(soft.ocsp_response(SUBJECT, ISSUER, ISSUED, **rest))  # type: ignore[arg-type]


def check(*responses: ocsp.Response, stapled: tuple[ocsp.Response, ...] = (), now: datetime = NOW) -> datetime | None:
    return ocsp.check(CHAIN[2:4], responses, stapled=stapled, now=now, where=WHERE, max_age=DAY)


def refused(fault: str, *responses: ocsp.Response, **rest: object) -> EvidenceError:
    error = refusal(check, *responses, **rest)
    assert error.code == "evidence-not-authentic"
    assert [reason.where for reason in error.reasons] == [f"{WHERE}.{fault}"]
    return error


def test_a_good_answer_holds_until_its_end() -> None:
    for delegated in (True, False):
        assert check(respond(delegated=delegated)) == ISSUED + DAY
    whole = [soft.ocsp_response(a, b, ISSUED) for a, b in pairwise(ISSUERS)]
    assert ocsp.check(CHAIN, [answer(each) for each in whole], now=NOW, where=WHERE, max_age=DAY) == ISSUED + DAY


def test_a_chain_of_its_root_asks_nothing() -> None:
    assert ocsp.check(CHAIN[-1:], (), now=NOW, where=WHERE, max_age=DAY) is None


def test_a_time_without_zone_is_a_callers_mistake() -> None:
    with pytest.raises(ValueError, match="time zone"):
        check(respond(), now=datetime(2026, 11, 20))  # noqa: DTZ001


def test_every_certificate_needs_its_answer() -> None:
    some = [answer(soft.ocsp_response(ISSUERS[1], ISSUERS[2], ISSUED))]
    error = refusal(ocsp.check, CHAIN, some, now=NOW, where=WHERE, max_age=DAY, first=1)
    assert [reason.where for reason in error.reasons] == [f"{WHERE}.revocation"] * 2
    assert "no OCSP response" in error.reasons[0].found


@pytest.mark.parametrize(
    ("after", "good"),
    [
        (timedelta(seconds=-1), False),
        (timedelta(0), True),
        (DAY, True),
        (DAY + timedelta(seconds=1), False),
    ],
)
def test_the_window_has_exact_ends(after: timedelta, good: bool) -> None:
    if good:
        assert check(respond(), now=ISSUED + after) == ISSUED + DAY
    else:
        refused("revocation", respond(), now=ISSUED + after)


def test_a_long_life_does_not_make_an_old_answer_young() -> None:
    long = respond(lifetime=timedelta(days=365))
    assert check(long) is not None
    assert "older than" in refused("revocation", long, now=ISSUED + DAY + timedelta(seconds=1)).reasons[0].found


def test_replay_of_a_good_answer_after_its_end_hides_no_revocation() -> None:
    before, after = respond(), answer(soft.ocsp_response(SUBJECT, ISSUER, NOW, status="revoked"))
    later = NOW + DAY
    refused("revocation", before, now=later)
    refused("revoked", before, after, now=NOW)  # even while the old answer is still current


def test_unknown_is_not_good() -> None:
    assert "unknown" in refused("revocation", respond(status="unknown")).reasons[0].found


def test_a_revoked_certificate_stays_revoked_after_its_answer_ended() -> None:
    error = refused("revoked", respond(status="revoked"), now=ISSUED + timedelta(days=400))
    assert f"serial {SUBJECT.certificate.serial_number:x} is revoked" in error.reasons[0].found


def test_a_staple_cannot_hide_what_the_relying_party_knows() -> None:
    refused("revoked", respond(status="revoked"), stapled=(respond(),))
    refused("revocation", respond(status="unknown"), stapled=(respond(),))


def test_the_relying_party_cannot_overlook_a_stapled_revocation() -> None:
    refused("revoked", respond(), stapled=(respond(status="revoked"),))


def test_a_staple_fills_in_where_the_relying_partys_answer_is_old() -> None:
    old = answer(soft.ocsp_response(SUBJECT, ISSUER, NOW - timedelta(days=3)))
    refused("revocation", old)
    assert check(old, stapled=(respond(),)) == ISSUED + DAY


def test_an_answer_for_another_serial_says_nothing() -> None:
    other = soft.gpu("other").issuers
    foreign = answer(soft.ocsp_response(other[1], other[2], ISSUED))
    error = refusal(ocsp.check, CHAIN[1:3], [foreign], now=NOW, where=WHERE, max_age=DAY)
    assert "no OCSP response" in error.reasons[0].found


def test_an_answer_of_another_authority_with_the_same_names_says_nothing() -> None:
    """Same names, other keys: the hash of the issuer's key in the answer is not that of ours."""
    mallory = soft.gpu(label="mallory").issuers
    forged = soft.Issuer(SUBJECT.certificate, SUBJECT.key)
    error = refused("revocation", answer(soft.ocsp_response(forged, mallory[3], ISSUED)))
    assert "no OCSP response" in error.reasons[0].found


def test_a_responder_of_another_authority_may_not_answer() -> None:
    """About our certificate, signed by a responder that the certificate's issuer did not authorise."""
    mallory = soft.gpu(label="mallory").issuers[3]
    forged = answer(_built(SUBJECT, ISSUER, soft._responder(mallory)))
    assert "nobody signed" in refused("revocation", forged).reasons[0].found


def test_a_certificate_without_the_ocsp_purpose_may_not_answer() -> None:
    """Every certificate that the issuer signed has its signature; only responders have the purpose."""
    error = refused("revocation", answer(_built(SUBJECT, ISSUER, SUBJECT)))
    assert "nobody signed" in error.reasons[0].found


def test_a_certificate_may_not_answer_for_itself() -> None:
    device, vendor = ISSUERS[1], ISSUERS[2]
    data = answer(_built(device, vendor, device))
    error = refusal(ocsp.check, CHAIN[1:3], [data], now=NOW, where=WHERE, max_age=DAY)
    assert "nobody signed" in error.reasons[0].found


def test_a_responder_whose_certificate_ended_is_refused() -> None:
    responder = _responder_until(NOW - timedelta(minutes=1))
    error = refused("revocation", answer(_built(SUBJECT, ISSUER, responder)))
    assert "responder whose certificate ended" in error.reasons[0].found


def _built(subject: soft.Issuer, issuer: soft.Issuer, signer: soft.Issuer) -> bytes:
    """Return a response from the library's builder: another encoder than the soft authority's."""
    return (
        library.OCSPResponseBuilder()
        .add_response(
            subject.certificate,
            issuer.certificate,
            SHA256(),
            library.OCSPCertStatus.GOOD,
            ISSUED,
            ISSUED + DAY,
            None,
            None,
        )
        .responder_id(library.OCSPResponderEncoding.NAME, signer.certificate)
        .certificates([signer.certificate])
        .sign(signer.key, SHA256())
        .public_bytes(Encoding.DER)
    )


def _responder_until(end: datetime) -> soft.Issuer:
    key = soft.derive_key("responder with an end")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Cloister SOFT responder")]))
        .issuer_name(ISSUER.certificate.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(soft.FIRST)
        .not_valid_after(end)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.OCSP_SIGNING]), critical=False)
        .sign(ISSUER.key, SHA256())
    )
    return soft.Issuer(certificate, key)


def test_both_encoders_are_read_alike() -> None:
    built = answer(_built(SUBJECT, ISSUER, soft._responder(ISSUER)))
    ours = respond()
    assert check(built) == check(ours)
    assert (built.serial, built.status, built.this_update) == (ours.serial, ours.status, ours.this_update)


# --- form -------------------------------------------------------------------------------------------------------------

GOOD = soft.ocsp_response(SUBJECT, ISSUER, ISSUED)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x30",
        b"\x30\x03\x0a\x01\x03",  # tryLater, unsigned
        b"\x30\x83\xff\xff\xff",
        GOOD[:-1],
        GOOD + b"\x00",
        GOOD + GOOD,
        bytes(ocsp.LIMIT + 1),
    ],
)
def test_a_response_with_one_fault_is_malformed(data: bytes) -> None:
    error = refusal(answer, data)
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", f"{WHERE}.format")


def test_several_answers_in_one_response_are_malformed() -> None:
    two = (
        library.OCSPResponseBuilder()
        .add_response_by_hash(
            bytes(32), bytes(32), 1, SHA256(), library.OCSPCertStatus.GOOD, ISSUED, ISSUED + DAY, None, None
        )
        .responder_id(library.OCSPResponderEncoding.HASH, ISSUER.certificate)
        .sign(ISSUER.key, SHA256())
        .public_bytes(Encoding.DER)
    )
    one = answer(two)
    assert one.serial == 1
    body, single = one.der, _single(one.der)
    assert refusal(answer, body.replace(single, single + single)).code == "evidence-malformed"


def _single(data: bytes) -> bytes:
    at = data.index(bytes.fromhex("300d06096086480165030402010500"))  # AlgorithmIdentifier of SHA-256 in CertID
    start = data.rindex(b"\x30", 0, data.rindex(b"\x30", 0, at))
    return data[start : start + 2 + data[start + 1]]


def test_concatenated_responses_come_apart() -> None:
    other = soft.ocsp_response(ISSUERS[1], ISSUERS[2], ISSUED)
    assert [each.der for each in ocsp.from_concatenated(GOOD + other, where=WHERE)] == [GOOD, other]
    assert ocsp.from_concatenated(b"", where=WHERE) == ()


@pytest.mark.parametrize("data", [GOOD + b"\x00", b"\x00" + GOOD, GOOD[:-1], GOOD * (ocsp.MOST + 1), b"\x30\x84" * 3])
def test_concatenations_with_one_fault_are_malformed(data: bytes) -> None:
    assert refusal(ocsp.from_concatenated, data, where=WHERE).code == "evidence-malformed"


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_malformed(data: bytes) -> None:
    assert value_or_malformed(lambda: answer(data)) is None
    found = value_or_malformed(lambda: ocsp.from_concatenated(data, where=WHERE))
    assert not found


def test_no_flipped_bit_makes_an_answer_good_or_raises_anything_else() -> None:
    """What is outside of the signature (the responder's certificates' own framing) may change; the statement may not."""
    wanted = respond()
    for position in range(len(GOOD)):
        changed = bytearray(GOOD)
        changed[position] ^= 1 << (position % 8)
        response = value_or_malformed(lambda data=bytes(changed): answer(data))  # type: ignore[misc]
        if response is None:
            continue
        try:
            check(response)
        except EvidenceError as error:
            assert error.code == "evidence-not-authentic"  # noqa: PT017 - the other outcome is acceptance
        else:
            assert response.this_update == wanted.this_update
            assert response.next_update == wanted.next_update
            assert (response.serial, response.status) == (wanted.serial, "good")


@pytest.mark.parametrize("cut", range(0, len(GOOD), 37))
def test_truncation_is_malformed(cut: int) -> None:
    assert value_or_malformed(lambda: answer(GOOD[:cut])) is None


# --- real responses ---------------------------------------------------------------------------------------------------

FOLDER = SHARED / "vectors" / "attestation" / "nvidia"


@pytest.mark.skipif(not FOLDER.exists(), reason="third-party vectors are not beside the repository")
def test_real_responses_of_nvidia() -> None:
    chain = pki.from_pem((FOLDER / "h100-550.90.07-chain.pem").read_bytes(), where="x")
    responses = [answer(base64.b64decode((FOLDER / f"ocsp-l{level}.b64").read_text())) for level in (2, 3, 4)]
    at = datetime(2025, 8, 21, 12, tzinfo=UTC)
    until = ocsp.check(chain, responses, now=at, where=WHERE, max_age=DAY, first=1)
    assert until == datetime(2025, 8, 22, 6, 47, 7, tzinfo=UTC)
    # nobody answers for the certificate that the GPU made itself
    error = refusal(ocsp.check, chain, responses, now=at, where=WHERE, max_age=DAY)
    assert len(error.reasons) == 1
    error = refusal(ocsp.check, chain, responses, now=at + DAY, where=WHERE, max_age=DAY, first=1)
    assert len(error.reasons) == 3
    other = pki.from_pem((FOLDER / "gb100-575.32-chain.pem").read_bytes(), where="x")
    error = refusal(ocsp.check, other, responses, now=at, where=WHERE, max_age=DAY, first=1)
    assert all("no OCSP response" in reason.found for reason in error.reasons)
