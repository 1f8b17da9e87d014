"""What a stage's records say: ready to be looked up by id, and as answers for the next stage."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from searchlab._comparable import comparable
from searchlab._stage_levels import Levels
from searchlab.algorithms.base import Told
from searchlab.config import Answers, Stage
from searchlab.errors import StudyError
from searchlab.evaluator import losses
from searchlab.outcomes import constraints_of, violation
from searchlab.population import PRUNED, Evaluations, Jobs

if TYPE_CHECKING:
    from searchlab.records import Answer, Records
    from searchlab.space import Space
    from searchlab.study import Store

__all__ = [
    "Group",
    "Known",
    "differences",
    "jobs_in",
    "of_answer",
    "stage_answers",
    "under_bound",
    "under_bounds",
    "wrong_keys",
]


@dataclass
class Group:
    """Jobs of one ask group with what is known of them."""

    jobs: Jobs
    first_id: int
    end_id: int
    losses: NDArray[np.float64]
    violation: NDArray[np.float64]
    done: NDArray[np.bool_]
    told: int = 0  # rows told so far
    entered: int = 0  # rows answered or submitted so far, in order
    voids: deque[int] = field(default_factory=deque)  # ids without a job that are not recorded
    answers: dict[bytes, Answer] = field(default_factory=dict)  # values of other runs and stages
    levels: Levels | None = None  # None = each job counts as one evaluation
    known_fidelity: NDArray[np.int64] | None = None  # of each row; None = that of the jobs
    baseline: NDArray[np.bool_] = field(init=False)  # rows that no budget counts

    def __post_init__(self) -> None:
        origin = self.jobs.origin or ("",) * len(self.jobs)
        self.baseline = np.array([text.startswith("baseline") for text in origin], dtype=bool)

    def answered_below(self, bound: int) -> bool:
        """Whether all jobs with smaller ids are answered."""
        done = self.done if self.end_id <= bound else self.done[self.jobs.ids < bound]
        return self.first_id >= bound or bool(done.all())

    def block(self, start: int, size: int, is_repeat: Callable[[bytes, int], bool]) -> list[int]:
        """All rows of a chunk whose values depend on their neighbours.

        Rows that are recorded already, or that the budget leaves out, stand in it as neighbours
        only: the values of the others must not depend on what was known or affordable.
        """
        rows = range(start, min(start + size, len(self.jobs)))
        keys, ids = self.jobs.keys, self.jobs.ids.tolist()
        return [row for row in rows if not is_repeat(keys[row], ids[row])]

    @property
    def price(self) -> float:
        """What one job of a group that was asked for costs; groups of records may have several."""
        return 1 if self.levels is None or not len(self.jobs) else float(self.levels.price[0])

    @property
    def fidelity(self) -> NDArray[np.int64]:
        """At which fidelity each row is measured, (n,)."""
        if self.known_fidelity is not None:
            return self.known_fidelity
        return np.full(len(self.jobs), self.jobs.fidelity, dtype=np.int64)

    def take_predictions(self, row: int, known: Jobs, at: int) -> None:
        """What the record of a row says was predicted stands, whatever would be now."""
        if self.jobs.predicted is not None and known.predicted is not None:
            self.jobs.predicted[row] = known.predicted[at]

    def worth(self, rows: Sequence[int], flags: NDArray[np.bool_]) -> float:
        """What the flagged ones of some rows cost together."""
        if self.levels is None:
            return int(flags.sum())
        return float(self.levels.price[np.asarray(rows, dtype=np.int64)[flags]].sum())

    def answers_until(self, stop: int, stage: Stage) -> Told:
        """The answers of the rows that were not told yet, up to `stop`; they are told now."""
        rows = slice(self.told, stop)
        population = self.jobs.population
        if stop - self.told < len(self.jobs):
            population = population.take(rows)
        self.told = stop
        return Told(
            self.jobs.ids[rows],
            population,
            self.losses[rows] if stage.steer is None else self.losses[rows][:, [stage.main]],
            self.violation[rows],
            None if self.jobs.predicted is None else self.jobs.predicted[rows],
            self.fidelity[rows],
        )


def jobs_in(records: Records) -> set[tuple[bytes | None, int, int]]:
    """Key, fidelity and replicate of every record."""
    places = records.fidelity.tolist(), records.replicate.tolist()
    return set(zip(records.keys, *places, strict=True))


class Known:
    """Records of one stage, ready to be looked up by id."""

    def __init__(self, records: Records, stage: Stage) -> None:
        from searchlab.records import VOID

        void = records.state == VOID
        void_ids = records.ids[void]
        self._told = dict(zip(records.ids.tolist(), records.told_at_ask.tolist(), strict=True))
        self.void_set = set(void_ids.tolist())
        records = records.take(np.flatnonzero(~void))
        self.jobs = Jobs(
            ids=records.ids,
            population=stage.space.unpack(records.genotypes),
            keys=tuple(key or b"" for key in records.keys),
            origin=tuple(records.origin),
            parents=records.parents,
            predicted=np.column_stack([records.predicted_mean, records.predicted_sd]),
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
        self.cost_s = records.cost_s
        self.cached = np.asarray(records.cached, dtype=bool)
        self.state = records.state
        self.fidelity, self.replicate = records.fidelity, records.replicate
        self.reason = records.reason
        self.row_of = {i: row for row, i in enumerate(records.ids.tolist())}
        ids = np.union1d(records.ids, void_ids)
        self.last = int(ids[-1]) if len(ids) else -1
        gaps = np.flatnonzero(np.diff(ids) > 1)
        self._first = int(ids[0]) if len(ids) else 0
        self._unbroken = int(ids[gaps[0]] + 1 if len(gaps) else ids[-1] + 1) if len(ids) else 0

    def told_at_ask(self, first_id: int, end_id: int) -> int | None:
        """How many ids were told when a group was asked for; None where nothing is known of it."""
        rows = (self._told.get(i) for i in range(first_id, end_id))
        return next((told for told in rows if told is not None), None)

    def complete_until(self, q: int, start: int) -> int:
        """The first id of the first group, counted from `start`, that is not wholly known."""
        if self._first > start:
            return start
        return start + max(0, self._unbroken - start) // q * q


def of_answer(answer: Answer) -> Evaluations:
    """A recorded value as an evaluation of one row."""
    return Evaluations(
        values=answer.values[None],
        state=np.array([answer.state], np.int8),
        reason=[answer.reason],
        std_error=None if answer.std_error is None else answer.std_error[None],
        constraints=answer.constraints[None],
        signals=answer.signals[None],
        cost_s=np.array([answer.cost_s]),
    )


def under_bound(answer: Answer, bound: float, sign: float) -> Answer | None:
    """What a recorded value says to a job with a bound of its own, where evaluators can prune.

    A job is pruned if and only if its loss is beyond its bound, and its value is then the bound. A
    pruned record answers a bound that is equal or tighter; a full one answers every job.

    Args:
        answer: the record.
        bound: loss; NaN = none.
        sign: 1 where the objective is minimised, -1 where it is maximised.

    Returns:
        The job's own answer, None where the record says too little.
    """
    known = sign * float(answer.values[0])
    if answer.state == PRUNED and not bound <= known:
        return None
    if answer.state == PRUNED or known > bound:
        return answer._replace(
            values=np.array([sign * bound]),
            state=PRUNED,
            reason=answer.reason or "proven worse than its bound",
        )
    return answer


def under_bounds(found: dict[bytes, Answer], jobs: Jobs, sign: float) -> dict[bytes, Answer]:
    """The records that answer jobs with bounds, each as its job's own answer."""
    bounds = np.full(len(jobs), np.nan) if jobs.bound is None else jobs.bound
    out = {}
    for key, bound in zip(jobs.keys, bounds.tolist(), strict=True):
        answer = under_bound(found[key], bound, sign) if key in found else None
        if answer is not None:
            out[key] = answer
    return out


