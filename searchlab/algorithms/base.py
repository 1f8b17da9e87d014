"""The ask/tell contract and the part every algorithm shares: seeds, issued keys, redraws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError
from searchlab.population import Jobs, Population
from searchlab.space import Space
from searchlab.uniforms import uniforms

__all__ = ["Algorithm", "Draw", "Seeds", "Told"]

MAX_REDRAWS = 8
REDRAW_FACTOR = 4.0  # mutation rate grows by this per redraw; slower growth leaves repeats


@dataclass(frozen=True)
class Seeds:
    """Candidates that an algorithm proposes before its own, with where each comes from."""

    population: Population
    origin: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.population) != len(self.origin):
            raise ConfigError(
                f"{len(self.origin)} origins for {len(self.population)} seeds; allowed: one each"
            )


@dataclass(frozen=True)
class Told:
    """Answers in id order.

    Attributes:
        ids: int64 (n,), increasing over all tells.
        population: the n candidates.
        losses: float64 (n, m), minimised; +inf where not ok.
        violation: float64 (n,), sum of constraint violations, 0 where none.
    """

    ids: NDArray[np.int64]
    population: Population
    losses: NDArray[np.float64]
    violation: NDArray[np.float64]


@dataclass(frozen=True)
class Draw:
    """Raw proposals of a subclass: candidates, a word for each, and the parents' ids."""

    population: Population
    origin: Sequence[str]
    parents: NDArray[np.int64]


