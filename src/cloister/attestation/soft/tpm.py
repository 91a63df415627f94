"""Soft TPM: bit-exact quotes, certificates, firmware and IMA logs of measured hosts under a test root. It protects nothing.

Every key here is derived from a published label, so everybody can make the same evidence about any host. Each fault can be made
at will. Whatever is emitted says so: subject names, the TPM's manufacturer (`SOFT`), the TEE type (`soft-tpm`).

Pure: keys come from labels, time is an argument, signatures are deterministic (RFC 6979), so equal arguments give equal bytes.
The root's hash is the constant `tpm.roots.SOFT_ROOT`.

    authority()       root and the authority that signs EK and AK certificates; once per process
    machine(...)      one TPM: EK, AK, their certificates; once per machine
    Host(...)         what was measured on it: firmware events, files; gives PCRs and logs
    quote(...)        one signature
    evidence(...)     the quote with its parts, as an attester sends it
    note(...)         what a relying party notes that enrolled the AK
    endorsements(...) revocation lists: none is demanded, tests want them

Formats: tpm/format.py, logs/tcg.py, logs/ima.py; certificates as in TCG EK Credential Profile 2.4.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID, ObjectIdentifier

from cloister.attestation import events as event_log
from cloister.attestation.endorsements import Endorsement
from cloister.attestation.logs import ima, tcg
from cloister.attestation.tpm import chain as chains
from cloister.attestation.tpm import enrol
from cloister.attestation.tpm import format as tpm_format
from cloister.attestation.tpm import verify as tpm_verify
from cloister.attestation.types import Event, Evidence

NOTICE: Final = "soft TPM: the test root's private key is public, so this protects nothing"
LABEL: Final = "cloister soft TPM root 1: everybody knows this key"
"""The published label. Another label gives a root that nobody pins: the case of a foreign root."""
FIRST: Final = datetime(2020, 1, 1, tzinfo=UTC)
LAST: Final = datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)
"""Validity of authorities, and of leaves unless said."""
LIFETIME: Final = timedelta(days=30)
"""How long a revocation list is valid."""
FIRMWARE: Final = 0x534F4654_00000001
"""`SOFT`, 1."""

AK_ATTRIBUTES: Final = enrol.AK_SET | tpm_format.USER_WITH_AUTH | tpm_format.NO_DA
EK_ATTRIBUTES: Final = enrol.EK_SET | tpm_format.ADMIN_WITH_POLICY
EK_POLICY: Final = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
"""PolicySecret(TPM_RH_ENDORSEMENT): EK Credential Profile 2.4, B.3.3."""
AES_128_CFB: Final = (0x0006, 128, 0x0043)
QUOTED: Final = (*range(11), 14, 15)
"""PCRs that are quoted unless said."""

_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256, NIST SP 800-186, 3.2.1.3
_HASHES: Final[dict[str, Any]] = {
    "sha1": hashes.SHA1(),  # noqa: S303 - the fault of a signature with SHA-1
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}
_ALGORITHMS: Final = {name: number for number, name in tcg.ALGORITHMS.items()}
_TYPES: Final = {name: number for number, name in tcg.EVENT_TYPES.items()}
_GLOBAL: Final = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")  # EFI_GLOBAL_VARIABLE


def derive_key(label: str) -> ec.EllipticCurvePrivateKey:
    """Return the P-256 key of a published `label`. Nobody owns it."""
    digest = hashlib.sha512(b"cloister/soft-tpm/key/1\x00" + label.encode()).digest()
    return ec.derive_private_key(int.from_bytes(digest, "big") % (_ORDER - 1) + 1, ec.SECP256R1())


@dataclass(frozen=True, slots=True)
class Authority:
    """What a TPM vendor or a cloud is for real evidence, with its public "private" keys."""

    root_key: ec.EllipticCurvePrivateKey
    root: x509.Certificate
    ca_key: ec.EllipticCurvePrivateKey
    ca: x509.Certificate


@lru_cache(maxsize=4)
def authority(label: str = LABEL) -> Authority:
    """Return the test authority of `label`."""
    root_key, ca_key = derive_key(f"{label}/root"), derive_key(f"{label}/ca")
    root_name = _name("Cloister SOFT TPM test root - protects nothing")
    root = _certificate(root_name, root_key.public_key(), root_name, root_key, serial=1, ca_depth=1)
    ca_name = _name("Cloister SOFT TPM authority - protects nothing")
    ca = _certificate(ca_name, ca_key.public_key(), root_name, root_key, serial=2, ca_depth=0)
    return Authority(root_key, root, ca_key, ca)


@dataclass(frozen=True, slots=True)
class Machine:
    """One soft TPM: what is the same in all of its quotes."""

    ak_key: ec.EllipticCurvePrivateKey
    ak: bytes
    """TPMT_PUBLIC."""
    ak_chain: bytes
    """The part `ak-cert`; empty without certificate."""
    serial: int
    """Serial number of the AK certificate, for revocation."""
    ek_key: ec.EllipticCurvePrivateKey
    ek: bytes
    """TPMT_PUBLIC."""
    ek_chain: bytes
    """EK certificate and its authorities, DER."""

    @property
    def name(self) -> bytes:
        """Name of the AK."""
        return tpm_format.parse_public(self.ak, where="soft").name


@lru_cache(maxsize=64)
def machine(
    name: str = "soft",
    *,
    label: str = LABEL,
    attributes: int = AK_ATTRIBUTES,
    certified: bool = True,
    not_before: datetime = FIRST,
    not_after: datetime = LAST,
    usage: str = chains.AK_USAGE,
    ek_usage: str = chains.EK_USAGE,
    ek_names: bool = True,
    certificate_of: str | None = None,
) -> Machine:
    """Return the soft TPM `name`.

    Args:
        label: another label is another root, which nobody pins.
        attributes: TPMA_OBJECT of the AK, for keys that are not restricted.
        certified: the AK has a certificate; False: only enrolment says whose it is.
        not_before, not_after: validity of the AK certificate.
        usage, ek_usage: extended key usage of the certificates.
        ek_names: the EK certificate names manufacturer, model and version.
        certificate_of: name of another machine whose AK certificate stands in the place of the own one.
    """
    issuer = authority(label)
    ak_key, ek_key = derive_key(f"{label}/{name}/ak"), derive_key(f"{label}/{name}/ek")
    certified_key = ak_key if certificate_of is None else derive_key(f"{label}/{certificate_of}/ak")
    serial = int.from_bytes(hashlib.sha256(f"{label}/{name}".encode()).digest()[:16], "big") >> 1
    tail = _der(issuer.ca, issuer.root)
    ca_name = issuer.ca.subject
    ak_certificate = _certificate(
        _name("Cloister SOFT attestation key - protects nothing"),
        certified_key.public_key(),
        ca_name,
        issuer.ca_key,
        serial=serial,
        start=not_before,
        end=not_after,
        usage=usage,
    )
    ek_certificate = _certificate(
        x509.Name([]),
        ek_key.public_key(),
        ca_name,
        issuer.ca_key,
        serial=serial + 1,
        usage=ek_usage,
        names=ek_names,
        agreement=True,
    )
    return Machine(
        ak_key,
        tpm_format.encode_public(ak_key.public_key(), attributes=attributes, scheme=tpm_format.ECDSA),
        _der(ak_certificate) + tail if certified else b"",
        serial,
        ek_key,
        tpm_format.encode_public(
            ek_key.public_key(), attributes=EK_ATTRIBUTES, policy=EK_POLICY, symmetric=AES_128_CFB
        ),
        _der(ek_certificate) + tail,
    )


@dataclass(frozen=True, slots=True)
class Step:
    """One firmware event: `measured` is what was hashed, the event's data unless given."""

    register: int
    type: str
    data: bytes
    measured: bytes | None = None


