"""Planted answers of the benchmark `eep`: subsets of experts that are known to be the only best."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.evaluator import FunctionEvaluator, Objective
from searchlab.experiments.benchmarks._common import Aim, Journal
from searchlab.population import Population
from searchlab.search import run
from searchlab.spaces.experts import PruningSpace, ResidentExperts, pruning_space
from searchlab.spaces.experts.variation import PruningVariation
from searchlab.testing.tiny_moe import tiny_moe

__all__ = ["planted"]

BLOCKS, EXPERTS, KEPT = 2, 6, 3
BUDGET, STARTS, SEEDS = 200, 30, 50


def planted(journal: Journal, quick: bool, folder: Path) -> None:
    """A teacher that is one of 400 cut models: how often is it found, and how soon?"""
    resident = ResidentExperts(
        tiny_moe("mixtral", num_hidden_layers=BLOCKS, num_local_experts=EXPERTS)
    )
    space = pruning_space(resident.layout, keep=KEPT)
    subsets = list(combinations(range(EXPERTS), KEPT))
    masks = np.zeros((len(subsets) ** 2, BLOCKS, EXPERTS), dtype=bool)
    for row in range(len(masks)):
        for block, subset in enumerate(divmod(row, len(subsets))):
            masks[row, block, list(subsets[subset])] = True
    teacher = 137
    table = _agreement(resident, masks, teacher)
    perfect = int((table == 100.0).sum())
    journal.case(
        "planted subset, all 400",
        {"perfect": perfect, "second_best": float(np.sort(table)[-2])},
        aims=[Aim("perfect subsets", perfect, "at most", 1)],
    )
    places = {key: row for row, key in enumerate(space.keys(space.of_masks(masks)))}
    seeds = 5 if quick else SEEDS
    for name, spec, least in (
        ("rates (0.5, 0.34)", _evolution(0.5, 0.34), seeds * 47 // 50),
        ("released rates", _evolution(0.25, 0.15), 0),
        ("random", AlgorithmSpec("random"), 0),
    ):
        solved, first, repeated = 0, [], 0
        for seed in range(seeds):
            asked, told = _searched(space, spec, table, places, seed)
            repeated += told - len(set(asked))
            if teacher in asked:
                solved += 1
                first.append(asked.index(teacher) + 1)
        figures = {
            "solved": solved,
            "of": seeds,
            "median_evaluations": float(np.median(first)) if first else None,
            "evaluated_twice": repeated,
        }
        aims = [Aim("evaluated twice", repeated, "at most", 0)]
        if least:
            aims.append(Aim("solved", solved, "at least", least))
        journal.case(f"planted subset, {name}", figures, seeds=range(seeds), aims=aims)


def _evolution(group: float, row: float) -> AlgorithmSpec:
    variation = PruningVariation(group=group, row=row)
    return AlgorithmSpec("evolution", {"n_random": STARTS, "variation": variation})


def _agreement(
    resident: ResidentExperts, masks: NDArray[np.bool_], teacher: int
) -> NDArray[np.float64]:
    """Percent of tokens whose likeliest successor is the teacher's, for each mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (16, 24), generator=generator)
    chosen = []
    with torch.no_grad():
        for start in range(0, len(masks), 16):
            part = masks[start : start + 16]
            rows = torch.arange(len(part)).repeat_interleave(len(ids))
            with resident.masked(part, rows):
                logits = resident.model(input_ids=ids.repeat(len(part), 1)).logits
            chosen.append(logits.argmax(dim=-1).reshape(len(part), -1))
    table = torch.cat(chosen)
    equal = (table == table[teacher]).double().mean(dim=1)
    return (100.0 * equal).numpy()


def _searched(
    space: PruningSpace,
    spec: AlgorithmSpec,
    table: NDArray[np.float64],
    places: dict[bytes, int],
    seed: int,
) -> tuple[list[int], int]:
    """Different rows of the table that a search asked for, in order, and how often it paid.

    A run asks for its first candidate some more times, to measure how far values repeat; it pays
    for none of that.
    """
    asked: list[int] = []

    def look(columns: dict[str, Any], fidelity: str, seed: int) -> NDArray[np.float64]:
        rows = [places[key] for key in space.keys(Population(columns))]
        asked.extend(rows)
        return table[rows]

    score = FunctionEvaluator(look, space, (Objective("agreement", "max"),), columns=True)
    stage = Stage("search", space, score, spec, Budget(BUDGET))
    result = run(SearchConfig((stage,), seed=seed))
    return list(dict.fromkeys(asked)), int(result.counts["evaluations"])
