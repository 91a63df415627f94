"""Certificates, paths and revocation lists: one fault each, and the same rules without `cryptography`'s parser."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from asn1crypto import x509 as asn1_x509
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attestation.pki import asn1
from cloister.attestation.pki import certificate as certificates
from cloister.attestation.pki import crl as revocation
from cloister.attestation.pki.path import check_path, describe
from cloister.errors import EvidenceError

from .helpers import SHARED, refusal

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
DAY = timedelta(days=1)
KEYS = [ec.derive_private_key(1000 + index, ec.SECP384R1()) for index in range(8)]
CRITICAL_UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")


@dataclass
class Ca:
    """What one certificate says; a test changes one thing."""

    name: str
    key: Any
    issuer: str = ""
    issuer_key: Any = None
    serial: int = 7
    start: datetime = NOW - DAY
    end: datetime = NOW + DAY
    ca: bool = True
    length: int | None = None
    sign: bool = True
    hash: Any = field(default_factory=hashes.SHA384)
    extra: tuple[tuple[x509.ExtensionType, bool], ...] = ()
    pss: bool = False

    def make(self) -> certificates.Certificate:
        return certificates.from_der(self.der(), where="t.1-chain")

    def der(self) -> bytes:
        serial = self.serial or 5  # the builder makes no serial 0; `_serial_0` writes it afterwards
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(self.name))
            .issuer_name(_name(self.issuer or self.name))
            .public_key(self.key.public_key())
            .serial_number(serial)
            .not_valid_before(self.start)
            .not_valid_after(self.end)
            .add_extension(x509.BasicConstraints(self.ca, self.length if self.ca else None), critical=True)
        )
        if self.ca:
            usage = x509.KeyUsage(False, False, False, False, False, self.sign, True, False, False)
            builder = builder.add_extension(usage, critical=True)
        for extension, critical in self.extra:
            builder = builder.add_extension(extension, critical=critical)
        signer = self.issuer_key or self.key
        padding = PSS(MGF1(hashes.SHA384()), 48) if self.pss else None
        made = builder.sign(signer, self.hash, rsa_padding=padding)
        return made.public_bytes(Encoding.DER)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def chain(
    leaf: dict[str, Any] | None = None, middle: dict[str, Any] | None = None, root: dict[str, Any] | None = None
) -> list[Any]:
    mids: dict[str, Any] = {"issuer": "root", "issuer_key": KEYS[0]}
    ends: dict[str, Any] = {"issuer": "middle", "issuer_key": KEYS[1], "ca": False}
    top = Ca("root", KEYS[0], **(root or {}))
    mid = Ca("middle", KEYS[1], **(mids | (middle or {})))
    end = Ca("leaf", KEYS[2], **(ends | (leaf or {})))
    return [each.make() for each in (end, mid, top)]


def fault(found: list[Any], **rest: Any) -> set[str]:
    error = refusal(check_path, found, now=rest.pop("now", NOW), where="t.1-chain", **rest)
    assert error.code == "evidence-not-authentic"
    return {reason.where for reason in error.reasons}


def test_a_good_chain_holds_and_says_until_when() -> None:
    good = chain(leaf={"end": NOW + timedelta(hours=1)})
    assert check_path(good, now=NOW, where="t") == NOW + timedelta(hours=1)
    assert check_path(good[2:], now=NOW, where="t") == NOW + DAY
    assert [text.split(",")[0] for text in describe(good)] == ["CN=leaf", "CN=middle", "CN=root"]


@pytest.mark.parametrize(
    ("part", "change", "where"),
    [
        ("leaf", {"end": NOW - timedelta(seconds=1)}, "expired"),
        ("middle", {"end": NOW - timedelta(seconds=1)}, "expired"),
        ("root", {"end": NOW - timedelta(seconds=1)}, "expired"),
        ("leaf", {"start": NOW + timedelta(seconds=1)}, "future"),
        ("root", {"start": NOW + timedelta(seconds=1)}, "future"),
        ("leaf", {"issuer": "other"}, "issuer"),
        ("root", {"issuer": "other"}, "issuer"),
        ("middle", {"ca": False}, "authority"),
        ("middle", {"sign": False}, "authority"),
        ("root", {"length": 0}, "authority"),
        ("leaf", {"issuer_key": KEYS[3]}, "signature"),
        ("middle", {"issuer_key": KEYS[3]}, "signature"),
        ("root", {"issuer_key": KEYS[3]}, "signature"),
        ("leaf", {"extra": ((CRITICAL_UNKNOWN, True),)}, "format"),
    ],
)
def test_one_fault_in_a_chain(part: str, change: dict[str, Any], where: str) -> None:
    assert fault(chain(**{part: change})) == {f"t.1-chain.{where}"}


def test_faults_of_several_certificates_are_reported_together() -> None:
    late = {"end": NOW - DAY / 2}
    error = refusal(check_path, chain(leaf=late, middle=late, root={"issuer_key": KEYS[3]}), now=NOW, where="t")
    assert [reason.where for reason in error.reasons] == ["t.expired", "t.expired", "t.signature"]


def test_the_edges_of_validity_are_inside() -> None:
    good = chain()
    assert check_path(good, now=NOW - DAY, where="t")
    assert check_path(good, now=NOW + DAY, where="t")


def test_an_unknown_critical_extension_passes_where_a_caller_reads_it() -> None:
    found = chain(leaf={"extra": ((CRITICAL_UNKNOWN, True),)})
    assert check_path(found, now=NOW, where="t", understood=frozenset({"1.2.3.4"}))


def test_order_length_and_clock() -> None:
    assert "t.1-chain.signature" in fault(chain()[::-1])
    assert fault([]) == {"t.1-chain.format"}
    assert fault(chain()[:1] * 9) == {"t.1-chain.format"}
    with pytest.raises(ValueError, match="time zone"):
        check_path(chain(), now=datetime(2026, 1, 1), where="t")  # noqa: DTZ001 - the mistake that is tested


def test_a_chain_of_the_same_names_under_another_key_is_not_the_chain() -> None:
    """The attacker's CA copies every name."""
    forged = [
        Ca("leaf", KEYS[2], issuer="middle", issuer_key=KEYS[5], ca=False).make(),
        *chain()[1:],
    ]
    assert fault(forged) == {"t.1-chain.signature"}


