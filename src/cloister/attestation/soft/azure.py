"""Soft Azure confidential VMs: HCL reports and vTPM quotes over soft SEV-SNP or TDX evidence. They protect nothing.

Pure and deterministic, as `soft.snp` and `soft.tdx`, under whose test roots the hardware reports are made. The vTPM's key is derived from a
published label too. Endorsements are those of the hardware: `soft.snp.endorsements`, `soft.tdx.endorsements`.

    vtpm(name)           one vTPM: its RSA key, and the runtime JSON that names it
    snp_evidence(...)    what an attester in a VM on SEV-SNP sends
    tdx_evidence(...)    the same on TDX

Formats: azure/format.py, tpm/format.py.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from cloister.attestation.azure import format as hcl_format
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.soft import tpm as soft_tpm
from cloister.attestation.soft.intel import Platform
from cloister.attestation.soft.snp import RsaKey
from cloister.attestation.tpm import format as tpm_format
from cloister.attestation.tpm import verify as tpm_verify
from cloister.attestation.types import Event, Evidence
from cloister.crypto.canonical import json_encode

NOTICE: Final = soft_snp.NOTICE
LABEL: Final = "cloister soft Azure vTPM 1: everybody knows this key"
PARAVISOR: Final = hashlib.sha384(b"cloister soft paravisor - protects nothing").digest()
"""The launch measurement: Microsoft's paravisor, on real machines."""
_SIGNER: Final = b"\x00\x0b" + hashlib.sha256(b"cloister soft Azure vTPM").digest()


@dataclass(frozen=True, slots=True)
class Vtpm:
    """One soft vTPM."""

    name: str
    key: RsaKey


@lru_cache(maxsize=16)
def vtpm(name: str = "soft", label: str = LABEL) -> Vtpm:
    """Return the soft vTPM `name`."""
    return Vtpm(name, soft_snp.derive_rsa_key(f"{label}/{name}", 2048))


def runtime(
    machine: Vtpm,
    *,
    secure_boot: bool = True,
    console: bool = False,
    user_data: bytes = bytes(64),
    keys: list[dict[str, Any]] | None = None,
) -> bytes:
    """Return the runtime JSON that names the key of `machine`; `keys` replaces the list."""
    own = {"kid": hcl_format.AK, "key_ops": ["sign"], "kty": "RSA", "e": "AQAB", "n": _base64url(machine.key)}
    encrypts = {**own, "kid": "HCLEkPub", "key_ops": ["encrypt"], "n": _base64url(vtpm(f"{machine.name}/ek").key)}
    return json_encode(
        {
            "keys": [own, encrypts] if keys is None else keys,
            "vm-configuration": {
                "console-enabled": console,
                "secure-boot": secure_boot,
                "tpm-enabled": True,
                "vmUniqueId": f"SOFT-{hashlib.sha256(machine.name.encode()).hexdigest()[:24].upper()}",
            },
            "user-data": user_data.hex().upper(),
        }
    )


def quote(
    machine: Vtpm,
    pcrs: Mapping[int, bytes],
    *,
    report_data: bytes,
    bare: bool = False,
    reset_count: int = 1,
    restart_count: int = 0,
    safe: bool = True,
    magic: int = tpm_format.GENERATED,
    kind: int = tpm_format.QUOTE,
) -> bytes:
    """Return TPM2B_ATTEST and a signature over the SHA-256 bank `pcrs`; `bare`: the signature without its header."""
    chosen = tuple(sorted(pcrs))
    digest = hashlib.sha256(b"".join(pcrs[index] for index in chosen)).digest()
    attest = b"".join(
        (
            struct.pack(">IH", magic, kind),
            _sized(_SIGNER),
            _sized(report_data),
            struct.pack(">QIIBQ", 1000, reset_count, restart_count, safe, 0x2020031200120003),
            tpm_format.encode_selection((tpm_format.Selection("sha256", chosen),)),
            _sized(digest),
        )
    )
    signature = machine.key.sign_pkcs1(attest)
    if not bare:
        signature = struct.pack(">HH", tpm_format.RSASSA, tpm_format.HASH_IDS["sha256"]) + _sized(signature)
    return tpm_verify.join(attest, signature)


