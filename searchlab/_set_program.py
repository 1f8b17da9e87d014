"""Separable programs with few distinct labels per group, as integer programs over sets of labels.

One binary for every set of labels that a group may take, and below it one for every label of the
set that an element takes instead of its best one. The linear relaxation of this program is as tight
as that of all columns, which that over labels is far from: a label that a group uses a little
weighs a little there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab._label_program import PROVED_EMPTY, Many, highs

__all__ = ["SetProgram"]

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class SetProgram:
    """The plans whose blocks each cost little more than their best under some prices.

    A block with the labels of a set costs the sum of its elements' least priced losses over that
    set; by how much that exceeds the block's best set, and what an element adds by another label
    of the set, is its *excess*. A plan loses the bound of the prices plus the excess of its
    blocks, or more: so the program holds every plan that loses less than bound + room.

    Attributes:
        problem: with groups.
        priced: float64 (e, k), losses plus priced costs.
        members: of every group, the numbers of its elements.
        sets: int64 (s, m), label sets.
        sums: float64 (g, s), least priced sum of every group under every set; +inf where none.
        bound: what the prices prove.
        room: above 0; inf = everything.
    """

    problem: Many
    priced: NDArray[np.float64]
    members: list[NDArray[np.int64]]
    sets: NDArray[np.int64]
    sums: NDArray[np.float64]
    bound: float
    room: float

    @cached_property
    def _pairs(self) -> tuple[Array, Array, Array]:
        """Group, set and excess of every binary of the upper kind."""
        excess = self.sums - self.sums.min(axis=1, keepdims=True)
        groups, numbers = np.nonzero(np.isfinite(self.sums) & (excess <= self._reach))
        return groups, numbers, excess[groups, numbers]

    @property
    def _reach(self) -> float:
        return self.room * (1 + 1e-9) + 1e-12

    @cached_property
    def _below(self) -> tuple[Array, Array, Array, Array, Array]:
        """Pair, element, label of each element at its best; pair, element, label elsewhere."""
        groups, numbers, excess = self._pairs
        sizes = np.array([len(rows) for rows in self.members])[groups]
        pair = np.repeat(np.arange(len(groups)), sizes)
        element = np.concatenate([self.members[g] for g in groups])
        some = self.sets[numbers[pair]]
        priced = self.priced[element[:, None], some]
        best = priced.argmin(axis=1)
        own = np.arange(len(pair))
        more = priced - priced[own, best][:, None]
        near = np.isfinite(priced) & (excess[pair][:, None] + more <= self._reach)
        near[own, best] = False
        at, column = np.nonzero(near)
        return pair, element, some[own, best], at, some[at, column]

    @property
    def size(self) -> int:
        """How many binaries there are."""
        return len(self._pairs[0]) + len(self._below[3])

    @property
    def whole(self) -> bool:
        """Whether it holds every plan."""
        finite = np.isfinite(self.sums)
        allowed = np.isfinite(self.priced)[:, self.sets].sum(axis=2)  # elements x sets
        labels = sum(
            int((allowed[rows] - 1)[:, finite[g]].sum()) for g, rows in enumerate(self.members)
        )
        return self.size == int(finite.sum()) + labels

    def solve(self, gap: float, nodes: int) -> tuple[NDArray[np.int64] | None, float]:
        """A plan, and what all plans lose at least.

        Args:
            gap: relative to the loss.
            nodes: of the branch and bound at most.

        Returns:
            Labels int64 (e,) within all limits or None, and a bound that holds for every plan of
            the problem; inf = there is none.
        """
        from scipy.sparse import coo_matrix

        groups, _, _ = self._pairs
        pair, element, base, at, other = self._below
        n, m, g = len(groups), len(at), len(self.members)
        losses, costs = self.problem.losses, self.problem.costs
        b = len(costs)
        weight = np.zeros(n + m)
        cost = np.zeros((b, n + m))
        weight[:n] = np.bincount(pair, losses[element, base], n)
        weight[n:] = losses[element[at], other] - losses[element[at], base[at]]
        for i in range(b):
            cost[i, :n] = np.bincount(pair, costs[i, element, base], n)
        cost[:, n:] = costs[:, element[at], other] - costs[:, element[at], base[at]]
        # Costs from every group's cheapest set on, in units of what an element's change makes.
        floor = np.full((b, g), np.inf)
        for i in range(b):
            np.minimum.at(floor[i], groups, cost[i, :n])
        cost[:, :n] -= floor[:, groups]
        unit = np.abs(cost[:, n:]).max(axis=1, initial=0.0)
        unit = np.where(unit > 0, unit, np.maximum(cost.max(axis=1, initial=0.0), 1e-300))
        spent = floor.sum(axis=1)
        ends = [(end - spent) / unit for end in (self.problem.lower, self.problem.upper)]
        once = coo_matrix((np.ones(n), (groups, np.arange(n))), shape=(g, n + m))
        # An element leaves its best label at most once, and only below its set.
        rows, which = np.unique(at, return_inverse=True)
        places = np.concatenate([which, np.arange(len(rows))])
        columns = np.concatenate([n + np.arange(m), pair[rows]])
        ones = np.concatenate([np.ones(m), -np.ones(len(rows))])
        link = coo_matrix((ones, (places, columns)), shape=(len(rows), n + m))
        parts = [
            (once, np.ones(g), np.ones(g)),
            (coo_matrix(cost / unit[:, None]), ends[0], ends[1]),
            (link, np.full(len(rows), -np.inf), np.zeros(len(rows))),
        ]
        scale = self.room if np.isfinite(self.room) else float(np.abs(weight).max(initial=0.0))
        scale = scale if scale > 0 else 1.0
        answer = highs(weight / scale, 0, parts, np.ones(n + m), gap, nodes)
        most = np.inf if self.whole else self.bound + self.room
        if answer.status == PROVED_EMPTY:
            return None, most
        proved = -np.inf if answer.mip_dual_bound is None else answer.mip_dual_bound * scale
        proved = min(max(proved, self.bound), most)
        if answer.x is None:
            return None, proved
        labels = np.empty(len(losses), dtype=np.int64)
        taken = answer.x > 0.5
        mine = taken[:n][pair]
        labels[element[mine]] = base[mine]
        moved = at[taken[n:]]
        labels[element[moved]] = other[taken[n:]]
        return (labels if self.problem.keeps(labels) else None), proved
