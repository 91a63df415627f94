"""Evidence of NVIDIA GPUs in confidential computing mode, through NVML (`nvidia-ml-py`, loaded only when asked for).

    nvmlSystemGetConfComputeState()       environment (2: production), ccFeature (0: off), devToolsMode (0: off)
    nvmlSystemGetConfComputeSettings()    multiGpuMode (1: protected PCIe, where ccFeature says off; 2: NVLink encryption)
    nvmlDeviceGetConfComputeGpuAttestationReport(gpu, nonce of 32 bytes)
    nvmlDeviceGetConfComputeGpuCertificate(gpu).attestationCertChain      PEM, attestation key first
    nvmlSystemSetConfComputeGpusReadyState(1)     until then the GPU takes no work

A report is asked for only when the mode is on, in production, and without developer tools: in every other state it would be
genuine and mean nothing. A report over another nonce than ours is never sent.

Evidence: kind `nvidia-gpu`, the report as quote, part `chain`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from cloister.attestation.types import Claims, Evidence
from cloister.errors import MachineError, Reason

NONCE: Final = slice(4, 36)
"""The requester's nonce in the SPDM request at the beginning of a report (DMTF DSP0274 1.1.0, 10.11)."""
_HEAD: Final = b"\x11\xe0"  # SPDM 1.1, GET_MEASUREMENTS
CC_OFF, DEVTOOLS_OFF, PRODUCTION, PROTECTED_PCIE = 0, 0, 2, 1

Load = Callable[[], Any]

# NVML's return code (nvml.h, nvmlReturn_t) -> what to do
_HINTS: Final = {
    3: "the GPU or its driver has no confidential computing: Hopper or newer, driver 550 or newer",
    4: "run as root",
    9: "load the NVIDIA driver: nvidia-smi shows whether it works",
    12: "install the NVIDIA driver: libnvidia-ml.so.1 is a part of it",
    13: "the driver is older than 550: it has no confidential computing",
    15: "the GPU fell off the bus: reset the machine",
    16: "reset the GPU",
    18: "the driver was updated while it was loaded: reboot",
    27: "the GPU is not ready yet: nvidia-persistenced must run",
    29: "the GPU is in a state in which it does not attest: reset it",
}


@dataclass(frozen=True, slots=True)
class State:
    """Confidential computing of all GPUs of this machine; it is one switch."""

    on: bool
    """CC mode, or protected PCIe mode of several GPUs."""
    devtools: bool
    production: bool
    multi_gpu: int
    """0 none, 1 protected PCIe, 2 NVLink encryption."""

    def problem(self) -> Reason | None:
        """Return why evidence of these GPUs would mean nothing, or None."""
        if not self.on:
            hint = "set CC mode on the host with nvidia_gpu_tools.py --set-cc-mode=on --reset-after-cc-mode-switch"
            return Reason("gpu.mode", "confidential computing is off", "on", hint)
        if self.devtools:
            hint = "developer tools can read the GPU's memory: set CC mode to on, not devtools"
            return Reason("gpu.devtools", "developer tools are on", "off", hint)
        if not self.production:
            return Reason("gpu.environment", "a simulation", "production", "only production hardware proves anything")
        return None


class GpuAttester:
    """One GPU, known by its UUID: indices change when another one fails.

    Args:
        uuid: as nvidia-smi -L shows it.
        load: imports `pynvml`; tests pass a fake driver.
    """

    name: Final = "nvidia-gpu"

    def __init__(self, uuid: str, *, load: Load | None = None) -> None:
        self.uuid = uuid
        self._load = _pynvml if load is None else load

    def evidence(self, qualifying_data: bytes) -> Evidence:
        """Return a report over the nonce `qualifying_data` (32 bytes) and the chain of its key.

        Raises:
            ValueError: `qualifying_data` is not 32 bytes.
            MachineError: the GPU does not answer, or is in a state in which its report means nothing.
        """
        if len(qualifying_data) != 32:
            raise ValueError(f"a nonce of {len(qualifying_data)} bytes, wanted 32")
        with _driver(self._load) as nvml:
            problem = _state(nvml).problem()
            if problem is not None:
                raise MachineError(f"{problem.found}: no evidence of GPU {self.uuid} is asked for", reasons=[problem])
            handle = _call(nvml, "nvmlDeviceGetHandleByUUID", self.uuid)
            given = _call(nvml, "nvmlDeviceGetConfComputeGpuAttestationReport", handle, qualifying_data)
            report = _cut(given.attestationReport, given.attestationReportSize, "report")
            given = _call(nvml, "nvmlDeviceGetConfComputeGpuCertificate", handle)
            chain = _cut(given.attestationCertChain, given.attestationCertChainSize, "certificate chain")
        if not report.startswith(_HEAD) or report[NONCE] != qualifying_data:
            raise MachineError(f"GPU {self.uuid} signed another nonce than ours")
        # the driver counts the end of the C string in
        chain = chain.rstrip(b"\x00")
        if b"-----BEGIN CERTIFICATE-----" not in chain:
            raise MachineError(f"GPU {self.uuid} gives no PEM certificates")
        return Evidence("nvidia-gpu", report, parts=MappingProxyType({"chain": chain}))

    def __repr__(self) -> str:
        return f"GpuAttester({self.uuid!r})"


