"""Lists and counts the candidates of a space, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import SpaceError
from searchlab.population import Population

if TYPE_CHECKING:
    from searchlab.budget import LinearBudget
    from searchlab.space import Space
    from searchlab.variables import Variable

__all__ = ["count", "enumerate_space", "list_space"]

Array = NDArray[Any]

_MOST_ELEMENTS = 2**26  # held at once


def count(space: Space, *, limit: int) -> int | None:
    """See `Space.count`."""
    from searchlab._sum_counts import count_one_budget

    if any(variable.unit_count is None for variable in space.variables.values()):
        return None
    exact = count_one_budget(space)
    if exact is not None:
        return exact
    listed = list_space(space, limit=limit)
    return None if listed is None else len(listed)


def enumerate_space(space: Space, *, limit: int) -> Population:
    """See `Space.enumerate`."""
    for key, variable in space.variables.items():
        if variable.unit_count is None:
            raise SpaceError(
                f"{key!r} is a {variable.kind} of any value, which cannot be listed; allowed: "
                "choices, integers, subsets and reals with `step`"
            )
    listed = list_space(space, limit=limit)
    if listed is None:
        raise SpaceError(f"more than {limit} candidates or partial ones; raise `limit`")
    return listed


def list_space(space: Space, *, limit: int) -> Population | None:
    """All feasible candidates, or None where more than `limit` have to be held at once.

    Candidates grow element by element; what no budget allows any more is dropped on the way.
    """
    units = [variable.unit_count for variable in space.variables.values()]
    if any(number is None or number > limit for number in units):
        return None
    limit = min(limit, _MOST_ELEMENTS // space.size)
    followers = {number for group in space.tied for number in group[1:]}
    rooms = [_Room(space, budget, followers) for budget in space.budgets]
    columns: dict[str, Array] = {}
    active: dict[str, Array] = {}
    n, first = 1, 0
    for key, variable in space.variables.items():
        active[key] = space.activity(key, columns, active, n)
        columns[key] = np.full((n, *variable.shape), variable.neutral, dtype=variable.dtype)
        assert variable.unit_count is not None
        for start in range(0, variable.size, variable.unit):
            if first + start in followers:
                continue
            on = active[key].reshape(n, variable.size)[:, start]
            if n + on.sum() * (variable.unit_count - 1) > limit:
                return None
            rows = np.repeat(np.arange(n), np.where(on, variable.unit_count, 1))
            columns = {name: column[rows] for name, column in columns.items()}
            active = {name: flags[rows] for name, flags in active.items()}
            flat = columns[key].reshape(len(rows), variable.size)
            flat[on[rows], start : start + variable.unit] = np.tile(
                variable.unit_values(), (int(on.sum()), 1)
            )
            columns[key] = flat.reshape(len(rows), *variable.shape)
            keep = np.ones(len(rows), dtype=bool)
            for room in rooms:
                keep &= room.leaves(columns, active, key, start + variable.unit)
            columns = {name: column[keep] for name, column in columns.items()}
            active = {name: flags[keep] for name, flags in active.items()}
            n = int(keep.sum())
        first += variable.size
    population = space.canonicalise(Population(columns))
    population = population.take(space.is_feasible(population))
    seen: dict[bytes, int] = {}
    for row, name in enumerate(space.keys(population)):
        seen.setdefault(name, row)
    return population.take(np.array(list(seen.values()), dtype=np.int64))


class _Room:
    """Whether a partial candidate can still be brought into one budget, by bounds."""

    def __init__(self, space: Space, budget: LinearBudget, followers: set[int]) -> None:
        self.budget = budget
        self.variables: Mapping[str, Variable] = space.variables
        self.least: dict[str, Array] = {}
        self.most: dict[str, Array] = {}
        for key in budget.table:
            variable = space.variables[key]
            values = variable.unit_values()
            whole = np.tile(values, (1, variable.size // variable.unit))
            block = whole.reshape(len(values), *variable.shape)
            paid = budget.element_costs(key, variable, block, np.ones(block.shape, dtype=bool))
            units = paid.reshape(len(values), -1, variable.unit).sum(axis=2)
            least, most = units.min(axis=0), units.max(axis=0)
            if variable.when:
                least, most = np.minimum(least, 0), np.maximum(most, 0)
            self.least[key] = np.repeat(least / variable.unit, variable.unit)
            self.most[key] = np.repeat(most / variable.unit, variable.unit)
        # Followers get their values at the end, so that their sums stay open until then.
        self.open: dict[str, Array] = {}
        first = 0
        for key, variable in space.variables.items():
            self.open[key] = np.array([first + i in followers for i in range(variable.size)])
            first += variable.size

    def leaves(
        self, columns: Mapping[str, Array], active: Mapping[str, Array], key: str, done: int
    ) -> NDArray[np.bool_]:
        """Which rows may still fit, when `done` elements of variable `key` are decided."""
        n = len(columns[key])
        least = np.full(n, self.budget.offset)
        most = least.copy()
        passed = False
        for name, variable in self.variables.items():
            if name in self.budget.table:
                decided = ~self.open[name]
                if name == key:
                    decided = decided & (np.arange(variable.size) < done)
                elif passed:
                    decided = np.zeros(variable.size, dtype=bool)
                least += self.least[name][~decided].sum()
                most += self.most[name][~decided].sum()
                if decided.any():
                    paid = self.budget.element_costs(name, variable, columns[name], active[name])
                    sums = paid[:, decided].sum(axis=1)
                    least, most = least + sums, most + sums
            passed |= name == key
        slip = self.budget.slip
        return (least <= self.budget.upper + slip) & (most >= self.budget.lower - slip)
