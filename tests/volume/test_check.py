"""A host without any key checks what it stores: every stored byte but the wraps, by the name alone."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.errors import InputError, TamperedError
from cloister.volume import format as fmt
from cloister.volume import keys, layout
from cloister.volume.check import check
from cloister.volume.read import peek, unwrap
from cloister.volume.rewrap import rewrap
from cloister.volume.seal import Sealed, seal
from cloister.volume.types import CHUNK
from tests.volume.support import KEY, OTHER_KEY, outcome, write_tree
from tests.volume.test_read import boundaries, flipped
from tests.volume.test_vectors import VOLUMES, apply, fields
from tests.volume.vectors.generate import HERE

FILES = {"a": bytes(range(256)) * 600, "d/b": b"bb" * 40_000, "empty": b""}
WRAPS = {"volume-head-wrap-id", "volume-head-wrap-nonce", "volume-head-wrap-key"}
DATA = "data/00000000"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sealed]:
    place = tmp_path_factory.mktemp("check")
    return place / "v", seal(write_tree(place / "s", FILES), place / "v", key=KEY, generation=3)


@pytest.fixture
def copy(sealed: tuple[Path, Sealed], tmp_path: Path) -> Path:
    shutil.copytree(sealed[0], tmp_path / "v")
    return tmp_path / "v"


def checked(path: Path, expect: str | None) -> str:
    try:
        check(path, expect=expect)
    except TamperedError as error:
        if not error.reasons:
            raise AssertionError("a refusal must name what failed") from error
        return error.code.removeprefix("volume-")
    return "opens"


def test_an_untouched_volume_passes(sealed: tuple[Path, Sealed]) -> None:
    done: list[tuple[int, int]] = []
    head = check(sealed[0], expect=sealed[1].digest, progress=lambda at, end: done.append((at, end)))
    assert (head.digest, head.generation) == (sealed[1].digest, 3)
    assert done[-1] == (head.data_len, head.data_len)
    assert check(sealed[0], expect=None) == head


def test_a_volume_without_data_passes(tmp_path: Path) -> None:
    made = seal(write_tree(tmp_path / "s", {"empty": b""}), tmp_path / "v", key=KEY)
    assert check(tmp_path / "v", expect=made.digest).data_len == 0


@pytest.mark.parametrize("path", [path for path in VOLUMES if fields(path)["base"] != ["plain"]], ids=lambda p: p.stem)
def test_a_vector_comes_to_the_same_without_a_key(path: Path, tmp_path: Path) -> None:
    """But for changed wraps, which the name leaves free: only a holder of the key can tell."""
    vector = fields(path)
    shutil.copytree(HERE / vector["base"][0], tmp_path / "v")
    for step in vector.get("step", []):
        apply(step, tmp_path / "v")
    wanted = "opens" if path.stem in WRAPS else vector["expect"][0]
    assert checked(tmp_path / "v", vector["digest"][0]) == wanted


@pytest.mark.parametrize("part", ["manifest", DATA])
def test_a_flipped_bit_anywhere_is_found(copy: Path, part: str, sealed: tuple[Path, Sealed]) -> None:
    size = (copy / part).stat().st_size
    for at in boundaries(size, size // 40):
        with flipped(copy / part, at, at % 8):
            assert checked(copy, sealed[1].digest) == "tampered", f"byte {at} of {part}"
    assert checked(copy, sealed[1].digest) == "opens"


def test_all_broken_records_are_listed(copy: Path) -> None:
    with (
        flipped(copy / DATA, 3),
        flipped(copy / DATA, 2 * layout.RECORD + 3),
        pytest.raises(TamperedError, match="2 parts of it") as caught,
    ):
        check(copy, expect=None)
    assert [reason.where for reason in caught.value.reasons] == [f"{DATA}.record 0", f"{DATA}.record 2"]
    with flipped(copy / DATA, (copy / DATA).stat().st_size - 1), pytest.raises(TamperedError) as caught:
        check(copy, expect=None)
    assert [reason.where for reason in caught.value.reasons] == [f"{DATA}.leaves"]


def test_a_holder_of_the_key_who_forges_a_record_is_found_without_it(copy: Path, sealed: tuple[Path, Sealed]) -> None:
    head = peek(copy)
    cipher = keys.record_cipher(unwrap(head, KEY, name="v"), head.salt, keys.DATA, 0)
    forged = cipher.encrypt(keys.record_nonce(1), b"f" * CHUNK, head.context)
    stored = bytearray((copy / DATA).read_bytes())
    stored[layout.RECORD : 2 * layout.RECORD] = forged
    (copy / DATA).write_bytes(stored)
    assert isinstance(outcome(copy, sealed[1].digest), dict)  # tags alone cannot tell
    assert checked(copy, sealed[1].digest) == "tampered"


def test_a_host_that_makes_all_parts_fit_again_has_made_another_name(copy: Path, sealed: tuple[Path, Sealed]) -> None:
    """Anybody can hash and sign; hence a check without `expect` finds accidents, not exchanges."""
    head, stored = peek(copy), bytearray((copy / DATA).read_bytes())
    stored[5] ^= 1
    records = head.layout.records
    leaves = b"".join(blake3(stored[i * layout.RECORD : (i + 1) * layout.RECORD]).digest() for i in range(records))
    stored[records * layout.RECORD :] = leaves
    manifest = (copy / "manifest").read_bytes()[: -layout.LEAF] + fmt.leaves_node(leaves)
    host = Ed25519PrivateKey.generate()
    head = replace(
        head,
        manifest_sha256=hashlib.sha256(manifest).digest(),
        signer=host.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw),
    )
    (copy / DATA).write_bytes(stored)
    (copy / "manifest").write_bytes(manifest)
    (copy / "head").write_bytes(replace(head, signature=host.sign(head.signed)).encode())
    assert checked(copy, None) == "opens"
    assert checked(copy, sealed[1].digest) == "stale"
    assert outcome(copy, None) == "volume-tampered"


def test_a_re_wrapped_volume_passes_under_its_old_name(copy: Path, sealed: tuple[Path, Sealed]) -> None:
    rewrap(copy, KEY, OTHER_KEY)
    assert checked(copy, sealed[1].digest) == "opens"


def test_without_leaves_there_is_nothing_to_check_against(tmp_path: Path) -> None:
    made = seal(write_tree(tmp_path / "s", FILES), tmp_path / "v", key=KEY, audited=False)
    with pytest.raises(InputError, match="without leaves"):
        check(tmp_path / "v", expect=made.digest)
    with pytest.raises(InputError, match="is no volume"):
        check(tmp_path / "missing", expect=None)


def test_no_descriptor_is_left_open(copy: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    checked(copy, None)
    with flipped(copy / DATA, 5):
        checked(copy, None)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_leaves_and_nodes_are_what_the_format_says(sealed: tuple[Path, Sealed]) -> None:
    """Section 6, from the stored bytes alone."""
    stored, manifest = (sealed[0] / DATA).read_bytes(), (sealed[0] / "manifest").read_bytes()
    count = len(stored) // (65_552 + 32)
    leaves = b"".join(blake3(stored[i * 65_552 : (i + 1) * 65_552]).digest() for i in range(count))
    assert count > 1
    assert stored[count * 65_552 :] == leaves
    assert manifest[-32:] == blake3(b"cloister/volume/leaves/1\0" + leaves).digest()
    assert (sealed[0] / "head").read_bytes()[120:152] == hashlib.sha256(manifest).digest()


@pytest.mark.parametrize(
    ("length", "digest"),
    [
        (0, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
        (1, "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"),
        (1024, "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7"),
        (102400, "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085"),
    ],
)
def test_the_library_computes_the_published_blake3(length: int, digest: str) -> None:
    """From test_vectors.json of the BLAKE3 team: bytes 0, 1, .., 250, repeated."""
    data = bytes(i % 251 for i in range(length))
    assert fmt.leaf(data).hex() == digest
