"""GPUs against a fake driver behind the real structures and errors of pynvml."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import pytest

from cloister.attestation.edge import nvml
from cloister.attestation.edge.nvml import GpuAttester, State, confidential_gpus, find_gpus, set_ready, state
from cloister.attestation.soft import nvidia as soft_nvidia
from cloister.attestation.types import Claims
from cloister.attestation.verify import verify
from cloister.errors import MachineError
from cloister.testkit.softtee import NOW, SOFT_ROOTS
from tests.attestation.helpers import SHARED

pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")

NONCE = bytes(range(32))
PEM = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
CODES = sorted(
    value for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_") and isinstance(value, int)
)
CALLS = (
    "nvmlInit",
    "nvmlSystemGetConfComputeState",
    "nvmlDeviceGetHandleByUUID",
    "nvmlDeviceGetConfComputeGpuAttestationReport",
    "nvmlDeviceGetConfComputeGpuCertificate",
)


class Driver:
    """What pynvml is on a machine with two H100 in CC mode; `fail` makes a call raise NVML's error of that number."""

    NVMLError = pynvml.NVMLError
    c_nvmlSystemConfComputeSettings_v1_t = pynvml.c_nvmlSystemConfComputeSettings_v1_t  # noqa: N815 - NVIDIA's name

    def __init__(self) -> None:
        self.fail: dict[str, int] = {}
        self.cc, self.devtools, self.environment, self.multi, self.settings_rc = 1, 0, 2, 0, 0
        self.uuids = ["GPU-aaaa", "GPU-bbbb"]
        self.report: Callable[[bytes], bytes] = lambda nonce: b"\x11\xe0\x01\xff" + nonce + b"\x00rest of it"
        self.chain = PEM * 5 + b"\x00"
        self.size: int | None = None
        self.open = 0
        self.ready: list[int] = []
        self.calls: list[str] = []

    def _enter(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            raise pynvml.NVMLError(self.fail[name])
        if name not in ("nvmlInit", "nvmlShutdown") and not self.open:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)

    def nvmlInit(self) -> None:
        self._enter("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self._enter("nvmlShutdown")
        self.open -= 1

    def nvmlSystemGetConfComputeState(self) -> Any:
        self._enter("nvmlSystemGetConfComputeState")
        found = pynvml.c_nvmlConfComputeSystemState_t()
        found.environment, found.ccFeature, found.devToolsMode = self.environment, self.cc, self.devtools
        return found

    def nvmlSystemGetConfComputeSettings(self, settings: Any) -> int:
        self._enter("nvmlSystemGetConfComputeSettings")
        assert settings.version == pynvml.nvmlSystemConfComputeSettings_v1
        settings.multiGpuMode = self.multi
        return self.settings_rc

    def nvmlDeviceGetCount(self) -> int:
        self._enter("nvmlDeviceGetCount")
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self._enter("nvmlDeviceGetHandleByIndex")
        return self.uuids[index]

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        self._enter("nvmlDeviceGetUUID")
        return handle

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._enter("nvmlDeviceGetHandleByUUID")
        if uuid not in self.uuids:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def nvmlDeviceGetConfComputeGpuAttestationReport(self, handle: str, nonce: bytes) -> Any:
        self._enter("nvmlDeviceGetConfComputeGpuAttestationReport")
        found = pynvml.c_nvmlConfComputeGpuAttestationReport_t()
        report = self.report(bytes(nonce))
        ctypes.memmove(found.attestationReport, report, len(report))
        found.attestationReportSize = len(report) if self.size is None else self.size
        return found

    def nvmlDeviceGetConfComputeGpuCertificate(self, handle: str) -> Any:
        self._enter("nvmlDeviceGetConfComputeGpuCertificate")
        found = pynvml.c_nvmlConfComputeGpuCertificate_t()
        ctypes.memmove(found.attestationCertChain, self.chain, len(self.chain))
        found.attestationCertChainSize = len(self.chain) if self.size is None else self.size
        return found

    def nvmlSystemSetConfComputeGpusReadyState(self, value: int) -> None:
        self._enter("nvmlSystemSetConfComputeGpusReadyState")
        self.ready.append(value)


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def gpu(driver: Driver) -> GpuAttester:
    return GpuAttester("GPU-bbbb", load=lambda: driver)


def test_the_structures_are_those_of_the_package() -> None:
    """Every function and structure that the edge uses exists in the package whose version the project pins."""
    for name in (*CALLS, "nvmlShutdown", "nvmlSystemGetConfComputeSettings", "nvmlSystemSetConfComputeGpusReadyState"):
        assert callable(getattr(pynvml, name))
    assert nvml.PROTECTED_PCIE == pynvml.NVML_CC_SYSTEM_MULTIGPU_PROTECTED_PCIE
    assert nvml.PRODUCTION == pynvml.NVML_CC_SYSTEM_ENVIRONMENT_PROD
    assert nvml.CC_OFF == pynvml.NVML_CC_SYSTEM_FEATURE_DISABLED
    assert nvml.DEVTOOLS_OFF == pynvml.NVML_CC_SYSTEM_DEVTOOLS_MODE_OFF


def test_a_report_and_its_chain(driver: Driver, gpu: GpuAttester) -> None:
    evidence = gpu.evidence(NONCE)
    assert evidence.kind == gpu.name == "nvidia-gpu"
    assert evidence.quote[nvml.NONCE] == NONCE
    assert evidence.quote.endswith(b"rest of it")
    assert dict(evidence.parts) == {"chain": PEM * 5}
    assert driver.open == 0
    assert driver.ready == []
    with pytest.raises(ValueError, match="32"):
        gpu.evidence(bytes(64))


def test_what_it_sends_is_verified(driver: Driver, gpu: GpuAttester) -> None:
    device = soft_nvidia.gpu()
    driver.report, driver.chain = lambda nonce: soft_nvidia.report(device, nonce), device.chain + b"\x00"
    collateral = soft_nvidia.endorsements(NOW - timedelta(hours=1))
    claims = verify(gpu.evidence(NONCE), collateral, SOFT_ROOTS, now=NOW)
    assert (claims.tee, claims.gpu, claims.report_data) == ("soft-nvidia-gpu", "confidential", NONCE)


@pytest.mark.parametrize("name", ["h100-550.90.07", "h100-580.95.05-coco", "gb100-575.32"])
def test_reports_of_real_gpus_have_the_nonce_where_it_is_looked_for(
    driver: Driver, gpu: GpuAttester, name: str
) -> None:
    folder = SHARED / "vectors" / "attestation" / "nvidia"
    if not folder.is_dir():
        pytest.skip("no vectors beside the repository")
    report = (folder / f"{name}.bin").read_bytes()
    driver.report, driver.chain = lambda nonce: report, (folder / f"{name}-chain.pem").read_bytes()
    assert gpu.evidence(report[4:36]).quote == report
    with pytest.raises(MachineError, match="another nonce"):
        gpu.evidence(NONCE)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"cc": 0}, "gpu.mode"),
        ({"devtools": 1}, "gpu.devtools"),
        ({"environment": 1}, "gpu.environment"),
        ({"environment": 0}, "gpu.environment"),
        ({"cc": 0, "multi": 2}, "gpu.mode"),
        ({"cc": 0, "multi": 1, "devtools": 1}, "gpu.devtools"),
        ({"cc": 0, "multi": 1, "settings_rc": 3}, "gpu.mode"),
    ],
)
def test_a_gpu_whose_report_would_mean_nothing_is_not_asked(
    driver: Driver, gpu: GpuAttester, settings: dict[str, int], where: str
) -> None:
    for name, value in settings.items():
        setattr(driver, name, value)
    with pytest.raises(MachineError, match="no evidence") as caught:
        gpu.evidence(NONCE)
    assert caught.value.reasons[0].where == where
    assert caught.value.reasons[0].hint
    assert "nvmlDeviceGetConfComputeGpuAttestationReport" not in driver.calls
    assert driver.open == 0


