"""Arithmetic of volumes: properties, and the worked sizes that docs/format/volume-v1.md promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.volume import layout
from cloister.volume.types import CHUNK

SIZES = st.integers(min_value=0, max_value=layout.MAX_DATA)
FORMAT = Path(__file__).resolve().parents[2] / "docs" / "format" / "volume-v1.md"


@given(st.integers(min_value=0, max_value=1 << 40))
def test_padme_never_shrinks_grows_at_most_an_eighth_and_is_stable(count: int) -> None:
    padded = layout.padme(count)
    assert count <= padded <= count + count // 8
    assert layout.padme(padded) == padded


@given(st.integers(min_value=0, max_value=1 << 40))
def test_padme_never_decreases(count: int) -> None:
    assert layout.padme(count) <= layout.padme(count + 1)


def test_padme_hides_counts() -> None:
    assert len({layout.padme(count) for count in range(1 << 16)}) < 256


@given(SIZES, st.booleans())
def test_segments_hold_every_record_once(size: int, leaves: bool) -> None:
    geometry = layout.Layout(layout.padded(size), leaves=leaves)
    full, last = geometry.segments - 1, geometry.segments - 1
    if geometry.segments == 0:
        assert geometry.records == 0
        return
    assert full * layout.RECORDS_PER_SEGMENT + geometry.records_in(last) == geometry.records
    assert geometry.segment_size(last) == geometry.records_in(last) * (layout.RECORD + 32 * leaves)
    assert geometry.data_len == geometry.records * CHUNK >= size


@given(st.integers(min_value=1, max_value=1 << 30), SIZES, st.booleans())
def test_manifest_length_tells_its_records(plain: int, size: int, leaves: bool) -> None:
    geometry = layout.Layout(layout.padded(size), leaves=leaves)
    stored = geometry.manifest_len(plain)
    assert geometry.manifest_records(stored) == layout.padded(plain) // CHUNK
    with pytest.raises(ValueError, match="no manifest"):
        geometry.manifest_records(stored + 1)


@pytest.mark.parametrize("wrong", [-1, 1, CHUNK - 1, CHUNK * 9 * 2 + 1, layout.MAX_DATA + CHUNK])
def test_lengths_that_no_writer_makes_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match="no padded length"):
        layout.Layout(wrong, leaves=True)


def test_records_in_a_segment_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no segment 1"):
        layout.Layout(CHUNK, leaves=False).records_in(1)


def test_the_worked_sizes_of_the_format_page_are_true() -> None:
    """Rows `| content | data_len | segment files, suite 1 | suite 2 | whole volume, suite 1 | suite 2 |` of one file named `a`."""
    manifest_plain = 32 + 2 * 24 + 1
    rows = re.findall(r"^\|" + r" ([\d,]+) \|" * 6 + r"$", FORMAT.read_text("utf-8"), re.MULTILINE)
    assert len(rows) >= 8
    for row in rows:
        size, data_len, *stored = (int(cell.replace(",", "")) for cell in row)
        assert layout.padded(layout.aligned(size)) == data_len
        for leaves in (False, True):
            geometry = layout.Layout(data_len, leaves=leaves)
            assert sum(geometry.segment_size(s) for s in range(geometry.segments)) == stored[leaves]
            assert geometry.stored_size(manifest_plain) == stored[2 + leaves]
