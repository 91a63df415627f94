"""Soft NVIDIA devices: bit-exact reports, certificate chains, manifests and OCSP responses under test roots. They protect nothing.

Every key here is derived from a published label, so everybody can make the same evidence about any firmware. That is the point:
demonstrations, tests and CI walk the path of real evidence, through XML signatures and OCSP, and each fault can be made at will.
Whatever is emitted says so: subject names, the board's project (`SOFT`), manifests, TEE type (`soft-nvidia-gpu`).

Pure: keys come from labels, time is an argument, signatures are deterministic (RFC 6979), so equal arguments give equal bytes. The
hashes of the roots are the constants `nvidia.roots.SOFT_DEVICE_ROOT` and `SOFT_RIM_ROOT`.

    authority()        both roots, their authorities and the manifests' signer; once per process
    gpu(...)           one device: its chain of five certificates; once per device
    report(...)        one signature
    evidence(...)      the report with its chain, and stapled OCSP responses
    driver_rim(...), vbios_rim(...)
    endorsements(...)  manifests and OCSP responses for some devices; once a day

Formats: report as in nvidia/format.py, certificate extensions as in nvidia/device.py, manifest as in nvidia/rim.py, OCSP responses as
in RFC 6960, 4.2.1. Manifests are written in canonical form and signed here, without signxml, and OCSP responses without an ASN.1
library: what verifies them is another implementation.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.nvidia import device as nvidia_device
from cloister.attestation.nvidia import format as nvidia_format
from cloister.attestation.nvidia import rim as nvidia_rim
from cloister.attestation.nvidia.examine import KIND, SWITCH_PROJECT
from cloister.attestation.nvidia.format import Field
from cloister.attestation.types import Evidence

NOTICE: Final = "soft GPU: the test roots' private keys are public, so this protects nothing"
LABEL: Final = "cloister soft NVIDIA test roots 1: everybody knows these keys"
"""The published label. Another label gives roots that nobody pins: the case of a foreign root."""
FIRST: Final = datetime(2020, 1, 1, tzinfo=UTC)
LAST: Final = datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)
"""Validity of every certificate; the windows that matter are those of OCSP responses."""
LIFETIME: Final = timedelta(hours=24)
"""How long NVIDIA's OCSP responses are valid."""
DRIVER: Final = "999.10.07"
VBIOS: Final = "F5.0F.70.00.01"
"""No real device has them: manifests of soft devices have ids of their own."""
PROJECT: Final = ("SOFT", "0000", "000")
"""Project, project SKU, chip SKU."""

Arch = Literal["HOPPER", "BLACKWELL", "LS10"]
CHIPS: Final[dict[Arch, str]] = {"HOPPER": "GH100", "BLACKWELL": "GB100", "LS10": "LS_10"}
RECORDS: Final[dict[Arch, int]] = {"HOPPER": 64, "BLACKWELL": 64, "LS10": 31}
DRIVER_INDEXES: Final = (7, *range(21, 41))
VBIOS_INDEXES: Final = (*range(7), *range(8, 13))
"""Which measurements the manifests of H100 550.90.07 make golden: 21 of the driver, 12 of the VBIOS."""

_ORDER: Final = int(  # of P-384, NIST SP 800-186, 3.2.1.4
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16
)
_SIGN: Final = ec.ECDSA(SHA384(), deterministic_signing=True)
_SHA384_OID: Final = bytes.fromhex("0609608648016503040202")


def derive_key(label: str) -> ec.EllipticCurvePrivateKey:
    """Return the P-384 key of a published `label`. Nobody owns it."""
    seed = b"cloister/soft-nvidia/key/1\x00" + label.encode()
    digest = hashlib.sha512(b"0" + seed).digest() + hashlib.sha512(b"1" + seed).digest()
    return ec.derive_private_key(int.from_bytes(digest, "big") % (_ORDER - 1) + 1, ec.SECP384R1())


