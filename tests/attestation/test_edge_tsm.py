"""TDX, SEV-SNP and CCA guests against a temporary tree that behaves like the kernel's configfs-tsm."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from cloister.attestation import events as event_log
from cloister.attestation.edge.files import Files
from cloister.attestation.edge.tsm import (
    FIRST_WAIT_S,
    SNP_REPORT_DATA,
    TRIES,
    CcaAttester,
    Reports,
    SnpAttester,
    TdxAttester,
)
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.types import Evidence
from cloister.attestation.verify import verify
from cloister.errors import MachineError
from cloister.testkit.softtee import MEASUREMENT, NOW, SOFT_ROOTS, soft_collateral, workload
from tests.attestation.fakes import Kernel

REPORT_DATA = bytes(range(64))


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def attester(kernel: Kernel, waits: list[float]) -> TdxAttester:
    return TdxAttester(reports=kernel.reports, register=kernel.register, files=kernel, wait=waits.append)


def accepted(evidence: Evidence) -> None:
    claims = verify(evidence, soft_collateral(NOW), SOFT_ROOTS, now=NOW)
    assert claims.report_data == REPORT_DATA


def test_evidence_of_the_kernel_verifies(kernel: Kernel, attester: TdxAttester) -> None:
    attester.extend(event_log.WORKLOAD, workload().encode())
    evidence = attester.evidence(REPORT_DATA)
    accepted(evidence)
    assert [entry.name for entry in evidence.events] == [event_log.WORKLOAD]
    assert kernel.writes == [("rtmr3:sha384", 48), ("inblob", 64)]
    assert attester.name == "tdx"


def test_no_entry_is_left_behind(kernel: Kernel, attester: TdxAttester) -> None:
    attester.evidence(REPORT_DATA)
    kernel.busy = 1000
    with pytest.raises(MachineError):
        attester.evidence(REPORT_DATA)
    assert list(kernel.reports.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EAGAIN, errno.EINTR])
def test_a_busy_module_is_asked_again(kernel: Kernel, attester: TdxAttester, waits: list[float], number: int) -> None:
    kernel.busy, kernel.errno = 2, number
    accepted(attester.evidence(REPORT_DATA))
    assert waits == [FIRST_WAIT_S, 2 * FIRST_WAIT_S]


def test_a_module_that_stays_busy_ends_in_an_error(kernel: Kernel, attester: TdxAttester, waits: list[float]) -> None:
    kernel.busy = 1000
    with pytest.raises(MachineError, match="busy"):
        attester.evidence(REPORT_DATA)
    assert len(waits) == TRIES - 1
    assert sum(waits) < 10


def test_another_writer_is_noticed_by_the_generation(kernel: Kernel, attester: TdxAttester) -> None:
    """Without the generation check the quote of somebody else's REPORT_DATA would be ours."""
    kernel.racers = 2
    accepted(attester.evidence(REPORT_DATA))
    assert kernel.writes.count(("inblob", 64)) == 3
    kernel.racers = 1000
    with pytest.raises(MachineError, match="another program"):
        attester.evidence(REPORT_DATA)


def test_other_report_data_in_the_quote_is_refused(kernel: Kernel, attester: TdxAttester) -> None:
    kernel.quote = lambda report_data, rtmr3: soft_tdx.quote(
        soft_tdx.platform(), mrtd=MEASUREMENT, rtmr3=rtmr3, report_data=bytes(64)
    )
    with pytest.raises(MachineError, match="other report data"):
        attester.evidence(REPORT_DATA)


def test_another_program_that_extends_is_noticed(kernel: Kernel, attester: TdxAttester) -> None:
    attester.extend("cloister/note/1", b"x")
    kernel.register.write_bytes(event_log.extend(kernel.register.read_bytes(), bytes(48)))
    with pytest.raises(MachineError, match="in the quote") as caught:
        attester.evidence(REPORT_DATA)
    assert caught.value.reasons[0].where == "tdx.rtmr3"
    with pytest.raises(MachineError, match="before the extension"):
        attester.extend(event_log.WORKLOAD, b"y")


def test_an_extension_that_did_nothing_is_noticed(kernel: Kernel, attester: TdxAttester) -> None:
    class Deaf(Kernel):
        def write(self, path: Path, data: bytes) -> None:
            self.writes.append((path.name, len(data)))

    deaf = Deaf(kernel.reports.parent / "deaf")
    silent = TdxAttester(reports=deaf.reports, register=deaf.register, files=deaf)
    with pytest.raises(MachineError, match="after the extension"):
        silent.extend(event_log.WORKLOAD, b"y")


