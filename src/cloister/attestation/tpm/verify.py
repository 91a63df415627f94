"""Verify TPM 2.0 evidence of a measured host: a pure function of (evidence, endorsements, roots, now).

Steps; an error names the step that refused:
  1 format     quote, AK, PCR values parse; no part has an unknown name                                tpm/format.py
  2 key        the AK is restricted, fixedTPM, fixedParent, sensitiveDataOrigin, signs and does not decrypt
  3 identity   the AK has a certificate of its key, or the relying party enrolled it                   tpm/enrol.py
  4 chain      the certificate's chain holds at `now`; an enrolment has not ended                      tpm/chain.py
  5 root       the chain ended at a certificate that the relying party believes, or did when it enrolled
  6 quote      the AK signed, the TPM generated it, it is a quote over exactly the given PCRs          tpm/quote.py
  7 boot       the firmware log replays to PCR 0 - 9 of the SHA-256 bank                               logs/tcg.py
  8 ima        the IMA list reproduces PCR 10, and begins with the boot aggregate of the quoted PCRs   logs/ima.py
  9 events     the runtime log replays to PCR 15 exactly, and its data hashes to its digests           events.py

`Evidence.quote` is what TPM2_Quote returned: TPM2B_ATTEST (u16 length, TPMS_ATTEST) || TPMT_SIGNATURE. Parts:

| part | bytes |
| --- | --- |
| `ak` | TPMT_PUBLIC or TPM2B_PUBLIC of the attestation key |
| `pcrs` | canonical CBOR {bank: {PCR: value}}, such as {"sha256": {0: 32 bytes, ...}}; SHA-256 is required |
| `ak-cert` | optional: DER certificates, one after the other, the AK's first |
| `boot-log` | optional: `binary_bios_measurements` |
| `ima-log` | optional, needs PCR 0 - 10: `binary_runtime_measurements`, read after the quote |

Boot log: PCR 0 - 9 that were quoted must be what the log leads to, or unextended; PCR 0 - 7 must be quoted. Events of other
registers are kept where their replay gives the quoted value and dropped where it does not: programs extend those later.
`Claims.platform`: `ak` is SHA-256 of the AK's SubjectPublicKeyInfo; of an enrolled host also `ak_name` and `ek` (`enrol.ek_id`).
`Claims.boot` is `sha256:` and the boot aggregate, SHA-256(PCR 0 || .. || PCR 9) of the SHA-256 bank, where all ten were quoted.

Not checked on purpose:
  - that a TPM is a chip: a TPM that its host emulates is as good as its root, so no root is believed by default
  - a debug mode: a TPM host has none that its TPM would state. `debug` is False: administrators can read the memory of such a
    host anyhow, which is why its kind is `attested-host` and never `tee`
  - attributes of an AK under a certificate: the certificate names the key only, so its authority answers for them. Those that
    came are checked all the same; an enrolment holds for the name, which covers them
  - `safe`, resetCount, restartCount, firmware version: claims, for a policy. Firmware only where the AK is a primary key of the
    endorsement hierarchy; with others the TPM blurs it, and the counters are good for comparing with earlier ones only
  - PCRs of SHA-1 banks: quoted values are checked like others and then dropped; SHA-1 signs nothing here
  - files against an allow list: `tpm/host.py`, with the relying party's list
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final

from cloister.attestation import events as event_log
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.logs import ima, tcg
from cloister.attestation.roots import Roots
from cloister.attestation.tpm import chain as chains
from cloister.attestation.tpm import enrol, quote
from cloister.attestation.tpm.format import HASH_SIZES, PCRS, Attest, Public, parse_public
from cloister.attestation.tpm.roots import PINS
from cloister.attestation.types import NOT_RATED, BootEvent, Claims, Evidence
from cloister.crypto.canonical import cbor_decode, cbor_encode
from cloister.errors import EvidenceError, Reason

__all__ = [
    "KIND",
    "PARTS",
    "STEPS",
    "check_aggregate",
    "check_boot",
    "decode_pcrs",
    "encode_pcrs",
    "identity",
    "join",
    "split",
    "verify",
]

KIND: Final = "tpm"

STEPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "tpm.1-format": "the quote, the attestation key and the PCR values parse",
        "tpm.2-key": "the attestation key cannot leave its TPM and signs only what the TPM itself says",
        "tpm.3-identity": "the attestation key has a certificate, or the relying party enrolled it",
        "tpm.4-chain": "its certificates are valid, or its enrolment has not ended",
        "tpm.5-root": "they lead to a certificate that the relying party believes",
        "tpm.6-quote": "the attestation key signed a quote over exactly these PCR values",
        "tpm.7-boot": "the firmware log leads to the quoted boot registers",
        "tpm.8-ima": "the IMA list leads to the quoted PCR 10 and belongs to this boot",
        "tpm.9-events": "the runtime log leads to the quoted PCR 15",
    }
)

PARTS: Final = frozenset({"ak", "pcrs", "ak-cert", "boot-log", "ima-log"})
BANK: Final = "sha256"
BOOT: Final = range(10)
"""PCRs that the boot log must explain, and that make the boot state: firmware 0 - 7, boot loader 8 and 9."""
FIRMWARE: Final = range(8)
RUNTIME: Final = 15
"""PCR of runtime events. systemd's `pcrmachine` and `pcrfs` extend it too: a host for this does not enable them."""
PCRS_LIMIT: Final = 8192
ENDORSEMENT: Final = 0x4000000B
PLATFORM: Final = 0x4000000C
"""TPM_RH handles, part 2, 7.4."""


