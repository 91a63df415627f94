"""Staging: exactly the measured files, nothing half, nothing foreign, found out when changed."""

from __future__ import annotations

import importlib.util
import json
import marshal
import os
import stat
import struct
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from types import CodeType

import pytest

import cloister.node.workload.edge.bytecode as compiling
import cloister.node.workload.edge.stage as staging
from cloister.crypto.canonical import cbor_decode
from cloister.crypto.keys import Secret
from cloister.errors import InputError, MachineError, TamperedError
from cloister.node.workload import Part, Staged, Workload, WorkloadSpec, measure, prune, stage, stored
from cloister.node.workload.edge import cache
from cloister.node.workload.edge.bytecode import Bind, bubblewrap
from cloister.node.workload.edge.hashing import Hashed, hash_file
from tests.node.workload.elves import elf
from tests.node.workload.world import MINOR, World, write

SITE = f"runtime/venv/lib/python{MINOR}/site-packages"
TAG = sys.implementation.cache_tag


def no_jail(argv: Sequence[str], binds: Sequence[Bind]) -> subprocess.Popen[bytes]:
    """No confinement here: the node's own interpreter compiles (the made-up one cannot run)."""
    raise FileNotFoundError("bwrap")


class Store:
    """A store and what tests look at in it."""

    def __init__(self, world: World, path: Path) -> None:
        self.world = world
        self.path = path

    def stage(self, workload: Workload | None = None, *args: str, **options: object) -> Staged:
        spec = self.world.spec(*args)
        found = workload if workload is not None else self.world.measure(*args)
        return stage(found, spec, store=self.path, **{"jail": no_jail, **options})  # type: ignore[arg-type]

    def root(self, part: str) -> Path:
        (path,) = self.path.glob(f"{part}-*/root")
        return path

    def files(self, part: str) -> set[str]:
        root = self.root(part)
        return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir() or path.is_symlink()}


@pytest.fixture
def store(world: World, tmp_path: Path) -> Store:
    return Store(world, tmp_path / "store")


def test_tree_holds_exactly_the_measured_files_and_our_bytecode(store: Store) -> None:
    write(store.world.site / "__pycache__" / f"beta.{TAG}.pyc", b"foreign")
    workload = store.world.measure()
    write(store.world.site / "late.py", b"raise SystemExit\n")
    write(store.world.site / "alpha" / "late.so", elf())
    staged = store.stage(workload)
    for layer in (workload.runtime, workload.app):
        measured = {path[1:] for path in layer.paths}
        sources = [path for path in measured if path.endswith(".py")]
        places = [(path.rpartition("/")[0], path.rpartition("/")[2]) for path in sources]
        compiled = {f"{folder}/__pycache__/{name[:-3]}.{TAG}.pyc" for folder, name in places}
        assert store.files(layer.part) == measured | compiled
    assert staged.compiled == 7
    assert (store.root("runtime") / SITE / "__pycache__" / f"beta.{TAG}.pyc").read_bytes() != b"foreign"


def test_files_are_read_only_and_the_store_is_private(store: Store) -> None:
    store.stage()
    for path in [store.root("runtime"), *store.root("runtime").rglob("*")]:
        if not path.is_symlink():
            assert stat.S_IMODE(path.stat().st_mode) in (0o444, 0o555), path
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o700
    assert os.access(store.root("runtime") / SITE / "alpha" / "_native.so", os.X_OK)


def test_environment_is_written_for_the_jail(store: Store) -> None:
    store.stage()
    root = store.root("runtime")
    assert (root / "runtime/venv/pyvenv.cfg").read_text() == (
        f"home = /runtime/python/bin\ninclude-system-site-packages = false\nversion = {MINOR}.9\n"
    )
    assert (root / "runtime/venv/bin/python").resolve() == root / f"runtime/python/bin/python{MINOR}"
    record = (root / SITE / "beta-2.1.dist-info/RECORD").read_text().splitlines()
    assert [line.split(",")[0] for line in record] == [
        "beta-2.1.dist-info/METADATA",
        "beta.py",
        "beta-2.1.dist-info/RECORD",
    ]
    assert (
        str(store.world.root) not in (root / f"runtime/python/lib/python{MINOR}/_sysconfigdata__linux.py").read_text()
    )


