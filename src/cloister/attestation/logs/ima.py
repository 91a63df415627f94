"""IMA measurement lists of Linux: which files a host loaded and ran, in order, as PCR 10 confirms them.

Source: Linux, security/integrity/ima (ima_fs.c, ima_template.c, ima_template_lib.c), Documentation/security/IMA-templates.rst.
Binary form (`binary_runtime_measurements`), little-endian:

    u32 register | 20 bytes template hash | u32 length, template name | u32 length, template data
    template data     fields of u32 length, bytes:
      d-ng            "sha256:" 00 || digest;   d-ngv2: "ima:sha256:" 00 || digest, or "verity:..."
      n-ng            path || 00  (spaces became "_")
      sig, evmsig     value of security.ima or security.evm;   buf: what was measured;   d-modsig, modsig, xattr..., iuid, igid, imode
    template `ima`    no length before the data: 20 bytes digest | u32 length, path; hashed as digest || path padded to 256 bytes

ASCII form (`ascii_runtime_measurements`): one line per entry, the same fields in hex, separated by single spaces.

The template hash is SHA-1 of the template data; a PCR is extended with the hash of the template data in its own bank, the SHA-1
bank with the template hash. Kernels before 5.8 extended other banks with the SHA-1 padded with zeros: their logs do not replay
here, on purpose, because they rest on SHA-1. A template hash of zeros is a violation (a file was written while it was measured,
or read while open for writing): FF .. FF was extended, and what the entry says is not authenticated.

What a replay proves: the digests, in that order. Path names are hashed with them, but whoever may rename files chooses them:
compare digests, names are labels. The template's name is not hashed, so no rule may depend on it.

The list is read after the quote and may be ahead of it. `advance` takes the entries up to the quoted value and leaves the rest.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from cloister.attestation.form import FormError
from cloister.attestation.pki.certificate import PublicKey
from cloister.attestation.types import BootEvent
from cloister.errors import EvidenceError, Reason

__all__ = [
    "REGISTER",
    "TEMPLATES",
    "TYPE",
    "Entry",
    "Progress",
    "State",
    "advance",
    "boot_aggregate",
    "boot_events",
    "entries_of",
    "parse",
    "parse_list",
    "replay",
    "start",
    "unlisted",
    "unsigned",
    "violations",
]

REGISTER: Final = 10
TYPE: Final = "ima"
"""`BootEvent.type` of an entry."""
LIMIT: Final = 64 * 1024 * 1024
"""Largest list accepted at once, in bytes; 100,000 entries have 11 to 16 MB."""
TEMPLATE_NAME_LIMIT: Final = 255
DATA_LIMIT: Final = 1024 * 1024
"""Largest template data: a key ring or a policy that was measured as a buffer."""

TEMPLATES: Final[dict[str, tuple[str, ...]]] = {
    "ima": ("d", "n"),
    "ima-ng": ("d-ng", "n-ng"),
    "ima-ngv2": ("d-ngv2", "n-ng"),
    "ima-sig": ("d-ng", "n-ng", "sig"),
    "ima-sigv2": ("d-ngv2", "n-ng", "sig"),
    "ima-buf": ("d-ng", "n-ng", "buf"),
    "ima-modsig": ("d-ng", "n-ng", "sig", "d-modsig", "modsig"),
    "evm-sig": ("d-ng", "n-ng", "evmsig", "xattrnames", "xattrlengths", "xattrvalues", "iuid", "igid", "imode"),
}
"""Template -> its fields. A custom template is named by its fields, joined with `|`."""

VIOLATION: Final = bytes(20)
_SIZES: Final[dict[bytes, int]] = {
    b"md5": 16, b"sha1": 20, b"sha224": 28, b"sha256": 32, b"sha384": 48, b"sha512": 64, b"sm3": 32, b"rmd160": 20,
    b"sha3-256": 32, b"sha3-384": 48, b"sha3-512": 64,
}  # fmt: skip
_STRONG: Final = frozenset({"sha256", "sha384", "sha512", "sha3-256", "sha3-384", "sha3-512"})
_BANKS: Final = {"sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}
_HEAD: Final = struct.Struct("<I20sI")
_U32: Final = struct.Struct("<I")
_SIGNATURES: Final = frozenset({"sig", "evmsig"})
_BEGINNINGS: Final = frozenset({("d-ng", "n-ng"), ("d-ngv2", "n-ng")})
_NAMED: Final = frozenset({"d-ng", "d-ngv2", "n-ng", "n"})
_PADDED: Final = 256
"""IMA_EVENT_NAME_LEN_MAX + 1."""


class Entry(NamedTuple):
    """One entry. Nothing in it is authentic before a replay, and of a violation nothing ever is."""

    register: int
    template: str
    template_hash: bytes
    data: bytes
    """Template data: what was hashed into the PCR."""
    algorithm: str = ""
    """Of `digest`: `sha256`, ...; empty in a template that nobody here knows."""
    digest: bytes = b""
    """Of the file, or of the buffer."""
    name: bytes = b""
    signature: bytes = b""
    """Value of security.ima, or empty."""

    @property
    def violation(self) -> bool:
        """Whether the kernel could not say what was read: PCR extended with FF."""
        return self.template_hash == VIOLATION

    @property
    def path(self) -> str:
        """The name for people: printable ASCII."""
        text = self.name[:256].decode("ascii", "replace")
        return "".join(each if each.isascii() and each.isprintable() else "?" for each in text)


@dataclass(frozen=True, slots=True)
class State:
    """How far a list has been confirmed. About 100 bytes: what a relying party keeps per host between two quotes."""

    count: int
    offset: int
    """Bytes of the list that were confirmed: the host sends what follows."""
    value: bytes
    """PCR 10, SHA-256 bank."""
    reset_count: int
    """Of the quote: another number is another boot, and its list starts again."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What one quote confirmed."""

    state: State
    entries: tuple[Entry, ...]
    """The newly confirmed entries."""