def test_protected_pcie_counts_as_on(driver: Driver, gpu: GpuAttester) -> None:
    driver.cc, driver.multi = 0, 1
    assert state(load=lambda: driver) == State(on=True, devtools=False, production=True, multi_gpu=1)
    gpu.evidence(NONCE)


def test_an_old_driver_without_settings_has_a_state_all_the_same(driver: Driver, gpu: GpuAttester) -> None:
    driver.fail["nvmlSystemGetConfComputeSettings"] = pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
    gpu.evidence(NONCE)


@pytest.mark.parametrize("code", CODES)
def test_every_error_of_the_driver_is_a_machine_error_with_a_way_on(driver: Driver, code: int) -> None:
    gpu = GpuAttester("GPU-bbbb", load=lambda: driver)
    for call in CALLS:
        driver.fail = {call: code}
        with pytest.raises(MachineError, match=rf"{call}.*\({code}\)") as caught:
            gpu.evidence(NONCE)
        assert caught.value.hint
        assert driver.open == 0
    driver.fail = {"nvmlShutdown": code}
    gpu.evidence(NONCE)


def test_a_report_over_another_nonce_is_not_sent(driver: Driver, gpu: GpuAttester) -> None:
    driver.report = lambda nonce: b"\x11\xe0\x01\xff" + bytes(32) + b"\x00rest"
    with pytest.raises(MachineError, match="another nonce"):
        gpu.evidence(NONCE)
    driver.report = lambda nonce: b"\x12\xe0\x01\xff" + nonce + b"\x00rest"
    with pytest.raises(MachineError, match="another nonce"):
        gpu.evidence(NONCE)