def state(*, load: Load | None = None) -> State:
    """Return the mode of this machine's GPUs.

    Raises:
        MachineError: no NVML, no driver, or a driver without confidential computing; the hint says how to get it.
    """
    with _driver(_pynvml if load is None else load) as nvml:
        return _state(nvml)


def find_gpus(*, load: Load | None = None) -> tuple[GpuAttester, ...]:
    """Return an attester for each GPU.

    Raises:
        MachineError: no NVML, or no driver.
    """
    chosen = _pynvml if load is None else load
    with _driver(chosen) as nvml:
        handles = [
            _call(nvml, "nvmlDeviceGetHandleByIndex", index) for index in range(_call(nvml, "nvmlDeviceGetCount"))
        ]
        uuids = [_call(nvml, "nvmlDeviceGetUUID", handle) for handle in handles]
    return tuple(
        GpuAttester(uuid.decode("ascii", "replace") if isinstance(uuid, bytes) else uuid, load=chosen) for uuid in uuids
    )


def confidential_gpus(*, load: Load | None = None) -> tuple[GpuAttester, ...]:
    """Return this machine's GPUs if their confidential computing is on, and none in every other case.

    Developer tools do not count as off: those GPUs are returned and refuse when they are asked.
    """
    try:
        return find_gpus(load=load) if state(load=load).on else ()
    except MachineError:
        return ()


def set_ready(claims: Claims, *, load: Load | None = None) -> None:
    """Let the GPUs take work, after a verifier found them confidential and their policy took them.

    Args:
        claims: of the machine or of its GPU, as `verify` returned and `appraise` accepted them.

    Raises:
        ValueError: `claims` do not say that the GPUs are confidential, or a test root vouches for them.
        MachineError: the driver refuses.
    """
    if claims.gpu != "confidential" or claims.soft:
        raise ValueError("the claims do not say that real GPUs are confidential")
    with _driver(_pynvml if load is None else load) as nvml:
        _call(nvml, "nvmlSystemSetConfComputeGpusReadyState", 1)


def _pynvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError as error:
        raise MachineError(
            "NVML cannot be used: the Python package nvidia-ml-py is not installed",
            hint="install cloister[gpu-host] on machines whose GPUs attest",
        ) from error


@contextmanager
def _driver(load: Load) -> Iterator[Any]:
    nvml = load()
    _call(nvml, "nvmlInit")
    try:
        yield nvml
    finally:
        with suppress(MachineError):  # what was read counts
            _call(nvml, "nvmlShutdown")


def _call(nvml: Any, name: str, *arguments: Any) -> Any:
    function = getattr(nvml, name, None)
    if function is None:
        raise MachineError(f"nvidia-ml-py has no {name}", hint="install nvidia-ml-py 13.590 or newer")
    try:
        return function(*arguments)
    except nvml.NVMLError as error:
        number = int(getattr(error, "value", 999))
        raise MachineError(
            f"the NVIDIA driver refuses {name}: {error} ({number})",
            hint=_HINTS.get(number, "nvidia-smi conf-compute -q shows the state of the GPUs"),
        ) from error


def _state(nvml: Any) -> State:
    found = _call(nvml, "nvmlSystemGetConfComputeState")
    multi = 0
    settings_type = getattr(nvml, "c_nvmlSystemConfComputeSettings_v1_t", None)
    if settings_type is not None:
        settings = settings_type()
        # older drivers do not know the call: they have no mode of several GPUs either
        with suppress(MachineError):
            if _call(nvml, "nvmlSystemGetConfComputeSettings", settings) == 0:
                multi = int(settings.multiGpuMode)
    return State(
        on=found.ccFeature != CC_OFF or multi == PROTECTED_PCIE,
        devtools=found.devToolsMode != DEVTOOLS_OFF,
        production=found.environment == PRODUCTION,
        multi_gpu=multi,
    )


def _cut(buffer: Any, size: int, what: str) -> bytes:
    whole = bytes(buffer)
    if not 0 < size <= len(whole):
        raise MachineError(f"the NVIDIA driver says that a {what} has {size} bytes, in a buffer of {len(whole)}")
    return whole[:size]
