"""A TPM 2.0 client without a software stack: commands as bytes over /dev/tpmrm0 or a socket of swtpm.

Source: TCG TPM 2.0 Library 1.59, part 3 (commands), part 2 (structures), part 1 section 18 (sessions). Big-endian:

    command   u16 tag (8001 none, 8002 sessions) | u32 size | u32 code | handles | [u32 size, authorisations] | parameters
    answer    u16 tag | u32 size | u32 code | handles | [u32 size of parameters] | parameters | [sessions]
    authorisation   u32 handle (40000009: a password) | 2B nonce | u8 attributes | 2B secret

What it takes care of:
  - 0x922 (first use of a protected object after a start), 0x90a and 0x908 mean: send it again
  - whatever is loaded is flushed again, also after an error: a chip has room for three objects, and swtpm cleans up for nobody
  - answers are read with a cap, and every length in them is checked: the other end of a socket may be anybody
  - the chip's own cap on NV reads: 512 bytes at a time; certificates in NV are padded, so they are cut at their DER length
Values are not authenticated: what a PCR or NV index says counts only where a quote or a certificate says the same.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from cloister.attestation.tpm.format import HASH_IDS, HASH_SIZES, Selection, encode_selection, parse_public
from cloister.errors import EvidenceError, MachineError

DEVICE: Final = Path("/dev/tpmrm0")
"""Linux's resource manager: each opener has its own objects."""
ANSWER_LIMIT: Final = 4096
"""TPM_PT_MAX_RESPONSE_SIZE of every TPM seen, in bytes."""
TIMEOUT_S: Final = 90.0
"""A chip may need half a minute for an RSA key."""
TRIES: Final = 12
FIRST_WAIT_S: Final = 0.005
NV_STEP: Final = 512
NV_LIMIT: Final = 32 * 1024
PCRS_PER_READ: Final = 8

OWNER, NULL, ENDORSEMENT = 0x40000001, 0x40000007, 0x4000000B
PASSWORD: Final = 0x40000009

CREATE_PRIMARY, ACTIVATE_CREDENTIAL, NV_READ, POLICY_SECRET, QUOTE = 0x131, 0x147, 0x14E, 0x151, 0x158
FLUSH_CONTEXT, NV_READ_PUBLIC, READ_PUBLIC, START_AUTH_SESSION = 0x165, 0x169, 0x173, 0x176
GET_CAPABILITY, GET_RANDOM, PCR_READ, PCR_EXTEND = 0x17A, 0x17B, 0x17E, 0x182
_NAMES: Final = {
    CREATE_PRIMARY: "CreatePrimary", ACTIVATE_CREDENTIAL: "ActivateCredential", NV_READ: "NV_Read",
    POLICY_SECRET: "PolicySecret", QUOTE: "Quote", FLUSH_CONTEXT: "FlushContext", NV_READ_PUBLIC: "NV_ReadPublic",
    READ_PUBLIC: "ReadPublic", START_AUTH_SESSION: "StartAuthSession", GET_CAPABILITY: "GetCapability",
    GET_RANDOM: "GetRandom", PCR_READ: "PCR_Read", PCR_EXTEND: "PCR_Extend",
}  # fmt: skip

AGAIN: Final = frozenset({0x922, 0x90A, 0x908})  # RC_RETRY, RC_TESTING, RC_YIELDED

