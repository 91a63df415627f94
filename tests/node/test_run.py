"""`cloister run` end to end, as commands of a user: what goes wrong, what is said, what is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e_support import Deal, World, descendants, gone, no_traces, parents

pytestmark = pytest.mark.slow

SEALED = {"records.sealed"}
DONE = {"records.sealed", "model.sealed", "model.sealed.provenance.json"}


def opened(world: World, deal: Deal, volume: Path | None = None) -> Path:
    """The files of the model, as its owner gets them."""
    back = world.fresh("back") / "files"
    source = volume or deal.model
    world.hospital.call(
        "open", str(source), "--to", str(back), "--contract", str(deal.file), "--asset", "model"
    ).expect(0)
    return back


# --- the way it should go ---------------------------------------------------------------------------------------------


def test_a_run_leaves_a_sealed_registered_output_with_its_provenance(world: World) -> None:
    deal = world.deal({"give": {"model.json": '{"weights": 7}'}})
    with no_traces(deal, DONE):
        said = world.cloud.run(*deal.run()).expect(0)
    assert said.data["outputs"]["model"]["generation"] == 1
    provenance = json.loads((deal.folder / "model.sealed.provenance.json").read_text())
    assert provenance["outputs"]["model"]["digest"] == said.data["outputs"]["model"]["digest"]
    assert provenance["code"]["digest"] == world.digests["trainer"]
    assert (opened(world, deal) / "model.json").read_text() == '{"weights": 7}'
    assert world.cloud.run(*deal.run()).expect(0).data["outputs"]["model"]["generation"] == 2


def test_only_the_owner_gets_the_key_of_an_output(world: World) -> None:
    deal = world.deal()
    world.cloud.run(*deal.run()).expect(0)
    for person, status in (("vendor", 3), ("cloud", 3), ("stranger", 3)):
        target = world.fresh("mine") / "files"
        said = world.people[person].call(
            "open", str(deal.model), "--to", str(target), "--contract", str(deal.file), "--asset", "model"
        )
        assert said.status == status, said
        assert said.data["reasons"]
        assert not target.exists()


def test_outside_its_process_nobody_sees_the_mounted_data(world: World) -> None:
    deal = world.deal({"do": "sleep"})
    child = world.cloud.start(*deal.run())
    program = child.program()
    with no_traces(deal, SEALED):
        ours = Path("/proc/self/mounts").read_text()
        assert "cloister" not in ours
        inside = Path(f"/proc/{program}/mounts").read_text()
        assert "/data/records" in inside, "the program itself has it"
        child.send(signal.SIGTERM)
        child.end()


# --- stopped ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C"), (signal.SIGHUP, "SIGHUP")],
)
def test_a_signal_ends_everything_and_seals_nothing(world: World, number: signal.Signals, name: str) -> None:
    deal = world.deal({"do": "sleep"})
    with no_traces(deal, SEALED):
        child = world.cloud.start(*deal.run(), as_json=False)
        program = child.program()
        family = descendants(child.pid)
        assert program in family
        child.send(number)
        said = child.end(15).expect(1)
        assert gone(family)
    last = said.err.splitlines()[-1]
    assert last == f"stopped by {name}; nothing was sealed"
    assert not said.out


def test_a_stopped_run_is_one_json_object_for_programs(world: World) -> None:
    deal = world.deal({"do": "sleep"})
    child = world.cloud.start(*deal.run())
    child.program()
    child.send(signal.SIGINT)
    error = child.end(15).expect(1).data
    assert error["error"] == "interrupted"
    assert error["family"] == "machine"


@pytest.mark.parametrize("after_s", [0.05, 0.2, 0.35, 0.5, 0.65])
def test_a_signal_at_any_moment_is_one_line_and_leaves_nothing(world: World, after_s: float) -> None:
    deal = world.deal({"do": "sleep"})
    with no_traces(deal, SEALED):
        child = world.cloud.start(*deal.run(), as_json=False)
        # the interpreter's own start is not ours: wait until the command line is in charge
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not _handles(child.pid, signal.SIGTERM):
            time.sleep(0.005)
        time.sleep(after_s)
        family = descendants(child.pid)
        child.send(signal.SIGTERM)
        said = child.end(15).expect(1)
        assert gone(family)
    assert said.err.splitlines()[-1].startswith("stopped by SIGTERM")


def _handles(pid: int, number: signal.Signals) -> bool:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(caught & 1 << number - 1)


def test_kill_9_of_the_command_takes_jail_mounts_and_workers_with_it(world: World) -> None:
    deal = world.deal({"do": "sleep"})
    with no_traces(deal, SEALED):
        child = world.cloud.start(*deal.run())
        child.program()
        family = descendants(child.pid)
        assert len(family) >= 4, "command, FUSE worker, jail, program"
        os.kill(child.pid, signal.SIGKILL)
        assert child.end(15).status == -signal.SIGKILL
        assert gone(family)
    again = world.cloud.start(*deal.run())  # nothing is locked by the dead
    again.program()
    again.send(signal.SIGTERM)
    again.end(15)


def test_kill_9_of_the_program_is_explained(world: World) -> None:
    deal = world.deal({"do": "sleep"})
    with no_traces(deal, SEALED):
        child = world.cloud.start(*deal.run())
        os.kill(child.program(), signal.SIGKILL)
        error = child.end(15).expect(1).data
    assert error["error"] == "workload-failed"
    assert "nothing was sealed" in error["message"]
    assert "9" in error["reasons"][0]["found"]


def test_kill_9_of_the_fuse_workers_loses_the_input_not_the_node(world: World) -> None:
    """Whoever can kill the worker can only stop the run: nothing is sealed from what it read half."""
    size = 24 << 20
    deal = world.deal({"do": "read", "file": "big"}, files={"big": os.urandom(size)})
    with no_traces(deal, SEALED):
        child = world.cloud.start(*deal.run(), before=_SLOW_FUSE)
        child.program()
        workers = _workers(child.pid)
        assert workers
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        said = child.end(30)
    assert said.status == 1, said
    assert "nothing was sealed" in said.data["message"]


_SLOW_FUSE = """
import time
from cloister.volume import read
whole = read.Volume.read_into
def slowly(self, *args):
    time.sleep(0.05)
    return whole(self, *args)
