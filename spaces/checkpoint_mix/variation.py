"""Crossover and mutation of coefficients, as the evolution of the paper has them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab._variable import normals
from searchlab.errors import ConfigError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.spaces.checkpoint_mix.space import CheckpointMixSpace

__all__ = ["CoefficientVariation", "project"]

Array = NDArray[Any]


def project(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest rows with sum one, for (..., K) float64: all elements move by one amount.

    Twice, so that the rounding of a large first step does not stay.
    """
    k = rows.shape[-1]
    moved = rows + (1 - rows.sum(axis=-1, keepdims=True)) / k
    again: NDArray[np.float64] = moved + (1 - moved.sum(axis=-1, keepdims=True)) / k
    return again


@dataclass(frozen=True)
class CoefficientVariation:
    """A child of two mixes, mutated, with sum one.

    Half of the children are convex combinations of their parents, the others take each coefficient
    from either. Then some coefficients get a normal step, and the sum is repaired.

    Attributes:
        convex: probability of a convex combination.
        rate: probability that a coefficient is mutated.
        sigma: standard deviation of its step; None = 0.2 / sqrt(K).

    Source: arXiv 2404.02241, algorithm 1; its figures were never published, these are ours.
    """

    convex: float = 0.5
    rate: float = 0.3
    sigma: float | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.convex <= 1 and 0 < self.rate <= 1):
            raise ConfigError(
                f"convex {self.convex}, rate {self.rate}; allowed: in [0, 1] and in (0, 1]"
            )
        if self.sigma is not None and not self.sigma > 0:
            raise ConfigError(f"sigma {self.sigma}; allowed: more than 0")

    def settings(self) -> dict[str, Any]:
        return {
            "name": "coefficients",
            "convex": self.convex,
            "rate": self.rate,
            "sigma": self.sigma,
        }

    def width(self, space: Space) -> int:
        return 2 + 3 * space.size + space.repair_width

    def vary(
        self,
        space: Space,
        a: Population,
        b: Population,
        u: Array,
        *,
        strength: float = 1.0,
        targets: Array | None = None,
    ) -> Population:
        assert isinstance(space, CheckpointMixSpace)
        n, d, k = len(u), space.size, len(space.checkpoints)
        shape = (n, space.group_count, k)
        first, second = a["alpha"].reshape(shape), b["alpha"].reshape(shape)
        pick = (u[:, 2 : 2 + d] < 0.5).reshape(shape)
        share = u[:, 1, None, None]
        mixed = share * first + (1 - share) * second
        child = np.where(u[:, :1, None] < self.convex, mixed, np.where(pick, first, second))
        rate = min(1.0, self.rate * strength)
        hit = (u[:, 2 + d : 2 + 2 * d] < rate).reshape(shape)
        sigma = 0.2 / math.sqrt(k) if self.sigma is None else self.sigma
        step = sigma * normals(u[:, 2 + 2 * d : 2 + 3 * d]).reshape(shape)
        rows = project(np.where(hit, child + step, child))
        values = rows.reshape(n, *space.variables["alpha"].shape)
        return space.repair(Population({"alpha": values}), u[:, 2 + 3 * d :])
