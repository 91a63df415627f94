"""TDX quotes: bytes to frozen types. Checks form only; nothing here is believed.

Source: Intel TDX DCAP Quoting Library API, appendix A (quote format 4 and 5). Little-endian unless said:

    header 48        u16 version (4, 5) | u16 attestation key type (2) | u32 TEE type (0x81) | u32 reserved |
                     QE vendor id 16 | user data 20
    body             v4: TD report 584;  v5: u16 type (2: 584 bytes, 3: 648 bytes) | u32 length | TD report
    u32              length of everything after this field
    signature 64     r || s, big-endian, over everything before the length
    key 64           attestation key, x || y
    u16 6 | u32      certification data, holding:
      QE report 384 | signature 64 | u16 n | authentication data n | u16 5 | u32 | PEM chain leaf .. root

Bytes after the end are refused. Firmware pads quotes with zeros (a real one: 4,936 bytes in a buffer of 5,006);
`without_padding` is for the attester, so that what travels is exactly the quote. White space inside the PEM chain is not
signed: never use the hash of a quote as an identity or against replay.
"""

from __future__ import annotations

import base64
import re
import struct
from dataclasses import dataclass
from typing import Final

from cloister.errors import EvidenceError, Reason

WHERE: Final = "tdx.1-format"

HEADER_BYTES: Final = 48
TD_REPORT_10_BYTES: Final = 584
TD_REPORT_15_BYTES: Final = 648
QE_REPORT_BYTES: Final = 384
TEE_TDX: Final = 0x81
ECDSA_P256: Final = 2
INTEL_QE: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
CERTIFICATION_QE_REPORT: Final = 6
CERTIFICATION_PEM_CHAIN: Final = 5
CHAIN_CERTIFICATES: Final = 3
"""PCK certificate, PCK CA, root."""
CERTIFICATE_LIMIT: Final = 8192
"""Largest DER certificate accepted; real ones have 0.6 to 1.3 kB."""

DEBUG_BIT: Final = 1
"""TDATTRIBUTES.TUD.DEBUG, bit 0."""

# name -> (offset, size) in the TD report; Intel TDX Module ABI, TDREPORT_STRUCT, names in lower case
FIELDS: Final[dict[str, tuple[int, int]]] = {
    "teetcbsvn": (0, 16),
    "mrseam": (16, 48),
    "mrsignerseam": (64, 48),
    "seamattributes": (112, 8),
    "tdattributes": (120, 8),
    "xfam": (128, 8),
    "mrtd": (136, 48),
    "mrconfigid": (184, 48),
    "mrowner": (232, 48),
    "mrownerconfig": (280, 48),
    "rtmr0": (328, 48),
    "rtmr1": (376, 48),
    "rtmr2": (424, 48),
    "rtmr3": (472, 48),
}
FIELDS_15: Final[dict[str, tuple[int, int]]] = {"teetcbsvn2": (584, 16), "mrservicetd": (600, 48)}
REPORT_DATA: Final = slice(520, 584)

_PEM: Final = re.compile(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\r\n]+)-----END CERTIFICATE-----\s*")
# PCK certificate, SGX extension 1.2.840.113741.1.13.1, member .4 FMSPC: OBJECT IDENTIFIER, then OCTET STRING of 6 bytes
_FMSPC: Final = bytes.fromhex("060a2a864886f84d010d01040406")


@dataclass(frozen=True, slots=True)
class Quote:
    """One TDX quote, taken apart. `signed` is what the attestation key signs; the rest explains that key."""

    version: int
    signed: bytes
    report: bytes
    """TD report, 584 or 648 bytes."""
    signature: bytes
    attestation_key: bytes
    qe_report: bytes
    qe_report_signature: bytes
    qe_auth_data: bytes
    certificates: tuple[bytes, ...]
    """DER, as the quote carries them: PCK certificate, PCK CA, root."""

    @property
    def report_data(self) -> bytes:
        """The 64 bytes that the program chose."""
        return self.report[REPORT_DATA]

    @property
    def debug(self) -> bool:
        return bool(self.report[FIELDS["tdattributes"][0]] & DEBUG_BIT)

    def measurements(self) -> dict[str, bytes]:
        """Return every field of the TD report except REPORT_DATA, by its name in lower case."""
        fields = FIELDS | FIELDS_15 if len(self.report) == TD_REPORT_15_BYTES else FIELDS
        return {name: self.report[offset : offset + size] for name, (offset, size) in fields.items()}

    def fmspc(self) -> str:
        """Return the FMSPC that the PCK certificate states, in upper-case hex.

        It only selects collateral; the verifier compares it with the signed TCB info.

        Raises:
            EvidenceError: `evidence-malformed`: the certificate has no FMSPC.
        """
        leaf = self.certificates[0]
        at = leaf.find(_FMSPC)
        if at < 0 or at + len(_FMSPC) + 6 > len(leaf):
            raise _malformed(_FormError("a PCK certificate without FMSPC", "the SGX extension 1.2.840.113741.1.13.1"))
        return leaf[at + len(_FMSPC) :][:6].hex().upper()


