"""`local`: a line in the signals, and a Gaussian process on the codes for what the line leaves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from searchlab.predictors._latest import Latest
from searchlab.predictors.base import BasePredictor, Folds, State, normals_of
from searchlab.predictors.preprocess import Features, Inputs
from searchlab.space import Space

__all__ = ["Local"]

Floats = NDArray[np.float64]

MOST = 250  # labels that are kept, the best
TUNED = 120  # of them, that choose the scales
NUMBERS = (10.0, 40.0, 160.0)  # squared distance of numbers, in standard deviations of good ones
LABELS = (3.0, 12.0)  # elements that differ, over two
SHARES = (0.02, 0.15, 0.6)  # variance of what the line leaves; the targets' own is about 1
NOISES = (0.002, 0.02, 0.15)
LEVEL, SLOPE = 100.0, 1.0  # prior variances of the line
_JITTER = 1e-8


class Local(BasePredictor):
    """For signals that are nearly the loss: how far they lead astray is alike among relatives.

    A candidate's signals say where on a line it lies; its distance from the line is drawn from a
    Gaussian process on its codes, so that a line of descent for which the signals are too good is
    found out after a few labels. Of the labels the best `MOST` are kept. Scales come from a small
    grid, by the density of each label given the others. It is its data.
    """

    name: ClassVar[str] = "local"
    keeps_data: ClassVar[bool] = True
    folds_cheaply: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._numeric: NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        self._scales: Floats = np.array([NUMBERS[1], LABELS[1], SHARES[1], NOISES[1]])
        self._width: Floats = np.empty(0)
        self._x: Floats = np.empty((0, 0))
        self._line: Floats = np.empty((0, 0))
        self._weights: Floats = np.empty(0)
        self._inverse: Floats = np.empty((0, 0))
        self._latest: Latest[tuple[Floats, Floats]] = Latest()

    def _prepare(self, inputs: Inputs, pool: Features | None) -> None:
        self._numeric = _numeric(inputs.space)

    def _learn(self, features: Features, targets: Floats, seed: int) -> None:
        self._latest = Latest()
        order = np.argsort(targets, kind="stable")[:MOST]
        features, targets = features.take(order), targets[order]
        third = features.x[: max(20, len(order) // 3)]
        self._width = np.where(self._numeric, np.maximum(third.std(axis=0), 1e-3), 1.0)
        self._x, self._line = features.x / self._width, features.signals
        self._tune(targets)
        covariance = self._prior(self._x, self._line)
        covariance[np.diag_indices_from(covariance)] += self._scales[3] + _JITTER
        root = cho_factor(covariance, lower=True)
        self._weights = cho_solve(root, targets)
        self._inverse = cho_solve(root, np.eye(len(targets)))

    def _tune(self, targets: Floats) -> None:
        """The scales of the grid that give each label the highest density given the others."""
        some = slice(0, TUNED)
        x, line, targets = self._x[some], self._line[some], targets[some]
        best = np.inf
        numbers, labels = self._apart(x, x)
        straight = LEVEL + SLOPE * line @ line.T
        for number, label in itertools.product(NUMBERS, LABELS):
            bent = np.exp(-np.sqrt(numbers / number + labels / label))
            for share, noise in itertools.product(SHARES, NOISES):
                covariance = straight + share * bent
                covariance[np.diag_indices_from(covariance)] += noise + _JITTER
                inverse = cho_solve(cho_factor(covariance, lower=True), np.eye(len(targets)))
                variance = 1.0 / np.diag(inverse)
                off = (inverse @ targets) * variance
                score = float((np.log(variance) + off**2 / variance).mean())
                if score < best:
                    best, self._scales = score, np.array([number, label, share, noise])

    def _apart(self, one: Floats, other: Floats) -> tuple[Floats, Floats]:
        """Squared distances (n, m) in numbers and in labels."""
        kinds = (self._numeric, ~self._numeric)
        numbers, labels = (_squared(one[:, kind], other[:, kind]) for kind in kinds)
        return numbers, labels

    def _prior(self, x: Floats, line: Floats) -> Floats:
        """Covariances (n, m) with the kept labels, without noise."""
        number, label, share, _ = self._scales
        numbers, labels = self._apart(x, self._x)
        bent: Floats = share * np.exp(-np.sqrt(numbers / number + labels / label))
        return LEVEL + SLOPE * line @ self._line.T + bent

    def _latent(self, features: Features) -> tuple[Floats, Floats]:
        """Means and standard deviations without the labels' noise; not to be changed."""
        return self._latest.of(features, lambda: self._posterior(features))

    def _posterior(self, features: Features) -> tuple[Floats, Floats]:
        line = features.signals
        cross = self._prior(features.x / self._width, line)
        own = LEVEL + SLOPE * (line**2).sum(axis=1) + self._scales[2]
        left = np.maximum(own - ((cross @ self._inverse) * cross).sum(axis=1), 0.0)
        return cross @ self._weights, np.sqrt(left)

    def _scores(self, features: Features) -> tuple[Floats, Floats]:
        mean, sd = self._latent(features)
        return mean, np.sqrt(sd**2 + self._scales[3])

    def _draw(self, features: Features, u: Floats) -> Floats:
        """Independent at each candidate, without the labels' noise."""
        mean, sd = self._latent(features)
        return mean + sd * normals_of(u, len(features))

    def left_out(self, features: Features, targets: Floats, folds: Folds, seed: int) -> Floats:
        """See the base class; the scales are those of the fit to all labels."""
        if not len(self._weights):
            return super().left_out(features, targets, folds, seed)
        x, line = features.x / self._width, features.signals
        kept = self._x, self._line
        self._x, self._line = x, line
        covariance = self._prior(x, line)
        self._x, self._line = kept
        noise, out = self._scales[3] + _JITTER, np.empty(len(targets))
        for rows in folds:
            rest = np.setdiff1d(np.arange(len(targets)), rows)
            inner = covariance[np.ix_(rest, rest)]
            inner[np.diag_indices_from(inner)] += noise
            weights = cho_solve(cho_factor(inner, lower=True), targets[rest])
            out[rows] = covariance[np.ix_(rows, rest)] @ weights
            out[rows] -= (covariance[np.ix_(rest, rest)] @ weights).mean()
        return out

    def _state(self) -> State:
        return {}, {
            "numeric": self._numeric,
            "scales": self._scales,
            "width": self._width,
            "x": self._x,
            "line": self._line,
            "weights": self._weights,
            "inverse": self._inverse,
        }

    def _restore(self, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        self._numeric, self._scales = arrays["numeric"].astype(np.bool_), arrays["scales"]
        self._width, self._x, self._line = arrays["width"], arrays["x"], arrays["line"]
        self._weights, self._inverse = arrays["weights"], arrays["inverse"]


def _squared(one: Floats, other: Floats) -> Floats:
    lengths = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)
    out: Floats = np.maximum(lengths - 2 * one @ other.T, 0.0)
    return out


def _numeric(space: Space) -> NDArray[np.bool_]:
    """Which columns of the codes are numbers: those of elements with a single column."""
    columns = [
        np.full(variable.code_width, variable.code_width <= variable.size)
        for variable in space.variables.values()
    ]
    return np.concatenate(columns)
