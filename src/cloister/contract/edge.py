"""Making signatures: the part of the room that runs programs, reads key files and draws randomness.

Two ways to the same bytes (docs/identity.md):
  `sign`           `ssh-keygen -Y sign`: files with or without passphrase, ssh-agent, security keys
  `Signer`         in process, for an unencrypted private key file: what a client that signs each query uses
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from cloister.contract import sshsig
from cloister.contract.sshsig import SshKey
from cloister.errors import InputError, MachineError

MAX_KEY_FILE: Final = 64 * 1024
SIGN_TIMEOUT_S: Final = 120
"""Time for somebody to type a passphrase or touch a key."""


def sign(message: bytes, *, namespace: str, key_file: Path) -> str:
    """Return the armoured SSHSIG of `message`, made by `ssh-keygen -Y sign`.

    `key_file` is a private key, or a public key whose private half is in ssh-agent or on a security key. ssh-keygen asks
    for passphrases and touches on the terminal.

    Raises:
        InputError: the key cannot be used, or nobody confirmed in time.
        MachineError: OpenSSH's ssh-keygen is not installed.
    """
    command = ["ssh-keygen", "-q", "-Y", "sign", "-n", namespace, "-f", str(key_file)]
    try:
        done = subprocess.run(  # noqa: S603  # fixed program, no shell; the message goes through a pipe
            command,
            input=message,
            stdout=subprocess.PIPE,
            stderr=None if os.isatty(2) else subprocess.PIPE,  # "Confirm user presence" must reach the person
            timeout=SIGN_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise MachineError(
            "ssh-keygen is not installed", code="machine", hint="install OpenSSH's client (Debian: openssh-client)"
        ) from None
    except subprocess.TimeoutExpired:
        raise InputError(f"nobody confirmed the signature within {SIGN_TIMEOUT_S} s") from None
    if done.returncode:
        detail = (done.stderr or b"").decode("utf-8", "replace").strip().splitlines()
        raise InputError(
            f"`{key_file}` did not sign: {detail[-1][:200] if detail else 'ssh-keygen gave no reason'}",
            hint="is it the right file, is the agent running, is the security key plugged in?",
        )
    return done.stdout.decode("ascii")


def public_key(key_file: Path) -> SshKey:
    """Return the public key of a `.pub` file, or of an unencrypted private key file.

    Raises:
        InputError: no such file, or neither of both.
    """
    text = _read(key_file)
    if b"PRIVATE KEY-----" in text:
        beside = key_file.with_name(key_file.name + ".pub")
        if beside.exists():
            return sshsig.public_key(_read(beside).decode("utf-8", "replace"))
        return Signer.load(key_file).key
    return sshsig.public_key(text.decode("utf-8", "replace"))


def fingerprint(key_file: Path) -> str:
    """Return the fingerprint of a key file as contracts name parties: `SHA256:` and 43 letters."""
    return public_key(key_file).fingerprint


def generate_key(key_file: Path, *, comment: str = "") -> SshKey:
    """Write a new ed25519 key pair without passphrase to `key_file` (mode 0600) and `key_file`.pub.

    Raises:
        InputError: one of the files exists already; nothing is overwritten.
    """
    private = Ed25519PrivateKey.generate()
    line = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    secret = private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    _create(key_file, secret, 0o600)
    _create(
        key_file.with_name(key_file.name + ".pub"), line + (b" " + comment.encode() if comment else b"") + b"\n", 0o644
    )
    return sshsig.public_key(line.decode("ascii"))


class Signer:
    """Signs in process with a private key that is in memory; `repr` shows the fingerprint only."""

    __slots__ = ("_private", "key")

    def __init__(self, private: Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
        line = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")
        self.key: Final[SshKey] = sshsig.public_key(line)
        self._private = private

    @classmethod
    def load(cls, key_file: Path) -> Signer:
        """Read an unencrypted OpenSSH private key file.

        Raises:
            InputError: no such file, a passphrase, or a key type that does not sign contracts.
        """
        data = _read(key_file)
        try:
            private = load_ssh_private_key(data, password=None)
        except TypeError:
            raise InputError(
                f"`{key_file}` has a passphrase",
                hint="add it to ssh-agent and name the .pub file",
            ) from None
        except (ValueError, UnsupportedAlgorithm):
            raise InputError(f"`{key_file}` is no OpenSSH private key") from None
        if not isinstance(private, Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            raise InputError(f"`{key_file}` is of a type that does not sign contracts")
        return cls(private)

    def sign(self, message: bytes, *, namespace: str) -> str:
        """Return the armoured SSHSIG of `message`; the same bytes that `ssh-keygen -Y sign` would make (ed25519, RSA)."""
        signed = sshsig.signed_bytes(message, namespace=namespace)
        private = self._private
        algorithm = self.key.type
        if isinstance(private, Ed25519PrivateKey):
            raw = private.sign(signed)
        elif isinstance(private, rsa.RSAPrivateKey):
            algorithm = "rsa-sha2-512"
            raw = private.sign(signed, padding.PKCS1v15(), hashes.SHA512())
        else:
            size = private.curve.key_size
            digest = hashes.SHA256() if size <= 256 else hashes.SHA384() if size <= 384 else hashes.SHA512()
            r, s = decode_dss_signature(private.sign(signed, ec.ECDSA(digest)))
            raw = sshsig.mpint(r) + sshsig.mpint(s)
        signature = sshsig.string(algorithm.encode()) + sshsig.string(raw)
        return sshsig.armour(self.key.blob, signature, namespace=namespace)

    def __repr__(self) -> str:
        return f"Signer({self.key.fingerprint})"

    def __reduce__(self) -> str:
        raise TypeError("a Signer is never pickled")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_FILE + 1)
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}") from None
    if len(data) > MAX_KEY_FILE:
        raise InputError(f"`{path}` is too large for a key file")
    return data


def _create(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise InputError(f"`{path}` exists already", hint="choose another name; keys are never overwritten") from None
    except OSError as error:
        raise InputError(f"cannot write `{path}`: {error.strerror}") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
