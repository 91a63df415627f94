"""A client of Trustee's KBS protocol 0.4.0, from its documents alone: nothing of `cloister.broker.kbs` is used here.

As guest components do it: JCS and SHA-384 for the report data, evidence in the attesters' JSON, a JWE whose protected header is
parsed and written again (serde_json: alg, enc, then the rest in alphabetical order) to get the additional data.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import rfc8785
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap

from cloister.attestation.events import Workload
from cloister.attestation.soft import nvidia as soft_nvidia
from cloister.attestation.soft import sgx as soft_sgx
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.soft import tdx as soft_tdx

CURVES = {"P-256": (ec.SECP256R1(), 32), "P-521": (ec.SECP521R1(), 66)}
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64url(text: str) -> bytes:
    assert "=" not in text
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def jwk_of(key: PrivateKey) -> dict[str, str]:
    if isinstance(key, rsa.RSAPrivateKey):
        n = key.public_key().public_numbers()
        return {
            "kty": "RSA",
            "alg": "RSA-OAEP-256",
            "n": b64url(n.n.to_bytes(key.key_size // 8, "big")),
            "e": b64url(n.e.to_bytes(3, "big")),
        }
    name = {"secp256r1": "P-256", "secp521r1": "P-521", "secp384r1": "P-384"}[key.curve.name]
    size = (key.curve.key_size + 7) // 8
    point = key.public_key().public_numbers()
    x, y = (b64url(each.to_bytes(size, "big")) for each in (point.x, point.y))
    return {"kty": "EC", "crv": name, "alg": "ECDH-ES+A256KW", "x": x, "y": y}


def open_jwe(reply: dict[str, str], key: PrivateKey) -> bytes:
    """Decrypt as `TeeKeyPair::decrypt_response` does."""
    assert set(reply) == {"protected", "encrypted_key", "iv", "ciphertext", "tag"}
    header = json.loads(unb64url(reply["protected"]))
    rest = {name: header[name] for name in sorted(set(header) - {"alg", "enc"})}
    again = json.dumps({"alg": header["alg"], "enc": header["enc"], **_sorted(rest)}, separators=(",", ":"))
    wrapped = unb64url(reply["encrypted_key"])
    if isinstance(key, rsa.RSAPrivateKey):
        assert header["alg"] == "RSA-OAEP-256"
        cek = key.decrypt(wrapped, padding.OAEP(padding.MGF1(SHA256()), SHA256(), None))
    else:
        assert header["alg"] == "ECDH-ES+A256KW"
        curve, _ = CURVES[header["epk"]["crv"]]
        x, y = (int.from_bytes(unb64url(header["epk"][name]), "big") for name in ("x", "y"))
        shared = key.exchange(ec.ECDH(), ec.EllipticCurvePublicNumbers(x, y, curve).public_key())
        name = b"ECDH-ES+A256KW"
        info = len(name).to_bytes(4, "big") + name + bytes(4) + bytes(4) + (256).to_bytes(4, "big")
        cek = aes_key_unwrap(hashlib.sha256((1).to_bytes(4, "big") + shared + info).digest(), wrapped)
    assert header["enc"] == "A256GCM"
    sealed = unb64url(reply["ciphertext"]) + unb64url(reply["tag"])
    return AESGCM(cek).decrypt(unb64url(reply["iv"]), sealed, b64url(again.encode()).encode())


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value)}
    return value


def init_data(workload: Workload | None, *, algorithm: str = "sha384", more: str = "") -> str:
    """An init-data document as its author writes it."""
    entry = "" if workload is None else f'"cloister.workload" = "{workload.encode().hex()}"\n'
    return f"version = \"0.1.0\"\nalgorithm = \"{algorithm}\"\n{more}\n[data]\n{entry}\"aa.toml\" = '''\n[token_configs]\n'''\n"


def register(document: str, size: int, *, algorithm: str = "sha384") -> bytes:
    """What the host sets at launch."""
    return hashlib.new(algorithm, document.encode()).digest()[:size].ljust(size, b"\x00")


@dataclass
class Guest:
    """A confidential guest: what its hardware signs, and the init-data that it was launched with."""

    measurement: bytes
    tee: str = "tdx"
    document: str | None = None
    algorithm: str = "sha384"
    launched: bytes | None = None
    """Another value of the launch register than the document's digest."""
    rtmr3: bytes = bytes(48)
    debug: bool = False

    def config(self, size: int) -> bytes:
        if self.launched is not None:
            return self.launched.ljust(size, b"\x00")[:size]
        return bytes(size) if self.document is None else register(self.document, size, algorithm=self.algorithm)

    def evidence(self, report_data: bytes) -> dict[str, Any]:
        if self.tee == "sgx":
            quote = soft_sgx.quote(
                soft_sgx.platform(), mrenclave=self.measurement[:32], report_data=report_data, configid=self.config(64)
            )
            return {"quote": base64.b64encode(quote).decode()}
        if self.tee == "snp":
            machine = soft_snp.machine()
            report = soft_snp.report(
                machine, measurement=self.measurement, report_data=report_data, host_data=self.config(32)
            )
            return snp_json(report, machine.leaf)
        quote = soft_tdx.quote(
            soft_tdx.platform(),
            mrtd=self.measurement,
            report_data=report_data,
            rtmr3=self.rtmr3,
            mrconfigid=self.config(48),
            debug=self.debug,
        )
        return {"cc_eventlog": None, "quote": base64.b64encode(quote).decode()}


