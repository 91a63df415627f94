"""Attesters: the soft one, and the real one against a temporary tree that behaves like the kernel."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cloister.attestation import events as event_log
from cloister.attestation.binding import check_binding
from cloister.attestation.edge.attester import (
    FIRST_WAIT_S,
    TRIES,
    Files,
    SoftTdxAttester,
    TsmAttester,
    attest,
    find_attester,
)
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.types import Evidence
from cloister.attestation.verify import verify
from cloister.errors import InputError, MachineError
from cloister.testkit.softtee import MEASUREMENT, NOW, SOFT_ROOTS, binding, soft_collateral, workload

REPORT_DATA = bytes(range(64))


class Kernel(Files):
    """configfs-tsm and the RTMR file over a temporary tree, with faults to inject.

    `busy` reads of outblob answer EBUSY, `racers` writes to inblob are followed by somebody else's write.
    """

    def __init__(self, root: Path) -> None:
        self.reports = root / "report"
        self.register = root / "rtmr3:sha384"
        self.reports.mkdir(parents=True)
        self.register.write_bytes(bytes(48))
        self.provider = b"tdx_guest\n"
        self.busy = 0
        self.errno = errno.EBUSY
        self.racers = 0
        self.padding = bytes(70)
        self.quote: Callable[[bytes, bytes], bytes] = self._quote
        self.writes: list[tuple[str, int]] = []

    def _quote(self, report_data: bytes, rtmr3: bytes) -> bytes:
        return soft_tdx.quote(soft_tdx.platform(), mrtd=MEASUREMENT, rtmr3=rtmr3, report_data=report_data)

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        (path / "generation").write_bytes(b"0\n")
        (path / "provider").write_bytes(self.provider)
        (path / "inblob").write_bytes(b"")
        (path / "outblob").write_bytes(b"")

    def rmdir(self, path: Path) -> None:
        for name in ("generation", "provider", "inblob", "outblob"):
            (path / name).unlink()
        super().rmdir(path)

    def read(self, path: Path) -> bytes:
        if path.name == "outblob" and self.busy:
            self.busy -= 1
            raise OSError(self.errno, os.strerror(self.errno))
        return super().read(path)

    def write(self, path: Path, data: bytes) -> None:
        self.writes.append((path.name, len(data)))
        if path == self.register:
            super().write(path, event_log.extend(self.register.read_bytes(), data))
            return
        self._inblob(path, data)
        if self.racers:
            self.racers -= 1
            self._inblob(path, b"\xee" * 64)

    def _inblob(self, path: Path, data: bytes) -> None:
        super().write(path, data)
        generation = path.parent / "generation"
        generation.write_bytes(b"%d\n" % (int(generation.read_bytes()) + 1))
        quote = self.quote(data, self.register.read_bytes())
        (path.parent / "outblob").write_bytes(quote + self.padding if quote else b"")


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def attester(kernel: Kernel, waits: list[float]) -> TsmAttester:
    return TsmAttester(reports=kernel.reports, register=kernel.register, files=kernel, wait=waits.append)


def accepted(evidence: Evidence) -> None:
    claims = verify(evidence, soft_collateral(NOW), SOFT_ROOTS, now=NOW)
    assert claims.report_data == REPORT_DATA


def test_evidence_of_the_kernel_verifies(kernel: Kernel, attester: TsmAttester) -> None:
    attester.extend(event_log.WORKLOAD, workload().encode())
    evidence = attester.evidence(REPORT_DATA)
    accepted(evidence)
    assert [entry.name for entry in evidence.events] == [event_log.WORKLOAD]
    assert kernel.writes == [("rtmr3:sha384", 48), ("inblob", 64)]
    assert attester.name == "tdx"


def test_no_entry_is_left_behind(kernel: Kernel, attester: TsmAttester) -> None:
    attester.evidence(REPORT_DATA)
    kernel.busy = 1000
    with pytest.raises(MachineError):
        attester.evidence(REPORT_DATA)
    assert list(kernel.reports.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EAGAIN])
def test_a_busy_module_is_asked_again(kernel: Kernel, attester: TsmAttester, waits: list[float], number: int) -> None:
    kernel.busy, kernel.errno = 2, number
    accepted(attester.evidence(REPORT_DATA))
    assert waits == [FIRST_WAIT_S, 2 * FIRST_WAIT_S]


def test_a_module_that_stays_busy_ends_in_an_error(kernel: Kernel, attester: TsmAttester, waits: list[float]) -> None:
    kernel.busy = 1000
    with pytest.raises(MachineError, match="busy"):
        attester.evidence(REPORT_DATA)
    assert len(waits) == TRIES - 1
    assert sum(waits) < 10


def test_another_writer_is_noticed_by_the_generation(kernel: Kernel, attester: TsmAttester) -> None:
    """Without the generation check the quote of somebody else's REPORT_DATA would be ours."""
    kernel.racers = 2
    accepted(attester.evidence(REPORT_DATA))
    assert kernel.writes.count(("inblob", 64)) == 3
    kernel.racers = 1000
    with pytest.raises(MachineError, match="another program"):
        attester.evidence(REPORT_DATA)


