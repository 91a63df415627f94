"""Signed notes: against a vector of another implementation, an independent verifier, and one fault each."""

from __future__ import annotations

import base64
import hashlib
import pickle

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from cloister.broker.log.checkpoint import Checkpoint, add_lines, open_checkpoint, parse_body, sign
from cloister.crypto.keys import Secret
from cloister.crypto.note import COSIGNATURE, NoteError, Signer, Verifier, open_note, split
from cloister.errors import TamperedError
from tests.broker.log.samples import LOG, ORIGIN, OTHER, WITNESS

# Documentation of the Go package golang.org/x/mod/sumdb/note, the format's first implementation.
GO_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_SEED = base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]
GO_TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
GO_NOTE = (
    f"{GO_TEXT}\n"
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
).encode()

BODY = Checkpoint(ORIGIN, 7, bytes(range(32)))


def plain_verify(data: bytes, vkey: str) -> str:
    """A second verifier, from the specification alone: the text, if `vkey` signed the note."""
    name, key_id, key = vkey.split("+", 2)
    blob = base64.b64decode(key)
    assert hashlib.sha256(name.encode() + b"\n" + blob).digest()[:4].hex() == key_id
    text, _, lines = data.decode().rpartition("\n\n")
    for line in lines.splitlines():
        _, who, signature = line.split(" ")
        raw = base64.b64decode(signature)
        if who == name and raw[:4].hex() == key_id:
            head = f"cosignature/v1\ntime {int.from_bytes(raw[4:12], 'big')}\n" if blob[0] == 4 else ""
            Ed25519PublicKey.from_public_bytes(blob[1:]).verify(raw[-64:], (head + text + "\n").encode())
            return text + "\n"
    raise AssertionError("not signed")


def test_the_go_implementations_note_opens_and_is_made_again() -> None:
    assert open_note(GO_NOTE, [Verifier.parse(GO_KEY)]).text == GO_TEXT
    assert Signer("PeterNeumann", Secret(GO_SEED)).sign(GO_TEXT) == GO_NOTE
    assert str(Signer("PeterNeumann", Secret(GO_SEED)).verifier) == GO_KEY


def test_an_independent_verifier_accepts_checkpoints_and_cosignatures() -> None:
    data = sign(BODY, LOG)
    data = add_lines(data, [WITNESS.line(BODY.body(), time=1_790_000_000)])
    assert plain_verify(data, str(LOG.verifier)) == BODY.body()
    assert plain_verify(data, str(WITNESS.verifier)) == BODY.body()
    signed = open_checkpoint(data, LOG.verifier, witnesses=[WITNESS.verifier])
    assert signed.checkpoint == BODY
    assert signed.cosigned == ((WITNESS.name, 1_790_000_000),)


def test_the_same_key_has_another_id_as_a_witness() -> None:
    as_log = Signer(WITNESS.name, Secret(b"W" * 32)).verifier
    assert as_log.public == WITNESS.verifier.public
    assert as_log.key_id != WITNESS.verifier.key_id


@given(st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]) | st.just("\n"), max_size=200))
def test_what_is_signed_opens_to_the_same_text(text: str) -> None:
    text += "\n"
    data = LOG.sign(text)
    assert open_note(data, [LOG.verifier]).text == text
    assert plain_verify(data, str(LOG.verifier)) == text
    assert split(data)[0] == text


@given(st.data())
def test_every_changed_byte_is_refused(draw: st.DataObject) -> None:
    data = bytearray(sign(BODY, LOG))
    at = draw.draw(st.integers(0, len(data) - 1))
    data[at] ^= draw.draw(st.integers(1, 255))
    with pytest.raises(TamperedError):
        open_checkpoint(bytes(data), LOG.verifier)


def line(data: bytes) -> bytes:
    return data[data.rindex("—".encode()) :]


