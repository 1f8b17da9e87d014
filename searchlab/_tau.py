"""Kendall's tau with an interval: how well predictions order what was then measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Tau", "tau_of"]

FEWEST = 5  # pairs below which nothing is known
_SIDE = 1.645  # 90 % intervals
_SPREAD = 0.437  # variance of Fisher's z of tau, times n - 4


@dataclass(frozen=True)
class Tau:
    """Kendall's tau (tau-b), its 90 % interval and the number of pairs it is of.

    Without `FEWEST` pairs nothing is known: 0 between -1 and 1.

    Source: Fieller, Hartley and Pearson 1957, for the variance of Fisher's z of tau.
    """

    tau: float = 0.0
    low: float = -1.0
    high: float = 1.0
    n: int = 0

    def to_json(self) -> dict[str, Any]:
        """Rounded to four digits."""
        return {
            "tau": round(self.tau, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
            "n": self.n,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Tau:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError."""
        return Tau(float(data["tau"]), float(data["low"]), float(data["high"]), int(data["n"]))

    def __str__(self) -> str:
        if self.n < FEWEST:
            return f"tau unknown ({self.n} labels)"
        return f"tau {self.tau:.2f} [{self.low:.2f}, {self.high:.2f}] on {self.n} labels"


def tau_of(predicted: NDArray[Any], losses: NDArray[Any]) -> Tau:
    """Of predictions and losses, (n,) each; pairs where one of them is not finite are left out."""
    predicted, losses = np.asarray(predicted, float), np.asarray(losses, float)
    known = np.isfinite(predicted) & np.isfinite(losses)
    n = int(known.sum())
    if n < FEWEST:
        return Tau(n=n)
    from scipy.stats import kendalltau

    found = float(kendalltau(predicted[known], losses[known]).statistic)
    if not np.isfinite(found):  # all predictions or all losses are equal
        return Tau(n=n)
    z = float(np.arctanh(np.clip(found, -0.999, 0.999)))
    half = _SIDE * float(np.sqrt(_SPREAD / max(n - 4, 1)))
    return Tau(found, float(np.tanh(z - half)), float(np.tanh(z + half)), n)
