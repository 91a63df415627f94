"""Evidence of an Azure confidential VM: the HCL report that vouches for its vTPM's key, and a quote of that key.

    NV index 0x01400001        HCL report: hardware report and runtime JSON, made when the VM started
    persistent key 0x81000003  the vTPM's attestation key, which the runtime JSON names
    169.254.169.254            Azure's metadata service, of the host: turns the TDREPORT into a TD quote
                               (POST /acc/tdquote), has the chip's VCEK (GET /metadata/THIM/amd/certification)

Source: Microsoft, "Guest attestation for confidential VMs" and "Trusted Hardware Identity Management". What the metadata service
says is signed by the vendor, so a host that answers something else is refused by every verifier.

The vTPM has no certificate. Events go to PCR 15, as on any TPM; all 24 PCRs are quoted, so nothing else may extend PCR 15.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol

from cloister.attestation import events as event_log
from cloister.attestation.azure import format as hcl_format
from cloister.attestation.edge.attester import DeviceAttester
from cloister.attestation.edge.files import Files
from cloister.attestation.edge.tpm import BANK, BOOT_LOG, RUNTIME, expect, kernel_log, quoted
from cloister.attestation.edge.tpmclient import DEVICE, DeviceTransport, Tpm, TpmError, Transport
from cloister.attestation.pki import certificate as pki
from cloister.attestation.tdx import format as tdx_format
from cloister.attestation.tpm import verify as tpm_verify
from cloister.attestation.tpm.format import parse_public
from cloister.attestation.types import Event, Evidence
from cloister.errors import EvidenceError, MachineError, Reason

HCL_REPORT: Final = 0x01400001
AK: Final = 0x81000003
PCRS: Final = tuple(range(24))
METADATA: Final = "169.254.169.254"
METADATA_LIMIT: Final = 64 * 1024
TIMEOUT_S: Final = 30.0
TD_REPORT: Final = slice(hcl_format.HEADER_BYTES, hcl_format.HEADER_BYTES + 1024)
"""TDREPORT_STRUCT in an HCL report (Intel TDX module specification, 22.6)."""

Kind = Literal["azure-snp", "azure-tdx"]
_TYPES: Final = {"azure-snp": hcl_format.SNP, "azure-tdx": hcl_format.TDX}


class Service(Protocol):
    """Azure's metadata service."""

    def ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        """Return the JSON object that it answers.

        Raises:
            MachineError: no answer, or another one.
        """
        ...


