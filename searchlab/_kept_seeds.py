"""The seeds that a run took from an earlier one: kept, as the earlier one may go on or go away."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from searchlab.algorithms.base import Seeds
from searchlab.config import SearchConfig, Stage
from searchlab.errors import SpaceError, StudyError
from searchlab.space import Space

if TYPE_CHECKING:
    from searchlab.study import Store

__all__ = ["META", "keep_seeds", "kept_seeds", "noted", "replaced", "with_kept_seeds"]

META = "warm_seeds"
_FROM_RUN = "seed:"


def _rows(stage: Stage) -> list[int]:
    """The rows of a stage's seeds that another run found."""
    origin = () if stage.seeds is None else stage.seeds.origin
    return [row for row, text in enumerate(origin) if text.startswith(_FROM_RUN)]


def _begun(config: SearchConfig) -> int | None:
    """The stage that begins with another run's seeds; None = there is none."""
    return next((i for i, stage in enumerate(config.stages) if _rows(stage)), None)


def keep_seeds(config: SearchConfig, store: Store) -> None:
    """Notes the seeds that another run found, unless that was done."""
    index = _begun(config)
    if index is None or store.get_meta(META) is not None:
        return
    stage = config.stages[index]
    rows = _rows(stage)
    assert stage.seeds is not None
    packed = stage.space.pack(stage.seeds.population.take(rows))
    origin = [stage.seeds.origin[row] for row in rows]
    store.set_meta(META, {"genotypes": [row.hex() for row in packed], "origin": origin})


def kept_seeds(note: Any, space: Space) -> Seeds | None:
    """What `keep_seeds` noted of candidates of a space; None = nothing.

    Raises:
        StudyError: it cannot be read.
    """
    if note is None:
        return None
    try:
        origin = tuple(str(text) for text in note["origin"])
        population = space.unpack([bytes.fromhex(row) for row in note["genotypes"]])
        return Seeds(population, origin)
    except (SpaceError, ValueError, TypeError, KeyError):
        raise StudyError("the seeds that the run keeps of an earlier one are damaged") from None


def noted(database: str | Path, name: str) -> Any:
    """What the run of this name has noted; None = nothing, or there is no such run yet."""
    from searchlab.study import Database

    with Database(database) as base:
        try:
            store = base.read(name)
        except StudyError:  # whatever else is wrong, opening the run says
            return None
        note = store.get_meta(META)
        store.close("")
    return note


def with_kept_seeds(config: SearchConfig, database: str | Path, name: str) -> SearchConfig:
    """The configuration with the seeds that a run was opened with, if there is one of this name.

    Raises:
        StudyError: see `replaced`.
    """
    return config if _begun(config) is None else replaced(config, noted(database, name))


def replaced(config: SearchConfig, note: Any) -> SearchConfig:
    """The configuration with the seeds that a run has noted.

    They take the place of those of the same earlier run, whose best may be others by now.

    Raises:
        StudyError: what the run keeps cannot be read.
    """
    index = _begun(config)
    if index is None:
        return config
    stage = config.stages[index]
    rows, kept = _rows(stage), kept_seeds(note, stage.space)
    assert stage.seeds is not None
    if kept is None or _runs(kept.origin) != _runs(stage.seeds.origin[row] for row in rows):
        return config
    rest = np.setdiff1d(np.arange(len(stage.seeds.origin)), rows)
    others = Seeds(stage.seeds.population.take(rest), tuple(stage.seeds.origin[i] for i in rest))
    stages = list(config.stages)
    stages[index] = replace(stage, seeds=others.joined(kept) if len(rest) else kept)
    return replace(config, stages=tuple(stages))


def _runs(origin: Iterable[str]) -> set[str]:
    """The names of the runs that seeds come from."""
    return {text.rpartition(" #")[0] for text in origin}
