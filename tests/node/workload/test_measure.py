"""Measuring: what counts, what does not, what is refused, and that the cache never decides the result."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cloister.node.workload.edge.measure as measuring
from cloister.crypto.keys import Secret
from cloister.errors import InputError
from cloister.node.workload import Workload, WorkloadSpec, inventory, measure
from cloister.node.workload.edge.hashing import ChangedError, hash_file
from cloister.node.workload.edge.scan import signature_of
from cloister.node.workload.form import interpreter_path
from tests.node.workload.elves import LOADER, elf
from tests.node.workload.world import MINOR, World, write


def test_jail_paths_of_everything(world: World) -> None:
    found = world.measure("5")
    site = f"/runtime/venv/lib/python{MINOR}/site-packages"
    inside = [path for path in found.runtime.paths if path.startswith("/runtime/")]
    assert inside == sorted(
        [
            f"/runtime/python/bin/python{MINOR}",
            f"/runtime/python/lib/python{MINOR}/_sysconfigdata__linux.py",
            f"/runtime/python/lib/python{MINOR}/json/__init__.py",
            f"/runtime/python/lib/python{MINOR}/os.py",
            "/runtime/venv/bin/python",
            "/runtime/venv/bin/python3",
            f"/runtime/venv/bin/python{MINOR}",
            "/runtime/venv/lib64",
            f"{site}/alpha-1.0.dist-info/METADATA",
            f"{site}/alpha-1.0.dist-info/RECORD",
            f"{site}/alpha/__init__.py",
            f"{site}/alpha/_native.so",
            f"{site}/beta-2.1.dist-info/METADATA",
            f"{site}/beta-2.1.dist-info/RECORD",
            f"{site}/beta.py",
            "/runtime/venv/pyvenv.cfg",
        ]
    )
    natives = set(found.runtime.paths) - set(inside)
    assert LOADER in natives
    assert {"libc.so.6", "libm.so.6"} <= {path.rpartition("/")[2] for path in natives}
    assert found.app.paths == ("/app/helper.py", "/app/train.py")
    assert found.runtime.python == f"{MINOR}.9"
    assert interpreter_path(found.runtime.python) == f"/runtime/python/bin/python{MINOR}"
    assert [(group.name, group.version, group.files, group.modified) for group in inventory(found).packages] == [
        ("alpha", "1.0", 4, ()),
        ("beta", "2.1", 3, ()),
    ]


def test_no_path_of_this_host_is_in_the_bytes(world: World) -> None:
    assert str(world.root).encode() not in world.measure().to_bytes()


def test_equal_software_elsewhere_has_an_equal_digest(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "somewhere" / "much" / "longer" / "than" / "that")
    (other.site / "alpha-1.0.dist-info" / "INSTALLER").write_text("uv\n")
    (other.site / "alpha-1.0.dist-info" / "REQUESTED").touch()
    (other.site / "beta-2.1.dist-info" / "direct_url.json").write_text(
        '{"url": "file:///wheels/beta.whl", "archive_info": {}}'
    )
    (other.venv / "lib64").symlink_to("lib")
    write(other.venv / "include" / "x.h", b"")
    write(other.job / ".git" / "HEAD", b"ref")
    write(other.job / "__pycache__" / "helper.pyc", b"old")
    write(other.job / ".env", b"SECRET=1")
    for path in other.site.rglob("*.py"):
        os.utime(path, ns=(1, 1))
    assert other.measure("1", A="b").digest == world.measure("1", A="b").digest


def append(path: Path, content: bytes = b"#\n") -> None:
    path.write_bytes(path.read_bytes() + content)


CHANGES: dict[str, Callable[[World], object]] = {
    "an interpreter": lambda world: append(world.base / "bin" / f"python{MINOR}"),
    "a standard module": lambda world: append(world.library / "os.py"),
    "a package module": lambda world: append(world.site / "beta.py"),
    "a new module": lambda world: write(world.site / "numpy.py", b"import os"),
    "a new package folder": lambda world: write(world.site / "evil" / "__init__.py", b""),
    "a new extension module": lambda world: write(world.site / "alpha" / "fast.so", elf()),
    "bytecode beside the sources": lambda world: write(world.site / "secrets.pyc", b"code"),
    "a startup hook": lambda world: write(world.site / "sitecustomize.py", b"import os"),
    "a .pth with code": lambda world: write(world.site / "hook.pth", b"import os; os.abort()\n"),
    "a shared library": lambda world: write(world.venv / "lib" / "libtbb.so.12", elf()),
    "an execute bit": lambda world: (world.site / "beta.py").chmod(0o755),
    "a removed module": lambda world: (world.site / "beta.py").unlink(),
    "metadata": lambda world: append(world.site / "beta-2.1.dist-info" / "METADATA"),
    "a link": lambda world: (world.site / "gamma.py").symlink_to("beta.py"),
    "a needed library": lambda world: write(
        world.site / "alpha" / "_native.so", elf(["libm.so.6", "libdl.so.2"]), mode=0o755
    ),
    "a script": lambda world: append(world.job / "helper.py"),
    "a data file beside the script": lambda world: write(world.job / "conf" / "a.json", b"{}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_can_be_loaded_changes_the_digest(world: World, change: str) -> None:
    before = world.measure()
    CHANGES[change](world)
    assert world.measure().digest != before.digest


HARMLESS: dict[str, Callable[[World], object]] = {
    "foreign bytecode": lambda world: write(world.site / "__pycache__" / "beta.cpython-311.pyc", b"evil"),
    "bytecode of the standard library": lambda world: write(
        world.library / "__pycache__" / "os.cpython-311.pyc", b"evil"
    ),
    "a console script": lambda world: write(world.venv / "bin" / "tool", b"#!/bin/sh\n"),
    "the interpreter's tests": lambda world: write(world.library / "test" / "more.py", b""),
    "packages of the base": lambda world: write(world.library / "site-packages" / "x.py", b""),
    "a virtual environment beside the script": lambda world: write(world.job / "env" / "pyvenv.cfg", b"home = /x\n"),
    "a modification time": lambda world: os.utime(world.site / "beta.py"),
    "a group's permission": lambda world: (world.site / "beta.py").chmod(0o640),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_whatever_cannot_be_loaded_does_not(world: World, change: str) -> None:
    before = world.measure()
    HARMLESS[change](world)
    assert world.measure().digest == before.digest


def editable(world: World) -> None:
    (world.site / "beta-2.1.dist-info" / "direct_url.json").write_text(
        '{"url": "file:///src", "dir_info": {"editable": true}}'
    )


REFUSED: dict[str, tuple[Callable[[World], object], str]] = {
    "a socket": (lambda world: os.mknod(world.site / "s", stat.S_IFSOCK | 0o600), "a socket"),
    "a pipe in the script's folder": (lambda world: os.mkfifo(world.job / "pipe"), "a pipe"),
    "a link to another place": (
        lambda world: (world.site / "x.py").symlink_to("/etc/hostname"),
        "a link to /etc/hostname",
    ),
    "a relative link out": (lambda world: (world.job / "x.py").symlink_to("../venv/pyvenv.cfg"), "leads out"),
    "a link out and back": (lambda world: (world.job / "x.py").symlink_to("../job/helper.py"), "leads out"),
    "a linked folder": (lambda world: (world.site / "cache").symlink_to(world.base), "leads out"),
    "a broken link": (lambda world: (world.site / "x.py").symlink_to("/nowhere"), "a broken link"),
    "an editable install": (editable, "an editable install of file:///src"),
    "a .pth that leads out": (
        lambda world: write(world.site / "dev.pth", b"/home/me/src\n"),
        "/home/me/src to sys.path",
    ),
    "an egg link": (lambda world: write(world.site / "dev.egg-link", b"/home/me/src\n"), "an editable install"),
    "packages of the system": (
        lambda world: world.configure(**{"include-system-site-packages": "true"}),
        "include-system-site-packages",
    ),
    "no home": (lambda world: write(world.venv / "pyvenv.cfg", b"version = 3\n"), "no line `home"),
    "a home without a library": (lambda world: shutil.rmtree(world.library), "no lib/python"),
    "another home": (lambda world: relink(world), "a link to"),
    "two versions": (lambda world: (world.venv / "lib" / "python3.99").mkdir(), "2 folders python3.X"),
    "a zipped library": (
        lambda world: write(world.base / "lib" / f"python{MINOR.replace('.', '')}.zip", b""),
        "zip file",
    ),
    "a shim": (lambda world: replace(world.python, b"#!/bin/sh\n"), "a script"),
    "no script": (lambda world: (world.job / "train.py").unlink(), "no readable regular file"),
    "a linked script": (lambda world: link_script(world), "a link"),
    "a name with a newline": (lambda world: write(world.job / "a\nb.py", b""), "control characters"),
}


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    write(path, content, mode=0o755)


def relink(world: World) -> None:
    other = write(world.root / "other" / f"python{MINOR}", elf(interpreter=LOADER), mode=0o755)
    world.python.unlink()
    world.python.symlink_to(other)


def link_script(world: World) -> None:
    (world.job / "train.py").unlink()
    (world.job / "train.py").symlink_to("helper.py")


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_measured_is_refused_with_a_remedy(world: World, what: str) -> None:
    change, found = REFUSED[what]
    change(world)
    with pytest.raises(InputError) as caught:
        world.measure()
    assert caught.value.code == "workload-unmeasurable"
    assert found in " ".join([str(caught.value), *(reason.found for reason in caught.value.reasons)])
    assert caught.value.hint


def test_all_findings_are_reported_together(world: World) -> None:
    for name in ("a", "b", "c"):
        (world.site / name).symlink_to("/etc")
    with pytest.raises(InputError) as caught:
        world.measure()
    assert len(caught.value.reasons) == 3


def test_script_folder_with_data_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "MAX_APP_BYTES", 1000)
    write(world.job / "data.bin", bytes(1001))
    with pytest.raises(InputError, match="too large to be measured as code") as caught:
        world.measure()
    assert "sealed asset" in caught.value.hint


@contextmanager
def nobody() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="changes its user id to lose the right to read everything")
def test_unreadable_file_is_refused(world: World) -> None:
    for folder in (world.root, *world.root.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    (world.site / "beta.py").chmod(0o600)
    with nobody(), pytest.raises(InputError) as caught:
        world.measure()
    assert [(reason.where, reason.found) for reason in caught.value.reasons] == [
        (str(world.site / "beta.py"), "Permission denied")
    ]


def test_edited_file_is_measured_and_named(world: World) -> None:
    append(world.site / "beta.py")
    (world.site / "alpha" / "__init__.py").unlink()
    found = inventory(world.measure())
    assert found.packages[1].modified == (f"/runtime/venv/lib/python{MINOR}/site-packages/beta.py",)
    assert found.absent == (f"/runtime/venv/lib/python{MINOR}/site-packages/alpha/__init__.py",)


def test_library_that_this_machine_lacks_is_reported(world: World) -> None:
    write(world.site / "alpha" / "gpu.so", elf(["libno-such-thing.so.9"]))
    assert inventory(world.measure()).missing_libraries == (
        ("libno-such-thing.so.9", f"/runtime/venv/lib/python{MINOR}/site-packages/alpha/gpu.so"),
    )


def test_broken_extension_module_is_measured_as_data(world: World) -> None:
    write(world.site / "alpha" / "broken.so", elf(["liba.so"], strings_size=1))
    assert any(path.endswith("broken.so") for path in world.measure().runtime.paths)


def test_base_interpreter_used_directly(world: World) -> None:
    write(world.library / "site-packages" / "direct.py", b"")
    spec = WorkloadSpec(world.base / "bin" / f"python{MINOR}", world.job / "train.py")
    found = measure(spec, cache_dir=world.cache)
    assert f"/runtime/venv/lib/python{MINOR}/site-packages/direct.py" in found.runtime.paths


# The cache.


class Hashing:
    """Counts which files are hashed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        monkeypatch.setattr(measuring, "hash_file", self)

    def __call__(self, path: str, *args: object, **rest: object) -> object:
        self.paths.append(path)
        return hash_file(path, *args, **rest)  # type: ignore[arg-type]


