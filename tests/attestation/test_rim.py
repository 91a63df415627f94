"""Reference manifests: what is signed is what is read, whatever the document around it looks like.

Soft manifests are written and signed byte by byte in `soft.nvidia`; signxml, which verifies them, is another implementation.
"""

from __future__ import annotations

import base64
import builtins
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attestation.nvidia import rim
from cloister.attestation.nvidia.roots import PINS, RIM_PINS, RIM_ROOT_CA
from cloister.attestation.roots import Roots
from cloister.attestation.soft import nvidia as soft
from cloister.errors import EvidenceError
from tests.attestation.helpers import SHARED, refusal

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
WHERE = "nvidia-gpu.7-rim"
SOFT = Roots(soft=True)
GOOD = soft.driver_rim()


def read(data: bytes | str) -> rim.Rim:
    return rim.read(data.encode() if isinstance(data, str) else data, where=WHERE)


def check(data: bytes | str, *, roots: Roots = SOFT, now: datetime = NOW) -> tuple[str, datetime]:
    return rim.check(read(data), roots, now=now, where=WHERE)


def malformed(data: bytes | str) -> EvidenceError:
    error = refusal(read, data)
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", f"{WHERE}.format"), error
    return error


def unsigned(data: bytes | str) -> None:
    """The signature does not hold, so nothing is read as golden and `check` refuses."""
    found = read(data)
    assert found.unsigned
    assert dict(found.golden) == {}
    error = refusal(check, data)
    assert error.code == "evidence-not-authentic"
    assert f"{WHERE}.signature" in [reason.where for reason in error.reasons]


def changed(old: str, new: str, count: int = 1) -> str:
    text = GOOD.decode()
    assert old in text
    return text.replace(old, new, count)


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_a_good_manifest() -> None:
    found = read(GOOD)
    assert (found.product, found.version, found.unsigned) == ("GH100", soft.DRIVER, "")
    assert sorted(found.golden) == sorted(soft.DRIVER_INDEXES)
    assert found.golden[7] == {soft.golden("driver", soft.DRIVER, 7)}
    assert check(GOOD) == ("soft-nvidia-rim", soft.LAST)
    assert check(soft.vbios_rim(arch="LS10"))[0] == "soft-nvidia-rim"


def test_the_test_root_counts_only_when_it_is_named() -> None:
    error = refusal(check, GOOD, roots=Roots())
    assert [reason.where for reason in error.reasons] == [f"{WHERE}.chain.root"]
    assert error.reasons[0].found == "the published test root"
    assert RIM_ROOT_CA in error.reasons[0].wanted


def test_a_foreign_root_is_refused() -> None:
    error = refusal(check, soft.driver_rim(label="mallory"))
    assert [reason.where for reason in error.reasons] == [f"{WHERE}.chain.root"]


def test_a_device_root_signs_no_manifest() -> None:
    """Two hierarchies: the device's root is not among the manifests' roots."""
    text = changed(_certificate(soft.authority().rim_root), _certificate(soft.authority().root))
    error = refusal(check, text)
    assert f"{WHERE}.chain.root" in [reason.where for reason in error.reasons]
    assert RIM_PINS.soft.isdisjoint(PINS.soft)
    assert RIM_PINS.vendor.isdisjoint(PINS.vendor)


def test_the_certificates_have_their_time() -> None:
    for now, fault in (
        (soft.FIRST - timedelta(seconds=1), "future"),
        (soft.LAST + timedelta(seconds=1), "expired"),
    ):
        error = refusal(check, GOOD, now=now)
        assert {reason.where for reason in error.reasons} == {f"{WHERE}.chain.{fault}"}
    with pytest.raises(ValueError, match="time zone"):
        check(GOOD, now=datetime(2026, 11, 20))  # noqa: DTZ001


def test_a_manifest_is_parsed_once() -> None:
    assert read(GOOD) is read(bytes(bytearray(GOOD)))


