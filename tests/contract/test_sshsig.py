"""SSHSIG: ours checked by ssh-keygen, ssh-keygen's checked by ours, and every way to be wrong."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from cloister.contract import edge, sshsig
from cloister.contract.parse import parse
from cloister.contract.sshsig import CONTRACT, SshKey, mpint, string, verify
from cloister.errors import InputError, MachineError
from tests.contract.samples import NAMES, edited

MESSAGE = b'contract = "x"\n'
FILE_KEYS = {
    "ed25519": ("ed25519", "256"),
    "ecdsa-256": ("ecdsa", "256"),
    "ecdsa-384": ("ecdsa", "384"),
    "ecdsa-521": ("ecdsa", "521"),
    "rsa-3072": ("rsa", "3072"),
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    for name, (kind, bits) in FILE_KEYS.items():
        subprocess.run(
            ["ssh-keygen", "-q", "-t", kind, "-b", bits, "-N", "", "-C", name, "-f", folder / name], check=True
        )
    return {name: folder / name for name in FILE_KEYS}


def openssh_accepts(
    key: SshKey, signature: str, folder: Path, *, message: bytes = MESSAGE, namespace: str = CONTRACT
) -> bool:
    (folder / "allowed").write_text(f'owner namespaces="{namespace}" {key.public_line}\n')
    (folder / "sig").write_text(signature)
    done = subprocess.run(
        ["ssh-keygen", "-Y", "verify", "-f", folder / "allowed", "-I", "owner", "-n", namespace, "-s", folder / "sig"],
        input=message,
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def refused(
    signature: str | bytes, step: str, *, message: bytes = MESSAGE, namespace: str = CONTRACT, user: bool = False
) -> str:
    with pytest.raises(InputError) as caught:
        verify(signature, message, namespace=namespace, require_user_verified=user)
    assert caught.value.code == "signature-invalid"
    assert caught.value.reasons[0].where == f"signature.{step}"
    return str(caught.value.reasons[0])


# security keys in software: PROTOCOL.u2f, what a token would do


@dataclass(frozen=True)
class Token:
    """A FIDO2 token: `sign` makes the signature field of an SSHSIG."""

    key: SshKey
    raw_sign: Callable[[bytes], bytes]
    application: bytes = b"ssh:"

    def sign(self, message: bytes, *, flags: int = 1, counter: int = 7, namespace: str = CONTRACT) -> str:
        signed = sshsig.signed_bytes(message, namespace=namespace)
        hashed = hashlib.sha256(self.application).digest(), hashlib.sha256(signed).digest()
        tail = bytes([flags]) + counter.to_bytes(4)
        raw = self.raw_sign(hashed[0] + tail + hashed[1])
        field = string(self.key.type.encode()) + string(raw) + tail
        return sshsig.armour(self.key.blob, field, namespace=namespace)


def ed25519_token() -> Token:
    private = Ed25519PrivateKey.generate()
    point = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    blob = string(b"sk-ssh-ed25519@openssh.com") + string(point) + string(b"ssh:")
    return Token(SshKey(blob), private.sign)


def ecdsa_token() -> Token:
    private = ec.generate_private_key(ec.SECP256R1())
    point = private.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    blob = string(b"sk-ecdsa-sha2-nistp256@openssh.com") + string(b"nistp256") + string(point) + string(b"ssh:")

    def sign(data: bytes) -> bytes:
        r, s = decode_dss_signature(private.sign(data, ec.ECDSA(hashes.SHA256())))
        return mpint(r) + mpint(s)

    return Token(SshKey(blob), sign)


TOKENS = {"sk-ed25519": ed25519_token(), "sk-ecdsa": ecdsa_token()}


@pytest.mark.parametrize("name", FILE_KEYS)
def test_what_ssh_keygen_signs_we_verify(keys: dict[str, Path], name: str) -> None:
    signature = edge.sign(MESSAGE, namespace=CONTRACT, key_file=keys[name])
    key = verify(signature, MESSAGE, namespace=CONTRACT)
    shown = subprocess.run(["ssh-keygen", "-l", "-f", keys[name]], capture_output=True, check=True, text=True).stdout
    assert shown.split()[1] == key.fingerprint == edge.fingerprint(keys[name].with_suffix(".pub"))
    assert keys[name].with_suffix(".pub").read_text().startswith(key.public_line)
    refused(signature, "verify", message=MESSAGE + b" ")
    refused(signature, "namespace", namespace="key@cloister")


@pytest.mark.parametrize("name", FILE_KEYS)
def test_what_we_sign_in_process_ssh_keygen_verifies(keys: dict[str, Path], name: str, tmp_path: Path) -> None:
    signer = edge.Signer.load(keys[name])
    signature = signer.sign(MESSAGE, namespace=CONTRACT)
    assert verify(signature, MESSAGE, namespace=CONTRACT) == signer.key
    assert openssh_accepts(signer.key, signature, tmp_path)
    assert not openssh_accepts(signer.key, signature, tmp_path, message=MESSAGE + b" ")
    assert not openssh_accepts(signer.key, signature, tmp_path, namespace="key@cloister")
    assert signer.key.fingerprint in repr(signer)


@pytest.mark.parametrize("name", ["ed25519", "rsa-3072"])
def test_both_ways_of_signing_make_the_same_bytes(keys: dict[str, Path], name: str) -> None:
    ours = edge.Signer.load(keys[name]).sign(MESSAGE, namespace=CONTRACT)
    assert ours == edge.sign(MESSAGE, namespace=CONTRACT, key_file=keys[name])


@pytest.mark.parametrize("name", TOKENS)
def test_security_keys_verify_here_and_in_ssh_keygen(name: str, tmp_path: Path) -> None:
    token = TOKENS[name]
    signature = token.sign(MESSAGE)
    assert verify(signature, MESSAGE, namespace=CONTRACT) == token.key
    assert openssh_accepts(token.key, signature, tmp_path)
    refused(signature, "verify", message=MESSAGE + b" ")
    refused(signature, "namespace", namespace="ask@cloister")


@pytest.mark.parametrize("name", TOKENS)
def test_a_security_key_that_nobody_touched_is_refused(name: str) -> None:
    # stricter than `ssh-keygen -Y verify` of OpenSSH 9.2, which accepts this
    assert "nobody touched" in refused(TOKENS[name].sign(MESSAGE, flags=0), "touch")
    refused(TOKENS[name].sign(MESSAGE, flags=4), "touch")  # a PIN is no touch


@pytest.mark.parametrize("name", TOKENS)
def test_user_verification_can_be_required(name: str) -> None:
    token = TOKENS[name]
    refused(token.sign(MESSAGE, flags=1), "touch", user=True)
    assert verify(token.sign(MESSAGE, flags=5), MESSAGE, namespace=CONTRACT, require_user_verified=True) == token.key


def test_a_file_key_is_never_user_verified(keys: dict[str, Path]) -> None:
    refused(edge.Signer.load(keys["ed25519"]).sign(MESSAGE, namespace=CONTRACT), "touch", user=True)


@pytest.mark.parametrize("name", TOKENS)
def test_flags_counter_and_application_are_signed(name: str) -> None:
    token = TOKENS[name]
    blob = unarmoured(token.sign(MESSAGE, flags=1))
    for at, value in ((-5, 5), (-1, blob[-1] ^ 1)):
        forged = bytearray(blob)
        forged[at] = value
        refused(armoured(bytes(forged)), "verify")
    elsewhere = Token(token.key, token.raw_sign, application=b"https://other.example")
    refused(elsewhere.sign(MESSAGE), "verify")


def unarmoured(signature: str) -> bytes:
    return base64.b64decode("".join(signature.splitlines()[1:-1]))


def armoured(blob: bytes) -> str:
    text = base64.b64encode(blob).decode()
    lines = [text[at : at + 70] for at in range(0, len(text), 70)]
    return "\n".join(["-----BEGIN SSH SIGNATURE-----", *lines, "-----END SSH SIGNATURE-----", ""])


PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNER = edge.Signer(PRIVATE)
GOOD = SIGNER.sign(MESSAGE, namespace=CONTRACT)


def envelope(**fields: bytes) -> str:
    """GOOD with some fields replaced, in the layout of PROTOCOL.sshsig."""
    parts = {
        "magic": b"SSHSIG",
        "version": (1).to_bytes(4),
        "key": string(SIGNER.key.blob),
        "namespace": string(CONTRACT.encode()),
        "reserved": string(b""),
        "hash": string(b"sha512"),
        "signature": string(
            string(b"ssh-ed25519") + string(PRIVATE.sign(sshsig.signed_bytes(MESSAGE, namespace=CONTRACT)))
        ),
        "tail": b"",
    }
    assert fields.keys() <= parts.keys()
    return armoured(b"".join({**parts, **fields}.values()))


def test_the_layout_is_the_documented_one() -> None:
    assert envelope() == GOOD
    assert verify(GOOD.encode(), MESSAGE, namespace=CONTRACT) == SIGNER.key


@pytest.mark.parametrize(
    ("fields", "step"),
    [
        ({"magic": b"SSHSIX"}, "envelope"),
        ({"version": (2).to_bytes(4)}, "envelope"),
        ({"reserved": string(b"x")}, "envelope"),
        ({"hash": string(b"sha1")}, "envelope"),
        ({"hash": string(b"md5")}, "envelope"),
        ({"hash": string(b"sha256")}, "verify"),
        ({"hash": string(b"sha\xff12")}, "envelope"),
        ({"tail": b"\0"}, "envelope"),
        ({"namespace": string(b"file")}, "namespace"),
        ({"namespace": string(b"contract@cloister\0")}, "namespace"),
        ({"signature": string(b"")}, "signature"),
        ({"signature": string(string(b"ssh-ed25519") + string(bytes(64)))}, "verify"),
        ({"signature": string(string(b"ssh-ed25519") + string(bytes(63)))}, "verify"),
        ({"signature": string(string(b"ssh-rsa") + string(bytes(64)))}, "signature"),
        ({"signature": b"\xff\xff\xff\xff"}, "envelope"),
        ({"key": string(string(b"ssh-dss") + string(bytes(32)))}, "key"),
        ({"key": string(string(b"ssh-ed25519") + string(bytes(31)))}, "key"),
        ({"key": string(SIGNER.key.blob + b"\0")}, "key"),
        ({"key": string(edge.Signer(Ed25519PrivateKey.generate()).key.blob)}, "verify"),
        ({"key": string(string(b"ecdsa-sha2-nistp256") + string(b"nistp384") + string(bytes(65)))}, "key"),
        ({"key": string(string(b"ecdsa-sha2-nistp256") + string(b"nistp256") + string(b"\x04" + bytes(64)))}, "key"),
        ({"key": string(string(b"ssh-rsa") + mpint(65537) + string(b"\x00\x01"))}, "key"),
        ({"key": string(string(b"ssh-rsa") + mpint(65537) + mpint((1 << 2047) + 1))}, "key"),
        ({"key": string(string(b"ssh-rsa") + mpint((1 << 40) + 1) + mpint((1 << 3071) + 1))}, "key"),
        ({"key": string(string(b"ssh-rsa") + mpint(2) + mpint((1 << 3071) + 1))}, "key"),
    ],
)
def test_one_wrong_field_is_refused_at_its_step(fields: dict[str, bytes], step: str) -> None:
    refused(envelope(**fields), step)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        GOOD.replace("BEGIN SSH SIGNATURE", "BEGIN PGP SIGNATURE"),
        GOOD.replace("U1NIU0lH", "U1NIU0l!"),
        "leading text\n" + GOOD,
        GOOD + "trailing text\n",
        GOOD + GOOD,
        GOOD.replace("\n-----END", "=\n-----END"),
        "-----BEGIN SSH SIGNATURE-----\n" + "A" * 70_000 + "\n-----END SSH SIGNATURE-----\n",
    ],
)
def test_other_armour_is_refused(text: str) -> None:
    refused(text, "armour")


def test_a_second_encoding_of_the_same_signature_is_refused() -> None:
    body = GOOD.splitlines()
    assert body[-2].endswith("=")
    at = body[-2].rindex(body[-2].rstrip("=")[-1])
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = letters[letters.index(body[-2][at]) + 1]
    body[-2] = body[-2][:at] + other + body[-2][at + 1 :]
    assert unarmoured("\n".join(body)) == unarmoured(GOOD)
    assert "second encoding" in refused("\n".join(body) + "\n", "armour")


@given(st.integers(0, len(unarmoured(GOOD)) * 8 - 1))
def test_no_bit_can_be_flipped(bit: int) -> None:
    blob = bytearray(unarmoured(GOOD))
    blob[bit // 8] ^= 1 << bit % 8
    with pytest.raises(InputError):
        verify(armoured(bytes(blob)), MESSAGE, namespace=CONTRACT)


@given(st.binary(max_size=300))
def test_any_bytes_in_the_armour_end_in_an_input_error(data: bytes) -> None:
    for blob in (data, b"SSHSIG\0\0\0\1" + data, b"SSHSIG\0\0\0\1" + string(SIGNER.key.blob) + data):
        with pytest.raises(InputError):
            verify(armoured(blob), MESSAGE, namespace=CONTRACT)
    with pytest.raises(InputError):
        verify(data, MESSAGE, namespace=CONTRACT)


def test_small_rsa_keys_and_sha1_signatures_are_refused(keys: dict[str, Path], tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", tmp_path / "small"], check=True)
    assert "2048 bits" in refused(edge.sign(MESSAGE, namespace=CONTRACT, key_file=tmp_path / "small"), "key")
    with pytest.raises(InputError):
        edge.Signer(rsa.generate_private_key(65537, 2048))
    good = edge.sign(MESSAGE, namespace=CONTRACT, key_file=keys["rsa-3072"])
    old = unarmoured(good).replace(string(b"rsa-sha2-512"), string(b"ssh-rsa"))
    assert len(old) != len(unarmoured(good))
    field = unarmoured(good).index(string(b"rsa-sha2-512"))
    length = int.from_bytes(unarmoured(good)[field - 4 : field]) - 5
    old = old[: field - 4] + length.to_bytes(4) + old[field:]
    refused(armoured(old), "signature")


def test_a_compressed_point_is_refused() -> None:
    point = (
        ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    )
    blob = string(b"ecdsa-sha2-nistp256") + string(b"nistp256") + string(point)
    refused(envelope(key=string(blob)), "key")


# whose signature


def test_the_signer_is_a_party_of_the_contract(keys: dict[str, Path]) -> None:
    vendor = edge.Signer.load(keys["ed25519"])
    data = edited(NAMES[0], ("SHA256:8AcF6xVbDeyBMcSHJhqXohYhc4nXmF5kFMCMcJBfAx0", vendor.key.fingerprint))
    contract = parse(data, name="x.toml")
    assert sshsig.signer(contract, data, vendor.sign(data, namespace=CONTRACT)) == "vendor"
    with pytest.raises(InputError) as caught:
        sshsig.signer(contract, data, SIGNER.sign(data, namespace=CONTRACT))
    assert caught.value.reasons[0].where == "signature.party"
    with pytest.raises(InputError):  # signed for another purpose
        sshsig.signer(contract, data, vendor.sign(data, namespace="key@cloister"))
    with pytest.raises(InputError):  # signed one byte less
        sshsig.signer(contract, data, vendor.sign(data[:-1], namespace=CONTRACT))
    with pytest.raises(ValueError, match="not the bytes"):
        sshsig.signer(contract, data + b"\n", vendor.sign(data + b"\n", namespace=CONTRACT))


# the edge


@pytest.fixture
def agent(keys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A running ssh-agent that holds the ed25519 key; yields the path of the public half alone."""
    started = subprocess.run(["ssh-agent", "-s", "-a", tmp_path / "socket"], capture_output=True, check=True, text=True)
    match = re.search(r"SSH_AGENT_PID=(\d+)", started.stdout)
    assert match
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "socket"))
    try:
        subprocess.run(["ssh-add", "-q", keys["ed25519"]], check=True)
        public = tmp_path / "only.pub"
        public.write_bytes(keys["ed25519"].with_suffix(".pub").read_bytes())
        yield public
    finally:
        os.kill(int(match[1]), 15)