# part 2, section 6.6: format 0 and warnings, then format 1 without its position
_CODES: Final = {
    0x100: "the TPM was not started (TPM2_Startup)",
    0x101: "the TPM is in failure mode",
    0x120: "commands of this kind are disabled",
    0x125: "no authorisation was given",
    0x12F: "an authorisation value or policy is not set",
    0x143: "the TPM does not implement this command",
    0x144: "the command's size is not what the TPM expects",
    0x146: "an NV access is beyond the end of the index",
    0x148: "the NV index does not allow this access",
    0x149: "the NV index does not allow this authorisation",
    0x14A: "the NV index was never written",
    0x14B: "there is no room left in NV",
    0x14C: "the NV index or persistent object exists",
    0x902: "the TPM has no room for another object; use /dev/tpmrm0, or flush what other programs left",
    0x903: "the TPM has no room for another session; use /dev/tpmrm0, or flush what other programs left",
    0x908: "the TPM was interrupted",
    0x90A: "the TPM is testing itself",
    0x910: "there is no object with this handle",
    0x918: "there is no session with this handle",
    0x921: "the TPM is locked out after wrong authorisations: wait, or clear the lockout",
    0x922: "the TPM wants the command again",
    0x923: "the TPM cannot write its NV memory now",
}
_CODES_1: Final = {
    0x01: "an algorithm is not supported", 0x02: "attributes are inconsistent", 0x03: "a hash is not supported",
    0x04: "a value is out of range", 0x05: "the hierarchy is disabled or not the right one", 0x07: "a key size is not supported",
    0x09: "a mode is not supported", 0x0A: "a type is not the right one", 0x0B: "there is no such handle",
    0x0D: "a range is wrong", 0x0E: "the authorisation value is wrong", 0x12: "a scheme is not supported",
    0x15: "a size is wrong", 0x18: "the selector is wrong", 0x1A: "a structure ends early", 0x1B: "the signature is wrong",
    0x1D: "the policy does not hold", 0x1F: "an integrity check failed", 0x22: "the authorisation value is wrong",
    0x26: "the curve is not supported",
}  # fmt: skip


class TpmError(MachineError):
    """The TPM refused a command; `rc` is its response code."""

    def __init__(self, command: int, rc: int) -> None:
        super().__init__(f"the TPM refuses {_NAMES.get(command, hex(command))}: {explain(rc)} (0x{rc:03x})")
        self.command, self.rc = command, rc


class UnsteadyError(MachineError):
    """PCRs changed while they were read: read them again."""


def explain(rc: int) -> str:
    """Return what the response code `rc` says, in words (part 2, section 6.6)."""
    if rc & 0x80:
        number = rc >> 8 & 0xF
        what = f"parameter {number}" if rc & 0x40 else f"session {number & 7}" if number & 8 else f"handle {number}"
        return f"{_CODES_1.get(rc & 0x3F, 'an error of format 1')}, {what}"
    return _CODES.get(rc, "an error that this version has no words for")


class Transport(Protocol):
    """How commands reach a TPM."""

    def exchange(self, command: bytes) -> bytes:
        """Send one command and return its whole answer, at most `ANSWER_LIMIT` bytes.

        Raises:
            OSError: the TPM cannot be reached.
        """
        ...

    def close(self) -> None: ...


class DeviceTransport:
    """A character device: one write is one command, one read is its answer."""

    def __init__(self, path: Path = DEVICE) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def exchange(self, command: bytes) -> bytes:
        if os.write(self._descriptor, command) != len(command):
            raise OSError("the device took a part of the command")
        return os.read(self._descriptor, ANSWER_LIMIT + 1)

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._descriptor)


class SocketTransport:
    """A swtpm: `--server type=unixio,path=...` or `--server type=tcp,port=...`."""

    def __init__(self, address: Path | tuple[str, int], *, timeout: float = TIMEOUT_S) -> None:
        if isinstance(address, tuple):
            self._socket = socket.create_connection(address, timeout)
        else:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._socket.settimeout(timeout)
                self._socket.connect(os.fspath(address))
            except OSError:
                self._socket.close()
                raise

    def exchange(self, command: bytes) -> bytes:
        self._socket.sendall(command)
        header = self._take(10)
        size = struct.unpack_from(">I", header, 2)[0]
        if not 10 <= size <= ANSWER_LIMIT:
            raise OSError(f"an answer of {size} bytes")
        return header + self._take(size - 10)

    def _take(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            piece = self._socket.recv(size - len(found))
            if not piece:
                raise ConnectionError("the connection ended")
            found += piece
        return bytes(found)

    def close(self) -> None:
        self._socket.close()


@dataclass(frozen=True, slots=True)
class Key:
    """A key that is loaded or persistent."""

    handle: int
    public: bytes
    """TPMT_PUBLIC."""
    name: bytes


def ak_template() -> bytes:
    """Return the TPMT_PUBLIC of our attestation key: ECC P-256, restricted, signs ECDSA with SHA-256.

    Attributes 0x50472: fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA, restricted, sign. Without noDA, each
    stop of the TPM without TPM2_Shutdown counts as a wrong password, and the third locks every key out (0x921).
    """
    return (
        struct.pack(">HHIH", 0x0023, 0x000B, 0x50472, 0)
        + struct.pack(">HHH", 0x0010, 0x0018, 0x000B)  # no symmetric; ECDSA, SHA-256
        + struct.pack(">HH", 0x0003, 0x0010)  # NIST P-256, no KDF
        + bytes(4)  # empty x and y
    )


_EK_POLICY: Final = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")


def ek_template(kind: str) -> bytes:
    """Return the TPMT_PUBLIC of the endorsement key `rsa` (template L-1) or `ecc` (L-2).

    Source: TCG EK Credential Profile 2.5, B.3.3 and B.3.4. Policy: PolicySecret(endorsement). The EK certificate of the
    vendor is for the key that this template gives.

    Raises:
        ValueError: another kind.
    """
    if kind not in ("rsa", "ecc"):
        raise ValueError(f"endorsement key {kind!r} is not rsa or ecc")
    head = struct.pack(">HHIH", 0x0001 if kind == "rsa" else 0x0023, 0x000B, 0x300B2, 32) + _EK_POLICY
    head += struct.pack(">HHHH", 0x0006, 128, 0x0043, 0x0010)  # AES-128-CFB, no scheme
    if kind == "rsa":
        return head + struct.pack(">HIH", 2048, 0, 256) + bytes(256)
    return head + struct.pack(">HH", 0x0003, 0x0010) + (b"\x00\x20" + bytes(32)) * 2


class _Reader:
    """What is left of an answer. Every length is checked against what is there."""

    def __init__(self, data: bytes, command: int) -> None:
        self._data, self._command, self._at = data, command, 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise MachineError(f"the TPM's answer to {_NAMES.get(self._command, hex(self._command))} ends early")
        self._at += size
        return self._data[self._at - size : self._at]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def sized(self) -> bytes:
        return self.take(self.u16())

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)


