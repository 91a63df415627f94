"""The words of RFC 9334 (RATS) as frozen types: evidence, claims, policy.

Nothing here is trusted by existing: `Evidence` is what an attester sent, `Claims` is what a verifier found
authentic, `Policy` is what a relying party wants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from types import MappingProxyType
from typing import Final, Literal

PlaceKind = Literal["tee", "attested-host", "he"]
ClaimsKind = Literal["tee", "attested-host", "he", "device"]
"""What evidence can be of: a place, or a device that is part of one (GPU, switch, TPM beside a TEE)."""

NOT_RATED: Final = "NotRated"
"""`tcb_status` of hardware whose vendor publishes no TCB levels; security version numbers are judged instead."""


IDENTITIES: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "ppid": frozenset({"tdx", "sgx", "azure-tdx"}),
        "platform_instance_id": frozenset(),
        "fmspc": frozenset({"tdx", "sgx", "azure-tdx"}),
        "chip_id": frozenset({"sev-snp", "azure-snp"}),
        "csp_id": frozenset(),
        "module_id": frozenset({"nitro"}),
        "instance_id": frozenset(),
        "ak": frozenset({"tpm"}),
        "ek": frozenset(),
        "vtpm_ak": frozenset({"azure-snp", "azure-tdx"}),
        "vm_unique_id": frozenset(),
        "ueid": frozenset({"nvidia-gpu"}),
        "udid": frozenset(),
        "device_key": frozenset({"nvidia-gpu"}),
    }
)
"""Names in `Claims.platform` that say which machine it is, or whose: a policy may list them. Each with the TEE types that
always have it; an empty set: some machines of that vendor have it."""


FIRMWARE: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    dict.fromkeys(("sev-snp", "azure-snp"), frozenset({"bootloader", "tee", "snp", "microcode", "fmc", "abi"}))
)
"""TEE type without TCB dates -> the names in `Claims.svns` that its vendor raises with firmware. The others (`guest_svn`, a
reset count) are the guest's own or count something else, and say nothing about the age of firmware."""


AUTHORITY: Final = "authority:"
"""Begins every TEE type that is a service's word and no hardware: `authority:<name>/<type>` (`authority.py`)."""
AuthorityKind = Literal["maa", "confidential-space", "nras"]
VOUCHED: Final[Mapping[AuthorityKind, tuple[str, ...]]] = MappingProxyType(
    {
        "maa": ("sevsnpvm", "tdxvm", "sgx", "azurevm-sevsnpvm", "azurevm-tdxvm"),
        "confidential-space": ("gcp_amd_sev", "gcp_amd_sev_es", "gcp_amd_sev_snp", "gcp_intel_tdx"),
        "nras": ("nvidia-gpu",),
    }
)
"""What a service of each kind can say a machine or a GPU is: `Claims.tee` after the name. Shielded VMs and switches are left
out, which no place takes."""
_BELOW: Final[Mapping[str, str]] = MappingProxyType(
    {
        "sevsnpvm": "sev-snp",
        "tdxvm": "tdx",
        "sgx": "sgx",
        "azurevm-sevsnpvm": "azure-snp",
        "azurevm-tdxvm": "azure-tdx",
        "gcp_amd_sev_snp": "sev-snp",
        "gcp_intel_tdx": "tdx",
        "nvidia-gpu": "nvidia-gpu",
    }
)


def base(tee: str) -> str:
    """Return the kind of hardware that `tee` is or plays: `tdx` for `soft-tdx`."""
    return tee.removeprefix("soft-")


def below(tee: str) -> str:
    """Return `base`, or the kind of hardware that a service speaks about: `sev-snp` for `authority:azure/sevsnpvm`. For rules
    about what such hardware always shows or never has; no policy that accepts the hardware accepts the service."""
    return _BELOW.get(tee.rpartition("/")[2], tee) if tee.startswith(AUTHORITY) else base(tee)


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
    """What the hardware signed, in the vendor's form."""
    events: tuple[Event, ...] = ()
    """What the measured software recorded after launch (workload, configuration)."""
    parts: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    """What else explains the quote: certificates, PCR values, boot and IMA logs. Each kind lists its names; another name
    is malformed. Never believed by itself: a part counts only where a signature or a replay ends at it."""
    devices: tuple[Evidence, ...] = ()
    """Evidence of devices of the same machine, each over the 32-byte form of the same binding; one level deep."""


