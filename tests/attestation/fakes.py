"""Machines in a folder: what the attesters' tests play instead of a kernel, an enclave runtime, a TPM or a GPU driver.

Each fake does what the interface promises, over real files or real system call arguments, and has faults to inject.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cbor2
import pytest

from cloister.attestation import events as event_log
from cloister.attestation.edge import nsm, tpmclient
from cloister.attestation.edge.files import READ_LIMIT, Files
from cloister.attestation.soft import tdx as soft_tdx
from cloister.testkit.softtee import MEASUREMENT


class Kernel(Files):
    """configfs-tsm and the RTMR file over a temporary tree, with faults to inject.

    `busy` reads of outblob answer `errno`, `racers` writes to inblob are followed by somebody else's write. `provider` decides
    which attributes an entry has: SEV-SNP has privilege levels and a certificate table, with `svsm` also a service provider.
    """

    def __init__(self, root: Path, provider: str = "tdx_guest") -> None:
        self.reports = root / "report"
        self.register = root / "rtmr3:sha384"
        self.reports.mkdir(parents=True)
        self.register.write_bytes(bytes(48))
        self.provider = provider.encode() + b"\n"
        self.floor = 0
        self.svsm = False
        self.table = b""
        self.busy = 0
        self.errno = errno.EBUSY
        self.racers = 0
        self.padding = bytes(70) if provider == "tdx_guest" else b""
        quotes: dict[str, Callable[[bytes, bytes], bytes]] = {
            "tdx_guest": self._quote,
            "sev_guest": snp_report,
            "arm_cca_guest": lambda data, _: b"\xd9\x01\x8f token " + data,
        }
        self.quote = quotes[provider]
        self.writes: list[tuple[str, int]] = []

    def _quote(self, report_data: bytes, rtmr3: bytes) -> bytes:
        return soft_tdx.quote(soft_tdx.platform(), mrtd=MEASUREMENT, rtmr3=rtmr3, report_data=report_data)

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        (path / "generation").write_bytes(b"0\n")
        (path / "provider").write_bytes(self.provider)
        (path / "inblob").write_bytes(b"")
        (path / "outblob").write_bytes(b"")
        (path / "auxblob").write_bytes(b"")
        if self.provider == b"sev_guest\n":
            (path / "privlevel").write_bytes(b"")
            (path / "privlevel_floor").write_bytes(b"%d\n" % self.floor)
            if self.svsm:
                (path / "service_provider").write_bytes(b"")

    def rmdir(self, path: Path) -> None:
        # configfs removes the attributes with their entry
        for each in path.iterdir():
            each.unlink()
        super().rmdir(path)

    def read(self, path: Path, *, limit: int = READ_LIMIT) -> bytes:
        if path.name == "outblob" and self.busy:
            self.busy -= 1
            raise OSError(self.errno, os.strerror(self.errno))
        return super().read(path, limit=limit)

    def write(self, path: Path, data: bytes) -> None:
        self.writes.append((path.name, len(data)))
        if path == self.register:
            super().write(path, event_log.extend(self.register.read_bytes(), data))
            return
        if path.name == "privlevel" and not self.floor <= int(data) <= 3:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._attribute(path, data)
        if path.name == "inblob" and self.racers:
            self.racers -= 1
            self._attribute(path, b"\xee" * 64)

    def _attribute(self, path: Path, data: bytes) -> None:
        super().write(path, data)
        generation = path.parent / "generation"
        generation.write_bytes(b"%d\n" % (int(generation.read_bytes()) + 1))
        if path.name == "inblob":
            quote = self.quote(data, self.register.read_bytes())
            (path.parent / "outblob").write_bytes(quote + self.padding if quote else b"")
            (path.parent / "auxblob").write_bytes(self.table)


def snp_report(report_data: bytes, _: bytes = b"") -> bytes:
    """A report with nothing in it but its report data: what the attester looks at."""
    return struct.pack("<II", 3, 1) + bytes(0x48) + report_data + bytes(0x4A0 - 0x90)


class Enclave(Files):
    """Gramine's pseudo files. `thieves` writes of other code come between our write and our read."""

    def __init__(self, root: Path) -> None:
        self.folder = root
        (root / "attestation_type").write_bytes(b"dcap\n")
        (root / "user_report_data").write_bytes(b"")
        (root / "quote").write_bytes(b"")
        self.thieves = 0
        self.busy = 0
        self.errno = errno.EAGAIN
        self.padding = bytes(100)
        self.quote: Callable[[bytes], bytes] = lambda data: (
            b"\x03\x00\x02\x00" + bytes(364) + data + struct.pack("<I", 10) + b"signature!"
        )

    def write(self, path: Path, data: bytes) -> None:
        super().write(path, data)
        if self.thieves:
            self.thieves -= 1
            data = b"\xee" * 64
        (self.folder / "quote").write_bytes(self.quote(data) + self.padding)

    def read(self, path: Path, *, limit: int = READ_LIMIT) -> bytes:
        if path.name == "quote" and self.busy:
            self.busy -= 1
            raise OSError(self.errno, os.strerror(self.errno))
        return super().read(path, limit=limit)


