"""Who can read, who could change, and what the lint says."""

from __future__ import annotations

import pytest

from cloister.contract import analyse
from cloister.contract.analyse import Note, changers_text, lint, readers, readers_text
from tests.contract.samples import NAMES, changed, example

XRAY, BANKS, ACME = NAMES


def test_readers_of_the_x_rays() -> None:
    assert readers_text(example(XRAY), "xrays").splitlines() == [
        "xrays -> hospital: it, as its owner",
        (
            "xrays [train] -> code 'trainer' at gpu-host, offline: in full, inside"
            " | whoever controls the measured OS of gpu-host: in full"
            " | hospital: detector, as its owner | hospital: training metrics"
        ),
        (
            "xrays [train] -> detector [serve] -> code 'server' at enclave, one-shot: in full, inside"
            " | clinic: labels, 2 000 a day"
        ),
    ]


def test_readers_of_a_stream_name_the_refresh_place_and_the_board() -> None:
    assert readers_text(example(BANKS), "north-new").splitlines() == [
        "north-new -> north: it, as its owner",
        (
            "north-new [refine] -> code 'refiner' at cipher (homomorphic, keys at enclave), offline: as ciphertext"
            " | enclave: decrypts it to refresh ciphertext (refiner)"
            " | board: fraud-net, when 3 of north, south, vendor, auditor agree"
        ),
        (
            "north-new [refine] -> fraud-net [refine] -> code 'refiner' at cipher (homomorphic, keys at enclave), offline:"
            " as ciphertext | enclave: decrypts it to refresh ciphertext (refiner)"
            " | board: fraud-net, when 3 of north, south, vendor, auditor agree"
        ),
        (
            "north-new [refine] -> fraud-net [serve] -> code 'scorer' at enclave, one-shot: in full, inside"
            " | north: scores with 2 decimals, 50 000 a day | south: scores with 2 decimals, 50 000 a day"
        ),
    ]


def test_readers_of_a_black_box_and_of_secret_code() -> None:
    contract = example(ACME)
    assert not any(reader.kind in ("owner", "output") for reader in readers(contract, "model"))
    assert readers_text(contract, "automl").splitlines() == [
        "automl -> acme: it, as its owner",
        "automl [train] -> code 'automl' at enclave, sealed: runs it, inside",
    ]
    (answers,) = [reader for reader in readers(contract, "records") if reader.kind == "answers"]
    assert answers.path == (("records", "train"), ("model", "serve"))
    assert answers.what == "labels, 100 000 in total, 5 000 a day, padded to 1 KiB, one every 50ms"


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (", per_day = 2_000", "labels, UNLIMITED"),
        ("per_day = 2_000", "labels, 7 in total"),
    ],
)
def test_unlimited_means_neither_limit(limits: str, words: str) -> None:
    contract = changed(XRAY, (limits, "" if "UNLIMITED" in words else "budget = 7"))
    assert words in readers_text(contract, "detector")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            '["tdx", "sev-snp", "sgx"]',
            '["simulated"]',
            "whoever runs a machine as enclave: in full, because a soft TEE",
        ),
        ('kind = "tee",', 'kind = "tee", debug = true,', "whoever debugs enclave: in full"),
        ('sandbox = "one-shot"', 'sandbox = "none"', "anyone: whatever server sends out: it has no sandbox"),
        ('metrics_to = ["hospital"]', 'metrics_to = ["clinic"]\nleaves = ["logs"]', "clinic: training logs"),
    ],
)
def test_every_way_out_is_a_reader(old: str, new: str, words: str) -> None:
    before, after = example(XRAY), changed(XRAY, (old, new))
    assert words not in readers_text(before, "xrays")
    assert words in readers_text(after, "xrays")


def test_leaves_replaces_the_default_of_metrics() -> None:
    both = changed(XRAY, ('metrics_to = ["hospital"]', 'metrics_to = ["hospital"]\nleaves = ["metrics", "logs"]'))
    assert both.phase["train"].streams_out == ("metrics", "logs")
    assert example(XRAY).phase["train"].streams_out == ("metrics",)
    assert example(ACME).phase["train"].streams_out == ()


def test_changers_of_the_model() -> None:
    board = "board (3 of north, south, vendor, auditor, veto north, south, after 72h)"
    again = "before the owners sign again; the same owner, sandbox, phase"
    assert changers_text(example(BANKS), "fraud-net").splitlines() == [
        "fraud-net <- trainer: writes it in train at enclave, offline",
        "fraud-net <- north: owns north-tx, which feeds train",
        "fraud-net <- south: owns south-tx, which feeds train",
        "fraud-net <- refiner: writes it in refine at cipher (homomorphic, keys at enclave), offline",
        "fraud-net <- north: owns north-new, which feeds refine",
        f"fraud-net <- {board}: may replace refiner, which reads it, {again}",
        f"fraud-net <- {board}: may replace scorer, which reads it, {again}",
        f"fraud-net <- {board}: agree to new code",
        "fraud-net <- north and south: agree to a new version",
        "fraud-net <- auditor and north and south and vendor: must sign a new version before it moves any key",
    ]


def test_changers_of_data_and_streams() -> None:
    assert changers_text(example(BANKS), "north-tx").splitlines() == [
        "north-tx <- north: owns it; the contract names its digest",
        "north-tx <- north and south: agree to a new version",
        "north-tx <- auditor and north and south and vendor: must sign a new version before it moves any key",
    ]
    assert "north-new <- north: may append records" in changers_text(example(BANKS), "north-new")


def test_an_unknown_asset_is_a_callers_mistake() -> None:
    for question in (readers, analyse.changers):
        with pytest.raises(ValueError, match="no asset 'scans'"):
            question(example(XRAY), "scans")


