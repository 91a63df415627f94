"""SEV-SNP reports, their endorsement certificates and certificate tables: bytes to frozen types. Form only; nothing here is
believed.

Source: AMD SEV Secure Nested Paging Firmware ABI Specification (publication 56860, revision 1.58), ATTESTATION_REPORT; its
sections on TCB_VERSION, guest policy and PLATFORM_INFO. 0x4A0 bytes, little-endian:

    000 u32 version           2, 3, 4 or 5           0E0 id_key_digest 48
    004 u32 guest_svn                                110 author_key_digest 48
    008 u64 policy            `POLICY`               140 report_id 32, 160 report_id_ma 32
    010 family_id 16, 020 image_id 16                180 reported_tcb 8
    030 u32 vmpl              0 to 3                 188 CPUID family, model, stepping (version 3 and later)
    034 u32 signature_algo    1: ECDSA P-384         1A0 chip_id 64
    038 current_tcb 8                                1E0 committed_tcb 8
    040 u64 platform_info     `PLATFORM`             1E8 firmware: build, minor, major; 1EC the same, committed
    048 u32 key_info          `key_info`             1F0 launch_tcb 8
    050 report_data 64                               1F8 launch_mit_vector, 200 current_mit_vector (version 5)
    090 measurement 48                               2A0 signature: r 72, s 72, zero 368
    0C0 host_data 32

A TCB_VERSION is 8 bytes, whose meaning depends on the CPU's family (`LEGACY`, `TURIN`). Reserved bytes must be zero, also after
the signature, which does not cover them. Version 4 has no public specification: the public verifiers read it as
version 3, and so do we, without judging the 16 bytes at 1F8. Unknown versions are refused. Unknown bits of PLATFORM_INFO are not:
they say something about the host that we do not use. Unknown bits of the policy are: they could permit something.

VMPL 0xFFFFFFFF marks a report that the hypervisor asked for, with report data of nobody; it is refused.

Certificates: AMD Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface Specification (publication 57230), extensions
below 1.3.6.1.4.1.3704.1. Certificate table (configfs-tsm `auxblob`): GHCB specification (publication 56421), SNP Extended Guest
Request.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final, Literal

from cryptography.hazmat.primitives.asymmetric import ec

from cloister.attestation.pki import asn1
from cloister.attestation.pki.certificate import Certificate
from cloister.errors import EvidenceError, Reason

WHERE: Final = "sev-snp.1-format"

REPORT_BYTES: Final = 0x4A0
SIGNED_BYTES: Final = 0x2A0
VERSIONS: Final = (2, 3, 4, 5)
ECDSA_P384_SHA384: Final = 1
TURIN_FAMILY: Final = 0x1A
HIGHEST_VMPL: Final = 3

REPORT_DATA: Final = slice(0x50, 0x90)
# name -> (offset, size): what a reference value can name
FIELDS: Final[dict[str, tuple[int, int]]] = {
    "family_id": (0x10, 16),
    "image_id": (0x20, 16),
    "measurement": (0x90, 48),
    "host_data": (0xC0, 32),
    "id_key_digest": (0xE0, 48),
    "author_key_digest": (0x110, 48),
    "report_id": (0x140, 32),
    "report_id_ma": (0x160, 32),
}
TCBS: Final[dict[str, int]] = {"current": 0x38, "reported": 0x180, "committed": 0x1E0, "launch": 0x1F0}
# version -> (first, end) of bytes that are reserved
_RESERVED: Final = ((0x4C, 0x50), (0x1EB, 0x1EC), (0x1EF, 0x1F0), (0x208, 0x2A0), (0x2A0 + 144, REPORT_BYTES))
_RESERVED_BY: Final[dict[int, tuple[tuple[int, int], ...]]] = {
    2: ((0x188, 0x1A0), (0x1F8, 0x208)),
    3: ((0x18B, 0x1A0), (0x1F8, 0x208)),
    4: ((0x18B, 0x1A0),),
    5: ((0x18B, 0x1A0),),
}

# names of the bits; ABI specification, guest policy and PLATFORM_INFO
POLICY: Final[dict[str, int]] = {
    "policy_smt": 16,
    "migrate_ma": 18,
    "debug": 19,
    "single_socket": 20,
    "cxl_allow": 21,
    "aes_256_xts": 22,
    "policy_rapl_disabled": 23,
    "policy_ciphertext_hiding": 24,
    "page_swap_disable": 25,
}
POLICY_MUST_BE_ONE: Final = 17
POLICY_FIRST_RESERVED: Final = 26
PLATFORM: Final[dict[str, int]] = {
    "smt": 0,
    "tsme": 1,
    "ecc": 2,
    "rapl_disabled": 3,
    "ciphertext_hiding": 4,
    "alias_check_complete": 5,
    "tio": 7,
}

Signer = Literal["vcek", "vlek"]
SIGNERS: Final[dict[int, Signer]] = {0: "vcek", 1: "vlek"}
"""key_info, SIGNING_KEY; 7 is a report that nobody signed."""

Line = Literal["Milan", "Genoa", "Turin"]
LINES: Final[dict[str, Line]] = {
    "Milan": "Milan",
    "Genoa": "Genoa",
    "Bergamo": "Genoa",
    "Siena": "Genoa",
    "Turin": "Turin",
}
"""Product, as a certificate names it without stepping -> product line, whose root endorses it."""
FAMILIES: Final[dict[Line, int]] = {"Milan": 0x19, "Genoa": 0x19, "Turin": TURIN_FAMILY}

_OID: Final = "1.3.6.1.4.1.3704.1."
PRODUCT_OID: Final = _OID + "2"
HWID_OID: Final = _OID + "4"
CSP_OID: Final = _OID + "5"
TCB_OIDS: Final[dict[str, str]] = {
    "bootloader": _OID + "3.1",
    "tee": _OID + "3.2",
    "snp": _OID + "3.3",
    "microcode": _OID + "3.8",
    "fmc": _OID + "3.9",
}
SPARE_OIDS: Final = tuple(f"{_OID}3.{number}" for number in (4, 5, 6, 7))
"""Components that the report has as reserved bytes."""

# component -> byte of TCB_VERSION
LEGACY: Final[dict[str, int]] = {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7}
"""Family 0x19: Milan, Genoa, Bergamo, Siena."""
TURIN: Final[dict[str, int]] = {"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7}
"""Family 0x1A."""

TABLE_LIMIT: Final = 256 * 1024
"""Largest certificate table accepted, in bytes; hosts give 4 to 20 kB."""
TABLE_ENTRIES: Final = 16
GUIDS: Final[dict[str, bytes]] = {
    "vcek": bytes.fromhex("63da758de6644564adc5f4b93be8accd"),
    "vlek": bytes.fromhex("a8074bc2a25a483eaae639c045a0b8a1"),
    "ask": bytes.fromhex("4ab7b379bbac4fe4a02f05aef327c782"),
    "ark": bytes.fromhex("c0b406a4a80349529743" + "3fb6014cd0ae"),
}
"""In the order in which they are written, as hosts write them. `ask` is the ASVK where the leaf is a VLEK."""
_NAMES: Final = {guid: name for name, guid in GUIDS.items()}


@dataclass(frozen=True, slots=True)
class Tcb:
    """Security version numbers of one platform state, 0 to 255 each."""

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None = None
    """First mutable code; Turin only."""

    def components(self) -> dict[str, int]:
        """Return the numbers by name, `fmc` only where the platform has one."""
        named = {"bootloader": self.bootloader, "tee": self.tee, "snp": self.snp, "microcode": self.microcode}
        return named if self.fmc is None else {"fmc": self.fmc, **named}

    def encode(self) -> bytes:
        """Return the 8 bytes of TCB_VERSION."""
        data = bytearray(8)
        for name, value in self.components().items():
            data[(LEGACY if self.fmc is None else TURIN)[name]] = value
        return bytes(data)


def tcb(raw: bytes, *, turin: bool, what: str) -> Tcb:
    """Return the numbers in the 8 bytes `raw`, in Turin's layout or the older one.

    Raises:
        EvidenceError: `evidence-malformed`: a reserved byte is not zero.
    """
    layout = TURIN if turin else LEGACY
    if any(raw[index] for index in range(8) if index not in layout.values()):
        raise _malformed(f"{what} TCB {raw.hex()}", "reserved bytes zero")
    return Tcb(**{name: raw[index] for name, index in layout.items()})


@dataclass(frozen=True, slots=True)
class Firmware:
    """Version of the SNP firmware."""

    major: int
    minor: int
    build: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.build}"


@dataclass(frozen=True, slots=True)
class Report:
    """One attestation report, taken apart."""

    version: int
    guest_svn: int
    policy: int
    vmpl: int
    platform_info: int
    author_key: bool
    """The launch's ID block was signed by an author key."""
    mask_chip_key: bool
    signer: Signer
    family: int | None
    """CPUID family of the CPU; None before version 3."""
    model: int | None
    stepping: int | None
    chip_id: bytes
    """64 bytes; zero where the host masks it."""
    current: Firmware
    committed: Firmware
    launch_mit_vector: int | None
    """Bit mask of mitigations; None before version 5."""
    current_mit_vector: int | None
    data: bytes
    """All 1184 bytes."""
    r: int
    s: int

    @property
    def signed(self) -> bytes:
        """What the endorsement key signs."""
        return self.data[:SIGNED_BYTES]

    @property
    def report_data(self) -> bytes:
        """The 64 bytes that the guest chose."""
        return self.data[REPORT_DATA]

    @property
    def debug(self) -> bool:
        return bool(self.policy >> POLICY["debug"] & 1)

    @property
    def abi(self) -> tuple[int, int]:
        """Least ABI version that the guest's owner wants, major and minor."""
        return self.policy >> 8 & 0xFF, self.policy & 0xFF

    def measurements(self) -> dict[str, bytes]:
        """Return what a reference value can name, by the specification's names in lower case."""
        return {name: self.data[offset : offset + size] for name, (offset, size) in FIELDS.items()}

    def tcb_bytes(self, name: str) -> bytes:
        """Return the 8 bytes of the `current`, `reported`, `committed` or `launch` TCB."""
        return self.data[TCBS[name] : TCBS[name] + 8]

    def tcb(self, name: str, *, turin: bool) -> Tcb:
        """Return the `current`, `reported`, `committed` or `launch` TCB.

        Raises:
            EvidenceError: `evidence-malformed`: a reserved byte is not zero.
        """
        return tcb(self.tcb_bytes(name), turin=turin, what=name)

    def attributes(self) -> dict[str, bool]:
        """Return the bits of policy (but `debug`) and platform by name."""
        bits = {name: bool(self.platform_info >> bit & 1) for name, bit in PLATFORM.items()}
        return bits | {name: bool(self.policy >> bit & 1) for name, bit in POLICY.items() if name != "debug"}


