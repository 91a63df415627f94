"""Launch digests of SEV-SNP guests, against a second computation from the specification."""

from __future__ import annotations

import hashlib
import struct
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from cloister.attestation.edge.launch import launch_digest
from cloister.errors import InputError, MachineError

pytest.importorskip("sevsnpmeasure", reason="the extra `tools` is not installed")

PAGE = 4096
AP_EIP = 0x0080_B004
HASHES_GPA = 0x0081_0C00
SECTIONS = (  # gpa, size, type: OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm
    (0x0080_0000, 0x9000, 1),
    (0x0080_A000, 0x3000, 1),
    (0x0080_D000, 0x1000, 2),
    (0x0080_E000, 0x1000, 3),
    (0x0080_F000, 0x1000, 4),
    (0x0081_0000, 0x1000, 0x10),
)
EPYC_V4 = 0x00800F12
"""CPUID signature of family 23, model 1, stepping 2 (AMD 25481)."""


def entry(guid: str, body: bytes) -> bytes:
    return body + struct.pack("<H", len(body) + 18) + uuid.UUID(guid).bytes_le


def firmware(sections: tuple[tuple[int, int, int], ...] = SECTIONS, *, pages: int = 4) -> bytes:
    """Return a firmware image with the footer table of OVMF, and nothing else of sense."""
    size = pages * PAGE
    metadata = b"ASEV" + struct.pack("<III", 16 + 12 * len(sections), 1, len(sections))
    metadata += b"".join(struct.pack("<III", *each) for each in sections)
    table = (
        entry("dc886566-984a-4798-a75e-5585a7bf67cc", struct.pack("<I", size - 64))
        + entry("7255371f-3a3b-4b04-927b-1da6efa8d454", struct.pack("<II", HASHES_GPA, 0x400))
        + entry("00f771de-1a7e-4fcb-890e-68c77e2fb44e", struct.pack("<I", AP_EIP))
    )
    footer = struct.pack("<H", len(table) + 18) + uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
    image = bytearray(hashlib.sha512(b"OVMF").digest() * (size // 64))
    image[64 : 64 + len(metadata)] = metadata
    end = size - 32
    image[end - len(footer) - len(table) : end] = table + footer
    return bytes(image)


# --- the second computation -------------------------------------------------------------------------------------------


class Digest:
    """GCTX.LD: AMD 56860, SNP_LAUNCH_UPDATE, PAGE_INFO."""

    def __init__(self) -> None:
        self.value = bytes(48)

    def page(self, kind: int, gpa: int, contents: bytes = bytes(48)) -> None:
        info = self.value + contents + struct.pack("<HBBBBBBQ", 0x70, kind, 0, 0, 0, 0, 0, gpa)
        assert len(info) == 0x70
        self.value = hashlib.sha384(info).digest()


def registers(eip: int, features: int) -> bytes:
    """The first VMSA of a virtual CPU under KVM and QEMU: AMD APM volume 2, table B-4."""
    page = bytearray(PAGE)

    def segment(at: int, selector: int, attributes: int, base: int = 0) -> None:
        struct.pack_into("<HHIQ", page, at, selector, attributes, 0xFFFF, base)

    for at, attributes in ((0x00, 0x93), (0x20, 0x93), (0x30, 0x93), (0x40, 0x93), (0x50, 0x93)):
        segment(at, 0, attributes)
    segment(0x10, 0xF000, 0x9B, eip & 0xFFFF0000)
    for at, attributes in ((0x60, 0), (0x70, 0x82), (0x80, 0), (0x90, 0x8B)):
        segment(at, 0, attributes)
    for at, value in (
        (0xD0, 0x1000), (0x148, 0x40), (0x158, 0x10), (0x160, 0x400), (0x168, 0xFFFF0FF0), (0x170, 2),
        (0x178, eip & 0xFFFF), (0x268, 0x0007_0406_0007_0406), (0x310, EPYC_V4), (0x3B0, features), (0x3E8, 1),
    ):  # fmt: skip
        struct.pack_into("<Q", page, at, value)
    struct.pack_into("<IHHH", page, 0x408, 0x1F80, 0, 0, 0x37F)
    return bytes(page)


def hashes_page(kernel: bytes, initrd: bytes, cmdline: bytes) -> bytes:
    """QEMU, target/i386/sev.c: the table of hashes."""
    entries = b"".join(
        uuid.UUID(guid).bytes_le + struct.pack("<H", 50) + hashlib.sha256(data).digest()
        for guid, data in (
            ("97d02dd8-bd20-4c94-aa78-e7714d36ab2a", cmdline + b"\x00"),
            ("44baf731-3a2f-4bd7-9af1-41e29169781d", initrd),
            ("4de79437-abd2-427f-b835-d5b172d2045b", kernel),
        )
    )
    table = uuid.UUID("9438d606-4f22-4cc9-b479-a793d411fd21").bytes_le + struct.pack("<H", 18 + len(entries)) + entries
    return (bytes(HASHES_GPA % PAGE) + table).ljust(PAGE, b"\x00")


def computed(image: bytes, *, cpus: int, features: int = 1, boot: tuple[bytes, bytes, bytes] | None = None) -> bytes:
    digest = Digest()
    start = (1 << 32) - len(image)
    for at in range(0, len(image), PAGE):
        digest.page(1, start + at, hashlib.sha384(image[at : at + PAGE]).digest())
    for gpa, size, kind in SECTIONS:
        if kind in (1, 4) or (kind == 0x10 and boot is None):
            for at in range(0, size, PAGE):
                digest.page(3, gpa + at)
        elif kind == 0x10 and boot is not None:
            digest.page(1, gpa, hashlib.sha384(hashes_page(*boot)).digest())
        else:
            digest.page({2: 5, 3: 6}[kind], gpa)
    for cpu in range(cpus):
        page = registers(0xFFFFFFF0 if cpu == 0 else AP_EIP, features)
        digest.page(2, 0xFFFF_FFFF_F000, hashlib.sha384(page).digest())
    return digest.value


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ovmf(tmp_path: Path) -> Path:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(firmware())
    return path


@pytest.mark.parametrize("cpus", [1, 2, 5])
@pytest.mark.parametrize("features", [0x1, 0x21])
def test_two_computations_agree(ovmf: Path, cpus: int, features: int) -> None:
    found = launch_digest(ovmf, cpus=cpus, cpu_type="EPYC-v4", guest_features=features)
    assert found == computed(ovmf.read_bytes(), cpus=cpus, features=features)
    assert len(found) == 48


def test_a_kernel_is_measured_with_all_that_belongs_to_it(ovmf: Path, tmp_path: Path) -> None:
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    kernel.write_bytes(b"kernel")
    initrd.write_bytes(b"initrd")
    image = ovmf.read_bytes()
    rest: dict[str, Any] = {"cpus": 2, "cpu_type": "EPYC-v4"}
    found = launch_digest(ovmf, kernel=kernel, initrd=initrd, cmdline="console=ttyS0", **rest)
    assert found == computed(image, cpus=2, boot=(b"kernel", b"initrd", b"console=ttyS0"))
    alone = launch_digest(ovmf, kernel=kernel, **rest)
    assert alone == computed(image, cpus=2, boot=(b"kernel", b"", b""))
    others = [
        launch_digest(ovmf, kernel=kernel, initrd=initrd, cmdline="console=ttyS1", **rest),
        launch_digest(ovmf, kernel=initrd, initrd=initrd, cmdline="console=ttyS0", **rest),
        launch_digest(ovmf, **rest),
    ]
    assert len({found, alone, *others}) == 5


def test_every_input_changes_the_digest(ovmf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.fd"
    other.write_bytes(firmware(pages=5))
    made = {
        launch_digest(ovmf, cpus=1, cpu_type="EPYC-v4"),
        launch_digest(other, cpus=1, cpu_type="EPYC-v4"),
        launch_digest(ovmf, cpus=2, cpu_type="EPYC-v4"),
        launch_digest(ovmf, cpus=1, cpu_type="EPYC-Milan"),
        launch_digest(ovmf, cpus=1, cpu_type="EPYC-v4", guest_features=0x21),
        launch_digest(ovmf, cpus=1, cpu_type="EPYC-v4", hypervisor="ec2"),
        launch_digest(ovmf, cpus=1, cpu_type="EPYC-v4", hypervisor="gce"),
    }
    assert len(made) == 7


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        launch_digest(
            tmp_path / "absent",
            cpus=0,
            cpu_type="i386",
            initrd=tmp_path,
            cmdline="a\x00b",
            hypervisor="bochs",
            guest_features=-1,
        )
    assert [reason.where for reason in caught.value.reasons] == [
        "cpu_type", "hypervisor", "cpus", "guest_features", "kernel", "cmdline", "firmware", "initrd",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "image",
    [
        b"",
        bytes(100),
        bytes(PAGE),
        firmware()[: 2 * PAGE],
        firmware(sections=((0, PAGE, 99),)),
        firmware().replace(b"ASEV", b"VESA"),
        firmware().replace(uuid.UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e").bytes_le, bytes(16)),
        firmware(sections=((0, 100, 1),)),
    ],
)
def test_a_firmware_that_cannot_be_measured_is_refused(tmp_path: Path, image: bytes) -> None:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(image)
    with pytest.raises(InputError) as caught:
        launch_digest(path, cpus=2, cpu_type="EPYC-v4")
    assert caught.value.reasons[0].where == "firmware"


def test_a_kernel_without_its_place_in_the_firmware_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(firmware(sections=SECTIONS[:-1]))
    with pytest.raises(InputError, match="cannot be measured"):
        launch_digest(path, cpus=1, cpu_type="EPYC-v4", kernel=path)


def test_without_the_package_the_machine_says_so(ovmf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sevsnpmeasure", None)
    with pytest.raises(MachineError) as caught:
        launch_digest(ovmf, cpus=1, cpu_type="EPYC-v4")
    assert "cloister[tools]" in caught.value.hint
