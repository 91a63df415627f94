"""Endorsements (RFC 9334): what the vendor says about its hardware. Collateral, as bytes, for a verifier to judge.

Nothing is believed because it is here: a verifier checks signatures, chains and validity windows at `now`. Where they
come from (a file, a cache, a generator of test collateral) is the edge's business; evidence never brings its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloister.errors import EvidenceError, Reason


class UnendorsedError(EvidenceError):
    """No collateral is there for a machine: what could not be looked for was not judged."""


@dataclass(frozen=True, slots=True)
class Endorsement:
    """Collateral for one family of machines."""

    kind: str
    """Kind of evidence it is for, such as `tdx`."""
    subject: str
    """Which machines or which statement; each kind says in its `verify.py` what it looks for:

    | kind | subject | data |
    | --- | --- | --- |
    | `tdx`, `sgx` | FMSPC, upper-case hex | JSON of dcap-qvl's quote collateral v3 (TCB info of that TEE) |
    | `sev-snp` | `<Product>/vcek` or `<Product>/vlek` (`Milan/vcek`) | PEM: ASK or ASVK, then ARK |
    | `sev-snp` | `<Product>/crl` | DER revocation list of the ARK; further subjects that begin so count too |
    | `sev-snp` | `vcek/<HWID hex>/<reported TCB hex>`, `vlek/<csp id>` | DER leaf certificate |
    | `nvidia-gpu` | RIM id (`NV_GPU_DRIVER_GH100_550.90.07`) | the vendor's signed RIM, XML |
    | `nvidia-gpu` | `rim/<product>/<version>` | the same, where its id is not known |
    | `nvidia-gpu` | `ocsp/<serial of the certificate, lower-case hex>` | DER OCSP response |
    | `tpm` | `ak/<name of the AK, hex>` | what the relying party noted when it enrolled the AK: `tpm/enrol.py` |
    | `tpm` | `ca/<SHA-256 of the certificate, hex>` | DER intermediate certificate of an EK or AK chain |
    | `tpm` | `crl/<SHA-256 of the issuer's certificate, hex>` | DER revocation list of an authority of EK or AK chains |
    | `tpm` | `crl/<any>` | DER revocation list of an authority of such a chain |
    | `nitro` | `crl/<any>` | DER revocation list of an authority of the chain; AWS has none |
    | `token` | `authority/<name>` | what a contract says about a service, made from it and never stored: `token/format.py` |
    | `cca` | `cpak/<instance id, hex>` or `cpak/<implementation id, hex>` | the platform's public key: JWK or DER |
    """
    data: bytes
    """In the vendor's format."""


@dataclass(frozen=True, slots=True)
class Endorsements:
    """All collateral that a verifier has. Empty endorses nothing."""

    items: tuple[Endorsement, ...] = ()

    def __or__(self, other: Endorsements) -> Endorsements:
        """Return both; for the same machines, `other` counts."""
        newer = {(item.kind, item.subject) for item in other.items}
        kept = tuple(item for item in self.items if (item.kind, item.subject) not in newer)
        return Endorsements(kept + other.items)

    def find(self, kind: str, subject: str, *, where: str) -> bytes:
        """Return the collateral for `kind` of evidence from the machines `subject`.

        Raises:
            UnendorsedError: `evidence-not-authentic`: there is none.
        """
        for item in self.items:
            if item.kind == kind and item.subject == subject:
                return item.data
        have = ", ".join(sorted(item.subject for item in self.items if item.kind == kind)) or "none"
        raise UnendorsedError(
            "no collateral endorses this machine",
            code="evidence-not-authentic",
            reasons=[
                Reason(where, f"collateral for {have}", subject, f"fetch the vendor's {kind} collateral for {subject}")
            ],
        )

    def get(self, kind: str, subject: str) -> bytes | None:
        """Return the collateral, or None: for what may also come with the evidence."""
        return next((item.data for item in self.items if item.kind == kind and item.subject == subject), None)

    def all(self, kind: str, prefix: str) -> tuple[bytes, ...]:
        """Return all collateral for `kind` whose subject begins with `prefix`."""
        return tuple(item.data for item in self.items if item.kind == kind and item.subject.startswith(prefix))
