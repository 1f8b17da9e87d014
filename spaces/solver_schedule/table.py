"""Compiling a schedule to a table of weights: any schedule becomes one small triangular program.

Without thresholding every step is linear in the stored states and model evaluations, so a run is
described by two arrays. Let K be the number of evaluations, an analytic first one included, and
m_k the data prediction of evaluation k. The nodes are 0..2K:

- node 2k is the state evaluation k is called at; node 0 is the initial state x_T;
- node 2k + 1 is the state later steps start from at that point: node 2k itself (one weight 1.0)
  unless a pseudo corrector moved it;
- node 2K is the result.

``node[r] = sum_c states[r, c] * node[c] + sum_k outputs[r, k] * m_k``. A copy row 2k + 1 is written
for completeness but never read: later rows then refer to node 2k. Noise predictions do not appear:
they are (node[2k] - alpha_k m_k) / sigma_k, with node 2k the state the model was CALLED at.

Source: arXiv 2403.01329, section 3, has this form for linear multistep solvers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import SpaceError
from searchlab.spaces.solver_schedule._resolve import ResolvedStep, resolve
from searchlab.spaces.solver_schedule.coefficients import Point, step_weights
from searchlab.spaces.solver_schedule.noise_schedule import FloatArray
from searchlab.spaces.solver_schedule.schedule import FirstEvaluation, Schedule

__all__ = ["CoefficientTable", "compile_schedule"]

_FIRST_TAG: dict[FirstEvaluation, bytes] = {"model": b"\0", "zero": b"\1", "mean": b"\2"}


@dataclass(frozen=True, eq=False)
class CoefficientTable:
    """A compiled schedule; arrays are float64 and read-only.

    Attributes:
        states: (2K + 1, 2K + 1) weights on earlier nodes, strictly lower triangular; row 0 is 0.
        outputs: (2K + 1, K) weights on the data predictions; row r uses only k < (r + 1) // 2.
        times: (K,) native time of each evaluation, not increasing (an implicit corrector evaluates
            twice at one time).
        end_time: native time of the result.
        first_evaluation: whether evaluation 0 calls the model or is 0 or the data mean.

    Raises:
        SpaceError: shapes that do not fit, weights above the diagonal, or values not finite.
    """

    states: FloatArray
    outputs: FloatArray
    times: FloatArray
    end_time: float
    first_evaluation: FirstEvaluation = "model"

    def __post_init__(self) -> None:
        for name in ("states", "outputs", "times"):
            array = np.array(getattr(self, name), dtype=np.float64, order="C")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        k = len(self.times)
        if self.times.ndim != 1 or k == 0:
            raise SpaceError(f"times must hold at least one evaluation, got {self.times.shape}")
        shape = (2 * k + 1, 2 * k + 1)
        if self.states.shape != shape or self.outputs.shape != (2 * k + 1, k):
            raise SpaceError(
                f"{k} evaluations need states {shape} and outputs {(2 * k + 1, k)},"
                f" got {self.states.shape} and {self.outputs.shape}"
            )
        state_mask, output_mask = _forbidden(k)
        if self.states[state_mask].any() or self.outputs[output_mask].any():
            raise SpaceError("a node may only use earlier nodes and evaluations before it")
        total = float(self.states.sum() + self.outputs.sum() + self.times.sum())
        if not np.isfinite(total):
            raise SpaceError("a coefficient table must be finite, got a NaN or an infinite weight")
        if self.first_evaluation not in _FIRST_TAG:
            raise SpaceError(
                f"first_evaluation must be one of {', '.join(_FIRST_TAG)};"
                f" got {self.first_evaluation!r}"
            )

    @property
    def evaluations(self) -> int:
        """K, an analytic first evaluation included."""
        return len(self.times)

    @property
    def nfe(self) -> int:
        """Model calls of a run."""
        return len(self.times) - (self.first_evaluation != "model")

    def is_copy(self, row: int) -> bool:
        """Whether a node is the node before it unchanged (one weight of exactly 1.0)."""
        return (
            row > 0
            and self.states[row, row - 1] == 1.0
            and np.count_nonzero(self.states[row]) == 1
            and not self.outputs[row].any()
        )

    def last_use(self) -> list[int]:
        """For each node, (2K + 1,), the last node whose row reads it (itself if none does)."""
        rows = np.arange(len(self.states))
        used = np.where(self.states != 0, rows[:, None], rows[None, :])
        return [int(v) for v in used.max(axis=0)]

    def row_bytes(self, k: int) -> bytes:
        """Bytes that determine node 2k and everything before it; a prefix key.

        Two tables whose bytes for k agree compute bit-identical inputs of evaluation k (and, for
        k = K of both, bit-identical results) from equal initial states, models and means, however
        the schedules were written down. The native time of evaluation k (for k = K: the end time)
        is part of it. What native time means belongs to the model: a cache that serves several
        models must add the model to the key.

        Args:
            k: 0..K.

        Raises:
            SpaceError: `k` out of range.
        """
        n = self.evaluations
        if not 0 <= k <= n:
            raise SpaceError(f"row_bytes takes 0..{n}, got {k}")
        parts = [_FIRST_TAG[self.first_evaluation] if k else b""]
        # Adding 0.0 turns -0.0 into 0.0, so that equal values have equal bytes.
        parts.append((self.times[: k + 1] + 0.0).tobytes())
        if k == n:
            parts.append(b"end" + np.float64(self.end_time + 0.0).tobytes())
        states, outputs = self.states[: 2 * k + 1] + 0.0, self.outputs[: 2 * k + 1] + 0.0
        for r in range(1, 2 * k + 1):
            parts.append(states[r, :r].tobytes())
            parts.append(outputs[r, : (r + 1) // 2].tobytes())
        return b"".join(parts)


@lru_cache(maxsize=32)
def _forbidden(k: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Entries that must be 0 in a table of k evaluations, one mask per array."""
    row = np.arange(2 * k + 1)
    return row[None, :] >= row[:, None], np.arange(k)[None, :] >= (row[:, None] + 1) // 2


