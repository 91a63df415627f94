"""The service as its consumers meet it: forms, budgets, attacks on questions and answers, and bad models.

One broker, one service process per contract. Attacks use the client's own parts, changed in one place each.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.attestation.roots import Roots
from cloister.broker.client import BrokerClient, Trust
from cloister.broker.wire import MEDIA_TYPE, Authorisation, ErrorReply, SessionStatement, query_message
from cloister.contract.edge import Signer
from cloister.contract.parse import parse
from cloister.crypto import hpke
from cloister.crypto.keys import Secret
from cloister.errors import (
    CloisterError,
    DeniedError,
    EvidenceError,
    InputError,
    MachineError,
    PeerError,
    TamperedError,
)
from cloister.serve.answer import read_labels
from cloister.serve.client import ServiceClient
from cloister.serve.wire import ASK_STEP, Ask, AskReply, HelloReply, Query, ask_info, open_outcome, query_digest
from tests.e2e_support import Deal, Person, World, descendants, gone, no_traces, other_broker

pytestmark = pytest.mark.slow

TRUST = Trust(roots=Roots(soft=True), allow_soft=True)


def signer(person: Person) -> Signer:
    return Signer.load(person.home / "id_ed25519")


@contextmanager
def client(
    world: World, deal: Deal, url: str, *, person: str = "clinic", contract: bytes = b"", trust: Trust = TRUST
) -> Iterator[ServiceClient]:
    chosen = parse(contract or deal.file.read_bytes(), name=deal.file.name)
    with (
        BrokerClient.connect(world.url, trust=TRUST, memory=None) as broker,
        ServiceClient.connect(
            url, chosen, party=person, sign=signer(world.people[person]).sign, trust=trust, broker=broker, timeout_s=20
        ) as service,
    ):
        yield service


def post(url: str, path: str, body: bytes) -> tuple[int, bytes]:
    parts = urlsplit(url)
    assert parts.hostname
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
    try:
        connection.request("POST", path, body=body, headers={"Content-Type": MEDIA_TYPE})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


class Question:
    """What the client sends, with every part open to change."""

    def __init__(self, client: ServiceClient, sign: Signer, data: bytes = b"?", **statement: Any) -> None:
        self.session = Ed25519PrivateKey.generate()
        self.key = client._key
        self.contract = client._contract.id
        fields: dict[str, Any] = {
            "service": hashlib.sha256(self.key).digest(),
            "contract": self.contract,
            "session": self.session.public_key().public_bytes_raw(),
            "expires": datetime.now(UTC) + timedelta(minutes=30),
        } | statement
        said = SessionStatement(**fields)
        self.authorisation = Authorisation(said, sign.sign(said.encode(), namespace="ask@cloister"))
        self.id = secrets.token_bytes(16)
        self.data = data
        self.reply_key = Secret.random()

    def query(self) -> Query:
        service = hashlib.sha256(self.key).digest()
        message = query_message(contract=self.contract, service=service, query=query_digest(self.id, self.data))
        return Query(
            self.authorisation,
            self.id,
            self.data,
            self.reply_key,
            self.session.sign(message),
            bytes(-len(self.data) % ASK_STEP),
        )

    def body(self) -> bytes:
        return Ask(hpke.seal(self.query().encode(), to=self.key, info=ask_info(self.contract))).encode()

    def send(self, url: str, body: bytes | None = None) -> CloisterError | dict[str, Any]:
        status, data = post(url, "/v1/ask", self.body() if body is None else body)
        if status != 200:
            return ErrorReply.decode(data).as_error()
        outcome = open_outcome(AskReply.decode(data).sealed, self.reply_key)
        if outcome.refused is not None:
            return outcome.refused.as_error()
        assert outcome.answered is not None
        return {"size": len(data), "left": outcome.answered.left}


@pytest.fixture(scope="module")
def asked(world: World) -> Iterator[tuple[Deal, str]]:
    """One service for everything that does not hurt it: a model that does what the question says."""
    deal = world.deal(model={"do": "ask"}, answer='form = "label", budget = 60')
    with world.service(deal, "--timeout", "1.5") as (url, _):
        yield deal, url


def ask(world: World, deal: Deal, url: str, *words: str, person: str = "clinic", as_json: bool = True) -> Any:
    folder = world.fresh("questions")
    files = []
    for number, word in enumerate(words):
        file = folder / f"q{number}"
        file.write_text(word)
        files.append(str(file))
    return world.people[person].call("ask", str(deal.file), *files, "--service", url, as_json=as_json)


# --- forms, budgets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ('form = "label"', {"label": "b"}),
        ('form = "score", decimals = 2', {"label": "b", "score": 0.88}),
        ('form = "full"', {"label": "b", "scores": {"a": 0.123456789, "b": 0.876543211}}),
    ],
)
def test_only_the_contracts_form_leaves(world: World, form: str, wanted: dict[str, Any]) -> None:
    deal = world.deal(model={}, answer=f"{form}, budget = 5")
    with world.service(deal) as (url, _):
        answer = ask(world, deal, url, "?").expect(0).data["answers"][0]
    assert {name: answer[name] for name in ("label", "score", "scores") if name in answer} == wanted


def test_a_spent_budget_ends_it_and_what_was_paid_is_shown(world: World) -> None:
    deal = world.deal(model={}, answer='form = "label", budget = 2')
    with world.service(deal) as (url, _):
        said = ask(world, deal, url, "1", "2", "3").expect(3).data
        assert said["error"] == "budget-spent"
        assert [answer["left"] for answer in said["answers"]] == [1, 0]
        assert said["reasons"][0]["wanted"] == "at most 2"
        text = ask(world, deal, url, "4", as_json=False).expect(3)
        assert "phase.serve.answer.budget" in text.err
        assert world.clinic.call("why", said["denial_id"]).expect(0).data["error"] == "budget-spent"


def test_a_day_has_its_own_limit(world: World) -> None:
    deal = world.deal(model={}, answer='form = "label", budget = 10, per_day = 1')
    with world.service(deal) as (url, _):
        said = ask(world, deal, url, "1", "2").expect(3).data
        assert said["answers"][0]["left_today"] == 0
        assert "per_day" in said["reasons"][0]["where"]
        assert "tomorrow" in said["reasons"][0]["hint"]


def test_after_the_budget_the_model_is_not_even_asked(world: World) -> None:
    """How long it takes would be one more answer."""
    deal = world.deal(model={"do": "slow"}, answer='form = "label", budget = 1')
    with world.service(deal) as (url, _):
        ask(world, deal, url, "1").expect(0)
        ask(world, deal, url, "2").expect(3)
        with client(world, deal, url) as service:
            begin = time.monotonic()
            with pytest.raises(DeniedError):
                service.ask(b"3")
            assert time.monotonic() - begin < 0.5


def test_a_budget_outlives_the_service(world: World) -> None:
    deal = world.deal(model={}, answer='form = "label", budget = 1')
    with world.service(deal) as (url, _):
        ask(world, deal, url, "1").expect(0)
    with world.service(deal) as (url, _):
        ask(world, deal, url, "2").expect(3)


def test_answers_leave_at_multiples_of_the_contracts_time_whatever_they_say(world: World) -> None:
    deal = world.deal(model={"do": "ask"}, answer='form = "label", budget = 20, every = "250ms"')
    with world.service(deal) as (url, _), client(world, deal, url) as service:
        service.ask(b"first")  # the session is authorised, the connection is open
        for word in ("", "garbage", "slow"):
            try:
                service.ask(word.encode())
            except MachineError:
                assert word == "garbage"
            phase = time.time() % 0.25
            assert phase < 0.1, f"{word}: {phase:.3f} s after a multiple"


def test_answers_and_refusals_have_one_size(world: World) -> None:
    deal = world.deal(model={"do": "ask"}, labels=json.dumps(["a", "b" * 64]), answer='form = "full", budget = 9')
    with world.service(deal) as (url, _), client(world, deal, url) as service:
        sizes = set()
        for word in (b"garbage", b"die", b"x" * 900):
            question = Question(service, signer(world.clinic), word)
            status, data = post(url, "/v1/ask", question.body())
            assert status == 200
            sizes.add(len(data))
        stranger = Question(service, signer(world.lab))
        sizes.add(len(post(url, "/v1/ask", stranger.body())[1]))
    assert len(sizes) == 1


def test_pad_makes_answers_exactly_as_large_as_the_contract_says(world: World) -> None:
    deal = world.deal(model={}, answer='form = "label", budget = 9, pad = "10 KiB"')
    with world.service(deal) as (url, _), client(world, deal, url) as service:
        sizes = {len(post(url, "/v1/ask", Question(service, signer(world.clinic)).body())[1]) for _ in range(2)}
        assert len(sizes) == 1
        assert sizes.pop() > 10 << 10


# --- bad models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["garbage", "two lines", "unknown label", "not a number", "hang", "die", "endless"])
def test_a_bad_model_says_one_thing_only_is_counted_and_replaced(
    world: World, asked: tuple[Deal, str], word: str
) -> None:
    deal, url = asked
    before = ask(world, deal, url, "fine").expect(0).data["answers"][0]["left"]
    said = ask(world, deal, url, word).expect(1).data
    assert said["error"] == "workload-failed"
    assert said["message"] == "the model gave no usable answer; this counted as one, because it says something, too"
    assert said["reasons"] == [
        {"where": "model", "found": "no usable answer", "wanted": "one line in the form 'label'", "hint": ""}
    ]
    after = ask(world, deal, url, "fine").expect(0).data["answers"][0]["left"]
    assert after == before - 2


@pytest.mark.parametrize("do", ["deaf", "die at start"])
def test_a_model_that_never_works_is_no_trap(world: World, do: str) -> None:
    """A program that reads nothing must not hold a question longer than the time limit, however large it is."""
    deal = world.deal(model={"do": do}, answer='form = "label", budget = 5')
    with world.service(deal, "--timeout", "1") as (url, _), client(world, deal, url) as service:
        begin = time.monotonic()
        with pytest.raises(MachineError) as caught:
            service.ask(bytes(3 << 20))
        assert caught.value.code == "workload-failed"
        assert time.monotonic() - begin < 8


def test_a_one_shot_model_has_never_seen_another_question(world: World) -> None:
    deal = world.deal(model={"do": "count"}, answer='form = "score", budget = 20', serve_sandbox="one-shot")
    with world.service(deal, "--spares", "2") as (url, _):
        said = ask(world, deal, url, *"12345").expect(0)
    assert [answer["score"] for answer in said.data["answers"]] == [1.0] * 5


def test_an_offline_model_keeps_its_process(world: World) -> None:
    deal = world.deal(model={"do": "count"}, answer='form = "score", budget = 20')
    with world.service(deal) as (url, _):
        said = ask(world, deal, url, *"123").expect(0)
    assert [answer["score"] for answer in said.data["answers"]] == [1.0, 2.0, 3.0]


def test_a_model_without_labels_is_explained(world: World) -> None:
    deal = world.deal(model={}, labels=None)
    world.cloud.run(*deal.run()).expect(0)
    error = world.cloud.run(*deal.serve()).expect(2).data
    assert error["message"] == "the model says nothing about its labels"
    assert error["reasons"][0]["found"] == "no labels.json"
    assert "labels.json" in error["hint"]


@pytest.mark.parametrize("labels", ["{}", "[]", '["a", "a"]', "[1]", "no json"])
def test_labels_that_cannot_be_used_are_explained(world: World, labels: str) -> None:
    with pytest.raises(InputError, match=r"labels\.json of the model is not"):
        read_labels(labels.encode())


# --- attacks on questions ---------------------------------------------------------------------------------------------


def test_a_recorded_question_is_not_answered_again(world: World, asked: tuple[Deal, str]) -> None:
    deal, url = asked
    with client(world, deal, url) as service:
        question = Question(service, signer(world.clinic))
        body = question.body()
        assert isinstance(question.send(url, body), dict)
        again = question.send(url, body)
        assert isinstance(again, InputError)
        assert "asked before" in again.message
        resealed = question.send(url)  # the same question in a new envelope
        assert isinstance(resealed, InputError)


@pytest.mark.parametrize("who", ["lab", "stranger"])
def test_who_is_not_answered_does_not_reach_the_model(world: World, asked: tuple[Deal, str], who: str) -> None:
    deal, url = asked
    with client(world, deal, url) as service:
        begin = time.monotonic()
        refused = Question(service, signer(world.people[who]), b"hang").send(url)
        assert isinstance(refused, DeniedError)
        assert refused.reasons[0].where == "answer.to"
        assert world.fingerprints["clinic"] in refused.reasons[0].wanted
        assert time.monotonic() - begin < 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("service", b"\x07" * 32),
        ("contract", "sha256:" + "7" * 64),
        ("expires", datetime.now(UTC) - timedelta(seconds=1)),
        ("expires", datetime.now(UTC) + timedelta(hours=9)),
        ("session", b"\x07" * 32),
    ],
)
def test_a_session_for_something_else_is_refused(world: World, asked: tuple[Deal, str], field: str, value: Any) -> None:
    deal, url = asked
    with client(world, deal, url) as service:
        refused = Question(service, signer(world.clinic), **{field: value}).send(url)
    assert isinstance(refused, InputError)
    assert refused.code == "signature-invalid"
    assert refused.reasons[0].where in (f"session.{field}", "session.query")


def test_a_session_signed_by_nobody_is_refused(world: World, asked: tuple[Deal, str]) -> None:
    deal, url = asked
    with client(world, deal, url) as service:
        question = Question(service, signer(world.clinic))
        other = signer(world.clinic).sign(b"another statement", namespace="ask@cloister")
        question.authorisation = replace(question.authorisation, signature=other)
        refused = question.send(url)
        assert isinstance(refused, InputError)
        assert refused.reasons[0].where.startswith("session") or "signature" in refused.reasons[0].where


def test_a_changed_envelope_does_not_open(world: World, asked: tuple[Deal, str]) -> None:
    deal, url = asked
    with client(world, deal, url) as service:
        question = Question(service, signer(world.clinic))
        body = bytearray(question.body())
        body[-20] ^= 1
        refused = question.send(url, bytes(body))
        assert isinstance(refused, PeerError)
        assert refused.code == "protocol"
        swapped = Question(service, signer(world.clinic))
        swapped.contract = "sha256:" + "7" * 64  # sealed for another contract's service
        assert isinstance(swapped.send(url), PeerError)


@pytest.mark.parametrize("body", [b"", b"\x00", b"\xff" * 100, b"{}", b"\xa1" * 5000])
@pytest.mark.parametrize("path", ["/v1/ask", "/v1/service"])
def test_garbage_gets_an_answer_of_the_protocol(asked: tuple[Deal, str], path: str, body: bytes) -> None:
    status, data = post(asked[1], path, body)
    assert status in (400, 413, 502)
    assert ErrorReply.decode(data).error == "protocol"


def test_too_large_a_question_is_refused_before_it_is_read_whole(asked: tuple[Deal, str]) -> None:
    status, data = post(asked[1], "/v1/service", bytes(100_000))
    assert status == 413
    assert "4096" in ErrorReply.decode(data).message


def test_a_changed_or_foreign_reply_is_refused_by_the_client(world: World, asked: tuple[Deal, str]) -> None:
    deal, url = asked
    with client(world, deal, url) as service:
        whole = service._post
        kept: list[bytes] = []

        def bent(path: str, body: bytes) -> bytes:
            data = bytearray(whole(path, body))
            kept.append(bytes(data))
            data[len(data) // 2] ^= 1
            return bytes(data)

        service._post = bent  # type: ignore[method-assign]
        with pytest.raises(PeerError, match="changed on its way"):
            service.ask(b"?")
        service._post = lambda path, body: kept[0]  # type: ignore[method-assign]
        with pytest.raises(PeerError, match="belongs to another question"):
            service.ask(b"?")


# --- what the client refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("{server}", "sha256:" + "5" * 64, "phase.serve.run"),
        ('sandbox = "offline" }\n[data]', 'sandbox = "one-shot" }\n[data]', "sandbox"),
        ('["simulated"]', '["tdx"]', "place.enclave"),
        ("version = 1", "version = 1 ", ""),  # another byte is another contract
    ],
)
def test_the_client_asks_no_service_that_its_contract_does_not_want(
    world: World, asked: tuple[Deal, str], old: str, new: str, where: str
) -> None:
    """The service serves its own contract; the consumer holds another one with the same name."""
    deal, url = asked
    text = deal.file.read_text()
    old = old.replace("{server}", world.digests["server"])
    assert old in text
    changed = (text.replace(old, new) + "\n").encode()
    with pytest.raises((DeniedError, EvidenceError)) as caught, client(world, deal, url, contract=changed):
        pass
    assert "nothing was sent" in caught.value.message


def test_a_soft_service_is_refused_by_who_did_not_name_soft(world: World, asked: tuple[Deal, str]) -> None:
    deal, url = asked
    with pytest.raises(EvidenceError), client(world, deal, url, trust=Trust(roots=Roots())):
        pass
    plain = world.person("clinic", CLOISTER_INSECURE_SOFT_TEE="")
    question = world.fresh("q") / "q"
    question.write_text("?")
    said = plain.call("ask", str(deal.file), str(question), "--service", url)
    assert said.status in (1, 2, 4)
    assert said.status == 4, "the broker is soft, too"


def test_a_receipt_of_another_key_is_refused(world: World, asked: tuple[Deal, str]) -> None:
    """A relay that shows genuine evidence with the receipt of another release."""
    deal, url = asked
    other = world.deal(model={}, answer='form = "label", budget = 1')
    world.cloud.run(*other.run()).expect(0)
    receipts = sorted((world.cloud.home / "receipts").glob("release-*.json"), key=lambda path: path.stat().st_mtime)
    foreign = receipts[-1].read_bytes()
    whole = ServiceClient._post

    def lying(self: ServiceClient, path: str, body: bytes) -> bytes:
        data = whole(self, path, body)
        return replace(HelloReply.decode(data), receipt=foreign).encode() if path == "service" else data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServiceClient, "_post", lying)
        with pytest.raises(TamperedError, match="receipt that is not about it"), client(world, deal, url):
            pass


def test_a_service_that_is_not_there_is_explained(world: World, asked: tuple[Deal, str]) -> None:
    deal, _ = asked
    said = ask(world, deal, "http://127.0.0.1:9", "?", as_json=False).expect(1)
    assert "does not answer" in said.err
    assert "cloister serve" in said.err
    assert ask(world, deal, "ftp://somewhere", "?").expect(2).error == "input"


def test_a_party_that_is_no_consumer_is_told_before_it_asks(world: World, asked: tuple[Deal, str]) -> None:
    deal, url = asked
    said = ask(world, deal, url, "?", person="lab").expect(3).data
    assert "clinic" in json.dumps(said["reasons"])
    outside = ask(world, deal, url, "?", person="stranger").expect(2).data
    assert "not a party" in outside["message"]


# --- life -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_service_and_leaves_nothing(world: World, number: signal.Signals) -> None:
    deal = world.deal(model={}, answer='form = "label", budget = 3')
    world.cloud.run(*deal.run()).expect(0)
    with no_traces(deal, {"records.sealed", "model.sealed", "model.sealed.provenance.json"}):
        with world.service(deal) as (url, child):
            ask(world, deal, url, "?").expect(0)
            family = descendants(child.pid)
            child.send(number)
            said = child.end(20).expect(0)
        assert gone(family)
    assert said.data == {"answered": 1, "refused": 0}


def test_an_answer_under_way_is_finished_first(world: World) -> None:
    deal = world.deal(model={"do": "slow"}, answer='form = "label", budget = 3')
    with world.service(deal) as (url, child), client(world, deal, url) as service:
        got: list[object] = []
        thread = threading.Thread(target=lambda: got.append(service.ask(b"?").said))
        thread.start()
        time.sleep(0.3)
        child.send(signal.SIGTERM)
        thread.join(20)
        assert got == [{"label": "b"}]
        child.end(20).expect(0)


def test_a_revoked_contract_ends_the_service(world: World) -> None:
    with other_broker(world, lease_s=3) as (short, _):
        deal = short.deal(model={})
        with short.service(deal) as (url, child):
            short.hospital.call("contract", "revoke", deal.name).expect(0)
            with client(short, deal, url) as service, pytest.raises(CloisterError):
                service.ask(b"?")
            said = child.end(15).expect(1)
        assert said.error == "lease-lost"


def test_a_port_that_is_taken_is_named(world: World, asked: tuple[Deal, str]) -> None:
    deal, url = asked
    port = url.rpartition(":")[2]
    error = world.cloud.run(*deal.serve("--port", port)).expect(1).data
    assert error["error"] == "busy"
    assert port in error["message"]
    assert "--port 0" in error["hint"]


def test_the_ready_file_appears_whole_or_the_service_does_not_start(world: World, tmp_path: Path) -> None:
    deal = world.deal(model={})
    world.cloud.run(*deal.run()).expect(0)
    error = world.cloud.run(*deal.serve("--ready-file", str(tmp_path))).expect(2).data
    assert str(tmp_path) in error["message"]
