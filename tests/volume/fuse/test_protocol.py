"""The codec against bytes written down from fuse.h, and against garbage."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import MachineError
from cloister.volume.fuse import protocol as p

# INIT as Linux 6.18 sent it: 7.45, 128 KiB, flags 0x73fffffb, flags2 0x5fd.
INIT_7_45 = bytes.fromhex(
    "68000000"  # len 104
    "1a000000"  # opcode 26
    "0200000000000000"  # unique 2
    "0000000000000000"  # nodeid
    "00000000 00000000 00000000 0000 0000"  # uid gid pid extlen padding
    "07000000 2d000000 00000200 fbffff73 fd050000" + "00" * 44
)


def test_init_request_of_a_current_kernel() -> None:
    offer = p.parse_init(INIT_7_45)
    assert (offer.unique, offer.major, offer.minor, offer.max_readahead) == (2, 7, 45, 131072)
    assert int(offer.flags) == 0x5FD_73FFFFFB
    session = p.negotiate(offer)
    assert session == p.Session(40, 1048576, p.WANTED)
    assert session.can_resend


def test_init_reply_is_80_bytes_as_in_fuse_h() -> None:
    offer = p.parse_init(INIT_7_45)
    assert (
        p.init_reply(offer, p.negotiate(offer))
        == bytes.fromhex(
            "50000000 00000000 0200000000000000"  # len 80, no error, unique
            "07000000 28000000 00001000 01e0c643"  # 7.40, 1 MiB, flags
            "4000 3000 00100000 01000000 0001 0000 80000000"  # 64, 48, max_write, time_gran, max_pages, map_alignment, flags2
            + "00"
            * 28
        )
    )


def init_request(minor: int, flags: int, flags2: int = 0) -> bytes:
    body = p.INIT_IN.pack(7, minor, 131072, flags & 0xFFFFFFFF, flags2) + bytes(44)
    return p.IN_HEADER.pack(40 + len(body), p.Opcode.INIT, 2, 0, 0, 0, 0, 0, 0) + body


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_never_a_flag_that_was_not_offered(low: int, high: int) -> None:
    offer = p.parse_init(init_request(45, low | int(p.REQUIRED), high))
    session = p.negotiate(offer)
    assert session.flags & ~offer.flags == 0
    assert session.flags & p.REQUIRED == p.REQUIRED
    assert session.can_resend == bool(low & p.Init.INIT_EXT and high & 0x80)


@pytest.mark.parametrize("missing", [p.Init.NO_OPEN_SUPPORT, p.Init.NO_OPENDIR_SUPPORT, p.Init.MAX_PAGES])
def test_a_kernel_without_what_we_need_is_refused(missing: p.Init) -> None:
    with pytest.raises(MachineError) as caught:
        p.negotiate(p.parse_init(init_request(45, int(p.WANTED & ~missing) & 0xFFFFFFFF)))
    assert caught.value.code == "no-mount"
    assert caught.value.reasons[0].found == f"protocol 7.45 without {missing.name}"
    assert caught.value.reasons[0].wanted == "protocol 7.31 or later"


def test_an_old_kernel_is_refused() -> None:
    with pytest.raises(MachineError) as caught:
        p.negotiate(p.parse_init(init_request(30, int(p.WANTED) & 0xFFFFFFFF)))
    assert caught.value.reasons[0].found == "protocol 7.30"


def test_request_splits_into_header_and_body() -> None:
    data = (
        bytes.fromhex("2e000000 01000000 0a00000000000000 0500000000000000 e8030000 e9030000 11000000 0000 0000")
        + b"name\0\0"
    )
    request = p.parse_request(data)
    assert (request.opcode, request.unique, request.nodeid) == (p.Opcode.LOOKUP, 10, 5)
    assert p.parse_name(request.body) == b"name"


def test_read_request() -> None:
    body = bytes.fromhex("0000000000000000 0000100000000000 00000100 00000000 0000000000000000 00800000 00000000")
    assert p.parse_read(body) == (1 << 20, 65536)


@pytest.mark.parametrize("size", range(40))
def test_short_read_request_is_refused(size: int) -> None:
    with pytest.raises(p.MalformedRequestError):
        p.parse_read(bytes(size))


@given(st.binary(max_size=200))
def test_garbage_parses_to_itself_or_is_refused(data: bytes) -> None:
    try:
        request = p.parse_request(data)
    except p.MalformedRequestError:
        return
    assert int.from_bytes(data[:4], "little") == len(data)
    assert bytes(request.body) == data[40:]


@given(st.binary(max_size=64))
def test_names_end_at_the_first_nul(body: bytes) -> None:
    try:
        name = p.parse_name(body)
    except p.MalformedRequestError:
        assert b"\0" not in body or body[0] == 0
    else:
        assert name
        assert b"\0" not in name
        assert body.startswith(name + b"\0")


def test_replies() -> None:
    assert p.reply(7, b"abc", b"d") == bytes.fromhex("14000000 00000000 0700000000000000") + b"abcd"
    assert p.error_reply(7, 5) == bytes.fromhex("10000000 fbffffff 0700000000000000")
    assert p.resend_notice() == bytes.fromhex("10000000 07000000 0000000000000000")
    for errno in (0, -5, 1000):  # the kernel would answer EINVAL and the reader would hang
        with pytest.raises(ValueError, match="errno"):
            p.error_reply(7, errno)


def test_dirents_are_padded_to_eight_bytes() -> None:
    assert p.dirent(3, 4, p.DT_REG, b"abc") == bytes.fromhex("0300000000000000 0400000000000000 03000000 08000000") + (
        b"abc\0\0\0\0\0"
    )
    for length in range(1, 256):
        assert len(p.dirent(1, 1, p.DT_DIR, b"x" * length)) == p.dirent_size(length) == (24 + length + 7) // 8 * 8


def test_statfs_rounds_up() -> None:
    assert p.STATFS_OUT.unpack(p.statfs(data_bytes=4097, files=9)) == (2, 0, 0, 9, 0, 4096, 255, 4096, 0)


SIZES = {
    "fuse_in_header": 40,
    "fuse_out_header": p.OUT_HEADER.size,
    "fuse_attr": p.ATTR.size,
    "fuse_attr_out": p.ATTR_OUT.size,
    "fuse_entry_out": p.ENTRY_OUT.size,
    "fuse_dirent": p.DIRENT.size,
    "fuse_statfs_out": p.STATFS_OUT.size,
    "fuse_init_out": p.INIT_OUT.size,
    "fuse_read_in": p.READ_IN_BYTES,
}


def test_struct_sizes_are_those_of_the_kernel_header(tmp_path: Path) -> None:
    header = Path("/usr/include/linux/fuse.h")
    if not header.exists() or shutil.which("cc") is None:
        pytest.skip("needs linux/fuse.h and a C compiler as an oracle")
    checks = "\n".join(f'_Static_assert(sizeof(struct {name}) == {size}, "{name}");' for name, size in SIZES.items())
    source = tmp_path / "sizes.c"
    source.write_text(f"#include <stdint.h>\n#include <linux/fuse.h>\n{checks}\n", encoding="ascii")
    subprocess.run(["cc", "-fsyntax-only", str(source)], check=True, timeout=60)


def test_opcodes_and_flags_are_those_of_the_kernel_header() -> None:
    header = Path("/usr/include/linux/fuse.h")
    if not header.exists():
        pytest.skip("needs linux/fuse.h as an oracle")
    text = header.read_text(encoding="utf-8")
    opcodes = {name: int(value) for name, value in re.findall(r"\bFUSE_(\w+)\s*=\s*(\d+)\s*,", text)}
    for opcode in p.Opcode:
        assert opcodes[opcode.name] == opcode
    flags = {name: int(bit) for name, bit in re.findall(r"#define FUSE_(\w+)\s+\(1(?:ULL)? << (\d+)\)", text)}
    newer_than_header = {"HAS_RESEND"} - flags.keys()
    for flag in p.Init:
        if flag.name not in newer_than_header:
            assert 1 << flags[flag.name or ""] == flag
