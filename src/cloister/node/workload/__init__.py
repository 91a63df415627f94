"""One digest for a program: interpreter, standard library, packages, native libraries, scripts, arguments, environment.

`measure` turns an ordinary Python environment and a script into a `Workload`; equal software gives an equal digest on
any machine, and `inventory`, `render_inventory` and `diff` say in words what a digest stands for. `stage` copies exactly
what was measured, hashing it again, into a read-only tree that a jail can use as its only file system, with bytecode
made from the measured sources: what was not measured cannot be loaded. Format and promises: docs/workload.md.
"""

from cloister.node.workload.edge.measure import measure
from cloister.node.workload.edge.stage import Staged, StoredLayer, prune, stage, stored
from cloister.node.workload.form import Kind, Layer, Part, Row, Workload, WorkloadSpec
from cloister.node.workload.inventory import FileEntry, Group, Inventory, diff, inventory, render_inventory

__all__ = [
    "FileEntry",
    "Group",
    "Inventory",
    "Kind",
    "Layer",
    "Part",
    "Row",
    "Staged",
    "StoredLayer",
    "Workload",
    "WorkloadSpec",
    "diff",
    "inventory",
    "measure",
    "prune",
    "render_inventory",
    "stage",
    "stored",
]
