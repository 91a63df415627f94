"""Attesters: what collects evidence. Hardware through the kernel, or soft by name.

One attester is one way to ask a machine: `tsm` (TDX, SEV-SNP, CCA through configfs-tsm), `gramine` (SGX), `nsm` (Nitro),
`tpm` (a measured host, and Azure's virtual TPM), `nvml` (GPUs, beside a CPU), `soft` (none of it, by name only).

Each keeps the log of its events and checks what the hardware gave before it is sent: bound to what we asked, and with the
register that our log explains. That is for operators, who learn of a broken set-up here; a verifier believes none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

from cloister.attestation import events as event_log
from cloister.attestation.binding import Binding
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.types import Event, Evidence
from cloister.errors import InputError, MachineError, Reason


class DeviceAttester(Protocol):
    """A device of this machine that attests beside the CPU: a GPU, a TPM."""

    @property
    def name(self) -> str:
        """`nvidia-gpu`, `tpm`, or `soft-..`."""
        ...

    def evidence(self, qualifying_data: bytes) -> Evidence:
        """Return fresh evidence over `qualifying_data` (32 bytes).

        Raises:
            ValueError: `qualifying_data` is not 32 bytes.
            MachineError: the device does not answer, or is in a state in which its evidence means nothing.
        """
        ...


class Attester(Protocol):
    """What a TEE can do for the program inside it."""

    @property
    def name(self) -> str:
        """A name of `HARDWARE` or `SOFT_KINDS`."""
        ...

    @property
    def report_data_bytes(self) -> int:
        """How much the hardware signs for us: 64 bytes (`Binding.report_data`), or 32 (`Binding.qualifying_data`)."""
        ...

    @property
    def devices(self) -> tuple[DeviceAttester, ...]:
        """Devices whose evidence belongs to every piece of evidence of this machine, in the order in which it is sent."""
        ...

    def extend(self, name: str, data: bytes) -> None:
        """Record an event, and extend the runtime register of the hardware that has one. It cannot be taken back.

        Every event is to be recorded before the first evidence: Nitro's register can be attested only once it is locked.

        Raises:
            MachineError: the register cannot be extended, is locked, or is not what the log so far says.
        """
        ...

    def evidence(self, report_data: bytes) -> Evidence:
        """Return fresh evidence of the CPU alone over `report_data`, with the event log so far; see `attest` for the machine.

        Raises:
            ValueError: `report_data` has not `report_data_bytes` bytes.
            MachineError: the hardware does not answer, or answers something else than was asked for.
        """
        ...


def attest(attester: Attester, binding: Binding) -> Evidence:
    """Return evidence of the whole machine over `binding`: its devices first, then the CPU over what they said.

    The verifier checks it against `binding.over(evidence.devices)`.

    Raises:
        ValueError: `binding` already names devices.
        MachineError: a device or the CPU does not answer.
    """
    if binding.devices:
        raise ValueError("the binding already names devices; give the one that they are to attest")
    devices = tuple(device.evidence(binding.for_devices().qualifying_data()) for device in attester.devices)
    full = binding.over(devices)
    data = full.report_data() if attester.report_data_bytes == 64 else full.qualifying_data()
    return replace(attester.evidence(data), devices=devices)


class SoftTdxAttester:
    """A TDX guest in software. It protects nothing.

    Args:
        measurement: MRTD, 48 bytes.
        machine: which soft machine, see `soft.tdx.platform`; default: one that is up to date.
        debug: set the debug bit, for tests.
        devices: attested beside the CPU.
    """

    notice: Final = soft_tdx.NOTICE
    report_data_bytes: Final = 64

    def __init__(
        self,
        measurement: bytes,
        *,
        machine: soft_tdx.Platform | None = None,
        debug: bool = False,
        devices: tuple[DeviceAttester, ...] = (),
    ) -> None:
        if len(measurement) != 48:
            raise ValueError(f"measurement of {len(measurement)} bytes, wanted 48")
        self._measurement = measurement
        self._machine = soft_tdx.platform() if machine is None else machine
        self._debug = debug
        self._register = event_log.INITIAL
        self._events: tuple[Event, ...] = ()
        self.devices = devices

    @property
    def name(self) -> str:
        return "soft-tdx"

    @property
    def launch(self) -> bytes:
        """What a verifier finds as the launch measurement."""
        return self._measurement

    def extend(self, name: str, data: bytes) -> None:
        entry = event_log.event(name, data)
        self._register = event_log.extend(self._register, entry.digest)
        self._events += (entry,)

    def evidence(self, report_data: bytes) -> Evidence:
        quote = soft_tdx.quote(
            self._machine,
            mrtd=self._measurement,
            rtmr3=self._register,
            report_data=report_data,
            debug=self._debug,
        )
        return Evidence("tdx", quote, self._events)

    def __repr__(self) -> str:
        return f"SoftTdxAttester({soft_tdx.NOTICE})"


Find = Callable[[], "Hardware"]


class Hardware(Protocol):
    """An attester that can say why it does not work here, and that devices can be put beside."""

    devices: tuple[DeviceAttester, ...]

    @property
    def name(self) -> str: ...

    @property
    def report_data_bytes(self) -> int: ...

    def extend(self, name: str, data: bytes) -> None: ...

    def evidence(self, report_data: bytes) -> Evidence: ...

    def missing(self) -> tuple[Reason, ...]:
        """Return what this machine lacks; empty means that it can be used."""
        ...


def _sgx() -> Hardware:
    from cloister.attestation.edge.gramine import GramineAttester

    return GramineAttester()


def _nitro() -> Hardware:
    from cloister.attestation.edge.nsm import NitroAttester

    return NitroAttester()


def _tdx() -> Hardware:
    from cloister.attestation.edge.tsm import TdxAttester

    return TdxAttester()


def _snp() -> Hardware:
    from cloister.attestation.edge.tsm import SnpAttester

    return SnpAttester()


def _cca() -> Hardware:
    from cloister.attestation.edge.tsm import CcaAttester

    return CcaAttester()


def _azure_snp() -> Hardware:
    from cloister.attestation.edge.azure import AzureAttester

    return AzureAttester("azure-snp")


def _azure_tdx() -> Hardware:
    from cloister.attestation.edge.azure import AzureAttester

    return AzureAttester("azure-tdx")


def _tpm() -> Hardware:
    from cloister.attestation.edge.tpm import TpmAttester

    return TpmAttester()


HARDWARE: Final[Mapping[str, Find]] = MappingProxyType(
    {
        "sgx": _sgx,
        "nitro": _nitro,
        "tdx": _tdx,
        "sev-snp": _snp,
        "cca": _cca,
        "azure-snp": _azure_snp,
        "azure-tdx": _azure_tdx,
        "tpm": _tpm,
    }
)
"""Kind -> its attester, in the order in which `auto` looks: what encloses a process comes before what encloses
its machine, and a TPM, which encloses nothing, is last."""


TRACES: Final[Mapping[str, tuple[Path, ...]]] = MappingProxyType(
    {
        "sgx": (Path("/dev/attestation/attestation_type"), Path("/dev/sgx_enclave")),
        "nitro": (Path("/dev/nsm"),),
        "tdx": (Path("/dev/tdx_guest"), Path("/sys/devices/virtual/misc/tdx_guest")),
        "sev-snp": (Path("/dev/sev-guest"),),
        "cca": (Path("/sys/devices/platform/arm-cca-dev"),),
        "tpm": (Path("/dev/tpmrm0"), Path("/dev/tpm0")),
    }
)
"""Kind -> what shows that the hardware is here, whether or not it can be used."""


@dataclass(frozen=True, slots=True)
class Sight:
    """One kind of hardware that left a trace on this machine."""

    kind: str
    traces: tuple[Path, ...]
    missing: tuple[Reason, ...]
    """What it lacks to attest; empty means that it can."""


def look(
    *, hardware: Mapping[str, Find] | None = None, traces: Mapping[str, tuple[Path, ...]] = TRACES
) -> tuple[Sight, ...]:
    """Return the hardware that is here, in the order of `HARDWARE`: with a trace, or able to attest without one."""
    seen = []
    for kind, find in (HARDWARE if hardware is None else hardware).items():
        found = tuple(path for path in traces.get(kind, ()) if path.exists())
        missing = find().missing()
        if found or not missing:
            seen.append(Sight(kind, found, missing))
    return tuple(seen)


SOFT_KINDS: Final = (
    "soft-tdx", "soft-sev-snp", "soft-sgx", "soft-nitro", "soft-tpm", "soft-cca", "soft-azure-snp", "soft-azure-tdx",
)  # fmt: skip
"""Software that is made only when it is named; see `soft`."""


def find_attester(kind: str = "auto", *, measurement: bytes) -> Attester:
    """Return the attester of this machine.

    `auto` takes the first of `HARDWARE` that works here, and never software; GPUs whose confidential computing is on attest
    beside it. A name demands that kind. A name of `SOFT_KINDS` is software that starts `measurement` (48 bytes) and protects
    nothing. On hardware the firmware measures, and `measurement` is not used.

    Raises:
        MachineError: this machine has no such hardware; `reasons` say what is missing, one or more for each kind.
        InputError: an unknown kind.
        ValueError: `measurement` is not 48 bytes.
    """
    if kind == "soft-tdx":
        return SoftTdxAttester(measurement)
    if kind in SOFT_KINDS:
        from cloister.attestation.edge.soft import SOFT

        return SOFT[kind](measurement)
    if kind != "auto" and kind not in HARDWARE:
        raise InputError(
            f"unknown attester {kind!r}", hint=f"use auto, {', '.join(HARDWARE)}, or soft-.. ({', '.join(SOFT_KINDS)})"
        )
    reasons: list[Reason] = []
    for name in HARDWARE if kind == "auto" else (kind,):
        hardware = HARDWARE[name]()
        missing = hardware.missing()
        if not missing:
            hardware.devices = _devices()
            return hardware
        reasons += (replace(reason, where=f"{name}.{reason.where}") for reason in missing)
    raise MachineError(
        "this machine is not inside a TEE that Cloister can use"
        if kind == "auto"
        else f"this machine offers no evidence of kind {kind}",
        reasons=reasons,
        hint="to try without any protection, name soft-tdx; contracts refuse it unless they accept simulated",
    )


def _devices() -> tuple[DeviceAttester, ...]:
    from cloister.attestation.edge.nvml import confidential_gpus

    return confidential_gpus()