def verify(evidence: Evidence, endorsements: Endorsements, roots: Roots, *, now: datetime) -> Claims:
    """Return what a genuine TPM states in `evidence` about its host.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`; `reasons[0].where` is the step.
        ValueError: `now` has no time zone, or `evidence` is of another kind (a caller's mistake).
    """
    if evidence.kind != KIND:
        raise ValueError(f"evidence of kind {evidence.kind!r}, this verifier takes {KIND!r}")
    if now.tzinfo is None:
        raise ValueError("`now` has no time zone")
    # (1)
    parts = evidence.parts
    unknown = sorted(set(parts) - PARTS)
    if unknown or "ak" not in parts or "pcrs" not in parts:
        found = f"part {unknown[0]!r}" if unknown else f"parts {', '.join(sorted(parts)) or 'none'}"
        raise _malformed("tpm.1-format", found, "ak and pcrs, and at most ak-cert, boot-log, ima-log")
    attest, signature = split(evidence.quote)
    ak = parse_public(parts["ak"], where="tpm.1-format")
    banks = decode_pcrs(parts["pcrs"])
    # (2)
    enrol.check_ak(ak, where="tpm.2-key")
    # (3) (4) (5)
    tee, until, chain, platform = identity(ak, parts.get("ak-cert"), endorsements, roots, now)
    # (6)
    found_attest = quote.check_banks(attest, signature, ak.key, banks, where="tpm.6-quote")
    pcrs = banks[BANK]
    # (7) (8)
    boot_log = check_boot(parts["boot-log"], pcrs) if "boot-log" in parts else ()
    attributes = {"safe": found_attest.safe}
    if "ima-log" in parts:
        entries = _ima(parts["ima-log"], pcrs, found_attest)
        boot_log += ima.boot_events(entries)
        attributes["ima_violations"] = bool(ima.violations(entries))
    # (9)
    if RUNTIME in pcrs or not evidence.events:
        if RUNTIME in pcrs:
            event_log.check_log(evidence.events, pcrs[RUNTIME], where="tpm.9-events", algorithm="sha256")
    else:
        raise _refused("tpm.9-events", f"events, and a quote without PCR {RUNTIME}", f"a quote over PCR {RUNTIME}")
    measurements = {
        f"pcr{index}" if bank == BANK else f"pcr{index}-{bank}": value
        for bank in sorted(banks)
        for index, value in sorted(banks[bank].items())
        if bank != "sha1"
    }
    boot = None
    if all(index in pcrs for index in BOOT):
        aggregate = ima.boot_aggregate(pcrs[index] for index in BOOT)
        measurements["boot_aggregate"] = aggregate
        boot = f"sha256:{aggregate.hex()}"
    svns = {"reset_count": found_attest.reset_count, "restart_count": found_attest.restart_count}
    if _plain_numbers(ak, found_attest):
        svns["firmware"] = found_attest.firmware
    return Claims(
        kind="attested-host",
        tee=tee,
        debug=False,
        tcb_status=NOT_RATED,
        report_data=found_attest.extra_data,
        measurements=MappingProxyType(measurements),
        launch="boot_aggregate" if boot is not None else "",
        svns=MappingProxyType(svns),
        attributes=MappingProxyType(attributes),
        events=evidence.events,
        boot_log=boot_log,
        platform=MappingProxyType(platform),
        boot=boot,
        chain=chain,
        valid_until=until,
    )


def _plain_numbers(ak: Public, attest: Attest) -> bool:
    """Return whether the AK is a primary key of the endorsement or platform hierarchy: the TPM says so in the signer's name.

    With a key of another hierarchy a TPM adds a secret number to its firmware version and counters (part 2,
    10.12.12): a host that made its AK there would pass every floor. Of a child key nothing here says where it hangs.
    """
    algorithm = ak.name_algorithm
    return any(
        attest.signer == ak.name[:2] + hashlib.new(algorithm, handle.to_bytes(4, "big") + ak.name).digest()
        for handle in (ENDORSEMENT, PLATFORM)
    )


