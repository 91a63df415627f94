"""What soft SGX and soft TDX share: a test authority, soft machines and their collateral. It protects nothing.

Every key here is derived from a published label, so everybody can make the same evidence about any program. That is the
point: demonstrations, tests and CI walk the path of real evidence, down to dcap-qvl, and each fault can be made at will.
Whatever is emitted says so: subject names, FMSPC, TEE type (`soft-tdx`, `soft-sgx`), advisories.

Pure: keys come from labels, time is an argument, signatures are deterministic (RFC 6979), so equal arguments give equal
bytes. The root's hash is the constant `dcap.roots.SOFT_ROOT`.

    authority()        root, platform CA, TCB signer; once per process
    machine(...)       one machine: PCK certificate and quoting enclave; once per machine
    signed(...)        a quote: what is signed, signed
    collateral(...)    TCB info, QE identity, both CRLs; once per validity window

Formats: quote as in dcap/format.py; certificates as in Intel SGX PCK Certificate and CRL Profile 1.5; TCB info v3 and
QE identity v2 as in Intel PCS API v4.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID, ObjectIdentifier

from cloister.attestation.dcap import format as dcap_format
from cloister.attestation.dcap.format import Tee
from cloister.crypto.canonical import json_encode

NOTICE: Final = "soft TEE: the test root's private key is public, so this protects nothing"
LABEL: Final = "cloister soft test root 1: everybody knows this key"
"""The published label. Another label gives a root that nobody pins: the case of a foreign root."""
FMSPC: Final = "50F750F750F7"
"""No real machine has it: family `50F7`, three times."""
FIRST: Final = datetime(2020, 1, 1, tzinfo=UTC)
LAST: Final = datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)
"""Validity of every certificate; windows that matter are those of the collateral documents."""
LIFETIME: Final = timedelta(days=30)
"""How long Intel's TCB info, QE identity and PCK CRL are valid."""

QE_AUTH_DATA: Final = bytes(range(32))
QE_ISVSVN: Final = 6
CPU_SVN: Final = bytes([3] * 8) + bytes(8)

# status -> PCE SVN of the TCB level that has it: the machine's own SVN selects its status, as on real hardware
PCE_SVN: Final[dict[str, int]] = {
    "UpToDate": 17,
    "SWHardeningNeeded": 16,
    "ConfigurationNeeded": 15,
    "ConfigurationAndSWHardeningNeeded": 14,
    "OutOfDate": 13,
    "OutOfDateConfigurationNeeded": 12,
    "Revoked": 11,
}
STATUSES: Final = tuple(PCE_SVN)
QE_PRODUCT: Final = {"sgx": 1, "tdx": 2}
"""ISVPRODID of the quoting enclave, as Intel numbers its own."""

_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256, NIST SP 800-186, 3.2.1.3
_SIGN: Final = ec.ECDSA(SHA256(), deterministic_signing=True)
_SGX: Final = bytes.fromhex("2a864886f84d010d01")  # 1.2.840.113741.1.13.1
_SGX_OID: Final = ObjectIdentifier("1.2.840.113741.1.13.1")


def derive_key(label: str) -> ec.EllipticCurvePrivateKey:
    """Return the P-256 key of a published `label`. Nobody owns it."""
    digest = hashlib.sha512(b"cloister/soft-tdx/key/1\x00" + label.encode()).digest()
    return ec.derive_private_key(int.from_bytes(digest, "big") % (_ORDER - 1) + 1, ec.SECP256R1())


@dataclass(frozen=True, slots=True)
class Authority:
    """What Intel is for real evidence: root, platform CA and TCB signer, with their public "private" keys."""

    root_key: ec.EllipticCurvePrivateKey
    root: x509.Certificate
    ca_key: ec.EllipticCurvePrivateKey
    ca: x509.Certificate
    signer_key: ec.EllipticCurvePrivateKey
    signer: x509.Certificate


@lru_cache(maxsize=4)
def authority(label: str = LABEL) -> Authority:
    """Return the test authority of `label`."""
    root_key, ca_key, signer_key = (derive_key(f"{label}/{part}") for part in ("root", "ca", "signer"))
    root_name = _name("Cloister SOFT test root - protects nothing")
    ca_name = _name("Cloister SOFT PCK platform CA - protects nothing")
    signer_name = _name("Cloister SOFT TCB signing - protects nothing")
    root = _certificate(root_name, root_key, root_name, root_key, serial=1, ca_depth=1)
    return Authority(
        root_key=root_key,
        root=root,
        ca_key=ca_key,
        ca=_certificate(ca_name, ca_key, root_name, root_key, serial=2, ca_depth=0),
        signer_key=signer_key,
        signer=_certificate(signer_name, signer_key, root_name, root_key, serial=3),
    )


