"""What has to be equal in the benchmark `eep`: masks, cuts, files, merges, operators, races."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchlab.algorithms.base import Seeds
from searchlab.algorithms.evolution import ParentRule
from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.evaluator import FunctionEvaluator, Objective
from searchlab.experiments.benchmarks._common import Aim, Journal
from searchlab.experiments.benchmarks._eep_card import active, crossover
from searchlab.experiments.experts import ExpertsOptions
from searchlab.experiments.experts_setup import prepare
from searchlab.experiments.experts_stages import stages_of
from searchlab.population import Jobs, Population
from searchlab.search import run
from searchlab.spaces.experts import ResidentExperts, pruning_space
from searchlab.spaces.experts.cut import cut_model
from searchlab.spaces.experts.export import export_checkpoint
from searchlab.spaces.experts.merging import MergingSpace, merging_space
from searchlab.spaces.experts.variation import MergingVariation, PruningVariation
from searchlab.testing.tiny_moe import TINY_MOE, tiny_moe
from searchlab.uniforms import uniforms

__all__ = ["exact", "merging", "operators", "racing"]


def tokens(seed: int, rows: int = 8, length: int = 20) -> Tensor:
    """Token ids (rows, length) of the tiny models."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits (rows, length, V)."""
    out: Tensor = model(input_ids=ids).logits
    return out


# -- exact ----------------------------------------------------------------------------------------


