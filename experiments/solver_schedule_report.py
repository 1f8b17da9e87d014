"""What the report of a solver-schedule run adds: timesteps, decisions, samples, both objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from searchlab.config import SearchConfig
from searchlab.errors import SearchlabError
from searchlab.evaluator import REPORT_REPLICATE
from searchlab.evaluators.distances import frechet_distances
from searchlab.evaluators.noise import split_seed
from searchlab.evaluators.sampling import SamplingEvaluator
from searchlab.evaluators.trajectories import Work
from searchlab.experiments.solver_schedule_figures import (
    DECISIONS,
    figure_samples,
    figure_steps,
    image_shape,
)
from searchlab.final import Contender, Interval
from searchlab.population import OK
from searchlab.report import Section
from searchlab.result import GroupResult, Result
from searchlab.spaces.solver_schedule.schedule import Schedule

__all__ = ["FD_NOTE", "sections"]

SAMPLES = 14
"""Pictures per row: the first ones of the report split's noise, whatever they show."""

REFERENCE_REPLICATES = 4
"""At most this many replicates of the reference's own distance; it is the costly part."""

FD_NOTE = (
    "A Fréchet distance below that of the many-step reference does not mean a better solver: it "
    "means that step error cancels model error."
)


def sections(config: SearchConfig, result: Result) -> list[Section]:
    """The sections of a solver-schedule run that its problem allows.

    Timesteps and tables need schedules only; the sample grids need images and the table of both
    objectives a distance. What a problem does not have is left out.

    Args:
        config: what was run; its last evaluator samples once more for the pictures.
        result: of that run.
    """
    groups = [group for group in result.groups if group.winner is not None]
    plans = {group.group: _plan(result, group.winner) for group in groups}
    if not plans or not all(isinstance(plan, Schedule) for plan in plans.values()):
        return []
    out: list[Section] = []
    evaluator = config.stages[-1].evaluator
    if isinstance(evaluator, SamplingEvaluator):
        # A copy without memory: pictures neither evict nor count what the search keeps.
        fresh = replace(evaluator, remember=False, work=Work())
        out += _objectives(config, result, fresh)
        out += _pictures(result, fresh, groups)
    out += _steps(result, groups, plans)
    for group, plan in plans.items():
        out.append(Section(f"Schedule{_of(result, group)}", pre=str(plan)))
    return out


def _plan(result: Result, contender: Contender | None) -> Any:
    return None if contender is None else result.space.plans(contender.population)[0]


def _of(result: Result, group: int) -> str:
    return f", {result.group_by} {group}" if result.group_by else ""


# -- timesteps ------------------------------------------------------------------------------------


def _steps(result: Result, groups: Sequence[GroupResult], plans: dict[int, Any]) -> list[Section]:
    entries = []
    for group in groups:
        base = _plan(result, group.best_baseline())
        entries.append((_of(result, group.group).lstrip(", "), plans[group.group], base))
    figure = figure_steps(entries)
    return [Section("Timesteps and decisions", text=DECISIONS, figure=figure)]


# -- both objectives ------------------------------------------------------------------------------


def _objectives(
    config: SearchConfig, result: Result, evaluator: SamplingEvaluator
) -> list[Section]:
    """RMSE and Fréchet distance of winners, baselines and the reference on the report split."""
    if evaluator.distance is None or result.records is None:
        return []
    alpha = result.alpha
    measured = [
        (group, contender, values)
        for group in result.groups
        for contender in (group.winner, *group.baselines)
        if contender is not None and (values := _both(result, evaluator, contender))
    ]
    if not measured:
        return []
    count = min(REFERENCE_REPLICATES, max(len(values["fd"]) for _, _, values in measured))
    many = _reference_distances(evaluator, count)
    rows: list[dict[str, Any]] = []
    below: list[str] = []
    for group, contender, values in measured:
        fd, rmse = Interval.of(values["fd"], alpha), Interval.of(values["rmse"], alpha)
        if _below(values["fd"], many, alpha):
            below.append(f"{contender.name}{_of(result, group.group)}")
        row: dict[str, Any] = {result.group_by: group.group} if result.group_by else {}
        row |= {"what": contender.kind, "name": contender.name}
        rows.append(row | {"RMSE to reference": _shown(rmse), "Fréchet distance": _shown(fd)})
    last: dict[str, Any] = {result.group_by: None} if result.group_by else {}
    last |= {"what": "reference", "name": "many steps", "RMSE to reference": "0 (by definition)"}
    rows.append(last | {"Fréchet distance": _shown(Interval.of(many, alpha))})
    text = (
        f"Both figures of every reported schedule, on the report split ({evaluator.held_out} "
        f"samples each time). The search saw only {evaluator.objective}.\n\n{FD_NOTE}"
    )
    if below:
        level = round(100 * (1 - alpha))
        text += f" Distinguishable here, at {level} % on the same noise: {'; '.join(below)}."
    return [Section("RMSE and Fréchet distance", text=text, table=rows)]


