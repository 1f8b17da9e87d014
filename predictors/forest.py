"""`rf`: a random forest of scikit-learn, kept as node arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab.predictors.base import BasePredictor, Folds, State, normals_of
from searchlab.predictors.label_numbers import number_columns
from searchlab.predictors.preprocess import Features, Inputs, Labels
from searchlab.predictors.trees import Trees

__all__ = ["Forest"]

Floats = NDArray[np.float64]

SHARE = 0.33


class Forest(BasePredictor):
    """A random forest on codes, counts, signals and flags, and on the numbers of numeric labels.

    The spread over the trees and the error of those that did not see a label make the standard
    deviation. A Thompson draw takes one tree's opinion of every candidate, with that error.

    Args:
        trees: how many.
        share: of the columns, from which each split is chosen; in (0, 1].
        numbers: (code_width, k), see `number_columns`; None = those of the space of the fit.
        labels: the trees learn the losses that targets stand for, so that what is far worse counts
            more, and their means become targets again; None = they learn the targets.
    """

    name: ClassVar[str] = "rf"
    folds_cheaply: ClassVar[bool] = True

    def __init__(
        self,
        *,
        trees: int = 200,
        share: float = SHARE,
        numbers: Floats | None = None,
        labels: Labels | None = None,
    ) -> None:
        super().__init__()
        self.trees, self.share, self.numbers = trees, share, numbers
        self._knots: tuple[Floats, Floats] | None = None
        self._of = labels
        self._trees: Trees | None = None
        self._columns = 0
        self._error = 1.0
        self._unseen: Floats = np.empty(0)

    def _prepare(self, inputs: Inputs, pool: Features | None) -> None:
        self.numbers = number_columns(inputs.space)

    def _columns_of(self, features: Features) -> Floats:
        if self.numbers is None or not self.numbers.shape[1]:
            return features.all
        return np.concatenate([features.all, features.x @ self.numbers], axis=1)

    def _learn(self, features: Features, targets: Floats, seed: int) -> None:
        from sklearn.ensemble import RandomForestRegressor

        x = self._columns_of(features).astype(np.float32)
        model = RandomForestRegressor(
            self.trees,
            max_features=self.share,
            min_samples_leaf=1 if len(x) < 1000 else 2,
            random_state=seed % 2**32,
            n_jobs=1,
        ).fit(x, targets if self._of is None else self._of.values(targets))
        self._trees, self._columns = Trees.of(model.estimators_), x.shape[1]
        self._knots = None if self._of is None else (self._of.knots, self._of.scores)
        self._unseen = self._targets(_unseen(model.estimators_samples_, self._trees(x)))
        there = ~np.isnan(self._unseen)
        # Two labels of variance 1, for the sake of few labels.
        squares = float(((self._unseen - targets)[there] ** 2).sum())
        self._error = float(np.sqrt((squares + 2.0) / (there.sum() + 2.0)))

    def _targets(self, said: Floats) -> Floats:
        """What trees say, as targets."""
        return said if self._knots is None else np.interp(said, *self._knots)

    def left_out(self, features: Features, targets: Floats, folds: Folds, seed: int) -> Floats:
        """See the base class; here each label by the trees that did not see it, without refits."""
        n = len(targets)
        others = (targets.sum() - targets) / max(1, n - 1)
        return np.where(np.isnan(self._unseen), 0.0, self._unseen - others)

    def _scores(self, features: Features) -> tuple[Floats, Floats]:
        said = self._said(features)
        spread = self._targets(said).var(axis=1)
        return self._targets(said.mean(axis=1)), np.sqrt(spread / 4 + self._error**2)

    def _said(self, features: Features) -> Floats:
        assert self._trees is not None
        return self._trees(self._columns_of(features))

    def _draw(self, features: Features, u: Floats) -> Floats:
        said = self._said(features)
        which = (np.asarray(u)[:, 0] * said.shape[1]).astype(np.int64)
        normals = normals_of(u, len(features))
        middle = self._targets(said.mean(axis=1))
        moved = self._targets(said[:, which].T) - middle
        out: Floats = middle + moved / 2 + self._error * normals
        return out

    def _state(self) -> State:
        assert self._trees is not None
        config = {"columns": self._columns, "error": self._error, "trees": self.trees}
        arrays: dict[str, NDArray[Any]] = self._trees.arrays()
        if self.numbers is not None and self.numbers.shape[1]:
            arrays["numbers"] = self.numbers
        if self._knots is not None:
            arrays["knots"], arrays["scores"] = self._knots
        return config, arrays

    def _restore(self, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        self.trees, self._columns = int(config["trees"]), int(config["columns"])
        self._error, self.numbers = float(config["error"]), arrays.get("numbers")
        self._knots = (arrays["knots"], arrays["scores"]) if "knots" in arrays else None
        self._trees = Trees.of_arrays(arrays, self._columns)


def _unseen(samples: list[Any], said: Floats) -> Floats:
    """What the trees that did not see a label say of it, (n,); NaN where all did."""
    unseen = np.ones(said.shape, dtype=bool)
    for tree, rows in enumerate(samples):
        unseen[rows, tree] = False
    counts = unseen.sum(axis=1)
    total = (said * unseen).sum(axis=1)
    return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)
