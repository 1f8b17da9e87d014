"""Recomputes the proposals of a run from its records."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from searchlab.auto import settled
from searchlab.config import Budget, SearchConfig
from searchlab.errors import StudyError
from searchlab.loop import StageRun

if TYPE_CHECKING:
    from searchlab.study import Store

__all__ = ["verify"]


def verify(config: SearchConfig, store: Store) -> list[str]:
    """Recomputes every proposal from the recorded values; returns what differs (nothing if equal).

    Evaluates nothing. Holds for every evaluator: proposals are a function of the seed, the lag and
    the recorded values.
    """
    from searchlab.search import build_algorithm, pace_of

    if store.get_meta("pace") is None:
        raise StudyError(f"run {store.name!r} has no records to verify")
    config = settled(config, store)
    begun: dict[str, dict[str, Any]] = store.get_meta("pace")
    out: list[str] = []
    for index, stage in enumerate(config.stages):
        if str(index) not in begun:
            break  # the run has not come so far
        first_id = begun[str(index)]["first_id"]
        algorithm = build_algorithm(stage, index, first_id, config, store)
        pace = pace_of(index, first_id, config, algorithm, 1, store)
        leg = StageRun(
            replace(stage, budget=Budget()),
            index,
            first_id,
            config.seed,
            store,
            None,
            algorithm,
            pace.lag,
            pace.chunk,
            recompute=True,
            free=pace.free,
        )
        leg.run()
        out += [f"stage {stage.name!r}, {text}" for text in leg.mismatches]
    return out
