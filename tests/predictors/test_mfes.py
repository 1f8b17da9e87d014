"""`mfes`: the suite, and weights that follow the order of the truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from searchlab.predictors.forest import Forest
from searchlab.predictors.mfes import MultiFidelity
from searchlab.testing.predictor import PredictorSuite, labelled, plain_space, tau


class TestMultiFidelity(PredictorSuite):
    learns = 0.4

    @pytest.fixture
    def build(self):
        return lambda: MultiFidelity(trees=20)


def test_a_good_fidelity_on_the_pool_helps_candidates_without_signals() -> None:
    table, losses = labelled(plain_space(), 15, signals=1)
    pool, _ = labelled(plain_space(), 300, first=2000, signals=1)
    fresh, truth = labelled(plain_space(), 300, first=900, signals=1)
    fresh = replace(fresh, signals=np.full_like(fresh.signals, np.nan))
    mfes, forest = MultiFidelity(), Forest()
    mfes.fit(table, losses, seed=0, pool=pool)
    forest.fit(replace(table, signals=np.full_like(table.signals, np.nan)), losses, seed=0)
    assert tau(mfes.rank(fresh), truth) > tau(forest.rank(fresh), truth) + 0.1


def test_weights_follow_order_and_a_backward_fidelity_is_turned_round() -> None:
    table, losses = labelled(plain_space(), 40, signals=1)
    pool, _ = labelled(plain_space(), 300, first=2000, signals=1)
    generator = np.random.default_rng(0)

    def worse(one):
        columns = [-(one.signals[:, 0] ** 3), generator.normal(size=len(one))]
        return replace(
            one,
            signals=np.stack(columns, axis=1),
            signal_names=("backward", "chance"),
            directions=("min", "min"),
        )

    mfes = MultiFidelity()
    mfes.fit(worse(table), losses, seed=0, pool=worse(pool))
    assert mfes.weights[0] < -0.3
    assert abs(mfes.weights[1]) < 0.1
    assert np.abs(mfes.weights).sum() == pytest.approx(1.0)
