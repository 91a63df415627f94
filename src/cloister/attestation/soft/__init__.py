"""Soft TEEs: bit-exact evidence under published test roots. They protect nothing, and everything they emit says so.

Pure generators of (keys from a public label, time): demonstrations, tests and CI walk the same verification path as
hardware, and every negative case (revoked, debug, expired, out of date) can be made at will.
"""
