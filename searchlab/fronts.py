"""Fronts as arrays: what nothing dominates, in what order, how much it covers, what stands for it.

All functions minimise: figures in the user's sign are turned round before they come here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "EARLY",
    "dominating",
    "front_order",
    "hypervolume",
    "knee",
    "non_dominated",
    "reference_point",
    "spread",
]

EARLY = 16  # candidates, in id order, that fix the reference point of a run
_CANDIDATES = 200  # that a choice by hypervolume looks at
MARGIN = 0.1  # how far beyond the worst of them it lies, as a share of their range

Losses = NDArray[np.float64]
Rows = NDArray[np.int64]


def non_dominated(losses: Losses, violation: Losses | None = None) -> Rows:
    """Rows that meet the constraints and that no other such row dominates, in order.

    Args:
        losses: float64 (n, m); rows that are not finite are left out.
        violation: float64 (n,), 0 = all constraints are met.

    Returns:
        int64 (k,); of rows with equal losses only the first.
    """
    fine = np.isfinite(losses).all(axis=1)
    if violation is not None:
        fine &= violation == 0
    rows = np.flatnonzero(fine)
    if not len(rows):
        return rows
    _, first = np.unique(losses[rows], axis=0, return_index=True)
    rows = rows[np.sort(first)]
    from pymoo.util.nds.non_dominated_sorting import find_non_dominated

    kept: Rows = np.sort(rows[find_non_dominated(losses[rows])])
    return kept


def front_order(losses: Losses, violation: Losses | None = None) -> Rows:
    """All finite rows, best first: least violation, then rank of non-domination, then crowding."""
    from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    rows = np.flatnonzero(np.isfinite(losses).all(axis=1))
    broken = np.zeros(len(losses)) if violation is None else violation
    rank = np.zeros(len(losses), dtype=np.int64)
    distance = np.zeros(len(losses))
    fine = rows[broken[rows] == 0]
    if len(fine):
        crowding = get_crowding_function("cd")
        for number, front in enumerate(NonDominatedSorting().do(_scaled(losses[fine]))):
            rank[fine[front]] = number
            distance[fine[front]] = crowding.do(losses[fine[front]], n_remove=0)
    ordered: Rows = rows[np.lexsort((-distance[rows], rank[rows], broken[rows]))]
    return ordered


def hypervolume(losses: Losses, reference: Losses) -> float:
    """Volume of what the rows dominate up to the reference point (m,); 0 without rows."""
    inside = losses[(losses < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    from pymoo.indicators.hv import HV

    return float(HV(ref_point=np.asarray(reference, dtype=np.float64)).do(inside))


def reference_point(ids: NDArray[Any], losses: Losses) -> Losses:
    """The point that the hypervolume of a run is measured from, where the user gives none.

    It lies beyond the worst figures of the first `EARLY` successes (baselines and random starts),
    by a tenth of their range: a function of the run's first ids alone, so that it stays where it is
    while the run goes on.

    Args:
        ids: of the candidates, in any order.
        losses: float64 (n, m), finite, n >= 1.
    """
    early = losses[np.argsort(ids, kind="stable")[:EARLY]]
    worst = early.max(axis=0)
    width = worst - early.min(axis=0)
    width = np.where(width > 0, width, np.maximum(np.abs(worst), 1.0))
    point: Losses = worst + MARGIN * width
    return point


def knee(losses: Losses) -> int:
    """The row nearest to the best figures of all rows, each scaled by its range over them."""
    return int(np.argmin(np.square(_scaled(losses)).sum(axis=1)))


def spread(losses: Losses, k: int) -> Rows:
    """At most k rows that stand for a front, in the order of the rows.

    The knee first, then the best of each objective, then whichever lies farthest (in ranges of the
    objectives) from those that were taken.
    """
    n = len(losses)
    if n <= k:
        return np.arange(n)
    scaled = _scaled(losses)
    taken = list(dict.fromkeys([knee(losses), *scaled.argmin(axis=0).tolist()]))[:k]
    while len(taken) < k:
        apart = np.square(scaled[:, None] - scaled[None, taken]).sum(axis=2).min(axis=1)
        apart[taken] = -1.0
        taken.append(int(apart.argmax()))
    return np.array(sorted(taken), dtype=np.int64)


def dominating(losses: Losses, k: int, reference: Losses) -> Rows:
    """At most k rows that together dominate most, in the order of the rows.

    Each next row adds the most hypervolume to those that were taken (within 1 - 1/e of the best
    choice of k, as for all such sums); rows that add nothing are taken as `spread` would.

    Args:
        losses: float64 (n, m), finite, m <= 4 for the sake of time.
        k: how many, 1 or more.
        reference: where the hypervolume is measured from.
    """
    if len(losses) <= k:
        return np.arange(len(losses))
    candidates = spread(losses, max(k, _CANDIDATES))
    taken: list[int] = []
    covered = 0.0
    while len(taken) < k:
        rest = [row for row in candidates.tolist() if row not in taken]
        gains = [hypervolume(losses[[*taken, row]], reference) for row in rest]
        best = int(np.argmax(gains))
        if gains[best] <= covered:
            break
        covered = gains[best]
        taken.append(rest[best])
    for row in spread(losses, k).tolist():
        if len(taken) < k and row not in taken:
            taken.append(row)
    return np.array(sorted(taken), dtype=np.int64)


def _scaled(losses: Losses) -> Losses:
    low = losses.min(axis=0)
    width = losses.max(axis=0) - low
    scaled: Losses = (losses - low) / np.where(width > 0, width, 1.0)
    return scaled
