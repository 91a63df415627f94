"""The Merkle tree of RFC 6962 section 2.1: append, prove, verify. Pure; hashes are 32 bytes of SHA-256.

    leaf = SHA-256(0x00 || data)      node = SHA-256(0x01 || left || right)      root of no leaves = SHA-256("")

The tree keeps the hash of every complete subtree, level by level: level k holds one hash for each full run of 2^k
leaves. That is also what tlog-tiles serve. An append touches O(log n) hashes, amortised two; 64 bytes of memory a leaf.

Verifiers raise `TamperedError` (code `log-tampered`); they check the number of hashes before any of them, so a proof
with a hash too few or too many is refused and every valid statement has exactly one valid proof.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final

from cloister.errors import Reason, TamperedError

HASH_BYTES: Final = 32
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()


def leaf_hash(data: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _split(size: int) -> int:
    """Largest power of two smaller than `size` (size >= 2)."""
    return 1 << ((size - 1).bit_length() - 1)


class Tree:
    """An append-only tree in memory. Roots and proofs of every earlier size stay available."""

    __slots__ = ("_levels",)

    def __init__(self, leaf_hashes: Iterable[bytes] = ()) -> None:
        self._levels: list[bytearray] = [bytearray()]
        for value in leaf_hashes:
            self.append(value)

    @property
    def size(self) -> int:
        return len(self._levels[0]) // HASH_BYTES

    def append(self, value: bytes) -> int:
        """Add a leaf hash; return its index (from 0)."""
        if len(value) != HASH_BYTES:
            raise ValueError(f"leaf hash of {len(value)} bytes, wanted {HASH_BYTES}")
        index = self.size
        level = 0
        self._levels[0] += value
        count = index + 1
        while count % 2 == 0:
            value = node_hash(bytes(self._levels[level][-2 * HASH_BYTES : -HASH_BYTES]), value)
            level += 1
            count //= 2
            if level == len(self._levels):
                self._levels.append(bytearray())
            self._levels[level] += value
        return index

    def truncate(self, size: int) -> None:
        """Forget every leaf from index `size` on: undoes appends that did not become durable."""
        if not 0 <= size <= self.size:
            raise ValueError(f"cannot cut a tree of {self.size} leaves to {size}")
        for level, hashes in enumerate(self._levels):
            del hashes[(size >> level) * HASH_BYTES :]

    def leaf(self, index: int) -> bytes:
        """Return the leaf hash at `index`."""
        if not 0 <= index < self.size:
            raise IndexError(f"leaf {index} of {self.size}")
        return self._complete(0, index)

    def _complete(self, level: int, position: int) -> bytes:
        return bytes(self._levels[level][position * HASH_BYTES : (position + 1) * HASH_BYTES])

    def _range(self, start: int, end: int) -> bytes:
        """MTH(D[start:end]); start is a multiple of the largest power of two that fits."""
        size = end - start
        level = size.bit_length() - 1
        if size == 1 << level:
            return self._complete(level, start >> level)
        middle = start + _split(size)
        return node_hash(self._range(start, middle), self._range(middle, end))

    def _check_size(self, size: int | None) -> int:
        size = self.size if size is None else size
        if not 0 <= size <= self.size:
            raise ValueError(f"size {size} of a tree with {self.size} leaves")
        return size

    def root(self, size: int | None = None) -> bytes:
        """Return the root of the first `size` leaves (all, if None)."""
        size = self._check_size(size)
        return self._range(0, size) if size else EMPTY_ROOT

    def inclusion(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """Return the audit path of leaf `index` in the first `size` leaves, leaf end first (RFC 6962 2.1.1)."""
        size = self._check_size(size)
        if not 0 <= index < size:
            raise ValueError(f"leaf {index} is not among the first {size}")
        path: list[bytes] = []
        start, end = 0, size
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._range(middle, end))
                end = middle
            else:
                path.append(self._range(start, middle))
                start = middle
        return tuple(reversed(path))

    def consistency(self, old: int, size: int | None = None) -> tuple[bytes, ...]:
        """Return the proof that the first `old` leaves are a prefix of the first `size` (RFC 6962 2.1.2).

        Empty for old = 0 and for old = size: there is nothing to prove then.
        """
        size = self._check_size(size)
        if not 0 <= old <= size:
            raise ValueError(f"old size {old} is not within {size}")
        if old in (0, size):
            return ()
        path: list[bytes] = []
        start, end = 0, size
        while old != end:
            middle = start + _split(end - start)
            if old <= middle:
                path.append(self._range(middle, end))
                end = middle
            else:
                path.append(self._range(start, middle))
                start = middle
        if start:  # the old tree is not a complete subtree on the left edge: its last part opens the proof
            path.append(self._range(start, end))
        return tuple(reversed(path))


def _tampered(what: str, found: str, wanted: str) -> TamperedError:
    reason = Reason(where=f"log.{what}", found=found, wanted=wanted)
    return TamperedError(f"log: {what}: wants {wanted}, found {found}", code="log-tampered", reasons=[reason])


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Check that the leaf hash `leaf` stands at `index` in the tree of `size` leaves with `root`.

    Raises:
        TamperedError: (log-tampered) it does not, or the proof has another length than index and size demand.
    """
    if not 0 <= index < size:
        raise _tampered("inclusion", f"index {index} of {size}", "an index below the size")
    # From the leaf up: `low` counts the levels where the path has a sibling on either side, `high` the left siblings
    # that remain above the last level in which this node is the right-most one (RFC 9162 2.1.3.2, in closed form).
    low = (index ^ (size - 1)).bit_length()
    high = (index >> low).bit_count()
    if len(proof) != low + high or any(len(value) != HASH_BYTES for value in proof):
        raise _tampered("inclusion", f"{len(proof)} hashes", f"{low + high} hashes of 32 bytes")
    value = leaf
    for level, sibling in enumerate(proof[:low]):
        value = node_hash(sibling, value) if index >> level & 1 else node_hash(value, sibling)
    for sibling in proof[low:]:
        value = node_hash(sibling, value)
    if value != root:
        raise _tampered("inclusion", f"root {value.hex()[:16]}… from the proof", f"root {root.hex()[:16]}…")


