"""The yardstick of answers: a filter program behind a plain HTTP route. No jail, no encryption, no evidence, no log.

    python -m bench._plain PORT_FILE COMMAND...

It binds a free port of 127.0.0.1, writes it to PORT_FILE, and answers `POST /ask` (the input) with the program's line.
"""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def application(program: subprocess.Popen[bytes]) -> Starlette:
    turn = threading.Lock()

    def answer(data: bytes) -> bytes:
        line = json.dumps({"input": base64.b64encode(data).decode("ascii")}).encode() + b"\n"
        with turn:
            if program.stdin is None or program.stdout is None:
                raise RuntimeError("the program has no pipes")
            program.stdin.write(line)
            program.stdin.flush()
            return program.stdout.readline()

    async def ask(request: Request) -> Response:
        return Response(await run_in_threadpool(answer, await request.body()), media_type="application/json")

    return Starlette(routes=[Route("/ask", ask, methods=["POST"])])


def main(port_file: str, *command: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        try:
            Path(port_file).write_text(str(listener.getsockname()[1]), encoding="ascii")
            config = uvicorn.Config(application(program), log_level="warning", access_log=False, lifespan="off")
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            program.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
