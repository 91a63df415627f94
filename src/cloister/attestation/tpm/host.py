"""Which files did an attested host run? Judged with the relying party's list or key over a confirmed IMA list. Pure.

A contract's place says `files = "sha256:..."` (every file is on the list with this digest) or `files = "signed-by:<party>"`.
Its policy wants the measurement `ima-list` or `ima-signer`, which no evidence contains: it is the relying party that finds it,
after `verify`, with what only it has. So the measurement is missing until somebody who has the list or the key asks here.

    with_list(claims, data)       the list's bytes, as `sha256sum` writes them       measurement ima-list: their SHA-256
    with_signer(claims, key)      the key that signs files with `evmctl ima_sign`    measurement ima-signer: SHA-256 of its SSH form

Every confirmed entry counts: files, buffers (kernel command line, device-mapper tables), and violations, which nothing admits.
The boot aggregate is not on a list; its value was computed from the quote. What IMA does not see is not judged: memory written
by root, scripts on standard input, files that the measured policy leaves out (docs/attestation/ima.md).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.attestation.logs import ima
from cloister.attestation.pki.certificate import PublicKey
from cloister.attestation.types import Claims
from cloister.errors import Reason

LIST: Final = "ima-list"
SIGNER: Final = "ima-signer"
SHOWN: Final = 32
"""Entries that are named one by one in the reasons."""


def with_list(claims: Claims, allow_list: bytes) -> tuple[Claims, tuple[Reason, ...]]:
    """Return `claims` with the measurement `ima-list`, or as they are with why not.

    Raises:
        EvidenceError: `evidence-malformed`: `allow_list` is none.
    """
    allowed = ima.parse_list(allow_list, where="ima-list")
    entries, reasons = _entries(claims, LIST)
    if reasons:
        return claims, reasons
    found = ima.unlisted(entries, allowed | _aggregate(claims))
    return _answer(claims, LIST, hashlib.sha256(allow_list).digest(), found, "a file on the list")


def with_signer(claims: Claims, key: PublicKey, allow_list: bytes | None = None) -> tuple[Claims, tuple[Reason, ...]]:
    """Return `claims` with the measurement `ima-signer`, or as they are with why not.

    Args:
        allow_list: of what cannot carry a signature, such as a kernel's command line that was measured as a buffer.

    Raises:
        EvidenceError: `evidence-malformed`: `allow_list` is none.
    """
    allowed = ima.parse_list(allow_list, where="ima-list") if allow_list is not None else frozenset[bytes]()
    entries, reasons = _entries(claims, SIGNER)
    if reasons:
        return claims, reasons
    found = ima.unsigned(entries, key, allowed | _aggregate(claims))
    return _answer(claims, SIGNER, fingerprint(key), found, "a file that the key signed")


def fingerprint(key: PublicKey) -> bytes:
    """Return the 32 bytes of the key's SSH fingerprint, `SHA256:` without its base64 (RFC 4253, 6.6; RFC 5656, 3.1)."""
    words = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split(b" ")
    return hashlib.sha256(base64.b64decode(words[1])).digest()


def _entries(claims: Claims, name: str) -> tuple[tuple[ima.Entry, ...], tuple[Reason, ...]]:
    entries = ima.entries_of(claims.boot_log)
    if not entries or "boot_aggregate" not in claims.measurements:
        return (), (Reason(name, "no confirmed IMA list", "the host's IMA list", "the attester must send `ima-log`"),)
    return entries, ()


def _aggregate(claims: Claims) -> frozenset[bytes]:
    return frozenset({claims.measurements["boot_aggregate"]})


def _answer(
    claims: Claims, name: str, value: bytes, found: tuple[ima.Entry, ...], wanted: str
) -> tuple[Claims, tuple[Reason, ...]]:
    if not found:
        measurements: Mapping[str, bytes] = MappingProxyType({**claims.measurements, name: value})
        return replace(claims, measurements=measurements), ()
    reasons = [
        Reason(
            name,
            f"{each.path or 'an entry'!s} "
            + ("could not be measured (violation)" if each.violation else f"{each.algorithm}:{each.digest.hex()}"),
            wanted,
        )
        for each in found[:SHOWN]
    ]
    if len(found) > SHOWN:
        reasons.append(Reason(name, f"{len(found) - SHOWN} more", wanted))
    return claims, tuple(reasons)