def verify_consistency(
    old_size: int,
    old_root: bytes,
    size: int,
    root: bytes,
    proof: Sequence[bytes],
    *,
    who: str = "the earlier checkpoint",
) -> None:
    """Check that the tree (`size`, `root`) extends the tree (`old_size`, `old_root`), which `who` vouches for.

    Raises:
        TamperedError: (log-tampered) the log shrank, its history differs, or the proof has another length.
    """
    if not 0 <= old_size <= size:
        raise _tampered("consistency", f"{size} entries", f"at least {old_size}: {who} saw {old_size}")
    if old_size in (0, size):
        if proof:
            raise _tampered("consistency", f"{len(proof)} hashes", "an empty proof")
        if old_size == 0 and old_root != EMPTY_ROOT:
            raise _tampered("consistency", f"root {old_root.hex()[:16]}…", "the root of an empty log")
        if size == old_size and root != old_root:
            raise _tampered(
                "consistency",
                f"root {root.hex()[:16]}… at size {size}: history differs",
                f"root {old_root.hex()[:16]}…",
            )
        return
    # RFC 9162 2.1.4.2. `node` and `last` walk up from the right edges of the old and the new tree.
    node, last = old_size - 1, size - 1
    shift = (~node & (node + 1)).bit_length() - 1  # levels in which the old tree's right edge is a right child
    node, last = node >> shift, last >> shift
    given = list(proof)
    if node == 0:
        given.insert(0, old_root)  # the old tree is one complete subtree: its root starts the walk
    low = (node ^ last).bit_length()
    wanted = 1 + low + (node >> low).bit_count()
    if len(given) != wanted or any(len(value) != HASH_BYTES for value in given):
        raise _tampered(
            "consistency", f"{len(proof)} hashes", f"{wanted - (len(given) - len(proof))} hashes of 32 bytes"
        )
    before = after = given[0]
    for value in given[1:]:
        if node & 1 or node == last:
            before, after = node_hash(value, before), node_hash(value, after)
            while node and not node & 1:
                node, last = node >> 1, last >> 1
        else:
            after = node_hash(after, value)
        node, last = node >> 1, last >> 1
    if before != old_root:
        raise _tampered(
            "consistency",
            f"root {before.hex()[:16]}… at size {old_size}: history differs",
            f"root {old_root.hex()[:16]}…, which {who} saw",
        )
    if after != root:
        raise _tampered(
            "consistency",
            f"root {after.hex()[:16]}… at size {size} from the proof: history differs, or the proof is another's",
            f"root {root.hex()[:16]}…",
        )
