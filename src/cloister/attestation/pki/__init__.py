"""Certificates, paths, revocation: one semantics for every vendor's root. Pure: `now` is an argument.

`certificate` bytes <-> frozen type; `path` decides whether a chain holds at a time; `crl` and `ocsp` say what is revoked.

Rules, the same everywhere:
  expiry      every certificate of the path, every CRL and every OCSP response must be valid at `now`, without tolerance
  root        the last certificate is self-signed and its SHA-256 is pinned; certificates are matched by key, not by name only
  revocation  where a vendor publishes it, absence of current revocation data refuses; a revoked certificate refuses for ever
  faults      `Reason.where` ends in `.expired`, `.future`, `.signature`, `.issuer`, `.authority`, `.revoked`, `.revocation`,
              `.root` or `.format`
"""