def test_alternatives_are_all_accepted_and_inactive_measurements_are_none() -> None:
    one, other = soft.golden("driver", soft.DRIVER, 7).hex(), "ab" * 48
    canonical = re.sub(r"<ds:Signature .*</ds:Signature>", "", GOOD.decode())
    canonical = canonical.replace(f'SHA384:Hash0="{one}"', f'SHA384:Hash0="{one}" SHA384:Hash1="{other}"')
    canonical = canonical.replace(
        'active="True" alternatives="1" index="7"', 'active="True" alternatives="2" index="7"'
    )
    found = read(_sign(canonical))
    assert found.unsigned == ""
    assert found.golden[7] == {bytes.fromhex(one), bytes.fromhex(other)}
    assert 0 not in found.golden


def _sign(canonical: str) -> str:
    return canonical.replace("</SoftwareIdentity>", f"{soft.xml_signature(canonical.encode())}</SoftwareIdentity>")


def _der(issuer: soft.Issuer) -> bytes:
    return issuer.certificate.public_bytes(Encoding.DER)


def _certificate(issuer: soft.Issuer) -> str:
    return base64.b64encode(_der(issuer)).decode()


# --- changed content --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('active="True"', 'active="False"'),
        ('alternatives="1"', 'alternatives="0"'),
        (soft.golden("driver", soft.DRIVER, 7).hex(), "ab" * 48),
        (f'colloquialVersion="{soft.DRIVER}"', 'colloquialVersion="999.99.99"'),
        ('product="GH100"', 'product="GB100"'),
        ("<Payload>", '<Payload><Resource type="Measurement"></Resource>'),
        ("</Payload>", "</Payload><Payload></Payload>"),
    ],
)
def test_edited_content_is_not_signed(old: str, new: str) -> None:
    unsigned(changed(old, new))


def test_the_signature_of_one_manifest_does_not_fit_another() -> None:
    """RIM rollback: the newest manifest's signature under an older manifest's content."""
    signature = re.search(r"<ds:Signature .*</ds:Signature>", GOOD.decode())
    assert signature is not None
    old = soft.driver_rim("999.09.99").decode()
    unsigned(re.sub(r"<ds:Signature .*</ds:Signature>", lambda _: signature[0], old))


def test_a_certificate_of_somebody_else_in_front_is_refused() -> None:
    """The document is signed by its first certificate, which leads nowhere."""
    mallory = soft.driver_rim(label="mallory").decode()
    theirs = re.search(r"<ds:X509Certificate>[^<]*</ds:X509Certificate>", mallory)
    ours = re.findall(r"<ds:X509Certificate>[^<]*</ds:X509Certificate>", GOOD.decode())
    assert theirs is not None
    forged = re.sub(r"(?<=<ds:X509Data>).*(?=</ds:X509Data>)", lambda _: theirs[0] + "".join(ours), mallory)
    assert read(forged).unsigned == ""
    error = refusal(check, forged)
    assert {reason.where for reason in error.reasons} >= {f"{WHERE}.chain.signature"}


def test_a_weaker_method_is_not_a_choice_of_the_document() -> None:
    method = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
    for other in (
        "http://www.w3.org/2001/04/xmldsig-more#hmac-sha384",
        "http://www.w3.org/2000/09/xmldsig#ecdsa-sha1",
        "http://www.w3.org/2001/04/xmldsig-more#rsa-sha384",
        "urn:none",
    ):
        unsigned(changed(method, other))
    unsigned(changed("http://www.w3.org/2001/04/xmldsig-more#sha384", "http://www.w3.org/2000/09/xmldsig#sha1"))


@pytest.mark.parametrize(
    "value",
    [
        "<ds:KeyName>theirs</ds:KeyName>",
        (
            '<ds:KeyValue><d:ECKeyValue xmlns:d="http://www.w3.org/2009/xmldsig11#"><d:NamedCurve URI="urn:oid:1.3.132.0.34"/>'
            "<d:PublicKey>BAAA</d:PublicKey></d:ECKeyValue></ds:KeyValue>"
        ),
        # a curve that signxml does not know: a KeyError of its own
        (
            '<ds:KeyValue><d:ECKeyValue xmlns:d="http://www.w3.org/2009/xmldsig11#"><d:NamedCurve URI="urn:oid:9.9"/>'
            "<d:PublicKey>BAAA</d:PublicKey></d:ECKeyValue></ds:KeyValue>"
        ),
        '<d:DEREncodedKeyValue xmlns:d="http://www.w3.org/2009/xmldsig11#"/>',
    ],
)
def test_another_form_of_key_in_key_info_is_refused(value: str) -> None:
    """KeyInfo is not signed: whoever carries a genuine manifest can write there."""
    malformed(changed("</ds:X509Data>", f"</ds:X509Data>{value}"))
    malformed(changed("<ds:KeyInfo>", f"<ds:KeyInfo>{value}"))


