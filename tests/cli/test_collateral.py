"""`cloister collateral` as a person uses it, against fakes of the vendors; what is printed, and the exit status."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cloister.attestation.binding import Binding
from cloister.attestation.edge import fetch as fetching
from cloister.attestation.edge.attester import attest, find_attester
from cloister.attestation.evidence import encode
from cloister.attestation.soft import nvidia as soft_nvidia
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.soft import tdx as soft_tdx
from cloister.cli import main
from tests.attestation.vendors import Reply, Vendors, vendors

NOW = datetime.now(UTC)
Run = Callable[..., tuple[int, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(home, *arguments)` -> exit status, and the JSON object on stdout."""
    monkeypatch.setenv("CLOISTER_INSECURE_SOFT_TEE", "1")

    def call(home: str, *arguments: str) -> tuple[int, Any]:
        capsys.readouterr()
        status = main([*arguments, "--json", "--home", str(tmp_path / home)])
        return status, json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Any:
    with vendors(NOW - timedelta(hours=1)) as found:
        monkeypatch.setattr(fetching, "Sources", lambda *given: fetching_sources(found, *given))
        monkeypatch.setattr(fetching, "Web", functools.partial(fetching.Web, insecure_http=True, sleep=lambda _: None))
        yield found


Original = fetching.Sources


def fetching_sources(found: Vendors, *given: str) -> Original:
    return Original(*given) if given else found.sources


def quote(path: Path, kind: str = "soft-tdx") -> Path:
    evidence = attest(find_attester(kind, measurement=b"m" * 48), Binding("broker", b"n" * 32, b"key", bytes(32)))
    path.write_bytes(encode(evidence))
    return path


def test_air_gapped_round_trip_from_fetch_to_verify(run: Run, fakes: Vendors, tmp_path: Path) -> None:
    """One home has a network; the other gets a disk, and verifies evidence."""
    evidence, disk = quote(tmp_path / "evidence"), tmp_path / "disk.snapshot"
    assert run("online", "key", "new")[0] == 0
    me = run("online", "key", "show")[1]["fingerprint"]
    status, fetched = run("online", "collateral", "fetch", "--for", str(evidence))
    assert (status, fetched["added"]) == (0, [["tdx", soft_tdx.FMSPC]])
    status, exported = run("online", "collateral", "export", str(disk))
    assert (status, exported["items"], exported["signer"]) == (0, 1, me)

    assert run("offline", "key", "new")[0] == 0
    status, refused = run("offline", "collateral", "import", str(disk))
    assert (status, refused["error"]) == (2, "signature-invalid")
    assert refused["reasons"][0]["found"] == me
    status, imported = run("offline", "collateral", "import", str(disk), "--signer", me)
    assert (status, imported["added"]) == (0, [["tdx", soft_tdx.FMSPC]])
    for collateral in (tmp_path / "offline" / "collateral", disk):
        assert run("offline", "verify", str(evidence), "--collateral", str(collateral))[0] == 0


