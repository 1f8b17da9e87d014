"""Whether a predictor may choose: rank correlations with intervals, and the rule on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Evidence", "Gain", "convinces", "correlation", "gain", "ranks", "trusts"]

Floats = NDArray[np.float64]

MOST_WORSE = 0.45  # share of late labels worse than early ones; without any skill it is a half
CLEARLY = 0.25  # a share that leaves no doubt that late labels are better
FEWEST = 4  # labels that a share is taken of
# Standard errors of held-out skill above none. The verdict is asked for again and again, and labels
# of a search lie close together: chance passes a bound more often than one look at strangers would.
DOUBT, SURE = 2.0, 2.5
_SIDE = 1.645  # 90 % intervals
_FAR = 6.0  # robust standard deviations; losses that are worse by more are cut
_SPREAD = 1.06  # variance of Fisher's z of a rank correlation, times n - 3
_MOST = 0.999  # correlations beyond have no finite z


@dataclass(frozen=True)
class Evidence:
    """A correlation of predictions with what then came, and its 90 % interval.

    `n` counts the pairs. Without enough of them nothing is known: 0 between -1 and 1.

    Attributes:
        errors: how many standard errors it is above 0.
    """

    rho: float = 0.0
    low: float = -1.0
    high: float = 1.0
    n: int = 0
    errors: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "rho": round(self.rho, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
            "n": self.n,
        }


def ranks(values: Floats) -> Floats:
    """Ranks from 0, float64 (n,); equal values share their mean rank, infinite ones too."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    shared: Floats = (last - (count + 1) / 2)[place.reshape(-1)]
    return shared


def correlation(batches: Iterable[tuple[Floats, Floats]], *, values: bool = False) -> Evidence:
    """What batches of (predictions, losses) say together; each is ranked by itself.

    Losses fall while a search goes on, and so does whatever follows their mean: comparing within
    batches keeps that from passing for skill. Batches are joined by Fisher's z, weighted by size;
    those of fewer than four pairs say nothing.

    Args:
        batches: pairs of arrays (n,); losses may be infinite, predictions NaN where unknown.
        values: take the mean of Spearman's correlation and Pearson's of the losses, far worse ones
            cut; each sees skill that the other misses, among labels with noise above all.
    """
    total = weights = 0.0
    n = 0
    for predictions, losses in batches:
        known = np.isfinite(predictions) & ~np.isnan(losses)
        if (weight := int(known.sum()) - 3) < 1:
            continue
        said, came = predictions[known], losses[known]
        rho = _pearson(ranks(said), ranks(came))
        if values:
            rho = (rho + _pearson(said, _cut(came))) / 2
        total += weight * float(np.arctanh(np.clip(rho, -_MOST, _MOST)))
        weights += weight
        n += weight + 3
    if not n:
        return Evidence()
    z, error = total / weights, float(np.sqrt(_SPREAD / weights))
    low, high = (float(np.tanh(z + side * _SIDE * error)) for side in (-1, 1))
    return Evidence(float(np.tanh(z)), low, high, n, z / error)


def _pearson(a: Floats, b: Floats) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else 0.0


def _cut(losses: Floats) -> Floats:
    """Losses without those that are far worse than most; failed ones become the worst."""
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        return np.zeros(len(losses))
    middle = float(np.median(finite))
    spread = 1.4826 * float(np.median(np.abs(finite - middle)))
    most = min(middle + _FAR * spread, float(finite.max())) if spread > 0 else float(finite.max())
    return np.minimum(losses, most)


@dataclass(frozen=True)
class Gain:
    """Whether the latest labels are better than those before the first fit.

    Attributes:
        worse: share of the pairs (late, early) whose late label is the worse one, ties half; what
            is drawn as before comes to about a half.
        n: how many late labels there are.
    """

    worse: float = 0.0
    n: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"worse": round(self.worse, 4), "n": self.n}


def gain(early: Floats, late: Floats) -> Gain:
    """What labels before the first fit say of later ones; nothing where either are too few."""
    if min(len(early), len(late)) < FEWEST:
        return Gain()
    both = ranks(np.concatenate([early, late]))[len(early) :]
    worse = (both.sum() - len(late) * (len(late) - 1) / 2) / (len(early) * len(late))
    return Gain(float(worse), len(late))


def trusts(held_out: Evidence, online: Evidence, found: Gain) -> bool:
    """The rule: skill on labels held out is beyond `DOUBT`, and what was predicted came.

    Args:
        held_out: predictions of labels that the fit behind them had not seen.
        online: the predictions stored with the latest batches before they were learnt from. Rows
            that a predictor chose are alike, and those it overrates are chosen most, so that a
            reversed order among them is a failure only where nothing was gained either.
        found: the latest batches beside the labels before the first fit. Some looks at labels
            without order seem to show skill; its choices are then no better than those.
    """
    gained = found.worse < MOST_WORSE and (online.high >= 0 or found.worse < CLEARLY)
    return held_out.errors > DOUBT and gained


def convinces(held_out: Evidence) -> bool:
    """Whether skill is so plain that a predictor may choose among thousands, wild ones too."""
    return held_out.errors > SURE