def parse(data: bytes, *, where: str) -> tuple[Entry, ...]:
    """Return all entries of a list in binary or ASCII form. An ASCII list that is empty or does not begin with a digit is none.

    Raises:
        EvidenceError: `evidence-malformed`: empty, truncated, too large, another form, or a template hash of other data.
    """
    try:
        if not 0 < len(data) <= LIMIT:
            raise FormError(f"a list of {len(data)} bytes", f"1 to {LIMIT}")
        # a register is below 24, and the digits are not: the first byte tells the forms apart
        if data[:1].isdigit():
            return tuple(_ascii(data))
        return tuple(entry for entry, _ in _binary(data, 0))
    except FormError as error:
        raise _malformed(where, error) from error


def replay(entries: Iterable[Entry], algorithm: str) -> dict[int, bytes]:
    """Return the registers that `entries` lead to in the bank `algorithm`, from zeros.

    Raises:
        EvidenceError: `evidence-malformed`, at `replay`: a bank that cannot be replayed.
    """
    if algorithm not in _BANKS:
        raise _malformed("replay", FormError(f"bank {algorithm[:32]!r}", " or ".join(_BANKS)))
    new = getattr(hashlib, algorithm)
    broken = b"\xff" * _BANKS[algorithm]
    values: dict[int, bytes] = {}
    for entry in entries:
        if entry.template_hash == VIOLATION:
            digest = broken
        else:
            digest = entry.template_hash if algorithm == "sha1" else new(entry.data).digest()
        value = values.get(entry.register)
        values[entry.register] = new((bytes(_BANKS[algorithm]) if value is None else value) + digest).digest()
    return values


def start(reset_count: int) -> State:
    """Return the state of a host of which nothing is confirmed yet in the boot `reset_count`."""
    return State(0, 0, bytes(32), reset_count)


def advance(state: State, more: bytes, *, quoted: bytes, reset_count: int, where: str) -> Progress:
    """Confirm the entries that lead from `state` to the quoted PCR 10; leave what follows them for the next quote.

    Steps; `Reason.where` is `<where>.<step>`:
      reset     the quote is of the same boot as `state`
      format    the entries up to the quoted value parse; what follows is not read
      register  they are entries of PCR 10
      replay    one of the values on the way is the quoted one

    Args:
        more: the list in binary form from `state.offset` on; it may be empty, and may stop anywhere after the quoted value.
        quoted: PCR 10 of the SHA-256 bank, from a quote that was checked.
        reset_count: of that quote.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`; the caller keeps the old state.
    """
    if reset_count != state.reset_count:
        raise _refused(
            f"{where}.reset",
            f"resetCount {reset_count}",
            str(state.reset_count),
            "the host has started again: begin at entry 0",
        )
    if len(more) > LIMIT:
        raise _malformed(f"{where}.format", FormError(f"a list of {len(more)} bytes", f"at most {LIMIT}"))
    value = state.value
    if value == quoted:
        return Progress(state, ())
    new = hashlib.sha256
    broken = b"\xff" * 32
    found: list[Entry] = []
    try:
        for entry, end in _binary(more, 0):
            if entry.register != REGISTER:
                raise _refused(
                    f"{where}.register", f"entry {state.count + len(found)} of PCR {entry.register}", f"PCR {REGISTER}"
                )
            value = new(value + (new(entry.data).digest() if entry.template_hash != VIOLATION else broken)).digest()
            found.append(entry)
            if value == quoted:
                return Progress(State(state.count + len(found), state.offset + end, value, reset_count), tuple(found))
    except FormError as error:
        raise _malformed(f"{where}.format", error, state.count + len(found)) from error
    raise _refused(
        f"{where}.replay",
        f"{value.hex()} after {state.count + len(found)} entries",
        quoted.hex(),
        "the list is not the one that the TPM recorded: an entry is missing, added, changed or in another place",
    )


