"""Copy exactly what was measured into a read-only tree for the jail, hashing every byte on the way.

    store/                       0700
      lock                       one process stages or prunes at a time
      runtime-<64 hex>/          one layer; the name is its digest
        index                    sealed: every entry's signature and SHA-256, written last
        root/                    the layer as the jail sees it: runtime/ lib64/ usr/lib/..., or app/
      app-<64 hex>-<64 hex>/     an app layer and the runtime layer whose interpreter made its bytecode
      tmp-<random>/              being built; removed by the next that takes the lock

Building a layer:
  1 copy      each row's source through one open descriptor: hash while copying, refuse what is not as measured
  2 generate  links, pyvenv.cfg, RECORD files: written from the measured rows, then checked against them
  3 compile   bytecode from the copied sources, by the copied interpreter, in a jail            bytecode.py
  4 close     files 0444 or 0555, folders 0555
  5 seal      the index; then one rename makes the layer appear

Using a layer that is there:
  6 index     MAC of a key that the disk's owner does not have (default: one of this boot); else the layer is built anew
  7 compare   names and signatures of the whole tree against the index
  8 rehash    if anything differs, or another boot wrote it, or on request: every file against its SHA-256; content that
              differs, a file more or a file less is TamperedError
What was not flushed when the machine lost power is caught by (8): the index names the boot that it was written in.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cloister.crypto.keys import Secret
from cloister.errors import InputError, MachineError, Reason, TamperedError
from cloister.node.workload import ldcache, native, packages
from cloister.node.workload.edge import bytecode, cache
from cloister.node.workload.edge.bootkey import boot_key
from cloister.node.workload.edge.bytecode import Bind, Jail
from cloister.node.workload.edge.hashing import BLOCK_BYTES, ChangedError, elf_of, hash_file, in_batches, opened, reader
from cloister.node.workload.edge.locate import Environment, Tree, locate
from cloister.node.workload.edge.measure import LD_CACHE, app_tree, content_of
from cloister.node.workload.edge.scan import MAX_REASONS, WIDTH
from cloister.node.workload.elf import Elf
from cloister.node.workload.form import (
    APP_ROOT,
    NATIVE,
    PYTHON_ROOT,
    Kind,
    Layer,
    Part,
    Progress,
    Row,
    Workload,
    WorkloadSpec,
    interpreter_path,
    minor,
)

LABEL: Final = "cloister/stage-index/1"
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Staged:
    """A workload on disk, ready to be bound into a jail.

    `binds` are (folder or file of this host, jail path), read-only; together they are everything that the program can
    load. `compiled` counts the modules that have bytecode.
    """

    root: Path
    binds: tuple[Bind, ...]
    compiled: int


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One layer in a store."""

    part: Part
    digest: str
    size_bytes: int


def stage(
    workload: Workload,
    spec: WorkloadSpec,
    *,
    store: Path,
    progress: Progress | None = None,
    mac_key: Secret | None = None,
    jail: Jail | None = None,
    full: bool = False,
) -> Staged:
    """Return the staged form of `workload`, building what `store` does not have from the files that `spec` names.

    Args:
        store: private folder, made if missing. Layers are shared by all workloads that have them.
        progress: called with (bytes done, bytes in total); compiling counts the bytes of the sources once more.
        mac_key: authenticates the indexes, so that whoever can write to the disk below `store` cannot pass other files;
            default: a key of this boot, see `bootkey`.
        jail: how the compiler is confined (default: bubblewrap, see `bytecode`).
        full: hash every staged file again instead of comparing signatures.

    Raises:
        InputError: (`workload-changed`) a source is no longer what was measured.
        TamperedError: a staged file is no longer what was staged.
        MachineError: (`disk-full`) there is no room; nothing half-built is left. Others can write to `store`.
    """
    store = store.absolute()
    mac_key = boot_key() if mac_key is None else mac_key
    with _locked(store):
        runtime = _Layer(store, workload.runtime, _names(workload)[0], mac_key)
        compiled = runtime.use(full) or 0
        if not runtime.ready:
            compiled = _build_runtime(runtime, spec, jail, progress)
        app = _Layer(store, workload.app, _names(workload)[1], mac_key)
        extra = app.use(full) or 0
        if not app.ready:
            extra = _build_app(app, runtime, spec, jail)
    return Staged(store, (*runtime.binds(), *app.binds()), compiled + extra)