def exact(journal: Journal, quick: bool, folder: Path) -> None:
    """Seven families: the identity, masks against cut models, files loaded again."""
    from transformers import AutoModelForCausalLM

    ids = tokens(0)
    for name in TINY_MOE:
        model = tiny_moe(name)
        resident = ResidentExperts(model)
        layout = resident.layout
        base = logits_of(model, ids)
        every = np.ones((1, len(layout.blocks), layout.experts), dtype=bool)
        with resident.masked(every):
            by_mask = logits_of(model, ids)
        with resident.merged([np.eye(layout.experts)] * len(layout.blocks)):
            by_sum = logits_of(model, ids)
        space = pruning_space(layout, keep=layout.experts // 2)
        population = space.sample(uniforms(3, 0, 0, 1, space.sample_width))
        mask, (plan,) = space.masks(population)[0], space.plans(population)
        with resident.masked(mask[None]):
            masked = logits_of(model, ids)
        sliced = logits_of(cut_model(resident, mask), ids)
        model.save_pretrained(folder / name)
        export_checkpoint(folder / name, plan, folder / f"{name}-cut")
        again: Any = AutoModelForCausalLM.from_pretrained(
            folder / f"{name}-cut", attn_implementation="eager", experts_implementation="eager"
        ).eval()
        counts = ResidentExperts(again).layout.experts
        after = logits_of(model, ids)
        figures = {
            "identity_by_mask": float((by_mask - base).abs().max()),
            "identity_by_sum": float((by_sum - base).abs().max()),
            "masked_over_cut": float((masked - sliced).abs().max()),
            "reloaded_over_cut": float((logits_of(again, ids) - sliced).abs().max()),
            "experts_in_config": counts,
            "base_changed": float((after - base).abs().max()),
        }
        aims = [Aim(key, float(value), "at most", 0.0) for key, value in figures.items()]
        aims[4] = Aim("experts in config", float(counts), "at most", layout.experts // 2)
        journal.case(f"{name}, half of the experts", figures, aims=aims)
    _modes(journal)
    active(journal, folder)


def _modes(journal: Journal) -> None:
    """Scoring all experts before dropping some, against scoring the kept ones."""
    ids = tokens(1)
    found = {}
    for name, changes in (
        ("mixtral", {}),
        ("olmoe", {"norm_topk_prob": False}),
        ("olmoe, renormalised", {"norm_topk_prob": True}),
    ):
        resident = ResidentExperts(tiny_moe(name.split(",")[0], **changes))
        space = pruning_space(resident.layout, keep=4)
        mask = space.masks(space.sample(uniforms(5, 0, 0, 1, space.sample_width)))
        out = []
        for mode in ("slice", "prob"):
            with resident.masked(mask, router_mode=mode):
                out.append(logits_of(resident.model, ids))
        found[name] = float((out[0] - out[1]).abs().max())
    journal.case(
        "softmax before or after dropping",
        found,
        aims=[
            Aim("mixtral", found["mixtral"], "at most", 1e-5),
            Aim("olmoe", found["olmoe"], "at least", 1e-2),
            Aim("olmoe, renormalised", found["olmoe, renormalised"], "at most", 1e-5),
        ],
    )


# -- operators ------------------------------------------------------------------------------------


def operators(journal: Journal, quick: bool, folder: Path) -> None:
    """The released rates, on 10,000 children; linearity of merges."""
    resident = ResidentExperts(tiny_moe("mixtral"))
    layout, n = resident.layout, 10_000
    space = pruning_space(layout, keep=4, groups=1)
    parent = space.sample(uniforms(1, 0, 0, 1, space.sample_width)).take(np.zeros(n, dtype=int))
    released = PruningVariation.released()
    u = np.random.default_rng(0).random((n, released.width(space)))
    child = released.vary(space, parent, parent, u)
    kept = space.masks(child)
    wrong = int((kept.sum(axis=2) != 4).any(axis=1).sum())
    rate = float((kept & ~space.masks(parent)).sum(axis=2)[:, 0].mean() / 4)
    merged = merging_space(layout, keep=4, groups=1)
    start = merged.of_masks(space.masks(parent.take(np.zeros(1, dtype=int)))).take(
        np.zeros(n, dtype=int)
    )
    variation = MergingVariation(normalise=0.0)
    u = np.random.default_rng(1).random((n, variation.width(merged)))
    moved = np.asarray(variation.vary(merged, start, start, u)["merge"]) - np.asarray(
        start["merge"]
    )
    steps = moved[(moved != 0) & (np.abs(moved) < 0.5)]
    sigma = float(steps.std())
    changed = float((moved != 0).mean())
    journal.case(
        "released operators, 10,000 children",
        {
            "wrong_rows": wrong,
            "change_rate": rate,
            "sigma": sigma,
            "entries_changed": changed,
        },
        aims=[
            Aim("wrong rows", wrong, "at most", 0),
            Aim("change rate off 0.12", abs(rate - 0.12), "at most", 0.01),
            Aim("sigma off 0.065", abs(sigma / 0.065 - 1), "at most", 0.02),
        ],
    )
    crossover(journal, resident)
    _linear(journal, resident)


def _linear(journal: Journal, resident: ResidentExperts) -> None:
    layout = resident.layout
    generator = np.random.default_rng(2)
    u, v = generator.normal(size=(2, 4, layout.experts))
    parts = []
    for table in (u, v, 0.3 * u + 0.7 * v):
        with resident.merged([table] * len(layout.blocks)):
            parts.append(
                [
                    {name: value.clone() for name, value in experts.named_parameters()}
                    for experts in resident.experts
                ]
            )
    worst = 0.0
    for one, two, both in zip(*parts, strict=True):
        for name, value in both.items():
            mixed = 0.3 * one[name] + 0.7 * two[name]
            worst = max(worst, float((value - mixed).abs().max() / mixed.abs().max()))
    ids, order = tokens(4), np.array([2, 0, 3, 1])
    out = []
    route = np.zeros((4, layout.experts))
    route[np.arange(4), [1, 3, 4, 6]] = 1.0
    for rows in (np.arange(4), order):
        with resident.merged(
            [u[rows]] * len(layout.blocks),
            route=[route[rows]] * len(layout.blocks),
            router_mode="prob",
        ):
            out.append(logits_of(resident.model, ids))
    permuted = float((out[0] - out[1]).abs().max() / out[0].abs().max())
    journal.case(
        "merges are linear",
        {"relative": worst, "rows_in_another_order": permuted},
        aims=[
            Aim("relative", worst, "at most", 1e-5),
            Aim("another order", permuted, "at most", 1e-5),
        ],
    )


# Released: parents within 3 points of the best, mates within 1 (six at least); a point of an
# accuracy is taken as 0.01 nat here.
_RULES: tuple[tuple[str, tuple[ParentRule, ParentRule | None]], ...] = (
    ("planted merge", (ParentRule("rank", mu=5), None)),
    ("planted merge, the rule of the recipe", (ParentRule("power", start=4), None)),
    (
        "planted merge, the released rule",
        (
            ParentRule("threshold", margin=0.03, limit=500),
            ParentRule("threshold", margin=0.01, limit=500, least=6),
        ),
    ),
)


# -- merging --------------------------------------------------------------------------------------


def merging(journal: Journal, quick: bool, folder: Path) -> None:
    """A planted merge: how much of the divergence that pruning leaves goes away."""
    seeds = range(2 if quick else 5)
    budget = 120 if quick else 400
    resident = ResidentExperts(tiny_moe("mixtral", num_local_experts=6))
    space = merging_space(resident.layout, keep=4, router_mode="prob")
    kept = np.zeros((1, len(resident.layout.blocks), 6), dtype=bool)
    kept[:, :, [0, 1, 2, 4]] = True
    table = np.zeros((4, 6))
    table[np.arange(4), [0, 1, 2, 4]] = 1.0
    planted = table.copy()
    planted[0, 0], planted[0, 3] = 0.6, 0.4
    both = [tokens(10, 16, 24), tokens(11, 16, 24)]
    blocks = len(resident.layout.blocks)
    with resident.merged([planted] * blocks, route=[table] * blocks, router_mode="prob"):
        teacher = [logits_of(resident.model, ids).log_softmax(-1) for ids in both]

    def divergence(population: Population, at: int) -> NDArray[np.float64]:
        values = []
        for plan in space.plans(population):
            merge = plan.matrices("merge") if plan.merge else [_one_hot(row) for row in plan.kept]
            route = plan.matrices("route") if plan.route else merge
            with resident.merged(merge, route=route, router_mode="prob"):
                own = logits_of(resident.model, both[at]).log_softmax(-1)
            target = teacher[at]
            values.append(float((target.exp() * (target - own)).sum(-1).double().mean()))
        return np.array(values)

    start = space.of_masks(kept)
    before = [float(divergence(start, at)[0]) for at in (0, 1)]
    for name, rules in _RULES[:1] if quick else _RULES:
        rows = [_merged(space, divergence, start, before, budget, seed, rules) for seed in seeds]
        figures: dict[str, Any] = {"pruned": before, "evaluations": budget, "runs": rows}
        aims = [Aim("worse than pruned", sum(r["search"] > 1 for r in rows), "at most", 0)]
        for split in ("search", "unseen"):
            middle = float(np.median([row[split] for row in rows]))
            figures[f"median_{split}"] = middle
            limit = 0.9 if quick else 0.65
            aims.append(Aim(f"median over pruned, {split} tokens", middle, "at most", limit))
        journal.case(name, figures, seeds=list(seeds), aims=aims)


def _one_hot(row: tuple[int, ...]) -> NDArray[np.float64]:
    out = np.zeros((len(row), 6))
    out[np.arange(len(row)), list(row)] = 1.0
    return out


def _merged(
    space: MergingSpace,
    divergence: Any,
    start: Population,
    before: Any,
    budget: int,
    seed: int,
    rules: tuple[ParentRule, ParentRule | None],
) -> dict[str, Any]:
    def look(columns: dict[str, Any], fidelity: str, number: int) -> NDArray[np.float64]:
        found: NDArray[np.float64] = divergence(Population(columns), 0)
        return found

    score = FunctionEvaluator(look, space, (Objective("kl", "min"),), columns=True)
    settings = {
        "n_random": 0,
        "parents": rules[0],
        "mating": 0.3,
        "variation": MergingVariation(),
    }
    if rules[1] is not None:
        settings["mates"] = rules[1]
    spec = AlgorithmSpec("evolution", settings)
    seeds = Seeds(start, ("seed:pruned",))
    stage = Stage("merge", space, score, spec, Budget(budget), seeds=seeds)
    result = run(SearchConfig((stage,), seed=seed))
    best = result.best.contender
    curve = [value for _, value in next(iter(result.curve.values()))]
    return {
        "seed": seed,
        "search": best.search / before[0],
        "unseen": float(divergence(best.population, 1)[0]) / before[1],
        "monotone": all(a >= b for a, b in pairwise(curve)),
    }


# -- racing ---------------------------------------------------------------------------------------


def racing(journal: Journal, quick: bool, folder: Path) -> None:
    """Stopping early changes no winner; candidates together score as alone."""
    out = []
    for race in (True, False):
        options = ExpertsOptions(
            task="reversal",
            keep="25%",
            budget=64 if quick else 160,
            race=race,
            items=32 if quick else 128,
            tokens=512,
        )
        loaded = prepare(options).load()
        result = run(SearchConfig(tuple(stages_of(loaded)), seed=0))
        out.append((loaded, result.best.contender, loaded.evaluator.measured))
    (loaded, one, less), (_, two, more) = out
    population = loaded.space.sample(uniforms(9, 0, 0, 8, loaded.space.sample_width))
    together = loaded.evaluator.evaluate(_jobs(loaded.space, population))
    differing = 0
    for row in range(len(population)):
        alone = loaded.evaluator.evaluate(_jobs(loaded.space, population.take([row])))
        assert together.items is not None
        assert alone.items is not None
        here: Any = together.items[row]
        differing += int((np.asarray(alone.items[0]) != np.asarray(here)).sum())
    equal = float(one.key == two.key and one.search == two.search)
    journal.case(
        "racing on the character model",
        {
            "same_winner": bool(equal),
            "scores_measured": less,
            "scores_without": more,
            "items_differing_together": differing,
        },
        aims=[
            Aim("same winner", equal, "at least", 1),
            Aim("share measured", less / more, "at most", 0.999),
            Aim("items that differ", differing, "at most", 0),
        ],
    )


def _jobs(space: Any, population: Population) -> Jobs:
    return Jobs(np.arange(len(population)), population, space.keys(population))
