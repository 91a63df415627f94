"""Progress lines: counters and numbers pass, text never does."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.node.progress import Counter, read_line


def test_counters_and_metrics() -> None:
    progress = read_line(b"epoch 2/5 step 30/60 loss 0.431249 accuracy=0.8 lr: 1e-3")
    assert progress is not None
    assert progress.counters == (Counter("epoch", 2, 5), Counter("step", 30, 60))
    assert progress.metrics == {"loss": 0.4312, "accuracy": 0.8, "lr": 0.001}
    assert progress.fraction == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("line", "fraction"), [(b"epoch 5/5", 1.0), (b"epoch 1/4 step 2/2", 0.25), (b"loss 0.5", None)]
)
def test_fraction(line: bytes, fraction: float | None) -> None:
    progress = read_line(line)
    assert progress is not None
    assert progress.fraction == fraction


@pytest.mark.parametrize(
    "line", [b"", b"hello world", b"patient Ada Lovelace", b"epoch 9/5", b"epoch 1/0", b"x" * 5000, b"\xff\xfe"]
)
def test_lines_without_progress(line: bytes) -> None:
    assert read_line(line) is None


@given(st.binary(max_size=400))
def test_only_short_names_and_rounded_numbers_pass(line: bytes) -> None:
    progress = read_line(line)
    if progress is not None:
        assert len(progress.counters) <= 2
        assert len(progress.metrics) <= 8
        for name, value in progress.metrics.items():
            assert len(name) <= 16
            assert name.replace("_", "").isalpha()
            assert value == float(f"{value:.4g}")
        assert progress.fraction is None or 0 <= progress.fraction <= 1


@pytest.mark.parametrize(
    "line",
    [b"epoch " + b" " * 4000, b"epoch 1" + b"\t" * 4000, b"loss" + b" " * 4000 + b"x", b"epoch 1/" + b" " * 4000],
)
def test_hostile_line_does_not_hold_the_thread_that_ends_the_program(line: bytes) -> None:
    """A search keeps all threads of the node waiting, also those that renew the lease and kill the program."""
    begin = time.thread_time()
    for _ in range(20):
        read_line(line)
    assert time.thread_time() - begin < 0.5