def snp_evidence(
    machine: soft_snp.Machine | None = None,
    *,
    report_data: bytes,
    events: tuple[Event, ...] = (),
    tpm: Vtpm | None = None,
    named: Vtpm | None = None,
    host: soft_tpm.Host | None = None,
    runtime_json: bytes | None = None,
    vouched: bytes | None = None,
    boot_log: bool = True,
    parts: Mapping[str, bytes | None] | None = None,
    report: Mapping[str, Any] | None = None,
    **options: Any,
) -> Evidence:
    """Return what an attester in a VM on SEV-SNP sends; `report_data` (32 bytes) is the quote's extra data.

    Args:
        tpm: the vTPM that signs; `named` is the one in the runtime JSON.
        runtime_json: what is sent; `vouched` are the 64 bytes of report data that the hardware signs instead of its hash.
        parts: parts that replace the true ones; None leaves one out.
        report: options of `soft.snp.report`; `options` are those of `quote`.
    """
    hardware = soft_snp.machine() if machine is None else machine
    sent = runtime(named or tpm or vtpm()) if runtime_json is None else runtime_json
    signed = hashlib.sha256(sent).digest().ljust(64, b"\x00") if vouched is None else vouched
    made = soft_snp.report(hardware, report_data=signed, **{"measurement": PARAVISOR, **(report or {})})
    own: dict[str, bytes | None] = {"leaf": hardware.leaf}
    return _evidence(
        "azure-snp", hcl_format.SNP, made, sent, own, report_data, events, tpm, host, boot_log, parts, options
    )


def tdx_evidence(
    machine: Platform | None = None,
    *,
    report_data: bytes,
    events: tuple[Event, ...] = (),
    tpm: Vtpm | None = None,
    named: Vtpm | None = None,
    host: soft_tpm.Host | None = None,
    runtime_json: bytes | None = None,
    vouched: bytes | None = None,
    boot_log: bool = True,
    parts: Mapping[str, bytes | None] | None = None,
    report: Mapping[str, Any] | None = None,
    **options: Any,
) -> Evidence:
    """Return what an attester in a VM on TDX sends; arguments as of `snp_evidence`, `report` as of `soft.tdx.quote`."""
    hardware = soft_tdx.platform() if machine is None else machine
    sent = runtime(named or tpm or vtpm()) if runtime_json is None else runtime_json
    signed = hashlib.sha256(sent).digest().ljust(64, b"\x00") if vouched is None else vouched
    rest = {"mrtd": PARAVISOR, "rtmr3": hashlib.sha384(b"soft paravisor's own").digest(), **(report or {})}
    own: dict[str, bytes | None] = {"td-quote": soft_tdx.quote(hardware, report_data=signed, **rest)}
    td_report = hashlib.sha512(b"a TDREPORT, which only its own CPU could check").digest() * 16
    return _evidence(
        "azure-tdx",
        hcl_format.TDX,
        td_report.ljust(hcl_format.REPORT_BYTES, b"\x00"),
        sent,
        own,
        report_data,
        events,
        tpm,
        host,
        boot_log,
        parts,
        options,
    )


def _evidence(
    kind: str,
    report_type: int,
    made: bytes,
    sent: bytes,
    own: Mapping[str, bytes | None],
    report_data: bytes,
    events: tuple[Event, ...],
    tpm: Vtpm | None,
    host: soft_tpm.Host | None,
    boot_log: bool,
    parts: Mapping[str, bytes | None] | None,
    options: Mapping[str, Any],
) -> Evidence:
    booted = _host() if host is None else host
    pcrs = booted.pcrs(events)
    found: dict[str, bytes | None] = {
        "tpm-quote": quote(vtpm() if tpm is None else tpm, pcrs, report_data=report_data, **options),
        "pcrs": tpm_verify.encode_pcrs({"sha256": pcrs}),
        "boot-log": booted.boot_log() if boot_log else None,
        **own,
        **(parts or {}),
    }
    kept = {name: part for name, part in found.items() if part is not None}
    return Evidence(kind, hcl_format.build(report_type, made, sent), events, MappingProxyType(kept))


@lru_cache(maxsize=1)
def _host() -> soft_tpm.Host:
    return soft_tpm.host()


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def _base64url(key: RsaKey) -> str:
    return base64.urlsafe_b64encode(key.modulus.to_bytes(key.size, "big")).rstrip(b"=").decode()