SNP = "place.enclave.min_tcb: sev-snp has no TCB dates: refused until min_svn sets a floor for it"
EXAMPLE_NOTES = {
    XRAY: [
        SNP,
        "phase.train: whoever controls the measured OS of gpu-host is trusted with xrays, backbone",
        "phase.serve.answer: no total budget, only 2 000 a day until 2027-06-30",
    ],
    BANKS: [
        "party.auditor: no key has this fingerprint: its last letter is impossible",
        SNP,
        "phase.refine: enclave holds the decryption keys of north-new, fraud-net",
        "phase.serve.answer: no total budget, only 50 000 a day until 2027-12-31",
    ],
    ACME: [SNP],
}


@pytest.mark.parametrize("name", NAMES)
def test_notes_of_the_examples(name: str) -> None:
    assert [str(note) for note in lint(example(name))] == EXAMPLE_NOTES[name]


# example, what is replaced, by what, a note that appears, is it a warning
NOTES = [
    (XRAY, ", per_day = 2_000", "", "phase.serve.answer: no budget: the model can be copied through answers", True),
    (XRAY, 'metrics_to = ["hospital"]', 'metrics_to = ["vendor"]', "phase.train.metrics_to: vendor wrote trainer", True),
    (XRAY, 'metrics_to = ["hospital"]', 'metrics_to = ["hospital"]\nleaves = ["logs"]', "phase.train.leaves: logs hold", True),
    (XRAY, 'sandbox = "offline"', 'sandbox = "none"', "phase.train: trainer has no sandbox: it can send out xrays", True),
    (XRAY, '["tdx", "sev-snp", "sgx"]', '["simulated"]', "place.enclave.accept: simulated", True),
    (XRAY, 'kind = "tee",', 'kind = "tee", debug = true,', "place.enclave.debug", True),
    (XRAY, ', min_tcb = "2026-08"', "", "place.enclave.min_tcb: not set", False),
    (XRAY, ', files = "signed-by:vendor"', "", "place.gpu-host.files: not set", False),
    (XRAY, "[place]", f'spare = {{ owner = "clinic", digest = "sha256:{"0" * 64}" }}\n[place]', "data.spare: no phase reads", False),
    (XRAY, "[data] ", f'spare = {{ owner = "vendor", digest = "sha256:{"0" * 64}" }}\n[data] ', "code.spare: no phase runs", False),
    (XRAY, "[phase.train] ", 'spare = { kind = "tee", accept = ["sgx"] }\n[phase.train] ', "place.spare: no phase is there", False),
    (XRAY, 'answer = { to = ["clinic"], form = "label", per_day = 2_000 }', "", "phase.serve: nothing comes out", True),
    (XRAY, 'write = { detector = "hospital" }', 'write = { detector = "hospital", x = "nobody" }', "phase.write.x: owned by nobody", True),
    (XRAY, 'write = { detector = "hospital" }', 'write = { detector = "hospital", xrays = "hospital" }', "phase.train.write.xrays: overwrites", False),
    (BANKS, ', veto = ["north", "south"]', "", "board.board: board can open fraud-net, made from south-tx of south, who can be outvoted", True),
    (BANKS, '"south", "vendor", "auditor"], need = 3, veto = ["north", "south"]', '"vendor", "auditor"], need = 3', "made from south-tx of south, who is not on it", True),
    (BANKS, ', veto = ["north", "south"]', "", "change.successor.keeps: north owns north-new, but new code may get it", True),
    (ACME, ', pad = "1 KiB"', "", None, False),
    (ACME, "per_day = 5_000", "per_day = 100_000", "phase.serve.answer.per_day: never reached", False),
    (ACME, 'sandbox = "one-shot" }', 'sandbox = "sealed" }', None, False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "words", "warning"), NOTES)
def test_one_change_brings_its_note(name: str, old: str, new: str, words: str | None, warning: bool) -> None:
    before, after = lint(example(name)), lint(changed(name, (old, new)))
    if words is None:  # controls: padding and sealing alone are no matter
        assert after == before
        return
    new_notes: list[Note] = [note for note in after if note not in before]
    match = [note for note in new_notes if words in str(note)]
    assert match, [str(note) for note in new_notes]
    assert match[0].warning is warning
    assert [note.warning for note in after] == sorted((note.warning for note in after), reverse=True)


def test_sealed_answers_without_padding_are_a_warning() -> None:
    sealed = ('sandbox = "one-shot" }\n[data]', 'sandbox = "sealed" }\n[data]')
    notes = lint(changed(ACME, sealed, (', pad = "1 KiB"', "")))
    assert [str(note) for note in notes if note.warning] == [
        "phase.serve.answer.pad: not set: query is sealed, but the size of its answers is free"
    ]


def test_summary_is_what_check_prints() -> None:
    clean = changed(ACME, ('min_tcb = "2026-08"', 'min_tcb = "2026-08", min_svn = { sev-snp = { snp = 22 } }'))
    assert analyse.summary(clean) == "acme-automl version 1: ok, no notes; must sign: acme, customer"
    assert analyse.summary(example(XRAY)).splitlines()[0] == (
        "pneumonia-xray version 1: ok, 3 notes; must sign: hospital, vendor"
    )


@pytest.mark.parametrize("name", NAMES)
def test_explain_says_it_all(name: str) -> None:
    contract = example(name)
    text = analyse.explain(contract)
    assert contract.id in text
    for asset in analyse.assets(contract):
        for line in readers_text(contract, asset).splitlines():
            assert line in text
    for note in lint(contract):
        assert str(note) in text
    for phase in contract.phase.values():
        assert phase.run in text
    assert text.isascii()
