"""A broker in a thread with a clock that tests move, shared by a module; every test makes its own contract in it."""

from __future__ import annotations

import asyncio
import queue
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import pytest

from cloister.broker.service import in_memory, make_identity
from cloister.testkit.broker import RunningBroker, running_broker


class Clock:
    """Real time and what a test adds to it."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _no_time_travel(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "clock" in request.fixturenames:
        request.getfixturevalue("clock").ahead = timedelta()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory, clock: Clock) -> Iterator[RunningBroker]:
    with running_broker(tmp_path_factory.mktemp("broker") / "state", process=False, clock=clock) as running:
        yield running


@pytest.fixture
def tls_relay() -> Callable[[str], AbstractContextManager[str]]:
    """A man in the middle: ends TLS with a certificate of his own and passes every byte on. Yields his address."""

    @contextmanager
    def relay(target: str) -> Iterator[str]:
        parts = urlsplit(target)
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with in_memory(make_identity(datetime.now(UTC)).pem) as path:
            server.load_cert_chain(path)
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
                writer.close()

        async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=client)
            try:
                await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
            finally:
                writer.transport.abort()
                far_writer.transport.abort()

        ready: queue.SimpleQueue[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = queue.SimpleQueue()

        async def run() -> None:
            done = asyncio.Event()
            listener = await asyncio.start_server(both, "127.0.0.1", 0, ssl=server)
            async with listener:
                ready.put((listener.sockets[0].getsockname()[1], asyncio.get_running_loop(), done))
                await done.wait()

        thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        thread.start()
        port, loop, done = ready.get(timeout=10)
        try:
            yield f"https://127.0.0.1:{port}"
        finally:
            loop.call_soon_threadsafe(done.set)
            thread.join(10)

    return relay