@dataclass(frozen=True, slots=True)
class File:
    """One entry of the IMA list."""

    path: str
    content: bytes
    signature: bytes = b""
    """Value of security.ima: `sign_file`."""
    violation: bool = False


@dataclass(frozen=True, slots=True)
class Host:
    """What was measured in one boot. Another kernel, command line or initrd is another boot state."""

    steps: tuple[Step, ...]
    files: tuple[File, ...] = ()
    aggregate: bytes | None = None
    """Digest of the first IMA entry; None: the right one."""
    algorithms: tuple[str, ...] = ("sha1", "sha256")

    def boot_log(self) -> bytes:
        """Return the firmware log, crypto-agile."""
        sizes = b"".join(struct.pack("<HH", _ALGORITHMS[each], tcg.SIZES[each]) for each in self.algorithms)
        header = b"Spec ID Event03\x00" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(self.algorithms)) + sizes + b"\x00"
        out = [struct.pack("<II20sI", 0, tcg.NO_ACTION, bytes(20), len(header)) + header]
        for step in self.steps:
            measured = step.data if step.measured is None else step.measured
            out.append(struct.pack("<III", step.register, _TYPES[step.type], len(self.algorithms)))
            out += [
                struct.pack("<H", _ALGORITHMS[each]) + hashlib.new(each, measured).digest() for each in self.algorithms
            ]
            out.append(struct.pack("<I", len(step.data)) + step.data)
        return b"".join(out)

    def ima_log(self) -> bytes:
        """Return the IMA list in binary form, template ima-sig; the first entry is the boot aggregate."""
        return b"".join(_ima_entry(each) for each in self._entries())

    def pcrs(self, events: Iterable[Event] = (), *, algorithm: str = "sha256") -> dict[int, bytes]:
        """Return PCR 0 to 23 after this boot, these files and these runtime events (in PCR 15)."""
        values = {index: tcg.initial(index, algorithm) for index in range(24)}
        values |= tcg.replay(tcg.parse(self.boot_log(), where="soft"), algorithm)
        values |= ima.replay(ima.parse(self.ima_log(), where="soft"), algorithm)
        new = getattr(hashlib, algorithm)
        for event in events:
            values[tpm_verify.RUNTIME] = new(values[tpm_verify.RUNTIME] + new(event.data).digest()).digest()
        return values

    def _entries(self) -> tuple[tuple[str, bytes, bytes, bool], ...]:
        first = self.aggregate
        if first is None:
            values = tcg.replay(tcg.parse(self.boot_log(), where="soft"), "sha256")
            first = ima.boot_aggregate(values.get(index, bytes(32)) for index in tpm_verify.BOOT)
        files = (
            (each.path, hashlib.sha256(each.content).digest(), each.signature, each.violation) for each in self.files
        )
        return (("boot_aggregate", first, b"", False), *files)


