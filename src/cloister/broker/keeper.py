"""What the broker does, one method per message: take it apart, judge it (decide.py), enter it in the ledger, answer.

The order within a method is always the same, and it is what makes a refusal harmless and an answer durable:

  1 look up    what the ledger knows (contracts, keys, roots, leases)
  2 judge      pure functions; a refusal becomes a log entry with an id before it is sent
  3 prepare    seal the answer to its receiver
  4 enter      the ledger re-checks what may have changed meanwhile, writes, and waits for the disk
  5 send       only now

Edge: it has the clock and draws randomness. It runs on one event loop; the ledger has its own thread, so the loop
never waits for a disk. Everything that must survive a restart is in the ledger; nonces, evidence of leases and the
answers of the last minutes are not, and what that means is in docs/broker.md.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Final, NoReturn, TypedDict

import cloister
from cloister.attestation import evidence as evidence_format
from cloister.attestation.appraise import identities
from cloister.attestation.binding import Binding
from cloister.attestation.edge.attester import Attester, attest
from cloister.attestation.types import Claims, Evidence
from cloister.broker import decide, relay, session, wire
from cloister.broker.life import State as Life
from cloister.broker.life import on as state_on
from cloister.broker.log import leaf as leaves
from cloister.broker.log.fold import ContractRow
from cloister.broker.store.ledger import LeaseSecrets, Ledger, PendingOutput
from cloister.contract import change, sshsig
from cloister.contract.model import Contract
from cloister.contract.parse import parse
from cloister.crypto import hpke
from cloister.crypto.canonical import cbor_encode
from cloister.crypto.keys import Secret, derive, digest, mac, mac_equal
from cloister.errors import CloisterError, DeniedError, EvidenceError, InputError, PeerError, Reason

MAX_NONCES: Final = 100_000
"""Nonces that wait; at 1,000 releases a second and 60 s of life there are 60,000. The oldest goes first."""
MAX_ANSWERS: Final = 10_000
"""Answers per lease that can be asked for again without being spent again."""
MAX_ENTRIES: Final = 1024
MAX_ENTRIES_BYTES: Final = 8 << 20
"""Log entries in one answer; clients ask for the rest."""
MAX_UNSIGNED: Final = 1000
"""Contracts that nobody signed: more are refused, so that strangers cannot fill the disk with them."""
MAX_PARTIES: Final = 128
"""Parties of one contract: those of two versions together sign, and a log entry names at most 256 signers."""
MAX_LISTED: Final = 10_000
"""Contracts in one list: the newest; others are found by id or name."""


@dataclass(slots=True)
class _Held:
    """A lease in memory: what it is, its secret, the answers of the last minutes by query digest."""

    facts: decide.LeaseFacts
    secrets: LeaseSecrets
    answers: OrderedDict[bytes, tuple[bytes, asyncio.Future[wire.AnswerReply]]] = field(default_factory=OrderedDict)


class Nonces:
    """Nonces that were issued and not used: `take` removes, so each is good once."""

    def __init__(self, most: int = MAX_NONCES) -> None:
        self._most = most
        self._issued: OrderedDict[bytes, datetime] = OrderedDict()

    def issue(self, now: datetime) -> bytes:
        while self._issued and (
            len(self._issued) >= self._most or now - next(iter(self._issued.values())) > decide.NONCE_LIFE
        ):
            self._issued.popitem(last=False)
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        self._issued[nonce] = now
        return nonce

    def take(self, nonce: bytes) -> datetime | None:
        """Return when `nonce` was issued, once; None for any other."""
        return self._issued.pop(nonce, None)


class Keeper:
    """The broker behind its network service. All methods run on one event loop.

    Args:
        ledger: the open state.
        keypair: HPKE key that owners deposit to.
        outputs: secret from which keys of outputs are derived.
        spki: SHA-256 of the TLS key that the service shows.
        config: what was measured as `cloister/config/1`.
        attester: this broker's TEE.
        trusted: what it accepts of nodes at a given time.
        clock: the time, with a time zone.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        keypair: hpke.KeyPair,
        outputs: Secret,
        spki: bytes,
        config: wire.BrokerConfig,
        attester: Attester,
        trusted: Callable[[datetime], decide.Trusted],
        clock: Callable[[], datetime],
    ) -> None:
        self._ledger, self._keypair, self._outputs, self._spki = ledger, keypair, outputs, spki
        self._config, self._attester, self._trusted, self._clock = config, attester, trusted, clock
        self._lease_life = timedelta(seconds=config.lease_s)
        self._nonces = Nonces()
        self._contracts: dict[str, Contract] = {}
        self._signed: dict[str, frozenset[str]] = {}
        for row in ledger.contracts():
            self._contracts[row.contract] = parse(ledger.contract_text(row.contract), name=row.name)
            self._signed[row.contract] = frozenset(ledger.signatures(row.contract))
        self._deposits: dict[str, dict[str, decide.Deposit]] = {}
        for key in ledger.deposited_keys():
            self._note_deposit(key.volume, decide.Deposit(key.owner, key.generation, key.volume_id))
        self._held: dict[str, _Held] = {}
        self._words = relay.Shelves()

    # --- the broker itself --------------------------------------------------------------------------------------------

    async def attest(self, request: wire.AttestRequest) -> wire.AttestReply:
        """Prove to a client what runs here and which keys are its."""
        binding = Binding("broker", request.nonce, self._keypair.public, self._spki, request=request.hashed())
        # hardware takes milliseconds to seconds for a quote
        evidence = await asyncio.to_thread(attest, self._attester, binding)
        now = self._clock()
        return wire.AttestReply(evidence_format.encode(evidence), self._keypair.public, now, self._nonces.issue(now))

    def nonce(self) -> wire.NonceReply:
        return wire.NonceReply(self._nonces.issue(self._clock()), decide.NONCE_LIFE.seconds)

    def status(self) -> wire.StatusReply:
        now = self._clock()
        return wire.StatusReply(
            version=cloister.__version__,
            origin=self._ledger.origin,
            time=now,
            epoch=self._ledger.epoch,
            entries=self._ledger.size,
            contracts=sum(row.state == Life.ACTIVE for row in self._ledger.contracts()),
            leases=sum(not row.lost and row.expires > now for row in self._ledger.leases()),
            soft=self._attester.name.startswith("soft"),
        )

    # --- contracts ----------------------------------------------------------------------------------------------------

    async def submit(self, request: wire.ContractSubmit) -> wire.ContractStatus:
        """Take a contract file. The same bytes again are fine; a name that is taken, or a version that does not follow
        the active one, is refused."""
        contract_id = digest(request.toml)
        if contract_id not in self._contracts:
            contract = parse(request.toml, name=request.name)
            self._check_place(contract, self._too_many(contract))
            await self._ledger.submit_contract(
                request.toml,
                name=contract.name,
                version=contract.version,
                replaces=contract.replaces or "",
                now=self._clock(),
            )
            self._contracts[contract_id] = contract
            self._signed.setdefault(contract_id, frozenset())
        return self._status_of(contract_id)

    async def sign(self, request: wire.SignatureSubmit) -> wire.ContractStatus:
        """Add a party's signature; the contract becomes active with the last one."""
        contract = self._contract(request.contract)
        data = self._ledger.contract_text(contract.id)
        fingerprint = sshsig.verify(request.signature, data, namespace=sshsig.CONTRACT).fingerprint
        if fingerprint not in contract.party.values() and fingerprint not in self._consenters(contract):
            raise InputError(
                "the signature is by nobody of this contract",
                code="signature-invalid",
                reasons=(
                    Reason(
                        "signature.party",
                        fingerprint,
                        " or ".join(f"{name} {key}" for name, key in contract.party.items()),
                        "sign with the key that the contract names",
                    ),
                ),
            )
        await self._ledger.add_signature(contract.id, fingerprint, request.signature, now=self._clock())
        self._signed[contract.id] |= {fingerprint}
        await self._settle(contract)
        return self._status_of(contract.id)

    async def revoke(self, request: wire.RevokeRequest) -> wire.Receipted:
        """End a contract for one of its required signers; its leases are not renewed any more."""
        contract = self._contract(request.statement.contract)
        key = sshsig.verify(request.signature, request.statement.encode(), namespace=sshsig.CONTRACT)
        if key.fingerprint not in {contract.party[name] for name in contract.signers}:
            raise InputError(
                "only a required signer can revoke a contract",
                code="signature-invalid",
                reasons=(Reason("revoke.party", key.fingerprint, " or ".join(sorted(contract.signers))),),
            )
        done = await self._ledger.revoke_contract(contract.id, key.fingerprint, request.signature, now=self._clock())
        return wire.Receipted(done.receipt.encode())

    def contract(self, reference: str) -> wire.ContractStatus:
        """Return where a contract stands, by id, or by name: the active one, else the newest of that name."""
        if reference.startswith("sha256:"):
            return self._status_of(self._contract(reference).id)
        rows = [row for row in self._ledger.contracts() if row.name == reference]
        if not rows:
            raise _no_contract(reference)
        return self._status_of(max(rows, key=lambda row: (row.state == Life.ACTIVE, row.entry)).contract)

    def contracts(self) -> wire.ContractList:
        newest = self._ledger.contracts()[-MAX_LISTED:]
        return wire.ContractList(tuple(self._status_of(row.contract) for row in newest))

    def contract_bytes(self, contract_id: str) -> bytes:
        return self._ledger.contract_text(self._contract(contract_id).id)

    def _contract(self, contract_id: str) -> Contract:
        contract = self._contracts.get(contract_id)
        if contract is None:
            raise _no_contract(contract_id)
        return contract

    def _too_many(self, contract: Contract) -> list[Reason]:
        """Return why no new contract like this is taken: it has too many parties, or too many wait for a signature."""
        reasons = []
        if len(contract.party) > MAX_PARTIES:
            reasons.append(Reason("party", f"{len(contract.party)} parties", f"at most {MAX_PARTIES}"))
        rows = self._ledger.contracts()
        unsigned = sum(row.state == Life.WAITING and not self._signed.get(row.contract) for row in rows)
        if unsigned >= MAX_UNSIGNED:
            reasons.append(Reason("contract", f"{unsigned} contracts that nobody signed", f"fewer than {MAX_UNSIGNED}"))
        return reasons

    def _check_place(self, contract: Contract, more: Sequence[Reason] = ()) -> None:
        """Refuse a contract that can never become active here: its name is another lineage's, or it follows nothing."""
        rows = self._ledger.contracts()
        reasons: list[Reason] = []
        if contract.replaces is None:
            taken = next((row for row in rows if row.name == contract.name and row.state != Life.WAITING), None)
            if taken is not None:
                hint = "write the next version with `replaces`, or take another name"
                reasons.append(
                    Reason("contract", f"{contract.name}, {taken.state} as {taken.contract}", "a new name", hint)
                )
        else:
            reasons += self._follows(contract)
        reasons += more
        if reasons:
            raise InputError("this broker does not take the contract", code="contract-invalid", reasons=reasons)

    def _follows(self, contract: Contract) -> list[Reason]:
        row = self._ledger.contract(contract.replaces or "")
        if row is None or row.state != Life.ACTIVE or row.name != contract.name:
            found = "an unknown contract" if row is None else f"{row.name}, {row.state}"
            return [Reason("replaces", f"{contract.replaces} ({found})", f"the active version of {contract.name}")]
        reasons = []
        if contract.version != row.version + 1:
            reasons.append(Reason("version", str(contract.version), str(row.version + 1)))
        old = self._contracts[row.contract]
        for asset, data in contract.data.items():
            before = old.data.get(asset)
            written = self._ledger.asset_root(contract.name, asset)
            if written is not None and before is not None and before.digest != data.digest:
                hint = "a phase has written newer versions of it: give other data another name"
                reasons.append(Reason(f"data.{asset}.digest", data.digest, before.digest, hint))
        for asset in contract.outputs:
            # its owner may have left with the version that dropped it: nobody who can speak for it signs this one
            if asset not in old.outputs and self._ledger.asset_root(contract.name, asset) is not None:
                found, hint = "a volume that a version before the last one wrote", "give the new output another name"
                reasons.append(Reason(f"phase.write.{asset}", found, "an output without a past", hint))
        return reasons

    def _consenters(self, contract: Contract) -> frozenset[str]:
        """Return the fingerprints that have a say in replacing the version before."""
        before = self._contracts.get(contract.replaces or "")
        return frozenset() if before is None else frozenset(before.party.values())

    def _names(self, contract: Contract) -> frozenset[str]:
        signed = self._signed[contract.id]
        return frozenset(name for name, key in contract.party.items() if key in signed)

    def _unsigned(self, contract: Contract) -> tuple[str, ...]:
        """Return whose signatures are missing: required signers, also those of the version before (nobody's agreement
        ends without his signature)."""
        signed = self._signed[contract.id]
        missing = {contract.party[name]: name for name in sorted(contract.signers)}
        before = self._contracts.get(contract.replaces or "")
        if before is not None:
            for name in sorted(before.signers):
                missing.setdefault(before.party[name], f"{name} (of version {before.version})")
        return tuple(name for fingerprint, name in missing.items() if fingerprint not in signed)

    async def _complete(self, contract: Contract, row: ContractRow) -> bool:
        """Return whether the contract can become active: nobody is missing, and whoever the `change` of the version before
        names agrees, after a board's wait."""
        if self._unsigned(contract):
            return False
        before = self._contracts.get(contract.replaces or "")
        if before is None:
            return True
        # a no cannot be sent, so silence is one: a member with a veto has to sign
        votes = {name: key in self._signed[contract.id] for name, key in before.party.items()}
        proposed = (await asyncio.to_thread(self._ledger.leaf, row.entry)).time
        return change.replacement(before, contract, votes, now=self._clock(), proposed_at=proposed).allowed

    async def _settle(self, contract: Contract) -> None:
        """Make the contract active if nothing is missing any more."""
        row = self._ledger.contract(contract.id)
        if row is None or row.state != Life.WAITING or not await self._complete(contract, row):
            return
        self._check_place(contract)  # another contract of this name may have become active meanwhile
        signers = sorted(self._signed[contract.id])
        await self._ledger.activate_contract(contract.id, signers, now=self._clock())

    def _status_of(self, contract_id: str) -> wire.ContractStatus:
        contract = self._contracts[contract_id]
        row = self._ledger.contract(contract_id)
        if row is None:
            raise _no_contract(contract_id)
        today = self._clock().astimezone(UTC).date()
        state = state_on(Life(row.state), expires=contract.expires, today=today)
        waiting = self._unsigned(contract) if state in (Life.WAITING, Life.ACTIVE) else ()
        if state is Life.WAITING and not waiting:
            waiting = ("whoever agrees to changes of the version before",)
        return wire.ContractStatus(
            contract=contract.id,
            name=contract.name,
            version=contract.version,
            replaces=contract.replaces,
            expires=contract.expires.isoformat(),
            state=state,
            required=tuple(sorted(contract.signers)),
            signed=tuple(sorted(self._names(contract))),
            waiting=waiting,
        )

    # --- keys of owners -----------------------------------------------------------------------------------------------

    async def deposit(self, request: wire.KeyDeposit) -> wire.Receipted:
        """Keep the key of a volume for whoever signed: the fingerprint of the signature is the owner."""
        statement = request.statement
        owner = sshsig.verify(request.signature, statement.encode(), namespace=sshsig.KEY).fingerprint
        reasons = []
        if statement.broker != wire.sha256(self._keypair.public):
            reasons.append(Reason("key.broker", "another broker's key", "this broker's", "attest it again, then seal"))
        if statement.sealed != wire.sha256(request.sealed):
            reasons.append(Reason("key.sealed", "other bytes than the owner signed", "the signed ones"))
        if not reasons:
            try:
                info = wire.key_info(statement.digest, statement.volume_id)
                key = Secret(self._keypair.open(request.sealed, info=info))
            except hpke.OpenError:
                reasons.append(Reason("key.sealed", "bytes that do not open", "a key sealed to this broker"))
        if reasons:
            raise InputError("the key cannot be deposited", code="signature-invalid", reasons=reasons)
        done = await self._ledger.deposit_key(
            statement.digest,
            owner,
            key,
            volume_id=statement.volume_id,
            generation=statement.generation,
            now=self._clock(),
        )
        self._note_deposit(statement.digest, decide.Deposit(owner, statement.generation, statement.volume_id))
        return wire.Receipted(done.receipt.encode())

    def _note_deposit(self, volume: str, deposit: decide.Deposit) -> None:
        self._deposits.setdefault(volume, {})[deposit.owner] = deposit

    async def open(self, request: wire.OpenRequest) -> wire.OpenReply:
        """Give an owner the key of what is his, sealed to the key that he signed for."""
        statement = request.statement
        now = self._clock()
        signers = [
            sshsig.verify(signature, statement.encode(), namespace=sshsig.OPEN).fingerprint
            for signature in request.signatures
        ]
        known = self._known(statement.contract)
        assets = (statement.asset,)
        got = decide.opened(
            statement,
            signers,
            broker=self._keypair.public,
            key=request.key,
            known=known,
            holdings=self._holdings(known, assets),
            now=now,
        )
        if isinstance(got, CloisterError):
            await self._refuse("open", got, contract=statement.contract, assets=assets, key=request.key)
        key, owner = self._key_of(known, got)
        sealed = _seal(key.encode(), to=request.key, info=wire.OPEN_INFO + statement.encode())
        done = await self._ledger.open_key(
            leaves.KeyOpened(
                time=now,
                volume=got.digest,
                owner=owner,
                parties=tuple(dict.fromkeys(signers)),
                asset=statement.asset,
                contract=statement.contract,
                hpke_key=digest(request.key),
            )
        )
        return wire.OpenReply(sealed, done.receipt.encode())

    # --- nodes --------------------------------------------------------------------------------------------------------

    async def release(self, request: wire.ReleaseRequest) -> wire.ReleaseReply:
        """Judge a node's evidence and give it the keys that the contract allows, sealed to its attested key."""
        ask = request.ask
        now = self._clock()
        issued = self._nonces.take(request.nonce)
        binding = Binding("release", request.nonce, request.key, self._spki, ask.contract, ask.phase, ask.hashed())
        evidence = self._evidence(request.evidence)
        known = self._known(ask.contract)
        if known is not None and known.state is Life.WAITING:
            await self._settle(known.contract)  # a board's wait may be over
            known = self._known(ask.contract)
        holdings = self._holdings(known, (*ask.reads, *ask.writes))
        verdict: decide.Grant | decide.Refusal
        if isinstance(evidence, EvidenceError):
            verdict = decide.Refusal(evidence)
        else:
            verdict = decide.release(
                ask,
                evidence,
                binding,
                nonce_issued=issued,
                known=known,
                holdings=holdings,
                trusted=self._trusted(now),
                lease=self._lease_life,
                now=now,
            )
        return wire.ReleaseReply(
            *await self._give(
                ask,
                verdict,
                known,
                now,
                key=request.key,
                evidence=digest(request.evidence),
                seal=lambda payload: _seal(payload.encode(), to=request.key, info=wire.RELEASE_INFO + binding.encode()),
            )
        )

    async def release_to(
        self,
        ask: wire.ReleaseAsk,
        claims: Claims,
        *,
        stale: tuple[Reason, ...],
        bound: Sequence[Reason],
        key: bytes,
        evidence: str,
        seal: Callable[[wire.ReleasePayload], bytes],
    ) -> tuple[bytes, bytes]:
        """Release to `claims` that another door (kbs/) verified in its own protocol; return the answer and the receipt.

        `stale` and `bound` are why its steps 1 and 3 do not hold; every other step is that of `release`, also the log entry.
        `key` is what `seal` seals to, `evidence` the digest of what was verified.
        """
        now = self._clock()
        known = self._known(ask.contract)
        if known is not None and known.state is Life.WAITING:
            await self._settle(known.contract)  # a board's wait may be over
            known = self._known(ask.contract)
        verdict = decide.release_to(
            ask,
            claims,
            bound,
            stale=stale,
            known=known,
            holdings=self._holdings(known, (*ask.reads, *ask.writes)),
            trusted=self._trusted(now),
            lease=self._lease_life,
            now=now,
        )
        return await self._give(ask, verdict, known, now, key=key, evidence=evidence, seal=seal)

    async def refuse_evidence(self, error: EvidenceError, *, key: bytes, evidence: str, tee: str = "") -> NoReturn:
        """Log evidence that another door refused before it was asked for anything; raises `error` with the denial's id."""
        await self._refuse("release", error, key=key, evidence=evidence, tee=tee)

    async def _give(
        self,
        ask: wire.ReleaseAsk,
        verdict: decide.Grant | decide.Refusal,
        known: decide.Known | None,
        now: datetime,
        *,
        key: bytes,
        evidence: str,
        seal: Callable[[wire.ReleasePayload], bytes],
    ) -> tuple[bytes, bytes]:
        """Steps 3 to 5 of a release: seal the keys, enter the lease, return the sealed answer and the receipt."""
        assets = (*ask.reads, *ask.writes)
        if isinstance(verdict, decide.Refusal):
            await self._refuse_node("release", verdict, ask.contract, ask.phase, assets, key, evidence)
        if known is None:
            raise RuntimeError("a grant without a contract")

        keys = {read.asset: self._key_of(known, read)[0] for read in verdict.reads}
        outputs = {write.asset: self._output_key(known.contract, write) for write in verdict.writes}
        lease = wire.Lease(f"l-{secrets.token_hex(16)}", Secret.random(), verdict.expires, verdict.renew_after)
        sealed = seal(wire.ReleasePayload(keys, outputs, lease))
        kept = LeaseSecrets(
            lease.secret,
            tuple(
                PendingOutput(asset, output.owner, output.volume_id, output.generation, output.key)
                for asset, output in outputs.items()
            ),
        )
        workload = verdict.workload
        entry = leaves.Release(
            time=now,
            lease=lease.id,
            contract=ask.contract,
            phase=ask.phase,
            reads=tuple(leaves.AssetRef(asset=read.asset, volume=read.digest) for read in verdict.reads),
            writes=tuple(outputs),
            code=workload.code,
            sandbox=workload.sandbox,
            level=workload.level,
            evidence=evidence,
            **_who(verdict.claims),
            hpke_key=digest(key),
            request="sha256:" + ask.hashed().hex(),
            expires=verdict.expires,
        )
        try:
            done = await self._ledger.release(entry, kept)
        except DeniedError as error:
            refusal = decide.Refusal(error, verdict.claims, workload)
            await self._refuse_node("release", refusal, ask.contract, ask.phase, assets, key, evidence)
        facts = decide.LeaseFacts(
            contract=ask.contract,
            phase=ask.phase,
            reads=ask.reads,
            writes=ask.writes,
            key_hash=wire.sha256(key),
            code=workload.code,
            sandbox=workload.sandbox,
            level=workload.level,
            expires=verdict.expires,
            profile=workload.profile,
            claims=verdict.claims,
        )
        self._held[lease.id] = _Held(facts, kept)
        self._forget(now)
        return sealed, done.receipt.encode()

    async def renew(self, request: wire.RenewRequest) -> wire.RenewReply:
        """Judge fresh evidence of a node that holds a lease and let it go on."""
        now = self._clock()
        issued = self._nonces.take(request.nonce)
        lease = request.ask.lease
        held = await self._lease(lease)
        facts = None if held is None else held.facts
        contract, phase = ("", "") if facts is None else (facts.contract, facts.phase)
        binding = Binding("renew", request.nonce, request.key, self._spki, contract, phase, request.ask.hashed())
        evidence = self._evidence(request.evidence)
        known = self._known(contract)
        verdict: decide.Grant | decide.Refusal
        if isinstance(evidence, EvidenceError):
            verdict = decide.Refusal(evidence)
        else:
            verdict = decide.renew(
                facts,
                evidence,
                binding,
                nonce_issued=issued,
                known=known,
                holdings=self._holdings(known, () if facts is None else (*facts.reads, *facts.writes)),
                trusted=self._trusted(now),
                lease=self._lease_life,
                now=now,
            )
        if isinstance(verdict, decide.Refusal):
            assets = () if facts is None else (*facts.reads, *facts.writes)
            await self._refuse_node("renew", verdict, contract, phase, assets, request.key, digest(request.evidence))
        if held is None:
            raise RuntimeError("a renewal without a lease")
        try:
            done = await self._ledger.renew_lease(
                lease, evidence=digest(request.evidence), expires=verdict.expires, now=now, **_who(verdict.claims)
            )
        except DeniedError as error:
            refusal = decide.Refusal(error, verdict.claims, verdict.workload)
            assets = (*held.facts.reads, *held.facts.writes)
            await self._refuse_node("renew", refusal, contract, phase, assets, request.key, digest(request.evidence))
        held.facts = replace(
            held.facts, expires=verdict.expires, profile=verdict.workload.profile, claims=verdict.claims
        )
        return wire.RenewReply(verdict.expires, verdict.renew_after, done.receipt.encode())

    async def register(self, request: wire.RegisterRequest) -> wire.Receipted:
        """Make what a node wrote the current version of its asset: exactly one generation after the one before."""
        statement = request.statement
        now = self._clock()
        held = await self._lease(statement.lease)
        if held is None or not _authentic(held, wire.REGISTER_LABEL, statement, request.mac):
            await self._refuse("register", decide.lease_unknown(), assets=(statement.asset,))
        facts = held.facts
        known = self._known(facts.contract)
        refused = decide.live_lease(facts, known, now)
        output = next((item for item in held.secrets.outputs if item.asset == statement.asset), None)
        if refused is None and (known is None or output is None):
            wanted = ", ".join(facts.writes) or "nothing"
            reason = Reason("register.asset", repr(statement.asset), wanted)
            refused = DeniedError("this lease does not write that asset", reasons=(reason,))
        if refused is None and known is not None and output is not None:
            refused = self._generation(known.contract, statement, output)
        if refused is not None:
            await self._refuse(
                "register", refused, contract=facts.contract, phase=facts.phase, assets=(statement.asset,)
            )
        try:
            done = await self._ledger.register_root(
                statement.lease, statement.asset, statement.digest, generation=statement.generation, now=now
            )
        except DeniedError as error:
            await self._refuse("register", error, contract=facts.contract, phase=facts.phase, assets=(statement.asset,))
        return wire.Receipted(done.receipt.encode())

    def _generation(
        self, contract: Contract, statement: wire.RegisterStatement, output: PendingOutput
    ) -> DeniedError | None:
        root = self._ledger.asset_root(contract.name, statement.asset)
        if root is not None and root.lease == statement.lease and root.volume == statement.digest:
            return None  # the same registration again: the ledger gives the first receipt again
        wanted = output.generation if root is None else root.generation + 1
        if statement.generation == wanted:
            return None
        found = f"generation {statement.generation}"
        reason = Reason("register.generation", found, f"{wanted}, one after the current version", "release again")
        return DeniedError(f"another version of {statement.asset!r} is current", reasons=(reason,))

    async def answer(self, request: wire.AnswerRequest) -> wire.AnswerReply:
        """Count one answer of a query service against its consumer's budget. The same query again is not counted."""
        statement = request.statement
        held = await self._lease(statement.lease)
        if held is None or not _authentic(held, wire.ANSWER_LABEL, statement, request.mac):
            await self._refuse("answer", decide.lease_unknown())
        before = held.answers.get(statement.query)
        if before is not None:
            given, reply = before
            if given == statement.answer:
                return await asyncio.shield(reply)
            reason = Reason("answer.query", "a query that was answered otherwise", "a new query")
            error = DeniedError("this query was answered already", reasons=(reason,))
            await self._refuse("answer", error, contract=held.facts.contract, phase=held.facts.phase)
        future: asyncio.Future[wire.AnswerReply] = asyncio.get_running_loop().create_future()
        held.answers[statement.query] = (statement.answer, future)
        while len(held.answers) > MAX_ANSWERS:
            held.answers.popitem(last=False)
        try:
            reply_now = await self._answer(statement, held)
        except CloisterError as error:
            held.answers.pop(statement.query, None)
            future.set_exception(error)
            future.exception()  # somebody may wait for it, or nobody: it is no lost error
            raise
        except BaseException:
            held.answers.pop(statement.query, None)
            future.cancel()
            raise
        future.set_result(reply_now)
        return reply_now

    async def _answer(self, statement: wire.AnswerStatement, held: _Held) -> wire.AnswerReply:
        now = self._clock()
        facts = held.facts
        known = self._known(facts.contract)
        refused = decide.live_lease(facts, known, now)
        fingerprint = ""
        try:
            fingerprint = session.check(
                statement.authorisation,
                contract=facts.contract,
                service=facts.key_hash,
                now=now,
                query=statement.query,
                query_signature=statement.query_signature,
            ).fingerprint
        except InputError as error:
            refused = refused or error
        if refused is None and known is not None:
            used = self._ledger.answers_spent(facts.contract, facts.phase, fingerprint, now=now)
            _, refused = decide.answer(facts, known, fingerprint, used=used.used, used_today=used.used_today, now=now)
        if refused is not None or known is None:
            no = refused or decide.lease_unknown()
            await self._refuse("answer", no, contract=facts.contract, phase=facts.phase)
        rule = known.contract.phase[facts.phase].answer
        budget, per_day = (None, None) if rule is None else (rule.budget, rule.per_day)
        denial = _denial_id()
        try:
            done = await self._ledger.answer(
                contract=facts.contract,
                phase=facts.phase,
                party=fingerprint,
                budget=budget,
                per_day=per_day,
                now=now,
                denial=denial,
                lease=statement.lease,
                query="sha256:" + statement.query.hex(),
                answer="sha256:" + statement.answer.hex(),
            )
        except DeniedError as error:
            if not error.denial_id:  # the ledger logs a spent budget itself
                await self._refuse("answer", error, contract=facts.contract, phase=facts.phase)
            raise _told(error, error.denial_id) from error
        left = None if budget is None else budget - done.spent.used
        left_today = None if per_day is None else per_day - done.spent.used_today
        return wire.AnswerReply(done.receipt.encode(), left, left_today)

    # --- words while a phase runs: no log entries, see relay.py -------------------------------------------------------

    async def words(self, request: wire.WordsRequest) -> wire.WordsReply:
        """Keep a batch of metrics or logs for the parties that the contract lets hear them."""
        statement = request.statement
        now = self._clock()
        held = await self._lease(statement.lease)
        if held is None or not _authentic(held, wire.WORDS_LABEL, statement, request.mac):
            raise decide.lease_unknown()
        before = self._words.flow(statement.lease)
        known = self._known(held.facts.contract)
        flow = relay.accept(statement, held.facts, known, before, spki=self._spki, now=now)
        if isinstance(flow, CloisterError):
            raise flow
        if flow is not before:  # else: the last batch again, whose answer was lost
            self._words.heard(statement.lease, held.facts, flow, now=now)
            batch = relay.unseal(held.secrets.secret, statement)
            self._words.keep(statement.lease, statement.stream, batch, now=now)
        return wire.WordsReply(statement.seq)

    async def listen(self, request: wire.ListenRequest) -> wire.ListenReply:
        """Give a party the words that came after its cursor, sealed to the key that it signed for."""
        statement = request.statement
        now = self._clock()
        signer = sshsig.verify(request.signature, statement.encode(), namespace=sshsig.LISTEN).fingerprint
        known = self._known(statement.contract)
        allowed = relay.listen(statement, signer, broker=self._keypair.public, key=request.key, known=known, now=now)
        if isinstance(allowed, DeniedError):
            raise allowed
        epoch = self._ledger.epoch
        heard = self._words.since(statement.contract, allowed, request.after if request.epoch == epoch else 0)
        payload = wire.ListenPayload(
            epoch=epoch,
            next=heard.next,
            more=heard.more,
            leases=tuple(
                wire.WordsLease(
                    shelf.lease,
                    shelf.phase,
                    shelf.first,
                    shelf.last,
                    self._live(shelf, now),
                    shelf.dropped + shelf.unsent,
                )
                for shelf in self._words.of(statement.contract, allowed)[-256:]
            ),
            lines=tuple(wire.WordsLine(line.lease, line.stream, line.time, line.text) for line in heard.lines),
        )
        return wire.ListenReply(_seal(payload.encode(), to=request.key, info=wire.LISTEN_INFO + request.hashed()))

    def _live(self, shelf: relay.Shelf, now: datetime) -> bool:
        row = self._ledger.lease(shelf.lease)
        return not shelf.ended and row is not None and not row.lost and row.expires > now

    # --- the log ------------------------------------------------------------------------------------------------------

    async def denial(self, denial_id: str) -> wire.DenialRecord:
        found = await asyncio.to_thread(self._ledger.denial, denial_id)
        if found is None:
            raise InputError(
                f"no denial {denial_id}", reasons=(Reason("denial", denial_id, "an id that was given out"),)
            )
        index, entry = found
        reasons = tuple(wire.WireReason(r.where, r.found, r.wanted, r.hint) for r in entry.reasons)
        record = wire.DenialRecord(
            id=entry.id,
            time=entry.time,
            operation="answer",
            error="budget-spent",
            message="the budget of answers is used up",
            contract=entry.contract,
            phase=entry.phase,
            assets=(),
            code="",
            tee="",
            entry=index,
            reasons=reasons,
        )
        if isinstance(entry, leaves.AnswerRefused):
            return record
        return replace(
            record,
            operation=entry.operation,
            error=entry.error,
            message=entry.message,
            assets=entry.assets,
            code=entry.code,
            tee=entry.tee,
        )

    def checkpoint(self) -> bytes:
        return self._ledger.checkpoint()

    async def entries(self, start: int, end: int) -> wire.LogEntries:
        most = min(end, start + MAX_ENTRIES)
        bodies = await asyncio.to_thread(self._ledger.entries, start, most)
        kept: list[bytes] = []
        size = 0
        for body in bodies:
            size += len(body)
            if kept and size > MAX_ENTRIES_BYTES:
                break
            kept.append(body)
        return wire.LogEntries(start, tuple(kept))

    def inclusion(self, index: int, size: int) -> wire.LogProof:
        return self._proof(lambda: self._ledger.inclusion(index, size))

    def consistency(self, old: int, new: int) -> wire.LogProof:
        return self._proof(lambda: self._ledger.consistency(old, new))

    def _proof(self, make: Callable[[], Iterable[bytes]]) -> wire.LogProof:
        try:
            return wire.LogProof(tuple(make()))
        except ValueError as error:
            reason = Reason("log.size", str(error), f"within {self._ledger.size} entries")
            raise InputError("the log has no such entries", reasons=(reason,)) from error

    # --- inside -------------------------------------------------------------------------------------------------------

    def _known(self, contract_id: str) -> decide.Known | None:
        contract = self._contracts.get(contract_id)
        row = self._ledger.contract(contract_id)
        if contract is None or row is None:
            return None
        return decide.Known(contract, self._names(contract), Life(row.state))

    def _holdings(self, known: decide.Known | None, assets: Sequence[str]) -> decide.Holdings:
        if known is None:
            return decide.Holdings({}, {})
        contract = known.contract
        deposits: dict[str, tuple[decide.Deposit, ...]] = {}
        roots: dict[str, decide.Root] = {}
        for asset in assets:
            entry = contract.data.get(asset) or contract.code.get(asset)
            if entry is not None:
                deposits[entry.digest] = tuple(self._deposits.get(entry.digest, {}).values())
            root = self._ledger.asset_root(contract.name, asset)
            if root is not None:
                roots[asset] = decide.Root(root.volume, root.generation)
        return decide.Holdings(deposits, roots)

    def _key_of(self, known: decide.Known | None, read: decide.Read) -> tuple[wire.ReleasedKey, str]:
        """Return the key that `read` was granted, and the owner it is kept for."""
        owner = read.depositor
        if owner is None:
            root = None if known is None else self._ledger.asset_root(known.contract.name, read.asset)
            owner = "" if root is None else root.owner
        kept = self._ledger.deposited_key(read.digest, owner)
        if kept is None:
            raise DeniedError(
                f"the key of {read.asset!r} is not here any more",
                reasons=(Reason(f"key.{read.asset}", "no key", f"the key of {read.digest}"),),
            )
        return wire.ReleasedKey(kept.key, read.digest, read.generation, kept.volume_id), owner

    def _output_key(self, contract: Contract, write: decide.Write) -> wire.OutputKey:
        """Return the key of an output: the same for all its versions under one name and owner, for nobody to guess."""
        context = cbor_encode({"contract": contract.name, "asset": write.asset, "owner": write.owner})
        key = Secret(derive(self._outputs, "cloister/output/1", context=context))
        volume_id = derive(self._outputs, "cloister/output-volume/1", context=context, size=wire.VOLUME_ID_BYTES)
        return wire.OutputKey(key, volume_id, write.generation, write.previous, write.owner)

    async def _lease(self, lease: str) -> _Held | None:
        """Return a lease that this run of the broker gave, or one that an earlier run left."""
        held = self._held.get(lease)
        row = self._ledger.lease(lease)
        if row is None or row.lost:
            return None
        if held is not None:
            return held
        entry = await asyncio.to_thread(self._ledger.leaf, row.entry)
        if not isinstance(entry, leaves.Release):
            return None
        facts = decide.LeaseFacts(
            contract=row.contract,
            phase=row.phase,
            reads=tuple(ref.asset for ref in entry.reads),
            writes=row.writes,
            key_hash=bytes.fromhex(row.hpke_key.removeprefix("sha256:")),
            code=entry.code,
            sandbox=entry.sandbox,
            level=entry.level,
            expires=row.expires,
        )
        # two requests may have come here at once: the first one's object counts
        return self._held.setdefault(lease, _Held(facts, self._ledger.lease_secrets(lease)))

    def _forget(self, now: datetime) -> None:
        """Drop leases that ended, a few at a time; those that go on wait at the end for the next look."""
        for lease in list(islice(self._held, 8)):
            held = self._held.pop(lease)
            if held.facts.expires >= now:
                self._held[lease] = held

    @staticmethod
    def _evidence(data: bytes) -> Evidence | EvidenceError:
        try:
            return evidence_format.decode(data)
        except EvidenceError as error:
            return error

    async def _refuse_node(
        self,
        operation: str,
        refusal: decide.Refusal,
        contract: str,
        phase: str,
        assets: Sequence[str],
        key: bytes,
        evidence: str,
    ) -> NoReturn:
        await self._refuse(
            operation,
            refusal.error,
            contract=contract,
            phase=phase,
            assets=assets,
            key=key,
            evidence=evidence,
            code="" if refusal.workload is None else refusal.workload.code,
            claims=refusal.claims,
        )

    async def _refuse(
        self,
        operation: str,
        error: CloisterError,
        *,
        contract: str = "",
        phase: str = "",
        assets: Sequence[str] = (),
        key: bytes = b"",
        evidence: str = "",
        code: str = "",
        tee: str = "",
        claims: Claims | None = None,
    ) -> NoReturn:
        """Log a refusal, then raise it with the id under which it can be read again."""
        denial = _denial_id()
        await self._ledger.deny(
            denial,
            operation=operation,
            error=error,
            now=self._clock(),
            contract=contract,
            phase=phase,
            assets=tuple(dict.fromkeys(assets))[:256],
            code=code,
            evidence=evidence,
            hpke_key=digest(key) if key else "",
            **_who(claims, tee),
        )
        raise _told(error, denial)


