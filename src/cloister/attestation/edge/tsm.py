"""Evidence through the kernel's configfs-tsm: TDX, SEV-SNP and Arm CCA guests.

The interfaces are those of Documentation/ABI/testing/configfs-tsm-report (Linux 6.7; root) and
sysfs-devices-virtual-misc-tdx_guest (Linux 6.16):

    <tsm>/<entry>/inblob            one write of 64 bytes
    <tsm>/<entry>/outblob           the report for the last inblob; reading makes it
    <tsm>/<entry>/auxblob           SEV-SNP: the host's certificate table, may be empty
    <tsm>/<entry>/privlevel         SEV-SNP: VMPL that the report is for, decimal, not below privlevel_floor
    <tsm>/<entry>/service_provider  only there when an SVSM runs below the guest
    <tsm>/<entry>/generation        decimal, one more for each write; another value: somebody else wrote to our entry
    <tsm>/<entry>/provider          tdx_guest, sev_guest or arm_cca_guest
    <rtmr>                          TDX. read: 48 bytes; write of 48 bytes: value = SHA-384(value || digest)

Steps of `Reports.get`:
  1 entry     make an entry of our own, and remove it whatever happens; entries of others are not touched
  2 provider  it is the one we expect
  3 write     privilege level if wanted, then the data in one write
  4 read      outblob, then auxblob; EBUSY, EAGAIN or EINTR: wait and try again
  5 race      `generation` grew by exactly our own writes, else try again
The attesters then look into what they got: a report over other data than ours is never sent.

SEV-SNP and CCA have no runtime register that a guest kernel offers. The attester keeps the log in memory and the hardware
signs `events.fold` of it.

Not asked for: the report of an SVSM's services (`service_provider`, `manifestblob`). It attests the services, not us.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from cloister.attestation import events as event_log
from cloister.attestation.edge.attester import DeviceAttester
from cloister.attestation.edge.files import Files
from cloister.attestation.tdx import format as tdx_format
from cloister.attestation.types import Event, Evidence
from cloister.errors import EvidenceError, MachineError, Reason

TSM_REPORTS: Final = Path("/sys/kernel/config/tsm/report")
TDX_GUEST: Final = Path("/dev/tdx_guest")
SEV_GUEST: Final = Path("/dev/sev-guest")
TDX_RTMR3: Final = Path("/sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384")
TRIES: Final = 8
FIRST_WAIT_S: Final = 0.05
"""Doubled after each try: 8 tries wait 6.35 s in all, longer than the quote generation of a busy host."""
AGAIN: Final = frozenset({errno.EBUSY, errno.EAGAIN, errno.EINTR})
LEAST_PRIVILEGED: Final = 3  # TSM_REPORT_PRIVLEVEL_MAX


@dataclass(frozen=True, slots=True)
class Report:
    """What one entry gave."""

    out: bytes
    aux: bytes


class Reports:
    """The folder in which report entries are made.

    Args:
        provider: what `provider` must say.
        hardware: its name for people.
        folder: where entries are made.
        files: file operations; tests pass ones that play the kernel over a temporary tree.
        wait: sleeps for that many seconds between tries.
    """

    def __init__(
        self,
        provider: str,
        hardware: str,
        *,
        folder: Path = TSM_REPORTS,
        files: Files | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.provider, self.hardware, self.folder = provider, hardware, folder
        self.files = Files() if files is None else files
        self._wait = wait

    def missing(self) -> tuple[Reason, ...]:
        """Return what this machine lacks for an entry of our provider; asks the kernel by making one and removing it."""
        hint = f"Linux 6.7 or newer in a {self.hardware} guest, configfs mounted, root"
        if not self.files.exists(self.folder):
            return (Reason("tee.report", f"no {self.folder}", hint),)
        try:
            found = self.found_provider()
        except MachineError as error:
            return (Reason("tee.report", error.message, hint, error.hint),)
        if found != self.provider:
            return (Reason("tee.provider", found or "no provider", self.provider, f"not a {self.hardware} guest"),)
        return ()

    def found_provider(self) -> str:
        """Return what the kernel's provider calls itself.

        Raises:
            MachineError: no entry can be made.
        """
        entry = self._make()
        try:
            return self.files.read(entry / "provider").strip().decode("ascii", "replace")
        except OSError as error:
            raise MachineError(f"the report entry {entry} fails: {error.strerror}") from error
        finally:
            self._remove(entry)

    def svsm(self) -> bool:
        """Return whether an SVSM runs below this guest, by the attribute that only then exists."""
        entry = self._make()
        try:
            return self.files.exists(entry / "service_provider")
        finally:
            self._remove(entry)

    def get(self, data: bytes, *, levels: bool = False, privlevel: int | None = None) -> Report:
        """Return the report over `data` (64 bytes).

        With `levels` it is for the privilege level `privlevel`, by default the most privileged that the kernel allows.

        Raises:
            ValueError: `data` is not 64 bytes.
            MachineError: no entry, another provider, a privilege level that the kernel does not give, or no answer.
        """
        if len(data) != 64:
            raise ValueError(f"report data of {len(data)} bytes, wanted 64")
        # (1)
        entry = self._make()
        try:
            return self._get(entry, data, self._level(entry, privlevel) if levels else None)
        finally:
            self._remove(entry)

    def _make(self) -> Path:
        entry = self.folder / f"cloister-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            self.files.mkdir(entry)
        except OSError as error:
            raise MachineError(
                f"no report entry can be made in {self.folder}: {error.strerror}",
                hint=f"run as root inside a {self.hardware} guest with configfs mounted",
            ) from error
        return entry

    def _remove(self, entry: Path) -> None:
        with suppress(OSError):  # the report counts; a left entry is empty and does no harm
            self.files.rmdir(entry)

    def _get(self, entry: Path, data: bytes, privlevel: int | None) -> Report:
        problem = "no answer"
        for attempt in range(TRIES):
            if attempt:
                self._wait(FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                # (2)
                provider = self.files.read(entry / "provider").strip().decode("ascii", "replace")
                if provider != self.provider:
                    raise MachineError(f"this is not a {self.hardware} guest: the report provider is {provider}")
                # (3)
                generation = _number(self.files.read(entry / "generation"), entry, "generation")
                writes = 1
                if privlevel is not None:
                    self.files.write(entry / "privlevel", b"%d\n" % privlevel)
                    writes += 1
                self.files.write(entry / "inblob", data)
                # (4)
                out = self.files.read(entry / "outblob")
                aux = self.files.read(entry / "auxblob") if self.files.exists(entry / "auxblob") else b""
                # (5)
                if _number(self.files.read(entry / "generation"), entry, "generation") == generation + writes:
                    return Report(out, aux)
                problem = "another program wrote to our report entry"
            except OSError as error:
                if error.errno not in AGAIN:
                    raise MachineError(f"the report entry {entry} fails: {error.strerror}") from error
                problem = f"the {self.hardware} module is busy or limits the rate"
        raise MachineError(f"no {self.hardware} report after {TRIES} tries: {problem}")

    def _level(self, entry: Path, wanted: int | None) -> int | None:
        """Return the privilege level to write; None where the kernel has none."""
        if not self.files.exists(entry / "privlevel_floor"):
            if wanted is not None:
                raise MachineError(f"this kernel offers no privilege levels of {self.hardware}")
            return None
        try:
            floor = _number(self.files.read(entry / "privlevel_floor"), entry, "privlevel_floor")
        except OSError as error:
            raise MachineError(f"the report entry {entry} fails: {error.strerror}") from error
        if wanted is not None and not floor <= wanted <= LEAST_PRIVILEGED:
            raise MachineError(
                f"no report for VMPL {wanted} can be made",
                reasons=[Reason("tee.privlevel", str(wanted), f"{floor} to {LEAST_PRIVILEGED}")],
                hint="a guest attests its own level or a less privileged one; below an SVSM that is not 0",
            )
        return floor if wanted is None else wanted


class TdxAttester:
    """A real TDX guest: quotes through configfs-tsm, events in RTMR 3.

    Args:
        reports: the folder in which report entries are made.
        register: the file of RTMR 3.
        files, wait: as in `Reports`.
        devices: attested beside the CPU.
    """

    name: Final = "tdx"
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
        self._files = Files() if files is None else files
        self._reports = Reports("tdx_guest", "TDX", folder=reports, files=self._files, wait=wait)
        self._register = register
        self._events: tuple[Event, ...] = ()
        self.devices = devices

    def missing(self) -> tuple[Reason, ...]:
        """Return what this machine lacks; empty means that it looks like a TDX guest."""
        found = self._reports.missing()
        if not self._files.exists(self._register):
            found += (Reason("tee.register", f"no {self._register}", "Linux 6.16 or newer in a TDX guest"),)
        return found

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
        raw = self._reports.get(report_data).out
        try:
            quote = tdx_format.without_padding(raw)
            parsed = tdx_format.parse(quote)
        except EvidenceError as error:
            raise MachineError("the TDX module returned no quote", reasons=error.reasons) from error
        if parsed.report_data != report_data:
            raise MachineError("the TDX module quoted other report data than ours")
        self._expect(parsed.measurements()["rtmr3"], event_log.replay(self._events), "in the quote")
        return Evidence("tdx", quote, self._events)

    def _expect(self, value: bytes, wanted: bytes, when: str) -> None:
        if value != wanted:
            raise MachineError(
                f"RTMR 3 is not what our event log says, {when}",
                reasons=[Reason("tdx.rtmr3", value.hex(), wanted.hex(), "another program extends RTMR 3 of this TD")],
                hint="start a fresh TD in which only Cloister extends RTMR 3",
            )


SNP_REPORT_BYTES: Final = 0x4A0  # AMD 56860, table "ATTESTATION_REPORT structure"
SNP_REPORT_DATA: Final = slice(0x50, 0x90)


class SnpAttester:
    """A real SEV-SNP guest through configfs-tsm; events in memory, signed by `events.fold`.

    Args:
        privlevel: VMPL to attest; default: the most privileged one that this guest may (0, or 2 below an SVSM).
        reports, files, wait: as in `Reports`.
        devices: attested beside the CPU.
    """

    name: Final = "sev-snp"
    report_data_bytes: Final = 64

    def __init__(
        self,
        *,
        privlevel: int | None = None,
        reports: Path = TSM_REPORTS,
        files: Files | None = None,
        wait: Callable[[float], None] = time.sleep,
        devices: tuple[DeviceAttester, ...] = (),
    ) -> None:
        self._reports = Reports("sev_guest", "SEV-SNP", folder=reports, files=files, wait=wait)
        self._privlevel = privlevel
        self._events: tuple[Event, ...] = ()
        self.devices = devices

    def missing(self) -> tuple[Reason, ...]:
        """Return what this machine lacks; empty means that it looks like an SEV-SNP guest."""
        return self._reports.missing()

    def extend(self, name: str, data: bytes) -> None:
        """Record an event. No register keeps it: from the next evidence on, the report covers it."""
        self._events += (event_log.event(name, data),)

    def evidence(self, report_data: bytes) -> Evidence:
        signed = event_log.fold(report_data, self._events)
        report = self._reports.get(signed, levels=True, privlevel=self._privlevel)
        if len(report.out) != SNP_REPORT_BYTES:
            raise MachineError(f"the SEV-SNP firmware returned {len(report.out)} bytes, wanted {SNP_REPORT_BYTES}")
        if report.out[SNP_REPORT_DATA] != signed:
            raise MachineError("the SEV-SNP firmware signed other report data than ours")
        table = report.aux.rstrip(b"\x00")
        parts = {"table": report.aux} if table else {}
        return Evidence("sev-snp", report.out, self._events, MappingProxyType(parts))


class CcaAttester:
    """A real Arm CCA realm through configfs-tsm; events in memory, signed by `events.fold`. Experimental."""

    name: Final = "cca"
    report_data_bytes: Final = 64

    def __init__(
        self,
        *,
        reports: Path = TSM_REPORTS,
        files: Files | None = None,
        wait: Callable[[float], None] = time.sleep,
        devices: tuple[DeviceAttester, ...] = (),
    ) -> None:
        self._reports = Reports("arm_cca_guest", "Arm CCA", folder=reports, files=files, wait=wait)
        self._events: tuple[Event, ...] = ()
        self.devices = devices

    def missing(self) -> tuple[Reason, ...]:
        """Return what this machine lacks; empty means that it looks like a realm."""
        return self._reports.missing()

    def extend(self, name: str, data: bytes) -> None:
        """Record an event. No register keeps it: from the next evidence on, the token covers it."""
        self._events += (event_log.event(name, data),)

    def evidence(self, report_data: bytes) -> Evidence:
        signed = event_log.fold(report_data, self._events)
        token = self._reports.get(signed).out
        if signed not in token:  # the challenge stands in the token as it is; the verifier finds it by its claim
            raise MachineError("the realm manager signed another challenge than ours")
        return Evidence("cca", token, self._events)


def _number(text: bytes, entry: Path, name: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise MachineError(f"the report entry {entry} has no number in {name}") from error