def settled(world: World) -> Workload:
    """Measure when every file is older than the racy window, so that all of it is cached."""
    time.sleep(measuring.RACY_NS / 1e9 + 0.02)
    return world.measure()


def test_second_measurement_hashes_only_the_scripts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = settled(world)
    hashing = Hashing(monkeypatch)
    assert world.measure() == before
    assert sorted(hashing.paths) == [str(world.job / "helper.py"), str(world.job / "train.py")]


def test_one_changed_file_is_one_hash(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settled(world)
    append(world.site / "beta.py")
    hashing = Hashing(monkeypatch)
    world.measure()
    assert [path for path in hashing.paths if path.startswith(str(world.venv))] == [str(world.site / "beta.py")]


def test_change_with_equal_size_and_forged_mtime_is_seen(world: World) -> None:
    before = settled(world)
    path = world.site / "beta.py"
    old = path.stat()
    path.write_bytes(b"import EVILx\n"[: old.st_size])
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert path.stat().st_size == old.st_size
    assert world.measure().digest != before.digest


def test_change_right_after_the_measurement_is_seen(world: World) -> None:
    """Within one tick of the file system's clock a second write can keep size and times."""
    for step in range(20):
        (world.site / "beta.py").write_bytes(b"A%02d\n" % step)
        first = world.measure().digest
        (world.site / "beta.py").write_bytes(b"B%02d\n" % step)
        assert world.measure().digest != first


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:200] + b"\xff" + data[201:]]
)
def test_damaged_cache_is_measured_again(world: World, damage: Callable[[bytes], bytes]) -> None:
    before = settled(world)
    (path,) = world.cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert world.measure() == before


