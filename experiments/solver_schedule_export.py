"""What leaves the solver-schedule room: schedule files, a diffusers scheduler, plain sigmas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from searchlab.config import SearchConfig
from searchlab.errors import ConfigError, DataError
from searchlab.result import Result
from searchlab.spaces.solver_schedule.installed import export_sigmas
from searchlab.spaces.solver_schedule.schedule import Schedule
from searchlab.spaces.solver_schedule.schedule_file import ScheduleBundle

__all__ = ["FORMS", "export"]

FORMS = ("json", "diffusers", "sigmas")


def export(config: SearchConfig, result: Result, directory: Path, form: str) -> list[Path]:
    """Writes the winners.

    Args:
        config: of the run; says what the schedules are valid for.
        result: of the run.
        directory: exists.
        form: "json" or "" (schedules.json and a readable text), "diffusers" (a scheduler's folder
            for `SearchedScheduler.from_pretrained`), "sigmas" (one JSON list per number of calls;
            an error where a plain list cannot say a schedule).
    """
    if form not in ("", *FORMS):
        raise ConfigError(f"--to {form!r}; allowed: {', '.join(FORMS)}")
    bundle = _bundle(config, result)
    if form == "sigmas":
        lists = {str(nfe): export_sigmas(schedule) for nfe, schedule in bundle.schedules.items()}
        path = directory / "sigmas.json"
        path.write_text(json.dumps(lists, indent=1) + "\n")
        return [path]
    path = directory / "schedules.json"
    bundle.save(path)
    if form == "diffusers":
        from searchlab.spaces.solver_schedule.scheduler import SearchedScheduler

        SearchedScheduler.load_json(path).save_pretrained(directory / "scheduler")
        return [path, directory / "scheduler"]
    text = directory / "schedules.txt"
    text.write_text("\n\n".join(str(schedule) for schedule in bundle.schedules.values()) + "\n")
    return [path, text]


def _bundle(config: SearchConfig, result: Result) -> ScheduleBundle:
    schedules: dict[int, Schedule] = {}
    for group in result.groups:
        if group.winner is not None:
            schedule = result.space.plans(group.winner.population)[0]
            schedules.setdefault(schedule.nfe, schedule)
    if not schedules:
        raise DataError(f"run {result.name!r} has no searched schedule yet")
    evaluator: Any = config.stages[-1].evaluator
    if config.options.get("pipeline"):
        from searchlab.evaluators.pipeline_options import validity_of
        from searchlab.spaces.solver_schedule.installed import sigma_data_of

        validity = validity_of(evaluator, str(config.options["pipeline"]))
        sigma_data = sigma_data_of(evaluator.sampler.scheduler)
        return ScheduleBundle(schedules, validity["prediction_type"], sigma_data, None, validity)
    problem = evaluator.problem
    uses_mean = any(schedule.first_evaluation == "mean" for schedule in schedules.values())
    validity = {
        "model": f"searchlab {problem.name}",
        "prediction_type": "sample",
        "noise": problem.noise.to_json(),
    }
    mean = problem.mean.tolist() if uses_mean and problem.mean is not None else None
    return ScheduleBundle(
        schedules, "sample", getattr(problem.denoise, "sigma_data", 0.5), mean, validity
    )