read.Volume.read_into = slowly
"""


def _workers(pid: int) -> list[int]:
    """FUSE supervisor and workers: children without a command line of their own interpreter start."""
    table = parents()
    direct = [one for one, parent in table.items() if parent == pid]
    mine = Path(f"/proc/{pid}/cmdline").read_bytes()
    forks = [one for one in direct if Path(f"/proc/{one}/cmdline").read_bytes() == mine]
    return forks + [one for fork in forks for one in descendants(fork)]


# --- the program fails ------------------------------------------------------------------------------------------------


def test_a_program_that_fails_seals_nothing_and_its_words_stay_inside(world: World) -> None:
    deal = world.deal({"do": "exit", "status": 7})
    with no_traces(deal, SEALED):
        said = world.cloud.run(*deal.run(), as_json=False).expect(1)
    assert "the program did not succeed; nothing was sealed" in said.err
    assert "workload: wants exit status 0, found exit status 7" in said.err
    assert "its words stay inside" in said.err
    assert "Bob" not in said.err + said.out


def test_a_party_with_logs_sees_the_words_and_no_terminal_tricks(world: World) -> None:
    deal = world.deal({"do": "bytes"}, train='metrics_to = ["cloud"]\nleaves = ["metrics", "logs"]\n')
    said = world.cloud.run(*deal.run(), as_json=False).expect(0)
    assert "loss 0.25" in said.err
    assert "\x1b" not in said.err
    assert "\x07" not in said.err
    assert "\u202e" not in said.err
    blind = world.lab.run(*deal.run(), as_json=False).expect(0)
    assert "loss" not in blind.err
    assert blind.err


def test_an_endless_line_fills_no_memory(world: World) -> None:
    deal = world.deal({"do": "line"})
    before = "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))"
    world.cloud.run(*deal.run(), before=before).expect(0)


def test_out_of_memory_is_named_with_its_limit(world: World) -> None:
    deal = world.deal({"do": "memory", "mib": 200})
    small = """
