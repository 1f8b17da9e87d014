"""Figures beside an accuracy: its interval, the best constant answer, answers without a form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from searchlab.errors import ConfigError
from searchlab.evaluators.language.tasks import Task
from searchlab.evaluators.noise import Split

__all__ = ["Summary", "mean_interval", "paired_difference", "summarise", "wilson"]

_Z = 1.959963984540054  # two-sided 95 %


def wilson(right: float, n: int) -> tuple[float, float]:
    """95 % interval of a share, `right` of n. Source: Wilson 1927."""
    if n < 1 or not 0 <= right <= n:
        raise ConfigError(f"{right} right of {n}; allowed: 0 to n, n from 1")
    share, z2 = right / n, _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(scores: ArrayLike) -> tuple[float, float]:
    """95 % interval of a mean by its standard error; without limits where there is one score."""
    values = np.asarray(scores, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return -math.inf, math.inf
    half = _Z * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def paired_difference(one: ArrayLike, other: ArrayLike) -> tuple[float, float, float]:
    """Mean of one - other over the same items, and its 95 % interval."""
    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ConfigError(f"scores of shapes {a.shape} and {b.shape}; allowed: (n,) both, n from 1")
    low, high = mean_interval(a - b)
    return float((a - b).mean()), low, high


@dataclass(frozen=True)
class Summary:
    """One candidate's figures on a split.

    Attributes:
        value: of the metric.
        low, high: 95 % interval of the mean score; Wilson's where scores are 0 or 1.
        majority: share that the best constant answer gets right; NaN = unknown.
        format_failures: share of answers that are none of the allowed ones; NaN = not asked.
        items: how many.
    """

    value: float
    low: float
    high: float
    majority: float
    format_failures: float
    items: int

    def __str__(self) -> str:
        text = f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] on {self.items} items"
        if not math.isnan(self.majority):
            text += f", majority {self.majority:.4g}"
        if not math.isnan(self.format_failures):
            text += f", format failures {self.format_failures:.4g}"
        return text


def summarise(
    task: Task, split: Split, value: float, scores: ArrayLike, *, failures: float = math.nan
) -> Summary:
    """Figures of one candidate from its per-item scores."""
    values = np.asarray(scores, dtype=np.float64)
    counts = bool(np.isin(values, (0.0, 1.0)).all())
    low, high = wilson(float(values.sum()), len(values)) if counts else mean_interval(values)
    majority = task.majority(split) if counts else math.nan
    return Summary(value, low, high, majority, failures, len(values))
