"""Common random numbers: purity, prefixes, separation of the splits, and the normal law."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from searchlab.errors import ConfigError
from searchlab.evaluators.noise import BANKS, noise_bank, split_seed


@pytest.mark.parametrize("shape", [(64,), (3, 5), (1,), (), (7,), (2, 2, 2)])
def test_a_sample_depends_on_seed_and_index_only(shape: tuple[int, ...]) -> None:
    whole = noise_bank(7, 0, 50, shape)
    assert whole.shape == (50, *shape)
    assert whole.dtype == np.float32
    for start, count in ((0, 1), (0, 17), (13, 20), (49, 1), (20, 0)):
        part = noise_bank(7, start, count, shape)
        assert part.tobytes() == whole[start : start + count].tobytes()


def test_numbers_are_pinned() -> None:
    # A change of these values would make every stored result incomparable with new ones.
    expected = (
        [2.637392520904541, -0.5159201622009277, 0.6438383460044861, 0.4514772295951843],
        [0.3117627203464508, -1.0291857719421387, 0.026603495702147484, -0.7902697324752808],
    )
    np.testing.assert_allclose(noise_bank(0, 0, 1, (4,))[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(noise_bank(2**64 - 1, 10**12, 1, (4,))[0], expected[1], rtol=1e-6)


def test_an_index_beyond_64_bits_of_counter_is_still_its_own() -> None:
    shape = (1 << 8,)
    far = 2**63
    pair = noise_bank(1, far, 2, shape)
    assert pair[1].tobytes() == noise_bank(1, far + 1, 1, shape)[0].tobytes()
    assert not np.array_equal(pair[0], noise_bank(1, 0, 1, shape)[0])


def test_the_law_is_normal_and_rows_are_independent() -> None:
    bank = noise_bank(split_seed(3, "search"), 0, 4000, (64,)).astype(np.float64)
    assert stats.kstest(bank.ravel(), "norm").pvalue > 1e-3
    covariance = np.cov(bank.T)
    # 4000 rows: the sd of a variance is 0.022, of an off-diagonal entry 0.016.
    assert abs(np.diag(covariance) - 1).max() < 0.1
    assert abs(covariance - np.diag(np.diag(covariance))).max() < 0.08
    neighbours = (bank[:-1] * bank[1:]).mean()
    assert abs(neighbours) < 5 / np.sqrt(4000 * 64)


def test_every_number_is_finite_even_at_the_ends_of_the_uniforms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Extreme(np.random.Philox):
        def random_raw(self, size: int | None = None, output: bool = True) -> np.ndarray:
            words = np.zeros(size or 1, dtype=np.uint64)
            words[1::2] = np.uint64(2**64 - 1)
            return words

    monkeypatch.setattr(np.random, "Philox", Extreme)
    bank = noise_bank(0, 0, 2, (4,))
    assert np.isfinite(bank).all()
    np.testing.assert_allclose(bank[:, 0], -bank[:, 1], rtol=1e-6)
    assert 8 < bank.max() < 8.3


def test_seeds_of_splits_never_meet() -> None:
    seeds = (0, 1, 2, 2**40 - 1)
    indices = (0, 1, 2, 2**22 - 1)
    derived = [split_seed(s, b, i) for s, b, i in itertools.product(seeds, BANKS, indices)]
    assert len(set(derived)) == len(derived)
    assert min(derived) >= 2**62
    assert max(derived) < 2**64
    assert not set(derived) & set(seeds)


def test_banks_of_different_splits_are_uncorrelated() -> None:
    banks = [noise_bank(split_seed(5, split, i), 0, 2000, (64,)) for split in BANKS for i in (0, 1)]
    for a, b in itertools.combinations(banks, 2):
        assert abs(float((a * b).mean())) < 5 / np.sqrt(a.size)


@pytest.mark.parametrize(
    ("seed", "start", "count", "shape", "named"),
    [
        (-1, 0, 1, (2,), "seed is -1"),
        (2**64, 0, 1, (2,), "seed is"),
        (0, -3, 1, (2,), "start is -3"),
        (0, 0, -1, (2,), "count is -1"),
        (0, 0, 1, (2, -4), "size in shape is -4"),
    ],
)
def test_values_out_of_range_are_named(
    seed: int, start: int, count: int, shape: tuple[int, ...], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        noise_bank(seed, start, count, shape)


def test_split_arguments_out_of_range_are_named() -> None:
    with pytest.raises(ConfigError, match="seed is"):
        split_seed(2**40, "search")
    with pytest.raises(ConfigError, match="index is"):
        split_seed(0, "search", 2**22)
    with pytest.raises(ConfigError, match="unknown split 'test'"):
        split_seed(0, "test")  # type: ignore[arg-type]
