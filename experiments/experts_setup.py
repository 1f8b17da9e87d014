"""From options to a search for experts: files first, weights after everything that can be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError
from searchlab.experiments.experts_loading import (
    ModelSource,
    check_device,
    load_model,
    open_model,
    weight_bytes,
)
from searchlab.experiments.zoo.characters import task_path

if TYPE_CHECKING:
    from searchlab.config import SearchConfig
    from searchlab.evaluators.language.experts import ExpertsEvaluator
    from searchlab.evaluators.language.problem import LanguageSettings
    from searchlab.evaluators.language.prompts import Prompts
    from searchlab.evaluators.language.tasks import Task
    from searchlab.experiments.experts import ExpertsOptions
    from searchlab.spaces.experts import ExpertLayout, Family, PruningSpace, ResidentExperts
    from searchlab.spaces.experts.merging import MergingSpace

__all__ = ["Loaded", "Prepared", "applied", "keep_loaded", "loaded_of", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """What is known before the weights are loaded.

    Attributes:
        options: of the recipe.
        source: the model without weights.
        family, layout: of its experts.
        keep, total: experts of every block, or of all blocks together.
        task: items and splits.
        prompts: texts to tokens.
        settings: the metric.
    """

    options: ExpertsOptions
    source: ModelSource
    family: Family
    layout: ExpertLayout
    keep: int | None
    total: int | None
    task: Task
    prompts: Prompts
    settings: LanguageSettings

    def __str__(self) -> str:
        blocks, experts = len(self.layout.blocks), self.layout.experts
        keeps = "keeps up to" if self.options.front else "keeps"
        if self.keep is None:
            return f"{keeps} {self.total} experts in all of {blocks} blocks"
        return f"{keeps} {self.keep} of {experts} experts in each of {blocks} blocks"

    @property
    def router_mode(self) -> Any:
        """What the router scores: the paper's way in its preset."""
        return self.options.router_mode or ("prob" if self.options.preset == "paper" else "slice")

    @property
    def _groups(self) -> Any:
        return "block" if self.options.groups == "block" else int(self.options.groups)

    def pruning(self) -> PruningSpace:
        """The space of kept experts."""
        from searchlab.spaces.experts import pruning_space

        return pruning_space(
            self.layout,
            keep=self.keep,
            groups=self._groups,
            total=self.total,
            top_k=self.options.active,
            flat=self.options.flat,
            router_mode="prob" if self.router_mode == "prob" else "slice",
        )

    def merging(self) -> MergingSpace:
        """The space of merged experts."""
        from searchlab.spaces.experts.merging import merging_space

        if self.keep is None:
            raise ConfigError("merging with counts per block; allowed: one count for all blocks")
        return merging_space(
            self.layout,
            keep=self.keep,
            groups=self._groups,
            router_mode=self.router_mode,
            top_k=self.options.active,
            flat=self.options.flat,
        )

    def load(self, *, rankings: bool = True) -> Loaded:
        """The weights, and one pass over the search items where rankings of experts are wanted."""
        import torch

        from searchlab.evaluators.language.calibration import SCORES, baselines, calibrate
        from searchlab.evaluators.language.experts import experts_evaluator
        from searchlab.evaluators.language.problem import LanguageProblem
        from searchlab.evaluators.language.static_figures import StaticFigures
        from searchlab.spaces.experts import ResidentExperts

        options = self.options
        threads = 1 if options.model == "zoo" else None
        if options.threads is not None or threads is not None:
            torch.set_num_threads(options.threads or threads or 1)
        model = load_model(self.source, dtype=options.dtype, device=options.device)
        resident = ResidentExperts(model, self.family)
        space = self.pruning()
        evaluator = experts_evaluator(
            resident,
            space,
            self.task,
            self.settings,
            prompts=self.prompts,
            at_once=options.together,
        )
        travels = _travels(evaluator, options, "prune")
        if not (rankings or options.guided):
            nothing = np.zeros((len(self.layout.blocks), self.layout.experts))
            return Loaded(self, resident, space, travels, {}, nothing)
        # Generation has no batches: the router is then watched on prompts with right answers.
        problem = evaluator.problem
        if self.settings.metric == "exact_match":
            written = replace(self.settings, metric="perplexity")
            problem = LanguageProblem(self.task, self.prompts, written, device=problem.device)
        blocks = problem.part("search").blocks
        forward: Any = evaluator.forward
        calibration = calibrate(forward, [block.batch for block in blocks if block.batch])
        if options.guided:
            evaluator.add_signals(StaticFigures(calibration))
        known, used = baselines(space, calibration), calibration.counts
        scores = {name: calibration.scores(name) for name in SCORES}
        travels = _travels(evaluator, options, "prune")
        return Loaded(self, resident, space, travels, known, used, scores)