def join(attest: bytes, signature: bytes) -> bytes:
    """Return `Evidence.quote` of a TPMS_ATTEST and a TPMT_SIGNATURE.

    Raises:
        ValueError: an attestation of more than 65,535 bytes.
    """
    if len(attest) > 0xFFFF:
        raise ValueError(f"an attestation of {len(attest)} bytes")
    return len(attest).to_bytes(2, "big") + attest + signature


def split(quoted: bytes) -> tuple[bytes, bytes]:
    """Return the TPMS_ATTEST and the TPMT_SIGNATURE of `Evidence.quote`.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    size = int.from_bytes(quoted[:2], "big")
    if len(quoted) < 2 or 2 + size >= len(quoted):
        raise _malformed("tpm.1-format", f"a quote of {len(quoted)} bytes", "TPM2B_ATTEST, then TPMT_SIGNATURE")
    return quoted[2 : 2 + size], quoted[2 + size :]


def encode_pcrs(banks: Mapping[str, Mapping[int, bytes]]) -> bytes:
    """Return the part `pcrs`: canonical CBOR {bank: {PCR: value}}.

    Raises:
        ValueError: a bank, a PCR or a size that no verifier would take.
    """
    problem = _banks_problem(banks)
    if problem:
        raise ValueError(problem)
    return cbor_encode({bank: dict(values) for bank, values in banks.items()})


def decode_pcrs(data: bytes) -> dict[str, dict[int, bytes]]:
    """Return the PCR values of the part `pcrs`.

    Raises:
        EvidenceError: `evidence-malformed`.
    """
    try:
        value: Any = cbor_decode(data, limit=PCRS_LIMIT)
        problem = _banks_problem(value)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise _malformed(
            "tpm.1-format", f"pcrs: {problem}", "canonical CBOR {bank: {PCR: value}} with the SHA-256 bank"
        )
    banks: dict[str, dict[int, bytes]] = value
    return banks


def _banks_problem(value: Any) -> str:
    if not isinstance(value, Mapping) or BANK not in value:
        return f"no {BANK} bank"
    for bank, values in value.items():
        if bank not in HASH_SIZES or not isinstance(values, Mapping) or not values:
            return f"bank {str(bank)[:32]!r}"
        for index, digest in values.items():
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < PCRS:
                return f"PCR {str(index)[:32]!r}"
            if not isinstance(digest, bytes) or len(digest) != HASH_SIZES[bank]:
                return f"another value than {HASH_SIZES[bank]} bytes of PCR {index}"
    return ""


def identity(
    ak: Public, certificate: bytes | None, endorsements: Endorsements, roots: Roots, now: datetime
) -> tuple[str, datetime | None, tuple[str, ...], dict[str, str]]:
    """Return (TEE type, end, chain, platform): by the AK's certificate, by enrolment, or by both, which must both hold.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`, at steps 3 to 5.
    """
    name = ak.name.hex()
    # a certificate names the key and not its attributes, so its id is of the key: else spare bits would make new names
    platform = {"ak": hashlib.sha256(ak.spki).hexdigest()}
    noted = endorsements.get(KIND, f"ak/{name}")
    # (3)
    if certificate is None and noted is None:
        have = len(endorsements.all(KIND, "ak/"))
        raise _refused(
            "tpm.3-identity",
            f"AK {name} without a certificate, {have} other AKs enrolled",
            "an AK certificate, or an enrolled AK",
            "enrol the host: EK certificate and credential activation",
        )
    tee: str = KIND
    until: datetime | None = None
    chain: tuple[str, ...] = ()
    if noted is not None:
        tee, until, ek = _noted(ak, noted, roots, now)
        platform |= {"ek": ek, "ak_name": name}
    if certificate is not None:
        certificates = chains.split(certificate, where="tpm.4-chain.format")
        leaf = certificates[0]
        if leaf.spki != ak.spki:
            raise _refused("tpm.3-identity", "a certificate of another key", "a certificate of the attestation key")
        usages = chains.usages(leaf)
        if leaf.authority or not usages & {chains.AK_USAGE, chains.EK_USAGE}:
            found = "an authority" if leaf.authority else ", ".join(sorted(usages)) or "no extended key usage"
            raise _refused(
                "tpm.3-identity", found, f"a certificate for {chains.AK_USAGE} or {chains.EK_USAGE}, a TPM's key"
            )
        if not chains.signs(leaf):
            raise _refused(
                "tpm.3-identity", "a certificate of a key that does not sign, such as an EK", "one that signs"
            )
        identity = chains.check(
            certificates, endorsements, roots, now=now, chain_at="tpm.4-chain", root_at="tpm.5-root"
        )
        chain = identity.chain
        until = min(each for each in (until, identity.until, identity.listed_until) if each is not None)
        # soft in either half is soft
        tee = identity.tee if identity.tee != KIND else tee
    return tee, until, chain, platform


def _noted(ak: Public, data: bytes, roots: Roots, now: datetime) -> tuple[str, datetime | None, str]:
    note = enrol.decode(data, where="tpm.3-identity")
    if note.ak != ak.name:
        raise _refused("tpm.3-identity", f"a note about AK {note.ak.hex()}", ak.name.hex())
    # (4)
    if now < note.when:
        raise _refused(
            "tpm.4-chain.future", f"enrolled {note.when:%Y-%m-%d %H:%M}", f"enrolled at {now:%Y-%m-%d %H:%M}"
        )
    if note.until is not None and now > note.until:
        raise _refused(
            "tpm.4-chain.expired",
            f"an enrolment until {note.until:%Y-%m-%d %H:%M}",
            f"valid at {now:%Y-%m-%d %H:%M}",
            "enrol again",
        )
    # (5) a root that is not believed any more takes its enrolments with it; a pinned EK was believed by itself
    if note.root in PINS.soft:  # whatever `also` says, as `roots.choose`
        if roots.soft:
            return f"soft-{KIND}", note.until, note.ek
    elif note.how == "ek-pinned" or note.root in PINS.vendor | roots.also.get(KIND, frozenset()):
        return KIND, note.until, note.ek
    found = "the published test root" if note.root in PINS.soft else f"root {note.root}"
    raise _refused("tpm.5-root", f"an AK enrolled under {found}", "a root that the relying party believes")


def check_boot(data: bytes, pcrs: Mapping[int, bytes], bank: str = BANK) -> tuple[BootEvent, ...]:
    """Prove that the firmware log `data` explains the quoted `pcrs` of `bank`; return the events of explained registers.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`, at step 7.
    """
    log = tcg.parse(data, where="tpm.7-boot.format")
    if bank not in log.algorithms:
        raise _malformed("tpm.7-boot.format", f"a log of {', '.join(log.algorithms)}", bank)
    values = tcg.replay(log, bank)
    missing = [index for index in FIRMWARE if index not in pcrs]
    if missing:
        raise _refused("tpm.7-boot", f"a boot log, and a quote without PCR {missing[0]}", "a quote over PCR 0 - 7")
    wrong = [index for index in BOOT if index in pcrs and values.get(index, tcg.initial(index, bank)) != pcrs[index]]
    if wrong:
        raise EvidenceError(
            "the firmware log does not explain the quoted PCRs",
            code="evidence-not-authentic",
            reasons=[
                Reason(
                    f"tpm.7-boot.pcr{index}",
                    values.get(index, tcg.initial(index, bank)).hex(),
                    pcrs[index].hex(),
                    "the log is not the one that the TPM recorded: an event is missing, added, changed or in another place",
                )
                for index in wrong
            ],
        )
    explained = {index for index, value in values.items() if pcrs.get(index) == value}
    return tuple(event for event in tcg.events(log, bank) if event.register in explained)


def _ima(data: bytes, pcrs: Mapping[int, bytes], attest: Attest) -> tuple[ima.Entry, ...]:
    missing = [index for index in (*BOOT, ima.REGISTER) if index not in pcrs]
    if missing:
        raise _refused("tpm.8-ima", f"an IMA list, and a quote without PCR {missing[0]}", "a quote over PCR 0 - 10")
    beginning = ima.start(attest.reset_count)
    progress = ima.advance(
        beginning, data, quoted=pcrs[ima.REGISTER], reset_count=attest.reset_count, where="tpm.8-ima"
    )
    check_aggregate(progress.entries, pcrs, where="tpm.8-ima.boot_aggregate")
    return progress.entries


def check_aggregate(entries: tuple[ima.Entry, ...], pcrs: Mapping[int, bytes], *, where: str) -> None:
    """Prove that an IMA list began in this boot: its first entry is the aggregate of the quoted PCR 0 to 9.

    Raises:
        EvidenceError: `evidence-not-authentic`.
    """
    wanted = ima.boot_aggregate(pcrs[index] for index in BOOT)
    first = entries[0] if entries else None
    if first is None or first.violation or first.algorithm != BANK or first.digest != wanted:
        found = "no entry" if first is None else f"{first.algorithm}:{first.digest.hex()} of {first.path!r}"
        raise _refused(
            where, found, f"sha256:{wanted.hex()} of 'boot_aggregate'", "the list is of another boot or machine"
        )


def _malformed(where: str, found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "the TPM evidence does not parse", code="evidence-malformed", reasons=[Reason(where, found, wanted)]
    )


def _refused(where: str, found: str, wanted: str, hint: str = "") -> EvidenceError:
    return EvidenceError(
        "the TPM evidence is not authentic", code="evidence-not-authentic", reasons=[Reason(where, found, wanted, hint)]
    )
