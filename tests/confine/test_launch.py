"""Life and death of a jail: streams, ends of every kind, and that nothing outlives what it must not outlive."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

import cloister
from cloister.confine import bubble, cgroup, holder, probe
from cloister.confine.job import Bind, Job
from cloister.confine.launch import launch
from cloister.confine.profile import profile
from cloister.errors import InputError, MachineError
from tests.confine.jails import MIB, PYTHON, SMALL, finish, host_runtime, needs_jail, python, shell, start

pytestmark = needs_jail


def processes_with(marker: str) -> list[int]:
    """Numbers of all processes of this machine whose command line holds `marker`."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                line = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in line:
                found.append(int(path.name))
    return found


def gone(marker: str, timeout_s: float = 10) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not processes_with(marker):
            return True
        time.sleep(0.02)
    return False


def appeared(marker: str, count: int, timeout_s: float = 10) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if len(processes_with(marker)) >= count:
            return True
        time.sleep(0.01)
    return False


def leftover_groups() -> set[Path]:
    return {folder for site in cgroup.sites() for folder in site.folder.glob(cgroup.PREFIX + "*")}


def test_status_and_streams() -> None:
    ran = shell("echo out; echo err >&2; exit 7")
    assert (ran.exit.code, ran.exit.signal, ran.exit.ok) == (7, None, False)
    assert (ran.stdout, ran.stderr) == ("out\n", "err\n")


def test_a_serving_process_answers_line_by_line() -> None:
    script = "import sys\nfor line in sys.stdin: print(int(line) * 2, flush=True)"
    with start(PYTHON, "-c", script, stdin="pipe") as running:
        assert running.stdin is not None
        assert running.stdout is not None
        for number in (1, 21, 500):
            running.stdin.write(f"{number}\n".encode())
            running.stdin.flush()
            assert running.stdout.readline() == f"{number * 2}\n".encode()
        assert running.poll() is None
        running.stdin.close()
        assert running.wait(30).ok
        assert running.poll() == running.wait(0)


def test_environment_is_exactly_the_declared_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    ran = python("import os; print(sorted(os.environ))", env={"SEED": "1", "ODD": "a\nb"})
    assert ran.stdout.strip() == str(sorted({"PATH", "HOME", "LANG", "TMPDIR", "SEED", "ODD"}))


def test_processor_count_is_the_one_outside() -> None:
    ran = python("import os; print(os.cpu_count(), len(os.sched_getaffinity(0)))")
    assert ran.stdout.split() == [str(os.cpu_count()), str(len(os.sched_getaffinity(0)))]


def test_home_and_temporary_folder_are_writable_and_empty() -> None:
    ran = shell("cd; pwd; ls -A; ls -A $TMPDIR; echo x > $HOME/a && echo x > /dev/shm/b && echo fine")
    assert ran.stdout.split() == ["/tmp/home", "home", "fine"]


def test_user_inside_is_nobody_special() -> None:
    assert shell("id -u; id -g; whoami; hostname").stdout.split() == ["1000", "1000", "job", "jail"]


def test_sigpipe_and_sigxfsz_are_not_inherited_as_ignored() -> None:
    ran = shell("grep SigIgn /proc/self/status")
    assert int(ran.stdout.split()[1], 16) == 0


def test_program_that_does_not_exist_is_explained() -> None:
    with start("/no/such/program") as running:
        ended = running.wait(30)
    assert ended.code == 125
    assert ended.note == "cannot execute /no/such/program: No such file or directory"


def test_program_killed_by_a_signal() -> None:
    ended = shell("kill -SEGV $$").exit
    assert (ended.code, ended.signal, ended.ok) == (None, signal.SIGSEGV, False)


def test_wall_clock_ends_everything() -> None:
    marker = f"31536{os.getpid()}"
    began = time.monotonic()
    with start(
        "/bin/sh", "-c", f"sleep {marker} & sleep {marker}", rules=profile("offline", limits=replace(SMALL, wall_s=1))
    ) as running:
        ended = running.wait(30)
        assert ended.timed_out
        assert ended.signal == signal.SIGKILL
        assert "wall clock limit of 1 s" in ended.note
        assert not processes_with(marker)
    assert time.monotonic() - began < 10


def test_cpu_seconds_end_a_loop() -> None:
    with start(PYTHON, "-c", "while True: pass", rules=profile("offline", limits=replace(SMALL, cpu_s=1))) as running:
        ended = running.wait(30)
    assert ended.signal in (signal.SIGXCPU, signal.SIGKILL)
    assert "1 CPU seconds" in ended.note


