"""Brings candidates into their budgets with as few changed elements as a greedy search finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from searchlab.budget import LinearBudget
from searchlab.errors import SpaceError
from searchlab.population import Population
from searchlab.variables import Choice, Integer, Variable

__all__ = ["repair_budgets"]

_MOVES_AT_ONCE = 2**21  # rows x moves held in memory together

Array = NDArray[Any]
Masks = Mapping[str, Array]


@dataclass(frozen=True)
class _Block:
    """All values that the elements of one variable may take, as moves (option, element)."""

    key: str
    variable: Choice | Integer
    first: int  # number of the variable's first element among all elements

    @property
    def options(self) -> NDArray[np.int64]:
        if isinstance(self.variable, Choice):
            return np.arange(len(self.variable.labels))
        return np.arange(self.variable.low, self.variable.high + 1)

    @property
    def elements(self) -> NDArray[np.int64]:
        """The element number of each move."""
        numbers = np.arange(self.first, self.first + self.variable.size)
        return np.tile(numbers, len(self.options))

    @property
    def values(self) -> NDArray[np.int64]:
        """The new value of each move."""
        return np.repeat(self.options, self.variable.size)

    def prices(self, budget: LinearBudget) -> NDArray[np.float64]:
        """What an active element pays after each move, float64 (options, size)."""
        variable, options = self.variable, self.options
        if self.key not in budget.table:
            return np.zeros((len(options), variable.size))
        if isinstance(variable, Choice):
            return budget.choice_table(self.key, variable).T
        unit = np.broadcast_to(budget.table[self.key], variable.shape).reshape(-1)
        table: Array = options[:, None] * unit[None]
        return table


class _Repair:
    """One call of `repair_budgets`."""

    def __init__(
        self,
        variables: Mapping[str, Variable],
        budgets: Sequence[LinearBudget],
        active_of: Callable[[Population], Masks],
        canonicalise: Callable[[Population], Population],
        revive: Callable[[Population, Population, Array], Population],
    ) -> None:
        self.variables = variables
        self.budgets = budgets
        self.active_of = active_of
        self.canonicalise = canonicalise
        self.revive = revive
        self.blocks: list[_Block] = []
        first = 0
        for key, variable in variables.items():
            if isinstance(variable, Choice | Integer) and any(key in b.table for b in budgets):
                self.blocks.append(_Block(key, variable, first))
                first += variable.size
        # Budgets of different units are made comparable by their dearest single entry.
        self.scales = np.array(
            [max(float(np.abs(t).max()) for t in b.table.values()) or 1.0 for b in budgets]
        )
        self.controllers = self._controllers()

    def _controllers(self) -> list[str]:
        """Variables whose change can switch elements that pay, in declaration order."""
        found: set[str] = set()
        open_keys = [block.key for block in self.blocks]
        while open_keys:
            for condition in self.variables[open_keys.pop()].when:
                if condition.variable not in found:
                    found.add(condition.variable)
                    open_keys.append(condition.variable)
        return [key for key in self.variables if key in found]

    def costs(self, population: Population) -> NDArray[np.float64]:
        """Sums, float64 (n, budgets)."""
        active = self.active_of(population)
        return np.stack([b.cost(self.variables, population, active) for b in self.budgets], axis=1)

    def holds(self, costs: Array) -> Array:
        """Whether all budgets hold, over the last axis of sums."""
        flags = np.ones(costs.shape[:-1], dtype=bool)
        for i, budget in enumerate(self.budgets):
            flags &= budget.holds(costs[..., i])
        return flags

    def excess(self, costs: Array) -> Array:
        """How far outside the budgets sums lie, over the last axis; zero only inside all."""
        total = np.zeros(costs.shape[:-1])
        for i, budget in enumerate(self.budgets):
            over = np.maximum(costs[..., i] - budget.upper, 0)
            total += (over + np.maximum(budget.lower - costs[..., i], 0)) / self.scales[i]
        return total

    def error(self, costs: Array) -> SpaceError:
        """Names the first budget that sums (budgets,) of one candidate break."""
        broken = next(i for i, b in enumerate(self.budgets) if not b.holds(costs[i : i + 1])[0])
        budget = self.budgets[broken]
        return SpaceError(
            f"budget {budget.name!r}: no repair found for a sum of {costs[broken]:g}; "
            f"allowed: [{budget.lower}, {budget.upper}]"
        )

    def step(self, population: Population, costs: Array, draw: Array, u: Array) -> Population:
        """One change in every row, none of which is within its budgets; not canonical.

        Args:
            population: canonical rows.
            costs: their sums (n, budgets).
            draw: two uniforms per row: which element, which of its values.
            u: all uniforms of the rows, for ties of the integer program.
        """
        active = self.active_of(population)
        parts, allowed = [], []
        for block in self.blocks:
            flat = population[block.key].reshape(len(population), block.variable.size)
            flags = active[block.key].reshape(flat.shape)
            now = np.stack(
                [
                    b.element_costs(block.key, block.variable, flat, flags)
                    if block.key in b.table
                    else np.zeros(flat.shape)
                    for b in self.budgets
                ],
                axis=-1,
            )
            price = np.stack([block.prices(b) for b in self.budgets], axis=-1)
            delta = price[None] - now[:, None]
            parts.append(delta.reshape(len(flat), -1, len(self.budgets)))
            changed = flat[:, None] != block.options[None, :, None]
            # A change that switches other elements is weighed by `_switch`, with all it does.
            plain = flags & (block.key not in self.controllers)
            allowed.append((plain[:, None] & changed).reshape(len(flat), -1))
        sums = costs[:, None] + np.concatenate(parts, axis=1)
        movable = np.concatenate(allowed, axis=1)
        fits = self.holds(sums) & movable
        elements = np.concatenate([block.elements for block in self.blocks])
        single = fits.any(axis=1)
        move = np.zeros(len(population), dtype=np.int64)
        if single.any():
            move[single] = _draw_move(fits[single], elements, draw[single])
        columns = {key: np.array(column) for key, column in population.columns.items()}
        left = np.where(movable, self.excess(sums), np.inf)
        before = self.excess(costs)
        for row in np.flatnonzero(~single):
            move[row] = np.argmin(left[row])
            better = self._switch(population.take([row]), float(left[row, move[row]]), before[row])
            if better is None and not left[row, move[row]] < before[row]:
                better = self._program(population.take([row]), costs[row], u[row])
                if better is None:
                    raise self.error(costs[row])
            if better is not None:
                move[row] = -1
                for key in columns:
                    columns[key][row] = better[key][0]
        values = np.concatenate([block.values for block in self.blocks])
        for block in self.blocks:
            mine = (elements[move] >= block.first) & (move >= 0)
            mine &= elements[move] < block.first + block.variable.size
            rows = np.flatnonzero(mine)
            flat = columns[block.key].reshape(len(population), block.variable.size)
            flat[rows, elements[move[rows]] - block.first] = values[move[rows]]
            columns[block.key] = flat.reshape(columns[block.key].shape)
        return Population(columns)

    def _switch(self, row: Population, best: float, before: float) -> Population | None:
        """The best change of a controlling element, where it beats every plain change."""
        active = self.active_of(row)
        found = None
        for key in self.controllers:
            moved = self.variables[key].neighbours(row[key][0], active[key][0])
            variable = self.variables[key]
            if isinstance(variable, Integer) and not variable.shape and active[key][0]:
                options = np.arange(variable.low, variable.high + 1)
                moved = options[options != row[key][0]]
            if not len(moved):
                continue
            columns = {k: np.repeat(c, len(moved), axis=0) for k, c in row.columns.items()}
            trial = self.canonicalise(Population({**columns, key: moved}))
            excess = self.excess(self.costs(trial))
            nearest = int(np.argmin(excess))
            if excess[nearest] < min(best, before):
                best = float(excess[nearest])
                found = trial.take([nearest])
        return found

    def _program(self, row: Population, costs: Array, u: Array) -> Population | None:
        """The fewest changes by integer program, at the row's present activity; None = none."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        active = self.active_of(row)
        places: list[tuple[_Block, int, int]] = []  # block, element, present option
        prices = []
        for block in self.blocks:
            if block.key in self.controllers:
                continue
            price = np.stack([block.prices(b) for b in self.budgets], axis=-1)
            flat = row[block.key].reshape(-1)
            for element in np.flatnonzero(active[block.key].reshape(-1)):
                now = int(np.flatnonzero(block.options == flat[element])[0])
                places.append((block, int(element), now))
                prices.append(price[:, element])
        if not places:
            return None
        starts = np.concatenate([[0], np.cumsum([len(part) for part in prices])])
        stays = starts[:-1] + np.array([now for _, _, now in places])
        # Ties are broken by the row's own uniforms, by less than one change in total.
        weight = 1.0 + np.resize(u, starts[-1]) / (2 * len(places))
        weight[stays] = 0.0
        one = np.zeros((len(places), starts[-1]))
        for i in range(len(places)):
            one[i, starts[i] : starts[i + 1]] = 1.0
        table = np.concatenate(prices)
        fixed = costs - table[stays].sum(axis=0)
        lower = np.array([b.lower for b in self.budgets]) - fixed
        upper = np.array([b.upper for b in self.budgets]) - fixed
        answer = milp(
            weight,
            integrality=np.ones(len(weight), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one, 1, 1), LinearConstraint(table.T, lower, upper)],
        )
        if answer.x is None:
            return None
        columns = {key: np.array(column) for key, column in row.columns.items()}
        for i, (block, place, _) in enumerate(places):
            chosen = int(np.argmax(answer.x[starts[i] : starts[i + 1]]))
            columns[block.key].reshape(-1)[place] = block.options[chosen]
        return Population(columns)


