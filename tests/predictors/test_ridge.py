"""`ridge`: the suite, and what only a linear model can promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from searchlab.predictor import DRAW_WIDTH, table_of
from searchlab.predictors.ridge import Ridge
from searchlab.space import Space
from searchlab.testing.predictor import PredictorSuite, labelled, plain_space, tau
from searchlab.uniforms import uniforms
from searchlab.variables import Choice


class TestRidge(PredictorSuite):
    @pytest.fixture
    def build(self):
        return Ridge


def additive(n: int, first: int = 0):
    """A sum over 12 choices of 4."""
    space = Space(a=Choice(range(4), shape=(12,)))
    population = space.sample(uniforms(3, 0, first, n, space.sample_width))
    table = table_of(space, population)
    return table, table.x @ np.random.default_rng(1).normal(size=48)


def test_a_sum_is_learnt_exactly_from_as_many_labels_as_unknowns() -> None:
    table, losses = additive(60)
    fresh, truth = additive(300, first=1000)
    ridge = Ridge()
    ridge.fit(table, losses, seed=0)
    mean, sd = ridge.predict(fresh)
    assert ridge.noise == 0.03
    assert np.corrcoef(mean, truth)[0, 1] > 0.99
    assert sd.mean() < 0.4 * truth.std()


def test_draws_have_the_posterior_covariance() -> None:
    table, losses = additive(20)
    ridge = Ridge()
    ridge.fit(table, losses, seed=0)
    fresh, _ = additive(6, first=500)
    draws = ridge.draw(fresh, uniforms(0, 0, 0, 20_000, DRAW_WIDTH))
    mean, sd = ridge.predict(fresh)
    assert np.abs(draws.mean(axis=0) - mean).max() < 0.05 * sd.max()
    phi = ridge._features(ridge._inputs(fresh))
    unit = np.diff(ridge._labels.knots)[0]
    inverse = np.linalg.inv(ridge._root @ ridge._root.T)
    wanted = phi @ inverse @ phi.T * unit**2
    assert np.abs(np.cov(draws.T) - wanted).max() < 0.05 * wanted.max()


def test_one_draw_is_one_linear_function() -> None:
    table, losses = additive(20)
    ridge = Ridge()
    ridge.fit(table, losses, seed=0)
    fresh, _ = additive(400, first=500)
    drawn = ridge.draw(fresh, np.array([[0.2, 0.9]]))[0]
    design = np.concatenate([fresh.x, np.ones((400, 1))], axis=1)
    left = drawn - design @ np.linalg.lstsq(design, drawn, rcond=None)[0]
    assert np.abs(left).max() < 1e-6 * np.ptp(drawn)


@pytest.mark.parametrize("n", [20, 200])
def test_evidence_is_that_of_the_normal_density(n: int) -> None:
    from scipy.stats import multivariate_normal

    from searchlab.predictors.ridge import _evidence

    generator = np.random.default_rng(n)
    phi, targets = generator.normal(size=(n, 50)), generator.normal(size=n)
    differences = []
    for noise in (0.1, 1.0):
        value, amplitude = _evidence(phi, targets, noise)
        covariance = amplitude * (phi @ phi.T + noise * np.eye(n))
        density = multivariate_normal(np.zeros(n), covariance).logpdf(targets)
        # log N + the prior of the amplitude, both at their common maximum
        differences.append(value - (density - np.log(amplitude) - 1.0 / amplitude))
    assert differences[0] == pytest.approx(differences[1], abs=1e-6)


def reached(signals: int, poison: bool, n: int) -> float:
    """Kendall's tau on fresh candidates after n labels."""
    table, losses = labelled(plain_space(), n, signals=signals)
    fresh, truth = labelled(plain_space(), 300, first=900, signals=signals)
    if poison:
        generator = np.random.default_rng(0)
        table = replace(table, signals=generator.normal(size=table.signals.shape))
        fresh = replace(fresh, signals=generator.normal(size=fresh.signals.shape))
    ridge = Ridge()
    ridge.fit(table, losses, seed=0)
    return tau(ridge.rank(fresh), truth)


def test_a_good_signal_helps_with_few_labels() -> None:
    assert reached(1, False, 12) > reached(0, False, 12) + 0.1


def test_a_random_signal_does_no_harm() -> None:
    assert reached(1, True, 40) > reached(0, False, 40) - 0.05


def test_far_outliers_are_cut() -> None:
    table, losses = additive(60)
    losses[3] = 1e9
    fresh, truth = additive(300, first=1000)
    ridge = Ridge()
    ridge.fit(table, losses, seed=0)
    assert np.corrcoef(ridge.predict(fresh)[0], truth)[0, 1] > 0.75
