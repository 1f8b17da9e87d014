"""One run of a schedule as a pipeline drives it: numbered time steps in, network outputs in."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from searchlab.errors import ConfigError
from searchlab.spaces.solver_schedule.incremental import TableRun, evaluation_points, suffix
from searchlab.spaces.solver_schedule.model_outputs import (
    input_scale,
    model_timesteps,
    prediction_weights,
)
from searchlab.spaces.solver_schedule.noise_schedule import Edm, FloatArray, VpDiscrete
from searchlab.spaces.solver_schedule.schedule import Schedule
from searchlab.spaces.solver_schedule.table import CoefficientTable, compile_schedule

__all__ = ["NetworkForm", "PipelineRun"]


@dataclass(frozen=True)
class NetworkForm:
    """How a network has to be talked to.

    Attributes:
        prediction_type: what it predicts, see `model_outputs.PREDICTION_TYPES`.
        num_train_timesteps: what flow times are multiplied by.
        sigma_data: EDM's standard deviation of the data.
    """

    prediction_type: str
    num_train_timesteps: int = 1000
    sigma_data: float = 0.5


@dataclass
class PipelineRun:
    """A schedule's time steps, and the state of the one run through them.

    Time step j is model call j; an analytic first evaluation has none. An analytic start is folded
    into the scale of the initial noise, so it needs a pipeline that reads that scale, and, to add
    the data mean, one that has the network's input scaled. Both are noted here when they happen.

    Attributes:
        schedule: the plan.
        form: the network's.
        mean: data mean, broadcastable to a state, or None.
        index: number of the next time step; None before the first.
        read_scale, read_input, noised: whether the pipeline read the initial scale, asked for a
            network input, and made its first state from clean data.
    """

    schedule: Schedule
    form: NetworkForm
    mean: Tensor | None = None
    index: int | None = None
    read_scale: bool = False
    read_input: bool = False
    noised: bool = False
    table: CoefficientTable = field(init=False)
    published: Tensor = field(init=False)
    _run: TableRun | None = field(init=False, default=None)
    _begun: bool = field(init=False, default=False)
    _repeat: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.table = compile_schedule(self.schedule)
        told = model_timesteps(
            self.schedule.noise, self.times, num_train_timesteps=self.form.num_train_timesteps
        )
        self.published = torch.tensor(told, dtype=torch.float32)

    @property
    def analytic(self) -> bool:
        """Whether the first evaluation takes no model call."""
        return self.table.first_evaluation != "model"

    @property
    def times(self) -> FloatArray:
        """Native time of each model call."""
        return self.table.times[1:] if self.analytic else self.table.times

    @property
    def sigmas(self) -> Tensor:
        """Noise level of each model call and of the result: sigma/alpha for VP, sigma else."""
        noise = self.schedule.noise
        visited = np.append(self.times, self.table.end_time)
        levels = noise.rho(visited) if isinstance(noise, VpDiscrete) else noise.sigma(visited)
        return torch.tensor(levels, dtype=torch.float32)

    @property
    def first_scale(self) -> float:
        """Weight of x_T in the state of the first model call."""
        return float(self.table.states[2, 0]) if self.analytic else 1.0

    def nearest(self, timestep: float) -> int:
        """Number of the time step nearest to a value, for pipelines that slice them unsaid."""
        return int((self.published - timestep).abs().argmin())

    def _adds_mean(self) -> bool:
        return self.index == 0 and self.read_scale and self.table.first_evaluation == "mean"

    def _mean(self, x: Tensor) -> Tensor:
        if self.mean is None:
            raise ConfigError("first_evaluation 'mean' needs the data mean; give mean=, got None")
        return self.mean.to(device=x.device, dtype=x.dtype)

    def _with_mean(self, x: Tensor) -> Tensor:
        return x + float(self.table.outputs[2, 0]) * self._mean(x) if self._adds_mean() else x

    def model_input(self, x: Tensor) -> Tensor:
        """What the network is given for the state `x` at time step `index`."""
        assert self.index is not None
        self.read_input = True
        noise = self.schedule.noise
        if not self._adds_mean() and not isinstance(noise, Edm):
            return x
        scale = input_scale(noise, self.times[self.index], sigma_data=self.form.sigma_data)
        return (self._with_mean(x.float()) * float(scale)).to(x.dtype)

    def step(self, output: Tensor, x: Tensor) -> Tensor:
        """Take the network's output for the state `x`; gives the state of the next time step.

        Args:
            output: (B, ...) network output; with twice the channels of `x`, a learned variance
                follows and is not used.
            x: (B, ...) float32 or float64 state, as the pipeline holds it.

        Raises:
            ConfigError: all steps are done, the shapes differ, or the pipeline lacks a hook that
                the analytic first evaluation needs.
        """
        assert self.index is not None
        if self.index >= len(self.published):
            raise ConfigError(f"all {len(self.published)} steps are done; call set_timesteps again")
        if not self._begun:
            self._begin(x)
        x = self._with_mean(x)
        if self._run is None or self._repeat:
            self._repeat = False
            state = x
        else:
            state = self._run.answer(self._data(output, x), called_at=x)
        self.index += 1
        return state

    def _data(self, output: Tensor, x: Tensor) -> Tensor:
        if output.ndim > 1 and output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]
        if output.shape != x.shape:
            raise ConfigError(
                f"model output has shape {tuple(output.shape)}; allowed: {tuple(x.shape)}"
            )
        a, b = prediction_weights(
            self.schedule.noise,
            self.form.prediction_type,
            self.times[self.index],
            sigma_data=self.form.sigma_data,
        )
        out = float(b) * output.to(x.dtype)
        return out if float(a) == 0.0 else float(a) * x + out

    def _begin(self, x: Tensor) -> None:
        """Start with the state of time step `index`, which the pipeline may have made itself."""
        assert self.index is not None
        self._begun = True
        first = self.table.first_evaluation
        if self.index == 0 and not self.analytic:
            self._run = TableRun(self.table, x)
        elif self.index == 0 and self.read_scale:
            self._need(self.read_input or first != "mean", "scale_model_input")
            mean = self._mean(x) if first == "mean" else None
            # x is x_T times the folded weight; the mean is added again inside.
            self._run = TableRun(self.table, x / self.first_scale, mean=mean)
        else:
            self._need(self.index > 0 or self.noised, "init_noise_sigma")
            self._begin_late(x, self.index + self.analytic)

    def _begin_late(self, x: Tensor, evaluation: int) -> None:
        points = evaluation_points(self.schedule)
        point = points[evaluation]
        if point == len(self.schedule.steps):
            # Only the evaluation is left that would have corrected the result: nothing to do.
            return
        # Both evaluations of an implicit corrector are published; without the step before them the
        # first has nothing to correct, so its output is passed over and the second one used.
        self._repeat = evaluation + 1 < len(points) and points[evaluation + 1] == point
        self._run = TableRun(compile_schedule(suffix(self.schedule, point)), x)

    def _need(self, fulfilled: bool, hook: str) -> None:
        if not fulfilled:
            raise ConfigError(
                f"this pipeline does not read {hook}, so first_evaluation"
                f" {self.table.first_evaluation!r} cannot be used with it; allowed: 'model'"
            )
