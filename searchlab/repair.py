"""Brings candidates into their budgets with as few changed elements as a greedy search finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from searchlab.budget import LinearBudget
from searchlab.errors import SpaceError
from searchlab.population import Population
from searchlab.variables import Choice, Integer, Subset, Variable

__all__ = ["repair_budgets", "tied_prices"]

_MOVES_AT_ONCE = 2**21  # rows x moves held in memory together
_NODES = 500  # of an integer program; a limit by time would not be reproducible
_PROVED_EMPTY = 2  # how the solver says so

Array = NDArray[Any]
Masks = Mapping[str, Array]


@dataclass(frozen=True)
class _Block:
    """The elements of one variable that budgets look at, and all moves that they can make.

    A move of a choice or an integer gives one element another value; a move of a subset exchanges
    a member for one outside.
    """

    key: str
    variable: Choice | Integer | Subset
    first: int  # number of the variable's first element among all elements
    price: NDArray[np.float64]  # (options, size, budgets), tied elements' prices at their leader
    free: NDArray[np.bool_]  # (size,), false for elements that follow another one

    @cached_property
    def options(self) -> NDArray[np.int64]:
        return _options(self.variable)

    @cached_property
    def _pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which element of a subset leaves and which one enters, per move."""
        n = self.variable.unit
        out, into = np.nonzero(~np.eye(n, dtype=bool))
        starts = np.arange(0, self.variable.size, n)[:, None]
        return (starts + out).reshape(-1), (starts + into).reshape(-1)

    @cached_property
    def elements(self) -> NDArray[np.int64]:
        """The number of the element that each move changes (in subsets: that leaves)."""
        if isinstance(self.variable, Subset):
            return self.first + self._pairs[0]
        return np.tile(self.first + np.arange(self.variable.size), len(self.options))

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """The new value of each move; in subsets the number of the element that enters."""
        if isinstance(self.variable, Subset):
            return self.first + self._pairs[1]
        return np.repeat(self.options, self.variable.size)

    def places(self, flat: Array) -> NDArray[np.int64]:
        """The number of the option that stands in each element."""
        if isinstance(self.variable, Integer):
            return ((flat - self.variable.low) // self.variable.step).astype(np.int64)
        return flat.astype(np.int64)

    def moves(self, flat: Array, flags: Array) -> tuple[Array, Array]:
        """What every move adds to the sums (n, moves, budgets), and whether it is one."""
        if isinstance(self.variable, Subset):
            out, into = self._pairs
            added = self.price[1, into] - self.price[1, out]
            can = (flat[:, out] > 0) & (flat[:, into] == 0) & flags[:, out] & flags[:, into]
            return np.broadcast_to(added, (len(flat), *added.shape)), can
        now = self.price[self.places(flat), np.arange(self.variable.size)]
        delta = self.price[None] - now[:, None]
        changed = flat[:, None] != self.options[None, :, None]
        can = (flags & self.free)[:, None] & changed
        return delta.reshape(len(flat), -1, delta.shape[-1]), can.reshape(len(flat), -1)

    def make(self, flat: Array, rows: Array, moves: Array) -> None:
        """Makes one move, numbered within the block, in each of these rows."""
        if isinstance(self.variable, Subset):
            flat[rows, self._pairs[0][moves]] = 0
            flat[rows, self._pairs[1][moves]] = 1
        else:
            flat[rows, self.elements[moves] - self.first] = self.targets[moves]


def _options(variable: Choice | Integer | Subset) -> NDArray[np.int64]:
    if isinstance(variable, Choice):
        return np.arange(len(variable.labels))
    if isinstance(variable, Subset):
        return np.arange(2)
    return np.arange(variable.low, variable.high + 1, variable.step)


def option_prices(
    key: str, variable: Choice | Integer | Subset, budgets: Sequence[LinearBudget]
) -> NDArray[np.float64]:
    """What an active element pays per option, float64 (options, size, budgets)."""
    options, parts = _options(variable), []
    for budget in budgets:
        if key not in budget.table:
            parts.append(np.zeros((len(options), variable.size)))
        elif isinstance(variable, Choice):
            parts.append(budget.choice_table(key, variable).T)
        else:
            parts.append(options[:, None] * budget.unit_costs(key, variable)[None])
    return np.stack(parts, axis=-1)


def tied_prices(
    variables: Mapping[str, Variable],
    budgets: Sequence[LinearBudget],
    tied: Sequence[Sequence[int]],
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.bool_]], dict[str, int]]:
    """Prices by variable, tied elements' at their leader; which elements are free; first numbers.

    Only variables that budgets look at, directly or through a tie, are in there.
    """
    first, start = {}, 0
    for key, variable in variables.items():
        first[key] = start
        start += variable.size
    owner = {first[key] + i: (key, i) for key, v in variables.items() for i in range(v.size)}
    wanted = {key for budget in budgets for key in budget.table}
    for group in tied:
        if wanted & {owner[number][0] for number in group}:
            wanted.add(owner[group[0]][0])
    prices, free = {}, {}
    for key, variable in variables.items():
        if key in wanted and isinstance(variable, Choice | Integer | Subset):
            prices[key] = np.array(option_prices(key, variable, budgets))
            free[key] = np.ones(variable.size, dtype=bool)
    for leader, *others in tied:
        home, place = owner[leader]
        for other in others:
            key, inner = owner[other]
            if key in prices:
                prices[home][:, place] += prices[key][:, inner]
                free[key][inner] = False
    return prices, free, first


