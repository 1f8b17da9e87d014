"""What is fixed about sampling from a pipeline while schedules vary, and the reference run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from searchlab.errors import ConfigError, SearchlabError
from searchlab.spaces.solver_schedule.grids import karras_grid, time_grid
from searchlab.spaces.solver_schedule.installed import times_of
from searchlab.spaces.solver_schedule.noise_schedule import Flow, NoiseSchedule
from searchlab.spaces.solver_schedule.points import dpmpp_2m
from searchlab.spaces.solver_schedule.schedule import Schedule

__all__ = ["PipelineSettings", "reference_schedule"]


@dataclass(frozen=True)
class PipelineSettings:
    """What is fixed about sampling while schedules vary.

    Attributes:
        width, height: pixels; None = the pipeline's own.
        guidance_scale: as handed to the pipeline; None = its default.
        num_frames: for video pipelines.
        reference_steps: model calls of the reference, 4 or more.
        n_noise: start noises per prompt; None = 1, or 16 where there are no prompts.
        seed: of the start noise, apart from the search's seed.
        max_rows: samples per call of the pipeline.
        path: "pipeline" runs the pipeline's own loop; "rows" batches schedules at the network;
            "auto" takes the latter where a probe finds both equal.
    """

    width: int | None = None
    height: int | None = None
    guidance_scale: float | None = None
    num_frames: int | None = None
    reference_steps: int = 50
    n_noise: int | None = None
    seed: int = 0
    max_rows: int = 16
    path: Literal["auto", "pipeline", "rows"] = "auto"

    def __post_init__(self) -> None:
        for name, low in (("reference_steps", 4), ("n_noise", 1), ("max_rows", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} is {value}; allowed: {low} or more")
        for name in ("width", "height", "num_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; allowed: 1 or more")
        if self.path not in ("auto", "pipeline", "rows"):
            raise ConfigError(f"path {self.path!r}; allowed: auto, pipeline, rows")

    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        names = ("width", "height", "guidance_scale", "num_frames")
        return {name: getattr(self, name) for name in names}


def reference_schedule(
    noise: NoiseSchedule, steps: int, *, scheduler: Any = None, mu: float | None = None
) -> Schedule:
    """The many-step run that candidates are compared with: DPM-Solver++(2M), to the clean end.

    One solver for all families, since many installed ones are stochastic, clip, or round their time
    steps. Flow: on the scheduler's own shifted grid where it gives one. VP and EDM: rho = 7 grid
    from the start to the default end and one step to sigma = 0.

    Args:
        noise: the pipeline's noise schedule.
        steps: model calls.
        scheduler: the pipeline's own, for the grid of flow models.
        mu: its dynamic shift.
    """
    if isinstance(noise, Flow):
        try:
            times = times_of(scheduler, steps, mu=mu)
        except SearchlabError:
            times = time_grid(noise, steps, noise.start, noise.clean)
    else:
        times = karras_grid(noise, steps - 1, noise.start, noise.end)
        times = np.append(times, noise.clean)
    return dpmpp_2m(times, noise)
