"""The canonical form: vectors with one fault each, round trips, and that nothing else is accepted."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.crypto.canonical import cbor_decode, cbor_encode
from cloister.errors import InputError
from cloister.node.workload import Kind, Layer, Part, Row, Workload, WorkloadSpec
from cloister.node.workload.form import FIRST_PACKAGE, INTERPRETER

PYTHON_PATH = Path("/usr/bin/python3.11")
A = hashlib.sha256(b"a").digest()
PYTHON = Row("/runtime/python/bin/python3.11", Kind.EXECUTABLE, 1, A, INTERPRETER)
MODULE = Row(
    "/runtime/venv/lib/python3.11/site-packages/numpy/__init__.py", Kind.FILE, 7, A, FIRST_PACKAGE, modified=True
)
LINK = Row(
    "/runtime/venv/bin/python",
    Kind.LINK,
    30,
    hashlib.sha256(b"../../python/bin/python3.11xxx").digest(),
    INTERPRETER,
    target="../../python/bin/python3.11xxx",
)
SCRIPT = Row("/app/train.py", Kind.FILE, 3, A)


def runtime(*rows: Row) -> Layer:
    return Layer.of(
        Part.RUNTIME,
        rows or (PYTHON, MODULE, LINK),
        python="3.11.7",
        machine="x86_64",
        packages=[("numpy", "2.1.0")],
        absent=["/runtime/venv/x"],
        missing=[("libq.so", "/runtime/q.so")],
    )


def app(*rows: Row) -> Layer:
    return Layer.of(Part.APP, rows or (SCRIPT,))


WORKLOAD = Workload(runtime(), app(), "train.py", ("--epochs", "5"), {"OMP_NUM_THREADS": "2", "A": "é"})


def test_known_bytes_of_an_app_layer() -> None:
    value = {
        "format": "cloister/layer/1", "part": "app", "python": "", "machine": "", "packages": [], "paths": b"/app/a\x00/app/b",
        "kinds": b"\x00\x01", "sizes": struct.pack(">2Q", 1, 2), "digests": A + A, "owners": bytes(4), "links": [], "absent": [], "missing": [],
    }  # fmt: skip
    layer = app(Row("/app/b", Kind.EXECUTABLE, 2, A), Row("/app/a", Kind.FILE, 1, A))
    assert layer.encoded == cbor_encode(value)
    assert layer.digest == "sha256:" + hashlib.sha256(cbor_encode(value)).hexdigest()
    assert layer.size_bytes == 3


def test_worked_example_of_the_documentation() -> None:
    content = b"print(1)\n"
    layer = app(Row("/app/train.py", Kind.FILE, len(content), hashlib.sha256(content).digest()))
    page = (Path(__file__).resolve().parents[3] / "docs" / "workload.md").read_text()
    assert f"takes {len(layer.encoded)} bytes and has the digest\n`{layer.digest}`" in page


def test_digest_is_of_the_head() -> None:
    head = cbor_decode(WORKLOAD.head)
    assert head == {
        "format": "cloister/workload/1",
        "runtime": hashlib.sha256(WORKLOAD.runtime.encoded).digest(),
        "app": hashlib.sha256(WORKLOAD.app.encoded).digest(),
        "script": "train.py",
        "args": ["--epochs", "5"],
        "env": {"A": "é", "OMP_NUM_THREADS": "2"},
    }
    assert WORKLOAD.digest == "sha256:" + hashlib.sha256(WORKLOAD.head).hexdigest()
    assert WORKLOAD.argv == ("/runtime/venv/bin/python", "/app/train.py", "--epochs", "5")
    assert WORKLOAD.cwd == "/app"


def test_every_part_changes_the_digest() -> None:
    variants = [
        replace(WORKLOAD, args=("--epochs", "50")),
        replace(WORKLOAD, args=("--epochs 5",)),
        replace(WORKLOAD, env={}),
        replace(WORKLOAD, app=app(replace(SCRIPT, digest=bytes(32)))),
        replace(WORKLOAD, app=app(SCRIPT, Row("/app/x.py", Kind.FILE, 0, A)), script="x.py"),
        replace(WORKLOAD, runtime=runtime(PYTHON, replace(MODULE, modified=False), LINK)),
        replace(WORKLOAD, runtime=runtime(PYTHON, replace(MODULE, kind=Kind.EXECUTABLE), LINK)),
        replace(WORKLOAD, runtime=runtime(PYTHON, MODULE)),
    ]
    assert len({WORKLOAD.digest, *(variant.digest for variant in variants)}) == len(variants) + 1


def test_round_trip() -> None:
    again = Workload.from_bytes(WORKLOAD.to_bytes())
    assert again == WORKLOAD
    assert again.digest == WORKLOAD.digest
    assert again.runtime.rows() == tuple(sorted([PYTHON, MODULE, LINK], key=lambda row: row.path))


names = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="/"), min_size=1, max_size=8
)
names = names.filter(lambda name: name not in (".", "..", "__pycache__"))


@given(
    st.dictionaries(
        names,
        st.tuples(
            st.sampled_from([Kind.FILE, Kind.EXECUTABLE]),
            st.integers(0, 2**64 - 1),
            st.binary(min_size=32, max_size=32),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_layers_round_trip(files: dict[str, tuple[Kind, int, bytes]]) -> None:
    rows = tuple(Row(f"/app/{name}", *values) for name, values in files.items())
    layer = app(*rows)
    assert Layer.from_bytes(layer.encoded) == layer
    assert set(layer.rows()) == set(rows)
    assert app(*rows[::-1]) == layer


def layer_with(**changes: Any) -> bytes:
    return cbor_encode({**cbor_decode(runtime().encoded), **changes})


def paths(*names: str) -> dict[str, Any]:
    count = len(names)
    return {
        "paths": "\x00".join(names).encode(), "kinds": bytes(count), "sizes": bytes(8 * count), "digests": bytes(32 * count),
        "owners": bytes(2 * count), "links": [],
    }  # fmt: skip


def link(target: str, path: str = "/runtime/venv/l") -> dict[str, Any]:
    text = target.encode()
    return {
        **paths(path), "kinds": b"\x02", "sizes": struct.pack(">Q", len(text)), "digests": hashlib.sha256(text).digest(), "links": [target],
    }  # fmt: skip


LAYER_FAULTS = {
    "another format": (layer_with(format="cloister/layer/2"), "format"),
    "another part": (layer_with(part="data"), "part 'data'"),
    "a key more": (layer_with(more=1), "keys"),
    "a wrong type": (layer_with(paths="text"), "paths is not a bytes"),
    "a bool for text": (layer_with(python=True), "python is not a str"),
    "trailing bytes": (runtime().encoded + b"\x00", "not canonical CBOR"),
    "paths not UTF-8": (layer_with(**{**paths("/runtime/a"), "paths": b"/runtime/\xff"}), "not UTF-8"),
    "kinds too short": (layer_with(kinds=b"\x00"), "kinds"),
    "digests ragged": (layer_with(digests=bytes(33)), "bytes of digests"),
    "sizes ragged": (layer_with(sizes=bytes(9)), "sizes"),
    "owners ragged": (layer_with(owners=bytes(1)), "owners"),
    "unknown kind": (layer_with(**{**paths("/runtime/a"), "kinds": b"\x03"}), "unknown kind"),
    "owner out of range": (layer_with(**{**paths("/runtime/a"), "owners": b"\x00\x04"}), "not in the package list"),
    "packages unsorted": (layer_with(packages=[["b", "1"], ["a", "1"]]), "sorted and unique"),
    "package of one word": (layer_with(packages=[["b"]]), "pairs"),
    "missing twice": (layer_with(missing=[["a", "b"], ["a", "b"]]), "sorted and unique"),
    "absent unsorted": (layer_with(absent=["b", "a"]), "sorted and unique"),
    "absent a number": (layer_with(absent=[1]), "list of strings"),
    "no version": (layer_with(python=""), "python ''"),
    "odd version": (layer_with(python="3.11.7\n"), "python"),
    "hidden text": (layer_with(machine="x86\u202e"), "control characters"),
    "empty path": (layer_with(**paths("")), "is not below"),
    "foreign root": (layer_with(**paths("/etc/passwd")), "is not below"),
    "app in the runtime": (layer_with(**paths("/app/a")), "is not below"),
    "climbing path": (layer_with(**paths("/runtime/../etc/passwd")), "not normalised"),
    "path ending in dots": (layer_with(**paths("/runtime/..")), "not normalised"),
    "double slash": (layer_with(**paths("/runtime//a")), "not normalised"),
    "folder as file": (layer_with(**paths("/runtime/a/")), "not normalised"),
    "newline in a name": (layer_with(**paths("/runtime/a\nb")), "control characters"),
    "bidi in a name": (layer_with(**paths("/runtime/a\u202eb")), "control characters"),
    "bytecode": (layer_with(**paths("/runtime/__pycache__/a.pyc")), "bytecode"),
    "unsorted": (layer_with(**paths("/runtime/b", "/runtime/a")), "sorted and unique"),
    "twice": (layer_with(**paths("/runtime/a", "/runtime/a")), "sorted and unique"),
    "file and folder": (layer_with(**paths("/runtime/a", "/runtime/a-b", "/runtime/a/b/c")), "a file and a folder"),
    "absolute link": (layer_with(**link("/etc/passwd")), "relative path"),
    "empty link": (layer_with(**link("")), "relative path"),
    "link out": (layer_with(**link("../../etc/passwd")), "leads out"),
    "link out and back": (layer_with(**link("../../runtime/a")), "leads out"),
    "link without target": (layer_with(**{**link("a"), "links": []}), "1 links, 0 targets"),
    "target without link": (layer_with(links=["a", "b"]), "1 links, 2 targets"),
    "link with another digest": (layer_with(**{**link("a"), "digests": bytes(32)}), "another size or digest"),
    "link with another size": (layer_with(**{**link("a"), "sizes": bytes(8)}), "another size or digest"),
}  # fmt: skip


@pytest.mark.parametrize("fault", LAYER_FAULTS)
def test_one_fault_in_a_layer_is_refused(fault: str) -> None:
    data, message = LAYER_FAULTS[fault]
    with pytest.raises(InputError, match=message):
        Layer.from_bytes(data)


def test_app_layer_has_no_owners() -> None:
    with pytest.raises(InputError, match="no interpreter, packages or owners"):
        app(replace(SCRIPT, owner=INTERPRETER))


def outer(**changes: Any) -> bytes:
    return cbor_encode({**cbor_decode(WORKLOAD.to_bytes()), **changes})


def head(**changes: Any) -> bytes:
    return cbor_encode({**cbor_decode(WORKLOAD.head), **changes})


WORKLOAD_FAULTS = {
    "no CBOR": (b"\xff", "not canonical CBOR"),
    "a list": (cbor_encode([]), "keys"),
    "head of another format": (outer(head=head(format="x")), "format 'x'"),
    "another runtime": (outer(runtime=runtime(PYTHON).encoded), "runtime layer is not the one"),
    "another app": (outer(app=app(replace(SCRIPT, size_bytes=4)).encoded), "app layer is not the one"),
    "layers exchanged": (outer(app=WORKLOAD.runtime.encoded, runtime=WORKLOAD.app.encoded, head=head(app=cbor_decode(WORKLOAD.head)["runtime"], runtime=cbor_decode(WORKLOAD.head)["app"])), "exchanged"),
    "script elsewhere": (outer(head=head(script="../x.py")), "not in the app layer"),
    "NUL in an argument": (outer(head=head(args=["a\x00b"])), "argument 1"),
    "argument a number": (outer(head=head(args=[5])), "list of strings"),
    "env name with an equals sign": (outer(head=head(env={"A=B": "c"})), "environment variable name"),
    "env value a number": (outer(head=head(env={"A": 1})), "strings to strings"),
    "NUL in env": (outer(head=head(env={"A": "\x00"})), "environment variable A"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WORKLOAD_FAULTS)
def test_one_fault_in_a_workload_is_refused(fault: str) -> None:
    data, message = WORKLOAD_FAULTS[fault]
    with pytest.raises(InputError, match=message):
        Workload.from_bytes(data)


def test_workload_needs_its_interpreter() -> None:
    with pytest.raises(InputError, match="no interpreter"):
        replace(WORKLOAD, runtime=runtime(MODULE))


@given(st.integers(0, len(WORKLOAD.to_bytes()) - 1), st.integers(1, 255))
def test_no_two_byte_strings_are_one_workload(offset: int, change: int) -> None:
    data = bytearray(WORKLOAD.to_bytes())
    data[offset] ^= change
    try:
        found = Workload.from_bytes(bytes(data))
    except InputError:
        return
    assert found.to_bytes() == bytes(data)
    assert found.digest != WORKLOAD.digest


def test_file_name_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(InputError, match="not UTF-8"):
        app(SCRIPT, Row("/app/\udcff.py", Kind.FILE, 0, A))


@pytest.mark.parametrize(
    ("args", "env"), [(("\x00",), {}), (("\udcff",), {}), ((), {"1A": ""}), ((), {"": "x"}), ((), {"A": "\udcff"})]
)
def test_spec_refuses_what_the_kernel_cannot_carry(args: tuple[str, ...], env: dict[str, str]) -> None:
    with pytest.raises(InputError):
        WorkloadSpec(PYTHON_PATH, PYTHON_PATH, args, env)


def test_arguments_are_not_one_string() -> None:
    with pytest.raises(TypeError):
        WorkloadSpec(PYTHON_PATH, PYTHON_PATH, "--epochs 5")  # type: ignore[arg-type]
