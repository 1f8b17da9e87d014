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

    @cached_property
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
        from scipy.sparse import csr_matrix

        weight, cost, ends = self._coefficients()
        n, parts = len(weight), self._ties()
        gap = min(gap, 0.5)
        scale = self.room if np.isfinite(self.room) else float(np.abs(weight).max())
        scale = scale if scale > 0 else 1.0
        most = np.inf if self.whole else self.bound + self.room
        if not self.whole:
            # A way out of all blocks at once, so dear that HiGHS ends where it has proved what
            # can be proved here. It spends the budgets in full and buys no other plan anything.
            out = np.where(
                np.isfinite(ends[1]), ends[1], np.where(np.isfinite(ends[0]), ends[0], 0)
            )
            parts = [_joined(parts[0], np.ones(len(self.members))), _joined(parts[1], None)]
            weight, cost = np.append(weight, most / (1 - gap)), np.column_stack([cost, out])
        once, link = parts
        rows = [
            (once, np.ones(once.shape[0]), np.ones(once.shape[0])),
            (csr_matrix(cost), *ends),
            (link, np.full(link.shape[0], -np.inf), np.zeros(link.shape[0])),
        ]
        answer = highs(weight / scale, 0, rows, np.ones(len(weight)), gap, nodes)
        if answer.status == PROVED_EMPTY:
            return None, most
        proved = -np.inf if answer.mip_dual_bound is None else answer.mip_dual_bound * scale
        proved = min(max(proved, self.bound), most)
        if answer.x is None or (answer.x[n:] > 0.5).any():
            return None, proved
        labels = self._read(answer.x[:n] > 0.5)
        return (labels if self.problem.keeps(labels) else None), proved

    def _coefficients(self) -> tuple[Array, Array, tuple[Array, Array]]:
        """Losses and costs of the binaries, and the ends of the budgets."""
        groups, _, _ = self._pairs
        pair, element, base, at, other = self._below
        losses, costs = self.problem.losses, self.problem.costs
        n, b = len(groups), len(costs)
        here, there = element[at], base[at]
        weight = np.bincount(pair, losses[element, base], n)
        weight = np.concatenate([weight, losses[here, other] - losses[here, there]])
        upper = np.array([np.bincount(pair, part[element, base], n) for part in costs])
        below = costs[:, here, other] - costs[:, here, there]
        # Costs from every group's cheapest set on, in units of the largest that an element adds.
        floor = np.full((b, len(self.members)), np.inf)
        for least, values in zip(floor, upper, strict=True):
            np.minimum.at(least, groups, values)
        cost = np.concatenate([upper.reshape(b, n) - floor[:, groups], below], axis=1)
        unit = np.abs(below).max(axis=1, initial=0.0)
        unit = np.where(unit > 0, unit, np.maximum(cost.max(axis=1, initial=0.0), 1.0))
        spent = floor.sum(axis=1)
        ends = (self.problem.lower - spent) / unit, (self.problem.upper - spent) / unit
        return weight, cost / unit[:, None], ends

    def _ties(self) -> list[Any]:
        """One set per group; an element leaves its best label once, and only below its set."""
        from scipy.sparse import coo_matrix

        groups, _, _ = self._pairs
        pair, _, _, at, _ = self._below
        n, m = len(groups), len(at)
        once = coo_matrix((np.ones(n), (groups, np.arange(n))), (len(self.members), n + m))
        rows, which = np.unique(at, return_inverse=True)
        places = np.concatenate([which, np.arange(len(rows))])
        columns = np.concatenate([n + np.arange(m), pair[rows]])
        ones = np.concatenate([np.ones(m), -np.ones(len(rows))])
        return [once, coo_matrix((ones, (places, columns)), (len(rows), n + m))]

    def _read(self, taken: Array) -> NDArray[np.int64]:
        """The labels of a choice of binaries."""
        n = len(self._pairs[0])
        pair, element, base, at, other = self._below
        labels = np.empty(len(self.priced), dtype=np.int64)
        mine = taken[:n][pair]
        labels[element[mine]] = base[mine]
        labels[element[at[taken[n:]]]] = other[taken[n:]]
        return labels


def _joined(matrix: Any, column: Array | None) -> Any:
    """With one more column, of zeros where None."""
    from scipy.sparse import coo_matrix, hstack

    values = np.zeros(matrix.shape[0]) if column is None else column
    return hstack([matrix, coo_matrix(values[:, None])])
