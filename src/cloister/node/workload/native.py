"""The closure of native libraries: which files outside the environment its ELF files need. Pure over a `Look`.

Like ld.so(8), for every DT_NEEDED name of every file, in this order:
  1 slash     a name with a slash is a path ($ORIGIN expanded)
  2 run path  the file's DT_RUNPATH; only if it has none, its DT_RPATH, then the interpreter's DT_RPATH
  3 cache     ld.so.cache, baseline entries
  4 default   the linker's built-in folders
A candidate counts only if it is an ELF file for the interpreter's machine. LD_LIBRARY_PATH and LD_PRELOAD are not
consulted: the jail sets neither, and what the workload's own `env` sets is read inside the jail.

Where a library stands in the jail follows from how it was found:
  - through $ORIGIN, from one file of the environment or the interpreter's folder to another: it stays at its place
    there, since $ORIGIN works in the jail as well;
  - in any other way: in the linker's default folder, under the name that was asked for, so that no ld.so.cache and no
    absolute run path of this host is needed to find it again.
Two different files that would stand under one name are refused. A name that nothing provides is reported, not refused:
plug-ins for libraries that nobody installed are normal. Names that are only looked up at run time (dlopen) are in DLOPEN.
"""

from __future__ import annotations

import posixpath
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from cloister.errors import InputError, Reason
from cloister.node.workload.elf import Elf

DEFAULT_FOLDERS: Final = {
    "x86_64": ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"),
    "aarch64": ("/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"),
}
LOADERS: Final = {"x86_64": "/lib64/ld-linux-x86-64.so.2", "aarch64": "/lib/ld-linux-aarch64.so.1"}

# What is opened by name at run time: by glibc (thread cancellation; name service before 2.34), by the CUDA runtime
# (the driver), by the driver (its compilers). Key: start of a library's name that is in the closure ("" always).
DLOPEN: Final[Mapping[str, tuple[str, ...]]] = {
    "": ("libgcc_s.so.1", "libnss_files.so.2"),
    "libcudart.so": ("libcuda.so.1", "libnvidia-ml.so.1"),
    "libcuda.so": ("libnvidia-ptxjitcompiler.so.1", "libnvidia-nvvm.so.4"),
}


class Look(Protocol):
    """What the resolver may ask about this machine; every answer is remembered as a condition of the result."""

    def elf(self, path: str) -> Elf | None:
        """Return the dynamic section of the file at host path `path` (links followed), None if there is none."""
        ...

    def same(self, a: str, b: str) -> bool:
        """Are both host paths the same file?"""
        ...


@dataclass(frozen=True, slots=True)
class Closure:
    """`libraries`: jail path -> host path. `missing`: (name, jail path of the first file that needs it)."""

    libraries: Mapping[str, str]
    missing: tuple[tuple[str, str], ...]


