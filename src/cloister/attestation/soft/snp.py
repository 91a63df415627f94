"""Soft SEV-SNP: bit-exact reports (versions 2 to 5) and full collateral under a test root. It protects nothing.

Every key here is derived from a published label, so everybody can make the same evidence about any program. Each fault can
be made at will. Whatever is emitted says so: the organization in every certificate, chip ids, the name of the cloud.

Pure: keys come from labels, time is an argument, signatures are deterministic, so equal arguments give equal bytes. The roots'
hashes are the constants `snp.roots.SOFT_...`.

    authority(line)      ARK, ASK, ASVK of a product line; once per process
    machine(...)         one machine: its endorsement key and certificate; once per machine
    report(machine, ..)  one signature
    evidence(...)        the report with its certificate, as an attester sends it
    endorsements(...)    chains and revocation lists of all lines; once per validity window

Two things are not as AMD makes them, and no verifier can see it. RSA moduli of 4096 bits have 32 prime factors of 128 bits (RFC 8017, 3.1
allows more than two), because such keys are found in milliseconds, and the salt of each RSASSA-PSS signature (RFC 8017, 8.1)
is a hash of what is signed. Certificates are put together by asn1crypto: `cryptography` writes neither serial number
0 nor such signatures. Formats: AMD 57230 (certificates), 56860 (report).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from asn1crypto import algos, core, crl, keys, pem, x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.attestation.endorsements import Endorsement
from cloister.attestation.events import fold
from cloister.attestation.pki import certificate
from cloister.attestation.snp import format as snp_format
from cloister.attestation.snp.format import Line, Signer, Tcb
from cloister.attestation.types import Event, Evidence

NOTICE: Final = "soft TEE: the test root's private key is public, so this protects nothing"
LABEL: Final = "cloister soft SEV-SNP root 1: everybody knows this key"
"""The published label. Another label gives roots that nobody pins: the case of a foreign root."""
KIND: Final = "sev-snp"
CSP_ID: Final = "CN=soft.cloister.invalid"
"""No cloud has it (RFC 2606, 2)."""
FIRST: Final = datetime(2020, 1, 1, tzinfo=UTC)
LAST: Final = datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)
"""Validity of authorities, and of leaves unless said."""
LIFETIME: Final = timedelta(days=30)
"""How long a revocation list is valid."""

POLICY: Final = 0x3_0000
"""SMT allowed, the bit that must be one; no debug, no migration."""
PLATFORM_INFO: Final = 0x27
"""SMT, TSME, ECC, and the alias check is complete."""
TCB: Final = Tcb(bootloader=4, tee=0, snp=24, microcode=219)
TURIN_TCB: Final = Tcb(bootloader=1, tee=1, snp=4, microcode=75, fmc=1)
FIRMWARE: Final = (1, 55, 40)
SERIALS: Final = {"ark": 1, "ask": 2, "asvk": 3}
CPUS: Final[dict[Line, tuple[int, int, int]]] = {"Milan": (0x19, 1, 1), "Genoa": (0x19, 0x11, 1), "Turin": (0x1A, 2, 1)}

_LINES: Final[tuple[Line, ...]] = ("Milan", "Genoa", "Turin")
_STEPPING: Final[dict[Line, str]] = {"Milan": "B0", "Genoa": "B1", "Turin": "C1"}
_PRIME_BITS: Final = 128
_ORDER: Final = int(  # of P-384, NIST SP 800-186, 3.2.1.4
    "FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973", 16
)
_SMALL: Final = math.prod(n for n in range(3, 2000, 2) if all(n % d for d in range(3, math.isqrt(n) + 1, 2)))
_SALT: Final = 48
_EXPONENT: Final = 65537
_SHA256_INFO: Final = bytes.fromhex("3031300d060960864801650304020105000420")  # RFC 8017, 9.2, note 1


@dataclass(frozen=True, slots=True)
class RsaKey:
    """A published RSA key."""

    modulus: int
    parts: tuple[tuple[int, int, int], ...]
    """prime, private exponent of it, and its coefficient for the Chinese remainder theorem."""

    @property
    def public(self) -> keys.PublicKeyInfo:
        """SubjectPublicKeyInfo."""
        return _rsa_public(self.modulus)

    @property
    def size(self) -> int:
        """Bytes of modulus and signatures."""
        return self.modulus.bit_length() // 8

    def sign(self, message: bytes) -> bytes:
        """Return the RSASSA-PSS signature with SHA-384 of `message` (RFC 8017, 8.1.1 and 9.1.1)."""
        digest = hashlib.sha384(message).digest()
        salt = hashlib.sha384(b"cloister/soft-snp/salt/1\x00" + digest).digest()
        hashed = hashlib.sha384(bytes(8) + digest + salt).digest()
        block = bytes(self.size - len(hashed) - 1 - _SALT - 1) + b"\x01" + salt
        mask = b"".join(hashlib.sha384(hashed + n.to_bytes(4, "big")).digest() for n in range(10))[: len(block)]
        encoded = (int.from_bytes(block, "big") ^ int.from_bytes(mask, "big")) & ((1 << 8 * len(block) - 1) - 1)
        return self._raw(encoded.to_bytes(len(block), "big") + hashed + b"\xbc")

    def sign_pkcs1(self, message: bytes) -> bytes:
        """Return the RSASSA-PKCS1-v1_5 signature with SHA-256 of `message` (RFC 8017, 8.2.1 and 9.2)."""
        info = _SHA256_INFO + hashlib.sha256(message).digest()
        return self._raw(b"\x00\x01" + b"\xff" * (self.size - len(info) - 3) + b"\x00" + info)

    def _raw(self, encoded: bytes) -> bytes:
        value = int.from_bytes(encoded, "big")
        signature = sum(pow(value, exponent, prime) * rest for prime, exponent, rest in self.parts) % self.modulus
        return signature.to_bytes(self.size, "big")


@lru_cache(maxsize=16)
def derive_rsa_key(label: str, bits: int = 4096) -> RsaKey:
    """Return the RSA key of a published `label`, of 2048 or 4096 bits. Nobody owns it."""
    primes: list[int] = []
    for index in range(bits // _PRIME_BITS):
        seed = hashlib.sha256(b"cloister/soft-snp/prime/1\x00" + f"{label}/{index}".encode()).digest()
        # the six highest bits are one, so the product of 32 (or 16) has exactly 4096 (2048) bits
        candidate = int.from_bytes(seed[:16], "big") | 0xFC << 120 | 1
        while not _is_prime(candidate) or candidate % _EXPONENT == 1 or candidate in primes:
            candidate += 2
        primes.append(candidate)
    modulus = math.prod(primes)
    parts = []
    for prime in primes:
        rest = modulus // prime
        parts.append((prime, pow(_EXPONENT, -1, prime - 1), rest * pow(rest, -1, prime)))
    return RsaKey(modulus, tuple(parts))


def _is_prime(number: int) -> bool:
    """Miller-Rabin with four bases: enough for a key that protects nothing."""
    if math.gcd(number, _SMALL) != 1:
        return False
    odd, twos = number - 1, 0
    while not odd & 1:
        odd, twos = odd >> 1, twos + 1
    for base in (2, 3, 5, 7):
        value = pow(base, odd, number)
        if value not in (1, number - 1) and not any(
            (value := value * value % number) == number - 1 for _ in range(twos - 1)
        ):
            return False
    return True


def derive_key(label: str) -> ec.EllipticCurvePrivateKey:
    """Return the P-384 key of a published `label`. Nobody owns it."""
    digest = hashlib.sha512(b"cloister/soft-snp/key/1\x00" + label.encode()).digest()
    return ec.derive_private_key(int.from_bytes(digest, "big") % (_ORDER - 1) + 1, ec.SECP384R1())


@dataclass(frozen=True, slots=True)
class Authority:
    """What AMD is for real evidence, for one product line: DER certificates and their public "private" keys."""

    line: Line
    ark_key: RsaKey
    ark: bytes
    ask_key: RsaKey
    ask: bytes
    asvk_key: RsaKey
    asvk: bytes

    def issuer(self, signer: Signer) -> tuple[RsaKey, bytes]:
        """Return key and certificate that sign leaves of `signer`."""
        return (self.ask_key, self.ask) if signer == "vcek" else (self.asvk_key, self.asvk)


@lru_cache(maxsize=8)
def authority(line: Line = "Milan", label: str = LABEL) -> Authority:
    """Return the test authority of a product `line`; lines share their keys."""
    ark_key, ask_key, asvk_key = (derive_rsa_key(f"{label}/{part}") for part in ("ark", "ask", "asvk"))
    names = (_name(f"ARK-{line}"), _name(f"SEV-{line}"), _name(f"SEV-VLEK-{line}"))
    certificates = [
        _certificate(
            name,
            key.public,
            names[0],
            ark_key,
            serial=SERIALS[part],
            extensions=_authority_extensions(root=part == "ark"),
        )
        for part, name, key in zip(("ark", "ask", "asvk"), names, (ark_key, ask_key, asvk_key), strict=True)
    ]
    return Authority(line, ark_key, certificates[0], ask_key, certificates[1], asvk_key, certificates[2])


@dataclass(frozen=True, slots=True)
class Machine:
    """One soft machine: what is the same in all of its reports."""

    line: Line
    signer: Signer
    chip_id: bytes
    """64 bytes; zero for a VLEK, as clouds mask it."""
    tcb: Tcb
    """What its certificate says."""
    key: ec.EllipticCurvePrivateKey
    leaf: bytes
    """DER of the VCEK or VLEK."""


@lru_cache(maxsize=64)
def machine(
    name: str = "soft",
    *,
    line: Line = "Milan",
    signer: Signer = "vcek",
    tcb: Tcb | None = None,
    csp_id: str = CSP_ID,
    label: str = LABEL,
    not_before: datetime = FIRST,
    not_after: datetime = LAST,
    issued_by: Signer | None = None,
    serial: int = 0,
    hwid: bytes | None = None,
    wrapped: bool = False,
) -> Machine:
    """Return the soft machine `name`.

    `tcb` is that of its certificate; `issued_by` lets the other authority sign it; `hwid` puts another chip into it, `wrapped` an
    OCTET STRING around that, as some of AMD's certificates have.
    """
    level = (TURIN_TCB if line == "Turin" else TCB) if tcb is None else tcb
    issuer = authority(line, label)
    chip = hashlib.sha512(b"cloister/soft-snp/chip/1\x00" + f"{label}/{name}".encode()).digest()
    if line == "Turin":
        chip = chip[:8].ljust(64, b"\x00")
    key = derive_key(f"{label}/{name}/{line}/{signer}/{level.encode().hex()}")
    product = f"{line}-{_STEPPING[line]}" if signer == "vcek" else line
    oid = snp_format.TCB_OIDS
    extensions = [
        (snp_format.PRODUCT_OID.removesuffix("2") + "1", core.Integer(1 if line == "Turin" else 0).dump()),
        (snp_format.PRODUCT_OID, core.IA5String(product).dump()),
        *((oid[part], core.Integer(value).dump()) for part, value in level.components().items()),
        *((spare, core.Integer(0).dump()) for spare in snp_format.SPARE_OIDS),
    ]
    if signer == "vcek":
        own = (chip[:8] if line == "Turin" else chip) if hwid is None else hwid
        extensions.append((snp_format.HWID_OID, core.OctetString(own).dump() if wrapped else own))
    else:
        extensions.append((snp_format.CSP_OID, core.IA5String(csp_id).dump()))
    by = issued_by or signer
    issuer_key = issuer.issuer(by)[0]
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    leaf = _certificate(
        _name(f"SEV-{signer.upper()}"),
        keys.PublicKeyInfo.load(public),
        _name(f"SEV-{line}" if by == "vcek" else f"SEV-VLEK-{line}"),
        issuer_key,
        serial=serial,
        extensions=[{"extn_id": oid, "extn_value": core.ParsableOctetString(value)} for oid, value in extensions],
        not_before=not_before,
        not_after=not_after,
    )
    return Machine(line, signer, chip if signer == "vcek" else bytes(64), level, key, leaf)


def report(
    machine: Machine,
    *,
    report_data: bytes,
    measurement: bytes,
    version: int = 3,
    guest_svn: int = 0,
    policy: int = POLICY,
    debug: bool = False,
    migrate: bool = False,
    vmpl: int = 0,
    platform_info: int = PLATFORM_INFO,
    host_data: bytes = bytes(32),
    id_key_digest: bytes = bytes(48),
    author_key_digest: bytes = bytes(48),
    reported: Tcb | None = None,
    committed: Tcb | None = None,
    current: Tcb | None = None,
    firmware: tuple[int, int, int] = FIRMWARE,
    committed_firmware: tuple[int, int, int] = FIRMWARE,
    chip_id: bytes | None = None,
    mask_chip_key: bool = False,
    signing_key: int | None = None,
    cpu: tuple[int, int, int] | None = None,
    mit_vector: int = 1,
    edit: tuple[tuple[int, bytes], ...] = (),
) -> bytes:
    """Return an attestation report of `machine`, 1184 bytes; every argument after `measurement` is a state or a fault.

    `edit` puts bytes at offsets before signing; `signing_key` is the number in the key information.

    Raises:
        ValueError: a value of the wrong size.
    """
    tcb = machine.tcb if reported is None else reported
    data = bytearray(snp_format.REPORT_BYTES)
    signing = {"vcek": 0, "vlek": 1}[machine.signer] if signing_key is None else signing_key
    flags = policy | debug << snp_format.POLICY["debug"] | migrate << snp_format.POLICY["migrate_ma"]
    key_info = any(author_key_digest) | mask_chip_key << 1 | signing << 2
    family, model, stepping = CPUS[machine.line] if cpu is None else cpu
    values: list[tuple[int, bytes, int]] = [
        (0x00, version.to_bytes(4, "little"), 4),
        (0x04, guest_svn.to_bytes(4, "little"), 4),
        (0x08, flags.to_bytes(8, "little"), 8),
        (0x30, vmpl.to_bytes(4, "little"), 4),
        (0x34, snp_format.ECDSA_P384_SHA384.to_bytes(4, "little"), 4),
        (0x38, (tcb if current is None else current).encode(), 8),
        (0x40, platform_info.to_bytes(8, "little"), 8),
        (0x48, key_info.to_bytes(4, "little"), 4),
        (0x50, report_data, 64),
        (0x90, measurement, 48),
        (0xC0, host_data, 32),
        (0xE0, id_key_digest, 48),
        (0x110, author_key_digest, 48),
        (0x140, hashlib.sha256(b"cloister/soft-snp/report-id/1\x00" + measurement).digest(), 32),
        (0x160, b"\xff" * 32, 32),  # no migration agent
        (0x180, tcb.encode(), 8),
        (0x1A0, machine.chip_id if chip_id is None else chip_id, 64),
        (0x1E0, (tcb if committed is None else committed).encode(), 8),
        (0x1E8, bytes(reversed(firmware)), 3),
        (0x1EC, bytes(reversed(committed_firmware)), 3),
        (0x1F0, tcb.encode(), 8),
    ]
    if version >= 3:
        values.append((0x188, bytes((family, model, stepping)), 3))
    if version >= 5:
        values += [(at, mit_vector.to_bytes(8, "little"), 8) for at in (0x1F8, 0x200)]
    for offset, value, size in values:
        if len(value) != size:
            raise ValueError(f"{len(value)} bytes at {offset:#x}, wanted {size}")
        data[offset : offset + size] = value
    for offset, value in edit:
        data[offset : offset + len(value)] = value
    return sign(machine, bytes(data))


def sign(machine: Machine, data: bytes) -> bytes:
    """Return the report `data` with the signature of `machine`'s key over its first 0x2A0 bytes."""
    algorithm = ec.ECDSA(SHA384(), deterministic_signing=True)
    r, s = decode_dss_signature(machine.key.sign(data[: snp_format.SIGNED_BYTES], algorithm))
    signature = r.to_bytes(72, "little") + s.to_bytes(72, "little")
    return data[: snp_format.SIGNED_BYTES] + signature + data[snp_format.SIGNED_BYTES + len(signature) :]


