"""Where keys live: pages that are never dumped, never swapped, and hidden from root where the kernel can.

Two steps, both best effort and both reported by `harden_process()`:

1. `SecretArena` keeps the bytes of every `Secret` in one mapping: memfd_secret(2) where the kernel has it (other
   processes, root included, cannot read it through /proc/PID/mem), else anonymous memory that is locked and left out
   of core dumps.
2. `harden_process` forbids core dumps and ptrace by the same uid (PR_SET_DUMPABLE 0, RLIMIT_CORE 0) and locks all
   pages (mlockall), because OpenSSL and Python make working copies of a key that the arena cannot hold.

A forked child gets its own copy of the arena: what the parent wipes later stays readable in the child, and the
child's wipes do not reach the parent.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

_PAGE: Final = mmap.PAGESIZE
_ARENA_BYTES: Final = 64 * 1024
_SYS_MEMFD_SECRET: Final = 447  # the same number on x86-64 and aarch64
_PR_SET_DUMPABLE: Final = 4
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4

_libc = ctypes.CDLL(None, use_errno=True)


def _map_secret() -> tuple[mmap.mmap, str]:
    fd = _libc.syscall(_SYS_MEMFD_SECRET, 0x80000)  # O_CLOEXEC
    if fd >= 0:
        try:
            os.ftruncate(fd, _ARENA_BYTES)
            return mmap.mmap(fd, _ARENA_BYTES, mmap.MAP_SHARED), "memfd_secret"
        except OSError:  # RLIMIT_MEMLOCK is too small for the arena
            pass
        finally:
            os.close(fd)
    memory = mmap.mmap(-1, _ARENA_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(16)  # MADV_DONTDUMP
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    locked = _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(_ARENA_BYTES)) == 0
    return memory, "locked memory" if locked else "plain memory"


class SecretArena:
    """Slots of 32-byte granularity inside protected pages. Thread-safe; grows by further mappings."""

    _GRAIN: Final = 32

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._maps: list[mmap.mmap] = []
        self._free: dict[int, list[tuple[int, int]]] = {}
        self._used = _ARENA_BYTES
        self._spare: list[mmap.mmap] = []
        self._dropped: deque[tuple[tuple[int, int], int]] = deque()
        self.kind = "none yet"
        os.register_at_fork(
            before=self._before_fork, after_in_parent=self._after_parent, after_in_child=self._after_child
        )

    def put(self, value: bytes) -> tuple[int, int]:
        """Store `value` (at most 64 KiB) and return its slot."""
        if len(value) > _ARENA_BYTES:
            raise ValueError(f"a secret of {len(value)} bytes, at most {_ARENA_BYTES}")
        size = self._room(len(value))
        with self._lock:
            self._overwrite_dropped()
            free = self._free.get(size)
            if free:
                index, offset = free.pop()
            else:
                if self._used + size > _ARENA_BYTES or not self._maps:
                    memory, self.kind = _map_secret()
                    self._maps.append(memory)
                    self._used = 0
                index, offset = len(self._maps) - 1, self._used
                self._used += size
            self._maps[index][offset : offset + len(value)] = value
        self._try_overwrite()
        return index, offset

    def get(self, slot: tuple[int, int], size: int) -> bytes:
        index, offset = slot
        return self._maps[index][offset : offset + size]

    def wipe(self, slot: tuple[int, int], size: int) -> None:
        """Overwrite the slot with zeros and make it free.

        Called from `__del__`, so perhaps by the garbage collector in the middle of `put` of the same thread: it never waits
        for the lock. Whoever holds the lock then overwrites before he returns.
        """
        self._dropped.append((slot, size))
        self._try_overwrite()

    def _try_overwrite(self) -> None:
        while self._dropped and self._lock.acquire(blocking=False):
            try:
                self._overwrite_dropped()
            finally:
                self._lock.release()

    def _overwrite_dropped(self) -> None:
        """Holds the lock."""
        while self._dropped:
            (index, offset), size = self._dropped.popleft()
            self._maps[index][offset : offset + size] = bytes(size)
            self._free.setdefault(self._room(size), []).append((index, offset))

    def _room(self, size: int) -> int:
        return max(1, -(-size // self._GRAIN)) * self._GRAIN

    # A fork shares MAP_SHARED pages, so each child gets a copy that was made before the fork.
    def _before_fork(self) -> None:
        self._lock.acquire()
        self._spare = []
        for memory in self._maps:
            copy, _ = _map_secret()
            copy[:] = memory[:]
            self._spare.append(copy)

    def _after_parent(self) -> None:
        for copy in self._spare:
            copy.close()  # the pages belong to the child now; wiping them here would wipe its keys
        self._spare = []
        self._lock.release()
        self._try_overwrite()

    def _after_child(self) -> None:
        self._maps, self._spare = self._spare, []
        self._lock.release()
        self._try_overwrite()


ARENA: Final = SecretArena()


@dataclass(frozen=True, slots=True)
class Hardening:
    """What the kernel granted; `doctor` prints it."""

    keys_in: str
    core_dumps_off: bool
    pages_locked: bool


def harden_process() -> Hardening:
    """Forbid core dumps and same-uid ptrace, lock pages. Idempotent; never raises, reports what it got."""
    slot = ARENA.put(b"\x00")
    ARENA.wipe(slot, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    dumpable_off = _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0
    try:
        hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    except (OSError, ValueError):
        pass
    locked = _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) == 0
    return Hardening(keys_in=ARENA.kind, core_dumps_off=dumpable_off, pages_locked=locked)
