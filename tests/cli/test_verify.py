"""`cloister verify` on evidence: every soft kind, a policy, what was not done, manifests with one fault each."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cloister.attestation import evidence as wire
from cloister.attestation import files
from cloister.attestation.edge.attester import SOFT_KINDS, find_attester
from cloister.attestation.edge.collateral import soft_collateral
from cloister.attestation.files import manifest, sniff
from cloister.attestation.roots import Roots
from cloister.attestation.soft import cca as soft_cca
from cloister.attestation.soft import nvidia as soft_nvidia
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.soft import tpm as soft_tpm
from cloister.cli import main
from cloister.cli.common import now
from cloister.errors import EvidenceError, InputError, Reason
from tests.attestation.helpers import SHARED, refusal

VECTORS = SHARED / "vectors" / "attestation" / "manifest.json"
PLACE = """[place.enclave]
kind = "tee"
accept = ["simulated"]
"""


@dataclass
class Said:
    status: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLOISTER_INSECURE_SOFT_TEE", raising=False)

    def call(*words: object) -> Said:
        capsys.readouterr()
        status = main(["verify", *map(str, words)])
        captured = capsys.readouterr()
        return Said(status, captured.out, captured.err)

    return call


def soft(kind: str, path: Path) -> Path:
    attester = find_attester(kind, measurement=bytes(48))
    attester.extend("cloister/config/1", b"test")
    path.write_bytes(wire.encode(attester.evidence(bytes(attester.report_data_bytes))))
    return path


@pytest.mark.parametrize("kind", SOFT_KINDS)
def test_our_own_format_of_every_kind(kind: str, run: Run, tmp_path: Path) -> None:
    path = soft(kind, tmp_path / "evidence")
    good = run(path, "--insecure-soft-tee", "--json")
    assert good.status == 0, good.out
    assert good.data["verdict"] == "good"
    assert {step["state"] for step in good.data["steps"]} == {"passed"}
    told = run(path, "--insecure-soft-tee")
    assert "protects NOTHING" in told.out
    assert told.out.count("✓") == len(good.data["steps"])
    assert run(path).status == 4, "without the word, a test root is not believed"
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(bytes(changed))
    assert run(path, "--insecure-soft-tee").status in (2, 4)


def test_a_policy_is_judged_and_every_broken_rule_is_told(run: Run, tmp_path: Path) -> None:
    path = soft("soft-sev-snp", tmp_path / "evidence")
    (tmp_path / "place.toml").write_text(PLACE)
    good = run(path, "--insecure-soft-tee", "--policy", "place.toml", "--json")
    assert good.status == 0, good.out
    assert good.data["policy"] == "place.enclave"
    (tmp_path / "place.toml").write_text(PLACE.replace("simulated", "tdx") + 'gpu = "confidential"\n')
    bad = run(path, "--insecure-soft-tee", "--policy", "place.toml", "--json")
    assert bad.status == 4
    assert {reason["where"] for reason in bad.data["reasons"]} >= {"place.enclave.accept", "place.enclave.gpu"}
    assert "NOT ACCEPTABLE" in run(path, "--insecure-soft-tee", "--policy", "place.toml").out


def test_a_policy_must_be_one(run: Run, tmp_path: Path) -> None:
    path = soft("soft-tdx", tmp_path / "evidence")
    for text, hint in (
        ("", "contract"),
        ("[place]", "place"),
        (PLACE + "[code]\n", "contract"),
        (PLACE.replace("tee", "tea"), "kind"),
        (PLACE + PLACE.replace("enclave", "other"), "--place"),
    ):
        (tmp_path / "place.toml").write_text(text)
        said = run(path, "--insecure-soft-tee", "--policy", "place.toml")
        assert said.status == 2, text
        assert hint in said.err
    (tmp_path / "place.toml").write_text(PLACE + PLACE.replace("enclave", "other"))
    assert run(path, "--insecure-soft-tee", "--policy", "place.toml", "--place", "other").status == 0


def test_vendor_files_are_recognised_and_what_is_missing_is_said(run: Run, tmp_path: Path) -> None:
    machine = soft_snp.machine()
    (tmp_path / "report.bin").write_bytes(soft_snp.report(machine, measurement=bytes(48), report_data=bytes(64)))
    (tmp_path / "vcek.der").write_bytes(machine.leaf)
    for item in soft_snp.endorsements(_yesterday()):
        (tmp_path / item.subject.replace("/", "-").lower()).write_bytes(item.data)
    words = ["report.bin", "vcek.der", "--insecure-soft-tee", "--collateral", "milan-vcek-soft"]
    whole = run(*words, "--collateral", "milan-crl-soft", "--json")
    assert (whole.status, whole.data["verdict"]) == (0, "good"), whole.out
    part = run(*words)
    assert part.status == 4
    assert "NOT DONE" in part.out
    assert "NOT ENOUGH" in part.out
    alone = run("report.bin", "--insecure-soft-tee")
    assert alone.status in (2, 4)
    assert "vcek/" in alone.out + alone.err


def _yesterday() -> Any:
    from datetime import timedelta

    from cloister.cli.common import now

    return now() - timedelta(days=1)


def test_a_quote_at_another_time(run: Run, tmp_path: Path) -> None:
    machine = soft_tdx.platform()
    issued = _yesterday()
    quote = soft_tdx.quote(machine, mrtd=bytes(48), rtmr3=bytes(48), report_data=bytes(64), debug=False)
    (tmp_path / "quote.bin").write_bytes(quote)
    (tmp_path / "collateral.json").write_bytes(soft_tdx.collateral(issued))
    words = ["quote.bin", "--collateral", "collateral.json", "--insecure-soft-tee"]
    assert run(*words).status == 0
    late = run(*words, "--at", "2031-01-01T00:00:00Z")
    assert late.status == 4
    assert "✗" in late.out
    assert "tdx.3-collateral" in late.out
    assert run(*words, "--at", "yesterday").status == 2
    assert run(*words, "--at", "2031-01-01T00:00:00").status == 2, "a time without a zone"


def test_files_that_are_nothing_or_two_things(run: Run, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    assert run("noise", "noise").status == 2
    assert run("missing", "also-missing").status == 2
    assert run().status == 2
    (tmp_path / "quote").write_bytes(
        soft_tdx.quote(soft_tdx.platform(), mrtd=bytes(48), rtmr3=bytes(48), report_data=bytes(64), debug=False)
    )
    (tmp_path / "report").write_bytes(soft_snp.report(soft_snp.machine(), measurement=bytes(48), report_data=bytes(64)))
    both = run("quote", "report")
    assert both.status == 2
    assert "more than one kind" in both.err
    assert run("quote", "quote").status == 2


# What was not checked is not said to be ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOFT_KINDS)
def test_a_nonce_is_compared_in_our_own_format_too(kind: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "evidence"
    attester = find_attester(kind, measurement=bytes(48))
    attester.extend("cloister/config/1", b"test")
    asked = b"\x07" * attester.report_data_bytes
    path.write_bytes(wire.encode(attester.evidence(asked)))
    good = run(path, "--insecure-soft-tee", "--nonce", asked.hex(), "--json")
    assert (good.status, good.data["steps"][-1]["name"]) == (0, "freshness")
    bad = run(path, "--insecure-soft-tee", "--nonce", asked[:-1].hex(), "--json")
    assert (bad.status, bad.data["verdict"], bad.data["steps"][-1]["state"]) == (4, "refused", "failed")
    assert run(path, "--insecure-soft-tee", "--nonce", "ff" * 65).status == 4
    assert run(path, "--insecure-soft-tee", "--nonce", "").status == 2, "a variable that was never set"


def test_a_nonce_says_nothing_about_devices(run: Run, tmp_path: Path) -> None:
    gpu = soft_nvidia.gpu()
    evidence = replace(
        find_attester("soft-tdx", measurement=bytes(48)).evidence(bytes(64)),
        devices=(soft_nvidia.evidence(gpu, bytes(32), ocsp_responses=soft_nvidia.staples(gpu, _yesterday())),),
    )
    observed = files.observe_evidence(
        evidence,
        soft_collateral(_yesterday()) | soft_nvidia.endorsements(_yesterday()),
        Roots(soft=True),
        now=_yesterday(),
        nonce=bytes(64),
    )
    assert observed.error is None
    assert (observed.steps[-1].name, observed.steps[-1].state) == ("freshness", "not done")


def test_a_log_that_nobody_signed_is_not_authentic(run: Run, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(soft_tpm.host().boot_log())
    (tmp_path / "place.toml").write_text(PLACE)
    for words in ((), ("--policy", "place.toml")):
        said = run("log", "--json", *words)
        assert (said.status, said.data["verdict"]) == (4, "refused")
    assert "NOT ENOUGH" in run("log").out


def test_a_policy_that_could_not_be_judged_is_not_met(run: Run, tmp_path: Path) -> None:
    """A manifest of the vendor is authentic and says nothing about a machine."""
    (tmp_path / "rim.xml").write_bytes(soft_nvidia.driver_rim())
    (tmp_path / "place.toml").write_text(PLACE)
    words: list[str] = ["rim.xml", "--insecure-soft-tee"]
    for index, (subject, issuer) in enumerate(pairwise(soft_nvidia.authority().rim_chain)):
        (tmp_path / f"{index}.der").write_bytes(soft_nvidia.ocsp_response(subject, issuer, now() - timedelta(hours=1)))
        words.append(f"{index}.der")
    alone = run(*words)
    assert alone.status == 0
    assert "protects NOTHING" in alone.out
    said = run(*words, "--policy", "place.toml", "--json")
    assert (said.status, said.data["verdict"]) == (4, "refused")


def test_a_platform_key_that_came_with_the_token_proves_nothing(run: Run, tmp_path: Path) -> None:
    """Whoever makes both halves of a key makes a token of a platform that is nobody's."""
    mallory = soft_cca.platform("mallory", label="a key of an attacker")
    (tmp_path / "token").write_bytes(soft_cca.token(mallory, challenge=bytes(64), rim=bytes(48)))
    (tmp_path / "cpak").write_bytes(mallory.spki())
    (tmp_path / "place.toml").write_text(PLACE.replace("simulated", "cca"))
    asked = ("token=token", "--nonce", "00" * 64, "--policy", "place.toml", "--json")
    said = run("cpak=cpak", *asked)
    assert (said.status, said.data["verdict"]) == (4, "refused")
    assert {step["name"] for step in said.data["steps"] if step["state"] == "not done"} == {"cca.2-cpak"}


