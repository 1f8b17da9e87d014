"""`gp`: a Gaussian process on signals, codes and shares of labels, with few fitted numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize

from searchlab.predictors.base import BasePredictor, Folds, State, normals_of
from searchlab.predictors.preprocess import Features
from searchlab.uniforms import derived

__all__ = ["GaussianProcess"]

Floats = NDArray[np.float64]

MOST = 1500  # labels that the process keeps
FITTED = 300  # labels that its numbers are fitted on
_JITTER = 1e-8

# Median and sd of the log of each number, a priori.
_PRIOR = {
    "signals": (0.5, 0.5),  # variance explained by the signals alone
    "length": (1.0, 0.5),  # of the signals' kernel, in mean squared normal scores
    "codes": (0.3, 0.5),
    "decay": (2.0, 0.5),  # of the codes' kernel, per share of elements that differ
    "both": (0.3, 0.5),
    "linear": (0.3, 0.5),
    "shares": (0.3, 0.5),
    "narrow": (5.0, 0.5),  # of the shares' kernel
    "noise": (0.3, 0.75),
}
_NAMES = tuple(_PRIOR)
_MEDIAN = np.log([median for median, _ in _PRIOR.values()])
_WIDTH = np.array([width for _, width in _PRIOR.values()])


@dataclass(frozen=True)
class _Distances:
    """Squared distances (n, m) between two sets of candidates, each in its part's unit."""

    signals: Floats | None  # None = there are none
    products: Floats | None
    codes: Floats
    shares: Floats | None

    @staticmethod
    def of(one: Features, other: Features) -> _Distances:
        s = one.signals.shape[1]
        elements = one.elements
        return _Distances(
            _squared(one.signals, other.signals) / s if s else None,
            one.signals @ other.signals.T / s if s else None,
            _squared(one.x, other.x) / (2 * elements),
            _squared(one.means, other.means) if one.means.shape[1] else None,
        )

    def take(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> _Distances:
        parts = (self.signals, self.products, self.codes, self.shares)
        at = np.ix_(rows, columns)
        signals, products, codes, shares = (None if p is None else p[at] for p in parts)
        assert codes is not None
        return _Distances(signals, products, codes, shares)


def _squared(one: Floats, other: Floats) -> Floats:
    lengths = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)
    out: Floats = np.maximum(lengths - 2 * one @ other.T, 0.0)
    return out


def _kernel(
    log: Floats, d: _Distances, *, slopes: bool = False
) -> tuple[Floats, dict[str, Floats]]:
    """Covariances (n, m) without noise, and their derivatives by the log of each number.

    Matern 5/2 on the signals, exponential in the share of elements that differ, their product, a
    linear part in the signals, and squared exponential in the shares of labels.
    """
    p = dict(zip(_NAMES, np.exp(log), strict=True))
    codes = np.exp(-p["decay"] * d.codes)
    out = p["codes"] * codes
    slope: dict[str, Floats] = {"codes": out}
    by_codes = np.full(codes.shape, p["codes"])
    if d.signals is not None and d.products is not None:
        r = np.sqrt(5 * d.signals) / p["length"]
        fall = np.exp(-r)
        matern = (1 + r + r * r / 3) * fall
        alone, both = p["signals"] * matern, p["both"] * matern * codes
        linear = p["linear"] * d.products
        out = out + alone + both + linear
        if slopes:
            by_length = r * r * (1 + r) / 3 * fall
            by_codes = by_codes + p["both"] * matern
            slope |= {"signals": alone, "both": both, "linear": linear}
            slope["length"] = by_length * (p["signals"] + p["both"] * codes)
    if slopes:
        slope["decay"] = -p["decay"] * d.codes * codes * by_codes
    if d.shares is not None:
        shares = p["shares"] * np.exp(-p["narrow"] * d.shares)
        out = out + shares
        if slopes:
            slope |= {"shares": shares, "narrow": -p["narrow"] * d.shares * shares}
    return out, slope


def _variance(log: Floats, features: Features) -> Floats:
    """Prior variance of each candidate, (n,)."""
    p = dict(zip(_NAMES, np.exp(log), strict=True))
    out = np.full(len(features), p["codes"])
    s = features.signals
    if s.shape[1]:
        out += p["signals"] + p["both"] + p["linear"] * (s**2).mean(axis=1)
    return out + p["shares"] if features.means.shape[1] else out