def _below(values: Sequence[float], reference: Sequence[float], alpha: float) -> bool:
    """Whether distances lie below the reference's on the same noise, by their paired interval."""
    n = min(len(values), len(reference))
    gap = Interval.of(np.array(reference[:n]) - np.array(values[:n]), alpha)
    return gap.mean > 0 and gap.excludes_zero()


def _both(
    result: Result, evaluator: SamplingEvaluator, contender: Contender
) -> dict[str, list[float]]:
    """Report values of both objectives, replicate by replicate; empty where one is missing."""
    records = result.records
    assert records is not None
    signals = [signal.name for signal in evaluator.signals]
    if not signals or not records.signals.shape[1]:
        return {}
    rows = np.flatnonzero((records.replicate >= REPORT_REPLICATE) & (records.state == OK))
    found: dict[int, tuple[float, float]] = {}
    for row in rows:
        if records.keys[row] == contender.key:
            pair = (float(records.values[row, 0]), float(records.signals[row, 0]))
            found[int(records.replicate[row])] = pair
    pairs = [found[replicate] for replicate in sorted(found)]
    if not pairs or not np.isfinite(pairs).all():
        return {}
    return {
        evaluator.objective: [value for value, _ in pairs],
        signals[0]: [signal for _, signal in pairs],
    }


def _reference_distances(evaluator: SamplingEvaluator, count: int) -> list[float]:
    assert evaluator.distance is not None
    out = []
    for number in range(count):
        solution = _reference(evaluator, number, evaluator.held_out)
        with torch.no_grad():
            features = evaluator.distance.features(solution.to(evaluator.problem.dtype))
        distance = frechet_distances(features[None], evaluator.distance.reference)
        out.append(float(distance[0]))
    return out


def _reference(evaluator: SamplingEvaluator, number: int, n: int) -> Tensor:
    """The reference solutions of the first n start states of a report bank, (n, *shape)."""
    problem = evaluator.problem
    start = problem.start(split_seed(evaluator.seed, "report", number), n)
    with torch.no_grad():
        return problem.reference(start)


def _shown(value: Interval) -> str:
    half = f" ± {value.half:.2g}" if np.isfinite(value.half) else ""
    return f"{value.mean:.4g}{half}"


# -- pictures -------------------------------------------------------------------------------------


def _pictures(
    result: Result, evaluator: SamplingEvaluator, groups: Sequence[GroupResult]
) -> list[Section]:
    shape = image_shape(evaluator.problem.shape)
    if shape is None:
        return []
    reference = _reference(evaluator, 0, SAMPLES)
    out = []
    for group in {g.group: g for g in (groups[0], groups[-1])}.values():
        chosen = {"searched": group.winner, "best baseline": group.best_baseline()}
        plans = {name: _plan(result, c) for name, c in chosen.items() if c is not None}
        try:
            finals = evaluator.sample(list(plans.values()), REPORT_REPLICATE, SAMPLES)
        except SearchlabError:
            continue  # a schedule that cannot run has its reason among the failures
        rows = dict(zip(plans, finals.double().cpu().numpy(), strict=True))
        rows = {name: row for name, row in rows.items() if np.isfinite(row).all()}
        if not rows:
            continue
        figure = figure_samples(reference.double().cpu().numpy(), rows, shape)
        base = group.best_baseline()
        caption = (
            f"The first {SAMPLES} start states of the report split, not chosen; each column is one "
            "of them. Below: absolute difference to the reference, all on one scale (dark is none)."
        )
        if base is not None:
            caption += f" Best baseline: {base.name}."
        out.append(Section(f"Samples{_of(result, group.group)}", figure=figure, caption=caption))
    return out
