"""Uniforms belong to ids: a row is the same in every batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchlab.errors import ConfigError
from searchlab.uniforms import uniforms

SEEDS = st.integers(0, 2**64 - 1)
IDS = st.integers(0, 2**40)
WIDTHS = st.integers(1, 23)


@given(seed=SEEDS, first=IDS, n=st.integers(1, 20), width=WIDTHS, data=st.data())
def test_a_row_is_independent_of_its_batch(
    seed: int, first: int, n: int, width: int, data: st.DataObject
) -> None:
    row = data.draw(st.integers(0, n - 1))
    whole = uniforms(seed, 3, first, n, width)
    alone = uniforms(seed, 3, first + row, 1, width)
    np.testing.assert_array_equal(whole[row], alone[0])


@given(seed=SEEDS, first=IDS, n=st.integers(0, 20), width=st.integers(0, 23))
def test_shape_and_range(seed: int, first: int, n: int, width: int) -> None:
    u = uniforms(seed, 0, first, n, width)
    assert u.shape == (n, width)
    assert u.dtype == np.float64
    assert ((u >= 0) & (u < 1)).all()


@given(seed=st.integers(0, 2**64 - 2), purpose=st.integers(0, 500), first=IDS, width=WIDTHS)
def test_seed_purpose_and_id_each_select_a_stream(
    seed: int, purpose: int, first: int, width: int
) -> None:
    rows = [
        uniforms(seed, purpose, first, 1, width),
        uniforms(seed + 1, purpose, first, 1, width),
        uniforms(seed, purpose + 1, first, 1, width),
        uniforms(seed, purpose, first + 1, 1, width),
    ]
    assert len({row.tobytes() for row in rows}) == 4


def test_ids_do_not_overlap() -> None:
    u = uniforms(0, 0, 0, 2000, 6)
    assert len(np.unique(u)) == u.size


def test_the_numbers_are_uniform() -> None:
    u = uniforms(7, 0, 0, 20_000, 5)
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    # Each bin expects 5,000 with a standard deviation of 69: six of them.
    assert np.abs(counts - 5000).max() < 6 * 69
    assert np.abs(np.corrcoef(u.T) - np.eye(5)).max() < 0.04


def test_the_stream_is_pinned() -> None:
    # A change of these numbers voids the traces of all stored runs.
    expected = [
        [0.6527702009682942, 0.11067824353160172, 0.732343633271771],
        [0.1256889418517213, 0.6196906569433086, 0.14485607826555957],
    ]
    np.testing.assert_array_equal(uniforms(1, 2, 3, 2, 3), expected)


@pytest.mark.parametrize(
    ("seed", "purpose", "first"), [(-1, 0, 0), (2**64, 0, 0), (0, -1, 0), (0, 2**64, 0), (0, 0, -1)]
)
def test_numbers_out_of_range_are_named(seed: int, purpose: int, first: int) -> None:
    with pytest.raises(ConfigError, match=r"allowed: seed and purpose"):
        uniforms(seed, purpose, first, 1, 1)
