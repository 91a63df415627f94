"""Fakes of Intel's, AMD's and NVIDIA's services on this machine, over the soft TEEs' collateral, with faults on demand."""

from __future__ import annotations

import base64
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from cryptography.x509 import ocsp as x509_ocsp

from cloister.attestation.edge.fetch import Sources
from cloister.attestation.soft import nvidia as soft_nvidia
from cloister.attestation.soft import sgx as soft_sgx
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.soft import tdx as soft_tdx
from cloister.crypto.canonical import json_decode, json_encode


@dataclass
class Reply:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    slow_s: float = 0.0
    """Pause before each byte of the body."""
    announced: int | None = None
    """Content-Length, where it is not the truth."""


class Vendors:
    """What the fakes have, what they were asked, and what goes wrong next."""

    def __init__(self, now: datetime, gpu: soft_nvidia.Gpu, machine: soft_snp.Machine) -> None:
        self.asked: list[str] = []
        self.faults: dict[str, list[Reply]] = {}
        """Part of a path -> replies that are given first, one each."""
        self.url = ""
        self._answers = {
            int(item.subject.removeprefix("ocsp/"), 16): item.data
            for item in soft_nvidia.endorsements(now, (gpu,)).items
            if item.subject.startswith("ocsp/")
        }
        self._rims = {name: make() for name, make in zip(soft_nvidia.rim_ids(), (soft_nvidia.driver_rim, soft_nvidia.vbios_rim), strict=True)}  # fmt: skip
        self._intel = {"tdx": soft_tdx.collateral(now), "sgx": soft_sgx.collateral(now)}
        self._amd = {item.subject: item.data for item in soft_snp.endorsements(now)}
        self._leaf = soft_snp.leaf_endorsement(machine)

    @property
    def sources(self) -> Sources:
        return Sources(self.url, f"{self.url}/IntelSGXRootCA.der", self.url, self.url, f"{self.url}/ocsp")

    def reply(self, path: str, body: bytes) -> Reply:
        self.asked.append(path)
        for part, replies in self.faults.items():
            if part in path and replies:
                return replies.pop(0)
        split = urllib.parse.urlsplit(path)
        parts = split.path.strip("/").split("/")
        query = dict(urllib.parse.parse_qsl(split.query))
        if parts[-1] == "IntelSGXRootCA.der":
            return Reply(bytes.fromhex(self._collateral("tdx")["root_ca_crl"]))
        if parts[1:3] == ["certification", "v4"]:
            return self._pcs(parts[0], "/".join(parts[3:]), query)
        if parts[0] == "ocsp":
            serial = x509_ocsp.load_der_ocsp_request(body).serial_number
            return Reply(self._answers[serial]) if serial in self._answers else Reply(status=404)
        if parts[:2] == ["v1", "rim"]:
            rim = self._rims.get(parts[2])
            return (
                Reply(json_encode({"id": parts[2], "rim": base64.b64encode(rim).decode()}))
                if rim
                else Reply(status=404)
            )
        if parts[1] == "v1":
            return self._kds(parts, query)
        return Reply(status=404)

    def _collateral(self, tee: str) -> dict[str, str]:
        value: dict[str, str] = json_decode(self._intel[tee], canonical=False)
        return value

    def _pcs(self, tee: str, what: str, query: dict[str, str]) -> Reply:
        found = self._collateral(tee)
        match what:
            case "tcb" if query == {"fmspc": soft_tdx.FMSPC}:
                return self._document(found, "tcb_info", "tcbInfo", "TCB-Info-Issuer-Chain")
            case "qe/identity":
                return self._document(found, "qe_identity", "enclaveIdentity", "SGX-Enclave-Identity-Issuer-Chain")
            case "pckcrl" if query == {"ca": "platform", "encoding": "der"}:
                chain = urllib.parse.quote(found["pck_crl_issuer_chain"])
                return Reply(bytes.fromhex(found["pck_crl"]), headers={"SGX-PCK-CRL-Issuer-Chain": chain})
        return Reply(status=404)

    @staticmethod
    def _document(found: dict[str, str], name: str, key: str, header: str) -> Reply:
        body = f'{{"{key}":{found[name]},"signature":"{found[f"{name}_signature"]}"}}'
        return Reply(body.encode(), headers={header: urllib.parse.quote(found[f"{name}_issuer_chain"])})

    def _kds(self, parts: list[str], query: dict[str, str]) -> Reply:
        signer, _, line, what = parts
        if what in ("cert_chain", "crl"):
            subject = f"{line}/{signer}/soft" if what == "cert_chain" else f"{line}/crl/soft"
            return Reply(self._amd[subject]) if subject in self._amd else Reply(status=404)
        levels = bytes(int(query[name]) for name in ("blSPL", "teeSPL", "snpSPL", "ucodeSPL"))
        _, chip, tcb = self._leaf.subject.split("/")
        raw = bytes.fromhex(tcb)
        wanted = bytes((raw[0], raw[1], raw[6], raw[7]))
        return Reply(self._leaf.data) if (what, levels) == (chip, wanted) else Reply(status=404)


@contextmanager
def vendors(
    now: datetime, *, gpu: soft_nvidia.Gpu | None = None, machine: soft_snp.Machine | None = None
) -> Iterator[Vendors]:
    """Run the fakes; `url` of what is yielded is their address."""
    fakes = Vendors(now, gpu or soft_nvidia.gpu(), machine or soft_snp.machine("soft"))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers.get("Content-Length", "0"))))

        def _answer(self, body: bytes) -> None:
            reply = fakes.reply(self.path, body)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body) if reply.announced is None else reply.announced))
            self.end_headers()
            if not reply.slow_s:
                self.wfile.write(reply.body)
                return
            for byte in reply.body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(reply.slow_s)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # the client hung up, as it should

    server = Server(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    fakes.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fakes
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
