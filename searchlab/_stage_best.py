"""The best of a stage so far: the lowest loss of each group, or the front of several objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from searchlab.fronts import EARLY, hypervolume, non_dominated, reference_point

if TYPE_CHECKING:
    from searchlab.config import Stage
    from searchlab.population import Population

__all__ = ["BestSoFar", "FrontSize"]

MOST_OBJECTIVES = 4  # of a hypervolume that is computed while a run goes on


@dataclass(frozen=True)
class FrontSize:
    """A front at one moment.

    Attributes:
        members: how many candidates nothing dominates.
        hypervolume: of them, see `searchlab.fronts`; None with more than four objectives, where it
            is only computed at the end.
    """

    members: int
    hypervolume: float | None


class BestSoFar:
    """Follows the successes of a stage.

    Args:
        stage: whose objectives, and which of them steers.
        group_by: static cost whose integer values are followed apart; None = everything is group 0.
        reference: point from which hypervolumes are measured, as losses; None = of the first ids.

    Attributes:
        losses: group -> lowest loss; empty where several objectives are traded off.
    """

    def __init__(
        self, stage: Stage, group_by: str | None, reference: tuple[float, ...] | None = None
    ) -> None:
        self.losses: dict[int, float] = {}
        self._stage = stage
        self._group_by = group_by
        m = len(stage.evaluator.objectives)
        self._given = None if reference is None else np.array(reference, dtype=np.float64)
        self._front = np.empty((0, m))
        self._new: list[NDArray[np.float64]] = []
        self._early_ids = np.empty(0, dtype=np.int64)
        self._early = np.empty((0, m))

    def add(
        self, ids: NDArray[np.int64], population: Population, losses: NDArray[np.float64]
    ) -> None:
        """Takes in candidates that succeeded and meet the constraints."""
        if self._stage.trades:
            self._new.append(losses)
            order = np.argsort(np.concatenate([self._early_ids, ids]), kind="stable")[:EARLY]
            self._early = np.concatenate([self._early, losses])[order]
            self._early_ids = np.concatenate([self._early_ids, ids])[order]
            return
        found = losses[:, self._stage.main]
        if self._group_by is None:
            self.losses[0] = min(float(found.min()), self.losses.get(0, np.inf))
            return
        costs = self._stage.space.cost(population)[self._group_by]
        places = np.rint(costs).astype(np.int64).tolist()
        for place, loss in zip(places, found.tolist(), strict=True):
            self.losses[place] = min(loss, self.losses.get(place, np.inf))

    def front(self) -> FrontSize | None:
        """The front as it is now; None with one objective, or while there is none."""
        if self._new:
            every = np.concatenate([self._front, *self._new])
            self._front, self._new = every[non_dominated(every)], []
        if not len(self._front):
            return None
        if self._front.shape[1] > MOST_OBJECTIVES:
            return FrontSize(len(self._front), None)
        point = self._given
        if point is None:
            point = reference_point(self._early_ids, self._early)
        return FrontSize(len(self._front), hypervolume(self._front, point))
