"""An SGX enclave against a temporary folder that behaves like Gramine's /dev/attestation."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from cloister.attestation import events as event_log
from cloister.attestation.edge.gramine import FIRST_WAIT_S, REPORT_DATA, TRIES, GramineAttester
from cloister.errors import MachineError
from tests.attestation.fakes import Enclave

DATA = bytes(range(64))


@pytest.fixture
def enclave(tmp_path: Path) -> Enclave:
    return Enclave(tmp_path)


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def attester(enclave: Enclave, waits: list[float]) -> GramineAttester:
    return GramineAttester(folder=enclave.folder, files=enclave, wait=waits.append)


def test_a_quote_is_over_the_log_and_without_padding(attester: GramineAttester) -> None:
    assert attester.missing() == ()
    attester.extend(event_log.WORKLOAD, b"what runs")
    evidence = attester.evidence(DATA)
    assert (evidence.kind, len(evidence.quote), evidence.quote[-10:]) == ("sgx", 446, b"signature!")
    assert evidence.quote[REPORT_DATA] == event_log.fold(DATA, evidence.events)
    with pytest.raises(ValueError, match="64"):
        attester.evidence(bytes(32))


@pytest.mark.parametrize("kind", [b"none\n", b"epid\n", b""])
def test_a_manifest_without_dcap_is_named_with_its_remedy(
    enclave: Enclave, attester: GramineAttester, kind: bytes
) -> None:
    (enclave.folder / "attestation_type").write_bytes(kind)
    with pytest.raises(MachineError, match="not in an SGX enclave") as caught:
        attester.evidence(DATA)
    assert "remote_attestation" in caught.value.reasons[0].hint


def test_outside_gramine_it_says_so(tmp_path: Path) -> None:
    reasons = GramineAttester(folder=tmp_path / "none").missing()
    assert reasons[0].where == "tee.gramine"
    assert "gramine-sgx" in reasons[0].wanted


def test_other_code_that_writes_between_is_noticed(
    enclave: Enclave, attester: GramineAttester, waits: list[float]
) -> None:
    """The pseudo files belong to the whole process: without the check, their quote would go out as ours."""
    enclave.thieves = 2
    assert attester.evidence(DATA).quote[REPORT_DATA] == event_log.fold(DATA, ())
    assert waits == [FIRST_WAIT_S, 2 * FIRST_WAIT_S]
    enclave.thieves = 1000
    with pytest.raises(MachineError, match="other code of this process"):
        attester.evidence(DATA)


def test_our_own_threads_do_not_disturb_one_another(enclave: Enclave) -> None:
    waits: list[float] = []
    attesters = [GramineAttester(folder=enclave.folder, files=enclave, wait=waits.append) for _ in range(4)]
    wrong: list[bytes] = []

    def work(number: int) -> None:
        data = bytes([number]) * 64
        found = {attesters[number].evidence(data).quote[REPORT_DATA] for _ in range(25)}
        wrong.extend(found - {event_log.fold(data, ())})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, waits) == ([], [])


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EINTR, errno.EBUSY])
def test_a_busy_quoting_enclave_is_asked_again(enclave: Enclave, attester: GramineAttester, number: int) -> None:
    enclave.busy, enclave.errno = TRIES - 1, number
    attester.evidence(DATA)
    enclave.busy = TRIES
    with pytest.raises(MachineError, match="busy"):
        attester.evidence(DATA)


def test_a_host_without_quoting_service_is_named(enclave: Enclave, attester: GramineAttester) -> None:
    enclave.busy, enclave.errno = 1, errno.EPERM
    with pytest.raises(MachineError, match="no quote") as caught:
        attester.evidence(DATA)
    assert "AESM" in caught.value.hint


@pytest.mark.parametrize("raw", [b"", b"short", bytes(435), bytes(432) + b"\xff\xff\xff\xff", bytes(436) + b"tail"])
def test_what_is_no_quote_is_refused(enclave: Enclave, attester: GramineAttester, raw: bytes) -> None:
    enclave.quote, enclave.padding = lambda _: raw, b""
    with pytest.raises(MachineError):
        attester.evidence(DATA)
