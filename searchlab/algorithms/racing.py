"""Racing through a given list: each candidate is measured only as far as it can still win."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Seeds, Told
from searchlab.algorithms.simple import Listed
from searchlab.errors import ConfigError
from searchlab.population import Population
from searchlab.space import Space

__all__ = ["Race"]


class Race(Listed):
    """Proposes its seeds in order, each with the `keep`-th best loss told so far as its bound.

    An evaluator that can prove a candidate worse than its bound stops there and calls it pruned.
    The best `keep` of the list, their order and their values are those of measuring everything.

    Args:
        space, seed, first_id, seeds, quantum: see `Listed`; repeated seeds are dropped.
        keep: how many of the best are wanted with their values; not less than a final's k.
    """

    name: ClassVar[str] = "race"
    pools = False
    max_objectives: ClassVar[int | None] = 1

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        quantum: int = 1,
        keep: int = 5,
    ) -> None:
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds, quantum=quantum)
        if keep < 1:
            raise ConfigError(f"keep {keep}; allowed: 1 or more")
        self.keep = keep
        self._best = np.empty(0)

    def _learn(self, told: Told) -> None:
        allowed = np.isfinite(told.losses[:, 0]) & (told.violation == 0)
        self._best = np.sort(np.concatenate([self._best, told.losses[allowed, 0]]))[: self.keep]

    def _bound(self, population: Population) -> NDArray[np.float64] | None:
        if len(self._best) < self.keep:
            return None
        return np.full(len(population), self._best[-1])

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "keep": self.keep}
