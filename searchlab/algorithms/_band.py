"""The told candidates that may still become parents when several objectives are minimised."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Told
from searchlab.population import Population
from searchlab.space import Space

__all__ = ["Band", "beats"]

_BLOCK = 256  # rows that are compared at once; the outcome does not depend on it

Flags = NDArray[np.bool_]


def beats(
    losses: NDArray[np.float64],
    violation: NDArray[np.float64],
    ids: NDArray[Any],
    other_losses: NDArray[np.float64],
    other_violation: NDArray[np.float64],
    other_ids: NDArray[Any],
) -> Flags:
    """Which candidate beats which other one: bool (n, k), row i and column j = i beats j.

    A candidate that breaks its constraints less beats one that breaks them more; among those that
    meet them one beats another if it dominates it (nowhere worse, somewhere better). Of candidates
    with equal figures the newest beats the others. This is a strict partial order.

    Args:
        losses, violation, ids: (n, m), (n,) and (n,), minimised.
        other_losses, other_violation, other_ids: of k candidates.
    """
    a, b = violation[:, None], other_violation[None]
    no_worse = np.ones((len(losses), len(other_losses)), dtype=bool)
    better = np.zeros_like(no_worse)
    for mine, theirs in zip(losses.T, other_losses.T, strict=True):
        no_worse &= mine[:, None] <= theirs[None]
        better |= mine[:, None] < theirs[None]
    dominates = no_worse & (better | (ids[:, None] > other_ids[None]))
    if not (violation.any() or other_violation.any()):
        return dominates
    newer_as_bad = (a == b) & (a > 0) & (ids[:, None] > other_ids[None])
    answer: Flags = (a < b) | ((a == b) & (a == 0) & dominates) | newer_as_bad
    return answer


class Band:
    """Candidates that fewer than `depth` others of all that was told beat, in id order.

    Whoever beats a member is a member, as fewer still beat it. So the members and the number that
    beats each of them are a function of the set of candidates: neither the order in which they came
    nor how they were divided into tells matters, and nothing else has to be kept.

    Args:
        space: of the candidates.
        depth: 1 = those that nothing beats.

    Attributes:
        population, ids, losses, violation: the members.
        beaten: int64 (n,), how many others beat each.
    """

    def __init__(self, space: Space, depth: int) -> None:
        self.depth = depth
        self.population: Population = space.empty()
        self.ids = np.empty(0, dtype=np.int64)
        self.losses = np.empty((0, 0))
        self.violation = np.empty(0)
        self.beaten = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def merge(self, told: Told) -> None:
        """Takes in candidates; those that failed are left out."""
        rows = np.flatnonzero(np.isfinite(told.losses).all(axis=1))
        for start in range(0, len(rows), _BLOCK):
            self._merge(told, rows[start : start + _BLOCK])

    def _merge(self, told: Told, rows: NDArray[np.int64]) -> None:
        losses, violation, ids = told.losses[rows], told.violation[rows], told.ids[rows]
        if not len(self.ids):
            self.losses = np.empty((0, losses.shape[1]))
        among = beats(losses, violation, ids, losses, violation, ids).sum(axis=0)
        lost = beats(self.losses, self.violation, self.ids, losses, violation, ids).sum(axis=0)
        beaten = among + lost
        keep = beaten < self.depth
        if not keep.any():  # what does not enter beats nobody who could stay
            return
        won = beats(losses, violation, ids, self.losses, self.violation, self.ids).sum(axis=0)
        stay = self.beaten + won < self.depth
        population = told.population.take(rows[keep])
        if stay.all():
            self.population = Population.concat([self.population, population])
        else:
            self.population = Population.concat([self.population.take(stay), population])
        self.ids = np.concatenate([self.ids[stay], ids[keep]])
        self.losses = np.concatenate([self.losses[stay], losses[keep]])
        self.violation = np.concatenate([self.violation[stay], violation[keep]])
        self.beaten = np.concatenate([(self.beaten + won)[stay], beaten[keep]])
