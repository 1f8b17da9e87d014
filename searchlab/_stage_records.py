"""What a stage's records say: ready to be looked up by id, and as answers for the next stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from searchlab.config import Answers, Stage
from searchlab.errors import StudyError
from searchlab.evaluator import losses
from searchlab.outcomes import constraints_of, violation
from searchlab.population import Evaluations, Jobs

if TYPE_CHECKING:
    from searchlab.records import Answer, Records
    from searchlab.study import Store

__all__ = ["Known", "is_baseline", "of_answer", "stage_answers"]


class Known:
    """Records of one stage, ready to be looked up by id."""

    def __init__(self, records: Records, stage: Stage) -> None:
        from searchlab.records import VOID

        void = records.state == VOID
        void_ids = records.ids[void]
        self.void_set = set(void_ids.tolist())
        records = records.take(np.flatnonzero(~void))
        self.jobs = Jobs(
            ids=records.ids,
            population=stage.space.unpack(records.genotypes),
            keys=tuple(key or b"" for key in records.keys),
            origin=tuple(records.origin),
            parents=records.parents,
        )
        evaluations = records.evaluations()
        m = len(stage.evaluator.objectives)
        if len(records) and records.values.shape[1] < m:
            raise StudyError(
                f"records of stage {stage.name!r} have {records.values.shape[1]} values per "
                f"candidate; the evaluator gives {m}"
            )
        evaluations.values = evaluations.values[:, :m].reshape(len(records), m)
        self.losses = losses(evaluations, stage.evaluator.objectives)
        constraints = constraints_of(stage.evaluator)
        self.violation = violation(evaluations.constraints, constraints)
        self.cached = np.asarray(records.cached, dtype=bool)
        self.state = records.state
        self.reason = records.reason
        self.row_of = {i: row for row, i in enumerate(records.ids.tolist())}
        ids = np.union1d(records.ids, void_ids)
        gaps = np.flatnonzero(np.diff(ids) > 1)
        self._first = int(ids[0]) if len(ids) else 0
        self._unbroken = int(ids[gaps[0]] + 1 if len(gaps) else ids[-1] + 1) if len(ids) else 0

    def complete_until(self, q: int, start: int) -> int:
        """The first id of the first group, counted from `start`, that is not wholly known."""
        if self._first > start:
            return start
        return start + max(0, self._unbroken - start) // q * q


def of_answer(answer: Answer) -> Evaluations:
    """A recorded value as an evaluation of one row."""
    return Evaluations(
        values=answer.values[None],
        std_error=None if answer.std_error is None else answer.std_error[None],
        constraints=answer.constraints[None],
        signals=answer.signals[None],
        cost_s=np.array([answer.cost_s]),
    )


def is_baseline(jobs: Jobs, row: int) -> bool:
    """Whether a job belongs to the baselines, which no budget counts."""
    return bool(jobs.origin) and jobs.origin[row].startswith("baseline")


def stage_answers(store: Store, stage: Stage, index: int) -> Answers:
    """What a stage's records say, for the rule that starts the next stage."""
    records = store.records()
    known = Known(records.take(np.flatnonzero(records.stage == index)), stage)
    jobs = known.jobs
    return Answers(stage.space, jobs.population, jobs.origin, known.losses, known.violation)
