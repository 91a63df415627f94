"""Soft SGX: bit-exact quotes (v3) and full collateral under a test root. It protects nothing.

What it shares with soft TDX (keys from a published label, authority, machines, collateral) is in `soft.intel`; this adds
the enclave report. Whatever is emitted says so: subject names, FMSPC, TEE type (`soft-sgx`), advisories.

    platform(...)      one machine; once per machine
    quote(...)         one signature
    collateral(...)    once per validity window; `endorsements` for every soft SGX machine
"""

from __future__ import annotations

import hashlib
import struct
from datetime import datetime
from typing import Any, Final

from cloister.attestation.endorsements import Endorsement
from cloister.attestation.sgx import format as sgx_format
from cloister.attestation.soft import intel
from cloister.attestation.soft.intel import CPU_SVN, FMSPC, LIFETIME, NOTICE, STATUSES, Platform

__all__ = [
    "DEBUG",
    "FMSPC",
    "INIT",
    "KSS",
    "LIFETIME",
    "MODE64BIT",
    "MRSIGNER",
    "NOTICE",
    "PROVISION_KEY",
    "STATUSES",
    "Platform",
    "collateral",
    "endorsements",
    "platform",
    "quote",
]

INIT: Final = 1 << 0
DEBUG: Final = 1 << 1
MODE64BIT: Final = 1 << 2
PROVISION_KEY: Final = 1 << 4
KSS: Final = 1 << 7
XFRM: Final = bytes.fromhex("e700000000000000")
MRSIGNER: Final = hashlib.sha256(b"cloister soft enclave signer - protects nothing").digest()


def platform(name: str = "soft", **options: Any) -> Platform:
    """Return the soft SGX machine `name`; options as of `soft.intel.machine`.

    Raises:
        ValueError: as `soft.intel.machine`.
    """
    return intel.machine("sgx", name, **options)


def quote(
    machine: Platform,
    *,
    mrenclave: bytes,
    report_data: bytes,
    mrsigner: bytes = MRSIGNER,
    isvprodid: int = 0,
    isvsvn: int = 0,
    debug: bool = False,
    flags: int = INIT | MODE64BIT,
    configid: bytes = bytes(64),
    configsvn: int = 0,
    isvextprodid: bytes = bytes(16),
    isvfamilyid: bytes = bytes(16),
) -> bytes:
    """Return an SGX quote v3 of `machine` over the given report.

    Raises:
        ValueError: a value of the wrong size.
    """
    for what, value, size in (
        ("mrenclave", mrenclave, 32),
        ("mrsigner", mrsigner, 32),
        ("report_data", report_data, 64),
        ("configid", configid, 64),
        ("isvextprodid", isvextprodid, 16),
        ("isvfamilyid", isvfamilyid, 16),
    ):
        if len(value) != size:
            raise ValueError(f"{what} of {len(value)} bytes, wanted {size}")
    for what, number in (("isvprodid", isvprodid), ("isvsvn", isvsvn), ("configsvn", configsvn)):
        if not 0 <= number < 1 << 16:
            raise ValueError(f"{what} {number}, wanted 16 bits")
    report = b"".join(
        (
            CPU_SVN,
            bytes(16),  # MISCSELECT, reserved
            isvextprodid,
            (flags | (DEBUG if debug else 0)).to_bytes(8, "little"),
            XFRM,
            mrenclave,
            bytes(32),
            mrsigner,
            bytes(32),
            configid,
            struct.pack("<HHH", isvprodid, isvsvn, configsvn),
            bytes(42),
            isvfamilyid,
            report_data,
        )
    )
    return intel.signed(machine, intel.header(sgx_format.SGX, 3) + report)


def collateral(issued: datetime, **options: Any) -> bytes:
    """Return SGX collateral as JSON, valid from `issued`; arguments as of `soft.intel.collateral`.

    Raises:
        ValueError: `issued` has no time zone.
    """
    return intel.collateral(sgx_format.SGX, issued, **options)


def endorsements(issued: datetime) -> tuple[Endorsement, ...]:
    """Return what endorses every soft SGX machine from `issued` on, for `LIFETIME`."""
    return (Endorsement("sgx", FMSPC, collateral(issued)),)