# --- XML signature wrapping -------------------------------------------------------------------------------------------

SIGNATURE = GOOD.decode()[GOOD.index(b"<ds:Signature ") : -len("</SoftwareIdentity>")]
EVIL = re.sub(r"<ds:Signature .*</ds:Signature>", "", soft.driver_rim("999.99.99").decode())
"""A manifest that nobody signed, for a driver that the attacker would like to be accepted."""


def _evil(inner: str) -> str:
    return EVIL.replace("</SoftwareIdentity>", f"{inner}</SoftwareIdentity>")


@pytest.mark.parametrize(
    "document",
    [
        _evil(GOOD.decode()),  # the signed one as a child of the unsigned one
        _evil(f"<Meta>{GOOD.decode()}</Meta>"),
        _evil(SIGNATURE + SIGNATURE),
        _evil(f"<Payload>{SIGNATURE}</Payload>"),
        _evil(SIGNATURE.replace('URI=""', 'URI="#signed"') + GOOD.decode().replace("<Soft", '<Soft Id="signed"', 1)),
        changed('URI=""', 'URI="#xpointer(/)"'),
        changed('URI=""', ""),
        changed('URI=""', 'URI="http://example.org/rim.xml"'),
        changed('URI=""', 'URI="file:///etc/passwd"'),
        changed("</ds:SignedInfo>", '<ds:Reference URI=""></ds:Reference></ds:SignedInfo>'),
        changed(f'<ds:Transform Algorithm="{rim.ENVELOPED}"></ds:Transform>', ""),
        changed(rim.ENVELOPED, "http://www.w3.org/TR/1999/REC-xpath-19991116"),
        changed(rim.ENVELOPED, "http://www.w3.org/TR/1999/REC-xslt-19991116"),
        changed(rim.ENVELOPED, "http://www.w3.org/2000/09/xmldsig#base64"),
        GOOD.decode().replace("SoftwareIdentity", "Envelope"),
        GOOD.decode().replace(rim.SWID, "urn:other"),
        re.sub(r"<ds:Signature .*</ds:Signature>", "", GOOD.decode()),
        changed("<ds:X509Data>", "<ds:X509Data>" + "<ds:X509Certificate></ds:X509Certificate>" * 8),
        re.sub(r"<ds:X509Data>.*</ds:X509Data>", "", GOOD.decode()),
    ],
)
def test_signature_wrapping_is_malformed(document: str) -> None:
    malformed(document)


def test_a_wrapped_document_never_gives_golden_values_of_its_outside() -> None:
    """The signature stands where it should, over the whole document, and the document is another: nothing is signed."""
    unsigned(_evil(SIGNATURE))


def test_comments_and_processing_instructions_cannot_split_what_is_read() -> None:
    """Canonical XML drops comments, so they may stand there; what is read is what is left."""
    text = changed("<Payload>", "<Payload><!-- <Resource> -->")
    assert read(text).golden == read(GOOD).golden
    unsigned(changed("<Payload>", "<Payload><?php x ?>"))


# --- entities and other bombs -----------------------------------------------------------------------------------------

LAUGHS = '<!DOCTYPE SoftwareIdentity [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {chr(98 + level)} "{f"&{chr(97 + level)};" * 10}">' for level in range(10)
)


