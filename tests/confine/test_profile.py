"""Profiles: what their bytes say, and that no other bytes say the same."""

from __future__ import annotations

from dataclasses import replace

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.confine.profile import NAMES, Limits, Profile, profile


def test_names_and_strictness() -> None:
    assert NAMES == ("offline", "one-shot", "sealed")
    assert [(profile(name).strict, profile(name).one_request) for name in NAMES] == [
        (False, False),
        (False, True),
        (True, False),
    ]


@pytest.mark.parametrize("name", ["none", "", "Sealed", "open"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"none|no sandbox profile"):
        profile(name)


def test_sealed_has_no_loopback() -> None:
    with pytest.raises(ValueError, match="no network at all"):
        profile("sealed", loopback=True)


def test_a_lax_profile_cannot_call_itself_sealed() -> None:
    with pytest.raises(ValueError, match="sealed"):
        Profile("sealed", strict=False, one_request=False)
    with pytest.raises(ValueError, match="sealed"):
        replace(profile("sealed"), strict=False)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("offline", "082071fdbaf64fdb50d5a3afd00645ee7839c494cc670c40b39c009af72d1774"),
        ("one-shot", "ad2b4487229a0e70ea0e93b9907f486d4e293b7ccf612cec36ebbee12dcb4511"),
        ("sealed", "9e10998b39e44495e4badabeb124be4f81b62465b2cdc6d012e11042b50c6c56"),
    ],
)
def test_digests_are_stable(name: str, digest: str) -> None:
    """The digest stands in the workload event: a change of it must be meant."""
    assert profile(name).digest().hex() == digest


LIMITS = st.builds(
    Limits,
    memory_bytes=st.integers(1, 1 << 50),
    pids=st.integers(1, 1 << 22),
    cpu_s=st.integers(0, 1 << 32),
    scratch_bytes=st.integers(1, 1 << 50),
    shm_bytes=st.integers(1, 1 << 50),
    nofile=st.integers(1, 1 << 20),
    wall_s=st.integers(0, 1 << 32),
    output_files=st.integers(1, 1 << 20),
)
PROFILES = st.builds(
    lambda name, limits, loopback: profile(name, limits=limits, loopback=loopback and name != "sealed"),
    st.sampled_from(NAMES),
    LIMITS,
    st.booleans(),
)


@given(PROFILES)
def test_round_trip(one: Profile) -> None:
    assert Profile.decode(one.encode()) == one


@given(PROFILES, PROFILES)
def test_different_profiles_have_different_digests(one: Profile, other: Profile) -> None:
    assert (one.digest() == other.digest()) == (one == other)


def _changed(**changes: object) -> bytes:
    value = cbor2.loads(profile("offline").encode())
    for key, new in changes.items():
        if new is None:
            del value[key]
        else:
            value[key] = new
    return cbor2.dumps(value, canonical=True)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xa0",
        profile("offline").encode() + b"\x00",
        _changed(v=2),
        _changed(v=None),
        _changed(name="none"),
        _changed(name=7),
        _changed(strict=1),
        _changed(strict=True),
        _changed(extra=True),
        _changed(loopback=None),
        _changed(limits={}),
        _changed(limits=[1]),
        _changed(limits={**cbor2.loads(profile("offline").encode())["limits"], "pids": True}),
        _changed(limits={**cbor2.loads(profile("offline").encode())["limits"], "pids": 0}),
    ],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"profile|CBOR|limit"):
        Profile.decode(data)


@pytest.mark.parametrize("field", ["memory_bytes", "pids", "scratch_bytes", "shm_bytes", "nofile", "output_files"])
def test_a_limit_of_zero_is_no_way_to_say_unlimited(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Limits(**{field: 0})
    with pytest.raises(TypeError, match=field):
        Limits(**{field: 1.5})  # type: ignore[arg-type]