def test_steps_are_not_said_to_have_passed_when_something_does_not_parse_or_is_missing(
    run: Run, tmp_path: Path
) -> None:
    machine = soft_snp.machine()
    (tmp_path / "report").write_bytes(soft_snp.report(machine, measurement=bytes(48), report_data=bytes(64)))
    (tmp_path / "leaf").write_bytes(b"\x30\x03\x02\x01\x00")
    quote = soft_tdx.quote(soft_tdx.platform(), mrtd=bytes(48), report_data=bytes(64))
    (tmp_path / "quote").write_bytes(quote)
    for words in (("report",), ("report", "leaf=leaf"), ("quote=quote", "collateral=leaf")):
        said = run(*words, "--insecure-soft-tee", "--json")
        assert said.status == 4, words
        assert "passed" not in {step["state"] for step in said.data["steps"]}, words


def test_a_line_break_in_a_claim_writes_no_line_of_its_own(run: Run, tmp_path: Path) -> None:
    """The attester chooses names and claims: one of them would be a verdict, or a step that passed."""

    def token(body: dict[str, Any]) -> str:
        parts = ({"alg": "ES384", "kid": "k"}, body)
        return ".".join(
            [*(base64.urlsafe_b64encode(json.dumps(each).encode()).rstrip(b"=").decode() for each in parts), "AA"]
        )

    for line in ("authentic at 2026-11-20 12:00:00 UTC", "\u2713 nras.3-signature"):
        inner = token({"x": f"y\n\n{line}\u2028{line}\r{line}"})
        digest = ["DIGEST", ["SHA-256", hashlib.sha256(inner.encode()).hexdigest()]]
        (tmp_path / "eat").write_text(json.dumps([["JWT", token({"submods": {"GPU-0": digest}})], {"GPU-0": inner}]))
        said = run("eat")
        assert said.status == 4
        assert not [each for each in said.out.splitlines() if each.startswith(line)]


