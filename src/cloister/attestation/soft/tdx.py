"""Soft TDX: bit-exact quotes (v4) and full collateral under a test root. It protects nothing.

What it shares with soft SGX (keys from a published label, authority, machines, collateral) is in `soft.intel`; this adds
the TD report. Whatever is emitted says so: subject names, FMSPC, TEE type (`soft-tdx`), advisories.

    platform(...)      one machine; once per machine
    quote(...)         one signature; docs/attestation/tdx.md has the measured time
    collateral(...)    once per validity window; `endorsements` for every soft TDX machine
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, Final

from cloister.attestation.endorsements import Endorsement
from cloister.attestation.soft import intel
from cloister.attestation.soft.intel import (
    CPU_SVN,
    FIRST,
    FMSPC,
    LABEL,
    LAST,
    LIFETIME,
    NOTICE,
    PCE_SVN,
    QE_AUTH_DATA,
    QE_ISVSVN,
    STATUSES,
    Authority,
    Level,
    Platform,
    authority,
    derive_key,
    levels,
)
from cloister.attestation.tdx import format as tdx_format

__all__ = [
    "CPU_SVN",
    "FIRST",
    "FMSPC",
    "LABEL",
    "LAST",
    "LIFETIME",
    "NOTICE",
    "PCE_SVN",
    "QE_AUTH_DATA",
    "QE_ISVSVN",
    "SEPT_VE_DISABLE",
    "STATUSES",
    "TEE_TCB_SVN",
    "XFAM",
    "Authority",
    "Level",
    "Platform",
    "authority",
    "collateral",
    "derive_key",
    "endorsements",
    "levels",
    "platform",
    "quote",
]

TEE_TCB_SVN: Final = bytes([5, 1]) + bytes(14)
"""TDX module SVN 5, module version 1."""
SEPT_VE_DISABLE: Final = 1 << 28
XFAM: Final = bytes.fromhex("e702060000000000")
_MRSEAM: Final = hashlib.sha384(b"cloister soft TDX module - protects nothing").digest()


def platform(name: str = "soft", **options: Any) -> Platform:
    """Return the soft TDX machine `name`; options as of `soft.intel.machine`.

    Raises:
        ValueError: as `soft.intel.machine`.
    """
    return intel.machine("tdx", name, **options)


def quote(
    machine: Platform,
    *,
    mrtd: bytes,
    report_data: bytes,
    rtmr3: bytes = bytes(48),
    debug: bool = False,
    td_attributes: int = SEPT_VE_DISABLE,
    tee_tcb_svn: bytes = TEE_TCB_SVN,
    boot: tuple[bytes, bytes, bytes] = (bytes(48), bytes(48), bytes(48)),
    mrservicetd: bytes | None = None,
    mrconfigid: bytes = bytes(48),
) -> bytes:
    """Return a TDX quote of `machine` over the given registers; `boot` are RTMR 0 to 2, zero where nothing booted.

    Version 4; with `mrservicetd`, version 5 with a TD report 1.5.

    Raises:
        ValueError: a value of the wrong size.
    """
    for what, value, size in (
        ("mrtd", mrtd, 48),
        ("rtmr3", rtmr3, 48),
        ("report_data", report_data, 64),
        ("tee_tcb_svn", tee_tcb_svn, 16),
        ("boot", b"".join(boot), 144),
        ("mrservicetd", mrservicetd or bytes(48), 48),
        ("mrconfigid", mrconfigid, 48),
    ):
        if len(value) != size:
            raise ValueError(f"{what} of {len(value)} bytes, wanted {size}")
    attributes = td_attributes | (tdx_format.DEBUG_BIT if debug else 0)
    report = b"".join(
        (
            tee_tcb_svn,
            _MRSEAM,
            bytes(48),  # MRSIGNERSEAM of Intel's modules
            bytes(8),  # SEAMATTRIBUTES
            attributes.to_bytes(8, "little"),
            XFAM,
            mrtd,
            mrconfigid,
            bytes(48 * 2),  # MROWNER, MROWNERCONFIG
            *boot,
            rtmr3,
            report_data,
        )
    )
    if mrservicetd is None:
        return intel.signed(machine, intel.header(tdx_format.TDX, 4) + report)
    report += tee_tcb_svn + mrservicetd
    prefix = (3).to_bytes(2, "little") + len(report).to_bytes(4, "little")
    return intel.signed(machine, intel.header(tdx_format.TDX, 5) + prefix + report)


def collateral(
    issued: datetime,
    *,
    lifetime: timedelta = LIFETIME,
    fmspc: str = FMSPC,
    tcb_levels: Iterable[Level] | None = None,
    revoked: tuple[int, ...] = (),
    revoke_ca: bool = False,
    label: str = LABEL,
    **options: Any,
) -> bytes:
    """Return TDX collateral as JSON, valid from `issued` for `lifetime`; arguments as of `soft.intel.collateral`.

    Raises:
        ValueError: `issued` has no time zone.
    """
    return intel.collateral(
        tdx_format.TDX,
        issued,
        lifetime=lifetime,
        fmspc=fmspc,
        tcb_levels=tcb_levels,
        revoked=revoked,
        revoke_ca=revoke_ca,
        label=label,
        **options,
    )


def endorsements(issued: datetime) -> tuple[Endorsement, ...]:
    """Return what endorses every soft TDX machine from `issued` on, for `LIFETIME`."""
    return (Endorsement("tdx", FMSPC, collateral(issued)),)
