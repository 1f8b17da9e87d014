"""Many schedules in one call of a pipeline's network.

`RowDenoiser` repeats what the pipeline did around its network in a captured step, for rows that may
all be at different times. Whether it does so rightly is for its user to probe.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from searchlab.errors import EvaluationError
from searchlab.evaluators.pipeline_sampling import Capture, NetworkCall, PipelineSampler
from searchlab.spaces.solver_schedule.installed import prediction_type_of, sigma_data_of
from searchlab.spaces.solver_schedule.model_outputs import (
    input_scale,
    model_timesteps,
    prediction_weights,
)
from searchlab.spaces.solver_schedule.noise_schedule import Edm

__all__ = ["RowDenoiser", "in_blocks"]


class RowDenoiser:
    """Data predictions of a pipeline's network for any rows at any times, guidance included.

    Built from what the pipeline's own calls looked like: one call for all rows, one for twice the
    rows (first without, then with the prompt), or two calls (first with, then without it). Tensors
    with a row per sample are taken by row, all else is passed as it was.

    Args:
        sampler: of the pipeline.
        captures: of all rows, in order.
        other: of another number of rows than the first, to tell which tensors have a row per
            sample: one may have that length by chance.
        guidance_scale: as handed to the pipeline; used where it calls its network twice.

    Raises:
        EvaluationError: the pipeline's calls have another form; says which.
    """

    def __init__(
        self,
        sampler: PipelineSampler,
        captures: Sequence[Capture],
        *,
        other: Capture,
        guidance_scale: float | None,
    ) -> None:
        scheduler = sampler.scheduler
        self._noise = sampler.noise
        self._prediction = prediction_type_of(scheduler)
        self._sigma_data = sigma_data_of(scheduler)
        self._train = int(scheduler.config.get("num_train_timesteps", 1000))
        first = captures[0]
        modules = {id(c.module) for capture in captures for c in capture.networks}
        counts = {len(capture.networks) for capture in captures}
        if len(modules) != 1 or counts not in ({1}, {2}):
            raise EvaluationError(
                f"{len(modules)} networks in {sorted(counts)} calls a step; allowed: one network in"
                " one or two calls"
            )
        self._module = first.networks[0].module
        self._input = next(iter(inspect.signature(self._module.forward).parameters))
        self.start = torch.cat([capture.start for capture in captures])
        self._halves = self._input_rows(first, first.networks[0]) // len(first.start)
        if self._halves not in (1, 2) or (self._halves == 2 and counts == {2}):
            raise EvaluationError(
                f"a network call of {self._halves} times the rows, {counts} calls; allowed: one"
                " call of one or two times the rows, or two of one"
            )
        self._guidance = guidance_scale
        self._guided = self._halves == 2 or counts == {2}
        if self._guided and guidance_scale is None:
            raise EvaluationError("guidance is on, but its scale is not known; give guidance_scale")
        self._calls = [
            self._joined([capture.networks[i] for capture in captures], captures, other, i)
            for i in range(counts.pop())
        ]
        told = first.networks[0].arguments.get("timestep")
        if not isinstance(told, Tensor):
            raise EvaluationError("the network has no argument timestep that is a tensor")
        self._time_dtype = told.dtype
        self._time_scale = self._ratio(float(told.flatten()[0]), first.timestep)
        self._dtype = first.networks[0].arguments[self._input].dtype

    def _input_rows(self, capture: Capture, call: NetworkCall) -> int:
        value = call.arguments.get(self._input)
        if not isinstance(value, Tensor) or value.shape[1:] != capture.start.shape[1:]:
            raise EvaluationError("the network's first argument is not the state")
        return len(value)

    @staticmethod
    def _ratio(told: float, published: float) -> float:
        for ratio in (1.0, 1e-3):
            if abs(told - ratio * published) <= 5e-3 * abs(ratio * published):
                return ratio
        raise EvaluationError(f"the network was told time {told:g} where {published:g} is due")

    def _joined(
        self, calls: Sequence[NetworkCall], captures: Sequence[Capture], other: Capture, i: int
    ) -> dict[str, Any]:
        """Arguments for all rows; a tensor by row becomes `_ByRow`."""
        names = [n for n in calls[0].arguments if n not in (self._input, "timestep")]
        rows = [len(capture.start) for capture in (*captures, other)]
        every = [*calls, other.networks[i]]
        return {n: self._join([c.arguments.get(n) for c in every], rows) for n in names}

    def _join(self, values: Sequence[Any], rows: Sequence[int]) -> Any:
        """One argument of all captures, the last of which is the other one."""
        first = values[0]
        if isinstance(first, dict):
            return {k: self._join([v[k] for v in values], rows) for k in first}
        if not isinstance(first, Tensor):
            return first
        by_row = [
            v.ndim > 0 and len(v) == n * self._halves for v, n in zip(values, rows, strict=True)
        ]
        if all(by_row):
            halves = [v.chunk(self._halves) for v in values[:-1]]
            return _ByRow([torch.cat(parts) for parts in zip(*halves, strict=True)])
        if any(v.shape != first.shape or not torch.equal(v, first) for v in values):
            raise EvaluationError("an argument of the network changes with the prompts, not by row")
        return first

    def __call__(self, x: Tensor, t: Tensor, item: Tensor) -> Tensor:
        """Data predictions.

        Args:
            x: (rows, ...) states, float32.
            t: (rows,) native times.
            item: (rows,) int64, which of the captured rows conditions each.

        Returns:
            (rows, ...) float32.
        """
        times = t.detach().cpu().double().numpy()
        state = x.to(self._dtype)
        given = state
        if isinstance(self._noise, Edm):
            scale = input_scale(self._noise, times, sigma_data=self._sigma_data)
            given = (state.float() * _column(scale, x)).to(self._dtype)
        published = model_timesteps(self._noise, times, num_train_timesteps=self._train)
        told = torch.tensor(published, dtype=torch.float32, device=x.device)
        told = told.to(self._time_dtype) * self._time_scale
        outputs = []
        for call in self._calls:
            arguments = _taken(call, item)
            rows = {self._input: given, "timestep": told}
            if self._halves == 2:
                rows = {k: torch.cat([v, v]) for k, v in rows.items()}
            answer = self._module(**rows, **arguments)
            answer = answer[0] if isinstance(answer, tuple) else answer.sample
            outputs += list(answer.chunk(self._halves))
        output = outputs[0]
        if self._guided:
            plain, with_prompt = outputs if self._halves == 2 else outputs[::-1]
            output = plain + self._guidance * (with_prompt - plain)
        output = output.float()
        if output.shape[1] == 2 * x.shape[1] and output.ndim > 1:
            output = output[:, : x.shape[1]]
        a, b = prediction_weights(self._noise, self._prediction, times, sigma_data=self._sigma_data)
        data: Tensor = _column(a, x) * state.float() + _column(b, x) * output
        return data


class _ByRow:
    """A tensor with a row per sample; with guidance in the batch, one for each half."""

    def __init__(self, halves: list[Tensor]) -> None:
        self.halves = halves


def _taken(value: Any, item: Tensor) -> Any:
    if isinstance(value, _ByRow):
        return torch.cat([half[item] for half in value.halves])
    if isinstance(value, dict):
        return {k: _taken(v, item) for k, v in value.items()}
    return value


def _column(values: np.ndarray[Any, Any], like: Tensor) -> Tensor:
    column = torch.tensor(values, dtype=torch.float32, device=like.device)
    return column.view(-1, *[1] * (like.ndim - 1))


def in_blocks(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor], n: int, size: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """A row denoiser for rows that repeat n samples, in network calls of `size` rows each.

    Always the same number of rows, since matrix products depend on it in the last bits.
    """

    def call(x: Tensor, t: Tensor) -> Tensor:
        parts = []
        item = torch.arange(len(x), device=x.device) % n
        for start in range(0, len(x), size):
            take = torch.arange(start, start + size, device=x.device).clamp(max=len(x) - 1)
            answer = denoiser(x[take], t[take], item[take])
            parts.append(answer[: len(x) - start])
        return torch.cat(parts)

    return call