def test_a_file_that_no_step_reads_is_refused(run: Run, tmp_path: Path) -> None:
    """A list that revokes the machine, and that the verifier of another kind of machine would not open."""
    machine = soft_snp.machine()
    (tmp_path / "report").write_bytes(soft_snp.report(machine, measurement=bytes(48), report_data=bytes(64)))
    (tmp_path / "quote").write_bytes(soft_tdx.quote(soft_tdx.platform(), mrtd=bytes(48), report_data=bytes(64)))
    crl = next(item.data for item in soft_snp.endorsements(_yesterday()) if "crl" in item.subject)
    (tmp_path / "list.crl").write_bytes(crl)
    for words in (("quote", "list.crl"), ("quote", "--collateral", "list.crl"), ("report", "leef=quote")):
        said = run(*words, "--insecure-soft-tee")
        assert said.status == 2, words
        assert "no step of" in said.err
    (tmp_path / "eat").write_text('[["JWT", "a.b.c"], {}]')
    (tmp_path / "gpu").write_bytes(soft_nvidia.report(soft_nvidia.gpu(), bytes(32)))
    assert run("gpu", "eat", "--insecure-soft-tee").status == 2


# Manifests -----------------------------------------------------------------------------------------------------


def write(folder: Path, *entries: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "quote.bin").write_bytes(b"\x04\x00")
    (folder / "manifest.json").write_text(json.dumps(entries))
    return folder / "manifest.json"