def evidence(
    machine: Machine,
    *,
    report_data: bytes,
    measurement: bytes,
    events: tuple[Event, ...] = (),
    table: bool = False,
    **rest: Any,
) -> Evidence:
    """Return what an attester on `machine` sends: it signs the log with the report data, and adds its certificate.

    `table`: all certificates as a host's certificate table instead. `rest` goes to `report`.
    """
    quote = report(machine, report_data=fold(report_data, events), measurement=measurement, **rest)
    parts = {"table": certificate_table(machine)} if table else {"leaf": machine.leaf}
    return Evidence(KIND, quote, events, MappingProxyType(parts))


def certificate_table(machine: Machine, label: str = LABEL) -> bytes:
    """Return the certificate table that the host of `machine` gives its guest, padded to a page."""
    issuer = authority(machine.line, label)
    found = {machine.signer: machine.leaf, "ask": issuer.issuer(machine.signer)[1], "ark": issuer.ark}
    table = snp_format.table(found)
    return table.ljust(-(-len(table) // 4096) * 4096, b"\x00")


def endorsements(
    issued: datetime,
    *,
    lifetime: timedelta = LIFETIME,
    revoked: Iterable[str] = (),
    number: int = 1,
    lines: tuple[Line, ...] = _LINES,
    label: str = LABEL,
) -> tuple[Endorsement, ...]:
    """Return chains and revocation lists for `lines`, the lists valid from `issued` for `lifetime`.

    `revoked` holds `ask` or `asvk`. The subjects end in `/soft`, so that they stand beside AMD's own.

    Raises:
        ValueError: `issued` has no time zone.
    """
    if issued.tzinfo is None:
        raise ValueError("`issued` has no time zone")
    start = issued.astimezone(UTC).replace(microsecond=0)
    serials = tuple(SERIALS[part] for part in revoked)
    found = []
    for line in lines:
        issuer = authority(line, label)
        for signer, middle in (("vcek", issuer.ask), ("vlek", issuer.asvk)):
            chain = b"".join(pem.armor("CERTIFICATE", each) for each in (middle, issuer.ark))
            found.append(Endorsement(KIND, f"{line}/{signer}/soft", chain))
        listed = revocation_list(issuer, serials, start, start + lifetime, number=number)
        found.append(Endorsement(KIND, f"{line}/crl/soft", listed))
    return tuple(found)


def leaf_endorsement(machine: Machine) -> Endorsement:
    """Return the leaf of `machine` as a relying party may have it, for evidence that brings none."""
    about = snp_format.leaf(certificate.from_der(machine.leaf, where=snp_format.WHERE))
    return Endorsement(KIND, snp_format.leaf_subject(about), machine.leaf)


def revocation_list(
    issuer: Authority, serials: tuple[int, ...], start: datetime, end: datetime, *, number: int = 1
) -> bytes:
    """Return the DER revocation list of `issuer`'s ARK."""
    body: dict[str, Any] = {
        "version": "v2",
        "signature": _algorithm(),
        "issuer": _name(f"ARK-{issuer.line}"),
        "this_update": x509.Time({"utc_time": start}),
        "next_update": x509.Time({"utc_time": end}),
        "crl_extensions": [
            {"extn_id": "crl_number", "extn_value": core.ParsableOctetString(core.Integer(number).dump())}
        ],
    }
    if serials:
        body["revoked_certificates"] = [
            {"user_certificate": serial, "revocation_date": x509.Time({"utc_time": start})} for serial in serials
        ]
    listed = crl.TbsCertList(body)
    signature = issuer.ark_key.sign(listed.dump())
    made = {"tbs_cert_list": listed, "signature_algorithm": _algorithm(), "signature": signature}
    return bytes(crl.CertificateList(made).dump())


@lru_cache(maxsize=16)
def _rsa_public(modulus: int) -> keys.PublicKeyInfo:
    key = keys.RSAPublicKey({"modulus": modulus, "public_exponent": _EXPONENT})
    return keys.PublicKeyInfo.load(keys.PublicKeyInfo.wrap(key, "rsa").dump())


@lru_cache(maxsize=32)
def _name(common: str) -> x509.Name:
    parts = {"organization_name": "Cloister SOFT - protects nothing", "common_name": common}
    return x509.Name.load(x509.Name.build(parts, use_printable=True).dump())


@lru_cache(maxsize=1)
def _algorithm() -> algos.SignedDigestAlgorithm:
    """RSASSA-PSS with SHA-384, MGF1 of SHA-384, and a salt of 48 bytes, as in AMD's certificates."""
    digest = {"algorithm": "sha384"}
    mask = {"algorithm": "mgf1", "parameters": digest}
    parameters = algos.RSASSAPSSParams({"hash_algorithm": digest, "mask_gen_algorithm": mask, "salt_length": _SALT})
    made = algos.SignedDigestAlgorithm({"algorithm": "rsassa_pss", "parameters": parameters})
    return algos.SignedDigestAlgorithm.load(made.dump())


def _authority_extensions(*, root: bool) -> list[dict[str, Any]]:
    usage = {"key_cert_sign", "crl_sign"} if root else {"key_cert_sign"}
    constraints: dict[str, Any] = {"ca": True} if root else {"ca": True, "path_len_constraint": 0}
    return [
        {"extn_id": "basic_constraints", "critical": True, "extn_value": x509.BasicConstraints(constraints)},
        {"extn_id": "key_usage", "critical": True, "extn_value": x509.KeyUsage(usage)},
    ]


def _certificate(
    subject: x509.Name,
    public: keys.PublicKeyInfo,
    issuer: x509.Name,
    issuer_key: RsaKey,
    *,
    serial: int,
    extensions: list[dict[str, Any]],
    not_before: datetime = FIRST,
    not_after: datetime = LAST,
) -> bytes:
    body = x509.TbsCertificate(
        {
            "version": "v3",
            "serial_number": serial,
            "signature": _algorithm(),
            "issuer": issuer,
            "validity": {
                "not_before": x509.Time({"utc_time": not_before}),
                "not_after": x509.Time({"utc_time": not_after}),
            },
            "subject": subject,
            "subject_public_key_info": public,
            "extensions": extensions,
        }
    )
    signature = issuer_key.sign(body.dump())
    made = {"tbs_certificate": body, "signature_algorithm": _algorithm(), "signature_value": signature}
    return bytes(x509.Certificate(made).dump())
