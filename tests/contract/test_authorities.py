"""Authorities in a contract: what the language takes, what it compiles to, what a reader is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cloister.attestation.appraise import appraise
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.token.format import KIND, Named, read
from cloister.attestation.types import Claims
from cloister.contract import Contract, compile_place, parse
from cloister.contract.analyse import explain, lint, place_text, readers
from cloister.contract.change import diff, subjects, successor
from cloister.contract.decide import endorsed
from cloister.contract.text import Finding
from cloister.errors import InputError

ISSUER = "https://sharedeus2.eus2.attest.azure.net"
JWKS, OTHER = "sha256:" + "0a" * 32, "sha256:" + "0b" * 32
AZURE = f'[authority.azure]\nkind = "maa"\nissuer = "{ISSUER}"\njwks = ["{JWKS}"]\n'
GOOGLE = (
    '[authority.google]\nkind = "confidential-space"\nissuer = "https://confidentialcomputing.googleapis.com"\n'
    f'jwks = ["{JWKS}"]\naudience = "https://broker.example"\n'
)
NVIDIA = f'[authority.nvidia]\nkind = "nras"\nissuer = "https://nras.attestation.nvidia.com"\njwks = ["{JWKS}"]\n'
PLACE = (
    '[place.enclave]\nkind = "tee"\naccept = ["tdx", "authority:azure/sevsnpvm", "authority:google/gcp_intel_tdx"]\n'
)
GPUS = 'gpu = "confidential"\ngpu_authorities = ["nvidia"]\n'
TEXT = AZURE + GOOGLE + NVIDIA + PLACE + GPUS
SAID = Claims("tee", "authority:azure/sevsnpvm", debug=False, tcb_status="NotRated", svns={"snp": 22})
SAID_GPU = Claims(
    "device",
    "authority:nvidia/nvidia-gpu",
    debug=False,
    tcb_status="NotRated",
    gpu="confidential",
    platform={"ueid": "a1"},
)
TOGETHER = replace(SAID, devices=(SAID_GPU,), gpu="confidential")


def places(*edits: tuple[str, str], text: str = TEXT) -> Contract:
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return parse(text.encode(), name="places.toml", places_only=True)


def findings(*edits: tuple[str, str], text: str = TEXT) -> list[Finding]:
    with pytest.raises(InputError) as refused:
        places(*edits, text=text)
    return [reason for reason in refused.value.reasons if isinstance(reason, Finding)]


def rules(claims: Claims, *edits: tuple[str, str], text: str = TEXT) -> list[str]:
    policy = compile_place(places(*edits, text=text), "enclave")
    return [reason.where.removeprefix("place.enclave.") for reason in appraise(claims, policy)]


def whole(tables: str = AZURE, *, version: int = 1, replaces: str = "", accept: str = '"tdx"') -> Contract:
    line = f'replaces = "{replaces}"\n' if replaces else ""
    text = f"""contract = "a"
