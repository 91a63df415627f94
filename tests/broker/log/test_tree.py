"""RFC 6962 trees against a second, naive implementation and against wrong proofs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.broker.log.tree import EMPTY_ROOT, Tree, leaf_hash, verify_consistency, verify_inclusion
from cloister.errors import TamperedError

# The leaves that RFC 6962 implementations test with, and the roots of the first 1 to 8 of them.
LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOT_1 = "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
ROOT_8 = "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"
SIZES = range(1, 65)


def naive_root(data: Sequence[bytes]) -> bytes:
    """RFC 6962 2.1, word for word."""
    if not data:
        return hashlib.sha256().digest()
    if len(data) == 1:
        return hashlib.sha256(b"\x00" + data[0]).digest()
    k = 1
    while k * 2 < len(data):
        k *= 2
    return hashlib.sha256(b"\x01" + naive_root(data[:k]) + naive_root(data[k:])).digest()


def naive_path(index: int, data: Sequence[bytes]) -> list[bytes]:
    """RFC 6962 2.1.1, word for word."""
    if len(data) == 1:
        return []
    k = 1
    while k * 2 < len(data):
        k *= 2
    if index < k:
        return [*naive_path(index, data[:k]), naive_root(data[k:])]
    return [*naive_path(index - k, data[k:]), naive_root(data[:k])]


def naive_subproof(m: int, data: Sequence[bytes], whole: bool) -> list[bytes]:
    """RFC 6962 2.1.2, word for word."""
    if m == len(data):
        return [] if whole else [naive_root(data)]
    k = 1
    while k * 2 < len(data):
        k *= 2
    if m <= k:
        return [*naive_subproof(m, data[:k], whole), naive_root(data[k:])]
    return [*naive_subproof(m - k, data[k:], False), naive_root(data[:k])]


DATA = [bytes([n]) * (n % 5) + bytes([n]) for n in SIZES]
TREE = Tree(leaf_hash(data) for data in DATA)


def test_reference_roots() -> None:
    tree = Tree(leaf_hash(data) for data in LEAVES)
    assert tree.root(0) == EMPTY_ROOT == hashlib.sha256(b"").digest()
    assert tree.root(1).hex() == ROOT_1
    assert tree.root().hex() == ROOT_8
    assert [tree.root(n) for n in range(9)] == [naive_root(LEAVES[:n]) for n in range(9)]


@pytest.mark.parametrize("size", SIZES)
def test_every_root_and_proof_is_the_one_of_the_rfc_and_verifies(size: int) -> None:
    data, root = DATA[:size], TREE.root(size)
    assert root == naive_root(data)
    for index in range(size):
        proof = TREE.inclusion(index, size)
        assert list(proof) == naive_path(index, data)
        verify_inclusion(leaf_hash(data[index]), index, size, proof, root)
    for old in range(1, size + 1):
        steps = TREE.consistency(old, size)
        assert list(steps) == naive_subproof(old, data, True)
        verify_consistency(old, TREE.root(old), size, root, steps)
    assert TREE.consistency(0, size) == ()
    verify_consistency(0, EMPTY_ROOT, size, root, ())


@pytest.mark.parametrize("size", range(1, 25))
def test_a_proof_of_one_leaf_proves_no_other(size: int) -> None:
    root = TREE.root(size)
    for index in range(size):
        for other in range(size):
            if other == index:
                continue
            with pytest.raises(TamperedError):
                verify_inclusion(TREE.leaf(index), other, size, TREE.inclusion(index, size), root)
            with pytest.raises(TamperedError):
                verify_inclusion(TREE.leaf(other), index, size, TREE.inclusion(index, size), root)


@pytest.mark.parametrize("size", range(2, 25))
def test_a_proof_of_one_old_size_proves_no_other(size: int) -> None:
    root = TREE.root(size)
    for old in range(1, size):
        for other in range(1, size + 2):
            if other == old:
                continue
            claimed = TREE.root(min(other, size))
            with pytest.raises(TamperedError):
                verify_consistency(other, claimed, size, root, TREE.consistency(old, size))


def changed(proof: Sequence[bytes], draw: st.DataObject) -> list[bytes]:
    """One fault: a bit, a hash left out, doubled, exchanged, shortened."""
    hashes = list(proof)
    kind = draw.draw(st.sampled_from(["bit", "drop", "double", "swap", "short", "extra"]))
    at = draw.draw(st.integers(0, max(0, len(hashes) - 1)))
    if kind == "extra" or not hashes:
        hashes.insert(at, bytes(32))
    elif kind == "bit":
        value = bytearray(hashes[at])
        value[draw.draw(st.integers(0, 31))] ^= 1 << draw.draw(st.integers(0, 7))
        hashes[at] = bytes(value)
    elif kind == "drop":
        del hashes[at]
    elif kind == "double":
        hashes.insert(at, hashes[at])
    elif kind == "swap" and len(hashes) > 1:
        hashes[at], hashes[at - 1] = hashes[at - 1], hashes[at]
    else:
        hashes[at] = hashes[at][:-1]
    return hashes


@given(size=st.integers(1, 64), draw=st.data())
def test_a_changed_inclusion_proof_is_refused(size: int, draw: st.DataObject) -> None:
    index = draw.draw(st.integers(0, size - 1))
    proof = TREE.inclusion(index, size)
    with pytest.raises(TamperedError) as refused:
        verify_inclusion(TREE.leaf(index), index, size, changed(proof, draw), TREE.root(size))
    assert refused.value.code == "log-tampered"


@given(size=st.integers(1, 64), draw=st.data())
def test_a_changed_consistency_proof_is_refused(size: int, draw: st.DataObject) -> None:
    old = draw.draw(st.integers(0, size))
    proof = changed(TREE.consistency(old, size), draw)
    with pytest.raises(TamperedError):
        verify_consistency(old, TREE.root(old), size, TREE.root(size), proof)


@given(size=st.integers(1, 64), draw=st.data())
def test_a_foreign_root_is_refused(size: int, draw: st.DataObject) -> None:
    old, index = draw.draw(st.integers(0, size)), draw.draw(st.integers(0, size - 1))
    foreign = draw.draw(st.binary(min_size=32, max_size=32))
    with pytest.raises(TamperedError):
        verify_inclusion(TREE.leaf(index), index, size, TREE.inclusion(index, size), foreign)
    with pytest.raises(TamperedError):
        verify_consistency(old, foreign, size, TREE.root(size), TREE.consistency(old, size))
    if old:
        with pytest.raises(TamperedError):
            verify_consistency(old, TREE.root(old), size, foreign, TREE.consistency(old, size))


@pytest.mark.parametrize(("index", "size"), [(-1, 5), (5, 5), (0, 0), (9, 5)])
def test_an_index_outside_the_tree_is_refused(index: int, size: int) -> None:
    with pytest.raises(TamperedError, match="index"):
        verify_inclusion(TREE.leaf(0), index, size, (), TREE.root(5))


def test_a_log_that_shrank_is_named_with_both_sizes() -> None:
    with pytest.raises(TamperedError) as refused:
        verify_consistency(40, TREE.root(40), 30, TREE.root(30), (), who="witness w")
    assert refused.value.reasons[0].found == "30 entries"
    assert refused.value.reasons[0].wanted == "at least 40: witness w saw 40"


@given(kept=st.integers(0, 64), added=st.integers(0, 20))
def test_truncate_undoes_appends(kept: int, added: int) -> None:
    tree = Tree(TREE.leaf(n) for n in range(kept))
    for n in range(added):
        tree.append(leaf_hash(b"lost %d" % n))
    tree.truncate(kept)
    assert (tree.size, tree.root()) == (kept, TREE.root(kept))
    for n in range(kept, 64):
        tree.append(TREE.leaf(n))
    assert tree.root() == TREE.root()


def test_a_callers_mistakes_are_value_errors() -> None:
    for call in (
        lambda: TREE.root(65),
        lambda: TREE.inclusion(5, 5),
        lambda: TREE.consistency(6, 5),
        lambda: Tree([b"short"]),
        lambda: Tree().truncate(1),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(IndexError):
        TREE.leaf(64)
