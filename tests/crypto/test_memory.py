"""Secrets survive a fork on both sides, are overwritten when dropped, and never print."""

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cloister.crypto.keys import Secret
from cloister.crypto.memory import ARENA


def in_child(check) -> int:  # type: ignore[no-untyped-def]
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_child_keeps_a_secret_that_the_parent_wipes() -> None:
    secret = Secret(b"k" * 32)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(reader, 1)
        os._exit(0 if secret.reveal() == b"k" * 32 else 1)
    del secret
    os.write(writer, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(reader)
    os.close(writer)


def test_child_that_drops_a_secret_does_not_wipe_the_parents() -> None:
    holder = [Secret(b"p" * 32)]

    def drop() -> bool:
        value = holder[0].reveal()
        holder.clear()
        return value == b"p" * 32

    assert in_child(drop) == 0
    assert holder[0].reveal() == b"p" * 32


def test_a_dropped_secret_is_overwritten() -> None:
    secret = Secret(b"once only, 32 bytes of plaintext")
    slot = secret._slot
    del secret
    assert ARENA.get(slot, 32) == bytes(32)


@pytest.mark.parametrize("show", [repr, str, "{}".format, lambda value: f"{[value]}"])
def test_a_secret_never_prints(show) -> None:  # type: ignore[no-untyped-def]
    assert "hunter2" not in show(Secret(b"hunter2"))


def test_a_secret_is_never_pickled() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(Secret(b"hunter2"))


def test_threads_never_share_a_slot() -> None:
    wrong = []

    def work(byte: int) -> None:
        for _ in range(300):
            secret = Secret(bytes([byte]) * 32)
            if secret.reveal() != bytes([byte]) * 32:
                wrong.append(byte)

    threads = [threading.Thread(target=work, args=(byte,)) for byte in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.root
def test_root_cannot_read_a_secret_through_proc_mem() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: the control below reads another process")
    Secret(b"x")
    if ARENA.kind != "memfd_secret":
        pytest.skip(f"this kernel keeps secrets in {ARENA.kind}")
    secret = Secret(b"S" * 32)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "secretmem" in line]
    start = int(maps[0].split("-")[0], 16)
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(start)
        with pytest.raises(OSError, match="error"):
            memory.read(4096)
    assert secret.reveal() == b"S" * 32


def test_a_hardened_process_dumps_nothing_and_locks_its_pages() -> None:
    program = (
        "import resource, ctypes\n"
        "from cloister.crypto.memory import harden_process\n"
        "got = harden_process()\n"
        "assert harden_process() == got\n"
        "status = open('/proc/self/status').read()\n"
        "locked = int(status.split('VmLck:')[1].split()[0])\n"
        "print(got.core_dumps_off, resource.getrlimit(resource.RLIMIT_CORE)[1], got.pages_locked == (locked > 0),\n"
        "      ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0", "True", "0"]


def test_a_secret_collected_in_the_middle_of_put_does_not_wait_for_its_own_lock() -> None:
    """The garbage collector may run `__del__` while this thread holds the arena's lock: that must not hang."""
    slot = ARENA.put(b"x" * 32)
    with ARENA._lock:
        ARENA.wipe(slot, 32)
        assert ARENA.get(slot, 32) == b"x" * 32
    Secret(b"next")
    assert ARENA.get(slot, 32) != b"x" * 32