class Algorithm:
    """Proposes candidates; all the state there is comes from `tell`.

    `ask` is a pure function of what was told, of the keys issued and of the ids: there is no
    random state, so a state is rebuilt by one bulk `tell` (`tell(a + b)` equals `tell(a)` then
    `tell(b)`) and `issue` of the keys. Subclasses write `_draw` and `_learn`.

    Args:
        space: where candidates come from.
        seed: the run's seed.
        first_id: the id at which the stage begins; ids below are none of this algorithm's business.
        seeds: proposed first, in order; repeats among them are dropped.
        repeats: "redraw" (a known candidate is drawn again, up to 8 times, then its id is void) or
            "allow" (published presets: a repeat is a job that the cache answers).
    """

    name: ClassVar[str] = ""
    quantum: int = 1
    max_lag: int | None = None

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        repeats: Literal["redraw", "allow"] = "redraw",
    ) -> None:
        if repeats not in ("redraw", "allow"):
            raise ConfigError(f"repeats {repeats!r}; allowed: redraw, allow")
        self.space = space
        self.seed = seed
        self.first_id = first_id
        self.seeds = seeds or Seeds(space.empty(), ())
        self.repeats = repeats
        self.n_told = 0
        self._issued: dict[bytes, int] = {}

    # -- what subclasses write --------------------------------------------------------------

    def _width(self) -> int:
        """Uniforms per proposal."""
        return self.space.sample_width

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        """Valid canonical candidates for these ids; None = nothing more to propose.

        Args:
            ids: int64 (n,); row i of the answer depends on ids[i] and u[i] only.
            u: float64 (n, `_width()`).
            strength: how much wilder than usual to vary (1, 4, 16, ...).
        """
        raise NotImplementedError

    def _learn(self, told: Told) -> None:
        """Takes in answers; split-invariant."""

    # -- the contract -----------------------------------------------------------------------

    def ask(self, first_id: int, n: int) -> Jobs:
        """Candidates for the ids first_id .. first_id + n - 1.

        Returns:
            Jobs with at most n rows: ids that found nothing new are void and left out. An empty
            answer means that nothing is left to propose.
        """
        ids = np.arange(first_id, first_id + n, dtype=np.int64)
        index = ids - self.first_id
        n_seeds = int(np.clip(len(self.seeds.population) - index[0], 0, n)) if n else 0
        parts: list[Population] = []
        origin: list[str] = []
        parents = [np.full((n_seeds, 2), -1, dtype=np.int64)]
        if n_seeds:
            rows = index[:n_seeds]
            parts.append(self.seeds.population.take(rows))
            origin += [self.seeds.origin[i] for i in rows]
        drawn = ids[n_seeds:]
        if len(drawn):
            draw = self._draw(drawn, self._uniforms(drawn, 0), 1.0)
            if draw is None:
                ids = ids[:n_seeds]
            else:
                parts.append(draw.population)
                origin += list(draw.origin)
                parents.append(draw.parents)
        population = Population.concat(parts) if parts else self.space.empty()
        jobs = Jobs(
            ids=ids,
            population=population,
            keys=self.space.keys(population) if len(population) else (),
            told_at_ask=self.n_told,
            origin=tuple(origin),
            parents=np.concatenate(parents)[: len(ids)],
        )
        return self._without_repeats(jobs, n_seeds)

    def tell(self, told: Told) -> None:
        """Takes in answers, in id order."""
        if len(told.ids):
            self.n_told += len(told.ids)
            self._learn(told)

    def issue(self, ids: NDArray[np.int64], keys: Sequence[bytes | None]) -> None:
        """Notes keys that were issued before (resume)."""
        for i, key in zip(ids.tolist(), keys, strict=True):
            if key is not None:
                previous = self._issued.get(key)
                if previous is None or i < previous:
                    self._issued[key] = i

    # -- repeats ----------------------------------------------------------------------------

    def _uniforms(self, ids: NDArray[np.int64], attempt: int) -> NDArray[np.float64]:
        return uniforms(self.seed, attempt, int(ids[0]), len(ids), self._width())

    def issued_before(self, key: bytes, before: int) -> bool:
        """Whether an id below `before` was given this candidate."""
        first = self._issued.get(key)
        return first is not None and first < before

    def _without_repeats(self, jobs: Jobs, n_seeds: int) -> Jobs:
        issued = self._issued
        repeated = []
        keys = list(jobs.keys)
        for row, (i, key) in enumerate(zip(jobs.ids.tolist(), keys, strict=True)):
            first = issued.setdefault(key, i)
            if first < i:
                repeated.append(row)
            elif first > i:  # a later id of an earlier life of the run
                issued[key] = i
        if not repeated or self.repeats == "allow":
            return jobs
        # Redraws may collide with later rows of the same group, so those rows are judged again.
        return self._redraw(jobs, repeated[0], n_seeds)

    def _redraw(self, jobs: Jobs, start: int, n_seeds: int) -> Jobs:
        keys = list(jobs.keys)
        ids = jobs.ids.tolist()
        for row in range(start, len(ids)):
            if self._issued.get(keys[row]) == ids[row]:
                del self._issued[keys[row]]
        columns = {name: np.array(column) for name, column in jobs.population.columns.items()}
        origin, parents = list(jobs.origin), np.array(jobs.parents)
        keep = np.ones(len(ids), dtype=bool)
        for row in range(start, len(ids)):
            i = ids[row]
            if self.issued_before(keys[row], i):
                found = None if row < n_seeds else self._redraw_one(i)
                if found is None:
                    keep[row] = False
                    continue
                draw, keys[row] = found
                for name, column in columns.items():
                    column[row] = draw.population[name][0]
                origin[row], parents[row] = draw.origin[0], draw.parents[0]
            self._issued[keys[row]] = i
        fresh = Jobs(
            ids=jobs.ids,
            population=Population(columns),
            keys=tuple(keys),
            told_at_ask=jobs.told_at_ask,
            origin=tuple(origin),
            parents=parents,
        )
        return fresh if keep.all() else fresh.take(np.flatnonzero(keep))

    def _redraw_one(self, i: int) -> tuple[Draw, bytes] | None:
        ids = np.array([i], dtype=np.int64)
        for attempt in range(1, MAX_REDRAWS + 1):
            draw = self._draw(ids, self._uniforms(ids, attempt), REDRAW_FACTOR**attempt)
            if draw is None:
                return None
            key = self.space.keys(draw.population)[0]
            if not self.issued_before(key, i):
                return draw, key
        return None

    def settings(self) -> dict[str, Any]:
        """JSON of what shapes the proposals; part of the run's configuration."""
        return {"name": self.name, "repeats": self.repeats, "quantum": self.quantum}


def no_parents(n: int) -> NDArray[np.int64]:
    """The parents of candidates that have none."""
    return np.full((n, 2), -1, dtype=np.int64)
