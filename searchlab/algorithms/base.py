"""The ask/tell contract and the part every algorithm shares: seeds, issued keys, redraws."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError
from searchlab.population import Jobs, Population
from searchlab.space import Space
from searchlab.uniforms import uniforms_of

if TYPE_CHECKING:
    from searchlab.result import Result

__all__ = ["Algorithm", "Draw", "Seeds", "Told"]

MAX_REDRAWS = 8
MOST_AHEAD = 64  # proposals that are drawn in one go where ids are asked for one by one
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

    def baselines(self, start: int, n: int) -> int:
        """How many of n seeds from a place on are baselines."""
        return sum(origin.startswith("baseline") for origin in self.origin[start : start + n])

    def joined(self, more: Seeds) -> Seeds:
        """These seeds and then the others."""
        rows = Population.concat([self.population, more.population])
        return Seeds(rows, (*self.origin, *more.origin))


@dataclass(frozen=True)
class Told:
    """Answers in id order.

    Attributes:
        ids: int64 (n,), increasing over all tells.
        population: the n candidates.
        losses: float64 (n, m), minimised; +inf where not ok.
        violation: float64 (n,), sum of constraint violations, 0 where none.
        predicted: float64 (n, 2), mean and standard deviation of the loss as predicted when each
            row was proposed; NaN or None = no prediction.
        fidelity: int64 (n,), at which of the evaluator's fidelities; None = the stage's own.
    """

    ids: NDArray[np.int64]
    population: Population
    losses: NDArray[np.float64]
    violation: NDArray[np.float64]
    predicted: NDArray[np.float64] | None = None
    fidelity: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Draw:
    """Raw proposals of a subclass: candidates, a word for each, and the parents' ids."""

    population: Population
    origin: Sequence[str]
    parents: NDArray[np.int64]


@dataclass
class _Ahead:
    """Proposals of ids that were not asked for yet, good as long as nothing is learnt."""

    basis: Hashable
    first_id: int
    draw: Draw
    keys: tuple[bytes, ...]