def resolve(
    interpreter: str,
    files: Mapping[str, tuple[str, Elf]],
    folders: Mapping[str, str],
    cache: Mapping[str, str],
    look: Look,
) -> Closure:
    """Return the libraries outside `files` that any of them needs.

    Args:
        interpreter: jail path of the interpreter, a key of `files`.
        files: jail path -> (host path, dynamic section) of every ELF file that is measured anyway.
        folders: host folder -> jail folder of the measured trees (environment, interpreter).
        cache: library name -> host path, from ld.so.cache.

    Raises:
        InputError: no glibc interpreter, or two different libraries under one name.
    """
    program = files[interpreter][1]
    machine = program.machine
    loader = LOADERS[machine]
    if posixpath.basename(program.interpreter) != posixpath.basename(loader):
        raise InputError(
            f"the interpreter is linked to {program.interpreter or 'no dynamic loader'}",
            code="workload-unmeasurable",
            reasons=[
                Reason(
                    interpreter,
                    program.interpreter or "statically linked",
                    loader,
                    "use a CPython that is linked with glibc",
                )
            ],
        )
    standard = _standard_folder(cache, machine)
    inside_names = {posixpath.basename(path) for path in files}
    libraries: dict[str, str] = {}
    missing: dict[str, str] = {}
    if look.elf(program.interpreter) is None:
        raise InputError(f"the dynamic loader {program.interpreter} cannot be read", code="workload-unmeasurable")
    libraries[loader] = program.interpreter
    # The interpreter's own closure comes first, as in a running process.
    queue = deque([(interpreter, *files[interpreter])])
    queue.extend((path, *files[path]) for path in sorted(files) if path != interpreter)
    wanted_later = [name for start, names in DLOPEN.items() if start == "" for name in names]
    known: dict[tuple[str, tuple[str, ...]], str | None] = {}
    moving: set[str] = set()  # host paths found through a place that moves with its file

    def find(name: str, host: str, elf: Elf) -> str | None:
        nonlocal moving
        origin = posixpath.dirname(host)
        searched = [(folder, origin) for folder in elf.runpath or elf.rpath]  # (2)
        if not elf.runpath and not program.runpath:
            searched += [(folder, posixpath.dirname(files[interpreter][0])) for folder in program.rpath]
        places = tuple([_expand(*place) for place in searched])
        if (name, places) not in known:
            candidates = [f"{place}/{name}" for place in places]
            candidates += [cache[name]] if name in cache else []  # (3)
            candidates += [f"{folder}/{name}" for folder in DEFAULT_FOLDERS[machine]]  # (4)
            if "/" in name:  # (1)
                candidates = [_expand(name, origin)]
            found = None
            for candidate in candidates:
                other = look.elf(candidate)
                if other is not None and other.machine == machine:
                    found = candidate
                    break
            known[(name, places)] = found
            if found is not None:
                relative = {_expand(*place) for place in searched if "ORIGIN" in place[0]}
                moving |= {found} if posixpath.dirname(found) in relative else set()
        return known[(name, places)]

    def add(name: str, host: str, asker: str) -> None:
        stays = _jail_path(host, folders) if host in moving and asker.startswith("/runtime/") else None
        jail = stays or f"{standard}/{posixpath.basename(name)}"
        if jail in files or posixpath.basename(name) == posixpath.basename(loader):
            return
        before = libraries.get(jail)
        if before is not None:
            if not look.same(before, host):
                raise InputError(
                    f"two different libraries named {posixpath.basename(jail)} are needed",
                    code="workload-unmeasurable",
                    reasons=[
                        Reason(
                            jail,
                            host,
                            before,
                            "remove the absolute run path of one of them, or install both from wheels",
                        )
                    ],
                )
            return
        libraries[jail] = host
        elf = look.elf(host)
        if elf is not None:
            queue.append((jail, host, elf))

    while queue:
        while queue:
            path, host, elf = queue.popleft()
            for name in elf.needed:
                found = find(name, host, elf)
                if found is not None:
                    add(name, found, path)
                elif posixpath.basename(name) not in inside_names:
                    missing.setdefault(name, path)
            base = posixpath.basename(path)
            wanted_later += [
                name for start, names in DLOPEN.items() if start and base.startswith(start) for name in names
            ]
        for name in dict.fromkeys(wanted_later):
            found = find(name, files[interpreter][0], program)
            if found is not None:
                add(name, found, interpreter)
        wanted_later = []
    return Closure(libraries, tuple(sorted(missing.items())))


def _standard_folder(cache: Mapping[str, str], machine: str) -> str:
    """Return the linker's default folder of this distribution: where libc.so.6 stands, in its /usr form."""
    triplet = f"{machine}-linux-gnu"
    libc = cache.get("libc.so.6", f"/usr/lib/{triplet}/libc.so.6")
    return f"/usr/lib/{triplet}" if triplet in libc else "/usr/lib64"


def _expand(folder: str, origin: str) -> str:
    """Expand $ORIGIN as ld.so does; relative folders are taken from the root, where the jail starts nothing."""
    for token in ("$ORIGIN", "${ORIGIN}"):
        folder = folder.replace(token, origin)
    return posixpath.normpath(f"/{folder.lstrip('/')}")


def _jail_path(host: str, folders: Mapping[str, str]) -> str | None:
    """Return the jail path of a host path inside one of the measured trees."""
    for folder, jail in folders.items():
        if host.startswith(folder + "/"):
            return jail + host[len(folder) :]
    return None
