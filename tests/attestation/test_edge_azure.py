"""Azure confidential VMs: a real swtpm as the vTPM, an HCL report under the test root, and a metadata service on this machine."""

from __future__ import annotations

import base64
import http.server
import json
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from cloister.attestation import events as event_log
from cloister.attestation.azure import format as hcl_format
from cloister.attestation.binding import check_binding
from cloister.attestation.edge.attester import attest
from cloister.attestation.edge.azure import AK, HCL_REPORT, METADATA_LIMIT, TD_REPORT, AzureAttester, Kind, Metadata
from cloister.attestation.edge.tpmclient import OWNER, PASSWORD, Tpm
from cloister.attestation.evidence import decode, encode
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.tpm.format import parse_public
from cloister.attestation.types import Claims, Evidence
from cloister.attestation.verify import verify
from cloister.errors import MachineError
from cloister.testkit.softtee import MEASUREMENT, NOW, SOFT_ROOTS, binding, soft_collateral, workload
from tests.attestation.fakes import SwTpm
from tests.attestation.test_edge_tpmclient import define_nv

DATA = bytes(range(32))
EVICT = 0x120
MACHINE = soft_snp.machine()
RSA_AK = (
    struct.pack(">HHIH", 0x0001, 0x000B, 0x50472, 0)
    + struct.pack(">HHH", 0x0010, 0x0014, 0x000B)  # no symmetric; RSASSA, SHA-256
    + struct.pack(">HIH", 2048, 0, 0)
)


NV_BYTES = 2048
"""The largest NV index of swtpm; Azure's has 2,600."""


