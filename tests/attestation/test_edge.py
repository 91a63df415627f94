"""Sealing, the software measurement, and collateral from files."""

from __future__ import annotations

import json
import stat
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister.attestation.edge.collateral import load_collateral, soft_collateral
from cloister.attestation.edge.sealing import FILE, Sealer, SoftSealer
from cloister.attestation.edge.software import measure_package
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.verify import verify
from cloister.errors import InputError, MachineError, TamperedError
from cloister.testkit.softtee import MEASUREMENT, NOW, SOFT_ROOTS, SoftPlatform

# --- sealing ----------------------------------------------------------------------------------------------------------


def test_the_same_software_unseals_after_a_restart(tmp_path: Path) -> None:
    first: Sealer = SoftSealer(tmp_path, measurement=MEASUREMENT)
    sealed = first.seal(b"state")
    assert b"state" not in sealed
    assert SoftSealer(tmp_path, measurement=MEASUREMENT).unseal(sealed) == b"state"
    assert first.seal(b"state") != sealed


def test_other_software_cannot_unseal(tmp_path: Path) -> None:
    sealed = SoftSealer(tmp_path, measurement=MEASUREMENT).seal(b"state")
    with pytest.raises(TamperedError):
        SoftSealer(tmp_path, measurement=bytes(48)).unseal(sealed)


def test_another_machine_cannot_unseal(tmp_path: Path) -> None:
    sealed = SoftSealer(tmp_path / "a", measurement=MEASUREMENT).seal(b"state")
    with pytest.raises(TamperedError):
        SoftSealer(tmp_path / "b", measurement=MEASUREMENT).unseal(sealed)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=64), st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_never_unseals(tmp_path: Path, data: bytes, position: int, change: int) -> None:
    sealer = SoftSealer(tmp_path, measurement=MEASUREMENT)
    sealed = bytearray(sealer.seal(data))
    sealed[position % len(sealed)] ^= change
    with pytest.raises(TamperedError):
        sealer.unseal(bytes(sealed))
    with pytest.raises(TamperedError):
        sealer.unseal(bytes(sealed[:20]))


def test_the_default_measurement_is_this_package(tmp_path: Path) -> None:
    sealed = SoftSealer(tmp_path).seal(b"x")
    assert SoftSealer(tmp_path, measurement=measure_package()).unseal(sealed) == b"x"


def test_the_random_file_is_private_and_alone(tmp_path: Path) -> None:
    SoftSealer(tmp_path / "deep" / "folder", measurement=MEASUREMENT)
    (path,) = (tmp_path / "deep" / "folder").iterdir()
    assert path.name == FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "protects nothing" in repr(SoftSealer(tmp_path, measurement=MEASUREMENT))


def test_a_broken_platform_folder_is_a_machine_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MachineError, match="platform folder"):
        SoftSealer(tmp_path / "file", measurement=MEASUREMENT)
    (tmp_path / FILE).write_bytes(b"short")
    with pytest.raises(MachineError, match="5 bytes"):
        SoftSealer(tmp_path, measurement=MEASUREMENT)
    with pytest.raises(ValueError, match="48"):
        SoftSealer(tmp_path, measurement=b"short")


# --- software measurement ---------------------------------------------------------------------------------------------


def _tree(root: Path, files: dict[str, bytes]) -> bytes:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return measure_package(root)


def test_every_change_of_the_source_changes_the_measurement(tmp_path: Path) -> None:
    base = {"a.py": b"1", "b/c.py": b"2"}
    wanted = _tree(tmp_path / "0", base)
    assert len(wanted) == 48
    assert _tree(tmp_path / "1", base) == wanted
    others = [
        {"a.py": b"1 ", "b/c.py": b"2"},
        {"a.py": b"1"},
        {"a.py": b"1", "b/d.py": b"2"},
        {"a.py": b"1", "b.c.py": b"2"},
        {**base, "d.py": b""},
        {"a.py": b"12", "b/c.py": b""},
    ]
    values = {_tree(tmp_path / f"other{index}", files) for index, files in enumerate(others)}
    assert len(values | {wanted}) == len(others) + 1


def test_bytecode_and_other_files_do_not_count(tmp_path: Path) -> None:
    base = _tree(tmp_path, {"a.py": b"1"})
    assert _tree(tmp_path, {"__pycache__/a.cpython-311.pyc": b"x", "py.typed": b""}) == base


def test_the_installed_package_is_measured() -> None:
    assert measure_package() == measure_package()
    assert len(measure_package()) == 48


def test_an_empty_folder_has_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Python file"):
        measure_package(tmp_path)


# --- collateral -------------------------------------------------------------------------------------------------------


def test_soft_collateral_is_valid_all_day_and_made_once() -> None:
    platform = SoftPlatform()
    for shift in (timedelta(0), timedelta(hours=11, minutes=59), timedelta(hours=-12)):
        endorsements = soft_collateral(NOW + shift)
        assert verify(platform.evidence(), endorsements, SOFT_ROOTS, now=NOW + shift).tee == "soft-tdx"
    assert soft_collateral(NOW) is soft_collateral(NOW + timedelta(minutes=1))
    with pytest.raises(ValueError, match="time zone"):
        soft_collateral(datetime(2026, 1, 1))  # noqa: DTZ001 - the mistake that is tested


def test_collateral_from_a_file_endorses(tmp_path: Path) -> None:
    path = tmp_path / "collateral.json"
    document = soft_tdx.collateral(NOW - timedelta(days=1))
    path.write_text(json.dumps(json.loads(document), indent=2))  # any JSON form of the nine strings
    endorsements = load_collateral(path)
    assert [item.subject for item in endorsements.items] == [soft_tdx.FMSPC]
    assert verify(SoftPlatform().evidence(), endorsements, SOFT_ROOTS, now=NOW).tee == "soft-tdx"


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"tcb_info": 1}', b" " * (1 << 20) + b"{}"])
def test_a_file_that_is_not_collateral_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "collateral.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_collateral(path)
    assert str(path) in caught.value.message
    assert caught.value.reasons


def test_an_absent_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_collateral(tmp_path / "absent.json")
    with pytest.raises(InputError, match="directory"):
        load_collateral(tmp_path)
