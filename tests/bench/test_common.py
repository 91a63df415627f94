"""The form of benchmark output: what a table and a JSON line say. How fast anything is, no test asks."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from bench.common import Figure, added, document, in_turns, options_of, ratio, table

from bench import common

ROOT = Path(__file__).resolve().parents[2]


def benchmark(*figures: Figure) -> ModuleType:
    """A benchmark that measures nothing."""
    module = ModuleType("bench.made_up")
    module.__doc__ = "A made-up benchmark."

    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rounds", type=int, default=3)

    def measure(options: argparse.Namespace) -> Iterator[Figure]:
        yield from figures

    vars(module).update(arguments=arguments, figures=measure)
    return module


@pytest.mark.parametrize(
    ("value", "target", "better", "met"),
    [
        (1.0, None, "lower", None),
        (1.0, 1.0, "lower", True),
        (1.1, 1.0, "lower", False),
        (1.0, 1.0, "higher", True),
        (0.9, 1.0, "higher", False),
    ],
)
def test_a_target_is_a_bound_that_may_be_reached(value: float, target: float | None, better: str, met: bool) -> None:
    figure = Figure("f", value, "ms", target, "higher" if better == "higher" else "lower")
    assert figure.met is met
    assert figure.as_json()["met"] is met


def test_both_sides_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []

    def side(name: str, values: Iterator[float]) -> float:
        calls.append(name)
        return next(values)

    a, b = iter([100.0, 1, 2, 3]), iter([100.0, 4, 5, 9])
    found = in_turns(3, {"a": lambda: side("a", a), "b": lambda: side("b", b)})
    assert calls == ["a", "b"] * 4
    assert found == {"a": [1, 2, 3], "b": [4, 5, 9]}
    with pytest.raises(ValueError, match="0 rounds"):
        in_turns(0, {})


def test_comparisons_are_of_medians_second_side_against_the_first() -> None:
    sides = {"native": [1.0, 2, 300], "shielded": [2.0, 3, 4]}
    assert ratio("r", sides, "ms").value == 1.5
    assert added("a", sides, "ms", target=1.0).value == 1.0
    assert added("a", sides, "ms", target=1.0).met is True
    assert ratio("r", sides, "ms").ratio == 1.5


def test_the_table_shows_value_medians_ratio_target_and_verdict() -> None:
    rows = table(
        [
            Figure("step", 1.5, "ratio", 1.02, sides={"native": 20.0, "shielded": 30.0}, side_unit="ms"),
            Figure("rate", 12345.6, "1/s", 1000, "higher"),
            Figure("note", 0.0123456, "s"),
        ]
    ).splitlines()
    cells = [re.split(r"\s{2,}", row.strip()) for row in rows]
    assert cells == [
        ["figure", "value", "medians", "ratio", "target"],
        ["step", "1.5 ratio", "native 20 ms | shielded 30 ms", "1.500", "<= 1.02", "missed"],
        ["rate", "12,346 1/s", ">= 1,000", "met"],
        ["note", "0.01235 s"],
    ]
    assert not any(row.endswith(" ") for row in rows)


def test_json_is_one_line_with_everything_that_the_table_shows() -> None:
    figure = Figure("step", 1.5, "ratio", 1.02, sides={"native": 20.0, "shielded": 30.0}, side_unit="ms")
    line = document("job", [figure, Figure("note", 1.0, "s")], {"python": "3.11.7"}, "2 x cpu")
    assert "\n" not in line
    assert json.loads(line) == {
        "bench": "job",
        "figures": [
            {
                "name": "step",
                "value": 1.5,
                "unit": "ratio",
                "target": 1.02,
                "better": "lower",
                "met": False,
                "sides": {"native": 20.0, "shielded": 30.0},
                "side_unit": "ms",
                "ratio": 1.5,
            },
            {"name": "note", "value": 1.0, "unit": "s", "target": None, "better": "lower", "met": None},
        ],
        "versions": {"python": "3.11.7"},
        "machine": "2 x cpu",
    }


@pytest.mark.parametrize(("value", "status"), [(1.0, 0), (3.0, 1)])
def test_exit_status_says_whether_all_targets_are_met(
    value: float, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    module = benchmark(Figure("f", value, "ms", target=2.0), Figure("free", 9.0, "ms"))
    assert common.main(module, ["--json"]) == status
    said = json.loads(capsys.readouterr().out)
    assert said["bench"] == "made_up"
    assert {"cloister", "python", "cryptography"} <= set(said["versions"])
    assert "Linux" in said["machine"]
    assert common.main(module, []) == status
    assert capsys.readouterr().out.splitlines()[-1].startswith(said["machine"].partition(", load")[0])


def test_options_of_another_benchmark_are_its_defaults_but_for_changes() -> None:
    module = benchmark()
    assert vars(options_of(module)) == {"rounds": 3}
    assert vars(options_of(module, rounds=9)) == {"rounds": 9}
    with pytest.raises(ValueError, match="size"):
        options_of(module, size=1)


@pytest.mark.parametrize("name", sorted(common.modules()))
def test_every_benchmark_has_one_form(name: str) -> None:
    module = importlib.import_module(f"bench.{name}")
    assert module.__doc__ is not None
    assert f"./run bench {name}" in module.__doc__
    assert isinstance(options_of(module), argparse.Namespace)
    assert callable(module.figures)


def test_the_list_names_every_benchmark_and_an_unknown_name_is_refused() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "bench"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name, about in common.modules().items():
        assert re.search(rf"^  {name} +{re.escape(about)}$", listed, re.MULTILINE)
    wrong = subprocess.run(
        [sys.executable, "-m", "bench", "jop"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "job" in wrong.stderr


def test_progress_lines_of_the_training_script_become_steps_and_stages() -> None:
    from bench.job import read_run

    lines = [
        (10.2, "warning: the broker shows software evidence"),
        (10.5, "✓ measured train.py: sha256:1  5 ms"),
        (11.0, "│ epoch 1/2 step 10/25 loss 0.5 accuracy 0.1"),
        (11.4, "│ epoch 1/2 step 20/25 loss 0.5 accuracy 0.1"),
        (11.5, "│ epoch 1/2 step 25/25 loss 0.5 accuracy 0.1"),
        (12.5, "│ epoch 2/2 step 10/25 loss 0.5 accuracy 0.1"),
        (13.0, "│ epoch 2/2 step 20/25 loss 0.5 accuracy 0.1"),
        (13.2, "✓ sealed detector, generation 1  5 ms"),
    ]
    run = read_run(10.0, lines, 13.5)
    assert run.first == pytest.approx(1.0)
    assert run.total == pytest.approx(3.5)
    assert run.steps == pytest.approx((0.04, 0.05))  # neither across epochs nor the short last stretch
    assert sum(run.stages.values()) == pytest.approx(3.5)  # nothing between start and end is left out
    with pytest.raises(ValueError, match="no progress line"):
        read_run(10.0, lines[:2], 13.5)
