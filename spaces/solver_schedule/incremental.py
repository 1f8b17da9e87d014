"""A compiled schedule run one evaluation at a time, for loops that belong to somebody else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from searchlab.errors import SpaceError
from searchlab.spaces.solver_schedule._resolve import resolve
from searchlab.spaces.solver_schedule.execute import _analytic, _check_state, _combine
from searchlab.spaces.solver_schedule.schedule import Schedule, Step
from searchlab.spaces.solver_schedule.table import CoefficientTable

__all__ = ["TableRun", "evaluation_points", "suffix"]


class TableRun:
    """A run that waits for evaluations: read `called_at` and `time`, give `answer` the data.

    Fed with the same data predictions it computes, bit for bit, what `run_table` computes; an
    analytic first evaluation is taken at once and never waited for.

    Args:
        table: the compiled schedule, with at least one model call.
        x: (B, ...) initial state x_T, node 0.
        mean: data mean, broadcastable to `x`; needed when the first evaluation is "mean".

    Attributes:
        index: number k of the evaluation that is waited for; `table.evaluations` when done.
        called_at: the state evaluation k is to be taken at; the result when done.

    Raises:
        SpaceError: a table without model calls, `x` not floating point, or a missing mean.
    """

    def __init__(self, table: CoefficientTable, x: Tensor, *, mean: Tensor | None = None) -> None:
        _check_state(x)
        if table.nfe == 0:
            raise SpaceError("a table without model calls cannot be run step by step")
        self.table = table
        self.index = 0
        self.called_at = x
        self._nodes: dict[int, Tensor] = {0: x}
        self._outputs: list[Tensor] = []
        self._last_use = table.last_use()
        if table.first_evaluation != "model":
            self.answer(_analytic(table.first_evaluation, x, mean))

    @property
    def done(self) -> bool:
        """Whether `called_at` is the result."""
        return self.index == self.table.evaluations

    @property
    def time(self) -> float:
        """Native time of the evaluation that is waited for, or of the result."""
        return self.table.end_time if self.done else float(self.table.times[self.index])

    def answer(self, data: Tensor, *, called_at: Tensor | None = None) -> Tensor:
        """Take the data prediction of evaluation `index` and move on.

        Args:
            data: (B, ...) the data prediction.
            called_at: the state it was really taken at, where the caller changed or rounded it; it
                takes the place of the planned one.

        Returns:
            (B, ...) the next `called_at`.

        Raises:
            SpaceError: the run is done.
        """
        if self.done:
            raise SpaceError(f"the run has had all its {self.table.evaluations} evaluations")
        k = self.index
        if called_at is not None:
            self._nodes[2 * k] = called_at
        self._outputs.append(data)
        self._nodes[2 * k + 1] = self._node(2 * k + 1, data)
        for r in [r for r in self._nodes if self._last_use[r] <= 2 * k + 1]:
            del self._nodes[r]
        self.called_at = self._nodes[2 * k + 2] = self._node(2 * k + 2, data)
        self.index = k + 1
        return self.called_at

    def _node(self, r: int, like: Tensor) -> Tensor:
        row, out = self.table.states[r], self.table.outputs[r]
        terms = [(float(row[c]), self._nodes[c]) for c in np.flatnonzero(row).tolist()]
        terms += [(float(out[k]), self._outputs[k]) for k in np.flatnonzero(out).tolist()]
        return _combine(terms, like)


def evaluation_points(schedule: Schedule) -> list[int]:
    """For each evaluation of the compiled schedule, the index in `schedule.times` it is taken at.

    An implicit corrector evaluates twice at one point; a corrector on the last step evaluates at
    the end.
    """
    answer = [0]
    steps = resolve(schedule)
    for i, step in enumerate(steps):
        final = i == len(steps) - 1
        if not final or step.corrector != "none":
            answer.append(i + 1)
        if not final and step.corrector == "implicit":
            answer.append(i + 1)
    return answer


def suffix(schedule: Schedule, point: int) -> Schedule:
    """The rest of a schedule from one of its points on, begun without a history.

    Orders are capped by the history there is: active points before the new start are dropped, and
    a step that started before it starts from the newest state. The first evaluation is the model's.

    Args:
        schedule: the plan.
        point: index in `schedule.times`, 0..n-1.

    Raises:
        SpaceError: `point` out of range.
    """
    n = len(schedule.steps)
    if not 0 <= point < n:
        raise SpaceError(f"a schedule of {n} steps has starting points 0..{n - 1}, got {point}")
    steps = [_capped(step, i + 1) for i, step in enumerate(schedule.steps[point:])]
    return replace(
        schedule,
        start_time=schedule.times[point],
        steps=tuple(steps),
        first_evaluation="model",
    )


def _capped(step: Step, history: int) -> Step:
    """`step` for a history of so many entries."""
    start = step.start if -step.start <= history else -1
    if not step.points:
        return replace(step, start=start, order=min(step.order, history))
    points = tuple(p for p in step.points if -p <= history and p != start)
    return replace(step, start=start, points=points, order=len(points) + 1)
