"""Warm starts: the best candidates of another run as the first proposals of a new one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab._adopt import Adopted, Adopts, adopted, variables_of
from searchlab._kept_seeds import kept_seeds
from searchlab._run_layout import LAYOUT, read_layout
from searchlab.algorithms.base import Seeds
from searchlab.config import Answers, SearchConfig, best_rows
from searchlab.errors import ConfigError, SpaceError
from searchlab.evaluator import Evaluator, Objective
from searchlab.population import OK
from searchlab.space import Space

__all__ = ["best_of_run", "with_warm_start"]

_MOST = 4096  # rows of another space that are looked at where ten are wanted in all
_SHOWN = 200  # letters of a space's variables in a message


def best_of_run(
    run: str | Path,
    space: Space,
    objective: Objective | Sequence[Objective],
    *,
    k: int = 10,
    per: str | None = None,
    database: str | Path | None = None,
    evaluator: Evaluator | None = None,
) -> Seeds:
    """The k best candidates that a finished or a going run has measured at its highest fidelity.

    They are proposed first and evaluated anew, as the new run has an evaluator of its own; only
    where the two evaluators are the same do values come from the shared cache.

    The run may be of another space of the same variables, with other labels, ranges or budgets:
    candidates are then carried over as near as the new space can hold them, and their origins end
    with "adapted". A space may do more: solver schedules get longer and shorter.

    Args:
        run: a run's name or its folder.
        space: of the new run.
        objective: whose direction says what is best. Several are traded off: candidates that
            nothing dominates come first. They are found by their names where the run has several.
        k: how many.
        per: name of a static cost (`space.cost`) whose integer values are groups of k each.
        database: where a run that is given by its name is kept.
        evaluator: where a candidate can be carried over in several ways, the first of its static
            signals chooses; None or one without such = the space does.

    Raises:
        ConfigError: there is no such run, it is of another kind of space, none of its candidates
            can be carried over, or it has no values yet.
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
    searched = (records.state == OK) & (records.stage < FINAL_STAGE)
    last = records.stage[searched].max(initial=0)
    rows = np.flatnonzero(searched & (records.stage == last))
    if not len(rows):
        raise ConfigError(f"warm start from run {address.name!r}: it has no successful evaluation")
    part = records.take(rows)
    first = {key: row for row, key in reversed(list(enumerate(part.keys)))}
    part = part.take(sorted(first.values()))
    earlier = _space_of(layout, int(last), fingerprint, space, address.name)
    wanted = (objective,) if isinstance(objective, Objective) else tuple(objective)
    columns = _columns(layout, int(last), wanted, part.values.shape[1], address.name)
    signs = np.array([1.0 if o.direction == "min" else -1.0 for o in wanted])
    names = tuple(f"seed:{address.name} #{i}" for i in part.ids.tolist())
    answers = Answers(
        earlier,
        earlier.unpack(part.genotypes),
        names,
        signs * part.values[:, columns],
        main=0 if len(wanted) == 1 else None,
    )
    if earlier is not space:
        try:
            return _carried_over(answers, space, k, per, evaluator)
        except SpaceError as error:
            raise ConfigError(
                f"warm start from run {address.name!r}: it is of another space: {error}"
            ) from None
    best = best_rows(answers, k, per, ("",))
    return Seeds(answers.population.take(best), tuple(names[i] for i in best.tolist()))


def _space_of(layout: Any, stage: int, fingerprint: str, space: Space, run: str) -> Space:
    """The space of a run's stage: the given one where they are equal."""
    found = read_layout(layout, run)
    if found is None:
        if fingerprint == space.fingerprint:
            return space
        raise ConfigError(f"warm start from run {run!r}: it is of another space")
    earlier = found.of(stage).space
    mine = space.to_json()["variables"]
    if fingerprint == space.fingerprint and earlier.to_json()["variables"] == mine:
        return space
    theirs, own = variables_of(earlier), variables_of(space)
    if theirs != own:
        raise ConfigError(
            f"warm start from run {run!r}: it is of another space, {shorten(theirs, _SHOWN)}; "
            f"allowed: {shorten(own, _SHOWN)}"
        )
    return earlier


def _carried_over(
    answers: Answers, space: Space, k: int, per: str | None, evaluator: Evaluator | None
) -> Seeds:
    """The k best candidates of another space that this one can hold, of every group."""
    most = _MOST if per is None else len(answers.origin)  # the last group may be the worst
    order = best_rows(answers, most, None, ("",))
    ranked = answers.population.take(order)
    if isinstance(space, Adopts):
        found = space.adopted(answers.space, ranked, k)
    else:
        found = adopted(space, answers.space, ranked)
    if not len(found.rows):
        raise SpaceError("none of its candidates has a like here")
    groups = np.zeros(len(found.rows), dtype=np.int64)
    if per is not None:
        groups = np.rint(space.cost(found.population)[per]).astype(np.int64)
    likely = _likely(found, evaluator)
    keys, seen = space.keys(found.population), set()
    chosen: list[int] = []
    for group in np.unique(groups).tolist():
        first: dict[int, int] = {}
        for way in likely[groups[likely] == group].tolist():
            row = int(found.rows[way])
            if row not in first and keys[way] not in seen and len(first) < k:
                first[row] = way
                seen.add(keys[way])
        chosen += first.values()
    origin = tuple(f"{answers.origin[order[row]]} adapted" for row in found.rows[chosen].tolist())
    return Seeds(found.population.take(chosen), origin)


def _likely(found: Adopted, evaluator: Evaluator | None) -> NDArray[np.int64]:
    """All candidates by the rows that they come from, and those of one row by what is likelier."""
    said = np.arange(len(found.rows), dtype=np.float64)
    give = getattr(evaluator, "static_signals", None)
    declared = list(enumerate(evaluator.signals)) if evaluator is not None else []
    known = [(i, signal) for i, signal in declared if signal.when == "static"]
    if give is not None and known and len(np.unique(found.rows)) < len(found.rows):
        column, signal = known[0]
        values = np.asarray(give(found.population), dtype=np.float64)[:, column]
        said = values if signal.direction == "min" else -values
        said = np.where(np.isnan(said), np.inf, said)
    return np.lexsort((said, found.rows))


def with_warm_start(config: SearchConfig, run: str | Path, *, kept: Any = None) -> SearchConfig:
    """The configuration whose last stage proposes another run's ten best after its own seeds.

    Args:
        config: of the new run.
        run: name or folder of the other one.
        kept: what the new run has noted of them (`searchlab._kept_seeds`), if it was opened before:
            the other run is then not looked at.

    Raises:
        ConfigError: see `best_of_run`.
        StudyError: what was noted cannot be read.
    """
    stage = config.stages[-1]
    of = stage.evaluator.objectives
    seeds = kept_seeds(kept, stage.space)
    if seeds is None:
        wanted = of if stage.trades else (of[stage.main],)
        seeds = best_of_run(run, stage.space, wanted, evaluator=stage.evaluator)
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
