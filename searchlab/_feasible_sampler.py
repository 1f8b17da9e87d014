"""Random candidates of a constrained space, as evenly as can be afforded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from searchlab._sum_counts import SumCounts, sum_counts
from searchlab.enumeration import list_space
from searchlab.errors import SpaceError
from searchlab.population import Population
from searchlab.uniforms import derived
from searchlab.variables import Integer

if TYPE_CHECKING:
    from searchlab.space import Space

__all__ = ["FeasibleSampler", "feasible_sampler"]

Array = NDArray[Any]

_MOST_LISTED = 5_000
_MOST_PARTIAL = 50_000  # partial candidates held while a list is made
_TRIES = 64


class FeasibleSampler(Protocol):
    """Replaces random candidates (n rows) of uniforms (n, sample_width) by feasible ones.

    1. One budget without conditions: sums are counted, and every choice of its elements that
       keeps it is equally likely.
    2. At most 5,000 candidates that are quickly listed: each is equally likely.
    3. Otherwise the tightest budget is counted, on a rounded grid if need be, and what breaks any
       budget is drawn again up to 64 times; the rest is left to the repair.

    With conditions that cannot be listed, or with variables that are drawn unevenly on purpose
    (`log`), candidates are drawn variable by variable and repaired.
    """

    def __call__(self, population: Population, u: Array) -> Population: ...


def feasible_sampler(space: Space) -> FeasibleSampler | None:
    """The way to sample a space, or None for plain draws and repairs.

    Raises:
        SpaceError: no candidate keeps the constraints.
    """
    variables = space.variables.values()
    conditions = any(variable.when for variable in variables)
    names = [repr(budget.name) for budget in space.budgets]
    names += [repr(predicate.name) for predicate in space.predicates]
    paying = {key for budget in space.budgets for key in budget.table}
    even = all(space.variables[key].uniform for key in paying)
    if len(space.budgets) == 1 and not (conditions or space.predicates) and even:
        counts = sum_counts(space, space.budgets[0], coarse=False)
        if counts is not None:
            if not counts.total:
                raise SpaceError(
                    f"budget {names[0]}: no candidate keeps it (all sums were counted)"
                )
            return _ByCounts(space, counts)
    if all(variable.uniform and variable.unit_count is not None for variable in variables):
        listed = list_space(space, limit=_MOST_PARTIAL)
        if listed is not None and not len(listed):
            raise SpaceError(
                f"no candidate keeps the constraints {', '.join(names)} (all were looked at)"
            )
        if listed is not None and len(listed) <= _MOST_LISTED:
            return _ByList(listed)
    if not even:
        return None
    found = [sum_counts(space, budget, coarse=True) for budget in space.budgets]
    usable = [counts for counts in found if counts is not None]
    if not usable:
        return None
    return _ByCounts(space, min(usable, key=lambda counts: counts.share))


class _ByList:
    """Rows of a list."""

    def __init__(self, listed: Population) -> None:
        self.listed = listed

    def __call__(self, population: Population, u: Array) -> Population:
        return self.listed.take((u[:, 0] * len(self.listed)).astype(np.int64))


class _ByCounts:
    """Options of one budget's elements by counts, drawn again where another budget breaks."""

    def __init__(self, space: Space, counts: SumCounts) -> None:
        self.space = space
        self.counts = counts
        self.sure = counts.exact and len(space.budgets) == 1
        self.starts: dict[str, int] = {}
        start = 0
        for key, variable in space.variables.items():
            self.starts[key] = start
            start += variable.width

    def __call__(self, population: Population, u: Array) -> Population:
        if not self.counts.total:
            raise SpaceError("no candidate keeps the budgets (all sums were counted)")
        columns = {key: np.array(column) for key, column in population.columns.items()}
        rows = np.arange(len(population))
        for attempt in range(1 if self.sure else _TRIES):
            fresh = u[rows] if not attempt else derived(u[rows], attempt, u.shape[1])
            part = population.take(rows) if not attempt else self._plain(population, rows, fresh)
            part = self._drawn(part, fresh)
            for key, column in columns.items():
                column[rows] = part[key]
            if self.sure:
                break
            active = self.space.active(part)
            ok = np.ones(len(rows), dtype=bool)
            for budget in self.space.budgets:
                ok &= budget.holds(budget.cost(self.space.variables, part, active))
            rows = rows[~ok]
            if not len(rows):
                break
        return Population(columns)

    def _plain(self, population: Population, rows: Array, u: Array) -> Population:
        """New draws of the variables that have no condition."""
        columns = dict(population.take(rows).columns)
        for key, variable in self.space.variables.items():
            if not variable.when:
                start = self.starts[key]
                columns[key] = variable.sample(u[:, start : start + variable.width])
        return Population(columns)

    def _drawn(self, population: Population, u: Array) -> Population:
        """The elements of the counted budget drawn by counts."""
        own = [self.starts[key] + i for key, i in self.counts.places]
        options = self.counts.draw(u[:, own])
        columns = {key: np.array(column) for key, column in population.columns.items()}
        for step, (key, i) in enumerate(self.counts.places):
            variable = self.space.variables[key]
            value = options[:, step]
            if isinstance(variable, Integer):
                value = variable.low + variable.step * value
            columns[key].reshape(len(u), variable.size)[:, i] = value
        return self.space.canonicalise(Population(columns))