def stage_answers(store: Store, stage: Stage, index: int) -> Answers:
    """What a stage's records say, for the rule that starts the next stage."""
    records = store.records()
    mine = records.take(np.flatnonzero(records.stage == index))
    one_each, behind = comparable(mine, stage.fidelity_index)
    known = Known(one_each.take(np.flatnonzero(~behind)), stage)
    jobs = known.jobs
    main = None if stage.trades else stage.main
    return Answers(stage.space, jobs.population, jobs.origin, known.losses, known.violation, main)


# -- verify -------------------------------------------------------------------------------------


def wrong_keys(known: Known, space: Space) -> list[str]:
    """Records whose key is not that of their candidate."""
    keys = space.keys(known.jobs.population)
    rows = zip(known.jobs.ids.tolist(), keys, known.jobs.keys, strict=True)
    return [
        f"id {i}: recorded {stored.hex()}, but the recorded candidate is {key.hex()}"
        for i, key, stored in rows
        if key != stored
    ]


def differences(jobs: Jobs, known: Known, first_id: int, n: int) -> list[str] | None:
    """Where a recomputed group differs from the records; None where the records end."""
    asked = dict(zip(jobs.ids.tolist(), jobs.keys, strict=True))
    out = []
    for i in range(first_id, first_id + n):
        at = known.row_of.get(i)
        if at is None and i not in known.void_set:
            return None
        stored = None if at is None else known.jobs.keys[at]
        if asked.get(i) != stored:
            out.append(
                f"id {i}: recorded {stored.hex() if stored else 'void'}, "
                f"proposed {asked[i].hex() if i in asked else 'void'}"
            )
    return out
