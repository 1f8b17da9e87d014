"""Counts, by the sum of one budget, in how many ways its elements can be chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from searchlab.repair import tied_prices
from searchlab.variables import Subset

if TYPE_CHECKING:
    from searchlab.budget import LinearBudget
    from searchlab.space import Space

__all__ = ["SumCounts", "count_one_budget", "sum_counts"]

Array = NDArray[Any]

_MOST_SUMS = 2**15  # different sums that a table of suffixes may hold
_COARSE_SUMS = 2**13
_LARGEST = 2**62


@dataclass(frozen=True)
class SumCounts:
    """For each element, how many choices of the elements from there on have which sum.

    Sums are whole numbers of a grid. Where they are exact, counts and draws are exact too; on a
    coarse grid the window is widened, so that no candidate is lost and some that are drawn do not
    keep the budget. A subset is a row of two-valued elements whose number of members is written
    into high digits of the sum.

    Attributes:
        places: (variable, element in it) per step, in order of the draw.
        prices: whole prices of the options per step.
        sums: sorted sums of the steps from i on; one array more than steps.
        counts: cumulated counts of them with a leading zero, whole numbers of any size.
        window: smallest and largest sum that counts.
        exact: whether the grid is fine enough that every drawn candidate keeps the budget.
    """

    places: tuple[tuple[str, int], ...]
    prices: tuple[NDArray[np.int64], ...]
    sums: tuple[NDArray[np.int64], ...]
    counts: tuple[Array, ...]
    window: tuple[int, int]
    exact: bool

    def _ways(self, step: int, low: Array, high: Array) -> Array:
        """In how many ways the steps from `step` on have a sum in [low, high]."""
        sums, counts = self.sums[step], self.counts[step]
        upper = counts[np.searchsorted(sums, high, side="right")]
        return np.asarray(upper - counts[np.searchsorted(sums, low, side="left")])

    @property
    def total(self) -> int:
        """How many choices lie in the window."""
        low, high = self.window
        return int(self._ways(0, np.array([low]), np.array([high]))[0])

    @property
    def share(self) -> float:
        """Which part of all choices lies in the window; subsets of a wrong size count among all."""
        return self.total / math.prod(len(prices) for prices in self.prices)

    def draw(self, u: Array) -> NDArray[np.int64]:
        """Options (n, steps), each choice in the window as likely as any other; u (n, steps)."""
        out = np.zeros(u.shape, dtype=np.int64)
        low = np.full(len(u), self.window[0])
        high = np.full(len(u), self.window[1])
        for step, prices in enumerate(self.prices):
            ways = self._ways(step + 1, low[:, None] - prices, high[:, None] - prices)
            reached = np.cumsum(ways.astype(np.float64), axis=1)
            # A product with the total may round up to it.
            mark = np.minimum(u[:, step] * reached[:, -1], np.nextafter(reached[:, -1], 0))
            out[:, step] = (reached > mark[:, None]).argmax(axis=1)
            low, high = low - prices[out[:, step]], high - prices[out[:, step]]
        return out


def sum_counts(space: Space, budget: LinearBudget, *, coarse: bool) -> SumCounts | None:
    """The counts of one budget; None with conditions, or too many different sums.

    Args:
        space: the budget's space; its other constraints but the ties are not looked at.
        budget: which one.
        coarse: accept a grid on which sums are rounded.
    """
    prices, free, _ = tied_prices(space.variables, [budget], space.tied)
    if any(space.variables[key].when for key in prices):
        return None
    places, tables = [], []
    for key, table in prices.items():
        for i in np.flatnonzero(free[key]):
            places.append((key, int(i)))
            tables.append(table[:, i, 0])
    least = np.array([table.min() for table in tables])
    base = budget.offset + least.sum()
    extent = float(sum(table.max() for table in tables) - least.sum())
    for exact in (True, False) if coarse else (True,):
        quantum = budget.slip / (4 * len(tables)) if exact else extent / _COARSE_SUMS
        if quantum <= 0 or extent / quantum >= _LARGEST / 4:
            continue
        slack = budget.slip / (2 * quantum) if exact else len(tables) / 2 + 1
        grid = [
            np.rint((table - low) / quantum).astype(np.int64)
            for table, low in zip(tables, least, strict=True)
        ]
        longest = sum(int(part.max()) for part in grid)
        ends = [
            min(max(bound, -1.0), longest + 1.0)
            for bound in (
                (budget.lower - base) / quantum - slack,
                (budget.upper - base) / quantum + slack,
            )
        ]
        low, high = max(0, math.ceil(ends[0])), min(longest, math.floor(ends[1]))
        found = _tables(space, places, grid, (low, high), longest, exact=exact)
        if found is not None:
            return found
    return None


def _tables(
    space: Space,
    places: list[tuple[str, int]],
    grid: list[NDArray[np.int64]],
    window: tuple[int, int],
    longest: int,
    *,
    exact: bool,
) -> SumCounts | None:
    low, high = window
    digit = longest + 1
    for step, (key, i) in enumerate(places):
        variable = space.variables[key]
        if not isinstance(variable, Subset):
            continue
        if i % variable.n == 0 and high >= low:
            low, high = low + digit * variable.k, high + digit * variable.k
        grid[step] = grid[step] + digit * np.arange(2)
        if i % variable.n == variable.n - 1:
            digit *= variable.n + 1
        if digit >= _LARGEST:
            return None
    big = math.prod(len(part) for part in grid) >= _LARGEST
    kind: Any = object if big else np.int64
    sums, counts = np.zeros(1, dtype=np.int64), np.array([1], dtype=kind)
    all_sums, all_counts = [sums], [counts]
    for prices in reversed(grid):
        joined = (sums[:, None] + prices).reshape(-1)
        weights = np.repeat(counts, len(prices))[joined <= high]
        joined = joined[joined <= high]
        if not len(joined):
            sums, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=kind)
        else:
            order = np.argsort(joined, kind="stable")
            sums, first = np.unique(joined[order], return_index=True)
            counts = np.add.reduceat(weights[order], first)
        if len(sums) > _MOST_SUMS:
            return None
        all_sums.append(sums)
        all_counts.append(counts)
    nothing = np.array([0], dtype=kind)
    return SumCounts(
        places=tuple(places),
        prices=tuple(grid),
        sums=tuple(reversed(all_sums)),
        counts=tuple(
            np.concatenate([nothing, np.cumsum(part) if len(part) else part])
            for part in reversed(all_counts)
        ),
        window=(low, high),
        exact=exact,
    )


def count_one_budget(space: Space) -> int | None:
    """How many candidates keep one budget and all ties, or None where that is not all there is."""
    from searchlab.space import Space

    plain = type(space).canonicalise is Space.canonicalise
    conditions = any(variable.when for variable in space.variables.values())
    if not plain or conditions or space.predicates or len(space.budgets) > 1:
        return None
    total, counted = 1, set()
    if space.budgets:
        found = sum_counts(space, space.budgets[0], coarse=False)
        if found is None:
            return None
        total, counted = found.total, {key for key, _ in found.places}
    followers = {number for group in space.tied for number in group[1:]}
    first = 0
    for key, variable in space.variables.items():
        units = range(first, first + variable.size, variable.unit)
        first += variable.size
        if key not in counted:
            assert variable.unit_count is not None
            total *= variable.unit_count ** sum(1 for unit in units if unit not in followers)
    return total
