"""Missing signals are filled in from what is there; flags count as far as codes foretell them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from searchlab.predictor import Table
from searchlab.predictors.impute import Imputer
from searchlab.predictors.preprocess import Inputs
from searchlab.predictors.stack import Stack
from searchlab.testing.predictor import labelled, plain_space, tau

GENERATOR_SEED = 3


def jointly_normal(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, four signals that follow from them and from each other, and 30 % holes."""
    generator = np.random.default_rng(GENERATOR_SEED)
    codes = generator.normal(size=(n, 5))
    common = generator.normal(size=(n, 1))
    scores = (
        codes @ generator.normal(size=(5, 4)) / 2 + common + 0.2 * generator.normal(size=(n, 4))
    )
    return codes, scores, generator.random((n, 4)) < 0.3


@pytest.mark.parametrize(("n", "explained"), [(30, 0.5), (1000, 0.85)])
def test_holes_are_filled_from_codes_and_other_signals(n: int, explained: float) -> None:
    codes, scores, missing = jointly_normal(n + 500)
    shown = np.where(missing, 0.0, scores)
    imputer = Imputer.of(codes[:n], shown[:n], missing[:n])
    filled = imputer(codes[n:], shown[n:], missing[n:])
    fresh, holes = scores[n:], missing[n:]
    assert np.array_equal(filled[~holes], fresh[~holes])
    assert ((filled - fresh)[holes] ** 2).mean() < (1 - explained) * fresh[holes].var()


def test_what_is_expected_is_the_conditional_mean() -> None:
    codes, scores, missing = jointly_normal(3000)
    imputer = Imputer.of(codes, scores, np.zeros_like(missing))
    row = np.array([[True, False, True, False]])
    filled = imputer(codes[:1], np.where(row, 0.0, scores[:1]), row)
    covariance = np.linalg.inv(imputer.inner)
    base = imputer.means + (codes[:1] - imputer.centre) @ imputer.slopes.T
    gone, there = [0, 2], [1, 3]
    gain = covariance[np.ix_(gone, there)] @ np.linalg.inv(covariance[np.ix_(there, there)])
    wanted = base[0, gone] + gain @ (scores[0, there] - base[0, there])
    assert np.allclose(filled[0, gone], wanted, atol=1e-9)


def with_holes(table: Table, holes: np.ndarray) -> Table:
    columns = table.signals.copy()
    columns[holes] = np.nan
    return replace(table, signals=columns)


def test_a_flag_that_is_chance_says_nothing_and_one_that_follows_does() -> None:
    table, _ = labelled(plain_space(), 400, signals=1)
    chance = np.random.default_rng(0).random((400, 1)) < 0.3
    assert Inputs(with_holes(table, chance)).weights[0] < 0.2
    follows = table.x[:, :1] > 0.5  # the first code
    assert Inputs(with_holes(table, follows)).weights[0] > 0.9


def test_a_third_of_the_signals_missing_costs_little() -> None:
    table, losses = labelled(plain_space(), 60, signals=3)
    fresh, truth = labelled(plain_space(), 300, first=900, signals=3)
    pool, _ = labelled(plain_space(), 300, first=2000, signals=3)
    generator = np.random.default_rng(1)

    def holed(one: Table) -> Table:
        return with_holes(one, generator.random(one.signals.shape) < 0.3)

    plain, harmed = Stack(), Stack()
    plain.fit(table, losses, seed=0, pool=pool)
    harmed.fit(holed(table), losses, seed=0, pool=holed(pool))
    assert tau(harmed.rank(holed(fresh)), truth) > tau(plain.rank(fresh), truth) - 0.1
    assert tau(plain.rank(holed(fresh)), truth) > tau(plain.rank(fresh), truth) - 0.1
