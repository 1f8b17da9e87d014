"""Tree predictors: the suite, and node arrays beside scikit-learn's own predictions."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import GradientBoostingRegressor, RandomForestRegressor

from searchlab.errors import DataError
from searchlab.predictors.boosted import Boosted
from searchlab.predictors.forest import Forest
from searchlab.predictors.trees import Trees
from searchlab.testing.predictor import PredictorSuite


class TestForest(PredictorSuite):
    @pytest.fixture
    def build(self):
        return lambda: Forest(trees=60)


class TestBoosted(PredictorSuite):
    @pytest.fixture
    def build(self):
        return lambda: Boosted(trees=40, rate=0.1)


def rows(n: int, seed: int) -> np.ndarray:
    """Numbers with many ties, as one-hot codes have."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, 9)).astype(np.float32)
    x[:, :5] = x[:, :5] > 0
    return x


def test_a_forest_is_walked_as_scikit_learn_does() -> None:
    x, fresh = rows(200, 0), rows(3000, 1)
    y = x @ np.arange(9) + x[:, 0] * x[:, 8]
    model = RandomForestRegressor(30, random_state=0).fit(x, y)
    said = Trees.of(model.estimators_)(fresh)
    for tree, own in zip(said.T, model.estimators_, strict=True):
        assert np.array_equal(tree, own.predict(fresh))
    assert np.allclose(said.mean(axis=1), model.predict(fresh), rtol=1e-12)


def test_boosting_is_walked_as_scikit_learn_does() -> None:
    x, fresh = rows(200, 0), rows(3000, 1)
    y = x @ np.arange(9) + x[:, 0] * x[:, 8]
    model = GradientBoostingRegressor(n_estimators=60, subsample=0.7, random_state=0).fit(x, y)
    said = Trees.of(model.estimators_[:, 0])(fresh)
    assert np.allclose(y.mean() + 0.1 * said.sum(axis=1), model.predict(fresh), rtol=1e-12)


def test_arrays_come_back_and_bad_ones_are_refused() -> None:
    x = rows(50, 0)
    trees = Trees.of(RandomForestRegressor(5, random_state=0).fit(x, x[:, 8]).estimators_)
    again = Trees.of_arrays(trees.arrays(), 9)
    assert np.array_equal(trees(x), again(x))
    with pytest.raises(DataError, match="column"):
        Trees.of_arrays(trees.arrays(), 3)
    inner = int(np.flatnonzero(trees.feature >= 0)[0])
    for name, value in (("left", inner), ("right", 10**6), ("left", -1)):
        arrays = {key: array.copy() for key, array in trees.arrays().items()}
        arrays[name][inner] = value
        with pytest.raises(DataError, match="trees"):
            Trees.of_arrays(arrays, 9)
    with pytest.raises(DataError, match="length"):
        Trees.of_arrays({**trees.arrays(), "value": trees.value[:-1]}, 9)
