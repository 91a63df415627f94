"""Run a broker: open its state, measure its configuration, show its TLS key in evidence, answer. Edge.

Order of a start, so that nothing answers before it can be checked:

  1 keys       the sealed file opens on this machine with this software: master key, HPKE key     TamperedError
  2 ledger     the state folder is ours alone and is what its signed log says                     MachineError, TamperedError
  3 TLS        a fresh key and certificate, in memory
  4 measure    `cloister/config/1` is extended into the runtime register
  5 collateral what vendors say is not older than what was used here before                       EvidenceError
  6 own test   this broker's own evidence verifies under the roots it accepts                     EvidenceError
  7 epoch      the start is a log entry
  8 listen     broker.json says where; then the ready line
SIGTERM and SIGINT: requests in flight are answered, the ledger is closed, exit status 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Final

import uvloop

from cloister.attestation.binding import Binding, check_binding
from cloister.attestation.edge.attester import Attester, attest, find_attester
from cloister.attestation.edge.collateral import soft_collateral
from cloister.attestation.edge.sealing import Sealer, SoftSealer
from cloister.attestation.edge.software import measure_package
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.events import CONFIG
from cloister.attestation.evidence import encode as encode_evidence
from cloister.attestation.roots import Roots
from cloister.attestation.verify import verify
from cloister.broker import service, wire
from cloister.broker.collateral import Collateral
from cloister.broker.decide import Trusted
from cloister.broker.kbs.service import Kbs
from cloister.broker.keeper import Keeper
from cloister.broker.store.ledger import Ledger
from cloister.crypto import hpke
from cloister.crypto.canonical import cbor_decode, cbor_encode
from cloister.crypto.keys import Secret, derive, digest
from cloister.errors import EvidenceError, MachineError, Reason, TamperedError

SEALED: Final = "keys.sealed"
LEDGER: Final = "ledger"
PLATFORM: Final = "platform"
ADDRESS: Final = "broker.json"
BACKLOG: Final = 1024
SOFT_NOTICE: Final = "soft TEE: this broker protects nothing; contracts must name `simulated` to use it"


@dataclass(frozen=True, slots=True)
class Config:
    """What an operator decides; all of it that matters is measured (`wire.BrokerConfig`).

    `node_measurements` are accepted launch measurements of nodes (`mrtd`, `mrenclave`, `measurement`, `pcr0`, ...); None means nodes that run this same package (which only a
    soft TEE can show). `allow_soft` admits soft TEEs as nodes. `collateral` are files with vendor collateral, snapshots or stores
    (broker/collateral.py). `kbs` opens the door for clients of Trustee's KBS protocol (docs/kbs.md).
    """

    origin: str = "cloister.local/broker"
    attester: str = "auto"
    node_measurements: frozenset[bytes] | None = None
    allow_soft: bool = False
    lease_s: int = 600
    collateral: tuple[Path, ...] = field(default=())
    roots: Mapping[str, frozenset[str]] = field(default_factory=lambda: MappingProxyType({}))
    """Kind of evidence -> SHA-256 (hex) of further root certificates to believe. Clients refuse a broker that believes one that
    they do not."""
    kbs: bool = False


def serve(
    state_dir: Path,
    host: str,
    port: int,
    config: Config,
    *,
    attester: Attester | None = None,
    sealer: Sealer | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ready: Callable[[str, service.Server], None] = lambda url, server: None,
) -> None:
    """Run a broker until a signal stops it. `port` 0 takes a free one; `state_dir/broker.json` says which.

    `attester` and `sealer` override what `config.attester` finds; `say` gets the lines for the operator; `ready` is
    called with the address once it answers.

    Raises:
        MachineError: no TEE, no sealing, another broker uses the folder, or the address cannot be used.
        TamperedError: the state is not what this broker left.
        EvidenceError: this broker's own evidence does not verify.
    """
    own = measure_package()
    tee = attester or find_attester(config.attester, measurement=own)
    soft = tee.name.startswith("soft")
    keys = _Keys.load(state_dir, sealer or _sealer(tee, state_dir / PLATFORM))
    with Ledger.open(state_dir / LEDGER, keys.master, origin=config.origin) as ledger, _listen(host, port) as listener:
        now = clock()
        identity = service.make_identity(now)
        roots = Roots(soft=config.allow_soft, also=config.roots)
        accepted = config.node_measurements
        measurements = frozenset({own}) if accepted is None else accepted
        measured = wire.BrokerConfig(
            version=1,
            origin=ledger.origin,
            log_key=str(ledger.log_key),
            node_measurements=tuple(sorted(measurements)),
            roots=tuple(sorted(f"{kind}:{pin}" for kind, pins in config.roots.items() for pin in pins)),
            allow_soft=config.allow_soft,
            lease_s=config.lease_s,
            kbs=config.kbs,
        )
        tee.extend(CONFIG, measured.encode())
        vendors = Collateral(config.collateral, ledger, roots, now=now, say=say)
        files = vendors.at(now)
        if soft or files.items:
            _own_test(tee, keys.hpke.public, identity.spki, files, config.roots, now)
        else:
            say(
                "no collateral is configured: no node on real hardware will be accepted, and my own evidence is untested"
            )
        ledger.begin_epoch(
            now=now,
            software=own.hex(),
            evidence=digest(encode_evidence(tee.evidence(bytes(tee.report_data_bytes)))),
            tee=tee.name,
            hpke_key=digest(keys.hpke.public),
            tls_key="sha256:" + identity.spki.hex(),
        ).result()

        def trusted(at: datetime) -> Trusted:
            files = vendors.at(at)
            endorsements = files | soft_collateral(at) if config.allow_soft else files
            return Trusted(roots, endorsements, measurements)

        keeper = Keeper(
            ledger=ledger,
            keypair=keys.hpke,
            outputs=Secret(derive(keys.master, "cloister/broker/outputs/1")),
            spki=identity.spki,
            config=measured,
            attester=tee,
            trusted=trusted,
            clock=clock,
        )
        url = _url(listener)

        def started() -> None:
            _write(state_dir / ADDRESS, _address(url, identity.spki))
            if soft:
                say(SOFT_NOTICE)
            say(f"ready: {url} ({tee.name}, log {ledger.origin}, {ledger.size} entries)")
            ready(url, server)

        doors = Kbs(keeper, trusted=trusted, clock=clock).routes() if config.kbs else ()
        server = service.make_server(service.application(keeper, doors), identity, started)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.serve(sockets=[listener]))
        with contextlib.suppress(FileNotFoundError):
            (state_dir / ADDRESS).unlink()


@dataclass(frozen=True, slots=True)
class _Keys:
    """What makes this broker this broker; sealed to its machine and software."""

    master: Secret
    hpke: hpke.KeyPair

    @classmethod
    def load(cls, folder: Path, sealer: Sealer) -> _Keys:
        """Open the sealed keys; make them if the folder is new.

        Raises:
            TamperedError: they do not open here, or a ledger is there without them.
        """
        path = folder / SEALED
        if path.exists():
            try:
                value = cbor_decode(sealer.unseal(path.read_bytes()))
                match value:
                    case {"v": 1, "master": bytes(master), "hpke": bytes(private), **rest} if not rest:
                        return cls(Secret(master), hpke.KeyPair.from_private_bytes(private))
                raise ValueError("another shape")
            except ValueError as error:
                raise TamperedError(f"{path} does not hold the broker's keys: {error}") from error
        if (folder / LEDGER).exists():
            raise TamperedError(
                f"{folder} has a ledger but no {SEALED}",
                hint="restore the file; without it the ledger cannot be opened and a new broker must take a new folder",
            )
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(f"cannot make {folder}: {error.strerror}") from error
        fresh, seed = Secret.random(), Secret.random(hpke.PRIVATE_BYTES)
        _write(path, sealer.seal(cbor_encode({"v": 1, "master": fresh.reveal(), "hpke": seed.reveal()})))
        return cls(fresh, hpke.KeyPair.from_private_bytes(seed.reveal()))


def _sealer(tee: Attester, folder: Path) -> Sealer:
    if tee.name.startswith("soft"):
        return SoftSealer(folder)
    raise MachineError(
        f"{tee.name} has no sealing of its own",
        reasons=(Reason("broker.sealing", f"{tee.name} without a sealer", "a way to keep keys across restarts"),),
        hint="give `serve` a sealer (a TPM, a peer broker, or recovery shares); a soft TEE seals to a file",
    )


def _own_test(
    tee: Attester, key: bytes, spki: bytes, files: Endorsements, also: Mapping[str, frozenset[str]], now: datetime
) -> None:
    """Verify this broker's own evidence, so that a broken set-up is found here and not by every client."""
    soft = tee.name.startswith("soft")
    endorsements = files | soft_collateral(now) if soft else files
    binding = Binding("broker", secrets.token_bytes(32), key, spki)
    evidence = attest(tee, binding)
    claims = verify(evidence, endorsements, Roots(soft=soft, also=also), now=now)
    reasons = check_binding(claims, binding.over(evidence.devices))
    if reasons:
        raise EvidenceError("this broker's own evidence is not bound", code="evidence-unacceptable", reasons=reasons)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise MachineError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            hint="is another broker running there? port 0 takes a free one",
        ) from error
    listener.setblocking(False)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104  # an address to connect to, not one to bind
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"  # noqa: S104
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def _address(url: str, spki: bytes) -> bytes:
    return json.dumps({"url": url, "pid": os.getpid(), "spki": spki.hex()}, indent=1).encode() + b"\n"


def _write(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, durably: old or new, never half."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise MachineError(f"cannot write {path}: {error.strerror}") from error


logging.getLogger("uvicorn").setLevel(logging.WARNING)
