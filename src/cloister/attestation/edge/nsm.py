"""Evidence of an AWS Nitro enclave, through /dev/nsm (Linux 6.8 `nsm` driver, include/uapi/linux/nsm.h).

One ioctl, `NSM_IOCTL_RAW` = _IOWR(0x0A, 0, struct nsm_raw): two (u64 address, u64 length) pairs, request and response; the
driver writes the length of the response back. Both are CBOR (aws-nitro-enclaves-nsm-api, src/api/mod.rs):

    {"DescribePCR": {"index": n}}            -> {"DescribePCR": {"lock": bool, "data": bytes}}
    {"ExtendPCR": {"index": n, "data": ..}}  -> {"ExtendPCR": {"data": bytes}}      value = SHA-384(value || data)
    {"LockPCR": {"index": n}}                -> "LockPCR"
    {"Attestation": {"user_data", "nonce", "public_key"}} -> {"Attestation": {"document": bytes}}
    {"Error": name}

Events go to PCR 16, the first one that an enclave may extend. An attestation document lists *locked* PCRs only, so the
first evidence after an event locks PCR 16: whoever has more to record does it before. That is also what makes the log
final: nothing that runs later in the enclave can add to it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import cbor2

from cloister.attestation import cose
from cloister.attestation import events as event_log
from cloister.attestation.edge.attester import DeviceAttester
from cloister.attestation.types import Event, Evidence
from cloister.errors import MachineError, Reason

NSM: Final = Path("/dev/nsm")
IOCTL_RAW: Final = 3 << 30 | 32 << 16 | 0x0A << 8
REQUEST_LIMIT: Final = 0x1000
RESPONSE_LIMIT: Final = 0x3000
EVENT_PCR: Final = 16
TRIES: Final = 5
FIRST_WAIT_S: Final = 0.02

# ErrorCode of aws-nitro-enclaves-nsm-api -> what it means here
_ERRORS: Final = {
    "InvalidArgument": "an argument is invalid",
    "InvalidIndex": "there is no such PCR",
    "InvalidResponse": "the module answered another request",
    "ReadOnlyIndex": "the PCR is locked",
    "InvalidOperation": "the module does not know this request",
    "BufferTooSmall": "the answer does not fit",
    "InputTooLarge": "the request is too large",
    "InternalError": "internal error of the module",
}


class Device:
    """The three system calls that /dev/nsm needs."""

    def __init__(self, path: Path = NSM) -> None:
        self.path = path

    def exists(self) -> bool:
        return self.path.exists()

    def open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def ioctl(self, descriptor: int, request: int, message: bytearray) -> None:
        fcntl.ioctl(descriptor, request, message, True)


class NsmError(MachineError):
    """The module refused; `kind` is its word."""

    def __init__(self, request: str, kind: str) -> None:
        super().__init__(f"the Nitro module refuses {request}: {_ERRORS.get(kind, kind)}")
        self.kind = kind


class NitroAttester:
    """An AWS Nitro enclave.

    Args:
        device: system calls; tests pass ones that play the driver.
        wait: sleeps for that many seconds between tries.
        devices: attested beside the CPU.
    """

    name: Final = "nitro"
    report_data_bytes: Final = 64

    def __init__(
        self,
        *,
        device: Device | None = None,
        wait: Callable[[float], None] = time.sleep,
        devices: tuple[DeviceAttester, ...] = (),
    ) -> None:
        self._device = Device() if device is None else device
        self._wait = wait
        self._events: tuple[Event, ...] = ()
        self.devices = devices

    def missing(self) -> tuple[Reason, ...]:
        """Return what this machine lacks; empty means that it looks like a Nitro enclave."""
        if self._device.exists():
            return ()
        return (Reason("tee.nsm", f"no {self._device.path}", "an AWS Nitro enclave with the nsm driver (Linux 6.8)"),)

    def extend(self, name: str, data: bytes) -> None:
        """Record an event in PCR 16.

        Raises:
            MachineError: the PCR is locked (evidence was made already), or another program extended it.
        """
        entry = event_log.event(name, data)
        before, after = event_log.replay(self._events), event_log.replay((*self._events, entry))
        value, locked = self._describe()
        _expect(value, before, "before the extension")
        if locked:
            raise MachineError(
                "PCR 16 is locked: no event can be recorded after the first evidence",
                hint="record every event before evidence is made, or start a fresh enclave",
            )
        try:
            self._request("ExtendPCR", {"index": EVENT_PCR, "data": entry.digest}, again=False)
        except InterruptedError:  # whether the module did it, only the register knows
            value, _ = self._describe()
            if value == before:
                self._request("ExtendPCR", {"index": EVENT_PCR, "data": entry.digest}, again=False)
        self._events += (entry,)
        _expect(self._describe()[0], after, "after the extension")

    def evidence(self, report_data: bytes) -> Evidence:
        if len(report_data) != 64:
            raise ValueError(f"report data of {len(report_data)} bytes, wanted 64")
        value, locked = self._describe()
        _expect(value, event_log.replay(self._events), "before the attestation")
        if self._events and not locked:
            self._lock()
        fields = {"user_data": report_data, "nonce": None, "public_key": None}
        document = self._bytes("Attestation", self._request("Attestation", fields), "document")
        if report_data not in document:  # user_data stands in the document as it is; the verifier finds it by its name
            raise MachineError("the Nitro module signed other user data than ours")
        return Evidence("nitro", document, self._events)

    def _lock(self) -> None:
        try:
            self._request("LockPCR", {"index": EVENT_PCR})
        except NsmError as error:
            if error.kind != "ReadOnlyIndex":  # an interrupted call had locked it
                raise

    def _describe(self) -> tuple[bytes, bool]:
        answer = self._request("DescribePCR", {"index": EVENT_PCR})
        locked = answer.get("lock")
        if not isinstance(locked, bool):
            raise MachineError("the Nitro module does not say whether PCR 16 is locked")
        return self._bytes("DescribePCR", answer, "data"), locked

    def _bytes(self, request: str, answer: dict[str, Any], name: str) -> bytes:
        value = answer.get(name)
        if not isinstance(value, bytes):
            raise MachineError(f"the Nitro module answers {request} without {name}")
        return value

    def _request(self, name: str, fields: dict[str, Any], *, again: bool = True) -> dict[str, Any]:
        """Return the answer's map.

        Raises:
            InterruptedError: a signal, and not `again`.
            NsmError: the module refuses.
            MachineError: the device fails or answers something else.
        """
        request = cbor2.dumps({name: fields})
        if len(request) > REQUEST_LIMIT:
            raise ValueError(f"a request of {len(request)} bytes, at most {REQUEST_LIMIT} fit")
        for attempt in range(TRIES):
            if attempt:
                self._wait(FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                raw = self._call(request)
                break
            except InterruptedError:
                if not again:
                    raise
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.EAGAIN):
                    raise MachineError(
                        f"{self._device.path} fails: {error.strerror}",
                        hint="run as root inside a Nitro enclave; the raw ioctl needs CAP_SYS_ADMIN",
                    ) from error
        else:
            raise MachineError(f"{self._device.path} gives no answer after {TRIES} tries")
        try:
            answer: Any = cose.loads(bytes(raw), limit=RESPONSE_LIMIT)  # the hypervisor's bytes: bounded in every way
        except cose.FormError as error:
            raise MachineError("the Nitro module's answer is no CBOR") from error
        if answer == name:  # requests that return nothing
            return {}
        if isinstance(answer, dict) and len(answer) == 1:
            if isinstance(answer.get("Error"), str):
                raise NsmError(name, answer["Error"])
            if isinstance(answer.get(name), dict):
                return dict(answer[name])
        raise MachineError(f"the Nitro module answers something else to {name}")

    def _call(self, request: bytes) -> bytes:
        asked = ctypes.create_string_buffer(request, len(request))
        answer = ctypes.create_string_buffer(RESPONSE_LIMIT)
        message = bytearray(
            struct.pack("@QQQQ", ctypes.addressof(asked), len(request), ctypes.addressof(answer), RESPONSE_LIMIT)
        )
        descriptor = self._device.open()
        try:
            self._device.ioctl(descriptor, IOCTL_RAW, message)
        finally:
            self._device.close(descriptor)
        size = struct.unpack_from("@Q", message, 24)[0]
        if not 0 < size <= RESPONSE_LIMIT:
            raise MachineError(f"the Nitro module says that its answer has {size} bytes")
        return answer.raw[:size]


def _expect(value: bytes, wanted: bytes, when: str) -> None:
    if value != wanted:
        raise MachineError(
            f"PCR 16 is not what our event log says, {when}",
            reasons=[
                Reason("nitro.pcr16", value.hex(), wanted.hex(), "another program extends PCR 16 of this enclave")
            ],
            hint="start a fresh enclave in which only Cloister extends PCR 16",
        )
