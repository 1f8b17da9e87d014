"""Warm starts: the best candidates of another run as the first proposals of a new one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from searchlab.algorithms.base import Seeds
from searchlab.config import Answers, best_rows
from searchlab.errors import ConfigError
from searchlab.evaluator import Objective
from searchlab.population import OK
from searchlab.space import Space

__all__ = ["best_of_run"]


def best_of_run(
    run: str | Path,
    space: Space,
    objective: Objective,
    *,
    k: int = 10,
    per: str | None = None,
    database: str | Path | None = None,
) -> Seeds:
    """The k best candidates that a finished or a going run has measured at its highest fidelity.

    They are proposed first and evaluated anew, as the new run has an evaluator of its own; only
    where the two evaluators are the same do values come from the shared cache.

    Args:
        run: a run's name or its folder.
        space: of the new run; the other one's must be equal.
        objective: the first objective, whose direction says what is best.
        k: how many.
        per: name of a static cost (`space.cost`) whose integer values are groups of k each.
        database: where a run that is given by its name is kept.

    Raises:
        ConfigError: there is no such run, it is of another space, or it has no values yet.
    """
    from searchlab.final import FINAL_STAGE
    from searchlab.runs import find_run
    from searchlab.study import Database

    if k < 1:
        raise ConfigError(f"warm start from the {k} best; allowed: 1 or more")
    address = find_run(str(run), None if database is None else str(database))
    with Database(address.database) as base:
        store = base.read(address.name)
        fingerprint, records = store.space, store.records()
        store.close("")
    if fingerprint != space.fingerprint:
        raise ConfigError(f"warm start from run {address.name!r}: it is of another space")
    searched = (records.state == OK) & (records.stage < FINAL_STAGE)
    last = records.stage[searched].max(initial=0)
    rows = np.flatnonzero(searched & (records.stage == last))
    if not len(rows):
        raise ConfigError(f"warm start from run {address.name!r}: it has no successful evaluation")
    part = records.take(rows)
    first = {key: row for row, key in reversed(list(enumerate(part.keys)))}
    part = part.take(sorted(first.values()))
    sign = 1.0 if objective.direction == "min" else -1.0
    names = tuple(f"seed:{address.name} #{i}" for i in part.ids.tolist())
    answers = Answers(space, space.unpack(part.genotypes), names, sign * part.values[:, :1])
    best = best_rows(answers, k, per, ("",))
    return Seeds(answers.population.take(best), tuple(names[i] for i in best.tolist()))