@pytest.mark.parametrize("hash_", [hashes.SHA1(), hashes.SHA224()])
def test_weak_hashes_sign_nothing(hash_: hashes.HashAlgorithm) -> None:
    key = rsa_key()
    try:
        root = Ca("root", key, hash=hash_).make()
    except Exception:  # noqa: BLE001 - a library that no longer makes them
        pytest.skip("this OpenSSL signs nothing with it")
    assert fault([root]) == {"t.1-chain.signature"}


def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def test_rsa_pss_and_pkcs1_chains() -> None:
    key = rsa_key()
    for pss in (False, True):
        root = Ca("root", key, pss=pss, hash=hashes.SHA384()).make()
        assert check_path([root], now=NOW, where="t")


def test_a_key_that_no_vendor_uses_is_malformed() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    der = Ca("root", Ed25519PrivateKey.from_private_bytes(bytes(32)), hash=None).der()
    assert refusal(certificates.from_der, der, where="t").code == "evidence-malformed"


# Serial number 0 -----------------------------------------------------------------------------------------------


def _serial_0(key: Any, signer: Any) -> bytes:
    """A certificate with serial 0, as AMD's are; `cryptography` does not make one, so it is signed again."""
    made = asn1_x509.Certificate.load(Ca("leaf", key, issuer="middle", ca=False).der())
    made["tbs_certificate"]["serial_number"] = 0
    body = made["tbs_certificate"].dump(force=True)
    made["signature_value"] = signer.sign(body, ec.ECDSA(hashes.SHA384()))
    return bytes(made.dump(force=True))