def parse(data: bytes) -> Report:
    """Return the report that is exactly `data`.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    if len(data) != REPORT_BYTES:
        raise _malformed(f"{len(data)} bytes", f"a report of {REPORT_BYTES} bytes")
    version, guest_svn, policy = struct.unpack_from("<IIQ", data)
    vmpl, algorithm = struct.unpack_from("<II", data, 0x30)
    platform_info, key_info = struct.unpack_from("<QI", data, 0x40)
    if version not in VERSIONS:
        raise _malformed(f"report version {version}", " or ".join(map(str, VERSIONS)))
    if algorithm != ECDSA_P384_SHA384:
        raise _malformed(f"signature algorithm {algorithm}", f"{ECDSA_P384_SHA384}, ECDSA P-384 with SHA-384")
    for first, end in (*_RESERVED, *_RESERVED_BY[version]):
        if any(data[first:end]):
            raise _malformed(f"bytes {first:#x} to {end - 1:#x} not zero", "reserved bytes zero")
    if not policy >> POLICY_MUST_BE_ONE & 1 or policy >> POLICY_FIRST_RESERVED:
        raise _malformed(
            f"guest policy {policy:#x}", f"bit {POLICY_MUST_BE_ONE} one, from bit {POLICY_FIRST_RESERVED} zero"
        )
    if vmpl > HIGHEST_VMPL:
        raise _malformed(f"VMPL {vmpl:#x}", f"0 to {HIGHEST_VMPL}: the guest asked for the report, not the host")
    if key_info >> 5 or (key_info >> 2 & 7) not in SIGNERS:
        raise _malformed(f"key information {key_info:#x}", "signed by a VCEK (0) or a VLEK (1)")
    r, s = (int.from_bytes(data[at : at + 72], "little") for at in (0x2A0, 0x2E8))
    if r >> 384 or s >> 384:
        raise _malformed("a signature of more than 384 bits", "r and s of P-384")
    mitigations = struct.unpack_from("<QQ", data, 0x1F8) if version >= 5 else (None, None)
    cpu = (data[0x188], data[0x189], data[0x18A]) if version >= 3 else (None, None, None)
    return Report(
        version=version,
        guest_svn=guest_svn,
        policy=policy,
        vmpl=vmpl,
        platform_info=platform_info,
        author_key=bool(key_info & 1),
        mask_chip_key=bool(key_info & 2),
        signer=SIGNERS[key_info >> 2 & 7],
        family=cpu[0],
        model=cpu[1],
        stepping=cpu[2],
        chip_id=data[0x1A0:0x1E0],
        current=Firmware(data[0x1EA], data[0x1E9], data[0x1E8]),
        committed=Firmware(data[0x1EE], data[0x1ED], data[0x1EC]),
        launch_mit_vector=mitigations[0],
        current_mit_vector=mitigations[1],
        data=data,
        r=r,
        s=s,
    )


@dataclass(frozen=True, slots=True)
class Leaf:
    """What the certificate of an endorsement key says about its platform."""

    signer: Signer
    product: str
    """As it is written there: `Milan-B0` in a VCEK, `Milan` in a VLEK."""
    line: Line
    tcb: Tcb
    hwid: bytes
    """VCEK: 64 bytes, 8 on Turin. VLEK: empty."""
    csp_id: str
    """VLEK: the cloud that the key was lent to, such as `CN=cc-us-east-2.amazonaws.com`. VCEK: empty."""


@lru_cache(maxsize=256)
def leaf(certificate: Certificate) -> Leaf:
    """Return what the VCEK or VLEK `certificate` says.

    Raises:
        EvidenceError: `evidence-malformed`: an extension is missing or does not parse, or the key is not of P-384.
    """
    if not isinstance(certificate.key, ec.EllipticCurvePublicKey) or certificate.key.curve.name != "secp384r1":
        raise _malformed("an endorsement key of another type", "P-384")
    signer = {"SEV-VCEK": SIGNERS[0], "SEV-VLEK": SIGNERS[1]}.get(common_name(certificate))
    if signer is None:
        raise _malformed(f"a certificate of {certificate.subject[:120]!r}", "CN=SEV-VCEK or CN=SEV-VLEK")
    found = certificate.extensions
    product = _text(found, PRODUCT_OID, "product")
    line = LINES.get(product.partition("-")[0])
    if line is None:
        raise _malformed(f"product {product[:40]!r}", " or ".join(sorted(LINES)))
    turin = line == "Turin"
    numbers = {name: _number(found, TCB_OIDS[name], name) for name in (TURIN if turin else LEGACY)}
    for oid in SPARE_OIDS:
        if oid in found and _number(found, oid, "a spare component"):
            raise _malformed(f"extension {oid} not zero", "spare TCB components zero")
    hwid, csp_id = b"", ""
    if signer == "vcek":
        hwid = _octets(found.get(HWID_OID, b""), 8 if turin else 64)
    else:
        csp_id = _text(found, CSP_OID, "CSP_ID")
        if not csp_id:
            raise _malformed("an empty CSP_ID", "the name of a cloud")
    if (HWID_OID in found) != (signer == "vcek") or (CSP_OID in found) != (signer == "vlek"):
        raise _malformed(f"a {signer.upper()} certificate with HWID and CSP_ID", "HWID in a VCEK, CSP_ID in a VLEK")
    return Leaf(signer, product, line, Tcb(**numbers), hwid, csp_id)


def leaf_subject(about: Leaf) -> str:
    """Return the subject of the endorsement that holds this leaf (`endorsements.py`)."""
    if about.signer == "vlek":
        return f"vlek/{about.csp_id}"
    return f"vcek/{about.hwid.hex()}/{about.tcb.encode().hex()}"


def wanted_subject(report: Report) -> str:
    """Return the subject of the endorsement whose VCEK signed `report`: its chip, as AMD's server names it, and reported TCB."""
    chip = report.chip_id if any(report.chip_id[8:]) else report.chip_id[:8]  # 8 bytes on Turin
    return f"vcek/{chip.hex()}/{report.tcb_bytes('reported').hex()}"


