"""Decisions without a network: the order of steps, the code of the first, all reasons of all."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.attestation.binding import Binding
from cloister.attestation.events import Workload
from cloister.broker import decide, session, wire
from cloister.broker.life import NEXT, Event, State, after, on
from cloister.confine.profile import Limits, profile
from cloister.contract.parse import parse
from cloister.crypto import hpke
from cloister.errors import DeniedError, EvidenceError, InputError, WaitingError
from cloister.testkit.softtee import MEASUREMENT, NOW, SOFT_ROOTS, SoftPlatform, soft_claims
from tests.broker.world import TRAINER, VOLUME_ID, XRAYS, World

WORLD = World()
CONTRACT = parse(WORLD.contract(), name="test.toml")
PAIR = hpke.KeyPair.generate()
ASK = wire.ReleaseAsk(CONTRACT.id, "train", ("xrays",), ("detector",))
BINDING = Binding("release", b"\x01" * 32, PAIR.public, b"\x02" * 32, CONTRACT.id, "train", ASK.hashed())
WORKLOAD = Workload(TRAINER, "offline", profile("offline").digest(), "L1")
KNOWN = decide.Known(CONTRACT, frozenset({"hospital", "vendor"}), State.ACTIVE)
DEPOSIT = decide.Deposit(WORLD.hospital.key.fingerprint, 1, VOLUME_ID)
HOLDINGS = decide.Holdings({XRAYS: (DEPOSIT,)}, {})


def judged(platform: SoftPlatform | None = None, *, ask: wire.ReleaseAsk = ASK, **changed: Any) -> Any:
    machine = (platform or SoftPlatform()).run(WORKLOAD)
    facts: dict[str, Any] = {
        "nonce_issued": NOW,
        "known": KNOWN,
        "holdings": HOLDINGS,
        "trusted": decide.Trusted(SOFT_ROOTS, machine.endorsements, frozenset({MEASUREMENT})),
        "lease": timedelta(minutes=10),
        "now": NOW,
    }
    evidence = machine.attester.evidence(BINDING.report_data())
    return decide.release(ask, evidence, BINDING, **(facts | changed))


def test_grant_names_keys_outputs_and_times() -> None:
    grant = judged()
    assert isinstance(grant, decide.Grant)
    assert grant.reads == (decide.Read("xrays", XRAYS, 1, WORLD.hospital.key.fingerprint),)
    assert grant.writes == (decide.Write("detector", "hospital", 1, None),)
    assert (grant.expires - NOW, grant.renew_after - NOW) == (timedelta(minutes=10), timedelta(minutes=5))


def refused(**changed: Any) -> Any:
    verdict = judged(**changed)
    assert isinstance(verdict, decide.Refusal)
    return verdict.error


@pytest.mark.parametrize(
    ("age", "fresh"),
    [
        (timedelta(0), True),
        (timedelta(seconds=60), True),
        (timedelta(seconds=60, microseconds=1), False),
        (-timedelta(seconds=1), False),
    ],
)
def test_nonce_lives_sixty_seconds(age: timedelta, fresh: bool) -> None:
    assert isinstance(judged(nonce_issued=NOW - age), decide.Grant) is fresh


def test_the_first_step_gives_the_code_and_all_steps_give_reasons() -> None:
    error = refused(
        platform=SoftPlatform(measurement=b"\x09" * 48),
        nonce_issued=None,
        known=None,
        ask=replace(ASK, reads=(), writes=()),
    )
    assert isinstance(error, EvidenceError)
    assert error.code == "evidence-stale"
    assert [reason.where for reason in error.reasons] == ["nonce", "node.mrtd", "request", "contract"]


def test_accepting_no_software_accepts_nothing() -> None:
    error = refused(trusted=decide.Trusted(SOFT_ROOTS, SoftPlatform().endorsements, frozenset()))
    assert [reason.where for reason in error.reasons] == ["node.mrtd"]


def test_outdated_firmware_is_the_contracts_business() -> None:
    error = refused(platform=SoftPlatform(status="OutOfDate"))
    assert isinstance(error, DeniedError)
    assert [reason.where for reason in error.reasons] == ["place.enclave.tcb_status"]


def test_only_signatures_missing_is_waiting() -> None:
    waiting = replace(KNOWN, signed=frozenset({"vendor"}), state=State.WAITING)
    assert isinstance(refused(known=waiting), WaitingError)
    assert isinstance(refused(known=waiting, holdings=decide.Holdings({}, {})), DeniedError)
    consent = replace(KNOWN, state=State.WAITING)
    assert isinstance(refused(known=consent), WaitingError)


@pytest.mark.parametrize("state", [State.REPLACED, State.REVOKED])
def test_contracts_that_are_over(state: State) -> None:
    assert [reason.where for reason in refused(known=replace(KNOWN, state=state)).reasons] == ["contract"]


def test_a_written_asset_is_read_at_its_root_only() -> None:
    holdings = replace(HOLDINGS, roots={"detector": decide.Root("sha256:" + "77" * 32, 4)})
    grant = judged(holdings=holdings)
    assert grant.writes == (decide.Write("detector", "hospital", 5, "sha256:" + "77" * 32),)


def test_reading_asks_for_the_owners_deposit() -> None:
    stranger = replace(DEPOSIT, owner="SHA256:" + "A" * 43)
    both = decide.Holdings({XRAYS: (stranger, DEPOSIT)}, {})
    assert judged(holdings=both).reads[0].depositor == DEPOSIT.owner
    error = refused(holdings=decide.Holdings({XRAYS: (stranger,)}, {}))
    assert [reason.where for reason in error.reasons] == ["key.xrays"]


def test_naive_time_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="time zone"):
        judged(now=datetime(2026, 1, 1))  # noqa: DTZ001


def test_renewal_of_nothing() -> None:
    machine = SoftPlatform().run(WORKLOAD)
    verdict = decide.renew(
        None,
        machine.attester.evidence(BINDING.report_data()),
        BINDING,
        nonce_issued=NOW,
        known=None,
        holdings=HOLDINGS,
        trusted=decide.Trusted(SOFT_ROOTS, machine.endorsements, frozenset({MEASUREMENT})),
        lease=timedelta(minutes=10),
        now=NOW,
    )
    assert isinstance(verdict, decide.Refusal)
    assert verdict.error.code == "lease-refused"


def test_lease_of_before_a_restart_compares_what_it_knows() -> None:
    machine = SoftPlatform().run(WORKLOAD)
    ask = wire.RenewAsk("l-" + "0" * 32)
    binding = replace(BINDING, purpose="renew", request=ask.hashed())
    held = decide.LeaseFacts(
        CONTRACT.id,
        "train",
        ("xrays",),
        (),
        wire.sha256(PAIR.public),
        TRAINER,
        "offline",
        "L1",
        NOW + timedelta(seconds=1),
    )

    def renewed(facts: decide.LeaseFacts) -> Any:
        return decide.renew(
            facts,
            machine.attester.evidence(binding.report_data()),
            binding,
            nonce_issued=NOW,
            known=KNOWN,
            holdings=HOLDINGS,
            trusted=decide.Trusted(SOFT_ROOTS, machine.endorsements, frozenset({MEASUREMENT})),
            lease=timedelta(minutes=10),
            now=NOW,
        )

    assert isinstance(renewed(held), decide.Grant)
    for field, value in (
        ("profile", b"\x01" * 32),
        ("code", "sha256:" + "00" * 32),
        ("expires", NOW),
        ("key_hash", bytes(32)),
    ):
        verdict = renewed(replace(held, **{field: value}))  # type: ignore[arg-type]
        name = "key" if field == "key_hash" else field
        assert [reason.where for reason in verdict.error.reasons] == [f"lease.{name}"]


def test_answers_at_the_edge_of_the_budget() -> None:
    contract = replace(KNOWN, contract=parse(WORLD.contract(), name="t"))
    held = decide.LeaseFacts(
        CONTRACT.id, "serve", ("detector",), (), bytes(32), CONTRACT.code["server"].digest, "one-shot", "L2",
        NOW + timedelta(minutes=1), bytes(32), soft_claims(),
    )  # fmt: skip
    clinic = WORLD.clinic.key.fingerprint
    assert decide.answer(held, contract, clinic, used=4, used_today=3, now=NOW) == ("clinic", None)
    for used, today, where in ((5, 0, "budget"), (0, 4, "per_day")):
        party, error = decide.answer(held, contract, clinic, used=used, used_today=today, now=NOW)
        assert party == "clinic"
        assert error is not None
        assert error.code == "budget-spent"
        assert [reason.where for reason in error.reasons] == [f"phase.serve.answer.{where}"]
    _, stranger = decide.answer(held, contract, WORLD.vendor.key.fingerprint, used=0, used_today=0, now=NOW)
    assert stranger is not None
    assert stranger.code == "denied"


def test_the_life_of_a_contract_is_its_table() -> None:
    for state in State:
        for event in Event:
            if (state, event) in NEXT:
                assert after(state, event) is NEXT[state, event]
            else:
                with pytest.raises(ValueError, match="cannot be"):
                    after(state, event)
    day = NOW.date()
    assert on(State.ACTIVE, expires=day, today=day) is State.ACTIVE
    assert on(State.ACTIVE, expires=day, today=day + timedelta(days=1)) is State.EXPIRED
    assert on(State.REVOKED, expires=day, today=day + timedelta(days=1)) is State.REVOKED


# --- sessions ---------------------------------------------------------------------------------------------------------

SERVICE = b"\x05" * 32


def authorisation(**changed: Any) -> tuple[wire.Authorisation, Ed25519PrivateKey]:
    key = Ed25519PrivateKey.generate()
    fields: dict[str, Any] = {
        "service": SERVICE,
        "contract": CONTRACT.id,
        "session": key.public_key().public_bytes_raw(),
        "expires": NOW + timedelta(hours=1),
    }
    statement = wire.SessionStatement(**(fields | changed))
    return wire.Authorisation(statement, WORLD.clinic.sign(statement.encode(), namespace="ask@cloister")), key


def test_session_names_its_consumer() -> None:
    given, key = authorisation()
    query = b"\x06" * 32
    signature = key.sign(wire.query_message(contract=CONTRACT.id, service=SERVICE, query=query))
    asker = session.check(given, contract=CONTRACT.id, service=SERVICE, now=NOW, query=query, query_signature=signature)
    assert asker.fingerprint == WORLD.clinic.key.fingerprint
    with pytest.raises(InputError) as refused_:
        session.check(
            given, contract=CONTRACT.id, service=SERVICE, now=NOW, query=b"\x07" * 32, query_signature=signature
        )
    assert [reason.where for reason in refused_.value.reasons] == ["session.query"]


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"service": b"\x06" * 32}, "session.service"),
        ({"contract": "sha256:" + "00" * 32}, "session.contract"),
        ({"expires": NOW}, "session.expires"),
        ({"expires": NOW + timedelta(hours=1, microseconds=1)}, "session.expires"),
    ],
)
def test_session_for_something_else(changed: dict[str, Any], where: str) -> None:
    given, _ = authorisation(**changed)
    with pytest.raises(InputError) as refused_:
        session.check(given, contract=CONTRACT.id, service=SERVICE, now=NOW)
    assert [reason.where for reason in refused_.value.reasons] == [where]


def test_session_with_another_signature_reports_everything() -> None:
    given, _ = authorisation(service=b"\x06" * 32, expires=NOW)
    other, _ = authorisation()
    with pytest.raises(InputError) as refused_:
        session.check(
            replace(given, signature=other.signature), contract=CONTRACT.id, service=SERVICE, now=NOW, query=bytes(32)
        )
    wheres = [reason.where for reason in refused_.value.reasons]
    assert wheres[:2] == ["session.service", "session.expires"]
    assert wheres[-1] == "session.query"
    assert len(wheres) == 4
    with pytest.raises(ValueError, match="time zone"):
        session.check(given, contract=CONTRACT.id, service=SERVICE, now=NOW.astimezone(UTC).replace(tzinfo=None))


@pytest.mark.parametrize(
    ("sandbox", "level", "tee", "where"),
    [
        ("offline", "L1", "tdx", None),
        ("one-shot", "L1", "tdx", "workload.level"),
        ("one-shot", "L2", "tdx", None),
        ("sealed", "L2", "tdx", "workload.level"),
        ("sealed", "L3", "tdx", None),
        ("sealed", "L2", "soft-tdx", None),
        ("sealed", "L1", "soft-tdx", "workload.level"),
        ("made-up", "L3", "tdx", "workload.sandbox"),
        ("none", "L1", "tdx", None),
    ],
)
def test_a_sandbox_needs_its_level(sandbox: str, level: str, tee: str, where: str | None) -> None:
    known = sandbox in ("offline", "one-shot", "sealed")
    workload = Workload(TRAINER, sandbox, profile(sandbox).digest() if known else bytes(32), level)
    found = [reason.where for reason in decide.confinement(workload, replace(soft_claims(), tee=tee))]
    assert found == ([] if where is None else [where])


@pytest.mark.parametrize("weaker", [profile("offline", loopback=True), profile("offline", limits=Limits(wall_s=9))])
def test_a_weaker_jail_under_the_same_name_is_refused(weaker: Any) -> None:
    workload = Workload(TRAINER, "offline", weaker.digest(), "L2")
    (reason,) = decide.confinement(workload, soft_claims())
    assert (reason.where, reason.wanted) == ("workload.profile", profile("offline").digest().hex())
