"""What a place of kind `tee` may demand: the whole language of it compiles, decides, differs and explains itself."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import date, timedelta
from typing import Any

import pytest

from cloister.attestation.appraise import appraise
from cloister.attestation.types import IDENTITIES, BootEvent, Claims, LogRule, Policy
from cloister.contract import Contract, Request, State, compile_place, decide, parse
from cloister.contract.analyse import explain, lint, place_text
from cloister.contract.change import diff, subjects
from cloister.contract.model import PLATFORM
from cloister.errors import InputError
from tests.contract.samples import GPU, NAMES, TODAY, changed, edited

XRAY = NAMES[0]
OLD = 'enclave  = { kind = "tee", accept = ["tdx", "sev-snp", "sgx"], min_tcb = "2026-08" }\n'
CHIP, PPID, MRTD = "ab" * 64, "0a" * 16, "11" * 48
PLACE = f"""
[place.enclave]
kind            = "tee"
accept          = ["tdx", "sev-snp", "sgx", "azure-snp"]
min_tcb         = "2026-08"
tcb             = ["UpToDate", "NotRated"]
max_tcb_age     = "365d"
deny_advisories = ["INTEL-SA-00837"]
min_svn         = {{ sev-snp = {{ snp = 22, microcode = 200 }}, tdx = {{ tcb_evaluation_data_number = 18 }} }}
require         = {{ sev-snp = {{ smt = false }}, tdx = {{ sept_ve_disable = true }} }}
platforms       = {{ allow = ["ppid:{PPID}", "chip_id:{CHIP}"], deny = ["csp_id:CN=cc-us-east-2.amazonaws.com"] }}
gpu             = "confidential"
gpus            = {{ allow = ["ueid:a1"] }}

[[place.enclave.software]]
label        = "node-7"
tee          = "tdx"
measurements = {{ mrtd = ["{MRTD}"], rtmr1 = ["{"22" * 48}", "{"33" * 48}"] }}
log          = [{{ index = 2, digests = ["{"44" * 48}"], only = true }}]

