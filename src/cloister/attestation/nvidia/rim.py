"""NVIDIA's reference integrity manifests (RIM): which measurements a driver or a VBIOS must give.

A manifest is a SWID tag (ISO/IEC 19770-2:2015; TCG Reference Integrity Manifest Information Model 1.01) with an enveloped XML
signature (XML-DSig, W3C 2008; ECDSA P-384 with SHA-384). What is read of it:

    SoftwareIdentity/@name           GH100
    SoftwareIdentity/Meta            @product, @colloquialVersion: `550.90.07`, `96.00.9F.00.01`
    SoftwareIdentity/Payload/Resource
                                     @type="Measurement" @index (from 0) @active @size @alternatives, @Hash0 .. @HashN
    SoftwareIdentity/Signature/KeyInfo/X509Data/X509Certificate
                                     signer .. root, outside of what is signed: the chain authenticates itself

Rules of `read`, which does not know the time (`check` does):
  1 size       at most `LIMIT` bytes of UTF-8
  2 form       no DTD, so no entities; no network, no huge trees; the root is SoftwareIdentity
  3 one        exactly one Signature in the whole document, a child of the root, with exactly one Reference, to the whole
               document (URI=""), by the transforms enveloped-signature and Canonical XML 1.1 only; its KeyInfo, which nothing
               signs, holds certificates and no other form of a key
  4 signature  signxml verifies it with the first certificate's key; digests and signatures of SHA-384 or SHA-512
  5 only that  measurements are read from the bytes that signxml returns as signed, never from the document
An attacker who moves signed content into another place of a document (XML signature wrapping) fails at 3 and has nothing to gain
at 5. A manifest that breaks rule 4 is still returned, with `unsigned` set, so that its chain can be judged too; `check` refuses it.

`signxml` and `lxml` are the extra `nvidia`. Without them every manifest is refused: what cannot be checked is not accepted. They
are imported at the first manifest, because most brokers never see a GPU and signxml takes 0.2 s to import.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from cloister.attestation.form import FormError
from cloister.attestation.nvidia.roots import RIM_KIND, RIM_PINS
from cloister.attestation.pki.certificate import Certificate, from_der
from cloister.attestation.pki.path import check_path
from cloister.attestation.roots import Roots, choose
from cloister.errors import EvidenceError, Reason

LIMIT: Final = 256 * 1024
"""Largest manifest accepted, in bytes; real ones have 18 to 22 kB."""
CERTIFICATES: Final = 8
MEASUREMENTS: Final = 256
"""SPDM counts records in one byte."""
ALTERNATIVES: Final = 32

SWID: Final = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
DSIG: Final = "http://www.w3.org/2000/09/xmldsig#"
HASHES: Final = "http://www.w3.org/2001/04/xmlenc#sha384"
"""Namespace of the attributes `HashN`."""
ENVELOPED: Final = f"{DSIG}enveloped-signature"
C14N_11: Final = "http://www.w3.org/2006/12/xml-c14n11"


@dataclass(frozen=True, slots=True)
class Rim:
    """One manifest. Equal means: the same bytes."""

    data: bytes = field(repr=False)
    product: str = field(compare=False)
    """Chip, such as `GH100`."""
    version: str = field(compare=False)
    """Driver version, or VBIOS version in upper case."""
    golden: Mapping[int, frozenset[bytes]] = field(compare=False, repr=False)
    """Index from 0 -> accepted values, of the active measurements; empty where nothing was signed."""
    chain: tuple[Certificate, ...] = field(compare=False, repr=False)
    """Signer first, root last."""
    unsigned: str = field(compare=False, default="")
    """Why the signature does not hold; empty where it does."""


_Element = Any
"""`lxml.etree._Element`: lxml has no types, and is not imported here."""


def read(data: bytes, *, where: str) -> Rim:
    """Return the manifest in `data`, its signature checked under its own first certificate, which `check` has to judge.

    Raises:
        EvidenceError: `evidence-malformed`; or `evidence-not-authentic` without the extra `nvidia`.
    """
    # (1)
    if not 0 < len(data) <= LIMIT:
        raise _malformed(where, f"{len(data)} bytes", f"a manifest of at most {LIMIT} bytes")
    return _read(bytes(data), where)


def check(rim: Rim, roots: Roots, *, now: datetime, where: str) -> tuple[str, datetime]:
    """Prove that NVIDIA signed `rim` and that its chain holds at `now`.

    Returns: `nvidia-rim`, or `soft-nvidia-rim` under the test root, and when the chain ends.

    Raises:
        EvidenceError: `evidence-not-authentic` with all violations: `<where>.signature`, `<where>.chain.<fault>`.
        ValueError: `now` has no time zone.
    """
    reasons: list[Reason] = []
    kind, until = "", now
    if rim.unsigned:
        reasons.append(
            Reason(f"{where}.signature", rim.unsigned, "a manifest as its signer signed it", "the manifest was changed")
        )
    for step in ("root", "path"):
        try:
            if step == "root":
                kind = choose(RIM_KIND, rim.chain[-1].der, RIM_PINS, roots, where=f"{where}.chain.root")
            else:
                until = check_path(rim.chain, now=now, where=f"{where}.chain")
        except EvidenceError as error:
            reasons.extend(error.reasons)
    if reasons:
        raise EvidenceError(
            f"the reference manifest {rim.product} {rim.version} is not authentic",
            code="evidence-not-authentic",
            reasons=reasons,
        )
    return kind, until


@lru_cache(maxsize=64)
def _read(data: bytes, where: str) -> Rim:
    # a fact about bytes, whatever the time: a broker sees the same two manifests all day
    try:
        import signxml  # noqa: F401 - `_signed` needs it, and half of the extra is none
        from lxml import etree
    except ImportError as error:
        raise _missing(where) from error
    try:
        text = data.decode("utf-8")
        # (2) before any parser sees it, and again after
        if "\x00" in text or "<!doctype" in text.lower() or "<!entity" in text.lower():
            raise FormError("a document type or an entity", "a document without a DTD")
        # the encoding is given, so a declaration of another one cannot hide a DTD from the line above
        parser = etree.XMLParser(
            encoding="utf-8", resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False
        )
        root = etree.fromstring(data, parser=parser)
        if root.getroottree().docinfo.internalDTD is not None:
            raise FormError("a document type", "a document without a DTD")
        if root.tag != f"{{{SWID}}}SoftwareIdentity":
            raise FormError(f"root element {str(root.tag)[:120]}", "SoftwareIdentity of ISO/IEC 19770-2:2015")
        chain = _one_signature(root, where)
        # (4) (5)
        signed, fault = _signed(root, chain[0], etree)
        if signed is None:
            product, version = _meta(root)
            return Rim(data, product, version, MappingProxyType({}), chain, unsigned=fault)
        product, version = _meta(signed)
        return Rim(data, product, version, MappingProxyType(_golden(signed)), chain)
    except FormError as error:
        raise _malformed(where, error.found, error.wanted) from error
    except (UnicodeDecodeError, etree.LxmlError, ValueError) as error:
        raise _malformed(where, str(error)[:200], "a reference manifest in XML") from error


def _one_signature(root: _Element, where: str) -> tuple[Certificate, ...]:
    """Rule 3; return the certificates."""
    tag = f"{{{DSIG}}}Signature"
    everywhere = list(root.iter(tag))
    if len(everywhere) != 1 or everywhere[0].getparent() is not root:
        raise FormError(f"{len(everywhere)} signatures", "exactly one, a child of the root")
    (signature,) = everywhere
    references = list(signature.iter(f"{{{DSIG}}}Reference"))
    if len(references) != 1 or references[0].get("URI") != "":
        raise FormError(
            f"references {[each.get('URI') for each in references][:4]}", 'one reference to the whole document, URI=""'
        )
    transforms = [each.get("Algorithm") for each in signature.iter(f"{{{DSIG}}}Transform")]
    if transforms != [ENVELOPED, C14N_11]:
        raise FormError(f"transforms {transforms[:4]}", "enveloped-signature, then Canonical XML 1.1")
    # no signature covers KeyInfo, so anybody could put another form of the key there for signxml to read
    keys = [each.tag for info in signature.iter(f"{{{DSIG}}}KeyInfo") for each in info.iterdescendants(tag="*")]
    if not set(keys) <= {f"{{{DSIG}}}X509Data", f"{{{DSIG}}}X509Certificate"}:
        raise FormError(f"KeyInfo with {', '.join(sorted(set(keys)))[:200]}", "certificates and nothing else")
    encoded = signature.findall(f"{{{DSIG}}}KeyInfo/{{{DSIG}}}X509Data/{{{DSIG}}}X509Certificate")
    if not 0 < len(encoded) <= CERTIFICATES:
        raise FormError(f"{len(encoded)} certificates", f"1 to {CERTIFICATES}")
    found = []
    for each in encoded:
        try:
            der = base64.b64decode("".join((each.text or "").split()), validate=True)
        except ValueError as error:
            raise FormError("a certificate that is not base64", "X509Certificate") from error
        found.append(from_der(der, where=where))
    return tuple(found)


def _signed(root: _Element, signer: Certificate, etree: Any) -> tuple[_Element | None, str]:
    """Return the tree that `signer` signed, or None and why."""
    from signxml.algorithms import DigestAlgorithm, SignatureMethod
    from signxml.exceptions import SignXMLException
    from signxml.verifier import SignatureConfiguration, XMLVerifier

    expect = SignatureConfiguration(
        location="./",
        expect_references=1,
        signature_methods=frozenset({SignatureMethod.ECDSA_SHA384, SignatureMethod.ECDSA_SHA512}),
        digest_algorithms=frozenset({DigestAlgorithm.SHA384, DigestAlgorithm.SHA512}),
        # signxml would ask the clock; validity is `check`'s question, so the answer here must be yes whatever the time
        verification_time=signer.not_before,
    )
    try:
        certificate = x509.load_der_x509_certificate(signer.der)
        result: Any = XMLVerifier().verify(root, x509_cert=certificate, expect_config=expect)
    except (
        SignXMLException,
        etree.LxmlError,
        UnsupportedAlgorithm,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
    ) as error:
        # the last four: signxml's own reading of base64, of algorithms, of absent elements and of names of curves
        return None, (str(error) or type(error).__name__)[:200]
    signed = result.signed_xml
    if signed is None or signed.tag != root.tag:
        return None, "a signature over something else than the manifest"
    return signed, ""


def _meta(root: _Element) -> tuple[str, str]:
    metas = root.findall(f"{{{SWID}}}Meta")
    if len(metas) != 1:
        raise FormError(f"{len(metas)} elements Meta", "one")
    product, version = metas[0].get("product", ""), metas[0].get("colloquialVersion", "")
    for what, value in (("product", product), ("colloquialVersion", version)):
        if not 0 < len(value) <= 64 or not value.isascii() or not value.isprintable():
            raise FormError(f"{what} {value[:64]!r}", "1 to 64 printable ASCII characters")
    return product, version.upper()


def _golden(root: _Element) -> dict[int, frozenset[bytes]]:
    payloads = root.findall(f"{{{SWID}}}Payload")
    if len(payloads) != 1:
        raise FormError(f"{len(payloads)} elements Payload", "one")
    golden: dict[int, frozenset[bytes]] = {}
    seen: set[int] = set()
    for resource in payloads[0].findall(f"{{{SWID}}}Resource"):
        if resource.get("type") != "Measurement":
            continue
        index = _number(resource, "index", MEASUREMENTS - 1)
        if index in seen:
            raise FormError(f"measurement {index} twice", "each once")
        seen.add(index)
        active = resource.get("active", "")
        if active not in ("True", "False"):
            raise FormError(f"active={active[:16]!r}", "True or False")
        size, count = _number(resource, "size", 64), _number(resource, "alternatives", ALTERNATIVES)
        values = frozenset(_hash(resource, number, size) for number in range(count))
        if active == "True":
            if not values:
                raise FormError(f"measurement {index} without a value", "at least one")
            golden[index] = values
    if not golden:
        raise FormError("no active measurement", "at least one")
    return golden


def _number(resource: _Element, name: str, most: int) -> int:
    text = resource.get(name, "")
    if not text.isascii() or not text.isdigit() or len(text) > 4 or int(text) > most:
        raise FormError(f"{name}={text[:16]!r}", f"0 to {most}")
    return int(text)


def _hash(resource: _Element, number: int, size: int) -> bytes:
    text = resource.get(f"{{{HASHES}}}Hash{number}", "")
    try:
        value = bytes.fromhex(text)
    except ValueError as error:
        raise FormError(f"Hash{number}={text[:16]!r}", "hex") from error
    if len(value) != size:
        raise FormError(f"Hash{number} of {len(value)} bytes", f"{size}, as the attribute size says")
    return value


def _malformed(where: str, found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "the reference manifest does not parse",
        code="evidence-malformed",
        reasons=[Reason(f"{where}.format", found, wanted)],
    )


def _missing(where: str) -> EvidenceError:
    hint = "install the extra: pip install 'cloister[nvidia]'"
    return EvidenceError(
        "NVIDIA's reference manifests cannot be checked here",
        code="evidence-not-authentic",
        reasons=[Reason(f"{where}.format", "neither signxml nor lxml is installed", "the extra `nvidia`", hint)],
    )
