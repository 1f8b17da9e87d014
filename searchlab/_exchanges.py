"""Exchanges between two blocks of a plan: fills budgets that few labels per block fill badly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Options", "exchanged"]

Array = NDArray[Any]

SWEEPS = 6


class Options:
    """What every block of a plan can take instead, with its loss and its costs.

    Args:
        losses: float64 (e, k).
        costs: float64 (b, e, k).
        members: the elements of every block.
    """

    def __init__(self, losses: Array, costs: Array, members: Sequence[Array]) -> None:
        self.losses, self.costs, self.members = losses, costs, members
        self.labels: list[Array] = [np.empty((0, len(rows)), np.int64) for rows in members]

    def add(self, block: int, labels: Array) -> None:
        """More assignments (n, elements of the block)."""
        both = np.concatenate([self.labels[block], labels])
        _, first = np.unique(both, axis=0, return_index=True)
        self.labels[block] = both[np.sort(first)]

    def loss(self, block: int) -> Array:
        rows = self.members[block]
        return np.asarray(self.losses[rows[None], self.labels[block]].sum(axis=1))

    def cost(self, block: int) -> Array:
        rows = self.members[block]
        return np.asarray(self.costs[:, rows[None], self.labels[block]].sum(axis=2).T)


def exchanged(options: Options, lower: Array, upper: Array, plan: Array) -> NDArray[np.int64]:
    """A plan that no exchange of the options of two blocks makes better.

    Args:
        options: what there is; the plan's own parts are added.
        lower, upper: float64 (b,), what the costs have to keep.
        plan: int64 (e,), within them.
    """
    members = options.members
    for block, rows in enumerate(members):
        options.add(block, plan[rows][None])
    loss = [options.loss(block) for block in range(len(members))]
    cost = [options.cost(block) for block in range(len(members))]
    at = [
        int(np.flatnonzero((options.labels[block] == plan[rows]).all(axis=1))[0])
        for block, rows in enumerate(members)
    ]
    spent = np.sum([c[i] for c, i in zip(cost, at, strict=True)], axis=0)
    slip = 1e-10 * np.maximum(1.0, np.abs(spent))
    for _ in range(SWEEPS):
        moved = False
        for one in range(len(members)):
            for two in range(one):
                rest = spent - cost[one][at[one]] - cost[two][at[two]]
                total = loss[one][:, None] + loss[two][None]
                now = total[at[one], at[two]]
                i, j = np.nonzero(total < now - 1e-12 * abs(now))
                if not len(i):
                    continue
                sums = rest + cost[one][i] + cost[two][j]
                good = ((sums <= upper + slip) & (sums >= lower - slip)).all(axis=1)
                if not good.any():
                    continue
                i, j, sums = i[good], j[good], sums[good]
                best = int(total[i, j].argmin())
                at[one], at[two], spent = int(i[best]), int(j[best]), sums[best]
                moved = True
        if not moved:
            break
    out = np.array(plan)
    for block, rows in enumerate(members):
        out[rows] = options.labels[block][at[block]]
    return out
