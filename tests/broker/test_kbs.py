"""The KBS door against a real broker over TLS: the whole protocol, and every way to get a key that must not leave.

Attacks by name: a replayed answer, a stolen cookie, evidence for another key, init-data that was not launched, a host that names
another workload, a forged token, an algorithm that does not fit its key, floods.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from joserfc import jwe as jose_jwe
from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey

from cloister.attestation.events import Workload
from cloister.attestation.soft import nvidia as soft_nvidia
from cloister.broker.client import BrokerClient, own_measurement
from cloister.broker.kbs import session as kbs_session
from cloister.broker.log import leaf as leaves
from cloister.broker.log.receipt import parse_receipt, verify_receipt
from cloister.broker.main import Config
from cloister.confine.profile import profile
from cloister.crypto.note import Verifier
from cloister.testkit.broker import RunningBroker
from tests.broker.conftest import Clock
from tests.broker.kbs_client import Guest, KbsClient, b64url, close_connections, init_data, jwk_of, open_jwe, unb64url
from tests.broker.world import SERVER, TRAINER, World

ORIGIN = "test.example/kbs"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory, clock: Clock) -> Iterator[RunningBroker]:
    config = Config(
        origin=ORIGIN,
        attester="soft-tdx",
        node_measurements=frozenset({own_measurement(), own_measurement()[:32]}),  # MRENCLAVE has 32 bytes
        allow_soft=True,
        kbs=True,
    )
    running = RunningBroker(tmp_path_factory.mktemp("broker"), config, process=False, clock=clock)
    running.start()
    try:
        yield running
    finally:
        close_connections()
        running.close_clients()
        running.stop()


class Job:
    """An active contract and what its parties know."""

    def __init__(self, client: BrokerClient, name: str) -> None:
        self.client = client
        self.world = World()
        self.contract = self.world.ready(client, self.world.contract(name=name))
        self.name = name
        self.path = f"{name}/train/xrays"


@pytest.fixture(scope="module")
def job(broker: RunningBroker) -> Job:
    return Job(broker.client(), "kbs-job")


def workload(code: str = TRAINER, sandbox: str = "offline", level: str = "L1") -> Workload:
    return Workload(code, sandbox, profile(sandbox).digest(), level)


def guest(**changes: Any) -> Guest:
    values: dict[str, Any] = {"measurement": own_measurement(), "document": init_data(workload())}
    return Guest(**(values | changes))


def client(broker: RunningBroker, **changes: Any) -> KbsClient:
    return KbsClient(broker.url, guest(**changes))


def denial(answer: Any) -> str:
    found = re.search(r"d-[0-9a-f]{12}", answer.detail)
    assert found is not None, answer.detail
    return found[0]


# --- the protocol -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP521R1()),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["P-256", "P-521", "RSA"],
)
def test_auth_attest_resource(broker: RunningBroker, job: Job, key: Any) -> None:
    kbs = client(broker)
    kbs.key = key

    # auth: 32 random bytes as base64, a cookie of 128 bits, Trustee's exact body
    answer = kbs.auth()
    assert answer.status == 200
    assert re.fullmatch(rb'\{"nonce":"[A-Za-z0-9+/]{43}=","extra-params":""\}', answer.body)
    assert len(base64.b64decode(kbs.nonce)) == 32
    cookie = answer.headers["set-cookie"]
    assert re.fullmatch(r"kbs-session-id=[0-9a-f]{32}; Expires=\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", cookie)
    assert answer.headers["content-type"] == "application/json"

    # attest: an EAR that names the key
    answer = kbs.attest()
    assert answer.status == 200, answer.body
    assert set(answer.json) == {"token"}
    assert answer.body == b'{"token":"' + kbs.token.encode() + b'"}'
    (public,) = kbs.http("GET", "/kbs/v0/jwks").json["keys"]
    body = jwt.decode(kbs.token, ECKey.import_key(public), algorithms=["ES256"]).claims
    assert unb64url(body["eat_nonce"]) == base64.b64decode(kbs.nonce)
    assert unb64url(body["cnf"]["cloister.key-sha256"]) == hashlib.sha256(rfc8785.dumps(jwk_of(key))).digest()
    assert body["submods"]["cpu0"]["cloister.tee"] == "soft-tdx"
    assert body["submods"]["cpu0"]["ear.status"] == "warning"  # software never affirms
    assert 0 < body["exp"] - body["iat"] <= 300

    # resource: the key of the volume, readable by the attested key only
    answer = kbs.resource(job.path)
    assert answer.status == 200, answer.body
    secret = open_jwe(answer.json, key)
    assert secret == job.world.xrays_key.reveal()
    assert secret not in answer.body

    # the same again is the same answer and no second release; the token does what the cookie does
    size = job.client.checkpoint()
    assert kbs.resource(job.path).body == answer.body
    assert kbs.resource(job.path, {"authorization": f"Bearer {kbs.token}"}).body == answer.body
    assert job.client.checkpoint() == size

    # a release like any other: in the log, with a receipt, under a lease that nobody holds the secret of
    receipt = base64.b64decode(answer.headers["cloister-receipt"])
    entry = verify_receipt(parse_receipt(receipt), Verifier.parse(job.client.broker.config.log_key))
    assert isinstance(entry, leaves.Release)
    assert (entry.contract, entry.phase, entry.writes) == (job.contract, "train", ())
    assert [ref.asset for ref in entry.reads] == ["xrays"]
    assert (entry.code, entry.sandbox, entry.tee) == (TRAINER, "offline", "soft-tdx")
    assert entry.hpke_key == "sha256:" + hashlib.sha256(rfc8785.dumps(jwk_of(key))).hexdigest()


def test_a_josé_library_reads_the_resource(broker: RunningBroker, job: Job) -> None:
    """A second implementation: joserfc, which knows nothing of guest components."""
    keys: list[tuple[Any, Any]] = [
        (ec.generate_private_key(ec.SECP256R1()), ECKey),
        (ec.generate_private_key(ec.SECP521R1()), ECKey),
        (rsa.generate_private_key(65537, 2048), RSAKey),
    ]
    for key, kind in keys:
        kbs = client(broker)
        kbs.key = key
        reply = kbs.ready().resource(job.path).json
        registry = jose_jwe.JWERegistry(algorithms=["ECDH-ES+A256KW", "RSA-OAEP-256", "A256GCM"])
        opened = jose_jwe.decrypt_json(reply, kind.import_key(key), registry=registry)
        assert opened.plaintext == job.world.xrays_key.reveal()


def test_golden_bytes_of_what_is_hashed() -> None:
    """The runtime data of one session, as serde_json_canonicalizer writes it, by hand."""
    made = KbsClient("https://x", Guest(b"\x00" * 48), ec.derive_private_key(1, ec.SECP256R1()), nonce="AAAA")
    x, y = "axfR8uEsQkf4vOblY6RA8ncDfYEt6zOg9KE5RdiYwpY", "T-NC4v4af5uO5-tKfA-eFivOM1drMV7Oy7ZAaDe_UfU"
    text = (
        '{"additional-evidence":"","nonce":"AAAA","tee-pubkey":'
        f'{{"alg":"ECDH-ES+A256KW","crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}}}'
    )
    assert made.report_data() == hashlib.sha384(text.encode()).digest() + bytes(16)
    from cloister.broker.kbs import wire

    found = wire.attestation(json.dumps(made.attestation()).encode())
    assert found.report_data() == made.report_data()
    devices = text.replace('"additional-evidence":"",', "")
    assert found.device_nonce() == hashlib.sha384(devices.encode()).digest()[:32]


def test_the_protected_header_is_serdes_byte_for_byte(broker: RunningBroker, job: Job) -> None:
    reply = client(broker).ready().resource(job.path).json
    header = unb64url(reply["protected"]).decode()
    form = r'\{"alg":"ECDH-ES\+A256KW","enc":"A256GCM","epk":\{"crv":"P-256","kty":"EC","x":"[\w-]{43}","y":"[\w-]{43}"\}\}'
    assert re.fullmatch(form, header)
    assert [len(unb64url(reply[name])) for name in ("encrypted_key", "iv", "ciphertext", "tag")] == [40, 12, 32, 16]


def test_a_contract_by_name_or_digest(broker: RunningBroker, job: Job) -> None:
    kbs = client(broker).ready()
    for repository in (job.name, job.contract, job.contract.replace(":", "-")):
        answer = kbs.resource(f"{repository}/train/backbone")
        assert open_jwe(answer.json, kbs.key) == job.world.backbone_key.reveal()


def test_the_broker_says_in_its_evidence_that_this_door_is_open(job: Job) -> None:
    assert job.client.broker.config.kbs


# --- other hardware ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tee", ["snp", "sgx"])
def test_other_hardware_walks_the_same_way(broker: RunningBroker, job: Job, tee: str) -> None:
    kbs = client(broker, tee=tee).ready()
    (public,) = kbs.http("GET", "/kbs/v0/jwks").json["keys"]
    body = jwt.decode(kbs.token, ECKey.import_key(public), algorithms=["ES256"]).claims
    assert body["submods"]["cpu0"]["cloister.tee"] == {"snp": "soft-sev-snp", "sgx": "soft-sgx"}[tee]
    assert open_jwe(kbs.resource(job.path).json, kbs.key) == job.world.xrays_key.reveal()
    # bound to this session all the same, and to its own launch register
    other = client(broker, tee=tee)
    other.auth()
    stolen = kbs.attestation()
    stolen["runtime-data"]["nonce"] = other.nonce
    assert other.attest(stolen).error == "AttestationError"
    register = {"snp": "host_data", "sgx": "configid"}[tee]
    assert f"kbs.init-data.{register}" in refused(broker, job, tee=tee, launched=b"\x01" * 32)


@pytest.mark.parametrize("in_hex", [False, True])
def test_gpus_are_bound_to_the_session_and_the_cpu_to_them(broker: RunningBroker, in_hex: bool) -> None:
    world = World()
    place = '[place.enclave]\nkind = "tee"\naccept = ["simulated"]\ngpu = "confidential"\n'
    text = world.contract(name=f"kbs-gpu-{int(in_hex)}").decode()
    text = re.sub(r"\[place\]\nenclave = .*\n", place, text)
    world.ready(broker.client(), text.encode())
    path = f"kbs-gpu-{int(in_hex)}/train/xrays"
    gpu = soft_nvidia.gpu()

    bare = client(broker).ready()
    assert "place.enclave.gpu" in bare.resource(path).detail

    kbs = client(broker)
    kbs.auth()
    answer = kbs.attest(kbs.attestation(kbs.gpus(gpu, in_hex=in_hex)))
    assert answer.status == 200, answer.body
    assert open_jwe(kbs.resource(path).json, kbs.key) == world.xrays_key.reveal()

    # a report for another session, one GPU shown as two, and a GPU less than the CPU vouched for
    kbs = client(broker)
    kbs.auth()
    assert "kbs.additional_evidence.0.nonce" in kbs.attest(kbs.attestation(kbs.gpus(gpu, nonce=bytes(32)))).detail
    kbs.auth()
    value = kbs.attestation(kbs.gpus(gpu))
    value["tee-evidence"]["additional_evidence"] = kbs.gpus(gpu, gpu)
    assert "evidence.devices.1" in kbs.attest(value).detail
    kbs.auth()
    value = kbs.attestation(kbs.gpus(gpu))
    value["tee-evidence"]["additional_evidence"] = ""
    assert "kbs.report_data" in kbs.attest(value).detail


@pytest.mark.parametrize("tee", ["sample", "sampledevice", "tpm", "az-snp-vtpm", "tdx2", ""])
def test_other_tees_are_refused_by_name(broker: RunningBroker, tee: str) -> None:
    answer = client(broker).auth(tee=tee)
    assert (answer.status, answer.error) == (401, "AttestationError")
    assert "kbs.tee" in answer.detail


# --- attacks: the session ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.1.1", "0.3.0", "0.4", "0.4.1", "1.0.0", "0.4.0 ", ""])
def test_another_version_is_refused(broker: RunningBroker, version: str) -> None:
    answer = client(broker).auth(version=version)
    assert (answer.status, answer.error) == (401, "AttestationError")
    assert "set-cookie" not in answer.headers


def test_a_replayed_answer_is_refused(broker: RunningBroker) -> None:
    """The answer of one session in another one: the nonce is part of it, and hashed."""
    first = client(broker)
    first.auth()
    recorded = first.attestation()
    second = client(broker)
    second.key = first.key
    second.auth()
    answer = second.attest(recorded)
    assert (answer.status, answer.error) == (401, "AttestationError")
    assert denial(answer)
    # and with the nonce exchanged, the hardware did not sign it
    second.auth()
    recorded["runtime-data"]["nonce"] = second.nonce
    assert "kbs.report_data" in second.attest(recorded).detail


def test_a_challenge_takes_one_answer(broker: RunningBroker) -> None:
    kbs = client(broker)
    kbs.auth()
    good = kbs.attestation()
    bad = json.loads(json.dumps(good))
    bad["runtime-data"]["nonce"] = base64.b64encode(bytes(32)).decode()
    assert kbs.attest(bad).status == 401
    answer = kbs.attest(good)
    assert (answer.status, answer.error) == (401, "TokenNotFound")


def test_the_same_answer_again_gets_the_same_token_and_another_one_nothing(broker: RunningBroker) -> None:
    kbs = client(broker)
    kbs.auth()
    value = kbs.attestation()
    first = kbs.attest(value)
    assert kbs.attest(value).body == first.body
    value["runtime-data"]["tee-pubkey"] = jwk_of(ec.generate_private_key(ec.SECP256R1()))
    assert kbs.attest(value).error == "TokenNotFound"


def test_an_old_challenge_is_refused(broker: RunningBroker, clock: Clock) -> None:
    kbs = client(broker)
    kbs.auth()
    value = kbs.attestation()
    clock.ahead = timedelta(seconds=61)
    assert kbs.attest(value).error == "TokenNotFound"


def test_a_session_ends(broker: RunningBroker, job: Job, clock: Clock) -> None:
    kbs = client(broker).ready()
    assert kbs.resource(job.path).status == 200
    clock.ahead = kbs_session.SESSION_LIFE + timedelta(seconds=1)
    for headers in (None, {"authorization": f"Bearer {kbs.token}"}):
        answer = kbs.resource(job.path, headers)
        assert (answer.status, answer.error) == (401, "TokenNotFound")


@pytest.mark.parametrize(
    "cookie", ["", "kbs-session-id=", "kbs-session-id=" + "0" * 32, "other=1", "kbs-session-id=\u00e9"]
)
def test_without_a_session_nothing_is_said(broker: RunningBroker, job: Job, cookie: str) -> None:
    kbs = client(broker)
    kbs.cookie = cookie
    for path in (job.path, "unknown/train/xrays", "%2e%2e/a/b"):
        answer = kbs.resource(path)
        assert (answer.status, answer.error) == (401, "TokenNotFound")
    assert kbs.attest({"x": 1}).error in ("TokenNotFound",)


def test_a_challenged_session_gets_no_resource(broker: RunningBroker, job: Job) -> None:
    kbs = client(broker)
    kbs.auth()
    assert kbs.resource(job.path).error == "TokenNotFound"


def test_a_stolen_cookie_gets_only_what_the_tee_can_read(broker: RunningBroker, job: Job) -> None:
    victim = client(broker).ready()
    thief = client(broker)
    thief.cookie = victim.cookie
    answer = thief.resource(job.path)
    assert answer.status == 200
    with pytest.raises(Exception):  # noqa: B017  # whatever a wrong key makes of it
        open_jwe(answer.json, thief.key)
    assert open_jwe(answer.json, victim.key) == job.world.xrays_key.reveal()


def test_forged_tokens_find_no_session(broker: RunningBroker, job: Job) -> None:
    kbs = client(broker).ready()
    header, body, signature = kbs.token.split(".")
    none = b64url(json.dumps({"alg": "none", "typ": "JWT"}).encode())
    own = jwt.encode({"alg": "ES256"}, json.loads(unb64url(body)), ECKey.generate_key("P-256"))
    for token in (f"{none}.{body}.", f"{header}.{body}.{signature[:-2]}AA", own, "", "x" * 9000):
        answer = kbs.resource(job.path, {"authorization": f"Bearer {token}"})
        assert (answer.status, answer.error) == (401, "TokenNotFound")
    assert kbs.resource(job.path, {"authorization": f"Basic {kbs.token}"}).status == 401


# --- attacks: evidence and key ----------------------------------------------------------------------------------------


def test_evidence_for_another_tee_key_is_refused(broker: RunningBroker) -> None:
    """A relay puts its own key where the guest's was."""
    kbs = client(broker)
    kbs.auth()
    value = kbs.attestation()
    value["runtime-data"]["tee-pubkey"] = jwk_of(ec.generate_private_key(ec.SECP256R1()))
    answer = kbs.attest(value)
    assert (answer.status, answer.error) == (401, "AttestationError")
    assert "kbs.report_data" in answer.detail