version = {version}
{line}expires = 2099-01-01
[party]
one = "SHA256:{"A" * 43}"
[code]
job = {{ owner = "one", digest = "{JWKS}" }}
[data]
set = {{ owner = "one", digest = "{JWKS}" }}
[place]
enclave = {{ kind = "tee", accept = [{accept}] }}
[phase.train]
run = "job"
at = "enclave"
read = ["set"]
write = {{ out = "one" }}
[change]
default = ["one"]
successor = {{ of = ["job"], same = ["owner"], keeps = ["set"] }}
{tables}"""
    return parse(text.encode(), name="a.toml")


# --- form and names ---------------------------------------------------------------------------------------------------


def test_a_contract_names_authorities_and_places_accept_their_word() -> None:
    contract = places()
    assert set(contract.authorities) == {"azure", "google", "nvidia"}
    policy = compile_place(contract, "enclave")
    assert policy.accept == {
        "tdx",
        "authority:azure/sevsnpvm",
        "authority:google/gcp_intel_tdx",
        "authority:nvidia/nvidia-gpu",
    }


@pytest.mark.parametrize(
    ("old", "new", "where", "words"),
    [
        ('kind = "maa"', 'kind = "maaa"', "authority.azure.kind", "did you mean 'maa'"),
        ('kind = "maa"', 'kind = "veraison"', "authority.azure.kind", "maa"),
        ('kind = "maa"\n', "", "authority.azure.kind", "nothing"),
        (f'issuer = "{ISSUER}"\n', "", "authority.azure.issuer", "the issuer of its tokens"),
        (f'"{ISSUER}"', '"http://a.example"', "authority.azure.issuer", "exact issuer"),
        (f'"{ISSUER}"', '"https://A.example"', "authority.azure.issuer", "exact issuer"),
        (f'"{ISSUER}"', '"https://a.example/?x"', "authority.azure.issuer", "exact issuer"),
        ('audience = "h', 'audiense = "h', "authority.google.audiense", "did you mean 'audience'"),
        (f'jwks = ["{JWKS}"]\n[authority.g', "jwks = []\n[authority.g", "authority.azure.jwks", "at least one"),
        (f'jwks = ["{JWKS}"]\n[authority.g', "[authority.g", "authority.azure.jwks", "SHA-256"),
        (f'"{JWKS}"]\n[authority.g', f'"{JWKS}", "{JWKS}"]\n[authority.g', "authority.azure.jwks", "once"),
        ('audience = "https://broker.example"\n', "", "authority.google.audience", "whom its tokens are for"),
        ("audience = ", "audience = 7 #", "authority.google.audience", "audience"),
        (PLACE, f'audience = "x"\n{PLACE}', "authority.nvidia.audience", "nobody in particular"),
        ("authority:azure/sevsnpvm", "authority:azur/sevsnpvm", "place.enclave.accept", "did you mean 'authority:azure/"),
        ("authority:azure/sevsnpvm", "authority:azure/sev-snp", "place.enclave.accept", "authority:azure/sevsnpvm"),
        ("authority:azure/sevsnpvm", "authority:azure/gcp_intel_tdx", "place.enclave.accept", "authority:google/gcp_"),
        ("authority:azure/sevsnpvm", "authority:azure", "place.enclave.accept.1", "authority:<name>/<type>"),
        ("authority:azure/sevsnpvm", "authority:Azure/sevsnpvm", "place.enclave.accept.1", "authority:<name>/<type>"),
        ("authority:azure/sevsnpvm", "autority:azure/sevsnpvm", "place.enclave.accept.1", "simulated"),
        ("authority:azure/sevsnpvm", "authority:nvidia/nvidia-gpu", "place.enclave.accept", "gpu_authorities"),
        ("authority:azure/sevsnpvm", "sevsnpvm", "place.enclave.accept.1", "did you mean 'sev-snp'"),
        ('gpu_authorities = ["nvidia"]', 'gpu_authorities = ["nvida"]', "place.enclave.gpu_authorities", "'nvidia'"),
        ('gpu_authorities = ["nvidia"]', 'gpu_authorities = ["azure"]', "place.enclave.gpu_authorities", "nras"),
        ('gpu = "confidential"\n', "", "place.enclave.gpu_authorities", 'gpu = "confidential" too'),
        (GPUS, 'min_svn = { "authority:azure/tdxvm" = { x = 1 } }\n', "place.enclave.min_svn.authority:azure/tdxvm", "accepts"),
        (GPUS, 'require = { "authority:nvidia/nvidia-gpu" = { x = true } }\n', "place.enclave.require.authority:nvidia/nvidia-gpu", "accepts"),
        (GPUS, 'require = { sev-snp = { x = true } }\n', "place.enclave.require.sev-snp", "accepts"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_finding_with_its_path(old: str, new: str, where: str, words: str) -> None:
    (finding,) = findings((old, new))
    assert finding.where == where
    assert words in str(finding)
    assert finding.line


def test_an_undeclared_authority_is_refused_however_many_there_are() -> None:
    (finding,) = findings(text='[place.x]\nkind = "tee"\naccept = ["authority:azure/sevsnpvm"]\n')
    assert (finding.where, finding.found) == ("place.x.accept", "'authority:azure/sevsnpvm'")


def test_a_host_takes_no_word_of_a_service() -> None:
    (finding,) = findings(
        text=AZURE + f'[place.x]\nkind = "attested-host"\nboot = ["{JWKS}"]\naccept = ["authority:azure/sevsnpvm"]\n'
    )
    assert finding.where == "place.x.accept.0"


# --- what it compiles to ----------------------------------------------------------------------------------------------


def test_the_word_of_an_authority_counts_where_it_is_accepted() -> None:
    assert rules(TOGETHER) == []
    assert rules(replace(TOGETHER, tee="sev-snp")) == ["accept"]
    assert rules(replace(TOGETHER, tee="authority:azure/tdxvm", tcb_status="UpToDate")) == ["accept"]
    assert rules(replace(TOGETHER, tee="authority:other/sevsnpvm")) == ["accept"]
    assert rules(TOGETHER, ('["tdx", "authority:azure/sevsnpvm"', '["sev-snp"')) == ["accept"]
    assert rules(replace(TOGETHER, debug=True)) == ["debug"]


def test_a_gpu_that_somebody_vouches_for_counts_where_he_is_named() -> None:
    unnamed = ('gpu_authorities = ["nvidia"]\n', "")
    assert rules(TOGETHER, unnamed) == ["gpu0.accept", "gpu"]
    # not even where no GPU is asked for: it is no part of this machine that anybody believes
    assert rules(TOGETHER, (GPUS, "")) == ["gpu0.accept"]
    assert rules(replace(TOGETHER, devices=(replace(SAID_GPU, gpu="none"),), gpu="none")) == ["gpu"]
    assert rules(replace(TOGETHER, devices=(replace(SAID_GPU, debug=True),))) == ["gpu0.debug"]
    assert rules(replace(TOGETHER, devices=(replace(SAID_GPU, tee="authority:nvidia/nvidia-switch"),))) == [
        "switch0.accept",
        "gpu",
    ]
    # the word about a machine is no word about a GPU, and the other way round
    assert rules(replace(TOGETHER, devices=(replace(SAID_GPU, tee=SAID.tee),))) == ["gpu"]
    assert rules(replace(SAID_GPU, devices=(SAID_GPU,))) == ["kind"]
    listed = (GPUS, GPUS + 'gpus = { allow = ["ueid:a2"] }\n')
    assert rules(TOGETHER, listed) == ["gpu0.gpus.allow"]


def test_rules_go_by_the_authoritys_type() -> None:
    floor = (GPUS, 'min_tcb = "2026-08"\nmin_svn = { "authority:azure/sevsnpvm" = { snp = 22 } }\n' + GPUS)
    assert rules(TOGETHER, floor) == []
    assert rules(replace(TOGETHER, svns={"snp": 21}), floor) == ["min_svn.snp"]
    assert rules(TOGETHER, (GPUS, 'min_tcb = "2026-08"\n' + GPUS)) == ["min_tcb"]
    space = replace(TOGETHER, tee="authority:google/gcp_intel_tdx", attributes={"overridden": True})
    demand = (GPUS, 'require = { "authority:google/gcp_intel_tdx" = { overridden = false } }\n' + GPUS)
    assert rules(space, demand) == ["require.overridden"]
    assert rules(replace(space, attributes={"overridden": False}), demand) == []
    assert rules(replace(space, attributes={}), demand) == ["require.overridden"]
    build = '[[place.enclave.software]]\nlabel = "a"\ntee = "authority:azure/sevsnpvm"\nmeasurements = { maa_policy_hash = ["0a"] }\n'
    ours = replace(TOGETHER, measurements={"maa_policy_hash": b"\x0a"})
    assert rules(ours, text=TEXT + build) == []
    assert rules(TOGETHER, text=TEXT + build) == ["software.a.maa_policy_hash"]
    assert rules(replace(ours, tee="authority:google/gcp_intel_tdx"), text=TEXT + build) == ["software.a.tee"]


def test_a_deny_list_is_not_escaped_through_a_service_that_shows_no_ids() -> None:
    """Whoever owns the machine on the list would ask the service for a token about it."""
    deny = (GPUS, f'platforms = {{ deny = ["chip_id:{"ab" * 64}"] }}\n' + GPUS)
    assert rules(TOGETHER, deny) == ["platforms.deny"]
    gpu = (GPUS, 'platforms = { deny = ["device_key:0a"] }\n' + GPUS)
    assert rules(TOGETHER, gpu) == ["gpu0.platforms.deny"]
    # Intel's ids say nothing about AMD's machines
    assert rules(TOGETHER, (GPUS, f'platforms = {{ deny = ["ppid:{"ab" * 16}"] }}\n' + GPUS)) == []
    assert rules(TOGETHER, (GPUS, 'platforms = { deny = ["ueid:a1"] }\n' + GPUS)) == ["gpu0.platforms.deny"]


def test_a_token_about_intels_hardware_hides_its_advisories() -> None:
    deny = (GPUS, 'deny_advisories = ["INTEL-SA-00837"]\n' + GPUS)
    assert rules(replace(TOGETHER, tee="authority:google/gcp_intel_tdx"), deny) == ["deny_advisories"]
    assert rules(TOGETHER, deny) == []  # AMD names none anywhere


def test_authorities_become_collateral_and_nobody_elses_stay() -> None:
    contract = places()
    planted = Endorsement(
        KIND, "authority/azure", Named("maa", "https://mallory.example", frozenset({OTHER})).endorsement("x").data
    )
    hardware = Endorsement("tdx", "50806F000000", b"{}")
    found = endorsed(Endorsements((planted, hardware)), contract)
    assert {(item.kind, item.subject) for item in found.items} == {
        ("tdx", "50806F000000"), (KIND, "authority/azure"), (KIND, "authority/google"), (KIND, "authority/nvidia"),
    }  # fmt: skip
    azure = found.get(KIND, "authority/azure")
    assert azure is not None
    assert read(azure) == Named("maa", ISSUER, frozenset({JWKS}))
    google = found.get(KIND, "authority/google")
    assert google is not None
    assert read(google).audience == "https://broker.example"
    assert endorsed(Endorsements((planted, hardware)), None).items == (hardware,)


# --- what changes, and what people are told ---------------------------------------------------------------------------


def test_an_authority_lets_machines_in_as_an_entry_of_accept_does() -> None:
    none, one = whole(tables=""), whole()
    assert [each.path for each in diff(none, one)] == [
        "authority.azure.kind",
        "authority.azure.issuer",
        "authority.azure.jwks",
    ]
    assert subjects(none, one) == ("place",)
    more = whole(AZURE.replace(f'"{JWKS}"', f'"{JWKS}", "{OTHER}"'))
    assert [str(each) for each in diff(one, more)] == [f"authority.azure.jwks: {JWKS} -> {JWKS}, {OTHER}"]
    assert subjects(one, more) == ("place",)


def test_new_code_inherits_nothing_together_with_a_new_authority() -> None:
    from datetime import UTC, datetime

    old = whole()
    now = datetime(2026, 11, 20, tzinfo=UTC)
    new = whole(AZURE.replace(JWKS, OTHER), version=2, replaces=old.id)
    verdict = successor(old, new, {"one": True}, now=now, proposed_at=now)
    assert any("authority.azure.jwks" in reason.found for reason in verdict.reasons)


def test_a_reader_is_told_who_could_let_a_machine_in() -> None:
    contract = whole(accept='"tdx", "authority:azure/sevsnpvm"')
    assert place_text(contract, "enclave") == f"enclave: tdx or whatever {ISSUER} says is sevsnpvm"
    who = f"the operator of {ISSUER}"
    (operator,) = [reader for reader in readers(contract, "set") if reader.who == who]
    assert operator.text == f"{who}: in full, for it can vouch for any machine as one of enclave"
    said = explain(contract)
    assert f"azure: whatever {ISSUER} says; its operator can vouch for any machine" in said
    assert not [reader for reader in readers(whole(), "set") if reader.who == who]
    gpus = place_text(places(), "enclave")
    assert "a GPU is also whatever https://nras.attestation.nvidia.com says is one" in gpus


def notes(*edits: tuple[str, str], text: str = TEXT) -> dict[str, bool]:
    return {str(note): note.warning for note in lint(places(*edits, text=text))}


def test_an_authority_that_nobody_accepts_is_noted() -> None:
    assert str(lint(whole())[-1]) == "authority.azure: no place accepts its word"
    assert not any("no place accepts" in note for note in notes())


@pytest.mark.parametrize(
    ("edits", "words", "warning"),
    [
        ((), "maa_policy_hash", False),
        ((), "overridden = false forbids it", False),
        ((), "nvidia: whatever https://nras.attestation.nvidia.com says; its operator can vouch for any GPU", False),
        ((("azure/sevsnpvm", "azure/azurevm-sevsnpvm"),), "no broker takes it for a node", True),
        (((GPUS, 'min_tcb = "2026-08"\n' + GPUS),), "authority:azure/sevsnpvm has no TCB dates: refused until", False),
        (((GPUS, 'min_tcb = "2026-08"\n' + GPUS),), "authority:google/gcp_intel_tdx has no date and no numbers: always", True),
        (((GPUS, 'max_tcb_age = "9d"\n' + GPUS),), "authority:google/gcp_intel_tdx has no TCB dates: always", True),
        (((GPUS, 'tcb = ["UpToDate"]\n' + GPUS),), "authority:google/gcp_intel_tdx is always NotRated", True),
        (((GPUS, "require = { nvidia-gpu = { devtools = false } }\n" + GPUS),), "say nothing about authority:nvidia/", False),
    ],
)  # fmt: skip
def test_notes(edits: tuple[tuple[str, str], ...], words: str, warning: bool) -> None:
    found: list[Any] = [is_warning for note, is_warning in notes(*edits).items() if words in note]
    assert found == [warning], notes(*edits)