@dataclass(frozen=True, slots=True)
class Platform:
    """One soft machine: what is the same in all of its quotes."""

    serial: int
    """Serial number of the PCK certificate, for revocation."""
    ppid: bytes
    fmspc: str
    attestation_key: ec.EllipticCurvePrivateKey
    pck_key: ec.EllipticCurvePrivateKey
    pck: x509.Certificate
    tail: bytes
    """Everything that follows the signature in a quote: key, QE report, its signature, certificates."""


@lru_cache(maxsize=128)
def machine(
    tee: str,
    name: str = "soft",
    *,
    status: str = "UpToDate",
    fmspc: str = FMSPC,
    label: str = LABEL,
    pce_svn: int | None = None,
    pce_id: bytes = bytes(2),
    qe_isvsvn: int = QE_ISVSVN,
    qe_report_data: bytes | None = None,
    qe_debug: bool = False,
) -> Platform:
    """Return the soft machine `name` whose TCB level has `status` under the collateral of `collateral`.

    One machine has one identity and one PCK certificate, whichever `tee` (`sgx`, `tdx`) its quoting enclave is for.
    `pce_svn` overrides the level, `qe_report_data` puts other bytes where the QE report names the attestation key.

    Raises:
        ValueError: an unknown status or TEE, or an FMSPC that is not 12 hex digits.
    """
    if status not in PCE_SVN:
        raise ValueError(f"TCB status {status!r} is not one of {', '.join(STATUSES)}")
    if len(bytes.fromhex(fmspc)) != 6:
        raise ValueError(f"FMSPC {fmspc!r} has not 12 hex digits")
    if tee not in QE_PRODUCT:
        raise ValueError(f"TEE {tee!r} is not one of {', '.join(QE_PRODUCT)}")
    issuer = authority(label)
    identity = hashlib.sha256(f"{label}/{name}".encode()).digest()
    ppid, serial = identity[:16], int.from_bytes(identity[16:], "big") >> 1
    attestation_key, pck_key = derive_key(f"{label}/{name}/ak"), derive_key(f"{label}/{name}/pck")
    svn = PCE_SVN[status] if pce_svn is None else pce_svn
    pck = _certificate(
        _name("Cloister SOFT PCK certificate - protects nothing"),
        pck_key,
        issuer.ca.subject,
        issuer.ca_key,
        serial=serial,
        extension=x509.UnrecognizedExtension(
            _SGX_OID, _sgx_extension(ppid, svn, bytes.fromhex(fmspc), identity[:16], pce_id)
        ),
    )
    public = _point(attestation_key)
    named = hashlib.sha256(public + QE_AUTH_DATA).digest() + bytes(32) if qe_report_data is None else qe_report_data
    qe_report = _qe_report(named, QE_PRODUCT[tee], qe_isvsvn, debug=qe_debug)
    chain = b"".join(each.public_bytes(Encoding.PEM) for each in (pck, issuer.ca, issuer.root)) + b"\x00"
    inner = (
        qe_report
        + sign(pck_key, qe_report)
        + struct.pack("<H", len(QE_AUTH_DATA))
        + QE_AUTH_DATA
        + struct.pack("<HI", dcap_format.CERTIFICATION_PEM_CHAIN, len(chain))
        + chain
    )
    if tee == "tdx":
        inner = struct.pack("<HI", dcap_format.CERTIFICATION_QE_REPORT, len(inner)) + inner
    return Platform(serial, ppid, fmspc.upper(), attestation_key, pck_key, pck, public + inner)


def header(tee: Tee, version: int) -> bytes:
    """Return the 48 bytes of a quote's header."""
    return struct.pack("<HHII", version, dcap_format.ECDSA_P256, tee.tee_type, 0) + dcap_format.INTEL_QE + bytes(20)


def signed(platform: Platform, body: bytes) -> bytes:
    """Return the quote in which the attestation key of `platform` signs `body` (header and report)."""
    rest = sign(platform.attestation_key, body) + platform.tail
    return body + struct.pack("<I", len(rest)) + rest


