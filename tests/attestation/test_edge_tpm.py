"""A measured host with a real swtpm: quotes through the verifier, enrolment, logs, foreign extensions."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from cloister.attestation import events as event_log
from cloister.attestation.binding import check_binding
from cloister.attestation.edge import tpm as edge
from cloister.attestation.edge.attester import SoftTdxAttester, attest
from cloister.attestation.edge.files import Files
from cloister.attestation.edge.tpm import TpmAttester
from cloister.attestation.edge.tpmclient import OWNER, PASSWORD, DeviceTransport, Tpm, TpmError, ak_template
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.evidence import LIMITS, decode, encode
from cloister.attestation.roots import Roots
from cloister.attestation.tpm import enrol
from cloister.attestation.tpm.format import parse_public
from cloister.attestation.types import Claims, Evidence
from cloister.attestation.verify import verify
from cloister.errors import EvidenceError, MachineError
from cloister.testkit.softtee import MEASUREMENT, NOW, binding, workload
from tests.attestation.fakes import Proxy, SwTpm
from tests.attestation.test_edge_tpmclient import define_nv

DATA = bytes(range(32))
EVICT = 0x120


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[SwTpm]:
    machine = SwTpm(tmp_path / "tpm")
    yield machine
    try:
        with Tpm(machine.transport) as tpm:
            assert tpm.transient() == (), "objects were left in the TPM"
    finally:
        machine.stop()


def host(chip: SwTpm, **options: object) -> TpmAttester:
    values: dict[str, object] = {
        "connect": chip.transport,
        "boot_log": chip.folder / "no-boot-log",
        "ima_log": chip.folder / "no-ima-log",
    }
    return TpmAttester(**(values | options))  # type: ignore[arg-type]


def enrolled(attester: TpmAttester) -> Endorsements:
    """The relying party's half of enrolment: the EK is pinned, because this TPM's maker is nobody."""
    identity = attester.identity()
    ek, ak = parse_public(identity.ek, where="ek"), parse_public(identity.ak, where="ak")
    endorser = enrol.check_ek(
        ek, identity.ek_certificate, Endorsements(), Roots(), now=NOW, pinned=frozenset({enrol.ek_id(ek)})
    )
    enrol.check_ak(ak, where="ak")
    secret = bytes(range(32))
    made = enrol.make_credential(ek, ak.name, secret, randomness=bytes(enrol.RANDOMNESS))
    enrol.check_activation(secret, attester.activate(identity.kind, *made))
    note = enrol.Note(ak.name, endorser.ek, endorser.how, NOW - timedelta(hours=1))
    return Endorsements((enrol.endorsement(note),))


def judged(evidence: Evidence, endorsements: Endorsements) -> Claims:
    return verify(decode(encode(evidence)), endorsements, Roots(), now=NOW)


def test_a_host_is_enrolled_and_attests(chip: SwTpm) -> None:
    attester = host(chip)
    assert attester.missing() == ()
    endorsements = enrolled(attester)
    attester.extend(event_log.WORKLOAD, workload().encode())
    claims = judged(attest(attester, binding()), endorsements)
    assert (claims.tee, claims.kind, claims.debug) == ("tpm", "attested-host", False)
    assert check_binding(claims, binding()) == ()
    assert claims.events[0].data == workload().encode()
    assert claims.measurements["pcr15"] == event_log.replay(claims.events, "sha256")


def test_a_host_that_nobody_enrolled_is_refused(chip: SwTpm) -> None:
    with pytest.raises(EvidenceError) as caught:
        judged(host(chip).evidence(DATA), Endorsements())
    assert caught.value.reasons[0].where == "tpm.3-identity"


def test_a_restart_keeps_the_key_and_shows(chip: SwTpm) -> None:
    attester = host(chip)
    endorsements = enrolled(attester)
    before = judged(attester.evidence(DATA), endorsements)
    chip.restart()
    after = judged(attester.evidence(DATA), endorsements)
    assert before.platform == after.platform
    assert after.svns["reset_count"] > before.svns["reset_count"]


def test_a_tpm_stands_beside_a_cpu(chip: SwTpm) -> None:
    """PCR 15 belongs to somebody else then, and is left out of a quote without events."""
    with Tpm(chip.transport) as tpm:
        tpm.extend_pcr(15, {"sha256": bytes(32)})
    device = host(chip)
    endorsements = enrolled(device)
    evidence = attest(SoftTdxAttester(MEASUREMENT, devices=(device,)), binding())
    claims = judged(evidence.devices[0], endorsements)
    assert claims.report_data == binding().qualifying_data()
    assert "pcr15" not in claims.measurements
    assert claims.events == ()


def test_another_program_that_extends_is_noticed(chip: SwTpm) -> None:
    attester = host(chip)
    attester.extend(event_log.WORKLOAD, b"what runs")
    with Tpm(chip.transport) as tpm:
        tpm.extend_pcr(15, {"sha256": bytes(32)})
    with pytest.raises(MachineError, match="in the quote") as caught:
        attester.evidence(DATA)
    assert caught.value.reasons[0].where == "tpm.pcr15"
    with pytest.raises(MachineError, match="before the extension"):
        attester.extend(event_log.CONFIG, b"x")


def test_ima_extends_between_reading_and_quoting(chip: SwTpm) -> None:
    """PCR 10 moves whenever a file is opened: values and quote must be of one moment."""
    moves = 0

    class Moving(Proxy):
        def exchange(self, command: bytes) -> bytes:
            nonlocal moves
            if struct.unpack_from(">I", command, 6)[0] == 0x158 and moves:
                moves -= 1
                extend = struct.pack(">I", 1) + struct.pack(">H", 0x0B) + hashlib.sha256(bytes([moves])).digest()
                area = struct.pack(">IHBH", PASSWORD, 0, 0, 0)
                body = struct.pack(">I", 10) + struct.pack(">I", len(area)) + area + extend
                self.inner.exchange(struct.pack(">HII", 0x8002, 10 + len(body), 0x182) + body)
            return super().exchange(command)

    attester = host(chip, connect=lambda: Moving(chip.transport()))
    endorsements = enrolled(attester)
    moves = edge.TRIES - 1
    assert judged(attester.evidence(DATA), endorsements).report_data == DATA
    moves = 100
    with pytest.raises(MachineError, match="no quote over the PCRs") as caught:
        attester.evidence(DATA)
    assert caught.value.reasons[0].where == "tpm.quote.pcrs"


def test_the_ima_list_is_read_after_the_quote(chip: SwTpm) -> None:
    """A list that is behind its quote cannot explain it; one that is ahead can."""
    order: list[str] = []

    class Order(Proxy):
        def exchange(self, command: bytes) -> bytes:
            if struct.unpack_from(">I", command, 6)[0] == 0x158:
                order.append("quote")
            return super().exchange(command)

    class Reader(Files):
        def read(self, path: Path, *, limit: int = 1 << 20) -> bytes:
            order.append(path.name)
            return super().read(path, limit=limit)

    (chip.folder / "ima").write_bytes(b"list")
    (chip.folder / "boot").write_bytes(b"log")
    attester = host(
        chip,
        connect=lambda: Order(chip.transport()),
        files=Reader(),
        ima_log=chip.folder / "ima",
        boot_log=chip.folder / "boot",
    )
    parts = attester.evidence(DATA).parts
    assert order == ["quote", "boot", "ima"]
    assert (parts["ima-log"], parts["boot-log"]) == (b"list", b"log")


def test_logs_that_no_verifier_takes_are_an_error_here(chip: SwTpm) -> None:
    big = chip.folder / "big"
    big.write_bytes(bytes(LIMITS.part + 1))
    with pytest.raises(MachineError, match="cannot be read") as caught:
        host(chip, ima_log=big).evidence(DATA)
    assert str(LIMITS.part) in caught.value.hint
    big.write_bytes(b"")
    assert "ima-log" not in host(chip, ima_log=big).evidence(DATA).parts
    assert "ima-log" not in host(chip, ima_log=big, pcrs=(0, 1)).evidence(DATA).parts


def test_a_clouds_key_and_certificate_come_from_nv(chip: SwTpm) -> None:
    template = bytearray(ak_template())
    template[-4:] = b"\x00\x01\x07\x00\x00"  # another unique value: another key than ours
    certificate = b"\x30\x03abc"
    with Tpm(chip.transport) as tpm:
        define_nv(tpm, 0x01C10002, certificate + bytes(20))
        define_nv(tpm, 0x01C10003, bytes(template))
        with tpm.primary(bytes(template)) as key:
            theirs = key.public
    evidence = host(chip).evidence(DATA)
    assert evidence.parts["ak"] == theirs
    assert evidence.parts["ak-cert"] == certificate


def test_a_persistent_key_is_used_by_its_handle(chip: SwTpm) -> None:
    with Tpm(chip.transport) as tpm, tpm.primary(ak_template(), OWNER) as key:
        tpm.execute(EVICT, (OWNER, key.handle), struct.pack(">I", 0x81000003), sessions=(PASSWORD,))
        public = key.public
    assert host(chip, ak=0x81000003).evidence(DATA).parts["ak"] == public
    with pytest.raises(TpmError, match="no such handle"):
        host(chip, ak=0x81000004).evidence(DATA)


def test_the_host_sends_its_ek_certificate(chip: SwTpm) -> None:
    assert host(chip).identity().ek_certificate == b""
    with Tpm(chip.transport) as tpm:
        define_nv(tpm, 0x01C00002, b"\x30\x03rsa" + b"\xff" * 30)
    found = host(chip).identity()
    assert (found.kind, found.ek_certificate) == ("rsa", b"\x30\x03rsa")
    with Tpm(chip.transport) as tpm:
        define_nv(tpm, 0x01C0000A, b"\x30\x03ecc")
    found = host(chip).identity()
    assert (found.kind, found.ek_certificate) == ("ecc", b"\x30\x03ecc")


def test_a_quote_of_other_data_is_not_sent(chip: SwTpm) -> None:
    attester = host(chip)
    with pytest.raises(ValueError, match="32"):
        attester.evidence(bytes(64))

    class Liar(Tpm):
        def quote(self, key, qualifying_data, selection):  # type: ignore[no-untyped-def]
            return super().quote(key, bytes(32), selection)

    with (
        Liar(chip.transport) as tpm,
        tpm.primary(ak_template()) as key,
        pytest.raises(MachineError, match="other data"),
    ):
        edge.quoted(tpm, key, DATA, (0,))


def test_a_machine_without_a_tpm_says_so(tmp_path: Path) -> None:
    reasons = TpmAttester(connect=lambda: DeviceTransport(tmp_path / "tpmrm0")).missing()
    assert reasons[0].where == "tee.tpm"
    assert reasons[0].hint
