"""`Server.answer` without a kernel: exact answers, hostile requests, failing storage."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.volume.fuse import Fault
from cloister.volume.fuse import protocol as p
from cloister.volume.fuse.server import Server
from cloister.volume.types import CHUNK
from tests.volume.fuse.fake import FakeVolume, file, link, make_volume, tampered

DATA = bytes(range(256)) * 1024  # 4 chunks


def request(opcode: int, nodeid: int, body: bytes = b"", unique: int = 9) -> memoryview:
    return memoryview(p.IN_HEADER.pack(40 + len(body), opcode, unique, nodeid, 0, 0, 0, 0, 0) + body)


def read_body(offset: int, size: int) -> bytes:
    return p.READ_IN.pack(0, offset, size) + bytes(20)


def joined(parts: Sequence[p.Buffer] | None) -> tuple[int, bytes]:
    """(errno, payload) of an answer, after checking that its header is right."""
    assert parts is not None
    data = b"".join(parts)
    length, error, unique = p.OUT_HEADER.unpack_from(data)
    assert (length, unique) == (len(data), 9)
    assert not (error and data[16:])
    return -error, data[16:]


@pytest.fixture
def volume() -> FakeVolume:
    return make_volume({b"big": file(DATA), b"d/small": file(b"small"), b"ln": link(b"target")})


def nodeid(volume: FakeVolume, path: str) -> int:
    index = volume.tree.find(path)
    assert index is not None
    return index + 1


def test_lookup_and_getattr_agree(volume: FakeVolume) -> None:
    server = Server(volume, uid=7, gid=8)
    error, entry = joined(server.answer(request(p.Opcode.LOOKUP, 1, b"big\0")))
    fields = p.ENTRY_OUT.unpack(entry)
    assert error == 0
    assert fields[:6] == (nodeid(volume, "big"), 0, p.FOREVER_S, p.FOREVER_S, 0, 0)
    _, attributes = joined(server.answer(request(p.Opcode.GETATTR, fields[0], bytes(16))))
    assert p.ATTR_OUT.unpack(attributes)[3:] == fields[6:]
    ino, size, blocks, *_, mode, nlink, uid, gid, rdev, blksize, flags = fields[6:]
    assert (ino, size, blocks, mode, nlink, uid, gid) == (fields[0], len(DATA), 512, 0o100444, 1, 7, 8)
    assert (rdev, blksize, flags) == (0, 4096, 0)


def test_a_name_that_is_not_there_is_an_entry_without_a_node(volume: FakeVolume) -> None:
    error, entry = joined(Server(volume).answer(request(p.Opcode.LOOKUP, 1, b"nope\0")))
    assert error == 0
    assert p.ENTRY_OUT.unpack(entry)[:3] == (0, 0, p.FOREVER_S)


@pytest.mark.parametrize(
    ("opcode", "path", "body", "expected"),
    [
        (p.Opcode.LOOKUP, "big", b"x\0", errno.ENOTDIR),
        (p.Opcode.LOOKUP, "", b"x" * 256 + b"\0", errno.ENAMETOOLONG),
        (p.Opcode.LOOKUP, "", b"x", errno.EINVAL),
        (p.Opcode.LOOKUP, "", b"\0", errno.EINVAL),
        (p.Opcode.READLINK, "big", b"", errno.EINVAL),
        (p.Opcode.READ, "d", read_body(0, 10), errno.EINVAL),
        (p.Opcode.READ, "big", read_body(0, p.MAX_READ + 1), errno.EINVAL),
        (p.Opcode.READ, "big", b"short", errno.EINVAL),
        (p.Opcode.READDIR, "big", read_body(0, 4096), errno.ENOTDIR),
        (p.Opcode.READDIR, "d", b"short", errno.EINVAL),
        (p.Opcode.OPEN, "big", bytes(8), errno.ENOSYS),
        (p.Opcode.OPENDIR, "d", bytes(8), errno.ENOSYS),
        (p.Opcode.FLUSH, "big", bytes(24), errno.ENOSYS),
        (22, "big", bytes(8), errno.ENOSYS),  # GETXATTR
        (p.Opcode.IOCTL, "big", bytes(32), errno.ENOTTY),
        (16, "big", bytes(40), errno.EROFS),  # WRITE
        (4, "big", bytes(88), errno.EROFS),  # SETATTR
        (10, "", b"big\0", errno.EROFS),  # UNLINK
        (4242, "", b"", errno.ENOSYS),
    ],
)
def test_refusals(volume: FakeVolume, opcode: int, path: str, body: bytes, expected: int) -> None:
    assert joined(Server(volume).answer(request(opcode, nodeid(volume, path), body))) == (expected, b"")


@pytest.mark.parametrize("opcode", [p.Opcode.FORGET, p.Opcode.BATCH_FORGET, p.Opcode.INTERRUPT])
def test_silent_requests_get_no_answer(volume: FakeVolume, opcode: int) -> None:
    assert Server(volume).answer(request(opcode, 1, bytes(8))) is None


@pytest.mark.parametrize("opcode", [p.Opcode.GETATTR, p.Opcode.LOOKUP, p.Opcode.READ, p.Opcode.READDIR])
@pytest.mark.parametrize("node", [0, 6, 2**63, 2**64 - 1])
def test_unknown_nodes_are_stale(volume: FakeVolume, opcode: int, node: int) -> None:
    body = b"x\0" if opcode == p.Opcode.LOOKUP else read_body(0, 4096)
    assert joined(Server(volume).answer(request(opcode, node, body)))[0] == errno.ESTALE


@given(
    st.integers(0, 50),
    st.one_of(st.integers(0, 10), st.integers(0, 2**64 - 1)),
    st.binary(max_size=120),
    st.integers(0, 300),
)
@settings(max_examples=500, deadline=None)
def test_any_request_gets_one_well_formed_answer(opcode: int, node: int, body: bytes, cut: int) -> None:
    volume = make_volume({b"big": file(DATA), b"d/small": file(b"small"), b"ln": link(b"target")})
    server = Server(volume)
    data = request(opcode, node, body)[: 40 + cut]
    if len(data) != 40 + len(body):
        with pytest.raises(p.MalformedRequestError):
            server.answer(data)
        return
    parts = server.answer(data)
    if parts is not None:
        error, payload = joined(parts)
        assert 0 <= error < 200
        assert len(payload) <= p.MAX_READ


@given(st.binary(max_size=200))
def test_bytes_that_are_no_request_raise_and_nothing_else(data: bytes) -> None:
    server = Server(make_volume({}))
    if len(data) >= 40 and int.from_bytes(data[:4], "little") == len(data):
        return
    with pytest.raises(p.MalformedRequestError):
        server.answer(memoryview(data))


@given(st.lists(st.tuples(st.integers(0, len(DATA) + 5000), st.integers(0, 200_000)), max_size=12))
def test_reads_are_slices_of_the_file(ranges: list[tuple[int, int]]) -> None:
    volume = make_volume({b"a": file(b"a" * 5000), b"big": file(DATA), b"c": file(b"c")})
    server = Server(volume)
    for offset, size in ranges:
        answer = server.answer(request(p.Opcode.READ, nodeid(volume, "big"), read_body(offset, size)))
        assert joined(answer) == (0, DATA[offset : offset + size])


def test_a_decrypted_chunk_serves_its_neighbours() -> None:
    volume = make_volume({b"%02d" % index: file(b"%02d" % index) for index in range(16)})  # 16 files in one chunk
    server = Server(volume)
    for index in range(16):
        assert joined(server.answer(request(p.Opcode.READ, index + 2, read_body(0, 4096)))) == (0, b"%02d" % index)
    assert volume.reads == [(0, CHUNK)]


@given(st.integers(24, 2000), st.booleans(), st.integers(0, 40))
def test_readdir_pages_through_any_buffer(size: int, plus: bool, count: int) -> None:
    names = sorted(b"%d" % index + b"x" * (index * 7 % 250) for index in range(count))
    volume = make_volume({name: file(b"") for name in names})
    server = Server(volume)
    opcode = p.Opcode.READDIRPLUS if plus else p.Opcode.READDIR
    size += 280 + (128 if plus else 0)  # one record always fits
    seen: list[tuple[int, bytes]] = []
    cookie = 0
    while True:
        error, payload = joined(server.answer(request(opcode, 1, read_body(cookie, size))))
        assert error == 0
        assert len(payload) <= size
        if not payload:
            break
        while payload:
            if plus:
                entry, payload = p.ENTRY_OUT.unpack_from(payload), payload[p.ENTRY_OUT.size :]
            ino, cookie, length, kind = p.DIRENT.unpack_from(payload)
            name = payload[24 : 24 + length]
            payload = payload[p.dirent_size(length) :]
            if plus:
                assert entry[0] == (0 if name in (b".", b"..") else ino)
            assert kind == (p.DT_DIR if name in (b".", b"..") else p.DT_REG)
            seen.append((ino, name))
    assert seen == [(1, b"."), (1, b"..")] + [(index + 2, name) for index, name in enumerate(names)]


@pytest.mark.parametrize("offset", [2**63, 2**64 - 1])
def test_readdir_and_read_far_beyond_the_end_are_empty(volume: FakeVolume, offset: int) -> None:
    server = Server(volume)
    assert joined(server.answer(request(p.Opcode.READDIR, 1, read_body(offset, 4096)))) == (0, b"")
    assert joined(server.answer(request(p.Opcode.READ, nodeid(volume, "big"), read_body(offset, 4096)))) == (0, b"")


def test_tampering_is_eio_and_reported_once_per_file_and_record() -> None:
    volume = make_volume({b"big": file(DATA), b"z": file(b"z" * 100)})
    volume.bad = {1: tampered(), 3: OSError(errno.EIO, "disk")}
    faults: list[Fault] = []
    server = Server(volume, report=faults.append)
    for _ in range(2):
        assert joined(server.answer(request(p.Opcode.READ, 2, read_body(0, len(DATA))))) == (errno.EIO, b"")
    assert faults == [
        Fault("big", CHUNK, CHUNK, 1, "tampered"),
        Fault("big", 3 * CHUNK, CHUNK, 3, "unreadable"),
    ]
    assert joined(server.answer(request(p.Opcode.READ, 2, read_body(0, CHUNK)))) == (0, DATA[:CHUNK])
    assert joined(server.answer(request(p.Opcode.READ, 2, read_body(CHUNK, 1)))) == (errno.EIO, b"")
    assert joined(server.answer(request(p.Opcode.READ, 2, read_body(2 * CHUNK, 9)))) == (0, DATA[:9])


@given(st.sets(st.integers(0, 5)), st.lists(st.tuples(st.integers(0, 400_000), st.integers(1, 140_000)), max_size=15))
def test_never_wrong_bytes(bad: set[int], ranges: list[tuple[int, int]]) -> None:
    """Whatever fails and in whatever order it is read: right bytes or EIO, and EIO only where a bad chunk is touched."""
    data = os.urandom(5 * CHUNK + 777)
    volume = make_volume({b"0": file(b"0" * 9000), b"x": file(data)})
    volume.bad = dict.fromkeys(bad, tampered())
    server = Server(volume)
    start = volume.tree.data_off[2]
    for offset, size in ranges:
        error, payload = joined(server.answer(request(p.Opcode.READ, 3, read_body(offset, size))))
        stop = min(offset + size, len(data))
        touched = set(range((start + offset) // CHUNK, (start + stop - 1) // CHUNK + 1)) if offset < stop else set()
        if touched & bad:
            assert (error, payload) == (errno.EIO, b"")
        else:
            assert (error, payload) == (0, data[offset:stop])


def test_faults_are_bounded() -> None:
    volume = make_volume({b"x": file(bytes(5000 * 4096))}, chunk=4096)
    volume.bad = dict.fromkeys(range(5000), tampered())
    faults: list[Fault] = []
    server = Server(volume, report=faults.append)
    for offset in range(0, 5000 * 4096, 1 << 20):
        server.answer(request(p.Opcode.READ, 2, read_body(offset, 1 << 20)))
    assert len(faults) == 4096


def test_operator_who_breaks_records_does_not_learn_names_from_the_message() -> None:
    """Messages go to whoever runs the node; he can flip any record, and must not map it to a file by that."""
    fault = Fault("patients/4711 Jane Doe.dcm", 81_234, 333, 17, "tampered")
    assert str(fault) == f"{fault}" == "record 17 is tampered"
