"""Who can give each job a user id of its own: real root can, root of a one-id user namespace cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from cloister.confine import users


def test_root_of_a_namespace_with_one_id_starts_jails_like_an_ordinary_user() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("unshare(1) is not installed")
    program = "from cloister.confine import users; import os; print(os.geteuid(), users.separate())"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    assert done.stdout.split() == ["0", "False"]


@pytest.mark.parametrize(
    ("text", "enough"),
    [("0 0 4294967295\n", True), ("0 100000 65536\n", True), ("0 1000 1\n", False), ("", False)],
)
def test_enough_ids(text: str, enough: bool) -> None:
    assert bool(users.candidates(users.parse_id_map(text))) is enough


@pytest.mark.root
def test_real_root_can() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    assert users.separate()
