"""A user's diffusion pipeline as a room of the solver-schedule recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from searchlab.algorithms.base import Seeds
from searchlab.errors import SearchlabError, SpaceError
from searchlab.evaluators.pipeline import PipelineEvaluator
from searchlab.evaluators.pipeline_options import PipelineOptions, build_pipeline_evaluator
from searchlab.spaces.solver_schedule import points
from searchlab.spaces.solver_schedule.grids import GRIDS
from searchlab.spaces.solver_schedule.installed import times_of
from searchlab.spaces.solver_schedule.noise_schedule import (
    Edm,
    FloatArray,
    Flow,
    NoiseSchedule,
    shifted,
)
from searchlab.spaces.solver_schedule.schedule import Schedule
from searchlab.spaces.solver_schedule.space import ScheduleRange, SolverScheduleSpace

__all__ = ["known_schedules", "pipeline_room", "schedule_range"]

SHIFTS = (1.0, 3.0, 5.0)
"""Shifts of the uniform flow grid that known points use, beside the pipeline's own."""

SOLVERS: dict[str, Callable[[FloatArray, NoiseSchedule], Schedule]] = {
    "ddim": points.ddim,
    "dpmpp_2m": points.dpmpp_2m,
    "dpmpp_2m_heun": lambda t, n: points.dpmpp_2m(t, n, variant="heun"),
    "dpmpp_3m": points.dpmpp_3m,
    "deis_2": points.deis,
    "unipc_2": points.unipc,
    "unipc_3": lambda t, n: points.unipc(t, n, order=3),
}


def pipeline_room(
    options: PipelineOptions, nfe: tuple[int, int]
) -> tuple[SolverScheduleSpace, PipelineEvaluator, Seeds, dict[str, Any]]:
    """Space, evaluator, known points and validity for a pipeline; loads and probes it."""
    evaluator, noise, validity = build_pipeline_evaluator(options)
    own = {n: _own_times(evaluator, n) for n in range(nfe[0], nfe[1] + 1)}
    within = schedule_range(noise, nfe, [times for times in own.values() if times is not None])
    space = SolverScheduleSpace(noise, within)
    evaluator.plans = space.plans
    schedules: list[Schedule] = []
    origin: list[str] = []
    for n, times in own.items():
        for name, schedule in known_schedules(noise, n, times).items():
            try:
                space.of_schedules([schedule])
            except SpaceError:
                continue  # a grid that ends outside the range, such as one that stops early
            schedules.append(schedule)
            origin.append(f"baseline:{name}")
    return space, evaluator, Seeds(space.of_schedules(schedules), tuple(origin)), validity


def _own_times(evaluator: PipelineEvaluator, n: int) -> FloatArray | None:
    """The grid of the pipeline's own scheduler, None where it cannot be told."""
    try:
        return times_of(evaluator.sampler.scheduler, n, mu=evaluator.mu)
    except SearchlabError:
        return None


def schedule_range(
    noise: NoiseSchedule, nfe: tuple[int, int], own: list[FloatArray]
) -> ScheduleRange:
    """What the search may do: last noisy points from near the end to what the pipeline itself uses.

    The reference is the clean end, so that a schedule may step there or stop just before.
    """
    last = [float(times[-2]) for times in own if len(times) > 2]
    if isinstance(noise, Flow):
        return ScheduleRange(
            nfe, (0.005, min(0.6, max([0.3, *last]) * 1.1)), endings=("clean",), earliest=0.9975
        )
    if isinstance(noise, Edm):
        return ScheduleRange(nfe, (noise.end, max([0.1, *last]) * 1.1), first=("model", "zero"))
    low = float(noise.end)
    high = max([0.1 * noise.start, *last])
    return ScheduleRange(nfe, (low, high), first=("model", "zero"))


def known_schedules(noise: NoiseSchedule, nfe: int, own: FloatArray | None) -> dict[str, Schedule]:
    """Usual solvers on usual grids at `nfe` calls, all to the clean end.

    Args:
        noise: the pipeline's noise schedule.
        nfe: model calls.
        own: the grid of its own scheduler, (nfe + 1,) falling.
    """
    grids: dict[str, FloatArray] = {}
    if own is not None:
        grids["own"] = np.where(np.arange(len(own)) == len(own) - 1, noise.clean, own)
    if isinstance(noise, Flow):
        uniform = np.linspace(noise.start, 0.0, nfe + 1)
        for shift in SHIFTS:
            grids[f"uniform_shift{shift:g}"] = shifted(uniform, shift)
    elif nfe > 1:
        for name in ("karras7", "log_snr", "time"):
            times = GRIDS[name](noise, nfe - 1, noise.start, noise.end)
            grids[name] = np.append(times, noise.clean)
    out = {}
    for grid, times in grids.items():
        for solver, make in SOLVERS.items():
            out[f"{grid}/{solver}"] = make(times, noise)
    return out
