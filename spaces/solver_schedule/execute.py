"""Running schedules in torch: through the compiled table, and step by step as a check of it.

A denoiser is ``denoise(x, t) -> data prediction``: x is (B, ...) and t is (B,), the native time in
float64 when x is float64 and in float32 otherwise (never half precision, which cannot tell
neighbouring times apart).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from searchlab.cuda_ext.solver_update import MAX_INPUTS, solver_update
from searchlab.errors import SpaceError
from searchlab.spaces.solver_schedule.coefficients import relaxation_factor
from searchlab.spaces.solver_schedule.noise_schedule import FloatArray
from searchlab.spaces.solver_schedule.schedule import FirstEvaluation, Schedule, Step
from searchlab.spaces.solver_schedule.table import CoefficientTable

__all__ = ["CountingDenoiser", "Denoiser", "run_stepwise", "run_table"]

Denoiser = Callable[[Tensor, Tensor], Tensor]


class CountingDenoiser:
    """A denoiser that counts its calls and keeps their native times.

    Attributes:
        calls: how often it was called.
        times: the native time of the first row of each call.
    """

    def __init__(self, denoise: Denoiser) -> None:
        self._denoise = denoise
        self.times: list[float] = []

    @property
    def calls(self) -> int:
        return len(self.times)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(float(t.flatten()[0]) if t.numel() else math.nan)
        return self._denoise(x, t)


def _time_vector(x: Tensor, time: float) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.full((x.shape[0],), time, dtype=dtype, device=x.device)


def _check_state(x: Tensor) -> None:
    if x.ndim == 0 or not x.is_floating_point():
        raise SpaceError(f"x must be (B, ...) floating point, got {tuple(x.shape)} {x.dtype}")


def _analytic(first: FirstEvaluation, x: Tensor, mean: Tensor | None) -> Tensor:
    """The data prediction that stands in for the first model call."""
    if first == "zero":
        return torch.zeros_like(x)
    if mean is None:
        raise SpaceError("first_evaluation 'mean' needs the mean of the data, got mean=None")
    return mean.to(device=x.device, dtype=x.dtype).expand_as(x)


def _combine(terms: list[tuple[float, Tensor]], like: Tensor) -> Tensor:
    """``sum c * x`` in the given order; a single term of weight 1.0 is passed through."""
    if not terms:
        return torch.zeros_like(like)
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1]
    if like.is_cuda and like.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return _fused(terms)
    total = terms[0][0] * terms[0][1]
    for weight, value in terms[1:]:
        # Product and sum are rounded apart: a fused multiply-add is used for whole vectors but not
        # for the tail, and the bits of a sample would depend on its place in the batch.
        total.add_(weight * value)
    return total


def _fused(terms: list[tuple[float, Tensor]]) -> Tensor:
    """The same sum in one launch that reads every term once; more terms than fit go in parts."""
    total: Tensor | None = None
    for start in range(0, len(terms), MAX_INPUTS - 1):
        part = terms[start : start + MAX_INPUTS - 1]
        weights = [weight for weight, _ in part]
        inputs = [value.contiguous() for _, value in part]
        if total is not None:
            weights, inputs = [1.0, *weights], [total, *inputs]
        table = torch.tensor([weights], dtype=torch.float32)
        total = solver_update(inputs, table, dtypes=[terms[0][1].dtype])[0]
    assert total is not None
    return total


def run_table(
    table: CoefficientTable,
    denoise: Denoiser,
    x: Tensor,
    *,
    mean: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Run a compiled schedule.

    Terms are added in a fixed order, states before evaluations and earlier before later, and exact
    zeros are skipped (0 * NaN would spread), so equal tables give equal bits.

    Args:
        table: the compiled schedule.
        denoise: the data prediction, called `table.nfe` times.
        x: (B, ...) initial state x_T, any floating type.
        mean: data mean, broadcastable to `x`; needed when the first evaluation is "mean".
        dtype: type the states are kept and combined in; default that of `x`. The model sees it too.

    Returns:
        (B, ...) the final state in the type of `x`.

    Raises:
        SpaceError: `x` is not a batch of floating-point values, or `mean` is missing.
    """
    _check_state(x)
    state = x if dtype is None else x.to(dtype)
    n = table.evaluations
    nodes: dict[int, Tensor] = {0: state}
    outputs: list[Tensor] = []
    needed = table.last_use()

    def node(r: int) -> Tensor:
        row, out = table.states[r], table.outputs[r]
        terms = [(float(row[c]), nodes[c]) for c in np.flatnonzero(row).tolist()]
        terms += [(float(out[k]), outputs[k]) for k in np.flatnonzero(out).tolist()]
        return _combine(terms, state)

    for k in range(n):
        if k:
            nodes[2 * k] = node(2 * k)
        called_at = nodes[2 * k]
        if k == 0 and table.first_evaluation != "model":
            outputs.append(_analytic(table.first_evaluation, called_at, mean))
        else:
            outputs.append(denoise(called_at, _time_vector(called_at, float(table.times[k]))))
        nodes[2 * k + 1] = node(2 * k + 1)
        for r in [r for r in nodes if needed[r] <= 2 * k + 1]:
            del nodes[r]
    return node(2 * n).to(x.dtype)


