"""What is this file? A guess from its first bytes, so that people may name files without saying what they are.

A guess decides only which verifier reads the bytes; a wrong one is a refusal, never an acceptance. Order matters: the most
telling marks come first.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography import x509
from cryptography.x509 import ocsp

from cloister.attestation.pki import certificate as certificates
from cloister.crypto.canonical import json_decode
from cloister.errors import EvidenceError, InputError, Reason

Guess = tuple[str, str]
"""(kind of case, role); see `files/__init__`."""

PRIMARY: Final = {
    "dcap": ("quote",),
    "snp": ("report",),
    "azure": ("evidence",),
    "tpm": ("q.msg", "evidence", "eventlog"),
    "nvidia": ("report", "eat", "rim", "driver_rim", "vbios_rim"),
    "nitro": ("doc",),
    "cca": ("token",),
}
"""Kind -> the roles that make a case by themselves, the most telling first; every other role explains one of them."""

READ: Final[Mapping[str, frozenset[str]]] = {
    "dcap": frozenset({"quote", "collateral", "ccel"}),
    "snp": frozenset({"report", "leaf", "vcek", "vlek", "table", "crl"}),
    "azure": frozenset({"evidence", "collateral", "crl"}),
    "tpm": frozenset(
        {"q.msg", "q.sig", "q.pcrs", "ak.pub", "ak.name", "nonce", "ak_pub", "ak_cert", "ak_issuer", "sha1", "sha256", "sha384",
         "evidence", "hello", "quote", "eventlog", "binary_runtime_measurements", "crl"}
    ),
    "nvidia": frozenset({"report", "chain", "driver_rim", "vbios_rim", "rim", "eat", "jwks"}),
    "nitro": frozenset({"doc", "crl"}),
    "cca": frozenset({"token", "cpak"}),
}  # fmt: skip
"""Kind -> the roles that some step reads, besides vendor chains and OCSP responses."""

_INTEL_QE: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/=\s]+")


def sniff(data: bytes) -> Guess | None:
    """Return what `data` looks like, or None."""
    if len(data) > 48 and data[12:28] == _INTEL_QE:
        return "dcap", "quote"
    if len(data) == 0x4A0 and 2 <= int.from_bytes(data[:4], "little") <= 5:
        return "snp", "report"
    if data[:2] == b"\x11\xe0" and len(data) > 100 and data[37:39] == b"\x11\x60":
        return "nvidia", "report"
    if data[:4] == b"\xffTCG":
        return "tpm", "q.msg"
    if data[:3] in (b"\xd9\x01\x8f", b"\xd9\x03\x8b"):  # CBOR tags 399 and 907
        return "cca", "token"
    if b"module_id" in data[:128] and data[:1] in (b"\xd2", b"\x84"):
        return "nitro", "doc"
    if b"Spec ID Event0" in data[:64]:
        return "tpm", "eventlog"
    head = data.lstrip()[:1]
    if head in (b"{", b"["):
        return _json(data)
    if head == b"<" and b"SoftwareIdentity" in data[:4096]:
        return "nvidia", _rim(data)
    if b"-----BEGIN" in data[:4096]:
        return _pem(data)
    if head == b"0":
        return _der(data)
    if len(data) < 64 * 1024 and _BASE64.fullmatch(data):
        try:
            inner = base64.b64decode(b"".join(data.split()), validate=True)
        except ValueError:
            return None
        return ("nvidia", "ocsp") if _is_ocsp(inner) else None
    if _looks_like_ima(data):
        return "tpm", "binary_runtime_measurements"
    return None


@dataclass(frozen=True, slots=True)
class Assembled:
    """One case put together from files: what `files.Case` needs of them."""

    kind: str
    files: Mapping[str, bytes]
    chains: Mapping[str, bytes] = field(default_factory=dict)
    chain: str = ""


def assemble(named: Iterable[tuple[str, bytes]]) -> Assembled:
    """Return the case that `named` files make up: (name, or `role=name`; content).

    A role that is written out is believed; every other file is sniffed.

    Raises:
        InputError: a file that is not known, no file that is evidence, evidence of two kinds, one role twice, or a file that no
            step would read: whoever gave it would take what it says for judged.
    """
    guesses: list[tuple[str, str, str, bytes]] = []
    reasons: list[Reason] = []
    for name, data in named:
        role, _, path = name.partition("=")
        guess = sniff(data)
        if path:
            # what the bytes look like decides between kinds that use the same word
            guesses.append((path, guess[0] if guess is not None and guess[1] == role else "", role, data))
            continue
        if guess is None:
            hint = "say what it is: ROLE=FILE, with a role such as quote, report, leaf, chain, collateral (`--help`)"
            reasons.append(Reason(name, "bytes of no known form", "evidence, a certificate, collateral or a log", hint))
        else:
            guesses.append((name, *guess, data))
    if reasons:
        raise InputError("a file is of no known form", reasons=reasons)
    kind = _kind(guesses)
    files: dict[str, bytes] = {}
    chain = b""
    for name, _, role, data in guesses:
        if kind == "dcap" and role == "eventlog":
            role = "ccel"
        if kind in ("snp", "azure") and role == "chain":
            chain += data + b"\n"
            continue
        if role == "ocsp" and kind == "nvidia":
            role = f"ocsp_{sum(each.startswith('ocsp') for each in files)}"
        elif role not in READ[kind] and not (kind == "nvidia" and role.startswith("ocsp_")):
            wanted = f"one of {', '.join(sorted(READ[kind]))}"
            raise InputError(
                f"no step of {kind} evidence reads a file of role {role}", reasons=[Reason(name, role, wanted)]
            )
        if role in files:
            raise InputError("two files have the same role", reasons=[Reason(name, f"a second {role}", "one of each")])
        files[role] = data
    if kind == "nvidia" and "report" not in files and "eat" not in files and len(files) == 1:
        files = {"rim": next(iter(files.values()))}
    return Assembled(kind, files, {"given": chain} if chain else {}, "given" if chain else "")


def _kind(guesses: list[tuple[str, str, str, bytes]]) -> str:
    roles = {role for _, _, role, _ in guesses}
    seen = {kind for _, kind, _, _ in guesses}
    for wanted in range(max(map(len, PRIMARY.values()))):  # the most telling role of any kind decides
        named = [kind for kind, primary in PRIMARY.items() if len(primary) > wanted and primary[wanted] in roles]
        found = [kind for kind in named if kind in seen]
        if not found and not seen & PRIMARY.keys():
            found = named  # nobody recognised anything: the words alone
        if len(found) > 1:
            raise InputError(
                "these files are evidence of more than one kind",
                reasons=[Reason("evidence", " and ".join(sorted(found)), "one piece of evidence at a time")],
            )
        if found:
            return found[0]
    raise InputError(
        "none of these files is evidence",
        reasons=[
            Reason("evidence", ", ".join(sorted(roles)) or "nothing", "a quote, report, token or attestation document")
        ],
    )


def _json(data: bytes) -> Guess | None:
    try:
        value: Any = json_decode(data, limit=4 * 1024 * 1024, canonical=False)
    except ValueError:
        return None
    match value:
        case {"tcb_info": _, "qe_identity": _}:
            return "dcap", "collateral"
        case {"hcl_report": _} | {"td_quote": _} | {"vcek": _}:
            return "azure", "evidence"
        case {"svn": _, "report": _, "ak_public": _} | {"ak_public": _}:
            return "tpm", "evidence"
        case {"kty": _}:
            return "cca", "cpak"
        case [["JWT", str()], {**_rest}]:
            return "nvidia", "eat"
    return None


def _rim(data: bytes) -> str:
    # firmware versions have five groups of two hex digits, driver versions three numbers
    version = re.search(rb'colloquialVersion="([0-9A-Fa-f.]{3,32})"', data[:4096])
    groups = version[1].split(b".") if version else []
    return "vbios_rim" if len(groups) == 5 else "driver_rim" if groups else "rim"


def _pem(data: bytes) -> Guess | None:
    try:
        chain = certificates.from_pem(data, where="file")
    except EvidenceError:
        return None
    return _certificate(chain[0], many=len(chain) > 1)


def _der(data: bytes) -> Guess | None:
    try:
        return _certificate(certificates.from_der(data, where="file"), many=False)
    except EvidenceError:
        pass
    try:
        x509.load_der_x509_crl(data)
    except ValueError:
        return ("nvidia", "ocsp") if _is_ocsp(data) else None
    return "any", "crl"


def _certificate(first: certificates.Certificate, *, many: bool) -> Guess:
    subject = first.subject.upper()
    # by common name and not by company: a test root has the same names
    if re.search(r"(?:^|=|: )SEV-(?:VCEK|VLEK)(?:,|$)", subject) and not first.authority:
        return "snp", "leaf"
    if re.search(r"(?:=|: )(?:ARK|SEV)-[A-Z-]+", subject) and first.authority:
        return "snp", "chain"
    if "NVIDIA" in subject:
        return "nvidia", "chain"
    return ("any", "chain") if many else ("tpm", "ak_issuer" if first.authority else "ak_cert")


def _is_ocsp(data: bytes) -> bool:
    try:
        ocsp.load_der_ocsp_response(data)
    except ValueError:
        return False
    return True


def _looks_like_ima(data: bytes) -> bool:
    if len(data) < 40:
        return False
    size = int.from_bytes(data[24:28], "little")
    return 2 <= size <= 16 and data[28 : 28 + size].startswith(b"ima")
