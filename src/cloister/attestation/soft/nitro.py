"""Soft Nitro: bit-exact attestation documents under a test root. It protects nothing.

Every key here is derived from a published label, so everybody can make the same evidence about any program. That is the
point: demonstrations, tests and CI walk the path of real evidence, and each fault can be made at will. Whatever is
emitted says so: subject names, module id, TEE type (`soft-nitro`).

Pure: keys come from labels, time is an argument, signatures are deterministic (RFC 6979), so equal arguments give equal
bytes. The root's hash is the constant `nitro.roots.SOFT_ROOT`.

    authority()        root, region, zone and instance authorities, as AWS stacks them; once per process and day
    enclave(...)       one enclave: its leaf certificate, which lives 3 hours
    document(...)      one signature
    endorsements(...)  revocation lists: AWS has none, tests want them

Formats: nitro/format.py; certificates as in the documents of 2022 (a region's lives 20 days, a zone's 5, an instance's about 1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cloister.attestation import cose
from cloister.attestation.endorsements import Endorsement, Endorsements

NOTICE: Final = "soft TEE: the test root's private key is public, so this protects nothing"
LABEL: Final = "cloister soft nitro root 1: everybody knows this key"
"""The published label. Another label gives a root that nobody pins: the case of a foreign root."""
FIRST: Final = datetime(2020, 1, 1, tzinfo=UTC)
LAST: Final = datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)
"""Validity of the root; that of the others follows `issued`."""
LEAF_LIFETIME: Final = timedelta(hours=3, seconds=3)
"""As AWS has it."""
CRL_LIFETIME: Final = timedelta(days=30)
RUNTIME_PCR: Final = 16

_ORDER: Final = int(  # of P-384, NIST SP 800-186, 3.2.1.4
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16
)
_LEVELS: Final = ("root", "region", "zone", "instance")
_LIFETIMES: Final = {"region": timedelta(days=20), "zone": timedelta(days=5), "instance": timedelta(days=2)}
"""From midnight. AWS gives an instance 1 day; 2 outlive a leaf that is issued at 23:59."""


def derive_key(label: str, curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    """Return the P-384 key of a published `label`, or one of another curve. Nobody owns it."""
    digest = hashlib.shake_256(b"cloister/soft-nitro/key/1\x00" + label.encode()).digest(64)
    if curve is None:
        return ec.derive_private_key(int.from_bytes(digest, "big") % (_ORDER - 1) + 1, ec.SECP384R1())
    # a scalar of 31 bytes is below the order of every curve of COSE
    return ec.derive_private_key(int.from_bytes(digest[:31], "big") + 1, curve)


@dataclass(frozen=True, slots=True)
class Authority:
    """What AWS is for real evidence: certificates root first, with their public "private" keys."""

    keys: tuple[ec.EllipticCurvePrivateKey, ...]
    certificates: tuple[x509.Certificate, ...]

    @property
    def root(self) -> x509.Certificate:
        return self.certificates[0]

    def bundle(self) -> tuple[bytes, ...]:
        """Return DER certificates, root first."""
        return tuple(each.public_bytes(Encoding.DER) for each in self.certificates)


@lru_cache(maxsize=16)
def authority(day: datetime, *, label: str = LABEL) -> Authority:
    """Return the test authorities of `label` that are valid from the day before `day`.

    Raises:
        ValueError: `day` has no time zone.
    """
    start = _midnight(day)
    keys = tuple(derive_key(f"{label}/{level}") for level in _LEVELS)
    names = tuple(_name(level) for level in _LEVELS)
    root = _certificate(names[0], keys[0], names[0], keys[0], 1, FIRST, LAST, path_length=None, authority=True)
    found = [root]
    for depth, level in enumerate(_LEVELS[1:], start=1):
        found.append(
            _certificate(
                names[depth],
                keys[depth],
                names[depth - 1],
                keys[depth - 1],
                serial=depth + 1,
                start=start - timedelta(hours=1),
                end=start + _LIFETIMES[level],
                path_length=len(_LEVELS) - 1 - depth,
                authority=True,
            )
        )
    return Authority(keys, tuple(found))


@dataclass(frozen=True, slots=True)
class Enclave:
    """One soft enclave: what is the same in all of its documents for three hours."""

    module_id: str
    key: ec.EllipticCurvePrivateKey
    serial: int
    """Serial number of the leaf, for revocation."""
    certificate: bytes
    bundle: tuple[bytes, ...]


@lru_cache(maxsize=64)
def enclave(
    name: str = "soft",
    *,
    issued: datetime,
    label: str = LABEL,
    lifetime: timedelta = LEAF_LIFETIME,
    curve: ec.EllipticCurve | None = None,
    leaf_is_authority: bool = False,
) -> Enclave:
    """Return the soft enclave `name` whose leaf is valid from `issued`; another `curve` is the case of a foreign key.

    Raises:
        ValueError: `issued` has no time zone.
    """
    issuer = authority(_midnight(issued), label=label)
    identity = hashlib.sha256(f"{label}/{name}".encode()).hexdigest()
    module_id = f"i-50f7{identity[:13]}-enc50f7{identity[13:25]}"
    key = derive_key(f"{label}/{name}/leaf", curve)
    serial = int(identity[32:], 16) >> 1 | 1
    start = issued.astimezone(UTC).replace(microsecond=0)
    leaf = _certificate(
        _name(module_id),
        key,
        issuer.certificates[-1].subject,
        issuer.keys[-1],
        serial,
        start,
        start + lifetime,
        path_length=None,
        authority=leaf_is_authority,
    )
    return Enclave(module_id, key, serial, leaf.public_bytes(Encoding.DER), issuer.bundle())


def document(
    machine: Enclave,
    *,
    pcr0: bytes,
    made: datetime,
    user_data: bytes | None = None,
    nonce: bytes | None = None,
    public_key: bytes | None = None,
    runtime: bytes | None = None,
    debug: bool = False,
    pcrs: Mapping[int, bytes] | None = None,
    bundle: tuple[bytes, ...] | None = None,
    certificate: bytes | None = None,
    algorithm: int = -35,
    tagged: bool = False,
    unprotected: Mapping[Any, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> bytes:
    """Return an attestation document of `machine`, made at `made`.

    Args:
        pcr0: hash of the enclave image, 48 bytes; `debug` makes PCR 0 to 2 zero, as the hypervisor does.
        runtime: value of PCR 16; None leaves it out, as unlocked registers are.
        pcrs: further registers, over the usual ones.
        bundle, certificate: other certificates than the machine's.
        changes: members of the map to replace, before it is signed; a value `...` leaves the member out.

    Raises:
        ValueError: a register of another size, or `made` has no time zone.
    """
    if made.tzinfo is None:
        raise ValueError("`made` has no time zone")
    registers = {index: bytes(48) for index in range(16)}
    if not debug:
        registers |= {0: pcr0, 1: _digest("kernel"), 2: _digest("application")}
    registers |= {3: _digest("role"), 4: hashlib.sha384(machine.module_id.partition("-enc")[0].encode()).digest()}
    if runtime is not None:
        registers[RUNTIME_PCR] = runtime
    registers |= pcrs or {}
    if any(len(value) != 48 for value in (pcr0, *registers.values())):
        raise ValueError("a register of another size than 48 bytes")
    body: dict[str, Any] = {
        "module_id": machine.module_id,
        "digest": "SHA384",
        "timestamp": int(made.timestamp() * 1000),
        "pcrs": registers,
        "certificate": machine.certificate if certificate is None else certificate,
        "cabundle": list(machine.bundle if bundle is None else bundle),
        "public_key": public_key,
        "user_data": user_data,
        "nonce": nonce,
    } | dict(changes or {})
    payload = cose.dumps({name: value for name, value in body.items() if value is not ...})
    return cose.sign(machine.key, payload, algorithm=algorithm, tagged=tagged, unprotected=unprotected or {})


def endorsements(
    issued: datetime,
    *,
    revoked: tuple[int, ...] = (),
    revoked_instances: tuple[int, ...] = (),
    lifetime: timedelta = CRL_LIFETIME,
    label: str = LABEL,
) -> Endorsements:
    """Return revocation lists valid from `issued`: of the instance authority (`revoked` leaves) and of the zone authority.

    AWS publishes none, and verification needs none; they are the cases of a revoked enclave and of stale lists.

    Raises:
        ValueError: `issued` has no time zone.
    """
    start = issued.astimezone(UTC).replace(microsecond=0)
    issuer = authority(_midnight(issued), label=label)
    return Endorsements(
        tuple(
            Endorsement("nitro", f"crl/{_LEVELS[depth]}", _crl(issuer, depth, serials, start, start + lifetime))
            for depth, serials in ((3, revoked), (2, revoked_instances))
        )
    )


def _midnight(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError("a time without a time zone")
    return moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _digest(what: str) -> bytes:
    return hashlib.sha384(f"cloister soft nitro {what} - protects nothing".encode()).digest()


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COUNTRY_NAME, "XX"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Cloister SOFT - protects nothing"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{common}.soft.nitro-enclaves"),
        ]
    )


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    serial: int,
    start: datetime,
    end: datetime,
    *,
    path_length: int | None,
    authority: bool,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .issuer_name(issuer)
        .serial_number(serial)
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=path_length), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=authority,
                crl_sign=authority,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=authority,
        )
    )
    return builder.sign(issuer_key, SHA384(), ecdsa_deterministic=True)


def _crl(issuer: Authority, depth: int, serials: tuple[int, ...], start: datetime, end: datetime) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificates[depth].subject)
        .last_update(start)
        .next_update(end)
        .add_extension(x509.CRLNumber(1), critical=False)
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(start).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(issuer.keys[depth], SHA256(), ecdsa_deterministic=True).public_bytes(Encoding.DER)
