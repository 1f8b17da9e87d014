"""Fréchet and kernel distances: exact values, streaming, populations, and bad input."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import linalg

from searchlab.errors import EvaluationError
from searchlab.evaluators.distances import (
    FeatureStatistics,
    FrechetReference,
    frechet_distance,
    frechet_distances,
    kid,
)

Array = npt.NDArray[np.float64]


def _exact_rows(mean: Array, covariance: Array, *, rows: int) -> Array:
    """Rows whose sample mean and unbiased covariance are the given ones up to rounding."""
    white = np.random.default_rng(0).normal(size=(rows, len(mean)))
    white -= white.mean(axis=0)
    white = linalg.solve_triangular(
        linalg.cholesky(np.cov(white.T), lower=True), white.T, lower=True
    ).T
    return white @ linalg.cholesky(covariance, lower=True).T + mean


def _distance(rows: Array, reference: FrechetReference) -> float:
    statistics = reference.statistics()
    statistics.add(rows)
    return frechet_distance(statistics, reference)


def _random_covariance(size: int, seed: int) -> Array:
    factor = np.random.default_rng(seed).normal(size=(size, 2 * size))
    return factor @ factor.T / size


def test_shifted_and_scaled_normal_in_four_dimensions_is_five() -> None:
    rows = _exact_rows(np.array([1.0, 0, 0, 0]), 4 * np.eye(4), rows=50)
    assert _distance(rows, FrechetReference(np.zeros(4), np.eye(4))) == pytest.approx(5, abs=1e-10)


@pytest.mark.parametrize(("size", "sigma"), [(1, 0.5), (3, 2.0), (16, 1.5)])
def test_isotropic_normals(size: int, sigma: float) -> None:
    mean = np.linspace(-1, 2, size)
    rows = _exact_rows(mean, sigma**2 * np.eye(size), rows=200)
    expected = float(mean @ mean) + size * (sigma - 1) ** 2
    reference = FrechetReference(np.zeros(size), np.eye(size))
    assert _distance(rows, reference) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rows", [500, 20])
def test_a_set_has_distance_zero_to_itself(rows: int) -> None:
    data = np.random.default_rng(1).normal(size=(rows, 8)) * 3 + 100
    assert 0 <= _distance(data, FrechetReference.from_features(data)) < 1e-8


def test_it_is_zero_only_for_equal_moments() -> None:
    data = np.random.default_rng(1).normal(size=(500, 8))
    reference = FrechetReference.from_features(data)
    assert _distance(data + 0.1, reference) == pytest.approx(0.08, rel=1e-6)
    assert _distance(data @ np.diag([1.1] + [1] * 7), reference) > 1e-3


@pytest.mark.parametrize("size", [5, 64])
def test_it_equals_the_matrix_root_form(size: int) -> None:
    ours, data = _random_covariance(size, 1), _random_covariance(size, 2)
    mean = np.random.default_rng(3).normal(size=size)
    rows = _exact_rows(mean, ours, rows=3 * size)
    root = linalg.sqrtm(ours @ data)
    expected = mean @ mean + np.trace(ours) + np.trace(data) - 2 * np.trace(root).real
    reference = FrechetReference(np.zeros(size), data)
    assert _distance(rows, reference) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rows", [2, 5, 31, 32, 33])
def test_few_rows_give_the_same_as_the_large_form(rows: int) -> None:
    size = 32
    data = np.random.default_rng(rows).normal(size=(rows, size)) + 0.3
    reference = FrechetReference(np.zeros(size), _random_covariance(size, 4))
    covariance = np.cov(data.T)
    values = np.linalg.eigvals(covariance @ reference.covariance).real.clip(min=0)
    mean = data.mean(axis=0)
    expected = mean @ mean + np.trace(covariance) + reference.trace - 2 * np.sqrt(values).sum()
    # Rounding leaves zero eigenvalues of the large form at 1e-16, hence roots of 1e-8.
    assert _distance(data, reference) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("size", "rows"), [(16, 1000), (16, 4000), (64, 2000)])
def test_the_small_sample_bias_is_as_predicted(size: int, rows: int) -> None:
    reference = FrechetReference(np.zeros(size), np.eye(size))
    generator = np.random.default_rng(11)
    draws = [_distance(generator.normal(size=(rows, size)), reference) for _ in range(40)]
    expected = size / rows + size * (size + 1) / (4 * rows)
    assert np.mean(draws) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streaming_and_merging_equal_one_shot(offset: float) -> None:
    data = np.random.default_rng(5).normal(size=(300, 12)) + offset
    shift = np.full(12, offset)
    whole = FeatureStatistics(shift)
    whole.add(data)
    streamed, left, right = (FeatureStatistics(shift) for _ in range(3))
    cuts = [0, 1, 1, 4, 11, 12, 40, 299, 300]
    for number, (a, b) in enumerate(itertools.pairwise(cuts)):
        streamed.add(data[a:b])
        (left if number % 2 else right).add(data[a:b])
    left.merge(right)
    for other in (streamed, left):
        assert other.count == whole.count == 300
        np.testing.assert_allclose(other.mean(), data.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(other.covariance(), whole.covariance(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(whole.covariance(), np.cov(data.T), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("first", "second"), [(3, 4), (3, 9), (9, 3), (20, 30), (0, 5), (8, 0)])
def test_merging_parts_below_and_above_the_dimension(first: int, second: int) -> None:
    data = np.random.default_rng(6).normal(size=(first + second, 10))
    left, right = FeatureStatistics(np.zeros(10)), FeatureStatistics(np.zeros(10))
    left.add(data[:first])
    right.add(data[first:])
    left.merge(right)
    assert left.count == first + second
    np.testing.assert_allclose(left.mean(), data.mean(axis=0), atol=1e-14)
    np.testing.assert_allclose(left.covariance(), np.cov(data.T), atol=1e-13)
    assert (left.centred_rows() is None) == (first + second >= 10)
    assert right.count == second


def test_the_shift_prevents_cancellation() -> None:
    data = np.random.default_rng(7).normal(size=(1000, 3)) + 1e9
    near, far = FeatureStatistics(np.full(3, 1e9)), FeatureStatistics(np.zeros(3))
    near.add(data)
    far.add(data)
    truth = np.cov(data.T)
    assert abs(near.covariance() - truth).max() < 1e-6
    assert abs(far.covariance() - truth).max() > 1


@pytest.mark.parametrize(("rows", "size"), [(200, 32), (2000, 16), (10, 32), (7, 5)])
def test_a_population_has_the_bits_of_its_members(rows: int, size: int) -> None:
    generator = np.random.default_rng(8)
    features = generator.normal(size=(6, rows, size)).astype(np.float32)
    features *= np.linspace(0.5, 2, 6, dtype=np.float32)[:, None, None]
    reference = FrechetReference(np.full(size, 0.2), _random_covariance(size, 9))
    together = frechet_distances(features, reference)
    alone = np.array([_distance(rows_, reference) for rows_ in features])
    assert together.tobytes() == alone.tobytes()
    assert frechet_distances(torch.from_numpy(features), reference).tobytes() == alone.tobytes()
    assert len(set(alone)) == 6


def test_a_diverged_member_of_a_population_costs_only_itself() -> None:
    features = np.random.default_rng(8).normal(size=(3, 50, 4))
    reference = FrechetReference(np.zeros(4), np.eye(4))
    clean = frechet_distances(features, reference)
    features[1, 7, 2] = np.inf
    mixed = frechet_distances(features, reference)
    assert math.isnan(mixed[1])
    assert mixed[[0, 2]].tobytes() == clean[[0, 2]].tobytes()
    features[:, 0, 0] = np.nan
    assert np.isnan(frechet_distances(features, reference)).all()


def test_rows_that_are_not_finite_are_counted_and_not_added() -> None:
    data = np.ones((5, 2))
    data[1, 0], data[3, 1] = np.nan, -np.inf
    statistics = FeatureStatistics(np.zeros(2))
    with pytest.raises(EvaluationError, match="2 of 5 feature rows"):
        statistics.add(data)
    assert statistics.count == 0
    with pytest.raises(EvaluationError, match="2 of 5 feature rows"):
        kid(data, np.ones((5, 2)))
    with pytest.raises(EvaluationError, match="2 of 5 feature rows"):
        kid(np.ones((5, 2)), data)
    with pytest.raises(EvaluationError, match="2 of 5 feature rows"):
        FrechetReference.from_features(data)


def test_kid_of_two_points_each_is_minus_thirteen() -> None:
    value, error = kid(np.array([[0.0], [1.0]]), np.array([[0.0], [2.0]]))
    assert value == -13
    assert math.isnan(error)


def test_kid_equals_the_sum_over_pairs() -> None:
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(9, 3)), generator.normal(size=(7, 3)) + 0.5

    def kernel(a: Array, b: Array) -> float:
        return float(a @ b / 3 + 1) ** 3

    within_x = np.mean([kernel(a, b) for a, b in itertools.permutations(x, 2)])
    within_y = np.mean([kernel(a, b) for a, b in itertools.permutations(y, 2)])
    across = np.mean([kernel(a, b) for a, b in itertools.product(x, y)])
    assert kid(x, y)[0] == pytest.approx(within_x + within_y - 2 * across, rel=1e-12)


def test_kid_takes_more_rows_than_one_part_of_the_kernel_matrix() -> None:
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(2500, 2)), generator.normal(size=(30, 2))
    gram = (x @ x.T / 2 + 1) ** 3
    within_x = (gram.sum() - np.trace(gram)) / (2500 * 2499)
    gram = (y @ y.T / 2 + 1) ** 3
    within_y = (gram.sum() - np.trace(gram)) / (30 * 29)
    expected = within_x + within_y - 2 * ((x @ y.T / 2 + 1) ** 3).mean()
    assert kid(x, y)[0] == pytest.approx(expected, rel=1e-10)


def test_kid_blocks_are_unbiased_and_their_error_is_honest() -> None:
    generator = np.random.default_rng(4)
    inside = 0
    for _ in range(30):
        x, y = generator.normal(size=(2000, 8)), generator.normal(size=(2100, 8))
        value, error = kid(x, y, block=100)
        assert 0 < error < 0.05
        inside += abs(value) < 2 * error
    # Equal laws: the truth is 0, and about 95 % of the intervals of two errors hold it.
    assert inside >= 25


@pytest.mark.parametrize("order", ["sorted", "cyclic"])
def test_kid_blocks_of_an_ordered_set_are_like_the_whole(order: str) -> None:
    classes = np.arange(2000) % 10 if order == "cyclic" else np.arange(2000) // 200
    data = 3 * np.eye(10)[classes] + 0.1 * np.random.default_rng(0).normal(size=(2000, 10))
    samples = np.random.default_rng(1).permutation(data)
    value, error = kid(samples, data, block=200)
    consecutive = [kid(samples[j : j + 200], data[j : j + 200])[0] for j in range(0, 2000, 200)]
    assert abs(value) < 3 * error
    assert error < 0.02
    if order == "sorted":
        assert np.mean(consecutive) > 20 * error


@pytest.mark.parametrize("block", [1, 11])
def test_kid_blocks_out_of_range_are_named(block: int) -> None:
    with pytest.raises(EvaluationError, match=f"block is {block}"):
        kid(np.zeros((12, 2)), np.zeros((10, 2)), block=block)


def test_shapes_that_do_not_fit_are_errors() -> None:
    reference = FrechetReference(np.zeros(4), np.eye(4))
    statistics = reference.statistics()
    with pytest.raises(EvaluationError, match="0 feature rows"):
        frechet_distance(statistics, reference)
    statistics.add(np.zeros((1, 4)))
    with pytest.raises(EvaluationError, match="1 feature rows"):
        statistics.covariance()
    with pytest.raises(EvaluationError, match="3 columns"):
        statistics.add(np.zeros((2, 3)))
    with pytest.raises(EvaluationError, match="2 axes"):
        statistics.add(np.zeros(4))
    with pytest.raises(EvaluationError, match="different shifts"):
        statistics.merge(FeatureStatistics(np.ones(4)))
    with pytest.raises(EvaluationError, match="3 features against 4"):
        frechet_distance(FeatureStatistics(np.zeros(3)), reference)
    with pytest.raises(EvaluationError, match="N >= 2"):
        frechet_distances(np.zeros((3, 1, 4)), reference)
    with pytest.raises(EvaluationError, match="3 features against 2"):
        kid(np.zeros((4, 3)), np.zeros((4, 2)))
    with pytest.raises(EvaluationError, match="do not fit"):
        FrechetReference(np.zeros(3), np.eye(4))
    with pytest.raises(EvaluationError, match="not symmetric"):
        FrechetReference(np.zeros(2), np.array([[1.0, 1.0], [0.0, 1.0]]))
    with pytest.raises(EvaluationError, match="eigenvalue -1"):
        FrechetReference(np.zeros(2), np.diag([1.0, -1.0]))
    with pytest.raises(EvaluationError, match="not finite"):
        FrechetReference(np.zeros(2), np.diag([1.0, np.nan]))


def test_a_reference_cannot_be_changed_and_has_a_digest_of_its_values() -> None:
    data = np.random.default_rng(0).normal(size=(30, 3))
    reference = FrechetReference.from_features(data)
    with pytest.raises(ValueError, match="read-only"):
        reference.mean[0] = 1
    assert reference.digest == FrechetReference.from_features(data.copy()).digest
    assert reference.digest != FrechetReference.from_features(data + 1e-9).digest


@pytest.mark.parametrize("full", [True, False])
def test_many_features_take_a_cheaper_product(full: bool) -> None:
    """From 256 on; without full rank the root is used as before."""
    size = 260
    generator = np.random.default_rng(0)
    data = generator.normal(size=(2 * size if full else size // 2, size))
    reference = FrechetReference.from_features(data)
    assert (reference.factor is not None) is full
    rows = generator.normal(size=(600, size)) * 1.2 + 0.1
    statistics = reference.statistics()
    statistics.add(rows)
    root = reference.root
    values = np.linalg.eigvalsh(root @ statistics.covariance() @ root).clip(min=0)
    offset = float(((statistics.mean() - reference.mean) ** 2).sum())
    trace = float(np.trace(statistics.covariance())) + reference.trace
    expected = offset + trace - 2 * float(np.sqrt(values).sum())
    found = frechet_distance(statistics, reference)
    assert found == pytest.approx(expected, rel=1e-9 if full else 1e-6)
    assert frechet_distances(rows[None], reference)[0] == found
