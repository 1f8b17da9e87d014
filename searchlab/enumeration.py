"""Lists and counts the candidates of a space, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import SpaceError
from searchlab.population import Population
from searchlab.repair import tied_prices

if TYPE_CHECKING:
    from searchlab.space import Space

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
    budgets = space.budgets
    steps = _steps(space)
    slips = np.array([budget.slip for budget in budgets])
    upper = np.array([budget.upper for budget in budgets]) + slips
    lower = np.array([budget.lower for budget in budgets]) - slips
    # What the steps from each one on cost at least and at most.
    least = np.cumsum([step.costs.min(axis=0) for step in reversed(steps)], axis=0)[::-1]
    most = np.cumsum([step.costs.max(axis=0) for step in reversed(steps)], axis=0)[::-1]
    nothing = np.zeros((1, len(budgets)))
    least, most = np.concatenate([least, nothing]), np.concatenate([most, nothing])
    sums = np.array([[budget.offset for budget in budgets]])
    columns: dict[str, Array] = {}
    active: dict[str, Array] = {}
    for number, step in enumerate(steps):
        variable, n = space.variables[step.key], len(sums)
        for key, other in space.variables.items():
            if key not in columns:
                # Every variable before this one is decided, so that its activity is known.
                active[key] = space.activity(key, columns, active, n)
                columns[key] = np.full((n, *other.shape), other.neutral, dtype=other.dtype)
            if key == step.key:
                break
        on = active[step.key].reshape(n, variable.size)[:, step.start]
        options = len(step.values)
        if n + on.sum() * (options - 1) > limit:
            return None
        rows = np.repeat(np.arange(n), np.where(on, options, 1))
        paid = np.zeros((len(rows), len(budgets)))
        paid[on[rows]] = np.tile(step.costs[:options], (int(on.sum()), 1))
        sums = sums[rows] + paid
        fits = (sums + least[number + 1] <= upper) & (sums + most[number + 1] >= lower)
        keep = fits.all(axis=1)
        rows, sums, taken = rows[keep], sums[keep], on[rows][keep]
        values = np.zeros((len(keep), variable.unit), dtype=variable.dtype)
        values[on[np.repeat(np.arange(n), np.where(on, options, 1))]] = np.tile(
            step.values, (int(on.sum()), 1)
        )
        columns = {name: column[rows] for name, column in columns.items()}
        active = {name: flags[rows] for name, flags in active.items()}
        flat = columns[step.key].reshape(len(rows), variable.size)
        flat[taken, step.start : step.start + variable.unit] = values[keep][taken]
        columns[step.key] = flat.reshape(len(rows), *variable.shape)
    for key, other in space.variables.items():
        if key not in columns:  # all of it follows others
            columns[key] = np.full((len(sums), *other.shape), other.neutral, dtype=other.dtype)
    population = space.canonicalise(Population(columns))
    population = population.take(space.is_feasible(population))
    seen: dict[bytes, int] = {}
    for row, name in enumerate(space.keys(population)):
        seen.setdefault(name, row)
    return population.take(np.array(list(seen.values()), dtype=np.int64))


@dataclass(frozen=True)
class _Step:
    """One unit that is decided at a time.

    Attributes:
        key: its variable.
        start: its first element.
        values: what it may be, (options, unit).
        costs: what each option adds to the budgets, (options, budgets); a row of zeros more where
            it may be inactive.
    """

    key: str
    start: int
    values: Array
    costs: NDArray[np.float64]


def _steps(space: Space) -> list[_Step]:
    """The units of a space but those that follow others, in order of declaration."""
    followers = {number for group in space.tied for number in group[1:]}
    prices = tied_prices(space.variables, space.budgets, space.tied)[0] if space.budgets else {}
    steps, first = [], 0
    for key, variable in space.variables.items():
        values = variable.unit_values()
        for start in range(0, variable.size, variable.unit):
            if first + start in followers:
                continue
            costs = np.zeros((len(values), len(space.budgets)))
            if key in prices:
                part = prices[key][:, start : start + variable.unit]
                costs = values @ part[1] if variable.grouped else part[:, 0]
            if variable.when:
                costs = np.concatenate([costs, np.zeros((1, costs.shape[1]))])
            steps.append(_Step(key, start, values, costs))
        first += variable.size
    return steps