def test_additional_evidence_is_part_of_what_is_signed(broker: RunningBroker) -> None:
    kbs = client(broker)
    kbs.auth()
    value = kbs.attestation()
    value["tee-evidence"]["additional_evidence"] = "{}"
    answer = kbs.attest(value)
    assert (answer.status, answer.error) == (401, "AttestationError")
    kbs.auth()
    for text in (
        "x", "[]", "{}", '{"nvidia":{}}', '{"nvidia":{"device_evidence_list":[]}}', '{"nvidia":{"device_evidence_list":[1]}}',
        '{"nvidia":{"device_evidence_list":[{"arch":"","uuid":"","evidence":"%","certificate":""}]}}', '{"tpm":{}}',
        '{"nvidia":{"device_evidence_list":[{"arch":"","uuid":"","evidence":"AAAA","certificate":"AAAA"}]}}',
    ):  # fmt: skip
        kbs.auth()
        answer = kbs.attest(kbs.attestation(text))
        assert (answer.status, answer.error) == (401, "AttestationError")


def test_a_changed_quote_is_refused(broker: RunningBroker) -> None:
    kbs = client(broker)
    kbs.auth()
    value = kbs.attestation()
    quote = bytearray(base64.b64decode(value["tee-evidence"]["primary_evidence"]["quote"]))
    quote[48 + 136] ^= 1  # MRTD
    value["tee-evidence"]["primary_evidence"]["quote"] = base64.b64encode(quote).decode()
    answer = kbs.attest(value)
    assert (answer.status, answer.error) == (401, "AttestationError")
    record = broker.client().denial(denial(answer))
    assert record.operation == "release"
    assert record.error == "evidence-not-authentic"