def snp_json(report: bytes, leaf: bytes | None) -> dict[str, Any]:
    """The serde form of virtee/sev 5 and 6."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(report[at : at + size], "little")

    def tcb(at: int) -> dict[str, Any]:
        raw = report[at : at + 8]
        return {"fmc": None, "bootloader": raw[0], "tee": raw[1], "snp": raw[6], "microcode": raw[7]}

    def version(at: int) -> dict[str, int]:
        return {"major": report[at + 2], "minor": report[at + 1], "build": report[at]}

    def array(at: int, size: int) -> list[int]:
        return list(report[at : at + size])

    made = {
        "version": number(0, 4), "guest_svn": number(4, 4), "policy": number(8, 8), "family_id": array(0x10, 16),
        "image_id": array(0x20, 16), "vmpl": number(0x30, 4), "sig_algo": number(0x34, 4), "current_tcb": tcb(0x38),
        "plat_info": number(0x40, 8), "key_info": number(0x48, 4), "report_data": array(0x50, 64),
        "measurement": array(0x90, 48), "host_data": array(0xC0, 32), "id_key_digest": array(0xE0, 48),
        "author_key_digest": array(0x110, 48), "report_id": array(0x140, 32), "report_id_ma": array(0x160, 32),
        "reported_tcb": tcb(0x180), "cpuid_fam_id": report[0x188], "cpuid_mod_id": report[0x189],
        "cpuid_step": report[0x18A], "chip_id": array(0x1A0, 64), "committed_tcb": tcb(0x1E0),
        "current": version(0x1E8), "committed": version(0x1EC), "launch_tcb": tcb(0x1F0),
        "launch_mit_vector": number(0x1F8, 8), "current_mit_vector": number(0x200, 8),
        "signature": {"r": array(0x2A0, 72), "s": array(0x2E8, 72)},
    }  # fmt: skip
    chain = None if leaf is None else [{"cert_type": "VCEK", "data": list(leaf)}]
    return {"attestation_report": made, "cert_chain": chain}


@dataclass
class Answer:
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The last part of `type`, after checking the form of an error."""
        value = self.json
        assert set(value) == {"type", "detail"}
        prefix, _, kind = value["type"].rpartition("/")
        assert prefix == "https://github.com/confidential-containers/kbs/errors"
        assert self.headers["content-type"] == "application/json"
        return str(kind)

    @property
    def detail(self) -> str:
        return str(self.json["detail"])


