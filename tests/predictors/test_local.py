"""`local`: the suite, and that relatives share how far their signals lead astray."""

from __future__ import annotations

import numpy as np
import pytest

from searchlab.evaluator import Signal
from searchlab.predictor import table_of
from searchlab.predictors.local import MOST, Local, _numeric
from searchlab.predictors.ridge import Ridge
from searchlab.space import Space
from searchlab.testing.predictor import PredictorSuite, tau
from searchlab.variables import Choice, Real


class TestLocal(PredictorSuite):
    with_data = True

    @pytest.fixture
    def build(self):
        return Local


FAMILIES = Space(x=Real(0.0, 1.0, shape=(4,)), kind=Choice(("a", "b", "c"), shape=(2,)))


def families(n: int, first: int):
    """Families around fifteen founders; a signal that is wrong by as much for all of one."""
    founders = FAMILIES.sample(np.random.default_rng(3).random((15, FAMILIES.sample_width)))
    generator = np.random.default_rng(first)
    which = generator.integers(15, size=n)
    near = founders["x"][which] + generator.normal(scale=0.01, size=(n, 4))
    population = FAMILIES.canonicalise(
        type(founders)({"x": np.clip(near, 0, 1), "kind": founders["kind"][which]})
    )
    losses = np.random.default_rng(8).normal(size=15)[which] + 0.3 * generator.normal(size=n)
    astray = np.random.default_rng(9).normal(size=15)[which]
    table = table_of(FAMILIES, population, signals=(losses + astray)[:, None], of=[Signal("few")])
    return table, losses


def test_what_a_signal_gets_wrong_is_learnt_of_relatives() -> None:
    table, losses = families(120, 1)
    fresh, truth = families(200, 2)
    reached = []
    for predictor in (Local(), Ridge()):
        predictor.fit(table, losses, seed=0)
        reached.append(tau(predictor.rank(fresh), truth))
    assert reached[0] > 0.75
    assert reached[0] > reached[1] + 0.05


def test_the_best_labels_are_kept_and_far_ones_are_not_known_well() -> None:
    table, losses = families(MOST + 40, 4)
    local = Local()
    local.fit(table, losses, seed=0)
    assert len(local._weights) == MOST
    away = FAMILIES.sample(np.random.default_rng(77).random((30, FAMILIES.sample_width)))
    far = table_of(FAMILIES, away, signals=np.full((30, 1), np.median(losses)), of=[Signal("few")])
    assert np.median(local.predict(far)[1]) > 1.5 * np.median(local.predict(table)[1])


def test_numbers_are_told_from_labels() -> None:
    assert _numeric(FAMILIES).tolist() == [True] * 4 + [False] * 6


def test_left_out_labels_are_predicted_about_as_well_as_fresh_ones() -> None:
    table, losses = families(120, 1)
    local = Local()
    local.fit(table, losses, seed=0)
    said = local.held_out()
    assert said is not None
    assert tau(said, losses) > 0.7