def test_a_debug_guest_is_refused(broker: RunningBroker) -> None:
    kbs = client(broker, debug=True)
    kbs.auth()
    assert kbs.attest().status == 401


def test_a_guest_that_extended_its_runtime_register_is_refused(broker: RunningBroker) -> None:
    kbs = client(broker, rtmr3=b"\x01" * 48)
    kbs.auth()
    assert "replay" in kbs.attest().detail


BAD_KEYS: dict[str, dict[str, str] | list[str]] = {
    "EC key for RSA": jwk_of(ec.generate_private_key(ec.SECP256R1())) | {"alg": "RSA-OAEP-256"},
    "RSA key for ECDH": jwk_of(rsa.generate_private_key(65537, 2048)) | {"alg": "ECDH-ES+A256KW"},
    "RSA1_5": jwk_of(rsa.generate_private_key(65537, 2048)) | {"alg": "RSA1_5"},
    "none": jwk_of(ec.generate_private_key(ec.SECP256R1())) | {"alg": "none"},
    "dir": jwk_of(ec.generate_private_key(ec.SECP256R1())) | {"alg": "dir"},
    "ECDH-ES": jwk_of(ec.generate_private_key(ec.SECP256R1())) | {"alg": "ECDH-ES"},
    "P-384": jwk_of(ec.generate_private_key(ec.SECP384R1())),
    "another curve's name": jwk_of(ec.generate_private_key(ec.SECP256R1())) | {"crv": "P-521"},
    "a point off the curve": jwk_of(ec.generate_private_key(ec.SECP256R1())) | {"x": b64url(b"\x01" * 32)},
    "the zero point": jwk_of(ec.generate_private_key(ec.SECP256R1()))
    | {"x": b64url(bytes(32)), "y": b64url(bytes(32))},
    "a short coordinate": jwk_of(ec.generate_private_key(ec.SECP256R1())) | {"x": b64url(bytes(31))},
    "padding": jwk_of(ec.generate_private_key(ec.SECP256R1())) | {"x": b64url(bytes(32)) + "="},
    "a private key": jwk_of(ec.generate_private_key(ec.SECP256R1())) | {"d": b64url(bytes(32))},
    "RSA 1024": jwk_of(rsa.generate_private_key(65537, 1024)),
    "RSA exponent 1": jwk_of(rsa.generate_private_key(65537, 2048)) | {"e": b64url(b"\x01")},
    "RSA even modulus": jwk_of(rsa.generate_private_key(65537, 2048)) | {"n": b64url(b"\x80" + bytes(255))},
    "a symmetric key": {"kty": "oct", "k": "AAAA", "alg": "A256KW"},
    "a list": ["EC"],
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_keys_that_no_secret_may_be_encrypted_to(broker: RunningBroker, name: str) -> None:
    kbs = client(broker)
    kbs.auth()
    value = kbs.attestation()
    value["runtime-data"]["tee-pubkey"] = BAD_KEYS[name]
    answer = kbs.attest(value)
    assert (answer.status, answer.error) == (401, "AttestationError")
    assert kbs.resource("a/b/c").error == "TokenNotFound"


# --- attacks: the workload --------------------------------------------------------------------------------------------


def refused(broker: RunningBroker, job: Job, **changes: Any) -> str:
    """Attest a genuine guest, ask for a key, return why there is none."""
    kbs = client(broker, **changes).ready()
    answer = kbs.resource(job.path)
    assert (answer.status, answer.error) == (403, "PolicyDeny")
    assert "ciphertext" not in answer.json
    assert denial(answer)
    return answer.detail


def test_without_init_data_there_is_no_workload_and_no_key(broker: RunningBroker, job: Job) -> None:
    text = refused(broker, job, document=None)
    assert "kbs.init-data" in text
    assert "no init-data" in text


def test_init_data_that_was_not_launched_does_not_count(broker: RunningBroker, job: Job) -> None:
    """The guest shows a good document; its launch register holds the digest of another one, or nothing."""
    assert "kbs.init-data.mrconfigid" in refused(broker, job, launched=b"\x01" * 48)
    assert "kbs.init-data.mrconfigid" in refused(broker, job, launched=bytes(48))


def test_a_host_that_launches_another_workload_gets_no_key(broker: RunningBroker, job: Job) -> None:
    """Bound and signed, and not what the contract names: the contract decides."""
    text = refused(broker, job, document=init_data(workload(SERVER, "one-shot", "L2")))
    assert "code" in text
    weaker = Workload(TRAINER, "offline", b"\x00" * 32, "L1")
    assert "workload.profile" in refused(broker, job, document=init_data(weaker))


@pytest.mark.parametrize(
    ("document", "wanted"),
    [
        (init_data(None), "no such entry"),
        (init_data(None) + '"cloister.workload" = "zz"\n', "non-hexadecimal"),
        (init_data(None) + '"cloister.workload" = "a0"\n', "another shape"),
        (init_data(None) + f'"cloister.workload" = "{workload().encode().hex().upper()}"\n', "lower-case"),
        (init_data(None) + f'"cloister.workload" = "{"00" * 9000}"\n', "too long"),
        (init_data(workload()).replace("0.1.0", "0.2.0"), "another shape"),
        (init_data(workload()).replace('"sha384"', '"md5"'), "algorithm"),
        (init_data(workload(), more='extra = "1"'), "another shape"),
        (init_data(workload()) + "number = 1\n", "no text"),
        (init_data(workload()) + "not toml", "kbs.init-data"),
        ("x = " + "[" * 3000, "kbs.init-data"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_init_data_that_states_no_workload(broker: RunningBroker, job: Job, document: str, wanted: str) -> None:
    assert wanted in refused(broker, job, document=document)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_digest_is_padded_or_cut_to_the_register(broker: RunningBroker, job: Job, algorithm: str) -> None:
    document = init_data(workload(), algorithm=algorithm)
    kbs = client(broker, document=document, algorithm=algorithm).ready()
    assert open_jwe(kbs.resource(job.path).json, kbs.key) == job.world.xrays_key.reveal()


def test_other_software_than_a_node_gets_a_token_and_no_key(broker: RunningBroker, job: Job) -> None:
    """A genuine guest with a stock image: the init-data says the right words, and nobody in it keeps them."""
    assert "node.mrtd" in refused(broker, job, measurement=b"\x77" * 48)


# --- the contract -----------------------------------------------------------------------------------------------------


def test_what_is_not_there(broker: RunningBroker, job: Job) -> None:
    kbs = client(broker).ready()
    for path in (
        "unknown/train/xrays",
        "sha256-" + "0" * 64 + "/train/xrays",
        "UPPER/train/xrays",
        "a/b/c%2fd",
        "..%2f/b/c",
    ):
        answer = kbs.resource(path)
        assert (answer.status, answer.error) == (404, "InvalidRequestPath"), path
    for path in ("kbs/v0", "kbs/v0/resource", "kbs/v0/resource/a/b", "kbs/v0/attestation-policy", "kbs/v1/auth"):
        for method in ("GET", "POST"):
            assert kbs.http(method, "/" + path).error == "InvalidRequestPath"
    assert kbs.http("GET", "/kbs/v0/auth").status == 404
    assert kbs.http("POST", "/kbs/v0/resource/a/b/c", b"x").status == 404  # nobody registers secrets here


@pytest.mark.parametrize("path", ["train/detector", "serve/detector", "train/nothing", "nothing/xrays"])
def test_assets_that_the_phase_does_not_read(broker: RunningBroker, job: Job, path: str) -> None:
    kbs = client(broker).ready()
    answer = kbs.resource(f"{job.name}/{path}")
    assert (answer.status, answer.error) == (403, "PolicyDeny")


def test_an_unsigned_contract_releases_nothing(broker: RunningBroker) -> None:
    made = broker.client()
    world = World()
    status = made.submit_contract(world.contract(name="kbs-unsigned"), name="u.toml")
    world.deposit(made)
    kbs = client(broker).ready()
    answer = kbs.resource("kbs-unsigned/train/xrays")
    assert (answer.status, answer.error) == (403, "PolicyDeny")
    assert "signatures" in answer.detail
    made.add_signature(
        status.contract, world.hospital.sign(world.contract(name="kbs-unsigned"), namespace="contract@cloister")
    )
    assert kbs.resource("kbs-unsigned/train/xrays").status == 403


def test_a_place_that_wants_hardware_gets_no_soft_guest(broker: RunningBroker) -> None:
    made = broker.client()
    world = World()
    world.ready(made, world.contract(name="kbs-hardware", accept='"tdx"'))
    answer = client(broker).ready().resource("kbs-hardware/train/xrays")
    assert (answer.status, answer.error) == (403, "PolicyDeny")
    assert "place.enclave" in answer.detail


def test_a_key_that_was_never_deposited(broker: RunningBroker) -> None:
    made = broker.client()
    world = World()
    world.signed(made, world.contract(name="kbs-no-key"))
    answer = client(broker).ready().resource("kbs-no-key/train/xrays")
    assert answer.status == 403
    assert "key.xrays" in answer.detail


# --- hostile bodies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["auth", "attest"])
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"1", b'"x"', b"{}", b"\xff\xfe", b'{"a":1,"a":2}', b"[" * 100_000, b"9" * 5000,
        b'{"version":"0.4.0","tee":["tdx"],"extra-params":""}', b'{"version":0.4,"tee":"tdx","extra-params":""}',
        b'{"version":"0.4.0","tee":"tdx"}',
        b'{"runtime-data":{"nonce":"\\ud800","tee-pubkey":{}},"tee-evidence":{"primary_evidence":{},"additional_evidence":""}}',
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_bodies_of_another_form(broker: RunningBroker, path: str, body: bytes) -> None:
    kbs = client(broker)
    kbs.auth()
    answer = kbs.http("POST", f"/kbs/v0/{path}", body)
    assert (answer.status, answer.error) == (401, "AttestationError")


def test_text_without_a_utf_8_form_has_no_hash(broker: RunningBroker) -> None:
    kbs = client(broker)
    kbs.auth()
    value = kbs.attestation()
    value["tee-evidence"]["additional_evidence"] = "\ud800"
    assert kbs.attest(value).error == "AttestationError"
    kbs.auth()
    value = kbs.attestation()
    value["init-data"]["body"] = "\ud800"
    assert kbs.attest(value).error == "AttestationError"


def test_oversized_bodies_are_cut_off(broker: RunningBroker) -> None:
    kbs = client(broker)
    kbs.auth()
    for path in ("auth", "attest"):
        answer = kbs.http("POST", f"/kbs/v0/{path}", b" " * ((2 << 20) + 1))
        assert (answer.status, answer.error) == (413, "InvalidRequest")
    value = kbs.attestation()
    value["init-data"]["body"] = "x" * (256 * 1024 + 1)
    assert "kbs.init-data" in kbs.attest(value).detail


SHAPES: dict[str, Any] = {
    "no quote": {"cc_eventlog": None},
    "a number": {"quote": 1},
    "not base64": {"quote": "%%%"},
    "empty": {"quote": ""},
    "more": {"quote": "AAAA", "x": 1},
    "a log of another type": {"quote": "AAAA", "cc_eventlog": 1},
}


@pytest.mark.parametrize("name", SHAPES)
def test_evidence_of_another_form(broker: RunningBroker, name: str) -> None:
    kbs = client(broker)
    kbs.auth()
    value = kbs.attestation()
    value["tee-evidence"]["primary_evidence"] = SHAPES[name]
    answer = kbs.attest(value)
    assert (answer.status, answer.error) == (401, "AttestationError")


def test_a_session_asks_for_a_bounded_number_of_keys(
    broker: RunningBroker, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kbs_session, "MAX_RESOURCES", 1)
    kbs = client(broker).ready()
    assert kbs.resource(job.path).status == 200
    answer = kbs.resource(f"{job.name}/train/backbone")
    assert (answer.status, answer.error) == (401, "AttestationError")
    assert kbs.resource(job.path).status == 200
