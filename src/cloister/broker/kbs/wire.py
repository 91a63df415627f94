"""Messages of the KBS protocol 0.4.0 <-> frozen types, what its evidence is bound to, and what its init-data states. Pure.

Sources: Trustee, kbs/docs/kbs_attestation_protocol.md and kbs/docs/initdata.md; the crate kbs-types (names of members); the
evidence structs of guest-components' attesters (virtee/sev 4 to 6 for SEV-SNP). docs/kbs.md has the tables.

Parsing: one JSON value of at most `LIMIT` bytes, no member twice; then exactly the members of each table, except in Request,
where Trustee's own server passes over unknown ones. All refusals are `PeerError` with code `protocol`, and `EvidenceError` with
code `evidence-malformed` for the evidence.

What REPORT_DATA has to be (`bound`), over the RFC 8785 form, and nothing else ties the evidence to the session:

    primary   SHA-384({"additional-evidence": string, "nonce": string, "tee-pubkey": JWK}) || 0^16
    devices   the first 32 bytes of SHA-384({"nonce": string, "tee-pubkey": JWK})

A KBS client measures no workload event. Its workload is what its init-data says (`workload`), if the init-data's digest is in the
register that the hardware signs and the host set at launch: TDX MRCONFIGID, SEV-SNP HOST_DATA, SGX CONFIGID. The digest is
over the bytes of the TOML document, as Trustee and guest-components compute it (the specification's page says otherwise),
zero-padded or cut to the size of the register.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from cloister.attestation import events
from cloister.attestation.evidence import LIMITS
from cloister.attestation.types import Claims, Evidence
from cloister.crypto.canonical import json_decode, json_encode
from cloister.errors import EvidenceError, PeerError, Reason

VERSION: Final = "0.4.0"
"""Trustee's server demands `=0.4.0`, and so do we: the hashed members changed with every version before."""
LIMIT: Final = 2 << 20
"""Largest body, 2 MiB; evidence with a boot log and GPU certificates is below 300 kB."""
NONCE_BYTES: Final = 32
MAX_INIT_DATA: Final = 256 * 1024
MAX_WORKLOAD: Final = 4096
INIT_DATA_VERSION: Final = "0.1.0"
WORKLOAD_ENTRY: Final = "cloister.workload"
"""Entry of init-data: the canonical CBOR of a `cloister/workload/1` event, in lower-case hex."""

TEES: Final[Mapping[str, str]] = MappingProxyType({"tdx": "tdx", "snp": "sev-snp", "sgx": "sgx"})
"""`tee` of a Request -> kind of evidence."""
REFUSED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "sample": "a test value of the protocol: it proves nothing, and no contract can accept it",
        "sampledevice": "a test value of the protocol: it proves nothing, and no contract can accept it",
        "tpm": "Trustee looks for init-data in PCR 8, which the guest's own software extends: no launch register binds a workload",
    }
)
REGISTERS: Final[Mapping[str, str]] = MappingProxyType({"tdx": "mrconfigid", "sev-snp": "host_data", "sgx": "configid"})
"""TEE type -> measurement that holds the digest of init-data, kbs/docs/initdata.md."""
HASHES: Final[Mapping[str, Callable[[bytes], Any]]] = MappingProxyType(
    {
        **dict.fromkeys(("sha256", "sha-256"), hashlib.sha256),
        **dict.fromkeys(("sha384", "sha-384"), hashlib.sha384),
        **dict.fromkeys(("sha512", "sha-512"), hashlib.sha512),
    }
)
ECDH: Final = "ECDH-ES+A256KW"
RSA: Final = "RSA-OAEP-256"
CURVES: Final[Mapping[str, tuple[ec.EllipticCurve, int]]] = MappingProxyType(
    {"P-256": (ec.SECP256R1(), 32), "P-521": (ec.SECP521R1(), 66)}
)
"""`crv` -> curve, bytes of a coordinate."""
RSA_BITS: Final = range(2048, 4097)

