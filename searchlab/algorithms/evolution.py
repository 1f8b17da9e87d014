"""Steady-state evolution: nothing dies, parents are the best of all that was told."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told, no_parents
from searchlab.algorithms.variation import UniformVariation, Variation
from searchlab.errors import ConfigError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.uniforms import SPREAD, uniforms

__all__ = ["Evolution", "ParentRule"]

MANY = 4  # times what a pool holds: from here on the best are looked for before columns are joined
_CLIMBING = UniformVariation(crossover=0.0)
_EVERYWHERE = 0  # the niche of a search without niches


@dataclass(frozen=True)
class ParentRule:
    """Which of the told candidates become parents.

    Attributes:
        kind: "power" draws rank floor(mu * u**2) of the best mu; "rank" draws uniformly among the
            best mu; "threshold" draws uniformly among those (at most `limit`) whose loss is within
            `margin` of the best.
        mu: how many; None = start + floor(told / 250), at most 40. It depends on what was told,
            never on the budget, so that a longer run continues a shorter one.
        start: mu at the beginning, where mu is None.
        margin: for "threshold", in the objective's unit.
        limit: the largest pool that is kept.
        least: for "threshold", the smallest pool, also where fewer are within the margin.
    """

    kind: Literal["power", "rank", "threshold"] = "power"
    mu: int | None = None
    margin: float = 0.0
    limit: int = 40
    start: int = 6
    least: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("power", "rank", "threshold"):
            raise ConfigError(f"parents {self.kind!r}; allowed: power, rank, threshold")
        if self.mu is not None and not 1 <= self.mu <= self.limit:
            raise ConfigError(f"mu {self.mu}; allowed: 1 to {self.limit}")
        if not 1 <= self.start <= self.limit:
            raise ConfigError(f"start {self.start}; allowed: 1 to {self.limit}")
        if not 1 <= self.least <= self.limit:
            raise ConfigError(f"least {self.least}; allowed: 1 to {self.limit}")

    def settings(self) -> dict[str, Any]:
        """For the record; `least` where it is set."""
        return {key: value for key, value in vars(self).items() if key != "least" or value != 1}

    def count(self, told: int) -> int:
        return self.mu if self.mu is not None else min(self.limit, self.start + told // 250)


@dataclass
class _Pool:
    """The best candidates of one niche, best first."""

    population: Population
    ids: NDArray[np.int64]
    loss: NDArray[np.float64]
    violation: NDArray[np.float64]
    told: int = 0

    def bound(self, limit: int) -> float:
        """A loss beyond which nothing enters the pool any more; NaN while there is none."""
        if len(self.ids) < limit or self.violation[-1] > 0:
            return float("nan")
        return float(self.loss[-1])

    def merge(self, told: Told, rows: NDArray[np.int64], limit: int) -> None:
        self.told += len(rows)
        if len(rows) == 1 and len(self.ids) == limit:
            row = rows[0]
            one = float(told.violation[row]), float(told.losses[row, 0])
            if not one <= (float(self.violation[-1]), float(self.loss[-1])):  # or NaN
                return
        v, f = told.violation[rows], told.losses[rows, 0]
        may = np.isfinite(f)
        if len(self.ids) == limit:
            # Most late candidates cannot enter: leave them out before the columns are joined.
            worst_v, worst_f = self.violation[-1], self.loss[-1]
            may &= (v < worst_v) | ((v == worst_v) & (f <= worst_f))
        keep = rows[may]
        if not len(keep):
            return
        if len(keep) > MANY * limit:
            best = np.sort(np.lexsort((-told.ids[keep], f[may], v[may]))[:limit])
            keep, may = keep[best], np.flatnonzero(may)[best]
        ids = np.concatenate([self.ids, told.ids[keep]])
        loss = np.concatenate([self.loss, f[may]])
        violation = np.concatenate([self.violation, v[may]])
        order = np.lexsort((-ids, loss, violation))[:limit]
        population = Population.concat([self.population, told.population.take(keep)])
        self.population = population.take(order)
        self.ids, self.loss, self.violation = ids[order], loss[order], violation[order]


class Evolution(Algorithm):
    """Steady-state evolution with rank-based parents and certain mutation.

    The default was measured on hidden strings, NK landscapes and NAS-Bench-201: 8 random starts,
    parents from the best 6 to 40, crossover .8, one sure mutation. Published presets set `parents`,
    `variation`, `n_random` and `repeats` to what their authors ran.

    Args:
        space, seed, first_id, seeds, repeats: see `Algorithm`.
        n_random: random starts after the seeds.
        parents: see `ParentRule`.
        variation: crossover and mutation; the space's own operator is handed in by the recipe.
        niche: name of an integer-valued static cost (`space.cost`): one pool per value, children
            are meant for a niche drawn uniformly among `niches`. Losses of different niches are
            never compared.
        niches: the niches that children are meant for; all others keep their pools only.
        neighbour: with niches, the probability that the parents of a child come from the next
            lower or higher niche, so that a longer schedule can start from a shorter one.
        quantum: candidates per ask group.
        mating: probability that a child has two different parents, drawn by `mates`; the others
            then have one parent, drawn by `parents`, given twice. None = two draws by `parents`.
        mates: see `mating`; None = `parents`.
        early: the variation of the first `early_until` ids of the stage (random ones included), for
            searches whose operator changes; `mating` begins after them.
        climb: so many ids after the random starts are children of the best candidate alone, by
            mutation alone. While evaluations are few, mixing random candidates comes to nothing.
        spread: the random starts fill the space evenly: of `n_random` equal parts of every uniform
            that a candidate is made of each is drawn from once (a Latin hypercube).
        race: give every job a bound: the loss of the worst candidate that is kept for parents.
            What is beyond it changes neither proposals nor the best, so evaluators may stop there.
    """

    name: ClassVar[str] = "evolution"

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        repeats: Literal["redraw", "allow"] = "redraw",
        n_random: int = 8,
        parents: ParentRule | None = None,
        variation: Variation | None = None,
        niche: str | None = None,
        niches: tuple[int, ...] = (),
        neighbour: float = 0.0,
        quantum: int = 1,
        race: bool = False,
        mating: float | None = None,
        mates: ParentRule | None = None,
        early: Variation | None = None,
        early_until: int = 0,
        climb: int = 0,
        spread: bool = False,
    ) -> None:
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds, repeats=repeats)
        if n_random < 0 or quantum < 1:
            raise ConfigError(f"n_random {n_random}, quantum {quantum}; allowed: >= 0 and >= 1")
        if race and repeats == "allow":
            raise ConfigError("race with repeats 'allow'; allowed: redraw")
        if (niche is None) != (not niches):
            raise ConfigError(f"niche {niche!r} with niches {niches}; allowed: both or none")
        if mating is not None and (niche is not None or not 0 <= mating <= 1):
            raise ConfigError(f"mating {mating}, niche {niche!r}; allowed: in [0, 1], no niche")
        if (early is None) != (early_until == 0) or early_until < 0:
            raise ConfigError(f"early_until {early_until}; allowed: 1 or more, with `early`")
        if climb < 0 or (climb and (niche is not None or mating is not None or early is not None)):
            raise ConfigError(f"climb {climb}; allowed: 0 or more; 0 with niches, mating or early")
        self.climb, self.spread = climb, spread
        if climb:
            early, early_until = _CLIMBING, len(self.seeds.population) + n_random + climb
        self.mating, self.mates = mating, mates
        self.early, self.early_until = early, early_until
        self.n_random = n_random
        self.parents = parents or ParentRule()
        self.variation: Variation = variation or UniformVariation()
        self.niche = niche
        self.niches = tuple(sorted(niches))
        self.neighbour = neighbour
        self.quantum = quantum
        self.shared = 0 if niche is None else 1
        self.race = race
        self._pools: dict[int, _Pool] = {}

    def settings(self) -> dict[str, Any]:
        more: dict[str, Any] = {"race": True} if self.race else {}
        if self.mating is not None:
            mates = self.mates or self.parents
            more |= {"mating": self.mating, "mates": mates.settings()}
        if self.early is not None:
            more |= {"early": self.early.settings(), "early_until": self.early_until}
        if self.climb:
            more |= {"climb": self.climb}
        if self.spread:
            more |= {"spread": True}
        return {
            **super().settings(),
            **more,
            "n_random": self.n_random,
            "parents": self.parents.settings(),
            "variation": self.variation.settings(),
            "niche": self.niche,
            "niches": list(self.niches),
            "neighbour": self.neighbour,
        }

    @property
    def _limit(self) -> int:
        """How many candidates are kept for parents."""
        return max(self.parents.limit, self.mates.limit if self.mates else 0)

    def climbs(self, i: int) -> bool:
        """Whether the candidate of an id is a mutant of the best."""
        return self.climb > 0 and i < self.first_id + self.early_until

    def _width(self) -> int:
        own = 5 + self._variation_width
        return max(own, 5 + self.space.sample_width)

    @cached_property
    def _variation_width(self) -> int:
        own = self.variation.width(self.space)
        return own if self.early is None else max(own, self.early.width(self.space))

    def _basis(self) -> Hashable | None:
        if type(self) is not Evolution:  # a subclass may draw in another way
            return None
        # All parents there may be: a candidate that was told never changes.
        filled = [(value, pool) for value, pool in self._pools.items() if len(pool.ids)]
        mates = self.parents if self.mating is None or self.mates is None else self.mates
        counts = [(self._parent_count(p), self._parent_count(p, mates)) for _, p in filled]
        return tuple(
            [
                (value, *both, pool.ids[: max(both)].tobytes())
                for (value, pool), both in zip(filled, counts, strict=True)
            ]
        )

    def _learn(self, told: Told) -> None:
        if self.niche is None:
            self._pool(_EVERYWHERE).merge(told, np.arange(len(told.ids)), self._limit)
            return
        niches = self._niches_of(told.population)
        for value in np.unique(niches).tolist():
            self._pool(value).merge(told, np.flatnonzero(niches == value), self._limit)

    def _bound(self, population: Population) -> NDArray[np.float64] | None:
        if not self.race:
            return None
        niches = self._niches_of(population).tolist()
        limit = self._limit
        bounds = {
            value: self._pool(value).bound(limit) if value in self._pools else np.nan
            for value in set(niches)
        }
        return np.array([bounds[value] for value in niches])

    def _niches_of(self, population: Population) -> NDArray[np.int64]:
        if self.niche is None:
            return np.full(len(population), _EVERYWHERE)
        return np.rint(self.space.cost(population)[self.niche]).astype(np.int64)

    def _pool(self, niche: int) -> _Pool:
        pool = self._pools.get(niche)
        if pool is None:
            none = np.empty(0)
            pool = _Pool(self.space.empty(), np.empty(0, np.int64), none, none)
            self._pools[niche] = pool
        return pool

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        start = self.first_id + len(self.seeds.population) + self.n_random
        usable = any(len(pool.ids) for pool in self._pools.values())
        if usable and ids[0] >= start:
            return self._vary(ids, u, strength)
        random = (ids < start) | (not usable)
        if random.all():
            own = u[:, 5 : 5 + self.space.sample_width]
            # A candidate that is drawn anew, as it was there already, may come from anywhere.
            if self.spread and strength <= 1:
                own = self._evenly(ids, own)
            return Draw(self.space.sample(own), ["random"] * len(ids), no_parents(len(ids)))
        if random.any():
            first = self._draw(ids[random], u[random], strength)
            second = self._draw(ids[~random], u[~random], strength)
            assert first is not None
            assert second is not None
            return Draw(
                Population.concat([first.population, second.population]),
                [*first.origin, *second.origin],
                np.concatenate([first.parents, second.parents]),
            )
        return self._vary(ids, u, strength)

    def _evenly(self, ids: NDArray[np.int64], u: NDArray[np.float64]) -> NDArray[np.float64]:
        """The uniforms (n, width) of random starts, each column moved into the id's own part."""
        n, place = self.n_random, ids - self.first_id - len(self.seeds.population)
        starts = np.flatnonzero((place >= 0) & (place < n))
        if not len(starts):
            return u
        part = np.argsort(uniforms(self.seed, SPREAD, 0, n, u.shape[1]), axis=0, kind="stable")
        out = u.copy()
        out[starts] = (part[place[starts]] + u[starts]) / n
        return out

    def _vary(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw:
        young = ids < self.first_id + self.early_until
        if young.any() and not young.all():
            parts = [self._vary(ids[some], u[some], strength) for some in (young, ~young)]
            return Draw(
                Population.concat([part.population for part in parts]),
                [origin for part in parts for origin in part.origin],
                np.concatenate([part.parents for part in parts]),
            )
        by = self.early if self.early is not None and young.any() else self.variation
        if self.niche is None:
            pool = self._pools[_EVERYWHERE]
            rows = self._pairs(pool, u[:, 2:5], paired=not young.any())
            if self.climb and young.any():
                rows = np.zeros_like(rows)
            return self._children(pool.population, pool.ids, rows, u, strength, None, by)
        targets, homes = self._niches(u)
        rows = np.empty((len(u), 2), dtype=np.int64)
        pools, offset = [], 0
        for value in np.unique(homes).tolist():
            pool = self._pools[value]
            here = homes == value
            count = self._parent_count(pool)
            rows[here] = offset + self._ranks(u[here, 2:4], count)
            offset += len(pool.ids)
            pools.append(pool)
        population = Population.concat([pool.population for pool in pools])
        all_ids = np.concatenate([pool.ids for pool in pools])
        return self._children(population, all_ids, rows, u, strength, targets, by)

    def _children(
        self,
        population: Population,
        ids: NDArray[np.int64],
        rows: NDArray[np.int64],
        u: NDArray[np.float64],
        strength: float,
        targets: NDArray[np.int64] | None,
        by: Variation,
    ) -> Draw:
        width = self._variation_width if self.early is None else by.width(self.space)
        children = by.vary(
            self.space,
            population.take(rows[:, 0]),
            population.take(rows[:, 1]),
            u[:, 5 : 5 + width],
            strength=strength,
            targets=targets,
        )
        return Draw(children, ["vary"] * len(u), ids[rows])

    def _niches(self, u: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The niche each child is meant for, and the niche its parents come from."""
        filled = sorted(value for value, pool in self._pools.items() if len(pool.ids))
        wanted = np.array(self.niches)
        targets = wanted[(u[:, 0] * len(wanted)).astype(np.int64)]
        homes = targets.copy()
        for row, (target, chance) in enumerate(zip(targets.tolist(), u[:, 1], strict=True)):
            near = [value for value in (target - 1, target + 1) if value in filled]
            if near and (target not in filled or chance < self.neighbour):
                share = chance / self.neighbour if target in filled else chance
                homes[row] = near[min(int(share * len(near)), len(near) - 1)]
            elif target not in filled:
                homes[row] = min(filled, key=lambda value: (abs(value - target), value))
        return targets, homes

    def _pairs(self, pool: _Pool, u: NDArray[np.float64], *, paired: bool) -> NDArray[np.int64]:
        """Rows (n, 2) of the pool, from uniforms (n, 3); `paired` = two may mate."""
        rows = self._ranks(u[:, :2], self._parent_count(pool))
        if self.mating is None:
            return rows
        rows[:, 1] = rows[:, 0]
        rule = self.mates or self.parents
        count = self._parent_count(pool, rule)
        if not paired or count < 2:
            return rows
        pairs = self._ranks(u[:, :2], count, rule)
        pairs[:, 1] = np.where(pairs[:, 0] == pairs[:, 1], (pairs[:, 1] + 1) % count, pairs[:, 1])
        return np.where(u[:, 2:] < self.mating, pairs, rows)

    def _parent_count(self, pool: _Pool, rule: ParentRule | None = None) -> int:
        rule = rule or self.parents
        if rule.kind == "threshold":
            close = pool.loss <= pool.loss[0] + rule.margin
            near = int((close & (pool.violation <= pool.violation[0])).sum())
            return min(max(near, rule.least), len(pool.ids))
        return min(len(pool.ids), rule.count(pool.told))

    def _ranks(
        self, u: NDArray[np.float64], count: int, rule: ParentRule | None = None
    ) -> NDArray[np.int64]:
        shaped = u * u if (rule or self.parents).kind == "power" else u
        return (shaped * count).astype(np.int64)
