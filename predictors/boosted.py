"""`gbdt`: gradient boosting of scikit-learn, kept as node arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab.predictors.base import BasePredictor, Folds, State, folds_of
from searchlab.predictors.preprocess import Features
from searchlab.predictors.trees import Trees

__all__ = ["Boosted"]

Floats = NDArray[np.float64]

JUDGED = 10  # labels from which on a fit measures its error


class Boosted(BasePredictor):
    """Boosted regression trees on codes, counts, signals and flags.

    The standard deviation is the error on labels that were left out in folds, the same for all
    candidates.

    Args:
        trees: how many.
        rate: learning rate.
        judged: whether a fit measures its error; else it is that of a random guess until
            `left_out` is called.
    """

    name: ClassVar[str] = "gbdt"
    folds_cheaply: ClassVar[bool] = True

    def __init__(self, *, trees: int = 300, rate: float = 0.05, judged: bool = True) -> None:
        super().__init__()
        self.trees, self.rate, self.judged = trees, rate, judged
        self._trees: Trees | None = None
        self._columns = 0
        self._start = 0.0
        self._error = 1.0
        self._said: Floats | None = None

    def _learn(self, features: Features, targets: Floats, seed: int) -> None:
        x = features.all.astype(np.float32)
        self._error, self._said = 1.0, None
        if self.judged and len(x) >= JUDGED:
            self.left_out(features, targets, folds_of(len(x), seed), seed)
        self._start, self._trees = self._fitted(x, targets, seed)
        self._columns = x.shape[1]

    def left_out(self, features: Features, targets: Floats, folds: Folds, seed: int) -> Floats:
        """See the base class; the error becomes the standard deviation of predictions."""
        x = features.all.astype(np.float32)
        out, centres = np.empty(len(x)), np.empty(len(x))
        for rows in folds:
            rest = np.setdiff1d(np.arange(len(x)), rows)
            start, trees = self._fitted(x[rest], targets[rest], seed)
            out[rows] = start + self.rate * trees(x[rows]).sum(axis=1)
            centres[rows] = start
        # Two labels of variance 1, for the sake of few labels.
        squares = float(((out - targets) ** 2).sum())
        self._error = float(np.sqrt((squares + 2.0) / (len(x) + 2.0)))
        self._said = out - centres
        return self._said

    def _held_out(self, features: Features, targets: Floats, seed: int) -> Floats | None:
        return self._said

    def _fitted(self, x: NDArray[np.float32], targets: Floats, seed: int) -> tuple[float, Trees]:
        """Where boosting starts, and its trees before they are multiplied by the rate."""
        from sklearn.ensemble import GradientBoostingRegressor

        model = GradientBoostingRegressor(
            n_estimators=self.trees,
            learning_rate=self.rate,
            max_depth=4,
            subsample=0.6 if len(x) >= 10 else 1.0,
            max_features=0.3,
            min_samples_leaf=3 if len(x) >= 10 else 1,
            random_state=seed % 2**32,
        ).fit(x, targets)
        return float(targets.mean()), Trees.of(model.estimators_[:, 0])

    def _scores(self, features: Features) -> tuple[Floats, Floats]:
        assert self._trees is not None
        said = self._trees(features.all)
        mean = self._start + self.rate * said.sum(axis=1)
        return mean, np.full(len(features), self._error)

    def _state(self) -> State:
        assert self._trees is not None
        config = {
            "columns": self._columns,
            "error": self._error,
            "rate": self.rate,
            "start": self._start,
            "trees": self.trees,
        }
        return config, self._trees.arrays()

    def _restore(self, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        self.trees, self.rate = int(config["trees"]), float(config["rate"])
        self._columns, self._start = int(config["columns"]), float(config["start"])
        self._error = float(config["error"])
        self._trees = Trees.of_arrays(arrays, self._columns)
