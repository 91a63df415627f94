"""docs/attestation.md says what the code does: known answers, sizes, limits, steps, rules."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from cloister.attestation import evidence as wire
from cloister.attestation.appraise import appraise
from cloister.attestation.binding import PURPOSES, Binding
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.tdx import format as tdx_format
from cloister.attestation.tdx import verify as tdx_verify
from cloister.attestation.tdx.roots import INTEL_SGX_ROOT_CA
from cloister.crypto.canonical import cbor_decode
from cloister.testkit.softtee import SoftPlatform, soft_claims, soft_policy, workload

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "attestation.md").read_text()


def _section(title: str) -> str:
    return PAGE.split(f"\n## {title}", 1)[1].split("\n## ", 1)[0]


def test_known_answers_of_the_binding() -> None:
    bound = Binding("broker", b"\x01" * 32, b"\x02\x03")
    section = _section("The binding")
    assert f"report_data      {bound.report_data().hex()}" in section
    assert f"qualifying_data  {bound.qualifying_data().hex()}" in section
    assert f"the encoding has {len(bound.encode())} bytes" in section
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert rows == list(cbor_decode(bound.encode().split(b"\x00", 1)[1]))
    assert all(f"`{purpose}`" in section for purpose in PURPOSES)


def test_limits_and_sizes_of_the_wire_format() -> None:
    section = _section("Evidence on the wire")
    for number in (wire.LIMITS.total, wire.LIMITS.quote, wire.LIMITS.event_data):
        assert f"{number:,}" in section
    assert f"{wire.LIMITS.events} events" in section
    assert f"1 to {wire.LIMITS.event_name}" in section
    evidence = SoftPlatform().run(workload()).evidence()
    assert f"a quote of {len(evidence.quote):,} bytes, {len(wire.encode(evidence)):,} on the wire" in section


def test_every_step_of_the_tdx_verifier_has_a_row() -> None:
    section = _section("TDX")
    steps = re.findall(r"^\| `(tdx\.\d+-\w+)` \|", section, re.MULTILINE)
    assert [int(step.split(".")[1].split("-")[0]) for step in steps] == list(range(1, 11))
    assert {where for _, where, *_ in tdx_verify._STEPS} <= set(steps)
    module = tdx_verify.__doc__ or ""
    named = re.findall(r"^ +(\d+) (\w+) ", module, re.MULTILINE)
    assert [f"tdx.{number}-{name}" for number, name in named] == steps
    assert INTEL_SGX_ROOT_CA in section
    for name in (*tdx_format.FIELDS, *tdx_format.FIELDS_15):
        assert f"`{name}`" in section or name in {"rtmr1", "rtmr2"}


def test_rules_stand_in_the_order_of_the_page() -> None:
    section = _section("Appraisal")
    claims = replace(
        soft_claims(),
        kind="attested-host",
        debug=True,
        tcb_status="",
        tcb_date=None,
        advisories=("a",),
    )
    policy = soft_policy(
        accept=frozenset({"tdx"}),
        min_tcb=(2026, 1),
        deny_advisories=frozenset({"a"}),
        gpu="confidential",
        boot=frozenset({"x"}),
        scheme="s",
    )
    rules = [reason.where.rsplit(".", 1)[1] for reason in appraise(claims, policy)]
    places = [section.index(f"`{rule}`") for rule in rules]
    assert len(rules) == 9
    assert places == sorted(places)


def test_the_marks_of_soft_evidence_are_on_the_page() -> None:
    section = _section("Soft TEE: what it does not protect")
    assert soft_tdx.FMSPC in section
    assert "protects nothing" in section
