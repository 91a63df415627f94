"""Arm CCA, experimental: attestation tokens of realms. *format* reads bytes, *verify* decides whether they are authentic."""
