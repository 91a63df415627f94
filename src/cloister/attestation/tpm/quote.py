"""Is this a TPM's quote over exactly these PCRs? Used for TPMs of their own and for vTPMs that a TEE report vouches for.

Steps of `check`; an error names the fault after the caller's step:
  1 format      TPMS_ATTEST and TPMT_SIGNATURE parse                                 tpm/format.py
  2 signature   the key signs the TPMS_ATTEST, with SHA-256 or better; RSA keys have 2,048 bits or more
  3 generated   the magic is TPM_GENERATED: a TPM made it, its caller did not
  4 type        it is a quote
  5 selection   exactly the banks and PCRs that were given: no more, no fewer
  6 pcrs        the digest of the given values is the signed one
Who the key belongs to, and whether `extra_data` is fresh, is for the caller: `tpm/verify.py`, `check_binding`.
Source: TCG TPM 2.0 Library 1.59 part 1, section 31 (attestation), part 3, section 18.4 (TPM2_Quote).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from cloister.attestation.pki.certificate import PublicKey
from cloister.attestation.tpm.format import (
    GENERATED,
    HASH_SIZES,
    QUOTE,
    Attest,
    Signature,
    parse_attest,
    parse_signature,
)
from cloister.errors import EvidenceError, Reason

__all__ = ["Banks", "check", "check_banks", "check_signed"]

Banks = Mapping[str, Mapping[int, bytes]]
"""Name of a bank -> PCR -> value."""

LEAST_RSA_BITS: Final = 2048
_HASHES: Final[dict[str, hashes.HashAlgorithm]] = {
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}


def check(
    attest: bytes,
    signature: bytes,
    key: PublicKey,
    pcrs: Mapping[int, bytes],
    *,
    algorithm: str,
    where: str,
    bare: bool = False,
) -> Attest:
    """Prove that `key` quoted exactly `pcrs` of the bank `algorithm`; return the TPMS_ATTEST.

    Args:
        attest: TPMS_ATTEST.
        signature: TPMT_SIGNATURE; with `bare`, also an RSASSA/SHA-256 value alone.
        where: the caller's step; `Reason.where` is `<where>.<fault>`.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`.
    """
    return check_banks(attest, signature, key, {algorithm: pcrs}, where=where, bare=bare)


def check_banks(
    attest: bytes, signature: bytes, key: PublicKey, banks: Banks, *, where: str, bare: bool = False
) -> Attest:
    """As `check`, for a quote over one or more banks at once.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`.
    """
    found, used = check_signed(attest, signature, key, where=where, bare=bare)
    # (4)
    if found.type != QUOTE:
        raise _refused(f"{where}.type", f"attestation type {found.type:#06x}", f"{QUOTE:#06x}, a quote")
    # (5) an empty selection of a bank selects nothing; a bank twice would let one value stand for another
    chosen = [each for each in found.selection if each.indices]
    given = {name: tuple(sorted(values)) for name, values in banks.items() if values}
    if (
        len({each.algorithm for each in chosen}) != len(chosen)
        or {each.algorithm: each.indices for each in chosen} != given
        or not given
    ):
        text = "; ".join(f"{each.algorithm}:{_list(each.indices)}" for each in chosen) or "no PCR"
        wanted = "; ".join(f"{name}:{_list(indices)}" for name, indices in given.items()) or "at least one PCR"
        raise _refused(
            f"{where}.selection", text, wanted, "the quote is over other PCRs than the values that came with it"
        )
    # (6)
    running = hashlib.new(used.hash)
    for each in chosen:
        for index in each.indices:
            value = banks[each.algorithm][index]
            if len(value) != HASH_SIZES.get(each.algorithm, 0):
                raise _refused(f"{where}.pcrs", f"PCR {index} of {len(value)} bytes", f"a {each.algorithm} digest")
            running.update(value)
    if not hmac.compare_digest(running.digest(), found.digest):
        raise _refused(
            f"{where}.pcrs", running.hexdigest(), found.digest.hex(), "the PCR values are not those that the TPM signed"
        )
    return found


def check_signed(
    attest: bytes, signature: bytes, key: PublicKey, *, where: str, bare: bool = False
) -> tuple[Attest, Signature]:
    """Prove that a TPM made and `key` signed `attest`, of whatever type: steps 1 to 3.

    Raises:
        EvidenceError: `evidence-malformed` or `evidence-not-authentic`.
    """
    # (1)
    found = parse_attest(attest, where=f"{where}.format")
    used = parse_signature(signature, where=f"{where}.format", bare=bare)
    # (2)
    hash_ = _HASHES.get(used.hash)
    if hash_ is None:
        raise _refused(
            f"{where}.signature", used.hash, "SHA-256, SHA-384 or SHA-512", "collisions of SHA-1 can be made"
        )
    try:
        if isinstance(key, rsa.RSAPublicKey):
            if key.key_size < LEAST_RSA_BITS:
                raise _refused(f"{where}.signature", f"an RSA key of {key.key_size} bits", f"{LEAST_RSA_BITS} or more")
            if used.scheme == "rsassa":
                key.verify(used.value, attest, padding.PKCS1v15(), hash_)
            elif used.scheme == "rsapss":
                # the TPM takes the longest salt that fits, or the hash's length in FIPS mode (part 1, B.7)
                key.verify(used.value, attest, padding.PSS(padding.MGF1(hash_), padding.PSS.AUTO), hash_)
            else:
                raise InvalidSignature
        elif used.scheme == "ecdsa":
            key.verify(used.value, attest, ec.ECDSA(hash_))
        else:
            raise InvalidSignature
    except (InvalidSignature, ValueError, UnsupportedAlgorithm) as error:
        raise _refused(
            f"{where}.signature", "a signature of something else", "a signature of the attestation key"
        ) from error
    # (3)
    if found.magic != GENERATED:
        raise _refused(
            f"{where}.generated",
            f"magic {found.magic:#010x}",
            f"{GENERATED:#010x}",
            "not the TPM but its caller made it",
        )
    return found, used


def _list(indices: tuple[int, ...]) -> str:
    return ",".join(map(str, indices))


def _refused(where: str, found: str, wanted: str, hint: str = "") -> EvidenceError:
    return EvidenceError(
        "the TPM quote is not authentic", code="evidence-not-authentic", reasons=[Reason(where, found, wanted, hint)]
    )