def test_out_of_memory_is_explained() -> None:
    if not any("memory" in site.controllers for site in cgroup.sites()):
        pytest.skip("no writable control group with a memory controller")
    limits = replace(SMALL, memory_bytes=64 * MIB)
    script = "x = bytearray(120 << 20); print('survived')"
    with start(PYTHON, "-c", script, rules=profile("offline", limits=limits)) as running:
        ran = finish(running)
    assert ran.exit.oom
    assert "out of memory" in ran.exit.note
    assert "survived" not in ran.stdout


def test_address_space_is_bounded_without_control_groups() -> None:
    limits = replace(SMALL, memory_bytes=64 * MIB)
    ran = python(
        "try:\n    x = bytearray(300 << 20)\nexcept MemoryError: print('refused')",
        rules=profile("offline", limits=limits),
    )
    assert ran.stdout == "refused\n"


def test_daemons_die_with_the_main_program() -> None:
    marker = f"27182{os.getpid()}"
    with start("/bin/sh", "-c", f"setsid sleep {marker} & sleep 0.1; exit 0") as running:
        assert running.wait(30).ok
        assert not processes_with(marker)


def test_kill_ends_everything_and_can_be_repeated() -> None:
    marker = f"16180{os.getpid()}"
    with start("/bin/sh", "-c", f"trap '' TERM INT HUP; setsid sleep {marker} & sleep {marker}") as running:
        assert appeared(marker, 3)
        ended = running.kill()
        assert ended.signal == signal.SIGKILL
        assert not processes_with(marker)
        assert running.kill() == ended


def test_leaving_the_block_by_an_error_kills() -> None:
    marker = f"14142{os.getpid()}"
    with pytest.raises(ZeroDivisionError), start("/bin/sh", "-c", f"sleep {marker}; true"):
        raise ZeroDivisionError
    assert not processes_with(marker)


def test_jobs_started_by_a_thread_outlive_the_thread() -> None:
    """PDEATHSIG follows threads; a launcher with worker threads must not lose its jobs."""
    box = []
    thread = threading.Thread(target=lambda: box.append(start("/bin/sh", "-c", "sleep 0.5; echo alive")))
    thread.start()
    thread.join()
    with box[0] as running:
        assert finish(running).stdout == "alive\n"


LAUNCHER = """
import sys, time
from tests.confine.jails import start
running = start("/bin/sh", "-c", "sleep {marker} & setsid sleep {marker} & sleep {marker}", outputs={{"one": 1000}})
print("started", flush=True)
{then}
"""


