"""Separable programs as integer programs over labels, by HiGHS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["NODES", "PROVED_EMPTY", "LabelProgram", "Many", "highs"]

Array = NDArray[Any]

NODES = 4000  # of a branch and bound; a number of nodes and not of seconds, for equal answers
PROVED_EMPTY = 2
_CLOSEST = 1e-9  # relative gap; HiGHS' absolute one is as small in these units


@dataclass(frozen=True, eq=False)
class LabelProgram:
    """One binary per label of every element that a plan may take.

    Attributes:
        losses: float64 (e, k).
        costs: float64 (b, e, k).
        lower, upper: float64 (b,).
        allowed: bool (e, k), one label or more per element.
        limit: only plans that lose less are wanted.
    """

    losses: NDArray[np.float64]
    costs: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    allowed: NDArray[np.bool_]
    limit: float = np.inf

    @cached_property
    def _places(self) -> tuple[Array, Array]:
        """Element and label of every binary."""
        rows, labels = np.nonzero(self.allowed)
        return rows, labels

    @cached_property
    def _scaled(self) -> tuple[Array, float, float]:
        """Losses of the binaries in units of what matters, the loss of zero, and the unit."""
        least = np.where(self.allowed, self.losses, np.inf).min(axis=1)
        rows, labels = self._places
        loss = self.losses[rows, labels] - least[rows]
        fixed = float(least.sum())
        unit = self.limit - fixed if np.isfinite(self.limit) else float(loss.max(initial=0.0))
        return loss / (unit if unit > 0 else 1.0), fixed, unit if unit > 0 else 1.0

    def _constraints(self) -> list[tuple[Any, Array, Array]]:
        """One label per element, and the budgets, in units of their largest cost."""
        from scipy.sparse import csr_matrix

        rows, labels = self._places
        n, e = len(rows), len(self.allowed)
        floor = np.where(self.allowed, self.costs, np.inf).min(axis=2)
        cost = self.costs[:, rows, labels] - floor[:, rows]
        unit = cost.max(axis=1, initial=0.0)
        unit[unit == 0] = 1.0
        spent = floor.sum(axis=1)
        ends = [(end - spent) / unit for end in (self.lower, self.upper)]
        once = csr_matrix((np.ones(n), (rows, np.arange(n))), shape=(e, n))
        return [
            (once, np.ones(e), np.ones(e)),
            (csr_matrix(cost / unit[:, None]), ends[0], ends[1]),
        ]

    def solve(
        self,
        *,
        groups: Array | None = None,
        most: int = 0,
        gap: float = 0.0,
        nodes: int = NODES,
    ) -> tuple[NDArray[np.int64] | None, float]:
        """The best plan of the allowed labels.

        Args:
            groups: int64 (e,); each takes at most `most` distinct labels. None = no limit.
            most: see `groups`.
            gap: relative to the loss.
            nodes: of the branch and bound at most.

        Returns:
            Labels int64 (e,) or None, and a bound: no plan of the allowed labels loses less than
            it, or than `limit` where that is lower.
        """
        from scipy.sparse import coo_matrix

        rows, labels = self._places
        weight, fixed, unit = self._scaled
        parts, n, extra = self._constraints(), len(weight), 0
        if groups is not None:
            # Binaries for the labels that a group uses, and what ties them to its elements.
            k = self.allowed.shape[1]
            used, which = np.unique(groups[rows] * k + labels, return_inverse=True)
            extra, own = len(used), np.arange(n)
            ones = np.concatenate([np.ones(n), -np.ones(n)])
            places = np.concatenate([own, own]), np.concatenate([own, n + which])
            link = coo_matrix((ones, places), shape=(n, n + extra))
            places = used // k, n + np.arange(extra)
            sums = coo_matrix((np.ones(extra), places), shape=(int(groups.max()) + 1, n + extra))
            parts.append((link, np.full(n, -np.inf), np.zeros(n)))
            parts.append((sums, np.zeros(sums.shape[0]), np.full(sums.shape[0], float(most))))
        answer = highs(weight, extra, parts, np.ones(n + extra), gap, nodes)
        if answer.status == PROVED_EMPTY:
            return None, self.limit
        proved = -np.inf if answer.mip_dual_bound is None else answer.mip_dual_bound
        proved = min(fixed + max(proved, 0.0) * unit, self.limit)
        if answer.x is None:
            return None, proved
        return self._read(answer.x[:n]), proved

    def _read(self, x: Array) -> NDArray[np.int64]:
        table = np.full(self.allowed.shape, -1.0)
        table[self._places] = x
        return np.asarray(table.argmax(axis=1), dtype=np.int64)


@dataclass(frozen=True)
class Many:
    """A separable program with budgets in units of their own room.

    Attributes:
        losses: float64 (e, k), each row's least is 0; +inf where a label is not allowed.
        costs: float64 (b, e, k).
        lower, upper: float64 (b,); -inf and inf allowed.
        groups: int64 (e,), 0 .. g - 1; None = no limit.
        most: how many distinct labels a group may take.
    """

    losses: NDArray[np.float64]
    costs: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    groups: NDArray[np.int64] | None = None
    most: int = 0

    def keeps(self, labels: Array) -> bool:
        """Whether a plan keeps budgets and limit."""
        own = np.arange(len(labels))
        spent = self.costs[:, own, labels].sum(axis=1)
        room = 1e-9 * np.maximum(1.0, np.abs(spent))
        if (spent > self.upper + room).any() or (spent < self.lower - room).any():
            return False
        if self.groups is None:
            return True
        pairs = np.unique(np.stack([self.groups, labels]), axis=1)
        return bool((np.bincount(pairs[0]) <= self.most).all())

    def lean(self) -> Many:
        """Without labels that another one replaces at no cost, wherever it can stand."""
        if np.isfinite(self.lower).any():  # a dearer label may be the one that is needed
            return self
        losses = np.array(self.losses)
        for k in range(losses.shape[1]):
            for other in range(losses.shape[1]):
                if other == k:
                    continue
                worse = losses[:, other] <= losses[:, k]
                worse &= (self.costs[:, :, other] <= self.costs[:, :, k]).all(axis=0)
                worse &= np.isfinite(losses[:, k])
                if self.groups is None:
                    losses[worse, k] = np.inf
                elif worse[np.isfinite(losses[:, k])].all():
                    losses[:, k] = np.inf
                    break
        return replace(self, losses=losses)

    def program(self, allowed: Array, limit: float = np.inf) -> LabelProgram:
        """The integer program over some of the labels."""
        return LabelProgram(self.losses, self.costs, self.lower, self.upper, allowed, limit)

    def loss(self, labels: Array) -> float:
        return float(self.losses[np.arange(len(labels)), labels].sum())


def highs(
    weight: Array,
    extra: int,
    parts: list[tuple[Any, Array, Array]],
    whole: Array,
    gap: float,
    nodes: int,
) -> Any:
    """HiGHS on `weight` and further columns without weight."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix, hstack

    n = len(weight)
    constraints = []
    for matrix, low, high in parts:
        if matrix.shape[1] < n + extra:
            matrix = hstack([matrix, csr_matrix((matrix.shape[0], n + extra - matrix.shape[1]))])
        constraints.append(LinearConstraint(matrix.tocsr(), low, high))
    return milp(
        np.concatenate([weight, np.zeros(extra)]),
        integrality=whole,
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"node_limit": nodes, "mip_rel_gap": max(gap, _CLOSEST)},
    )