def run_stepwise(
    schedule: Schedule, denoise: Denoiser, x: Tensor, *, mean: Tensor | None = None
) -> Tensor:
    """Run a schedule step by step: predict, evaluate, correct. Slow; a reference for `run_table`.

    It shares no weights with the compiler: Taylor integrals come from quadrature, derivatives from
    a linear solve per step, and noise predictions are formed as tensors.

    Args:
        schedule: the plan.
        denoise: the data prediction, called `schedule.nfe` times.
        x: (B, ...) initial state x_T.
        mean: data mean, broadcastable to `x`; needed when the first evaluation is "mean".

    Returns:
        (B, ...) the final state.

    Raises:
        SpaceError: `x` is not a batch of floating-point values, or `mean` is missing.
    """
    _check_state(x)
    if schedule.first_evaluation == "model":
        data = denoise(x, _time_vector(x, schedule.start_time))
    else:
        data = _analytic(schedule.first_evaluation, x, mean)
    history = [_Visited(schedule, schedule.start_time, x, data)]
    last = len(schedule.steps) - 1
    for i, step in enumerate(schedule.steps):
        start = history[step.start]
        active = _active(schedule, step, history)
        state = _taylor_step(schedule, step, start, active, step.time, corrected=False)
        if i == last and step.corrector == "none":
            return state
        t = _time_vector(state, step.time)
        arrival = _Visited(schedule, step.time, state, denoise(state, t))
        if step.corrector != "none":
            state = _taylor_step(schedule, step, start, [*active, arrival], step.time, True)
            if i == last:
                return state
            if step.corrector == "implicit":
                arrival = _Visited(schedule, step.time, state, denoise(state, t))
            arrival.state = state
        history.append(arrival)
    raise AssertionError("unreachable: the last step returns")


class _Visited:
    """One history entry: the state to go on from and the evaluation, in both prediction types."""

    def __init__(self, schedule: Schedule, time: float, called_at: Tensor, data: Tensor) -> None:
        self.time = time
        self.alpha = float(schedule.noise.alpha(time))
        self.sigma = float(schedule.noise.sigma(time))
        self.log_snr = float(schedule.noise.log_snr(time))
        self.state = called_at
        self.data = data
        self.noise = (called_at - self.alpha * data) / self.sigma


def _active(schedule: Schedule, step: Step, history: list[_Visited]) -> list[_Visited]:
    """The active points of the predictor, nearest to the start in log-SNR first."""
    start = history[step.start]
    if step.points:
        chosen = [history[p] for p in step.points]
    else:
        others = [v for v in reversed(history) if v is not start and v.alpha > 0]
        chosen = others[: step.order - 1] if start.alpha > 0 else []
    return sorted(chosen, key=lambda v: abs(v.log_snr - start.log_snr))


def _taylor_step(
    schedule: Schedule,
    step: Step,
    start: _Visited,
    active: list[_Visited],
    time: float,
    corrected: bool,
) -> Tensor:
    noise = schedule.noise
    alpha, sigma = float(noise.alpha(time)), float(noise.sigma(time))
    # At the ends of the log-SNR line: the limits of the order-1 step.
    if start.alpha == 0:
        return (sigma / start.sigma) * start.state + alpha * start.data
    if sigma == 0 and step.prediction == "data":
        return alpha * start.data
    if sigma == 0:
        return (alpha / start.alpha) * (start.state - start.sigma * start.noise)
    h = float(noise.log_snr(time)) - start.log_snr
    data = step.prediction == "data"
    origin = start.data if data else start.noise
    derivatives = [origin]
    differences = [(v.data if data else v.noise) - origin for v in active]
    d = [_variable(schedule, v.time) - _variable(schedule, start.time) for v in active]
    old = len(active) - corrected
    order_one = old == 0
    for k in range(1, len(active) + 1):
        use = list(range(len(active)))
        if k == 1 and step.estimate_order is not None:
            use = use[: min(step.estimate_order, old)] + ([old] if corrected else [])
        weights = _solve([d[j] for j in use], k)
        total = torch.stack([w * differences[j] for w, j in zip(weights, use, strict=True)]).sum(0)
        if k == 1 and corrected == order_one:
            z = h if not data else -h
            total = total * relaxation_factor(step.relaxation, z, h, step.coefficient)
        if k >= 2 and not corrected and len(step.scales) > k - 2:
            total = total * step.scales[k - 2]
        derivatives.append(total)
    u, w = np.polynomial.legendre.leggauss(48)
    at = start.log_snr + 0.5 * h * (u + 1)
    weight = 0.5 * h * w * np.exp(at - at[-1] if data else at[0] - at)
    v = _variable_at(schedule, at) - _variable(schedule, start.time)
    # The kernel relative to its largest value, then scaled to its exact zeroth moment.
    exact = alpha * -math.expm1(-h) if data else -sigma * math.expm1(h)
    weight = weight * (exact / weight.sum())
    out = (sigma / start.sigma if data else alpha / start.alpha) * start.state
    for k, derivative in enumerate(derivatives):
        out = out + float(weight @ v**k) / math.factorial(k) * derivative
    return out


def _solve(d: list[float], k: int) -> list[float]:
    """Weights on differences at distances d for the k-th derivative, by the p x p system."""
    p = len(d)
    scale = max(abs(v) for v in d)
    matrix = np.array([[(v / scale) ** r / math.factorial(r) for v in d] for r in range(1, p + 1)])
    unit = np.zeros(p)
    unit[k - 1] = 1.0
    return [float(a) / scale**k for a in np.linalg.solve(matrix, unit)]


def _variable(schedule: Schedule, time: float) -> float:
    if schedule.interpolation == "time":
        return time
    noise = schedule.noise
    return float(noise.rho(time) if schedule.interpolation == "rho" else noise.log_snr(time))


def _variable_at(schedule: Schedule, log_snr: FloatArray) -> FloatArray:
    if schedule.interpolation == "log_snr":
        return log_snr
    if schedule.interpolation == "rho":
        return np.asarray(np.exp(-log_snr))
    return schedule.noise.time_of_log_snr(log_snr)
