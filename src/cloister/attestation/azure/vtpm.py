"""The vTPM of an Azure VM: what its quote says, once a hardware report vouches for its attestation key.

`take` reads the parts, `check` proves the rest of the chain, `claims` joins it with what the hardware verifier found. The steps and their
order are those of `azure_snp.verify` and `azure_tdx.verify`; `kind` prefixes them.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from cloister.attestation import events as event_log
from cloister.attestation.azure import format as hcl_format
from cloister.attestation.azure.format import Hcl
from cloister.attestation.logs import tcg
from cloister.attestation.tpm import quote as tpm_quote
from cloister.attestation.tpm.format import Attest
from cloister.attestation.tpm.verify import decode_pcrs
from cloister.attestation.types import BootEvent, Claims, Event, Evidence
from cloister.errors import EvidenceError, Reason

BANK: Final = "sha256"
PCRS: Final = frozenset(range(24))
BOOT: Final = range(10)
"""PCRs of the boot state: firmware 0 - 7, boot loader 8 and 9."""
RUNTIME: Final = 15
"""PCR of runtime events, as on a TPM of its own. systemd's `pcrmachine` and `pcrfs` extend it too: a VM for this does not enable them."""
LAUNCH: Final = "azure_launch"
PARTS: Final = frozenset({"tpm-quote", "pcrs", "boot-log"})
"""Parts of both kinds; `boot-log` is optional."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The parsed parts of evidence."""

    hcl: Hcl
    attest: bytes
    signature: bytes
    pcrs: Mapping[int, bytes]
    boot_log: bytes | None


