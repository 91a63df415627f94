"""The binding: what one piece of evidence is fresh for, and bound to.

One encoding for every purpose and every hardware; the byte table is in docs/attestation.md:

    encode()           b"cloister/binding/1" 00 || canonical CBOR map of all fields
    report_data()      SHA-512(encode())   64 bytes, REPORT_DATA of a TEE quote
    qualifying_data()  SHA-256(encode())   32 bytes, TPM qualifying data and GPU nonce, where 64 do not fit

A relay fails on `key` (secrets are sealed to it and it lives in the TEE), a replay on `nonce`, a man in the middle on
`peer_key`, a mix of devices on `devices`, another use of the same evidence on `purpose`, `contract`, `phase` and `request`.
Whether the nonce is known, unused and young is the verifier's session state, not decided here.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from cloister.attestation import evidence as evidence_format
from cloister.attestation.events import fold
from cloister.attestation.types import Claims, Evidence
from cloister.crypto.canonical import cbor_encode
from cloister.errors import Reason

TAG: Final = b"cloister/binding/1\x00"
"""Protocol tag; a change of the map below is a new number."""

Purpose = Literal["broker", "release", "renew", "service"]
PURPOSES: Final[frozenset[str]] = frozenset(get_args(Purpose))

NO_PEER: Final = bytes(32)
"""`peer_key` of an attester that talks to nobody over TLS."""


@dataclass(frozen=True, slots=True)
class Binding:
    """What evidence is bound to. Construction checks sizes, so a binding that exists can be hashed.

    Raises:
        ValueError: an unknown purpose, a field of the wrong size, or a contract that is not a digest.
    """

    purpose: str
    """`broker` (to a client), `release` or `renew` (a node to the broker), `service` (a serve node to a consumer)."""
    nonce: bytes
    """32 bytes chosen by the verifier, used once."""
    key: bytes
    """HPKE public key of the attester, made inside its TEE."""
    peer_key: bytes = NO_PEER
    """SHA-256 of the TLS SubjectPublicKeyInfo of the peer that the attester talks to; 32 zero bytes without one."""
    contract: str = ""
    """Contract id, `sha256:` and 64 hex digits; empty where no contract is involved."""
    phase: str = ""
    request: bytes = bytes(32)
    """SHA-256 of the canonical CBOR request."""
    devices: tuple[bytes, ...] = ()
    """SHA-256 of each further piece of evidence (GPU, TPM), in the order in which it is sent."""

    def __post_init__(self) -> None:
        if self.purpose not in PURPOSES:
            raise ValueError(f"purpose {self.purpose!r} is not one of {', '.join(sorted(PURPOSES))}")
        for name, value in (("nonce", self.nonce), ("peer_key", self.peer_key), ("request", self.request)):
            if len(value) != 32:
                raise ValueError(f"{name} of {len(value)} bytes, wanted 32")
        if not self.key:
            raise ValueError("a binding without a key binds nothing")
        if self.contract and not _is_digest(self.contract):
            raise ValueError(f"contract {self.contract!r} is not of the form sha256:<64 hex digits>")
        if any(len(device) != 32 for device in self.devices):
            raise ValueError("every device is named by a SHA-256 digest of 32 bytes")

    def over(self, devices: tuple[Evidence, ...]) -> Binding:
        """Return this binding with the evidence of `devices` in it: what the CPU's evidence is bound to."""
        return replace(self, devices=tuple(hashlib.sha256(evidence_format.encode(each)).digest() for each in devices))

    def for_devices(self) -> Binding:
        """Return the binding that devices attest: the same without their own evidence, which does not exist yet."""
        return replace(self, devices=())

    def encode(self) -> bytes:
        return TAG + cbor_encode(
            {
                "purpose": self.purpose,
                "nonce": self.nonce,
                "key": self.key,
                "peer_key": self.peer_key,
                "contract": self.contract,
                "phase": self.phase,
                "request": self.request,
                "devices": list(self.devices),
            }
        )

    def report_data(self) -> bytes:
        """Return the 64 bytes for REPORT_DATA."""
        return hashlib.sha512(self.encode()).digest()

    def qualifying_data(self) -> bytes:
        """Return the 32 bytes for hardware that has no room for 64."""
        return hashlib.sha256(self.encode()).digest()


def check_binding(claims: Claims, binding: Binding) -> tuple[Reason, ...]:
    """Return why `claims` are not bound to `binding`; empty means bound.

    64 bytes of report data are compared with `report_data()` (folded with the log where the hardware has no register for
    it), 32 with `qualifying_data()`; any other length refuses. Each device must be bound to `for_devices()`, and `binding`
    must be `over` exactly the evidence of the devices in `claims`: the caller, who has the evidence, makes it so.
    """
    reasons = []
    if len(claims.devices) != len(binding.devices):
        found, wanted = f"{len(claims.devices)} devices", f"{len(binding.devices)} devices in the binding"
        reasons.append(Reason("binding.devices", found, wanted, "a device was added or taken away"))
    wanted_data = _wanted(claims, binding)
    if not hmac.compare_digest(claims.report_data, wanted_data):
        reasons.append(_unbound("binding.report_data", claims, wanted_data, binding))
    inner = binding.for_devices()
    for index, device in enumerate(claims.devices):
        wanted_data = _wanted(device, inner)
        if not hmac.compare_digest(device.report_data, wanted_data):
            reasons.append(_unbound(f"binding.devices.{index}", device, wanted_data, inner))
    return tuple(reasons)


def _wanted(claims: Claims, binding: Binding) -> bytes:
    if len(claims.report_data) == 32:
        # 32 bytes have no room for the log, so it must be in a register; what is left without one is never bound
        return binding.qualifying_data() if claims.log_in == "register" or not claims.events else b""
    if claims.log_in == "report-data":
        return fold(binding.report_data(), claims.events)
    return binding.report_data()


def _unbound(where: str, claims: Claims, wanted: bytes, binding: Binding) -> Reason:
    return Reason(
        where,
        found=claims.report_data.hex() or "nothing",
        wanted=f"{wanted.hex() or 'evidence that vouches for its log'} (purpose {binding.purpose})",
        hint="the evidence was made for another nonce, key, peer, contract, phase or request: attest again",
    )


def _is_digest(text: str) -> bool:
    return text.startswith("sha256:") and len(text) == 71 and all(c in "0123456789abcdef" for c in text[7:])
