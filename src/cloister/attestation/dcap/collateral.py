"""SGX and TDX collateral as Intel's PCS delivers it, in the JSON form of dcap-qvl (quote collateral v3).

Strict: an object of exactly these nine strings. dcap-qvl's own client adds `pck_certificate_chain`, and its verifier would prefer
that to the chain in the quote. Here it is left out before anybody sees it: the chain whose root we compare must be the chain
that is verified.

Source of the documents inside: Intel PCS API v4, TCB info v3 and enclave identity v2. Form only; `own` and dcap-qvl judge.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from dcap_qvl import QuoteCollateralV3

from cloister.attestation.pki import certificate, crl
from cloister.attestation.pki.certificate import Certificate
from cloister.attestation.pki.crl import RevocationList
from cloister.crypto.canonical import json_decode
from cloister.errors import EvidenceError, Reason

LIMIT: Final = 1 << 20
"""Largest collateral accepted, in bytes; real ones have 14 to 19 kB."""

TEXT: Final = ("pck_crl_issuer_chain", "tcb_info_issuer_chain", "tcb_info", "qe_identity_issuer_chain", "qe_identity")
HEX: Final = ("root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature")
IGNORED: Final = "pck_certificate_chain"
KINDS: Final = {"SGX": "sgx", "TDX": "tdx"}
"""`id` of TCB info -> kind of evidence."""

_HEX_DIGITS: Final = frozenset("0123456789abcdefABCDEF")


@dataclass(frozen=True, slots=True)
class Document:
    """One signed JSON document of the vendor: TCB info or QE identity."""

    name: str
    id: str
    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    """r || s, big-endian."""
    chain: tuple[Certificate, ...] = field(repr=False)
    issued: datetime
    ends: datetime
    evaluation: int
    """tcbEvaluationDataNumber, which never goes back."""


@dataclass(frozen=True, slots=True)
class Collateral:
    """One collateral, taken apart; nothing in it is believed yet."""

    raw: QuoteCollateralV3 = field(repr=False, compare=False)
    tcb_info: Document
    qe_identity: Document
    fmspc: str
    """Machines that it is for, upper-case hex."""
    pceid: str
    root_ca_crl: RevocationList
    pck_crl: RevocationList

    @property
    def kind(self) -> str:
        """Kind of evidence that the TCB info is for."""
        return KINDS[self.tcb_info.id]


def parse(data: bytes, *, where: str = "collateral") -> Collateral:
    """Return collateral `data`.

    Raises:
        EvidenceError: `evidence-malformed`; `where` is the step that wanted it.
    """
    return _parse(data, where)


@lru_cache(maxsize=16)
def _parse(data: bytes, where: str) -> Collateral:  # a broker verifies thousands of quotes under one
    value = _fields(data, where)
    try:
        raw = {name: bytes.fromhex(value[name]) for name in HEX}
        made = QuoteCollateralV3(**{name: value[name] for name in TEXT}, **raw)
    except ValueError as error:
        raise _malformed(str(error), "hexadecimal CRLs and signatures", where) from error
    info = _json(value["tcb_info"], "TCB info", where)
    match info:
        case {"id": str(kind), "fmspc": str(fmspc), "pceId": str(pceid)} if (
            kind in KINDS and _is_hex(fmspc, 12) and _is_hex(pceid, 4)
        ):
            pass
        case _:
            raise _malformed("tcb_info without id, fmspc and pceId", "TCB info for SGX or TDX", where)
    return Collateral(
        raw=made,
        tcb_info=_document("TCB info", info, value, "tcb_info", raw, where),
        qe_identity=_document(
            "QE identity", _json(value["qe_identity"], "QE identity", where), value, "qe_identity", raw, where
        ),
        fmspc=fmspc.upper(),
        pceid=pceid.upper(),
        root_ca_crl=crl.from_der(raw["root_ca_crl"], where=where),
        pck_crl=crl.from_der(raw["pck_crl"], where=where),
    )


def _fields(data: bytes, where: str) -> dict[str, str]:
    try:
        value: Any = json_decode(data, limit=LIMIT, canonical=False)
    except ValueError as error:
        raise _malformed(str(error), "a JSON object", where) from error
    if isinstance(value, dict):
        value.pop(IGNORED, None)
    if not isinstance(value, dict) or set(value) != {*TEXT, *HEX}:
        keys = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else type(value).__name__
        raise _malformed(keys[:400] or "no keys", f"exactly {', '.join(sorted((*TEXT, *HEX)))}", where)
    for name in (*TEXT, *HEX):
        if not isinstance(value[name], str):
            raise _malformed(f"{name} of type {type(value[name]).__name__}", "text", where)
    return value


def _json(text: str, name: str, where: str) -> Any:
    try:
        return json_decode(text.encode(), limit=LIMIT, canonical=False)
    except ValueError as error:
        raise _malformed(f"{name}: {error}"[:300], "JSON", where) from error


def _document(name: str, value: Any, texts: dict[str, str], key: str, raw: dict[str, bytes], where: str) -> Document:
    match value:
        case {
            "id": str(kind),
            "issueDate": str(issued),
            "nextUpdate": str(ends),
            "tcbEvaluationDataNumber": int(evaluation),
        } if not isinstance(evaluation, bool):
            pass
        case _:
            raise _malformed(f"{name} without id, dates and evaluation number", "the vendor's document", where)
    chain = certificate.from_pem(texts[f"{key}_issuer_chain"].encode(), where=where)
    signed, signature = texts[key].encode(), raw[f"{key}_signature"]
    return Document(
        name, kind, signed, signature, chain, _moment(issued, name, where), _moment(ends, name, where), evaluation
    )


def _moment(text: str, name: str, where: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise _malformed(f"{name}: {error}"[:300], "a time, RFC 3339", where) from error
    if moment.tzinfo is None:
        raise _malformed(f"{name}: {text} without a time zone", "a time, RFC 3339", where)
    return moment


def _is_hex(text: str, digits: int) -> bool:
    return len(text) == digits and set(text) <= _HEX_DIGITS


def _malformed(found: str, wanted: str, where: str) -> EvidenceError:
    return EvidenceError(
        "the collateral does not parse",
        code="evidence-malformed",
        reasons=[Reason(where, found, wanted, "use the collateral object as dcap-qvl writes it")],
    )