def test_serial_0_is_read_the_same_when_the_library_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    der = _serial_0(KEYS[2], KEYS[1])
    _, issuer, other = chain()
    ordinary = Ca("root", KEYS[0]).der()
    usual = certificates.from_der(der, where="t")

    monkeypatch.setattr(certificates, "_load", _positive)
    plain = certificates.from_der(der, where="t")
    assert plain == usual
    for name in (
        "subject_der",
        "issuer_der",
        "serial",
        "not_before",
        "not_after",
        "spki",
        "authority",
        "path_length",
        "extensions",
        "critical",
    ):
        assert getattr(plain, name) == getattr(usual, name), name
    assert plain.verify_issued_by(issuer)
    assert not plain.verify_issued_by(other)
    assert certificates.from_der(ordinary, where="t").serial == 7


@pytest.mark.parametrize("name", ["vcek-trustee-milan.der", "vcek-google-milan.der", "vlek-trustee-aws.der"])
def test_real_serial_0_certificates_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = SHARED / "vectors" / "attestation" / "snp" / name
    if not path.exists():
        pytest.skip("no real certificates beside the repository")
    der = path.read_bytes()
    usual = certificates.from_der(der, where="t")
    pem = (path.parent / ("chain-milan_vlek.pem" if "vlek" in name else "chain-milan.pem")).read_bytes()
    issuers = certificates.from_pem(pem, where="t")
    monkeypatch.setattr(certificates, "_load", _positive)
    plain = certificates.from_der(der, where="t")
    assert (plain, plain.extensions, plain.spki) == (usual, usual.extensions, usual.spki)
    assert plain.verify_issued_by(issuers[0])
    assert not plain.verify_issued_by(issuers[1])


def _positive(data: bytes) -> x509.Certificate:
    found = x509.load_der_x509_certificate(data)
    if found.serial_number == 0:
        raise ValueError("serial number 0 is not allowed")
    return found


RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    "form", ["long length", "indefinite length", "a fourth element", "other parameters", "unused bits"]
)
def test_one_certificate_has_one_form(form: str, zero: bool) -> None:
    """What nobody signs around the signed part must not give the same certificate other bytes, with serial 0 as without."""
    der = _serial_0(KEYS[2], KEYS[1]) if zero else Ca("leaf", RSA, hash=hashes.SHA256()).der()
    made = asn1_x509.Certificate.load(der)
    body, algorithm, value = (
        made[each].dump() for each in ("tbs_certificate", "signature_algorithm", "signature_value")
    )
    if form == "other parameters":  # ECDSA has none to begin with
        change, rest = (2, algorithm[2:] + b"\x05\x00") if zero else (-2, algorithm[2:-2])
        algorithm = b"\x30" + bytes([algorithm[1] + change]) + rest
    if form == "unused bits":
        at = 2 + (value[1] & 0x7F if value[1] & 0x80 else 0)
        value = value[:at] + b"\x01" + value[at + 1 :]
    inner = body + algorithm + value + (b"\x05\x00" if form == "a fourth element" else b"")
    size = len(inner).to_bytes(2, "big")
    other = {
        "long length": b"\x30\x83\x00" + size + inner,
        "indefinite length": b"\x30\x80" + inner + b"\x00\x00",
    }.get(form, b"\x30\x82" + size + inner)
    assert certificates.from_der(der, where="t").serial == (0 if zero else 7)
    assert refusal(certificates.from_der, other, where="t").code == "evidence-malformed"


X400 = bytes.fromhex("3004a3020500")
"""GeneralNames with an x400Address: `cryptography` raises UnsupportedGeneralNameType for it, which is no ValueError."""


@pytest.mark.parametrize("oid", ["2.5.29.17", "2.5.29.18"])
def test_a_name_that_the_library_does_not_support_is_malformed(oid: str) -> None:
    extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), X400)
    der = Ca("leaf", KEYS[0], extra=((extension, False),)).der()
    assert refusal(certificates.from_der, der, where="t").code == "evidence-malformed"
    if oid == "2.5.29.18":  # lists have it too
        assert refusal(crl, extra=extension).code == "evidence-malformed"


def test_a_name_of_an_odd_type_is_left_out() -> None:
    odd = bytes.fromhex("3110300e06035504030707") + b"leafing"  # commonName as ObjectDescriptor
    assert asn1.name(b"\x30" + bytes([len(odd)]) + odd) == ()


# Bytes ---------------------------------------------------------------------------------------------------------


