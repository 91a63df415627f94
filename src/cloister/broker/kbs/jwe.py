"""Encrypt a resource to a TEE's key: one JWE in the flattened form (RFC 7516, 7.2.2). Draws randomness.

    protected      {"alg", "enc": "A256GCM", "epk"?}, base64url; the additional data of AES-GCM is this text
    encrypted_key  ECDH-ES+A256KW: AES key wrap (RFC 3394) under ConcatKDF(Z) (RFC 7518, 4.6.2); RSA-OAEP-256: OAEP with SHA-256
    iv, ciphertext, tag   AES-256-GCM

Clients do not keep the text of `protected`: they parse it and write it again to get the additional data. So its bytes must be
the ones that serde_json writes for kbs-types: alg, enc, then the other members, and the members of `epk` in alphabetical
order, without spaces. That is why no JOSE library makes it here; tests decrypt it with one.
"""

from __future__ import annotations

import json
import os

from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import aes_key_wrap

from cloister.broker.kbs.wire import CURVES, ECDH, TeeKey, b64url

ENC = "A256GCM"
KEY_BYTES = 32
IV_BYTES = 12


def encrypt(payload: bytes, to: TeeKey) -> bytes:
    """Return the JSON of the JWE that only the holder of `to` reads."""
    cek, iv = os.urandom(KEY_BYTES), os.urandom(IV_BYTES)
    header: dict[str, object] = {"alg": to.algorithm, "enc": ENC}
    if isinstance(to.public, ec.EllipticCurvePublicKey):
        name = to.jwk["crv"]
        curve, size = CURVES[name]
        ephemeral = ec.generate_private_key(curve)
        wrapped = aes_key_wrap(_wrapping_key(ephemeral.exchange(ec.ECDH(), to.public)), cek)
        point = ephemeral.public_key().public_numbers()
        x, y = (b64url(each.to_bytes(size, "big")) for each in (point.x, point.y))
        header["epk"] = {"crv": name, "kty": "EC", "x": x, "y": y}
    else:
        wrapped = _to_rsa(to.public, cek)
    protected = b64url(json.dumps(header, separators=(",", ":")).encode())
    sealed = AESGCM(cek).encrypt(iv, payload, protected.encode())
    reply = {
        "protected": protected,
        "encrypted_key": b64url(wrapped),
        "iv": b64url(iv),
        "ciphertext": b64url(sealed[:-16]),
        "tag": b64url(sealed[-16:]),
    }
    return json.dumps(reply, separators=(",", ":")).encode()


def _to_rsa(key: rsa.RSAPublicKey, cek: bytes) -> bytes:
    return key.encrypt(cek, padding.OAEP(padding.MGF1(SHA256()), SHA256(), None))


def _wrapping_key(shared: bytes) -> bytes:
    """RFC 7518, 4.6.2: AlgorithmID, empty PartyUInfo and PartyVInfo, SuppPubInfo = 256 bits."""
    name = ECDH.encode()
    info = len(name).to_bytes(4, "big") + name + bytes(8) + (8 * KEY_BYTES).to_bytes(4, "big")
    return ConcatKDFHash(SHA256(), KEY_BYTES, info).derive(shared)
