"""The two algorithms that learn nothing: a given list, and random sampling."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Draw, no_parents

__all__ = ["Listed", "Random"]


class Listed(Algorithm):
    """Proposes its seeds in order and nothing else: baselines, screenings, final scoring."""

    name: ClassVar[str] = "listed"

    def _width(self) -> int:
        return 0

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        return None


class Random(Algorithm):
    """Uniform random candidates of the space."""

    name: ClassVar[str] = "random"

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        return Draw(self.space.sample(u), ["random"] * len(ids), no_parents(len(ids)))
