"""Multi-objective search: survival as in NSGA-II and NSGA-III over everything that was told."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms._band import Band
from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told, no_parents
from searchlab.algorithms.variation import UniformVariation, Variation
from searchlab.errors import ConfigError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.uniforms import SURVIVAL

__all__ = ["NSGA2", "NSGA3", "FrontAlgorithm"]


class FrontAlgorithm(Algorithm):
    """What both have in common: parents survive from all that was told, not from a generation.

    A generation forgets: what it throws away can dominate what it keeps later on. Here survival
    chooses among all told candidates that fewer than `depth` others beat, which is a set that does
    not depend on the order or the division of tells. So the state is rebuilt by one bulk tell
    without living through the generations again, and proposals may come one by one.

    Candidates that meet the outcome constraints come before those that do not, which are ordered by
    how much they break them. Candidates that failed are never parents.
    """

    min_objectives: ClassVar[int] = 2
    max_objectives: ClassVar[int | None] = None

    def __init__(
        self,
        space: Space,
        *,
        seed: int,
        first_id: int,
        seeds: Seeds | None,
        repeats: Literal["redraw", "allow"],
        population: int,
        n_random: int,
        depth: int,
        every: int,
        variation: Variation | None,
        quantum: int,
    ) -> None:
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds, repeats=repeats)
        for what, value, least in (
            ("population", population, 2),
            ("n_random", n_random, 0),
            ("depth", depth, 1),
            ("every", every, 1),
            ("quantum", quantum, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{what} {value!r} of {self.name}; allowed: {least} or more")
        self.population = population
        self.n_random = n_random
        self.every = every
        self.variation: Variation = variation or UniformVariation()
        self.quantum = quantum
        self._band = Band(space, depth)
        self._waiting: list[Told] = []
        self._n_waiting = 0
        self._parents: tuple[Population, NDArray[np.int64]] | None = None

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "population": self.population,
            "n_random": self.n_random,
            "depth": self._band.depth,
            "every": self.every,
            "variation": self.variation.settings(),
        }

    def _width(self) -> int:
        return max(2 + self._variation_width, self.space.sample_width)

    @cached_property
    def _variation_width(self) -> int:
        return self.variation.width(self.space)

    # -- what was told ----------------------------------------------------------------------

    def _learn(self, told: Told) -> None:
        # Survival is dear beside a proposal, so it takes place at whole multiples of `every`. What
        # lies between two of them waits, so that a bulk tell stops at the same place.
        n = len(told.ids)
        waits = (self._n_waiting + n) % self.every
        if self._n_waiting + n < self.every:
            self._waiting.append(told)
            self._n_waiting += n
            return
        ready = n - waits
        for part in (*self._waiting, _rows(told, slice(0, ready))):
            self._band.merge(part)
        self._waiting = [_rows(told, slice(ready, n))] if waits else []
        self._n_waiting = waits
        self._parents = None

    def _survivors(self, losses: NDArray[np.float64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """At most `population` rows of candidates that meet the constraints, best first.

        Args:
            losses: float64 (n, m), scaled to [0, 1].
            ids: int64 (n,).
        """
        raise NotImplementedError

    def _chosen(self) -> tuple[Population, NDArray[np.int64]]:
        """The parents and their ids, best first."""
        if self._parents is None:
            band, wanted = self._band, self.population
            fine = np.flatnonzero(band.violation == 0)
            front = fine[band.beaten[fine] == 0]
            if len(front) >= wanted:
                fine = front  # nobody behind the first front survives
            rows = fine
            if len(fine):
                rows = fine[self._survivors(_scaled(band.losses[fine]), band.ids[fine])]
            if len(rows) < wanted:
                bad = np.flatnonzero(band.violation > 0)
                bad = bad[np.lexsort((-band.ids[bad], band.violation[bad]))]
                rows = np.concatenate([rows, bad])[:wanted]
            self._parents = band.population.take(rows), band.ids[rows]
        return self._parents

    # -- proposals --------------------------------------------------------------------------

    def _places(self, u: NDArray[np.float64], count: int) -> NDArray[np.int64]:
        """Which of the survivors uniforms stand for."""
        return (u * count).astype(np.int64)

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        start = self.first_id + len(self.seeds.population) + self.n_random
        random = (ids < start) | (not len(self._band))
        parts = []
        if random.any():
            n = int(random.sum())
            sample = self.space.sample(u[random, : self.space.sample_width])
            parts.append(Draw(sample, ["random"] * n, no_parents(n)))
        if not random.all():
            parts.append(self._children(u[~random], strength))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _children(self, u: NDArray[np.float64], strength: float) -> Draw:
        population, ids = self._chosen()
        a, b = self._places(u[:, 0], len(ids)), self._places(u[:, 1], len(ids))
        children = self.variation.vary(
            self.space,
            population.take(a),
            population.take(b),
            u[:, 2 : 2 + self._variation_width],
            strength=strength,
        )
        return Draw(children, ["vary"] * len(u), np.column_stack([ids[a], ids[b]]))


class NSGA2(FrontAlgorithm):
    """Two or three objectives: parents by rank of non-domination and then by crowding distance.

    Source: Deb et al. 2002 (NSGA-II), sorting and crowding by pymoo. Differences: survivors of all
    that was told instead of generations, parents by a draw that prefers low places (rank u**2, of
    which a binary tournament is an approximation), uniform crossover and one sure mutation.

    Args:
        space, seed, first_id, seeds, repeats: see `Algorithm`.
        population: how many survive as parents.
        n_random: random starts after the seeds.
        depth: candidates that this many others beat can no longer become parents.
        every: parents are chosen anew whenever so many more were told.
        variation: crossover and mutation.
        quantum: candidates per ask group; `population` makes generations of it.
    """

    name: ClassVar[str] = "nsga2"

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        repeats: Literal["redraw", "allow"] = "redraw",
        population: int = 50,
        n_random: int = 32,
        depth: int = 8,
        every: int = 4,
        variation: Variation | None = None,
        quantum: int = 1,
    ) -> None:
        super().__init__(
            space,
            seed=seed,
            first_id=first_id,
            seeds=seeds,
            repeats=repeats,
            population=population,
            n_random=n_random,
            depth=depth,
            every=every,
            variation=variation,
            quantum=quantum,
        )

    def _survivors(self, losses: NDArray[np.float64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
        from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
        from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

        crowding = get_crowding_function("cd")
        rows: list[NDArray[np.int64]] = []
        for front in NonDominatedSorting().do(losses, n_stop_if_ranked=self.population):
            distance = crowding.do(losses[front], n_remove=0)
            rows.append(front[np.lexsort((-ids[front], -distance))])
        return np.concatenate(rows)[: self.population]

    def _places(self, u: NDArray[np.float64], count: int) -> NDArray[np.int64]:
        return (u * u * count).astype(np.int64)


class NSGA3(FrontAlgorithm):
    """Three and more objectives: parents are spread over reference directions.

    Source: Deb and Jain 2014 (NSGA-III), survival by pymoo with a generator that is a function of
    the seed and of the number told. Differences: as `NSGA2`; the ranges of the objectives are those
    of the present candidates.

    Args:
        space, seed, first_id, seeds, repeats: see `Algorithm`.
        population: how many survive as parents; not less than there are directions.
        n_random: random starts after the seeds.
        depth: candidates that this many others beat can no longer become parents.
        every: parents are chosen anew whenever so many more were told.
        partitions: into how many parts Das and Dennis' directions divide each objective; None = the
            largest number that gives at most `population` directions.
        directions: weights of the objectives, one row per direction, instead of Das and Dennis'.
        variation: crossover and mutation.
        quantum: candidates per ask group.

    Raises:
        ConfigError: more directions than parents survive, partitions beside directions, directions
            that are negative, zero or not of the number of objectives.
    """

    name: ClassVar[str] = "nsga3"

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        repeats: Literal["redraw", "allow"] = "redraw",
        population: int = 100,
        n_random: int = 32,
        depth: int = 4,
        every: int = 100,
        partitions: int | None = None,
        directions: Sequence[Sequence[float]] | None = None,
        variation: Variation | None = None,
        quantum: int = 1,
    ) -> None:
        super().__init__(
            space,
            seed=seed,
            first_id=first_id,
            seeds=seeds,
            repeats=repeats,
            population=population,
            n_random=n_random,
            depth=depth,
            every=every,
            variation=variation,
            quantum=quantum,
        )
        if partitions is not None and (directions is not None or partitions < 1):
            raise ConfigError(
                f"partitions {partitions} of nsga3; allowed: 1 or more, without directions"
            )
        self.partitions = partitions
        self.directions = None if directions is None else _checked(directions)
        self._cached: NDArray[np.float64] | None = None
        if self.directions is not None:
            self.check_objectives(self.directions.shape[1])

    def settings(self) -> dict[str, Any]:
        given = None if self.directions is None else self.directions.tolist()
        return {**super().settings(), "partitions": self.partitions, "directions": given}

    def check_objectives(self, m: int) -> None:
        super().check_objectives(m)
        self._of_objectives(m)

    def _of_objectives(self, m: int) -> NDArray[np.float64]:
        """Directions of m objectives, (k, m)."""
        if self._cached is not None and self._cached.shape[1] == m:
            return self._cached
        if self.directions is not None:
            if self.directions.shape[1] != m:
                raise ConfigError(
                    f"directions of nsga3 with {self.directions.shape[1]} weights for {m} "
                    f"objectives; allowed: {m}"
                )
            out = self.directions
        else:
            from pymoo.util.ref_dirs import get_reference_directions
            from scipy.special import comb

            def count(parts: int) -> int:
                return int(comb(m + parts - 1, parts, exact=True))

            parts = self.partitions or 1
            if self.partitions is None:
                while parts < 1000 and count(parts + 1) <= self.population:
                    parts += 1
            if count(parts) > self.population:
                fits = "" if self.partitions in (None, 1) else " or fewer partitions"
                raise ConfigError(
                    f"population {self.population} of nsga3 for the {count(parts)} directions of "
                    f"{m} objectives; allowed: {count(parts)} or more{fits}"
                )
            out = get_reference_directions("das-dennis", m, n_partitions=parts)
        if len(out) > self.population:
            raise ConfigError(
                f"population {self.population} of nsga3 for {len(out)} directions; allowed: "
                f"{len(out)} or more"
            )
        self._cached = np.asarray(out, dtype=np.float64)
        return self._cached

    def _survivors(self, losses: NDArray[np.float64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
        from pymoo.algorithms.moo.nsga3 import ReferenceDirectionSurvival
        from pymoo.core.population import Population as Individuals
        from pymoo.core.problem import Problem

        m = losses.shape[1]
        survival = ReferenceDirectionSurvival(self._of_objectives(m))
        told = self.n_told - self._n_waiting
        philox = np.random.Philox(key=np.array([self.seed, SURVIVAL], dtype=np.uint64))
        philox.advance(told << 32)
        kept = survival.do(
            Problem(n_var=1, n_obj=m),
            Individuals.new(F=losses, number=np.arange(len(losses))),
            n_survive=min(self.population, len(losses)),
            random_state=np.random.Generator(philox),
        )
        return np.asarray(kept.get("number"), dtype=np.int64)


def _checked(directions: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    try:
        out = np.array(directions, dtype=np.float64)
    except (TypeError, ValueError):
        out = np.empty(0)
    if out.ndim != 2 or not out.size or not np.isfinite(out).all() or (out < 0).any():
        raise ConfigError(
            f"directions {directions!r} of nsga3; allowed: rows of weights, 0 or more each"
        )
    length = out.sum(axis=1, keepdims=True)
    if not length.all():
        raise ConfigError(f"directions {directions!r} of nsga3; allowed: not zero in every place")
    unit: NDArray[np.float64] = out / length
    return unit


def _scaled(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Losses as shares of their ranges: pymoo compares differences with fixed small numbers."""
    low = losses.min(axis=0)
    width = losses.max(axis=0) - low
    out: NDArray[np.float64] = (losses - low) / np.where(width > 0, width, 1.0)
    return out


def _rows(told: Told, rows: slice) -> Told:
    return Told(told.ids[rows], told.population.take(rows), told.losses[rows], told.violation[rows])


def _joined(parts: Sequence[Draw]) -> Draw:
    return Draw(
        Population.concat([part.population for part in parts]),
        [text for part in parts for text in part.origin],
        np.concatenate([part.parents for part in parts]),
    )
