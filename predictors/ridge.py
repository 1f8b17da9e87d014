"""`ridge`: Bayesian linear regression on codes and signals, with exact draws of its weights."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from searchlab.predictors.base import FEW, BasePredictor, Folds, State, folds_of, normals_of
from searchlab.predictors.preprocess import Features

__all__ = ["Ridge"]

Floats = NDArray[np.float64]

NOISES = (0.03, 0.1, 0.3, 1.0)  # variances, as shares of what the weights explain
SHARES = (0.0, 0.5, 0.9)  # of the variance that signals explain a priori
_BIAS = 0.1


class Ridge(BasePredictor):
    """Losses as a linear function of the one-hot codes and of standardised signals.

    The weights' prior is normal with one scale for the codes and one for the signals. The noise and
    the signals' share are those with the greatest evidence among `NOISES` and `SHARES`; a share of
    nothing is among them, so signals that say nothing are left aside.
    """

    name: ClassVar[str] = "ridge"
    labels_kind: ClassVar[Literal["standard", "ranks"]] = "standard"
    folds_cheaply: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.noise = NOISES[0]
        self.share = 0.0
        self._centre: Floats = np.empty(0)
        self._scale: Floats = np.empty(0)
        self._mean: Floats = np.empty(0)
        self._root: Floats = np.empty((0, 0))  # lower triangle L of the weights' precision L L^T

    def _learn(self, features: Features, targets: Floats, seed: int) -> None:
        """Grid of evidence, then the posterior of the weights; nothing random in it."""
        raw = features.linear
        self._centre = raw.mean(axis=0)
        widths = (features.x.shape[1], raw.shape[1] - features.x.shape[1])
        spread = raw - self._centre
        lengths = [
            float(np.sqrt((block**2).sum(axis=1).mean())) or 1.0
            for block in (spread[:, : widths[0]], spread[:, widths[0] :])
        ]
        # A column that is constant here has no weight, whatever it is elsewhere.
        alive = (np.ptp(raw, axis=0) > 0).astype(np.float64)
        best = (-np.inf, NOISES[-1], 0.0, 1.0)
        scales = {
            share: self._scales(widths, lengths, share, alive)
            for share in (SHARES if widths[1] else (0.0,))
        }
        for share, noise in itertools.product(scales, NOISES):
            phi = self._phi(spread, scales[share])
            evidence, amplitude = _evidence(phi, targets, noise)
            best = max(best, (evidence, noise, share, amplitude))
        _, self.noise, self.share, amplitude = best
        self._scale = scales[self.share]
        phi = self._phi(spread, self._scale)
        precision = phi.T @ phi / self.noise
        precision[np.diag_indices_from(precision)] += 1.0
        root = np.linalg.cholesky(precision)
        right = phi.T @ targets / self.noise
        self._mean = cho_solve((root, True), right)
        self._root = root / np.sqrt(amplitude)
        self._residual = amplitude * self.noise

    def left_out(self, features: Features, targets: Floats, folds: Folds, seed: int) -> Floats:
        """See the base class; noise and share are those of the fit to all labels."""
        phi, noise = self._features(features), self.noise
        n, p = phi.shape
        whole, out = phi @ phi.T if n <= p else phi.T @ phi, np.empty(n)
        for rows in folds:
            rest = np.setdiff1d(np.arange(n), rows)
            if n <= p:
                inner = whole[np.ix_(rest, rest)]
                inner[np.diag_indices_from(inner)] += noise
                weights = phi[rest].T @ cho_solve(cho_factor(inner), targets[rest])
            else:
                inner = whole - phi[rows].T @ phi[rows]
                inner[np.diag_indices_from(inner)] += noise
                weights = cho_solve(cho_factor(inner), phi[rest].T @ targets[rest])
            said = phi @ weights
            out[rows] = said[rows] - said[rest].mean()
        return out

    def _held_out(self, features: Features, targets: Floats, seed: int) -> Floats:
        """See the base class; where labels are few, choosing noise and share is no small thing."""
        folds = folds_of(len(targets), seed)
        if len(targets) < FEW:
            return super().left_out(features, targets, folds, seed)
        return self.left_out(features, targets, folds, seed)

    @staticmethod
    def _scales(
        widths: tuple[int, int], lengths: list[float], share: float, alive: Floats
    ) -> Floats:
        """What each column is multiplied by, so that prior weights have variance 1."""
        codes = np.full(widths[0], np.sqrt(1 - share) / lengths[0])
        signals = np.full(widths[1], np.sqrt(share) / lengths[1])
        return np.concatenate([codes, signals]) * alive

    @staticmethod
    def _phi(spread: Floats, scale: Floats) -> Floats:
        bias = np.full((len(spread), 1), np.sqrt(_BIAS))
        return np.concatenate([spread * scale, bias], axis=1)

    def _features(self, features: Features) -> Floats:
        return self._phi(features.linear - self._centre, self._scale)

    def _scores(self, features: Features) -> tuple[Floats, Floats]:
        phi = self._features(features)
        # sd of a loss: of the weights, and of what a linear function leaves unexplained.
        solved = solve_triangular(self._root, phi.T, lower=True)
        return phi @ self._mean, np.sqrt((solved**2).sum(axis=0) + self._residual)

    def _draw(self, features: Features, u: Floats) -> Floats:
        """Exact draws of the weights, (d, n): functions, not noise at each candidate."""
        normals = normals_of(u, len(self._mean))
        weights = self._mean[:, None] + solve_triangular(
            self._root, normals.T, lower=True, trans="T"
        )
        out: Floats = (self._features(features) @ weights).T
        return out

    def _state(self) -> State:
        config = {"noise": self.noise, "share": self.share, "residual": self._residual}
        return config, {
            "centre": self._centre,
            "scale": self._scale,
            "mean": self._mean,
            "root": self._root,
        }

    def _restore(self, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        self.noise, self.share = float(config["noise"]), float(config["share"])
        self._residual = float(config["residual"])
        self._centre, self._scale = arrays["centre"], arrays["scale"]
        self._mean, self._root = arrays["mean"], arrays["root"]


def _evidence(phi: Floats, targets: Floats, noise: float) -> tuple[float, float]:
    """Log evidence up to a constant, at the best amplitude; and that amplitude (a variance).

    The model is targets ~ N(0, amplitude (phi phi^T + noise I)); whichever of the two Gram matrices
    is smaller is factorised. The amplitude has an inverse gamma prior worth two labels of variance
    1, so that a single label is defined too.
    """
    n, p = phi.shape
    if n <= p:
        factor = cho_factor(phi @ phi.T + noise * np.eye(n), lower=True)
        quadratic = float(targets @ cho_solve(factor, targets))
        logdet = 2 * float(np.log(np.diag(factor[0])).sum())
    else:
        factor = cho_factor(phi.T @ phi + noise * np.eye(p), lower=True)
        right = phi.T @ targets
        quadratic = float(targets @ targets - right @ cho_solve(factor, right)) / noise
        logdet = 2 * float(np.log(np.diag(factor[0])).sum()) + (n - p) * float(np.log(noise))
    amplitude = (max(quadratic, 0.0) + 2.0) / (n + 2.0)
    return -0.5 * (logdet + (n + 2) * float(np.log(amplitude))), amplitude
