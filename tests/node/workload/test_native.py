"""Which native libraries a workload needs, where they stand in the jail: the rules of ld.so, one by one."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from cloister.errors import InputError
from cloister.node.workload.elf import Elf
from cloister.node.workload.native import LOADERS, Closure, resolve

PYTHON = "/runtime/python/bin/python3.11"
SITE = "/runtime/venv/lib/python3.11/site-packages"
STANDARD = "/usr/lib/x86_64-linux-gnu"
LOADER = LOADERS["x86_64"]


@dataclass
class FakeHost:
    """Host paths with their dynamic sections; two paths are the same file if they hold the same object."""

    elves: dict[str, Elf] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def elf(self, path: str) -> Elf | None:
        self.asked.append(path)
        return self.elves.get(path)

    def same(self, a: str, b: str) -> bool:
        return self.elves[a] == self.elves[b]


def x86(*needed: str, rpath: tuple[str, ...] = (), runpath: tuple[str, ...] = (), soname: str = "") -> Elf:
    return Elf("x86_64", soname=soname, needed=needed, rpath=rpath, runpath=runpath)


def closure(
    host: dict[str, Elf], files: dict[str, Elf], cache: dict[str, str] | None = None, program: Elf | None = None
) -> Closure:
    """Resolve for an interpreter in /base, packages in /venv; a file at jail path X stands at host path X without /runtime."""
    interpreter = program or Elf("x86_64", interpreter=LOADER)
    everything = {PYTHON: ("/base/bin/python3.11", interpreter)}
    everything |= {
        path: (path.replace("/runtime/python", "/base").replace("/runtime", ""), elf) for path, elf in files.items()
    }
    inside = dict(everything.values())
    look = FakeHost({LOADER: x86(), **inside, **host})
    return resolve(
        PYTHON, everything, {"/venv/lib": "/runtime/venv/lib", "/base": "/runtime/python"}, cache or {}, look
    )


def test_default_folder_and_transitive_needs() -> None:
    found = closure(
        {f"{STANDARD}/liba.so": x86("libb.so"), f"{STANDARD}/libb.so": x86()}, {f"{SITE}/m.so": x86("liba.so")}
    )
    assert found.libraries == {
        LOADER: LOADER,
        f"{STANDARD}/liba.so": f"{STANDARD}/liba.so",
        f"{STANDARD}/libb.so": f"{STANDARD}/libb.so",
    }
    assert found.missing == ()


def test_cache_comes_before_the_default_folders() -> None:
    found = closure(
        {"/opt/liba.so": x86(), f"{STANDARD}/liba.so": x86("other.so")},
        {f"{SITE}/m.so": x86("liba.so")},
        {"liba.so": "/opt/liba.so"},
    )
    assert found.libraries[f"{STANDARD}/liba.so"] == "/opt/liba.so"


def test_runpath_hides_rpath() -> None:
    host = {"/r/liba.so": x86(), "/p/liba.so": x86("wrong.so")}
    found = closure(host, {f"{SITE}/m.so": x86("liba.so", rpath=("/p",), runpath=("/r",))})
    assert found.libraries[f"{STANDARD}/liba.so"] == "/r/liba.so"


def test_rpath_of_the_interpreter_serves_modules_without_runpath() -> None:
    program = Elf("x86_64", rpath=("$ORIGIN/../lib",), interpreter=LOADER)
    host = {"/base/lib/libstdc++.so.6": x86(), f"{STANDARD}/libstdc++.so.6": x86("other.so")}
    found = closure(host, {f"{SITE}/m.so": x86("libstdc++.so.6")}, program=program)
    assert found.libraries["/runtime/python/lib/libstdc++.so.6"] == "/base/lib/libstdc++.so.6"


def test_absolute_run_path_moves_to_the_default_folder() -> None:
    program = Elf("x86_64", needed=("libpython3.11.so.1.0",), runpath=("/base/lib",), interpreter=LOADER)
    found = closure({"/base/lib/libpython3.11.so.1.0": x86()}, {}, program=program)
    assert found.libraries[f"{STANDARD}/libpython3.11.so.1.0"] == "/base/lib/libpython3.11.so.1.0"


def test_library_of_a_package_stays_where_origin_finds_it() -> None:
    files = {f"{SITE}/p/m.so": x86("liba.so", runpath=("$ORIGIN/lib",)), f"{SITE}/p/lib/liba.so": x86()}
    found = closure({}, files)
    assert found.libraries == {LOADER: LOADER}
    assert found.missing == ()


def test_origin_of_a_moved_library_finds_its_neighbour_in_the_default_folder() -> None:
    host = {
        f"{STANDARD}/liba.so": x86("libpriv.so", runpath=("${ORIGIN}/private",)),
        f"{STANDARD}/private/libpriv.so": x86(),
    }
    found = closure(host, {f"{SITE}/m.so": x86("liba.so")})
    assert found.libraries[f"{STANDARD}/libpriv.so"] == f"{STANDARD}/private/libpriv.so"


def test_library_of_another_machine_is_passed_over() -> None:
    host = {"/r/liba.so": Elf("aarch64"), f"{STANDARD}/liba.so": x86()}
    found = closure(host, {f"{SITE}/m.so": x86("liba.so", runpath=("/r",))})
    assert found.libraries[f"{STANDARD}/liba.so"] == f"{STANDARD}/liba.so"


def test_name_with_a_slash_is_a_path() -> None:
    found = closure(
        {"/opt/z/liba.so": x86(), f"{STANDARD}/liba.so": x86("wrong.so")}, {f"{SITE}/m.so": x86("/opt/z/liba.so")}
    )
    assert found.libraries[f"{STANDARD}/liba.so"] == "/opt/z/liba.so"


def test_what_nothing_provides_is_reported_with_who_needs_it() -> None:
    found = closure({}, {f"{SITE}/b.so": x86("libnone.so"), f"{SITE}/a.so": x86("libnone.so")})
    assert found.missing == (("libnone.so", f"{SITE}/a.so"),)


def test_library_that_a_package_loads_itself_is_not_missing() -> None:
    found = closure({}, {f"{SITE}/m.so": x86("libcublas.so.12"), f"{SITE}/nvidia/lib/libcublas.so.12": x86()})
    assert found.missing == ()


def test_two_libraries_under_one_name_are_refused() -> None:
    host = {"/one/liba.so": x86(), "/two/liba.so": x86("libc.so.6")}
    files = {f"{SITE}/a.so": x86("liba.so", runpath=("/one",)), f"{SITE}/b.so": x86("liba.so", runpath=("/two",))}
    with pytest.raises(InputError, match=r"two different libraries named liba\.so") as caught:
        closure(host, files)
    assert caught.value.code == "workload-unmeasurable"
    assert {caught.value.reasons[0].found, caught.value.reasons[0].wanted} == {"/one/liba.so", "/two/liba.so"}


def test_one_library_through_two_paths_is_one() -> None:
    host = {"/one/liba.so": x86(), "/two/liba.so": x86()}
    files = {f"{SITE}/a.so": x86("liba.so", runpath=("/one",)), f"{SITE}/b.so": x86("liba.so", runpath=("/two",))}
    assert closure(host, files).libraries[f"{STANDARD}/liba.so"] == "/one/liba.so"


def test_what_glibc_opens_at_run_time_is_there() -> None:
    found = closure({f"{STANDARD}/libgcc_s.so.1": x86("libc.so.6"), f"{STANDARD}/libc.so.6": x86()}, {})
    assert set(found.libraries) == {LOADER, f"{STANDARD}/libgcc_s.so.1", f"{STANDARD}/libc.so.6"}


def test_cuda_runtime_brings_the_driver_and_what_the_driver_opens() -> None:
    host = {f"{STANDARD}/{name}": x86() for name in ("libcuda.so.1", "libnvidia-ptxjitcompiler.so.1")}
    assert closure(host, {}).libraries.keys() == {LOADER}
    found = closure(host, {f"{SITE}/nvidia/libcudart.so.12": x86()})
    assert set(found.libraries) == {LOADER, f"{STANDARD}/libcuda.so.1", f"{STANDARD}/libnvidia-ptxjitcompiler.so.1"}


def test_default_folder_of_other_distributions() -> None:
    found = closure(
        {"/usr/lib64/libc.so.6": x86()}, {f"{SITE}/m.so": x86("libc.so.6")}, {"libc.so.6": "/usr/lib64/libc.so.6"}
    )
    assert found.libraries["/usr/lib64/libc.so.6"] == "/usr/lib64/libc.so.6"


@pytest.mark.parametrize("loader", ["", "/lib/ld-musl-x86_64.so.1"])
def test_interpreter_without_glibc_is_refused(loader: str) -> None:
    with pytest.raises(InputError, match="linked to"):
        closure({}, {}, program=Elf("x86_64", interpreter=loader))
