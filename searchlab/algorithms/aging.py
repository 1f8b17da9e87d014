"""Regularised evolution: the newest candidates are the population, so that everything dies."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told, no_parents
from searchlab.algorithms.variation import UniformVariation, Variation
from searchlab.errors import ConfigError
from searchlab.population import Population
from searchlab.space import Space

__all__ = ["RegularisedEvolution"]


class RegularisedEvolution(Algorithm):
    """Aging evolution with tournaments.

    The population is the newest `population` successes. A parent is the best of `tournament`
    members drawn with replacement; its child has one changed element.

    Source: arXiv 1802.01548, algorithm 1, with its settings for NAS-Bench-101 scaled down: a
    hundred members are most of what a search after training can pay for. Differences: candidates
    that fail never become members, and a child that is known already is drawn again, from a
    tournament of its own and with more changes each time.

    Args:
        space, seed, first_id, seeds: see `Algorithm`.
        population: members, P in the paper; so many candidates are random at first.
        tournament: S in the paper.
        variation: makes a child of one parent; by default one element changes.
        quantum: candidates per ask group.

    Raises:
        ConfigError: population, tournament or quantum below 1.
    """

    name: ClassVar[str] = "regularised_evolution"

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        population: int = 25,
        tournament: int = 5,
        variation: Variation | None = None,
        quantum: int = 1,
    ) -> None:
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds)
        if min(population, tournament, quantum) < 1:
            raise ConfigError(
                f"population {population}, tournament {tournament}, quantum {quantum}; "
                "allowed: 1 or more"
            )
        self.population = population
        self.tournament = tournament
        self.variation: Variation = variation or UniformVariation(crossover=0.0, rate=0.0)
        self._wilder = UniformVariation(crossover=0.0)
        self.quantum = quantum
        self._members = space.empty()
        self._ids = np.empty(0, dtype=np.int64)
        self._rank = np.empty((0, 2))  # violation and loss

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "population": self.population,
            "tournament": self.tournament,
            "variation": self.variation.settings(),
        }

    @cached_property
    def _varied(self) -> int:
        return max(self.variation.width(self.space), self._wilder.width(self.space))

    def _width(self) -> int:
        return self.tournament + max(self._varied, self.space.sample_width)

    def _learn(self, told: Told) -> None:
        rows = np.flatnonzero(np.isfinite(told.losses[:, 0]))[-self.population :]
        if not len(rows):
            return
        keep = slice(max(0, len(self._ids) + len(rows) - self.population), None)
        self._members = Population.concat([self._members.take(keep), told.population.take(rows)])
        self._ids = np.concatenate([self._ids[keep], told.ids[rows]])
        new = np.column_stack([told.violation[rows], told.losses[rows, 0]])
        self._rank = np.concatenate([self._rank[keep], new])

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        start = self.first_id + len(self.seeds.population) + self.population
        random = (ids < start) | (not len(self._ids))
        rest = u[:, self.tournament :]
        if not random.any():
            return self._children(u, rest, strength)
        sampled = self.space.sample(rest[random, : self.space.sample_width])
        draw = Draw(sampled, ["random"] * len(sampled), no_parents(len(sampled)))
        if random.all():
            return draw
        varied = self._children(u[~random], rest[~random], strength)
        # Ids increase, so the random ones come first.
        return Draw(
            Population.concat([sampled, varied.population]),
            [*draw.origin, *varied.origin],
            np.concatenate([draw.parents, varied.parents]),
        )

    def _children(self, u: NDArray[np.float64], rest: NDArray[np.float64], strength: float) -> Draw:
        picks = (u[:, : self.tournament] * len(self._ids)).astype(np.int64)
        places = np.empty(len(self._ids), dtype=np.int64)  # 0 = the best; ties go to the newest
        order = np.lexsort((-self._ids, self._rank[:, 1], self._rank[:, 0]))
        places[order] = np.arange(len(self._ids))
        chosen = picks[np.arange(len(picks)), np.argmin(places[picks], axis=1)]
        parents = self._members.take(chosen)
        variation = self.variation if strength == 1.0 else self._wilder
        block = rest[:, : variation.width(self.space)]
        children = variation.vary(self.space, parents, parents, block, strength=strength)
        ids = self._ids[chosen]
        return Draw(children, ["vary"] * len(children), np.column_stack([ids, ids]))
