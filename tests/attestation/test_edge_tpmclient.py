"""The TPM client against a real swtpm: commands, credential activation, power cuts, faults on the wire, no leaks."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister.attestation.edge import tpmclient
from cloister.attestation.edge.tpmclient import (
    AGAIN,
    ENDORSEMENT,
    FLUSH_CONTEXT,
    NULL,
    OWNER,
    PASSWORD,
    QUOTE,
    TRIES,
    DeviceTransport,
    Key,
    SocketTransport,
    Tpm,
    TpmError,
    Transport,
    ak_template,
    cut_der,
    ek_template,
    explain,
)
from cloister.attestation.tpm import enrol
from cloister.attestation.tpm.format import Selection, parse_public
from cloister.attestation.tpm.quote import check
from cloister.errors import EvidenceError, MachineError
from tests.attestation.fakes import Proxy, SwTpm, refusal_of_tpm

NONCE = bytes(range(32))
ALL = tuple(range(24))
NV_DEFINE, NV_WRITE, NV_UNDEFINE, EVICT = 0x12A, 0x137, 0x122, 0x120


@pytest.fixture(scope="module")
def chip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwTpm]:
    machine = SwTpm(tmp_path_factory.mktemp("tpm"))
    yield machine
    machine.stop()


@pytest.fixture
def proxy(chip: SwTpm) -> Iterator[Proxy]:
    between = Proxy(chip.transport())
    yield between
    between.close()


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def tpm(proxy: Proxy, waits: list[float]) -> Iterator[Tpm]:
    client = Tpm(lambda: proxy, wait=waits.append)
    yield client
    proxy.answers.clear()
    assert client.transient() == (), "objects were left in the TPM"


def define_nv(tpm: Tpm, index: int, data: bytes, attributes: int = 0x20004 | 1 << 18 | 1 << 1) -> None:
    """Make an NV index of the owner that holds `data`: OWNERREAD, AUTHWRITE, AUTHREAD, OWNERWRITE."""
    public = struct.pack(">IHIHH", index, 0x000B, attributes, 0, len(data))
    tpm.execute(
        NV_DEFINE, (OWNER,), struct.pack(">H", 0) + struct.pack(">H", len(public)) + public, sessions=(PASSWORD,)
    )
    for at in range(0, len(data), 512):
        piece = data[at : at + 512]
        tpm.execute(
            NV_WRITE,
            (OWNER, index),
            struct.pack(">H", len(piece)) + piece + struct.pack(">H", at),
            sessions=(PASSWORD,),
        )


# --- what works -------------------------------------------------------------------------------------------------------


def test_a_quote_verifies_with_the_pcrs_that_were_read(tpm: Tpm) -> None:
    tpm.extend_pcr(16, {"sha256": hashlib.sha256(b"event").digest()})
    values = tpm.read_pcrs("sha256", ALL)
    assert len(values) == 24
    assert values[17] == b"\xff" * 32
    with tpm.primary(ak_template()) as key:
        attest, signature = tpm.quote(key, NONCE, (Selection("sha256", ALL),))
    public = parse_public(key.public, where="ak")
    found = check(attest, signature, public.key, values, algorithm="sha256", where="quote")
    assert found.extra_data == NONCE
    assert public.attributes == 0x50472
    assert key.name == public.name
    enrol.check_ak(public, where="ak")
    with pytest.raises(EvidenceError):
        check(attest, signature, public.key, values | {16: bytes(32)}, algorithm="sha256", where="quote")


def test_an_extension_is_the_hash_that_the_notes_say(tpm: Tpm) -> None:
    before = tpm.read_pcrs("sha256", (16,))[16]
    digest = hashlib.sha256(b"more").digest()
    tpm.extend_pcr(16, {"sha256": digest})
    assert tpm.read_pcrs("sha256", (16,))[16] == hashlib.sha256(before + digest).digest()


def test_the_same_seed_gives_the_same_key(tpm: Tpm) -> None:
    names = set()
    for _ in range(2):
        with tpm.primary(ak_template()) as key:
            names.add(key.name)
    with tpm.primary(ak_template(), OWNER) as key:
        names.add(key.name)
    assert len(names) == 2


@pytest.mark.parametrize("kind", ["rsa", "ecc"])
def test_a_credential_for_this_tpm_and_this_key_opens(tpm: Tpm, kind: str) -> None:
    secret = bytes(range(32))
    with ExitStack() as stack:
        ek, ak = (stack.enter_context(tpm.primary(each)) for each in (ek_template(kind), ak_template()))
        credential = enrol.make_credential(
            parse_public(ek.public, where="ek"), ak.name, secret, randomness=bytes(enrol.RANDOMNESS)
        )
        assert tpm.activate(ak, ek, *credential) == secret
        assert tpm.activate(ak, ek, *credential) == secret  # no session was left


@pytest.mark.parametrize("kind", ["rsa", "ecc"])
def test_a_credential_for_another_key_or_another_tpm_stays_shut(tpm: Tpm, tmp_path: Path, kind: str) -> None:
    secret, random = bytes(range(32)), bytes(enrol.RANDOMNESS)
    other = SwTpm(tmp_path / "other")
    try:
        with Tpm(other.transport) as theirs, theirs.primary(ek_template(kind)) as key:
            foreign_ek = parse_public(key.public, where="ek")
    finally:
        other.stop()
    with ExitStack() as stack:
        ek, ak = (stack.enter_context(tpm.primary(each)) for each in (ek_template(kind), ak_template()))
        ours = parse_public(ek.public, where="ek")
        for made in (
            enrol.make_credential(ours, b"\x00\x0b" + bytes(32), secret, randomness=random),
            enrol.make_credential(foreign_ek, ak.name, secret, randomness=random),
        ):
            with pytest.raises(TpmError, match="ActivateCredential"):
                tpm.activate(ak, ek, *made)
        assert len(tpm.transient()) == 2


def test_nv_is_read_in_steps_and_certificates_are_cut(tpm: Tpm) -> None:
    certificate = b"\x30\x82" + (1400).to_bytes(2, "big") + bytes(range(250)) * 5 + bytes(150)
    assert len(certificate) == 1404
    define_nv(tpm, 0x01C10002, certificate + b"\xff" * 100)
    define_nv(tpm, 0x01500001, b"owner reads", attributes=0x20004 | 1 << 1)
    assert tpm.read_nv(0x01C10002) == certificate + b"\xff" * 100
    assert tpm.certificate(0x01C10002) == certificate
    assert tpm.read_nv(0x01500001) == b"owner reads"
    assert tpm.certificate(0x01500001) is None
    assert tpm.certificate(0x01C00002) is None
    with pytest.raises(TpmError, match="no such handle"):
        tpm.read_nv(0x01C00002)
    with pytest.raises(TpmError, match="no such handle"):
        tpm.persistent(0x81000003)


def test_a_persistent_key_quotes(tpm: Tpm) -> None:
    with tpm.primary(ak_template(), OWNER) as key:
        tpm.execute(EVICT, (OWNER, key.handle), struct.pack(">I", 0x81000003), sessions=(PASSWORD,))
    kept = tpm.persistent(0x81000003)
    assert kept.name == key.name
    assert tpm.quote(kept, NONCE, (Selection("sha256", (0,)),))


def test_random_bytes_are_the_tpms(tpm: Tpm) -> None:
    assert len(tpm.random(32)) == 32
    assert tpm.random(16) != tpm.random(16)


# --- what fails -------------------------------------------------------------------------------------------------------


def test_power_cuts_lock_nobody_out(tmp_path: Path) -> None:
    """Each stop without TPM2_Shutdown counts as a wrong password for keys without noDA; three would lock the host out."""
    machine = SwTpm(tmp_path / "cut")
    try:
        names = set()
        for _ in range(4):
            with Tpm(machine.transport) as tpm, tpm.primary(ak_template()) as key:
                tpm.quote(key, NONCE, (Selection("sha256", (0,)),))
                names.add(key.name)
            machine.restart()
        assert len(names) == 1
    finally:
        machine.stop()


def test_without_no_da_power_cuts_lock_the_key_out(tmp_path: Path) -> None:
    """Why the template has noDA: the same key without it is locked out by the same power cuts."""
    machine = SwTpm(tmp_path / "locked")
    template = bytearray(ak_template())
    template[4:8] = (0x50472 & ~(1 << 10)).to_bytes(4, "big")

    def cut() -> None:
        for _ in range(6):
            with Tpm(machine.transport) as tpm, tpm.primary(bytes(template)) as key:
                tpm.quote(key, NONCE, (Selection("sha256", (0,)),))
            machine.restart()

    try:
        with pytest.raises(TpmError, match="locked out"):
            cut()
    finally:
        machine.stop()


def test_the_connection_ends_in_the_middle(tmp_path: Path) -> None:
    machine = SwTpm(tmp_path / "gone")
    try:
        with Tpm(machine.transport) as tpm:
            with tpm.primary(ak_template()) as key:
                machine.stop(kill=True)
                with pytest.raises(MachineError, match="does not answer Quote"):
                    tpm.quote(key, NONCE, (Selection("sha256", (0,)),))
            with pytest.raises(MachineError, match="does not answer"):
                tpm.random(1)
    finally:
        machine.stop()


@pytest.mark.parametrize("rc", sorted(AGAIN))
def test_a_tpm_that_wants_it_again_gets_it_again(proxy: Proxy, tpm: Tpm, waits: list[float], rc: int) -> None:
    with tpm.primary(ak_template()) as key:
        proxy.answers = [refusal_of_tpm(rc)] * 3
        proxy.sent.clear()
        assert tpm.quote(key, NONCE, (Selection("sha256", (0,)),))
        assert proxy.sent == [QUOTE] * 4
        assert len(waits) == 3
        proxy.answers = [refusal_of_tpm(rc)] * TRIES
        with pytest.raises(TpmError) as caught:
            tpm.quote(key, NONCE, (Selection("sha256", (0,)),))
        assert caught.value.rc == rc
    assert sum(waits) < 10


@pytest.mark.parametrize("rc", [0x902, 0x921, 0x98E, 0x1DF, 0x2C4, 0x184, 0x101, 0xFFF, 0x12345678])
def test_a_refusal_is_explained_and_leaves_nothing(proxy: Proxy, tpm: Tpm, rc: int) -> None:
    def quote() -> None:
        with tpm.primary(ak_template()) as key:
            proxy.answers = [refusal_of_tpm(rc)]
            tpm.quote(key, NONCE, (Selection("sha256", (0,)),))

    with pytest.raises(TpmError, match="refuses Quote") as caught:
        quote()
    assert caught.value.rc == rc
    assert f"0x{rc:03x}" in caught.value.message
    assert proxy.sent[-1] == FLUSH_CONTEXT


def test_known_codes_have_words() -> None:
    assert explain(0x921).startswith("the TPM is locked out")
    assert explain(0x1DF) == "an integrity check failed, parameter 1"
    assert explain(0x18B) == "there is no such handle, handle 1"
    assert explain(0x99D) == "the policy does not hold, session 1"
    assert explain(0x101) == "the TPM is in failure mode"


def test_a_failed_session_is_flushed(proxy: Proxy, tpm: Tpm) -> None:
    """swtpm has three sessions: a fourth activation after three failures shows that none was left."""
    with ExitStack() as stack:
        ek, ak = (stack.enter_context(tpm.primary(each)) for each in (ek_template("ecc"), ak_template()))
        made = enrol.make_credential(
            parse_public(ek.public, where="ek"), ak.name, bytes(16), randomness=bytes(enrol.RANDOMNESS)
        )
        for fault in (2, 3):
            for _ in range(4):
                proxy.answers = [*[None] * (fault - 1), refusal_of_tpm(0x921)]
                with pytest.raises(TpmError):
                    tpm.activate(ak, ek, *made)
        assert tpm.activate(ak, ek, *made) == bytes(16)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x80\x01",
        struct.pack(">HII", 0x8001, 11, 0),
        struct.pack(">HII", 0x8001, 10, 0),
        struct.pack(">HII", 0x8002, 10, 0),
        struct.pack(">HII", 0x00C4, 10, 0x1E),
        struct.pack(">HIIII", 0x8002, 18, 0, 0x80000000, 0xFFFFFFFF),
        struct.pack(">HII", 0x8001, 5000, 0) + bytes(4990),
        OSError("gone"),
        ConnectionResetError(104, "reset"),
    ],
)
def test_an_answer_of_another_form_is_a_machine_error(proxy: Proxy, tpm: Tpm, answer: bytes | OSError) -> None:
    key = Key(0x80000000, ak_template(), b"")
    calls: tuple[Callable[[], object], ...] = (
        lambda: tpm.quote(key, NONCE, (Selection("sha256", (0,)),)),
        lambda: tpm.read_pcrs("sha256", (0,)),
        lambda: tpm.read_nv(0x01C00002),
        lambda: tpm.persistent(0x81000003),
        lambda: tpm.random(4),
        lambda: tpm.primary(ak_template()).__enter__(),
    )
    for call in calls:
        proxy.answers = [answer]
        with pytest.raises(MachineError):
            call()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_answer_is_a_machine_error_or_an_answer(proxy: Proxy, data: st.DataObject) -> None:
    """Cut, changed or extended answers of a real TPM: nothing else is raised, and nothing is allocated by their lengths."""

    def damage(real: bytes) -> bytes:
        raw = bytearray(real[: data.draw(st.integers(0, len(real)))] if data.draw(st.booleans()) else real)
        for _ in range(data.draw(st.integers(0, 4))):
            if raw:
                raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        if len(raw) >= 6 and data.draw(st.booleans()):
            raw[2:6] = len(raw).to_bytes(4, "big")
        return bytes(raw)

    tpm = Tpm(lambda: proxy, wait=lambda _: None)
    calls: tuple[Callable[[], object], ...] = (
        lambda: tpm.read_pcrs("sha256", (0, 7, 15)),
        lambda: tpm.read_nv(0x01C10002),
        lambda: tpm.persistent(0x81000003),
        lambda: tpm.transient(),
        lambda: tpm.random(8),
    )
    proxy.answers = [damage] * 3
    try:
        data.draw(st.sampled_from(calls))()
    except MachineError:
        pass
    finally:
        proxy.answers.clear()


def test_values_that_change_while_they_are_read_are_refused(proxy: Proxy, tpm: Tpm) -> None:
    def later(real: bytes) -> bytes:
        return real[:10] + (int.from_bytes(real[10:14], "big") + 1).to_bytes(4, "big") + real[14:]

    proxy.answers = [None, later]
    with pytest.raises(MachineError, match="changed while"):
        tpm.read_pcrs("sha256", ALL)


def test_a_bank_that_the_tpm_has_not_is_named(tmp_path: Path, proxy: Proxy, tpm: Tpm) -> None:
    empty = struct.pack(">HIIII", 0x8001, 22, 0, 7, 0) + struct.pack(">I", 0)
    proxy.answers = [empty]
    with pytest.raises(MachineError, match="sha384 bank"):
        tpm.read_pcrs("sha384", (0,))


def test_a_huge_nv_index_is_not_read(proxy: Proxy, tpm: Tpm) -> None:
    public = struct.pack(">IHIHH", 0x01C00002, 0x0B, 1 << 18, 0, 0xFFFF)
    body = struct.pack(">H", len(public)) + public
    proxy.answers = [struct.pack(">HII", 0x8001, 10 + len(body), 0) + body]
    with pytest.raises(MachineError, match="65535 bytes"):
        tpm.read_nv(0x01C00002)


def test_a_tpm_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    ways: tuple[Callable[[], Transport], ...] = (
        lambda: DeviceTransport(tmp_path / "tpmrm0"),
        lambda: SocketTransport(tmp_path / "socket"),
    )
    for connect in ways:
        with pytest.raises(MachineError, match="cannot be opened") as caught:
            Tpm(connect)
        assert "tpmrm0" in caught.value.hint


def test_an_answer_with_a_huge_size_on_the_wire_is_not_waited_for(tmp_path: Path) -> None:
    import socket
    import threading

    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "s"))
    server.listen(1)

    def serve() -> None:
        with server, server.accept()[0] as peer:
            peer.recv(4096)
            peer.sendall(struct.pack(">HII", 0x8001, 0xFFFFFFFF, 0))

    thread = threading.Thread(target=serve)
    thread.start()
    with Tpm(lambda: SocketTransport(tmp_path / "s")) as tpm, pytest.raises(MachineError, match="4294967295 bytes"):
        tpm.random(1)
    thread.join()


def test_a_device_is_written_and_read_once_a_command(tmp_path: Path) -> None:
    """A file stands for the device: what is written is one command, and it is no answer."""
    (tmp_path / "tpmrm0").write_bytes(b"")
    with Tpm(lambda: DeviceTransport(tmp_path / "tpmrm0")) as tpm, pytest.raises(MachineError, match="0 bytes"):
        tpm.random(8)
    assert (tmp_path / "tpmrm0").read_bytes() == struct.pack(">HIIH", 0x8001, 12, tpmclient.GET_RANDOM, 8)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"\x30\x03abc\xff\xff", b"\x30\x03abc"),
        (b"\x30\x81\x03abc", b"\x30\x81\x03abc"),
        (b"\x30\x82\x00\x03abcd", b"\x30\x82\x00\x03abc"),
        (b"\x30\x84\x00\x00\x00\x01a", None),
        (b"\x30\x80abc", None),
        (b"\x30\x82\xff\xff", None),
        (b"\x31\x03abc", None),
        (b"\x30", None),
        (b"", None),
    ],
)
def test_certificates_are_cut_at_their_own_length(data: bytes, wanted: bytes | None) -> None:
    assert cut_der(data) == wanted


def test_templates_are_those_of_the_profile() -> None:
    assert [len(ek_template(kind)) for kind in ("rsa", "ecc")] == [314, 122]
    assert len(ak_template()) == 24
    with pytest.raises(ValueError, match="rsa or ecc"):
        ek_template("p384")
    assert (ENDORSEMENT, NULL) == (0x4000000B, 0x40000007)
