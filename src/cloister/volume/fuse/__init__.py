"""A volume becomes a mounted folder: the FUSE kernel protocol in Python, without libfuse and without a compiler.

protocol    bytes <-> requests and answers                     (pure)
server      one request -> one answer, from tree and plaintext
worker      the processes that serve, their limits, restarts   (edge)
linux       system calls that Python lacks                     (edge)
namespaces  where a mount is visible                           (edge)
mount       mount, watch, unmount                              (edge)

How it behaves, doors and machines: docs/mount.md.
"""

from __future__ import annotations

from cloister.volume.fuse.mount import Mount, mount
from cloister.volume.fuse.namespaces import enter_user_mount_namespace, private_mount_namespace
from cloister.volume.fuse.server import Fault

__all__ = ["Fault", "Mount", "enter_user_mount_namespace", "mount", "private_mount_namespace"]
