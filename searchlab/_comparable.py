"""Records as figures that can be compared: one fidelity, and one value per candidate."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from searchlab.population import FAILED, INFEASIBLE, OK

if TYPE_CHECKING:
    from searchlab.config import Stage
    from searchlab.records import Records

__all__ = ["comparable", "paid_below"]


def comparable(records: Records, fidelity: int) -> tuple[Records, NDArray[np.bool_]]:
    """Records of a search whose algorithm chose fidelities and replicates, as one per candidate.

    Only those of one fidelity are looked at. Where candidates were measured on several replicates,
    a value is the mean over the replicates that all leaders have: those with the most replicates,
    or one fewer, as a budget may end within a block. The others were left behind on the way; their
    value is the mean over their own replicates. A failure takes part in nothing.

    Args:
        records: of stages that share an evaluator and a space.
        fidelity: its index.

    Returns:
        The records, each candidate at its first id, and who was left behind (n,).
    """
    records = records.take(np.flatnonzero(records.fidelity == fidelity))
    n = len(records)
    ok = records.state == OK
    if not ok.any() or (records.replicate[ok] == records.replicate[ok][0]).all():
        return records, np.zeros(n, dtype=bool)
    rows_of: dict[bytes, dict[int, int]] = {}
    for row in np.flatnonzero(ok).tolist():
        rows_of.setdefault(records.keys[row] or b"", {}).setdefault(
            int(records.replicate[row]), row
        )
    failed = {records.keys[row] for row in np.flatnonzero(records.state == FAILED).tolist()}
    sound = {key: len(rows) for key, rows in rows_of.items() if key not in failed}
    most = max(sound.values(), default=0)
    leads = {key for key, number in sound.items() if number >= max(1, most - 1)}
    common = set.intersection(*(set(rows_of[key]) for key in leads)) if leads else set()
    values = records.values.copy()
    kept, behind = [], []
    for key, rows in rows_of.items():
        first = min(rows.values())
        own = [row for replicate, row in rows.items() if replicate in common or key not in leads]
        values[first] = records.values[own].mean(axis=0)
        kept.append(first)
        behind.append(key not in leads)
    order = np.argsort(kept)
    return (
        replace(records, values=values).take(np.array(kept)[order]),
        np.array(behind, dtype=bool)[order],
    )


def paid_below(records: Records, stages: tuple[Stage, ...]) -> tuple[int, float]:
    """How many paid jobs, baselines apart, were cheaper than the truth, and what all cost.

    The cost is in evaluations at the evaluator's highest fidelity.
    """
    known = np.array([origin.startswith("baseline") for origin in records.origin], dtype=bool)
    paid = ~records.cached.astype(bool) & (records.state < INFEASIBLE) & ~known
    cheaper, cost = 0, 0.0
    for index, stage in enumerate(stages):
        costs = np.array([fidelity.cost for fidelity in stage.evaluator.fidelities])
        of = records.fidelity[paid & (records.stage == index)]
        cheaper += int((of < len(costs) - 1).sum())
        cost += float((costs[of] / costs[-1]).sum())
    return cheaper, cost