SIGNED = sign(BODY, LOG)
FAULTS = {
    "no signature": (SIGNED[: -len(line(SIGNED))], "no signatures"),
    "no empty line": (SIGNED.replace(b"\n\n", b"\n"), "empty line"),
    "no final newline": (SIGNED[:-1], "newline"),
    "carriage return": (SIGNED.replace(b"7\n", b"7\r\n"), "control"),
    "not UTF-8": (b"\xff" + SIGNED, "UTF-8"),
    "signed by another key of this name": (sign(BODY, OTHER), "no known key"),
    "hyphen for the dash": (SIGNED.replace("—".encode(), b"-"), "form"),
    "two spaces": (SIGNED.replace("— ".encode(), "—  ".encode()), "form"),
    "no base64": (SIGNED[:-3] + b"*=\n", "base64"),
    "other spelling of the base64": (SIGNED[:-1] + b"====\n", "base64"),
    "signed twice": (SIGNED + line(SIGNED), "twice"),
    "too long": (b"x" * 70_000 + SIGNED, "bytes"),
    "too many lines": (SIGNED + OTHER.line(BODY.body()).encode() * 70, "signatures"),
    "text appended before the signature": (SIGNED.replace(b"\n\n", b"\nextra\n\n"), "verify"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_refuses_a_note(fault: str) -> None:
    data, word = FAULTS[fault]
    with pytest.raises(NoteError, match=word):
        open_note(data, [LOG.verifier])


def test_a_wrong_line_of_a_known_key_spoils_the_note_though_another_is_right() -> None:
    wrong = WITNESS.line(Checkpoint(ORIGIN, 8, BODY.root).body(), time=5)
    data = add_lines(SIGNED, [wrong])
    assert open_note(data, [LOG.verifier]).text == BODY.body()
    with pytest.raises(NoteError, match="witness"):
        open_note(data, [LOG.verifier, WITNESS.verifier])


def test_the_time_of_a_cosignature_is_signed() -> None:
    signed = WITNESS.line(BODY.body(), time=1_790_000_000)
    blob = bytearray(base64.b64decode(signed.split(" ")[2]))
    blob[11] ^= 1
    forged = f"— {WITNESS.name} {base64.b64encode(blob).decode()}\n"
    with pytest.raises(NoteError, match="verify"):
        open_note(add_lines(SIGNED, [forged]), [WITNESS.verifier])


def test_witnesses_alone_do_not_make_a_checkpoint() -> None:
    data = f"{BODY.body()}\n{WITNESS.line(BODY.body(), time=1)}".encode()
    with pytest.raises(TamperedError, match="not signed by the log"):
        open_checkpoint(data, LOG.verifier, witnesses=[WITNESS.verifier])


def test_a_checkpoint_of_another_origin_is_refused_though_the_key_signed_it() -> None:
    body = Checkpoint("other.example/log", 7, BODY.root).body()
    with pytest.raises(TamperedError, match="another log"):
        open_checkpoint(LOG.sign(body), LOG.verifier)


@pytest.mark.parametrize(
    "text",
    [
        f"{ORIGIN}\n07\n{base64.b64encode(BODY.root).decode()}\n",
        f"{ORIGIN}\n+7\n{base64.b64encode(BODY.root).decode()}\n",
        f"{ORIGIN}\n-7\n{base64.b64encode(BODY.root).decode()}\n",
        f"{ORIGIN}\n٧\n{base64.b64encode(BODY.root).decode()}\n",
        f"{ORIGIN}\n7\n{base64.b64encode(BODY.root[:31]).decode()}\n",
        f"{ORIGIN}\n7\n{base64.b64encode(BODY.root).decode()}\nextension\n",
        f"a log\n7\n{base64.b64encode(BODY.root).decode()}\n",
        f"\n7\n{base64.b64encode(BODY.root).decode()}\n",
        f"{ORIGIN}\n7\n",
        "",
    ],
)
def test_one_fault_refuses_a_checkpoint_body(text: str) -> None:
    with pytest.raises(TamperedError):
        parse_body(text)


@pytest.mark.parametrize(
    "text",
    [
        "log",
        "log+00000000+" + str(LOG.verifier).split("+", 2)[2],
        str(LOG.verifier)[:-4],
        str(LOG.verifier).replace(ORIGIN, "other.example"),
        "a b+" + str(LOG.verifier).split("+", 1)[1],
        "x+"
        + hashlib.sha256(b"x\n\x02" + bytes(32)).digest()[:4].hex()
        + "+"
        + base64.b64encode(b"\x02" + bytes(32)).decode(),
        "x+00000000+",
    ],
)
def test_one_fault_refuses_a_verifier_key(text: str) -> None:
    with pytest.raises(NoteError):
        Verifier.parse(text)


@pytest.mark.parametrize("key", [LOG.verifier, WITNESS.verifier])
def test_verifier_keys_read_back(key: Verifier) -> None:
    assert Verifier.parse(str(key)) == key


def test_keys_do_not_show_or_travel() -> None:
    signer = Signer("name", Secret(b"\x5a" * 32), COSIGNATURE)
    assert "5a5a" not in repr(signer)
    assert "ZZZZ" not in repr(signer)
    with pytest.raises(TypeError):
        pickle.dumps(signer)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\nb", "a\u00a0b", "x" * 256])
def test_names_that_would_break_the_format_are_refused(name: str) -> None:
    with pytest.raises(ValueError):
        Signer(name, Secret(bytes(32)))


def test_only_the_log_signs_its_checkpoints() -> None:
    with pytest.raises(ValueError):
        sign(Checkpoint("other.example/log", 0, bytes(32)), LOG)
    with pytest.raises(ValueError):
        sign(Checkpoint(WITNESS.name, 0, bytes(32)), WITNESS)
