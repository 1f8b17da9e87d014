"""CMA-ES with restarts: the package `cma` adapts, counter-based normals sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab._variable import normals
from searchlab.algorithms._coordinates import Coordinates
from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told, no_parents
from searchlab.errors import ConfigError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.uniforms import uniforms

__all__ = ["CMA"]

Array = NDArray[Any]

_RESTARTS = 110  # purpose of the uniforms that a restart's first mean is drawn from
_SMALL = 64  # coordinates below which eight candidates a generation are enough
_LEAST = 4  # candidates a generation
_DOUBLINGS = 9  # the most that restarts do

# When a descent has ended, all in units of the ranges or relative to the losses.
_STEP = 1e-12  # no coordinate has a larger standard deviation
_FLAT = 1e-12  # all best losses of the last generations are this close
_CONDITION = 1e14  # ratio of the largest and smallest variance


class CMA(Algorithm):
    """Covariance matrix adaptation for reals, ordered reals, affine and simplex vectors.

    A generation is `population` candidates that were told one after another; `tell` hands the
    vectors that they were drawn as, and their ranks, to `cma.CMAEvolutionStrategy`. Ranks put
    feasible ones first, then smaller violations, and failed ones last; a generation without any
    success changes nothing. The ends of ranges are bent (see `Coordinates`). What else is moved
    to be valid (sums beyond their bounds, order, predicates) is ranked as if its loss were higher
    by the generation's quartile range x moved**2 / (sigma**2 d), so that the mean stays near.

    The first mean is the best seed, or the middle of all ranges. When a descent has ended (its
    steps are below 1e-12 of the ranges, its best losses have been equal for 10 + 30 d / population
    generations, or the covariance's condition is above 1e14), the next one starts at a random
    candidate with a population twice as large (IPOP), which doubles at most nine times. All of it
    is a function of what was told.

    Source: Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv:1604.00772; restarts: Auger and
    Hansen, CEC 2005. Differs in that penalty and in the starting points.

    Args:
        space, seed, first_id, seeds, repeats: see `Algorithm`; the space as in `Coordinates`.
        population: candidates a generation, 4 or more; None = 8 below 64 coordinates, above
            that 4 + floor(3 ln d).
        workers: the population is rounded up to a multiple of it, so that none idles while the
            others finish a generation.
        sigma: first standard deviation as a fraction of each range.
        restarts: False = one descent only, which goes on whatever happens.

    Raises:
        ConfigError: a space of other variables, or of a single coordinate.
    """

    name: ClassVar[str] = "cma"

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        population: int | None = None,
        workers: int = 1,
        sigma: float = 0.1,
        restarts: bool = True,
    ) -> None:
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds)
        self._coordinates = Coordinates(space, name=self.name)
        d = self._coordinates.size
        if d < 2:
            raise ConfigError(
                f"cma on {d} coordinates; allowed: 2 or more (the algorithm 'es11' takes fewer)"
            )
        if population is not None and population < _LEAST:
            raise ConfigError(f"population {population}; allowed: {_LEAST} or more")
        if workers < 1:
            raise ConfigError(f"workers {workers}; allowed: 1 or more")
        if not 0 < sigma <= 1:
            raise ConfigError(f"sigma {sigma}; allowed: in (0, 1]")
        size = population or (8 if d < _SMALL else 4 + math.floor(3 * math.log(d)))
        self.quantum = -(-size // workers) * workers
        self.max_lag = self.quantum
        self.sigma = sigma
        self.restarts = restarts
        # Seeds fill whole groups; what they leave free is drawn around the middle.
        groups = -(-len(self.seeds.population) // self.quantum)
        self._start = first_id + groups * self.quantum
        self._first = _Best(self._coordinates.centre)
        self._descent: _Descent | None = None
        self._number = 0
        self._waiting = _Rows(np.empty(0, np.int64), space.empty(), np.empty(0), np.empty(0))

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "sigma": self.sigma, "restarts": self.restarts}

    def _width(self) -> int:
        return self._coordinates.size + self.space.repair_width

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        d = self._coordinates.size
        z = normals(u[:, :d]) * strength
        early = ids < self._start
        vectors = np.where(early[:, None], self._coordinates.centre + self.sigma * z, 0.0)
        if not early.all():
            vectors[~early] = self._current().sample(z[~early])
        population = self._coordinates.population(vectors, u[:, d:])
        return Draw(population, ["cma"] * len(ids), no_parents(len(ids)))

    def _learn(self, told: Told) -> None:
        rows = _Rows(told.ids, told.population, told.losses[:, 0], told.violation)
        early = int(np.searchsorted(told.ids, self._start))
        if early:
            self._first.see(rows.part(0, early), self._coordinates)
            self._descent = None  # begins at the best seed, whatever was asked before
        rows = self._waiting.joined(rows.part(early, len(told.ids)))
        done = 0
        while len(rows.ids) - done >= (size := self._size):
            self._learn_generation(rows.part(done, done + size))
            done += size
        self._waiting = rows.part(done, len(rows.ids))

    def _learn_generation(self, rows: _Rows) -> None:
        descent, d = self._current(), self._coordinates.size
        u = self._uniforms(rows.ids, 0)
        vectors = descent.sample(normals(u[:, :d]))
        drawn = self._coordinates.population(vectors, u[:, d:])
        # What was drawn again, or from another generation, is known by its values only.
        same = np.ones(len(rows.ids), dtype=bool)
        for key, column in drawn.columns.items():
            told = rows.population[key]
            same &= (column == told).reshape(len(told), -1).all(axis=1)
        vectors = np.where(same[:, None], vectors, self._coordinates.vectors(rows.population))
        moved = self._coordinates.distances(vectors, rows.population)
        descent.learn(vectors, moved, rows.loss, rows.violation)
        if self.restarts and descent.ended:
            self._number, self._descent = self._number + 1, None

    @property
    def _size(self) -> int:
        """Candidates a generation of the present descent."""
        return int(self.quantum * 2 ** min(self._number, _DOUBLINGS))

    def _current(self) -> _Descent:
        if self._descent is None:
            self._descent = _Descent(self._mean(), self.sigma, self._size)
        return self._descent

    def _mean(self) -> Array:
        """Where the present descent begins."""
        if not self._number:
            return self._first.vector
        u = uniforms(self.seed, _RESTARTS, self._number, 1, self.space.sample_width)
        vector: Array = self._coordinates.vectors(self.space.sample(u))[0]
        return vector


@dataclass(frozen=True)
class _Rows:
    """What was told, row by row."""

    ids: NDArray[np.int64]
    population: Population
    loss: Array
    violation: Array

    def part(self, start: int, stop: int) -> _Rows:
        rows = slice(start, stop)
        return _Rows(
            self.ids[rows], self.population.take(rows), self.loss[rows], self.violation[rows]
        )

    def joined(self, more: _Rows) -> _Rows:
        if not len(self.ids):
            return more
        return _Rows(
            np.concatenate([self.ids, more.ids]),
            Population.concat([self.population, more.population]),
            np.concatenate([self.loss, more.loss]),
            np.concatenate([self.violation, more.violation]),
        )


@dataclass
class _Best:
    """The best success so far, the earlier one of equals; the given vector until there is one."""

    vector: Array
    score: tuple[float, float] = (np.inf, np.inf)

    def see(self, rows: _Rows, coordinates: Coordinates) -> None:
        broken = np.where(np.isinf(rows.loss), np.inf, rows.violation)
        at = int(np.lexsort((rows.loss, broken))[0])
        score = float(broken[at]), float(rows.loss[at])
        if np.isfinite(score[1]) and score < self.score:
            self.vector = coordinates.vectors(rows.population.take([at]))[0]
            self.score = score


@dataclass
class _Descent:
    """One `CMAEvolutionStrategy`, which only ever hears of ranks and never draws by itself."""

    mean: Array
    sigma: float
    size: int
    _bests: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        import cma

        self._z = np.zeros((1, len(self.mean)))
        self._strategy = cma.CMAEvolutionStrategy(
            self.mean,
            self.sigma,
            {
                "popsize": self.size,
                "randn": lambda *shape: self._z.reshape(shape),
                "seed": np.nan,  # leaves numpy's own generator alone
                "conditioncov_alleviate": [0, 0],  # a restart does that
                "verbose": -9,
                "verb_log": 0,
                "verb_disp": 0,
            },
        )
        self._window = 10 + math.ceil(30 * len(self.mean) / self.size)
        self._prepare()

    def _prepare(self) -> None:
        """Lets the strategy do what it does before it samples a generation."""
        self._z = np.zeros((1, len(self.mean)))
        self._strategy.ask(1)

    def sample(self, z: Array) -> Array:
        """Vectors from standard normals (n, d), as the strategy would draw them; changes nothing.

        One row at a time: products of matrices round in another way for other numbers of rows.
        """
        strategy, out = self._strategy, np.empty_like(z)
        for i, row in enumerate(z):
            self._z = row
            step = strategy.sigma_vec * np.asarray(strategy.sm.sample(1))
            out[i] = (strategy.mean + strategy.sigma * step)[0]
        return out

    def learn(self, vectors: Array, moved: Array, loss: Array, violation: Array) -> None:
        """Takes in one generation; `moved` as `Coordinates.distances` gives it."""
        failed = np.isinf(loss)
        if failed.all():
            return
        strategy, plain = self._strategy, loss
        if moved.any():
            low, high = np.percentile(loss[~failed], [25, 75])
            loss = loss + (high - low) * moved / (strategy.sigma**2 * len(self.mean))
        # Failed ones come last whatever they violate.
        order = np.lexsort((loss, np.where(failed, np.inf, violation)))
        rank = np.empty(len(order))
        rank[order] = np.arange(len(order))
        # The package would shorten long steps of solutions that it has not drawn itself.
        strategy.tell(list(vectors), rank.tolist(), check_points=False)
        self._prepare()
        self._bests = [*self._bests[1 - self._window :], float(plain[order[0]])]

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be expected."""
        strategy = self._strategy
        if strategy.sigma * np.sqrt(np.max(strategy.sm.variances)) < _STEP:
            return True
        if strategy.D[-1] > math.sqrt(_CONDITION) * strategy.D[0]:
            return True
        if len(self._bests) < self._window:
            return False
        most, least = max(self._bests), min(self._bests)
        return most - least <= _FLAT * max(abs(most), abs(least))
