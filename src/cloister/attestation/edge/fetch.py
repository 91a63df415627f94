"""Asking vendors for collateral: Intel PCS, AMD KDS, NVIDIA's RIM service and OCSP responder. Opt-in: nothing else calls this.

| vendor | request | source |
| --- | --- | --- |
| Intel | `GET /{sgx,tdx}/certification/v4/tcb?fmspc=`, chain in `TCB-Info-Issuer-Chain` | PCS API v4 |
| Intel | `GET /{sgx,tdx}/certification/v4/qe/identity`, chain in `SGX-Enclave-Identity-Issuer-Chain` | |
| Intel | `GET /sgx/certification/v4/pckcrl?ca={processor,platform}&encoding=der`, chain in `SGX-PCK-CRL-Issuer-Chain` | |
| Intel | `GET /IntelSGXRootCA.der` of certificates.trustedservices.intel.com, the root's list | |
| AMD | `GET /{vcek,vlek}/v1/{line}/cert_chain`, `GET /vcek/v1/{line}/crl` | AMD 57230, chapter 4 |
| AMD | `GET /vcek/v1/{line}/{chip}?blSPL=&teeSPL=&snpSPL=&ucodeSPL=`, on Turin also `fmcSPL=` | |
| NVIDIA | `GET /v1/rim/{id}`, JSON with the manifest in base64 | RIM service API |
| NVIDIA | `POST` of a DER request, `application/ocsp-request` | RFC 6960, appendix A |

Nothing that comes back is believed: verifiers check signatures and times, and stores check numbers. So a caching service of one's
own (PCCS, a mirror) can stand in for any of them. What is checked here keeps a broken or hostile server from costing more than one
request: https only, redirects to the same origin only, a size cap and a deadline for each answer, at most four attempts, and only after
429 or 503. All faults are `PeerError`.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from typing import IO, Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp as x509_ocsp

from cloister.attestation.collateral.needs import (
    AmdLeaf,
    AmdLine,
    IntelTcb,
    Need,
    NvidiaAnswer,
    NvidiaManifest,
    answers,
)
from cloister.attestation.collateral.read import recognise
from cloister.attestation.dcap import collateral as dcap
from cloister.attestation.endorsements import Endorsement
from cloister.attestation.nvidia import rim as nvidia_rim
from cloister.attestation.pki import ocsp
from cloister.crypto.canonical import json_encode
from cloister.errors import EvidenceError, InputError, PeerError, Reason

ATTEMPTS: Final = 4
TIMEOUT_S: Final = 20.0
"""Longest silence of a server."""
DEADLINE_S: Final = 60.0
"""Longest time for one answer, headers to last byte."""
MOST_WAIT_S: Final = 30.0
"""Longest pause that a server may ask for with Retry-After."""
SMALL: Final = 64 * 1024
LARGE: Final = 4 * 1024 * 1024
_BUSY: Final = (429, 503)
WHERE: Final = "collateral.fetch"


@dataclass(frozen=True, slots=True)
class Sources:
    """Whom to ask: addresses without a path at their end."""

    pcs: str = "https://api.trustedservices.intel.com"
    root_crl: str = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
    kds: str = "https://kdsintf.amd.com"
    rim: str = "https://rim.attestation.nvidia.com"
    ocsp: str = "https://ocsp.ndis.nvidia.com"


@dataclass(frozen=True, slots=True)
class Answer:
    body: bytes
    headers: Message


class Web:
    """A careful client. `insecure_http` is for tests, whose fakes have no certificates; `sleep` too, so that they need not wait."""

    def __init__(
        self,
        *,
        timeout_s: float = TIMEOUT_S,
        deadline_s: float = DEADLINE_S,
        insecure_http: bool = False,
        sleep: Callable[[float], None] = time.sleep,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._timeout_s, self._deadline_s, self._sleep, self._say = timeout_s, deadline_s, sleep, say
        self._schemes = ("https", "http") if insecure_http else ("https",)
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _SameOrigin())

    def get(self, url: str, *, limit: int) -> Answer:
        """Return what is at `url`, at most `limit` bytes.

        Raises:
            PeerError: the server is unreachable, slow, says no, or answers with more.
            InputError: `url` is not https.
        """
        return self._ask(url, None, {}, limit)

    def post(self, url: str, body: bytes, *, kind: str, limit: int) -> Answer:
        """Send `body` of media type `kind`; the rest as `get`."""
        return self._ask(url, body, {"Content-Type": kind}, limit)

    def _ask(self, url: str, body: bytes | None, headers: Mapping[str, str], limit: int) -> Answer:
        split = urllib.parse.urlsplit(url)
        if split.scheme not in self._schemes or not split.hostname or split.username is not None:
            raise InputError(
                "collateral is fetched over https only",
                reasons=[Reason(WHERE, url[:200], "https://<host>/...")],
            )
        request = urllib.request.Request(url, data=body, headers={"User-Agent": "cloister", **headers})  # noqa: S310  # its scheme was checked above
        attempt = 0
        while True:
            try:
                return self._once(request, limit)
            except urllib.error.HTTPError as error:
                with error:
                    pause = _pause(error, attempt)
                attempt += 1
                if error.code not in _BUSY or attempt == ATTEMPTS:
                    raise _refused(url, f"status {error.code}", "status 200", _HINTS.get(error.code, "")) from error
            self._say(f"{split.hostname} is busy; next attempt in {pause:.0f} s")
            self._sleep(pause)

    def _once(self, request: urllib.request.Request, limit: int) -> Answer:
        begin = time.monotonic()
        url = request.full_url
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                if response.status != 200:
                    raise _refused(url, f"status {response.status}", "status 200")
                body = bytearray()
                while True:
                    if time.monotonic() - begin > self._deadline_s:
                        raise _refused(
                            url, f"{len(body)} bytes after {self._deadline_s:.0f} s", "a whole answer by then"
                        )
                    part = response.read1(64 * 1024)
                    if not part:
                        break
                    body += part
                    if len(body) > limit:
                        raise _refused(url, f"more than {limit} bytes", f"at most {limit} bytes")
                declared = response.headers.get("Content-Length", "")
                if declared.isdigit() and int(declared) != len(body):
                    raise _refused(url, f"{len(body)} bytes", f"{declared} bytes, as the server announced")
                return Answer(bytes(body), response.headers)
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and timeouts are OSErrors
            reason = getattr(error, "reason", error)
            raise _refused(url, f"{type(error).__name__}: {reason}"[:200], "an answer") from error


class _SameOrigin(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to the same scheme, host and port only: another host is another peer, whom nobody chose."""

    max_redirections = 3

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if (old.scheme, old.netloc) != (new.scheme, new.netloc):
            fp.close()
            raise _refused(req.full_url, f"a redirect to {new.scheme}://{new.netloc}"[:200], "an answer of this server")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_HINTS: Final = {
    404: "the vendor does not know this machine, product or manifest",
    429: "the vendor limits how often one may ask; try again later, or use a cache of your own",
    503: "try again later, or use a cache of your own",
}