def _misfit(log: Floats, d: _Distances, targets: Floats) -> tuple[float, Floats]:
    """Negative log of evidence times prior, and its gradient."""
    covariance, slope = _kernel(log, d, slopes=True)
    noise = np.exp(log[-1])
    slope["noise"] = np.zeros(0)
    covariance = covariance.copy()
    covariance[np.diag_indices_from(covariance)] += noise + _JITTER
    root = cho_factor(covariance, lower=True)
    inverse = cho_solve(root, np.eye(len(targets)))
    weights = inverse @ targets
    away = (log - _MEDIAN) / _WIDTH
    value = 0.5 * targets @ weights + np.log(np.diag(root[0])).sum() + 0.5 * (away**2).sum()
    inner = inverse - np.outer(weights, weights)
    gradient = away / _WIDTH
    for at, name in enumerate(_NAMES):
        if name == "noise":
            gradient[at] += 0.5 * noise * np.trace(inner)
        elif name in slope:
            gradient[at] += 0.5 * float((inner * slope[name]).sum())
    return float(value), gradient


class GaussianProcess(BasePredictor):
    """A Gaussian process whose kernel joins codes and signals.

    Its nine numbers have priors and are fitted by evidence on at most `FITTED` labels; at most
    `MOST` labels are kept, the better half and others at random. It is its data: a folder holds the
    candidates it learnt from.

    Thompson draws share one drawn function at the labels' places, from which the values between
    follow; what the labels leave open is drawn independently.
    """

    name: ClassVar[str] = "gp"
    keeps_data: ClassVar[bool] = True
    folds_cheaply: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._log: Floats = _MEDIAN.copy()
        self._seen: Features | None = None
        self._weights: Floats = np.empty(0)
        self._root: NDArray[Any] = np.empty((0, 0))
        self._function: tuple[NDArray[Any], NDArray[Any]] | None = None

    def _learn(self, features: Features, targets: Floats, seed: int) -> None:
        generator = np.random.default_rng(seed)
        if len(targets) > MOST:
            order = np.argsort(targets, kind="stable")
            others = generator.permutation(order[MOST // 2 :])[: MOST - MOST // 2]
            rows = np.sort(np.concatenate([order[: MOST // 2], others]))
            features, targets = features.take(rows), targets[rows]
        distances = _Distances.of(features, features)
        some = np.sort(generator.permutation(len(targets))[:FITTED])
        found = minimize(
            _misfit,
            _MEDIAN,
            args=(distances.take(some, some), targets[some]),
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(_MEDIAN - 4 * _WIDTH, _MEDIAN + 4 * _WIDTH, strict=True)),
            options={"maxiter": 40},
        )
        self._log, self._seen = np.asarray(found.x, dtype=np.float64), features
        self._keep(_kernel(self._log, distances)[0], targets)

    def _keep(self, covariance: Floats, targets: Floats) -> None:
        """The posterior at the fitted numbers."""
        noisy = covariance.copy()
        noisy[np.diag_indices_from(noisy)] += np.exp(self._log[-1]) + _JITTER
        self._root = np.linalg.cholesky(noisy)
        self._weights = cho_solve((self._root, True), targets)
        self._function = None

    def left_out(self, features: Features, targets: Floats, folds: Folds, seed: int) -> Floats:
        """See the base class; the kernel's numbers are those of the fit to all labels."""
        if self._seen is None or len(self._seen) != len(targets):
            return super().left_out(features, targets, folds, seed)
        covariance = _kernel(self._log, _Distances.of(features, features))[0]
        noise, out = np.exp(self._log[-1]) + _JITTER, np.empty(len(targets))
        for rows in folds:
            rest = np.setdiff1d(np.arange(len(targets)), rows)
            inner = covariance[np.ix_(rest, rest)]
            inner[np.diag_indices_from(inner)] += noise
            weights = cho_solve(cho_factor(inner, lower=True), targets[rest])
            centre = (covariance[np.ix_(rest, rest)] @ weights).mean()
            out[rows] = covariance[np.ix_(rows, rest)] @ weights - centre
        return out

    def _cross(self, features: Features) -> Floats:
        assert self._seen is not None
        return _kernel(self._log, _Distances.of(features, self._seen))[0]

    def _scores(self, features: Features) -> tuple[Floats, Floats]:
        cross = self._cross(features)
        solved = solve_triangular(self._root, cross.T, lower=True, check_finite=False)
        left = np.maximum(_variance(self._log, features) - (solved**2).sum(axis=0), 0.0)
        return cross @ self._weights, np.sqrt(left + np.exp(self._log[-1]))

    def _draw(self, features: Features, u: Floats) -> Floats:
        assert self._seen is not None
        function = self._function
        if function is None:
            covariance = self._cross(self._seen)
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
        open_ = np.maximum(_variance(self._log, features) - (solved**2).sum(axis=0), 0.0)
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