class _Who(TypedDict):
    """What an entry says of a machine."""

    tee: str
    launch: str
    machine: tuple[str, ...]


def _who(claims: Claims | None, tee: str = "") -> _Who:
    if claims is None:  # nothing was authentic, or another door says what little it knows
        return _Who(tee=tee, launch="", machine=())
    # a soft device makes the machine soft, and an entry says so in the one word that readers look at
    tee = claims.tee if claims.soft == claims.tee.startswith("soft-") else f"soft-{claims.tee}"
    value = claims.measurements.get(claims.launch, b"")
    launch = f"{claims.launch}={value.hex()}" if 0 < len(value) <= 64 else ""
    return _Who(tee=tee, launch=launch, machine=leaves.identities(identities(claims)))


def _denial_id() -> str:
    return f"d-{secrets.token_hex(6)}"


def _told(error: CloisterError, denial: str) -> CloisterError:
    """Return `error` with the way to read it again."""
    why = f"`cloister why {denial}` shows this again"
    hint = f"{error.hint}; {why}" if error.hint else why
    if isinstance(error, DeniedError):
        return DeniedError(error.message, code=error.code, reasons=error.reasons, hint=hint, denial_id=denial)
    return type(error)(error.message, code=error.code, reasons=error.reasons, hint=hint)


def _no_contract(reference: str) -> InputError:
    return InputError(
        f"this broker has no contract {reference}",
        reasons=(Reason("contract", reference, "the id or name of a contract that was submitted"),),
    )


def _authentic(held: _Held, label: str, statement: wire.Message, tag: bytes) -> bool:
    return mac_equal(mac(held.secrets.secret, label, statement.encode()), tag)


def _seal(payload: bytes, *, to: bytes, info: bytes) -> bytes:
    try:
        return hpke.seal(payload, to=to, info=info)
    except ValueError as error:
        reason = Reason("key", str(error), "an HPKE public key of suite MLKEM768-X25519")
        raise PeerError("nothing can be sealed to this key", code="protocol", reasons=(reason,)) from error
