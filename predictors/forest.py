"""`rf`: a random forest of scikit-learn, kept as node arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab.predictors.base import BasePredictor, Folds, State, normals_of
from searchlab.predictors.preprocess import Features
from searchlab.predictors.trees import Trees

__all__ = ["Forest"]

Floats = NDArray[np.float64]


class Forest(BasePredictor):
    """A random forest on codes, counts, signals and flags.

    The spread over the trees and the error of those that did not see a label make the standard
    deviation. A Thompson draw takes one tree's opinion of every candidate, with that error.

    Args:
        trees: how many.
    """

    name: ClassVar[str] = "rf"
    folds_cheaply: ClassVar[bool] = True

    def __init__(self, *, trees: int = 200) -> None:
        super().__init__()
        self.trees = trees
        self._trees: Trees | None = None
        self._columns = 0
        self._error = 1.0
        self._unseen: Floats = np.empty(0)

    def _learn(self, features: Features, targets: Floats, seed: int) -> None:
        from sklearn.ensemble import RandomForestRegressor

        x = features.all.astype(np.float32)
        model = RandomForestRegressor(
            self.trees,
            max_features=0.33,
            min_samples_leaf=1 if len(x) < 1000 else 2,
            random_state=seed % 2**32,
            n_jobs=1,
        ).fit(x, targets)
        self._trees, self._columns = Trees.of(model.estimators_), x.shape[1]
        self._unseen = _unseen(model.estimators_samples_, self._trees(x))
        there = ~np.isnan(self._unseen)
        # Two labels of variance 1, for the sake of few labels.
        squares = float(((self._unseen - targets)[there] ** 2).sum())
        self._error = float(np.sqrt((squares + 2.0) / (there.sum() + 2.0)))

    def left_out(self, features: Features, targets: Floats, folds: Folds, seed: int) -> Floats:
        """See the base class; here each label by the trees that did not see it, without refits."""
        n = len(targets)
        others = (targets.sum() - targets) / max(1, n - 1)
        return np.where(np.isnan(self._unseen), 0.0, self._unseen - others)

    def _scores(self, features: Features) -> tuple[Floats, Floats]:
        said = self._said(features)
        return said.mean(axis=1), np.sqrt(said.var(axis=1) / 4 + self._error**2)

    def _said(self, features: Features) -> Floats:
        assert self._trees is not None
        return self._trees(features.all)

    def _draw(self, features: Features, u: Floats) -> Floats:
        said = self._said(features)
        which = (np.asarray(u)[:, 0] * said.shape[1]).astype(np.int64)
        normals = normals_of(u, len(features))
        middle = said.mean(axis=1)
        out: Floats = middle + (said[:, which].T - middle) / 2 + self._error * normals
        return out

    def _state(self) -> State:
        assert self._trees is not None
        config = {"columns": self._columns, "error": self._error, "trees": self.trees}
        return config, self._trees.arrays()

    def _restore(self, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        self.trees, self._columns = int(config["trees"]), int(config["columns"])
        self._error = float(config["error"])
        self._trees = Trees.of_arrays(arrays, self._columns)


def _unseen(samples: list[Any], said: Floats) -> Floats:
    """What the trees that did not see a label say of it, (n,); NaN where all did."""
    unseen = np.ones(said.shape, dtype=bool)
    for tree, rows in enumerate(samples):
        unseen[rows, tree] = False
    counts = unseen.sum(axis=1)
    total = (said * unseen).sum(axis=1)
    return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)