def _draw_move(fits: Array, elements: Array, draw: Array) -> Array:
    """One of the moves that fit per row: first an element, then one of its values, uniformly."""
    place_fits = np.zeros((len(fits), int(elements.max()) + 1), dtype=bool)
    rows, moves = np.nonzero(fits)
    place_fits[rows, elements[moves]] = True
    place = _draw_true(place_fits, draw[:, 0])
    return _draw_true(fits & (elements[None] == place[:, None]), draw[:, 1])


def _draw_true(flags: Array, u: Array) -> NDArray[np.int64]:
    """The column of one true flag per row, uniformly; every row has one."""
    wanted = (u * flags.sum(axis=1)).astype(np.int64)
    reached: Array = np.cumsum(flags, axis=1) > wanted[:, None]
    return cast(NDArray[np.int64], reached.argmax(axis=1))


def repair_budgets(
    population: Population,
    u: Array,
    *,
    variables: Mapping[str, Variable],
    budgets: Sequence[LinearBudget],
    active_of: Callable[[Population], Masks],
    canonicalise: Callable[[Population], Population],
    revive: Callable[[Population, Population, Array], Population],
) -> Population:
    """Candidates near the given ones that keep all budgets at once.

    While no single change suffices, the one that comes nearest is made; then one among all that
    suffice is drawn. With one budget, one bound and no conditions that is the smallest number of
    changed elements. Where no change comes nearer, an integer program finds the fewest.

    Args:
        population: canonical candidates.
        u: uniforms (n, width), width >= 2 and even.
        variables: the space's variables.
        budgets: what has to hold, one or more.
        active_of: the space's activity masks.
        canonicalise: the space's canonical spelling.
        revive: (before, after, uniforms) -> after, canonical, with the elements drawn that a
            change made active.

    Raises:
        SpaceError: a row that cannot be brought into the budgets; names the budget and the sum.
    """
    work = _Repair(variables, budgets, active_of, canonicalise, revive)
    costs = work.costs(population)
    outside = np.flatnonzero(~work.holds(costs))
    if not len(outside):
        return population
    moves = sum(block.variable.size * len(block.options) for block in work.blocks)
    chunk = max(1, _MOVES_AT_ONCE // max(1, moves))
    columns = {key: np.array(column) for key, column in population.columns.items()}
    for start in range(0, len(outside), chunk):
        rows = outside[start : start + chunk]
        _repair_rows(work, population.take(rows), costs[rows], u[rows], rows, columns)
    return Population(columns)


def _repair_rows(
    work: _Repair,
    part: Population,
    costs: Array,
    u: Array,
    rows: Array,
    columns: Mapping[str, Array],
) -> None:
    """Repairs some rows and writes them into the columns."""
    width = u.shape[1]
    size = sum(variable.size for variable in work.variables.values())
    for attempt in range(2 * size + 2):
        draw = u[:, [(2 * attempt) % width, (2 * attempt + 1) % width]]
        changed = work.step(part, costs, draw, u)
        # Drawn elements may be dear again, so that late attempts keep the neutral values.
        late = attempt > size
        part = work.canonicalise(changed) if late else work.revive(part, changed, u)
        costs = work.costs(part)
        done = work.holds(costs)
        for key, column in columns.items():
            column[rows[done]] = part[key][done]
        if done.all():
            return
        part, costs, u, rows = part.take(~done), costs[~done], u[~done], rows[~done]
    raise work.error(costs[0])
