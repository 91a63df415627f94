"""A real broker for tests: its own process or a thread, real sockets, real TLS, a soft TEE, state in a folder.

    with running_broker(tmp_path) as broker:
        client = broker.client()
        ...
        broker.kill(); broker.start()        # the same state, another TLS key

It protects nothing: its TEE and its sealing are soft. `process=False` runs it in a thread of this process, which is
faster and lets a test set the clock; only a process can be killed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from cloister.attestation.edge.attester import find_attester
from cloister.attestation.edge.sealing import SoftSealer
from cloister.attestation.edge.software import measure_package
from cloister.attestation.roots import Roots
from cloister.broker.client import BrokerClient, Trust, own_measurement
from cloister.broker.main import ADDRESS, PLATFORM, Config, serve
from cloister.broker.service import Server

START_S = 30.0
"""How long a start may take on a busy machine."""


def _now() -> datetime:
    return datetime.now(UTC)


class RunningBroker:
    """A broker that a test can stop, kill and start again."""

    def __init__(self, folder: Path, config: Config, *, process: bool, clock: Callable[[], datetime] = _now) -> None:
        self.folder = folder
        self.config = config
        self.url = ""
        self._in_process = process
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._server: Server | None = None
        self._failed: BaseException | None = None
        self._port = 0
        self._clients: list[BrokerClient] = []
        self._measurements: set[bytes] = set()

    def start(self) -> None:
        """Start it, at the address it had before if it had one, and wait until it answers."""
        self._measurements |= {own_measurement(), measure_package()}
        if self._in_process:
            self._start_process()
        else:
            self._start_thread()
        self._measurements |= {measure_package()}  # another value only while somebody edits the package
        self._port = int(self.url.rsplit(":", 1)[1])

    def stop(self) -> int:
        """Stop it as an operator does (SIGTERM); return the exit status."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            return self._gone()
        if self._thread is not None and self._server is not None:
            self._server.should_exit = True
            self._thread.join(START_S)
            self._thread = self._server = None
        return 0

    def kill(self) -> None:
        """kill -9, at any moment."""
        if self._process is None:
            raise RuntimeError("only a process can be killed: running_broker(..., process=True)")
        self._process.kill()
        self._gone()

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the broker is no process of its own")
        return self._process.pid

    def trust(self) -> Trust:
        """What a client must believe to use this broker: the soft root, and this package's measurement."""
        return Trust(
            Roots(soft=True),
            frozenset(map(self._launch, self._measurements)),
            allow_soft=True,
            node_measurements=self.config.node_measurements,
        )

    def _launch(self, measurement: bytes) -> bytes:
        """Return what a verifier finds of a broker whose package has `measurement`: SGX and Azure have another form of it."""
        launch: bytes = getattr(find_attester(self.config.attester, measurement=measurement), "launch", measurement)
        return launch

    def client(
        self, *, memory: Path | None = None, clock: Callable[[], datetime] | None = None, timeout_s: float = 10.0
    ) -> BrokerClient:
        """Return a client that attested this broker; it is closed when the `with` block of the broker ends."""
        client = BrokerClient.connect(
            self.url, trust=self.trust(), memory=memory, clock=clock or self._clock, timeout_s=timeout_s
        )
        self._clients.append(client)
        return client

    def close_clients(self) -> None:
        while self._clients:
            self._clients.pop().close()

    def _gone(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        status = process.wait(START_S)
        if process.stderr is not None:
            process.stderr.close()
        return status

    def _start_process(self) -> None:
        address = self.folder / ADDRESS
        address.unlink(missing_ok=True)
        config = self.config
        command = [sys.executable, "-m", "cloister.broker", str(self.folder), "--port", str(self._port)]
        command += ["--attester", config.attester, "--origin", config.origin, "--lease", str(config.lease_s)]
        command += ["--allow-soft"] if config.allow_soft else []
        for measurement in config.node_measurements or ():
            command += ["--node", measurement.hex()]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE)  # noqa: S603  # our own interpreter
        deadline = time.monotonic() + START_S
        while not address.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                _, said = self._process.communicate()
                self._process = None
                raise RuntimeError(f"the broker did not start: {said.decode(errors='replace')}")
            time.sleep(0.02)
        self.url = json.loads(address.read_bytes())["url"]

    def _start_thread(self) -> None:
        ready = threading.Event()
        self._failed = None

        def answers(url: str, server: Server) -> None:
            self.url, self._server = url, server
            ready.set()

        def run() -> None:
            try:
                serve(
                    self.folder,
                    "127.0.0.1",
                    self._port,
                    self.config,
                    # the same measurement at every start, also while somebody edits the package
                    attester=find_attester(self.config.attester, measurement=own_measurement()),
                    sealer=SoftSealer(self.folder / PLATFORM, measurement=own_measurement()),
                    clock=self._clock,
                    say=lambda line: None,
                    ready=answers,
                )
            except BaseException as error:
                self._failed = error
                raise
            finally:
                ready.set()

        self._thread = threading.Thread(target=run, name="broker", daemon=True)
        self._thread.start()
        if not ready.wait(START_S) or self._failed is not None:
            raise RuntimeError(f"the broker did not start: {self._failed}") from self._failed


@contextmanager
def running_broker(
    folder: Path,
    *,
    process: bool = True,
    clock: Callable[[], datetime] = _now,
    node_measurements: frozenset[bytes] | None = None,
    allow_soft: bool = True,
    lease_s: int = 600,
    origin: str = "test.example/broker",
    attester: str = "soft-tdx",
) -> Iterator[RunningBroker]:
    """Yield a running broker with its state in `folder`; it is stopped at the end.

    `node_measurements` None accepts soft nodes that run this package. `clock` needs `process=False`. `attester` is the kind of
    soft TEE that it runs in, one of `SOFT_KINDS`.
    """
    if process and clock is not _now:
        raise ValueError("another process has its own clock: use process=False")
    config = Config(
        origin=origin,
        attester=attester,
        node_measurements=node_measurements,
        allow_soft=allow_soft,
        lease_s=lease_s,
    )
    if node_measurements is None:
        config = replace(config, node_measurements=frozenset({own_measurement(), measure_package()}))
    broker = RunningBroker(folder, config, process=process, clock=clock)
    broker.start()
    try:
        yield broker
    finally:
        broker.close_clients()
        broker.stop()
