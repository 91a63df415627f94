"""Nitro attestation documents: bytes to a frozen type. Checks form only; nothing here is believed.

Source: AWS Nitro Enclaves NSM API, "Nitro Enclaves Attestation Process", sections 2.2 and 3.2.2; the length of text and of
the whole document are ours.

    COSE_Sign1 (tag 18 or none), alg -35 (ES384), unprotected header empty, payload of at most 16,384 bytes:
      module_id      text, 1 to 128                        which enclave of which instance: i-0123..-enc0123..
      digest         "SHA384"
      timestamp      unsigned, more than 0                 milliseconds since 1970-01-01 UTC
      pcrs           {0..31: 48 bytes}, 1 to 32, with 0    the locked registers
      certificate    1 to 1,024 bytes                      DER; its key signs the document
      cabundle       [1 to 1,024 bytes], 1 to 7            DER, root first
      public_key     null, absent, or 1 to 1,024 bytes
      user_data      null, absent, or 0 to 1,024 bytes
      nonce          null, absent, or 0 to 1,024 bytes

Where that text and real documents differ, real documents count: an absent optional field arrives as null although section
3.2.2.1 forbids it, and section 2.2 gives 1,024 bytes to user_data and nonce where section 3.2.2.2 gives 512.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from cloister.attestation import cose
from cloister.errors import EvidenceError, Reason

WHERE: Final = "nitro.1-format"

PAYLOAD_LIMIT: Final = 16_384
LIMIT: Final = PAYLOAD_LIMIT + 256
"""Largest document accepted, in bytes: payload, headers and a signature of 96 bytes. Real ones have 4.4 to 4.7 kB."""
ES384: Final = -35
PCRS: Final = 32
PCR_BYTES: Final = 48
CERTIFICATE_LIMIT: Final = 1024
BUNDLE: Final = 7
"""With the leaf, the 8 certificates that `pki.path` takes. Real bundles have 4."""
DATA_LIMIT: Final = 1024
MODULE_ID_LIMIT: Final = 128
TIMESTAMP_LIMIT: Final = 253_402_300_800_000
"""Year 10000, in milliseconds: beyond it there is no date."""

MANDATORY: Final = frozenset({"module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"})
OPTIONAL: Final = frozenset({"public_key", "user_data", "nonce"})


@dataclass(frozen=True, slots=True)
class Document:
    """One attestation document, taken apart."""

    message: cose.Sign1 = field(repr=False)
    module_id: str
    timestamp: int
    """Milliseconds since 1970-01-01 UTC."""
    pcrs: Mapping[int, bytes]
    certificate: bytes = field(repr=False)
    cabundle: tuple[bytes, ...] = field(repr=False)
    """DER, root first."""
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None

    @property
    def debug(self) -> bool:
        """PCR0 of an enclave in debug mode is zero (AWS Nitro Enclaves user guide, "Enclave measurements")."""
        return not any(self.pcrs[0])


def parse(data: bytes) -> Document:
    """Return the document that is exactly `data`.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    try:
        return _document(cose.sign1(data, limit=LIMIT))
    except cose.FormError as error:
        raise EvidenceError(
            "the Nitro attestation document does not parse",
            code="evidence-malformed",
            reasons=[Reason(WHERE, error.found, error.wanted)],
        ) from error


def _document(message: cose.Sign1) -> Document:
    if message.algorithm != ES384:
        raise cose.FormError(f"algorithm {message.algorithm}", f"{ES384}, ES384")
    if message.unprotected:
        raise cose.FormError("an unprotected header", "none: it would not be signed")
    body = cose.loads(message.payload, limit=PAYLOAD_LIMIT)
    if not isinstance(body, dict) or not MANDATORY <= body.keys() <= MANDATORY | OPTIONAL:
        raise cose.FormError("a document with other fields", ", ".join(sorted(MANDATORY | OPTIONAL)))
    module_id, digest, timestamp = body["module_id"], body["digest"], body["timestamp"]
    if not (
        isinstance(module_id, str)
        and 0 < len(module_id) <= MODULE_ID_LIMIT
        and module_id.isascii()
        and module_id.isprintable()
    ):
        raise cose.FormError(f"module_id {module_id!r}"[:200], f"1 to {MODULE_ID_LIMIT} printable characters")
    if digest != "SHA384":
        raise cose.FormError(f"digest {digest!r}"[:200], "'SHA384'")
    if isinstance(timestamp, bool) or not isinstance(timestamp, int) or not 0 < timestamp < TIMESTAMP_LIMIT:
        raise cose.FormError(f"timestamp {timestamp!r}"[:200], "milliseconds since 1970")
    bundle = body["cabundle"]
    if not isinstance(bundle, list) or not 0 < len(bundle) <= BUNDLE:
        raise cose.FormError("a cabundle of another shape", f"1 to {BUNDLE} certificates")
    if any(each in bundle[:index] for index, each in enumerate(bundle)):
        raise cose.FormError("a certificate twice in the cabundle", "each once")
    return Document(
        message=message,
        module_id=module_id,
        timestamp=timestamp,
        pcrs=_pcrs(body["pcrs"]),
        certificate=_data(body["certificate"], "certificate", 1, CERTIFICATE_LIMIT),
        cabundle=tuple(_data(each, "a certificate of the cabundle", 1, CERTIFICATE_LIMIT) for each in bundle),
        public_key=_optional(body, "public_key", 1),
        user_data=_optional(body, "user_data", 0),
        nonce=_optional(body, "nonce", 0),
    )


def _pcrs(value: Any) -> Mapping[int, bytes]:
    if not isinstance(value, dict) or not 0 < len(value) <= PCRS:
        raise cose.FormError("pcrs of another shape", f"1 to {PCRS} registers")
    for index, content in value.items():
        if not isinstance(index, int) or not 0 <= index < PCRS:
            raise cose.FormError(f"register {index!r}"[:80], f"0 to {PCRS - 1}")
        if not isinstance(content, bytes) or len(content) != PCR_BYTES:
            raise cose.FormError(f"register {index} of another size", f"{PCR_BYTES} bytes")
    if 0 not in value:
        raise cose.FormError("no register 0", "register 0: it names the enclave and says whether it is debuggable")
    return MappingProxyType(dict(sorted(value.items())))


def _optional(body: Mapping[str, Any], name: str, least: int) -> bytes | None:
    value = body.get(name)
    return None if value is None else _data(value, name, least, DATA_LIMIT)


def _data(value: Any, what: str, least: int, most: int) -> bytes:
    if not isinstance(value, bytes) or not least <= len(value) <= most:
        size = f"of {len(value)} bytes" if isinstance(value, bytes) else "that is not bytes"
        raise cose.FormError(f"{what} {size}", f"{least} to {most} bytes")
    return value
