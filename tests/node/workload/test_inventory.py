"""What people read: the inventory and the differences, word by word."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from cloister.node.workload import Kind, Layer, Part, Row, Workload, diff, inventory, render_inventory
from cloister.node.workload.form import FIRST_PACKAGE, INTERPRETER, NATIVE, UNOWNED

SITE = "/runtime/venv/lib/python3.11/site-packages"


def sha(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def rows(numpy: str = "one") -> list[Row]:
    return [
        Row("/runtime/python/bin/python3.11", Kind.EXECUTABLE, 9_000_000, sha("python"), INTERPRETER),
        Row("/usr/lib/x86_64-linux-gnu/libssl.so.3", Kind.FILE, 700, sha("ssl"), NATIVE),
        Row(f"{SITE}/loose.py", Kind.FILE, 10, sha("loose"), UNOWNED),
        Row(f"{SITE}/numpy/a.py", Kind.FILE, 1500, sha(numpy), FIRST_PACKAGE, modified=True),
        Row(f"{SITE}/numpy/b.py", Kind.FILE, 500, sha(numpy), FIRST_PACKAGE),
    ]


def workload(
    files: list[Row] | None = None,
    *,
    numpy: str = "2.1.0",
    python: str = "3.11.7",
    missing: tuple[tuple[str, str], ...] = (),
) -> Workload:
    runtime = Layer.of(
        Part.RUNTIME,
        files or rows(),
        python=python,
        machine="x86_64",
        packages=[("numpy", numpy)],
        absent=[f"{SITE}/gone.py"],
        missing=missing,
    )
    scripts = Layer.of(
        Part.APP, [Row("/app/train.py", Kind.FILE, 30, sha("train")), Row("/app/b.py", Kind.FILE, 3, sha("b"))]
    )
    return Workload(runtime, scripts, "train.py", ("--epochs", "5"), {"SEED": "1"})


A = workload()


def test_inventory_counts_every_file_once() -> None:
    found = inventory(A)
    assert (found.interpreter.version, found.interpreter.files) == ("3.11.7", 1)
    (numpy,) = found.packages
    assert (numpy.name, numpy.version, numpy.files, numpy.size_bytes) == ("numpy", "2.1.0", 2, 2000)
    assert numpy.modified == (f"{SITE}/numpy/a.py",)
    assert [entry.path for entry in found.unowned] == [f"{SITE}/loose.py"]
    assert [entry.path for entry in found.natives] == ["/usr/lib/x86_64-linux-gnu/libssl.so.3"]
    assert found.files == len(A.runtime.paths) + len(A.app.paths)
    assert found.size_bytes == A.runtime.size_bytes + A.app.size_bytes


def test_package_digest_depends_on_content_not_on_the_version_in_the_name() -> None:
    same = inventory(workload(numpy="9")).packages[0].digest
    other = inventory(workload(rows("two"))).packages[0].digest
    assert inventory(A).packages[0].digest == same != other


def test_text() -> None:
    text = render_inventory(inventory(workload(missing=(("libq.so", f"{SITE}/numpy/b.py"),))))
    for line in (
        "command      python /app/train.py '--epochs' '5'",
        "contents     7 files, 9.0 MB",
        "1 packages",
        f"    modified since install: {SITE}/numpy/a.py",
        "1 recorded files are absent",
        "1 files of no package",
        "1 native libraries",
        f"  libq.so  needed by {SITE}/numpy/b.py",
        "2 scripts",
        "  SEED='1'",
    ):
        assert line in text.splitlines(), line


def test_equal_workloads_have_no_difference() -> None:
    assert diff(A, workload()) == ()


def test_package_update() -> None:
    assert diff(A, workload(rows("two"), numpy="2.1.1")) == ("numpy 2.1.0 -> 2.1.1, 2 files",)


def test_edited_package() -> None:
    files = [replace(row, digest=sha("x")) if row.path.endswith("b.py") else row for row in rows()]
    assert diff(A, workload(files)) == ("numpy 2.1.0 differs in 1 file (b.py)",)


def test_package_added_and_removed() -> None:
    other = replace(
        A, runtime=Layer.of(Part.RUNTIME, rows()[:3], python="3.11.7", machine="x86_64", absent=[f"{SITE}/gone.py"])
    )
    assert diff(A, other) == ("numpy 2.1.0 removed, 2 files",)
    assert diff(other, A) == ("numpy 2.1.0 added, 2 files",)


def test_interpreter() -> None:
    files = [replace(rows()[0], digest=sha("new")), *rows()[1:]]
    assert diff(A, workload(files, python="3.11.8")) == ("interpreter 3.11.7 -> 3.11.8, 1 file",)
    assert diff(A, workload(files)) == ("interpreter 3.11.7 differs in 1 file (python3.11)",)


def test_native_library_and_loose_file() -> None:
    files = rows()
    files[1] = replace(files[1], digest=sha("new ssl"))
    del files[2]
    assert diff(A, workload(files)) == (
        "1 native library differs (/usr/lib/x86_64-linux-gnu/libssl.so.3)",
        "1 file of no package removed (lib/python3.11/site-packages/loose.py)",
    )


def test_library_that_is_missing_now() -> None:
    other = workload(missing=(("libq.so", "/runtime/q"),))
    assert diff(A, other) == ("native library libq.so is missing now",)
    assert diff(other, A) == ("native library libq.so is no longer missing",)


def test_other_description_of_equal_files_is_still_a_difference() -> None:
    files = [replace(row, modified=False) for row in rows()]
    assert diff(A, workload(files)) == ("the same files, described differently (owners, who needs a missing library)",)


def test_scripts_arguments_and_environment() -> None:
    scripts = Layer.of(
        Part.APP, [Row("/app/train.py", Kind.FILE, 30, sha("new")), Row("/app/c.py", Kind.FILE, 3, sha("b"))]
    )
    other = replace(A, app=scripts, args=("--epochs", "50", "-v"), env={"LANG": "C"})
    assert diff(A, other) == (
        "1 script differs (train.py)",
        "1 script added (c.py)",
        "1 script removed (b.py)",
        "argument 2: '5' -> '50'",
        "argument 3: none -> '-v'",
        "environment LANG: unset -> 'C'",
        "environment SEED: '1' -> unset",
    )
    assert diff(A, replace(A, script="b.py")) == ("script: train.py -> b.py",)