def test_other_report_data_in_the_quote_is_refused(kernel: Kernel, attester: TsmAttester) -> None:
    kernel.quote = lambda report_data, rtmr3: soft_tdx.quote(
        soft_tdx.platform(), mrtd=MEASUREMENT, rtmr3=rtmr3, report_data=bytes(64)
    )
    with pytest.raises(MachineError, match="other report data"):
        attester.evidence(REPORT_DATA)


def test_another_program_that_extends_is_noticed(kernel: Kernel, attester: TsmAttester) -> None:
    attester.extend("cloister/note/1", b"x")
    kernel.register.write_bytes(event_log.extend(kernel.register.read_bytes(), bytes(48)))
    with pytest.raises(MachineError, match="in the quote") as caught:
        attester.evidence(REPORT_DATA)
    assert caught.value.reasons[0].where == "tdx.rtmr3"
    with pytest.raises(MachineError, match="before the extension"):
        attester.extend(event_log.WORKLOAD, b"y")


def test_an_extension_that_did_nothing_is_noticed(kernel: Kernel, attester: TsmAttester) -> None:
    class Deaf(Kernel):
        def write(self, path: Path, data: bytes) -> None:
            self.writes.append((path.name, len(data)))

    deaf = Deaf(kernel.reports.parent / "deaf")
    silent = TsmAttester(reports=deaf.reports, register=deaf.register, files=deaf)
    with pytest.raises(MachineError, match="after the extension"):
        silent.extend(event_log.WORKLOAD, b"y")


@pytest.mark.parametrize(
    ("number", "message"), [(errno.EFBIG, "File too large"), (errno.EIO, "fails"), (errno.ENXIO, "fails")]
)
def test_other_errors_are_not_retried(
    kernel: Kernel, attester: TsmAttester, waits: list[float], number: int, message: str
) -> None:
    kernel.busy, kernel.errno = 1, number
    with pytest.raises(MachineError, match=message):
        attester.evidence(REPORT_DATA)
    assert waits == []


def test_another_provider_is_refused(kernel: Kernel, attester: TsmAttester) -> None:
    kernel.provider = b"sev_guest\n"
    with pytest.raises(MachineError, match="sev_guest"):
        attester.evidence(REPORT_DATA)


def test_garbage_from_the_module_is_refused(kernel: Kernel, attester: TsmAttester) -> None:
    kernel.quote = lambda report_data, rtmr3: b"garbage"
    with pytest.raises(MachineError, match="no quote"):
        attester.evidence(REPORT_DATA)
    kernel.quote, kernel.padding = kernel._quote, b"x"
    with pytest.raises(MachineError, match="no quote"):
        attester.evidence(REPORT_DATA)


