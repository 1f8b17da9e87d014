"""Memory, active operations and quality of fewer experts at once: the search for a front."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from searchlab.config import AlgorithmSpec, Final, SearchConfig, Stage
from searchlab.spaces.experts.space import pruning_space
from searchlab.spaces.experts.trade_off import TradeOffSpace, TradeOffVariation

if TYPE_CHECKING:
    from searchlab.algorithms.base import Seeds
    from searchlab.evaluators.language.free_active import FreeActiveEvaluator
    from searchlab.experiments.experts_setup import Loaded, Prepared
    from searchlab.result import Result

__all__ = [
    "FULL",
    "FRONT_FOLDER",
    "final_of",
    "known_points",
    "space_of",
    "stage_of",
    "write_front",
]

FULL = "full"
FRONT_FOLDER = "front"
_SIZES = 5  # numbers of experts that rankings are cut to
_RANDOM = 8
_PARENTS = 24


def space_of(prepared: Prepared) -> TradeOffSpace:
    """Kept experts in any number, up to what --keep or --memory says."""
    options = prepared.options
    return TradeOffSpace(
        prepared.layout,
        most=prepared.keep,
        total=prepared.total,
        groups="block" if options.groups == "block" else int(options.groups),
        per_block=options.per_block,
        top_k=options.active,
        flat=options.flat,
        router_mode="prob" if prepared.router_mode == "prob" else "slice",
    )


def evaluator_of(loaded: Loaded, space: TradeOffSpace) -> FreeActiveEvaluator:
    """The metric, bytes, and where the number of active experts is free, operations per token."""
    from searchlab.evaluators.language.experts import experts_evaluator
    from searchlab.evaluators.language.free_active import FreeActiveEvaluator

    prepared = loaded.prepared
    made = experts_evaluator(
        loaded.resident,
        space,
        prepared.task,
        prepared.settings,
        prompts=prepared.prompts,
        masks=space.masks,
        at_once=prepared.options.together,
        also=("bytes", "flops") if space.top_k is None else ("bytes",),
    )
    return FreeActiveEvaluator.of(made, space.active_of)


def stage_of(loaded: Loaded) -> Stage:
    """The one stage of such a search."""
    from searchlab.experiments.experts_worker import TravellingTradeOff

    options = loaded.prepared.options
    space = space_of(loaded.prepared)
    evaluator = TravellingTradeOff.carrying(evaluator_of(loaded, space), options)
    settings: dict[str, Any] = {
        "n_random": _RANDOM,
        "population": _PARENTS,
        "quantum": options.together,
        "variation": TradeOffVariation(prior=_prior(loaded, space)),
    }
    return Stage(
        "front",
        space,
        evaluator,
        AlgorithmSpec("nsga2", settings),
        options.limits(),
        seeds=known_points(loaded, space),
        chunk=options.together,
    )


def _prior(loaded: Loaded, space: TradeOffSpace) -> tuple[tuple[float, ...], ...]:
    """Where experts stand in the rankings of their group, on average: 0 = last, 1 = first."""
    places = []
    for scores in loaded.scores.values():
        share = scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-12)
        groups = [share[space.of_block == g].sum(axis=0) for g in range(space.of_block[-1] + 1)]
        places.append(np.argsort(np.argsort(np.stack(groups), axis=1), axis=1))
    if not places:
        return ()
    mean = np.mean(places, axis=0) / max(1, space.layout.experts - 1)
    return tuple(tuple(row) for row in mean.tolist())


def final_of() -> Final:
    """Members of the front that cover most are scored again, and the full model."""
    return Final(k=8, report=1, named=(FULL,))


def known_points(loaded: Loaded, space: TradeOffSpace) -> Seeds:
    """The full model where it is allowed, and what rankings keep at several sizes."""
    from searchlab.algorithms.base import Seeds
    from searchlab.evaluators.language.calibration import keep_best

    layout, blocks = space.layout, len(space.layout.blocks)
    ks = [space.top_k] if space.top_k is not None else _some(1, space.variables["active"].high, 3)  # type: ignore[attr-defined]
    masks, active, names = [], [], []
    everything = blocks * layout.experts
    if space.most == layout.experts and (space.total or everything) == everything:
        masks.append(np.ones((blocks, layout.experts), dtype=bool))
        active.append(max(ks))
        names.append(FULL)
    for k in reversed(ks):
        allowed = [n for n in layout.counts_allowed(top_k=k, flat=space.flat) if n <= space.most]
        if space.total is not None:
            allowed = [n for n in allowed if n * blocks <= space.total]
        for place in _some(0, len(allowed) - 1, _SIZES):
            count = allowed[place]
            per_block = {"total": count * blocks} if space.per_block else {"keep": count}
            cut = pruning_space(
                layout,
                groups=_groups(space),
                top_k=k,
                flat=space.flat,
                **per_block,  # type: ignore[arg-type]
            )
            for name, scores in loaded.scores.items():
                masks.append(keep_best(cut, scores))
                active.append(k)
                names.append(f"{name} {count}" + (f", {k} active" if len(ks) > 1 else ""))
    population = space.of_masks(np.array(masks), np.array(active))
    first = {key: row for row, key in reversed(list(enumerate(space.keys(population))))}
    rows = sorted(first.values())
    return Seeds(population.take(np.array(rows)), tuple(f"baseline:{names[row]}" for row in rows))


def _groups(space: TradeOffSpace) -> Any:
    count = int(space.of_block[-1]) + 1
    return "block" if count == len(space.of_block) else count


def _some(low: int, high: int, most: int) -> list[int]:
    """At most so many whole numbers from low to high, both ends among them."""
    spread = np.linspace(low, high, min(most, high - low + 1)).round().astype(int)
    return sorted(set(spread.tolist()))


def write_front(config: SearchConfig, result: Result, directory: Path) -> list[Path]:
    """A genotype for every member of the front, which `searchlab apply` takes."""
    trades = result.trade_offs
    if trades is None:
        return []
    folder = directory / FRONT_FOLDER
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    written = []
    for member in trades.members:
        (plan,) = config.stages[-1].space.plans(member.population)
        plan = plan.with_about(
            base=str(config.options.get("model")),
            search=dict(zip(trades.names, member.values, strict=True)),
            **(
                {"report": dict(zip(trades.names, member.report_values[0], strict=True))}
                if member.report_values
                else {}
            ),
            seed=config.seed,
        )
        path = folder / f"{member.id}.json"
        path.write_text(json.dumps(plan.to_json(), indent=1) + "\n", "utf-8")
        written.append(path)
    return written
