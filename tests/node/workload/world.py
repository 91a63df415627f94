"""A small environment that looks real to the room: a made-up interpreter, a standard library of three modules, packages.

The interpreter is an ELF file that nothing can run; what is measured is never executed, so that is enough.
"""

from __future__ import annotations

import base64
import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from cloister.node.workload import Workload, WorkloadSpec, measure
from tests.node.workload.elves import LOADER, elf

MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
"""The version of the made-up interpreter: our own, so that the bytecode fallback can compile for it."""


class World:
    """A base interpreter in `root/base`, a venv in `root/venv`, a script in `root/job`, a cache in `root/cache`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base, self.venv, self.job, self.cache = root / "base", root / "venv", root / "job", root / "cache"
        self.library = self.base / "lib" / f"python{MINOR}"
        self.site = self.venv / "lib" / f"python{MINOR}" / "site-packages"
        self.python = self.venv / "bin" / "python"
        program = elf(["libc.so.6"], interpreter=LOADER, version=(3 << 24) | (sys.version_info.minor << 16) | 0x09F0)
        write(self.base / "bin" / f"python{MINOR}", program, mode=0o755)
        write(self.library / "os.py", b"name = 'posix'\n")
        write(self.library / "json" / "__init__.py", b"loads = len\n")
        write(self.library / "test" / "test_os.py", b"assert True\n")
        write(
            self.library / "_sysconfigdata__linux.py",
            f"# made at build time\nbuild_time_vars = {{'prefix': '{self.base}',\n 'CC': 'cc -L{self.base}/lib '\n  '-O2', 'X': 1}}\n".encode(),
        )
        self.site.mkdir(parents=True)
        (self.venv / "bin").mkdir()
        (self.venv / "bin" / f"python{MINOR}").symlink_to(self.base / "bin" / f"python{MINOR}")
        self.python.symlink_to(f"python{MINOR}")
        self.configure()
        self.install("alpha", "1.0", {"alpha/__init__.py": b"VALUE = 1\n", "alpha/_native.so": elf(["libm.so.6"])})
        self.install("beta", "2.1", {"beta.py": b"import alpha\n"}, scripts=("beta",))
        write(self.job / "train.py", b"import beta, helper\n")
        write(self.job / "helper.py", b"STEP = 1\n")

    def configure(self, **changes: str) -> None:
        settings = {
            "home": str(self.base / "bin"),
            "include-system-site-packages": "false",
            "version": MINOR,
            **changes,
        }
        write(self.venv / "pyvenv.cfg", "".join(f"{name} = {value}\n" for name, value in settings.items()).encode())

    def install(self, name: str, version: str, files: Mapping[str, bytes], scripts: tuple[str, ...] = ()) -> Path:
        """Install as pip does: files, console scripts with the environment's path in them, RECORD; return the dist-info."""
        info = f"{name}-{version}.dist-info"
        contents = {
            **files,
            f"{info}/METADATA": f"Name: {name}\nVersion: {version}\n".encode(),
            f"{info}/INSTALLER": b"pip\n",
            **{f"../../../bin/{script}": f"#!{self.python}\nprint('{script}')\n".encode() for script in scripts},
        }
        lines = [f"{path},sha256={record_hash(content)},{len(content)}\n" for path, content in contents.items()]
        contents[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"]).encode()
        for path, content in contents.items():
            write(Path(os.path.normpath(self.site / path)), content, mode=0o755 if path.endswith(".so") else 0o644)
        return self.site / info

    def spec(self, *args: str, **env: str) -> WorkloadSpec:
        return WorkloadSpec(self.python, self.job / "train.py", args, env)

    def measure(self, *args: str, **env: str) -> Workload:
        return measure(self.spec(*args, **env), cache_dir=self.cache)


def write(path: Path, content: bytes, *, mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    return path


def record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