FILES: Final = (
    File("/usr/bin/python3.11", b"soft python"),
    File("/usr/lib/libc.so.6", b"soft libc"),
    File("/opt/agent.py", b"soft agent"),
)
COMMAND_LINE: Final = "console=ttyS0 ima_policy=tcb"


def host(
    *,
    kernel: bytes = b"soft kernel",
    command_line: str = COMMAND_LINE,
    initrd: bytes = b"soft initrd",
    secure_boot: bool = True,
    files: tuple[File, ...] = FILES,
) -> Host:
    """Return a host that firmware, kernel, initrd and files were measured on, as OVMF and Linux's EFI stub do it."""
    separator = bytes(4)
    steps = (
        Step(0, "EV_S_CRTM_VERSION", "soft 1\x00".encode("utf-16-le")),
        Step(0, "EV_EFI_PLATFORM_FIRMWARE_BLOB", struct.pack("<QQ", 0x820000, 0xE0000), b"soft firmware"),
        Step(7, "EV_EFI_VARIABLE_DRIVER_CONFIG", _variable("SecureBoot", bytes([secure_boot]))),
        Step(1, "EV_EFI_VARIABLE_BOOT", _variable("BootOrder", b"\x00\x00"), b"\x00\x00"),
        Step(4, "EV_EFI_ACTION", b"Calling EFI Application from Boot Option"),
        *(Step(register, "EV_SEPARATOR", separator) for register in range(8)),
        Step(4, "EV_EFI_BOOT_SERVICES_APPLICATION", struct.pack("<QQQQ", 0, len(kernel), 0, 0), kernel),
        Step(9, "EV_EVENT_TAG", _tag(0x8F3B22ED, b"LOADED_IMAGE::LoadOptions\x00"), tcg.load_options(command_line)),
        Step(9, "EV_EVENT_TAG", _tag(0x8F3B22EC, b"Linux initrd\x00"), initrd),
        Step(5, "EV_EFI_ACTION", b"Exit Boot Services Invocation"),
        Step(5, "EV_EFI_ACTION", b"Exit Boot Services Returned with Success"),
    )
    return Host(steps, files)