class Tpm:
    """A connection to a TPM.

    Args:
        connect: opens the transport; called once.
        wait: sleeps for that many seconds between tries.

    Raises:
        MachineError: the TPM cannot be reached.
    """

    def __init__(
        self, connect: Callable[[], Transport] = DeviceTransport, *, wait: Callable[[float], None] = time.sleep
    ) -> None:
        self._wait = wait
        try:
            self._transport = connect()
        except OSError as error:
            raise MachineError(
                f"the TPM cannot be opened: {error.strerror or error}",
                hint=f"{DEVICE} must exist and be readable: root, or a member of group tss",
            ) from error

    def __enter__(self) -> Tpm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    # --- commands -----------------------------------------------------------------------------------------------------

    def execute(
        self,
        command: int,
        handles: tuple[int, ...] = (),
        parameters: bytes = b"",
        *,
        sessions: tuple[int, ...] = (),
        answered: int = 0,
    ) -> tuple[tuple[int, ...], bytes]:
        """Run one command and return its (`answered`) handles and its parameters.

        `sessions` authorises the first handles: `PASSWORD` is the empty password, another value a policy session.

        Raises:
            TpmError: the TPM refuses.
            MachineError: the TPM cannot be reached, or answers something else.
        """
        body = b"".join(struct.pack(">I", each) for each in handles)
        if sessions:
            # a policy session stays (continueSession): whoever started it flushes it
            area = b"".join(struct.pack(">IHBH", each, 0, 0 if each == PASSWORD else 1, 0) for each in sessions)
            body += struct.pack(">I", len(area)) + area
        body += parameters
        packed = struct.pack(">HII", 0x8002 if sessions else 0x8001, 10 + len(body), command) + body
        rc = 0
        for attempt in range(TRIES):
            if attempt:
                self._wait(min(FIRST_WAIT_S * 2 ** (attempt - 1), 1.0))
            rc, reader, tag = self._once(command, packed)
            if rc == 0:
                found = tuple(reader.u32() for _ in range(answered))
                return found, reader.take(reader.u32()) if tag == 0x8002 else reader.rest()
            if rc not in AGAIN:
                break
        raise TpmError(command, rc)

    def _once(self, command: int, packed: bytes) -> tuple[int, _Reader, int]:
        name = _NAMES.get(command, hex(command))
        try:
            answer = self._transport.exchange(packed)
        except OSError as error:
            raise MachineError(f"the TPM does not answer {name}: {error.strerror or error}") from error
        if len(answer) < 10 or len(answer) > ANSWER_LIMIT:
            raise MachineError(f"the TPM answers {name} with {len(answer)} bytes")
        tag, size, rc = struct.unpack_from(">HII", answer)
        # 0x00C4 is the tag of a TPM 1.2's error
        if tag not in (0x8001, 0x8002) or size != len(answer):
            raise MachineError(f"the TPM's answer to {name} is no TPM 2.0 answer")
        return rc, _Reader(answer[10:], command), tag

    def random(self, size: int) -> bytes:
        """Return `size` random bytes of the TPM, at most 32."""
        _, answer = self.execute(GET_RANDOM, (), struct.pack(">H", size))
        return _Reader(answer, GET_RANDOM).sized()

    def transient(self) -> tuple[int, ...]:
        """Return the handles of transient objects that are loaded: behind a resource manager, our own."""
        _, answer = self.execute(GET_CAPABILITY, (), struct.pack(">III", 1, 0x80000000, 64))
        reader = _Reader(answer, GET_CAPABILITY)
        reader.take(1 + 4)  # more data, capability
        return tuple(reader.u32() for _ in range(min(reader.u32(), 64)))

    @contextmanager
    def primary(self, template: bytes, hierarchy: int = ENDORSEMENT) -> Iterator[Key]:
        """Make the primary key of `template` (TPMT_PUBLIC), and flush it at the end. The same seed gives the same key."""
        empty = struct.pack(">HHH", 4, 0, 0)  # no password, no data
        parameters = empty + _sized(template) + struct.pack(">HI", 0, 0)  # no outside information, no creation PCRs
        (handle,), answer = self.execute(CREATE_PRIMARY, (hierarchy,), parameters, sessions=(PASSWORD,), answered=1)
        try:
            public = _Reader(answer, CREATE_PRIMARY).sized()
            yield Key(handle, public, _name(public))
        finally:
            self.flush(handle)

    def flush(self, handle: int) -> None:
        """Unload an object or session. A TPM that is gone has unloaded it."""
        with suppress(MachineError):
            self.execute(FLUSH_CONTEXT, (handle,))

    def persistent(self, handle: int) -> Key:
        """Return the persistent key `handle`.

        Raises:
            TpmError: there is none.
        """
        _, answer = self.execute(READ_PUBLIC, (handle,))
        public = _Reader(answer, READ_PUBLIC).sized()
        return Key(handle, public, _name(public))

    def quote(self, key: Key, qualifying_data: bytes, selection: tuple[Selection, ...]) -> tuple[bytes, bytes]:
        """Return TPMS_ATTEST and TPMT_SIGNATURE of `key` over `qualifying_data` and `selection`."""
        parameters = _sized(qualifying_data) + struct.pack(">H", 0x0010) + encode_selection(selection)
        _, answer = self.execute(QUOTE, (key.handle,), parameters, sessions=(PASSWORD,))
        reader = _Reader(answer, QUOTE)
        return reader.sized(), reader.rest()

    def read_pcrs(self, bank: str, indices: tuple[int, ...]) -> dict[int, bytes]:
        """Return the values of `indices` of `bank`, not authenticated.

        Raises:
            UnsteadyError: the values changed while they were read.
            MachineError: the TPM has no such bank.
        """
        found: dict[int, bytes] = {}
        updates: set[int] = set()
        for at in range(0, len(indices), PCRS_PER_READ):
            wanted = indices[at : at + PCRS_PER_READ]
            _, answer = self.execute(PCR_READ, (), encode_selection((Selection(bank, wanted),)))
            reader = _Reader(answer, PCR_READ)
            updates.add(reader.u32())
            given: list[int] = []
            for _ in range(min(reader.u32(), 8)):
                algorithm, size = reader.u16(), reader.take(1)[0]
                bits = int.from_bytes(reader.take(size), "little")
                if algorithm == HASH_IDS[bank]:
                    given += [index for index in range(24) if bits >> index & 1]
            values = [reader.sized() for _ in range(min(reader.u32(), PCRS_PER_READ))]
            if tuple(given) != tuple(sorted(wanted)) or len(values) != len(given):
                raise MachineError(f"the TPM gives no PCR {','.join(map(str, wanted))} of its {bank} bank")
            if any(len(value) != HASH_SIZES[bank] for value in values):
                raise MachineError(f"the TPM gives PCRs of another size than {bank} has")
            found.update(zip(given, values, strict=True))
        if len(updates) > 1:
            raise UnsteadyError("PCRs changed while they were read")
        return found

    def extend_pcr(self, index: int, digests: dict[str, bytes]) -> None:
        """Extend PCR `index` in each bank of `digests`."""
        parameters = struct.pack(">I", len(digests))
        for bank, value in digests.items():
            parameters += struct.pack(">H", HASH_IDS[bank]) + value
        self.execute(PCR_EXTEND, (index,), parameters, sessions=(PASSWORD,))

    def read_nv(self, index: int) -> bytes:
        """Return the whole content of an NV index that anybody, or the owner without password, may read.

        Raises:
            TpmError: there is no such index, or it may not be read.
            MachineError: it is larger than `NV_LIMIT`.
        """
        _, answer = self.execute(NV_READ_PUBLIC, (index,))
        public = _Reader(_Reader(answer, NV_READ_PUBLIC).sized(), NV_READ_PUBLIC)
        public.take(6)  # index and name algorithm
        attributes = public.u32()
        public.sized()  # policy
        size = public.u16()
        if size > NV_LIMIT:
            raise MachineError(f"NV index 0x{index:08x} has {size} bytes, at most {NV_LIMIT} are read")
        reader = index if attributes >> 18 & 1 else OWNER  # TPMA_NV_AUTHREAD, else as TPMA_NV_OWNERREAD
        found = bytearray()
        while len(found) < size:
            step = min(NV_STEP, size - len(found))
            parameters = struct.pack(">HH", step, len(found))
            _, answer = self.execute(NV_READ, (reader, index), parameters, sessions=(PASSWORD,))
            piece = _Reader(answer, NV_READ).sized()
            if len(piece) != step:
                raise MachineError(f"the TPM gives {len(piece)} of {step} bytes of NV index 0x{index:08x}")
            found += piece
        return bytes(found)

    def certificate(self, index: int) -> bytes | None:
        """Return the DER certificate in an NV index, without the padding that follows it; None: there is none."""
        try:
            data = self.read_nv(index)
        except TpmError as error:
            # 0x18b: handle 1 is no NV index; 0x14a: never written
            if error.rc in (0x18B, 0x14A):
                return None
            raise
        return cut_der(data)

    def activate(self, key: Key, ek: Key, credential: bytes, secret: bytes) -> bytes:
        """Return what MakeCredential put into `credential` for the key `key`: proof that both live in this TPM.

        Args:
            credential: contents of TPM2B_ID_OBJECT.
            secret: contents of TPM2B_ENCRYPTED_SECRET; both as `tpm.enrol.make_credential` returns them.

        Raises:
            TpmError: 0x1df: made for another key; other codes: for another TPM.
        """
        with self._endorsement_session() as session:
            _, answer = self.execute(
                ACTIVATE_CREDENTIAL,
                (key.handle, ek.handle),
                _sized(credential) + _sized(secret),
                sessions=(PASSWORD, session),
            )
        return _Reader(answer, ACTIVATE_CREDENTIAL).sized()

    @contextmanager
    def _endorsement_session(self) -> Iterator[int]:
        """A policy session with PolicySecret(endorsement), which the EK's policy wants."""
        parameters = _sized(secrets.token_bytes(32)) + struct.pack(">HBHH", 0, 1, 0x0010, 0x000B)
        (session,), _ = self.execute(START_AUTH_SESSION, (NULL, NULL), parameters, answered=1)
        try:
            # no nonce, no cpHash, no policyRef, no expiration
            self.execute(POLICY_SECRET, (ENDORSEMENT, session), struct.pack(">HHHi", 0, 0, 0, 0), sessions=(PASSWORD,))
            yield session
        finally:
            self.flush(session)


def cut_der(data: bytes) -> bytes | None:
    """Return the DER structure at the beginning of `data`, or None if there is none (X.690, 8.1.3)."""
    if len(data) < 4 or data[0] != 0x30:
        return None
    if data[1] < 0x80:
        size = 2 + data[1]
    elif data[1] in (0x81, 0x82, 0x83):
        count = data[1] - 0x80
        size = 2 + count + int.from_bytes(data[2 : 2 + count], "big")
    else:
        return None
    return data[:size] if size <= len(data) else None


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def _name(public: bytes) -> bytes:
    try:
        return parse_public(public, where="tpm.public").name
    except EvidenceError as error:
        raise MachineError("the TPM gives a key that does not parse", reasons=error.reasons) from error
