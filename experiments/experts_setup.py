"""From options to a search for experts: files first, weights after everything that can be wrong."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchlab.errors import ConfigError
from searchlab.experiments.experts_loading import (
    ModelSource,
    load_model,
    open_model,
    weight_bytes,
)
from searchlab.experiments.zoo.characters import task_path

if TYPE_CHECKING:
    from searchlab.evaluators.language.problem import LanguageProblem
    from searchlab.evaluators.language.tasks import Task
    from searchlab.experiments.experts import ExpertsOptions
    from searchlab.spaces.experts import ExpertLayout, Family, PruningSpace

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """What is known before the weights are loaded.

    Attributes:
        options: of the recipe.
        source: the model without weights.
        family, layout: of its experts.
        keep, total: experts of every block, or of all blocks together.
        task: items and splits.
    """

    options: ExpertsOptions
    source: ModelSource
    family: Family
    layout: ExpertLayout
    keep: int | None
    total: int | None
    task: Task

    def pruning(self) -> PruningSpace:
        """The space of kept experts."""
        from searchlab.spaces.experts import pruning_space

        options = self.options
        return pruning_space(
            self.layout,
            keep=self.keep,
            groups="block" if options.groups == "block" else int(options.groups),
            total=self.total,
            top_k=options.active,
            flat=options.flat,
            router_mode="prob" if options.router_mode == "prob" else "slice",
        )


def prepare(options: ExpertsOptions) -> Prepared:
    """Reads configuration, tokenizer and task, and refuses what cannot work.

    Raises:
        ConfigError: a dense model, an unknown family, options that do not fit together.
        DataError: files that are missing or wrong, items that the metric cannot score.
        SpaceError: numbers of experts that the model cannot be cut to.
    """
    from searchlab.spaces.experts import family_of, layout_of, resolve_keep

    task = _task(options)
    source = open_model(options.model)
    family = family_of(source.config, None if options.family is None else Path(options.family))
    layout = replace(layout_of(source.config, family), total_bytes=weight_bytes(source))
    keep = options.keep
    if keep is None and options.memory is None:
        keep = "50%"
    each, total = resolve_keep(
        layout,
        keep=keep,
        memory=options.memory,
        per_block=options.per_block,
        top_k=options.active,
        flat=options.flat,
    )
    if options.merges and each is None:
        raise ConfigError("merging with counts per block; allowed: one count for all blocks")
    for folder in options.foreign().values():
        if not (Path(folder) / "config.json").is_file():
            raise ConfigError(f"baseline folder {folder!r} has no config.json")
    prepared = Prepared(options, source, family, layout, each, total, task)
    prepared.pruning()
    return prepared


def _task(options: ExpertsOptions) -> Task:
    from searchlab.evaluators.language.tasks import read_task

    name = options.task or "arithmetic"
    known = options.model == "zoo" and not Path(name).exists() and "/" not in name
    task = read_task(task_path(name) if known else name)
    return task if options.items is None else task.only(options.items)
