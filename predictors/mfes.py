"""`mfes`: a surrogate for each fidelity, weighed by how far it preserves the order of the truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError
from searchlab.predictor import Table
from searchlab.predictors.base import LEAST, BasePredictor, State, part_of
from searchlab.predictors.forest import Forest
from searchlab.predictors.preprocess import Features, Inputs, Labels, usable_losses

__all__ = ["MultiFidelity"]

Floats = NDArray[np.float64]

ROWS = 1000  # candidates that a cheap fidelity's surrogate learns from at most
POWER = 3
BELIEF = 0.3  # tau of the truth's own surrogate while nothing is left out


class MultiFidelity(BasePredictor):
    """Forests that foretell the signals and the losses from codes alone, and their weighted mean.

    Every signal is a cheap fidelity: its forest learns from all candidates where it is there, of
    the pool too. Weights follow the third power of Kendall's tau with the losses: of a signal's
    forest as it is, of the losses' own forest by the trees that did not see a label. Candidates to
    be predicted need no signals.

    Source: MFES-HB, arXiv 2012.03011. Where we differ: the share of pairs in order is replaced by
    tau, so that what orders by chance counts nothing; a signal that orders backwards is turned
    round; and the scale of predictions and intervals is that of labels that were left out.

    Args:
        trees: of each forest.

    Raises:
        ConfigError: fewer than two trees.
    """

    name: ClassVar[str] = "mfes"
    folds_cheaply: ClassVar[bool] = True

    def __init__(self, *, trees: int = 60) -> None:
        super().__init__()
        if trees < 2:
            raise ConfigError(f"trees {trees}; allowed: 2 or more")
        self.trees = trees
        self.surrogates: list[Forest] = []  # of the signals, and of the losses
        self.weights: Floats = np.empty(0)  # negative = turned round
        self._slope, self._scale = 1.0, 1.0
        self._unseen: Floats | None = None
        self._cheap: list[tuple[Features, Floats]] = []

    def fit(self, table: Table, losses: Floats, *, seed: int, pool: Table | None = None) -> None:
        """See `Predictor.fit`."""
        inputs = Inputs(table, pool)
        labels = Labels(usable_losses(losses, len(table)), self.labels_kind)
        tables = [table] if pool is None else [table, pool]
        features = [inputs(one) for one in tables]
        self._cheap = []
        for column, at in enumerate(inputs.rulers):
            parts = []
            for one, whole in zip(tables, features, strict=True):
                there = np.flatnonzero(~np.isnan(one.signals[:, at]))
                parts.append((_codes(whole.take(there)), whole.scores[there, column]))
            self._cheap.append(_some(parts))
        self._learn(_codes(features[0]), labels.targets, seed)
        self._fit_to = _codes(features[0]), labels.targets, seed
        self._inputs, self._labels, self.n_labels = inputs, labels, len(table)

    def _learn(self, features: Features, targets: Floats, seed: int) -> None:
        self.surrogates = []
        for shown, scores in [*self._cheap, (features, targets)]:
            forest = Forest(trees=self.trees)
            forest._learn(shown, scores, seed)
            self.surrogates.append(forest)
        self._cheap = []
        n = len(targets)
        said = self._said(features)[0]
        own = self.surrogates[-1].left_out(features, targets, [], seed)
        said[:, -1] = own
        self.weights = np.zeros(len(self.surrogates))
        self.weights[-1] = 1.0
        self._slope, self._scale, self._unseen = 1.0, 1.0, None
        if n < LEAST or not np.ptp(targets):
            return
        taus = np.array([_tau(column, targets) for column in said.T])
        # The truth's own surrogate knows little at first, and less by the trees that left it out.
        taus[-1] = max(taus[-1], BELIEF)
        raw = np.sign(taus) * np.abs(taus) ** POWER
        self.weights = raw / np.abs(raw).sum()
        joined = said @ self.weights
        size = float(joined @ joined)
        # Two labels' worth of belief that the scale is right.
        self._slope = max(1e-3, float(joined @ targets + 2) / (size + 2))
        self._unseen = self._slope * joined
        _, sd = self._scores(features)
        ratio = (((self._unseen - targets) / sd) ** 2).sum()
        self._scale = float(np.sqrt((ratio + 2.0) / (n + 2.0)))

    def _held_out(self, features: Features, targets: Floats, seed: int) -> Floats | None:
        return self._unseen

    def _said(self, features: Features) -> tuple[Floats, Floats]:
        """Means and standard deviations of every surrogate, (n, k + 1) each."""
        codes = _codes(features)
        said = [forest._scores(codes) for forest in self.surrogates]
        return np.stack([m for m, _ in said], axis=1), np.stack([sd for _, sd in said], axis=1)

    def _scores(self, features: Features) -> tuple[Floats, Floats]:
        mean, sd = self._said(features)
        spread = np.sqrt((sd**2) @ (self.weights**2))
        return self._slope * (mean @ self.weights), self._scale * self._slope * spread

    def _state(self) -> State:
        config: dict[str, Any] = {
            "surrogates": len(self.surrogates),
            "trees": self.trees,
            "weights": self.weights.tolist(),
            "slope": self._slope,
            "scale": self._scale,
        }
        arrays: dict[str, NDArray[Any]] = {}
        for at, forest in enumerate(self.surrogates):
            config[f"forest{at}"], named = forest._state()
            arrays |= {f"forest{at}/{name}": array for name, array in named.items()}
        return config, arrays

    def _restore(self, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        self.weights = np.array(config["weights"], dtype=np.float64)
        self._slope, self._scale = float(config["slope"]), float(config["scale"])
        self.trees = int(config["trees"])
        self.surrogates = []
        for at in range(int(config["surrogates"])):
            forest = Forest(trees=self.trees)
            forest._restore(config[f"forest{at}"], part_of(arrays, f"forest{at}"))
            self.surrogates.append(forest)


def _codes(features: Features) -> Features:
    """The features without signals."""
    none = np.empty((len(features), 0))
    return Features(features.x, none, none, features.means, features.elements)


def _some(parts: list[tuple[Features, Floats]]) -> tuple[Features, Floats]:
    """Features and scores of several tables, `ROWS` at most; those of the first come first."""
    x, means = (
        np.concatenate([getattr(features, name) for features, _ in parts])[:ROWS]
        for name in ("x", "means")
    )
    none = np.empty((len(x), 0))
    scores = np.concatenate([one for _, one in parts])[:ROWS]
    return Features(x, none, none, means, parts[0][0].elements), scores


def _tau(said: Floats, targets: Floats) -> float:
    """Kendall's tau-b; 0 where nothing differs."""
    from scipy.stats import kendalltau

    found = float(kendalltau(said, targets).statistic)
    return found if np.isfinite(found) else 0.0
