"""Firmware event logs: three forms, padding, replay, and what a reader may believe. Real logs beside the repository."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.attestation.logs import tcg
from cloister.attestation.soft import tpm as soft
from tests.attestation.helpers import SHARED, refusal, value_or_malformed

VECTORS = SHARED / "vectors"
REAL = [
    path
    for path in (
        VECTORS / "tpm-own" / "uefi_bios.bin",
        *sorted((VECTORS / "attestation" / "tpm").glob("*eventlog*.bin")),
        *sorted((VECTORS / "attestation" / "dcap").glob("ccel*.bin")),
    )
    if path.exists()
]
with_vectors = pytest.mark.skipif(not REAL, reason="third-party vectors are not beside the repository")

SEPARATOR = bytes(4)


def parse(data: bytes) -> tcg.Log:
    return tcg.parse(data, where="log")


def event12(register: int, kind: int, data: bytes, digest: bytes | None = None) -> bytes:
    """One event of the TPM 1.2 form."""
    measured = hashlib.sha1(data).digest() if digest is None else digest
    return struct.pack("<II20sI", register, kind, measured, len(data)) + data


def agile(*events: bytes, algorithms: tuple[int, ...] = (0x0B,)) -> bytes:
    """A crypto-agile log of encoded events."""
    sizes = b"".join(struct.pack("<HH", each, tcg.SIZES[tcg.ALGORITHMS[each]]) for each in algorithms)
    header = b"Spec ID Event03\x00" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(algorithms)) + sizes + b"\x00"
    return event12(0, tcg.NO_ACTION, header, bytes(20)) + b"".join(events)


def event20(register: int, kind: int, data: bytes, measured: bytes | None = None, *, count: int = 1) -> bytes:
    digest = hashlib.sha256(data if measured is None else measured).digest()
    return struct.pack("<IIIH", register, kind, count, 0x0B) + digest + struct.pack("<I", len(data)) + data


def extended(*digests: bytes, start: bytes = bytes(32)) -> bytes:
    for digest in digests:
        start = hashlib.sha256(start + digest).digest()
    return start


# --- forms ------------------------------------------------------------------------------------------------------------


def test_the_crypto_agile_form() -> None:
    log = parse(agile(event20(7, 4, SEPARATOR), event20(7, 5, b"go")))
    assert log.algorithms == ("sha256",)
    assert [(entry.register, entry.type, entry.data) for entry in log.entries] == [(7, 4, SEPARATOR), (7, 5, b"go")]
    wanted = extended(hashlib.sha256(SEPARATOR).digest(), hashlib.sha256(b"go").digest())
    assert tcg.replay(log, "sha256") == {7: wanted}


def test_the_tpm_12_form_has_sha1_only() -> None:
    log = parse(event12(4, 4, SEPARATOR) + event12(4, 5, b"go"))
    assert log.algorithms == ("sha1",)
    assert len(log.entries) == 2
    first = hashlib.sha1(bytes(20) + hashlib.sha1(SEPARATOR).digest()).digest()
    assert tcg.replay(log, "sha1") == {4: hashlib.sha1(first + hashlib.sha1(b"go").digest()).digest()}
    assert refusal(tcg.replay, log, "sha256").code == "evidence-malformed"
    assert refusal(tcg.events, log, "sha256").code == "evidence-malformed"


@pytest.mark.parametrize("padding", [b"", b"\xff" * 3, b"\xff" * 4096, b"\x00" * 3, b"\x00" * 4096])
def test_padding_of_tables_and_buffers(padding: bytes) -> None:
    data = agile(event20(1, 4, SEPARATOR))
    assert parse(data + padding) == parse(data)
    old = event12(4, 5, b"go")
    assert parse(old + padding) == parse(old)


def test_an_event_that_ends_like_padding_is_whole() -> None:
    for data in (b"\x00" * 40, b"\xff" * 40):
        log = parse(agile(event20(1, 4, data)) + data)
        assert log.entries[0].data == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 100,
        b"\xff" * 100,
        agile(),
        agile() + b"\xff" * 64,
        b"no log at all",
        agile(event20(1, 4, SEPARATOR)) + b"\xff" * 8 + b"x",
        agile(event20(1, 4, SEPARATOR)) + b"\x00" * 8 + b"x",
        agile(event20(24, 4, SEPARATOR)),
        agile(event20(1, 4, SEPARATOR, count=0)),
        agile(event20(1, 4, SEPARATOR, count=2)),
        agile(event20(1, 4, SEPARATOR, count=0xFFFFFFFF)),
        agile(event20(1, 4, SEPARATOR), algorithms=(0x0B, 0x0C)),
        agile(event20(1, 4, SEPARATOR), algorithms=(0x0C,)),
        agile(event20(1, 4, SEPARATOR), algorithms=(0x0B, 0x0B)),
        event12(0, 3, b"Spec ID Event03\x00", bytes(20)) + event20(1, 4, SEPARATOR),
        event12(0, 3, b"Spec ID Event03\x00" + bytes(8) + b"\xff\xff\xff\xff", bytes(20)) + event20(1, 4, SEPARATOR),
        event12(0, 3, b"StartupLocality\x00\x03", bytes(20)),
        struct.pack("<II20sI", 0, 4, bytes(20), 0xFFFFFFFF),
    ],
)
def test_what_is_no_log(data: bytes) -> None:
    error = refusal(parse, data)
    assert (error.code, error.reasons[0].where) == ("evidence-malformed", "log")


def test_a_huge_log_is_refused_before_it_is_read() -> None:
    assert refusal(parse, agile(event20(1, 4, SEPARATOR)) + bytes(tcg.LIMIT)).code == "evidence-malformed"
    many = event20(1, 4, b"") * (tcg.MOST_EVENTS + 1)
    assert refusal(parse, agile(many)).code == "evidence-malformed"


def test_an_algorithm_that_nobody_here_knows_is_carried() -> None:
    header = (
        b"Spec ID Event03\x00"
        + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, 2)
        + struct.pack("<HHHH", 0x27, 32, 0x0B, 32)
        + b"\x00"
    )
    digest = hashlib.sha256(SEPARATOR).digest()
    event = (
        struct.pack("<IIIH", 1, 4, 2, 0x27)
        + bytes(32)
        + struct.pack("<H", 0x0B)
        + digest
        + struct.pack("<I", 4)
        + SEPARATOR
    )
    log = parse(event12(0, 3, header, bytes(20)) + event)
    assert log.algorithms == ("0x0027", "sha256")
    assert tcg.replay(log, "sha256") == {1: extended(digest)}
    assert refusal(tcg.replay, log, "0x0027").code == "evidence-malformed"


# --- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locality", [0, 3, 4])
def test_startup_locality_is_the_first_value_of_pcr_0(locality: int) -> None:
    data = agile(
        event20(0, tcg.NO_ACTION, b"StartupLocality\x00" + bytes([locality])), event20(0, 8, b"v"), event20(1, 8, b"v")
    )
    digest = hashlib.sha256(b"v").digest()
    values = tcg.replay(parse(data), "sha256")
    assert values == {0: extended(digest, start=bytes(31) + bytes([locality])), 1: extended(digest)}


def test_startup_locality_after_the_first_extension_changes_nothing() -> None:
    late = agile(event20(0, 8, b"v"), event20(0, tcg.NO_ACTION, b"StartupLocality\x00\x03"))
    assert tcg.replay(parse(late), "sha256") == {0: extended(hashlib.sha256(b"v").digest())}


def test_no_action_extends_nothing_whatever_register_it_names() -> None:
    data = agile(event20(0xFFFFFFFF, tcg.NO_ACTION, b"x"), event20(3, tcg.NO_ACTION, b"x"), event20(2, 4, SEPARATOR))
    log = parse(data)
    assert set(tcg.replay(log, "sha256")) == {2}
    assert len(tcg.events(log, "sha256")) == 1


@pytest.mark.parametrize("register", [16, 17, 20, 22, 23])
def test_dynamic_registers_start_at_ff(register: int) -> None:
    first = b"\xff" * 32 if 17 <= register <= 22 else bytes(32)
    assert tcg.initial(register, "sha256") == first
    digest = hashlib.sha256(b"x").digest()
    assert tcg.replay(parse(agile(event20(register, 4, b"x"))), "sha256") == {register: extended(digest, start=first)}


# --- what a reader may believe ----------------------------------------------------------------------------------------


def variable(name: str, value: bytes) -> bytes:
    return bytes(16) + struct.pack("<QQ", len(name), len(value)) + name.encode("utf-16-le") + value


def read(kind: int, data: bytes, measured: bytes | None = None) -> Any:
    return tcg.events(parse(agile(event20(1, kind, data, measured))), "sha256")[0]


def test_data_is_given_only_where_it_hashes_to_the_digest() -> None:
    assert read(4, SEPARATOR).data == SEPARATOR
    assert read(4, SEPARATOR, b"something else").data is None
    assert read(0x80000008, b"where the firmware is", b"the firmware").data is None


def test_a_variable_may_be_measured_whole_or_by_its_value() -> None:
    data = variable("Boot0000", b"options")
    whole = read(0x80000002, data)
    assert (whole.type, whole.data, whole.label) == ("EV_EFI_VARIABLE_BOOT", data, "Boot0000")
    # the name was not measured: nobody may read it as if it were
    value = read(0x80000002, data, b"options")
    assert (value.data, value.label) == (b"options", "")
    other = read(0x80000002, data, b"others!")
    assert (other.data, other.label) == (None, "Boot0000")
    assert read(0x800000E0, data, b"options").data == b"options"  # shim


def test_grub_measures_a_command_without_its_prefix() -> None:
    event = read(0x0D, b"grub_cmd: linux /vmlinuz\x00", b"linux /vmlinuz")
    assert (event.type, event.data, event.label) == ("EV_IPL", b"linux /vmlinuz", "linux /vmlinuz")
    assert read(0x0D, b"grub_cmd: linux /vmlinuz\x00", b"linux /other").data is None
    assert read(0x0D, b"whole\x00", b"whole\x00").data == b"whole\x00"


def test_load_options_can_be_computed_and_are_not_in_the_log() -> None:
    text = "console=ttyS0 ima_policy=tcb"
    data = struct.pack("<II", 0x8F3B22ED, 26) + b"LOADED_IMAGE::LoadOptions\x00"
    event = read(6, data, tcg.load_options(text))
    assert (event.data, event.label) == (None, "LOADED_IMAGE::LoadOptions")
    assert event.digest == hashlib.sha256(text.encode("utf-16-le") + b"\x00\x00").digest()


def test_types_have_their_names() -> None:
    assert tcg.type_name(0x80000010) == "EV_EFI_HCRTM_EVENT"
    assert tcg.type_name(0x800000E0) == "EV_EFI_VARIABLE_AUTHORITY"
    assert tcg.type_name(0x12345678) == "EV_0x12345678"
    assert len(set(tcg.EVENT_TYPES.values())) == len(tcg.EVENT_TYPES)


def test_labels_are_short_and_print() -> None:
    long = read(5, b"x" * 1000)
    assert long.label == "x" * 128
    assert read(5, b"a\x1b[31mred").label == ""
    assert "\x1b" not in read(0x80000002, variable("a\x1b[31m", b"")).label


@given(st.binary(max_size=300))
def test_whatever_is_exposed_hashes_to_its_digest(data: bytes) -> None:
    for kind in (1, 6, 0x0D, 0x80000001, 0x80000002, 0x800000E0):
        for measured in (None, data[32:], data[8:], data[:5]):
            event = read(kind, data, measured)
            assert event.data is None or hashlib.sha256(event.data).digest() == event.digest


# --- hostile bytes ----------------------------------------------------------------------------------------------------

GOOD = soft.host().boot_log()


def test_every_truncation_is_refused_or_replays_otherwise() -> None:
    wanted = tcg.replay(parse(GOOD), "sha256")
    for end in range(len(GOOD)):
        log = value_or_malformed(lambda end=end: parse(GOOD[:end]))  # type: ignore[misc]
        assert log is None or tcg.replay(log, "sha256") != wanted


def test_a_flipped_byte_is_refused_replays_otherwise_or_is_not_exposed() -> None:
    """Attack: event data is not authenticated by the replay, so a flipped byte there still replays."""
    log = parse(GOOD)
    wanted, before = tcg.replay(log, "sha256"), tcg.events(log, "sha256")
    unnoticed = 0
    for position in range(len(GOOD)):
        changed = bytearray(GOOD)
        changed[position] ^= 0x20
        found = value_or_malformed(lambda data=bytes(changed): parse(data))  # type: ignore[misc]
        if found is None or "sha256" not in found.algorithms or tcg.replay(found, "sha256") != wanted:
            continue
        unnoticed += 1
        for event, old in zip(tcg.events(found, "sha256"), before, strict=True):
            assert event.digest == old.digest
            assert event.data is None or event.data == old.data
    assert unnoticed > 100


@given(st.binary(max_size=400))
def test_any_bytes_are_a_log_or_malformed(data: bytes) -> None:
    for candidate in (data, GOOD[:65] + data, agile() + data):
        log = value_or_malformed(lambda candidate=candidate: parse(candidate))  # type: ignore[misc]
        if log is not None:
            for bank in set(log.algorithms) & tcg.HASHES:
                tcg.replay(log, bank)
                tcg.events(log, bank)


@given(st.integers(0, len(GOOD) - 4), st.sampled_from([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x00010000]))
def test_huge_lengths_cost_nothing(position: int, number: int) -> None:
    changed = GOOD[:position] + struct.pack("<I", number) + GOOD[position + 4 :]
    value_or_malformed(lambda: parse(changed))


def test_missing_exchanged_added_and_changed_events_replay_otherwise() -> None:
    host = soft.host()
    wanted = tcg.replay(parse(host.boot_log()), "sha256")
    steps = host.steps
    others = (
        steps[1:],
        steps[:-1],
        (steps[1], steps[0], *steps[2:]),
        (*steps, soft.Step(4, "EV_EFI_ACTION", b"one more")),
        (*steps[:2], soft.Step(7, "EV_EFI_VARIABLE_DRIVER_CONFIG", b"another"), *steps[3:]),
    )
    for other in others:
        assert tcg.replay(parse(soft.Host(other).boot_log()), "sha256") != wanted


def test_time_is_linear_in_a_log_full_of_almost_padding() -> None:
    started = time.process_time()
    parse(agile(event20(0, 0, b"") * 10_000) + b"\x00" * 1_000_000)
    assert time.process_time() - started < 2


# --- real logs --------------------------------------------------------------------------------------------------------


@with_vectors
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_logs(path: Path) -> None:
    data = path.read_bytes()
    log = parse(data)
    for bank in log.algorithms:
        for event in tcg.events(log, bank):
            assert event.data is None or hashlib.new(bank, event.data).digest() == event.digest
    if not data.endswith((b"\x00", b"\xff")):  # a log that stops inside an event is refused
        for cut in (1, 3, 7):
            assert refusal(parse, data[:-cut]).code == "evidence-malformed"


@with_vectors
def test_own_boot_log_as_its_readme_states_it() -> None:
    folder = VECTORS / "tpm-own"
    log = parse((folder / "uefi_bios.bin").read_bytes())
    assert (len(log.entries), log.algorithms) == (24, ("sha1", "sha256"))
    quoted = {
        int(index): base64.b64decode(value)
        for index, value in json.loads((folder / "quote.json").read_text())["pcrs"].items()
    }
    values = tcg.replay(log, "sha256")
    assert set(values) == {0, 1, 2, 3, 4, 5, 6, 7, 9}
    assert all(values[index] == quoted[index] for index in values)
    assert quoted[8] == quoted[14] == bytes(32)
    entries = log.entries
    # 4 events whose data is not what was hashed (firmware blobs and images state addresses, so they are none either)
    differing = [
        index for index, entry in enumerate(entries) if hashlib.sha256(entry.data).digest() != entry.digests["sha256"]
    ]
    assert differing == [1, 2, 9, 10, 11, 20, 21]
    assert [(entries[index].register, tcg.type_name(entries[index].type)) for index in (10, 11, 20, 21)] == [
        (1, "EV_EFI_VARIABLE_BOOT"),
        (1, "EV_EFI_VARIABLE_BOOT"),
        (9, "EV_EVENT_TAG"),
        (9, "EV_EVENT_TAG"),
    ]
    command_line = (
        "console=ttyS0 panic=-1 loglevel=4 tsc=reliable no_timer_check random.trust_cpu=on perun.root=1 ima_policy=tcb"
        "  initrd=initrd"
    )
    events = tcg.events(log, "sha256")
    assert events[20].digest == hashlib.sha256(tcg.load_options(command_line)).digest()
    assert (events[20].label, events[21].label) == ("LOADED_IMAGE::LoadOptions", "Linux initrd")
    assert [events[index].data is None for index in (10, 11, 20, 21)] == [False, False, True, True]


@with_vectors
@pytest.mark.parametrize("bank", ["sha1", "sha256", "sha384"])
def test_a_real_cloud_machine_in_all_banks(bank: str) -> None:
    folder = VECTORS / "attestation" / "tpm"
    quoted = json.loads((folder / "gce-cos-85-no-nonce" / f"quote-{bank}.json").read_text())["pcrs"]
    values = tcg.replay(parse((folder / "gce-cos-85-eventlog.bin").read_bytes()), bank)
    assert set(range(10)) <= set(values)
    assert all(value.hex() == quoted[str(index)] for index, value in values.items())
