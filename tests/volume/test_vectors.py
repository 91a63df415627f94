"""The vectors: each comes to what it says and releases no byte more, and the generator makes exactly these files."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from cloister.crypto.keys import Secret
from cloister.errors import TamperedError
from cloister.volume import format as fmt
from cloister.volume import layout
from cloister.volume.read import Volume
from tests.volume.vectors.generate import HERE, generate

VOLUMES = sorted(HERE.glob("volume-*.txt"))
MANIFESTS = sorted(HERE.glob("manifest-*.txt"))


def fields(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").splitlines():
        name, _, value = line.partition(": ")
        found.setdefault(name, []).append(value)
    return found


def apply(step: str, volume: Path) -> None:
    verb, file, *rest = step.split(" ")
    path = volume / file
    data = bytearray(path.read_bytes())
    match verb, rest:
        case "set", [at, value]:
            data[int(at) : int(at) + len(value) // 2] = bytes.fromhex(value)
        case "zero", [at, size]:
            data[int(at) : int(at) + int(size)] = bytes(int(size))
        case "exchange", [one, two, size]:
            a, b, n = int(one), int(two), int(size)
            data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]
        case "splice", [at, size, base]:
            foreign = (HERE / base / file).read_bytes()
            data[int(at) : int(at) + int(size)] = foreign[int(at) : int(at) + int(size)]
        case "copy", [base]:
            data[:] = (HERE / base / file).read_bytes()
        case "truncate", [size]:
            del data[int(size) :]
        case "append", [value]:
            data += bytes.fromhex(value)
        case "remove", []:
            path.unlink()
            return
        case _:
            raise AssertionError(f"unknown step {step}")
    path.write_bytes(data)


def test_there_are_vectors() -> None:
    assert len(VOLUMES) > 40
    assert len(MANIFESTS) > 30


@pytest.mark.parametrize("path", VOLUMES, ids=lambda path: path.stem)
@pytest.mark.parametrize("audit", [False, True])
def test_a_volume_comes_to_what_its_vector_says(path: Path, audit: bool, tmp_path: Path) -> None:
    vector = fields(path)
    shutil.copytree(HERE / vector["base"][0], tmp_path / "v")
    for step in vector.get("step", []):
        apply(step, tmp_path / "v")
    released, result = hashlib.sha256(), "opens"
    audit = audit and vector["base"][0] != "plain"
    try:
        with Volume.open(
            tmp_path / "v", Secret(bytes.fromhex(vector["key"][0])), expect=vector["digest"][0], audit=audit
        ) as volume:
            for offset in range(0, volume.data_len, volume.chunk):
                released.update(volume.read(offset, volume.chunk))
    except TamperedError as error:
        result = error.code.removeprefix("volume-")
    assert result == vector["expect"][0]
    assert released.hexdigest() == vector["released-sha256"][0]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_comes_to_what_its_vector_says(path: Path) -> None:
    vector = fields(path)
    plain = bytes.fromhex(vector["manifest"][0])
    padded = plain.ljust(layout.padded(len(plain)), b"\x00")
    try:
        fmt.decode_manifest(padded, data_len=int(vector["data-len"][0]))
        result = "opens"
    except TamperedError:
        result = "tampered"
    assert result == vector["expect"][0]


def test_the_generator_makes_these_files_again(tmp_path: Path) -> None:
    generate(tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    kept = {
        path.relative_to(HERE): path.read_bytes()
        for path in HERE.rglob("*")
        if path.is_file() and path.suffix in ("", ".txt") and "__pycache__" not in path.parts
    }
    assert made.keys() == kept.keys()
    assert all(made[name] == kept[name] for name in made), "run `python -m tests.volume.vectors.generate`"