class _FormError(ValueError):
    def __init__(self, found: str, wanted: str) -> None:
        super().__init__(f"{found}, wanted {wanted}")
        self.found = found
        self.wanted = wanted


class _Reader:
    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def rest(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int, what: str) -> bytes:
        if size > self.rest:
            raise _FormError(f"{self.rest} bytes left", f"{size} bytes of {what}")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, code: str, what: str) -> int:
        value: int = struct.unpack(code, self.take(struct.calcsize(code), what))[0]
        return value


def parse(data: bytes) -> Quote:
    """Return the quote in `data`, which holds nothing else.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    try:
        reader = _Reader(data)
        quote = _quote(reader)
        if reader.rest:
            raise _FormError(f"{reader.rest} bytes after the end of the quote", "none")
    except _FormError as error:
        raise _malformed(error) from error
    return quote


def without_padding(data: bytes) -> bytes:
    """Return `data` without the zero bytes that firmware appends to a quote. For attesters; verifiers never trim.

    Raises:
        EvidenceError: `evidence-malformed`: no quote, or something other than zeros after it.
    """
    try:
        reader = _Reader(data)
        _quote(reader)
        padding = reader.take(reader.rest, "padding")
        if padding.strip(b"\x00"):
            raise _FormError("bytes other than zero after the end of the quote", "zero padding")
    except _FormError as error:
        raise _malformed(error) from error
    return data[: len(data) - len(padding)]


def _quote(reader: _Reader) -> Quote:
    header = reader.take(HEADER_BYTES, "quote header")
    version, key_type, tee_type = struct.unpack_from("<HHI", header)
    if version not in (4, 5):
        raise _FormError(f"quote version {version}", "4 or 5")
    if tee_type != TEE_TDX:
        raise _FormError(f"TEE type {tee_type:#x}", f"{TEE_TDX:#x}, TDX")
    if key_type != ECDSA_P256:
        raise _FormError(f"attestation key type {key_type}", f"{ECDSA_P256}, ECDSA P-256")
    if header[12:28] != INTEL_QE:
        raise _FormError(f"QE vendor {header[12:28].hex()}", INTEL_QE.hex())
    if version == 4:
        prefix = b""
        report = reader.take(TD_REPORT_10_BYTES, "TD report")
    else:
        prefix = reader.take(6, "body header")
        body_type, size = struct.unpack("<HI", prefix)
        if (body_type, size) not in ((2, TD_REPORT_10_BYTES), (3, TD_REPORT_15_BYTES)):
            raise _FormError(f"body type {body_type} of {size} bytes", "type 2 of 584 or type 3 of 648 bytes")
        report = reader.take(size, "TD report")
    auth = _Reader(reader.take(reader.number("<I", "length"), "signature data"))
    signature = auth.take(64, "signature")
    key = auth.take(64, "attestation key")
    qe = _certification(auth, CERTIFICATION_QE_REPORT)
    qe_report = qe.take(QE_REPORT_BYTES, "QE report")
    qe_signature = qe.take(64, "QE report signature")
    qe_auth = qe.take(qe.number("<H", "length"), "QE authentication data")
    chain = _certification(qe, CERTIFICATION_PEM_CHAIN)
    return Quote(
        version=version,
        signed=header + prefix + report,
        report=report,
        signature=signature,
        attestation_key=key,
        qe_report=qe_report,
        qe_report_signature=qe_signature,
        qe_auth_data=qe_auth,
        certificates=_certificates(chain.take(chain.rest, "certificate chain")),
    )


def _certification(outer: _Reader, wanted: int) -> _Reader:
    """Return a reader of the certification data that fills the rest of `outer`."""
    kind = outer.number("<H", "certification data type")
    if kind != wanted:
        raise _FormError(f"certification data type {kind}", str(wanted))
    inner = _Reader(outer.take(outer.number("<I", "length"), "certification data"))
    if outer.rest:
        raise _FormError(f"{outer.rest} bytes after certification data of type {kind}", "none")
    return inner


def _certificates(pem: bytes) -> tuple[bytes, ...]:
    text = pem.removesuffix(b"\x00")
    found: list[bytes] = []
    at = 0
    while at < len(text):
        match = _PEM.match(text, at)
        if match is None or len(found) == CHAIN_CERTIFICATES:
            raise _FormError("a certificate chain of another form", f"{CHAIN_CERTIFICATES} PEM certificates")
        try:
            der = base64.b64decode(b"".join(match[1].split()), validate=True)
        except ValueError as error:
            raise _FormError("a certificate that is not base64", "PEM") from error
        if len(der) > CERTIFICATE_LIMIT:
            raise _FormError(f"a certificate of {len(der)} bytes", f"at most {CERTIFICATE_LIMIT}")
        found.append(der)
        at = match.end()
    if len(found) != CHAIN_CERTIFICATES:
        raise _FormError(f"{len(found)} certificates", str(CHAIN_CERTIFICATES))
    return tuple(found)


def _malformed(error: _FormError) -> EvidenceError:
    return EvidenceError(
        "the TDX quote does not parse",
        code="evidence-malformed",
        reasons=[Reason(WHERE, error.found, error.wanted)],
    )
