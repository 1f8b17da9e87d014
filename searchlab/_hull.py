"""Lower convex hulls of cost against loss, per element: the linear relaxation by one sort."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Hull", "hull_of"]

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Hull:
    """The supported plans of a separable program with one budget, cheapest first.

    Plan 0 is the cheapest; plan p + 1 is plan p with one element moved on along its own hull. As
    the steps are sorted by what a unit of cost saves, every plan is optimal for its own cost.

    Attributes:
        start: int64 (e,), the labels of plan 0.
        element: int64 (p,), which element each step moves.
        label: int64 (p,), where it moves to.
        price: float64 (p,), loss saved per unit of cost, falling.
        cost_step: float64 (p,), what each step adds to the cost, > 0.
        loss_step: float64 (p,), what each step adds to the loss, < 0.
    """

    start: NDArray[np.int64]
    element: NDArray[np.int64]
    label: NDArray[np.int64]
    price: NDArray[np.float64]
    cost_step: NDArray[np.float64]
    loss_step: NDArray[np.float64]

    @cached_property
    def added(self) -> NDArray[np.float64]:
        """Cost of every plan beyond plan 0, float64 (p + 1,)."""
        return np.concatenate([[0.0], np.cumsum(self.cost_step)])

    def plans(self, numbers: Array) -> NDArray[np.int64]:
        """The labels of some plans, int64 (n, e)."""
        out = np.repeat(self.start[None], len(numbers), axis=0)
        for row, number in enumerate(np.asarray(numbers).tolist()):
            # Later steps of an element overwrite its earlier ones.
            out[row, self.element[:number]] = self.label[:number]
        return out


def hull_of(losses: Array, costs: Array) -> Hull:
    """The hull of every element, joined into one front.

    Args:
        losses: float64 (e, k); +inf where a label is not allowed; one finite entry per row.
        costs: float64 (e, k).

    Returns:
        The front. Labels that lie on an edge of their hull are steps too.
    """
    rows = np.arange(len(losses))
    dear = np.where(np.isfinite(losses), costs, np.inf)
    least = dear.min(axis=1)
    start = np.where(dear == least[:, None], losses, np.inf).argmin(axis=1)
    at, steps = start, []
    floor = np.full(len(rows), -np.inf)  # rounding must not bend a hull inwards
    while len(rows):
        own = np.arange(len(rows))
        with np.errstate(invalid="ignore", divide="ignore"):
            run = dear[rows] - dear[rows, at][:, None]
            fall = losses[rows] - losses[rows, at][:, None]
            slope = np.where((run > 0) & (fall < 0), fall / run, np.inf)
        best = slope.min(axis=1)
        ahead = np.flatnonzero(np.isfinite(best))
        rows, at, run, fall = rows[ahead], at[ahead], run[ahead], fall[ahead]
        slope, best, floor = slope[ahead], best[ahead], floor[ahead]
        if not len(rows):
            break
        own = np.arange(len(rows))
        at = np.where(slope == best[:, None], run, np.inf).argmin(axis=1)
        floor = np.maximum(floor, best)
        steps.append((rows, at, -floor, run[own, at], fall[own, at]))
    if not steps:
        none = np.empty(0)
        return Hull(start, np.empty(0, np.int64), np.empty(0, np.int64), none, none, none)
    element, label, price, run, fall = (np.concatenate(part) for part in zip(*steps, strict=True))
    # Stable: the steps of one element, which are appended in order, stay in order.
    order = np.argsort(-price, kind="stable")
    return Hull(
        start.astype(np.int64),
        element[order].astype(np.int64),
        label[order].astype(np.int64),
        price[order],
        run[order],
        fall[order],
    )