def _pause(error: urllib.error.HTTPError, attempt: int) -> float:
    asked = (error.headers.get("Retry-After", "") if error.headers else "").strip()
    return min(float(asked) if asked.isdigit() and len(asked) < 6 else 2.0**attempt, MOST_WAIT_S)


def _refused(url: str, found: str, wanted: str, hint: str = "") -> PeerError:
    split = urllib.parse.urlsplit(url)
    return PeerError(
        f"{split.netloc} did not give the collateral",
        reasons=[Reason(WHERE, f"{split.path[:120]}: {found}", wanted, hint)],
    )


# Whatever is needed ------------------------------------------------------------------------------------------


def fetch(
    needs: Sequence[Need],
    web: Web,
    sources: Sources | None = None,
    *,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> tuple[Endorsement, ...]:
    """Return what `needs` ask for; a manifest brings the OCSP responses of its signers along.

    `progress` gets how many are done, of how many, and what is asked next.

    Raises:
        PeerError: a vendor did not give one of them, or gave something else.
        InputError: an address is not https.
    """
    where = sources or Sources()
    waiting = list(needs)
    found: dict[tuple[str, str], Endorsement] = {}
    done = 0
    while waiting:
        need = waiting.pop(0)
        progress(done, done + 1 + len(waiting), describe(need))
        items = tuple(_one(need, web, where))
        found |= {(item.kind, item.subject): item for item in items}
        if isinstance(need, NvidiaManifest):
            waiting += [each for each in _signers(items[0]) if each not in waiting]
        done += 1
    progress(done, done, "")
    return tuple(found.values())


def describe(need: Need) -> str:
    """Return what is asked for, for people."""
    match need:
        case IntelTcb():
            return f"Intel: {need.tee} collateral for FMSPC {need.fmspc}"
        case AmdLine():
            return f"AMD: chain and revocation list of {need.line} ({need.signer.upper()})"
        case AmdLeaf():
            return f"AMD: VCEK of chip {need.chip[:16]}"
        case NvidiaManifest():
            return f"NVIDIA: manifest {need.id}"
        case NvidiaAnswer():
            return f"NVIDIA: revocation of {need.certificate.subject[:60]}"


def _one(need: Need, web: Web, sources: Sources) -> Iterator[Endorsement]:
    match need:
        case IntelTcb():
            yield intel(web, need, base=sources.pcs, root_crl=sources.root_crl)
        case AmdLine():
            yield amd_chain(web, need, base=sources.kds)
            yield amd_list(web, need, base=sources.kds)
        case AmdLeaf():
            yield amd_leaf(web, need, base=sources.kds)
        case NvidiaManifest():
            yield nvidia_manifest(web, need, base=sources.rim)
        case NvidiaAnswer():
            yield nvidia_answer(web, need, base=sources.ocsp)
            # else nobody could say whose answer it is, and it would have no mark
            name = hashlib.sha256(need.issuer.der).hexdigest()
            yield Endorsement("nvidia-gpu", f"ca/{name}", need.issuer.der)


def _signers(manifest: Endorsement) -> Sequence[NvidiaAnswer]:
    try:
        return tuple(answers(nvidia_rim.read(manifest.data, where=WHERE).chain))
    except EvidenceError as error:
        raise PeerError("NVIDIA's manifest cannot be used", reasons=error.reasons) from error


def _recognised(url: str, data: bytes, kind: str, subject: str, name: str = "") -> Endorsement:
    """Return `data` if it is what was asked for."""
    try:
        (found,) = recognise(data, name=name)
    except (EvidenceError, ValueError) as error:
        reasons = error.reasons if isinstance(error, EvidenceError) else ()
        raise _refused(url, str(reasons[0]) if reasons else "several things", f"{kind} {subject}") from error
    if (found.kind, found.subject) != (kind, subject):
        raise _refused(url, f"{found.kind} {found.subject}"[:200], f"{kind} {subject}")
    return found


# Intel -------------------------------------------------------------------------------------------------------

_HEX_CRL: Final = re.compile(rb"\s*([0-9A-Fa-f]{2,})\s*")
_AFTER: Final = re.compile(r'\s*,\s*"signature"\s*:\s*"([0-9A-Fa-f]{128})"\s*\}\s*')


def intel(web: Web, need: IntelTcb, *, base: str, root_crl: str) -> Endorsement:
    """Return quote collateral for `need`, put together as dcap-qvl has it.

    Raises:
        PeerError, InputError: as `fetch`.
    """
    api = f"{base.rstrip('/')}/{need.tee}/certification/v4"
    tcb_url = f"{api}/tcb?fmspc={need.fmspc}"
    tcb = web.get(tcb_url, limit=dcap.LIMIT)
    identity_url = f"{api}/qe/identity"
    identity = web.get(identity_url, limit=SMALL)
    crl_url = f"{base.rstrip('/')}/sgx/certification/v4/pckcrl?ca={need.authority}&encoding=der"
    crl = web.get(crl_url, limit=dcap.LIMIT // 4)
    root = web.get(root_crl, limit=SMALL)
    tcb_info, tcb_signature = _signed(tcb_url, tcb.body, "tcbInfo")
    qe_identity, qe_signature = _signed(identity_url, identity.body, "enclaveIdentity")
    data = json_encode(
        {
            "tcb_info": tcb_info,
            "tcb_info_signature": tcb_signature,
            "tcb_info_issuer_chain": _chain(tcb_url, tcb, "TCB-Info-Issuer-Chain", "SGX-TCB-Info-Issuer-Chain"),
            "qe_identity": qe_identity,
            "qe_identity_signature": qe_signature,
            "qe_identity_issuer_chain": _chain(identity_url, identity, "SGX-Enclave-Identity-Issuer-Chain"),
            "pck_crl": _der(crl.body).hex(),
            "pck_crl_issuer_chain": _chain(crl_url, crl, "SGX-PCK-CRL-Issuer-Chain"),
            "root_ca_crl": _der(root.body).hex(),
        }
    )
    return _recognised(tcb_url, data, need.tee, need.fmspc)


def _signed(url: str, body: bytes, key: str) -> tuple[str, str]:
    """Return the signed document of `body` as it is spelt there (the signature is over those bytes), and its signature."""
    try:
        text = body.decode("utf-8")
        start = re.match(r'\s*\{\s*"' + key + r'"\s*:\s*', text)
        if start is None:
            raise ValueError("another shape")
        _, end = json.JSONDecoder().raw_decode(text, start.end())
        after = _AFTER.fullmatch(text, end)
        if after is None:
            raise ValueError(f"no signature after {key}")
    except (ValueError, RecursionError) as error:
        raise _refused(url, f"{type(error).__name__}: {error}"[:200], f"JSON of {key} and signature") from error
    return text[start.end() : end], after[1].lower()


def _chain(url: str, answer: Answer, *names: str) -> str:
    for name in names:
        value = answer.headers.get(name)
        if value:
            return urllib.parse.unquote(value)
    raise _refused(url, f"no header {names[0]}", "the issuers' certificates in it")


def _der(data: bytes) -> bytes:
    found = _HEX_CRL.fullmatch(data)  # caches of one's own answer in hex, whatever the encoding that was asked for
    return bytes.fromhex(found[1].decode()) if found and len(found[1]) % 2 == 0 else data


# AMD ---------------------------------------------------------------------------------------------------------

_SPL: Final = {"fmc": "fmcSPL", "bootloader": "blSPL", "tee": "teeSPL", "snp": "snpSPL", "microcode": "ucodeSPL"}


def amd_chain(web: Web, need: AmdLine, *, base: str) -> Endorsement:
    """Return ASK or ASVK, and ARK. Errors as `fetch`."""
    url = f"{base.rstrip('/')}/{need.signer}/v1/{need.line}/cert_chain"
    return _recognised(url, web.get(url, limit=SMALL).body, "sev-snp", f"{need.line}/{need.signer}")


def amd_list(web: Web, need: AmdLine, *, base: str) -> Endorsement:
    """Return the ARK's revocation list, which names ASK and ASVK alike. Errors as `fetch`."""
    url = f"{base.rstrip('/')}/vcek/v1/{need.line}/crl"
    return _recognised(url, web.get(url, limit=LARGE).body, "sev-snp", f"{need.line}/crl")


def amd_leaf(web: Web, need: AmdLeaf, *, base: str) -> Endorsement:
    """Return the VCEK. Errors as `fetch`."""
    query = "&".join(f"{_SPL[name]}={value:02}" for name, value in need.tcb.components().items())
    url = f"{base.rstrip('/')}/vcek/v1/{need.line}/{need.chip}?{query}"
    return _recognised(url, web.get(url, limit=SMALL).body, "sev-snp", need.subject)


# NVIDIA ------------------------------------------------------------------------------------------------------


def nvidia_manifest(web: Web, need: NvidiaManifest, *, base: str) -> Endorsement:
    """Return a manifest. Errors as `fetch`."""
    url = f"{base.rstrip('/')}/v1/rim/{urllib.parse.quote(need.id, safe='')}"
    return _recognised(url, web.get(url, limit=dcap.LIMIT).body, "nvidia-gpu", need.id)


def nvidia_answer(web: Web, need: NvidiaAnswer, *, base: str) -> Endorsement:
    """Return an OCSP response; it is about the certificate that was asked about, and nothing more is known. Errors as `fetch`."""
    url = base.rstrip("/") + "/"
    body = web.post(url, ocsp_request(need), kind="application/ocsp-request", limit=ocsp.LIMIT).body
    return _recognised(url, body, "nvidia-gpu", f"ocsp/{need.certificate.serial:x}")


def ocsp_request(need: NvidiaAnswer) -> bytes:
    """Return the DER request (RFC 6960, 4.1). No nonce: answers are kept, and shared."""
    certificate, issuer = (x509.load_der_x509_certificate(each.der) for each in (need.certificate, need.issuer))
    builder = x509_ocsp.OCSPRequestBuilder().add_certificate(certificate, issuer, SHA384())
    return builder.build().public_bytes(Encoding.DER)
