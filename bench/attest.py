"""Verification of evidence by kind of hardware, releases a second with each, and the whole soft matrix.

    ./run bench attest [--json] [--rounds 9] [--count 30] [--vectors DIRECTORY]

Verification is `verify` on one core, evidence and collateral in memory, caches warm with certificates that a broker sees
all day (vendor's authorities), cold with the evidence itself, which is new each time where the kind allows it. Soft evidence
has the sizes, curves and chains of the hardware, so it costs the same. Kinds take turns: each round measures each kind, the
figure is the median over all. With `--vectors` the real evidence of a directory with a manifest is verified too.

Releases: one broker process, TLS over loopback, a durable log entry each; the node's evidence is made beside it on the
same cores, which on hardware the hardware does.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from bench.common import Figure
from bench.release import CODE, prepare, times_ms
from cloister.attestation.binding import Binding
from cloister.attestation.edge.attester import SOFT_KINDS, Attester, SoftTdxAttester, attest, find_attester
from cloister.attestation.edge.collateral import soft_collateral
from cloister.attestation.edge.soft import SoftGpuAttester
from cloister.attestation.events import WORKLOAD, Workload
from cloister.attestation.roots import Roots
from cloister.attestation.types import Evidence
from cloister.attestation.verify import verify
from cloister.broker.client import own_measurement
from cloister.confine.profile import profile
from cloister.crypto import hpke
from cloister.testkit.broker import running_broker

TARGETS = {
    "tdx": 2.0,
    "sgx": 2.0,
    "sev-snp": 2.0,
    "tpm": 2.0,
    "azure-snp": 5.0,
    "azure-tdx": 5.0,
    "nitro": 5.0,
    "cca": 5.0,
    "nvidia-gpu": 5.0,
}
"""Milliseconds on a quiet core; P-384 signatures cost most of the larger ones."""
FULL_GPU_MS = 40.0
ROOT = Path(__file__).resolve().parents[1]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=9, help="rounds over all kinds")
    parser.add_argument("--count", type=int, default=20, help="verifications of each kind in a round")
    parser.add_argument("--releases", type=int, default=60, help="releases with each kind")
    parser.add_argument(
        "--no-matrix", action="store_true", help="leave out the soft matrix, which takes most of the time"
    )
    parser.add_argument("--vectors", type=Path, help="a directory of real evidence with a manifest.json")


def soft_node(kind: str) -> Attester:
    attester = find_attester(kind, measurement=own_measurement())
    attester.extend(WORKLOAD, Workload(CODE, "offline", profile("offline").digest(), "L1").encode())
    return attester


def node_with_gpu() -> Attester:
    attester = SoftTdxAttester(own_measurement(), devices=(SoftGpuAttester(),))
    attester.extend(WORKLOAD, Workload(CODE, "offline", profile("offline").digest(), "L1").encode())
    return attester


def fresh(attester: Attester, count: int) -> list[Evidence]:
    """Return evidence over another nonce each time: what a broker gets."""
    return [attest(attester, Binding("release", index.to_bytes(32, "big"), b"key")) for index in range(count)]


def figures(options: argparse.Namespace) -> Iterator[Figure]:
    yield from _verification(options)
    if options.vectors is not None:
        yield from _real(options)
    yield from _releases(options)
    if not options.no_matrix:
        yield from _matrix()


def _verification(options: argparse.Namespace) -> Iterator[Figure]:
    now, roots = datetime.now(UTC), Roots(soft=True)
    endorsements = soft_collateral(now)
    evidence = {kind: fresh(soft_node(kind), options.count) for kind in SOFT_KINDS}
    gpu = SoftGpuAttester()
    evidence["soft-nvidia-gpu"] = [gpu.evidence(index.to_bytes(32, "big")) for index in range(options.count)]
    evidence["soft-tdx with a GPU"] = fresh(node_with_gpu(), options.count)
    found: dict[str, list[float]] = {kind: [] for kind in evidence}
    for number in range(options.rounds + 1):
        for kind, pieces in evidence.items():
            for piece in pieces:
                begin = time.perf_counter()
                verify(piece, endorsements, roots, now=now)
                if number:
                    found[kind].append((time.perf_counter() - begin) * 1e3)
    for kind, times in found.items():
        yield Figure(
            f"verify {kind}, p50", statistics.median(times), "ms", target=TARGETS.get(kind.removeprefix("soft-"))
        )


def _matrix() -> Iterator[Figure]:
    """Time the whole soft matrix: every fault of every kind through a broker (tests/broker/test_matrix.py)."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/broker/test_matrix.py"]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the matrix failed:\n{done.stdout[-2000:]}")
    yield Figure("soft matrix through the broker", time.perf_counter() - begin, "s", target=60.0)


def _real(options: argparse.Namespace) -> Iterator[Figure]:
    """Yield the real evidence of a manifest, whole cases with their files already read."""
    from cloister.attestation.files import Case, observe
    from cloister.attestation.files.manifest import parse
    from cloister.cli.evidence import chains_of

    folder: Path = options.vectors
    entries = parse((folder / "manifest.json").read_bytes())
    chains = chains_of(folder, entries)
    for entry in entries:
        if entry.expect.get("authentic") is not True or entry.at is None:
            continue
        files = {role: (folder / name).read_bytes() for role, name in entry.files.items()}
        case = Case(entry.kind, files, entry.at, entry.name, entry.nonce, chains, entry.chain)
        act = partial(observe, case)
        target = FULL_GPU_MS if "driver_rim" in files else None
        yield Figure(f"real {entry.kind} {entry.name}, first", times_ms(1, act)[0], "ms", target=target)
        found = times_ms(options.rounds * 3, act)
        yield Figure(f"real {entry.kind} {entry.name}, p50", statistics.median(found), "ms", target=target)


def _releases(options: argparse.Namespace) -> Iterator[Figure]:
    nodes = {kind: soft_node(kind) for kind in SOFT_KINDS} | {"soft-tdx and a GPU": node_with_gpu()}
    launches = frozenset(_launch(node) for node in nodes.values())
    with (
        tempfile.TemporaryDirectory() as name,
        running_broker(Path(name) / "state", process=True, node_measurements=launches) as broker,
    ):
        tee, host = prepare(broker), prepare(broker, _host_place(nodes["soft-tpm"]), "bench-host")
        client, pair = broker.client(), hpke.KeyPair.generate()
        for kind, node in nodes.items():
            contract = host if kind == "soft-tpm" else tee

            def release(contract: str = contract, node: Attester = node) -> None:
                client.release(contract, "train", reads=("data",), writes=("model",), attester=node, keypair=pair)

            times_ms(5, release)
            found = times_ms(options.releases, release)
            yield Figure(f"releases with {kind}, one client", 1e3 / statistics.median(found), "1/s")


def _host_place(node: Attester) -> str:
    """Return the place of a measured host in the state in which `node` is."""
    now = datetime.now(UTC)
    evidence = attest(node, Binding("release", bytes(32), b"key"))
    boot = verify(evidence, soft_collateral(now, evidence.kind), Roots(soft=True), now=now).boot
    return f'kind = "attested-host", accept = ["simulated"], boot = ["{boot}"]'


def _launch(node: Attester) -> bytes:
    launch = getattr(node, "launch", None)
    return launch if isinstance(launch, bytes) else own_measurement()