class Algorithm:
    """Proposes candidates; all the state there is comes from `tell`.

    `ask` is a pure function of what was told, of the keys issued and of the ids: there is no
    random state, so a state is rebuilt by one bulk `tell` (`tell(a + b)` equals `tell(a)` then
    `tell(b)`) and `issue` of the keys. Subclasses write `_draw` and `_learn`.

    An algorithm with `levels` chooses the fidelity and the replicate of its jobs, one of each per
    ask group; such a group is always asked for as a whole. The others leave both to the stage.

    Args:
        space: where candidates come from.
        seed: the run's seed.
        first_id: the id at which the stage begins; ids below are none of this algorithm's business.
        seeds: proposed first, in order; repeats among them are dropped.
        repeats: "redraw" (a known candidate is drawn again, up to 8 times, then its id is void) or
            "allow" (published presets: a repeat is a job that the cache answers).

    Attributes:
        min_objectives, max_objectives: how many columns of losses it can make use of; None = any.
        quantum: ids per ask group.
        max_lag: the largest lag under which it works as meant; None = any.
        pools: `_draw` may be given one id many times with different uniforms, cheaply, and then
            gives as many candidates that this id could have been.
        shared: how many of an id's first uniforms say what its candidate is meant for; candidates
            that are compared for one id have these in common.
    """

    name: ClassVar[str] = ""
    levels: bool = False
    pools: bool = True
    min_objectives: ClassVar[int] = 1
    max_objectives: ClassVar[int | None] = 1
    quantum: int = 1
    max_lag: int | None = None
    shared: int = 0

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
        self._ahead: _Ahead | None = None
        self._reach = 1  # how many ids were proposed in one go last

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

    def _basis(self) -> Hashable | None:
        """All that `_draw` makes use of besides its arguments; None = not known.

        Where it is the same as before, a row that was drawn before is still the right one: ids that
        are asked for one by one are then drawn several at once, which costs hardly more than one.
        """
        return None

    def _learn(self, told: Told) -> None:
        """Takes in answers; split-invariant."""

    def _bound(self, population: Population) -> NDArray[np.float64] | None:
        """Losses (n,) beyond which these candidates can change nothing; NaN or None = none."""
        return None

    # -- the contract -----------------------------------------------------------------------

    def check_objectives(self, m: int) -> None:
        """Raises ConfigError where this algorithm does not serve m objectives."""
        if self.max_objectives is not None and m > self.max_objectives:
            raise ConfigError(
                f"algorithm {self.name!r} with {m} objectives; allowed: {self.max_objectives} "
                "(say which objective steers), or nsga2 (two or more), nsga3 (three or more)"
            )
        if m < self.min_objectives:
            raise ConfigError(
                f"algorithm {self.name!r} with {m} objective; allowed: {self.min_objectives} or "
                "more (evolution serves one objective, cma one of real variables)"
            )

    def ask(self, first_id: int, n: int) -> Jobs:
        """Candidates for the ids first_id .. first_id + n - 1.

        Returns:
            Jobs with at most n rows: ids that found nothing new are void and left out. An empty
            answer means that nothing is left to propose.
        """
        ids = np.arange(first_id, first_id + n, dtype=np.int64)
        n_seeds = min(n, max(0, len(self.seeds.population) - (first_id - self.first_id)))
        if n == 1 and not n_seeds and (basis := self._basis()) is not None:
            jobs = self._one_of_many(ids, basis)
        else:
            jobs = self._many(ids, n_seeds)
        jobs = self._without_repeats(jobs, n_seeds)
        bound = self._bound(jobs.population)
        if bound is None:
            return jobs
        baselines = np.array([text.startswith("baseline") for text in jobs.origin], dtype=bool)
        return replace(jobs, bound=np.where(baselines, np.nan, bound))  # those are always measured

    def _many(self, ids: NDArray[np.int64], n_seeds: int) -> Jobs:
        """Seeds and first draws, repeats included."""
        index = ids - self.first_id
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
        return Jobs(
            ids=ids,
            population=population,
            keys=self.space.keys(population) if len(population) else (),
            told_at_ask=self.n_told,
            origin=tuple(origin),
            parents=np.concatenate(parents)[: len(ids)],
        )

    def _one_of_many(self, ids: NDArray[np.int64], basis: Hashable) -> Jobs:
        """The first draw of one id, as a row of several."""
        i, ahead = int(ids[0]), self._ahead
        if ahead is None or not ahead.first_id <= i < ahead.first_id + len(ahead.keys):
            self._reach = min(2 * self._reach, MOST_AHEAD)
            ahead = None
        elif ahead.basis != basis:
            self._reach = max(1, i - ahead.first_id)
            ahead = None
        if ahead is None:
            drawn = np.arange(i, i + self._reach, dtype=np.int64)
            draw = self._draw(drawn, self._uniforms(drawn, 0), 1.0)
            if draw is None:
                return self._many(ids, 0)
            ahead = self._ahead = _Ahead(basis, i, draw, self.space.keys(draw.population))
        row = i - ahead.first_id
        here = slice(row, row + 1)
        return Jobs(
            ids=ids,
            population=ahead.draw.population.take(here),
            keys=ahead.keys[here],
            told_at_ask=self.n_told,
            origin=(ahead.draw.origin[row],),
            parents=ahead.draw.parents[here],
        )

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

    @cached_property
    def _cached_width(self) -> int:
        return self._width()

    def _uniforms(self, ids: NDArray[np.int64], attempt: int) -> NDArray[np.float64]:
        return uniforms_of(self.seed, attempt, ids, self._cached_width)

    def issued_before(self, key: bytes, before: int) -> bool:
        """Whether an id below `before` was given this candidate."""
        first = self._issued.get(key)
        return first is not None and first < before

    def _without_repeats(self, jobs: Jobs, n_seeds: int) -> Jobs:
        issued, keys = self._issued, jobs.keys
        if self.repeats == "redraw":
            ids = jobs.ids.tolist()
            # The lowest row of each key has it, unless a lower id was given it before.
            holder = dict(zip(reversed(keys), range(len(keys) - 1, -1, -1), strict=True))
            if not issued.keys().isdisjoint(holder):
                gone = [k for k, row in holder.items() if k in issued and issued[k] < ids[row]]
                for key in gone:
                    del holder[key]
            if len(holder) < len(keys):
                jobs = self._redraw(jobs, n_seeds, holder)
            issued.update(zip(jobs.keys, jobs.ids.tolist(), strict=True))
            return jobs
        for i, key in zip(jobs.ids.tolist(), keys, strict=True):
            first = issued.setdefault(key, i)
            if first > i:  # a later id of an earlier life of the run
                issued[key] = i
        return jobs

    def _redraw(self, jobs: Jobs, n_seeds: int, holder: dict[bytes, int]) -> Jobs:
        """Draws repeats again, each row up to `MAX_REDRAWS` times, as if row after row.

        A row takes its first attempt that no lower id has. All rows that have none left draw
        another one together; what a lower row takes from a higher one in this way sends the higher
        one on, so that the order in which attempts are looked at changes nothing.

        Args:
            jobs: first attempts.
            n_seeds: rows that are not drawn.
            holder: key -> the row that has it.
        """
        ids, issued = jobs.ids.tolist(), self._issued
        known = issued.get
        rest = [row for row, key in enumerate(jobs.keys) if holder.get(key) != row]
        # Of rows that did not keep their first attempt: all attempts, and the one they stand at.
        attempts = {row: [jobs.keys[row]] for row in rest}
        at = dict.fromkeys(rest, 1)
        waiting = [row for row in rest if row >= n_seeds]
        draws: list[Draw] = []
        source: dict[tuple[int, int], tuple[int, int]] = {}  # (row, attempt) -> draw and its row

        def settle(row: int) -> None:
            while True:
                tried = attempts[row]
                if at[row] == len(tried):
                    if row >= n_seeds and len(tried) <= MAX_REDRAWS:
                        waiting.append(row)
                    return
                key, i = tried[at[row]], ids[row]
                if known(key, i) >= i:
                    other = holder.get(key)
                    if other is None or other > row:
                        holder[key] = row
                        if other is None:
                            return
                        row = other
                        if row not in attempts:
                            attempts[row], at[row] = [jobs.keys[row]], 0
                at[row] += 1

        while waiting:
            groups: dict[int, list[int]] = {}
            for row in sorted(waiting):
                groups.setdefault(len(attempts[row]), []).append(row)
            waiting = []
            for attempt, rows in groups.items():
                some = jobs.ids[rows]
                draw = self._draw(some, self._uniforms(some, attempt), REDRAW_FACTOR**attempt)
                if draw is None:
                    continue  # nothing more to propose: these ids are void
                keys = self.space.keys(draw.population)
                for place, (row, key) in enumerate(zip(rows, keys, strict=True)):
                    attempts[row].append(key)
                    source[row, attempt] = len(draws), place
                draws.append(draw)
                for row, key in zip(rows, keys, strict=True):
                    if key in issued or key in holder:
                        settle(row)
                    else:  # what `settle` comes to for most
                        holder[key] = row
        return _assembled(jobs, attempts, at, source, draws)

    def report(self) -> dict[str, Any]:
        """JSON that a run's result states about the state after the last proposal."""
        return {}

    @staticmethod
    def notes(result: Result) -> list[str]:
        """Sentences on a finished search that belong under its table."""
        return []

    def settings(self) -> dict[str, Any]:
        """JSON of what shapes the proposals; part of the run's configuration."""
        return {"name": self.name, "repeats": self.repeats, "quantum": self.quantum}