def take(evidence: Evidence, kind: str, report_type: int, own: frozenset[str]) -> Taken:
    """Return the parts of `evidence` (step 1). `own` are the names that only this kind has.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    where = f"{kind}.1-format"
    parts = evidence.parts
    unknown = sorted(set(parts) - PARTS - own)
    missing = sorted({"tpm-quote", "pcrs"} - set(parts))
    if unknown or missing:
        found = f"part {unknown[0]!r}" if unknown else f"no part {missing[0]!r}"
        raise malformed(where, found, f"tpm-quote and pcrs, and at most {', '.join(sorted({'boot-log'} | own))}")
    hcl = hcl_format.parse(evidence.quote, where=where)
    if hcl.type != report_type:
        raise malformed(where, f"an HCL report of type {hcl.type}", f"{report_type}")
    quoted = parts["tpm-quote"]
    size = int.from_bytes(quoted[:2], "big")
    if len(quoted) < 2 or 2 + size >= len(quoted):
        raise malformed(where, f"a quote of {len(quoted)} bytes", "TPM2B_ATTEST, then TPMT_SIGNATURE")
    try:
        banks = decode_pcrs(parts["pcrs"])
    except EvidenceError as error:
        raise renamed(error, where) from error
    if set(banks) != {BANK} or set(banks[BANK]) != PCRS:
        raise malformed(where, f"PCRs of {', '.join(sorted(banks))}", "all 24 of SHA-256, and no others")
    return Taken(hcl, quoted[2 : 2 + size], quoted[2 + size :], banks[BANK], parts.get("boot-log"))


def check(
    evidence: Evidence, taken: Taken, report_data: bytes, kind: str, *, runtime_log: bool
) -> tuple[Attest, tuple[BootEvent, ...]]:
    """Prove steps 3 to 6 for a hardware report with `report_data`; return the quote and the explained boot log.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`.
    """
    # (3)
    wanted = taken.hcl.wanted_report_data()
    if not hmac.compare_digest(report_data, wanted):
        raise refused(
            f"{kind}.3-runtime",
            report_data.hex(),
            wanted.hex(),
            "the vTPM's keys are not those that the hardware vouches for",
        )
    # (4)
    attest = tpm_quote.check(
        taken.attest,
        taken.signature,
        taken.hcl.runtime.ak,
        taken.pcrs,
        algorithm=BANK,
        where=f"{kind}.4-quote",
        bare=True,
    )
    # (5)
    boot = () if taken.boot_log is None else _boot(taken.boot_log, taken.pcrs, f"{kind}.5-boot")
    # (6)
    if runtime_log:
        event_log.check_log(evidence.events, taken.pcrs[RUNTIME], where=f"{kind}.6-events", algorithm="sha256")
    return attest, boot


def claims(
    hardware: Claims, events: tuple[Event, ...], taken: Taken, attest: Attest, boot: tuple[BootEvent, ...]
) -> Claims:
    """Return what the hardware and the vTPM say together. `hardware.tee` becomes `azure-...`, soft stays soft."""
    runtime = taken.hcl.runtime
    aggregate = hashlib.sha256(b"".join(taken.pcrs[index] for index in BOOT)).digest()
    measured = {f"pcr{index}": value for index, value in sorted(taken.pcrs.items())}
    soft, name = ("soft-" if hardware.soft else ""), ("azure-snp" if taken.hcl.type == hcl_format.SNP else "azure-tdx")
    numbers = {"reset_count": attest.reset_count, "restart_count": attest.restart_count}
    platform = {**hardware.platform, "vtpm_ak": runtime.ak_digest}
    if runtime.vm_id:
        platform["vm_unique_id"] = runtime.vm_id
    return replace(
        hardware,
        tee=soft + name,
        report_data=attest.extra_data,
        measurements=MappingProxyType(
            {
                **hardware.measurements,
                **measured,
                "boot_aggregate": aggregate,
                LAUNCH: launch(hardware.measurements[hardware.launch], aggregate),
            }
        ),
        launch=LAUNCH,
        svns=MappingProxyType({**hardware.svns, **numbers}),
        attributes=MappingProxyType({**hardware.attributes, **runtime.switches, "safe": attest.safe}),
        events=events,
        log_in="register",
        boot_log=hardware.boot_log + boot,
        platform=MappingProxyType(platform),
        boot=f"sha256:{aggregate.hex()}",
    )


def launch(paravisor: bytes, boot_aggregate: bytes) -> bytes:
    """Return the measurement `azure_launch`, 48 bytes: SHA-384(hardware's launch measurement || boot aggregate).

    The boot aggregate alone says nothing: whoever owns a CPU of the same kind can have it sign for a key of his own, and
    with that key quote any PCRs. Only the paravisor's code keeps a vTPM honest, so it is part of the software's name.
    """
    return hashlib.sha384(paravisor + boot_aggregate).digest()


def _boot(data: bytes, pcrs: Mapping[int, bytes], where: str) -> tuple[BootEvent, ...]:
    """Return the events of the firmware log, which must lead to PCR 0 - 9; of other registers, those that it explains."""
    log = tcg.parse(data, where=f"{where}.format")
    if BANK not in log.algorithms:
        raise malformed(f"{where}.format", f"a log of {', '.join(log.algorithms)}", BANK)
    values = tcg.replay(log, BANK)
    reasons = [
        Reason(f"{where}.pcr{index}", values.get(index, tcg.initial(index, BANK)).hex(), pcrs[index].hex())
        for index in BOOT
        if values.get(index, tcg.initial(index, BANK)) != pcrs[index]
    ]
    if reasons:
        raise EvidenceError(
            "the firmware log does not explain the quoted PCRs", code="evidence-not-authentic", reasons=reasons
        )
    explained = {index for index, value in values.items() if pcrs.get(index) == value}
    return tuple(event for event in tcg.events(log, BANK) if event.register in explained)


def inside(error: EvidenceError, where: str) -> EvidenceError:
    """Return the refusal of an inner verifier as one of step `where`; the inner steps follow it."""
    reasons = [Reason(f"{where}.{each.where}", each.found, each.wanted, each.hint) for each in error.reasons]
    return EvidenceError(error.message, code=error.code, reasons=reasons, hint=error.hint)


def renamed(error: EvidenceError, where: str) -> EvidenceError:
    """Return the same refusal as one of step `where`."""
    reasons = [Reason(where, each.found, each.wanted, each.hint) for each in error.reasons]
    return EvidenceError(error.message, code=error.code, reasons=reasons, hint=error.hint)


def malformed(where: str, found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "the Azure evidence does not parse", code="evidence-malformed", reasons=[Reason(where, found, wanted)]
    )


def refused(where: str, found: str, wanted: str, hint: str = "") -> EvidenceError:
    return EvidenceError(
        "the Azure evidence is not authentic",
        code="evidence-not-authentic",
        reasons=[Reason(where, found, wanted, hint)],
    )