def test_planted_cache_does_not_pass_without_the_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    key = Secret(b"k" * 32)
    before = settled(world)  # a cache without a MAC, as an attacker can write it
    hashing = Hashing(monkeypatch)
    assert measure(world.spec(), cache_dir=world.cache, mac_key=key) == before
    assert str(world.site / "beta.py") in hashing.paths
    hashing.paths.clear()
    assert measure(world.spec(), cache_dir=world.cache, mac_key=key) == before
    assert str(world.site / "beta.py") not in hashing.paths
    measure(world.spec(), cache_dir=world.cache, mac_key=Secret(b"x" * 32))
    assert str(world.site / "beta.py") in hashing.paths


def test_native_library_is_a_condition_of_the_cache(world: World) -> None:
    library = write(world.root / "opt" / "libspecial.so.1", elf())
    write(
        world.site / "alpha" / "special.so", elf(["libspecial.so.1"], runpath=f"{world.root}/opt/hw:{world.root}/opt")
    )
    before = settled(world)
    assert any(path.endswith("/libspecial.so.1") for path in before.runtime.paths)
    append(library)
    changed = world.measure()
    assert changed.digest != before.digest
    time.sleep(0.1)
    assert settled(world) == changed
    # A library that appears in a folder that is searched earlier takes its place.
    write(world.root / "opt" / "hw" / "libspecial.so.1", elf(["libm.so.6"]))
    assert world.measure().digest not in (before.digest, changed.digest)


