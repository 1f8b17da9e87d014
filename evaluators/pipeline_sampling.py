"""Sampling from a user's pipeline with searched schedules, in two ways.

`PipelineSampler` lets the pipeline run its own loop with our scheduler in it: it works for every
pipeline, one schedule per call. `RowDenoiser` repeats what the pipeline did around its network, so
that many schedules share model calls; whether it does so rightly is for its user to probe.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from searchlab.errors import EvaluationError, SearchlabError
from searchlab.evaluators.pipeline_loading import denoisers_of
from searchlab.spaces.solver_schedule.installed import (
    noise_schedule_of,
    prediction_type_of,
    sigma_data_of,
)
from searchlab.spaces.solver_schedule.model_outputs import (
    input_scale,
    model_timesteps,
    prediction_weights,
)
from searchlab.spaces.solver_schedule.noise_schedule import Edm
from searchlab.spaces.solver_schedule.schedule import Schedule, Step

__all__ = ["Capture", "PipelineSampler", "RowDenoiser", "Rows"]


@dataclass(frozen=True)
class Rows:
    """What to sample: one row per sample.

    Attributes:
        seeds: of each row's start noise.
        prompts: a prompt per row, or None.
        tensors: other conditioning by name of the pipeline's argument, each with a row per sample.
    """

    seeds: tuple[int, ...]
    prompts: tuple[str, ...] | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seeds)

    def take(self, part: slice) -> Rows:
        """Some of the rows."""
        return Rows(
            self.seeds[part],
            None if self.prompts is None else self.prompts[part],
            {name: value[part] for name, value in self.tensors.items()},
        )


@dataclass
class _Network:
    """One call of a network: its arguments by name, copied."""

    module: torch.nn.Module
    arguments: dict[str, Any]


@dataclass
class Capture:
    """What a pipeline did in one run of one step.

    Attributes:
        start: (B, ...) the states it began with, before any input scaling.
        networks: its network calls of that step.
        timestep: the time step it published.
        reads_scale, reads_input: whether it has the hooks an analytic first evaluation needs.
        mu: the dynamic shift it computed, or None.
    """

    start: Tensor
    networks: list[_Network]
    timestep: float
    reads_scale: bool
    reads_input: bool
    mu: float | None


class PipelineSampler:
    """Runs schedules through a pipeline's own loop.

    The pipeline's scheduler is exchanged for the time of a call and put back whatever happens. Its
    text encoding is remembered between calls with equal prompts. Start noise comes from one
    generator per row, on the CPU, so a row's noise depends on its seed alone: the packing of noise
    into states stays the pipeline's business.

    Args:
        pipeline: any diffusers text-to-image or unconditional pipeline.
        settings: arguments of its call that stay the same, such as height and guidance_scale; those
            it does not know are left out.
        max_rows: rows per call.
    """

    def __init__(
        self, pipeline: Any, *, settings: Mapping[str, Any] | None = None, max_rows: int = 16
    ) -> None:
        self.pipeline = pipeline
        self.scheduler = pipeline.scheduler
        self.noise = noise_schedule_of(self.scheduler)
        self._known = set(inspect.signature(pipeline.__call__).parameters)
        self._settings = {
            k: v for k, v in (settings or {}).items() if k in self._known and v is not None
        }
        self.max_rows = max_rows
        self._encoded: dict[Any, Any] = {}

    @property
    def takes_prompts(self) -> bool:
        """Whether the pipeline's call has a prompt."""
        return "prompt" in self._known

    def default(self, name: str, value: Any) -> Any:
        """`value`, or where that is None the default of the pipeline's call; None if it has none."""
        if value is not None or name not in self._known:
            return value
        default = inspect.signature(self.pipeline.__call__).parameters[name].default
        return None if default is inspect.Parameter.empty else default

    def latents(self, schedule: Schedule, rows: Rows) -> Tensor:
        """Final states (B, ...) in float32 on the pipeline's device; no image is decoded."""
        parts = []
        for part in self._parts(rows):
            with self._installed(schedule) as steps:
                self._call(schedule, part, "latent")
            parts.append(steps[-1][1].float())
        return torch.cat(parts)

    def images(self, schedule: Schedule, rows: Rows) -> np.ndarray[Any, Any]:
        """Decoded images (B, H, W, 3) uint8.

        Raises:
            EvaluationError: the pipeline gives something else than images, such as videos.
        """
        parts = []
        for part in self._parts(rows):
            with self._installed(schedule):
                parts.append(np.asarray(self._call(schedule, part, "np")))
        images = np.concatenate(parts)
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype.kind != "f":
            raise EvaluationError(
                f"{type(self.pipeline).__name__} gives {images.dtype} {images.shape};"
                " a metric needs images (N, H, W, 3)"
            )
        pixels = np.rint(np.clip(images, 0.0, 1.0) * 255).astype(np.uint8)
        return np.broadcast_to(pixels, (*pixels.shape[:-1], 3)).copy()

    def capture(self, rows: Rows) -> Capture:
        """Runs one step on at most `max_rows` rows and notes what the pipeline did."""
        end = self.noise.end if self.noise.end > 0 else self.noise.clean
        schedule = Schedule(self.noise, self.noise.start, (Step(end),))
        seen: list[_Network] = []
        handles = [
            network.register_forward_pre_hook(_noting(seen), with_kwargs=True)
            for network in denoisers_of(self.pipeline)
        ]
        try:
            with self._installed(schedule) as steps:
                mine = self.pipeline.scheduler
                self._call(schedule, rows.take(slice(0, self.max_rows)), "latent")
        finally:
            for handle in handles:
                handle.remove()
        run = mine._run
        return Capture(
            start=steps[0][0].detach().clone(),
            networks=seen,
            timestep=float(mine.timesteps[0]),
            reads_scale=run.read_scale,
            reads_input=run.read_input,
            mu=mine.mu,
        )

    def _parts(self, rows: Rows) -> Iterator[Rows]:
        for start in range(0, len(rows), self.max_rows):
            yield rows.take(slice(start, start + self.max_rows))

    def _call(self, schedule: Schedule, rows: Rows, output_type: str) -> Any:
        arguments: dict[str, Any] = {**self._settings, **rows.tensors}
        if self.takes_prompts and rows.prompts is not None:
            arguments["prompt"] = list(rows.prompts)
        if "batch_size" in self._known:
            arguments["batch_size"] = len(rows)
        # Unconditional pipelines have no latent output; "pt" is the one that is not converted.
        plain = output_type == "latent" and not self.takes_prompts
        arguments["output_type"] = "pt" if plain else output_type
        arguments["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in rows.seeds]
        try:
            with torch.no_grad():
                return self.pipeline(**arguments, num_inference_steps=schedule.nfe)[0]
        except SearchlabError:
            raise
        except Exception as error:
            text = (str(error).strip().splitlines() or ["no message"])[0]
            raise EvaluationError(
                f"{type(self.pipeline).__name__} failed: {type(error).__name__}: {text[:300]}"
            ) from error

    @contextmanager
    def _installed(self, schedule: Schedule) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Our scheduler in the pipeline; gives the states around the first and the last step."""
        from searchlab.spaces.solver_schedule.scheduler import SearchedScheduler

        mine = SearchedScheduler.from_schedules(schedule, like=self.scheduler)
        steps: list[tuple[Tensor, Tensor]] = []
        inner = mine.step

        @functools.wraps(inner)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
            answer = inner(model_output, timestep, sample, **options)
            del steps[1:]
            steps.append((sample, answer[0]))
            return answer

        mine.step = step
        encode = getattr(self.pipeline, "encode_prompt", None)
        self.pipeline.scheduler = mine
        if encode is not None:
            self.pipeline.encode_prompt = self._remembering(encode)
        try:
            yield steps
        finally:
            self.pipeline.scheduler = self.scheduler
            if encode is not None:
                del self.pipeline.encode_prompt

    def _remembering(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """`encode_prompt` that answers from memory where all arguments are text and switches."""

        @functools.wraps(encode)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            key = _hashable((args, tuple(sorted(kwargs.items()))))
            if key is None:
                return encode(*args, **kwargs)
            if key not in self._encoded:
                self._encoded[key] = encode(*args, **kwargs)
            return self._encoded[key]

        return remembered


def _hashable(value: Any) -> Any:
    """A key for plain arguments, None where there are tensors or objects."""
    if isinstance(value, list | tuple):
        parts = tuple(_hashable(v) for v in value)
        return None if any(p is None for p in parts) else (type(value).__name__, parts)
    if value is None or isinstance(value, str | int | float | torch.device | torch.dtype):
        return repr(value)
    return None


def _noting(seen: list[_Network]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        seen.append(_Network(module, {k: _copied(v) for k, v in bound.arguments.items()}))

    return hook


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return value


class RowDenoiser:
    """Data predictions of a pipeline's network for any rows at any times, guidance included.

    Built from what the pipeline's own calls looked like: one call for all rows, one for twice the
    rows (first without, then with the prompt), or two calls (first with, then without it). Tensors
    with a row per sample are taken by row, all else is passed as it was.

    Args:
        sampler: of the pipeline.
        captures: of all rows, in order.
        guidance_scale: as handed to the pipeline; used where it calls its network twice.

    Raises:
        EvaluationError: the pipeline's calls have another form; says which.
    """

    def __init__(
        self, sampler: PipelineSampler, captures: Sequence[Capture], *, guidance_scale: float | None
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
            self._joined([capture.networks[i] for capture in captures], captures)
            for i in range(counts.pop())
        ]
        told = first.networks[0].arguments.get("timestep")
        if not isinstance(told, Tensor):
            raise EvaluationError("the network has no argument timestep that is a tensor")
        self._time_dtype = told.dtype
        self._time_scale = self._ratio(float(told.flatten()[0]), first.timestep)
        self._dtype = first.networks[0].arguments[self._input].dtype

    def _input_rows(self, capture: Capture, call: _Network) -> int:
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

    def _joined(self, calls: Sequence[_Network], captures: Sequence[Capture]) -> dict[str, Any]:
        """Arguments for all rows; a tensor by row becomes `_ByRow`."""
        names = [n for n in calls[0].arguments if n not in (self._input, "timestep")]
        rows = [len(capture.start) for capture in captures]
        return {n: self._join([c.arguments.get(n) for c in calls], rows) for n in names}

    def _join(self, values: Sequence[Any], rows: Sequence[int]) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {k: self._join([v[k] for v in values], rows) for k in first}
        if not isinstance(first, Tensor):
            return first
        by_row = [
            v.ndim > 0 and len(v) == n * self._halves for v, n in zip(values, rows, strict=True)
        ]
        if all(by_row):
            halves = [v.chunk(self._halves) for v in values]
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
        return _column(a, x) * state.float() + _column(b, x) * output


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
