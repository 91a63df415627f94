"""TDX quotes: bytes to frozen types. Checks form only; nothing here is believed.

The frame of a quote is `dcap.format`'s: version 4 with a TD report of 584 bytes, version 5 with body type 2 (584) or 3 (648).
Source of the TD report: Intel TDX Module ABI, TDREPORT_STRUCT; Intel TDX DCAP Quoting Library API, appendix A.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from cloister.attestation.dcap import format as dcap_format
from cloister.attestation.dcap.format import (
    CERTIFICATION_PEM_CHAIN,
    CERTIFICATION_QE_REPORT,
    ECDSA_P256,
    HEADER_BYTES,
    INTEL_QE,
    Tee,
)

__all__ = [
    "ATTRIBUTES",
    "CERTIFICATION_PEM_CHAIN",
    "CERTIFICATION_QE_REPORT",
    "DEBUG_BIT",
    "ECDSA_P256",
    "FIELDS",
    "FIELDS_15",
    "HEADER_BYTES",
    "INTEL_QE",
    "REPORT_DATA",
    "TDX",
    "TD_REPORT_10_BYTES",
    "TD_REPORT_15_BYTES",
    "TEE_TDX",
    "Quote",
    "parse",
    "without_padding",
]

TD_REPORT_10_BYTES: Final = 584
TD_REPORT_15_BYTES: Final = 648
TEE_TDX: Final = 0x81

TDX: Final = Tee(
    kind="tdx",
    title="TDX",
    tee_type=TEE_TDX,
    bodies={4: {0: TD_REPORT_10_BYTES}, 5: {2: TD_REPORT_10_BYTES, 3: TD_REPORT_15_BYTES}},
    tcb_info="TDX",
    qe_identity="TD_QE",
)

DEBUG_BIT: Final = 1
"""TDATTRIBUTES.TUD.DEBUG, bit 0."""

ATTRIBUTES: Final[dict[str, int]] = {
    "debug": 0,
    "icssd": 16,
    "lass": 27,
    "sept_ve_disable": 28,
    "migratable": 29,
    "pks": 30,
    "kl": 31,
    "tpa": 62,
    "perfmon": 63,
}
"""Name -> bit of TDATTRIBUTES; Intel TDX Module ABI, ATTRIBUTES."""

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


@dataclass(frozen=True, slots=True)
class Quote(dcap_format.Quote):
    """One TDX quote, taken apart; `report` is the TD report, 584 or 648 bytes."""

    FIELDS: ClassVar[Mapping[str, tuple[int, int]]] = FIELDS | FIELDS_15
    REPORT_DATA: ClassVar[slice] = REPORT_DATA
    FLAGS: ClassVar[slice] = slice(120, 128)
    SWITCHES: ClassVar[Mapping[str, int]] = ATTRIBUTES


def parse(data: bytes) -> Quote:
    """Return the quote in `data`, which holds nothing else.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    return dcap_format.parse(data, TDX, Quote)


def without_padding(data: bytes) -> bytes:
    """Return `data` without the zero bytes that firmware appends to a quote. For attesters; verifiers never trim.

    Raises:
        EvidenceError: `evidence-malformed`: no quote, or something other than zeros after it.
    """
    return dcap_format.without_padding(data, TDX, Quote)