_B64URL: Final = re.compile(r"[A-Za-z0-9_-]*")
_HEX: Final = re.compile(r"(?:[0-9a-f]{2})+")


@dataclass(frozen=True, slots=True)
class Request:
    """`POST auth`. `tee` is a key of `TEES`."""

    tee: str

    @property
    def kind(self) -> str:
        return TEES[self.tee]


@dataclass(frozen=True, slots=True)
class TeeKey:
    """The key that the TEE made: secrets are encrypted to it and to nothing else."""

    algorithm: str
    public: ec.EllipticCurvePublicKey | rsa.RSAPublicKey = field(compare=False, repr=False)
    jwk: Mapping[str, str]

    def encode(self) -> bytes:
        """Return the RFC 8785 form of the JWK: the name of this key everywhere else."""
        return json_encode(dict(self.jwk))


@dataclass(frozen=True, slots=True)
class Attestation:
    """`POST attest`."""

    nonce: str
    key: TeeKey
    primary: Mapping[str, Any] = field(repr=False)
    additional: str = field(repr=False)
    """A JSON document as text, or empty: hashed as it is, so that nobody has to write it the same way twice."""
    init_data: str | None = field(repr=False)
    """The TOML document as text."""

    def report_data(self) -> bytes:
        """Return the 64 bytes that the primary evidence signs."""
        value = {"additional-evidence": self.additional, "nonce": self.nonce, "tee-pubkey": dict(self.key.jwk)}
        return hashlib.sha384(_canonical(value)).digest() + bytes(16)

    def device_nonce(self) -> bytes:
        """Return the 32 bytes that devices sign: the CPU signs what they said, so they cannot sign over it."""
        return hashlib.sha384(_canonical({"nonce": self.nonce, "tee-pubkey": dict(self.key.jwk)})).digest()[:32]


# --- messages ---------------------------------------------------------------------------------------------------------


def request(data: bytes) -> Request:
    """Parse the body of `POST auth`.

    Raises:
        PeerError: code `protocol`: another form, another version, or a TEE that is not accepted here.
    """
    value = _json(data, "kbs.request")
    match value:
        case {"version": str(version), "tee": str(tee), "extra-params": _}:
            pass
        case _:
            raise _malformed("kbs.request", "another shape", "version, tee and extra-params")
    if version != VERSION:
        hint = "use guest components that speak this version"
        raise _malformed("kbs.version", f"KBS Client Protocol Version Mismatch: {version[:40]!r}", f"={VERSION}", hint)
    if tee not in TEES:
        hint = REFUSED.get(tee, "")
        raise _malformed("kbs.tee", repr(tee[:40]), " or ".join(TEES), hint)
    return Request(tee)


def challenge(nonce: str) -> bytes:
    """Return the body of the answer to `POST auth`. No hash algorithm is selected, so clients take SHA-384."""
    return b'{"nonce":"' + nonce.encode() + b'","extra-params":""}'


def attestation(data: bytes) -> Attestation:
    """Parse the body of `POST attest`.

    Raises:
        PeerError: code `protocol`.
    """
    where = "kbs.attestation"
    value = _json(data, where)
    match value:
        case {
            "runtime-data": {"nonce": str(nonce), "tee-pubkey": dict(jwk), **more},
            "tee-evidence": {"primary_evidence": dict(primary), "additional_evidence": str(additional), **others},
            **rest,
        } if not more and not others and set(rest) <= {"init-data"}:
            pass
        case _:
            wanted = (
                "runtime-data {nonce, tee-pubkey}, tee-evidence {primary_evidence, additional_evidence}, init-data?"
            )
            raise _malformed(where, "another shape", wanted)
    body: str | None = None
    match rest.get("init-data"):
        case None:
            pass
        case {"format": "toml", "body": str(text), **extra} if not extra:
            body = text
        case _:
            raise _malformed("kbs.init-data", "another form", 'format "toml" and a body')
    if body is not None and len(body) > MAX_INIT_DATA:
        raise _malformed("kbs.init-data", f"{len(body)} characters", f"at most {MAX_INIT_DATA}")
    if body is not None and not body.isprintable() and any("\ud800" <= each <= "\udfff" for each in body):
        raise _malformed("kbs.init-data", "half of a surrogate pair", "text that UTF-8 can encode")
    found = Attestation(nonce, tee_key(jwk), MappingProxyType(primary), additional, body)
    found.report_data()  # text that has no UTF-8 form has no hash: say so now
    return found