def _points(schedule: Schedule) -> list[Point]:
    alpha, sigma, log_snr = schedule._alpha, schedule._sigma, schedule._log_snr
    if schedule.interpolation == "log_snr":
        variable = log_snr
    elif schedule.interpolation == "time":
        variable = np.array(schedule.times)
    else:
        variable = np.exp(-log_snr)
    columns = (alpha.tolist(), sigma.tolist(), log_snr.tolist(), variable.tolist())
    return [Point(*row) for row in zip(*columns, strict=True)]


class _Compiler:
    """The rows under construction, and where each visited point's evaluation and state are."""

    def __init__(self, schedule: Schedule, steps: list[ResolvedStep]) -> None:
        self.schedule = schedule
        self.points = _points(schedule)
        extra = sum(s.corrector == "implicit" for s in steps) + (steps[-1].corrector == "pseudo")
        k = len(steps) + extra
        self.states = np.zeros((2 * k + 1, 2 * k + 1))
        self.outputs = np.zeros((2 * k + 1, k))
        self.times: list[float] = [schedule.start_time]
        self.evaluation = [0]  # per visited point: the evaluation kept there
        self.restart = [0]  # per visited point: the node later steps start from
        if k > 0:
            self.states[1, 0] = 1.0

    def row(self, r: int, step: ResolvedStep, t: int, *, corrected: bool) -> None:
        """Write node `r`: the state at point `t` predicted or corrected by `step`."""
        points = self.points
        s = points[step.start]
        active = step.points
        estimators: list[int] | None = None
        if step.estimate_order is not None:
            nearest = sorted(
                range(len(active)), key=lambda j: abs(points[active[j]].log_snr - s.log_snr)
            )
            estimators = sorted(nearest[: step.estimate_order])
        if corrected:
            if estimators is not None:
                estimators = [0, *(j + 1 for j in estimators)]
            active = (t, *active)
        # The relaxation belongs to the predictor, unless that has no derivative.
        relaxed = corrected == (step.order == 1)
        # From a state the model was called at, order-1 noise is the data step; writing it as that
        # one gives equal bits.
        data = step.data or (not active and self.restart[step.start] % 2 == 0)
        weights = step_weights(
            s,
            points[t],
            [points[j] for j in active],
            data=data,
            noise=self.schedule.noise,
            interpolation=self.schedule.interpolation,
            estimators=estimators,
            relaxation=step.relaxation if relaxed else "none",
            coefficient=step.coefficient,
            scales=() if corrected else step.scales,
        )
        states, outputs = self.states[r], self.outputs[r]
        states[self.restart[step.start]] = weights.state
        terms = zip((step.start, *active), (weights.start, *weights.points), strict=True)
        for j, weight in terms:
            k = self.evaluation[j]
            if data:
                outputs[k] += weight
            else:
                share = weight / points[j].sigma
                states[2 * k] += share
                outputs[k] -= share * points[j].alpha

    def evaluate(self, t: int) -> None:
        """Record that node 2k, just written, is evaluated at point `t`."""
        self.times.append(self.schedule.steps[t - 1].time)
        k = len(self.times) - 1
        if len(self.evaluation) == t:
            self.evaluation.append(k)
            self.restart.append(2 * k)
        else:
            self.evaluation[t] = k
            self.restart[t] = 2 * k
        self.states[2 * k + 1, 2 * k] = 1.0


def compile_schedule(schedule: Schedule) -> CoefficientTable:
    """The coefficient table of a schedule.

    Raises:
        SpaceError: the schedule's weights are not finite.
    """
    steps = resolve(schedule)
    last = len(steps) - 1
    c = _Compiler(schedule, steps)
    node = 0
    for i, step in enumerate(steps):
        t = i + 1
        node += 2
        c.row(node, step, t, corrected=False)
        if i == last and step.corrector == "none":
            break
        c.evaluate(t)
        if step.corrector == "none":
            continue
        k = node // 2
        c.states[node + 1, node] = 0.0
        c.row(node + 1, step, t, corrected=True)
        if i == last or step.corrector == "implicit":
            # The corrected state is the next node to be evaluated, or the result.
            node += 2
            c.states[node, node - 1] = 1.0
            if i != last:
                c.evaluate(t)
        else:
            c.restart[t] = 2 * k + 1
    return CoefficientTable(
        c.states, c.outputs, np.array(c.times), schedule.steps[-1].time, schedule.first_evaluation
    )
