"""Trustee's KBS attestation protocol (RCAR 0.4.0) as another door of the broker: wire, session, jwe, service.

Clients that speak it (CoCo guest components, `kbs-client`) get keys by the broker's own decision. docs/kbs.md has the formats
and says what this door does not protect.
"""