def tee_key(jwk: Mapping[str, Any]) -> TeeKey:
    """Return the key of a JWK as kbs-types has it: EC P-256 or P-521 for ECDH-ES+A256KW, RSA for RSA-OAEP-256.

    Raises:
        PeerError: code `protocol`: another algorithm, a pair that does not fit, a point that is not on the curve.
    """
    where = "kbs.tee-pubkey"
    members = {name: text for name, text in jwk.items() if isinstance(text, str)}
    match jwk:
        case {"kty": "EC", "crv": str(crv), "alg": str(alg), "x": str(x), "y": str(y), **rest} if not rest:
            if alg != ECDH or crv not in CURVES:
                raise _malformed(where, f"alg {alg[:40]!r} with {crv[:40]!r}", f"{ECDH} with {' or '.join(CURVES)}")
            curve, size = CURVES[crv]
            point = (_unsigned(x, where, size), _unsigned(y, where, size))
            try:
                return TeeKey(alg, ec.EllipticCurvePublicNumbers(*point, curve).public_key(), members)
            except ValueError as error:
                raise _malformed(where, "a point that is not on the curve", crv) from error
        case {"kty": "RSA", "alg": str(alg), "n": str(n), "e": str(e), **rest} if not rest:
            if alg != RSA:
                hint = "RSA1_5 is broken in practice (Bleichenbacher)" if alg == "RSA1_5" else ""
                raise _malformed(where, f"alg {alg[:40]!r} with RSA", RSA, hint)
            modulus, exponent = _unsigned(n, where), _unsigned(e, where)
            if modulus.bit_length() not in RSA_BITS or not 65537 <= exponent < 1 << 32:
                wanted = f"{RSA_BITS.start} to {RSA_BITS.stop - 1} bits and an exponent from 65537"
                raise _malformed(where, f"{modulus.bit_length()} bits", wanted)
            try:
                return TeeKey(alg, rsa.RSAPublicNumbers(exponent, modulus).public_key(), members)
            except ValueError as error:
                raise _malformed(where, str(error)[:100], "an RSA key") from error
    raise _malformed(where, "another shape", "{kty: EC, crv, alg, x, y} or {kty: RSA, alg, n, e}")


def token_reply(token: str) -> bytes:
    """Return the body of the answer to `POST attest`."""
    return b'{"token":"' + token.encode() + b'"}'


ERRORS: Final = "https://github.com/confidential-containers/kbs/errors/"


def problem(kind: str, detail: str) -> bytes:
    """Return an error's body: Trustee's ErrorInformation, in the form of RFC 7807."""
    return json_encode({"detail": detail.encode("utf-8", "replace").decode(), "type": ERRORS + kind})


# --- evidence ---------------------------------------------------------------------------------------------------------


