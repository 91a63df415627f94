"""`cloister doctor` on machines that have hardware: one finding for each kind, and how to get what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.attestation.edge import attester, nvml
from cloister.attestation.edge.attester import Sight
from cloister.cli import doctor_
from cloister.errors import MachineError, Reason

LACKS = Reason("tee.register", "no /sys/rtmr3", "Linux 6.16 or newer", "update the kernel")


def seen(monkeypatch: pytest.MonkeyPatch, *sights: Sight) -> list[tuple[str, str, str, str]]:
    monkeypatch.setattr(attester, "look", lambda: sights)
    return [(each.name, each.state, each.found, each.remedy) for each in doctor_._evidence()]


def test_a_laptop_is_good_for_everything_but_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    ((name, state, found, remedy),) = seen(monkeypatch)
    assert (name, state, found) == ("platform", "note", "no TEE device and no TPM")
    assert "--insecure-soft-tee" in remedy


def test_hardware_that_attests_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name in doctor_._NAMES.items():
        assert seen(monkeypatch, Sight(kind, (Path("/dev/it"),), ())) == [
            (kind, "ok", f"this is inside {name} (/dev/it)", "")
        ]


def test_hardware_that_cannot_attest_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    platform, tdx = seen(monkeypatch, Sight("tdx", (Path("/dev/tdx_guest"),), (LACKS, LACKS)))
    assert platform[2] == "not inside a TEE that can attest (found: tdx)"
    assert tdx[:2] == ("tdx", "note")
    assert "no /sys/rtmr3, wanted Linux 6.16 or newer" in tdx[2]
    assert tdx[3] == "update the kernel"


def test_a_tpm_is_no_tee(monkeypatch: pytest.MonkeyPatch) -> None:
    platform, tpm = seen(monkeypatch, Sight("tpm", (Path("/dev/tpmrm0"),), ()))
    assert (platform[0], platform[1]) == ("platform", "note")
    assert tpm[:2] == ("tpm", "ok")
    assert "nothing from its administrator" in tpm[2]


@pytest.mark.parametrize(
    ("state", "mark", "word"),
    [
        (nvml.State(True, False, True, 0), "ok", "2 NVIDIA GPUs, confidential computing on"),
        (nvml.State(False, False, True, 0), "note", "confidential computing is off"),
        (nvml.State(True, True, True, 0), "note", "developer tools are on"),
    ],
)
def test_gpus_are_counted_with_their_mode(
    monkeypatch: pytest.MonkeyPatch, state: nvml.State, mark: str, word: str
) -> None:
    monkeypatch.setattr(nvml, "state", lambda: state)
    monkeypatch.setattr(nvml, "find_gpus", lambda: (nvml.GpuAttester("a"), nvml.GpuAttester("b")))
    finding = doctor_._gpu()
    assert finding.state == mark
    assert word in finding.found
    assert bool(finding.remedy) == (mark == "note")


def test_a_machine_without_driver_lacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> nvml.State:
        raise MachineError("the NVIDIA driver refuses nvmlInit", hint="install it")

    monkeypatch.setattr(nvml, "state", absent)
    finding = doctor_._gpu()
    assert finding.state == "note"


def test_swtpm_is_for_tests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_.shutil, "which", lambda name: None)  # type: ignore[attr-defined]
    assert (doctor_._swtpm().state, doctor_._swtpm().remedy) == ("note", "Debian: apt install swtpm")
    monkeypatch.setattr(doctor_.shutil, "which", lambda name: f"/usr/bin/{name}")  # type: ignore[attr-defined]
    assert doctor_._swtpm().state == "ok"
