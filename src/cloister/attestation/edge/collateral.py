"""Where endorsements come from: files, snapshots and stores that the user names, or a generator for the test root.

Nothing is fetched here (`edge/fetch.py` does). Real collateral is public and signed; any PCCS or `dcap-qvl` client can write it to
a file. It ages: after `nextUpdate` (30 days) every quote under it is refused, so the file must be renewed.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Final

from cloister.attestation.collateral.snapshot import FILE_LIMIT, decode, looks_like_one, unseal
from cloister.attestation.dcap import collateral as dcap_collateral
from cloister.attestation.edge.store import INDEX, Store, read_file
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.errors import EvidenceError, InputError

SOFT: Final = {
    "cca": "cca",
    "nitro": "nitro",
    "nvidia-gpu": "nvidia",
    "sev-snp": "snp",
    "sgx": "sgx",
    "tdx": "tdx",
    "tpm": "tpm",
}
"""Kind of evidence -> module of `attestation.soft` that makes its collateral."""
_INSIDE: Final = {"azure-snp": "sev-snp", "azure-tdx": "tdx"}
"""What a paravisor's evidence is built on."""


def soft_collateral(now: datetime, *kinds: str) -> Endorsements:
    """Return collateral for soft TEEs of `kinds` (default: all) that is valid at `now`.

    It is issued at the beginning of yesterday (UTC) and valid for 30 days; a GPU's OCSP responses live a day, as the vendor's
    do, so they are issued today. It protects nothing. A service that runs longer than a day calls this again; the same day gives
    the same objects.

    Raises:
        ValueError: `now` has no time zone.
    """
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    day = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    wanted = {_INSIDE.get(kind, kind) for kind in kinds} & SOFT.keys()
    return _soft(day, tuple(sorted(wanted)) if kinds else tuple(SOFT))


@lru_cache(maxsize=16)
def _soft(day: datetime, kinds: tuple[str, ...]) -> Endorsements:
    items: list[Endorsement] = []
    for kind in kinds:
        issued = day if kind == "nvidia-gpu" else day - timedelta(days=1)
        made = importlib.import_module(f"cloister.attestation.soft.{SOFT[kind]}").endorsements(issued)
        items += made.items if isinstance(made, Endorsements) else made
    return Endorsements(tuple(items))


def load_collateral(path: Path) -> Endorsements:
    """Return the SGX or TDX collateral in the JSON file `path`, as dcap-qvl writes it.

    Only its form is checked here; `verify` checks signatures and time.

    Raises:
        InputError: the file cannot be read, is too large, or is not collateral.
    """
    try:
        with path.open("rb") as file:
            data = file.read(dcap_collateral.LIMIT + 1)
    except OSError as error:
        raise InputError(f"the collateral file {path} cannot be read: {error.strerror}") from error
    try:
        found = dcap_collateral.parse(data)
        return Endorsements((Endorsement(found.kind, found.fmspc, data),))
    except EvidenceError as error:
        raise InputError(f"the file {path} holds no SGX or TDX collateral", reasons=error.reasons) from error


def load_all(paths: Sequence[Path]) -> Endorsements:
    """Return the collateral in `paths`; later ones count. Each is a file of a vendor, a snapshot, or the folder of a store.

    The signature of a snapshot is not asked for here: whoever names a file has chosen it, and the vendors' signatures decide. Where
    a snapshot may change what is used from then on (`Store.import_`), its signer counts.

    Raises:
        InputError: a file cannot be read, is too large, or is no collateral.
        TamperedError, MachineError: a store is damaged, or cannot be read.
    """
    found = Endorsements()
    for path in paths:
        found = found | _load(path)
    return found


def _load(path: Path) -> Endorsements:
    if path.is_dir():
        if not Store.is_one(path):
            raise InputError(f"the folder {path} is no store of collateral", hint="`cloister collateral` makes one")
        return Store(path).endorsements()
    try:
        with path.open("rb") as file:
            head = file.read(8)
            data = head + file.read(FILE_LIMIT + 1) if looks_like_one(head) else b""
    except OSError as error:
        raise InputError(f"the collateral file {path} cannot be read: {error.strerror}") from error
    if not data:
        return Endorsements(read_file(path))
    try:
        return decode(unseal(data)[0]).endorsements
    except EvidenceError as error:
        raise InputError(f"the file {path} holds no snapshot of collateral", reasons=error.reasons) from error


def signature_of(paths: Sequence[Path]) -> tuple[tuple[int, ...], ...]:
    """Return what changes when something in `paths` changes: one `stat` for each. A path that is gone is a change, too."""
    found: list[tuple[int, ...]] = []
    for path in paths:
        try:
            status = (path / INDEX if path.is_dir() else path).stat()
        except OSError:
            found.append((0,))
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)
