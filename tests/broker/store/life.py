"""A broker's life in steps, for tests: every table gets rows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from cloister.broker.log import leaf as leaves
from cloister.broker.log.leaf import AssetRef
from cloister.broker.store.ledger import Appended, LeaseSecrets, Ledger, PendingOutput
from cloister.crypto.keys import Secret, digest
from cloister.errors import DeniedError, Reason

NOW: Final = datetime(2026, 11, 20, 9, 30, 0, 123456, tzinfo=UTC)
MASTER: Final = Secret(b"M" * 32)
ORIGIN: Final = "broker.example/log"
TOML: Final = b'contract = "xray"\nversion = 1\n'
CONTRACT: Final = digest(TOML)
HOSPITAL: Final = "SHA256:1mbN4yyqQzwlbR7YvIZ0fpcMTk4w8DkAXlHEzMZzvCI"
VENDOR: Final = "SHA256:8AcF6xVbDeyBMcSHJhqXohYhc4nXmF5kFMCMcJBfAx0"
DATA: Final = digest(b"xrays")
CODE: Final = digest(b"trainer")
VOLUME_KEY: Final = Secret(b"planted-volume-key-0123456789abc")
LEASE_SECRET: Final = Secret(b"planted-lease-secret-0123456789a")
OUTPUT_KEY: Final = Secret(b"planted-output-key-0123456789abc")
LEASE: Final = "l-" + "1" * 32


def activate(ledger: Ledger, toml: bytes = TOML, *, name: str = "xray", version: int = 1, replaces: str = "") -> str:
    """Submit, sign and activate a contract; return its id."""
    contract = digest(toml)
    ledger.submit_contract(toml, name=name, version=version, replaces=replaces, now=NOW).result(30)
    for party in (HOSPITAL, VENDOR):
        ledger.add_signature(contract, party, f"signature of {party}", now=NOW).result(30)
    ledger.activate_contract(contract, [HOSPITAL, VENDOR], now=NOW).result(30)
    return contract


def release(ledger: Ledger, lease: str = LEASE, *, volume: str = DATA, contract: str = CONTRACT) -> Appended:
    """Release `volume` as xrays under a lease that writes detector."""
    leaf = leaves.Release(
        time=NOW,
        lease=lease,
        contract=contract,
        phase="train",
        reads=(AssetRef("xrays", volume),),
        writes=("detector",),
        code=CODE,
        sandbox="offline",
        level="L1",
        evidence=digest(b"evidence"),
        tee="soft-tdx",
        hpke_key=digest(b"hpke"),
        request=digest(b"request"),
        expires=NOW + timedelta(minutes=10),
    )
    outputs = (PendingOutput("detector", "hospital", b"o" * 16, 1, OUTPUT_KEY),)
    return ledger.release(leaf, LeaseSecrets(LEASE_SECRET, outputs)).result(30)


def answer(ledger: Ledger, number: int, *, budget: int | None = 500, per_day: int | None = None) -> Appended:
    """Spend one answer of clinic."""
    return ledger.answer(
        contract=CONTRACT,
        phase="serve",
        party="clinic",
        budget=budget,
        per_day=per_day,
        now=NOW,
        denial=f"d-{number:012x}",
    ).result(30)


def live(ledger: Ledger) -> None:
    """Do everything once."""
    ledger.begin_epoch(now=NOW, software="ab" * 48, evidence=digest(b"e"), tee="soft-tdx").result(30)
    ledger.append(leaves.Witness(time=NOW, name="witness.example/w", key="a key")).result(30)
    activate(ledger)
    ledger.deposit_key(DATA, HOSPITAL, VOLUME_KEY, volume_id=b"v" * 16, generation=1, now=NOW).result(30)
    release(ledger)
    ledger.renew_lease(
        LEASE, evidence=digest(b"e2"), tee="soft-tdx", expires=NOW + timedelta(minutes=20), now=NOW
    ).result(30)
    ledger.register_root(LEASE, "detector", digest(b"out 1"), generation=1, now=NOW).result(30)
    answer(ledger, 1)
    ledger.deny(
        "d-0000000000ff",
        operation="release",
        error=DeniedError("no", reasons=[Reason("phase.train.run", "evil", "trainer")]),
        now=NOW,
        contract=CONTRACT,
    ).result(30)
    ledger.raise_marks({"crl/45": 7}, now=NOW).result(30)