def stored(store: Path) -> tuple[StoredLayer, ...]:
    """Return the layers in `store`, with the bytes that their files occupy."""
    return tuple(
        StoredLayer(Part(part), f"sha256:{digest}", _size(path))
        for path in sorted(store.glob("*-*"))
        for part, digest in [path.name.split("-")[:2]]
        if part in set(Part)
    )


def prune(store: Path, keep: Iterable[Workload]) -> int:
    """Remove the layers that no workload of `keep` uses, and what interrupted staging left; return the bytes freed.

    Programs that run from a removed layer lose it: keep what is in use.
    """
    names = {name for workload in keep for name in _names(workload)}
    freed = 0
    with _locked(store):
        for path in store.glob("*-*"):
            if path.name.partition("-")[0] in set(Part) and path.name not in names:
                freed += _size(path)
                _remove(path)
    return freed


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Hold the store; remove what an interrupted process left. Waits for another process that stages."""
    try:
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(store / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MachineError(
            f"the folder {store} cannot be used: {error.strerror}", hint="choose another, or free space"
        ) from error
    try:
        found = store.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise MachineError(
                f"others can write to {store}, so they could exchange what a program loads",
                reasons=[Reason(str(store), f"owner {found.st_uid}, mode {found.st_mode & 0o7777:o}", "yours alone")],
                hint=f"chown it to yourself and chmod go-w {store}, or name another folder",
            )
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for path in store.glob("tmp-*"):
            _remove(path)
        yield
    finally:
        os.close(descriptor)


def _names(workload: Workload) -> tuple[str, str]:
    """Return the folder names of the runtime and the app layer.

    An app layer holds bytecode that this runtime's interpreter made, and an interpreter may belong to anybody: under another
    runtime, the same scripts are another folder.
    """
    runtime, app = (layer.digest.removeprefix("sha256:") for layer in (workload.runtime, workload.app))
    return f"{Part.RUNTIME}-{runtime}", f"{Part.APP}-{app}-{runtime}"


class _Layer:
    """One layer of the store: where it is, whether it is ready, how it is built and checked."""

    def __init__(self, store: Path, layer: Layer, name: str, mac_key: Secret) -> None:
        self.store = store
        self.layer = layer
        self.path = store / name
        self.mac_key = mac_key
        self.ready = False

    @property
    def root(self) -> Path:
        return self.path / "root"

    def binds(self) -> tuple[Bind, ...]:
        """Folders of the layer, and the dynamic loader as a file: its folder may hold other things in a jail."""
        if self.layer.part is Part.APP:
            return ((self.root / "app", APP_ROOT),)
        loaders = set(native.LOADERS.values())
        found = [path for path in self.layer.paths if path in loaders]
        folders = {
            path.rpartition("/")[0]
            for path in self.layer.paths
            if not path.startswith("/runtime/") and path not in loaders
        }
        return tuple([(self.root / path[1:], path) for path in ["/runtime", *sorted(folders), *found]])

    def use(self, full: bool) -> int | None:
        """Make an existing layer `ready`; return its count of compiled modules, None if it has to be built."""
        body = cache.load(self.path / "index", label=LABEL, mac_key=self.mac_key)
        if body is None or body.get("layer") != self.path.name:  # (6)
            if self.path.exists():
                _remove(self.path)
            return None
        listing = _Listing.of(self.root)
        same = listing.names == body["names"] and listing.signatures.tobytes() == body["signatures"]  # (7)
        if full or not same or body["boot"] != _boot():
            self._rehash(listing, body)  # (8)
            cache.save(
                self.path / "index", {**body, **listing.columns(), "boot": _boot()}, label=LABEL, mac_key=self.mac_key
            )
        self.ready = True
        return int(body["compiled"])

    def _rehash(self, listing: _Listing, body: dict[str, Any]) -> None:
        wanted = _digests(body["names"], body["digests"])
        found = listing.digests(self.root)
        paths = sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
        if paths:
            reasons = [
                Reason(path, _state(found.get(path)), _state(wanted.get(path)), "") for path in paths[:MAX_REASONS]
            ]
            raise TamperedError(
                f"{len(paths)} staged files are not what was staged in {self.path}",
                reasons=reasons,
                hint=f"find out who writes there; then remove {self.path} and stage again",
            )

    @contextmanager
    def building(self) -> Iterator[Path]:
        """Yield the root of a new tree; on success seal it and rename it into place, else remove it."""
        temporary = self.store / f"tmp-{secrets.token_hex(8)}"
        root = temporary / "root"
        try:
            temporary.mkdir(mode=0o700)
            root.mkdir(mode=0o755)
            yield root
        except OSError as error:
            _remove(temporary)
            raise _failed(error, self.layer.size_bytes) from error
        except BaseException:
            _remove(temporary)
            raise

    def finish(self, root: Path, compiled: int) -> None:
        """(4) and (5)."""
        for folder, _names, _files in os.walk(root):
            Path(folder).chmod(0o555)
        listing = _Listing.of(root)
        listing.digests(root)
        body = {"layer": self.path.name, "boot": _boot(), "compiled": compiled, **listing.columns()}
        cache.save(root.parent / "index", body, label=LABEL, mac_key=self.mac_key)
        root.parent.rename(self.path)
        self.ready = True


def _failed(error: OSError, size_bytes: int) -> MachineError:
    """Return the error for a tree that cannot be written."""
    return MachineError(
        f"staging failed: {error.strerror or error}",
        code="disk-full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "machine",
        hint=f"the layer takes {(size_bytes >> 20) + 1} MiB, and about a quarter more for bytecode",
    )


@contextmanager
def _written(path: Path, mode: int, size_bytes: int) -> Iterator[Callable[[bytes], None]]:
    """Create a file and yield the function that writes to it; a failure to write is this machine's, not the source's.

    Raises:
        MachineError: it cannot be written; `size_bytes` is what the whole layer takes.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _failed(error, size_bytes) from error

    def write(block: bytes) -> None:
        view = memoryview(block)
        try:
            while view:
                view = view[os.write(descriptor, view) :]
        except OSError as error:
            raise _failed(error, size_bytes) from error

    try:
        yield write
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def _build_runtime(target: _Layer, spec: WorkloadSpec, jail: Jail | None, progress: Progress | None) -> int:
    environment = locate(spec.python)
    meter = _Meter(progress, target.layer.size_bytes + _source_bytes(target.layer))
    with target.building() as root:
        copy = _Copy(target.layer, root, meter, environment.prefixes)
        texts = packages.links(environment.version)
        copy.generate(texts)  # (2)
        copy.run(_hosts(environment.trees, environment))  # (1)
        copy.run_native(environment)
        compiled = _compile(target.layer, target.layer, root, [], jail, meter)  # (3)
        target.finish(root, compiled)
    meter.finish()
    return compiled


