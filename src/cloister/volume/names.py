"""Names and targets of links: which are allowed, and how a hostile one is shown. Pure; bytes in, no file is touched.

Rules (docs/format/volume-v1.md 4.3):
  1  a name has 1..255 bytes, no `/`, no NUL, and is neither `.` nor `..`; it need not be UTF-8;
  2  a link's target has 1..4,095 bytes, no NUL, and does not start with `/`;
  3  `..` stands only at the start of a target, at most as often as the link's folder is deep.
Rule 3 makes it impossible to leave the volume: the folders above a link are real folders (a link has no children), so
leading `..` climb within the volume, and what follows goes down or through another link that obeys the same rule.
"""

from __future__ import annotations

import unicodedata
from typing import Final

from cloister.volume.types import NAME_MAX, TARGET_MAX

PATH_MAX: Final = 4095
"""Longest path below the root in bytes (Linux PATH_MAX without the NUL), so that every entry can be opened by path."""

# Control, format (bidi overrides, zero width), surrogate, private, line and paragraph separators.
_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def name_fault(name: bytes) -> str:
    """What is wrong with the name of an entry; empty if nothing is."""
    if not 0 < len(name) <= NAME_MAX:
        return f"a name of {len(name)} bytes"
    if b"/" in name or b"\x00" in name:
        return "a name with `/` or NUL"
    if name in (b".", b".."):
        return "a reserved name"
    return ""


def target_fault(target: bytes, depth: int) -> str:
    """What is wrong with the target of a link in a folder `depth` levels below the root; empty if nothing is."""
    if not 0 < len(target) <= TARGET_MAX:
        return f"a link to a target of {len(target)} bytes"
    if b"\x00" in target:
        return "a link to a target with NUL"
    if target.startswith(b"/"):
        return "a link to an absolute path"
    climbs, below = 0, False
    for part in target.split(b"/"):
        if part == b"..":
            if below:
                return "a link with `..` behind a name"
            climbs += 1
        elif part not in (b"", b"."):
            below = True
    return "a link that leads out of the folder" if climbs > depth else ""


def shown(name: bytes) -> str:
    """`name` for a terminal: UTF-8 where it is, everything invisible or undecodable as an escape, never a control."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(
        character.encode("unicode_escape").decode("ascii") if unicodedata.category(character) in _HIDDEN else character
        for character in text
    )