class Nsm(nsm.Device):
    """The nsm driver and its module: real ioctl arguments, 32 PCRs, documents that list locked PCRs only.

    `faults` are raised by the next ioctls, one each; an error of the tuple `(error, True)` comes after the module did it.
    """

    def __init__(self) -> None:
        super().__init__(Path("/dev/nsm"))
        self.pcrs = {index: bytes(48) for index in range(32)}
        self.locked = set(range(16))
        self.faults: list[tuple[OSError, bool]] = []
        self.answer: Callable[[Any], Any] | None = None
        self.raw: bytes | None = None
        self.asked: list[str] = []
        self.open_descriptors = 0

    def exists(self) -> bool:
        return True

    def open(self) -> int:
        self.open_descriptors += 1
        return 99

    def close(self, descriptor: int) -> None:
        self.open_descriptors -= 1

    def ioctl(self, descriptor: int, request: int, message: bytearray) -> None:
        assert (descriptor, request, len(message)) == (99, 0xC0200A00, 32)
        asked_at, asked_size, answer_at, answer_size = struct.unpack("@QQQQ", message)
        fault, after = self.faults.pop(0) if self.faults else (None, False)
        if fault is not None and not after:
            raise fault
        reply = self._reply(cbor2.loads(ctypes.string_at(asked_at, asked_size)))
        if fault is not None:
            raise fault
        raw = cbor2.dumps(reply) if self.raw is None else self.raw
        assert len(raw) <= answer_size
        ctypes.memmove(answer_at, raw, len(raw))
        message[24:] = struct.pack("@Q", len(raw))

    def _reply(self, asked: dict[str, dict[str, Any]]) -> Any:
        ((name, fields),) = asked.items()
        self.asked.append(name)
        if self.answer is not None and (reply := self.answer(asked)) is not None:
            return reply
        index = fields.get("index", 0)
        if name == "DescribePCR":
            return {name: {"lock": index in self.locked, "data": self.pcrs[index]}}
        if name in ("ExtendPCR", "LockPCR") and index in self.locked:
            return {"Error": "ReadOnlyIndex"}
        if name == "ExtendPCR":
            self.pcrs[index] = hashlib.sha384(self.pcrs[index] + fields["data"]).digest()
            return {name: {"data": self.pcrs[index]}}
        if name == "LockPCR":
            self.locked.add(index)
            return name
        if name == "Attestation":
            return {name: {"document": self.document(fields)}}
        return {"Error": "InvalidOperation"}

    def document(self, fields: dict[str, Any]) -> bytes:
        """An unsigned document; the soft generator makes signed ones."""
        return cbor2.dumps(
            [b"", {}, cbor2.dumps({"pcrs": {i: self.pcrs[i] for i in sorted(self.locked)}} | fields), b""]
        )


class SwTpm:
    """A swtpm in a folder of its own, over Unix sockets. Skips the test where swtpm is not installed."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("swtpm")
        if program is None:
            pytest.skip("swtpm is not installed")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.socket = folder / "s"
        self._command = [
            program, "socket", "--tpm2", "--tpmstate", f"dir={folder}", "--flags", "not-need-init,startup-clear",
            "--server", f"type=unixio,path={self.socket}", "--ctrl", f"type=unixio,path={folder / 'c'}",
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 20
        while not self.socket.exists():
            assert time.monotonic() < until, "swtpm does not start"
            assert self._process.poll() is None, "swtpm ended"
            time.sleep(0.005)

    def stop(self, *, kill: bool = False) -> None:
        """`kill`: as a power cut, without TPM2_Shutdown."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        self.stop(kill=True)
        self.start()

    def transport(self) -> tpmclient.Transport:
        """A connection; a swtpm that ended is started again."""
        if self._process is None or self._process.poll() is not None:
            self.start()
        until = time.monotonic() + 20
        while True:
            try:
                return tpmclient.SocketTransport(self.socket, timeout=20)
            except ConnectionRefusedError:  # the socket has its name before it listens
                assert time.monotonic() < until, "swtpm does not listen"
                time.sleep(0.002)


class Proxy:
    """A transport in front of another one. `answers` replaces the next answers: bytes, an error, or a function of the real one."""

    def __init__(self, inner: tpmclient.Transport) -> None:
        self.inner = inner
        self.answers: list[bytes | OSError | Callable[[bytes], bytes] | None] = []
        self.sent: list[int] = []

    def exchange(self, command: bytes) -> bytes:
        self.sent.append(struct.unpack_from(">I", command, 6)[0])
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, OSError):
            raise answer
        if isinstance(answer, bytes):
            return answer
        real = self.inner.exchange(command)
        return real if answer is None else answer(real)

    def close(self) -> None:
        self.inner.close()


def refusal_of_tpm(rc: int) -> bytes:
    """A TPM's answer that carries only a response code."""
    return struct.pack(">HII", 0x8001, 10, rc)
