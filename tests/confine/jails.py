"""What the tests put around a jail: this machine's own /usr as runtime, and short ways to run something in it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from cloister.confine.job import Bind, Job, Stream
from cloister.confine.launch import Exit, Running, launch
from cloister.confine.probe import facts, missing
from cloister.confine.profile import Limits, Profile, profile

PYTHON = "/usr/bin/python3"
MIB = 1 << 20

SMALL = Limits(
    memory_bytes=512 * MIB,
    pids=64,
    scratch_bytes=16 * MIB,
    shm_bytes=16 * MIB,
    nofile=256,
    wall_s=120,
    output_files=64,
)


def host_runtime() -> tuple[Bind, ...]:
    """This machine's programs, read-only, at their own paths (merged or not)."""
    paths = [Path(path) for path in ("/usr", "/lib", "/lib64", "/bin", "/sbin")]
    return tuple(Bind(path.resolve(), str(path)) for path in paths if path.exists())


def _works() -> str:
    lacking = missing(facts())
    if lacking:
        return "; ".join(str(reason) for reason in lacking)
    if not Path(PYTHON).exists() or shutil.which("sh") is None:
        return f"no {PYTHON} to run in the jail"
    return ""


REASON = _works()
needs_jail = pytest.mark.skipif(bool(REASON), reason=REASON or "the full jail works here")


@dataclass(frozen=True, slots=True)
class Ran:
    exit: Exit
    stdout: str
    stderr: str


def start(
    *argv: str,
    rules: Profile | None = None,
    binds: tuple[Bind, ...] = (),
    outputs: Mapping[str, int] | None = None,
    env: Mapping[str, str] | None = None,
    stdin: Stream = "null",
    without: frozenset[str] = frozenset(),
) -> Running:
    job = Job(
        (*host_runtime(), *binds),
        argv,
        env=env or {},
        outputs=outputs or {},
        stdin=stdin,
        stdout="pipe",
        stderr="pipe",
    )
    return launch(job, rules or profile("offline", limits=SMALL), insecure_without=without)


def finish(running: Running, timeout_s: float = 60) -> Ran:
    assert running.stdout is not None
    assert running.stderr is not None
    out, err = running.stdout.read().decode(), running.stderr.read().decode()
    return Ran(running.wait(timeout_s), out, err)


def shell(script: str, **rest: object) -> Ran:
    with start("/bin/sh", "-c", script, **rest) as running:  # type: ignore[arg-type]
        return finish(running)


def python(script: str, **rest: object) -> Ran:
    with start(PYTHON, "-I", "-c", script, **rest) as running:  # type: ignore[arg-type]
        return finish(running)
