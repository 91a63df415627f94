"""Cloister: confidential machine learning on machines nobody has to trust.

The rooms, bottom up (a room imports only from rooms below it; `tests/test_floors.py` says so):
`errors`, `crypto` -> `attestation` -> `contract`, `volume` -> `confine` -> `broker` -> `node` -> `serve` -> `cli`.
`testkit` is public and may import all of them.
"""

__version__ = "0.1.0"