import cloister.node.run as run
from cloister.confine.profile import Limits, profile
whole = run.launch
def little(job, chosen, *, level):
    return whole(job, profile(chosen.name, limits=Limits(memory_bytes=96 << 20)), level=level)
run.launch = little
"""
    with no_traces(deal, SEALED):
        error = world.cloud.run(*deal.run(), before=small).expect(1).data
    assert error["error"] == "workload-failed"
    assert "memory" in error["reasons"][0]["found"] or error["reasons"][0]["found"] == "exit status 1"


@pytest.mark.parametrize(
    ("orders", "code", "found"),
    [
        ({"do": "nothing"}, "workload-failed", "no files"),
        ({"do": "link"}, "source-unsealable", "symbolic link"),
        ({"do": "fifo"}, "workload-failed", "exit status 1"),  # the jail has no mknod
        ({"do": "many"}, "workload-failed", "exit status 1"),
    ],
)
def test_hostile_outputs_are_refused_with_the_reason(
    world: World, orders: dict[str, object], code: str, found: str
) -> None:
    deal = world.deal(orders)
    with no_traces(deal, SEALED):
        error = world.cloud.run(*deal.run()).data
    assert error["error"] == code
    assert found in error["reasons"][0]["found"]
    assert error["exit_status"] in (1, 2)


def test_more_than_the_contracts_size_does_not_fit(world: World) -> None:
    deal = world.deal({"do": "much", "mib": 9}, train='size = { model = "4 MiB" }\n')
    with no_traces(deal, SEALED):
        said = world.cloud.run(*deal.run())
    assert said.status in (1, 2)
    assert "Traceback" not in said.err


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
def test_a_full_disk_at_sealing_leaves_the_old_generation(world: World) -> None:
    first = {"do": "big", "mib": 1}
    deal = world.deal(first)
    place = world.fresh("small")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "small", str(place)], check=True)
    try:
        target = place / "model.sealed"
        old = world.cloud.run(*deal.run(out=target)).expect(0).data["outputs"]["model"]["digest"]
        (place / "filler").write_bytes(bytes(1 << 20))
        error = world.cloud.run(*deal.run(out=target)).expect(1).data
        assert error["error"] == "disk-full"
        assert "nothing was changed" in error["message"]
        left = {path.name for path in place.iterdir()}
        assert left == {"model.sealed", "model.sealed.lock", "model.sealed.provenance.json", "filler"}
        (place / "filler").unlink()
        opened(world, deal, target)
        assert world.cloud.run(*deal.run(out=target)).expect(0).data["outputs"]["model"]["digest"] != old
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_two_runs_on_one_output_the_second_is_told(world: World) -> None:
    deal = world.deal({"do": "sleep"})
    first = world.cloud.start(*deal.run())
    first.program()
    error = world.cloud.run(*deal.run()).expect(1).data
    assert error["error"] == "busy"
    assert "another run" in error["message"]
    assert error["hint"]
    first.send(signal.SIGTERM)
    first.end(15)


def test_an_output_folder_that_does_not_exist_is_named(world: World) -> None:
    deal = world.deal()
    error = world.cloud.run(*deal.run(out=deal.folder / "no" / "such" / "model")).expect(2).data
    assert "No such file" in error["message"]


def test_something_in_the_way_of_the_first_output_is_kept(world: World) -> None:
    deal = world.deal()
    deal.model.mkdir()
    (deal.model / "thesis.txt").write_text("mine")
    error = world.cloud.run(*deal.run()).expect(2).data
    assert "no version" in error["message"]
    assert (deal.model / "thesis.txt").read_text() == "mine"


# --- the machine ------------------------------------------------------------------------------------------------------

_NO_FUSE = """
from pathlib import Path
import cloister.node.volumes as v
whole = v.mount
v.mount = lambda volume, at: whole(volume, at, device=Path("/dev/no-fuse"))
"""
_NO_BUBBLEWRAP = """
import dataclasses
from cloister.confine import probe
whole = probe.facts
probe.facts = lambda: dataclasses.replace(whole(), bwrap="", bwrap_version=())
"""
_NO_NAMESPACES = """
import errno
from cloister.volume.fuse import linux
def no(flags):
    raise OSError(errno.EPERM, "Operation not permitted")