def evidence(kind: str, found: Attestation) -> Evidence:
    """Return the evidence in a client's form as ours; `verify` judges it like any other.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    made = _READERS[kind](found.primary)
    return replace(made, devices=_devices(found.additional)) if found.additional else made


def _devices(text: str) -> tuple[Evidence, ...]:
    where = "kbs.additional_evidence"
    try:
        value = json_decode(text.encode(), limit=LIMIT, canonical=False)
    except ValueError as error:
        raise _refused(where, str(error)[:200], "a JSON object as text") from error
    match value:
        case {"nvidia": {"device_evidence_list": list(entries), **more}, **rest} if not rest and not more:
            pass
        case _:
            raise _refused(where, "another shape", 'evidence of "nvidia" devices: {device_evidence_list}')
    if not 0 < len(entries) <= LIMITS.devices:
        raise _refused(where, f"{len(entries)} devices", f"1 to {LIMITS.devices}")
    return tuple(_gpu(entry, f"{where}.{index}") for index, entry in enumerate(entries))


def _gpu(entry: Any, where: str) -> Evidence:
    """`arch` and `uuid` are the client's word; the report says what it is of."""
    match entry:
        case {"arch": str(), "uuid": str(), "evidence": str(report), "certificate": str(chain), **rest} if not rest:
            pass
        case _:
            raise _refused(where, "another shape", "{arch, uuid, evidence, certificate}")
    # older attesters write the report in hex, and Trustee tries that first, too: base64 of a report is not hex by accident
    quote = bytes.fromhex(report) if _HEX.fullmatch(report) else _b64(report, f"{where}.evidence")
    return Evidence("nvidia-gpu", quote, parts=MappingProxyType({"chain": _b64(chain, f"{where}.certificate")}))


def bound(claims: Claims, found: Attestation) -> tuple[Reason, ...]:
    """Return why verified `claims` do not speak about this session's nonce and key; empty means that they do."""
    hint = "the evidence was made for another nonce, key or device evidence: attest again"
    reasons = []
    signed = [("kbs.report_data", claims.report_data, found.report_data())]
    for index, device in enumerate(claims.devices):
        signed.append((f"kbs.additional_evidence.{index}.nonce", device.report_data, found.device_nonce()))
    for where, value, wanted in signed:
        if not hmac.compare_digest(value, wanted):
            reasons.append(Reason(where, value.hex() or "nothing", wanted.hex(), hint))
    return tuple(reasons)


def _tdx(value: Mapping[str, Any]) -> Evidence:
    match value:
        case {"quote": str(quote), **rest} if set(rest) <= {"cc_eventlog"}:
            log = rest.get("cc_eventlog")
        case _:
            raise _refused("kbs.primary_evidence", "another shape", "{cc_eventlog?, quote}")
    if log is not None and not isinstance(log, str):
        raise _refused("kbs.primary_evidence.cc_eventlog", "another type", "base64 or null")
    # the boot log is the firmware's, and what it says counts only where it replays to the quote's registers
    parts = {"ccel": _b64(log, "kbs.primary_evidence.cc_eventlog")} if log else {}
    return Evidence("tdx", _b64(quote, "kbs.primary_evidence.quote"), parts=MappingProxyType(parts))


def _sgx(value: Mapping[str, Any]) -> Evidence:
    match value:
        case {"quote": str(quote), **rest} if not rest:
            return Evidence("sgx", _b64(quote, "kbs.primary_evidence.quote"))
    raise _refused("kbs.primary_evidence", "another shape", "{quote}")


