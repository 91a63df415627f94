"""Witness rules, pure: what is cosigned, what is refused, what a broker does with a statement."""

from __future__ import annotations

import dataclasses

import pytest

from cloister.broker.log.checkpoint import Checkpoint
from cloister.broker.log.witness import (
    Behind,
    Seen,
    Statement,
    check_extension,
    check_seen,
    epoch_request,
    open_epoch,
    open_statement,
    statement_key,
)
from cloister.crypto.keys import Secret
from cloister.crypto.note import Signer
from cloister.errors import TamperedError
from tests.broker.log.samples import LOG, NOW, ORIGIN, OTHER, WITNESS, checkpoint_of, release, story, tree_of

STORY = story()
TREE = tree_of(STORY)
FORK = tree_of([*STORY[:5], release("l-9", at=NOW), *STORY[6:]])
NONCE = b"n" * 32
SPEAKER = Signer(WITNESS.name, Secret(b"W" * 32))


def seen(size: int, epoch: int = 3) -> Seen:
    return Seen(Checkpoint(ORIGIN, size, TREE.root(size)), epoch)


@pytest.mark.parametrize("old", range(len(STORY) + 1))
def test_a_consistent_extension_in_the_epoch_is_remembered(old: int) -> None:
    for size in range(old, len(STORY) + 1):
        new = check_extension(
            seen(old),
            epoch=3,
            old_size=old,
            proof=TREE.consistency(old, size),
            checkpoint=checkpoint_of(TREE, size),
            log_key=LOG.verifier,
        )
        assert new == seen(size)


def test_a_forked_log_is_not_cosigned() -> None:
    with pytest.raises(TamperedError, match="history differs"):
        check_extension(
            seen(8),
            epoch=3,
            old_size=8,
            proof=FORK.consistency(8),
            checkpoint=checkpoint_of(FORK),
            log_key=LOG.verifier,
        )


def test_a_log_that_goes_back_is_not_cosigned() -> None:
    with pytest.raises(TamperedError, match="at least 8"):
        check_extension(seen(8), epoch=3, old_size=8, proof=(), checkpoint=checkpoint_of(TREE, 7), log_key=LOG.verifier)


def test_the_twin_of_an_earlier_epoch_is_refused() -> None:
    with pytest.raises(TamperedError, match="another instance"):
        check_extension(
            seen(8, 4),
            epoch=3,
            old_size=8,
            proof=TREE.consistency(8),
            checkpoint=checkpoint_of(TREE),
            log_key=LOG.verifier,
        )


def test_a_request_from_elsewhere_hears_where_the_witness_stands() -> None:
    for old in (0, 7, 9):
        answer = check_extension(
            seen(8),
            epoch=3,
            old_size=old,
            proof=TREE.consistency(old),
            checkpoint=checkpoint_of(TREE),
            log_key=LOG.verifier,
        )
        assert answer == Behind(8)


def test_only_the_logs_key_counts() -> None:
    with pytest.raises(TamperedError, match="not authentic"):
        check_extension(
            seen(8), epoch=3, old_size=8, proof=(), checkpoint=checkpoint_of(TREE, signer=OTHER), log_key=LOG.verifier
        )
    with pytest.raises(TamperedError, match="not authentic"):
        open_epoch(seen(8), epoch_request(OTHER, NONCE), LOG.verifier)
    with pytest.raises(TamperedError, match="no request"):
        open_epoch(seen(8), checkpoint_of(TREE), LOG.verifier)


def test_an_epoch_answers_its_own_nonce() -> None:
    statement = open_epoch(seen(8), epoch_request(LOG, NONCE), LOG.verifier)
    assert statement == Statement(seen(8, 4), NONCE)
    data = SPEAKER.sign(statement.body())
    assert open_statement(data, WITNESS.verifier, origin=ORIGIN, nonce=NONCE) == seen(8, 4)


@pytest.mark.parametrize(
    "data",
    [
        SPEAKER.sign(Statement(seen(8), b"o" * 32).body()),
        SPEAKER.sign(Statement(dataclasses.replace(seen(8), checkpoint=Checkpoint("x", 1, bytes(32))), NONCE).body()),
        SPEAKER.sign(Statement(seen(8), NONCE).body().replace("\n8\n", "\n08\n")),
        SPEAKER.sign(Statement(seen(8), NONCE).body().replace("\n8\n", "\neight\n")),
        SPEAKER.sign(Statement(seen(8), NONCE).body() + "more\n"),
        SPEAKER.sign("\n"),
        LOG.sign(Statement(seen(8), NONCE).body()),
        b"",
    ],
)
def test_an_old_foreign_or_ill_formed_statement_is_refused(data: bytes) -> None:
    with pytest.raises(TamperedError):
        open_statement(data, WITNESS.verifier, origin=ORIGIN, nonce=NONCE)


def test_a_cosignature_is_no_statement() -> None:
    body = Statement(seen(8), NONCE).body()
    data = f"{body}\n{WITNESS.line(body, time=1)}".encode()
    with pytest.raises(TamperedError):
        open_statement(data, WITNESS.verifier, origin=ORIGIN, nonce=NONCE)
    assert statement_key(WITNESS.verifier) == SPEAKER.verifier


def test_an_old_copy_of_the_log_knows_that_it_is_one() -> None:
    with pytest.raises(TamperedError, match=f"my log has 5 entries, witness w saw {len(STORY)}"):
        check_seen(seen(len(STORY)), size=5, root_at=TREE.root, who="w")
    check_seen(seen(5), size=len(STORY), root_at=TREE.root, who="w")


def test_an_edited_log_knows_that_it_is_one() -> None:
    with pytest.raises(TamperedError, match="history differs"):
        check_seen(seen(8), size=FORK.size, root_at=FORK.root, who="w")
    check_seen(seen(5), size=FORK.size, root_at=FORK.root, who="w")


def test_a_request_needs_a_full_nonce() -> None:
    with pytest.raises(ValueError):
        epoch_request(LOG, b"short")