@dataclass(frozen=True, slots=True)
class Level:
    """One TCB level of the TCB info."""

    status: str
    pce_svn: int
    date: date
    advisories: tuple[str, ...] = ()


def levels(newest: date) -> tuple[Level, ...]:
    """Return one level per status; what is out of date is two years older than `newest`, what is revoked four."""
    age = {"OutOfDate": 2, "OutOfDateConfigurationNeeded": 2, "Revoked": 4}
    return tuple(
        Level(
            status,
            svn,
            date(newest.year - age.get(status, 0), newest.month, 1),
            () if status == "UpToDate" else (f"SOFT-SA-{svn:05d}",),
        )
        for status, svn in PCE_SVN.items()
    )


def collateral(
    tee: Tee,
    issued: datetime,
    *,
    lifetime: timedelta = LIFETIME,
    fmspc: str = FMSPC,
    tcb_levels: Iterable[Level] | None = None,
    revoked: tuple[int, ...] = (),
    revoke_ca: bool = False,
    label: str = LABEL,
    evaluation: int = 1,
    signer: tuple[ec.EllipticCurvePrivateKey, tuple[x509.Certificate, ...]] | None = None,
) -> bytes:
    """Return collateral of `tee` as JSON, valid from `issued` for `lifetime`.

    `revoked` are serial numbers of PCK certificates. Without `tcb_levels`, the newest level is of the month of `issued`.
    `signer` signs both documents in place of the authority's: a key, and its chain.

    Raises:
        ValueError: `issued` has no time zone.
    """
    if issued.tzinfo is None:
        raise ValueError("`issued` has no time zone")
    start = issued.astimezone(UTC).replace(microsecond=0)
    end = start + lifetime
    issuer = authority(label)
    window = {"issueDate": _stamp(start), "nextUpdate": _stamp(end), "tcbEvaluationDataNumber": evaluation}
    table = levels(start.date()) if tcb_levels is None else tuple(tcb_levels)
    has_modules = tee.kind == "tdx"
    tcb_info = json_encode(
        {
            "id": tee.tcb_info,
            "version": 3,
            **window,
            "fmspc": fmspc.upper(),
            "pceId": "0000",
            "tcbType": 0,
            **(_modules(start.date()) if has_modules else {}),
            "tcbLevels": [_tcb_level(level, tdx=has_modules) for level in table],
        }
    )
    qe_identity = json_encode(
        {
            "id": tee.qe_identity,
            "version": 2,
            **window,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": "11000000000000000000000000000000",
            "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
            "mrsigner": _QE_MRSIGNER.hex().upper(),
            "isvprodid": QE_PRODUCT[tee.kind],
            "tcbLevels": [{"tcb": {"isvsvn": QE_ISVSVN}, "tcbDate": _day(start.date()), "tcbStatus": "UpToDate"}],
        }
    )
    key, chain = (issuer.signer_key, (issuer.signer, issuer.root)) if signer is None else signer
    return json_encode(
        {
            "pck_crl_issuer_chain": _pem(issuer.ca, issuer.root),
            "root_ca_crl": _crl(issuer.root, issuer.root_key, (2,) if revoke_ca else (), start, end).hex(),
            "pck_crl": _crl(issuer.ca, issuer.ca_key, revoked, start, end).hex(),
            "tcb_info_issuer_chain": _pem(*chain),
            "tcb_info": tcb_info.decode(),
            "tcb_info_signature": sign(key, tcb_info).hex(),
            "qe_identity_issuer_chain": _pem(*chain),
            "qe_identity": qe_identity.decode(),
            "qe_identity_signature": sign(key, qe_identity).hex(),
        }
    )


_QE_MRSIGNER: Final = hashlib.sha256(b"cloister soft quoting enclave - protects nothing").digest()


def _qe_report(report_data: bytes, product: int, isvsvn: int, *, debug: bool) -> bytes:
    """Return an SGX report of the soft quoting enclave, 384 bytes (Intel SDM volume 3D, REPORT)."""
    flags = 0x15 | (0x02 if debug else 0)  # INIT, MODE64BIT, PROVISIONKEY as Intel's TD quoting enclave has them
    return b"".join(
        (
            CPU_SVN,
            bytes(32),  # MISCSELECT, reserved
            flags.to_bytes(8, "little"),
            bytes.fromhex("e700000000000000"),  # XFRM
            hashlib.sha256(_QE_MRSIGNER).digest(),  # MRENCLAVE
            bytes(32),
            _QE_MRSIGNER,
            bytes(96),
            struct.pack("<HH", product, isvsvn),
            bytes(60),
            report_data,
        )
    )


