"""What leaves the room of experts: a checkpoint without the dropped experts, and its genotype."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from searchlab.config import SearchConfig
from searchlab.errors import ConfigError, DataError
from searchlab.evaluator import identity_digest
from searchlab.experiments.experts_front import write_front
from searchlab.result import Result

__all__ = ["FORMS", "export", "plan_of", "source_folder"]

FORMS = ("safetensors", "json")
REASON = "not_exported.txt"


def plan_of(config: SearchConfig, result: Result) -> Any:
    """The winner as an `ExpertPlan`, with what is known about it.

    Raises:
        DataError: the run has no winner yet.
    """
    winners = [group.winner for group in result.groups if group.winner is not None]
    if not winners:
        raise DataError(f"run {result.name!r} has no searched candidate yet")
    winner, stage = winners[-1], config.stages[-1]
    (plan,) = stage.space.plans(winner.population)
    task = config.options.get("task")
    return plan.with_about(
        base=str(config.options.get("model")),
        task="" if task is None else Path(str(task)).name,
        metric=result.objective.name,
        search=winner.search,
        selection=winner.selection if np.isfinite(winner.selection) else None,
        report=list(winner.report),
        seed=config.seed,
        evaluator=identity_digest(stage.evaluator),
    )


def source_folder(location: str) -> Path:
    """The folder of a model's files: itself, or the local copy of a hub id.

    Raises:
        DataError: a hub id without a local copy.
    """
    from searchlab.experiments.zoo.characters import CHARACTERS

    path = CHARACTERS if location == "zoo" else Path(location)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(location, local_files_only=True))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"files of model {location!r} are not here: {reason}") from None


def export(config: SearchConfig, result: Result, directory: Path, form: str) -> list[Path]:
    """Writes the winner.

    Args:
        config: of the run.
        result: of the run.
        directory: exists.
        form: "" or "safetensors" for a checkpoint that `from_pretrained` loads, "json" for the
            genotype alone. Without a form a winner that no stock checkpoint can carry leaves its
            genotype and the reason.
    """
    from searchlab.spaces.experts.export import export_checkpoint

    if form not in ("", *FORMS):
        raise ConfigError(f"--to {form!r}; allowed: {', '.join(FORMS)}")
    plan = plan_of(config, result)
    members = write_front(config, result, directory)
    genotype = directory / "genotype.json"
    if form != "json":
        location = str(config.options["model"])
        name = "searchlab character model" if location == "zoo" else location
        try:
            written = export_checkpoint(source_folder(location), plan, directory, base=name)
            return [*written, *members]
        except ConfigError as error:
            if form:
                raise
            print(f"searchlab: no checkpoint: {error}", file=sys.stderr)
            (directory / REASON).write_text(f"{error}\n", "utf-8")
            genotype.write_text(json.dumps(plan.to_json(), indent=1) + "\n", "utf-8")
            return [genotype, directory / REASON, *members]
    genotype.write_text(json.dumps(plan.to_json(), indent=1) + "\n", "utf-8")
    return [genotype, *members]