_CONNECTIONS: dict[str, http.client.HTTPSConnection] = {}


def _connection(url: str, *, fresh: bool) -> http.client.HTTPSConnection:
    """A kept connection: a handshake costs more than most tests."""
    known = _CONNECTIONS.pop(url, None)
    if known is not None and fresh:
        known.close()
    if known is None or fresh:
        address = urlsplit(url)
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        known = http.client.HTTPSConnection(str(address.hostname), address.port, context=context, timeout=20)
    _CONNECTIONS[url] = known
    return known


def close_connections() -> None:
    while _CONNECTIONS:
        _CONNECTIONS.popitem()[1].close()


@dataclass
class KbsClient:
    """One client. `key` is made in the TEE."""

    url: str
    guest: Guest
    key: PrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    cookie: str = ""
    nonce: str = ""
    token: str = ""

    def http(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        given = {"cookie": self.cookie} if self.cookie and not headers else headers or {}
        for fresh in (False, True):
            connection = _connection(self.url, fresh=fresh)
            try:
                connection.request(method, path, body, given)
                reply = connection.getresponse()
                return Answer(reply.status, {name.lower(): text for name, text in reply.getheaders()}, reply.read())
            except (http.client.HTTPException, OSError):
                if fresh:
                    raise
        raise AssertionError

    def auth(self, **changes: Any) -> Answer:
        value = {
            "version": "0.4.0",
            "tee": self.guest.tee,
            "extra-params": {"supported-hash-algorithms": ["sha256", "sha384", "sha512"]},
        } | changes
        answer = self.http("POST", "/kbs/v0/auth", json.dumps(value).encode(), {"content-type": "application/json"})
        if answer.status == 200:
            self.cookie = answer.headers["set-cookie"].partition(";")[0]
            self.nonce = answer.json["nonce"]
        return answer

    def runtime_data(self) -> dict[str, Any]:
        return {"nonce": self.nonce, "tee-pubkey": jwk_of(self.key)}

    def report_data(self, additional: str = "") -> bytes:
        value = self.runtime_data() | {"additional-evidence": additional}
        return hashlib.sha384(rfc8785.dumps(value)).digest() + bytes(16)

    def device_nonce(self) -> bytes:
        return hashlib.sha384(rfc8785.dumps(self.runtime_data())).digest()[:32]

    def gpus(self, *gpus: soft_nvidia.Gpu, nonce: bytes | None = None, in_hex: bool = False) -> str:
        """The additional evidence of NVIDIA devices."""
        entries = []
        for gpu in gpus:
            made = soft_nvidia.evidence(gpu, self.device_nonce() if nonce is None else nonce)
            entries.append(
                {
                    "arch": "HOPPER",
                    "uuid": "GPU-0",
                    "evidence": made.quote.hex() if in_hex else base64.b64encode(made.quote).decode(),
                    "certificate": base64.b64encode(made.parts["chain"]).decode(),
                }
            )
        return json.dumps({"nvidia": {"device_evidence_list": entries}})

    def attestation(self, additional: str = "") -> dict[str, Any]:
        value: dict[str, Any] = {
            "runtime-data": self.runtime_data(),
            "tee-evidence": {
                "primary_evidence": self.guest.evidence(self.report_data(additional)),
                "additional_evidence": additional,
            },
        }
        if self.guest.document is not None:
            value["init-data"] = {"format": "toml", "body": self.guest.document}
        return value

    def attest(self, value: Any = None) -> Answer:
        body = json.dumps(self.attestation() if value is None else value).encode()
        answer = self.http("POST", "/kbs/v0/attest", body)
        if answer.status == 200:
            self.token = answer.json["token"]
        return answer

    def resource(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        return self.http("GET", f"/kbs/v0/resource/{path}", headers=headers)

    def ready(self) -> KbsClient:
        assert self.auth().status == 200
        answer = self.attest()
        assert answer.status == 200, answer.body
        return self
