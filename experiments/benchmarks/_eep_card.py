"""What is counted in the benchmark `eep`: evaluations, published files, FLOPs, crossovers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from searchlab.config import SearchConfig
from searchlab.experiments.benchmarks._common import Aim, Journal, data_folder
from searchlab.experiments.experts import PAPER, ExpertsOptions
from searchlab.experiments.experts_setup import prepare
from searchlab.experiments.experts_stages import stages_of
from searchlab.search import run
from searchlab.spaces.experts import ResidentExperts, pruning_space
from searchlab.spaces.experts.export import export_checkpoint
from searchlab.spaces.experts.merging import merging_space
from searchlab.spaces.experts.model import one_hot
from searchlab.spaces.experts.published import read_published
from searchlab.spaces.experts.variation import MergingVariation
from searchlab.testing.tiny_moe import tiny_moe

__all__ = ["active", "counting", "crossover", "published"]

FILES = 22


def published(journal: Journal, quick: bool, folder: Path) -> None:
    """The published coefficient files, read without unpickling."""
    base = data_folder("eep")
    paths = [] if base is None else sorted((base / "coefficients").glob("*.pth"))
    if not paths:
        journal.skip("published coefficients", "no eep/coefficients below $SEARCHLAB_DATA")
        return
    files: dict[str, Any] = {}
    for path in paths:
        plan = read_published(path)
        tables = plan.matrices("merge") if plan.merge else []
        pure = [np.array_equal(table, one_hot(table)) for table in tables]
        groups = int(dict(plan.about)["groups"])
        files[path.stem] = {
            "shape": [len(plan.kept[0]), plan.experts],
            "groups": groups,
            "keys": 2 * groups,  # a matrix of experts and one of the router for each
            "one_hot": round(float(np.mean(pure)), 3) if pure else 1.0,
            "kept": [list(row) for row in dict.fromkeys(plan.kept)],
        }
    wrong = [
        name
        for name, found in files.items()
        if found["shape"] not in ([2, 8], [4, 8], [6, 8]) or found["keys"] not in (8, 64)
    ]
    journal.case(
        "published coefficients",
        {"count": len(files), "files": files},
        aims=[
            Aim("files", len(files), "at least", FILES),
            Aim("of another shape or number of groups", len(wrong), "at most", 0),
            Aim("one-hot in arc-e, six kept", files["arc-e_budget_6"]["one_hot"], "at least", 1.0),
        ],
    )


def counting(journal: Journal, quick: bool, folder: Path) -> None:
    """The paper's preset evaluates as often as the released search: by three counts."""
    if quick:
        return
    items = 2
    options = ExpertsOptions(preset="paper", task="arithmetic", keep="4", groups="2", items=items)
    (stage,) = stages_of(prepare(options).load())
    result = run(SearchConfig((stage,), seed=0))
    assert result.records is not None
    evaluator: Any = stage.evaluator
    engine = int(result.counts["evaluations"])
    rows = int((~result.records.cached).sum())
    # The first candidate is asked some more times, to see how far values repeat.
    again = evaluator.measured // items - rows
    journal.case(
        "the released search, one child at a time",
        {
            "evaluations": engine,
            "rows": rows,
            "keys": len(set(result.records.keys)),
            "cached": int(result.records.cached.sum()),
            "asked_to_see_how_values_repeat": again,
        },
        aims=[
            Aim("evaluations off 402", abs(engine - sum(PAPER)), "at most", 0),
            Aim("rows off evaluations", abs(rows - engine), "at most", 0),
        ],
    )


def crossover(journal: Journal, resident: ResidentExperts) -> None:
    """10,000 crossovers of two subsets that share nothing: whose rows are the children's?"""
    n, layout = 10_000, resident.layout
    space = merging_space(layout, keep=4, groups=1, router_mode="prob")
    masks = np.zeros((2, len(layout.blocks), layout.experts), dtype=bool)
    masks[0, :, :4] = masks[1, :, 4:8] = True
    one, two = (space.of_masks(masks[i : i + 1]).take(np.zeros(n, dtype=int)) for i in (0, 1))
    variation = MergingVariation(entry=0.0, normalise=0.0)
    u = np.random.default_rng(3).random((n, variation.width(space)))
    child = variation.vary(space, one, two, u)
    tables = np.stack([np.asarray(child[key]) for key in space.variables], axis=1)
    rows: NDArray[np.float64] = tables.reshape(-1, layout.experts)
    foreign = int(((rows == 1.0).sum(axis=1) != 1).sum() + ((rows != 0) & (rows != 1)).sum())
    share = float((rows[:, :4].sum(axis=1) == 1.0).mean())
    journal.case(
        "crossover, 10,000 children",
        {"rows_of_no_parent": foreign, "share_of_the_first_parent": share},
        aims=[
            Aim("rows of no parent", foreign, "at most", 0),
            Aim("share off 0.6", abs(share - 0.6), "at most", 0.02),
        ],
    )


def active(journal: Journal, folder: Path) -> None:
    """One active expert: a weight of exactly 1, half of the work, and what the files say of it."""
    from transformers import AutoConfig

    model = tiny_moe("mixtral")
    resident = ResidentExperts(model)
    ids = torch.randint(3, 64, (8, 20), generator=torch.Generator().manual_seed(2))
    every = np.ones((1, len(resident.layout.blocks), resident.layout.experts), dtype=bool)
    seen: list[torch.Tensor] = []

    def look(module: Any, given: Any, out: Any) -> None:
        seen.append(out[1])

    flops = {}
    for k in (2, 1):
        hooks = [router.register_forward_hook(look) for router in resident.routers]
        with resident.masked(every, top_k=k), torch.no_grad():
            inside = {int(router.top_k) for router in resident.routers}  # type: ignore[arg-type]
            with FlopCounterMode(display=False) as counter:
                model(input_ids=ids)
        for hook in hooks:
            hook.remove()
        by_module = counter.get_flop_counts()
        flops[k] = sum(
            sum(counts.values()) for name, counts in by_module.items() if name.endswith(".experts")
        )
    alone = seen[-len(resident.routers) :]
    away = max(float((weights - 1).abs().max()) for weights in alone)
    space = pruning_space(resident.layout, keep=resident.layout.experts, top_k=1)
    (plan,) = space.plans(space.of_masks(every))
    model.save_pretrained(folder / "base")
    export_checkpoint(folder / "base", plan, folder / "one")
    saved = AutoConfig.from_pretrained(folder / "one").num_experts_per_tok
    journal.case(
        "one active expert",
        {
            "top_k": sorted(inside),
            "weight_off_one": away,
            "weights_per_token": alone[0].shape[1],
            "flops_of_experts": {str(k): count for k, count in flops.items()},
            "saved_top_k": saved,
        },
        aims=[
            Aim("weight off one", away, "at most", 0.0),
            Aim("k", max(inside), "at most", 1),
            Aim("k of the saved configuration", saved, "at most", 1),
            Aim("flops off one half", abs(flops[1] / flops[2] - 0.5), "at most", 0.0),
        ],
    )