@pytest.mark.parametrize(
    "document",
    [
        f"{LAUGHS}]>" + changed("GH100", "&k;"),
        '<!DOCTYPE x SYSTEM "file:///etc/passwd">' + GOOD.decode(),
        '<!doctype x [<!entity y SYSTEM "http://example.org/">]>' + GOOD.decode(),
        f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>{changed("GH100", "&e;")}',
    ],
)
def test_entity_bombs_and_external_entities_are_malformed(document: str) -> None:
    assert "DTD" in malformed(document).reasons[0].wanted


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-7", "utf-32", "cp037"])
def test_another_encoding_hides_no_dtd(encoding: str) -> None:
    text = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE x [<!ENTITY e "v">]>{GOOD.decode()}'
    malformed(text.encode(encoding))


def test_a_declared_encoding_is_not_followed() -> None:
    """Otherwise UTF-7 text that is also UTF-8 could be a DTD for one reader only."""
    hidden = (
        '<?xml version="1.0" encoding="UTF-7"?>+ADwAIQ-DOCTYPE x +AFsAPAAh-ENTITY e +ACI-v+ACIAPgBdAD4-' + GOOD.decode()
    )
    malformed(hidden)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\xff\xfe<",
        b"<",
        b"<a/>",
        b"{}",
        GOOD[:-1],
        GOOD + GOOD,
        GOOD.replace(b"GH100", b"GH\x00100"),
        b"<a>" * 5000,
        b'<a b="' + b"x" * rim.LIMIT + b'"/>',
        bytes(rim.LIMIT + 1),
        b"<SoftwareIdentity xmlns='"
        + rim.SWID.encode()
        + b"'>"
        + b"<a>" * 3000
        + b"</a>" * 3000
        + b"</SoftwareIdentity>",
    ],
)
def test_what_is_no_manifest_is_malformed(data: bytes) -> None:
    malformed(data)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('index="7"', 'index="21"'),  # twice
        ('index="7"', 'index="-7"'),
        ('index="7"', 'index="256"'),
        ('index="7"', 'index="٧"'),
        ('index="7"', f'index="{"9" * 5000}"'),
        ('active="True"', 'active="true"'),
        (' active="True"', ""),
        ('alternatives="1"', 'alternatives="2"'),
        ('active="True" alternatives="1"', 'active="True" alternatives="0"'),
        ('alternatives="1"', 'alternatives="33"'),
        ('size="48"', 'size="47"'),
        ('size="48"', 'size="65"'),
        (soft.golden("driver", soft.DRIVER, 7).hex(), "zz" * 48),
        (soft.golden("driver", soft.DRIVER, 7).hex(), ""),
        ("</Payload>", "</Payload><Payload></Payload>"),
        ("<Meta ", "<Meta></Meta><Meta "),
        (f'colloquialVersion="{soft.DRIVER}"', ""),
        ('product="GH100"', f'product="{"G" * 65}"'),
        ('active="True"', 'active="False"'),  # of all: nothing left
    ],
)
def test_a_signed_manifest_with_one_fault_is_malformed(old: str, new: str) -> None:
    """Even the right signer cannot make a reader guess."""
    text = re.sub(r"<ds:Signature .*</ds:Signature>", "", GOOD.decode())
    assert old in text
    malformed(_sign(text.replace(old, new, -1 if new == 'active="False"' else 1)))


@pytest.mark.slow
def test_no_flipped_bit_changes_what_is_read() -> None:
    """A flip is refused, or lies outside of what is signed and is judged with the chain, or changes nothing that is read."""
    wanted = read(GOOD)
    accepted = 0
    for position in range(0, len(GOOD), 23):
        data = bytearray(GOOD)
        data[position] ^= 1 << (position % 7)
        try:
            check(bytes(data))
        except EvidenceError as error:
            assert error.code in {"evidence-malformed", "evidence-not-authentic"}  # noqa: PT017 - acceptance is the other case
            continue
        found = read(bytes(data))
        accepted += 1
        assert (found.product, found.version, found.golden) == (wanted.product, wanted.version, wanted.golden)
    assert accepted < 10


@pytest.mark.parametrize("cut", range(0, len(GOOD), 997))
def test_truncation_is_malformed(cut: int) -> None:
    malformed(GOOD[:cut])