class _Repair:
    """One call of `repair_budgets`."""

    def __init__(
        self,
        variables: Mapping[str, Variable],
        budgets: Sequence[LinearBudget],
        active_of: Callable[[Population], Masks],
        canonicalise: Callable[[Population], Population],
        revive: Callable[[Population, Population, Array], Population],
        tied: Sequence[Sequence[int]],
    ) -> None:
        self.variables = variables
        self.budgets = budgets
        self.active_of = active_of
        self.canonicalise = canonicalise
        self.revive = revive
        prices, free, first = tied_prices(variables, budgets, tied)
        self.blocks: list[_Block] = []
        for key, variable in variables.items():
            if key in prices and isinstance(variable, Choice | Integer | Subset):
                self.blocks.append(_Block(key, variable, first[key], prices[key], free[key]))
        self.conditional = any(variable.when for variable in variables.values())
        # One bound with one condition-free sum is brought down in the fewest changes by greed.
        self.greedy_is_least = not self.conditional and len(budgets) == 1
        self.greedy_is_least &= any(not np.isfinite(end) for b in budgets for end in _ends(b))
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
            added, can = block.moves(flat, active[block.key].reshape(flat.shape))
            parts.append(added)
            # A change that switches other elements is weighed by `_switch`, with all it does.
            allowed.append(can & (block.key not in self.controllers))
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
                better = self.program(population.take([row]), costs[row], u[row])
                if better is None:
                    raise self.error(costs[row])
            if better is not None:
                move[row] = -1
                for key in columns:
                    columns[key][row] = better[key][0]
        start = 0
        for block in self.blocks:
            rows = np.flatnonzero((move >= start) & (move < start + len(block.elements)))
            flat = columns[block.key].reshape(len(population), block.variable.size)
            block.make(flat, rows, move[rows] - start)
            columns[block.key] = flat.reshape(columns[block.key].shape)
            start += len(block.elements)
        return Population(columns)

    def _switch(self, row: Population, best: float, before: float) -> Population | None:
        """The best change of a controlling element, where it beats every plain change."""
        active = self.active_of(row)
        found = None
        for key in self.controllers:
            moved = self.variables[key].neighbours(row[key][0], active[key][0])
            variable = self.variables[key]
            if isinstance(variable, Integer) and not variable.shape and active[key][0]:
                options = _options(variable)
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

    def by_trial(self, row: Population) -> Population | None:
        """The best change again and again, each weighed in its canonical spelling; None = stuck.

        Prices alone do not show that a spelling undoes a change: moves that look right are then
        drawn without end.
        """
        before = float(self.excess(self.costs(row))[0])
        while before > 0:
            active = self.active_of(row)
            trials = []
            for block in self.blocks:
                flat = row[block.key].reshape(1, -1)
                _, can = block.moves(flat, active[block.key].reshape(flat.shape))
                moves = np.flatnonzero(can[0])
                columns = {k: np.repeat(c, len(moves), axis=0) for k, c in row.columns.items()}
                spread = columns[block.key].reshape(len(moves), flat.shape[1])
                block.make(spread, np.arange(len(moves)), moves)
                columns[block.key] = spread.reshape(columns[block.key].shape)
                trials.append(self.canonicalise(Population(columns)))
            every = Population.concat(trials)
            excess = self.excess(self.costs(every))
            if not len(excess) or not excess.min() < before:
                return None
            before = float(excess.min())
            row = every.take([int(np.argmin(excess))])
        return row

    def program(self, row: Population, costs: Array, u: Array) -> Population | None:
        """The fewest changes by integer program, at the row's present activity; None = none.

        Raises:
            SpaceError: without conditions, when the program proves that nothing keeps the budgets.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        active = self.active_of(row)
        places: list[tuple[_Block, int, int]] = []  # block, element, present option
        prices, changes, groups = [], [], []
        for block in self.blocks:
            if block.key in self.controllers:
                continue
            flat, flags = row[block.key].reshape(-1), active[block.key].reshape(-1)
            now = block.places(flat)
            unit = block.variable.unit
            for element in np.flatnonzero(flags & block.free):
                if isinstance(block.variable, Subset) and element % unit == 0:
                    groups.append((len(places), unit, block.variable.k))
                places.append((block, int(element), int(now[element])))
                prices.append(block.price[:, element])
                # An exchange of two members is one change.
                changes.append(0.5 if isinstance(block.variable, Subset) else 1.0)
        if not places:
            return None
        starts = np.concatenate([[0], np.cumsum([len(part) for part in prices])])
        stays = starts[:-1] + np.array([now for _, _, now in places])
        # Ties are broken by the row's own uniforms, by less than one change in total.
        weight = np.repeat(changes, np.diff(starts))
        weight = weight + np.resize(u, starts[-1]) / (4 * len(places))
        weight[stays] = 0.0
        one = np.zeros((len(places) + len(groups), starts[-1]))
        for i in range(len(places)):
            one[i, starts[i] : starts[i + 1]] = 1.0
        for i, (place, unit, _) in enumerate(groups):
            one[len(places) + i, starts[place : place + unit] + 1] = 1.0
        sizes = np.array([1] * len(places) + [k for _, _, k in groups])
        # Every budget in units of its largest price, as the solver's tolerances are absolute.
        table = np.concatenate(prices) / self.scales
        fixed = costs / self.scales - table[stays].sum(axis=0)
        ends = np.array([_ends(b) for b in self.budgets]).T / self.scales - fixed
        slip = np.array([b.slip for b in self.budgets]) / self.scales
        found = None
        for margin in (-slip, np.full(len(slip), 2e-6)):
            answer = milp(
                weight,
                integrality=np.ones(len(weight), dtype=np.int64),
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(one, sizes, sizes),
                    LinearConstraint(table.T, ends[0] + margin, ends[1] - margin),
                ],
                options={"node_limit": _NODES},
            )
            if answer.status == _PROVED_EMPTY and found is None and not self.conditional:
                raise self.proof()
            if answer.x is None:
                break
            columns = {key: np.array(column) for key, column in row.columns.items()}
            for i, (block, place, _) in enumerate(places):
                chosen = int(np.argmax(answer.x[starts[i] : starts[i + 1]]))
                columns[block.key].reshape(-1)[place] = block.options[chosen]
            found = Population(columns)
            # Within the solver's tolerance is not always within ours.
            if self.holds(self.costs(self.canonicalise(found)))[0]:
                break
        return found

    def proof(self) -> SpaceError:
        """The error for budgets that no candidate keeps."""
        names = ", ".join(repr(budget.name) for budget in self.budgets)
        return SpaceError(
            f"budget {names}: no candidate keeps {'them all' if len(self.budgets) > 1 else 'it'} "
            "(proved by an integer program); allowed: budgets that leave one candidate or more"
        )

    def changes(self, before: Population, after: Population) -> NDArray[np.float64]:
        """How many elements differ per row; an exchange of two members counts once."""
        total = np.zeros(len(before))
        for block in self.blocks:
            differ = (before[block.key] != after[block.key]).reshape(len(before), -1)
            weight = 0.5 if isinstance(block.variable, Subset) else 1.0
            total += weight * (differ & block.free).sum(axis=1)
        return total

    def fewest(self, before: Population, after: Population, u: Array) -> Population:
        """Exchanges repairs of more than three changes for ones that an integer program finds.

        No single change sufficed for them, so that up to three are at most one too many.
        """
        if self.greedy_is_least or self.conditional:
            return after
        columns = {key: np.array(column) for key, column in after.columns.items()}
        for row in np.flatnonzero(self.changes(before, after) > 3):
            one = before.take([row])
            better = self.program(one, self.costs(one)[0], u[row])
            if better is None:
                continue
            better = self.canonicalise(better)
            if not self.holds(self.costs(better))[0]:
                continue
            if self.changes(one, better)[0] < self.changes(one, after.take([row]))[0]:
                for key, column in columns.items():
                    column[row] = better[key][0]
        return Population(columns)


def _ends(budget: LinearBudget) -> tuple[float, float]:
    return budget.lower, budget.upper


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
    tied: Sequence[Sequence[int]] = (),
    fewest: bool = True,
) -> Population:
    """Candidates near the given ones that keep all budgets at once.

    While no single change suffices, the one that comes nearest is made; then one among all that
    suffice is drawn. With one budget, one bound and no conditions that is the smallest number of
    changed elements. Where no change comes nearer, and where more than three were needed without
    conditions, an integer program finds the fewest: repairs without conditions change at most one
    element more than necessary.

    Args:
        population: canonical candidates.
        u: uniforms (n, width), width >= 2 and even.
        variables: the space's variables.
        budgets: what has to hold, one or more.
        active_of: the space's activity masks.
        canonicalise: the space's canonical spelling.
        revive: (before, after, uniforms) -> after, canonical, with the elements drawn that a
            change made active.
        tied: groups of element numbers with equal values, which `canonicalise` sees to.
        fewest: whether long repairs are compared with an integer program's; random candidates
            have nothing to keep.

    Raises:
        SpaceError: budgets that no candidate keeps, if that is proved (without conditions);
            otherwise a row that cannot be brought into them, by the budget and the sum.
    """
    work = _Repair(variables, budgets, active_of, canonicalise, revive, tied)
    costs = work.costs(population)
    outside = np.flatnonzero(~work.holds(costs))
    if not len(outside):
        return population
    moves = sum(len(block.elements) for block in work.blocks)
    chunk = max(1, _MOVES_AT_ONCE // max(1, moves))
    columns = {key: np.array(column) for key, column in population.columns.items()}
    for start in range(0, len(outside), chunk):
        rows = outside[start : start + chunk]
        part = population.take(rows)
        local = {key: np.array(column) for key, column in part.columns.items()}
        _repair_rows(work, part, costs[rows], u[rows], np.arange(len(rows)), local)
        done = Population(local)
        done = work.fewest(part, done, u[rows]) if fewest else done
        for key, column in columns.items():
            column[rows] = done[key]
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
    for i, row in enumerate(rows):
        better = work.by_trial(part.take([i]))
        if better is None:
            better = work.program(part.take([i]), costs[i], u[i])
        better = None if better is None else work.canonicalise(better)
        if better is None or not work.holds(work.costs(better))[0]:
            raise work.error(costs[i])
        for key, column in columns.items():
            column[row] = better[key][0]
