"""TDX collateral as Intel's PCS delivers it, in the JSON form of dcap-qvl (quote collateral v3).

Strict: an object of exactly these nine strings. dcap-qvl would also take `pck_certificate_chain` and prefer it to the
chain in the quote; we do not, because the chain whose root we compare must be the chain that is verified.
"""

from __future__ import annotations

from typing import Any, Final

from dcap_qvl import QuoteCollateralV3

from cloister.crypto.canonical import json_decode
from cloister.errors import EvidenceError, Reason

LIMIT: Final = 1 << 20
"""Largest collateral accepted, in bytes; real ones have 14 to 19 kB."""

TEXT: Final = ("pck_crl_issuer_chain", "tcb_info_issuer_chain", "tcb_info", "qe_identity_issuer_chain", "qe_identity")
HEX: Final = ("root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature")


def fields(data: bytes) -> dict[str, str]:
    """Return the nine strings of collateral `data`.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    try:
        value: Any = json_decode(data, limit=LIMIT, canonical=False)
    except ValueError as error:
        raise _malformed(str(error), "a JSON object") from error
    if not isinstance(value, dict) or set(value) != {*TEXT, *HEX}:
        keys = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else type(value).__name__
        raise _malformed(keys[:400] or "no keys", f"exactly {', '.join(sorted((*TEXT, *HEX)))}")
    for name in (*TEXT, *HEX):
        if not isinstance(value[name], str):
            raise _malformed(f"{name} of type {type(value[name]).__name__}", "text")
    return value


def parse(data: bytes) -> QuoteCollateralV3:
    """Return collateral `data` as dcap-qvl takes it.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    value = fields(data)
    try:
        raw = {name: bytes.fromhex(value[name]) for name in HEX}
        return QuoteCollateralV3(**{name: value[name] for name in TEXT}, **raw)
    except ValueError as error:
        raise _malformed(str(error), "hexadecimal CRLs and signatures") from error


def fmspc(data: bytes) -> str:
    """Return the machines that collateral `data` is for: the FMSPC of its TCB info, upper-case hex.

    Raises:
        EvidenceError: `evidence-malformed`; also collateral that is not for TDX.
    """
    try:
        info: Any = json_decode(fields(data)["tcb_info"].encode(), limit=LIMIT, canonical=False)
    except ValueError as error:
        raise _malformed(f"tcb_info: {error}", "JSON") from error
    match info:
        case {"id": "TDX", "fmspc": str(text)} if len(text) == 12 and set(text) <= set("0123456789abcdefABCDEF"):
            return text.upper()
        case _:
            raise _malformed("tcb_info without id TDX and FMSPC", "TCB info for TDX")


def _malformed(found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "the TDX collateral does not parse",
        code="evidence-malformed",
        reasons=[Reason("tdx.3-collateral", found, wanted, "use the collateral object as dcap-qvl writes it")],
    )