linux.unshare = no
"""


@pytest.mark.parametrize(
    ("before", "code", "words"),
    [
        (_NO_FUSE, "no-mount", "modprobe fuse"),
        (_NO_BUBBLEWRAP, "no-sandbox", "apt install bubblewrap"),
        (_NO_NAMESPACES, "no-mount", "run as root"),
    ],
)
def test_what_the_machine_lacks_is_said_with_what_to_do(world: World, before: str, code: str, words: str) -> None:
    deal = world.deal()
    with no_traces(deal, SEALED):
        error = world.cloud.run(*deal.run(), before=before).expect(1).data
    assert error["error"] == code
    assert words in json.dumps(error), error


# --- an attack by name ------------------------------------------------------------------------------------------------

_OTHER_NAMESPACE = """
import os, sys
from pathlib import Path
from cloister.crypto.keys import Secret
from cloister.volume.read import Volume
from cloister.volume.seal import seal

pid, number, target, back = sys.argv[1:]
key = Secret.random()
seal(Path(f"/proc/{pid}/fd/{number}/."), Path(target), key=key)
Volume.open(Path(target), key, expect=None).extract(Path(back))
"""

_HOLDER = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x20000) == 0
assert libc.mount(None, b"/", None, 0x4000 | 1 << 18, None) == 0
assert libc.mount(b"none", b"/sys/dev", b"tmpfs", 0, b"") == 0
open("/sys/dev/inside", "w").write("this folder")
print(os.open("/sys/dev", os.O_RDONLY), flush=True)
time.sleep(60)
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="makes a mount namespace")
def test_an_output_of_another_mount_namespace_is_sealed_as_itself_and_not_as_the_nodes_root(tmp_path: Path) -> None:
    """realpath() of a folder that is not below our root is "/": sealing that would have sealed the whole node."""
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        number = holder.stdout.readline().strip()
        assert os.path.realpath(f"/proc/{holder.pid}/fd/{number}/.") in ("/", "/sys/dev"), "the trap is there"
        words = [str(holder.pid), number, str(tmp_path / "sealed"), str(tmp_path / "back")]
        subprocess.run([sys.executable, "-c", _OTHER_NAMESPACE, *words], check=True, timeout=30)
    finally:
        holder.kill()
        holder.communicate()
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["inside"]
    assert (tmp_path / "back" / "inside").read_text() == "this folder"


def test_the_operators_disk_holds_no_plaintext_at_any_time(world: World) -> None:
    """Searched while the program has everything open, and after it was killed: homes, outputs, temporary folder."""
    word = "Patient-" + os.urandom(12).hex()
    deal = world.deal({"do": "sleep", "give": {"model.json": word, "labels.json": "[]"}})

    def places() -> list[Path]:
        node = world.cloud.home / "node"
        return [
            path
            for root in (deal.folder, world.cloud.home, *Path("/tmp").glob("cloister*"))
            for path in root.rglob("*")
            if path.is_file() and node not in path.parents
        ]

    child = world.cloud.start(*deal.run())
    child.program()
    during = [path for path in places() if word.encode() in path.read_bytes()]
    os.kill(child.pid, signal.SIGKILL)
    child.end()
    after = [path for path in places() if word.encode() in path.read_bytes()]
    assert not during
    assert not after
    control = deal.folder.parent / "records" / "orders.json"
    assert word.encode() in control.read_bytes(), "the search finds it where it is"


def test_an_input_with_a_flipped_bit_stops_the_run(world: World) -> None:
    deal = world.deal({"do": "read", "file": "big"}, files={"big": os.urandom(200_000)})
    copy = deal.folder / "copy.sealed"
    shutil.copytree(deal.records, copy)
    segment = copy / "data" / "00000000"
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with no_traces(deal, {"records.sealed", "copy.sealed"}):
        error = world.cloud.run(*deal.run(records=copy)).expect(1).data
    assert error["error"] == "volume-tampered"
    assert error["hint"]