@dataclass(frozen=True, slots=True)
class Issuer:
    """A certificate with its public "private" key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class Authority:
    """What NVIDIA is for real evidence. Root last, as in the chains."""

    provisioner: Issuer
    identity: Issuer
    root: Issuer
    rim_signer: Issuer
    rim_l3: Issuer
    rim_ca: Issuer
    rim_root: Issuer

    @property
    def rim_chain(self) -> tuple[Issuer, ...]:
        return (self.rim_signer, self.rim_l3, self.rim_ca, self.rim_root)


@lru_cache(maxsize=4)
def authority(label: str = LABEL) -> Authority:
    """Return the test authority of `label`."""

    def under(name: str, issuer: Issuer | None, *, ca: bool = True) -> Issuer:
        key = derive_key(f"{label}/{name}")
        return Issuer(
            _certificate(f"Cloister SOFT {name} - protects nothing", key, issuer, f"{label}/{name}", ca=ca), key
        )

    root, rim_root = under("device root", None), under("RIM root", None)
    identity = under("identity", root)
    rim_ca = under("RIM CA", rim_root)
    rim_l3 = under("RIM L3", rim_ca)
    return Authority(
        provisioner=under("provisioner", identity),
        identity=identity,
        root=root,
        rim_signer=under("RIM signer", rim_l3, ca=False),
        rim_l3=rim_l3,
        rim_ca=rim_ca,
        rim_root=rim_root,
    )


@dataclass(frozen=True, slots=True)
class Gpu:
    """One soft device: what is the same in all of its reports."""

    arch: Arch
    label: str
    udid: str
    fwid: bytes
    leaf: Issuer
    device: Issuer

    @property
    def issuers(self) -> tuple[Issuer, ...]:
        """The chain, attestation key first, root last."""
        vendor = authority(self.label)
        return (self.leaf, self.device, vendor.provisioner, vendor.identity, vendor.root)

    @property
    def chain(self) -> bytes:
        """The chain as PEM."""
        return b"".join(each.certificate.public_bytes(Encoding.PEM) for each in self.issuers)


@lru_cache(maxsize=64)
def gpu(name: str = "soft", *, arch: Arch = "HOPPER", debug: bool = False, label: str = LABEL) -> Gpu:
    """Return the soft device `name`; `debug` sets the debug flag of its DICE extension, which Hopper does not have.

    Raises:
        ValueError: a debug flag for another architecture than Blackwell.
    """
    if debug and arch != "BLACKWELL":
        raise ValueError("only Blackwell certificates say that a device is in debug state")
    vendor = authority(label)
    chip = CHIPS[arch]
    udid = hashlib.sha256(f"{label}/{name}".encode()).hexdigest()[:16]
    device_key, leaf_key = (
        derive_key(f"{label}/{name}/{arch}/device"),
        derive_key(f"{label}/{name}/{arch}/{debug}/alias"),
    )
    fwid = hashlib.sha384(f"cloister soft GPU firmware of {arch} - protects nothing".encode()).digest()
    device = Issuer(
        _certificate(
            f"{chip} SOFT GSP BROM - protects nothing", device_key, vendor.provisioner, f"{label}/{name}/{arch}/device"
        ),
        device_key,
    )
    info = x509.OtherName(
        ObjectIdentifier("1.3.6.1.4.1.412.274.1"), _der(0x0C, f"NVIDIA:{chip}:{udid.upper()}".encode())
    )
    leaf = _certificate(
        f"{chip} SOFT GSP FMC LF - protects nothing",
        leaf_key,
        device,
        f"{label}/{name}/{arch}/{debug}/alias",
        ca=False,
        extensions=(x509.SubjectAlternativeName([info]), _fwid_extension(arch, leaf_key, fwid, debug=debug)),
    )
    return Gpu(arch, label, udid, fwid, Issuer(leaf, leaf_key), device)


def golden(what: str, version: str, index: int) -> bytes:
    """Return the golden value of measurement `index` for version `version` of `what` (`driver` or `vbios`), 48 bytes."""
    return hashlib.sha384(f"cloister soft {what} {version} measurement {index} - protects nothing".encode()).digest()


def report(
    device: Gpu,
    nonce: bytes,
    *,
    driver: str = DRIVER,
    vbios: str = VBIOS,
    drift: Mapping[int, bytes] = MappingProxyType({}),
    fwid: bytes | None = None,
    nvdec0_disabled: bool = True,
    ppcie: bool = False,
    feature_flag: int | None = 0,
    responder_nonce: bytes = bytes(32),
    signer: ec.EllipticCurvePrivateKey | None = None,
) -> bytes:
    """Return a report of `device` that answers `nonce` (32 bytes), with the golden measurements of both versions.

    `drift` replaces measurements by index from 0; `fwid` and `signer` replace what the device would say and sign with.

    Raises:
        ValueError: a nonce of another size.
    """
    if len(nonce) != 32 or len(responder_nonce) != 32:
        raise ValueError("nonces have 32 bytes")
    records = b""
    for index in range(RECORDS[device.arch]):
        what = "driver" if index in DRIVER_INDEXES and device.arch != "LS10" else "vbios"
        value = drift.get(index, golden(what, driver if what == "driver" else vbios, index))
        records += struct.pack("<BBHBH", index + 1, 1, len(value) + 3, 1, len(value)) + value
    fields = _fields(device, driver, vbios)
    if device.arch != "LS10":
        fields |= {
            Field.NVDEC0_STATUS: _status(not nvdec0_disabled),
            Field.FWID: device.fwid if fwid is None else fwid,
            Field.PROTECTED_PCIE_STATUS: _status(ppcie),
        }
        if feature_flag is not None:
            fields[Field.FEATURE_FLAG] = struct.pack("<H", feature_flag)
    opaque = b"".join(struct.pack("<HH", kind, len(value)) + value for kind, value in fields.items())
    signed = (
        bytes((nvidia_format.SPDM_11, nvidia_format.GET_MEASUREMENTS, nvidia_format.SIGNATURE_WANTED))
        + bytes((nvidia_format.ALL_MEASUREMENTS,))
        + nonce
        + b"\x00"
        + bytes((nvidia_format.SPDM_11, nvidia_format.MEASUREMENTS, 0, 0, RECORDS[device.arch]))
        + len(records).to_bytes(3, "little")
        + records
        + responder_nonce
        + struct.pack("<H", len(opaque))
        + opaque
    )
    return signed + _sign(device.leaf.key if signer is None else signer, signed)


def evidence(device: Gpu, nonce: bytes, *, ocsp_responses: bytes = b"", quote: bytes | None = None) -> Evidence:
    """Return the report of `device` for `nonce` with its chain and what it staples; `quote` replaces the report."""
    parts = {"chain": device.chain} | ({"ocsp": ocsp_responses} if ocsp_responses else {})
    return Evidence(KIND, report(device, nonce) if quote is None else quote, parts=MappingProxyType(parts))


def driver_rim(version: str = DRIVER, *, arch: Arch = "HOPPER", label: str = LABEL) -> bytes:
    """Return the signed manifest of a driver."""
    values = {index: golden("driver", version, index) for index in DRIVER_INDEXES}
    return _rim(CHIPS[arch], version, values, RECORDS[arch], label)


def vbios_rim(version: str = VBIOS, *, arch: Arch = "HOPPER", label: str = LABEL) -> bytes:
    """Return the signed manifest of a VBIOS."""
    indexes = VBIOS_INDEXES if arch != "LS10" else range(RECORDS[arch])
    values = {index: golden("vbios", version, index) for index in indexes}
    return _rim(CHIPS[arch], version, values, RECORDS[arch], label)


def rim_ids(arch: Arch = "HOPPER", *, driver: str = DRIVER, vbios: str = VBIOS) -> tuple[str, str]:
    """Return the ids of the manifests of driver (empty for a switch) and VBIOS."""
    version = vbios.replace(".", "")
    if arch == "LS10":
        return "", f"NV_SWITCH_BIOS_{SWITCH_PROJECT}_{version}"
    prefix = "NV_GPU_DRIVER_GH100" if arch == "HOPPER" else "NV_GPU_CC_DRIVER_GB100"
    return f"{prefix}_{driver}", f"NV_GPU_VBIOS_{'_'.join(PROJECT)}_{version}"


def ocsp_response(
    subject: Issuer,
    issuer: Issuer,
    issued: datetime,
    *,
    status: Literal["good", "revoked", "unknown"] = "good",
    lifetime: timedelta = LIFETIME,
    delegated: bool = True,
) -> bytes:
    """Return a DER OCSP response about `subject` by a responder of `issuer`, or by `issuer` itself, from `issued` on.

    Raises:
        ValueError: `issued` has no time zone.
    """
    if issued.tzinfo is None:
        raise ValueError("`issued` has no time zone")
    start = issued.astimezone(UTC).replace(microsecond=0)
    signer = _responder(issuer) if delegated else issuer
    # written by hand: the library's builder stamps producedAt with the clock and has no deterministic signature
    sha384 = _der(0x30, _SHA384_OID + _der(0x05, b""))
    name, key = issuer.certificate.subject.public_bytes(), _point(issuer.key)
    about = _der(
        0x30,
        sha384
        + _der(0x04, hashlib.sha384(name).digest())
        + _der(0x04, hashlib.sha384(key).digest())
        + _integer(subject.certificate.serial_number),
    )
    stamp = _time(start)
    answer = {
        "good": _der(0x80, b""),
        "revoked": _der(0xA1, stamp + _der(0xA0, _der(0x0A, b"\x01"))),  # keyCompromise
        "unknown": _der(0x82, b""),
    }[status]
    responder = hashlib.sha1(_point(signer.key), usedforsecurity=False).digest()
    body = _der(
        0x30,
        _der(0xA2, _der(0x04, responder))
        + stamp
        + _der(0x30, _der(0x30, about + answer + stamp + _der(0xA0, _time(start + lifetime)))),
    )
    chain = _der(0xA0, _der(0x30, signer.certificate.public_bytes(Encoding.DER))) if delegated else b""
    algorithm = _der(0x30, bytes.fromhex("06082a8648ce3d040303"))  # ecdsa-with-SHA384
    basic = _der(0x30, body + algorithm + _der(0x03, b"\x00" + signer.key.sign(body, _SIGN)) + chain)
    kind = bytes.fromhex("06092b0601050507300101")  # id-pkix-ocsp-basic
    return _der(0x30, _der(0x0A, b"\x00") + _der(0xA0, _der(0x30, kind + _der(0x04, basic))))


def staples(device: Gpu, issued: datetime, *, lifetime: timedelta = LIFETIME) -> bytes:
    """Return good OCSP responses for the chain of `device`, one after another, as an attester would staple them."""
    chain = device.issuers
    return b"".join(
        ocsp_response(subject, issuer, issued, lifetime=lifetime) for subject, issuer in pairwise(chain[1:])
    )


def endorsements(
    issued: datetime,
    devices: Collection[Gpu] | None = None,
    *,
    lifetime: timedelta = LIFETIME,
    revoked: Collection[int] = (),
    unknown: Collection[int] = (),
    missing: Collection[int] = (),
    label: str = LABEL,
) -> Endorsements:
    """Return both manifests of each architecture and OCSP responses for `devices` (one soft GPU), valid from `issued`.

    `revoked` and `unknown` are serial numbers of certificates with that answer, `missing` those without any.

    Raises:
        ValueError: `issued` has no time zone.
    """
    if devices is None:
        devices = (gpu(label=label),)
    items: dict[str, bytes] = {}
    for arch in sorted({each.arch for each in devices}):
        driver, vbios = rim_ids(arch)
        if driver:
            items[driver] = driver_rim(arch=arch, label=label)
        items[vbios] = vbios_rim(arch=arch, label=label)
    chains = [authority(label).rim_chain, *(each.issuers[1:] for each in devices)]
    for chain in chains:
        for subject, issuer in pairwise(chain):
            serial = subject.certificate.serial_number
            if serial in missing or f"ocsp/{serial:x}" in items:
                continue
            status: Literal["good", "revoked", "unknown"] = "good"
            if serial in revoked:
                status = "revoked"
            elif serial in unknown:
                status = "unknown"
            items[f"ocsp/{serial:x}"] = ocsp_response(subject, issuer, issued, status=status, lifetime=lifetime)
    return Endorsements(tuple(Endorsement(KIND, subject, data) for subject, data in items.items()))


def _fields(device: Gpu, driver: str, vbios: str) -> dict[int, bytes]:
    if device.arch == "LS10":
        return {Field.VBIOS_VERSION: vbios.encode(), Field.SWITCH_PDI: bytes.fromhex(device.udid)}
    numbers = [int(part, 16) for part in vbios.split(".")]
    project, project_sku, chip_sku = PROJECT
    fields: dict[int, bytes] = {
        Field.VBIOS_VERSION: bytes((*numbers[3::-1], numbers[4], 0, 0, 0)),
        Field.CHIP_SKU: chip_sku.encode().ljust(9, b"\x00"),
        Field.PROJECT: project.encode() + b"\x00",
        Field.PROJECT_SKU: project_sku.encode() + b"\x00",
        Field.DRIVER_VERSION: driver.encode() + b"\x00",
    }
    if device.arch == "BLACKWELL":
        fields[Field.CHIP_INFO] = CHIPS[device.arch].encode() + b"\x00"
    return fields


def _status(enabled: bool) -> bytes:
    return bytes((nvidia_format.ENABLED if enabled else nvidia_format.DISABLED,))


def _fwid_extension(
    arch: Arch, key: ec.EllipticCurvePrivateKey, fwid: bytes, *, debug: bool
) -> x509.UnrecognizedExtension:
    digest = _der(0x30, _SHA384_OID + _der(0x04, fwid))
    if arch != "BLACKWELL":
        spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return x509.UnrecognizedExtension(
            ObjectIdentifier(nvidia_device.FWID), _der(0x30, _der(0x02, b"\x01") + spki + digest)
        )
    flags = bytes((0, 0x10 if debug else 0, 0, 0, 0))  # BIT STRING: no unused bits, debug is bit 3
    info = _der(0x80, b"CLOISTER SOFT") + _der(0xA6, digest) + _der(0x87, flags)
    return x509.UnrecognizedExtension(ObjectIdentifier(nvidia_device.DICE_TCB_INFO), _der(0x30, info))


def _rim(product: str, version: str, values: Mapping[int, bytes], records: int, label: str) -> bytes:
    """Return a manifest in canonical form (Canonical XML 1.1), so that its bytes are what is signed."""
    name = f"Cloister SOFT {product} {version} - protects nothing"
    head = (
        f'<SoftwareIdentity xmlns="{nvidia_rim.SWID}" xmlns:SHA384="{nvidia_rim.HASHES}" name="{product}" '
        f'tagId="{hashlib.sha384(name.encode()).hexdigest()}" tagVersion="0" version="1.0">'
    )
    resources = "".join(
        f'<Resource active="{index in values}" alternatives="1" index="{index}" name="Measurement_{index}" size="48" '
        f'type="Measurement" SHA384:Hash0="{values.get(index, bytes(48)).hex()}"></Resource>'
        for index in range(records)
    )
    body = (
        f'<Entity name="{name}" role="softwareCreator tagCreator"></Entity>'
        f'<Meta colloquialVersion="{version}" edition="GPU" product="{product}"></Meta>'
        f"<Payload>{resources}</Payload>"
    )
    tail = "</SoftwareIdentity>"
    signature = xml_signature(f"{head}{body}{tail}".encode(), label)
    return f"{head}{body}{signature}{tail}".encode()


def xml_signature(canonical: bytes, label: str = LABEL) -> str:
    """Return the enveloped `ds:Signature` of the soft manifest signer over a document in canonical form.

    The document must declare exactly the two namespaces that `driver_rim` declares: signed information inherits them.
    """
    vendor = authority(label)
    digest = base64.b64encode(hashlib.sha384(canonical).digest()).decode()
    method = "http://www.w3.org/2001/04/xmldsig-more#"
    inner = (
        f'<ds:CanonicalizationMethod Algorithm="{nvidia_rim.C14N_11}"></ds:CanonicalizationMethod>'
        f'<ds:SignatureMethod Algorithm="{method}ecdsa-sha384"></ds:SignatureMethod>'
        '<ds:Reference URI=""><ds:Transforms>'
        f'<ds:Transform Algorithm="{nvidia_rim.ENVELOPED}"></ds:Transform>'
        f'<ds:Transform Algorithm="{nvidia_rim.C14N_11}"></ds:Transform>'
        f'</ds:Transforms><ds:DigestMethod Algorithm="{method}sha384"></ds:DigestMethod>'
        f"<ds:DigestValue>{digest}</ds:DigestValue></ds:Reference>"
    )
    # canonical form of an inner element: every namespace in scope stands on it, sorted by prefix
    scope = f'xmlns="{nvidia_rim.SWID}" xmlns:SHA384="{nvidia_rim.HASHES}" xmlns:ds="{nvidia_rim.DSIG}"'
    signed = f"<ds:SignedInfo {scope}>{inner}</ds:SignedInfo>"
    value = base64.b64encode(_sign(vendor.rim_signer.key, signed.encode())).decode()
    certificates = "".join(
        f"<ds:X509Certificate>{base64.b64encode(each.certificate.public_bytes(Encoding.DER)).decode()}</ds:X509Certificate>"
        for each in vendor.rim_chain
    )
    return (
        f'<ds:Signature xmlns:ds="{nvidia_rim.DSIG}"><ds:SignedInfo>{inner}</ds:SignedInfo>'
        f"<ds:SignatureValue>{value}</ds:SignatureValue>"
        f"<ds:KeyInfo><ds:X509Data>{certificates}</ds:X509Data></ds:KeyInfo></ds:Signature>"
    )


@lru_cache(maxsize=64)
def _responder(issuer: Issuer) -> Issuer:
    name = f"responder of {issuer.certificate.serial_number:x}"
    key = derive_key(name)
    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.OCSP_SIGNING])
    certificate = _certificate(
        "Cloister SOFT OCSP responder - protects nothing", key, issuer, name, ca=False, extensions=(purpose,)
    )
    return Issuer(certificate, key)


def _certificate(
    common: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: Issuer | None,
    serial: str,
    *,
    ca: bool = True,
    extensions: tuple[x509.ExtensionType, ...] = (),
) -> x509.Certificate:
    """Return a certificate; its serial number is derived from `serial`, and without `issuer` it is its own."""
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Cloister SOFT - protects nothing"),
        ]
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer is not None else subject)
        .public_key(key.public_key())
        .serial_number(int.from_bytes(hashlib.sha256(serial.encode()).digest()[:20], "big") >> 1)
        .not_valid_before(FIRST)
        .not_valid_after(LAST)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not ca,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=ca,
                crl_sign=ca,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(issuer.key if issuer is not None else key, SHA384(), ecdsa_deterministic=True)


def _der(tag: int, value: bytes) -> bytes:
    """Return one DER element of less than 65,536 bytes (X.690, 8.1)."""
    size = len(value)
    if size < 0x80:
        return bytes([tag, size]) + value
    if size < 0x100:
        return bytes([tag, 0x81, size]) + value
    return bytes([tag, 0x82]) + size.to_bytes(2, "big") + value


def _integer(value: int) -> bytes:
    return _der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _time(moment: datetime) -> bytes:
    return _der(0x18, moment.strftime("%Y%m%d%H%M%SZ").encode())


def _point(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def _sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """Return the raw signature r || s, 96 bytes."""
    r, s = decode_dss_signature(key.sign(message, _SIGN))
    return r.to_bytes(48, "big") + s.to_bytes(48, "big")
