"""Jobs: nothing that could end an argument, a line or a path early gets past construction."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.confine.job import ENVIRONMENT, RESERVED, Bind, Job

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n"), max_size=20)
BREAKERS = st.sampled_from(["\0", "\n"])


@given(TEXT, BREAKERS, TEXT)
def test_paths_with_nul_or_newline_are_refused(before: str, breaker: str, after: str) -> None:
    bad = f"/x{before}{breaker}{after}"
    for make in (
        lambda: Bind(Path("/usr"), bad),
        lambda: Bind(Path(bad), "/usr"),
        lambda: Job((), (bad,)),
        lambda: Job((), ("/bin/true",), cwd=bad),
        lambda: Job((), ("/bin/true",), outputs={bad[1:]: 1}),
    ):
        with pytest.raises(ValueError, match=r"NUL|name of an output"):
            make()


@given(TEXT, TEXT)
def test_arguments_and_values_may_hold_newlines_but_no_nul(before: str, after: str) -> None:
    fine = f"{before}\n{after}"
    assert Job((), ("/bin/true", fine), env={"A": fine}).argv[1] == fine
    bad = f"{before}\0{after}"
    with pytest.raises(ValueError, match="NUL"):
        Job((), ("/bin/true", bad))
    with pytest.raises(ValueError, match="NUL"):
        Job((), ("/bin/true",), env={"A": bad})


@pytest.mark.parametrize("target", ["", "/", "usr", "//usr", "/usr/", "/usr/../etc/shadow", "/./usr", "/..", "/a//b"])
def test_targets_are_absolute_and_normal(target: str) -> None:
    with pytest.raises(ValueError, match=r"absolute|climbs"):
        Bind(Path("/usr"), target)


@pytest.mark.parametrize("place", [*RESERVED, "/etc"])
def test_binds_cannot_cover_what_the_jail_provides(place: str) -> None:
    with pytest.raises(ValueError, match="bind target"):
        Bind(Path("/usr"), place)
    if place != "/etc":
        with pytest.raises(ValueError, match="bind target"):
            Bind(Path("/usr"), place + "/deeper")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", ".hidden", "é", "x" * 129, "a b"])
def test_output_names_are_plain(name: str) -> None:
    with pytest.raises(ValueError, match="name of an output"):
        Job((), ("/bin/true",), outputs={name: 1})


@pytest.mark.parametrize("size", [0, -1, 1 << 62, True, 1.5])
def test_output_sizes_are_positive(size: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        Job((), ("/bin/true",), outputs={"one": size})


@pytest.mark.parametrize("name", ["", "A=B", "1A", "A-B", "Ä", "A\n"])
def test_environment_names_are_plain(name: str) -> None:
    with pytest.raises(ValueError, match="environment"):
        Job((), ("/bin/true",), env={name: "x"})


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(ValueError, match="UTF-8"):
        Job((), ("/bin/true", "\udc80"))
    with pytest.raises(ValueError, match="UTF-8"):
        Bind(Path("/usr"), "/\udc80")


def test_program_must_be_absolute_and_present() -> None:
    with pytest.raises(ValueError, match="empty"):
        Job((), ())
    with pytest.raises(ValueError, match="absolute"):
        Job((), ("python",))


def test_two_binds_at_one_place_are_refused() -> None:
    with pytest.raises(ValueError, match="two binds"):
        Job((Bind(Path("/usr"), "/x"), Bind(Path("/etc"), "/x")), ("/bin/true",))


def test_later_changes_of_the_callers_mappings_do_not_reach_the_job() -> None:
    env = {"A": "1"}
    job = Job((), ("/bin/true",), env=env)
    env["LD_PRELOAD"] = "/tmp/x"
    assert dict(job.env) == {"A": "1"}


def test_basic_environment_is_exactly_four_names() -> None:
    assert set(ENVIRONMENT) == {"PATH", "HOME", "LANG", "TMPDIR"}
