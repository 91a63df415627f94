"""A plan finds the operator's slips before anything is touched, all of them together."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.contract.model import Contract
from cloister.contract.parse import parse
from cloister.errors import InputError
from cloister.node.plan import DEFAULT_OUTPUT_BYTES, plan

KEYS = ["SHA256:" + letter * 42 + "A" for letter in "ABC"]
TEXT = f"""
contract = "scans"
version = 1
expires = 2030-01-01
[party]
hospital = "{KEYS[0]}"
vendor = "{KEYS[1]}"
clinic = "{KEYS[2]}"
[code]
trainer = {{ owner = "vendor", digest = "sha256:{"1" * 64}" }}
server = {{ owner = "vendor", digest = "sha256:{"2" * 64}", sandbox = "one-shot" }}
[data]
xrays = {{ owner = "hospital", digest = "sha256:{"3" * 64}" }}
[place]
enclave = {{ kind = "tee", accept = ["simulated"] }}
[phase.train]
run = "trainer"
at = "enclave"
read = ["xrays"]
write = {{ detector = "hospital" }}
[phase.serve]
run = "server"
at = "enclave"
read = ["detector"]
answer = {{ to = ["clinic"], form = "label", budget = 9 }}
[change]
default = ["hospital", "vendor"]
"""
XRAYS, DETECTOR = Path("/volumes/xrays"), Path("/volumes/detector")


def contract(*changes: tuple[str, str]) -> Contract:
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return parse(text.encode(), name="scans.toml")


def test_a_plan_says_what_will_run() -> None:
    made = plan(contract(), "train", data={"xrays": XRAYS}, out={"detector": DETECTOR})
    assert (made.code, made.digest, made.sandbox) == ("trainer", "sha256:" + "1" * 64, "offline")
    assert made.sizes == {"detector": DEFAULT_OUTPUT_BYTES}


def test_the_contracts_size_is_the_limit() -> None:
    sized = contract(
        ('write = { detector = "hospital" }', 'write = { detector = "hospital" }\nsize = { detector = "1 MiB" }')
    )
    assert plan(sized, "train", data={"xrays": XRAYS}, out={"detector": DETECTOR}).sizes == {"detector": 1 << 20}


HE = '\ncipher = { kind = "he", scheme = "ckks-128", refresh = "enclave" }\n[phase.train]'


@pytest.mark.parametrize(
    ("changes", "phase", "data", "out", "where"),
    [
        ((), "trian", {}, {}, ["phase"]),
        ((), "train", {}, {"detector": DETECTOR}, ["phase.train.read"]),
        ((), "train", {"xrays": XRAYS}, {}, ["phase.train.write"]),
        ((), "train", {"xray": XRAYS}, {"detector": DETECTOR}, ["phase.train.read", "--data"]),
        ((), "train", {"xrays": XRAYS, "detector": DETECTOR}, {"detector": DETECTOR}, ["--data"]),
        ((), "train", {"xrays": XRAYS}, {"detector": XRAYS}, [str(XRAYS)]),
        ((), "train", {"xrays": XRAYS}, {"detector": DETECTOR, "logs": Path("/l")}, ["--out"]),
        (
            (("\n[phase.train]", HE), ('at = "enclave"', 'at = "cipher"')),
            "train",
            {"xrays": XRAYS},
            {"detector": DETECTOR},
            ["phase.train.at"],
        ),
        (
            (('at = "enclave"', 'at = "enclave"\nworkers = 2'),),
            "train",
            {"xrays": XRAYS},
            {"detector": DETECTOR},
            ["phase.train.workers"],
        ),
        (
            (
                ('" }\nserver', '", sandbox = "sealed", secret = true }\nserver'),
                (
                    'write = { detector = "hospital" }',
                    'write = { detector = "hospital" }\nsize = { detector = "1 MiB" }',
                ),
            ),
            "train",
            {"xrays": XRAYS},
            {"detector": DETECTOR},
            ["code.trainer.secret", "code.trainer.sandbox"],
        ),
    ],
    ids=[
        "phase",
        "input missing",
        "output missing",
        "typo",
        "surplus input",
        "clash",
        "surplus output",
        "he",
        "workers",
        "sealed",
    ],
)
def test_every_slip_is_found(changes, phase, data, out, where) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError) as caught:
        plan(contract(*changes), phase, data=data, out=out)
    assert [reason.where for reason in caught.value.reasons] == where


def test_a_typo_gets_a_suggestion() -> None:
    with pytest.raises(InputError) as caught:
        plan(contract(), "train", data={"xray": XRAYS}, out={"detector": DETECTOR})
    assert any("did you mean 'xrays'?" in reason.hint for reason in caught.value.reasons)