@pytest.mark.parametrize("size", [0, 8193, 1 << 31])
def test_a_size_that_the_buffer_has_not_is_not_believed(driver: Driver, gpu: GpuAttester, size: int) -> None:
    driver.size = size
    with pytest.raises(MachineError, match="bytes, in a buffer of 8192"):
        gpu.evidence(NONCE)


def test_a_gpu_without_certificates_is_refused(driver: Driver, gpu: GpuAttester) -> None:
    driver.chain = b"\x00\x00\x00"
    with pytest.raises(MachineError, match="no PEM"):
        gpu.evidence(NONCE)


def test_gpus_are_known_by_uuid_and_not_by_place(driver: Driver, gpu: GpuAttester) -> None:
    assert [each.uuid for each in find_gpus(load=lambda: driver)] == ["GPU-aaaa", "GPU-bbbb"]
    driver.uuids.remove("GPU-aaaa")
    gpu.evidence(NONCE)
    driver.uuids.clear()
    with pytest.raises(MachineError, match="HandleByUUID"):
        gpu.evidence(NONCE)
    assert find_gpus(load=lambda: driver) == ()


def test_which_gpus_attest_beside_the_cpu(driver: Driver) -> None:
    assert len(confidential_gpus(load=lambda: driver)) == 2
    driver.devtools = 1
    with pytest.raises(MachineError, match="developer tools"):
        confidential_gpus(load=lambda: driver)[0].evidence(NONCE)
    driver.cc = 0
    assert confidential_gpus(load=lambda: driver) == ()
    driver.fail["nvmlInit"] = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    assert confidential_gpus(load=lambda: driver) == ()


def test_ready_is_set_only_after_a_good_verdict_of_real_hardware(driver: Driver) -> None:
    """A GPU without CC, and a soft one, must get no work of a workload that was promised a confidential GPU."""

    def claims(**fields: Any) -> Claims:
        return Claims(**({"kind": "tee", "tee": "tdx", "gpu": "confidential"} | fields))

    for bad in (claims(gpu="none"), claims(tee="soft-tdx"), claims(devices=(claims(tee="soft-nvidia-gpu"),))):
        with pytest.raises(ValueError, match="claims"):
            set_ready(bad, load=lambda: driver)
    assert driver.ready == []
    set_ready(claims(), load=lambda: driver)
    assert driver.ready == [1]
    driver.fail["nvmlSystemSetConfComputeGpusReadyState"] = pynvml.NVML_ERROR_NO_PERMISSION
    with pytest.raises(MachineError, match="ReadyState") as caught:
        set_ready(claims(), load=lambda: driver)
    assert "root" in caught.value.hint


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MachineError, match="nvidia-ml-py") as caught:
        state()
    assert "gpu-host" in caught.value.hint
    assert confidential_gpus() == ()


def test_an_old_package_is_named(driver: Driver) -> None:
    old = MappingProxyType({"nvmlInit": driver.nvmlInit, "nvmlShutdown": driver.nvmlShutdown})
    fake = type("Old", (), {name: staticmethod(call) for name, call in old.items()} | {"NVMLError": pynvml.NVMLError})
    with pytest.raises(MachineError, match="has no nvmlSystemGetConfComputeState") as caught:
        state(load=lambda: fake)
    assert "13.590" in caught.value.hint
    assert driver.open == 0


def test_on_this_machine_it_answers_or_says_why() -> None:
    remedy = ""
    try:
        remedy = f"multi-GPU mode {state().multi_gpu}"
    except MachineError as error:
        remedy = error.hint
    assert remedy