def test_cache_folder_that_cannot_be_written_costs_only_time(world: World) -> None:
    world.cache.write_text("a file where the folder should be")
    assert world.measure().digest == measure(world.spec(), cache_dir=world.root / "other").digest


def test_progress_ends_at_the_total(world: World) -> None:
    seen: list[tuple[int, int]] = []
    measure(world.spec(), cache_dir=world.cache, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_interrupt_comes_through(world: World) -> None:
    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(world.spec(), cache_dir=world.cache, progress=stop)
    assert not world.cache.exists()


# Files that change while they are read.


def test_file_that_grows_while_it_is_hashed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x", b"content")
    real = os.read

    def grow(descriptor: int, size: int) -> bytes:
        data = real(descriptor, size)
        with path.open("ab") as file:
            file.write(b"more")
        return data

    monkeypatch.setattr(os, "read", grow)
    with pytest.raises(ChangedError):
        hash_file(str(path))


def test_file_that_was_exchanged_after_the_scan_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x", b"content")
    seen = signature_of(path.stat())
    assert hash_file(str(path), seen).size_bytes == 7
    path.unlink()
    write(path, b"CONTENT")
    with pytest.raises(ChangedError):
        hash_file(str(path), seen)


def test_link_that_took_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(write(tmp_path / "y", b"content"))
    with pytest.raises(OSError, match="symbolic"):
        hash_file(str(tmp_path / "x"))


def test_the_interpreter_that_runs_this_test_can_be_measured(tmp_path: Path) -> None:
    """The environment of the developer may hold an editable install; its base interpreter is always measurable."""
    base = Path(os.path.realpath(sys.executable))
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    write(tmp_path / "job" / "a.py", b"")
    found = measure(
        WorkloadSpec(tmp_path / "venv" / "bin" / "python", tmp_path / "job" / "a.py"), cache_dir=tmp_path / "cache"
    )
    assert found.runtime.python == ".".join(map(str, sys.version_info[:3]))
    assert interpreter_path(found.runtime.python).endswith(base.name)
    assert inventory(found).packages == ()
    assert str(tmp_path).encode() not in found.to_bytes()