@settings(max_examples=60)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_malformed(data: bytes) -> None:
    malformed(data)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(GOOD) - 1), st.sampled_from([b"<", b">", b"&", b'"', b"</Payload>", b"<!--", b"]]>"])
        ),
        min_size=1,
        max_size=10,
    )
)
def test_mutated_markup_raises_nothing_foreign(changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(GOOD)
    for position, value in changes:
        data[position : position + len(value)] = value
    try:
        check(bytes(data))
    except EvidenceError as error:
        assert error.reasons  # noqa: PT017 - a refusal must always name its step
    else:
        assert read(bytes(data)).golden == read(GOOD).golden


# --- the extra --------------------------------------------------------------------------------------------------------


def test_without_the_extra_every_manifest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] in {"signxml", "lxml"}:
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    error = refusal(read, GOOD + b"\n")  # bytes that no cache has seen
    assert (error.code, error.reasons[0].where) == ("evidence-not-authentic", f"{WHERE}.format")
    assert "cloister[nvidia]" in error.reasons[0].hint


def test_neither_the_extra_nor_a_network_module_is_imported_before_a_manifest_is_read(tmp_path: Path) -> None:
    """signxml takes 0.2 s; and what it brings along must be no network client either."""
    script = (
        "import sys; from cloister.attestation.nvidia import verify; before = set(sys.modules);"
        "from cloister.attestation.nvidia import rim; from pathlib import Path;"
        "print('signxml' in before or 'lxml' in before);"
        "rim.read(Path(sys.argv[1]).read_bytes(), where='x');"
        "new = set(sys.modules) - before;"
        "print(sorted(n for n in new if n.split('.')[0] in "
        "{'socket', '_socket', 'ssl', '_ssl', 'http', 'requests', 'urllib3', 'asyncio'} or n == 'urllib.request'))"
    )
    path = Path(soft.__file__).parents[3]
    file = tmp_path / "rim.xml"
    file.write_bytes(GOOD)
    out = subprocess.run(
        [sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True, cwd=path, timeout=60
    )
    assert out.stdout.split("\n")[:2] == ["False", "[]"]


# --- real manifests ---------------------------------------------------------------------------------------------------

FOLDER = SHARED / "vectors" / "attestation" / "nvidia"


@pytest.mark.skipif(not FOLDER.exists(), reason="third-party vectors are not beside the repository")
@pytest.mark.parametrize(
    ("name", "at", "faults"),
    [
        ("rim-driver-GH100-550.90.07", "2025-11-01", set()),
        ("rim-vbios-1010_0200_882_96009F0001", "2025-11-01", set()),
        ("rim-vbios-1010_0200_882_96005E0001", "2025-06-01", set()),
        ("rim-vbios-1010_0200_882_96005E0001", "2025-11-01", {"chain.expired"}),
        ("rim-badsig", "2025-11-01", {"signature"}),
        ("rim-edited", "2025-11-01", {"signature"}),
        ("rim-expired", "2025-01-01", {"signature"}),
        ("rim-expired", "2025-11-01", {"signature", "chain.expired"}),
        ("rim-badroot", "2025-11-01", {"chain.root", "chain.issuer", "chain.signature"}),
    ],
)
def test_real_manifests(name: str, at: str, faults: set[str]) -> None:
    data = (FOLDER / f"{name}.xml").read_bytes()
    now = datetime.fromisoformat(at).replace(tzinfo=UTC)
    if not faults:
        assert check(data, roots=Roots(), now=now)[0] == "nvidia-rim"
        return
    error = refusal(check, data, roots=Roots(), now=now)
    assert {reason.where.removeprefix(f"{WHERE}.") for reason in error.reasons} == faults


@pytest.mark.skipif(not FOLDER.exists(), reason="third-party vectors are not beside the repository")
def test_golden_measurements_of_a_real_driver() -> None:
    found = read((FOLDER / "rim-driver-GH100-550.90.07.xml").read_bytes())
    assert (found.product, found.version, sorted(found.golden)) == ("GH100", "550.90.07", sorted(soft.DRIVER_INDEXES))
    assert max(len(values) for values in found.golden.values()) == 4
    found = read((FOLDER / "rim-vbios-1010_0200_882_96009F0001.xml").read_bytes())
    assert (found.version, sorted(found.golden)) == ("96.00.9F.00.01", sorted(soft.VBIOS_INDEXES))