def test_bytecode_names_the_jail_and_is_loaded_without_a_look_at_the_source(store: Store) -> None:
    store.stage()
    data = (store.root("runtime") / SITE / "__pycache__" / f"beta.{TAG}.pyc").read_bytes()
    assert data[:4] == importlib.util.MAGIC_NUMBER
    assert struct.unpack("<I", data[4:8]) == (0b01,)
    assert data[8:16] == importlib.util.source_hash(b"import alpha\n")
    code = marshal.loads(data[16:])
    assert isinstance(code, CodeType)
    assert code.co_filename == f"/{SITE}/beta.py"


def test_binds_cover_the_jail(store: Store) -> None:
    staged = store.stage()
    targets = {target: source for source, target in staged.binds}
    assert targets["/runtime"] == store.root("runtime") / "runtime"
    assert targets["/app"] == store.root("app") / "app"
    assert targets["/lib64/ld-linux-x86-64.so.2"].is_file()
    assert all(source.is_absolute() and source.exists() for source in targets.values())


def test_other_arguments_or_scripts_do_not_copy_the_runtime(store: Store) -> None:
    store.stage(None, "1")
    before = store.root("runtime").parent.stat().st_ino
    store.stage(None, "2")
    assert len(stored(store.path)) == 2
    write(store.world.job / "train.py", b"import alpha\n")
    store.stage(None, "2")
    assert [layer.part for layer in stored(store.path)] == [Part.APP, Part.APP, Part.RUNTIME]
    assert store.root("runtime").parent.stat().st_ino == before


def test_second_stage_reads_no_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.stage()
    workload = store.world.measure()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file was read")

    monkeypatch.setattr(staging, "hash_file", refuse)
    monkeypatch.setattr(staging, "opened", refuse)
    assert store.stage(workload) == first
    with pytest.raises(AssertionError):
        store.stage(workload, full=True)


def changed(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)


@pytest.mark.parametrize("key", [None, Secret(b"k" * 32)])
@pytest.mark.parametrize("name", ["beta.py", f"__pycache__/beta.{TAG}.pyc", "beta-2.1.dist-info/RECORD"])
def test_changed_file_in_the_store_is_found(store: Store, name: str, key: Secret | None) -> None:
    workload = store.world.measure()
    store.stage(workload, mac_key=key)
    changed(store.root("runtime") / SITE / name, b"evil")
    with pytest.raises(TamperedError) as caught:
        store.stage(workload, mac_key=key)
    assert [reason.where for reason in caught.value.reasons] == [f"{SITE}/{name}"]


def test_file_more_or_less_in_the_store_is_found(store: Store) -> None:
    workload = store.world.measure()
    store.stage(workload)
    folder = store.root("runtime") / SITE
    folder.chmod(0o755)
    write(folder / "numpy.py", b"evil", mode=0o444)
    (folder / "beta.py").unlink()
    folder.chmod(0o555)
    with pytest.raises(TamperedError) as caught:
        store.stage(workload)
    first, second = caught.value.reasons[:2]
    assert (first.where, first.found) == (f"{SITE}/beta.py", "no such file")
    assert (second.where, second.wanted) == (f"{SITE}/numpy.py", "no such file")


