"""The searches of the benchmark `eep`: the character model, every task, half and a quarter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.config import SearchConfig
from searchlab.evaluator import REPORT_REPLICATE
from searchlab.evaluators.language.intervals import paired_difference
from searchlab.experiments.benchmarks._common import Aim, Journal
from searchlab.experiments.experts import ExpertsOptions
from searchlab.experiments.experts_setup import Loaded, prepare
from searchlab.experiments.experts_stages import final_of, stages_of
from searchlab.experiments.zoo.characters import TASKS
from searchlab.population import Jobs
from searchlab.search import run
from searchlab.uniforms import uniforms

__all__ = ["TASKS", "few", "half", "predictor", "quarter"]

POINT = 0.01
RANDOM = 30
BUDGET = 120
GUIDED_TASKS = ("code", "prose")


def half(journal: Journal, quick: bool, folder: Path) -> None:
    """Half of the experts: as good as all of them, and far better than chance."""
    _tables(journal, quick, keep="50%", strict=True)


def quarter(journal: Journal, quick: bool, folder: Path) -> None:
    """A quarter of the experts: the same table, and what is lost."""
    _tables(journal, quick, keep="25%", strict=False)


def item_scores(loaded: Loaded, masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(n, items): what masks (n, L, E) get in each report item, 1 where it is right."""
    population = loaded.space.of_masks(masks)
    jobs = Jobs(
        np.arange(len(population)),
        population,
        loaded.space.keys(population),
        replicate=REPORT_REPLICATE,
    )
    found = loaded.evaluator.evaluate(jobs).items
    assert found is not None
    return np.array(found, dtype=np.float64)


def full_scores(loaded: Loaded) -> NDArray[np.float64]:
    """(items,): what the full model gets in each report item."""
    from searchlab.evaluators.language.experts import experts_evaluator
    from searchlab.spaces.experts import pruning_space

    layout, prepared = loaded.prepared.layout, loaded.prepared
    whole = pruning_space(layout, keep=layout.experts)
    evaluator = experts_evaluator(
        loaded.resident, whole, prepared.task, prepared.settings, prompts=prepared.prompts
    )
    every = whole.of_masks(np.ones((1, len(layout.blocks), layout.experts), dtype=bool))
    jobs = Jobs(np.arange(1), every, whole.keys(every), replicate=REPORT_REPLICATE)
    found = evaluator.evaluate(jobs).items
    assert found is not None
    return np.array(found[0], dtype=np.float64)


def search(options: ExpertsOptions) -> tuple[Loaded, Any, float]:
    """A run of the recipe without its files: what was loaded, the result, CPU seconds."""
    loaded = prepare(options).load()
    config = SearchConfig(
        tuple(stages_of(loaded)), name="experts", seed=options.seed, final=final_of(loaded)
    )
    began = time.process_time()
    result = run(config)
    return loaded, result, time.process_time() - began


def _tables(journal: Journal, quick: bool, *, keep: str, strict: bool) -> None:
    for task in _tasks(journal, quick):
        _table(journal, quick, task=task, keep=keep, strict=strict)


def _table(journal: Journal, quick: bool, *, task: str, keep: str, strict: bool) -> None:
    """What three seeds find beside the full model, random subsets and every ranking.

    Everything is scored on the report items, and differences are paired item by item: those of
    several seeds are means over seeds for each item.
    """
    seeds = (0,) if quick else (0, 1, 2)
    rows: list[dict[str, Any]] = []
    scores = []
    for seed in seeds:
        options = ExpertsOptions(
            task=task,
            keep=keep,
            budget=24 if quick else BUDGET,
            seed=seed,
            items=32 if quick else None,
        )
        loaded, result, took = search(options)
        winner = result.groups[-1].winner
        scores.append(item_scores(loaded, loaded.space.masks(winner.population))[0])
        rows.append(
            {
                "seed": seed,
                "found": float(scores[-1].mean()),
                "winner": winner.name if winner.kind == "baseline" else "searched",
                "search": winner.search,
                "selection": winner.selection,
                "evaluations": result.counts["evaluations"],
                "measured_items": loaded.evaluator.measured,
                "cpu_s": round(took, 1),
            }
        )
    found = np.array(scores)
    drawn = loaded.space.sample(
        uniforms(7, 0, 0, 10 if quick else RANDOM, loaded.space.sample_width)
    )
    random = item_scores(loaded, loaded.space.masks(drawn)).mean(axis=1)
    full = full_scores(loaded)
    known = dict(
        zip(loaded.known, item_scores(loaded, np.stack(list(loaded.known.values()))), strict=True)
    )
    rankings: dict[str, Any] = {
        name: {"report": float(own.mean()), "found_more": _paired(found, own)}
        for name, own in known.items()
    }
    best = max(float(own.mean()) for own in known.values())
    worst = float(found.mean(axis=1).min())
    behind = sum(ranking["found_more"][2] < 0 for ranking in rankings.values())
    task_items = loaded.prepared.task
    aims = [Aim("found over random", worst - float(random.mean()), "at least", 10 * POINT)]
    if not quick:
        short = (float(found.mean()) - best) / POINT
        aims += [
            Aim("rankings that are better, by 95 % intervals", behind, "at most", 0),
            Aim("points over the best ranking", short, "at least", 0.0, binding=False),
        ]
    if strict:
        aims.append(
            Aim(
                "points lost of full",
                (float(full.mean()) - worst) / POINT,
                "at most",
                1.0,
                binding=not quick,
            )
        )
    journal.case(
        f"characters, {task}, {keep} of the experts",
        {
            "full": float(full.mean()),
            "found_mean": float(found.mean()),
            "found_more_than_full": _paired(found, full),
            "rankings": rankings,
            "random_mean": float(random.mean()),
            "random_best": float(random.max()),
            "report_items": len(task_items.splits["report"]),
            "selection_items": len(task_items.splits["selection"]),
            "search_items": len(task_items.splits["search"]),
            "majority": task_items.majority("report"),
            "runs": rows,
        },
        seeds=seeds,
        aims=aims,
    )


