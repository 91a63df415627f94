"""The words of RFC 9334 (RATS) as frozen types: evidence, claims, policy.

Nothing here is trusted by existing: `Evidence` is what an attester sent, `Claims` is what a verifier found
authentic, `Policy` is what a relying party wants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from types import MappingProxyType
from typing import Literal

PlaceKind = Literal["tee", "attested-host", "he"]


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a runtime event log: `digest` (48 bytes) extended a register; `data` counts only after it
    hashes (SHA-384) to `digest`."""

    register: int
    name: str
    digest: bytes
    data: bytes


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the attester sends: a vendor quote and the runtime event log that explains its registers.

    `kind` is the wire format (`tdx`), never a claim about trust: which root signed decides between `tdx` and `soft-tdx`.
    """

    kind: str
    quote: bytes
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class Claims:
    """What a verifier found authentic. Absent knowledge is the refusing value (debug True, status empty)."""

    kind: PlaceKind
    tee: str
    """`tdx`, `sev-snp`, `sgx`, `nitro`, or `soft-tdx` when the root is a published test root."""
    debug: bool = True
    tcb_status: str = ""
    """Vendor's word, such as `UpToDate` or `OutOfDate`."""
    tcb_date: date | None = None
    """Date of the matched TCB level; the contract's `min_tcb` compares its year and month."""
    advisories: tuple[str, ...] = ()
    report_data: bytes = b""
    """The 64 bytes that the attester bound into the quote."""
    measurements: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    """`mrtd`, `rtmr0` .. `rtmr3`, and later `mrenclave`, `pcr7`, ...: vendor's names in lower case."""
    events: tuple[Event, ...] = ()
    """Events whose replay equals the signed register and whose data hashes to its digest."""
    platform: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Identity of the machine for allow and deny lists: `ppid`, `fmspc`, `chip_id`, ... in hex."""
    gpu: Literal["none", "confidential"] = "none"
    boot: str | None = None
    scheme: str | None = None

    @property
    def soft(self) -> bool:
        """True when a published test root signed: nothing is protected."""
        return self.tee.startswith("soft-")


@dataclass(frozen=True, slots=True)
class Policy:
    """What a relying party accepts. Built from a contract's place, never by hand from parts of evidence.

    An empty `accept` accepts nothing. `where` prefixes every violation, e.g. `place.enclave`.
    """

    where: str
    kind: PlaceKind
    accept: frozenset[str] = frozenset()
    """TEE types, with `simulated` standing for every soft TEE."""
    min_tcb: tuple[int, int] | None = None
    """Year and month."""
    debug: bool = False
    gpu: Literal["none", "confidential"] = "none"
    boot: frozenset[str] = frozenset()
    scheme: str | None = None
    tcb_statuses: frozenset[str] = frozenset({"UpToDate", "SWHardeningNeeded"})
    deny_advisories: frozenset[str] = frozenset()
    reference_values: Mapping[str, frozenset[bytes]] = field(default_factory=lambda: MappingProxyType({}))
    """Measurement name -> accepted values. A name listed here with an empty set accepts nothing."""
