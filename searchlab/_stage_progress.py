"""What a stage says of itself: its figures after a batch, and that nothing succeeds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from searchlab.callbacks import Progress
from searchlab.errors import EvaluationError
from searchlab.executors.base import Done, usage_of

if TYPE_CHECKING:
    from searchlab.loop import StageRun

__all__ = ["hopeless", "progress_of", "tell_progress"]


def tell_progress(leg: StageRun, finished: Sequence[Done]) -> None:
    """Tells the callbacks what a batch has come to."""
    if leg.callbacks:
        progress = progress_of(leg, finished)
        for callback in leg.callbacks:
            callback(progress)


def progress_of(leg: StageRun, finished: Sequence[Done]) -> Progress:
    """What callbacks hear after a batch."""
    return Progress(
        leg.stage.name,
        leg.next_id - leg.first_id,
        leg.finished,
        leg.paid,
        leg.hits,
        leg.failed,
        leg.stage.budget.evaluations,
        time.monotonic() - leg.started,
        {group: leg.sign * loss for group, loss in leg.best.items()},
        tuple(finished),
        None if leg.executor is None else usage_of(leg.executor),
        leg.stage.chosen,
        leg.best_so_far.front(),
        leg._limits.device_seconds / 3600,
        leg.stage.budget.gpu_price,
    )


def hopeless(leg: StageRun, finished: Sequence[Done]) -> EvaluationError:
    """The error of a stage of which nothing succeeds."""
    reason = next((r for done in finished for r in done.evaluations.reason or () if r), "no reason")
    return EvaluationError(
        f"the first {leg.finished} evaluations of stage {leg.stage.name!r} all failed, "
        f"the last with: {reason}"
    )
