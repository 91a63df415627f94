"""DCAP quotes: bytes to frozen types, for every TEE of the vendor. Checks form only; nothing here is believed.

Source: Intel SGX ECDSA QuoteLibReference DCAP API, appendix A.4 (quote format 3); Intel TDX DCAP Quoting Library API,
appendix A (quote format 4 and 5). Little-endian unless said:

    header 48        u16 version | u16 attestation key type (2) | u32 TEE type (0 SGX, 0x81 TDX) | u32 reserved or QE and
                     PCE SVN | QE vendor id 16 | user data 20
    body             v3: enclave report 384;  v4: TD report 584;  v5: u16 type | u32 length | report
    u32              length of everything after this field
    signature 64     r || s, big-endian, over everything before the length
    key 64           attestation key, x || y
    v4, v5           u16 6 | u32 length, holding the rest:
      QE report 384 | signature 64 | u16 n | authentication data n | u16 5 | u32 length | PEM chain leaf .. root

Bytes after the end are refused. Firmware pads quotes with zeros (a real one: 4,936 bytes in a buffer of 5,006); `extent` is
for those who read buffers, so that what travels is exactly the quote. White space inside the PEM chain is not signed:
never use the hash of a quote as an identity or against replay.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, TypeVar

from cloister.attestation.form import FormError, Reader
from cloister.errors import EvidenceError, Reason

HEADER_BYTES: Final = 48
QE_REPORT_BYTES: Final = 384
ECDSA_P256: Final = 2
INTEL_QE: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
CERTIFICATION_QE_REPORT: Final = 6
CERTIFICATION_PEM_CHAIN: Final = 5
CHAIN_CERTIFICATES: Final = 3
"""PCK certificate, PCK CA, root."""
CERTIFICATE_LIMIT: Final = 8192
"""Largest DER certificate accepted; real ones have 0.6 to 1.3 kB."""
REPORT_DATA_BYTES: Final = 64
SGX_REPORT_DATA: Final = slice(320, 384)
"""REPORTDATA of an enclave report, the quoting enclave's too."""

_PEM: Final = re.compile(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\r\n]+)-----END CERTIFICATE-----\s*")


@dataclass(frozen=True, slots=True)
class Tee:
    """One TEE of the vendor: which quotes and which collateral are its own."""

    kind: str
    """Kind of evidence: prefix of every step, and of the TEE type."""
    title: str
    tee_type: int
    bodies: Mapping[int, Mapping[int, int]]
    """Quote version -> body type -> size in bytes. Versions before 5 have one body and no type: 0."""
    tcb_info: str
    """`id` of its TCB info."""
    qe_identity: str
    """`id` of the identity of its quoting enclave."""

    def step(self, name: str) -> str:
        """Return the full name of a step, such as `tdx.1-format`."""
        return f"{self.kind}.{name}"


@dataclass(frozen=True, slots=True)
class Quote:
    """One quote, taken apart. `signed` is what the attestation key signs; the rest explains that key."""

    version: int
    signed: bytes
    report: bytes
    """The TEE's report: what the hardware measured."""
    signature: bytes
    attestation_key: bytes
    qe_report: bytes
    qe_report_signature: bytes
    qe_auth_data: bytes
    certificates: tuple[bytes, ...]
    """DER, as the quote carries them: PCK certificate, PCK CA, root."""

    FIELDS: ClassVar[Mapping[str, tuple[int, int]]]
    """Name -> (offset, size) in the report; what lies behind a shorter report is not there."""
    REPORT_DATA: ClassVar[slice]
    FLAGS: ClassVar[slice]
    """Where the switches are, little-endian."""
    SWITCHES: ClassVar[Mapping[str, int]]
    """Name -> bit of `FLAGS`; every TEE has `debug`."""

    @property
    def report_data(self) -> bytes:
        """The 64 bytes that the program chose."""
        return self.report[self.REPORT_DATA]

    @property
    def debug(self) -> bool:
        """Whether the host may read and write the TEE's memory."""
        return self.attributes()["debug"]

    def measurements(self) -> dict[str, bytes]:
        """Return every field of bytes of the report except REPORTDATA, by the vendor's name in lower case."""
        return {
            name: self.report[offset : offset + size]
            for name, (offset, size) in self.FIELDS.items()
            if offset + size <= len(self.report)
        }

    def attributes(self) -> dict[str, bool]:
        """Return the switches of the TEE."""
        bits = int.from_bytes(self.report[self.FLAGS], "little")
        return {name: bool(bits >> bit & 1) for name, bit in self.SWITCHES.items()}


Q = TypeVar("Q", bound=Quote)