[[place.enclave.software]]
label       = "node-7-sgx"
measurements = {{ mrsigner = ["{"55" * 32}"] }}
svns_equal  = {{ isvprodid = 7 }}
svns_least  = {{ isvsvn = 3 }}
"""
CLAIMS = Claims(
    kind="tee",
    tee="tdx",
    debug=False,
    tcb_status="UpToDate",
    tcb_date=date(2026, 8, 12),
    measurements={"mrtd": b"\x11" * 48, "rtmr1": b"\x33" * 48},
    svns={"tcb_evaluation_data_number": 18},
    attributes={"sept_ve_disable": True},
    platform={"ppid": PPID},
    boot_log=(BootEvent(2, "EV_IPL", b"\x44" * 48),),
    gpu="confidential",
    devices=(GPU,),
)


def with_place(text: str = PLACE, *replacements: tuple[str, str]) -> bytes:
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    data = edited(XRAY, (OLD, ""))
    head, separator, tail = data.partition(b"[phase.train]")
    return head + text.encode() + separator + tail


def contract(*replacements: tuple[str, str]) -> Contract:
    return parse(with_place(PLACE, *replacements), name="places.toml")


def wheres(claims: Claims, today: date = TODAY) -> list[str]:
    one = contract()
    request = Request("serve", "read", "detector", one.code["server"].digest, "one-shot", claims, today=today)
    return [reason.where for reason in decide(one, request, State(signed=one.signers)).reasons]


def test_everything_compiles_into_the_one_policy() -> None:
    policy = compile_place(contract(), "enclave")
    assert policy == replace(
        policy,
        where="place.enclave",
        kind="tee",
        accept=frozenset({"tdx", "sev-snp", "sgx", "azure-snp"}),
        min_tcb=(2026, 8),
        tcb_statuses=frozenset({"UpToDate", "NotRated"}),
        max_tcb_age=timedelta(days=365),
        deny_advisories=frozenset({"INTEL-SA-00837"}),
        min_svn={"sev-snp": {"snp": 22, "microcode": 200}, "tdx": {"tcb_evaluation_data_number": 18}},
        require={"sev-snp": {"smt": False}, "tdx": {"sept_ve_disable": True}},
        platform_allow=frozenset({("ppid", PPID), ("chip_id", CHIP)}),
        platform_deny=frozenset({("csp_id", "CN=cc-us-east-2.amazonaws.com")}),
        gpu="confidential",
        gpu_allow=frozenset({("ueid", "a1")}),
    )
    tdx, sgx = policy.software
    assert (tdx.label, tdx.tee, tdx.measurements["rtmr1"]) == ("node-7", "tdx", frozenset({b"\x22" * 48, b"\x33" * 48}))
    assert tdx.log == (LogRule(2, frozenset({b"\x44" * 48}), only=True),)
    assert (sgx.tee, dict(sgx.svns_equal), dict(sgx.svns_least)) == ("", {"isvprodid": 7}, {"isvsvn": 3})


def test_every_key_of_a_place_reaches_the_policy() -> None:
    """Whatever the language knows and the compiler forgot would be a rule that nobody keeps."""
    plain = Policy("place.enclave", "tee")
    compiled = compile_place(contract(("gpu             ", "debug = true\ngpu             ")), "enclave")
    same = {name for name in Policy.__dataclass_fields__ if getattr(plain, name) == getattr(compiled, name)}
    # rules of hosts and of encryption, and what the broker adds
    assert same == {"where", "kind", "boot", "scheme", "reference_values", "require_attested_boot"}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({}, ""),
        ({"tcb_status": "SWHardeningNeeded"}, "tcb_status"),
        ({"tcb_date": date(2026, 8, 1), "advisories": ("INTEL-SA-00837",)}, "deny_advisories"),
        ({"svns": {"tcb_evaluation_data_number": 17}}, "min_svn.tcb_evaluation_data_number"),
        ({"attributes": {}}, "require.sept_ve_disable"),
        ({"platform": {"ppid": "0b" * 16}}, "platforms.allow"),
        ({"platform": {"ppid": PPID, "csp_id": "CN=cc-us-east-2.amazonaws.com"}}, "platforms.deny"),
        ({"devices": (replace(GPU, platform={"ueid": "a2"}),)}, "gpu0.gpus.allow"),
        ({"measurements": {"mrtd": b"\x11" * 48}}, "software.node-7.rtmr1"),
        ({"boot_log": (*CLAIMS.boot_log, BootEvent(2, "x", b"\x66" * 48))}, "software.node-7.log.2"),
    ],
)
def test_each_key_refuses_alone(change: dict[str, Any], where: str) -> None:
    assert wheres(replace(CLAIMS, **change)) == ([f"place.enclave.{where}"] if where else [])


def test_a_tcb_level_ages_with_the_day_of_the_decision() -> None:
    assert wheres(CLAIMS, date(2027, 6, 30)) == []
    long = replace(CLAIMS, tcb_date=date(2026, 8, 1))
    assert wheres(long, date(2027, 6, 30)) == []
    old = contract(('"365d"', '"30d"'))
    request = Request("serve", "read", "detector", old.code["server"].digest, "one-shot", CLAIMS, today=TODAY)
    decision = decide(old, request, State(signed=old.signers))
    assert [(reason.where, reason.wanted) for reason in decision.reasons] == [
        ("place.enclave.max_tcb_age", "a TCB level at most 30 days old")
    ]


def test_snp_meets_a_month_by_its_numbers() -> None:
    snp = replace(
        CLAIMS,
        tee="sev-snp",
        tcb_status="NotRated",
        tcb_date=None,
        svns={"snp": 22, "microcode": 213},
        attributes={"smt": False},
        platform={"chip_id": CHIP},
        measurements={"mrsigner": b"\x55" * 32},
    )
    assert [where for where in wheres(snp) if "software" not in where] == ["place.enclave.max_tcb_age"]
    assert "place.enclave.min_svn.snp" in wheres(replace(snp, svns={"snp": 21, "microcode": 213}))


def test_machines_of_a_host_may_be_listed() -> None:
    one = changed(
        XRAY,
        ('files = "signed-by:vendor"', f'files = "signed-by:vendor", platforms = {{ allow = ["ak:{"0c" * 34}"] }}'),
    )
    policy = compile_place(one, "gpu-host")
    assert (policy.kind, policy.platform_allow) == ("attested-host", frozenset({("ak", "0c" * 34)}))
    assert place_text(one, "gpu-host").endswith(f"files signed-by:vendor; only ak:{'0c' * 22}…")


def test_a_difference_names_the_build_and_the_place_decides() -> None:
    before = contract()
    after = contract((f'mrtd = ["{MRTD}"]', f'mrtd = ["{"99" * 48}"]'), ('"365d"', '"400d"'), ("snp = 22", "snp = 20"))
    assert [str(each) for each in diff(before, after)] == [
        "place.enclave.max_tcb_age: 8760h -> 9600h",
        "place.enclave.min_svn.sev-snp.snp: 22 -> 20",
        f"place.enclave.software.node-7.measurements.mrtd: {MRTD} -> {'99' * 48}",
    ]
    assert subjects(before, after) == ("place",)
    fewer = contract((PLACE[PLACE.index("[[place.enclave.software]]\nlabel       =") :], ""))
    assert {each.path.split(".")[3] for each in diff(before, fewer)} == {"node-7-sgx"}
    swapped = contract(('label        = "node-7"\n', 'label        = "node-8"\n'))
    assert all(each.path.startswith("place.enclave.software.node-") for each in diff(before, swapped))


def test_explain_says_what_a_place_wants() -> None:
    text = place_text(contract(), "enclave")
    assert text == (
        "enclave: tdx or sev-snp or sgx or azure-snp; firmware of 2026-08 or newer; TCB UpToDate or NotRated;"
        " a TCB level at most 365 days old; not affected by INTEL-SA-00837; sev-snp with snp 22 or more, microcode 200 or more;"
        " tdx with tcb_evaluation_data_number 18 or more; sev-snp with smt off; tdx with sept_ve_disable on;"
        f" only ppid:{PPID}, chip_id:{CHIP[:39]}…; never csp_id:CN=cc-us-east-2.amazonaws.com;"
        " every GPU confidential and one of ueid:a1;"
        " software node-7 (tdx: mrtd, rtmr1, boot log 2) or node-7-sgx (mrsigner, isvprodid, isvsvn)"
    )
    said = explain(contract())
    assert "\nplaces\n  gpu-host: a host whose measured OS is trusted, " in said
    assert f"\n  {text}\nwho can read\n" in said


@pytest.mark.parametrize(
    ("old", "new", "words", "warning"),
    [
        (
            "sev-snp = { snp = 22, microcode = 200 }, ",
            "",
            "sev-snp, azure-snp has no TCB dates: refused until min_svn",
            False,
        ),
        ('"UpToDate", "NotRated"', '"UpToDate", "NotRated", "OutOfDate"', "published holes", True),
        ('"UpToDate", "NotRated"', '"UpToDate"', "always NotRated", True),
    ],
)
def test_notes_about_the_tcb(old: str, new: str, words: str, warning: bool) -> None:
    notes = [note for note in lint(contract((old, new))) if words in str(note)]
    assert [note.warning for note in notes] == [warning]
    assert "max_tcb_age: sev-snp, azure-snp has no TCB dates: always refused here" in str(lint(contract())[0])


def test_a_fault_in_the_second_build_is_found_on_its_line() -> None:
    data = with_place(PLACE, ("isvsvn = 3", "isvsvn = -3"))
    with pytest.raises(InputError) as refused:
        parse(data, name="t")
    (finding,) = refused.value.reasons
    assert finding.where == "place.enclave.software.1.svns_least.isvsvn"
    line = data.decode().split("\n")[finding.line - 1]  # type: ignore[attr-defined]  # a Finding
    assert line.startswith("svns_least")


def test_a_contract_can_name_every_id_that_evidence_shows() -> None:
    """And no other: a deny list with a name of nothing would deny nothing."""
    values = ("0a" * 16, "0a" * 6, "0a" * 64, "i-0a")
    named = {name for name in IDENTITIES if any(re.fullmatch(PLATFORM, f"{name}:{value}") for value in values)}
    assert named == set(IDENTITIES)
    assert set(re.findall(r"[a-z][a-z_]+(?=[|):])", PLATFORM)) == set(IDENTITIES)
    assert not re.fullmatch(PLATFORM, "sgx_type:1")


def test_a_host_accepts_a_soft_tpm_by_its_word_only() -> None:
    boot = "sha256:" + "ab" * 32
    claims = Claims(kind="attested-host", tee="soft-tpm", debug=False, boot=boot)
    real = Claims(kind="attested-host", tee="tpm", debug=False, boot=boot)
    for text, soft_ok, real_ok in (
        ("", False, True),
        ('accept = ["tpm"]\n', False, True),
        ('accept = ["simulated"]\n', True, False),
        ('accept = ["tpm", "simulated"]\n', True, True),
    ):
        place = f'[place.host]\nkind = "attested-host"\nboot = ["{boot}"]\n{text}'
        policy = compile_place(parse(place.encode(), name="place.toml", places_only=True), "host")
        assert (appraise(claims, policy) == (), appraise(real, policy) == ()) == (soft_ok, real_ok), text


def test_a_place_alone_is_a_policy_and_nothing_that_anybody_can_sign() -> None:
    text = '[place.enclave]\nkind = "tee"\naccept = ["tdx"]\n'
    with pytest.raises(InputError):
        parse(text.encode(), name="place.toml")
    contract = parse(text.encode(), name="place.toml", places_only=True)
    assert contract.expires.year == 9999
    assert set(contract.party) == {"verifier"}
    for bad in ("", "[place]\n", text + "[code]\n", text.replace("tee", "tea"), "place = 1\n"):
        with pytest.raises(InputError):
            parse(bad.encode(), name="place.toml", places_only=True)


def test_a_serial_number_with_zeros_in_front_is_the_same_gpu() -> None:
    """OpenSSL writes serial numbers as whole bytes, evidence as a number: a deny list would never meet its GPU."""
    ids = (
        'gpu = "confidential", gpus = { allow = ["ueid:0a1", "device_key:00b2"] }, platforms = { deny = ["ueid:0c3"] }'
    )
    policy = compile_place(changed(XRAY, ('min_tcb = "2026-08"', ids)), "enclave")
    assert policy.gpu_allow == frozenset({("ueid", "a1"), ("device_key", "b2")})
    assert policy.platform_deny == frozenset({("ueid", "c3")})
