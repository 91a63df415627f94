"""The generated ELF program: what it does on this machine, and (where an emulator is installed) on aarch64."""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from cloister.confine import seccomp, shim
from cloister.confine.landlock import READ, RUN, Access, Ruleset, ruleset
from cloister.confine.profile import profile
from cloister.confine.shim import Orders
from cloister.confine.syscalls import ARCHES, Arch

HERE: Final = platform.machine()
EMULATOR: Final = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64") or ""


def orders(*argv: str, **changes: object) -> Orders:
    plain = Orders(
        argv=argv,
        environment={"GREETING": "hello world"},
        streams=(None, None, None),
        status_fd=500,
        rlimits=((4, 0), (7, 64)),
        landlock=None,
        seccomp=None,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def run(one: Orders, arch: Arch, tmp_path: Path) -> tuple[int, bytes, str]:
    """Run the program with the status pipe as descriptor 500 and a pipe for output as 501."""
    if arch != HERE and not (arch == "aarch64" and EMULATOR):
        pytest.skip(f"no way to run {arch} programs here")
    program = shim.build(one, arch)
    path = tmp_path / "shim"
    path.write_bytes(program.image)
    path.chmod(0o755)
    status_read, status_write = os.pipe()
    out_read, out_write = os.pipe()
    os.dup2(status_write, 500)
    os.dup2(out_write, 501)
    os.close(status_write)
    os.close(out_write)
    command = [str(path)] if arch == HERE else [EMULATOR, str(path)]
    try:
        done = subprocess.run(command, pass_fds=(500, 501), timeout=60, check=False)
    finally:
        os.close(500)
        os.close(501)
    with os.fdopen(status_read, "rb") as status, os.fdopen(out_read, "rb") as out:
        return done.returncode, status.read(), out.read().decode()


def failure(report: bytes, one: Orders, arch: Arch) -> tuple[str, int]:
    tag, step, number = shim.REPORT.unpack(report[-shim.REPORT.size :])
    assert tag == b"fail"
    return shim.build(one, arch).steps[step], number


@pytest.mark.parametrize("arch", ARCHES)
def test_program_starts_with_declared_environment_and_limits(arch: Arch, tmp_path: Path) -> None:
    script = "echo $GREETING; ulimit -n; ulimit -c; umask; cat /proc/self/coredump_filter; echo /proc/self/fd/*"
    one = orders("/bin/sh", "-c", script, streams=(None, 501, 501), coredump_filter=arch == HERE)
    code, status, text = run(one, arch, tmp_path)
    assert code == 0
    assert status == shim.READY
    greeting, files, core, umask, dumps, descriptors = text.splitlines()
    assert (greeting, files, core, umask) == ("hello world", "64", "0", "0022")
    if arch == HERE:
        assert int(dumps, 16) == 0
        assert [name.rsplit("/", 1)[1] for name in descriptors.split()][:3] == ["0", "1", "2"]
        assert len(descriptors.split()) <= 4  # and the listing of the folder itself


@pytest.mark.parametrize("arch", ARCHES)
def test_program_that_cannot_be_executed_is_reported(arch: Arch, tmp_path: Path) -> None:
    one = orders("/does/not/exist", coredump_filter=arch == HERE)
    code, status, _ = run(one, arch, tmp_path)
    assert code == shim.FAILED
    assert failure(status, one, arch) == ("execute /does/not/exist", 2)


@pytest.mark.parametrize("arch", ARCHES)
def test_a_failing_layer_stops_everything(arch: Arch, tmp_path: Path) -> None:
    """A filter that the kernel refuses (an unknown instruction): the program must not run without it."""
    if arch != HERE:
        pytest.skip("an emulator does not install filters")
    one = orders("/bin/sh", "-c", "echo escaped >&501", streams=(None, 501, 501), seccomp=bytes([0xFF] * 8))
    code, status, text = run(one, arch, tmp_path)
    assert (code, text) == (shim.FAILED, "")
    assert failure(status, one, arch) == ("install the seccomp filter", 22)


def test_a_missing_landlock_path_stops_everything(tmp_path: Path) -> None:
    rules = Ruleset(ruleset(1, (), network=False).attributes, (("/does/not/exist", READ),))
    one = orders("/bin/sh", "-c", "echo escaped", streams=(None, 501, 501), landlock=rules)
    code, status, text = run(one, HERE, tmp_path)  # type: ignore[arg-type]
    assert (code, text) == (shim.FAILED, "")
    assert failure(status, one, HERE) == ("open /does/not/exist for Landlock", 2)  # type: ignore[arg-type]


def test_landlock_and_seccomp_hold_after_exec(tmp_path: Path) -> None:
    rules = ruleset(1, (Access("/", RUN),), network=False)
    script = "echo x > /tmp/cloister-must-not-exist; grep -E 'NoNewPrivs|Seccomp:' /proc/self/status"
    one = orders(
        "/bin/sh",
        "-c",
        script,
        streams=(None, 501, 501),
        landlock=rules,
        seccomp=seccomp.compile(profile("sealed"), HERE),
    )
    code, _, text = run(one, HERE, tmp_path)  # type: ignore[arg-type]
    assert code == 0
    assert "ermission denied" in text
    assert text.split()[-4:] == ["NoNewPrivs:", "1", "Seccomp:", "2"]
    assert not Path("/tmp/cloister-must-not-exist").exists()


@pytest.mark.parametrize("arch", ARCHES)
def test_image_is_static_with_separate_code_and_data(arch: Arch) -> None:
    image = shim.build(orders("/bin/true", seccomp=seccomp.compile(profile("sealed"), arch)), arch).image
    assert image[:4] == b"\x7fELF"
    count = struct.unpack_from("<H", image, 56)[0]
    segments = [struct.unpack_from("<IIQQQQQQ", image, 64 + 56 * i) for i in range(count)]
    assert [segment[0] for segment in segments] == [1, 1, 0x6474E551]  # no interpreter, no dynamic section
    assert [segment[1] for segment in segments] == [5, 6, 6]  # never writable and executable
    for _, _, offset, address, _, size, _, alignment in segments[:2]:
        assert offset % alignment == address % alignment
        assert offset + size <= len(image)


@pytest.mark.parametrize("arch", ARCHES)
def test_same_orders_same_bytes(arch: Arch) -> None:
    one = orders("/bin/true", "a\nb", seccomp=seccomp.compile(profile("offline"), arch))
    assert shim.build(one, arch) == shim.build(one, arch)


@pytest.mark.parametrize("arch", ARCHES)
def test_probe_program_ends_at_once(arch: Arch, tmp_path: Path) -> None:
    if arch != HERE and not EMULATOR:
        pytest.skip(f"no way to run {arch} programs here")
    path = tmp_path / "true"
    path.write_bytes(shim.exit_program(arch))
    path.chmod(0o755)
    command = [str(path)] if arch == HERE else [EMULATOR, str(path)]
    assert subprocess.run(command, check=False, timeout=20).returncode == 0


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="above 3"):
        orders("/bin/true", streams=(None, 1, 2))
    with pytest.raises(ValueError, match="riscv64"):
        shim.build(orders("/bin/true"), "riscv64")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="riscv64"):
        shim.exit_program("riscv64")  # type: ignore[arg-type]
