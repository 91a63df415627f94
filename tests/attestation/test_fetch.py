"""Fetchers against fakes of the vendors: what is asked, what comes together, and every way in which a server can be wrong."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.x509 import ocsp as x509_ocsp

from cloister.attestation.binding import Binding
from cloister.attestation.collateral.needs import (
    AmdLeaf,
    AmdLine,
    IntelTcb,
    Need,
    NvidiaAnswer,
    NvidiaManifest,
    line_of,
    needs,
)
from cloister.attestation.edge import fetch as fetching
from cloister.attestation.edge.attester import attest, find_attester
from cloister.attestation.edge.fetch import Sources, Web, fetch
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.nvidia.examine import wanted
from cloister.attestation.roots import Roots
from cloister.attestation.snp import format as snp_format
from cloister.attestation.soft import nvidia as soft_nvidia
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.types import Evidence
from cloister.attestation.verify import verify
from cloister.errors import InputError, PeerError
from tests.attestation.vendors import Reply, Vendors, vendors

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
SOFT = Roots(soft=True)
TDX = IntelTcb("tdx", soft_tdx.FMSPC)
MILAN = AmdLine("Milan", "vcek")
BINDING = Binding("broker", b"n" * 32, b"key", bytes(32))


@pytest.fixture(scope="module")
def shared() -> Iterator[Vendors]:
    with vendors(NOW - timedelta(hours=1)) as fakes:
        yield fakes


@pytest.fixture
def fakes(shared: Vendors) -> Vendors:
    shared.asked.clear()
    shared.faults.clear()
    return shared


def web(slept: list[float] | None = None, **options: Any) -> Web:
    pauses = [] if slept is None else slept
    return Web(insecure_http=True, sleep=pauses.append, **options)


def refused(fakes: Vendors, need: Need, **options: Any) -> PeerError:
    with pytest.raises(PeerError) as error:
        fetch([need], web(**options), fakes.sources)
    assert error.value.reasons
    return error.value


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["soft-tdx", "soft-sgx", "soft-sev-snp"])
def test_what_evidence_needs_is_fetched_and_verifies_it(kind: str, fakes: Vendors) -> None:
    evidence = attest(find_attester(kind, measurement=b"m" * 48), BINDING)
    if kind == "soft-sev-snp":
        evidence = replace(evidence, parts={})  # a host that sends no certificate
    found = Endorsements(fetch(needs(evidence, line="Milan"), web(), fakes.sources))
    assert verify(evidence, found, SOFT, now=NOW).tee == kind


def test_a_gpus_manifests_and_answers_are_fetched_and_verify_it(fakes: Vendors) -> None:
    pytest.importorskip("signxml")
    evidence = soft_nvidia.evidence(soft_nvidia.gpu(), b"n" * 32)
    told: list[tuple[int, int, str]] = []
    found = fetch(needs(evidence), web(), fakes.sources, progress=lambda *args: told.append(args))
    assert verify(evidence, Endorsements(found), SOFT, now=NOW).gpu == "confidential"
    assert told[-1][0] == told[-1][1] == len(told) - 1
    subjects = {item.subject.split("/")[0] for item in found}
    assert subjects == {*soft_nvidia.rim_ids(), "ocsp", "ca"}


def test_what_is_asked_of_intel(fakes: Vendors) -> None:
    fetch([TDX], web(), fakes.sources)
    assert fakes.asked == [
        f"/tdx/certification/v4/tcb?fmspc={soft_tdx.FMSPC}",
        "/tdx/certification/v4/qe/identity",
        "/sgx/certification/v4/pckcrl?ca=platform&encoding=der",
        "/IntelSGXRootCA.der",
    ]
    fakes.asked.clear()
    with pytest.raises(PeerError):
        fetch([IntelTcb("sgx", "000000000000", "processor")], web(), fakes.sources)
    assert fakes.asked == ["/sgx/certification/v4/tcb?fmspc=000000000000"]


def test_what_is_asked_of_amd(fakes: Vendors) -> None:
    tcb = snp_format.Tcb(3, 0, 8, 115)
    fakes.faults = {"/vcek/": [Reply(status=404)], "/Turin/": [Reply(status=404)]}
    for need, path in (
        (AmdLeaf("Milan", "ab" * 64, tcb), f"/vcek/v1/Milan/{'ab' * 64}?blSPL=03&teeSPL=00&snpSPL=08&ucodeSPL=115"),
        (AmdLeaf("Turin", "ab" * 8, replace(tcb, fmc=1)), f"/vcek/v1/Turin/{'ab' * 8}?fmcSPL=01&blSPL=03&teeSPL=00&snpSPL=08&ucodeSPL=115"),
    ):  # fmt: skip
        refused(fakes, need)
        assert fakes.asked[-1] == path
    fakes.asked.clear()
    fetch([AmdLine("Milan", "vlek")], web(), fakes.sources)
    assert fakes.asked == ["/vlek/v1/Milan/cert_chain", "/vcek/v1/Milan/crl"]


def test_what_is_asked_of_a_responder() -> None:
    device = soft_nvidia.gpu()
    _, chain = wanted(soft_nvidia.evidence(device, bytes(32)))
    request = x509_ocsp.load_der_ocsp_request(fetching.ocsp_request(NvidiaAnswer(chain[1], chain[2])))
    assert request.serial_number == chain[1].serial
    assert request.hash_algorithm.name == "sha384"
    assert not list(request.extensions)


def test_the_signed_bytes_are_kept_as_they_are_spelt(fakes: Vendors) -> None:
    """A document that is decoded and encoded again may lose its signature: spaces, escapes, numbers."""
    text = '{ "a" : 1.0, "b": "\\u0041", "c":[ ] }'
    body = f' {{ "tcbInfo" : {text} , "signature" : "{"ab" * 64}" }} '
    assert fetching._signed("http://x/", body.encode(), "tcbInfo") == (text, "ab" * 64)


# --- needs ------------------------------------------------------------------------------------------------------------


def test_needs_of_every_kind() -> None:
    found = {kind: needs(attest(find_attester(kind, measurement=b"m" * 48), BINDING), line="Milan") for kind in ("soft-tdx", "soft-sgx", "soft-sev-snp", "soft-nitro", "soft-cca")}  # fmt: skip
    assert found["soft-tdx"] == (TDX,)
    assert found["soft-sgx"] == (IntelTcb("sgx", soft_tdx.FMSPC),)
    assert found["soft-sev-snp"][0] == MILAN
    assert found["soft-nitro"] == found["soft-cca"] == ()
    gpu = soft_nvidia.evidence(soft_nvidia.gpu(), bytes(32))
    both = needs(
        Evidence("tdx", attest(find_attester("soft-tdx", measurement=b"m" * 48), BINDING).quote, devices=(gpu, gpu))
    )
    assert both[0] == TDX
    assert len(both) == len(set(both)) == 1 + len(needs(gpu))
    assert {type(each) for each in needs(gpu)} == {NvidiaManifest, NvidiaAnswer}


def test_a_report_that_does_not_name_its_processor_asks_for_it() -> None:
    machine = soft_snp.machine("soft")
    report = snp_format.parse(soft_snp.report(machine, measurement=bytes(48), report_data=bytes(64)))
    for family, model, line in ((0x19, 0x01, "Milan"), (0x19, 0x11, "Genoa"), (0x19, 0xA0, "Genoa"), (0x1A, 0x02, "Turin"), (0x17, 1, None), (None, None, None)):  # fmt: skip
        assert line_of(replace(report, family=family, model=model)) == line
    if line_of(report) is None:
        with pytest.raises(InputError, match="which processor"):
            needs(Evidence("sev-snp", report.data))


# --- servers that are wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_and_waited_for(status: int, fakes: Vendors) -> None:
    fakes.faults = {"/tcb": [Reply(status=status), Reply(status=status, headers={"Retry-After": "7"}), Reply(status=status, headers={"Retry-After": "99999"})]}  # fmt: skip
    slept: list[float] = []
    assert fetch([TDX], web(slept), fakes.sources)
    assert slept == [1.0, 7.0, 30.0]
    fakes.faults = {"/tcb": [Reply(status=status, headers={"Retry-After": "-1"})] * 9}
    slept.clear()
    assert str(status) in str(refused(fakes, TDX).reasons[0])
    fakes.faults = {"/tcb": [Reply(status=status)] * 9}
    with pytest.raises(PeerError):
        fetch([TDX], web(slept), fakes.sources)
    assert slept == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500, 502, 204])
def test_another_status_is_refused_at_once(status: int, fakes: Vendors) -> None:
    fakes.faults = {"/tcb": [Reply(status=status)]}
    assert str(status) in str(refused(fakes, TDX).reasons[0])
    assert len(fakes.asked) == 1


def test_a_huge_answer_is_cut_off(fakes: Vendors) -> None:
    fakes.faults = {"/identity": [Reply(b"x" * (fetching.SMALL + 1))], "cert_chain": [Reply(b"x" * 10_000_000)]}
    assert "more than 65536" in str(refused(fakes, TDX).reasons[0])
    assert "more than 65536" in str(refused(fakes, MILAN).reasons[0])


def test_a_slow_server_meets_the_deadline(fakes: Vendors) -> None:
    """One byte now and then never runs into the timeout of a single read."""
    fakes.faults = {"/tcb": [Reply(b"x" * 200, slow_s=0.05)]}
    assert "a whole answer by then" in str(refused(fakes, TDX, timeout_s=1.0, deadline_s=0.2).reasons[0])


def test_a_silent_server_meets_the_timeout(fakes: Vendors) -> None:
    fakes.faults = {"/tcb": [Reply(b"xx", slow_s=2.0)]}
    assert "imeout" in str(refused(fakes, TDX, timeout_s=0.2).reasons[0])


def test_an_answer_that_ends_early_is_refused(fakes: Vendors) -> None:
    fakes.faults = {"crl": [Reply(b"x" * 10, announced=20)]}
    refused(fakes, MILAN, timeout_s=0.3)


def test_nobody_there() -> None:
    sources = Sources(*["http://127.0.0.1:1"] * 5)
    with pytest.raises(PeerError):
        fetch([TDX], web(), sources)


@pytest.mark.parametrize("target", ["http://localhost:{port}/tcb", "http://127.0.0.1:1/tcb", "https://127.0.0.1:{port}/tcb", "file:///etc/passwd", "ftp://127.0.0.1/x", "//evil.example/x"])  # fmt: skip
def test_a_redirect_to_another_peer_is_refused(target: str, fakes: Vendors) -> None:
    port = fakes.url.rsplit(":", 1)[1]
    fakes.faults = {"/tcb": [Reply(status=302, headers={"Location": target.format(port=port)})]}
    found = str(refused(fakes, TDX).reasons[0])
    assert "redirect" in found or "status 302" in found  # a scheme that is not of the web is no redirect at all
    assert len(fakes.asked) == 1


def test_a_redirect_of_the_same_server_is_followed_a_few_times(fakes: Vendors) -> None:
    fakes.faults = {"cert_chain": [Reply(status=302, headers={"Location": "/vlek/v1/Milan/cert_chain"})]}
    assert "vlek" in str(refused(fakes, MILAN).reasons[0])  # followed, and then it is not what was asked for
    fakes.faults = {"cert_chain": [Reply(status=302, headers={"Location": "/vcek/v1/Milan/cert_chain?again"})] * 20}
    refused(fakes, MILAN)


@pytest.mark.parametrize(
    ("path", "reply"),
    [
        ("/tcb", Reply(b"{}")),
        ("/tcb", Reply(b"\xff\xfe")),
        ("/tcb", Reply(b'{"tcbInfo":' + b"[" * 100_000)),
        ("/tcb", Reply(b'{"tcbInfo":{},"signature":"00"}')),
        ("/tcb", Reply(b'{"tcbInfo":{},"signature":"' + b"ab" * 64 + b'"}')),
        ("/tcb", Reply(b'{"tcbInfo":{},"signature":"' + b"ab" * 64 + b'"}', headers={"SGX-Other-Chain": "x"})),
        ("/tcb", Reply(b'{"tcbInfo":{},"signature":"' + b"ab" * 64 + b'"}', headers={"TCB-Info-Issuer-Chain": "%zz"})),
        ("/identity", Reply(b'{"tcbInfo":{},"signature":"' + b"ab" * 64 + b'"}')),
        ("/pckcrl", Reply(b"not a list", headers={"SGX-PCK-CRL-Issuer-Chain": "x"})),
        ("/pckcrl", Reply(b"")),
        ("/IntelSGX", Reply(b"<html>")),
    ],
)
def test_intel_answers_something_else(path: str, reply: Reply, fakes: Vendors) -> None:
    fakes.faults = {path: [reply]}
    refused(fakes, TDX)


def test_a_cache_that_answers_in_hex_will_do(fakes: Vendors) -> None:
    good = fetch([TDX], web(), fakes.sources)
    crl = fakes.reply("/sgx/certification/v4/pckcrl?ca=platform&encoding=der", b"")
    root = fakes.reply("/IntelSGXRootCA.der", b"")
    fakes.faults = {
        "/pckcrl": [replace(crl, body=crl.body.hex().encode())],
        "RootCA": [replace(root, body=root.body.hex().encode() + b"\n")],
    }
    assert fetch([TDX], web(), fakes.sources) == good


def test_collateral_of_another_machine_is_refused(fakes: Vendors) -> None:
    tcb = fakes.reply(f"/sgx/certification/v4/tcb?fmspc={soft_tdx.FMSPC}", b"")
    fakes.faults = {"/tdx/certification/v4/tcb": [tcb]}
    assert "sgx" in str(refused(fakes, TDX).reasons[0])


@pytest.mark.parametrize("body", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\n", soft_tdx.collateral(NOW)])
def test_amd_answers_something_else(body: bytes, fakes: Vendors) -> None:
    fakes.faults = {"cert_chain": [Reply(body)]}
    refused(fakes, MILAN)
    fakes.faults = {"crl": [Reply(body)]}
    refused(fakes, MILAN)
    leaf = AmdLeaf("Milan", "ab" * 64, snp_format.Tcb(1, 1, 1, 1))
    fakes.faults = {"blSPL": [Reply(body)]}
    refused(fakes, leaf)


def test_the_vcek_of_another_chip_is_refused(fakes: Vendors) -> None:
    leaf = AmdLeaf("Milan", "ab" * 64, snp_format.Tcb(1, 1, 1, 1))
    fakes.faults = {"blSPL": [Reply(soft_snp.leaf_endorsement(soft_snp.machine("soft")).data)]}
    assert "vcek/" in str(refused(fakes, leaf).reasons[0])


def test_nvidia_answers_something_else(fakes: Vendors) -> None:
    pytest.importorskip("signxml")
    driver, vbios = soft_nvidia.rim_ids()
    other = base64.b64encode(soft_nvidia.vbios_rim()).decode()
    for body in (b"", b"{}", b"[]", f'{{"id": "{vbios}", "rim": "{other}"}}'.encode(), f'{{"id": "{driver}", "rim": "?"}}'.encode(), f'{{"id": "{driver}", "rim": "AAAA"}}'.encode()):  # fmt: skip
        fakes.faults = {"/v1/rim/": [Reply(body)]}
        refused(fakes, NvidiaManifest(driver))
    answers = [
        each for each in needs(soft_nvidia.evidence(soft_nvidia.gpu(), bytes(32))) if isinstance(each, NvidiaAnswer)
    ]
    wrong = fakes.reply("/ocsp", fetching.ocsp_request(answers[1]))
    for body in (b"", b"junk", wrong.body):
        fakes.faults = {"/ocsp": [Reply(body)]}
        refused(fakes, answers[0])


@pytest.mark.parametrize("url", ["http://api.example", "ftp://api.example", "file:///etc", "api.example", "https://", "https://user@host"])  # fmt: skip
def test_only_https_is_asked(url: str) -> None:
    with pytest.raises(InputError, match="https"):
        fetch([TDX], Web(), Sources(pcs=url))


def test_only_what_is_fetched_needs_the_network() -> None:
    """No verifier imports a network module: fetching is an edge that nothing imports but the command line."""
    import subprocess
    import sys

    code = "import cloister.attestation.verify as v, sys; [v.VERIFIERS[k] for k in v.VERIFIERS]; print('urllib.request' in sys.modules, 'cloister.attestation.edge.fetch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"