def boot_aggregate(pcrs: Iterable[bytes]) -> bytes:
    """Return SHA-256 over PCR 0 to 9 of the SHA-256 bank: the first entry of a list since Linux 5.8, and `Claims.boot`.

    Raises:
        ValueError: not ten values of 32 bytes.
    """
    values = list(pcrs)
    if len(values) != 10 or any(len(value) != 32 for value in values):
        raise ValueError("a boot aggregate is made of PCR 0 to 9, 32 bytes each")
    return hashlib.sha256(b"".join(values)).digest()


def violations(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Return the entries of which the kernel could not say what was read. Their names are not authenticated."""
    return tuple(entry for entry in entries if entry.template_hash == VIOLATION)


def unlisted(entries: Iterable[Entry], allowed: frozenset[bytes]) -> tuple[Entry, ...]:
    """Return the entries that `allowed` (digests of SHA-256 or better) does not hold, violations among them; empty is good.

    Every entry counts, whatever its template and name are: buffers (kernel command line, device-mapper tables, keys) must be
    listed too. Only the boot aggregate is not on anybody's list: add the value that was computed from the quote to `allowed`.
    """
    return tuple(
        entry
        for entry in entries
        if entry.template_hash == VIOLATION or entry.algorithm not in _STRONG or entry.digest not in allowed
    )


def unsigned(entries: Iterable[Entry], key: PublicKey, allowed: frozenset[bytes] = frozenset()) -> tuple[Entry, ...]:
    """Return the entries that `key` did not sign, violations among them, except those whose digest is in `allowed`.

    A signature is a value of security.ima as `evmctl ima_sign` writes it: 03 02 | u8 hash (4, 5, 6: SHA-256, -384, -512) |
    4 bytes key id | u16 length, big-endian | ECDSA or RSASSA signature over the file's digest (Linux, integrity.h,
    signature_v2_hdr). The key id is not looked at: the key decides.
    """
    return tuple(
        entry
        for entry in entries
        if entry.template_hash == VIOLATION
        or not ((entry.algorithm in _STRONG and entry.digest in allowed) or _signed(entry, key))
    )


def parse_list(data: bytes, *, where: str) -> frozenset[bytes]:
    """Return the digests of an allow list: lines as `sha256sum`, `sha384sum` or `sha512sum` write them, names ignored.

    Raises:
        EvidenceError: `evidence-malformed`: a line of another form, or no line.
    """
    try:
        if not 0 < len(data) <= LIMIT:
            raise FormError(f"a list of {len(data)} bytes", f"1 to {LIMIT}")
        found: set[bytes] = set()
        for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
            match = _LISTED.fullmatch(line)
            if match is None or len(match[1]) not in (64, 96, 128):
                raise FormError(f"line {number}: {line[:80]!r}", "a digest in hex, two spaces, a name")
            found.add(bytes.fromhex(match[1].decode()))
    except FormError as error:
        raise _malformed(where, error) from error
    return frozenset(found)


def boot_events(entries: Iterable[Entry]) -> tuple[BootEvent, ...]:
    """Return confirmed entries as boot events: digest is what extended the SHA-256 bank, `data` the template data."""
    found = []
    for entry in entries:
        if entry.template_hash == VIOLATION:
            found.append(BootEvent(entry.register, TYPE, b"\xff" * 32, None, entry.path))
        else:
            found.append(BootEvent(entry.register, TYPE, hashlib.sha256(entry.data).digest(), entry.data, entry.path))
    return tuple(found)


def entries_of(events: Iterable[BootEvent]) -> tuple[Entry, ...]:
    """Return the entries that `boot_events` made, read from `Claims.boot_log`; events of another type are skipped.

    The template's name is not in the log's hash, so it is found from the fields. An event without data is a violation.
    """
    found = []
    for event in events:
        if event.type != TYPE or event.register != REGISTER:
            continue
        if event.data is None:
            found.append(Entry(event.register, "", VIOLATION, b"", name=event.label.encode()))
            continue
        template_hash = hashlib.sha1(event.data, usedforsecurity=False).digest()
        for template in (b"ima-ng", b"ima-sig", b"ima-modsig", b"evm-sig"):
            try:
                found.append(_entry(event.register, template, template_hash, event.data))
                break
            except FormError:
                continue
        else:
            found.append(Entry(event.register, "", template_hash, event.data, name=event.label.encode()))
    return tuple(found)


_LISTED: Final = re.compile(rb"([0-9a-f]+) [ *][^\x00\r\n]+")
_FIELDS: Final[dict[bytes, tuple[str, ...]]] = {name.encode(): fields for name, fields in TEMPLATES.items()}
_NAMES: Final[dict[bytes, str]] = {name.encode(): name for name in TEMPLATES}
_SIGNATURE_HASHES: Final[dict[int, tuple[str, hashes.HashAlgorithm]]] = {
    4: ("sha256", hashes.SHA256()),
    5: ("sha384", hashes.SHA384()),
    6: ("sha512", hashes.SHA512()),
}


def _binary(data: bytes, at: int) -> Iterator[tuple[Entry, int]]:
    """Yield each entry and the offset after it."""
    size = len(data)
    head, u32 = _HEAD.unpack_from, _U32.unpack_from
    while at < size:
        if size - at < 28:
            raise FormError(f"{size - at} bytes left at {at}", "a whole entry")
        register, template_hash, length = head(data, at)
        at += 28
        if register > 23:
            raise FormError(f"register {register}", "0 to 23")
        if not 0 < length <= TEMPLATE_NAME_LIMIT or length > size - at - 4:
            raise FormError(f"a template name of {length} bytes, {size - at} left", f"1 to {TEMPLATE_NAME_LIMIT}")
        template = data[at : at + length]
        at += length
        if template == b"ima":
            if size - at < 24:
                raise FormError(f"{size - at} bytes left at {at}", "a whole entry")
            (length,) = u32(data, at + 20)
            if length >= _PADDED or length > size - at - 24:
                raise FormError(f"a name of {length} bytes, {size - at - 24} left", "at most 255 bytes")
            body = data[at : at + 20] + data[at + 24 : at + 24 + length].ljust(_PADDED, b"\x00")
            at += 24 + length
        else:
            (length,) = u32(data, at)
            at += 4
            if length > DATA_LIMIT or length > size - at:
                raise FormError(f"template data of {length} bytes, {size - at} left", f"at most {DATA_LIMIT}")
            body = data[at : at + length]
            at += length
        yield _entry(register, template, template_hash, body), at


def _entry(register: int, template: bytes, template_hash: bytes, body: bytes) -> Entry:
    if template_hash != VIOLATION and hashlib.sha1(body, usedforsecurity=False).digest() != template_hash:
        raise FormError("template data with another hash", template_hash.hex())
    if template == b"ima":
        return Entry(register, "ima", template_hash, body, "sha1", body[:20], body[20:].rstrip(b"\x00"))
    name = _NAMES.get(template)
    kinds = _FIELDS.get(template)
    if kinds is None or name is None:
        name = template.decode("ascii", "replace")
        kinds = tuple(name.split("|"))
        # nobody hashes the template's name: only where digest and path stand where every template has them, and nowhere else,
        # can a host not show another field (a signature, which a file's owner writes) as the digest or the path
        if kinds[:2] not in _BEGINNINGS or _NAMED.intersection(kinds[2:]):
            return Entry(register, name, template_hash, body)  # opaque: it replays, and no list or key admits it
    at, size = 0, len(body)
    algorithm, digest, path, signature = "", b"", b"", b""
    u32 = _U32.unpack_from
    for kind in kinds:
        if size - at < 4:
            raise FormError(f"{size - at} bytes of template data left", f"the field {kind[:32]}")
        (length,) = u32(body, at)
        at += 4
        if length > size - at:
            raise FormError(f"a field {kind[:32]} of {length} bytes, {size - at} left", "a whole field")
        if kind in ("d-ng", "d-ngv2"):
            prefix, _, digest = body[at : at + length].partition(b":\x00")
            word = prefix.rpartition(b":")[2]
            if length and len(digest) != _SIZES.get(word, len(digest)):
                raise FormError(f"a digest of {len(digest)} bytes", f"{_SIZES.get(word)} bytes of {word[:32]!r}")
            algorithm = "sha256" if word == b"sha256" else word[:32].decode("ascii", "replace")
        elif kind in ("n-ng", "n"):
            path = body[at : at + length].removesuffix(b"\x00")
        elif kind in _SIGNATURES:
            signature = body[at : at + length]
        at += length
    if at != size:
        raise FormError(f"{size - at} bytes after the last field", "none")
    return Entry(register, name, template_hash, body, algorithm, digest, path, signature)


def _ascii(data: bytes) -> Iterator[Entry]:
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        try:
            yield _line(line)
        except FormError as error:
            raise FormError(f"line {number}: {error.found}", error.wanted) from error
        except ValueError as error:
            raise FormError(f"line {number}: {str(error)[:80]}", "fields in hex") from error


def _line(line: bytes) -> Entry:
    parts = line.split(b" ")
    if len(parts) < 4 or not parts[0].isdigit() or len(parts[0]) > 2 or int(parts[0]) > 23:
        raise FormError(f"{line[:40]!r}", "a register, a template hash, a template and its fields")
    template_hash = _hex(parts[1])
    if len(template_hash) != 20:
        raise FormError(f"a template hash of {len(template_hash)} bytes", "20")
    template, values = parts[2], parts[3:]
    if not 0 < len(template) <= TEMPLATE_NAME_LIMIT:
        raise FormError(f"a template name of {len(template)} bytes", f"1 to {TEMPLATE_NAME_LIMIT}")
    kinds = _FIELDS.get(template) or tuple(template.decode("ascii", "replace").split("|"))
    if template not in _FIELDS and len(kinds) == 1:
        raise FormError(f"template {template[:32]!r}", " or ".join(TEMPLATES))
    if len(values) != len(kinds):
        raise FormError(f"{len(values)} fields", f"{len(kinds)} of {template[:32].decode('ascii', 'replace')}")
    if template == b"ima":
        digest = _hex(values[0])
        if len(digest) != 20 or len(values[1]) >= _PADDED:
            raise FormError(f"a digest of {len(digest)} bytes, a name of {len(values[1])}", "20, and at most 255")
        return _entry(int(parts[0]), template, template_hash, digest + values[1].ljust(_PADDED, b"\x00"))
    body = b""
    for kind, value in zip(kinds, values, strict=True):
        field = _field(kind, value)
        body += _U32.pack(len(field)) + field
    return _entry(int(parts[0]), template, template_hash, body)


def _field(kind: str, value: bytes) -> bytes:
    """Return the binary form of one ASCII field."""
    if kind in ("d-ng", "d-ngv2", "d-modsig"):
        if not value:
            return b""
        prefix, colon, digest = value.rpartition(b":")
        return (prefix + b":\x00" if colon else b"") + _hex(digest)
    if kind in ("n-ng", "n"):
        return value + b"\x00"
    if kind == "xattrnames":
        return value + b"\x00" if value else b""
    if kind in ("iuid", "igid", "imode"):
        if not value.isdigit() or len(value) > 10:
            raise FormError(f"{kind} {value[:16]!r}", "a number")
        try:
            return int(value).to_bytes(2 if kind == "imode" else 4, "little")
        except OverflowError as error:
            raise FormError(f"{kind} {value[:16]!r}", "a number that fits") from error
    return _hex(value)


def _hex(value: bytes) -> bytes:
    text = value.decode("ascii", "replace")
    if len(text) % 2 or any(each not in "0123456789abcdef" for each in text):
        raise FormError(f"{value[:40]!r}", "lower-case hex")
    return bytes.fromhex(text)


def _signed(entry: Entry, key: PublicKey) -> bool:
    header, signature = entry.signature[:9], entry.signature[9:]
    if len(header) < 9 or header[:2] != b"\x03\x02" or int.from_bytes(header[7:9], "big") != len(signature):
        return False
    name, algorithm = _SIGNATURE_HASHES.get(header[2], ("", hashes.SHA256()))
    if name != entry.algorithm:
        return False
    try:
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, entry.digest, padding.PKCS1v15(), Prehashed(algorithm))
        else:
            key.verify(signature, entry.digest, ec.ECDSA(Prehashed(algorithm)))
    except (InvalidSignature, ValueError, UnsupportedAlgorithm):
        return False
    return True


def _malformed(where: str, error: FormError, index: int | None = None) -> EvidenceError:
    found = error.found if index is None else f"entry {index}: {error.found}"
    return EvidenceError(
        "the IMA list does not parse", code="evidence-malformed", reasons=[Reason(where, found, error.wanted)]
    )


def _refused(where: str, found: str, wanted: str, hint: str = "") -> EvidenceError:
    return EvidenceError(
        "the IMA list does not explain the quoted PCR 10",
        code="evidence-not-authentic",
        reasons=[Reason(where, found, wanted, hint)],
    )