def _assembled(
    jobs: Jobs,
    attempts: dict[int, list[bytes]],
    at: dict[int, int],
    source: dict[tuple[int, int], tuple[int, int]],
    draws: list[Draw],
) -> Jobs:
    """The group with the attempt that each row stands at; rows without one are left out."""
    columns = {name: np.array(column) for name, column in jobs.population.columns.items()}
    origin, keys = list(jobs.origin), list(jobs.keys)
    assert jobs.parents is not None
    parents = np.array(jobs.parents)
    moves: list[tuple[list[int], list[int]]] = [([], []) for _ in draws]
    void = []
    for row, attempt in at.items():
        if attempt == len(attempts[row]):
            void.append(row)
            continue
        number, place = source[row, attempt]
        rows, places = moves[number]
        rows.append(row)
        places.append(place)
        origin[row] = draws[number].origin[place]
        keys[row] = attempts[row][attempt]
    for draw, (rows, places) in zip(draws, moves, strict=True):
        if rows:
            for name, column in columns.items():
                column[rows] = draw.population[name][places]
            parents[rows] = draw.parents[places]
    fresh = replace(
        jobs,
        population=Population(columns),
        keys=tuple(keys),
        origin=tuple(origin),
        parents=parents,
    )
    return fresh.take(np.delete(np.arange(len(jobs)), void)) if void else fresh


def no_parents(n: int) -> NDArray[np.int64]:
    """The parents of candidates that have none."""
    return np.full((n, 2), -1, dtype=np.int64)
