"""Names and links: what may not be written down in a volume, and what a terminal is never shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.volume import names


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/", b"a\x00", b"n" * 256])
def test_names_that_would_lead_elsewhere_are_refused(name: bytes) -> None:
    assert names.name_fault(name)


@pytest.mark.parametrize("name", [b"a", b"...", b"\xff\xfe", b"a\nb", b"\xe2\x80\xae", b" ", b"n" * 255])
def test_strange_names_are_allowed(name: bytes) -> None:
    assert not names.name_fault(name)


@pytest.mark.parametrize(
    ("target", "depth", "fault"),
    [
        (b"", 0, "0 bytes"),
        (b"a\x00b", 0, "NUL"),
        (b"t" * 4096, 0, "4096 bytes"),
        (b"/etc/passwd", 3, "absolute"),
        (b"..", 0, "out of the folder"),
        (b"../../x", 1, "out of the folder"),
        (b".././../x", 1, "out of the folder"),
        (b"a/../../../etc", 9, "`..` behind a name"),
        (b"../a/..", 3, "`..` behind a name"),
    ],
)
def test_links_that_leave_the_volume_are_refused(target: bytes, depth: int, fault: str) -> None:
    assert fault in names.target_fault(target, depth)


@pytest.mark.parametrize(("target", "depth"), [(b"a", 0), (b"..", 1), (b"../../a/b", 2), (b"./a//b/", 0), (b"...", 0)])
def test_links_that_stay_inside_are_allowed(target: bytes, depth: int) -> None:
    assert not names.target_fault(target, depth)


@given(st.lists(st.sampled_from([b"..", b".", b"a", b"b", b""]), min_size=1, max_size=6), st.integers(0, 3))
def test_an_allowed_target_never_climbs_above_the_root(parts: list[bytes], depth: int) -> None:
    target = b"/".join(parts)
    if names.target_fault(target, depth):
        return
    level = depth
    for part in parts:
        level += {b"..": -1, b".": 0, b"": 0}.get(part, 1)
        assert level >= 0


def test_a_shown_name_cannot_move_the_cursor_or_turn_the_text() -> None:
    assert names.shown(b"a\nb") == "a\\nb"
    assert names.shown(b"\x1b[31mred") == "\\x1b[31mred"
    assert names.shown("x\u202etxt.exe".encode()) == "x\\u202etxt.exe"
    assert names.shown(b"\xff.bin") == "\\xff.bin"
    assert names.shown("Röntgen".encode()) == "Röntgen"


@given(st.binary(max_size=40))
def test_every_name_can_be_shown(name: bytes) -> None:
    assert all(character.isprintable() for character in names.shown(name))
