"""Evidence of an SGX enclave under Gramine, through its pseudo files (Gramine manual, "Attestation and secret provisioning"):

    /dev/attestation/attestation_type   dcap, epid or none: sgx.remote_attestation of the manifest
    /dev/attestation/user_report_data   write 64 bytes
    /dev/attestation/quote              read: a quote over what was written last

The two files are one state of the whole process. A lock keeps our threads apart, and the quote is checked for our bytes
because other code of the process may use the files too. An enclave has no runtime register: the log is kept in memory
and the hardware signs `events.fold` of it.
"""

from __future__ import annotations

import errno
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cloister.attestation import events as event_log
from cloister.attestation.edge.attester import DeviceAttester
from cloister.attestation.edge.files import Files
from cloister.attestation.types import Event, Evidence
from cloister.errors import MachineError, Reason

ATTESTATION: Final = Path("/dev/attestation")
REPORT_DATA: Final = slice(368, 432)
"""In a quote v3: 48 bytes of header, then REPORTDATA at 320 of the report body (Intel SGX DCAP ECDSA quote library API, A.4)."""
QUOTE_LIMIT: Final = 64 * 1024
TRIES: Final = 5
FIRST_WAIT_S: Final = 0.05

_LOCK: Final = threading.Lock()


class GramineAttester:
    """An SGX enclave under Gramine.

    Args:
        folder: the pseudo files.
        files: file operations; tests pass ones that play Gramine.
        wait: sleeps for that many seconds between tries.
        devices: attested beside the CPU.
    """

    name: Final = "sgx"
    report_data_bytes: Final = 64

    def __init__(
        self,
        *,
        folder: Path = ATTESTATION,
        files: Files | None = None,
        wait: Callable[[float], None] = time.sleep,
        devices: tuple[DeviceAttester, ...] = (),
    ) -> None:
        self._folder = folder
        self._files = Files() if files is None else files
        self._wait = wait
        self._events: tuple[Event, ...] = ()
        self.devices = devices

    def missing(self) -> tuple[Reason, ...]:
        """Return what this process lacks; empty means that it looks like an enclave that can quote."""
        kind = self._folder / "attestation_type"
        try:
            found = self._files.read(kind).strip().decode("ascii", "replace")
        except OSError as error:
            return (Reason("tee.gramine", f"no {kind}: {error.strerror}", "a program under gramine-sgx"),)
        if found != "dcap":
            hint = 'say sgx.remote_attestation = "dcap" in the manifest and sign it again'
            return (Reason("tee.attestation_type", found or "nothing", "dcap", hint),)
        return ()

    def extend(self, name: str, data: bytes) -> None:
        """Record an event. No register keeps it: from the next evidence on, the quote covers it."""
        self._events += (event_log.event(name, data),)

    def evidence(self, report_data: bytes) -> Evidence:
        missing = self.missing()
        if missing:
            raise MachineError("this process is not in an SGX enclave that can quote", reasons=missing)
        signed = event_log.fold(report_data, self._events)
        problem = "no answer"
        for attempt in range(TRIES):
            if attempt:
                self._wait(FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                with _LOCK:
                    self._files.write(self._folder / "user_report_data", signed)
                    raw = self._files.read(self._folder / "quote", limit=QUOTE_LIMIT)
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.EAGAIN, errno.EINTR):
                    raise MachineError(
                        f"no quote can be made: {error.strerror}",
                        hint="the host needs a running AESM service with the quoting library (sgx-aesm-service, libsgx-dcap-ql)",
                    ) from error
                problem = "the quoting enclave is busy"
                continue
            quote = _exact(raw)
            if quote[REPORT_DATA] == signed:
                return Evidence("sgx", quote, self._events)
            problem = "other code of this process writes user_report_data between our write and our read"
        raise MachineError(f"no SGX quote after {TRIES} tries: {problem}")


def _exact(raw: bytes) -> bytes:
    """Return the quote without what follows it: firmware and runtimes pad with zeros, which no signature covers."""
    if len(raw) < 436:
        raise MachineError(f"the quoting enclave returned {len(raw)} bytes, which is no quote")
    size = 436 + struct.unpack_from("<I", raw, 432)[0]
    if len(raw) < size or raw[size:].strip(b"\x00"):
        raise MachineError(f"the quoting enclave returned {len(raw)} bytes for a quote of {size}")
    return bytes(raw[:size])
