"""The seeds that a run took from an earlier one: kept, as the earlier one may go on or go away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from searchlab.algorithms.base import Seeds
from searchlab.config import SearchConfig, Stage
from searchlab.errors import SpaceError, StudyError

if TYPE_CHECKING:
    from searchlab.study import Store

__all__ = ["META", "keep_seeds", "kept_seeds", "replaced", "seeds_of_runs", "with_kept_seeds"]

META = "warm_seeds"
_FROM_RUN = "seed:"


def seeds_of_runs(stage: Stage) -> list[int]:
    """The rows of a stage's seeds that another run found."""
    origin = () if stage.seeds is None else stage.seeds.origin
    return [row for row, text in enumerate(origin) if text.startswith(_FROM_RUN)]


def keep_seeds(config: SearchConfig, store: Store) -> None:
    """Notes the seeds of the last stage that another run found, unless that was done."""
    stage = config.stages[-1]
    rows = seeds_of_runs(stage)
    if not rows or store.get_meta(META) is not None:
        return
    assert stage.seeds is not None
    packed = stage.space.pack(stage.seeds.population.take(rows))
    origin = [stage.seeds.origin[row] for row in rows]
    store.set_meta(META, {"genotypes": [row.hex() for row in packed], "origin": origin})


def kept_seeds(note: Any, stage: Stage) -> Seeds | None:
    """What `keep_seeds` noted of a stage; None = nothing.

    Raises:
        StudyError: it cannot be read.
    """
    if note is None:
        return None
    try:
        origin = tuple(str(text) for text in note["origin"])
        population = stage.space.unpack([bytes.fromhex(row) for row in note["genotypes"]])
        return Seeds(population, origin)
    except (SpaceError, ValueError, TypeError, KeyError):
        raise StudyError("the seeds that the run keeps of an earlier one are damaged") from None


def with_kept_seeds(config: SearchConfig, database: str | Path, name: str) -> SearchConfig:
    """The configuration with the seeds that a run was opened with, if there is one of this name.

    Raises:
        StudyError: see `replaced`.
    """
    from searchlab.study import Database

    if not seeds_of_runs(config.stages[-1]):
        return config
    with Database(database) as base:
        try:
            store = base.read(name)
        except StudyError:  # there is no such run yet; whatever else is wrong, opening it says
            return config
        note = store.get_meta(META)
        store.close("")
    return replaced(config, note)


def replaced(config: SearchConfig, note: Any) -> SearchConfig:
    """The configuration with the seeds that a run has noted.

    They take the place of those of the same earlier run, whose best may be others by now.

    Raises:
        StudyError: what the run keeps cannot be read.
    """
    stage = config.stages[-1]
    rows = seeds_of_runs(stage)
    kept = kept_seeds(note, stage)
    if not rows or kept is None:
        return config
    assert stage.seeds is not None
    if _runs(kept.origin) != _runs(stage.seeds.origin[row] for row in rows):
        return config
    rest = np.setdiff1d(np.arange(len(stage.seeds.origin)), rows)
    others = Seeds(stage.seeds.population.take(rest), tuple(stage.seeds.origin[i] for i in rest))
    seeds = others.joined(kept) if len(rest) else kept
    return replace(config, stages=(*config.stages[:-1], replace(stage, seeds=seeds)))


def _runs(origin: Any) -> set[str]:
    """The names of the runs that seeds come from."""
    return {text.rpartition(" #")[0] for text in origin}
