"""Whatever arrives, the broker answers with a clean refusal (4xx, one ErrorReply) and goes on; it never says 500."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit

import cbor2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister.broker import wire
from cloister.testkit.broker import RunningBroker

POSTS = (
    "attest",
    "nonce",
    "contract",
    "signature",
    "revoke",
    "key",
    "release",
    "renew",
    "register",
    "answer",
    "open",
    "words",
    "listen",
)
GETS = (
    "contracts/{}",
    "contracts/{}/bytes",
    "denial/{}",
    "log/entries?start={}&end={}",
    "log/inclusion?index={}&size={}",
    "log/consistency?old={}&new={}",
)
REQUESTS = {
    "attest": wire.AttestRequest,
    "contract": wire.ContractSubmit,
    "signature": wire.SignatureSubmit,
    "revoke": wire.RevokeRequest,
    "key": wire.KeyDeposit,
    "release": wire.ReleaseRequest,
    "renew": wire.RenewRequest,
    "register": wire.RegisterRequest,
    "answer": wire.AnswerRequest,
    "open": wire.OpenRequest,
    "words": wire.WordsRequest,
    "listen": wire.ListenRequest,
}


@pytest.fixture(scope="module")
def raw(broker: RunningBroker) -> Iterator[http.client.HTTPSConnection]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    parts = urlsplit(broker.url)
    assert parts.hostname
    with contextlib.closing(http.client.HTTPSConnection(parts.hostname, parts.port, context=context, timeout=20)) as c:
        yield c


def send(
    raw: http.client.HTTPSConnection, method: str, path: str, body: bytes | None, media: str = wire.MEDIA_TYPE
) -> tuple[int, bytes]:
    raw.request(method, f"/v1/{path}", body, {"Content-Type": media})
    answer = raw.getresponse()
    return answer.status, answer.read()


def clean(status: int, body: bytes) -> bool:
    error = wire.ErrorReply.decode(body)
    return 400 <= status < 500 and error.as_error().code == error.error


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=80)
    | st.binary(max_size=80)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(path=st.sampled_from([p for p in POSTS if p != "nonce"]), body=st.binary(max_size=400))
def test_bytes_that_are_no_message(raw: http.client.HTTPSConnection, path: str, body: bytes) -> None:
    assert clean(*send(raw, "POST", path, body))


@settings(quick, max_examples=150)
@given(path=st.sampled_from(sorted(REQUESTS)), data=st.data())
def test_maps_with_the_right_keys_and_wrong_values(
    raw: http.client.HTTPSConnection, path: str, data: st.DataObject
) -> None:
    def draw(message: type[wire.Message]) -> dict[str, object]:
        result: dict[str, object] = {}
        for name, field in message.FIELDS.items():
            if isinstance(field, wire.Nested) and data.draw(st.booleans()):
                result[name] = draw(field.message)
            elif isinstance(field, wire.Blob) and data.draw(st.booleans()):
                result[name] = b"\x00" * field.least
            else:
                result[name] = data.draw(values)
        return result

    body = cbor2.dumps(draw(REQUESTS[path]), canonical=True)
    status, answer = send(raw, "POST", path, body)
    assert status == 200 if path == "attest" and status == 200 else clean(status, answer)


@quick
@given(path=st.sampled_from(GETS), text=st.text(alphabet="abz019-:._%/?&=", max_size=90))
def test_paths_and_queries_that_name_nothing(raw: http.client.HTTPSConnection, path: str, text: str) -> None:
    status, body = send(raw, "GET", path.replace("{}", text), None)
    if status == 200:  # a range that exists
        assert path.startswith("log/") or "?" in text
    else:
        assert status in (307, 400, 404)
        assert status == 307 or clean(status, body)


def test_body_beyond_the_cap_is_cut_off(raw: http.client.HTTPSConnection) -> None:
    status, body = send(raw, "POST", "contract", b"\x00" * (wire.MAX_REQUEST + 1))
    assert status == 413
    assert clean(status, body)
    raw.close()


def test_body_without_a_length_is_refused_at_the_cap_before_it_ends(raw: http.client.HTTPSConnection) -> None:
    raw.close()
    raw.connect()
    raw.putrequest("POST", "/v1/contract")
    raw.putheader("Content-Type", wire.MEDIA_TYPE)
    raw.putheader("Transfer-Encoding", "chunked")
    raw.endheaders()
    for _ in range(wire.MAX_REQUEST // 65536 + 1):
        raw.send(b"10000\r\n" + b"\x00" * 65536 + b"\r\n")
    answer = raw.getresponse()  # the last chunk never comes
    assert answer.status == 413
    assert clean(answer.status, answer.read())
    raw.close()


@pytest.mark.parametrize(
    ("method", "path", "media", "status"),
    [
        ("GET", "nothing", wire.MEDIA_TYPE, 404),
        ("GET", "release", wire.MEDIA_TYPE, 405),
        ("PUT", "release", wire.MEDIA_TYPE, 405),
        ("POST", "status", wire.MEDIA_TYPE, 405),
        ("POST", "release", "application/json", 400),
    ],
)
def test_routes_that_do_not_exist(
    raw: http.client.HTTPSConnection, method: str, path: str, media: str, status: int
) -> None:
    found, body = send(raw, method, path, b"" if method != "GET" else None, media)
    assert found == status
    assert clean(found, body)


def test_no_tls_and_half_a_handshake_do_not_stop_the_broker(broker: RunningBroker) -> None:
    parts = urlsplit(broker.url)
    for data in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"\x00" * 4096):
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5) as plain:
            plain.sendall(data)
    assert broker.client().status().entries > 0