def parse(data: bytes, tee: Tee, make: type[Q]) -> Q:
    """Return the quote of `tee` in `data`, which holds nothing else.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    try:
        reader = Reader(data)
        quote = _quote(reader, tee, make)
        if reader.rest:
            raise FormError(f"{reader.rest} bytes after the end of the quote", "none")
    except FormError as error:
        raise malformed(error, tee) from error
    return quote


def extent(data: bytes, tee: Tee, make: type[Q]) -> int:
    """Return how many bytes of the buffer `data` the quote at its beginning has. Verifiers never trim: `parse`.

    Raises:
        EvidenceError: `evidence-malformed`: no quote.
    """
    try:
        reader = Reader(data)
        _quote(reader, tee, make)
    except FormError as error:
        raise malformed(error, tee) from error
    return reader.at


def without_padding(data: bytes, tee: Tee, make: type[Quote]) -> bytes:
    """Return `data` without the zero bytes that firmware appends to a quote. For attesters; verifiers never trim.

    Raises:
        EvidenceError: `evidence-malformed`: no quote, or something other than zeros after it.
    """
    end = extent(data, tee, make)
    if data[end:].strip(b"\x00"):
        raise malformed(FormError("bytes other than zero after the end of the quote", "zero padding"), tee)
    return data[:end]


def _quote(reader: Reader, tee: Tee, make: type[Q]) -> Q:
    header = reader.take(HEADER_BYTES, "quote header")
    version, key_type, tee_type = struct.unpack_from("<HHI", header)
    bodies = tee.bodies.get(version)
    if bodies is None:
        raise FormError(f"quote version {version}", " or ".join(map(str, tee.bodies)))
    if tee_type != tee.tee_type:
        raise FormError(f"TEE type {tee_type:#x}", f"{tee.tee_type:#x}, {tee.title}")
    if key_type != ECDSA_P256:
        raise FormError(f"attestation key type {key_type}", f"{ECDSA_P256}, ECDSA P-256")
    if header[12:28] != INTEL_QE:
        raise FormError(f"QE vendor {header[12:28].hex()}", INTEL_QE.hex())
    prefix = b""
    if version < 5:
        report = reader.take(bodies[0], f"{tee.title} report")
    else:
        prefix = reader.take(6, "body header")
        body_type, size = struct.unpack("<HI", prefix)
        if bodies.get(body_type) != size:
            wanted = " or ".join(f"type {each} of {bodies[each]} bytes" for each in bodies)
            raise FormError(f"body type {body_type} of {size} bytes", wanted)
        report = reader.take(size, f"{tee.title} report")
    auth = Reader(reader.take(reader.number("<I", "length"), "signature data"))
    signature = auth.take(64, "signature")
    key = auth.take(64, "attestation key")
    qe = auth if version < 4 else _certification(auth, CERTIFICATION_QE_REPORT)
    qe_report = qe.take(QE_REPORT_BYTES, "QE report")
    qe_signature = qe.take(64, "QE report signature")
    qe_auth = qe.take(qe.number("<H", "length"), "QE authentication data")
    chain = _certification(qe, CERTIFICATION_PEM_CHAIN)
    return make(
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


def _certification(outer: Reader, wanted: int) -> Reader:
    """Return a reader of the certification data that fills the rest of `outer`."""
    kind = outer.number("<H", "certification data type")
    if kind != wanted:
        raise FormError(f"certification data type {kind}", str(wanted))
    inner = Reader(outer.take(outer.number("<I", "length"), "certification data"))
    if outer.rest:
        raise FormError(f"{outer.rest} bytes after certification data of type {kind}", "none")
    return inner


def _certificates(pem: bytes) -> tuple[bytes, ...]:
    text = pem.removesuffix(b"\x00")
    found: list[bytes] = []
    at = 0
    while at < len(text):
        match = _PEM.match(text, at)
        if match is None or len(found) == CHAIN_CERTIFICATES:
            raise FormError("a certificate chain of another form", f"{CHAIN_CERTIFICATES} PEM certificates")
        try:
            der = base64.b64decode(b"".join(match[1].split()), validate=True)
        except ValueError as error:
            raise FormError("a certificate that is not base64", "PEM") from error
        if len(der) > CERTIFICATE_LIMIT:
            raise FormError(f"a certificate of {len(der)} bytes", f"at most {CERTIFICATE_LIMIT}")
        found.append(der)
        at = match.end()
    if len(found) != CHAIN_CERTIFICATES:
        raise FormError(f"{len(found)} certificates", str(CHAIN_CERTIFICATES))
    return tuple(found)


def malformed(error: FormError, tee: Tee) -> EvidenceError:
    """Return the refusal of a quote whose form is wrong."""
    return EvidenceError(
        f"the {tee.title} quote does not parse",
        code="evidence-malformed",
        reasons=[Reason(tee.step("1-format"), error.found, error.wanted)],
    )


def refuse_parts(parts: Mapping[str, bytes], known: frozenset[str], tee: Tee) -> None:
    """Refuse parts of evidence that no step reads: what is ignored here might be believed elsewhere.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    if unknown := sorted(set(parts) - known):
        wanted = f"at most {', '.join(sorted(known))}" if known else "no parts"
        raise malformed(FormError(f"part {', '.join(unknown)}"[:200], wanted), tee)