def _build_app(target: _Layer, runtime: _Layer, spec: WorkloadSpec, jail: Jail | None) -> int:
    with target.building() as root:
        copy = _Copy(target.layer, root, _Meter(None, 0), ())
        tree = app_tree(spec.script)
        copy.run(_hosts((tree,), None))
        compiled = _compile(target.layer, runtime.layer, root, list(runtime.binds()), jail, _Meter(None, 0))
        target.finish(root, compiled)
    return compiled


def _hosts(trees: tuple[Tree, ...], environment: Environment | None) -> list[tuple[str, str]]:
    """Return (jail prefix, host prefix), longest first."""
    pairs = [(tree.jail, str(tree.host)) for tree in trees]
    if environment is not None:
        pairs += [
            (interpreter_path(environment.version), str(environment.executable)),
            (PYTHON_ROOT, str(environment.base)),
        ]
    return sorted(pairs, key=lambda pair: -len(pair[0]))


class _Meter:
    """Counts bytes from several threads for one progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            if self._progress is not None:
                self._progress(min(self._done, self._total), self._total)

    def finish(self) -> None:
        """Report the total: links, and sources that do not compile, were not counted."""
        self.add(self._total)


class _Copy:
    """Steps 1 and 2 for one layer."""

    def __init__(self, layer: Layer, root: Path, meter: _Meter, prefixes: tuple[str, ...]) -> None:
        self.layer = layer
        self.root = root
        self.meter = meter
        self.prefixes = prefixes
        self.rows = layer.rows()
        self.done: set[str] = set()
        self.elves: dict[str, Elf] = {}
        for folder in sorted({row.path.rpartition("/")[0] for row in self.rows}):
            (root / folder[1:]).mkdir(mode=0o755, parents=True, exist_ok=True)

    def generate(self, links: tuple[tuple[str, str], ...]) -> None:
        """(2) Write what is made for the jail; a row that says otherwise was not made by `measure`."""
        site = packages.site_folder(self.layer.python)
        folders = [row.path.split("/")[-2] for row in self.rows if packages.is_note(row.path, site)]
        texts = packages.generated(self.layer.python, self.layer.packages, self.rows, folders)
        by_path = {row.path: row for row in self.rows}
        for path, (content, _owner) in texts.items():
            row = by_path.get(path)
            if row is None or row.digest != hashlib.sha256(content).digest():
                raise InputError(
                    f"the workload's {path} is not what its rows say", code="workload-changed", hint="measure it again"
                )
            self._write(row, content)
        for path, _target in links:
            if path not in by_path:
                raise InputError(f"the workload lacks {path}", code="workload-changed", hint="measure it again")

    def run(self, hosts: list[tuple[str, str]]) -> None:
        """(1) Copy every row whose jail path is below one of `hosts` (jail prefix, host prefix)."""
        todo: list[tuple[Row, str]] = []
        for row in self.rows:
            if row.path in self.done or (row.owner == NATIVE and not row.path.startswith("/runtime/")):
                continue
            if row.kind is Kind.LINK:
                (self.root / row.path[1:]).symlink_to(row.target)
                self.done.add(row.path)
                continue
            host = next(
                (
                    host + row.path[len(jail) :]
                    for jail, host in hosts
                    if row.path == jail or row.path.startswith(jail + "/")
                ),
                None,
            )
            if host is None:
                raise self._changed(
                    [Reason(row.path, "no folder for it in this environment", "the environment that was measured", "")]
                )
            todo.append((row, host))
        results, reasons = in_batches(todo, lambda item: item[0].size_bytes, self._copy, lambda item: item[1], None)
        reasons += [self._differs(row, host) for (row, host), good in zip(todo, results, strict=True) if good is False]
        if reasons:
            raise self._changed(reasons)

    def run_native(self, environment: Environment) -> None:
        """(1) for libraries outside the environment: found by name and recognised by digest."""
        machine = self.layer.machine
        try:
            known = ldcache.parse(Path(LD_CACHE).read_bytes(), machine)
        except (OSError, ValueError):
            known = {}
        absolute = sorted(
            {place for elf in self.elves.values() for place in (*elf.rpath, *elf.runpath) if place.startswith("/")}
        )
        reasons = []
        for row in self.rows:
            if row.path in self.done or row.owner != NATIVE:
                continue
            name = row.path.rpartition("/")[2]
            candidates = [f"{folder}/{name}" for folder in absolute]
            candidates += [known[name]] if name in known else []
            candidates += [
                f"{folder}/{name}" for folder in (*native.DEFAULT_FOLDERS[machine], str(environment.base / "lib"))
            ]
            if row.path in native.LOADERS.values():
                candidates = [row.path]
            if not any(self._try(row, candidate) for candidate in candidates):
                reasons.append(
                    Reason(
                        row.path,
                        "no such library on this machine",
                        f"sha256:{row.digest.hex()}",
                        "measure again, or install the version that was measured",
                    )
                )
        if reasons:
            raise self._changed(reasons)

    def _try(self, row: Row, host: str) -> bool:
        try:
            return self._copy((row, host))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except ChangedError:
            (self.root / row.path[1:]).unlink(missing_ok=True)
            return False

    def _copy(self, item: tuple[Row, str]) -> bool:
        """Copy one file; False if its content is not the measured one (then nothing is left of it)."""
        row, host = item
        if packages.is_sysconfig(row.path):
            content = packages.sysconfig_text(content_of(host), self.prefixes)
            if hashlib.sha256(content).digest() != row.digest:
                return False
            self._write(row, content)
            return True
        # Links into the standard library and versioned library names lead to the file that was hashed; the digest decides.
        with opened(os.path.realpath(host)) as (source, signature):
            if signature[0] != row.size_bytes:
                return False
            target = self.root / row.path[1:]
            whole = hashlib.sha256()
            with _written(target, _mode(row), self.layer.size_bytes) as write:
                while block := os.read(source, BLOCK_BYTES):
                    whole.update(block)
                    write(block)
            if whole.digest() != row.digest:
                target.unlink()
                return False
            if (
                row.size_bytes > 64
                and os.pread(source, 4, 0) == b"\x7fELF"
                and (elf := elf_of(reader(source))) is not None
            ):
                self.elves[row.path] = elf
        self.done.add(row.path)
        self.meter.add(row.size_bytes)
        return True

    def _write(self, row: Row, content: bytes) -> None:
        with _written(self.root / row.path[1:], _mode(row), self.layer.size_bytes) as write:
            write(content)
        self.done.add(row.path)
        self.meter.add(len(content))

    def _differs(self, row: Row, host: str) -> Reason:
        try:
            found = "sha256:" + hash_file(os.path.realpath(host)).digest.hex()
        except (OSError, ChangedError):
            found = "a file that changes"
        return Reason(host, found, f"sha256:{row.digest.hex()}", "measure again if the change is meant")

    @staticmethod
    def _changed(reasons: list[Reason]) -> InputError:
        count = len(reasons)
        return InputError(
            f"{count} {'file is' if count == 1 else 'files are'} no longer what was measured",
            code="workload-changed",
            reasons=reasons[:MAX_REASONS],
            hint="measure again; if nobody meant to change it, install the environment again",
        )


def _compile(layer: Layer, runtime: Layer, root: Path, binds: list[Bind], jail: Jail | None, meter: _Meter) -> int:
    """(3) Write bytecode next to the sources of `layer`; return how many modules have it."""
    sources = {
        path: size
        for path, size, kind in zip(layer.paths, layer.sizes, layer.kinds, strict=True)
        if path.endswith(".py") and kind & 3 != Kind.LINK
    }
    tag = f"cpython-{minor(runtime.python).replace('.', '')}"
    for folder in {path.rpartition("/")[0] for path in sources}:
        (root / folder[1:] / "__pycache__").mkdir(mode=0o755)
    own = [(root / path[1:], path) for path in sorted({"/" + path.split("/")[1] for path in layer.paths} - {"/usr"})]
    own += [(root / "usr", "/usr")] if (root / "usr").is_dir() else []
    sizes = iter(sources.values())

    def accept(path: str, data: bytes) -> None:
        folder, _, name = path[1:].rpartition("/")
        with _written(root / folder / "__pycache__" / f"{name[:-3]}.{tag}.pyc", 0o444, layer.size_bytes) as write:
            write(data)

    def step(count: int) -> None:
        meter.add(sum(next(sizes, 0) for _ in range(count)))

    return bytecode.compile_sources(
        list(sources), python=runtime.python, root=root, binds=[*binds, *own], interpreter=interpreter_path(runtime.python),
        jail=jail, accept=accept, progress=step,
    )  # fmt: skip


@dataclass(slots=True)
class _Listing:
    """Names and signatures of a whole tree, folders included; `hashes` are filled by `digests`."""

    names: bytes
    signatures: array[int]
    hashes: bytes = b""

    @classmethod
    def of(cls, root: Path) -> _Listing:
        names: list[str] = []
        signatures: array[int] = array("Q")
        stack = [("", os.fspath(root))]
        extend = signatures.extend
        while stack:
            prefix, folder = stack.pop()
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                with os.scandir(descriptor) as entries:  # relative to the folder: 15 % faster than by whole paths
                    for entry in entries:
                        name = entry.name
                        found = entry.stat(follow_symlinks=False)
                        names.append(prefix + name)
                        extend(
                            (
                                found.st_size,
                                found.st_mtime_ns,
                                found.st_ctime_ns,
                                found.st_ino,
                                found.st_dev,
                                found.st_mode,
                            )
                        )
                        if entry.is_dir(follow_symlinks=False):
                            stack.append((f"{prefix}{name}/", f"{folder}/{name}"))
            finally:
                os.close(descriptor)
        return cls("\x00".join(names).encode(), signatures)

    def digests(self, root: Path) -> dict[str, bytes]:
        """Hash every file (a link: its target, a folder: nothing) and return path -> SHA-256 with the kind and mode."""
        names = self.names.decode().split("\x00")

        def work(item: tuple[str, int]) -> bytes:
            name, mode = item
            path = root / name
            whole = hashlib.sha256(f"{mode:o}\x00".encode())
            if stat.S_ISREG(mode):
                whole.update(hash_file(str(path)).digest)
            elif stat.S_ISLNK(mode):
                whole.update(str(path.readlink()).encode())
            return whole.digest()

        items = [(name, self.signatures[index * WIDTH + 5]) for index, name in enumerate(names)]
        sizes = dict(zip(names, self.signatures[::WIDTH], strict=True))
        results, reasons = in_batches(items, lambda item: sizes[item[0]], work, lambda item: item[0], None)
        if reasons:
            raise TamperedError(
                f"staged files in {root} cannot be read as they were written", reasons=reasons[:MAX_REASONS]
            )
        self.hashes = b"".join([result for result in results if result is not None])
        return _digests(self.names, self.hashes)

    def columns(self) -> dict[str, bytes]:
        return {"names": self.names, "signatures": self.signatures.tobytes(), "digests": self.hashes}


def _digests(names: bytes, digests: bytes) -> dict[str, bytes]:
    return {name: digests[index * 32 : index * 32 + 32] for index, name in enumerate(names.decode().split("\x00"))}


def _state(digest: bytes | None) -> str:
    return "no such file" if digest is None else f"content and mode {digest.hex()[:16]}"


def _mode(row: Row) -> int:
    return 0o555 if row.kind is Kind.EXECUTABLE else 0o444


def _source_bytes(layer: Layer) -> int:
    return sum(size for path, size in zip(layer.paths, layer.sizes, strict=True) if path.endswith(".py"))


def _boot() -> str:
    return BOOT_ID.read_text("ascii").strip()


def _size(path: Path) -> int:
    return sum((Path(folder) / name).lstat().st_size for folder, _names, files in os.walk(path) for name in files)


def _remove(path: Path) -> None:
    """Remove a tree whose folders are read-only."""
    for folder, _names, _files in os.walk(path):
        Path(folder).chmod(0o700)
    shutil.rmtree(path)
