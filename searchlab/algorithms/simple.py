"""The two algorithms that learn nothing: a given list, and random sampling."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Draw, Seeds, no_parents
from searchlab.errors import ConfigError
from searchlab.space import Space

__all__ = ["Listed", "Random"]


class Listed(Algorithm):
    """Proposes its seeds in order and nothing else: baselines, screenings, final scoring.

    Args:
        space, seed, first_id, seeds, repeats: see `Algorithm`.
        quantum: candidates per ask group.
    """

    name: ClassVar[str] = "listed"
    pools = False
    max_objectives: ClassVar[int | None] = None

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        repeats: Literal["redraw", "allow"] = "redraw",
        quantum: int = 1,
    ) -> None:
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds, repeats=repeats)
        if quantum < 1:
            raise ConfigError(f"quantum {quantum}; allowed: 1 or more")
        self.quantum = quantum

    def _width(self) -> int:
        return 0

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        return None


class Random(Algorithm):
    """Uniform random candidates of the space."""

    name: ClassVar[str] = "random"
    max_objectives: ClassVar[int | None] = None

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        return Draw(self.space.sample(u), ["random"] * len(ids), no_parents(len(ids)))