@lru_cache(maxsize=256)
def common_name(certificate: Certificate) -> str:
    """Return the last common name of the subject, or nothing."""
    try:
        pairs = asn1.name(certificate.subject_der)
    except (ValueError, TypeError, KeyError):  # nothing that AMD writes
        return ""
    return next((text for oid, text in reversed(pairs) if oid == asn1.COMMON_NAME), "")


def _number(found: dict[str, bytes], oid: str, what: str) -> int:
    value = found.get(oid, b"")
    # INTEGER, 0 to 255 (X.690, 8.3): one byte, or two with a leading zero
    if value[:2] == b"\x02\x01" and len(value) == 3 and value[2] < 0x80:
        return value[2]
    if value[:3] == b"\x02\x02\x00" and len(value) == 4 and value[3] >= 0x80:
        return value[3]
    raise _malformed(f"{what} {value[:8].hex() or 'missing'} in extension {oid}", "an INTEGER of 0 to 255")


def _text(found: dict[str, bytes], oid: str, what: str) -> str:
    value = found.get(oid, b"")
    # IA5String, short form of length
    if value[:1] == b"\x16" and len(value) >= 2 and value[1] == len(value) - 2 < 0x80:
        text = value[2:].decode("ascii", "replace")
        if text.isascii() and text.isprintable():
            return text
    raise _malformed(f"{what} {value[:40].hex() or 'missing'} in extension {oid}", "an IA5String that prints")