def _paired(found: NDArray[np.float64], other: NDArray[np.float64]) -> list[float]:
    """Mean difference (seeds, items) - (items,), and its 95 % interval over items."""
    return list(paired_difference(found.mean(axis=0), other))


def _tasks(journal: Journal, quick: bool) -> Sequence[str]:
    named: Sequence[str] | None = journal.options.task
    return named or (("reversal",) if quick else TASKS)


def few(journal: Journal, quick: bool, folder: Path) -> None:
    """40 evaluations in all, rankings among them: not worse than REAP on the report items."""
    tasks = _tasks(journal, quick)
    seeds = (0,) if quick else (0, 1, 2, 3, 4)
    for task in tasks:
        rows = []
        for seed in seeds:
            options = ExpertsOptions(
                task=task, keep="25%", budget=35, seed=seed, items=32 if quick else None
            )
            loaded, result, _ = search(options)
            winner = result.groups[-1].winner
            masks = np.stack([loaded.space.masks(winner.population)[0], loaded.known["reap"]])
            own, reap = item_scores(loaded, masks)
            rows.append(
                {
                    "seed": seed,
                    "found": float(own.mean()),
                    "winner": winner.name if winner.kind == "baseline" else "searched",
                    "reap": float(reap.mean()),
                    "found_more": list(paired_difference(own, reap)),
                    "evaluations": result.counts["evaluations"]
                    + result.counts["baseline_evaluations"],
                }
            )
        good = sum(row["found"] >= row["reap"] for row in rows)
        journal.case(
            f"characters, {task}, 40 evaluations in all",
            {"not_worse_than_reap": good, "of": len(rows), "runs": rows},
            seeds=seeds,
            aims=[Aim("seeds not worse than REAP", good, "at least", len(rows), binding=not quick)],
        )


def predictor(journal: Journal, quick: bool, folder: Path) -> None:
    """Half of the evaluations with a predictor against all of them without."""
    named: Sequence[str] | None = journal.options.task
    for task in named or (("code",) if quick else GUIDED_TASKS):
        _guided(journal, quick, task)


def _guided(journal: Journal, quick: bool, task: str) -> None:
    seeds = (0,) if quick else (0, 1, 2)
    plain_budget = 40 if quick else 400
    rows = []
    for seed in seeds:
        row: dict[str, Any] = {"seed": seed}
        for name, guided, budget in (
            ("plain", False, plain_budget),
            ("guided", True, plain_budget // 2),
        ):
            options = ExpertsOptions(
                task=task,
                keep="25%",
                metric="perplexity",
                budget=budget,
                guided=guided,
                race=not guided,
                seed=seed,
                items=32,
            )
            _, result, took = search(options)
            winner = result.groups[-1].winner
            row[name] = {
                "evaluations": budget,
                "search": winner.search,
                "report": winner.report[0],
                "cpu_s": round(took, 1),
            }
        row["ratio"] = row["guided"]["search"] / row["plain"]["search"]
        rows.append(row)
    ratio = float(np.mean([row["ratio"] for row in rows]))
    journal.case(
        f"characters, {task}, predictor with half of the evaluations",
        {"runs": rows, "mean_ratio_of_perplexities": ratio},
        seeds=seeds,
        aims=[Aim("guided over plain", ratio, "at most", 1.0, binding=False)],
    )
