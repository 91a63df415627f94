"""A Nitro enclave against a fake driver that gets real ioctl arguments."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import cbor2
import pytest

from cloister.attestation import events as event_log
from cloister.attestation.edge import nsm
from cloister.attestation.edge.nsm import IOCTL_RAW, TRIES, NitroAttester, NsmError
from cloister.errors import MachineError
from tests.attestation.fakes import Nsm

DATA = bytes(range(64))


@pytest.fixture
def module() -> Nsm:
    return Nsm()


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def attester(module: Nsm, waits: list[float]) -> NitroAttester:
    return NitroAttester(device=module, wait=waits.append)


def fault(number: int, *, after: bool = False) -> tuple[OSError, bool]:
    return OSError(number, os.strerror(number)), after


def test_the_request_code_is_the_kernels() -> None:
    assert IOCTL_RAW == 0xC0200A00


def test_events_are_in_pcr_16_and_the_document_lists_it(module: Nsm, attester: NitroAttester) -> None:
    """The module lists locked PCRs only: without the lock the log would be in no document."""
    attester.extend(event_log.WORKLOAD, b"what runs")
    attester.extend(event_log.CONFIG, b"how")
    evidence = attester.evidence(DATA)
    document = cbor2.loads(cbor2.loads(evidence.quote)[2])
    assert evidence.kind == "nitro"
    assert document["pcrs"][16] == event_log.replay(evidence.events)
    assert document["user_data"] == DATA
    assert sorted(document["pcrs"]) == list(range(17))
    assert module.open_descriptors == 0
    attester.evidence(DATA)
    assert module.asked.count("LockPCR") == 1


def test_without_events_nothing_is_locked(module: Nsm, attester: NitroAttester) -> None:
    evidence = attester.evidence(DATA)
    assert 16 not in cbor2.loads(cbor2.loads(evidence.quote)[2])["pcrs"]
    attester.extend(event_log.WORKLOAD, b"what runs")


def test_an_event_after_the_first_evidence_is_refused_with_a_reason(module: Nsm, attester: NitroAttester) -> None:
    attester.extend(event_log.WORKLOAD, b"what runs")
    attester.evidence(DATA)
    with pytest.raises(MachineError, match="locked") as caught:
        attester.extend(event_log.CONFIG, b"later")
    assert "before evidence" in caught.value.hint
    assert len(attester.evidence(DATA).events) == 1


def test_another_program_that_extends_is_noticed(module: Nsm, attester: NitroAttester) -> None:
    module.pcrs[16] = bytes([1]) * 48
    with pytest.raises(MachineError, match="before the extension") as caught:
        attester.extend(event_log.WORKLOAD, b"what runs")
    assert caught.value.reasons[0].where == "nitro.pcr16"
    with pytest.raises(MachineError, match="before the attestation"):
        attester.evidence(DATA)


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_extension_happens_exactly_once(module: Nsm, attester: NitroAttester, after: bool) -> None:
    """Whether the module had extended when the signal came, only the register knows; twice would spoil the log."""
    attester.extend(event_log.WORKLOAD, b"first")
    original = module.ioctl
    hits: list[int] = []

    def once(descriptor: int, request: int, message: bytearray) -> None:
        if module.asked and module.asked[-1] == "DescribePCR" and not hits:
            hits.append(1)
            module.faults = [fault(errno.EINTR, after=after)]
        original(descriptor, request, message)

    module.asked.clear()
    module.ioctl = once  # type: ignore[method-assign]
    attester.extend(event_log.CONFIG, b"second")
    assert hits == [1]
    assert len(attester.evidence(DATA).events) == 2
    assert module.pcrs[16] == event_log.replay(attester.evidence(DATA).events)


@pytest.mark.parametrize("number", [errno.EINTR, errno.EBUSY, errno.EAGAIN])
def test_a_device_that_is_disturbed_is_asked_again(
    module: Nsm, attester: NitroAttester, waits: list[float], number: int
) -> None:
    module.faults = [fault(number)] * (TRIES - 1)
    attester.evidence(DATA)
    assert len(waits) == TRIES - 1
    module.faults = [fault(number)] * TRIES
    with pytest.raises(MachineError, match="no answer"):
        attester.evidence(DATA)
    assert module.open_descriptors == 0


def test_a_device_that_fails_is_named(module: Nsm, attester: NitroAttester) -> None:
    module.faults = [fault(errno.EPERM)]
    with pytest.raises(MachineError, match="/dev/nsm fails") as caught:
        attester.evidence(DATA)
    assert "CAP_SYS_ADMIN" in caught.value.hint


@pytest.mark.parametrize("kind", [*nsm._ERRORS, "SomethingNew"])
def test_every_refusal_of_the_module_is_said(module: Nsm, attester: NitroAttester, kind: str) -> None:
    module.answer = lambda asked: {"Error": kind} if "Attestation" in asked else None
    with pytest.raises(NsmError, match="refuses Attestation") as caught:
        attester.evidence(DATA)
    assert caught.value.kind == kind
    assert nsm._ERRORS.get(kind, kind) in caught.value.message


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff",
        b"\x81" * 3000,
        b"\x5b\xff\xff\xff\xff\xff\xff\xff\xff",
        cbor2.dumps(None),
        cbor2.dumps([]),
        cbor2.dumps("Other"),
        cbor2.dumps({"Other": {}}),
        cbor2.dumps({"DescribePCR": 1}),
        cbor2.dumps({"DescribePCR": {}}),
        cbor2.dumps({"DescribePCR": {"lock": 1, "data": b""}}),
        cbor2.dumps({"DescribePCR": {"lock": True, "data": "text"}}),
        cbor2.dumps({"Error": 3}),
        cbor2.dumps({}),
    ],
)
def test_an_answer_of_another_form_is_a_machine_error(module: Nsm, attester: NitroAttester, raw: bytes) -> None:
    module.raw = raw
    with pytest.raises(MachineError):
        attester.evidence(DATA)


@pytest.mark.parametrize("size", [0, 0x3001, 1 << 40])
def test_an_impossible_size_is_not_believed(module: Nsm, attester: NitroAttester, size: int) -> None:
    def lie(descriptor: int, request: int, message: bytearray) -> None:
        message[24:] = size.to_bytes(8, "little")

    module.ioctl = lie  # type: ignore[method-assign]
    with pytest.raises(MachineError, match="bytes"):
        attester.evidence(DATA)


def test_a_document_over_other_data_is_not_sent(module: Nsm, attester: NitroAttester) -> None:
    module.answer = lambda asked: {"Attestation": {"document": b"something"}} if "Attestation" in asked else None
    with pytest.raises(MachineError, match="other user data"):
        attester.evidence(DATA)
    with pytest.raises(ValueError, match="64"):
        attester.evidence(bytes(32))


def test_a_machine_without_the_module_says_so(tmp_path: Path) -> None:
    without = NitroAttester(device=nsm.Device(tmp_path / "nsm"))
    assert "Nitro enclave" in without.missing()[0].wanted
    with pytest.raises(MachineError, match="fails"):
        without.evidence(DATA)


def test_a_file_that_is_no_device_is_a_machine_error(tmp_path: Path) -> None:
    (tmp_path / "nsm").write_bytes(b"")
    with pytest.raises(MachineError, match="ioctl"):
        NitroAttester(device=nsm.Device(tmp_path / "nsm")).evidence(DATA)
