"""Known ways to average checkpoints, each a vector of coefficients with sum one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError

__all__ = ["EMA_RATES", "ema", "ema_of_steps", "last", "lawa", "named", "one_hot", "uniform"]

Array = NDArray[np.float64]

EMA_RATES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Rates per checkpoint that are tried; a rate of 0 is `last`."""


def ema(k: int, rate: float) -> Array:
    """Exponential moving average over k checkpoints, oldest first, float64 (k,).

    The recursion m_1 = θ_1, m_i = rate m_(i-1) + (1 - rate) θ_i in closed form:
    (1 - rate) rate^(k-i), and rate^(k-1) for the first.
    """
    _check(k)
    if not 0 <= rate < 1:
        raise ConfigError(f"rate {rate}; allowed: 0 or more and below 1")
    weights = (1 - rate) * rate ** np.arange(k - 1, -1, -1, dtype=np.float64)
    weights[0] = rate ** (k - 1)
    return weights


def ema_of_steps(steps: Sequence[int], decay: float) -> Array:
    """The average with a decay per training step, over checkpoints saved after these steps.

    What lies between two checkpoints is not saved, so this is not quite the trainer's own average.
    """
    times = np.asarray(steps, dtype=np.float64)
    _check(len(times))
    if not 0 <= decay < 1 or (np.diff(times) <= 0).any():
        raise ConfigError(f"decay {decay}, steps {list(steps)}; allowed: in [0, 1), rising steps")
    rates = decay ** np.diff(times)
    weights = np.ones(len(times))
    weights[1:] = 1 - rates
    weights[:-1] *= np.cumprod(rates[::-1])[::-1]
    return weights


def last(k: int) -> Array:
    """The newest checkpoint alone."""
    return one_hot(k, k - 1)


def one_hot(k: int, place: int) -> Array:
    """One checkpoint alone, counted from 0, the oldest."""
    _check(k)
    if not 0 <= place < k:
        raise ConfigError(f"checkpoint {place}; allowed: 0 to {k - 1}")
    out = np.zeros(k)
    out[place] = 1.0
    return out


def uniform(k: int) -> Array:
    """The mean of all."""
    return lawa(k, k)


def lawa(k: int, latest: int) -> Array:
    """The mean of the latest ones. Source: arXiv 2209.14981."""
    _check(k)
    if not 1 <= latest <= k:
        raise ConfigError(f"latest {latest} of {k} checkpoints; allowed: 1 to {k}")
    out = np.zeros(k)
    out[k - latest :] = 1 / latest
    return out


def named(k: int, *, rates: Sequence[float] = EMA_RATES, singles: bool = True) -> dict[str, Array]:
    """Name -> coefficients of everything above; equal ones once.

    Args:
        k: checkpoints.
        rates: of moving averages, per checkpoint.
        singles: every checkpoint alone, too.
    """
    out = {"last": last(k), "uniform": uniform(k)}
    out |= {f"ema_{rate:g}": ema(k, rate) for rate in rates}
    windows = sorted({2, 3, 4, 6, 8, 12, k // 2} - {0})
    out |= {f"lawa_{n}": lawa(k, n) for n in windows if 1 < n < k}
    if singles:
        out |= {f"single_{place}": one_hot(k, place) for place in range(k)}
    seen: set[bytes] = set()
    return {
        name: row
        for name, row in out.items()
        if not (row.tobytes() in seen or seen.add(row.tobytes()))  # type: ignore[func-returns-value]
    }


def _check(k: int) -> None:
    if k < 1:
        raise ConfigError(f"{k} checkpoints; allowed: 1 or more")