@dataclass(frozen=True, slots=True)
class BootEvent:
    """One entry of a firmware event log (TCG2, CCEL) or of IMA, after its replay gave the signed register.

    `digest` is what extended `register`. `data` is None where it does not hash to `digest`: most firmware logs data that it
    did not measure, and a reader must not see it.
    """

    register: int
    type: str
    """TCG name, such as `EV_EFI_VARIABLE_AUTHORITY`, or `ima`."""
    digest: bytes
    data: bytes | None = None
    label: str = ""
    """For people only (a path, a variable's name): not authenticated unless `data` is not None."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What a verifier found authentic. Absent knowledge is the refusing value (debug True, status empty)."""

    kind: ClaimsKind
    tee: str
    """`tdx`, `sgx`, `sev-snp`, `nitro`, `tpm`, `nvidia-gpu`, ..., or `soft-tdx` when the root is a published test root."""
    debug: bool = True
    tcb_status: str = ""
    """Vendor's word, such as `UpToDate` or `OutOfDate`, or `NotRated` where the vendor has none."""
    tcb_date: date | None = None
    """Date of the matched TCB level; the contract's `min_tcb` compares its year and month."""
    advisories: tuple[str, ...] = ()
    report_data: bytes = b""
    """What the attester bound into the quote: 64 bytes, or 32 where the hardware has no room."""
    measurements: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    """`mrtd`, `rtmr0` .. `rtmr3`, `mrenclave`, `measurement`, `pcr7`, ...: vendor's names in lower case."""
    launch: str = ""
    """Name of the measurement that names the software started: `mrtd`, `mrenclave`, `measurement`, `pcr0`, `rim`, ..."""
    svns: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Security version numbers that a floor can be set for: `isvsvn`, `snp`, `microcode`, `tcb_evaluation_data_number`."""
    attributes: Mapping[str, bool] = field(default_factory=lambda: MappingProxyType({}))
    """Switches of the platform that a policy may demand or forbid: `smt`, `migratable`, `ciphertext_hiding`."""
    events: tuple[Event, ...] = ()
    """Events whose replay equals the runtime register and whose data hashes to its digest."""
    log_in: Literal["register", "report-data"] = "register"
    """Where the hardware vouches for `events`: a runtime register, or (no register) the report data: `events.fold`."""
    boot_log: tuple[BootEvent, ...] = ()
    """Boot events whose replay equals signed registers."""
    platform: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Identity of the machine for allow and deny lists: `ppid`, `chip_id`, `csp_id`, `ueid`, ... bytes in hex."""
    gpu: Literal["none", "confidential"] = "none"
    boot: str | None = None
    """Boot state of a measured host: `sha256:` and 64 hex digits over its boot registers."""
    scheme: str | None = None
    devices: tuple[Claims, ...] = ()
    """What was found authentic in `Evidence.devices`, in the same order."""
    chain: tuple[str, ...] = ()
    """For people: the certificates that were relied on, leaf first, one sentence each."""
    valid_until: datetime | None = None
    """When the first certificate or piece of collateral that this rests on ends."""

    @property
    def soft(self) -> bool:
        """True when a published test root signed any of it: nothing is protected."""
        return self.tee.startswith("soft-") or any(device.soft for device in self.devices)


@dataclass(frozen=True, slots=True)
class Policy:
    """What a relying party accepts. Built from a contract's place, never by hand from parts of evidence.

    An empty `accept` accepts nothing. `where` prefixes every violation, e.g. `place.enclave`.
    """

    where: str
    kind: PlaceKind
    accept: frozenset[str] = frozenset()
    """TEE types, with `simulated` standing for every soft TEE. `authority:<name>/<type>` is a service's word about a machine,
    `authority:<name>/nvidia-gpu` about a GPU beside one."""
    min_tcb: tuple[int, int] | None = None
    """Year and month."""
    debug: bool = False
    gpu: Literal["none", "confidential"] = "none"
    boot: frozenset[str] = frozenset()
    scheme: str | None = None
    tcb_statuses: frozenset[str] = frozenset({"UpToDate", "SWHardeningNeeded", NOT_RATED})
    deny_advisories: frozenset[str] = frozenset()
    reference_values: Mapping[str, frozenset[bytes]] = field(default_factory=lambda: MappingProxyType({}))
    """Measurement name -> accepted values. A name listed here with an empty set accepts nothing."""
    software: tuple[Software, ...] = ()
    """Reference values of accepted software, any one of them; empty sets no rule here (the broker's still hold)."""
    min_svn: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: MappingProxyType({}))
    """TEE type -> name in `Claims.svns` -> least value; an absent number refuses."""
    require: Mapping[str, Mapping[str, bool]] = field(default_factory=lambda: MappingProxyType({}))
    """TEE type -> name in `Claims.attributes` -> wanted; an absent attribute refuses."""
    max_tcb_age: timedelta | None = None
    """How many days before `today` the matched TCB level may be dated; without `today` or a date it refuses."""
    platform_allow: frozenset[tuple[str, str]] | None = None
    """(name in `Claims.platform`, value): at least one must hold of the machine. None sets no rule; an empty set accepts no
    machine."""
    platform_deny: frozenset[tuple[str, str]] = frozenset()
    """(name, value): none may hold, of the machine or of any device. An id that this hardware always has (`IDENTITIES`) and
    that is absent refuses: a machine that hides its name is not shown to be another one."""
    gpu_allow: frozenset[tuple[str, str]] | None = None
    """(name, value): there must be a GPU, and for each GPU at least one must hold. None sets no rule."""
    require_attested_boot: bool = False
    """A boot log must explain the boot registers."""


@dataclass(frozen=True, slots=True)
class LogRule:
    """A rule over a replayed boot log: an event of `register` (and `type`, unless empty) that has one of `digests`.

    `only`: every event of that register must have one of the digests, and there must be one. It takes no type: firmware
    measures the data of an event and not its type, so whoever carries the log could give an unwanted event another type.

    Raises:
        ValueError: `only` with a type.
    """

    register: int
    digests: frozenset[bytes]
    type: str = ""
    only: bool = False

    def __post_init__(self) -> None:
        if self.only and self.type:
            raise ValueError("a type is not measured: `only` is about all events of a register")


@dataclass(frozen=True, slots=True)
class Software:
    """Reference values of one accepted build or product: every rule must hold. Without any rule it accepts nothing.

    Exact: `measurements` (name -> accepted values). Signer + product + minimum version: `measurements` with `mrsigner`,
    `svns_equal` with `isvprodid`, `svns_least` with `isvsvn`. Registers that differ from boot to boot: `log`.
    """

    label: str
    tee: str = ""
    """TEE type that this is for, without `soft-`; empty for any."""
    measurements: Mapping[str, frozenset[bytes]] = field(default_factory=lambda: MappingProxyType({}))
    svns_equal: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    svns_least: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    log: tuple[LogRule, ...] = ()