def test_a_generation_that_is_no_number_is_refused(kernel: Kernel, attester: TsmAttester) -> None:
    class Odd(Kernel):
        def mkdir(self, path: Path) -> None:
            super().mkdir(path)
            (path / "generation").write_bytes(b"many\n")

    odd = Odd(kernel.reports.parent / "odd")
    with pytest.raises(MachineError, match="generation"):
        TsmAttester(reports=odd.reports, register=odd.register, files=odd).evidence(REPORT_DATA)


def test_a_machine_without_a_tee_says_what_is_missing(tmp_path: Path) -> None:
    nothing = TsmAttester(reports=tmp_path / "no", register=tmp_path / "none")
    assert [reason.where for reason in nothing.missing()] == ["tee.report", "tee.register"]
    with pytest.raises(MachineError, match="no report entry"):
        nothing.evidence(REPORT_DATA)
    with pytest.raises(MachineError, match="cannot be extended"):
        nothing.extend("n", b"x")


def test_report_data_has_64_bytes(attester: TsmAttester) -> None:
    for subject in (attester, SoftTdxAttester(MEASUREMENT)):
        with pytest.raises(ValueError, match="64"):
            subject.evidence(bytes(32))


def test_real_file_operations_write_once_or_fail(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    Files().write(path, b"x" * 64)
    assert path.read_bytes() == b"x" * 64
    with pytest.raises(OSError, match="No such file"):
        Files().write(tmp_path / "absent", b"x")


def test_the_soft_attester_is_named_and_says_so() -> None:
    attester = find_attester("soft-tdx", measurement=MEASUREMENT)
    assert attester.name == "soft-tdx"
    assert "protects nothing" in repr(attester)
    attester.extend(event_log.WORKLOAD, workload().encode())
    accepted(attester.evidence(REPORT_DATA))
    with pytest.raises(ValueError, match="48"):
        find_attester("soft-tdx", measurement=bytes(32))


def test_auto_never_falls_back_to_software() -> None:
    """On a machine without TDX, `auto` is an error, not a soft TEE."""
    if TsmAttester().missing():
        for kind in ("auto", "tdx"):
            with pytest.raises(MachineError) as caught:
                find_attester(kind, measurement=MEASUREMENT)
            assert caught.value.reasons
            assert "soft-tdx" in caught.value.hint
    else:
        assert find_attester("auto", measurement=MEASUREMENT).name == "tdx"
    with pytest.raises(InputError, match="unknown"):
        find_attester("soft", measurement=MEASUREMENT)


# --- the whole machine ------------------------------------------------------------------------------------------------


class Device:
    name = "tpm"

    def __init__(self, mark: bytes) -> None:
        self.mark = mark
        self.asked: list[bytes] = []

    def evidence(self, qualifying_data: bytes) -> Evidence:
        self.asked.append(qualifying_data)
        return Evidence("tpm", self.mark + qualifying_data)


def test_the_cpu_attests_what_the_devices_said() -> None:
    devices = (Device(b"a"), Device(b"b"))
    attester = SoftTdxAttester(MEASUREMENT, devices=devices)
    bound = binding()
    evidence = attest(attester, bound)
    assert [each.quote[:1] for each in evidence.devices] == [b"a", b"b"]
    assert devices[0].asked == devices[1].asked == [bound.qualifying_data()]
    alone = verify(replace(evidence, devices=()), soft_collateral(NOW), SOFT_ROOTS, now=NOW)
    assert alone.report_data == bound.over(evidence.devices).report_data()
    assert alone.report_data != bound.report_data()
    with pytest.raises(ValueError, match="already"):
        attest(attester, bound.over(evidence.devices))


def test_a_cpu_without_devices_attests_the_binding_itself() -> None:
    evidence = attest(SoftTdxAttester(MEASUREMENT), binding())
    claims = verify(evidence, soft_collateral(NOW), SOFT_ROOTS, now=NOW)
    assert evidence.devices == ()
    assert check_binding(claims, binding()) == ()
