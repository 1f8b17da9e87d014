"""What the Gaussian processes share: the posterior at fitted numbers, labels left out, draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from searchlab.predictors._latest import Latest
from searchlab.predictors.base import BasePredictor, Folds, State, normals_of
from searchlab.predictors.preprocess import Features
from searchlab.uniforms import derived

__all__ = ["FITTED", "JITTER", "MOST", "Process"]

Floats = NDArray[np.float64]

MOST = 1500  # labels that a process keeps
FITTED = 300  # labels that its numbers are fitted on
JITTER = 1e-8


class Process(BasePredictor):
    """A Gaussian process; a subclass fits the logs of its numbers, the noise's last, and has a
    kernel of them.

    At most `MOST` labels are kept, the better half and others at random. It is its data: a folder
    holds the candidates it learnt from.

    Thompson draws share one drawn function at the labels' places, from which the values between
    follow; what the labels leave open is drawn independently.
    """

    keeps_data: ClassVar[bool] = True
    folds_cheaply: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._log: Floats = np.empty(0)
        self._seen: Features | None = None
        self._weights: Floats = np.empty(0)
        self._root: NDArray[Any] = np.empty((0, 0))
        self._function: tuple[NDArray[Any], NDArray[Any]] | None = None
        self._latest: Latest[Floats] = Latest()

    # -- what a subclass writes -------------------------------------------------------------

    def _fitted(self, features: Features, targets: Floats, some: NDArray[np.int64]) -> Floats:
        """The logs of all numbers, fitted to the rows `some` of the labels that are kept."""
        raise NotImplementedError

    def _covariance(self, one: Features, other: Features) -> Floats:
        """Covariances (n, m) without noise."""
        raise NotImplementedError

    def _variance(self, features: Features) -> Floats:
        """Prior variance of each candidate, (n,)."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------

    def _learn(self, features: Features, targets: Floats, seed: int) -> None:
        generator = np.random.default_rng(seed)
        if len(targets) > MOST:
            order = np.argsort(targets, kind="stable")
            others = generator.permutation(order[MOST // 2 :])[: MOST - MOST // 2]
            rows = np.sort(np.concatenate([order[: MOST // 2], others]))
            features, targets = features.take(rows), targets[rows]
        some = np.sort(generator.permutation(len(targets))[:FITTED])
        self._log, self._seen = self._fitted(features, targets, some), features
        self._latest = Latest()
        noisy = self._covariance(features, features).copy()
        noisy[np.diag_indices_from(noisy)] += np.exp(self._log[-1]) + JITTER
        self._root = np.linalg.cholesky(noisy)
        self._weights = cho_solve((self._root, True), targets)
        self._function = None

    def left_out(self, features: Features, targets: Floats, folds: Folds, seed: int) -> Floats:
        """See the base class; the kernel's numbers are those of the fit to all labels."""
        if self._seen is None or len(self._seen) != len(targets):
            return super().left_out(features, targets, folds, seed)
        covariance = self._covariance(features, features)
        noise, out = np.exp(self._log[-1]) + JITTER, np.empty(len(targets))
        for rows in folds:
            rest = np.setdiff1d(np.arange(len(targets)), rows)
            inner = covariance[np.ix_(rest, rest)]
            inner[np.diag_indices_from(inner)] += noise
            weights = cho_solve(cho_factor(inner, lower=True), targets[rest])
            centre = (covariance[np.ix_(rest, rest)] @ weights).mean()
            out[rows] = covariance[np.ix_(rows, rest)] @ weights - centre
        return out

    def _cross(self, features: Features) -> Floats:
        """Covariances (n, m) with the kept labels; not to be changed."""
        seen = self._seen
        assert seen is not None
        return self._latest.of(features, lambda: self._covariance(features, seen))

    def _scores(self, features: Features) -> tuple[Floats, Floats]:
        cross = self._cross(features)
        solved = solve_triangular(self._root, cross.T, lower=True, check_finite=False)
        left = np.maximum(self._variance(features) - (solved**2).sum(axis=0), 0.0)
        return cross @ self._weights, np.sqrt(left + np.exp(self._log[-1]))

    def _draw(self, features: Features, u: Floats) -> Floats:
        assert self._seen is not None
        function = self._function
        if function is None:
            covariance = self._covariance(self._seen, self._seen)
            solved = solve_triangular(self._root, covariance, lower=True)
            posterior = covariance - solved.T @ solved
            jitter = 1e-6 * float(np.diag(covariance).mean())
            at = np.diag_indices_from(covariance)
            posterior[at] += jitter
            covariance[at] += jitter
            function = self._function = (
                np.linalg.cholesky(posterior),
                np.linalg.cholesky(covariance),
            )
        spread, prior = function
        cross = self._cross(features)
        solved = solve_triangular(prior, cross.T, lower=True, check_finite=False)
        open_ = np.maximum(self._variance(features) - (solved**2).sum(axis=0), 0.0)
        at_labels = spread @ normals_of(u, len(spread)).T
        moved = solved.T @ solve_triangular(prior, at_labels, lower=True)
        own = normals_of(derived(np.asarray(u), 1, 2), len(features))
        out: Floats = cross @ self._weights + moved.T + np.sqrt(open_) * own
        return out

    def _state(self) -> State:
        assert self._seen is not None
        seen = self._seen
        return {"elements": seen.elements}, {
            "log": self._log,
            "x": seen.x,
            "scores": seen.scores,
            "missing": seen.missing,
            "means": seen.means,
            "weights": self._weights,
            "root": self._root,
        }

    def _restore(self, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        self._log, self._weights, self._root = arrays["log"], arrays["weights"], arrays["root"]
        self._seen = Features(
            arrays["x"],
            arrays["scores"],
            arrays["missing"],
            arrays["means"],
            float(config["elements"]),
        )
        self._function = None