@pytest.mark.parametrize(
    ("number", "message"), [(errno.EFBIG, "File too large"), (errno.EIO, "fails"), (errno.ENXIO, "fails")]
)
def test_other_errors_are_not_retried(
    kernel: Kernel, attester: TdxAttester, waits: list[float], number: int, message: str
) -> None:
    kernel.busy, kernel.errno = 1, number
    with pytest.raises(MachineError, match=message):
        attester.evidence(REPORT_DATA)
    assert waits == []


def test_another_provider_is_refused(kernel: Kernel, attester: TdxAttester) -> None:
    kernel.provider = b"arm_cca_guest\n"
    with pytest.raises(MachineError, match="arm_cca_guest"):
        attester.evidence(REPORT_DATA)


def test_garbage_from_the_module_is_refused(kernel: Kernel, attester: TdxAttester) -> None:
    kernel.quote = lambda report_data, rtmr3: b"garbage"
    with pytest.raises(MachineError, match="no quote"):
        attester.evidence(REPORT_DATA)
    kernel.quote, kernel.padding = kernel._quote, b"x"
    with pytest.raises(MachineError, match="no quote"):
        attester.evidence(REPORT_DATA)


def test_a_generation_that_is_no_number_is_refused(kernel: Kernel, attester: TdxAttester) -> None:
    class Odd(Kernel):
        def mkdir(self, path: Path) -> None:
            super().mkdir(path)
            (path / "generation").write_bytes(b"many\n")

    odd = Odd(kernel.reports.parent / "odd")
    with pytest.raises(MachineError, match="generation"):
        TdxAttester(reports=odd.reports, register=odd.register, files=odd).evidence(REPORT_DATA)


def test_a_machine_without_a_tee_says_what_is_missing(tmp_path: Path) -> None:
    nothing = TdxAttester(reports=tmp_path / "no", register=tmp_path / "none")
    assert [reason.where for reason in nothing.missing()] == ["tee.report", "tee.register"]
    with pytest.raises(MachineError, match="no report entry"):
        nothing.evidence(REPORT_DATA)
    with pytest.raises(MachineError, match="cannot be extended"):
        nothing.extend("n", b"x")


def test_report_data_has_64_bytes(attester: TdxAttester) -> None:
    with pytest.raises(ValueError, match="64"):
        attester.evidence(bytes(32))


def test_real_file_operations_write_once_or_fail(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    Files().write(path, b"x" * 64)
    assert path.read_bytes() == b"x" * 64
    with pytest.raises(OSError, match="No such file"):
        Files().write(tmp_path / "absent", b"x")


def test_a_file_that_has_no_end_is_not_read_to_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100_000))
    assert len(Files().read(tmp_path / "file")) == 100_000
    with pytest.raises(OSError, match="more than"):
        Files().read(tmp_path / "file", limit=99_999)
    with pytest.raises(OSError, match="more than"):
        Files().read(Path("/dev/zero"))


def test_a_short_write_is_an_error_and_not_evidence(kernel: Kernel, attester: TdxAttester) -> None:
    """A driver that takes half of the report data would quote something that nobody asked for."""

    class Short(Kernel):
        def write(self, path: Path, data: bytes) -> None:
            raise OSError(errno.EIO, "32 of 64 bytes were taken")

    short = Short(kernel.reports.parent / "short")
    with pytest.raises(MachineError, match="32 of 64"):
        TdxAttester(reports=short.reports, register=short.register, files=short).evidence(REPORT_DATA)
    assert list(short.reports.iterdir()) == []


def test_an_entry_of_somebody_else_is_not_touched(kernel: Kernel, attester: TdxAttester) -> None:
    foreign = kernel.reports / "foreign"
    kernel.mkdir(foreign)
    before = {each.name: each.read_bytes() for each in foreign.iterdir()}
    attester.evidence(REPORT_DATA)
    kernel.busy = 1000
    with pytest.raises(MachineError):
        attester.evidence(REPORT_DATA)
    assert {each.name: each.read_bytes() for each in foreign.iterdir()} == before
    assert [each.name for each in kernel.reports.iterdir()] == ["foreign"]


# --- SEV-SNP ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def amd(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path / "amd", "sev_guest")


def snp(kernel: Kernel, privlevel: int | None = None) -> SnpAttester:
    return SnpAttester(reports=kernel.reports, files=kernel, wait=lambda _: None, privlevel=privlevel)