ENTRY = {
    "kind": "dcap",
    "name": "short",
    "files": {"quote": "quote.bin"},
    "at": "2025-01-01T00:00:00Z",
    "nonce": None,
    "expect": {"authentic": False},
}


def test_a_line_for_each_entry_and_status_1_for_a_mismatch(run: Run, tmp_path: Path) -> None:
    path = write(
        tmp_path / "v",
        ENTRY,
        ENTRY | {"name": "wrong", "expect": {"authentic": True}},
        ENTRY | {"name": "gone", "files": {"quote": "none.bin"}},
        ENTRY | {"name": "alien", "kind": "alien"},
        ENTRY | {"name": "more", "expect": {"authentic": False, "colour": "red"}},
        ENTRY | {"name": "because", "expect": {"authentic": False, "reason": "moon"}},
    )
    said = run("--manifest", path)
    assert said.status == 1
    lines = said.out.splitlines()
    assert lines[0] == "short: ok"
    assert [line.split(":")[0] for line in lines] == ["short", "wrong", "gone", "alien", "more", "because"]
    assert all(": MISMATCH expected " in line and " got " in line for line in lines[1:])
    data = run("--manifest", path, "--json").data
    assert data["mismatches"] == 5
    assert run("--manifest", write(tmp_path / "v", ENTRY)).status == 0
    assert run("--manifest", path, "quote.bin").status == 2


@pytest.mark.parametrize(
    "change",
    [
        {"kind": 1},
        {"name": ""},
        {"name": "a\nb: ok"},
        {"files": {}},
        {"files": {"quote": "../secret"}},
        {"files": {"quote": "/etc/passwd"}},
        {"files": {"quote": "a//b"}},
        {"files": ["quote"]},
        {"at": "2025-01-01"},
        {"at": 5},
        {"nonce": "xyz"},
        {"nonce": 7},
        {"chain": 7},
        {"expect": {}},
        {"expect": None},
    ],
)
def test_a_manifest_with_one_fault_is_refused(change: dict[str, Any], run: Run, tmp_path: Path) -> None:
    assert run("--manifest", write(tmp_path / "v", ENTRY | change)).status == 2


def test_a_name_twice_and_bytes_that_are_no_manifest() -> None:
    for data in (json.dumps([ENTRY, ENTRY]).encode(), b"", b"{}", b"[1]", b"[" * 10_000, b"\xff"):
        with pytest.raises(InputError):
            manifest.parse(data)


def test_reasons_are_found_where_they_are_said() -> None:
    from cloister.attestation.files import Observation

    error = EvidenceError(
        "no", code="evidence-not-authentic", reasons=[Reason("sev-snp.3-chain.expired", "old", "new")]
    )
    seen = Observation({"authentic": False}, error=error)
    assert manifest.differences({"authentic": False, "reason": "chain.expired"}, seen) == {}
    assert manifest.differences({"authentic": False, "reason": "chain.root"}, seen)
    assert manifest.differences({"authentic": False, "reason": "new"}, seen), "what was wanted is not what was found"
    assert manifest.differences({"reason": "x"}, Observation({"authentic": True}))
    assert manifest.differences({"debug": 1}, Observation({"debug": True})), "1 is not true"
    assert manifest.differences({"rtmr_replay": [2, 0]}, Observation({"rtmr_replay": [0, 2]})) == {}


