"""Landlock rule sets for every ABI, as bytes."""

from __future__ import annotations

import struct

import pytest

from cloister.confine import landlock
from cloister.confine.landlock import Access

EVERYTHING = (1 << 16) - 1


@pytest.mark.parametrize(
    ("abi", "words"),
    [
        (1, (0x1FFF,)),
        (2, (0x3FFF,)),
        (3, (0x7FFF,)),
        (4, (0x7FFF, 3)),
        (5, (0xFFFF, 3)),
        (6, (0xFFFF, 3, 3)),
        (7, (0xFFFF, 3, 3)),
        (99, (0xFFFF, 3, 3)),
    ],
)
def test_attributes_have_the_size_and_rights_of_the_abi(abi: int, words: tuple[int, ...]) -> None:
    assert landlock.ruleset(abi, (), network=False).attributes == struct.pack(f"<{len(words)}Q", *words)


@pytest.mark.parametrize("abi", range(1, 9))
def test_no_rule_has_a_right_that_its_kernel_would_refuse(abi: int) -> None:
    found = landlock.ruleset(abi, (Access("/d", EVERYTHING), Access("/f", EVERYTHING, folder=False)), network=False)
    (_, on_folder), (_, on_file) = found.rules
    assert on_folder == landlock.handled(abi)
    assert on_file == landlock.handled(abi) & landlock.ON_FILES


def test_loopback_leaves_tcp_to_the_network_namespace() -> None:
    assert landlock.ruleset(7, (), network=True).attributes == struct.pack("<3Q", 0xFFFF, 0, 3)


def test_only_scratch_may_execute_what_the_job_wrote() -> None:
    assert landlock.SCRATCH & landlock.EXECUTE
    assert not landlock.WRITE & landlock.EXECUTE
    assert not landlock.READ & (landlock.EXECUTE | landlock.WRITE_FILE | landlock.TRUNCATE)
    assert not landlock.RUN & (landlock.WRITE_FILE | landlock.TRUNCATE | landlock.MAKE_REG)


def test_no_landlock_is_no_ruleset() -> None:
    with pytest.raises(ValueError, match="no Landlock"):
        landlock.ruleset(0, (), network=False)
