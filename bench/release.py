"""Attest + appraise + release, p50 and p99: a real broker process, TLS over loopback, the log entry on disk first.

    ./run bench release [--json] [--count 300] [--cold 60]

One warm release is: nonce (one round trip), evidence over the binding (soft TDX: a quote with a real ECDSA chain),
release (second round trip; the broker verifies quote, chain and collateral with dcap-qvl, judges the contract, writes
the log entry with fsync, seals two keys), opening of the sealed answer. Cold adds TCP, TLS and the attestation of the
broker by the client. Soft quotes are made by this process and cost it about what verifying costs: on hardware the
quote comes from the TDX module instead.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bench.common import Figure
from cloister.attestation.edge.attester import SoftTdxAttester
from cloister.attestation.events import WORKLOAD, Workload
from cloister.broker.client import own_measurement
from cloister.confine.profile import profile
from cloister.contract.edge import Signer
from cloister.crypto import hpke
from cloister.crypto.keys import Secret, digest
from cloister.testkit.broker import RunningBroker, running_broker

DATA, CODE = digest(b"data"), digest(b"code")


def contract(owner: Signer, place: str, name: str) -> bytes:
    return f"""contract = "{name}"
version = 1
expires = 2099-01-01
[party]
acme = "{owner.key.fingerprint}"
[code]
trainer = {{ owner = "acme", digest = "{CODE}" }}
[data]
data = {{ owner = "acme", digest = "{DATA}" }}
[place]
enclave = {{ {place} }}
[phase.train]
run = "trainer"
at = "enclave"
read = ["data"]
write = {{ model = "acme" }}
[change]
default = ["acme"]
""".encode()


def times_ms(count: int, act: Callable[[], object]) -> list[float]:
    found = []
    for _ in range(count):
        start = time.perf_counter()
        act()
        found.append((time.perf_counter() - start) * 1e3)
    return sorted(found)


SOFT_TEE = 'kind = "tee", accept = ["simulated"]'


def prepare(broker: RunningBroker, place: str = SOFT_TEE, name: str = "bench") -> str:
    """Return the id of a signed contract called `name`, with `place` as its only one."""
    owner = Signer(Ed25519PrivateKey.generate())
    client = broker.client()
    data = contract(owner, place, name)
    found = client.submit_contract(data, name="bench.toml").contract
    status = client.add_signature(found, owner.sign(data, namespace="contract@cloister"))
    if status.state != "active":
        raise RuntimeError(f"the contract is {status.state}")
    client.deposit_key(DATA, volume_id=bytes(16), key=Secret.random(), sign=owner.sign)
    return found


def node() -> SoftTdxAttester:
    attester = SoftTdxAttester(own_measurement())
    attester.extend(WORKLOAD, Workload(CODE, "offline", profile("offline").digest(), "L1").encode())
    return attester


def fsync_ms(folder: Path) -> float:
    """Median of a 4 KiB append + fdatasync on the disk that holds the state: what no durable log can go below."""
    with (folder / "fsync").open("wb") as file:

        def once() -> None:
            file.write(bytes(4096))
            file.flush()
            os.fdatasync(file.fileno())

        return statistics.median(times_ms(50, once))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=300, help="warm releases")
    parser.add_argument("--cold", type=int, default=60, help="releases over a fresh connection to a fresh broker")
    parser.add_argument("--clients", type=int, default=4, help="threads that ask at once")


def figures(options: argparse.Namespace) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name, running_broker(Path(name) / "state", process=True) as broker:
        bench = prepare(broker)
        attester, pair = node(), hpke.KeyPair.generate()

        def release() -> None:
            warm.release(bench, "train", reads=("data",), writes=("model",), attester=attester, keypair=pair)

        warm = broker.client()
        times_ms(20, release)
        found = times_ms(options.count, release)
        yield Figure("release warm p50", statistics.median(found), "ms", target=2.0)
        yield Figure("release warm p99", found[int(len(found) * 0.99)], "ms")
        yield Figure("release warm min", found[0], "ms")

        def cold() -> None:
            with broker.client() as fresh:
                fresh.release(bench, "train", reads=("data",), writes=("model",), attester=attester, keypair=pair)

        found = times_ms(options.cold, cold)
        yield Figure("release cold p50", statistics.median(found), "ms", target=5.0)
        yield Figure("release cold p99", found[int(len(found) * 0.99)], "ms")
        yield Figure("release cold min", found[0], "ms")

        quotes = times_ms(50, lambda: attester.evidence(bytes(64)))
        yield Figure("of it: soft quote (client)", statistics.median(quotes), "ms")
        yield Figure("of it: one round trip", statistics.median(times_ms(100, warm.status)), "ms")
        yield Figure("of it: fdatasync of 4 KiB", fsync_ms(Path(name)), "ms")

        done = [0] * options.clients

        def hammer(index: int) -> None:
            with broker.client() as own:
                own_pair, until = hpke.KeyPair.generate(), time.monotonic() + 1.5
                while time.monotonic() < until:
                    own.release(bench, "train", reads=("data",), writes=("model",), attester=attester, keypair=own_pair)
                    done[index] += 1

        threads = [threading.Thread(target=hammer, args=(index,)) for index in range(options.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        yield Figure(f"releases, {options.clients} clients in one process", sum(done) / 1.5, "1/s")