# The serde form of virtee/sev's AttestationReport: name, offset, bytes. Arrays are lists of bytes, integers are little-endian.
_SNP_INTEGERS: Final = {
    "version": (0x00, 4), "guest_svn": (0x04, 4), "policy": (0x08, 8), "vmpl": (0x30, 4), "sig_algo": (0x34, 4),
    "plat_info": (0x40, 8),
}  # fmt: skip
_SNP_ARRAYS: Final = {
    "family_id": (0x10, 16), "image_id": (0x20, 16), "report_data": (0x50, 64), "measurement": (0x90, 48),
    "host_data": (0xC0, 32), "id_key_digest": (0xE0, 48), "author_key_digest": (0x110, 48), "report_id": (0x140, 32),
    "report_id_ma": (0x160, 32), "chip_id": (0x1A0, 64),
}  # fmt: skip
_SNP_TCBS: Final = {"current_tcb": 0x38, "reported_tcb": 0x180, "committed_tcb": 0x1E0, "launch_tcb": 0x1F0}
_SNP_OLD: Final = {  # sev 1 to 4
    "_author_key_en": (0x48, 4), "_reserved_0": (0x4C, 4),
    "current_build": (0x1E8, 1), "current_minor": (0x1E9, 1), "current_major": (0x1EA, 1), "_reserved_2": (0x1EB, 1),
    "committed_build": (0x1EC, 1), "committed_minor": (0x1ED, 1), "committed_major": (0x1EE, 1), "_reserved_3": (0x1EF, 1),
}  # fmt: skip
_SNP_OLD_ARRAYS: Final = {"_reserved_1": (0x188, 24), "_reserved_4": (0x1F8, 168)}
_SNP_NEW: Final = {  # sev 5 and 6; reserved bytes are not in the form, so they are zero or the signature fails
    "key_info": (0x48, 4), "cpuid_fam_id": (0x188, 1), "cpuid_mod_id": (0x189, 1), "cpuid_step": (0x18A, 1),
    "launch_mit_vector": (0x1F8, 8), "current_mit_vector": (0x200, 8),
}  # fmt: skip
_SNP_OPTIONAL: Final = {"cpuid_fam_id", "cpuid_mod_id", "cpuid_step", "launch_mit_vector", "current_mit_vector"}
_SNP_VERSIONS: Final = {"current": 0x1E8, "committed": 0x1EC}
_SNP_BYTES: Final = 0x4A0
_LEAVES: Final = ("VCEK", "VLEK")


def _snp(value: Mapping[str, Any]) -> Evidence:
    where = "kbs.primary_evidence"
    match value:
        case {"attestation_report": dict(report), **rest} if set(rest) <= {"cert_chain"}:
            chain = rest.get("cert_chain")
        case _:
            raise _refused(where, "another shape", "{attestation_report, cert_chain?}")
    quote = _snp_report(report)
    leaves: list[bytes] = []
    for entry in chain or []:
        match entry:
            case {"cert_type": str(kind), "data": list(data), **more} if not more:
                if kind in _LEAVES:
                    leaves.append(_array(data, None, f"{where}.cert_chain"))
            case {"cert_type": dict(), "data": list()}:  # OTHER(guid): nothing that a verifier of reports needs
                pass
            case _:
                raise _refused(f"{where}.cert_chain", "an entry of another shape", "{cert_type, data}")
    if len(leaves) > 1:
        raise _refused(f"{where}.cert_chain", f"{len(leaves)} leaf certificates", "one VCEK or VLEK, or none")
    # ASK and ARK come from the relying party; the leaf is believed because it chains to them
    return Evidence("sev-snp", quote, parts=MappingProxyType({"leaf": leaves[0]} if leaves else {}))


def _snp_report(report: Mapping[str, Any]) -> bytes:
    where = "kbs.primary_evidence.attestation_report"
    old = "_reserved_4" in report
    integers = _SNP_INTEGERS | (_SNP_OLD if old else _SNP_NEW)
    arrays = _SNP_ARRAYS | (_SNP_OLD_ARRAYS if old else {})
    names = {*integers, *arrays, *_SNP_TCBS, "signature"} | (set() if old else set(_SNP_VERSIONS))
    missing = names - set(report) - (set() if old else {"launch_mit_vector", "current_mit_vector"})
    if missing or set(report) - names:
        found = ", ".join(sorted(map(str, missing ^ (set(report) - names))))[:200]
        raise _refused(where, f"missing or unknown: {found}", "the AttestationReport of virtee/sev 1 to 6")
    made = bytearray(_SNP_BYTES)
    for name, (at, size) in integers.items():
        number = report.get(name)
        if number is None and not old and name in _SNP_OPTIONAL:
            continue
        made[at : at + size] = _little(number, size, f"{where}.{name}")
    for name, (at, size) in arrays.items():
        made[at : at + size] = _array(report[name], size, f"{where}.{name}")
    for name, at in _SNP_TCBS.items():
        made[at : at + 8] = _snp_tcb(report[name], f"{where}.{name}")
    for name, at in () if old else _SNP_VERSIONS.items():
        match report[name]:
            case {"major": major, "minor": minor, "build": build, **rest} if not rest:
                made[at : at + 3] = b"".join(_little(each, 1, f"{where}.{name}") for each in (build, minor, major))
            case _:
                raise _refused(f"{where}.{name}", "another shape", "{major, minor, build}")
    match report["signature"]:
        case {"r": r, "s": s, **rest} if set(rest) <= {"_reserved"}:
            made[0x2A0:0x2E8] = _array(r, 72, f"{where}.signature.r")
            made[0x2E8:0x330] = _array(s, 72, f"{where}.signature.s")
            if "_reserved" in rest:
                made[0x330:] = _array(rest["_reserved"], _SNP_BYTES - 0x330, f"{where}.signature._reserved")
        case _:
            raise _refused(f"{where}.signature", "another shape", "{r, s}")
    return bytes(made)