def sign_file(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    """Return the value of security.ima as `evmctl ima_sign -a sha256` makes it, with deterministic ECDSA."""
    digest = hashlib.sha256(content).digest()
    signature = key.sign(digest, ec.ECDSA(Prehashed(hashes.SHA256()), deterministic_signing=True))
    return b"\x03\x02\x04" + bytes(4) + struct.pack(">H", len(signature)) + signature


def quote(
    machine: Machine,
    pcrs: Mapping[int, bytes],
    *,
    report_data: bytes,
    reset_count: int = 1,
    restart_count: int = 0,
    safe: bool = True,
    bank: str = "sha256",
    selected: Iterable[int] | None = None,
    digest: bytes | None = None,
    signature_hash: str = "sha256",
    magic: int = tpm_format.GENERATED,
    kind: int = tpm_format.QUOTE,
    hierarchy: int = tpm_verify.ENDORSEMENT,
) -> bytes:
    """Return TPM2B_ATTEST || TPMT_SIGNATURE over `pcrs`: all of them, or those `selected`.

    Args:
        report_data: qualifyingData.
        digest: what stands where the PCR digest belongs.
        signature_hash: `sha1` is the fault that a verifier must refuse.
        hierarchy: handle of the one that the AK is a primary key of.
        magic, kind: what stands where TPM_GENERATED and the type of a quote belong.
    """
    chosen = tuple(sorted(pcrs if selected is None else selected))
    if digest is None:
        digest = hashlib.new(signature_hash, b"".join(pcrs[index] for index in chosen)).digest()
    selection = tpm_format.encode_selection((tpm_format.Selection(bank, chosen),))
    signer = b"\x00\x0b" + hashlib.sha256(struct.pack(">I", hierarchy) + machine.name).digest()
    attest = b"".join(
        (
            struct.pack(">IH", magic, kind),
            _sized(signer),
            _sized(report_data),
            struct.pack(">QIIBQ", 1000, reset_count, restart_count, safe, FIRMWARE),
            selection,
            _sized(digest),
        )
    )
    return tpm_verify.join(attest, _signature(machine.ak_key, attest, signature_hash))


def evidence(
    machine: Machine,
    *,
    report_data: bytes,
    host: Host | None = None,
    shown: Host | None = None,
    events: tuple[Event, ...] = (),
    shown_events: tuple[Event, ...] | None = None,
    quoted: Iterable[int] = QUOTED,
    parts: Mapping[str, bytes | None] | None = None,
    **options: Any,
) -> Evidence:
    """Return the evidence of `machine`, on which `host` was measured.

    Args:
        host: what the TPM saw; the default is `host()`.
        shown: the host whose logs are sent instead of the true ones.
        events: what was extended into PCR 15; `shown_events` is what is sent instead.
        quoted: PCRs of the quote.
        parts: parts that replace the true ones; None leaves one out.
        options: those of `quote`.
    """
    true = _default() if host is None else host
    sent = true if shown is None else shown
    pcrs = {index: value for index, value in true.pcrs(events).items() if index in set(quoted)}
    values: dict[str, bytes | None] = {
        "ak": machine.ak,
        "pcrs": tpm_verify.encode_pcrs({"sha256": pcrs}),
        "boot-log": sent.boot_log(),
        "ima-log": sent.ima_log(),
        "ak-cert": machine.ak_chain or None,
    }
    values |= parts or {}
    return Evidence(
        tpm_verify.KIND,
        quote(machine, pcrs, report_data=report_data, **options),
        events if shown_events is None else shown_events,
        MappingProxyType({name: part for name, part in values.items() if part is not None}),
    )


def note(machine: Machine, when: datetime, *, label: str = LABEL, **fields: Any) -> enrol.Note:
    """Return what a relying party notes that enrolled the AK of `machine` at `when`; `fields` override those of the note."""
    root = authority(label).root.public_bytes(Encoding.DER)
    leaf = chains.split(machine.ek_chain, where="soft")[0]
    noted = enrol.Note(
        machine.name,
        enrol.ek_id(tpm_format.parse_public(machine.ek, where="soft")),
        "ek-certificate",
        when,
        hashlib.sha256(root).hexdigest(),
        hashlib.sha256(leaf.der).hexdigest(),
        leaf.not_after,
    )
    return replace(noted, **fields)


def endorsements(
    issued: datetime, *, revoked: tuple[int, ...] = (), lifetime: timedelta = LIFETIME, label: str = LABEL
) -> tuple[Endorsement, ...]:
    """Return the revocation lists of both authorities, valid from `issued` for `lifetime`; `revoked` are serials of leaves.

    Raises:
        ValueError: `issued` has no time zone.
    """
    if issued.tzinfo is None:
        raise ValueError("`issued` has no time zone")
    issuer = authority(label)
    found = []
    for certificate, key, serials in ((issuer.root, issuer.root_key, ()), (issuer.ca, issuer.ca_key, revoked)):
        subject = f"crl/{hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()}"
        found.append(Endorsement(tpm_verify.KIND, subject, _crl(certificate, key, serials, issued, issued + lifetime)))
    return tuple(found)


def runtime(name: str, data: bytes) -> Event:
    """Return the event that a host extends into PCR 15: as `events.event`."""
    return event_log.event(name, data)


@lru_cache(maxsize=1)
def _default() -> Host:
    return host()


def _ima_entry(entry: tuple[str, bytes, bytes, bool]) -> bytes:
    path, digest, signature, violation = entry
    shown = bytes(32) if violation else digest
    fields = (b"sha256:\x00" + shown, path.replace(" ", "_").encode() + b"\x00", signature)
    data = b"".join(struct.pack("<I", len(each)) + each for each in fields)
    template_hash = bytes(20) if violation else hashlib.sha1(data, usedforsecurity=False).digest()
    return struct.pack("<I20sI", ima.REGISTER, template_hash, 7) + b"ima-sig" + struct.pack("<I", len(data)) + data


def _variable(name: str, value: bytes) -> bytes:
    """Return a UEFI_VARIABLE_DATA."""
    return _GLOBAL + struct.pack("<QQ", len(name), len(value)) + name.encode("utf-16-le") + value


def _tag(number: int, text: bytes) -> bytes:
    return struct.pack("<II", number, len(text)) + text


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def _signature(key: ec.EllipticCurvePrivateKey, message: bytes, name: str) -> bytes:
    """Return a TPMT_SIGNATURE."""
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(_HASHES[name], deterministic_signing=True)))
    head = struct.pack(">HH", tpm_format.ECDSA, tpm_format.HASH_IDS[name])
    return head + _sized(r.to_bytes(32, "big")) + _sized(s.to_bytes(32, "big"))