def _octets(value: bytes, size: int) -> bytes:
    if len(value) == size:
        return value
    if len(value) == size + 2 and value[:2] == bytes([0x04, size]):
        return value[2:]
    raise _malformed(f"HWID of {len(value)} bytes", f"{size} bytes, as they are or in an OCTET STRING")


def parse_table(data: bytes) -> MappingProxyType[str, bytes]:
    """Return the certificates of a certificate table by name (`vcek`, `vlek`, `ask`, `ark`); others are left out.

    What lies between and after the certificates is not looked at: hosts pad to pages, and nobody signs the table.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    if not 0 < len(data) <= TABLE_LIMIT:
        raise _malformed(f"a certificate table of {len(data)} bytes", f"1 to {TABLE_LIMIT} bytes")
    found: dict[str, bytes] = {}
    end = 0
    for index in range(TABLE_ENTRIES + 1):
        entry = data[index * 24 : index * 24 + 24]
        if len(entry) < 24:
            raise _malformed("a certificate table that ends in its index", "an entry of zeros after the last")
        if not any(entry):
            end = index * 24 + 24
            break
        offset, size = struct.unpack_from("<II", entry, 16)
        if size == 0 or offset + size > len(data):
            raise _malformed(f"an entry of {size} bytes at {offset}", f"within {len(data)} bytes")
        name = _NAMES.get(entry[:16])
        if name is None:
            continue
        if name in found:
            raise _malformed(f"two entries for {name.upper()}", "one")
        found[name] = data[offset : offset + size]
    else:
        raise _malformed(f"more than {TABLE_ENTRIES} entries", f"at most {TABLE_ENTRIES}")
    for index in range(end // 24 - 1):
        if struct.unpack_from("<I", data, index * 24 + 16)[0] < end:
            raise _malformed("a certificate inside the index", f"certificates from byte {end}")
    return MappingProxyType(found)


def table(certificates: dict[str, bytes]) -> bytes:
    """Return the certificate table of `certificates` (name -> DER), as a host gives it to its guest."""
    index, body = b"", b""
    start = 24 * (len(certificates) + 1)
    for name, der in certificates.items():
        index += GUIDS[name] + struct.pack("<II", start + len(body), len(der))
        body += der
    return index + bytes(24) + body


def _malformed(found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "the SEV-SNP evidence does not parse", code="evidence-malformed", reasons=[Reason(WHERE, found, wanted)]
    )