def _snp_tcb(value: Any, where: str) -> bytes:
    """Milan and Genoa: bootloader 0, tee 1, snp 6, microcode 7; Turin, which has an FMC: fmc 0, bootloader 1, tee 2, snp 3."""
    match value:
        case {"bootloader": bootloader, "tee": tee, "snp": snp, "microcode": microcode, **rest} if set(rest) <= {
            "_reserved",
            "fmc",
        }:
            one = [_little(each, 1, where) for each in (bootloader, tee, snp, microcode)]
            if rest.get("fmc") is not None:
                return _little(rest["fmc"], 1, where) + one[0] + one[1] + one[2] + bytes(3) + one[3]
            reserved = _array(rest["_reserved"], 4, where) if "_reserved" in rest else bytes(4)
            return one[0] + one[1] + reserved + one[2] + one[3]
    raise _refused(where, "another shape", "{fmc?, bootloader, tee, snp, microcode}")


_READERS: Final[Mapping[str, Callable[[Mapping[str, Any]], Evidence]]] = MappingProxyType(
    {"tdx": _tdx, "sev-snp": _snp, "sgx": _sgx}
)


# --- init-data --------------------------------------------------------------------------------------------------------


def with_workload(claims: Claims, init_data: str | None) -> tuple[Claims, tuple[Reason, ...]]:
    """Return `claims` with the workload event that init-data states, or why it does not count.

    The event is `cloister/workload/1`, in the log that the hardware vouches for through its launch register. Claims that
    have events already are refused: there is one source of them, and two would be one too many.
    """
    where = "kbs.init-data"
    hint = f"start the guest with init-data that has the entry {WORKLOAD_ENTRY!r}, see docs/kbs.md"
    if claims.events:
        return claims, (Reason(where, "evidence with an event log of its own", "no runtime events", hint),)
    if init_data is None:
        return claims, (Reason(where, "no init-data", "init-data whose digest the hardware signed at launch", hint),)
    register = REGISTERS.get(claims.tee.removeprefix("soft-"), "")
    signed = claims.measurements.get(register)
    if not signed:
        return claims, (
            Reason(where, f"{claims.tee} without a launch register", " or ".join(REGISTERS.values()), hint),
        )
    try:
        algorithm, data = _init_data(init_data)
    except ValueError as error:
        return claims, (Reason(where, str(error)[:200], "the TOML document that was hashed at launch", hint),)
    digest = HASHES[algorithm](init_data.encode()).digest()
    wanted = digest[: len(signed)].ljust(len(signed), b"\x00")
    if not hmac.compare_digest(signed, wanted):
        text = "this guest was launched with other init-data, or with none"
        return claims, (Reason(f"{where}.{register}", signed.hex(), wanted.hex(), text),)
    entry = data.get(WORKLOAD_ENTRY)
    if entry is None:
        return claims, (Reason(f"{where}.{WORKLOAD_ENTRY}", "no such entry", "the workload of this guest", hint),)
    try:
        if len(entry) > 2 * MAX_WORKLOAD or entry != entry.lower():
            raise ValueError("not in lower-case hex, or too long")
        event = events.event(events.WORKLOAD, bytes.fromhex(entry))
        events.decode_workload(event.data)
    except (ValueError, EvidenceError) as error:
        found = error.reasons[0].found if isinstance(error, EvidenceError) else str(error)
        wanted_form = "hex of canonical CBOR {code, sandbox, profile, level}"
        return claims, (Reason(f"{where}.{WORKLOAD_ENTRY}", found[:200], wanted_form, hint),)
    return replace(claims, events=(event,)), ()