def test_bytes_that_are_no_certificate() -> None:
    good = Ca("root", KEYS[0]).der()
    for data in (b"", b"0", good[:-1], good + b"\0", bytes(64), b"0\x84\xff\xff\xff\xff", good * 40):
        assert refusal(certificates.from_der, data, where="t").code == "evidence-malformed"
    for text in (
        b"",
        b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----",
        b"x" * (certificates.PEM_LIMIT + 1),
    ):
        assert refusal(certificates.from_pem, text, where="t").code == "evidence-malformed"


GOOD = chain()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 400), st.integers(1, 255))
def test_a_changed_certificate_is_malformed_or_not_signed(place: int, change: int) -> None:
    changed = bytearray(GOOD[0].der)
    changed[place % len(changed)] ^= change

    def both() -> None:
        found = certificates.from_der(bytes(changed), where="t")
        check_path([found, *GOOD[1:]], now=NOW, where="t")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refusal(both).reasons


# Revocation ----------------------------------------------------------------------------------------------------


def crl(*serials: int, **change: Any) -> revocation.RevocationList:
    values: dict[str, Any] = {
        "issuer": "middle",
        "key": KEYS[1],
        "start": NOW - DAY,
        "end": NOW + DAY,
        "number": 3,
    } | change
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(_name(values["issuer"]))
        .last_update(values["start"])
        .next_update(values["end"])
        .add_extension(x509.CRLNumber(values["number"]), critical=False)
    )
    if values.get("extra"):
        builder = builder.add_extension(values["extra"], critical=False)
    if values.get("delta"):
        builder = builder.add_extension(x509.DeltaCRLIndicator(1), critical=True)
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW - DAY).build()
        builder = builder.add_revoked_certificate(entry)
    der = builder.sign(values["key"], hashes.SHA384()).public_bytes(Encoding.DER)
    return revocation.from_der(der, where="t.1-crl")


def test_a_revoked_certificate_is_refused_with_and_without_demanding_lists() -> None:
    assert fault(chain(), crls=[crl(7)]) == {"t.1-chain.revoked"}
    assert check_path(chain(), now=NOW, where="t", crls=[crl(8)])


def test_where_revocation_is_published_its_absence_refuses() -> None:
    top = crl(issuer="root", key=KEYS[0])
    assert check_path(chain(), now=NOW, where="t", crls=[crl(), top], revocation=True)
    assert fault(chain(), crls=[crl()], revocation=True) == {"t.1-chain.revocation"}
    assert fault(chain(), revocation=True) == {"t.1-chain.revocation"}


@pytest.mark.parametrize(
    "change",
    [
        {"end": NOW - timedelta(seconds=1)},
        {"start": NOW + timedelta(seconds=1)},
        {"key": KEYS[4]},
    ],
    ids=["expired", "future", "forged"],
)
def test_a_list_that_is_not_current_or_not_the_issuers_is_not_believed(change: dict[str, Any]) -> None:
    top = crl(issuer="root", key=KEYS[0])
    assert fault(chain(), crls=[crl(**change), top], revocation=True) == {"t.1-chain.revocation"}
    # and cannot revoke anything either: nobody stops a machine with a forged list
    assert check_path(chain(), now=NOW, where="t", crls=[crl(7, **change)])


def test_a_delta_list_says_less_than_it_seems() -> None:
    assert refusal(crl, 1, delta=True).code == "evidence-malformed"


def test_the_number_is_read_and_garbage_is_malformed() -> None:
    good = crl(1, 2, number=12)
    assert (good.number, good.serials) == (12, frozenset({1, 2}))
    for data in (b"", good.der[:-1], good.der + b"\0", bytes(100), b"0" * (revocation.LIMIT + 1)):
        assert refusal(revocation.from_der, data, where="t").code == "evidence-malformed"


LIST = crl(1, 2)
MIDDLE = chain()[1]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 400), st.integers(1, 255))
def test_a_changed_list_is_malformed_or_not_believed(place: int, change: int) -> None:
    changed = bytearray(LIST.der)
    changed[place % len(changed)] ^= change
    try:
        found = revocation.from_der(bytes(changed), where="t")
    except EvidenceError:
        return
    assert found.problem(MIDDLE, NOW) is not None
