"""What users may build on: the names of `cloister.testkit`. A name that goes or changes its arguments breaks their tests."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from types import ModuleType
from typing import Final

import cloister.testkit

PUBLIC: Final[dict[str, dict[str, list[str] | None]]] = {
    "broker": {
        "RunningBroker": ["folder", "config", "process", "clock"],
        "running_broker": None,
    },
    "softtee": {
        "KINDS": None,
        "MEASUREMENT": None,
        "NOW": None,
        "SOFT_ROOTS": None,
        "STATUSES": None,
        "SoftPlatform": None,
        "binding": None,
        "soft_claims": None,
        "soft_collateral": None,
        "soft_policy": None,
        "workload": None,
    },
}
"""Module -> name -> names of its parameters where they are pinned."""
METHODS = {"start", "stop", "kill", "client", "config", "folder", "url"}
"""Of a RunningBroker."""


def module(name: str) -> ModuleType:
    return importlib.import_module(f"cloister.testkit.{name}")


def own(one: ModuleType) -> set[str]:
    """Public names: `__all__`, or what the module itself defines."""
    listed = getattr(one, "__all__", None)
    if listed is not None:
        return set(listed)
    return {
        name
        for name, value in vars(one).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == one.__name__
    }


def test_modules() -> None:
    assert {found.name for found in pkgutil.iter_modules(cloister.testkit.__path__)} == set(PUBLIC)


def test_names() -> None:
    for name, names in PUBLIC.items():
        assert own(module(name)) == set(names), name


def test_parameters_and_words_of_everything_public() -> None:
    for name, names in PUBLIC.items():
        for public, parameters in names.items():
            value = getattr(module(name), public)
            if callable(value):
                assert inspect.getdoc(value), f"{name}.{public} does not say what it is"
            if parameters is not None:
                assert list(inspect.signature(value).parameters) == parameters


def test_what_a_running_broker_offers() -> None:
    broker = module("broker").RunningBroker
    instance = set(inspect.signature(broker).parameters) | set(vars(broker)) | {"url"}
    assert instance >= METHODS


def test_it_is_imported_by_nobody_but_tests() -> None:
    """The product's wheel contains it; `python -c "import cloister.cli"` must not load it."""
    program = "import sys, cloister.cli, cloister.broker.main; sys.exit(any('testkit' in name for name in sys.modules))"
    subprocess.run([sys.executable, "-c", program], check=True)