@dataclass(frozen=True)
class Loaded:
    """A model that candidates can be asked of.

    Attributes:
        prepared: see `Prepared`.
        resident: the model.
        space, evaluator: of kept experts.
        known: baseline -> mask (L, E).
        used: (L, E), how often the full model chose an expert in the search items.
        scores: ranking -> (L, E), by which `known` keeps experts.
    """

    prepared: Prepared
    resident: ResidentExperts
    space: PruningSpace
    evaluator: ExpertsEvaluator
    known: Mapping[str, NDArray[np.bool_]]
    used: NDArray[np.float64]
    scores: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def merged(self, space: MergingSpace) -> ExpertsEvaluator:
        """The evaluator of merged experts, on the same items."""
        from searchlab.evaluators.language.experts import applied_evaluator, model_hash

        model = self.resident.model
        evaluator = applied_evaluator(
            model,
            self.prepared.task,
            self.prepared.settings,
            lambda plan: applied(self, plan),
            candidates=space.plans,
            identity={
                "hash": model_hash(model),
                "active": space.top_k,
                "router_mode": space.router_mode,
                "flat": space.flat,
            },
            prompts=self.prepared.prompts,
        )
        return _travels(evaluator, self.prepared.options, "merge")


def applied(loaded: Loaded, plan: Any) -> AbstractContextManager[Any]:
    """Inside, the resident model is what a plan makes of it."""
    if not plan.merge:
        return loaded.resident.masked(
            plan.mask, top_k=plan.top_k, router_mode=plan.router_mode, flat=plan.flat
        )
    return loaded.resident.merged(
        plan.matrices("merge"),
        route=plan.matrices("route") or None,
        router_mode=plan.router_mode,
        top_k=plan.top_k,
        flat=plan.flat,
    )


def _travels(
    evaluator: ExpertsEvaluator, options: ExpertsOptions, stage: Literal["prune", "merge"]
) -> ExpertsEvaluator:
    """The evaluator, able to go to worker processes: they load the model themselves."""
    from searchlab.experiments.experts_worker import TravellingEvaluator

    return TravellingEvaluator.of(evaluator, options, stage)


_LOADED: WeakKeyDictionary[Any, Loaded] = WeakKeyDictionary()


def keep_loaded(config: SearchConfig, loaded: Loaded) -> SearchConfig:
    """Remembers, for the report, what the evaluators of a run were made of."""
    for stage in config.stages:
        _LOADED[stage.evaluator] = loaded
    return config


def loaded_of(config: SearchConfig) -> Loaded | None:
    """What `keep_loaded` remembers of a run."""
    return _LOADED.get(config.stages[-1].evaluator)


def prepare(options: ExpertsOptions) -> Prepared:
    """Reads configuration, tokenizer and task, and refuses what cannot work.

    Raises:
        ConfigError: a dense model, an unknown family, options that do not fit together.
        DataError: files that are missing or wrong, items that the metric cannot score.
        SpaceError: numbers of experts that the model cannot be cut to.
    """
    from searchlab.evaluators.language.problem import LanguageProblem, LanguageSettings
    from searchlab.evaluators.language.prompts import Prompts
    from searchlab.evaluators.noise import BANKS
    from searchlab.spaces.experts import family_of, layout_of, resolve_keep
    from searchlab.spaces.experts.files import layout_of_files, read_config

    task, harness = _task(options), (options.task or "").startswith("lm-eval:")
    table = None if options.family is None else Path(options.family)
    if (Path(options.model) / "config.json").is_file():  # transformers may not know it at all
        family_of(read_config(options.model), table)
    source = open_model(options.model)
    family = family_of(source.config, table)
    layout = layout_of(source.config, family)
    if source.folder is not None and (size := weight_bytes(source)):
        # As stored: quantised experts are smaller than the configuration's dtype says.
        stored = layout_of_files(source.folder, family).expert_bytes
        layout = replace(layout, expert_bytes=stored, total_bytes=size)
    keep = options.keep
    if keep is None and options.memory is None:
        keep = "100%" if options.front else "50%"
    each, total = resolve_keep(
        layout,
        keep=keep,
        memory=options.memory,
        per_block=options.per_block,
        top_k=1 if options.front and options.active is None else options.active,
        flat=options.flat,
    )
    for folder in options.foreign().values():
        if not (Path(folder) / "config.json").is_file():
            raise ConfigError(f"baseline folder {folder!r} has no config.json")
    check_device(options.device)
    prompts = Prompts(
        source.tokenizer,
        limit=source.context,
        chat=None if options.chat == "auto" and not harness else options.chat == "on",
        stops=source.stops,
    )
    settings = LanguageSettings(
        metric=options.metric,
        batch_tokens=options.tokens,
        new_tokens=options.new_tokens,
        smooth=options.smoothing(),
    )
    prepared = Prepared(options, source, family, layout, each, total, task, prompts, settings)
    prepared.pruning()
    if options.merges:
        prepared.merging()
    if options.front:
        from searchlab.experiments.experts_front import space_of

        space_of(prepared)
    # Items are looked at with a metric that needs no model but refuses what the real one would.
    problem = LanguageProblem(
        task, prompts, settings, answer=lambda contexts: [(0,)] * len(contexts)
    )
    for split in BANKS:
        problem.part(split)
    return prepared


def _task(options: ExpertsOptions) -> Task:
    from searchlab.evaluators.language.harness import PREFIX, HarnessTask
    from searchlab.evaluators.language.tasks import read_task

    name = options.task or "arithmetic"
    if name.startswith(PREFIX):
        found = HarnessTask.read(name)
        return found if options.items is None else found.only(options.items)
    known = options.model == "zoo" and not Path(name).exists() and "/" not in name
    task = read_task(task_path(name) if known else name)
    return task if options.items is None else task.only(options.items)
