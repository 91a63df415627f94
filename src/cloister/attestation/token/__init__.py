"""Tokens of attestation services as evidence, under authorities that a relying party names."""
