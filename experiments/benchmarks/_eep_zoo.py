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
from searchlab.experiments.benchmarks._common import Aim, Journal
from searchlab.experiments.experts import ExpertsOptions
from searchlab.experiments.experts_setup import Loaded, prepare
from searchlab.experiments.experts_stages import stages_of
from searchlab.experiments.zoo.characters import TASKS
from searchlab.population import Jobs, Population
from searchlab.search import run
from searchlab.uniforms import uniforms

__all__ = ["TASKS", "few", "half", "predictor", "quarter"]

POINT = 0.01
RANDOM = 30


def half(journal: Journal, quick: bool, folder: Path) -> None:
    """Half of the experts: as good as all of them, and far better than chance."""
    _tables(journal, quick, keep="50%", strict=True)


def quarter(journal: Journal, quick: bool, folder: Path) -> None:
    """A quarter of the experts: the same table, and what is lost."""
    _tables(journal, quick, keep="25%", strict=False)


def reported(loaded: Loaded, population: Population) -> NDArray[np.float64]:
    """Values of candidates on the report items."""
    jobs = Jobs(
        np.arange(len(population)),
        population,
        loaded.space.keys(population),
        replicate=REPORT_REPLICATE,
    )
    values: NDArray[np.float64] = loaded.evaluator.evaluate(jobs).values[:, 0]
    return values


def full_value(loaded: Loaded) -> float:
    """The full model's value on the report items."""
    from searchlab.evaluators.language.experts import experts_evaluator
    from searchlab.spaces.experts import pruning_space

    layout, prepared = loaded.prepared.layout, loaded.prepared
    whole = pruning_space(layout, keep=layout.experts)
    evaluator = experts_evaluator(
        loaded.resident, whole, prepared.task, prepared.settings, prompts=prepared.prompts
    )
    every = whole.of_masks(np.ones((1, len(layout.blocks), layout.experts), dtype=bool))
    jobs = Jobs(np.arange(1), every, whole.keys(every), replicate=REPORT_REPLICATE)
    return float(evaluator.evaluate(jobs).values[0, 0])


def search(options: ExpertsOptions) -> tuple[Loaded, Any, float]:
    """A run of the recipe without its files: what was loaded, the result, CPU seconds."""
    from searchlab.config import Final

    loaded = prepare(options).load()
    config = SearchConfig(
        tuple(stages_of(loaded)),
        name="experts",
        seed=options.seed,
        final=Final(k=5, report=1, named=tuple(loaded.known)),
    )
    began = time.process_time()
    result = run(config)
    return loaded, result, time.process_time() - began


def _tables(journal: Journal, quick: bool, *, keep: str, strict: bool) -> None:
    tasks = _tasks(journal, quick)
    seeds = (0,) if quick else (0, 1, 2)
    budget = 24 if quick else 120
    for task in tasks:
        rows: list[dict[str, Any]] = []
        for seed in seeds:
            options = ExpertsOptions(
                task=task, keep=keep, budget=budget, seed=seed, items=32 if quick else None
            )
            loaded, result, took = search(options)
            group = result.groups[-1]
            found = group.winner.report[0]
            known = {c.name: c.report[0] for c in group.baselines if c.report}
            rows.append(
                {
                    "seed": seed,
                    "found": found,
                    "search": group.winner.search,
                    "selection": group.winner.selection,
                    "evaluations": result.counts["evaluations"],
                    "measured_items": loaded.evaluator.measured,
                    "cpu_s": round(took, 1),
                    **known,
                }
            )
        drawn = loaded.space.sample(
            uniforms(7, 0, 0, 10 if quick else RANDOM, loaded.space.sample_width)
        )
        random = reported(loaded, drawn)
        full = full_value(loaded)
        known_best = max(value for name, value in known.items())
        worst = min(row["found"] for row in rows)
        aims = [
            Aim("found over random", worst - float(random.mean()), "at least", 10 * POINT),
        ]
        if not quick:
            short = (float(np.mean([row["found"] for row in rows])) - known_best) / POINT
            aims.append(Aim("points over the best ranking", short, "at least", 0.0, binding=False))
        if strict:
            aims.append(Aim("lost of full", full - worst, "at most", POINT, binding=not quick))
        journal.case(
            f"characters, {task}, {keep} of the experts",
            {
                "full": full,
                "random_mean": float(random.mean()),
                "random_best": float(random.max()),
                "report_items": len(loaded.prepared.task.splits["report"]),
                "majority": loaded.prepared.task.majority("report"),
                "runs": rows,
            },
            seeds=seeds,
            aims=aims,
        )


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
            _, result, _ = search(options)
            group = result.groups[-1]
            known = {c.name: c.report[0] for c in group.baselines if c.report}
            best = result.best.contender
            rows.append(
                {
                    "seed": seed,
                    "found": best.report[0] if best.report else float("nan"),
                    "searched": group.winner.report[0],
                    "reap": known["reap"],
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
                task="code",
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
            assert winner is not None
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
        "characters, predictor with half of the evaluations",
        {"runs": rows, "mean_ratio_of_perplexities": ratio},
        seeds=seeds,
        aims=[Aim("guided over plain", ratio, "at most", 1.0, binding=False)],
    )
