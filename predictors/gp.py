"""`gp`: a Gaussian process on signals, codes and shares of labels, with few fitted numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from searchlab.predictors.preprocess import Features
from searchlab.predictors.process import JITTER, Process

__all__ = ["GaussianProcess"]

Floats = NDArray[np.float64]

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
    covariance[np.diag_indices_from(covariance)] += noise + JITTER
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


class GaussianProcess(Process):
    """A Gaussian process whose kernel joins codes and signals.

    Its nine numbers have priors and are fitted by evidence on at most `FITTED` labels; what is kept
    of the labels, and draws, see `Process`.
    """

    name: ClassVar[str] = "gp"

    def _fitted(self, features: Features, targets: Floats, some: NDArray[np.int64]) -> Floats:
        distances = _Distances.of(features, features)
        found = minimize(
            _misfit,
            _MEDIAN,
            args=(distances.take(some, some), targets[some]),
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(_MEDIAN - 4 * _WIDTH, _MEDIAN + 4 * _WIDTH, strict=True)),
            options={"maxiter": 40},
        )
        return np.asarray(found.x, dtype=np.float64)

    def _covariance(self, one: Features, other: Features) -> Floats:
        return _kernel(self._log, _Distances.of(one, other))[0]

    def _variance(self, features: Features) -> Floats:
        return _variance(self._log, features)