def _sgx_extension(ppid: bytes, pce_svn: int, fmspc: bytes, instance: bytes, pce_id: bytes) -> bytes:
    """Return the value of the PCK certificate's SGX extension, with the members of a platform CA certificate."""

    def member(path: bytes, value: bytes) -> bytes:
        return _der(0x30, _der(0x06, _SGX + path) + value)

    def octets(value: bytes) -> bytes:
        return _der(0x04, value)

    def integer(value: int) -> bytes:
        return _der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))

    tcb = b"".join(member(bytes([2, index + 1]), integer(svn)) for index, svn in enumerate(CPU_SVN))
    tcb += member(bytes([2, 17]), integer(pce_svn)) + member(bytes([2, 18]), octets(CPU_SVN))
    true = _der(0x01, b"\xff")
    flags = b"".join(member(bytes([7, index]), true) for index in (1, 2, 3))  # dynamic platform, cached keys, SMT
    return _der(
        0x30,
        member(b"\x01", octets(ppid))
        + member(b"\x02", _der(0x30, tcb))
        + member(b"\x03", octets(pce_id))
        + member(b"\x04", octets(fmspc))
        + member(b"\x05", _der(0x0A, b"\x01"))  # SGX type: scalable
        + member(b"\x06", octets(instance))
        + member(b"\x07", _der(0x30, flags)),
    )


def _der(tag: int, value: bytes) -> bytes:
    """Return one DER element of less than 65,536 bytes (X.690, 8.1)."""
    size = len(value)
    if size < 0x80:
        return bytes([tag, size]) + value
    if size < 0x100:
        return bytes([tag, 0x81, size]) + value
    return bytes([tag, 0x82]) + size.to_bytes(2, "big") + value


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Cloister SOFT - protects nothing"),
        ]
    )


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    serial: int,
    ca_depth: int | None = None,
    extension: x509.ExtensionType | None = None,
) -> x509.Certificate:
    is_ca = ca_depth is not None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(FIRST)
        .not_valid_after(LAST)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_ca,
                content_commitment=not is_ca,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=is_ca,
                crl_sign=is_ca,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=ca_depth), critical=True)
    )
    if extension is not None:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(issuer_key, SHA256(), ecdsa_deterministic=True)


def _crl(
    issuer: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    serials: tuple[int, ...],
    start: datetime,
    end: datetime,
) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(start)
        .next_update(end)
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    for serial in serials:
        entry = (
            x509.RevokedCertificateBuilder()
            .serial_number(serial)
            .revocation_date(start)
            .add_extension(x509.CRLReason(x509.ReasonFlags.key_compromise), critical=False)
        )
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key, SHA256(), ecdsa_deterministic=True).public_bytes(Encoding.DER)


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """Return the raw signature r || s, 64 bytes."""
    r, s = decode_dss_signature(key.sign(message, _SIGN))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _point(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]


def _pem(*chain: x509.Certificate) -> str:
    return "".join(each.public_bytes(Encoding.PEM).decode() for each in chain)


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _day(day: date) -> str:
    return f"{day.isoformat()}T00:00:00Z"


def _modules(newest: date) -> dict[str, Any]:
    """Return what only TCB info of TDX has: the TDX module and its levels."""
    module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    level = {"tcb": {"isvsvn": 5}, "tcbDate": _day(newest), "tcbStatus": "UpToDate"}
    return {"tdxModule": module, "tdxModuleIdentities": [{"id": "TDX_01", **module, "tcbLevels": [level]}]}


def _tcb_level(level: Level, *, tdx: bool) -> dict[str, Any]:
    tcb: dict[str, Any] = {"sgxtcbcomponents": [{"svn": svn} for svn in CPU_SVN], "pcesvn": level.pce_svn}
    if tdx:
        tcb["tdxtcbcomponents"] = [{"svn": svn} for svn in bytes([5]) + bytes(15)]
    return {
        "tcb": tcb,
        "tcbDate": _day(level.date),
        "tcbStatus": level.status,
        "advisoryIDs": list(level.advisories),
    }