def test_an_snp_report_is_over_the_log(amd: Kernel) -> None:
    attester = snp(amd)
    assert attester.missing() == ()
    empty = attester.evidence(REPORT_DATA)
    attester.extend(event_log.WORKLOAD, b"what runs")
    full = attester.evidence(REPORT_DATA)
    assert (empty.kind, len(empty.quote), dict(empty.parts)) == ("sev-snp", 1184, {})
    assert empty.quote[SNP_REPORT_DATA] == event_log.fold(REPORT_DATA, ())
    assert full.quote[SNP_REPORT_DATA] == event_log.fold(REPORT_DATA, full.events)
    assert [entry.data for entry in full.events] == [b"what runs"]
    assert list(amd.reports.iterdir()) == []


def test_the_hosts_certificate_table_goes_along(amd: Kernel) -> None:
    amd.table = bytes.fromhex("63da758de6644564adc5f4b93be8accd") + bytes(8)
    assert dict(snp(amd).evidence(REPORT_DATA).parts) == {"table": amd.table}
    amd.table = bytes(4096)  # a host without certificates gives zeros
    assert dict(snp(amd).evidence(REPORT_DATA).parts) == {}


def test_the_privilege_level_is_the_most_privileged_that_the_kernel_allows(amd: Kernel) -> None:
    snp(amd).evidence(REPORT_DATA)
    assert amd.writes == [("privlevel", 2), ("inblob", 64)]
    amd.floor, amd.svsm = 2, True  # below an SVSM the guest runs at VMPL 2
    snp(amd).evidence(REPORT_DATA)
    snp(amd, 3).evidence(REPORT_DATA)
    with pytest.raises(MachineError, match="VMPL 1") as caught:
        snp(amd, 1).evidence(REPORT_DATA)
    assert caught.value.reasons[0].wanted == "2 to 3"
    assert list(amd.reports.iterdir()) == []


def test_an_svsm_is_seen_by_its_attribute(amd: Kernel) -> None:
    reports = Reports("sev_guest", "SEV-SNP", folder=amd.reports, files=amd)
    assert not reports.svsm()
    amd.svsm = True
    assert reports.svsm()
    assert list(amd.reports.iterdir()) == []


def test_a_race_on_an_snp_entry_is_noticed_with_both_writes(amd: Kernel) -> None:
    amd.racers = 1
    snp(amd).evidence(REPORT_DATA)
    assert amd.writes.count(("inblob", 64)) == 2
    amd.racers = 1000
    with pytest.raises(MachineError, match="another program"):
        snp(amd).evidence(REPORT_DATA)


def test_an_snp_report_over_other_data_is_not_sent(amd: Kernel) -> None:
    amd.quote = lambda data, _: bytes(1184)
    with pytest.raises(MachineError, match="other report data"):
        snp(amd).evidence(REPORT_DATA)
    amd.quote = lambda data, _: bytes(1183)
    with pytest.raises(MachineError, match="1183 bytes"):
        snp(amd).evidence(REPORT_DATA)


def test_attesters_of_other_hardware_say_what_they_found(kernel: Kernel, amd: Kernel) -> None:
    assert snp(kernel).missing()[0].found == "tdx_guest"
    assert TdxAttester(reports=amd.reports, register=amd.register, files=amd).missing()[0].found == "sev_guest"
    with pytest.raises(MachineError, match="not a SEV-SNP guest"):
        snp(kernel).evidence(REPORT_DATA)


def test_a_kernel_without_privilege_levels_is_asked_for_none(tmp_path: Path) -> None:
    class Old(Kernel):
        def mkdir(self, path: Path) -> None:
            super().mkdir(path)
            (path / "privlevel").unlink()
            (path / "privlevel_floor").unlink()

    old = Old(tmp_path, "sev_guest")
    snp(old).evidence(REPORT_DATA)
    with pytest.raises(MachineError, match="no privilege levels"):
        snp(old, 1).evidence(REPORT_DATA)


# --- Arm CCA ----------------------------------------------------------------------------------------------------------


def test_a_realm_token_is_over_the_log(tmp_path: Path) -> None:
    arm = Kernel(tmp_path, "arm_cca_guest")
    attester = CcaAttester(reports=arm.reports, files=arm)
    assert attester.missing() == ()
    attester.extend(event_log.WORKLOAD, b"what runs")
    evidence = attester.evidence(REPORT_DATA)
    assert evidence.kind == "cca"
    assert event_log.fold(REPORT_DATA, evidence.events) in evidence.quote
    arm.quote = lambda data, _: b"token over something else"
    with pytest.raises(MachineError, match="another challenge"):
        attester.evidence(REPORT_DATA)
