"""Soft attesters of every kind but TDX (`attester.SoftTdxAttester`): evidence of no hardware at all. They protect nothing.

Each behaves as its hardware does: the same evidence bytes, the same place for the log of events, the same rule about when an
event can still be recorded. Only the root differs, whose private key is public.

`measurement` is 48 bytes of whatever the caller measures. What a verifier then finds under the name `Claims.launch` is
`launch`: the 48 bytes where the hardware has room for them, their first 32 for SGX, and for a TPM and an Azure VM the boot
aggregate of a host whose kernel is `measurement`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from types import MappingProxyType
from typing import Final, Literal

from cloister.attestation import events as event_log
from cloister.attestation.azure import vtpm
from cloister.attestation.edge.attester import Attester, DeviceAttester
from cloister.attestation.logs import ima
from cloister.attestation.soft import azure as soft_azure
from cloister.attestation.soft import cca as soft_cca
from cloister.attestation.soft import nitro as soft_nitro
from cloister.attestation.soft import nvidia as soft_nvidia
from cloister.attestation.soft import sgx as soft_sgx
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.soft import tpm as soft_tpm
from cloister.attestation.soft.intel import Platform
from cloister.attestation.types import Event, Evidence
from cloister.errors import MachineError

Clock = Callable[[], datetime]

LEAF_RENEWED: Final = timedelta(hours=1)
"""A soft enclave's leaf lives three hours, as AWS's do; it gets a new one at each full hour."""


def _now() -> datetime:
    return datetime.now(UTC)


class _Soft:
    notice: str
    name: str
    report_data_bytes: int = 64

    def __init__(self, measurement: bytes, devices: tuple[DeviceAttester, ...]) -> None:
        if len(measurement) != 48:
            raise ValueError(f"measurement of {len(measurement)} bytes, wanted 48")
        self.devices = devices
        self._measurement = measurement
        self._events: tuple[Event, ...] = ()

    @property
    def launch(self) -> bytes:
        """What a verifier finds as the launch measurement."""
        return self._measurement

    def extend(self, name: str, data: bytes) -> None:
        """Record an event."""
        self._events += (event_log.event(name, data),)

    def _signed(self, report_data: bytes) -> bytes:
        """Return what hardware without a register signs."""
        return event_log.fold(report_data, self._events)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.notice})"


class SoftSgxAttester(_Soft):
    """An SGX enclave in software. It protects nothing.

    Args:
        measurement: 48 bytes; MRENCLAVE is their first 32.
        machine: which soft machine, see `soft.sgx.platform`.
        debug: set the debug bit, for tests.
        devices: attested beside the CPU.
    """

    notice = soft_sgx.NOTICE
    name = "soft-sgx"

    def __init__(
        self,
        measurement: bytes,
        *,
        machine: Platform | None = None,
        debug: bool = False,
        devices: tuple[DeviceAttester, ...] = (),
    ) -> None:
        super().__init__(measurement, devices)
        self._machine = soft_sgx.platform() if machine is None else machine
        self._debug = debug

    @property
    def launch(self) -> bytes:
        return self._measurement[:32]

    def evidence(self, report_data: bytes) -> Evidence:
        signed = self._signed(report_data)
        quote = soft_sgx.quote(self._machine, mrenclave=self.launch, report_data=signed, debug=self._debug)
        return Evidence("sgx", quote, self._events)


class SoftSnpAttester(_Soft):
    """An SEV-SNP guest in software. It protects nothing.

    Args:
        measurement: MEASUREMENT, 48 bytes.
        machine: which soft machine, see `soft.snp.machine`.
        debug: set the debug bit of the policy, for tests.
        devices: attested beside the CPU.
    """

    notice = soft_snp.NOTICE
    name = "soft-sev-snp"

    def __init__(
        self,
        measurement: bytes,
        *,
        machine: soft_snp.Machine | None = None,
        debug: bool = False,
        devices: tuple[DeviceAttester, ...] = (),
    ) -> None:
        super().__init__(measurement, devices)
        self._machine = soft_snp.machine() if machine is None else machine
        self._debug = debug

    def evidence(self, report_data: bytes) -> Evidence:
        return soft_snp.evidence(
            self._machine,
            report_data=report_data,
            measurement=self._measurement,
            events=self._events,
            debug=self._debug,
        )


class SoftNitroAttester(_Soft):
    """A Nitro enclave in software. It protects nothing.

    As on hardware, the first evidence after an event locks PCR 16: what is recorded later is refused.

    Args:
        measurement: PCR 0, 48 bytes.
        machine: the name of the enclave.
        debug: PCR 0 to 2 are zero, for tests.
        clock: documents have a time, and their leaf lives three hours.
        devices: attested beside the CPU.
    """

    notice = soft_nitro.NOTICE
    name = "soft-nitro"

    def __init__(
        self,
        measurement: bytes,
        *,
        machine: str = "soft",
        debug: bool = False,
        clock: Clock = _now,
        devices: tuple[DeviceAttester, ...] = (),
    ) -> None:
        super().__init__(measurement, devices)
        self._machine, self._debug, self._clock = machine, debug, clock
        self._locked = False

    @property
    def launch(self) -> bytes:
        return bytes(48) if self._debug else self._measurement

    def extend(self, name: str, data: bytes) -> None:
        """Record an event.

        Raises:
            MachineError: evidence was made already.
        """
        if self._locked:
            raise MachineError("PCR 16 is locked: no event can be recorded after the first evidence")
        super().extend(name, data)

    def evidence(self, report_data: bytes) -> Evidence:
        if len(report_data) != 64:
            raise ValueError(f"report data of {len(report_data)} bytes, wanted 64")
        self._locked = bool(self._events)
        made = self._clock()
        hour = made.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        document = soft_nitro.document(
            soft_nitro.enclave(self._machine, issued=hour - LEAF_RENEWED),
            pcr0=self._measurement,
            made=made,
            user_data=report_data,
            runtime=event_log.replay(self._events) if self._locked else None,
            debug=self._debug,
        )
        return Evidence("nitro", document, self._events)


class SoftTpmAttester(_Soft):
    """A measured host with its TPM in software. It protects nothing.

    Args:
        measurement: 48 bytes that stand for the kernel: they decide PCR 4, so the boot aggregate.
        machine: which soft TPM, see `soft.tpm.machine`.
        devices: attested beside the host.
    """

    notice = soft_tpm.NOTICE
    name = "soft-tpm"
    report_data_bytes = 32

    def __init__(
        self,
        measurement: bytes,
        *,
        machine: soft_tpm.Machine | None = None,
        devices: tuple[DeviceAttester, ...] = (),
    ) -> None:
        super().__init__(measurement, devices)
        self._machine = soft_tpm.machine() if machine is None else machine
        self._host = soft_tpm.host(kernel=measurement)

    @property
    def launch(self) -> bytes:
        return _boot_aggregate(self._host)

    def evidence(self, report_data: bytes) -> Evidence:
        if len(report_data) != 32:
            raise ValueError(f"qualifying data of {len(report_data)} bytes, wanted 32")
        return soft_tpm.evidence(self._machine, report_data=report_data, host=self._host, events=self._events)


class SoftAzureAttester(_Soft):
    """An Azure confidential VM in software, with its paravisor and vTPM. It protects nothing.

    Args:
        measurement: 48 bytes that stand for the kernel, as for `SoftTpmAttester`.
        kind: `azure-snp` or `azure-tdx`.
        debug: set the debug bit of the hardware report, for tests.
        devices: attested beside the VM.
    """

    notice = soft_azure.NOTICE
    report_data_bytes = 32

    def __init__(
        self,
        measurement: bytes,
        *,
        kind: Literal["azure-snp", "azure-tdx"] = "azure-snp",
        debug: bool = False,
        devices: tuple[DeviceAttester, ...] = (),
    ) -> None:
        super().__init__(measurement, devices)
        self.name = f"soft-{kind}"
        self._evidence = soft_azure.snp_evidence if kind == "azure-snp" else soft_azure.tdx_evidence
        self._host = soft_tpm.host(kernel=measurement)
        self._debug = debug

    @property
    def launch(self) -> bytes:
        return vtpm.launch(soft_azure.PARAVISOR, _boot_aggregate(self._host))

    def evidence(self, report_data: bytes) -> Evidence:
        if len(report_data) != 32:
            raise ValueError(f"qualifying data of {len(report_data)} bytes, wanted 32")
        return self._evidence(
            report_data=report_data, host=self._host, events=self._events, report={"debug": self._debug}
        )


class SoftCcaAttester(_Soft):
    """An Arm CCA realm in software. It protects nothing.

    Args:
        measurement: realm initial measurement, 48 bytes.
        machine: which soft machine, see `soft.cca.platform`.
        debug: the platform's life cycle is not secured, for tests.
        devices: attested beside the CPU.
    """

    notice = soft_cca.NOTICE
    name = "soft-cca"

    def __init__(
        self,
        measurement: bytes,
        *,
        machine: soft_cca.Platform | None = None,
        debug: bool = False,
        devices: tuple[DeviceAttester, ...] = (),
    ) -> None:
        super().__init__(measurement, devices)
        self._machine = soft_cca.platform() if machine is None else machine
        self._lifecycle = 0x4000 if debug else soft_cca.SECURED  # Arm CCA token: non-CCA-platform debug

    def evidence(self, report_data: bytes) -> Evidence:
        signed = self._signed(report_data)
        token = soft_cca.token(self._machine, rim=self._measurement, challenge=signed, lifecycle=self._lifecycle)
        return Evidence("cca", token, self._events)


def _boot_aggregate(host: soft_tpm.Host) -> bytes:
    pcrs = host.pcrs(())
    return ima.boot_aggregate(pcrs[index] for index in range(10))


class SoftGpuAttester:
    """An NVIDIA GPU in software, beside a soft CPU. It protects nothing.

    Args:
        machine: which soft GPU, see `soft.nvidia.gpu`; its manifests and OCSP answers are `soft.nvidia.endorsements`.
    """

    notice: Final = soft_nvidia.NOTICE
    name: Final = "soft-nvidia-gpu"

    def __init__(self, *, machine: soft_nvidia.Gpu | None = None) -> None:
        self._machine = soft_nvidia.gpu() if machine is None else machine

    def evidence(self, qualifying_data: bytes) -> Evidence:
        if len(qualifying_data) != 32:
            raise ValueError(f"a nonce of {len(qualifying_data)} bytes, wanted 32")
        return soft_nvidia.evidence(self._machine, qualifying_data)

    def __repr__(self) -> str:
        return f"SoftGpuAttester({self.notice})"


class SoftTpmDevice:
    """A TPM in software, beside a soft CPU: a quote without events. It protects nothing."""

    notice: Final = soft_tpm.NOTICE
    name: Final = "soft-tpm"

    def __init__(self, *, machine: soft_tpm.Machine | None = None) -> None:
        self._machine = soft_tpm.machine() if machine is None else machine

    def evidence(self, qualifying_data: bytes) -> Evidence:
        if len(qualifying_data) != 32:
            raise ValueError(f"qualifying data of {len(qualifying_data)} bytes, wanted 32")
        return soft_tpm.evidence(self._machine, report_data=qualifying_data)

    def __repr__(self) -> str:
        return f"SoftTpmDevice({self.notice})"


SOFT: Final[Mapping[str, Callable[[bytes], Attester]]] = MappingProxyType(
    {
        "soft-sev-snp": SoftSnpAttester,
        "soft-sgx": SoftSgxAttester,
        "soft-nitro": SoftNitroAttester,
        "soft-tpm": SoftTpmAttester,
        "soft-cca": SoftCcaAttester,
        "soft-azure-snp": partial(SoftAzureAttester, kind="azure-snp"),
        "soft-azure-tdx": partial(SoftAzureAttester, kind="azure-tdx"),
    }
)
"""Name -> attester of a measurement, as `find_attester` takes it."""