def test_list_shows_numbers_and_what_is_over(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old.json"
    old.write_bytes(soft_tdx.collateral(NOW - timedelta(days=90), evaluation=17))
    assert run("home", "collateral", "list") == (
        0,
        {"store": str(tmp_path / "home" / "collateral"), "items": [], "marks": {}},
    )
    assert run("home", "collateral", "add", str(old))[0] == 0
    status, found = run("home", "collateral", "list")
    (item,) = found["items"]
    assert (status, item["over"], item["subject"]) == (0, True, soft_tdx.FMSPC)
    assert 17 in item["numbers"].values()
    assert found["marks"] == item["numbers"]
    assert main(["collateral", "list", "--home", str(tmp_path / "home")]) == 0
    shown = capsys.readouterr().out
    assert "(over)" in shown
    assert "  17 " in shown


def test_rollback_is_refused_with_status_4(run: Run, tmp_path: Path) -> None:
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    new.write_bytes(soft_tdx.collateral(NOW - timedelta(days=1), evaluation=18))
    old.write_bytes(soft_tdx.collateral(NOW - timedelta(days=2), evaluation=17))
    assert run("home", "collateral", "add", str(new))[0] == 0
    status, refused = run("home", "collateral", "add", str(old))
    assert (status, refused["error"]) == (4, "collateral-rolled-back")
    assert ("17", "at least 18") in {(each["found"], each["wanted"]) for each in refused["reasons"]}


def test_an_import_says_what_it_kept(run: Run, tmp_path: Path) -> None:
    for home, day, number in (("old", 2, 17), ("new", 1, 18)):
        file = tmp_path / f"{home}.json"
        file.write_bytes(soft_tdx.collateral(NOW - timedelta(days=day), evaluation=number))
        assert run(home, "key", "new")[0] == run(home, "collateral", "add", str(file))[0] == 0
    run("old", "collateral", "export", str(tmp_path / "disk"))
    me = run("old", "key", "show")[1]["fingerprint"]
    status, found = run("new", "collateral", "import", str(tmp_path / "disk"), "--signer", me)
    assert (status, found["added"]) == (0, [])
    assert any(each["wanted"] == "at least 18" for each in found["kept"])


def test_a_changed_snapshot_is_refused(run: Run, tmp_path: Path) -> None:
    file, disk = tmp_path / "tdx.json", tmp_path / "disk"
    file.write_bytes(soft_tdx.collateral(NOW - timedelta(days=1)))
    assert run("home", "key", "new")[0] == run("home", "collateral", "add", str(file))[0] == 0
    assert run("home", "collateral", "export", str(disk))[0] == 0
    good = disk.read_bytes()
    for changed in (good.replace(b"UpToDate", b"Outdated"), good[:-1], b"", b"x" * 100):
        assert changed != good
        disk.write_bytes(changed)
        assert run(
            "other", "collateral", "import", str(disk), "--signer", run("home", "key", "show")[1]["fingerprint"]
        )[0] in (2, 4)
    assert run("other", "collateral", "list")[1]["items"] == []
    disk.write_bytes(good)
    status, refused = run("home", "collateral", "add", str(disk))
    assert status == 2
    assert "collateral import" in refused["hint"]


def test_raw_files_of_vendors_say_what_they_need(run: Run, fakes: Vendors, tmp_path: Path) -> None:
    raw = tmp_path / "quote.bin"
    raw.write_bytes(
        attest(find_attester("soft-sgx", measurement=b"m" * 48), Binding("broker", b"n" * 32, b"k", bytes(32))).quote
    )
    assert run("home", "collateral", "fetch", "--for", str(raw))[1]["added"] == [["sgx", soft_tdx.FMSPC]]
    machine = soft_snp.machine("soft")
    raw.write_bytes(soft_snp.report(machine, report_data=bytes(64), measurement=bytes(48)))
    status, found = run("home", "collateral", "fetch", "--for", str(raw), "--product", "Milan")
    assert status == 0
    assert {subject.split("/")[0] for _, subject in found["added"]} == {"Milan", "vcek"}
    status, _ = run("home", "collateral", "fetch", "--for", str(quote(tmp_path / "nitro", "soft-nitro")))
    assert status == 0


def test_a_gpus_files_say_what_they_need(run: Run, fakes: Vendors, tmp_path: Path) -> None:
    pytest.importorskip("signxml")
    evidence = soft_nvidia.evidence(soft_nvidia.gpu(), bytes(32))
    (tmp_path / "report.bin").write_bytes(evidence.quote)
    (tmp_path / "chain.pem").write_bytes(evidence.parts["chain"])
    status, found = run(
        "home",
        "collateral",
        "fetch",
        "--for",
        str(tmp_path / "report.bin"),
        "--for",
        str(tmp_path / "chain.pem"),
    )
    assert status == 0, (found["message"], found["reasons"])
    assert {subject for _, subject in found["added"]} >= set(soft_nvidia.rim_ids())
    fakes.asked.clear()
    assert (
        run("home", "collateral", "fetch")[0] == 0
    )  # signers and authorities are asked about again, manifests are not
    assert {path.split("/")[1] for path in fakes.asked} == {"ocsp"}


@pytest.mark.parametrize("kind", ["soft-tdx", "soft-sgx", "soft-sev-snp"])
def test_a_vendors_raw_file_is_verified_from_a_store_of_many_kinds(
    kind: str, run: Run, fakes: Vendors, tmp_path: Path
) -> None:
    evidence = attest(find_attester(kind, measurement=b"m" * 48), Binding("broker", b"n" * 32, b"k", bytes(32)))
    raw = tmp_path / "raw.bin"
    raw.write_bytes(evidence.quote)
    for arguments in (("--fmspc", soft_tdx.FMSPC), ("--for", str(quote(tmp_path / "own", kind)), "--product", "Milan")):
        assert run("home", "collateral", "fetch", *arguments)[0] == 0
    for item in (
        soft_snp.leaf_endorsement(soft_snp.machine("soft")),
        soft_snp.leaf_endorsement(soft_snp.machine("other")),
    ):
        (tmp_path / "leaf").write_bytes(item.data)
        run("home", "collateral", "add", str(tmp_path / "leaf"))
    run("home", "key", "new")
    run("home", "collateral", "export", str(tmp_path / "disk"))
    for collateral in (tmp_path / "home" / "collateral", tmp_path / "disk"):
        status, found = run("home", "verify", str(raw), "--collateral", str(collateral))
        assert found["facts"]["authentic"] is True, found
        assert status == 0, found


def test_without_arguments_the_store_is_renewed(run: Run, fakes: Vendors, tmp_path: Path) -> None:
    status, refused = run("home", "collateral", "fetch")
    assert (status, refused["error"]) == (2, "input")
    old = tmp_path / "old.json"
    old.write_bytes(soft_tdx.collateral(NOW - timedelta(days=60)))
    assert run("home", "collateral", "add", str(old))[0] == 0
    status, found = run("home", "collateral", "fetch")
    assert (status, found["added"]) == (0, [["tdx", soft_tdx.FMSPC]])


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("--fmspc", "xyz"), 2),
        (("--rim", "../../etc/passwd"), 2),
        (("--for", "/nonexistent"), 2),
        (("--pcs", "http://api.example", "--fmspc", "50806F000000"), 2),
        (("--fmspc", "000000000000"), 1),
        (("--rim", "NV_GPU_DRIVER_GH100_1.2.3"), 1),
    ],
)
def test_what_cannot_be_fetched(
    arguments: tuple[str, ...], status: int, run: Run, fakes: Vendors, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "http://api.example" in arguments:
        monkeypatch.setattr(fetching, "Web", fetching.Web.func)  # type: ignore[attr-defined]  # as it is outside of tests
    assert run("home", "collateral", "fetch", *arguments)[0] == status


def test_a_vendor_that_is_down_changes_nothing(run: Run, fakes: Vendors, tmp_path: Path) -> None:
    fakes.faults = {"/identity": [Reply(status=500)]}
    status, refused = run("home", "collateral", "fetch", "--fmspc", soft_tdx.FMSPC)
    assert (status, refused["error"]) == (1, "peer")
    assert run("home", "collateral", "list")[1]["items"] == []


def test_a_damaged_store_is_status_1(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "tdx.json"
    file.write_bytes(soft_tdx.collateral(NOW))
    assert run("home", "collateral", "add", str(file))[0] == 0
    (tmp_path / "home" / "collateral" / "index").write_bytes(b"x" * 99)
    for arguments in (("list",), ("add", str(file)), ("export", str(tmp_path / "out"))):
        run("home", "key", "new")
        status, refused = run("home", "collateral", *arguments)
        assert (status, refused["error"]) == (1, "tampered")
