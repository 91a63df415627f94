"""Attacks and accidents on a live mount: changed ciphertext, killed processes, bugs. Right bytes or an error, never a hang."""

from __future__ import annotations

import errno
import faulthandler
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cloister.volume.fuse import Fault, Mount, linux, mount
from cloister.volume.types import CHUNK
from tests.volume.fuse.fake import file, make_volume, tampered
from tests.volume.fuse.test_mount import blob, wait_until

pytestmark = pytest.mark.root

Mounter = Callable[..., Mount]


def readable_pages(path: Path, data: bytes) -> set[int]:
    """Numbers of the 4 KiB pages that can be read; fails if one holds wrong bytes."""
    good = set()
    with path.open("rb", buffering=0) as opened:
        for page in range(-(-len(data) // 4096)):
            try:
                got = os.pread(opened.fileno(), 4096, page * 4096)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
            else:
                assert got == data[page * 4096 : (page + 1) * 4096]
                good.add(page)
    return good


def test_tampered_records_are_unreadable_and_nothing_else(mounted: Mounter) -> None:
    data = blob(40 * CHUNK)
    volume = make_volume({b"0": file(b"0" * 5000), b"x": file(data)})  # x starts in the middle of a chunk
    volume.bad = {7: tampered(), 8: tampered(), 20: OSError(errno.EIO, "disk")}
    made = mounted(volume)
    start = volume.tree.data_off[2]
    lost = {
        page
        for chunk in (7, 8, 20)
        for page in range((chunk * CHUNK - start) // 4096, ((chunk + 1) * CHUNK - start) // 4096)
    }
    assert len(lost) == 48
    assert readable_pages(made.at / "x", data) == set(range(640)) - lost
    assert made.faults() == (
        Fault("x", 7 * CHUNK - start, CHUNK, 7, "tampered"),
        Fault("x", 8 * CHUNK - start, CHUNK, 8, "tampered"),
        Fault("x", 20 * CHUNK - start, CHUNK, 20, "unreadable"),
    )
    assert made.alive
    with pytest.raises(OSError) as caught:
        (made.at / "x").read_bytes()
    assert caught.value.errno == errno.EIO


def test_a_mapping_of_a_tampered_page_dies_by_sigbus(mounted: Mounter) -> None:
    data = blob(4 * CHUNK)
    volume = make_volume({b"x": file(data)})
    volume.bad = {2: tampered()}
    path = mounted(volume).at / "x"
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()  # pytest's; it would print a page
        with path.open("rb") as opened:
            view = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
        if view[CHUNK : CHUNK + 10] == data[CHUNK : CHUNK + 10]:
            view[2 * CHUNK]
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGBUS


def need_resend(made: Mount) -> None:
    if not made.can_restart:
        pytest.skip("needs FUSE_NOTIFY_RESEND (Linux 6.9)")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_of_workers_under_load_is_not_noticed(mounted: Mounter, workers: int) -> None:
    data = {b"%d" % index: file(blob(3_000_000, index)) for index in range(4)}
    made = mounted(make_volume(data), workers=workers)
    need_resend(made)
    stop = threading.Event()
    done: list[bytes] = []
    wrong: list[object] = []

    def read(name: bytes) -> None:
        fd = os.open(made.at / os.fsdecode(name), os.O_RDONLY)
        try:
            while not stop.is_set():
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # cold again
                if os.pread(fd, 1 << 22, 0) != data[name].data:
                    wrong.append(name)
                done.append(name)
        except OSError as error:
            wrong.append(error)
        finally:
            os.close(fd)

    threads = [threading.Thread(target=read, args=(name,), daemon=True) for name in data]
    for thread in threads:
        thread.start()
    for _ in range(12):
        time.sleep(0.1)
        victims = made.workers()
        if victims:
            os.kill(random.choice(victims), signal.SIGKILL)
    before = len(done)
    assert wait_until(lambda: len(done) > before + 8)
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "a reader hangs"
    assert wrong == []
    assert made.alive
    assert set(made.deaths()) == {-signal.SIGKILL}
    assert len(made.deaths()) >= 10


def test_a_request_that_kills_every_worker_ends_the_mount(mounted: Mounter) -> None:
    """Restarts are bounded: readers get an error, not a loop; and the rest was served until then."""
    volume = make_volume({b"good": file(b"good"), b"poison": file(blob(3 * CHUNK))})
    volume.poison = 2
    made = mounted(volume)
    assert (made.at / "good").read_bytes() == b"good"
    start = time.monotonic()
    with pytest.raises(OSError) as caught:
        (made.at / "poison").read_bytes()
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert time.monotonic() - start < 20
    assert wait_until(lambda: not made.alive)
    assert set(made.errors()) == {"RuntimeError"}
    assert set(made.deaths()) == {1}
    made.close()


def test_a_dead_supervisor_takes_its_workers_along(mounted: Mounter) -> None:
    made = mounted(make_volume({b"x": file(blob(100_000)), b"y": file(b"y")}))
    assert (made.at / "x").read_bytes() == blob(100_000)
    (worker,) = made.workers()
    supervisor = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(supervisor, signal.SIGKILL)
    assert wait_until(lambda: not made.alive)
    assert wait_until(lambda: state(worker) in ("Z", ""))
    with pytest.raises(OSError) as caught:
        (made.at / "y").read_bytes()
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    made.close()


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


CRASH = """
import os, signal, sys, threading
from pathlib import Path
from cloister.volume.fuse import mount
from tests.volume.fuse.fake import file, make_volume
made = []
def run():
    made.append(mount(make_volume({b"x": file(b"1")}), Path(sys.argv[1])))
if sys.argv[2] == "thread":  # the thread that mounts ends at once: the mount must not
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
else:
    run()
print((made[0].at / "x").read_text(), made[0].workers()[0], flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("where", ["main", "thread"])
def test_kill_9_of_the_mounting_process_unmounts(tmp_path: Path, where: str) -> None:
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", CRASH, str(tmp_path), where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}/src:{root}"},
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    content, worker = process.stdout.readline().split()
    assert content == "1"
    time.sleep(0.1)
    assert (tmp_path / "x").read_text() == "1"
    process.stdin.close()
    process.wait(10)
    process.stdout.close()
    assert wait_until(lambda: linux.device_of_mount(tmp_path) is None)
    assert wait_until(lambda: state(int(worker)) in ("Z", ""))


def test_ctrl_c_is_not_for_the_workers(mounted: Mounter) -> None:
    made = mounted(make_volume({b"x": file(b"1"), b"y": file(b"y")}))
    assert (made.at / "x").read_bytes() == b"1"
    (worker,) = made.workers()
    assert os.getsid(worker) != os.getsid(0)
    os.kill(worker, signal.SIGINT)
    assert (made.at / "y").read_bytes() == b"y"
    assert made.deaths() == ()


def test_what_a_failed_mount_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INIT refused: no mount point, no process, no descriptor."""
    from cloister.errors import MachineError
    from cloister.volume.fuse import protocol
    from tests.volume.fuse.conftest import need_fuse

    need_fuse()
    monkeypatch.setattr(protocol, "OLDEST_MINOR", 99)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(MachineError, match="too old"):
        mount(make_volume({}), tmp_path)
    assert linux.device_of_mount(tmp_path) is None
    assert len(list(Path("/proc/self/fd").iterdir())) == before