def number(value: int) -> str:
    return base64.urlsafe_b64encode(value.to_bytes((value.bit_length() + 7) // 8, "big")).rstrip(b"=").decode()


class Vm:
    """A VM: its vTPM with a persistent RSA key, the HCL report that names the key, and a metadata service."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.kind, self.chip = kind, SwTpm(folder)
        self.asked: list[tuple[str, str]] = []
        self.answers: Callable[[str, bytes | None], dict[str, Any]] = self.answer
        self.quote = b""
        try:
            with Tpm(self.chip.transport) as tpm, tpm.primary(RSA_AK, OWNER) as key:
                tpm.execute(EVICT, (OWNER, key.handle), struct.pack(">I", AK), sessions=(PASSWORD,))
                public = parse_public(key.public, where="ak").key
            assert isinstance(public, rsa.RSAPublicKey)
            self.install(self.report(public.public_numbers().n))
        except BaseException:
            self.chip.stop()
            raise

    def report(self, modulus: int) -> bytes:
        key = {"kid": "HCLAkPub", "kty": "RSA", "e": number(65537), "n": number(modulus)}
        runtime = json.dumps({"keys": [key], "vm-configuration": {"secure-boot": True}}).encode()
        if self.kind == "azure-snp":
            empty = hcl_format.build(hcl_format.SNP, bytes(hcl_format.REPORT_BYTES), runtime)
            data = hcl_format.parse(empty, where="test").wanted_report_data()
            report = soft_snp.report(MACHINE, report_data=data, measurement=MEASUREMENT)
            return hcl_format.build(hcl_format.SNP, report, runtime, size=NV_BYTES)
        hcl = hcl_format.build(hcl_format.TDX, bytes(range(256)) * 4 + bytes(160), runtime, size=NV_BYTES)
        data = hcl_format.parse(hcl, where="test").wanted_report_data()
        self.quote = soft_tdx.quote(soft_tdx.platform(), mrtd=MEASUREMENT, report_data=data)
        return hcl

    def install(self, report: bytes) -> None:
        with Tpm(self.chip.transport) as tpm:
            define_nv(tpm, HCL_REPORT, report)

    def ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        self.asked.append((method, path))
        return self.answers(path, body)

    def answer(self, path: str, body: bytes | None) -> dict[str, Any]:
        if path == "/acc/tdquote":
            assert body is not None
            sent = base64.urlsafe_b64decode(json.loads(body)["report"] + "==")
            assert sent == bytes(range(256)) * 4
            return {"quote": base64.urlsafe_b64encode(self.quote + bytes(100)).decode()}
        body64 = base64.encodebytes(MACHINE.leaf).decode()
        pem = f"-----BEGIN CERTIFICATE-----\n{body64}-----END CERTIFICATE-----\n"
        return {"vcekCert": pem, "certificateChain": "", "tcbm": ""}

    def attester(self, **options: Any) -> AzureAttester:
        given: dict[str, Any] = {"connect": self.chip.transport, "service": self, "boot_log": self.chip.folder / "none"}
        return AzureAttester(self.kind, **(given | options))


@pytest.fixture(params=["azure-snp", "azure-tdx"])
def vm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Vm]:
    machine = Vm(tmp_path / "vm", request.param)
    yield machine
    machine.chip.stop()


@pytest.fixture
def snp(tmp_path: Path) -> Iterator[Vm]:
    machine = Vm(tmp_path / "vm", "azure-snp")
    yield machine
    machine.chip.stop()


def judged(evidence: Evidence) -> Claims:
    return verify(decode(encode(evidence)), soft_collateral(NOW), SOFT_ROOTS, now=NOW)


def test_a_vm_attests_from_the_vendor_down_to_the_nonce(vm: Vm) -> None:
    attester = vm.attester()
    assert attester.missing() == ()
    attester.extend(event_log.WORKLOAD, workload().encode())
    evidence = attest(attester, binding())
    claims = judged(evidence)
    assert claims.tee == f"soft-{vm.kind}"
    assert check_binding(claims, binding()) == ()
    assert claims.events[0].data == workload().encode()
    assert claims.attributes["secure_boot"]
    assert judged(attest(attester, binding(nonce=bytes(32)))).report_data == binding(nonce=bytes(32)).qualifying_data()
    assert len(vm.asked) == 1, "what lives as long as the VM is asked for once"


def test_the_kinds_are_told_apart_by_the_report(vm: Vm) -> None:
    other: Kind = "azure-tdx" if vm.kind == "azure-snp" else "azure-snp"
    attester = AzureAttester(other, connect=vm.chip.transport, service=vm)
    assert attester.missing()[0].where == "tee.hcl"
    with pytest.raises(MachineError, match="not of kind"):
        attester.evidence(DATA)


def test_a_tpm_without_hcl_report_is_no_azure_vm(tmp_path: Path) -> None:
    chip = SwTpm(tmp_path / "plain")
    try:
        reasons = AzureAttester("azure-snp", connect=chip.transport).missing()
        assert "another cloud" in reasons[0].hint
        with Tpm(chip.transport) as tpm:
            define_nv(tpm, HCL_REPORT, b"something else" * 100)
        assert "no HCL report" in AzureAttester("azure-snp", connect=chip.transport).missing()[0].found
    finally:
        chip.stop()


def test_a_key_that_the_report_does_not_name_is_not_used(snp: Vm, tmp_path: Path) -> None:
    with Tpm(snp.chip.transport) as tpm:
        tpm.execute(0x122, (OWNER, HCL_REPORT), b"", sessions=(PASSWORD,))  # NV_UndefineSpace
    other = rsa.generate_private_key(65537, 2048).public_key().public_numbers().n
    snp.install(snp.report(other))
    with pytest.raises(MachineError, match="not the one that the HCL report names"):
        snp.attester().evidence(DATA)


def test_another_program_that_extends_is_noticed(snp: Vm) -> None:
    attester = snp.attester()
    with Tpm(snp.chip.transport) as tpm:
        tpm.extend_pcr(15, {"sha256": bytes(32)})
    with pytest.raises(MachineError, match="before the extension"):
        attester.extend(event_log.WORKLOAD, b"x")
    with pytest.raises(MachineError, match="in the quote"):
        attester.evidence(DATA)
    with pytest.raises(ValueError, match="32"):
        attester.evidence(bytes(64))


def test_without_the_metadata_service_snp_leaves_the_certificate_to_the_verifier(snp: Vm) -> None:
    def down(path: str, body: bytes | None) -> dict[str, Any]:
        raise MachineError("no answer")

    attester = snp.attester()
    bad: tuple[dict[str, Any], ...] = (
        {},
        {"vcekCert": "garbage"},
        {"vcekCert": "\ud800"},
    )  # the last: JSON that is no text, from a hostile host
    for answers in (down, *(lambda path, body, found=found: found for found in bad)):
        snp.answers = answers
        assert "leaf" not in attester.evidence(DATA).parts
    snp.answers = snp.answer
    assert attester.evidence(DATA).parts["leaf"] == MACHINE.leaf


@pytest.mark.parametrize("answer", [{}, {"quote": 3}, {"quote": "!!!"}, {"quote": "AAAA"}, {"quote": ""}])
def test_a_td_quote_that_is_none_is_an_error(tmp_path: Path, answer: dict[str, Any]) -> None:
    machine = Vm(tmp_path / "vm", "azure-tdx")
    try:
        machine.answers = lambda path, body: answer
        with pytest.raises(MachineError, match="no TD quote"):
            machine.attester().evidence(DATA)
    finally:
        machine.chip.stop()


# --- the metadata service ---------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    class Handler(http.server.BaseHTTPRequestHandler):
        reply: tuple[int, bytes] = (200, b"{}")
        seen: list[tuple[str, str, str | None, bytes]] = []  # noqa: RUF012 - one list for each server

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            self.seen.append((self.command, self.path, self.headers.get("Metadata"), body))
            self.send_response(self.reply[0])
            self.end_headers()
            self.wfile.write(self.reply[1])

        do_POST = do_GET  # noqa: N815 - the name that the server looks for

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_the_service_is_asked_with_its_header(server: Any) -> None:
    server.RequestHandlerClass.reply = (200, b'{"quote": "x"}')
    service = Metadata("127.0.0.1", server.server_port)
    assert service.ask("POST", "/acc/tdquote", b"{}") == {"quote": "x"}
    assert server.RequestHandlerClass.seen == [("POST", "/acc/tdquote", "true", b"{}")]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((404, b"{}"), "status 404"),
        ((302, b"{}"), "status 302"),
        ((200, b"no json"), "no JSON"),
        ((200, b"[]"), "no JSON object"),
        ((200, b"[" * 60_000), "no JSON"),
        ((200, bytes(METADATA_LIMIT + 1)), "more than"),
    ],
)
def test_answers_of_another_form_are_errors(server: Any, reply: tuple[int, bytes], message: str) -> None:
    server.RequestHandlerClass.reply = reply
    with pytest.raises(MachineError, match=message):
        Metadata("127.0.0.1", server.server_port).ask("GET", "/x")


def test_no_service_is_an_error() -> None:
    with pytest.raises(MachineError, match="does not answer"):
        Metadata("127.0.0.1", 9, timeout=1).ask("GET", "/x")


def test_proxies_are_not_used(monkeypatch: pytest.MonkeyPatch, server: Any) -> None:
    """A proxy would see, and could answer, what only the host's own service may."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert Metadata("127.0.0.1", server.server_port).ask("GET", "/x") == {}


def test_the_td_report_is_where_the_paravisor_puts_it() -> None:
    assert (TD_REPORT.start, TD_REPORT.stop) == (32, 1056)