class Metadata:
    """The metadata service over HTTP, without proxies: it is on the host, and no name or route leads elsewhere."""

    def __init__(self, host: str = METADATA, port: int = 80, *, timeout: float = TIMEOUT_S) -> None:
        self._host, self._port, self._timeout = host, port, timeout

    def ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        try:
            connection.request(method, path, body, {"Metadata": "true", "Content-Type": "application/json"})
            answer = connection.getresponse()
            data = answer.read(METADATA_LIMIT + 1)
        except (OSError, http.client.HTTPException) as error:
            raise MachineError(f"Azure's metadata service does not answer: {error}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise MachineError(f"Azure's metadata service answers {path} with status {answer.status}")
        if len(data) > METADATA_LIMIT:
            raise MachineError(f"Azure's metadata service answers {path} with more than {METADATA_LIMIT} bytes")
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise MachineError(f"Azure's metadata service answers {path} with no JSON") from error
        if not isinstance(found, dict):
            raise MachineError(f"Azure's metadata service answers {path} with no JSON object")
        return found


class AzureAttester:
    """An Azure confidential VM on SEV-SNP (`azure-snp`) or TDX (`azure-tdx`).

    Args:
        kind: which of the two.
        connect: opens the vTPM, once for each operation.
        service: the metadata service.
        boot_log: where the kernel has the firmware's log; an absent one is left out.
        files: reads it.
        devices: attested beside the VM.
    """

    report_data_bytes: Final = 32

    def __init__(
        self,
        kind: Kind,
        *,
        connect: Callable[[], Transport] = DeviceTransport,
        service: Service | None = None,
        boot_log: Path = BOOT_LOG,
        files: Files | None = None,
        devices: tuple[DeviceAttester, ...] = (),
    ) -> None:
        self._kind, self._connect, self._boot_log = kind, connect, boot_log
        self._service: Service = Metadata() if service is None else service
        self._files = Files() if files is None else files
        self._events: tuple[Event, ...] = ()
        self._vendor: tuple[bytes, dict[str, bytes]] | None = None
        self.devices = devices

    @property
    def name(self) -> str:
        return self._kind

    def missing(self) -> tuple[Reason, ...]:
        """Return what this machine lacks; empty means that it looks like an Azure confidential VM of this kind."""
        wanted = f"an Azure confidential VM with a vTPM at {DEVICE}"
        try:
            with Tpm(self._connect) as tpm:
                found = self._hcl(tpm.read_nv(HCL_REPORT)).type
        except TpmError as error:
            return (Reason("tee.hcl", error.message, wanted, "the vTPM has no HCL report: another cloud, or no CVM"),)
        except MachineError as error:
            return (Reason("tee.hcl", error.message, wanted, error.hint),)
        if found != _TYPES[self._kind]:
            return (Reason("tee.hcl", f"an HCL report of type {found}", f"{_TYPES[self._kind]}, {self._kind}"),)
        return ()

    def extend(self, name: str, data: bytes) -> None:
        """Record an event in PCR 15 of the vTPM.

        Raises:
            MachineError: the vTPM does not answer, or another program extended PCR 15.
        """
        entry = event_log.event(name, data)
        with Tpm(self._connect) as tpm:
            expect(tpm.read_pcrs(BANK, (RUNTIME,)), self._events, "before the extension")
            tpm.extend_pcr(RUNTIME, {BANK: hashlib.sha256(data).digest()})
            self._events += (entry,)
            expect(tpm.read_pcrs(BANK, (RUNTIME,)), self._events, "after the extension")

    def evidence(self, report_data: bytes) -> Evidence:
        """Return the HCL report and a quote over `report_data` (32 bytes).

        Raises:
            ValueError: `report_data` is not 32 bytes.
            MachineError: the vTPM or the metadata service does not answer, or PCR 15 is not what our log says.
        """
        if len(report_data) != 32:
            raise ValueError(f"qualifying data of {len(report_data)} bytes, wanted 32")
        with Tpm(self._connect) as tpm:
            raw = tpm.read_nv(HCL_REPORT)
            hcl = self._hcl(raw)
            if hcl.type != _TYPES[self._kind]:
                raise MachineError(f"this VM is not of kind {self._kind}: its HCL report has type {hcl.type}")
            key = tpm.persistent(AK)
            if parse_public(key.public, where="azure.ak").key != hcl.runtime.ak:
                raise MachineError("the vTPM's key is not the one that the HCL report names", hint="restart the VM")
            values, attest, signature = quoted(tpm, key, report_data, PCRS)
        expect(values, self._events, "in the quote")
        parts = {"tpm-quote": tpm_verify.join(attest, signature), "pcrs": tpm_verify.encode_pcrs({BANK: values})}
        parts |= self._signed_by_vendor(raw)
        parts |= kernel_log(self._files, "boot-log", self._boot_log)
        return Evidence(self._kind, raw, self._events, MappingProxyType(parts))

    def _hcl(self, raw: bytes) -> hcl_format.Hcl:
        try:
            return hcl_format.parse(raw, where="azure.hcl")
        except EvidenceError as error:
            raise MachineError(
                f"NV index 0x{HCL_REPORT:08x} holds no HCL report: {error.reasons[0].found}", reasons=error.reasons
            ) from error

    def _signed_by_vendor(self, raw: bytes) -> dict[str, bytes]:
        """Return what the metadata service has for this HCL report; asked once, because both live as long as the VM."""
        if self._vendor is None or self._vendor[0] != raw:
            found = self._td_quote(raw) if self._kind == "azure-tdx" else self._vcek()
            if not found:  # a verifier may have the VCEK itself; the next time may bring it
                return {}
            self._vendor = (raw, found)
        return self._vendor[1]

    def _td_quote(self, raw: bytes) -> dict[str, bytes]:
        body = json.dumps({"report": base64.urlsafe_b64encode(raw[TD_REPORT]).rstrip(b"=").decode()}).encode()
        answer = self._service.ask("POST", "/acc/tdquote", body).get("quote")
        if not isinstance(answer, str):
            raise MachineError("Azure's metadata service gives no TD quote")
        text = answer.rstrip("=")
        try:
            decoded = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
            quote = tdx_format.without_padding(decoded)
            tdx_format.parse(quote)
        except ValueError as error:
            raise MachineError(f"Azure's metadata service gives no TD quote: {error}") from error
        except EvidenceError as error:
            raise MachineError("Azure's metadata service gives no TD quote", reasons=error.reasons) from error
        return {"td-quote": quote}

    def _vcek(self) -> dict[str, bytes]:
        try:
            answer = self._service.ask("GET", "/metadata/THIM/amd/certification").get("vcekCert")
            if not isinstance(answer, str):
                return {}
            return {"leaf": pki.from_pem(answer.encode(), where="azure.vcek", most=1)[0].der}
        except (MachineError, EvidenceError, UnicodeEncodeError):  # half of a surrogate pair is JSON and no text
            return {}
