"""Evidence of a measured host: a TPM quote with the logs that explain it.

Steps of `TpmAttester.evidence`:
  1 key      the attestation key: a persistent one if named, else the cloud's (template and certificate in NV), else ours
  2 pcrs     read the SHA-256 bank
  3 quote    over those PCRs
  4 check    the quote is over the values that were read; IMA may extend PCR 10 between 2 and 3: then again
  5 logs     the firmware's log, and the IMA list, read after the quote so that it is never behind it
  6 flush    whatever was loaded

Events go to PCR 15, SHA-256(data) in the SHA-256 bank. The quote covers PCR 15 once there is an event; without one it
belongs to whoever else uses it (systemd's `pcrmachine` and `pcrfs`, which a host that runs workloads must not enable).

`identity` and `activate` are the host's half of enrolment (`tpm/enrol.py`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from cloister.attestation import events as event_log
from cloister.attestation.edge.attester import DeviceAttester
from cloister.attestation.edge.files import Files
from cloister.attestation.edge.tpmclient import (
    DEVICE,
    DeviceTransport,
    Key,
    Tpm,
    Transport,
    UnsteadyError,
    ak_template,
    ek_template,
)
from cloister.attestation.evidence import LIMITS
from cloister.attestation.tpm import quote as tpm_quote
from cloister.attestation.tpm import verify as tpm_verify
from cloister.attestation.tpm.format import Selection, parse_public
from cloister.attestation.types import Event, Evidence
from cloister.errors import EvidenceError, MachineError, Reason

BOOT_LOG: Final = Path("/sys/kernel/security/tpm0/binary_bios_measurements")
IMA_LOG: Final = Path("/sys/kernel/security/ima/binary_runtime_measurements")
BANK: Final = "sha256"
RUNTIME: Final = 15
IMA: Final = 10
HOST_PCRS: Final = tuple(range(15))
"""Firmware 0 - 7, boot loader 8 and 9, IMA 10, systemd 11 - 13, shim 14."""
TRIES: Final = 5

# Google's vTPMs: (certificate, template) of the AK, ECC before RSA (go-tpm-tools, client/handles.go)
_CLOUD_AKS: Final = ((0x01C10002, 0x01C10003), (0x01C10000, 0x01C10001))
# TCG EK Credential Profile 2.5, 2.2.1.4: low range certificates, with the kind of the template
_EK_CERTIFICATES: Final = ((0x01C0000A, "ecc"), (0x01C00002, "rsa"))

Connect = Callable[[], Transport]


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """What a host sends to be enrolled."""

    ek: bytes
    """TPMT_PUBLIC of the endorsement key."""
    ek_certificate: bytes
    """DER, or empty where the TPM has none: then the EK can only be pinned."""
    ak: bytes
    """TPMT_PUBLIC of the attestation key."""
    kind: str
    """`rsa` or `ecc`: which EK, for `activate`."""


class TpmAttester:
    """The TPM of this host. Also a `DeviceAttester`, beside a CPU's evidence.

    Args:
        connect: opens the TPM, once for each operation.
        ak: handle of a persistent attestation key, such as 0x81000003.
        pcrs: what to quote besides PCR 15.
        boot_log, ima_log: where the kernel has the logs; an absent one is left out.
        files: reads them.
        devices: attested beside the host.
    """

    name: Final = "tpm"
    report_data_bytes: Final = 32

    def __init__(
        self,
        *,
        connect: Connect = DeviceTransport,
        ak: int | None = None,
        pcrs: tuple[int, ...] = HOST_PCRS,
        boot_log: Path = BOOT_LOG,
        ima_log: Path = IMA_LOG,
        files: Files | None = None,
        devices: tuple[DeviceAttester, ...] = (),
    ) -> None:
        self._connect, self._ak, self._pcrs = connect, ak, tuple(sorted(set(pcrs) - {RUNTIME}))
        self._boot_log, self._ima_log = boot_log, ima_log
        self._files = Files() if files is None else files
        self._events: tuple[Event, ...] = ()
        self.devices = devices

    def missing(self) -> tuple[Reason, ...]:
        """Return what this machine lacks; empty means that there is a TPM 2.0 with a SHA-256 bank that answers us."""
        try:
            with Tpm(self._connect) as tpm:
                tpm.read_pcrs(BANK, (0,))
        except MachineError as error:
            return (Reason("tee.tpm", error.message, f"a TPM 2.0 with a SHA-256 bank at {DEVICE}", error.hint),)
        return ()

    def extend(self, name: str, data: bytes) -> None:
        """Record an event in PCR 15.

        Raises:
            MachineError: the TPM does not answer, or another program extended PCR 15.
        """
        entry = event_log.event(name, data)
        with Tpm(self._connect) as tpm:
            expect(tpm.read_pcrs(BANK, (RUNTIME,)), self._events, "before the extension")
            tpm.extend_pcr(RUNTIME, {BANK: hashlib.sha256(data).digest()})
            self._events += (entry,)
            expect(tpm.read_pcrs(BANK, (RUNTIME,)), self._events, "after the extension")

    def evidence(self, report_data: bytes) -> Evidence:
        """Return a quote over `report_data` (32 bytes).

        Raises:
            ValueError: `report_data` is not 32 bytes.
            MachineError: the TPM does not answer, PCR 15 is not what our log says, or a log is too large.
        """
        if len(report_data) != 32:
            raise ValueError(f"qualifying data of {len(report_data)} bytes, wanted 32")
        wanted = (*self._pcrs, RUNTIME) if self._events else self._pcrs
        with Tpm(self._connect) as tpm, self._key(tpm) as (key, certificate):  # (1) (6)
            values, attest, signature = quoted(tpm, key, report_data, wanted)
        if self._events:
            expect(values, self._events, "in the quote")
        parts = {"ak": key.public, "pcrs": tpm_verify.encode_pcrs({BANK: values})}
        if certificate:
            parts["ak-cert"] = certificate
        # (5)
        parts |= kernel_log(self._files, "boot-log", self._boot_log)
        if IMA in values:
            parts |= kernel_log(self._files, "ima-log", self._ima_log)
        return Evidence("tpm", tpm_verify.join(attest, signature), self._events, MappingProxyType(parts))

    def identity(self) -> HostIdentity:
        """Return what the relying party needs to enrol this host.

        Raises:
            MachineError: the TPM does not answer.
        """
        with Tpm(self._connect) as tpm:
            found = [(kind, tpm.certificate(index)) for index, kind in _EK_CERTIFICATES]
            kind, certificate = next(((kind, data) for kind, data in found if data is not None), ("rsa", b""))
            with tpm.primary(ek_template(kind)) as ek, self._key(tpm) as (ak, _):
                return HostIdentity(ek.public, certificate, ak.public, kind)

    def activate(self, kind: str, credential: bytes, secret: bytes) -> bytes:
        """Return what is in the credential that `tpm.enrol.make_credential` made for `identity()`.

        Args:
            kind: `HostIdentity.kind`.

        Raises:
            MachineError: it was made for another TPM or another key, or the TPM does not answer.
        """
        with Tpm(self._connect) as tpm, tpm.primary(ek_template(kind)) as ek, self._key(tpm) as (ak, _):
            return tpm.activate(ak, ek, credential, secret)

    @contextmanager
    def _key(self, tpm: Tpm) -> Iterator[tuple[Key, bytes]]:
        if self._ak is not None:
            yield tpm.persistent(self._ak), b""
            return
        with ExitStack() as stack:
            for index, template in _CLOUD_AKS:
                certificate = tpm.certificate(index)
                if certificate is not None:
                    yield stack.enter_context(tpm.primary(tpm.read_nv(template))), certificate
                    return
            yield stack.enter_context(tpm.primary(ak_template())), b""


def kernel_log(files: Files, name: str, path: Path) -> dict[str, bytes]:
    """Return the log at `path` as the part `name`; nothing where there is none.

    Raises:
        MachineError: it cannot be read, or is larger than a verifier takes.
    """
    if not files.exists(path):
        return {}
    try:
        data = files.read(path, limit=LIMITS.part)
    except OSError as error:
        raise MachineError(
            f"{path} cannot be read: {os.strerror(error.errno) if error.errno else error}",
            hint=f"the kernel's logs are for root, and a verifier takes at most {LIMITS.part} bytes of one",
        ) from error
    return {name: data} if data else {}


def expect(values: dict[int, bytes], events: tuple[Event, ...], when: str) -> None:
    """Refuse a PCR 15 that `events` do not explain.

    Raises:
        MachineError: another program extended it.
    """
    wanted = event_log.replay(events, algorithm="sha256")
    if values[RUNTIME] != wanted:
        raise MachineError(
            f"PCR {RUNTIME} is not what our event log says, {when}",
            reasons=[
                Reason("tpm.pcr15", values[RUNTIME].hex(), wanted.hex(), "another program extends PCR 15 of this host")
            ],
            hint="reboot; run one node on a host, and disable systemd-pcrmachine and systemd-pcrfs@",
        )


def quoted(tpm: Tpm, key: Key, data: bytes, pcrs: tuple[int, ...]) -> tuple[dict[int, bytes], bytes, bytes]:
    """Return PCR values of the SHA-256 bank and the quote over exactly them: TPMS_ATTEST, TPMT_SIGNATURE.

    Raises:
        MachineError: the TPM does not answer, quotes other data than `data`, or PCRs change faster than they are read.
    """
    public = parse_public(key.public, where="tpm.ak")
    reasons: tuple[Reason, ...] = ()
    for _ in range(TRIES):
        # (2) (3)
        try:
            values = tpm.read_pcrs(BANK, pcrs)
        except UnsteadyError as error:
            reasons = (Reason("tpm.pcrs", error.message, "PCRs that hold still"),)
            continue
        attest, signature = tpm.quote(key, data, (Selection(BANK, pcrs),))
        # (4)
        try:
            found = tpm_quote.check(attest, signature, public.key, values, algorithm=BANK, where="tpm.quote")
        except EvidenceError as error:
            reasons = error.reasons
            continue
        if found.extra_data != data:
            raise MachineError("the TPM quoted other data than ours")
        return values, attest, signature
    raise MachineError(f"no quote over the PCRs that were read, after {TRIES} tries", reasons=reasons)
