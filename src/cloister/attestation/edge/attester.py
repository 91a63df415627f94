"""Attesters: extend a runtime register, collect evidence. Hardware through the kernel, or soft by name.

The kernel's interfaces are those of Documentation/ABI/testing/configfs-tsm-report (Linux 6.7, root) and
sysfs-devices-virtual-misc-tdx_guest (Linux 6.16):

    <tsm>/<entry>/inblob       one write of 64 bytes; each write increments `generation`
    <tsm>/<entry>/outblob      the quote for the last inblob
    <tsm>/<entry>/generation   decimal; another value than expected: somebody else wrote to our entry
    <tsm>/<entry>/provider     tdx_guest
    <rtmr>                     read: 48 bytes; write of 48 bytes: value = SHA-384(value || digest)

Steps of `TsmAttester.evidence`:
  1 entry     make an entry of our own, and remove it whatever happens
  2 provider  it is tdx_guest
  3 write     REPORT_DATA in one write
  4 read      the quote; EBUSY or EAGAIN: wait and try again
  5 race      `generation` is one more than before, else try again
  6 check     the quote parses, holds our REPORT_DATA, and its RTMR 3 is what our log replays to
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from cloister.attestation import events as event_log
from cloister.attestation.binding import Binding
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.tdx import format as tdx_format
from cloister.attestation.types import Event, Evidence
from cloister.errors import EvidenceError, InputError, MachineError, Reason

TSM_REPORTS: Final = Path("/sys/kernel/config/tsm/report")
TDX_RTMR3: Final = Path("/sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384")
TRIES: Final = 8
FIRST_WAIT_S: Final = 0.05
"""Doubled after each try: 8 tries wait 6.35 s in all, longer than the quote generation of a busy host."""


class DeviceAttester(Protocol):
    """A device of this machine that attests beside the CPU: a GPU, a TPM."""

    @property
    def name(self) -> str:
        """`nvidia-gpu`, `tpm`, or `soft-..`."""
        ...

    def evidence(self, qualifying_data: bytes) -> Evidence:
        """Return fresh evidence over `qualifying_data` (32 bytes).

        Raises:
            ValueError: `qualifying_data` is not 32 bytes.
            MachineError: the device does not answer, or is in a state in which its evidence means nothing.
        """
        ...


class Attester(Protocol):
    """What a TEE can do for the program inside it."""

    @property
    def name(self) -> str:
        """`tdx`, or `soft-tdx`."""
        ...

    @property
    def report_data_bytes(self) -> int:
        """How much the hardware signs for us: 64 bytes (`Binding.report_data`), or 32 (`Binding.qualifying_data`)."""
        ...

    @property
    def devices(self) -> tuple[DeviceAttester, ...]:
        """Devices whose evidence belongs to every piece of evidence of this machine, in the order in which it is sent."""
        ...

    def extend(self, name: str, data: bytes) -> None:
        """Record an event and extend runtime register 3 with SHA-384(`data`). It cannot be taken back.

        Raises:
            MachineError: the register cannot be extended.
        """
        ...

    def evidence(self, report_data: bytes) -> Evidence:
        """Return fresh evidence over `report_data` (64 bytes) with the event log so far.

        Raises:
            ValueError: `report_data` is not 64 bytes.
            MachineError: the hardware does not answer.
        """
        ...


def attest(attester: Attester, binding: Binding) -> Evidence:
    """Return evidence of the whole machine over `binding`: its devices first, then the CPU over what they said.

    The verifier checks it against `binding.over(evidence.devices)`.

    Raises:
        ValueError: `binding` already names devices.
        MachineError: a device or the CPU does not answer.
    """
    if binding.devices:
        raise ValueError("the binding already names devices; give the one that they are to attest")
    devices = tuple(device.evidence(binding.for_devices().qualifying_data()) for device in attester.devices)
    full = binding.over(devices)
    data = full.report_data() if attester.report_data_bytes == 64 else full.qualifying_data()
    return replace(attester.evidence(data), devices=devices)


class SoftTdxAttester:
    """A TDX guest in software. It protects nothing.

    Args:
        measurement: MRTD, 48 bytes.
        machine: which soft machine, see `soft.tdx.platform`; default: one that is up to date.
        debug: set the debug bit, for tests.
        devices: attested beside the CPU.
    """

    notice: Final = soft_tdx.NOTICE
    report_data_bytes: Final = 64

    def __init__(
        self,
        measurement: bytes,
        *,
        machine: soft_tdx.Platform | None = None,
        debug: bool = False,
        devices: tuple[DeviceAttester, ...] = (),
    ) -> None:
        if len(measurement) != 48:
            raise ValueError(f"measurement of {len(measurement)} bytes, wanted 48")
        self._measurement = measurement
        self._machine = soft_tdx.platform() if machine is None else machine
        self._debug = debug
        self._register = event_log.INITIAL
        self._events: tuple[Event, ...] = ()
        self.devices = devices

    @property
    def name(self) -> str:
        return "soft-tdx"

    def extend(self, name: str, data: bytes) -> None:
        entry = event_log.event(name, data)
        self._register = event_log.extend(self._register, entry.digest)
        self._events += (entry,)

    def evidence(self, report_data: bytes) -> Evidence:
        quote = soft_tdx.quote(
            self._machine,
            mrtd=self._measurement,
            rtmr3=self._register,
            report_data=report_data,
            debug=self._debug,
        )
        return Evidence("tdx", quote, self._events)

    def __repr__(self) -> str:
        return f"SoftTdxAttester({soft_tdx.NOTICE})"


class Files:
    """The five file operations that the kernel's interfaces need; one write is one write(2)."""

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def rmdir(self, path: Path) -> None:
        path.rmdir()

    def exists(self, path: Path) -> bool:
        return path.exists()

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def write(self, path: Path, data: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written != len(data):
            raise OSError(errno.EIO, f"{written} of {len(data)} bytes were taken")


class TsmAttester:
    """A real TDX guest, through configfs-tsm and the RTMR file of the kernel.

    Args:
        reports: the folder in which report entries are made.
        register: the file of RTMR 3.
        files: file operations; tests pass ones that play the kernel over a temporary tree.
        wait: sleeps for that many seconds between tries.
        devices: attested beside the CPU.
    """

    report_data_bytes: Final = 64

    def __init__(
        self,
        *,
        reports: Path = TSM_REPORTS,
        register: Path = TDX_RTMR3,
        files: Files | None = None,
        wait: Callable[[float], None] = time.sleep,
        devices: tuple[DeviceAttester, ...] = (),
    ) -> None:
        self._reports = reports
        self._register = register
        self._files = Files() if files is None else files
        self._wait = wait
        self._events: tuple[Event, ...] = ()
        self.devices = devices

    @property
    def name(self) -> str:
        return "tdx"

    def missing(self) -> tuple[Reason, ...]:
        """Return what this machine lacks; empty means that it looks like a TDX guest."""
        wanted = (
            ("tee.report", self._reports, "Linux 6.7 or newer in a TDX guest, configfs mounted, root"),
            ("tee.register", self._register, "Linux 6.16 or newer in a TDX guest"),
        )
        return tuple(Reason(where, f"no {path}", hint) for where, path, hint in wanted if not self._files.exists(path))

    def extend(self, name: str, data: bytes) -> None:
        entry = event_log.event(name, data)
        before = event_log.replay(self._events)
        try:
            # somebody else's extension would make our log useless: say so before a secret depends on it
            self._expect(self._files.read(self._register), before, "before the extension")
            self._files.write(self._register, entry.digest)
            self._events += (entry,)
            self._expect(self._files.read(self._register), event_log.replay(self._events), "after the extension")
        except OSError as error:
            raise MachineError(
                f"RTMR 3 cannot be extended: {error.strerror}", hint=f"{self._register} must be writable (root)"
            ) from error

    def evidence(self, report_data: bytes) -> Evidence:
        if len(report_data) != 64:
            raise ValueError(f"report data of {len(report_data)} bytes, wanted 64")
        # (1)
        entry = self._reports / f"cloister-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            self._files.mkdir(entry)
        except OSError as error:
            raise MachineError(
                f"no report entry can be made in {self._reports}: {error.strerror}",
                hint="run as root inside a TDX guest with configfs mounted",
            ) from error
        try:
            raw = self._report(entry, report_data)
        finally:
            with suppress(OSError):  # the report counts; a left entry is empty and does no harm
                self._files.rmdir(entry)
        # (6)
        try:
            quote = tdx_format.without_padding(raw)
            parsed = tdx_format.parse(quote)
        except EvidenceError as error:
            raise MachineError("the TDX module returned no quote", reasons=error.reasons) from error
        if parsed.report_data != report_data:
            raise MachineError("the TDX module quoted other report data than ours")
        self._expect(parsed.measurements()["rtmr3"], event_log.replay(self._events), "in the quote")
        return Evidence("tdx", quote, self._events)

    def _report(self, entry: Path, report_data: bytes) -> bytes:
        problem = "no answer"
        for attempt in range(TRIES):
            if attempt:
                self._wait(FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                # (2)
                provider = self._files.read(entry / "provider").strip()
                if provider != b"tdx_guest":
                    raise MachineError(
                        f"this is not a TDX guest: the report provider is {provider.decode('ascii', 'replace')}"
                    )
                # (3)
                generation = int(self._files.read(entry / "generation"))
                self._files.write(entry / "inblob", report_data)
                # (4)
                quote = self._files.read(entry / "outblob")
                # (5)
                if int(self._files.read(entry / "generation")) == generation + 1:
                    return quote
                problem = "another program wrote to our report entry"
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.EAGAIN):
                    raise MachineError(f"the report entry {entry} fails: {error.strerror}") from error
                problem = "the TDX module is busy or limits the rate"
            except ValueError as error:
                raise MachineError(f"the report entry {entry} has no generation number") from error
        raise MachineError(f"no TDX quote after {TRIES} tries: {problem}")

    def _expect(self, value: bytes, wanted: bytes, when: str) -> None:
        if value != wanted:
            raise MachineError(
                f"RTMR 3 is not what our event log says, {when}",
                reasons=[Reason("tdx.rtmr3", value.hex(), wanted.hex(), "another program extends RTMR 3 of this TD")],
                hint="start a fresh TD in which only Cloister extends RTMR 3",
            )


def find_attester(kind: str = "auto", *, measurement: bytes) -> Attester:
    """Return the attester of this machine.

    `auto` takes hardware and never software; `tdx` demands TDX; `soft-tdx` is software with MRTD = `measurement`
    (48 bytes) and protects nothing. On hardware the firmware measures, and `measurement` is not used.

    Raises:
        MachineError: this machine has no such hardware; `reasons` say what is missing.
        InputError: an unknown kind.
        ValueError: `measurement` is not 48 bytes.
    """
    if kind == "soft-tdx":
        return SoftTdxAttester(measurement)
    if kind not in ("auto", "tdx"):
        raise InputError(f"unknown attester {kind!r}", hint="use auto, tdx or soft-tdx")
    hardware = TsmAttester()
    missing = hardware.missing()
    if missing:
        raise MachineError(
            "this machine is not inside a TEE that Cloister can use",
            reasons=missing,
            hint="to try without any protection, name soft-tdx; contracts refuse it unless they accept simulated",
        )
    return hardware