def _der(*certificates: x509.Certificate) -> bytes:
    return b"".join(each.public_bytes(Encoding.DER) for each in certificates)


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Cloister SOFT - protects nothing"),
        ]
    )


def _tpm_names() -> x509.SubjectAlternativeName:
    values = ((chains.MANUFACTURER, "id:534F4654"), (chains.MODEL, "soft"), (chains.VERSION, "id:00000001"))
    return x509.SubjectAlternativeName(
        [x509.DirectoryName(x509.Name([x509.NameAttribute(ObjectIdentifier(oid), text) for oid, text in values]))]
    )


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    serial: int,
    ca_depth: int | None = None,
    start: datetime = FIRST,
    end: datetime = LAST,
    usage: str = "",
    names: bool = False,
    agreement: bool = False,
) -> x509.Certificate:
    is_ca = ca_depth is not None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_ca and not agreement,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=agreement,
                key_cert_sign=is_ca,
                crl_sign=is_ca,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=ca_depth), critical=True)
    )
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ObjectIdentifier(usage)]), critical=False)
    if names:
        builder = builder.add_extension(_tpm_names(), critical=True)
    return builder.sign(issuer_key, hashes.SHA256(), ecdsa_deterministic=True)


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
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(start).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(key, hashes.SHA256(), ecdsa_deterministic=True).public_bytes(Encoding.DER)
