"""SGX quotes: bytes to frozen types. Checks form only; nothing here is believed.

The frame of a quote is `dcap.format`'s: version 3 with an enclave report of 384 bytes. Version 4 and 5 can carry an enclave
report too; nobody's quoting enclave is known to make them, and dcap-qvl refuses them, so they are refused here.
Source of the report: Intel SDM volume 3D, 38.15 (REPORT); names of CONFIGID and the rest: Intel SGX SDK, `sgx_report_body_t`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from cloister.attestation.dcap import format as dcap_format
from cloister.attestation.dcap.format import Tee

REPORT_BYTES: Final = 384
TEE_SGX: Final = 0

SGX: Final = Tee(
    kind="sgx",
    title="SGX",
    tee_type=TEE_SGX,
    bodies={3: {0: REPORT_BYTES}},
    tcb_info="SGX",
    qe_identity="QE",
)

ATTRIBUTES: Final[dict[str, int]] = {
    "debug": 1,
    "mode64bit": 2,
    "provision_key": 4,
    "einittoken_key": 5,
    "cet": 6,
    "kss": 7,
    "aex_notify": 10,
}
"""Name -> bit of ATTRIBUTES.FLAGS; Intel SDM volume 3D, 38.7.1."""

# name -> (offset, size) in the enclave report
FIELDS: Final[dict[str, tuple[int, int]]] = {
    "cpusvn": (0, 16),
    "miscselect": (16, 4),
    "isvextprodid": (32, 16),
    "attributes": (48, 16),
    "mrenclave": (64, 32),
    "mrsigner": (128, 32),
    "configid": (192, 64),
    "isvfamilyid": (304, 16),
}
NUMBERS: Final[dict[str, int]] = {"isvprodid": 256, "isvsvn": 258, "configsvn": 260}
"""Name -> offset of a u16."""
REPORT_DATA: Final = dcap_format.SGX_REPORT_DATA


@dataclass(frozen=True, slots=True)
class Quote(dcap_format.Quote):
    """One SGX quote, taken apart; `report` is the enclave report, 384 bytes."""

    FIELDS: ClassVar[Mapping[str, tuple[int, int]]] = FIELDS
    REPORT_DATA: ClassVar[slice] = REPORT_DATA
    FLAGS: ClassVar[slice] = slice(48, 56)
    SWITCHES: ClassVar[Mapping[str, int]] = ATTRIBUTES

    def numbers(self) -> dict[str, int]:
        """Return ISVPRODID, ISVSVN and CONFIGSVN."""
        return {name: struct.unpack_from("<H", self.report, offset)[0] for name, offset in NUMBERS.items()}


def parse(data: bytes) -> Quote:
    """Return the quote in `data`, which holds nothing else.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    return dcap_format.parse(data, SGX, Quote)


def without_padding(data: bytes) -> bytes:
    """Return `data` without zero bytes after the quote. For attesters; verifiers never trim.

    Raises:
        EvidenceError: `evidence-malformed`: no quote, or something other than zeros after it.
    """
    return dcap_format.without_padding(data, SGX, Quote)
