"""The exact optimum of a separable program with one budget, with a certificate.

With a multiplier m of the budget, every label of every element has a *reduced loss*: what it loses
under loss + m * cost beyond the element's best label. The loss of a plan within the budget is then
exactly

    bound + sum of its reduced losses + m * (budget left over),

all three terms of which are at least their value in the bound. So a plan that is better than
bound + G can only take labels of reduced loss below G, must spend nearly the whole budget, and is
found by dynamic programming over the few elements that have a choice left. G starts small and grows
until a plan turns up (which then is optimal) or nothing better than the rounded relaxation is left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab._hull import Hull, hull_of

__all__ = ["Found", "Whole", "solve_one_budget", "whole_units"]

Array = NDArray[Any]

MOST_STATES = 1_500_000  # of one step of the dynamic program; beyond, HiGHS takes the core
GROWTH = 4.0
FIRST_SHARE = 2.0**-12  # of the gap of the rounded relaxation


@dataclass(frozen=True)
class Found:
    """A plan with a proof of how good it is.

    Attributes:
        labels: int64 (e,); None = no plan keeps the budget.
        bound: no plan within the budget loses less.
        price: the multiplier of the budget (of each budget), loss per unit of cost.
    """

    labels: NDArray[np.int64] | None
    bound: float
    price: Any


@dataclass(frozen=True)
class Whole:
    """Costs as multiples of one unit, each element's cheapest label at zero.

    Attributes:
        costs: int64 (e, k), or float64 where the costs have no common unit.
        lower, upper: bounds of the sum, in the same units.
        unit: what one is worth.
    """

    costs: NDArray[Any]
    lower: float
    upper: float
    unit: float


def whole_units(costs: Array, allowed: Array, lower: float, upper: float, slip: float) -> Whole:
    """Costs relative to each element's cheapest label, in their greatest common unit."""
    least = np.where(allowed, costs, np.inf).min(axis=1, keepdims=True)
    base = float(least.sum())
    over = np.where(allowed, costs - least, 0.0)
    low, high = lower - slip - base, upper + slip - base
    whole = np.array_equal(over, np.rint(over)) and over.max(axis=1).sum() < 2**52
    if not whole or not np.array_equal(least, np.rint(least)):
        return Whole(over, low, high, 1.0)
    units = over.astype(np.int64)
    unit = int(np.gcd.reduce(units, axis=None)) or 1
    return Whole(units // unit, np.ceil(low / unit), np.floor(high / unit), float(unit))


def solve_one_budget(losses: Array, costs: Whole, gap: float) -> Found:
    """The plan of least loss whose cost is within the bounds.

    Args:
        losses: float64 (e, k), each row's least is 0; +inf where a label is not allowed.
        costs: of the same shape.
        gap: how much more than the optimum, relative, the answer may lose.
    """
    hull = hull_of(losses, costs.costs)
    if hull.added[-1] > costs.upper or costs.lower <= 0:
        return _solve(losses, costs, hull, gap)
    if hull.added[-1] >= costs.lower:
        return _solve(losses, costs, hull, gap)
    # Too cheap where nothing presses: the lower bound is the one that binds.
    mirrored = _mirrored(losses, costs)
    found = _solve(losses, mirrored, hull_of(losses, mirrored.costs), gap)
    return Found(found.labels, found.bound, -found.price)


def _mirrored(losses: Array, costs: Whole) -> Whole:
    allowed = np.isfinite(losses)
    most = np.where(allowed, costs.costs, 0).max(axis=1, keepdims=True)
    total = float(most.sum())
    over = np.where(allowed, most - costs.costs, 0)
    return Whole(over, total - costs.upper, total - costs.lower, costs.unit)


def _solve(losses: Array, costs: Whole, hull: Hull, gap: float) -> Found:
    """With the upper bound binding, or none."""
    own = np.arange(len(losses))
    split = int(np.searchsorted(hull.added, costs.upper, side="right")) - 1
    if split < 0:
        return Found(None, np.inf, 0.0)
    base = hull.plans(np.array([split]))[0]
    spent = costs.costs[own, base].sum()
    price = float(hull.price[split]) if split < len(hull.price) else 0.0
    loss = float(losses[own, base].sum())
    left = float(costs.upper - spent)
    kept = bool(spent >= costs.lower)
    bound = loss - price * left if price else loss
    if kept and loss - bound <= gap * loss:
        return Found(base, bound, price)
    reduced = _reduced(losses, costs.costs, base, price)
    most = loss - bound if kept else np.inf  # what a better plan is within
    extent = np.where(np.isfinite(reduced), reduced, 0).max(axis=1).sum()
    widest = float(extent + price * (costs.upper + np.abs(costs.costs).sum())) * (1 + 1e-9)
    window = most * FIRST_SHARE if kept else max(loss, widest * 1e-9, 1e-300) * FIRST_SHARE
    begun = False
    while True:
        window = min(window, most, widest)
        core = _Core(reduced, costs, base, price, window)
        found = core.run()
        if found is not None:
            return Found(found, float(losses[own, found].sum()), price)
        if core.overflowed:
            proved = bound + (window / GROWTH if begun else 0.0)
            answer = _by_highs(np.where(reduced <= most, losses, np.inf), costs, base, most, proved)
            return replace(answer, price=price)
        if window >= most or (kept and most - window <= gap * loss):
            return Found(base, bound + window, price)
        if window >= widest:
            return Found(None, np.inf, price)
        window, begun = window * GROWTH, True


def _reduced(losses: Array, costs: Array, base: Array, price: float) -> Array:
    """Reduced losses, zero for the labels of the relaxation."""
    own = np.arange(len(losses))
    away = np.where(np.isfinite(losses), costs - costs[own, base][:, None], 0)
    out = np.maximum(losses - losses[own, base][:, None] + price * away, 0.0)
    out[own, base] = 0.0
    return out


class _Core:
    """Dynamic programming over plans of reduced loss (and unspent budget) within a window.

    Args:
        reduced: float64 (e, k), reduced losses.
        costs: see `Whole`.
        base: the plan of reduced loss zero that the search departs from.
        price: the multiplier.
        window: only plans within it are looked for.
    """

    def __init__(
        self, reduced: Array, costs: Whole, base: Array, price: float, window: float
    ) -> None:
        self.base, self.price = base, price
        self.window = window * (1 + 1e-12)
        own = np.arange(len(base))
        spent = costs.costs[own, base].sum()
        self.left = costs.upper - spent
        self.short = costs.lower - spent
        near = reduced <= self.window
        near[own, base] = True
        rows = np.flatnonzero(near.sum(axis=1) > 1)
        moves = []
        for row in rows.tolist():
            labels = np.flatnonzero(near[row])
            away = costs.costs[row, labels] - costs.costs[row, base[row]]
            moves.append((row, labels, away, reduced[row, labels]))
        # Wide moves first: states stay few while they are coarse.
        moves.sort(key=lambda move: (-float(np.abs(move[2]).max()), move[0]))
        self.moves = moves
        self.overflowed = False

    def run(self) -> NDArray[np.int64] | None:
        """The best plan within the window, None where there is none."""
        reach = self._reach()
        dtype = self.moves[0][2].dtype if self.moves else np.float64
        at, lost = np.zeros(1, dtype=dtype), np.zeros(1)
        trail: list[tuple[Array, Array]] = []
        for number, (_, labels, away, extra) in enumerate(self.moves):
            low, high = reach[number + 1]
            places = (at[:, None] + away[None]).ravel()
            sums = (lost[:, None] + extra[None]).ravel()
            fits = places + low <= self.left
            fits &= places + high >= self.short
            unspent = np.maximum(self.left - places - high, 0.0) * self.price
            fits &= sums + unspent <= self.window
            keep = np.flatnonzero(fits)
            keep = keep[np.lexsort((sums[keep], places[keep]))]
            keep = self._undominated(keep, places, sums)
            if not len(keep):
                return None
            if len(keep) > MOST_STATES:
                self.overflowed = True
                return None
            at, lost = places[keep], sums[keep]
            width = len(labels)
            trail.append((keep // width, labels[keep % width]))
        total = lost + self.price * (self.left - at)
        good = np.flatnonzero((at <= self.left) & (at >= self.short) & (total <= self.window))
        if not len(good):
            return None
        state = int(good[np.argmin(total[good])])
        out = self.base.copy()
        for (row, *_), (parent, label) in zip(reversed(self.moves), reversed(trail), strict=True):
            out[row] = label[state]
            state = int(parent[state])
        return out

    def _reach(self) -> list[tuple[float, float]]:
        """By how much the moves from each one on can change the cost, least and most."""
        out = [(0.0, 0.0)]
        for _, _, away, _ in reversed(self.moves):
            low, high = out[-1]
            out.append((low + float(away.min()), high + float(away.max())))
        return out[::-1]

    def _undominated(self, keep: Array, places: Array, sums: Array) -> Array:
        """Of states sorted by cost, those that no other is at least as good as."""
        if not len(keep):
            return keep
        cost, lost = places[keep], sums[keep]
        first = np.ones(len(keep), dtype=bool)
        first[1:] = cost[1:] != cost[:-1]
        keep, cost, lost = keep[first], cost[first], lost[first]
        if self.short > -np.inf:  # a dearer state may be the only one that gets there
            return keep
        loss = lost - self.price * cost
        better = np.ones(len(keep), dtype=bool)
        better[1:] = loss[1:] < np.minimum.accumulate(loss)[:-1]
        return keep[better]


def _by_highs(losses: Array, costs: Whole, base: Array, most: float, window: float) -> Found:
    """HiGHS where the dynamic program has too many states: a plan, and what is proved of it."""
    from searchlab._label_program import LabelProgram

    own = np.arange(len(losses))
    kept = np.isfinite(most)
    limit = float(losses[own, base].sum()) if kept else np.inf
    program = LabelProgram(
        losses,
        costs.costs[None].astype(np.float64),
        np.array([costs.lower], dtype=np.float64),
        np.array([costs.upper], dtype=np.float64),
        np.isfinite(losses),
        limit,
    )
    labels, proved = program.solve()
    if labels is not None:
        spent = costs.costs[own, labels].sum()
        if not costs.lower <= spent <= costs.upper or losses[own, labels].sum() >= limit:
            labels = None
    if labels is None and kept:
        labels = base
    value = np.inf if labels is None else float(losses[own, labels].sum())
    return Found(labels, min(max(proved, window), value), 0.0)