@contextlib.contextmanager
def launcher(marker: str, then: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that has started a jail with three processes in it, and then does `then`."""
    root = Path(__file__).resolve().parents[2]
    path = f"{Path(cloister.__file__).parents[1]}:{root}:{':'.join(sys.path)}"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LAUNCHER).format(marker=marker, then=then)],
        cwd=root,
        env={"PYTHONPATH": path, "PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        assert appeared(f"sleep\0{marker}", 3)
        yield process
    finally:
        process.kill()
        process.wait(20)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_survives_a_launcher_that_dies(number: signal.Signals) -> None:
    marker = f"{int(number)}5772{os.getpid()}"
    before = leftover_groups()
    with launcher(marker, "time.sleep(600)") as process:
        process.send_signal(number)
        process.wait(20)
        assert gone(f"sleep\0{marker}")
    deadline = time.monotonic() + 5
    while leftover_groups() - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert leftover_groups() <= before


def test_a_process_that_took_over_the_number_of_the_jails_first_one_is_not_killed() -> None:
    with subprocess.Popen(["/bin/sleep", "60"]) as stranger:
        try:
            assert holder._open_init(stranger.pid, (1,)) == -1
            descriptor = holder._open_init(stranger.pid, (1, os.getpid()))
            assert descriptor >= 0
            os.close(descriptor)
        finally:
            stranger.kill()
    assert holder._open_init(stranger.pid, (os.getpid(),)) == -1
    assert holder._open_init(0, (os.getpid(),)) == -1


def test_a_fork_of_the_dead_launcher_does_not_keep_the_job_alive() -> None:
    """A forked child holds a copy of the control socket: only the pidfd tells the holder the truth."""
    marker = f"6931{os.getpid()}"
    then = "import os\nif os.fork() == 0: time.sleep(8); os._exit(0)\ntime.sleep(600)"
    with launcher(marker, then) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        assert gone(f"sleep\0{marker}", timeout_s=5)


def test_nothing_survives_a_killed_holder() -> None:
    marker = f"4342{os.getpid()}"
    with start("/bin/sh", "-c", f"setsid sleep {marker} & sleep {marker}") as running:
        assert appeared(f"sleep\0{marker}", 2)
        os.kill(running._holder.pid, signal.SIGKILL)
        ended = running.wait(20)
        assert not ended.ok
        assert "broke down" in ended.note
        assert gone(f"sleep\0{marker}")


def test_repeated_starts_leave_no_descriptors_and_no_groups() -> None:
    before, groups = len(list(Path("/proc/self/fd").iterdir())), leftover_groups()
    for _ in range(3):
        with start("/bin/sh", "-c", "true", outputs={"one": 1000}) as running:
            running.wait(30)
        with pytest.raises(InputError):
            launch(Job((Bind(Path("/no/such/source"), "/x"),), ("/x",), stdout="pipe"), profile("offline"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert leftover_groups() <= groups


def test_two_jobs_of_root_have_different_users_and_neither_is_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("without root all jobs run as the caller")
    marker = f"2236{os.getpid()}"
    with start("/bin/sh", "-c", f"sleep {marker}; true"), start("/bin/sh", "-c", f"sleep {marker}; true"):
        assert appeared(f"sleep\0{marker}", 2)
        found = processes_with(f"sleep\0{marker}")
        users = {Path(f"/proc/{pid}").stat().st_uid for pid in found}
    assert len(users) == 2
    assert 0 not in users


def test_outer_paths_of_binds_do_not_need_to_be_open_to_the_jobs_user(tmp_path: Path) -> None:
    """Root's private folders can hold inputs: the holder binds them before it gives up its rights."""
    if os.geteuid() != 0:
        pytest.skip("without root the job's user is the caller")
    inner = tmp_path / "closed" / "data"
    inner.mkdir(parents=True)
    (inner / "x").write_text("input\n")
    inner.chmod(0o755)
    inner.parent.chmod(0o700)
    ran = shell(
        "cat /data/x; echo y > /data/x; cp /bin/true /tmp/; /tmp/true && echo ran", binds=(Bind(inner, "/data"),)
    )
    assert ran.stdout.split() == ["input", "ran"]
    assert (inner / "x").read_text() == "input\n"


@pytest.mark.parametrize("writable", [False, True])
def test_native_code_among_the_data_is_never_executed(tmp_path: Path, writable: bool) -> None:
    """Neither started, nor through the dynamic loader, nor as a library: only what was measured is code."""
    tmp_path.chmod(0o755)
    library = next(path for folder in ("/usr/lib", "/lib") for path in Path(folder).rglob("libm.so.6"))
    for name, source in (("program", Path(shutil.which("true") or "")), ("library", library)):
        (tmp_path / name).write_bytes(source.read_bytes())
        (tmp_path / name).chmod(0o755)
    loader = next(path for path in ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1") if Path(path).exists())
    script = f"""
import ctypes, os, subprocess
for attempt in (
    lambda: subprocess.run(["/data/in/program"], check=True),
    lambda: subprocess.run(["{loader}", "/data/in/program"], check=True, stderr=subprocess.DEVNULL),
    lambda: ctypes.CDLL("/data/in/library"),
):
    try:
        attempt()
    except (OSError, subprocess.CalledProcessError):
        print("refused")
    else:
        print("executed")
"""
    binds = (Bind(tmp_path, "/data/in", writable=writable),)
    with start(PYTHON, "-c", script, binds=binds) as running:
        ran = finish(running)
    assert ran.stdout.split() == ["refused"] * 3, ran.stderr


def test_an_existing_writable_bind_is_refused_to_sealed_jobs(tmp_path: Path) -> None:
    job = Job((*host_runtime(), Bind(tmp_path, "/work", writable=True)), ("/bin/true",))
    with pytest.raises(ValueError, match="no writable binds"):
        launch(job, profile("sealed"))
    with pytest.raises(ValueError, match="own streams"):
        launch(Job(host_runtime(), ("/bin/true",), stdout="inherit"), profile("sealed"))


def test_loopback_profile_has_a_private_loopback() -> None:
    script = (
        "import socket, threading\n"
        "a = socket.create_server(('127.0.0.1', 0)); threading.Thread(target=lambda: a.accept()[0].send(b'hi')).start()\n"
        "print(socket.create_connection(a.getsockname()).recv(2).decode(), socket.gethostname())\n"
    )
    assert python(script, rules=profile("offline", limits=SMALL, loopback=True)).stdout == "hi jail\n"
    assert "PermissionError" in python(script).stderr


@pytest.mark.slow
def test_multiprocessing_with_shared_memory_works() -> None:
    script = (
        "import multiprocessing as m\n"
        "def f(n): return n * n\n"
        "if __name__ == '__main__':\n"
        "    with m.Pool(2) as pool: print(sum(pool.map(f, range(10))))\n"
        "    a = m.Array('i', 3); a[1] = 5; print(a[1])\n"
    )
    for name in ("offline", "sealed"):
        ran = python(script, rules=profile(name, limits=SMALL))
        assert ran.stdout.split() == ["285", "5"], ran.stderr


def test_levels() -> None:
    with start("/bin/true") as running:
        assert running.level in ("L2", "L3")
    with pytest.raises(ValueError, match="L0"):
        launch(Job(host_runtime(), ("/bin/true",)), profile("offline"), level="L0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no layers"):
        launch(Job(host_runtime(), ("/bin/true",)), profile("offline"), insecure_without=frozenset({"namespaces"}))


def facts_with(**changes: object) -> probe.Facts:
    return replace(probe.facts(), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "where", "hint"),
    [
        ({"bwrap": ""}, "confine.bubblewrap", "install"),
        ({"bwrap_version": (0, 4, 0)}, "confine.bubblewrap", "newer"),
        ({"seccomp": False}, "confine.seccomp", "CONFIG_SECCOMP_FILTER"),
        ({"landlock_abi": 0}, "confine.landlock", "lsm=landlock"),
    ],
)
def test_a_missing_layer_is_a_refusal_that_names_the_remedy(changes: dict[str, object], where: str, hint: str) -> None:
    for level in (None, "L2"):
        with pytest.raises(MachineError) as caught:
            probe.require(facts_with(**changes), level)
        assert caught.value.code == "no-sandbox"
        assert [reason.where for reason in caught.value.reasons] == [where]
        assert hint in caught.value.hint


def test_all_missing_layers_are_reported_together() -> None:
    with pytest.raises(MachineError) as caught:
        probe.require(facts_with(bwrap="", seccomp=False, landlock_abi=0, tee_guest=False), "L3")
    assert [reason.where.split(".")[1] for reason in caught.value.reasons] == [
        "bubblewrap",
        "seccomp",
        "landlock",
        "tee",
    ]


def test_lower_level_only_if_named() -> None:
    assert probe.require(facts_with(landlock_abi=0), "L1") == "L1"
    assert probe.require(facts_with(tee_guest=True), None) == "L3"
    assert probe.require(facts_with(tee_guest=False), None) == "L2"
    with pytest.raises(MachineError, match="at level L3"):
        probe.require(facts_with(tee_guest=False), "L3")
    with pytest.raises(MachineError):
        probe.require(facts_with(seccomp=False), "L1")


def test_l1_runs_without_landlock_on_a_kernel_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    without = facts_with(landlock_abi=0)
    monkeypatch.setattr(probe, "facts", lambda: without)
    job = Job(host_runtime(), ("/bin/sh", "-c", "echo ran"), stdout="pipe", stderr="pipe")
    with pytest.raises(MachineError):
        launch(job, profile("offline"))
    with launch(job, profile("offline"), level="L1") as running:
        assert running.level == "L1"
        assert finish(running).stdout == "ran\n"


def test_a_jail_that_cannot_be_built_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = leftover_groups()
    monkeypatch.setattr(bubble, "DEVICES", ("no-such-device",))
    with pytest.raises(MachineError, match="no-such-device") as caught:
        launch(Job(host_runtime(), ("/bin/true",)), profile("offline"))
    assert caught.value.code == "no-sandbox"
    assert leftover_groups() <= groups


def test_probe_reports_what_launch_reaches() -> None:
    found = probe.probe()
    assert found.level in ("L2", "L3")
    assert found.namespaces
    assert found.missing == ()
    assert probe.best_level() == found.level


def test_probe_on_a_machine_without_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = facts_with(bwrap="", seccomp=False, landlock_abi=0, cgroup_sites=(), proc=MappingProxyType({}))
    monkeypatch.setattr(probe, "facts", lambda: bare)
    found = probe.probe()
    assert (found.level, found.namespaces, found.cgroups) == ("L0", False, ())
    assert len(found.missing) == 3


@pytest.mark.root
@pytest.mark.slow
def test_the_whole_suite_of_basics_works_without_root() -> None:
    """The same jail for an ordinary user: started as nobody, with no control groups."""
    if os.geteuid() != 0:
        pytest.skip("this is the root side of the pair")
    root = Path(__file__).resolve().parents[2]
    code = (
        "from tests.confine.jails import shell, needs_jail, REASON\n"
        "assert not REASON, REASON\n"
        "ran = shell('id -u; echo x > /out/one/x; cat /proc/1/environ', outputs={'one': 10})\n"
        "print(ran.stdout.split(), ran.exit.code)\n"
    )
    site = ":".join(path for path in sys.path if "site-packages" in path)
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", PYTHON, "-c", code]
    done = subprocess.run(
        command,
        cwd=root,
        env={"PYTHONPATH": f"{root}:{root / 'src'}:{site}", "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "No module named" in done.stderr or "ermission denied: '/" in done.stderr:
        pytest.skip(f"{PYTHON} cannot import the package as nobody here")
    assert done.stdout.strip() == "['1000'] 1", done.stderr