def test_the_agent_signs_for_a_public_key(agent: Path) -> None:
    signature = edge.sign(MESSAGE, namespace=CONTRACT, key_file=agent)
    assert verify(signature, MESSAGE, namespace=CONTRACT).fingerprint == edge.fingerprint(agent)


def test_a_key_that_cannot_sign_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="did not sign"):
        edge.sign(MESSAGE, namespace=CONTRACT, key_file=tmp_path / "missing")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="not installed"):
        edge.sign(MESSAGE, namespace=CONTRACT, key_file=tmp_path / "missing")


def test_generated_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    key = edge.generate_key(tmp_path / "id", comment="hospital")
    assert (tmp_path / "id").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "id.pub").read_text() == f"{key.public_line} hospital\n"
    assert edge.fingerprint(tmp_path / "id") == key.fingerprint
    (tmp_path / "id.pub").unlink()
    assert edge.fingerprint(tmp_path / "id") == key.fingerprint  # from the private file
    before = (tmp_path / "id").read_bytes()
    with pytest.raises(InputError, match="exists already"):
        edge.generate_key(tmp_path / "id")
    assert (tmp_path / "id").read_bytes() == before
    assert not (tmp_path / "id.pub").exists()
    assert verify(edge.sign(MESSAGE, namespace=CONTRACT, key_file=tmp_path / "id"), MESSAGE, namespace=CONTRACT) == key


def test_files_that_are_no_keys(tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", tmp_path / "locked"], check=True)
    with pytest.raises(InputError, match="passphrase") as caught:
        edge.Signer.load(tmp_path / "locked")
    assert "ssh-agent" in caught.value.hint
    for name, content in (("empty", b""), ("text", b"hello"), ("huge", b"x" * 100_000), ("pub", b"ssh-ed25519 AAAA x")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError):
            edge.fingerprint(tmp_path / name)
        with pytest.raises(InputError):
            edge.Signer.load(tmp_path / name)
    with pytest.raises(InputError, match="cannot read"):
        edge.fingerprint(tmp_path / "missing")
    with pytest.raises(InputError):  # the type in front is not the type inside
        sshsig.public_key("ssh-rsa " + SIGNER.key.public_line.split()[1])


def test_a_signer_is_not_pickled() -> None:
    with pytest.raises(TypeError):
        SIGNER.__reduce__()
