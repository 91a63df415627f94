"""The launch digest of an SEV-SNP guest, computed without the hardware: a reference value for `measurement`.

It is what AMD's firmware computes over the pages that a hypervisor loads: OVMF, the hashes of kernel, initial RAM disk and
command line (where the OVMF has a place for them), and the initial registers of every virtual CPU (AMD 56860, SNP_LAUNCH_UPDATE). Done by
`sev-snp-measure` (extra `tools`), which reads files: so this is an edge. Whether the files are those of the guest is not known here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from cloister.errors import InputError, MachineError, Reason

MOST_CPUS: Final = 1024
FIRMWARE_LIMIT: Final = 64 * 1024 * 1024
GUEST_FEATURES: Final = 0x1
"""SEV_FEATURES of the first registers: SNP active. KVM adds bits for what the host offers (0x21 with debug swap)."""


def launch_digest(
    firmware: Path,
    *,
    cpus: int,
    cpu_type: str,
    kernel: Path | None = None,
    initrd: Path | None = None,
    cmdline: str = "",
    hypervisor: str = "qemu",
    guest_features: int = GUEST_FEATURES,
) -> bytes:
    """Return the launch digest, 48 bytes, of a guest that starts `firmware` (an OVMF for SEV-SNP).

    Args:
        cpus: number of virtual CPUs, 1 to 1024.
        cpu_type: QEMU's name, such as `EPYC-v4`.
        kernel: measured direct boot; then `initrd` and `cmdline` are measured too, also where they are empty.
        hypervisor: `qemu`, `ec2` or `gce`, which differ in the first registers.
        guest_features: SEV_FEATURES of the virtual CPUs, 64 bits.

    Raises:
        InputError: an unknown name or number, a file that cannot be read, or an OVMF that cannot be measured.
        MachineError: `sev-snp-measure` is not installed.
    """
    try:
        from sevsnpmeasure import guest
        from sevsnpmeasure.vcpu_types import CPU_SIGS
        from sevsnpmeasure.vmm_types import VMMType
    except ImportError as error:
        raise MachineError(
            "launch digests need the package sev-snp-measure", hint="pip install 'cloister[tools]'"
        ) from error
    hypervisors: dict[str, Any] = {"qemu": VMMType.QEMU, "ec2": VMMType.ec2, "gce": VMMType.gce}
    reasons = []
    if cpu_type not in CPU_SIGS:
        reasons.append(Reason("cpu_type", repr(cpu_type), ", ".join(sorted(CPU_SIGS))))
    if hypervisor not in hypervisors:
        reasons.append(Reason("hypervisor", repr(hypervisor), ", ".join(hypervisors)))
    if not 1 <= cpus <= MOST_CPUS:
        reasons.append(Reason("cpus", str(cpus), f"1 to {MOST_CPUS}"))
    if not 0 <= guest_features < 1 << 64:
        reasons.append(Reason("guest_features", str(guest_features), "64 bits"))
    if kernel is None and (initrd is not None or cmdline):
        reasons.append(Reason("kernel", "none", "a kernel", "without one, initrd and command line are not measured"))
    if "\x00" in cmdline:
        reasons.append(Reason("cmdline", "a zero byte", "text"))
    reasons += _unreadable({"firmware": firmware, "kernel": kernel, "initrd": initrd})
    if not reasons and (firmware.stat().st_size % 4096 or not 0 < firmware.stat().st_size <= FIRMWARE_LIMIT):
        wanted = f"whole pages of 4,096 bytes, at most {FIRMWARE_LIMIT}"
        reasons.append(Reason("firmware", f"{firmware.stat().st_size} bytes", wanted))
    if reasons:
        raise InputError("the guest cannot be measured", reasons=reasons)
    try:
        digest: bytes = guest.snp_calc_launch_digest(
            cpus,
            CPU_SIGS[cpu_type],
            str(firmware),
            str(kernel) if kernel is not None else "",
            str(initrd) if initrd is not None else "",
            cmdline,
            guest_features,
            "",
            hypervisors[hypervisor],
        )
    # the library has no error of its own: what its parsers raise about an OVMF is listed here
    except (ValueError, RuntimeError, AssertionError, KeyError, IndexError, AttributeError, OSError) as error:
        raise InputError(
            f"the firmware {firmware} cannot be measured",
            reasons=[
                Reason(
                    "firmware",
                    str(error)[:200] or type(error).__name__,
                    "an OVMF with the tables of SEV-SNP, and with SNP_KERNEL_HASHES where a kernel is given",
                    "build OvmfPkg/AmdSev/AmdSevX64.dsc for measured direct boot",
                )
            ],
        ) from error
    return digest


def _unreadable(files: dict[str, Path | None]) -> list[Reason]:
    reasons = []
    for name, path in files.items():
        if path is None:
            continue
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            reasons.append(Reason(name, f"{path}: {error.strerror}", "a file that can be read"))
    return reasons
