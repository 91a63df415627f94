"""TPM evidence in files, as four kinds of tools write it, and logs alone.

| files | roles |
| --- | --- |
| tpm2-tools | `q.msg` (TPMS_ATTEST), `q.sig` (TPMT_SIGNATURE), `q.pcrs` (values one after the other), `ak.pub` (TPM2B_PUBLIC), and perhaps `ak.name`, `nonce`, `binary_runtime_measurements`, `eventlog` |
| go-tpm-tools | `ak_pub` (TPMT_PUBLIC), one quote per bank: `sha1`, `sha256`, `sha384` (JSON of hex: `message`, `signature`, `pcrs` {index: value}), and perhaps `ak_cert` (DER), `ak_issuer` (DER), `eventlog` |
| Trustee | `evidence` (JSON: `ak_public` base64 of a SubjectPublicKeyInfo; `tpm_quote` with `message`, `signature` in base64 and 24 `pcrs` of SHA-256 in hex) |
| an agent's own | `hello` (JSON: `ekcert`, `ekpub`, `akpub`), `quote` (JSON: `att`, `sig`, `pcrs`, `log`), base64, and perhaps `eventlog`, `binary_runtime_measurements` |
| logs | `eventlog` alone, or `binary_runtime_measurements` alone |

Facts: `authentic` (the AK's signature, its quote and PCR values; its certificate where there is one; the nonce where it is known),
`eventlog` and `ima` (the log leads to the quoted registers), `parse` (of a log alone), `debug`.

Where such files say nothing about whose AK it is, those steps are *not done*, and there are no claims to appraise. The same with
`ak_issuer`, which comes with the evidence: the chain is checked up to it, and whether to believe it is `Roots.also`'s question.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from types import MappingProxyType
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.files import Case, Observation, trace
from cloister.attestation.logs import ima, tcg
from cloister.attestation.pki import certificate as certificates
from cloister.attestation.pki.certificate import PublicKey
from cloister.attestation.roots import Roots
from cloister.attestation.tpm import enrol, quote
from cloister.attestation.tpm import format as tpm_format
from cloister.attestation.tpm import verify as tpm_verify
from cloister.attestation.tpm.format import Attest, Public
from cloister.attestation.types import BootEvent, Claims, Evidence
from cloister.crypto.canonical import json_decode
from cloister.errors import EvidenceError, Reason

KIND: Final = "tpm"

NONCE: Final = "tpm.nonce"
_AFTER: Final = "tpm.6-quote"
STEPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        name: text
        for step, sentence in tpm_verify.STEPS.items()
        for name, text in ((step, sentence), (NONCE, "the quote has the nonce that was asked for"))
        if name != NONCE or step == _AFTER
    }
)
"""Those of the verifier, and after the quote the nonce, which `check_binding` looks at elsewhere."""
LOG_STEPS: Final[Mapping[str, str]] = MappingProxyType({"tpm.log": "the log parses"})
JSON_LIMIT: Final = 8 * 1024 * 1024
SHOWN: Final = 256
"""Log entries that are shown to people."""

_FORMAT: Final = "tpm.1-format"
_WORDS: Final = {
    tpm_format.FIXED_TPM: "fixedTPM",
    tpm_format.FIXED_PARENT: "fixedParent",
    tpm_format.SENSITIVE_DATA_ORIGIN: "sensitiveDataOrigin",
    tpm_format.USER_WITH_AUTH: "userWithAuth",
    tpm_format.ADMIN_WITH_POLICY: "adminWithPolicy",
    tpm_format.NO_DA: "noDA",
    tpm_format.RESTRICTED: "restricted",
    tpm_format.DECRYPT: "decrypt",
    tpm_format.SIGN: "sign",
}


@dataclass(frozen=True, slots=True)
class Quoted:
    """One quote over the PCRs of one or more banks."""

    attest: bytes
    signature: bytes
    banks: Mapping[str, Mapping[int, bytes]]


@dataclass(frozen=True, slots=True)
class Given:
    """What the files hold, whoever wrote them."""

    key: PublicKey
    quotes: tuple[Quoted, ...]
    ak: Public | None = None
    bare: bool = False
    """The signature may come without its header."""
    certificate: bytes = b""
    """Of the AK, and what else came for its chain: DER, one after the other."""
    anchor: bytes = b""
    """DER certificate that came with the evidence and ends the chain."""
    boot_log: bytes | None = None
    ima_log: bytes | None = None
    fields: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def observe(case: Case) -> Observation:
    """Return what came out of the files in `case`, at its time."""
    files = case.files
    read: Callable[[Case], Given]
    if "q.msg" in files:
        read = _tools
    elif {"sha1", "sha256", "sha384"} & set(files):
        read = _cloud
    elif "evidence" in files:
        read = _trustee
    elif "hello" in files and "quote" in files:
        read = _own
    else:
        return _log(case)
    try:
        given = read(case)
    except EvidenceError as error:
        return Observation({"authentic": False}, trace(STEPS, error), error=error)
    return judge(case, given)


def judge(case: Case, given: Given) -> Observation:
    """Return what `given` proves, step by step as `tpm.verify` does, with the steps left out for which nothing was given."""
    fields = dict(given.fields)
    not_done = _missing(case, given)
    facts: dict[str, object] = {"authentic": False, "debug": False}
    events: tuple[BootEvent, ...] = ()
    attests: list[Attest] = []
    error: EvidenceError | None = None
    try:
        roots = _roots(case, given)
        if given.ak is not None:
            enrol.check_ak(given.ak, where="tpm.2-key")
            if "tpm.3-identity" not in not_done:
                tpm_verify.identity(given.ak, given.certificate or None, _collateral(case), roots, case.now)
        for each in given.quotes:
            attests.append(
                quote.check_banks(
                    each.attest, each.signature, given.key, each.banks, where="tpm.6-quote", bare=given.bare
                )
            )
            _check_nonce(attests[-1], case.nonce)
        facts["authentic"] = True
    except EvidenceError as refusal:
        error = refusal
    banks = {bank: values for each in given.quotes for bank, values in each.banks.items()}
    for name, log, check in (("eventlog", given.boot_log, _explain_boot), ("ima", given.ima_log, _explain_ima)):
        if log is None:
            continue
        try:
            if not facts["authentic"]:
                facts[name] = False
                continue
            events += check(log, banks, attests[0])
            facts[name] = True
        except EvidenceError as refusal:
            facts[name] = False
            error = error or refusal
    fields |= _fields(given, banks) | _event_fields(events)
    steps = trace(STEPS, error, not_done=not_done)
    claims = None
    if error is None and not not_done & {"tpm.3-identity", "tpm.5-root"} and tpm_verify.BANK in banks:
        try:
            claims = _claims(case, given)
        except EvidenceError as refusal:
            return Observation(
                facts | {"authentic": False}, trace(STEPS, refusal, not_done=not_done), error=refusal, fields=fields
            )
    return Observation(facts, steps, claims, error, MappingProxyType(fields))


def _missing(case: Case, given: Given) -> frozenset[str]:
    """Return the steps for which nothing was given."""
    missing = {"tpm.9-events"}
    enrolled = given.ak is not None and _collateral(case).get(KIND, f"ak/{given.ak.name.hex()}") is not None
    if given.ak is None:
        missing |= {"tpm.2-key"}
    if given.ak is None or not (given.certificate or enrolled):
        missing |= {"tpm.3-identity", "tpm.4-chain", "tpm.5-root"}
    elif (
        given.anchor and sha256(given.anchor).hexdigest() not in case.roots.also.get(KIND, frozenset()) and not enrolled
    ):
        missing |= {"tpm.5-root"}
    if given.boot_log is None:
        missing |= {"tpm.7-boot"}
    if given.ima_log is None:
        missing |= {"tpm.8-ima"}
    if case.nonce is None:
        missing |= {NONCE}
    return frozenset(missing)


def _roots(case: Case, given: Given) -> Roots:
    """Return the roots of `case`, and the authority that came with the evidence, up to which the chain is checked."""
    if not given.anchor:
        return case.roots
    believed = case.roots.also.get(KIND, frozenset()) | {sha256(given.anchor).hexdigest()}
    return replace(case.roots, also=MappingProxyType({**case.roots.also, KIND: believed}))


def _collateral(case: Case) -> Endorsements:
    """Return authorities and revocation lists that the caller offers; enrolment notes only under their subject."""
    items = []
    for name, data in (*case.collateral.items(), *((role, data) for role, data in case.files.items() if role == "crl")):
        if name.startswith("ak/"):
            items.append(Endorsement(KIND, name, data))
        elif name.endswith((".crl", "crl")):
            items.append(Endorsement(KIND, f"crl/{name}", data))
        elif name.endswith((".crt", ".cer", ".der")):
            items.append(Endorsement(KIND, f"ca/{sha256(data).hexdigest()}", data))
    return Endorsements(tuple(items))


def _claims(case: Case, given: Given) -> Claims | None:
    """Return what the verifier itself says about the quote over the SHA-256 bank."""
    for each in given.quotes:
        if given.ak is None or tpm_verify.BANK not in each.banks:
            continue
        parts = {"ak": given.ak.data, "pcrs": tpm_verify.encode_pcrs(each.banks)}
        if given.certificate:
            parts["ak-cert"] = given.certificate
        if given.boot_log is not None:
            parts["boot-log"] = given.boot_log
        if given.ima_log is not None:
            parts["ima-log"] = given.ima_log
        evidence = Evidence(KIND, tpm_verify.join(each.attest, each.signature), (), MappingProxyType(parts))
        return tpm_verify.verify(evidence, _collateral(case), case.roots, now=case.now)
    return None


def _check_nonce(attest: Attest, nonce: bytes | None) -> None:
    if nonce is not None and not hmac.compare_digest(attest.extra_data, nonce):
        raise EvidenceError(
            "the quote was made for another nonce",
            code="evidence-not-authentic",
            reasons=[Reason(NONCE, attest.extra_data.hex() or "no nonce", nonce.hex() or "no nonce")],
        )


def _explain_boot(data: bytes, banks: Mapping[str, Mapping[int, bytes]], _: Attest) -> tuple[BootEvent, ...]:
    log = tcg.parse(data, where="tpm.7-boot.format")
    found: tuple[BootEvent, ...] = ()
    shared = [bank for bank in banks if bank in log.algorithms]
    if not shared:
        raise _malformed("tpm.7-boot.format", f"a log of {', '.join(log.algorithms)}", " or ".join(banks))
    for bank in shared:  # SHA-256 last: its events are shown
        events = tpm_verify.check_boot(data, banks[bank], bank)
        found = events if bank == tpm_verify.BANK or not found else found
    return found


def _explain_ima(data: bytes, banks: Mapping[str, Mapping[int, bytes]], attest: Attest) -> tuple[BootEvent, ...]:
    pcrs = banks.get(tpm_verify.BANK, {})
    if ima.REGISTER not in pcrs:
        raise _malformed("tpm.8-ima.format", "a quote without PCR 10 of the SHA-256 bank", "PCR 10")
    progress = ima.advance(
        ima.start(attest.reset_count),
        data,
        quoted=pcrs[ima.REGISTER],
        reset_count=attest.reset_count,
        where="tpm.8-ima",
    )
    # a list that was extended by a tool instead of a kernel has no aggregate; one that has it must have the right one
    first = progress.entries[0] if progress.entries else None
    if first is not None and first.name == b"boot_aggregate" and all(index in pcrs for index in tpm_verify.BOOT):
        tpm_verify.check_aggregate(progress.entries, pcrs, where="tpm.8-ima.boot_aggregate")
    return ima.boot_events(progress.entries)


def _tools(case: Case) -> Given:
    files = case.files
    for role in ("q.msg", "q.sig", "q.pcrs", "ak.pub"):
        if role not in files:
            raise _malformed(_FORMAT, f"no file {role!r}", "q.msg, q.sig, q.pcrs and ak.pub")
    ak = tpm_format.parse_public(files["ak.pub"], where=_FORMAT)
    if "ak.name" in files and files["ak.name"] != ak.name:
        raise _malformed(_FORMAT, f"ak.name {files['ak.name'].hex()[:80]}", ak.name.hex())
    attest = tpm_format.parse_attest(files["q.msg"], where=_FORMAT)
    banks: dict[str, dict[int, bytes]] = {}
    rest = files["q.pcrs"]
    for bank in attest.selection:
        size = tpm_format.HASH_SIZES.get(bank.algorithm)
        if size is None:
            raise _malformed(_FORMAT, f"bank {bank.algorithm}", "SHA-1, SHA-256, SHA-384 or SHA-512")
        for index in bank.indices:
            if len(rest) < size:
                raise _malformed(
                    _FORMAT, f"q.pcrs of {len(files['q.pcrs'])} bytes", "a value for every PCR of the quote"
                )
            banks.setdefault(bank.algorithm, {})[index], rest = rest[:size], rest[size:]
    if rest:
        raise _malformed(_FORMAT, f"{len(rest)} bytes after the last value of q.pcrs", "none")
    if case.nonce is not None and "nonce" in files and files["nonce"] != case.nonce:
        raise _malformed(_FORMAT, "a file 'nonce' that is not the nonce of the case", case.nonce.hex())
    return Given(
        ak.key,
        (Quoted(files["q.msg"], files["q.sig"], banks),),
        ak,
        certificate=files.get("ak_cert", b"") + files.get("ak_issuer", b"") if "ak_cert" in files else b"",
        anchor=files.get("ak_issuer", b""),
        boot_log=files.get("eventlog"),
        ima_log=files.get("binary_runtime_measurements"),
    )


def _cloud(case: Case) -> Given:
    files = case.files
    if "ak_pub" not in files:
        raise _malformed(_FORMAT, "no file 'ak_pub'", "the attestation key, TPMT_PUBLIC")
    ak = tpm_format.parse_public(files["ak_pub"], where=_FORMAT)
    quotes = []
    for bank in ("sha256", "sha384", "sha1"):
        if bank in files:
            value = _json(files[bank], bank)
            pcrs = value.get("pcrs")
            if not isinstance(pcrs, dict) or len(pcrs) > tpm_format.PCRS:
                raise _malformed(_FORMAT, f"{bank}: no pcrs", "an object of index and hex")
            quotes.append(
                Quoted(
                    _hex(value.get("message"), f"{bank}.message"),
                    _hex(value.get("signature"), f"{bank}.signature"),
                    {bank: {_index(name): _hex(text, f"{bank}.pcrs") for name, text in pcrs.items()}},
                )
            )
    certificate, issuer = files.get("ak_cert", b""), files.get("ak_issuer", b"")
    if issuer:
        certificates.from_der(issuer, where="tpm.4-chain")
    return Given(
        ak.key,
        tuple(quotes),
        ak,
        certificate=certificate + issuer if certificate else b"",
        anchor=issuer,
        boot_log=files.get("eventlog"),
        ima_log=files.get("binary_runtime_measurements"),
    )


def _trustee(case: Case) -> Given:
    value = _json(case.files["evidence"], "evidence")
    quoted = value.get("tpm_quote")
    if (
        not isinstance(quoted, dict)
        or not isinstance(quoted.get("pcrs"), list)
        or len(quoted["pcrs"]) > tpm_format.PCRS
    ):
        raise _malformed(_FORMAT, "no tpm_quote with message, signature and pcrs", "Trustee's TPM evidence")
    pcrs = {index: _hex(text, "pcrs") for index, text in enumerate(quoted["pcrs"])}
    spki = _base64(value.get("ak_public"), "ak_public")
    try:
        key = load_der_public_key(spki)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _malformed(_FORMAT, f"ak_public: {str(error)[:100]}", "DER SubjectPublicKeyInfo") from error
    if not isinstance(key, (ec.EllipticCurvePublicKey, rsa.RSAPublicKey)):
        raise _malformed(_FORMAT, f"a key of type {type(key).__name__}", "RSA or ECC")
    return Given(
        key,
        (
            Quoted(
                _base64(quoted.get("message"), "message"),
                _base64(quoted.get("signature"), "signature"),
                {"sha256": pcrs},
            ),
        ),
        bare=True,
        boot_log=case.files.get("eventlog"),
        ima_log=case.files.get("binary_runtime_measurements"),
    )


def _own(case: Case) -> Given:
    hello, quoted = _json(case.files["hello"], "hello"), _json(case.files["quote"], "quote")
    ak = tpm_format.parse_public(_base64(hello.get("akpub"), "akpub"), where=_FORMAT)
    fields: dict[str, str] = {}
    if "ekpub" in hello and "ekcert" in hello:
        ek = tpm_format.parse_public(_base64(hello["ekpub"], "ekpub"), where=_FORMAT)
        certificate = certificates.from_der(_base64(hello["ekcert"], "ekcert"), where=_FORMAT)
        if certificate.spki != ek.spki:
            raise _malformed(_FORMAT, "an EK certificate of another key", "the certificate of ekpub")
        fields = {"ek": enrol.ek_id(ek), "ek certificate": certificate.subject}
    pcrs = quoted.get("pcrs")
    if not isinstance(pcrs, dict) or len(pcrs) > tpm_format.PCRS:
        raise _malformed(_FORMAT, "quote: no pcrs", "an object of index and base64")
    ima_log = case.files.get("binary_runtime_measurements")
    if ima_log is None and "log" in quoted:
        ima_log = _base64(quoted["log"], "log")
    return Given(
        ak.key,
        (
            Quoted(
                _base64(quoted.get("att"), "att"),
                _base64(quoted.get("sig"), "sig"),
                {"sha256": {_index(name): _base64(text, "pcrs") for name, text in pcrs.items()}},
            ),
        ),
        ak,
        boot_log=case.files.get("eventlog"),
        ima_log=ima_log,
        fields=MappingProxyType(fields),
    )


def _log(case: Case) -> Observation:
    fields: Mapping[str, str] = {}
    try:
        if "eventlog" in case.files:
            log = tcg.parse(case.files["eventlog"], where="tpm.log")
            bank = next((each for each in ("sha256", "sha384", "sha1") if each in log.algorithms), "")
            if not bank:
                raise _malformed("tpm.log", ", ".join(log.algorithms), "a bank that can be replayed")
            events = tcg.events(log, bank)
            fields = {"banks": ", ".join(log.algorithms), "events": str(len(log.entries))}
            fields = fields | {
                f"replay {bank} {index}": value.hex() for index, value in sorted(tcg.replay(log, bank).items())
            }
            fields = fields | _event_fields(events)
        elif "binary_runtime_measurements" in case.files:
            entries = ima.parse(case.files["binary_runtime_measurements"], where="tpm.log")
            fields = {"entries": str(len(entries)), "violations": str(len(ima.violations(entries)))}
            fields = fields | {
                f"replay sha256 {index}": value.hex() for index, value in ima.replay(entries, "sha256").items()
            }
            fields = fields | _event_fields(ima.boot_events(entries))
        else:
            raise _malformed("tpm.log", ", ".join(sorted(case.files)) or "no file", "a quote with its key, or a log")
    except EvidenceError as error:
        return Observation({"parse": False, "authentic": False}, trace(LOG_STEPS, error), error=error)
    return Observation({"parse": True}, trace(LOG_STEPS, None), fields=MappingProxyType(dict(fields)))


def _fields(given: Given, banks: Mapping[str, Mapping[int, bytes]]) -> dict[str, str]:
    fields: dict[str, str] = {}
    if given.ak is not None:
        words = [word for bit, word in _WORDS.items() if given.ak.attributes & bit]
        fields |= {"ak": given.ak.name.hex(), "ak attributes": f"{given.ak.attributes:#x}: {', '.join(words)}"}
    if given.anchor:
        fields["ak issuer"] = f"{sha256(given.anchor).hexdigest()}, which came with the evidence"
    if given.quotes:
        try:
            attest = tpm_format.parse_attest(given.quotes[0].attest, where=_FORMAT)
        except EvidenceError:
            return fields
        fields |= {
            "nonce": attest.extra_data.hex() or "none",
            "clock": f"{attest.clock} ms, resetCount {attest.reset_count}, restartCount {attest.restart_count}",
            "safe": "yes" if attest.safe else "no: the clock may have gone back",
            "firmware": f"{attest.firmware:#018x}",
            "signer": attest.signer.hex(),
        }
    for bank, values in banks.items():
        fields |= {
            f"pcr{index} {bank}": value.hex() for index, value in sorted(values.items()) if value.strip(b"\x00\xff")
        }
    return fields


def _event_fields(events: tuple[BootEvent, ...]) -> dict[str, str]:
    found = {}
    for number, event in enumerate(events[:SHOWN]):
        said = f" {event.label}" if event.label else ""
        trusted = "" if event.data is not None else ", data not measured"
        found[f"event {number}"] = f"PCR {event.register} {event.type}{said} {event.digest.hex()}{trusted}"
    if len(events) > SHOWN:
        found["more events"] = str(len(events) - SHOWN)
    return found


def _json(data: bytes, role: str) -> dict[str, Any]:
    try:
        value: Any = json_decode(data, limit=JSON_LIMIT, canonical=False)
    except ValueError as error:
        raise _malformed(_FORMAT, f"{role}: {str(error)[:100]}", "a JSON object") from error
    if not isinstance(value, dict):
        raise _malformed(_FORMAT, f"{role}: {type(value).__name__}", "a JSON object")
    return value


def _hex(text: object, what: str) -> bytes:
    try:
        if isinstance(text, str):
            return bytes.fromhex(text)
    except ValueError:
        pass
    raise _malformed(_FORMAT, f"{what}: {str(text)[:40]!r}", "hex")


def _base64(text: object, what: str) -> bytes:
    try:
        if isinstance(text, str):
            return base64.b64decode(text, validate=True)
    except ValueError:
        pass
    raise _malformed(_FORMAT, f"{what}: {str(text)[:40]!r}", "base64")


def _index(name: object) -> int:
    text = str(name)
    if text.isascii() and text.isdigit() and len(text) <= 2 and int(text) < tpm_format.PCRS:
        return int(text)
    raise _malformed(_FORMAT, f"PCR {text[:16]!r}", f"0 to {tpm_format.PCRS - 1}")


def _malformed(where: str, found: str, wanted: str) -> EvidenceError:
    return EvidenceError(
        "the TPM evidence does not parse", code="evidence-malformed", reasons=[Reason(where, found, wanted)]
    )
