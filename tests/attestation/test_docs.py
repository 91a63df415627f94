"""docs/attestation.md and the pages of SGX and TDX say what the code does: known answers, sizes, limits, steps, rules."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest

from cloister.attestation import evidence as wire
from cloister.attestation.appraise import appraise
from cloister.attestation.binding import PURPOSES, Binding
from cloister.attestation.dcap.qvl import SENTENCES
from cloister.attestation.dcap.roots import INTEL_SGX_ROOT_CA
from cloister.attestation.sgx import format as sgx_format
from cloister.attestation.sgx import verify as sgx_verify
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.tdx import format as tdx_format
from cloister.attestation.tdx import verify as tdx_verify
from cloister.attestation.types import Claims, Software
from cloister.crypto.canonical import cbor_decode
from cloister.testkit.softtee import SoftPlatform, soft_claims, soft_policy, workload

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "attestation.md").read_text()
PAGES = DOCS / "attestation"


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


@pytest.mark.parametrize("verifier", [sgx_verify, tdx_verify], ids=["sgx", "tdx"])
def test_every_step_of_the_dcap_verifiers_has_a_row(verifier: ModuleType) -> None:
    kind = verifier.KIND
    page = (PAGES / f"{kind}.md").read_text()
    assert f"[attestation/{kind}.md](attestation/{kind}.md)" in PAGE
    steps = re.findall(rf"^\| `({kind}\.\d+-\w+)` \|", page, re.MULTILINE)
    assert steps == list(verifier.STEPS)
    assert [int(step.split(".")[1].split("-")[0]) for step in steps] == list(range(1, len(steps) + 1))
    named = re.findall(r"^ +(\d+) (\w+) ", verifier.__doc__ or "", re.MULTILINE)
    assert [f"{kind}.{number}-{name}" for number, name in named] == steps
    assert {step for _, step, *_ in SENTENCES} <= {step.split(".", 1)[1] for step in steps}


@pytest.mark.parametrize("form", [sgx_format, tdx_format], ids=["sgx", "tdx"])
def test_every_field_and_switch_has_its_place_on_the_page(form: ModuleType) -> None:
    page = (PAGES / f"{form.__name__.split('.')[-2]}.md").read_text()
    for name, (offset, _) in form.Quote.FIELDS.items():
        (row,) = re.findall(rf"^\|[^|]*`{name}`[^|]*\|([^|]*)\|", page, re.MULTILINE)[:1]
        assert str(offset) in row
    for name in form.ATTRIBUTES:
        assert f"`{name}`" in page


def test_the_pinned_root_is_on_the_page() -> None:
    assert INTEL_SGX_ROOT_CA in (PAGES / "tdx.md").read_text()


def test_rules_stand_in_the_order_of_the_page() -> None:
    section = _section("Appraisal")
    claims = replace(
        soft_claims(),
        kind="attested-host",
        debug=True,
        tcb_status="",
        tcb_date=None,
        advisories=("a",),
        platform={"ppid": "0a"},
        devices=(Claims("device", "nvidia-gpu", debug=False, tcb_status="NotRated", platform={"ueid": "1"}),),
    )
    policy = soft_policy(
        accept=frozenset({"tdx"}),
        min_tcb=(2026, 1),
        max_tcb_age=timedelta(days=1),
        min_svn={"tdx": {"x": 1}},
        deny_advisories=frozenset({"a"}),
        require={"tdx": {"x": True}},
        platform_allow=frozenset(),
        platform_deny=frozenset({("ppid", "0a")}),
        gpu="confidential",
        gpu_allow=frozenset(),
        boot=frozenset({"x"}),
        require_attested_boot=True,
        scheme="s",
        software=(Software("x", measurements={"mrtd": frozenset()}),),
    )
    named = {"min_svn.x": "min_svn.<name>", "require.x": "require.<name>", "software.x.mrtd": "software.<label>.<rule>"}
    rules = [reason.where.removeprefix("place.enclave.") for reason in appraise(claims, policy)]
    # (the TCB status is a rule of tee places only, and only they have it missing here)
    words = [named.get(rule, rule.removeprefix("gpu0.")) for rule in rules if rule != "tcb_status"]
    rows = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert [word for word in rows if word in words] == words
    assert set(rows) - set(words) == {"tcb_status"}


def test_the_marks_of_soft_evidence_are_on_the_page() -> None:
    section = _section("Soft TEE: what it does not protect")
    assert soft_tdx.FMSPC in section
    assert "protects nothing" in section
