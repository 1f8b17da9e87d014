"""The (1+1) evolution strategy: one parent, one step size, the one-fifth rule."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab._variable import normals
from searchlab.algorithms._coordinates import Coordinates
from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told, no_parents
from searchlab.errors import ConfigError
from searchlab.space import Space

__all__ = ["OnePlusOne"]

Array = NDArray[Any]

_TARGET = 0.2  # the share of successes at which the step stays as it is
_LEAST_STEP = 1e-15  # of the ranges; below that a step changes nothing


class OnePlusOne(Algorithm):
    """A child that is better than the parent takes its place; a fifth of them should be.

    The fastest way down a smooth slope where candidates come one at a time. It stays in the
    valley it starts in, and moves all coordinates by equal parts of their ranges; `cma` learns
    which directions matter, and restarts.

    A success multiplies the step by exp(0.8 rate), anything else by exp(-0.2 rate). With a lag
    several children are made from one state: a child then counts as a success if it is better than
    the parent it was made from, and the rate is divided by lag / 4.

    Source: Rechenberg 1973; the form of the rule is that of Kern et al., Natural Computing 3, 2004.

    Args:
        space, seed, first_id, seeds, repeats: see `Algorithm`; the space as in `Coordinates`.
        sigma: first standard deviation as a fraction of each range.
        rate: how fast the step follows the successes; None = sqrt(2 / d), at most 0.6.
        lag: how many candidates may be open; the run's `lag` has to be the same.

    Raises:
        ConfigError: a space of other variables; a setting out of range.
    """

    name: ClassVar[str] = "es11"

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        sigma: float = 0.1,
        rate: float | None = None,
        lag: int = 1,
    ) -> None:
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds)
        self._coordinates = Coordinates(space, name=self.name)
        if rate is None:
            rate = min(0.6, math.sqrt(2 / max(1, self._coordinates.size)))
        if not 0 < sigma <= 1 or not 0 < rate <= 2:
            raise ConfigError(f"sigma {sigma} and rate {rate}; allowed: in (0, 1] and (0, 2]")
        if lag < 1:
            raise ConfigError(f"lag {lag}; allowed: 1 or more")
        self.max_lag = lag
        self.sigma = sigma
        self.rate = rate
        self._start = first_id + len(self.seeds.population)
        self._parent = self._coordinates.centre
        self._parent_id = -1
        self._score = _WORST
        self._step = sigma
        # The parents' scores after each told id, as far back as an open child may come from.
        self._past: deque[tuple[int, tuple[float, float]]] = deque([(-1, _WORST)])

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "sigma": self.sigma,
            "rate": self.rate,
            "lag": self.max_lag,
        }

    def _width(self) -> int:
        return self._coordinates.size + self.space.repair_width

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        d = self._coordinates.size
        steps = normals(u[:, :d]) * (self._step * strength)
        if strength == 1.0:
            steps[ids == self._start] *= len(self.seeds.population) > 0  # else the middle itself
        population = self._coordinates.population(self._parent + steps, u[:, d:])
        parents = no_parents(len(ids))
        parents[:, 0] = self._parent_id
        return Draw(population, ["es11"] * len(ids), parents)

    def _learn(self, told: Told) -> None:
        vectors = self._coordinates.vectors(told.population)
        assert self.max_lag is not None
        rate = self.rate / max(1.0, self.max_lag / 4)
        for row, (i, loss, broken) in enumerate(
            zip(told.ids.tolist(), told.losses[:, 0].tolist(), told.violation.tolist(), strict=True)
        ):
            score = (broken, loss) if math.isfinite(loss) else _WORST
            while len(self._past) > 1 and self._past[1][0] <= i - self.max_lag:
                self._past.popleft()
            own = self._past[0][1]
            if i >= self._start and own < _WORST:
                change = (score < own) - _TARGET
                self._step = min(1.0, max(_LEAST_STEP, self._step * math.exp(rate * change)))
            if score < self._score:
                self._parent, self._parent_id, self._score = vectors[row], i, score
                self._past.append((i, score))


_WORST = (math.inf, math.inf)
