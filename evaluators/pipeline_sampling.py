"""Sampling by a user's pipeline's own loop, with searched schedules in its scheduler's place.

This works for every pipeline, one schedule per call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from searchlab.errors import EvaluationError, SearchlabError
from searchlab.evaluators.pipeline_loading import denoisers_of
from searchlab.executors.out_of_memory import is_out_of_memory
from searchlab.spaces.solver_schedule.installed import noise_schedule_of
from searchlab.spaces.solver_schedule.schedule import Schedule, Step

__all__ = ["Capture", "NetworkCall", "PipelineSampler", "Rows"]


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
class NetworkCall:
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
    networks: list[NetworkCall]
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
        """`value`, or where that is None the default of the pipeline's call."""
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
        """Runs one step on all rows at once and notes what the pipeline did."""
        end = self.noise.end if self.noise.end > 0 else self.noise.clean
        schedule = Schedule(self.noise, self.noise.start, (Step(end),))
        seen: list[NetworkCall] = []
        handles = [
            network.register_forward_pre_hook(_noting(seen), with_kwargs=True)
            for network in denoisers_of(self.pipeline)
        ]
        try:
            with self._installed(schedule) as steps:
                mine = self.pipeline.scheduler
                self._call(schedule, rows, "latent")
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
            if is_out_of_memory(error):  # which fewer rows at once may heal
                raise
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


def _noting(seen: list[NetworkCall]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        seen.append(NetworkCall(module, {k: _copied(v) for k, v in bound.arguments.items()}))

    return hook


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return value