def test_the_real_vectors_come_out_as_expected(run: Run) -> None:
    if not VECTORS.exists():
        pytest.skip("no real evidence beside the repository")
    said = run("--manifest", VECTORS)
    assert said.status == 0, said.out
    assert said.out.count(": ok") == len(json.loads(VECTORS.read_text()))


def test_a_changed_real_vector_is_a_mismatch(run: Run, tmp_path: Path) -> None:
    if not VECTORS.exists():
        pytest.skip("no real evidence beside the repository")
    copy = tmp_path / "copy"
    shutil.copytree(VECTORS.parent, copy)
    for name in ("snp/report-trustee-milan.bin", "dcap/tdx4-phala.bin", "nvidia/h100-550.90.07.bin"):
        path = copy / name
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(bytes(data))
    said = run("--manifest", copy / "manifest.json")
    assert said.status == 1
    wrong = {line.split(":")[0] for line in said.out.splitlines() if "MISMATCH" in line}
    assert wrong >= {"milan-vcek-trustee", "tdx4-uptodate", "h100-full"}


def test_guesses_never_raise() -> None:
    for data in (b"", b"\0", b"{", b"<", b"0", b"-----BEGIN CERTIFICATE-----", bytes(0x4A0), b"A" * 100, b"[[]]"):
        assert sniff.sniff(data) is None
    assert refusal_or_kind([("x", b"\0")]) == "refused"


def refusal_or_kind(named: list[tuple[str, bytes]]) -> str:
    try:
        return sniff.assemble(named).kind
    except InputError:
        return "refused"


def test_evidence_files_need_their_roles() -> None:
    from cloister.attestation.files import Case, need
    from cloister.testkit.softtee import NOW

    with pytest.raises(InputError, match="report"):
        need(Case("snp", {}, NOW), "report")
    assert refusal(wire.decode, b"\xa0").code == "evidence-malformed"


def test_a_role_that_is_written_out_is_of_the_kind_that_the_bytes_show() -> None:
    machine = soft_snp.machine()
    report = soft_snp.report(machine, measurement=bytes(48), report_data=bytes(64))
    assert sniff.assemble([("report=x", report), ("leaf=y", machine.leaf)]).kind == "snp"
    gpu = soft_nvidia.gpu()
    evidence = soft_nvidia.evidence(gpu, bytes(32))
    assert sniff.assemble([("report=x", evidence.quote), ("chain=y", gpu.chain)]).kind == "nvidia"


def test_a_token_counts_under_the_authority_that_the_policy_names(run: Run, tmp_path: Path) -> None:
    from tests.attestation import test_authority as services
    from tests.attestation import test_token as tokens

    service = services.SERVICES["sevsnpvm"]
    shown = tokens.evidence(services.signed(services.body_of(service)))
    (tmp_path / "token").write_bytes(wire.encode(shown))
    authority = f'kind = "maa"\nissuer = "{services.ISSUERS["maa"]}"\njwks = ["{tokens.pin(services.jwks())}"]\n'
    place = '[place.enclave]\nkind = "tee"\naccept = ["authority:azure/sevsnpvm"]\n'
    (tmp_path / "place.toml").write_text(place + "[authority.azure]\n" + authority)
    at = services.NOW.strftime("%Y-%m-%dT%H:%M:%SZ")
    good = run("token", "--at", at, "--policy", "place.toml", "--json")
    assert (good.status, good.data["verdict"]) == (0, "good"), good.out
    assert run("token", "--at", at).status == 4, "nobody named an authority"
    (tmp_path / "place.toml").write_text(
        (place + "[authority.azure]\n" + authority).replace(tokens.pin(services.jwks()), "sha256:" + "0" * 64)
    )
    assert run("token", "--at", at, "--policy", "place.toml").status == 4, "another JWKS"