def _init_data(text: str) -> tuple[str, dict[str, str]]:
    try:
        value = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("TOML that is too deep") from error
    match value:
        case {"version": str(version), "algorithm": str(algorithm), "data": dict(), **rest} if (
            not rest and version == INIT_DATA_VERSION
        ):
            data: dict[str, Any] = value["data"]
        case _:
            raise ValueError(f"another shape than version {INIT_DATA_VERSION}, algorithm, data")
    if algorithm not in HASHES:
        raise ValueError(f"algorithm {algorithm[:40]!r}, known are {', '.join(HASHES)}")
    if not all(isinstance(entry, str) for entry in data.values()):
        raise ValueError("an entry of data that is no text")
    return algorithm, data


# --- forms ------------------------------------------------------------------------------------------------------------


def b64url(data: bytes) -> str:
    """Return base64url without padding, RFC 7515 section 2."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unsigned(text: str, where: str, size: int | None = None) -> int:
    """Return a base64url integer: of exactly `size` bytes, or (RFC 7518, 6.3.1) without leading zeros."""
    if len(text) > 1024 or not _B64URL.fullmatch(text):
        raise _malformed(where, "another alphabet or length", "base64url without padding")
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (ValueError, binascii.Error) as error:
        raise _malformed(where, str(error), "base64url without padding") from error
    if b64url(data) != text or not data:
        raise _malformed(where, "base64url of another form", "one encoding per value")
    if (size is not None and len(data) != size) or (size is None and data[0] == 0):
        wanted = f"{size} bytes" if size is not None else "no leading zero byte"
        raise _malformed(where, f"{len(data)} bytes", wanted)
    return int.from_bytes(data, "big")


def _b64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise _refused(where, str(error)[:100], "base64") from error


def _array(value: Any, size: int | None, where: str) -> bytes:
    if not isinstance(value, list) or (size is not None and len(value) != size):
        raise _refused(where, "another shape", f"a list of {size} bytes" if size is not None else "a list of bytes")
    if any(type(each) is not int or not 0 <= each <= 255 for each in value):
        raise _refused(where, "numbers that are no bytes", "0 to 255")
    return bytes(value)


def _little(value: Any, size: int, where: str) -> bytes:
    if type(value) is not int or not 0 <= value < 1 << (8 * size):
        raise _refused(where, "another type or range", f"an integer of {size} bytes")
    return value.to_bytes(size, "little")


def _json(data: bytes, where: str) -> Any:
    try:
        return json_decode(data, limit=LIMIT, canonical=False)
    except ValueError as error:
        raise _malformed(where, str(error)[:200], f"one JSON value of at most {LIMIT} bytes") from error


def _canonical(value: Any) -> bytes:
    try:
        return json_encode(value)
    except ValueError as error:
        raise _malformed("kbs.runtime-data", str(error)[:100], "text that RFC 8785 can encode") from error


def _malformed(where: str, found: str, wanted: str, hint: str = "") -> PeerError:
    return PeerError(
        "this is not KBS protocol 0.4.0", code="protocol", reasons=(Reason(where, found, wanted, hint),), hint=hint
    )


def _refused(where: str, found: str, wanted: str, hint: str = "") -> EvidenceError:
    return EvidenceError(
        "the evidence does not parse", code="evidence-malformed", reasons=(Reason(where, found, wanted, hint),)
    )
