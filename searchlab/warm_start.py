"""Warm starts: the best candidates of another run as the first proposals of a new one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from searchlab._run_layout import LAYOUT
from searchlab.algorithms.base import Seeds
from searchlab.config import Answers, SearchConfig, best_rows
from searchlab.errors import ConfigError
from searchlab.evaluator import Objective
from searchlab.population import OK
from searchlab.space import Space

__all__ = ["best_of_run", "with_warm_start"]


def best_of_run(
    run: str | Path,
    space: Space,
    objective: Objective | Sequence[Objective],
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
        objective: whose direction says what is best. Several are traded off: candidates that
            nothing dominates come first. They are found by their names where the run has several.
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
    address = find_run(str(run), None if database is None else str(database), writes=False)
    with Database(address.database) as base:
        store = base.read(address.name)
        fingerprint, records = store.space, store.records()
        layout = store.get_meta(LAYOUT)
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
    wanted = (objective,) if isinstance(objective, Objective) else tuple(objective)
    columns = _columns(layout, int(last), wanted, part.values.shape[1], address.name)
    signs = np.array([1.0 if o.direction == "min" else -1.0 for o in wanted])
    names = tuple(f"seed:{address.name} #{i}" for i in part.ids.tolist())
    answers = Answers(
        space,
        space.unpack(part.genotypes),
        names,
        signs * part.values[:, columns],
        main=0 if len(wanted) == 1 else None,
    )
    best = best_rows(answers, k, per, ("",))
    return Seeds(answers.population.take(best), tuple(names[i] for i in best.tolist()))


def with_warm_start(config: SearchConfig, run: str | Path) -> SearchConfig:
    """The configuration whose last stage proposes another run's ten best after its own seeds.

    Raises:
        ConfigError: see `best_of_run`.
    """
    stage = config.stages[-1]
    of = stage.evaluator.objectives
    seeds = best_of_run(run, stage.space, of if stage.trades else (of[stage.main],))
    if stage.seeds is not None:
        seeds = stage.seeds.joined(seeds)
    return replace(config, stages=(*config.stages[:-1], replace(stage, seeds=seeds)))


def _columns(
    layout: Any, stage: int, wanted: Sequence[Objective], width: int, run: str
) -> list[int]:
    """Which columns of a run's values are the wanted objectives: by name, else the first one."""
    try:
        known = [str(part[0]) for part in layout["stages"][stage]["objectives"]]
    except (TypeError, KeyError, IndexError):
        known = []
    names = [objective.name for objective in wanted]
    if len(wanted) == 1 and (len(known) < 2 or names[0] not in known):
        return [0]
    missing = [name for name in names if name not in known or known.index(name) >= width]
    if missing:
        raise ConfigError(
            f"warm start from run {run!r}: it has no {', '.join(missing)}; known: "
            f"{', '.join(known) or 'none'}"
        )
    return [known.index(name) for name in names]