def test_changed_content_under_old_signatures_is_found_by_a_full_check(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a writer below the file system (the disk) can do: other bytes, no other sign."""
    workload = store.world.measure()
    store.stage(workload)
    before = staging._Listing.of(store.root("runtime"))
    changed(store.root("runtime") / SITE / "beta.py", b"import ALPHA\n")
    real = staging._Listing.of

    def blind(root: Path) -> staging._Listing:
        return before if root.parent.name.startswith("runtime") else real(root)

    monkeypatch.setattr(staging._Listing, "of", blind)
    store.stage(workload)
    with pytest.raises(TamperedError):
        store.stage(workload, full=True)


def test_touched_but_unchanged_file_is_accepted_after_hashing(store: Store) -> None:
    workload = store.world.measure()
    store.stage(workload)
    os.utime(store.root("runtime") / SITE / "beta.py", ns=(1, 1))
    store.stage(workload)


def test_another_boot_hashes_everything_once(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    workload = store.world.measure()
    store.stage(workload)
    monkeypatch.setattr(staging, "BOOT_ID", write(tmp_path / "boot", b"another-boot\n"))
    read: list[str] = []

    def counted(path: str) -> Hashed:
        read.append(path)
        return hash_file(path)

    monkeypatch.setattr(staging, "hash_file", counted)
    store.stage(workload)
    count = len(read)
    assert count > 10
    store.stage(workload)
    assert len(read) == count


def test_index_of_another_key_is_no_index(store: Store) -> None:
    workload = store.world.measure()
    store.stage(workload)
    evil = store.root("runtime") / SITE / "__pycache__" / f"beta.{TAG}.pyc"
    changed(evil, b"evil")
    store.stage(workload, mac_key=Secret(b"k" * 32))  # built anew, from the sources
    assert evil.read_bytes() != b"evil"


def test_source_that_changed_after_the_measurement_is_refused(store: Store) -> None:
    workload = store.world.measure()
    write(store.world.site / "beta.py", b"import ALPHA\n")
    (store.world.site / "alpha" / "__init__.py").unlink()
    with pytest.raises(InputError) as caught:
        store.stage(workload)
    assert caught.value.code == "workload-changed"
    assert {reason.where for reason in caught.value.reasons} == {
        str(store.world.site / "beta.py"),
        str(store.world.site / "alpha" / "__init__.py"),
    }
    assert [path.name for path in store.path.iterdir()] == ["lock"]


def test_script_that_changed_after_the_measurement_is_refused(store: Store) -> None:
    workload = store.world.measure()
    write(store.world.job / "helper.py", b"STEP = 9\n")
    with pytest.raises(InputError, match="no longer what was measured"):
        store.stage(workload)
    assert not list(store.path.glob("app-*"))


def test_library_that_was_updated_after_the_measurement_is_refused(store: Store) -> None:
    library = write(store.world.root / "opt" / "libspecial.so.1", elf())
    write(store.world.site / "alpha" / "special.so", elf(["libspecial.so.1"], runpath=str(library.parent)))
    workload = store.world.measure()
    library.write_bytes(elf(padding=b"update"))
    with pytest.raises(InputError, match="no longer what was measured") as caught:
        store.stage(workload)
    assert caught.value.reasons[0].where.endswith("/libspecial.so.1")
    library.write_bytes(elf())
    store.stage(workload)


def test_workload_of_another_machine_is_staged_from_its_bytes(store: Store, tmp_path: Path) -> None:
    elsewhere = World(tmp_path / "elsewhere")
    received = Workload.from_bytes(elsewhere.measure().to_bytes())
    store.stage(received)
    assert store.files("app") >= {"app/train.py", "app/helper.py"}


@pytest.mark.parametrize("after", [0.0, 0.3, 0.6, 0.95])
def test_interrupted_staging_leaves_nothing(store: Store, after: float) -> None:
    workload = store.world.measure()

    def stop(done: int, total: int) -> None:
        if done >= after * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.stage(workload, progress=stop)
    assert [path.name for path in store.path.iterdir()] == ["lock"]
    store.stage(workload)


@pytest.mark.parametrize("budget", [0, 3, 12, 26])
def test_full_disk_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    workload = store.world.measure()
    real, left = os.write, [budget]

    def full(descriptor: int, data: bytes) -> int:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(MachineError) as caught:
            store.stage(workload)
    assert caught.value.code == "disk-full"
    assert not list(store.path.glob("tmp-*"))
    assert not list(store.path.glob("app-*"))
    store.stage(workload)


def test_what_a_killed_process_left_is_removed(store: Store) -> None:
    left = write(store.path / "tmp-0123" / "root" / "runtime" / "x", b"half", mode=0o444)
    left.parent.chmod(0o555)
    store.stage()
    assert not list(store.path.glob("tmp-*"))


def test_layer_without_an_index_is_built_anew(store: Store) -> None:
    workload = store.world.measure()
    store.stage(workload)
    index = store.root("runtime").parent / "index"
    index.write_bytes(index.read_bytes()[:-1])
    store.stage(workload)
    store.stage(workload)


def test_prune_keeps_what_is_named(store: Store) -> None:
    old = store.world.measure()
    store.stage(old)
    write(store.world.job / "train.py", b"import alpha\n")
    new = store.world.measure()
    store.stage(new)
    sizes = {layer.digest: layer.size_bytes for layer in stored(store.path)}
    assert sizes.keys() == {old.runtime.digest, old.app.digest, new.app.digest}
    assert prune(store.path, [new]) == sizes[old.app.digest]
    assert {layer.digest for layer in stored(store.path)} == {new.runtime.digest, new.app.digest}
    prune(store.path, [])
    assert stored(store.path) == ()


def test_store_that_is_no_folder(store: Store) -> None:
    store.path.write_text("a file")
    with pytest.raises(MachineError, match="cannot be used"):
        store.stage()


def test_progress_ends_at_the_total(store: Store) -> None:
    seen: list[tuple[int, int]] = []
    store.stage(progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


# What one workload, or whoever has the disk, could plant for another.

EVIL_COMPILER = """
import importlib.util, marshal, struct, sys
code = marshal.dumps(compile("STEP = 'evil'", "x", "exec"))
data = importlib.util.MAGIC_NUMBER + struct.pack("<I", 1) + bytes(8) + code
for line in sys.stdin.buffer:
    there = not line.startswith(b"/no/such")
    sys.stdout.buffer.write(struct.pack(">I", len(data)) + data if there else b"\\xff" * 4)
    sys.stdout.flush()
"""


def test_hostile_interpreter_cannot_plant_bytecode_for_the_same_scripts_under_another(store: Store) -> None:
    def evil(argv: Sequence[str], binds: Sequence[Bind]) -> subprocess.Popen[bytes]:
        return compiling._start([sys.executable, "-I", "-S", "-c", EVIL_COMPILER])

    honest = store.world.measure()
    write(store.world.library / "os.py", b"name = 'evil'\n")
    hostile = store.world.measure()
    assert hostile.app.digest == honest.app.digest
    store.stage(hostile, jail=evil)
    write(store.world.library / "os.py", b"name = 'posix'\n")
    staged = store.stage(honest)
    app = next(source for source, target in staged.binds if target == "/app")
    assert b"evil" not in (app / "__pycache__" / f"helper.{TAG}.pyc").read_bytes()


@pytest.mark.parametrize("forged_with", [None, Secret(b"operator's own key, thirty-two b")])
def test_operator_cannot_rewrite_the_store_while_the_machine_is_off(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forged_with: Secret | None
) -> None:
    workload = store.world.measure()
    store.stage(workload)
    evil = store.root("runtime") / SITE / "__pycache__" / f"beta.{TAG}.pyc"
    changed(evil, b"evil")
    index = store.root("runtime").parent / "index"
    listing = staging._Listing.of(store.root("runtime"))
    listing.digests(store.root("runtime"))
    body = cbor_decode(index.read_bytes()[cache._HEADER :])
    cache.save(index, {**body, **listing.columns()}, label=staging.LABEL, mac_key=forged_with)
    store.stage(workload)
    assert evil.read_bytes() != b"evil"


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
def test_store_that_others_can_write_to_is_refused(store: Store, mode: int) -> None:
    store.path.mkdir()
    store.path.chmod(mode)
    with pytest.raises(MachineError, match="others can write"):
        store.stage()


# The compiler is untrusted: what it answers cannot hang, fill or confuse the node.

HOSTILE = {
    "silence": "import sys; sys.stdin.buffer.readline()",
    "garbage": "import sys\nfor line in sys.stdin.buffer:\n    sys.stdout.buffer.write(b'\\x00\\x00\\x00\\x05abcde'); sys.stdout.flush()",
    "a length of gigabytes": "import sys\nfor line in sys.stdin.buffer:\n    sys.stdout.buffer.write(b'\\xf0\\x00\\x00\\x00'); sys.stdout.flush()",
    "bytecode that looks at times": "import sys\nfor line in sys.stdin.buffer:\n    sys.stdout.buffer.write(b'\\x00\\x00\\x00\\x20' + bytes(32)); sys.stdout.flush()",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_compiler_yields_no_bytecode(store: Store, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "minor", lambda _python: "0.0")  # no fallback to our own interpreter

    def hostile(argv: Sequence[str], binds: Sequence[Bind]) -> subprocess.Popen[bytes]:
        return compiling._start([sys.executable, "-I", "-S", "-c", HOSTILE[what]])

    assert store.stage(jail=hostile).compiled == 0
    assert not [path for path in store.files("runtime") if path.endswith(".pyc")]


def test_source_that_kills_the_compiler_costs_only_itself(store: Store) -> None:
    write(store.world.site / "alpha" / "killer.py", b"KILL\n")
    dies = compiling.WORKER.replace(
        "        code = compile(", "        if source == b'KILL\\n': sys.exit(9)\n        code = compile("
    )

    def fragile(argv: Sequence[str], binds: Sequence[Bind]) -> subprocess.Popen[bytes]:
        root = next((source.parent for source, target in binds if target == "/app"), None) or next(
            source.parent for source, target in binds if target == "/runtime"
        )
        return compiling._start([sys.executable, "-I", "-S", "-B", "-c", dies, str(root)])

    staged = store.stage(jail=fragile)
    names = {path for path in store.files("runtime") if path.endswith(".pyc")}
    assert f"{SITE}/__pycache__/beta.{TAG}.pyc" in names
    assert f"{SITE}/alpha/__pycache__/killer.{TAG}.pyc" not in names
    assert staged.compiled == 7


def test_source_with_a_syntax_error_has_no_bytecode(store: Store) -> None:
    write(store.world.site / "alpha" / "template.py", b"def {{name}}:\n")
    store.stage()
    assert f"{SITE}/alpha/template.py" in store.files("runtime")
    assert not [path for path in store.files("runtime") if "template." in path and path.endswith(".pyc")]


@pytest.mark.slow
def test_compiler_that_never_answers_is_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(compiling, "minor", lambda _python: "0.0")

    def mute(argv: Sequence[str], binds: Sequence[Bind]) -> subprocess.Popen[bytes]:
        return compiling._start([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])

    started = time.monotonic()
    assert store.stage(jail=mute).compiled == 0
    assert time.monotonic() - started < 20


# The real thing: an environment made by venv, its staged form under bubblewrap.


def jail_works() -> bool:
    try:
        started = subprocess.run(
            ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True, check=False
        )
    except OSError:
        return False
    return started.returncode == 0


SCRIPT = b"""
import bz2, ctypes, hashlib, importlib.metadata, json, lzma, multiprocessing, os, sqlite3, ssl, sys, sysconfig, threading
import greeting

def square(x):
    return x * x

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        squares = pool.map(square, range(4))
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    sqlite3.connect(":memory:").execute("select 1")
    ssl.create_default_context()
    print(json.dumps({
        "argv": sys.argv, "path": sys.path, "squares": squares, "greeting": greeting.TEXT, "cached": json.__cached__,
        "prefix": [sys.prefix, sys.base_prefix, sys.executable], "version": importlib.metadata.version("greeting"),
        "files": sorted(str(path) for path in importlib.metadata.files("greeting")),
        "bindir": sysconfig.get_config_var("BINDIR"), "env": sorted(os.environ),
    }))
"""


@pytest.mark.slow
@pytest.mark.skipif(not jail_works(), reason="bubblewrap does not work here")
def test_staged_environment_runs_in_a_jail_that_holds_nothing_else(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    site = tmp_path / "venv" / "lib" / f"python{MINOR}" / "site-packages"
    write(site / "greeting.py", b"TEXT = 'measured'\n")
    info = "greeting-1.2.dist-info"
    write(site / info / "METADATA", b"Metadata-Version: 2.1\nName: greeting\nVersion: 1.2\n")
    write(site / info / "RECORD", f"greeting.py,,\n{info}/METADATA,,\n{info}/RECORD,,\n".encode())
    # Foreign bytecode that python would load outside: unchecked hash, other content.
    evil = (
        importlib.util.MAGIC_NUMBER
        + struct.pack("<I", 1)
        + bytes(8)
        + marshal.dumps(compile("TEXT = 'evil'", "x", "exec"))
    )
    write(site / "__pycache__" / f"greeting.{TAG}.pyc", evil)
    python = tmp_path / "venv" / "bin" / "python"
    outside = subprocess.run(
        [python, "-c", "import greeting; print(greeting.TEXT)"], capture_output=True, text=True, check=True
    )
    assert outside.stdout == "evil\n"

    spec = WorkloadSpec(python, write(tmp_path / "job" / "main.py", SCRIPT), ("--x", "1"), {"LANG": "C.UTF-8"})
    workload = measure(spec, cache_dir=tmp_path / "cache")
    write(site / "late.py", b"")
    staged = stage(workload, spec, store=tmp_path / "store")
    assert staged.compiled > 500
    options = [word for source, target in staged.binds for word in ("--ro-bind", str(source), target)]
    settings = [word for name, text in workload.env.items() for word in ("--setenv", name, text)]
    command = [
        "bwrap",
        "--unshare-all",
        "--clearenv",
        *settings,
        *options,
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--tmpfs",
        "/tmp",
    ]
    inside = subprocess.run(
        [*command, "--chdir", workload.cwd, "--", *workload.argv], capture_output=True, text=True, check=False
    )
    assert inside.returncode == 0, inside.stderr
    found = json.loads(inside.stdout)
    library = f"/runtime/python/lib/python{MINOR}"
    assert found["argv"] == ["/app/main.py", "--x", "1"]
    assert found["path"][0] == "/app"
    assert {library, f"{library}/lib-dynload", f"/{SITE}"} <= set(found["path"])
    assert found["prefix"] == ["/runtime/venv", "/runtime/python", "/runtime/venv/bin/python"]
    assert found["greeting"] == "measured"
    assert found["squares"] == [0, 1, 4, 9]
    assert found["cached"] == f"{library}/json/__pycache__/__init__.{TAG}.pyc"
    assert found["files"] == [f"{info}/METADATA", f"{info}/RECORD", "greeting.py"]
    late = subprocess.run(
        [*command, "--", workload.argv[0], "-c", "import late"], capture_output=True, text=True, check=False
    )
    assert "No module named 'late'" in late.stderr


@pytest.mark.skipif(not jail_works(), reason="bubblewrap does not work here")
def test_compiler_jail_has_no_network_and_no_host_files(tmp_path: Path) -> None:
    write(tmp_path / "in" / "x", b"1")
    binds: list[Bind] = [
        (tmp_path / "in", "/in"),
        *[(Path(name), name) for name in ("/usr", "/lib", "/lib64") if Path(name).exists()],
    ]
    script = "ls / /proc/sys/net/ipv4/conf /in; cat /proc/net/dev | wc -l; touch /in/y || echo read-only; ls /etc /home /root 2>&1 | head -3; env"
    process = bubblewrap(["/usr/bin/bash", "-c", script], binds)
    text = process.communicate()[0].decode()
    assert "read-only" in text
    assert not {"etc", "home", "root", "var", "sys"} & set(text.split())
    assert "eth" not in text
    assert "HOME=" not in text


@pytest.mark.skipif(not jail_works(), reason="bubblewrap does not work here")
@pytest.mark.parametrize(
    ("attempt", "call"),
    [
        ("a user namespace, where root's calls are open again", "os.unshare(os.CLONE_NEWUSER)"),
        ("the hypervisor's socket", "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)"),
        ("the kernel's keyrings", "syscall(250, 0, -4, 0)"),
        ("a memory fault handler in user space", "syscall(323, 0)"),
        ("tracing", "syscall(101, 0, 0, 0, 0)"),
        ("a BPF program", "syscall(321, 0, 0, 0)"),
    ],
)
def test_hostile_interpreter_in_the_compiler_jail_is_refused(attempt: str, call: str) -> None:
    script = f"""
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def syscall(*words):
    if libc.syscall(*words) < 0:
        raise OSError(ctypes.get_errno(), "")
if not hasattr(os, "unshare"):
    os.CLONE_NEWUSER, os.unshare = 0x10000000, lambda flags: syscall(272, flags)
try:
    {call}
except OSError as error:
    print("refused", error.errno)
else:
    print("done")
"""
    if os.uname().machine != "x86_64":
        pytest.skip("numbers of x86-64")
    base = Path(sys.base_prefix)
    folders = {Path("/usr"), Path("/lib"), Path("/lib64"), base}
    binds: list[Bind] = [(path, str(path)) for path in sorted(folders) if path.exists()]
    program = str(Path(sys.executable).resolve())
    process = bubblewrap([program, "-I", "-S", "-c", script], binds)
    answer = process.communicate()[0].decode()
    assert answer.startswith("refused"), attempt


@pytest.mark.skipif(not jail_works(), reason="bubblewrap does not work here")
def test_a_program_called_bwrap_in_the_callers_path_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "bwrap", b"#!/bin/sh\necho mine\n", mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    process = bubblewrap(["/none"], [])
    assert b"mine" not in process.communicate()[0]
