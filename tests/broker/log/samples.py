"""One entry of every kind, and small logs made of them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from cloister.broker.log import leaf as leaves
from cloister.broker.log.checkpoint import Checkpoint, sign
from cloister.broker.log.leaf import AssetRef, Leaf
from cloister.broker.log.receipt import Receipt
from cloister.broker.log.tree import Tree, leaf_hash
from cloister.crypto.keys import Secret, digest
from cloister.crypto.note import COSIGNATURE, Signer
from cloister.errors import Reason

NOW: Final = datetime(2026, 11, 20, 9, 30, 0, 123456, tzinfo=UTC)
ORIGIN: Final = "broker.example/log"
LOG: Final = Signer(ORIGIN, Secret(b"L" * 32))
OTHER: Final = Signer(ORIGIN, Secret(b"O" * 32))
WITNESS: Final = Signer("witness.example/w1", Secret(b"W" * 32), COSIGNATURE)

CONTRACT: Final = digest(b"contract 1")
NEXT: Final = digest(b"contract 2")
DATA: Final = digest(b"xrays")
OUT: Final = digest(b"detector")
CODE: Final = digest(b"trainer")
HOSPITAL: Final = "SHA256:1mbN4yyqQzwlbR7YvIZ0fpcMTk4w8DkAXlHEzMZzvCI"
VENDOR: Final = "SHA256:8AcF6xVbDeyBMcSHJhqXohYhc4nXmF5kFMCMcJBfAx0"
REASON: Final = Reason("phase.train.run", "sha256:77…", "trainer", "measure again")


def release(lease: str = "l-1", *, contract: str = CONTRACT, at: datetime = NOW) -> leaves.Release:
    return leaves.Release(
        time=at,
        lease=lease,
        contract=contract,
        phase="train",
        reads=(AssetRef("xrays", DATA),),
        writes=("detector",),
        code=CODE,
        sandbox="offline",
        level="L1",
        evidence=digest(b"evidence"),
        tee="soft-tdx",
        hpke_key=digest(b"hpke"),
        request=digest(b"request"),
        expires=at + timedelta(minutes=10),
    )


def story() -> list[Leaf]:
    """Return a log that makes sense and holds every kind of entry."""
    later = NOW + timedelta(seconds=1)
    return [
        leaves.Epoch(
            time=NOW,
            number=1,
            software="ab" * 48,
            evidence=digest(b"e"),
            tee="soft-tdx",
            hpke_key=digest(b"k"),
            tls_key=digest(b"t"),
        ),
        leaves.Witness(time=NOW, name=WITNESS.name, key=str(WITNESS.verifier)),
        leaves.ContractSubmitted(time=NOW, contract=CONTRACT, name="xray", version=1, replaces=""),
        leaves.ContractSigned(time=NOW, contract=CONTRACT, party=HOSPITAL, signature=digest(b"s1")),
        leaves.ContractSigned(time=NOW, contract=CONTRACT, party=VENDOR, signature=digest(b"s2")),
        leaves.ContractActive(time=NOW, contract=CONTRACT, name="xray", replaces="", signers=(HOSPITAL, VENDOR)),
        leaves.KeyDeposited(time=NOW, volume=DATA, owner=HOSPITAL, volume_id=b"v" * 16, generation=1),
        release(),
        leaves.LeaseRenewed(
            time=later, lease="l-1", evidence=digest(b"e2"), tee="soft-tdx", expires=later + timedelta(minutes=10)
        ),
        leaves.Denial(
            time=later,
            id="d-0123456789ab",
            operation="release",
            error="denied",
            message="the contract does not allow this",
            contract=CONTRACT,
            phase="train",
            assets=("xrays",),
            code=digest(b"evil"),
            evidence=digest(b"e3"),
            tee="soft-tdx",
            hpke_key=digest(b"k3"),
            reasons=(REASON,),
        ),
        leaves.RootRegistered(
            time=later,
            contract=CONTRACT,
            name="xray",
            asset="detector",
            volume=OUT,
            generation=1,
            volume_id=b"o" * 16,
            owner="hospital",
            previous="",
            lease="l-1",
        ),
        leaves.Answer(
            time=later,
            contract=CONTRACT,
            phase="serve",
            party="clinic",
            count=2,
            used=2,
            lease="l-1",
            query=digest(b"q"),
            answer=digest(b"a"),
        ),
        leaves.AnswerRefused(
            time=later,
            id="d-0123456789ac",
            contract=CONTRACT,
            phase="serve",
            party="clinic",
            count=1,
            lease="",
            reasons=(REASON,),
        ),
        leaves.KeyOpened(
            time=later,
            volume=OUT,
            owner="hospital",
            parties=(HOSPITAL,),
            contract=CONTRACT,
            asset="detector",
            hpke_key=digest(b"k4"),
        ),
        leaves.CollateralMarks(
            time=later, marks=(leaves.Mark("tcb/TDX/50806F000000/0123", 18), leaves.Mark("crl/45", 7))
        ),
        leaves.LeaseLost(time=later, lease="l-1", reasons=(REASON,)),
        leaves.ContractRevoked(time=later, contract=CONTRACT, name="xray", party=HOSPITAL, signature=digest(b"s3")),
    ]


def tree_of(entries: Sequence[Leaf]) -> Tree:
    return Tree(leaf_hash(leaf.encode()) for leaf in entries)


def checkpoint_of(tree: Tree, size: int | None = None, *, signer: Signer = LOG) -> bytes:
    size = tree.size if size is None else size
    return sign(Checkpoint(signer.name, size, tree.root(size)), signer)


def receipt_of(entries: Sequence[Leaf], index: int, size: int | None = None) -> Receipt:
    tree = tree_of(entries)
    size = tree.size if size is None else size
    return Receipt(entries[index].encode(), index, size, tree.inclusion(index, size), checkpoint_of(tree, size))
